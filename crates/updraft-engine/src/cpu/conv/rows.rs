//! Moving rows between tensors and scratch: into the packed input with zeros around, and out of the results with bias,
//! residual and activation. Rows are often shorter than a cache line, so a call to copy memory would cost more than the
//! copy.

use super::{Activation, Epilogue};
use crate::cpu::isa::{self, Isa};
use crate::cpu::lanes::{LANES_MAX, Lanes, with_lanes};

/// Rows to be copied to `to[row * pitch..][..pitch]` with zeros around.
#[derive(Debug, Clone, Copy)]
pub(super) struct PaddedRows {
    pub(super) count: usize,
    pub(super) pitch: usize,
    /// Zeros before a row's numbers.
    pub(super) lead: usize,
    /// Numbers of a row, from every `stride`-th of the source; at least 1.
    pub(super) width: usize,
    pub(super) stride: usize,
    /// From the first number of one row of the source to that of the next.
    pub(super) source_pitch: usize,
}

/// From this width on the library's copy, which aligns its stores, is the faster one.
const LONG_ROW: usize = 64;

/// Copies rows with zeros around them.
///
/// # Panics
/// If a slice is too short for what the numbers say.
pub(super) fn copy_padded_rows(isa: Isa, rows: PaddedRows, source: &[f32], to: &mut [f32]) {
    if rows.count == 0 {
        return;
    }
    assert!(isa <= isa::detected(), "{isa:?} is not there");
    assert!(rows.width >= 1 && rows.lead + rows.width <= rows.pitch && to.len() >= rows.count * rows.pitch);
    assert!(source.len() > (rows.count - 1) * rows.source_pitch + (rows.width - 1) * rows.stride);
    if rows.stride == 1 && rows.width >= LONG_ROW {
        for (row, to) in to.chunks_exact_mut(rows.pitch).take(rows.count).enumerate() {
            let end = rows.lead + rows.width;
            to[..rows.lead].fill(0.0);
            to[rows.lead..end].copy_from_slice(&source[row * rows.source_pitch..][..rows.width]);
            to[end..].fill(0.0);
        }
        return;
    }
    if rows.stride > 2 {
        for (row, to) in to.chunks_exact_mut(rows.pitch).take(rows.count).enumerate() {
            to.fill(0.0);
            let source = source[row * rows.source_pitch..].iter().step_by(rows.stride);
            to[rows.lead..rows.lead + rows.width].iter_mut().zip(source).for_each(|(to, from)| *to = *from);
        }
        return;
    }
    // SAFETY: the instruction set is there; reads end with the last row's last number, writes with the last row's
    // pitch, both inside by the assertions.
    unsafe {
        with_lanes!(isa, copy_padded_rows_in(rows: PaddedRows, source: &[f32], to: &mut [f32]));
    }
}

#[inline(always)]
unsafe fn copy_padded_rows_in<L: Lanes>(rows: PaddedRows, source: &[f32], to: &mut [f32]) {
    let PaddedRows { count, pitch, lead, width, stride, source_pitch } = rows;
    // Column by column: which lanes exist is worked out once for all rows.
    for column in (0..pitch).step_by(L::WIDTH) {
        let first = lead.saturating_sub(column).min(L::WIDTH);
        let end = (lead + width).saturating_sub(column).clamp(first, L::WIDTH);
        let rest = (pitch - column).min(L::WIDTH);
        // What lies before lane `first` may be before the source, and is not read.
        let from = source.as_ptr().wrapping_add(column * stride).wrapping_sub(lead * stride);
        let to = to.as_mut_ptr().wrapping_add(column);
        // SAFETY: lanes from `first` to `end` are numbers of the row, and lanes below `rest` its place.
        unsafe {
            if stride == 2 {
                for row in 0..count {
                    let lanes = L::load_even_part(from.wrapping_add(row * source_pitch), first, end);
                    lanes.store_part(to.wrapping_add(row * pitch), rest);
                }
            } else if first == 0 && end == L::WIDTH {
                for row in 0..count {
                    L::load(from.wrapping_add(row * source_pitch)).store(to.wrapping_add(row * pitch));
                }
            } else {
                for row in 0..count {
                    let lanes = L::load_part(from.wrapping_add(row * source_pitch), first, end);
                    lanes.store_part(to.wrapping_add(row * pitch), rest);
                }
            }
        }
    }
}

/// Rows of results and where they go.
#[derive(Debug, Clone, Copy)]
pub(super) struct ResultRows {
    pub(super) count: usize,
    /// At least 1.
    pub(super) width: usize,
    pub(super) pitch: usize,
    pub(super) to_pitch: usize,
    /// From one number of a row to the next.
    pub(super) to_step: usize,
}

impl ResultRows {
    /// From the first number that is written to the last, both included.
    pub(super) fn span(&self) -> usize {
        (self.count - 1) * self.to_pitch + (self.width - 1) * self.to_step + 1
    }
}

/// Writes rows with bias, residual and activation; the residual lies as `to` does.
///
/// # Panics
/// If a slice is too short for what the numbers say.
pub(super) fn write_rows(isa: Isa, from: &[f32], rows: ResultRows, bias: f32, epilogue: Epilogue<'_>, to: &mut [f32]) {
    assert!(isa <= isa::detected(), "{isa:?} is not there");
    assert!(rows.count >= 1 && rows.width >= 1 && to.len() >= rows.span());
    assert!(from.len() >= (rows.count - 1) * rows.pitch + rows.width);
    assert!(epilogue.residual.is_none_or(|residual| residual.len() >= rows.span()));
    // SAFETY: the instruction set is there; reads and writes stay within the rows, which the assertions found inside.
    unsafe {
        with_lanes!(
            isa,
            write_rows_in(from: &[f32], rows: ResultRows, bias: f32, epilogue: Epilogue<'_>, to: &mut [f32])
        );
    }
}

#[inline(always)]
unsafe fn write_rows_in<L: Lanes>(from: &[f32], rows: ResultRows, bias: f32, epilogue: Epilogue<'_>, to: &mut [f32]) {
    let ResultRows { count, width, pitch, to_pitch, to_step } = rows;
    let (low, high) = match epilogue.activation {
        Activation::None => (f32::NEG_INFINITY, f32::INFINITY),
        Activation::Relu => (0.0, f32::INFINITY),
        Activation::Clip { min, max } => (min, max),
    };
    // SAFETY: the caller's promise: lanes below `width` of every row exist on all sides.
    unsafe {
        let (bias, low, high) = (L::splat(bias), L::splat(low), L::splat(high));
        for column in (0..width).step_by(L::WIDTH) {
            let end = (width - column).min(L::WIDTH);
            let from = from.as_ptr().add(column);
            let start = column * to_step;
            for row in 0..count {
                let (from, start) = (from.add(row * pitch), start + row * to_pitch);
                let mut lanes = L::load_part(from, 0, end).add(bias);
                if let Some(residual) = epilogue.residual {
                    lanes = lanes.add(load_strided(residual.as_ptr().add(start), to_step, end));
                }
                lanes = lanes.at_least(low).at_most(high);
                let to = to.as_mut_ptr().add(start);
                match to_step {
                    1 if end == L::WIDTH => lanes.store(to),
                    1 => lanes.store_part(to, end),
                    2 => lanes.store_even_part(to, end),
                    _ => {
                        let mut numbers = [0.0; LANES_MAX];
                        lanes.store(numbers.as_mut_ptr());
                        for lane in 0..end {
                            *to.add(lane * to_step) = numbers[lane];
                        }
                    }
                }
            }
        }
    }
}

/// Lane `l` below `end` from number `step * l`.
#[inline(always)]
unsafe fn load_strided<L: Lanes>(from: *const f32, step: usize, end: usize) -> L {
    // SAFETY: the caller's promise that these numbers exist.
    unsafe {
        match step {
            1 => L::load_part(from, 0, end),
            2 => L::load_even_part(from, 0, end),
            _ => {
                let mut numbers = [0.0; LANES_MAX];
                for lane in 0..end {
                    numbers[lane] = *from.add(lane * step);
                }
                L::load(numbers.as_ptr())
            }
        }
    }
}
