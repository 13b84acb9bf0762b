//! SQL that looks at one row at a time, over rows that are in memory.
//!
//! Whether it does is seen in its plan: projections, filters and `unnest` over one scan give for the rows of a dataset
//! what they give for its parts, one after the other. Whatever else a plan holds (groups, orders, limits, joins, windows)
//! needs all rows.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use datafusion::arrow::array::{RecordBatch, RecordBatchOptions};
use datafusion::arrow::datatypes::SchemaRef;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion};
use datafusion::common::{DataFusionError, Result};
use datafusion::datasource::provider_as_source;
use datafusion::execution::TaskContext;
use datafusion::execution::session_state::SessionState;
use datafusion::logical_expr::{Expr, LogicalPlan, TableType};
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PlanProperties, SendableRecordBatchStream, collect,
};
use futures_util::stream;
use updraft_data::ingest::{Change, Steps};
use updraft_data::{DataError, Rows, Schema};

use crate::arrow::array_of;
use crate::error::{QueryError, of_engine};
use crate::query::{Query, rows_of, runtime};

/// Bytes of rows that are computed at once: Arrow counts those of a column in 31 bits.
const BATCH_BYTES: u64 = 64 << 20;

/// Why a query needs all rows; `None` where every row is looked at by itself.
pub(crate) fn needs_all_rows(plan: &LogicalPlan) -> Option<String> {
    let mut reason = None;
    let mut scans = 0;
    // Visiting only reads, and nothing that it calls fails.
    let visited = plan.apply(|node| {
        let found = match node {
            LogicalPlan::Projection(_)
            | LogicalPlan::Filter(_)
            | LogicalPlan::SubqueryAlias(_)
            | LogicalPlan::Unnest(_) => None,
            LogicalPlan::TableScan(_) => {
                scans += 1;
                None
            }
            LogicalPlan::Aggregate(_) => Some("it groups rows"),
            LogicalPlan::Sort(_) => Some("it orders rows"),
            LogicalPlan::Limit(_) => Some("it limits the number of rows"),
            LogicalPlan::Distinct(_) => Some("it leaves out repeated rows"),
            LogicalPlan::Join(_) => Some("it joins rows"),
            LogicalPlan::Union(_) => Some("it puts several selections one after the other"),
            LogicalPlan::Window(_) => Some("it looks at neighbouring rows (a window)"),
            _ => Some("it is more than a selection of rows"),
        };
        let is_subquery = |e: &Expr| matches!(e, Expr::ScalarSubquery(_) | Expr::Exists(_) | Expr::InSubquery(_));
        let has_subquery = node.expressions().iter().any(|e| e.exists(|e| Ok(is_subquery(e))).unwrap_or(true));
        let found = found.or(has_subquery.then_some("it has a subquery"));
        reason = found.map(str::to_owned);
        Ok(if reason.is_some() { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    });
    match (visited, reason, scans) {
        (Err(error), ..) => Some(error.to_string()),
        (_, Some(reason), _) => Some(reason),
        (_, None, 1) => None,
        (_, None, _) => Some("it reads the table more than once".to_owned()),
    }
}

/// SQL on rows and steps after it.
pub(crate) struct RowsSql {
    state: SessionState,
    plan: Arc<dyn ExecutionPlan>,
    /// The columns that it is given.
    reads: Vec<String>,
    made: Arc<Schema>,
    steps: Steps,
    sql: String,
}

impl RowsSql {
    /// The query, which [needs](needs_all_rows) no other rows than those that it is given, followed by the steps.
    pub(crate) fn new(query: &Query, table: &SchemaRef, steps: Steps) -> Result<RowsSql, QueryError> {
        let engine = |error: DataFusionError| of_engine(&error, &query.slot, query.memory_bytes);
        let given = provider_as_source(Arc::new(Given(table.clone())));
        let plan = query.plan.clone().transform_up(|node| match node {
            LogicalPlan::TableScan(mut scan) => {
                scan.source = given.clone();
                Ok(Transformed::yes(LogicalPlan::TableScan(scan)))
            }
            other => Ok(Transformed::no(other)),
        });
        let plan = plan.data().map_err(engine)?;
        let plan = query.runtime.block_on(query.state.create_physical_plan(&plan)).map_err(engine)?;
        // Where the planner saw that no row is selected, there is no scan.
        let scan = scan_of(&plan).unwrap_or_else(|| table.clone());
        let mut reads: Vec<String> = scan.fields().iter().map(|field| field.name().clone()).collect();
        // Rows without columns cannot be counted.
        reads.extend(table.fields().first().filter(|_| reads.is_empty()).map(|field| field.name().clone()));
        let made = Arc::new(query.schema()?);
        Ok(RowsSql { state: query.state.clone(), plan, reads, made, steps, sql: query.sql.clone() })
    }

    pub(crate) fn reads(&self) -> &[String] {
        &self.reads
    }

    fn batches(&self, rows: &Rows) -> Result<Vec<RecordBatch>, QueryError> {
        let fields = scan_of(&self.plan);
        let mut arrays = Vec::new();
        for field in fields.iter().flat_map(|schema| schema.fields()) {
            let at = rows.schema.index_of(field.name());
            let (at, cells) = at.and_then(|at| Some((at, rows.columns.get(at)?))).ok_or_else(|| {
                QueryError::Execution { reason: format!("the column `{}` was not read", field.name()) }
            })?;
            let refused = |reason| QueryError::Column { column: field.name().clone(), reason };
            arrays.push(array_of(&rows.schema.columns[at].kind, cells).map_err(refused)?);
        }
        let failed = |e: DataFusionError| QueryError::Execution { reason: e.to_string() };
        let schema = fields.unwrap_or_else(|| Arc::new(datafusion::arrow::datatypes::Schema::empty()));
        let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
        let batch = RecordBatch::try_new_with_options(schema, arrays, &options);
        let batch = batch.map_err(|e| failed(e.into()))?;
        // The plan is one for all threads; which rows it is about is in the context of the execution.
        let config = self.state.config().clone().with_extension(Arc::new(GivenRows(batch)));
        let context = TaskContext::from(&self.state).with_session_config(config);
        let done = runtime()?.block_on(collect(self.plan.clone(), Arc::new(context)));
        done.map_err(|error| of_engine(&error, &Default::default(), u64::MAX))
    }
}

impl Change for RowsSql {
    fn schema(&self) -> &Arc<Schema> {
        self.steps.schema()
    }

    fn identity(&self) -> String {
        format!("{} {}\n{}\n{}", crate::query::VERSION, datafusion::DATAFUSION_VERSION, self.sql, self.steps.identity())
    }

    fn apply(&self, rows: Rows, place: &dyn Fn(usize) -> String) -> Result<Rows, DataError> {
        let row_bytes = (rows.memory_bytes() / rows.len().max(1) as u64).max(1);
        let part = (BATCH_BYTES / row_bytes).clamp(1, rows.len().max(1) as u64) as usize;
        let mut made = Vec::new();
        for first in (0..rows.len()).step_by(part) {
            let failed = |error: QueryError| match error {
                QueryError::Data(error) => error,
                error => DataError::Loader(format!("rows from {}: {error}", place(first))),
            };
            let given = rows.slice(first..rows.len().min(first + part));
            for batch in self.batches(&given).map_err(failed)? {
                made.push(rows_of(&self.made, &batch).map_err(failed)?);
            }
        }
        let made = Rows::concat(&self.made, &made).map_err(DataError::Loader)?;
        let start = place(0);
        self.steps.apply(made, &|row| format!("row {row} of what the query makes of the rows from {start}"))
    }
}

/// What the scan of a plan gives, if there is one.
fn scan_of(plan: &Arc<dyn ExecutionPlan>) -> Option<SchemaRef> {
    match plan.downcast_ref::<GivenScan>() {
        Some(scan) => Some(scan.schema.clone()),
        None => plan.children().into_iter().find_map(scan_of),
    }
}

/// The rows that an execution is about.
struct GivenRows(RecordBatch);

/// A table of whatever rows an execution is given.
#[derive(Debug)]
struct Given(SchemaRef);

#[async_trait]
impl TableProvider for Given {
    fn schema(&self) -> SchemaRef {
        self.0.clone()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        _: &dyn Session,
        projection: Option<&Vec<usize>>,
        _: &[Expr],
        _: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let schema = match projection {
            Some(columns) => Arc::new(self.0.project(columns)?),
            None => self.0.clone(),
        };
        let properties = Arc::new(PlanProperties::new(
            EquivalenceProperties::new(schema.clone()),
            Partitioning::UnknownPartitioning(1),
            EmissionType::Incremental,
            Boundedness::Bounded,
        ));
        Ok(Arc::new(GivenScan { schema, properties }))
    }
}

#[derive(Debug)]
struct GivenScan {
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
}

impl DisplayAs for GivenScan {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GivenRows")
    }
}

impl ExecutionPlan for GivenScan {
    fn name(&self) -> &'static str {
        "GivenRows"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        Vec::new()
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(self: Arc<Self>, _: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn execute(&self, _: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let given = context.session_config().get_extension::<GivenRows>();
        let given = given.ok_or_else(|| DataFusionError::Execution("no rows were given".into()))?;
        let batches = stream::iter([Ok(given.0.clone())]);
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), batches)))
    }
}
