//! From trials to the chosen one.

use super::trial::{Decision, Judgement, Trial};
use super::{Objective, Outcome, Search, Trouble};
use crate::candidate::{Candidate, Form};
use crate::error::CompressError;
use crate::interval::Interval;

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

/// The indices of trials that no other beats in every respect. Trials without a drop or a speed are not among them.
pub fn front(trials: &[Trial]) -> Vec<usize> {
    unbeaten(&trials.iter().map(Trial::point).collect::<Vec<_>>())
}

/// The indices of trials that no other beats in drop and objective: those that some limit could choose. Where size is the
/// objective they do not depend on measured times, and neither does what the holdout is asked.
fn contenders(trials: &[Trial], objective: Objective) -> Vec<usize> {
    let point = |trial: &Trial| {
        let judged = trial.search.as_ref().filter(|_| trial.refused.is_none() && trial.speed.is_some())?;
        Some([judged.drop.estimate, trial.objective(objective)?])
    };
    unbeaten(&trials.iter().map(point).collect::<Vec<_>>())
}

fn unbeaten<const N: usize>(points: &[Option<[f64; N]>]) -> Vec<usize> {
    let beats = |a: &[f64; N], b: &[f64; N]| a.iter().zip(b).all(|(x, y)| x <= y) && a != b;
    (0..points.len())
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

impl Search<'_> {
    /// The front, the holdout, the choice.
    pub(super) fn conclude(mut self) -> Result<Outcome, CompressError> {
        let (objective, limit) = (self.settings.objective, self.settings.max_drop);
        if self.trials.first().is_none_or(|t| t.search.is_none()) {
            return Err(CompressError::TimeLimit);
        }
        let front = front(&self.trials);
        // Every contender may be looked at on the holdout, so each takes its share of the chance of a wrong answer.
        let mut order = contenders(&self.trials, objective);
        let alpha = self.settings.alpha / order.len().max(1) as f64;
        order.retain(|i| *i != 0);
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
