//! An object store around another, in process, that fails by a schedule.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::schedule::{Fault, Operation, Schedule};

/// Longer than any client waits.
const STALL: Duration = Duration::from_secs(3600);

/// An object store that meets the faults of a [`Schedule`] in front of another one.
///
/// ```
/// # use std::sync::Arc;
/// use object_store::memory::InMemory;
/// use updraft_sim::{FaultRates, FaultyStore, Schedule};
///
/// let schedule = Arc::new(Schedule::new(7, FaultRates::all(0.3)));
/// let store = FaultyStore::new(Arc::new(InMemory::new()), schedule.clone());
/// // … give `Arc::new(store)` to what is tested, then
/// println!("{:?} in {} requests", schedule.counts(), schedule.requests());
/// ```
#[derive(Debug, Clone)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    schedule: Arc<Schedule>,
}

impl FaultyStore {
    /// Faults by `schedule` in front of `inner`, which itself stays as it is: look there for what really happened.
    pub fn new(inner: Arc<dyn ObjectStore>, schedule: Arc<Schedule>) -> FaultyStore {
        FaultyStore { inner, schedule }
    }

    /// Runs a request that answers without a body.
    async fn answer<T>(
        &self,
        operation: Operation,
        object: &str,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        match self.schedule.next(operation, object) {
            None => request.await,
            Some(Fault::Slow(ms)) => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                request.await
            }
            Some(fault @ (Fault::AnswerLost | Fault::Reset)) => {
                // Done or refused by the store below: either way the client does not hear of it.
                request
                    .await
                    .map(drop)
                    .or_else(|e| if matches!(e, Error::Generic { .. }) { Err(e) } else { Ok(()) })?;
                Err(failed(fault, object))
            }
            Some(fault @ Fault::Stalled) => {
                if self.schedule.coin(object) {
                    request.await?;
                }
                tokio::time::sleep(STALL).await;
                Err(failed(fault, object))
            }
            Some(fault) => Err(failed(fault, object)),
        }
    }
}

fn failed(fault: Fault, object: &str) -> Error {
    Error::Generic { store: "FaultyStore", source: format!("{fault:?} by schedule at {object}").into() }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty {}", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.answer(Operation::Put, location.as_ref(), self.inner.put_opts(location, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.answer(Operation::Multipart, location.as_ref(), self.inner.put_multipart_opts(location, options)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let object = location.as_ref();
        if options.head {
            return self.answer(Operation::Head, object, self.inner.get_opts(location, options)).await;
        }
        let fault = self.schedule.next(Operation::Get, object);
        match fault {
            None => return self.inner.get_opts(location, options).await,
            Some(Fault::Slow(ms)) => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                return self.inner.get_opts(location, options).await;
            }
            Some(fault @ Fault::Stalled) => {
                tokio::time::sleep(STALL).await;
                return Err(failed(fault, object));
            }
            Some(fault @ (Fault::SlowDown | Fault::InternalError | Fault::AnswerLost)) => {
                return Err(failed(fault, object));
            }
            Some(Fault::Reset | Fault::Truncated | Fault::WrongEtag) => {}
        }
        let GetResult { payload, mut meta, range, attributes, extensions } =
            self.inner.get_opts(location, options).await?;
        let whole = GetResult {
            payload,
            meta: meta.clone(),
            range: range.clone(),
            attributes: attributes.clone(),
            extensions: extensions.clone(),
        };
        let bytes = whole.bytes().await?;
        let half = bytes.slice(..bytes.len() / 2);
        let chunks: Vec<Result<Bytes>> = match fault {
            Some(fault @ Fault::Reset) => vec![Ok(half), Err(failed(fault, object))],
            Some(Fault::Truncated) => vec![Ok(half)],
            _ => {
                meta.e_tag = Some("\"another\"".into());
                vec![Ok(bytes)]
            }
        };
        let payload = GetResultPayload::Stream(stream::iter(chunks).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        locations
            .and_then(move |location| {
                let this = this.clone();
                async move {
                    this.answer(Operation::Delete, location.as_ref(), this.inner.delete(&location)).await?;
                    Ok(location)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let folder = prefix.map_or("", |p| p.as_ref()).to_owned();
        let listed = self.inner.list(prefix);
        match self.schedule.next(Operation::List, &folder) {
            None | Some(Fault::Slow(_)) => listed,
            // Some of the listing, then a break.
            Some(fault) => listed.take(3).chain(stream::iter([Err(failed(fault, &folder))])).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let folder = prefix.map_or("", |p| p.as_ref());
        self.answer(Operation::List, folder, self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.answer(Operation::Put, to.as_ref(), self.inner.copy_opts(from, to, options)).await
    }
}
