//! Objects under a URL or a local folder: what datasets and artifacts are read from and written to.
//!
//! An object store is not a file system: objects are put whole, have no folders, and change only by being replaced. The
//! interface is therefore small, blocks, and says in its types what the store promises: a read never mixes two versions
//! of an object, [`Objects::create`] has one winner, [`Objects::update`] replaces exactly the version that was read.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion};

use crate::StoreError;

/// How a store is accessed. The default is what production wants.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessOptions {
    /// How often a failed request is repeated, at most.
    pub retries: u32,
    /// How long one request may take before it counts as failed, for a body of no length; each MiB adds a second.
    pub timeout_ms: u64,
    /// Whether a read that takes longer than 95 % of its like is asked a second time, the first answer winning.
    pub hedge: bool,
    /// Ranges of one object that lie at most this far apart are fetched by one request.
    pub coalesce_gap_bytes: u64,
    /// What one request fetches or uploads at most; larger objects go in parts, in parallel.
    pub part_bytes: u64,
    /// Requests in flight, at most.
    pub concurrency: usize,
    /// Seed of the jitter between retries; processes that start together need different ones.
    pub jitter_seed: u64,
}

impl Default for AccessOptions {
    fn default() -> AccessOptions {
        AccessOptions {
            retries: 8,
            timeout_ms: 20_000,
            hedge: true,
            // 1 MiB at 100 MB/s costs as much as the 10 ms another request takes to begin.
            coalesce_gap_bytes: 1 << 20,
            part_bytes: 8 << 20,
            concurrency: 32,
            jitter_seed: 0,
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

/// What readers of datasets need; [`Objects`] has it, and so has a cache around one.
pub trait ReadObjects: Send + Sync {
    /// What the store says of an object.
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError>;
    /// The bytes of ranges of an object, in the order of the ranges, all of one version.
    fn read(&self, key: &str, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, StoreError>;
    /// How messages name an object: its URL.
    fn name(&self, key: &str) -> String;
}

/// Objects under a URL or a local folder. Calls block; share freely between threads. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Objects {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    url: String,
    prefix: String,
    store: Arc<dyn ObjectStore>,
    runtime: tokio::runtime::Runtime,
    #[expect(dead_code, reason = "read by the access loop")]
    options: AccessOptions,
}

impl Objects {
    /// Opens `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `http(s)://…`, `file:///…`, a plain path
    /// (made where it does not exist) or `memory:`.
    pub fn open(
        url: &str,
        settings: &BTreeMap<String, String>,
        options: &AccessOptions,
    ) -> Result<Objects, StoreError> {
        let _ = settings;
        let folder = match url.split_once("://") {
            None if url == "memory:" => {
                return Objects::build("memory:".into(), Arc::new(InMemory::new()), options);
            }
            None => PathBuf::from(url),
            Some(("file", path)) => PathBuf::from(path),
            Some((scheme, _)) => {
                return Err(StoreError::Open {
                    dir: url.to_owned(),
                    source: format!("the scheme `{scheme}` is not known").into(),
                });
            }
        };
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| StoreError::Open {
            dir: folder.display().to_string(),
            source,
        };
        std::fs::create_dir_all(&folder).map_err(|e| unusable(e.into()))?;
        // Synced writes: what `put` returned must survive a power cut.
        let store = LocalFileSystem::new_with_prefix(&folder).map_err(|e| unusable(e.into()))?.with_fsync(true);
        Objects::build(folder.display().to_string(), Arc::new(store), options)
    }

    /// Any object store, for tests.
    pub fn over(store: Arc<dyn ObjectStore>, options: &AccessOptions) -> Result<Objects, StoreError> {
        Objects::build(store.to_string(), store, options)
    }

    /// What was opened.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// The objects whose keys begin with the segments of `prefix`, sorted by key.
    pub fn list(&self, prefix: &str) -> Result<Vec<ObjectFacts>, StoreError> {
        let path = self.path(prefix)?;
        let listed = self.inner.runtime.block_on(self.inner.store.list(Some(&path)).try_collect::<Vec<_>>());
        let mut facts: Vec<ObjectFacts> =
            listed.map_err(|e| self.read_error(prefix, e))?.iter().map(|meta| self.facts_of(meta)).collect();
        facts.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(facts)
    }

    /// What the store says of an object.
    pub fn head(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let meta = self.inner.runtime.block_on(self.inner.store.head(&self.path(key)?));
        Ok(self.facts_of(&meta.map_err(|e| self.read_error(key, e))?))
    }

    /// The whole object.
    pub fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        let path = self.path(key)?;
        self.inner
            .runtime
            .block_on(async { self.inner.store.get(&path).await?.bytes().await })
            .map_err(|e| self.read_error(key, e))
    }

    /// The bytes of ranges of an object, in the order of the ranges. Near ranges are fetched together. All bytes are of one
    /// version: that of `expected`, where given, else the one found.
    pub fn get_ranges(
        &self,
        key: &str,
        ranges: &[Range<u64>],
        expected: Option<&ObjectFacts>,
    ) -> Result<Vec<Bytes>, StoreError> {
        let path = self.path(key)?;
        let if_match = expected.and_then(|facts| facts.etag.clone());
        let fetch = async |range: &Range<u64>| {
            if range.is_empty() {
                return Ok(Bytes::new());
            }
            let options = GetOptions {
                range: Some(GetRange::Bounded(range.clone())),
                if_match: if_match.clone(),
                ..GetOptions::default()
            };
            self.inner.store.get_opts(&path, options).await?.bytes().await
        };
        ranges
            .iter()
            .map(|range| self.inner.runtime.block_on(fetch(range)).map_err(|e| self.read_error(key, e)))
            .collect()
    }

    /// Puts an object whole, replacing what was there.
    pub fn put(&self, key: &str, bytes: Bytes) -> Result<ObjectFacts, StoreError> {
        let path = self.path(key)?;
        self.inner.runtime.block_on(self.inner.store.put(&path, bytes.into())).map_err(|e| self.write_error(key, e))?;
        self.head(key)
    }

    /// Puts an object that must not exist yet: of several who try, exactly one gets [`Created::New`].
    pub fn create(&self, key: &str, bytes: Bytes) -> Result<Created, StoreError> {
        let path = self.path(key)?;
        let options = PutOptions::from(PutMode::Create);
        match self.inner.runtime.block_on(self.inner.store.put_opts(&path, bytes.into(), options)) {
            Ok(_) => Ok(Created::New),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(Created::Exists),
            Err(e) => Err(self.write_error(key, e)),
        }
    }

    /// Replaces an object if it is still the version `expected`; `false` where it is not.
    pub fn update(&self, key: &str, bytes: Bytes, expected: &ObjectFacts) -> Result<bool, StoreError> {
        let path = self.path(key)?;
        let version = UpdateVersion { e_tag: expected.etag.clone(), version: expected.version.clone() };
        let options = PutOptions::from(PutMode::Update(version));
        match self.inner.runtime.block_on(self.inner.store.put_opts(&path, bytes.into(), options)) {
            Ok(_) => Ok(true),
            Err(object_store::Error::Precondition { .. } | object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(self.write_error(key, e)),
        }
    }

    /// Deletes an object; one that is not there is no error.
    pub fn delete(&self, key: &str) -> Result<(), StoreError> {
        match self.inner.runtime.block_on(self.inner.store.delete(&self.path(key)?)) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.write_error(key, e)),
        }
    }

    fn build(url: String, store: Arc<dyn ObjectStore>, options: &AccessOptions) -> Result<Objects, StoreError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("objects")
            .enable_all()
            .build()
            .map_err(|e| StoreError::Open { dir: url.clone(), source: e.into() })?;
        let inner = Inner { url, prefix: String::new(), store, runtime, options: options.clone() };
        Ok(Objects { inner: Arc::new(inner) })
    }

    fn path(&self, key: &str) -> Result<ObjectPath, StoreError> {
        let prefix = &self.inner.prefix;
        let full = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}/{key}") };
        ObjectPath::parse(full).map_err(|e| StoreError::Key {
            key: key.to_owned(),
            url: self.inner.url.clone(),
            reason: e.to_string(),
        })
    }

    fn facts_of(&self, meta: &object_store::ObjectMeta) -> ObjectFacts {
        let key = meta.location.as_ref();
        ObjectFacts {
            key: key.strip_prefix(&self.inner.prefix).unwrap_or(key).trim_start_matches('/').to_owned(),
            bytes: meta.size,
            etag: meta.e_tag.clone(),
            version: meta.version.clone(),
            modified_ms: u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0),
        }
    }

    fn read_error(&self, key: &str, source: object_store::Error) -> StoreError {
        match source {
            object_store::Error::NotFound { .. } => StoreError::NotFound { what: self.name(key) },
            object_store::Error::Precondition { .. } => StoreError::Changed { object: self.name(key) },
            source => StoreError::Read { object: self.name(key), source },
        }
    }

    fn write_error(&self, key: &str, source: object_store::Error) -> StoreError {
        StoreError::Write { object: self.name(key), source }
    }
}

impl ReadObjects for Objects {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        self.head(key)
    }

    fn read(&self, key: &str, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, StoreError> {
        self.get_ranges(key, ranges, None)
    }

    fn name(&self, key: &str) -> String {
        format!("{}/{key}", self.inner.url.trim_end_matches('/'))
    }
}
