//! Quantization: numbers as small integers with a scale.

pub mod aware;
mod bias;
mod dynamic;
mod equalize;
mod half;
mod insert;
mod kind;
mod plan;
mod prepare;
mod quantizer;
pub mod rounding;
mod table;
mod weight_only;

pub use bias::{BiasProbe, bias_probe, correct_biases};
pub use dynamic::dynamic;
pub use equalize::EQUALIZE;
pub use half::{Half, half};
pub use insert::{RoundedWeights, insert};
pub use plan::{Decision, Scheme, Unit, UnitWeights, observed, units};
pub use prepare::prepare;
pub use quantizer::{Quantizer, QuantizerError, Range, WeightScale, levels};
pub use weight_only::{WeightOnly, weight_only};
