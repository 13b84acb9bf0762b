//! Pixels to normalised floats, channels first.
//!
//! `(pixel / 255 - mean) / std` has 256 results for a channel, so a table would do; but divisions by constants that
//! are multiplications run in vector registers, where a table's loads do not. That both agree to the bit is checked for
//! all 256 pixels when a recipe is opened, and where they do not, the table is used.

use multiversion::multiversion;

use super::WORD;

/// The floats of one channel.
pub(super) struct Channel {
    table: [f32; 256],
    affine: Option<Affine>,
}

#[derive(Clone, Copy)]
struct Affine {
    mean: f32,
    std_reciprocal: [f32; 2],
}

/// A reciprocal as the sum of two floats, which is exact to 48 bits.
const fn reciprocal(divisor: f64) -> [f32; 2] {
    let exact = 1.0 / divisor;
    let high = exact as f32;
    [high, (exact - high as f64) as f32]
}

const RECIPROCAL_255: [f32; 2] = reciprocal(255.0);

impl Affine {
    /// Each quotient is a product with a reciprocal of twice the precision, rounded once.
    #[inline(always)]
    fn apply(self, pixel: u8) -> f32 {
        let product = |value: f32, [high, low]: [f32; 2]| value.mul_add(high, value * low);
        product(product(f32::from(pixel), RECIPROCAL_255) - self.mean, self.std_reciprocal)
    }
}

impl Channel {
    pub(super) fn new(mean: f32, std: f32) -> Channel {
        let table: [f32; 256] = std::array::from_fn(|pixel| (pixel as f32 / 255.0 - mean) / std);
        let affine = Affine { mean, std_reciprocal: reciprocal(f64::from(std)) };
        let agrees = |(pixel, value): (usize, &f32)| affine.apply(pixel as u8).to_bits() == value.to_bits();
        let affine = table.iter().enumerate().all(agrees).then_some(affine);
        Channel { table, affine }
    }
}

/// Writes pixels of `pixel_bytes` bytes, the channels of each first and side by side, as one plane of floats for each
/// channel.
pub(super) fn write(pixels: &[u8], pixel_bytes: usize, channels: &[Channel], out: &mut [f32]) {
    let affine: Vec<Affine> = channels.iter().filter_map(|c| c.affine).collect();
    match (&affine[..], pixel_bytes) {
        ([one], 1) if has_fma() => write_grey(pixels, *one, out),
        ([red, green, blue], 3) if has_fma() => write_rgb(pixels, [*red, *green, *blue], out),
        ([red, green, blue], WORD) if has_fma() => write_words(pixels, [*red, *green, *blue], out),
        _ => {
            let area = pixels.len() / pixel_bytes.max(1);
            for (index, channel) in channels.iter().enumerate() {
                let pixels = pixels[index..].iter().step_by(pixel_bytes);
                let plane = out[index * area..].iter_mut().zip(pixels);
                plane.for_each(|(out, pixel)| *out = channel.table[usize::from(*pixel)]);
            }
        }
    }
}

/// Without the instruction, a fused multiply-add is a slow function.
fn has_fma() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("fma") && std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    return cfg!(target_arch = "aarch64");
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma", "aarch64+neon"))]
fn write_grey(pixels: &[u8], affine: Affine, out: &mut [f32]) {
    for (out, pixel) in out.iter_mut().zip(pixels) {
        *out = affine.apply(*pixel);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma", "aarch64+neon"))]
fn write_rgb(pixels: &[u8], affine: [Affine; 3], out: &mut [f32]) {
    const WIDTH: usize = 64;
    let area = pixels.len() / 3;
    let (red, rest) = out.split_at_mut(area);
    let (green, blue) = rest.split_at_mut(area);
    let planes = [red, green, &mut blue[..area]];
    let whole = area - area % WIDTH;
    for start in (0..whole).step_by(WIDTH) {
        let mut block = [0; 3 * WIDTH];
        block.copy_from_slice(&pixels[3 * start..3 * (start + WIDTH)]);
        for channel in 0..3 {
            // Apart first: a loop that gathers and computes at once is not made of vectors.
            let mut apart = [0; WIDTH];
            for i in 0..WIDTH {
                apart[i] = block[3 * i + channel];
            }
            for (out, pixel) in planes[channel][start..start + WIDTH].iter_mut().zip(apart) {
                *out = affine[channel].apply(pixel);
            }
        }
    }
    for at in whole..area {
        for channel in 0..3 {
            planes[channel][at] = affine[channel].apply(pixels[3 * at + channel]);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma", "aarch64+neon"))]
fn write_words(pixels: &[u8], affine: [Affine; 3], out: &mut [f32]) {
    /// So many that what one channel read is still in the fastest cache when the next reads it.
    const BLOCK: usize = 1024;
    let words = pixels.as_chunks::<WORD>().0;
    let (red, rest) = out.split_at_mut(words.len());
    let (green, blue) = rest.split_at_mut(words.len());
    let planes = [red, green, &mut blue[..words.len()]];
    for (block, words) in words.chunks(BLOCK).enumerate() {
        for channel in 0..3 {
            let out = &mut planes[channel][block * BLOCK..][..words.len()];
            for (out, word) in out.iter_mut().zip(words) {
                *out = affine[channel].apply((u32::from_le_bytes(*word) >> (8 * channel)) as u8);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_normalisations_need_no_table() {
        for (mean, std) in [(0.0, 1.0), (0.5, 0.5), (0.1307, 0.3081), (0.485, 0.229), (0.456, 0.224), (0.406, 0.225)] {
            assert!(Channel::new(mean, std).affine.is_some(), "{mean} {std}");
        }
    }

    #[test]
    fn all_ways_write_the_same_bits() {
        let pixels: Vec<u8> = (0..3 * 149).map(|i| (i * 101 % 256) as u8).collect();
        for count in [1, 3] {
            let fast: Vec<Channel> = (0..count).map(|c| Channel::new(0.485 - 0.03 * c as f32, 0.229)).collect();
            let slow: Vec<Channel> = fast.iter().map(|c| Channel { table: c.table, affine: None }).collect();
            let (mut with, mut without) = (vec![0.0; pixels.len()], vec![1.0; pixels.len()]);
            write(&pixels, count, &fast, &mut with);
            write(&pixels, count, &slow, &mut without);
            assert_eq!(with, without);
            if count == 3 {
                let words: Vec<u8> = pixels.chunks(3).flat_map(|pixel| [pixel[0], pixel[1], pixel[2], 9]).collect();
                for channels in [&fast, &slow] {
                    write(&words, WORD, channels, &mut with);
                    assert_eq!(with, without);
                }
            }
        }
    }
}
