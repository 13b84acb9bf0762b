//! The product: one file per verb, the recipe, the report.
//!
//! A verb takes its arguments and a [`Context`](context::Context) and gives an [`Answer`](context::Answer) or a
//! [`Failure`](failure::Failure). What it needs of the world (the clock, where progress goes, how many threads there
//! are) is in the context, so that a test runs a verb as `main` does. `main.rs` alone reads arguments and environment,
//! prints, and picks exit codes.

pub mod cli;
pub mod context;
pub mod failure;
pub mod progress;
pub mod recipe;
pub mod requests;
pub mod shared_cache;
pub mod verb;

mod model;
mod output;
mod report;
mod stage;
mod table;
