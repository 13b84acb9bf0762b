//! A few rows of a Parquet file are read with the pages that hold them, and are the rows that all pages hold.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use updraft_data::shard::{ReadOptions, ShardReader};
use updraft_data::{Cells, ShardFormat, open_shard};
use updraft_store::{ObjectFacts, ReadObjects, StoreError};

/// One object in memory, and what was read of it.
struct Counted {
    bytes: Bytes,
    read: AtomicU64,
}

impl ReadObjects for Counted {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let bytes = self.bytes.len() as u64;
        Ok(ObjectFacts { key: key.to_owned(), bytes, etag: None, version: None, modified_ms: 0 })
    }

    fn read(&self, _: &str, ranges: &[Range<u64>], _: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        self.read.fetch_add(ranges.iter().map(|range| range.end - range.start).sum(), Ordering::Relaxed);
        Ok(ranges.iter().map(|range| self.bytes.slice(range.start as usize..range.end as usize)).collect())
    }

    fn name(&self, key: &str) -> String {
        format!("one/{key}")
    }
}

/// How a file is written.
#[derive(Debug, Clone, Copy)]
struct Written {
    version: WriterVersion,
    compression: Compression,
    dictionary: bool,
    /// Values are twenty times as large, and as many are in a page as the writer likes.
    large: bool,
    groups: usize,
    group_rows: usize,
}

const GROUP_ROWS: usize = 120;

const COLUMNS: &str = "message m {
    required binary always;
    optional binary perhaps (UTF8);
    required int64 number;
    required group list (LIST) { repeated group list { required float element; } }
}";

/// Values of 1 to 3 KB in pages of a few, numbers, and lists, which pages do not show the rows of.
fn file(written: Written) -> Bytes {
    let properties = WriterProperties::builder()
        .set_writer_version(written.version)
        .set_compression(written.compression)
        .set_dictionary_enabled(written.dictionary)
        .set_data_page_size_limit(16 << 10)
        .set_write_batch_size(if written.large { 1024 } else { 4 });
    // Version 2 would write differences.
    let properties = if written.large { properties.set_encoding(Encoding::PLAIN) } else { properties };
    let properties = properties.build();
    let schema = Arc::new(parse_message_type(COLUMNS).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    for group in 0..written.groups {
        let first = group * written.group_rows;
        let rows: Vec<usize> = (first..first + written.group_rows).collect();
        // Two thirds of the values are one of a few, so that a dictionary is of use until it overflows.
        let bytes = |row: &usize| {
            let name = if row.is_multiple_of(3) { *row } else { row % 5 };
            let length = if written.large { 20_000 } else { 1000 } + name * 37 % 2000;
            ByteArray::from((0..length).map(|at| b'a' + ((name * 31 + at * at) % 26) as u8).collect::<Vec<u8>>())
        };
        let values: Vec<ByteArray> = rows.iter().map(bytes).collect();
        let numbers: Vec<i64> = rows.iter().map(|row| (row * row) as i64).collect();
        let floats: Vec<f32> = (0..2 * rows.len()).map(|at| at as f32).collect();
        let repetitions: Vec<i16> = (0..2 * rows.len()).map(|at| (at % 2) as i16).collect();
        let mut out = writer.next_row_group().unwrap();
        while let Some(mut column) = out.next_column().unwrap() {
            match column.untyped() {
                ColumnWriter::ByteArrayColumnWriter(column) => {
                    column.write_batch(&values, Some(&vec![1; rows.len()]), None).unwrap()
                }
                ColumnWriter::Int64ColumnWriter(column) => column.write_batch(&numbers, None, None).unwrap(),
                ColumnWriter::FloatColumnWriter(column) => {
                    column.write_batch(&floats, Some(&vec![1; floats.len()]), Some(&repetitions)).unwrap()
                }
                _ => unreachable!("the columns above"),
            };
            column.close().unwrap();
        }
        out.close().unwrap();
    }
    writer.into_inner().unwrap().into()
}

fn open(bytes: &Bytes, request_bytes: u64) -> (Arc<Counted>, Arc<dyn ShardReader>) {
    let counted = Arc::new(Counted { bytes: bytes.clone(), read: AtomicU64::new(0) });
    let objects: Arc<dyn ReadObjects> = counted.clone();
    let options = ReadOptions { request_bytes, ..ReadOptions::default() };
    let reader = open_shard(&objects, "s.parquet", ShardFormat::Parquet, &options).unwrap();
    (counted, reader)
}

fn ways() -> impl Strategy<Value = Written> {
    let versions = prop_oneof![Just(WriterVersion::PARQUET_1_0), Just(WriterVersion::PARQUET_2_0)];
    let compressions = prop_oneof![
        Just(Compression::UNCOMPRESSED),
        Just(Compression::SNAPPY),
        Just(Compression::ZSTD(ZstdLevel::default()))
    ];
    (versions, compressions, any::<bool>(), any::<bool>(), 1..4usize, 1..GROUP_ROWS).prop_map(
        |(version, compression, dictionary, large, groups, group_rows)| Written {
            version,
            compression,
            dictionary,
            large,
            groups,
            group_rows,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn rows_of_pages_are_the_rows_of_the_file(
        written in ways(),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let bytes = file(written);
        let count = written.groups * written.group_rows;
        let picks: Vec<u64> = picks.iter().map(|pick| pick.index(count) as u64).collect();
        let (_, by_pages) = open(&bytes, 1);
        let (_, whole) = open(&bytes, u64::MAX);
        for columns in [&[0, 1, 2, 3][..], &[1], &[2, 0]] {
            let all = whole.read(columns, &(0..count as u64).collect::<Vec<_>>()).unwrap();
            let expected: Vec<Cells> =
                all.iter().map(|cells| cells.gather(picks.iter().map(|row| *row as usize))).collect();
            prop_assert_eq!(by_pages.read(columns, &picks).unwrap(), expected);
        }
    }
}

#[test]
fn one_row_takes_a_page_or_a_value_and_not_its_row_group() {
    for (version, compression, large, part) in [
        (WriterVersion::PARQUET_1_0, Compression::UNCOMPRESSED, false, 6),
        (WriterVersion::PARQUET_1_0, Compression::SNAPPY, false, 6),
        (WriterVersion::PARQUET_1_0, Compression::UNCOMPRESSED, true, 100),
        (WriterVersion::PARQUET_2_0, Compression::UNCOMPRESSED, true, 100),
    ] {
        let bytes = file(Written { version, compression, dictionary: false, large, groups: 2, group_rows: GROUP_ROWS });
        let (counted, reader) = open(&bytes, 1);
        // The second may have nulls, and says that it has none.
        for column in [0, 1] {
            counted.read.store(0, Ordering::Relaxed);
            let row_bytes = reader.row_bytes(1, &[column]).unwrap();
            let located = counted.read.swap(0, Ordering::Relaxed);
            reader.read(&[column], &[GROUP_ROWS as u64 + 70]).unwrap();
            let read = counted.read.load(Ordering::Relaxed);
            let group = reader.block_bytes(1, &[column]);
            assert!(
                read <= 2 * row_bytes && part * read < group,
                "{version:?} {large} column {column}: {read} of {group}, {row_bytes} expected"
            );
            assert!(6 * located < group, "{located} read to find pages of {group}");
        }

        // From afar, a request for each header would cost more than the row group.
        let (_, afar) = open(&bytes, 5 << 20);
        assert_eq!(afar.row_bytes(1, &[0]), None);
    }
}

#[test]
fn damaged_pages_are_errors_that_name_the_file_or_rows() {
    // Panics of the crate `parquet` that the library contains would fill the output.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.location().is_some_and(|l| l.file().contains("updraft") || l.file().contains("tests/")) {
            hook(info);
        }
    }));
    let (mut tried, mut errors) = (0, 0);
    for (version, compression, large) in [
        (WriterVersion::PARQUET_2_0, Compression::UNCOMPRESSED, false),
        (WriterVersion::PARQUET_2_0, Compression::SNAPPY, false),
        (WriterVersion::PARQUET_1_0, Compression::UNCOMPRESSED, true),
    ] {
        let whole = file(Written { version, compression, dictionary: !large, large, groups: 1, group_rows: 60 });
        // Headers are a few bytes among thousands, so every byte of the first page's and some of all others.
        for at in (4..100).chain((100..whole.len()).step_by(if large { 997 } else { 97 })) {
            for mask in [0x01, 0x80, 0xff] {
                let mut damaged = whole.to_vec();
                damaged[at] ^= mask;
                let objects: Arc<dyn ReadObjects> =
                    Arc::new(Counted { bytes: damaged.into(), read: AtomicU64::new(0) });
                let options = ReadOptions { request_bytes: 1, memory_bytes: 1 << 20, ..ReadOptions::default() };
                tried += 1;
                let read = open_shard(&objects, "s.parquet", ShardFormat::Parquet, &options)
                    .and_then(|reader| reader.read(&[0, 1], &[9, 41]));
                match read {
                    Ok(cells) => assert!(cells.iter().all(|cells| cells.len() == 2)),
                    Err(error) => {
                        errors += 1;
                        assert!(error.to_string().contains("one/s.parquet"), "{error}");
                    }
                }
            }
        }
    }
    assert!(errors > 30, "of {tried} damaged files only {errors} were noticed");
}
