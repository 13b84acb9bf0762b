//! The guide's commands work: each page is run from top to bottom in a folder of its own.
//!
//! A fence ` ```toml file=NAME ` writes a file. A fence ` ```console ` holds commands after `$ `, run by the shell with
//! our program on the path; what follows a command must be its output, line by line, unless nothing follows. In
//! ` ```console fails ` the last command must fail with a message and without a panic. What is in ` ```console query ` is
//! run where the program is built with the feature `query`, and so is `cluster`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

struct Fence {
    info: String,
    line: usize,
    lines: Vec<String>,
}

fn fences(page: &str) -> Vec<Fence> {
    let mut all = Vec::new();
    let mut open: Option<Fence> = None;
    for (i, line) in page.lines().enumerate() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(_), Some(_)) => all.extend(open.take()),
            (Some(info), None) => open = Some(Fence { info: info.to_owned(), line: i + 1, lines: Vec::new() }),
            (None, Some(fence)) => fence.lines.push(line.to_owned()),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a fence is not closed");
    all
}

/// Processes that commands ending in `&` left running.
struct Running(Vec<Child>);

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // A process that is gone already is as good.
            child.kill().ok();
            child.wait().ok();
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "the shell finds our program by the path")]
fn run_page(name: &str) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let copied = Command::new("cp")
        .arg("-r")
        .args([root().join("docs/guide/files"), root().join("examples")])
        .arg(folder.path())
        .status()
        .unwrap();
    assert!(copied.success());
    let programs = Path::new(env!("CARGO_BIN_EXE_updraft")).parent().unwrap().to_owned();
    #[allow(clippy::disallowed_methods, reason = "the commands need the shell's own programs too")]
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let page = std::fs::read_to_string(root().join("docs/guide").join(name)).unwrap();
    let (mut commands, mut running) = (0, Running(Vec::new()));
    for fence in fences(&page) {
        if let Some((_, file)) = fence.info.split_once("file=") {
            std::fs::write(folder.path().join(file), fence.lines.join("\n") + "\n").unwrap();
            continue;
        }
        let is_built = (cfg!(feature = "query") || !fence.info.contains("query"))
            && (cfg!(feature = "cluster") || !fence.info.contains("cluster"));
        if !fence.info.starts_with("console") || !is_built {
            continue;
        }
        let starts: Vec<usize> = (0..fence.lines.len()).filter(|i| fence.lines[*i].starts_with("$ ")).collect();
        for (n, start) in starts.iter().enumerate() {
            let at = format!("docs/guide/{name}:{}", fence.line + 1 + start);
            let end = starts.get(n + 1).copied().unwrap_or(fence.lines.len());
            let expected = &fence.lines[start + 1..end];
            commands += 1;
            let command = &fence.lines[*start][2..];
            let shell = |command: &str| {
                let mut shell = Command::new("sh");
                shell.args(["-c", command]).current_dir(folder.path()).env("PATH", &path);
                shell.env("UPDRAFT_CACHE_DIR", folder.path().join("cache"));
                shell
            };
            // What is left running shows nothing, and ends with the page.
            if let Some(command) = command.strip_suffix('&') {
                running.0.push(shell(&format!("exec {command}")).spawn().unwrap());
                continue;
            }
            let done = shell(command).output().unwrap();
            let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
            let fails = fence.info.contains("fails") && n + 1 == starts.len();
            assert_eq!(done.status.success(), !fails, "{at}\n{out}{err}");
            if fails {
                assert!(out.contains("error") && !out.contains("panicked"), "{at}\n{out}");
            }
            if !expected.is_empty() {
                assert_eq!(out.trim_end(), expected.join("\n").trim_end(), "{at}");
            }
        }
    }
    commands
}

#[test]
fn every_page_of_the_guide_works() {
    let mut pages: Vec<String> = std::fs::read_dir(root().join("docs/guide"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".md") && name != "README.md")
        .collect();
    pages.sort();
    let index = std::fs::read_to_string(root().join("docs/guide/README.md")).unwrap();
    for page in &pages {
        assert!(index.contains(&format!("({page})")), "{page} is not in the guide's index");
        assert!(run_page(page) > 0, "{page} shows no command");
    }
}

#[cfg(feature = "query")]
#[test]
fn the_page_about_a_query_works() {
    assert!(run_page("query.md") > 3);
}
