//! A folder with a folder of pictures for each class.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use updraft_base::{Digest, Hasher};
use updraft_graph::Tensor;
use updraft_store::ReadObjects;

use crate::error::DataError;
use crate::source::place::Place;
use crate::source::{Access, Cells, Opened, Source, Wanted};

/// What the picture decoder reads.
const EXTENSIONS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// Whether the name of a file says that it is a picture.
pub(super) fn is_picture(file: &Path) -> bool {
    let extension = file.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    EXTENSIONS.contains(&extension.as_str())
}

struct Folder {
    /// Each file and the number of its class.
    files: Vec<(PathBuf, i64)>,
    memory_bytes: u64,
    rows: [u64; 1],
    /// For each column, whether it is the label.
    is_label: Vec<bool>,
}

pub(super) fn open(path: &Path, wanted: &Wanted, memory_bytes: u64, access: &Access) -> Result<Opened, DataError> {
    let (columns, places) = wanted.among(&["image".to_owned(), "label".to_owned()])?;
    let mut files = Vec::new();
    let mut classes = Vec::new();
    for class_path in visible_entries(path)? {
        if !class_path.is_dir() {
            return Err(DataError::file(&class_path, "lies beside the folders of the classes"));
        }
        for file in visible_entries(&class_path)? {
            if !is_picture(&file) {
                return Err(DataError::file(&file, format!("is not one of {}", EXTENSIONS.join(", "))));
            }
            files.push((file, classes.len() as i64));
        }
        classes.push(file_name(&class_path)?);
    }
    if files.is_empty() {
        return Err(DataError::Empty { path: path.to_owned(), reason: String::new() });
    }
    let paths: Vec<PathBuf> = files.iter().map(|(file, _)| file.clone()).collect();
    let digests =
        access.digests_of("pictures in folders", &paths, 1, || Ok(vec![digest_of(&files, &classes, memory_bytes)?]))?;
    let rows = [files.len() as u64];
    let source = Folder { files, memory_bytes, rows, is_label: places.iter().map(|p| *p == 1).collect() };
    Ok(Opened { source: Box::new(source), columns, digest: digests[0], vocabulary: None, classes: Some(classes) })
}

/// Over classes, names and content of all files.
fn digest_of(files: &[(PathBuf, i64)], classes: &[String], memory_bytes: u64) -> Result<Digest, DataError> {
    let mut hasher = Hasher::new();
    for (file, class) in files {
        hasher.field(classes[*class as usize].as_bytes());
        hasher.field(file_name(file)?.as_bytes());
        hasher.field(&read_picture(file, memory_bytes)?);
    }
    Ok(hasher.finish())
}

fn read_picture(file: &Path, memory_bytes: u64) -> Result<Vec<u8>, DataError> {
    check_bytes(file, fs::metadata(file).map_err(DataError::io(file))?.len(), memory_bytes)?;
    fs::read(file).map_err(DataError::io(file))
}

/// Refuses a picture that memory cannot hold, before it is read.
fn check_bytes(file: &Path, needed_bytes: u64, memory_bytes: u64) -> Result<(), DataError> {
    if needed_bytes <= memory_bytes {
        return Ok(());
    }
    Err(DataError::Memory {
        path: file.to_owned(),
        what: "the picture".into(),
        needed_bytes,
        allowed_bytes: memory_bytes,
        advice: "raise it, or move the file out of the folder",
    })
}

/// Opens a folder of any store, whose classes and files are its keys.
pub(super) fn open_listed(
    place: &Place,
    wanted: &Wanted,
    memory_bytes: u64,
    access: &Access,
) -> Result<Opened, DataError> {
    let (columns, places) = wanted.among(&["image".to_owned(), "label".to_owned()])?;
    let objects = place.objects(access)?;
    let mut classes: Vec<String> = Vec::new();
    let mut keys = Vec::new();
    let mut hasher = Hasher::new();
    for facts in place.list()? {
        let name = objects.name(&facts.key);
        let Some((class, file)) = facts.key.split_once('/').filter(|(_, file)| !file.contains('/')) else {
            return Err(DataError::file(name.as_ref(), "lies beside the folders of the classes"));
        };
        if !is_picture(file.as_ref()) {
            return Err(DataError::file(name.as_ref(), format!("is not one of {}", EXTENSIONS.join(", "))));
        }
        check_bytes(name.as_ref(), facts.bytes, memory_bytes)?;
        if classes.last().is_none_or(|last| last != class) {
            classes.push(class.to_owned());
        }
        // Reading all pictures to hash them would be reading the dataset; the store's tag stands for the content.
        hasher.field(facts.key.as_bytes());
        hasher.field(facts.etag.unwrap_or_default().as_bytes());
        hasher.field(&facts.bytes.to_le_bytes());
        keys.push((facts.key, facts.bytes, classes.len() as i64 - 1));
    }
    if keys.is_empty() {
        return Err(DataError::Empty { path: place.name.clone(), reason: String::new() });
    }
    let rows = [keys.len() as u64];
    let source = Listed { objects, keys, rows, is_label: places.iter().map(|p| *p == 1).collect() };
    let digest = hasher.finish();
    Ok(Opened { source: Box::new(source), columns, digest, vocabulary: None, classes: Some(classes) })
}

/// Pictures of a store: each key, its length and the number of its class.
struct Listed {
    objects: Arc<dyn ReadObjects>,
    keys: Vec<(String, u64, i64)>,
    rows: [u64; 1],
    is_label: Vec<bool>,
}

impl Source for Listed {
    fn block_rows(&self) -> &[u64] {
        &self.rows
    }

    fn resident_bytes(&self, _: u64) -> u64 {
        0
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let keys = || rows.iter().map(|row| &self.keys[*row as usize]);
        let read = |(key, bytes, _): &(String, u64, i64)| -> Result<Bytes, DataError> {
            Ok(self.objects.read(key, std::slice::from_ref(&(0..*bytes)), None)?.pop().unwrap_or_default())
        };
        let cells = |column: &usize| {
            if self.is_label[*column] {
                return Ok(Cells::Numbers(Tensor::vector(&keys().map(|(.., label)| *label).collect::<Vec<i64>>())));
            }
            Ok(Cells::Bytes(keys().map(read).collect::<Result<_, _>>()?))
        };
        columns.iter().map(cells).collect()
    }

    fn row_name(&self, row: u64) -> String {
        self.objects.name(&self.keys[row as usize].0)
    }
}

/// The entries of a folder in alphabetical order, less those whose name starts with a dot.
pub(super) fn visible_entries(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).map_err(DataError::io(dir))? {
        let entry = entry.map_err(DataError::io(dir))?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            entries.push(entry.path());
        }
    }
    entries.sort_unstable();
    Ok(entries)
}

fn file_name(path: &Path) -> Result<String, DataError> {
    let name = path.file_name().and_then(|n| n.to_str());
    Ok(name.ok_or_else(|| DataError::file(path, "has a name that is not UTF-8"))?.to_owned())
}

impl Source for Folder {
    fn block_rows(&self) -> &[u64] {
        &self.rows
    }

    fn resident_bytes(&self, _: u64) -> u64 {
        0
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let files = || rows.iter().map(|row| &self.files[*row as usize]);
        let read = |path: &PathBuf| read_picture(path, self.memory_bytes).map(Bytes::from);
        let cells = |column: &usize| {
            if self.is_label[*column] {
                let labels: Vec<i64> = files().map(|(_, label)| *label).collect();
                return Ok(Cells::Numbers(Tensor::vector(&labels)));
            }
            Ok(Cells::Bytes(files().map(|(path, _)| read(path)).collect::<Result<_, _>>()?))
        };
        columns.iter().map(cells).collect()
    }

    fn row_name(&self, row: u64) -> String {
        self.files[row as usize].0.display().to_string()
    }
}
