//! Arrow IPC, file and stream: record batches, of which only the wanted columns are fetched.
//!
//! A file is a stream of messages between two magic numbers with a footer that lists them; `format/Message.fbs`,
//! `Schema.fbs` and `File.fbs` of apache/arrow define both. A batch is a block. Read are numbers, booleans, text, bytes, and
//! lists of numbers, whose buffers may be compressed, and codes that stand for values of a dictionary; the fields of a
//! struct are columns. Other columns are errors for those who want them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use updraft_graph::{DType, Tensor};

use crate::error::{DataError, Refusal};
use crate::rows::{Cells, Gap, PartialCells, tensor_of};
use crate::schema::{Column, Kind, Schema};
use crate::source::arrow::buffers::{borders, decompress, views};
use crate::source::arrow::flatbuffer::{Table, i64_at};
use crate::source::arrow::layout::{Counts, Field, Layout, fields_of};
use crate::source::cells::{check_text, to_native};
use crate::source::input::{Content, Input};
use crate::source::shard::{ReadOptions, ShardReader, block_around, pick, read_blocks};

mod buffers;
mod flatbuffer;
mod layout;

const MAGIC: &[u8; 6] = b"ARROW1";

/// Bytes of the metadata of one message, at most.
const METADATA_BYTES_MAX: u64 = 64 << 20;

/// Rows of a batch in which a column has no bytes, at most: nothing but the claim says that they are there.
const WIDTHLESS_ROWS_MAX: u64 = 1 << 20;

/// Buffers of the long values of a column in a batch, at most.
const BUFFERS_MAX: usize = 1 << 20;

/// Bytes of the number of a row, by which rows are asked for.
const ROW_NUMBER_BYTES: u64 = size_of::<u64>() as u64;

/// One file or stream.
pub(crate) struct Arrow {
    content: Content,
    schema: Arc<Schema>,
    columns: Vec<Field>,
    batches: Vec<Batch>,
    block_rows: Vec<u64>,
    starts: Vec<u64>,
    /// The values that codes stand for, by the number of the dictionary: one column, and a batch for each time that the
    /// dictionary was written.
    dictionaries: BTreeMap<i64, Arrow>,
    memory_bytes: u64,
}

/// A record batch: its metadata, and where its body is.
struct Batch {
    metadata: Bytes,
    body: u64,
    body_bytes: u64,
    /// Whether it holds the values of a dictionary.
    is_dictionary: bool,
    /// Which batch of each dictionary its codes mean: a later one takes the place of those before.
    dictionaries: BTreeMap<i64, usize>,
}

/// A message: its metadata and where its body is.
struct Message {
    metadata: Bytes,
    body: u64,
    body_bytes: u64,
    kind: u8,
}

/// Reads the message at `at`; `None` at the end of the stream.
fn message(content: &Content, at: u64, end: u64) -> Result<Option<Message>, DataError> {
    let broken = |reason: String| content.input.error_at(at, reason);
    if at == end {
        return Ok(None);
    }
    let need = |count: u64| if at + count <= end { Ok(()) } else { Err(broken("a message is cut off".into())) };
    need(4)?;
    let word = |at: u64| -> Result<u32, DataError> {
        let bytes = content.read(at, Some(at + 4))?;
        Ok(bytes.first_chunk::<4>().map_or(0, |b| u32::from_le_bytes(*b)))
    };
    let first = word(at)?;
    // Before version 1.0 the length came first.
    let (length, start) = if first == u32::MAX {
        need(8)?;
        (word(at + 4)?, at + 8)
    } else {
        (first, at + 4)
    };
    if length == 0 {
        return Ok(None);
    }
    let length = u64::from(length);
    if length > METADATA_BYTES_MAX || start + length > end {
        return Err(broken(format!("a message claims {length} bytes of metadata, and {} are left", end - start)));
    }
    let metadata = content.read(start, Some(start + length))?;
    let (kind, body_bytes) = Table::root(&metadata).and_then(|m| Ok((m.u8(1)?, m.i64(3)?))).map_err(broken)?;
    let body_bytes = u64::try_from(body_bytes).map_err(|_| broken("a body of a negative length".into()))?;
    let body = start + length;
    if body_bytes > end - body {
        return Err(broken(format!("a message claims a body of {body_bytes} bytes, and {} are left", end - body)));
    }
    Ok(Some(Message { metadata, body, body_bytes, kind }))
}

impl Arrow {
    pub(crate) fn open(input: Input, options: &ReadOptions) -> Result<Arrow, DataError> {
        let content = Content::new(input, None, options.memory_bytes);
        let len = content.input.len();
        let damaged = |reason: String| content.input.error(reason);
        let is_file = len >= 8 && &content.read(0, Some(6))?[..] == MAGIC;
        // The messages of a file lie one after the other too; its footer is needed only to see that it is whole.
        let (start, end) = if is_file { (8, footer_start(&content)?) } else { (0, len) };
        let mut at = start;
        let mut fields = None;
        let mut batches = Vec::new();
        let mut written: BTreeMap<i64, Vec<Batch>> = BTreeMap::new();
        while let Some(found) = message(&content, at, end)? {
            let broken = |reason: String| content.input.error_at(at, reason);
            let header = Table::root(&found.metadata).and_then(|m| m.table(2)).map_err(broken)?;
            let header = header.ok_or_else(|| broken("a message without a header".into()))?;
            let batch = |is_dictionary: bool, dictionaries| Batch {
                metadata: found.metadata.clone(),
                body: found.body,
                body_bytes: found.body_bytes,
                is_dictionary,
                dictionaries,
            };
            match (found.kind, &fields) {
                (1, None) => fields = Some(fields_of(header).map_err(broken)?),
                (3, Some(_)) => {
                    let newest = written.iter().map(|(id, batches)| (*id, batches.len() - 1)).collect();
                    batches.push(batch(false, newest));
                }
                (2, Some(_)) if header.u8(2).map_err(broken)? != 0 => {
                    return Err(broken("adds to a dictionary, which is not read; write dictionaries whole".into()));
                }
                (2, Some(_)) => {
                    let id = header.i64(0).map_err(broken)?;
                    written.entry(id).or_default().push(batch(true, BTreeMap::new()));
                }
                (kind, _) => return Err(broken(format!("a message of kind {kind} that does not belong here"))),
            }
            at = found.body + found.body_bytes;
        }
        let fields = fields.ok_or_else(|| damaged("is not Arrow: it has no schema".into()))?;
        let memory_bytes = options.memory_bytes;
        let (block_rows, starts) = row_counts(&batches, &fields, memory_bytes).map_err(damaged)?;
        let mut dictionaries = BTreeMap::new();
        for Field { name, layout, .. } in &fields {
            let Ok(Layout::Coded { dictionary, values, .. }) = layout else { continue };
            let Some(batches) = written.remove(dictionary) else { continue };
            let (layout, place) = (Ok((**values).clone()), Counts::default());
            let columns = vec![Field { name: name.clone(), layout, place, above: Vec::new() }];
            let (block_rows, starts) = row_counts(&batches, &columns, memory_bytes)
                .map_err(|reason| damaged(format!("dictionary {dictionary}: {reason}")))?;
            let schema = Arc::new(Schema { columns: vec![Column { name: name.clone(), kind: values.kind() }] });
            let content = content.clone();
            let values = Arrow {
                content,
                schema,
                columns,
                batches,
                block_rows,
                starts,
                dictionaries: BTreeMap::new(),
                memory_bytes,
            };
            dictionaries.insert(*dictionary, values);
        }
        let kind = |field: &Field| field.layout.as_ref().map_or(Kind::Bytes, Layout::kind);
        let column = |field: &Field| Column { name: field.name.clone(), kind: kind(field) };
        let found = Schema::new(fields.iter().map(column).collect()).map_err(damaged)?;
        let (schema, columns) = match &options.schema {
            None => (Arc::new(found), fields),
            Some(wanted) => {
                if let Some(difference) = wanted.difference(&found) {
                    return Err(damaged(difference));
                }
                let field = |c: &Column| fields.iter().find(|f| f.name == c.name).cloned();
                (wanted.clone(), wanted.columns.iter().filter_map(field).collect())
            }
        };
        Ok(Arrow { content, schema, columns, batches, block_rows, starts, dictionaries, memory_bytes })
    }

    /// The values that the codes of a column of a batch stand for.
    fn values(
        &self,
        batch: usize,
        dictionary: i64,
        codes: PartialCells,
        kind: &Kind,
    ) -> Result<PartialCells, DataError> {
        let refused =
            |reason: String| self.content.input.error(format!("batch {batch}, dictionary {dictionary}: {reason}"));
        let written = self.dictionaries.get(&dictionary).zip(self.batches[batch].dictionaries.get(&dictionary));
        let (values, newest) = written.ok_or_else(|| refused("no values of it come before the codes".into()))?;
        let PartialCells { cells: codes, mut gaps } = codes;
        let rows = codes.len();
        if rows.saturating_mul(size_of::<Bytes>()) as u64 > self.memory_bytes {
            return Err(refused(format!("{rows} cells take more than memory_bytes = {}", self.memory_bytes)));
        }
        let codes = match codes {
            Cells::Numbers(codes) => codes.to_i64().map_err(|e| refused(e.to_string()))?,
            _ => Vec::new(),
        };
        let all: Vec<u64> = (0..values.block_rows[*newest]).collect();
        let values = values.decode(*newest, &[0], &all)?.pop().filter(|values| values.cells.fits(kind));
        let values = values.ok_or_else(|| refused(format!("its values are not {kind}")))?;
        let count = values.cells.len();
        let place = |(row, code): (usize, &i64)| match usize::try_from(*code) {
            // A missing cell has any code, which may be none of the values.
            _ if gaps.binary_search_by_key(&row, |gap| gap.row).is_ok() => Some(0),
            Ok(place) if place < count => Some(place),
            _ => None,
        };
        let places: Option<Vec<usize>> = codes.iter().enumerate().map(place).collect();
        let places = places.ok_or_else(|| refused(format!("a code is none of its {count} values")))?;
        if count == 0 && rows > 0 {
            // Every cell is missing.
            let cells = match kind {
                Kind::Number { dtype, .. } => {
                    Cells::Numbers(tensor_of(*dtype, &[rows], &vec![0; rows * dtype.size_in_memory()]))
                }
                _ => Cells::Bytes(vec![Bytes::new(); rows]),
            };
            return Ok(PartialCells::new(cells, gaps));
        }
        if let Cells::Bytes(cells) = &values.cells {
            // One long value may stand for every row.
            let bytes = places.iter().fold(0u64, |sum, place| sum.saturating_add(cells[*place].len() as u64));
            if bytes > self.memory_bytes {
                let memory = Refusal::Memory { needed_bytes: bytes, allowed_bytes: self.memory_bytes };
                let what = format!("batch {batch}, dictionary {dictionary}");
                return Err(memory.of(self.content.input.name().as_ref(), &what));
            }
        }
        let found = values.gather(&places);
        gaps.extend(found.gaps);
        Ok(PartialCells::new(found.cells, gaps))
    }

    /// Rows of a batch, which ascend.
    fn decode(&self, batch: usize, columns: &[usize], rows: &[u64]) -> Result<Vec<PartialCells>, DataError> {
        let wrong = |column: usize, reason: Refusal| self.refused(batch, column, reason);
        let mut wanted = Vec::with_capacity(columns.len());
        let mut ranges = Vec::new();
        for column in columns {
            let parts = self.parts(batch, *column).map_err(|reason| wrong(*column, reason.into()))?;
            ranges.extend(parts.ranges.iter().cloned());
            wanted.push(parts);
        }
        let mut fetched = self.content.input.read_all(&ranges)?.into_iter();
        let mut out = Vec::with_capacity(columns.len());
        for (column, parts) in columns.iter().zip(wanted) {
            let buffers: Vec<Bytes> = fetched.by_ref().take(parts.ranges.len()).collect();
            let cells = self.cells(batch, *column, &parts, buffers).map_err(|reason| wrong(*column, reason))?;
            let cells = match &self.columns[*column].layout {
                Ok(Layout::Coded { dictionary, .. }) => {
                    self.values(batch, *dictionary, cells, &self.schema.columns[*column].kind)?
                }
                _ => cells,
            };
            out.push(pick(cells, rows, self.block_rows[batch]));
        }
        Ok(out)
    }

    /// What is wrong with a column of a batch.
    fn refused(&self, batch: usize, column: usize, reason: Refusal) -> DataError {
        let name = self.schema.columns.get(column).map_or("", |c| c.name.as_str());
        reason.of(self.content.input.name().as_ref(), &format!("batch {batch}, column `{name}`"))
    }

    /// The nodes and buffers of a column in a batch.
    fn parts(&self, batch: usize, column: usize) -> Result<Parts, String> {
        let field = self.columns.get(column).ok_or("is not there")?;
        let layout = match field.layout.clone()? {
            Layout::Coded { codes, .. } => Layout::Number(codes),
            layout => layout,
        };
        let batch = &self.batches[batch];
        let header = batch.header()?;
        let (nodes, buffers) = (header.structs(1, 16)?, header.structs(2, 16)?);
        let codec = match header.table(3)? {
            None => None,
            Some(compression) => Some(compression.u8(0)?),
        };
        let counts = header.structs(4, 8)?;
        let has_nulls = |node: usize| i64_at(nodes, 2 * node + 1).map(|nulls| nulls != 0);
        let mut ranges = Vec::with_capacity(layout.buffers());
        let mut want = |place: Counts, some: Range<usize>| {
            let first = place.buffers + long_buffers(counts, 0..place.views)?;
            for buffer in first + some.start..first + some.end {
                let (offset, length) = (i64_at(buffers, 2 * buffer)?, i64_at(buffers, 2 * buffer + 1)?);
                let range = u64::try_from(offset).ok().zip(u64::try_from(length).ok());
                let range = range.and_then(|(o, l)| Some(o..o.checked_add(l)?)).filter(|r| r.end <= batch.body_bytes);
                let range = range.ok_or_else(|| format!("a buffer of {length} bytes at {offset} passes the body"))?;
                ranges.push(batch.body + range.start..batch.body + range.end);
            }
            Ok::<(), String>(())
        };
        let own = match layout {
            Layout::View { .. } => layout.buffers() + long_buffers(counts, field.place.views..field.place.views + 1)?,
            _ => layout.buffers(),
        };
        want(field.place, 0..own)?;
        // Of a struct only the bits that say which of its rows are there.
        for above in &field.above {
            if has_nulls(above.nodes)? {
                want(*above, 0..1)?;
            }
        }
        let has_nulls =
            (0..layout.nodes()).map(|node| has_nulls(field.place.nodes + node)).collect::<Result<Vec<bool>, String>>();
        Ok(Parts { layout, codec, ranges, own, has_nulls: has_nulls? })
    }

    /// Refuses what would take more than all memory.
    fn allowed(&self, needed_bytes: u64) -> Result<(), Refusal> {
        match needed_bytes <= self.memory_bytes {
            true => Ok(()),
            false => Err(Refusal::Memory { needed_bytes, allowed_bytes: self.memory_bytes }),
        }
    }

    fn cells(&self, batch: usize, column: usize, parts: &Parts, buffers: Vec<Bytes>) -> Result<PartialCells, Refusal> {
        let rows = self.block_rows[batch];
        let mut used_bytes = 0;
        let mut open = Vec::with_capacity(buffers.len());
        for buffer in buffers {
            let bytes = decompress(buffer, parts.codec, self.memory_bytes, used_bytes)?;
            used_bytes = used_bytes.saturating_add(bytes.len() as u64);
            open.push(bytes);
        }
        // Claimed rows are believed when a buffer holds them.
        let rows = usize::try_from(rows).map_err(|_| "more rows than memory")?;
        let cell_bytes = match parts.layout {
            Layout::Binary { .. } | Layout::View { .. } | Layout::FixedBinary(_) => size_of::<Bytes>(),
            Layout::List { .. } => size_of::<Tensor>(),
            Layout::Number(_) | Layout::FixedList(..) | Layout::Coded { .. } => 0,
        };
        self.allowed((rows as u64).saturating_mul(cell_bytes as u64))?;
        let elements = |buffer: &Bytes, count: usize, bytes: usize| {
            let needed = count.checked_mul(bytes).filter(|n| *n <= buffer.len());
            needed.map(|n| buffer.slice(..n)).ok_or_else(|| format!("{} bytes are not {count} values", buffer.len()))
        };
        let bools = |bits: &Bytes, count: usize| {
            let bits = elements(bits, count.div_ceil(8), 1)?;
            Ok::<Vec<u8>, String>((0..count).map(|at| bits[at / 8] >> (at % 8) & 1).collect())
        };
        let tensor = |dtype: DType, shape: &[usize], bytes: &[u8]| {
            let mut tensor = Tensor::from_bytes(dtype, shape, bytes).map_err(|e| e.to_string())?;
            to_native(dtype, tensor.bytes_mut());
            Ok::<Tensor, String>(tensor)
        };
        // Bits of the cells or elements that are there.
        let valid = |node: usize, bits: &Bytes, count: usize| match parts.has_nulls.get(node) {
            Some(true) => elements(bits, count.div_ceil(8), 1).map(Some),
            _ => Ok(None),
        };
        let is_there = |bits: &Option<Bytes>, at: usize| bits.as_ref().is_none_or(|b| b[at / 8] >> (at % 8) & 1 == 1);
        let no_element = "has no value for an element of its list";
        let validity = valid(0, open.first().ok_or("has no buffers")?, rows)?;
        let mut bits = vec![validity];
        let (open, above) = open.split_at_checked(parts.own).ok_or("has too few buffers")?;
        for buffer in above {
            bits.push(Some(elements(buffer, rows.div_ceil(8), 1)?));
        }
        let mut gaps: Vec<Gap> = match bits.iter().any(Option::is_some) {
            true => (0..rows).filter(|row| !bits.iter().all(|b| is_there(b, *row))).map(Gap::missing).collect(),
            false => Vec::new(),
        };
        let cells = match (&parts.layout, open) {
            (Layout::Number(DType::Bool), [_, values]) => {
                tensor(DType::Bool, &[rows], &bools(values, rows)?).map(Cells::Numbers)?
            }
            (Layout::Number(dtype), [_, values]) => {
                tensor(*dtype, &[rows], &elements(values, rows, dtype.size_in_memory())?).map(Cells::Numbers)?
            }
            (Layout::FixedBinary(width), [_, values]) => {
                let values = elements(values, rows, *width)?;
                Cells::Bytes((0..rows).map(|row| values.slice(row * width..(row + 1) * width)).collect())
            }
            (Layout::FixedList(dtype, length), [_, bits, values]) => {
                let count = rows.checked_mul(*length).ok_or("more values than memory")?;
                let inner = valid(1, bits, count)?;
                let lacks = |row: &usize| (row * length..(row + 1) * length).any(|at| !is_there(&inner, at));
                if inner.is_some() {
                    gaps.extend((0..rows).filter(lacks).map(|row| Gap::fault(row, no_element)));
                }
                let values = match dtype {
                    DType::Bool => bools(values, count)?.into(),
                    _ => elements(values, count, dtype.size_in_memory())?,
                };
                tensor(*dtype, &[rows, *length], &values).map(Cells::Numbers)?
            }
            (Layout::Binary { text, offset_bytes }, [_, offsets, values]) => {
                let offsets = borders(offsets, rows, *offset_bytes, values.len())?;
                let mut cells = Vec::with_capacity(rows);
                for (row, border) in offsets.windows(2).enumerate() {
                    let cell = values.slice(border[0]..border[1]);
                    if *text && let Err(reason) = check_text(&cell) {
                        gaps.push(Gap::fault(row, reason));
                    }
                    cells.push(cell);
                }
                Cells::Bytes(cells)
            }
            (Layout::View { text }, [_, short, long @ ..]) => {
                let is_missing: Vec<usize> = gaps.iter().map(|gap| gap.row).collect();
                let cells = views(short, long, rows, &is_missing)?;
                self.allowed(cells.iter().fold(0, |sum, cell| sum.saturating_add(cell.len() as u64)))?;
                if *text {
                    let broken = |(row, cell): (usize, &Bytes)| Some(Gap::fault(row, check_text(cell).err()?));
                    gaps.extend(cells.iter().enumerate().filter_map(broken));
                }
                Cells::Bytes(cells)
            }
            (Layout::List { dtype, offset_bytes }, [_, offsets, bits, values]) => {
                let size = dtype.size_in_memory();
                let is_bits = *dtype == DType::Bool;
                let most = if is_bits { values.len().saturating_mul(8) } else { values.len() / size };
                let offsets = borders(offsets, rows, *offset_bytes, most)?;
                let values = match (is_bits, offsets.last().copied().unwrap_or(0)) {
                    (true, count) => Bytes::from(bools(values, self.allowed(count as u64).map(|()| count)?)?),
                    (false, _) => values.clone(),
                };
                let list = |border: &[usize]| {
                    tensor(*dtype, &[border[1] - border[0]], &values[border[0] * size..border[1] * size])
                };
                let inner = valid(1, bits, offsets.last().copied().unwrap_or(0))?;
                if inner.is_some() {
                    let lacks = |border: &[usize]| (border[0]..border[1]).any(|at| !is_there(&inner, at));
                    let rows = offsets.windows(2).enumerate().filter(|(_, border)| lacks(border));
                    gaps.extend(rows.map(|(row, _)| Gap::fault(row, no_element)));
                }
                offsets.windows(2).map(list).collect::<Result<_, _>>().map(Cells::Lists)?
            }
            _ => return Err(format!("column {column} has {} buffers", open.len()).into()),
        };
        Ok(PartialCells::new(cells, gaps))
    }
}

/// A column of a batch, to be fetched.
struct Parts {
    layout: Layout,
    codec: Option<u8>,
    /// Its own buffers, and the validity of the structs above it that lack some.
    ranges: Vec<Range<u64>>,
    own: usize,
    /// Whether cells are missing, and elements of lists.
    has_nulls: Vec<bool>,
}

impl Batch {
    /// The rows that it claims, checked against what is there to hold them: whoever reads a batch reserves memory for
    /// its rows.
    fn rows(&self, fields: &[Field], memory_bytes: u64) -> Result<u64, String> {
        let header = self.header()?;
        let rows = header.i64(0)?;
        let rows = u64::try_from(rows).map_err(|_| format!("claims {rows} rows"))?;
        if rows.checked_mul(ROW_NUMBER_BYTES).is_none_or(|bytes| bytes > memory_bytes) {
            return Err(format!("claims {rows} rows, which alone take more than memory_bytes = {memory_bytes}"));
        }
        let is_compressed = header.table(3)?.is_some();
        let buffers = header.structs(2, 16)?;
        let counts = header.structs(4, 8)?;
        for Field { name, layout, place, .. } in fields {
            let Ok(layout) = layout else { continue };
            if layout.is_widthless() && rows > WIDTHLESS_ROWS_MAX {
                let most = WIDTHLESS_ROWS_MAX;
                return Err(format!("claims {rows} rows of no bytes in column `{name}`; at most {most} are read"));
            }
            let first = place.buffers + long_buffers(counts, 0..place.views)?;
            for number in (1..layout.buffers()).filter(|_| !is_compressed) {
                let length = i64_at(buffers, 2 * (first + number) + 1)?;
                let needed = layout.buffer_bytes(number, rows);
                if needed.is_none_or(|needed| u64::try_from(length).is_ok_and(|length| length < needed)) {
                    return Err(format!("claims {rows} rows, and a buffer of column `{name}` has {length} bytes"));
                }
            }
        }
        Ok(rows)
    }

    fn header(&self) -> Result<Table<'_>, String> {
        let header = Table::root(&self.metadata)?.table(2)?;
        let header = if self.is_dictionary { header.map_or(Ok(None), |h| h.table(1))? } else { header };
        header.ok_or_else(|| "a batch without a header".into())
    }
}

/// The buffers of long values that some of the views of a batch have together.
fn long_buffers(counts: &[u8], views: Range<usize>) -> Result<usize, String> {
    let mut sum = 0usize;
    for view in views {
        let count = usize::try_from(i64_at(counts, view)?).ok().filter(|count| *count <= BUFFERS_MAX);
        sum += count.ok_or("claims a number of buffers that no batch has")?;
    }
    Ok(sum)
}

/// The rows of each batch, and the first of each with the end of the last.
fn row_counts(batches: &[Batch], fields: &[Field], memory_bytes: u64) -> Result<(Vec<u64>, Vec<u64>), String> {
    let mut block_rows = Vec::with_capacity(batches.len());
    let mut starts = vec![0u64];
    for (at, batch) in batches.iter().enumerate() {
        let rows = batch.rows(fields, memory_bytes).map_err(|reason| format!("batch {at} {reason}"))?;
        starts.push(starts[at].checked_add(rows).ok_or("claims more than 2^64 rows")?);
        block_rows.push(rows);
    }
    Ok((block_rows, starts))
}

/// Where the footer of a file starts; its length and the magic number are behind it.
fn footer_start(content: &Content) -> Result<u64, DataError> {
    let len = content.input.len();
    let damaged = |reason: &str| content.input.error(reason);
    if len < 8 + 10 {
        return Err(damaged("is an Arrow file that is cut off"));
    }
    let tail = content.read(len - 10, None)?;
    if &tail[4..] != MAGIC {
        return Err(damaged("is an Arrow file that does not end with ARROW1: it is cut off"));
    }
    let footer = tail.first_chunk::<4>().map_or(0, |b| u32::from_le_bytes(*b));
    let start = (len - 10).checked_sub(footer.into()).filter(|start| *start >= 8);
    start.ok_or_else(|| damaged("is an Arrow file whose footer is longer than itself"))
}

impl ShardReader for Arrow {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn unread(&self) -> Vec<(usize, String)> {
        let unread = self.columns.iter().enumerate();
        unread.filter_map(|(at, field)| Some((at, field.layout.as_ref().err()?.clone()))).collect()
    }

    fn rows(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    fn blocks(&self) -> &[u64] {
        &self.block_rows
    }

    fn block_bytes(&self, block: usize, columns: &[usize]) -> u64 {
        let rows = self.block_rows.get(block).copied().unwrap_or(0);
        let fixed = |column: &usize| self.schema.columns.get(*column).and_then(|c| c.kind.row_bytes());
        match columns.iter().map(fixed).sum::<Option<usize>>() {
            Some(bytes) => rows.saturating_mul(bytes as u64),
            None => self.batches.get(block).map_or(0, |b| b.body_bytes).saturating_add(rows.saturating_mul(32)),
        }
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let decode = |batch: usize, rows: &[u64]| {
            let decoded = self.decode(batch, columns, rows)?;
            for (column, cells) in columns.iter().zip(&decoded) {
                if let Some(gap) = cells.gaps.first() {
                    let reason = gap.refusal(self.starts[batch] + rows[gap.row]);
                    return Err(self.refused(batch, *column, reason.into()));
                }
            }
            Ok(decoded)
        };
        let read = read_blocks(&self.starts, rows, &self.schema, columns, decode)
            .map_err(|failed| failed.unwrap_or_else(|reason| self.content.input.error(reason)))?;
        Ok(read.into_iter().map(|cells| cells.cells).collect())
    }

    fn read_partial(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<PartialCells>, DataError> {
        read_blocks(&self.starts, rows, &self.schema, columns, |batch, rows| self.decode(batch, columns, rows))
            .map_err(|failed| failed.unwrap_or_else(|reason| self.content.input.error(reason)))
    }

    fn decoded_together(&self, _: &[usize], row: u64) -> Range<u64> {
        block_around(&self.starts, row)
    }

    fn place(&self, row: u64) -> String {
        format!("{} row {row}", self.content.input.name())
    }
}
