//! Streams of a real Redis into datasets, with followers and servers that are killed.

#![allow(clippy::print_stdout, reason = "counts are for the log")]

use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use updraft_base::{Clock, Digest, Key, SystemClock};
use updraft_sim::{Dialect, ObjectServer, RedisConnection, RedisServer};

use crate::followed::{counted, numbers, version};
use crate::workplace::Workplace;

/// A folder and a server that keeps its data below it.
fn setting() -> (Workplace, RedisServer) {
    let workplace = Workplace::new();
    std::fs::create_dir(workplace.path("server")).unwrap();
    let server = RedisServer::start(&workplace.path("server"), RedisServer::free_port());
    (workplace, server)
}

/// Adds entries with these numbers and some text.
fn add(connection: &mut RedisConnection, stream: &str, numbers: std::ops::Range<u64>) {
    let commands: Vec<Vec<String>> = numbers
        .map(|n| ["XADD", stream, "*", "n", &n.to_string(), "text", &format!("entry {n}")].map(str::to_owned).to_vec())
        .collect();
    connection.call_all(&commands).unwrap();
}

#[test]
fn every_entry_comes_once_and_in_order_however_often_the_follower_is_killed() {
    let (workplace, server) = setting();
    const ENTRIES: u64 = 10_000;
    let clock = SystemClock::new();
    let stream = format!("{}/clicks", server.url());
    for format in ["mds", "parquet"] {
        server.call(&["DEL", "clicks"]);
        let target = workplace.path(format);
        let follow = |end: &[&str]| {
            let shards = ["--format", format, "--shard-bytes", "8KiB", "--shard-seconds", "1"];
            let arguments = [&["data", "follow", &stream, target.to_str().unwrap()], shards.as_slice(), end].concat();
            let mut command = workplace.command(&arguments);
            command.stdout(Stdio::null());
            command
        };
        let is_written = AtomicBool::new(false);
        let mut kills = 0;
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let clock = SystemClock::new();
                let mut connection = server.connect().unwrap();
                for first in (0..ENTRIES).step_by(50) {
                    add(&mut connection, "clicks", first..first + 50);
                    clock.sleep_ms(20);
                }
                is_written.store(true, Ordering::SeqCst);
            });
            let key = Key::new(clock.now_unix_ms());
            while !is_written.load(Ordering::SeqCst) && !writer.is_finished() {
                let mut child = follow(&[]).spawn().unwrap();
                clock.sleep_ms(20 + key.below(kills, 400));
                assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
                // SIGKILL: nothing is cleaned up.
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        });
        assert!(kills >= 5, "only {kills} kills while entries came");
        assert!(follow(&["--once"]).status().unwrap().success());
        assert_eq!(numbers(&target, "n"), counted(0..ENTRIES as i64), "{format} after {kills} kills");
        let shards = version(&target, None).manifest.shards.len();
        println!("{format}: {ENTRIES} entries in {shards} shards, {kills} kills, none lost or doubled");
    }
}

#[test]
fn late_entries_are_a_new_segment_and_older_versions_stay() {
    let (workplace, server) = setting();
    let stream = format!("{}/clicks", server.url());
    let mut connection = server.connect().unwrap();
    let follow = || workplace.json(&["data", "follow", &stream, "out", "--once"]);
    add(&mut connection, "clicks", 0..100);
    let first = follow();
    assert_eq!((first["entries"].as_u64(), first["shards"].as_u64()), (Some(100), Some(1)));
    // Nothing new is the same version.
    let again = follow();
    assert_eq!((again["entries"].as_u64(), &again["version"]), (Some(0), &first["version"]));
    // What was read may be dropped.
    server.call(&["XTRIM", "clicks", "MAXLEN", "0"]);
    add(&mut connection, "clicks", 100..130);
    let second = follow();
    assert_eq!(second["entries"].as_u64(), Some(30));
    let out = workplace.path("out");
    assert_eq!(numbers(&out, "n"), counted(0..130));
    let digest: Digest = first["version"].as_str().unwrap().parse().unwrap();
    let (before, after) = (version(&out, Some(&digest)), version(&out, None));
    assert_eq!((before.digest, before.manifest.samples()), (digest, 100));
    assert_eq!(after.manifest.shards[..1], before.manifest.shards[..]);
    assert_eq!((after.manifest.samples(), after.segments), (130, 2));
    assert_eq!(after.manifest.streams[&stream].after, Some(before.manifest.streams[&stream].last.clone()));
}

#[test]
fn entries_dropped_before_they_were_read_are_an_error_that_counts_them() {
    let (workplace, server) = setting();
    let stream = format!("{}/clicks", server.url());
    let mut connection = server.connect().unwrap();
    let follow = ["data", "follow", &stream, "out", "--once"];
    add(&mut connection, "clicks", 0..100);
    let first = workplace.json(&follow);
    let last = first["last"].as_str().unwrap();
    add(&mut connection, "clicks", 100..150);
    server.call(&["XTRIM", "clicks", "MAXLEN", "20"]);
    let (code, message) = workplace.failure(&follow);
    assert_eq!(code, 3, "{message}");
    assert!(message.contains(&format!("clicks: 30 entries after entry {last} and before entry")), "{message}");
    assert_eq!(numbers(&workplace.path("out"), "n"), counted(0..100));
    let accepted = workplace.json(&[follow.as_slice(), &["--accept-loss"]].concat());
    assert_eq!((accepted["lost"].as_u64(), accepted["entries"].as_u64()), (Some(30), Some(20)));
    assert_eq!(numbers(&workplace.path("out"), "n"), [counted(0..100), counted(130..150)].concat());
    // A stream that was made anew has no place to go on from.
    server.call(&["DEL", "clicks"]);
    let (code, message) = workplace.failure(&follow);
    assert!(code == 3 && message.contains("there is no such stream"), "{message}");
    add(&mut connection, "clicks", 0..3);
    let (code, message) = workplace.failure(&follow);
    assert!(code == 3 && message.contains("made anew"), "{message}");
}

#[test]
fn a_server_that_is_gone_is_named_and_following_goes_on_when_it_is_back() {
    let (workplace, server) = setting();
    let (stream, port) = (format!("{}/clicks", server.url()), server.port());
    add(&mut server.connect().unwrap(), "clicks", 0..100);
    let follow = ["data", "follow", &stream, "out", "--patience-seconds", "0"];
    let mut child = workplace.command(&follow).args(["--shard-seconds", "1"]).stderr(Stdio::piped()).spawn().unwrap();
    let clock = SystemClock::new();
    for _ in 0..200 {
        if workplace.path("out/LATEST").exists() {
            break;
        }
        clock.sleep_ms(50);
    }
    server.kill();
    assert_eq!(child.wait().unwrap().code(), Some(6));
    let mut message = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut message).unwrap();
    assert!(message.contains(&format!("redis://127.0.0.1:{port} does not answer")), "{message}");
    let (code, message) = workplace.failure(&follow);
    assert!(code == 6 && message.contains(&format!("127.0.0.1:{port}")), "{message}");

    let server = RedisServer::start(&workplace.path("server"), port);
    add(&mut server.connect().unwrap(), "clicks", 100..120);
    // A follower that is patient does not even notice.
    let mut child =
        workplace.command(&["data", "follow", &stream, "out", "--until-idle-seconds", "4"]).spawn().unwrap();
    clock.sleep_ms(500);
    server.kill();
    let server = RedisServer::start(&workplace.path("server"), port);
    add(&mut server.connect().unwrap(), "clicks", 120..140);
    assert!(child.wait().unwrap().success());
    assert_eq!(numbers(&workplace.path("out"), "n"), counted(0..140));
}

#[test]
fn an_entry_that_does_not_fit_is_named_after_those_before_it_were_kept() {
    let (workplace, server) = setting();
    let stream = format!("{}/clicks", server.url());
    let mut connection = server.connect().unwrap();
    add(&mut connection, "clicks", 0..10);
    let follow = ["data", "follow", &stream, "out", "--once"];
    workplace.json(&follow);
    add(&mut connection, "clicks", 10..15);
    let bad = server.call(&["XADD", "clicks", "*", "n", "many", "text", "x"]);
    for _ in 0..2 {
        let (code, message) = workplace.failure(&follow);
        assert_eq!(code, 3, "{message}");
        assert!(message.contains(&format!("clicks entry {bad}, column `n`: `many` is not i64")), "{message}");
        assert_eq!(numbers(&workplace.path("out"), "n"), counted(0..15));
    }
}

#[test]
fn two_followers_at_once_double_nothing() {
    let (workplace, server) = setting();
    let stream = format!("{}/clicks", server.url());
    add(&mut server.connect().unwrap(), "clicks", 0..2000);
    let arguments = ["data", "follow", &stream, "out", "--once", "--shard-bytes", "4KiB"];
    let mut children: Vec<_> =
        (0..2).map(|_| workplace.command(&arguments).stderr(Stdio::null()).spawn().unwrap()).collect();
    let codes: Vec<_> = children.iter_mut().map(|child| child.wait().unwrap().code()).collect();
    assert!(codes.contains(&Some(0)) || codes == [Some(3), Some(3)], "{codes:?}");
    assert!(workplace.command(&arguments).status().unwrap().success());
    assert_eq!(numbers(&workplace.path("out"), "n"), counted(0..2000), "{codes:?}");
}

/// Two machines that know nothing of each other but the server: the second finds what the first has fetched.
#[test]
fn what_one_machine_fetched_others_find_in_redis() {
    let (workplace, server) = setting();
    let objects = ObjectServer::start(Dialect::S3, None).unwrap();
    let (url, settings) = objects.url_and_settings();
    let redis = server.url();
    let run = |arguments: &[&str]| -> Value {
        let mut command = workplace.command(&[arguments, &["--json", "--cache-redis", &redis]].concat());
        for (name, value) in &settings {
            command.env(format!("AWS_{}", name.to_uppercase()), value);
        }
        let output = command.env("AWS_REGION", "us-east-1").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let target = format!("{url}/set");
    run(&["data", "ingest", "train.npz", &target, "--shard-rows", "20"]);
    let first = run(&["data", "bench", &target]);
    let second = run(&["data", "bench", &target]);
    assert_eq!((&first["rows"], &first["bytes"]), (&second["rows"], &second["bytes"]));
    assert!(first["shared_cache"]["put_bytes"].as_u64() > Some(0), "{first}");
    assert!(second["shared_cache"]["hit_bytes"].as_u64() >= first["shared_cache"]["put_bytes"].as_u64(), "{second}");
    let read = |answer: &Value| answer["stores"][0]["bytes_read"].as_u64().unwrap();
    assert!(read(&second) < read(&first) / 2, "{} bytes after {}", read(&second), read(&first));
    // Without the server all is as it was.
    server.kill();
    assert_eq!(run(&["data", "bench", &target])["rows"], first["rows"]);
}
