//! A full disk and sudden death leave nothing half-written.
//!
//! The test runs itself as a child: under a limit on the size of files, whose breach a write reports as it does a full
//! disk, and until killed at some moment. It therefore has its own `main`.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Map, json};
use updraft_base::{Clock, SystemClock};
use updraft_store::{Origin, Store, StoreError};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[1..] {
        ["child", "large", dir] => put_too_large(Path::new(dir)),
        ["child", "forever", dir] => put_forever(Path::new(dir)),
        _ => {
            a_full_disk_is_an_error_and_leaves_nothing_half_written();
            a_kill_at_any_moment_leaves_only_whole_artifacts();
        }
    }
}

fn origin(n: usize) -> Origin {
    Origin { kind: "checkpoint".into(), recipe: json!({ "step": n }), ..Origin::default() }
}

#[cfg(unix)]
fn a_full_disk_is_an_error_and_leaves_nothing_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let status = Command::new("sh")
        // 64 or 128 KiB, as the shell counts; the signal must be ignored for the write to report the limit.
        .args(["-c", "trap '' XFSZ; ulimit -f 128; exec \"$0\" child large \"$1\""])
        .arg(std::env::current_exe().unwrap())
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");

    let store = Store::open(dir.path()).unwrap();
    let listed = store.list().unwrap();
    assert_eq!(listed.iter().map(|a| &a.origin).collect::<Vec<_>>(), [&origin(1)]);
    assert_eq!(store.get(&listed[0].digest).unwrap().len(), 1000);
    assert_eq!(files_below(&dir.path().join("objects")), 1, "the failed write left a file");
}

#[cfg(not(unix))]
fn a_full_disk_is_an_error_and_leaves_nothing_half_written() {}

fn put_too_large(dir: &Path) {
    let store = Store::open(dir).unwrap();
    store.put(&origin(1), vec![1; 1000], Map::new()).unwrap();
    let error = store.put(&origin(2), vec![2; 1 << 20], Map::new()).unwrap_err();
    assert!(matches!(&error, StoreError::Write { object, .. } if object.starts_with("objects/")), "{error}");
}

fn a_kill_at_any_moment_leaves_only_whole_artifacts() {
    let clock = SystemClock::new();
    let dir = tempfile::tempdir().unwrap();
    let mut whole = 0;
    for round in 0..6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "forever"])
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        clock.sleep_ms(60 + 37 * round);
        child.kill().unwrap();
        child.wait().unwrap();

        let store = Store::open(dir.path()).unwrap();
        let listed = store.list().unwrap();
        assert!(listed.len() >= whole);
        whole = listed.len();
        for artifact in &listed {
            assert_eq!(store.get(&artifact.digest).unwrap().len() as u64, artifact.size_bytes);
        }
        if let Some(latest) = store.pointer("runs/test/latest").unwrap() {
            store.get(&latest).unwrap();
        }
    }
    assert!(whole > 0, "the child never came to write");
}

fn put_forever(dir: &Path) {
    let store = Store::open(dir).unwrap();
    for n in store.list().unwrap().len().. {
        let artifact = store.put(&origin(n), vec![n as u8; 300_000 + n], Map::new()).unwrap();
        store.set_pointer("runs/test/latest", &artifact.digest).unwrap();
    }
}

fn files_below(dir: &Path) -> usize {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| if path.is_dir() { files_below(&path) } else { 1 })
        .sum()
}
