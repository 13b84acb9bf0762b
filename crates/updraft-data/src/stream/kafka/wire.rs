//! What messages of Kafka's protocol are made of, in the versions before fields could be of flexible length.

use bytes::{Buf, BufMut, Bytes};

/// Why a message is not understood.
pub(super) type Wrong = String;

/// The message of a request in the making.
#[derive(Default)]
pub(super) struct Writer(pub Vec<u8>);

impl Writer {
    pub(super) fn i8(&mut self, value: i8) -> &mut Writer {
        self.0.put_i8(value);
        self
    }

    pub(super) fn i16(&mut self, value: i16) -> &mut Writer {
        self.0.put_i16(value);
        self
    }

    pub(super) fn i32(&mut self, value: i32) -> &mut Writer {
        self.0.put_i32(value);
        self
    }

    pub(super) fn i64(&mut self, value: i64) -> &mut Writer {
        self.0.put_i64(value);
        self
    }

    pub(super) fn text(&mut self, text: &str) -> &mut Writer {
        // Names are shorter than 250 bytes; one that is not fits no server, which says so.
        let text = text.get(..text.len().min(i16::MAX as usize)).unwrap_or_default();
        self.0.put_i16(text.len() as i16);
        self.0.put_slice(text.as_bytes());
        self
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Writer {
        self.0.put_i32(bytes.len() as i32);
        self.0.put_slice(bytes);
        self
    }

    /// How many items follow.
    pub(super) fn count(&mut self, count: usize) -> &mut Writer {
        self.0.put_i32(count as i32);
        self
    }
}

/// What is left of an answer or a batch.
pub(super) struct Reader(pub Bytes);

const SHORT: &str = "ends within a field";

impl Reader {
    pub(super) fn i8(&mut self) -> Result<i8, Wrong> {
        self.0.try_get_i8().map_err(|_| SHORT.to_owned())
    }

    pub(super) fn i16(&mut self) -> Result<i16, Wrong> {
        self.0.try_get_i16().map_err(|_| SHORT.to_owned())
    }

    pub(super) fn i32(&mut self) -> Result<i32, Wrong> {
        self.0.try_get_i32().map_err(|_| SHORT.to_owned())
    }

    pub(super) fn i64(&mut self) -> Result<i64, Wrong> {
        self.0.try_get_i64().map_err(|_| SHORT.to_owned())
    }

    /// Exactly so many bytes.
    pub(super) fn take(&mut self, length: usize) -> Result<Bytes, Wrong> {
        if length > self.0.len() {
            return Err(SHORT.to_owned());
        }
        Ok(self.0.split_to(length))
    }

    /// Text that may be null.
    pub(super) fn text(&mut self) -> Result<Option<String>, Wrong> {
        let Ok(length) = usize::try_from(self.i16()?) else { return Ok(None) };
        let text = self.take(length)?;
        std::str::from_utf8(&text)
            .map(|text| Some(text.to_owned()))
            .map_err(|_| "has text that is not UTF-8".to_owned())
    }

    /// Bytes that may be null.
    pub(super) fn bytes(&mut self) -> Result<Option<Bytes>, Wrong> {
        let Ok(length) = usize::try_from(self.i32()?) else { return Ok(None) };
        self.take(length).map(Some)
    }

    /// Items of an array that may be null, which is as one without items.
    pub(super) fn items<T>(&mut self, mut item: impl FnMut(&mut Reader) -> Result<T, Wrong>) -> Result<Vec<T>, Wrong> {
        let count = self.i32()?;
        // No vector of a size that a message claims: what is not there ends the loop.
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(item(self)?);
        }
        Ok(items)
    }

    /// A whole number in as few bytes as it needs, small ones of either sign in few.
    pub(super) fn varint(&mut self) -> Result<i64, Wrong> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.i8()? as u8;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok((number >> 1) as i64 ^ -((number & 1) as i64));
            }
        }
        Err("has a number that does not end".to_owned())
    }

    /// Bytes that may be null, behind such a number.
    pub(super) fn varbytes(&mut self) -> Result<Option<Bytes>, Wrong> {
        match self.varint()? {
            -1 => Ok(None),
            length => self.take(usize::try_from(length).map_err(|_| SHORT.to_owned())?).map(Some),
        }
    }
}
