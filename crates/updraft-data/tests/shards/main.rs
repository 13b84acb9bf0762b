//! What is written is read back, and what is damaged is an error that names it.

mod folders;
mod growing;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use updraft_data::shard::ReadOptions;
use updraft_data::write::{WriteOptions, writer};
use updraft_data::{
    Cells, Column, DataError, Dataset, DatasetConfig, Kind, Loader, LoaderOptions, Rows, Schema, ShardFacts,
    ShardFormat, open_shard,
};
use updraft_graph::{DType, Tensor};
use updraft_store::{ObjectFacts, ReadObjects, StoreError};

/// One object in memory.
struct One(Bytes);

impl ReadObjects for One {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let bytes = self.0.len() as u64;
        Ok(ObjectFacts { key: key.to_owned(), bytes, etag: None, version: None, modified_ms: 0 })
    }

    fn read(&self, _: &str, ranges: &[Range<u64>], _: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        Ok(ranges.iter().map(|r| self.0.slice(r.start as usize..r.end as usize)).collect())
    }

    fn name(&self, key: &str) -> String {
        format!("one/{key}")
    }
}

const WRITTEN: [ShardFormat; 4] = [ShardFormat::Mds, ShardFormat::Parquet, ShardFormat::TfRecord, ShardFormat::Tar];

/// The types of elements that a format holds.
fn dtypes(format: ShardFormat) -> Vec<DType> {
    use DType::*;
    match format {
        ShardFormat::Mds => vec![I8, I16, I32, I64, U8, U16, U32, U64, F16, F32, F64],
        ShardFormat::Parquet => vec![Bool, I8, I16, I32, I64, U8, U16, U32, U64, F16, F32, F64],
        ShardFormat::TfRecord => vec![Bool, I8, I16, I32, I64, U8, U16, U32, F16, BF16, F32],
        _ => vec![Bool, I8, I16, I32, I64, U8, U16, U32, U64, F16, F32, F64],
    }
}

/// Bytes of `count` elements. Halves are kept finite, because conversions of them may quiet a NaN.
fn elements(dtype: DType, count: usize, seed: &mut u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let word = (*seed >> 11).to_ne_bytes();
        match dtype {
            DType::Bool => bytes.push(word[0] & 1),
            DType::F16 => bytes.extend_from_slice(&(u16::from_ne_bytes([word[0], word[1]]) & 0xbbff).to_ne_bytes()),
            DType::BF16 => bytes.extend_from_slice(&(u16::from_ne_bytes([word[0], word[1]]) & 0xbf7f).to_ne_bytes()),
            DType::F32 => bytes.extend_from_slice(&(*seed as i32 as f32).to_ne_bytes()),
            DType::F64 => bytes.extend_from_slice(&(*seed as i64 as f64).to_ne_bytes()),
            DType::U64 => bytes.extend_from_slice(&(*seed >> 1).to_ne_bytes()),
            _ => bytes.extend_from_slice(&word[..dtype.size_in_memory()]),
        }
    }
    bytes
}

/// Rows of every kind that a format holds: the kinds are drawn from `kinds`, all else from `seed`.
fn rows(format: ShardFormat, kinds: &[u8], count: usize, mut seed: u64) -> Rows {
    let dtypes = dtypes(format);
    let (mut columns, mut cells) = (Vec::new(), Vec::new());
    for (at, drawn) in kinds.iter().enumerate() {
        let dtype = dtypes[*drawn as usize / 5 % dtypes.len()];
        let is_tar = format == ShardFormat::Tar;
        let (kind, end) = match drawn % 5 {
            0 => (Kind::Bytes, "bin"),
            1 => (Kind::Text, "txt"),
            2 if is_tar => (Kind::scalar(DType::I64), "cls"),
            2 => (Kind::scalar(dtype), ""),
            3 => (Kind::Number { dtype, shape: vec![2, 3] }, "npy"),
            _ => (Kind::List { dtype }, "npy"),
        };
        let mut made = Vec::new();
        for row in 0..count {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // MDS has no empty arrays.
            let length = (seed >> 40) as usize % 9 + 1;
            made.push(match &kind {
                Kind::Bytes => Bytes::from(elements(DType::U8, length - 1, &mut seed)),
                Kind::Text => Bytes::from("é√a".repeat(length - 1)),
                Kind::Number { dtype, shape } => elements(*dtype, shape.iter().product(), &mut seed).into(),
                Kind::List { dtype } => {
                    elements(*dtype, length - usize::from(format != ShardFormat::Mds && row % 2 == 0), &mut seed).into()
                }
            });
        }
        cells.push(match &kind {
            Kind::Bytes | Kind::Text => Cells::Bytes(made),
            Kind::Number { dtype, shape } => {
                let shape = [&[count], shape.as_slice()].concat();
                Cells::Numbers(Tensor::from_bytes(*dtype, &shape, &made.concat()).unwrap())
            }
            Kind::List { dtype } => {
                let list = |b: &Bytes| Tensor::from_bytes(*dtype, &[b.len() / dtype.size_in_memory()], b).unwrap();
                Cells::Lists(made.iter().map(list).collect())
            }
        });
        columns
            .push(Column { name: format!("{}{at}.{end}", ['q', 'b', 'z'][at % 3]).trim_end_matches('.').into(), kind });
    }
    Rows::new(Arc::new(Schema::new(columns).unwrap()), cells).unwrap()
}

fn write(format: ShardFormat, rows: &Rows, options: &WriteOptions) -> (Bytes, ShardFacts) {
    let mut writer = writer(format, rows.schema.clone(), options).unwrap();
    // In two pieces, which must not show.
    let half = rows.len() / 2;
    writer.push(&rows.slice(0..half)).unwrap();
    writer.push(&rows.slice(half..rows.len())).unwrap();
    assert_eq!(writer.rows(), rows.len() as u64);
    writer.finish().unwrap()
}

fn read(bytes: Bytes, format: ShardFormat, key: &str, options: &ReadOptions) -> Result<Rows, DataError> {
    let objects: Arc<dyn ReadObjects> = Arc::new(One(bytes));
    let reader = open_shard(&objects, key, format, options)?;
    let columns: Vec<usize> = (0..reader.schema().columns.len()).collect();
    let cells = reader.read(&columns, &(0..reader.rows()).collect::<Vec<_>>())?;
    Ok(Rows { schema: reader.schema().clone(), columns: cells })
}

fn key(format: ShardFormat, options: &WriteOptions) -> String {
    let zstd = options.compress && format == ShardFormat::Mds;
    format!("s.{}{}", format.name(), if zstd { ".zstd" } else { "" })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn what_a_writer_wrote_a_reader_reads(
        kinds in prop::collection::vec(any::<u8>(), 1..7),
        count in 1usize..40,
        seed: u64,
        compress: bool,
    ) {
        for format in WRITTEN {
            let rows = rows(format, &kinds, count, seed);
            let options = WriteOptions { compress, row_group_bytes: 500, ..WriteOptions::default() };
            let (bytes, facts) = write(format, &rows, &options);
            prop_assert_eq!(&write(format, &rows, &options).0, &bytes, "{} twice", format);
            prop_assert_eq!(facts.samples, count as u64);
            prop_assert_eq!(facts.bytes, bytes.len() as u64);
            let known = ReadOptions { schema: Some(rows.schema.clone()), blocks: facts.blocks.clone(), ..ReadOptions::default() };
            let key = key(format, &options);
            let back = read(bytes.clone(), format, &key, &known).unwrap();
            prop_assert_eq!(&back, &rows, "{} by its schema", format);

            // Some rows, in another order, some twice.
            let objects: Arc<dyn ReadObjects> = Arc::new(One(bytes.clone()));
            let reader = open_shard(&objects, &key, format, &known).unwrap();
            let mut picks: Vec<u64> = (0..count as u64).rev().step_by(2).collect();
            picks.push(0);
            let last = rows.columns.len() - 1;
            let picked = reader.read(&[last], &picks).unwrap();
            prop_assert_eq!(&picked[0], &rows.columns[last].gather(picks.iter().map(|r| *r as usize)));
            let none = reader.read(&[last], &[]).unwrap();
            prop_assert!(none[0].is_empty() && none[0].fits(&rows.schema.columns[last].kind), "{} of no rows", format);

            // MDS and Parquet know their columns without being told.
            let found = read(bytes, format, &key, &ReadOptions::default()).unwrap();
            prop_assert_eq!(found.len(), count);
            if matches!(format, ShardFormat::Mds | ShardFormat::Parquet) {
                for (column, cells) in rows.schema.columns.iter().zip(&rows.columns) {
                    prop_assert_eq!(found.column(&column.name), Some(cells));
                }
            }
        }
    }
}

fn damaged(bytes: &Bytes, step: usize) -> impl Iterator<Item = Bytes> + '_ {
    let cuts = (0..bytes.len()).map(|at| bytes.slice(..at));
    let changes = (0..bytes.len()).flat_map(move |at| {
        [0x01, 0x80, 0xff].into_iter().map(move |mask| {
            let mut changed = bytes.to_vec();
            changed[at] ^= mask;
            changed.into()
        })
    });
    cuts.chain(changes).step_by(step)
}

/// Reads every damaged version of a shard: an error that names it, or rows, and never a panic.
fn check_damage(format: ShardFormat, key: &str, bytes: Bytes, step: usize) {
    let options = ReadOptions { memory_bytes: 1 << 20, ..ReadOptions::default() };
    read(bytes.clone(), format, key, &options).unwrap();
    let mut errors = 0;
    let mut tried = 0;
    for (index, damaged) in damaged(&bytes, step).enumerate() {
        tried += 1;
        match std::panic::catch_unwind(|| read(damaged, format, key, &options)) {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                errors += 1;
                assert!(error.to_string().contains("one/s."), "{format} damage {index}: {error}");
            }
            Err(_) => panic!("{format} damage {index} panicked"),
        }
    }
    assert!(errors * 4 > tried, "{format}: of {tried} damaged shards only {errors} were noticed");
}

#[test]
fn damaged_shards_are_errors_that_name_them_or_results() {
    let hook = std::panic::take_hook();
    // Panics of the crate `parquet` that the library contains would fill the output.
    std::panic::set_hook(Box::new(move |info| {
        if info.location().is_some_and(|l| l.file().contains("updraft") || l.file().contains("tests/")) {
            hook(info);
        }
    }));
    for (format, compress, step) in [
        (ShardFormat::Mds, false, 3),
        (ShardFormat::Mds, true, 7),
        (ShardFormat::TfRecord, false, 3),
        (ShardFormat::Tar, false, 31),
        (ShardFormat::Parquet, false, 41),
    ] {
        let rows = rows(format, &[0, 1, 2, 33, 34], 3, 7);
        let options = WriteOptions { compress, ..WriteOptions::default() };
        check_damage(format, &key(format, &options), write(format, &rows, &options).0, step);
    }
    let csv = Bytes::from_static(b"a,b,c\n1,2.5,x\n-3,4,\"y,z\"\n");
    let jsonl = Bytes::from_static(b"{\"a\":1,\"b\":[1.5,2],\"c\":\"x\"}\n{\"a\":2,\"b\":[3,4],\"c\":\"\xc3\xa9\"}\n");
    // Most changes of text give other text.
    for (format, key, bytes) in [(ShardFormat::Csv, "s.csv", csv), (ShardFormat::JsonLines, "s.jsonl", jsonl)] {
        let options = ReadOptions::default();
        for damaged in damaged(&bytes, 1) {
            if let Err(error) = read(damaged, format, key, &options) {
                assert!(error.to_string().contains("one/s."), "{error}");
            }
        }
    }
}

#[test]
fn a_changed_byte_of_a_record_is_found_by_its_checksum() {
    let rows = rows(ShardFormat::TfRecord, &[0, 2], 2, 1);
    let (bytes, _) = write(ShardFormat::TfRecord, &rows, &WriteOptions::default());
    let mut changed = bytes.to_vec();
    changed[20] ^= 4;
    let error = read(changed.into(), ShardFormat::TfRecord, "s.tfrecord", &ReadOptions::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("one/s.tfrecord") && (text.contains("checksum") || text.contains("byte 0")), "{text}");
    let cut = read(bytes.slice(..bytes.len() - 1), ShardFormat::TfRecord, "s.tfrecord", &ReadOptions::default());
    assert!(cut.unwrap_err().to_string().contains("are left"));
}

#[test]
fn what_decompresses_past_the_bound_is_refused() {
    let zeros = vec![0u8; 8 << 20];
    let bomb = Bytes::from(zstd::bulk::compress(&zeros, 3).unwrap());
    let options = ReadOptions { memory_bytes: 1 << 20, ..ReadOptions::default() };
    let error = read(bomb, ShardFormat::Mds, "s.mds.zstd", &options).unwrap_err().to_string();
    assert!(error.contains("one/s.mds.zstd") && error.contains("more than memory_bytes"), "{error}");

    use std::io::Write;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&zeros).unwrap();
    let bomb = Bytes::from(gzip.finish().unwrap());
    let error = read(bomb, ShardFormat::TfRecord, "s.tfrecord.gz", &options).unwrap_err().to_string();
    assert!(error.contains("one/s.tfrecord.gz") && error.contains("more than memory_bytes"), "{error}");
}

/// One sample larger than all memory that was allowed, among small ones.
#[test]
fn an_enormous_sample_is_an_error_that_names_it() {
    for format in WRITTEN {
        let dir = tempfile::tempdir().unwrap();
        let schema = Schema::new(vec![Column { name: "b".into(), kind: Kind::Bytes }]).unwrap();
        let cells: Vec<Bytes> =
            (0..4000).map(|row| Bytes::from(vec![row as u8; if row == 12 { 9 << 20 } else { 1024 }])).collect();
        let rows = Rows::new(Arc::new(schema), vec![Cells::Bytes(cells)]).unwrap();
        let name = format!("s.{}", format.name());
        std::fs::write(dir.path().join(&name), write(format, &rows, &WriteOptions::default()).0).unwrap();
        let config = format!(
            "path = {:?}\nmemory_bytes = 8388608\n[[tensors]]\nname = \"b\"\ntransform = [{{ elements = \"u8\" }}]",
            dir.path().join(&name)
        );
        let config: DatasetConfig = toml::from_str(&config).unwrap();
        let outcome = Dataset::open(&config, Path::new("/")).and_then(|dataset| {
            let options = LoaderOptions { batch_size: 10, threads: 0, ..LoaderOptions::default() };
            let loader = Loader::new(dataset.into(), options)?;
            (0..400).try_for_each(|step| loader.batch(step).map(drop))
        });
        let error = outcome.unwrap_err().to_string();
        let place = match format {
            ShardFormat::Parquet => "row group 0 takes",
            ShardFormat::TfRecord => "a record of 9437212 bytes",
            ShardFormat::Tar => "file `000000012.b` of 9437184 bytes",
            _ => "sample 12 (byte 28531): it takes 9.00 MiB",
        };
        assert!(error.contains(&name) && error.contains(place) && error.contains("memory_bytes"), "{format}: {error}");
    }
}

#[test]
fn rows_that_a_format_cannot_hold_are_refused_by_column() {
    let schema = |kind: Kind| Arc::new(Schema::new(vec![Column { name: "x".into(), kind }]).unwrap());
    for (format, kind, words) in [
        (ShardFormat::Mds, Kind::scalar(DType::Bool), "MDS has no bool"),
        (ShardFormat::Parquet, Kind::scalar(DType::BF16), "Parquet has no bf16"),
        (ShardFormat::TfRecord, Kind::scalar(DType::F64), "not f64"),
        (ShardFormat::Tar, Kind::Text, "`txt`"),
        (ShardFormat::Csv, Kind::Text, "is read and not written"),
    ] {
        let error = writer(format, schema(kind), &WriteOptions::default()).err().unwrap().to_string();
        assert!(error.contains(words), "{format}: {error}");
    }
}
