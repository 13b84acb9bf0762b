//! Rows that come one after the other, from no shard, into shards.
//!
//! What cannot be cut into units before it is made (the answer of a query) is one task: its identity is the digest of
//! all that determines the rows. Shards are cut by what rows take in memory, never by how they arrive, so the same rows
//! are the same shards; put where they do not exist yet; and a record, written last, saves doing it again.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use updraft_base::{Digest, Hasher};
use updraft_store::Objects;

use super::{CHUNK_ROWS, IngestOptions, Ingested, Making, VERSION, put_shard, record, shard_key, stands};
use crate::error::DataError;
use crate::manifest::ShardFacts;
use crate::rows::{Cells, Rows};
use crate::schema::Schema;

/// The record of a task that is done.
#[derive(Serialize, Deserialize)]
struct Record {
    shards: Vec<ShardFacts>,
}

/// Writes the rows that `next` gives, until it gives none, into shards that are named by `identity`, which must stand for
/// all that determines the rows and their order. Where a record says that this was done and the shards are there, `next`
/// is not asked. Of the options, format, size and form of shards count.
///
/// # Errors
/// Those of `next`, no rows at all, rows of another schema, cells that the format cannot hold, a store that does not answer.
pub fn ingest_rows<E: From<DataError>>(
    schema: &Arc<Schema>,
    identity: &Digest,
    target: &Objects,
    options: &IngestOptions,
    mut next: impl FnMut() -> Result<Option<Rows>, E>,
) -> Result<Ingested, E> {
    if let Some(found) = found_rows(schema, identity, target, options)? {
        return Ok(found);
    }
    let digest = digest(schema, identity, options);
    let record_key = record_key(&digest);
    let mut shards: Vec<ShardFacts> = Vec::new();
    let mut made = 0;
    let mut finish = |parts: &mut Vec<Rows>| -> Result<(), DataError> {
        let rows = Rows::concat(schema, &std::mem::take(parts)).map_err(DataError::Loader)?;
        let mut shard = Making::new(schema, options.format, &options.write)?;
        for first in (0..rows.len()).step_by(CHUNK_ROWS) {
            shard.push(&rows.slice(first..rows.len().min(first + CHUNK_ROWS)))?;
        }
        let (bytes, mut facts) = shard.finish()?;
        facts.key = shard_key(&format!("{:06}", shards.len()), &digest, options.format, &options.write);
        made += u64::from(put_shard(target, &facts.key, bytes)?);
        shards.push(facts);
        Ok(())
    };
    let (mut parts, mut kept_rows, mut kept_bytes) = (Vec::new(), 0, 0);
    let mut total: u64 = 0;
    while let Some(rows) = next()? {
        let mut first = 0;
        for row in 0..rows.len() {
            kept_rows += 1;
            kept_bytes += rows.columns.iter().map(|cells| cell_bytes(cells, row)).sum::<u64>();
            let is_full = match options.shard_rows {
                Some(shard_rows) => kept_rows >= shard_rows,
                None => kept_bytes >= options.write.shard_bytes,
            };
            if is_full {
                parts.push(rows.slice(first..row + 1));
                finish(&mut parts)?;
                (first, kept_rows, kept_bytes) = (row + 1, 0, 0);
            }
        }
        if first < rows.len() {
            parts.push(rows.slice(first..rows.len()));
        }
        total += rows.len() as u64;
    }
    if !parts.is_empty() {
        finish(&mut parts)?;
    }
    if shards.is_empty() {
        return Err(DataError::Loader("nothing to write: there are no rows".into()).into());
    }
    let json = serde_json::to_vec(&Record { shards: shards.clone() });
    let json = json.map_err(|e| DataError::Loader(format!("{record_key}: {e}")))?;
    target.create(&record_key, json.into()).map_err(DataError::from)?;
    Ok(Ingested { schema: (**schema).clone(), shards, rows: total, made, inputs: BTreeSet::new() })
}

/// What [`ingest_rows`] would find done.
///
/// # Errors
/// A store that does not answer, a record that is none.
pub fn found_rows(
    schema: &Arc<Schema>,
    identity: &Digest,
    target: &Objects,
    options: &IngestOptions,
) -> Result<Option<Ingested>, DataError> {
    let record = record::<Record>(target, &record_key(&digest(schema, identity, options)))?;
    let Some(Record { shards }) = record else { return Ok(None) };
    if !all_stand(target, &shards)? {
        return Ok(None);
    }
    let rows = shards.iter().map(|shard| shard.samples).sum();
    Ok(Some(Ingested { schema: (**schema).clone(), shards, rows, made: 0, inputs: BTreeSet::new() }))
}

fn record_key(digest: &Digest) -> String {
    format!("_ingest/{}.json", digest.hex())
}

fn digest(schema: &Schema, identity: &Digest, options: &IngestOptions) -> Digest {
    let IngestOptions { format, write, shard_rows, .. } = options;
    let mut hasher = Hasher::new();
    let written = format!("{format} {} {} {}", write.shard_bytes, write.row_group_bytes, write.compress);
    hasher.field(VERSION.as_bytes());
    hasher.field(identity.as_bytes());
    hasher.field(format!("{written} {shard_rows:?} {schema:?}").as_bytes());
    hasher.finish()
}

fn all_stand(target: &Objects, shards: &[ShardFacts]) -> Result<bool, DataError> {
    for shard in shards {
        if !stands(target, shard)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn cell_bytes(cells: &Cells, row: usize) -> u64 {
    match cells {
        Cells::Bytes(cells) => cells[row].len() as u64,
        Cells::Numbers(tensor) => tensor.byte_len().checked_div(cells.len()).unwrap_or(0) as u64,
        Cells::Lists(lists) => lists[row].byte_len() as u64,
    }
}
