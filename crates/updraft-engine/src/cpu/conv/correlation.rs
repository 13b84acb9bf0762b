//! What forward convolution and both gradients share: a correlation whose taps are offsets into a packed input.
//!
//! The input of a tile is copied once into scratch with its padding, and with strides resolved: a stride of `s` splits
//! each dimension into `s` phases, plane `f` holding every `s`-th element from `f`. Then tap `(i, t)` of the output at
//! flat position `p` reads the packed input at `p + offset(i, t)`, a plain vector load for any kernel, stride, dilation
//! and rank, and one product kernel with a table of offsets serves them all. im2col would copy the input once a tap.
//!
//! ```text
//! packed: [input channel][phase][image][depth][height][pitch]      pitch = output width + reach of the taps - shared
//!
//!   row 0:  0 x x x x 0        the zeros after a row are also the zeros before the next one,
//!   row 1:          0 x x x x 0        so a 3-wide kernel wastes one column of each row, not two
//! ```

use super::rows::{PaddedRows, copy_padded_rows};
use crate::cpu::isa::Isa;
use crate::cpu::lanes::LANES_MAX;

/// `out[n, o, p] = Σ w[o, i, t] * x[n, i, stride * p + taps[t]]` in each group, with `x` zero outside its extents.
#[derive(Debug, Clone)]
pub(crate) struct Correlation {
    pub(crate) batch: usize,
    pub(crate) groups: usize,
    /// In each group.
    pub(crate) input_channels: usize,
    /// In each group.
    pub(crate) output_channels: usize,
    /// Depth, height, width.
    pub(crate) input: [usize; 3],
    pub(crate) output: [usize; 3],
    pub(crate) stride: [usize; 3],
    /// For each dimension what is added to `stride * p`.
    pub(crate) taps: [Vec<isize>; 3],
}

impl Correlation {
    /// Length of the sums: input channels of a group times taps.
    pub(crate) fn depth(&self) -> usize {
        self.input_channels * self.taps.iter().map(Vec::len).product::<usize>()
    }

    fn output_volume(&self) -> usize {
        self.output.iter().product()
    }

    /// Multiplications and additions of the whole correlation.
    pub(crate) fn multiply_adds(&self) -> usize {
        self.batch * self.groups * self.output_channels * self.output_volume() * self.depth()
    }
}

/// Packed numbers of a tile: half of a 1 MiB second-level cache, the rest is for weights and results.
const PACKED_MAX: usize = 96 << 10;
/// Positions of a tile: eight rows of results stay near the first-level cache.
const POSITIONS_MAX: usize = 2048;
/// A tile of fewer multiply-adds is not worth handing to a thread.
const TILE_MULTIPLY_ADDS_MIN: usize = 1 << 18;
/// Tiles wanted where the work is there: enough to keep many threads even.
const TILES_WANTED: usize = 32;

/// One dimension of the packed input.
#[derive(Debug, Clone)]
struct Axis {
    stride: usize,
    /// Elements of the input.
    input: usize,
    /// Elements of the output in a tile, at most.
    tile: usize,
    /// The smallest quotient of a tap: element `e` of phase `f` is input element `(e + origin) * stride + f`.
    origin: isize,
    /// How far the taps reach: a tile of `t` outputs reads `t + reach` elements of a phase.
    reach: usize,
    /// Phases that some tap uses, rising.
    phases: Vec<usize>,
    /// For each tap the index of its phase and its element for output 0.
    taps: Vec<(usize, usize)>,
}

impl Axis {
    fn new(input: usize, tile: usize, stride: usize, taps: &[isize]) -> Axis {
        let step = stride as isize;
        let quotients = || taps.iter().map(|tap| tap.div_euclid(step));
        let origin = quotients().min().unwrap_or(0);
        let reach = quotients().max().map_or(0, |max| (max - origin) as usize);
        let phase = |tap: &isize| tap.rem_euclid(step) as usize;
        let mut phases: Vec<usize> = taps.iter().map(phase).collect();
        phases.sort_unstable();
        phases.dedup();
        let taps = taps
            .iter()
            .map(|tap| {
                let index = phases.partition_point(|known| *known < phase(tap));
                (index, (tap.div_euclid(step) - origin) as usize)
            })
            .collect();
        Axis { stride, input, tile, origin, reach, phases, taps }
    }

    fn extent(&self) -> usize {
        self.tile + self.reach
    }

    /// The elements below `count` of a phase, from output `start` on, that lie in the input, and the input element of
    /// the first of them.
    fn inside(&self, phase: usize, start: usize, count: usize) -> (std::ops::Range<usize>, usize) {
        let step = self.stride as isize;
        // Element e is input element e * stride + first.
        let first = (start as isize + self.origin) * step + phase as isize;
        let low = (-first).max(0).div_euclid(step) + isize::from((-first).max(0) % step != 0);
        let past = self.input as isize - first;
        let high = if past <= 0 { 0 } else { (past + step - 1).div_euclid(step) };
        let low = (low as usize).min(count);
        let high = (high as usize).clamp(low, count);
        (low..high, (first + low as isize * step).max(0) as usize)
    }

    /// How many elements at the end of a row are zero and may be those at the beginning of the next one.
    fn shared(&self) -> usize {
        self.phases
            .iter()
            .map(|phase| {
                let (inside, _) = self.inside(*phase, 0, self.extent());
                if inside.is_empty() { 0 } else { inside.start.min(self.extent() - inside.end) }
            })
            .min()
            .unwrap_or(0)
            .min(self.reach)
    }
}

/// The part of a correlation that one thread computes from start to end.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tile {
    pub(crate) images: std::ops::Range<usize>,
    pub(crate) groups: std::ops::Range<usize>,
    /// Output channels in each of the groups.
    pub(crate) channels: std::ops::Range<usize>,
    /// First output depth and height.
    pub(crate) start: [usize; 2],
    /// Output depths and heights.
    pub(crate) len: [usize; 2],
}

/// How tiles are cut, how their input is packed, and where the taps find it.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    axes: [Axis; 3],
    /// Images, groups, output channels in a tile, at most.
    tile_images: usize,
    tile_groups: usize,
    tile_channels: usize,
    /// Numbers from one packed row to the next.
    pub(crate) pitch: usize,
    /// For each input channel and tap, in the order of the weights.
    pub(crate) offsets: Vec<u32>,
    /// The input is read where it lies: its taps need no padding, and a position of the output is one of the input.
    pub(crate) in_place: bool,
}

/// How finely output channels may be cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    /// Output channels of a tile are a multiple of this.
    pub(crate) channels: usize,
    /// Whether positions of one image may be in different tiles.
    pub(crate) in_place: bool,
}

impl Layout {
    pub(crate) fn new(correlation: &Correlation, cut: Cut) -> Layout {
        let [depth, height, width] = correlation.output;
        let axis = |index: usize, tile: usize| {
            Axis::new(correlation.input[index], tile, correlation.stride[index], &correlation.taps[index])
        };
        let wide = axis(2, width);
        let pitch = wide.extent() - wide.shared();
        let packed = |depth: usize, height: usize| {
            let (deep, high) = (axis(0, depth), axis(1, height));
            let phases = deep.phases.len() * high.phases.len() * wide.phases.len();
            correlation.input_channels * phases * deep.extent() * high.extent() * pitch
        };
        let in_place = cut.in_place
            && correlation.taps.iter().all(|taps| taps[..] == [0])
            && correlation.stride == [1; 3]
            && correlation.input == correlation.output
            && correlation.output_volume() >= LANES_MAX;

        let (mut tile_depth, mut tile_height) = (depth, height);
        while packed(tile_depth, tile_height) > PACKED_MAX || tile_depth * tile_height * pitch > POSITIONS_MAX {
            if tile_depth > 1 {
                tile_depth = tile_depth.div_ceil(2);
            } else if tile_height > 1 {
                tile_height = tile_height.div_ceil(2);
            } else {
                break;
            }
        }
        let whole = tile_depth == depth && tile_height == height;
        let per_image = packed(tile_depth, tile_height).max(1);
        let positions = (tile_depth * tile_height * pitch).max(1);
        let tile_images = if whole && !in_place {
            (PACKED_MAX / per_image)
                .min(POSITIONS_MAX / positions)
                .min(correlation.batch.div_ceil(TILES_WANTED / 4))
                .max(1)
        } else {
            1
        };

        // Channels are cut only as far as images and rows do not give enough tiles: each part packs the input again.
        let wanted = (correlation.multiply_adds() / TILE_MULTIPLY_ADDS_MIN).clamp(1, TILES_WANTED);
        let spatial =
            correlation.batch.div_ceil(tile_images) * depth.div_ceil(tile_depth) * height.div_ceil(tile_height);
        let parts = wanted.div_ceil(spatial).max(1);
        let tile_groups = correlation.groups.div_ceil(parts.min(correlation.groups)).max(1);
        let parts = parts.div_ceil(correlation.groups.div_ceil(tile_groups));
        let tile_channels =
            correlation.output_channels.div_ceil(parts).next_multiple_of(cut.channels).min(correlation.output_channels);

        let axes = [axis(0, tile_depth), axis(1, tile_height), wide];
        let mut layout = Layout { axes, tile_images, tile_groups, tile_channels, pitch, offsets: Vec::new(), in_place };
        layout.offsets = layout.tap_offsets(correlation);
        layout
    }

    fn tap_offsets(&self, correlation: &Correlation) -> Vec<u32> {
        let [deep, high, wide] = &self.axes;
        let channel = if self.in_place { correlation.input.iter().product() } else { self.channel_len() };
        let mut offsets = Vec::with_capacity(correlation.depth());
        for input in 0..correlation.input_channels {
            for (d_phase, d) in &deep.taps {
                for (h_phase, h) in &high.taps {
                    for (w_phase, w) in &wide.taps {
                        let phase = (d_phase * high.phases.len() + h_phase) * wide.phases.len() + w_phase;
                        let offset = input * channel
                            + phase * self.tile_images * self.volume()
                            + (d * high.extent() + h) * self.pitch
                            + w;
                        // A table entry that saturates lies outside every buffer, which the product refuses.
                        offsets.push(u32::try_from(offset).unwrap_or(u32::MAX));
                    }
                }
            }
        }
        offsets
    }

    fn phases(&self) -> usize {
        self.axes.iter().map(|axis| axis.phases.len()).product()
    }

    /// Numbers of one phase of one image.
    pub(crate) fn volume(&self) -> usize {
        self.axes[0].extent() * self.axes[1].extent() * self.pitch
    }

    fn channel_len(&self) -> usize {
        self.phases() * self.tile_images * self.volume()
    }

    /// Numbers of a packed tile, with the slack that lets a register be read at its end.
    pub(crate) fn packed_len(&self, correlation: &Correlation) -> usize {
        if self.in_place { 0 } else { correlation.input_channels * self.channel_len() + self.slack() }
    }

    fn slack(&self) -> usize {
        self.axes[2].reach + 2 * LANES_MAX
    }

    /// Runs of positions without a gap that is worth skipping: how many a tile has, and how long each is.
    pub(crate) fn segments(&self, tile: &Tile) -> Segments {
        let [deep, high, wide] = &self.axes;
        let row = (tile.len[1] - 1) * self.pitch + wide.tile;
        let (images, depths) = (tile.images.len(), tile.len[0]);
        if high.reach == 0 && deep.reach == 0 {
            let len = (images - 1) * self.volume() + (depths - 1) * high.extent() * self.pitch + row;
            Segments { images: 1, depths: 1, len, image_pitch: 0, depth_pitch: 0 }
        } else {
            let depth_pitch = high.extent() * self.pitch;
            Segments { images, depths, len: row, image_pitch: self.volume(), depth_pitch }
        }
    }

    /// Where the first position of an image and depth of the tile stands among all positions of its segments.
    pub(crate) fn position(&self, tile: &Tile, image: usize, depth: usize) -> usize {
        let [deep, high, _] = &self.axes;
        if high.reach == 0 && deep.reach == 0 {
            image * self.volume() + depth * high.extent() * self.pitch
        } else {
            (image * tile.len[0] + depth) * self.segments(tile).padded_len()
        }
    }

    /// Positions of the largest tile, each segment rounded up to whole registers.
    pub(crate) fn positions_max(&self) -> usize {
        let tile = Tile {
            images: 0..self.tile_images,
            groups: 0..1,
            channels: 0..1,
            start: [0; 2],
            len: [self.axes[0].tile, self.axes[1].tile],
        };
        let segments = self.segments(&tile);
        segments.images * segments.depths * segments.padded_len()
    }

    pub(crate) fn tiles(&self, correlation: &Correlation) -> usize {
        self.tile_counts(correlation).iter().product()
    }

    /// Output channels of a tile in each group, at most.
    pub(crate) fn tile_channels(&self) -> usize {
        self.tile_channels
    }

    /// How many tiles differ in their weights, and how many in their positions or images. Tile `b * weights + w` is part
    /// `w` of the weights and part `b` of the rest.
    pub(crate) fn counts_of_weights_and_batch(&self, correlation: &Correlation) -> (usize, usize) {
        let [channels, groups, depths, heights, images] = self.tile_counts(correlation);
        (channels * groups, depths * heights * images)
    }

    /// By channels, groups, depth, height, images.
    fn tile_counts(&self, correlation: &Correlation) -> [usize; 5] {
        [
            correlation.output_channels.div_ceil(self.tile_channels),
            correlation.groups.div_ceil(self.tile_groups),
            correlation.output[0].div_ceil(self.axes[0].tile),
            correlation.output[1].div_ceil(self.axes[1].tile),
            correlation.batch.div_ceil(self.tile_images),
        ]
    }

    /// The tile of an index below [`Layout::tiles`]; images vary slowest.
    pub(crate) fn tile(&self, correlation: &Correlation, index: usize) -> Tile {
        let mut rest = index;
        let [channel, group, depth, height, image] = self.tile_counts(correlation).map(|count| {
            let digit = rest % count;
            rest /= count;
            digit
        });
        let range = |digit: usize, size: usize, total: usize| digit * size..((digit + 1) * size).min(total);
        let depths = range(depth, self.axes[0].tile, correlation.output[0]);
        let heights = range(height, self.axes[1].tile, correlation.output[1]);
        Tile {
            images: range(image, self.tile_images, correlation.batch),
            groups: range(group, self.tile_groups, correlation.groups),
            channels: range(channel, self.tile_channels, correlation.output_channels),
            start: [depths.start, heights.start],
            len: [depths.len(), heights.len()],
        }
    }

    /// Copies what the tile reads of one group into `packed`, which has [`Layout::packed_len`] numbers. Whatever a tap
    /// may touch there becomes finite wherever the input is.
    pub(crate) fn pack(
        &self,
        isa: Isa,
        correlation: &Correlation,
        tile: &Tile,
        group: usize,
        input: &[f32],
        packed: &mut [f32],
    ) {
        let volume = self.volume();
        let input_volume: usize = correlation.input.iter().product();
        let (planes, slack) = packed.split_at_mut(correlation.input_channels * self.channel_len());
        slack.fill(0.0);
        let [deep, high, wide] = &self.axes;
        let mut planes = planes.chunks_exact_mut(volume);
        for channel in 0..correlation.input_channels {
            for d_phase in &deep.phases {
                for h_phase in &high.phases {
                    for w_phase in &wide.phases {
                        for (slot, plane) in planes.by_ref().take(self.tile_images).enumerate() {
                            if slot >= tile.images.len() {
                                plane.fill(0.0);
                                continue;
                            }
                            let image = tile.images.start + slot;
                            let start = (image * correlation.groups + group) * correlation.input_channels + channel;
                            let source = &input[start * input_volume..][..input_volume];
                            self.pack_plane(isa, tile, [*d_phase, *h_phase, *w_phase], source, plane);
                        }
                    }
                }
            }
        }
    }

    fn pack_plane(&self, isa: Isa, tile: &Tile, phases: [usize; 3], source: &[f32], plane: &mut [f32]) {
        let [deep, high, wide] = &self.axes;
        let (depths, depth_first) = deep.inside(phases[0], tile.start[0], tile.len[0] + deep.reach);
        let (heights, height_first) = high.inside(phases[1], tile.start[1], tile.len[1] + high.reach);
        let (widths, width_first) = wide.inside(phases[2], 0, wide.extent());
        for (depth, slab) in plane.chunks_exact_mut(high.extent() * self.pitch).enumerate() {
            if !depths.contains(&depth) || heights.is_empty() || widths.is_empty() {
                slab.fill(0.0);
                continue;
            }
            let source_depth = depth_first + (depth - depths.start) * deep.stride;
            slab[..heights.start * self.pitch].fill(0.0);
            slab[heights.end * self.pitch..].fill(0.0);
            let to = &mut slab[heights.start * self.pitch..heights.end * self.pitch];
            let rows = PaddedRows {
                count: heights.len(),
                pitch: self.pitch,
                lead: widths.start,
                width: widths.len(),
                stride: wide.stride,
                source_pitch: high.stride * wide.input,
            };
            let from = (source_depth * high.input + height_first) * wide.input + width_first;
            copy_padded_rows(isa, rows, &source[from..], to);
        }
    }
}

/// The runs of positions of a tile.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segments {
    /// How many runs there are by image and depth.
    pub(crate) images: usize,
    pub(crate) depths: usize,
    /// Positions in each.
    pub(crate) len: usize,
    /// From the packed input of one to that of the next.
    pub(crate) image_pitch: usize,
    pub(crate) depth_pitch: usize,
}

impl Segments {
    /// The length rounded up to whole registers of any kind.
    pub(crate) fn padded_len(&self) -> usize {
        self.len.next_multiple_of(LANES_MAX)
    }

    /// Where the packed input of each run starts, in the order of images and depths.
    pub(crate) fn starts(self) -> impl Iterator<Item = usize> {
        (0..self.images).flat_map(move |image| {
            (0..self.depths).map(move |depth| image * self.image_pitch + depth * self.depth_pitch)
        })
    }
}
