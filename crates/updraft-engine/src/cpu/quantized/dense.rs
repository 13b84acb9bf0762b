//! Convolutions that sum over channels: rows of a product are output positions.
//!
//! With the channels last, the inputs of one output position are a few segments of memory: one for each tap, or one for
//! each row of taps, since the pixels of a row lie together. The input is read where it is if no position needs padding;
//! otherwise each tile first copies the part it needs, with the zero point around it, which costs little beside a
//! product with all output channels.
//!
//! A tile is a range of output rows of one image, of all rows of a pointwise convolution, times some panels of weights.

use super::Bytes;
use super::dot::{DotIsa, LANES};
use super::finish::{Block, Finisher};
use super::panel::{Line, Panel, Rows, Segment, multiply_rows, pack_panel, panel_lines, panels, subtract_zero_points};
use crate::cpu::conv::ConvGeometry;
use crate::cpu::kernel::{Pool, Shared};

/// Rows that are multiplied before their sums are finished: a multiple of all heights of blocks, and the sums stay in
/// the nearest cache.
const BATCH_ROWS: usize = 48;

/// Bytes of input that a tile may read, so that they stay in a core's own cache while all panels pass.
const TILE_BYTES: usize = 128 << 10;

/// Terms (products) that a tile is worth being cut for.
const TILE_TERMS: usize = 1 << 20;

/// Tiles that are enough for any number of threads we expect.
const TILES: usize = 16;

/// Positions below which a tile would read its weights too often.
const TILE_POSITIONS_MIN: usize = BATCH_ROWS;

/// The part of a plan that depends on the geometry and the weights, not on the numbers around them.
pub(super) struct Dense {
    isa: DotIsa,
    geometry: ConvGeometry,
    /// Added to the bytes by exclusive or, to make them unsigned.
    flip: u8,
    in_place: bool,
    /// The axis that is cut into tiles; those before it have one position.
    cut: usize,
    /// Positions on that axis of a full tile.
    units: usize,
    /// Extents of the input that a full tile reads, with padding.
    extents: [usize; 3],
    segments: Vec<Segment>,
    panels: Vec<Panel>,
    /// Of all panels of a group.
    group_lines: usize,
    /// Pairs of group and panel in a tile.
    pieces: usize,
    lines: Vec<Line>,
}

/// What a run of [`Dense`] reads and writes.
pub(super) struct DenseRun<'a> {
    /// Channels last.
    pub(super) input: &'a [u8],
    /// The input's zero point, as an unsigned byte.
    pub(super) padding: u8,
    /// What the sums begin with, `width` for each panel of each group.
    pub(super) addends: &'a [i32],
    /// Zero points of the weights of each output channel, where there are any.
    pub(super) weight_zero_points: Option<&'a [i32]>,
    pub(super) finisher: &'a Finisher,
    pub(super) residual: &'a [u8],
}

impl Dense {
    /// Plans it; `weight(output channel, input channel of the group, tap)`.
    pub(super) fn new(
        isa: DotIsa,
        geometry: &ConvGeometry,
        input: Bytes,
        weight: impl Fn(usize, usize, usize) -> i8,
    ) -> Dense {
        let geometry = flattened(geometry);
        let channels = geometry.input_channels;
        let (inputs, outputs) = (channels / geometry.groups, geometry.output_channels / geometry.groups);
        let merged = geometry.groups == 1 && geometry.dilation[2] == 1;
        let run = if merged { geometry.kernel[2] * inputs } else { inputs };
        let in_place = !input.signed && !is_padded(&geometry) && run % 4 == 0;
        let cut = (0..2).find(|axis| geometry.output[*axis] > 1).unwrap_or(2);
        let panels = panels(isa, outputs);
        let mut dense = Dense {
            isa,
            flip: if input.signed { 0x80 } else { 0 },
            in_place,
            cut,
            units: 0,
            extents: geometry.input,
            segments: Vec::new(),
            group_lines: 0,
            pieces: 0,
            lines: Vec::new(),
            panels,
            geometry,
        };
        dense.cut_tiles();
        if !in_place {
            dense.extents = std::array::from_fn(|axis| {
                dense.reach(axis, if axis == cut { dense.units } else { dense.geometry.output[axis] })
            });
        }
        dense.place_segments(merged);
        dense.pack(merged, weight);
        dense
    }

    /// Inputs on an axis that so many outputs read.
    fn reach(&self, axis: usize, outputs: usize) -> usize {
        let g = &self.geometry;
        outputs.saturating_sub(1) * g.stride[axis] + (g.kernel[axis] - 1) * g.dilation[axis] + 1
    }

    fn cut_tiles(&mut self) {
        let g = &self.geometry;
        let axis = self.cut;
        let unit_positions: usize = g.output[axis + 1..].iter().product();
        let unit_bytes =
            g.stride[axis] * (axis + 1..3).map(|a| self.reach(a, g.output[a])).product::<usize>() * g.input_channels;
        let positions = g.batch * g.output.iter().product::<usize>();
        let terms = positions * g.weights_len();
        let wanted = (terms / TILE_TERMS).clamp(1, TILES);
        let for_cache = TILE_BYTES / unit_bytes.max(1);
        let for_threads = (g.batch * g.output[axis] / wanted).max(TILE_POSITIONS_MIN.div_ceil(unit_positions));
        let units = for_cache.min(for_threads).clamp(1, g.output[axis]);
        // Equal tiles rather than full ones and a rest.
        self.units = g.output[axis].div_ceil(g.output[axis].div_ceil(units));
        let pieces = g.groups * self.panels.len();
        let tiles = g.batch * g.output[axis].div_ceil(self.units);
        self.pieces = pieces.div_ceil(wanted.div_ceil(tiles).min(pieces).max(1));
    }

    fn place_segments(&mut self, merged: bool) {
        let g = &self.geometry;
        let [_, height, width] = self.extents;
        let inputs = g.input_channels / g.groups;
        for depth in 0..g.kernel[0] {
            for high in 0..g.kernel[1] {
                let row = (depth * g.dilation[0] * height + high * g.dilation[1]) * width;
                if merged {
                    self.segments.push(Segment { offset: row * inputs, len: g.kernel[2] * inputs });
                } else {
                    for wide in 0..g.kernel[2] {
                        let offset = (row + wide * g.dilation[2]) * g.input_channels;
                        self.segments.push(Segment { offset, len: inputs });
                    }
                }
            }
        }
    }

    fn pack(&mut self, merged: bool, weight: impl Fn(usize, usize, usize) -> i8) {
        let g = &self.geometry;
        let (inputs, outputs) = (g.input_channels / g.groups, g.output_channels / g.groups);
        self.group_lines = self.panels.iter().map(|p| panel_lines(&self.segments, p.vectors)).sum();
        self.lines = vec![bytemuck::Zeroable::zeroed(); self.group_lines * g.groups];
        let mut rest = self.lines.as_mut_slice();
        for group in 0..g.groups {
            for panel in &self.panels {
                let (lines, others) = rest.split_at_mut(panel_lines(&self.segments, panel.vectors));
                pack_panel(*panel, &self.segments, lines, |channel, segment, term| {
                    let (input, tap) =
                        if merged { (term % inputs, segment * g.kernel[2] + term / inputs) } else { (term, segment) };
                    weight(group * outputs + panel.start + channel, input, tap)
                });
                rest = others;
            }
        }
    }

    /// Numbers in [`DenseRun::addends`].
    pub(super) fn addends_len(&self) -> usize {
        self.geometry.groups * self.panels.iter().map(Panel::width).sum::<usize>()
    }

    /// Puts a number for each output channel where [`DenseRun::addends`] has it.
    pub(super) fn place_addends(&self, of_channel: impl Fn(usize) -> i32, addends: &mut [i32]) {
        let outputs = self.geometry.output_channels / self.geometry.groups;
        let mut addends = addends.iter_mut();
        for group in 0..self.geometry.groups {
            for panel in &self.panels {
                for (channel, to) in addends.by_ref().take(panel.width()).enumerate() {
                    *to = if channel < panel.used { of_channel(group * outputs + panel.start + channel) } else { 0 };
                }
            }
        }
    }

    /// Bytes of scratch for each worker.
    pub(super) fn scratch_bytes(&self) -> usize {
        if self.in_place {
            return 0;
        }
        // The last segment may be read a few bytes beyond its end.
        self.extents.iter().product::<usize>() * self.geometry.input_channels + super::dot::GROUP
    }

    /// Computes the output, channels last.
    pub(super) fn run(&self, pool: &Pool, run: &DenseRun<'_>, scratch: &mut [u8], output: &mut [u8]) {
        let g = &self.geometry;
        let cuts = g.output[self.cut].div_ceil(self.units);
        let parts = (g.groups * self.panels.len()).div_ceil(self.pieces);
        let shared = Shared::new(output);
        pool.for_each_with_scratch(g.batch * cuts * parts, scratch, |index, scratch| {
            let (image, cut, part) = (index / parts / cuts, index / parts % cuts, index % parts);
            let first = cut * self.units;
            let end = (first + self.units).min(g.output[self.cut]);
            let mut from = [0; 3];
            let input = if self.in_place {
                from[self.cut] = first;
                let image_bytes = g.input.iter().product::<usize>() * g.input_channels;
                &run.input[image * image_bytes..][..image_bytes]
            } else {
                self.copy(run, image, first..end, scratch);
                &*scratch
            };
            self.tile(run, input, from, [image, first, end], part, &shared);
        });
    }

    /// Copies what a tile reads, with padding around.
    fn copy(&self, run: &DenseRun<'_>, image: usize, units: std::ops::Range<usize>, to: &mut [u8]) {
        let g = &self.geometry;
        let channels = g.input_channels;
        let [_, high, wide] = self.extents;
        let mut begin = [0; 3];
        let mut extents = self.extents;
        begin[self.cut] = units.start * g.stride[self.cut];
        extents[self.cut] = self.reach(self.cut, units.len());
        let source = |axis: usize, at: usize| {
            let from = (begin[axis] + at).wrapping_sub(g.pad_begin[axis]);
            (from < g.input[axis]).then_some(from)
        };
        // Bytes of a row that exist.
        let lead = g.pad_begin[2].saturating_sub(begin[2]).min(extents[2]);
        let skipped = (begin[2] + lead).saturating_sub(g.pad_begin[2]);
        let width = g.input[2].saturating_sub(skipped).min(extents[2] - lead);
        for depth in 0..extents[0] {
            for row in 0..extents[1] {
                let to = &mut to[(depth * high + row) * wide * channels..][..extents[2] * channels];
                let (Some(from_depth), Some(from_row)) = (source(0, depth), source(1, row)) else {
                    to.fill(run.padding);
                    continue;
                };
                let (before, rest) = to.split_at_mut(lead * channels);
                let (inside, after) = rest.split_at_mut(width * channels);
                before.fill(run.padding);
                after.fill(run.padding);
                if width > 0 {
                    let from = ((image * g.input[0] + from_depth) * g.input[1] + from_row) * g.input[2] + skipped;
                    let from = &run.input[from * channels..][..inside.len()];
                    if self.flip == 0 {
                        inside.copy_from_slice(from);
                    } else {
                        inside.iter_mut().zip(from).for_each(|(to, from)| *to = from ^ self.flip);
                    }
                }
            }
        }
    }

    /// Computes output positions `first..end` of the cut axis for the panels of a part; position `first` is
    /// position `from` of the input given.
    fn tile(
        &self,
        run: &DenseRun<'_>,
        input: &[u8],
        from: [usize; 3],
        [image, first, end]: [usize; 3],
        part: usize,
        output: &Shared<'_, u8>,
    ) {
        let g = &self.geometry;
        let [_, high, wide] = self.extents;
        let channels = g.input_channels;
        let steps = [g.stride[0] * high * wide * channels, g.stride[1] * wide * channels, g.stride[2] * channels];
        let (inputs, outputs) = (channels / g.groups, g.output_channels / g.groups);
        let unit_positions: usize = g.output[self.cut + 1..].iter().product();
        let positions = (end - first) * unit_positions;
        let first_position = image * g.output.iter().product::<usize>() + first * unit_positions;
        let pieces = part * self.pieces..((part + 1) * self.pieces).min(g.groups * self.panels.len());
        let mut sums = [0; BATCH_ROWS * 4 * LANES];
        let mut starts = [0; BATCH_ROWS];
        for piece in pieces {
            let (group, index) = (piece / self.panels.len(), piece % self.panels.len());
            let panel = self.panels[index];
            let before: usize = self.panels[..index].iter().map(Panel::width).sum();
            let width: usize = before + self.panels[index..].iter().map(Panel::width).sum::<usize>();
            let addends = &run.addends[group * width + before..][..panel.width()];
            let line = group * self.group_lines + panel_lines(&self.segments, before / LANES);
            let lines = &self.lines[line..][..panel_lines(&self.segments, panel.vectors)];
            let channel = group * outputs + panel.start;
            let mut done = 0;
            let mut at = from;
            while done < positions {
                let rows = (positions - done).min(BATCH_ROWS);
                for start in &mut starts[..rows] {
                    *start = at[0] * steps[0] + at[1] * steps[1] + at[2] * steps[2] + group * inputs;
                    at[2] += 1;
                    if at[2] == g.output[2] && self.cut < 2 {
                        at[2] = 0;
                        at[1] += 1;
                        if at[1] == g.output[1] && self.cut < 1 {
                            at[1] = 0;
                            at[0] += 1;
                        }
                    }
                }
                let starts = &starts[..rows];
                let sums = &mut sums[..rows * panel.width()];
                let segments = &self.segments;
                let product = Rows { input, starts, segments, lines, vectors: panel.vectors, addends };
                multiply_rows(self.isa, product, sums);
                if let Some(zero_points) = run.weight_zero_points {
                    subtract_zero_points(product, &zero_points[channel..][..panel.used], sums);
                }
                let block = Block {
                    sums,
                    width: panel.width(),
                    channel,
                    channels: panel.used,
                    start: (first_position + done) * g.output_channels + channel,
                    pitch: g.output_channels,
                    residual: run.residual,
                };
                // SAFETY: each tile has positions or panels of its own.
                unsafe { run.finisher.write(block, output) };
                done += rows;
            }
        }
    }
}

/// A pointwise convolution as one long row of positions; others as they are.
fn flattened(geometry: &ConvGeometry) -> ConvGeometry {
    let mut out = geometry.clone();
    if geometry.kernel == [1; 3]
        && geometry.input == geometry.output
        && geometry.stride == [1; 3]
        && !is_padded(geometry)
    {
        let positions = geometry.batch * geometry.output.iter().product::<usize>();
        out.batch = 1;
        out.input = [1, 1, positions];
        out.output = [1, 1, positions];
        out.dilation = [1; 3];
    }
    out
}

/// Whether some output reads beyond the input.
fn is_padded(geometry: &ConvGeometry) -> bool {
    (0..3).any(|axis| {
        let reach = geometry.output[axis].saturating_sub(1) * geometry.stride[axis]
            + (geometry.kernel[axis] - 1) * geometry.dilation[axis]
            + 1;
        geometry.pad_begin[axis] > 0 || reach > geometry.input[axis]
    })
}
