//! Reading a table: blocks in their order, decoded by threads that run ahead.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use datafusion::arrow::array::{RecordBatch, RecordBatchOptions};
use datafusion::arrow::datatypes::SchemaRef;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{DataFusionError, Result, Statistics};
use datafusion::execution::TaskContext;
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::statistics::StatisticsArgs;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PlanProperties, SendableRecordBatchStream,
};
use futures_util::stream;
use tokio::sync::mpsc;
use updraft_data::{Cells, DataError};

use crate::arrow::array_of;
use crate::table::Table;

/// Rows of a batch, at most: DataFusion's own measure.
const BATCH_ROWS: usize = 8192;

/// Bytes of a batch after which the next begins: Arrow counts those of a column in 31 bits.
const BATCH_BYTES: u64 = 64 << 20;

/// Blocks that a thread may be ahead of whoever takes them, so that it goes on while another's long block is waited for.
const AHEAD: usize = 1;

/// Some columns of some blocks.
#[derive(Debug)]
pub(crate) struct Scan {
    table: Arc<Table>,
    /// By shard and place in it.
    blocks: Vec<(usize, usize)>,
    columns: Vec<usize>,
    limit: Option<usize>,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
}

/// Rows of a shard that lie in one block.
#[derive(Debug, Clone, Copy)]
struct Piece {
    shard: usize,
    first: u64,
    rows: u64,
    bytes: u64,
}

impl Scan {
    pub(crate) fn new(
        table: Arc<Table>,
        blocks: Vec<(usize, usize)>,
        columns: Vec<usize>,
        limit: Option<usize>,
    ) -> Result<Scan> {
        let schema = Arc::new(table.schema.project(&columns)?);
        let properties = Arc::new(PlanProperties::new(
            EquivalenceProperties::new(schema.clone()),
            Partitioning::UnknownPartitioning(1),
            EmissionType::Incremental,
            Boundedness::Bounded,
        ));
        Ok(Scan { table, blocks, columns, limit, schema, properties })
    }

    /// What is to be read, in order, no further than the limit.
    fn pieces(&self) -> Vec<Piece> {
        let mut left = self.limit.map_or(u64::MAX, |limit| limit as u64);
        let mut pieces = Vec::new();
        // The shard that is walked through, and its first row of the block that comes next.
        let (mut walked, mut next, mut first) = (usize::MAX, 0, 0);
        for &(shard, block) in &self.blocks {
            let reader = &self.table.shards.readers[shard];
            if walked != shard {
                (walked, next, first) = (shard, 0, 0);
            }
            first += reader.blocks()[next..block].iter().sum::<u64>();
            let rows = reader.blocks()[block];
            if left == 0 {
                break;
            }
            let taken = left.min(rows);
            let bytes = reader.block_bytes(block, &self.columns);
            if taken > 0 {
                pieces.push(Piece { shard, first, rows: taken, bytes });
            }
            (next, first, left) = (block + 1, first + rows, left - taken);
        }
        pieces
    }

    /// Threads for which memory has room: each has a block being read, one waiting, and a copy of one.
    fn threads(&self, pieces: &[Piece]) -> usize {
        let largest = pieces.iter().map(|piece| piece.bytes).max().unwrap_or(0).max(1);
        let fits = usize::try_from(self.table.memory_bytes / (3 * largest)).unwrap_or(usize::MAX);
        fits.min(self.table.threads).clamp(1, pieces.len().max(1))
    }
}

impl DisplayAs for Scan {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.schema.fields().iter().map(|field| field.name().as_str()).collect();
        write!(f, "ShardScan: columns=[{}], ", names.join(", "))?;
        let all: usize = self.table.shards.readers.iter().map(|reader| reader.blocks().len()).sum();
        write!(f, "blocks={} of {all}", self.blocks.len())?;
        self.limit.map_or(Ok(()), |limit| write!(f, ", limit={limit}"))
    }
}

impl ExecutionPlan for Scan {
    fn name(&self) -> &'static str {
        "ShardScan"
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

    fn execute(&self, _: usize, _: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let pieces = self.pieces();
        let threads = self.threads(&pieces);
        let pieces: Arc<[Piece]> = pieces.into();
        let mut queues = Vec::with_capacity(threads);
        for thread in 0..threads {
            let (sender, receiver) = mpsc::channel(AHEAD);
            let (table, columns, schema, pieces) =
                (self.table.clone(), self.columns.clone(), self.schema.clone(), pieces.clone());
            // Not the runtime's threads: stores run requests on a runtime of their own and wait for them.
            let work = move || {
                for piece in pieces.iter().skip(thread).step_by(threads) {
                    let done = read(&table, *piece, &columns, &schema);
                    let is_last = done.is_err();
                    // Nobody receives any more when the query has its answer.
                    if sender.blocking_send(done).is_err() || is_last {
                        break;
                    }
                }
            };
            std::thread::Builder::new().name("updraft-scan".into()).spawn(work)?;
            queues.push(receiver);
        }
        let state = Reading { queues, count: pieces.len(), next: 0, ready: VecDeque::new(), table: self.table.clone() };
        let batches = stream::try_unfold(state, |mut state| async move {
            let batch = state.batch().await?;
            Ok(batch.map(|batch| (batch, state)))
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), batches)))
    }

    fn statistics_from_inputs(&self, _: &[Arc<Statistics>], _: &StatisticsArgs) -> Result<Arc<Statistics>> {
        Ok(Arc::new(self.table.statistics_of(&self.blocks, &self.columns, self.limit.unwrap_or(usize::MAX))))
    }
}

/// Queues of threads, taken from in turn: piece `i` is read by thread `i mod threads`.
struct Reading {
    queues: Vec<mpsc::Receiver<std::result::Result<Vec<RecordBatch>, DataError>>>,
    count: usize,
    next: usize,
    ready: VecDeque<RecordBatch>,
    table: Arc<Table>,
}

impl Reading {
    async fn batch(&mut self) -> Result<Option<RecordBatch>> {
        while self.ready.is_empty() && self.next < self.count {
            let queue = self.next % self.queues.len();
            let Some(done) = self.queues[queue].recv().await else {
                return Err(DataFusionError::Execution("a thread that read a dataset ended too soon".into()));
            };
            self.ready = done.map_err(|error| self.table.slot.put(error))?.into();
            self.next += 1;
        }
        Ok(self.ready.pop_front())
    }
}

/// The rows of a piece. Where a batch ends depends on the rows alone.
fn read(
    table: &Table,
    piece: Piece,
    columns: &[usize],
    schema: &SchemaRef,
) -> std::result::Result<Vec<RecordBatch>, DataError> {
    let reader = &table.shards.readers[piece.shard];
    let numbers: Vec<u64> = (piece.first..piece.first + piece.rows).collect();
    let cells = if columns.is_empty() { Vec::new() } else { reader.read(columns, &numbers)? };
    let row_bytes = cells.iter().map(Cells::memory_bytes).sum::<u64>() / piece.rows.max(1);
    let mut rows = (BATCH_BYTES / row_bytes.max(1)).clamp(1, BATCH_ROWS as u64) as usize;
    if columns.is_empty() {
        rows = numbers.len();
    }
    let mut batches = Vec::with_capacity(numbers.len().div_ceil(rows.max(1)));
    for first in (0..numbers.len()).step_by(rows.max(1)) {
        let end = numbers.len().min(first + rows);
        let mut arrays = Vec::with_capacity(columns.len());
        for (at, cells) in columns.iter().zip(&cells) {
            let column = &table.shards.schema.columns[*at];
            let array = array_of(&column.kind, &cells.gather(first..end));
            arrays.push(array.map_err(|reason| DataError::Sample {
                sample: reader.place(piece.first + first as u64),
                column: column.name.clone(),
                reason,
            })?);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(end - first));
        let batch = RecordBatch::try_new_with_options(schema.clone(), arrays, &options);
        batches.push(batch.map_err(|e| DataError::Loader(format!("{}: {e}", reader.place(piece.first))))?);
    }
    Ok(batches)
}
