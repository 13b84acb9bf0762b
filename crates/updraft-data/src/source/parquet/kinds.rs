//! What the columns of a file are: its own word where the file is ours, else what the types of Parquet say.

use parquet::basic::{ConvertedType, LogicalType, Repetition};
use parquet::file::metadata::ParquetMetaData;
use parquet::schema::types::{ColumnDescriptor, Type};

use crate::schema::{Column, Kind, Schema};
use crate::source::parquet::chunk::{Leaf, READ};

/// The footer's key for the columns as our writer had them.
pub(crate) const SCHEMA_KEY: &str = "updraft.schema";

/// The columns of a file that we wrote.
pub(super) fn own_schema(metadata: &ParquetMetaData) -> Result<Option<Schema>, String> {
    let entries = metadata.file_metadata().key_value_metadata();
    let entry = entries.into_iter().flatten().find(|entry| entry.key == SCHEMA_KEY);
    let Some(json) = entry.and_then(|entry| entry.value.as_ref()) else { return Ok(None) };
    serde_json::from_str(json).map(Some).map_err(|e| format!("the columns in its footer are damaged: {e}"))
}

/// The name of a column: its path, without the groups that are nothing but the levels of a list, which every writer calls
/// otherwise.
pub(super) fn name_of(root: &Type, leaf: &ColumnDescriptor) -> String {
    let (mut node, mut levels) = (root, 0);
    let mut names: Vec<&str> = Vec::new();
    for part in leaf.path().parts() {
        let field = node.is_group().then(|| node.get_fields().iter().find(|field| field.name() == part)).flatten();
        let Some(field) = field else { return leaf.path().string() };
        match levels {
            0 => names.push(part),
            _ => levels -= 1,
        }
        if levels == 0 {
            levels = list_levels(field);
        }
        node = field;
    }
    names.join(".")
}

/// How many names below a list are not those of its elements' fields: the repeated group, and the element where that is
/// all that the group holds ("Lists" in LogicalTypes.md of apache/parquet-format).
fn list_levels(field: &Type) -> usize {
    let basic = field.get_basic_info();
    let is_list = basic.logical_type_ref() == Some(&LogicalType::List) || basic.converted_type() == ConvertedType::LIST;
    let [repeated] = (if field.is_group() && is_list { field.get_fields() } else { &[] }) else { return 0 };
    let info = repeated.get_basic_info();
    if !info.has_repetition() || info.repetition() != Repetition::REPEATED {
        return 0;
    }
    let is_element = |name: &str| name == "array" || name.strip_suffix("_tuple") == Some(field.name());
    match repeated.is_group() && repeated.get_fields().len() == 1 && !is_element(repeated.name()) {
        true => 2,
        false => 1,
    }
}

/// What a column holds. Lists that are of one length on average in every row group are taken to be of that length, which
/// decoding checks.
pub(super) fn kind_of(metadata: &ParquetMetaData, place: usize, leaf: &ColumnDescriptor) -> Result<Kind, String> {
    let nested = leaf.max_rep_level() > 0;
    let dtype = match Leaf::of(leaf)? {
        Leaf::Bytes | Leaf::Text if nested => {
            return Err(format!("holds lists of texts or bytes; {READ}"));
        }
        Leaf::Bytes => return Ok(Kind::Bytes),
        Leaf::Text => return Ok(Kind::Text),
        Leaf::Number(dtype) => dtype,
    };
    if leaf.max_rep_level() > 1 {
        return Err(format!("holds lists of lists; {READ}"));
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

/// The leaf that is the column of a manifest: that of its name or path, or of a root with one leaf; or why it cannot be read,
/// which matters to those who want it.
pub(super) fn place_of(
    metadata: &ParquetMetaData,
    found: &[(String, Result<Kind, String>)],
    Column { name, kind }: &Column,
) -> Result<Result<usize, String>, String> {
    let leaves = metadata.file_metadata().schema_descr().columns();
    let mut of_root = leaves.iter().enumerate().filter(|(_, leaf)| leaf.path().parts().first() == Some(name));
    let named = found.iter().position(|(found, _)| found == name);
    let named = named.or_else(|| leaves.iter().position(|leaf| leaf.path().string() == *name));
    let place = named.or_else(|| match (of_root.next(), of_root.next()) {
        (Some((place, _)), None) => Some(place),
        _ => None,
    });
    let place = place.ok_or_else(|| format!("column `{name}` ({kind}) is missing"))?;
    let is = match (&found[place].1, kind) {
        (Ok(is), _) => is,
        // What such a column was called where another file was opened.
        (Err(reason), Kind::Bytes) => return Ok(Err(reason.clone())),
        (Err(reason), _) => return Err(format!("column `{name}`: {reason}")),
    };
    let agrees = match (kind, is) {
        (kind, is) if kind == is => true,
        // Lists become what decoding finds them to be.
        (
            Kind::Number { dtype, .. } | Kind::List { dtype },
            Kind::Number { dtype: found, .. } | Kind::List { dtype: found },
        ) => dtype == found && leaves[place].max_rep_level() > 0,
        _ => false,
    };
    if agrees { Ok(Ok(place)) } else { Err(format!("column `{name}` is {is}, not {kind}")) }
}
