//! Convolutions and matrix products of bytes, with sums in `i32`.
//!
//! A quantized activation is a byte `q` that stands for `scale * (q - zero_point)`; a weight likewise, with a scale for
//! each output channel. The sum of products of such numbers is `scale * scale` times a sum of integers, so everything
//! between input and output is exact, and one multiplication by a ratio of scales brings it to the scale of the output
//! (Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).
//! Integers make results equal to the last bit for every instruction set and number of threads.
//!
//! `recognize` finds what becomes a step in integers, after `moves` has let operators that only move elements work on
//! codes; `lower` puts the steps into the plan.
//!
//! [`QuantizedConv`] and [`QuantizedProduct`] are plans for one shape with constant weights, [`ActivationProduct`] for two
//! activations; [`Finish`] says what becomes of the sums.

use updraft_graph::OpError;

mod activation_product;
mod affine;
mod bytes;
mod constant;
mod conv;
mod dense;
mod depthwise;
mod dot;
mod dynamic;
mod finish;
mod lanes;
mod linear;
pub(super) mod lower;
mod moves;
mod panel;
mod product;
pub(super) mod recognize;
mod transpose;
mod unary;

pub(crate) use self::activation_product::{ActivationMatrix, ActivationProduct};
pub(super) use self::constant::dequantized;
pub(crate) use self::conv::QuantizedConv;
pub(super) use self::dynamic::dynamic_quantize;
pub(super) use self::moves::rewrite;
pub(crate) use self::product::{QuantizedProduct, WeightOrder};

/// In which order the axes of an activation lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ActivationLayout {
    /// `[batch, channels, spatial...]`, as ONNX has it.
    ChannelsFirst,
    /// `[batch, spatial..., channels]`, which the kernels read without moving bytes.
    ChannelsLast,
}

/// Whether a byte is an `i8` or a `u8`, and which byte stands for zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes {
    pub(crate) signed: bool,
    /// In the range of the type.
    pub(crate) zero_point: i32,
}

/// Weights in ONNX's order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) values: &'a [u8],
    pub(crate) signed: bool,
    /// One for all output channels, or one for each.
    pub(crate) zero_points: &'a [i32],
}

/// What becomes of the sums `Σ (x - zero point) * (w - zero point) + bias`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Finish {
    /// They are written: `i32`.
    Sums,
    /// `multiplier * sum + bias`, `f32`.
    Dequantize {
        /// Scale of the input times scale of the weights: one for all output channels, or one for each.
        multipliers: Vec<f32>,
        /// One for each output channel, or empty.
        bias: Vec<f32>,
    },
    /// A byte again.
    Requantize(Requantize),
}

/// `clamp(round(multiplier * sum + residual) + zero point)`, a tie rounded to the even integer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Requantize {
    /// Scale of the input times scale of the weights by scale of the output: one for all output channels, or one for each.
    pub(crate) multipliers: Vec<f32>,
    pub(crate) output: Bytes,
    /// The least byte of the output, of the type's range or of an activation function's.
    pub(crate) min: i32,
    /// The greatest one.
    pub(crate) max: i32,
    pub(crate) residual: Option<Residual>,
}

/// Bytes of the output's shape and layout that are added before rounding: `multiplier * (q - zero point)`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Residual {
    pub(crate) bytes: Bytes,
    /// Scale of the residual by scale of the output.
    pub(crate) multiplier: f32,
    /// Where the sum had been rounded to bytes of its own before the addition.
    pub(crate) rounded: Option<Rounded>,
}

/// Rounding of the sum before a residual is added: the sum becomes
/// `multiplier * clamp(round(Requantize::multipliers * sum), min, max)`, where `Requantize::multipliers` then lead to
/// the scale of that intermediate value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rounded {
    /// The least intermediate byte less its zero point.
    pub(crate) min: i32,
    /// The greatest intermediate byte less its zero point.
    pub(crate) max: i32,
    /// Scale of the intermediate value by scale of the output.
    pub(crate) multiplier: f32,
}

/// Operands of one run.
pub(crate) struct Run<'a> {
    pub(crate) input: &'a [u8],
    /// Facts about the input that are known only now, if so.
    pub(crate) dynamic: Option<Dynamic>,
    /// Empty if the plan adds none.
    pub(crate) residual: &'a [u8],
    /// As many bytes for each worker as the plan asks for, aligned to 64 bytes.
    pub(crate) scratch: &'a mut [u8],
    /// Bytes, or `i32` or `f32` as bytes, aligned to 4 bytes.
    pub(crate) output: &'a mut [u8],
}

/// What replaces the planned facts about an input whose range is measured at run time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Dynamic {
    pub(crate) zero_point: i32,
    /// A factor of all multipliers.
    pub(crate) scale: f32,
}

/// An error unless there are multipliers (and biases) for so many output channels.
fn expect_multipliers(finish: &Finish, channels: usize) -> Result<(), OpError> {
    match finish {
        Finish::Sums => Ok(()),
        Finish::Dequantize { multipliers, bias } => {
            expect("multipliers", multipliers.len(), &[1, channels])?;
            expect("biases", bias.len(), &[0, channels])
        }
        Finish::Requantize(Requantize { multipliers, .. }) => expect("multipliers", multipliers.len(), &[1, channels]),
    }
}

fn expect(what: &str, actual: usize, expected: &[usize]) -> Result<(), OpError> {
    if expected.contains(&actual) {
        return Ok(());
    }
    Err(OpError::shape(format!("{actual} {what}, expected one of {expected:?}")))
}

#[cfg(test)]
mod tests;
