//! Pictures in other sizes: every pixel a weighted sum of those around it, to the bit as by Pillow's `Image.resize`.
//!
//! Rows are resampled first, then columns, each sum rounded to 8 bits. A row of a picture has its channels side by side,
//! which suits no vector register; so sixteen rows are turned into columns of sixteen bytes, each a register, and a sum
//! over pixels of a row becomes a sum of registers. Turning the sums back, channels may be laid apart at no cost.
//!
//! Weights are fractions of 22 bits, so that a sum of 8-bit pixels fits into 32 bits.

use std::ops::Range;

use multiversion::multiversion;

/// A filter's kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    /// How far it reaches to either side, in pixels.
    pub reach: f64,
    pub at: fn(f64) -> f64,
    /// Whether it grows with the scale when a picture shrinks.
    pub antialias: bool,
}

/// Part of a picture, its rows some bytes apart.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    /// From the first pixel on.
    pub pixels: &'a [u8],
    pub stride: usize,
    pub height: usize,
    pub width: usize,
    /// 1 or 3.
    pub channels: usize,
}

impl<'a> View<'a> {
    fn row(&self, y: usize) -> &'a [u8] {
        &self.pixels[y * self.stride..][..self.width * self.channels]
    }
}

/// Memory that serves one picture after another.
#[derive(Default)]
pub(super) struct Resampler {
    across: Taps,
    down: Taps,
    strip: Strip,
    /// All rows, as wide as the target.
    middle: Vec<u8>,
    sums: Vec<i32>,
}

impl Resampler {
    /// Resamples to `height` rows of `width` pixels. Channels that are to lie `apart` become a plane each.
    pub(super) fn resample(
        &mut self,
        source: View,
        [height, width]: [usize; 2],
        kernel: Kernel,
        apart: bool,
        target: &mut [u8],
    ) {
        let channels = source.channels;
        let planes = if apart { channels } else { 1 };
        let pixel_bytes = channels / planes;
        let row_bytes = width * pixel_bytes;
        self.across.fill(source.width, width, kernel);
        self.down.fill(source.height, height, kernel);
        // Weights of nothing may reach beyond the last row.
        let plane_bytes = (source.height + self.down.count) * row_bytes;
        self.middle.resize(planes * plane_bytes, 0);
        self.sums.resize(row_bytes, 0);
        for tile in (Tiles { taps: &self.across, start: 0 }) {
            let first = self.across.first[tile.start];
            let last = (self.across.first[tile.end - 1] + self.across.count).min(source.width);
            for top in (0..source.height).step_by(LANES) {
                let rows = std::array::from_fn(|lane| {
                    &source.row((top + lane).min(source.height - 1))[first * channels..last * channels]
                });
                let mut targets: [[&mut [u8]; LANES]; 3] = Default::default();
                for (rows, plane) in targets.iter_mut().zip(self.middle.chunks_exact_mut(plane_bytes)) {
                    let rows_left = plane.chunks_exact_mut(row_bytes).take(source.height).skip(top);
                    let part = tile.start * pixel_bytes..tile.end * pixel_bytes;
                    rows.iter_mut().zip(rows_left).for_each(|(row, all)| *row = &mut all[part.clone()]);
                }
                self.strip.resample(rows, first, channels, &self.across, tile.clone(), &mut targets[..planes]);
            }
        }
        for (rows, target) in self.middle.chunks_exact(plane_bytes).zip(target.chunks_exact_mut(height * row_bytes)) {
            resample_columns(rows, row_bytes, &self.down, &mut self.sums, target);
        }
    }
}

const FRACTION_BITS: u32 = 22;
const HALF: i32 = 1 << (FRACTION_BITS - 1);

/// Weights that are summed at once, without going through memory.
const GROUP: usize = 4;

/// For each pixel of a side, where those begin that it is made of, and a weight for each. All have as many, at most
/// [`GROUP`] or a multiple of it: weights of nothing follow, also beyond the end of the side.
#[derive(Default)]
struct Taps {
    count: usize,
    first: Vec<usize>,
    weights: Vec<i32>,
    /// Weights of a pixel before they are rounded.
    exact: Vec<f64>,
}

impl Taps {
    fn fill(&mut self, len: usize, out_len: usize, kernel: Kernel) {
        let scale = len as f64 / out_len as f64;
        let stretch = if kernel.antialias { scale.max(1.0) } else { 1.0 };
        let (reach, narrow) = (kernel.reach * stretch, 1.0 / stretch);
        let centre = |x: usize| (x as f64 + 0.5) * scale;
        // Rounded towards zero, both.
        let range = |x: usize| {
            let centre = centre(x);
            ((centre - reach + 0.5).max(0.0) as usize)..((centre + reach + 0.5) as usize).min(len)
        };
        let widest = (0..out_len).map(|x| range(x).len()).max().unwrap_or(0);
        self.count = if widest <= GROUP { widest.max(1) } else { widest.next_multiple_of(GROUP) };
        self.first.clear();
        self.weights.clear();
        self.weights.resize(out_len * self.count, 0);
        for (x, weights) in self.weights.chunks_exact_mut(self.count).enumerate() {
            let range = range(x);
            self.first.push(range.start);
            self.exact.clear();
            self.exact.extend(range.map(|from| (kernel.at)((from as f64 - centre(x) + 0.5) * narrow)));
            let sum: f64 = self.exact.iter().sum();
            for (weight, exact) in weights.iter_mut().zip(&self.exact) {
                let share = if sum == 0.0 { *exact } else { exact / sum } * f64::from(1 << FRACTION_BITS);
                *weight = (if share < 0.0 { share - 0.5 } else { share + 0.5 }) as i32;
            }
        }
    }

    fn weights(&self, x: usize) -> &[i32] {
        &self.weights[x * self.count..][..self.count]
    }
}

/// Ranges of the target's pixels, one after the other, whose sources are turned at once.
struct Tiles<'a> {
    taps: &'a Taps,
    start: usize,
}

/// Pixels of a row that are turned at once, unless a single one is made of more: few enough for the nearest cache.
const TILE: usize = 512;

impl Iterator for Tiles<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let start = self.start;
        let limit = self.taps.first.get(start)? + TILE;
        let fits = |first: &&usize| **first + self.taps.count <= limit;
        self.start += 1 + self.taps.first[start + 1..].iter().take_while(fits).count();
        Some(start..self.start)
    }
}

/// Rows that are resampled together.
const LANES: usize = 16;

/// A byte of each of some rows.
type Column = [u8; LANES];

#[derive(Default)]
struct Strip {
    columns: Vec<Column>,
    made: Vec<Column>,
}

impl Strip {
    /// Resamples bytes of rows, of which those from pixel `first` on are given, to the pixels `tile` of `targets`: for
    /// each plane, the rows again. A row without bytes is left out.
    fn resample(
        &mut self,
        rows: [&[u8]; LANES],
        first: usize,
        channels: usize,
        taps: &Taps,
        tile: Range<usize>,
        targets: &mut [[&mut [u8]; LANES]],
    ) {
        // Weights of nothing may reach beyond the last pixel.
        self.columns.resize(rows[0].len() + taps.count * channels, [0; LANES]);
        self.made.resize(tile.len() * channels, [0; LANES]);
        let made_steps = if targets.len() == channels { [1, tile.len()] } else { [channels, 1] };
        resample_strip(rows, &mut self.columns, Sums { taps, first, tile, made_steps }, channels, &mut self.made, targets);
    }
}

/// Which sums are made of a strip, and where they go.
struct Sums<'a> {
    taps: &'a Taps,
    /// The pixel that the strip begins with.
    first: usize,
    tile: Range<usize>,
    /// From a pixel to the next, and from a channel to the next.
    made_steps: [usize; 2],
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2", "aarch64+neon"))]
fn resample_strip(
    rows: [&[u8]; LANES],
    columns: &mut [Column],
    sums: Sums,
    channels: usize,
    made: &mut [Column],
    targets: &mut [[&mut [u8]; LANES]],
) {
    turn(rows, columns);
    match (channels, sums.taps.count) {
        (1, 1) => sum_columns::<1, 1>(columns, &sums, made),
        (1, 2) => sum_columns::<1, 2>(columns, &sums, made),
        (1, 3) => sum_columns::<1, 3>(columns, &sums, made),
        (1, _) => sum_columns::<1, GROUP>(columns, &sums, made),
        (_, 1) => sum_columns::<3, 1>(columns, &sums, made),
        (_, 2) => sum_columns::<3, 2>(columns, &sums, made),
        (_, 3) => sum_columns::<3, 3>(columns, &sums, made),
        (_, _) => sum_columns::<3, GROUP>(columns, &sums, made),
    }
    for (made, rows) in made.chunks_exact(made.len() / targets.len()).zip(targets) {
        turn_back(made, rows);
    }
}

/// Each byte of the rows as a column.
#[inline(always)]
fn turn(rows: [&[u8]; LANES], columns: &mut [Column]) {
    let len = rows[0].len();
    for start in (0..len).step_by(LANES) {
        if len < LANES {
            for (at, column) in columns[..len].iter_mut().enumerate() {
                *column = rows.map(|row| row[at]);
            }
        } else {
            // The last block overlaps the one before.
            let start = start.min(len - LANES);
            let block = rows.map(|row| *row[start..].first_chunk().expect("a block is within the row"));
            columns[start..][..LANES].copy_from_slice(&transposed(block));
        }
    }
}

/// Each column as a byte of the rows.
#[inline(always)]
fn turn_back(columns: &[Column], rows: &mut [&mut [u8]; LANES]) {
    let len = columns.len();
    for start in (0..len).step_by(LANES) {
        if len < LANES {
            for (lane, row) in rows.iter_mut().enumerate() {
                row.iter_mut().zip(columns).for_each(|(byte, column)| *byte = column[lane]);
            }
        } else {
            let start = start.min(len - LANES);
            let block = *columns[start..].first_chunk().expect("a block is within the columns");
            for (row, bytes) in rows.iter_mut().zip(transposed(block)) {
                if let Some(row) = row.get_mut(start..start + LANES) {
                    row.copy_from_slice(&bytes);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transposed(block: [Column; LANES]) -> [Column; LANES] {
    use std::arch::x86_64::{__m128i, _mm_unpackhi_epi8, _mm_unpacklo_epi8};
    let mut rows: [__m128i; LANES] = bytemuck::cast(block);
    // A perfect shuffle of all bytes moves the highest bit of a byte's place to the lowest; four of them exchange row
    // and column.
    for _ in 0..LANES.ilog2() {
        rows = std::array::from_fn(|i| {
            let (upper, lower) = (rows[i / 2], rows[i / 2 + LANES / 2]);
            if i % 2 == 0 { _mm_unpacklo_epi8(upper, lower) } else { _mm_unpackhi_epi8(upper, lower) }
        });
    }
    bytemuck::cast(rows)
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transposed(block: [Column; LANES]) -> [Column; LANES] {
    std::array::from_fn(|i| block.map(|row| row[i]))
}

/// Sums of columns, for pixels of `CHANNELS` and `TAPS` weights at a time.
#[inline(always)]
fn sum_columns<const CHANNELS: usize, const TAPS: usize>(columns: &[Column], sums: &Sums, made: &mut [Column]) {
    let [pixel_step, channel_step] = sums.made_steps;
    for (at, x) in sums.tile.clone().enumerate() {
        let window = &columns[(sums.taps.first[x] - sums.first) * CHANNELS..][..sums.taps.count * CHANNELS];
        let weights = sums.taps.weights(x).as_chunks::<TAPS>().0;
        for channel in 0..CHANNELS {
            let mut sums = [HALF; LANES];
            for (columns, weights) in window.chunks_exact(TAPS * CHANNELS).zip(weights) {
                let columns: [&Column; TAPS] = std::array::from_fn(|tap| &columns[tap * CHANNELS + channel]);
                add(columns, weights, &mut sums);
            }
            made[at * pixel_step + channel * channel_step] = sums.map(rounded);
        }
    }
}

/// Sums over rows `row_bytes` apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2", "aarch64+neon"))]
fn resample_columns(rows: &[u8], row_bytes: usize, taps: &Taps, sums: &mut [i32], target: &mut [u8]) {
    for (y, out) in target.chunks_exact_mut(row_bytes).enumerate() {
        let rows = &rows[taps.first[y] * row_bytes..][..taps.count * row_bytes];
        match taps.count {
            1 => sum_rows::<1>(rows, taps.weights(y), sums, out),
            2 => sum_rows::<2>(rows, taps.weights(y), sums, out),
            3 => sum_rows::<3>(rows, taps.weights(y), sums, out),
            _ => sum_rows::<GROUP>(rows, taps.weights(y), sums, out),
        }
    }
}

/// The weighted sum of rows, `TAPS` at a time.
#[inline(always)]
fn sum_rows<const TAPS: usize>(rows: &[u8], weights: &[i32], sums: &mut [i32], out: &mut [u8]) {
    let len = out.len();
    if let [weights] = weights.as_chunks::<TAPS>().0 {
        let rows: [&[u8]; TAPS] = std::array::from_fn(|tap| &rows[tap * len..][..len]);
        for (at, out) in out.iter_mut().enumerate() {
            let mut sum = HALF;
            for tap in 0..TAPS {
                sum += weights[tap] * i32::from(rows[tap][at]);
            }
            *out = rounded(sum);
        }
        return;
    }
    let sums = &mut sums[..len];
    sums.fill(HALF);
    for (rows, weights) in rows.chunks_exact(TAPS * len).zip(weights.as_chunks::<TAPS>().0) {
        let rows: [&[u8]; TAPS] = std::array::from_fn(|tap| &rows[tap * len..][..len]);
        for (at, sum) in sums.iter_mut().enumerate() {
            for tap in 0..TAPS {
                *sum += weights[tap] * i32::from(rows[tap][at]);
            }
        }
    }
    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = rounded(*sum));
}

#[inline(always)]
fn add<const TAPS: usize>(columns: [&Column; TAPS], weights: &[i32; TAPS], sums: &mut [i32; LANES]) {
    for (lane, sum) in sums.iter_mut().enumerate() {
        for tap in 0..TAPS {
            *sum += weights[tap] * i32::from(columns[tap][lane]);
        }
    }
}

#[inline(always)]
fn rounded(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}
