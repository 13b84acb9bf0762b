//! MaxPool, AveragePool, GlobalAveragePool and the gradients of the first two.
//!
//! Planes are independent. Within one, an output row takes from one input row for each tap along the other axes, and
//! each tap along the width is one pass over the row: vector code for any kernel, stride, dilation and padding.

use std::ops::Range;

use updraft_graph::op::window::{Window, WindowSpec};
use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::isa;
use crate::cpu::kernel::{Io, Kernel, Pool};

/// Elements of input and output together below which planes share a tile.
const TILE_ELEMENTS: usize = 16 << 10;

/// Windows over planes, as three axes (depth, height, width) of which the first may be of size 1.
struct Windows {
    input: [usize; 3],
    output: [usize; 3],
    /// For each axis, output and tap the input index, `usize::MAX` in the padding.
    taps: [Vec<Vec<usize>>; 3],
    /// For each tap along the width, the outputs that it serves and the input of the first of them.
    width_taps: Vec<(Range<usize>, usize)>,
    width_stride: usize,
}

impl Windows {
    /// `None` where there is nothing to do, a window that holds only padding, or more than three axes.
    fn new(window: &Window) -> Option<Windows> {
        let rank = window.rank();
        if !(1..=3).contains(&rank) || window.input_len() == 0 || window.output_len() == 0 {
            return None;
        }
        let three = |sizes: &[usize]| {
            let mut all = [1; 3];
            all[3 - rank..].copy_from_slice(sizes);
            all
        };
        let taps: [Vec<Vec<usize>>; 3] = std::array::from_fn(|axis| match axis.checked_sub(3 - rank) {
            None => vec![vec![0]],
            Some(axis) => (0..window.output[axis])
                .map(|output| (0..window.kernel[axis]).filter_map(|tap| window.input_at(axis, output, tap)).collect())
                .collect(),
        });
        if taps.iter().flatten().any(Vec::is_empty) {
            return None;
        }
        let wide = rank - 1;
        let width_taps = (0..window.kernel[wide])
            .filter_map(|tap| {
                let inside = |output: &usize| window.input_at(wide, *output, tap).is_some();
                let first = (0..window.output[wide]).find(inside)?;
                let last = (first..window.output[wide]).rfind(inside)?;
                Some((first..last + 1, window.input_at(wide, first, tap)?))
            })
            .collect();
        let width_stride = window.strides[wide];
        Some(Windows { input: three(&window.input), output: three(&window.output), taps, width_taps, width_stride })
    }

    fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    fn output_len(&self) -> usize {
        self.output.iter().product()
    }

    fn tile_planes(&self) -> usize {
        (TILE_ELEMENTS / (self.input_len() + self.output_len())).max(1)
    }

    /// Calls `visit` with each output row and each input row that its windows touch, in scan order, as positions of
    /// their first elements.
    #[inline(always)]
    fn for_each_row(&self, mut visit: impl FnMut(usize, &mut dyn Iterator<Item = usize>)) {
        let [_, height, width] = self.input;
        let mut output = 0;
        for depths in &self.taps[0] {
            for heights in &self.taps[1] {
                let mut rows = depths.iter().flat_map(|d| heights.iter().map(move |h| (d * height + h) * width));
                visit(output, &mut rows);
                output += self.output[2];
            }
        }
    }
}

/// Calls `f` with each of `to` and every `stride`-th of `from`, which holds just as many.
#[inline(always)]
fn zip_strided<T>(to: &mut [T], from: &[f32], stride: usize, mut f: impl FnMut(usize, &mut T, f32)) {
    match stride {
        1 => to.iter_mut().zip(from).enumerate().for_each(|(i, (to, from))| f(i, to, *from)),
        // A constant stride becomes shuffles.
        2 => {
            let pairs = from.len() / 2;
            let (head, tail) = to.split_at_mut(pairs);
            for (i, (to, pair)) in head.iter_mut().zip(from.chunks_exact(2)).enumerate() {
                f(i, to, pair[0]);
            }
            tail.iter_mut().zip(from.last()).for_each(|(to, from)| f(pairs, to, *from));
        }
        _ => to.iter_mut().zip(from.iter().step_by(stride)).enumerate().for_each(|(i, (to, from))| f(i, to, *from)),
    }
}

/// The elements that `count` outputs read of a row from `first` on.
fn strided_row(row: &[f32], first: usize, count: usize, stride: usize) -> &[f32] {
    &row[first..first + (count - 1) * stride + 1]
}

isa::dispatch!(fn max_plane(windows: &Windows, x: &[f32], y: &mut [f32]) = max_plane_body);

#[inline(always)]
fn max_plane_body<const FMA: bool>(windows: &Windows, x: &[f32], y: &mut [f32]) {
    let ([_, _, input_width], [_, _, width]) = (windows.input, windows.output);
    windows.for_each_row(|output, rows| {
        let y = &mut y[output..output + width];
        y.fill(f32::NEG_INFINITY);
        for row in rows {
            let row = &x[row..row + input_width];
            for (outputs, first) in &windows.width_taps {
                let row = strided_row(row, *first, outputs.len(), windows.width_stride);
                // Not-a-number counts as larger than any number.
                zip_strided(&mut y[outputs.clone()], row, windows.width_stride, |_, best, x| {
                    *best = if x > *best || x.is_nan() { x } else { *best };
                });
            }
        }
    });
}

isa::dispatch! {
    /// `best` is scratch: for each output of a row the maximum and its position.
    fn max_gradient_plane(windows: &Windows, x: &[f32], dy: &[f32], best: &mut [(f32, u32)], dx: &mut [f32])
        = max_gradient_plane_body
}

#[inline(always)]
fn max_gradient_plane_body<const FMA: bool>(
    windows: &Windows,
    x: &[f32],
    dy: &[f32],
    best: &mut [(f32, u32)],
    dx: &mut [f32],
) {
    let ([_, _, input_width], [_, _, width]) = (windows.input, windows.output);
    dx.fill(0.0);
    windows.for_each_row(|output, rows| {
        let mut is_first = true;
        for start in rows {
            if is_first {
                // The first element of a window, which keeps its place if all are minus infinity.
                for (best, taps) in best.iter_mut().zip(&windows.taps[2]) {
                    *best = (f32::NEG_INFINITY, (start + taps[0]) as u32);
                }
                is_first = false;
            }
            let row = &x[start..start + input_width];
            for (outputs, first) in &windows.width_taps {
                let row = strided_row(row, *first, outputs.len(), windows.width_stride);
                zip_strided(&mut best[outputs.clone()], row, windows.width_stride, |i, best, x| {
                    let position = (start + first + i * windows.width_stride) as u32;
                    let is_larger = x > best.0 || (x.is_nan() && !best.0.is_nan());
                    *best = if is_larger { (x, position) } else { *best };
                });
            }
        }
        for (dy, best) in dy[output..output + width].iter().zip(best.iter()) {
            dx[best.1 as usize] += dy;
        }
    });
}

isa::dispatch!(fn average_plane(windows: &Windows, counts: &[f32], x: &[f32], y: &mut [f32]) = average_plane_body);

#[inline(always)]
fn average_plane_body<const FMA: bool>(windows: &Windows, counts: &[f32], x: &[f32], y: &mut [f32]) {
    let ([_, _, input_width], [_, _, width]) = (windows.input, windows.output);
    windows.for_each_row(|output, rows| {
        let y = &mut y[output..output + width];
        y.fill(0.0);
        for row in rows {
            let row = &x[row..row + input_width];
            for (outputs, first) in &windows.width_taps {
                let row = strided_row(row, *first, outputs.len(), windows.width_stride);
                zip_strided(&mut y[outputs.clone()], row, windows.width_stride, |_, sum, x| *sum += x);
            }
        }
        y.iter_mut().zip(&counts[output..output + width]).for_each(|(y, count)| *y /= count);
    });
}

isa::dispatch! {
    fn average_gradient_plane(windows: &Windows, counts: &[f32], dy: &[f32], dx: &mut [f32])
        = average_gradient_plane_body
}

#[inline(always)]
fn average_gradient_plane_body<const FMA: bool>(windows: &Windows, counts: &[f32], dy: &[f32], dx: &mut [f32]) {
    let ([_, _, input_width], [_, _, width]) = (windows.input, windows.output);
    dx.fill(0.0);
    windows.for_each_row(|output, rows| {
        let (dy, counts) = (&dy[output..output + width], &counts[output..output + width]);
        for row in rows {
            let row = &mut dx[row..row + input_width];
            for (outputs, first) in &windows.width_taps {
                let shares = dy[outputs.clone()].iter().zip(&counts[outputs.clone()]);
                let row = row[*first..].iter_mut().step_by(windows.width_stride);
                row.zip(shares).for_each(|(dx, (dy, count))| *dx += dy / count);
            }
        }
    });
}

isa::dispatch!(fn average(x: &[f32]) -> f32 = average_body);

#[inline(always)]
fn average_body<const FMA: bool>(x: &[f32]) -> f32 {
    let mut partial = [0.0f32; 32];
    let chunks = x.chunks_exact(32);
    for (sum, x) in partial.iter_mut().zip(chunks.remainder()) {
        *sum = *x;
    }
    for chunk in chunks {
        for lane in 0..32 {
            partial[lane] += chunk[lane];
        }
    }
    partial.iter().sum::<f32>() / x.len() as f32
}

/// The windows of a pool over an input of a shape, for f32 with up to three spatial axes.
fn windows(cx: &Build, x: &[usize]) -> Result<Option<(Window, Windows)>, OpError> {
    if cx.dtype(0) != Some(DType::F32) || x.len() < 3 || x.contains(&0) {
        return Ok(None);
    }
    let window = WindowSpec::of_pool(cx.attributes())?.resolve(&x[2..])?;
    let windows = Windows::new(&window);
    // Positions within a plane are kept as 32 bits.
    Ok(windows.filter(|w| u32::try_from(w.input_len()).is_ok()).map(|windows| (window, windows)))
}

/// How many elements each window averages over.
fn counts(cx: &Build, window: &Window) -> Result<Vec<f32>, OpError> {
    let counts = window.averaged_counts(cx.attributes().flag("count_include_pad", false)?);
    Ok(counts.into_iter().map(|count| count as f32).collect())
}

struct MaxPool(Windows);

/// MaxPool of f32 without indices.
pub(crate) fn max(cx: &mut Build) -> Result<Option<Built>, OpError> {
    if cx.outputs.iter().skip(1).any(Option::is_some) {
        return Ok(None);
    }
    let windows = windows(cx, cx.shape(0))?;
    Ok(windows.map(|(_, windows)| Built::whole(MaxPool(windows))))
}

impl Kernel for MaxPool {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let windows = &self.0;
        let (input_len, output_len, planes) = (windows.input_len(), windows.output_len(), windows.tile_planes());
        let x = io.input::<f32>(0);
        pool.for_each_chunk(io.output::<f32>(0), planes * output_len, |tile, y| {
            let x = x[tile * planes * input_len..].chunks_exact(input_len);
            y.chunks_exact_mut(output_len).zip(x).for_each(|(y, x)| max_plane(windows, x, y));
        });
        Ok(())
    }
}

struct MaxPoolGradient(Windows);

/// MaxPoolGradient of f32.
pub(crate) fn max_gradient(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let Some((_, windows)) = windows(cx, cx.shape(0))? else { return Ok(None) };
    expect_output(cx.shape(1), cx.shape(0), &windows)?;
    Ok(Some(Built::whole(MaxPoolGradient(windows))))
}

/// Whether a gradient has as many elements as the pool's output.
fn expect_output(dy: &[usize], x: &[usize], windows: &Windows) -> Result<(), OpError> {
    let expected = x[0] * x[1] * windows.output_len();
    if dy.iter().product::<usize>() == expected {
        return Ok(());
    }
    Err(OpError::shape(format!("the gradient of the output has shape {dy:?}, expected {expected} elements")))
}

impl Kernel for MaxPoolGradient {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let windows = &self.0;
        let (input_len, output_len, planes) = (windows.input_len(), windows.output_len(), windows.tile_planes());
        let (x, dy) = (io.input::<f32>(0), io.input::<f32>(1));
        pool.for_each_chunk(io.output::<f32>(0), planes * input_len, |tile, dx| {
            let mut best = vec![(0.0, 0); windows.output[2]];
            let x = x[tile * planes * input_len..].chunks_exact(input_len);
            let dy = dy[tile * planes * output_len..].chunks_exact(output_len);
            for ((dx, x), dy) in dx.chunks_exact_mut(input_len).zip(x).zip(dy) {
                max_gradient_plane(windows, x, dy, &mut best, dx);
            }
        });
        Ok(())
    }
}

struct AveragePool {
    windows: Windows,
    counts: Vec<f32>,
}

/// AveragePool of f32.
pub(crate) fn average_pool(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let Some((window, windows)) = windows(cx, cx.shape(0))? else { return Ok(None) };
    let counts = counts(cx, &window)?;
    Ok(Some(Built::whole(AveragePool { windows, counts })))
}

impl Kernel for AveragePool {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let AveragePool { windows, counts } = self;
        let (input_len, output_len, planes) = (windows.input_len(), windows.output_len(), windows.tile_planes());
        let x = io.input::<f32>(0);
        pool.for_each_chunk(io.output::<f32>(0), planes * output_len, |tile, y| {
            let x = x[tile * planes * input_len..].chunks_exact(input_len);
            y.chunks_exact_mut(output_len).zip(x).for_each(|(y, x)| average_plane(windows, counts, x, y));
        });
        Ok(())
    }
}

struct AveragePoolGradient {
    windows: Windows,
    counts: Vec<f32>,
}

/// AveragePoolGradient of f32.
pub(crate) fn average_gradient(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let x = cx.output_shape(0).to_vec();
    let Some((window, windows)) = windows(cx, &x)? else { return Ok(None) };
    expect_output(cx.shape(0), &x, &windows)?;
    let counts = counts(cx, &window)?;
    Ok(Some(Built::whole(AveragePoolGradient { windows, counts })))
}

impl Kernel for AveragePoolGradient {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let AveragePoolGradient { windows, counts } = self;
        let (input_len, output_len, planes) = (windows.input_len(), windows.output_len(), windows.tile_planes());
        let dy = io.input::<f32>(0);
        pool.for_each_chunk(io.output::<f32>(0), planes * input_len, |tile, dx| {
            let dy = dy[tile * planes * output_len..].chunks_exact(output_len);
            dx.chunks_exact_mut(input_len).zip(dy).for_each(|(dx, dy)| average_gradient_plane(windows, counts, dy, dx));
        });
        Ok(())
    }
}

struct GlobalAveragePool {
    plane_len: usize,
}

/// GlobalAveragePool of f32.
pub(crate) fn global_average(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let x = cx.shape(0);
    if !cx.all_are(DType::F32) || x.len() < 3 || x.contains(&0) {
        return Ok(None);
    }
    Ok(Some(Built::whole(GlobalAveragePool { plane_len: x[2..].iter().product() })))
}

impl Kernel for GlobalAveragePool {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let len = self.plane_len;
        let planes = (TILE_ELEMENTS / len).max(1);
        let x = io.input::<f32>(0);
        pool.for_each_chunk(io.output::<f32>(0), planes, |tile, y| {
            let x = x[tile * planes * len..].chunks_exact(len);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = average(x));
        });
        Ok(())
    }
}
