//! The search for the best model within a limit on the drop.
//!
//! ```text
//! values quantized as they come, which needs no ranges
//! calibrators -> recipes -> whole model in int8 -- within the limit? --no--> rounding learned -> values in 16 bits
//!                                   |                                          -> units back to float, by sensitivity
//!                                   |                                          -> again to int8 what need not have been
//!                                  yes                                         -> trained with the rounding in the loop
//!                                   +------------------------------------------+-> small units in float, if faster
//! pruned at growing ratios, recovering longer where the limit is missed -> each in float and in the forms accepted
//! weights in few bits, where size is the objective; zeros
//! all trials -> front -> holdout -> choice
//! ```
//!
//! What is cheap comes first, so that a short time limit still gives a good model: calibrators and recipes are compared
//! by the divergence of outputs on few samples, the accuracy of what is left by [`Looks`](crate::interval::Looks).
//! Divergence and not weight error, which says little about damage: by the study of sensitivity in onnxsim's documents,
//! rank correlations with measured damage lie between -0.5 and 0.6, those of divergences above 0.9.
//!
//! The choice is a function of the trials and the limit alone ([`choose`]): a looser limit admits more of them, so it
//! never gives a slower model. The original is always among them.
//!
//! The search knows models only through a [`Workbench`]; what it decides depends on what the bench answers and on nothing
//! else. A bench that keeps its answers makes a killed search go on where it was, to the same end.

use serde::{Deserialize, Serialize};

use crate::candidate::{Candidate, Form, Pruning, StaticForm};
use crate::error::CompressError;
use crate::interval::{Interval, Verdict};

mod choice;
mod integers;
mod others;
mod trial;

pub use choice::{choose, front};
pub use trial::{Decision, Judgement, Made, Speed, Trial, UnitSensitivity};

/// What a search wants to be small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The time of one answer.
    Latency,
    /// The file.
    Size,
    /// Machine time a sample where many are answered at once.
    Cost,
}

/// How a search goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchSettings {
    /// What is to be small.
    pub objective: Objective,
    /// The drop that is allowed, in the metric's terms: a share for accuracy, a relative rise for perplexity and loss.
    pub max_drop: f64,
    /// The chance that any statement about a drop is wrong.
    pub alpha: f64,
    /// Pruning to try, in growing order of ratio.
    pub pruning: Vec<Pruning>,
    /// Training steps with the rounding in the loop, where integers miss the limit; 0 for none.
    pub aware_steps: u64,
    /// Whether to try weights in 7 bits, for targets whose 16-bit sums saturate.
    pub reduced_range: bool,
    /// Whether activations are symmetric, which some runtimes demand.
    pub symmetric: bool,
}

/// What a search asks about models. Answers about accuracy must be the same every time; all may be slow.
pub trait Workbench {
    /// Makes the model, and tells its size.
    fn make(&mut self, candidate: &Candidate) -> Result<Made, Trouble>;

    /// How far its outputs are from the original's, on few samples.
    fn divergence(&mut self, candidate: &Candidate) -> Result<f64, Trouble>;

    /// Its drop on the search split, looked at until the answer to `drop <= limit` is clear.
    fn search_drop(&mut self, candidate: &Candidate, limit: f64) -> Result<Judgement, Trouble>;

    /// Its drop on the holdout split, with confidence `1 - alpha`.
    fn holdout_drop(&mut self, candidate: &Candidate, limit: f64, alpha: f64) -> Result<Judgement, Trouble>;

    /// Its speed beside the original's.
    fn speed(&mut self, candidate: &Candidate) -> Result<Speed, Trouble>;

    /// The units of the original that can be quantized, with the divergence that each alone causes.
    fn sensitivity(&mut self, form: &StaticForm) -> Result<Vec<UnitSensitivity>, Trouble>;

    /// Hears what happens.
    fn note(&mut self, line: &str);
}

/// Why a bench has no answer.
#[derive(Debug)]
pub enum Trouble {
    /// The time is over.
    TimeLimit,
    /// This candidate cannot be made or run; others may.
    Refused(String),
    /// Nothing can go on.
    Fatal(Box<CompressError>),
}

/// The end of a search.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// All trials in the order they were made; the first is the original.
    pub trials: Vec<Trial>,
    /// The trials that none other beats in drop, latency, size and cost at once.
    pub front: Vec<usize>,
    /// The chosen trial.
    pub chosen: usize,
    /// Where only the original was within the limit: the trial that misses it least, and by how much its drop's upper
    /// end does.
    pub missed: Option<(usize, f64)>,
    /// Sensitivities, where they were needed.
    pub sensitivity: Vec<UnitSensitivity>,
    /// What became of units, where the search decided it.
    pub decisions: Vec<Decision>,
    /// Whether the time limit cut the search short.
    pub is_cut_short: bool,
}

/// Searches. Whatever happens to candidates, the original remains.
///
/// # Errors
/// Only what makes every candidate impossible: data or a store that fails.
pub fn search(bench: &mut dyn Workbench, settings: &SearchSettings) -> Result<Outcome, CompressError> {
    let mut search = Search {
        bench,
        settings,
        trials: Vec::new(),
        sensitivity: Vec::new(),
        decisions: Vec::new(),
        is_cut_short: false,
    };
    match search.explore() {
        Ok(()) => {}
        Err(Trouble::TimeLimit) => search.is_cut_short = true,
        Err(Trouble::Refused(reason)) => {
            return Err(CompressError::Setting { setting: "the original model", problem: reason });
        }
        Err(Trouble::Fatal(error)) => return Err(*error),
    }
    search.conclude()
}

struct Search<'a> {
    bench: &'a mut dyn Workbench,
    settings: &'a SearchSettings,
    trials: Vec<Trial>,
    sensitivity: Vec<UnitSensitivity>,
    decisions: Vec<Decision>,
    is_cut_short: bool,
}

impl Search<'_> {
    /// Makes all trials, best prospects first.
    fn explore(&mut self) -> Result<(), Trouble> {
        self.original()?;
        if self.settings.objective != Objective::Size {
            // Needs no ranges, so it is the first answer that a short time limit can give.
            self.is_within(&Candidate::of_form(Form::Dynamic), others::DYNAMIC)?;
        }
        let mut accepted: Vec<Form> = Vec::new();
        if let Some(form) = self.best_static_form()? {
            accepted.extend(self.settle(form)?.map(Form::Static));
        }
        if self.settings.objective == Objective::Size {
            accepted.extend(self.smaller_forms()?);
        }
        self.pruned(&accepted)?;
        self.zeros()
    }

    fn original(&mut self) -> Result<(), Trouble> {
        let at = self.enter(Candidate::default(), "the original, against which all are measured");
        let made = self.bench.make(&Candidate::default())?;
        let speed = self.bench.speed(&Candidate::default())?;
        let judgement = self.bench.search_drop(&Candidate::default(), self.settings.max_drop)?;
        // No measurement makes the original slower or worse than itself.
        let speed = Speed { latency_ratio: Interval::exactly(1.0), ..speed };
        let judgement = Judgement { drop: Interval::exactly(0.0), ..judgement };
        let trial = &mut self.trials[at];
        trial.name = "original".to_owned();
        trial.size_bytes = Some(made.size_bytes);
        trial.speed = Some(speed);
        trial.divergence = Some(0.0);
        trial.holdout = Some(judgement.clone());
        trial.search = Some(judgement);
        Ok(())
    }

    /// Makes a candidate and tells how far its outputs are from the original's; nothing where it cannot be made.
    fn compare(&mut self, candidate: &Candidate, reason: &str) -> Result<Option<f64>, Trouble> {
        let at = self.enter(candidate.clone(), reason);
        self.attempt(at, |bench, trial| {
            trial.size_bytes = Some(bench.make(candidate)?.size_bytes);
            trial.divergence = Some(bench.divergence(candidate)?);
            Ok(())
        })?;
        Ok(self.trials[at].divergence.filter(|_| self.trials[at].refused.is_none()))
    }

    /// Makes, judges and times a candidate; whether it is within the limit on the search split.
    fn is_within(&mut self, candidate: &Candidate, reason: &str) -> Result<bool, Trouble> {
        let limit = self.settings.max_drop;
        let at = self.enter(candidate.clone(), reason);
        self.attempt(at, |bench, trial| {
            trial.size_bytes = Some(bench.make(candidate)?.size_bytes);
            if trial.search.is_none() {
                trial.search = Some(bench.search_drop(candidate, limit)?);
            }
            if trial.speed.is_none() {
                trial.speed = Some(bench.speed(candidate)?);
            }
            Ok(())
        })?;
        let trial = &self.trials[at];
        let is_within = trial.search.as_ref().is_some_and(|j| Verdict::of(&j.drop, limit) == Verdict::Within);
        let line = trial::describe(trial);
        self.bench.note(&line);
        Ok(is_within && self.trials[at].refused.is_none())
    }

    /// The trial of a candidate, new where there is none.
    fn enter(&mut self, candidate: Candidate, reason: &str) -> usize {
        // The original has the default candidate; nothing else does.
        if let Some(at) = self.trials.iter().position(|t| t.candidate == candidate) {
            return at;
        }
        self.trials.push(Trial {
            name: candidate.name(),
            candidate,
            reason: reason.to_owned(),
            size_bytes: None,
            divergence: None,
            search: None,
            holdout: None,
            speed: None,
            refused: None,
        });
        self.trials.len() - 1
    }

    /// Fills in a trial; a refusal is noted in it and stops nothing.
    fn attempt(
        &mut self,
        at: usize,
        fill: impl FnOnce(&mut dyn Workbench, &mut Trial) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        if self.trials[at].refused.is_some() {
            return Ok(());
        }
        match fill(self.bench, &mut self.trials[at]) {
            Ok(()) => Ok(()),
            Err(Trouble::Refused(reason)) => {
                self.bench.note(&format!("{}: {reason}", self.trials[at].name));
                self.trials[at].refused = Some(reason);
                Ok(())
            }
            Err(trouble) => Err(trouble),
        }
    }
}

#[cfg(test)]
mod tests;
