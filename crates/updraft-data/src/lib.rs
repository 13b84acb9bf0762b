//! Batches: a deterministic, resumable slice of a dataset, as tensors.
//!
//! A [`Dataset`] is a source (a file or a folder) and the tensors that its columns become, both described by plain data
//! that sits in a recipe ([`DatasetConfig`]). A [`Loader`] deals its samples into batches. Which samples make batch `t`,
//! and how they are cropped and flipped, is a function of seed, epoch and position alone ([`Order`]); threads, memory and
//! interruptions change who does the work and when, never the result.

pub mod config;

mod dataset;
mod error;
mod loader;
mod npy;
mod order;
mod picture;
mod source;
mod text;
mod transform;

pub use config::DatasetConfig;
pub use dataset::{Dataset, DatasetFacts, TensorFacts};
pub use error::DataError;
pub use loader::{Batch, Batches, Loader, LoaderOptions, LoaderToken, Tail};
pub use npy::{read_npy, read_npz, write_npz};
pub use order::{EpochOrder, Order, Shuffle};
pub use text::{UnknownCharacter, Vocabulary};
