//! Quantization: numbers as small integers with a scale.

mod insert;
mod kind;
mod plan;
mod prepare;
mod quantizer;
pub mod rounding;

pub use insert::{RoundedWeights, insert};
pub use plan::{Decision, Scheme, Unit, UnitWeights, observed, units};
pub use prepare::prepare;
pub use quantizer::{Quantizer, QuantizerError, Range, WeightScale, levels};
