//! Resampling of pictures: Resize and Upsample along axes, GridSample at given points, AffineGrid for such points.
//!
//! Resizing is separable: along each axis, an element of the output is a weighted sum of few elements of the input.
//! [`Taps`] are those positions and weights, found once for an axis; the rest is applying them axis by axis. Formulas:
//! <https://onnx.ai/onnx/operators/onnx__Resize.html>; cubic interpolation: Keys, 1981.

use crate::attribute::Attributes;
use crate::dim::Dim;
use crate::op::conv::shape_operand;
use crate::op::{Arity, Axis, Eval, Fact, Infer, Link, Op, OpError, OpView, Shapes, filled, resolve_axis};
use crate::tensor::Tensor;

pub mod grid;

const GROWING: &str = "networks that are trained grow by ConvTranspose";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("Resize", &[10, 11, 13, 18, 19], Arity::range(1, 4), infer_resize, eval_resize)
        .no_gradient(GROWING)
        .flops(resize_flops)
        .channels(resize_links),
    Op::onnx("Upsample", &[7, 9], Arity::range(1, 2), infer_upsample, eval_upsample)
        .no_gradient(GROWING)
        .flops(resize_flops)
        .channels(resize_links),
];

/// For each index of an output axis, the input indices it reads and their weights; `None` for an index whose place
/// lies outside a cropped input.
type Taps = Vec<Option<Vec<(usize, f64)>>>;

/// How an axis is resampled.
#[derive(Debug, Clone)]
struct Sampling {
    mode: Mode,
    transform: Transform,
    /// Whether elements past the ends count as absent rather than as the last ones repeated.
    exclude_outside: bool,
    antialias: bool,
    cubic_a: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Nearest(Nearest),
    Linear,
    Cubic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nearest {
    RoundPreferFloor,
    RoundPreferCeil,
    Floor,
    Ceil,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transform {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    AlignCorners,
    Asymmetric,
    TfCropAndResize,
}

fn one_of<T: Copy>(attributes: &Attributes, name: &str, default: &str, known: &[(&str, T)]) -> Result<T, OpError> {
    let found = attributes.string(name, default)?;
    known.iter().find(|(name, _)| *name == found).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        OpError::attribute(name, format!("is {found:?}; known are {}", names.join(", ")))
    })
}

impl Sampling {
    fn of(view: &OpView) -> Result<Sampling, OpError> {
        let attributes = view.attributes();
        // Upsample, and Resize when it was new, took the element at or before the scaled place.
        let old = view.node.op == "Upsample" || view.opset < 11;
        let nearest = one_of(
            attributes,
            "nearest_mode",
            if old { "floor" } else { "round_prefer_floor" },
            &[
                ("round_prefer_floor", Nearest::RoundPreferFloor),
                ("round_prefer_ceil", Nearest::RoundPreferCeil),
                ("floor", Nearest::Floor),
                ("ceil", Nearest::Ceil),
            ],
        )?;
        let mode = one_of(
            attributes,
            "mode",
            "nearest",
            &[
                ("nearest", Mode::Nearest(nearest)),
                ("linear", Mode::Linear),
                ("bilinear", Mode::Linear),
                ("cubic", Mode::Cubic),
            ],
        )?;
        let transform = one_of(
            attributes,
            "coordinate_transformation_mode",
            if old { "asymmetric" } else { "half_pixel" },
            &[
                ("half_pixel", Transform::HalfPixel),
                ("half_pixel_symmetric", Transform::HalfPixelSymmetric),
                ("pytorch_half_pixel", Transform::PytorchHalfPixel),
                ("align_corners", Transform::AlignCorners),
                ("asymmetric", Transform::Asymmetric),
                ("tf_crop_and_resize", Transform::TfCropAndResize),
            ],
        )?;
        let antialias = attributes.flag("antialias", false)?;
        if antialias && matches!(mode, Mode::Nearest(_)) {
            return Err(OpError::unsupported("antialias with mode nearest"));
        }
        Ok(Sampling {
            mode,
            transform,
            exclude_outside: attributes.flag("exclude_outside", false)?,
            antialias,
            cubic_a: f64::from(attributes.float("cubic_coeff_a", -0.75)?),
        })
    }

    /// The place in the input of index `index` of the output.
    fn source(&self, index: usize, scale: f64, input: usize, output: usize, roi: (f64, f64)) -> f64 {
        let (x, input) = (index as f64, input as f64);
        let exact = scale * input;
        match self.transform {
            Transform::AlignCorners if exact == 1.0 => 0.0,
            Transform::AlignCorners => x * (input - 1.0) / (exact - 1.0),
            Transform::Asymmetric => x / scale,
            Transform::TfCropAndResize if exact == 1.0 => (roi.1 - roi.0) * (input - 1.0) / 2.0 + roi.0 * (input - 1.0),
            Transform::TfCropAndResize => x * (roi.1 - roi.0) * (input - 1.0) / (exact - 1.0) + roi.0 * (input - 1.0),
            Transform::PytorchHalfPixel if exact == 1.0 => -0.5,
            Transform::HalfPixel | Transform::PytorchHalfPixel => (x + 0.5) / scale - 0.5,
            Transform::HalfPixelSymmetric => {
                let offset = input / 2.0 * (1.0 - output as f64 / exact);
                offset + (x + 0.5) / scale - 0.5
            }
        }
    }

    /// Weights of an even number of neighbours of a place that lies `ratio` in (0, 1] after the last of their first
    /// half.
    fn weights(&self, ratio: f64, scale: f64) -> Vec<f64> {
        match self.mode {
            Mode::Nearest(mode) => {
                let upper = ratio == 1.0
                    || match mode {
                        Nearest::RoundPreferFloor => ratio > 0.5,
                        Nearest::RoundPreferCeil => ratio >= 0.5,
                        Nearest::Floor => false,
                        Nearest::Ceil => true,
                    };
                if upper { vec![0.0, 1.0] } else { vec![1.0, 0.0] }
            }
            // Shrinking with antialias stretches the interpolation's kernel over all elements that fall on one.
            Mode::Linear => self.kernel(1, ratio, scale, |x| (1.0 - x).max(0.0)),
            Mode::Cubic => {
                let a = self.cubic_a;
                self.kernel(2, ratio, scale, move |x| match x {
                    x if x <= 1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
                    x if x < 2.0 => ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a,
                    _ => 0.0,
                })
            }
        }
    }

    fn kernel(&self, reach: i64, ratio: f64, scale: f64, value: impl Fn(f64) -> f64) -> Vec<f64> {
        let scale = if self.antialias { scale.min(1.0) } else { 1.0 };
        let start = (-reach as f64 / scale).floor() as i64 + 1;
        let weights: Vec<f64> = (start..2 - start).map(|i| value(((i as f64 - ratio) * scale).abs())).collect();
        if !self.antialias {
            return weights;
        }
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect()
    }

    /// The taps of an axis.
    fn taps(&self, axis: &AxisPlan) -> Result<Taps, OpError> {
        let AxisPlan { input, output, scale, roi } = *axis;
        // Antialiasing spreads over 2 * reach / scale elements: bounded, so that no scale asks for all memory.
        if input == 0 || !scale.is_finite() || scale <= 0.0 || (self.antialias && scale < 1.0 / f64::from(1 << 20)) {
            return Err(OpError::value(format!("an axis of {input} is resized to {output} with scale {scale}")));
        }
        let taps = (0..output).map(|index| {
            let x = self.source(index, scale, input, output, roi);
            if self.transform == Transform::TfCropAndResize && !(0.0..=(input - 1) as f64).contains(&x) {
                return None;
            }
            let floor = x.floor();
            let ratio = if floor == x { 1.0 } else { x - floor };
            let mut weights = self.weights(ratio, scale);
            let last = floor as i64 - i64::from(floor == x);
            let first = last.saturating_sub(weights.len() as i64 / 2 - 1);
            let inside = |at: i64| (0..input as i64).contains(&at);
            if self.exclude_outside {
                for (i, w) in weights.iter_mut().enumerate() {
                    *w *= f64::from(u8::from(inside(first.saturating_add(i as i64))));
                }
                let sum: f64 = weights.iter().sum();
                if sum != 0.0 {
                    weights.iter_mut().for_each(|w| *w /= sum);
                }
            }
            let clamped = |i: usize| first.saturating_add(i as i64).clamp(0, input as i64 - 1) as usize;
            Some(weights.into_iter().enumerate().map(|(i, w)| (clamped(i), w)).collect())
        });
        Ok(taps.collect())
    }
}

/// What happens along one axis.
#[derive(Debug, Clone, Copy)]
struct AxisPlan {
    input: usize,
    output: usize,
    scale: f64,
    /// Where the crop begins and ends, as shares of the axis.
    roi: (f64, f64),
}

/// The axes that `scales`, `sizes` and `roi` are about.
fn resized_axes(view: &OpView, rank: usize) -> Result<Vec<usize>, OpError> {
    match view.attributes().ints("axes")? {
        Some(axes) => axes.iter().map(|axis| resolve_axis(*axis, rank)).collect(),
        None => Ok((0..rank).collect()),
    }
}

/// `floor(size * scale)`, in the arithmetic of the scale's type, as ONNX's own shape rule computes it.
fn scaled_size(size: usize, scale: f32) -> Result<usize, OpError> {
    let scaled = (size as f32 * scale).floor();
    // Larger sizes are not exact in `f32` and would not fit in memory.
    if (0.0..1e9).contains(&scaled) {
        return Ok(scaled as usize);
    }
    Err(OpError::value(format!("an axis of {size} scaled by {scale}")))
}

fn plan(cx: &Eval, shape: &[usize], scales: Option<&Tensor>, sizes: Option<&Tensor>) -> Result<Vec<AxisPlan>, OpError> {
    let axes = resized_axes(&cx.view, shape.len())?;
    let mut plan: Vec<AxisPlan> =
        shape.iter().map(|n| AxisPlan { input: *n, output: *n, scale: 1.0, roi: (0.0, 1.0) }).collect();
    let expect = |count: usize, what: &str| match count == axes.len() {
        true => Ok(()),
        false => Err(OpError::shape(format!("{count} {what} for {} axes", axes.len()))),
    };
    match (scales.filter(|t| !t.is_empty()), sizes.filter(|t| !t.is_empty())) {
        (Some(scales), None) => {
            let scales = scales.to_f64()?;
            expect(scales.len(), "scales")?;
            for (axis, scale) in axes.iter().zip(scales) {
                plan[*axis].scale = scale;
                plan[*axis].output = scaled_size(shape[*axis], scale as f32)?;
            }
        }
        (None, Some(sizes)) => {
            let sizes = shape_operand(sizes)?;
            expect(sizes.len(), "sizes")?;
            let ratios = axes.iter().zip(&sizes).map(|(axis, size)| *size as f64 / shape[*axis] as f64);
            let common = match cx.attributes().string("keep_aspect_ratio_policy", "stretch")? {
                "stretch" => None,
                "not_larger" => Some(ratios.fold(f64::INFINITY, f64::min)),
                "not_smaller" => Some(ratios.fold(0.0, f64::max)),
                other => {
                    let problem = format!("is {other:?}; stretch, not_larger and not_smaller are known");
                    return Err(OpError::attribute("keep_aspect_ratio_policy", problem));
                }
            };
            for (axis, size) in axes.iter().zip(sizes) {
                let entry = &mut plan[*axis];
                entry.scale = common.unwrap_or(size as f64 / entry.input as f64);
                entry.output = common.map_or(size, |common| (common * entry.input as f64 + 0.5).floor() as usize);
            }
        }
        _ => return Err(OpError::value("either scales or sizes must be given")),
    }
    if let Some(roi) = cx.optional(1).filter(|t| cx.inputs.len() > 2 && !t.is_empty()) {
        let roi = roi.to_f64()?;
        expect(roi.len() / 2, "region limits")?;
        for (i, axis) in axes.iter().enumerate() {
            plan[*axis].roi = (roi[i], roi[axes.len() + i]);
        }
    }
    Ok(plan)
}

fn infer_resize(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "input")?;
    let Some(shape) = &x.shape else { return Ok(vec![Fact::of_dtype(x.dtype)]) };
    let axes = resized_axes(&cx.view, shape.len())?;
    let scales = cx.optional(if cx.opset < 11 || cx.node.op == "Upsample" { 1 } else { 2 });
    let mut out = shape.clone();
    for axis in &axes {
        out[*axis] = Dim::Unknown;
    }
    let stretched = cx.attributes().string("keep_aspect_ratio_policy", "stretch")? == "stretch";
    if let Some(sizes) = cx.optional(3).and_then(|s| s.content()).filter(|s| s.len() == axes.len() && stretched) {
        axes.iter().zip(sizes).for_each(|(axis, size)| out[*axis] = size);
    }
    if let Some(scales) = scales.and_then(|s| s.constant).filter(|t| t.len() == axes.len()) {
        for (axis, scale) in axes.iter().zip(scales.to_f64()?) {
            out[*axis] = scaled_dim(&shape[*axis], scale as f32)?;
        }
    }
    Ok(vec![Fact::tensor(x.dtype, out)])
}

fn scaled_dim(dim: &Dim, scale: f32) -> Result<Dim, OpError> {
    Ok(match dim {
        Dim::Known(n) => Dim::Known(scaled_size(*n, scale)?),
        other if scale.fract() == 0.0 && (1.0..1e6).contains(&scale) => other.times(&Dim::Known(scale as usize)),
        _ => Dim::Unknown,
    })
}

fn infer_upsample(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    match (cx.attributes().floats("scales")?, cx.shape(0)) {
        (Some(scales), Some(shape)) if scales.len() == shape.len() => {
            let dims = shape.iter().zip(scales).map(|(dim, scale)| scaled_dim(dim, *scale));
            Ok(vec![Fact::tensor(cx.dtype(0), dims.collect::<Result<_, _>>()?)])
        }
        _ => infer_resize(cx),
    }
}

fn eval_resize(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let plan = match cx.opset {
        0..11 => plan(cx, x.shape(), cx.optional(1), None)?,
        _ => plan(cx, x.shape(), cx.optional(2), cx.optional(3))?,
    };
    resample(cx, x, &plan)
}

fn eval_upsample(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let stated = cx.attributes().floats("scales")?.map(Tensor::vector);
    let plan = plan(cx, x.shape(), stated.as_ref().or(cx.optional(1)), None)?;
    resample(cx, x, &plan)
}

fn resample(cx: &Eval, x: &Tensor, plan: &[AxisPlan]) -> Result<Vec<Tensor>, OpError> {
    let sampling = Sampling::of(&cx.view)?;
    let outside = f64::from(cx.attributes().float("extrapolation_value", 0.0)?);
    let mut shape = x.shape().to_vec();
    let mut values = x.to_f64()?;
    for (axis, step) in plan.iter().enumerate() {
        if step.scale == 1.0 && step.output == step.input && step.roi == (0.0, 1.0) {
            continue;
        }
        let taps = if step.output == 0 { Vec::new() } else { sampling.taps(step)? };
        let (outer, inner) = (shape[..axis].iter().product::<usize>(), shape[axis + 1..].iter().product::<usize>());
        shape[axis] = step.output;
        let mut made = filled(&shape, 0.0)?;
        for o in 0..outer {
            for (index, taps) in taps.iter().enumerate() {
                for i in 0..inner {
                    made[(o * step.output + index) * inner + i] = match taps {
                        None => outside,
                        Some(taps) => taps.iter().map(|(at, w)| values[(o * step.input + at) * inner + i] * w).sum(),
                    };
                }
            }
        }
        values = made;
    }
    if let Some((low, high)) = x.dtype().integer_range() {
        values.iter_mut().for_each(|v| *v = v.clamp(low as f64, high as f64));
    }
    Ok(vec![Tensor::from_f64(x.dtype(), &shape, &values)?])
}

/// Two operations for each tap of each output element along the axes that change.
fn resize_flops(shapes: &Shapes) -> u64 {
    let taps = match shapes.attributes.string("mode", "nearest") {
        Ok("linear" | "bilinear") => 2,
        Ok("cubic") => 4,
        _ => return 0,
    };
    let (Some(Some((_, x))), Some(Some((_, y)))) = (shapes.inputs.first(), shapes.outputs.first()) else { return 0 };
    let changed = x.iter().zip(y).filter(|(a, b)| a != b).count() as u64;
    2 * taps * changed * shapes.output_len(0)
}

fn resize_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let shape = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the input must be known"))?;
    let out = infer_resize(cx)?.remove(0).shape.unwrap_or_default();
    let axes = shape.iter().zip(&out).enumerate().map(|(i, (a, b))| match a.same(b) {
        true => Link::Same(Axis::Input(0, i), Axis::Output(0, i)),
        false => Link::Fixed(Axis::Input(0, i), "it is resampled"),
    });
    Ok(axes.collect())
}
