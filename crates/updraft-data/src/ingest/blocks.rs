//! The rows of all inputs by number, read in blocks that neighbours share.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::Input;
use crate::error::DataError;
use crate::rows::Cells;

/// The cells of a block, or why it cannot be read; whoever comes while it is being read waits for it.
type Slot = Arc<OnceLock<Result<Vec<Cells>, String>>>;

/// Blocks of all inputs, the last ones used kept.
pub(super) struct Blocks {
    inputs: Arc<[Input]>,
    columns: Vec<usize>,
    /// By number of the first row.
    blocks: Vec<Block>,
    total_rows: u64,
    capacity: usize,
    kept: Mutex<VecDeque<(usize, Slot)>>,
}

struct Block {
    /// The number of its first row among all.
    start: u64,
    rows: u64,
    input: usize,
    /// Its first row in the shard.
    first: u64,
    bytes: u64,
}

impl Blocks {
    pub(super) fn new(inputs: Arc<[Input]>, columns: &[usize]) -> Blocks {
        let (mut blocks, mut start) = (Vec::new(), 0);
        for (input, Input { reader, .. }) in inputs.iter().enumerate() {
            let mut first = 0;
            for (at, rows) in reader.blocks().iter().copied().enumerate().filter(|(_, rows)| *rows > 0) {
                let bytes = reader.block_bytes(at, columns);
                blocks.push(Block { start, rows, input, first, bytes });
                (start, first) = (start + rows, first + rows);
            }
        }
        let kept = Mutex::new(VecDeque::new());
        Blocks { inputs, columns: columns.to_vec(), blocks, total_rows: start, capacity: 1, kept }
    }

    /// How many blocks are kept at a time.
    pub(super) fn keep(&mut self, capacity: usize) {
        self.capacity = capacity.clamp(1, self.blocks.len().max(1));
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.iter().map(|block| block.rows)
    }

    pub(super) fn total_rows(&self) -> u64 {
        self.total_rows
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.bytes).sum()
    }

    /// Memory of the blocks that are kept, the largest ones at worst.
    pub(super) fn kept_bytes(&self) -> u64 {
        let mut bytes: Vec<u64> = self.blocks.iter().map(|block| block.bytes).collect();
        bytes.sort_unstable();
        bytes.iter().rev().take(self.capacity).sum()
    }

    /// Where a row lies, for messages.
    pub(super) fn place(&self, number: u64) -> String {
        match self.blocks.get(self.block_of(number)) {
            Some(block) => self.inputs[block.input].reader.place(block.first + number - block.start),
            None => format!("row {number}"),
        }
    }

    fn block_of(&self, number: u64) -> usize {
        self.blocks.partition_point(|block| block.start <= number).saturating_sub(1)
    }

    /// The cells of the columns at rows of any blocks, in the order asked for.
    pub(super) fn gather(&self, numbers: &[u64]) -> Result<Vec<Cells>, DataError> {
        // Rows by block, so that each block is gone to once; then back into the order asked for.
        let mut wanted: Vec<(usize, usize)> =
            numbers.iter().enumerate().map(|(place, number)| (self.block_of(*number), place)).collect();
        wanted.sort_unstable();
        let mut parts: Vec<Vec<Cells>> = Vec::new();
        for run in wanted.chunk_by(|a, b| a.0 == b.0) {
            let (at, block) = (run[0].0, &self.blocks[run[0].0]);
            let slot = self.slot(at);
            let read = slot.get_or_init(|| {
                let rows: Vec<u64> = (block.first..block.first + block.rows).collect();
                self.inputs[block.input].reader.read(&self.columns, &rows).map_err(|e| e.to_string())
            });
            let cells = match read {
                Ok(cells) => cells,
                // The error itself is asked for again: it may have been the store's, and it has its cause.
                Err(_) => {
                    let rows: Vec<u64> = (block.first..block.first + block.rows).collect();
                    &self.inputs[block.input].reader.read(&self.columns, &rows)?
                }
            };
            let rows = |run: &[(usize, usize)]| -> Vec<usize> {
                run.iter().map(|(_, place)| (numbers[*place] - block.start) as usize).collect()
            };
            parts.push(cells.iter().map(|cells| cells.gather(rows(run).into_iter())).collect());
        }
        let mut back = vec![0; numbers.len()];
        for (at, (_, place)) in wanted.iter().enumerate() {
            back[*place] = at;
        }
        let mut columns = Vec::with_capacity(self.columns.len());
        for column in 0..self.columns.len() {
            let of: Vec<&Cells> = parts.iter().map(|part| &part[column]).collect();
            let joined = Cells::concat(&of).map_err(DataError::Loader)?;
            columns.push(joined.gather(back.iter().copied()));
        }
        Ok(columns)
    }

    /// The place for the cells of a block, among the last ones used.
    fn slot(&self, at: usize) -> Slot {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match kept.iter().position(|(block, _)| *block == at).and_then(|place| kept.remove(place)) {
            Some((_, slot)) => slot,
            None => Slot::default(),
        };
        kept.push_back((at, slot.clone()));
        while kept.len() > self.capacity {
            kept.pop_front();
        }
        slot
    }
}
