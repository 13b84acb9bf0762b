//! TFRecord of `tf.train.Example`, or of records as they are.
//!
//! Features are written in the order of the columns and lists packed, so equal rows give equal bytes.

use std::sync::Arc;

use bytes::Bytes;
use updraft_graph::DType;

use crate::error::DataError;
use crate::manifest::ShardFacts;
use crate::rows::Rows;
use crate::schema::{Kind, Schema};
use crate::source::shard::{BLOCK_BYTES, Block, ShardFormat};
use crate::source::tfrecord::example::stored_as;
use crate::source::tfrecord::masked_crc;
use crate::write::{Cell, ShardWriter, cell, check_rows, refused};

pub(super) struct TfRecordWriter {
    schema: Arc<Schema>,
    raw: bool,
    out: Vec<u8>,
    blocks: Vec<Block>,
    rows: u64,
}

impl TfRecordWriter {
    pub(super) fn new(schema: Arc<Schema>, raw: bool) -> Result<TfRecordWriter, DataError> {
        if raw && !matches!(schema.columns.as_slice(), [only] if matches!(only.kind, Kind::Bytes | Kind::Text)) {
            return Err(DataError::file("shard".as_ref(), "raw records are one column of bytes or text"));
        }
        for column in &schema.columns {
            if let Kind::Number { dtype, .. } | Kind::List { dtype } = &column.kind {
                stored_as(*dtype).map_err(|reason| refused(&column.name, reason))?;
            }
        }
        Ok(TfRecordWriter { schema, raw, out: Vec::new(), blocks: Vec::new(), rows: 0 })
    }

    fn record(&mut self, data: &[u8]) {
        let offset = self.out.len() as u64;
        let length = (data.len() as u64).to_le_bytes();
        self.out.extend_from_slice(&length);
        self.out.extend_from_slice(&masked_crc(&length).to_le_bytes());
        self.out.extend_from_slice(data);
        self.out.extend_from_slice(&masked_crc(data).to_le_bytes());
        match self.blocks.last_mut() {
            Some(block) if self.out.len() as u64 - block.offset <= BLOCK_BYTES => block.rows += 1,
            _ => self.blocks.push(Block { rows: 1, offset }),
        }
        self.rows += 1;
    }
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a field of bytes.
fn put_field(number: u8, bytes: &[u8], out: &mut Vec<u8>) {
    out.push(number << 3 | 2);
    put_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

/// Appends a Feature.
fn put_feature(cell: Cell<'_>, scratch: &mut Vec<u8>, out: &mut Vec<u8>) -> Result<(), String> {
    scratch.clear();
    let mut values = Vec::new();
    let list = match cell {
        Cell::Bytes(bytes) => {
            put_field(1, bytes, scratch);
            1
        }
        Cell::Numbers(dtype, _, elements) => {
            let (stored, _) = stored_as(dtype)?;
            let words = elements.chunks_exact(dtype.size_in_memory());
            if stored == DType::F32 {
                words.for_each(|word| values.extend_from_slice(&float(dtype, word).to_le_bytes()));
            } else {
                for word in words {
                    put_varint(integer(dtype, word)?.cast_unsigned(), &mut values);
                }
            }
            put_field(1, &values, scratch);
            if stored == DType::F32 { 2 } else { 3 }
        }
    };
    put_field(list, scratch, out);
    Ok(())
}

fn word<const BYTES: usize>(bytes: &[u8]) -> [u8; BYTES] {
    bytes.first_chunk().copied().unwrap_or([0; BYTES])
}

fn float(dtype: DType, bytes: &[u8]) -> f32 {
    match dtype {
        DType::F16 => half::f16::from_ne_bytes(word(bytes)).to_f32(),
        DType::BF16 => half::bf16::from_ne_bytes(word(bytes)).to_f32(),
        _ => f32::from_ne_bytes(word(bytes)),
    }
}

fn integer(dtype: DType, bytes: &[u8]) -> Result<i64, String> {
    Ok(match dtype {
        DType::I8 => i8::from_ne_bytes(word(bytes)).into(),
        DType::I16 => i16::from_ne_bytes(word(bytes)).into(),
        DType::I32 => i32::from_ne_bytes(word(bytes)).into(),
        DType::U8 | DType::Bool => bytes.first().copied().unwrap_or(0).into(),
        DType::U16 => u16::from_ne_bytes(word(bytes)).into(),
        DType::U32 => u32::from_ne_bytes(word(bytes)).into(),
        DType::U64 => {
            let value = u64::from_ne_bytes(word(bytes));
            i64::try_from(value).map_err(|_| format!("{value} does not fit the 64-bit integers of an Example"))?
        }
        _ => i64::from_ne_bytes(word(bytes)),
    })
}

impl ShardWriter for TfRecordWriter {
    fn push(&mut self, rows: &Rows) -> Result<(), DataError> {
        check_rows(&self.schema, rows)?;
        let schema = self.schema.clone();
        let (mut features, mut entry, mut feature, mut scratch) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut records = Vec::with_capacity(rows.len());
        for row in 0..rows.len() {
            if self.raw {
                continue;
            }
            features.clear();
            for (column, cells) in schema.columns.iter().zip(&rows.columns) {
                feature.clear();
                put_feature(cell(cells, row), &mut scratch, &mut feature).map_err(|r| refused(&column.name, r))?;
                entry.clear();
                put_field(1, column.name.as_bytes(), &mut entry);
                put_field(2, &feature, &mut entry);
                put_field(1, &entry, &mut features);
            }
            let mut example = Vec::with_capacity(features.len() + 8);
            put_field(1, &features, &mut example);
            records.push(example);
        }
        for row in 0..rows.len() {
            match (self.raw, cell(&rows.columns[0], row)) {
                (true, Cell::Bytes(bytes)) => self.record(bytes),
                _ => self.record(&records[row]),
            }
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.out.len() as u64
    }

    fn rows(&self) -> u64 {
        self.rows
    }

    fn finish(self: Box<Self>) -> Result<(Bytes, ShardFacts), DataError> {
        let format = if self.raw { ShardFormat::TfRecordRaw } else { ShardFormat::TfRecord };
        let bytes = Bytes::from(self.out);
        let mut facts = ShardFacts::new("", format, bytes.len() as u64, self.rows).hashed(&bytes);
        facts.blocks = self.blocks;
        Ok((bytes, facts))
    }
}
