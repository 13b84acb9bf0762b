//! Statistics of columns, gathered while rows stream by, in bounded memory, and added up over parts.
//!
//! Counts, least and most are exact. Mean and deviation are those of Chan, Golub and LeVeque ("Updating formulae and a
//! pairwise algorithm for computing sample variances", 1979). Histograms have buckets of fixed borders; the number of
//! different values is an estimate beyond a thousand. What is merged in the order of the rows has the same bits whoever
//! did the parts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use updraft_graph::{DType, Tensor};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::DataError;
use crate::personal;
use crate::rows::{Cells, PartialCells};

mod distinct;
mod histogram;

pub use distinct::Distinct;
pub use histogram::{BUCKETS_MAX, Bar, Histogram};

/// Values counted one by one, while there are no more than these: labels and small vocabularies.
pub const VALUES_MAX: usize = 256;

/// The longest text that is counted as a value.
const VALUE_BYTES_MAX: usize = 64;

/// What is known about the cells of a column.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ColumnStatistics {
    /// The name of the column.
    pub column: String,
    /// Cells.
    pub rows: u64,
    /// Cells that are empty, null, or whose numbers are all NaN; cells that cannot be read.
    pub missing: u64,
    /// Of the numbers in the cells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numbers: Option<NumberStatistics>,
    /// Of bytes in a cell of text or bytes, or of elements of a list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lengths: Option<NumberStatistics>,
    /// Different cells.
    pub distinct: Distinct,
    /// How often each value was met, in their order, with e-mail addresses and the like masked: lists of values are kept and shown
    /// where rows are not. `None` where there are too many, or they are too long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Vec<(CellValue, u64)>>,
}

/// A cell of one number, or of short text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum CellValue {
    /// A number.
    Number(f64),
    /// Text.
    Text(String),
}

impl std::fmt::Display for CellValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CellValue::Number(number) => write!(f, "{number}"),
            CellValue::Text(text) => f.write_str(text),
        }
    }
}

/// What is known about some numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NumberStatistics {
    /// Numbers, without those that are none.
    pub count: u64,
    /// Elements that are no number (NaN).
    pub nan: u64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// The mean.
    pub mean: f64,
    /// The sum of squared differences from the mean.
    squares: f64,
    /// How they are distributed.
    pub histogram: Histogram,
}

impl Default for NumberStatistics {
    fn default() -> NumberStatistics {
        // Least and largest of nothing: the next number replaces both, and JSON holds them, unlike infinities.
        NumberStatistics {
            count: 0,
            nan: 0,
            min: f64::MAX,
            max: f64::MIN,
            mean: 0.0,
            squares: 0.0,
            histogram: Histogram::default(),
        }
    }
}

impl NumberStatistics {
    /// Takes more numbers. Infinities are clamped to the largest finite numbers, of which JSON knows.
    pub fn extend(&mut self, values: impl Iterator<Item = f64> + Clone) {
        let finite = values.map(|v| if v.is_nan() { v } else { v.clamp(f64::MIN, f64::MAX) });
        for value in finite.clone() {
            if value.is_nan() {
                self.nan += 1;
                continue;
            }
            self.count += 1;
            self.min = self.min.min(value);
            self.max = self.max.max(value);
            let from_mean = value - self.mean;
            self.mean += from_mean / self.count as f64;
            self.squares += from_mean * (value - self.mean);
        }
        self.histogram.extend(finite);
    }

    /// Adds the numbers of the part that follows.
    pub fn merge(&mut self, other: &NumberStatistics) {
        let (a, b) = (self.count as f64, other.count as f64);
        self.nan += other.nan;
        if other.count > 0 {
            let apart = other.mean - self.mean;
            self.mean += apart * (b / (a + b));
            self.squares += other.squares + apart * apart * (a * b / (a + b));
            self.count += other.count;
            self.min = self.min.min(other.min);
            self.max = self.max.max(other.max);
        }
        self.histogram.merge(&other.histogram);
    }

    /// The standard deviation of the numbers themselves (divided by their count).
    pub fn std(&self) -> f64 {
        if self.count == 0 { 0.0 } else { (self.squares / self.count as f64).max(0.0).sqrt() }
    }
}

/// The statistics of a column in the making.
#[derive(Debug, Clone)]
pub struct ColumnSummary {
    statistics: ColumnStatistics,
    /// By their ordered bits; `None` once there were too many.
    numbers: Option<BTreeMap<u64, u64>>,
    texts: Option<BTreeMap<String, u64>>,
}

impl ColumnSummary {
    /// Of a column with no cells yet.
    pub fn new(column: &str) -> ColumnSummary {
        let statistics = ColumnStatistics { column: column.to_owned(), ..ColumnStatistics::default() };
        ColumnSummary { statistics, numbers: Some(BTreeMap::new()), texts: Some(BTreeMap::new()) }
    }

    /// Takes the cells of the next rows.
    pub fn push(&mut self, cells: &Cells) -> Result<(), DataError> {
        let statistics = &mut self.statistics;
        match cells {
            Cells::Bytes(cells) => {
                statistics.rows += cells.len() as u64;
                statistics.missing += cells.iter().filter(|c| c.is_empty()).count() as u64;
                let lengths = cells.iter().map(|c| c.len() as f64);
                statistics.lengths.get_or_insert_default().extend(lengths);
                for cell in cells {
                    statistics.distinct.push(xxh3_64(cell));
                    let Some(texts) = &mut self.texts else { continue };
                    match std::str::from_utf8(cell) {
                        Ok(text) if text.len() <= VALUE_BYTES_MAX => match texts.get_mut(text) {
                            Some(count) => *count += 1,
                            None => *texts.entry(personal::redacted(text.as_bytes())).or_insert(0) += 1,
                        },
                        _ => self.texts = None,
                    }
                    if self.texts.as_ref().is_some_and(|t| t.len() > VALUES_MAX) {
                        self.texts = None;
                    }
                }
            }
            Cells::Numbers(tensor) => {
                let rows = tensor.shape().first().copied().unwrap_or(0);
                let width = tensor.len().checked_div(rows).unwrap_or(0);
                statistics.rows += rows as u64;
                let numbers = statistics.numbers.get_or_insert_default();
                let values = numbers_of(tensor)?;
                numbers.extend(values.iter().copied());
                let row_bytes = tensor.byte_len().checked_div(rows).unwrap_or(0);
                for row in 0..rows {
                    statistics.distinct.push(xxh3_64(&tensor.bytes()[row * row_bytes..][..row_bytes]));
                    let cell = &values[row * width..][..width];
                    statistics.missing += u64::from(cell.iter().all(|v| v.is_nan()));
                }
                if width == 1 {
                    count_numbers(&mut self.numbers, &values);
                } else {
                    self.numbers = None;
                }
            }
            Cells::Lists(lists) => {
                statistics.rows += lists.len() as u64;
                statistics.missing += lists.iter().filter(|l| l.is_empty()).count() as u64;
                statistics.lengths.get_or_insert_default().extend(lists.iter().map(|l| l.len() as f64));
                self.numbers = None;
                for list in lists {
                    statistics.distinct.push(xxh3_64(list.bytes()));
                    let values = numbers_of(list)?;
                    statistics.numbers.get_or_insert_default().extend(values.iter().copied());
                }
            }
        }
        Ok(())
    }

    /// Takes cells of which some may be missing; those count as such and as nothing else.
    pub fn push_partial(&mut self, cells: &PartialCells) -> Result<(), DataError> {
        if cells.gaps.is_empty() {
            return self.push(&cells.cells);
        }
        self.push(&cells.present())?;
        self.statistics.rows += cells.gaps.len() as u64;
        self.statistics.missing += cells.gaps.len() as u64;
        Ok(())
    }

    /// Adds the cells of the part that follows.
    pub fn merge(&mut self, other: &ColumnSummary) {
        self.statistics.merge_counts(&other.statistics);
        merge_values(&mut self.numbers, &other.numbers);
        merge_values(&mut self.texts, &other.texts);
    }

    /// The statistics.
    pub fn finish(self) -> ColumnStatistics {
        let mut statistics = self.statistics;
        let numbers = self.numbers.filter(|n| !n.is_empty()).map(|numbers| {
            let value = |bits| CellValue::Number(histogram::of_ordered_bits(bits));
            numbers.into_iter().map(|(bits, count)| (value(bits), count)).collect()
        });
        let texts = self
            .texts
            .filter(|t| !t.is_empty())
            .map(|texts| texts.into_iter().map(|(text, count)| (CellValue::Text(text), count)).collect());
        statistics.values = if statistics.numbers.is_some() { numbers } else { texts };
        statistics
    }
}

impl ColumnStatistics {
    /// Adds the statistics of the part that follows.
    pub fn merge(&mut self, other: &ColumnStatistics) {
        // No rows say nothing about values; a part without a list of them had too many.
        let before = std::mem::take(&mut self.values);
        self.values = match (self.rows, other.rows) {
            (0, _) => other.values.clone(),
            (_, 0) => before,
            _ => before.zip(other.values.as_ref()).and_then(|(values, more)| {
                let mut sums: BTreeMap<ValueKey, u64> = BTreeMap::new();
                for (value, count) in values.iter().chain(more) {
                    *sums.entry(ValueKey::of(value)).or_insert(0) += count;
                }
                let fits = sums.len() <= VALUES_MAX;
                fits.then(|| sums.into_iter().map(|(key, count)| (key.value(), count)).collect())
            }),
        };
        self.merge_counts(other);
    }

    fn merge_counts(&mut self, other: &ColumnStatistics) {
        self.rows += other.rows;
        self.missing += other.missing;
        for (mine, theirs) in [(&mut self.numbers, &other.numbers), (&mut self.lengths, &other.lengths)] {
            if let Some(theirs) = theirs {
                mine.get_or_insert_default().merge(theirs);
            }
        }
        self.distinct.merge(&other.distinct);
    }

    /// The same in a few hundred bytes to a few kilobytes, for a manifest that names thousands of shards.
    pub fn coarse(mut self) -> ColumnStatistics {
        const KEPT: usize = 64;
        for numbers in [&mut self.numbers, &mut self.lengths].into_iter().flatten() {
            numbers.histogram = std::mem::take(&mut numbers.histogram).coarse(KEPT);
        }
        self.distinct = self.distinct.coarse(KEPT);
        self.values = self.values.filter(|values| values.len() <= KEPT);
        self
    }
}

/// A value that has an order.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum ValueKey {
    Number(u64),
    Text(String),
}

impl ValueKey {
    fn of(value: &CellValue) -> ValueKey {
        match value {
            CellValue::Number(number) => ValueKey::Number(histogram::ordered_bits(*number)),
            CellValue::Text(text) => ValueKey::Text(text.clone()),
        }
    }

    fn value(self) -> CellValue {
        match self {
            ValueKey::Number(bits) => CellValue::Number(histogram::of_ordered_bits(bits)),
            ValueKey::Text(text) => CellValue::Text(text),
        }
    }
}

fn count_numbers(counts: &mut Option<BTreeMap<u64, u64>>, values: &[f64]) {
    let Some(numbers) = counts else { return };
    for value in values.iter().filter(|v| v.is_finite()) {
        *numbers.entry(histogram::ordered_bits(*value)).or_insert(0) += 1;
        if numbers.len() > VALUES_MAX {
            *counts = None;
            return;
        }
    }
}

fn merge_values<K: Ord + Clone>(mine: &mut Option<BTreeMap<K, u64>>, theirs: &Option<BTreeMap<K, u64>>) {
    match (mine.as_mut(), theirs) {
        (Some(sums), Some(more)) => {
            for (value, count) in more {
                *sums.entry(value.clone()).or_insert(0) += count;
            }
            if sums.len() > VALUES_MAX {
                *mine = None;
            }
        }
        _ => *mine = None,
    }
}

/// The elements as `f64`; whole numbers beyond 2^53 are rounded.
pub(crate) fn numbers_of(tensor: &Tensor) -> Result<Vec<f64>, DataError> {
    match tensor.dtype() {
        DType::U8 => Ok(tensor.bytes().iter().map(|b| f64::from(*b)).collect()),
        _ => tensor.to_f64().map_err(|e| DataError::Loader(e.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn summary(cells: &[Cells]) -> ColumnSummary {
        let mut summary = ColumnSummary::new("x");
        cells.iter().for_each(|c| summary.push(c).unwrap());
        summary
    }

    fn texts(texts: &[&str]) -> Cells {
        Cells::Bytes(texts.iter().map(|t| Bytes::copy_from_slice(t.as_bytes())).collect())
    }

    #[test]
    fn numbers_have_the_moments_of_the_textbook_and_nan_is_missing() {
        let values = [2.0f32, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0, f32::NAN];
        let statistics = summary(&[Cells::Numbers(Tensor::vector(&values))]).finish();
        let numbers = statistics.numbers.unwrap();
        assert_eq!((statistics.rows, statistics.missing, numbers.count, numbers.nan), (9, 1, 8, 1));
        assert_eq!((numbers.min, numbers.max), (2.0, 9.0));
        assert!((numbers.mean - 5.0).abs() < 1e-12 && (numbers.std() - 2.0).abs() < 1e-12);
        let counts: Vec<u64> = statistics.values.unwrap().into_iter().map(|(_, n)| n).collect();
        assert_eq!(counts, [1, 3, 2, 1, 1]);
    }

    #[test]
    fn text_has_lengths_values_and_a_number_of_different_ones() {
        let statistics = summary(&[texts(&["ripe", "raw", ""]), texts(&["raw"])]).finish();
        assert_eq!((statistics.rows, statistics.missing, statistics.distinct.estimate()), (4, 1, 3));
        let lengths = statistics.lengths.unwrap();
        assert_eq!((lengths.min, lengths.max, lengths.mean), (0.0, 4.0, 2.5));
        let text = |t: &str| CellValue::Text(t.to_owned());
        assert_eq!(statistics.values.unwrap(), [(text(""), 1), (text("raw"), 2), (text("ripe"), 1)]);
    }

    #[test]
    fn merged_files_and_merged_summaries_agree_with_the_whole() {
        let values: Vec<i64> = (0..4000).map(|i| (i * i) % 97).collect();
        let part = |range: std::ops::Range<usize>| summary(&[Cells::Numbers(Tensor::vector(&values[range]))]);
        let whole = part(0..4000).finish();
        let mut merged = part(0..1234);
        merged.merge(&part(1234..4000));
        let mut stored = part(0..1234).finish();
        let text = serde_json::to_string(&part(1234..4000).finish()).unwrap();
        stored.merge(&serde_json::from_str(&text).unwrap());
        for found in [merged.finish(), stored] {
            assert_eq!((&found.values, &found.distinct, found.rows), (&whole.values, &whole.distinct, whole.rows));
            let (found, whole) = (found.numbers.unwrap(), whole.numbers.as_ref().unwrap());
            assert_eq!((&found.histogram, found.min, found.max), (&whole.histogram, whole.min, whole.max));
            // Sums of 4,000 rounding errors of 2^-53 each.
            assert!((found.mean - whole.mean).abs() < 1e-10 && (found.std() - whole.std()).abs() < 1e-10);
        }
    }

    #[test]
    fn too_many_values_are_not_listed_however_the_parts_are_cut() {
        let values: Vec<i64> = (0..300).collect();
        let part = |range: std::ops::Range<usize>| summary(&[Cells::Numbers(Tensor::vector(&values[range]))]);
        let mut merged = part(0..150);
        merged.merge(&part(150..300));
        assert_eq!((merged.finish().values, part(0..300).finish().values), (None, None));
        let mut stored = part(0..150).finish();
        stored.merge(&part(150..300).finish());
        assert_eq!((stored.values, stored.distinct.estimate()), (None, 300));
        assert_eq!(part(0..150).finish().coarse().values, None);
    }
}
