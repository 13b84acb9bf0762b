//! Kernels on bytes beside products: tables, sums and products of two tensors, pools.

use updraft_graph::op::window::Window;
use updraft_graph::{DType, OpError};

use super::affine::Affine;
use super::recognize::{Binary, BinaryOp};
use crate::cpu::isa::dispatch;
use crate::cpu::kernel::{Io, Kernel, Pool, Shared};

/// Bytes that one task makes of as many.
const TASK_BYTES: usize = 1 << 15;

/// Each byte by a table.
pub(super) struct MapBytes(pub(super) Box<[u8; 256]>);

impl Kernel for MapBytes {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let from = io.input::<u8>(0);
        pool.for_each_chunk(io.output::<u8>(0), TASK_BYTES, |task, to| {
            let from = &from[task * TASK_BYTES..][..to.len()];
            to.iter_mut().zip(from).for_each(|(to, byte)| *to = self.0[usize::from(*byte)]);
        });
        Ok(())
    }
}

/// How bytes of either sign become numbers without a branch: the sign bit is flipped, which makes an `i8` a `u8` that is
/// larger by 128.
#[derive(Debug, Clone, Copy)]
struct Shift {
    flip: u8,
    /// The flipped byte that stands for zero.
    zero: i32,
}

impl Shift {
    fn of(affine: &Affine) -> Shift {
        let signed = affine.dtype == DType::I8;
        let (flip, shift) = if signed { (0x80, 128) } else { (0, 0) };
        Shift { flip, zero: affine.zero_point + shift }
    }

    #[inline(always)]
    fn number(self, byte: u8) -> f32 {
        (i32::from(byte ^ self.flip) - self.zero) as f32
    }
}

/// A rounded number's byte.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    shift: Shift,
    /// Limits, less the zero point.
    low: f32,
    high: f32,
}

impl Target {
    fn of(affine: &Affine, limits: (i32, i32)) -> Target {
        let zero = affine.zero_point;
        Target { shift: Shift::of(affine), low: (limits.0 - zero) as f32, high: (limits.1 - zero) as f32 }
    }

    #[inline(always)]
    fn byte(self, value: f32) -> u8 {
        // Written so that not-a-number, which a product with an infinite scale ratio makes, takes the smallest code.
        let value = if value > self.low { value } else { self.low };
        let value = if value < self.high { value } else { self.high };
        // SAFETY: between limits that differ by less than 256.
        let code = unsafe { value.round_ties_even().to_int_unchecked::<i32>() };
        (code + self.shift.zero) as u8 ^ self.shift.flip
    }
}

/// The sum, difference or product of two tensors.
pub(super) struct BinaryBytes {
    op: BinaryOp,
    inputs: [Shift; 2],
    /// Steps of the output for one step of each input; of a product, of both.
    factors: [f32; 2],
    target: Target,
}

impl BinaryBytes {
    pub(super) fn new(binary: &Binary) -> BinaryBytes {
        let [a, b] = binary.inputs;
        let scale = binary.output.scale;
        let factors = match binary.op {
            BinaryOp::Add => [a.scale / scale, b.scale / scale],
            BinaryOp::Sub => [a.scale / scale, -b.scale / scale],
            BinaryOp::Mul => [a.scale * b.scale / scale, 1.0],
        };
        let target = Target::of(&binary.output, binary.limits);
        BinaryBytes { op: binary.op, inputs: [Shift::of(&a), Shift::of(&b)], factors, target }
    }
}

impl Kernel for BinaryBytes {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let (a, b) = (io.input::<u8>(0), io.input::<u8>(1));
        pool.for_each_chunk(io.output::<u8>(0), TASK_BYTES, |task, to| {
            let range = task * TASK_BYTES..task * TASK_BYTES + to.len();
            match self.op {
                BinaryOp::Mul => multiply(self, &a[range.clone()], &b[range], to),
                _ => add(self, &a[range.clone()], &b[range], to),
            }
        });
        Ok(())
    }
}

dispatch!(fn add(kernel: &BinaryBytes, a: &[u8], b: &[u8], to: &mut [u8]) = add_body);

#[inline(always)]
fn add_body<const FMA: bool>(kernel: &BinaryBytes, a: &[u8], b: &[u8], to: &mut [u8]) {
    let ([first, second], [by, with], target) = (kernel.inputs, kernel.factors, kernel.target);
    for ((to, a), b) in to.iter_mut().zip(a).zip(b) {
        *to = target.byte(first.number(*a) * by + second.number(*b) * with);
    }
}

dispatch!(fn multiply(kernel: &BinaryBytes, a: &[u8], b: &[u8], to: &mut [u8]) = multiply_body);

#[inline(always)]
fn multiply_body<const FMA: bool>(kernel: &BinaryBytes, a: &[u8], b: &[u8], to: &mut [u8]) {
    let ([first, second], [by, _], target) = (kernel.inputs, kernel.factors, kernel.target);
    for ((to, a), b) in to.iter_mut().zip(a).zip(b) {
        *to = target.byte(first.number(*a) * second.number(*b) * by);
    }
}

/// What becomes of the elements under a window.
pub(super) enum Pooling {
    Max {
        signed: bool,
    },
    Average {
        input: Affine,
        target: Target,
        /// For each window, steps of the output for one step of the sum.
        factors: Vec<f32>,
    },
}

impl Pooling {
    /// Averages over so many elements.
    pub(super) fn average(input: &Affine, output: &Affine, counts: &[f64]) -> Pooling {
        let factors = counts.iter().map(|n| (f64::from(input.scale) / f64::from(output.scale) / n) as f32).collect();
        Pooling::Average { input: *input, target: Target::of(output, output.limits()), factors }
    }
}

/// Windows over bytes with channels last: the rows of all channels under a window are combined element by element.
pub(super) struct PoolBytes {
    channels: usize,
    batch: usize,
    /// Elements of a picture's channel, before and after.
    input_len: usize,
    output_len: usize,
    /// For each window the positions of its taps, all in one list, and where each window's begin.
    taps: Vec<u32>,
    starts: Vec<usize>,
    pooling: Pooling,
}

impl PoolBytes {
    /// Whether every window has an element under it, and positions are few enough to be listed.
    pub(super) fn covers(window: &Window) -> bool {
        if window.input_len() >= 1 << 28 || window.output_len().saturating_mul(window.taps()) >= 1 << 24 {
            return false;
        }
        let is_covered = |axis: usize, output: usize| {
            (0..window.kernel[axis]).any(|tap| window.input_at(axis, output, tap).is_some())
        };
        (0..window.rank()).all(|axis| (0..window.output[axis]).all(|output| is_covered(axis, output)))
    }

    /// Over a batch of pictures of so many channels.
    pub(super) fn new(window: &Window, batch: usize, channels: usize, pooling: Pooling) -> PoolBytes {
        let mut lists: Vec<Vec<u32>> = vec![Vec::new(); window.output_len()];
        window.visit(|output, _, input| lists[output].push(input as u32));
        let mut starts = vec![0];
        let mut taps = Vec::new();
        for list in lists {
            taps.extend(list);
            starts.push(taps.len());
        }
        PoolBytes {
            channels,
            batch,
            input_len: window.input_len(),
            output_len: window.output_len(),
            taps,
            starts,
            pooling,
        }
    }

    /// For each worker.
    pub(super) fn scratch_bytes(&self) -> usize {
        self.channels * size_of::<i32>()
    }
}

impl Kernel for PoolBytes {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let from = io.input::<u8>(0);
        let to = Shared::new(io.output::<u8>(0));
        let windows = self.batch * self.output_len;
        let per_window = self.channels * (self.taps.len() / self.output_len.max(1)).max(1);
        let per_task = (TASK_BYTES / per_window).max(1);
        pool.for_each_with_scratch(windows.div_ceil(per_task), io.scratch::<i32>(), |task, sums| {
            for window in task * per_task..windows.min((task + 1) * per_task) {
                let (image, at) = (window / self.output_len, window % self.output_len);
                let image = &from[image * self.input_len * self.channels..][..self.input_len * self.channels];
                let rows = self.taps[self.starts[at]..self.starts[at + 1]]
                    .iter()
                    .map(|position| &image[*position as usize * self.channels..][..self.channels]);
                // SAFETY: each window has bytes of its own.
                let to = unsafe { to.range(window * self.channels..(window + 1) * self.channels) };
                match &self.pooling {
                    Pooling::Max { signed } => {
                        to.fill(if *signed { 0x80 } else { 0 });
                        let flip = if *signed { 0x80 } else { 0 };
                        rows.for_each(|row| largest(to, row, flip));
                    }
                    Pooling::Average { input, target, factors } => {
                        let sums = &mut sums[..self.channels];
                        sums.fill(0);
                        let shift = Shift::of(input);
                        rows.for_each(|row| sum_row(sums, row, shift));
                        finish_row(to, sums, factors[at], *target);
                    }
                }
            }
        });
        Ok(())
    }
}

dispatch!(fn largest(best: &mut [u8], row: &[u8], flip: u8) = largest_body);

#[inline(always)]
fn largest_body<const FMA: bool>(best: &mut [u8], row: &[u8], flip: u8) {
    for (best, byte) in best.iter_mut().zip(row) {
        *best = (*best ^ flip).max(*byte ^ flip) ^ flip;
    }
}

dispatch!(fn sum_row(sums: &mut [i32], row: &[u8], shift: Shift) = sum_row_body);

#[inline(always)]
fn sum_row_body<const FMA: bool>(sums: &mut [i32], row: &[u8], shift: Shift) {
    for (sum, byte) in sums.iter_mut().zip(row) {
        *sum += i32::from(*byte ^ shift.flip) - shift.zero;
    }
}

dispatch!(fn finish_row(to: &mut [u8], sums: &[i32], factor: f32, target: Target) = finish_row_body);

#[inline(always)]
fn finish_row_body<const FMA: bool>(to: &mut [u8], sums: &[i32], factor: f32, target: Target) {
    for (to, sum) in to.iter_mut().zip(sums) {
        *to = target.byte(*sum as f32 * factor);
    }
}
