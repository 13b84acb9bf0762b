//! TFRecord: records framed by lengths and checksums, usually of `tf.train.Example`.
//!
//! A record is its length (`u64`), the masked CRC-32C of the length, the data, and the masked CRC-32C of the data, all
//! little-endian; `tensorflow/core/lib/io/record_writer.h` defines it. Lengths are checked on the first walk, data
//! whenever a record is read. An example may have a feature that those before it lack, so the walk looks at all of them.

use bytes::Bytes;

use crate::error::DataError;
use crate::rows::Cells;
use crate::schema::{Column, Kind, Schema};
use crate::source::cells::CellsBuilder;
use crate::source::input::{Content, Walk};
use crate::source::records::{BlockBytes, BrokenRow, Records};

pub(crate) mod example;

/// Bytes before the data of a record.
pub(crate) const HEAD_BYTES: usize = 12;
/// Bytes behind it.
pub(crate) const TAIL_BYTES: usize = 4;

/// The CRC-32C of `bytes`, rotated and offset as TFRecord stores it, so that checksums of data that holds checksums
/// stay good ones.
pub(crate) fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// TFRecord as rows.
pub(crate) struct TfRecord {
    /// Whether records are taken as they are, not as examples.
    pub raw: bool,
    /// The most memory that a record may take.
    pub memory_bytes: u64,
}

impl TfRecord {
    /// The length of the data of a record whose first bytes are `head`.
    fn length(&self, head: &[u8]) -> Result<u64, String> {
        let (Some(length), Some(crc)) = (head.first_chunk::<8>(), head.last_chunk::<4>()) else {
            return Err("a record is cut off in its length".into());
        };
        let (found, expected) = (masked_crc(length), u32::from_le_bytes(*crc));
        let length = u64::from_le_bytes(*length);
        if found != expected {
            return Err(format!(
                "the length {length} of a record has the checksum {found:08x}, not {expected:08x}: it is damaged, or this \
                 is no TFRecord"
            ));
        }
        if length > self.memory_bytes {
            return Err(format!("a record of {length} bytes, more than memory_bytes = {}", self.memory_bytes));
        }
        Ok(length)
    }
}

impl Records for TfRecord {
    type Passed = example::Names;

    fn skip(&self, walk: &mut Walk<'_>, names: &mut example::Names) -> Result<Option<u64>, DataError> {
        if walk.rest() == 0 {
            return Ok(None);
        }
        let head = walk.take(HEAD_BYTES as u64, "the length of a record")?;
        let length = self.length(&head).map_err(|reason| walk.error(reason))?;
        if self.raw {
            walk.skip(length + TAIL_BYTES as u64, "a record")?;
            return Ok(Some(walk.position()));
        }
        let start = walk.position();
        let record = walk.take(length + TAIL_BYTES as u64, "a record")?;
        if let Some((data, crc)) = record.split_last_chunk::<TAIL_BYTES>()
            && masked_crc(data) == u32::from_le_bytes(*crc)
        {
            names.add(data).map_err(|reason| walk.error_from(start, reason))?;
        }
        Ok(Some(walk.position()))
    }

    fn infer(&self, content: &Content, bytes: &Bytes, names: &example::Names) -> Result<Schema, DataError> {
        if self.raw {
            return Ok(Schema { columns: vec![Column { name: "record".into(), kind: Kind::Bytes }] });
        }
        let mut features = example::Seen::default();
        let mut damaged = None;
        let mut at = 0;
        // A block holds whole records; the last of what is looked at may be cut.
        for _ in 0..example::INFER_EXAMPLES {
            let Some(head) = bytes.get(at..at + HEAD_BYTES) else { break };
            let length = self.length(head).map_err(|r| content.input.error_at(at as u64, r))? as usize;
            let start = at + HEAD_BYTES;
            let Some(data) = bytes.get(start..start + length) else { break };
            let crc = bytes.get(start + length..).and_then(|rest| rest.first_chunk::<TAIL_BYTES>());
            // A damaged record says nothing of the columns; it is named when it is read, and may be left out then.
            if crc.is_some_and(|crc| masked_crc(data) == u32::from_le_bytes(*crc)) {
                features.add(data).map_err(|r| content.input.error_at(at as u64, r))?;
            } else {
                damaged.get_or_insert(at);
            }
            at = start + length + TAIL_BYTES;
        }
        if let (true, Some(at)) = (features.is_empty(), damaged) {
            return Err(content
                .input
                .error_at(at as u64, "the record has a wrong checksum, as have all that were looked at"));
        }
        features.schema(names).map_err(|r| content.input.error(r))
    }

    fn decode(
        &self,
        block: BlockBytes<'_>,
        wanted: &[(&str, &Kind)],
        rows: &mut dyn Iterator<Item = usize>,
        broken: &mut dyn FnMut(BrokenRow) -> Result<(), DataError>,
    ) -> Result<Vec<Cells>, DataError> {
        let mut builders: Vec<CellsBuilder> =
            wanted.iter().map(|(_, kind)| CellsBuilder::new(kind, block.rows)).collect();
        let mut examples = example::Decoder::new(wanted);
        let (mut at, mut row, mut count) = (0, 0, 0);
        let mut pick = rows.next();
        while let Some(wanted_row) = pick {
            let wrong = |reason: String| DataError::file(block.place(row, at).as_ref(), reason);
            let head = block.bytes.get(at..at + HEAD_BYTES);
            let length =
                head.ok_or_else(|| "a record is cut off in its length".to_owned()).and_then(|h| self.length(h));
            let length = length.map_err(wrong)? as usize;
            let start = at + HEAD_BYTES;
            let tail = block.bytes.get(start..).and_then(|rest| rest.get(length..)?.first_chunk::<TAIL_BYTES>());
            let expected =
                u32::from_le_bytes(*tail.ok_or_else(|| wrong(format!("a record of {length} bytes is cut off")))?);
            if row == wanted_row {
                let data = block.bytes.slice(start..start + length);
                let found = masked_crc(&data);
                while pick == Some(row) {
                    let sample = |column: usize, reason: &str| DataError::Sample {
                        sample: block.place(row, at),
                        column: wanted.get(column).map_or_else(String::new, |(name, _)| (*name).to_owned()),
                        reason: reason.to_owned(),
                    };
                    let read = match (self.raw, builders.as_mut_slice()) {
                        _ if found != expected => Err(None),
                        (true, [only]) => only.push_bytes(data.clone()).map_err(|r| Some((0, r))),
                        (true, _) => Err(Some((0, "records have one column".into()))),
                        (false, builders) => examples.decode(&data, builders).map_err(Some),
                    };
                    if let Err(failed) = read {
                        let error = match failed {
                            Some((column, reason)) => sample(column, &reason),
                            None => wrong(format!(
                                "the record's {length} bytes have the checksum {found:08x}, not {expected:08x}"
                            )),
                        };
                        broken(BrokenRow { at: count, column: None, is_missing: false, error })?;
                        builders.iter_mut().for_each(|builder| builder.push_nothing(count));
                    } else {
                        for column in examples.absent() {
                            let error = sample(column, "the example has no such feature");
                            broken(BrokenRow { at: count, column: Some(column), is_missing: true, error })?;
                            builders[column].push_nothing(count);
                        }
                    }
                    count += 1;
                    pick = rows.next();
                }
            }
            at = start + length + TAIL_BYTES;
            row += 1;
        }
        let finish = |builder: CellsBuilder| builder.finish(count).map_err(|r| block.content.input.error(r));
        builders.into_iter().map(finish).collect()
    }
}
