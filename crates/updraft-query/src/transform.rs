//! A recipe run on a dataset: SQL, then steps on what it selects, then shards.
//!
//! # Design
//!
//! Where the SQL looks at one row at a time, or there is none, the rows of the source are cut into units as ingestion cuts
//! them ([`Ingestion`]), each of which becomes one shard, or none where no row of it is left. Where the SQL needs all rows
//! there is one unit, and its answer is cut into shards. Either way the keys of shards hold the digest of all that
//! determines their bytes, shards are put where none is, and a record is put after them. So a unit may be done by anyone,
//! twice, or at the same time, and what is left to do is what has no record.
//!
//! Units are the partitions of one plan of DataFusion ([`UnitsExec`](plan::UnitsExec)), which gives a row for each: what
//! came of it. In process, the plan is run by threads. On a Ballista cluster it is sent to the scheduler as it is, and the
//! executors open the job from its text. No data goes through the engine, only what was done.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use datafusion::logical_expr::LogicalPlan;
use serde::{Deserialize, Serialize};
use updraft_base::Digest;
use updraft_data::ingest::{Change, IngestOptions, Ingested, Ingestion, Steps, UnitDone, commit};
use updraft_data::shards::Shards;
use updraft_data::write::{WriteOptions, writer};
use updraft_data::{Access, DataError};
use updraft_store::Objects;

use crate::error::QueryError;
use crate::query::{Query, QueryOptions};

pub(crate) mod plan;
mod recipe;
mod rows_sql;

pub use recipe::{TransformRecipe, WriteSection};
use rows_sql::{RowsSql, needs_all_rows};

/// The name that the source has in SQL.
const TABLE: &str = "data";

/// All that a process needs to know to do any unit of a transformation, besides its own way to the stores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Job {
    pub(crate) recipe: TransformRecipe,
    /// The version of the source, where it has a manifest.
    pub(crate) version: Option<Digest>,
    /// The most memory of a process.
    pub(crate) memory_bytes: u64,
}

/// What a process brings along: its way to the stores, and its threads.
#[derive(Clone)]
pub struct Workplace {
    /// The way to the stores.
    pub access: Access,
    /// Units that are done at the same time, at most.
    pub threads: usize,
}

/// A recipe whose source is open.
pub struct Transform {
    pub(crate) job: Job,
    pub(crate) workplace: Workplace,
    target: Objects,
    options: IngestOptions,
    work: Work,
    /// Why the query needs all rows.
    whole_because: Option<String>,
    gate: Gate,
}

/// How the rows are cut.
enum Work {
    Units(Box<Ingestion>),
    /// One unit of all rows.
    Whole(Box<Whole>),
}

struct Whole {
    query: Query,
    steps: Steps,
    identity: Digest,
}

/// What came of a transformation.
#[derive(Debug, Clone, PartialEq)]
pub struct Transformed {
    /// The shards, as they are committed.
    pub ingested: Ingested,
    /// The version of the target.
    pub version: Digest,
    /// The parts that the work was cut into.
    pub units: u64,
    /// Those of which no row was left.
    pub empty_units: u64,
    /// Why all rows were one unit, where they were because of the SQL.
    pub whole_because: Option<String>,
}

/// What came of one unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) units: Vec<UnitDone>,
}

impl Transform {
    /// Opens the source and plans the work; nothing is written.
    ///
    /// # Errors
    /// A source that cannot be read, SQL that cannot be planned or reads other tables, steps that do not fit the columns.
    pub fn open(recipe: TransformRecipe, memory_bytes: u64, workplace: Workplace) -> Result<Transform, QueryError> {
        Transform::open_job(Job { recipe, version: None, memory_bytes }, workplace)
    }

    pub(crate) fn open_job(mut job: Job, workplace: Workplace) -> Result<Transform, QueryError> {
        let Job { recipe, version, memory_bytes } = &job;
        let access = Access { version: *version, ..workplace.access.clone() };
        let open = || Shards::open(&recipe.source, None, memory_bytes / 2, &access);
        let target = Objects::open(&recipe.target, &access.settings, &access.options).map_err(DataError::from)?;
        let write = &recipe.write;
        let mut options = IngestOptions {
            format: write.format,
            write: WriteOptions { shard_bytes: write.shard_bytes, compress: write.compress, ..WriteOptions::default() },
            shard_rows: write.shard_rows,
            columns: Vec::new(),
            shuffle: None,
            resize: Default::default(),
            threads: workplace.threads,
            memory_bytes: *memory_bytes,
            first_unit: 0,
        };
        let steps = |schema| Steps::open(&recipe.steps, schema, std::path::Path::new(""));
        let mut whole_because = None;
        let (work, version) = match &recipe.sql {
            None => {
                let shards = open()?;
                let steps = steps(&shards.schema)?;
                let units = Ingestion::new(&shards.inputs()?, &options, Arc::new(steps))?;
                (Work::Units(Box::new(units)), shards.version)
            }
            Some(sql) => {
                let query = planned(sql, &job, workplace.threads, open)?;
                let table = query.tables.first().ok_or_else(|| QueryError::Sql {
                    reason: format!("a transformation selects from the table `{TABLE}`, which is its source"),
                })?;
                let (table, version) = (table.clone(), table.shards.version);
                let steps = steps(&query.schema()?)?;
                whole_because = needs_all_rows(&query.plan);
                if whole_because.is_some() {
                    let identity = query.identity(&steps.identity())?;
                    (Work::Whole(Box::new(Whole { query, steps, identity })), version)
                } else {
                    let sql = RowsSql::new(&query, &table.schema, steps)?;
                    options.columns = sql.reads().to_vec();
                    let units = Ingestion::new(&table.shards.inputs()?, &options, Arc::new(sql))?;
                    (Work::Units(Box::new(units)), version)
                }
            }
        };
        // What the format cannot hold is said before anything is made.
        let schema = match &work {
            Work::Units(units) => units.schema(),
            Work::Whole(whole) => whole.steps.schema(),
        };
        writer(options.format, schema.clone(), &options.write)?;
        job.version = version;
        let gate = Gate::new(match &work {
            Work::Units(units) => units.threads()?,
            Work::Whole(_) => 1,
        });
        Ok(Transform { job, workplace, target, options, work, whole_because, gate })
    }

    /// The number of units.
    pub fn units(&self) -> usize {
        match &self.work {
            Work::Units(units) => units.units(),
            Work::Whole(_) => 1,
        }
    }

    /// The rows of the source.
    pub fn rows(&self) -> u64 {
        (0..self.units()).map(|unit| self.unit_rows(unit)).sum()
    }

    /// Units that are done at the same time.
    pub(crate) fn threads(&self) -> usize {
        self.gate.places
    }

    /// The rows of a unit, for progress; 0 where nobody knows.
    pub(crate) fn unit_rows(&self, unit: usize) -> u64 {
        match &self.work {
            Work::Units(units) => units.unit_rows(unit),
            Work::Whole(whole) => {
                whole.query.tables.iter().flat_map(|table| &table.shards.readers).map(|reader| reader.rows()).sum()
            }
        }
    }

    /// What stands for all that determines what a unit writes.
    pub(crate) fn digest(&self, unit: usize) -> Option<Digest> {
        match &self.work {
            Work::Units(units) => units.digest(unit).copied(),
            Work::Whole(whole) => (unit == 0).then_some(whole.identity),
        }
    }

    /// Runs it in this process. `progress` is told of the rows that are done and of all.
    ///
    /// # Errors
    /// The first unit, in their order, that cannot be done; a store that does not answer.
    pub fn run(self: &Arc<Transform>, mut progress: impl FnMut(u64, u64)) -> Result<Transformed, QueryError> {
        plan::run(self, &mut progress)
    }

    /// Those of some units that are done, by what their records say.
    #[cfg(feature = "ballista")]
    pub(crate) fn found_all(&self, units: &[usize]) -> Result<Vec<(usize, Done)>, QueryError> {
        match &self.work {
            Work::Units(ingestion) => {
                let found = ingestion.found_all(units, &self.target)?;
                Ok(found.into_iter().map(|(unit, done)| (unit, Done { units: vec![done] })).collect())
            }
            Work::Whole(whole) => {
                let schema = whole.steps.schema();
                let found = updraft_data::ingest::found_rows(schema, &whole.identity, &self.target, &self.options)?;
                Ok(found.map(|found| (0, Done::of_rows(found))).into_iter().collect())
            }
        }
    }

    /// Finds a unit done, or does it; waits where as many are being done as memory has room for.
    pub(crate) fn do_unit(&self, unit: usize) -> Result<Done, QueryError> {
        let _place = self.gate.enter();
        match &self.work {
            Work::Units(units) => Ok(Done { units: vec![units.do_unit(unit, &self.target)?] }),
            Work::Whole(whole) => {
                let Whole { query, steps, identity } = &**whole;
                query.write_changed(steps, identity, &self.target, &self.options).map(Done::of_rows)
            }
        }
    }

    /// Makes what came of all units, in their order, a version of the target.
    pub(crate) fn finish(&self, done: Vec<Done>) -> Result<Transformed, QueryError> {
        let units = done.into_iter().flat_map(|done| done.units).collect::<Vec<_>>();
        let empty_units = units.iter().filter(|unit| unit.shard.is_none()).count() as u64;
        let ingested = match &self.work {
            Work::Units(ingestion) => ingestion.ingested(units)?,
            Work::Whole(whole) => {
                let shards: Vec<_> = units.iter().filter_map(|unit| unit.shard.clone()).collect();
                let (rows, made) = (
                    shards.iter().map(|shard| shard.samples).sum(),
                    units.iter().filter(|unit| unit.is_made).count() as u64,
                );
                Ingested { schema: (**whole.steps.schema()).clone(), shards, rows, made, inputs: Default::default() }
            }
        };
        let version = commit(&ingested, &self.options, &self.target)?;
        let (units, whole_because) = (self.units() as u64, self.whole_because.clone());
        Ok(Transformed { ingested, version, units, empty_units, whole_because })
    }
}

impl Done {
    /// The shards of an answer that was written as a whole: the first ones are those that were made last.
    fn of_rows(ingested: Ingested) -> Done {
        let made = usize::try_from(ingested.made).unwrap_or(usize::MAX);
        let found = ingested.shards.len().saturating_sub(made);
        let unit = |(at, shard)| UnitDone { shard: Some(shard), is_made: at >= found };
        Done { units: ingested.shards.into_iter().enumerate().map(unit).collect() }
    }
}

/// The query over the source.
fn planned(
    sql: &str,
    job: &Job,
    threads: usize,
    mut open: impl FnMut() -> Result<Shards, DataError>,
) -> Result<Query, QueryError> {
    let options = QueryOptions { threads, memory_bytes: job.memory_bytes };
    let mut other = None;
    let planned = Query::plan(sql, &[TABLE.to_owned()], &options, |name| match name {
        TABLE => open(),
        name => {
            other = Some(name.to_owned());
            Err(DataError::Loader(String::new()))
        }
    });
    if let Some(other) = other {
        let reason = format!("no table `{other}`: a transformation reads one, `{TABLE}`, which is its source");
        return Err(QueryError::Sql { reason });
    }
    // A source that is not there is no mistake in the SQL.
    let query = planned.map_err(|error| match error {
        QueryError::UnknownTable { source: Some(error), .. } => QueryError::Data(*error),
        error => error,
    })?;
    if matches!(query.plan, LogicalPlan::Explain(_) | LogicalPlan::Analyze(_)) {
        return Err(QueryError::Sql { reason: "what is explained has no rows to keep".to_owned() });
    }
    Ok(query)
}

/// Lets in as many threads at a time as there are places.
struct Gate {
    places: usize,
    taken: Mutex<usize>,
    left: Condvar,
}

struct Place<'a>(&'a Gate);

impl Gate {
    fn new(places: usize) -> Gate {
        Gate { places, taken: Mutex::new(0), left: Condvar::new() }
    }

    fn enter(&self) -> Place<'_> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |taken: &mut usize| *taken >= self.places;
        let mut taken = self.left.wait_while(taken, is_full).unwrap_or_else(PoisonError::into_inner);
        *taken += 1;
        Place(self)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.left.notify_one();
    }
}
