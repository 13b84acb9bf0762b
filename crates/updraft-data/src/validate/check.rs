//! What one block of rows shows: statistics, hashes, and which rows break which rule. Blocks are checked apart from each
//! other, on any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use xxhash_rust::xxh3::xxh3_128;

use super::near::{self, Look};
use super::rules::{ColumnRules, Rules};
use super::search::read_apart;
use crate::error::DataError;
use crate::personal::{self, PersonalKind};
use crate::picture::{Picture, Workspace};
use crate::rows::{Cells, Gap, PartialCells};
use crate::schema::{Column, Kind, Schema};
use crate::source::shard::ShardReader;
use crate::statistics::{CellValue, ColumnSummary, numbers_of};

/// Places of personal data that a block hands on for the report, for each column.
const PLACES_OF_BLOCK: usize = 20;

/// The rules, prepared for a schema.
pub(super) struct Checker {
    pub(super) schema: Arc<Schema>,
    columns: Vec<ColumnRules>,
    label: Option<String>,
    pictures: Vec<bool>,
    identity: Vec<usize>,
    with_near: bool,
    /// Set when there is no more memory for what rows show: nobody asks for it from then on.
    near_is_over: AtomicBool,
}

/// What a cell shows, by column and row.
pub(super) struct Seen {
    pub(super) row: u64,
    pub(super) column: usize,
    pub(super) look: Look,
}

/// What a block shows. Rows are numbered in their shard.
pub(super) struct Part {
    pub(super) rows: u64,
    pub(super) summaries: Vec<ColumnSummary>,
    /// The identity of each row that could be read.
    pub(super) hashes: Vec<(u64, u128)>,
    /// The cells of columns that must be unique: column, row, hash.
    pub(super) unique: Vec<(usize, u64, u128)>,
    pub(super) seen: Vec<Seen>,
    pub(super) bad: Vec<Breach>,
    pub(super) personal: Vec<PersonalCells>,
}

/// A rule that a row breaks.
pub(super) struct Breach {
    pub(super) row: u64,
    /// `None` where it is about the whole row.
    pub(super) column: Option<usize>,
    /// Which rule, in a word or two.
    pub(super) rule: &'static str,
    pub(super) reason: String,
}

/// A broken rule, and how.
type Broken = (&'static str, String);

/// Personal data of one kind in one column of a block.
pub(super) struct PersonalCells {
    pub(super) column: usize,
    pub(super) kind: PersonalKind,
    /// Every row that holds some.
    pub(super) rows: Vec<u64>,
    pub(super) values: u64,
    /// The first, masked.
    pub(super) places: Vec<(u64, String)>,
}

impl Checker {
    /// Looks at some rows to see which columns hold pictures.
    pub(super) fn new(rules: &Rules, reader: &dyn ShardReader, with_near: bool) -> Result<Checker, DataError> {
        let schema = reader.schema().clone();
        let columns: Vec<ColumnRules> =
            schema.columns.iter().map(|c| rules.columns.get(&c.name).cloned().unwrap_or_default()).collect();
        let mut pictures = Vec::with_capacity(columns.len());
        for (at, (column, rules)) in schema.columns.iter().zip(&columns).enumerate() {
            pictures.push(match rules.decode {
                Some(decode) => decode,
                None => column.kind == Kind::Bytes && holds_pictures(reader, at)?,
            });
        }
        let identity = match rules.identity.as_slice() {
            [] => (0..columns.len()).collect(),
            names => names.iter().filter_map(|name| schema.index_of(name)).collect(),
        };
        let near_is_over = AtomicBool::new(false);
        Ok(Checker { schema, columns, label: rules.label.clone(), pictures, identity, with_near, near_is_over })
    }

    /// No rows after those that were taken are compared with others that show nearly the same.
    pub(super) fn end_near(&self) {
        self.near_is_over.store(true, Ordering::Relaxed);
    }

    /// The columns by which rows are the same; `None` where all are.
    pub(super) fn identity_names(&self) -> Option<Vec<&str>> {
        let names = self.identity.iter().map(|at| self.schema.columns[*at].name.as_str()).collect();
        (self.identity.len() < self.schema.columns.len()).then_some(names)
    }

    /// Summaries of all columns, with no cells yet.
    pub(super) fn summaries(&self) -> Vec<ColumnSummary> {
        let new = |name: &String| match self.label.as_ref() == Some(name) {
            true => ColumnSummary::of_label(name),
            false => ColumnSummary::new(name),
        };
        self.schema.columns.iter().map(|column| new(&column.name)).collect()
    }

    /// Whether any column may hold text.
    pub(super) fn has_text(&self) -> bool {
        let kinds = self.schema.columns.iter().map(|c| &c.kind).zip(&self.pictures);
        kinds.into_iter().any(|(kind, is_picture)| matches!(kind, Kind::Text | Kind::Bytes) && !is_picture)
    }

    pub(super) fn must_be_unique(&self, column: usize) -> bool {
        self.columns[column].unique
    }

    /// What rows of another dataset are the same by, and what they show: the hashes over the columns of the identity, and the
    /// looks of pictures and texts in columns that both have, under the numbers of the columns here. A row that cannot be
    /// read is an error.
    pub(super) fn others(
        &self,
        reader: &dyn ShardReader,
        rows: std::ops::Range<u64>,
    ) -> Result<(Vec<u128>, Vec<Seen>), DataError> {
        let rows: Vec<u64> = rows.collect();
        let is_text = |kind: &Kind| matches!(kind, Kind::Text | Kind::Bytes);
        let mut places = Vec::with_capacity(self.identity.len());
        for at in &self.identity {
            let Column { name, kind } = &self.schema.columns[*at];
            let place = reader.schema().index_of(name).ok_or_else(|| {
                DataError::Loader(format!("{} has no column `{name}` to compare rows by", reader.place(0)))
            })?;
            // Bytes and text of one content are equal; numbers of two types are not, as bytes.
            let other = &reader.schema().columns[place].kind;
            if other != kind && !(is_text(other) && is_text(kind)) {
                return Err(DataError::Loader(format!(
                    "{}: column `{name}` holds {other}, and {kind} in the dataset that it is compared with: no row would \
                     equal another; convert one of them, or name other columns as the `identity`",
                    reader.place(0)
                )));
            }
            places.push(place);
        }
        let mut columns = self.identity.clone();
        for (at, Column { name, kind }) in self.schema.columns.iter().enumerate() {
            let place = reader.schema().index_of(name).filter(|place| is_text(&reader.schema().columns[*place].kind));
            if let Some(place) = place.filter(|_| self.with_near && is_text(kind) && !self.identity.contains(&at)) {
                columns.push(at);
                places.push(place);
            }
        }
        let cells = reader.read_partial(&places, &rows)?;
        for (at, cells) in columns.iter().zip(&cells) {
            if let Some((row, reason)) = cells.fault() {
                let (sample, column) = (reader.place(rows[row]), self.schema.columns[*at].name.clone());
                return Err(DataError::Sample { sample, column, reason: reason.to_owned() });
            }
        }
        let mut seen = Vec::new();
        let mut workspace = Workspace::default();
        for (at, cells) in columns.iter().zip(&cells).filter(|_| self.looks_on()) {
            let Cells::Bytes(all) = &cells.cells else { continue };
            for (row, cell) in all.iter().enumerate().filter(|(row, _)| cells.gap(*row).is_none()) {
                let look = match self.pictures[*at] {
                    // A picture that cannot be decoded is not here to be found fault with.
                    true => Picture::decode_grey(cell, &mut workspace)
                        .and_then(|picture| near::picture_look(picture, &mut workspace))
                        .ok()
                        .flatten()
                        .map(Look::Picture),
                    false => std::str::from_utf8(cell).ok().and_then(|_| near::text_signature(cell)).map(Look::Text),
                };
                seen.extend(look.map(|look| Seen { row: rows[row], column: *at, look }));
            }
        }
        seen.sort_by_key(|seen| seen.row);
        let identity: Vec<usize> = (0..self.identity.len()).collect();
        let hashes = (0..rows.len()).map(|row| row_hash(&cells, &identity, row)).collect();
        Ok((hashes, seen))
    }

    /// Reads and checks a block of rows.
    pub(super) fn check(&self, reader: &dyn ShardReader, rows: std::ops::Range<u64>) -> Result<Part, DataError> {
        let mut part = Part {
            rows: rows.end - rows.start,
            summaries: self.summaries(),
            hashes: Vec::new(),
            unique: Vec::new(),
            seen: Vec::new(),
            bad: Vec::new(),
            personal: Vec::new(),
        };
        let columns: Vec<usize> = (0..self.schema.columns.len()).collect();
        let numbers: Vec<u64> = rows.collect();
        read_apart(reader, &columns, &numbers, |numbers, read| {
            match read {
                Ok(cells) => self.check_rows(numbers, &cells, &mut part)?,
                Err(error) => part.bad.extend(numbers.iter().map(|row| unreadable(*row, None, &error.to_string()))),
            }
            Ok(())
        })?;
        part.seen.sort_by_key(|seen| (seen.row, seen.column));
        Ok(part)
    }

    fn check_rows(&self, numbers: &[u64], cells: &[PartialCells], part: &mut Part) -> Result<(), DataError> {
        let broken = broken_rows(cells);
        part.bad.extend(broken.iter().map(|(row, reason)| unreadable(numbers[*row], None, reason)));
        for (at, cells) in cells.iter().enumerate() {
            part.summaries[at].push_partial(cells)?;
            for Gap { row, fault } in &cells.gaps {
                match fault {
                    Some(_) if broken.binary_search_by_key(row, |(row, _)| *row).is_ok() => {}
                    Some(reason) => part.bad.push(unreadable(numbers[*row], Some(at), reason)),
                    None if self.columns[at].required => part.bad.push(missing(numbers[*row], at)),
                    None => {}
                }
            }
            if cells.gaps.is_empty() {
                self.check_column(at, numbers, &cells.cells, part)?;
                continue;
            }
            let there = numbers.iter().enumerate().filter(|(row, _)| cells.gap(*row).is_none());
            let there: Vec<u64> = there.map(|(_, number)| *number).collect();
            self.check_column(at, &there, &cells.present(), part)?;
        }
        let is_broken = |row: usize| cells.iter().any(|c| c.gap(row).is_some_and(|gap| gap.fault.is_some()));
        let rows = numbers.iter().enumerate().filter(|(row, _)| !is_broken(*row));
        part.hashes.extend(rows.map(|(row, number)| (*number, row_hash(cells, &self.identity, row))));
        Ok(())
    }

    fn check_column(&self, at: usize, numbers: &[u64], cells: &Cells, part: &mut Part) -> Result<(), DataError> {
        let rules = &self.columns[at];
        let breach = |row: &u64, (rule, reason): Broken| Breach { row: *row, column: Some(at), rule, reason };
        if rules.unique {
            let hash = |row: usize| cell_bytes(cells, row).map_or(0, xxh3_128);
            part.unique.extend(numbers.iter().enumerate().map(|(row, number)| (at, *number, hash(row))));
        }
        match cells {
            Cells::Bytes(cells) => {
                let mut workspace = Workspace::default();
                for (number, cell) in numbers.iter().zip(cells) {
                    if cell.is_empty() {
                        if rules.required {
                            part.bad.push(missing(*number, at));
                        } else if self.pictures[at] && rules.missing_max.is_none() {
                            part.bad.push(breach(number, ("picture", "is empty".into())));
                        }
                        continue;
                    }
                    part.bad.extend(outside_length(rules, cell.len()).map(|broken| breach(number, broken)));
                    if self.pictures[at] {
                        match self.check_picture(rules, cell, &mut workspace) {
                            Ok(look) => part.seen.extend(look.map(|look| Seen { row: *number, column: at, look })),
                            Err(reason) => part.bad.push(breach(number, ("picture", reason))),
                        }
                    }
                    // Formats that do not tell text from bytes have text as bytes.
                    let text = std::str::from_utf8(cell).ok().filter(|_| !self.pictures[at]);
                    if text.is_none() && rules.pattern.is_some() {
                        part.bad.push(breach(number, ("pattern", "is not text".into())));
                    }
                    if let Some(text) = text {
                        let broken = outside_text(rules, text);
                        part.bad.extend(broken.map(|broken| breach(number, broken)));
                        self.find_personal(at, *number, cell, part);
                        if self.looks_on() {
                            let look = near::text_signature(cell).map(Look::Text);
                            part.seen.extend(look.map(|look| Seen { row: *number, column: at, look }));
                        }
                    }
                }
            }
            Cells::Numbers(tensor) => {
                let values = numbers_of(tensor)?;
                let width = values.len().checked_div(numbers.len()).unwrap_or(0);
                for (row, number) in numbers.iter().enumerate() {
                    let broken = outside_numbers(rules, &values[row * width..][..width]);
                    part.bad.extend(broken.map(|broken| breach(number, broken)));
                }
            }
            Cells::Lists(lists) => {
                for (number, list) in numbers.iter().zip(lists) {
                    let values = numbers_of(list)?;
                    let broken = outside_length(rules, values.len()).or_else(|| outside_numbers(rules, &values));
                    part.bad.extend(broken.map(|broken| breach(number, broken)));
                }
            }
        }
        Ok(())
    }

    /// Decodes; gives what it shows, by which near pictures are found.
    fn check_picture(
        &self,
        rules: &ColumnRules,
        cell: &[u8],
        workspace: &mut Workspace,
    ) -> Result<Option<Look>, String> {
        let picture = Picture::decode_grey(cell, workspace)?;
        let (height, width) = (picture.height, picture.width);
        if let Some([h, w]) = rules.pixels_min.filter(|[h, w]| height < *h || width < *w) {
            return Err(format!("has {height} x {width} pixels, fewer than {h} x {w}"));
        }
        if let Some([h, w]) = rules.pixels_max.filter(|[h, w]| height > *h || width > *w) {
            return Err(format!("has {height} x {width} pixels, more than {h} x {w}"));
        }
        if !self.looks_on() {
            workspace.reclaim(picture);
            return Ok(None);
        }
        Ok(near::picture_look(picture, workspace)?.map(Look::Picture))
    }

    /// Whether anybody asks for what rows show.
    fn looks_on(&self) -> bool {
        self.with_near && !self.near_is_over.load(Ordering::Relaxed)
    }

    fn find_personal(&self, at: usize, number: u64, cell: &[u8], part: &mut Part) {
        for place in personal::find(cell) {
            let of = part.personal.iter_mut().position(|p| p.column == at && p.kind == place.kind);
            let of = of.unwrap_or_else(|| {
                let (kind, rows, places) = (place.kind, Vec::new(), Vec::new());
                part.personal.push(PersonalCells { column: at, kind, rows, values: 0, places });
                part.personal.len() - 1
            });
            let found = &mut part.personal[of];
            found.values += 1;
            if found.rows.last() != Some(&number) {
                found.rows.push(number);
                if self.columns[at].no_personal_data {
                    let reason = format!("holds personal data ({})", place.kind.name());
                    part.bad.push(Breach { row: number, column: Some(at), rule: "personal data", reason });
                }
            }
            if found.places.len() < PLACES_OF_BLOCK {
                found.places.push((number, personal::masked(cell, &place)));
            }
        }
    }
}

fn missing(row: u64, column: usize) -> Breach {
    Breach { row, column: Some(column), rule: "missing", reason: "is missing".into() }
}

fn unreadable(row: u64, column: Option<usize>, reason: &str) -> Breach {
    Breach { row, column, rule: "unreadable", reason: format!("cannot be read: {reason}") }
}

/// The rows of which several columns cannot be read, all for the same reason: a fault of the row and of no column.
fn broken_rows(cells: &[PartialCells]) -> Vec<(usize, String)> {
    let [first, others @ ..] = cells else { return Vec::new() };
    let same = |gap: &&Gap| others.iter().all(|cells| cells.gap(gap.row).is_some_and(|other| other.fault == gap.fault));
    let rows = first.gaps.iter().filter(|_| !others.is_empty()).filter(same);
    rows.filter_map(|gap| Some((gap.row, gap.fault.clone()?))).collect()
}

/// Whether most of some cells, spread over a shard, are pictures. Those that cannot be read say nothing.
fn holds_pictures(reader: &dyn ShardReader, column: usize) -> Result<bool, DataError> {
    const ROWS: u64 = 16;
    let mut workspace = Workspace::default();
    let (mut pictures, mut others) = (0, 0);
    for row in (0..reader.rows()).step_by(reader.rows().div_ceil(ROWS).max(1) as usize) {
        match reader.read_partial(&[column], &[row]) {
            Ok(cells) => match cells.first().and_then(|cells| cell_bytes(&cells.cells, 0)) {
                Some(cell) if !cell.is_empty() => match Picture::decode_grey(cell, &mut workspace) {
                    Ok(picture) => {
                        pictures += 1;
                        workspace.reclaim(picture);
                    }
                    Err(_) => others += 1,
                },
                _ => {}
            },
            Err(error) if !error.is_about_content() => return Err(error),
            Err(_) => {}
        }
    }
    Ok(pictures > others)
}

fn outside_length(rules: &ColumnRules, length: usize) -> Option<Broken> {
    let length = length as u64;
    let few = rules.length_min.filter(|min| length < *min).map(|min| format!("has a length of {length}, under {min}"));
    let many =
        || rules.length_max.filter(|max| length > *max).map(|max| format!("has a length of {length}, over {max}"));
    few.or_else(many).map(|reason| ("length", reason))
}

fn outside_text(rules: &ColumnRules, text: &str) -> Option<Broken> {
    // What a rule refuses may be personal.
    let shown = || personal::redacted(text.chars().take(60).collect::<String>().as_bytes());
    if let Some(allowed) = &rules.allowed
        && !allowed.iter().any(|v| matches!(v, CellValue::Text(t) if t == text))
    {
        return Some(("not allowed", format!("`{}` is not among the allowed values", shown())));
    }
    let pattern = rules.pattern.as_ref().filter(|p| !p.0.is_match(text))?;
    Some(("pattern", format!("`{}` does not match `{}`", shown(), pattern.0)))
}

fn outside_numbers(rules: &ColumnRules, values: &[f64]) -> Option<Broken> {
    if rules.required && values.iter().all(|v| v.is_nan()) {
        return Some(("missing", "is missing".into()));
    }
    if let Some(value) = values.iter().find(|v| rules.finite && !v.is_finite()) {
        return Some(("not finite", format!("{value} is not finite")));
    }
    if let Some((value, min)) = rules.min.and_then(|min| values.iter().find(|v| **v < min).map(|v| (v, min))) {
        return Some(("minimum", format!("{value} is under {min}")));
    }
    if let Some((value, max)) = rules.max.and_then(|max| values.iter().find(|v| **v > max).map(|v| (v, max))) {
        return Some(("maximum", format!("{value} is over {max}")));
    }
    let allowed = rules.allowed.as_ref()?;
    let is_allowed = |value: &f64| allowed.iter().any(|v| matches!(v, CellValue::Number(n) if n == value));
    let value = values.iter().find(|v| !v.is_nan() && !is_allowed(v))?;
    Some(("not allowed", format!("{value} is not among the allowed values")))
}

fn cell_bytes(cells: &Cells, row: usize) -> Option<&[u8]> {
    match cells {
        Cells::Bytes(cells) => cells.get(row).map(|c| c.as_ref()),
        Cells::Lists(cells) => cells.get(row).map(|c| c.bytes()),
        Cells::Numbers(tensor) => {
            let width = tensor.byte_len().checked_div(cells.len())?;
            tensor.bytes().get(row * width..(row + 1) * width)
        }
    }
}

/// The hash of some columns of a row: each cell's length, then its bytes. What is missing has a length that no cell has.
fn row_hash(cells: &[PartialCells], columns: &[usize], row: usize) -> u128 {
    let mut bytes = Vec::new();
    for at in columns {
        let cell = cell_bytes(&cells[*at].cells, row).unwrap_or(&[]);
        let length = if cells[*at].gap(row).is_some() { u64::MAX } else { cell.len() as u64 };
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(cell);
    }
    xxh3_128(&bytes)
}
