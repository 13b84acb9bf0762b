//! From the path of a recipe to shards: a manifest, an index of MDS, or whatever objects a folder, a pattern or a file name.
//!
//! Objects without a manifest are frozen into one in memory: their sizes, rows, blocks and columns as they are now. What
//! is frozen is told from the objects themselves, so equal content is the same dataset wherever it lies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use updraft_base::{Digest, digest::Hasher};
use updraft_store::{ReadObjects, StoreError};

use crate::config::{DatasetConfig, Format};
use crate::error::DataError;
use crate::manifest::{ShardFacts, Version};
use crate::schema::{Column, Kind, Schema};
use crate::source::mds::index as mds_index;
use crate::source::place::Place;
use crate::source::shard::{ReadOptions, ShardFormat, ShardReader};
use crate::source::sharded::{Parts, Shard, Sharded};
use crate::source::{Access, Opened, Wanted, folder, mds, open_shard_known, shard_digest, verify_shard};

/// A dataset's shards before columns are chosen.
pub(crate) struct Resolved {
    pub place: Place,
    pub objects: Arc<dyn ReadObjects>,
    pub schema: Arc<Schema>,
    pub shards: Vec<Shard>,
    /// The digest of the content.
    pub digest: Digest,
    /// The version of the manifest, where there is one.
    pub version: Option<Digest>,
}

/// Opens what lies at a place as a source.
pub(crate) fn open(
    config: &DatasetConfig,
    place: Place,
    wanted: &Wanted,
    access: &Access,
) -> Result<Opened, DataError> {
    let format = config.format.as_ref().and_then(Format::shard_format);
    if format == Some(ShardFormat::Folder) {
        return folder::open_listed(&place, wanted, config.memory_bytes, access);
    }
    let request_bytes = place.request_bytes();
    let Resolved { place, objects, schema, shards, digest, .. } = resolve(place, format, config.memory_bytes, access)?;
    let (columns, places) = wanted.among(&schema.names())?;
    let parts = Parts {
        name: place.name,
        objects,
        schema,
        columns: places,
        shards,
        memory_bytes: config.memory_bytes,
        request_bytes,
        verify: config.verify,
    };
    let source = Box::new(Sharded::new(parts)?);
    Ok(Opened { source, columns, digest, vocabulary: None, classes: None })
}

/// Finds the shards at a place.
pub(crate) fn resolve(
    place: Place,
    format: Option<ShardFormat>,
    memory_bytes: u64,
    access: &Access,
) -> Result<Resolved, DataError> {
    let objects = place.objects(access)?;
    if place.is_folder() {
        if let Some(version) = Version::read(&objects, access.version.as_ref())? {
            return from_manifest(place, objects, version);
        }
        if let Some(text) = place.get("index.json", &objects)?
            && matches!(format, None | Some(ShardFormat::Mds))
        {
            return from_mds_index(place, objects, &text, memory_bytes);
        }
    }
    freeze(place, objects, format, memory_bytes, access)
}

fn from_manifest(place: Place, objects: Arc<dyn ReadObjects>, version: Version) -> Result<Resolved, DataError> {
    let shards = shards_of(&version);
    let (schema, digest) = (Arc::new(version.manifest.schema.clone()), version.digest);
    Ok(Resolved { place, objects, schema, shards, digest, version: Some(digest) })
}

/// The shards that a manifest lists.
pub(crate) fn shards_of(version: &Version) -> Vec<Shard> {
    let shard = |facts: &ShardFacts| Shard {
        blocks: facts.block_rows(),
        facts: facts.clone(),
        mds: None,
        reader: None,
        content: None,
    };
    version.manifest.shards.iter().map(shard).collect()
}

fn from_mds_index(
    place: Place,
    objects: Arc<dyn ReadObjects>,
    text: &[u8],
    memory_bytes: u64,
) -> Result<Resolved, DataError> {
    let index_name = objects.name("index.json");
    let wrong = |reason: String| DataError::file(index_name.as_ref(), reason);
    let entries = mds_index::parse(text).map_err(wrong)?;
    let mut hasher = Hasher::new();
    let mut shards: Vec<Shard> = Vec::with_capacity(entries.len());
    let mut first: Option<(String, mds::Layout)> = None;
    for entry in entries {
        let layout = mds::Layout::new(&entry.known.description);
        let layout = layout.map_err(|reason| wrong(format!("shard `{}`: {reason}", entry.key)))?;
        match &first {
            None => first = Some((entry.key.clone(), layout)),
            Some((key, expected)) => {
                if let Some(difference) = expected.difference(&layout) {
                    return Err(wrong(format!("shard `{}`: {difference} as in shard `{key}`", entry.key)));
                }
            }
        }
        let hashes = serde_json::to_vec(&(&entry.hashes, entry.bytes, entry.known.samples));
        hasher.field(&hashes.map_err(|e| wrong(e.to_string()))?);
        // A folder that was read from before may hold a shard without its compression.
        let stored = place.is_local() && entry.key != entry.raw_key && objects.facts(&entry.key).is_err();
        let (key, bytes) = if stored { (entry.raw_key, entry.known.raw_bytes) } else { (entry.key, entry.bytes) };
        let blocks = mds::block_rows(entry.known.samples, entry.known.raw_bytes, &key);
        let mut facts = ShardFacts::new(&key, ShardFormat::Mds, bytes, entry.known.samples);
        facts.xxh3 = entry.hashes.get("xxh3_64").cloned().filter(|_| !stored);
        facts.sha256 =
            entry.hashes.get("sha256").and_then(|hex| format!("sha256:{hex}").parse().ok()).filter(|_| !stored);
        shards.push(Shard { facts, mds: Some(entry.known), blocks, reader: None, content: None });
    }
    shards.retain(|shard| shard.facts.samples > 0);
    let Some(shard) = shards.first_mut() else {
        return Err(DataError::Empty { path: place.name, reason: "its index lists no samples".into() });
    };
    // What describes itself only in its samples is seen in the first.
    let options = ReadOptions { memory_bytes, ..ReadOptions::default() };
    let reader = open_shard_known(&objects, &shard.facts, shard.mds.as_ref(), &options)?;
    let schema = reader.schema().clone();
    shard.reader = Some(reader);
    hasher.field(&serde_json::to_vec(&*schema).map_err(|e| wrong(e.to_string()))?);
    Ok(Resolved { place, objects, schema, shards, digest: hasher.finish(), version: None })
}

/// The dataset in the folder of a name that no object has.
///
/// # Errors
/// That there is no such object, where there is no such folder either.
fn as_folder(
    place: &Place,
    missing: StoreError,
    format: Option<ShardFormat>,
    memory_bytes: u64,
    access: &Access,
) -> Result<Resolved, DataError> {
    let Some(folder) = place.as_folder(access)? else { return Err(missing.into()) };
    match resolve(folder, format, memory_bytes, access) {
        Err(DataError::Empty { .. }) => Err(missing.into()),
        resolved => resolved,
    }
}

/// Makes a manifest of objects that have none.
fn freeze(
    place: Place,
    objects: Arc<dyn ReadObjects>,
    format: Option<ShardFormat>,
    memory_bytes: u64,
    access: &Access,
) -> Result<Resolved, DataError> {
    let listed = if place.is_folder() || place.is_pattern() {
        let mut listed = place.list()?;
        if place.is_folder() {
            if let (None, Some(found)) = (format, listed.iter().find(|facts| looks_like_data(&facts.key))) {
                let reason = "looks like data, and its extension is none that is known; give those that are meant by a \
                              pattern (`folder/*.parquet`) or by `format`";
                return Err(DataError::file(objects.name(&found.key).as_ref(), reason));
            }
            // Others may lie beside: notes, side files, indices.
            listed.retain(|facts| match (ShardFormat::of_key(&facts.key), format) {
                (Some(found), Some(wanted)) => {
                    found == wanted || (found, wanted) == (ShardFormat::TfRecord, ShardFormat::TfRecordRaw)
                }
                (found, None) => found.is_some(),
                (None, Some(_)) => false,
            });
        }
        if let Some(found) = listed.iter().find(|facts| facts.bytes == 0) {
            let reason = "is of 0 bytes, as what was cut off while it was written; delete it, or give the others by a \
                          pattern (`folder/part-{0,2}.tfrecord`)";
            return Err(DataError::file(objects.name(&found.key).as_ref(), reason));
        }
        listed
    } else {
        match objects.facts(&place.rest) {
            Err(error) if error.is_not_found() => return as_folder(&place, error, format, memory_bytes, access),
            found => vec![found?],
        }
    };
    if listed.is_empty() {
        let reason = match format {
            Some(format) => format!("no object there is {format}"),
            None => "no object there has an extension that is known".into(),
        };
        return Err(DataError::Empty { path: place.name, reason });
    }
    let mut shards: Vec<Shard> = Vec::with_capacity(listed.len());
    for found in listed {
        let format = format.or_else(|| ShardFormat::of_key(&found.key));
        let name = objects.name(&found.key);
        let unknown = || {
            let known: Vec<&str> = ShardFormat::ALL.iter().map(|(_, name, _)| *name).collect();
            let known = known.join(", ");
            DataError::file(
                name.as_ref(),
                format!(
                    "its extension does not say what it is; set `format` to one of {known}, or `{{ text = {{ context = … }} }}`"
                ),
            )
        };
        let format = format.ok_or_else(unknown)?;
        if let Some(first) = shards.first()
            && first.facts.format != format
        {
            let reason = format!("is {format}, and {} is {}", objects.name(&first.facts.key), first.facts.format);
            return Err(DataError::file(name.as_ref(), reason));
        }
        let mut facts = ShardFacts::new(&found.key, format, found.bytes, 0);
        facts.etag = found.etag;
        let options = ReadOptions { memory_bytes, request_bytes: place.request_bytes(), ..ReadOptions::default() };
        let reader = open_shard_known(&objects, &facts, None, &options)?;
        facts.samples = reader.rows();
        facts.blocks = reader.block_list();
        shards.push(Shard { blocks: reader.blocks().to_vec(), facts, mds: None, reader: Some(reader), content: None });
    }
    let schema = common_schema(&objects, &shards)?;
    for shard in &mut shards {
        if shard.reader.as_ref().is_some_and(|reader| **reader.schema() != *schema) {
            // It is opened again with the columns of all when it is needed.
            shard.reader = None;
        }
    }
    // Only a shard that says itself that it has no rows comes this far.
    shards.retain(|shard| shard.facts.samples > 0);
    if shards.is_empty() {
        return Err(DataError::Empty { path: place.name, reason: String::new() });
    }
    let digest = frozen_digest(&place, &objects, &schema, &mut shards, access)?;
    Ok(Resolved { place, objects, schema, shards, digest, version: None })
}

/// Ends of names under which data of formats that are not read lies, or such that are read, compressed as they are not.
const DATA_ENDS: [&str; 16] =
    ["gz", "zst", "zstd", "bz2", "xz", "lz4", "zip", "7z", "avro", "orc", "tsv", "json", "h5", "hdf5", "pkl", "lmdb"];

/// Ends of the stems of JSON that tells about data and is none: `dataset_info.json` of Hugging Face, `00012_stats.json` of
/// img2dataset.
const NOTES: [&str; 10] =
    ["config", "dict", "features", "index", "info", "manifest", "metadata", "schema", "state", "stats"];

/// Whether an object of a folder of shards whose extension says no format may hold rows all the same. What starts with an
/// underscore is hidden, as for Spark.
fn looks_like_data(key: &str) -> bool {
    if ShardFormat::of_key(key).is_some() || key.split('/').any(|part| part.starts_with('_')) {
        return false;
    }
    let name = key.rsplit('/').next().unwrap_or(key).to_ascii_lowercase();
    let Some((stem, end)) = name.rsplit_once('.') else { return false };
    let is_note = end == "json" && NOTES.iter().any(|note| stem.ends_with(note));
    // TensorFlow numbers its shards behind the extension: `train.tfrecord-00000-of-00010`.
    (DATA_ENDS.contains(&end) && !is_note) || end.starts_with("tfrecord-")
}

/// The columns that all shards have. Text files do not say what their columns are, so there a column of whole numbers in
/// one shard and of others in another is a column of numbers.
fn common_schema(objects: &Arc<dyn ReadObjects>, shards: &[Shard]) -> Result<Arc<Schema>, DataError> {
    let readers = || shards.iter().filter_map(|s| s.reader.as_ref().map(|r| (&s.facts, r)));
    let Some((first, reader)) = readers().find(|(facts, _)| facts.samples > 0).or_else(|| readers().next()) else {
        return Ok(Arc::new(Schema { columns: Vec::new() }));
    };
    let mut schema = reader.schema().clone();
    for (facts, reader) in readers().filter(|(facts, _)| facts.samples > 0) {
        if reader.schema() == &schema {
            continue;
        }
        let mut joined = (*schema).clone();
        for column in &mut joined.columns {
            let other = reader.schema().index_of(&column.name).map(|at| &reader.schema().columns[at].kind);
            if let Some(other) = other.filter(|_| may_join(facts.format)) {
                column.kind = join(facts.format, column.kind.clone(), other.clone());
            }
        }
        let may_lack = has_optional_columns(facts.format);
        if may_lack {
            let is_new = |column: &&Column| joined.index_of(&column.name).is_none();
            let more: Vec<Column> = reader.schema().columns.iter().filter(is_new).cloned().collect();
            joined.columns.extend(more);
        }
        let same_but_for_kinds = joined.columns.len() == reader.schema().columns.len();
        let difference = joined.columns.iter().find_map(|column| {
            let at = reader.schema().index_of(&column.name);
            match at.map(|at| &reader.schema().columns[at].kind) {
                None if may_lack => None,
                None => Some(format!("column `{}` ({}) is missing", column.name, column.kind)),
                Some(kind) if *kind != column.kind && !may_join(facts.format) => {
                    Some(format!("column `{}` is {kind}, not {}", column.name, column.kind))
                }
                Some(_) => None,
            }
        });
        let difference = difference
            .or_else(|| (!same_but_for_kinds && !may_lack).then(|| schema.difference(reader.schema())).flatten());
        if let Some(difference) = difference {
            let reason = format!("{difference} as in {}", objects.name(&first.key));
            return Err(DataError::file(objects.name(&facts.key).as_ref(), reason));
        }
        schema = Arc::new(joined);
    }
    Ok(schema)
}

/// Whether each row of a format names its own columns: what rows may lack, all rows of a shard may.
fn has_optional_columns(format: ShardFormat) -> bool {
    matches!(format, ShardFormat::Tar | ShardFormat::TfRecord)
}

/// Whether kinds of a format are told by the values in a shard.
fn may_join(format: ShardFormat) -> bool {
    matches!(format, ShardFormat::Csv | ShardFormat::JsonLines | ShardFormat::TfRecord | ShardFormat::Parquet)
}

/// The kind of a column that two shards see differently; the first, where there is none: reading will say what is wrong.
fn join(format: ShardFormat, a: Kind, b: Kind) -> Kind {
    if format == ShardFormat::Csv && a != b && (a == Kind::Text || b == Kind::Text) {
        return Kind::Text;
    }
    crate::source::jsonl::join(a.clone(), b).unwrap_or(a)
}

/// Over what the shards hold, not where they lie. Files are hashed; of distant objects the store's tags stand for that.
fn frozen_digest(
    place: &Place,
    objects: &Arc<dyn ReadObjects>,
    schema: &Schema,
    shards: &mut [Shard],
    access: &Access,
) -> Result<Digest, DataError> {
    let is_hashed = |shard: &Shard| place.is_local() || shard.facts.etag.is_none();
    let hashed: Vec<&ShardFacts> = shards.iter().filter(|s| is_hashed(s)).map(|s| &s.facts).collect();
    let hash = || hashed.iter().map(|facts| shard_digest(objects, facts)).collect::<Result<Vec<_>, DataError>>();
    let mut digests = if place.is_local() {
        let files: Vec<PathBuf> = hashed.iter().map(|facts| objects.name(&facts.key).into()).collect();
        access.digests_of("shards", &files, files.len(), hash)?
    } else {
        hash()?
    }
    .into_iter();
    shards.iter_mut().filter(|s| is_hashed(s)).for_each(|shard| shard.content = digests.next());
    // One file is the dataset that it always was.
    if let ([Shard { content: Some(only), .. }], true) =
        (&*shards, place.is_local() && !place.is_folder() && !place.is_pattern())
    {
        return Ok(*only);
    }
    let mut hasher = Hasher::new();
    let json = |e: serde_json::Error| DataError::file(&place.name, e.to_string());
    hasher.field(&serde_json::to_vec(schema).map_err(json)?);
    for Shard { facts, content, .. } in shards {
        let content = match (content, &facts.etag) {
            (Some(content), _) => content.to_string(),
            (None, Some(etag)) => etag.clone(),
            (None, None) => return Err(DataError::file(&place.name, "a shard of it was not hashed")),
        };
        hasher.field(&serde_json::to_vec(&(facts.format, facts.bytes, facts.samples, content)).map_err(json)?);
    }
    Ok(hasher.finish())
}

/// The shards of any dataset, for what reads all of it: converting, validating, describing.
pub struct Shards {
    /// What they are read from.
    pub objects: Arc<dyn ReadObjects>,
    /// The columns of every shard.
    pub schema: Arc<Schema>,
    /// The digest of the content.
    pub digest: Digest,
    /// What is known of each. Without a manifest, this is what one would say.
    pub facts: Vec<ShardFacts>,
    known: Vec<Option<mds::Known>>,
    memory_bytes: u64,
}

impl Shards {
    /// Finds the shards of the dataset at a path of a recipe; text and folders of pictures have none.
    pub fn find(config: &DatasetConfig, base: &Path, access: &Access) -> Result<Shards, DataError> {
        let place = Place::of(&config.path, base, access)?;
        let format = config.format.as_ref().and_then(Format::shard_format);
        let resolved = resolve(place, format, config.memory_bytes, access)?;
        let Resolved { objects, schema, digest, shards, .. } = resolved;
        let (facts, known) = shards.into_iter().map(|shard| (shard.facts, shard.mds)).unzip();
        Ok(Shards { objects, schema, digest, facts, known, memory_bytes: config.memory_bytes })
    }

    /// Opens one of them.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn open(&self, index: usize) -> Result<Arc<dyn ShardReader>, DataError> {
        let facts = &self.facts[index];
        let options = ReadOptions {
            memory_bytes: self.memory_bytes,
            schema: Some(self.schema.clone()),
            blocks: facts.blocks.clone(),
            ..ReadOptions::default()
        };
        open_shard_known(&self.objects, facts, self.known[index].as_ref(), &options)
    }

    /// Checks the size and, where they are known, the hashes of a shard against what lies there.
    ///
    /// # Errors
    /// The object that vanished or changed, and what it was.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn verify(&self, index: usize) -> Result<(), DataError> {
        verify_shard(&self.objects, &self.facts[index])
    }
}
