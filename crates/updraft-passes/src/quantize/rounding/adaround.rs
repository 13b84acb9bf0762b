//! Learned rounding: AdaRound (Nagel, Amjad, van Baalen, Louizos and Blankevoort 2020, arXiv:2004.10568).
//!
//! Each weight is `scale (floor(w / scale) + h(v))` with `h(v) = clip(1.2 σ(v) - 0.1, 0, 1)`, and `v` is found by
//! gradient descent on the error of the layer's output plus `λ Σ (1 - |2 h - 1|^β)`, which costs nothing at 0 and 1
//! only; β falls from 20, where it holds nothing, to 2, where it holds all. The paper draws batches of inputs and looks
//! through the activation that follows; here the error is `tr(D H Dᵀ)` with the second moments `H` of all inputs, which
//! needs no rows to be kept and has an exact gradient, so that fewer steps do.

use updraft_graph::Tensor;

use crate::quantize::rounding::gptq::keep_nearest_where_better;
use crate::quantize::rounding::matrix::{View, multiply};
use crate::quantize::rounding::{Grid, Moments, RoundingError, matrix_of, nearest, rounded};
use crate::quantize::{Quantizer, RoundedWeights};

/// How rounding is learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdaRoundOptions {
    /// Steps of gradient descent; one costs as much as the layer on as many rows as it has inputs.
    pub steps: usize,
    /// Step size of Adam.
    pub learning_rate: f32,
    /// Weight λ of the pull to 0 and 1, in units of the error that one step of a weight makes on an average input.
    pub pull: f32,
    /// Share of the steps before the pull begins.
    pub warm_up: f32,
}

impl Default for AdaRoundOptions {
    fn default() -> AdaRoundOptions {
        AdaRoundOptions { steps: 1000, learning_rate: 0.02, pull: 10.0, warm_up: 0.2 }
    }
}

/// The sigmoid is stretched to this range, so that 0 and 1 are reached at a finite `v`.
const STRETCH: (f32, f32) = (-0.1, 1.1);

/// β when the pull begins and when it ends. Only whole numbers are taken, so that powers are products.
const BETA: (f32, f32) = (20.0, 2.0);

/// Rows that are learned together: enough to fill the registers of a product, and few enough to stay in cache.
const ROWS: usize = 64;

/// Rounds each of `weights [out, in]` down or up to a code of `quantizer` such that the output on inputs of these moments
/// moves little.
///
/// A row whose error is larger than that of rounding to nearest is rounded to nearest, which is down or up as well.
pub fn adaround(
    weights: &Tensor,
    quantizer: &Quantizer,
    moments: &Moments,
    options: &AdaRoundOptions,
) -> Result<RoundedWeights, RoundingError> {
    let (rows, columns, elements) = matrix_of(weights, Some(moments))?;
    let grid = Grid::new(quantizer, rows, columns)?;
    let second = moments.second();
    let mean = (0..columns).map(|i| second[i * columns + i]).sum::<f64>() / columns.max(1) as f64;
    if mean <= 0.0 {
        return nearest(weights, quantizer);
    }
    let hessian: Vec<f32> = second.iter().map(|v| (v / mean) as f32).collect();
    let mut codes = Vec::with_capacity(elements.len());
    for first in (0..rows).step_by(ROWS) {
        let part = &elements[first * columns..(first + ROWS).min(rows) * columns];
        let mut learned = Learned::new(&grid, first, part);
        learned.descend(&hessian, columns, options);
        codes.extend(learned.codes());
    }
    keep_nearest_where_better(elements, &grid, &second, &mut codes);
    rounded(quantizer, weights.shape(), &codes)
}

/// Some rows of weights under way. Weights are measured in steps of their scale.
struct Learned {
    /// The code below each weight, and how far above it the weight is.
    below: Vec<i32>,
    fraction: Vec<f32>,
    /// The step of each weight as a share of its row's average step.
    step: Vec<f32>,
    /// Whether both the code below and the one above are levels.
    free: Vec<bool>,
    v: Vec<f32>,
    gradient_mean: Vec<f32>,
    gradient_square: Vec<f32>,
    levels: (i32, i32),
}

/// `h(v)` and its derivative.
fn stretched_sigmoid(v: f32) -> (f32, f32) {
    let width = STRETCH.1 - STRETCH.0;
    let sigmoid = 1.0 / (1.0 + (-v).exp());
    let h = sigmoid * width + STRETCH.0;
    if (0.0..=1.0).contains(&h) { (h, width * sigmoid * (1.0 - sigmoid)) } else { (h.clamp(0.0, 1.0), 0.0) }
}

impl Learned {
    fn new(grid: &Grid, first_row: usize, elements: &[f32]) -> Learned {
        let columns = grid.columns;
        let (low, high) = grid.quantizer.levels;
        let scale = |i: usize| grid.index(first_row + i / columns, i % columns);
        let mut learned = Learned {
            below: Vec::with_capacity(elements.len()),
            fraction: Vec::with_capacity(elements.len()),
            step: Vec::with_capacity(elements.len()),
            free: Vec::with_capacity(elements.len()),
            v: Vec::with_capacity(elements.len()),
            gradient_mean: vec![0.0; elements.len()],
            gradient_square: vec![0.0; elements.len()],
            levels: (low, high),
        };
        for (i, w) in elements.iter().enumerate() {
            let steps = w / grid.quantizer.scales[scale(i)];
            let fraction = steps - steps.floor();
            let below = (steps.floor() as i64).saturating_add(i64::from(grid.quantizer.zero_points[scale(i)]));
            let is_free = (i64::from(low)..i64::from(high)).contains(&below);
            learned.below.push(below.clamp(i64::from(low), i64::from(high)) as i32);
            learned.fraction.push(if is_free { fraction } else { 0.0 });
            learned.free.push(is_free);
            let sigmoid = (fraction - STRETCH.0) / (STRETCH.1 - STRETCH.0);
            learned.v.push((sigmoid / (1.0 - sigmoid)).ln());
        }
        for row in 0..elements.len() / columns {
            let scales = (row * columns..(row + 1) * columns).map(|i| grid.quantizer.scales[scale(i)]);
            let average = scales.clone().map(f64::from).sum::<f64>() / columns as f64;
            learned.step.extend(scales.map(|s| (f64::from(s) / average) as f32));
        }
        learned
    }

    fn descend(&mut self, hessian: &[f32], columns: usize, options: &AdaRoundOptions) {
        const DECAY: (f32, f32) = (0.9, 0.999);
        let count = self.v.len();
        let (mut difference, mut slope, mut product) = (vec![0f32; count], vec![0f32; count], vec![0f32; count]);
        let warm_up = (options.steps as f32 * options.warm_up) as usize;
        for step in 0..options.steps {
            for i in 0..count {
                let (h, derivative) = stretched_sigmoid(self.v[i]);
                let free = f32::from(u8::from(self.free[i]));
                difference[i] = free * self.step[i] * (h - self.fraction[i]);
                slope[i] = free * derivative;
            }
            multiply(&mut product, 0, columns, 0.0, 1.0, View::new(&difference, columns), View::new(hessian, columns));
            let done = (step.saturating_sub(warm_up)) as f32 / (options.steps - warm_up).max(1) as f32;
            let beta = (BETA.0 + (BETA.1 - BETA.0) * done).round();
            let pull = if step < warm_up { 0.0 } else { options.pull * 2.0 * beta };
            let power = beta as i32 - 1;
            let corrections = (1.0 - DECAY.0.powi(step as i32 + 1), 1.0 - DECAY.1.powi(step as i32 + 1));
            for i in 0..count {
                // Both ends are at distance 1 from the middle.
                let from_middle = 2.0 * (difference[i] / self.step[i] + self.fraction[i]) - 1.0;
                let towards = pull * from_middle.abs().powi(power) * from_middle.signum();
                let gradient = (2.0 * self.step[i] * product[i] - towards) * slope[i];
                self.gradient_mean[i] = DECAY.0 * self.gradient_mean[i] + (1.0 - DECAY.0) * gradient;
                self.gradient_square[i] = DECAY.1 * self.gradient_square[i] + (1.0 - DECAY.1) * gradient * gradient;
                let root = (self.gradient_square[i] / corrections.1).sqrt();
                self.v[i] -= options.learning_rate * (self.gradient_mean[i] / corrections.0) / (root + 1e-8);
            }
        }
    }

    fn codes(&self) -> impl Iterator<Item = i32> + '_ {
        let places = self.below.iter().zip(&self.v).zip(&self.free);
        places.map(|((below, v), free)| {
            let up = *free && stretched_sigmoid(*v).0 >= 0.5;
            (below + i32::from(up)).clamp(self.levels.0, self.levels.1)
        })
    }
}

#[cfg(test)]
mod tests {
    use updraft_base::random::{Key, fill_normal};
    use updraft_graph::DType;

    use super::*;
    use crate::quantize::rounding::output_error;
    use crate::quantize::{WeightScale, levels};

    fn normal(seed: u64, count: usize) -> Vec<f32> {
        let mut values = vec![0f32; count];
        fill_normal(&Key::new(seed), 0, &mut values);
        values
    }

    #[test]
    fn every_weight_ends_at_the_code_below_or_above_and_outputs_move_less_than_by_rounding_to_nearest() {
        let (rows, columns) = (70, 48);
        let weights = Tensor::new(&[rows, columns], &normal(1, rows * columns)).unwrap();
        let mut x = normal(2, 500 * columns);
        x.chunks_exact_mut(columns).for_each(|row| (1..columns).for_each(|i| row[i] += 0.9 * row[i - 1]));
        let mut moments = Moments::new(columns);
        moments.add(&x).unwrap();
        let of = |dtype, axis, block, choice, symmetric| {
            Quantizer::of_groups(&weights, dtype, levels(dtype).unwrap(), axis, block, choice, symmetric).unwrap()
        };
        for quantizer in [
            of(DType::I8, Some(0), None, WeightScale::MaxAbs, true),
            of(DType::I4, Some(0), None, WeightScale::Mse, true),
            of(DType::U4, Some(1), Some(16), WeightScale::MaxAbs, false),
        ] {
            let found = adaround(&weights, &quantizer, &moments, &AdaRoundOptions::default()).unwrap();
            let grid = Grid::new(&quantizer, rows, columns).unwrap();
            let (low, high) = quantizer.levels;
            let codes = found.codes.to_i64().unwrap();
            for (i, (w, code)) in weights.as_slice::<f32>().unwrap().iter().zip(codes).enumerate() {
                let at = grid.index(i / columns, i % columns);
                let steps = w / quantizer.scales[at] + quantizer.zero_points[at] as f32;
                let (below, above) = (steps.floor() as i32, steps.ceil() as i32);
                let ends = [below.clamp(low, high), above.clamp(low, high)];
                assert!(ends.contains(&(code as i32)), "weight {i} of {steps} steps became {code}");
            }
            let weights_of = |r: &RoundedWeights| r.quantizer.dequantize(&r.codes).unwrap();
            let error = |r: &RoundedWeights| output_error(&weights, &weights_of(r), &moments).unwrap();
            let (found, plain) = (error(&found), error(&nearest(&weights, &quantizer).unwrap()));
            assert!(found < 0.7 * plain, "{found} against {plain}");
        }
    }

    #[test]
    fn once_the_pull_is_over_nothing_is_left_in_between() {
        let (rows, columns) = (8, 32);
        let weights = Tensor::new(&[rows, columns], &normal(3, rows * columns)).unwrap();
        let mut moments = Moments::new(columns);
        let mut x = normal(4, 500 * columns);
        x.chunks_exact_mut(columns).for_each(|row| (1..columns).for_each(|i| row[i] += 0.9 * row[i - 1]));
        moments.add(&x).unwrap();
        let quantizer = Quantizer::of_weights(&weights, DType::I4, Some(0), WeightScale::MaxAbs).unwrap();
        let grid = Grid::new(&quantizer, rows, columns).unwrap();
        let hessian: Vec<f32> = moments.second().iter().map(|v| *v as f32).collect();
        let mut learned = Learned::new(&grid, 0, weights.as_slice::<f32>().unwrap());
        learned.descend(&hessian, columns, &AdaRoundOptions::default());
        let between = learned.v.iter().filter(|v| (0.001..0.999).contains(&stretched_sigmoid(**v).0)).count();
        assert_eq!(between, 0);
    }
}
