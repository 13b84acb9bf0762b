//! A dataset as its shards, all open: what is inspected, validated and ingested row by row.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use updraft_base::Digest;
use updraft_store::ReadObjects;

use crate::error::DataError;
use crate::ingest::{Input, statistics_of};
use crate::manifest::ShardFacts;
use crate::parallel::in_order;
use crate::rows::Cells;
use crate::schema::{Column, Kind, Schema};
use crate::statistics::ColumnStatistics;

use super::place::Place;
use super::readable::Readable;
use super::resolve::{Resolved, resolve};
use super::shard::{ReadOptions, ShardFormat, ShardReader};
use super::{Access, Source, Wanted, folder, is_picture_folder, open_shard_known, shard_digest, verify_shard};

/// The shards of a dataset.
pub struct Shards {
    /// The columns of all.
    pub schema: Arc<Schema>,
    /// Their rows.
    pub readers: Vec<Arc<dyn ShardReader>>,
    /// What is known about each; a folder of pictures counts as one.
    pub facts: Vec<ShardFacts>,
    /// The version of the manifest, where there is one.
    pub version: Option<Digest>,
    objects: Arc<dyn ReadObjects>,
    is_local: bool,
    /// SHA-256 of the files that were read to open the dataset.
    contents: Vec<Option<Digest>>,
    /// Of a folder of pictures.
    digest: Digest,
}

/// A column that a dataset has and nobody can read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnreadColumn {
    /// Its name.
    pub column: String,
    /// What it holds, and what is read instead.
    pub reason: String,
}

impl Shards {
    /// Opens what lies at a path or URL: a folder with a manifest, with MDS's index, with files of one format or with
    /// pictures; one file; or a pattern.
    pub fn open(
        path: &str,
        format: Option<ShardFormat>,
        memory_bytes: u64,
        access: &Access,
    ) -> Result<Shards, DataError> {
        let place = Place::of(Path::new(path), Path::new(""), access)?;
        if format == Some(ShardFormat::Folder) || (format.is_none() && is_picture_folder(&place)?) {
            return Shards::of_pictures(place, memory_bytes, access);
        }
        let is_local = place.is_local();
        let Resolved { objects, schema, shards, digest, version, .. } = resolve(place, format, memory_bytes, access)?;
        let mut readers: Vec<Arc<dyn ShardReader>> = Vec::with_capacity(shards.len());
        let (mut facts, mut contents) = (Vec::with_capacity(shards.len()), Vec::with_capacity(shards.len()));
        for shard in shards {
            let options = ReadOptions {
                memory_bytes,
                schema: Some(schema.clone()),
                blocks: shard.facts.blocks.clone(),
                ..ReadOptions::default()
            };
            let open = || open_shard_known(&objects, &shard.facts, shard.mds.as_ref(), &options);
            readers.push(shard.reader.map_or_else(open, Ok)?);
            facts.push(shard.facts);
            contents.push(shard.content);
        }
        Ok(Shards { schema, readers, facts, version, objects, is_local, contents, digest })
    }

    fn of_pictures(place: Place, memory_bytes: u64, access: &Access) -> Result<Shards, DataError> {
        let (objects, is_local) = (place.objects(access)?, place.is_local());
        let bytes = place.list()?.iter().map(|facts| facts.bytes).sum();
        let name = place.name.clone();
        let opened = folder::open_listed(&place, &Wanted::all(&name), memory_bytes, access)?;
        let pictures = Pictures::new(opened.source, bytes);
        let mut facts = ShardFacts::new("", ShardFormat::Folder, bytes, pictures.rows());
        facts.sha256 = Some(opened.digest);
        let (schema, version) = (pictures.schema.clone(), None);
        let readers: Vec<Arc<dyn ShardReader>> = vec![Arc::new(pictures)];
        let (facts, contents, digest) = (vec![facts], vec![None], opened.digest);
        Ok(Shards { schema, readers, facts, version, objects, is_local, contents, digest })
    }

    /// The columns that cannot be read of every shard.
    pub fn unread(&self) -> Vec<UnreadColumn> {
        let mut reasons: BTreeMap<usize, String> = BTreeMap::new();
        for reader in &self.readers {
            for (at, reason) in reader.unread() {
                reasons.entry(at).or_insert(reason);
            }
        }
        let named =
            |(at, reason): (usize, String)| UnreadColumn { column: self.schema.columns[at].name.clone(), reason };
        reasons.into_iter().map(named).collect()
    }

    /// The dataset without the columns that cannot be read, and these.
    ///
    /// # Errors
    /// A dataset of which no column can be read.
    pub fn readable(mut self) -> Result<(Shards, Vec<UnreadColumn>), DataError> {
        let unread = self.unread();
        if unread.is_empty() {
            return Ok((self, unread));
        }
        let is_read = |at: &usize| unread.iter().all(|unread| unread.column != self.schema.columns[*at].name);
        let columns: Arc<[usize]> = (0..self.schema.columns.len()).filter(is_read).collect();
        if let (true, Some(UnreadColumn { column, reason })) = (columns.is_empty(), unread.first()) {
            let place = self.readers.first().map(|reader| reader.place(0)).unwrap_or_default();
            return Err(DataError::Loader(format!("{place}: no column can be read; `{column}` {reason}")));
        }
        let schema = Schema { columns: columns.iter().map(|at| self.schema.columns[*at].clone()).collect() };
        self.schema = Arc::new(schema);
        let view = |reader: Arc<dyn ShardReader>| -> Arc<dyn ShardReader> {
            Arc::new(Readable::new(reader, self.schema.clone(), columns.clone()))
        };
        self.readers = std::mem::take(&mut self.readers).into_iter().map(view).collect();
        Ok((self, unread))
    }

    /// The statistics that the manifest has of all shards; `None` where it lacks some.
    pub fn statistics(&self) -> Option<Vec<ColumnStatistics>> {
        statistics_of(&self.facts, &self.schema)
    }

    /// The shards as inputs of an ingestion, each known by the digest of its content; of distant objects without one, the
    /// store's tag stands for that, because reading them would cost as much as the work.
    pub fn inputs(&self) -> Result<Vec<Input>, DataError> {
        let mut inputs = Vec::with_capacity(self.readers.len());
        for ((reader, facts), content) in self.readers.iter().zip(&self.facts).zip(&self.contents) {
            let identity = match (&facts.sha256, &facts.xxh3, &facts.etag) {
                (Some(sha256), ..) => sha256.to_string(),
                (None, Some(xxh3), _) => format!("xxh3:{xxh3} {}", facts.bytes),
                (None, None, Some(etag)) if !self.is_local => format!("etag:{etag} {}", facts.bytes),
                _ if facts.format == ShardFormat::Folder => self.digest.to_string(),
                _ => match content {
                    Some(content) => content.to_string(),
                    None => shard_digest(&self.objects, facts)?.to_string(),
                },
            };
            inputs.push(Input { reader: reader.clone(), identity });
        }
        Ok(inputs)
    }

    /// What is wrong with shards whose bytes are not those of the digest that the manifest or MDS index has of them.
    /// `seen` is told of each shard that was looked at, and its bytes.
    ///
    /// # Errors
    /// A store that does not answer.
    pub fn changed(&self, threads: usize, mut seen: impl FnMut(u64)) -> Result<Vec<DataError>, DataError> {
        let known: Vec<&ShardFacts> = self.with_digest().collect();
        let mut changed = Vec::new();
        in_order(
            known.len(),
            threads,
            |at| match verify_shard(&self.objects, known[at]) {
                Ok(()) => Ok(None),
                Err(error) if error.is_about_content() => Ok(Some(error)),
                Err(error) => Err(error),
            },
            |at, error| {
                changed.extend(error);
                seen(known[at].bytes);
                Ok(())
            },
        )?;
        Ok(changed)
    }

    /// Bytes of the shards of which a digest is known.
    pub fn digested_bytes(&self) -> u64 {
        self.with_digest().map(|facts| facts.bytes).sum()
    }

    fn with_digest(&self) -> impl Iterator<Item = &ShardFacts> {
        let has_digest = |facts: &&ShardFacts| facts.xxh3.is_some() || facts.sha256.is_some();
        self.facts.iter().filter(|facts| facts.format != ShardFormat::Folder).filter(has_digest)
    }

    /// The number of blocks of all shards.
    pub fn blocks(&self) -> u64 {
        self.readers.iter().map(|reader| reader.blocks().len() as u64).sum()
    }

    /// Reads the first `blocks` blocks, all columns, on some threads; tells the rows of each and their bytes in memory.
    pub fn read_all(&self, blocks: u64, threads: usize, mut seen: impl FnMut(u64, u64)) -> Result<(), DataError> {
        let all = self.readers.iter().flat_map(|reader| (0..reader.blocks().len()).map(move |block| (reader, block)));
        let all: Vec<_> = all.take(usize::try_from(blocks).unwrap_or(usize::MAX)).collect();
        in_order(
            all.len(),
            threads,
            |at| {
                let (reader, block) = all[at];
                let rows = reader.read_block(block)?;
                Ok::<_, DataError>((rows.len() as u64, rows.memory_bytes()))
            },
            |_, (rows, bytes)| {
                seen(rows, bytes);
                Ok(())
            },
        )
    }
}

/// A folder of pictures as a shard.
struct Pictures {
    source: Box<dyn Source>,
    schema: Arc<Schema>,
    blocks: Vec<u64>,
    rows: u64,
    bytes: u64,
}

/// Pictures that are read together: a few megabytes of photographs.
const PICTURES_OF_BLOCK: u64 = 128;

impl Pictures {
    fn new(source: Box<dyn Source>, bytes: u64) -> Pictures {
        let rows: u64 = source.block_rows().iter().sum();
        let starts = (0..rows).step_by(PICTURES_OF_BLOCK as usize);
        let blocks = starts.map(|start| PICTURES_OF_BLOCK.min(rows - start)).collect();
        let column = |name: &str, kind| Column { name: name.to_owned(), kind };
        let columns = vec![column("image", Kind::Bytes), column("label", Kind::scalar(updraft_graph::DType::I64))];
        Pictures { source, schema: Arc::new(Schema { columns }), blocks, rows, bytes }
    }
}

impl ShardReader for Pictures {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn rows(&self) -> u64 {
        self.rows
    }

    fn blocks(&self) -> &[u64] {
        &self.blocks
    }

    fn block_bytes(&self, block: usize, _: &[usize]) -> u64 {
        let rows = self.blocks.get(block).copied().unwrap_or(0);
        (u128::from(self.bytes) * u128::from(rows) / u128::from(self.rows.max(1))) as u64
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        self.source.read(columns, rows)
    }

    fn place(&self, row: u64) -> String {
        self.source.row_name(row)
    }

    fn row_bytes(&self, _: usize, _: &[usize]) -> Option<u64> {
        Some(self.bytes / self.rows.max(1))
    }
}
