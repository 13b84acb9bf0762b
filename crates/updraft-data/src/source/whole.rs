//! Formats that are read as a whole: CSV, JSON Lines, and NumPy's arrays. Such a shard is one block.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use updraft_graph::{DType, Element, Tensor};

use crate::error::DataError;
use crate::npy;
use crate::rows::{Cells, Gap, PartialCells};
use crate::schema::{Column, Kind, Schema};
use crate::source::cells::check_text;
use crate::source::input::{Compression, Content, Input};
use crate::source::shard::{ReadOptions, ShardFormat, ShardReader};
use crate::source::{csv, jsonl};

/// A shard of one of these formats.
pub(crate) struct Whole {
    content: Content,
    format: ShardFormat,
    /// What is between the columns of text.
    separator: u8,
    schema: Arc<Schema>,
    blocks: Vec<u64>,
    memory_bytes: u64,
}

/// All cells of a shard. What is missing or cannot be read is an error only for those who want it.
pub(crate) struct Table {
    pub rows: u64,
    pub columns: Vec<TableColumn>,
    /// What a row of the file is called, and the number of each, where they are not those of the rows.
    pub lines: Vec<u64>,
}

pub(crate) struct TableColumn {
    pub name: String,
    pub kind: Kind,
    pub cells: PartialCells,
}

impl Whole {
    pub(crate) fn open(
        input: Input,
        key: &str,
        format: ShardFormat,
        options: &ReadOptions,
    ) -> Result<Whole, DataError> {
        let is_text = matches!(format, ShardFormat::JsonLines | ShardFormat::Csv);
        let compression = if is_text { Compression::of_key(key) } else { None };
        let (memory_bytes, separator) = (options.memory_bytes, csv::separator_of(key));
        let content = Content::new(input, compression, memory_bytes);
        let mut whole = Whole {
            content,
            format,
            separator,
            schema: Arc::new(Schema { columns: vec![] }),
            blocks: vec![],
            memory_bytes,
        };
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
            ShardFormat::Csv => csv::table(&bytes, self.separator, wanted),
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
    let mut first: Option<(String, usize)> = None;
    let mut columns = Vec::with_capacity(arrays.len());
    for (name, tensor) in arrays {
        let Some((count, shape)) = tensor.shape().split_first() else {
            return Err(format!("array `{name}` has no dimension to count samples along"));
        };
        let (before, rows) = first.get_or_insert_with(|| (name.clone(), *count));
        if rows != count {
            return Err(format!("array `{name}` holds {count} samples and `{before}` {rows}"));
        }
        let kind = Kind::Number { dtype: tensor.dtype(), shape: shape.to_vec() };
        columns.push(TableColumn { name, kind, cells: Cells::Numbers(tensor).into() });
    }
    Ok(Table { rows: first.map_or(0, |(_, rows)| rows) as u64, columns, lines: Vec::new() })
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
        let Found { columns: found, lines } = self.found(columns, rows)?;
        let mut out = Vec::with_capacity(columns.len());
        for (column, cells) in columns.iter().zip(found) {
            let cells = cells.whole().map_err(|gap| {
                let row = rows.get(gap.row).copied().unwrap_or(0);
                let sample = match lines.get(row as usize) {
                    Some(line) => format!("{} line {line}", self.content.input.name()),
                    None => self.place(row),
                };
                let empty = if self.format == ShardFormat::Csv { EMPTY } else { "has no value" };
                let reason = gap.fault.unwrap_or_else(|| empty.to_owned());
                DataError::Sample { sample, column: self.schema.columns[*column].name.clone(), reason }
            })?;
            out.push(cells);
        }
        Ok(out)
    }

    fn read_partial(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<PartialCells>, DataError> {
        Ok(self.found(columns, rows)?.columns)
    }

    fn decoded_together(&self, _: &[usize], _: u64) -> Range<u64> {
        0..self.rows()
    }

    fn place(&self, row: u64) -> String {
        format!("{} row {row}", self.content.input.name())
    }
}

/// Columns at some rows, and the lines of the file that all of its rows are.
struct Found {
    columns: Vec<PartialCells>,
    lines: Vec<u64>,
}

impl Whole {
    fn found(&self, columns: &[usize], rows: &[u64]) -> Result<Found, DataError> {
        let table = self.table(Some(&self.schema))?;
        if table.rows != self.rows() {
            let reason = format!("has {} rows, and had {} when the dataset was opened", table.rows, self.rows());
            return Err(self.content.input.error(reason));
        }
        if let Some(row) = rows.iter().find(|row| **row >= table.rows) {
            return Err(self.content.input.error(format!("has no row {row}, only {}", table.rows)));
        }
        let Table { columns: mut found, lines, .. } = table;
        let all = rows.len() as u64 == self.rows() && rows.iter().enumerate().all(|(at, row)| at as u64 == *row);
        let places: Vec<usize> = if all { Vec::new() } else { rows.iter().map(|row| *row as usize).collect() };
        let mut out = Vec::with_capacity(columns.len());
        for column in columns {
            let Some(Column { name, kind }) = self.schema.columns.get(*column) else {
                return Err(self.content.input.error(format!("has no column {column}")));
            };
            let refused =
                |reason: String| DataError::Sample { sample: self.content.input.name(), column: name.clone(), reason };
            let at = found.iter().position(|c| c.name == *name).ok_or_else(|| refused("is missing".into()))?;
            let TableColumn { kind: is, cells, .. } = found.swap_remove(at);
            if is != *kind {
                return Err(refused(format!("holds {is}, not {kind}")));
            }
            out.push(if all { cells } else { cells.gather(&places) });
        }
        Ok(Found { columns: out, lines })
    }
}

/// What is said of a text cell that holds nothing.
const EMPTY: &str = "the cell is empty";

/// Text cells as a column: whole numbers, numbers, or text. With a wanted kind, that or the row that is not, and why.
pub(crate) fn type_cells(cells: Vec<Bytes>, wanted: Option<&Kind>) -> (Kind, Result<Cells, (u64, String)>) {
    let (kind, cells) = type_partial(cells, wanted);
    let refused = |gap: Gap| (gap.row as u64, gap.fault.unwrap_or_else(|| EMPTY.to_owned()));
    (kind, cells.whole().map_err(refused))
}

/// The same with a gap for each cell that is empty or of another kind. Without a wanted kind it is that of the cells that
/// are there: the first of whole numbers with a sign, without one, numbers, and text that all of them are.
pub(crate) fn type_partial(cells: Vec<Bytes>, wanted: Option<&Kind>) -> (Kind, PartialCells) {
    fn parsed<T: std::str::FromStr>(cell: &Bytes) -> Option<T> {
        std::str::from_utf8(cell).ok()?.trim().parse().ok()
    }
    fn column<T: std::str::FromStr + Element + Default>(
        cells: &[Bytes],
        refused: impl Fn(&str, Option<T>) -> Option<String>,
    ) -> PartialCells {
        let (mut numbers, mut gaps) = (Vec::with_capacity(cells.len()), Vec::new());
        for (row, cell) in cells.iter().enumerate() {
            let number = parsed::<T>(cell);
            // Blanks are text among text, and no number among numbers.
            if cell.trim_ascii().is_empty() {
                gaps.push(Gap::missing(row));
            } else if let Some(reason) = refused(&String::from_utf8_lossy(cell), number) {
                gaps.push(Gap::fault(row, reason));
            }
            numbers.push(number.unwrap_or_default());
        }
        PartialCells::new(Cells::Numbers(Tensor::vector(&numbers)), gaps)
    }
    let kinds = [DType::I64, DType::U64, DType::F64].map(Kind::scalar);
    let [integer, unsigned, float] = &kinds;
    // Other kinds are told as if none were wanted, which whoever wants them compares.
    let wanted = wanted.filter(|kind| **kind == Kind::Text || kinds.contains(kind));
    let filled = || cells.iter().filter(|cell| !cell.trim_ascii().is_empty());
    let kind = wanted.cloned().unwrap_or_else(|| {
        if filled().all(|cell| parsed::<i64>(cell).is_some()) {
            integer.clone()
        } else if filled().all(|cell| parsed::<u64>(cell).is_some()) {
            unsigned.clone()
        } else if filled().all(|cell| parsed::<f64>(cell).is_some()) {
            float.clone()
        } else {
            Kind::Text
        }
    });
    let not = |cell: &str| Some(format!("`{cell:.40}` is not {kind}"));
    let cells = if kind == *integer {
        column::<i64>(&cells, |cell, number| if number.is_some() { None } else { not(cell) })
    } else if kind == *unsigned {
        column::<u64>(&cells, |cell, number| if number.is_some() { None } else { not(cell) })
    } else if kind == *float {
        column::<f64>(&cells, |cell, number| match number {
            None => not(cell),
            Some(number) if !number.is_finite() => Some(format!("`{cell:.40}` is not a finite number")),
            Some(number) if is_rounded(cell, number) => {
                Some(format!("`{cell:.40}` would be rounded: f64, which its column is, does not hold it"))
            }
            Some(_) => None,
        })
    } else {
        let gap = |(row, cell): (usize, &Bytes)| match (cell.is_empty(), check_text(cell)) {
            (true, _) => Some(Gap::missing(row)),
            (false, Err(_)) => Some(Gap::fault(row, "is not UTF-8")),
            (false, Ok(())) => None,
        };
        let gaps = cells.iter().enumerate().filter_map(gap).collect();
        PartialCells::new(Cells::Bytes(cells), gaps)
    };
    (kind, cells)
}

/// Whether a cell is a whole number, and the nearest float another: two ids must not become one.
fn is_rounded(cell: &str, number: f64) -> bool {
    let digits = cell.trim().trim_start_matches(['+', '-']).trim_start_matches('0');
    let is_whole = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    is_whole && format!("{:.0}", number.abs()) != digits
}
