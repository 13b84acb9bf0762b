//! Buffers of a batch: offsets and views of rows, and what is compressed.

use std::io::Read;

use bytes::Bytes;

use crate::error::Refusal;
use crate::source::arrow::layout::VIEW_BYTES;
use crate::source::input::Compression;

/// Offsets of rows, checked to rise and to end within `limit` elements.
pub(super) fn borders(offsets: &[u8], rows: usize, offset_bytes: usize, limit: usize) -> Result<Vec<usize>, String> {
    if rows == 0 {
        return Ok(vec![0]);
    }
    let needed = rows.checked_add(1).and_then(|n| n.checked_mul(offset_bytes)).filter(|n| *n <= offsets.len());
    let needed = needed.ok_or_else(|| format!("{} bytes of offsets for {rows} rows", offsets.len()))?;
    let offset = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..offset_bytes].copy_from_slice(bytes);
        usize::try_from(u64::from_le_bytes(word)).unwrap_or(usize::MAX)
    };
    let borders: Vec<usize> = offsets[..needed].chunks_exact(offset_bytes).map(offset).collect();
    if !borders.is_sorted() || borders.last().is_some_and(|last| *last > limit) {
        return Err("has rows that point outside of their values".into());
    }
    Ok(borders)
}

/// Bytes of the longest value that lies in its view.
const SHORT_BYTES: usize = 12;

/// The values of views: a length, and then the value itself, or its first bytes, its buffer, and where it lies in that.
/// `missing` are the rows without a value, whose views may be anything.
pub(super) fn views(short: &Bytes, long: &[Bytes], rows: usize, missing: &[usize]) -> Result<Vec<Bytes>, String> {
    let needed = rows.checked_mul(VIEW_BYTES).filter(|needed| *needed <= short.len());
    let needed = needed.ok_or_else(|| format!("{} bytes of views for {rows} rows", short.len()))?;
    let mut missing = missing.iter().copied().peekable();
    let mut cells = Vec::with_capacity(rows);
    for (row, view) in short[..needed].as_chunks::<VIEW_BYTES>().0.iter().enumerate() {
        if missing.next_if_eq(&row).is_some() {
            cells.push(Bytes::new());
            continue;
        }
        let word = |at: usize| view[at..].first_chunk::<4>().map_or(0, |word| u32::from_le_bytes(*word)) as usize;
        let length = word(0);
        let (buffer, start) = match length {
            ..=SHORT_BYTES => (short, row * VIEW_BYTES + 4),
            _ => (long.get(word(8)).ok_or_else(|| format!("row {row} is in a buffer that is not there"))?, word(12)),
        };
        let end = start.checked_add(length).filter(|end| *end <= buffer.len());
        cells.push(buffer.slice(start..end.ok_or_else(|| format!("row {row} points outside of its values"))?));
    }
    Ok(cells)
}

/// The most that a buffer shrinks to one byte of; what claims more is damaged, not large.
const RATIO_MAX: u64 = 1 << 16;

/// A buffer that may start with its length before compression.
pub(super) fn decompress(
    buffer: Bytes,
    codec: Option<u8>,
    memory_bytes: u64,
    used_bytes: u64,
) -> Result<Bytes, Refusal> {
    let Some(codec) = codec else { return Ok(buffer) };
    if buffer.is_empty() {
        return Ok(buffer);
    }
    let claimed = buffer.first_chunk::<8>().map(|b| i64::from_le_bytes(*b)).ok_or("a compressed buffer is cut off")?;
    let packed = buffer.slice(8..);
    if claimed == -1 {
        return Ok(packed);
    }
    let likely = packed.len() as u64 * RATIO_MAX;
    let likely = u64::try_from(claimed).ok().filter(|n| *n <= likely);
    let claimed = likely.ok_or_else(|| format!("a buffer of {} bytes claims to hold {claimed}", packed.len()))?;
    let needed_bytes = used_bytes.saturating_add(claimed);
    if needed_bytes > memory_bytes {
        return Err(Refusal::Memory { needed_bytes, allowed_bytes: memory_bytes });
    }
    let bytes = match codec {
        0 => {
            let mut out = Vec::new();
            let read =
                lz4_flex::frame::FrameDecoder::new(&packed[..]).take(claimed.saturating_add(1)).read_to_end(&mut out);
            read.map_err(|e| format!("a buffer cannot be decompressed: {e}"))?;
            out.into()
        }
        1 => Compression::Zstd.decompress(&packed, claimed).map_err(|refusal| match refusal {
            Refusal::Memory { .. } => {
                format!("a buffer decompresses to more than the {claimed} bytes it claims").into()
            }
            damaged => damaged,
        })?,
        other => return Err(format!("a buffer of the unknown compression {other}").into()),
    };
    if bytes.len() as u64 != claimed {
        return Err(format!("a buffer decompresses to {} bytes, not the {claimed} it claims", bytes.len()).into());
    }
    Ok(bytes)
}
