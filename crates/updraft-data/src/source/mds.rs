//! MDS, version 2: the shards of MosaicML Streaming.
//!
//! A shard is a `u32` number of samples `n`, `n + 1` offsets (`u32`, from the start of the file), a JSON description of the
//! columns, and the samples; a sample is the `u32` sizes of those columns that have no fixed size, then the values of all
//! columns. All numbers are little-endian. `streaming/base/format/mds` of mosaicml/streaming defines it.
//!
//! # Design
//!
//! Where a value lies follows from the offsets and from the sizes that precede it in its sample, so a run of samples is
//! fetched whole and a column is gathered from it in one pass, numbers straight into a tensor. Offsets are fetched once,
//! when the first sample is asked for; until then a shard costs nothing.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde::Deserialize;
use updraft_graph::Tensor;

use crate::error::DataError;
use crate::rows::Cells;
use crate::schema::{Column, Kind, Schema};
use crate::source::cells::{check_text, kinds, to_native};
use crate::source::input::{Compression, Content, Input};
use crate::source::mds::encoding::Encoding;
use crate::source::shard::{BLOCK_BYTES, ReadOptions, ShardReader};

pub(crate) mod encoding;
pub(crate) mod index;

/// Bytes of the JSON in a shard, at most: descriptions of tens of thousands of columns fit.
const DESCRIPTION_BYTES_MAX: usize = 16 << 20;

/// Rows in a shard, at most: their offsets must fit before 4 GiB.
const ROWS_MAX: u32 = u32::MAX / 4 - 3;

/// The description of columns, in each shard and in `index.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Description {
    version: u64,
    format: String,
    column_names: Vec<String>,
    column_encodings: Vec<String>,
    column_sizes: Vec<Option<u64>>,
}

/// The columns of a shard and how a sample holds them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    pub names: Vec<String>,
    pub encodings: Vec<Encoding>,
    /// For each column, bytes of the columns of fixed size before it, and the number of other columns before it.
    before: Vec<(usize, usize)>,
    /// The same for the end of the sample.
    total: (usize, usize),
}

impl Layout {
    pub(crate) fn new(description: &Description) -> Result<Layout, String> {
        let Description { version, format, column_names, column_encodings, column_sizes } = description;
        if (*version, format.as_str()) != (2, "mds") {
            return Err(format!("is `{format}` of version {version}; `mds` of version 2 is read"));
        }
        if column_names.len() != column_encodings.len() || column_names.len() != column_sizes.len() {
            return Err("describes different numbers of column names, encodings and sizes".into());
        }
        let mut layout = Layout { names: column_names.clone(), encodings: vec![], before: vec![], total: (0, 0) };
        for ((name, encoding), size) in column_names.iter().zip(column_encodings).zip(column_sizes) {
            let encoding = Encoding::parse(encoding).map_err(|reason| format!("column `{name}`: {reason}"))?;
            let known = encoding.fixed_bytes();
            // A size that contradicts the encoding would shift every value behind it.
            if known.map(|n| n as u64) != *size {
                return Err(format!("column `{name}`: {size:?} bytes are claimed for {known:?}"));
            }
            layout.before.push(layout.total);
            match known {
                Some(bytes) => {
                    layout.total.0 = layout.total.0.checked_add(bytes).ok_or("a sample is larger than memory")?;
                }
                None => layout.total.1 += 1,
            }
            layout.encodings.push(encoding);
        }
        Ok(layout)
    }

    /// What the first column is in which two shards differ.
    pub(crate) fn difference(&self, other: &Layout) -> Option<String> {
        for (at, name) in self.names.iter().enumerate() {
            match other.names.iter().position(|n| n == name) {
                None => return Some(format!("column `{name}` is missing")),
                Some(found) if other.encodings[found] != self.encodings[at] => {
                    let (is, not) = (other.encodings[found].name(), self.encodings[at].name());
                    return Some(format!("column `{name}` is {is}, not {not}"));
                }
                Some(_) => {}
            }
        }
        let extra = other.names.iter().find(|n| !self.names.contains(n));
        extra.map(|name| format!("column `{name}` is extra"))
    }

    fn variable(&self) -> usize {
        self.total.1
    }

    fn has_fixed_samples(&self) -> bool {
        self.variable() == 0
    }
}

/// One shard.
pub(crate) struct Mds {
    content: Content,
    schema: Arc<Schema>,
    layout: Layout,
    rows: u64,
    blocks: Vec<u64>,
    raw_bytes: u64,
    memory_bytes: u64,
    offsets: OnceLock<Bytes>,
    /// Where the columns of the schema are in the layout.
    places: Vec<usize>,
}

/// What an index says about a shard, so that it need not be opened to be planned with.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub description: Description,
    pub samples: u64,
    pub raw_bytes: u64,
}

impl Mds {
    /// Opens a shard by what its index says of it, or by its own header.
    pub(crate) fn open(
        input: Input,
        key: &str,
        known: Option<&Known>,
        options: &ReadOptions,
    ) -> Result<Mds, DataError> {
        let content = Content::new(input, Compression::of_key(key), options.memory_bytes);
        let own;
        let (known, offsets) = match known {
            Some(known) => (known, None),
            None => {
                let (found, offsets) = read_header(&content)?;
                own = found;
                (&own, Some(offsets))
            }
        };
        let wrong = |reason: String| content.input.error(reason);
        let layout = Layout::new(&known.description).map_err(wrong)?;
        let rows = known.samples;
        if rows > u64::from(ROWS_MAX) {
            return Err(wrong(format!("claims {rows} samples")));
        }
        let blocks = block_rows(rows, known.raw_bytes, key);
        let mut mds = Mds {
            schema: Arc::new(Schema { columns: Vec::new() }),
            places: Vec::new(),
            raw_bytes: known.raw_bytes,
            memory_bytes: options.memory_bytes,
            offsets: OnceLock::new(),
            content,
            layout,
            rows,
            blocks,
        };
        if let Some(offsets) = offsets {
            mds.offsets.set(offsets).ok();
        }
        mds.settle_schema(options)?;
        Ok(mds)
    }

    /// Finds the kinds of the columns; those of arrays that describe themselves are seen in the first sample.
    fn settle_schema(&mut self, options: &ReadOptions) -> Result<(), DataError> {
        let mut first: Option<Bytes> = None;
        let mut columns = Vec::with_capacity(self.layout.names.len());
        for (at, name) in self.layout.names.clone().into_iter().enumerate() {
            let wanted = options.schema.as_ref().and_then(|s| s.columns.iter().find(|c| c.name == name));
            let kind = match (wanted, self.layout.encodings[at].kind()) {
                (_, Some(kind)) => kind,
                (Some(wanted), None) => wanted.kind.clone(),
                (None, None) if self.rows == 0 => Kind::Bytes,
                (None, None) => {
                    let sample = match &first {
                        Some(sample) => sample.clone(),
                        None => first.insert(self.samples(0..1)?.0).clone(),
                    };
                    let value = self.value_range(&sample, at).map_err(|r| self.content.input.error(r))?;
                    let kind = self.layout.encodings[at].kind_of(&sample[value]);
                    kind.map_err(|r| self.content.input.error(format!("sample 0, column `{name}`: {r}")))?
                }
            };
            columns.push(Column { name, kind });
        }
        let found = Schema::new(columns).map_err(|r| self.content.input.error(r))?;
        self.places = match &options.schema {
            None => (0..found.columns.len()).collect(),
            Some(wanted) => {
                if let Some(difference) = wanted.difference(&found) {
                    return Err(self.content.input.error(difference));
                }
                wanted.columns.iter().filter_map(|c| found.index_of(&c.name)).collect()
            }
        };
        self.schema = options.schema.clone().unwrap_or_else(|| Arc::new(found));
        Ok(())
    }

    /// The offsets of all samples and of the end, as the file has them, checked once to rise within the file.
    fn offsets(&self) -> Result<&Bytes, DataError> {
        if let Some(offsets) = self.offsets.get() {
            return Ok(offsets);
        }
        let (found, offsets) = read_header(&self.content)?;
        if found.samples != self.rows || Layout::new(&found.description).ok().as_ref() != Some(&self.layout) {
            let reason = format!(
                "its header tells of {} samples, or of other columns, than the {} of its index",
                found.samples, self.rows
            );
            return Err(self.content.input.error_at(0, reason));
        }
        Ok(self.offsets.get_or_init(|| offsets))
    }

    /// The bytes of a run of samples, and their borders counted from the first.
    fn samples(&self, rows: Range<u64>) -> Result<(Bytes, Vec<u32>), DataError> {
        let table = self.offsets()?.clone();
        let at = |row: u64| u32_at(&table, row as usize);
        let (start, end) = (at(rows.start), at(rows.end));
        let bytes = self.content.read(start.into(), Some(end.into()))?;
        Ok((bytes, (rows.start..=rows.end).map(|row| at(row) - start).collect()))
    }

    /// Where the value of a column lies in a sample.
    fn value_range(&self, sample: &[u8], column: usize) -> Result<Range<usize>, String> {
        let head = 4 * self.layout.variable();
        if sample.len() < head + self.layout.total.0 {
            return Err(format!("a sample of {} bytes is too short for its columns", sample.len()));
        }
        let size = |at: usize| u32_at(sample, at) as usize;
        let sizes: usize = (0..self.layout.variable()).map(size).sum();
        if head + self.layout.total.0 + sizes != sample.len() {
            let found = head + self.layout.total.0 + sizes;
            return Err(format!("its columns take {found} bytes, and the sample is of {}", sample.len()));
        }
        let (fixed, variable) = self.layout.before[column];
        let start = head + fixed + (0..variable).map(size).sum::<usize>();
        let bytes = self.layout.encodings[column].fixed_bytes().unwrap_or_else(|| size(variable));
        Ok(start..start + bytes)
    }

    /// A column of samples that lie in `bytes` between `borders`.
    fn column(&self, place: usize, kind: &Kind, bytes: &Bytes, picks: &[(u32, u32)]) -> Result<Cells, (usize, String)> {
        let encoding = &self.layout.encodings[place];
        let fixed = match (encoding.fixed_bytes(), kind) {
            (Some(fixed), Kind::Number { dtype, shape }) => Some((fixed, *dtype, shape)),
            _ => None,
        };
        let range = |row: usize, (start, end): (u32, u32)| {
            let (start, end) = (start as usize, end as usize);
            let value = self.value_range(&bytes[start..end], place).map_err(|r| (row, r))?;
            Ok((start + value.start, start + value.end))
        };
        if let Some((value_bytes, dtype, shape)) = fixed {
            let shape = [&[picks.len()], shape.as_slice()].concat();
            let mut tensor = Tensor::zeros(dtype, &shape).map_err(|e| (0, e.to_string()))?;
            let out = tensor.bytes_mut();
            let offset = self.layout.before[place].0;
            for (row, (to, pick)) in out.chunks_exact_mut(value_bytes).zip(picks).enumerate() {
                // Samples of fixed columns only were checked to be of one length.
                let start = match self.layout.has_fixed_samples() {
                    true => pick.0 as usize + offset,
                    false => range(row, *pick)?.0,
                };
                to.copy_from_slice(&bytes[start..start + value_bytes]);
            }
            to_native(dtype, out);
            return Ok(Cells::Numbers(tensor));
        }
        if encoding.is_plain() {
            let mut cells = Vec::with_capacity(picks.len());
            for (row, pick) in picks.iter().enumerate() {
                let (start, end) = range(row, *pick)?;
                let cell = bytes.slice(start..end);
                if *kind == Kind::Text {
                    check_text(&cell).map_err(|r| (row, r))?;
                }
                cells.push(cell);
            }
            return Ok(Cells::Bytes(cells));
        }
        let mut builder = crate::source::cells::CellsBuilder::new(kind, picks.len());
        for (row, pick) in picks.iter().enumerate() {
            let (start, end) = range(row, *pick)?;
            encoding.push(&bytes[start..end], &mut builder).map_err(|r| (row, r))?;
        }
        builder.finish(picks.len()).map_err(|r| (0, r))
    }
}

impl ShardReader for Mds {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn rows(&self) -> u64 {
        self.rows
    }

    fn blocks(&self) -> &[u64] {
        &self.blocks
    }

    fn block_bytes(&self, block: usize, columns: &[usize]) -> u64 {
        let rows = self.blocks.get(block).copied().unwrap_or(0);
        let fixed = |column: &usize| self.schema.columns.get(*column).and_then(|c| c.kind.row_bytes());
        match columns.iter().map(fixed).sum::<Option<usize>>() {
            Some(bytes) => rows.saturating_mul(bytes as u64),
            // Cells that are parts of what was read keep all of it.
            None => (self.raw_bytes / self.blocks.len().max(1) as u64).saturating_add(rows * 32),
        }
    }

    fn row_bytes(&self, block: usize, columns: &[usize]) -> Option<u64> {
        let rows = self.blocks.get(block).copied().unwrap_or(0);
        (!self.content.is_compressed()).then(|| self.block_bytes(block, columns) / rows.max(1))
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let kinds = kinds(&self.schema, columns).map_err(|r| self.content.input.error(r))?;
        if let Some(row) = rows.iter().find(|row| **row >= self.rows) {
            return Err(self.content.input.error(format!("has no row {row}, only {}", self.rows)));
        }
        let (bytes, picks) = self.fetch(rows)?;
        if self.layout.has_fixed_samples()
            && let Some(at) = picks.iter().position(|(start, end)| (end - start) as usize != self.layout.total.0)
        {
            let reason = format!("a sample of {} bytes, not {}", picks[at].1 - picks[at].0, self.layout.total.0);
            return Err(DataError::file(self.place(rows[at]).as_ref(), reason));
        }
        let mut cells = Vec::with_capacity(columns.len());
        for (column, kind) in columns.iter().zip(kinds) {
            let read = self.column(self.places[*column], kind, &bytes, &picks);
            cells.push(read.map_err(|(row, reason)| DataError::Sample {
                sample: self.place(rows.get(row).copied().unwrap_or(0)),
                column: self.schema.columns[*column].name.clone(),
                reason,
            })?);
        }
        Ok(cells)
    }

    fn place(&self, row: u64) -> String {
        let name = self.content.input.name();
        let known = self.offsets.get().filter(|_| row < self.rows);
        match known.map(|offsets| u32_at(offsets, row as usize)) {
            Some(offset) => format!("{name} sample {row} (byte {offset})"),
            None => format!("{name} sample {row}"),
        }
    }
}

impl Mds {
    /// Bytes that hold the samples of some rows, and where each lies in them. A run of rows is one range; rows far apart
    /// are a range each, asked for together.
    fn fetch(&self, rows: &[u64]) -> Result<(Bytes, Vec<(u32, u32)>), DataError> {
        let (Some(first), Some(last)) = (rows.iter().min(), rows.iter().max()) else {
            return Ok((Bytes::new(), Vec::new()));
        };
        self.check_sizes(rows)?;
        let span = last - first + 1;
        if self.content.is_compressed() || span <= 4 * rows.len() as u64 {
            let (bytes, borders) = self.samples(*first..last + 1)?;
            let pick = |row: &u64| (borders[(row - first) as usize], borders[(row - first) as usize + 1]);
            return Ok((bytes, rows.iter().map(pick).collect()));
        }
        let table = self.offsets()?;
        let range = |row: &u64| u64::from(u32_at(table, *row as usize))..u64::from(u32_at(table, *row as usize + 1));
        let parts = self.content.input.read_all(&rows.iter().map(range).collect::<Vec<_>>())?;
        if let [only] = parts.as_slice() {
            let end = only.len() as u32;
            return Ok((only.clone(), vec![(0, end)]));
        }
        let mut joined = Vec::with_capacity(parts.iter().map(Bytes::len).sum());
        let mut picks = Vec::with_capacity(parts.len());
        for part in &parts {
            let start = joined.len();
            joined.extend_from_slice(part);
            let border = |at: usize| u32::try_from(at).map_err(|_| self.content.input.error("4 GiB of rows at once"));
            picks.push((border(start)?, border(joined.len())?));
        }
        Ok((joined.into(), picks))
    }
}

impl Mds {
    /// Refuses a sample that takes more than all memory, before it is read. Blocks are planned by the mean of samples.
    fn check_sizes(&self, rows: &[u64]) -> Result<(), DataError> {
        let table = self.offsets()?;
        let bytes = |row: u64| u32_at(table, row as usize + 1).saturating_sub(u32_at(table, row as usize));
        let enormous = rows.iter().find(|row| u64::from(bytes(**row)) > self.memory_bytes);
        enormous.map_or(Ok(()), |row| {
            Err(DataError::Memory {
                path: self.place(*row).into(),
                what: "it".into(),
                needed_bytes: bytes(*row).into(),
                allowed_bytes: self.memory_bytes,
                advice: "raise it, or write smaller samples",
            })
        })
    }
}

/// Rows of the blocks of a shard: about [`BLOCK_BYTES`] each, or all where it has to be decompressed whole. Known from its
/// index, so that shards can be planned with before they are opened.
pub(crate) fn block_rows(rows: u64, raw_bytes: u64, key: &str) -> Vec<u64> {
    let count = match Compression::of_key(key) {
        Some(_) => 1,
        None => raw_bytes.div_ceil(BLOCK_BYTES).clamp(1, rows.max(1)),
    };
    let border = |at: u64| (u128::from(rows) * u128::from(at) / u128::from(count)) as u64;
    (0..count).map(|at| border(at + 1) - border(at)).collect()
}

/// Reads the number of samples, the offsets and the description at the start of a shard, and checks that they fit it.
fn read_header(content: &Content) -> Result<(Known, Bytes), DataError> {
    // Compressed content is decompressed once for all of it.
    let whole = if content.is_compressed() { Some(content.read(0, None)?) } else { None };
    let len = whole.as_ref().map_or(content.input.len(), |w| w.len() as u64);
    let read = |range: Range<u64>| match &whole {
        Some(bytes) if range.start <= range.end && range.end <= len => {
            Ok(bytes.slice(range.start as usize..range.end as usize))
        }
        Some(_) => Err(content.input.error_at(range.start, format!("its content ends after {len} bytes"))),
        None => content.input.read(range),
    };
    let samples = u32_at(&read(0..4)?, 0);
    let table_end = 4 + 4 * (u64::from(samples) + 1);
    if samples > ROWS_MAX || table_end > len {
        return Err(content.input.error_at(0, format!("claims {samples} samples, more than {len} bytes hold")));
    }
    let offsets = read(4..table_end)?;
    let (first, last) = (u32_at(&offsets, 0), u32_at(&offsets, samples as usize));
    let bad = |reason: String| content.input.error_at(4, reason);
    if u64::from(first) < table_end || u64::from(last) != len {
        return Err(bad(format!("its samples claim bytes {first} to {last}, of bytes {table_end} to {len}")));
    }
    let words = offsets.as_chunks::<4>().0;
    if let Some(at) = words.windows(2).position(|w| u32::from_le_bytes(w[0]) > u32::from_le_bytes(w[1])) {
        return Err(bad(format!("sample {at} ends before it starts")));
    }
    let description_bytes = u64::from(first) - table_end;
    if description_bytes > DESCRIPTION_BYTES_MAX as u64 {
        return Err(bad(format!(
            "a description of {description_bytes} bytes; at most {DESCRIPTION_BYTES_MAX} are read"
        )));
    }
    let description = serde_json::from_slice(&read(table_end..first.into())?);
    let description =
        description.map_err(|e| content.input.error_at(table_end, format!("the description of its columns: {e}")))?;
    Ok((Known { description, samples: samples.into(), raw_bytes: len }, offsets))
}

/// The `at`-th `u32` of bytes that were checked to hold it.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(4 * at..4 * at + 4).and_then(|b| b.first_chunk::<4>());
    word.map_or(0, |word| u32::from_le_bytes(*word))
}
