//! Bytes that last: artifacts, each named by its digest, with a manifest of what it came from.
//!
//! Before a stage runs, everything that determines its result is known: what is asked (the recipe), what it is asked of
//! (the parents' digests) and which versions answer. That is an [`Origin`]. [`Store::find`] asks whether an origin has
//! been answered already, so an unchanged stage is reused and a changed one is not; [`Store::put`] records an answer;
//! [`Store::lineage`] walks from an answer to the questions behind it.
//!
//! # Layout
//!
//! ```text
//! objects/sha256/<2 hex>/<64 hex>               content, named by its digest
//! manifests/<content hex>/<origin hex>.json     what made it; the same bytes may have several origins
//! origins/<origin hex>.json                     the content that last answered this origin
//! pointers/<name>.json                          a name that moves, such as runs/<run>/latest
//! ```
//!
//! # Design
//!
//! [`Objects`] keeps the bytes: in a local folder, where the crate `object_store` stages a file beside its place, syncs it
//! and renames it, or in a bucket. Every write is one object put whole. They go in the order content, manifest, origin, so whatever the moment of a kill or of a full disk, no manifest
//! names missing bytes and no origin a missing manifest; what stays behind is bytes nobody names. Two writers of one
//! artifact write the same bytes to the same places, so either may win. Reading checks the digest.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use object_store::ObjectStore;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use updraft_base::Digest;

mod artifact;
mod error;
mod files;
mod objects;
mod url;

pub use artifact::{Artifact, Origin};
pub use error::StoreError;
pub use files::LocalFiles;
pub use objects::{
    AccessError, AccessOptions, ClassReading, Created, MeterReading, ObjectFacts, Objects, ReadObjects, RequestClass,
    RequestPrices,
};
pub use url::{file_url_path, unescaped};

/// The version of every JSON file in a store. Another version is refused, not guessed at.
const FORMAT: u64 = 1;

/// Artifacts on an object store. Calls block; share a store between threads freely.
#[derive(Debug)]
pub struct Store {
    objects: Objects,
}

impl Store {
    /// The store in a local folder, made where it does not exist.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| StoreError::Open {
            dir: dir.display().to_string(),
            source,
        };
        std::fs::create_dir_all(dir).map_err(|e| unusable(e.into()))?;
        let path = dir.to_str().ok_or_else(|| unusable("its name is not UTF-8".into()))?;
        Ok(Store::on(Objects::open(path, &BTreeMap::new(), &AccessOptions::default())?))
    }

    /// The store under a URL or in a folder that was opened.
    pub fn on(objects: Objects) -> Store {
        Store { objects }
    }

    /// A store over any object store.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// use updraft_store::{Origin, Store};
    ///
    /// let store = Store::over(Arc::new(object_store::memory::InMemory::new()))?;
    /// let origin = Origin { kind: "note".into(), recipe: "say hello".into(), ..Origin::default() };
    /// assert!(store.find(&origin)?.is_none());
    /// let artifact = store.put(&origin, "hello", Default::default())?;
    /// assert_eq!(store.find(&origin)?.as_ref(), Some(&artifact));
    /// assert_eq!(store.get(&artifact.digest)?, "hello");
    /// # Ok::<(), updraft_store::StoreError>(())
    /// ```
    pub fn over(objects: Arc<dyn ObjectStore>) -> Result<Store, StoreError> {
        Ok(Store::on(Objects::over(objects, &AccessOptions::default())?))
    }

    /// Keeps `bytes` as the answer to `origin`. `meta` holds facts about the answer that did not determine it (metrics,
    /// times); they are shown, never compared.
    ///
    /// # Errors
    /// [`StoreError::MissingParent`] where a parent is not in this store: lineage always leads to something.
    pub fn put(
        &self,
        origin: &Origin,
        bytes: impl Into<Bytes>,
        meta: Map<String, Value>,
    ) -> Result<Artifact, StoreError> {
        let bytes = bytes.into();
        check_name("artifact kind", &origin.kind, false)?;
        for parent in &origin.parents {
            if self.artifacts_of(parent)?.is_empty() {
                return Err(StoreError::MissingParent { kind: origin.kind.clone(), parent: *parent });
            }
        }
        let artifact =
            Artifact { digest: Digest::of(&bytes), size_bytes: bytes.len() as u64, origin: origin.clone(), meta };
        let origin_digest = origin.digest();
        self.write(&content_path(&artifact.digest), bytes)?;
        self.write_json(&manifest_path(&artifact.digest, &origin_digest), &artifact)?;
        self.write_json(&origin_path(&origin_digest), &Pointer { digest: artifact.digest })?;
        Ok(artifact)
    }

    /// The content with this digest.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] where the bytes kept under this name have another digest.
    pub fn get(&self, digest: &Digest) -> Result<Bytes, StoreError> {
        let object = content_path(digest);
        let bytes = self.read(&object)?.ok_or_else(|| StoreError::NotFound { what: digest.to_string() })?;
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(StoreError::Corrupt { object, expected: *digest, found, size_bytes: bytes.len() as u64 });
        }
        Ok(bytes)
    }

    /// The artifact that last answered exactly this origin.
    pub fn find(&self, origin: &Origin) -> Result<Option<Artifact>, StoreError> {
        let origin_digest = origin.digest();
        let Some(Pointer { digest }) = self.read_json(&origin_path(&origin_digest))? else { return Ok(None) };
        self.manifest(&digest, &origin_digest)
    }

    /// All artifacts whose content has this digest: one for each origin that gave it, in the order of the origins'
    /// digests. Empty where the store has none.
    pub fn artifacts_of(&self, digest: &Digest) -> Result<Vec<Artifact>, StoreError> {
        self.manifests_below(&format!("manifests/{}", digest.hex()))
    }

    /// What made this artifact: itself and all its ancestors, nearest first, each once.
    pub fn lineage(&self, digest: &Digest) -> Result<Vec<Artifact>, StoreError> {
        let mut lineage: Vec<Artifact> = Vec::new();
        let mut queue = std::collections::VecDeque::from([*digest]);
        let mut seen = std::collections::HashSet::from([*digest]);
        while let Some(next) = queue.pop_front() {
            let artifacts = self.artifacts_of(&next)?;
            if artifacts.is_empty() {
                return Err(StoreError::NotFound { what: next.to_string() });
            }
            for artifact in artifacts {
                queue.extend(artifact.origin.parents.iter().filter(|p| seen.insert(**p)));
                lineage.push(artifact);
            }
        }
        Ok(lineage)
    }

    /// Every artifact, by kind and then by digest.
    pub fn list(&self) -> Result<Vec<Artifact>, StoreError> {
        let mut artifacts = self.manifests_below("manifests")?;
        artifacts.sort_by(|a, b| (&a.origin.kind, a.digest).cmp(&(&b.origin.kind, b.digest)));
        Ok(artifacts)
    }

    /// Makes `name` (segments of letters, digits, `.`, `_`, `-`, joined by `/`) point to an artifact, in one step: a
    /// reader sees the old one or the new one.
    pub fn set_pointer(&self, name: &str, digest: &Digest) -> Result<(), StoreError> {
        check_name("pointer name", name, true)?;
        self.write_json(&pointer_path(name), &Pointer { digest: *digest })
    }

    /// Where `name` points, or `None` where it was never set.
    pub fn pointer(&self, name: &str) -> Result<Option<Digest>, StoreError> {
        check_name("pointer name", name, true)?;
        Ok(self.read_json(&pointer_path(name))?.map(|p: Pointer| p.digest))
    }

    /// Forgets an artifact with all its origins; one that is not there is no error. Nothing checks that no other artifact
    /// names it as a parent and no pointer leads to it: whoever keeps a bounded number of artifacts (checkpoints) knows.
    ///
    /// What is named goes last, so a kill in between leaves bytes that nobody names, never names without bytes.
    pub fn remove(&self, digest: &Digest) -> Result<(), StoreError> {
        for artifact in self.artifacts_of(digest)? {
            let origin_digest = artifact.origin.digest();
            let answer: Option<Pointer> = self.read_json(&origin_path(&origin_digest))?;
            if answer.is_some_and(|p| p.digest == *digest) {
                self.delete(&origin_path(&origin_digest))?;
            }
            self.delete(&manifest_path(digest, &origin_digest))?;
        }
        self.delete(&content_path(digest))
    }

    fn manifest(&self, digest: &Digest, origin_digest: &Digest) -> Result<Option<Artifact>, StoreError> {
        let object = manifest_path(digest, origin_digest);
        let Some(artifact) = self.read_json::<Artifact>(&object)? else { return Ok(None) };
        if artifact.digest != *digest || artifact.origin.digest() != *origin_digest {
            let reason = "it describes another artifact than its name says".into();
            return Err(StoreError::Malformed { object, reason });
        }
        Ok(Some(artifact))
    }

    fn write_json<T: Serialize>(&self, object: &str, body: &T) -> Result<(), StoreError> {
        let file = Versioned { format: FORMAT, body };
        let mut text = serde_json::to_vec_pretty(&file)
            .map_err(|e| StoreError::Malformed { object: object.to_owned(), reason: e.to_string() })?;
        text.push(b'\n');
        self.write(object, text.into())
    }

    fn read_json<T: for<'de> Deserialize<'de>>(&self, object: &str) -> Result<Option<T>, StoreError> {
        let Some(text) = self.read(object)? else { return Ok(None) };
        let malformed =
            |e: serde_json::Error| StoreError::Malformed { object: object.to_owned(), reason: e.to_string() };
        // The version first: a file of another version need not have the fields of this one.
        let FormatOnly { format } = serde_json::from_slice(&text).map_err(malformed)?;
        if format != FORMAT {
            return Err(StoreError::Format { object: object.to_owned(), found: format, known: FORMAT });
        }
        let file: Versioned<T> = serde_json::from_slice(&text).map_err(malformed)?;
        Ok(Some(file.body))
    }

    fn write(&self, object: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.objects.put(object, bytes).map(|_| ()).map_err(|e| relative(object, e))
    }

    fn read(&self, object: &str) -> Result<Option<Bytes>, StoreError> {
        match self.objects.get(object) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(relative(object, error)),
        }
    }

    fn delete(&self, object: &str) -> Result<(), StoreError> {
        self.objects.delete(object).map_err(|e| relative(object, e))
    }

    /// The artifacts of the manifests in a folder, in the order of their names.
    fn manifests_below(&self, folder: &str) -> Result<Vec<Artifact>, StoreError> {
        let digest = |hex: &str| format!("sha256:{hex}").parse::<Digest>().ok();
        let mut artifacts = Vec::new();
        for facts in self.objects.list(folder).map_err(|e| relative(folder, e))? {
            let names = facts
                .key
                .strip_prefix("manifests/")
                .and_then(|name| name.strip_suffix(".json"))
                .and_then(|name| name.split_once('/'))
                .and_then(|(content, origin)| Some((digest(content)?, digest(origin)?)));
            let (content, origin) = names.ok_or(StoreError::Stray { object: facts.key })?;
            artifacts.extend(self.manifest(&content, &origin)?);
        }
        Ok(artifacts)
    }
}

/// Inside a store, an object is named by its place in it.
fn relative(object: &str, error: StoreError) -> StoreError {
    match error {
        StoreError::Write { source, .. } => StoreError::Write { object: object.to_owned(), source },
        StoreError::Read { source, .. } => StoreError::Read { object: object.to_owned(), source },
        other => other,
    }
}

#[derive(Serialize, Deserialize)]
struct Pointer {
    digest: Digest,
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u64,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    format: u64,
    #[serde(flatten)]
    body: T,
}

fn content_path(digest: &Digest) -> String {
    let hex = digest.hex();
    format!("objects/sha256/{}/{hex}", &hex[..2])
}

fn manifest_path(digest: &Digest, origin_digest: &Digest) -> String {
    format!("manifests/{}/{}.json", digest.hex(), origin_digest.hex())
}

fn origin_path(origin_digest: &Digest) -> String {
    format!("origins/{}.json", origin_digest.hex())
}

fn pointer_path(name: &str) -> String {
    format!("pointers/{name}.json")
}

/// Names become paths, so they hold nothing that a path could mean something else by.
fn check_name(what: &'static str, name: &str, segments: bool) -> Result<(), StoreError> {
    let plain = |segment: &str| {
        segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
            && segment.bytes().any(|b| b != b'.')
    };
    let fits = if segments { name.split('/').all(plain) } else { plain(name) };
    if fits { Ok(()) } else { Err(StoreError::Name { what, name: name.to_owned() }) }
}
