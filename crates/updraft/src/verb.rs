//! One file for each verb.

pub mod bench;
pub mod data;
pub mod distill;
pub mod eval;
pub mod generate;
pub mod infer;
pub mod inspect;
pub mod lineage;
pub mod new;
pub mod optimize;
pub mod prune;
pub mod quantize;
pub mod run;
pub mod train;
