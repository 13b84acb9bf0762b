//! Validation: whether a dataset is what its rules say, in one pass over its shards.
//!
//! Blocks of rows are checked by several threads and taken in order, so what is found does not depend on their number.
//! Memory is bounded: statistics are sketches ([`statistics`](crate::statistics)); duplicates are found by hash among all
//! rows while the hashes fit and among a sample beyond; near duplicates among the first rows that fit. What is not exact
//! says so ([`Check::note`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use crate::error::DataError;
use crate::parallel::in_order;
use crate::personal::PersonalKind;
use crate::source::shard::ShardReader;
use crate::statistics::{CellValue, ColumnStatistics, ColumnSummary};

mod check;
mod drift;
mod near;
mod quarantine;
mod repeats;
mod rules;
mod search;
#[cfg(test)]
mod tests;

pub use drift::ColumnDrift;
pub use quarantine::{earlier_quarantine, quarantine};
pub use rules::{ColumnRules, Limits, Pattern, Rules};

use check::{Breach, Checker, Part, Seen};
use near::Near;
use repeats::Repeats;

/// Bad rows that are kept with their reasons. More are counted; nobody reads a million of them.
const BAD_ROWS_MAX: usize = 1_000_000;

/// Places that a report names of each kind of finding.
const PLACES_MAX: usize = 20;

/// How a dataset is validated.
pub struct ValidateOptions<'a> {
    /// Threads that read and check.
    pub threads: usize,
    /// Memory for hashes of rows: half for equal rows, half for nearly equal ones, each shared with the datasets to be apart from.
    pub memory_bytes: u64,
    /// Whether nearly equal rows are looked for, which takes most of the time for pictures.
    pub near: bool,
    /// Statistics of an earlier version, for drift.
    pub before: Option<&'a [ColumnStatistics]>,
    /// Datasets that must have no row in common with this one.
    pub apart: &'a [Vec<Arc<dyn ShardReader>>],
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Validation {
    /// Rows looked at.
    pub rows: u64,
    /// Rows that break a rule or cannot be read.
    pub bad_rows: u64,
    /// What has a measure, and a limit where the rules set one.
    pub checks: Vec<Check>,
    /// How often rows are bad for which reason, with some places.
    pub findings: Vec<Finding>,
    /// Personal data, counted.
    pub personal: Vec<PersonalCount>,
    /// Rows of each class.
    pub balance: Option<Vec<(CellValue, u64)>>,
    /// Columns against the earlier version.
    pub drift: Vec<ColumnDrift>,
    /// The columns.
    pub statistics: Vec<ColumnStatistics>,
    /// The bad rows, with all their reasons: shard, row in it, reasons.
    #[serde(skip)]
    pub quarantine: BTreeMap<(usize, u64), Vec<String>>,
}

/// One measure against its limit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What is measured.
    pub name: String,
    /// The column, where it is about one.
    pub column: Option<String>,
    /// What was found.
    pub value: f64,
    /// What the rules allow.
    pub limit: Option<f64>,
    /// Whether the limit is the least and not the most.
    pub is_least: bool,
    /// How far the measure can be trusted, where it is not exact; what it is made of.
    pub note: String,
}

impl Check {
    /// Whether the measure keeps its limit.
    pub fn passes(&self) -> bool {
        self.limit.is_none_or(|limit| if self.is_least { self.value >= limit } else { self.value <= limit })
    }
}

/// Rows that are bad for one reason.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// The column, where it is about one.
    pub column: Option<String>,
    /// The rule, in a word or two.
    pub rule: &'static str,
    /// Rows.
    pub rows: u64,
    /// The first places: where a row lies, and what is wrong with it.
    pub places: Vec<(String, String)>,
}

/// Personal data of one kind in one column.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PersonalCount {
    /// The column.
    pub column: String,
    /// What it is.
    pub kind: PersonalKind,
    /// Rows that hold some.
    pub rows: u64,
    /// How many.
    pub values: u64,
    /// The first places: where, and the value masked.
    pub places: Vec<(String, String)>,
}

/// A run of rows of a shard that is read at once.
struct Block {
    shard: usize,
    first: u64,
    rows: u64,
}

fn blocks(shards: &[Arc<dyn ShardReader>]) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (shard, reader) in shards.iter().enumerate() {
        let mut first = 0;
        for rows in reader.blocks().iter().copied().filter(|rows| *rows > 0) {
            blocks.push(Block { shard, first, rows });
            first += rows;
        }
    }
    blocks
}

/// Statistics of all columns, without any checks; missing cells are counted. `progress` is told of the rows that are done.
pub fn summarize(
    shards: &[Arc<dyn ShardReader>],
    threads: usize,
    mut progress: impl FnMut(u64),
) -> Result<Vec<ColumnStatistics>, DataError> {
    let Some(first) = shards.first() else { return Ok(Vec::new()) };
    let schema = first.schema().clone();
    let new = || schema.columns.iter().map(|c| ColumnSummary::new(&c.name)).collect::<Vec<_>>();
    let (mut sums, mut done, blocks) = (new(), 0, blocks(shards));
    let columns: Vec<usize> = (0..schema.columns.len()).collect();
    in_order(
        blocks.len(),
        threads,
        |at| {
            let Block { shard, first, rows } = blocks[at];
            let numbers: Vec<u64> = (first..first + rows).collect();
            let cells = shards[shard].read_partial(&columns, &numbers)?;
            let mut summaries = new();
            for ((summary, cells), column) in summaries.iter_mut().zip(&cells).zip(&schema.columns) {
                if let Some((row, reason)) = cells.fault() {
                    let (sample, column) = (shards[shard].place(numbers[row]), column.name.clone());
                    return Err(DataError::Sample { sample, column, reason: reason.to_owned() });
                }
                summary.push_partial(cells)?;
            }
            Ok::<_, DataError>(summaries)
        },
        |at, part: Vec<ColumnSummary>| {
            sums.iter_mut().zip(&part).for_each(|(sum, part)| sum.merge(part));
            done += blocks[at].rows;
            progress(done);
            Ok(())
        },
    )?;
    Ok(sums.into_iter().map(ColumnSummary::finish).collect())
}

/// Reads all shards and holds them against the rules. `progress` is told of the rows that are done.
///
/// # Errors
/// Rules about columns that are not there or of another kind, a store that does not answer, shards of different schemas.
/// Rows that cannot be read are no error but bad rows.
pub fn validate(
    shards: &[Arc<dyn ShardReader>],
    rules: &Rules,
    options: &ValidateOptions,
    mut progress: impl FnMut(u64),
) -> Result<Validation, DataError> {
    let Some(first) = shards.first() else {
        return Err(DataError::Loader("a dataset without shards has nothing to validate".into()));
    };
    rules.check(first.schema()).map_err(DataError::Loader)?;
    check_measured(rules, options).map_err(DataError::Loader)?;
    if let Some((other, difference)) = shards.iter().find_map(|s| Some((s, first.schema().difference(s.schema())?))) {
        return Err(DataError::Loader(format!("{}: {difference}, as in {}", other.place(0), first.place(0))));
    }
    let checker = Checker::new(rules, first.as_ref(), options.near)?;
    let blocks = blocks(shards);
    let mut gathered = Gathered::new(shards, &checker, options);
    for apart in options.apart {
        gathered.hash_apart(apart, options.threads)?;
    }
    let mut done = 0;
    in_order(
        blocks.len(),
        options.threads,
        |at| {
            let Block { shard, first, rows } = blocks[at];
            checker.check(shards[shard].as_ref(), first..first + rows)
        },
        |at, part| {
            done += part.rows;
            gathered.take(blocks[at].shard, part);
            progress(done);
            Ok(())
        },
    )?;
    Ok(gathered.finish(rules, options.before))
}

/// Up to which row nearly equal ones were looked for, where that is not the last.
fn looked_for(until: Option<u64>) -> String {
    until.map(|rows| format!(", looked for among the first {rows} rows")).unwrap_or_default()
}

/// A limit on what is not measured would always be kept.
fn check_measured(rules: &Rules, options: &ValidateOptions) -> Result<(), String> {
    let limits = &rules.limits;
    let unmeasured = [
        (
            "leaks",
            limits.leaks.is_some() && options.apart.is_empty(),
            "needs a dataset to be apart from (`--apart-from`)",
        ),
        ("psi", limits.psi.is_some() && options.before.is_none(), "needs a version to compare with (`--against`)"),
        ("ks", limits.ks.is_some() && options.before.is_none(), "needs a version to compare with (`--against`)"),
        ("near_duplicates", limits.near_duplicates.is_some() && !options.near, "is not measured with `--no-near`"),
        (
            "near_leaks",
            limits.near_leaks.is_some() && (!options.near || options.apart.is_empty()),
            "needs a dataset to be apart from (`--apart-from`), and is not measured with `--no-near`",
        ),
    ];
    match unmeasured.iter().find(|(_, is_unmeasured, _)| *is_unmeasured) {
        Some((name, _, reason)) => Err(format!("the limit `{name}` {reason}")),
        None => Ok(()),
    }
}

/// How the reason begins for which a row is a duplicate, and that of a leak.
const EQUALS: &str = "equals ";
const LEAKED: &str = "is also in a dataset";

/// All blocks taken so far.
struct Gathered<'a> {
    shards: &'a [Arc<dyn ShardReader>],
    checker: &'a Checker,
    /// The number of a shard's first row among all.
    starts: Vec<u64>,
    rows: u64,
    summaries: Vec<ColumnSummary>,
    equal: Repeats,
    apart: Vec<Repeats>,
    unique: BTreeMap<usize, Repeats>,
    /// Rows that were found to repeat a cell of such a column.
    unique_found: BTreeMap<usize, u64>,
    near: Near,
    /// The same of each dataset to be apart from.
    near_apart: Vec<Near>,
    near_rows: u64,
    near_leaks: u64,
    leaks: u64,
    bad_rows: u64,
    personal_rows: u64,
    findings: BTreeMap<(Option<usize>, &'static str), Finding>,
    personal: BTreeMap<(usize, PersonalKind), PersonalCount>,
    quarantine: BTreeMap<(usize, u64), Vec<String>>,
    has_near: bool,
    memory_bytes: u64,
}

impl<'a> Gathered<'a> {
    fn new(shards: &'a [Arc<dyn ShardReader>], checker: &'a Checker, options: &ValidateOptions) -> Gathered<'a> {
        let starts = shards.iter().scan(0, |sum, shard| Some(std::mem::replace(sum, *sum + shard.rows()))).collect();
        let columns = &checker.schema.columns;
        let unique: Vec<usize> = (0..columns.len()).filter(|at| checker.must_be_unique(*at)).collect();
        // One table for this dataset, one for each it must be apart from, one for each unique column.
        let tables = 1 + options.apart.len() as u64 + unique.len() as u64;
        let room_bytes = options.memory_bytes / 2 / tables;
        let near_bytes = options.memory_bytes / 2 / (1 + options.apart.len() as u64);
        Gathered {
            shards,
            checker,
            starts,
            rows: 0,
            summaries: checker.summaries(),
            equal: Repeats::new(room_bytes),
            apart: Vec::new(),
            unique: unique.into_iter().map(|at| (at, Repeats::new(room_bytes))).collect(),
            unique_found: BTreeMap::new(),
            near: Near::new(near_bytes),
            near_apart: options.apart.iter().map(|_| Near::new(near_bytes)).collect(),
            near_rows: 0,
            near_leaks: 0,
            leaks: 0,
            bad_rows: 0,
            personal_rows: 0,
            findings: BTreeMap::new(),
            personal: BTreeMap::new(),
            quarantine: BTreeMap::new(),
            has_near: options.near,
            memory_bytes: room_bytes,
        }
    }

    /// Remembers the rows of a dataset that this one must be apart from.
    fn hash_apart(&mut self, shards: &[Arc<dyn ShardReader>], threads: usize) -> Result<(), DataError> {
        let mut rows = Repeats::new(self.memory_bytes);
        let near = &mut self.near_apart[self.apart.len()];
        let blocks = blocks(shards);
        let mut number = 0;
        in_order(
            blocks.len(),
            threads,
            |at| {
                let Block { shard, first, rows } = blocks[at];
                self.checker.others(shards[shard].as_ref(), first..first + rows)
            },
            |at, (hashes, seen): (Vec<u128>, Vec<Seen>)| {
                for Seen { row, column, look } in seen {
                    near.push(column, look, number + row - blocks[at].first);
                }
                for hash in hashes {
                    rows.push(hash, number);
                    number += 1;
                }
                Ok(())
            },
        )?;
        self.apart.push(rows);
        Ok(())
    }

    fn place(&self, row: u64) -> String {
        let shard = self.starts.partition_point(|start| *start <= row).saturating_sub(1);
        // Shards without rows share their start with the one behind them.
        self.shards[shard].place(row - self.starts[shard])
    }

    fn take(&mut self, shard: usize, part: Part) {
        let start = self.starts[shard];
        self.rows += part.rows;
        self.summaries.iter_mut().zip(&part.summaries).for_each(|(sum, part)| sum.merge(part));

        let mut bad: Vec<u64> = part.bad.iter().map(|breach| breach.row).collect();
        for breach in part.bad {
            self.find(shard, breach);
        }
        for (row, hash) in &part.hashes {
            if let Some(first) = self.equal.push(*hash, start + row) {
                let reason = format!("{EQUALS}{}", self.place(first));
                self.find(shard, Breach { row: *row, column: None, rule: "duplicate", reason });
            }
            // The samples of two datasets are nested, so a row of both is found in the larger one first.
            let found_in = self.apart.iter().filter(|rows| rows.find(*hash).is_some());
            if let Some(one_in) = found_in.map(Repeats::one_in).min() {
                self.leaks += one_in;
                let reason = format!("{LEAKED} that this one must be apart from");
                self.find(shard, Breach { row: *row, column: None, rule: "leak", reason });
            }
        }
        for (column, row, hash) in part.unique {
            let first = self.unique.get_mut(&column).and_then(|seen| seen.push(hash, start + row));
            if let Some(first) = first {
                *self.unique_found.entry(column).or_default() += 1;
                let reason = format!("is not unique: {} has the same", self.place(first));
                bad.push(row);
                self.find(shard, Breach { row, column: Some(column), rule: "not unique", reason });
            }
        }
        bad.sort_unstable();
        bad.dedup();
        self.bad_rows += bad.len() as u64;
        self.take_near(shard, part.seen);

        let mut personal_rows: Vec<u64> = Vec::new();
        for found in part.personal {
            let name = &self.checker.schema.columns[found.column].name;
            let new =
                || PersonalCount { column: name.clone(), kind: found.kind, rows: 0, values: 0, places: Vec::new() };
            let count = self.personal.entry((found.column, found.kind)).or_insert_with(new);
            count.rows += found.rows.len() as u64;
            count.values += found.values;
            let room = PLACES_MAX.saturating_sub(count.places.len());
            let places = found.places.into_iter().take(room).map(|(row, text)| (self.shards[shard].place(row), text));
            count.places.extend(places);
            personal_rows.extend(found.rows);
        }
        personal_rows.sort_unstable();
        personal_rows.dedup();
        self.personal_rows += personal_rows.len() as u64;
    }

    fn take_near(&mut self, shard: usize, seen: Vec<Seen>) {
        let start = self.starts[shard];
        let (mut near_row, mut leaked_row) = (None, None);
        for Seen { row, column, look } in seen {
            // Whether there are looks of later rows depends on which thread was faster.
            if self.near.until().is_some() {
                break;
            }
            // What is equal was found as such.
            let reasons = self.quarantine.get(&(shard, row));
            let is_found = |how: &str| reasons.is_some_and(|reasons| reasons.iter().any(|r| r.starts_with(how)));
            let (is_equal, is_leak) = (is_found(EQUALS), is_found(LEAKED));
            let is_near_other = self.near_apart.iter().any(|other| other.find(column, &look).is_some());
            if is_near_other && !is_leak && leaked_row != Some(row) {
                leaked_row = Some(row);
                self.near_leaks += 1;
                let reason = "nearly equals a row of a dataset that this one must be apart from".into();
                self.note(shard, &Breach { row, column: Some(column), rule: "near leak", reason });
            }
            let near = self.near.push(column, look, start + row);
            if let Some(first) = near.filter(|first| !is_equal && near_row != Some(row) && *first != start + row) {
                near_row = Some(row);
                self.near_rows += 1;
                let reason = format!("nearly equals {}", self.place(first));
                self.note(shard, &Breach { row, column: Some(column), rule: "near duplicate", reason });
            }
        }
        if self.near.until().is_some() {
            self.checker.end_near();
        }
    }

    /// A row that is to be taken out.
    fn find(&mut self, shard: usize, breach: Breach) {
        self.note(shard, &breach);
        let key = (shard, breach.row);
        if self.quarantine.len() < BAD_ROWS_MAX || self.quarantine.contains_key(&key) {
            let named = match breach.column {
                Some(at) => format!("{}: {}", self.checker.schema.columns[at].name, breach.reason),
                None => breach.reason,
            };
            self.quarantine.entry(key).or_default().push(named);
        }
    }

    fn note(&mut self, shard: usize, breach: &Breach) {
        let new = || Finding {
            column: breach.column.map(|at| self.checker.schema.columns[at].name.clone()),
            rule: breach.rule,
            rows: 0,
            places: Vec::new(),
        };
        let finding = self.findings.entry((breach.column, breach.rule)).or_insert_with(new);
        finding.rows += 1;
        if finding.places.len() < PLACES_MAX {
            finding.places.push((self.shards[shard].place(breach.row), breach.reason.clone()));
        }
    }

    fn finish(self, rules: &Rules, before: Option<&[ColumnStatistics]>) -> Validation {
        let limits = &rules.limits;
        let rows = self.rows.max(1) as f64;
        let statistics: Vec<ColumnStatistics> = self.summaries.into_iter().map(ColumnSummary::finish).collect();
        let mut checks = Vec::new();
        let mut check = |name: &str, column: Option<&str>, value: f64, limit: Option<f64>, note: String| {
            let (name, column) = (name.to_owned(), column.map(str::to_owned));
            checks.push(Check { is_least: name == "balance", name, column, value, limit, note });
        };
        // Where cells that repeat were looked for in a sample, those outside of it count, too.
        let unseen = |(column, seen): (&usize, &Repeats)| {
            seen.repeats().saturating_sub(self.unique_found.get(column).copied().unwrap_or(0))
        };
        let bad_rows = (self.bad_rows + self.unique.iter().map(unseen).sum::<u64>()).min(self.rows);
        let one_in = self.unique.values().map(Repeats::one_in).max().filter(|one_in| *one_in > 1);
        let estimated = one_in.map(|n| format!(", repeated cells estimated from one in {n}")).unwrap_or_default();
        check("bad rows", None, bad_rows as f64 / rows, limits.bad_rows, format!("{bad_rows} rows{estimated}"));
        let equal = self.equal.repeats();
        let sampled = |repeats: &Repeats| match repeats.is_exact() {
            true => String::new(),
            false => format!(", estimated from one in {} distinct rows", repeats.one_in()),
        };
        let note = format!("{equal} rows equal an earlier one{}", sampled(&self.equal));
        check("duplicates", None, equal as f64 / rows, limits.duplicates, note);
        if self.has_near {
            let until = looked_for(self.near.until());
            let note = format!("{} rows nearly equal an earlier one{until}", self.near_rows);
            check("near duplicates", None, self.near_rows as f64 / rows, limits.near_duplicates, note);
        }
        if !self.apart.is_empty() {
            let sampled: String = self.apart.iter().map(sampled).collect();
            let by = self.checker.identity_names().map_or("all columns".to_owned(), |names| names.join(", "));
            let note = format!("{} rows are in both, by {by}{sampled}", self.leaks);
            check("leaks", None, self.leaks as f64 / rows, limits.leaks.or(Some(0.0)), note);
            if self.has_near {
                let until = looked_for(self.near.until());
                let among = self.near_apart.iter().filter_map(Near::until).min();
                let among = among.map(|n| format!(", among the first {n} rows of the other")).unwrap_or_default();
                let note = format!("{} rows nearly equal one of the other{until}{among}", self.near_leaks);
                check("near leaks", None, self.near_leaks as f64 / rows, limits.near_leaks, note);
            }
        }
        if self.checker.has_text() || limits.personal.is_some() {
            let note = format!("{} rows hold some", self.personal_rows);
            check("personal data", None, self.personal_rows as f64 / rows, limits.personal, note);
        }
        for column in &statistics {
            let limit = rules.columns.get(&column.column).and_then(|r| r.missing_max);
            if limit.is_some() {
                let note = format!("{} cells", column.missing);
                check("missing", Some(&column.column), column.missing as f64 / rows, limit, note);
            }
        }
        let names = ["label", "class", "target"];
        let label = rules.label.as_deref().or_else(|| {
            names.into_iter().find(|name| statistics.iter().any(|s| s.column == *name && s.values.is_some()))
        });
        let labelled = label.and_then(|label| statistics.iter().find(|s| s.column == label));
        let balance = labelled.and_then(|s| s.values.clone());
        if let (Some(column), Some(classes)) = (labelled, &balance) {
            let least = classes.iter().map(|(_, n)| *n).min().unwrap_or(0);
            let most = classes.iter().map(|(_, n)| *n).max().unwrap_or(1);
            let note = format!("{} classes of {least} to {most} rows", classes.len());
            check("balance", Some(&column.column), least as f64 / most.max(1) as f64, limits.balance, note);
        } else if limits.balance.is_some() {
            // Nobody can say that it is balanced.
            let note =
                if labelled.is_some() { "too many values to count" } else { "no column is named as the `label`" };
            check("balance", labelled.map(|s| s.column.as_str()), 0.0, limits.balance, note.into());
        }
        let mut drifts = Vec::new();
        // What cannot be compared has moved as far as anybody can tell.
        let incomparable_max = limits.psi.or(limits.ks).map(|_| 0.0);
        let dropped = before.into_iter().flatten().filter(|s| statistics.iter().all(|now| now.column != s.column));
        for earlier in dropped {
            check("drift", Some(&earlier.column), 1.0, incomparable_max, "the column is gone".into());
        }
        for current in before.iter().flat_map(|_| &statistics) {
            let earlier = before.into_iter().flatten().find(|s| s.column == current.column);
            let Some(found) = earlier.and_then(|earlier| drift::drift(earlier, current)) else {
                let note = if earlier.is_some() { "nothing that can be compared" } else { "the column is new" };
                check("drift", Some(&current.column), 1.0, incomparable_max, note.into());
                continue;
            };
            check("drift (PSI)", Some(&current.column), found.psi, limits.psi, format!("of {}", found.of));
            if let Some(ks) = found.ks {
                check("drift (KS)", Some(&current.column), ks, limits.ks, format!("of {}", found.of));
            }
            drifts.push(found);
        }
        let mut findings: Vec<Finding> = self.findings.into_values().collect();
        findings.sort_by_key(|f| std::cmp::Reverse(f.rows));
        Validation {
            rows: self.rows,
            bad_rows: self.bad_rows,
            checks,
            findings,
            personal: self.personal.into_values().collect(),
            balance,
            drift: drifts,
            statistics,
            quarantine: self.quarantine,
        }
    }
}
