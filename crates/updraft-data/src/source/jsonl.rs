//! JSON Lines: one object a line, whose keys are the columns.

use std::collections::HashMap;

use bytes::Bytes;
use serde_json::{Map, Value};
use updraft_graph::{DType, Tensor};

use crate::rows::{Cells, Gap, PartialCells, tensor_of};
use crate::schema::{Kind, Schema};
use crate::source::whole::{Table, TableColumn};

/// All rows of a file. Columns are the keys in the order in which they come; a column is of whole numbers where all are,
/// of numbers where some have a fraction, and of arrays where all rows hold arrays of numbers. A key that a line lacks is
/// as if it were null there.
pub(crate) fn table(text: &[u8], wanted: Option<&Schema>, memory_bytes: u64) -> Result<Table, String> {
    let mut names: Vec<String> = Vec::new();
    let mut cells: Vec<Vec<Value>> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut lines = Vec::new();
    let mut missing = 0;
    // Keys that few lines have take a place in all, for which a small file could need any memory.
    let fill = |column: &mut Vec<Value>, rows: usize, missing: &mut usize| {
        *missing += rows.saturating_sub(column.len());
        if (*missing * size_of::<Value>()) as u64 > memory_bytes {
            return Err(format!("{missing} cells are missing, which takes more than memory_bytes"));
        }
        column.resize(rows.max(column.len()), Value::Null);
        Ok(())
    };
    for (at, line) in text.split(|b| *b == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let number = at as u64 + 1;
        let row: Map<String, Value> = serde_json::from_slice(line).map_err(|e| format!("line {number}: {e}"))?;
        for (expected, (key, value)) in row.into_iter().enumerate() {
            // Keys are in the same order mostly.
            let known = if names.get(expected) == Some(&key) { Some(expected) } else { places.get(&key).copied() };
            let column = known.unwrap_or_else(|| {
                places.insert(key.clone(), names.len());
                names.push(key);
                cells.push(Vec::new());
                names.len() - 1
            });
            fill(&mut cells[column], lines.len(), &mut missing).map_err(|reason| format!("line {number}: {reason}"))?;
            cells[column].push(value);
        }
        lines.push(number);
    }
    let rows = lines.len();
    cells.iter_mut().try_for_each(|column| fill(column, rows, &mut missing))?;
    let typed = |(name, cells): (String, Vec<Value>)| {
        let wanted = wanted.and_then(|s| s.columns.iter().find(|c| c.name == name)).map(|c| &c.kind);
        let (kind, gaps) = match wanted {
            Some(kind) => (kind.clone(), Vec::new()),
            None => kind_of(&cells),
        };
        let cells = convert(&cells, &kind, gaps, memory_bytes).map_err(|reason| format!("column `{name}` {reason}"))?;
        Ok(TableColumn { name, kind, cells })
    };
    let columns = names.into_iter().zip(cells).map(typed).collect::<Result<_, String>>()?;
    Ok(Table { rows: rows as u64, columns, lines })
}

/// The kind that all values have, or that those before have where one does not fit; that one is a gap.
fn kind_of(cells: &[Value]) -> (Kind, Vec<Gap>) {
    let mut kind: Option<Kind> = None;
    let mut gaps = Vec::new();
    for (row, value) in cells.iter().enumerate() {
        let found = match value {
            Value::Null => continue,
            Value::String(_) => Ok(Kind::Text),
            Value::Array(_) => {
                let mut shape = Vec::new();
                array_kind(value, 0, &mut shape).map(|dtype| Kind::Number { dtype, shape })
            }
            value => scalar(value).map(Kind::scalar),
        };
        let joined = found.and_then(|found| match &kind {
            None => Ok(found),
            Some(before) => join(before.clone(), found),
        });
        match joined {
            Ok(joined) => kind = Some(joined),
            Err(reason) => gaps.push(Gap::fault(row, reason)),
        }
    }
    (kind.unwrap_or(Kind::Text), gaps)
}

fn scalar(value: &Value) -> Result<DType, String> {
    match value {
        Value::Bool(_) => Ok(DType::Bool),
        Value::Number(n) if n.is_i64() => Ok(DType::I64),
        Value::Number(_) => Ok(DType::F64),
        Value::Null => Err("has no value".into()),
        _ => Err("holds an object; text, numbers, booleans and arrays of numbers are read".into()),
    }
}

/// Arrays nest this deep at most.
const RANK_MAX: usize = 8;

fn array_kind(value: &Value, depth: usize, shape: &mut Vec<usize>) -> Result<DType, String> {
    let Value::Array(items) = value else { return scalar(value) };
    if depth == RANK_MAX {
        return Err(format!("arrays nest more than {RANK_MAX} deep"));
    }
    match shape.get(depth) {
        None => shape.push(items.len()),
        Some(length) if *length == items.len() => {}
        Some(length) => return Err(format!("holds arrays of {length} and of {} in one row", items.len())),
    }
    let mut dtype: Option<DType> = None;
    for item in items {
        let found = array_kind(item, depth + 1, shape)?;
        dtype = Some(dtype.map_or(Ok(found), |before| wider(before, found))?);
    }
    Ok(dtype.unwrap_or(DType::I64))
}

fn wider(a: DType, b: DType) -> Result<DType, String> {
    match (a, b) {
        (a, b) if a == b => Ok(a),
        (DType::I64, DType::F64) | (DType::F64, DType::I64) => Ok(DType::F64),
        (a, b) => Err(format!("holds {a} in some rows and {b} in others")),
    }
}

/// What cells of two kinds can both be.
pub(crate) fn join(a: Kind, b: Kind) -> Result<Kind, String> {
    Ok(match (a, b) {
        (a, b) if a == b => a,
        (Kind::Number { dtype: a, shape }, Kind::Number { dtype: b, shape: other }) => {
            let dtype = wider(a, b)?;
            match (shape.len(), other.len()) {
                _ if shape == other => Kind::Number { dtype, shape },
                (1, 1) => Kind::List { dtype },
                _ => return Err(format!("holds arrays of shape {shape:?} in some rows and {other:?} in others")),
            }
        }
        (Kind::List { dtype: a }, Kind::Number { dtype: b, shape })
        | (Kind::Number { dtype: b, shape }, Kind::List { dtype: a })
            if shape.len() == 1 =>
        {
            Kind::List { dtype: wider(a, b)? }
        }
        (Kind::List { dtype: a }, Kind::List { dtype: b }) => Kind::List { dtype: wider(a, b)? },
        (a, b) => return Err(format!("holds {a} in some rows and {b} in others")),
    })
}

/// Values as cells of a kind, with a gap for each that is null or of another kind, beside the gaps that are known.
fn convert(cells: &[Value], kind: &Kind, mut gaps: Vec<Gap>, memory_bytes: u64) -> Result<PartialCells, String> {
    // Rows that are missing take none of the file, so a long array in one may ask for any amount in all.
    let row_bytes = kind.row_bytes().unwrap_or(0);
    let needed_bytes = row_bytes.checked_mul(cells.len()).filter(|needed| *needed as u64 <= memory_bytes);
    needed_bytes.ok_or_else(|| format!("takes more than memory_bytes: {} rows of {row_bytes} bytes", cells.len()))?;
    let mut texts = Vec::new();
    let mut lists = Vec::new();
    let mut bytes = Vec::new();
    for (row, value) in cells.iter().enumerate() {
        let before = bytes.len();
        let read = match (kind, value) {
            (_, Value::Null) => Err(None),
            (Kind::Text | Kind::Bytes, Value::String(text)) => {
                texts.push(Bytes::copy_from_slice(text.as_bytes()));
                Ok(())
            }
            (Kind::Number { dtype, shape }, value) => push(value, *dtype, shape, &mut bytes)
                .and_then(|()| if bytes.len() - before == row_bytes { Ok(()) } else { Err(format!("is not {kind}")) })
                .map_err(Some),
            (Kind::List { dtype }, Value::Array(items)) => {
                let mut elements = Vec::new();
                push(value, *dtype, &[items.len()], &mut elements)
                    .map(|()| lists.push(tensor_of(*dtype, &[items.len()], &elements)))
                    .map_err(Some)
            }
            _ => Err(Some(format!("is not {kind}"))),
        };
        if let Err(fault) = read {
            gaps.push(Gap { row, fault });
            match kind {
                Kind::Text | Kind::Bytes => texts.push(Bytes::new()),
                Kind::List { dtype } => lists.push(tensor_of(*dtype, &[0], &[])),
                Kind::Number { .. } => bytes.resize(before + row_bytes, 0),
            }
        }
    }
    let cells = match kind {
        Kind::Text | Kind::Bytes => Cells::Bytes(texts),
        Kind::List { .. } => Cells::Lists(lists),
        Kind::Number { dtype, shape } => {
            let shape = [&[cells.len()], shape.as_slice()].concat();
            Cells::Numbers(Tensor::from_bytes(*dtype, &shape, &bytes).map_err(|e| e.to_string())?)
        }
    };
    Ok(PartialCells::new(cells, gaps))
}

/// Appends the elements of a value in native order.
fn push(value: &Value, dtype: DType, shape: &[usize], out: &mut Vec<u8>) -> Result<(), String> {
    if let Some((length, inner)) = shape.split_first() {
        return match value {
            Value::Array(items) if items.len() == *length => {
                items.iter().try_for_each(|item| push(item, dtype, inner, out))
            }
            Value::Array(items) => Err(format!("holds {} values; {length} are expected", items.len())),
            _ => Err("is no array".into()),
        };
    }
    let no = || format!("`{:.40}` is not {dtype}", value.to_string());
    match dtype {
        DType::I64 => out.extend_from_slice(&value.as_i64().ok_or_else(no)?.to_ne_bytes()),
        DType::F64 => out.extend_from_slice(&value.as_f64().ok_or_else(no)?.to_ne_bytes()),
        DType::Bool => out.push(u8::from(value.as_bool().ok_or_else(no)?)),
        _ => return Err(no()),
    }
    Ok(())
}
