//! Rows of one column of one row group into cells.

use bytes::Bytes;
use parquet::basic::{ConvertedType, LogicalType, Repetition, Type as PhysicalType};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::schema::types::{ColumnDescriptor, Type};
use updraft_graph::{DType, Element, Tensor};

use crate::error::Refusal;
use crate::rows::{Cells, Gap, PartialCells};
use crate::schema::Kind;
use crate::source::cells::check_text;

/// What a leaf of the schema holds: bytes, text, or numbers of a type.
pub(super) enum Leaf {
    Bytes,
    Text,
    Number(DType),
}

impl Leaf {
    /// # Errors
    /// The type that is neither.
    pub(super) fn of(leaf: &ColumnDescriptor) -> Result<Leaf, String> {
        use ConvertedType as C;
        use PhysicalType as P;
        let logical = leaf.logical_type_ref();
        let number = |dtype| Ok(Leaf::Number(dtype));
        match (leaf.physical_type(), leaf.converted_type()) {
            (P::FIXED_LEN_BYTE_ARRAY, _) if logical == Some(&LogicalType::Float16) => number(DType::F16),
            (P::FIXED_LEN_BYTE_ARRAY, C::NONE) if logical == Some(&LogicalType::Uuid) => Ok(Leaf::Bytes),
            // Timestamps in nanoseconds and the like have no converted type.
            (_, C::NONE) if !matches!(logical, None | Some(LogicalType::String)) => Err(unsupported(leaf)),
            (P::BYTE_ARRAY, C::UTF8 | C::ENUM | C::JSON) => Ok(Leaf::Text),
            (P::BYTE_ARRAY, C::NONE) if logical == Some(&LogicalType::String) => Ok(Leaf::Text),
            (P::BYTE_ARRAY, C::NONE | C::BSON) | (P::FIXED_LEN_BYTE_ARRAY, C::NONE) => Ok(Leaf::Bytes),
            (P::BOOLEAN, C::NONE) => number(DType::Bool),
            (P::INT32, C::NONE | C::INT_32) => number(DType::I32),
            (P::INT32, C::INT_8) => number(DType::I8),
            (P::INT32, C::INT_16) => number(DType::I16),
            (P::INT32, C::UINT_8) => number(DType::U8),
            (P::INT32, C::UINT_16) => number(DType::U16),
            (P::INT32, C::UINT_32) => number(DType::U32),
            (P::INT64, C::NONE | C::INT_64) => number(DType::I64),
            (P::INT64, C::UINT_64) => number(DType::U64),
            (P::FLOAT, C::NONE) => number(DType::F32),
            (P::DOUBLE, C::NONE) => number(DType::F64),
            _ => Err(unsupported(leaf)),
        }
    }
}

/// What is said beside a column that is not read.
pub(super) const READ: &str = "numbers, text, bytes and lists of numbers are read";

fn unsupported(leaf: &ColumnDescriptor) -> String {
    use ConvertedType as C;
    let what = match (leaf.logical_type_ref(), leaf.converted_type()) {
        (Some(LogicalType::Unknown), _) => "nothing but nulls".to_owned(),
        (Some(LogicalType::Decimal(_)), _) | (None, C::DECIMAL) => "decimals".to_owned(),
        (Some(LogicalType::Date), _) | (None, C::DATE) => "dates".to_owned(),
        (Some(LogicalType::Time(_)), _) | (None, C::TIME_MILLIS | C::TIME_MICROS) => "times".to_owned(),
        (Some(LogicalType::Timestamp(_)), _) | (None, C::TIMESTAMP_MILLIS | C::TIMESTAMP_MICROS) => {
            "timestamps".to_owned()
        }
        (None, C::NONE) if leaf.physical_type() == PhysicalType::INT96 => "timestamps of 96 bits".to_owned(),
        (Some(logical), _) => format!("{logical:?}"),
        (None, converted) => format!("{} as {converted}", leaf.physical_type()),
    };
    format!("holds {what}; {READ}")
}

/// The definition level of an empty list: that of everything above its elements.
fn empty_level(root: &Type, leaf: &ColumnDescriptor) -> i16 {
    let (mut node, mut level) = (root, 0);
    for part in leaf.path().parts() {
        let Type::GroupType { fields, .. } = node else { break };
        let Some(field) = fields.iter().find(|f| f.name() == part) else { break };
        match field.get_basic_info().has_repetition().then(|| field.get_basic_info().repetition()) {
            Some(Repetition::REPEATED) => break,
            Some(Repetition::OPTIONAL) => level += 1,
            _ => {}
        }
        node = field;
    }
    level
}

/// Reads the rows of the chunk that are asked for.
pub(super) fn decode_column(reader: ColumnReader, chunk: &Chunk) -> Result<PartialCells, Refusal> {
    use ColumnReader::*;
    use ConvertedType as C;
    let leaf = chunk.leaf;
    Leaf::of(leaf)?;
    match (reader, leaf.converted_type()) {
        (FixedLenByteArrayColumnReader(r), _) if leaf.logical_type_ref() == Some(&LogicalType::Float16) => chunk
            .numbers(r, |v| match v.data() {
                [low, high] => Ok(half::f16::from_le_bytes([*low, *high])),
                other => Err(format!("{} bytes are not a 16-bit float", other.len())),
            }),
        (ByteArrayColumnReader(r), C::NONE | C::UTF8 | C::ENUM | C::JSON | C::BSON) => chunk.bytes(r, |v| v),
        (FixedLenByteArrayColumnReader(r), C::NONE) => chunk.bytes(r, |v| v.into()),
        (BoolColumnReader(r), C::NONE) => {
            let Values { values, lengths, gaps } = chunk.values(r)?;
            let bytes: Vec<u8> = values.into_iter().map(u8::from).collect();
            Ok(chunk.shape(DType::Bool, &bytes, lengths, gaps)?)
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
        _ => Err(unsupported(leaf).into()),
    }
}

fn narrow<V: Copy + std::fmt::Display, T: TryFrom<V>>(value: V) -> Result<T, String> {
    T::try_from(value).map_err(|_| format!("{value} does not fit the declared type"))
}

/// Rows that follow each other, in pages that are there.
pub(super) struct Run {
    /// Rows of the pages between the run before and this one.
    pub skip: usize,
    pub rows: usize,
    /// What the first is in the file.
    pub first_row: u64,
}

/// What is to be read of one column of one row group.
pub(super) struct Chunk<'a> {
    pub runs: &'a [Run],
    pub leaf: &'a ColumnDescriptor,
    pub root: &'a Type,
    /// What the column is to be.
    pub kind: &'a Kind,
    pub memory_bytes: u64,
}

/// The values that are there.
struct Values<T> {
    values: Vec<T>,
    /// How many each row has, where rows are lists.
    lengths: Option<Vec<usize>>,
    /// Rows without a value, or with a list that lacks some.
    gaps: Vec<Gap>,
}

impl Chunk<'_> {
    /// The number of rows asked for.
    fn rows(&self) -> usize {
        self.runs.iter().map(|run| run.rows).sum()
    }

    /// What the `at`-th of the rows asked for is in the file.
    fn row(&self, mut at: usize) -> u64 {
        for run in self.runs {
            if at < run.rows {
                return run.first_row + at as u64;
            }
            at -= run.rows;
        }
        at as u64
    }

    fn values<T: DataType>(&self, mut reader: ColumnReaderImpl<T>) -> Result<Values<T::T>, String> {
        let Chunk { runs, leaf, .. } = *self;
        let rows = self.rows();
        let (present, nested) = (leaf.max_def_level(), leaf.max_rep_level());
        if nested > 1 {
            return Err(format!("holds lists of lists; {READ}"));
        }
        let (mut values, mut definitions, mut repetitions) = (Vec::new(), Vec::new(), Vec::new());
        let mut read = 0;
        for run in runs {
            let skipped = if run.skip == 0 { 0 } else { reader.skip_records(run.skip).map_err(|e| e.to_string())? };
            if skipped != run.skip {
                return Err(format!("ends before row {}", run.first_row));
            }
            let end = read + run.rows;
            while read < end {
                // In parts, because the number of rows is only claimed.
                let part = (end - read).min(1 << 16);
                let (records, _, _) = reader
                    .read_records(part, Some(&mut definitions), Some(&mut repetitions), &mut values)
                    .map_err(|e| e.to_string())?;
                if records == 0 {
                    return Err(format!("ends after {read} of {rows} rows"));
                }
                read += records;
            }
        }
        let (lengths, gaps) = if nested == 0 {
            let missing = definitions.iter().enumerate().filter(|(_, definition)| **definition < present);
            (None, missing.map(|(at, _)| Gap::missing(at)).collect())
        } else {
            let (lengths, gaps) = self.lengths(&definitions, &repetitions)?;
            (Some(lengths), gaps)
        };
        // Levels can say that values are there which are not.
        let claimed = match &lengths {
            Some(lengths) => Some(lengths.iter().sum()),
            None => rows.checked_sub(gaps.len()),
        };
        if Some(values.len()) != claimed || lengths.as_ref().is_some_and(|l| l.len() != rows) {
            return Err(format!("{} values for {rows} rows", values.len()));
        }
        Ok(Values { values, lengths, gaps })
    }

    /// The lengths of all lists, whose first elements are marked by a repetition level of 0, and those that lack something.
    fn lengths(&self, definitions: &[i16], repetitions: &[i16]) -> Result<(Vec<usize>, Vec<Gap>), String> {
        let (present, empty) = (self.leaf.max_def_level(), empty_level(self.root, self.leaf));
        let mut lengths: Vec<usize> = Vec::with_capacity(self.rows());
        let mut gaps: Vec<Gap> = Vec::new();
        for (at, repetition) in repetitions.iter().enumerate() {
            // Without nulls there are no definition levels.
            let definition = definitions.get(at).copied().unwrap_or(present);
            if *repetition == 0 {
                lengths.push(0);
            }
            let row = lengths.len().checked_sub(1).ok_or("its first list has no start")?;
            match lengths.last_mut() {
                Some(length) if definition == present => *length += 1,
                Some(_) if definition == empty && *repetition == 0 => {}
                _ if definition < empty && *repetition == 0 => gaps.push(Gap::missing(row)),
                _ if gaps.last().is_none_or(|gap| gap.row != row) => {
                    gaps.push(Gap::fault(row, "has no value for an element of its list"));
                }
                _ => {}
            }
        }
        Ok((lengths, gaps))
    }

    /// Elements in native order as the cells of the kind wanted.
    fn shape(
        &self,
        dtype: DType,
        bytes: &[u8],
        lengths: Option<Vec<usize>>,
        mut gaps: Vec<Gap>,
    ) -> Result<PartialCells, String> {
        let failed = |e: updraft_graph::TensorError| e.to_string();
        let cells = match (self.kind, lengths) {
            (Kind::Number { dtype: wanted, shape }, lengths) if *wanted == dtype => {
                let expected: usize = shape.iter().product();
                for (row, length) in lengths.iter().flatten().enumerate().filter(|(_, length)| **length != expected) {
                    let reason = format!("holds lists of different lengths: {length} here, {expected} expected");
                    gaps.push(Gap::fault(row, reason));
                }
                let shape = [&[self.rows()], shape.as_slice()].concat();
                if gaps.is_empty() {
                    Tensor::from_bytes(dtype, &shape, bytes).map(Cells::Numbers).map_err(failed)?
                } else {
                    gaps.sort_by_key(|gap| gap.row);
                    let spread = self.spread(bytes, dtype.size_in_memory(), lengths.as_deref(), &gaps)?;
                    Tensor::from_bytes(dtype, &shape, &spread).map(Cells::Numbers).map_err(failed)?
                }
            }
            (Kind::List { dtype: wanted }, Some(lengths)) if *wanted == dtype => {
                let (mut lists, mut rest) = (Vec::with_capacity(lengths.len()), bytes);
                for length in lengths {
                    let split = rest.split_at_checked(length * dtype.size_in_memory());
                    let (list, behind) = split.ok_or("its lists pass the end of its values")?;
                    lists.push(Tensor::from_bytes(dtype, &[length], list).map_err(failed)?);
                    rest = behind;
                }
                Cells::Lists(lists)
            }
            (kind, _) => return Err(format!("holds {dtype}, not {kind}")),
        };
        Ok(PartialCells::new(cells, gaps))
    }

    /// Elements with zeros in the place of rows that have none, or too few or too many. `gaps` rise.
    fn spread(
        &self,
        bytes: &[u8],
        element_bytes: usize,
        lengths: Option<&[usize]>,
        gaps: &[Gap],
    ) -> Result<Vec<u8>, String> {
        let row_bytes = self.kind.row_bytes().ok_or("rows of it have no length")?;
        let rows = self.rows();
        // The shape is only claimed, and rows without elements take none of the file.
        let needed = row_bytes.checked_mul(rows).filter(|needed| *needed as u64 <= self.memory_bytes);
        let needed = needed.ok_or_else(|| gaps[0].refusal(self.row(gaps[0].row)))?;
        let (mut spread, mut rest) = (Vec::with_capacity(needed), bytes);
        let mut gaps = gaps.iter().peekable();
        for row in 0..rows {
            let mut is_missing = false;
            while let Some(gap) = gaps.next_if(|gap| gap.row == row) {
                is_missing |= gap.fault.is_none();
            }
            let own_bytes = match lengths {
                Some(lengths) => lengths[row] * element_bytes,
                None if is_missing => 0,
                None => row_bytes,
            };
            let (own, behind) = rest.split_at_checked(own_bytes).ok_or("its rows pass the end of its values")?;
            rest = behind;
            if own_bytes == row_bytes {
                spread.extend_from_slice(own);
            } else {
                spread.resize(spread.len() + row_bytes, 0);
            }
        }
        Ok(spread)
    }

    fn numbers<T: DataType, E: Element>(
        &self,
        reader: ColumnReaderImpl<T>,
        convert: impl Fn(T::T) -> Result<E, String>,
    ) -> Result<PartialCells, Refusal> {
        let Values { values, lengths, mut gaps } = self.values(reader)?;
        let mut converted = Vec::with_capacity(values.len());
        let mut faults: Vec<(usize, String)> = Vec::new();
        for (at, value) in values.into_iter().enumerate() {
            converted.push(convert(value).unwrap_or_else(|reason| {
                faults.push((at, reason));
                E::zeroed()
            }));
        }
        if !faults.is_empty() {
            let rows = self.rows_of_values(lengths.as_deref(), &gaps);
            gaps.extend(faults.into_iter().map(|(at, reason)| Gap::fault(rows[at], reason)));
        }
        Ok(self.shape(E::DTYPE, bytemuck::cast_slice(&converted), lengths, gaps)?)
    }

    /// The row of each value that is there.
    fn rows_of_values(&self, lengths: Option<&[usize]>, gaps: &[Gap]) -> Vec<usize> {
        match lengths {
            Some(lengths) => {
                lengths.iter().enumerate().flat_map(|(row, length)| std::iter::repeat_n(row, *length)).collect()
            }
            None => {
                let is_missing = |row: &usize| gaps.binary_search_by_key(row, |gap| gap.row).is_ok();
                (0..self.rows()).filter(|row| !is_missing(row)).collect()
            }
        }
    }

    fn bytes<T: DataType>(
        &self,
        reader: ColumnReaderImpl<T>,
        convert: impl Fn(T::T) -> ByteArray,
    ) -> Result<PartialCells, Refusal> {
        if self.leaf.max_rep_level() > 0 {
            return Err(format!("holds lists of texts or bytes; {READ}").into());
        }
        let Values { values, mut gaps, .. } = self.values(reader)?;
        let values: Vec<ByteArray> = values.into_iter().map(convert).collect();
        // A dictionary can repeat one long value for every row.
        let needed_bytes = values.iter().fold(0, |sum: u64, value| sum.saturating_add(value.len() as u64));
        if needed_bytes > self.memory_bytes {
            return Err(Refusal::Memory { needed_bytes, allowed_bytes: self.memory_bytes });
        }
        let missing: Vec<usize> = gaps.iter().map(|gap| gap.row).collect();
        let mut missing = missing.into_iter().peekable();
        let mut values = values.iter();
        let mut cells = Vec::with_capacity(self.rows());
        for row in 0..self.rows() {
            if missing.next_if_eq(&row).is_some() {
                cells.push(Bytes::new());
                continue;
            }
            // A copy, because a cell that shares its page would keep the page in memory uncounted.
            let cell = values.next().map(|value| Bytes::copy_from_slice(value.data())).unwrap_or_default();
            if *self.kind == Kind::Text
                && let Err(reason) = check_text(&cell)
            {
                gaps.push(Gap::fault(row, reason));
            }
            cells.push(cell);
        }
        Ok(PartialCells::new(Cells::Bytes(cells), gaps))
    }
}
