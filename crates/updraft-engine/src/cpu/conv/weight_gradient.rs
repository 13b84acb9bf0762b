//! The gradient of a convolution's weights: the transposed product over the packed input, with the output's gradient laid
//! out at the same positions. The batch is summed in parts that depend on the shape, and the parts in order.

use super::ConvGeometry;
use super::correlation::{Correlation, Cut, Layout, Tile};
use super::product::{OuterProduct, outer_product};
use super::rows::{PaddedRows, copy_padded_rows};
use crate::cpu::isa::{self, Isa};
use crate::cpu::kernel::{Pool, Shared};

/// The gradient of a convolution's weights.
pub(crate) struct ConvWeightGradient {
    geometry: ConvGeometry,
    isa: Isa,
    correlation: Correlation,
    layout: Layout,
    offset_max: usize,
    /// Parts of the batch that are summed apart and then added in order.
    chunks: usize,
}

/// Parts of the batch: enough to keep threads even.
const CHUNKS_MAX: usize = 16;
/// Numbers of all partial sums together, where more than one part is cut: they are written and read once each.
const PARTIAL_SUMS_MAX: usize = 4 << 20;

impl ConvWeightGradient {
    /// Plans it for the geometry of the convolution itself.
    pub(crate) fn new(geometry: ConvGeometry) -> ConvWeightGradient {
        ConvWeightGradient::with_isa(geometry, isa::detected())
    }

    pub(super) fn with_isa(geometry: ConvGeometry, isa: Isa) -> ConvWeightGradient {
        let correlation = geometry.correlation();
        let layout = Layout::new(&correlation, Cut { channels: 4, in_place: false });
        let offset_max = layout.offsets.iter().max().map_or(0, |max| *max as usize);
        let (by_weights, by_batch) = layout.counts_of_weights_and_batch(&correlation);
        let chunks = (PARTIAL_SUMS_MAX / geometry.weights_len().max(1))
            .clamp(1, CHUNKS_MAX.div_ceil(by_weights))
            .min(by_batch)
            .max(1);
        ConvWeightGradient { geometry, isa, correlation, layout, offset_max, chunks }
    }

    /// Numbers of scratch for each worker.
    pub(crate) fn scratch_len(&self) -> usize {
        self.layout.packed_len(&self.correlation) + self.layout.tile_channels() * self.layout.positions_max()
    }

    /// Numbers of scratch that all workers share.
    pub(crate) fn workspace_len(&self) -> usize {
        if self.chunks == 1 { 0 } else { self.chunks * self.geometry.weights_len() }
    }

    /// The gradient of the weights from the input and the gradient of the output.
    ///
    /// # Panics
    /// If a slice is not of the planned length.
    pub(crate) fn run(
        &self,
        pool: &Pool,
        input: &[f32],
        output_gradient: &[f32],
        workspace: &mut [f32],
        scratch: &mut [f32],
        weight_gradient: &mut [f32],
    ) {
        assert_eq!(input.len(), self.geometry.input_len());
        assert_eq!(output_gradient.len(), self.geometry.output_len());
        assert_eq!(weight_gradient.len(), self.geometry.weights_len());
        assert_eq!(workspace.len(), self.workspace_len());
        if output_gradient.is_empty() {
            weight_gradient.fill(0.0);
            return;
        }
        if self.chunks == 1 {
            return self.run_chunks(pool, input, output_gradient, scratch, weight_gradient);
        }
        self.run_chunks(pool, input, output_gradient, scratch, workspace);
        let part = 4096;
        let shared = Shared::new(weight_gradient);
        let len = self.geometry.weights_len();
        pool.for_each(len.div_ceil(part), |tile| {
            let range = tile * part..((tile + 1) * part).min(len);
            // SAFETY: each tile has its own range.
            let to = unsafe { shared.range(range.clone()) };
            to.copy_from_slice(&workspace[range.clone()]);
            for chunk in 1..self.chunks {
                add_assign(to, &workspace[chunk * len..][range.clone()]);
            }
        });
    }

    /// Sums each chunk of the batch into its own copy of the weights.
    fn run_chunks(&self, pool: &Pool, input: &[f32], output_gradient: &[f32], scratch: &mut [f32], sums: &mut [f32]) {
        let depth = self.correlation.depth();
        let channels = self.correlation.output_channels;
        let (by_weights, by_batch) = self.layout.counts_of_weights_and_batch(&self.correlation);
        let packed_len = self.layout.packed_len(&self.correlation);
        let shared = Shared::new(sums);
        pool.for_each_with_scratch(by_weights * self.chunks, scratch, |index, scratch| {
            let (chunk, part) = (index / by_weights, index % by_weights);
            let (packed, errors) = scratch.split_at_mut(packed_len);
            let batches = chunk * by_batch / self.chunks..(chunk + 1) * by_batch / self.chunks;
            for (pass, batch) in batches.enumerate() {
                let tile = self.layout.tile(&self.correlation, batch * by_weights + part);
                for group in tile.groups.clone() {
                    let first = group * channels + tile.channels.start;
                    let start = chunk * self.geometry.weights_len() + first * depth;
                    // SAFETY: each chunk and part of the weights has its own range.
                    let sums = unsafe { shared.range(start..start + tile.channels.len() * depth) };
                    if pass == 0 {
                        sums.fill(0.0);
                    }
                    self.layout.pack(self.isa, &self.correlation, &tile, group, input, packed);
                    self.add_tile(&tile, group, packed, output_gradient, errors, sums);
                }
            }
        });
    }

    fn add_tile(
        &self,
        tile: &Tile,
        group: usize,
        packed: &[f32],
        output_gradient: &[f32],
        errors: &mut [f32],
        sums: &mut [f32],
    ) {
        let segments = self.layout.segments(tile);
        let starts: Vec<usize> = segments.starts().collect();
        let positions = starts.len() * segments.padded_len();
        for (row, errors) in errors.chunks_exact_mut(positions).take(tile.channels.len()).enumerate() {
            let channel = group * self.correlation.output_channels + tile.channels.start + row;
            self.spread_errors(tile, channel, output_gradient, errors);
        }
        let run = OuterProduct {
            errors,
            rows: tile.channels.len(),
            errors_pitch: positions,
            len: segments.padded_len(),
            offsets: &self.layout.offsets,
            offset_max: self.offset_max,
            input: packed,
            starts: &starts,
            sums_pitch: self.correlation.depth(),
        };
        outer_product(self.isa, run, sums);
    }

    /// Copies a channel's errors to the positions of the packed input that they belong to, with zeros between.
    fn spread_errors(&self, tile: &Tile, channel: usize, output_gradient: &[f32], errors: &mut [f32]) {
        let [depth, height, width] = self.correlation.output;
        let channels = self.geometry.output_channels;
        let pitch = self.layout.pitch;
        errors.fill(0.0);
        for (slot, image) in tile.images.clone().enumerate() {
            for slab in 0..tile.len[0] {
                let plane = (image * channels + channel) * depth + tile.start[0] + slab;
                let from = &output_gradient[(plane * height + tile.start[1]) * width..][..tile.len[1] * width];
                let to = &mut errors[self.layout.position(tile, slot, slab)..];
                // The last row has no zeros after it: the next run begins there.
                let count = tile.len[1] - 1;
                let rows = PaddedRows { count, pitch, lead: 0, width, stride: 1, source_pitch: width };
                copy_padded_rows(self.isa, rows, from, to);
                let last = PaddedRows { count: 1, pitch: width, ..rows };
                copy_padded_rows(self.isa, last, &from[count * width..], &mut to[count * pitch..]);
            }
        }
    }
}

isa::dispatch!(fn add_assign(to: &mut [f32], from: &[f32]) = add_assign_body);

#[inline(always)]
fn add_assign_body<const FMA: bool>(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}
