//! What the columns of a file are: its own word where the file is ours, else what the types of Parquet say.

use parquet::file::metadata::ParquetMetaData;
use parquet::schema::types::ColumnDescriptor;

use crate::schema::{Column, Kind, Schema};
use crate::source::parquet::chunk::Leaf;

/// The footer's key for the columns as our writer had them.
pub(crate) const SCHEMA_KEY: &str = "updraft.schema";

/// The columns of a file that we wrote.
pub(super) fn own_schema(metadata: &ParquetMetaData) -> Result<Option<Schema>, String> {
    let entries = metadata.file_metadata().key_value_metadata();
    let entry = entries.into_iter().flatten().find(|entry| entry.key == SCHEMA_KEY);
    let Some(json) = entry.and_then(|entry| entry.value.as_ref()) else { return Ok(None) };
    serde_json::from_str(json).map(Some).map_err(|e| format!("the columns in its footer are damaged: {e}"))
}

/// What a column holds. Lists that are of one length on average in every row group are taken to be of that length, which
/// decoding checks.
pub(super) fn kind_of(metadata: &ParquetMetaData, place: usize, leaf: &ColumnDescriptor) -> Result<Kind, String> {
    let nested = leaf.max_rep_level() > 0;
    let dtype = match Leaf::of(leaf)? {
        Leaf::Bytes | Leaf::Text if nested => {
            return Err("holds lists of texts or bytes; one for each row is read".into());
        }
        Leaf::Bytes => return Ok(Kind::Bytes),
        Leaf::Text => return Ok(Kind::Text),
        Leaf::Number(dtype) => dtype,
    };
    if leaf.max_rep_level() > 1 {
        return Err("holds lists of lists; lists of numbers are read".into());
    }
    if !nested {
        return Ok(Kind::scalar(dtype));
    }
    let mut length = None;
    for group in metadata.row_groups() {
        let (rows, values) = (group.num_rows(), group.columns().get(place).map_or(0, |c| c.num_values()));
        if rows <= 0 {
            continue;
        }
        let whole = (values > 0 && values % rows == 0).then_some(values / rows);
        match (length, whole) {
            (None, Some(found)) => length = Some(found),
            (Some(before), Some(found)) if before == found => {}
            _ => return Ok(Kind::List { dtype }),
        }
    }
    match length.and_then(|l| usize::try_from(l).ok()) {
        Some(length) => Ok(Kind::Number { dtype, shape: vec![length] }),
        None => Ok(Kind::List { dtype }),
    }
}

/// The leaf that is the column of a manifest: named by its path, or by its root where that has one leaf.
pub(super) fn place_of(
    metadata: &ParquetMetaData,
    found: &[(String, Result<Kind, String>)],
    Column { name, kind }: &Column,
) -> Result<usize, String> {
    let leaves = metadata.file_metadata().schema_descr().columns();
    let mut of_root = leaves.iter().enumerate().filter(|(_, leaf)| leaf.path().parts().first() == Some(name));
    let place = found.iter().position(|(path, _)| path == name).or_else(|| match (of_root.next(), of_root.next()) {
        (Some((place, _)), None) => Some(place),
        _ => None,
    });
    let place = place.ok_or_else(|| format!("column `{name}` ({kind}) is missing"))?;
    let is = found[place].1.clone().map_err(|reason| format!("column `{name}`: {reason}"))?;
    let agrees = match (kind, &is) {
        (kind, is) if kind == is => true,
        // Lists become what decoding finds them to be.
        (
            Kind::Number { dtype, .. } | Kind::List { dtype },
            Kind::Number { dtype: found, .. } | Kind::List { dtype: found },
        ) => dtype == found && leaves[place].max_rep_level() > 0,
        _ => false,
    };
    if agrees { Ok(place) } else { Err(format!("column `{name}` is {is}, not {kind}")) }
}
