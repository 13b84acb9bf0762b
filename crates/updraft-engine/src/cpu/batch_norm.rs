//! Batch normalisation: training, its gradient, and inference.
//!
//! A tile is a channel. Its planes are read from memory once for the statistics and, small enough to stay in cache in
//! most networks, once more for the result. Variances are sums of squares about each plane's own mean, joined in f64
//! (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979), so a
//! large mean costs no digits.

use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::isa::{self, multiply_add};
use crate::cpu::kernel::{Io, Kernel, Pool, Shared};

/// `[N, C, plane...]`, seen as examples, channels, and elements of a plane.
#[derive(Debug, Clone, Copy)]
struct Planes {
    batch: usize,
    channels: usize,
    len: usize,
}

impl Planes {
    fn of(shape: &[usize]) -> Option<Planes> {
        let [batch, channels, plane @ ..] = shape else { return None };
        let planes = Planes { batch: *batch, channels: *channels, len: plane.iter().product() };
        (planes.batch > 0 && planes.channels > 0 && planes.len > 0).then_some(planes)
    }

    /// Where the planes of a channel begin.
    fn starts(self, channel: usize) -> impl Iterator<Item = usize> {
        (0..self.batch).map(move |image| (image * self.channels + channel) * self.len)
    }

    fn count(self) -> f64 {
        (self.batch * self.len) as f64
    }
}

/// Whether the inputs from `first` on are vectors of one number for each channel.
fn are_per_channel(cx: &Build, first: usize, count: usize, channels: usize) -> Result<(), OpError> {
    for index in first..first + count {
        if cx.shape(index) != [channels] {
            let shape = cx.shape(index);
            return Err(OpError::shape(format!("input {index} has shape {shape:?}, expected [{channels}]")));
        }
    }
    Ok(())
}

struct Training {
    planes: Planes,
    epsilon: f64,
    momentum: f64,
}

/// BatchNormalizationTraining of f32.
pub(crate) fn training(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let (true, Some(planes)) = (cx.all_are(DType::F32), Planes::of(cx.shape(0))) else { return Ok(None) };
    are_per_channel(cx, 1, 4, planes.channels)?;
    let epsilon = f64::from(cx.attributes().float("epsilon", 1e-5)?);
    let momentum = f64::from(cx.attributes().float("momentum", 0.9)?);
    Ok(Some(Built::whole(Training { planes, epsilon, momentum })))
}

impl Kernel for Training {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let Training { planes, epsilon, momentum } = *self;
        let [x, scale, bias, running_mean, running_variance] = std::array::from_fn(|i| io.input::<f32>(i));
        let y = Shared::new(io.output::<f32>(0));
        let statistics: [_; 4] = std::array::from_fn(|i| Shared::new(io.output::<f32>(i + 1)));
        pool.for_each(planes.channels, |channel| {
            let (mean, variance) = statistics_of(planes, channel, x);
            let inv_std = 1.0 / (variance + epsilon).sqrt();
            let blend = |running: f32, batch: f64| f64::from(running) * momentum + batch * (1.0 - momentum);
            let values =
                [blend(running_mean[channel], mean), blend(running_variance[channel], variance), mean, inv_std];
            for (output, value) in statistics.iter().zip(values) {
                if !output.is_empty() {
                    // SAFETY: a tile writes its own channel.
                    let to = unsafe { output.range(channel..channel + 1) };
                    to[0] = value as f32;
                }
            }
            let factor = inv_std * f64::from(scale[channel]);
            // What the mean loses as f32 goes into the bias.
            let rounded = mean as f32;
            let bias = (f64::from(bias[channel]) - (mean - f64::from(rounded)) * factor) as f32;
            for start in planes.starts(channel) {
                // SAFETY: a tile writes the planes of its own channel, one after the other.
                let y = unsafe { y.range(start..start + planes.len) };
                normalize(&x[start..start + planes.len], rounded, factor as f32, bias, y);
            }
        });
        Ok(())
    }
}

/// Mean and population variance of a channel.
fn statistics_of(planes: Planes, channel: usize, x: &[f32]) -> (f64, f64) {
    let len = planes.len as f64;
    let (mut count, mut mean, mut squares) = (0.0, 0.0, 0.0);
    for start in planes.starts(channel) {
        let plane = &x[start..start + planes.len];
        let plane_mean = f64::from(sum(plane)) / len;
        // The squares are about the rounded mean; what that adds is taken off.
        let rounded = plane_mean as f32;
        let plane_squares =
            f64::from(sum_of_squares_about(plane, rounded)) - len * (plane_mean - f64::from(rounded)).powi(2);
        let distance = plane_mean - mean;
        let joined = count + len;
        squares += plane_squares + distance * distance * count * len / joined;
        mean += distance * len / joined;
        count = joined;
    }
    (mean, (squares / count).max(0.0))
}

struct Gradient {
    planes: Planes,
}

/// BatchNormalizationGradient of f32.
pub(crate) fn gradient(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let (true, Some(planes)) = (cx.all_are(DType::F32), Planes::of(cx.shape(1))) else { return Ok(None) };
    if cx.shape(0) != cx.shape(1) {
        let (dy, x) = (cx.shape(0), cx.shape(1));
        return Err(OpError::shape(format!("the gradient of the output has shape {dy:?}, expected {x:?}")));
    }
    are_per_channel(cx, 2, 3, planes.channels)?;
    Ok(Some(Built::whole(Gradient { planes })))
}

impl Kernel for Gradient {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let planes = self.planes;
        let [dy, x, scale, mean, inv_std] = std::array::from_fn(|i| io.input::<f32>(i));
        let [dx, dscale, dbias] = std::array::from_fn(|i| Shared::new(io.output::<f32>(i)));
        pool.for_each(planes.channels, |channel| {
            let (mean, inv_std) = (mean[channel], f64::from(inv_std[channel]));
            let (mut errors, mut products) = (0.0, 0.0);
            for start in planes.starts(channel) {
                let plane = start..start + planes.len;
                let [error, product] = sums_of_errors(&dy[plane.clone()], &x[plane], mean);
                errors += f64::from(error);
                products += f64::from(product);
            }
            for (output, value) in [(&dscale, products * inv_std), (&dbias, errors)] {
                if !output.is_empty() {
                    // SAFETY: a tile writes its own channel.
                    let to = unsafe { output.range(channel..channel + 1) };
                    to[0] = value as f32;
                }
            }
            if dx.is_empty() {
                return;
            }
            // dx = factor (dy - mean of dy - (x - mean) slope)
            let factor = (f64::from(scale[channel]) * inv_std) as f32;
            let slope = (products * inv_std * inv_std / planes.count()) as f32;
            let shift = (errors / planes.count()) as f32;
            for start in planes.starts(channel) {
                let plane = start..start + planes.len;
                // SAFETY: a tile writes the planes of its own channel, one after the other.
                let dx = unsafe { dx.range(plane.clone()) };
                project(&dy[plane.clone()], &x[plane], [mean, shift, slope, factor], dx);
            }
        });
        Ok(())
    }
}

struct Inference {
    planes: Planes,
    epsilon: f64,
}

/// BatchNormalization of f32 with given statistics.
pub(crate) fn inference(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let is_training = cx.outputs.len() > 1 || cx.attributes().flag("training_mode", false)?;
    let (true, false, Some(planes)) = (cx.all_are(DType::F32), is_training, Planes::of(cx.shape(0))) else {
        return Ok(None);
    };
    are_per_channel(cx, 1, 4, planes.channels)?;
    Ok(Some(Built::whole(Inference { planes, epsilon: f64::from(cx.attributes().float("epsilon", 1e-5)?) })))
}

impl Kernel for Inference {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let [x, scale, bias, mean, variance] = std::array::from_fn(|i| io.input::<f32>(i));
        let Planes { channels, len, .. } = self.planes;
        pool.for_each_chunk(io.output::<f32>(0), channels * len, |image, y| {
            let x = &x[image * channels * len..][..channels * len];
            for (channel, (x, y)) in x.chunks_exact(len).zip(y.chunks_exact_mut(len)).enumerate() {
                let inv_std = 1.0 / (f64::from(variance[channel]) + self.epsilon).sqrt();
                normalize(x, mean[channel], (inv_std * f64::from(scale[channel])) as f32, bias[channel], y);
            }
        });
        Ok(())
    }
}

/// Partial sums of a reduction: enough to fill registers and hide the latency of an addition.
const PARTIAL: usize = 64;

/// Sums `N` terms of every element, in one order whatever the instruction set: by position modulo [`PARTIAL`], then
/// by halves.
#[inline(always)]
fn reduce<const N: usize, const K: usize>(
    inputs: [&[f32]; K],
    add: impl Fn([f32; K], [f32; N]) -> [f32; N],
) -> [f32; N] {
    let len = inputs[0].len();
    let mut partial = [[0.0f32; PARTIAL]; N];
    let whole = len / PARTIAL * PARTIAL;
    let mut start = 0;
    while start < whole {
        let chunks: [&[f32; PARTIAL]; K] =
            std::array::from_fn(|k| inputs[k][start..start + PARTIAL].first_chunk().unwrap_or(&[0.0; PARTIAL]));
        for lane in 0..PARTIAL {
            let sums = add(std::array::from_fn(|k| chunks[k][lane]), std::array::from_fn(|n| partial[n][lane]));
            for n in 0..N {
                partial[n][lane] = sums[n];
            }
        }
        start += PARTIAL;
    }
    for lane in 0..len - whole {
        let sums = add(std::array::from_fn(|k| inputs[k][whole + lane]), std::array::from_fn(|n| partial[n][lane]));
        for n in 0..N {
            partial[n][lane] = sums[n];
        }
    }
    partial.map(|mut partial| {
        let mut width = PARTIAL / 2;
        while width > 0 {
            for lane in 0..width {
                partial[lane] += partial[lane + width];
            }
            width /= 2;
        }
        partial[0]
    })
}

isa::dispatch!(fn sum(x: &[f32]) -> f32 = sum_body);

#[inline(always)]
fn sum_body<const FMA: bool>(x: &[f32]) -> f32 {
    let [sum] = reduce([x], |[x], [sum]| [sum + x]);
    sum
}

isa::dispatch!(fn sum_of_squares_about(x: &[f32], center: f32) -> f32 = sum_of_squares_about_body);

#[inline(always)]
fn sum_of_squares_about_body<const FMA: bool>(x: &[f32], center: f32) -> f32 {
    let [sum] = reduce([x], |[x], [sum]| [multiply_add::<FMA>(x - center, x - center, sum)]);
    sum
}

isa::dispatch! {
    /// The sums of `dy` and of `dy (x - mean)`.
    fn sums_of_errors(dy: &[f32], x: &[f32], mean: f32) -> [f32; 2] = sums_of_errors_body
}

#[inline(always)]
fn sums_of_errors_body<const FMA: bool>(dy: &[f32], x: &[f32], mean: f32) -> [f32; 2] {
    reduce([dy, x], |[dy, x], [errors, products]| [errors + dy, multiply_add::<FMA>(dy, x - mean, products)])
}

isa::dispatch! {
    /// `y = (x - mean) factor + bias`: as exact for a large mean as for none.
    fn normalize(x: &[f32], mean: f32, factor: f32, bias: f32, y: &mut [f32]) = normalize_body
}

#[inline(always)]
fn normalize_body<const FMA: bool>(x: &[f32], mean: f32, factor: f32, bias: f32, y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = multiply_add::<FMA>(x - mean, factor, bias);
    }
}

isa::dispatch! {
    /// `dx = factor (dy - shift - (x - mean) slope)`.
    fn project(dy: &[f32], x: &[f32], constants: [f32; 4], dx: &mut [f32]) = project_body
}

#[inline(always)]
fn project_body<const FMA: bool>(dy: &[f32], x: &[f32], [mean, shift, slope, factor]: [f32; 4], dx: &mut [f32]) {
    for ((dx, dy), x) in dx.iter_mut().zip(dy).zip(x) {
        *dx = multiply_add::<FMA>(mean - x, slope, dy - shift) * factor;
    }
}
