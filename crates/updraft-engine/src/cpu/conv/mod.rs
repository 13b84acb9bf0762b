//! Convolution and its two gradients for 1, 2 or 3 spatial dimensions, any groups, strides, dilations and padding.
//!
//! All three are correlations over a packed input (see [`correlation`]): the forward pass directly; the gradient of the
//! input as one stride-1 correlation of the output's gradient for each phase of the stride, with the taps that reach that
//! phase; the gradient of the weights as the transposed product. A plan is made once for a shape and run many times.
//! Sums run over input channels, then taps, in one order for every tile, so results do not depend on threads.

pub(super) mod build;
mod correlation;
pub(super) mod fuse;
mod product;
mod rows;
mod weight_gradient;

use self::correlation::{Correlation, Cut, Layout, Segments, Tile};
use self::product::{Block, Product, block_rows, blocks, product};
use self::rows::{ResultRows, write_rows};
pub(crate) use self::weight_gradient::ConvWeightGradient;
use crate::cpu::isa::{self, Isa};
use crate::cpu::kernel::{Pool, Shared};
use crate::cpu::lanes::LANES_MAX;

/// The shape of a convolution, as three spatial dimensions (depth, height, width) of which the first may be 1.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ConvGeometry {
    pub(crate) batch: usize,
    pub(crate) groups: usize,
    /// Of all groups together.
    pub(crate) input_channels: usize,
    /// Of all groups together.
    pub(crate) output_channels: usize,
    pub(crate) input: [usize; 3],
    pub(crate) kernel: [usize; 3],
    pub(crate) stride: [usize; 3],
    pub(crate) dilation: [usize; 3],
    /// Zeros before the first element; those after the last one follow from `output`.
    pub(crate) pad_begin: [usize; 3],
    pub(crate) output: [usize; 3],
}

impl ConvGeometry {
    fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// Numbers of the weights, `[output channels, input channels / groups, kernel...]`.
    pub(crate) fn weights_len(&self) -> usize {
        self.output_channels * (self.input_channels / self.groups) * self.taps()
    }

    /// Numbers of the input.
    pub(crate) fn input_len(&self) -> usize {
        self.batch * self.input_channels * self.input.iter().product::<usize>()
    }

    /// Numbers of the output.
    pub(crate) fn output_len(&self) -> usize {
        self.batch * self.output_channels * self.output.iter().product::<usize>()
    }

    fn correlation(&self) -> Correlation {
        Correlation {
            batch: self.batch,
            groups: self.groups,
            input_channels: self.input_channels / self.groups,
            output_channels: self.output_channels / self.groups,
            input: self.input,
            output: self.output,
            stride: self.stride,
            taps: std::array::from_fn(|axis| {
                (0..self.kernel[axis])
                    .map(|tap| (tap * self.dilation[axis]) as isize - self.pad_begin[axis] as isize)
                    .collect()
            }),
        }
    }
}

/// What happens to a result before it is written.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) enum Activation {
    /// Nothing.
    #[default]
    None,
    /// Negative numbers become zero; NaN stays.
    Relu,
    /// Into a range; NaN stays.
    Clip {
        /// The least result.
        min: f32,
        /// The greatest result.
        max: f32,
    },
}

/// What is done to the sums on their way out: bias, then residual, then activation.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    /// One number for each output channel.
    pub(crate) bias: Option<&'a [f32]>,
    /// Added to the output, of the same shape.
    pub(crate) residual: Option<&'a [f32]>,
    pub(crate) activation: Activation,
}

/// A convolution of one shape.
pub(crate) struct Conv {
    geometry: ConvGeometry,
    pass: Pass,
}

impl Conv {
    /// Plans it.
    pub(crate) fn new(geometry: ConvGeometry) -> Conv {
        Conv::with_isa(geometry, isa::detected())
    }

    fn with_isa(geometry: ConvGeometry, isa: Isa) -> Conv {
        let correlation = geometry.correlation();
        let taps = geometry.taps();
        let strides = WeightStrides {
            group: correlation.output_channels * correlation.input_channels * taps,
            output: correlation.input_channels * taps,
            input: taps,
        };
        let target = Target { extents: geometry.output, origin: [0; 3], step: [1; 3] };
        Conv { pass: Pass::new(correlation, strides, (0..taps).collect(), target, isa), geometry }
    }

    /// Numbers of the packed weights.
    pub(crate) fn packed_weights_len(&self) -> usize {
        self.pass.packed_weights_len()
    }

    /// Numbers of scratch for each worker.
    pub(crate) fn scratch_len(&self) -> usize {
        self.pass.scratch_len()
    }

    /// Brings weights into the order that [`Conv::run`] reads; constant weights are packed once.
    pub(crate) fn pack_weights(&self, pool: &Pool, weights: &[f32], packed: &mut [f32]) {
        self.pass.pack_weights(pool, weights, packed);
    }

    /// `output = activation(convolution(input, weights) + bias + residual)`.
    ///
    /// # Panics
    /// If a slice is not of the planned length.
    pub(crate) fn run(
        &self,
        pool: &Pool,
        input: &[f32],
        packed_weights: &[f32],
        epilogue: Epilogue<'_>,
        scratch: &mut [f32],
        output: &mut [f32],
    ) {
        assert_eq!(input.len(), self.geometry.input_len());
        assert_eq!(output.len(), self.geometry.output_len());
        self.pass.run(pool, input, packed_weights, epilogue, scratch, output);
    }
}

/// The gradient of a convolution's input.
pub(crate) struct ConvInputGradient {
    geometry: ConvGeometry,
    /// One for each phase of the stride that some tap reaches.
    passes: Vec<Pass>,
    /// Some phase is reached by no tap: its gradient is zero.
    has_gaps: bool,
}

impl ConvInputGradient {
    /// Plans it for the geometry of the convolution itself.
    pub(crate) fn new(geometry: ConvGeometry) -> ConvInputGradient {
        ConvInputGradient::with_isa(geometry, isa::detected())
    }

    fn with_isa(geometry: ConvGeometry, isa: Isa) -> ConvInputGradient {
        let (inputs, outputs) = (geometry.input_channels / geometry.groups, geometry.output_channels / geometry.groups);
        let taps = geometry.taps();
        // The channels change places.
        let strides = WeightStrides { group: outputs * inputs * taps, output: taps, input: inputs * taps };
        let mut passes = Vec::new();
        let mut has_gaps = false;
        let [depths, heights, widths] = geometry.stride;
        for phase in (0..depths * heights * widths)
            .map(|phase| [phase / (heights * widths), phase / widths % heights, phase % widths])
        {
            // Input i = phase + stride * j takes from output o through tap t where o * stride + t * dilation - pad = i.
            let reaching: [Vec<(usize, isize)>; 3] = std::array::from_fn(|axis| {
                let stride = geometry.stride[axis] as isize;
                (0..geometry.kernel[axis])
                    .map(|tap| {
                        let distance = (phase[axis] + geometry.pad_begin[axis]) as isize
                            - (tap * geometry.dilation[axis]) as isize;
                        (tap, distance)
                    })
                    .filter(|(_, distance)| distance.rem_euclid(stride) == 0)
                    .map(|(tap, distance)| (tap, distance.div_euclid(stride)))
                    .collect()
            });
            let extents = std::array::from_fn(|axis| {
                geometry.input[axis].saturating_sub(phase[axis]).div_ceil(geometry.stride[axis])
            });
            if extents.contains(&0) {
                continue;
            }
            if reaching.iter().any(Vec::is_empty) {
                has_gaps = true;
                continue;
            }
            let [deep, high, wide] = &reaching;
            let [_, kernel_height, kernel_width] = geometry.kernel;
            let mut tap_indices = Vec::with_capacity(deep.len() * high.len() * wide.len());
            for (d, _) in deep {
                for (h, _) in high {
                    tap_indices.extend(wide.iter().map(|(w, _)| (d * kernel_height + h) * kernel_width + w));
                }
            }
            let correlation = Correlation {
                batch: geometry.batch,
                groups: geometry.groups,
                input_channels: outputs,
                output_channels: inputs,
                input: geometry.output,
                output: extents,
                stride: [1; 3],
                taps: reaching.map(|taps| taps.into_iter().map(|(_, offset)| offset).collect()),
            };
            let target = Target { extents: geometry.input, origin: phase, step: geometry.stride };
            passes.push(Pass::new(correlation, strides, tap_indices, target, isa));
        }
        ConvInputGradient { geometry, passes, has_gaps }
    }

    /// Numbers of the packed weights.
    pub(crate) fn packed_weights_len(&self) -> usize {
        self.passes.iter().map(Pass::packed_weights_len).sum()
    }

    /// Numbers of scratch for each worker.
    pub(crate) fn scratch_len(&self) -> usize {
        self.passes.iter().map(Pass::scratch_len).max().unwrap_or(0)
    }

    /// Brings the convolution's weights into the order that [`ConvInputGradient::run`] reads.
    pub(crate) fn pack_weights(&self, pool: &Pool, weights: &[f32], packed: &mut [f32]) {
        let mut rest = packed;
        for pass in &self.passes {
            let (packed, others) = rest.split_at_mut(pass.packed_weights_len());
            pass.pack_weights(pool, weights, packed);
            rest = others;
        }
    }

    /// The gradient of the input from that of the output.
    ///
    /// # Panics
    /// If a slice is not of the planned length.
    pub(crate) fn run(
        &self,
        pool: &Pool,
        output_gradient: &[f32],
        packed_weights: &[f32],
        scratch: &mut [f32],
        input_gradient: &mut [f32],
    ) {
        assert_eq!(output_gradient.len(), self.geometry.output_len());
        assert_eq!(input_gradient.len(), self.geometry.input_len());
        if self.has_gaps {
            input_gradient.fill(0.0);
        }
        let mut rest = packed_weights;
        for pass in &self.passes {
            let (packed, others) = rest.split_at(pass.packed_weights_len());
            pass.run(pool, output_gradient, packed, Epilogue::default(), scratch, input_gradient);
            rest = others;
        }
    }
}

/// Where the weight of a group, output channel, input channel and tap 0 stands.
#[derive(Debug, Clone, Copy)]
struct WeightStrides {
    group: usize,
    output: usize,
    input: usize,
}

/// Where results go: position `p` of a pass is element `origin + step * p` of an output with these extents.
#[derive(Debug, Clone, Copy)]
struct Target {
    extents: [usize; 3],
    origin: [usize; 3],
    step: [usize; 3],
}

/// One correlation with its weights and the place of its results.
struct Pass {
    isa: Isa,
    correlation: Correlation,
    layout: Layout,
    offset_max: usize,
    strides: WeightStrides,
    /// For each tap of the correlation which tap of the weights it is.
    taps: Vec<usize>,
    target: Target,
}

impl Pass {
    fn new(correlation: Correlation, strides: WeightStrides, taps: Vec<usize>, target: Target, isa: Isa) -> Pass {
        let layout = Layout::new(&correlation, Cut { channels: block_rows(isa), in_place: true });
        let offset_max = layout.offsets.iter().max().map_or(0, |max| *max as usize);
        Pass { isa, correlation, layout, offset_max, strides, taps, target }
    }

    fn group_weights_len(&self) -> usize {
        let rows: usize = blocks(self.isa, self.correlation.output_channels).map(|block| block.rows).sum();
        rows * self.correlation.depth()
    }

    fn packed_weights_len(&self) -> usize {
        self.correlation.groups * self.group_weights_len()
    }

    fn scratch_len(&self) -> usize {
        self.layout.packed_len(&self.correlation) + block_rows(self.isa) * self.layout.positions_max()
    }

    fn pack_weights(&self, pool: &Pool, weights: &[f32], packed: &mut [f32]) {
        assert_eq!(packed.len(), self.packed_weights_len());
        let group_len = self.group_weights_len();
        let blocks: Vec<Block> = blocks(self.isa, self.correlation.output_channels).collect();
        let depth = self.correlation.depth();
        // A tile is as many groups as make some work, or a single one's block.
        let shared = Shared::new(packed);
        let tile_blocks = (16384 / (block_rows(self.isa) * depth)).max(1);
        let count = self.correlation.groups * blocks.len();
        pool.for_each(count.div_ceil(tile_blocks), |tile| {
            for index in tile * tile_blocks..((tile + 1) * tile_blocks).min(count) {
                let (group, block) = (index / blocks.len(), blocks[index % blocks.len()]);
                let start = group * group_len + block.start * depth;
                // SAFETY: each block is packed by one tile.
                let to = unsafe { shared.range(start..start + block.rows * depth) };
                self.pack_block(weights, group, block, to);
            }
        });
    }

    fn pack_block(&self, weights: &[f32], group: usize, block: Block, packed: &mut [f32]) {
        let start = group * self.strides.group + block.start * self.strides.output;
        let mut to = packed.chunks_exact_mut(block.rows);
        for input in 0..self.correlation.input_channels {
            let start = start + input * self.strides.input;
            for (tap, to) in self.taps.iter().zip(to.by_ref()) {
                for (row, to) in to.iter_mut().enumerate() {
                    *to = if row < block.used { weights[start + tap + row * self.strides.output] } else { 0.0 };
                }
            }
        }
    }

    fn run(
        &self,
        pool: &Pool,
        input: &[f32],
        packed_weights: &[f32],
        epilogue: Epilogue<'_>,
        scratch: &mut [f32],
        output: &mut [f32],
    ) {
        if self.correlation.output.contains(&0) || self.correlation.batch == 0 {
            return;
        }
        assert_eq!(packed_weights.len(), self.packed_weights_len());
        let packed_len = self.layout.packed_len(&self.correlation);
        let results_len = block_rows(self.isa) * self.layout.positions_max();
        let shared = Shared::new(output);
        pool.for_each_with_scratch(self.layout.tiles(&self.correlation), scratch, |tile, scratch| {
            let tile = self.layout.tile(&self.correlation, tile);
            let (packed, results) = scratch.split_at_mut(packed_len);
            let results = &mut results[..results_len];
            for group in tile.groups.clone() {
                let (source, in_place_start) = self.source(&tile, group, input, packed);
                self.run_group(&tile, group, source, in_place_start, packed_weights, epilogue, results, &shared);
            }
        });
    }

    /// The tile's input of a group, packed or where it lies, and where its first position stands.
    fn source<'a>(&self, tile: &Tile, group: usize, input: &'a [f32], packed: &'a mut [f32]) -> (&'a [f32], usize) {
        if !self.layout.in_place {
            self.layout.pack(self.isa, &self.correlation, tile, group, input, packed);
            return (packed, 0);
        }
        let [_, height, width] = self.correlation.input;
        let len = self.correlation.input_channels * self.correlation.input.iter().product::<usize>();
        let start = (tile.images.start * self.correlation.groups + group) * len;
        (&input[start..start + len], (tile.start[0] * height + tile.start[1]) * width)
    }

    fn run_group(
        &self,
        tile: &Tile,
        group: usize,
        input: &[f32],
        start: usize,
        packed_weights: &[f32],
        epilogue: Epilogue<'_>,
        results: &mut [f32],
        output: &Shared<'_, f32>,
    ) {
        let Segments { len, .. } = self.layout.segments(tile);
        let segments = self.layout.segments(tile);
        // A run that is shorter than a register, at the end of an input that is read in place, begins earlier.
        let lead = start.min(LANES_MAX.saturating_sub(len));
        let depth = self.correlation.depth();
        let pitch = results.len() / block_rows(self.isa);
        let weights = &packed_weights[group * self.group_weights_len()..];
        for block in blocks(self.isa, tile.channels.len()) {
            let block = Block { start: block.start + tile.channels.start, ..block };
            for (segment, segment_start) in segments.starts().enumerate() {
                let run = Product {
                    weights: &weights[block.start * depth..][..block.rows * depth],
                    rows: block.rows,
                    offsets: &self.layout.offsets,
                    offset_max: self.offset_max,
                    input,
                    start: start + segment_start - lead,
                    len: len + lead,
                    pitch,
                };
                product(self.isa, run, &mut results[segment * segments.padded_len()..]);
            }
            for row in 0..block.used {
                let channel = group * self.correlation.output_channels + block.start + row;
                self.write(tile, channel, &results[row * pitch + lead..], epilogue, output);
            }
        }
    }

    /// Writes the results of one output channel.
    fn write(&self, tile: &Tile, channel: usize, results: &[f32], epilogue: Epilogue<'_>, output: &Shared<'_, f32>) {
        let Target { extents, origin, step } = self.target;
        let channels = self.correlation.groups * self.correlation.output_channels;
        let bias = epilogue.bias.map_or(0.0, |bias| bias[channel]);
        let width = self.correlation.output[2];
        let rows = ResultRows {
            count: tile.len[1],
            width,
            pitch: self.layout.pitch,
            to_pitch: step[1] * extents[2],
            to_step: step[2],
        };
        // Rows without gaps on both sides are one long row.
        let rows = if rows.pitch == width && rows.to_pitch == width && rows.to_step == 1 {
            ResultRows { count: 1, width: width * rows.count, ..rows }
        } else {
            rows
        };
        for (slot, image) in tile.images.clone().enumerate() {
            for depth in 0..tile.len[0] {
                let to_depth = origin[0] + step[0] * (tile.start[0] + depth);
                let to_height = origin[1] + step[1] * tile.start[1];
                let plane = (image * channels + channel) * extents[0] + to_depth;
                let start = (plane * extents[1] + to_height) * extents[2] + origin[2];
                let len = rows.span();
                // SAFETY: tiles of a pass have different channels, images, depths or heights, and passes run one after
                // the other; within a tile parts are taken one after the other.
                let to = unsafe { output.range(start..start + len) };
                let residual = epilogue.residual.map(|residual| &residual[start..start + len]);
                let from = &results[self.layout.position(tile, slot, depth)..];
                write_rows(self.isa, from, rows, bias, Epilogue { residual, ..epilogue }, to);
            }
        }
    }
}

#[cfg(test)]
mod tests;
