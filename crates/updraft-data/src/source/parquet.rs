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
use std::io::{Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use parquet::basic::{Compression, ConvertedType, LogicalType, Type as PhysicalType};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;
use updraft_base::{Digest, digest::Hasher, units};
use updraft_graph::{DType, Element, Tensor};

use crate::error::DataError;
use crate::source::{Cells, Opened, Source, Wanted, tensor_of};

mod pages;

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
    /// The same file once more, for looking at pages before they are decoded.
    file: File,
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
    let again = File::open(path).map_err(DataError::io(path))?;
    let damaged = |reason: String| DataError::file(path, reason);
    let reader = contain(|| SerializedFileReader::new(file).map_err(|e| format!("is damaged or not Parquet: {e}")))
        .map_err(damaged)?;
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
        state: Mutex::new(State { reader, file: again, kept: HashMap::new(), kept_bytes: 0, clock: 0 }),
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

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
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
        let cells = |column: &usize| {
            collect(&held, *column, &places).map_err(|reason| DataError::Sample {
                sample: rows.first().map_or_else(String::new, |row| self.row_name(*row)),
                column: self.columns[*column].0.clone(),
                reason,
            })
        };
        columns.iter().map(cells).collect()
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
        let columns = contain(|| self.decode(state, group)).map_err(|r| DataError::file(&self.path, r))?;
        let bytes = columns.iter().map(Cells::memory_bytes).sum();
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

    fn decode(&self, state: &mut State, group: usize) -> Result<Vec<Cells>, String> {
        let rows = self.block_rows[group] as usize;
        let metadata = state.reader.metadata();
        let leaves = metadata.file_metadata().schema_descr().columns();
        let group_reader = state.reader.get_row_group(group).map_err(|e| format!("row group {group}: {e}"))?;
        let mut columns = Vec::with_capacity(self.columns.len());
        for (name, place) in &self.columns {
            let decoded = check_pages(&mut state.file, metadata.row_group(group).column(*place), self.memory_bytes)
                .and_then(|()| group_reader.get_column_reader(*place).map_err(|e| e.to_string()))
                .and_then(|reader| {
                    let first_row = self.starts[group];
                    let chunk = Chunk { rows, first_row, leaf: &leaves[*place], memory_bytes: self.memory_bytes };
                    decode_column(reader, &chunk)
                });
            columns.push(decoded.map_err(|reason| format!("row group {group}, column `{name}`: {reason}"))?);
        }
        Ok(columns)
    }
}

/// Refuses a column chunk that would take more memory to decode than allowed.
fn check_pages(file: &mut File, chunk: &ColumnChunkMetaData, memory_bytes: u64) -> Result<(), String> {
    let (start, len) = chunk.byte_range();
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(start)).map_err(|e| e.to_string())?;
    file.take(len).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    let values = u64::try_from(chunk.num_values()).map_err(|_| "claims a negative number of values")?;
    let gzip = matches!(chunk.compression(), Compression::GZIP(_));
    let totals = pages::totals(&bytes, values, gzip)?;
    let value_bytes = match chunk.column_type() {
        PhysicalType::BOOLEAN => 1,
        PhysicalType::INT32 | PhysicalType::FLOAT => 4,
        PhysicalType::INT64 | PhysicalType::DOUBLE => 8,
        PhysicalType::INT96 | PhysicalType::BYTE_ARRAY | PhysicalType::FIXED_LEN_BYTE_ARRAY => size_of::<ByteArray>(),
    };
    // Each value may come with two levels.
    let value_bytes = (value_bytes + 2 * size_of::<i16>()) as u64;
    let needed = totals.values.saturating_mul(value_bytes).saturating_add(totals.uncompressed_bytes);
    if needed > memory_bytes {
        let (needed, allowed) = (units::bytes(needed), units::bytes(memory_bytes));
        return Err(format!("its pages claim {needed}, more than memory_bytes = {allowed}"));
    }
    Ok(())
}

/// Runs code of the crate `parquet` on data that may be hostile.
fn contain<T>(decode: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(format!("is damaged: its decoder gave up: {}", text.unwrap_or("no reason given")))
        }
    }
}

fn decode_column(reader: ColumnReader, chunk: &Chunk) -> Result<Cells, String> {
    use ColumnReader::*;
    use ConvertedType as C;
    let leaf = chunk.leaf;
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
    memory_bytes: u64,
}

impl Chunk<'_> {
    /// The values of all rows, and the shape they have: one dimension, or two where each row is a list.
    fn values<T: DataType>(&self, mut reader: ColumnReaderImpl<T>) -> Result<(Vec<T::T>, Vec<usize>), String> {
        let Chunk { rows, first_row, leaf, .. } = *self;
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
        let shape = if nested == 0 { vec![rows] } else { vec![rows, self.list_length(&repetitions)?] };
        // Levels can say that values are there which are not.
        if values.len() != shape.iter().product::<usize>() {
            return Err(format!("{} values for {shape:?}", values.len()));
        }
        Ok((values, shape))
    }

    /// The one length of all lists, whose first elements are marked by a repetition level of 0.
    fn list_length(&self, repetitions: &[i16]) -> Result<usize, String> {
        if self.leaf.max_rep_level() > 1 {
            return Err("holds lists of lists; lists of one length are read".into());
        }
        let length = repetitions.len().checked_div(self.rows).unwrap_or(0);
        let starts_list = |at: usize| at.is_multiple_of(length.max(1)) == (repetitions[at] == 0);
        match (0..repetitions.len()).find(|at| !starts_list(*at)) {
            None => Ok(length),
            Some(at) => {
                let before = repetitions[..at].iter().filter(|r| **r == 0).count();
                let row = self.first_row + before.saturating_sub(1) as u64;
                Err(format!("holds lists of different lengths near row {row}; lists of one length are read"))
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
        let mut cells = Vec::with_capacity(values.len());
        let mut rest_bytes = self.memory_bytes;
        for value in values {
            let value = convert(value);
            // A dictionary can repeat one long value for every row.
            rest_bytes = rest_bytes.checked_sub(value.len() as u64).ok_or_else(|| {
                format!("its values take more than memory_bytes = {}", units::bytes(self.memory_bytes))
            })?;
            // A copy, because a cell that shares its page would keep the page in memory uncounted.
            cells.push(Bytes::copy_from_slice(value.data()));
        }
        Ok(Cells::Bytes(cells))
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
            Cells::Lists(_) => return Err("holds lists of different lengths".into()),
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
    let mut bytes = vec![0; 1 << 16];
    loop {
        match file.read(&mut bytes).map_err(DataError::io(path))? {
            0 => return Ok(hasher.finish()),
            read => hasher.update(&bytes[..read]),
        }
    }
}
