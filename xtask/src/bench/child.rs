//! Work that another process does, with its time and the most memory it took.

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::Failure;

/// What work took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    pub(super) seconds: f64,
    pub(super) peak_bytes: f64,
}

/// Runs a program of ours to its end, its answer into a file.
pub(super) fn run(command: &mut Command, answer: &Path) -> Result<(ExitStatus, Effort), Failure> {
    let start = Instant::now();
    let mut child = command.stdout(std::fs::File::create(answer)?).spawn()?;
    // The kernel keeps the peak while the process lives; the last look before its end is near enough.
    let mut peak = 0;
    let status = loop {
        peak = peak_bytes(child.id()).unwrap_or(0).max(peak);
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    Ok((status, Effort { seconds: start.elapsed().as_secs_f64(), peak_bytes: peak as f64 }))
}

/// Runs a script that says itself, in its last line, how many seconds its work took and how many bytes at most: what its
/// language takes to start is no part of it.
pub(super) fn run_script(command: &mut Command) -> Result<Effort, Failure> {
    let output = command.stderr(Stdio::piped()).output()?;
    let problem = || {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        Failure::from(text.trim_end().lines().last().unwrap_or("the script said nothing").to_owned())
    };
    if !output.status.success() {
        return Err(problem());
    }
    let text = String::from_utf8(output.stdout.clone())?;
    let numbers: Vec<f64> = text.lines().last().unwrap_or("").split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let [seconds, peak_bytes] = numbers[..] else { return Err(problem()) };
    Ok(Effort { seconds, peak_bytes })
}

/// The largest resident memory of a process so far.
fn peak_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
