//! Bad rows in shards of their own, with where they lay and what is wrong with them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::json;
use updraft_store::Objects;

use crate::error::DataError;
use crate::rows::{Cells, PartialCells, Rows};
use crate::schema::{Column, Kind, Schema};
use crate::source::shard::{ShardFormat, ShardReader};
use crate::validate::search::read_apart;
use crate::write::{ShardWriter, WriteOptions, writer};

/// The column that says where a row lay.
const PLACE: &str = "quarantine_place";

/// The column that says what is wrong with it, a line each.
const REASONS: &str = "quarantine_reasons";

/// The column that names the columns without a cell in it, a line each: what stands there (NaN, zero, nothing) is none.
const MISSING: &str = "quarantine_missing";

/// Rows that are read and written at once.
const CHUNK_ROWS: usize = 512;

/// Puts rows, given by shard and number, into shards `quarantine-….<format>` with three more columns. Rows of which nothing
/// can be read are listed in `unreadable.jsonl`, with their places and reasons. Gives the keys of what was put.
pub fn quarantine(
    shards: &[Arc<dyn ShardReader>],
    bad: &BTreeMap<(usize, u64), Vec<String>>,
    target: &Objects,
    format: ShardFormat,
) -> Result<Vec<String>, DataError> {
    let Some(first) = shards.first() else { return Ok(Vec::new()) };
    let source = first.schema();
    let mut columns = source.columns.clone();
    columns.extend([PLACE, REASONS, MISSING].map(|name| Column { name: name.to_owned(), kind: Kind::Text }));
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
            let mut parts: Vec<(Vec<usize>, Vec<PartialCells>)> = Vec::new();
            read_apart(reader.as_ref(), &all, &numbers, |part, read| {
                let first = numbers.partition_point(|number| *number < part[0]);
                let is_readable = |row: &usize| match &read {
                    Ok(cells) => !cells.iter().all(|cells| cells.gap(*row).is_some_and(|gap| gap.fault.is_some())),
                    Err(_) => false,
                };
                let (kept, lost): (Vec<usize>, Vec<usize>) = (0..part.len()).partition(is_readable);
                for row in lost {
                    let line = json!({ "place": reader.place(part[row]), "reasons": chunk[first + row].1 });
                    unreadable.push_str(&format!("{line}\n"));
                }
                if let Ok(cells) = &read
                    && !kept.is_empty()
                {
                    let cells = cells.iter().map(|cells| cells.gather(&kept)).collect();
                    parts.push((kept.into_iter().map(|row| first + row).collect(), cells));
                }
                Ok(())
            })?;
            for (places, read) in parts {
                let text = |of: &dyn Fn(usize) -> String| {
                    Cells::Bytes((0..places.len()).map(|row| Bytes::from(of(row).into_bytes())).collect())
                };
                let missing = |row: usize| {
                    let columns = source.columns.iter().zip(&read).filter(|(_, cells)| cells.gap(row).is_some());
                    columns.map(|(column, _)| column.name.as_str()).collect::<Vec<_>>().join("\n")
                };
                let added = [
                    text(&|row| reader.place(numbers[places[row]])),
                    text(&|row| chunk[places[row]].1.join("\n")),
                    text(&missing),
                ];
                let cells = read.into_iter().map(|cells| cells.cells).chain(added).collect();
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
        let key = "unreadable.jsonl".to_owned();
        target.put(&key, unreadable.into())?;
        keys.push(key);
    }
    Ok(keys)
}

fn close(
    shard: Option<Box<dyn ShardWriter>>,
    target: &Objects,
    format: ShardFormat,
    keys: &mut Vec<String>,
) -> Result<(), DataError> {
    if let Some(shard) = shard {
        let (bytes, _) = shard.finish()?;
        let key = format!("quarantine-{:06}.{}", keys.len(), format.name());
        target.put(&key, bytes)?;
        keys.push(key);
    }
    Ok(())
}
