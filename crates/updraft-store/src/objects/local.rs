//! What a local folder needs beyond the crate's local store: ranges of one open file, and an update that replaces exactly
//! the version it read.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;

/// Beside the objects, and no object: the crate's listings leave out names that end in `#` and digits, which its own files
/// under way have.
const LOCK_NAME: &str = ".update#0";

/// The ranges of an open file. It stays the version it is, whatever is renamed over it meanwhile.
pub(super) fn read_ranges(mut file: File, ranges: &[Range<u64>]) -> std::io::Result<Vec<Bytes>> {
    ranges
        .iter()
        .map(|range| {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.seek(SeekFrom::Start(range.start))?;
            file.read_exact(&mut bytes)?;
            Ok(bytes.into())
        })
        .collect()
}

/// Held while one process looks at a version and replaces it.
pub(super) struct UpdateLock {
    _file: File,
}

impl UpdateLock {
    /// Waits until no other update of the folder is under way.
    pub(super) fn take(folder: &Path) -> std::io::Result<UpdateLock> {
        let file = File::options().create(true).truncate(false).write(true).open(folder.join(LOCK_NAME))?;
        // Released when the file is closed, so also by a death.
        file.lock()?;
        Ok(UpdateLock { _file: file })
    }

    /// Replaces a file as a whole, durably. Its time moves forward by at least a microsecond: the version of a local file
    /// is made of its inode, time and length, and a file system may give a freed inode again within one tick of its clock.
    pub(super) fn replace(&self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
        let before = std::fs::metadata(path)?.modified()?;
        let staged = staged(path);
        let written = (|| {
            let mut file = File::create(&staged)?;
            file.write_all(bytes)?;
            let after = file.metadata()?.modified()?.max(before + Duration::from_micros(1));
            file.set_modified(after)?;
            file.sync_all()?;
            std::fs::rename(&staged, path)
        })();
        if written.is_err() {
            // The first error is the one to report.
            let _ = std::fs::remove_file(&staged);
        }
        written?;
        #[cfg(unix)]
        if let Some(folder) = path.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }
}

/// A name beside the file that no listing shows and, under the lock, nobody else uses.
fn staged(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("#0");
    PathBuf::from(name)
}
