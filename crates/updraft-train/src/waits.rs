//! How long whoever takes batches waited for data, and for which stage of it.

use serde::{Deserialize, Serialize};
use updraft_data::{Stage, StageTimes, Stalls};

/// Points that the course of waiting has at most: as many as a plot can show.
const POINTS_MAX: usize = 512;

/// The waits of one run of a loop over batches; of a run that was resumed, since then.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Waits {
    /// Sums over all steps.
    pub stalls: Stalls,
    /// Time from the first step to the last, evaluation and checkpoints included.
    pub elapsed_ns: u64,
    stride: u64,
    points: Vec<WaitPoint>,
    /// Of the point that is not complete.
    steps: u64,
    waited: StageTimes,
}

/// The waits of some consecutive steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitPoint {
    /// The last of the steps, counted from 1.
    pub step: u64,
    /// Time waited in a step, on average.
    pub waited: StageTimes,
}

impl Default for Waits {
    fn default() -> Waits {
        Waits {
            stalls: Stalls::default(),
            elapsed_ns: 0,
            stride: 1,
            points: Vec::new(),
            steps: 0,
            waited: StageTimes::default(),
        }
    }
}

impl Waits {
    /// Takes the wait of step `step`, counted from 1.
    pub fn push(&mut self, step: u64, waited: &StageTimes) {
        self.waited = sum(&self.waited, waited);
        self.steps += 1;
        if self.steps == self.stride {
            self.points.push(WaitPoint { step, waited: divided(&self.waited, self.steps) });
            (self.waited, self.steps) = (StageTimes::default(), 0);
        }
        if self.points.len() == POINTS_MAX {
            let joined = |pair: &[WaitPoint]| WaitPoint {
                step: pair[1].step,
                waited: divided(&sum(&pair[0].waited, &pair[1].waited), 2),
            };
            self.points = self.points.chunks_exact(2).map(joined).collect();
            self.stride *= 2;
        }
    }

    /// The course, oldest first.
    pub fn points(&self) -> &[WaitPoint] {
        &self.points
    }

    /// The part of the time that was waited; `None` where no time has passed.
    pub fn share(&self) -> Option<f64> {
        (self.elapsed_ns > 0).then(|| self.stalls.waited.total_ns() as f64 / self.elapsed_ns as f64)
    }

    /// One sentence: "waited 3.1 % of the time for data, mostly for decode".
    pub fn sentence(&self) -> Option<String> {
        let share = self.share()?;
        Some(match self.stalls.waited.longest() {
            Some(stage) => format!("waited {:.1} % of the time for data, mostly for {}", 100.0 * share, stage.name()),
            None => "never waited for data".to_owned(),
        })
    }
}

fn sum(a: &StageTimes, b: &StageTimes) -> StageTimes {
    let mut sum = *a;
    Stage::ALL.into_iter().for_each(|stage| sum.add(stage, b.of(stage)));
    sum
}

fn divided(times: &StageTimes, by: u64) -> StageTimes {
    let mut quotient = StageTimes::default();
    Stage::ALL.into_iter().for_each(|stage| quotient.add(stage, times.of(stage) / by.max(1)));
    quotient
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_course_of_waiting_stays_small_and_keeps_its_mean() {
        let mut waits = Waits::default();
        let steps = 5 * POINTS_MAX as u64;
        for step in 1..=steps {
            let decode_ns = 1000 * (step % 2);
            waits.push(step, &StageTimes { decode_ns, ..StageTimes::default() });
        }
        assert!(waits.points().len() < POINTS_MAX);
        assert!(waits.points().iter().all(|p| p.waited.decode_ns == 500), "{:?}", waits.points());
    }

    #[test]
    fn what_was_waited_for_is_said_in_a_sentence() {
        assert_eq!(Waits::default().sentence(), None);
        let stalls =
            Stalls { waited: StageTimes { fetch_ns: 10, decode_ns: 21, ..StageTimes::default() }, ..Stalls::default() };
        let waits = Waits { stalls, elapsed_ns: 1000, ..Waits::default() };
        assert_eq!(waits.sentence().unwrap(), "waited 3.1 % of the time for data, mostly for decode");
        let waits = Waits { elapsed_ns: 1000, ..Waits::default() };
        assert_eq!(waits.sentence().unwrap(), "never waited for data");
    }
}
