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
    ] {
        let error = validate(&shards, &Rules::parse(rules).unwrap(), &options, |_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(Rules::parse("[columns.a]\nmni = 3").unwrap_err().to_string().contains("mni"));
    assert!(Rules::parse("[columns.a]\npattern = \"(\"").is_err());
}
