//! Batches: a deterministic, resumable slice of a dataset, as tensors.
//!
//! A [`Dataset`] is a source (a file or a folder) and the tensors that its columns become, both described by plain data
//! that sits in a recipe ([`DatasetConfig`]). A [`Loader`] deals its samples into batches. Which samples make batch `t`,
//! and how they are cropped and flipped, is a function of seed, epoch and position alone ([`Order`]); threads, memory and
//! interruptions change who does the work and when, never the result.
//!
//! ```
//! use std::sync::Arc;
//! use updraft_data::{Dataset, DatasetConfig, Loader, LoaderOptions, Shuffle};
//!
//! # let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/shakespeare");
//! let config: DatasetConfig = toml::from_str(
//!     r#"
//!     path = "data/tinyshakespeare.txt"
//!     format = { text = { context = 64, span = [0.0, 0.9] } }
//!     "#,
//! )?;
//! let dataset = Arc::new(Dataset::open(&config, &dir)?);
//! let options = LoaderOptions { batch_size: 12, seed: 1, shuffle: Shuffle::Global, ..LoaderOptions::default() };
//! let loader = Loader::new(dataset, options)?;
//! for batch in loader.batches(0..3)? {
//!     let batch = batch?;
//!     assert_eq!(batch.tensors[0].0, "inputs");
//!     assert_eq!(batch.tensors[0].1.shape(), [12, 64]);
//! }
//! let checkpointed = loader.token(3)?;
//! assert_eq!(loader.resume(&checkpointed)?, 3);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod config;
pub mod ingest;
pub mod lifecycle;
pub mod personal;
pub mod statistics;

mod augment;
mod cache;
mod dataset;
mod error;
mod filter;
mod lanes;
mod loader;
pub mod manifest;
mod mixture;
mod npy;
mod order;
mod packing;
mod parallel;
mod picture;
mod rows;
pub mod schema;
#[cfg(feature = "redis")]
mod server;
mod source;
mod stall;
#[cfg(any(feature = "redis", feature = "kafka"))]
pub mod stream;
mod text;
mod tokenize;
mod transform;
pub mod validate;
pub mod write;

#[cfg(feature = "redis")]
pub use cache::shared::{SharedCache, SharedCacheOptions};
pub use cache::{Cache, CacheOptions, CacheReading, SharedCacheReading};
pub use config::DatasetConfig;
pub use dataset::{Dataset, DatasetFacts, TensorFacts};
pub use error::{DataError, known_names};
pub use ingest::{Preview, picture_preview};
pub use lanes::{LaneEpoch, Lanes, Share};
pub use loader::{Batch, Batches, Drift, Loader, LoaderOptions, LoaderToken, Tail};
pub use manifest::{Manifest, ShardFacts, StreamPlace, Version};
pub use mixture::{Mixture, Weights};
pub use npy::{read_npy, read_npz, write_npz};
pub use order::{EpochOrder, Order, Shuffle};
pub use packing::{LaneState, Piece};
pub use rows::{Cells, Gap, PartialCells, Rows};
pub use schema::{Column, Kind, Schema};
pub use source::resolve::Shards;
pub use source::shard::{self, ShardFormat, ShardReader};
pub use source::shards;
pub use source::{Access, KnownDigests, Told, Wrap, open_shard};
pub use stall::{Stage, StageTimes, Stalls};
pub use text::{UnknownCharacter, Vocabulary};
