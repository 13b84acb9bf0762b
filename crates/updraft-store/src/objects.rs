//! Objects under a URL or a local folder: what datasets and artifacts are read from and written to.
//!
//! An object store is not a file system: objects are put whole, have no folders, and change only by being replaced. The
//! interface is therefore small, blocks, and says in its types what the store promises: a read never mixes two versions
//! of an object, [`Objects::create`] has one winner, [`Objects::update`] replaces exactly the version that was read.
//!
//! Every request goes through one loop (`access.rs`) that repeats what may be repeated, asks late reads a second time,
//! and counts. What fails in the end says which object, what was tried, and what may mend it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use object_store::ObjectStore;

use crate::StoreError;

mod access;
mod connection;
mod diagnosis;
mod local;
mod meter;
mod open;
mod options;
mod price;
mod profile;
mod ranges;
mod transfer;
mod wire;

pub use diagnosis::AccessError;
pub use meter::{ClassReading, MeterReading, RequestClass};
pub use options::{AccessOptions, Created, ObjectFacts, ReadObjects};
pub use price::RequestPrices;

use access::Access;
use open::{Backend, Provider};
use transfer::Transfer;

/// Objects under a URL or a local folder. Calls block; share freely between threads. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Objects {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    transfer: Transfer,
    /// Local folders need none: their calls run on the thread that asks.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Objects {
    /// Opens `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `http(s)://…`, `file:///folder`, a path
    /// or `memory:`. A folder that does not exist is made by the first write. Nothing is asked of a service yet.
    ///
    /// `settings` are environment variables, in capitals, and settings for this store, in lower case, which win: `endpoint`,
    /// `region`, `access_key_id` and so on, named as the crate `object_store` names them.
    ///
    /// ```
    /// use std::collections::BTreeMap;
    /// use updraft_store::{AccessOptions, Created, Objects};
    ///
    /// let objects = Objects::open("memory:", &BTreeMap::new(), &AccessOptions::default())?;
    /// objects.put("a/b", "hello".into())?;
    /// assert_eq!(objects.get_ranges("a/b", &[1..3, 0..1], None)?, ["el", "h"]);
    /// assert_eq!(objects.create("a/b", "again".into())?, Created::Exists);
    /// # Ok::<(), updraft_store::StoreError>(())
    /// ```
    ///
    /// # Errors
    /// [`StoreError::Url`], [`StoreError::Setting`] and [`StoreError::Open`] for what cannot be a store.
    pub fn open(
        url: &str,
        settings: &BTreeMap<String, String>,
        options: &AccessOptions,
    ) -> Result<Objects, StoreError> {
        Objects::build(open::open(url, settings)?, options)
    }

    /// Any object store.
    pub fn over(store: Arc<dyn ObjectStore>, options: &AccessOptions) -> Result<Objects, StoreError> {
        Objects::build(open::over(store), options)
    }

    /// What was opened.
    pub fn url(&self) -> &str {
        &self.inner.transfer.backend.url
    }

    /// The objects below `prefix`, sorted by key. A prefix is whole segments: `a` has `a/b` below it, and not `ab`.
    pub fn list(&self, prefix: &str) -> Result<Vec<ObjectFacts>, StoreError> {
        self.wait(|transfer| transfer.list(prefix))
    }

    /// What the store says of an object.
    pub fn head(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        self.wait(|transfer| transfer.head(key))
    }

    /// The whole object; a large one in parts, side by side.
    pub fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.wait(|transfer| transfer.get(key))
    }

    /// The bytes of ranges of an object, in the order of the ranges. Near ranges are fetched together. All bytes are of one
    /// version: that of `expected`, where given, else one that was there meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Changed`] where the object is no longer what was expected, [`StoreError::Range`] for a range that ends
    /// after the object.
    pub fn get_ranges(
        &self,
        key: &str,
        ranges: &[Range<u64>],
        expected: Option<&ObjectFacts>,
    ) -> Result<Vec<Bytes>, StoreError> {
        self.wait(|transfer| transfer.get_ranges(key, ranges, expected))
    }

    /// Puts an object whole, replacing what was there; a large one in parts, which are aborted if one fails.
    pub fn put(&self, key: &str, bytes: Bytes) -> Result<ObjectFacts, StoreError> {
        self.wait(|transfer| transfer.put(key, bytes))
    }

    /// Puts an object that must not exist yet, by one request: of several who try, exactly one gets [`Created::New`].
    ///
    /// That holds also where answers are lost: then the object is read back, and is ours if it has our bytes. So writers
    /// whose bytes are the same may each be told that theirs are new.
    pub fn create(&self, key: &str, bytes: Bytes) -> Result<Created, StoreError> {
        self.wait(|transfer| transfer.create(key, bytes))
    }

    /// Replaces an object if it is still the version `expected`; `false` where it is not, or is gone, and ours was not
    /// written. Where an answer is lost, the object is read back, and ours was written if it has our bytes.
    ///
    /// # Errors
    /// [`StoreError::Undetermined`] where an answer was lost and somebody else has written since. What is updated by several
    /// should therefore show in its bytes what was done to it.
    ///
    /// In local folders, updates exclude each other between processes too; a plain [`put`](Objects::put) at the same moment
    /// may still be replaced.
    pub fn update(&self, key: &str, bytes: Bytes, expected: &ObjectFacts) -> Result<bool, StoreError> {
        self.wait(|transfer| transfer.update(key, bytes, expected))
    }

    /// Writes an object once more in another storage tier, by the provider's name for it, if it is still the version
    /// `expected`; `false` where it is not, or is gone. It is read and put whole, so it passes through this machine.
    ///
    /// # Errors
    /// [`StoreError::Tier`] for stores without tiers and objects that one request cannot put.
    pub fn set_tier(&self, key: &str, tier: &str, expected: &ObjectFacts) -> Result<bool, StoreError> {
        self.wait(|transfer| transfer.set_tier(key, tier, expected))
    }

    /// Deletes an object; one that is not there is no error.
    pub fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.wait(|transfer| transfer.delete(key))
    }

    /// What was asked of the store since it was opened, and what that costs.
    pub fn meter(&self) -> MeterReading {
        let transfer = &self.inner.transfer;
        let prices = RequestPrices::of(transfer.backend.provider.scheme());
        transfer.access.meter.reading(prices.as_ref())
    }

    fn build(backend: Backend, options: &AccessOptions) -> Result<Objects, StoreError> {
        let direct = backend.provider == Provider::Local;
        let runtime = match direct {
            true => None,
            false => Some(
                tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(options.io_threads.max(1))
                    .thread_name("objects")
                    .enable_all()
                    .build()
                    .map_err(|e| StoreError::Open { dir: backend.url.clone(), source: e.into() })?,
            ),
        };
        let transfer = Transfer { backend, access: Access::new(options, direct) };
        Ok(Objects { inner: Arc::new(Inner { transfer, runtime }) })
    }

    /// Runs a call to its end on this thread.
    fn wait<'a, T: Send, F: Future<Output = Result<T, StoreError>>>(
        &'a self,
        call: impl FnOnce(&'a Transfer) -> F + Send,
    ) -> Result<T, StoreError> {
        let run = || {
            let call = call(&self.inner.transfer);
            match &self.inner.runtime {
                Some(runtime) => runtime.block_on(call),
                // Outside of a runtime the local store does its work while it is polled.
                None => call.now_or_never().unwrap_or_else(|| {
                    let source = "a local folder did not answer at once".into();
                    Err(StoreError::Open { dir: self.url().to_owned(), source })
                }),
            }
        };
        if tokio::runtime::Handle::try_current().is_err() {
            return run();
        }
        // A thread of somebody's runtime must not block on another runtime.
        std::thread::scope(|scope| match scope.spawn(run).join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The plain drop waits for the runtime's threads, which panics on a thread of another runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl ReadObjects for Objects {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        self.head(key)
    }

    fn read(&self, key: &str, ranges: &[Range<u64>], expected: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        self.get_ranges(key, ranges, expected)
    }

    fn name(&self, key: &str) -> String {
        self.inner.transfer.name(key)
    }
}
