//! The training loop: load, step, validate, save.
//!
//! A training step is a session over a graph that passes built, so training, fine-tuning and distillation differ by
//! graph and not by loop. What the loop adds is what lasts from step to step: the engine's state, the learning rate,
//! evaluations, and checkpoints from which a killed run goes on to the same bits. Nothing here prints, and time is
//! handed in.

pub mod checkpoint;
pub mod evaluate;
pub mod history;
pub mod metrics;
pub mod waits;

mod error;
mod event;
mod trainer;

pub use error::TrainError;
pub use evaluate::Evaluator;
pub use event::{Event, Observer, Silent};
pub use trainer::{BestBy, CheckpointSchedule, EarlyStopping, Run, Settings, Trained, train};
