//! Fake quantization and its gradient: one pass over the elements each.
//!
//! Elements are runs of neighbours that share a scale. Sums for a scale are taken over pieces of runs in lanes and then
//! over pieces in order, so they are the same for any number of threads.

use updraft_graph::op::quant::fake::FakeQuantizer;
use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::isa::dispatch;
use crate::cpu::kernel::{Io, Kernel, Pool, Shared};
use crate::cpu::rows::part;

/// Elements in one task.
const TASK_ELEMENTS: usize = 1 << 13;

/// What both kernels know of their node.
struct Scales {
    quantizer: FakeQuantizer,
    /// Number of the input that is trained.
    step: usize,
}

/// One run's scale and codes.
#[derive(Debug, Clone, Copy)]
struct Grid {
    scale: f32,
    low: f32,
    high: f32,
}

impl Scales {
    /// What the node says, where units and zero points never change.
    fn new(cx: &Build, first: usize) -> Result<Option<Scales>, OpError> {
        let floats = (0..first + 3).all(|i| cx.dtype(i) == Some(DType::F32));
        let (Some(unit), Some(zero), true) = (cx.constant(first + 1), cx.constant(first + 3), floats) else {
            return Ok(None);
        };
        if cx.shape(first).iter().product::<usize>() == 0 || cx.shape(first + 2).iter().product::<usize>() != unit.len()
        {
            return Ok(None);
        }
        let quantizer = FakeQuantizer::new(&cx.view, cx.shape(first), &unit.to_f64()?, zero)?;
        Ok(Some(Scales { quantizer, step: first + 2 }))
    }

    fn grids(&self, io: &Io) -> Vec<Grid> {
        let steps = io.input::<f32>(self.step);
        let grid = |(channel, (low, high)): (usize, &(f64, f64))| Grid {
            scale: self.quantizer.scale(channel, steps.get(channel).copied().map_or(1.0, f64::from)) as f32,
            low: *low as f32,
            high: *high as f32,
        };
        self.quantizer.codes.iter().enumerate().map(grid).collect()
    }

    /// Pieces of runs that make a task together: the channel of each and its elements, within those of the task.
    fn pieces(&self, start: usize, len: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        let (inner, channels) = (self.quantizer.inner, self.quantizer.channels);
        let mut at = start;
        std::iter::from_fn(move || {
            let rest = (start + len).checked_sub(at).filter(|rest| *rest > 0)?;
            let count = (inner - at % inner).min(rest);
            let piece = (at / inner % channels, at - start..at - start + count);
            at += count;
            Some(piece)
        })
    }
}

struct Forward(Scales);

/// Builds FakeQuantize.
pub(crate) fn forward(cx: &mut Build) -> Result<Option<Built>, OpError> {
    Ok(Scales::new(cx, 0)?.map(|scales| Built::whole(Forward(scales))))
}

impl Kernel for Forward {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let grids = self.0.grids(io);
        let x = io.input::<f32>(0);
        pool.for_each_chunk(io.output::<f32>(0), TASK_ELEMENTS, |task, out| {
            let start = task * TASK_ELEMENTS;
            for (channel, piece) in self.0.pieces(start, out.len()) {
                let x = &x[start + piece.start..start + piece.end];
                quantize(grids[channel], x, &mut out[piece]);
            }
        });
        Ok(())
    }
}

struct Backward(Scales);

/// Builds FakeQuantizeGradient.
pub(crate) fn backward(cx: &mut Build) -> Result<Option<Built>, OpError> {
    Ok(Scales::new(cx, 1)?.map(|scales| Built::whole(Backward(scales))))
}

impl Kernel for Backward {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let grids = self.0.grids(io);
        let (dy, x) = (io.input::<f32>(0), io.input::<f32>(1));
        let (dx, dstep) = (Shared::new(io.output::<f32>(0)), io.output::<f32>(1));
        let mut sums: Vec<Vec<(usize, f32)>> = vec![Vec::new(); x.len().div_ceil(TASK_ELEMENTS)];
        pool.for_each_chunk(&mut sums, 1, |task, sums| {
            let range = part(x.len(), TASK_ELEMENTS, task);
            // SAFETY: tasks have disjoint ranges.
            let out = if dx.is_empty() { &mut [][..] } else { unsafe { dx.range(range.clone()) } };
            let mut unwanted = Vec::new();
            let out = if out.is_empty() {
                unwanted.resize(range.len(), 0.0);
                unwanted.as_mut_slice()
            } else {
                out
            };
            for (channel, piece) in self.0.pieces(range.start, range.len()) {
                let at = range.start + piece.start..range.start + piece.end;
                let sum = differentiate(grids[channel], &dy[at.clone()], &x[at], &mut out[piece]);
                sums[0].push((channel, sum));
            }
        });
        let mut totals = vec![0f64; self.0.quantizer.channels];
        sums.iter().flatten().for_each(|(channel, sum)| totals[*channel] += f64::from(*sum));
        for (channel, out) in dstep.iter_mut().enumerate() {
            let factor = self.0.quantizer.gradient_scales[channel] / self.0.quantizer.units[channel];
            *out = (totals[channel] * factor) as f32;
        }
        Ok(())
    }
}

dispatch! {
    fn quantize(grid: Grid, x: &[f32], out: &mut [f32]) = quantize_body
}

#[inline(always)]
fn quantize_body<const FMA: bool>(grid: Grid, x: &[f32], out: &mut [f32]) {
    let Grid { scale, low, high } = grid;
    for (out, x) in out.iter_mut().zip(x) {
        // A code has no negative zero; adding zero takes the sign away.
        *out = ((x / scale).round_ties_even().max(low).min(high) + 0.0) * scale;
    }
}

dispatch! {
    /// Writes the gradient of `x`; returns the sum for the scale.
    fn differentiate(grid: Grid, dy: &[f32], x: &[f32], dx: &mut [f32]) -> f32 = differentiate_body
}

#[inline(always)]
fn differentiate_body<const FMA: bool>(grid: Grid, dy: &[f32], x: &[f32], dx: &mut [f32]) -> f32 {
    const LANES: usize = 16;
    let Grid { scale, low, high } = grid;
    let one = |dy: f32, x: f32| {
        let quotient = x / scale;
        let code = quotient.round_ties_even();
        let bounded = code.max(low).min(high);
        let inside = bounded == code;
        (if inside { dy } else { 0.0 }, dy * if inside { code - quotient } else { bounded })
    };
    let mut sums = [0f32; LANES];
    let mut rows = dx.chunks_exact_mut(LANES);
    for ((dx, dy), x) in rows.by_ref().zip(dy.chunks_exact(LANES)).zip(x.chunks_exact(LANES)) {
        for lane in 0..LANES {
            let (d, s) = one(dy[lane], x[lane]);
            dx[lane] = d;
            sums[lane] += s;
        }
    }
    let done = dy.len() / LANES * LANES;
    for (lane, ((dx, dy), x)) in rows.into_remainder().iter_mut().zip(&dy[done..]).zip(&x[done..]).enumerate() {
        let (d, s) = one(*dy, *x);
        *dx = d;
        sums[lane] += s;
    }
    sums.iter().sum()
}
