//! What can stop a run.

use updraft_base::Digest;
use updraft_data::DataError;
use updraft_engine::EngineError;
use updraft_passes::PassError;
use updraft_passes::pipeline::PipelineError;
use updraft_store::StoreError;

use crate::metrics::MetricsError;

/// Sample names that a message lists: enough to look at, few enough to read.
const NAMES_SHOWN: usize = 4;

/// An error of training or evaluation.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The loss or the state is no longer a number. The last good checkpoint stays.
    #[error("step {step}: {what}; samples of the batch: {}; {}", show_names(names), match checkpoint {
        Some(digest) => format!("the last good checkpoint is {digest}"),
        None => "there is no checkpoint yet".to_owned(),
    })]
    Diverged {
        /// The step, from 1.
        step: u64,
        /// What is not a number.
        what: String,
        /// The numbers of the batch's samples in the dataset.
        samples: Vec<u64>,
        /// Where they come from.
        names: Vec<String>,
        /// The last checkpoint that was taken.
        checkpoint: Option<Digest>,
    },
    /// The dataset lacks a tensor that the model or the loss reads.
    #[error("the dataset makes no tensor `{input}`{}; it makes {}", nearest.as_ref().map(|n| format!(", did you mean `{n}`?")).unwrap_or_default(), known.join(", "))]
    MissingTensor {
        /// The graph's input.
        input: String,
        /// The most similar tensor, if one is similar.
        nearest: Option<String>,
        /// The tensors that there are.
        known: Vec<String>,
    },
    /// Whoever watches asked the run to stop. The same run goes on from its checkpoint.
    #[error("stopped after step {step}; the same run goes on from there")]
    Stopped {
        /// Steps that were done.
        step: u64,
    },
    /// A checkpoint that was found cannot be used.
    #[error("checkpoint {digest}: {reason}")]
    Checkpoint {
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        reason: String,
    },
    /// No checkpoint of this step is left.
    #[error("the checkpoint of step {step}, the best one, is no longer in the store")]
    NoCheckpoint {
        /// The step.
        step: u64,
    },
    /// A state tensor cannot be kept.
    #[error("step {step}: {reason}")]
    State {
        /// The step.
        step: u64,
        /// What is wrong.
        reason: String,
    },
    /// A setting is wrong.
    #[error("{setting} {problem}")]
    Settings {
        /// Which.
        setting: &'static str,
        /// What is wrong, and what is expected.
        problem: String,
    },
    /// The step's graph gave something else than it should.
    #[error("output {name:?} of the graph: {problem}")]
    Output {
        /// The output.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// Logits and labels do not belong together.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The model cannot be trained.
    #[error(transparent)]
    Pipeline(Box<PipelineError>),
    /// State and model do not belong together.
    #[error(transparent)]
    Pass(Box<PassError>),
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The data is wrong.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<PipelineError> for TrainError {
    fn from(error: PipelineError) -> TrainError {
        TrainError::Pipeline(Box::new(error))
    }
}

impl From<PassError> for TrainError {
    fn from(error: PassError) -> TrainError {
        TrainError::Pass(Box::new(error))
    }
}

fn show_names(names: &[String]) -> String {
    let shown = names.iter().take(NAMES_SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(NAMES_SHOWN) {
        Some(more @ 1..) => format!("{shown} and {more} more"),
        _ => shown,
    }
}
