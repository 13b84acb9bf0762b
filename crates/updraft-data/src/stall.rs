//! How long the consumer of batches waited, and on what.
//!
//! Whoever makes a batch notes how long each stage took. A wait for a batch is shared out by those times: a step that
//! waited 8 ms for a batch that spent three quarters of its making in decoding waited 6 ms for decoding. Time is that of
//! the clock the loader was given; without one nothing is measured.

use serde::{Deserialize, Serialize};
use updraft_base::Clock;

/// Nanoseconds by stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageTimes {
    /// Reading cells of the source: disk, network, and unpacking of what is packed as a whole.
    pub fetch_ns: u64,
    /// From encoded pictures to pixels of the wanted size.
    pub decode_ns: u64,
    /// Random changes, and everything done to numbers.
    pub transform_ns: u64,
    /// Writing samples into the tensors of a batch.
    pub collate_ns: u64,
}

/// A part of making a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// See [`StageTimes::fetch_ns`].
    Fetch,
    /// See [`StageTimes::decode_ns`].
    Decode,
    /// See [`StageTimes::transform_ns`].
    Transform,
    /// See [`StageTimes::collate_ns`].
    Collate,
}

impl Stage {
    /// All stages, in the order in which a batch goes through them.
    pub const ALL: [Stage; 4] = [Stage::Fetch, Stage::Decode, Stage::Transform, Stage::Collate];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Fetch => "fetch",
            Stage::Decode => "decode",
            Stage::Transform => "transform",
            Stage::Collate => "collate",
        }
    }
}

impl StageTimes {
    /// The time of one stage.
    pub fn of(&self, stage: Stage) -> u64 {
        match stage {
            Stage::Fetch => self.fetch_ns,
            Stage::Decode => self.decode_ns,
            Stage::Transform => self.transform_ns,
            Stage::Collate => self.collate_ns,
        }
    }

    /// The time of all stages.
    pub fn total_ns(&self) -> u64 {
        Stage::ALL.iter().fold(0, |sum, stage| sum.saturating_add(self.of(*stage)))
    }

    /// Takes time for one stage.
    pub fn add(&mut self, stage: Stage, ns: u64) {
        let time = match stage {
            Stage::Fetch => &mut self.fetch_ns,
            Stage::Decode => &mut self.decode_ns,
            Stage::Transform => &mut self.transform_ns,
            Stage::Collate => &mut self.collate_ns,
        };
        *time = time.saturating_add(ns);
    }

    /// The stage that took longest; `None` where nothing took any time.
    pub fn longest(&self) -> Option<Stage> {
        Stage::ALL.into_iter().filter(|s| self.of(*s) > 0).max_by_key(|s| (self.of(*s), std::cmp::Reverse(*s)))
    }

    /// `wait_ns` shared out in proportion to these times; all of it is fetching where they are not known.
    fn share_out(&self, wait_ns: u64) -> StageTimes {
        let total = u128::from(self.total_ns());
        let mut shares = StageTimes::default();
        for stage in Stage::ALL {
            let share = (u128::from(wait_ns) * u128::from(self.of(stage))).checked_div(total).unwrap_or(0);
            shares.add(stage, share as u64);
        }
        // Rounding, and batches whose making took no time that the clock could see.
        shares.add(self.longest().unwrap_or(Stage::Fetch), wait_ns - shares.total_ns());
        shares
    }
}

/// What a consumer of batches waited for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stalls {
    /// Batches taken.
    pub batches: u64,
    /// Time waited, by what for.
    pub waited: StageTimes,
    /// Time that was spent on making batches, over all threads.
    pub made: StageTimes,
}

impl Stalls {
    /// Takes note of a batch; answers what its wait was for.
    pub(crate) fn take(&mut self, wait_ns: u64, made: &StageTimes) -> StageTimes {
        let waited = made.share_out(wait_ns);
        self.batches += 1;
        for stage in Stage::ALL {
            self.waited.add(stage, waited.of(stage));
            self.made.add(stage, made.of(stage));
        }
        waited
    }
}

/// Notes how long the stages of one batch take.
pub(crate) struct Stopwatch<'a> {
    clock: Option<&'a dyn Clock>,
    last_ns: u64,
    pub(crate) times: StageTimes,
    /// Bytes that were read together, at most.
    pub(crate) fetched_bytes: u64,
}

impl<'a> Stopwatch<'a> {
    pub(crate) fn start(clock: Option<&'a dyn Clock>) -> Stopwatch<'a> {
        Stopwatch {
            clock,
            last_ns: clock.map_or(0, Clock::monotonic_ns),
            times: StageTimes::default(),
            fetched_bytes: 0,
        }
    }

    /// So many bytes were read together.
    pub(crate) fn fetched(&mut self, bytes: u64) {
        self.fetched_bytes = self.fetched_bytes.max(bytes);
    }

    /// The time since the last lap was spent on nothing that belongs to this batch.
    pub(crate) fn skip(&mut self) {
        self.last_ns = self.clock.map_or(0, Clock::monotonic_ns);
    }

    /// The time since the last lap was spent on `stage`.
    pub(crate) fn lap(&mut self, stage: Stage) {
        let Some(clock) = self.clock else { return };
        let now_ns = clock.monotonic_ns();
        self.times.add(stage, now_ns.saturating_sub(self.last_ns));
        self.last_ns = now_ns;
    }
}

#[cfg(test)]
mod tests {
    use updraft_base::FakeClock;

    use super::*;

    #[test]
    fn waits_are_shared_out_by_what_took_the_time_and_add_up() {
        let clock = FakeClock::default();
        let mut watch = Stopwatch::start(Some(&clock));
        for (stage, ns) in [(Stage::Fetch, 100), (Stage::Decode, 600), (Stage::Collate, 100), (Stage::Decode, 1)] {
            clock.advance_ns(ns);
            watch.lap(stage);
        }
        let expected = StageTimes { fetch_ns: 100, decode_ns: 601, transform_ns: 0, collate_ns: 100 };
        assert_eq!((watch.times, watch.times.longest()), (expected, Some(Stage::Decode)));
        let mut stalls = Stalls::default();
        let waited = stalls.take(80, &watch.times);
        assert_eq!(waited, StageTimes { fetch_ns: 9, decode_ns: 62, transform_ns: 0, collate_ns: 9 });
        assert_eq!(stalls.take(7, &StageTimes::default()).fetch_ns, 7);
        assert_eq!((stalls.batches, stalls.waited.total_ns(), stalls.made), (2, 87, expected));
    }

    #[test]
    fn without_a_clock_nothing_is_measured() {
        let mut watch = Stopwatch::start(None);
        watch.lap(Stage::Fetch);
        assert_eq!((watch.times.total_ns(), watch.times.longest()), (0, None));
    }
}
