//! Parquet, one row group at a time.
//!
//! Row groups are decoded when first asked for, only in the wanted columns, and kept while memory lasts; then those read
//! longest ago go first. Order visits row groups window by window and each once an epoch, so what was read longest ago
//! is also what is needed furthest ahead.
//!
//! The crate `parquet` panics on some damaged files. Those panics are caught here and are errors that name the file; all
//! that a panic could leave in doubt is thrown away with the reader.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use parquet::basic::{ConvertedType, LogicalType};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;
use updraft_base::{Digest, digest::Hasher};
use updraft_graph::{DType, Element, Tensor};

use crate::error::DataError;
use crate::source::table::cells_bytes;
use crate::source::{Cells, Opened, Source, Wanted, tensor_of};

struct Parquet {
    path: PathBuf,
    /// The wanted columns: their names, and their places among the leaves of the schema.
    columns: Vec<(String, usize)>,
    block_rows: Vec<u64>,
    /// First row of each row group, and the number of rows at the end.
    starts: Vec<u64>,
    /// Bytes of the wanted columns of each row group before compression, largest first.
    block_bytes: Vec<u64>,
    memory_bytes: u64,
    state: Mutex<State>,
}

/// Behind one lock: the reader, because all reads of a file share one position, and the row groups kept, so that two
/// threads that miss the same one read it once.
struct State {
    reader: SerializedFileReader<File>,
    kept: HashMap<usize, Kept>,
    kept_bytes: u64,
    clock: u64,
}

struct Kept {
    columns: Arc<Vec<Cells>>,
    bytes: u64,
    last_read: u64,
}

pub(super) fn open(path: &Path, wanted: &Wanted, memory_bytes: u64) -> Result<Opened, DataError> {
    let digest = digest_of(path)?;
    let file = File::open(path).map_err(DataError::io(path))?;
    let damaged = |reason: String| DataError::file(path, reason);
    let reader = contain(|| SerializedFileReader::new(file).map_err(|e| e.to_string())).map_err(damaged)?;
    let metadata = reader.metadata();
    let leaves = metadata.file_metadata().schema_descr().columns();
    let known: Vec<String> = leaves.iter().map(|c| c.path().string()).collect();
    let (columns, places) = wanted.among(&known)?;

    let mut block_rows = Vec::new();
    let mut block_bytes = Vec::new();
    for (index, group) in metadata.row_groups().iter().enumerate() {
        let rows = u64::try_from(group.num_rows())
            .map_err(|_| damaged(format!("row group {index} has a negative number of rows")))?;
        let mut bytes = 0u64;
        for place in &places {
            let chunk = group.columns().get(*place).map(|c| c.uncompressed_size());
            let size = chunk.and_then(|s| u64::try_from(s).ok());
            bytes = bytes.saturating_add(size.ok_or_else(|| damaged(format!("row group {index} lacks a column")))?);
        }
        if bytes > memory_bytes {
            return Err(DataError::Memory {
                path: path.to_owned(),
                what: format!("row group {index}"),
                needed_bytes: bytes,
                allowed_bytes: memory_bytes,
                advice: "raise it, or write the file with smaller row groups",
            });
        }
        block_rows.push(rows);
        block_bytes.push(bytes);
    }
    let mut starts = vec![0u64];
    for rows in &block_rows {
        let end = starts[starts.len() - 1].checked_add(*rows);
        starts.push(end.ok_or_else(|| damaged("claims more than 2^64 rows".into()))?);
    }
    if starts[starts.len() - 1] == 0 {
        return Err(DataError::Empty { path: path.to_owned(), reason: String::new() });
    }
    block_bytes.sort_unstable_by(|a, b| b.cmp(a));
    let source = Parquet {
        path: path.to_owned(),
        columns: columns.iter().cloned().zip(places).collect(),
        block_rows,
        starts,
        block_bytes,
        memory_bytes,
        state: Mutex::new(State { reader, kept: HashMap::new(), kept_bytes: 0, clock: 0 }),
    };
    Ok(Opened { source: Box::new(source), columns, digest, vocabulary: None, classes: None })
}

impl Source for Parquet {
    fn block_rows(&self) -> &[u64] {
        &self.block_rows
    }

    fn resident_bytes(&self, blocks: u64) -> u64 {
        let blocks = usize::try_from(blocks).unwrap_or(usize::MAX);
        self.block_bytes.iter().take(blocks).fold(0, |sum, b| sum.saturating_add(*b))
    }

    fn read(&self, column: usize, rows: &[u64]) -> Result<Cells, DataError> {
        // Blocks are held until the cells are copied, so that another thread's reading cannot take them away.
        let mut held: HashMap<usize, Arc<Vec<Cells>>> = HashMap::new();
        let mut places = Vec::with_capacity(rows.len());
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            for row in rows {
                let group = self.starts.partition_point(|start| start <= row) - 1;
                if let std::collections::hash_map::Entry::Vacant(entry) = held.entry(group) {
                    entry.insert(self.block(&mut state, group)?);
                }
                places.push((group, (row - self.starts[group]) as usize));
            }
        }
        collect(&held, column, &places).map_err(|reason| DataError::Sample {
            sample: rows.first().map_or_else(String::new, |row| self.row_name(*row)),
            column: self.columns[column].0.clone(),
            reason,
        })
    }

    fn row_name(&self, row: u64) -> String {
        format!("{} row {row}", self.path.display())
    }
}

impl Parquet {
    fn block(&self, state: &mut State, group: usize) -> Result<Arc<Vec<Cells>>, DataError> {
        state.clock += 1;
        if let Some(kept) = state.kept.get_mut(&group) {
            kept.last_read = state.clock;
            return Ok(kept.columns.clone());
        }
        let columns = contain(|| self.decode(&state.reader, group)).map_err(|r| DataError::file(&self.path, r))?;
        let bytes = columns.iter().map(cells_bytes).sum();
        while state.kept_bytes + bytes > self.memory_bytes {
            let oldest = state.kept.iter().min_by_key(|(_, k)| k.last_read).map(|(group, _)| *group);
            let Some(kept) = oldest.and_then(|group| state.kept.remove(&group)) else { break };
            state.kept_bytes -= kept.bytes;
        }
        let columns = Arc::new(columns);
        state.kept_bytes += bytes;
        state.kept.insert(group, Kept { columns: columns.clone(), bytes, last_read: state.clock });
        Ok(columns)
    }

    fn decode(&self, reader: &SerializedFileReader<File>, group: usize) -> Result<Vec<Cells>, String> {
        let rows = self.block_rows[group] as usize;
        let leaves = reader.metadata().file_metadata().schema_descr().columns();
        let group_reader = reader.get_row_group(group).map_err(|e| format!("row group {group}: {e}"))?;
        let mut columns = Vec::with_capacity(self.columns.len());
        for (name, place) in &self.columns {
            let column_reader = group_reader
                .get_column_reader(*place)
                .map_err(|e| format!("row group {group}, column `{name}`: {e}"))?;
            let cells = decode_column(column_reader, &leaves[*place], rows, self.starts[group])
                .map_err(|reason| format!("row group {group}, column `{name}`: {reason}"))?;
            columns.push(cells);
        }
        Ok(columns)
    }
}

/// Runs code of the crate `parquet` on data that may be hostile.
fn contain<T>(decode: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(result) => result.map_err(|reason| format!("is damaged or not Parquet: {reason}")),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(format!("is damaged: its decoder gave up: {}", text.unwrap_or("no reason given")))
        }
    }
}

fn decode_column(reader: ColumnReader, leaf: &ColumnDescriptor, rows: usize, first_row: u64) -> Result<Cells, String> {
    use ColumnReader::*;
    use ConvertedType as C;
    let chunk = Chunk { rows, first_row, leaf };
    let logical = leaf.logical_type_ref();
    let unsupported = || match logical {
        Some(logical) => Err(format!("holds {logical:?}, which is not a number, text or bytes")),
        None => Err(format!(
            "holds {} as {}, which is not a number, text or bytes",
            leaf.physical_type(),
            leaf.converted_type()
        )),
    };
    match (reader, leaf.converted_type()) {
        (FixedLenByteArrayColumnReader(r), _) if logical == Some(&LogicalType::Float16) => {
            chunk.numbers(r, |v| match v.data() {
                [low, high] => Ok(half::f16::from_le_bytes([*low, *high])),
                other => Err(format!("{} bytes are not a 16-bit float", other.len())),
            })
        }
        // Timestamps in nanoseconds and the like have no converted type.
        (_, C::NONE) if !matches!(logical, None | Some(LogicalType::String)) => unsupported(),
        (ByteArrayColumnReader(r), C::NONE | C::UTF8 | C::ENUM | C::JSON | C::BSON) => chunk.bytes(r, |v| v),
        (FixedLenByteArrayColumnReader(r), C::NONE) => chunk.bytes(r, |v| v.into()),
        (BoolColumnReader(r), C::NONE) => {
            let (values, shape) = chunk.values(r)?;
            Tensor::from_bools(&shape, &values).map(Cells::Numbers).map_err(|e| e.to_string())
        }
        (Int32ColumnReader(r), C::NONE | C::INT_32) => chunk.numbers(r, Ok),
        (Int32ColumnReader(r), C::INT_8) => chunk.numbers(r, narrow::<_, i8>),
        (Int32ColumnReader(r), C::INT_16) => chunk.numbers(r, narrow::<_, i16>),
        (Int32ColumnReader(r), C::UINT_8) => chunk.numbers(r, narrow::<_, u8>),
        (Int32ColumnReader(r), C::UINT_16) => chunk.numbers(r, narrow::<_, u16>),
        // Unsigned numbers of full width are stored by their bits.
        (Int32ColumnReader(r), C::UINT_32) => chunk.numbers(r, |v| Ok(v.cast_unsigned())),
        (Int64ColumnReader(r), C::NONE | C::INT_64) => chunk.numbers(r, Ok),
        (Int64ColumnReader(r), C::UINT_64) => chunk.numbers(r, |v| Ok(v.cast_unsigned())),
        (FloatColumnReader(r), C::NONE) => chunk.numbers(r, Ok),
        (DoubleColumnReader(r), C::NONE) => chunk.numbers(r, Ok),
        _ => unsupported(),
    }
}

fn narrow<V: Copy + std::fmt::Display, T: TryFrom<V>>(value: V) -> Result<T, String> {
    T::try_from(value).map_err(|_| format!("{value} does not fit the declared type"))
}

/// What is to be read of one column of one row group.
struct Chunk<'a> {
    rows: usize,
    first_row: u64,
    leaf: &'a ColumnDescriptor,
}

impl Chunk<'_> {
    /// The values of all rows, and the shape they have: one dimension, or two where each row is a list.
    fn values<T: DataType>(&self, mut reader: ColumnReaderImpl<T>) -> Result<(Vec<T::T>, Vec<usize>), String> {
        let Chunk { rows, first_row, leaf } = *self;
        let (present, nested) = (leaf.max_def_level(), leaf.max_rep_level());
        let (mut values, mut definitions, mut repetitions) = (Vec::new(), Vec::new(), Vec::new());
        let mut read = 0;
        while read < rows {
            // In parts, because the number of rows is only claimed.
            let part = (rows - read).min(1 << 16);
            let (records, _, _) = reader
                .read_records(part, Some(&mut definitions), Some(&mut repetitions), &mut values)
                .map_err(|e| e.to_string())?;
            if records == 0 {
                return Err(format!("ends after {read} of {rows} rows"));
            }
            read += records;
        }
        if let Some(at) = definitions.iter().position(|d| *d < present) {
            let before = if nested == 0 { at } else { repetitions[..=at].iter().filter(|r| **r == 0).count() - 1 };
            return Err(format!("row {} has no value", first_row + before as u64));
        }
        if nested == 0 {
            return Ok((values, vec![rows]));
        }
        if nested > 1 {
            return Err("holds lists of lists; lists of one length are read".into());
        }
        let starts: Vec<usize> = (0..repetitions.len()).filter(|i| repetitions[*i] == 0).collect();
        let length = repetitions.len() / rows;
        match (0..rows).find(|row| starts.get(*row) != Some(&(row * length))) {
            None if repetitions.len() == rows * length => Ok((values, vec![rows, length])),
            odd => {
                let row = first_row + odd.map_or(rows, |row| row).saturating_sub(1) as u64;
                Err(format!("holds lists of different lengths, at row {row}; lists of one length are read"))
            }
        }
    }

    fn numbers<T: DataType, E: Element>(
        &self,
        reader: ColumnReaderImpl<T>,
        convert: impl Fn(T::T) -> Result<E, String>,
    ) -> Result<Cells, String> {
        let (values, shape) = self.values(reader)?;
        let mut converted = Vec::with_capacity(values.len());
        for (at, value) in values.into_iter().enumerate() {
            let row = || self.first_row + (at / shape.get(1).copied().unwrap_or(1).max(1)) as u64;
            converted.push(convert(value).map_err(|reason| format!("row {}: {reason}", row()))?);
        }
        Tensor::new(&shape, &converted).map(Cells::Numbers).map_err(|e| e.to_string())
    }

    fn bytes<T: DataType>(
        &self,
        reader: ColumnReaderImpl<T>,
        convert: impl Fn(T::T) -> ByteArray,
    ) -> Result<Cells, String> {
        if self.leaf.max_rep_level() > 0 {
            return Err("holds lists of texts or bytes; one for each row is read".into());
        }
        let (values, _) = self.values(reader)?;
        // A copy, because a cell that shares its page would keep the page in memory uncounted.
        Ok(Cells::Bytes(values.into_iter().map(|v| Bytes::copy_from_slice(convert(v).data())).collect()))
    }
}

/// The cells at (row group, row in it).
fn collect(held: &HashMap<usize, Arc<Vec<Cells>>>, column: usize, places: &[(usize, usize)]) -> Result<Cells, String> {
    let mut texts = Vec::new();
    let mut bytes = Vec::new();
    let mut like: Option<(DType, Vec<usize>)> = None;
    for (group, row) in places {
        match &held[group][column] {
            Cells::Bytes(cells) => texts.push(cells[*row].clone()),
            Cells::Numbers(tensor) => {
                let (_, shape) = like.get_or_insert_with(|| (tensor.dtype(), tensor.shape().to_vec()));
                if shape[1..] != tensor.shape()[1..] {
                    let (one, other) = (&shape[1..], &tensor.shape()[1..]);
                    return Err(format!("holds lists of {one:?} values in one row group and of {other:?} in another"));
                }
                let row_bytes = tensor.byte_len() / tensor.shape()[0];
                bytes.extend_from_slice(&tensor.bytes()[row * row_bytes..][..row_bytes]);
            }
        }
    }
    Ok(match like {
        None => Cells::Bytes(texts),
        Some((dtype, mut shape)) => {
            shape[0] = places.len();
            Cells::Numbers(tensor_of(dtype, &shape, &bytes))
        }
    })
}

fn digest_of(path: &Path) -> Result<Digest, DataError> {
    let mut file = File::open(path).map_err(DataError::io(path))?;
    let mut hasher = Hasher::new();
    let mut bytes = vec![0; 1 << 20];
    loop {
        match file.read(&mut bytes).map_err(DataError::io(path))? {
            0 => return Ok(hasher.finish()),
            read => hasher.update(&bytes[..read]),
        }
    }
}
