//! What can be wrong with a query: the SQL, the names in it, the data, or the memory that it needs.

use std::sync::{Arc, Mutex, PoisonError};

use datafusion::common::{DataFusionError, SchemaError};
use updraft_base::units;
use updraft_data::{DataError, known_names};

/// An error of a query.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The text is no SQL, or SQL that cannot be planned.
    #[error("{reason}")]
    Sql {
        /// What is wrong, with line and column where the text is no SQL.
        reason: String,
    },
    /// A column that no table of the query has.
    #[error("no column `{column}`; {}", known_names(column, known))]
    UnknownColumn {
        /// The column.
        column: String,
        /// The columns that there are.
        known: Vec<String>,
    },
    /// A table that was not named, where no dataset lies under its name either.
    #[error("no table `{table}`{}; a path or URL stands in quotes: from 'data/train'", match known.is_empty() {
        true => String::new(),
        false => format!("; {}", known_names(table, known)),
    })]
    UnknownTable {
        /// The table.
        table: String,
        /// The tables that were named.
        known: Vec<String>,
        /// What came of opening it as a dataset.
        #[source]
        source: Option<Box<DataError>>,
    },
    /// A column that cannot be read into a query, or kept of its answer.
    #[error("column `{column}`: {reason}")]
    Column {
        /// The column.
        column: String,
        /// Why.
        reason: String,
    },
    /// More memory would be needed than allowed.
    #[error("the query needs more than {} of memory: {reason}", units::bytes(*memory_bytes))]
    Memory {
        /// What asked for it.
        reason: String,
        /// The bound.
        memory_bytes: u64,
    },
    /// A row could not be computed.
    #[error("the query failed: {reason}")]
    Execution {
        /// Why.
        reason: String,
    },
    /// A cluster that does not answer, or not do what it is asked to.
    #[error("{reason}")]
    Cluster {
        /// What is wrong, and where.
        reason: String,
    },
    /// A part of a transformation that an executor could not do.
    #[error("{reason}")]
    Unit {
        /// What it said.
        reason: String,
        /// Whether a store was out of reach, and not data or SQL wrong.
        is_store: bool,
    },
    /// A dataset could not be read, or the answer not be written.
    #[error(transparent)]
    Data(#[from] DataError),
}

/// Where a scan leaves the error of a dataset, which DataFusion would only carry as text or behind shared pointers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slot(Arc<Mutex<Option<DataError>>>);

impl Slot {
    /// Keeps the first error, and gives what DataFusion is told.
    pub(crate) fn put(&self, error: DataError) -> DataFusionError {
        let told = DataFusionError::Execution(error.to_string());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        told
    }

    fn take(&self) -> Option<DataError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// DataFusion's error in our words.
pub(crate) fn of_engine(error: &DataFusionError, slot: &Slot, memory_bytes: u64) -> QueryError {
    if let Some(error) = slot.take() {
        return QueryError::Data(error);
    }
    match error.find_root() {
        DataFusionError::SchemaError(schema, _) => match schema.as_ref() {
            SchemaError::FieldNotFound { field, valid_fields } => {
                let mut known: Vec<String> = valid_fields.iter().map(|field| field.name.clone()).collect();
                known.dedup();
                QueryError::UnknownColumn { column: field.name.clone(), known }
            }
            other => QueryError::Sql { reason: other.to_string() },
        },
        DataFusionError::SQL(parser, _) => {
            let text = parser.to_string();
            let reason = text.strip_prefix("sql parser error: ").unwrap_or(&text);
            QueryError::Sql { reason: format!("this is no SQL: {reason}") }
        }
        DataFusionError::Plan(reason) | DataFusionError::NotImplemented(reason) => {
            QueryError::Sql { reason: first_part(reason) }
        }
        DataFusionError::ResourcesExhausted(reason) => QueryError::Memory { reason: first_part(reason), memory_bytes },
        other => QueryError::Execution { reason: first_part(&other.message()) },
    }
}

/// A message without the traces that debug builds append, on one line.
fn first_part(reason: &str) -> String {
    let reason = reason.split(DataFusionError::BACK_TRACE_SEP).next().unwrap_or(reason);
    // Before this stands each way in which the arguments of a function do not fit.
    let reason = reason.find("No function matches").map_or(reason, |at| &reason[at..]);
    reason.split_whitespace().collect::<Vec<_>>().join(" ")
}
