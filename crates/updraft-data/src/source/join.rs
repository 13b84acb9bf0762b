//! Several sources one after the other, as if they were one.

use std::ops::Range;

use super::{Cells, Source};
use crate::error::DataError;

/// Sources with the same columns, their rows numbered on from one to the next.
pub(crate) struct Join {
    sources: Vec<Box<dyn Source>>,
    /// First row of each source, and the number of rows at the end.
    starts: Vec<u64>,
    block_rows: Vec<u64>,
}

impl Join {
    pub(crate) fn new(sources: Vec<Box<dyn Source>>) -> Join {
        let mut starts = vec![0];
        let mut block_rows = Vec::new();
        for source in &sources {
            let rows: u64 = source.block_rows().iter().sum();
            starts.push(starts.last().copied().unwrap_or(0) + rows);
            block_rows.extend_from_slice(source.block_rows());
        }
        Join { sources, starts, block_rows }
    }

    fn source_of(&self, row: u64) -> usize {
        // Rows past the end are for the last source to refuse.
        self.starts.partition_point(|start| *start <= row).clamp(1, self.sources.len()) - 1
    }
}

impl Source for Join {
    fn block_rows(&self) -> &[u64] {
        &self.block_rows
    }

    fn resident_bytes(&self, blocks: u64) -> u64 {
        // The blocks may all be of any one source.
        let of_each = self.sources.iter().map(|s| s.resident_bytes(blocks));
        of_each.fold(0, |sum: u64, bytes| sum.saturating_add(bytes))
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let owners: Vec<usize> = rows.iter().map(|row| self.source_of(*row)).collect();
        let mut parts: Vec<Vec<Cells>> = vec![Vec::new(); columns.len()];
        // Where each row stands in the parts laid one after the other.
        let mut places = vec![0; rows.len()];
        let mut laid = 0;
        for (number, source) in self.sources.iter().enumerate() {
            let its: Vec<usize> = (0..rows.len()).filter(|i| owners[*i] == number).collect();
            if its.is_empty() {
                continue;
            }
            let own_rows: Vec<u64> = its.iter().map(|i| rows[*i] - self.starts[number]).collect();
            for (part, cells) in parts.iter_mut().zip(source.read(columns, &own_rows)?) {
                part.push(cells);
            }
            for i in its {
                places[i] = laid;
                laid += 1;
            }
        }
        if rows.is_empty() {
            return match self.sources.first() {
                Some(first) => first.read(columns, rows),
                None => Ok(Vec::new()),
            };
        }
        let mut out = Vec::with_capacity(columns.len());
        for part in &parts {
            let joined = Cells::concat(&part.iter().collect::<Vec<_>>())
                .map_err(|reason| DataError::Loader(format!("the sources of a mixture differ: {reason}")))?;
            out.push(joined.gather(places.iter().copied()));
        }
        Ok(out)
    }

    fn bounds(&self, column: usize, row: u64) -> Option<(f64, f64)> {
        let number = self.source_of(row);
        self.sources[number].bounds(column, row - self.starts[number])
    }

    fn foresee(&self, uses: &mut dyn Iterator<Item = (usize, Range<u64>)>) {
        let mut of_sources: Vec<Vec<(usize, Range<u64>)>> = vec![Vec::new(); self.sources.len()];
        let counts: Vec<usize> = self.sources.iter().map(|s| s.block_rows().len()).collect();
        for (mut block, steps) in uses {
            for (count, uses) in counts.iter().zip(&mut of_sources) {
                if block < *count {
                    uses.push((block, steps));
                    break;
                }
                block -= count;
            }
        }
        for (source, uses) in self.sources.iter().zip(of_sources) {
            source.foresee(&mut uses.into_iter());
        }
    }

    fn advance(&self, step: u64) {
        self.sources.iter().for_each(|source| source.advance(step));
    }

    fn row_name(&self, row: u64) -> String {
        let number = self.source_of(row);
        self.sources[number].row_name(row - self.starts[number])
    }
}
