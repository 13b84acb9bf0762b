//! Many shards are one dataset, by manifest, index, pattern and folder; and one that changed is found.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use updraft_data::write::{WriteOptions, mds_index, writer};
use updraft_data::{
    Access, Cells, Column, DataError, Dataset, DatasetConfig, Kind, Loader, LoaderOptions, Manifest, Rows, Schema,
    ShardFacts, ShardFormat, Shards, Wrap,
};
use updraft_graph::{DType, Tensor};
use updraft_sim::{Dialect, ObjectServer};
use updraft_store::{AccessOptions, ObjectFacts, Objects, ReadObjects, StoreError};

use super::{WRITTEN, rows, write};

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
        // Without a manifest, TFRecord has integers of 64 bits only.
        let stored = |cells: &Cells| match cells {
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
fn a_folder_that_is_named_like_a_file_is_found() {
    let server = ObjectServer::start(Dialect::S3, None).unwrap();
    let (url, settings) = server.url_and_settings();
    let objects = Objects::open(&url, &settings, &AccessOptions::default()).unwrap();
    let numbers: Vec<i64> = (0..100).collect();
    let rows = Rows::new(text_schema().into(), vec![Cells::Numbers(Tensor::vector(&numbers))]).unwrap();
    let shard = write(ShardFormat::Mds, &rows, &WriteOptions::default()).0;
    // As Spark writes them; and an object of the name of another's folder.
    for key in ["x.mds/part-0.mds", "x.mds/part-1.mds", "y.mds", "y.mds/part-0.mds"] {
        objects.put(key, shard.clone()).unwrap();
    }
    let access = Access { settings, ..Access::default() };
    let rows = |path: &str| -> Result<u64, DataError> {
        let found = updraft_data::shards::Shards::open(&format!("{url}/{path}"), None, 1 << 20, &access)?;
        Ok(found.readers.iter().map(|reader| reader.rows()).sum())
    };
    for (path, expected) in [("x.mds", 200), ("x.mds/", 200), ("y.mds", 100), ("y.mds/", 100)] {
        assert_eq!(rows(path).unwrap(), expected, "{path}");
    }
    let error = rows("z.mds").unwrap_err().to_string();
    assert!(error.contains("no s3://bucket/z.mds") && !error.contains("z.mds/"), "{error}");
}

#[test]
fn a_shard_that_is_replaced_while_it_is_read_is_an_error_and_not_two_versions() {
    let server = ObjectServer::start(Dialect::S3, None).unwrap();
    let (url, settings) = server.url_and_settings();
    let objects = Objects::open(&url, &settings, &AccessOptions::default()).unwrap();
    let shard = |first: i64| {
        let numbers: Vec<i64> = (first..first + 100).collect();
        let rows = Rows::new(text_schema().into(), vec![Cells::Numbers(Tensor::vector(&numbers))]).unwrap();
        write(ShardFormat::Mds, &rows, &WriteOptions::default()).0
    };
    let (before, after) = (shard(0), shard(1000));
    assert_eq!(before.len(), after.len());
    objects.put("s.mds", before).unwrap();
    let access = Access { settings, ..Access::default() };
    let readers = updraft_data::shards::Shards::open(&format!("{url}/s.mds"), None, 1 << 20, &access).unwrap().readers;
    let read = |row: u64| readers[0].read(&[0], &[row]).map(|cells| cells[0].clone());
    assert_eq!(read(7).unwrap(), Cells::Numbers(Tensor::vector(&[7i64])));
    objects.put("s.mds", after).unwrap();
    let error = read(8).unwrap_err().to_string();
    assert!(error.contains("s.mds") && error.contains("changed"), "{error}");
}

#[test]
fn a_recipe_may_ask_that_shards_are_what_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let rows = folder(ShardFormat::Mds, dir.path(), "manifest");
    let file = dir.path().join("part-1.mds");
    let mut changed = std::fs::read(&file).unwrap();
    *changed.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &changed).unwrap();
    let recipe = |verify: bool| format!("verify = {verify}\n[[tensors]]\nname = {:?}", rows.schema.columns[1].name);
    let path = dir.path().to_str().unwrap();
    assert!(load(path, &recipe(false)).is_ok());
    let error = load(path, &recipe(true)).unwrap_err().to_string();
    assert!(error.contains("part-1.mds") && error.contains("XXH3") && error.contains("changed"), "{error}");
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
fn shards_of_no_bytes_are_named_and_those_of_no_rows_passed_over() {
    for format in WRITTEN {
        let dir = tempfile::tempdir().unwrap();
        let rows = folder(format, dir.path(), "");
        let number =
            rows.schema.columns.iter().find(|c| c.kind == Kind::scalar(DType::I64)).or(rows.schema.columns.get(2));
        let recipe = format!("[[tensors]]\nname = {:?}", number.unwrap().name);
        let path = dir.path().to_str().unwrap().to_owned();
        let (none, _) = write(format, &super::rows(format, &[0, 2, 33, 1], 0, 3), &WriteOptions::default());
        let extra = dir.path().join(format!("part-3.{}", format.name()));
        if !none.is_empty() {
            std::fs::write(&extra, none).unwrap();
            let (tensors, _) = load(&path, &recipe).unwrap();
            assert_eq!(tensors[0].1.shape()[0], 30, "{format}");
        }
        std::fs::write(&extra, b"").unwrap();
        for path in [path.clone(), format!("{path}/part-*")] {
            let error = load(&path, &recipe).unwrap_err().to_string();
            assert!(error.contains(extra.to_str().unwrap()) && error.contains("0 bytes"), "{format}: {error}");
        }
        let rest = format!("{path}/part-{{0..2}}.{}", format.name());
        assert_eq!(load(&rest, &recipe).unwrap().0[0].1.shape()[0], 30, "{format}");
    }
}

#[test]
fn a_dataset_of_no_rows_cannot_be_inspected_either() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zero.tfrecord");
    std::fs::write(&path, b"").unwrap();
    let opened = updraft_data::shards::Shards::open(path.to_str().unwrap(), None, 1 << 20, &Access::default());
    assert!(opened.err().unwrap().to_string().contains("holds no samples"));
}

#[test]
fn what_looks_like_data_beside_shards_is_named_and_notes_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    std::fs::write(dir.path().join("a.jsonl"), "{\"n\":1}\n").unwrap();
    std::fs::create_dir_all(dir.path().join("_delta_log")).unwrap();
    for note in [
        "README.md",
        "_SUCCESS",
        "a.jsonl.crc",
        "notes.txt",
        "dataset_info.json",
        "00000_stats.json",
        "a.idx",
        ".b.csv.gz",
        "_delta_log/000.json",
    ] {
        std::fs::write(dir.path().join(note), "{}").unwrap();
    }
    let recipe = "[[tensors]]\nname = \"n\"";
    load(path, recipe).unwrap();
    for name in ["b.csv.bz2", "b.jsonl.xz", "b.json", "b.avro", "b.orc", "b.tfrecord-1"] {
        let other = dir.path().join(name);
        std::fs::write(&other, "x").unwrap();
        let error = load(path, recipe).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("looks like data") && error.contains("pattern"), "{error}");
        load(path, &format!("format = \"jsonl\"\n{recipe}")).unwrap();
        load(&format!("{path}/*.jsonl"), recipe).unwrap();
        std::fs::remove_file(other).unwrap();
    }
}

/// Reads through, counting bytes.
struct Counted(Arc<dyn ReadObjects>, Arc<AtomicU64>);

impl ReadObjects for Counted {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        self.0.facts(key)
    }

    fn read(&self, key: &str, ranges: &[Range<u64>], expected: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        self.1.fetch_add(ranges.iter().map(|range| range.end - range.start).sum(), Ordering::Relaxed);
        self.0.read(key, ranges, expected)
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
