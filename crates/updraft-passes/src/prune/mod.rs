//! Pruning: fewer channels, or fewer weights.
//!
//! [`groups`] finds which indices of which axes stand and fall together, [`importance`] tells what each is worth,
//! [`structured`] removes the least, so that the graph really gets smaller. [`sparse`] sets single weights to zero,
//! which makes nothing faster on dense runtimes.

pub mod groups;
pub mod importance;
mod operands;
pub mod sparse;
pub mod structured;
