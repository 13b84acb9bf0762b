//! Cells that are missing and rows that are broken: counted and set aside by validation, refused by a loader.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use updraft_data::shards::Shards;
use updraft_data::validate::{Rules, ValidateOptions, Validation, quarantine, summarize, validate};
use updraft_data::write::{WriteOptions, writer};
use updraft_data::{
    Access, Cells, Column, DataError, Dataset, DatasetConfig, Kind, Loader, LoaderOptions, Rows, Schema, ShardFormat,
};
use updraft_graph::{DType, Tensor};
use updraft_store::{AccessOptions, Objects};

const ROWS: u64 = 40;
const MEMORY_BYTES: u64 = 1 << 26;

/// The columns and the row in which each lacks its cell.
const GAPS: [(&str, u64); 3] = [("int", 7), ("float", 11), ("text", 13)];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Files of the same columns (`fixtures/make.py` made the binary ones). JSON Lines lack a key or hold null.
fn files(dir: &Path) -> Vec<PathBuf> {
    let cell = |column: usize, row: u64| match column {
        0 => (row + 1).to_string(),
        1 => format!("{}.5", row),
        _ => format!("t{row}"),
    };
    let (mut csv, mut nulls, mut absent) = ("int,float,text\n".to_owned(), String::new(), String::new());
    for row in 0..ROWS {
        let is_there = |column: usize| GAPS[column].1 != row;
        let cells: Vec<String> = (0..3).map(|c| if is_there(c) { cell(c, row) } else { String::new() }).collect();
        csv.push_str(&format!("{}\n", cells.join(",")));
        let quoted = |column: usize| match (is_there(column), column) {
            (false, _) => "null".to_owned(),
            (true, 2) => format!("{:?}", cells[2]),
            (true, _) => cells[column].clone(),
        };
        let pair = |column: usize| format!("{:?}: {}", GAPS[column].0, quoted(column));
        nulls.push_str(&format!("{{{}}}\n", (0..3).map(pair).collect::<Vec<_>>().join(", ")));
        absent.push_str(&format!("{{{}}}\n", (0..3).filter(|c| is_there(*c)).map(pair).collect::<Vec<_>>().join(", ")));
    }
    let write = |name: &str, text: &str| {
        std::fs::write(dir.join(name), text).unwrap();
        dir.join(name)
    };
    vec![
        fixture("gaps.parquet"),
        fixture("gaps.arrow"),
        write("gaps.csv", &csv),
        write("nulls.jsonl", &nulls),
        write("absent.jsonl", &absent),
    ]
}

fn open(path: &Path, memory_bytes: u64) -> Shards {
    Shards::open(path.to_str().unwrap(), None, memory_bytes, &Access::default()).unwrap()
}

fn checked(shards: &Shards, rules: &str) -> Result<Validation, DataError> {
    let options = ValidateOptions { threads: 2, memory_bytes: 1 << 24, near: false, before: None, apart: &[] };
    validate(&shards.readers, &Rules::parse(rules).unwrap(), &options, |_| ())
}

/// What is found, as `column: rule` and places, which end with the row.
fn findings(validation: &Validation) -> Vec<(String, Vec<String>)> {
    let named = |f: &updraft_data::validate::Finding| format!("{}: {}", f.column.as_deref().unwrap_or(""), f.rule);
    let of =
        |f: &updraft_data::validate::Finding| (named(f), f.places.iter().map(|(place, _)| place.clone()).collect());
    validation.findings.iter().map(of).collect()
}

#[test]
fn a_missing_cell_is_counted_and_breaks_only_the_rules_about_missing_cells() {
    let dir = tempfile::tempdir().unwrap();
    for path in files(dir.path()) {
        let shards = open(&path, MEMORY_BYTES);
        for (column, row) in GAPS {
            let rules = |rule: &str| format!("[columns.{column}]\nunique = true\n{rule}");
            let checked = |rule: &str| checked(&shards, &rules(rule)).unwrap();
            let is = format!("{}, {column}", path.display());

            let found = checked("required = true");
            assert_eq!(found.bad_rows, 1, "{is}: {:?}", found.findings);
            let finding = found.findings.iter().find(|f| f.rule == "missing").unwrap();
            let (place, reason) = &finding.places[0];
            assert!(place.ends_with(&format!("row {row}")) && reason == "is missing", "{is}: {place}: {reason}");

            for (limit, passes) in [(0.01, false), (0.025, true)] {
                let found = checked(&format!("missing_max = {limit}"));
                let check = found.checks.iter().find(|c| c.name == "missing").unwrap();
                assert_eq!((check.value, check.passes()), (1.0 / ROWS as f64, passes), "{is}");
                assert_eq!(found.bad_rows, 0, "{is}: {:?}", found.findings);
            }
            let rule = if column == "text" { "pattern = \"^t\"\nlength_min = 2" } else { "min = 0.5\nfinite = true" };
            assert_eq!(checked(rule).bad_rows, 0, "{is}: a missing cell was held against a rule for those there");
        }
        for column in summarize(&shards.readers, 2, |_| ()).unwrap() {
            assert_eq!((column.rows, column.missing), (ROWS, 1), "{} {}", path.display(), column.column);
            assert_eq!(column.distinct.estimate(), ROWS - 1, "{} {}", path.display(), column.column);
            assert!(column.numbers.is_none_or(|n| n.count == ROWS - 1 && n.nan == 0 && n.min > 0.0));
        }
    }
}

#[test]
fn a_list_that_is_null_is_missing_and_one_that_lacks_an_element_is_a_bad_row() {
    for path in ["lists.parquet", "lists.arrow"].map(fixture) {
        let shards = open(&path, MEMORY_BYTES);
        let name = shards.schema.columns[0].name.clone();
        let found = checked(&shards, &format!("[columns.\"{name}\"]\nmissing_max = 0.0")).unwrap();
        let place = |row: u64| vec![shards.readers[0].place(row)];
        // The empty lists are equal rows, which is right.
        let bad: Vec<_> = findings(&found).into_iter().filter(|(rule, _)| rule != ": duplicate").collect();
        assert_eq!(bad, [(format!("{name}: unreadable"), place(19))], "{}", path.display());
        // Null, broken, and of every third row the list is empty.
        assert_eq!(found.statistics[0].missing, 2 + 14, "{}", path.display());
    }
}

#[test]
fn a_loader_refuses_the_cell_when_it_comes_to_it_and_names_it() {
    let read = |path: &Path, column: &str| {
        let transform = if column == "text" { "{ index_of = [\"t0\"] }" } else { "" };
        let recipe = format!("path = {path:?}\n[[tensors]]\nname = {column:?}\ntransform = [{transform}]");
        let config: DatasetConfig = toml::from_str(&recipe).unwrap();
        let dataset = Dataset::open(&config, Path::new("/"))?;
        let options = LoaderOptions { batch_size: ROWS as usize, threads: 0, ..LoaderOptions::default() };
        Loader::new(dataset.into(), options)?.batch(0).map(|_| ())
    };
    let dir = tempfile::tempdir().unwrap();
    for path in files(dir.path()) {
        for (column, row) in GAPS {
            let error = read(&path, column).unwrap_err().to_string();
            let line = if path.ends_with("gaps.csv") { row + 2 } else { row + 1 };
            let named = error.contains(&format!("row {row} has no value")) || error.contains(&format!("line {line}"));
            assert!(named && error.contains(&format!("`{column}`")), "{}: {error}", path.display());
        }
    }
}

#[test]
fn a_missing_cell_equals_neither_zero_nor_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let lines = [
        "{\"a\": 0, \"t\": \"\"}",
        "{\"a\": null, \"t\": \"\"}",
        "{\"a\": 0}",
        "{\"a\": 0, \"t\": \"\"}",
        "{\"a\": 0}",
    ];
    std::fs::write(&path, lines.join("\n")).unwrap();
    let shards = open(&path, MEMORY_BYTES);
    let found = checked(&shards, "").unwrap();
    let places = [3, 4].map(|row| shards.readers[0].place(row)).to_vec();
    assert_eq!(findings(&found), [(": duplicate".to_owned(), places)]);
}

#[test]
fn a_quarantined_row_keeps_the_cells_that_it_has_and_names_those_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    for path in files(dir.path()) {
        let shards = open(&path, MEMORY_BYTES);
        let rules = "[columns.int]\nrequired = true\nmax = 38\n[columns.text]\nrequired = true";
        let found = checked(&shards, rules).unwrap();
        let target = tempfile::tempdir().unwrap();
        let url = target.path().to_str().unwrap();
        let objects = Objects::open(url, &Default::default(), &AccessOptions::default()).unwrap();
        quarantine(&shards.readers, &found.quarantine, &objects, ShardFormat::Parquet).unwrap();

        let kept = open(target.path(), MEMORY_BYTES);
        let rows = kept.readers[0].read_block(0).unwrap();
        let text = |name: &str| -> Vec<String> {
            let Some(Cells::Bytes(cells)) = rows.column(name) else { panic!("{name} is text") };
            cells.iter().map(|c| String::from_utf8(c.to_vec()).unwrap()).collect()
        };
        let of = |row: &str| text("text").iter().position(|t| t == row);
        let (without_int, over) = (of("t7").unwrap(), of("t38").unwrap());
        let without_text = of("").unwrap();
        assert_eq!(text("quarantine_missing")[without_int], "int", "{}", path.display());
        assert_eq!(text("quarantine_missing")[without_text], "text");
        assert_eq!(text("quarantine_missing")[over], "");
        assert_eq!(text("quarantine_reasons")[without_int], "int: is missing");
        let Some(Cells::Numbers(ints)) = rows.column("int") else { panic!("int is of numbers") };
        assert_eq!(ints.as_slice::<i64>().unwrap()[without_text], 14);
    }
}

#[test]
fn a_cell_of_another_type_makes_its_own_row_bad_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("rows.jsonl", "{\"a\": 1}\n{\"a\": \"x\"}\n{\"a\": 3}\n".to_owned()),
        ("rows.csv", "a,b\n1,1\nnan,2\n3,3\n".to_owned()),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let shards = open(&path, MEMORY_BYTES);
        let found = checked(&shards, "").unwrap();
        assert_eq!(findings(&found), [("a: unreadable".to_owned(), vec![shards.readers[0].place(1)])], "{name}");
    }
}

/// One column of numbers and one of bytes.
fn plain_rows(count: usize, bytes: usize) -> Rows {
    let column = |name: &str, kind| Column { name: name.into(), kind };
    let columns = vec![column("number", Kind::scalar(DType::I64)), column("bytes", Kind::Bytes)];
    let numbers: Vec<i64> = (0..count as i64).collect();
    let cells = (0..count).map(|row| Bytes::from(vec![row as u8; bytes])).collect();
    let cells = vec![Cells::Numbers(Tensor::vector(&numbers)), Cells::Bytes(cells)];
    Rows::new(Arc::new(Schema::new(columns).unwrap()), cells).unwrap()
}

fn written(format: ShardFormat, rows: &Rows) -> Bytes {
    let mut writer = writer(format, rows.schema.clone(), &WriteOptions::default()).unwrap();
    writer.push(rows).unwrap();
    writer.finish().unwrap().0
}

#[test]
fn exactly_the_records_with_a_wrong_checksum_are_bad() {
    let mut file = written(ShardFormat::TfRecord, &plain_rows(4000, 2000)).to_vec();
    // A record is its length in 8 bytes, 4 of checksum, the data, and 4 of checksum.
    let mut at = 0;
    let mut bad = Vec::new();
    for row in 0..4000 {
        let length = u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        if row % 100 == 37 || row == 0 {
            file[at + 12 + length / 2] ^= 1;
            bad.push((0, row));
        }
        at += 12 + length + 4;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.tfrecord");
    std::fs::write(&path, file).unwrap();
    let found = checked(&open(&path, MEMORY_BYTES), "").unwrap();
    assert_eq!(found.bad_rows, 41);
    assert_eq!(found.quarantine.keys().copied().collect::<Vec<_>>(), bad);
}

#[test]
fn a_row_group_beyond_the_memory_allowed_stops_validation_and_is_not_bad_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.parquet");
    std::fs::write(&path, written(ShardFormat::Parquet, &plain_rows(200_000, 8))).unwrap();
    let error = checked(&open(&path, 1 << 20), "").unwrap_err();
    assert!(matches!(error, DataError::Memory { allowed_bytes: 1_048_576, .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("s.parquet") && text.contains("more than memory_bytes = 1.00 MiB"), "{text}");
    assert_eq!(checked(&open(&path, 1 << 26), "").unwrap().bad_rows, 0);
}
