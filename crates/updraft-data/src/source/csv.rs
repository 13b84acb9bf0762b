//! Comma-separated values with a header (RFC 4180), kept in memory as typed columns.

use std::path::Path;

use bytes::Bytes;
use updraft_base::Digest;
use updraft_graph::Tensor;

use crate::error::DataError;
use crate::source::table::Table;
use crate::source::{Cells, Opened, Wanted, read_whole};

pub(super) fn open(path: &Path, wanted: &Wanted, memory_bytes: u64) -> Result<Opened, DataError> {
    let text = Bytes::from(read_whole(path, memory_bytes)?);
    let digest = Digest::of(&text);
    let unreadable = |e: csv::Error| DataError::file(path, e.to_string());
    let mut reader = csv::ReaderBuilder::new().from_reader(text.as_ref());
    let header: Vec<String> = reader.headers().map_err(unreadable)?.iter().map(|h| h.trim().to_owned()).collect();
    if let Some(twice) = header.iter().enumerate().find(|(i, h)| header[..*i].contains(h)).map(|(_, h)| h) {
        return Err(DataError::file(path, format!("has two columns `{twice}`")));
    }
    let (columns, places) = wanted.among(&header)?;

    let mut cells: Vec<Vec<Bytes>> = vec![Vec::new(); places.len()];
    let mut lines = Vec::new();
    let mut record = csv::ByteRecord::new();
    while reader.read_byte_record(&mut record).map_err(unreadable)? {
        lines.push(record.position().map_or(0, csv::Position::line));
        for (column, place) in cells.iter_mut().zip(&places) {
            // Rows of another length were refused by the reader.
            column.push(Bytes::copy_from_slice(record.get(*place).unwrap_or_default().trim_ascii()));
        }
    }
    if lines.is_empty() {
        return Err(DataError::Empty { path: path.to_owned(), reason: "there is a header and nothing else".into() });
    }
    let rows = lines.len() as u64;
    let file = path.display().to_string();
    let name = move |row: u64| match lines.get(row as usize) {
        Some(line) => format!("{file} line {line}"),
        None => format!("{file} row {row}"),
    };
    let mut typed = Vec::with_capacity(cells.len());
    for (column, cells) in columns.iter().zip(cells) {
        typed.push(type_column(cells).map_err(|(row, reason)| DataError::Sample {
            sample: name(row),
            column: column.clone(),
            reason,
        })?);
    }
    let source = Box::new(Table::new(typed, rows, name));
    Ok(Opened { source, columns, digest, vocabulary: None, classes: None })
}

/// A column as whole numbers, as numbers, or as text. A row and a reason where a cell is missing, or is a number that no
/// model should see.
fn type_column(cells: Vec<Bytes>) -> Result<Cells, (u64, String)> {
    if let Some(row) = cells.iter().position(|c| c.is_empty()) {
        return Err((row as u64, "the cell is empty".into()));
    }
    fn all<T: std::str::FromStr>(cells: &[Bytes]) -> Option<Vec<T>> {
        cells.iter().map(|c| std::str::from_utf8(c).ok()?.parse().ok()).collect()
    }
    if let Some(integers) = all::<i64>(&cells) {
        return Ok(Cells::Numbers(Tensor::vector(&integers)));
    }
    let Some(floats) = all::<f64>(&cells) else { return Ok(Cells::Bytes(cells)) };
    if let Some(row) = floats.iter().position(|v| !v.is_finite()) {
        let cell = String::from_utf8_lossy(&cells[row]);
        return Err((row as u64, format!("`{cell}` is not a finite number")));
    }
    Ok(Cells::Numbers(Tensor::vector(&floats)))
}
