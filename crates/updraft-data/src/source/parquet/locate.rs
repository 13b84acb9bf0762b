//! Where the pages of a column chunk lie, or its values, so that a few rows can be read without the rest of their row
//! group.
//!
//! A page says in its header how many bytes and values it has, so the headers alone are walked over; the values of a
//! column without lists are its rows. Writers that look at the size of a page once in a thousand rows make one page of a
//! row group of pictures. Its values, where they are not compressed, say their lengths, so the same walk goes over them.
//!
//! Whatever is not as expected gives nothing: then the row group is read whole, and what is wrong with it is said there.

use std::ops::Range;

use parquet::basic::{Compression, Type as PhysicalType};
use parquet::file::metadata::ColumnChunkMetaData;

use crate::source::input::Input;
use crate::source::parquet::pages::{Header, varint};

/// What of a column chunk can be read without the rest.
#[derive(Debug)]
pub(super) enum Located {
    Pages(Pages),
    Values(Values),
}

/// The values of the rows of a row group.
#[derive(Debug)]
pub(super) struct Values {
    /// Of each page: its first row, and where the length of that row's value is.
    pages: Vec<(usize, u64)>,
    lengths: Vec<u32>,
}

/// The pages of a column chunk.
#[derive(Debug)]
pub(super) struct Pages {
    pub dictionary: Option<Range<u64>>,
    pub data: Vec<Page>,
}

/// A page of values: its header and content in the file, and its rows in the row group.
#[derive(Debug)]
pub(super) struct Page {
    pub bytes: Range<u64>,
    pub rows: Range<u64>,
}

/// Numbers of the types of pages and of encodings in parquet.thrift.
const DATA: i64 = 0;
const DICTIONARY: i64 = 2;
const DATA_V2: i64 = 3;
const PLAIN: i64 = 0;

/// Bytes of a header that are read first; few have so many.
const HEADER_BYTES: u64 = 1 << 10;

/// Bytes of a header, at most: statistics in it can be long.
const HEADER_BYTES_MAX: u64 = 64 << 10;

/// Bytes to each page or value, at least. Smaller ones cost more to walk over than to read: a little where the file is in
/// the page cache, and where it is not, as many waits for the disk as there are.
const STEP_BYTES_MIN: u64 = 16 << 10;

/// Pages that a chunk may have, however small.
const PAGES_ALWAYS: u64 = 8;

/// Bytes of the definition levels of a page, at most: those of values without nulls are a few.
const LEVEL_BYTES_MAX: u64 = 1 << 10;

/// Bytes of the length before a value.
const LENGTH_BYTES: u64 = 4;

impl Located {
    /// Finds the pages that hold the `rows` rows of a chunk at `range`, or the values in them.
    pub(super) fn find(input: &Input, chunk: &ColumnChunkMetaData, range: &Range<u64>, rows: u64) -> Option<Located> {
        if chunk.column_descr().max_rep_level() > 0 {
            return None;
        }
        let mut pages_left = PAGES_ALWAYS + length(range) / STEP_BYTES_MIN;
        let mut values = Some(Values { pages: Vec::new(), lengths: Vec::new() });
        let mut pages = Pages { dictionary: None, data: Vec::new() };
        let (mut at, mut row) = (range.start, 0);
        while row < rows {
            pages_left = pages_left.checked_sub(1)?;
            let (header, header_bytes) = read_header(input, at..range.end)?;
            let content = at.checked_add(header_bytes)?;
            let end = content.checked_add(u64::try_from(header.compressed_bytes).ok()?)?;
            if end > range.end {
                return None;
            }
            match header.page_type {
                DATA | DATA_V2 => {
                    let row_end = row.checked_add(u64::try_from(header.values).ok()?)?;
                    values = values.and_then(|values| values.and_of(input, chunk, &header, content..end));
                    pages.data.push(Page { bytes: at..end, rows: row..row_end });
                    row = row_end;
                }
                DICTIONARY if pages.dictionary.is_none() && pages.data.is_empty() => pages.dictionary = Some(at..end),
                DICTIONARY => return None,
                _ => {}
            }
            at = end;
        }
        if row != rows {
            return None;
        }
        Some(match values {
            Some(values) if values.lengths.len() as u64 == rows => Located::Values(values),
            _ => Located::Pages(pages),
        })
    }

    /// Bytes that are read for one row, on average.
    pub(super) fn row_bytes(&self) -> u64 {
        let mean = |count: usize, bytes: u64| bytes / (count as u64).max(1);
        match self {
            Located::Pages(Pages { dictionary, data }) => {
                let bytes = data.iter().map(|page| length(&page.bytes)).sum();
                dictionary.as_ref().map_or(0, length) + mean(data.len(), bytes)
            }
            Located::Values(Values { lengths, .. }) => mean(lengths.len(), lengths.iter().map(|n| u64::from(*n)).sum()),
        }
    }

    /// Bytes of memory that it takes to know this.
    pub(super) fn memory_bytes(&self) -> u64 {
        let bytes = match self {
            Located::Pages(pages) => size_of_val(&pages.data[..]),
            Located::Values(values) => size_of_val(&values.pages[..]) + size_of_val(&values.lengths[..]),
        };
        (bytes + size_of::<Located>()) as u64
    }
}

impl Values {
    /// These and the values of a page whose content is at `content`, where they are plain and none is missing.
    fn and_of(
        mut self,
        input: &Input,
        chunk: &ColumnChunkMetaData,
        page: &Header,
        content: Range<u64>,
    ) -> Option<Values> {
        // A checksum is that of the whole page.
        let plain = page.encoding == PLAIN
            && page.crc == 0
            && chunk.compression() == Compression::UNCOMPRESSED
            && chunk.column_type() == PhysicalType::BYTE_ARRAY;
        let count = u64::try_from(page.values).ok().filter(|_| plain)?;
        if count.checked_mul(STEP_BYTES_MIN)? > length(&content) {
            return None;
        }
        let mut at = content.start + levels_bytes(input, chunk, page, &content, count)?;
        self.pages.push((self.lengths.len(), at));
        for _ in 0..count {
            let start = at.checked_add(LENGTH_BYTES).filter(|start| *start <= content.end)?;
            let bytes = read_length(input, at..start)?;
            at = start.checked_add(bytes.into()).filter(|end| *end <= content.end)?;
            self.lengths.push(bytes);
        }
        (at == content.end).then_some(self)
    }

    /// Where the value of a row is.
    pub(super) fn of(&self, row: u64) -> Option<Range<u64>> {
        let row = usize::try_from(row).ok()?;
        let (first, at) = *self.pages.get(self.pages.partition_point(|(first, _)| *first <= row).checked_sub(1)?)?;
        let before: u64 = self.lengths.get(first..row)?.iter().map(|n| u64::from(*n) + LENGTH_BYTES).sum();
        let start = at + before + LENGTH_BYTES;
        Some(start..start + u64::from(*self.lengths.get(row)?))
    }
}

impl Pages {
    /// The pages that hold some rows, which ascend.
    pub(super) fn of(&self, rows: &[u64]) -> Vec<&Page> {
        let mut held: Vec<&Page> = Vec::new();
        for row in rows {
            if held.last().is_none_or(|page| page.rows.end <= *row) {
                held.extend(self.data.get(self.data.partition_point(|page| page.rows.end <= *row)));
            }
        }
        held
    }
}

pub(super) fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// Bytes of the levels before the values of a page, if they say that no value is missing.
fn levels_bytes(
    input: &Input,
    chunk: &ColumnChunkMetaData,
    page: &Header,
    content: &Range<u64>,
    count: u64,
) -> Option<u64> {
    match (page.page_type, chunk.column_descr().max_def_level()) {
        (DATA_V2, _) => u64::try_from(page.level_bytes).ok().filter(|_| page.nulls == 0),
        (_, 0) => Some(0),
        (_, 1) => {
            let start = content.start.checked_add(LENGTH_BYTES)?;
            let bytes = u64::from(read_length(input, content.start..start)?);
            let end = start.checked_add(bytes).filter(|end| bytes <= LEVEL_BYTES_MAX && *end <= content.end)?;
            let levels = input.read(start..end).ok()?;
            are_ones(&levels, count)?.then_some(LENGTH_BYTES + bytes)
        }
        _ => None,
    }
}

fn read_length(input: &Input, range: Range<u64>) -> Option<u32> {
    Some(u32::from_le_bytes(*input.read(range).ok()?.first_chunk()?))
}

/// Whether the first `count` levels, of one bit in runs and packed by eight, are ones.
fn are_ones(mut levels: &[u8], count: u64) -> Option<bool> {
    let mut found = 0u64;
    while found < count {
        let run = varint(&mut levels).ok()?;
        let (run_levels, run_bytes) = match run & 1 {
            0 => (run >> 1, 1),
            _ => ((run >> 1).checked_mul(8)?, usize::try_from(run >> 1).ok()?),
        };
        let (bits, behind) = levels.split_at_checked(run_bytes)?;
        let wanted = run_levels.min(count - found);
        let ones = match run & 1 {
            0 => bits == [1],
            _ => (0..wanted as usize).all(|at| bits[at / 8] >> (at % 8) & 1 == 1),
        };
        if !ones {
            return Some(false);
        }
        found += wanted;
        levels = behind;
    }
    Some(true)
}

/// The header at the start of a range, and its length.
fn read_header(input: &Input, range: Range<u64>) -> Option<(Header, u64)> {
    let mut length = HEADER_BYTES;
    loop {
        let end = range.start.saturating_add(length).min(range.end);
        let bytes = input.read(range.start..end).ok()?;
        let mut rest = &bytes[..];
        // What does not parse may only be cut off.
        if let Ok(header) = Header::take(&mut rest) {
            return Some((header, (bytes.len() - rest.len()) as u64));
        }
        if end == range.end || length >= HEADER_BYTES_MAX {
            return None;
        }
        length *= 8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_say_whether_a_value_is_missing() {
        // Runs of one level and groups of eight, as "RLE/bit-packing hybrid" in the Parquet format has them.
        for (levels, count, expected) in [
            (&[20, 1][..], 10, Some(true)),
            (&[20, 1], 11, None),
            (&[20, 0], 10, Some(false)),
            (&[20, 1, 2, 0], 11, Some(false)),
            (&[20, 1, 2, 0], 10, Some(true)),
            (&[3, 0xff], 8, Some(true)),
            (&[3, 0x7f], 7, Some(true)),
            (&[3, 0x7f], 8, Some(false)),
            (&[3, 0xff, 20, 1], 18, Some(true)),
            (&[5, 0xff], 16, None),
            (&[0xff; 12], 8, None),
            (&[], 0, Some(true)),
        ] {
            assert_eq!(are_ones(levels, count), expected, "{levels:?} of {count}");
        }
    }
}
