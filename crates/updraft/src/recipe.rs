//! The recipe `updraft.toml`: all that determines a run, as plain data.
//!
//! An unknown key is an error that names the nearest known one and where it stands. Paths are relative to the recipe.
//! The sections are those of the stages, and each stage is keyed by its section alone: changing how often checkpoints
//! are taken retrains nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use updraft_data::{DatasetConfig, Shuffle};

mod convert;
mod error;
pub(crate) mod optimize;

pub use error::RecipeError;
pub use optimize::OptimizeSection;

/// The file name of a recipe in a folder.
pub const FILE_NAME: &str = "updraft.toml";

/// A recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Names the run; without it, the name of the recipe's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The network.
    pub model: ModelSection,
    /// The data.
    pub data: DataSection,
    /// How it is trained.
    pub train: TrainSection,
    /// How it is evaluated in the end.
    #[serde(default)]
    pub evaluate: EvaluateSection,
    /// How it is made smaller or faster; without it, it stays as it was trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimize: Option<OptimizeSection>,
    /// Where the model is written.
    #[serde(default)]
    pub export: ExportSection,
}

/// The network: one of the zoo, or a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// The name of a network of the zoo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zoo: Option<String>,
    /// Its options.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, OptionValue>,
    /// An ONNX file to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub onnx: Option<PathBuf>,
}

/// The value of an option of a zoo network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum OptionValue {
    Flag(bool),
    Integer(usize),
    Float(f64),
    Integers(Vec<usize>),
}

/// The datasets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// What is learnt from.
    pub train: DatasetConfig,
    /// What training is watched by: for early stopping, and for choosing the best model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<DatasetConfig>,
    /// What the final model is judged by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<DatasetConfig>,
}

/// How a model is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSection {
    /// Steps to take; or give `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Times that every sample is seen; or give `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Samples of a step.
    pub batch: usize,
    /// What initial weights, the order of samples, augmentation and dropout are drawn from.
    #[serde(default)]
    pub seed: u64,
    /// The model's output that the loss reads; without it, the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// The name of the dataset's tensor that the loss compares the model's output with.
    #[serde(default = "default_target")]
    pub target: String,
    /// Patterns over names of parameters that stay as they are (`*` any text, `?` one character).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
    /// How far samples are mixed.
    #[serde(default = "default_shuffle")]
    pub shuffle: Shuffle,
    /// What is made small.
    #[serde(default)]
    pub loss: LossSection,
    /// How parameters move.
    pub optimizer: OptimizerSection,
    /// How fast they move, step by step.
    pub learning_rate: LearningRateSection,
    /// Which parameters decay.
    #[serde(default)]
    pub weight_decay: WeightDecaySection,
    /// The norm that all gradients together are clipped to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f32>,
    /// Evaluation on the validation data, where there is any, while training.
    #[serde(default)]
    pub validate: ValidateSection,
    /// When to stop before all steps are done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStoppingSection>,
    /// Which weights become the model.
    #[serde(default)]
    pub weights: Weights,
    /// When checkpoints are taken; no part of what determines the result.
    #[serde(default, skip_serializing)]
    pub checkpoint: CheckpointSection,
}

fn default_target() -> String {
    "label".to_owned()
}

fn default_shuffle() -> Shuffle {
    Shuffle::Global
}

/// What training makes small.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LossSection {
    /// Cross-entropy of logits against class numbers.
    CrossEntropy(CrossEntropySection),
    /// Mean of squared differences.
    MeanSquaredError,
    /// Divergence from a teacher's logits, which the target is.
    KullbackLeibler(KullbackLeiblerSection),
}

impl Default for LossSection {
    fn default() -> LossSection {
        LossSection::CrossEntropy(CrossEntropySection::default())
    }
}

/// Settings of the cross-entropy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CrossEntropySection {
    /// Share of the target that is spread over all classes.
    pub label_smoothing: f32,
    /// A label that does not count.
    pub ignore_index: i64,
    /// The axis of classes; -1 is the last.
    pub class_axis: i64,
}

impl Default for CrossEntropySection {
    fn default() -> CrossEntropySection {
        CrossEntropySection { label_smoothing: 0.0, ignore_index: -100, class_axis: -1 }
    }
}

/// Settings of the divergence from a teacher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KullbackLeiblerSection {
    /// Divides both logits before they are compared.
    pub temperature: f32,
}

/// How parameters move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum OptimizerSection {
    /// Stochastic gradient descent.
    Sgd(SgdSection),
    /// Adam.
    Adam(AdamSection),
    /// Adam with weight decay apart from the gradient.
    Adamw(AdamSection),
}

/// Settings of stochastic gradient descent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SgdSection {
    /// Share of the last step that is kept.
    pub momentum: f32,
    /// Looks ahead along the momentum.
    pub nesterov: bool,
}

/// Settings of Adam.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamSection {
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of squared gradients.
    pub beta2: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
}

impl Default for AdamSection {
    fn default() -> AdamSection {
        AdamSection { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

/// The learning rate, step by step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearningRateSection {
    /// The rate at its highest.
    pub peak: f64,
    /// Steps over which it first rises along a line.
    #[serde(default)]
    pub warmup_steps: u64,
    /// How it goes on.
    #[serde(default)]
    pub shape: ShapeSection,
}

/// How the learning rate goes on after the warm-up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ShapeSection {
    /// Stays at the peak.
    #[default]
    Constant,
    /// Drops now and then.
    Step(StepSection),
    /// Half a cosine down to the last step.
    Cosine(CosineSection),
    /// Up and down again along half cosines.
    OneCycle(OneCycleSection),
}

/// A rate that drops now and then.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepSection {
    /// Steps between two drops.
    pub every_steps: u64,
    /// Multiplies the rate at each.
    pub factor: f64,
}

/// A rate that falls along half a cosine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CosineSection {
    /// The rate at the end.
    pub floor: f64,
}

/// A rate that rises and falls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OneCycleSection {
    /// Share of the steps that rise.
    pub rise: f64,
    /// The peak over the first rate.
    pub start_divisor: f64,
    /// The first rate over the last.
    pub end_divisor: f64,
}

impl Default for OneCycleSection {
    fn default() -> OneCycleSection {
        OneCycleSection { rise: 0.3, start_divisor: 25.0, end_divisor: 1e4 }
    }
}

/// Which parameters decay.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WeightDecaySection {
    /// The decay of matrices and kernels; vectors (biases, norm scales) do not decay unless a rule says so.
    pub amount: f32,
    /// Patterns over parameter names and their decay; the first that fits decides.
    pub rules: Vec<(String, f32)>,
}

/// Evaluation while training.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidateSection {
    /// Steps from one evaluation to the next; without it, once an epoch. One follows the last step in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_steps: Option<u64>,
    /// Samples of a batch; without it, that of training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// What evaluations are compared by.
    pub best_by: BestBy,
}

/// The metric that evaluations are compared by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BestBy {
    /// The loss: lower is better.
    #[default]
    Loss,
    /// The accuracy: higher is better.
    Accuracy,
}

/// When to stop before all steps are done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStoppingSection {
    /// Evaluations without a better one.
    pub patience: u64,
    /// By how much a better one must be better.
    #[serde(default)]
    pub min_change: f64,
}

/// When checkpoints are taken, and how many are kept besides the best.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSection {
    /// Steps from one to the next.
    pub every_steps: Option<u64>,
    /// Seconds from one to the next.
    pub every_seconds: Option<f64>,
    /// How many of the last are kept.
    pub keep: usize,
}

impl Default for CheckpointSection {
    /// Half a minute is what a killed run may lose.
    fn default() -> CheckpointSection {
        CheckpointSection { every_steps: None, every_seconds: Some(30.0), keep: 2 }
    }
}

/// How the final model is evaluated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateSection {
    /// Samples of a batch.
    pub batch: usize,
}

impl Default for EvaluateSection {
    fn default() -> EvaluateSection {
        EvaluateSection { batch: 100 }
    }
}

/// Where the model is written.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExportSection {
    /// A file to write besides the copy among the run's files: the optimized model, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

/// Which weights become the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// Those of the best evaluation, or the last ones where there was none.
    #[default]
    Best,
    /// The last ones.
    Last,
}

/// A recipe as it was read.
#[derive(Debug)]
pub struct Loaded {
    /// What it says.
    pub recipe: Recipe,
    /// Its text.
    pub text: String,
    /// The file.
    pub path: PathBuf,
    /// The folder that its paths are relative to.
    pub folder: PathBuf,
    /// The name of the run.
    pub name: String,
}

/// Checks the text of a recipe of a transformation.
#[cfg(feature = "query")]
pub fn parse_transform(text: &str, path: &Path) -> Result<updraft_query::TransformRecipe, RecipeError> {
    let recipe: updraft_query::TransformRecipe =
        toml::from_str(text).map_err(|e| RecipeError::parse(text, path, &e))?;
    match recipe.problem() {
        Some((key, problem)) => Err(RecipeError::value(text, path, key, problem)),
        None => Ok(recipe),
    }
}

/// Reads a recipe: a file, or the file [`FILE_NAME`] in a folder.
pub fn load(path: &Path) -> Result<Loaded, RecipeError> {
    let file = if path.is_dir() { path.join(FILE_NAME) } else { path.to_owned() };
    let text = std::fs::read_to_string(&file).map_err(|source| RecipeError::Read { path: file.clone(), source })?;
    let recipe = parse(&text, &file)?;
    let folder = file.parent().map(Path::to_owned).unwrap_or_default();
    let name = match &recipe.name {
        Some(name) => name.clone(),
        None => run_name(&file),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.chars().all(plain) || !name.chars().any(|c| c.is_ascii_alphanumeric()) {
        let problem = format!("is `{name}`; it names a folder: use letters, digits, `.`, `_` and `-`");
        return Err(RecipeError::value(&text, &file, "name", problem));
    }
    Ok(Loaded { recipe, text, path: file, folder, name })
}

/// The name of the folder that the recipe lies in.
fn run_name(file: &Path) -> String {
    let absolute = std::fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let folder = absolute.parent().and_then(Path::file_name);
    folder.map_or_else(|| "run".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Reads the text of a recipe; `path` is for messages.
pub fn parse(text: &str, path: &Path) -> Result<Recipe, RecipeError> {
    let recipe: Recipe = toml::from_str(text).map_err(|e| RecipeError::parse(text, path, &e))?;
    check(&recipe).map_err(|(key, problem)| RecipeError::value(text, path, key, problem))?;
    Ok(recipe)
}

/// What types cannot say: the key, and what is wrong with it.
fn check(recipe: &Recipe) -> Result<(), (&'static str, String)> {
    let train = &recipe.train;
    match (train.steps, train.epochs) {
        (Some(_), Some(_)) => return Err(("train.epochs", "and `steps` exclude each other".into())),
        (None, None) => return Err(("train", "needs `steps` or `epochs`".into())),
        (Some(0), _) | (_, Some(0)) => return Err(("train", "needs at least one step".into())),
        _ => {}
    }
    let data = &recipe.data.train;
    if train.epochs.is_some() && !(data.sources.is_empty() && data.filter.is_empty() && data.pack.is_none()) {
        let problem = "cannot be counted where sources are mixed, or samples filtered or packed: give `steps`";
        return Err(("train.epochs", problem.into()));
    }
    if train.batch == 0 {
        return Err(("train.batch", "must be at least 1".into()));
    }
    if recipe.evaluate.batch == 0 {
        return Err(("evaluate.batch", "must be at least 1".into()));
    }
    if train.validate.batch == Some(0) {
        return Err(("train.validate.batch", "must be at least 1".into()));
    }
    if train.validate.every_steps == Some(0) {
        return Err(("train.validate.every_steps", "must be at least 1".into()));
    }
    if train.checkpoint.every_seconds.is_some_and(|s| !(0.0..=1e9).contains(&s)) {
        return Err(("train.checkpoint.every_seconds", "must be a number of seconds from 0 to 1e9".into()));
    }
    if train.validate != ValidateSection::default() && recipe.data.validation.is_none() {
        return Err(("train.validate", "needs `[data.validation]`".into()));
    }
    if train.early_stopping.is_some() && recipe.data.validation.is_none() {
        return Err(("train.early_stopping", "needs `[data.validation]`".into()));
    }
    if train.checkpoint.every_steps == Some(0) {
        return Err(("train.checkpoint.every_steps", "must be at least 1".into()));
    }
    if let Some(section) = &recipe.optimize {
        section.check()?;
    }
    match (&recipe.model.zoo, &recipe.model.onnx) {
        (Some(_), Some(_)) => Err(("model.onnx", "and `zoo` exclude each other".into())),
        (None, None) => Err(("model", "needs `zoo` or `onnx`".into())),
        (None, Some(_)) if !recipe.model.options.is_empty() => {
            Err(("model.options", "are for networks of the zoo".into()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
