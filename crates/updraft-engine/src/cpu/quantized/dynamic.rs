//! DynamicQuantizeLinear: codes of a range that is measured at run time.

use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::isa::dispatch;
use crate::cpu::kernel::{Io, Kernel, Pool};

/// Numbers of which one task finds the range, or makes codes.
const TASK_NUMBERS: usize = 1 << 14;

struct DynamicQuantize;

/// DynamicQuantizeLinear of f32.
pub(in crate::cpu) fn dynamic_quantize(cx: &mut Build) -> Result<Option<Built>, OpError> {
    if cx.dtype(0) != Some(DType::F32) || cx.outputs.len() != 3 {
        return Ok(None);
    }
    let tasks = cx.shape(0).iter().product::<usize>().div_ceil(TASK_NUMBERS);
    Ok(Some(Built::whole(DynamicQuantize).scratch(2 * tasks * size_of::<f32>())))
}

impl Kernel for DynamicQuantize {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let x = io.input::<f32>(0);
        let ranges = &mut io.scratch::<f32>()[..2 * x.len().div_ceil(TASK_NUMBERS)];
        pool.for_each_chunk(ranges, 2, |task, found| {
            range(&x[task * TASK_NUMBERS..x.len().min((task + 1) * TASK_NUMBERS)], found);
        });
        let low = ranges.iter().step_by(2).copied().fold(0.0f32, f32::min);
        let high = ranges.iter().skip(1).step_by(2).copied().fold(0.0f32, f32::max);
        // Each step is rounded to f32; a range without extent has no scale, and any keeps zero zero.
        let scale = if high == low { 1.0 } else { (high - low) / 255.0 };
        let zero = (0.0 - low / scale).clamp(0.0, 255.0).round_ties_even() as u8;
        io.output::<f32>(1).fill(scale);
        io.output::<u8>(2).fill(zero);
        pool.for_each_chunk(io.output::<u8>(0), TASK_NUMBERS, |task, codes| {
            encode(&x[task * TASK_NUMBERS..][..codes.len()], scale, f32::from(zero), codes);
        });
        Ok(())
    }
}

dispatch! {
    /// The least and the greatest number, zero included.
    fn range(x: &[f32], found: &mut [f32]) = range_body
}

#[inline(always)]
fn range_body<const FMA: bool>(x: &[f32], found: &mut [f32]) {
    const LANES: usize = 32;
    let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
    let mut chunks = x.chunks_exact(LANES);
    // Comparisons, so that not-a-number counts for nothing.
    let mut take = |lane: usize, v: f32| {
        low[lane] = if v < low[lane] { v } else { low[lane] };
        high[lane] = if v > high[lane] { v } else { high[lane] };
    };
    for chunk in chunks.by_ref() {
        for (lane, v) in chunk.iter().enumerate() {
            take(lane, *v);
        }
    }
    for (lane, v) in chunks.remainder().iter().enumerate() {
        take(lane, *v);
    }
    found[0] = low.into_iter().fold(0.0, f32::min);
    found[1] = high.into_iter().fold(0.0, f32::max);
}

dispatch!(fn encode(x: &[f32], scale: f32, zero: f32, codes: &mut [u8]) = encode_body);

#[inline(always)]
fn encode_body<const FMA: bool>(x: &[f32], scale: f32, zero: f32, codes: &mut [u8]) {
    let (low, high) = (-zero, 255.0 - zero);
    for (code, x) in codes.iter_mut().zip(x) {
        let quotient = (x / scale).round_ties_even();
        // Not-a-number takes the smallest code.
        let quotient = if quotient > low { quotient } else { low };
        let quotient = if quotient < high { quotient } else { high };
        // SAFETY: between 0 and 255.
        *code = unsafe { (quotient + zero).to_int_unchecked::<i32>() } as u8;
    }
}
