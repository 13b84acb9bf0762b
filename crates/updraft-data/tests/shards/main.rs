//! What is written is read back, and what is damaged is an error that names it.

mod folders;
mod growing;
mod originals;

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
fn a_damaged_record_says_nothing_of_the_columns_and_is_named_when_it_is_read() {
    let rows = rows(ShardFormat::TfRecord, &[0, 2, 33], 6, 1);
    let (bytes, _) = write(ShardFormat::TfRecord, &rows, &WriteOptions::default());
    let options = ReadOptions::default();
    let whole = read(bytes.clone(), ShardFormat::TfRecord, "s.tfrecord", &options).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    for at in 12..12 + length {
        let mut changed = bytes.to_vec();
        changed[at] ^= 0x80;
        let objects: Arc<dyn ReadObjects> = Arc::new(One(changed.into()));
        let reader = open_shard(&objects, "s.tfrecord", ShardFormat::TfRecord, &options).unwrap();
        assert_eq!(reader.schema(), &whole.schema, "byte {at}");
        assert_eq!(reader.read(&[0, 1, 2], &[1, 2, 3, 4, 5]).unwrap(), whole.slice(1..6).columns);
        let error = reader.read(&[0], &[0]).unwrap_err().to_string();
        assert!(error.contains("one/s.tfrecord record 0 (byte 0)") && error.contains("checksum"), "{error}");
    }
    let mut first = bytes[..12 + length + 4].to_vec();
    first[20] ^= 1;
    let error = read(first.into(), ShardFormat::TfRecord, "s.tfrecord", &options).unwrap_err().to_string();
    assert!(error.contains("one/s.tfrecord: byte 0") && error.contains("checksum"), "{error}");
}

#[test]
fn what_follows_the_end_of_an_archive_is_refused_and_never_lost() {
    let rows = rows(ShardFormat::Tar, &[0, 2], 40, 3);
    let (archive, _) = write(ShardFormat::Tar, &rows, &WriteOptions::default());
    let padded = Bytes::from([&archive[..], &[0; 10 << 10]].concat());
    let options = ReadOptions::default();
    assert_eq!(read(padded, ShardFormat::Tar, "s.tar", &options).unwrap().len(), 40);

    let mut zeroed = archive.to_vec();
    zeroed[8192..8192 + 4096].fill(0);
    let joined = [&archive[..], &archive[..]].concat();
    for (bytes, end) in [(zeroed, 8192), (joined, archive.len() - 1024)] {
        let error = read(bytes.into(), ShardFormat::Tar, "s.tar", &options).unwrap_err().to_string();
        assert!(error.contains("one/s.tar") && error.contains("more follows"), "{error}");
        assert!(error.contains(&format!("zeros at byte {end} end the archive")), "{error}");
    }
}

/// A file of an archive: its header, its bytes and what fills its last record.
fn member(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[148..156].fill(b' ');
    header[156] = kind;
    header[257..263].copy_from_slice(b"ustar\0");
    let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut bytes = [&header[..], content].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

#[test]
fn files_stored_without_their_holes_are_refused_by_the_key_that_says_so() {
    for kind in [b'x', b'g'] {
        let pax = member("pax", kind, b"22 GNU.sparse.major=1\n");
        let archive = [pax, member("a.bin", b'0', b"1\n0\n"), vec![0; 1024]].concat();
        let error = read(archive.into(), ShardFormat::Tar, "s.tar", &ReadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("one/s.tar: byte 0") && error.contains("`GNU.sparse.major`"), "{error}");
    }
}

fn jsonl(text: &str) -> Result<Rows, DataError> {
    read(Bytes::from(text.to_owned()), ShardFormat::JsonLines, "s.jsonl", &ReadOptions::default())
}

#[test]
fn whole_numbers_of_json_lines_are_exact_or_refused_by_line_and_column() {
    let numbers = |tensor: Tensor| Cells::Numbers(tensor);
    for (values, expected) in [
        (["1", "-2", "3"], numbers(Tensor::vector(&[1i64, -2, 3]))),
        (["1", "18446744073709551615", "18446744073709551614"], numbers(Tensor::vector(&[1, u64::MAX, u64::MAX - 1]))),
        (["9007199254740992", "0.5", "7"], numbers(Tensor::vector(&[9007199254740992.0, 0.5, 7.0]))),
        (["0.5", "18446744073709551616", "1e3"], numbers(Tensor::vector(&[0.5, 18446744073709551616.0, 1000.0]))),
        (["[1, 2]", "[0.5, 3]", "[4, -5]"], numbers(Tensor::new(&[3, 2], &[1.0, 2.0, 0.5, 3.0, 4.0, -5.0]).unwrap())),
        (
            ["[[1], [2]]", " [ [3] ,[4]]", "[[5],[6]]"],
            numbers(Tensor::new(&[3, 2, 1], &[1i64, 2, 3, 4, 5, 6]).unwrap()),
        ),
        (["true", "false", "true"], numbers(Tensor::from_bools(&[3], &[true, false, true]).unwrap())),
        (
            ["[1]", "[]", "[2, 2.5]"],
            Cells::Lists(vec![Tensor::vector(&[1.0]), Tensor::vector::<f64>(&[]), Tensor::vector(&[2.0, 2.5])]),
        ),
    ] {
        let text = values.map(|value| format!("{{\"a\": \"x\", \"b\\u0063\": {value} }}\n")).concat();
        let rows = jsonl(&text).unwrap_or_else(|e| panic!("{values:?}: {e}"));
        assert_eq!(rows.schema.names(), ["a", "bc"]);
        assert_eq!(rows.columns[1], expected, "{values:?}");
    }
    for (values, line, words) in [
        (["1", "9007199254740993", "0.5"], 2, "`9007199254740993` is not f64"),
        (["0.5", "1", "9007199254740993"], 3, "`9007199254740993` is not f64"),
        (["[1, 2]", "[3, 9007199254740993]", "[0.5, 1]"], 2, "not rounded to it"),
        (["-1", "18446744073709551615", "1"], 2, "`18446744073709551615` is not i64"),
        (["18446744073709551615", "1", "-1"], 3, "`-1` is not u64"),
        (["1", "18446744073709551617", "1"], 2, "64 bits do not hold it"),
        (["1", "1e999", "1"], 2, "no number that 64 bits hold"),
        (["1", "true", "1"], 2, "`true` is not i64"),
        (["1", "null", "1"], 2, "has no value"),
        (["1", "\"x\"", "1"], 2, "is text, not i64"),
        (["\"x\"", "{\"y\": [1]}", "\"x\""], 2, "holds an object"),
        (["[[1]]", "[[1, 2]]", "[[1]]"], 2, "shape [1, 2]"),
        (["[1]", "2", "[1]"], 2, "is no array"),
        (["[1, [2]]", "[1]", "[1]"], 1, "arrays beside numbers"),
    ] {
        let text = values.map(|value| format!("{{\"a\": 1, \"b\": {value}}}\n")).concat();
        let error = jsonl(&text).unwrap_err().to_string();
        assert!(error.contains(&format!("one/s.jsonl line {line}, column `b`: ")) && error.contains(words), "{error}");
    }
}

#[test]
fn a_key_that_is_twice_in_a_line_of_json_is_refused() {
    let error = jsonl("{\"a\": 1}\n\n{\"a\": 1, \"\\u0061\": 2}\n").unwrap_err().to_string();
    assert!(error.contains("one/s.jsonl: line 3: the key `a` is there twice"), "{error}");
}

#[test]
fn json_lines_that_take_more_memory_than_the_file_are_refused_while_they_are_read() {
    let options = ReadOptions { memory_bytes: 1 << 20, ..ReadOptions::default() };
    let many = format!("{{\"a\": [{}1]}}\n", "1,".repeat(100_000));
    let rows = "{\"a\": \"\"}\n".repeat(20_000);
    for text in [many, rows] {
        assert!(text.len() < 1 << 18, "{}", text.len());
        let error = read(text.into(), ShardFormat::JsonLines, "s.jsonl", &options).unwrap_err().to_string();
        assert!(error.contains("one/s.jsonl: line") && error.contains("more than memory_bytes = 1048576"), "{error}");
    }
}

fn arrow(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/arrow").join(name)).unwrap()
}

#[test]
fn rows_that_a_batch_of_arrow_claims_and_does_not_hold_are_refused_when_it_is_opened() {
    let options = ReadOptions::default();
    for (name, words) in [
        ("numbers.arrows", "a buffer of column `x` has 308 bytes"),
        ("texts.arrows", "a buffer of column `x` has 312 bytes"),
        ("widthless.arrows", "of no bytes in column `x`"),
        ("lists.arrows", "of no bytes in column `x`"),
    ] {
        let bytes = arrow(name);
        assert_eq!(read(bytes.clone().into(), ShardFormat::Arrow, name, &options).unwrap().len(), 77, "{name}");
        for claimed in [1u64 << 60, 1 << 31, 1 << 25] {
            let mut bytes = bytes.clone();
            for word in bytes.chunks_exact_mut(8).filter(|word| **word == 77u64.to_le_bytes()) {
                word.copy_from_slice(&claimed.to_le_bytes());
            }
            let objects: Arc<dyn ReadObjects> = Arc::new(One(bytes.into()));
            let error = open_shard(&objects, name, ShardFormat::Arrow, &options).err().unwrap().to_string();
            let words = if claimed == 1 << 25 { words } else { "more than memory_bytes = 1073741824" };
            assert!(error.contains(&format!("one/{name}: batch 0 claims {claimed} rows")), "{error}");
            assert!(error.contains(words), "{error}");
        }
    }
}

#[test]
fn codes_of_arrow_are_read_as_what_their_dictionaries_say() {
    let options = ReadOptions::default();
    let words =
        |words: &[&str]| Cells::Bytes(words.iter().map(|word| Bytes::copy_from_slice(word.as_bytes())).collect());
    let first = ["last", "a", "ü", "", "ü"];
    // The second batch has its dictionary the other way round.
    let both = ["last", "a", "ü", "", "ü", "a", "a", "ü"];
    for (name, expected) in [("codes.arrows", &both[..]), ("codes_zstd.arrows", &both), ("codes.arrow", &first)] {
        let rows = read(arrow(name).into(), ShardFormat::Arrow, name, &options).unwrap();
        assert_eq!(rows.schema.columns.len(), 12);
        for (column, cells) in rows.schema.columns.iter().zip(&rows.columns) {
            let (kind, expected) = match column.name.as_str() {
                "number" => {
                    let numbers = &[3f32, 0.0, 1.0, 2.0, 1.0, 3.0, 3.0, 2.0][..expected.len()];
                    (Kind::scalar(DType::F32), Cells::Numbers(Tensor::vector(numbers)))
                }
                "bytes" => (Kind::Bytes, words(expected)),
                _ => (Kind::Text, words(expected)),
            };
            assert_eq!((&column.kind, cells), (&kind, &expected), "{name} {}", column.name);
        }
    }
    let error = read(arrow("delta.arrows").into(), ShardFormat::Arrow, "s.arrows", &options).unwrap_err().to_string();
    assert!(error.contains("one/s.arrows: byte ") && error.contains("adds to a dictionary"), "{error}");
    check_damage(ShardFormat::Arrow, "s.arrows", arrow("codes_zstd.arrows").into(), 53);
}

#[test]
fn fields_of_arrow_that_share_their_children_are_counted_each_time() {
    let bytes = arrow("shared.arrows");
    let error = read(bytes.into(), ShardFormat::Arrow, "s.arrows", &ReadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("one/s.arrows") && error.contains("too many fields"), "{error}");
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
