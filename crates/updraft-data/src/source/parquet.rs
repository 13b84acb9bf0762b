//! Parquet, one row group at a time, and of it only the columns asked for.
//!
//! The footer says where the columns of each row group lie; those that are wanted are fetched with one request and
//! decoded from memory. Of local files, a few rows are read with only the pages they lie in.
//!
//! The crate `parquet` panics on some damaged files. Those panics are caught here and are errors that name the file; all
//! that a panic could leave in doubt is thrown away with the reader.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, Bytes};
use parquet::basic::{Compression, ConvertedType, Type as PhysicalType};
use parquet::column::reader::get_column_reader;
use parquet::data_type::ByteArray;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::file::statistics::Statistics;
use updraft_base::units;

use crate::error::{DataError, Refusal};
use crate::rows::{Cells, Gap, PartialCells};
use crate::schema::{Column, Kind, Schema};
use crate::source::cells::check_text;
use crate::source::input::Input;
use crate::source::parquet::chunk::{Chunk, Run, decode_column};
use crate::source::parquet::kinds::{kind_of, name_of, own_schema, place_of};
use crate::source::parquet::locate::{Located, Page, length};
use crate::source::shard::{LOCAL_REQUEST_BYTES, ReadOptions, ShardReader, block_around, pick, read_blocks};

mod chunk;
mod kinds;
mod locate;
mod pages;

pub(crate) use kinds::SCHEMA_KEY;

/// One file.
pub(crate) struct Parquet {
    input: Input,
    metadata: ParquetMetaData,
    schema: Arc<Schema>,
    /// The leaf of each column, or why it cannot be read; an error only for those who want it.
    leaves: Vec<Result<usize, String>>,
    block_rows: Vec<u64>,
    /// First row of each row group, and the number of rows at the end.
    starts: Vec<u64>,
    memory_bytes: u64,
    request_bytes: u64,
    known: Mutex<Known>,
}

/// What is known of columns, by row group and leaf, as far as it was looked for.
#[derive(Default)]
struct Known {
    located: HashMap<(usize, usize), Option<Arc<Located>>>,
    /// Bytes of memory that it takes.
    bytes: u64,
}

fn located_bytes(found: &Option<Arc<Located>>) -> u64 {
    size_of::<(usize, usize, usize)>() as u64 + found.as_ref().map_or(0, |found| found.memory_bytes())
}

/// The part of the memory that a file's [`Known`] may take: a thousand files are open at once.
const KNOWN_PART: u64 = 4096;

/// Ranges of a file that were fetched, as a file for the crate `parquet`.
struct Fetched {
    parts: Vec<(u64, Bytes)>,
}

/// Bytes of the magic number before everything else.
const MAGIC_BYTES: u64 = 4;

impl Length for Fetched {
    fn len(&self) -> u64 {
        self.parts.last().map_or(0, |(at, bytes)| at + bytes.len() as u64)
    }
}

impl Fetched {
    /// A file of these pages, one behind the other.
    fn joined(pages: Vec<Bytes>) -> Fetched {
        let mut end = MAGIC_BYTES;
        let place = |bytes: Bytes| {
            let start = end;
            end += bytes.len() as u64;
            (start, bytes)
        };
        Fetched { parts: pages.into_iter().map(place).collect() }
    }

    fn from(&self, start: u64) -> Result<Bytes, ParquetError> {
        let part = self.parts.iter().find(|(at, bytes)| (*at..at + bytes.len() as u64).contains(&start));
        let part = part.ok_or_else(|| ParquetError::EOF(format!("byte {start} is outside of what is wanted")))?;
        Ok(part.1.slice((start - part.0) as usize..))
    }
}

impl ChunkReader for Fetched {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(self.from(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let bytes = self.from(start)?;
        if length > bytes.len() {
            return Err(ParquetError::EOF(format!("{length} bytes from byte {start} on pass the end")));
        }
        Ok(bytes.slice(..length))
    }
}

/// Bytes from the end that are fetched first; most footers fit.
const FOOTER_BYTES: u64 = 256 << 10;

/// Bytes of a footer, at most, where memory is bounded to less.
const FOOTER_BYTES_MAX: u64 = 16 << 20;

/// The length of the footer and the magic number.
const TAIL_BYTES: u64 = 8;

impl Parquet {
    pub(crate) fn open(input: Input, options: &ReadOptions) -> Result<Parquet, DataError> {
        let damaged = |reason: String| input.error(reason);
        let metadata = read_footer(&input, options.memory_bytes)?;
        let leaves = metadata.file_metadata().schema_descr().columns();

        let mut block_rows = Vec::new();
        let mut starts = vec![0u64];
        for (index, group) in metadata.row_groups().iter().enumerate() {
            let rows = u64::try_from(group.num_rows())
                .map_err(|_| damaged(format!("row group {index} has a negative number of rows")))?;
            if group.columns().len() != leaves.len() {
                return Err(damaged(format!("row group {index} lacks a column")));
            }
            let end = starts[starts.len() - 1].checked_add(rows);
            starts.push(end.ok_or_else(|| damaged("claims more than 2^64 rows".into()))?);
            block_rows.push(rows);
        }

        let root = metadata.file_metadata().schema_descr().root_schema();
        let found: Vec<(String, Result<Kind, String>)> = leaves
            .iter()
            .enumerate()
            .map(|(place, leaf)| (name_of(root, leaf), kind_of(&metadata, place, leaf)))
            .collect();
        let own = match &options.schema {
            Some(schema) => Some(schema.clone()),
            None => own_schema(&metadata).map_err(damaged)?.map(Arc::new),
        };
        let (schema, leaves) = match &own {
            Some(schema) => {
                let places = schema.columns.iter().map(|column| place_of(&metadata, &found, column));
                let places: Result<Vec<Result<usize, String>>, String> = places.collect();
                (schema.clone(), places.map_err(damaged)?)
            }
            None => {
                let column = |(name, kind): &(String, Result<Kind, String>)| {
                    // What cannot be read has to be called something until someone wants it.
                    Column { name: name.clone(), kind: kind.clone().unwrap_or(Kind::Bytes) }
                };
                let schema = Schema::new(found.iter().map(column).collect()).map_err(damaged)?;
                let place = |(place, (_, kind)): (usize, (String, Result<Kind, String>))| kind.map(|_| place);
                (Arc::new(schema), found.into_iter().enumerate().map(place).collect())
            }
        };
        let ReadOptions { memory_bytes, request_bytes, .. } = *options;
        let known = Mutex::default();
        Ok(Parquet { input, metadata, schema, leaves, block_rows, starts, memory_bytes, request_bytes, known })
    }

    fn leaf(&self, column: usize) -> Result<usize, String> {
        self.leaves.get(column).cloned().unwrap_or_else(|| Err(format!("there is no column {column}")))
    }

    /// Whether pages are looked for: their headers are walked over with a request each, in the time of which a whole page
    /// could have come from afar.
    fn walks_pages(&self) -> bool {
        self.request_bytes <= LOCAL_REQUEST_BYTES
    }

    /// What of a column of a row group can be read without the rest, where the rest is more than a request's worth.
    fn located(&self, group: usize, column: usize) -> Option<Arc<Located>> {
        let place = self.leaf(column).ok().filter(|_| self.walks_pages())?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.located.get(&(group, place)) {
            return found.clone();
        }
        let chunk = self.metadata.row_groups().get(group)?.column(place);
        let range = chunk_range(chunk).ok().filter(|range| length(range) > self.request_bytes)?;
        if known.bytes > self.memory_bytes / KNOWN_PART {
            return None;
        }
        let found = Located::find(&self.input, chunk, &range, self.block_rows[group]).map(Arc::new);
        known.bytes += located_bytes(&found);
        known.located.insert((group, place), found.clone());
        found
    }

    /// Forgets what is known of a column of a row group, which will be kept whole.
    fn forget(&self, group: usize, column: usize) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(place) = self.leaf(column)
            && let Some(found) = known.located.remove(&(group, place))
        {
            known.bytes -= located_bytes(&found);
        }
    }

    /// What is to be fetched and read for some rows of a row group, which ascend.
    fn part(&self, group: usize, column: usize, rows: &[u64]) -> Result<Part, String> {
        let whole = chunk_range(self.metadata.row_group(group).column(self.leaf(column)?))?;
        let (all, first_row) = (self.block_rows[group], self.starts[group]);
        let located = if rows.len() as u64 == all {
            self.forget(group, column);
            None
        } else {
            self.located(group, column)
        };
        let part = located.and_then(|located| match &*located {
            Located::Values(values) => {
                let ranges: Option<Vec<Range<u64>>> = rows.iter().map(|row| values.of(*row)).collect();
                Some(Part { ranges: ranges?, take: Take::Values })
            }
            Located::Pages(pages) => {
                let held = pages.of(rows);
                let dictionary = pages.dictionary.iter();
                let ranges = dictionary.chain(held.iter().map(|page| &page.bytes)).cloned().collect();
                let dictionary_bytes = pages.dictionary.as_ref().map(length);
                Some(Part { ranges, take: Take::Pages { dictionary_bytes, runs: runs(&held, rows, first_row) } })
            }
        });
        Ok(match part {
            Some(part) if part.ranges.iter().map(length).sum::<u64>() <= length(&whole) / 2 => part,
            _ => Part { ranges: vec![whole], take: Take::All(Run { skip: 0, rows: all as usize, first_row }) },
        })
    }

    /// Rows of a row group, which ascend.
    fn decode(&self, group: usize, columns: &[usize], rows: &[u64]) -> Result<Vec<PartialCells>, DataError> {
        let wrong = |column: usize, reason: Refusal| self.refused(group, column, reason);
        let mut parts = Vec::with_capacity(columns.len());
        for column in columns {
            parts.push(self.part(group, *column, rows).map_err(|reason| wrong(*column, reason.into()))?);
        }
        let ranges: Vec<Range<u64>> = parts.iter().flat_map(|part| part.ranges.iter().cloned()).collect();
        let mut fetched = self.input.read_all(&ranges)?.into_iter();
        let mut out = Vec::with_capacity(columns.len());
        for (column, part) in columns.iter().zip(parts) {
            let bytes: Vec<Bytes> = fetched.by_ref().take(part.ranges.len()).collect();
            let cells = match &part.take {
                Take::Values => Ok(self.values(*column, bytes)),
                Take::Pages { dictionary_bytes, runs } => contain(|| {
                    let chunk = self.metadata.row_group(group).column(self.leaf(*column)?).clone();
                    check_pages(&bytes, &chunk, self.memory_bytes)?;
                    let fetched = Fetched::joined(bytes);
                    let chunk = chunk
                        .into_builder()
                        .set_dictionary_page_offset(dictionary_bytes.map(|_| MAGIC_BYTES as i64))
                        .set_data_page_offset((MAGIC_BYTES + dictionary_bytes.unwrap_or(0)) as i64)
                        .set_total_compressed_size((fetched.len() - MAGIC_BYTES) as i64);
                    self.decode_pages(*column, &chunk.build().map_err(|e| e.to_string())?, fetched, runs)
                }),
                Take::All(run) => contain(|| {
                    let chunk = self.metadata.row_group(group).column(self.leaf(*column)?);
                    check_pages(&bytes, chunk, self.memory_bytes)?;
                    let fetched = Fetched { parts: part.ranges.iter().map(|range| range.start).zip(bytes).collect() };
                    let cells = self.decode_pages(*column, chunk, fetched, std::slice::from_ref(run))?;
                    Ok(pick(cells, rows, self.block_rows[group]))
                }),
            };
            out.push(cells.map_err(|reason| wrong(*column, reason))?);
        }
        Ok(out)
    }

    /// Runs of rows in the pages of a chunk.
    fn decode_pages(
        &self,
        column: usize,
        chunk: &ColumnChunkMetaData,
        pages: Fetched,
        runs: &[Run],
    ) -> Result<PartialCells, Refusal> {
        let descriptor = self.metadata.file_metadata().schema_descr();
        let rows = runs.iter().map(|run| run.rows).sum();
        let pages = SerializedPageReader::new(Arc::new(pages), chunk, rows, None).map_err(|e| e.to_string())?;
        let leaf = descriptor.column(self.leaf(column)?);
        let reader = get_column_reader(leaf.clone(), Box::new(pages));
        let wanted = Chunk {
            runs,
            leaf: &leaf,
            root: descriptor.root_schema(),
            kind: &self.schema.columns[column].kind,
            memory_bytes: self.memory_bytes,
        };
        decode_column(reader, &wanted)
    }

    /// Values that were fetched by themselves.
    fn values(&self, column: usize, values: Vec<Bytes>) -> PartialCells {
        let mut gaps = Vec::new();
        if self.schema.columns[column].kind == Kind::Text {
            let broken = values.iter().enumerate().filter_map(|(row, value)| Some((row, check_text(value).err()?)));
            gaps.extend(broken.map(|(row, reason)| Gap::fault(row, reason)));
        }
        PartialCells::new(Cells::Bytes(values), gaps)
    }

    /// What is wrong with a column of a row group.
    fn refused(&self, group: usize, column: usize, reason: Refusal) -> DataError {
        let name = self.schema.columns.get(column).map_or("", |c| c.name.as_str());
        reason.of(self.input.name().as_ref(), &format!("row group {group}, column `{name}`"))
    }
}

/// What is fetched of a column of a row group, and how the rows are taken from it.
struct Part {
    ranges: Vec<Range<u64>>,
    take: Take,
}

enum Take {
    /// All rows of the chunk.
    All(Run),
    /// Rows of some pages, before which there is a dictionary or none.
    Pages { dictionary_bytes: Option<u64>, runs: Vec<Run> },
    /// What was fetched are the values.
    Values,
}

/// The runs that rows, which ascend, make in the pages that hold them. `first_row` is the first of the row group.
fn runs(held: &[&Page], rows: &[u64], first_row: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    // Rows in pages that were passed, and the row behind the last that was taken.
    let (mut passed, mut next) = (0, 0);
    let mut held = held.iter();
    let mut page = held.next();
    for row in rows {
        while let Some(other) = page.filter(|page| page.rows.end <= *row) {
            passed += other.rows.end - other.rows.start;
            page = held.next();
        }
        let at = passed + row - page.map_or(*row, |page| page.rows.start);
        match runs.last_mut() {
            Some(run) if at == next && run.first_row + run.rows as u64 == first_row + row => run.rows += 1,
            _ => runs.push(Run { skip: (at - next) as usize, rows: 1, first_row: first_row + row }),
        }
        next = at + 1;
    }
    runs
}

fn read_footer(input: &Input, memory_bytes: u64) -> Result<ParquetMetaData, DataError> {
    let damaged = |reason: String| input.error(reason);
    let len = input.len();
    let start = len.saturating_sub(FOOTER_BYTES);
    let mut end = input.read(start..len)?;
    let tail =
        end.len().checked_sub(TAIL_BYTES as usize).and_then(|at| end.get(at..)).and_then(|t| t.first_chunk::<8>());
    let tail = tail.ok_or_else(|| damaged(format!("is damaged or not Parquet: it is of {len} bytes")))?;
    let [a, b, c, d, magic @ ..] = *tail;
    if &magic == b"PARE" {
        return Err(damaged("has an encrypted footer, which is not read".into()));
    }
    if &magic != b"PAR1" {
        return Err(damaged("is damaged or not Parquet: it does not end with PAR1".into()));
    }
    let footer = u64::from(u32::from_le_bytes([a, b, c, d])) + TAIL_BYTES;
    if footer > len {
        return Err(damaged(format!("is damaged or not Parquet: a footer of {footer} bytes in {len}")));
    }
    let most = memory_bytes.max(FOOTER_BYTES_MAX);
    if footer > most {
        let (needed, allowed) = (units::bytes(footer), units::bytes(most));
        return Err(damaged(format!("its footer takes {needed}, more than {allowed}")));
    }
    if footer > end.len() as u64 {
        end = input.read(len - footer..len)?;
    }
    let metadata = end.slice(end.len() - footer as usize..end.len() - TAIL_BYTES as usize);
    contain(|| ParquetMetaDataReader::decode_metadata(&metadata).map_err(|e| format!("is damaged or not Parquet: {e}")))
        .map_err(damaged)
}

impl ShardReader for Parquet {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn unread(&self) -> Vec<(usize, String)> {
        let unread = self.leaves.iter().enumerate().filter_map(|(at, leaf)| Some((at, leaf.clone().err()?)));
        unread.collect()
    }

    fn rows(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    fn blocks(&self) -> &[u64] {
        &self.block_rows
    }

    fn block_bytes(&self, block: usize, columns: &[usize]) -> u64 {
        let Some(group) = self.metadata.row_groups().get(block) else { return 0 };
        let size = |column: &usize| {
            let chunk = group.columns().get(self.leaf(*column).ok()?)?;
            // A size below zero is no size; decoding will say so.
            u64::try_from(chunk.uncompressed_size()).ok()
        };
        columns.iter().filter_map(size).fold(0, u64::saturating_add)
    }

    fn bounds(&self, column: usize, block: usize) -> Option<(f64, f64)> {
        match &self.schema.columns.get(column)?.kind {
            Kind::Number { shape, .. } if shape.is_empty() => {}
            _ => return None,
        }
        let chunk = self.metadata.row_groups().get(block)?.columns().get(self.leaf(column).ok()?)?;
        // A null is an error when it is read, and is to stay one.
        let known = chunk.statistics().filter(|known| known.null_count_opt() == Some(0))?;
        // Old writers compared unsigned numbers as if they had a sign.
        if known.is_min_max_deprecated() {
            return None;
        }
        let unsigned = chunk.column_descr().converted_type() == ConvertedType::UINT_64;
        let unsigned_32 = chunk.column_descr().converted_type() == ConvertedType::UINT_32;
        let (min, max) = match known {
            Statistics::Int32(known) if unsigned_32 => {
                (f64::from(*known.min_opt()? as u32), f64::from(*known.max_opt()? as u32))
            }
            Statistics::Int32(known) => (f64::from(*known.min_opt()?), f64::from(*known.max_opt()?)),
            Statistics::Int64(known) if unsigned => (*known.min_opt()? as u64 as f64, *known.max_opt()? as u64 as f64),
            Statistics::Int64(known) => (*known.min_opt()? as f64, *known.max_opt()? as f64),
            Statistics::Float(known) => (f64::from(*known.min_opt()?), f64::from(*known.max_opt()?)),
            Statistics::Double(known) => (*known.min_opt()?, *known.max_opt()?),
            _ => return None,
        };
        // Also false where one is NaN, which says nothing.
        (min <= max).then_some((min, max))
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let decode = |group: usize, rows: &[u64]| {
            let decoded = self.decode(group, columns, rows)?;
            for (column, cells) in columns.iter().zip(&decoded) {
                if let Some(gap) = cells.gaps.first() {
                    let reason = gap.refusal(self.starts[group] + rows[gap.row]);
                    return Err(self.refused(group, *column, reason.into()));
                }
            }
            Ok(decoded)
        };
        let read = read_blocks(&self.starts, rows, &self.schema, columns, decode)
            .map_err(|failed| failed.unwrap_or_else(|reason| self.input.error(reason)))?;
        Ok(read.into_iter().map(|cells| cells.cells).collect())
    }

    fn read_partial(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<PartialCells>, DataError> {
        read_blocks(&self.starts, rows, &self.schema, columns, |group, rows| self.decode(group, columns, rows))
            .map_err(|failed| failed.unwrap_or_else(|reason| self.input.error(reason)))
    }

    fn decoded_together(&self, columns: &[usize], row: u64) -> Range<u64> {
        let mut together = block_around(&self.starts, row);
        let start = together.start;
        let group = self.starts.partition_point(|start| *start <= row).saturating_sub(1);
        for column in columns {
            let rows = match self.located(group, *column).as_deref() {
                None => continue,
                Some(Located::Values(_)) => row..row + 1,
                Some(Located::Pages(pages)) => match pages.of(&[row - start]).first() {
                    Some(page) => start + page.rows.start..start + page.rows.end,
                    None => row..row + 1,
                },
            };
            together = together.start.max(rows.start)..together.end.min(rows.end);
        }
        together
    }

    fn row_bytes(&self, block: usize, columns: &[usize]) -> Option<u64> {
        let group = self.metadata.row_groups().get(block).filter(|_| self.walks_pages())?;
        let bytes = |column: &usize| match self.located(block, *column) {
            Some(located) => Some(located.row_bytes()),
            None => u64::try_from(group.columns().get(self.leaf(*column).ok()?)?.compressed_size()).ok(),
        };
        columns.iter().map(bytes).sum()
    }

    fn place(&self, row: u64) -> String {
        format!("{} row {row}", self.input.name())
    }
}

/// Refuses a column chunk, or some pages of one, that would take more memory to decode than allowed.
fn check_pages(parts: &[Bytes], chunk: &ColumnChunkMetaData, memory_bytes: u64) -> Result<(), Refusal> {
    let values = u64::try_from(chunk.num_values()).map_err(|_| "claims a negative number of values")?;
    let unread = match chunk.compression() {
        Compression::BROTLI(_) => Some("BROTLI"),
        Compression::LZO => Some("LZO"),
        _ => None,
    };
    if let Some(codec) = unread {
        return Err(format!(
            "is compressed with {codec}; SNAPPY, GZIP, ZSTD, LZ4_RAW, LZ4 and no compression are read"
        )
        .into());
    }
    let gzip = matches!(chunk.compression(), Compression::GZIP(_));
    let mut totals = pages::Totals::default();
    for part in parts {
        let pages::Totals { uncompressed_bytes, values } = pages::totals(part, values, gzip)?;
        totals.uncompressed_bytes = totals.uncompressed_bytes.saturating_add(uncompressed_bytes);
        totals.values = totals.values.saturating_add(values);
    }
    let value_bytes = match chunk.column_type() {
        PhysicalType::BOOLEAN => 1,
        PhysicalType::INT32 | PhysicalType::FLOAT => 4,
        PhysicalType::INT64 | PhysicalType::DOUBLE => 8,
        PhysicalType::INT96 | PhysicalType::BYTE_ARRAY | PhysicalType::FIXED_LEN_BYTE_ARRAY => size_of::<ByteArray>(),
    };
    // Each value may come with two levels.
    let value_bytes = (value_bytes + 2 * size_of::<i16>()) as u64;
    let needed_bytes = totals.values.saturating_mul(value_bytes).saturating_add(totals.uncompressed_bytes);
    if needed_bytes <= memory_bytes {
        return Ok(());
    }
    // A header that claims more than the footer knows of is damaged; what both claim is only large.
    let known_bytes = u64::try_from(chunk.uncompressed_size()).unwrap_or(0);
    if totals.uncompressed_bytes > known_bytes || totals.values > values {
        let (claimed, known) = (totals.uncompressed_bytes, known_bytes);
        return Err(format!("its pages claim {claimed} bytes, and the footer {known}: one is damaged").into());
    }
    Err(Refusal::Memory { needed_bytes, allowed_bytes: memory_bytes })
}

/// Where the pages of a column are.
fn chunk_range(chunk: &ColumnChunkMetaData) -> Result<Range<u64>, String> {
    let start = chunk.dictionary_page_offset().unwrap_or_else(|| chunk.data_page_offset());
    match (u64::try_from(start), u64::try_from(chunk.compressed_size())) {
        (Ok(start), Ok(length)) => Ok(start..start.saturating_add(length)),
        _ => Err(format!("is damaged: it starts at {start} and has {} bytes", chunk.compressed_size())),
    }
}

/// Runs code of the crate `parquet` on data that may be hostile.
fn contain<T, E: From<String>>(decode: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(format!("is damaged: its decoder gave up: {}", text.unwrap_or("no reason given")).into())
        }
    }
}
