//! Batches of records as a broker keeps them and hands them out.
//!
//! # Design
//!
//! A batch is compressed and checked as a whole, and a broker hands out whole ones: records before the wanted offset are
//! passed over here. Offsets have gaps where a topic is compacted or a transaction ended, so a batch says where the next one
//! begins, whatever it holds. Records of transactions that were given up are in the log like others; the answer names
//! their producers.

use std::collections::BTreeSet;
use std::io::Read;

use bytes::Bytes;

use super::wire::{Reader, Wrong};
use updraft_base::units;

/// The most that one batch may take, so that no few bytes ask for all memory. Brokers take batches of 1 MiB unless told otherwise.
const BATCH_BYTES_MAX: u64 = 256 << 20;

/// Bytes of a batch before those that its length counts.
const PREFIX_BYTES: usize = 12;

/// One record.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    pub offset: i64,
    pub timestamp_ms: i64,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    pub headers: Vec<(Bytes, Option<Bytes>)>,
}

/// A transaction that was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Aborted {
    pub first_offset: i64,
    pub producer: i64,
}

/// Records of a partition from an offset on.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub records: Vec<Record>,
    /// Where to go on, which is the offset asked for where nothing was passed.
    pub next: i64,
    /// What the batches took.
    pub bytes: u64,
}

/// Why batches are not read: the offset of the one that is wrong, and what is.
pub(super) type WrongBatch = (i64, Wrong);

/// The records from `from` on in the batches of an answer, until they take more than `room_bytes`. The last batch may be cut
/// short, as brokers do.
pub(super) fn records(
    batches: Bytes,
    mut aborted: Vec<Aborted>,
    from: i64,
    room_bytes: u64,
) -> Result<Records, WrongBatch> {
    aborted.sort_unstable();
    aborted.reverse();
    let mut open = BTreeSet::new();
    let mut found = Records { next: from, ..Records::default() };
    let mut rest = Reader(batches);
    while found.bytes <= room_bytes {
        if rest.0.len() < PREFIX_BYTES {
            break;
        }
        let wrong = |reason: Wrong| (found.next, reason);
        let first = rest.i64().map_err(wrong)?;
        let length = rest.i32().map_err(wrong)?;
        let length = usize::try_from(length).map_err(|_| wrong(format!("the length {length} of a batch")))?;
        if rest.0.len() < length {
            break;
        }
        let mut batch = Reader(rest.take(length).map_err(wrong)?);
        let header = Header::read(first, &mut batch).map_err(|reason| (first, reason))?;
        while let Some(transaction) = aborted.pop_if(|transaction| transaction.first_offset <= header.last) {
            open.insert(transaction.producer);
        }
        if header.last >= from {
            let is_given_up = header.is_transactional() && open.contains(&header.producer);
            if header.is_control() {
                if header.is_abort(&mut batch).map_err(|reason| (first, reason))? {
                    open.remove(&header.producer);
                }
            } else if !is_given_up {
                header.records(batch, from, &mut found).map_err(|reason| (first, reason))?;
            }
            found.next = header.last + 1;
        } else if header.is_control() {
            open.remove(&header.producer);
        }
    }
    Ok(found)
}

struct Header {
    first: i64,
    last: i64,
    attributes: i16,
    first_timestamp_ms: i64,
    last_timestamp_ms: i64,
    producer: i64,
    count: i32,
}

impl Header {
    fn read(first: i64, batch: &mut Reader) -> Result<Header, Wrong> {
        batch.i32()?; // the epoch of the leader that wrote it
        let magic = batch.i8()?;
        if magic != 2 {
            return Err(format!("messages of format {magic}, from before Kafka 0.11; format 2 is read"));
        }
        let checksum = batch.i32()? as u32;
        let found = crc32c::crc32c(&batch.0);
        if checksum != found {
            return Err(format!("the batch has the checksum {found:08x}, and says {checksum:08x}"));
        }
        let attributes = batch.i16()?;
        let last_delta = batch.i32()?;
        let (first_timestamp_ms, last_timestamp_ms) = (batch.i64()?, batch.i64()?);
        let producer = batch.i64()?;
        batch.i16()?; // its epoch
        batch.i32()?; // the number of the first record of this producer
        let count = batch.i32()?;
        let last = first.checked_add(last_delta.into()).filter(|last| first >= 0 && *last >= first && *last < i64::MAX);
        let last = last.ok_or_else(|| format!("the batch ends {last_delta} behind its beginning"))?;
        Ok(Header { first, last, attributes, first_timestamp_ms, last_timestamp_ms, producer, count })
    }

    fn is_transactional(&self) -> bool {
        self.attributes & 0x10 != 0
    }

    /// Whether it ends a transaction rather than holding records.
    fn is_control(&self) -> bool {
        self.attributes & 0x20 != 0
    }

    /// Whether the transaction that it ends is given up.
    fn is_abort(&self, batch: &mut Reader) -> Result<bool, Wrong> {
        let mut records = Records::default();
        self.records(Reader(std::mem::take(&mut batch.0)), i64::MIN, &mut records)?;
        let key = records.records.into_iter().next().and_then(|record| record.key);
        let mut key = Reader(key.ok_or("a mark of a transaction without a key")?);
        key.i16()?; // the version of the mark
        Ok(key.i16()? == 0)
    }

    /// Adds the records from an offset on.
    fn records(&self, batch: Reader, from: i64, found: &mut Records) -> Result<(), Wrong> {
        let bytes = expand(self.attributes & 7, batch.0)?;
        found.bytes += bytes.len() as u64;
        let mut rest = Reader(bytes);
        // Of records whose time is that of the broker, the batch has it.
        let is_broker_time = self.attributes & 8 != 0;
        for _ in 0..self.count {
            let length = rest.varint()?;
            let length = usize::try_from(length).map_err(|_| format!("the length {length} of a record"))?;
            let mut record = Reader(rest.take(length)?);
            record.i8()?; // attributes, of which there are none
            let after_ms = record.varint()?;
            let offset = self.first.checked_add(record.varint()?).filter(|at| (self.first..=self.last).contains(at));
            let offset = offset.ok_or("a record that is not between the first and last of its batch")?;
            if offset < from {
                continue;
            }
            let timestamp_ms = match is_broker_time {
                true => self.last_timestamp_ms,
                false => self.first_timestamp_ms.checked_add(after_ms).ok_or("a time that 64 bits do not hold")?,
            };
            let (key, value) = (record.varbytes()?, record.varbytes()?);
            let mut headers = Vec::new();
            for _ in 0..record.varint()? {
                headers.push((record.varbytes()?.ok_or("a header without a name")?, record.varbytes()?));
            }
            found.records.push(Record { offset, timestamp_ms, key, value, headers });
        }
        Ok(())
    }
}

/// What a batch holds, uncompressed.
fn expand(compression: i16, bytes: Bytes) -> Result<Bytes, Wrong> {
    let bounded = |reader: &mut dyn Read| {
        let mut out = Vec::new();
        reader
            .take(BATCH_BYTES_MAX + 1)
            .read_to_end(&mut out)
            .map_err(|e| format!("the batch is compressed wrongly: {e}"))?;
        check_size(out.len() as u64)?;
        Ok(Bytes::from(out))
    };
    match compression {
        0 => Ok(bytes),
        1 => bounded(&mut flate2::read::MultiGzDecoder::new(bytes.as_ref())),
        2 => snappy(&bytes),
        3 => bounded(&mut lz4_flex::frame::FrameDecoder::new(bytes.as_ref())),
        4 => bounded(&mut zstd::Decoder::new(bytes.as_ref()).map_err(|e| e.to_string())?),
        other => Err(format!("the batch has the compression {other}; gzip, snappy, lz4 and zstd are read")),
    }
}

fn check_size(bytes: u64) -> Result<(), Wrong> {
    match bytes > BATCH_BYTES_MAX {
        true => Err(format!("the batch takes more than {}", units::bytes(BATCH_BYTES_MAX))),
        false => Ok(()),
    }
}

/// Snappy as one block, or as the blocks behind a header that Java's library writes.
fn snappy(bytes: &Bytes) -> Result<Bytes, Wrong> {
    const MAGIC: &[u8] = b"\x82SNAPPY\0";
    let block = |block: &[u8], out: &mut Vec<u8>| {
        let wrong = |e: snap::Error| format!("the batch is compressed wrongly: {e}");
        let start = out.len();
        let length = snap::raw::decompress_len(block).map_err(wrong)?;
        check_size((start + length) as u64)?;
        out.resize(start + length, 0);
        snap::raw::Decoder::new().decompress(block, &mut out[start..]).map(|_| ()).map_err(wrong)
    };
    let mut out = Vec::new();
    if !bytes.starts_with(MAGIC) {
        block(bytes, &mut out)?;
        return Ok(out.into());
    }
    let mut rest = Reader(bytes.slice(MAGIC.len()..));
    rest.take(8)?; // its versions
    while !rest.0.is_empty() {
        let part = rest.bytes()?.ok_or("a block of negative length")?;
        block(&part, &mut out)?;
    }
    Ok(out.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A batch at offset 5 of so many records, whose body is what it is.
    fn batch(attributes: i16, count: i32, body: &[u8]) -> Vec<u8> {
        let mut checked = attributes.to_be_bytes().to_vec();
        checked.extend((count - 1).to_be_bytes());
        checked.extend([0; 16]);
        checked.extend([0xff; 14]);
        checked.extend(count.to_be_bytes());
        checked.extend(body);
        let mut bytes = 5i64.to_be_bytes().to_vec();
        bytes.extend((checked.len() as i32 + 9).to_be_bytes());
        bytes.extend([0, 0, 0, 0, 2]);
        bytes.extend(crc32c::crc32c(&checked).to_be_bytes());
        bytes.extend(checked);
        bytes
    }

    /// Records at offsets 5 and 6: `a` under the key `k`, and one without a value and with a header.
    const BODY: &[u8] = &[16, 0, 0, 0, 2, b'k', 2, b'a', 0, 18, 0, 4, 2, 1, 1, 2, 2, b'h', 1];

    #[test]
    fn records_are_what_their_bytes_say_whatever_compresses_them() {
        let mut gzip = flate2::read::GzEncoder::new(BODY, flate2::Compression::default());
        let mut gzipped = Vec::new();
        gzip.read_to_end(&mut gzipped).unwrap();
        let snapped = snap::raw::Encoder::new().compress_vec(BODY).unwrap();
        let mut framed = b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01".to_vec();
        framed.extend((snapped.len() as i32).to_be_bytes());
        framed.extend(&snapped);
        let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
        std::io::Write::write_all(&mut lz4, BODY).unwrap();
        let lz4 = lz4.finish().unwrap();
        let zstd = zstd::encode_all(BODY, 1).unwrap();
        for (compression, body) in [(0, BODY.to_vec()), (1, gzipped), (2, snapped), (2, framed), (3, lz4), (4, zstd)] {
            let bytes = batch(compression, 2, &body);
            let found = records(bytes.clone().into(), Vec::new(), 5, 0).unwrap();
            let [first, second] = found.records.as_slice() else { panic!("{:?}", found.records) };
            assert_eq!(
                (first.offset, first.key.as_deref(), first.value.as_deref()),
                (5, Some(&b"k"[..]), Some(&b"a"[..]))
            );
            assert_eq!((second.offset, second.timestamp_ms, &second.key, &second.value), (6, 2, &None, &None));
            assert_eq!(second.headers, [(Bytes::from_static(b"h"), None)]);
            assert_eq!(found.next, 7);
            // What was read before is passed over.
            let found = records(bytes.into(), Vec::new(), 6, 0).unwrap().records;
            assert_eq!(found, std::slice::from_ref(second));
        }
    }

    #[test]
    fn a_batch_that_is_cut_or_damaged_is_never_a_record() {
        let whole = batch(0, 2, BODY);
        for length in 0..whole.len() {
            let found = records(whole[..length].to_vec().into(), Vec::new(), 5, 0).unwrap();
            assert!(found.records.is_empty() && found.next == 5, "{length} bytes");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            // Its place and the epoch of its writer are under no checksum.
            assert!(at < 16 || records(bytes.into(), Vec::new(), 5, 0).is_err(), "byte {at}");
        }
    }

    #[test]
    fn few_bytes_do_not_ask_for_all_memory() {
        let zeros = vec![0; 1 << 20];
        let mut bomb = zstd::Encoder::new(Vec::new(), 1).unwrap();
        for _ in 0..257 {
            std::io::Write::write_all(&mut bomb, &zeros).unwrap();
        }
        let (offset, reason) = records(batch(4, 1, &bomb.finish().unwrap()).into(), Vec::new(), 5, 0).unwrap_err();
        assert_eq!((offset, reason.as_str()), (5, "the batch takes more than 256 MiB"));
        // Counts and lengths that are not there.
        for body in [&[][..], &[0xfe, 0xff, 0xff, 0xff, 0x0f], &[2, 0], &[1]] {
            let (offset, _) = records(batch(0, i32::MAX, body).into(), Vec::new(), 5, 0).unwrap_err();
            assert_eq!(offset, 5);
        }
    }
}
