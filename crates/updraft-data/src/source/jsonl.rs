//! JSON Lines: one object a line, whose keys are the columns.

use bytes::Bytes;
use serde_json::{Map, Value};
use updraft_graph::{DType, Tensor};

use crate::rows::{Cells, tensor_of};
use crate::schema::{Kind, Schema};
use crate::source::whole::{Table, TableColumn};

/// All rows of a file. Columns are those of its first line, in their order; a column is of whole numbers where all are,
/// of numbers where some have a fraction, and of arrays where all rows hold arrays of numbers.
pub(crate) fn table(text: &[u8], wanted: Option<&Schema>) -> Result<Table, String> {
    let mut names: Vec<String> = Vec::new();
    let mut cells: Vec<Vec<Value>> = Vec::new();
    let mut lines = Vec::new();
    for (at, line) in text.split(|b| *b == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let number = at as u64 + 1;
        let row: Map<String, Value> = serde_json::from_slice(line).map_err(|e| format!("line {number}: {e}"))?;
        if lines.is_empty() {
            names = row.keys().cloned().collect();
            cells = vec![Vec::new(); names.len()];
        }
        lines.push(number);
        if row.len() != names.len() {
            let odd = row.keys().find(|k| !names.contains(k)).or(names.iter().find(|n| !row.contains_key(*n)));
            let odd = odd.map_or("", String::as_str);
            return Err(format!("line {number}: the column `{odd}` is not in every line"));
        }
        for (expected, (key, value)) in row.into_iter().enumerate() {
            // Keys are in the same order mostly.
            let column = if names[expected] == key { Some(expected) } else { names.iter().position(|n| *n == key) };
            let column =
                column.ok_or_else(|| format!("line {number}: the column `{key}` is not in line {}", lines[0]))?;
            cells[column].push(value);
        }
    }
    let rows = lines.len() as u64;
    let typed = |(name, cells): (String, Vec<Value>)| {
        let wanted = wanted.and_then(|s| s.columns.iter().find(|c| c.name == name)).map(|c| &c.kind);
        let (kind, cells) = type_values(cells, wanted);
        TableColumn { name, kind, cells }
    };
    Ok(Table { rows, columns: names.into_iter().zip(cells).map(typed).collect(), lines })
}

fn type_values(cells: Vec<Value>, wanted: Option<&Kind>) -> (Kind, Result<Cells, (u64, String)>) {
    let found = match wanted {
        Some(kind) => Ok(kind.clone()),
        None => kind_of(&cells),
    };
    match found {
        Ok(kind) => {
            let cells = convert(&cells, &kind);
            (kind, cells)
        }
        Err(wrong) => (Kind::Text, Err(wrong)),
    }
}

/// The kind that all values have.
fn kind_of(cells: &[Value]) -> Result<Kind, (u64, String)> {
    let mut kind: Option<Kind> = None;
    for (row, value) in cells.iter().enumerate() {
        let found = match value {
            Value::String(_) => Kind::Text,
            Value::Array(_) => {
                let mut shape = Vec::new();
                let dtype = array_kind(value, 0, &mut shape).map_err(|reason| (row as u64, reason))?;
                Kind::Number { dtype, shape }
            }
            value => Kind::scalar(scalar(value).map_err(|reason| (row as u64, reason))?),
        };
        kind = Some(match (kind, found) {
            (None, found) => found,
            (Some(before), found) => join(before, found).map_err(|reason| (row as u64, reason))?,
        });
    }
    Ok(kind.unwrap_or(Kind::Text))
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

fn convert(cells: &[Value], kind: &Kind) -> Result<Cells, (u64, String)> {
    let mut texts = Vec::new();
    let mut lists = Vec::new();
    let mut bytes = Vec::new();
    for (row, value) in cells.iter().enumerate() {
        let wrong = |reason: String| (row as u64, reason);
        match (kind, value) {
            (Kind::Text | Kind::Bytes, Value::String(text)) => texts.push(Bytes::copy_from_slice(text.as_bytes())),
            (Kind::Number { dtype, shape }, value) => {
                let before = bytes.len();
                push(value, *dtype, shape, &mut bytes).map_err(wrong)?;
                let expected = shape.iter().product::<usize>() * dtype.size_in_memory();
                if bytes.len() - before != expected {
                    return Err(wrong(format!("is not {kind}")));
                }
            }
            (Kind::List { dtype }, Value::Array(items)) => {
                let mut elements = Vec::new();
                push(value, *dtype, &[items.len()], &mut elements).map_err(wrong)?;
                lists.push(tensor_of(*dtype, &[items.len()], &elements));
            }
            _ => return Err(wrong(format!("is not {kind}"))),
        }
    }
    Ok(match kind {
        Kind::Text | Kind::Bytes => Cells::Bytes(texts),
        Kind::List { .. } => Cells::Lists(lists),
        Kind::Number { dtype, shape } => {
            let shape = [&[cells.len()], shape.as_slice()].concat();
            Cells::Numbers(Tensor::from_bytes(*dtype, &shape, &bytes).map_err(|e| (0, e.to_string()))?)
        }
    })
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
