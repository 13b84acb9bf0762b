//! SQL over datasets, by DataFusion: what is read and written are the shards of `updraft-data`.
//!
//! # Design
//!
//! A table is a dataset ([`Shards`](updraft_data::shards::Shards)) of any format: our readers give the columns that a
//! query needs, block by block, so DataFusion's own readers of files are not built. What manifests say of shards (rows,
//! least and largest number of a column) goes to the planner, which answers `count(*)` from it, and to the scan, which
//! leaves out shards where no row can match.
//!
//! The answer is a function of the data and the query: one pipeline takes the blocks in their order, while threads read
//! and decode ahead of it. DataFusion's partitions would hand rows over in the order in which threads finish, so that
//! rows without `order by`, and the last bits of sums of floats, would differ from run to run. Functions that ask for the
//! time or for randomness are left out for the same reason. So an answer may be kept as a dataset that is named by what it
//! was made of, and made again after a crash.
//!
//! A [`Transform`] makes a dataset of another: SQL, then steps, in units of one shard each. With the feature `ballista` a
//! cluster does them.
//!
//! Without the feature `datafusion` this crate is empty.
#![cfg(feature = "datafusion")]

mod arrow;
#[cfg(feature = "ballista")]
mod cluster;
mod error;
mod in_turn;
mod query;
mod scan;
mod table;
mod transform;

#[cfg(feature = "ballista")]
pub use cluster::{ClusterAddress, ExecutorOptions, SchedulerOptions, run_executor, run_scheduler};
pub use error::QueryError;
pub use query::{Answer, Query, QueryOptions, ResultColumn};
pub use transform::{Transform, TransformRecipe, Transformed, Workplace, WriteSection};
