//! A query: planned over tables that are opened when the SQL names them, shown or kept as a dataset.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use datafusion::arrow::array::{Array, ArrayRef, RecordBatch};
use datafusion::arrow::datatypes::DataType;
use datafusion::arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::common::{DataFusionError, ScalarValue, TableReference};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::execution::context::SQLOptions;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::execution::session_state::{SessionState, SessionStateBuilder};
use datafusion::logical_expr::{LogicalPlan, Volatility};
use datafusion::physical_optimizer::optimizer::PhysicalOptimizer;
use datafusion::prelude::{DataFrame, SessionConfig, SessionContext};
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast::Statement as SqlStatement;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use updraft_base::{Digest, Hasher, units};
use updraft_data::ingest::{Change, IngestOptions, Ingested, Steps, ingest_rows};
use updraft_data::shards::Shards;
use updraft_data::{Cells, Column, DataError, Kind, Rows, Schema};
use updraft_store::Objects;

use crate::arrow::{cells_of, kind_of};
use crate::error::{QueryError, Slot, of_engine};
use crate::in_turn::UnionsInTurn;
use crate::table::{Provider, Table};

/// Part of the identity of an answer: another number where the same query over the same data becomes other rows.
pub(crate) const VERSION: &str = "1";

/// What a query may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryOptions {
    /// Threads that read. They change no answer.
    pub threads: usize,
    /// The most memory, half for blocks that are read ahead and half for sorting, joining and grouping, which spill to
    /// temporary files.
    pub memory_bytes: u64,
}

/// A query that is planned.
pub struct Query {
    pub(crate) runtime: Runtime,
    pub(crate) state: SessionState,
    pub(crate) plan: LogicalPlan,
    columns: Vec<ResultColumn>,
    pub(crate) sql: String,
    pub(crate) tables: Vec<Arc<Table>>,
    pub(crate) slot: Slot,
    pub(crate) memory_bytes: u64,
}

/// A column of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct ResultColumn {
    /// Its name.
    pub name: String,
    /// What it would be in a dataset; `None` for what datasets do not hold, such as times.
    pub kind: Option<Kind>,
    /// What it holds, in words.
    pub holds: String,
}

/// Rows of an answer, in memory.
pub struct Answer {
    /// The columns.
    pub columns: Vec<ResultColumn>,
    /// Whether there are more rows.
    pub is_cut: bool,
    batches: Vec<RecordBatch>,
}

impl Query {
    /// Plans a query. `open` opens the tables by the names that the SQL has for them, quoted or not; `known` are names
    /// that it has more for than what lies in files, which an error about a missing table lists.
    ///
    /// # Errors
    /// Text that is no SQL, a statement that is no query, unknown tables, columns and functions.
    pub fn plan(
        sql: &str,
        known: &[String],
        options: &QueryOptions,
        mut open: impl FnMut(&str) -> Result<Shards, DataError>,
    ) -> Result<Query, QueryError> {
        let slot = Slot::default();
        let memory_bytes = options.memory_bytes;
        let engine = |error: DataFusionError| of_engine(&error, &slot, memory_bytes);
        let context = context(memory_bytes / 2).map_err(engine)?;
        let state = context.state();
        let dialect = state.config().options().sql_parser.dialect;
        let statement = state.sql_to_statement(sql, &dialect).map_err(engine)?;
        if !is_query(&statement) {
            return Err(QueryError::Sql {
                reason: "queries are answered, and nothing else: select, with, explain".into(),
            });
        }
        let mut names = BTreeSet::new();
        for reference in state.resolve_table_references(&statement).map_err(engine)? {
            match reference {
                TableReference::Bare { table } => names.insert(table.to_string()),
                // `from train.parquet`: a dot outside of quotes parts schema and table.
                other => {
                    let (table, known) = (other.to_string(), known.to_vec());
                    return Err(QueryError::UnknownTable { table, known, source: None });
                }
            };
        }
        let share = memory_bytes / 2 / (names.len().max(1) as u64);
        let mut tables = Vec::with_capacity(names.len());
        for name in names {
            let shards = open(&name).map_err(|error| match is_missing(&error) {
                true => {
                    let (table, known) = (name.clone(), known.to_vec());
                    QueryError::UnknownTable { table, known, source: Some(Box::new(error)) }
                }
                false => QueryError::Data(error),
            })?;
            let table = Arc::new(Table::new(shards, options.threads, share, slot.clone())?);
            let reference = TableReference::bare(name);
            context.register_table(reference, Arc::new(Provider(table.clone()))).map_err(engine)?;
            tables.push(table);
        }
        let runtime = runtime()?;
        let state = context.state();
        let plan = runtime.block_on(state.statement_to_plan(statement)).map_err(engine)?;
        let only_reads = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
        only_reads.verify_plan(&plan).map_err(engine)?;
        let columns = columns(&plan)?;
        Ok(Query { runtime, state, plan, columns, sql: sql.to_owned(), tables, slot, memory_bytes })
    }

    /// The columns of the answer.
    pub fn columns(&self) -> &[ResultColumn] {
        &self.columns
    }

    /// The first rows of the answer.
    ///
    /// # Errors
    /// Data that cannot be read, rows that cannot be computed, memory that is too small.
    pub fn first_rows(&self, rows_max: usize) -> Result<Answer, QueryError> {
        let mut stream = self.stream(Some(rows_max.saturating_add(1)))?;
        let (mut batches, mut rows) = (Vec::new(), 0);
        while let Some(batch) = self.next(&mut stream)? {
            let taken = batch.num_rows().min(rows_max - rows);
            rows += taken;
            batches.push(batch.slice(0, taken));
            if taken < batch.num_rows() {
                return Ok(Answer { columns: self.columns.clone(), is_cut: true, batches });
            }
        }
        Ok(Answer { columns: self.columns.clone(), is_cut: false, batches })
    }

    /// Writes the answer as shards that are named by the query and the content of its tables, or finds them done. What is
    /// left is to [commit](updraft_data::ingest::commit) them.
    ///
    /// # Errors
    /// Those of [`first_rows`](Query::first_rows), columns and cells that datasets do not hold, no rows, a store that does
    /// not take them.
    pub fn write(&self, target: &Objects, options: &IngestOptions) -> Result<Ingested, QueryError> {
        let as_they_are = Steps::open(&[], &self.schema()?, Path::new(""))?;
        self.write_changed(&as_they_are, &self.identity("")?, target, options)
    }

    /// The same, with something done to the rows that `identity` stands for, too.
    pub(crate) fn write_changed(
        &self,
        change: &dyn Change,
        identity: &Digest,
        target: &Objects,
        options: &IngestOptions,
    ) -> Result<Ingested, QueryError> {
        let schema = Arc::new(self.schema()?);
        let (mut stream, mut first) = (None, 0);
        ingest_rows(change.schema(), identity, target, options, || {
            let stream = match &mut stream {
                Some(stream) => stream,
                none => none.insert(self.stream(None)?),
            };
            let Some(batch) = self.next(stream)? else { return Ok(None) };
            let rows = rows_of(&schema, &batch)?;
            let place = |row: usize| format!("row {} of the answer", first + row);
            let changed = change.apply(rows, &place)?;
            first += batch.num_rows();
            Ok(Some(changed))
        })
    }

    /// The columns of the answer as those of a dataset.
    ///
    /// # Errors
    /// A column that datasets do not hold.
    pub(crate) fn schema(&self) -> Result<Schema, QueryError> {
        let mut kept = Vec::with_capacity(self.columns.len());
        for ResultColumn { name, kind, holds } in &self.columns {
            let kind = kind.clone().ok_or_else(|| QueryError::Column {
                column: name.clone(),
                reason: format!("holds {holds}, which datasets do not; cast it to text or a number"),
            })?;
            kept.push(Column { name: name.clone(), kind });
        }
        Ok(Schema::new(kept).map_err(DataError::Loader)?)
    }

    /// Stands for all that determines the rows, and what is done to them.
    pub(crate) fn identity(&self, change: &str) -> Result<Digest, QueryError> {
        let mut hasher = Hasher::new();
        for part in [VERSION, datafusion::DATAFUSION_VERSION, &self.sql] {
            hasher.field(part.as_bytes());
        }
        // Sums of floats differ in their last bits where grouping was spilled.
        hasher.field(&self.memory_bytes.to_le_bytes());
        for table in &self.tables {
            let inputs = table.shards.inputs()?;
            hasher.field(&(inputs.len() as u64).to_le_bytes());
            for input in inputs {
                hasher.field(input.identity.as_bytes());
            }
        }
        if !change.is_empty() {
            hasher.field(change.as_bytes());
        }
        Ok(hasher.finish())
    }

    fn stream(&self, limit: Option<usize>) -> Result<SendableRecordBatchStream, QueryError> {
        let frame = DataFrame::new(self.state.clone(), self.plan.clone());
        let frame = match limit {
            None => Ok(frame),
            // What is explained is no rows.
            Some(_) if matches!(self.plan, LogicalPlan::Explain(_) | LogicalPlan::Analyze(_)) => Ok(frame),
            Some(_) => frame.limit(0, limit),
        };
        let stream = frame.and_then(|frame| self.runtime.block_on(frame.execute_stream()));
        stream.map_err(|error| of_engine(&error, &self.slot, self.memory_bytes))
    }

    /// The runtime is entered for one batch at a time, because stores, which wait for a runtime of their own, must not be
    /// called within it.
    fn next(&self, stream: &mut SendableRecordBatchStream) -> Result<Option<RecordBatch>, QueryError> {
        let batch = self.runtime.block_on(stream.next()).transpose();
        batch.map_err(|error| of_engine(&error, &self.slot, self.memory_bytes))
    }
}

/// A runtime that runs in the thread that waits for it.
pub(crate) fn runtime() -> Result<Runtime, QueryError> {
    let runtime = Builder::new_current_thread().enable_time().build();
    runtime.map_err(|e| QueryError::Execution { reason: e.to_string() })
}

/// One pipeline, names as they are written, and no functions whose answer is not determined by their arguments.
fn context(memory_bytes: u64) -> Result<SessionContext, DataFusionError> {
    let mut config = SessionConfig::new().with_target_partitions(1);
    config.options_mut().sql_parser.enable_ident_normalization = false;
    let memory = usize::try_from(memory_bytes).unwrap_or(usize::MAX);
    let runtime = RuntimeEnvBuilder::new().with_memory_limit(memory, 1.0).build_arc()?;
    let mut rules = PhysicalOptimizer::new().rules;
    rules.insert(0, Arc::new(UnionsInTurn));
    let state = SessionStateBuilder::new().with_config(config).with_runtime_env(runtime).with_default_features();
    let context = SessionContext::new_with_state(state.with_physical_optimizer_rules(rules).build());
    for (name, function) in context.state().scalar_functions() {
        if function.signature().volatility != Volatility::Immutable {
            context.deregister_udf(name);
        }
    }
    Ok(context)
}

fn is_query(statement: &Statement) -> bool {
    match statement {
        Statement::Statement(statement) => matches!(**statement, SqlStatement::Query(_)),
        Statement::Explain(explain) => is_query(&explain.statement),
        _ => false,
    }
}

fn is_missing(error: &DataError) -> bool {
    match error {
        DataError::Store(error) => error.is_not_found(),
        DataError::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

fn columns(plan: &LogicalPlan) -> Result<Vec<ResultColumn>, QueryError> {
    let mut columns: Vec<ResultColumn> = Vec::new();
    for field in plan.schema().fields() {
        let name = field.name().clone();
        if columns.iter().any(|column| column.name == name) {
            return Err(QueryError::Column {
                column: name,
                reason: "is twice in the answer; rename one with `as`".into(),
            });
        }
        let kind = kind_of(field.data_type());
        let holds = kind.as_ref().map_or_else(|| field.data_type().to_string(), Kind::to_string);
        columns.push(ResultColumn { name, kind, holds });
    }
    Ok(columns)
}

pub(crate) fn rows_of(schema: &Arc<Schema>, batch: &RecordBatch) -> Result<Rows, QueryError> {
    let mut cells: Vec<Cells> = Vec::with_capacity(schema.columns.len());
    for (column, array) in schema.columns.iter().zip(batch.columns()) {
        let refused = |reason| QueryError::Column { column: column.name.clone(), reason };
        cells.push(cells_of(&column.kind, array).map_err(refused)?);
    }
    Ok(Rows::new(schema.clone(), cells).map_err(DataError::Loader)?)
}

/// Characters of a cell that a table of text shows.
const CELL_CHARACTERS: usize = 60;

impl Answer {
    /// The number of rows.
    pub fn len(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The cells of each row for people: bytes by their size, what is long cut short.
    pub fn text(&self) -> Vec<Vec<String>> {
        self.each(|array, row| {
            let whole = match bytes_at(array, row) {
                Some(bytes) => units::bytes(bytes as u64),
                None => {
                    let options = FormatOptions::new().with_null("null");
                    let shown = ArrayFormatter::try_new(array.as_ref(), &options)
                        .and_then(|formatter| formatter.value(row).try_to_string());
                    shown.unwrap_or_else(|error| error.to_string())
                }
            };
            let escaped = whole.chars().flat_map(|c| {
                let (plain, escape) = if c.is_control() { (None, Some(c.escape_default())) } else { (Some(c), None) };
                plain.into_iter().chain(escape.into_iter().flatten())
            });
            let shown: Vec<char> = escaped.take(CELL_CHARACTERS + 1).collect();
            if shown.len() <= CELL_CHARACTERS {
                return shown.into_iter().collect();
            }
            shown.into_iter().take(CELL_CHARACTERS - 1).chain(['…']).collect()
        })
    }

    /// Each row for programs: an object of its columns. Bytes are `{"bytes": N}`, numbers that JSON lacks text.
    pub fn json(&self) -> Vec<Value> {
        let rows = self.each(|array, row| {
            ScalarValue::try_from_array(array, row)
                .map_or_else(|error| json!(error.to_string()), |value| json_of(&value))
        });
        let object = |row: Vec<Value>| self.columns.iter().map(|column| column.name.clone()).zip(row).collect();
        rows.into_iter().map(object).collect()
    }

    fn each<T>(&self, cell: impl Fn(&ArrayRef, usize) -> T) -> Vec<Vec<T>> {
        let rows = self.batches.iter().flat_map(|batch| (0..batch.num_rows()).map(move |row| (batch, row)));
        rows.map(|(batch, row)| batch.columns().iter().map(|array| cell(array, row)).collect()).collect()
    }
}

/// The length of a cell of bytes.
fn bytes_at(array: &ArrayRef, row: usize) -> Option<usize> {
    match array.data_type() {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView if !array.is_null(row) => {
            match ScalarValue::try_from_array(array, row) {
                Ok(ScalarValue::Binary(b) | ScalarValue::LargeBinary(b) | ScalarValue::BinaryView(b)) => {
                    b.map(|b| b.len())
                }
                _ => None,
            }
        }
        _ => None,
    }
}

fn json_of(value: &ScalarValue) -> Value {
    let float = |value: f64| if value.is_finite() { json!(value) } else { json!(value.to_string()) };
    let list = |values: ArrayRef| {
        let value = |row| ScalarValue::try_from_array(&values, row).map_or(Value::Null, |value| json_of(&value));
        Value::Array((0..values.len()).map(value).collect())
    };
    match value {
        value if value.is_null() => Value::Null,
        ScalarValue::Boolean(v) => json!(v),
        ScalarValue::Float16(Some(v)) => float(f64::from(*v)),
        // The shortest decimal that is the number in its own precision.
        ScalarValue::Float32(Some(v)) => v.to_string().parse().map_or(Value::Null, float),
        ScalarValue::Float64(Some(v)) => float(*v),
        ScalarValue::Int8(v) => json!(v),
        ScalarValue::Int16(v) => json!(v),
        ScalarValue::Int32(v) => json!(v),
        ScalarValue::Int64(v) => json!(v),
        ScalarValue::UInt8(v) => json!(v),
        ScalarValue::UInt16(v) => json!(v),
        ScalarValue::UInt32(v) => json!(v),
        ScalarValue::UInt64(v) => json!(v),
        ScalarValue::Binary(Some(v)) | ScalarValue::LargeBinary(Some(v)) | ScalarValue::BinaryView(Some(v)) => {
            json!({ "bytes": v.len() })
        }
        ScalarValue::List(lists) => list(lists.value(0)),
        ScalarValue::FixedSizeList(lists) => list(lists.value(0)),
        other => json!(other.to_string()),
    }
}
