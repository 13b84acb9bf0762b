//! What can go wrong with a store.

use std::ops::Range;

use updraft_base::Digest;

use crate::objects::AccessError;

/// An error of a [`Store`](crate::Store); the cause, where there is one, is its source.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be used at all.
    #[error("cannot open the store at {dir}")]
    Open {
        /// The folder or service.
        dir: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store does not hold this.
    #[error("the store has no {what}")]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// A key that no object can have.
    #[error("`{key}` cannot be an object of {url}: {reason}")]
    Key {
        /// The key.
        key: String,
        /// The store.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An object was replaced while it was being read, or since its facts were taken.
    #[error("{object} has changed: it was version {}, and is {}", shown(.expected), shown(.found))]
    Changed {
        /// The object's URL.
        object: String,
        /// The version that was first seen.
        expected: Option<String>,
        /// The version that is there.
        found: Option<String>,
    },
    /// The answer to a conditional write was lost, and by now somebody else has written: ours was replaced, or never was.
    /// Only what the object says of its own past can tell, so read it and look for what you wrote.
    #[error("whether {object} was updated cannot be known: the answer was lost, and it has been replaced since")]
    Undetermined {
        /// The object's URL.
        object: String,
    },
    /// An object that cannot be moved to another storage tier from here.
    #[error("{object} cannot be moved to another tier: {reason}")]
    Tier {
        /// The object's URL.
        object: String,
        /// Why not.
        reason: String,
    },
    /// A range that an object does not have.
    #[error("{object} has {bytes} bytes, and not the range {range:?}")]
    Range {
        /// The object's URL.
        object: String,
        /// The range of bytes asked for.
        range: Range<u64>,
        /// The length of the object.
        bytes: u64,
    },
    /// A URL that names no store.
    #[error("`{url}` names no store: {reason}")]
    Url {
        /// The URL.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A setting that the provider does not have.
    #[error("{url} has no setting `{setting}`{}", match .nearest { Some(known) => format!("; did you mean `{known}`?"), None => String::new() })]
    Setting {
        /// The store.
        url: String,
        /// The name of the setting.
        setting: String,
        /// The known setting with the nearest name.
        nearest: Option<String>,
    },
    /// Content that is not what its name says.
    #[error("{object} is corrupt: its {size_bytes} bytes have the digest {found}, not {expected}")]
    Corrupt {
        /// The object in the store.
        object: String,
        /// The digest it is named by.
        expected: Digest,
        /// The digest of the bytes.
        found: Digest,
        /// How many bytes there are.
        size_bytes: u64,
    },
    /// A manifest or pointer that cannot be understood.
    #[error("{object} is damaged: {reason}")]
    Malformed {
        /// The object in the store.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// A manifest or pointer of another version.
    #[error("{object} has format {found}; this version reads format {known}")]
    Format {
        /// The object in the store.
        object: String,
        /// Its version.
        found: u64,
        /// The version that is read.
        known: u64,
    },
    /// Something among the manifests that no store has written.
    #[error("{object} does not belong in a store")]
    Stray {
        /// The object in the store.
        object: String,
    },
    /// A name that could not be part of a path.
    #[error("`{name}` is not a {what}: use letters, digits, `.`, `_` and `-`")]
    Name {
        /// What was to be named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// An artifact was to be kept whose parent is unknown.
    #[error("cannot keep an artifact of kind `{kind}`: its parent {parent} is not in the store")]
    MissingParent {
        /// The kind of the artifact.
        kind: String,
        /// The digest of the parent.
        parent: Digest,
    },
    /// Writing failed; nothing is half-written.
    #[error("cannot write {object}")]
    Write {
        /// The object in the store.
        object: String,
        /// The cause.
        source: Box<AccessError>,
    },
    /// Reading failed.
    #[error("cannot read {object}")]
    Read {
        /// The object in the store.
        object: String,
        /// The cause.
        source: Box<AccessError>,
    },
}

fn shown(version: &Option<String>) -> &str {
    version.as_deref().unwrap_or("unknown")
}

impl StoreError {
    /// Whether what was asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, StoreError::NotFound { .. })
    }
}
