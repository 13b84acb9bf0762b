//! Bytes as shards of datasets: rows or an error that names the object, in bounded memory.
//!
//! Checksums would stop nearly every changed input at the door. Where a format has them, inputs that start with an odd
//! byte get right ones, so that what lies behind is tried too.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use updraft_base::Digest;
use updraft_data::shard::ReadOptions;
use updraft_data::write::{WriteOptions, writer};
use updraft_data::{Cells, Column, Kind, Rows, Schema, ShardFormat, Version, open_shard};
use updraft_store::{ObjectFacts, ReadObjects, StoreError};

/// Objects that all have the same bytes, but for those named.
struct Same {
    bytes: Bytes,
    named: Option<(String, Bytes)>,
}

impl Same {
    fn bytes(&self, key: &str) -> &Bytes {
        match &self.named {
            Some((name, bytes)) if name == key => bytes,
            _ => &self.bytes,
        }
    }
}

impl ReadObjects for Same {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let bytes = self.bytes(key).len() as u64;
        Ok(ObjectFacts { key: key.to_owned(), bytes, etag: None, version: None, modified_ms: 0 })
    }

    fn read(&self, key: &str, ranges: &[Range<u64>], _: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        Ok(ranges.iter().map(|r| self.bytes(key).slice(r.start as usize..r.end as usize)).collect())
    }

    fn name(&self, key: &str) -> String {
        format!("fuzz/{key}")
    }
}

/// Memory that a shard may take.
const MEMORY_BYTES: u64 = 64 << 20;

/// Rows that are read of a file that claims billions.
const ROWS_MAX: u64 = 1 << 16;

/// Blocks that are read whole.
const BLOCKS_MAX: usize = 4;

fn read(format: ShardFormat, key: &str, bytes: Bytes) {
    let objects: Arc<dyn ReadObjects> = Arc::new(Same { bytes, named: None });
    // Requests that cost nothing, so that rows are looked for alone.
    let options = ReadOptions { memory_bytes: MEMORY_BYTES, request_bytes: 1, ..ReadOptions::default() };
    let names_it = |error: &dyn std::error::Error| {
        let text = error.to_string();
        assert!(text.contains("fuzz/") || text.contains("byte"), "an error that names nothing: {text}");
    };
    let reader = match open_shard(&objects, key, format, &options) {
        Ok(reader) => reader,
        Err(error) => return names_it(&error),
    };
    for (block, rows) in reader.blocks().iter().enumerate().take(BLOCKS_MAX) {
        match reader.read_block(block) {
            // Rows without columns cannot be counted.
            Ok(read) => assert!(read.columns.is_empty() || read.len() as u64 == *rows, "{} of {rows}", read.len()),
            Err(error) => names_it(&error),
        }
    }
    let rows: Vec<u64> = (0..reader.rows().min(ROWS_MAX)).collect();
    for (at, column) in reader.schema().columns.iter().enumerate() {
        match reader.read(&[at], &rows) {
            Ok(cells) => {
                assert_eq!(cells.len(), 1);
                assert_eq!(cells[0].len(), rows.len());
                assert!(cells[0].fits(&column.kind), "{} is not {}", column.name, column.kind);
            }
            Err(error) => names_it(&error),
        }
        let few: Vec<u64> = rows.iter().rev().step_by(rows.len().div_ceil(3).max(1)).copied().collect();
        match reader.read(&[at], &few) {
            Ok(cells) => assert_eq!(cells[0].len(), few.len()),
            Err(error) => names_it(&error),
        }
    }
}

/// An MDS shard.
pub fn mds_read(bytes: &[u8]) {
    read(ShardFormat::Mds, "s.mds", Bytes::copy_from_slice(bytes));
}

/// A tar archive.
pub fn tar_read(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if first % 2 == 1 {
        for header in bytes.chunks_exact_mut(512).filter(|h| &h[257..262] == b"ustar") {
            header[148..156].fill(b' ');
            let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
    }
    read(ShardFormat::Tar, "s.tar", bytes.into());
}

/// TFRecord of examples: as it is, or records between bytes of 0xff, framed as they should be.
pub fn tfrecord_read(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    if first % 2 == 0 {
        return read(ShardFormat::TfRecord, "s.tfrecord", Bytes::copy_from_slice(bytes));
    }
    let schema = Arc::new(Schema { columns: vec![Column { name: "record".into(), kind: Kind::Bytes }] });
    let records = bytes.split(|b| *b == 0xff).map(Bytes::copy_from_slice).collect();
    let rows = Rows::new(schema.clone(), vec![Cells::Bytes(records)]).expect("one column of bytes");
    let mut out = writer(ShardFormat::TfRecordRaw, schema, &WriteOptions::default()).expect("records are written");
    out.push(&rows).expect("any bytes are a record");
    let (bytes, _) = out.finish().expect("any records are a shard");
    read(ShardFormat::TfRecord, "s.tfrecord", bytes);
}

/// A Parquet file.
pub fn parquet_read(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    if let Err(panic) = std::panic::catch_unwind(|| read(ShardFormat::Parquet, "s.parquet", bytes)) {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        eprintln!("panicked: {}", text.unwrap_or("no reason given"));
        std::process::abort();
    }
}

/// An Arrow file or stream.
pub fn arrow_read(bytes: &[u8]) {
    read(ShardFormat::Arrow, "s.arrow", Bytes::copy_from_slice(bytes));
}

/// A format that is read whole, or is compressed whole; the first byte says which.
pub fn table_read(bytes: &[u8]) {
    let Some((which, bytes)) = bytes.split_first() else { return };
    let (format, key) = match which % 6 {
        0 => (ShardFormat::Csv, "s.csv"),
        1 => (ShardFormat::JsonLines, "s.jsonl"),
        2 => (ShardFormat::Npz, "s.npz"),
        3 => (ShardFormat::Npy, "s.npy"),
        4 => (ShardFormat::Mds, "s.mds.zstd"),
        _ => (ShardFormat::TfRecord, "s.tfrecord.gz"),
    };
    read(format, key, Bytes::copy_from_slice(bytes));
}

/// A manifest, under the name that its bytes have.
pub fn manifest_read(bytes: &[u8]) {
    let latest = format!("{{\"format\":1,\"digest\":\"{}\"}}", Digest::of(bytes));
    let named = Some(("LATEST".to_owned(), latest.into()));
    let objects = Same { bytes: Bytes::copy_from_slice(bytes), named };
    match Version::load(&objects, None) {
        Ok(version) => assert!(version.is_some(), "the newest version is there"),
        Err(error) => assert!(error.to_string().contains("fuzz/"), "an error that names nothing: {error}"),
    }
}
