//! Cells of a block as they are read row by row: bytes into one tensor for all rows, not an object for each.

use bytes::Bytes;
use updraft_graph::tensor::element_count;
use updraft_graph::{DType, Tensor};

use crate::rows::{Cells, tensor_of};
use crate::schema::Kind;

/// A column in the making.
pub(crate) struct CellsBuilder {
    kind: Kind,
    made: Made,
}

enum Made {
    Bytes(Vec<Bytes>),
    /// Elements in native order, row behind row.
    Numbers(Vec<u8>),
    Lists(Vec<Tensor>),
}

impl CellsBuilder {
    /// An empty column with room for `rows`, which were counted, not claimed.
    pub(crate) fn new(kind: &Kind, rows: usize) -> CellsBuilder {
        let made = match kind {
            Kind::Bytes | Kind::Text => Made::Bytes(Vec::with_capacity(rows)),
            Kind::Number { .. } => Made::Numbers(Vec::new()),
            Kind::List { .. } => Made::Lists(Vec::with_capacity(rows)),
        };
        CellsBuilder { kind: kind.clone(), made }
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Appends bytes or text.
    pub(crate) fn push_bytes(&mut self, cell: Bytes) -> Result<(), String> {
        if self.kind == Kind::Text {
            check_text(&cell)?;
        }
        match &mut self.made {
            Made::Bytes(cells) => cells.push(cell),
            _ => return Err(format!("holds bytes where {} was expected", self.kind)),
        }
        Ok(())
    }

    /// Appends a row of numbers of `dtype`, given as their bytes in little-endian order.
    pub(crate) fn push_le(&mut self, dtype: DType, shape: &[usize], elements: &[u8]) -> Result<(), String> {
        match (&self.kind, &mut self.made) {
            (Kind::Number { dtype: wanted, shape: wanted_shape }, Made::Numbers(bytes)) => {
                if dtype != *wanted || shape != wanted_shape {
                    return Err(format!("is {dtype}{shape:?} where {} was expected", self.kind));
                }
                let at = bytes.len();
                bytes.extend_from_slice(elements);
                to_native(dtype, &mut bytes[at..]);
            }
            (Kind::List { dtype: wanted }, Made::Lists(lists)) => {
                if dtype != *wanted || shape.len() != 1 {
                    return Err(format!("is {dtype}{shape:?} where {} was expected", self.kind));
                }
                let mut tensor = Tensor::from_bytes(dtype, shape, elements).map_err(|e| e.to_string())?;
                if cfg!(target_endian = "big") {
                    to_native(dtype, tensor.bytes_mut());
                }
                lists.push(tensor);
            }
            (kind, _) => return Err(format!("holds numbers where {kind} was expected")),
        }
        Ok(())
    }

    /// Appends a row of numbers that are a tensor already.
    pub(crate) fn push_native(&mut self, row: &Tensor) -> Result<(), String> {
        if cfg!(target_endian = "little") {
            return self.push_le(row.dtype(), row.shape(), row.bytes());
        }
        let mut bytes = row.bytes().to_vec();
        to_native(row.dtype(), &mut bytes);
        self.push_le(row.dtype(), row.shape(), &bytes)
    }

    /// A cell for a row of which nothing or only a part was pushed; `rows` are before it.
    pub(crate) fn push_nothing(&mut self, rows: usize) {
        match (&mut self.made, &self.kind) {
            (Made::Bytes(cells), _) => {
                cells.truncate(rows);
                cells.push(Bytes::new());
            }
            (Made::Lists(cells), Kind::List { dtype }) => {
                cells.truncate(rows);
                cells.push(tensor_of(*dtype, &[0], &[]));
            }
            (Made::Numbers(bytes), kind) => bytes.resize((rows + 1) * kind.row_bytes().unwrap_or(0), 0),
            (Made::Lists(_), _) => {}
        }
    }

    /// The column; `rows` were pushed.
    pub(crate) fn finish(self, rows: usize) -> Result<Cells, String> {
        let cells = match (self.made, &self.kind) {
            (Made::Bytes(cells), _) => Cells::Bytes(cells),
            (Made::Lists(cells), _) => Cells::Lists(cells),
            (Made::Numbers(bytes), Kind::Number { dtype, shape }) => {
                let shape = [&[rows], shape.as_slice()].concat();
                let count = element_count(&shape).and_then(|n| n.checked_mul(dtype.size_in_memory()));
                if count != Some(bytes.len()) {
                    return Err(format!("{} bytes are not {dtype}{shape:?}", bytes.len()));
                }
                Cells::Numbers(tensor_of(*dtype, &shape, &bytes))
            }
            (Made::Numbers(_), kind) => return Err(format!("holds numbers where {kind} was expected")),
        };
        if cells.len() == rows { Ok(cells) } else { Err(format!("has {} cells for {rows} rows", cells.len())) }
    }
}

/// Refuses what is not UTF-8.
pub(crate) fn check_text(cell: &[u8]) -> Result<(), String> {
    match std::str::from_utf8(cell) {
        Ok(_) => Ok(()),
        Err(e) => Err(format!("is not UTF-8 from byte {} on", e.valid_up_to())),
    }
}

/// Brings little-endian elements into the order of this machine.
pub(crate) fn to_native(dtype: DType, bytes: &mut [u8]) {
    if cfg!(target_endian = "big") {
        let word = match dtype {
            DType::Complex64 | DType::Complex128 => dtype.size_in_memory() / 2,
            _ => dtype.size_in_memory(),
        };
        bytes.chunks_exact_mut(word.max(1)).for_each(<[u8]>::reverse);
    }
}

/// The wanted columns of a schema, or an error that names the first that is not there.
pub(crate) fn kinds<'a>(schema: &'a crate::Schema, columns: &[usize]) -> Result<Vec<&'a Kind>, String> {
    let kind = |at: &usize| schema.columns.get(*at).map(|c| &c.kind);
    columns.iter().map(|at| kind(at).ok_or_else(|| format!("there is no column {at}"))).collect()
}
