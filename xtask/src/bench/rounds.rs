//! What comparisons by turns have in common: a process on the other side, and costs of the fastest round.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use crate::Failure;

/// Time of one repetition in the fastest round.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepCost {
    pub(super) wall_ms: f64,
    pub(super) cpu_ms: f64,
}

impl StepCost {
    pub(super) const WORST: StepCost = StepCost { wall_ms: f64::INFINITY, cpu_ms: f64::INFINITY };

    /// The faster of two rounds.
    pub(super) fn best(self, other: StepCost) -> StepCost {
        StepCost { wall_ms: self.wall_ms.min(other.wall_ms), cpu_ms: self.cpu_ms.min(other.cpu_ms) }
    }
}

/// The cost of one of `count` repetitions of some work of ours.
pub(super) fn measure(count: usize, mut work: impl FnMut() -> Result<(), Failure>) -> Result<StepCost, Failure> {
    let (wall, cpu) = (Instant::now(), cpu_ns()?);
    for _ in 0..count {
        work()?;
    }
    let cpu_ms = (cpu_ns()? - cpu) as f64 / 1e6;
    Ok(StepCost { wall_ms: wall.elapsed().as_secs_f64() * 1e3 / count as f64, cpu_ms: cpu_ms / count as f64 })
}

/// CPU time of all threads of this process so far.
fn cpu_ns() -> Result<u64, Failure> {
    // The kernel brings a thread's account up to date when it is scheduled, or else every few milliseconds.
    std::thread::yield_now();
    let mut total = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        total += text.split(' ').next().unwrap_or("0").parse::<u64>()?;
    }
    Ok(total)
}

/// Another system's side: a process that answers a number of repetitions with wall and CPU milliseconds.
pub(super) struct Theirs {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Theirs {
    /// Starts the process.
    pub(super) fn start(command: &mut Command) -> Result<Theirs, Failure> {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let to = process.stdin.take().ok_or("no pipe to the script")?;
        let from = BufReader::new(process.stdout.take().ok_or("no pipe from the script")?);
        Ok(Theirs { process, to, from })
    }

    /// Repeats so many times.
    pub(super) fn steps(&mut self, count: usize) -> Result<StepCost, Failure> {
        writeln!(self.to, "{count}")?;
        self.to.flush()?;
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        if line.is_empty() {
            return Err("the script ended early; its messages are above".into());
        }
        let numbers: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [wall_ms, cpu_ms] = numbers[..] else {
            return Err(format!("the script answered {line:?}, expected two numbers").into());
        };
        Ok(StepCost { wall_ms: wall_ms / count as f64, cpu_ms: cpu_ms / count as f64 })
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        // The script ends by itself when its input does; there is nobody to tell if it has already gone.
        if self.process.kill().is_ok() {
            self.process.wait().ok();
        }
    }
}
