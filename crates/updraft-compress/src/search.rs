//! The search for the best model within a limit on the drop.
//!
//! ```text
//! calibrators -> recipes -> whole model in int8 -- within the limit? --no--> units back to float, by sensitivity
//!                                   |                                          -> again to int8 what need not have been
//!                                  yes                                         |
//!                                   +------------------------------------------+-> small units in float, if faster
//! pruned at growing ratios -> each in float and in int8
//! other forms
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

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::candidate::{Calibrator, Candidate, Form, Pruning, Rounding, StaticForm};
use crate::error::CompressError;
use crate::interval::{Interval, Verdict};

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

/// A model that was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// The size of its file.
    pub size_bytes: u64,
    /// What became of its units.
    pub decisions: Vec<Decision>,
}

/// What is known about a drop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The drop.
    pub drop: Interval,
    /// Samples that were looked at.
    pub samples: u64,
    /// The original's metric on them.
    pub original: f64,
    /// The candidate's.
    pub candidate: f64,
}

/// How fast a model is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Time of one answer over the original's.
    pub latency_ratio: Interval,
    /// Time of one answer, in nanoseconds.
    pub latency_ns: Interval,
    /// Machine time a sample in large batches, in nanoseconds; `None` where the model's batch is fixed.
    pub cost_ns: Option<Interval>,
}

/// One unit, and what quantizing it alone does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnitSensitivity {
    /// Its label.
    pub unit: String,
    /// Its operator.
    pub op: String,
    /// Its share of the model's operations.
    pub flops_share: f64,
    /// The divergence of the outputs with only this unit quantized.
    pub divergence: f64,
}

/// One candidate and all that was found out about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// What was tried.
    pub candidate: Candidate,
    /// What it is called.
    pub name: String,
    /// Why it was tried.
    pub reason: String,
    /// The size of its file.
    pub size_bytes: Option<u64>,
    /// How far its outputs are from the original's.
    pub divergence: Option<f64>,
    /// Its drop on the search split.
    pub search: Option<Judgement>,
    /// Its drop on the holdout split.
    pub holdout: Option<Judgement>,
    /// Its speed.
    pub speed: Option<Speed>,
    /// Why it cannot be used.
    pub refused: Option<String>,
}

/// What became of a unit in the chosen model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The unit.
    pub unit: String,
    /// Its form: `int8`, `float`.
    pub form: String,
    /// Why.
    pub reason: String,
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

/// The indices of trials that no other beats in every respect. Trials without a drop or a speed are not among them.
pub fn front(trials: &[Trial]) -> Vec<usize> {
    let points: Vec<Option<[f64; 4]>> = trials.iter().map(Trial::point).collect();
    let beats = |a: &[f64; 4], b: &[f64; 4]| a.iter().zip(b).all(|(x, y)| x <= y) && a != b;
    (0..trials.len())
        .filter(|i| {
            points[*i].is_some_and(|own| {
                // Of equal points the first stays.
                !points
                    .iter()
                    .enumerate()
                    .any(|(j, other)| other.is_some_and(|other| beats(&other, &own) || (other == own && j < *i)))
            })
        })
        .collect()
}

/// The best trial within the limit: smallest in the objective among those whose drop's upper end is within the limit on
/// both splits and that are certainly no slower than the original (where latency is the objective). Equal ones go to the
/// smaller drop, then to the earlier trial. The original, trial 0, is always allowed.
pub fn choose(trials: &[Trial], objective: Objective, limit: f64) -> usize {
    let allowed = |trial: &Trial| {
        let within = |j: &Option<Judgement>| j.as_ref().is_some_and(|j| j.drop.high <= limit);
        trial.refused.is_none()
            && within(&trial.search)
            && within(&trial.holdout)
            && trial.speed.as_ref().is_some_and(|s| s.is_allowed(objective))
    };
    let key = |trial: &Trial| Some((trial.objective(objective)?, trial.search.as_ref()?.drop.estimate));
    let mut best = 0;
    for (i, trial) in trials.iter().enumerate().skip(1).filter(|(_, t)| allowed(t)) {
        if key(trial).is_some_and(|own| key(&trials[best]).is_none_or(|b| own < b)) {
            best = i;
        }
    }
    best
}

impl Speed {
    fn is_allowed(&self, objective: Objective) -> bool {
        match objective {
            Objective::Latency => self.latency_ratio.high <= 1.0,
            Objective::Size | Objective::Cost => true,
        }
    }
}

impl Trial {
    /// What an objective wants to be small.
    pub fn objective(&self, objective: Objective) -> Option<f64> {
        match objective {
            Objective::Latency => Some(self.speed.as_ref()?.latency_ratio.estimate),
            Objective::Size => Some(self.size_bytes? as f64),
            Objective::Cost => Some(self.speed.as_ref()?.cost_ns?.estimate),
        }
    }

    /// Drop, latency, size, cost: what the front is about.
    fn point(&self) -> Option<[f64; 4]> {
        let speed = self.speed.as_ref().filter(|_| self.refused.is_none())?;
        let cost = speed.cost_ns.map_or(speed.latency_ns.estimate, |c| c.estimate);
        Some([self.search.as_ref()?.drop.estimate, speed.latency_ratio.estimate, self.size_bytes? as f64, cost])
    }
}

/// Units whose re-quantization is tried one by one: with more, the first halving has found most of what there is.
const REVERTS_MAX: usize = 8;

/// Operations below this share can hardly pay for the conversions around them.
const ISLAND_SHARE: f64 = 0.02;

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
        let best = self.best_static_form()?;
        let accepted = match best {
            Some(form) => self.settle(form)?,
            None => None,
        };
        if self.settings.objective == Objective::Size {
            self.other_forms()?;
        }
        self.pruned(accepted.as_ref())?;
        if self.settings.objective != Objective::Size {
            self.other_forms()?;
        }
        Ok(())
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

    /// The calibrator and the recipes with the least divergence.
    fn best_static_form(&mut self) -> Result<Option<StaticForm>, Trouble> {
        let mut best: Option<(StaticForm, f64)> = None;
        for calibrator in Calibrator::ALL {
            let form = StaticForm::plain(calibrator, self.settings.symmetric);
            let reason = format!("ranges by {}", calibrator.name());
            if let Some(divergence) = self.compare(&form, &reason)?
                && best.as_ref().is_none_or(|(_, least)| divergence < *least)
            {
                best = Some((form, divergence));
            }
        }
        let Some((mut form, mut least)) = best else { return Ok(None) };
        type Recipe = (&'static str, fn(&mut StaticForm));
        // In the order of what they cost; each is kept only where it helps on top of those before.
        let recipes: [Recipe; 5] = [
            ("weights in 7 bits, whose sums of pairs do not saturate", |f| f.reduced_range = true),
            ("scales of weights with the least squared error", |f| f.mse_weights = true),
            ("ranges of channels equalized between layers", |f| f.equalized = true),
            ("weights rounded with error feedback", |f| f.rounding = Rounding::ErrorFeedback),
            ("biases that take up the mean error", |f| f.bias_corrected = true),
        ];
        let skipped = usize::from(!self.settings.reduced_range);
        for (reason, apply) in &recipes[skipped..] {
            let mut tried = form.clone();
            apply(&mut tried);
            if let Some(divergence) = self.compare(&tried, reason)?.filter(|d| *d < least) {
                (form, least) = (tried, divergence);
            }
        }
        Ok(Some(form))
    }

    /// Makes a form of the whole model and tells its divergence; none where it cannot be made.
    fn compare(&mut self, form: &StaticForm, reason: &str) -> Result<Option<f64>, Trouble> {
        let candidate = Candidate::of_form(Form::Static(form.clone()));
        let at = self.enter(candidate.clone(), reason);
        self.attempt(at, |bench, trial| {
            trial.size_bytes = Some(bench.make(&candidate)?.size_bytes);
            trial.divergence = Some(bench.divergence(&candidate)?);
            Ok(())
        })?;
        Ok(self.trials[at].divergence.filter(|_| self.trials[at].refused.is_none()))
    }

    /// Brings a form within the limit by leaving units in float, as few as need be. Returns the form to build on.
    fn settle(&mut self, form: StaticForm) -> Result<Option<StaticForm>, Trouble> {
        let whole = Candidate::of_form(Form::Static(form.clone()));
        if self.is_within(&whole, "the whole model in int8")? {
            return Ok(Some(self.without_islands(form)?));
        }
        let ranked = match self.bench.sensitivity(&form) {
            Ok(units) => units,
            Err(Trouble::Refused(reason)) => {
                self.bench.note(&format!("no sensitivities: {reason}"));
                return Ok(None);
            }
            Err(trouble) => return Err(trouble),
        };
        self.sensitivity = ranked;
        let order = fallback_order(&self.sensitivity);
        let with = |count: usize| {
            let float_units = form.float_units.iter().chain(&order[..count]).cloned().collect();
            StaticForm { float_units, ..form.clone() }
        };
        // The fewest that suffice, by doubling and halving: accuracy need not rise with every unit, but over many it does.
        let mut too_few = 0;
        let mut enough = None;
        let mut count = 1;
        while count < order.len() {
            if self.is_within_float(&with(count), count)? {
                enough = Some(count);
                break;
            }
            too_few = count;
            count *= 2;
        }
        let Some(mut enough) = enough else { return Ok(None) };
        while enough - too_few > 1 {
            let middle = too_few + (enough - too_few) / 2;
            if self.is_within_float(&with(middle), middle)? {
                enough = middle;
            } else {
                too_few = middle;
            }
        }
        let mut form = with(enough);
        let mut reasons: Vec<(String, String)> = Vec::new();
        // Least harmful first: what costs most time in float for the least harm. The last one was needed by the search
        // above, given those before it.
        for unit in order[..enough - 1].iter().rev().take(REVERTS_MAX) {
            let mut tried = form.clone();
            tried.float_units.remove(unit);
            let candidate = Candidate::of_form(Form::Static(tried.clone()));
            if self.is_within(&candidate, &format!("{unit} in int8 again"))? {
                form = tried;
                reasons.push((unit.clone(), "went to float and came back: the limit holds without it".to_owned()));
            }
        }
        for (unit, reason) in reasons {
            self.decisions.push(Decision { unit, form: "int8".to_owned(), reason });
        }
        for unit in &form.float_units {
            let known = self.sensitivity.iter().find(|s| s.unit == *unit);
            let divergence = known.map_or(0.0, |s| s.divergence);
            let reason = format!("the drop is beyond the limit with it in int8 (divergence {divergence:.2e})");
            self.decisions.push(Decision { unit: unit.clone(), form: "float".to_owned(), reason });
        }
        Ok(Some(self.without_islands(form)?))
    }

    fn is_within_float(&mut self, form: &StaticForm, count: usize) -> Result<bool, Trouble> {
        let reason = format!("the {count} most harmful units in float");
        self.is_within(&Candidate::of_form(Form::Static(form.clone())), &reason)
    }

    /// Small units whose conversions cost more than int8 saves go back to float, if that measures faster.
    fn without_islands(&mut self, form: StaticForm) -> Result<StaticForm, Trouble> {
        if self.settings.objective == Objective::Size {
            return Ok(form);
        }
        if self.sensitivity.is_empty() {
            match self.bench.sensitivity(&form) {
                Ok(units) => self.sensitivity = units,
                Err(Trouble::Refused(reason)) => {
                    self.bench.note(&format!("no sensitivities: {reason}"));
                    return Ok(form);
                }
                Err(trouble) => return Err(trouble),
            }
        }
        let small: BTreeSet<String> = self
            .sensitivity
            .iter()
            .filter(|s| s.flops_share < ISLAND_SHARE && !form.float_units.contains(&s.unit))
            .map(|s| s.unit.clone())
            .collect();
        let quantized = self.sensitivity.len() - form.float_units.len();
        if small.is_empty() || small.len() >= quantized {
            return Ok(form);
        }
        let ratio = |trials: &[Trial], form: &StaticForm| {
            let trial =
                trials.iter().find(|t| t.candidate.pruning.is_none() && t.candidate.static_form() == Some(form))?;
            Some(trial.speed.as_ref()?.latency_ratio)
        };
        let tried = StaticForm { float_units: form.float_units.union(&small).cloned().collect(), ..form.clone() };
        let candidate = Candidate::of_form(Form::Static(tried.clone()));
        let is_within = self.is_within(&candidate, "small units in float, which saves their conversions")?;
        let faster = match (ratio(&self.trials, &tried), ratio(&self.trials, &form)) {
            (Some(tried), Some(before)) => tried.high < before.low,
            _ => false,
        };
        let (chosen, reason) = if is_within && faster {
            (tried, "its conversions cost more than int8 saves")
        } else {
            (form, "small, but no slower in int8 than in float with conversions")
        };
        for unit in small {
            let form = if chosen.float_units.contains(&unit) { "float" } else { "int8" };
            self.decisions.push(Decision { unit, form: form.to_owned(), reason: reason.to_owned() });
        }
        Ok(chosen)
    }

    /// Prunes at growing ratios until the limit is passed, each in float and in the accepted form.
    fn pruned(&mut self, accepted: Option<&StaticForm>) -> Result<(), Trouble> {
        for pruning in &self.settings.pruning {
            let candidate = Candidate { pruning: Some(pruning.clone()), form: Form::Float };
            let reason = format!("{:.0} % of channels removed", 100.0 * pruning.ratio);
            let within = self.is_within(&candidate, &reason)?;
            if within && let Some(form) = accepted {
                let form = Form::Static(form.clone());
                let candidate = Candidate { pruning: Some(pruning.clone()), form };
                self.is_within(&candidate, &format!("{reason}, then int8"))?;
            }
            let verdict = self.trials.iter().find(|t| t.candidate == candidate).and_then(|t| t.search.as_ref());
            // Removing more will not bring back what removing less has clearly lost.
            if verdict.is_some_and(|j| Verdict::of(&j.drop, self.settings.max_drop) == Verdict::Beyond) {
                break;
            }
        }
        Ok(())
    }

    /// Forms that are smaller, or that need no calibration.
    fn other_forms(&mut self) -> Result<(), Trouble> {
        let all = [
            (Form::Dynamic, "activations quantized as they come"),
            (Form::Half, "half the bits"),
            (Form::WeightOnly { bits: 8, block: 32 }, "weights in int8, activations in float"),
            (Form::WeightOnly { bits: 4, block: 32 }, "weights in int4, activations in float"),
        ];
        let tried = match self.settings.objective {
            Objective::Size => &all[..],
            Objective::Latency | Objective::Cost => &all[..1],
        };
        for (form, reason) in tried {
            self.is_within(&Candidate::of_form(form.clone()), reason)?;
        }
        Ok(())
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
        let line = describe(trial);
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

    /// The front, the holdout, the choice.
    fn conclude(mut self) -> Result<Outcome, CompressError> {
        let (objective, limit) = (self.settings.objective, self.settings.max_drop);
        if self.trials.first().is_none_or(|t| t.search.is_none()) {
            return Err(CompressError::TimeLimit);
        }
        let front = front(&self.trials);
        // Every judged trial of the front may be looked at on the holdout, so each takes its share of the chance of a
        // wrong answer. Their number does not depend on the limit, and so neither do the intervals.
        let alpha = self.settings.alpha / front.len().max(1) as f64;
        let mut order: Vec<usize> = front.iter().copied().filter(|i| *i != 0).collect();
        let key = |i: &usize| self.trials[*i].objective(objective).unwrap_or(f64::INFINITY);
        order.sort_by(|a, b| key(a).total_cmp(&key(b)).then(a.cmp(b)));
        for at in order {
            let candidate = self.trials[at].candidate.clone();
            let can_be_chosen = {
                let mut assumed = self.trials.clone();
                assumed[at].holdout = assumed[at].search.clone();
                choose(&assumed, objective, limit) == at
            };
            if !can_be_chosen {
                continue;
            }
            let answer = self.attempt(at, |bench, trial| {
                trial.holdout = Some(bench.holdout_drop(&candidate, limit, alpha)?);
                Ok(())
            });
            match answer {
                Ok(()) if choose(&self.trials, objective, limit) == at => break,
                Ok(()) => {}
                Err(Trouble::TimeLimit) => {
                    self.is_cut_short = true;
                    break;
                }
                Err(Trouble::Refused(reason)) => self.trials[at].refused = Some(reason),
                Err(Trouble::Fatal(error)) => return Err(*error),
            }
        }
        let chosen = choose(&self.trials, objective, limit);
        if chosen == 0 {
            // For its figures on the holdout; that it loses nothing is known.
            let judged = self.bench.holdout_drop(&Candidate::default(), limit, alpha);
            if let Ok(judgement) = judged {
                self.trials[0].holdout = Some(Judgement { drop: Interval::exactly(0.0), ..judgement });
            }
        }
        let decisions = self.decisions_of(chosen);
        let missed = (chosen == 0).then(|| nearest_miss(&self.trials, limit)).flatten();
        Ok(Outcome {
            trials: self.trials,
            front,
            chosen,
            missed,
            sensitivity: self.sensitivity,
            decisions,
            is_cut_short: self.is_cut_short,
        })
    }

    /// What became of the parts of a trial's model: what pruning and quantization say, with the search's own reason where
    /// it is the search that decided.
    fn decisions_of(&mut self, chosen: usize) -> Vec<Decision> {
        let candidate = self.trials[chosen].candidate.clone();
        let pruned = Candidate { form: Form::Float, ..candidate.clone() };
        let mut decisions = Vec::new();
        for made_of in [Some(pruned).filter(|p| *p != candidate && p.pruning.is_some()), Some(candidate)] {
            // Made before, so this reads what was kept; without it there is less to tell and nothing else to lose.
            let made = made_of.and_then(|c| self.bench.make(&c).ok());
            decisions.extend(made.into_iter().flat_map(|m| m.decisions));
        }
        for decision in &mut decisions {
            let own = self.decisions.iter().rev().find(|d| d.unit == decision.unit && d.form == decision.form);
            if let Some(own) = own {
                decision.reason.clone_from(&own.reason);
            }
        }
        decisions
    }
}

/// Units in the order in which they go back to float: most divergence for the least work first.
fn fallback_order(units: &[UnitSensitivity]) -> Vec<String> {
    let mut order: Vec<(f64, &String)> =
        units.iter().map(|u| (u.divergence / u.flops_share.max(1e-6), &u.unit)).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    order.into_iter().map(|(_, unit)| unit.clone()).collect()
}

/// The trial whose drop's upper end misses the limit least, and by how much.
fn nearest_miss(trials: &[Trial], limit: f64) -> Option<(usize, f64)> {
    let upper = |t: &Trial| {
        let ends = [&t.search, &t.holdout].into_iter().flatten().map(|j| j.drop.high);
        ends.fold(None, |most: Option<f64>, end| Some(most.map_or(end, |m| m.max(end))))
    };
    let misses = trials.iter().enumerate().skip(1).filter(|(_, t)| t.refused.is_none());
    let misses = misses.filter_map(|(i, t)| Some((i, upper(t)? - limit))).filter(|(_, miss)| *miss > 0.0);
    misses.min_by(|a, b| a.1.total_cmp(&b.1))
}

fn describe(trial: &Trial) -> String {
    let mut parts = vec![trial.name.clone()];
    if let Some(judgement) = &trial.search {
        let Interval { estimate, low, high } = judgement.drop;
        parts.push(format!(
            "drop {:.2} % ({:.2} to {:.2}) on {} samples",
            100.0 * estimate,
            100.0 * low,
            100.0 * high,
            judgement.samples
        ));
    }
    if let Some(speed) = &trial.speed {
        parts.push(format!("{:.2} of the time", speed.latency_ratio.estimate));
    }
    if let Some(size_bytes) = trial.size_bytes {
        parts.push(updraft_base::units::bytes(size_bytes));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests;
