//! What must be run to shrink a network: calibrating, measuring, fine-tuning, searching.
//!
//! The rewrites themselves (quantizers, pruned channels, a teacher joined to a student) are passes, and pure. Here they
//! get their facts from data, and their results are judged by measured accuracy and measured latency.

pub mod arithmetic;
pub mod bench;
pub mod calibrate;
pub mod candidate;
pub mod distill;
pub mod histogram;
pub mod interval;
pub mod latency;
pub mod layers;
pub mod measure;
pub mod prune;
pub mod quantize;
pub mod rounding;
pub mod search;
pub mod sensitivity;
pub mod smoothing;
pub mod splits;

mod error;
mod forms;

pub use error::CompressError;
