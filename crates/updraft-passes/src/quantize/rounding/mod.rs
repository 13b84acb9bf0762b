//! Roundings of weights that look at what the layer computes, not at each weight alone.
//!
//! A layer multiplies rows of inputs `x` with a matrix `W` of shape `[out, in]`. Rounded to `Ŵ = W + D`, its output moves
//! by `D x`, whose mean square is `tr(D H Dᵀ)` with `H` the mean of `x xᵀ` over the data. So [`Moments`] of the inputs are
//! all that the methods here need of data, rows of weights do not mix, and each method is a pure function of a matrix, a
//! [`Quantizer`] that says which codes there are, and moments.

use updraft_graph::{Tensor, TensorError};

use crate::quantize::{Quantizer, QuantizerError, RoundedWeights};

mod adaround;
mod clip;
mod gptq;
mod layer;
mod matrix;
mod moments;
pub mod smooth;

pub use adaround::{AdaRoundOptions, adaround};
pub use clip::clip_ranges;
pub use gptq::{GptqOptions, gptq};
pub use layer::{Layer, Samples, layers};
pub use moments::{Moments, NotFinite};

/// Why weights cannot be rounded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RoundingError {
    /// The weights are not a matrix of `f32`, or the moments are of other inputs.
    #[error("weights of shape {found:?}, expected [out, {}]", expected.map_or("in".to_owned(), |n| n.to_string()))]
    Shape {
        /// Their shape.
        found: Vec<usize>,
        /// Inputs that the moments are of.
        expected: Option<usize>,
    },
    /// The mean of products of inputs stays indefinite however it is damped.
    #[error("the second moments of the inputs have no inverse")]
    Hessian,
    /// The quantizer does not fit the weights.
    #[error(transparent)]
    Quantizer(#[from] QuantizerError),
    /// The elements are of another type than expected.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// Each weight at the code next to it.
pub fn nearest(weights: &Tensor, quantizer: &Quantizer) -> Result<RoundedWeights, RoundingError> {
    Ok(RoundedWeights { quantizer: quantizer.clone(), codes: quantizer.quantize(weights)? })
}

/// Codes that are within the levels of the quantizer.
fn rounded(quantizer: &Quantizer, shape: &[usize], codes: &[i32]) -> Result<RoundedWeights, RoundingError> {
    Ok(RoundedWeights { quantizer: quantizer.clone(), codes: Tensor::new(shape, codes)?.cast(quantizer.dtype)? })
}

/// The mean square by which the output of a layer moves when its `weights [out, in]` become others, summed over outputs.
pub fn output_error(weights: &Tensor, rounded: &Tensor, moments: &Moments) -> Result<f64, RoundingError> {
    let (_, columns, before) = matrix_of(weights, Some(moments))?;
    let (_, _, after) = matrix_of(rounded, Some(moments))?;
    if weights.shape() != rounded.shape() {
        return Err(RoundingError::Shape { found: rounded.shape().to_vec(), expected: Some(columns) });
    }
    let differences: Vec<f32> = before.iter().zip(after).map(|(before, after)| after - before).collect();
    Ok(row_errors(&differences, &moments.second(), columns).iter().sum())
}

/// Rows, columns and elements of a matrix of weights.
fn matrix_of<'a>(weights: &'a Tensor, moments: Option<&Moments>) -> Result<(usize, usize, &'a [f32]), RoundingError> {
    let expected = moments.map(Moments::columns);
    match weights.shape() {
        [rows, columns] if expected.is_none_or(|expected| expected == *columns) => {
            Ok((*rows, *columns, weights.as_slice::<f32>()?))
        }
        found => Err(RoundingError::Shape { found: found.to_vec(), expected }),
    }
}

/// `d H dᵀ` for each row `d`.
fn row_errors(differences: &[f32], hessian: &[f64], columns: usize) -> Vec<f64> {
    use matrix::{View, multiply};
    let hessian: Vec<f32> = hessian.iter().map(|v| *v as f32).collect();
    let mut product = vec![0f32; differences.len()];
    multiply(&mut product, 0, columns, 0.0, 1.0, View::new(differences, columns), View::new(&hessian, columns));
    let rows = differences.chunks_exact(columns.max(1)).zip(product.chunks_exact(columns.max(1)));
    rows.map(|(d, hd)| d.iter().zip(hd).map(|(d, hd)| f64::from(*d) * f64::from(*hd)).sum()).collect()
}

/// A quantizer seen from the places of a matrix `[rows, columns]`.
struct Grid<'a> {
    quantizer: &'a Quantizer,
    columns: usize,
    /// The scale at row `r` and column `c` is number `r / row_block * row_step + c / column_block * column_step`.
    row_block: usize,
    row_step: usize,
    column_block: usize,
    column_step: usize,
}

impl<'a> Grid<'a> {
    fn new(quantizer: &'a Quantizer, rows: usize, columns: usize) -> Result<Grid<'a>, RoundingError> {
        // Checks that the scales fit.
        quantizer.operands(&[rows, columns])?;
        let (row_block, row_step, column_block, column_step) = match (quantizer.axis, quantizer.block) {
            (Some(0), block) => {
                (block.unwrap_or(1), if block.is_some() { columns } else { 1 }, 1, usize::from(block.is_some()))
            }
            (Some(_), Some(block)) => (1, columns.div_ceil(block), block, 1),
            (Some(_), None) => (1, 0, 1, 1),
            (None, _) => (1, 0, 1, 0),
        };
        Ok(Grid { quantizer, columns, row_block, row_step, column_block, column_step })
    }

    /// Which scale belongs to a place.
    fn index(&self, row: usize, column: usize) -> usize {
        row / self.row_block * self.row_step + column / self.column_block * self.column_step
    }

    /// The code next to a weight.
    fn code(&self, weight: f32, index: usize) -> i32 {
        let (low, high) = self.quantizer.levels;
        let steps = (weight / self.quantizer.scales[index]).round_ties_even();
        // A weight that has become none takes the least code; casting saturates.
        if steps.is_nan() {
            return low;
        }
        (steps as i64).saturating_add(i64::from(self.quantizer.zero_points[index])).clamp(low.into(), high.into())
            as i32
    }

    /// What a code stands for.
    fn value(&self, code: i32, index: usize) -> f32 {
        (i64::from(code) - i64::from(self.quantizer.zero_points[index])) as f32 * self.quantizer.scales[index]
    }

    fn nearest(&self, elements: &[f32]) -> Vec<i32> {
        let places = elements.iter().enumerate();
        places.map(|(i, w)| self.code(*w, self.index(i / self.columns, i % self.columns))).collect()
    }

    /// What codes stand for less the weights.
    fn differences(&self, elements: &[f32], codes: &[i32]) -> Vec<f32> {
        let places = elements.iter().zip(codes).enumerate();
        places.map(|(i, (w, code))| self.value(*code, self.index(i / self.columns, i % self.columns)) - w).collect()
    }
}
