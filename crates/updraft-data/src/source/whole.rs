//! Formats that are read as a whole: CSV, JSON Lines, and NumPy's arrays. Such a shard is one block.

use std::sync::Arc;

use bytes::Bytes;
use updraft_graph::{DType, Tensor};

use crate::error::DataError;
use crate::npy;
use crate::rows::Cells;
use crate::schema::{Column, Kind, Schema};
use crate::source::input::{Compression, Content, Input};
use crate::source::shard::{ReadOptions, ShardFormat, ShardReader};
use crate::source::{csv, jsonl};

/// A shard of one of these formats.
pub(crate) struct Whole {
    content: Content,
    format: ShardFormat,
    schema: Arc<Schema>,
    blocks: Vec<u64>,
    memory_bytes: u64,
}

/// All cells of a shard. A column that cannot be read is an error only for those who want it.
pub(crate) struct Table {
    pub rows: u64,
    pub columns: Vec<TableColumn>,
    /// What a row of the file is called, and the number of each, where they are not those of the rows.
    pub lines: Vec<u64>,
}

pub(crate) struct TableColumn {
    pub name: String,
    pub kind: Kind,
    /// The cells, or the row that is wrong and why.
    pub cells: Result<Cells, (u64, String)>,
}

impl Whole {
    pub(crate) fn open(
        input: Input,
        key: &str,
        format: ShardFormat,
        options: &ReadOptions,
    ) -> Result<Whole, DataError> {
        let compression = if format == ShardFormat::JsonLines { Compression::of_key(key) } else { None };
        let memory_bytes = options.memory_bytes;
        let content = Content::new(input, compression, memory_bytes);
        let mut whole =
            Whole { content, format, schema: Arc::new(Schema { columns: vec![] }), blocks: vec![], memory_bytes };
        // What a manifest tells need not be read twice.
        if let (Some(schema), [block]) = (&options.schema, options.blocks.as_slice()) {
            (whole.schema, whole.blocks) = (schema.clone(), vec![block.rows]);
            return Ok(whole);
        }
        let table = whole.table(options.schema.as_deref())?;
        let columns = table.columns.iter().map(|c| Column { name: c.name.clone(), kind: c.kind.clone() }).collect();
        let found = Schema::new(columns).map_err(|r| whole.content.input.error(r))?;
        if let Some(difference) = options.schema.as_ref().and_then(|wanted| wanted.difference(&found)) {
            return Err(whole.content.input.error(difference));
        }
        whole.schema = options.schema.clone().unwrap_or_else(|| Arc::new(found));
        whole.blocks = vec![table.rows];
        Ok(whole)
    }

    fn table(&self, wanted: Option<&Schema>) -> Result<Table, DataError> {
        if self.content.input.len() > self.memory_bytes {
            // Names size and advice.
            self.content.input.whole(self.memory_bytes)?;
        }
        let bytes: Bytes = self.content.read(0, None)?;
        let table = match self.format {
            ShardFormat::Csv => csv::table(&bytes, wanted),
            ShardFormat::JsonLines => jsonl::table(&bytes, wanted, self.memory_bytes),
            ShardFormat::Npy => {
                npy::parse(bytes.as_ref(), self.memory_bytes).and_then(|a| arrays(vec![("array".into(), a)]))
            }
            _ => npy::unzip(std::io::Cursor::new(bytes), self.memory_bytes).and_then(arrays),
        };
        table.map_err(|reason| self.content.input.error(reason))
    }
}

/// Arrays as columns.
fn arrays(arrays: Vec<(String, Tensor)>) -> Result<Table, String> {
    let mut rows = None;
    let mut columns = Vec::with_capacity(arrays.len());
    for (name, tensor) in arrays {
        let Some((count, shape)) = tensor.shape().split_first() else {
            return Err(format!("array `{name}` has no dimension to count samples along"));
        };
        if *rows.get_or_insert(*count) != *count {
            return Err(format!("array `{name}` holds {count} samples, and the one before {rows:?}"));
        }
        let kind = Kind::Number { dtype: tensor.dtype(), shape: shape.to_vec() };
        columns.push(TableColumn { name, kind, cells: Ok(Cells::Numbers(tensor)) });
    }
    Ok(Table { rows: rows.unwrap_or(0) as u64, columns, lines: Vec::new() })
}

impl ShardReader for Whole {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn rows(&self) -> u64 {
        self.blocks.iter().sum()
    }

    fn blocks(&self) -> &[u64] {
        &self.blocks
    }

    fn block_bytes(&self, _: usize, columns: &[usize]) -> u64 {
        let fixed = |column: &usize| self.schema.columns.get(*column).and_then(|c| c.kind.row_bytes());
        match columns.iter().map(fixed).sum::<Option<usize>>() {
            Some(bytes) => self.rows().saturating_mul(bytes as u64),
            None => self.content.input.len().saturating_add(32 * self.rows()),
        }
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let table = self.table(Some(&self.schema))?;
        if table.rows != self.rows() {
            let reason = format!("has {} rows, and had {} when the dataset was opened", table.rows, self.rows());
            return Err(self.content.input.error(reason));
        }
        if let Some(row) = rows.iter().find(|row| **row >= table.rows) {
            return Err(self.content.input.error(format!("has no row {row}, only {}", table.rows)));
        }
        let Table { columns: mut found, lines, .. } = table;
        let mut out = Vec::with_capacity(columns.len());
        for column in columns {
            let Some(Column { name, .. }) = self.schema.columns.get(*column) else {
                return Err(self.content.input.error(format!("has no column {column}")));
            };
            let at = found.iter().position(|c| c.name == *name);
            let cells = at.map(|at| std::mem::replace(&mut found[at].cells, Err((0, "is asked for twice".into()))));
            let cells = cells.unwrap_or_else(|| Err((0, "is missing".into()))).map_err(|(row, reason)| {
                let sample = match lines.get(row as usize) {
                    Some(line) => format!("{} line {line}", self.content.input.name()),
                    None => self.place(row),
                };
                DataError::Sample { sample, column: name.clone(), reason }
            })?;
            let all = rows.len() as u64 == self.rows() && rows.iter().enumerate().all(|(at, row)| at as u64 == *row);
            out.push(if all { cells } else { cells.gather(rows.iter().map(|row| *row as usize)) });
        }
        Ok(out)
    }

    fn place(&self, row: u64) -> String {
        format!("{} row {row}", self.content.input.name())
    }
}

/// Text cells as a column: whole numbers, numbers, or text. With a wanted kind, that or an error.
pub(crate) fn type_cells(cells: Vec<Bytes>, wanted: Option<&Kind>) -> (Kind, Result<Cells, (u64, String)>) {
    fn all<T: std::str::FromStr>(cells: &[Bytes]) -> Option<Vec<T>> {
        cells.iter().map(|c| std::str::from_utf8(c).ok()?.trim().parse().ok()).collect()
    }
    let (integer, float) = (Kind::scalar(DType::I64), Kind::scalar(DType::F64));
    let may_be = |kind: &Kind| wanted.is_none_or(|wanted| wanted == kind);
    let empty = cells.iter().position(|c| c.is_empty());
    if let Some(blank) = cells.iter().position(|c| c.trim_ascii().is_empty()) {
        let filled = || cells.iter().filter(|c| !c.trim_ascii().is_empty()).cloned().collect();
        let kind = wanted.cloned().unwrap_or_else(|| type_cells(filled(), None).0);
        // Blanks are text among text, and no number among numbers.
        if let Some(row) = if kind == Kind::Text { empty } else { Some(blank) } {
            return (kind, Err((row as u64, "the cell is empty".into())));
        }
    }
    if may_be(&integer)
        && let Some(integers) = all::<i64>(&cells)
    {
        return (integer, Ok(Cells::Numbers(Tensor::vector(&integers))));
    }
    if may_be(&float)
        && let Some(floats) = all::<f64>(&cells)
    {
        if let Some(row) = floats.iter().position(|v| !v.is_finite()) {
            let cell = String::from_utf8_lossy(&cells[row]).into_owned();
            return (float, Err((row as u64, format!("`{cell}` is not a finite number"))));
        }
        return (float, Ok(Cells::Numbers(Tensor::vector(&floats))));
    }
    let text = cells.iter().map(|c| crate::source::cells::check_text(c)).position(|r| r.is_err());
    match (wanted, text) {
        (None | Some(Kind::Text), None) => (Kind::Text, Ok(Cells::Bytes(cells))),
        (None | Some(Kind::Text), Some(row)) => (Kind::Text, Err((row as u64, "is not UTF-8".into()))),
        (Some(kind), _) => {
            let fits = |cell: &Bytes| match kind {
                kind if *kind == integer => all::<i64>(std::slice::from_ref(cell)).is_some(),
                _ => all::<f64>(std::slice::from_ref(cell)).is_some(),
            };
            let row = cells.iter().position(|cell| !fits(cell)).unwrap_or(0);
            let cell = cells.get(row).map(|c| String::from_utf8_lossy(c).into_owned()).unwrap_or_default();
            (kind.clone(), Err((row as u64, format!("`{cell:.40}` is not {kind}"))))
        }
    }
}
