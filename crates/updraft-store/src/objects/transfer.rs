//! How objects are read and written, request by request.

use std::ops::Range;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, TryStreamExt, stream};
use object_store::list::PaginatedListOptions;
use object_store::path::Path as ObjectPath;
use object_store::{
    Attribute, Attributes, Error, GetOptions, GetRange, GetResult, GetResultPayload, ObjectMeta, ObjectStoreExt,
    PutMode, PutOptions, PutPayload, PutResult, UpdateVersion,
};
use updraft_base::Clock;

use super::access::{Access, Exhausted, Failure};
use super::diagnosis::diagnose;
use super::local;
use super::meter::RequestClass;
use super::open::{Backend, Provider};
use super::options::{Created, ObjectFacts};
use super::ranges::plan;
use crate::StoreError;

/// S3 takes no part but the last that is smaller, and no more than 10,000 of them.
const UPLOAD_PART_BYTES_MIN: u64 = 5 << 20;
const UPLOAD_PARTS_MAX: u64 = 10_000;

/// What one request puts, at most: the least of the providers' limits, S3's 5 GiB.
const PUT_BYTES_MAX: u64 = 5 << 30;

/// How often an upload in parts is begun anew when the store lost it.
const UPLOADS_MAX: usize = 3;

/// A store and the way to it: what [`Objects`](super::Objects) runs its calls on.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) backend: Backend,
    pub(super) access: Access,
}

/// An answer to a read: what was there, and the object's facts.
struct Piece {
    bytes: Bytes,
    etag: Option<String>,
}

/// What a whole read found.
enum Whole {
    Bytes(Bytes),
    /// Too long for one request; in local folders, a file that is open.
    Large(ObjectMeta),
}

impl Transfer {
    /// The URL of an object.
    pub(super) fn name(&self, key: &str) -> String {
        match self.backend.url.ends_with(':') || self.backend.url.is_empty() {
            true => format!("{}{key}", self.backend.url),
            false => format!("{}/{key}", self.backend.url),
        }
    }

    pub(super) async fn list(&self, prefix: &str) -> Result<Vec<ObjectFacts>, StoreError> {
        let path = self.path(prefix)?;
        let mut facts: Vec<ObjectFacts> = match &self.backend.pages {
            Some(pages) => {
                // A listing by text would find `a-b/c` under `a`.
                let folder = (!path.as_ref().is_empty()).then(|| format!("{path}/"));
                let mut metas = Vec::new();
                let mut page_token = None;
                loop {
                    let page = self.request(RequestClass::List, 0, prefix, async || {
                        let options = PaginatedListOptions { page_token: page_token.clone(), ..Default::default() };
                        Ok(pages.0.list_paginated(folder.as_deref(), options).await?)
                    });
                    let page = page.await?;
                    metas.extend(page.result.objects);
                    page_token = page.page_token;
                    if page_token.is_none() {
                        break metas;
                    }
                }
            }
            None => {
                let listed = self.request(RequestClass::List, 0, prefix, async || {
                    Ok(self.backend.store.list(Some(&path)).try_collect::<Vec<_>>().await?)
                });
                listed.await?
            }
        }
        .iter()
        .map(|meta| self.facts_of(meta))
        .collect();
        facts.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(facts)
    }

    pub(super) async fn head(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let path = self.path(key)?;
        let head = self.request(RequestClass::Head, 0, key, async || Ok(self.backend.store.head(&path).await?));
        Ok(self.facts_of(&head.await?))
    }

    pub(super) async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        for _ in 0..self.access.options.retries {
            match self.get_once(key).await {
                // It was replaced between the first answer and the parts: nobody asked for that very version.
                Err(StoreError::Changed { .. }) => {}
                done => return done,
            }
        }
        self.get_once(key).await
    }

    async fn get_once(&self, key: &str) -> Result<Bytes, StoreError> {
        let path = self.path(key)?;
        let part_bytes = self.access.options.part_bytes;
        let whole = self.request(RequestClass::Get, part_bytes, key, async || {
            let result = self.backend.store.get(&path).await?;
            let bytes = result.meta.size;
            if let GetResultPayload::File(file, _) = result.payload {
                // Exactly one range gives exactly one answer.
                let mut whole = local::read_ranges(file, std::slice::from_ref(&(0..bytes))).map_err(io_failure)?;
                self.access.meter.read(bytes);
                return Ok(Whole::Bytes(whole.pop().unwrap_or_default()));
            }
            if bytes > 2 * part_bytes {
                return Ok(Whole::Large(result.meta));
            }
            Ok(Whole::Bytes(self.body(result, bytes).await?))
        });
        match whole.await? {
            Whole::Bytes(bytes) => Ok(bytes),
            Whole::Large(meta) => {
                let facts = self.facts_of(&meta);
                let mut whole = self.get_ranges(key, std::slice::from_ref(&(0..facts.bytes)), Some(&facts)).await?;
                Ok(whole.pop().unwrap_or_default())
            }
        }
    }

    pub(super) async fn get_ranges(
        &self,
        key: &str,
        ranges: &[Range<u64>],
        expected: Option<&ObjectFacts>,
    ) -> Result<Vec<Bytes>, StoreError> {
        let path = self.path(key)?;
        if let Some(facts) = expected
            && let Some(range) = ranges.iter().find(|range| range.end > facts.bytes)
        {
            return Err(StoreError::Range { object: self.name(key), range: range.clone(), bytes: facts.bytes });
        }
        if self.backend.folder.is_some() {
            return self.get_local_ranges(key, &path, ranges, expected).await;
        }
        let options = &self.access.options;
        let plan = plan(ranges, options.coalesce_gap_bytes, options.part_bytes);
        let mut pin = expected.and_then(|facts| facts.etag.clone());
        // Without a tag, the time of the last change is all that tells versions apart; answers have it in seconds.
        let modified_s = expected.filter(|facts| facts.etag.is_none()).map(|facts| facts.modified_ms / 1000);
        let mut confirmed = false;
        for _ in 0..=options.retries {
            let fetched: Result<Vec<Piece>, StoreError> = stream::iter(
                plan.fetches.iter().map(|range| self.fetch(key, &path, range, pin.as_deref(), modified_s)),
            )
            .buffered(options.concurrency.max(1))
            .try_collect()
            .await;
            match fetched {
                Ok(pieces) if pin.is_some() || pieces.windows(2).all(|pair| pair[0].etag == pair[1].etag) => {
                    let answers: Vec<Bytes> = pieces.into_iter().map(|piece| piece.bytes).collect();
                    return Ok(plan.assemble(ranges, &answers));
                }
                Ok(_) | Err(StoreError::Changed { .. }) => {}
                Err(error) => return Err(error),
            }
            // Pieces of several versions, or not of the one that was wanted. What is there now decides: it is an error where
            // the caller wanted another version, or where it said so before; else all is read again, of this version.
            let now = self.head(key).await?;
            let wanted = expected.is_none_or(|facts| facts.etag == now.etag);
            if now.etag.is_none() || !wanted || (expected.is_some() && confirmed) {
                return Err(StoreError::Changed { object: self.name(key), expected: pin, found: now.etag });
            }
            confirmed = true;
            pin = now.etag;
        }
        Err(StoreError::Changed { object: self.name(key), expected: pin, found: None })
    }

    /// One range by one request, of the version `pin` or the time `modified_s` if there is one.
    async fn fetch(
        &self,
        key: &str,
        path: &ObjectPath,
        range: &Range<u64>,
        pin: Option<&str>,
        modified_s: Option<u64>,
    ) -> Result<Piece, StoreError> {
        let length = range.end - range.start;
        let attempt = async || {
            let options = GetOptions {
                range: Some(GetRange::Bounded(range.clone())),
                // A weak tag never matches (RFC 9110, 13.1.1); then comparing below is all there is.
                if_match: pin.filter(|etag| !etag.starts_with("W/")).map(str::to_owned),
                ..GetOptions::default()
            };
            let result = self.backend.store.get_opts(path, options).await?;
            if let (Some(pin), Some(found)) = (pin, &result.meta.e_tag)
                && pin != found
            {
                return Err(Failure::Version { expected: pin.to_owned(), found: found.clone() });
            }
            let found_s = u64::try_from(result.meta.last_modified.timestamp()).unwrap_or(0);
            if let Some(expected_s) = modified_s.filter(|expected_s| *expected_s != found_s) {
                let of = |seconds: u64| format!("of {seconds} s");
                return Err(Failure::Version { expected: of(expected_s), found: of(found_s) });
            }
            let (etag, size, given) = (result.meta.e_tag.clone(), result.meta.size, result.range.clone());
            if given != *range {
                return Ok(Err(size));
            }
            let bytes = self.body(result, length).await?;
            Ok(Ok(Piece { bytes, etag }))
        };
        let beyond = |bytes| StoreError::Range { object: self.name(key), range: range.clone(), bytes };
        let exhausted = match self.access.request(RequestClass::Get, length, attempt).await {
            Ok(given) => return given.map_err(beyond),
            Err(exhausted) => exhausted,
        };
        let changed = matches!(exhausted.failure, Failure::Version { .. } | Failure::Store(Error::Precondition { .. }));
        if changed {
            let expected = pin.map(str::to_owned);
            return Err(StoreError::Changed { object: self.name(key), expected, found: None });
        }
        if exhausted.failure.is_past_the_end(&exhausted.answer) {
            return Err(beyond(self.head(key).await?.bytes));
        }
        Err(self.read_error(key, exhausted))
    }

    async fn get_local_ranges(
        &self,
        key: &str,
        path: &ObjectPath,
        ranges: &[Range<u64>],
        expected: Option<&ObjectFacts>,
    ) -> Result<Vec<Bytes>, StoreError> {
        let length = ranges.iter().map(|range| range.end.saturating_sub(range.start)).sum();
        let opened = self.request(RequestClass::Get, length, key, async || {
            let result = self.backend.store.get(path).await?;
            let meta = result.meta;
            let GetResultPayload::File(file, _) = result.payload else {
                return Err(io_failure(std::io::Error::other("not a file")));
            };
            let pinned = expected.and_then(|facts| facts.etag.as_ref());
            let same = pinned.is_none_or(|etag| meta.e_tag.as_ref() == Some(etag));
            let inside = ranges.iter().all(|range| range.end <= meta.size);
            let bytes = if same && inside { local::read_ranges(file, ranges).map_err(io_failure)? } else { Vec::new() };
            Ok((meta, same, bytes))
        });
        let (meta, same, bytes) = opened.await?;
        if !same {
            let expected = expected.and_then(|facts| facts.etag.clone());
            return Err(StoreError::Changed { object: self.name(key), expected, found: meta.e_tag });
        }
        if let Some(range) = ranges.iter().find(|range| range.end > meta.size) {
            return Err(StoreError::Range { object: self.name(key), range: range.clone(), bytes: meta.size });
        }
        self.access.meter.read(length);
        Ok(bytes)
    }

    pub(super) async fn put(&self, key: &str, bytes: Bytes) -> Result<ObjectFacts, StoreError> {
        let path = self.path(key)?;
        if self.backend.parts.is_some() && bytes.len() as u64 > 2 * self.upload_part_bytes(0) {
            return self.put_in_parts(key, &path, bytes).await;
        }
        let done = self.put_with(&path, &bytes, PutMode::Overwrite.into()).await;
        let put = done.map_err(|e| self.write_error(key, e))?;
        self.put_facts(key, bytes.len() as u64, put).await
    }

    pub(super) async fn create(&self, key: &str, bytes: Bytes) -> Result<Created, StoreError> {
        let path = self.path(key)?;
        match self.put_with(&path, &bytes, PutMode::Create.into()).await {
            Ok(_) => Ok(Created::New),
            Err(Exhausted { failure: Failure::Store(Error::AlreadyExists { .. }), attempts, .. }) => {
                // An attempt that seemed to fail may have been the one that made it.
                let ours = attempts > 1 && self.holds(key, &bytes).await?;
                Ok(if ours { Created::New } else { Created::Exists })
            }
            Err(exhausted) => Err(self.write_error(key, exhausted)),
        }
    }

    pub(super) async fn update(&self, key: &str, bytes: Bytes, expected: &ObjectFacts) -> Result<bool, StoreError> {
        let path = self.path(key)?;
        if let Some(folder) = &self.backend.folder {
            return self.update_local(key, &path, bytes, expected, folder).await;
        }
        self.update_as(key, &path, bytes, expected, Attributes::new()).await
    }

    pub(super) async fn set_tier(&self, key: &str, tier: &str, expected: &ObjectFacts) -> Result<bool, StoreError> {
        let path = self.path(key)?;
        if !matches!(self.backend.provider, Provider::S3 | Provider::Gcs | Provider::Azure) {
            return Err(StoreError::Tier { object: self.name(key), reason: "its store has no tiers".into() });
        }
        if expected.bytes > PUT_BYTES_MAX {
            let reason = format!("one request puts at most {PUT_BYTES_MAX} bytes, and it has {}", expected.bytes);
            return Err(StoreError::Tier { object: self.name(key), reason });
        }
        let got = self
            .access
            .request(RequestClass::Get, expected.bytes, async || {
                let options = GetOptions { if_match: expected.etag.clone(), ..GetOptions::default() };
                let got = self.backend.store.get_opts(&path, options).await?;
                let (size, attributes) = (got.meta.size, got.attributes.clone());
                Ok((self.body(got, size).await?, attributes))
            })
            .await;
        let (bytes, mut attributes) = match got {
            Ok(got) => got,
            Err(Exhausted { failure: Failure::Store(Error::Precondition { .. } | Error::NotFound { .. }), .. }) => {
                return Ok(false);
            }
            Err(exhausted) => return Err(self.read_error(key, exhausted)),
        };
        attributes.insert(Attribute::StorageClass, tier.to_owned().into());
        self.update_as(key, &path, bytes, expected, attributes).await
    }

    /// Replaces the version `expected`, with what the store is told besides the bytes.
    async fn update_as(
        &self,
        key: &str,
        path: &ObjectPath,
        bytes: Bytes,
        expected: &ObjectFacts,
        attributes: Attributes,
    ) -> Result<bool, StoreError> {
        let mut version = UpdateVersion { e_tag: expected.etag.clone(), version: expected.version.clone() };
        if self.backend.provider == Provider::Gcs && version.version.is_none() {
            // Its listings do not give the generation, which its condition needs.
            let now = match self.head(key).await {
                Err(StoreError::NotFound { .. }) => return Ok(false),
                now => now?,
            };
            if now.etag != expected.etag {
                return Ok(false);
            }
            version.version = now.version;
        }
        let options = PutOptions { mode: PutMode::Update(version), attributes, ..PutOptions::default() };
        match self.put_with(path, &bytes, options).await {
            Ok(_) => Ok(true),
            Err(Exhausted {
                failure: Failure::Store(Error::Precondition { .. } | Error::NotFound { .. }),
                attempts,
                ..
            }) => match attempts > 1 {
                false => Ok(false),
                true if self.holds(key, &bytes).await? => Ok(true),
                true => Err(StoreError::Undetermined { object: self.name(key) }),
            },
            Err(exhausted) => Err(self.write_error(key, exhausted)),
        }
    }

    async fn update_local(
        &self,
        key: &str,
        path: &ObjectPath,
        bytes: Bytes,
        expected: &ObjectFacts,
        folder: &std::path::Path,
    ) -> Result<bool, StoreError> {
        let failed = |e: std::io::Error| self.write_error(key, io_exhausted(e));
        if !folder.exists() {
            return Ok(false);
        }
        let lock = local::UpdateLock::take(folder).map_err(failed)?;
        let now = match self.head(key).await {
            Err(StoreError::NotFound { .. }) => return Ok(false),
            now => now?,
        };
        if now.etag != expected.etag {
            return Ok(false);
        }
        let file = object_store::local::LocalFileSystem::new()
            .path_to_filesystem(path)
            .map_err(|e| self.write_error(key, io_exhausted(std::io::Error::other(e))))?;
        lock.replace(&file, &bytes).map_err(failed)?;
        self.access.meter.written(bytes.len() as u64);
        Ok(true)
    }

    pub(super) async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key)?;
        let delete = async || Ok(self.backend.store.delete(&path).await?);
        match self.access.request(RequestClass::Delete, 0, delete).await {
            Ok(_) | Err(Exhausted { failure: Failure::Store(Error::NotFound { .. }), .. }) => Ok(()),
            Err(exhausted) => Err(self.write_error(key, exhausted)),
        }
    }

    async fn put_with(&self, path: &ObjectPath, bytes: &Bytes, options: PutOptions) -> Result<PutResult, Exhausted> {
        let length = bytes.len() as u64;
        let done = self
            .access
            .request(RequestClass::Put, length, async || {
                Ok(self.backend.store.put_opts(path, PutPayload::from(bytes.clone()), options.clone()).await?)
            })
            .await?;
        self.access.meter.written(length);
        Ok(done)
    }

    fn upload_part_bytes(&self, length: u64) -> u64 {
        self.access.options.part_bytes.max(UPLOAD_PART_BYTES_MIN).max(length.div_ceil(UPLOAD_PARTS_MAX))
    }

    /// Parts side by side, then all of them at once; nothing of a failed upload stays.
    async fn put_in_parts(&self, key: &str, path: &ObjectPath, bytes: Bytes) -> Result<ObjectFacts, StoreError> {
        for _ in 0..UPLOADS_MAX {
            let done = match self.upload(path, &bytes).await {
                Ok(done) => done,
                Err(exhausted) => return Err(self.write_error(key, exhausted)),
            };
            if let Some(put) = done {
                self.access.meter.written(bytes.len() as u64);
                return self.put_facts(key, bytes.len() as u64, put).await;
            }
            // The store no longer knows the upload: a completion whose answer was lost, or one that somebody aborted.
            if self.holds(key, &bytes).await? {
                return self.head(key).await;
            }
        }
        Err(StoreError::Changed { object: self.name(key), expected: None, found: None })
    }

    /// One upload in parts; `None` where the store does not know of it when it is completed.
    async fn upload(&self, path: &ObjectPath, bytes: &Bytes) -> Result<Option<PutResult>, Exhausted> {
        let Some(store) = self.backend.parts.as_ref().map(|parts| &parts.0) else { return Ok(None) };
        let begin = async || Ok(store.create_multipart(path).await?);
        let id = self.access.request(RequestClass::Multipart, 0, begin).await?;
        let part_bytes = self.upload_part_bytes(bytes.len() as u64) as usize;
        let parts: Vec<Bytes> = (0..bytes.len())
            .step_by(part_bytes)
            .map(|start| bytes.slice(start..(start + part_bytes).min(bytes.len())))
            .collect();
        let uploaded = stream::iter(parts.iter().enumerate().map(|(i, part)| {
            let id = &id;
            self.access.request(RequestClass::Put, part.len() as u64, async move || {
                Ok(store.put_part(path, id, i, PutPayload::from(part.clone())).await?)
            })
        }))
        .buffered(self.access.options.concurrency.max(1))
        .try_collect::<Vec<_>>()
        .await;
        let failed = match uploaded {
            Ok(parts) => {
                let complete = async || Ok(store.complete_multipart(path, &id, parts.clone()).await?);
                match self.access.request(RequestClass::Multipart, 0, complete).await {
                    Ok(put) => return Ok(Some(put)),
                    Err(Exhausted { failure: Failure::Store(Error::NotFound { .. }), .. }) => return Ok(None),
                    Err(exhausted) => exhausted,
                }
            }
            Err(exhausted) => exhausted,
        };
        // What made the upload fail is the error to report; what may stay of it then is the business of the bucket's own
        // rule for unfinished uploads.
        let abort = async || Ok(store.abort_multipart(path, &id).await?);
        let _ = self.access.request(RequestClass::Multipart, 0, abort).await;
        Err(failed)
    }

    /// Whether an object has exactly these bytes.
    async fn holds(&self, key: &str, bytes: &Bytes) -> Result<bool, StoreError> {
        let facts = match self.head(key).await {
            Err(StoreError::NotFound { .. }) => return Ok(false),
            facts => facts?,
        };
        if facts.bytes != bytes.len() as u64 {
            return Ok(false);
        }
        // Boxed, because a large read asks for parts of itself.
        Ok(self.get(key).boxed_local().await? == *bytes)
    }

    async fn put_facts(&self, key: &str, length: u64, put: PutResult) -> Result<ObjectFacts, StoreError> {
        if put.e_tag.is_none() {
            return self.head(key).await;
        }
        Ok(ObjectFacts {
            key: key.to_owned(),
            bytes: length,
            etag: put.e_tag,
            version: put.version,
            modified_ms: self.access.clock.now_unix_ms(),
        })
    }

    /// A body that has the length that was announced. It is counted whether it has or not: the provider sent it.
    async fn body(&self, result: GetResult, expected: u64) -> Result<Bytes, Failure> {
        let bytes = result.bytes().await?;
        let found = bytes.len() as u64;
        self.access.meter.read(found);
        if found == expected { Ok(bytes) } else { Err(Failure::Truncated { expected, found }) }
    }

    /// A read whose failure is an error of the object.
    async fn request<T>(
        &self,
        class: RequestClass,
        bytes: u64,
        key: &str,
        send: impl AsyncFn() -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        self.access.request(class, bytes, send).await.map_err(|exhausted| self.read_error(key, exhausted))
    }

    fn read_error(&self, key: &str, exhausted: Exhausted) -> StoreError {
        let object = self.name(key);
        let bucket_is_there = !matches!(exhausted.answer.code.as_deref(), Some("NoSuchBucket" | "ContainerNotFound"));
        match &exhausted.failure {
            Failure::Store(Error::NotFound { .. }) if bucket_is_there && exhausted.class != RequestClass::List => {
                StoreError::NotFound { what: object }
            }
            _ => StoreError::Read { object, source: diagnose(&self.backend, &self.access.clock, &exhausted).into() },
        }
    }

    fn write_error(&self, key: &str, exhausted: Exhausted) -> StoreError {
        let source = diagnose(&self.backend, &self.access.clock, &exhausted).into();
        StoreError::Write { object: self.name(key), source }
    }

    fn path(&self, key: &str) -> Result<ObjectPath, StoreError> {
        let prefix = &self.backend.prefix;
        let separator = if prefix.is_empty() || key.is_empty() { "" } else { "/" };
        ObjectPath::parse(format!("{prefix}{separator}{key}")).map_err(|e| StoreError::Key {
            key: key.to_owned(),
            url: self.backend.url.clone(),
            reason: e.to_string(),
        })
    }

    fn facts_of(&self, meta: &ObjectMeta) -> ObjectFacts {
        let full = meta.location.as_ref();
        let key = full.strip_prefix(&self.backend.prefix).unwrap_or(full);
        ObjectFacts {
            key: key.strip_prefix('/').unwrap_or(key).to_owned(),
            bytes: meta.size,
            etag: meta.e_tag.clone(),
            version: meta.version.clone(),
            modified_ms: u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0),
        }
    }
}

fn io_failure(error: std::io::Error) -> Failure {
    Failure::Store(Error::Generic { store: "local folder", source: error.into() })
}

fn io_exhausted(error: std::io::Error) -> Exhausted {
    let (class, failure) = (RequestClass::Put, io_failure(error));
    Exhausted { class, failure, answer: Default::default(), attempts: 1, elapsed_ms: 0 }
}
