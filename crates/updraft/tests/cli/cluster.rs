//! A scheduler and executors as processes, one of which is killed in the middle of a job.

#![allow(clippy::print_stdout, reason = "counts are for the log")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

use updraft_base::{Clock, SystemClock};
use updraft_sim::{Dialect, ObjectServer};

use crate::data::{environment, on_server};
use crate::transform::engine::{UNITS, assert_whole, digits, records, slow_recipe};
use crate::workplace::Workplace;

/// A process that says what it does; killed when dropped.
struct Process {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
}

impl Process {
    fn start(workplace: &Workplace, arguments: &[&str]) -> Process {
        Process::start_in(workplace, arguments, &[])
    }

    fn start_in(workplace: &Workplace, arguments: &[&str], environment: &[(String, String)]) -> Process {
        std::fs::create_dir_all(workplace.path("tmp")).unwrap();
        let mut command = workplace.command(arguments);
        command.envs(environment.iter().cloned());
        command.env("TMPDIR", workplace.path("tmp")).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let (lines, heard) = (BufReader::new(child.stderr.take().unwrap()).lines(), said.clone());
        // It ends with the process, whose end of the pipe is closed then.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| heard.lock().unwrap().push(line)));
        Process { child, said }
    }

    fn said(&self) -> Vec<String> {
        self.said.lock().unwrap().clone()
    }

    /// The first line that begins so, without its beginning.
    fn wait_for(&self, start: &str) -> String {
        wait(&format!("a line `{start}`"), || {
            self.said().iter().find_map(|line| line.strip_prefix(start).map(str::to_owned)).ok_or(self.said())
        })
    }

    /// Units that it began, and those of them that it ended.
    fn units(&self) -> (usize, usize) {
        let said = self.said();
        let count = |end: &str| said.iter().filter(|line| line.starts_with("unit ") && line.ends_with(end)).count();
        (count(": begun"), count(": done"))
    }

    fn kill(&mut self) {
        // A process that is gone already is as good.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Asks again and again until there is an answer, for a minute at most.
fn wait<T, S: std::fmt::Debug>(what: &str, mut ask: impl FnMut() -> Result<T, S>) -> T {
    let clock = SystemClock::new();
    loop {
        let state = match ask() {
            Ok(answer) => return answer,
            Err(state) => state,
        };
        assert!(clock.monotonic_ns() < 60_000_000_000, "{what} did not come: {state:?}");
        clock.sleep_ms(10);
    }
}

fn scheduler(workplace: &Workplace) -> (Process, String) {
    let arguments = ["data", "cluster", "scheduler", "--bind", "127.0.0.1:0", "--executor-timeout-seconds", "8"];
    let process = Process::start(workplace, &arguments);
    let address = process.wait_for("scheduler at ");
    (process, address)
}

fn executor(workplace: &Workplace, scheduler: &str) -> Process {
    let process =
        Process::start(workplace, &["data", "cluster", "executor", "--scheduler", scheduler, "--threads", "1"]);
    process.wait_for("executor at ");
    process
}

#[test]
fn every_shard_is_made_exactly_once_though_an_executor_is_killed_in_the_middle_of_the_job() {
    let workplace = digits();
    for target in ["alone", "cluster"] {
        std::fs::write(workplace.path(&format!("{target}.toml")), slow_recipe(target)).unwrap();
    }
    let alone = workplace.json(&["data", "transform", "alone.toml"]);

    let (_scheduler, address) = scheduler(&workplace);
    let (mut first, second) = (executor(&workplace, &address), executor(&workplace, &address));
    let mut client = workplace.command(&["data", "transform", "cluster.toml", "--cluster", &address, "--json"]);
    let client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let target = workplace.path("cluster");
    let killed_at = wait("a moment in the middle", || {
        let (begun, done) = first.units();
        let count = records(&target);
        let is_in_the_middle = done >= 2 && begun > done && second.units().1 >= 2;
        if is_in_the_middle { Ok(count) } else { Err((begun, done, second.units(), count)) }
    });
    first.kill();
    assert!((1..UNITS).contains(&killed_at), "{killed_at} of {UNITS} units were done");
    let (begun, done) = first.units();
    assert!(begun > done, "it was killed while it did a unit");

    let output = client.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}\nexecutor: {:?}", second.said());
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["version"], alone["version"]);
    assert_eq!((answer["units"].as_u64(), answer["made"].as_u64()), (Some(UNITS), Some(UNITS)));
    assert_whole(&workplace, "cluster", &answer, "alone");
    println!(
        "{killed_at} of {UNITS} units done when an executor was killed, which had begun {begun} and done {done}; the other \
         did {}",
        second.units().1
    );

    // What is done is found, with nobody to do it.
    drop((first, second));
    let again = workplace.json(&["data", "transform", "cluster.toml", "--cluster", &address]);
    assert_eq!((again["made"].as_u64(), &again["version"]), (Some(0), &alone["version"]));
}

#[test]
fn executors_reach_stores_by_their_own_environment() {
    let workplace = digits();
    let server = ObjectServer::start(Dialect::S3, None).unwrap();
    for (name, target) in [("alone.toml", "alone"), ("far.toml", "s3://bucket/far")] {
        std::fs::write(workplace.path(name), slow_recipe(target)).unwrap();
    }
    let alone = workplace.json(&["data", "transform", "alone.toml"]);
    let (_scheduler, address) = scheduler(&workplace);
    let arguments = ["data", "cluster", "executor", "--scheduler", &address, "--threads", "2"];
    let executor = Process::start_in(&workplace, &arguments, &environment(&server));
    executor.wait_for("executor at ");
    let arguments = ["data", "transform", "far.toml", "--cluster", &address, "--json"];
    let far: serde_json::Value = serde_json::from_str(&on_server(&workplace, &server, &arguments)).unwrap();
    assert_eq!((&far["version"], far["made"].as_u64()), (&alone["version"], Some(UNITS)));
    assert_eq!(executor.units().1 as u64, UNITS);
    let (shards, made) = (far["shards"].as_array().unwrap(), server.objects());
    let made: Vec<&str> =
        made.keys().filter_map(|key| key.strip_prefix("far/")).filter(|k| k.starts_with("shard-")).collect();
    assert_eq!(made, shards.iter().map(|key| key.as_str().unwrap()).collect::<Vec<_>>());
}

#[test]
fn a_job_goes_on_when_all_executors_or_the_scheduler_were_lost_and_others_come() {
    let workplace = digits();
    std::fs::write(workplace.path("cluster.toml"), slow_recipe("cluster")).unwrap();
    let target = workplace.path("cluster");
    let start = |address: &str| {
        let mut client = workplace.command(&["data", "transform", "cluster.toml", "--cluster", address, "--json"]);
        client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let some_more_than = |before: u64| {
        wait("some units", || {
            let count = records(&target);
            if count > before { Ok(count) } else { Err(count) }
        })
    };

    // Without a scheduler the command ends, and what is done stays.
    let (mut lost, address) = scheduler(&workplace);
    let mut alone = executor(&workplace, &address);
    let client = start(&address);
    let done = some_more_than(1);
    lost.kill();
    alone.kill();
    let output = client.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{message}");
    assert!(message.contains(&format!("no scheduler answers at {address}")), "{message}");
    assert!(message.contains("the same command goes on from there"), "{message}");

    // Without executors it waits for others.
    let (_scheduler, address) = scheduler(&workplace);
    let mut alone = executor(&workplace, &address);
    let client = start(&address);
    let more = some_more_than(done + 1);
    alone.kill();
    let _other = executor(&workplace, &address);
    let output = client.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{message}");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let made = answer["made"].as_u64().unwrap();
    assert!(made >= UNITS - more && made <= UNITS - done, "{made} made; {done} and {more} were done before");
    assert_eq!(answer["shards"].as_array().unwrap().len() as u64, UNITS);
    std::fs::write(workplace.path("alone.toml"), slow_recipe("alone")).unwrap();
    let alone = workplace.json(&["data", "transform", "alone.toml"]);
    assert_eq!(answer["version"], alone["version"]);
    assert_whole(&workplace, "cluster", &answer, "alone");
}

#[test]
fn sql_of_all_rows_and_errors_of_rows_come_back_from_executors_as_they_are_said_here() {
    let workplace = Workplace::new();
    std::fs::write(workplace.path("people.csv"), "age,city\n34,Ulm\n21,Bern\n51,Graz\n40,Ulm\n").unwrap();
    let recipe = |target: &str, sql: &str| {
        let text =
            format!("source = \"people.csv\"\ntarget = \"{target}\"\nsql = \"{sql}\"\n[write]\nshard_rows = 2\n");
        std::fs::write(workplace.path(&format!("{target}.toml")), text).unwrap();
    };
    let groups = "select city, avg(age) as age from data group by city order by city";
    recipe("alone", groups);
    recipe("cluster", groups);
    recipe("wrong", "select 1 / (age - 40) as part from data");
    let alone = workplace.json(&["data", "transform", "alone.toml"]);
    let (_scheduler, address) = scheduler(&workplace);
    let executor = executor(&workplace, &address);
    let cluster = workplace.json(&["data", "transform", "cluster.toml", "--cluster", &address]);
    assert_eq!((&cluster["version"], cluster["made"].as_u64()), (&alone["version"], Some(2)));
    assert_eq!(cluster["needs_all_rows"], "it orders rows");
    assert_whole(&workplace, "cluster", &cluster, "alone");

    let here = workplace.failure(&["data", "transform", "wrong.toml"]);
    let there = workplace.failure(&["data", "transform", "wrong.toml", "--cluster", &address]);
    assert_eq!(there, here, "{:?}", executor.said());
}

#[test]
fn addresses_where_nobody_is_or_somebody_else_are_named() {
    let workplace = Workplace::new();
    std::fs::write(workplace.path("people.csv"), "age,city\n34,Ulm\n").unwrap();
    std::fs::write(workplace.path("a.toml"), "source = \"people.csv\"\ntarget = \"out\"\n").unwrap();
    let port = updraft_sim::RedisServer::free_port();
    let nobody = format!("ballista://127.0.0.1:{port}");
    let (code, message) = workplace.failure(&["data", "transform", "a.toml", "--cluster", "spark://x:1"]);
    assert_eq!(code, 2, "{message}");
    let executor = ["data", "cluster", "executor", "--scheduler", &nobody, "--patience-seconds", "0"];
    let (code, message) = workplace.failure(&executor);
    assert_eq!(code, 6, "{message}");
    assert!(message.contains(&format!("no scheduler answers at {nobody}")), "{message}");

    let (_scheduler, address) = scheduler(&workplace);
    let taken = address.strip_prefix("ballista://").unwrap();
    for role in [&["scheduler"][..], &["executor", "--scheduler", &address]] {
        let (code, message) = workplace.failure(&[&["data", "cluster"], role, &["--bind", taken]].concat());
        assert_eq!(code, 6, "{message}");
        assert!(message.contains(&format!("cannot listen at {taken}")), "{message}");
    }
}

#[test]
fn processes_end_in_order_when_they_are_asked_to() {
    let workplace = Workplace::new();
    let (mut scheduler, address) = scheduler(&workplace);
    let mut executor = executor(&workplace, &address);
    for process in [&mut executor, &mut scheduler] {
        let pid = process.child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let status = wait("an end", || process.child.try_wait().unwrap().ok_or(process.said()));
        assert!(status.success(), "{:?}", process.said());
    }
    assert_eq!(std::fs::read_dir(workplace.path("tmp")).unwrap().count(), 0, "no files are left behind");
}
