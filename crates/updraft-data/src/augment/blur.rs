//! Blurring and sharpening.

use multiversion::multiversion;

use super::colour::blend;
use crate::picture::Picture;

impl Picture {
    /// Convolved with a normal distribution of standard deviation `sigma`, cut off to `side` pixels and made to sum to
    /// one; mirrored at the border without repeating it (torchvision's `gaussian_blur`).
    pub(super) fn blur(&mut self, sigma: f64, side: usize) {
        let radius = side / 2;
        if sigma == 0.0 || radius == 0 {
            return;
        }
        let weights: Vec<f64> = (0..side)
            .map(|i| {
                let distance = (i as f64 - radius as f64) / sigma;
                libm::exp(-0.5 * distance * distance)
            })
            .collect();
        let sum: f64 = weights.iter().sum();
        let weights: Vec<f32> = weights.iter().map(|w| (w / sum) as f32).collect();

        let (height, row_len) = (self.height, self.width * self.channels);
        let mut across = vec![0.0; self.pixels.len()];
        let mut padded = vec![0.0; (self.width + 2 * radius) * self.channels];
        for (row, out) in self.pixels.chunks_exact(row_len).zip(across.chunks_exact_mut(row_len)) {
            for (at, pixel) in padded.chunks_exact_mut(self.channels).enumerate() {
                let from = mirrored(at as isize - radius as isize, self.width) * self.channels;
                pixel.iter_mut().zip(&row[from..]).for_each(|(p, value)| *p = f32::from(*value));
            }
            for (i, weight) in weights.iter().enumerate() {
                add_weighted(out, &padded[i * self.channels..][..row_len], *weight);
            }
        }
        let mut sums = vec![0.0; row_len];
        for y in 0..height {
            sums.fill(0.0);
            for (i, weight) in weights.iter().enumerate() {
                let from = mirrored((y + i) as isize - radius as isize, height);
                add_weighted(&mut sums, &across[from * row_len..][..row_len], *weight);
            }
            let row = &mut self.pixels[y * row_len..][..row_len];
            row.iter_mut().zip(&sums).for_each(|(out, sum)| *out = sum.round_ties_even() as u8);
        }
    }

    /// Between the smoothed picture at 0, itself at 1, and beyond (Pillow's `ImageEnhance.Sharpness`).
    pub(super) fn sharpen(&mut self, factor: f32) {
        if factor == 1.0 {
            return;
        }
        let (height, width, channels) = (self.height, self.width, self.channels);
        let row_len = width * channels;
        let original = self.pixels.clone();
        for y in 1..height.saturating_sub(1) {
            for x in channels..row_len.saturating_sub(channels) {
                let at = y * row_len + x;
                let sum_of_row = |at: usize| {
                    u32::from(original[at - channels]) + u32::from(original[at]) + u32::from(original[at + channels])
                };
                let sum = sum_of_row(at - row_len) + sum_of_row(at) + sum_of_row(at + row_len);
                let sum = sum + 4 * u32::from(original[at]);
                // Rounded thirteenths.
                let smooth = ((2 * sum + 13) / 26) as u8;
                self.pixels[at] = blend(smooth, original[at], factor);
            }
        }
    }
}

/// A place beyond the border, seen in a mirror that stands on the border's pixel.
fn mirrored(at: isize, len: usize) -> usize {
    let period = 2 * (len as isize - 1);
    if period == 0 {
        return 0;
    }
    let folded = at.rem_euclid(period);
    folded.min(period - folded) as usize
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "aarch64+neon"))]
fn add_weighted(sums: &mut [f32], values: &[f32], weight: f32) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += weight * value;
    }
}
