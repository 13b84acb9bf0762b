//! A training that is killed again and again ends in the same bits as one that is not.

use std::process::Stdio;

use updraft_base::{Clock, Key, SystemClock};

use crate::workplace::Workplace;

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
