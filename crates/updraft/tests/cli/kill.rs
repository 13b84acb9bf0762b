//! Trainings and searches that are killed again and again end as those that are not.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use serde_json::Value;
use updraft_base::{Clock, Digest, Key, SystemClock};
use updraft_store::Store;

use crate::workplace::{RECIPE, Workplace};

/// Kills over all rounds.
const KILLS: u32 = 24;

/// Kills of one round, after which it may finish: the first steps are hit more often than the last otherwise.
const KILLS_OF_ROUND: u32 = 8;

/// Rounds in which no kill hits would mean that the moments are chosen wrongly, not that resumption works.
const ROUNDS_MAX: u32 = 60;

#[test]
fn a_run_killed_at_random_moments_ends_in_the_bits_of_an_uninterrupted_one() {
    let workplace = Workplace::new();
    let clock = SystemClock::new();
    let start_ns = clock.monotonic_ns();
    let expected = workplace.json(&["train", ".", "--store", "uninterrupted"]);
    let duration_ms = (clock.monotonic_ns() - start_ns) / 1_000_000;

    let key = Key::new(11).child("kill");
    let (mut kills, mut draws) = (0, 0);
    for round in 0.. {
        assert!(round < ROUNDS_MAX, "only {kills} kills hit a running training");
        let store = format!("store-{round}");
        let mut kills_of_round = 0;
        while kills_of_round < KILLS_OF_ROUND && kills < KILLS {
            let mut child = workplace
                .command(&["train", ".", "--store", &store])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            clock.sleep_ms(key.below(draws, duration_ms.max(1)));
            draws += 1;
            // On Unix this is SIGKILL: nothing of the process runs after it.
            child.kill().unwrap();
            if child.wait().unwrap().success() {
                break;
            }
            kills += 1;
            kills_of_round += 1;
        }
        let resumed = workplace.json(&["train", ".", "--store", &store]);
        assert_eq!(resumed["model_digest"], expected["model_digest"], "round {round} after {kills_of_round} kills");
        // The whole course is the same, not only where it led.
        assert_eq!(resumed["artifacts"], expected["artifacts"], "round {round} after {kills_of_round} kills");
        if kills >= KILLS {
            break;
        }
    }
}

/// Kills of a search, in all and of one that goes on.
const SEARCH_KILLS: u32 = 6;
const SEARCH_KILLS_OF_ROUND: u32 = 3;

/// A search with pruning, recovery and all that integers need.
const OPTIMIZE: &str = r#"
[optimize]
max_drop = "20%"
time_limit = "1h"
calibration_samples = 64
prune = { ratios = [0.5], recovery_steps = 20 }
"#;

fn search(objective: &str, store: &str) -> Vec<String> {
    let all = "optimize points.onnx --data . -o small.onnx --objective";
    all.split(' ').chain([objective, "--store", store]).map(str::to_owned).collect()
}

/// The answer of a search, also of one that found nothing better than the original, which has an exit code of its own.
fn answer(workplace: &Workplace, arguments: &[&str]) -> Value {
    let output = workplace.command(arguments).arg("--json").output().unwrap();
    assert!(is_done(output.status), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn is_done(status: ExitStatus) -> bool {
    matches!(status.code(), Some(0 | 7))
}

/// Everything that the search found out, in the order in which it did.
fn account(workplace: &Workplace, store: &str, answer: &Value) -> Value {
    let digest: Digest = answer["account"].as_str().unwrap().parse().unwrap();
    let store = Store::open(&workplace.path(store)).unwrap();
    serde_json::from_slice(&store.get(&digest).unwrap()).unwrap()
}

/// The account without measured times, and without the front, which is about times too.
fn without_times(mut account: Value) -> Value {
    account["outcome"]["front"].take();
    for trial in account["outcome"]["trials"].as_array_mut().unwrap() {
        trial["speed"].take();
    }
    account
}

/// What was measured and cannot be measured again to the bit: origins of times, and the times.
fn times(folder: &Path) -> BTreeSet<(String, String)> {
    let artifacts = Store::open(folder).unwrap().list().unwrap();
    let times = artifacts.into_iter().filter(|artifact| artifact.origin.kind == "latency");
    times.map(|artifact| (artifact.origin.digest().to_string(), artifact.digest.to_string())).collect()
}

/// Kills searches at random moments of those that `duration_ms` has, each several times, then lets them end. Gives the
/// store and the answer of each to `check`.
fn kill_searches(
    workplace: &Workplace,
    objective: &str,
    duration_ms: u64,
    prepare: &dyn Fn(&Path),
    check: &dyn Fn(&str, &Value),
) {
    let clock = SystemClock::new();
    let key = Key::new(12).child(objective);
    let (mut kills, mut draws) = (0, 0);
    for round in 0.. {
        assert!(round < ROUNDS_MAX, "only {kills} kills hit a running search");
        let store = format!("killed-{objective}-{round}");
        prepare(&workplace.path(&store));
        let arguments = search(objective, &store);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut measured = BTreeSet::new();
        let mut kills_of_round = 0;
        while kills_of_round < SEARCH_KILLS_OF_ROUND && kills < SEARCH_KILLS {
            let mut child = workplace.command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            clock.sleep_ms(key.below(draws, duration_ms.max(1)));
            draws += 1;
            child.kill().unwrap();
            let is_done = is_done(child.wait().unwrap());
            measured.extend(times(&workplace.path(&store)));
            if is_done {
                break;
            }
            kills += 1;
            kills_of_round += 1;
        }
        let answer = answer(workplace, &arguments);
        // Each time was measured once, before or after the kills, and never again.
        let all = times(&workplace.path(&store));
        assert!(measured.is_subset(&all), "round {round}");
        assert_eq!(all.iter().map(|(origin, _)| origin).collect::<BTreeSet<_>>().len(), all.len(), "round {round}");
        check(&store, &answer);
        if kills >= SEARCH_KILLS {
            break;
        }
    }
}

/// For size no decision hangs on times, so all but the times is the same to the bit. For latency it is the same to the
/// bit, times included, where the times are those that the uninterrupted search measured.
#[test]
fn a_search_killed_at_random_moments_decides_what_an_uninterrupted_one_does() {
    let workplace = Workplace::new();
    let recipe = RECIPE.replace("hidden = 16", "hidden = [64, 64]");
    workplace.write_recipe(&format!("{recipe}\n{OPTIMIZE}"));
    workplace.json(&["train", ".", "--output", "points.onnx", "--store", "training"]);
    let clock = SystemClock::new();
    let run = |objective: &str| {
        let start_ns = clock.monotonic_ns();
        let arguments = search(objective, objective);
        let answer = answer(&workplace, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        (account(&workplace, objective, &answer), answer, (clock.monotonic_ns() - start_ns) / 1_000_000)
    };

    let (expected, expected_answer, duration_ms) = run("size");
    assert_eq!(expected["outcome"]["is_cut_short"], false);
    assert!(expected["outcome"]["trials"].as_array().unwrap().len() > 10, "{expected:#}");
    let expected = without_times(expected);
    let check = |store: &str, answer: &Value| {
        assert_eq!(answer["model_digest"], expected_answer["model_digest"], "{store}");
        assert_eq!(without_times(account(&workplace, store, answer)), expected, "{store}");
    };
    kill_searches(&workplace, "size", duration_ms, &|_| (), &check);

    let (expected, expected_answer, duration_ms) = run("latency");
    let only_times = |store: &Path| {
        let (from, to) = (Store::open(&workplace.path("latency")).unwrap(), Store::open(store).unwrap());
        let all = from.list().unwrap();
        // A time is that of a model, which must be there; what was found out about the model is not taken along.
        let kinds: Vec<&[&str]> = vec![&["dataset", "network"], &["candidate"], &["latency"]];
        for kinds in kinds {
            let mut left: Vec<_> = all.iter().filter(|a| kinds.contains(&a.origin.kind.as_str())).collect();
            while !left.is_empty() {
                let before = left.len();
                left.retain(|a| to.put(&a.origin, from.get(&a.digest).unwrap(), a.meta.clone()).is_err());
                assert!(left.len() < before, "parents of {:?}", left[0].origin);
            }
        }
    };
    let check = |store: &str, answer: &Value| {
        assert_eq!(answer["model_digest"], expected_answer["model_digest"], "{store}");
        assert_eq!(account(&workplace, store, answer), expected, "{store}");
    };
    kill_searches(&workplace, "latency", duration_ms, &only_times, &check);
}
