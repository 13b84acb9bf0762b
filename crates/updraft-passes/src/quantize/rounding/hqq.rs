//! Scales and zero points that forgive outliers, without data, after half-quadratic quantization (Badri and Shaji 2023,
//! <https://mobiusml.github.io/hqq_blog/>).
//!
//! The error of a block is measured by `Σ |w - ŵ|^p` with `p < 1`, which cares little about a few large errors. Split
//! into an error `e` that may be sparse and a rest that is squared, the sum has two easy halves that alternate: `e` is the
//! difference shrunk (generalised soft thresholding), and the quantizer is the least-squares fit of the rest.

use updraft_graph::Tensor;

use crate::quantize::rounding::{Grid, RoundingError, matrix_of, nearest};
use crate::quantize::{Quantizer, RoundedWeights};

/// How scales and zero points are sought.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HqqOptions {
    /// The weight β of the squared half at first, for differences in steps.
    pub beta: f32,
    /// By how much β grows in each round.
    pub growth: f32,
    /// The most rounds of each start; one that gains nothing is the last.
    pub rounds: usize,
    /// Whether zero points are sought too; otherwise they stay, as those of symmetric codes must.
    pub zero_points: bool,
}

impl Default for HqqOptions {
    fn default() -> HqqOptions {
        HqqOptions { beta: 10.0, growth: 1.01, rounds: 20, zero_points: true }
    }
}

/// Rounds `weights [out, in]` to nearest after fitting the scales and zero points of `quantizer` to them.
///
/// The published method keeps the scale and has real zero points. Those of ONNX are codes, which can only move the ends of
/// the range, so the scale is fitted as well. Of all quantizers met on the way, the given one among them, the one with the
/// least error is kept.
pub fn hqq(weights: &Tensor, quantizer: &Quantizer, options: &HqqOptions) -> Result<RoundedWeights, RoundingError> {
    let (rows, columns, elements) = matrix_of(weights, None)?;
    let grid = Grid::new(quantizer, rows, columns)?;
    let mut blocks: Vec<Vec<f32>> = vec![Vec::new(); quantizer.scales.len()];
    for (i, w) in elements.iter().enumerate() {
        blocks[grid.index(i / columns, i % columns)].push(*w);
    }
    let mut fitted = quantizer.clone();
    for (at, block) in blocks.iter().enumerate() {
        (fitted.scales[at], fitted.zero_points[at]) = fit(block, quantizer, at, options);
    }
    nearest(weights, &fitted)
}

/// `x^p` for the power of the error, `p = 3/4`, and `x^(p - 1)`: near the published 0.7, and made of square roots, which
/// every processor takes of whole vectors.
fn powers(x: f32) -> (f32, f32) {
    let fourth_root = x.sqrt().sqrt();
    (fourth_root * fourth_root * fourth_root, 1.0 / fourth_root)
}

/// A round that lessens the error by less than this share is the last of its start.
const GAIN_MIN: f64 = 1e-3;

/// Factors of the given scale that the search starts from. Where nothing is cut off, no difference is large enough to
/// be forgiven and every scale is nearly as good as those beside it, so that one start would stay where it is.
const STARTS: [f32; 5] = [1.0, 0.85, 0.7, 0.55, 0.4];

/// The scale and zero point of one block.
fn fit(block: &[f32], quantizer: &Quantizer, at: usize, options: &HqqOptions) -> (f32, i32) {
    let (low, high) = (quantizer.levels.0 as f32, quantizer.levels.1 as f32);
    let code = |w: f32, scale: f32, zero: f32| ((w / scale).round_ties_even() + zero).clamp(low, high);
    let error = |scale: f32, zero: f32| -> f64 {
        block.iter().map(|w| f64::from(powers((w - scale * (code(*w, scale, zero) - zero)).abs()).0)).sum()
    };
    let mut best: Option<(f64, f32, f32)> = None;
    for start in STARTS {
        let (mut scale, mut zero) = (quantizer.scales[at] * start, quantizer.zero_points[at] as f32);
        let mut least = f64::INFINITY;
        let mut beta = options.beta;
        for _ in 0..=options.rounds {
            let found = error(scale, zero);
            if found >= least * (1.0 - GAIN_MIN) {
                break;
            }
            least = found;
            if best.is_none_or(|best| found < best.0) {
                best = Some((found, scale, zero));
            }
            let (mut products, mut squares, mut offsets) = (0.0f64, 0.0f64, 0.0f64);
            for w in block {
                let steps = w / scale;
                let rounded = code(*w, scale, zero) - zero;
                let difference = steps - rounded;
                let magnitude = difference.abs();
                let threshold = if magnitude > 0.0 { powers(magnitude).1 / beta } else { 0.0 };
                let rest = f64::from(steps - difference.signum() * (magnitude - threshold).max(0.0));
                products += f64::from(rounded) * rest;
                squares += f64::from(rounded * rounded);
                offsets += f64::from(rounded) - rest;
            }
            let fitted = (f64::from(scale) * products / squares) as f32;
            if !(fitted.is_normal() && fitted > 0.0) {
                break;
            }
            scale = fitted;
            if options.zero_points {
                let shift = offsets / block.len().max(1) as f64;
                zero = (zero + shift as f32).round_ties_even().clamp(low, high);
            }
            beta *= options.growth;
        }
    }
    match best {
        Some((_, scale, zero)) => (scale, zero as i32),
        None => (quantizer.scales[at], quantizer.zero_points[at]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{WeightScale, levels};
    use updraft_base::random::{Key, fill_normal};
    use updraft_graph::DType;

    #[test]
    fn the_error_of_each_block_never_grows_and_outliers_stop_setting_the_scale() {
        let (rows, columns) = (16, 128);
        let mut values = vec![0f32; rows * columns];
        fill_normal(&Key::new(5), 0, &mut values);
        values.iter_mut().step_by(97).for_each(|v| *v *= 8.0);
        let weights = Tensor::new(&[rows, columns], &values).unwrap();
        for (dtype, symmetric) in [(DType::U4, false), (DType::I4, true)] {
            let of = |axis, block| {
                let levels = levels(dtype).unwrap();
                Quantizer::of_groups(&weights, dtype, levels, axis, block, WeightScale::MaxAbs, symmetric).unwrap()
            };
            let options = HqqOptions { zero_points: !symmetric, ..HqqOptions::default() };
            for quantizer in [of(Some(0), None), of(Some(1), Some(32))] {
                let error = |rounded: &RoundedWeights| -> Vec<f64> {
                    let back = rounded.quantizer.dequantize(&rounded.codes).unwrap();
                    let pairs = values.iter().zip(back.as_slice::<f32>().unwrap());
                    let errors: Vec<f64> = pairs.map(|(a, b)| f64::from(powers((a - b).abs()).0)).collect();
                    errors.chunks(quantizer.block.unwrap_or(columns)).map(|block| block.iter().sum()).collect()
                };
                let plain = error(&nearest(&weights, &quantizer).unwrap());
                let found = hqq(&weights, &quantizer, &options).unwrap();
                assert!(!symmetric || found.quantizer.zero_points == quantizer.zero_points);
                let found = error(&found);
                assert!(found.iter().zip(&plain).all(|(found, plain)| found <= &(plain * 1.000_001)));
                let (found, plain): (f64, f64) = (found.iter().sum(), plain.iter().sum());
                assert!(found < 0.95 * plain, "{dtype}: {found} against {plain}");
            }
        }
    }

    #[test]
    fn weights_of_zero_keep_their_scale() {
        let weights = Tensor::new(&[2, 4], &[0f32; 8]).unwrap();
        let quantizer = Quantizer::of_weights(&weights, DType::I8, Some(0), WeightScale::MaxAbs).unwrap();
        let found = hqq(&weights, &quantizer, &HqqOptions::default()).unwrap();
        assert_eq!(found.quantizer, quantizer);
    }
}
