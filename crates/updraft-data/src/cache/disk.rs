//! Parts of objects in files of a folder that several processes may share.
//!
//! # Design
//!
//! A file is written beside its place and renamed, so whatever the moment of a kill a name leads to a whole file or to
//! none. It begins with a checksum over name and content, which is compared on every read: a file that a power cut or a
//! failing disk left different, or that lies under another's name, is deleted and counts as not there. Names say what is
//! inside (object, version, part), so processes need not talk to each other: who finds a name takes the file, and who finds
//! it gone fetches again.
//!
//! Who writes a file holds a lock on it. A death lets go of it, whatever the process was called: numbers of processes are
//! given again, and mean nothing between containers that share the folder.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::error::DataError;

const MAGIC: &[u8; 8] = b"updrftc2";
const HEADER_BYTES: usize = 24;

/// Hexadecimal digits of a name.
const NAME_LEN: usize = 48;

/// Makes the names of unfinished files differ, for all caches of the process: several may share a folder.
static UNFINISHED: AtomicU64 = AtomicU64::new(0);

/// The folder.
pub(super) struct Disk {
    dir: PathBuf,
}

/// What the file of a part takes.
pub(super) fn file_bytes(part: &[u8]) -> u64 {
    (HEADER_BYTES + part.len()) as u64
}

/// What a name led to.
pub(super) enum Found {
    /// The part, and what its file takes.
    Part(Bytes, u64),
    Nothing,
    /// A file with other content than was written; it is gone now.
    Corrupt,
}

impl Disk {
    /// Opens the folder, made where it does not exist, and clears away what dead processes left unfinished.
    pub(super) fn open(dir: &Path) -> Result<Disk, DataError> {
        let unfinished = dir.join("unfinished");
        fs::create_dir_all(&unfinished).map_err(DataError::io(&unfinished))?;
        for entry in fs::read_dir(&unfinished).map_err(DataError::io(&unfinished))?.flatten() {
            // Where files cannot be locked nothing is known to be dead, and nothing is cleared away.
            if fs::File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok()) {
                fs::remove_file(entry.path()).ok();
            }
        }
        Ok(Disk { dir: dir.to_owned() })
    }

    /// The names in the folder and what they take; what has none of our names is somebody else's, and left alone.
    pub(super) fn list(&self) -> HashMap<String, u64> {
        let mut found = HashMap::new();
        let folders = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for folder in folders.filter(|f| f.file_name().len() == 2) {
            for entry in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                if let (Ok(name), Ok(facts)) = (entry.file_name().into_string(), entry.metadata())
                    && name.len() == NAME_LEN
                    && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                {
                    found.insert(name, facts.len());
                }
            }
        }
        found
    }

    pub(super) fn read(&self, name: &str, len: usize) -> Found {
        let path = self.path(name);
        let content = match fs::read(&path) {
            Ok(content) => content,
            Err(e) if e.kind() == ErrorKind::NotFound => return Found::Nothing,
            // An unreadable file is as good as a damaged one.
            Err(_) => Vec::new(),
        };
        let whole = content.split_at_checked(HEADER_BYTES).filter(|(header, body)| {
            let checksum = checksum(name, body);
            header[..8] == *MAGIC
                && header[8..16] == checksum
                && header[16..] == (body.len() as u64).to_le_bytes()
                && body.len() == len
        });
        match whole {
            Some(_) => {
                let part = Bytes::from(content).slice(HEADER_BYTES..);
                let file_bytes = file_bytes(&part);
                Found::Part(part, file_bytes)
            }
            None => {
                fs::remove_file(&path).ok();
                Found::Corrupt
            }
        }
    }

    /// Writes a part; answers whether the disk took it: a cache that cannot be written to is slower and no failure.
    pub(super) fn write(&self, name: &str, part: &[u8]) -> bool {
        let number = UNFINISHED.fetch_add(1, Ordering::Relaxed);
        // Of two that have the same name after all, one gives up; nobody writes to what another has begun.
        let unfinished = self.dir.join("unfinished").join(format!("{name}-{}-{number}", std::process::id()));
        let path = self.path(name);
        let Ok(mut file) = fs::File::create_new(&unfinished) else { return false };
        let written: std::io::Result<()> = (|| {
            if matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock)) {
                // Taken for a dead one's, and about to be cleared away.
                return Err(ErrorKind::WouldBlock.into());
            }
            file.write_all(MAGIC)?;
            file.write_all(&checksum(name, part))?;
            file.write_all(&(part.len() as u64).to_le_bytes())?;
            file.write_all(part)?;
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::rename(&unfinished, &path)
        })();
        if written.is_err() {
            fs::remove_file(&unfinished).ok();
        }
        written.is_ok()
    }

    pub(super) fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).ok();
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name.get(..2).unwrap_or("__")).join(name)
    }
}

fn checksum(name: &str, part: &[u8]) -> [u8; 8] {
    xxh3_64_with_seed(part, xxh3_64(name.as_bytes())).to_le_bytes()
}
