//! Samples as a file holds them: named columns, read by row.
//!
//! A source gives the columns it was opened for and nothing else, checks that every cell is there, and knows how to
//! name a row in an error. What a column means is for [`transform`](crate::transform) to say.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use updraft_base::{Clock, Digest, Hasher};
use updraft_store::{AccessOptions, Objects, ReadObjects};

use crate::config::{DatasetConfig, Format};
use crate::error::DataError;
use crate::manifest::{self, ShardFacts};
pub(crate) use crate::rows::{Cells, tensor_of};
use crate::source::input::{Compression, Content, Input};
pub use crate::source::known::KnownDigests;
use crate::source::part::Part;
use crate::source::place::Place;
use crate::source::records::RecordShard;
use crate::source::shard::{ReadOptions, ShardFormat, ShardReader};
use crate::text::Vocabulary;

mod arrow;
pub(crate) mod cells;
mod csv;
mod folder;
mod growing;
pub(crate) mod input;
pub(crate) mod join;
pub(crate) mod jsonl;
mod known;
pub(crate) mod mds;
mod numpy;
pub(crate) mod parquet;
mod part;
pub(crate) mod place;
mod readable;
mod records;
pub(crate) mod resolve;
pub mod shard;
mod sharded;
pub mod shards;
mod table;
pub(crate) mod tar;
mod text;
pub(crate) mod tfrecord;
pub(crate) mod whole;

/// Columns over numbered rows.
pub(crate) trait Source: Send + Sync {
    /// Rows of each block. A block is what is read at once; a source that reads any row alone, or keeps all in memory,
    /// has one.
    fn block_rows(&self) -> &[u64];

    /// Bytes that `blocks` blocks take in memory; what is in memory anyway where the source has one.
    fn resident_bytes(&self, blocks: u64) -> u64;

    /// The cells of some of the columns, by their indices among those the source was opened for, at `rows`.
    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError>;

    /// Least and largest number of a column in the block of a row, where they are known without reading it; NaN may be
    /// there besides.
    fn bounds(&self, _column: usize, _row: u64) -> Option<(f64, f64)> {
        None
    }

    /// The name of a row: the file, and the row or line in it.
    fn row_name(&self, row: u64) -> String;

    /// The blocks that steps to come need, by when they are needed first. A source with a cache lets go of what is needed
    /// last.
    fn foresee(&self, _uses: &mut dyn Iterator<Item = (usize, Range<u64>)>) {}

    /// All steps before this one are done.
    fn advance(&self, _step: u64) {}

    /// First rows of the blocks of a source that grows, and the row at the end: of at least `blocks` blocks, for which it
    /// waits unless it `is_stopped`.
    fn grown(&self, _blocks: usize, _is_stopped: &dyn Fn() -> bool) -> Result<Arc<[u64]>, DataError> {
        Err(DataError::Loader("the source does not grow".into()))
    }

    /// The digest of all shards that have rows before this one, of a source that grows.
    fn digest_until(&self, _row: u64) -> Option<Digest> {
        None
    }
}

/// A source, and what is known about it.
pub(crate) struct Opened {
    pub source: Box<dyn Source>,
    /// The names of the columns it was opened for.
    pub columns: Vec<String>,
    /// The digest of the content: equal for equal samples, wherever they lie.
    pub digest: Digest,
    pub vocabulary: Option<Vocabulary>,
    pub classes: Option<Vec<String>>,
}

/// How objects are reached, beside what a recipe says: what differs between machines and runs.
#[derive(Clone, Default)]
pub struct Access {
    /// Settings of stores (endpoint, region, …) over the providers' usual ones.
    pub settings: BTreeMap<String, String>,
    /// Retries, timeouts and the like.
    pub options: AccessOptions,
    /// Put around every store that is opened: a cache.
    pub wrap: Option<Wrap>,
    /// Told of every remote store that is opened: to count what it is asked.
    pub opened: Option<Told>,
    /// The version of the dataset to open, by the digest of its manifest; the newest without.
    pub version: Option<Digest>,
    /// Digests of files that need not be read to know them once more.
    pub known: Option<Arc<KnownDigests>>,
    /// By which a dataset that grows is waited for; that of the system without.
    pub clock: Option<Arc<dyn Clock>>,
}

impl Access {
    /// The `count` digests that `make` gives of local files, or is known to have given.
    fn digests_of(
        &self,
        what: &str,
        files: &[PathBuf],
        count: usize,
        make: impl FnOnce() -> Result<Vec<Digest>, DataError>,
    ) -> Result<Vec<Digest>, DataError> {
        match &self.known {
            Some(known) => known.of(what, files, count, make),
            None => make(),
        }
    }
}

/// Something that reads objects through something that does, or the reason why it cannot.
pub type Wrap = Arc<dyn Fn(Arc<dyn ReadObjects>) -> Result<Arc<dyn ReadObjects>, DataError> + Send + Sync>;

/// Something that is told of a store.
pub type Told = Arc<dyn Fn(&Objects) + Send + Sync>;

/// Opens the source for the columns that the configured tensors need, or for all. A relative path starts at `base`.
pub(crate) fn open(config: &DatasetConfig, base: &Path, access: &Access) -> Result<Opened, DataError> {
    let mut names: Vec<String> = Vec::new();
    for tensor in &config.tensors {
        let columns = if tensor.columns.is_empty() { std::slice::from_ref(&tensor.name) } else { &tensor.columns };
        for column in columns {
            if !names.contains(column) {
                names.push(column.clone());
            }
        }
    }
    // Without tensors all columns are read, so nothing need be added.
    let conditions = config.filter.iter().filter(|_| !config.tensors.is_empty());
    for condition in conditions {
        if !names.contains(&condition.column) {
            names.push(condition.column.clone());
        }
    }
    let place = Place::of(&config.path, base, access)?;
    let path = place.name.clone();
    let wanted = Wanted { names: (!names.is_empty()).then_some(names), path: &path };
    if let Some(follow) = &config.follow {
        return growing::open(config, follow, base, &wanted, access);
    }
    let opened = match local_format(config, &place)? {
        Some(Format::Folder) => folder::open(&path, &wanted, config.memory_bytes, access),
        Some(Format::Csv) => csv::open(&path, &wanted, config.memory_bytes),
        Some(Format::Npy) => numpy::open_npy(&path, &wanted, config.memory_bytes),
        Some(Format::Npz) => numpy::open_npz(&path, &wanted, config.memory_bytes),
        Some(Format::Text(text)) => text::open(&path, &wanted, &text, config.memory_bytes),
        _ => resolve::open(config, place, &wanted, access),
    }?;
    match config.rows {
        None => Ok(opened),
        Some(fractions) => {
            let part = Part::new(opened.source, fractions).map_err(|reason| DataError::file(&path, reason))?;
            Ok(Opened { source: Box::new(part), ..opened })
        }
    }
}

/// Opens the sources of a mixture, one after the other; answers how many blocks each has, too.
pub(crate) fn open_all(
    config: &DatasetConfig,
    base: &Path,
    access: &Access,
) -> Result<(Opened, Vec<usize>), DataError> {
    let count = config.sources.len() as u64;
    let mut first: Option<Opened> = None;
    let mut sources = Vec::with_capacity(config.sources.len());
    let mut blocks = Vec::with_capacity(config.sources.len());
    let mut hasher = Hasher::new();
    for part in &config.sources {
        let path = base.join(&part.path);
        let alone = DatasetConfig {
            path: part.path.clone(),
            format: part.format.clone(),
            rows: part.rows,
            sources: Vec::new(),
            memory_bytes: config.memory_bytes / count,
            ..config.clone()
        };
        let opened = open(&alone, base, access)?;
        hasher.field(opened.digest.as_bytes());
        if let Some(first) = &first {
            let differs =
                |what: &str| DataError::file(&path, format!("has other {what} than the first source of the mixture"));
            if opened.columns != first.columns {
                return Err(differs("columns"));
            }
            if opened.vocabulary != first.vocabulary {
                return Err(differs("characters"));
            }
            if opened.classes != first.classes {
                return Err(differs("classes"));
            }
        }
        blocks.push(opened.source.block_rows().len());
        sources.push(opened.source);
        first.get_or_insert(Opened { source: Box::new(join::Join::new(Vec::new())), ..opened });
    }
    let Some(first) = first else { return Err(DataError::Loader("a mixture needs at least one source".into())) };
    Ok((Opened { source: Box::new(join::Join::new(sources)), digest: hasher.finish(), ..first }, blocks))
}

/// The format of one local file that is kept in memory whole, or of a local folder of pictures. `None` for everything
/// that is read in shards.
fn local_format(config: &DatasetConfig, place: &Place) -> Result<Option<Format>, DataError> {
    let path = &place.name;
    if !place.is_local() || place.is_pattern() {
        return match &config.format {
            Some(Format::Text(_)) => Err(DataError::file(path, "text is read from one local file")),
            _ => Ok(None),
        };
    }
    let is_folder = std::fs::metadata(path).map_err(DataError::io(path))?.is_dir();
    let format = match (&config.format, is_folder) {
        (Some(Format::Text(_)), true) => return Err(DataError::file(path, "is a folder; a file was expected")),
        (Some(Format::Folder), false) => return Err(DataError::file(path, "is a file; a folder was expected")),
        (Some(format), false) => Some(format.clone()),
        (Some(Format::Folder), true) => Some(Format::Folder),
        (Some(_), true) => None,
        (None, true) => is_picture_folder(place)?.then_some(Format::Folder),
        (None, false) => match ShardFormat::of_key(&path.to_string_lossy()) {
            Some(ShardFormat::Csv) => Some(Format::Csv),
            Some(ShardFormat::Npy) => Some(Format::Npy),
            Some(ShardFormat::Npz) => Some(Format::Npz),
            _ => None,
        },
    };
    Ok(format)
}

/// Whether a place is a local folder with nothing in it but folders of pictures.
pub(crate) fn is_picture_folder(place: &Place) -> Result<bool, DataError> {
    let path = &place.name;
    if !place.is_local() || place.is_pattern() || !std::fs::metadata(path).map_err(DataError::io(path))?.is_dir() {
        return Ok(false);
    }
    let folder_has = |name: &str| path.join(name).is_file();
    Ok(!(folder_has(manifest::LATEST) || folder_has("index.json") || holds_shards(path)?))
}

/// Whether files of a known format lie directly in a folder, which folders of pictures never have, or in the first of its
/// folders that has files, and no pictures there.
fn holds_shards(path: &Path) -> Result<bool, DataError> {
    let is_shard = |file: &PathBuf| ShardFormat::of_key(&file.to_string_lossy()).is_some();
    let mut folder = path.to_owned();
    for depth in 0..=FOLDER_DEPTH_MAX {
        let entries = folder::visible_entries(&folder)?;
        let (folders, files): (Vec<PathBuf>, Vec<PathBuf>) = entries.into_iter().partition(|entry| entry.is_dir());
        if files.iter().any(is_shard) {
            return Ok(depth == 0 || !files.iter().any(|file| folder::is_picture(file)));
        }
        match folders.into_iter().next() {
            // Notes lie beside the folders of shards, too.
            Some(first) if !files.iter().any(|file| folder::is_picture(file)) => folder = first,
            _ => return Ok(false),
        }
    }
    Ok(false)
}

/// Folders in folders in which shards are looked for, at most.
const FOLDER_DEPTH_MAX: usize = 32;

/// Opens one shard.
pub fn open_shard(
    objects: &Arc<dyn ReadObjects>,
    key: &str,
    format: ShardFormat,
    options: &ReadOptions,
) -> Result<Arc<dyn ShardReader>, DataError> {
    let bytes = objects.facts(key)?.bytes;
    open_shard_known(objects, &ShardFacts::new(key, format, bytes, 0), None, options)
}

/// Opens a shard that a manifest or an index tells of.
pub(crate) fn open_shard_known(
    objects: &Arc<dyn ReadObjects>,
    facts: &ShardFacts,
    known: Option<&mds::Known>,
    options: &ReadOptions,
) -> Result<Arc<dyn ShardReader>, DataError> {
    let ShardFacts { key, format, bytes, .. } = facts;
    let input = Input::open(objects, key)?;
    // Azure quotes tags in answers and not in listings.
    if let (Some(was), Some(is)) = (&facts.etag, input.etag())
        && was.trim_matches('"') != is.trim_matches('"')
    {
        return Err(input.error(format!("has the tag {is}, and had {was} when it was found: it was changed")));
    }
    if input.len() != *bytes {
        return Err(input.error(format!("is of {} bytes, and was of {bytes}: it was changed", input.len())));
    }
    let content = |input| Content::new(input, Compression::of_key(key), options.memory_bytes);
    let memory_bytes = options.memory_bytes;
    Ok(match format {
        ShardFormat::Mds => Arc::new(mds::Mds::open(input, key, known, options)?),
        ShardFormat::Tar => Arc::new(RecordShard::open(tar::Tar { memory_bytes }, content(input), options)?),
        ShardFormat::TfRecord | ShardFormat::TfRecordRaw => {
            let raw = *format == ShardFormat::TfRecordRaw;
            Arc::new(RecordShard::open(tfrecord::TfRecord { raw, memory_bytes }, content(input), options)?)
        }
        ShardFormat::Parquet => Arc::new(parquet::Parquet::open(input, options)?),
        ShardFormat::Arrow => Arc::new(arrow::Arrow::open(input, options)?),
        ShardFormat::Csv | ShardFormat::JsonLines | ShardFormat::Npy | ShardFormat::Npz => {
            Arc::new(whole::Whole::open(input, key, *format, options)?)
        }
        ShardFormat::Folder => return Err(input.error("is one object; a folder of pictures has many")),
    })
}

/// Checks a shard against what is known of it.
pub(crate) fn verify_shard(objects: &Arc<dyn ReadObjects>, facts: &ShardFacts) -> Result<(), DataError> {
    let input = Input::open(objects, &facts.key)?;
    if input.len() != facts.bytes {
        return Err(input.error(format!("is of {} bytes, and was of {}: it was changed", input.len(), facts.bytes)));
    }
    let (found, was) = match (&facts.xxh3, &facts.sha256) {
        // Damage by accident shows in either, and this one costs a tenth.
        (Some(was), _) => {
            let mut xxh3 = xxhash_rust::xxh3::Xxh3::new();
            read_through(&input, |piece| xxh3.update(piece))?;
            (format!("the XXH3 {:016x}", xxh3.digest()), format!("the XXH3 {was}"))
        }
        (None, Some(was)) => (format!("the digest {}", shard_digest(objects, facts)?), format!("the digest {was}")),
        (None, None) => return Ok(()),
    };
    if found == was { Ok(()) } else { Err(input.error(format!("has {found}, and had {was}: it was changed"))) }
}

/// SHA-256 of a shard as it lies there.
fn shard_digest(objects: &Arc<dyn ReadObjects>, facts: &ShardFacts) -> Result<Digest, DataError> {
    let mut sha256 = Hasher::new();
    read_through(&Input::open(objects, &facts.key)?, |piece| sha256.update(piece))?;
    Ok(sha256.finish())
}

fn read_through(input: &Input, mut seen: impl FnMut(&[u8])) -> Result<(), DataError> {
    const PIECE_BYTES: u64 = 8 << 20;
    let mut at = 0;
    while at < input.len() {
        let end = (at + PIECE_BYTES).min(input.len());
        seen(&input.read(at..end)?);
        at = end;
    }
    Ok(())
}

/// The columns that are needed of a file.
pub(crate) struct Wanted<'a> {
    /// `None` for all.
    names: Option<Vec<String>>,
    path: &'a Path,
}

impl<'a> Wanted<'a> {
    /// All columns.
    pub(crate) fn all(path: &'a Path) -> Wanted<'a> {
        Wanted { names: None, path }
    }
}

impl Wanted<'_> {
    /// The wanted columns and where they are among `known`.
    fn among(&self, known: &[String]) -> Result<(Vec<String>, Vec<usize>), DataError> {
        let names = self.names.clone().unwrap_or_else(|| known.to_vec());
        let mut places = Vec::with_capacity(names.len());
        for name in &names {
            let place = known.iter().position(|k| k == name).ok_or_else(|| DataError::UnknownColumn {
                path: self.path.to_owned(),
                column: name.clone(),
                known: known.to_vec(),
            })?;
            places.push(place);
        }
        Ok((names, places))
    }
}

/// Reads a file that is to be kept in memory whole.
fn read_whole(path: &Path, memory_bytes: u64) -> Result<Vec<u8>, DataError> {
    let needed_bytes = std::fs::metadata(path).map_err(DataError::io(path))?.len();
    if needed_bytes > memory_bytes {
        return Err(DataError::Memory {
            path: path.to_owned(),
            what: "the file".into(),
            needed_bytes,
            allowed_bytes: memory_bytes,
            advice: "raise it, or convert to Parquet, which is read in parts",
        });
    }
    std::fs::read(path).map_err(DataError::io(path))
}
