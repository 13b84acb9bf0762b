//! NumPy arrays as columns.

use std::path::Path;

use updraft_base::{Digest, digest::Hasher};
use updraft_graph::Tensor;

use crate::error::DataError;
use crate::npy::{read_npy, read_npz};
use crate::source::table::Table;
use crate::source::{Cells, Opened, Wanted};

pub(super) fn open_npy(path: &Path, wanted: &Wanted, memory_bytes: u64) -> Result<Opened, DataError> {
    open(path, wanted, vec![("array".to_owned(), read_npy(path, memory_bytes)?)])
}

pub(super) fn open_npz(path: &Path, wanted: &Wanted, memory_bytes: u64) -> Result<Opened, DataError> {
    open(path, wanted, read_npz(path, memory_bytes)?)
}

fn open(path: &Path, wanted: &Wanted, arrays: Vec<(String, Tensor)>) -> Result<Opened, DataError> {
    let (names, tensors): (Vec<String>, Vec<Tensor>) = arrays.into_iter().unzip();
    let (columns, places) = wanted.among(&names)?;
    let mut rows = None;
    for (name, place) in columns.iter().zip(&places) {
        let Some(count) = tensors[*place].shape().first() else {
            return Err(DataError::file(path, format!("array `{name}` has no dimension to count samples along")));
        };
        let (_, first) = *rows.get_or_insert((name, *count));
        if first != *count {
            let reason = format!("array `{name}` holds {count} samples and `{}` {first}", columns[0]);
            return Err(DataError::file(path, reason));
        }
    }
    let rows = match rows {
        Some((_, rows)) if rows > 0 => rows as u64,
        _ => return Err(DataError::Empty { path: path.to_owned(), reason: String::new() }),
    };
    let digest = digest(&names, &tensors);
    let cells = places.iter().map(|place| Cells::Numbers(tensors[*place].clone())).collect();
    let file = path.display().to_string();
    let source = Box::new(Table::new(cells, rows, move |row| format!("{file} row {row}")));
    Ok(Opened { source, columns, digest, vocabulary: None, classes: None })
}

/// Over names, types, shapes and elements: equal arrays are the same dataset however they were packed.
fn digest(names: &[String], tensors: &[Tensor]) -> Digest {
    let mut hasher = Hasher::new();
    for (name, tensor) in names.iter().zip(tensors) {
        hasher.field(name.as_bytes());
        hasher.field(format!("{}{:?}", tensor.dtype(), tensor.shape()).as_bytes());
        hasher.field(tensor.bytes());
    }
    hasher.finish()
}
