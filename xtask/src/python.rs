//! Python environments of chores that compare with Python packages: made once under `target/`, with pinned versions.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;

/// The interpreter of an environment named `name` that has exactly these packages (`onnx==1.23.2`) installed; made
/// anew when the list changes.
pub(crate) fn environment(root: &Path, name: &str, packages: &[&str]) -> Result<PathBuf, Failure> {
    environment_with(root, name, packages, &[])
}

/// The same, with packages that are installed without what they ask for, which may be much more than is used of them.
pub(crate) fn environment_with(root: &Path, name: &str, packages: &[&str], alone: &[&str]) -> Result<PathBuf, Failure> {
    let folder = root.join("target/python").join(name);
    let interpreter = folder.join("bin/python");
    let stamp = folder.join("packages.txt");
    let wanted = [packages, alone].concat().join("\n");
    if interpreter.exists() && std::fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
        return Ok(interpreter);
    }
    eprintln!("installing {} into {}", packages.join(", "), folder.display());
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    run(Command::new(&interpreter)
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(packages))?;
    if !alone.is_empty() {
        run(Command::new(&interpreter)
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"])
            .args(alone))?;
    }
    std::fs::write(stamp, wanted)?;
    Ok(interpreter)
}

/// Runs a command to its end; failing is an error that shows it.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command.status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} ended with {status}").into()) }
}

/// The same, of a command whose messages matter only when it fails.
pub(crate) fn run_quietly(command: &mut Command) -> Result<(), Failure> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into())
}
