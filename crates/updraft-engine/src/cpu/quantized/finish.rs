//! What becomes of sums: written, brought to floats, or brought to bytes of another scale.
//!
//! Loops are plain and every operation in them rounds in one way on every processor, so the bits do not depend on the
//! instruction set: multiplications and additions are never fused.

use super::dot::{DotIsa, LANES};
use super::lanes::ByteLanes;
use super::{Finish, Requantize, Residual};
use crate::cpu::isa::{self, Isa};
use crate::cpu::kernel::Shared;
use crate::cpu::lanes::with_lanes;

/// A [`Finish`] with a multiplier for each output channel.
pub(super) struct Finisher {
    isa: Isa,
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
    pub(super) fn new(isa: DotIsa, kind: Finish, channels: usize) -> Finisher {
        let multipliers = match &kind {
            Finish::Sums => Vec::new(),
            Finish::Dequantize { multipliers, .. } | Finish::Requantize(Requantize { multipliers, .. }) => {
                let mut all = match multipliers.as_slice() {
                    [one] => vec![*one; channels],
                    each => each.to_vec(),
                };
                // The last register of channels is read whole.
                all.resize(channels + LANES, 0.0);
                all
            }
        };
        Finisher { isa: isa.floats(), kind, multipliers }
    }

    /// With all multipliers times `scale`.
    pub(super) fn scaled(&self, scale: f32) -> Finisher {
        let multipliers = self.multipliers.iter().map(|m| m * scale).collect();
        Finisher { isa: self.isa, kind: self.kind.clone(), multipliers }
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
    /// # Panics
    /// If a slice is too short for what the numbers say.
    ///
    /// # Safety
    /// Nobody else may touch the block's elements of the output meanwhile.
    pub(super) unsafe fn write(&self, block: Block<'_>, output: &Shared<'_, u8>) {
        let Block { sums, width, channel, channels, start, pitch, residual } = block;
        let rows = sums.len() / width.max(1);
        if rows == 0 || channels == 0 {
            return;
        }
        let end = start + (rows - 1) * pitch + channels;
        let size = self.element_bytes();
        assert!(channels <= width && width.is_multiple_of(LANES) && output.len() >= end * size);
        let to = output.as_mut_ptr().wrapping_add(start * size);
        assert!(self.isa <= isa::detected() && to.addr().is_multiple_of(size));
        let place = Place { sums, width, rows, channels, pitch, to };
        let multipliers = self.multipliers.get(channel..).unwrap_or(&[]);
        let isa = self.isa;
        // SAFETY: the instruction set is there. Sums have whole registers for all channels, and so have multipliers, by
        // their padding; elements that are read and written end at `end`.
        unsafe {
            match &self.kind {
                Finish::Sums => write_sums(place),
                Finish::Dequantize { bias, .. } => {
                    assert!(multipliers.len() >= width && (bias.is_empty() || bias.len() >= channel + channels));
                    let bias = bias.get(channel..).unwrap_or(&[]);
                    write_floats(isa, place, multipliers, bias);
                }
                Finish::Requantize(to) => {
                    assert!(multipliers.len() >= width);
                    match &to.residual {
                        None => write_bytes(isa, place, multipliers, Bounds::of(to)),
                        Some(added) => {
                            assert!(residual.len() >= end);
                            let residual = residual.as_ptr().wrapping_add(start);
                            write_bytes_with(isa, place, multipliers, Bounds::of(to), Added::of(added, residual));
                        }
                    }
                }
            }
        }
    }
}

/// A block's sums and the memory of its elements.
#[derive(Clone, Copy)]
struct Place<'a> {
    sums: &'a [i32],
    width: usize,
    rows: usize,
    channels: usize,
    pitch: usize,
    to: *mut u8,
}

impl Place<'_> {
    /// For each channel that begins a register of so many lanes, how many of them exist.
    #[inline(always)]
    fn registers(&self, width: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let channels = self.channels;
        (0..channels).step_by(width).map(move |at| (at, (channels - at).min(width)))
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
}

/// How a residual is added.
#[derive(Clone, Copy)]
struct Added {
    residual: *const u8,
    /// Makes a `u8` of an `i8`, 128 more.
    flip: u8,
    /// Minus the zero point of that.
    offset: f32,
    multiplier: f32,
    rounds: bool,
    min: f32,
    max: f32,
    rounded_multiplier: f32,
}

impl Added {
    fn of(added: &Residual, residual: *const u8) -> Added {
        let (flip, raised) = if added.bytes.signed { (0x80, 128) } else { (0, 0) };
        let rounded = added.rounded;
        Added {
            residual,
            flip,
            offset: -(added.bytes.zero_point + raised) as f32,
            multiplier: added.multiplier,
            rounds: rounded.is_some(),
            min: rounded.map_or(0.0, |r| r.min as f32),
            max: rounded.map_or(0.0, |r| r.max as f32),
            rounded_multiplier: rounded.map_or(1.0, |r| r.multiplier),
        }
    }
}

/// # Safety
/// Rows of the place are valid for writing; in the functions below also: the processor has the instruction set, and
/// registers of sums, multipliers, bias and residual are valid for reading.
unsafe fn write_sums(place: Place<'_>) {
    for (row, sums) in place.sums.chunks_exact(place.width).enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let to = place.to.cast::<i32>().add(row * place.pitch);
            std::ptr::copy_nonoverlapping(sums.as_ptr(), to, place.channels);
        }
    }
}

/// # Safety
/// See [`write_sums`].
unsafe fn write_floats(isa: Isa, place: Place<'_>, multipliers: &[f32], bias: &[f32]) {
    // SAFETY: the caller's promise.
    unsafe { with_lanes!(isa, write_floats_in(place: Place<'_>, multipliers: &[f32], bias: &[f32])) }
}

#[inline(always)]
unsafe fn write_floats_in<L: ByteLanes>(place: Place<'_>, multipliers: &[f32], bias: &[f32]) {
    for (at, lanes) in place.registers(L::WIDTH) {
        // SAFETY: the caller's promise.
        unsafe {
            let multiplier = L::load(multipliers.as_ptr().add(at));
            let bias = (!bias.is_empty()).then(|| L::load_part(bias.as_ptr().add(at), 0, lanes));
            for row in 0..place.rows {
                let mut value = L::from_integers(place.sums.as_ptr().add(row * place.width + at)).mul(multiplier);
                if let Some(bias) = bias {
                    value = value.add(bias);
                }
                let to = place.to.cast::<f32>().add(row * place.pitch + at);
                if lanes == L::WIDTH {
                    value.store(to);
                } else {
                    value.store_part(to, lanes);
                }
            }
        }
    }
}

/// # Safety
/// See [`write_sums`].
unsafe fn write_bytes(isa: Isa, place: Place<'_>, multipliers: &[f32], bounds: Bounds) {
    // SAFETY: the caller's promise.
    unsafe { with_lanes!(isa, write_bytes_in(place: Place<'_>, multipliers: &[f32], bounds: Bounds)) }
}

#[inline(always)]
unsafe fn write_bytes_in<L: ByteLanes>(place: Place<'_>, multipliers: &[f32], bounds: Bounds) {
    for (at, lanes) in place.registers(L::WIDTH) {
        // SAFETY: the caller's promise.
        unsafe {
            let (min, max) = (L::splat(bounds.min), L::splat(bounds.max));
            let multiplier = L::load(multipliers.as_ptr().add(at));
            for row in 0..place.rows {
                let value = L::from_integers(place.sums.as_ptr().add(row * place.width + at)).mul(multiplier);
                let to = place.to.add(row * place.pitch + at);
                value.at_least(min).at_most(max).store_bytes(bounds.zero_point, to, lanes);
            }
        }
    }
}

/// # Safety
/// See [`write_sums`].
unsafe fn write_bytes_with(isa: Isa, place: Place<'_>, multipliers: &[f32], bounds: Bounds, added: Added) {
    // SAFETY: the caller's promise.
    unsafe {
        with_lanes!(isa, write_bytes_with_in(place: Place<'_>, multipliers: &[f32], bounds: Bounds, added: Added));
    }
}

#[inline(always)]
unsafe fn write_bytes_with_in<L: ByteLanes>(place: Place<'_>, multipliers: &[f32], bounds: Bounds, added: Added) {
    for (at, lanes) in place.registers(L::WIDTH) {
        // SAFETY: the caller's promise.
        unsafe {
            let (min, max) = (L::splat(bounds.min), L::splat(bounds.max));
            let (offset, factor) = (L::splat(added.offset), L::splat(added.multiplier));
            let multiplier = L::load(multipliers.as_ptr().add(at));
            for row in 0..place.rows {
                let mut value = L::from_integers(place.sums.as_ptr().add(row * place.width + at)).mul(multiplier);
                if added.rounds {
                    value = value.at_least(L::splat(added.min)).at_most(L::splat(added.max)).round();
                    value = value.mul(L::splat(added.rounded_multiplier));
                }
                let index = row * place.pitch + at;
                let residual = L::from_bytes(added.residual.add(index), added.flip, lanes);
                value = value.add(residual.add(offset).mul(factor));
                value.at_least(min).at_most(max).store_bytes(bounds.zero_point, place.to.add(index), lanes);
            }
        }
    }
}
