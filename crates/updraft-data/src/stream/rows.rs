//! Entries as rows: a column for each field, and for each key of an object.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use updraft_graph::{DType, Tensor};

use super::Entry;
use crate::error::DataError;
use crate::rows::{Cells, Rows};
use crate::schema::{Column, Kind, Schema};
use crate::source::cells::check_text;
use crate::source::jsonl;
use crate::source::whole::{TableColumn, type_cells};

/// What is wrong, and with which of the entries.
type Wrong = (usize, DataError);

/// What the values of a shard may take while they are read, besides their text: a bound for objects of very many keys.
const OBJECTS_BYTES_MAX: u64 = 4 << 30;

/// Rows of a schema, where there is one; else its columns are the fields of the first entry, of the kinds that are wanted,
/// or told from all cells as those of CSV are, and bytes where they are not UTF-8. The keys of objects are columns
/// behind those, as of JSON Lines.
pub(super) fn rows<I>(
    entries: &[Entry<I>],
    schema: Option<&Arc<Schema>>,
    wanted: &BTreeMap<String, Kind>,
    name: &dyn Fn(&Entry<I>) -> String,
) -> Result<Rows, Wrong> {
    let sample = |at: usize, column: &str, reason: String| {
        let sample = entries.get(at).map(name).unwrap_or_default();
        (at, DataError::Sample { sample, column: column.to_owned(), reason })
    };
    let objects = objects(entries, schema, wanted).map_err(|(at, column, reason)| sample(at, &column, reason))?;
    let is_object = |name: &String| objects.iter().any(|column| column.name == *name);
    let names = match (schema, entries.first()) {
        (Some(schema), _) => schema.names().into_iter().filter(|name| !is_object(name)).collect(),
        (None, Some(entry)) => {
            let name = |(name, _): &(Bytes, Bytes)| {
                std::str::from_utf8(name).map(str::to_owned).map_err(|_| {
                    let shown = String::from_utf8_lossy(name);
                    sample(0, &shown, "the name of this field is not UTF-8".into())
                })
            };
            entry.fields.iter().map(name).collect::<Result<Vec<_>, _>>()?
        }
        (None, None) => Vec::new(),
    };
    if let Some(twice) = names.iter().enumerate().find_map(|(at, name)| names[..at].contains(name).then_some(name)) {
        return Err(sample(0, twice, "the entry has this field twice".into()));
    }
    if let Some(name) = wanted.keys().find(|name| !names.contains(name) && !is_object(name)) {
        return Err(sample(0, name, "is asked for, and the entry has no such field".into()));
    }
    let mut cells: Vec<Vec<Bytes>> = vec![Vec::with_capacity(entries.len()); names.len()];
    for (at, entry) in entries.iter().enumerate() {
        for (place, (field, value)) in entry.fields.iter().enumerate() {
            // Fields are in the same order mostly.
            let is = |name: &String| name.as_bytes() == field;
            let column = if names.get(place).is_some_and(is) { Some(place) } else { names.iter().position(is) };
            let shown = || String::from_utf8_lossy(field);
            let column = column.ok_or_else(|| sample(at, &shown(), "entries before it have no such field".into()))?;
            if cells[column].len() > at {
                return Err(sample(at, &shown(), "the entry has this field twice".into()));
            }
            cells[column].push(value.clone());
        }
        if let Some(missing) = cells.iter().position(|cells| cells.len() <= at) {
            return Err(sample(at, &names[missing], "the entry has no such field".into()));
        }
    }
    if let Some(twice) = names.iter().find(|name| is_object(name)) {
        return Err(sample(0, twice, "is a key of the object, too".into()));
    }
    let mut columns = Vec::with_capacity(names.len());
    let mut typed = Vec::with_capacity(names.len());
    let mut wrong: Option<Wrong> = None;
    for (column, cells) in names.into_iter().zip(cells) {
        let known = schema.and_then(|s| s.columns.iter().find(|c| c.name == column)).map(|c| &c.kind);
        match cells_of(cells, known.or(wanted.get(&column))) {
            Ok((kind, cells)) => {
                columns.push(Column { name: column, kind });
                typed.push(cells);
            }
            // The first entry that does not fit is told of, whatever its column.
            Err((at, reason)) if wrong.as_ref().is_none_or(|(first, _)| at < *first) => {
                wrong = Some(sample(at, &column, reason));
            }
            Err(_) => {}
        }
    }
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    for ObjectColumn { name, kind, cells } in objects {
        columns.push(Column { name, kind });
        typed.push(cells);
    }
    let found = Schema::new(columns).map_err(|reason| sample(0, "", reason))?;
    let Some(schema) = schema else {
        return Rows::new(Arc::new(found), typed).map_err(|reason| sample(0, "", reason));
    };
    // Keys of objects come in any order.
    let mut cells: BTreeMap<String, Cells> = found.names().into_iter().zip(typed).collect();
    let in_order = schema.names().iter().filter_map(|name| cells.remove(name)).collect();
    Rows::new(schema.clone(), in_order).map_err(|reason| sample(0, "", reason))
}

/// A column of what objects have under one key.
struct ObjectColumn {
    name: String,
    kind: Kind,
    cells: Cells,
}

/// The columns of entries that are objects, or which entry does not fit, its column, and why.
fn objects<I>(
    entries: &[Entry<I>],
    schema: Option<&Arc<Schema>>,
    wanted: &BTreeMap<String, Kind>,
) -> Result<Vec<ObjectColumn>, (usize, String, String)> {
    let texts = entries.iter().enumerate().filter_map(|(at, entry)| Some((at as u64, entry.object.as_deref()?)));
    let kinds: Vec<Column> = match schema {
        Some(schema) => schema.columns.clone(),
        None => wanted.iter().map(|(name, kind)| Column { name: name.clone(), kind: kind.clone() }).collect(),
    };
    let narrow = Kind::scalar(DType::F32);
    let is_narrow = |name: &str| kinds.iter().any(|column| column.name == name && column.kind == narrow);
    // What is kept in 32 bits is read in 64.
    let wide = |column: &Column| match column.kind == narrow {
        true => Column { name: column.name.clone(), kind: Kind::scalar(DType::F64) },
        false => column.clone(),
    };
    let wide = Schema { columns: kinds.iter().map(wide).collect() };
    let table = jsonl::objects(texts, Some(&wide), OBJECTS_BYTES_MAX);
    let table = table.map_err(|(at, reason)| (at.unwrap_or(0) as usize, "value".to_owned(), reason))?;
    let mut columns = Vec::with_capacity(table.columns.len());
    let mut wrong: Option<(usize, String, String)> = None;
    for TableColumn { name, kind, cells } in table.columns {
        let gap = match schema.is_some_and(|schema| schema.index_of(&name).is_none()) {
            // The first entry that has what those before it had not.
            true => (0..cells.cells.len())
                .find(|at| cells.gap(*at).is_none_or(|gap| gap.fault.is_some()))
                .map(|at| (at, "entries before it have no such key".to_owned())),
            false => cells.gaps.first().map(|gap| {
                (gap.row, gap.fault.clone().unwrap_or_else(|| "the object has no value for this key".to_owned()))
            }),
        };
        match gap {
            // The first entry that does not fit is told of, whatever its column.
            Some((at, reason)) if wrong.as_ref().is_none_or(|(first, ..)| at < *first) => {
                wrong = Some((at, name, reason));
            }
            Some(_) => {}
            None if is_narrow(&name) => {
                let cells = narrowed(&cells.cells).map_err(|reason| (0, name.clone(), reason))?;
                columns.push(ObjectColumn { name, kind: narrow.clone(), cells });
            }
            None => columns.push(ObjectColumn { name, kind, cells: cells.cells }),
        }
    }
    wrong.map_or(Ok(columns), Err)
}

/// Numbers in 32 bits each.
fn narrowed(cells: &Cells) -> Result<Cells, String> {
    let Cells::Numbers(numbers) = cells else { return Err("is no number".to_owned()) };
    let numbers: Vec<f32> = numbers.to_f64().map_err(|e| e.to_string())?.iter().map(|v| *v as f32).collect();
    Ok(Cells::Numbers(Tensor::vector(&numbers)))
}

/// Cells of a kind, or of the kind that they can all be.
fn cells_of(cells: Vec<Bytes>, wanted: Option<&Kind>) -> Result<(Kind, Cells), (usize, String)> {
    let scalar = |dtype| Some(Kind::scalar(dtype));
    match wanted {
        Some(Kind::Bytes) => Ok((Kind::Bytes, Cells::Bytes(cells))),
        Some(Kind::Text) => {
            let wrong = cells.iter().enumerate().find_map(|(at, cell)| Some((at, check_text(cell).err()?)));
            wrong.map_or(Ok((Kind::Text, Cells::Bytes(cells))), Err)
        }
        Some(kind) if Some(kind) == scalar(DType::F32).as_ref() => {
            let (_, cells) = numbers(cells, &Kind::scalar(DType::F64))?;
            Ok((kind.clone(), narrowed(&cells).map_err(|reason| (0, reason))?))
        }
        Some(kind) if Some(kind) == scalar(DType::I64).as_ref() || Some(kind) == scalar(DType::F64).as_ref() => {
            numbers(cells, kind)
        }
        Some(kind) => {
            Err((0, format!("fields of entries are bytes, text, i64, f64 or f32, and the column holds {kind}")))
        }
        None if cells.iter().all(|cell| check_text(cell).is_ok()) => {
            if cells.iter().any(Bytes::is_empty) {
                return Ok((Kind::Text, Cells::Bytes(cells)));
            }
            let (kind, cells) = type_cells(cells, None);
            cells.map(|cells| (kind, cells)).map_err(|(at, reason)| (at as usize, reason))
        }
        None => Ok((Kind::Bytes, Cells::Bytes(cells))),
    }
}

fn numbers(cells: Vec<Bytes>, kind: &Kind) -> Result<(Kind, Cells), (usize, String)> {
    let (_, typed) = type_cells(cells, Some(kind));
    typed.map(|cells| (kind.clone(), cells)).map_err(|(at, reason)| (at as usize, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(rows: &[&[(&str, &[u8])]]) -> Vec<Entry<usize>> {
        let entry = |(at, fields): (usize, &&[(&str, &[u8])])| Entry {
            id: at,
            object: None,
            fields: fields
                .iter()
                .map(|(n, v)| (Bytes::copy_from_slice(n.as_bytes()), Bytes::copy_from_slice(v)))
                .collect(),
        };
        rows.iter().enumerate().map(entry).collect()
    }

    fn check(rows: &[&[(&str, &[u8])]], wanted: &[(&str, Kind)]) -> Result<Rows, (usize, String)> {
        let wanted = wanted.iter().map(|(name, kind)| ((*name).to_owned(), kind.clone())).collect();
        let entries = entries(rows);
        super::rows(&entries, None, &wanted, &|entry| format!("entry {}", entry.id))
            .map_err(|(at, e)| (at, e.to_string()))
    }

    #[test]
    fn fields_become_columns_of_what_all_their_values_are() {
        let rows = check(
            &[
                &[("n", b"1"), ("x", b"1"), ("t", b"a"), ("b", b"\xff"), ("empty", b"")],
                &[("x", b"2.5"), ("n", b"2"), ("t", b"7"), ("b", b"b"), ("empty", b"1")],
            ],
            &[],
        )
        .unwrap();
        let kinds: Vec<String> = rows.schema.columns.iter().map(|c| format!("{} {}", c.name, c.kind)).collect();
        assert_eq!(kinds, ["n i64", "x f64", "t text", "b bytes", "empty text"]);
        assert_eq!(rows.columns[1], Cells::Numbers(Tensor::vector(&[1.0, 2.5])));
    }

    #[test]
    fn an_entry_that_does_not_fit_is_named() {
        let number = [("n", Kind::scalar(DType::F32))];
        for (rows, wanted, at, expected) in [
            (&[&[("n", &b"1"[..])][..], &[("n", b"x")]][..], &number[..], 1, "entry 1, column `n`: `x` is not f64"),
            (&[&[("n", b"1")], &[]], &[], 1, "entry 1, column `n`: the entry has no such field"),
            (&[&[("n", b"1")], &[("n", b"1"), ("m", b"1")]], &[], 1, "entry 1, column `m`: entries before it have no"),
            (&[&[("n", b"1"), ("n", b"2")]], &[], 0, "entry 0, column `n`: the entry has this field twice"),
            (&[&[("m", b"1")]], &number, 0, "entry 0, column `n`: is asked for"),
        ] {
            let (found, message) = check(rows, wanted).unwrap_err();
            assert_eq!(found, at);
            assert!(message.starts_with(expected), "{message}");
        }
    }
}
