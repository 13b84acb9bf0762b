//! The cache that many machines share, in a Redis server: `--cache-redis`, in builds that have it.

use std::sync::Arc;

use updraft_base::Clock;
use updraft_data::{DataError, SharedCacheReading};
use updraft_store::ReadObjects;

use crate::failure::Failure;

/// A server, and the stores that it stands before.
#[derive(Clone)]
#[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "there is none without the feature"))]
pub(crate) struct Shared {
    #[cfg(feature = "redis")]
    options: updraft_data::SharedCacheOptions,
    #[cfg(feature = "redis")]
    opened: Arc<std::sync::Mutex<Vec<Arc<updraft_data::SharedCache>>>>,
    clock: Arc<dyn Clock>,
}

#[cfg(not(feature = "redis"))]
impl Shared {
    pub(crate) fn new(_: &str, _: Arc<dyn Clock>) -> Result<Shared, Failure> {
        Err(Failure::new(
            crate::failure::Kind::Unsupported,
            "this program was built without Redis, so `--cache-redis` has none",
        )
        .hint("build it with the feature `redis`: `cargo build --release --features redis`"))
    }

    pub(crate) fn around(&self, store: Arc<dyn ReadObjects>) -> Result<Arc<dyn ReadObjects>, DataError> {
        Ok(store)
    }

    pub(crate) fn reading(&self) -> SharedCacheReading {
        SharedCacheReading::default()
    }
}

#[cfg(feature = "redis")]
impl Shared {
    pub(crate) fn new(url: &str, clock: Arc<dyn Clock>) -> Result<Shared, Failure> {
        Ok(Shared { options: updraft_data::SharedCacheOptions::new(url), opened: Arc::default(), clock })
    }

    pub(crate) fn around(&self, store: Arc<dyn ReadObjects>) -> Result<Arc<dyn ReadObjects>, DataError> {
        let cache = updraft_data::SharedCache::new(store, self.options.clone(), self.clock.clone())?;
        let cache = Arc::new(cache);
        self.opened.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(cache.clone());
        Ok(cache)
    }

    /// What the server has done for all datasets of a verb.
    pub(crate) fn reading(&self) -> SharedCacheReading {
        let opened = self.opened.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        opened.iter().map(|cache| cache.reading()).fold(SharedCacheReading::default(), |sum, one| SharedCacheReading {
            hits: sum.hits + one.hits,
            misses: sum.misses + one.misses,
            hit_bytes: sum.hit_bytes + one.hit_bytes,
            put_bytes: sum.put_bytes + one.put_bytes,
            corrupt: sum.corrupt + one.corrupt,
            refused: sum.refused + one.refused,
            away: sum.away + one.away,
        })
    }
}
