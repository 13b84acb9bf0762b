//! Operators along rows that are contiguous: softmax and layer normalisation, with their gradients.
//!
//! A row is read from memory once, and stays in the first-level cache for the passes after. Sums of floats are kept in
//! as many parts as a vector has lanes, so that compilers vectorise them; that order is fixed, whatever the machine.

use std::ops::Range;

use updraft_graph::op::resolve_axis;
use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::isa::{dispatch, multiply_add};
use crate::cpu::kernel::{Io, Kernel, Pool, Shared, Tile, TileKernel};
use crate::cpu::math;

/// Parts in which sums are kept.
const LANES: usize = 16;

/// The sum of `f` over a row.
#[inline(always)]
fn sum(row: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    sum_pairs(row, row, |x, _| f(x))
}

/// The sum of `f` over pairs of elements of two rows.
#[inline(always)]
fn sum_pairs(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut parts = [0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_blocks.remainder(), b_blocks.remainder());
    for (x, y) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            parts[lane] += f(x[lane], y[lane]);
        }
    }
    for (lane, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        parts[lane] += f(*x, *y);
    }
    parts.iter().sum()
}

#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    let mut parts = [f32::NEG_INFINITY; LANES];
    let blocks = row.chunks_exact(LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for lane in 0..LANES {
            parts[lane] = if block[lane] > parts[lane] { block[lane] } else { parts[lane] };
        }
    }
    let all = parts.iter().chain(rest);
    all.fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m })
}

/// What is computed for each row.
#[derive(Debug, Clone, Copy, PartialEq)]
enum RowOp {
    Softmax,
    LogSoftmax,
    SoftmaxGradient,
    LogSoftmaxGradient,
}

/// Rows of one or two operands to rows of the same length.
struct Lines {
    op: RowOp,
    len: usize,
}

impl TileKernel for Lines {
    fn run(&self, tile: &mut Tile<'_>) {
        let range = tile.units.start * self.len..tile.units.end * self.len;
        // SAFETY: operands and output are contiguous rows of `len` numbers by the builder, and these are the tile's.
        let (a, b, out) = unsafe {
            let a = tile.input::<f32>(0, range.clone());
            let b = if tile.inputs.len() > 1 { tile.input::<f32>(1, range.clone()) } else { a };
            (a, b, tile.output::<f32>(0, range))
        };
        lines(self.op, self.len, a, b, out);
    }
}

dispatch! {
    fn lines(op: RowOp, len: usize, a: &[f32], b: &[f32], out: &mut [f32]) = lines_body
}

#[inline(always)]
fn lines_body<const FMA: bool>(op: RowOp, len: usize, a: &[f32], b: &[f32], out: &mut [f32]) {
    for ((a, b), out) in a.chunks_exact(len).zip(b.chunks_exact(len)).zip(out.chunks_exact_mut(len)) {
        match op {
            RowOp::Softmax => {
                let max = largest(a);
                exp_shifted::<FMA>(max, a, out);
                let scale = 1.0 / sum(out, |x| x);
                for out in out.iter_mut() {
                    *out *= scale;
                }
            }
            RowOp::LogSoftmax => log_softmax::<FMA>(a, out),
            RowOp::SoftmaxGradient => {
                let dot = sum_pairs(a, b, |dy, y| dy * y);
                for ((out, dy), y) in out.iter_mut().zip(a).zip(b) {
                    *out = y * (dy - dot);
                }
            }
            RowOp::LogSoftmaxGradient => {
                let total = sum(a, |dy| dy);
                for ((out, dy), y) in out.iter_mut().zip(a).zip(b) {
                    *out = dy - math::exp::<FMA>(*y) * total;
                }
            }
        }
    }
}

/// `e^(x - shift)`. A loop, not an iterator with a closure: a closure that is not inlined loses the instruction set.
#[inline(always)]
fn exp_shifted<const FMA: bool>(shift: f32, x: &[f32], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = math::exp::<FMA>(*x - shift);
    }
}

#[inline(always)]
fn log_softmax<const FMA: bool>(x: &[f32], out: &mut [f32]) {
    let max = largest(x);
    // Exponentials go where the results will be: a sum through a function call for each element would not vectorise.
    exp_shifted::<FMA>(max, x, out);
    let shift = max + math::log::<FMA>(sum(out, |x| x));
    for (out, x) in out.iter_mut().zip(x) {
        *out = *x - shift;
    }
}

dispatch! {
    /// Rows of logarithms of softmax.
    pub(crate) fn log_softmax_rows(len: usize, x: &[f32], out: &mut [f32]) = log_softmax_rows_body
}

#[inline(always)]
fn log_softmax_rows_body<const FMA: bool>(len: usize, x: &[f32], out: &mut [f32]) {
    lines_body::<FMA>(RowOp::LogSoftmax, len, x, x, out);
}

/// Builds Softmax, LogSoftmax and their gradients along the last axis.
pub(crate) fn softmax(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let op = match cx.view.node.op.as_str() {
        "Softmax" => RowOp::Softmax,
        "LogSoftmax" => RowOp::LogSoftmax,
        "SoftmaxGradient" => RowOp::SoftmaxGradient,
        "LogSoftmaxGradient" => RowOp::LogSoftmaxGradient,
        _ => return Ok(None),
    };
    let shape = cx.output_shape(0);
    if shape.is_empty() || !cx.all_are(DType::F32) {
        return Ok(None);
    }
    // Old versions flatten at the axis, counted from 1 by default; along the last axis all agree.
    let flattens = cx.view.node.domain.is_empty() && cx.view.opset < 13;
    let axis = resolve_axis(cx.attributes().int("axis", if flattens { 1 } else { -1 })?, shape.len())?;
    if axis + 1 != shape.len() {
        return Ok(None);
    }
    Ok(Some(Built::tiled(Lines { op, len: shape[axis] }, axis, 8, &[0, 1])))
}

/// LayerNormalization or RMSNormalization of rows.
struct Normalize {
    len: usize,
    epsilon: f32,
    /// Whether the mean is subtracted.
    centred: bool,
    has_bias: bool,
    has_mean: bool,
    has_inv_std: bool,
}

impl TileKernel for Normalize {
    fn run(&self, tile: &mut Tile<'_>) {
        let units = tile.units.clone();
        let range = units.start * self.len..units.end * self.len;
        // SAFETY: by the builder, the input and first output are rows of `len` numbers, scale and bias one row each,
        // and the statistics one number for each row.
        unsafe {
            let x = tile.input::<f32>(0, range.clone());
            let scale = tile.input::<f32>(1, 0..self.len);
            let bias = if self.has_bias { tile.input::<f32>(2, 0..self.len) } else { &[] };
            let out = tile.output::<f32>(0, range);
            let means = if self.has_mean { tile.output::<f32>(1, units.clone()) } else { &mut [] };
            let inv_stds = if self.has_inv_std { tile.output::<f32>(2, units) } else { &mut [] };
            normalize(self, x, (scale, bias), out, (means, inv_stds));
        }
    }
}

dispatch! {
    fn normalize(
        settings: &Normalize,
        x: &[f32],
        affine: (&[f32], &[f32]),
        out: &mut [f32],
        statistics: (&mut [f32], &mut [f32]),
    ) = normalize_body
}

#[inline(always)]
fn normalize_body<const FMA: bool>(
    settings: &Normalize,
    x: &[f32],
    (scale, bias): (&[f32], &[f32]),
    out: &mut [f32],
    (means, inv_stds): (&mut [f32], &mut [f32]),
) {
    let len = settings.len;
    let count = len as f32;
    for (row, (x, out)) in x.chunks_exact(len).zip(out.chunks_exact_mut(len)).enumerate() {
        let mean = if settings.centred { sum(x, |x| x) / count } else { 0.0 };
        let variance = sum(x, |x| (x - mean) * (x - mean)) / count;
        let inv_std = 1.0 / (variance + settings.epsilon).sqrt();
        if settings.has_bias {
            for (((out, x), s), b) in out.iter_mut().zip(x).zip(scale).zip(bias) {
                *out = multiply_add::<FMA>((x - mean) * inv_std, *s, *b);
            }
        } else {
            for ((out, x), s) in out.iter_mut().zip(x).zip(scale) {
                *out = (x - mean) * inv_std * s;
            }
        }
        if let Some(slot) = means.get_mut(row) {
            *slot = mean;
        }
        if let Some(slot) = inv_stds.get_mut(row) {
            *slot = inv_std;
        }
    }
}

/// Builds LayerNormalization and RMSNormalization.
pub(crate) fn layer_norm(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let shape = cx.shape(0).to_vec();
    if !cx.all_are(DType::F32) || shape.is_empty() {
        return Ok(None);
    }
    let axis = resolve_axis(cx.attributes().int("axis", -1)?, shape.len())?;
    let row = &shape[axis..];
    if cx.shape(1) != row || (cx.input(2).is_some() && cx.shape(2) != row) {
        return Ok(None);
    }
    let kernel = Normalize {
        len: row.iter().product(),
        epsilon: cx.attributes().float("epsilon", 1e-5)?,
        centred: cx.view.node.op == "LayerNormalization",
        has_bias: cx.input(2).is_some(),
        has_mean: cx.view.wants(1),
        has_inv_std: cx.view.wants(2),
    };
    Ok(Some(Built::tiled(kernel, axis, 6, &[0])))
}

/// Gradients of LayerNormalization. Those of scale and bias are sums over rows: each block of rows has partial sums of
/// its own, added up in order at the end.
struct LayerNormGradient {
    rows: usize,
    len: usize,
    rows_per_block: usize,
}

/// Blocks of rows: enough for some threads, and few enough that their partial sums are small beside the rows.
const BLOCKS: usize = 16;

impl Kernel for LayerNormGradient {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let (dy, x, scale) = (io.input::<f32>(0), io.input::<f32>(1), io.input::<f32>(2));
        let (mean, inv_std) = (io.input::<f32>(3), io.input::<f32>(4));
        let len = self.len;
        let blocks = self.rows.div_ceil(self.rows_per_block);
        let partial = &mut io.scratch::<f32>()[..blocks * 2 * len];
        let dx = io.output::<f32>(0);
        let wants_dx = !dx.is_empty();
        let (dscale, dbias) = (io.output::<f32>(1), io.output::<f32>(2));
        {
            let (dx, partial) = (Shared::new(dx), Shared::new(&mut *partial));
            pool.for_each(blocks, |block| {
                let rows = block * self.rows_per_block..self.rows.min((block + 1) * self.rows_per_block);
                let range = rows.start * len..rows.end * len;
                // SAFETY: blocks have disjoint rows and sums.
                let (dx, sums) = unsafe {
                    let dx = if wants_dx { dx.range(range.clone()) } else { &mut [] };
                    (dx, partial.range(block * 2 * len..(block + 1) * 2 * len))
                };
                let statistics = (&mean[rows.clone()], &inv_std[rows]);
                layer_norm_gradient(&dy[range.clone()], &x[range], scale, statistics, dx, sums);
            });
        }
        for (out, first) in [(dscale, 0), (dbias, len)] {
            out.fill(0.0);
            for block in 0..blocks {
                let from = block * 2 * len + first;
                out.iter_mut().zip(&partial[from..from + len]).for_each(|(out, v)| *out += v);
            }
        }
        Ok(())
    }
}

dispatch! {
    fn layer_norm_gradient(
        dy: &[f32],
        x: &[f32],
        scale: &[f32],
        statistics: (&[f32], &[f32]),
        dx: &mut [f32],
        sums: &mut [f32],
    ) = layer_norm_gradient_body
}

#[inline(always)]
fn layer_norm_gradient_body<const FMA: bool>(
    dy: &[f32],
    x: &[f32],
    scale: &[f32],
    (means, inv_stds): (&[f32], &[f32]),
    dx: &mut [f32],
    sums: &mut [f32],
) {
    let len = scale.len();
    let count = len as f32;
    sums.fill(0.0);
    let (dscale, dbias) = sums.split_at_mut(len);
    for (row, (dy, x)) in dy.chunks_exact(len).zip(x.chunks_exact(len)).enumerate() {
        let (mean, inv_std) = (means[row], inv_stds[row]);
        for k in 0..len {
            dscale[k] = multiply_add::<FMA>(dy[k], (x[k] - mean) * inv_std, dscale[k]);
            dbias[k] += dy[k];
        }
        let Some(dx) = dx.get_mut(row * len..(row + 1) * len) else { continue };
        // First the gradient of the normalised row, which later passes read from the cache.
        for ((g, dy), s) in dx.iter_mut().zip(dy).zip(scale) {
            *g = dy * s;
        }
        let total = sum(dx, |g| g) / count;
        let product = sum_pairs(dx, x, |g, x| g * ((x - mean) * inv_std)) / count;
        for (g, x) in dx.iter_mut().zip(x) {
            *g = inv_std * (*g - total - (x - mean) * inv_std * product);
        }
    }
}

/// Builds LayerNormalizationGradient.
pub(crate) fn layer_norm_grad(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let shape = cx.shape(1).to_vec();
    if !cx.all_are(DType::F32) || shape.is_empty() {
        return Ok(None);
    }
    let axis = resolve_axis(cx.attributes().int("axis", -1)?, shape.len())?;
    let (rows, len) = (shape[..axis].iter().product::<usize>(), shape[axis..].iter().product::<usize>());
    let count = |index: usize| cx.shape(index).iter().product::<usize>();
    if cx.shape(0) != shape || cx.shape(2) != &shape[axis..] || count(3) != rows || count(4) != rows || len == 0 {
        return Ok(None);
    }
    let rows_per_block = rows.div_ceil(BLOCKS).max(8);
    let bytes = rows.div_ceil(rows_per_block) * 2 * len * size_of::<f32>();
    Ok(Some(Built::whole(LayerNormGradient { rows, len, rows_per_block }).scratch(bytes)))
}

dispatch! {
    /// The sum over `rows` of a matrix of `len` columns, added to `out`; or the largest, or the least.
    pub(crate) fn fold_rows(fold: Fold, len: usize, rows: &[f32], out: &mut [f32]) = fold_rows_body
}

/// How elements become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fold {
    Sum,
    Max,
    Min,
}

impl Fold {
    /// What changes nothing.
    pub(crate) fn neutral(self) -> f32 {
        match self {
            Fold::Sum => 0.0,
            Fold::Max => f32::NEG_INFINITY,
            Fold::Min => f32::INFINITY,
        }
    }

    #[inline(always)]
    fn join(self, a: f32, b: f32) -> f32 {
        match self {
            Fold::Sum => a + b,
            Fold::Max => {
                if a.is_nan() || a > b {
                    a
                } else {
                    b
                }
            }
            Fold::Min => {
                if a.is_nan() || a < b {
                    a
                } else {
                    b
                }
            }
        }
    }
}

#[inline(always)]
fn fold_rows_body<const FMA: bool>(fold: Fold, len: usize, rows: &[f32], out: &mut [f32]) {
    for row in rows.chunks_exact(len) {
        // The choice stands outside the loop over elements, so that each is a plain one.
        match fold {
            Fold::Sum => out.iter_mut().zip(row).for_each(|(out, v)| *out += v),
            Fold::Max => out.iter_mut().zip(row).for_each(|(out, v)| *out = Fold::Max.join(*out, *v)),
            Fold::Min => out.iter_mut().zip(row).for_each(|(out, v)| *out = Fold::Min.join(*out, *v)),
        }
    }
}

dispatch! {
    /// One number from a row.
    pub(crate) fn fold_row(fold: Fold, row: &[f32]) -> f32 = fold_row_body
}

#[inline(always)]
fn fold_row_body<const FMA: bool>(fold: Fold, row: &[f32]) -> f32 {
    if fold == Fold::Sum {
        return sum(row, |x| x);
    }
    let mut parts = [fold.neutral(); LANES];
    for block in row.chunks(LANES) {
        for (part, v) in parts.iter_mut().zip(block) {
            *part = fold.join(*part, *v);
        }
    }
    parts.iter().fold(fold.neutral(), |a, b| fold.join(a, *b))
}

dispatch! {
    /// The sum of squares, in `f64` from blocks of a few hundred on.
    pub(crate) fn sum_of_squares(values: &[f32]) -> f64 = sum_of_squares_body
}

#[inline(always)]
fn sum_of_squares_body<const FMA: bool>(values: &[f32]) -> f64 {
    values.chunks(512).map(|block| f64::from(sum(block, |x| x * x))).sum()
}

/// Rows `range` of a task among equal ones.
pub(crate) fn part(total: usize, per_task: usize, task: usize) -> Range<usize> {
    task * per_task..total.min((task + 1) * per_task)
}
