//! MDS shards, byte for byte as MosaicML Streaming's writer makes them of the same values.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::error::DataError;
use crate::manifest::ShardFacts;
use crate::rows::Rows;
use crate::schema::Schema;
use crate::source::mds::block_rows;
use crate::source::mds::encoding::Encoding;
use crate::source::shard::{Block, ShardFormat};
use crate::write::{Cell, ShardWriter, WriteOptions, cell, check_rows, put_le, refused};

pub(super) struct MdsWriter {
    schema: Arc<Schema>,
    /// Places in the schema, encodings and sizes, in the order of names that the format asks for.
    columns: Vec<(usize, Encoding, Option<usize>)>,
    description: Vec<u8>,
    samples: Vec<u8>,
    /// Where each sample ends among the samples.
    ends: Vec<u32>,
    compress: bool,
}

/// What describes shards of these columns, in each and in the index; keys sorted, as the original writes them.
fn description(
    names: &[&str],
    encodings: &[String],
    sizes: &[Option<usize>],
    shard_bytes: u64,
    compress: bool,
) -> Value {
    json!({
        "column_encodings": encodings,
        "column_names": names,
        "column_sizes": sizes,
        "compression": if compress { Some("zstd") } else { None },
        "format": "mds",
        "hashes": ["sha256", "xxh3_64"],
        "size_limit": shard_bytes,
        "version": 2,
    })
}

impl MdsWriter {
    pub(super) fn new(schema: Arc<Schema>, options: &WriteOptions) -> Result<MdsWriter, DataError> {
        let mut places: Vec<usize> = (0..schema.columns.len()).collect();
        places.sort_by(|a, b| schema.columns[*a].name.cmp(&schema.columns[*b].name));
        let mut columns = Vec::with_capacity(places.len());
        for place in places {
            let column = &schema.columns[place];
            let encoding = Encoding::of_kind(&column.kind).map_err(|reason| refused(&column.name, reason))?;
            let size = encoding.fixed_bytes();
            columns.push((place, encoding, size));
        }
        let description = description_of(&schema, &columns, options.shard_bytes, options.compress);
        let description = python_json(&description).into_bytes();
        Ok(MdsWriter {
            schema,
            columns,
            description,
            samples: Vec::new(),
            ends: Vec::new(),
            compress: options.compress,
        })
    }

    /// Bytes before the first sample.
    fn head_bytes(&self) -> usize {
        4 + 4 * (self.ends.len() + 1) + self.description.len()
    }
}

fn description_of(
    schema: &Schema,
    columns: &[(usize, Encoding, Option<usize>)],
    shard_bytes: u64,
    compress: bool,
) -> Value {
    let names: Vec<&str> = columns.iter().map(|(place, ..)| schema.columns[*place].name.as_str()).collect();
    let encodings: Vec<String> = columns.iter().map(|(_, encoding, _)| encoding.name()).collect();
    let sizes: Vec<Option<usize>> = columns.iter().map(|(.., size)| *size).collect();
    description(&names, &encodings, &sizes, shard_bytes, compress)
}

/// JSON with the spaces that Python's `json.dumps` puts behind commas and colons, and ASCII only.
fn python_json(value: &Value) -> String {
    fn text(text: &str) -> String {
        let quoted = Value::from(text).to_string();
        let mut out = String::with_capacity(quoted.len());
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                let mut units = [0; 2];
                c.encode_utf16(&mut units).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            }
        }
        out
    }
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(python_json).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let entry = |(key, value): (&String, &Value)| format!("{}: {}", text(key), python_json(value));
            format!("{{{}}}", map.iter().map(entry).collect::<Vec<_>>().join(", "))
        }
        Value::String(string) => text(string),
        other => other.to_string(),
    }
}

impl ShardWriter for MdsWriter {
    fn push(&mut self, rows: &Rows) -> Result<(), DataError> {
        check_rows(&self.schema, rows)?;
        let (samples_before, ends_before) = (self.samples.len(), self.ends.len());
        let mut value = Vec::new();
        let mut head = Vec::new();
        for row in 0..rows.len() {
            head.clear();
            value.clear();
            for (place, encoding, size) in &self.columns {
                let name = &self.schema.columns[*place].name;
                let before = value.len();
                match cell(&rows.columns[*place], row) {
                    Cell::Bytes(bytes) => value.extend_from_slice(bytes),
                    Cell::Numbers(dtype, shape, elements) => {
                        encoding.write_shape(shape, &mut value).map_err(|reason| refused(name, reason))?;
                        put_le(dtype, elements, &mut value);
                    }
                }
                if size.is_none() {
                    let bytes = u32::try_from(value.len() - before);
                    head.extend_from_slice(&bytes.map_err(|_| refused(name, "a value of 4 GiB"))?.to_le_bytes());
                }
            }
            self.samples.extend_from_slice(&head);
            self.samples.extend_from_slice(&value);
            let end = u32::try_from(self.samples.len() + self.head_bytes() + 4);
            let Ok(_) = end else {
                self.samples.truncate(samples_before);
                self.ends.truncate(ends_before);
                let reason = "a shard of MDS ends before 4 GiB; start the next one earlier";
                return Err(DataError::file("shard".as_ref(), reason));
            };
            self.ends.push(self.samples.len() as u32);
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        (self.head_bytes() + self.samples.len()) as u64
    }

    fn rows(&self) -> u64 {
        self.ends.len() as u64
    }

    fn finish(self: Box<Self>) -> Result<(Bytes, ShardFacts), DataError> {
        let head = self.head_bytes();
        let mut out = Vec::with_capacity(head + self.samples.len());
        out.extend_from_slice(&(self.ends.len() as u32).to_le_bytes());
        // The sum fits: each end was checked with the head that it had then, which only grew by its own offsets.
        let first = u32::try_from(head).map_err(|_| DataError::file("shard".as_ref(), "its offsets pass 4 GiB"))?;
        for end in std::iter::once(&0).chain(&self.ends) {
            let offset = first.checked_add(*end);
            let offset = offset.ok_or_else(|| DataError::file("shard".as_ref(), "its offsets pass 4 GiB"))?;
            out.extend_from_slice(&offset.to_le_bytes());
        }
        out.extend_from_slice(&self.description);
        out.extend_from_slice(&self.samples);
        let raw_bytes = out.len() as u64;
        let rows = self.ends.len() as u64;
        let (bytes, name) = if self.compress {
            // The level is that of the original.
            let packed = zstd::bulk::compress(&out, 3).map_err(|e| DataError::file("shard".as_ref(), e.to_string()))?;
            (Bytes::from(packed), "x.mds.zstd")
        } else {
            (Bytes::from(out), "x.mds")
        };
        let mut facts = ShardFacts::new("", ShardFormat::Mds, bytes.len() as u64, rows).hashed(&bytes);
        if rows > 0 {
            let blocks = block_rows(rows, raw_bytes, name);
            facts.blocks = blocks.iter().map(|rows| Block { rows: *rows, offset: 0 }).collect();
        }
        facts.raw_bytes = Some(raw_bytes).filter(|_| self.compress);
        Ok((bytes, facts))
    }
}

/// The `index.json` that lets the original read shards that were written here. `shards` have their keys.
pub fn mds_index(schema: &Schema, shards: &[ShardFacts], options: &WriteOptions) -> Result<Bytes, DataError> {
    let writer = MdsWriter::new(Arc::new(schema.clone()), options)?;
    let description = description_of(schema, &writer.columns, options.shard_bytes, options.compress);
    let mut listed = Vec::with_capacity(shards.len());
    for shard in shards {
        let stored = json!({
            "basename": shard.key,
            "bytes": shard.bytes,
            "hashes": {
                "sha256": shard.sha256.map(|digest| digest.hex()),
                "xxh3_64": shard.xxh3,
            },
        });
        let raw_key = shard.key.strip_suffix(".zstd");
        let (raw, zip) = match raw_key {
            Some(raw_key) => {
                let raw = json!({ "basename": raw_key, "bytes": shard.raw_bytes.unwrap_or(0), "hashes": {} });
                (raw, stored)
            }
            None => (stored, Value::Null),
        };
        let mut entry = description.clone();
        entry["raw_data"] = raw;
        entry["samples"] = shard.samples.into();
        entry["zip_data"] = zip;
        listed.push(entry);
    }
    Ok(json!({ "shards": listed, "version": 2 }).to_string().into())
}
