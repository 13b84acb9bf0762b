//! What is written is read back, from one shard and from many, by manifest, index, pattern and folder; and what lies in
//! between is checked.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use proptest::prelude::*;
use updraft_data::shard::ReadOptions;
use updraft_data::write::{WriteOptions, mds_index, writer};
use updraft_data::{
    Access, Cells, Column, DataError, Dataset, DatasetConfig, Kind, Loader, LoaderOptions, Manifest, Rows, Schema,
    ShardFacts, ShardFormat, Shards, Wrap, open_shard,
};
use updraft_graph::{DType, Tensor};
use updraft_store::{AccessOptions, ObjectFacts, Objects, ReadObjects, StoreError};

/// One object in memory.
struct One(Bytes);

impl ReadObjects for One {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let bytes = self.0.len() as u64;
        Ok(ObjectFacts { key: key.to_owned(), bytes, etag: None, version: None, modified_ms: 0 })
    }

    fn read(&self, _: &str, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, StoreError> {
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

fn memory() -> Objects {
    Objects::open("memory:", &Default::default(), &AccessOptions::default()).unwrap()
}

fn text_schema() -> Schema {
    Schema::new(vec![Column { name: "n".into(), kind: Kind::scalar(DType::I64) }]).unwrap()
}

#[test]
fn of_many_who_append_at_once_every_shard_is_kept_once() {
    let objects = memory();
    let first = Manifest::new(text_schema(), vec![ShardFacts::new("first.mds", ShardFormat::Mds, 1, 1)]);
    let start = first.commit(&objects).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let objects = &objects;
            scope.spawn(move || {
                for at in 0..12 {
                    let shard = ShardFacts::new(&format!("{thread}-{at}.mds"), ShardFormat::Mds, 1, 1);
                    let manifest = Manifest::after(start, text_schema(), vec![shard]);
                    manifest.commit(objects).unwrap();
                    // A retry after success changes nothing.
                    let before = Manifest::load(objects, None).unwrap().unwrap();
                    assert!(before.manifest.shards.iter().any(|s| s.key == format!("{thread}-{at}.mds")));
                    manifest.commit(objects).unwrap();
                }
            });
        }
    });
    let version = Manifest::load(&objects, None).unwrap().unwrap();
    let mut keys: Vec<&str> = version.manifest.shards.iter().map(|s| s.key.as_str()).collect();
    assert_eq!(keys[0], "first.mds");
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 49);
    assert_eq!(version.manifest.samples(), 49);
    // What was the newest version at the start can still be read.
    assert_eq!(Manifest::load(&objects, Some(&start)).unwrap().unwrap().manifest.samples(), 1);
}

#[test]
fn manifests_that_are_damaged_or_lead_outside_are_refused() {
    let objects = memory();
    let digest = Manifest::new(text_schema(), vec![ShardFacts::new("../x.mds", ShardFormat::Mds, 1, 1)])
        .commit(&objects)
        .unwrap();
    let error = Manifest::load(&objects, None).unwrap_err().to_string();
    assert!(error.contains("leads out of the dataset's folder"), "{error}");
    let key = format!("manifests/{}.json", digest.hex());
    objects.put(&key, Bytes::from_static(b"{}")).unwrap();
    let error = Manifest::load(&objects, None).unwrap_err().to_string();
    assert!(error.contains(&key) && error.contains("damaged"), "{error}");
    objects.delete(&key).unwrap();
    assert!(Manifest::load(&objects, None).unwrap_err().to_string().contains("is missing"));
}

/// A folder with three shards of one format, and their rows.
fn folder(format: ShardFormat, dir: &Path, with: &str) -> Rows {
    let options = WriteOptions::default();
    let rows = rows(format, &[0, 2, 33, 1], 30, 3);
    let mut facts = Vec::new();
    for shard in 0..3 {
        let (bytes, known) = write(format, &rows.slice(10 * shard..10 * shard + 10), &options);
        let key = format!("part-{shard}.{}", format.name());
        std::fs::write(dir.join(&key), &bytes).unwrap();
        facts.push(ShardFacts { key, ..known });
    }
    match with {
        "manifest" => {
            let objects = Objects::open(dir.to_str().unwrap(), &Default::default(), &AccessOptions::default()).unwrap();
            Manifest::new((*rows.schema).clone(), facts).commit(&objects).unwrap();
        }
        "index" => std::fs::write(dir.join("index.json"), mds_index(&rows.schema, &facts, &options).unwrap()).unwrap(),
        _ => {}
    }
    rows
}

/// The columns that are numbers of one shape, of all samples in order.
fn load(path: &str, recipe: &str) -> Result<(Vec<(String, Tensor)>, String), DataError> {
    let config: DatasetConfig = toml::from_str(&format!("path = {path:?}\n{recipe}")).unwrap();
    let dataset = Dataset::open(&config, Path::new("/"))?;
    let digest = dataset.facts().digest.to_string();
    let options = LoaderOptions { batch_size: dataset.len() as usize, threads: 0, ..LoaderOptions::default() };
    Ok((Loader::new(dataset.into(), options)?.batch(0)?.tensors, digest))
}

#[test]
fn folders_of_shards_are_one_dataset_by_manifest_index_pattern_and_listing() {
    for format in WRITTEN {
        let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
        let rows = folder(format, dirs[0].path(), "");
        folder(format, dirs[1].path(), "manifest");
        let at = |dir: &tempfile::TempDir, rest: &str| format!("{}{rest}", dir.path().display());
        let column = rows
            .schema
            .columns
            .iter()
            .position(|c| matches!(&c.kind, Kind::Number { shape, .. } if shape.is_empty()))
            .unwrap();
        let name = &rows.schema.columns[column].name;
        let recipe = format!("[[tensors]]\nname = {name:?}");
        let expected = Cells::Numbers(load(&at(&dirs[1], ""), &recipe).unwrap().0.remove(0).1);
        assert_eq!(expected, rows.columns[column], "{format} by manifest");
        let stored = |cells: &Cells| match cells {
            // Without a manifest, TFRecord has integers of 64 bits only.
            Cells::Numbers(tensor) if format == ShardFormat::TfRecord => tensor.to_f64().unwrap(),
            Cells::Numbers(tensor) => tensor.to_f64().unwrap(),
            _ => unreachable!(),
        };
        for (path, what) in [
            (at(&dirs[0], ""), "folder"),
            (at(&dirs[0], "/part-*"), "pattern"),
            (at(&dirs[0], &format!("/part-{{0..2}}.{}", format.name())), "braces"),
            (format!("file://{}", at(&dirs[0], "")), "URL of a folder"),
        ] {
            let (tensors, _) = load(&path, &recipe).unwrap_or_else(|e| panic!("{format} {what}: {e}"));
            assert_eq!(stored(&Cells::Numbers(tensors[0].1.clone())), stored(&expected), "{format} by {what}");
        }
        if format == ShardFormat::Mds {
            folder(format, dirs[2].path(), "index");
            let (tensors, _) = load(&at(&dirs[2], ""), &recipe).unwrap();
            assert_eq!(Cells::Numbers(tensors[0].1.clone()), expected, "by index");
        }
        // Where it lies is not what it is.
        let moved = tempfile::tempdir().unwrap();
        folder(format, moved.path(), "");
        assert_eq!(load(&at(&moved, ""), &recipe).unwrap().1, load(&at(&dirs[0], ""), &recipe).unwrap().1);
    }
}

#[test]
fn shards_that_changed_vanished_or_differ_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let rows = folder(ShardFormat::Mds, dir.path(), "manifest");
    let path = dir.path().to_str().unwrap();
    let config: DatasetConfig = toml::from_str(&format!("path = {path:?}")).unwrap();
    let shards = Shards::find(&config, Path::new("/"), &Access::default()).unwrap();
    assert_eq!(shards.facts.len(), 3);
    (0..3).for_each(|shard| shards.verify(shard).unwrap());
    let name = &rows.schema.columns[1].name;
    let recipe = format!("[[tensors]]\nname = {name:?}");

    let file = dir.path().join("part-1.mds");
    let whole = std::fs::read(&file).unwrap();
    let mut changed = whole.clone();
    *changed.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &changed).unwrap();
    let error = shards.verify(1).unwrap_err().to_string();
    assert!(error.contains("part-1.mds") && error.contains("changed"), "{error}");
    std::fs::write(&file, [&whole[..], b"x"].concat()).unwrap();
    let error = load(path, &recipe).unwrap_err().to_string();
    assert!(error.contains("part-1.mds") && error.contains("was changed"), "{error}");
    std::fs::remove_file(&file).unwrap();
    let error = load(path, &recipe).unwrap_err();
    assert!(format!("{error}").contains("part-1.mds"), "{error}");

    // Two shards of other columns.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.csv"), "x,y\n1,2\n").unwrap();
    std::fs::write(dir.path().join("b.csv"), "x,z\n1,2\n").unwrap();
    let error = load(&format!("{}/*.csv", dir.path().display()), "").unwrap_err().to_string();
    assert!(error.contains("b.csv") && error.contains("a.csv") && error.contains("`y`"), "{error}");
    // A column of whole numbers and one of others is one of numbers.
    std::fs::write(dir.path().join("b.csv"), "x,y\n1.5,2\n").unwrap();
    let (tensors, _) = load(&format!("{}/*.csv", dir.path().display()), "").unwrap();
    assert_eq!(tensors[0].1.as_slice::<f64>().unwrap(), [1.0, 1.5]);
    assert_eq!(tensors[1].1.as_slice::<i64>().unwrap(), [2, 2]);
}

#[test]
fn pickles_and_paths_out_of_the_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let index = |encoding: &str, name: &str| {
        format!(
            r#"{{"version": 2, "shards": [{{"column_encodings": ["{encoding}"], "column_names": ["x"], "column_sizes": [null],
            "compression": null, "format": "mds", "hashes": [], "raw_data": {{"basename": "{name}", "bytes": 10, "hashes": {{}}}},
            "samples": 1, "size_limit": 1, "version": 2, "zip_data": null}}]}}"#
        )
    };
    for (encoding, name, words) in [
        ("pkl", "s.mds", "a pickle runs the code"),
        ("bytes", "../s.mds", "leads out of the folder"),
        ("bytes", "/etc/s.mds", "leads out of the folder"),
        ("ndarray:complex64", "s.mds", "is not understood"),
    ] {
        std::fs::write(dir.path().join("index.json"), index(encoding, name)).unwrap();
        let error = load(dir.path().to_str().unwrap(), "").unwrap_err().to_string();
        assert!(error.contains("index.json") && error.contains(words), "{error}");
    }
}

#[test]
fn empty_datasets_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let error = load(&format!("{}/*.mds", dir.path().display()), "").unwrap_err().to_string();
    assert!(error.contains("holds no samples"), "{error}");
    for format in WRITTEN {
        let rows = rows(format, &[0], 0, 1);
        let dir = tempfile::tempdir().unwrap();
        let (bytes, _) = write(format, &rows, &WriteOptions::default());
        let path = dir.path().join(format!("s.{}", format.name()));
        std::fs::write(&path, bytes).unwrap();
        let error = load(path.to_str().unwrap(), "").unwrap_err().to_string();
        assert!(error.contains("holds no samples"), "{format}: {error}");
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

/// Reads through, counting bytes.
struct Counted(Arc<dyn ReadObjects>, Arc<AtomicU64>);

impl ReadObjects for Counted {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        self.0.facts(key)
    }

    fn read(&self, key: &str, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, StoreError> {
        self.1.fetch_add(ranges.iter().map(|range| range.end - range.start).sum(), Ordering::Relaxed);
        self.0.read(key, ranges)
    }

    fn name(&self, key: &str) -> String {
        self.0.name(key)
    }
}

#[test]
fn row_groups_whose_bounds_no_row_can_meet_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let (groups, group_rows) = (8usize, 50usize);
    let count = groups * group_rows;
    let score = |row: usize| row as f32 / count as f32;
    let schema = Arc::new(
        Schema::new(vec![
            Column { name: "x".into(), kind: Kind::Number { dtype: DType::I64, shape: vec![64] } },
            Column { name: "score".into(), kind: Kind::scalar(DType::F32) },
            Column { name: "flag".into(), kind: Kind::scalar(DType::U32) },
        ])
        .unwrap(),
    );
    let options = WriteOptions { row_group_bytes: 64 * 8 * group_rows as u64, ..WriteOptions::default() };
    let mut shard = writer(ShardFormat::Parquet, schema.clone(), &options).unwrap();
    for group in 0..groups {
        let numbers: Vec<usize> = (group * group_rows..(group + 1) * group_rows).collect();
        // NaN is in no bounds, and passes no condition. A number above 2^31 is not below zero.
        let scores: Vec<f32> = numbers.iter().map(|n| if n % 10 == 9 { f32::NAN } else { score(*n) }).collect();
        let flags: Vec<u32> = numbers.iter().map(|n| if *n < count / 2 { 1 } else { u32::MAX }).collect();
        let x: Vec<i64> = numbers.iter().flat_map(|n| std::iter::repeat_n(*n as i64, 64)).collect();
        let cells = vec![
            Cells::Numbers(Tensor::new(&[group_rows, 64], &x).unwrap()),
            Cells::Numbers(Tensor::vector(&scores)),
            Cells::Numbers(Tensor::vector(&flags)),
        ];
        shard.push(&Rows::new(schema.clone(), cells).unwrap()).unwrap();
    }
    let bytes = shard.finish().unwrap().0;
    std::fs::write(folder.path().join("data.parquet"), &bytes).unwrap();

    let read = |filter: serde_json::Value| {
        let meter = Arc::new(AtomicU64::new(0));
        let counter = meter.clone();
        let wrap: Wrap = Arc::new(move |store| Ok(Arc::new(Counted(store, counter.clone())) as Arc<dyn ReadObjects>));
        let config: DatasetConfig = serde_json::from_value(serde_json::json!({
            "path": "data.parquet", "tensors": [{ "name": "x" }], "filter": filter,
        }))
        .unwrap();
        let access = Access { wrap: Some(wrap), ..Access::default() };
        let dataset = Dataset::open_with(&config, folder.path(), &access).unwrap();
        let loader =
            Loader::new(Arc::new(dataset), LoaderOptions { batch_size: 5, ..LoaderOptions::default() }).unwrap();
        let before = meter.load(Ordering::Relaxed);
        let first = loader.batch(0).unwrap().samples;
        (first, (meter.load(Ordering::Relaxed) - before) as f64 / bytes.len() as f64)
    };
    let last_group = score(count - group_rows);
    for (filter, first, share_max) in [
        // One group of eight, and the footer.
        (serde_json::json!([{ "column": "score", "at_least": last_group }]), count - group_rows, 0.3),
        (serde_json::json!([{ "column": "score", "one_of": [score(count - 3)] }]), count - 3, 0.3),
        (serde_json::json!([{ "column": "flag", "at_least": 2 }]), count / 2, 0.3),
        (serde_json::json!([{ "column": "score", "at_least": 0.0 }]), 0, 0.3),
        (
            serde_json::json!([{ "column": "score", "at_most": 1.0 }, { "column": "flag", "one_of": [u32::MAX] }]),
            count / 2,
            0.3,
        ),
    ] {
        let (samples, share) = read(filter.clone());
        assert_eq!(samples[0], first as u64, "{filter}");
        assert!(share <= share_max, "{filter}: {share}");
    }
}
