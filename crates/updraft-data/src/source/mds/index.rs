//! `index.json`, which lists the shards of an MDS folder.

use serde::Deserialize;
use std::collections::BTreeMap;

use crate::source::mds::{Description, Known};

/// One shard of the index.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Its key below the folder of the index, as it is stored: compressed where the index says so.
    pub key: String,
    /// Its size as it is stored.
    pub bytes: u64,
    /// The key of the shard without compression, which a folder may hold instead.
    pub raw_key: String,
    /// Hashes of the object as it is stored, by the name of the algorithm.
    pub hashes: BTreeMap<String, String>,
    pub known: Known,
}

#[derive(Deserialize)]
struct Index {
    version: u64,
    shards: Vec<Shard>,
}

#[derive(Deserialize)]
struct Shard {
    #[serde(flatten)]
    description: Description,
    samples: u64,
    raw_data: File,
    zip_data: Option<File>,
    compression: Option<String>,
}

#[derive(Deserialize)]
struct File {
    basename: String,
    bytes: u64,
    #[serde(default)]
    hashes: BTreeMap<String, String>,
}

/// The shards that an index lists.
pub(crate) fn parse(text: &[u8]) -> Result<Vec<Entry>, String> {
    let Index { version, shards } = serde_json::from_slice(text).map_err(|e| format!("is no index of MDS: {e}"))?;
    if version != 2 {
        return Err(format!("is an index of version {version}; 2 is read"));
    }
    let mut entries = Vec::with_capacity(shards.len());
    for (at, shard) in shards.into_iter().enumerate() {
        let wrong = |reason: String| format!("shard {at}: {reason}");
        let (raw_key, raw_bytes) = (shard.raw_data.basename.clone(), shard.raw_data.bytes);
        let stored = match (shard.zip_data, shard.compression.as_deref()) {
            (None, _) => shard.raw_data,
            (Some(zip), Some(name)) if matches!(name.split(':').next(), Some("zstd" | "gz")) => zip,
            (Some(_), name) => {
                let name = name.unwrap_or("of no name");
                return Err(wrong(format!("the compression {name} is not read; zstd and gz are")));
            }
        };
        for key in [&stored.basename, &raw_key] {
            let inside = |part: &str| !part.is_empty() && part != "." && part != "..";
            if !key.split('/').all(inside) {
                return Err(wrong(format!("`{key:.200}` leads out of the folder of the index")));
            }
        }
        let known = Known { description: shard.description, samples: shard.samples, raw_bytes };
        entries.push(Entry { key: stored.basename, bytes: stored.bytes, raw_key, hashes: stored.hashes, known });
    }
    Ok(entries)
}
