//! The affine quantizer: real numbers as small integers, `x ~ scale * (code - zero_point)`.
//!
//! Scales and zero points follow Jacob et al., *Quantization and training of neural networks for efficient
//! integer-arithmetic-only inference* (2017, arXiv:1712.05877): ranges are widened to contain zero, which therefore is
//! always exact. Codes are those that ONNX's QuantizeLinear gives: the quotient is rounded to `f32`, then to the nearest
//! integer, ties to even, shifted and saturated.

use updraft_graph::{DType, Tensor, TensorError};

/// The values that a quantizer must cover.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// The least value.
    pub min: f32,
    /// The greatest value.
    pub max: f32,
}

/// Scales and zero points of a tensor's elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantizer {
    /// The type of the codes: an integer of at most 16 bits, or `i32` for biases.
    pub dtype: DType,
    /// The axis along which scales differ; `None` for one scale a tensor.
    pub axis: Option<usize>,
    /// Indices along the axis that share a scale; `None` where each has its own.
    pub block: Option<usize>,
    /// The scales in row-major order: one; one a channel; or, in blocks, one for each block of the axis and each index
    /// along the other axes.
    pub scales: Vec<f32>,
    /// As many zero points.
    pub zero_points: Vec<i32>,
    /// The least and the greatest code used, which may be fewer than the type has.
    pub levels: (i32, i32),
}

/// How the scale of weights is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightScale {
    /// The largest magnitude takes the largest code.
    MaxAbs,
    /// Of scales from 0.4 to 1 times that of [`MaxAbs`](WeightScale::MaxAbs), the one whose codes differ least from the
    /// weights in the sum of squares.
    Mse,
}

/// Why something cannot be quantized.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QuantizerError {
    /// The range is not one of finite numbers.
    #[error("the range from {min} to {max} is not one of finite numbers in order")]
    Range {
        /// Its lower end.
        min: f32,
        /// Its upper end.
        max: f32,
    },
    /// A number to be covered is not finite.
    #[error("element {index} is {value}, expected a finite number")]
    NotFinite {
        /// Its place in row-major order.
        index: usize,
        /// What it is.
        value: f32,
    },
    /// Codes of this type are not made.
    #[error("codes of {dtype} are not supported, expected an integer type of at most 16 bits or i32")]
    DType {
        /// The type asked for.
        dtype: DType,
    },
    /// The scales do not belong to a tensor of this shape.
    #[error("{scales} scales along axis {axis:?} (blocks of {block:?}) do not fit shape {shape:?}")]
    Shape {
        /// How many scales there are.
        scales: usize,
        /// Their axis.
        axis: Option<usize>,
        /// Indices along the axis that share a scale.
        block: Option<usize>,
        /// The tensor's shape.
        shape: Vec<usize>,
    },
    /// The elements are of another type than expected.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// The least and the greatest code of a type that quantizers write.
pub fn levels(dtype: DType) -> Result<(i32, i32), QuantizerError> {
    let fits = dtype == DType::I32 || dtype.bits().is_some_and(|bits| bits <= 16);
    match dtype.integer_range().filter(|_| fits) {
        Some((low, high)) => Ok((low as i32, high as i32)),
        None => Err(QuantizerError::DType { dtype }),
    }
}

impl Range {
    /// The least range that contains this one and another.
    pub fn union(self, other: Range) -> Range {
        Range { min: self.min.min(other.min), max: self.max.max(other.max) }
    }

    /// The least range that contains zero and a tensor's elements, all of which must be finite.
    pub fn of_tensor(tensor: &Tensor) -> Result<Range, QuantizerError> {
        let (values, _) = finite(tensor)?;
        Ok(values.iter().fold(Range { min: 0.0, max: 0.0 }, |r, v| r.union(Range { min: *v, max: *v })))
    }
}

impl Quantizer {
    /// One scale for values in a range, which is widened to contain zero. `symmetric` puts zero in the middle of the
    /// codes.
    pub fn of_range(range: Range, dtype: DType, symmetric: bool) -> Result<Quantizer, QuantizerError> {
        Quantizer::within(range, dtype, levels(dtype)?, symmetric)
    }

    /// [`of_range`](Quantizer::of_range) with fewer codes than the type has.
    pub fn within(
        range: Range,
        dtype: DType,
        (low, high): (i32, i32),
        symmetric: bool,
    ) -> Result<Quantizer, QuantizerError> {
        let Range { min, max } = range;
        if !(min.is_finite() && max.is_finite() && min <= max) {
            return Err(QuantizerError::Range { min, max });
        }
        let (min, max) = (f64::from(min).min(0.0), f64::from(max).max(0.0));
        let middle = middle((low, high));
        let (scale, zero_point) = if symmetric {
            (usable((-min).max(max) / f64::from(high - middle)), middle)
        } else {
            let scale = usable((max - min) / (f64::from(high) - f64::from(low)));
            let zero_point = (f64::from(low) - min / f64::from(scale)).round_ties_even();
            (scale, zero_point.clamp(f64::from(low), f64::from(high)) as i32)
        };
        Ok(Quantizer {
            dtype,
            axis: None,
            block: None,
            scales: vec![scale],
            zero_points: vec![zero_point],
            levels: (low, high),
        })
    }

    /// Symmetric scales of weights: one, or one for each index along `axis`.
    pub fn of_weights(
        weights: &Tensor,
        dtype: DType,
        axis: Option<usize>,
        choice: WeightScale,
    ) -> Result<Quantizer, QuantizerError> {
        Quantizer::of_groups(weights, dtype, levels(dtype)?, axis, None, choice, true)
    }

    /// Scales of weights for each `block` indices along `axis` and each index along the other axes: symmetric for
    /// signed codes, else with a zero point.
    pub fn of_blocks(
        weights: &Tensor,
        dtype: DType,
        axis: usize,
        block: usize,
        choice: WeightScale,
    ) -> Result<Quantizer, QuantizerError> {
        let symmetric = dtype.is_signed_integer();
        Quantizer::of_groups(weights, dtype, levels(dtype)?, Some(axis), Some(block.max(1)), choice, symmetric)
    }

    /// Scales of weights with given codes; the general form of [`of_weights`](Quantizer::of_weights) and
    /// [`of_blocks`](Quantizer::of_blocks).
    pub fn of_groups(
        weights: &Tensor,
        dtype: DType,
        levels: (i32, i32),
        axis: Option<usize>,
        block: Option<usize>,
        choice: WeightScale,
        symmetric: bool,
    ) -> Result<Quantizer, QuantizerError> {
        let (values, shape) = finite(weights)?;
        let layout = Layout::new(&shape, axis, block).ok_or_else(|| QuantizerError::Shape {
            scales: 0,
            axis,
            block,
            shape: shape.clone(),
        })?;
        let mut groups: Vec<Vec<f32>> = vec![Vec::new(); layout.scales];
        layout.rows(|start, len, first, stride| {
            if stride == 0 {
                groups[first].extend_from_slice(&values[start..start + len]);
            } else {
                (0..len).for_each(|i| groups[first + i].push(values[start + i]));
            }
        });
        let mut made = Quantizer { dtype, axis, block, scales: Vec::new(), zero_points: Vec::new(), levels };
        for group in &groups {
            let range = group.iter().fold(Range { min: 0.0, max: 0.0 }, |r, v| r.union(Range { min: *v, max: *v }));
            let of = |factor: f32| {
                let range = Range { min: range.min * factor, max: range.max * factor };
                Quantizer::within(range, dtype, levels, symmetric)
            };
            let widest = of(1.0)?;
            let best = match choice {
                WeightScale::MaxAbs => widest,
                WeightScale::Mse => {
                    let mut best = (widest.squared_error(group), widest);
                    for percent in (40..100).rev() {
                        let candidate = of(percent as f32 / 100.0)?;
                        let error = candidate.squared_error(group);
                        if error < best.0 {
                            best = (error, candidate);
                        }
                    }
                    best.1
                }
            };
            made.scales.extend(best.scales);
            made.zero_points.extend(best.zero_points);
        }
        Ok(made)
    }

    /// Codes of a bias: `i32` in steps of the product of its layer's scales, so that it adds to sums of products.
    pub fn of_bias(scales: Vec<f32>) -> Quantizer {
        Quantizer {
            dtype: DType::I32,
            axis: (scales.len() > 1).then_some(0),
            block: None,
            zero_points: vec![0; scales.len()],
            scales,
            levels: (i32::MIN, i32::MAX),
        }
    }

    /// The codes of a tensor of floats.
    pub fn quantize(&self, tensor: &Tensor) -> Result<Tensor, QuantizerError> {
        let values = tensor.cast(DType::F32)?;
        let values = values.as_slice::<f32>()?;
        let mut codes = vec![0i32; values.len()];
        let (low, high) = self.levels;
        // Products of two scales are too fine for an `f32` quotient; other codes are those of QuantizeLinear.
        let wide = self.dtype == DType::I32;
        let code = |x: f32, scale: f32, zero: i32| {
            let steps = if wide {
                (f64::from(x) / f64::from(scale)).round_ties_even()
            } else {
                f64::from((x / scale).round_ties_even())
            };
            // A number that is none takes the least code; casting saturates.
            if steps.is_nan() {
                low
            } else {
                (steps as i64).saturating_add(i64::from(zero)).clamp(low.into(), high.into()) as i32
            }
        };
        self.layout(tensor.shape())?.rows(|start, len, first, stride| {
            for (i, (x, q)) in values[start..start + len].iter().zip(&mut codes[start..start + len]).enumerate() {
                let at = first + i * stride;
                *q = code(*x, self.scales[at], self.zero_points[at]);
            }
        });
        codes_tensor(self.dtype, tensor.shape(), &codes)
    }

    /// The `f32` numbers that codes stand for.
    pub fn dequantize(&self, codes: &Tensor) -> Result<Tensor, QuantizerError> {
        let integers = codes.cast(DType::I32)?;
        let integers = integers.as_slice::<i32>()?;
        let mut values = vec![0f32; integers.len()];
        self.layout(codes.shape())?.rows(|start, len, first, stride| {
            for (i, (q, x)) in integers[start..start + len].iter().zip(&mut values[start..start + len]).enumerate() {
                let at = first + i * stride;
                *x = (i64::from(*q) - i64::from(self.zero_points[at])) as f32 * self.scales[at];
            }
        });
        Ok(Tensor::new(codes.shape(), &values)?)
    }

    /// What is left of a tensor of floats after [`quantize`](Quantizer::quantize) and
    /// [`dequantize`](Quantizer::dequantize).
    pub fn round_trip(&self, tensor: &Tensor) -> Result<Tensor, QuantizerError> {
        self.dequantize(&self.quantize(tensor)?)
    }

    /// Scales and zero points as the operands of QuantizeLinear and DequantizeLinear for a tensor of this shape:
    /// scalars, vectors, or in blocks of the tensor's rank.
    pub fn operands(&self, shape: &[usize]) -> Result<(Tensor, Tensor), QuantizerError> {
        let layout = self.layout(shape)?;
        let scales = Tensor::new(&layout.scale_shape, &self.scales)?;
        Ok((scales, codes_tensor(self.dtype, &layout.scale_shape, &self.zero_points)?))
    }

    /// The scale and zero point of one channel, or of the whole tensor where there is but one.
    pub fn of_channel(&self, channel: usize) -> (f32, i32) {
        let at = if self.axis.is_none() { 0 } else { channel };
        (self.scales.get(at).copied().unwrap_or(1.0), self.zero_points.get(at).copied().unwrap_or(0))
    }

    fn layout(&self, shape: &[usize]) -> Result<Layout, QuantizerError> {
        Layout::new(shape, self.axis, self.block)
            .filter(|layout| layout.scales == self.scales.len() && layout.scales == self.zero_points.len())
            .ok_or_else(|| QuantizerError::Shape {
                scales: self.scales.len(),
                axis: self.axis,
                block: self.block,
                shape: shape.to_vec(),
            })
    }

    /// The sum of squared differences that the first scale makes.
    fn squared_error(&self, values: &[f32]) -> f64 {
        let (scale, zero) = (self.scales[0], self.zero_points[0] as f32);
        let inverse = 1.0 / scale;
        let (low, high) = (self.levels.0 as f32 - zero, self.levels.1 as f32 - zero);
        // Adding and taking away 1.5 * 2^23 rounds numbers below 2^22 to the nearest integer, ties to even, in two
        // operations that every processor has as vectors. Lanes of their own let the sum be a vector too.
        const ROUND: f32 = 12_582_912.0;
        let square = |x: f32| {
            let steps = (x * inverse).clamp(low, high);
            let error = x - ((steps + ROUND) - ROUND) * scale;
            error * error
        };
        let mut total = 0.0f64;
        for part in values.chunks(4096) {
            let mut lanes = [0f32; 16];
            let whole = part.chunks_exact(16);
            total += whole.remainder().iter().map(|x| f64::from(square(*x))).sum::<f64>();
            for sixteen in whole {
                lanes.iter_mut().zip(sixteen).for_each(|(lane, x)| *lane += square(*x));
            }
            total += lanes.iter().map(|l| f64::from(*l)).sum::<f64>();
        }
        total
    }
}

/// The code of zero where scales are symmetric.
fn middle((low, high): (i32, i32)) -> i32 {
    if low < 0 { 0 } else { (high - low) / 2 + 1 + low }
}

/// A scale that can be divided by: a range of (nearly) no extent is all zeros, which any scale gives.
fn usable(scale: f64) -> f32 {
    let scale = scale as f32;
    if scale >= f32::MIN_POSITIVE { scale } else { 1.0 }
}

/// The elements as `f32`, all of which must be finite, and the shape.
fn finite(tensor: &Tensor) -> Result<(Vec<f32>, Vec<usize>), QuantizerError> {
    let values = tensor.cast(DType::F32)?.as_slice::<f32>()?.to_vec();
    match values.iter().position(|v| !v.is_finite()) {
        Some(index) => Err(QuantizerError::NotFinite { index, value: values[index] }),
        None => Ok((values, tensor.shape().to_vec())),
    }
}

/// A tensor of integers that fit its type.
fn codes_tensor(dtype: DType, shape: &[usize], codes: &[i32]) -> Result<Tensor, QuantizerError> {
    let bytes: Vec<u8> = match dtype.size_in_memory() {
        1 => codes.iter().map(|q| *q as u8).collect(),
        2 => codes.iter().flat_map(|q| (*q as u16).to_ne_bytes()).collect(),
        _ => codes.iter().flat_map(|q| q.to_ne_bytes()).collect(),
    };
    Ok(Tensor::from_bytes(dtype, shape, &bytes)?)
}

/// Which scale belongs to each element of a tensor.
struct Layout {
    outer: usize,
    axis: usize,
    inner: usize,
    block: Option<usize>,
    scales: usize,
    scale_shape: Vec<usize>,
}

impl Layout {
    fn new(shape: &[usize], axis: Option<usize>, block: Option<usize>) -> Option<Layout> {
        let Some(axis) = axis else {
            return Some(Layout {
                outer: 1,
                axis: 1,
                inner: shape.iter().product(),
                block: None,
                scales: 1,
                scale_shape: Vec::new(),
            });
        };
        let size = *shape.get(axis)?;
        let (outer, inner) = (shape[..axis].iter().product(), shape[axis + 1..].iter().product());
        let scale_shape = match block {
            None => vec![size],
            Some(block) => {
                let mut scale_shape = shape.to_vec();
                scale_shape[axis] = size.div_ceil(block.max(1));
                scale_shape
            }
        };
        Some(Layout { outer, axis: size, inner, block, scales: scale_shape.iter().product(), scale_shape })
    }

    /// Calls `row` with the start and length of each run of elements, the scale of its first element, and by how much
    /// the scale's place grows from one element to the next.
    fn rows(&self, mut row: impl FnMut(usize, usize, usize, usize)) {
        for outer in 0..self.outer {
            match self.block {
                None if self.inner == 1 => row(outer * self.axis, self.axis, 0, usize::from(self.scales > 1)),
                _ => {
                    for along in 0..self.axis {
                        let start = (outer * self.axis + along) * self.inner;
                        match self.block {
                            None => row(start, self.inner, along, 0),
                            Some(block) => {
                                let blocks = self.axis.div_ceil(block.max(1));
                                row(start, self.inner, (outer * blocks + along / block.max(1)) * self.inner, 1);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use updraft_base::random::{Key, fill_uniform};

    fn random(seed: u64, shape: &[usize], spread: impl Fn(usize) -> f32) -> Tensor {
        let mut values = vec![0f32; shape.iter().product()];
        fill_uniform(&Key::new(seed), 0, &mut values);
        values.iter_mut().enumerate().for_each(|(i, v)| *v = (*v * 2.0 - 1.0) * spread(i));
        Tensor::new(shape, &values).unwrap()
    }

    fn squares(a: &Tensor, b: &Tensor) -> f64 {
        a.to_f64().unwrap().iter().zip(b.to_f64().unwrap()).map(|(a, b)| (a - b).powi(2)).sum()
    }

    #[test]
    fn every_value_in_range_comes_back_within_half_a_step_and_codes_come_back_exactly() {
        for (dtype, symmetric) in
            [(DType::U8, false), (DType::I8, false), (DType::I8, true), (DType::U16, false), (DType::I16, true)]
        {
            for (min, max) in [(-1.0, 3.0), (0.5, 2.0), (-7.0, -0.25), (-1e-20, 1e-20), (-1e38, 1e38)] {
                let q = Quantizer::of_range(Range { min, max }, dtype, symmetric).unwrap();
                let x: Vec<f32> = (0..=1000).map(|i| min + (max * 0.001 - min * 0.001) * i as f32).collect();
                let x = Tensor::vector(&x);
                let back = q.round_trip(&x).unwrap();
                // Half a step, and the rounding of the quotient and of the product: two units in the last place.
                let bound = q.scales[0] * 0.5 + max.abs().max(min.abs()) * 3e-7;
                for (x, y) in x.as_slice::<f32>().unwrap().iter().zip(back.as_slice::<f32>().unwrap()) {
                    assert!((x - y).abs() <= bound, "{dtype} {min}..{max}: {x} became {y}, step {}", q.scales[0]);
                }
                assert_eq!(q.quantize(&back).unwrap(), q.quantize(&x).unwrap());
                assert_eq!(q.round_trip(&Tensor::scalar(0f32)).unwrap(), Tensor::scalar(0f32));
            }
        }
    }

    #[test]
    fn a_scale_a_channel_is_never_noisier_than_one_a_tensor_and_searched_scales_never_than_the_largest() {
        for seed in 0..20 {
            let w = random(seed, &[8, 3, 5], |i| 1.0 / (1.0 + (i / 15) as f32));
            let error = |axis, choice| {
                let q = Quantizer::of_weights(&w, DType::I8, axis, choice).unwrap();
                squares(&w, &q.round_trip(&w).unwrap())
            };
            assert!(error(Some(0), WeightScale::MaxAbs) <= error(None, WeightScale::MaxAbs));
            assert!(error(Some(0), WeightScale::Mse) <= error(Some(0), WeightScale::MaxAbs));
            assert!(error(None, WeightScale::Mse) <= error(None, WeightScale::MaxAbs));
        }
    }

    #[test]
    fn outliers_are_clipped_where_that_loses_less() {
        let mut values = vec![0.1f32; 1000];
        values.iter_mut().enumerate().for_each(|(i, v)| *v *= (i as f32 * 0.37).sin());
        values[0] = 0.2;
        let w = Tensor::vector(&values);
        let of = |choice| Quantizer::of_weights(&w, DType::I4, None, choice).unwrap();
        let (wide, narrow) = (of(WeightScale::MaxAbs), of(WeightScale::Mse));
        assert!(narrow.scales[0] < wide.scales[0]);
        assert!(squares(&w, &narrow.round_trip(&w).unwrap()) < squares(&w, &wide.round_trip(&w).unwrap()));
    }

    #[test]
    fn scales_lie_along_any_axis_and_in_blocks_as_the_operator_reads_them() {
        use updraft_graph::{Graph, eval::evaluate};
        let w = random(7, &[4, 6, 3], |i| 1.0 + (i % 5) as f32);
        let cases = [(None, None), (Some(0), None), (Some(1), None), (Some(2), None), (Some(1), Some(4))];
        for (axis, block) in cases {
            for (dtype, symmetric) in [(DType::I8, true), (DType::U4, false)] {
                let scale = WeightScale::MaxAbs;
                let q = Quantizer::of_groups(&w, dtype, levels(dtype).unwrap(), axis, block, scale, symmetric).unwrap();
                let codes = q.quantize(&w).unwrap();
                let (scales, zeros) = q.operands(w.shape()).unwrap();
                let mut g = Graph::new("dequantize");
                let inputs =
                    [g.add_constant("q", codes.clone()), g.add_constant("s", scales), g.add_constant("z", zeros)];
                let attributes =
                    [("axis", (axis.unwrap_or(0) as i64).into()), ("block_size", (block.unwrap_or(0) as i64).into())];
                let y = g.op("DequantizeLinear", &inputs, attributes).unwrap();
                g.push_output(y);
                let made = evaluate(&g, &Default::default()).unwrap();
                assert_eq!(made[0], q.dequantize(&codes).unwrap(), "axis {axis:?}, block {block:?}");
            }
        }
    }

    #[test]
    fn numbers_that_are_none_are_refused_by_place() {
        let w = Tensor::vector(&[1.0f32, f32::NAN]);
        let found = Quantizer::of_weights(&w, DType::I8, None, WeightScale::MaxAbs).unwrap_err();
        assert!(matches!(found, QuantizerError::NotFinite { index: 1, .. }), "{found}");
        for (min, max) in [(f32::NAN, 1.0), (0.0, f32::INFINITY), (2.0, 1.0)] {
            let found = Quantizer::of_range(Range { min, max }, DType::U8, false);
            assert!(matches!(found, Err(QuantizerError::Range { .. })), "{found:?}");
        }
        assert!(Quantizer::of_range(Range { min: 0.0, max: 1.0 }, DType::F32, false).is_err());
    }

    #[test]
    fn tensors_without_elements_or_extent_have_scales() {
        let empty = Tensor::zeros(DType::F32, &[0, 3]).unwrap();
        for axis in [None, Some(0), Some(1)] {
            let q = Quantizer::of_weights(&empty, DType::I8, axis, WeightScale::Mse).unwrap();
            assert_eq!(q.round_trip(&empty).unwrap(), empty);
        }
        let zero = Tensor::vector(&[0f32; 3]);
        let q = Quantizer::of_weights(&zero, DType::I8, Some(0), WeightScale::Mse).unwrap();
        assert_eq!(q.scales, [1.0; 3]);
    }
}
