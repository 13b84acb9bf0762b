//! A source whose columns are all in memory.

use crate::error::DataError;
use crate::source::{Cells, Source};

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
        self.columns.iter().map(Cells::memory_bytes).sum()
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let rows = || rows.iter().map(|row| *row as usize);
        Ok(columns.iter().map(|column| self.columns[*column].gather(rows())).collect())
    }

    fn row_name(&self, row: u64) -> String {
        (self.name)(row)
    }
}
