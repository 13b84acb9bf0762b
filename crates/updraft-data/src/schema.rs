//! What the columns of a dataset hold: the one vocabulary that readers, writers, manifests and validation share.
//!
//! File formats have many types; a model sees few. A [`Kind`] says what a row of a column is for us, and each reader
//! says which of its format's types become which kind. What has no kind is refused by name.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use updraft_graph::DType;
use updraft_graph::tensor::element_count;

/// Named columns, in order. Names are unique.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Column>", into = "Vec<Column>")]
pub struct Schema {
    /// The columns.
    pub columns: Vec<Column>,
}

/// One column of every row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: Kind,
}

/// What a cell is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Kind {
    /// Any bytes: pictures, sound, opaque records.
    Bytes,
    /// UTF-8.
    Text,
    /// Numbers, in every row of the same shape; the shape is empty for one number.
    Number {
        /// The element type.
        #[serde(serialize_with = "write_dtype", deserialize_with = "read_dtype")]
        dtype: DType,
        /// The shape of a row.
        shape: Vec<usize>,
    },
    /// Numbers in one dimension, of a length that differs between rows.
    List {
        /// The element type.
        #[serde(serialize_with = "write_dtype", deserialize_with = "read_dtype")]
        dtype: DType,
    },
}

fn write_dtype<S: Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.name())
}

fn read_dtype<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
    let name = String::deserialize(deserializer)?;
    // Strings are text here, and numbers that pack into part of a byte are no column of any format that is read.
    let dtype = DType::from_name(&name).filter(|d| d.bits().is_some_and(|bits| bits >= 8));
    dtype.ok_or_else(|| serde::de::Error::custom(format!("`{name}` is no element type of a column")))
}

impl TryFrom<Vec<Column>> for Schema {
    type Error = String;

    fn try_from(columns: Vec<Column>) -> Result<Schema, String> {
        Schema::new(columns)
    }
}

impl From<Schema> for Vec<Column> {
    fn from(schema: Schema) -> Vec<Column> {
        schema.columns
    }
}

impl Schema {
    /// A schema of these columns.
    ///
    /// # Errors
    /// The name that two columns have, or the column whose rows are too large for memory.
    pub fn new(columns: Vec<Column>) -> Result<Schema, String> {
        for (at, column) in columns.iter().enumerate() {
            if columns[..at].iter().any(|c| c.name == column.name) {
                return Err(format!("has two columns `{}`", column.name));
            }
            if let Kind::Number { dtype, shape } = &column.kind {
                let bytes = element_count(shape).and_then(|n| n.checked_mul(dtype.size_in_memory()));
                bytes.ok_or_else(|| format!("column `{}` of shape {shape:?} does not fit in memory", column.name))?;
            }
        }
        Ok(Schema { columns })
    }

    /// The index of the column of this name.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.name == name)
    }

    /// The names of the columns.
    pub fn names(&self) -> Vec<String> {
        self.columns.iter().map(|c| c.name.clone()).collect()
    }

    /// What the first column is in which two schemas differ, for a message: `` `label` is i64 there and text here ``.
    /// `None` where they agree; columns may lie in another order.
    pub fn difference(&self, other: &Schema) -> Option<String> {
        for Column { name, kind } in &self.columns {
            match other.index_of(name).map(|at| &other.columns[at].kind) {
                None => return Some(format!("column `{name}` ({kind}) is missing")),
                Some(found) if found != kind => return Some(format!("column `{name}` is {found}, not {kind}")),
                Some(_) => {}
            }
        }
        let extra = other.columns.iter().find(|c| self.index_of(&c.name).is_none());
        extra.map(|Column { name, kind }| format!("column `{name}` ({kind}) is extra"))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Bytes => f.write_str("bytes"),
            Kind::Text => f.write_str("text"),
            Kind::Number { dtype, shape } if shape.is_empty() => write!(f, "{dtype}"),
            Kind::Number { dtype, shape } => write!(f, "{dtype}{shape:?}"),
            Kind::List { dtype } => write!(f, "list of {dtype}"),
        }
    }
}

impl Kind {
    /// One number of this type.
    pub fn scalar(dtype: DType) -> Kind {
        Kind::Number { dtype, shape: Vec::new() }
    }

    /// Bytes that a row takes, where all rows take the same.
    pub fn row_bytes(&self) -> Option<usize> {
        match self {
            Kind::Number { dtype, shape } => {
                element_count(shape).and_then(|count| count.checked_mul(dtype.size_in_memory()))
            }
            _ => None,
        }
    }
}
