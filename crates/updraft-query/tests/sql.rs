//! Answers of queries are those computed by hand from the rows that our readers give, whatever the format.
#![cfg(feature = "datafusion")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use serde_json::{Value, json};
use support::{ROWS, objects, options, read_all, samples, write};
use tempfile::TempDir;
use updraft_data::ingest::commit;
use updraft_data::shards::Shards;
use updraft_data::{Access, Cells, Column, Kind, Rows, Schema, ShardFormat};
use updraft_graph::{DType, Tensor};
use updraft_query::{Query, QueryError, QueryOptions};
use updraft_store::{ObjectFacts, ReadObjects, StoreError};

mod support;

const OPTIONS: QueryOptions = QueryOptions { threads: 3, memory_bytes: 256 << 20 };

fn write_csv(path: &Path, rows: &Rows) {
    let mut text = String::from("id,label,x,name\n");
    for Sample { id, label, x, name } in by_hand(rows) {
        text.push_str(&format!("{id},{label},{x},{name}\n"));
    }
    std::fs::write(path, text).unwrap();
}

#[derive(Clone)]
struct Sample {
    id: i64,
    label: i64,
    x: f64,
    name: String,
}

/// The rows one by one.
fn by_hand(rows: &Rows) -> Vec<Sample> {
    let numbers = |name: &str| match rows.column(name).unwrap() {
        Cells::Numbers(tensor) => tensor.to_f64().unwrap(),
        _ => panic!("{name} holds no numbers"),
    };
    let Cells::Bytes(names) = rows.column("name").unwrap() else { panic!("names are text") };
    let (ids, labels, xs) = (numbers("id"), numbers("label"), numbers("x"));
    let sample = |at: usize| Sample {
        id: ids[at] as i64,
        label: labels[at] as i64,
        x: xs[at],
        name: String::from_utf8(names[at].to_vec()).unwrap(),
    };
    (0..rows.len()).map(sample).collect()
}

fn plan_with(folder: &Path, sql: &str, options: &QueryOptions, access: &Access) -> Result<Query, QueryError> {
    let open = |name: &str| Shards::open(folder.join(name).to_str().unwrap(), None, 1 << 30, access);
    Query::plan(sql, &["digits".to_owned()], options, open)
}

fn plan(folder: &Path, sql: &str) -> Result<Query, QueryError> {
    plan_with(folder, sql, &OPTIONS, &Access::default())
}

fn ask(folder: &Path, sql: &str) -> Vec<Value> {
    plan(folder, sql).and_then(|query| query.first_rows(10_000)).unwrap_or_else(|e| panic!("{sql}: {e}")).json()
}

/// Columns of an archive are the ends of the names of its files, from which readers know what they hold.
const TAR: [(&str, &str); 5] =
    [("id", "id.cls"), ("label", "label.cls"), ("x", "x.npy"), ("name", "name.txt"), ("Picture", "picture.bin")];

fn renamed(rows: &Rows, of: impl Fn(&str) -> Option<&'static str>) -> Rows {
    let columns = rows.schema.columns.iter().zip(&rows.columns);
    let named = columns.filter_map(|(column, cells)| {
        Some((Column { name: of(&column.name)?.to_owned(), kind: column.kind.clone() }, cells.clone()))
    });
    let (columns, cells) = named.unzip();
    Rows::new(Arc::new(Schema::new(columns).unwrap()), cells).unwrap()
}

/// A folder with the samples in several formats, by names that say which.
fn datasets() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let rows = samples();
    for (name, format) in
        [("parquet", ShardFormat::Parquet), ("mds", ShardFormat::Mds), ("tfrecord", ShardFormat::TfRecord)]
    {
        write(&folder.path().join(name), format, &rows);
    }
    let in_tar = renamed(&rows, |name| TAR.iter().find(|(plain, _)| *plain == name).map(|(_, in_tar)| *in_tar));
    write(&folder.path().join("tar"), ShardFormat::Tar, &in_tar);
    write_csv(&folder.path().join("table.csv"), &rows);
    folder
}

#[test]
fn answers_are_those_computed_by_hand_from_the_rows_of_our_readers() {
    let folder = datasets();
    let folder = folder.path();
    for source in ["parquet", "mds", "tfrecord", "table.csv", "tar"] {
        let mut rows = read_all(folder.join(source).to_str().unwrap());
        let mut table = format!("'{source}'");
        if source == "tar" {
            rows = renamed(&rows, |name| TAR.iter().find(|(_, in_tar)| *in_tar == name).map(|(plain, _)| *plain));
            let columns: Vec<String> =
                TAR.iter().map(|(plain, in_tar)| format!("\"{in_tar}\" as \"{plain}\"")).collect();
            table = format!("(select {} from 'tar')", columns.join(", "));
        }
        let rows = by_hand(&rows);
        assert_eq!(rows.len(), ROWS, "{source}");

        let mut groups: BTreeMap<i64, Vec<&Sample>> = BTreeMap::new();
        for row in rows.iter().filter(|row| row.id % 3 == 0 && row.name != "n4") {
            groups.entry(row.label).or_default().push(row);
        }
        let expected: Vec<Value> = groups
            .iter()
            .map(|(label, rows)| {
                let sum: f64 = rows.iter().map(|row| row.x).sum();
                json!({ "label": label, "n": rows.len(), "total": sum, "mean": sum / rows.len() as f64,
                        "last": rows.iter().map(|row| row.id).max() })
            })
            .collect();
        let sql = format!(
            "select label, count(*) as n, sum(x) as total, avg(x) as mean, max(id) as last from {table} \
             where id % 3 = 0 and name <> 'n4' group by label order by label"
        );
        assert_eq!(ask(folder, &sql), expected, "{source}");

        let mut sorted = rows.clone();
        sorted.sort_by(|a, b| b.x.total_cmp(&a.x).then(a.id.cmp(&b.id)));
        let expected: Vec<Value> = sorted[3..10].iter().map(|row| json!({ "id": row.id, "name": row.name })).collect();
        let sql = format!("select id, name from {table} order by x desc, id limit 7 offset 3");
        assert_eq!(ask(folder, &sql), expected, "{source}");

        // Two datasets of two formats, one of them twice.
        let mut pairs: BTreeMap<&str, usize> = BTreeMap::new();
        for a in &rows {
            *pairs.entry(&a.name).or_default() += rows.iter().filter(|b| b.id == a.id + 100 && b.label < 2).count();
        }
        let expected: Vec<Value> =
            pairs.iter().filter(|(_, n)| **n > 0).map(|(name, n)| json!({ "name": name, "n": n })).collect();
        let sql = format!(
            "select a.name, count(*) as n from {table} a join 'parquet' b on b.id = a.id + 100 join {table} c \
             on c.id = b.id where b.label < 2 group by a.name order by a.name"
        );
        assert_eq!(ask(folder, &sql), expected, "{source}");

        // Parts of a union come as they are written, the long one before the short one.
        let sql = format!("select id from {table} union all select id from 'mds' limit {}", ROWS + 3);
        let ids: Vec<i64> = ask(folder, &sql).iter().map(|row| row["id"].as_i64().unwrap()).collect();
        assert_eq!(ids, (0..ROWS as i64).chain(0..3).collect::<Vec<_>>(), "{source}");

        let first: Vec<i64> = ask(folder, &format!("select id from {table} limit 5"))
            .iter()
            .map(|row| row["id"].as_i64().unwrap())
            .collect();
        assert_eq!(first, [0, 1, 2, 3, 4], "{source}: rows come in their order");
    }
}

#[test]
fn every_kind_of_column_goes_through_a_query_into_a_dataset_and_comes_out_the_same() {
    let column = |name: &str, kind| Column { name: name.to_owned(), kind };
    let dtypes = [
        DType::Bool,
        DType::I8,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::U8,
        DType::U16,
        DType::U32,
        DType::U64,
        DType::F16,
        DType::F32,
        DType::F64,
    ];
    let count = 23;
    let values = |n: usize| (0..n).map(|i| (i * 5 % 7) as f64).collect::<Vec<_>>();
    let (mut columns, mut cells) = (Vec::new(), Vec::new());
    for dtype in dtypes {
        for shape in [vec![], vec![3], vec![2, 2]] {
            let elements = count * shape.iter().product::<usize>();
            let whole = [&[count], shape.as_slice()].concat();
            columns.push(column(&format!("{dtype}_{}", shape.len()), Kind::Number { dtype, shape }));
            cells.push(Cells::Numbers(Tensor::from_f64(dtype, &whole, &values(elements)).unwrap()));
        }
        columns.push(column(&format!("{dtype}_list"), Kind::List { dtype }));
        let list = |row: usize| Tensor::from_f64(dtype, &[row % 4], &values(row % 4)).unwrap();
        cells.push(Cells::Lists((0..count).map(list).collect()));
    }
    columns.push(column("text", Kind::Text));
    cells.push(Cells::Bytes((0..count).map(|row| Bytes::from("ä".repeat(row % 3))).collect()));
    columns.push(column("bytes", Kind::Bytes));
    cells.push(Cells::Bytes((0..count).map(|row| Bytes::from(vec![0xff; row % 5])).collect()));
    let rows = Rows::new(Arc::new(Schema::new(columns).unwrap()), cells).unwrap();

    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("all"), ShardFormat::Parquet, &rows);
    let query = plan(folder.path(), "select * from 'all'").unwrap();
    let (target, options) = (objects(&folder.path().join("again")), options(ShardFormat::Parquet, 10));
    let ingested = query.write(&target, &options).unwrap();
    assert_eq!((ingested.rows, ingested.shards.len(), ingested.made), (count as u64, 3, 3));
    commit(&ingested, &options, &target).unwrap();
    let again = read_all(folder.path().join("again").to_str().unwrap());
    for (at, column) in rows.schema.columns.iter().enumerate() {
        assert_eq!(again.schema.columns[at], *column);
        assert!(again.columns[at] == rows.columns[at], "{}", column.name);
    }
}

#[test]
fn an_answer_is_the_same_to_the_bit_for_any_threads_and_is_written_once() {
    let folder = datasets();
    let folder = folder.path();
    // Sums of these depend on their order, and groups come in the order of their first rows.
    let sql = "select label, sum(1.0 / (1 + id)) as s, avg(sqrt(x)) as r, count(distinct name) as n \
               from (select * from 'mds' union all select * from 'parquet' union all select * from 'tfrecord') \
               group by label";
    let mut versions = Vec::new();
    let mut files = Vec::new();
    for (threads, target) in [(1, "one"), (4, "four"), (4, "four")] {
        let query = plan_with(folder, sql, &QueryOptions { threads, ..OPTIONS }, &Access::default()).unwrap();
        let (objects, options) = (objects(&folder.join(target)), options(ShardFormat::Mds, 2));
        let ingested = query.write(&objects, &options).unwrap();
        let is_first = versions.len() < 2;
        assert_eq!((ingested.rows, ingested.made), (5, if is_first { 3 } else { 0 }), "{target}");
        versions.push(commit(&ingested, &options, &objects).unwrap());
        files.push(ingested.shards.iter().map(|shard| objects.get(&shard.key).unwrap()).collect::<Vec<_>>());
    }
    assert!(versions.iter().all(|version| *version == versions[0]));
    assert!(files.iter().all(|shards| *shards == files[0]));
}

/// Counts what is read of the store.
struct Metered {
    inner: Arc<dyn ReadObjects>,
    bytes: Arc<AtomicU64>,
}

impl ReadObjects for Metered {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        self.inner.facts(key)
    }

    fn read(&self, key: &str, ranges: &[Range<u64>], expected: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        self.bytes.fetch_add(ranges.iter().map(|range| range.end - range.start).sum(), Ordering::Relaxed);
        self.inner.read(key, ranges, expected)
    }

    fn name(&self, key: &str) -> String {
        self.inner.name(key)
    }
}

#[test]
fn a_query_reads_the_columns_and_shards_that_it_needs_and_no_rows_for_what_the_manifest_says() {
    let folder = datasets();
    let folder = folder.path();
    let bytes = Arc::new(AtomicU64::new(0));
    let meter = bytes.clone();
    let wrap = move |inner| Ok(Arc::new(Metered { inner, bytes: meter.clone() }) as Arc<dyn ReadObjects>);
    let access = Access { wrap: Some(Arc::new(wrap)), ..Access::default() };
    let read_by = |sql: &str| {
        // Opening reads the ends of files, which is not of the query.
        let query = plan_with(folder, sql, &OPTIONS, &access).unwrap();
        bytes.store(0, Ordering::Relaxed);
        let answer = query.first_rows(10_000).unwrap().json();
        (bytes.load(Ordering::Relaxed), answer)
    };
    let (all, _) = read_by("select * from 'parquet'");
    assert!(all > 500 * ROWS as u64 / 8, "pictures of {ROWS} rows are read: {all} bytes");

    let (some, answer) = read_by("select sum(label) as s from 'parquet'");
    assert_eq!(answer, [json!({ "s": 1400 })]);
    assert!(some > 0 && some < all / 10, "one column of small numbers: {some} of {all} bytes");

    for (sql, expected) in [
        ("select count(*) as n from 'parquet'", json!({ "n": 700 })),
        ("select min(id) as a, max(label) as b from 'parquet'", json!({ "a": 0, "b": 4 })),
        ("select count(*) as n from 'parquet' where id > 5000", json!({ "n": 0 })),
        ("select count(*) as n from 'parquet' where x < -1", json!({ "n": 0 })),
    ] {
        assert_eq!(read_by(sql), (0, vec![expected]), "{sql}");
    }

    let (whole, _) = read_by("select id from 'parquet' where id % 2 = 0");
    let (pruned, answer) = read_by("select id from 'parquet' where id >= 600 and id % 50 = 1");
    assert_eq!(answer, [json!({ "id": 601 }), json!({ "id": 651 })]);
    assert!(pruned < whole / 2, "one shard of four: {pruned} of {whole} bytes");
    let (block, answer) = read_by("select \"Picture\" from 'parquet' where id = 650");
    assert_eq!(answer, [json!({ "Picture": { "bytes": 500 } })]);
    assert!(block < all / 10, "one row group of a shard: {block} of {all} bytes");

    let (first, _) = read_by("select id from 'mds' limit 3");
    let (every, _) = read_by("select id from 'mds'");
    assert!(first < every / 2, "the block with the first rows: {first} of {every} bytes");
}

#[test]
fn numbers_that_compare_strangely_are_never_pruned_away() {
    let folder = tempfile::tempdir().unwrap();
    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, 1.0];
    let big = [i64::MAX, i64::MIN, (1 << 53) + 1, 0, 1, 2];
    for (at, (value, big)) in values.iter().zip(big).enumerate() {
        let columns = vec![
            Column { name: "x".into(), kind: Kind::scalar(DType::F32) },
            Column { name: "i".into(), kind: Kind::scalar(DType::I64) },
        ];
        let cells = vec![Cells::Numbers(Tensor::vector(&[*value])), Cells::Numbers(Tensor::vector(&[big]))];
        let rows = Rows::new(Arc::new(Schema::new(columns).unwrap()), cells).unwrap();
        write(&folder.path().join(format!("d{at}")), ShardFormat::Parquet, &rows);
        let count = |condition: &str| ask(folder.path(), &format!("select x from 'd{at}' where {condition}")).len();
        for (condition, holds) in [
            // NaN is larger than all, and both zeros are one.
            ("x > 3e38".to_owned(), value.is_nan() || *value == f32::INFINITY),
            ("x < -3e38".to_owned(), *value == f32::NEG_INFINITY),
            ("x <= 0".to_owned(), *value <= 0.0),
            ("x >= 0".to_owned(), *value >= 0.0 || value.is_nan()),
            (format!("i = {big}"), true),
            (format!("i <> {big}"), false),
        ] {
            assert_eq!(count(&condition), usize::from(holds), "{value} {big}: {condition}");
        }
    }
}

#[test]
fn a_damaged_shard_is_an_error_that_names_it_and_the_place() {
    let folder = datasets();
    let shards =
        Shards::open(folder.path().join("tfrecord").to_str().unwrap(), None, 1 << 30, &Access::default()).unwrap();
    let key = &shards.facts[2].key;
    let path = folder.path().join("tfrecord").join(key);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&path, bytes).unwrap();
    let query = plan(folder.path(), "select max(x) from 'tfrecord'").unwrap();
    for _ in 0..2 {
        let Err(QueryError::Data(error)) = query.first_rows(10) else { panic!("the damage was not noticed") };
        let message = error.to_string();
        assert!(message.contains(key) && message.contains("byte"), "{message}");
    }
    // Rows before the damage can be had.
    assert_eq!(ask(folder.path(), "select id from 'tfrecord' limit 5").len(), 5);
}

#[test]
fn what_is_wrong_with_a_query_is_said_in_its_words() {
    let folder = datasets();
    let mut messages = String::new();
    for sql in [
        "selec label from 'mds'",
        "select label from",
        "select lable from 'mds'",
        "select picture from 'mds'",
        "select label from digitz",
        "select label from 'missing/data'",
        "select id from table.csv",
        "select summ(x) from 'mds'",
        "select random() from 'mds'",
        "select current_timestamp()",
        "select a.id, b.id from 'mds' a join 'mds' b on a.id = b.id",
        "select sum(name) from 'mds'",
        "create table t as select 1",
        "copy (select 1) to 'out.csv'",
        "select id from 'mds'; select 1",
        "set x = 1",
        "select cast(name as bigint) from 'mds'",
        "select 1 / (id - id) from 'mds'",
    ] {
        let error = plan(folder.path(), sql).and_then(|query| query.first_rows(10)).err();
        let error = error.unwrap_or_else(|| panic!("{sql} succeeded")).to_string();
        messages.push_str(&format!("{sql}\n    {error}\n"));
    }
    let folder = folder.path().to_str().unwrap();
    insta::assert_snapshot!("errors", messages.replace(folder, "…"));
}

#[test]
fn what_datasets_do_not_hold_is_refused_when_an_answer_is_kept() {
    let folder = datasets();
    for (sql, expected) in [
        ("select case when id > 650 then id end as late from 'mds'", "column `late`: "),
        ("select cast('2024-05-01' as date) as day from 'mds'", "column `day`: holds Date32"),
        ("select id from 'mds' where id < 0", "no rows"),
    ] {
        let target = objects(&folder.path().join("kept"));
        let error = plan(folder.path(), sql).unwrap().write(&target, &options(ShardFormat::Parquet, 10)).unwrap_err();
        assert!(error.to_string().contains(expected), "{sql}: {error}");
    }
}

#[test]
fn a_sort_that_does_not_fit_in_memory_spills_or_says_so() {
    let folder = datasets();
    let options = QueryOptions { threads: 2, memory_bytes: 200 << 10 };
    let sql = "select id, Picture from 'parquet' order by x, id";
    match plan_with(folder.path(), sql, &options, &Access::default()).unwrap().first_rows(10_000) {
        Ok(answer) => assert_eq!(answer.len(), ROWS),
        Err(error) => assert!(matches!(error, QueryError::Memory { .. }), "{error}"),
    }
}
