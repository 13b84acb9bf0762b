//! Datasets that tests read and write.
#![allow(dead_code, reason = "each test program uses its part")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use updraft_base::Digest;
use updraft_data::ingest::{IngestOptions, commit, ingest_rows};
use updraft_data::shards::Shards;
use updraft_data::write::WriteOptions;
use updraft_data::{Access, Cells, Column, DataError, Kind, Rows, Schema, ShardFormat};
use updraft_graph::{DType, Tensor};
use updraft_store::{AccessOptions, Objects};

pub const ROWS: usize = 700;

pub fn options(format: ShardFormat, shard_rows: u64) -> IngestOptions {
    IngestOptions {
        format,
        write: WriteOptions { row_group_bytes: 16 << 10, ..WriteOptions::default() },
        shard_rows: Some(shard_rows),
        columns: Vec::new(),
        shuffle: None,
        resize: BTreeMap::new(),
        threads: 1,
        memory_bytes: 1 << 30,
        first_unit: 0,
    }
}

pub fn objects(folder: &Path) -> Objects {
    Objects::open(folder.to_str().unwrap(), &BTreeMap::new(), &AccessOptions::default()).unwrap()
}

/// Writes rows as shards of 200 with a manifest.
pub fn write(folder: &Path, format: ShardFormat, rows: &Rows) {
    let (target, options) = (objects(folder), options(format, 200));
    let mut given = Some(rows.clone());
    let next = || Ok::<_, DataError>(given.take());
    let ingested = ingest_rows(&rows.schema, &Digest::of(b"rows"), &target, &options, next).unwrap();
    commit(&ingested, &options, &target).unwrap();
}

/// Numbered rows with a label, an exact fraction, a name and a picture of 500 bytes.
pub fn samples() -> Rows {
    let column = |name: &str, kind| Column { name: name.to_owned(), kind };
    let columns = vec![
        column("id", Kind::scalar(DType::I64)),
        column("label", Kind::scalar(DType::I64)),
        column("x", Kind::scalar(DType::F32)),
        column("name", Kind::Text),
        column("Picture", Kind::Bytes),
    ];
    let ids: Vec<i64> = (0..ROWS as i64).collect();
    let labels: Vec<i64> = ids.iter().map(|i| i * 7 % 5).collect();
    let xs: Vec<f32> = ids.iter().map(|i| (i * 37 % 100) as f32 / 8.0).collect();
    let names = ids.iter().map(|i| Bytes::from(format!("n{}", i % 11))).collect();
    let pictures = ids.iter().map(|i| Bytes::from(vec![*i as u8; 500])).collect();
    let cells = vec![
        Cells::Numbers(Tensor::vector(&ids)),
        Cells::Numbers(Tensor::vector(&labels)),
        Cells::Numbers(Tensor::vector(&xs)),
        Cells::Bytes(names),
        Cells::Bytes(pictures),
    ];
    Rows::new(Arc::new(Schema::new(columns).unwrap()), cells).unwrap()
}

pub fn read_all(source: &str) -> Rows {
    let shards = Shards::open(source, None, 1 << 30, &Access::default()).unwrap();
    let blocks: Vec<Rows> = shards
        .readers
        .iter()
        .flat_map(|reader| (0..reader.blocks().len()).map(|block| reader.read_block(block).unwrap()))
        .collect();
    Rows::concat(&shards.schema, &blocks).unwrap()
}
