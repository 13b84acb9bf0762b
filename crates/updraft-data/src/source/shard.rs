//! A shard: one object (or one folder) of rows, read in parts.
//!
//! Each format is a [`ShardReader`]. What it must not do is read more than was asked for: the unit is a block, a run of
//! rows whose bytes lie together and are fetched with one request. Formats without an index of their own (tar, TFRecord)
//! are walked over once; the list of blocks that this gives is small and is kept in the manifest.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::rows::{Cells, PartialCells, Rows, empty};
use crate::schema::Schema;
use crate::source::cells::kinds;

/// Bytes of a block where the format lets us choose: large enough that a request to a distant store is not mostly
/// waiting, small enough that a first batch of random rows does not read the whole dataset.
pub const BLOCK_BYTES: u64 = 4 << 20;

/// Rows of a block that are read at once, at most: their numbers take a gigabyte, and what a block claims is not always held
/// against its bytes before it is read.
const BLOCK_ROWS_MAX: u64 = 1 << 27;

/// The format of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShardFormat {
    /// MosaicML Streaming's shards, version 2.
    Mds,
    /// A tar archive as WebDataset reads it: files that share a name up to the first dot are one row.
    Tar,
    /// TFRecord of `tf.train.Example`.
    TfRecord,
    /// TFRecord of anything: one column, `record`.
    #[serde(rename = "tfrecord_raw")]
    TfRecordRaw,
    /// Apache Parquet.
    Parquet,
    /// Arrow IPC, as file or stream.
    Arrow,
    /// Values separated by commas, or by tabs where the name says so, with a header.
    Csv,
    /// One JSON object a line.
    #[serde(rename = "jsonl")]
    JsonLines,
    /// One NumPy array.
    Npy,
    /// Several NumPy arrays.
    Npz,
    /// A folder of pictures for each class.
    Folder,
}

impl ShardFormat {
    /// All formats, with their names in recipes and manifests, and the ends of the names of their objects.
    pub const ALL: [(ShardFormat, &str, &[&str]); 11] = [
        (ShardFormat::Mds, "mds", &["mds", "mds.zstd", "mds.gz"]),
        (ShardFormat::Tar, "tar", &["tar", "tar.gz", "tgz"]),
        (ShardFormat::TfRecord, "tfrecord", &["tfrecord", "tfrecords", "tfrecord.gz", "tfrecords.gz"]),
        (ShardFormat::TfRecordRaw, "tfrecord_raw", &[]),
        (ShardFormat::Parquet, "parquet", &["parquet"]),
        (ShardFormat::Arrow, "arrow", &["arrow", "arrows", "feather", "ipc"]),
        (ShardFormat::Csv, "csv", &["csv", "csv.gz", "csv.zst", "tsv", "tsv.gz", "tsv.zst"]),
        (
            ShardFormat::JsonLines,
            "jsonl",
            &["jsonl", "ndjson", "jsonl.gz", "ndjson.gz", "jsonl.zst", "jsonl.zstd", "ndjson.zst"],
        ),
        (ShardFormat::Npy, "npy", &["npy"]),
        (ShardFormat::Npz, "npz", &["npz"]),
        (ShardFormat::Folder, "folder", &[]),
    ];

    /// Its name in recipes and manifests.
    pub fn name(self) -> &'static str {
        ShardFormat::ALL.iter().find(|(format, ..)| *format == self).map_or("", |(_, name, _)| name)
    }

    /// The format that the end of a key says; `None` where it says none.
    pub fn of_key(key: &str) -> Option<ShardFormat> {
        let name = key.rsplit('/').next().unwrap_or(key).to_ascii_lowercase();
        let name = without_number(&name);
        let ends = |end: &&str| name.strip_suffix(end).is_some_and(|stem| stem.ends_with('.'));
        ShardFormat::ALL.iter().find(|(_, _, suffixes)| suffixes.iter().any(ends)).map(|(format, ..)| *format)
    }
}

/// A name without the number of the shard that TensorFlow puts behind the extension: `train.tfrecord-00000-of-00010`.
fn without_number(name: &str) -> &str {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let stem =
        name.rsplit_once("-of-").filter(|(_, count)| is_number(count)).and_then(|(stem, _)| stem.rsplit_once('-'));
    match stem {
        Some((stem, number)) if is_number(number) && stem.ends_with(".tfrecord") => stem,
        _ => name,
    }
}

impl fmt::Display for ShardFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The rows of one shard.
pub trait ShardReader: Send + Sync {
    /// Its columns.
    fn schema(&self) -> &Arc<Schema>;

    /// The number of rows.
    fn rows(&self) -> u64;

    /// The rows of each block, in order. A block is what is cheapest to read at once.
    fn blocks(&self) -> &[u64];

    /// The blocks as a manifest keeps them, so that a dataset can be planned with before its shards are opened.
    fn block_list(&self) -> Vec<Block> {
        self.blocks().iter().map(|rows| Block { rows: *rows, offset: 0 }).collect()
    }

    /// Bytes that the given columns of a block take in memory, as well as is known before reading.
    fn block_bytes(&self, block: usize, columns: &[usize]) -> u64;

    /// The cells of some columns, by their places in the schema, at some rows, in the order asked for.
    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError>;

    /// The same where cells may be missing or broken, which [`read`](ShardReader::read) refuses: what can be said of one
    /// cell is a gap there, and only what spoils all rows asked for is an error. Readers of formats that know nulls
    /// implement it.
    fn read_partial(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<PartialCells>, DataError> {
        Ok(self.read(columns, rows)?.into_iter().map(PartialCells::from).collect())
    }

    /// The rows around a row that are decoded from the same bytes: where [`read_partial`](ShardReader::read_partial) of
    /// some of them is an error about content, it is so for each of them alone.
    fn decoded_together(&self, _columns: &[usize], row: u64) -> Range<u64> {
        row..row + 1
    }

    /// Columns that the file has and nobody can read, by their places in the schema, each with the reason.
    fn unread(&self) -> Vec<(usize, String)> {
        Vec::new()
    }

    /// Where a row lies, for messages: the object, and the byte or row in it.
    fn place(&self, row: u64) -> String;

    /// Least and largest number that a column of one number a row has in a block, where the file says so without being
    /// read; NaN may be there besides.
    fn bounds(&self, _column: usize, _block: usize) -> Option<(f64, f64)> {
        None
    }

    /// Bytes that are read for one row of some columns of a block when it is read without the rest of the block; `None`
    /// where blocks are read whole.
    fn row_bytes(&self, _block: usize, _columns: &[usize]) -> Option<u64> {
        None
    }

    /// All columns of one block.
    fn read_block(&self, block: usize) -> Result<Rows, DataError> {
        let first: u64 = self.blocks().iter().take(block).sum();
        let count = self.blocks().get(block).copied().unwrap_or(0);
        if count > BLOCK_ROWS_MAX {
            let reason = format!("the block claims {count} rows; at most {BLOCK_ROWS_MAX} are read at once");
            return Err(DataError::file(self.place(first).as_ref(), reason));
        }
        let rows: Vec<u64> = (first..first + count).collect();
        let columns: Vec<usize> = (0..self.schema().columns.len()).collect();
        Ok(Rows { schema: self.schema().clone(), columns: self.read(&columns, &rows)? })
    }
}

/// What a reader may take, and what is known about the shard already.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// The most memory that a block may take, compressed or not.
    pub memory_bytes: u64,
    /// The columns as a manifest or an index lists them. A reader then gives exactly these, or an error that names what
    /// differs; without them it says what it finds.
    pub schema: Option<Arc<Schema>>,
    /// The blocks of a format without an index of its own, as an earlier walk found them.
    pub blocks: Vec<Block>,
    /// What one request counts as: the bytes that could have come in the time it takes to be answered.
    pub request_bytes: u64,
}

/// Bytes that could have come from a distant store while one request waits to be answered: 50 ms at 100 MB/s.
pub(crate) const REMOTE_REQUEST_BYTES: u64 = 5 << 20;

/// The same for a system call and what surrounds it: 30 microseconds at 4 GB/s.
pub(crate) const LOCAL_REQUEST_BYTES: u64 = 128 << 10;

impl Default for ReadOptions {
    fn default() -> ReadOptions {
        ReadOptions { memory_bytes: 1 << 30, schema: None, blocks: Vec::new(), request_bytes: REMOTE_REQUEST_BYTES }
    }
}

/// A run of rows and where its bytes start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// Its rows.
    pub rows: u64,
    /// The first byte; it ends where the next begins.
    pub offset: u64,
}

/// Reads rows block by block, each block once. `starts` is the first row of each block and the number of rows at the end;
/// `decode` gives the rows of a block, which ascend, by their places in it.
///
/// # Errors
/// Those of `decode`, or the reason for which blocks do not fit together.
pub(crate) fn read_blocks(
    starts: &[u64],
    rows: &[u64],
    schema: &Schema,
    columns: &[usize],
    mut decode: impl FnMut(usize, &[u64]) -> Result<Vec<PartialCells>, DataError>,
) -> Result<Vec<PartialCells>, Result<DataError, String>> {
    if rows.is_empty() {
        let none = |kind| empty(kind).map(PartialCells::from);
        return kinds(schema, columns).and_then(|kinds| kinds.into_iter().map(none).collect()).map_err(Err);
    }
    let end = starts.last().copied().unwrap_or(0);
    if let Some(row) = rows.iter().find(|row| **row >= end) {
        return Err(Err(format!("has no row {row}, only {end}")));
    }
    let mut sorted = rows.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut decoded = Vec::new();
    let mut rest = &sorted[..];
    while let Some(first) = rest.first() {
        let block = starts.partition_point(|start| start <= first) - 1;
        let (own, behind) = rest.split_at(rest.partition_point(|row| *row < starts[block + 1]));
        let own: Vec<u64> = own.iter().map(|row| row - starts[block]).collect();
        decoded.push(decode(block, &own).map_err(Ok)?);
        rest = behind;
    }
    if decoded.len() == 1 && sorted == rows {
        return Ok(decoded.pop().unwrap_or_default());
    }
    let places: Vec<usize> = rows.iter().map(|row| sorted.partition_point(|r| r < row)).collect();
    let mut out = Vec::with_capacity(columns.len());
    for column in 0..columns.len() {
        let parts: Vec<&PartialCells> = decoded.iter().filter_map(|block| block.get(column)).collect();
        out.push(PartialCells::concat(&parts).map_err(Err)?.gather(&places));
    }
    Ok(out)
}

/// The cells at some of the `count` rows of a block, which ascend.
pub(crate) fn pick(cells: PartialCells, rows: &[u64], count: u64) -> PartialCells {
    let places = || rows.iter().map(|row| *row as usize).collect::<Vec<_>>();
    if rows.len() as u64 == count { cells } else { cells.gather(&places()) }
}

/// The block that holds a row, as a range of rows. `starts` is the first row of each block and the number of rows at the
/// end.
pub(crate) fn block_around(starts: &[u64], row: u64) -> Range<u64> {
    let behind = starts.partition_point(|start| *start <= row).clamp(1, starts.len().max(2) - 1);
    match (starts.get(behind - 1), starts.get(behind)) {
        (Some(start), Some(end)) => *start..*end,
        _ => row..row + 1,
    }
}
