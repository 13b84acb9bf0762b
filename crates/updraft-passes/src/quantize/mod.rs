//! Quantization: numbers as small integers with a scale.

pub mod rounding;
