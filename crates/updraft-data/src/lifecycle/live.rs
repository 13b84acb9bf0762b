//! What datasets still need of the objects below a URL: those of the dataset there, and those of others in folders below,
//! which a plan for the whole must not take for left behind.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use serde_json::Value;
use updraft_store::{ObjectFacts, ReadObjects, StoreError};

use super::Usage;
use crate::error::DataError;
use crate::manifest::{LATEST, Version};

/// What lists the shards of a folder that MosaicML Streaming wrote, and those of ours that it can read.
const INDEX: &str = "index.json";

/// Bytes of an index, at most: a million shards.
const INDEX_BYTES_MAX: u64 = 1 << 30;

/// Fills in which objects live versions name, `versions` of them from the newest back: of each folder among `listed` that
/// has a manifest, or an `index.json` of shards.
///
/// # Errors
/// A manifest that cannot be read: nobody could say what it needs.
pub fn live_objects(
    objects: &dyn ReadObjects,
    listed: &[ObjectFacts],
    versions: u32,
    usage: &mut Usage,
) -> Result<(), DataError> {
    for object in listed {
        let (folder, name) = object.key.rsplit_once('/').unwrap_or(("", &object.key));
        let at = Folder { objects, folder };
        let keys = match name {
            LATEST => named_by_manifest(&at, listed, versions)?,
            INDEX => named_by_index(&at, object.bytes)?,
            _ => continue,
        };
        let keys = keys.into_iter().map(|key| at.key(&key));
        if folder.is_empty() && name == LATEST {
            usage.referenced.get_or_insert_default().extend(keys);
        } else {
            usage.below.extend(keys.map(|key| (key, folder.to_owned())));
        }
    }
    if let Some(own) = &mut usage.referenced {
        // The index beside a manifest is one of its own.
        own.extend(usage.below.extract_if(.., |_, folder| folder.is_empty()).map(|(key, _)| key));
    }
    Ok(())
}

/// The keys that live versions name, all manifests and what leads to them.
fn named_by_manifest(at: &Folder<'_>, listed: &[ObjectFacts], versions: u32) -> Result<BTreeSet<String>, DataError> {
    let Some(mut version) = Version::load(at, None)? else { return Ok(BTreeSet::new()) };
    // Manifests are small, and any of them may be a segment of a live one.
    let manifests = at.key("manifests/");
    let below = manifests.len() - "manifests/".len();
    let manifests = listed.iter().filter(|object| object.key.starts_with(&manifests));
    let mut keys: BTreeSet<String> = manifests.map(|object| object.key[below..].to_owned()).collect();
    keys.extend([LATEST.to_owned(), INDEX.to_owned()]);
    for left in (0..versions.max(1)).rev() {
        keys.extend(version.manifest.shards.iter().map(|shard| shard.key.clone()));
        let Some(parent) = version.manifest.parent.filter(|_| left > 0) else { break };
        let Some(before) = Version::load(at, Some(&parent))? else { break };
        version = before;
    }
    Ok(keys)
}

/// The files of an index's shards, of whatever format and compression, and the index; nothing where it is another program's
/// file of that name.
fn named_by_index(at: &Folder<'_>, bytes: u64) -> Result<BTreeSet<String>, DataError> {
    match bytes {
        0 => return Ok(BTreeSet::new()),
        bytes if bytes > INDEX_BYTES_MAX => {
            return Err(DataError::file(at.name(INDEX).as_ref(), format!("is of {bytes} bytes")));
        }
        _ => {}
    }
    let text = at.read(INDEX, &[0..bytes], None)?.pop().unwrap_or_default();
    let index: Value = serde_json::from_slice(&text).unwrap_or_default();
    let mut keys = BTreeSet::new();
    for shard in index["shards"].as_array().into_iter().flatten() {
        let files = shard.as_object().into_iter().flat_map(|fields| fields.values());
        keys.extend(files.filter_map(|file| file["basename"].as_str()).map(str::to_owned));
    }
    if !keys.is_empty() {
        keys.insert(INDEX.to_owned());
    }
    Ok(keys)
}

/// The objects of a folder.
struct Folder<'a> {
    objects: &'a dyn ReadObjects,
    folder: &'a str,
}

impl Folder<'_> {
    fn key(&self, key: &str) -> String {
        if self.folder.is_empty() { key.to_owned() } else { format!("{}/{key}", self.folder) }
    }
}

impl ReadObjects for Folder<'_> {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        self.objects.facts(&self.key(key))
    }

    fn read(&self, key: &str, ranges: &[Range<u64>], expected: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        self.objects.read(&self.key(key), ranges, expected)
    }

    fn name(&self, key: &str) -> String {
        self.objects.name(&self.key(key))
    }
}
