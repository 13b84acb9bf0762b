//! A file in memory, as the JPEG decoder reads it: four bytes at a time, from its innermost loop. The decoder's own cursor
//! copies ranges whose lengths the compiler does not know, each by a call; here they are loads.

use zune_jpeg::zune_core::bytestream::{ZByteIoError, ZByteReaderTrait, ZSeekFrom};

pub(super) struct Input<'a> {
    bytes: &'a [u8],
    /// May lie past the end, where there is nothing to read.
    at: usize,
}

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Input<'a> {
        Input { bytes, at: 0 }
    }

    #[inline(always)]
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }
}

impl ZByteReaderTrait for Input<'_> {
    #[inline(always)]
    fn read_byte_no_error(&mut self) -> u8 {
        let byte = self.bytes.get(self.at).copied().unwrap_or(0);
        self.at = self.at.saturating_add(1);
        byte
    }

    #[inline(always)]
    fn read_exact_bytes(&mut self, out: &mut [u8]) -> Result<(), ZByteIoError> {
        self.peek_exact_bytes(out)?;
        self.at += out.len();
        Ok(())
    }

    #[inline(always)]
    fn read_bytes(&mut self, out: &mut [u8]) -> Result<usize, ZByteIoError> {
        let len = self.peek_bytes(out)?;
        self.at += len;
        Ok(len)
    }

    #[inline(always)]
    fn peek_bytes(&mut self, out: &mut [u8]) -> Result<usize, ZByteIoError> {
        let rest = self.rest();
        let len = rest.len().min(out.len());
        out[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    #[inline(always)]
    fn peek_exact_bytes(&mut self, out: &mut [u8]) -> Result<(), ZByteIoError> {
        let rest = self.rest();
        let Some(bytes) = rest.get(..out.len()) else {
            return Err(ZByteIoError::NotEnoughBytes(rest.len(), out.len()));
        };
        out.copy_from_slice(bytes);
        Ok(())
    }

    #[inline(always)]
    fn z_seek(&mut self, from: ZSeekFrom) -> Result<u64, ZByteIoError> {
        let at = match from {
            ZSeekFrom::Start(at) => usize::try_from(at).ok(),
            ZSeekFrom::End(offset) => isize::try_from(offset).ok().and_then(|o| self.bytes.len().checked_add_signed(o)),
            ZSeekFrom::Current(offset) => isize::try_from(offset).ok().and_then(|o| self.at.checked_add_signed(o)),
        };
        self.at = at.ok_or(ZByteIoError::SeekError("before the first byte or beyond the last address"))?;
        Ok(self.at as u64)
    }

    #[inline(always)]
    fn is_eof(&mut self) -> Result<bool, ZByteIoError> {
        Ok(self.at >= self.bytes.len())
    }

    #[inline(always)]
    fn z_position(&mut self) -> Result<u64, ZByteIoError> {
        Ok(self.at as u64)
    }

    fn read_remaining(&mut self, sink: &mut Vec<u8>) -> Result<usize, ZByteIoError> {
        let rest = self.rest();
        sink.extend_from_slice(rest);
        self.at += rest.len();
        Ok(rest.len())
    }
}
