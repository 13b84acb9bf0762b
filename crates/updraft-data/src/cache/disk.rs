//! Parts of objects in files of a folder that several processes may share.
//!
//! # Design
//!
//! A file is written beside its place and renamed, so whatever the moment of a kill a name leads to a whole file or to
//! none. It begins with the checksum of the rest, which is compared on every read: a file that a power cut or a failing
//! disk left different is deleted and counts as not there. Names say what is inside (object, version, part), so processes
//! need not talk to each other: who finds a name takes the file, and who finds it gone fetches again.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::DataError;

const MAGIC: &[u8; 8] = b"updrftc1";
const HEADER_BYTES: usize = 24;

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
            let name = entry.file_name();
            let process = name.to_str().and_then(|n| n.split('-').next()).and_then(|p| p.parse::<u32>().ok());
            // Where processes have no folder (not on Linux) nothing is known to be dead, and nothing is cleared away.
            let is_dead =
                |process: u32| Path::new("/proc/self").exists() && !Path::new(&format!("/proc/{process}")).exists();
            if process.is_none_or(is_dead) {
                fs::remove_file(entry.path()).ok();
            }
        }
        Ok(Disk { dir: dir.to_owned() })
    }

    /// The names in the folder and what they take.
    pub(super) fn list(&self) -> HashMap<String, u64> {
        let mut found = HashMap::new();
        let folders = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for folder in folders.filter(|f| f.file_name().len() == 2) {
            for entry in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                if let (Ok(name), Ok(facts)) = (entry.file_name().into_string(), entry.metadata()) {
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
            let checksum = xxh3_64(body).to_le_bytes();
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
        let unfinished = self.dir.join("unfinished").join(format!("{}-{number}", std::process::id()));
        let path = self.path(name);
        let written: std::io::Result<()> = (|| {
            let mut file = fs::File::create(&unfinished)?;
            file.write_all(MAGIC)?;
            file.write_all(&xxh3_64(part).to_le_bytes())?;
            file.write_all(&(part.len() as u64).to_le_bytes())?;
            file.write_all(part)?;
            drop(file);
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
