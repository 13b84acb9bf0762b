//! A part of a source's rows, as fractions: training and validation data from one file.

use std::ops::Range;

use super::{Cells, Source};
use crate::error::DataError;

/// Some consecutive rows of a source, numbered from 0.
pub(super) struct Part {
    source: Box<dyn Source>,
    first_row: u64,
    /// The blocks of the source that these rows are in.
    blocks: Vec<usize>,
    block_rows: Vec<u64>,
}

impl Part {
    /// The rows from `floor(start * n)` to before `floor(end * n)` of a source of `n`: parts that share a border share no
    /// row and leave none out.
    ///
    /// # Errors
    /// What is wrong with the fractions.
    pub(super) fn new(source: Box<dyn Source>, [start, end]: [f64; 2]) -> Result<Part, String> {
        if !(0.0 <= start && start < end && end <= 1.0) {
            return Err(format!("`rows = [{start}, {end}]` must be two fractions in order, from 0 to 1"));
        }
        let rows: u64 = source.block_rows().iter().sum();
        // Files of more than 2^53 rows do not exist.
        let border = |fraction: f64| (fraction * rows as f64) as u64;
        let (first_row, end_row) = (border(start), border(end));
        if first_row == end_row {
            return Err(format!("`rows = [{start}, {end}]` is none of its {rows} rows"));
        }
        let mut block_first = 0;
        let mut blocks = Vec::new();
        let mut block_rows = Vec::new();
        for (block, rows) in source.block_rows().iter().enumerate() {
            let block_end = block_first + rows;
            let kept = block_end.min(end_row).saturating_sub(block_first.max(first_row));
            if kept > 0 {
                block_rows.push(kept);
                blocks.push(block);
            }
            block_first = block_end;
        }
        Ok(Part { source, first_row, blocks, block_rows })
    }
}

impl Source for Part {
    fn block_rows(&self) -> &[u64] {
        &self.block_rows
    }

    fn resident_bytes(&self, blocks: u64) -> u64 {
        self.source.resident_bytes(blocks.min(self.block_rows.len() as u64))
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let rows: Vec<u64> = rows.iter().map(|row| self.first_row + row).collect();
        self.source.read(columns, &rows)
    }

    fn bounds(&self, column: usize, row: u64) -> Option<(f64, f64)> {
        self.source.bounds(column, self.first_row + row)
    }

    fn foresee(&self, uses: &mut dyn Iterator<Item = (usize, Range<u64>)>) {
        self.source.foresee(&mut uses.map(|(block, steps)| (self.blocks[block], steps)));
    }

    fn advance(&self, step: u64) {
        self.source.advance(step);
    }

    fn row_name(&self, row: u64) -> String {
        self.source.row_name(self.first_row + row)
    }
}
