//! What the pages of a column chunk will take in memory, found before any is decoded.
//!
//! Decoders reserve what a page header claims, run-length codes make any number of values of a few bytes, and gzip
//! streams end where they please, so a small file can ask for all memory there is. The headers say what will be asked
//! for: this walks over them. They are structs in Thrift's compact protocol, of which only the fields `type` (1),
//! `uncompressed_page_size` (2), `compressed_page_size` (3), `crc` (4) and, in the structs of the data pages (5 and 8), the number
//! of values (1), their encoding (2; in version 2: 4), the number of nulls (in version 2: 2) and the lengths of the
//! levels that version 2 leaves uncompressed (5, 6) are of interest; parquet.thrift of apache/parquet-format defines
//! them.

use std::io::Read;

/// Sums over the pages of a chunk.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub uncompressed_bytes: u64,
    pub values: u64,
}

/// Adds up the pages of `chunk` until they hold `values`. Gzip streams are run through to see that they keep to what
/// their header claims.
pub(super) fn totals(chunk: &[u8], values: u64, gzip: bool) -> Result<Totals, String> {
    let mut totals = Totals::default();
    let mut rest = chunk;
    while totals.values < values && !rest.is_empty() {
        let Header { uncompressed_bytes, compressed_bytes, values, level_bytes, .. } = Header::take(&mut rest)?;
        let page = usize::try_from(compressed_bytes).ok().and_then(|n| rest.split_at_checked(n));
        let (page, behind) = page.ok_or_else(|| format!("a page of {compressed_bytes} bytes passes the end"))?;
        let unsigned = |n: i64, what: &str| u64::try_from(n).map_err(|_| format!("a page with {n} {what}"));
        let claimed = unsigned(uncompressed_bytes, "bytes")?;
        if gzip {
            let levels = usize::try_from(level_bytes).unwrap_or(usize::MAX);
            let stream = page.get(levels..).ok_or("a page shorter than its levels")?;
            let found = inflated_bytes(stream, claimed)?;
            if found.saturating_add(levels as u64) > claimed {
                return Err(format!("a page inflates past the {claimed} bytes it claims"));
            }
        }
        totals.uncompressed_bytes = totals.uncompressed_bytes.saturating_add(claimed);
        totals.values = totals.values.saturating_add(unsigned(values, "values")?);
        rest = behind;
    }
    Ok(totals)
}

/// Bytes that a gzip stream gives, counted to one past `most`.
fn inflated_bytes(stream: &[u8], most: u64) -> Result<u64, String> {
    let mut limited = flate2::read::MultiGzDecoder::new(stream).take(most.saturating_add(1));
    match std::io::copy(&mut limited, &mut std::io::sink()) {
        Ok(count) => Ok(count),
        // A page whose header says that it is not compressed after all; it takes what it is long.
        Err(_) if !stream.starts_with(&[0x1f, 0x8b]) => Ok(0),
        Err(e) => Err(format!("a page is not gzip: {e}")),
    }
}

/// What a page says of itself.
#[derive(Default)]
pub(super) struct Header {
    /// As parquet.thrift numbers the types.
    pub page_type: i64,
    pub compressed_bytes: i64,
    /// The checksum of what follows; zero where there is none.
    pub crc: i64,
    pub values: i64,
    /// As parquet.thrift numbers the encodings.
    pub encoding: i64,
    /// Values that are missing, where the page is of version 2.
    pub nulls: i64,
    /// Bytes of levels before the values, where the page is of version 2.
    pub level_bytes: i64,
    uncompressed_bytes: i64,
}

/// The struct that is being read.
#[derive(Clone, Copy)]
enum Place {
    Page,
    DataPage,
    DataPageV2,
    Other,
}

/// Page headers nest four structs deep; more is an attack on the stack.
const DEPTH_MAX: usize = 8;

impl Header {
    /// Takes the header off the start of `rest`.
    pub(super) fn take(rest: &mut &[u8]) -> Result<Header, String> {
        let mut header = Header::default();
        header.read(rest, Place::Page, 0)?;
        Ok(header)
    }

    /// Reads one struct up to its stop byte.
    fn read(&mut self, rest: &mut &[u8], place: Place, depth: usize) -> Result<(), String> {
        if depth > DEPTH_MAX {
            return Err("a page header nests too deeply".into());
        }
        let mut field = 0i64;
        loop {
            let start = byte(rest)?;
            if start == 0 {
                return Ok(());
            }
            field = match start >> 4 {
                0 => zigzag(varint(rest)?),
                delta => field.saturating_add(i64::from(delta)),
            };
            let kind = start & 0xf;
            let wanted = match (place, field) {
                (Place::Page, 1) => Some(&mut self.page_type),
                (Place::Page, 2) => Some(&mut self.uncompressed_bytes),
                (Place::Page, 3) => Some(&mut self.compressed_bytes),
                (Place::Page, 4) => Some(&mut self.crc),
                (Place::DataPage | Place::DataPageV2, 1) => Some(&mut self.values),
                (Place::DataPage, 2) | (Place::DataPageV2, 4) => Some(&mut self.encoding),
                (Place::DataPageV2, 2) => Some(&mut self.nulls),
                (Place::DataPageV2, 5 | 6) => Some(&mut self.level_bytes),
                _ => None,
            };
            match (kind, wanted) {
                // The two lengths of levels add up; the other fields are there once.
                (5, Some(value)) => *value = value.saturating_add(zigzag(varint(rest)?)),
                (12, None) => {
                    let inner = match (place, field) {
                        (Place::Page, 5) => Place::DataPage,
                        (Place::Page, 8) => Place::DataPageV2,
                        _ => Place::Other,
                    };
                    self.read(rest, inner, depth + 1)?;
                }
                // In a struct, the kind is the value of a boolean.
                (1 | 2, None) => {}
                (kind, _) => self.skip(rest, kind, depth)?,
            }
        }
    }

    /// Passes over a value.
    fn skip(&mut self, rest: &mut &[u8], kind: u8, depth: usize) -> Result<(), String> {
        if depth > DEPTH_MAX {
            return Err("a page header nests too deeply".into());
        }
        match kind {
            1..=3 => byte(rest).map(|_| ()),
            4..=6 => varint(rest).map(|_| ()),
            7 => take(rest, 8),
            8 => {
                let len = varint(rest)?;
                take(rest, len)
            }
            9 | 10 => {
                let start = byte(rest)?;
                let count = if start >> 4 == 15 { varint(rest)? } else { u64::from(start >> 4) };
                (0..count).try_for_each(|_| self.skip(rest, start & 0xf, depth + 1))
            }
            11 => {
                let count = varint(rest)?;
                let kinds = if count == 0 { 0 } else { byte(rest)? };
                (0..count).try_for_each(|_| {
                    self.skip(rest, kinds >> 4, depth + 1)?;
                    self.skip(rest, kinds & 0xf, depth + 1)
                })
            }
            12 => self.read(rest, Place::Other, depth + 1),
            _ => Err(format!("a page header has a field of the unknown type {kind}")),
        }
    }
}

fn byte(rest: &mut &[u8]) -> Result<u8, String> {
    let (first, behind) = rest.split_first().ok_or("a page header is cut off")?;
    *rest = behind;
    Ok(*first)
}

fn take(rest: &mut &[u8], count: u64) -> Result<(), String> {
    let behind = usize::try_from(count).ok().and_then(|n| rest.get(n..));
    *rest = behind.ok_or("a page header is cut off")?;
    Ok(())
}

pub(super) fn varint(rest: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let next = byte(rest)?;
        value |= u64::from(next & 0x7f) << shift;
        if next & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a page header has a number of more than 64 bits".into())
}

fn zigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page of version 1: `type` 0, 100 bytes that became 3, and a struct with 1000 values, as parquet.thrift numbers
    /// the fields.
    const PAGE: [u8; 15] = [0x15, 0, 0x15, 0xc8, 0x01, 0x15, 0x06, 0x2c, 0x15, 0xd0, 0x0f, 0, 0, 7, 7];

    fn pages(count: usize) -> Vec<u8> {
        [&PAGE[..], &[7]].concat().repeat(count)
    }

    #[test]
    fn claims_add_up_over_the_pages_that_hold_the_values() {
        let expected = |pages: u64| Ok(Totals { uncompressed_bytes: 100 * pages, values: 1000 * pages });
        assert_eq!(totals(&pages(3), 3000, false), expected(3));
        assert_eq!(totals(&pages(3), 1500, false), expected(2));
    }

    #[test]
    fn broken_headers_are_errors() {
        for len in 1..16 {
            assert!(totals(&pages(1)[..len], 1, false).is_err(), "{len}");
        }
        let deep = [0x1c; 100_000];
        assert!(totals(&deep, 1, false).unwrap_err().contains("deeply"));
        let list_of_lists = [0x19, 0x19].repeat(100_000);
        assert!(totals(&list_of_lists, 1, false).is_err());
        assert!(totals(&[0x15, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], 1, false).is_err());
    }
}
