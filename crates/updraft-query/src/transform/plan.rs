//! The plan of a transformation: a partition for each unit, and a row for each that says what came of it.
//!
//! Below it lies a table in memory whose partitions hold the numbers of the units. Engines that cut a plan into tasks know
//! how to cut that, and nothing of ours; Ballista would run all partitions of a leaf that it does not know in each task.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};

use datafusion::arrow::array::{Array, AsArray, RecordBatch, StringArray, UInt64Array};
use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef, UInt64Type};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{DataFusionError, Result};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::execution::TaskContext;
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PlanProperties, SendableRecordBatchStream,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use updraft_base::Digest;

use super::{Done, Job, Transform, Transformed, Workplace};
use crate::error::QueryError;
use crate::in_turn::only;
use crate::query::runtime;

/// Jobs that a process keeps open: what an executor is asked to do comes in turns from few clients.
const OPEN_JOBS: usize = 4;

/// What came of a unit, as a row of the answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Done(Done),
    /// It cannot be done, by anyone: data or SQL, or a store that is out of reach.
    Failed {
        reason: String,
        is_store: bool,
    },
}

/// Does units of jobs, and keeps the jobs open.
pub(crate) struct Worker {
    workplace: Workplace,
    open: Mutex<VecDeque<(Arc<str>, Arc<Transform>)>>,
    /// Errors as they were, by unit, where the plan is run in this process; elsewhere their words are sent.
    errors: Option<Mutex<BTreeMap<u64, QueryError>>>,
    notes: Option<SyncSender<String>>,
}

impl Worker {
    /// Without a job; `notes` are told of units that are begun and done.
    #[cfg(feature = "ballista")]
    pub(crate) fn new(workplace: Workplace, notes: SyncSender<String>) -> Worker {
        Worker { workplace, open: Mutex::default(), errors: None, notes: Some(notes) }
    }

    /// The transformation of a job, opened by the first who needs it.
    fn transform(&self, job: &Arc<str>) -> std::result::Result<Arc<Transform>, QueryError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, transform)) = open.iter().find(|(text, _)| text == job) {
            return Ok(transform.clone());
        }
        let parsed: Job = serde_json::from_str(job)
            .map_err(|e| QueryError::Execution { reason: format!("a job that this program does not know: {e}") })?;
        let transform = Arc::new(Transform::open_job(parsed, self.workplace.clone())?);
        open.truncate(OPEN_JOBS - 1);
        open.push_front((job.clone(), transform.clone()));
        Ok(transform)
    }

    /// What an error of a unit was.
    fn error(&self, unit: usize) -> Option<QueryError> {
        let mut errors = self.errors.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        errors.remove(&(unit as u64))
    }

    fn note(&self, note: impl FnOnce() -> String) {
        if let Some(notes) = &self.notes {
            // Nobody listens any more while the process ends.
            let _ = notes.send(note());
        }
    }

    fn do_unit(&self, job: &Arc<str>, unit: u64, digest: &str) -> Outcome {
        self.note(|| format!("unit {unit}: begun"));
        let done = self.transform(job).and_then(|transform| {
            let unit = usize::try_from(unit).unwrap_or(usize::MAX);
            if transform.digest(unit).is_none_or(|seen| seen.to_string() != digest) {
                let source = &transform.job.recipe.source;
                return Err(QueryError::Execution {
                    reason: format!(
                        "unit {unit} is another here than where the work was cut: {source}, a tokenizer's file or this \
                         program differs"
                    ),
                });
            }
            transform.do_unit(unit)
        });
        match done {
            Ok(done) => {
                self.note(|| format!("unit {unit}: done"));
                Outcome::Done(done)
            }
            Err(error) => {
                self.note(|| format!("unit {unit}: {error}"));
                let is_store = matches!(&error, QueryError::Data(updraft_data::DataError::Store(_)));
                let reason = error.to_string();
                if let Some(errors) = &self.errors {
                    errors.lock().unwrap_or_else(PoisonError::into_inner).insert(unit, error);
                }
                Outcome::Failed { reason, is_store }
            }
        }
    }
}

/// Does the units whose numbers its input has.
pub(crate) struct UnitsExec {
    job: Arc<str>,
    /// Who does them; nobody where a plan is only passed on.
    worker: Option<Arc<Worker>>,
    input: Arc<dyn ExecutionPlan>,
    properties: Arc<PlanProperties>,
}

impl UnitsExec {
    pub(crate) fn new(job: Arc<str>, worker: Option<Arc<Worker>>, input: Arc<dyn ExecutionPlan>) -> UnitsExec {
        let given = input.properties();
        let properties = Arc::new(PlanProperties::new(
            EquivalenceProperties::new(outcomes_schema()),
            Partitioning::UnknownPartitioning(given.output_partitioning().partition_count()),
            given.emission_type,
            given.boundedness,
        ));
        UnitsExec { job, worker, input, properties }
    }

    /// The job as text.
    #[cfg(feature = "ballista")]
    pub(crate) fn job(&self) -> &str {
        &self.job
    }
}

fn units_schema() -> SchemaRef {
    let unit = Field::new("unit", DataType::UInt64, false);
    Arc::new(Schema::new(vec![unit, Field::new("digest", DataType::Utf8, false)]))
}

fn outcomes_schema() -> SchemaRef {
    let unit = Field::new("unit", DataType::UInt64, false);
    Arc::new(Schema::new(vec![unit, Field::new("outcome", DataType::Utf8, false)]))
}

/// The plan that does these units of a transformation, a partition each.
pub(crate) fn plan_of(
    transform: &Arc<Transform>,
    units: &[usize],
) -> std::result::Result<(Arc<UnitsExec>, Arc<Worker>), QueryError> {
    let failed = |reason: String| QueryError::Execution { reason };
    let job: Arc<str> = serde_json::to_string(&transform.job).map_err(|e| failed(e.to_string()))?.into();
    let mut partitions = Vec::with_capacity(units.len());
    for unit in units {
        let digest = transform.digest(*unit).as_ref().map(Digest::to_string);
        let digest = digest.ok_or_else(|| failed(format!("there is no unit {unit}")))?;
        let columns: Vec<Arc<dyn Array>> =
            vec![Arc::new(UInt64Array::from(vec![*unit as u64])), Arc::new(StringArray::from(vec![digest]))];
        partitions.push(vec![RecordBatch::try_new(units_schema(), columns).map_err(|e| failed(e.to_string()))?]);
    }
    let input = MemorySourceConfig::try_new_exec(&partitions, units_schema(), None);
    let input = input.map_err(|e| failed(e.to_string()))?;
    let open = Mutex::new(VecDeque::from([(job.clone(), transform.clone())]));
    let errors = Some(Mutex::default());
    let worker = Worker { workplace: transform.workplace.clone(), open, errors, notes: None };
    let worker = Arc::new(worker);
    Ok((Arc::new(UnitsExec::new(job, Some(worker.clone()), input)), worker))
}

/// The outcomes in a batch of an answer, by unit.
pub(crate) fn outcomes(batch: &RecordBatch) -> std::result::Result<Vec<(usize, Outcome)>, QueryError> {
    let failed = |reason: String| QueryError::Execution { reason };
    let columns = (batch.column_by_name("unit"), batch.column_by_name("outcome"));
    let (Some(units), Some(outcomes)) = columns else { return Err(failed("an answer of another form".into())) };
    let units = units.as_primitive_opt::<UInt64Type>();
    let (Some(units), Some(outcomes)) = (units, outcomes.as_string_opt::<i32>()) else {
        return Err(failed("an answer of other types".into()));
    };
    let row = |row: usize| {
        let outcome = serde_json::from_str(outcomes.value(row)).map_err(|e| failed(e.to_string()))?;
        Ok((usize::try_from(units.value(row)).unwrap_or(usize::MAX), outcome))
    };
    (0..batch.num_rows()).map(row).collect()
}

/// Runs a transformation in this process. `progress` is told of the rows that are done and of all.
///
/// # Errors
/// The first unit, in their order, that cannot be done; a store that does not take the manifest.
pub(crate) fn run(
    transform: &Arc<Transform>,
    progress: &mut dyn FnMut(u64, u64),
) -> std::result::Result<Transformed, QueryError> {
    let units: Vec<usize> = (0..transform.units()).collect();
    let total = transform.rows();
    let (plan, worker) = plan_of(transform, &units)?;
    let context = Arc::new(TaskContext::default());
    let partitions = stream::iter(units.iter().map(|partition| {
        let batches = plan.execute(*partition, context.clone());
        async move { batches?.try_collect::<Vec<RecordBatch>>().await }
    }));
    let mut partitions = partitions.buffered(transform.threads());
    let runtime = runtime()?;
    let (mut all, mut done_rows) = (Vec::with_capacity(units.len()), 0);
    while let Some(batches) = runtime.block_on(partitions.next()) {
        let batches = batches.map_err(|e| QueryError::Execution { reason: e.to_string() })?;
        for batch in &batches {
            for (unit, outcome) in outcomes(batch)? {
                match outcome {
                    Outcome::Done(done) => all.push(done),
                    Outcome::Failed { reason, is_store } => {
                        return Err(worker.error(unit).unwrap_or(QueryError::Unit { reason, is_store }));
                    }
                }
                done_rows += transform.unit_rows(unit);
                progress(done_rows, total);
            }
        }
    }
    transform.finish(all)
}

impl fmt::Debug for UnitsExec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnitsExec").field("job", &self.job).finish_non_exhaustive()
    }
}

impl DisplayAs for UnitsExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UnitsExec: units={}", self.properties.output_partitioning().partition_count())
    }
}

impl ExecutionPlan for UnitsExec {
    fn name(&self) -> &'static str {
        "UnitsExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(UnitsExec::new(self.job.clone(), self.worker.clone(), only(children)?)))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let worker = self.worker.clone();
        let worker = worker.ok_or_else(|| DataFusionError::Plan("units are done by executors".into()))?;
        let units = self.input.execute(partition, context)?;
        let job = self.job.clone();
        let outcomes = units.and_then(move |batch| done(worker.clone(), job.clone(), batch));
        Ok(Box::pin(RecordBatchStreamAdapter::new(outcomes_schema(), outcomes)))
    }
}

/// Does the units of a batch, one after the other, on a thread of its own: stores run requests on a runtime of their own
/// and wait for them, which must not be done on the engine's threads.
async fn done(worker: Arc<Worker>, job: Arc<str>, batch: RecordBatch) -> Result<RecordBatch> {
    let (sender, receiver) = oneshot::channel();
    let work = move || {
        // Nobody receives any more where the task was called off.
        let _ = sender.send(do_batch(&worker, &job, &batch));
    };
    std::thread::Builder::new().name("updraft-unit".into()).spawn(work)?;
    match receiver.await {
        Ok(done) => done,
        Err(_) => Err(DataFusionError::Execution("a thread that did a unit ended too soon".into())),
    }
}

fn do_batch(worker: &Worker, job: &Arc<str>, batch: &RecordBatch) -> Result<RecordBatch> {
    let wrong = || DataFusionError::Plan("units of another form".into());
    let units = batch.column_by_name("unit").and_then(|units| units.as_primitive_opt::<UInt64Type>());
    let digests = batch.column_by_name("digest").and_then(|digests| digests.as_string_opt::<i32>());
    let (units, digests) = (units.ok_or_else(wrong)?, digests.ok_or_else(wrong)?);
    let mut outcomes = Vec::with_capacity(batch.num_rows());
    for row in 0..batch.num_rows() {
        let outcome = worker.do_unit(job, units.value(row), digests.value(row));
        outcomes.push(serde_json::to_string(&outcome).map_err(|e| DataFusionError::External(Box::new(e)))?);
    }
    let columns: Vec<Arc<dyn Array>> = vec![Arc::new(units.clone()), Arc::new(StringArray::from(outcomes))];
    Ok(RecordBatch::try_new(outcomes_schema(), columns)?)
}
