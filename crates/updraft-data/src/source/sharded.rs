//! Many shards as one source of rows.
//!
//! Shards are opened when a row of theirs is first asked for. Their blocks are decoded once, in the wanted columns, and
//! kept while memory lasts; then those used longest ago go first. Order visits blocks window by window and each once an
//! epoch, so what was used longest ago is also what is needed furthest ahead.
//!
//! # Design
//!
//! A row can be read alone or with its block, and which is cheaper depends on what else will be asked for. So a block is
//! read whole once the rows read alone have cost as much as it would (the rule of renting skis: never more than twice
//! the best). A request counts as many bytes as could have come in the time it takes to be answered.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use updraft_base::Digest;
use updraft_graph::{DType, Tensor};
use updraft_store::ReadObjects;

use crate::error::DataError;
use crate::manifest::ShardFacts;
use crate::rows::Cells;
use crate::schema::Schema;
use crate::source::Source;
use crate::source::mds::Known;
use crate::source::shard::{ReadOptions, ShardFormat, ShardReader};
use crate::source::{open_shard_known, verify_shard};

/// Shards that are kept open, at most.
const OPEN_MAX: usize = 1024;

/// A shard of the dataset.
pub(crate) struct Shard {
    pub facts: ShardFacts,
    /// What an MDS index says of it.
    pub mds: Option<Known>,
    /// Rows of its blocks.
    pub blocks: Vec<u64>,
    /// Its reader, where it had to be opened to learn the above.
    pub reader: Option<Arc<dyn ShardReader>>,
    /// SHA-256 of the file, where it was read to tell which dataset this is.
    pub content: Option<Digest>,
}

pub(crate) struct Sharded {
    name: PathBuf,
    objects: Arc<dyn ReadObjects>,
    schema: Arc<Schema>,
    /// Places of the wanted columns in the schema.
    columns: Vec<usize>,
    shards: Vec<Shard>,
    open: Mutex<Open>,
    /// Rows of the blocks of all shards.
    block_rows: Vec<u64>,
    /// First row of each block, and the number of rows at the end.
    starts: Vec<u64>,
    /// The first block of each shard.
    shard_blocks: Vec<usize>,
    block_bytes: Vec<u64>,
    /// The same, largest first.
    sorted_bytes: Vec<u64>,
    memory_bytes: u64,
    /// Whether memory has room for all blocks, so that none is let go of.
    keeps_all: bool,
    request_bytes: u64,
    /// The shards whose bytes were found to be what they should, where that is asked for.
    verified: Option<Mutex<HashSet<usize>>>,
    cache: Mutex<Cache>,
    unpacking: Mutex<Unpacking>,
    unpacked: Condvar,
}

/// Blocks that are being decoded, each as it lies in the file and as it becomes.
#[derive(Default)]
struct Unpacking {
    blocks: u64,
    bytes: u64,
}

/// Blocks that may be decoded at the same time however large they are: fewer would leave a processor idle.
const UNPACKED_TOGETHER: u64 = 2;

/// A place among those that decode, until it is dropped.
struct Turn<'a> {
    source: &'a Sharded,
    bytes: u64,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut now = self.source.unpacking.lock().unwrap_or_else(PoisonError::into_inner);
        (now.blocks, now.bytes) = (now.blocks - 1, now.bytes.saturating_sub(self.bytes));
        drop(now);
        self.source.unpacked.notify_all();
    }
}

#[derive(Default)]
struct Open {
    readers: HashMap<usize, Arc<dyn ShardReader>>,
    order: VecDeque<usize>,
}

#[derive(Default)]
struct Cache {
    kept: HashMap<usize, Kept>,
    kept_bytes: u64,
    clock: u64,
    /// What rows read alone have cost, by block.
    spent: HashMap<usize, u64>,
}

struct Kept {
    block: Arc<Block>,
    bytes: u64,
    last_read: u64,
}

/// A block that one thread decodes and the others wait for.
#[derive(Default)]
struct Block {
    columns: OnceLock<Vec<Cells>>,
    decoding: Mutex<()>,
}

/// What a source is made of.
pub(crate) struct Parts {
    pub name: PathBuf,
    pub objects: Arc<dyn ReadObjects>,
    pub schema: Arc<Schema>,
    pub columns: Vec<usize>,
    pub shards: Vec<Shard>,
    pub memory_bytes: u64,
    pub request_bytes: u64,
    pub verify: bool,
}

impl Sharded {
    pub(crate) fn new(parts: Parts) -> Result<Sharded, DataError> {
        let Parts { name, objects, schema, columns, shards, memory_bytes, request_bytes, verify } = parts;
        let (mut block_rows, mut starts, mut shard_blocks, mut block_bytes) = (vec![], vec![0u64], vec![], vec![]);
        let fixed: Option<usize> = columns.iter().map(|at| schema.columns[*at].kind.row_bytes()).sum();
        for shard in &shards {
            shard_blocks.push(block_rows.len());
            for (block, rows) in shard.blocks.iter().enumerate() {
                let bytes = match (&shard.reader, fixed) {
                    (Some(reader), _) => reader.block_bytes(block, &columns),
                    (None, Some(row_bytes)) => rows.saturating_mul(row_bytes as u64),
                    (None, None) => shard.facts.bytes / shard.blocks.len() as u64 + 32 * rows,
                };
                if bytes > memory_bytes {
                    let first: u64 = shard.blocks[..block].iter().sum();
                    let (what, advice) = match shard.facts.format {
                        ShardFormat::Parquet => {
                            (format!("row group {block}"), "raise it, or write the file with smaller row groups")
                        }
                        _ => (
                            format!("what is read together of samples {first} to {}", (first + rows).saturating_sub(1)),
                            "raise it, or write smaller samples",
                        ),
                    };
                    let (path, needed_bytes) = (objects.name(&shard.facts.key).into(), bytes);
                    return Err(DataError::Memory { path, what, needed_bytes, allowed_bytes: memory_bytes, advice });
                }
                let end = starts[starts.len() - 1].checked_add(*rows);
                starts.push(end.ok_or_else(|| DataError::file(&name, "claims more than 2^64 rows"))?);
                block_rows.push(*rows);
                block_bytes.push(bytes);
            }
        }
        if starts[starts.len() - 1] == 0 {
            return Err(DataError::Empty { path: name, reason: String::new() });
        }
        let mut sorted_bytes = block_bytes.clone();
        sorted_bytes.sort_unstable_by(|a, b| b.cmp(a));
        let keeps_all = block_bytes.iter().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes)) <= memory_bytes;
        let open = Mutex::new(Open::default());
        let cache = Mutex::new(Cache::default());
        let mut sharded = Sharded {
            name,
            objects,
            schema,
            columns,
            shards,
            open,
            block_rows,
            starts,
            shard_blocks,
            block_bytes,
            sorted_bytes,
            memory_bytes,
            keeps_all,
            request_bytes,
            verified: verify.then(Mutex::default),
            cache,
            unpacking: Mutex::default(),
            unpacked: Condvar::new(),
        };
        for at in 0..sharded.shards.len() {
            if let Some(reader) = sharded.shards[at].reader.take().filter(|_| !verify) {
                sharded.keep_open(at, reader);
            }
        }
        Ok(sharded)
    }

    fn keep_open(&self, shard: usize, reader: Arc<dyn ShardReader>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.order.len() >= OPEN_MAX
            && let Some(first) = open.order.pop_front()
        {
            open.readers.remove(&first);
        }
        if open.readers.insert(shard, reader).is_none() {
            open.order.push_back(shard);
        }
    }

    fn reader(&self, shard: usize) -> Result<Arc<dyn ShardReader>, DataError> {
        if let Some(reader) = self.open.lock().unwrap_or_else(PoisonError::into_inner).readers.get(&shard) {
            return Ok(reader.clone());
        }
        let Shard { facts, mds, blocks, .. } = &self.shards[shard];
        if let Some(verified) = &self.verified {
            let verified = || verified.lock().unwrap_or_else(PoisonError::into_inner);
            if !verified().contains(&shard) {
                verify_shard(&self.objects, facts)?;
                verified().insert(shard);
            }
        }
        let options = ReadOptions {
            memory_bytes: self.memory_bytes,
            schema: Some(self.schema.clone()),
            blocks: facts.blocks.clone(),
            request_bytes: self.request_bytes,
        };
        let reader = open_shard_known(&self.objects, facts, mds.as_ref(), &options)?;
        if reader.blocks() != blocks {
            let reason = format!(
                "holds {} rows in {} blocks; {} in {} were expected: it was changed",
                reader.rows(),
                reader.blocks().len(),
                facts.samples,
                blocks.len()
            );
            return Err(DataError::file(self.objects.name(&facts.key).as_ref(), reason));
        }
        self.keep_open(shard, reader.clone());
        Ok(reader)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shard_of(&self, block: usize) -> usize {
        self.shard_blocks.partition_point(|first| *first <= block) - 1
    }

    /// The block in memory, or a place to decode it to; `None` where reading its rows alone is cheaper, which takes
    /// `alone` bytes.
    fn kept(&self, block: usize, alone: u64) -> Option<Arc<Block>> {
        let mut cache = self.cache();
        cache.clock += 1;
        let now = cache.clock;
        if let Some(kept) = cache.kept.get_mut(&block) {
            kept.last_read = now;
            return Some(kept.block.clone());
        }
        let bytes = self.block_bytes[block];
        let spent = cache.spent.entry(block).or_default();
        if spent.saturating_add(alone) < bytes.saturating_add(self.request_bytes) {
            *spent += alone;
            return None;
        }
        cache.spent.remove(&block);
        while cache.kept_bytes + bytes > self.memory_bytes {
            // Letting go of what a thread holds would free nothing.
            let oldest = cache.kept.iter().min_by_key(|(_, k)| (Arc::strong_count(&k.block) > 1, k.last_read));
            let oldest = oldest.map(|(block, _)| *block);
            let Some(kept) = oldest.and_then(|block| cache.kept.remove(&block)) else { break };
            cache.kept_bytes -= kept.bytes;
        }
        let made = Arc::new(Block::default());
        cache.kept_bytes += bytes;
        cache.kept.insert(block, Kept { block: made.clone(), bytes, last_read: now });
        Some(made)
    }

    /// Decodes a block unless another thread did.
    fn fill(&self, index: usize, block: &Block) -> Result<(), DataError> {
        let _one = block.decoding.lock().unwrap_or_else(PoisonError::into_inner);
        if block.columns.get().is_some() {
            return Ok(());
        }
        let shard = self.shard_of(index);
        let first = self.starts[index] - self.starts[self.shard_blocks[shard]];
        let rows: Vec<u64> = (first..first + self.block_rows[index]).collect();
        let turn = self.turn(index);
        let read = self.reader(shard).and_then(|reader| reader.read(&self.columns, &rows));
        drop(turn);
        let columns = read.inspect_err(|_| {
            let mut cache = self.cache();
            if let Some(kept) = cache.kept.remove(&index) {
                cache.kept_bytes -= kept.bytes;
            }
        })?;
        let columns: Vec<Cells> = columns.into_iter().map(Cells::compact).collect();
        let bytes = columns.iter().map(Cells::memory_bytes).sum();
        let mut cache = self.cache();
        if let Some(kept) = cache.kept.get_mut(&index) {
            let before = std::mem::replace(&mut kept.bytes, bytes);
            cache.kept_bytes = cache.kept_bytes - before + bytes;
        }
        block.columns.set(columns).ok();
        Ok(())
    }

    /// A place among those that decode a block, once there is room for one: what all decode at the same time takes a quarter
    /// of the memory, unless two blocks are more.
    fn turn(&self, block: usize) -> Turn<'_> {
        let bytes = self.block_bytes[block].saturating_mul(2);
        let is_full = |now: &mut Unpacking| {
            now.blocks >= UNPACKED_TOGETHER && now.bytes.saturating_add(bytes) > self.memory_bytes / 4
        };
        let now = self.unpacking.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = self.unpacked.wait_while(now, is_full).unwrap_or_else(PoisonError::into_inner);
        (now.blocks, now.bytes) = (now.blocks + 1, now.bytes.saturating_add(bytes));
        Turn { source: self, bytes }
    }

    /// Bytes that reading some rows of a block alone counts as; all there are where they cannot be.
    fn alone_bytes(&self, block: usize, rows: u64) -> Result<u64, DataError> {
        if self.block_bytes[block] <= self.request_bytes || self.cache().kept.contains_key(&block) {
            return Ok(u64::MAX);
        }
        let shard = self.shard_of(block);
        let row_bytes = self.reader(shard)?.row_bytes(block - self.shard_blocks[shard], &self.columns);
        let alone = |row_bytes: u64| rows.saturating_mul(row_bytes.saturating_add(self.request_bytes));
        Ok(row_bytes.map_or(u64::MAX, alone))
    }
}

impl Source for Sharded {
    fn block_rows(&self) -> &[u64] {
        &self.block_rows
    }

    fn resident_bytes(&self, blocks: u64) -> u64 {
        let blocks = usize::try_from(blocks).unwrap_or(usize::MAX);
        self.sorted_bytes.iter().take(blocks).fold(0, |sum, b| sum.saturating_add(*b))
    }

    fn bounds(&self, column: usize, row: u64) -> Option<(f64, f64)> {
        let block = self.starts.partition_point(|start| *start <= row).checked_sub(1)?;
        let shard = self.shard_of(block.min(self.block_rows.len().checked_sub(1)?));
        // Why it cannot be opened is said when it is read.
        let reader = self.reader(shard).ok()?;
        reader.bounds(*self.columns.get(column)?, block - self.shard_blocks[shard])
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let end = self.starts[self.starts.len() - 1];
        if let Some(row) = rows.iter().find(|row| **row >= end) {
            return Err(DataError::file(&self.name, format!("has no row {row}, only {end}")));
        }
        // Where each row is: its block, and the row in it.
        let mut counts: HashMap<usize, u64> = HashMap::new();
        let mut places = Vec::with_capacity(rows.len());
        let mut last = 0;
        for row in rows {
            if !(self.starts[last]..self.starts[last + 1]).contains(row) {
                last = self.starts.partition_point(|start| start <= row) - 1;
            }
            *counts.entry(last).or_default() += 1;
            places.push((last, row - self.starts[last]));
        }
        let mut blocks: Vec<(usize, u64)> = counts.into_iter().collect();
        blocks.sort_unstable();

        // Blocks are held until the cells are copied, so that another thread's reading cannot take them away.
        let mut held: HashMap<usize, usize> = HashMap::new();
        let mut sources: Vec<Arc<Block>> = Vec::new();
        let mut alone: Vec<usize> = Vec::new();
        for (block, count) in blocks {
            match self.kept(block, self.alone_bytes(block, count)?) {
                Some(kept) => {
                    self.fill(block, &kept)?;
                    held.insert(block, sources.len());
                    sources.push(kept);
                }
                None => alone.push(block),
            }
        }
        let mut picks: Vec<(u32, u32)> = vec![(0, 0); rows.len()];
        let mut parts: Vec<Vec<Cells>> = Vec::new();
        if !alone.is_empty() {
            let mut by_shard: HashMap<usize, (Vec<u64>, Vec<usize>)> = HashMap::new();
            for (at, (block, row)) in places.iter().enumerate() {
                if !held.contains_key(block) {
                    let shard = self.shard_of(*block);
                    let (shard_rows, asked) = by_shard.entry(shard).or_default();
                    shard_rows.push(self.starts[*block] + row - self.starts[self.shard_blocks[shard]]);
                    asked.push(at);
                }
            }
            let mut by_shard: Vec<_> = by_shard.into_iter().collect();
            by_shard.sort_unstable_by_key(|(shard, _)| *shard);
            for (shard, (shard_rows, asked)) in by_shard {
                let wanted: Vec<usize> = columns.iter().map(|column| self.columns[*column]).collect();
                let part = (sources.len() + parts.len()) as u32;
                parts.push(self.reader(shard)?.read(&wanted, &shard_rows)?);
                asked.into_iter().enumerate().for_each(|(row, at)| picks[at] = (part, row as u32));
            }
        }
        for (at, (block, row)) in places.iter().enumerate() {
            if let Some(source) = held.get(block) {
                picks[at] = (*source as u32, *row as u32);
            }
        }
        let mut out = Vec::with_capacity(columns.len());
        for (at, column) in columns.iter().enumerate() {
            let kept = sources.iter().filter_map(|block| block.columns.get().and_then(|c| c.get(*column)));
            let cells: Vec<&Cells> = kept.chain(parts.iter().map(|part| &part[at])).collect();
            let cells = collect(&cells, &picks).map_err(|reason| DataError::Sample {
                sample: rows.first().map_or_else(String::new, |row| self.row_name(*row)),
                column: self.schema.columns[self.columns[*column]].name.clone(),
                reason,
            })?;
            // A block that is let go of is free only when no cell points into it.
            out.push(if self.keeps_all || sources.is_empty() { cells } else { cells.compact() });
        }
        Ok(out)
    }

    fn foresee(&self, uses: &mut dyn Iterator<Item = (usize, Range<u64>)>) {
        let named = |(block, steps)| (self.shards[self.shard_of(block)].facts.key.as_str(), steps);
        self.objects.foresee(&mut uses.map(named));
    }

    fn advance(&self, step: u64) {
        self.objects.advance(step);
    }

    fn row_name(&self, row: u64) -> String {
        let block = self.starts.partition_point(|start| *start <= row).saturating_sub(1);
        if block >= self.block_rows.len() {
            return format!("{} row {row}", self.name.display());
        }
        let shard = self.shard_of(block);
        let in_shard = row - self.starts[self.shard_blocks[shard]];
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        match open.readers.get(&shard) {
            Some(reader) => reader.place(in_shard),
            None => format!("{} row {in_shard}", self.objects.name(&self.shards[shard].facts.key)),
        }
    }
}

/// The cells at (part, row in it).
fn collect(parts: &[&Cells], picks: &[(u32, u32)]) -> Result<Cells, String> {
    let pick = |(part, row): &(u32, u32)| (parts.get(*part as usize), *row as usize);
    match parts.first() {
        None if picks.is_empty() => Ok(Cells::Bytes(Vec::new())),
        None => Err("is of no kind".into()),
        Some(Cells::Bytes(_)) => {
            let mut cells = Vec::with_capacity(picks.len());
            for at in picks {
                let (Some(Cells::Bytes(part)), row) = pick(at) else { return Err("differs between shards".into()) };
                cells.push(part[row].clone());
            }
            Ok(Cells::Bytes(cells))
        }
        Some(Cells::Lists(_)) => {
            let mut cells = Vec::with_capacity(picks.len());
            for at in picks {
                let (Some(Cells::Lists(part)), row) = pick(at) else { return Err("differs between shards".into()) };
                cells.push(part[row].clone());
            }
            Ok(Cells::Lists(cells))
        }
        Some(Cells::Numbers(first)) => {
            let mut elements = Vec::with_capacity(parts.len());
            for part in parts {
                match part {
                    Cells::Numbers(t) if t.dtype() == first.dtype() && t.shape()[1..] == first.shape()[1..] => {
                        elements.push(t.bytes());
                    }
                    _ => return Err("differs between shards".into()),
                }
            }
            numbers(first.dtype(), &first.shape()[1..], &elements, picks).map(Cells::Numbers)
        }
    }
}

/// Rows of tensors of one type and row shape, gathered.
fn numbers(dtype: DType, row_shape: &[usize], parts: &[&[u8]], picks: &[(u32, u32)]) -> Result<Tensor, String> {
    let shape = [&[picks.len()], row_shape].concat();
    let mut out = Tensor::zeros(dtype, &shape).map_err(|e| e.to_string())?;
    let row_bytes = row_shape.iter().product::<usize>() * dtype.size_in_memory();
    let to = out.bytes_mut();
    // Single numbers are most of what is gathered; a copy of a length known to the compiler is one instruction.
    match row_bytes {
        0 => {}
        4 => gather_fixed::<4>(parts, to, picks),
        8 => gather_fixed::<8>(parts, to, picks),
        _ => {
            for (to, (part, row)) in to.chunks_exact_mut(row_bytes).zip(picks) {
                to.copy_from_slice(&parts[*part as usize][*row as usize * row_bytes..][..row_bytes]);
            }
        }
    }
    Ok(out)
}

fn gather_fixed<const BYTES: usize>(parts: &[&[u8]], to: &mut [u8], picks: &[(u32, u32)]) {
    let parts: Vec<&[[u8; BYTES]]> = parts.iter().map(|part| part.as_chunks::<BYTES>().0).collect();
    for (to, (part, row)) in to.as_chunks_mut::<BYTES>().0.iter_mut().zip(picks) {
        *to = parts[*part as usize][*row as usize];
    }
}
