//! What becomes of sums: written, brought to floats, or brought to bytes of another scale.
//!
//! Loops are plain and every operation in them rounds in one way on every processor, so the bits do not depend on the
//! instruction set: multiplications and additions are never fused.

use super::{Finish, Requantize, Residual};
use crate::cpu::isa::dispatch;
use crate::cpu::kernel::Shared;

/// Adding it to a float below 2^22 rounds that to an integer, ties to even, which is then in the low bits of the sum:
/// 1.5 * 2^23.
const ROUNDER: f32 = 12_582_912.0;

/// A [`Finish`] with a multiplier for each output channel.
pub(super) struct Finisher {
    kind: Finish,
    multipliers: Vec<f32>,
}

/// Sums of some rows and channels, and where they go.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    /// `width` for each row, of which the first `channels` exist.
    pub(super) sums: &'a [i32],
    pub(super) width: usize,
    /// First output channel, of all.
    pub(super) channel: usize,
    pub(super) channels: usize,
    /// Element of the output that the first sum belongs to.
    pub(super) start: usize,
    /// From one row to the next, in elements of the output.
    pub(super) pitch: usize,
    pub(super) residual: &'a [u8],
}

impl Finisher {
    pub(super) fn new(kind: Finish, channels: usize) -> Finisher {
        let multipliers = match &kind {
            Finish::Sums => Vec::new(),
            Finish::Dequantize { multipliers, .. } | Finish::Requantize(Requantize { multipliers, .. }) => {
                if multipliers.len() == 1 {
                    vec![multipliers[0]; channels]
                } else {
                    multipliers.clone()
                }
            }
        };
        Finisher { kind, multipliers }
    }

    /// With all multipliers times `scale`.
    pub(super) fn scaled(&self, scale: f32) -> Finisher {
        Finisher { kind: self.kind.clone(), multipliers: self.multipliers.iter().map(|m| m * scale).collect() }
    }

    /// Bytes of an element of the output.
    pub(super) fn element_bytes(&self) -> usize {
        if matches!(self.kind, Finish::Requantize(_)) { 1 } else { 4 }
    }

    /// Whether a residual is added.
    pub(super) fn adds_residual(&self) -> bool {
        matches!(&self.kind, Finish::Requantize(Requantize { residual: Some(_), .. }))
    }

    /// Writes a block.
    ///
    /// # Safety
    /// Nobody else may touch the block's elements of the output meanwhile.
    pub(super) unsafe fn write(&self, block: Block<'_>, output: &Shared<'_, u8>) {
        let channels = block.channel..block.channel + block.channels;
        match &self.kind {
            Finish::Sums => write_sums(block, output),
            Finish::Dequantize { bias, .. } => {
                write_floats(block, &self.multipliers[channels.clone()], bias.get(channels).unwrap_or(&[]), output);
            }
            Finish::Requantize(to) => {
                let bounds = Bounds::of(to);
                let multipliers = &self.multipliers[channels];
                match &to.residual {
                    None => write_bytes(block, multipliers, bounds, output),
                    Some(residual) => write_bytes_with(block, multipliers, bounds, Added::of(residual), output),
                }
            }
        }
    }
}

/// The last steps to a byte.
#[derive(Clone, Copy)]
struct Bounds {
    min: f32,
    max: f32,
    zero_point: i32,
}

impl Bounds {
    fn of(to: &Requantize) -> Bounds {
        let zero_point = to.output.zero_point;
        Bounds { min: (to.min - zero_point) as f32, max: (to.max - zero_point) as f32, zero_point }
    }

    /// Clamps, rounds and adds the zero point; NaN becomes the least byte.
    #[inline(always)]
    fn byte(self, value: f32) -> u8 {
        let value = clamp(value, self.min, self.max);
        ((value + ROUNDER).to_bits() as i32).wrapping_add(self.zero_point) as u8
    }
}

#[inline(always)]
fn clamp(value: f32, min: f32, max: f32) -> f32 {
    let value = if value > min { value } else { min };
    if value < max { value } else { max }
}

/// How a residual is added.
#[derive(Clone, Copy)]
struct Added {
    /// Makes a `u8` of an `i8`, 128 more.
    flip: u8,
    zero_point: i32,
    multiplier: f32,
    rounds: bool,
    min: f32,
    max: f32,
    rounded_multiplier: f32,
}

impl Added {
    fn of(residual: &Residual) -> Added {
        let (flip, raised) = if residual.bytes.signed { (0x80, 128) } else { (0, 0) };
        let rounded = residual.rounded;
        Added {
            flip,
            zero_point: residual.bytes.zero_point + raised,
            multiplier: residual.multiplier,
            rounds: rounded.is_some(),
            min: rounded.map_or(0.0, |r| r.min as f32),
            max: rounded.map_or(0.0, |r| r.max as f32),
            rounded_multiplier: rounded.map_or(1.0, |r| r.multiplier),
        }
    }

    #[inline(always)]
    fn number(self, byte: u8) -> f32 {
        (i32::from(byte ^ self.flip) - self.zero_point) as f32 * self.multiplier
    }

    #[inline(always)]
    fn round(self, value: f32) -> f32 {
        (clamp(value, self.min, self.max) + ROUNDER - ROUNDER) * self.rounded_multiplier
    }
}

impl<'a> Block<'a> {
    /// For each row its sums and the elements of the output that they belong to.
    #[inline(always)]
    fn rows(self) -> impl Iterator<Item = (&'a [i32], std::ops::Range<usize>)> {
        self.sums.chunks_exact(self.width).enumerate().map(move |(row, sums)| {
            let start = self.start + row * self.pitch;
            (&sums[..self.channels], start..start + self.channels)
        })
    }
}

/// The bytes of these elements of four bytes each.
///
/// # Safety
/// As for [`Finisher::write`].
#[inline(always)]
unsafe fn fours<'a, T: bytemuck::Pod>(output: &'a Shared<'_, u8>, range: std::ops::Range<usize>) -> &'a mut [T] {
    // SAFETY: the caller's promise.
    bytemuck::cast_slice_mut(unsafe { output.range(range.start * 4..range.end * 4) })
}

fn write_sums(block: Block<'_>, output: &Shared<'_, u8>) {
    for (sums, range) in block.rows() {
        // SAFETY: the block is the caller's alone.
        unsafe { fours(output, range) }.copy_from_slice(sums);
    }
}

dispatch!(fn write_floats(block: Block<'_>, multipliers: &[f32], bias: &[f32], output: &Shared<'_, u8>) = write_floats_in);

#[inline(always)]
fn write_floats_in<const FMA: bool>(block: Block<'_>, multipliers: &[f32], bias: &[f32], output: &Shared<'_, u8>) {
    for (sums, range) in block.rows() {
        // SAFETY: the block is the caller's alone.
        let to = unsafe { fours::<f32>(output, range) };
        let sums = sums.iter().zip(multipliers).map(|(sum, multiplier)| *sum as f32 * multiplier);
        if bias.is_empty() {
            to.iter_mut().zip(sums).for_each(|(to, value)| *to = value);
        } else {
            to.iter_mut().zip(sums).zip(bias).for_each(|((to, value), bias)| *to = value + bias);
        }
    }
}

dispatch!(fn write_bytes(block: Block<'_>, multipliers: &[f32], bounds: Bounds, output: &Shared<'_, u8>) = write_bytes_in);

#[inline(always)]
fn write_bytes_in<const FMA: bool>(block: Block<'_>, multipliers: &[f32], bounds: Bounds, output: &Shared<'_, u8>) {
    for (sums, range) in block.rows() {
        // SAFETY: the block is the caller's alone.
        let to = unsafe { output.range(range) };
        for ((to, sum), multiplier) in to.iter_mut().zip(sums).zip(multipliers) {
            *to = bounds.byte(*sum as f32 * multiplier);
        }
    }
}

dispatch!(
    fn write_bytes_with(block: Block<'_>, multipliers: &[f32], bounds: Bounds, added: Added, output: &Shared<'_, u8>) =
        write_bytes_with_in
);

#[inline(always)]
fn write_bytes_with_in<const FMA: bool>(
    block: Block<'_>,
    multipliers: &[f32],
    bounds: Bounds,
    added: Added,
    output: &Shared<'_, u8>,
) {
    for (sums, range) in block.rows() {
        let residual = &block.residual[range.clone()];
        // SAFETY: the block is the caller's alone.
        let to = unsafe { output.range(range) };
        let sums = sums.iter().zip(multipliers).map(|(sum, multiplier)| *sum as f32 * multiplier);
        let all = to.iter_mut().zip(sums).zip(residual);
        if added.rounds {
            all.for_each(|((to, value), byte)| *to = bounds.byte(added.round(value) + added.number(*byte)));
        } else {
            all.for_each(|((to, value), byte)| *to = bounds.byte(value + added.number(*byte)));
        }
    }
}
