//! What can stop a measurement or a search.

use updraft_data::DataError;
use updraft_engine::EngineError;
use updraft_passes::PassError;
use updraft_passes::pipeline::PipelineError;
use updraft_store::StoreError;
use updraft_train::TrainError;

/// An error of measuring, calibrating or searching.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// All data is training data, which says nothing about what is lost on data that was not learnt from.
    #[error("there is neither validation nor test data: candidates must be compared on data that was not learnt from")]
    NoSearchData,
    /// A split is too small for what is asked.
    #[error("the {split} split has {found} samples, and {needed} are needed{}", match limit {
        Some(limit) => format!(" to show a drop of at most {:.3} %, even if no answer changed", 100.0 * limit),
        None => " for an interval of the drop".to_owned(),
    })]
    TooFewSamples {
        /// Which split.
        split: &'static str,
        /// Its samples.
        found: u64,
        /// The fewest that can show it.
        needed: u64,
        /// The drop to be shown.
        limit: Option<f64>,
    },
    /// Outputs and targets do not belong together.
    #[error("output {output:?} of shape {found:?} does not fit the target {target:?} of shape {expected:?}")]
    Shape {
        /// The model's output.
        output: String,
        /// Its shape.
        found: Vec<usize>,
        /// The dataset's tensor.
        target: String,
        /// The tensor's shape.
        expected: Vec<usize>,
    },
    /// A label is not a class.
    #[error("label {label} of target {target:?} is not one of {classes} classes")]
    Label {
        /// The label.
        label: i64,
        /// The dataset's tensor.
        target: String,
        /// The number of classes.
        classes: usize,
    },
    /// Data, or what a model makes of it, is no finite number.
    #[error("{output:?} holds {value} for sample {sample}")]
    NotFinite {
        /// The tensor of the data, or the value of the model.
        output: String,
        /// What it holds.
        value: f64,
        /// The number of the sample in its dataset.
        sample: u64,
    },
    /// A layer cannot be looked at or rounded.
    #[error("layer {node}: {problem}")]
    Layer {
        /// The node's label.
        node: String,
        /// What is wrong.
        problem: String,
    },
    /// What a search would try is not worth it for this model.
    #[error("{what} is left out: {reason}")]
    LeftOut {
        /// What would be tried.
        what: &'static str,
        /// Why it is not.
        reason: String,
    },
    /// Something that was asked for does not fit the model or the data.
    #[error("{setting} {problem}")]
    Setting {
        /// Which.
        setting: &'static str,
        /// What is wrong, and what is expected.
        problem: String,
    },
    /// The time that was given is over.
    #[error("the time limit is reached")]
    TimeLimit,
    /// A pass refused.
    #[error(transparent)]
    Pass(Box<PassError>),
    /// A pass refused or failed.
    #[error(transparent)]
    Pipeline(Box<PipelineError>),
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The data is wrong.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Training failed.
    #[error(transparent)]
    Train(Box<TrainError>),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<PassError> for CompressError {
    fn from(error: PassError) -> CompressError {
        CompressError::Pass(Box::new(error))
    }
}

impl From<PipelineError> for CompressError {
    fn from(error: PipelineError) -> CompressError {
        CompressError::Pipeline(Box::new(error))
    }
}

impl From<TrainError> for CompressError {
    fn from(error: TrainError) -> CompressError {
        match error {
            TrainError::Store(error) => CompressError::Store(error),
            TrainError::Data(error) => CompressError::Data(error),
            TrainError::Engine(error) => CompressError::Engine(error),
            error => CompressError::Train(Box::new(error)),
        }
    }
}
