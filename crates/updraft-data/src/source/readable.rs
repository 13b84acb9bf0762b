//! The columns of a shard that can be read, where a file has others besides.

use std::ops::Range;
use std::sync::Arc;

use crate::error::DataError;
use crate::rows::{Cells, PartialCells};
use crate::schema::Schema;
use crate::source::shard::{Block, ShardReader};

/// A shard as if it had only some of its columns.
pub(super) struct Readable {
    reader: Arc<dyn ShardReader>,
    schema: Arc<Schema>,
    /// Places in the shard's own schema.
    columns: Arc<[usize]>,
}

impl Readable {
    pub(super) fn new(reader: Arc<dyn ShardReader>, schema: Arc<Schema>, columns: Arc<[usize]>) -> Readable {
        Readable { reader, schema, columns }
    }

    fn own(&self, columns: &[usize]) -> Vec<usize> {
        columns.iter().map(|column| self.columns[*column]).collect()
    }
}

impl ShardReader for Readable {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn rows(&self) -> u64 {
        self.reader.rows()
    }

    fn blocks(&self) -> &[u64] {
        self.reader.blocks()
    }

    fn block_list(&self) -> Vec<Block> {
        self.reader.block_list()
    }

    fn block_bytes(&self, block: usize, columns: &[usize]) -> u64 {
        self.reader.block_bytes(block, &self.own(columns))
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        self.reader.read(&self.own(columns), rows)
    }

    fn read_partial(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<PartialCells>, DataError> {
        self.reader.read_partial(&self.own(columns), rows)
    }

    fn decoded_together(&self, columns: &[usize], row: u64) -> Range<u64> {
        self.reader.decoded_together(&self.own(columns), row)
    }

    fn place(&self, row: u64) -> String {
        self.reader.place(row)
    }

    fn bounds(&self, column: usize, block: usize) -> Option<(f64, f64)> {
        self.reader.bounds(self.columns[column], block)
    }

    fn row_bytes(&self, block: usize, columns: &[usize]) -> Option<u64> {
        self.reader.row_bytes(block, &self.own(columns))
    }
}
