//! Pictures varied at random, so that a network learns what stays the same.
//!
//! Every draw is a number of a counter-based stream of one step of one tensor of one sample in one epoch, so a picture is
//! varied alike whichever thread does it, in whatever batch, and after whatever interruption. What has an original in
//! Pillow computes what Pillow computes, rounding included.

use updraft_base::Key;

use crate::config::{ColourJitter, GaussianBlur, RandAugment, RandomErasing, RandomResizedCrop};
use crate::picture::{Picture, Sampling, Workspace};

mod affine;
mod blur;
mod colour;
mod mix;
mod rand_augment;

pub(crate) use mix::mix;

/// The numbers of one stream, one after another.
pub(crate) struct Draws {
    key: Key,
    counter: u64,
}

impl Draws {
    pub(crate) fn new(key: &Key) -> Draws {
        Draws { key: *key, counter: 0 }
    }

    fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter - 1
    }

    /// Uniform between two numbers.
    fn uniform(&mut self, [low, high]: [f64; 2]) -> f64 {
        let counter = self.next();
        low + (high - low) * f64::from(self.key.uniform_f32(counter))
    }

    /// Uniform between two numbers above zero, on a logarithmic scale.
    fn log_uniform(&mut self, [low, high]: [f64; 2]) -> f64 {
        libm::exp(self.uniform([libm::log(low), libm::log(high)]))
    }

    fn normal(&mut self) -> f64 {
        let counter = self.next();
        f64::from(self.key.normal_f32(counter))
    }

    /// Uniform below a number.
    fn below(&mut self, n: usize) -> usize {
        let counter = self.next();
        self.key.below(counter, n as u64) as usize
    }

    /// Random bytes, sixteen of a block; the third counter word sets them apart from all single numbers.
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(16) {
            let counter = self.next();
            let words = self.key.block([counter as u32, (counter >> 32) as u32, 2, 0]);
            chunk.iter_mut().zip(words.iter().flat_map(|word| word.to_le_bytes())).for_each(|(out, byte)| *out = byte);
        }
    }

    /// True with this chance.
    fn chance(&mut self, probability: f32) -> bool {
        let counter = self.next();
        self.key.uniform_f32(counter) < probability
    }
}

/// A rectangle of a picture, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    top: usize,
    left: usize,
    height: usize,
    width: usize,
}

/// A range of settings as numbers to draw between.
fn between(range: [f32; 2]) -> [f64; 2] {
    range.map(f64::from)
}

/// How often a rectangle is drawn that may not fit.
const ATTEMPTS: usize = 10;

impl RandomResizedCrop {
    pub(crate) fn check(&self) -> Result<(), String> {
        check_range("area", self.area, 0.0, 1.0)?;
        check_range("ratio", self.ratio, f32::MIN_POSITIVE, f32::MAX)
    }

    /// The part to keep, by the draws of torchvision's `RandomResizedCrop.get_params`.
    fn part(&self, height: usize, width: usize, draws: &mut Draws) -> Part {
        let (tall, wide) = (height as f64, width as f64);
        for _ in 0..ATTEMPTS {
            let area = tall * wide * draws.uniform(between(self.area));
            let ratio = draws.log_uniform(between(self.ratio));
            let part_width = libm::round(libm::sqrt(area * ratio)) as usize;
            let part_height = libm::round(libm::sqrt(area / ratio)) as usize;
            if (1..=width).contains(&part_width) && (1..=height).contains(&part_height) {
                let top = draws.below(height - part_height + 1);
                let left = draws.below(width - part_width + 1);
                return Part { top, left, height: part_height, width: part_width };
            }
        }
        // The middle, in the nearest shape that is allowed.
        let [least, greatest] = between(self.ratio);
        let (part_height, part_width) = if wide / tall < least {
            (libm::round(wide / least).min(tall) as usize, width)
        } else if wide / tall > greatest {
            (height, libm::round(tall * greatest).min(wide) as usize)
        } else {
            (height, width)
        };
        let (part_height, part_width) = (part_height.max(1), part_width.max(1));
        Part { top: (height - part_height) / 2, left: (width - part_width) / 2, height: part_height, width: part_width }
    }

    pub(crate) fn apply(
        &self,
        picture: Picture,
        sampling: Sampling,
        draws: &mut Draws,
        workspace: &mut Workspace,
    ) -> Result<Picture, String> {
        let part = self.part(picture.height, picture.width, draws);
        let at = [part.top as isize, part.left as isize];
        picture.cut(at, [part.height, part.width], workspace).resized(self.size, sampling, workspace)
    }
}

impl ColourJitter {
    pub(crate) fn check(&self) -> Result<(), String> {
        let factors = [("brightness", self.brightness), ("contrast", self.contrast), ("saturation", self.saturation)];
        for (name, value) in factors {
            check_range(name, [value; 2], 0.0, f32::MAX)?;
        }
        check_range("hue", [self.hue; 2], 0.0, 0.5)
    }

    pub(crate) fn apply(&self, picture: &mut Picture, draws: &mut Draws) {
        let mut order = [0, 1, 2, 3];
        for last in (1..order.len()).rev() {
            order.swap(last, draws.below(last + 1));
        }
        let mut factor = |x: f32| draws.uniform([(1.0 - f64::from(x)).max(0.0), 1.0 + f64::from(x)]) as f32;
        let (brightness, contrast, saturation) =
            (factor(self.brightness), factor(self.contrast), factor(self.saturation));
        let hue = draws.uniform([-f64::from(self.hue), f64::from(self.hue)]);
        for step in order {
            match step {
                0 => picture.brighten(brightness),
                1 => picture.change_contrast(contrast),
                2 => picture.saturate(saturation),
                _ => picture.turn_hue(hue),
            }
        }
    }
}

impl GaussianBlur {
    pub(crate) fn check(&self) -> Result<(), String> {
        check_range("sigma", self.sigma, 0.0, SIGMA_MAX)?;
        check_range("probability", [self.probability; 2], 0.0, 1.0)?;
        match self.kernel {
            Some(side) if side % 2 == 0 || side > KERNEL_MAX => {
                Err(format!("a kernel of {side} pixels; odd numbers up to {KERNEL_MAX} are taken"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn apply(&self, picture: &mut Picture, draws: &mut Draws) {
        if !draws.chance(self.probability) {
            return;
        }
        let sigma = draws.uniform(between(self.sigma));
        let side = self.kernel.unwrap_or(2 * libm::ceil(3.0 * f64::from(self.sigma[1])) as usize + 1);
        picture.blur(sigma, side);
    }
}

const SIGMA_MAX: f32 = 100.0;
const KERNEL_MAX: usize = 601;

impl RandAugment {
    pub(crate) fn check(&self) -> Result<(), String> {
        check_range("magnitude", [self.magnitude; 2], 0.0, 10.0)?;
        if self.operations > OPERATIONS_MAX {
            return Err(format!("{} operations; up to {OPERATIONS_MAX} are done", self.operations));
        }
        Ok(())
    }

    pub(crate) fn apply(&self, mut picture: Picture, draws: &mut Draws, workspace: &mut Workspace) -> Picture {
        for _ in 0..self.operations {
            let operation = rand_augment::ALL[draws.below(rand_augment::ALL.len())];
            let sign = if draws.chance(0.5) { -1.0 } else { 1.0 };
            picture = operation.apply(picture, f64::from(self.magnitude), sign, workspace);
        }
        picture
    }
}

/// Far beyond the paper's 3: a bound so that a recipe cannot ask for an endless epoch.
const OPERATIONS_MAX: usize = 100;

impl RandomErasing {
    pub(crate) fn check(&self, channels: usize) -> Result<(), String> {
        check_range("probability", [self.probability; 2], 0.0, 1.0)?;
        check_range("area", self.area, 0.0, 1.0)?;
        check_range("ratio", self.ratio, f32::MIN_POSITIVE, f32::MAX)?;
        match &self.fill {
            Some(fill) if fill.len() != channels => {
                Err(format!("{} values of `fill` for {channels} channels", fill.len()))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn apply(&self, picture: &mut Picture, draws: &mut Draws) {
        if !draws.chance(self.probability) {
            return;
        }
        let (height, width) = (picture.height, picture.width);
        for _ in 0..ATTEMPTS {
            let area = (height * width) as f64 * draws.uniform(between(self.area));
            let ratio = draws.log_uniform(between(self.ratio));
            let erased_height = libm::round(libm::sqrt(area / ratio)) as usize;
            let erased_width = libm::round(libm::sqrt(area * ratio)) as usize;
            if erased_height < height && erased_width < width {
                let top = draws.below(height - erased_height + 1);
                let left = draws.below(width - erased_width + 1);
                for y in top..top + erased_height {
                    let row = &mut picture.pixels[(y * width + left) * picture.channels..];
                    let row = &mut row[..erased_width * picture.channels];
                    match &self.fill {
                        Some(fill) => row.chunks_exact_mut(fill.len()).for_each(|pixel| pixel.copy_from_slice(fill)),
                        None => draws.fill(row),
                    }
                }
                return;
            }
        }
    }
}

/// Refuses a range that is turned around or reaches beyond its bounds.
fn check_range(name: &str, [low, high]: [f32; 2], least: f32, most: f32) -> Result<(), String> {
    // Written so that a NaN is refused.
    if least <= low && low <= high && high <= most {
        Ok(())
    } else {
        Err(format!("`{name}` of {low} to {high}; it lies in {least} to {most}, the lesser first"))
    }
}

#[cfg(test)]
mod tests;
