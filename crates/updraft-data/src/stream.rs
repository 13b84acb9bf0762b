//! Streams of Redis into shards of a dataset, each entry exactly once.
//!
//! # Design
//!
//! The dataset is where the place in the stream is kept, not the server: a segment of the manifest holds the shard and the id
//! of its last entry, so both are there or neither is. Whatever is killed, the next follower reads on after the last
//! entry that the dataset has. A shard that was put and not committed is named by no manifest and stays aside. Two
//! followers at once do not double either: a commit says after which entry its shard begins, and fails where the dataset
//! has come further.
//!
//! A segment is never rewritten: entries that come late are a new one, and older versions stay readable. What the server
//! dropped before it was read is noticed by its own count of entries ever added, and is an error that says how many.

use std::collections::BTreeMap;
use std::sync::Arc;

use updraft_base::{Clock, Digest, Hasher};
use updraft_store::Objects;

use crate::error::DataError;
use crate::ingest::{Making, put_shard, shard_key};
use crate::manifest::{Manifest, StreamPlace, Version};
use crate::schema::{Kind, Schema};
use crate::source::shard::ShardFormat;
use crate::write::WriteOptions;
use reader::{Entry, EntryId, Facts, Reader};

mod reader;
mod rows;

/// Part of every shard's digest: another number where the same entries become other bytes.
const VERSION: &str = "1";

/// Bytes of entries that are asked for at once, about.
const REQUEST_BYTES: u64 = 4 << 20;

/// Entries that are asked for at once, at most.
const REQUEST_ENTRIES: u64 = 4096;

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
    /// The last entry in the dataset, from earlier or now.
    pub last: Option<String>,
    /// The version with all of them.
    pub version: Option<Digest>,
}

/// Follows `redis://[user:password@]host[:port]/STREAM[?db=N]` into the dataset at `target`. `progress` is told of the entries
/// read and of those committed.
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
    mut progress: impl FnMut(u64, u64),
) -> Result<Followed, DataError> {
    let mut reader = Reader::open(url, options.patience_ms, clock)?;
    let group = options.group.clone().unwrap_or_else(|| reader.name().to_owned());
    let version = Manifest::load(target, None)?;
    let place = version.as_ref().and_then(|v| v.manifest.streams.get(&group)).cloned();
    let mut follower =
        Follower { target, options, group, schema: None, open: Open::default(), followed: Followed::default() };
    follower.begin(version, place.as_ref())?;
    let mut at = match &place {
        None => Cursor { last: EntryId::default(), added: None },
        Some(place) => {
            let last = place.last.parse().map_err(|reason| reader.error(reason))?;
            Cursor { last, added: Some(place.added) }
        }
    };
    let end = match options.end {
        FollowEnd::Once => Some(reader.facts()?.map_or(EntryId::default(), |facts| facts.generated)),
        _ => None,
    };
    let mut entry_bytes = 1024;
    let mut last_ns = clock.monotonic_ns();
    let mut read = 0;
    loop {
        // Small shards are cut where they should be only if no request brings several.
        let request_bytes = REQUEST_BYTES.min(options.write.shard_bytes);
        let count = (request_bytes / entry_bytes).clamp(1, REQUEST_ENTRIES);
        let (facts, entries) = reader.read(at.last, count)?;
        follower.followed.lost +=
            at.check(facts.as_ref(), options.accept_loss).map_err(|reason| reader.error(reason))?;
        let facts = facts.unwrap_or_default();
        let now_ns = clock.monotonic_ns();
        if !entries.is_empty() {
            entry_bytes = (entries.iter().map(Entry::bytes).sum::<u64>() / entries.len() as u64).max(1);
            last_ns = now_ns;
        }
        let is_all = (entries.len() as u64) < count;
        let found = entries.len() as u64;
        for (index, entry) in entries.into_iter().enumerate() {
            at.last = entry.id;
            at.added = Some(match is_all {
                // Nothing is behind the last of these, so the server's own count says where they stand.
                true => facts.added.saturating_sub(found - 1 - index as u64),
                false => at.added.unwrap_or(facts.added.saturating_sub(facts.length)) + 1,
            });
            read += 1;
            follower.push(entry, at.added.unwrap_or(0), now_ns)?;
        }
        if is_all {
            at.added = Some(facts.added);
        }
        let is_over = match options.end {
            FollowEnd::Never => false,
            FollowEnd::IdleMs(idle_ms) => (now_ns - last_ns) / 1_000_000 >= idle_ms,
            FollowEnd::Once => is_all || end.is_some_and(|end| at.last >= end),
        };
        let left_ms = follower.left_ms(now_ns);
        if is_over || left_ms == Some(0) {
            follower.seal()?;
        }
        progress(read, follower.followed.entries);
        if is_over {
            return Ok(follower.followed);
        }
        if is_all {
            let idle_ms = match options.end {
                FollowEnd::IdleMs(idle_ms) => idle_ms.saturating_sub((now_ns - last_ns) / 1_000_000),
                _ => WAIT_MS,
            };
            reader.wait(at.last, WAIT_MS.min(idle_ms).min(left_ms.filter(|ms| *ms > 0).unwrap_or(WAIT_MS)).max(1))?;
        }
    }
}

/// How far the stream was read.
struct Cursor {
    last: EntryId,
    /// Entries that the stream ever had up to the last one. Unknown before the first look.
    added: Option<u64>,
}

impl Cursor {
    /// How many entries are gone that were never read; an error unless that is accepted.
    ///
    /// Entries read and gone are not missed. What was ever added, less what was read and what is there, is missing. The
    /// count tells nothing while an entry that was read is still there: then none behind it was trimmed.
    fn check(&mut self, facts: Option<&Facts>, accept: bool) -> Result<u64, String> {
        let Some(added) = self.added else { return Ok(0) };
        let anew = |what: &str| {
            format!(
                "{what}, although it was read up to entry {}: it was deleted or made anew, and what it had behind that is \
                 lost; `--accept-loss` goes on with what it has now",
                self.last,
            )
        };
        let Some(facts) = facts else {
            // A stream that nobody has written to yet does not exist.
            let is_fine = accept || self.last == EntryId::default();
            return if is_fine { Ok(0) } else { Err(anew("there is no such stream")) };
        };
        if facts.added < added || facts.generated < self.last {
            if !accept {
                return Err(anew(&format!("has had {} entries, the last {}", facts.added, facts.generated)));
            }
            *self = Cursor { last: EntryId::default(), added: Some(facts.added.saturating_sub(facts.length)) };
            return Ok(0);
        }
        if facts.first.is_some_and(|first| first <= self.last) {
            return Ok(0);
        }
        let lost = facts.added.saturating_sub(added).saturating_sub(facts.length);
        if lost > 0 && !accept {
            let until = match facts.first {
                Some(first) => format!("before entry {first}"),
                None => format!("up to entry {}", facts.generated),
            };
            return Err(format!(
                "{lost} entries after entry {} and {until} were trimmed or deleted before they were read; \
                 `--accept-loss` goes on with what is left",
                self.last,
            ));
        }
        self.added = Some(facts.added.saturating_sub(facts.length));
        Ok(lost)
    }
}

/// Entries that will be a shard.
#[derive(Default)]
struct Open {
    entries: Vec<Entry>,
    /// What the server had ever added, for each.
    added: Vec<u64>,
    bytes: u64,
    since_ns: u64,
}

struct Follower<'a> {
    target: &'a Objects,
    options: &'a FollowOptions,
    group: String,
    schema: Option<Arc<Schema>>,
    open: Open,
    followed: Followed,
}

impl Follower<'_> {
    /// Goes on from a version and its place.
    fn begin(&mut self, version: Option<Version>, place: Option<&StreamPlace>) -> Result<(), DataError> {
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
        self.followed.last = place.map(|place| place.last.clone());
        self.followed.version = Some(version.digest);
        Ok(())
    }

    fn push(&mut self, entry: Entry, added: u64, now_ns: u64) -> Result<(), DataError> {
        if self.open.entries.is_empty() {
            self.open.since_ns = now_ns;
        }
        self.open.bytes += entry.bytes();
        self.open.entries.push(entry);
        self.open.added.push(added);
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
        let Open { entries, added, .. } = std::mem::take(&mut self.open);
        let name = |entry: &Entry| format!("{} entry {}", self.group, entry.id);
        match rows::rows(&entries, self.schema.as_ref(), &self.options.kinds, &name) {
            Ok(rows) => self.commit(&entries, &added, rows),
            // What came before the one that does not fit is kept.
            Err((at, error)) => {
                let good = &entries[..at];
                if !good.is_empty()
                    && let Ok(rows) = rows::rows(good, self.schema.as_ref(), &self.options.kinds, &name)
                {
                    self.commit(good, &added[..at], rows)?;
                }
                Err(error)
            }
        }
    }

    fn commit(&mut self, entries: &[Entry], added: &[u64], rows: crate::Rows) -> Result<(), DataError> {
        let ([first, ..], [.., last], Some(added)) = (entries, entries, added.last()) else { return Ok(()) };
        let FollowOptions { format, write, .. } = self.options;
        let schema = rows.schema.clone();
        let mut shard = Making::new(&schema, *format, write)?;
        shard.push(&rows)?;
        let (bytes, mut facts) = shard.finish()?;
        let mut hasher = Hasher::new();
        for field in [VERSION.as_bytes(), self.group.as_bytes(), last.id.to_string().as_bytes(), &bytes] {
            hasher.field(field);
        }
        facts.key = shard_key(&first.id.to_string(), &hasher.finish(), *format, write);
        let length = bytes.len() as u64;
        put_shard(self.target, &facts.key, bytes)?;
        let place = StreamPlace { after: self.followed.last.take(), last: last.id.to_string(), added: *added };
        let segment = Manifest {
            appends: true,
            streams: BTreeMap::from([(self.group.clone(), place)]),
            ..Manifest::new((*schema).clone(), vec![facts])
        };
        self.followed.version = Some(segment.commit(self.target)?);
        self.followed.last = Some(last.id.to_string());
        self.followed.entries += entries.len() as u64;
        self.followed.shards += 1;
        self.followed.bytes += length;
        self.schema = Some(schema);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(ms: u64) -> EntryId {
        EntryId { ms, sequence: 0 }
    }

    #[test]
    fn what_the_server_counted_and_neither_has_nor_gave_is_lost() {
        let facts = |added, length, first: Option<u64>, generated| Facts {
            added,
            length,
            first: first.map(id),
            generated: id(generated),
        };
        // Entries 1 to 5 were read.
        let check = |facts| Cursor { last: id(5), added: Some(5) }.check(Some(&facts), false);
        for (case, lost) in [
            (facts(5, 5, Some(1), 5), 0),
            (facts(5, 0, None, 5), 0),
            (facts(9, 9, Some(1), 9), 0),
            (facts(9, 4, Some(6), 9), 0),
            (facts(9, 3, Some(7), 9), 1),
            (facts(9, 0, None, 9), 4),
        ] {
            let found = check(case);
            match lost {
                0 => assert_eq!(found, Ok(0)),
                lost => assert!(found.unwrap_err().starts_with(&format!("{lost} entries after entry 5-0"))),
            }
        }
        assert!(check(facts(3, 3, Some(1), 3)).unwrap_err().contains("made anew"));
        assert!(Cursor { last: id(5), added: Some(5) }.check(None, false).unwrap_err().contains("no such stream"));
        let mut accepting = Cursor { last: id(5), added: Some(5) };
        assert_eq!(accepting.check(Some(&facts(9, 3, Some(7), 9)), true), Ok(1));
        assert_eq!(accepting.added, Some(6));
    }
}
