//! The steps of one tensor of pictures, checked against each other once and then applied to every sample.

use updraft_base::Key;
use updraft_graph::DType;

use super::floats::{self, Channel};
use super::resize::Sampling;
use super::{Picture, Workspace};
use crate::augment::Draws;
use crate::config::{
    Axis, Colour, ColourJitter, Decode, GaussianBlur, RandAugment, RandomCrop, RandomErasing, RandomResizedCrop,
    Resize, Transform,
};
use crate::transform::spread;

/// Decoding, moving pixels, and how they end.
pub(crate) struct PicturePlan {
    decode: Decode,
    steps: Vec<Step>,
    /// How many of the steps come before the first random one. Their result is worth keeping.
    fixed: usize,
    /// Whether there is resizing, and nothing that looks at colours: then words are faster.
    words: bool,
    finish: Finish,
}

enum Step {
    Resize(Resize, Sampling),
    Crop([usize; 2]),
    RandomCrop(RandomCrop),
    RandomResizedCrop(RandomResizedCrop, Sampling),
    RandomFlip(Axis),
    ColourJitter(ColourJitter),
    RandomGrey(f32),
    GaussianBlur(GaussianBlur),
    RandAugment(RandAugment),
    RandomErasing(RandomErasing),
}

enum Finish {
    Bytes,
    Floats(Vec<Channel>),
}

impl PicturePlan {
    /// The steps after `decode`.
    pub(crate) fn new(decode: &Decode, transforms: &[Transform]) -> Result<PicturePlan, String> {
        let channels = match decode.colour {
            Colour::Grey => 1,
            Colour::Rgb => 3,
        };
        let mut steps = Vec::new();
        let mut finish = None;
        for transform in transforms {
            if finish.is_some() {
                return Err(format!("{transform:?} comes after the pixels became floats"));
            }
            match transform {
                Transform::ToFloat => finish = Some(Finish::floats(channels, &[0.0], &[1.0])?),
                Transform::Normalize(n) => finish = Some(Finish::floats(channels, &n.mean, &n.std)?),
                other => steps.push(Step::new(other, channels)?),
            }
        }
        let fixed = steps.iter().position(Step::is_random).unwrap_or(steps.len());
        let words = steps.iter().any(Step::resizes) && steps.iter().all(Step::moves_pixels);
        Ok(PicturePlan { decode: decode.clone(), steps, fixed, words, finish: finish.unwrap_or(Finish::Bytes) })
    }

    pub(crate) fn dtype(&self) -> DType {
        match self.finish {
            Finish::Bytes => DType::U8,
            Finish::Floats(_) => DType::F32,
        }
    }

    /// Decodes and applies the steps before the first random one.
    pub(crate) fn prepare(&self, bytes: &[u8], workspace: &mut Workspace) -> Result<Picture, String> {
        let decoded = Picture::decode_as(bytes, &self.decode, self.words, workspace)?;
        // No step before the first random one draws.
        self.apply(0..self.fixed, decoded, &Key::new(0), workspace)
    }

    /// Applies the steps from the first random one on. `key` belongs to this tensor of this sample in this epoch.
    pub(crate) fn vary(&self, prepared: Picture, key: &Key, workspace: &mut Workspace) -> Result<Picture, String> {
        self.apply(self.fixed..self.steps.len(), prepared, key, workspace)
    }

    fn apply(
        &self,
        steps: std::ops::Range<usize>,
        mut picture: Picture,
        key: &Key,
        workspace: &mut Workspace,
    ) -> Result<Picture, String> {
        for (index, step) in self.steps.iter().enumerate().take(steps.end).skip(steps.start) {
            picture = step.apply(picture, &key.child_index(index as u64), workspace)?;
        }
        Ok(picture)
    }

    pub(crate) fn is_random(&self) -> bool {
        self.fixed < self.steps.len()
    }

    /// Writes the picture, channels first, as the elements of [`dtype`](Self::dtype).
    pub(crate) fn write(&self, picture: &Picture, out: &mut [u8]) {
        match &self.finish {
            Finish::Bytes => {
                let area = picture.height * picture.width;
                for channel in 0..picture.planes() {
                    let pixels = picture.pixels[channel..].iter().step_by(picture.channels);
                    out[channel * area..].iter_mut().zip(pixels).for_each(|(out, pixel)| *out = *pixel);
                }
            }
            Finish::Floats(channels) => {
                floats::write(&picture.pixels, picture.channels, channels, bytemuck::cast_slice_mut(out))
            }
        }
    }
}

impl Step {
    fn new(transform: &Transform, channels: usize) -> Result<Step, String> {
        Ok(match transform {
            Transform::Resize(resize) => {
                match (resize.size, resize.shorter) {
                    (Some(size), None) => some_pixels(size)?,
                    (None, Some(shorter)) => some_pixels([shorter; 2])?,
                    _ => return Err("`resize` takes either `size` or `shorter`".into()),
                };
                Step::Resize(resize.clone(), Sampling::new(resize.filter, resize.antialias))
            }
            Transform::Crop(size) => Step::Crop(some_pixels(*size)?),
            Transform::RandomCrop(crop) => {
                some_pixels(crop.size)?;
                // Twice the padding is added to a side, which must not overflow.
                some_pixels([crop.padding.max(1); 2])?;
                Step::RandomCrop(crop.clone())
            }
            Transform::RandomResizedCrop(crop) => {
                some_pixels(crop.size)?;
                crop.check()?;
                Step::RandomResizedCrop(crop.clone(), Sampling::new(crop.filter, crop.antialias))
            }
            Transform::RandomFlip(axis) => Step::RandomFlip(*axis),
            Transform::ColourJitter(jitter) => {
                jitter.check()?;
                Step::ColourJitter(jitter.clone())
            }
            Transform::RandomGrey(probability) if (0.0..=1.0).contains(probability) => Step::RandomGrey(*probability),
            Transform::RandomGrey(probability) => return Err(format!("{probability} is not a chance from 0 to 1")),
            Transform::GaussianBlur(blur) => {
                blur.check()?;
                Step::GaussianBlur(blur.clone())
            }
            Transform::RandAugment(augment) => {
                augment.check()?;
                Step::RandAugment(augment.clone())
            }
            Transform::RandomErasing(erasing) => {
                erasing.check(channels)?;
                Step::RandomErasing(erasing.clone())
            }
            other => return Err(format!("{other:?} is for numbers, and this is a picture")),
        })
    }

    fn is_random(&self) -> bool {
        !matches!(self, Step::Resize(..) | Step::Crop(_))
    }

    fn resizes(&self) -> bool {
        matches!(self, Step::Resize(..) | Step::RandomResizedCrop(..))
    }

    /// Whether it only moves pixels, or weighs each channel by itself.
    fn moves_pixels(&self) -> bool {
        self.resizes() || matches!(self, Step::Crop(_) | Step::RandomCrop(_) | Step::RandomFlip(_))
    }

    fn apply(&self, mut picture: Picture, key: &Key, workspace: &mut Workspace) -> Result<Picture, String> {
        match self {
            Step::Resize(resize, sampling) => {
                let size = some_pixels(resize.target(picture.height, picture.width))?;
                picture.resized(size, *sampling, workspace)
            }
            Step::Crop(size) => {
                let at = picture.place(*size, 0, |room| room / 2)?;
                Ok(picture.cut(at, *size, workspace))
            }
            Step::RandomCrop(RandomCrop { size, padding }) => {
                let mut counter = 0;
                let at = picture.place(*size, *padding, |room| {
                    counter += 1;
                    key.below(counter, room + 1)
                })?;
                Ok(picture.cut(at, *size, workspace))
            }
            Step::RandomFlip(axis) => {
                if key.bits(0) & 1 == 1 {
                    picture.flip(*axis);
                }
                Ok(picture)
            }
            Step::RandomResizedCrop(crop, sampling) => crop.apply(picture, *sampling, &mut Draws::new(key), workspace),
            Step::ColourJitter(jitter) => {
                jitter.apply(&mut picture, &mut Draws::new(key));
                Ok(picture)
            }
            Step::RandomGrey(probability) => {
                if key.uniform_f32(0) < *probability {
                    picture.grey();
                }
                Ok(picture)
            }
            Step::GaussianBlur(blur) => {
                blur.apply(&mut picture, &mut Draws::new(key));
                Ok(picture)
            }
            Step::RandAugment(augment) => Ok(augment.apply(picture, &mut Draws::new(key), workspace)),
            Step::RandomErasing(erasing) => {
                erasing.apply(&mut picture, &mut Draws::new(key));
                Ok(picture)
            }
        }
    }
}

impl Finish {
    fn floats(channels: usize, mean: &[f32], std: &[f32]) -> Result<Finish, String> {
        let (mean, std) = (spread(mean, channels, "mean")?, spread(std, channels, "std")?);
        if std.contains(&0.0) {
            return Err("a std of 0 divides by zero".into());
        }
        Ok(Finish::Floats(mean.iter().zip(&std).map(|(mean, std)| Channel::new(*mean, *std)).collect()))
    }
}

impl Picture {
    /// The top left corner of a window of `size` in the picture with `padding` around it; `choose` picks within the room.
    fn place(
        &self,
        [height, width]: [usize; 2],
        padding: usize,
        mut choose: impl FnMut(u64) -> u64,
    ) -> Result<[isize; 2], String> {
        let mut start = |side: usize, window: usize| {
            let room = (side + 2 * padding).checked_sub(window)?;
            Some(choose(room as u64) as isize - padding as isize)
        };
        match (start(self.height, height), start(self.width, width)) {
            (Some(top), Some(left)) => Ok([top, left]),
            _ => Err(format!(
                "a window of {height} x {width} does not fit a picture of {} x {} with padding {padding}",
                self.height, self.width
            )),
        }
    }
}

fn some_pixels(size: [usize; 2]) -> Result<[usize; 2], String> {
    const SIDE_MAX: usize = 1 << 16;
    if size.iter().all(|side| (1..=SIDE_MAX).contains(side)) {
        Ok(size)
    } else {
        Err(format!("{} x {} pixels: sides are 1 to {SIDE_MAX}", size[0], size[1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLOUR: &[u8] = include_bytes!("../../tests/fixtures/colour.jpg");

    /// The pixels that steps make of the picture, in words where those are faster and without, and whether they are.
    fn both_ways(steps: &str) -> ([Vec<f32>; 2], bool) {
        let decode = Decode { colour: Colour::Rgb, orient: true, pixels_max: 1 << 20 };
        let steps: Vec<Transform> = serde_json::from_str(steps).unwrap();
        let plan = PicturePlan::new(&decode, &steps).unwrap();
        let words = plan.words;
        let pixels = |plan: &PicturePlan| {
            let mut workspace = Workspace::default();
            let picture = plan.prepare(COLOUR, &mut workspace).unwrap();
            let picture = plan.vary(picture, &Key::new(7), &mut workspace).unwrap();
            let mut out = vec![0.0; 3 * picture.height * picture.width];
            plan.write(&picture, bytemuck::cast_slice_mut(&mut out));
            out
        };
        ([pixels(&plan), pixels(&PicturePlan { words: false, ..plan })], words)
    }

    #[test]
    fn words_give_the_same_pixels() {
        let normalize = r#"{"normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}"#;
        for (steps, words) in [
            (r#"{"resize": [31, 17]}"#, true),
            (r#"{"resize": {"shorter": 20, "filter": "lanczos"}}, {"crop": [16, 16]}"#, true),
            (r#"{"random_resized_crop": {"size": [24, 24]}}, {"random_flip": "horizontal"}"#, true),
            (r#"{"resize": [40, 40]}, {"random_crop": {"size": [32, 32], "padding": 4}}"#, true),
            (r#"{"crop": [16, 16]}"#, false),
            (r#"{"resize": [31, 17]}, {"random_grey": 0.5}"#, false),
        ] {
            let ([with, without], takes_words) = both_ways(&format!("[{steps}, {normalize}]"));
            assert_eq!(with, without, "{steps}");
            assert_eq!(takes_words, words, "{steps}");
        }
    }

    #[test]
    fn what_is_kept_of_words_is_packed() {
        let decode = Decode { colour: Colour::Rgb, orient: false, pixels_max: 1 << 20 };
        let mut workspace = Workspace::default();
        let [words, packed] =
            [true, false].map(|words| Picture::decode_as(COLOUR, &decode, words, &mut workspace).unwrap());
        assert_eq!((words.channels, words.planes()), (4, 3));
        assert_eq!(words.packed(), packed);
        assert_eq!(packed.packed(), packed);
    }
}
