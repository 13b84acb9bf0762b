//! Rows with known faults, and exactly those found.

use std::sync::Arc;

use bytes::Bytes;
use updraft_graph::{DType, Tensor};

use super::*;
use crate::rows::{Cells, Rows};
use crate::schema::{Column, Kind, Schema};

/// A shard in memory, with rows that cannot be read.
struct Table {
    rows: Rows,
    blocks: Vec<u64>,
    unreadable: Vec<u64>,
    name: &'static str,
}

impl ShardReader for Table {
    fn schema(&self) -> &Arc<Schema> {
        &self.rows.schema
    }

    fn rows(&self) -> u64 {
        self.rows.len() as u64
    }

    fn blocks(&self) -> &[u64] {
        &self.blocks
    }

    fn block_bytes(&self, _: usize, _: &[usize]) -> u64 {
        self.rows.memory_bytes()
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        if let Some(row) = rows.iter().find(|row| self.unreadable.contains(row)) {
            return Err(DataError::file(std::path::Path::new(self.name), format!("row {row} is torn")));
        }
        Ok(columns.iter().map(|c| self.rows.columns[*c].gather(rows.iter().map(|r| *r as usize))).collect())
    }

    fn place(&self, row: u64) -> String {
        format!("{}, row {row}", self.name)
    }
}

/// Two columns: a text and a label.
fn table(name: &'static str, rows: &[(&str, i64)], unreadable: &[u64]) -> Arc<dyn ShardReader> {
    let column = |name: &str, kind| Column { name: name.into(), kind };
    let columns = vec![column("text", Kind::Text), column("label", Kind::scalar(DType::I64))];
    let texts = rows.iter().map(|(text, _)| Bytes::copy_from_slice(text.as_bytes())).collect();
    let labels: Vec<i64> = rows.iter().map(|(_, label)| *label).collect();
    let cells = vec![Cells::Bytes(texts), Cells::Numbers(Tensor::vector(&labels))];
    let rows = Rows::new(Arc::new(Schema::new(columns).unwrap()), cells).unwrap();
    let half = rows.len() as u64 / 2;
    Arc::new(Table { blocks: vec![half, rows.len() as u64 - half], rows, unreadable: unreadable.to_vec(), name })
}

fn validated(shards: &[Arc<dyn ShardReader>], rules: &str, apart: &[Vec<Arc<dyn ShardReader>>]) -> Validation {
    let rules = Rules::parse(rules).unwrap();
    let with = |threads| {
        let options = ValidateOptions { threads, memory_bytes: 1 << 24, near: true, before: None, apart };
        validate(shards, &rules, &options, |_| ()).unwrap()
    };
    let (one, three) = (with(1), with(3));
    assert_eq!(one, three, "the number of threads shows");
    one
}

fn places(validation: &Validation, rule: &str) -> Vec<String> {
    let of = validation.findings.iter().filter(|f| f.rule == rule);
    of.flat_map(|f| f.places.iter().map(|(place, _)| place.clone())).collect()
}

const LONG: &str = "the quick brown fox jumps over the lazy dog while twenty seven small birds watch from a tall old tree \
                    and nobody in the whole village says a word about it until the sun has set behind the far hills";

#[test]
fn each_fault_is_found_at_its_place_whatever_the_number_of_threads() {
    let nearly = LONG.replace("until", "before");
    let shards = [
        table("a", &[("one", 0), ("two", 1), ("", 2), ("four", 12), (LONG, 0), ("torn", 1)], &[5]),
        table("b", &[("two", 1), ("mail ada@example.org", 1), (&nearly, 1), ("t0", 0), ("nine", 0)], &[]),
    ];
    let rules = r#"
        identity = ["text"]
        [columns.label]
        kind = "i64"
        min = 0
        max = 9
        [columns.text]
        required = true
        pattern = "^[a-z .@]+$"
    "#;
    let apart = vec![vec![table("held out", &[("nine", 3), ("ten", 4)], &[])]];
    let found = validated(&shards, rules, &apart);
    for (rule, expected) in [
        ("missing", vec!["a, row 2"]),
        ("maximum", vec!["a, row 3"]),
        ("unreadable", vec!["a, row 5"]),
        ("duplicate", vec!["b, row 0"]),
        ("near duplicate", vec!["b, row 2"]),
        ("pattern", vec!["b, row 3"]),
        ("leak", vec!["b, row 4"]),
    ] {
        assert_eq!(places(&found, rule), expected, "{rule}: {:#?}", found.findings);
    }
    assert_eq!((found.rows, found.bad_rows), (11, 4));
    let rows: Vec<(usize, u64)> = found.quarantine.keys().copied().collect();
    assert_eq!(rows, [(0, 2), (0, 3), (0, 5), (1, 0), (1, 3), (1, 4)]);
    assert_eq!(found.personal.len(), 1);
    assert_eq!(found.personal[0].places, [("b, row 1".to_owned(), "a**@*******.**g".to_owned())]);
    let failed: Vec<&str> = found.checks.iter().filter(|c| !c.passes()).map(|c| c.name.as_str()).collect();
    assert_eq!(failed, ["bad rows", "leaks"]);
    assert!(serde_json::to_string(&found).unwrap().contains("a**@"), "the report holds the masked value");
}

#[test]
fn limits_fail_only_beyond_them_and_balance_below() {
    let shards = [table("a", &[("a", 0), ("b", 0), ("c", 0), ("a", 1)], &[])];
    let failed = |rules: &str| -> Vec<String> {
        let found = validated(&shards, rules, &[]);
        found.checks.iter().filter(|c| !c.passes()).map(|c| c.name.clone()).collect()
    };
    assert_eq!(failed(""), [""; 0]);
    let identity = "identity = [\"text\"]\n[limits]\n";
    assert_eq!(failed(&format!("{identity}duplicates = 0.25\nbalance = 0.33")), [""; 0]);
    assert_eq!(failed(&format!("{identity}duplicates = 0.24\nbalance = 0.34")), ["duplicates", "balance"]);
    assert_eq!(failed("[columns.text]\nunique = true"), ["bad rows"]);
    assert_eq!(failed("[columns.label]\nallowed = [0]"), ["bad rows"]);
    assert_eq!(failed("[columns.label]\nallowed = [0, 1]"), [""; 0]);
}

#[test]
fn rules_for_columns_that_are_not_there_are_refused_by_name() {
    let shards = [table("a", &[("a", 0)], &[])];
    let options = ValidateOptions { threads: 1, memory_bytes: 1 << 20, near: false, before: None, apart: &[] };
    for (rules, expected) in [
        ("[columns.labl]\nmin = 0", "no column `labl`; did you mean `label`?"),
        ("[columns.label]\nkind = \"f32\"", "column `label` holds i64; the rules ask for f32"),
        ("label = \"klass\"", "no column `klass`"),
        // What would hold whatever the cells are.
        ("[columns.text]\nmin = 0", "column `text`: `min` says nothing about text"),
        ("[columns.label]\npattern = \"^a\"", "column `label`: `pattern` says nothing about i64"),
        ("[columns.label]\nlength_max = 3", "column `label`: `length_max` says nothing about i64"),
        ("[columns.text]\ndecode = true", "column `text`: `decode` says nothing about text"),
        ("[columns.label]\nallowed = [\"a\"]", "`a` is among the allowed values, and no cell of i64 can be"),
        ("[columns.label]\nmin = 3\nmax = 2", "no number is at least 3 and at most 2"),
        ("[columns.label]\nmissing_max = 2.0", "`missing_max = 2` is no share"),
        ("[limits]\nbad_rows = 5", "`bad_rows = 5` is no share"),
        ("[limits]\nleaks = 0.0", "the limit `leaks` needs a dataset to be apart from"),
        ("[limits]\npsi = 0.1", "the limit `psi` needs a version to compare with"),
        ("[limits]\nks = 0.1", "the limit `ks` needs a version to compare with"),
        ("[limits]\nnear_duplicates = 0.1", "the limit `near_duplicates` is not measured"),
        ("[limits]\nnear_leaks = 0.1", "the limit `near_leaks` needs a dataset to be apart from"),
    ] {
        let error = validate(&shards, &Rules::parse(rules).unwrap(), &options, |_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(Rules::parse("[columns.a]\nmni = 3").unwrap_err().to_string().contains("mni"));
    assert!(Rules::parse("[columns.a]\npattern = \"(\"").is_err());
}

fn shard(name: &'static str, columns: Vec<(&str, Kind, Cells)>) -> Arc<dyn ShardReader> {
    let (schema, cells): (Vec<Column>, Vec<Cells>) =
        columns.into_iter().map(|(name, kind, cells)| (Column { name: name.into(), kind }, cells)).unzip();
    let rows = Rows::new(Arc::new(Schema::new(schema).unwrap()), cells).unwrap();
    Arc::new(Table { blocks: vec![rows.len() as u64], rows, unreadable: Vec::new(), name })
}

fn numbers(name: &'static str, values: impl Iterator<Item = i64>) -> Arc<dyn ShardReader> {
    let values: Vec<i64> = values.collect();
    shard(name, vec![("id", Kind::scalar(DType::I64), Cells::Numbers(Tensor::vector(&values)))])
}

fn value(validation: &Validation, name: &str) -> f64 {
    validation.checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("{name}")).value
}

#[test]
fn what_is_found_in_a_sample_counts_for_all() {
    let rows = 16_384i64;
    let found = |shard: Arc<dyn ShardReader>, apart: Vec<Arc<dyn ShardReader>>, rules: &str| {
        let apart: Vec<_> = apart.into_iter().map(|shard| vec![shard]).collect();
        // Room for 1,024 hashes of each kind, of which at least one in sixteen is kept.
        let options = ValidateOptions { threads: 1, memory_bytes: 1, near: false, before: None, apart: &apart };
        validate(&[shard], &Rules::parse(rules).unwrap(), &options, |_| ()).unwrap()
    };
    // Half of the rows are in one other dataset, and a quarter in both.
    let apart = vec![numbers("half", rows / 2..rows * 3 / 2), numbers("quarter", rows * 3 / 4..rows * 7 / 4)];
    let leaks = found(numbers("a", 0..rows), apart, "");
    assert!((value(&leaks, "leaks") - 0.5).abs() < 0.1, "{:?}", leaks.checks);
    let repeated = found(numbers("a", (0..rows).map(|row| row / 2)), Vec::new(), "[columns.id]\nunique = true");
    assert!((value(&repeated, "bad rows") - 0.5).abs() < 0.1, "{:?}", repeated.checks);
}

#[test]
fn rows_whose_columns_are_of_another_kind_are_not_compared() {
    let other = shard("b", vec![("id", Kind::scalar(DType::I8), Cells::Numbers(Tensor::vector(&[1i8])))]);
    let options =
        ValidateOptions { threads: 1, memory_bytes: 1 << 20, near: false, before: None, apart: &[vec![other]] };
    let error = validate(&[numbers("a", 0..2)], &Rules::default(), &options, |_| ()).unwrap_err().to_string();
    assert!(error.contains("column `id` holds i8, and i64"), "{error}");
}

#[test]
fn columns_that_cannot_be_compared_with_those_before_have_moved() {
    let floats = |name: &'static str, column: &'static str, values: &[f32]| {
        shard(name, vec![(column, Kind::scalar(DType::F32), Cells::Numbers(Tensor::vector(values)))])
    };
    let before = summarize(&[floats("before", "x", &[1.0, 2.0, 3.0, 4.0])], 1, |_| ()).unwrap();
    for (now, expected) in [
        (floats("same", "x", &[1.0, 2.0, 3.0, 4.0]), vec![]),
        (floats("none left", "x", &[f32::NAN; 4]), vec!["x: nothing that can be compared"]),
        (floats("another", "y", &[1.0]), vec!["x: the column is gone", "y: the column is new"]),
        (floats("half", "x", &[1.0, f32::NAN, f32::NAN, 3.0]), vec!["x: of numbers"]),
    ] {
        let options =
            ValidateOptions { threads: 1, memory_bytes: 1 << 20, near: false, before: Some(&before), apart: &[] };
        let found = validate(&[now], &Rules::parse("[limits]\npsi = 0.25").unwrap(), &options, |_| ()).unwrap();
        let failed: Vec<String> = found
            .checks
            .iter()
            .filter(|check| !check.passes())
            .map(|check| format!("{}: {}", check.column.as_deref().unwrap_or_default(), check.note))
            .collect();
        assert_eq!(failed, expected);
    }
}

#[test]
fn text_that_a_format_has_as_bytes_is_looked_at_as_text() {
    let cells = ["mail ada@example.org", "nothing", "\u{7f}"].map(|text| Bytes::copy_from_slice(text.as_bytes()));
    let cells = [cells.as_slice(), &[Bytes::from_static(b"\xff\xfe")]].concat();
    let bytes = [shard("a", vec![("note", Kind::Bytes, Cells::Bytes(cells))])];
    let found = validated(&bytes, "[limits]\npersonal = 0.1\n[columns.note]\npattern = \"^[a-z .@]+$\"", &[]);
    assert_eq!(found.personal.len(), 1);
    assert_eq!(value(&found, "personal data"), 0.25);
    assert_eq!(places(&found, "pattern"), ["a, row 2", "a, row 3"]);
}

#[test]
fn damaged_and_empty_pictures_are_found_wherever_they_are() {
    let picture = include_bytes!("../../tests/fixtures/colour.jpg").as_slice();
    let mut cells = vec![Bytes::from_static(picture); 40];
    (cells[0], cells[20], cells[30]) = (Bytes::from_static(b"no picture"), cells[0].slice(..90), Bytes::new());
    let shards = [shard("a", vec![("image", Kind::Bytes, Cells::Bytes(cells))])];
    let found = validated(&shards, "", &[]);
    assert_eq!(places(&found, "picture"), ["a, row 0", "a, row 20", "a, row 30"]);
    let found = validated(&shards, "[columns.image]\nmissing_max = 0.1", &[]);
    assert_eq!(places(&found, "picture"), ["a, row 0", "a, row 20"]);
}

#[test]
fn the_classes_of_a_label_of_any_name_are_counted() {
    let shards = [numbers("a", (0..2000).map(|row| row % 1000))];
    let found = validated(&shards, "label = \"id\"\n[limits]\nbalance = 1.0", &[]);
    assert!(found.checks.iter().all(Check::passes), "{:?}", found.checks);
    assert_eq!(found.balance.map(|classes| classes.len()), Some(1000));
}

#[test]
fn what_nearly_equals_a_row_of_another_dataset_is_a_near_leak_and_what_equals_one_a_leak() {
    let changed = LONG.replace("until", "before");
    let shards = [table("test", &[("one", 0), (&changed, 1), (LONG, 2), (LONG, 3), ("two", 0)], &[])];
    let train = vec![table("train", &[("three", 0), (LONG, 2)], &[])];
    let found = validated(&shards, "[limits]\nnear_leaks = 0.3", std::slice::from_ref(&train));
    assert_eq!(places(&found, "leak"), ["test, row 2"]);
    // The third has another label, so it is no equal row.
    assert_eq!(places(&found, "near leak"), ["test, row 1", "test, row 3"]);
    assert_eq!(value(&found, "near leaks"), 0.4);
    let failed: Vec<&str> = found.checks.iter().filter(|c| !c.passes()).map(|c| c.name.as_str()).collect();
    assert_eq!(failed, ["leaks", "near leaks"]);
    // By the text alone, it is one.
    let found = validated(&shards, "identity = [\"text\"]", &[train]);
    assert_eq!((places(&found, "leak").len(), places(&found, "near leak")), (2, vec!["test, row 1".to_owned()]));
}

#[test]
fn pictures_are_near_leaks_when_they_were_stored_again() {
    let picture = Bytes::from_static(include_bytes!("../../tests/fixtures/colour.jpg"));
    let pixels = image::load_from_memory(&picture).unwrap();
    let mut again = std::io::Cursor::new(Vec::new());
    pixels.write_to(&mut again, image::ImageFormat::Png).unwrap();
    let of = |name: &'static str, cells: Vec<Bytes>| shard(name, vec![("image", Kind::Bytes, Cells::Bytes(cells))]);
    let found = validated(&[of("test", vec![again.into_inner().into()])], "", &[vec![of("train", vec![picture])]]);
    assert_eq!((value(&found, "leaks"), value(&found, "near leaks")), (0.0, 1.0));
}
