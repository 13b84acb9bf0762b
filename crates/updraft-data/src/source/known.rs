//! Digests of local files that are still what they were when they were hashed.
//!
//! What a dataset is, is what it holds, so opening files that no manifest describes means reading all of them: minutes for
//! what is large. What the file system says of a file (device, inode, length, and the times at which content and inode
//! changed) changes with its content, except within a tick of its clock. So the digests of files are kept by what it said
//! before they were read, where their last change was long enough ago for the next to show.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use updraft_base::{Clock, Digest, Hasher};

use crate::error::DataError;

/// Part of every key: another number where the same files have other digests.
const VERSION: &[u8] = b"1";

/// A change after this time shows: file systems count in seconds at worst, and their clocks are a little behind.
const TICK_MS: i64 = 2_000;

/// A folder that may be deleted at any time: then files are hashed again.
pub struct KnownDigests {
    folder: PathBuf,
    clock: Arc<dyn Clock>,
}

/// What the file system says of some files.
struct Stamp {
    key: Digest,
    changed_unix_ms: i64,
}

impl KnownDigests {
    /// Digests in a folder, which is made with the first.
    pub fn new(folder: &Path, clock: Arc<dyn Clock>) -> KnownDigests {
        KnownDigests { folder: folder.to_owned(), clock }
    }

    /// The `count` digests that `make` gives, or gave for the same files under the same name for what is made.
    pub(crate) fn of(
        &self,
        what: &str,
        files: &[PathBuf],
        count: usize,
        make: impl FnOnce() -> Result<Vec<Digest>, DataError>,
    ) -> Result<Vec<Digest>, DataError> {
        let now_unix_ms = i64::try_from(self.clock.now_unix_ms()).unwrap_or(i64::MAX);
        // What cannot be asked about is an error of whoever reads it.
        let Some(stamp) = stamp(what, files) else { return make() };
        let hex = stamp.key.hex();
        let path = self.folder.join(&hex[..2]).join(&hex);
        if let Some(known) = read(&path).filter(|known| known.len() == count) {
            return Ok(known);
        }
        let digests = make()?;
        if stamp.changed_unix_ms.saturating_add(TICK_MS) < now_unix_ms {
            // Where nothing can be written, all is as it would be without.
            write(&path, &digests).ok();
        }
        Ok(digests)
    }
}

fn stamp(what: &str, files: &[PathBuf]) -> Option<Stamp> {
    let mut hasher = Hasher::new();
    hasher.field(VERSION);
    hasher.field(what.as_bytes());
    let mut changed_unix_ms = 0;
    for file in files {
        let facts = fs::metadata(file).ok()?;
        hasher.field(std::path::absolute(file).ok()?.as_os_str().as_encoded_bytes());
        for number in [facts.dev(), facts.ino(), facts.len()] {
            hasher.update(&number.to_le_bytes());
        }
        for number in [facts.mtime(), facts.mtime_nsec(), facts.ctime(), facts.ctime_nsec()] {
            hasher.update(&number.to_le_bytes());
        }
        changed_unix_ms = changed_unix_ms.max(facts.mtime().max(facts.ctime()).saturating_mul(1000));
    }
    Some(Stamp { key: hasher.finish(), changed_unix_ms })
}

/// The digests in a file, which ends with a line that covers them.
fn read(path: &Path) -> Option<Vec<Digest>> {
    let text = fs::read_to_string(path).ok()?;
    let (digests, seal) = text.trim_end().rsplit_once('\n')?;
    (Digest::of(digests.as_bytes()).to_string() == seal).then_some(())?;
    digests.lines().map(|line| line.parse().ok()).collect()
}

fn write(path: &Path, digests: &[Digest]) -> std::io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let lines = digests.iter().map(Digest::to_string).collect::<Vec<_>>().join("\n");
    // Two processes write the same; which of them is last does not matter.
    let unfinished = path.with_extension(std::process::id().to_string());
    fs::write(&unfinished, format!("{lines}\n{}\n", Digest::of(lines.as_bytes())))?;
    fs::rename(&unfinished, path)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use updraft_base::FakeClock;

    use super::*;

    #[test]
    fn files_are_hashed_again_exactly_where_they_may_have_changed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, "one").unwrap();
        let files = [file.clone()];
        let later_ms = 60_000 + fs::metadata(&file).unwrap().ctime() as u64 * 1000;
        let at = |unix_ms| KnownDigests::new(&dir.path().join("known"), Arc::new(FakeClock::at_unix_ms(unix_ms)));
        let made = |known: &KnownDigests, what: &str| {
            let mut is_made = false;
            let digests = known.of(what, &files, 1, || {
                is_made = true;
                Ok(vec![Digest::of(&fs::read(&file).unwrap())])
            });
            (digests.unwrap()[0] == Digest::of(&fs::read(&file).unwrap()), is_made)
        };
        // Just written: the next change might not show.
        assert_eq!(made(&at(later_ms - 60_000), "shards"), (true, true));
        assert_eq!(made(&at(later_ms), "shards"), (true, true));
        assert_eq!(made(&at(later_ms), "shards"), (true, false));
        assert_eq!(made(&at(later_ms), "pictures"), (true, true));
        // As long, and with the old time of change.
        fs::write(&file, "two").unwrap();
        let old = UNIX_EPOCH + Duration::from_secs(1);
        fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
        assert_eq!(made(&at(later_ms), "shards"), (true, true));
        // What was kept is not what was written.
        for entry in fs::read_dir(dir.path().join("known")).unwrap() {
            for kept in fs::read_dir(entry.unwrap().path()).unwrap() {
                let kept = kept.unwrap().path();
                fs::write(&kept, fs::read_to_string(&kept).unwrap().replace('a', "b")).unwrap();
            }
        }
        assert_eq!(made(&at(later_ms), "shards"), (true, true));
    }
}
