//! A dataset that others append to while it is read.
//!
//! A version of a dataset has the shards of the one before and others behind them, so the blocks of all shards are one
//! list that only grows at its end, and a row has the same number in every version. A reader needs to know no more of a
//! version than how far it goes, and waits where it does not go far enough.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use updraft_base::{Clock, Digest, Hasher, SystemClock};
use updraft_store::ReadObjects;

use crate::config::{DatasetConfig, Follow};
use crate::error::DataError;
use crate::manifest::{ShardFacts, Version, latest};
use crate::rows::Cells;
use crate::schema::Schema;
use crate::source::place::Place;
use crate::source::resolve::shards_of;
use crate::source::sharded::{Parts, Sharded};
use crate::source::{Access, Opened, Source, Wanted};

/// How often who waits looks whether it is to stop.
const STOP_MS: u64 = 50;

pub(crate) struct Growing {
    /// Without a cache, which would go on telling of the version that it knows.
    versions: Arc<dyn ReadObjects>,
    common: Common,
    follow: Follow,
    /// Rows of the blocks of the first shard: what the dataset is known by, however far it has grown.
    first_blocks: Vec<u64>,
    now: RwLock<Arc<Grown>>,
    /// One looks, and others wait for what it finds; when it was done last.
    looked_ns: Mutex<Option<u64>>,
    clock: Arc<dyn Clock>,
}

/// What all versions have in common.
struct Common {
    name: PathBuf,
    objects: Arc<dyn ReadObjects>,
    schema: Arc<Schema>,
    columns: Vec<usize>,
    memory_bytes: u64,
    request_bytes: u64,
    verify: bool,
}

/// The dataset as it was when somebody last looked.
struct Grown {
    version: Digest,
    facts: Vec<ShardFacts>,
    /// First row of each block, and the number of rows at the end.
    starts: Arc<[u64]>,
    source: Sharded,
}

/// Opens a dataset that is followed.
///
/// # Errors
/// One without a manifest, whose shards nobody promises to keep.
pub(crate) fn open(
    config: &DatasetConfig,
    follow: &Follow,
    base: &Path,
    wanted: &Wanted,
    access: &Access,
) -> Result<Opened, DataError> {
    let place = Place::of(&config.path, base, access)?;
    let name = place.name.clone();
    let bare = Access { wrap: None, ..access.clone() };
    let versions = place.objects(&bare)?;
    let found = if place.is_folder() { Version::read(&versions, None)? } else { None };
    let Some(version) = found else {
        let reason = "cannot be followed: it has no manifest; make it with `data ingest --append` or `data follow`";
        return Err(DataError::file(&name, reason));
    };
    let schema = Arc::new(version.manifest.schema.clone());
    let (columns, places) = wanted.among(&schema.names())?;
    let common = Common {
        objects: place.objects(access)?,
        request_bytes: place.request_bytes(),
        name,
        schema,
        columns: places,
        memory_bytes: config.memory_bytes,
        verify: config.verify,
    };
    let now = common.grown(version)?;
    let first = now.facts.first().map(ShardFacts::block_rows).unwrap_or_default();
    let digest = digest_of(&now.facts[..1]);
    let growing = Growing {
        versions,
        common,
        follow: follow.clone(),
        first_blocks: first,
        now: RwLock::new(Arc::new(now)),
        looked_ns: Mutex::default(),
        clock: access.clock.clone().unwrap_or_else(|| Arc::new(SystemClock::new())),
    };
    Ok(Opened { source: Box::new(growing), columns, digest, vocabulary: None, classes: None })
}

/// Over what shards hold, not where they lie.
fn digest_of(shards: &[ShardFacts]) -> Digest {
    let mut hasher = Hasher::new();
    for ShardFacts { format, bytes, samples, xxh3, sha256, .. } in shards {
        let content = format!("{format} {bytes} {samples} {xxh3:?} {sha256:?}");
        hasher.field(content.as_bytes());
    }
    hasher.finish()
}

impl Common {
    fn grown(&self, version: Version) -> Result<Grown, DataError> {
        let source = Sharded::new(Parts {
            name: self.name.clone(),
            objects: self.objects.clone(),
            schema: self.schema.clone(),
            columns: self.columns.clone(),
            shards: shards_of(&version),
            memory_bytes: self.memory_bytes,
            request_bytes: self.request_bytes,
            verify: self.verify,
        })?;
        let mut starts = vec![0];
        starts.extend(source.block_rows().iter().scan(0, |sum, rows| {
            *sum += rows;
            Some(*sum)
        }));
        Ok(Grown { version: version.digest, facts: version.manifest.shards, starts: starts.into(), source })
    }
}

impl Growing {
    fn now(&self) -> Arc<Grown> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there are more than so many blocks; looks for a newer version unless somebody just did.
    fn look(&self, blocks: usize) -> Result<bool, DataError> {
        let mut looked_ns = self.looked_ns.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.now();
        if before.starts.len() > blocks + 1 {
            return Ok(true);
        }
        let now_ns = self.clock.monotonic_ns();
        let fresh_ns = self.follow.poll_ms.saturating_mul(1_000_000) / 2;
        if looked_ns.is_some_and(|at_ns| now_ns.saturating_sub(at_ns) < fresh_ns) {
            return Ok(false);
        }
        *looked_ns = Some(now_ns);
        let gone = || DataError::file(&self.common.name, "has no manifest any more");
        if latest(&*self.versions)?.ok_or_else(gone)? == before.version {
            return Ok(false);
        }
        let version = Version::read(&self.versions, None)?.ok_or_else(gone)?;
        let shards = &version.manifest.shards;
        if let Some((was, is)) = before.facts.iter().zip(shards).find(|(was, is)| was != is) {
            let reason = format!(
                "was replaced while it was followed: the version {} has the shard `{}` where `{}` was",
                version.digest, is.key, was.key
            );
            return Err(DataError::file(&self.common.name, reason));
        }
        if shards.len() < before.facts.len() {
            let reason = format!("the version {} has lost shards while it was followed", version.digest);
            return Err(DataError::file(&self.common.name, reason));
        }
        let grown = self.common.grown(version)?;
        let is_larger = grown.starts.len() > before.starts.len();
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(grown);
        Ok(is_larger)
    }
}

impl Source for Growing {
    /// Those of the first shard.
    fn block_rows(&self) -> &[u64] {
        &self.first_blocks
    }

    fn resident_bytes(&self, blocks: u64) -> u64 {
        self.now().source.resident_bytes(blocks)
    }

    fn bounds(&self, column: usize, row: u64) -> Option<(f64, f64)> {
        self.now().source.bounds(column, row)
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        self.now().source.read(columns, rows)
    }

    fn row_name(&self, row: u64) -> String {
        self.now().source.row_name(row)
    }

    fn grown(&self, blocks: usize, is_stopped: &dyn Fn() -> bool) -> Result<Arc<[u64]>, DataError> {
        let mut waited_ms = 0;
        loop {
            let starts = self.now().starts.clone();
            if starts.len() > blocks {
                return Ok(starts);
            }
            if self.look(starts.len() - 1)? {
                waited_ms = 0;
                continue;
            }
            if waited_ms >= self.follow.wait_s.saturating_mul(1000) {
                let rows = starts.last().copied().unwrap_or(0);
                let reason = format!(
                    "has {rows} rows in {} blocks, of which {blocks} are needed now, and none was appended for {} s \
                     (`follow.wait_s`)",
                    starts.len() - 1,
                    self.follow.wait_s
                );
                return Err(DataError::file(&self.common.name, reason));
            }
            let poll_ms = self.follow.poll_ms.max(1);
            for slept_ms in (0..poll_ms).step_by(STOP_MS as usize) {
                if is_stopped() {
                    return Err(DataError::file(&self.common.name, "is not waited for any more"));
                }
                self.clock.sleep_ms(STOP_MS.min(poll_ms - slept_ms));
            }
            waited_ms += poll_ms;
        }
    }

    fn digest_until(&self, row: u64) -> Option<Digest> {
        let now = self.now();
        let mut first = 0;
        let begins_before = |facts: &&ShardFacts| {
            let is_used = first < row.max(1);
            first += facts.samples;
            is_used
        };
        let used = now.facts.iter().take_while(begins_before).count();
        Some(digest_of(&now.facts[..used]))
    }
}
