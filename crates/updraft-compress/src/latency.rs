//! How long models take on this machine, one beside the other.
//!
//! A machine's speed drifts with its temperature and its other work, often by more than what is to be measured. So the
//! original and a candidate run in turns, in rounds so short that both see the same machine, and what is compared is the
//! ratio within each round. Medians over rounds do not mind single disturbed ones.

use serde::{Deserialize, Serialize};
use updraft_base::Clock;

use crate::interval::{self, Interval};

/// How latency is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencySettings {
    /// Rounds; each runs both models.
    pub rounds: u32,
    /// The least time that a model runs in a round, so that the clock's grain does not show.
    pub round_ns: u64,
    /// The least time that each model runs before the first round.
    pub warm_up_ns: u64,
}

impl Default for LatencySettings {
    fn default() -> LatencySettings {
        LatencySettings { rounds: 25, round_ns: 4_000_000, warm_up_ns: 20_000_000 }
    }
}

/// Times of one run, in nanoseconds: the median run of each round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rounds {
    /// Of the original.
    pub original_ns: Vec<f64>,
    /// Of the candidate, in the same rounds.
    pub candidate_ns: Vec<f64>,
}

impl Rounds {
    /// The candidate's time over the original's.
    pub fn ratio(&self, alpha: f64) -> Interval {
        let ratios: Vec<f64> = self.candidate_ns.iter().zip(&self.original_ns).map(|(c, o)| c / o).collect();
        interval::median(&ratios, alpha)
    }

    /// The candidate's time.
    pub fn candidate(&self, alpha: f64) -> Interval {
        interval::median(&self.candidate_ns, alpha)
    }

    /// The original's time.
    pub fn original(&self, alpha: f64) -> Interval {
        interval::median(&self.original_ns, alpha)
    }
}

/// Runs both in turns. The first of a round changes from round to round.
pub fn in_turns<E>(
    clock: &dyn Clock,
    settings: &LatencySettings,
    original: &mut dyn FnMut() -> Result<(), E>,
    candidate: &mut dyn FnMut() -> Result<(), E>,
) -> Result<Rounds, E> {
    let runs = [warm_up(clock, settings, original)?, warm_up(clock, settings, candidate)?];
    let mut rounds = Rounds { original_ns: Vec::new(), candidate_ns: Vec::new() };
    for round in 0..settings.rounds {
        let mut times_ns = [0.0; 2];
        for turn in 0..2 {
            let which = (round as usize + turn) % 2;
            let run: &mut dyn FnMut() -> Result<(), E> = if which == 0 { &mut *original } else { &mut *candidate };
            times_ns[which] = median_run_ns(clock, runs[which], run)?;
        }
        rounds.original_ns.push(times_ns[0]);
        rounds.candidate_ns.push(times_ns[1]);
    }
    Ok(rounds)
}

/// Runs a model until it is warm; returns how many runs fill a round.
fn warm_up<E>(clock: &dyn Clock, settings: &LatencySettings, run: &mut dyn FnMut() -> Result<(), E>) -> Result<u32, E> {
    let start_ns = clock.monotonic_ns();
    let mut fastest_ns = u64::MAX;
    // Twice at least: the first run plans memory.
    for i in 0u32.. {
        let before_ns = clock.monotonic_ns();
        if i >= 2 && before_ns - start_ns >= settings.warm_up_ns {
            break;
        }
        run()?;
        fastest_ns = fastest_ns.min(clock.monotonic_ns() - before_ns);
    }
    // More runs than this do not make a median better.
    Ok(settings.round_ns.div_ceil(fastest_ns.max(1)).clamp(1, 200) as u32)
}

fn median_run_ns<E>(clock: &dyn Clock, runs: u32, run: &mut dyn FnMut() -> Result<(), E>) -> Result<f64, E> {
    let mut times_ns = Vec::with_capacity(runs as usize);
    for _ in 0..runs {
        let before_ns = clock.monotonic_ns();
        run()?;
        times_ns.push((clock.monotonic_ns() - before_ns) as f64);
    }
    times_ns.sort_unstable_by(f64::total_cmp);
    Ok(times_ns[times_ns.len() / 2])
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use updraft_base::clock::FakeClock;

    use super::*;

    /// Two models that take 2 and 1 ms of a machine whose speed drifts by a factor of three, with runs that something
    /// else disturbs.
    #[test]
    fn drift_and_disturbed_rounds_do_not_change_the_ratio() {
        let clock = FakeClock::default();
        let count = Cell::new(0u64);
        let run = |duration_ns: f64| {
            let i = count.get();
            count.set(i + 1);
            let speed = 2.0 + ((i as f64) / 40.0).sin();
            let disturbed = if i.is_multiple_of(17) { 20.0 } else { 1.0 };
            clock.advance_ns((duration_ns * speed * disturbed) as u64);
            Ok::<(), ()>(())
        };
        let rounds = in_turns(&clock, &LatencySettings::default(), &mut || run(2e6), &mut || run(1e6)).unwrap();
        let ratio = rounds.ratio(0.05);
        assert!(ratio.low > 0.4 && ratio.high < 0.6, "{ratio:?}");
        assert_eq!(rounds.original_ns.len(), 25);
    }

    #[test]
    fn a_failing_run_ends_the_measurement() {
        let clock = FakeClock::default();
        let mut left = 5;
        let mut fails = || {
            clock.advance_ns(1_000_000);
            left -= 1;
            if left == 0 { Err("spent") } else { Ok(()) }
        };
        let mut works = || {
            clock.advance_ns(1_000_000);
            Ok(())
        };
        assert_eq!(in_turns(&clock, &LatencySettings::default(), &mut works, &mut fails), Err("spent"));
    }
}
