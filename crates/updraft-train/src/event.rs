//! What a run tells whoever watches it.

use updraft_base::Digest;
use updraft_passes::Refusal;

use crate::metrics::Metrics;
use crate::waits::Waits;

/// Watches a run. The library prints nothing; this is how it is heard.
pub trait Observer {
    /// Takes note of something that happened.
    fn observe(&mut self, event: &Event);

    /// Whether the run should stop after this step, with a checkpoint to go on from: somebody's time is over.
    fn stops(&mut self) -> bool {
        false
    }
}

/// Something that happened in a run.
#[derive(Debug)]
pub enum Event<'a> {
    /// The training step is built.
    Built {
        /// The float initializers of rank 1 and up that it does not train, by name, and why.
        untrained: &'a [&'a Refusal],
    },
    /// The run goes on from a checkpoint.
    Resumed {
        /// Steps that were done.
        step: u64,
        /// The checkpoint.
        checkpoint: Digest,
    },
    /// A newer checkpoint could not be read, and an older one serves.
    Unreadable {
        /// The checkpoint.
        checkpoint: Digest,
        /// What is wrong with it.
        reason: &'a str,
    },
    /// A step was done.
    Stepped {
        /// Steps done.
        step: u64,
        /// Steps to do.
        steps: u64,
        /// The loss on the step's batch.
        loss: f64,
        /// The learning rate of the step.
        learning_rate: f64,
    },
    /// The model was evaluated on the validation data.
    Evaluated {
        /// Steps done.
        step: u64,
        /// What was measured.
        metrics: &'a Metrics,
        /// Whether it is the best so far.
        is_best: bool,
    },
    /// A checkpoint is in the store.
    Saved {
        /// Steps done.
        step: u64,
        /// The checkpoint.
        checkpoint: Digest,
    },
    /// Early stopping ends the run.
    Stopped {
        /// Steps done.
        step: u64,
        /// Evaluations without a better one.
        evaluations: u64,
    },
    /// The loop ends; what it waited for.
    Waited {
        /// Since the run was started or resumed.
        waits: &'a Waits,
    },
}

/// Watches nothing.
pub struct Silent;

impl Observer for Silent {
    fn observe(&mut self, _: &Event) {}
}
