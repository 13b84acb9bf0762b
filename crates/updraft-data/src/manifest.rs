//! The manifest: which shards a dataset is made of, in one form for all formats, versioned by digest.
//!
//! A manifest is an object `manifests/<digest>.json` that is never changed; `LATEST` names the newest. Appending writes
//! a segment: only the new shards, and the digest of the version they follow. So versions share what they have in
//! common, older ones stay readable, and two writers who append at once both succeed: the one who comes second puts its
//! segment behind the other's.

use serde::{Deserialize, Serialize};
use updraft_base::Digest;

use crate::schema::Schema;
use crate::source::shard::{Block, ShardFormat};

/// The version of the JSON form. Another is refused, not guessed at.
pub const MANIFEST_FORMAT: u64 = 1;

/// A version of a dataset, or the segment that a version adds to another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u64,
    /// The version before.
    pub parent: Option<Digest>,
    /// Whether the parent's shards come first; otherwise they are replaced, or listed here again.
    pub appends: bool,
    /// The columns of every shard.
    pub schema: Schema,
    /// The shards, in the order of their rows.
    pub shards: Vec<ShardFacts>,
}

/// What is known about one shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardFacts {
    /// Its name below the folder of the dataset.
    pub key: String,
    /// Its format.
    pub format: ShardFormat,
    /// Its size.
    pub bytes: u64,
    /// Its rows.
    pub samples: u64,
    /// Its blocks, where the format has no index of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<Block>,
    /// The tag that the store gave this very object when it was listed. It is not kept: copies of a dataset have others.
    #[serde(skip)]
    pub etag: Option<String>,
    /// XXH3 (64 bits) of its bytes, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xxh3: Option<String>,
    /// SHA-256 of its bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// Statistics of its columns, by name.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub columns: serde_json::Map<String, serde_json::Value>,
}
