//! Rows into shards, for every format that is written.
//!
//! A writer keeps its shard in memory until it is whole, because that is how stores take objects, and because MDS and
//! Parquet say at one end what lies at the other. Equal rows and options give equal bytes: no times, names or versions
//! of machines are written.

use std::sync::Arc;

use bytes::Bytes;

use crate::error::DataError;
use crate::manifest::ShardFacts;
use crate::rows::Rows;
use crate::schema::Schema;
use crate::source::shard::ShardFormat;

/// Makes one shard.
pub trait ShardWriter: Send {
    /// Appends rows of the writer's schema.
    fn push(&mut self, rows: &Rows) -> Result<(), DataError>;

    /// Bytes of the shard if it were finished now, as well as is known; what to compare with the size wanted.
    fn bytes(&self) -> u64;

    /// Rows pushed.
    fn rows(&self) -> u64;

    /// The whole shard and what a manifest says of it. Its key is empty: where it goes is for the caller to say.
    fn finish(self: Box<Self>) -> Result<(Bytes, ShardFacts), DataError>;
}

/// How shards are written.
#[derive(Debug, Clone, PartialEq)]
pub struct WriteOptions {
    /// Bytes at which callers start the next shard. MDS shards must stay below 4 GiB.
    pub shard_bytes: u64,
    /// Bytes of a Parquet row group before compression.
    pub row_group_bytes: u64,
    /// Whether Parquet pages and MDS shards are compressed with zstd.
    pub compress: bool,
}

impl Default for WriteOptions {
    fn default() -> WriteOptions {
        WriteOptions { shard_bytes: 64 << 20, row_group_bytes: 32 << 20, compress: false }
    }
}

/// A writer of shards of this format.
///
/// # Errors
/// The column that the format cannot hold, and what it could.
pub fn writer(
    format: ShardFormat,
    schema: Arc<Schema>,
    options: &WriteOptions,
) -> Result<Box<dyn ShardWriter>, DataError> {
    let _ = (schema, options);
    match format {
        other => {
            Err(DataError::Loader(format!("{other} is read and not written; write mds, parquet, tfrecord or tar")))
        }
    }
}
