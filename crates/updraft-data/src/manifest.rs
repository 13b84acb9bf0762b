//! The manifest: which shards a dataset is made of, in one form for all formats, versioned by digest.
//!
//! A manifest is an object `manifests/<digest>.json` that is never changed; `LATEST` names the newest. Appending writes
//! a segment: only the new shards, and the digest of the version they follow. So versions share what they have in
//! common, older ones stay readable, and two writers who append at once both succeed: the one who comes second puts its
//! segment behind the other's.
//!
//! ```
//! use updraft_data::{Column, Kind, Manifest, Schema, ShardFacts, ShardFormat};
//! use updraft_store::{AccessOptions, Objects};
//!
//! let objects = Objects::open("memory:", &Default::default(), &AccessOptions::default())?;
//! let schema = Schema::new(vec![Column { name: "text".into(), kind: Kind::Text }])?;
//! let first = Manifest::new(schema.clone(), vec![ShardFacts::new("a.mds", ShardFormat::Mds, 100, 3)]);
//! let first = first.commit(&objects)?;
//! let more = Manifest::after(first, schema, vec![ShardFacts::new("b.mds", ShardFormat::Mds, 90, 2)]);
//! let second = more.commit(&objects)?;
//! let version = Manifest::load(&objects, None)?.expect("something was committed");
//! assert_eq!((version.digest, version.manifest.samples()), (second, 5));
//! assert_eq!(Manifest::load(&objects, Some(&first))?.map(|v| v.manifest.samples()), Some(3));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use updraft_base::Digest;
use updraft_store::{Created, Objects, ReadObjects, StoreError};

use crate::error::DataError;
use crate::schema::Schema;
use crate::source::input::small_object;
use crate::source::shard::{Block, ShardFormat};

/// The version of the JSON form. Another is refused, not guessed at.
pub const MANIFEST_FORMAT: u64 = 1;

/// The object that names the newest version.
pub const LATEST: &str = "LATEST";

/// Segments that are followed before a manifest lists all shards again, which bounds what opening reads.
const SEGMENTS_MAX: usize = 32;

/// How often a commit is tried again when others commit meanwhile.
const RACES_MAX: usize = 100;

/// Bytes of a manifest, at most: ten million shards.
const BYTES_MAX: u64 = 4 << 30;

/// A version of a dataset, or the segment that a version adds to another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u64,
    /// The version before.
    pub parent: Option<Digest>,
    /// Whether the parent's shards come first; otherwise all shards are listed here.
    pub appends: bool,
    /// The columns of every shard.
    pub schema: Schema,
    /// The shards, in the order of their rows.
    pub shards: Vec<ShardFacts>,
    /// How far streams have come into the dataset, by the name under which each is followed. A place and the shard that
    /// reaches it are one commit, so no entry is lost or doubled.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub streams: BTreeMap<String, StreamPlace>,
    /// What the shards were made of, each by the digest or tag of its content: ingesting it once more adds nothing.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub inputs: BTreeSet<String>,
}

/// A place in a stream, between two entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamPlace {
    /// `last` of the version before, where there is one: a commit succeeds only where the dataset still stands there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Where the dataset stands: of Redis the id of its last entry, of Kafka the offset at which each partition goes on,
    /// as in `0:1500,1:1498`.
    pub last: String,
    /// Of Redis, entries that the stream ever had up to that one, as the server counts; what it counts later and does not
    /// have was lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub added: Option<u64>,
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
    /// Its size before compression, where it is compressed as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_bytes: Option<u64>,
    /// Its rows.
    pub samples: u64,
    /// Its blocks.
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

impl ShardFacts {
    /// Facts of a shard of which no more is known.
    pub fn new(key: &str, format: ShardFormat, bytes: u64, samples: u64) -> ShardFacts {
        ShardFacts {
            key: key.to_owned(),
            format,
            bytes,
            raw_bytes: None,
            samples,
            blocks: Vec::new(),
            etag: None,
            xxh3: None,
            sha256: None,
            columns: serde_json::Map::new(),
        }
    }

    /// The same facts, with the hash of the shard's bytes.
    pub fn hashed(self, bytes: &[u8]) -> ShardFacts {
        let xxh3 = Some(format!("{:016x}", xxhash_rust::xxh3::xxh3_64(bytes)));
        ShardFacts { xxh3, sha256: Some(Digest::of(bytes)), ..self }
    }

    /// Rows of its blocks; it is one where none are told.
    pub(crate) fn block_rows(&self) -> Vec<u64> {
        match self.blocks.as_slice() {
            [] => vec![self.samples],
            blocks => blocks.iter().map(|block| block.rows).collect(),
        }
    }

    /// Whether blocks, samples and key make sense together.
    fn check(&self) -> Result<(), String> {
        let key = &self.key;
        let inside = |part: &str| !part.is_empty() && part != "." && part != "..";
        if !key.split('/').all(inside) {
            return Err(format!("the shard `{key:.200}` leads out of the dataset's folder"));
        }
        if self.blocks.is_empty() {
            return Ok(());
        }
        let rows = self.blocks.iter().try_fold(0u64, |sum, block| sum.checked_add(block.rows));
        if rows != Some(self.samples) {
            return Err(format!("the blocks of shard `{key}` do not hold its {} samples", self.samples));
        }
        if self.blocks.iter().any(|b| b.rows == 0) {
            return Err(format!("shard `{key}` has a block without rows"));
        }
        Ok(())
    }
}

/// A version as it was found: all its shards, and what it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Version {
    /// The digest of its manifest.
    pub digest: Digest,
    /// All its shards, those of its segments in order.
    pub manifest: Manifest,
    /// How many segments it was put together from.
    pub segments: usize,
}

#[derive(Serialize, Deserialize)]
struct Latest {
    format: u64,
    digest: Digest,
}

impl Manifest {
    /// A dataset of these shards.
    pub fn new(schema: Schema, shards: Vec<ShardFacts>) -> Manifest {
        Manifest {
            format: MANIFEST_FORMAT,
            parent: None,
            appends: false,
            schema,
            shards,
            streams: BTreeMap::new(),
            inputs: BTreeSet::new(),
        }
    }

    /// More shards for a version.
    pub fn after(parent: Digest, schema: Schema, shards: Vec<ShardFacts>) -> Manifest {
        Manifest { parent: Some(parent), appends: true, ..Manifest::new(schema, shards) }
    }

    /// The number of samples listed here.
    pub fn samples(&self) -> u64 {
        self.shards.iter().fold(0, |sum, shard| sum.saturating_add(shard.samples))
    }

    /// The digest of its JSON form.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.json())
    }

    fn json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("keys are text and numbers are finite");
        json.push(b'\n');
        json
    }

    /// The digest that `LATEST` names, without reading what it names.
    pub fn latest(objects: &Objects) -> Result<Option<Digest>, DataError> {
        latest(objects)
    }

    /// A version with all its shards; `None` where nothing was ever committed.
    pub fn load(objects: &Objects, version: Option<&Digest>) -> Result<Option<Version>, DataError> {
        Version::load(objects, version)
    }

    /// Keeps this manifest and makes it the newest version. Where it appends and others appended meanwhile, it is put
    /// behind theirs, so the digest given back may differ from [`digest`](Manifest::digest). Shards that the version
    /// before already has are not added again, so a retried commit changes nothing.
    ///
    /// # Errors
    /// [`DataError::Raced`] where it replaces all shards and others committed meanwhile; shards of other columns; two
    /// shards under one name; inputs that the version before was made of, in other shards.
    pub fn commit(&self, objects: &Objects) -> Result<Digest, DataError> {
        let name = ReadObjects::name(objects, LATEST);
        if let Some(key) = listed_twice(&self.shards) {
            return Err(DataError::file(
                name.as_ref(),
                format!("is not moved: the shard `{key}` would be listed twice"),
            ));
        }
        for _ in 0..RACES_MAX {
            let expected = match objects.head(LATEST) {
                Ok(facts) => Some(facts),
                Err(error) if error.is_not_found() => None,
                Err(error) => return Err(error.into()),
            };
            let before = match &expected {
                None => None,
                Some(_) => latest(objects)?,
            };
            let Some(next) = self.behind(before, objects)? else {
                return before.ok_or_else(|| DataError::file(name.as_ref(), "has nothing to commit"));
            };
            let json = Bytes::from(next.json());
            let digest = Digest::of(&json);
            // The same manifest may be there from an earlier try.
            if objects.create(&manifest_key(&digest), json.clone())? == Created::Exists
                && objects.get(&manifest_key(&digest))? != json
            {
                let reason = "holds other bytes than its name says";
                return Err(DataError::file(ReadObjects::name(objects, &manifest_key(&digest)).as_ref(), reason));
            }
            let latest = serde_json::to_vec(&Latest { format: MANIFEST_FORMAT, digest });
            let latest = latest.map_err(|e| DataError::file(name.as_ref(), e.to_string()))?;
            let moved = match &expected {
                None => objects.create(LATEST, latest.into())? == Created::New,
                Some(expected) => match objects.update(LATEST, latest.into(), expected) {
                    // Whether it was done shows in the version read next.
                    Err(StoreError::Undetermined { .. }) if self.appends => false,
                    moved => moved?,
                },
            };
            if moved {
                return Ok(digest);
            }
            if !self.appends {
                return Err(DataError::Raced { name });
            }
        }
        Err(DataError::Raced { name })
    }

    /// This manifest as it would follow `before`. `None` where `before` has it all.
    fn behind(&self, before: Option<Digest>, objects: &Objects) -> Result<Option<Manifest>, DataError> {
        let Some(before) = before else {
            self.check_streams(&BTreeMap::new(), objects)?;
            return Ok(Some(Manifest { parent: None, appends: false, ..self.clone() }));
        };
        if !self.appends {
            // The same dataset once more is the same version.
            let same = Manifest { parent: self.parent.or(Some(before)), ..self.clone() };
            let version = Version::load(objects, Some(&before))?;
            let known = version
                .is_some_and(|v| v.manifest.schema == self.schema && v.manifest.shards == without_tags(&self.shards));
            return Ok((!known).then_some(same));
        }
        let Some(Version { manifest, segments, .. }) = Version::load(objects, Some(&before))? else {
            return Ok(Some(Manifest { parent: None, appends: false, ..self.clone() }));
        };
        let place = |key: &str| ReadObjects::name(objects, key);
        if let Some(difference) = manifest.schema.difference(&self.schema) {
            let reason = format!("{difference} as in the version {before} that it would follow");
            return Err(DataError::file(place(LATEST).as_ref(), reason));
        }
        let known: HashMap<&str, &ShardFacts> = manifest.shards.iter().map(|s| (s.key.as_str(), s)).collect();
        let mut added = Vec::new();
        for shard in without_tags(&self.shards) {
            match known.get(shard.key.as_str()) {
                None => added.push(shard),
                Some(same) if **same == shard => {}
                Some(_) => {
                    return Err(DataError::file(
                        place(&shard.key).as_ref(),
                        "is a shard of the dataset already, with other facts",
                    ));
                }
            }
        }
        if added.is_empty() {
            return Ok(None);
        }
        self.check_streams(&manifest.streams, objects)?;
        let twice = self.inputs.intersection(&manifest.inputs).count();
        if twice > 0 {
            let reason = format!("holds {twice} of the inputs since they were looked for; run the same once more");
            return Err(DataError::file(place(LATEST).as_ref(), reason));
        }
        let whole = segments >= SEGMENTS_MAX;
        let shards = if whole { [manifest.shards, added].concat() } else { added };
        let mut streams = if whole { manifest.streams } else { BTreeMap::new() };
        streams.extend(self.streams.clone());
        let mut inputs = if whole { manifest.inputs } else { BTreeSet::new() };
        inputs.extend(self.inputs.iter().cloned());
        let (parent, appends, schema) = (Some(before), !whole, manifest.schema);
        Ok(Some(Manifest { format: MANIFEST_FORMAT, parent, appends, schema, shards, streams, inputs }))
    }

    /// Refuses shards that do not follow what the dataset has of their stream: somebody else follows it into the dataset
    /// too, or the dataset was replaced.
    fn check_streams(&self, known: &BTreeMap<String, StreamPlace>, objects: &Objects) -> Result<(), DataError> {
        for (name, place) in &self.streams {
            let last = known.get(name).map(|place| &place.last);
            if last != place.after.as_ref() {
                let shown = |id: Option<&String>| id.map_or("the beginning".to_owned(), |id| format!("`{id}`"));
                return Err(DataError::file(
                    ReadObjects::name(objects, LATEST).as_ref(),
                    format!(
                        "stands at {} of the stream {name}, and the new shard begins after {}: does another process follow \
                         it, too?",
                        shown(last),
                        shown(place.after.as_ref()),
                    ),
                ));
            }
        }
        Ok(())
    }
}

fn without_tags(shards: &[ShardFacts]) -> Vec<ShardFacts> {
    shards.iter().map(|shard| ShardFacts { etag: None, ..shard.clone() }).collect()
}

fn manifest_key(digest: &Digest) -> String {
    format!("manifests/{}.json", digest.hex())
}

pub(crate) fn latest(objects: &dyn ReadObjects) -> Result<Option<Digest>, DataError> {
    let Some(text) = read_small(objects, LATEST)? else { return Ok(None) };
    let damaged = |reason: String| DataError::file(objects.name(LATEST).as_ref(), reason);
    let Latest { format, digest } = serde_json::from_slice(&text).map_err(|e| damaged(format!("is damaged: {e}")))?;
    if format != MANIFEST_FORMAT {
        return Err(damaged(format!("has format {format}; this version reads format {MANIFEST_FORMAT}")));
    }
    Ok(Some(digest))
}

fn read_small(objects: &dyn ReadObjects, key: &str) -> Result<Option<Bytes>, DataError> {
    small_object(objects, key, BYTES_MAX)
}

impl Version {
    /// A version with all its shards; `None` where nothing was ever committed.
    ///
    /// # Errors
    /// A manifest that is missing, damaged, or not what its name says; all name the object.
    pub fn load(objects: &dyn ReadObjects, version: Option<&Digest>) -> Result<Option<Version>, DataError> {
        let digest = match version {
            Some(digest) => *digest,
            None => match latest(objects)? {
                Some(digest) => digest,
                None => return Ok(None),
            },
        };
        let mut segments: Vec<Manifest> = Vec::new();
        let mut next = Some(digest);
        while let Some(digest) = next {
            let key = manifest_key(&digest);
            let damaged = |reason: String| DataError::file(objects.name(&key).as_ref(), reason);
            let text = read_small(objects, &key)?;
            let text = text.ok_or_else(|| damaged(format!("is missing, and the version {digest} is to be read")))?;
            let found = Digest::of(&text);
            if found != digest {
                return Err(damaged(format!("has the digest {found}: it is damaged")));
            }
            let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| damaged(format!("is damaged: {e}")))?;
            if manifest.format != MANIFEST_FORMAT {
                let reason = format!("has format {}; this version reads format {MANIFEST_FORMAT}", manifest.format);
                return Err(damaged(reason));
            }
            manifest.shards.iter().try_for_each(ShardFacts::check).map_err(damaged)?;
            if let Some(first) = segments.first()
                && let Some(difference) = manifest.schema.difference(&first.schema)
            {
                return Err(damaged(format!("its next segment differs: {difference}")));
            }
            // A chain cannot close into a ring: each digest covers the one before.
            next = manifest.parent.filter(|_| manifest.appends);
            segments.push(manifest);
        }
        let count = segments.len();
        let streams = segments.iter().rev().flat_map(|segment| segment.streams.clone()).collect();
        let inputs = segments.iter().flat_map(|segment| segment.inputs.iter().cloned()).collect();
        let mut manifest = segments.remove(0);
        manifest.streams = streams;
        manifest.inputs = inputs;
        let own = std::mem::take(&mut manifest.shards);
        let earlier = segments.into_iter().rev().flat_map(|segment| segment.shards);
        manifest.shards = earlier.chain(own).collect();
        if let Some(twice) = listed_twice(&manifest.shards) {
            let key = manifest_key(&digest);
            return Err(DataError::file(objects.name(&key).as_ref(), format!("lists the shard `{twice}` twice")));
        }
        manifest.appends = false;
        Ok(Some(Version { digest, manifest, segments: count }))
    }

    pub(crate) fn read(objects: &Arc<dyn ReadObjects>, version: Option<&Digest>) -> Result<Option<Version>, DataError> {
        Version::load(&**objects, version)
    }
}

fn listed_twice(shards: &[ShardFacts]) -> Option<&str> {
    let mut keys = HashSet::with_capacity(shards.len());
    shards.iter().map(|shard| shard.key.as_str()).find(|key| !keys.insert(*key))
}
