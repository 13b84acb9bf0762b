//! Parquet: row groups of a size, statistics, and the page index.
//!
//! Columns are required: there are no nulls in our rows. Numbers of a shape and lists are Parquet lists; which of them a
//! column is, and its shape, stand in the footer under [`SCHEMA_KEY`], which other readers pass over.

use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{Compression, LogicalType, Repetition, Type as PhysicalType, ZstdLevel};
use parquet::data_type::{
    BoolType, ByteArray, ByteArrayType, DataType, DoubleType, FixedLenByteArray, FixedLenByteArrayType, FloatType,
    Int32Type, Int64Type,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
use parquet::schema::types::Type;
use updraft_graph::DType;

use crate::error::DataError;
use crate::manifest::ShardFacts;
use crate::rows::{Cells, Rows};
use crate::schema::{Column, Kind, Schema};
use crate::source::parquet::SCHEMA_KEY;
use crate::source::shard::{Block, ShardFormat};
use crate::write::{ShardWriter, WriteOptions, check_rows, refused};

/// Bytes of a data page before compression; with the page index, what reading a single row costs.
const PAGE_BYTES: usize = 1 << 20;

pub(super) struct ParquetWriter {
    schema: Arc<Schema>,
    writer: SerializedFileWriter<Vec<u8>>,
    /// Rows of the next row group.
    waiting: Vec<Rows>,
    waiting_bytes: u64,
    row_group_bytes: u64,
    blocks: Vec<Block>,
    rows: u64,
}

impl ParquetWriter {
    pub(super) fn new(schema: Arc<Schema>, options: &WriteOptions) -> Result<ParquetWriter, DataError> {
        let mut fields = Vec::with_capacity(schema.columns.len());
        for column in &schema.columns {
            fields.push(Arc::new(field(column)?));
        }
        let root = Type::group_type_builder("schema").with_fields(fields).build().map_err(failed)?;
        let compression = match options.compress {
            true => Compression::ZSTD(ZstdLevel::try_new(3).map_err(failed)?),
            false => Compression::UNCOMPRESSED,
        };
        let json = serde_json::to_string(&*schema).map_err(|e| DataError::file("shard".as_ref(), e.to_string()))?;
        let properties = WriterProperties::builder()
            .set_key_value_metadata(Some(vec![KeyValue::new(SCHEMA_KEY.to_owned(), json)]))
            .set_compression(compression)
            // The default names the version of the crate.
            .set_created_by("updraft".into())
            .set_statistics_enabled(EnabledStatistics::Page)
            .set_data_page_size_limit(PAGE_BYTES)
            .set_max_row_group_row_count(None)
            .build();
        let writer = SerializedFileWriter::new(Vec::new(), root.into(), properties.into()).map_err(failed)?;
        let row_group_bytes = options.row_group_bytes;
        Ok(ParquetWriter {
            schema,
            writer,
            waiting: vec![],
            waiting_bytes: 0,
            row_group_bytes,
            blocks: vec![],
            rows: 0,
        })
    }

    fn flush(&mut self) -> Result<(), DataError> {
        let rows = Rows::concat(&self.schema, &std::mem::take(&mut self.waiting));
        let rows = rows.map_err(|reason| DataError::file("shard".as_ref(), reason))?;
        self.waiting_bytes = 0;
        if rows.is_empty() {
            return Ok(());
        }
        let offset = self.writer.bytes_written() as u64;
        let mut group = self.writer.next_row_group().map_err(failed)?;
        for (column, cells) in self.schema.columns.iter().zip(&rows.columns) {
            let writer = group.next_column().map_err(failed)?;
            let mut writer = writer.ok_or_else(|| refused(&column.name, "has no place in the file"))?;
            write_column(&mut writer, cells).map_err(|e| refused(&column.name, e))?;
            writer.close().map_err(failed)?;
        }
        group.close().map_err(failed)?;
        self.blocks.push(Block { rows: rows.len() as u64, offset });
        Ok(())
    }
}

fn failed(e: ParquetError) -> DataError {
    DataError::file("shard".as_ref(), e.to_string())
}

/// The type of a column.
fn field(Column { name, kind }: &Column) -> Result<Type, DataError> {
    let leaf = |name: &str, physical: PhysicalType, logical: Option<LogicalType>, length: i32| {
        Type::primitive_type_builder(name, physical)
            .with_repetition(Repetition::REQUIRED)
            .with_logical_type(logical)
            .with_length(length)
            .build()
            .map_err(failed)
    };
    let number = |name: &str, dtype: DType| {
        let integer = |bit_width: i8, is_signed: bool| Some(LogicalType::integer(bit_width, is_signed));
        let (physical, logical) = match dtype {
            DType::Bool => (PhysicalType::BOOLEAN, None),
            DType::I8 => (PhysicalType::INT32, integer(8, true)),
            DType::I16 => (PhysicalType::INT32, integer(16, true)),
            DType::I32 => (PhysicalType::INT32, None),
            DType::I64 => (PhysicalType::INT64, None),
            DType::U8 => (PhysicalType::INT32, integer(8, false)),
            DType::U16 => (PhysicalType::INT32, integer(16, false)),
            DType::U32 => (PhysicalType::INT32, integer(32, false)),
            DType::U64 => (PhysicalType::INT64, integer(64, false)),
            DType::F16 => (PhysicalType::FIXED_LEN_BYTE_ARRAY, Some(LogicalType::Float16)),
            DType::F32 => (PhysicalType::FLOAT, None),
            DType::F64 => (PhysicalType::DOUBLE, None),
            other => return Err(refused(name, format!("Parquet has no {other}; cast it to f32"))),
        };
        leaf(name, physical, logical, if dtype == DType::F16 { 2 } else { -1 })
    };
    match kind {
        Kind::Bytes => leaf(name, PhysicalType::BYTE_ARRAY, None, -1),
        Kind::Text => leaf(name, PhysicalType::BYTE_ARRAY, Some(LogicalType::String), -1),
        Kind::Number { dtype, shape } if shape.is_empty() => number(name, *dtype),
        Kind::Number { shape, .. } if shape.contains(&0) => {
            Err(refused(name, format!("rows of shape {shape:?} hold nothing to write")))
        }
        Kind::Number { dtype, .. } | Kind::List { dtype } => {
            let element = number("element", *dtype)?;
            let list = Type::group_type_builder("list")
                .with_repetition(Repetition::REPEATED)
                .with_fields(vec![Arc::new(element)])
                .build()
                .map_err(failed)?;
            Type::group_type_builder(name)
                .with_repetition(Repetition::REQUIRED)
                .with_logical_type(Some(LogicalType::List))
                .with_fields(vec![Arc::new(list)])
                .build()
                .map_err(failed)
        }
    }
}

fn write_column(writer: &mut SerializedColumnWriter<'_>, cells: &Cells) -> Result<(), ParquetError> {
    match cells {
        Cells::Bytes(cells) => {
            let values: Vec<ByteArray> = cells.iter().map(|cell| ByteArray::from(cell.clone())).collect();
            writer.typed::<ByteArrayType>().write_batch(&values, None, None).map(|_| ())
        }
        Cells::Numbers(tensor) => {
            let rows = tensor.shape().first().copied().unwrap_or(0);
            let each = tensor.len().checked_div(rows).unwrap_or(0);
            let lengths = (tensor.rank() > 1).then(|| vec![each; rows]);
            write_numbers(writer, tensor.dtype(), tensor.bytes(), lengths)
        }
        Cells::Lists(lists) => {
            let dtype = lists.first().map_or(DType::F32, |list| list.dtype());
            let bytes: Vec<u8> = lists.iter().flat_map(|list| list.bytes().iter().copied()).collect();
            write_numbers(writer, dtype, &bytes, Some(lists.iter().map(|list| list.len()).collect()))
        }
    }
}

fn write_numbers(
    writer: &mut SerializedColumnWriter<'_>,
    dtype: DType,
    bytes: &[u8],
    lengths: Option<Vec<usize>>,
) -> Result<(), ParquetError> {
    // An element is defined to level 1, an empty list to 0; all elements of a list but the first repeat it.
    let (mut definitions, mut repetitions) = (Vec::new(), Vec::new());
    for length in lengths.iter().flatten() {
        definitions.push(i16::from(*length > 0));
        repetitions.push(0);
        definitions.extend(std::iter::repeat_n(1, length.saturating_sub(1)));
        repetitions.extend(std::iter::repeat_n(1, length.saturating_sub(1)));
    }
    let levels = lengths.is_some().then_some((definitions.as_slice(), repetitions.as_slice()));
    fn put<T: DataType>(
        writer: &mut SerializedColumnWriter<'_>,
        values: Vec<T::T>,
        levels: Option<(&[i16], &[i16])>,
    ) -> Result<(), ParquetError> {
        let (definitions, repetitions) = levels.unzip();
        writer.typed::<T>().write_batch(&values, definitions, repetitions).map(|_| ())
    }
    fn words<const BYTES: usize, V>(bytes: &[u8], convert: impl Fn([u8; BYTES]) -> V) -> Vec<V> {
        bytes.as_chunks::<BYTES>().0.iter().map(|word| convert(*word)).collect()
    }
    match dtype {
        DType::Bool => put::<BoolType>(writer, bytes.iter().map(|b| *b != 0).collect(), levels),
        DType::I8 => put::<Int32Type>(writer, words(bytes, |w| i8::from_ne_bytes(w).into()), levels),
        DType::U8 => put::<Int32Type>(writer, words(bytes, |w| u8::from_ne_bytes(w).into()), levels),
        DType::I16 => put::<Int32Type>(writer, words(bytes, |w| i16::from_ne_bytes(w).into()), levels),
        DType::U16 => put::<Int32Type>(writer, words(bytes, |w| u16::from_ne_bytes(w).into()), levels),
        DType::I32 | DType::U32 => put::<Int32Type>(writer, words(bytes, i32::from_ne_bytes), levels),
        DType::I64 | DType::U64 => put::<Int64Type>(writer, words(bytes, i64::from_ne_bytes), levels),
        DType::F32 => put::<FloatType>(writer, words(bytes, f32::from_ne_bytes), levels),
        DType::F64 => put::<DoubleType>(writer, words(bytes, f64::from_ne_bytes), levels),
        DType::F16 => {
            let half = |word: [u8; 2]| FixedLenByteArray::from(u16::from_ne_bytes(word).to_le_bytes().to_vec());
            put::<FixedLenByteArrayType>(writer, words(bytes, half), levels)
        }
        other => Err(ParquetError::General(format!("Parquet has no {other}"))),
    }
}

impl ShardWriter for ParquetWriter {
    fn push(&mut self, rows: &Rows) -> Result<(), DataError> {
        check_rows(&self.schema, rows)?;
        let bytes = rows.memory_bytes();
        // Pieces of about a quarter of a row group, so that one large push becomes several groups.
        let pieces = (4 * bytes / self.row_group_bytes.max(1)).clamp(1, rows.len().max(1) as u64) as usize;
        let piece = rows.len().div_ceil(pieces).max(1);
        for start in (0..rows.len()).step_by(piece) {
            let part = rows.slice(start..(start + piece).min(rows.len()));
            let bytes = part.memory_bytes();
            if self.waiting_bytes > 0 && self.waiting_bytes + bytes > self.row_group_bytes {
                self.flush()?;
            }
            self.rows += part.len() as u64;
            self.waiting_bytes += bytes;
            self.waiting.push(part);
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.writer.bytes_written() as u64 + self.waiting_bytes
    }

    fn rows(&self) -> u64 {
        self.rows
    }

    fn finish(mut self: Box<Self>) -> Result<(Bytes, ShardFacts), DataError> {
        self.flush()?;
        let bytes = Bytes::from(self.writer.into_inner().map_err(failed)?);
        let mut facts = ShardFacts::new("", ShardFormat::Parquet, bytes.len() as u64, self.rows).hashed(&bytes);
        facts.blocks = self.blocks;
        Ok((bytes, facts))
    }
}
