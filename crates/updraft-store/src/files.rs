//! Files of a local folder, read where they lie: one system call for a range, and no runtime in between.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::{AccessError, ObjectFacts, ReadObjects, StoreError};

/// Files that are kept open, at most.
const OPEN_MAX: usize = 128;

/// A folder's files as objects that can be read. A file that is replaced while it is read stays what it was, or is an
/// error once it was closed; one that is changed in place is an error.
#[derive(Debug)]
pub struct LocalFiles {
    folder: PathBuf,
    open: Mutex<HashMap<String, Arc<Opened>>>,
}

#[derive(Debug)]
struct Opened {
    file: File,
    etag: String,
}

impl LocalFiles {
    /// The files below a folder.
    pub fn new(folder: &Path) -> LocalFiles {
        LocalFiles { folder: folder.to_owned(), open: Mutex::new(HashMap::new()) }
    }

    /// The file, open; of this tag where there is one.
    fn opened(&self, key: &str, expected: Option<&str>) -> Result<Arc<Opened>, StoreError> {
        let is_wanted = |opened: &Opened| expected.is_none_or(|etag| opened.etag == etag);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = open.get(key).filter(|opened| is_wanted(opened)) {
            return Ok(opened.clone());
        }
        let failed = |e: std::io::Error| self.error(key, e);
        let file = File::open(self.folder.join(key)).map_err(failed)?;
        let etag = etag(&file.metadata().map_err(failed)?);
        let opened = Arc::new(Opened { file, etag });
        if !is_wanted(&opened) {
            let (expected, found) = (expected.map(str::to_owned), Some(opened.etag.clone()));
            return Err(StoreError::Changed { object: self.name(key), expected, found });
        }
        if open.len() >= OPEN_MAX {
            // Opening again costs microseconds; which goes matters little.
            let first = open.keys().next().cloned();
            first.and_then(|key| open.remove(&key));
        }
        open.insert(key.to_owned(), opened.clone());
        Ok(opened)
    }

    fn error(&self, key: &str, e: std::io::Error) -> StoreError {
        let object = self.name(key);
        match e.kind() {
            std::io::ErrorKind::NotFound => StoreError::NotFound { what: object },
            _ => {
                let source = AccessError { reason: e.to_string(), hint: None, attempts: 1, elapsed_ms: 0 };
                StoreError::Read { object, source: source.into() }
            }
        }
    }
}

/// Changes whenever the content does, as far as the file system tells.
fn etag(metadata: &std::fs::Metadata) -> String {
    format!("{:x}-{:x}-{:x}-{:x}", metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len())
}

impl ReadObjects for LocalFiles {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let failed = |e: std::io::Error| self.error(key, e);
        let metadata = std::fs::metadata(self.folder.join(key)).map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(std::io::Error::other("is a folder; a file was expected")));
        }
        Ok(ObjectFacts {
            key: key.to_owned(),
            bytes: metadata.len(),
            etag: Some(etag(&metadata)),
            version: None,
            modified_ms: u64::try_from(metadata.mtime()).unwrap_or(0) * 1000,
        })
    }

    fn read(&self, key: &str, ranges: &[Range<u64>], expected: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        let failed = |e: std::io::Error| self.error(key, e);
        let opened = self.opened(key, expected.and_then(|facts| facts.etag.as_deref()))?;
        let mut parts = Vec::with_capacity(ranges.len());
        for range in ranges {
            let length = usize::try_from(range.end.saturating_sub(range.start)).map_err(std::io::Error::other);
            let mut bytes = Vec::new();
            let length = length.map_err(failed)?;
            bytes.try_reserve_exact(length).map_err(|e| failed(std::io::Error::other(e)))?;
            bytes.resize(length, 0);
            opened.file.read_exact_at(&mut bytes, range.start).map_err(failed)?;
            parts.push(Bytes::from(bytes));
        }
        let now = etag(&opened.file.metadata().map_err(failed)?);
        if now != opened.etag {
            self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
            let expected = Some(opened.etag.clone());
            return Err(StoreError::Changed { object: self.name(key), expected, found: Some(now) });
        }
        Ok(parts)
    }

    fn name(&self, key: &str) -> String {
        self.folder.join(key).display().to_string()
    }
}
