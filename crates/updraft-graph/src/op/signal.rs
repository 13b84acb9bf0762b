//! Spectra: DFT and STFT by their sums, and MelWeightMatrix.
//!
//! Complex numbers are a last axis of two; real ones, of one.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::op::cast::dtype_of;
use crate::op::{Arity, Axis, Eval, Fact, Infer, Link, Op, OpError, OpView, Shapes, filled, resolve_axis};
use crate::tensor::Tensor;

const ANALYSIS: &str = "spectra are made before a network, not trained through";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("DFT", &[17, 20], Arity::range(1, 3), infer_dft, eval_dft)
        .no_gradient(ANALYSIS)
        .flops(dft_flops)
        .channels(dft_links),
    Op::onnx("STFT", &[17], Arity::range(2, 4), infer_stft, eval_stft)
        .no_gradient(ANALYSIS)
        .flops(stft_flops)
        .no_channels("frames overlap along the signal"),
    Op::onnx("MelWeightMatrix", &[17], Arity::exact(5), infer_mel, eval_mel)
        .no_gradient("it is constant")
        .flops(mel_flops)
        .no_channels("its axes are made here"),
];

/// A number from an operand of one element.
fn number(tensor: &Tensor, what: &str) -> Result<f64, OpError> {
    match tensor.to_f64()?.as_slice() {
        [one] => Ok(*one),
        _ => Err(OpError::shape(format!("{what} of shape {:?}, expected one element", tensor.shape()))),
    }
}

fn count(tensor: &Tensor, what: &str) -> Result<usize, OpError> {
    let value = number(tensor, what)?;
    // Sizes past 2^40 do not fit in memory.
    if (1.0..=f64::from(1u32 << 30) * 1024.0).contains(&value) && value.fract() == 0.0 {
        return Ok(value as usize);
    }
    Err(OpError::value(format!("{what} is {value}, expected a positive integer")))
}

/// The axis: an attribute before opset 20, an input since.
fn dft_axis(view: &OpView, input: Option<i64>, rank: usize) -> Result<usize, OpError> {
    let axis = if view.opset < 20 { view.attributes().int("axis", 1)? } else { input.unwrap_or(-2) };
    let axis = resolve_axis(axis, rank)?;
    if axis + 1 == rank {
        return Err(OpError::value("the last axis holds real and imaginary parts"));
    }
    Ok(axis)
}

fn infer_dft(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "signal")?;
    let Some(shape) = &x.shape else { return Ok(vec![Fact::of_dtype(x.dtype)]) };
    let stated = match cx.optional(2) {
        Some(axis) => match axis.constant_ints()?.as_deref() {
            Some([axis]) => Some(*axis),
            _ => return Ok(vec![Fact::tensor(x.dtype, vec![Dim::Unknown; shape.len()])]),
        },
        None => None,
    };
    let axis = dft_axis(&cx.view, stated, shape.len())?;
    let (inverse, onesided) = (cx.attributes().flag("inverse", false)?, cx.attributes().flag("onesided", false)?);
    let length = match cx.optional(1) {
        Some(length) => length.content().and_then(|l| l.first().cloned()).unwrap_or(Dim::Unknown),
        None if inverse && onesided => shape[axis].offset(-1).times(&Dim::Known(2)),
        None => shape[axis].clone(),
    };
    let mut out = shape.clone();
    out[axis] = if onesided && !inverse { length.divide_floor(2).offset(1) } else { length };
    out[shape.len() - 1] = Dim::Known(if onesided && inverse { 1 } else { 2 });
    Ok(vec![Fact::tensor(x.dtype, out)])
}

/// `sum over n of x[n] exp(sign 2 pi i k n / length)` for the first `count` frequencies.
fn transform(x: &[(f64, f64)], length: usize, count: usize, sign: f64) -> Vec<(f64, f64)> {
    (0..count)
        .map(|k| {
            x.iter().take(length).enumerate().fold((0.0, 0.0), |(re, im), (n, (a, b))| {
                // The product modulo the length keeps the angle small, hence exact.
                let turn = (k as u128 * n as u128 % length as u128) as f64 / length as f64;
                let (sin, cos) = (sign * std::f64::consts::TAU * turn).sin_cos();
                (re + a * cos - b * sin, im + a * sin + b * cos)
            })
        })
        .collect()
}

fn eval_dft(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let stated = cx.optional(2).map(|axis| number(axis, "the axis").map(|v| v as i64)).transpose()?;
    let axis = dft_axis(&cx.view, stated, x.rank())?;
    let parts = x.shape()[x.rank() - 1];
    if parts != 1 && parts != 2 {
        return Err(OpError::shape(format!("a signal of shape {:?}, expected a last axis of 1 or 2", x.shape())));
    }
    let (inverse, onesided) = (cx.attributes().flag("inverse", false)?, cx.attributes().flag("onesided", false)?);
    let given = x.shape()[axis];
    let length = match cx.optional(1) {
        Some(length) => count(length, "dft_length")?,
        None if inverse && onesided => 2 * given.saturating_sub(1),
        None => given,
    };
    if length == 0 {
        return Err(OpError::shape(format!("a transform of length 0 of a signal of shape {:?}", x.shape())));
    }
    let bins = if onesided && !inverse { length / 2 + 1 } else { length };
    let parts_made = if onesided && inverse { 1 } else { 2 };
    let mut shape = x.shape().to_vec();
    shape[axis] = bins;
    shape[x.rank() - 1] = parts_made;
    let (outer, inner) =
        (shape[..axis].iter().product::<usize>(), x.shape()[axis + 1..x.rank() - 1].iter().product::<usize>());
    let values = x.to_f64()?;
    let mut out = filled(&shape, 0.0)?;
    for o in 0..outer {
        for i in 0..inner {
            let element = |n: usize| {
                let at = ((o * given + n) * inner + i) * parts;
                (values[at], if parts == 2 { values[at + 1] } else { 0.0 })
            };
            let mut line: Vec<(f64, f64)> = (0..given.min(length)).map(element).collect();
            if inverse && onesided {
                // The half that is not given is the conjugate of the one that is; the ends are real.
                line.truncate(length / 2 + 1);
                line.resize(length, (0.0, 0.0));
                for k in length / 2 + 1..length {
                    line[k] = (line[length - k].0, -line[length - k].1);
                }
                line[0].1 = 0.0;
                if length % 2 == 0 {
                    line[length / 2].1 = 0.0;
                }
            }
            let made = transform(&line, length, bins, if inverse { 1.0 } else { -1.0 });
            let unit = if inverse { 1.0 / length as f64 } else { 1.0 };
            for (k, (re, im)) in made.into_iter().enumerate() {
                let at = ((o * bins + k) * inner + i) * parts_made;
                out[at] = re * unit;
                if parts_made == 2 {
                    out[at + 1] = im * unit;
                }
            }
        }
    }
    Ok(vec![Tensor::from_f64(x.dtype(), &shape, &out)?])
}

fn infer_stft(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "signal [N, length, 1 or 2]")?;
    let batch = x.shape.as_ref().and_then(|s| s.first().cloned()).unwrap_or(Dim::Unknown);
    Ok(vec![Fact::tensor(x.dtype, vec![batch, Dim::Unknown, Dim::Unknown, Dim::Known(2)])])
}

/// The transform of each frame of the signal, weighed by the window.
fn eval_stft(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let [batch, length, parts @ (1 | 2)] = *x.shape() else {
        return Err(OpError::shape(format!("a signal of shape {:?}, expected [N, length, 1 or 2]", x.shape())));
    };
    let step = count(cx.input(1)?, "frame_step")?;
    let window = cx.optional(2).map(Tensor::to_f64).transpose()?;
    let frame = match (cx.optional(3), &window) {
        (Some(frame), _) => count(frame, "frame_length")?,
        (None, Some(window)) => window.len(),
        (None, None) => length,
    };
    let window = window.unwrap_or_else(|| vec![1.0; frame.min(length)]);
    if frame == 0 || frame > length || window.len() != frame {
        let message = format!("frames of {frame} with a window of {} in a signal of {length}", window.len());
        return Err(OpError::shape(message));
    }
    let bins = if cx.attributes().flag("onesided", true)? { frame / 2 + 1 } else { frame };
    let frames = (length - frame) / step + 1;
    let values = x.to_f64()?;
    let shape = [batch, frames, bins, 2];
    let mut out = filled(&shape, 0.0)?;
    out.clear();
    for b in 0..batch {
        for f in 0..frames {
            let element = |n: usize| {
                let at = (b * length + f * step + n) * parts;
                (values[at] * window[n], if parts == 2 { values[at + 1] * window[n] } else { 0.0 })
            };
            let line: Vec<(f64, f64)> = (0..frame).map(element).collect();
            out.extend(transform(&line, frame, bins, -1.0).into_iter().flat_map(|(re, im)| [re, im]));
        }
    }
    Ok(vec![Tensor::from_f64(x.dtype(), &shape, &out)?])
}

fn mel_dtype(view: &OpView) -> Result<DType, OpError> {
    dtype_of("output_datatype", view.attributes().int("output_datatype", 1)?)
}

fn infer_mel(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let size = |index: usize| cx.optional(index).and_then(|f| f.content()).and_then(|c| c.first().cloned());
    let bins = size(1).map_or(Dim::Unknown, |length| length.divide_floor(2).offset(1));
    Ok(vec![Fact::tensor(Some(mel_dtype(&cx.view)?), vec![bins, size(0).unwrap_or(Dim::Unknown)])])
}

/// Triangles over the bins of a spectrum, evenly spaced on the mel scale, `2595 log10(1 + f / 700)`.
fn eval_mel(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let mels = count(cx.input(0)?, "num_mel_bins")?;
    let length = count(cx.input(1)?, "dft_length")?;
    let rate = count(cx.input(2)?, "sample_rate")? as f64;
    let (low, high) = (number(cx.input(3)?, "lower_edge_hertz")?, number(cx.input(4)?, "upper_edge_hertz")?);
    let mel = |hertz: f64| 2595.0 * (hertz / 700.0).ln_1p() / std::f64::consts::LN_10;
    let bins = length / 2 + 1;
    let step = (mel(high) - mel(low)) / (mels as f64 + 2.0);
    let edge = |i: usize| {
        let hertz = 700.0 * ((i as f64 * step + mel(low)) / 2595.0 * std::f64::consts::LN_10).exp_m1();
        ((length as f64 + 1.0) * hertz / rate).floor()
    };
    let mut out = filled(&[bins, mels], 0.0)?;
    for m in 0..mels {
        let [left, center, right] = [edge(m), edge(m + 1), edge(m + 2)];
        if !(0.0..=right).contains(&left) || right > bins as f64 || center >= bins as f64 {
            return Err(OpError::value(format!("edges of {low} and {high} Hz for {bins} bins at {rate} Hz")));
        }
        let [left, center, right] = [left, center, right].map(|v| v as usize);
        if center == left {
            out[center * mels + m] = 1.0;
        }
        for j in left..=center {
            if center > left {
                out[j * mels + m] = (j - left) as f64 / (center - left) as f64;
            }
        }
        for j in center..right {
            out[j * mels + m] = (right - j) as f64 / (right - center) as f64;
        }
    }
    Ok(vec![Tensor::from_f64(mel_dtype(&cx.view)?, &[bins, mels], &out)?])
}

/// `5 n log2 n` operations for each line, as for a fast transform.
fn dft_flops(shapes: &Shapes) -> u64 {
    let points = shapes.output_len(0) / 2;
    5 * points * u64::from(64 - points.leading_zeros())
}

fn stft_flops(shapes: &Shapes) -> u64 {
    dft_flops(shapes)
}

fn mel_flops(shapes: &Shapes) -> u64 {
    shapes.output_len(0)
}

fn dft_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let (x, y) = (cx.shape(0), infer_dft(cx)?.remove(0).shape);
    let (Some(x), Some(y)) = (x, y) else { return Err(OpError::shape("the rank of the signal must be known")) };
    let axes = x.iter().zip(&y).enumerate().map(|(i, (a, b))| match a.same(b) {
        true => Link::Same(Axis::Input(0, i), Axis::Output(0, i)),
        false => Link::Fixed(Axis::Input(0, i), "it is transformed"),
    });
    Ok(axes.collect())
}
