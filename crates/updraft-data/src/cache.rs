//! Objects near at hand: memory, then a folder on local disk, around any store.
//!
//! The cache is a store around a store ([`ReadObjects`]), in parts of one size. What it lets go of is what is needed
//! furthest ahead (Belady 1966): the order of samples is known epochs in advance, so the loader foresees which objects
//! are needed at which steps ([`ReadObjects::foresee`]) and says how far it has come ([`ReadObjects::advance`]). A cache that was told
//! nothing keeps what it has until it is full and then fetches the rest each time; to let go of what was used longest ago,
//! as is usual, would lose exactly what comes next.
//!
//! Parts leave memory for the disk, and the disk for good. A part that is asked for by two threads is fetched once.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde::Serialize;
use updraft_store::{ObjectFacts, ReadObjects, StoreError};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::error::DataError;
use disk::{Disk, Found};
use future::{Future, ObjectId};

mod disk;
mod future;
#[cfg(feature = "redis")]
pub(crate) mod shared;

/// How much is kept, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bytes kept in memory.
    pub memory_bytes: u64,
    /// A folder for what memory cannot hold, and the bytes that it may take. Processes may share it.
    pub disk: Option<(PathBuf, u64)>,
    /// What is fetched and kept as one; objects are smaller or cut into parts of this size.
    pub part_bytes: u64,
}

impl Default for CacheOptions {
    /// 256 MiB of memory in parts of 4 MiB, which take longer to transfer than a request to begin.
    fn default() -> CacheOptions {
        CacheOptions { memory_bytes: 256 << 20, disk: None, part_bytes: 4 << 20 }
    }
}

/// What a cache has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CacheReading {
    /// Parts found in memory.
    pub memory_hits: u64,
    /// Parts found on disk.
    pub disk_hits: u64,
    /// Bytes fetched from the store.
    pub fetched_bytes: u64,
    /// Files whose content had changed; each was fetched again.
    pub corrupt: u64,
}

/// What a cache in a server has done, for this program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct SharedCacheReading {
    /// Objects, ranges and facts that were there.
    pub hits: u64,
    /// Those that were not.
    pub misses: u64,
    /// Bytes that were there.
    pub hit_bytes: u64,
    /// Bytes that were put.
    pub put_bytes: u64,
    /// Values that were not what was put; each was fetched from the store.
    pub corrupt: u64,
    /// Requests to keep something that the server refused, because it is full or takes no writes.
    pub refused: u64,
    /// Requests that the server did not answer, and those that it was spared because it was away.
    pub away: u64,
}

/// Objects of a store, some of them at hand.
pub struct Cache {
    store: Arc<dyn ReadObjects>,
    options: CacheOptions,
    disk: Option<Disk>,
    state: Mutex<State>,
    /// A fetch has ended.
    fetched: Condvar,
}

#[derive(Default)]
struct State {
    objects: HashMap<String, ObjectId>,
    known: Vec<Known>,
    future: Future,
    memory: HashMap<(ObjectId, u64), Bytes>,
    memory_bytes: u64,
    /// Files in the folder and what they take, as far as is known: other processes come and go.
    files: HashMap<String, u64>,
    /// Objects by the digest that the names of their files begin with.
    by_digest: HashMap<String, ObjectId>,
    /// Files of objects that nobody here has named yet, by that digest.
    strangers: BTreeMap<String, BTreeSet<String>>,
    disk_bytes: u64,
    /// Bytes written since the folder was last looked at.
    unlisted_bytes: u64,
    fetching: HashSet<(ObjectId, u64)>,
    reading: CacheReading,
}

/// An object that was foreseen or asked for.
#[derive(Default)]
struct Known {
    facts: Option<ObjectFacts>,
    /// Its parts in memory.
    parts: BTreeSet<u64>,
    /// Its files on disk.
    files: BTreeSet<String>,
}

const MEMORY: usize = 0;
const DISK: usize = 1;

impl Cache {
    /// # Errors
    /// A folder that cannot be made or read.
    pub fn new(store: Arc<dyn ReadObjects>, options: CacheOptions) -> Result<Cache, DataError> {
        let options = CacheOptions { part_bytes: options.part_bytes.max(1), ..options };
        let disk = options.disk.as_ref().map(|(dir, _)| Disk::open(dir)).transpose()?;
        let mut state = State::default();
        if let Some(disk) = &disk {
            state.list(disk);
        }
        Ok(Cache { store, options, disk, state: Mutex::new(state), fetched: Condvar::new() })
    }

    /// What the cache has done so far.
    pub fn reading(&self) -> CacheReading {
        self.lock().reading
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of an object, and what the store says of it; asked once.
    fn known(&self, key: &str) -> Result<(ObjectId, ObjectFacts), StoreError> {
        let digest = self.digest_of(key);
        let mut state = self.lock();
        let object = state.object(key, &digest);
        if let Some(facts) = &state.known[object as usize].facts {
            return Ok((object, facts.clone()));
        }
        drop(state);
        let facts = self.store.facts(key)?;
        self.lock().known[object as usize].facts = Some(facts.clone());
        Ok((object, facts))
    }

    /// Parts of an object, from wherever they are.
    fn parts(&self, object: ObjectId, facts: &ObjectFacts, wanted: &[u64]) -> Result<HashMap<u64, Bytes>, StoreError> {
        let mut got: HashMap<u64, Bytes> = HashMap::new();
        loop {
            let mut claimed = Vec::new();
            let mut state = self.lock();
            for part in wanted.iter().filter(|part| !got.contains_key(part)).copied().collect::<Vec<_>>() {
                if let Some(bytes) = state.memory.get(&(object, part)).cloned() {
                    state.reading.memory_hits += 1;
                    got.insert(part, bytes);
                } else if state.fetching.insert((object, part)) {
                    claimed.push(part);
                }
            }
            if got.len() == wanted.len() {
                return Ok(got);
            }
            if claimed.is_empty() {
                // Others fetch all that is missing.
                drop(self.fetched.wait(state).unwrap_or_else(PoisonError::into_inner));
                continue;
            }
            drop(state);
            let claim = Claim { cache: self, object, parts: claimed };
            got.extend(self.bring(object, facts, &claim.parts)?);
        }
    }

    /// Parts that memory lacks, from disk or from the store.
    fn bring(&self, object: ObjectId, facts: &ObjectFacts, parts: &[u64]) -> Result<Vec<(u64, Bytes)>, StoreError> {
        let mut brought = Vec::with_capacity(parts.len());
        let mut missing = Vec::new();
        for part in parts {
            match self.read_from_disk(facts, *part) {
                Some(bytes) => brought.push((*part, bytes)),
                None => missing.push(*part),
            }
        }
        let ranges: Vec<Range<u64>> = missing.iter().map(|part| self.range_of(facts, *part)).collect();
        if !ranges.is_empty() {
            let fetched = self.store.read(&facts.key, &ranges, Some(facts)).inspect_err(|error| {
                if matches!(error, StoreError::Changed { .. }) {
                    // Who asks next is told what it has become.
                    self.lock().known[object as usize].facts = None;
                }
            })?;
            let fetched_bytes: u64 = fetched.iter().map(|b| b.len() as u64).sum();
            self.lock().reading.fetched_bytes += fetched_bytes;
            // Copied, for they may be slices of one large answer, which would stay as long as the last of them.
            brought.extend(missing.iter().zip(fetched).map(|(part, bytes)| (*part, Bytes::copy_from_slice(&bytes))));
        }
        for (part, bytes) in &brought {
            self.keep(object, facts, *part, bytes.clone());
        }
        Ok(brought)
    }

    fn read_from_disk(&self, facts: &ObjectFacts, part: u64) -> Option<Bytes> {
        let disk = self.disk.as_ref()?;
        let name = self.file_of(facts, part);
        let range = self.range_of(facts, part);
        let found = disk.read(&name, (range.end - range.start) as usize);
        let mut state = self.lock();
        match found {
            Found::Part(bytes, file_bytes) => {
                state.reading.disk_hits += 1;
                state.adopt(name, file_bytes);
                return Some(bytes);
            }
            Found::Nothing => {}
            Found::Corrupt => state.reading.corrupt += 1,
        }
        state.forget(&name);
        None
    }

    /// Puts a part in memory, and what is needed later on disk.
    fn keep(&self, object: ObjectId, facts: &ObjectFacts, part: u64, bytes: Bytes) {
        let mut state = self.lock();
        let len = bytes.len() as u64;
        let is_full = state.memory_bytes + len > self.options.memory_bytes;
        if len > self.options.memory_bytes || (is_full && !state.future.is_known()) {
            drop(state);
            self.keep_on_disk(object, facts, part, &bytes);
            return;
        }
        if state.memory.insert((object, part), bytes).is_none() {
            state.memory_bytes += len;
            state.known[object as usize].parts.insert(part);
            state.future.enter(MEMORY, object);
        }
        let mut leaving = Vec::new();
        while state.memory_bytes > self.options.memory_bytes {
            let Some((_, furthest)) = state.future.furthest(MEMORY) else { break };
            let Some(part) = state.known[furthest as usize].parts.pop_last() else { break };
            if state.known[furthest as usize].parts.is_empty() {
                state.future.leave(MEMORY, furthest);
            }
            let Some(bytes) = state.memory.remove(&(furthest, part)) else { break };
            state.memory_bytes -= bytes.len() as u64;
            leaving.extend(state.known[furthest as usize].facts.clone().map(|facts| (furthest, facts, part, bytes)));
        }
        drop(state);
        for (object, facts, part, bytes) in leaving {
            self.keep_on_disk(object, &facts, part, &bytes);
        }
    }

    /// Puts a part on disk, unless all that is there is needed sooner.
    fn keep_on_disk(&self, object: ObjectId, facts: &ObjectFacts, part: u64, bytes: &Bytes) {
        let (Some(disk), Some((_, limit))) = (&self.disk, &self.options.disk) else { return };
        let name = self.file_of(facts, part);
        let file_bytes = disk::file_bytes(bytes);
        let mut state = self.lock();
        if state.files.contains_key(&name) {
            return;
        }
        // Other processes write, too; looked at this often they exceed the limit by little.
        if state.unlisted_bytes > limit / 16 {
            state.list(disk);
        }
        let mut leaving = Vec::new();
        while state.disk_bytes + file_bytes > *limit {
            let Some(other) = state.needed_later_than(object) else { break };
            state.forget(&other);
            leaving.push(other);
        }
        let fits = state.disk_bytes + file_bytes <= *limit;
        if fits {
            // Counted before it is written, so that threads together stay within the limit.
            state.unlisted_bytes += file_bytes;
            state.adopt(name.clone(), file_bytes);
        }
        drop(state);
        leaving.iter().for_each(|name| disk.remove(name));
        if fits && !disk.write(&name, bytes) {
            self.lock().forget(&name);
        }
    }

    fn range_of(&self, facts: &ObjectFacts, part: u64) -> Range<u64> {
        let start = part.saturating_mul(self.options.part_bytes).min(facts.bytes);
        start..start.saturating_add(self.options.part_bytes).min(facts.bytes)
    }

    /// The digest of where an object is, which the names of its files begin with.
    fn digest_of(&self, key: &str) -> String {
        format!("{:016x}", xxh3_64(self.store.name(key).as_bytes()))
    }

    /// The name of a part's file: digests of where the object is, and of all else that decides its content.
    fn file_of(&self, facts: &ObjectFacts, part: u64) -> String {
        let version = (&facts.etag, &facts.version, facts.modified_ms * u64::from(facts.etag.is_none()));
        let content = format!("{:?}", (version, facts.bytes, part, self.options.part_bytes));
        format!("{}{:032x}", self.digest_of(&facts.key), xxh3_128(content.as_bytes()))
    }
}

/// Parts that one thread fetches and others wait for.
struct Claim<'a> {
    cache: &'a Cache,
    object: ObjectId,
    parts: Vec<u64>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        self.parts.iter().for_each(|part| _ = state.fetching.remove(&(self.object, *part)));
        self.cache.fetched.notify_all();
    }
}

impl State {
    fn object(&mut self, key: &str, digest: &str) -> ObjectId {
        if let Some(object) = self.objects.get(key) {
            return *object;
        }
        let object = self.known.len() as ObjectId;
        self.objects.insert(key.to_owned(), object);
        self.by_digest.insert(digest.to_owned(), object);
        let files = self.strangers.remove(digest).unwrap_or_default();
        if !files.is_empty() {
            self.future.enter(DISK, object);
        }
        self.known.push(Known { files, ..Known::default() });
        object
    }

    /// Takes note of a file.
    fn adopt(&mut self, name: String, file_bytes: u64) {
        let Some(digest) = name.get(..16) else { return };
        match self.by_digest.get(digest).copied() {
            Some(object) => {
                self.known[object as usize].files.insert(name.clone());
                self.future.enter(DISK, object);
            }
            None => _ = self.strangers.entry(digest.to_owned()).or_default().insert(name.clone()),
        }
        self.disk_bytes += file_bytes;
        self.disk_bytes -= self.files.insert(name, file_bytes).unwrap_or(0);
    }

    /// A file is gone, or about to go.
    fn forget(&mut self, name: &str) {
        let Some(file_bytes) = self.files.remove(name) else { return };
        self.disk_bytes -= file_bytes;
        let digest = name.get(..16).unwrap_or_default();
        if let Some(object) = self.by_digest.get(digest).copied() {
            let files = &mut self.known[object as usize].files;
            files.remove(name);
            if files.is_empty() {
                self.future.leave(DISK, object);
            }
        } else if let Some(files) = self.strangers.get_mut(digest) {
            files.remove(name);
            if files.is_empty() {
                self.strangers.remove(digest);
            }
        }
    }

    /// Looks at what is in the folder.
    fn list(&mut self, disk: &Disk) {
        self.unlisted_bytes = 0;
        let found = disk.list();
        let gone: Vec<String> = self.files.keys().filter(|name| !found.contains_key(*name)).cloned().collect();
        gone.iter().for_each(|name| self.forget(name));
        found.into_iter().for_each(|(name, file_bytes)| self.adopt(name, file_bytes));
    }

    /// A file that is needed later than this object, the latest of all. What nobody here has named is of other runs.
    fn needed_later_than(&self, object: ObjectId) -> Option<String> {
        if !self.future.is_known() {
            return None;
        }
        if let Some(stranger) = self.strangers.values().find_map(BTreeSet::first) {
            return Some(stranger.clone());
        }
        let (next_use, furthest) = self.future.furthest(DISK)?;
        let is_later = next_use > self.future.next_use(object);
        is_later.then(|| self.known[furthest as usize].files.last().cloned()).flatten()
    }
}

impl ReadObjects for Cache {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        self.known(key).map(|(_, facts)| facts)
    }

    fn read(&self, key: &str, ranges: &[Range<u64>], expected: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        let (object, facts) = self.known(key)?;
        let size = self.options.part_bytes;
        let is_other = expected.is_some_and(|wanted| (&wanted.etag, wanted.bytes) != (&facts.etag, facts.bytes));
        if is_other || ranges.iter().any(|range| range.start > range.end || range.end > facts.bytes) {
            // The store says best what is wrong with them, or has the version that is wanted.
            return self.store.read(key, ranges, expected);
        }
        let parts_of = |range: &Range<u64>| range.start / size..range.end.div_ceil(size).max(range.start / size);
        let mut wanted: Vec<u64> = ranges.iter().filter(|r| !r.is_empty()).flat_map(parts_of).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let parts = self.parts(object, &facts, &wanted)?;
        let piece = |range: &Range<u64>, part: u64| -> Bytes {
            let start = part * size;
            let Some(bytes) = parts.get(&part) else { return Bytes::new() };
            let (from, to) = (range.start.max(start) - start, (range.end - start).min(bytes.len() as u64));
            bytes.slice(from as usize..to as usize)
        };
        let whole = |range: &Range<u64>| -> Bytes {
            let pieces: Vec<Bytes> =
                parts_of(range).filter(|_| !range.is_empty()).map(|part| piece(range, part)).collect();
            match <[Bytes; 1]>::try_from(pieces) {
                Ok([one]) => one,
                Err(pieces) => pieces.concat().into(),
            }
        };
        Ok(ranges.iter().map(whole).collect())
    }

    fn name(&self, key: &str) -> String {
        self.store.name(key)
    }

    fn foresee(&self, uses: &mut dyn Iterator<Item = (&str, Range<u64>)>) {
        let mut state = self.lock();
        for (key, steps) in uses {
            let object = state.object(key, &self.digest_of(key));
            state.future.expect(object, steps);
        }
    }

    fn advance(&self, step: u64) {
        self.lock().future.advance(step);
    }
}

#[cfg(test)]
mod tests;
