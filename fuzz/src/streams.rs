//! Bytes as what a server of streams answers: entries or an error that says where, in bounded memory.

use updraft_data::stream::kafka::count_records;

/// Bytes of a batch before those under its checksum.
const CHECKED_FROM: usize = 21;

/// The batches of a broker of Kafka's protocol, from an offset on. Inputs that start with an odd byte are one batch with the
/// length and checksum that it should have, so that what lies behind is tried too.
pub fn kafka_read(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if first % 2 == 1 && bytes.len() > CHECKED_FROM {
        let (length, checksum) = (bytes.len() as i32 - 12, crc32c::crc32c(&bytes[CHECKED_FROM..]));
        bytes[8..12].copy_from_slice(&length.to_be_bytes());
        bytes[16] = 2;
        bytes[17..CHECKED_FROM].copy_from_slice(&checksum.to_be_bytes());
    }
    if let Err(error) = count_records(bytes.into(), i64::from(first / 2)) {
        assert!(error.starts_with("offset "), "an error that names nothing: {error}");
    }
}
