//! Quantization: numbers as small integers with a scale.

mod quantizer;
pub mod rounding;

pub use quantizer::{Quantizer, QuantizerError, Range, WeightScale, levels};
