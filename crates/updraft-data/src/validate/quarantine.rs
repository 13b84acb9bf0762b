//! Bad rows in shards of their own, with where they lay and what is wrong with them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::json;
use updraft_store::{Objects, ReadObjects};

use crate::error::DataError;
use crate::rows::{Cells, Rows};
use crate::schema::{Column, Kind, Schema};
use crate::source::shard::{ShardFormat, ShardReader};
use crate::write::{ShardWriter, WriteOptions, writer};

/// The column that says where a row lay.
const PLACE: &str = "quarantine_place";

/// The column that says what is wrong with it, a line each.
const REASONS: &str = "quarantine_reasons";

/// What the names of shards begin with.
const SHARD: &str = "quarantine-";

/// The list of rows that cannot be read.
const UNREADABLE: &str = "unreadable.jsonl";

/// Rows that are read and written at once.
const CHUNK_ROWS: usize = 512;

/// Puts rows, given by shard and number, into shards `quarantine-….<format>` with two more columns. Rows that cannot be
/// read are listed in `unreadable.jsonl`, with their places and reasons. Gives the keys of what was put.
pub fn quarantine(
    shards: &[Arc<dyn ShardReader>],
    bad: &BTreeMap<(usize, u64), Vec<String>>,
    target: &Objects,
    format: ShardFormat,
) -> Result<Vec<String>, DataError> {
    let Some(first) = shards.first() else { return Ok(Vec::new()) };
    let source = first.schema();
    let mut columns = source.columns.clone();
    columns.extend([PLACE, REASONS].map(|name| Column { name: new_name(source, name), kind: Kind::Text }));
    let schema = Arc::new(Schema::new(columns).map_err(DataError::Loader)?);
    let all: Vec<usize> = (0..source.columns.len()).collect();
    let options = WriteOptions::default();
    let (mut keys, mut unreadable) = (Vec::new(), String::new());
    let mut open: Option<Box<dyn ShardWriter>> = None;
    let rows: Vec<(&(usize, u64), &Vec<String>)> = bad.iter().collect();
    for of_shard in rows.chunk_by(|a, b| a.0.0 == b.0.0) {
        let reader = &shards[of_shard[0].0.0];
        for chunk in of_shard.chunks(CHUNK_ROWS) {
            let numbers: Vec<u64> = chunk.iter().map(|((_, row), _)| *row).collect();
            // One row that cannot be read would hide the others.
            let parts: Vec<(Vec<usize>, Vec<Cells>)> = match reader.read(&all, &numbers) {
                Ok(cells) => vec![((0..numbers.len()).collect(), cells)],
                Err(error) if !error.is_about_content() => return Err(error),
                Err(_) => {
                    let mut parts = Vec::new();
                    for (at, number) in numbers.iter().enumerate() {
                        match reader.read(&all, &[*number]) {
                            Ok(cells) => parts.push((vec![at], cells)),
                            Err(error) if !error.is_about_content() => return Err(error),
                            Err(_) => {
                                let line = json!({ "place": reader.place(*number), "reasons": chunk[at].1 });
                                unreadable.push_str(&format!("{line}\n"));
                            }
                        }
                    }
                    parts
                }
            };
            for (places, mut cells) in parts {
                let text = |of: &dyn Fn(usize) -> String| {
                    Cells::Bytes(places.iter().map(|at| Bytes::from(of(*at).into_bytes())).collect())
                };
                cells.push(text(&|at| reader.place(numbers[at])));
                cells.push(text(&|at| chunk[at].1.join("\n")));
                let rows = Rows::new(schema.clone(), cells).map_err(DataError::Loader)?;
                let shard = match &mut open {
                    Some(shard) => shard,
                    None => open.insert(writer(format, schema.clone(), &options)?),
                };
                shard.push(&rows)?;
                if shard.bytes() >= options.shard_bytes {
                    close(open.take(), target, format, &mut keys)?;
                }
            }
        }
    }
    close(open, target, format, &mut keys)?;
    if !unreadable.is_empty() {
        let key = UNREADABLE.to_owned();
        target.put(&key, unreadable.into())?;
        keys.push(key);
    }
    Ok(keys)
}

/// The name, or one like it where the rows come from a quarantine themselves.
fn new_name(schema: &Schema, name: &str) -> String {
    let mut name = name.to_owned();
    while schema.index_of(&name).is_some() {
        name.push('_');
    }
    name
}

/// Checks that nothing but an earlier quarantine is where one is to be put; gives what that has.
///
/// # Errors
/// Objects of something else, by the first of them.
pub fn earlier_quarantine(target: &Objects) -> Result<Vec<String>, DataError> {
    let keys: Vec<String> = target.list("")?.into_iter().map(|facts| facts.key).collect();
    match keys.iter().find(|key| *key != UNREADABLE && !key.starts_with(SHARD)) {
        Some(other) => {
            let reason = "is no quarantine; bad rows go to a folder of their own";
            Err(DataError::file(ReadObjects::name(target, other).as_ref(), reason))
        }
        None => Ok(keys),
    }
}

fn close(
    shard: Option<Box<dyn ShardWriter>>,
    target: &Objects,
    format: ShardFormat,
    keys: &mut Vec<String>,
) -> Result<(), DataError> {
    if let Some(shard) = shard {
        let (bytes, _) = shard.finish()?;
        let key = format!("{SHARD}{:06}.{}", keys.len(), format.name());
        target.put(&key, bytes)?;
        keys.push(key);
    }
    Ok(())
}
