//! Convolutions with one input and one output channel in each group.
//!
//! A sum has few terms, one for each tap, and its bytes lie far apart. So bytes are brought together first: for each
//! column of the input, four rows of it interleaved, a group of four for each of sixteen channels. A column serves all taps along the
//! width, and, where the rows of taps leave room in a group, several output rows, whose weights are shifted in it:
//!
//! ```text
//! 3 rows of taps, stride 1:   input row    0   1   2   3
//!                             output row 0 w0  w1  w2  0
//!                             output row 1 0   w0  w1  w2
//! ```

use super::Bytes;
use super::dot::{Dot, DotIsa, GROUP, LANES, LINE, with_dot};
use super::finish::{Block, Finisher};
use super::panel::{Line, Panel};
use crate::cpu::conv::ConvGeometry;
use crate::cpu::kernel::{Pool, Shared};

/// Sixteens of channels that are computed together: a cache line of input.
const VECTORS_MAX: usize = 4;

/// Output positions whose sums are finished together.
const CHUNK: usize = 28;

/// Tiles that are enough for any number of threads we expect.
const TILES: usize = 16;

/// A depthwise convolution with packed weights.
pub(super) struct Depthwise {
    isa: DotIsa,
    geometry: ConvGeometry,
    /// Added to the bytes by exclusive or, to make them unsigned.
    flip: u8,
    /// Distances in depth and height, from an output row's first one, of the input rows that a pass reads.
    rows: Vec<[usize; 2]>,
    /// Output rows that a pass writes.
    passes: usize,
    panels: Vec<Panel>,
    /// For each panel, output row of a pass, sixteen of channels, group of rows, tap along the width.
    lines: Vec<Line>,
    tile_rows: usize,
}

/// What a run of [`Depthwise`] reads and writes.
pub(super) struct DepthwiseRun<'a> {
    /// Channels last.
    pub(super) input: &'a [u8],
    /// The input's zero point, as an unsigned byte.
    pub(super) padding: u8,
    /// What the sums begin with, for each channel, and zeros up to the next multiple of [`LANES`].
    pub(super) addends: &'a [i32],
    pub(super) finisher: &'a Finisher,
    pub(super) residual: &'a [u8],
}

impl Depthwise {
    /// Whether it covers this geometry.
    pub(super) fn covers(geometry: &ConvGeometry) -> bool {
        geometry.groups > 1 && geometry.groups == geometry.input_channels && geometry.groups == geometry.output_channels
    }

    /// Plans it; `weight(channel, tap)`.
    pub(super) fn new(
        isa: DotIsa,
        geometry: &ConvGeometry,
        input: Bytes,
        weight: impl Fn(usize, usize) -> i8,
    ) -> Depthwise {
        let g = geometry;
        let tap_rows = g.kernel[0] * g.kernel[1];
        // More output rows in a pass, as long as that needs no more groups.
        let room = tap_rows.next_multiple_of(GROUP) - tap_rows;
        let plain = g.kernel[0] == 1 && g.dilation[1] == 1 && g.output[0] == 1;
        let passes = if plain { (room / g.stride[1] + 1).min(GROUP) } else { 1 };
        let rows = if passes > 1 {
            (0..(passes - 1) * g.stride[1] + g.kernel[1]).map(|row| [0, row]).collect()
        } else {
            let row = |tap: usize| [tap / g.kernel[1] * g.dilation[0], tap % g.kernel[1] * g.dilation[1]];
            (0..tap_rows).map(row).collect::<Vec<_>>()
        };
        let channels = g.output_channels;
        let width = VECTORS_MAX * LANES;
        let panels: Vec<Panel> = (0..channels.div_ceil(width))
            .map(|index| {
                let used = (channels - index * width).min(width);
                Panel { start: index * width, used, vectors: used.div_ceil(LANES) }
            })
            .collect();
        let groups = rows.len().div_ceil(GROUP);
        let mut lines = Vec::new();
        for panel in &panels {
            for pass in 0..passes {
                for vector in 0..panel.vectors {
                    for (group, wide) in (0..groups * g.kernel[2]).map(|i| (i / g.kernel[2], i % g.kernel[2])) {
                        lines.push(Line::of(|lane, term| {
                            let channel = panel.start + vector * LANES + lane;
                            let tap_row = (group * GROUP + term).checked_sub(pass * g.stride[1]);
                            match tap_row {
                                Some(row) if row < tap_rows && channel < channels => {
                                    weight(channel, row * g.kernel[2] + wide)
                                }
                                _ => 0,
                            }
                        }));
                    }
                }
            }
        }
        let all_rows = g.batch * g.output[0] * g.output[1];
        let tile_rows = (all_rows.div_ceil(TILES)).next_multiple_of(passes).clamp(1, 64);
        let flip = if input.signed { 0x80 } else { 0 };
        Depthwise { isa, geometry: g.clone(), flip, rows, passes, panels, lines, tile_rows }
    }

    /// Columns of the input that a chunk of so many outputs reads.
    fn columns(&self, outputs: usize) -> usize {
        let g = &self.geometry;
        outputs.saturating_sub(1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2] + 1
    }

    fn chunk(&self) -> usize {
        let wide = self.geometry.output[2];
        wide.div_ceil(wide.div_ceil(CHUNK).max(1))
    }

    /// Bytes of scratch for each worker.
    pub(super) fn scratch_bytes(&self) -> usize {
        self.rows.len().div_ceil(GROUP) * self.columns(self.chunk()) * VECTORS_MAX * LINE
    }

    /// Computes the output, channels last.
    pub(super) fn run(&self, pool: &Pool, run: &DepthwiseRun<'_>, scratch: &mut [u8], output: &mut [u8]) {
        let g = &self.geometry;
        let cuts = g.output[1].div_ceil(self.tile_rows);
        let shared = Shared::new(output);
        pool.for_each_with_scratch(g.batch * g.output[0] * cuts, scratch, |index, scratch| {
            let (plane, cut) = (index / cuts, index % cuts);
            let end = ((cut + 1) * self.tile_rows).min(g.output[1]);
            for row in (cut * self.tile_rows..end).step_by(self.passes) {
                self.rows_at(run, [plane / g.output[0], plane % g.output[0], row], end, scratch, &shared);
            }
        });
    }

    /// Computes the output rows of a pass that lie below `end`.
    fn rows_at(
        &self,
        run: &DepthwiseRun<'_>,
        [image, depth, row]: [usize; 3],
        end: usize,
        scratch: &mut [u8],
        output: &Shared<'_, u8>,
    ) {
        let g = &self.geometry;
        let channels = g.input_channels;
        let wide = g.output[2];
        let chunk = self.chunk();
        let groups = self.rows.len().div_ceil(GROUP);
        let padding = [run.padding ^ self.flip; LANES];
        let sources: Vec<Option<&[u8]>> = (0..groups * GROUP)
            .map(|index| {
                let [deep, high] = self.rows.get(index)?;
                let deep = (depth * g.stride[0] + deep).wrapping_sub(g.pad_begin[0]);
                let high = (row * g.stride[1] + high).wrapping_sub(g.pad_begin[1]);
                let exists = deep < g.input[0] && high < g.input[1];
                let pitch = g.input[2] * channels;
                // To the end of the input, as the last register of a pixel may read beyond it.
                exists.then(|| &run.input[((image * g.input[0] + deep) * g.input[1] + high) * pitch..])
            })
            .collect();
        let mut sums = [0; CHUNK * VECTORS_MAX * LANES];
        let mut line = 0;
        for panel in &self.panels {
            let panel_lines = groups * g.kernel[2] * panel.vectors;
            for first in (0..wide).step_by(chunk) {
                let count = chunk.min(wide - first);
                let columns = Columns {
                    sources: &sources,
                    padding: &padding,
                    flip: self.flip,
                    first: (first * g.stride[2]) as isize - g.pad_begin[2] as isize,
                    count: self.columns(count),
                    width: g.input[2],
                    channels,
                    channel: panel.start,
                    used: panel.used,
                };
                interleave_columns(self.isa, columns, scratch);
                for pass in 0..self.passes.min(end - row) {
                    let taps = Taps {
                        columns: scratch,
                        vectors: panel.vectors,
                        groups,
                        group_columns: self.columns(count),
                        stride: g.stride[2],
                        dilation: g.dilation[2],
                        taps: g.kernel[2],
                        lines: &self.lines[line + pass * panel_lines..][..panel_lines],
                        addends: &run.addends[panel.start..][..panel.width()],
                        count,
                    };
                    let sums = &mut sums[..count * panel.width()];
                    sum_taps(self.isa, taps, sums);
                    let position = ((image * g.output[0] + depth) * g.output[1] + row + pass) * wide + first;
                    let block = Block {
                        sums,
                        width: panel.width(),
                        channel: panel.start,
                        channels: panel.used,
                        start: position * channels + panel.start,
                        pitch: channels,
                        residual: run.residual,
                    };
                    // SAFETY: each tile has output rows of its own.
                    unsafe { run.finisher.write(block, output) };
                }
            }
            line += self.passes * panel_lines;
        }
    }
}

/// Columns of the input to be interleaved, to `[group of rows][column][vector]` lines.
#[derive(Clone, Copy)]
struct Columns<'a> {
    /// Rows, each from its first byte to the end of the input or longer; four make a group.
    sources: &'a [Option<&'a [u8]>],
    /// Bytes of a row that does not exist.
    padding: &'a [u8; LANES],
    flip: u8,
    /// The first column, maybe before the input.
    first: isize,
    count: usize,
    /// Columns that exist.
    width: usize,
    channels: usize,
    channel: usize,
    /// Channels from `channel` on.
    used: usize,
}

fn interleave_columns(isa: DotIsa, columns: Columns<'_>, to: &mut [u8]) {
    let Columns { sources, count, width, channels, channel, used, .. } = columns;
    let vectors = used.div_ceil(LANES);
    assert!(isa.is_there() && to.len() >= sources.len() / GROUP * count * vectors * LINE);
    assert!(channel + used <= channels && sources.len().is_multiple_of(GROUP));
    assert!(sources.iter().flatten().all(|row| row.len() >= width * channels));
    // SAFETY: the processor has the instruction set; the rows have all columns that exist, of `channels` bytes; writes
    // are as many lines as the first assertion says.
    unsafe {
        with_dot!(isa, interleave_columns_in(columns: Columns<'_>, to: &mut [u8]));
    }
}

#[inline(always)]
unsafe fn interleave_columns_in<D: Dot>(columns: Columns<'_>, to: &mut [u8]) {
    let Columns { sources, padding, flip, first, count, width, channels, channel, used } = columns;
    let vectors = used.div_ceil(LANES);
    let mut to = to.as_mut_ptr();
    for rows in sources.chunks_exact(GROUP) {
        // Columns whose registers end inside every row's memory.
        let shortest = rows.iter().flatten().map(|row| row.len()).min().unwrap_or(usize::MAX);
        let steps: [usize; GROUP] = std::array::from_fn(|j| if rows[j].is_some() { channels } else { 0 });
        for column in first..first + count as isize {
            let exists = column >= 0 && (column as usize) < width;
            let at = if exists { column as usize } else { 0 };
            for vector in 0..vectors {
                let offset = channel + vector * LANES;
                // SAFETY: the caller's promise; a register that would end beyond a row's memory is filled from a copy.
                unsafe {
                    if !exists {
                        let from = [padding.as_ptr(); GROUP];
                        D::interleave(from, flip, to);
                    } else if at * channels + offset + LANES <= shortest {
                        let from = std::array::from_fn(|j| match rows[j] {
                            Some(row) => row.as_ptr().add(at * steps[j] + offset),
                            None => padding.as_ptr(),
                        });
                        D::interleave(from, flip, to);
                    } else {
                        let mut copies = [*padding; GROUP];
                        let lanes = LANES.min(channel + used - offset);
                        for (copy, row) in copies.iter_mut().zip(rows) {
                            if let Some(row) = row {
                                copy[..lanes].copy_from_slice(&row[at * channels + offset..][..lanes]);
                            }
                        }
                        D::interleave(copies.each_ref().map(|copy| copy.as_ptr()), flip, to);
                    }
                    to = to.add(LINE);
                }
            }
        }
    }
}

/// Interleaved columns and the weights of one output row.
#[derive(Clone, Copy)]
struct Taps<'a> {
    columns: &'a [u8],
    vectors: usize,
    groups: usize,
    /// Columns of each group.
    group_columns: usize,
    stride: usize,
    dilation: usize,
    /// Along the width.
    taps: usize,
    /// For each vector, group and tap.
    lines: &'a [Line],
    /// For each channel of the vectors.
    addends: &'a [i32],
    /// Outputs.
    count: usize,
}

/// `sums[output][vector]`, from the columns that its taps reach.
fn sum_taps(isa: DotIsa, taps: Taps<'_>, sums: &mut [i32]) {
    let Taps { columns, vectors, groups, group_columns, stride, dilation, lines, addends, count, .. } = taps;
    assert!(isa.is_there() && count > 0 && taps.taps > 0);
    assert!(group_columns > (count - 1) * stride + (taps.taps - 1) * dilation);
    assert!(columns.len() >= groups * group_columns * vectors * LINE);
    assert!(lines.len() >= vectors * groups * taps.taps);
    assert!(addends.len() >= vectors * LANES && sums.len() >= count * vectors * LANES);
    // SAFETY: the processor has the instruction set, and the assertions cover all that is read and written.
    unsafe {
        with_dot!(isa, sum_taps_in(taps: Taps<'_>, sums: &mut [i32]));
    }
}

#[inline(always)]
unsafe fn sum_taps_in<D: Dot>(taps: Taps<'_>, sums: &mut [i32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match taps.groups * taps.taps {
            3 => sum_some_taps::<D, 3>(taps, sums),
            10 => sum_some_taps::<D, 10>(taps, sums),
            _ => sum_any_taps::<D>(taps, sums),
        }
    }
}

/// Where the columns of a tap begin, from those of an output's first one.
#[inline(always)]
fn tap_offset(taps: &Taps<'_>, tap: usize) -> usize {
    (tap / taps.taps * taps.group_columns + tap % taps.taps * taps.dilation) * taps.vectors * LINE
}

#[inline(always)]
unsafe fn sum_some_taps<D: Dot, const TAPS: usize>(taps: Taps<'_>, sums: &mut [i32]) {
    let offsets: [usize; TAPS] = std::array::from_fn(|tap| tap_offset(&taps, tap));
    for vector in 0..taps.vectors {
        // SAFETY: the caller's promise.
        unsafe {
            let lines = taps.lines.as_ptr().add(vector * TAPS).cast::<i8>();
            let weights: [D::Weights; TAPS] = std::array::from_fn(|tap| D::weights(lines.add(tap * LINE)));
            let addend = D::load(taps.addends.as_ptr().add(vector * LANES));
            let columns = taps.columns.as_ptr().add(vector * LINE);
            let to = sums.as_mut_ptr().add(vector * LANES);
            for output in 0..taps.count {
                let columns = columns.add(output * taps.stride * taps.vectors * LINE);
                let mut sum = addend;
                for tap in 0..TAPS {
                    sum = D::dot_each(sum, D::each(columns.add(offsets[tap])), weights[tap]);
                }
                D::store(sum, to.add(output * taps.vectors * LANES));
            }
        }
    }
}

#[inline(always)]
unsafe fn sum_any_taps<D: Dot>(taps: Taps<'_>, sums: &mut [i32]) {
    let count = taps.groups * taps.taps;
    for vector in 0..taps.vectors {
        // SAFETY: the caller's promise.
        unsafe {
            let lines = taps.lines.as_ptr().add(vector * count).cast::<i8>();
            let addend = D::load(taps.addends.as_ptr().add(vector * LANES));
            let columns = taps.columns.as_ptr().add(vector * LINE);
            let to = sums.as_mut_ptr().add(vector * LANES);
            for output in 0..taps.count {
                let columns = columns.add(output * taps.stride * taps.vectors * LINE);
                let mut sum = addend;
                for tap in 0..count {
                    let weights = D::weights(lines.add(tap * LINE));
                    sum = D::dot_each(sum, D::each(columns.add(tap_offset(&taps, tap))), weights);
                }
                D::store(sum, to.add(output * taps.vectors * LANES));
            }
        }
    }
}
