//! The inner loop of dense products: rows of activations times a panel of weights.
//!
//! A panel is the weights of up to four sixteens of output channels, packed so that the loop reads them from one end to
//! the other: for each group of four terms, for each sixteen, a line of four weights a channel. A row of activations is
//! read where it lies, as segments at the same distances from each row's start, so a convolution needs no matrix of
//! patches. A block of sums stays in registers over all terms.

use bytemuck::{Pod, Zeroable};

use super::dot::{Dot, DotIsa, GROUP, LANES, LINE, with_dot};

/// Bytes that lie together and are multiplied with consecutive weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Segment {
    /// From the start of the row.
    pub(super) offset: usize,
    /// Terms. Bytes up to the next multiple of [`GROUP`] are read too, and multiplied with zero.
    pub(super) len: usize,
}

impl Segment {
    pub(super) fn groups(&self) -> usize {
        self.len.div_ceil(GROUP)
    }
}

/// A line of packed weights, aligned so that no load crosses a cache line.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([i8; LINE]);

impl Line {
    /// Of `weight(channel, term)`.
    pub(super) fn of(weight: impl Fn(usize, usize) -> i8) -> Line {
        Line(std::array::from_fn(|at| weight(at / GROUP, at % GROUP)))
    }
}

/// Consecutive output channels that are computed together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Panel {
    pub(super) start: usize,
    /// Channels that exist.
    pub(super) used: usize,
    /// Sixteens of channels.
    pub(super) vectors: usize,
}

impl Panel {
    /// Channels with those that only fill up the last sixteen.
    pub(super) fn width(&self) -> usize {
        self.vectors * LANES
    }
}

/// Cuts so many channels into panels of nearly equal width.
pub(super) fn panels(isa: DotIsa, channels: usize) -> Vec<Panel> {
    let vectors = channels.div_ceil(LANES);
    let count = vectors.div_ceil(isa.vectors_max());
    let mut out = Vec::with_capacity(count);
    let mut done = 0;
    for index in 0..count {
        let vectors = (vectors - done).div_ceil(count - index);
        let start = done * LANES;
        out.push(Panel { start, used: (channels - start).min(vectors * LANES), vectors });
        done += vectors;
    }
    out
}

/// Lines of a panel of so many sixteens.
pub(super) fn panel_lines(segments: &[Segment], vectors: usize) -> usize {
    segments.iter().map(Segment::groups).sum::<usize>() * vectors
}

/// Packs a panel: `weight(channel, segment, term)` with the channel counted from the panel's start.
pub(super) fn pack_panel(
    panel: Panel,
    segments: &[Segment],
    lines: &mut [Line],
    weight: impl Fn(usize, usize, usize) -> i8,
) {
    let mut lines = lines.iter_mut();
    for (index, segment) in segments.iter().enumerate() {
        for group in 0..segment.groups() {
            for vector in 0..panel.vectors {
                let Some(line) = lines.next() else { return };
                *line = Line::of(|lane, term| {
                    let (channel, term) = (vector * LANES + lane, group * GROUP + term);
                    if channel < panel.used && term < segment.len { weight(channel, index, term) } else { 0 }
                });
            }
        }
    }
}

/// Rows of activations and the panel that they are multiplied with.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) input: &'a [u8],
    /// Where each row starts in the input.
    pub(super) starts: &'a [usize],
    pub(super) segments: &'a [Segment],
    pub(super) lines: &'a [Line],
    pub(super) vectors: usize,
    /// What the sums of each channel of the panel begin with.
    pub(super) addends: &'a [i32],
}

/// `sums[row][channel] = addends[channel] + Σ input * weights`, modulo 2^32, for all rows and the whole width of the panel.
///
/// # Panics
/// If a slice is too short for what the numbers say.
pub(super) fn multiply_rows(isa: DotIsa, rows: Rows<'_>, sums: &mut [i32]) {
    let Rows { input, starts, segments, lines, vectors, addends } = rows;
    let Some(start_max) = starts.iter().max() else { return };
    let reach = segments.iter().map(|s| s.offset + s.groups() * GROUP).max().unwrap_or(0);
    assert!(isa.is_there() && (1..=isa.vectors_max()).contains(&vectors), "{isa:?} has no blocks of {vectors} vectors");
    assert!(input.len() >= start_max + reach, "input of {} bytes is short", input.len());
    assert!(lines.len() >= panel_lines(segments, vectors));
    assert!(addends.len() >= vectors * LANES && sums.len() >= starts.len() * vectors * LANES);
    // SAFETY: the processor has the instruction set; reads of the input end at `start + offset + groups * GROUP`, those
    // of the lines and addends and writes of sums where the assertions say.
    unsafe {
        with_dot!(isa, multiply_in(isa: DotIsa, rows: Rows<'_>, sums: &mut [i32]));
    }
}

/// Takes from the sums of [`multiply_rows`] the zero point of each channel's weights times the sum of the inputs.
pub(super) fn subtract_zero_points(rows: Rows<'_>, zero_points: &[i32], sums: &mut [i32]) {
    for (start, sums) in rows.starts.iter().zip(sums.chunks_exact_mut(rows.vectors * LANES)) {
        let total = rows.segments.iter().fold(0u32, |total, segment| {
            let bytes = &rows.input[start + segment.offset..][..segment.len];
            total.wrapping_add(bytes.iter().fold(0, |sum, byte| sum.wrapping_add(u32::from(*byte))))
        });
        for (sum, zero_point) in sums.iter_mut().zip(zero_points) {
            *sum = sum.wrapping_sub((total as i32).wrapping_mul(*zero_point));
        }
    }
}

#[inline(always)]
unsafe fn multiply_in<D: Dot>(isa: DotIsa, rows: Rows<'_>, sums: &mut [i32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match rows.vectors {
            1 => multiply_vectors::<D, 1>(isa, rows, sums),
            2 => multiply_vectors::<D, 2>(isa, rows, sums),
            3 => multiply_vectors::<D, 3>(isa, rows, sums),
            _ => multiply_vectors::<D, 4>(isa, rows, sums),
        }
    }
}

#[inline(always)]
unsafe fn multiply_vectors<D: Dot, const VECTORS: usize>(isa: DotIsa, rows: Rows<'_>, sums: &mut [i32]) {
    if VECTORS > isa.vectors_max() {
        unreachable!("blocks of {VECTORS} vectors");
    }
    let rows_max = isa.rows_max(VECTORS);
    let mut starts = rows.starts;
    let mut to = sums.as_mut_ptr();
    while !starts.is_empty() {
        // Equal parts rather than full blocks and a rest: a block of one row waits for its own sums.
        let parts = starts.len().div_ceil(rows_max);
        let (block, rest) = starts.split_at(starts.len().div_ceil(parts));
        // SAFETY: the caller's promise; the sums have a row for each start.
        unsafe {
            match block.len() {
                1 => multiply_block::<D, VECTORS, 1>(rows, block, to),
                2 => multiply_block::<D, VECTORS, 2>(rows, block, to),
                3 => multiply_block::<D, VECTORS, 3>(rows, block, to),
                4 => multiply_block::<D, VECTORS, 4>(rows, block, to),
                5 => multiply_block::<D, VECTORS, 5>(rows, block, to),
                6 => multiply_block::<D, VECTORS, 6>(rows, block, to),
                7 => multiply_block::<D, VECTORS, 7>(rows, block, to),
                _ => multiply_block::<D, VECTORS, 8>(rows, block, to),
            }
            to = to.add(block.len() * VECTORS * LANES);
        }
        starts = rest;
    }
}

#[inline(always)]
unsafe fn multiply_block<D: Dot, const VECTORS: usize, const ROWS: usize>(
    rows: Rows<'_>,
    starts: &[usize],
    to: *mut i32,
) {
    // No instruction set has the registers: the match above names such blocks only because it is generic.
    if VECTORS * ROWS > 24 || starts.len() != ROWS {
        unreachable!("{ROWS} rows of {VECTORS} vectors");
    }
    // SAFETY: the caller's promise; every access lies in the rows, lines, addends or sums.
    unsafe {
        let inputs: [*const u8; ROWS] = std::array::from_fn(|row| rows.input.as_ptr().add(starts[row]));
        let addends: [D::Sums; VECTORS] = std::array::from_fn(|v| D::load(rows.addends.as_ptr().add(v * LANES)));
        let mut sums = [addends; ROWS];
        let mut lines = rows.lines.as_ptr().cast::<i8>();
        for segment in rows.segments {
            let mut at = segment.offset;
            for _ in 0..segment.groups() {
                let mut weights: [D::Weights; VECTORS] = [D::weights(lines); VECTORS];
                for v in 1..VECTORS {
                    weights[v] = D::weights(lines.add(v * LINE));
                }
                for row in 0..ROWS {
                    let group = D::group(inputs[row].add(at));
                    for v in 0..VECTORS {
                        sums[row][v] = D::dot(sums[row][v], group, weights[v]);
                    }
                }
                lines = lines.add(VECTORS * LINE);
                at += GROUP;
            }
        }
        for row in 0..ROWS {
            for v in 0..VECTORS {
                D::store(sums[row][v], to.add((row * VECTORS + v) * LANES));
            }
        }
    }
}
