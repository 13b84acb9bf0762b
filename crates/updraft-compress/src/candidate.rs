//! A way to make a smaller or faster model of the original, as plain data: what a search chooses among, and what a trial
//! is kept under.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// How a model is made of the original: channels are removed first, then numbers get their form.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// What is removed; nothing where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pruning: Option<Pruning>,
    /// The form of numbers.
    pub form: Form,
}

/// Which channels are removed, and how the model recovers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pruning {
    /// The share of channels that is removed.
    pub ratio: f64,
    /// Training steps that follow, with the original as the teacher.
    pub recovery_steps: u64,
}

/// The form of numbers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// As they are, in the form that the inference passes leave.
    #[default]
    Float,
    /// Weights and activations in half the bits.
    Half,
    /// Weights in integers by blocks, activations as they are.
    WeightOnly(WeightForm),
    /// Weights as they are, but for zeros: the largest few of all neighbours.
    Sparse {
        /// How many are kept.
        kept: usize,
        /// Of how many.
        of: usize,
    },
    /// Products of integers, with activations quantized as they come.
    Dynamic,
    /// Integers throughout, with ranges of activations from calibration.
    Static(StaticForm),
}

/// How weights become integers where activations stay as they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightForm {
    /// Bits of a weight: 4 or 8.
    pub bits: u8,
    /// Weights that share a scale.
    pub block: usize,
    /// How they are rounded.
    pub rounding: Rounding,
    /// Weights with large inputs protected, and ranges cut where layers lose less by it (AWQ).
    pub protected: bool,
}

/// How a model becomes one of integers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StaticForm {
    /// How ranges come from what was observed.
    pub calibrator: Calibrator,
    /// Scales of weights with the least squared error instead of the largest magnitude.
    pub mse_weights: bool,
    /// Ranges of channels equalized between layers first.
    pub equalized: bool,
    /// Outliers of activations moved into weights first (SmoothQuant).
    pub smoothed: bool,
    /// Biases that take up the mean error.
    pub bias_corrected: bool,
    /// How weights are rounded.
    pub rounding: Rounding,
    /// Weights in 7 bits, whose products in pairs do not saturate 16 bits.
    pub reduced_range: bool,
    /// Activations in signed codes around zero.
    pub symmetric: bool,
    /// Activations in 16 bits instead of 8.
    pub wide: bool,
    /// Training steps with the rounding in the loop, with the original as the teacher.
    pub aware_steps: u64,
    /// Units that stay in float, by label.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub float_units: BTreeSet<String>,
}

/// How ranges come from what was observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Calibrator {
    /// All that was seen.
    MinMax,
    /// All but the most extreme values.
    Percentile,
    /// The range whose histogram diverges least.
    Entropy,
    /// The range with the least squared error.
    Mse,
}

/// How weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// To the nearest level.
    Nearest,
    /// Column by column, later columns taking up the error of earlier ones (GPTQ).
    ErrorFeedback,
    /// Down or up, learned layer by layer (AdaRound).
    Learned,
}

impl StaticForm {
    /// The plain form under a calibrator.
    pub fn plain(calibrator: Calibrator, symmetric: bool) -> StaticForm {
        StaticForm {
            calibrator,
            mse_weights: false,
            equalized: false,
            smoothed: false,
            bias_corrected: false,
            rounding: Rounding::Nearest,
            reduced_range: false,
            symmetric,
            wide: false,
            aware_steps: 0,
            float_units: BTreeSet::new(),
        }
    }
}

impl Candidate {
    /// A form of the whole model.
    pub fn of_form(form: Form) -> Candidate {
        Candidate { pruning: None, form }
    }

    /// The static form, where it has one.
    pub fn static_form(&self) -> Option<&StaticForm> {
        match &self.form {
            Form::Static(form) => Some(form),
            _ => None,
        }
    }

    /// Whether it is trained on the way.
    pub fn is_trained(&self) -> bool {
        self.pruning.is_some() || self.static_form().is_some_and(|form| form.aware_steps > 0)
    }

    /// What tables call it: `pruned 50 % (200 steps), int8 (entropy, mse weights, 2 units in float)`.
    pub fn name(&self) -> String {
        let form = match &self.form {
            Form::Float => "float".to_owned(),
            Form::Half => "float16".to_owned(),
            Form::WeightOnly(form) => form.name(),
            Form::Sparse { kept, of } => format!("{kept}:{of} sparse"),
            Form::Dynamic => "dynamic int8".to_owned(),
            Form::Static(form) => form.name(),
        };
        match &self.pruning {
            Some(pruning) => {
                format!("pruned {:.0} % ({} steps), {form}", 100.0 * pruning.ratio, pruning.recovery_steps)
            }
            None => form,
        }
    }
}

impl WeightForm {
    fn name(&self) -> String {
        let mut parts = vec![format!("blocks of {}", self.block)];
        parts.extend(self.rounding.name().map(str::to_owned));
        parts.extend(self.protected.then(|| "large inputs protected".to_owned()));
        format!("int{} weights ({})", self.bits, parts.join(", "))
    }
}

impl Rounding {
    /// What tables call it; nothing where it is the usual one.
    fn name(self) -> Option<&'static str> {
        match self {
            Rounding::Nearest => None,
            Rounding::ErrorFeedback => Some("error feedback"),
            Rounding::Learned => Some("learned rounding"),
        }
    }
}

impl StaticForm {
    fn name(&self) -> String {
        let mut parts = vec![self.calibrator.name().to_owned()];
        parts.extend(self.rounding.name().map(str::to_owned));
        let recipes = [
            (self.equalized, "equalized"),
            (self.smoothed, "smoothed"),
            (self.mse_weights, "mse weights"),
            (self.bias_corrected, "bias corrected"),
            (self.reduced_range, "7-bit weights"),
            (self.symmetric, "symmetric"),
        ];
        parts.extend(recipes.iter().filter(|(on, _)| *on).map(|(_, name)| (*name).to_owned()));
        if self.aware_steps > 0 {
            parts.push(format!("{} steps with rounding", self.aware_steps));
        }
        match self.float_units.len() {
            0 => {}
            1 => parts.push("1 unit in float".to_owned()),
            n => parts.push(format!("{n} units in float")),
        }
        format!("{} ({})", if self.wide { "int8 weights, 16-bit values" } else { "int8" }, parts.join(", "))
    }
}

impl Calibrator {
    /// All of them.
    pub const ALL: [Calibrator; 4] = [Calibrator::MinMax, Calibrator::Percentile, Calibrator::Entropy, Calibrator::Mse];

    /// What tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Calibrator::MinMax => "min-max",
            Calibrator::Percentile => "percentile",
            Calibrator::Entropy => "entropy",
            Calibrator::Mse => "mse",
        }
    }
}
