//! Ingestion: shards of any format in, shards of one format and size out, with statistics and a manifest.
//!
//! # Design
//!
//! All rows of the source are numbered, put in order (that of the source, or a shuffled one) and cut into units, each of
//! which becomes one shard. The key of a shard holds the digest of all that determines its bytes: which rows of which
//! input shards, and what is done to them. So a unit is a task that anyone may do, again or at the same time: shards are
//! put with a conditional create, the one who comes second drops its copy, and the record beside it, written after the
//! shard, says that it is whole. The manifest comes last, when there is a record of every unit. A process killed at any
//! moment leaves whole shards and records, which the next one takes; no clock, name or number of threads is in any byte.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use updraft_base::{Digest, Hasher};
use updraft_store::{Created, Objects, StoreError};

use crate::config::Resize;
use crate::error::DataError;
use crate::manifest::ShardFacts;
use crate::order::{EpochOrder, Order, Shuffle};
use crate::parallel::in_order;
use crate::rows::Rows;
use crate::schema::{Column, Schema};
use crate::source::shard::{ShardFormat, ShardReader};
use crate::statistics::ColumnSummary;
use crate::write::{ShardWriter, WriteOptions, writer};

mod answer;
mod blocks;
mod commit;
mod resize;
mod steps;

pub use answer::{found_rows, ingest_rows};
use blocks::Blocks;
pub use commit::{append, check_target, commit, not_yet_in};
pub use resize::{Preview, picture_preview};
pub use steps::{DecodeStep, ResizeStep, Step, Steps, TokenizeStep};

/// Part of every unit's digest: another number where the same rows become other bytes.
const VERSION: &str = "2";

/// Rows that are gathered, transformed and written at once.
const CHUNK_ROWS: usize = 512;

/// What is done to rows between reading and writing. Each row is changed, left out or multiplied by itself, so that the rows
/// of a unit may come in parts of any size.
pub trait Change: Send + Sync {
    /// The columns that are written.
    fn schema(&self) -> &Arc<Schema>;

    /// Stands for all that determines what becomes of rows.
    fn identity(&self) -> String;

    /// What becomes of some rows; `place` says where a row comes from, for messages.
    ///
    /// # Errors
    /// A row that cannot be used.
    fn apply(&self, rows: Rows, place: &dyn Fn(usize) -> String) -> Result<Rows, DataError>;
}

/// A shard to read, and what its rows are known by: the digest or tag of its content.
#[derive(Clone)]
pub struct Input {
    /// The rows.
    pub reader: Arc<dyn ShardReader>,
    /// Changes when the content does.
    pub identity: String,
}

/// What is made of the rows.
#[derive(Debug, Clone, PartialEq)]
pub struct IngestOptions {
    /// The format of the shards.
    pub format: ShardFormat,
    /// Their size and form.
    pub write: WriteOptions,
    /// Rows of a shard; without it, as many as are about [`WriteOptions::shard_bytes`] in memory.
    pub shard_rows: Option<u64>,
    /// The columns that are kept, in this order; without any, all.
    pub columns: Vec<String>,
    /// A new order of the rows: the seed, and the blocks that are mixed with each other at a time.
    pub shuffle: Option<(u64, u64)>,
    /// Pictures to make smaller, by column.
    pub resize: BTreeMap<String, Resize>,
    /// Threads.
    pub threads: usize,
    /// The most memory for blocks being read and shards being written.
    pub memory_bytes: u64,
    /// The unit to begin with, modulo their number: several processes on one target start apart.
    pub first_unit: u64,
}

/// What came of an ingestion.
#[derive(Debug, Clone, PartialEq)]
pub struct Ingested {
    /// The columns.
    pub schema: Schema,
    /// The shards, in order.
    pub shards: Vec<ShardFacts>,
    /// Rows.
    pub rows: u64,
    /// Shards that this process made; the others were there, or another was faster.
    pub made: u64,
    /// What the shards were made of, each by the digest or tag of its content.
    pub inputs: BTreeSet<String>,
}

/// What came of a unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnitDone {
    /// Its shard; `None` where no row was left.
    pub shard: Option<ShardFacts>,
    /// Whether this process made it, now.
    pub is_made: bool,
}

/// The record of a unit that is done.
#[derive(Serialize, Deserialize)]
struct Record {
    shard: Option<ShardFacts>,
}

/// Rows from a position on, which become one shard.
struct Unit {
    first: u64,
    rows: u64,
    digest: Digest,
    key: String,
}

/// Rows cut into units, each of which anyone may do: what determines the shards, and how to make them.
pub struct Ingestion {
    inputs: Arc<[Input]>,
    options: IngestOptions,
    /// The columns that are read.
    read: Arc<Schema>,
    blocks: Blocks,
    order: Option<EpochOrder>,
    units: Vec<Unit>,
    change: Arc<dyn Change>,
    /// Bytes of a row in memory, read or written, whichever is more.
    row_bytes: u64,
}

/// Writes the shards that are not there yet. `progress` is told of the rows that are done and of all.
///
/// # Errors
/// Inputs of different columns, a column that is not there, a row that cannot be read or decoded, memory that is too small
/// for a shard and a block of each thread, a store that does not answer.
pub fn ingest(
    inputs: &[Input],
    target: &Objects,
    options: &IngestOptions,
    mut progress: impl FnMut(u64, u64),
) -> Result<Ingested, DataError> {
    let read = columns_of(inputs, options)?;
    let resize = options
        .resize
        .iter()
        .map(|(column, to)| Step::Resize(ResizeStep { columns: vec![column.clone()], to: to.clone() }));
    let steps = Steps::open(&resize.collect::<Vec<_>>(), &read, Path::new(""))?;
    let job = Ingestion::new(inputs, options, Arc::new(steps))?;
    let total: u64 = job.units.iter().map(|unit| unit.rows).sum();
    let threads = job.threads()?;
    let count = job.units.len();
    let mut units: Vec<Option<UnitDone>> = vec![None; count];
    let mut done = 0;
    // Which unit comes when changes nothing but who does it.
    let turned = |at: usize| (at + (options.first_unit % count.max(1) as u64) as usize) % count.max(1);
    in_order(
        count,
        threads,
        |at| job.do_unit(turned(at), target),
        |at, unit| {
            done += job.unit_rows(turned(at));
            units[turned(at)] = Some(unit);
            progress(done, total);
            Ok(())
        },
    )?;
    job.ingested(units.into_iter().flatten())
}

/// The columns that are read: those asked for, or all.
fn columns_of(inputs: &[Input], options: &IngestOptions) -> Result<Schema, DataError> {
    let refuse = |reason: String| DataError::Loader(reason);
    let first = inputs.first().ok_or_else(|| refuse("nothing to ingest: the source has no shards".into()))?;
    let source = first.reader.schema();
    let all = source.names();
    let wanted = if options.columns.is_empty() { &all } else { &options.columns };
    let mut columns = Vec::with_capacity(wanted.len());
    for name in wanted {
        let at = source.index_of(name);
        let at = at.ok_or_else(|| refuse(format!("no column `{name}`; {}", crate::error::known_names(name, &all))))?;
        columns.push(source.columns[at].clone());
    }
    Schema::new(columns).map_err(refuse)
}

impl Ingestion {
    /// Cuts the rows of all inputs into units. `change` is what becomes of the columns that the options name; what the
    /// options say of resizing is not looked at.
    ///
    /// # Errors
    /// Inputs of different columns, a column that is not there, no rows.
    pub fn new(inputs: &[Input], options: &IngestOptions, change: Arc<dyn Change>) -> Result<Ingestion, DataError> {
        let refuse = |reason: String| DataError::Loader(reason);
        let read = Arc::new(columns_of(inputs, options)?);
        let first = &inputs[0].reader;
        let source = first.schema();
        for input in inputs {
            if let Some(difference) = source.difference(input.reader.schema()) {
                let (here, there) = (input.reader.place(0), first.place(0));
                return Err(refuse(format!("{here}: {difference}, as in {there}")));
            }
        }
        let columns: Vec<usize> = read.columns.iter().filter_map(|c| source.index_of(&c.name)).collect();
        let inputs: Arc<[Input]> = inputs.into();
        let blocks = Blocks::new(inputs.clone(), &columns);
        let order = options.shuffle.map(|(seed, window)| {
            Order::new(seed, &blocks.rows().collect::<Vec<_>>(), Shuffle::Blocks(window)).epoch(0)
        });
        let options = options.clone();
        let mut job = Ingestion { inputs, options, read, blocks, order, units: Vec::new(), change, row_bytes: 1 };
        job.cut()?;
        let window = job.options.shuffle.map_or(0, |(_, window)| window);
        job.blocks.keep(usize::try_from(2 * window).unwrap_or(usize::MAX).max(job.options.threads + 1));
        Ok(job)
    }

    /// Cuts the rows into units.
    fn cut(&mut self) -> Result<(), DataError> {
        let total = self.blocks.total_rows();
        if total == 0 {
            return Err(DataError::Loader("nothing to ingest: the source has no rows".into()));
        }
        // Decoded pictures take more than their files.
        let is_new = |column: &&Column| !self.read.columns.contains(column);
        let new = self.change.schema().columns.iter().filter(is_new).filter_map(|column| column.kind.row_bytes());
        self.row_bytes = (self.blocks.total_bytes() / total).max(new.sum::<usize>() as u64).max(1);
        let unit_rows = self.options.shard_rows.unwrap_or(self.options.write.shard_bytes / self.row_bytes).max(1);
        let pipeline = self.pipeline_digest();
        let mut first = 0;
        while first < total {
            let rows = unit_rows.min(total - first);
            let number = self.units.len();
            let digest = self.unit_digest(&pipeline, number, first, rows);
            let key = shard_key(&format!("{number:06}"), &digest, self.options.format, &self.options.write);
            self.units.push(Unit { first, rows, digest, key });
            first += rows;
        }
        Ok(())
    }

    fn pipeline_digest(&self) -> Digest {
        let IngestOptions { format, write, columns, shuffle, .. } = &self.options;
        let mut hasher = Hasher::new();
        let written = format!("{} {} {}", format.name(), write.row_group_bytes, write.compress);
        let schema = format!("{:?}", self.read);
        let shuffle = format!("{shuffle:?}");
        for field in [VERSION, &written, &columns.join("\n"), &schema, &shuffle, &self.change.identity()] {
            hasher.field(field.as_bytes());
        }
        hasher.finish()
    }

    /// The digest of a unit: the pipeline, the unit's number, which keeps those apart whose rows are equal, and the runs of
    /// rows that go in. In a shuffled order every run may be anywhere, so all inputs go in.
    fn unit_digest(&self, pipeline: &Digest, number: usize, first: u64, rows: u64) -> Digest {
        let mut hasher = Hasher::new();
        hasher.field(pipeline.as_bytes());
        hasher.field(&(number as u64).to_le_bytes());
        let (from, to) = if self.order.is_some() { (0, self.blocks.total_rows()) } else { (first, first + rows) };
        let mut start = 0;
        for input in &*self.inputs {
            let end = start + input.reader.rows();
            let (low, high) = (from.max(start), to.min(end));
            if low < high {
                hasher.field(input.identity.as_bytes());
                hasher.field(&(low - start).to_le_bytes());
                hasher.field(&(high - start).to_le_bytes());
            }
            start = end;
        }
        if self.order.is_some() {
            hasher.field(&first.to_le_bytes());
            hasher.field(&rows.to_le_bytes());
        }
        hasher.finish()
    }

    /// The columns that are written.
    pub fn schema(&self) -> &Arc<Schema> {
        self.change.schema()
    }

    /// The number of units.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// The rows that a unit reads; 0 where there is no such unit.
    pub fn unit_rows(&self, unit: usize) -> u64 {
        self.units.get(unit).map_or(0, |unit| unit.rows)
    }

    /// What stands for all that determines a unit's shard.
    pub fn digest(&self, unit: usize) -> Option<&Digest> {
        self.units.get(unit).map(|unit| &unit.digest)
    }

    /// As many threads as memory has room for: a shard, its finished copy, and the blocks it is made of.
    ///
    /// # Errors
    /// Memory that is too small for one.
    pub fn threads(&self) -> Result<usize, DataError> {
        let unit_bytes = self.units.iter().map(|u| u.rows).max().unwrap_or(0) * self.row_bytes;
        let kept_bytes = self.blocks.kept_bytes();
        let free_bytes = self.options.memory_bytes.saturating_sub(kept_bytes);
        let fits = free_bytes / (2 * unit_bytes).max(1);
        if fits == 0 {
            return Err(DataError::Loader(format!(
                "a shard takes about {} twice and the blocks in use {}, more than {} of memory; make shards smaller, or \
                 shuffle over fewer blocks",
                updraft_base::units::bytes(unit_bytes),
                updraft_base::units::bytes(kept_bytes),
                updraft_base::units::bytes(self.options.memory_bytes),
            )));
        }
        Ok(usize::try_from(fits).unwrap_or(usize::MAX).min(self.options.threads))
    }

    /// What a record says came of a unit, where its shard is there.
    ///
    /// # Errors
    /// A store that does not answer, a record that is none.
    pub fn found(&self, unit: usize, target: &Objects) -> Result<Option<UnitDone>, DataError> {
        let Some(unit) = self.units.get(unit) else { return Ok(None) };
        let Some(Record { shard }) = record(target, &unit.record_key())? else { return Ok(None) };
        let is_there = shard.as_ref().map_or(Ok(true), |shard| stands(target, shard))?;
        Ok(is_there.then_some(UnitDone { shard, is_made: false }))
    }

    /// Those of some units that are [found](Ingestion::found) done, asked for on all threads.
    ///
    /// # Errors
    /// A store that does not answer, a record that is none.
    pub fn found_all(&self, units: &[usize], target: &Objects) -> Result<Vec<(usize, UnitDone)>, DataError> {
        let mut all = Vec::new();
        in_order(
            units.len(),
            self.options.threads,
            |at| self.found(units[at], target),
            |at, found| {
                all.extend(found.map(|done| (units[at], done)));
                Ok(())
            },
        )?;
        Ok(all)
    }

    /// Finds a unit done, or does it.
    ///
    /// # Errors
    /// A row that cannot be read or changed, a store that does not take the shard.
    pub fn do_unit(&self, unit: usize, target: &Objects) -> Result<UnitDone, DataError> {
        if let Some(done) = self.found(unit, target)? {
            return Ok(done);
        }
        let unit = self.units.get(unit).ok_or_else(|| DataError::Loader(format!("there is no unit {unit}")))?;
        let mut done = UnitDone { shard: None, is_made: false };
        if let Some((bytes, mut facts)) = self.make(unit)? {
            facts.key = unit.key.clone();
            done.is_made = put_shard(target, &unit.key, bytes)?;
            done.shard = Some(facts);
        }
        let record = serde_json::to_vec(&Record { shard: done.shard.clone() })
            .map_err(|e| DataError::Loader(format!("{}: {e}", unit.key)))?;
        target.create(&unit.record_key(), record.into())?;
        Ok(done)
    }

    /// What all units together are, in their order.
    ///
    /// # Errors
    /// Units of which none has a row.
    pub fn ingested(&self, units: impl IntoIterator<Item = UnitDone>) -> Result<Ingested, DataError> {
        let schema = (**self.change.schema()).clone();
        let inputs = self.inputs.iter().map(|input| input.identity.clone()).collect();
        let mut ingested = Ingested { schema, shards: Vec::new(), rows: 0, made: 0, inputs };
        for UnitDone { shard, is_made } in units {
            ingested.made += u64::from(is_made);
            ingested.rows += shard.as_ref().map_or(0, |shard| shard.samples);
            ingested.shards.extend(shard);
        }
        if ingested.shards.is_empty() {
            return Err(DataError::Loader("nothing to write: no row is left".into()));
        }
        Ok(ingested)
    }

    fn make(&self, unit: &Unit) -> Result<Option<(bytes::Bytes, ShardFacts)>, DataError> {
        let mut shard = Making::new(self.change.schema(), self.options.format, &self.options.write)?;
        let positions: Vec<u64> = (unit.first..unit.first + unit.rows).collect();
        let mut is_empty = true;
        for chunk in positions.chunks(CHUNK_ROWS) {
            let numbers: Vec<u64> = match &self.order {
                Some(order) => chunk.iter().map(|position| order.sample_at(*position)).collect(),
                None => chunk.to_vec(),
            };
            let cells = self.blocks.gather(&numbers)?;
            let rows = Rows::new(self.read.clone(), cells).map_err(DataError::Loader)?;
            let place = |row: usize| match numbers.get(row) {
                Some(number) => self.blocks.place(*number),
                None => format!("row {row}"),
            };
            let rows = self.change.apply(rows, &place)?;
            if !rows.is_empty() {
                shard.push(&rows)?;
                is_empty = false;
            }
        }
        if is_empty { Ok(None) } else { shard.finish().map(Some) }
    }
}

impl Unit {
    fn record_key(&self) -> String {
        format!("_ingest/{}.json", self.digest.hex())
    }
}

/// A shard being written, with what its columns hold.
pub(crate) struct Making {
    writer: Box<dyn ShardWriter>,
    summaries: Vec<ColumnSummary>,
}

impl Making {
    pub(crate) fn new(schema: &Arc<Schema>, format: ShardFormat, options: &WriteOptions) -> Result<Making, DataError> {
        let writer = writer(format, schema.clone(), options)?;
        Ok(Making { writer, summaries: schema.columns.iter().map(|c| ColumnSummary::new(&c.name)).collect() })
    }

    pub(crate) fn push(&mut self, rows: &Rows) -> Result<(), DataError> {
        for (summary, cells) in self.summaries.iter_mut().zip(&rows.columns) {
            summary.push(cells)?;
        }
        self.writer.push(rows)
    }

    pub(crate) fn finish(self) -> Result<(bytes::Bytes, ShardFacts), DataError> {
        let (bytes, mut facts) = self.writer.finish()?;
        for summary in self.summaries {
            let statistics = summary.finish().coarse();
            let value = serde_json::to_value(&statistics).map_err(|e| DataError::Loader(e.to_string()))?;
            facts.columns.insert(statistics.column, value);
        }
        Ok((bytes, facts))
    }
}

/// The name of a shard: its place, what determines it, and the ends by which readers know the format.
pub(crate) fn shard_key(place: &str, digest: &Digest, format: ShardFormat, options: &WriteOptions) -> String {
    let packed = if format == ShardFormat::Mds && options.compress { ".zstd" } else { "" };
    format!("shard-{place}-{}.{format}{packed}", digest.short())
}

/// Puts a shard where none is; whether it did. Its name says what is in it: where it is already, it was made before, or by
/// somebody else.
pub(crate) fn put_shard(target: &Objects, key: &str, bytes: bytes::Bytes) -> Result<bool, DataError> {
    let length = bytes.len() as u64;
    let created = target.create(key, bytes)?;
    if created == Created::Exists {
        let found = target.head(key)?.bytes;
        if found != length {
            let name = updraft_store::ReadObjects::name(target, key);
            let reason = format!("has {found} bytes where {length} were made; something else wrote it");
            return Err(DataError::file(name.as_ref(), reason));
        }
    }
    Ok(created == Created::New)
}

/// What a record says, if there is one.
fn record<T: DeserializeOwned>(target: &Objects, key: &str) -> Result<Option<T>, DataError> {
    let text = match target.get(key) {
        Ok(text) => text,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let name = || updraft_store::ReadObjects::name(target, key);
    let record = serde_json::from_slice(&text);
    record.map(Some).map_err(|e| DataError::file(name().as_ref(), format!("is no record of a shard: {e}")))
}

/// Whether a shard is there as a record says. Where it was deleted by hand, it is made again.
fn stands(target: &Objects, shard: &ShardFacts) -> Result<bool, DataError> {
    match target.head(&shard.key) {
        Ok(found) => Ok(found.bytes == shard.bytes),
        Err(StoreError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The statistics of all shards, by column, from what a manifest says of them; `None` where one says nothing.
pub fn statistics_of(shards: &[ShardFacts], schema: &Schema) -> Option<Vec<crate::statistics::ColumnStatistics>> {
    let mut sums: Vec<crate::statistics::ColumnStatistics> = Vec::new();
    for column in &schema.columns {
        let mut sum: Option<crate::statistics::ColumnStatistics> = None;
        for shard in shards {
            let value: &Value = shard.columns.get(&column.name)?;
            let part: crate::statistics::ColumnStatistics = serde_json::from_value(value.clone()).ok()?;
            match &mut sum {
                Some(sum) => sum.merge(&part),
                None => sum = Some(part),
            }
        }
        sums.push(sum?);
    }
    Some(sums)
}
