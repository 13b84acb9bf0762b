//! What fits in the memory that a dataset may take: a quarter is for batches in the making, the rest for the source and
//! decoded pictures.

use super::{Dataset, PlannedTensor};
use crate::error::DataError;
use crate::order::Shuffle;

impl Dataset {
    /// Memory for batches in the making.
    pub(crate) fn queue_bytes(&self) -> u64 {
        queue_share(self.memory_bytes)
    }

    /// Memory for what is read together of one batch: a few threads read at a time.
    pub(super) fn portion_bytes(&self) -> u64 {
        self.queue_bytes() / 4
    }

    /// What is read together of a batch of pictures or documents, as far as the largest so far tells.
    pub(crate) fn fetched_bytes(&self, samples: usize) -> u64 {
        let bytes = |tensor: &PlannedTensor| {
            let cell_bytes = tensor.cell_bytes_max();
            cell_bytes.saturating_mul(tensor.cells_in(self.portion_bytes(), samples) as u64)
        };
        self.tensors.iter().map(bytes).max().unwrap_or(0)
    }

    /// Refuses a list of the rows of an epoch that takes more than a quarter of the memory.
    pub(crate) fn check_list(&self, needed_bytes: u64, samples: u64) -> Result<(), DataError> {
        let (needed_bytes, allowed_bytes) = (needed_bytes.saturating_mul(4), self.memory_bytes.max(1 << 22));
        if needed_bytes <= allowed_bytes {
            return Ok(());
        }
        let what =
            format!("a list of the rows of the first {samples} of {} samples, in a quarter of the memory,", self.len());
        let advice = "raise it, or take a smaller part of the `rows`";
        Err(DataError::Memory { path: self.path.clone(), what, needed_bytes, allowed_bytes, advice })
    }

    /// Refuses lanes and windows for which the same block would be read again and again.
    pub(crate) fn check_lanes(&self, lanes: u64, shuffle: Shuffle) -> Result<(), DataError> {
        // At the border of two windows both are read from; unshuffled, a lane reads one block at a time.
        let blocks = match shuffle {
            Shuffle::None => lanes.saturating_mul(2),
            Shuffle::Global => u64::MAX,
            Shuffle::Blocks(n) => n.max(1).saturating_mul(2).saturating_mul(lanes),
        };
        let needed_bytes = self.source.resident_bytes(blocks);
        if self.source.block_rows().len() == 1 || needed_bytes <= self.memory_bytes {
            return Ok(());
        }
        let what = format!("reading {lanes} lanes, two windows each,");
        let advice = "raise it, take fewer lanes, or set `shuffle = { blocks = N }` with a smaller N";
        Err(DataError::Memory { path: self.path.clone(), what, needed_bytes, allowed_bytes: self.memory_bytes, advice })
    }

    /// Refuses an order for which the same block would be read again and again.
    pub(crate) fn check_shuffle(&self, shuffle: Shuffle) -> Result<(), DataError> {
        let (blocks, what) = match shuffle {
            Shuffle::None => return Ok(()),
            Shuffle::Global => (u64::MAX, "a global shuffle".to_owned()),
            // At the border of two windows both are read from.
            Shuffle::Blocks(n) => (n.saturating_mul(2), format!("a shuffle over {n} blocks, two windows at a time,")),
        };
        let needed_bytes = self.source.resident_bytes(blocks);
        if self.source.block_rows().len() == 1 || needed_bytes <= self.memory_bytes {
            return Ok(());
        }
        let advice = "raise it, or set `shuffle = { blocks = N }` with a smaller N";
        let path = self.path.clone();
        Err(DataError::Memory { path, what, needed_bytes, allowed_bytes: self.memory_bytes, advice })
    }
}

/// The part of the memory that batches in the making may take. What is given less than 1 MiB makes one at a time.
pub(super) fn queue_share(memory_bytes: u64) -> u64 {
    if memory_bytes < 1 << 20 { 0 } else { memory_bytes / 4 }
}
