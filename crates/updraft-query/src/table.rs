//! A dataset as a table: its columns, and what is known of its shards before they are read.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use datafusion::arrow::array::{ArrayRef, BooleanArray, UInt64Array};
use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::pruning::PruningStatistics;
use datafusion::common::stats::Precision;
use datafusion::common::{Column, ColumnStatistics, DFSchema, Result, ScalarValue, Statistics};
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_optimizer::pruning::PruningPredicateBuilder;
use datafusion::physical_plan::ExecutionPlan;
use updraft_data::Kind;
use updraft_data::shards::Shards;
use updraft_data::statistics::ColumnStatistics as OurStatistics;

use crate::arrow::type_of;
use crate::error::{QueryError, Slot};
use crate::scan::Scan;

/// A dataset that a query reads.
pub(crate) struct Table {
    pub(crate) shards: Arc<Shards>,
    pub(crate) schema: SchemaRef,
    /// Threads that read.
    pub(crate) threads: usize,
    /// The most memory for blocks that are read ahead.
    pub(crate) memory_bytes: u64,
    /// Where errors of reading go.
    pub(crate) slot: Slot,
    /// Least and largest number of each column, for each shard.
    ranges: Vec<Vec<Option<Range>>>,
}

/// The numbers of a column lie between these.
#[derive(Clone)]
struct Range {
    min: ScalarValue,
    max: ScalarValue,
    /// Whether they are the least and the largest, to the bit.
    is_exact: bool,
}

impl Table {
    /// # Errors
    /// The column whose type a query cannot hold.
    pub(crate) fn new(
        shards: Shards,
        threads: usize,
        memory_bytes: u64,
        slot: Slot,
    ) -> std::result::Result<Table, QueryError> {
        let mut fields = Vec::with_capacity(shards.schema.columns.len());
        for column in &shards.schema.columns {
            let refused = |reason| QueryError::Column { column: column.name.clone(), reason };
            fields.push(Field::new(&column.name, type_of(&column.kind).map_err(refused)?, false));
        }
        let schema = Arc::new(Schema::new(fields));
        let range_of = |shard: usize, at: usize| {
            let column = &shards.schema.columns[at];
            let Kind::Number { shape, .. } = &column.kind else { return None };
            let known = shards.facts.get(shard)?.columns.get(&column.name)?;
            let known: OurStatistics = serde_json::from_value(known.clone()).ok()?;
            range(&known, schema.field(at).data_type()).filter(|_| shape.is_empty())
        };
        let columns = shards.schema.columns.len();
        let ranges =
            (0..shards.readers.len()).map(|shard| (0..columns).map(|at| range_of(shard, at)).collect()).collect();
        Ok(Table { shards: Arc::new(shards), schema, threads, memory_bytes, slot, ranges })
    }

    /// What is known of some columns over some blocks together.
    pub(crate) fn statistics_of(&self, blocks: &[(usize, usize)], columns: &[usize], rows_max: usize) -> Statistics {
        let mut shards: Vec<usize> = blocks.iter().map(|(shard, _)| *shard).collect();
        shards.dedup();
        let readers = &self.shards.readers;
        let rows: u64 = blocks.iter().map(|(shard, block)| readers[*shard].blocks()[*block]).sum();
        let rows = usize::try_from(rows).unwrap_or(usize::MAX);
        // The ranges are those of whole shards.
        let whole_shards = shards.iter().map(|shard| readers[*shard].blocks().len()).sum::<usize>() == blocks.len();
        let is_whole = rows <= rows_max && whole_shards;
        let column = |at: &usize| {
            let mut known = ColumnStatistics::new_unknown();
            known.null_count = Precision::Exact(0);
            let ranges: Option<Vec<&Range>> = shards.iter().map(|shard| self.ranges[*shard][*at].as_ref()).collect();
            let Some(ranges) = ranges.filter(|ranges| !ranges.is_empty()) else { return known };
            let is_exact = is_whole && ranges.iter().all(|range| range.is_exact);
            let precise =
                |value: ScalarValue| if is_exact { Precision::Exact(value) } else { Precision::Inexact(value) };
            let by = |a: &&ScalarValue, b: &&ScalarValue| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal);
            known.min_value = ranges.iter().map(|r| &r.min).min_by(by).cloned().map_or(Precision::Absent, precise);
            known.max_value = ranges.iter().map(|r| &r.max).max_by(by).cloned().map_or(Precision::Absent, precise);
            known
        };
        Statistics {
            num_rows: Precision::Exact(rows.min(rows_max)),
            total_byte_size: Precision::Absent,
            column_statistics: columns.iter().map(column).collect(),
        }
    }

    /// The blocks, by shard and place in it, that may hold rows for which all filters are true.
    fn matching(&self, state: &dyn Session, filters: &[Expr]) -> Result<Vec<(usize, usize)>> {
        let readers = &self.shards.readers;
        let blocks_of = |shard: usize| (0..readers[shard].blocks().len()).map(move |block| (shard, block));
        let all: Vec<usize> = (0..readers.len()).collect();
        let Some(filter) = conjunction(filters.iter().cloned()) else {
            return Ok(all.into_iter().flat_map(blocks_of).collect());
        };
        let schema = DFSchema::try_from(self.schema.clone())?;
        let filter = state.create_physical_expr(filter, &schema)?;
        // What ranges say nothing about (calls of functions on text, say) leaves all shards in.
        let Ok(predicate) = PruningPredicateBuilder::new().with_file_schema(self.schema.clone()).try_build(filter)
        else {
            return Ok(all.into_iter().flat_map(blocks_of).collect());
        };
        let keep = predicate.prune(self)?;
        let shards = all.into_iter().zip(keep).filter(|(_, keep)| *keep).map(|(shard, _)| shard);
        let blocks = Blocks { table: self, places: shards.flat_map(blocks_of).collect() };
        let keep = predicate.prune(&blocks)?;
        Ok(blocks.places.into_iter().zip(keep).filter(|(_, keep)| *keep).map(|(place, _)| place).collect())
    }

    fn bounds(&self, column: &Column, of: impl Fn(&Range) -> ScalarValue) -> Option<ArrayRef> {
        let (at, field) = self.schema.column_with_name(&column.name)?;
        let null = ScalarValue::try_new_null(field.data_type()).ok()?;
        let values = self.ranges.iter().map(|shard| shard[at].as_ref().map_or_else(|| null.clone(), &of));
        ScalarValue::iter_to_array(values).ok()
    }
}

/// Integers up to here are numbers of `f64`.
const EXACT_INTEGERS: f64 = (1u64 << 53) as f64;

/// Statistics are kept as `f64`. `None` where that does not hold the numbers, and where there are numbers that comparisons
/// of SQL put outside of them: NaN is larger than all.
fn range(known: &OurStatistics, data_type: &DataType) -> Option<Range> {
    let numbers = known.numbers.as_ref().filter(|numbers| numbers.count > 0 && numbers.nan == 0)?;
    let is_integer = data_type.is_integer();
    let limit = if is_integer { EXACT_INTEGERS } else { f64::MAX };
    if numbers.min <= -limit || numbers.max >= limit || *data_type == DataType::Boolean {
        return None;
    }
    // Where zeros are ordered the negative one comes first, and the statistics do not tell them apart.
    let (min, max) = match is_integer {
        true => (numbers.min, numbers.max),
        false => (if numbers.min == 0.0 { -0.0 } else { numbers.min }, numbers.max + 0.0),
    };
    Some(Range { min: scalar(min, data_type)?, max: scalar(max, data_type)?, is_exact: is_integer })
}

fn scalar(value: f64, data_type: &DataType) -> Option<ScalarValue> {
    ScalarValue::Float64(Some(value)).cast_to(data_type).ok()
}

/// Blocks of a table, with what their files say of them. Of floats that is nothing: there may be NaN, which SQL puts above
/// all.
struct Blocks<'a> {
    table: &'a Table,
    places: Vec<(usize, usize)>,
}

impl Blocks<'_> {
    fn bounds(&self, column: &Column, of: impl Fn((f64, f64)) -> f64) -> Option<ArrayRef> {
        let (at, field) = self.table.schema.column_with_name(&column.name)?;
        let data_type = field.data_type();
        let null = ScalarValue::try_new_null(data_type).ok()?;
        let value = |&(shard, block): &(usize, usize)| {
            let bounds = self.table.shards.readers[shard].bounds(at, block);
            let bounds = bounds.filter(|(min, max)| *min > -EXACT_INTEGERS && *max < EXACT_INTEGERS)?;
            scalar(of(bounds), data_type)
        };
        let values = self.places.iter().map(|place| value(place).unwrap_or_else(|| null.clone()));
        if data_type.is_integer() { ScalarValue::iter_to_array(values).ok() } else { None }
    }
}

impl PruningStatistics for Blocks<'_> {
    fn min_values(&self, column: &Column) -> Option<ArrayRef> {
        self.bounds(column, |(min, _)| min)
    }

    fn max_values(&self, column: &Column) -> Option<ArrayRef> {
        self.bounds(column, |(_, max)| max)
    }

    fn num_containers(&self) -> usize {
        self.places.len()
    }

    fn null_counts(&self, _: &Column) -> Option<ArrayRef> {
        Some(Arc::new(UInt64Array::from(vec![0; self.places.len()])))
    }

    fn row_counts(&self) -> Option<ArrayRef> {
        let rows = |&(shard, block): &(usize, usize)| self.table.shards.readers[shard].blocks()[block];
        Some(Arc::new(UInt64Array::from_iter_values(self.places.iter().map(rows))))
    }

    fn contained(&self, _: &Column, _: &HashSet<ScalarValue>) -> Option<BooleanArray> {
        None
    }
}

impl PruningStatistics for Table {
    fn min_values(&self, column: &Column) -> Option<ArrayRef> {
        self.bounds(column, |range| range.min.clone())
    }

    fn max_values(&self, column: &Column) -> Option<ArrayRef> {
        self.bounds(column, |range| range.max.clone())
    }

    fn num_containers(&self) -> usize {
        self.ranges.len()
    }

    fn null_counts(&self, _: &Column) -> Option<ArrayRef> {
        Some(Arc::new(UInt64Array::from(vec![0; self.ranges.len()])))
    }

    fn row_counts(&self) -> Option<ArrayRef> {
        Some(Arc::new(UInt64Array::from_iter_values(self.shards.readers.iter().map(|reader| reader.rows()))))
    }

    fn contained(&self, _: &Column, _: &HashSet<ScalarValue>) -> Option<BooleanArray> {
        None
    }
}

/// A table that plans can share.
#[derive(Debug, Clone)]
pub(crate) struct Provider(pub(crate) Arc<Table>);

#[async_trait]
impl TableProvider for Provider {
    fn schema(&self) -> SchemaRef {
        self.0.schema.clone()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        Ok(vec![TableProviderFilterPushDown::Inexact; filters.len()])
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let blocks = self.0.matching(state, filters)?;
        let columns = projection.cloned().unwrap_or_else(|| (0..self.0.schema.fields().len()).collect());
        Ok(Arc::new(Scan::new(self.0.clone(), blocks, columns, limit)?))
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("schema", &self.schema).finish_non_exhaustive()
    }
}
