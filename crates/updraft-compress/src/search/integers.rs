//! The search among forms of integers throughout.

use std::collections::BTreeSet;

use super::trial::{Decision, Trial, UnitSensitivity};
use super::{Objective, Search, Trouble};
use crate::candidate::{Calibrator, Candidate, Form, Rounding, StaticForm};

/// Units whose re-quantization is tried one by one: with more, the first halving has found most of what there is.
const REVERTS_MAX: usize = 8;

/// Operations below this share can hardly pay for the conversions around them.
const ISLAND_SHARE: f64 = 0.02;

impl Search<'_> {
    /// The calibrator and the recipes with the least divergence.
    pub(super) fn best_static_form(&mut self) -> Result<Option<StaticForm>, Trouble> {
        let mut best: Option<(StaticForm, f64)> = None;
        for calibrator in Calibrator::ALL {
            let form = StaticForm::plain(calibrator, self.settings.symmetric);
            let reason = format!("ranges by {}", calibrator.name());
            if let Some(divergence) = self.compare(&whole(&form), &reason)?
                && best.as_ref().is_none_or(|(_, least)| divergence < *least)
            {
                best = Some((form, divergence));
            }
        }
        let Some((mut form, mut least)) = best else { return Ok(None) };
        // Judged before it is refined, so that a time limit met from here on still leaves a model.
        self.is_within(&whole(&form), "the whole model in int8, ranges by the best calibrator")?;
        type Recipe = (&'static str, fn(&mut StaticForm));
        // In the order of what they cost; each is kept only where it helps on top of those before.
        let recipes: [Recipe; 6] = [
            ("weights in 7 bits, whose sums of pairs do not saturate", |f| f.reduced_range = true),
            ("scales of weights with the least squared error", |f| f.mse_weights = true),
            ("ranges of channels equalized between layers", |f| f.equalized = true),
            ("outliers of values moved into weights", |f| f.smoothed = true),
            ("weights rounded with error feedback", |f| f.rounding = Rounding::ErrorFeedback),
            ("biases that take up the mean error", |f| f.bias_corrected = true),
        ];
        let skipped = usize::from(!self.settings.reduced_range);
        for (reason, apply) in &recipes[skipped..] {
            let mut tried = form.clone();
            apply(&mut tried);
            if let Some(divergence) = self.compare(&whole(&tried), reason)?.filter(|d| *d < least) {
                (form, least) = (tried, divergence);
            }
        }
        Ok(Some(form))
    }

    /// Brings a form within the limit, in ways that cost more and more: rounding that is learned, values in 16 bits, units
    /// in float, training. Returns the form to build on.
    pub(super) fn settle(&mut self, form: StaticForm) -> Result<Option<StaticForm>, Trouble> {
        if self.is_within(&whole(&form), "the whole model in int8")? {
            return Ok(Some(self.without_islands(form)?));
        }
        let learned = StaticForm { rounding: Rounding::Learned, ..form.clone() };
        if self.is_within(&whole(&learned), "the limit is missed: rounding learned")? {
            return Ok(Some(self.without_islands(learned)?));
        }
        // With 65,536 levels nothing need be cut off.
        let wide = StaticForm { wide: true, calibrator: Calibrator::MinMax, ..form.clone() };
        let is_wide_enough =
            self.is_within(&whole(&wide), "the limit is missed: values in 16 bits, weights in int8")?;
        if is_wide_enough && self.settings.objective == Objective::Size {
            // As small as int8, which no unit in float is.
            return Ok(Some(wide));
        }
        let fallen_back = self.with_units_in_float(&form)?;
        if self.settings.aware_steps == 0 {
            return Ok(fallen_back);
        }
        let trained = StaticForm { aware_steps: self.settings.aware_steps, ..form };
        let reason = "the limit is missed: trained with the rounding in the loop";
        Ok(if self.is_within(&whole(&trained), reason)? { Some(trained) } else { fallen_back })
    }

    /// Leaves units in float, as few as need be.
    fn with_units_in_float(&mut self, form: &StaticForm) -> Result<Option<StaticForm>, Trouble> {
        let ranked = match self.bench.sensitivity(form) {
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
            if self.is_within(&whole(&tried), &format!("{unit} in int8 again"))? {
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
        self.is_within(&whole(form), &reason)
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
        let is_within = self.is_within(&whole(&tried), "small units in float, which saves their conversions")?;
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
}

/// A form of the whole original.
fn whole(form: &StaticForm) -> Candidate {
    Candidate::of_form(Form::Static(form.clone()))
}

/// Units in the order in which they go back to float: most divergence for the least work first.
fn fallback_order(units: &[UnitSensitivity]) -> Vec<String> {
    let mut order: Vec<(f64, &String)> =
        units.iter().map(|u| (u.divergence / u.flops_share.max(1e-6), &u.unit)).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    order.into_iter().map(|(_, unit)| unit.clone()).collect()
}
