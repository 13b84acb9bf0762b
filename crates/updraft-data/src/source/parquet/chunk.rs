//! Rows of one column of one row group into cells.

use bytes::Bytes;
use parquet::basic::{ConvertedType, LogicalType, Repetition, Type as PhysicalType};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::schema::types::{ColumnDescriptor, Type};
use updraft_base::units;
use updraft_graph::{DType, Element, Tensor};

use crate::rows::Cells;
use crate::schema::Kind;

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

fn unsupported(leaf: &ColumnDescriptor) -> String {
    match leaf.logical_type_ref() {
        Some(logical) => format!("holds {logical:?}, which is not a number, text or bytes"),
        None => {
            format!("holds {} as {}, which is not a number, text or bytes", leaf.physical_type(), leaf.converted_type())
        }
    }
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
pub(super) fn decode_column(reader: ColumnReader, chunk: &Chunk) -> Result<Cells, String> {
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
            let (values, lengths) = chunk.values(r)?;
            let bytes: Vec<u8> = values.into_iter().map(u8::from).collect();
            chunk.shape(DType::Bool, &bytes, lengths)
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
        _ => Err(unsupported(leaf)),
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

/// Values, and how many each row has where rows are lists.
type Values<T> = (Vec<T>, Option<Vec<usize>>);

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

    /// The values of all rows, and how many each row has where rows are lists.
    fn values<T: DataType>(&self, mut reader: ColumnReaderImpl<T>) -> Result<Values<T::T>, String> {
        let Chunk { runs, leaf, .. } = *self;
        let rows = self.rows();
        let (present, nested) = (leaf.max_def_level(), leaf.max_rep_level());
        if nested > 1 {
            return Err("holds lists of lists; lists of numbers are read".into());
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
        let lengths = if nested == 0 {
            if let Some(at) = definitions.iter().position(|d| *d < present) {
                return Err(format!("row {} has no value", self.row(at)));
            }
            None
        } else {
            Some(self.lengths(&definitions, &repetitions)?)
        };
        // Levels can say that values are there which are not.
        let claimed = lengths.as_ref().map_or(rows, |lengths| lengths.iter().sum());
        if values.len() != claimed || lengths.as_ref().is_some_and(|l| l.len() != rows) {
            return Err(format!("{} values for {rows} rows", values.len()));
        }
        Ok((values, lengths))
    }

    /// The lengths of all lists, whose first elements are marked by a repetition level of 0.
    fn lengths(&self, definitions: &[i16], repetitions: &[i16]) -> Result<Vec<usize>, String> {
        let (present, empty) = (self.leaf.max_def_level(), empty_level(self.root, self.leaf));
        let mut lengths: Vec<usize> = Vec::with_capacity(self.rows());
        for (at, repetition) in repetitions.iter().enumerate() {
            // Without nulls there are no definition levels.
            let definition = definitions.get(at).copied().unwrap_or(present);
            if *repetition == 0 {
                lengths.push(0);
            }
            let row = self.row(lengths.len().saturating_sub(1));
            match lengths.last_mut() {
                Some(length) if definition == present => *length += 1,
                Some(_) if definition == empty && *repetition == 0 => {}
                _ => return Err(format!("row {row} has no value")),
            }
        }
        Ok(lengths)
    }

    /// Elements in native order as the cells of the kind wanted.
    fn shape(&self, dtype: DType, bytes: &[u8], lengths: Option<Vec<usize>>) -> Result<Cells, String> {
        let failed = |e: updraft_graph::TensorError| e.to_string();
        match (self.kind, lengths) {
            (Kind::Number { dtype: wanted, shape }, lengths) if *wanted == dtype => {
                let expected: usize = shape.iter().product();
                let ragged = lengths.iter().flatten().position(|length| *length != expected);
                if let (Some(row), Some(lengths)) = (ragged, &lengths) {
                    let (row, length) = (self.row(row), lengths[row]);
                    return Err(format!(
                        "holds lists of different lengths: {length} in row {row}, {expected} expected"
                    ));
                }
                let shape = [&[self.rows()], shape.as_slice()].concat();
                Tensor::from_bytes(dtype, &shape, bytes).map(Cells::Numbers).map_err(failed)
            }
            (Kind::List { dtype: wanted }, Some(lengths)) if *wanted == dtype => {
                let (mut lists, mut rest) = (Vec::with_capacity(lengths.len()), bytes);
                for length in lengths {
                    let split = rest.split_at_checked(length * dtype.size_in_memory());
                    let (list, behind) = split.ok_or("its lists pass the end of its values")?;
                    lists.push(Tensor::from_bytes(dtype, &[length], list).map_err(failed)?);
                    rest = behind;
                }
                Ok(Cells::Lists(lists))
            }
            (kind, _) => Err(format!("holds {dtype}, not {kind}")),
        }
    }

    fn numbers<T: DataType, E: Element>(
        &self,
        reader: ColumnReaderImpl<T>,
        convert: impl Fn(T::T) -> Result<E, String>,
    ) -> Result<Cells, String> {
        let (values, lengths) = self.values(reader)?;
        let mut converted = Vec::with_capacity(values.len());
        for (at, value) in values.into_iter().enumerate() {
            let row = || match &lengths {
                None => at,
                Some(lengths) => {
                    let mut end = 0;
                    let passes = |length: &usize| {
                        end += length;
                        end > at
                    };
                    lengths.iter().position(passes).unwrap_or(0)
                }
            };
            converted.push(convert(value).map_err(|reason| format!("row {}: {reason}", self.row(row())))?);
        }
        self.shape(E::DTYPE, bytemuck::cast_slice(&converted), lengths)
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
            let cell = Bytes::copy_from_slice(value.data());
            if *self.kind == Kind::Text {
                let row = self.row(cells.len());
                crate::source::cells::check_text(&cell).map_err(|reason| format!("row {row}: {reason}"))?;
            }
            cells.push(cell);
        }
        Ok(Cells::Bytes(cells))
    }
}
