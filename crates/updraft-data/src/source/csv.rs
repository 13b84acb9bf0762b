//! Comma-separated values with a header (RFC 4180), kept in memory as typed columns. Tabs take the place of commas in a file
//! whose name ends with `.tsv`.

use std::path::Path;

use bytes::Bytes;
use updraft_base::Digest;

use crate::error::DataError;
use crate::schema::Schema;
use crate::source::input::Compression;
use crate::source::table::Table;
use crate::source::whole::{self, TableColumn, type_cells, type_partial};
use crate::source::{Opened, Wanted, read_whole};

pub(super) fn open(path: &Path, wanted: &Wanted, memory_bytes: u64) -> Result<Opened, DataError> {
    let mut text = Bytes::from(read_whole(path, memory_bytes)?);
    let digest = Digest::of(&text);
    let damaged = |reason: String| DataError::file(path, reason);
    let key = path.to_string_lossy();
    if let Some(compression) = Compression::of_key(&key) {
        text = compression.decompress(&text, memory_bytes).map_err(|refusal| refusal.of(path, "its text"))?;
    }
    let separator = separator_of(&key);
    let header = header(&text, separator).map_err(damaged)?;
    let (columns, places) = wanted.among(&header)?;
    let (cells, lines) = cells(&text, separator, &places).map_err(damaged)?;
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
        typed.push(type_cells(cells, None).1.map_err(|(row, reason)| DataError::Sample {
            sample: name(row),
            column: column.clone(),
            reason,
        })?);
    }
    let source = Box::new(Table::new(typed, rows, name));
    Ok(Opened { source, columns, digest, vocabulary: None, classes: None })
}

/// All columns of a file, for a shard.
pub(super) fn table(text: &[u8], separator: u8, wanted: Option<&Schema>) -> Result<whole::Table, String> {
    let header = header(text, separator)?;
    let (cells, lines) = cells(text, separator, &(0..header.len()).collect::<Vec<_>>())?;
    let typed = |(name, cells): (String, Vec<Bytes>)| {
        let kind = wanted.and_then(|s| s.columns.iter().find(|c| c.name == name)).map(|c| &c.kind);
        let (kind, cells) = type_partial(cells, kind);
        TableColumn { name, kind, cells }
    };
    Ok(whole::Table { rows: lines.len() as u64, columns: header.into_iter().zip(cells).map(typed).collect(), lines })
}

/// What a file of this name has between its columns.
pub(super) fn separator_of(key: &str) -> u8 {
    let name = key.to_ascii_lowercase();
    let stem = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    if stem.ends_with(".tsv") { b'\t' } else { b',' }
}

fn header(text: &[u8], separator: u8) -> Result<Vec<String>, String> {
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(text);
    let header: Vec<String> =
        reader.headers().map_err(|e| e.to_string())?.iter().map(|h| h.trim().to_owned()).collect();
    if let [only] = header.as_slice()
        && let Some(other) = only.chars().find(|c| matches!(c, ',' | ';' | '\t' | '|') && *c != char::from(separator))
    {
        return Err(format!(
            "its header is one column, `{only:.80}`: are columns separated by {other:?}? {:?} is read, and tabs where the \
             name ends with .tsv",
            char::from(separator)
        ));
    }
    match header.iter().enumerate().find(|(i, h)| header[..*i].contains(h)) {
        Some((_, twice)) => Err(format!("has two columns `{twice}`")),
        None => Ok(header),
    }
}

/// The cells of the columns at `places`, and the line of each row.
fn cells(text: &[u8], separator: u8, places: &[usize]) -> Result<(Vec<Vec<Bytes>>, Vec<u64>), String> {
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(text);
    let mut cells: Vec<Vec<Bytes>> = vec![Vec::new(); places.len()];
    let mut lines = Vec::new();
    let mut record = csv::ByteRecord::new();
    let mut last = 0;
    while reader.read_byte_record(&mut record).map_err(|e| e.to_string())? {
        lines.push(record.position().map_or(0, csv::Position::line));
        last = record.position().map_or(0, csv::Position::byte);
        for (column, place) in cells.iter_mut().zip(places) {
            // Rows of another length were refused by the reader.
            column.push(Bytes::copy_from_slice(record.get(*place).unwrap_or_default()));
        }
    }
    let rest = usize::try_from(last).ok().and_then(|at| text.get(at..)).unwrap_or_default();
    if !is_closed(rest, separator) {
        return Err(format!("byte {last}: a quote opens a cell and none closes it: the file may be cut off"));
    }
    Ok((cells, lines))
}

/// Whether a record is all of a text. One whose last quote is open takes all that follows as its own.
fn is_closed(text: &[u8], separator: u8) -> bool {
    let mut builder = csv::ReaderBuilder::new();
    builder.delimiter(separator).has_headers(false).flexible(true);
    let mut records = builder.from_reader(std::io::Read::chain(text, &b"\nx\n"[..])).into_byte_records();
    records.by_ref().last().is_some_and(|last| last.is_ok_and(|last| last.len() == 1 && &last[0] == b"x"))
}
