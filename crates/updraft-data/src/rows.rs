//! Rows of several columns side by side: what readers give, writers take, and validation looks at.
//!
//! Columns are kept apart, numbers of many rows in one tensor, so that work on rows is copying between slices and not
//! making an object for each row.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use updraft_graph::{DType, Tensor};

use crate::schema::{Kind, Schema};

mod partial;

pub use partial::{Gap, PartialCells};

/// Cells of a column, one for each row.
#[derive(Clone, Debug, PartialEq)]
pub enum Cells {
    /// Bytes, or text, which is checked to be UTF-8 where it is read.
    Bytes(Vec<Bytes>),
    /// Numbers, the rows along the first dimension.
    Numbers(Tensor),
    /// One tensor of one dimension for each row.
    Lists(Vec<Tensor>),
}

/// Some rows with their columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// The columns.
    pub schema: Arc<Schema>,
    /// The cells, in the order of the schema's columns; equally many of each.
    pub columns: Vec<Cells>,
}

impl Cells {
    /// The number of rows.
    pub fn len(&self) -> usize {
        match self {
            Cells::Bytes(cells) => cells.len(),
            Cells::Numbers(tensor) => tensor.shape().first().copied().unwrap_or(0),
            Cells::Lists(cells) => cells.len(),
        }
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the cells take in memory.
    pub fn memory_bytes(&self) -> u64 {
        match self {
            Cells::Bytes(cells) => cells.iter().map(|c| (c.len() + size_of::<Bytes>()) as u64).sum(),
            Cells::Numbers(tensor) => tensor.byte_len() as u64,
            // A tensor of its own takes whole cache lines, its shape, and two counted pointers.
            Cells::Lists(cells) => {
                cells.iter().map(|t| (t.byte_len().next_multiple_of(64) + size_of::<Tensor>() + 64) as u64).sum()
            }
        }
    }

    /// The cells at `rows`, in that order.
    ///
    /// # Panics
    /// If a row is past the end.
    pub fn gather(&self, rows: impl ExactSizeIterator<Item = usize>) -> Cells {
        match self {
            Cells::Bytes(cells) => Cells::Bytes(rows.map(|row| cells[row].clone()).collect()),
            Cells::Numbers(tensor) => Cells::Numbers(gather(tensor, rows)),
            Cells::Lists(cells) => Cells::Lists(rows.map(|row| cells[row].clone()).collect()),
        }
    }

    /// The cells of several parts, one after the other.
    ///
    /// # Errors
    /// Where the parts do not hold the same kind of cells.
    pub fn concat(parts: &[&Cells]) -> Result<Cells, String> {
        let differ = |what: &str| format!("cannot join {what}");
        match parts.first() {
            None => Ok(Cells::Bytes(Vec::new())),
            Some(Cells::Bytes(_)) => {
                let mut cells = Vec::with_capacity(parts.iter().map(|p| p.len()).sum());
                for part in parts {
                    let Cells::Bytes(part) = part else { return Err(differ("bytes and numbers")) };
                    cells.extend_from_slice(part);
                }
                Ok(Cells::Bytes(cells))
            }
            Some(Cells::Lists(_)) => {
                let mut cells = Vec::with_capacity(parts.iter().map(|p| p.len()).sum());
                for part in parts {
                    let Cells::Lists(part) = part else { return Err(differ("lists and other cells")) };
                    cells.extend_from_slice(part);
                }
                Ok(Cells::Lists(cells))
            }
            Some(Cells::Numbers(first)) => {
                let mut shape = first.shape().to_vec();
                let mut bytes = Vec::with_capacity(parts.iter().map(|p| p.memory_bytes() as usize).sum());
                let mut rows = 0;
                for part in parts {
                    let Cells::Numbers(part) = part else { return Err(differ("numbers and other cells")) };
                    if part.dtype() != first.dtype() || part.shape().get(1..) != first.shape().get(1..) {
                        return Err(differ(&format!(
                            "{}{:?} and {}{:?}",
                            first.dtype(),
                            first.shape(),
                            part.dtype(),
                            part.shape()
                        )));
                    }
                    rows += part.shape().first().copied().unwrap_or(0);
                    bytes.extend_from_slice(part.bytes());
                }
                if let Some(count) = shape.first_mut() {
                    *count = rows;
                }
                Ok(Cells::Numbers(tensor_of(first.dtype(), &shape, &bytes)))
            }
        }
    }

    /// Whether these can be the cells of a column of this kind.
    pub fn fits(&self, kind: &Kind) -> bool {
        match (self, kind) {
            (Cells::Bytes(_), Kind::Bytes | Kind::Text) => true,
            (Cells::Numbers(tensor), Kind::Number { dtype, shape }) => {
                tensor.dtype() == *dtype && tensor.shape().get(1..) == Some(shape)
            }
            (Cells::Lists(cells), Kind::List { dtype }) => {
                cells.iter().all(|list| list.dtype() == *dtype && list.rank() == 1)
            }
            _ => false,
        }
    }
}

impl Rows {
    /// Rows of these columns.
    ///
    /// # Errors
    /// Where a column is missing, of another kind, or of another length than the first.
    pub fn new(schema: Arc<Schema>, columns: Vec<Cells>) -> Result<Rows, String> {
        if schema.columns.len() != columns.len() {
            return Err(format!("{} columns of cells for {} in the schema", columns.len(), schema.columns.len()));
        }
        let rows = columns.first().map_or(0, Cells::len);
        for (column, cells) in schema.columns.iter().zip(&columns) {
            if !cells.fits(&column.kind) {
                return Err(format!("column `{}` does not hold {}", column.name, column.kind));
            }
            if cells.len() != rows {
                return Err(format!("column `{}` has {} rows and the first {rows}", column.name, cells.len()));
            }
        }
        Ok(Rows { schema, columns })
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.columns.first().map_or(0, Cells::len)
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the rows take in memory.
    pub fn memory_bytes(&self) -> u64 {
        self.columns.iter().map(Cells::memory_bytes).sum()
    }

    /// The cells of the column of this name.
    pub fn column(&self, name: &str) -> Option<&Cells> {
        self.columns.get(self.schema.index_of(name)?)
    }

    /// The rows of a range.
    ///
    /// # Panics
    /// If the range passes the end.
    pub fn slice(&self, rows: Range<usize>) -> Rows {
        self.gather(&rows.collect::<Vec<_>>())
    }

    /// The rows at these indices, in that order.
    ///
    /// # Panics
    /// If an index is past the end.
    pub fn gather(&self, rows: &[usize]) -> Rows {
        let columns = self.columns.iter().map(|cells| cells.gather(rows.iter().copied())).collect();
        Rows { schema: self.schema.clone(), columns }
    }

    /// The rows of several parts of one schema, one after the other.
    ///
    /// # Errors
    /// The column in which parts differ.
    pub fn concat(schema: &Arc<Schema>, parts: &[Rows]) -> Result<Rows, String> {
        let mut columns = Vec::with_capacity(schema.columns.len());
        for (at, column) in schema.columns.iter().enumerate() {
            let cells: Option<Vec<&Cells>> = parts.iter().map(|part| part.columns.get(at)).collect();
            let cells = cells.ok_or_else(|| format!("column `{}` is missing", column.name))?;
            let joined = if cells.is_empty() { empty(&column.kind) } else { Cells::concat(&cells) };
            columns.push(joined.map_err(|reason| format!("column `{}`: {reason}", column.name))?);
        }
        Rows::new(schema.clone(), columns)
    }
}

/// No cells of a kind.
pub(crate) fn empty(kind: &Kind) -> Result<Cells, String> {
    Ok(match kind {
        Kind::Bytes | Kind::Text => Cells::Bytes(Vec::new()),
        Kind::List { .. } => Cells::Lists(Vec::new()),
        Kind::Number { dtype, shape } => {
            let shape = [&[0], shape.as_slice()].concat();
            Cells::Numbers(Tensor::zeros(*dtype, &shape).map_err(|e| e.to_string())?)
        }
    })
}

/// Some rows of a tensor whose first dimension counts rows.
pub(crate) fn gather(tensor: &Tensor, rows: impl ExactSizeIterator<Item = usize>) -> Tensor {
    let count = tensor.shape().first().copied().unwrap_or(0);
    let row_bytes = tensor.byte_len().checked_div(count).unwrap_or(0);
    let mut shape = tensor.shape().to_vec();
    shape[0] = rows.len();
    let mut out = Tensor::zeros(tensor.dtype(), &shape).expect("not more rows than memory holds");
    let (from, to) = (tensor.bytes(), out.bytes_mut());
    // Single numbers are most of what is gathered; a copy of a length known to the compiler is one instruction.
    match row_bytes {
        0 => {}
        1 => gather_fixed::<1>(from, to, rows),
        2 => gather_fixed::<2>(from, to, rows),
        4 => gather_fixed::<4>(from, to, rows),
        8 => gather_fixed::<8>(from, to, rows),
        _ => {
            for (to, row) in to.chunks_exact_mut(row_bytes).zip(rows) {
                to.copy_from_slice(&from[row * row_bytes..][..row_bytes]);
            }
        }
    }
    out
}

fn gather_fixed<const BYTES: usize>(from: &[u8], to: &mut [u8], rows: impl Iterator<Item = usize>) {
    let (from, to) = (from.as_chunks::<BYTES>().0, to.as_chunks_mut::<BYTES>().0);
    for (to, row) in to.iter_mut().zip(rows) {
        *to = from[row];
    }
}

/// A tensor of bytes that were counted by shape and type.
pub(crate) fn tensor_of(dtype: DType, shape: &[usize], bytes: &[u8]) -> Tensor {
    Tensor::from_bytes(dtype, shape, bytes).expect("the bytes are of whole rows of this shape")
}
