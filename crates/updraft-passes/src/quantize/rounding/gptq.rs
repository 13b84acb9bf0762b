//! Rounding column by column, each error fed back into the columns not yet rounded: GPTQ (Frantar, Ashkboos, Hoefler
//! and Alistarh 2022, arXiv:2210.17323), after optimal brain quantization (Frantar and Alistarh 2022, arXiv:2208.11580).
//!
//! With the Hessian `H` of the layer's squared output error and the upper triangle `U` with `Uᵀ U = H⁻¹`, rounding
//! column `i` to `ŵ` makes the error `e = (w - ŵ) / U[i, i]`, and the best answer of the columns after it is
//! `w[j] -= e U[i, j]`. Rows do not mix, so a block of columns is done row by row while its part of `U` stays in cache,
//! and what a block does to the columns behind it is one product.

use updraft_graph::Tensor;

use crate::quantize::rounding::matrix::{View, multiply, upper_factor_of_inverse};
use crate::quantize::rounding::{Grid, Moments, RoundingError, matrix_of, rounded, row_errors};
use crate::quantize::{Quantizer, RoundedWeights};

/// How error is fed back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GptqOptions {
    /// What is added to the diagonal of the Hessian, as a share of its mean: what the columns after a rounded one may
    /// answer for is limited by it.
    pub damping: f64,
    /// Columns that are rounded before their errors reach the columns behind them.
    pub block_columns: usize,
    /// Whether the columns with the largest mean square input are rounded first, while there are columns left to
    /// answer for them; otherwise they are rounded in their own order.
    pub by_diagonal: bool,
}

impl Default for GptqOptions {
    fn default() -> GptqOptions {
        GptqOptions { damping: 0.01, block_columns: 128, by_diagonal: true }
    }
}

/// Rounds `weights [out, in]` to the codes of `quantizer` such that the output on inputs of these moments moves little.
///
/// A row whose error is larger than that of rounding to nearest (the method is greedy) is rounded to nearest.
pub fn gptq(
    weights: &Tensor,
    quantizer: &Quantizer,
    moments: &Moments,
    options: &GptqOptions,
) -> Result<RoundedWeights, RoundingError> {
    let (rows, columns, elements) = matrix_of(weights, Some(moments))?;
    let grid = Grid::new(quantizer, rows, columns)?;
    let hessian = moments.second();
    let order = order(&hessian, columns, options.by_diagonal);
    let factor = damped_factor(&hessian, &order, options.damping)?;
    let mut left: Vec<f32> = (0..rows).flat_map(|r| order.iter().map(move |c| elements[r * columns + c])).collect();
    let mut codes = vec![0i32; rows * columns];
    let block = options.block_columns.max(1);
    let mut errors = vec![0f32; rows * block];
    for start in (0..columns).step_by(block) {
        let end = (start + block).min(columns);
        let width = end - start;
        for r in 0..rows {
            let row = &mut left[r * columns..][..columns];
            for i in start..end {
                let at = grid.index(r, order[i]);
                let code = grid.code(row[i], at);
                codes[r * columns + order[i]] = code;
                let u = &factor[i * columns..][..columns];
                let error = (row[i] - grid.value(code, at)) / u[i];
                errors[r * width + i - start] = error;
                row[i + 1..end].iter_mut().zip(&u[i + 1..end]).for_each(|(w, u)| *w -= error * u);
            }
        }
        let errors = View::new(&errors[..rows * width], width);
        let rest = View::new(&factor, columns).part(start..end, end..columns);
        multiply(&mut left, end.min(columns - 1), columns, 1.0, -1.0, errors, rest);
    }
    keep_nearest_where_better(elements, &grid, &hessian, &mut codes);
    rounded(quantizer, weights.shape(), &codes)
}

/// The columns in the order in which they are rounded.
fn order(hessian: &[f64], columns: usize, by_diagonal: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..columns).collect();
    if by_diagonal {
        order.sort_by(|a, b| hessian[b * columns + b].total_cmp(&hessian[a * columns + a]));
    }
    order
}

/// The upper factor of the inverse of the damped Hessian, its columns and rows in this order.
fn damped_factor(hessian: &[f64], order: &[usize], damping: f64) -> Result<Vec<f32>, RoundingError> {
    let n = order.len();
    let mean = (0..n).map(|i| hessian[i * n + i]).sum::<f64>() / n.max(1) as f64;
    // Inputs that are always zero leave nothing to answer for; any diagonal makes that plain rounding.
    let mut added = if mean > 0.0 { damping.max(f64::EPSILON) * mean } else { 1.0 };
    // Rounding in sums of very many products can leave a matrix that is a little indefinite.
    for _ in 0..8 {
        let mut damped: Vec<f64> = order.iter().flat_map(|i| order.iter().map(move |j| hessian[i * n + j])).collect();
        (0..n).for_each(|i| damped[i * n + i] += added);
        if let Some(factor) = upper_factor_of_inverse(&damped, n) {
            return Ok(factor.into_iter().map(|v| v as f32).collect());
        }
        added *= 10.0;
    }
    Err(RoundingError::Hessian)
}

/// Rounds those rows to nearest whose output then moves less.
pub(super) fn keep_nearest_where_better(elements: &[f32], grid: &Grid, hessian: &[f64], codes: &mut [i32]) {
    let columns = grid.columns;
    let nearest = grid.nearest(elements);
    let error_of = |codes: &[i32]| row_errors(&grid.differences(elements, codes), hessian, columns);
    let (found, plain) = (error_of(codes), error_of(&nearest));
    for (r, _) in found.iter().zip(&plain).enumerate().filter(|(_, (found, plain))| found > plain) {
        codes[r * columns..][..columns].copy_from_slice(&nearest[r * columns..][..columns]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use updraft_base::random::{Key, fill_normal};
    use updraft_graph::DType;

    use super::*;
    use crate::quantize::rounding::{nearest, output_error};
    use crate::quantize::{WeightScale, levels};

    fn normal(seed: u64, count: usize) -> Vec<f32> {
        let mut values = vec![0f32; count];
        fill_normal(&Key::new(seed), 0, &mut values);
        values
    }

    /// Rows of inputs that depend on one another, as those of real layers do.
    fn inputs(seed: u64, rows: usize, columns: usize) -> Moments {
        let mut moments = Moments::new(columns);
        let mut x = normal(seed, rows * columns);
        for row in x.chunks_exact_mut(columns) {
            for i in 1..columns {
                row[i] = 0.8 * row[i - 1] + row[i] * (1.0 + (i % 7) as f32);
            }
        }
        moments.add(&x).unwrap();
        moments
    }

    fn weights_of(rounded: &RoundedWeights) -> Tensor {
        rounded.quantizer.dequantize(&rounded.codes).unwrap()
    }

    fn quantizers(weights: &Tensor) -> Vec<Quantizer> {
        let of = |dtype, levels, axis, block, symmetric| {
            Quantizer::of_groups(weights, dtype, levels, axis, block, WeightScale::MaxAbs, symmetric).unwrap()
        };
        vec![
            of(DType::I8, levels(DType::I8).unwrap(), Some(0), None, true),
            of(DType::I4, levels(DType::I4).unwrap(), Some(1), Some(16), true),
            of(DType::U4, levels(DType::U4).unwrap(), Some(1), Some(32), false),
            of(DType::I4, (-4, 3), None, None, true),
        ]
    }

    #[test]
    fn with_independent_inputs_of_one_size_it_is_rounding_to_nearest() {
        let (rows, columns) = (5, 200);
        let weights = Tensor::new(&[rows, columns], &normal(1, rows * columns)).unwrap();
        let mut moments = Moments::new(columns);
        for i in 0..columns {
            // One unit vector after another: the second moments are the identity over the number of columns.
            moments.add(&(0..columns).map(|j| if i == j { 1.0 } else { 0.0 }).collect::<Vec<f32>>()).unwrap();
        }
        for quantizer in quantizers(&weights) {
            for by_diagonal in [false, true] {
                let options = GptqOptions { by_diagonal, ..GptqOptions::default() };
                let found = gptq(&weights, &quantizer, &moments, &options).unwrap();
                assert_eq!(found, nearest(&weights, &quantizer).unwrap());
            }
        }
    }

    #[test]
    fn inputs_that_are_always_zero_are_no_obstacle() {
        let weights = Tensor::new(&[2, 3], &[0.1f32, -0.2, 0.3, 0.4, 0.5, -0.6]).unwrap();
        let mut moments = Moments::new(3);
        moments.add(&[0.0; 9]).unwrap();
        for quantizer in quantizers(&weights) {
            let found = gptq(&weights, &quantizer, &moments, &GptqOptions::default()).unwrap();
            assert_eq!(found, nearest(&weights, &quantizer).unwrap());
        }
    }

    #[test]
    fn moments_of_other_inputs_are_refused() {
        let weights = Tensor::new(&[2, 3], &[0f32; 6]).unwrap();
        let quantizer = Quantizer::of_weights(&weights, DType::I8, None, WeightScale::MaxAbs).unwrap();
        let found = gptq(&weights, &quantizer, &Moments::new(4), &GptqOptions::default()).unwrap_err();
        assert_eq!(found.to_string(), "weights of shape [2, 3], expected [out, 4]");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn on_the_calibration_data_it_is_never_worse_than_rounding_to_nearest(
            seed: u64, rows in 1usize..9, columns in 1usize..300, by_diagonal: bool, block_columns in 1usize..200,
        ) {
            let weights = Tensor::new(&[rows, columns], &normal(seed, rows * columns)).unwrap();
            let moments = inputs(seed ^ 1, 2 * columns, columns);
            let options = GptqOptions { by_diagonal, block_columns, ..GptqOptions::default() };
            for quantizer in quantizers(&weights) {
                let of = |r: &RoundedWeights| output_error(&weights, &weights_of(r), &moments).unwrap();
                let plain = of(&nearest(&weights, &quantizer).unwrap());
                let found = of(&gptq(&weights, &quantizer, &moments, &options).unwrap());
                // Products are summed in f32.
                prop_assert!(found <= plain * (1.0 + 1e-5), "{found} > {plain}");
                if columns > 100 {
                    prop_assert!(found < 0.8 * plain, "{found} is hardly less than {plain}");
                }
            }
        }
    }
}
