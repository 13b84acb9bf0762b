//! What other programs write and their users have: structs and views, files that not every row has, numbered shards, text
//! between tabs, and what of it is refused.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use updraft_data::shard::ReadOptions;
use updraft_data::shards::Shards;
use updraft_data::write::{WriteOptions, writer};
use updraft_data::{Access, Cells, Column, DataError, Kind, Rows, Schema, ShardFormat, open_shard};
use updraft_graph::{DType, Tensor};
use updraft_store::ReadObjects;

use crate::{One, arrow, damaged, member, read};

/// The columns of `nested.arrows`: names, kinds, cells, and the rows that lack theirs.
fn nested() -> Vec<(&'static str, Kind, Cells, &'static [usize])> {
    let long = |row: usize| row.to_string().repeat(row * 7);
    let bytes = |cell: &dyn Fn(usize) -> String| Cells::Bytes((0..6).map(|row| cell(row).into()).collect());
    let but = |missing: &'static [usize], row: usize, cell: String| {
        if missing.contains(&row) { String::new() } else { cell }
    };
    let bools = |row: Vec<bool>| Tensor::from_bools(&[row.len()], &row).unwrap();
    let c = |row: usize| Tensor::vector(&vec![row as i64; if row == 4 { 0 } else { row }]);
    let three = (0..6).flat_map(|row| [row > 1, row > 2, row > 3]).collect::<Vec<bool>>();
    vec![
        ("image.bytes", Kind::Bytes, bytes(&|row| but(&[2], row, long(row))), &[2]),
        ("image.path", Kind::Text, bytes(&|row| but(&[2, 3], row, format!("p{row}"))), &[2, 3]),
        ("deep.a.b", Kind::scalar(DType::I32), Cells::Numbers(Tensor::vector(&[0i32, 1, 2, 3, 0, 5])), &[4]),
        ("deep.a.c", Kind::List { dtype: DType::I64 }, Cells::Lists((0..6).map(c).collect()), &[4]),
        ("view", Kind::Text, bytes(&|row| long(row)), &[]),
        (
            "flags",
            Kind::List { dtype: DType::Bool },
            Cells::Lists((0..6).map(|row| bools([true, false, true][..row % 3].to_vec())).collect()),
            &[],
        ),
        (
            "three",
            Kind::Number { dtype: DType::Bool, shape: vec![3] },
            Cells::Numbers(Tensor::from_bools(&[6, 3], &three).unwrap()),
            &[],
        ),
        ("raw", Kind::Bytes, bytes(&|row| but(&[1], row, long(row))), &[1]),
        (
            "list",
            Kind::List { dtype: DType::F32 },
            Cells::Lists((0..6).map(|row| Tensor::vector(&vec![0.5f32; row % 4])).collect()),
            &[],
        ),
        ("last", Kind::scalar(DType::F64), Cells::Numbers(Tensor::vector(&[0f64, 1.0, 2.0, 3.0, 4.0, 5.0])), &[]),
    ]
}

#[test]
fn fields_of_structs_are_columns_of_the_same_names_in_arrow_and_parquet() {
    for name in ["nested.arrows", "nested_lz4.arrows", "nested_none.parquet", "nested_lz4.parquet"] {
        let format = ShardFormat::of_key(name).unwrap();
        let objects: Arc<dyn ReadObjects> = Arc::new(One(arrow(name).into()));
        let reader = open_shard(&objects, name, format, &ReadOptions::default()).unwrap();
        let found: Vec<&str> = reader.schema().columns.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(found, nested().iter().map(|(name, ..)| *name).collect::<Vec<_>>(), "{name}");
        let rows: Vec<u64> = (0..6).collect();
        for (at, (column, kind, cells, missing)) in nested().into_iter().enumerate() {
            let read = reader.read_partial(&[at], &rows).unwrap().pop().unwrap();
            assert_eq!(reader.schema().columns[at].kind, kind, "{name} {column}");
            assert_eq!(read.gaps.iter().map(|gap| gap.row).collect::<Vec<_>>(), missing, "{name} {column}");
            assert!(read.gaps.iter().all(|gap| gap.fault.is_none()), "{name} {column}: {:?}", read.gaps);
            assert_eq!(read.cells, cells, "{name} {column}");
            let refused = reader.read(&[at], &rows).err().map(|error| error.to_string());
            let names_it =
                |text: &String| text.contains(name) && text.contains(column) && text.contains("has no value");
            assert_eq!(refused.as_ref().map(names_it), (!missing.is_empty()).then_some(true), "{refused:?}");
        }
        for bytes in damaged(&arrow(name).into(), 61) {
            let objects: Arc<dyn ReadObjects> = Arc::new(One(bytes));
            let names_it = |error: DataError| assert!(error.to_string().contains(&format!("one/{name}")), "{error}");
            match open_shard(&objects, name, format, &ReadOptions::default()) {
                Err(error) => names_it(error),
                Ok(reader) => {
                    let rows: Vec<u64> = (0..reader.rows().min(6)).collect();
                    let columns = 0..reader.schema().columns.len();
                    columns.for_each(|at| drop(reader.read_partial(&[at], &rows).map_err(names_it)));
                }
            }
        }
    }
}

#[test]
fn codecs_and_encryption_that_are_not_read_are_named() {
    let error = read(arrow("nested_brotli.parquet").into(), ShardFormat::Parquet, "s.parquet", &ReadOptions::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("one/s.parquet") && error.contains("BROTLI; SNAPPY, GZIP, ZSTD, LZ4_RAW"), "{error}");
    let mut encrypted = arrow("nested_none.parquet");
    encrypted.truncate(encrypted.len() - 4);
    encrypted.extend(b"PARE");
    let error = read(encrypted.into(), ShardFormat::Parquet, "s.parquet", &ReadOptions::default()).unwrap_err();
    assert!(error.to_string().contains("one/s.parquet: has an encrypted footer"), "{error}");
}

#[test]
fn a_changed_byte_of_a_page_is_found_by_its_checksum() {
    let whole = arrow("checksums.parquet");
    // Requests that cost nothing, so that a row is looked for alone.
    let options = ReadOptions { request_bytes: 1, ..ReadOptions::default() };
    let open = |bytes: Vec<u8>| {
        let objects: Arc<dyn ReadObjects> = Arc::new(One(bytes.into()));
        open_shard(&objects, "s.parquet", ShardFormat::Parquet, &options).unwrap()
    };
    let expected = Cells::Bytes(vec!["x".repeat(17000).into(), "y".repeat(17000).into()]);
    assert_eq!(open(whole.clone()).read(&[0], &[0, 1]).unwrap(), [expected]);
    for at in [1000, 16_000, 20_000, 33_000] {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        let reader = open(changed);
        for rows in [&[0u64, 1][..], &[0], &[1]] {
            let error = reader.read(&[0], rows).unwrap_err().to_string();
            assert!(error.contains("one/s.parquet") && error.contains("CRC"), "byte {at}, rows {rows:?}: {error}");
        }
    }
}

/// An archive of files.
fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes: Vec<u8> = files.iter().flat_map(|(name, content)| member(name, b'0', content.as_bytes())).collect();
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

fn column_names(shards: &Shards) -> Vec<String> {
    shards.schema.names()
}

fn find(path: &Path) -> Result<Shards, DataError> {
    Shards::open(path.to_str().unwrap(), None, 1 << 26, &Access::default())
}

#[test]
fn a_file_that_the_first_rows_of_archives_lack_is_a_column_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let late: Vec<(String, &str)> = (0..100).map(|row| (format!("{row:03}.jpg"), "x")).collect();
    let mut late: Vec<(&str, &str)> = late.iter().map(|(name, content)| (name.as_str(), *content)).collect();
    late.extend([("100.jpg", "x"), ("100.json", "{}"), ("._100.jpg", "mac"), (".DS_Store", "mac")]);
    std::fs::write(dir.path().join("a.tar"), archive(&late)).unwrap();
    std::fs::write(dir.path().join("b.tar"), archive(&[("b.jpg", "y"), ("c.jpg", "z"), ("c.cls", "7")])).unwrap();

    let alone = find(&dir.path().join("a.tar")).unwrap();
    assert_eq!(column_names(&alone), ["__key__", "jpg", "json"]);
    let both = find(dir.path()).unwrap();
    assert_eq!(column_names(&both), ["__key__", "jpg", "json", "cls"]);
    let count: u64 = both.readers.iter().map(|reader| reader.rows()).sum();
    assert_eq!(count, 103);
    for (reader, column, there) in [(0, 2, vec![100]), (0, 3, vec![]), (1, 2, vec![]), (1, 3, vec![1])] {
        let reader = &both.readers[reader];
        let rows: Vec<u64> = (0..reader.rows()).collect();
        let cells = reader.read_partial(&[column], &rows).unwrap().pop().unwrap();
        let found: Vec<u64> = rows.iter().copied().filter(|row| cells.gap(*row as usize).is_none()).collect();
        assert_eq!(found, there);
    }
    let error = both.readers[1].read(&[3], &[0]).unwrap_err().to_string();
    assert!(error.contains("b.tar record 0") && error.contains("no such file"), "{error}");
}

/// A field of a message of Protocol Buffers that holds bytes.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(content.len()).unwrap()], content].concat()
}

/// An example of features of one whole number each.
fn example(features: &[(&str, u8)]) -> Bytes {
    let entry = |(name, value): &(&str, u8)| {
        let list = field(3, &field(1, &[*value]));
        field(1, &[field(1, name.as_bytes()), field(2, &list)].concat())
    };
    field(1, &features.iter().flat_map(entry).collect::<Vec<u8>>()).into()
}

fn tfrecord(records: Vec<Bytes>) -> Bytes {
    let schema = Arc::new(Schema { columns: vec![Column { name: "record".into(), kind: Kind::Bytes }] });
    let mut out = writer(ShardFormat::TfRecordRaw, schema.clone(), &WriteOptions::default()).unwrap();
    out.push(&Rows::new(schema, vec![Cells::Bytes(records)]).unwrap()).unwrap();
    out.finish().unwrap().0
}

#[test]
fn a_feature_that_only_late_examples_have_is_a_column_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train.tfrecord-00000-of-00001");
    let mut records = vec![example(&[("a", 1)]); 300];
    records.push(example(&[("a", 2), ("late", 9)]));
    std::fs::write(&path, tfrecord(records)).unwrap();
    // A shard that is numbered behind its extension is one, alone and in its folder.
    for place in [path.as_path(), dir.path()] {
        let shards = find(place).unwrap();
        assert_eq!(column_names(&shards), ["a", "late"]);
        let rows: Vec<u64> = (0..301).collect();
        let late = shards.readers[0].read(&[1], &rows).unwrap().pop().unwrap();
        let Cells::Lists(lists) = late else { panic!("{late:?}") };
        assert!(lists[..300].iter().all(Tensor::is_empty), "an example without it has a list of nothing");
        assert_eq!(lists[300].as_slice::<i64>().unwrap(), [9]);
    }
}

#[test]
fn a_sequence_example_is_refused_and_not_taken_for_its_context() {
    let mut record = example(&[("a", 1)]).to_vec();
    record.extend(field(2, &field(1, &field(1, b"steps"))));
    let bytes = tfrecord(vec![record.into()]);
    let error = read(bytes, ShardFormat::TfRecord, "s.tfrecord", &ReadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("one/s.tfrecord: byte 0") && error.contains("SequenceExample"), "{error}");
}

#[test]
fn several_texts_in_a_feature_are_an_error_for_who_wants_them_and_no_other() {
    let list = field(1, &[field(1, b"x"), field(1, b"y")].concat());
    let entry = field(1, &[field(1, b"words"), field(2, &list)].concat());
    let other = example(&[("a", 1)]);
    let record = field(1, &[entry, other[2..].to_vec()].concat());
    let objects: Arc<dyn ReadObjects> = Arc::new(One(tfrecord(vec![record.into()])));
    let reader = open_shard(&objects, "s.tfrecord", ShardFormat::TfRecord, &ReadOptions::default()).unwrap();
    assert_eq!(reader.schema().names(), ["a", "words"]);
    assert_eq!(reader.read(&[0], &[0]).unwrap()[0], Cells::Numbers(Tensor::vector(&[1i64])));
    let error = reader.read(&[1], &[0]).unwrap_err().to_string();
    assert!(error.contains("`words`") && error.contains("2 values of bytes; one is read"), "{error}");
}

#[test]
fn text_is_known_by_its_name_and_may_be_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let gzip = |text: &str| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(text.as_bytes()).unwrap();
        out.finish().unwrap()
    };
    let zstd = |text: &str| zstd::encode_all(text.as_bytes(), 1).unwrap();
    let (commas, tabs, json) =
        ("n,t\n1,\"a,b\"\n2,c\n", "n\tt\n1\ta,b\n2\tc\n", "{\"n\":1,\"t\":\"a,b\"}\n{\"n\":2,\"t\":\"c\"}");
    for (name, content) in [
        ("a.csv", commas.into()),
        ("a.csv.gz", gzip(commas)),
        ("B.CSV.GZ", gzip(commas)),
        ("a.csv.zst", zstd(commas)),
        ("a.tsv", tabs.into()),
        ("a.tsv.gz", gzip(tabs)),
        ("a.jsonl", json.into()),
        ("a.ndjson.gz", gzip(json)),
        ("a.jsonl.zst", zstd(json)),
        ("bom.jsonl", format!("\u{feff}{json}").into_bytes()),
        ("bom.csv", format!("\u{feff}{commas}").into_bytes()),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let shards = find(&path).unwrap();
        let cells = shards.readers[0].read(&[0, 1], &[0, 1]).unwrap();
        assert_eq!(column_names(&shards), ["n", "t"], "{name}");
        let texts = Cells::Bytes(vec!["a,b".into(), "c".into()]);
        assert_eq!(cells, [Cells::Numbers(Tensor::vector(&[1i64, 2])), texts.clone()], "{name}");
        // A loader reads one local file in another way.
        let recipe = format!("path = {path:?}\n[[tensors]]\nname = \"n\"");
        let dataset = updraft_data::Dataset::open(&toml::from_str(&recipe).unwrap(), Path::new("/")).unwrap();
        assert_eq!(dataset.len(), 2, "{name}");
    }
}

#[test]
fn text_that_is_cut_off_or_of_another_shape_is_refused() {
    for (text, words) in [
        ("a,b\n1,x\n2,\"y\n3,z\n", "byte 8: a quote opens a cell and none closes it"),
        ("\"a,b\n1,x\n", "byte 0: a quote opens"),
        ("\"ab\n1\n", "byte 0: a quote opens"),
        ("a;b\n1;x\n", "separated by ';'"),
        ("a\tb\n1\tx\n", "separated by '\\t'"),
        ("a,b\n1\n", "found record with 1 fields"),
    ] {
        let error = read(text.to_owned().into(), ShardFormat::Csv, "s.csv", &ReadOptions::default()).unwrap_err();
        assert!(error.to_string().contains("one/s.csv") && error.to_string().contains(words), "{text:?}: {error}");
    }
}

#[test]
fn whole_numbers_of_text_are_exact_or_refused() {
    let of = |text: &str| read(text.to_owned().into(), ShardFormat::Csv, "s.csv", &ReadOptions::default());
    let ids = of("n\n18446744073709551615\n7\n").unwrap();
    assert_eq!(ids.columns[0], Cells::Numbers(Tensor::vector(&[u64::MAX, 7])));
    let exact = of("n\n9007199254740992\n0.5\n-0012\n").unwrap();
    assert_eq!(exact.columns[0], Cells::Numbers(Tensor::vector(&[9007199254740992f64, 0.5, -12.0])));
    for text in ["n\n9007199254740993\n0.5\n", "n\n99999999999999999999\n-1\n"] {
        let error = of(text).unwrap_err().to_string();
        assert!(error.contains("one/s.csv line 2") && error.contains("would be rounded"), "{error}");
    }
}

#[test]
fn values_of_json_that_are_read_nowhere_are_named_as_what_they_are() {
    for (value, words) in [
        ("1e400", "no number that 64 bits hold"),
        ("[[1,2],[3]]", "holds arrays of 2 and of 1 in one row"),
        ("[\"x\"]", "holds text in an array"),
        ("[{}]", "holds an object in an array"),
        ("{}", "holds an object"),
    ] {
        let text = format!("{{\"a\":{value}}}\n");
        let error =
            read(text.into(), ShardFormat::JsonLines, "s.jsonl", &ReadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("one/s.jsonl line 1, column `a`") && error.contains(words), "{error}");
    }
}

#[test]
fn shards_in_folders_of_a_folder_are_found() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["train/part=1/0.parquet", "train/part=2/0.parquet"] {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, arrow("nested_none.parquet")).unwrap();
    }
    std::fs::write(dir.path().join("dataset_dict.json"), "{}").unwrap();
    assert_eq!(find(dir.path()).unwrap().readers.len(), 2);
    // Beside pictures a table is no dataset, and is named.
    let pictures = dir.path().join("pictures/cat");
    std::fs::create_dir_all(&pictures).unwrap();
    std::fs::write(pictures.join("1.png"), "x").unwrap();
    std::fs::write(pictures.join("labels.csv"), "a\n1\n").unwrap();
    let error = find(&dir.path().join("pictures")).err().unwrap().to_string();
    assert!(error.contains("labels.csv") && error.contains("is not one of png"), "{error}");
}
