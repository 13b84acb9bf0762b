//! Streams into shards of a dataset, each entry exactly once.
//!
//! # Design
//!
//! The dataset is where the place in the stream is kept, not the server: a segment of the manifest holds the shard and the
//! place behind its last entry, so both are there or neither is. Whatever is killed, the next follower reads on after the
//! last entry that the dataset has. A shard that was put and not committed is named by no manifest and stays aside. Two
//! followers at once do not double either: a commit says after which place its shard begins, and fails where the dataset
//! has come further.
//!
//! A segment is never rewritten: entries that come late are a new one, and older versions stay readable. What the server
//! dropped before it was read is an error that says how much. Servers differ in where entries come from and what a place
//! is, which is the trait [`Source`]; all else is here, once.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use updraft_base::{Clock, Digest, Hasher};
use updraft_store::Objects;

use crate::error::DataError;
use crate::ingest::{Making, put_shard, shard_key};
use crate::manifest::{Manifest, StreamPlace, Version};
use crate::schema::{Kind, Schema};
use crate::source::shard::ShardFormat;
use crate::write::WriteOptions;

#[cfg(feature = "kafka")]
pub mod kafka;
#[cfg(feature = "redis")]
mod redis;
mod rows;

/// Part of every shard's digest: another number where the same entries become other bytes.
const VERSION: &str = "1";

/// Bytes of entries that are asked for at once, about.
const REQUEST_BYTES: u64 = 4 << 20;

/// How long to wait for an entry before looking at the time again.
const WAIT_MS: u64 = 1000;

/// What is made of the entries.
#[derive(Debug, Clone, PartialEq)]
pub struct FollowOptions {
    /// The format of the shards.
    pub format: ShardFormat,
    /// Their size and form. [`WriteOptions::shard_bytes`] counts the bytes of entries.
    pub write: WriteOptions,
    /// A shard is finished when its first entry was read so long ago, however small it is.
    pub shard_ms: u64,
    /// When to stop.
    pub end: FollowEnd,
    /// The name under which the dataset keeps its place in the stream; the stream's URL, without password, if none is given.
    pub group: Option<String>,
    /// What columns hold: bytes, text, or one i64, f64 or f32. Those of a new dataset that are not named here are told from
    /// the entries of its first shard.
    pub kinds: BTreeMap<String, Kind>,
    /// Whether to go on with what is left where entries were lost before they were read.
    pub accept_loss: bool,
    /// How long a server may be away.
    pub patience_ms: u64,
    /// What of Kafka's records is kept.
    pub records: RecordOptions,
}

/// What of a record of Kafka is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordOptions {
    /// What becomes a column.
    pub fields: Vec<RecordField>,
    /// What becomes of the value.
    pub value: ValueForm,
    /// Whether records without a value are left out. Otherwise they are an error.
    pub skip_tombstones: bool,
}

impl Default for RecordOptions {
    fn default() -> RecordOptions {
        RecordOptions { fields: vec![RecordField::Value], value: ValueForm::Cell, skip_tombstones: false }
    }
}

/// A part of a record of Kafka. Its text is the name of its column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordField {
    /// What its producer chose its partition by.
    Key,
    /// What it says.
    Value,
    /// When it was made, or when the broker got it, in milliseconds since 1970, as the topic has it.
    TimestampMs,
    /// Its partition.
    Partition,
    /// Its number in the partition.
    Offset,
    /// A header of this name.
    Header(String),
}

impl fmt::Display for RecordField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecordField::Key => f.write_str("key"),
            RecordField::Value => f.write_str("value"),
            RecordField::TimestampMs => f.write_str("timestamp_ms"),
            RecordField::Partition => f.write_str("partition"),
            RecordField::Offset => f.write_str("offset"),
            RecordField::Header(name) => write!(f, "header.{name}"),
        }
    }
}

impl FromStr for RecordField {
    type Err = String;

    fn from_str(text: &str) -> Result<RecordField, String> {
        let header = text.strip_prefix("header.").filter(|name| !name.is_empty());
        match text {
            "key" => Ok(RecordField::Key),
            "value" => Ok(RecordField::Value),
            "timestamp_ms" => Ok(RecordField::TimestampMs),
            "partition" => Ok(RecordField::Partition),
            "offset" => Ok(RecordField::Offset),
            _ => header.map(|name| RecordField::Header(name.to_owned())).ok_or_else(|| {
                format!("`{text}` is none of key, value, timestamp_ms, partition, offset and header.NAME")
            }),
        }
    }
}

/// What becomes of the values of Kafka's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueForm {
    /// A cell each.
    Cell,
    /// JSON objects, whose keys are columns.
    Json,
}

/// When following ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FollowEnd {
    /// Never.
    Never,
    /// When no entry has come for so long.
    IdleMs(u64),
    /// With the entry that was the last one at the start.
    Once,
}

/// What was committed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Followed {
    /// Entries.
    pub entries: u64,
    /// Shards, each a segment.
    pub shards: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Entries that were gone before they were read, where that was accepted.
    pub lost: u64,
    /// Records without a value that were left out.
    pub skipped: u64,
    /// The place in the stream that the dataset has reached, earlier or now.
    pub last: Option<String>,
    /// The version with all of them.
    pub version: Option<Digest>,
}

/// Follows `redis://[user:password@]host[:port]/STREAM[?db=N]` or `kafka://[user:password@]host[:port]/TOPIC`, with
/// `kafka+ssl` for TLS, into the dataset at `target`. `progress` is told of the entries read and of those committed.
///
/// # Errors
/// [`DataError::Server`] where the server is away for too long, [`DataError::Stream`] where entries are gone, or are of a stream
/// that was made anew, [`DataError::Sample`] naming the first entry that does not fit the columns, after what came before
/// it was committed; whatever the store says.
pub fn follow(
    url: &str,
    target: &Objects,
    options: &FollowOptions,
    clock: &dyn Clock,
    progress: impl FnMut(u64, u64),
) -> Result<Followed, DataError> {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    match scheme {
        #[cfg(feature = "kafka")]
        "kafka" | "kafka+ssl" => {
            follow_source(kafka::Reader::open(url, options, clock)?, target, options, clock, progress)
        }
        _ if options.records != RecordOptions::default() => {
            Err(DataError::Loader("what is kept of records can be said for topics of Kafka only".to_owned()))
        }
        #[cfg(feature = "redis")]
        "redis" | "rediss" => {
            follow_source(redis::Reader::open(url, options, clock)?, target, options, clock, progress)
        }
        _ => {
            let known: &[&str] = &[
                #[cfg(feature = "redis")]
                "redis://",
                #[cfg(feature = "kafka")]
                "kafka://",
                #[cfg(feature = "kafka")]
                "kafka+ssl://",
            ];
            Err(DataError::Loader(format!("the URL of a stream begins with {}", known.join(" or "))))
        }
    }
}

/// Where entries come from.
trait Source {
    /// What names an entry.
    type Id: EntryId;

    /// The stream's URL without password.
    fn name(&self) -> &str;

    /// Goes to a place, or to the first entry that is there.
    fn begin(&mut self, place: Option<&StreamPlace>) -> Result<(), DataError>;

    /// Entries behind those of the last call, about so many bytes of them.
    fn read(&mut self, bytes: u64) -> Result<Found<Self::Id>, DataError>;

    /// Waits for entries, not longer than `wait_ms`.
    fn wait(&mut self, wait_ms: u64) -> Result<(), DataError>;

    /// The place behind entries that follow on one.
    fn place(&self, before: Option<&StreamPlace>, entries: &[Entry<Self::Id>]) -> Option<StreamPlace>;
}

/// What names an entry.
trait EntryId {
    /// For people.
    fn name(&self) -> String;

    /// For the name of a shard.
    fn key(&self) -> String;
}

/// One entry.
#[derive(Debug, Clone, PartialEq)]
struct Entry<I> {
    id: I,
    fields: Vec<(Bytes, Bytes)>,
    /// JSON whose keys are columns, too.
    object: Option<Bytes>,
}

impl<I> Entry<I> {
    /// What it takes.
    fn bytes(&self) -> u64 {
        let fields: usize = self.fields.iter().map(|(name, value)| name.len() + value.len()).sum();
        (fields + self.object.as_ref().map_or(0, Bytes::len) + 16) as u64
    }
}

/// What a look at a stream found.
struct Found<I> {
    entries: Vec<Entry<I>>,
    /// Entries that are gone and were never read.
    lost: u64,
    /// Records left out as was asked.
    skipped: u64,
    /// Whether nothing is behind these.
    is_all: bool,
    /// Whether what was the last entry at the beginning has been read.
    is_end: bool,
    /// Why the one behind these cannot be read.
    wrong: Option<DataError>,
}

fn follow_source<S: Source>(
    mut source: S,
    target: &Objects,
    options: &FollowOptions,
    clock: &dyn Clock,
    mut progress: impl FnMut(u64, u64),
) -> Result<Followed, DataError> {
    let group = options.group.clone().unwrap_or_else(|| source.name().to_owned());
    let version = Manifest::load(target, None)?;
    let place = version.as_ref().and_then(|v| v.manifest.streams.get(&group)).cloned();
    source.begin(place.as_ref())?;
    let mut follower = Follower {
        source,
        target,
        options,
        group,
        place,
        schema: None,
        open: Open::default(),
        followed: Followed::default(),
    };
    follower.begin(version)?;
    let mut last_ns = clock.monotonic_ns();
    let mut read = 0;
    loop {
        // Small shards are cut where they should be only if no request brings several.
        let found = follower.source.read(REQUEST_BYTES.min(options.write.shard_bytes))?;
        follower.followed.lost += found.lost;
        follower.followed.skipped += found.skipped;
        let now_ns = clock.monotonic_ns();
        if !found.entries.is_empty() {
            last_ns = now_ns;
        }
        for entry in found.entries {
            read += 1;
            follower.push(entry, now_ns)?;
        }
        if let Some(error) = found.wrong {
            follower.seal()?;
            return Err(error);
        }
        let idle_ms = (now_ns - last_ns) / 1_000_000;
        let is_over = match options.end {
            FollowEnd::Never => false,
            FollowEnd::IdleMs(until_ms) => idle_ms >= until_ms,
            FollowEnd::Once => found.is_end,
        };
        let left_ms = follower.left_ms(now_ns);
        if is_over || left_ms == Some(0) {
            follower.seal()?;
        }
        progress(read, follower.followed.entries);
        if is_over {
            return Ok(follower.followed);
        }
        if found.is_all {
            let until_ms = match options.end {
                FollowEnd::IdleMs(until_ms) => until_ms.saturating_sub(idle_ms),
                _ => WAIT_MS,
            };
            let wait_ms = WAIT_MS.min(until_ms).min(left_ms.filter(|ms| *ms > 0).unwrap_or(WAIT_MS));
            follower.source.wait(wait_ms.max(1))?;
        }
    }
}

/// Entries that will be a shard.
struct Open<I> {
    entries: Vec<Entry<I>>,
    bytes: u64,
    since_ns: u64,
}

impl<I> Default for Open<I> {
    fn default() -> Open<I> {
        Open { entries: Vec::new(), bytes: 0, since_ns: 0 }
    }
}

struct Follower<'a, S: Source> {
    source: S,
    target: &'a Objects,
    options: &'a FollowOptions,
    group: String,
    /// That the dataset has reached.
    place: Option<StreamPlace>,
    schema: Option<Arc<Schema>>,
    open: Open<S::Id>,
    followed: Followed,
}

impl<S: Source> Follower<'_, S> {
    /// Goes on from a version.
    fn begin(&mut self, version: Option<Version>) -> Result<(), DataError> {
        let Some(version) = version else { return Ok(()) };
        for (name, kind) in &self.options.kinds {
            let known = version.manifest.schema.columns.iter().find(|column| column.name == *name);
            if known.is_none_or(|column| column.kind != *kind) {
                let known = known.map_or("no such column".to_owned(), |column| column.kind.to_string());
                return Err(DataError::Loader(format!(
                    "column `{name}` cannot be {kind}: the dataset at {} has {known}",
                    self.target.url()
                )));
            }
        }
        self.schema = Some(Arc::new(version.manifest.schema));
        self.followed.last = self.place.as_ref().map(|place| place.last.clone());
        self.followed.version = Some(version.digest);
        Ok(())
    }

    fn push(&mut self, entry: Entry<S::Id>, now_ns: u64) -> Result<(), DataError> {
        if self.open.entries.is_empty() {
            self.open.since_ns = now_ns;
        }
        self.open.bytes += entry.bytes();
        self.open.entries.push(entry);
        if self.open.bytes >= self.options.write.shard_bytes {
            self.seal()?;
        }
        Ok(())
    }

    /// Milliseconds until the shard must be finished, if there is one.
    fn left_ms(&self, now_ns: u64) -> Option<u64> {
        let age_ms = (now_ns - self.open.since_ns.min(now_ns)) / 1_000_000;
        (!self.open.entries.is_empty()).then(|| self.options.shard_ms.saturating_sub(age_ms))
    }

    /// Makes a shard of the entries and commits it with the place that it reaches.
    fn seal(&mut self) -> Result<(), DataError> {
        let entries = std::mem::take(&mut self.open).entries;
        if entries.is_empty() {
            return Ok(());
        }
        let name = |entry: &Entry<S::Id>| format!("{} {}", self.group, entry.id.name());
        match rows::rows(&entries, self.schema.as_ref(), &self.options.kinds, &name) {
            Ok(rows) => self.commit(&entries, rows),
            // What came before the one that does not fit is kept.
            Err((at, error)) => {
                let good = &entries[..at];
                if !good.is_empty()
                    && let Ok(rows) = rows::rows(good, self.schema.as_ref(), &self.options.kinds, &name)
                {
                    self.commit(good, rows)?;
                }
                Err(error)
            }
        }
    }

    fn commit(&mut self, entries: &[Entry<S::Id>], rows: crate::Rows) -> Result<(), DataError> {
        let (Some(first), Some(place)) = (entries.first(), self.source.place(self.place.as_ref(), entries)) else {
            return Ok(());
        };
        let FollowOptions { format, write, .. } = self.options;
        let schema = rows.schema.clone();
        let mut shard = Making::new(&schema, *format, write)?;
        shard.push(&rows)?;
        let (bytes, mut facts) = shard.finish()?;
        let mut hasher = Hasher::new();
        for field in [VERSION.as_bytes(), self.group.as_bytes(), place.last.as_bytes(), &bytes] {
            hasher.field(field);
        }
        facts.key = shard_key(&first.id.key(), &hasher.finish(), *format, write);
        let length = bytes.len() as u64;
        put_shard(self.target, &facts.key, bytes)?;
        let segment = Manifest {
            appends: true,
            streams: BTreeMap::from([(self.group.clone(), place.clone())]),
            ..Manifest::new((*schema).clone(), vec![facts])
        };
        self.followed.version = Some(segment.commit(self.target)?);
        self.followed.last = Some(place.last.clone());
        self.followed.entries += entries.len() as u64;
        self.followed.shards += 1;
        self.followed.bytes += length;
        self.place = Some(place);
        self.schema = Some(schema);
        Ok(())
    }
}
