//! Rows into shards, for every format that is written.
//!
//! A writer keeps its shard in memory until it is whole, because that is how stores take objects, and because MDS and
//! Parquet say at one end what lies at the other. Equal rows and options give equal bytes: no times, names or versions
//! of machines are written.

use std::sync::Arc;

use bytes::Bytes;
use updraft_graph::{DType, Tensor};

use crate::error::DataError;
use crate::manifest::ShardFacts;
use crate::rows::{Cells, Rows};
use crate::schema::Schema;
use crate::source::cells::to_native;
use crate::source::shard::ShardFormat;

mod mds;
mod parquet;
mod tar;
mod tfrecord;

pub use mds::mds_index;

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
    Ok(match format {
        ShardFormat::Mds => Box::new(mds::MdsWriter::new(schema, options)?),
        ShardFormat::Parquet => Box::new(parquet::ParquetWriter::new(schema, options)?),
        ShardFormat::TfRecord | ShardFormat::TfRecordRaw => {
            Box::new(tfrecord::TfRecordWriter::new(schema, format == ShardFormat::TfRecordRaw)?)
        }
        ShardFormat::Tar => Box::new(tar::TarWriter::new(schema)?),
        other => {
            let reason = format!("{other} is read and not written; write mds, parquet, tfrecord or tar");
            return Err(DataError::file("shard".as_ref(), reason));
        }
    })
}

/// Refuses rows of other columns than the writer's.
fn check_rows(schema: &Schema, rows: &Rows) -> Result<(), DataError> {
    let wrong = |reason: String| DataError::file("shard".as_ref(), reason);
    if *rows.schema != *schema {
        let difference = schema.difference(&rows.schema).unwrap_or_else(|| "the columns are in another order".into());
        return Err(wrong(format!("the rows are not of the writer's columns: {difference}")));
    }
    // What the fields promise, since they can be set.
    Rows::new(rows.schema.clone(), rows.columns.clone()).map(|_| ()).map_err(wrong)
}

/// One cell, seen without copying.
enum Cell<'a> {
    Bytes(&'a Bytes),
    /// Elements in native order, and their shape.
    Numbers(DType, &'a [usize], &'a [u8]),
}

fn cell(cells: &Cells, row: usize) -> Cell<'_> {
    match cells {
        Cells::Bytes(cells) => Cell::Bytes(&cells[row]),
        Cells::Lists(lists) => Cell::Numbers(lists[row].dtype(), lists[row].shape(), lists[row].bytes()),
        Cells::Numbers(tensor) => {
            let row_bytes = row_bytes(tensor);
            Cell::Numbers(tensor.dtype(), &tensor.shape()[1..], &tensor.bytes()[row * row_bytes..][..row_bytes])
        }
    }
}

fn row_bytes(tensor: &Tensor) -> usize {
    tensor.byte_len().checked_div(tensor.shape().first().copied().unwrap_or(0)).unwrap_or(0)
}

/// Appends elements in little-endian order.
fn put_le(dtype: DType, elements: &[u8], out: &mut Vec<u8>) {
    let at = out.len();
    out.extend_from_slice(elements);
    to_native(dtype, &mut out[at..]);
}

/// An error of a column of a writer.
fn refused(column: &str, reason: impl std::fmt::Display) -> DataError {
    DataError::Sample { sample: "shard".into(), column: column.to_owned(), reason: reason.to_string() }
}
