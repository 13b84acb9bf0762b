//! What a verb gets besides its arguments, and what it gives back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use updraft_base::clock::Clock;
use updraft_data::{Access, Cache, CacheOptions, CacheReading, KnownDigests, SharedCacheReading, Told, Wrap};
use updraft_store::{AccessOptions, Objects, Store, StoreError};

use crate::failure::Failure;
use crate::progress::Progress;
use crate::requests::Requests;
use crate::shared_cache::Shared;

/// The world as a verb sees it.
pub struct Context<'a> {
    /// The folder or URL of the artifact store.
    pub store_url: String,
    /// What the environment says about stores: credentials, regions, endpoints, by the names of the variables.
    pub store_settings: BTreeMap<String, String>,
    /// Threads to compute with, at least 1.
    pub threads: usize,
    /// The seed given on the command line.
    pub seed: Option<u64>,
    /// Digests of files that have not changed since they were hashed; `None` where all are hashed.
    pub known_digests: Option<Arc<KnownDigests>>,
    /// What is kept of the objects of datasets; `None` where nothing is.
    pub caches: Option<Caches>,
    /// What was asked of remote stores.
    pub requests: Requests,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Where progress is shown.
    pub progress: &'a Progress<'a>,
}

impl Context<'_> {
    /// The artifact store, made where it does not exist.
    pub fn store(&self) -> Result<Store, StoreError> {
        match self.store_is_remote() {
            true => Ok(Store::on(self.objects(&self.store_url)?)),
            false => Store::open(Path::new(&self.store_url)),
        }
    }

    /// The objects under a URL or in a folder, by the settings of the environment.
    pub fn objects(&self, url: &str) -> Result<Objects, StoreError> {
        let objects = Objects::open(url, &self.store_settings, &self.access_options())?;
        self.requests.watch(&objects);
        Ok(objects)
    }

    /// Where files for people go, such as reports: beside a local store, else where a local store would be.
    pub fn files_dir(&self) -> PathBuf {
        PathBuf::from(if self.store_is_remote() { ".updraft" } else { &self.store_url })
    }

    fn store_is_remote(&self) -> bool {
        self.store_url.contains("://")
    }

    /// How datasets are reached.
    pub fn access(&self) -> Access {
        let wrap = self.caches.as_ref().map(Caches::wrap);
        let requests = self.requests.clone();
        let opened: Told = Arc::new(move |objects| requests.watch(objects));
        let (settings, options) = (self.store_settings.clone(), self.access_options());
        Access {
            settings,
            options,
            wrap,
            opened: Some(opened),
            known: self.known_digests.clone(),
            clock: Some(self.clock.clone()),
            ..Access::default()
        }
    }

    /// Programs that start together must not repeat their requests together.
    fn access_options(&self) -> AccessOptions {
        let jitter_seed = self.clock.now_unix_ms() ^ u64::from(std::process::id()) << 32;
        AccessOptions { jitter_seed, ..AccessOptions::default() }
    }
}

/// The caches around the stores that datasets lie in.
pub struct Caches {
    near: Option<CacheOptions>,
    shared: Option<Shared>,
    opened: Arc<Mutex<Vec<Arc<Cache>>>>,
}

impl Caches {
    /// None yet: each will have a part near by with these options, and the server at this URL behind it.
    ///
    /// # Errors
    /// A URL in a build without Redis.
    pub fn new(near: Option<CacheOptions>, redis: Option<&str>, clock: Arc<dyn Clock>) -> Result<Caches, Failure> {
        let shared = redis.map(|url| Shared::new(url, clock)).transpose()?;
        Ok(Caches { near, shared, opened: Arc::default() })
    }

    fn wrap(&self) -> Wrap {
        let (near, shared, opened) = (self.near.clone(), self.shared.clone(), self.opened.clone());
        Arc::new(move |store| {
            let store = shared.as_ref().map_or_else(|| Ok(store.clone()), |shared| shared.around(store.clone()))?;
            let Some(near) = &near else { return Ok(store) };
            let cache = Arc::new(Cache::new(store, near.clone())?);
            opened.lock().unwrap_or_else(PoisonError::into_inner).push(cache.clone());
            Ok(cache)
        })
    }

    /// What all of those near by have done.
    pub fn reading(&self) -> Option<CacheReading> {
        self.near.as_ref()?;
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        Some(opened.iter().map(|cache| cache.reading()).fold(CacheReading::default(), |sum, one| CacheReading {
            memory_hits: sum.memory_hits + one.memory_hits,
            disk_hits: sum.disk_hits + one.disk_hits,
            fetched_bytes: sum.fetched_bytes + one.fetched_bytes,
            corrupt: sum.corrupt + one.corrupt,
        }))
    }

    /// What the server has done for all of them.
    pub fn shared_reading(&self) -> Option<SharedCacheReading> {
        self.shared.as_ref().map(Shared::reading)
    }
}

/// What a verb has to say.
#[derive(Debug)]
pub struct Answer {
    /// For people; ends with a line feed.
    pub text: String,
    /// For programs: one object.
    pub json: Value,
}
