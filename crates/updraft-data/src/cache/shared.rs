//! Small objects and what stores say of objects, kept in Redis for all processes around it.
//!
//! # Design
//!
//! A store takes tens of milliseconds to begin an answer, whatever its size; a Redis nearby takes a fraction of one. So what is
//! worth keeping there is small and read by everybody: manifests, indexes, footers, small samples. It has one thread and
//! copies each way, so megabytes are passed on to the store, and to the disk of the cache above.
//!
//! Nothing depends on it. A server that is away or slow is left alone for a while and the store is asked instead; a value
//! that is not what was put is fetched again. Names of values hold the object's URL, version and range, so an object that has
//! changed is another value. What is put was read between two looks at the object that found the same version.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use redis::{Connection, RedisResult, Value};
use serde::{Deserialize, Serialize};
use updraft_base::Clock;
use updraft_store::{ObjectFacts, ReadObjects, StoreError};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::SharedCacheReading;
use crate::error::DataError;
use crate::server::{Server, takes_no_writes};

/// Another number where values are of another form.
const PREFIX: &str = "updraft1:";

const CHECKSUM_BYTES: usize = 8;

/// Connections that are kept open; threads beyond them open their own.
const CONNECTIONS_MAX: usize = 16;

/// Objects whose facts are remembered. Beyond them all are forgotten, and asked for again.
const KNOWN_MAX: usize = 100_000;

/// What is kept, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedCacheOptions {
    /// The server: `redis://[user:password@]host[:port][/][?db=N]`.
    pub url: String,
    /// Bytes of an object or a range, at most.
    pub value_bytes_max: u64,
    /// How long a value stays after it was put.
    pub keep_ms: u64,
    /// How long what the store said of an object is believed: until then, a change may not be seen. 0 asks the store each time.
    /// Manifests are named by their content and never change, so they are believed as long as they are kept.
    pub facts_ms: u64,
    /// How long the server may take for anything.
    pub timeout_ms: u64,
    /// How long a server that was away is not asked.
    pub retry_ms: u64,
}

impl SharedCacheOptions {
    /// Values up to 256 KiB for a day, facts always from the store, and less patience than the store would take.
    pub fn new(url: &str) -> SharedCacheOptions {
        SharedCacheOptions {
            url: url.to_owned(),
            value_bytes_max: 256 << 10,
            keep_ms: 86_400_000,
            facts_ms: 0,
            timeout_ms: 100,
            retry_ms: 5_000,
        }
    }
}

/// Objects of a store, small ones from Redis.
pub struct SharedCache {
    store: Arc<dyn ReadObjects>,
    options: SharedCacheOptions,
    server: Server,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    connections: Vec<Connection>,
    /// When the server may be asked again.
    away_until_ns: u64,
    /// What was last said of objects.
    known: HashMap<String, ObjectFacts>,
    reading: SharedCacheReading,
}

/// [`ObjectFacts`] in a value.
#[derive(Serialize, Deserialize)]
struct KeptFacts {
    bytes: u64,
    etag: Option<String>,
    version: Option<String>,
    modified_ms: u64,
}

impl SharedCache {
    /// Nothing is asked of the server yet.
    ///
    /// # Errors
    /// A URL that names no server.
    pub fn new(
        store: Arc<dyn ReadObjects>,
        options: SharedCacheOptions,
        clock: Arc<dyn Clock>,
    ) -> Result<SharedCache, DataError> {
        let (server, path) = Server::parse(&options.url)?;
        if !path.is_empty() {
            let reason = format!("`/{path}` is too much: a cache has a server and `?db=N`");
            return Err(DataError::Stream { stream: server.name().to_owned(), reason });
        }
        Ok(SharedCache { store, options, server, clock, state: Mutex::default() })
    }

    /// What the cache has done so far.
    pub fn reading(&self) -> SharedCacheReading {
        self.lock().reading
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was last said of an object, asked for where nothing was.
    fn known(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let known = self.lock().known.get(key).cloned();
        known.map_or_else(|| self.facts(key), Ok)
    }

    /// What the store says of an object, for the server to keep.
    fn fresh_facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let facts = self.store.facts(key)?;
        self.remember(&facts);
        let ObjectFacts { bytes, etag, version, modified_ms, .. } = facts.clone();
        if let Ok(value) = serde_json::to_vec(&KeptFacts { bytes, etag, version, modified_ms }) {
            let name = self.name_of(&[b"facts", self.store.name(key).as_bytes()]);
            self.put(&[(name, value.into())], self.facts_ms(key));
        }
        Ok(facts)
    }

    fn remember(&self, facts: &ObjectFacts) {
        let mut state = self.lock();
        if state.known.len() >= KNOWN_MAX {
            state.known.clear();
        }
        state.known.insert(facts.key.clone(), facts.clone());
    }

    /// How long facts of an object may be believed.
    fn facts_ms(&self, key: &str) -> u64 {
        if is_named_by_content(key) { self.options.keep_ms } else { self.options.facts_ms }
    }

    /// The name of a value: a hash of fields, told apart by their lengths.
    fn name_of(&self, fields: &[&[u8]]) -> String {
        let mut hasher = Xxh3::new();
        for field in fields {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field);
        }
        format!("{PREFIX}{:032x}", hasher.digest128())
    }

    /// The name of a range of a version of an object; `None` where the store tells no versions.
    fn range_name(&self, facts: &ObjectFacts, range: &Range<u64>) -> Option<String> {
        let version = facts.etag.as_ref().or(facts.version.as_ref())?;
        let fields = [
            b"bytes".as_slice(),
            &self.store.name(&facts.key).into_bytes(),
            version.as_bytes(),
            &facts.bytes.to_le_bytes(),
            &range.start.to_le_bytes(),
            &range.end.to_le_bytes(),
        ];
        Some(self.name_of(&fields))
    }

    /// Values by name, where they are there and whole.
    fn get(&self, names: &[String]) -> Vec<Option<Bytes>> {
        let answer = self.ask(|connection| redis::cmd("MGET").arg(names).query::<Vec<Value>>(connection));
        let values = answer.unwrap_or_default();
        let mut found = Vec::with_capacity(names.len());
        let mut state = self.lock();
        for (at, name) in names.iter().enumerate() {
            let value = match values.get(at) {
                Some(Value::BulkString(value)) => opened(name, value),
                _ => None,
            };
            match &value {
                Some(value) => {
                    state.reading.hits += 1;
                    state.reading.hit_bytes += value.len() as u64;
                }
                None => {
                    state.reading.misses += 1;
                    state.reading.corrupt += u64::from(matches!(values.get(at), Some(Value::BulkString(_))));
                }
            }
            found.push(value);
        }
        found
    }

    fn put(&self, values: &[(String, Bytes)], keep_ms: u64) {
        if values.is_empty() || keep_ms == 0 {
            return;
        }
        let mut pipe = redis::pipe();
        let mut bytes = 0;
        for (name, value) in values {
            bytes += value.len() as u64;
            pipe.cmd("SET").arg(name).arg(sealed(name, value)).arg("PX").arg(keep_ms).ignore();
        }
        if self.ask(|connection| pipe.query::<()>(connection)).is_some() {
            self.lock().reading.put_bytes += bytes;
        }
    }

    /// Asks the server unless it is away; `None` where it does not answer.
    fn ask<T>(&self, ask: impl FnOnce(&mut Connection) -> RedisResult<T>) -> Option<T> {
        let idle = {
            let mut state = self.lock();
            if self.clock.monotonic_ns() < state.away_until_ns {
                state.reading.away += 1;
                return None;
            }
            state.connections.pop()
        };
        let done = idle.map_or_else(|| self.server.connect(self.options.timeout_ms), Ok).and_then(|mut connection| {
            let answer = ask(&mut connection)?;
            Ok((answer, connection))
        });
        let mut state = self.lock();
        match done {
            Ok((answer, connection)) => {
                if state.connections.len() < CONNECTIONS_MAX {
                    state.connections.push(connection);
                }
                Some(answer)
            }
            // It takes no values, and still has those that it took.
            Err(error) if takes_no_writes(&error) => {
                state.reading.refused += 1;
                None
            }
            Err(_) => {
                state.reading.away += 1;
                state.away_until_ns = self.clock.monotonic_ns() + self.options.retry_ms * 1_000_000;
                // The others were opened to the same server.
                state.connections.clear();
                None
            }
        }
    }

    /// Ranges that are wanted, and are small or of a small object; what is read for them where they are not there.
    fn cached_range(&self, facts: &ObjectFacts, range: &Range<u64>) -> Option<Range<u64>> {
        let is_inside = range.start <= range.end && range.end <= facts.bytes;
        match is_inside {
            true if facts.bytes <= self.options.value_bytes_max => Some(0..facts.bytes),
            true if range.end - range.start <= self.options.value_bytes_max => Some(range.clone()),
            _ => None,
        }
    }
}

impl ReadObjects for SharedCache {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let keep_ms = self.facts_ms(key);
        let name = self.name_of(&[b"facts", self.store.name(key).as_bytes()]);
        if keep_ms > 0
            && let Some(Some(value)) = self.get(std::slice::from_ref(&name)).pop()
            && let Ok(KeptFacts { bytes, etag, version, modified_ms }) = serde_json::from_slice(&value)
        {
            let facts = ObjectFacts { key: key.to_owned(), bytes, etag, version, modified_ms };
            self.remember(&facts);
            return Ok(facts);
        }
        self.fresh_facts(key)
    }

    /// Bytes of the version that is expected, or that [`facts`](ReadObjects::facts) last told of, where they are in the
    /// cache.
    fn read(&self, key: &str, ranges: &[Range<u64>], expected: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        if ranges.iter().all(|range| range.end.saturating_sub(range.start) > self.options.value_bytes_max) {
            return self.store.read(key, ranges, expected);
        }
        let facts = match expected {
            Some(facts) => facts.clone(),
            None => self.known(key)?,
        };
        let kept: Vec<Option<(String, Range<u64>)>> = ranges
            .iter()
            .map(|range| {
                let kept = self.cached_range(&facts, range)?;
                Some((self.range_name(&facts, &kept)?, kept))
            })
            .collect();
        let mut values: HashMap<String, Bytes> = HashMap::new();
        let mut names: Vec<String> = kept.iter().flatten().map(|(name, _)| name.clone()).collect();
        names.sort();
        names.dedup();
        if !names.is_empty() {
            let found = self.get(&names);
            values.extend(names.into_iter().zip(found).filter_map(|(name, value)| Some((name, value?))));
        }
        let is_there =
            |kept: &Option<(String, Range<u64>)>| kept.as_ref().is_some_and(|(name, _)| values.contains_key(name));
        // Bytes of one answer are of one version, so either all come from the cache or none.
        if !kept.iter().all(is_there) {
            let mut wanted: Vec<Range<u64>> = ranges.to_vec();
            for (wanted, kept) in wanted.iter_mut().zip(&kept) {
                if let Some((_, kept)) = kept {
                    *wanted = kept.clone();
                }
            }
            let mut distinct = wanted.clone();
            distinct.sort_by_key(|range| (range.start, range.end));
            distinct.dedup();
            let read = self.store.read(key, &distinct, expected).inspect_err(|error| {
                if matches!(error, StoreError::Changed { .. }) {
                    // What the server has of it is of the past. Where the store does not answer, the next who asks says so.
                    self.fresh_facts(key).ok();
                }
            })?;
            let by_range: HashMap<(u64, u64), Bytes> =
                distinct.iter().map(|range| (range.start, range.end)).zip(read).collect();
            let fresh: HashMap<String, Bytes> = kept
                .iter()
                .flatten()
                .filter(|(name, _)| !values.contains_key(name))
                .filter_map(|(name, kept)| Some((name.clone(), by_range.get(&(kept.start, kept.end))?.clone())))
                .collect();
            if !fresh.is_empty() && (is_named_by_content(key) || self.is_still(&facts)) {
                self.put(&fresh.into_iter().collect::<Vec<_>>(), self.options.keep_ms);
            }
            let cut = |(range, wanted): (&Range<u64>, &Range<u64>)| {
                let bytes = by_range.get(&(wanted.start, wanted.end));
                cut(bytes, wanted, range)
            };
            let parts: Option<Vec<Bytes>> = ranges.iter().zip(&wanted).map(cut).collect();
            // An object that became shorter meanwhile: the store says what is wrong.
            return parts.map_or_else(|| self.store.read(key, ranges, expected), Ok);
        }
        let parts: Option<Vec<Bytes>> = ranges
            .iter()
            .zip(kept.iter().flatten())
            .map(|(range, (name, kept))| cut(values.get(name), kept, range))
            .collect();
        parts.map_or_else(|| self.store.read(key, ranges, expected), Ok)
    }

    fn name(&self, key: &str) -> String {
        self.store.name(key)
    }

    fn foresee(&self, uses: &mut dyn Iterator<Item = (&str, Range<u64>)>) {
        self.store.foresee(uses);
    }

    fn advance(&self, step: u64) {
        self.store.advance(step);
    }
}

impl SharedCache {
    /// Whether an object is still the version of these facts; what it is now is remembered.
    fn is_still(&self, facts: &ObjectFacts) -> bool {
        let Ok(now) = self.store.facts(&facts.key) else { return false };
        self.remember(&now);
        (&now.etag, &now.version, now.bytes) == (&facts.etag, &facts.version, facts.bytes)
    }
}

/// The part `range` of bytes that begin where `of` does.
fn cut(bytes: Option<&Bytes>, of: &Range<u64>, range: &Range<u64>) -> Option<Bytes> {
    let from = usize::try_from(range.start.checked_sub(of.start)?).ok()?;
    let to = usize::try_from(range.end.checked_sub(of.start)?).ok()?;
    let bytes = bytes.filter(|bytes| from <= to && to <= bytes.len())?;
    Some(bytes.slice(from..to))
}

/// Whether an object of this name never changes.
fn is_named_by_content(key: &str) -> bool {
    let digest = key.strip_prefix("manifests/").and_then(|rest| rest.strip_suffix(".json"));
    digest.is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// A value with a checksum over its name, too: one that was put under another name is none.
fn sealed(name: &str, value: &[u8]) -> Vec<u8> {
    [checksum(name, value).as_slice(), value].concat()
}

fn opened(name: &str, sealed: &[u8]) -> Option<Bytes> {
    let (found, value) = sealed.split_at_checked(CHECKSUM_BYTES)?;
    (found == checksum(name, value)).then(|| Bytes::copy_from_slice(value))
}

fn checksum(name: &str, value: &[u8]) -> [u8; CHECKSUM_BYTES] {
    (xxh3_64(name.as_bytes()) ^ xxh3_64(value).rotate_left(1)).to_le_bytes()
}
