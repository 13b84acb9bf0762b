//! What a caller may set, and what a store says of an object.

use std::ops::Range;

use bytes::Bytes;

use crate::StoreError;

/// How a store is accessed. The default is what production wants.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessOptions {
    /// How often a failed request is repeated, at most.
    pub retries: u32,
    /// The wait before the first repetition is drawn from zero to this; the bound doubles each time, up to
    /// [`backoff_ms_max`](AccessOptions::backoff_ms_max).
    pub backoff_ms: u64,
    /// The longest wait between repetitions.
    pub backoff_ms_max: u64,
    /// Seed of those waits. Processes that start together need different ones, or they return together.
    pub jitter_seed: u64,
    /// How long one request may take, its body apart.
    pub timeout_ms: u64,
    /// How fast a body must at least flow; what it may take for that is added to the timeout.
    pub bytes_per_s_min: u64,
    /// Whether a read that takes longer than 95 % of its like is asked a second time, the first answer winning.
    pub hedge: bool,
    /// Ranges of one object that lie at most this far apart are fetched by one request.
    pub coalesce_gap_bytes: u64,
    /// What one request fetches or uploads at most; larger objects go in parts, in parallel.
    pub part_bytes: u64,
    /// Requests in flight, at most.
    pub concurrency: usize,
    /// Threads that drive connections and decrypt.
    pub io_threads: usize,
}

impl Default for AccessOptions {
    fn default() -> AccessOptions {
        AccessOptions {
            // Waits of 0.05, 0.1, … 6.4 s on average: a service may be away for 12 s without anybody noticing.
            retries: 8,
            backoff_ms: 100,
            backoff_ms_max: 20_000,
            jitter_seed: 0,
            timeout_ms: 20_000,
            bytes_per_s_min: 1 << 20,
            hedge: true,
            // 1 MiB at 100 MB/s costs as much as the 10 ms another request takes to begin.
            coalesce_gap_bytes: 1 << 20,
            part_bytes: 8 << 20,
            concurrency: 32,
            io_threads: 2,
        }
    }
}

/// What a store says of an object without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectFacts {
    /// The name below the URL of the store.
    pub key: String,
    /// The length.
    pub bytes: u64,
    /// Changes whenever the content does.
    pub etag: Option<String>,
    /// The version, where the store keeps versions.
    pub version: Option<String>,
    /// When the content was last replaced, in milliseconds since 1970-01-01T00:00:00Z; what [`Objects::put`] gives has the
    /// time of this machine.
    ///
    /// [`Objects::put`]: crate::Objects::put
    pub modified_ms: u64,
}

/// The answer of a conditional create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// The object did not exist; now it has our bytes.
    New,
    /// The object exists with bytes that are not ours.
    Exists,
}

/// What readers of datasets need; [`Objects`](crate::Objects) has it, and so has a cache around one.
pub trait ReadObjects: Send + Sync {
    /// What the store says of an object.
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError>;
    /// The bytes of ranges of an object, in the order of the ranges, all of one version; of the version `expected` where
    /// one is given.
    fn read(&self, key: &str, ranges: &[Range<u64>], expected: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError>;
    /// How messages name an object: its URL.
    fn name(&self, key: &str) -> String;
    /// The objects that steps to come need, by when they are needed first. A cache lets go of what is needed last; a
    /// store has no use for it.
    fn foresee(&self, _uses: &mut dyn Iterator<Item = (&str, Range<u64>)>) {}
    /// All steps before this one are done.
    fn advance(&self, _step: u64) {}
}
