//! Colours changed as by Pillow's `ImageEnhance`, `ImageOps` and torchvision's `adjust_hue`.

use crate::picture::{Picture, luma};

/// From `first` at 0 to `second` at 1, and beyond (Pillow's `Image.blend`).
pub(super) fn blend(first: u8, second: u8, factor: f32) -> u8 {
    // The cast cuts off fractions and saturates, as Pillow does.
    (f32::from(first) + factor * (f32::from(second) - f32::from(first))) as u8
}

impl Picture {
    /// From black at 0 to itself at 1, and beyond.
    pub(super) fn brighten(&mut self, factor: f32) {
        self.map(|value| blend(0, value, factor));
    }

    /// From its mean grey at 0 to itself at 1, and beyond.
    pub(super) fn change_contrast(&mut self, factor: f32) {
        if factor == 1.0 {
            return;
        }
        let sum: u64 = match self.channels {
            1 => self.pixels.iter().map(|value| u64::from(*value)).sum(),
            _ => self.pixels.chunks_exact(3).map(|p| u64::from(luma(p[0], p[1], p[2]))).sum(),
        };
        let mean = (sum as f64 / (self.height * self.width) as f64 + 0.5) as u8;
        self.map(|value| blend(mean, value, factor));
    }

    /// From grey at 0 to itself at 1, and beyond.
    pub(super) fn saturate(&mut self, factor: f32) {
        if self.channels == 3 && factor != 1.0 {
            for pixel in self.pixels.chunks_exact_mut(3) {
                let grey = luma(pixel[0], pixel[1], pixel[2]);
                pixel.iter_mut().for_each(|value| *value = blend(grey, *value, factor));
            }
        }
    }

    /// In shades of grey, with as many channels as before.
    pub(crate) fn grey(&mut self) {
        self.saturate(0.0);
    }

    /// All hues turned by so many full circles, in steps of 1/255.
    pub(super) fn turn_hue(&mut self, circles: f64) {
        let shift = ((circles * 255.0) as i32).rem_euclid(256) as u8;
        if self.channels == 3 && shift != 0 {
            for pixel in self.pixels.chunks_exact_mut(3) {
                let [hue, saturation, value] = hsv([pixel[0], pixel[1], pixel[2]]);
                pixel.copy_from_slice(&rgb([hue.wrapping_add(shift), saturation, value]));
            }
        }
    }

    /// Stretched so that the darkest value of each channel is 0 and the brightest 255.
    pub(super) fn autocontrast(&mut self) {
        self.map_channels(|counts| {
            let darkest = counts.iter().position(|n| *n > 0).unwrap_or(0);
            let brightest = counts.iter().rposition(|n| *n > 0).unwrap_or(0);
            (darkest < brightest).then(|| {
                let scale = 255.0 / (brightest - darkest) as f64;
                let offset = -(darkest as f64) * scale;
                std::array::from_fn(|value| (value as f64 * scale + offset) as u8)
            })
        });
    }

    /// All values of a channel about as frequent.
    pub(super) fn equalize(&mut self) {
        self.map_channels(|counts| {
            let last = counts.iter().rfind(|n| **n > 0).copied().unwrap_or(0);
            let step = (counts.iter().sum::<usize>() - last) / 255;
            (step > 0).then(|| {
                let mut below = step / 2;
                std::array::from_fn(|value| {
                    let level = below / step;
                    below += counts[value];
                    level.min(255) as u8
                })
            })
        });
    }

    /// The highest bits of each value.
    pub(super) fn posterize(&mut self, bits: u32) {
        let mask = !(0xFF_u32 >> bits) as u8;
        self.map(|value| value & mask);
    }

    /// Values from `threshold` on as their negatives.
    pub(super) fn solarize(&mut self, threshold: f64) {
        self.map(|value| if f64::from(value) < threshold { value } else { 255 - value });
    }

    fn map(&mut self, change: impl Fn(u8) -> u8) {
        let table: [u8; 256] = std::array::from_fn(|value| change(value as u8));
        self.pixels.iter_mut().for_each(|value| *value = table[usize::from(*value)]);
    }

    /// Each channel by a table made of how often each value occurs, where there is one.
    fn map_channels(&mut self, table: impl Fn(&[usize; 256]) -> Option<[u8; 256]>) {
        for channel in 0..self.channels {
            let mut counts = [0; 256];
            self.pixels[channel..].iter().step_by(self.channels).for_each(|value| counts[usize::from(*value)] += 1);
            if let Some(table) = table(&counts) {
                let values = self.pixels[channel..].iter_mut().step_by(self.channels);
                values.for_each(|value| *value = table[usize::from(*value)]);
            }
        }
    }
}

/// Hue, saturation and value, each in 0..=255 and rounded down (Pillow's mode `HSV`).
fn hsv([red, green, blue]: [u8; 3]) -> [u8; 3] {
    let (greatest, least) = (red.max(green).max(blue), red.min(green).min(blue));
    if greatest == least {
        return [0, 0, greatest];
    }
    let range = f32::from(greatest - least);
    let part = |value: u8| f32::from(greatest - value) / range;
    let (r, g, b) = (part(red), part(green), part(blue));
    let sixths = if red == greatest {
        b - g
    } else if green == greatest {
        (2.0 + f64::from(r) - f64::from(b)) as f32
    } else {
        (4.0 + f64::from(g) - f64::from(r)) as f32
    };
    let hue = (f64::from(sixths) / 6.0 + 1.0).fract() as f32;
    let saturation = range / f32::from(greatest);
    [(f64::from(hue) * 255.0) as u8, (f64::from(saturation) * 255.0) as u8, greatest]
}

fn rgb([hue, saturation, value]: [u8; 3]) -> [u8; 3] {
    if saturation == 0 {
        return [value; 3];
    }
    let sixths = f64::from(hue) * 6.0 / 255.0;
    let sector = libm::floor(sixths);
    let rest = f64::from((sixths - sector) as f32);
    let saturation = f64::from((f64::from(saturation) / 255.0) as f32);
    let shade = |share: f64| libm::round(f64::from(value) * (1.0 - share)) as u8;
    let (low, falling, rising) = (shade(saturation), shade(saturation * rest), shade(saturation * (1.0 - rest)));
    match sector as u8 % 6 {
        0 => [value, rising, low],
        1 => [falling, value, low],
        2 => [low, value, rising],
        3 => [low, falling, value],
        4 => [rising, low, value],
        _ => [value, low, falling],
    }
}
