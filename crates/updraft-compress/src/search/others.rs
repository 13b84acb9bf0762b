//! The search among smaller networks, and among other forms of numbers.

use super::{Search, Trouble};
use crate::candidate::{Candidate, Form, Pruning, Rounding, StaticForm, WeightForm};
use crate::interval::Verdict;

/// Why products of integers are tried with values quantized as they come.
pub(super) const DYNAMIC: &str = "activations quantized as they come";

/// How many times the recovery is repeated where the limit is missed.
const LONGER: u64 = 3;

/// A drop of more than so many limits is hardly recovered by training longer, which costs more than all else.
const RECOVERABLE_DROPS: f64 = 2.0;

impl Search<'_> {
    /// Prunes at growing ratios until the limit is passed, each in float and in the forms that were accepted.
    pub(super) fn pruned(&mut self, accepted: &[Form]) -> Result<(), Trouble> {
        for pruning in &self.settings.pruning {
            let mut pruning = pruning.clone();
            let reason = format!("{:.0} % of channels removed", 100.0 * pruning.ratio);
            let mut is_within = self.is_within(&float(&pruning), &reason)?;
            let is_beyond = self.verdict(&float(&pruning)) == Some(Verdict::Beyond);
            if !is_within && self.is_recoverable(&float(&pruning)) && pruning.recovery_steps > 0 {
                pruning.recovery_steps *= LONGER;
                let reason = format!("the limit is missed: {LONGER} times the recovery");
                is_within = self.is_within(&float(&pruning), &reason)?;
            }
            if is_within {
                for form in accepted {
                    self.pruned_in(&pruning, form, &reason)?;
                }
            }
            // Removing more will not bring back what removing less has clearly lost.
            if is_beyond && !is_within {
                break;
            }
        }
        Ok(())
    }

    /// A pruned model in another form, trained with its rounding where that is needed and possible.
    fn pruned_in(&mut self, pruning: &Pruning, form: &Form, reason: &str) -> Result<(), Trouble> {
        let with = |form: Form| Candidate { pruning: Some(pruning.clone()), form };
        let candidate = with(form.clone());
        if self.is_within(&candidate, &format!("{reason}, then {}", kind(form)))? {
            return Ok(());
        }
        let steps = self.settings.aware_steps;
        if let Form::Static(form) = form
            && form.aware_steps == 0
            && steps > 0
            && self.is_recoverable(&candidate)
        {
            let trained = with(Form::Static(StaticForm { aware_steps: steps, ..form.clone() }));
            self.is_within(&trained, &format!("{reason}, then int8, trained with the rounding in the loop"))?;
        }
        Ok(())
    }

    /// Forms that are smaller than the original, for those to whom size is all. Returns the smallest that is within the
    /// limit among those that keep values as they are.
    pub(super) fn smaller_forms(&mut self) -> Result<Option<Form>, Trouble> {
        self.is_within(&Candidate::of_form(Form::Dynamic), DYNAMIC)?;
        self.is_within(&Candidate::of_form(Form::Half), "half the bits")?;
        let mut smallest = None;
        let bytes = Form::WeightOnly(WeightForm { bits: 8, block: 32, rounding: Rounding::Nearest, protected: false });
        if self.is_within(&Candidate::of_form(bytes.clone()), "weights in int8, activations in float")? {
            smallest = Some(bytes);
        }
        let Some(best) = self.best_half_bytes()? else { return Ok(smallest) };
        for block in [32, 128] {
            let form = Form::WeightOnly(WeightForm { block, ..best.clone() });
            let reason = format!("weights in int4, {block} to a scale");
            if !self.is_within(&Candidate::of_form(form.clone()), &reason)? {
                break;
            }
            smallest = Some(form);
        }
        Ok(smallest)
    }

    /// Weights in four bits with the least divergence: where so few levels are left, how they are chosen counts.
    fn best_half_bytes(&mut self) -> Result<Option<WeightForm>, Trouble> {
        let mut best: Option<(WeightForm, f64)> = None;
        for (rounding, protected, reason) in [
            (Rounding::Nearest, false, "weights in int4, each to the nearest level"),
            (Rounding::ErrorFeedback, false, "weights in int4 with error feedback"),
            (Rounding::Nearest, true, "weights in int4, those with large inputs protected"),
            (Rounding::ErrorFeedback, true, "weights in int4, protected and with error feedback"),
        ] {
            let form = WeightForm { bits: 4, block: 32, rounding, protected };
            if let Some(divergence) = self.compare(&Candidate::of_form(Form::WeightOnly(form.clone())), reason)?
                && best.as_ref().is_none_or(|(_, least)| divergence < *least)
            {
                best = Some((form, divergence));
            }
        }
        Ok(best.map(|(form, _)| form))
    }

    /// Zeros among the weights, which only a file or a machine that skips them gains by.
    pub(super) fn zeros(&mut self) -> Result<(), Trouble> {
        let candidate = Candidate::of_form(Form::Sparse { kept: 2, of: 4 });
        let reason = "two of every four weights set to zero";
        let at = self.enter(candidate.clone(), reason);
        let original = self.trials[0].size_bytes;
        self.attempt(at, |bench, trial| {
            trial.size_bytes = Some(bench.make(&candidate)?.size_bytes);
            if trial.size_bytes < original {
                return Ok(());
            }
            let problem = "gains nothing: zeros are stored as any number, so the file is no smaller, and dense engines, \
                           this one among them, multiply by them";
            Err(Trouble::Refused(problem.to_owned()))
        })?;
        if self.trials[at].refused.is_none() {
            self.is_within(&candidate, reason)?;
        }
        Ok(())
    }

    fn verdict(&self, candidate: &Candidate) -> Option<Verdict> {
        let judgement = self.trials.iter().find(|t| t.candidate == *candidate)?.search.as_ref()?;
        Some(Verdict::of(&judgement.drop, self.settings.max_drop))
    }

    /// Whether a drop is small enough that training may win it back.
    fn is_recoverable(&self, candidate: &Candidate) -> bool {
        let trial = self.trials.iter().find(|t| t.candidate == *candidate);
        let drop = trial.and_then(|t| t.search.as_ref()).map(|j| j.drop.estimate);
        drop.is_some_and(|drop| drop <= RECOVERABLE_DROPS * self.settings.max_drop)
    }
}

fn float(pruning: &Pruning) -> Candidate {
    Candidate { pruning: Some(pruning.clone()), form: Form::Float }
}

fn kind(form: &Form) -> &'static str {
    match form {
        Form::WeightOnly(form) if form.bits == 4 => "weights in int4",
        Form::WeightOnly(_) => "weights in int8",
        Form::Static(form) if form.wide => "int8 weights and values in 16 bits",
        _ => "int8",
    }
}
