//! Samples as a file holds them: named columns, read by row.
//!
//! A source gives the columns it was opened for and nothing else, checks that every cell is there, and knows how to
//! name a row in an error. What a column means is for [`transform`](crate::transform) to say.

use std::path::Path;

use updraft_base::{Digest, Hasher};

use crate::config::{DatasetConfig, Format};
use crate::error::DataError;
pub(crate) use crate::rows::{Cells, tensor_of};
use crate::source::part::Part;
use crate::text::Vocabulary;

mod csv;
mod folder;
pub(crate) mod join;
mod numpy;
mod parquet;
mod part;
pub mod shard;
mod table;
mod text;

/// Columns over numbered rows.
pub(crate) trait Source: Send + Sync {
    /// Rows of each block. A block is what is read at once; a source that reads any row alone, or keeps all in memory,
    /// has one.
    fn block_rows(&self) -> &[u64];

    /// Bytes that `blocks` blocks take in memory; what is in memory anyway where the source has one.
    fn resident_bytes(&self, blocks: u64) -> u64;

    /// The cells of some of the columns, by their indices among those the source was opened for, at `rows`.
    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError>;

    /// The name of a row: the file, and the row or line in it.
    fn row_name(&self, row: u64) -> String;
}

/// A source, and what is known about it.
pub(crate) struct Opened {
    pub source: Box<dyn Source>,
    /// The names of the columns it was opened for.
    pub columns: Vec<String>,
    /// The digest of the content: equal for equal samples, wherever they lie.
    pub digest: Digest,
    pub vocabulary: Option<Vocabulary>,
    pub classes: Option<Vec<String>>,
}

/// Opens the source for the columns that the configured tensors need, or for all.
pub(crate) fn open(config: &DatasetConfig, path: &Path) -> Result<Opened, DataError> {
    let mut wanted: Vec<String> = Vec::new();
    for tensor in &config.tensors {
        let columns = if tensor.columns.is_empty() { std::slice::from_ref(&tensor.name) } else { &tensor.columns };
        for column in columns {
            if !wanted.contains(column) {
                wanted.push(column.clone());
            }
        }
    }
    // Without tensors all columns are read, so nothing need be added.
    let conditions = config.filter.iter().filter(|_| !config.tensors.is_empty());
    for condition in conditions {
        if !wanted.contains(&condition.column) {
            wanted.push(condition.column.clone());
        }
    }
    let wanted = Wanted { names: (!wanted.is_empty()).then_some(wanted), path };
    let is_folder = std::fs::metadata(path).map_err(DataError::io(path))?.is_dir();
    let by_extension = || match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        _ if is_folder => Ok(Format::Folder),
        Some("parquet") => Ok(Format::Parquet),
        Some("csv") => Ok(Format::Csv),
        Some("npy") => Ok(Format::Npy),
        Some("npz") => Ok(Format::Npz),
        _ => Err(DataError::file(
            path,
            "its extension does not say what it is; set `format` to one of `parquet`, `folder`, `csv`, `npy`, `npz`, \
             or `{ text = { context = … } }`",
        )),
    };
    let format = config.format.clone().map_or_else(by_extension, Ok)?;
    if is_folder != matches!(format, Format::Folder) {
        let reason = if is_folder { "is a folder; a file was expected" } else { "is a file; a folder was expected" };
        return Err(DataError::file(path, reason));
    }
    let opened = match format {
        Format::Parquet => parquet::open(path, &wanted, config.memory_bytes),
        Format::Folder => folder::open(path, &wanted),
        Format::Csv => csv::open(path, &wanted, config.memory_bytes),
        Format::Npy => numpy::open_npy(path, &wanted, config.memory_bytes),
        Format::Npz => numpy::open_npz(path, &wanted, config.memory_bytes),
        Format::Text(text) => text::open(path, &wanted, &text, config.memory_bytes),
    }?;
    match config.rows {
        None => Ok(opened),
        Some(fractions) => {
            let part = Part::new(opened.source, fractions).map_err(|reason| DataError::file(path, reason))?;
            Ok(Opened { source: Box::new(part), ..opened })
        }
    }
}

/// Opens the sources of a mixture, one after the other; answers how many blocks each has, too.
pub(crate) fn open_all(config: &DatasetConfig, base: &Path) -> Result<(Opened, Vec<usize>), DataError> {
    let count = config.sources.len() as u64;
    let mut first: Option<Opened> = None;
    let mut sources = Vec::with_capacity(config.sources.len());
    let mut blocks = Vec::with_capacity(config.sources.len());
    let mut hasher = Hasher::new();
    for part in &config.sources {
        let path = base.join(&part.path);
        let alone = DatasetConfig {
            path: part.path.clone(),
            format: part.format.clone(),
            rows: part.rows,
            sources: Vec::new(),
            memory_bytes: config.memory_bytes / count,
            ..config.clone()
        };
        let opened = open(&alone, &path)?;
        hasher.field(opened.digest.as_bytes());
        if let Some(first) = &first {
            let differs =
                |what: &str| DataError::file(&path, format!("has other {what} than the first source of the mixture"));
            if opened.columns != first.columns {
                return Err(differs("columns"));
            }
            if opened.vocabulary != first.vocabulary {
                return Err(differs("characters"));
            }
            if opened.classes != first.classes {
                return Err(differs("classes"));
            }
        }
        blocks.push(opened.source.block_rows().len());
        sources.push(opened.source);
        first.get_or_insert(Opened { source: Box::new(join::Join::new(Vec::new())), ..opened });
    }
    let Some(first) = first else { return Err(DataError::Loader("a mixture needs at least one source".into())) };
    Ok((Opened { source: Box::new(join::Join::new(sources)), digest: hasher.finish(), ..first }, blocks))
}

/// The columns that are needed of a file.
pub(crate) struct Wanted<'a> {
    /// `None` for all.
    names: Option<Vec<String>>,
    path: &'a Path,
}

impl Wanted<'_> {
    /// The wanted columns and where they are among `known`.
    fn among(&self, known: &[String]) -> Result<(Vec<String>, Vec<usize>), DataError> {
        let names = self.names.clone().unwrap_or_else(|| known.to_vec());
        let mut places = Vec::with_capacity(names.len());
        for name in &names {
            let place = known.iter().position(|k| k == name).ok_or_else(|| DataError::UnknownColumn {
                path: self.path.to_owned(),
                column: name.clone(),
                known: known.to_vec(),
            })?;
            places.push(place);
        }
        Ok((names, places))
    }
}

/// Reads a file that is to be kept in memory whole.
fn read_whole(path: &Path, memory_bytes: u64) -> Result<Vec<u8>, DataError> {
    let needed_bytes = std::fs::metadata(path).map_err(DataError::io(path))?.len();
    if needed_bytes > memory_bytes {
        return Err(DataError::Memory {
            path: path.to_owned(),
            what: "the file".into(),
            needed_bytes,
            allowed_bytes: memory_bytes,
            advice: "raise it, or convert to Parquet, which is read in parts",
        });
    }
    std::fs::read(path).map_err(DataError::io(path))
}
