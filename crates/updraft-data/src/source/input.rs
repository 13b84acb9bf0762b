//! The bytes of one object, asked for in ranges that are checked before the store sees them.
//!
//! Offsets and lengths inside files are claims. Whatever a reader takes from a file passes through here, so that a claim
//! that points outside is an error naming object and offset, and nothing is reserved that the object cannot fill.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use updraft_store::{ObjectFacts, ReadObjects, StoreError};

use crate::error::{DataError, Refusal};

/// One object, of the version that it was when it was opened: another is an error.
#[derive(Clone)]
pub(crate) struct Input {
    objects: Arc<dyn ReadObjects>,
    facts: ObjectFacts,
}

impl Input {
    /// The object of this key.
    pub(crate) fn open(objects: &Arc<dyn ReadObjects>, key: &str) -> Result<Input, DataError> {
        let facts = ObjectFacts { key: key.to_owned(), ..objects.facts(key)? };
        Ok(Input { objects: objects.clone(), facts })
    }

    /// The tag of this version, where the store gives one.
    pub(crate) fn etag(&self) -> Option<&str> {
        self.facts.etag.as_deref()
    }

    /// Its length.
    pub(crate) fn len(&self) -> u64 {
        self.facts.bytes
    }

    /// How messages name it.
    pub(crate) fn name(&self) -> String {
        self.objects.name(&self.facts.key)
    }

    /// What is wrong with it as a whole.
    pub(crate) fn error(&self, reason: impl Into<String>) -> DataError {
        DataError::file(self.name().as_ref(), reason)
    }

    /// What is wrong at a byte of it.
    pub(crate) fn error_at(&self, offset: u64, reason: impl std::fmt::Display) -> DataError {
        self.error(format!("byte {offset}: {reason}"))
    }

    /// The bytes of a range.
    pub(crate) fn read(&self, range: Range<u64>) -> Result<Bytes, DataError> {
        let mut read = self.read_all(std::slice::from_ref(&range))?;
        read.pop().ok_or_else(|| self.error_at(range.start, "the store gave no bytes"))
    }

    /// The bytes of ranges, in their order.
    pub(crate) fn read_all(&self, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, DataError> {
        for range in ranges {
            if range.start > range.end || range.end > self.len() {
                let reason = format!("bytes to {} are claimed, and it ends after {}", range.end, self.len());
                return Err(self.error_at(range.start, reason));
            }
        }
        let read = self.objects.read(&self.facts.key, ranges, Some(&self.facts))?;
        let short = read.iter().zip(ranges).find(|(bytes, range)| bytes.len() as u64 != range.end - range.start);
        match short {
            Some((bytes, range)) => {
                let reason = format!("{} bytes came of {}", bytes.len(), range.end - range.start);
                Err(self.error_at(range.start, reason))
            }
            None => Ok(read),
        }
    }

    /// All bytes, if memory allows.
    pub(crate) fn whole(&self, memory_bytes: u64) -> Result<Bytes, DataError> {
        if self.len() > memory_bytes {
            return Err(DataError::Memory {
                path: self.name().into(),
                what: "the file".into(),
                needed_bytes: self.len(),
                allowed_bytes: memory_bytes,
                advice: "raise it, or convert to Parquet or MDS, which are read in parts",
            });
        }
        self.read(0..self.len())
    }
}

/// The bytes of an object that is read whole and may be replaced at any time; `None` where there is none.
///
/// # Errors
/// One of more than `bytes_max`.
pub(crate) fn small_object(objects: &dyn ReadObjects, key: &str, bytes_max: u64) -> Result<Option<Bytes>, DataError> {
    const TRIES: u32 = 8;
    let mut tries = 0;
    loop {
        tries += 1;
        let facts = match objects.facts(key) {
            Ok(facts) => facts,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if facts.bytes > bytes_max {
            let reason = format!("is of {} bytes; at most {bytes_max} are read", facts.bytes);
            return Err(DataError::file(objects.name(key).as_ref(), reason));
        }
        match objects.read(key, &[0..facts.bytes], Some(&facts)) {
            // Replaced since it was asked about.
            Err(StoreError::Changed { .. } | StoreError::NotFound { .. }) if tries < TRIES => {}
            read => return Ok(read?.pop()),
        }
    }
}

/// How an object is compressed as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    /// What the end of a key says.
    pub(crate) fn of_key(key: &str) -> Option<Compression> {
        match key.rsplit('.').next().map(str::to_ascii_lowercase).as_deref() {
            Some("gz" | "tgz") => Some(Compression::Gzip),
            Some("zst" | "zstd") => Some(Compression::Zstd),
            _ => None,
        }
    }

    /// The bytes of a whole compressed object.
    ///
    /// # Errors
    /// Where they are not of this compression, are cut off, or take more than `most` bytes. Memory grows with what
    /// arrives, never with what is claimed.
    pub(crate) fn decompress(self, bytes: &[u8], most: u64) -> Result<Bytes, Refusal> {
        let mut out = Vec::new();
        let limit = most.saturating_add(1);
        let read = match self {
            Compression::Gzip => flate2::read::MultiGzDecoder::new(bytes).take(limit).read_to_end(&mut out),
            Compression::Zstd => zstd::stream::read::Decoder::with_buffer(bytes)
                .and_then(|decoder| decoder.take(limit).read_to_end(&mut out)),
        };
        read.map_err(|e| format!("cannot be decompressed after {} bytes: {e}", out.len()))?;
        if out.len() as u64 > most {
            let needed_bytes = self.claimed_bytes(bytes).unwrap_or(0).max(most.saturating_add(1));
            return Err(Refusal::Memory { needed_bytes, allowed_bytes: most });
        }
        Ok(out.into())
    }

    /// What compressed bytes say that they decompress to.
    fn claimed_bytes(self, bytes: &[u8]) -> Option<u64> {
        match self {
            Compression::Gzip => bytes.last_chunk::<4>().map(|size| u32::from_le_bytes(*size).into()),
            Compression::Zstd => zstd::zstd_safe::get_frame_content_size(bytes).ok().flatten(),
        }
    }
}

/// The content of an object that may be compressed as a whole. What is compressed is fetched and decompressed for every
/// read, so its readers make one block of it.
#[derive(Clone)]
pub(crate) struct Content {
    pub(crate) input: Input,
    compression: Option<Compression>,
    memory_bytes: u64,
}

impl Content {
    pub(crate) fn new(input: Input, compression: Option<Compression>, memory_bytes: u64) -> Content {
        Content { input, compression, memory_bytes }
    }

    pub(crate) fn is_compressed(&self) -> bool {
        self.compression.is_some()
    }

    /// The bytes of a range of the content; without an end, to its end.
    pub(crate) fn read(&self, start: u64, end: Option<u64>) -> Result<Bytes, DataError> {
        let Some(compression) = self.compression else {
            return self.input.read(start..end.unwrap_or(self.input.len()));
        };
        let packed = self.input.whole(self.memory_bytes)?;
        let bytes = compression.decompress(&packed, self.memory_bytes).map_err(|refusal| match refusal {
            Refusal::Damaged(reason) => self.input.error(reason),
            Refusal::Memory { needed_bytes, allowed_bytes } => DataError::Memory {
                path: self.input.name().into(),
                what: "its content, decompressed,".into(),
                needed_bytes,
                allowed_bytes,
                advice: "raise it, or store it uncompressed",
            },
        })?;
        let end = end.unwrap_or(bytes.len() as u64);
        if start > end || end > bytes.len() as u64 {
            let reason = format!("bytes to {end} are claimed, and its content ends after {}", bytes.len());
            return Err(self.input.error_at(start, reason));
        }
        Ok(bytes.slice(start as usize..end as usize))
    }

    /// The content from its start, in pieces, for a walk over all of it.
    pub(crate) fn walk(&self) -> Result<Walk<'_>, DataError> {
        let (buffer, end) = match self.compression {
            None => (Bytes::new(), self.input.len()),
            Some(_) => {
                let bytes = self.read(0, None)?;
                let end = bytes.len() as u64;
                (bytes, end)
            }
        };
        Ok(Walk { content: self, buffer, start: 0, at: 0, end })
    }
}

/// Bytes of one request of a walk.
const WALK_BYTES: u64 = 8 << 20;

/// A position in a content, moving forward.
pub(crate) struct Walk<'a> {
    content: &'a Content,
    buffer: Bytes,
    /// Where in the content the buffer starts.
    start: u64,
    at: u64,
    end: u64,
}

impl Walk<'_> {
    /// Bytes before the position.
    pub(crate) fn position(&self) -> u64 {
        self.at
    }

    /// Bytes behind the position.
    pub(crate) fn rest(&self) -> u64 {
        self.end - self.at
    }

    /// The next bytes.
    ///
    /// # Errors
    /// Where fewer are left; `what` they were to be is named.
    pub(crate) fn take(&mut self, count: u64, what: &str) -> Result<Bytes, DataError> {
        if count > self.rest() {
            let reason = format!("{what} takes {count} bytes, and {} are left", self.rest());
            return Err(self.content.input.error_at(self.at, reason));
        }
        let buffered = self.start + self.buffer.len() as u64;
        if self.at + count > buffered {
            let end = (self.at + count.max(WALK_BYTES)).min(self.end);
            self.buffer = self.content.read(self.at, Some(end))?;
            self.start = self.at;
        }
        let from = (self.at - self.start) as usize;
        self.at += count;
        Ok(self.buffer.slice(from..from + count as usize))
    }

    /// Passes over bytes without fetching those that were not fetched.
    pub(crate) fn skip(&mut self, count: u64, what: &str) -> Result<(), DataError> {
        if count > self.rest() {
            let reason = format!("{what} takes {count} bytes, and {} are left", self.rest());
            return Err(self.content.input.error_at(self.at, reason));
        }
        self.at += count;
        if self.at > self.start + self.buffer.len() as u64 {
            (self.buffer, self.start) = (Bytes::new(), self.at);
        }
        Ok(())
    }

    /// What is wrong at the position.
    pub(crate) fn error(&self, reason: impl std::fmt::Display) -> DataError {
        self.error_from(self.at, reason)
    }

    /// What is wrong with what starts at an earlier position.
    pub(crate) fn error_from(&self, start: u64, reason: impl std::fmt::Display) -> DataError {
        self.content.input.error_at(start, reason)
    }
}
