//! Exactly once, whatever is killed: a process that makes batches is killed twenty times at random moments, each life with
//! another number of ranks, and what it committed is what a process that nobody kills commits.
//!
//! A life resumes from the committed token, makes the batches of all its ranks, and after each step commits: first the
//! samples of the step are appended to a log, then the token, with the length of the log, replaces the last one. What a
//! kill leaves of the log beyond that length was never committed.

#![allow(clippy::print_stdout, reason = "the counts are for the log")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use serde_json::{Value, json};
use updraft_base::{Clock, Key, SystemClock};
use updraft_data::{Dataset, DatasetConfig, Loader, LoaderOptions, LoaderToken, Shuffle, Tail, write_npz};
use updraft_graph::Tensor;

const SAMPLES: u64 = 9_600;
const STEPS: u64 = 1_600;
const KILLS: u64 = 20;
const RANKS: [usize; 6] = [1, 2, 3, 4, 6, 8];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, folder, way, ranks] = &arguments[..]
        && flag == "--life"
    {
        live(Path::new(folder), way, ranks.parse().unwrap());
        return ExitCode::SUCCESS;
    }
    // The test runner asks for a list of tests, and for those that are ignored.
    if arguments.iter().any(|a| a == "--list" || a == "--ignored") {
        return ExitCode::SUCCESS;
    }
    for way in ["lanes", "packed"] {
        survive(way);
    }
    ExitCode::SUCCESS
}

fn config(way: &str) -> Value {
    match way {
        "lanes" => json!({ "path": "a.npz", "lanes": 48, "tensors": [{ "name": "score" }] }),
        // Rows of 25 cut documents of 10, so that lanes always carry something over.
        _ => json!({
            "sources": [{ "path": "a.npz", "weight": 2.0 }, { "path": "b.npz", "weight": 1.0 }],
            "lanes": 48,
            "tensors": [{ "name": "tokens" }],
            "filter": [{ "column": "score", "at_least": 3 }],
            "pack": { "length": 25 },
        }),
    }
}

fn write_data(folder: &Path) {
    for (file, first) in [("a.npz", 0), ("b.npz", SAMPLES)] {
        let samples = first..first + SAMPLES;
        let tokens: Vec<i64> = samples.clone().flat_map(|s| (0..10).map(move |i| (10 * s + i) as i64)).collect();
        let scores: Vec<i64> = samples.map(|s| Key::new(1).below(s, 10) as i64).collect();
        let arrays = [
            ("tokens".to_owned(), Tensor::new(&[SAMPLES as usize, 10], &tokens).unwrap()),
            ("score".to_owned(), Tensor::vector(&scores)),
        ];
        write_npz(&folder.join(file), &arrays).unwrap();
    }
}

/// One life: from the committed token on, until the end or a kill.
fn live(folder: &Path, way: &str, ranks: usize) {
    let config: DatasetConfig = serde_json::from_value(config(way)).unwrap();
    let dataset = Arc::new(Dataset::open(&config, folder).unwrap());
    let of_rank = |rank| {
        let options = LoaderOptions {
            batch_size: 24,
            seed: 5,
            shuffle: Shuffle::Global,
            tail: Tail::Wrap,
            threads: 1,
            rank,
            ranks,
            ..LoaderOptions::default()
        };
        Loader::new(dataset.clone(), options).unwrap()
    };
    let loaders: Vec<Loader> = (0..ranks).map(of_rank).collect();
    let token_path = folder.join("token.json");
    let mut log = fs::OpenOptions::new().create(true).truncate(false).write(true).open(folder.join("log")).unwrap();
    let mut first = 0;
    if let Ok(text) = fs::read_to_string(&token_path) {
        let (token, log_bytes): (LoaderToken, u64) = serde_json::from_str(&text).unwrap();
        first = token.next_step;
        assert!(loaders.iter().all(|loader| loader.resume(&token).unwrap() == first));
        log.set_len(log_bytes).unwrap();
    }
    log.seek(SeekFrom::End(0)).unwrap();
    let clock = SystemClock::new();
    let mut batches: Vec<_> = loaders.iter().map(|loader| loader.batches(first..STEPS).unwrap()).collect();
    for step in first..STEPS {
        // What a row holds, as its first column says: sorted, for ranks have it in an order of their own.
        let mut rows: Vec<Vec<i64>> = Vec::new();
        for (batches, loader) in batches.iter_mut().zip(&loaders) {
            let batch = batches.next().unwrap().unwrap();
            assert_eq!(batch.step, step);
            match way {
                "lanes" => rows.extend(batch.samples.iter().map(|s| vec![*s as i64])),
                _ => rows.extend(batch.tensors[0].1.to_i64().unwrap().chunks(25).map(<[i64]>::to_vec)),
            }
            assert_eq!(batch.tensors[0].1.shape()[0], loader.batch_size());
        }
        rows.sort();
        writeln!(log, "{}", serde_json::to_string(&rows).unwrap()).unwrap();
        let tokens: Vec<LoaderToken> = loaders.iter().map(|loader| loader.token(step + 1).unwrap()).collect();
        let token = (LoaderToken::merge(&tokens).unwrap(), log.stream_position().unwrap());
        let unfinished = folder.join("token.unfinished");
        fs::write(&unfinished, serde_json::to_string(&token).unwrap()).unwrap();
        fs::rename(&unfinished, &token_path).unwrap();
        // So that there is time to be killed in.
        clock.sleep_ms(1);
    }
}

fn survive(way: &str) {
    let program = std::env::current_exe().unwrap();
    let life = |folder: &Path, ranks: usize| {
        let mut command = Command::new(&program);
        command.arg("--life").arg(folder).args([way, &ranks.to_string()]);
        command
    };
    let unharmed = tempfile::tempdir().unwrap();
    write_data(unharmed.path());
    assert!(life(unharmed.path(), 1).status().unwrap().success());

    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let clock = SystemClock::new();
    let key = Key::new(clock.now_unix_ms());
    let progress = || {
        fs::read_to_string(folder.path().join("token.json"))
            .map_or(0, |text| serde_json::from_str::<(LoaderToken, u64)>(&text).unwrap().0.next_step)
    };
    let (mut kills, mut lives) = (0, 0);
    let mut resumed_at = Vec::new();
    while kills < KILLS {
        let before = progress();
        let mut child = life(folder.path(), RANKS[lives % RANKS.len()]).spawn().unwrap();
        lives += 1;
        // It gets somewhere first, however slow the machine is, and is killed a moment later.
        while progress() == before && child.try_wait().unwrap().is_none() {
            clock.sleep_ms(1);
        }
        clock.sleep_ms(key.below(lives as u64, 40));
        if child.try_wait().unwrap().is_some() {
            break;
        }
        // SIGKILL: nothing is cleaned up.
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        resumed_at.push(progress());
    }
    assert_eq!(kills, KILLS, "{way}: the run was over after {resumed_at:?}");
    assert!(life(folder.path(), 4).status().unwrap().success());

    let read = |folder: &Path| fs::read_to_string(folder.join("log")).unwrap();
    let (killed, whole) = (read(folder.path()), read(unharmed.path()));
    assert!(killed == whole, "{way}: other batches than without kills");
    // By the log alone: in each epoch every sample comes once.
    if way == "lanes" {
        let per_epoch = (SAMPLES / 24) as usize;
        for (epoch, lines) in killed.lines().collect::<Vec<_>>().chunks(per_epoch).enumerate() {
            let mut counts: BTreeMap<i64, u64> = BTreeMap::new();
            for line in lines {
                let rows: Vec<Vec<i64>> = serde_json::from_str(line).unwrap();
                rows.into_iter().flatten().for_each(|sample| *counts.entry(sample).or_default() += 1);
            }
            let lost = SAMPLES as usize - counts.len();
            let doubled = counts.values().filter(|count| **count > 1).count();
            assert_eq!((lost, doubled), (0, 0), "epoch {epoch}");
        }
    }
    println!("{way}: killed {kills} times after steps {resumed_at:?}, 0 samples lost, 0 doubled, in {STEPS} steps");
}
