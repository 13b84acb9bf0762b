//! A source whose columns are all in memory.

use crate::error::DataError;
use crate::source::{Cells, Source, gather};

pub(super) struct Table {
    columns: Vec<Cells>,
    rows: [u64; 1],
    /// Names a row.
    name: Box<dyn Fn(u64) -> String + Send + Sync>,
}

impl Table {
    pub(super) fn new(columns: Vec<Cells>, rows: u64, name: impl Fn(u64) -> String + Send + Sync + 'static) -> Table {
        Table { columns, rows: [rows], name: Box::new(name) }
    }
}

impl Source for Table {
    fn block_rows(&self) -> &[u64] {
        &self.rows
    }

    fn resident_bytes(&self, _: u64) -> u64 {
        self.columns.iter().map(cells_bytes).sum()
    }

    fn read(&self, column: usize, rows: &[u64]) -> Result<Cells, DataError> {
        let rows = rows.iter().map(|row| *row as usize);
        Ok(match &self.columns[column] {
            Cells::Bytes(cells) => Cells::Bytes(rows.map(|row| cells[row].clone()).collect()),
            Cells::Numbers(tensor) => Cells::Numbers(gather(tensor, rows)),
        })
    }

    fn row_name(&self, row: u64) -> String {
        (self.name)(row)
    }
}

/// Bytes that the cells of a column take.
pub(super) fn cells_bytes(cells: &Cells) -> u64 {
    match cells {
        Cells::Bytes(cells) => cells.iter().map(|c| (c.len() + size_of::<bytes::Bytes>()) as u64).sum(),
        Cells::Numbers(tensor) => tensor.byte_len() as u64,
    }
}
