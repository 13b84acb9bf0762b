//! Settings of the steps that vary pictures at random.

use serde::{Deserialize, Deserializer, Serialize};

use super::pictures::Filter;
use super::short::{Short, both_forms};

/// A part of random area, shape and place, resized to `size` (Szegedy et al., "Going deeper with convolutions", 2014;
/// with the draws of torchvision's `RandomResizedCrop`). `random_resized_crop = [height, width]` is the short form.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct RandomResizedCrop {
    /// Height and width of the result.
    pub size: [usize; 2],
    /// The least and the greatest share of the picture's area.
    #[serde(default = "crop_area")]
    pub area: [f32; 2],
    /// The least and the greatest width / height of the part, on a logarithmic scale.
    #[serde(default = "crop_ratio")]
    pub ratio: [f32; 2],
    /// How new pixels are made of old ones.
    #[serde(default)]
    pub filter: Filter,
    /// Whether the filter grows with the scale when the part shrinks.
    #[serde(default = "yes")]
    pub antialias: bool,
}

fn crop_area() -> [f32; 2] {
    [0.08, 1.0]
}

fn crop_ratio() -> [f32; 2] {
    [3.0 / 4.0, 4.0 / 3.0]
}

fn yes() -> bool {
    true
}

impl RandomResizedCrop {
    fn short(&self) -> Option<[usize; 2]> {
        (*self == RandomResizedCrop::long(self.size)).then_some(self.size)
    }
}

impl Short for RandomResizedCrop {
    type Value = [usize; 2];
    const EXPECTED: &'static str = "[height, width], or a table of `size`, `area`, `ratio`, `filter` and `antialias`";

    fn long(size: [usize; 2]) -> RandomResizedCrop {
        RandomResizedCrop { size, area: crop_area(), ratio: crop_ratio(), filter: Filter::default(), antialias: true }
    }

    fn table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<RandomResizedCrop, D::Error> {
        RandomResizedCrop::deserialize(deserializer)
    }
}

both_forms!(RandomResizedCrop);

/// Brightness, contrast, saturation and hue changed in random order, as by torchvision's `ColorJitter`. The first three
/// are factors drawn from `1 - x` (at least 0) to `1 + x`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ColourJitter {
    /// Brightness.
    pub brightness: f32,
    /// Contrast around the mean grey.
    pub contrast: f32,
    /// Saturation; grey pictures have none.
    pub saturation: f32,
    /// The greatest turn of the hue, in full circles, at most 0.5.
    pub hue: f32,
}

/// A blur by a normal distribution (SimCLR: Chen et al., "A simple framework for contrastive learning", 2020). At the
/// border the picture is mirrored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GaussianBlur {
    /// The least and the greatest standard deviation, in pixels.
    pub sigma: [f32; 2],
    /// Pixels of the kernel along a side, an odd number; without it, enough for three of the greatest deviation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<usize>,
    /// The chance that a picture is blurred.
    #[serde(default = "always")]
    pub probability: f32,
}

fn always() -> f32 {
    1.0
}

/// Some operations drawn anew for each picture, all of one strength (Cubuk et al., "RandAugment: practical automated
/// data augmentation with a reduced search space", 2019).
///
/// The 14 operations of the paper, each as likely: identity, autocontrast, equalize, and with a strength that grows with
/// the magnitude M from nothing at 0 to that of AutoAugment at 10: rotation by ±3 M degrees, shears by ±0.03 M,
/// translations by ±0.045 M of the side, solarizing above 256 - 25.6 M, posterizing to 8 - 0.4 M bits (rounded), and
/// colour, contrast, brightness and sharpness by 1 ± 0.09 M (the signs as in torchvision). Pixels from beyond the border
/// are black.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandAugment {
    /// Operations one after another, the paper's N.
    pub operations: usize,
    /// Their strength, the paper's M, from 0 to 10.
    pub magnitude: f32,
}

/// A rectangle painted over (Zhong et al., "Random erasing data augmentation", 2017).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomErasing {
    /// The chance that a picture loses a rectangle.
    #[serde(default = "erasing_probability")]
    pub probability: f32,
    /// The least and the greatest share of the picture's area.
    #[serde(default = "erasing_area")]
    pub area: [f32; 2],
    /// The least and the greatest width / height, on a logarithmic scale.
    #[serde(default = "erasing_ratio")]
    pub ratio: [f32; 2],
    /// A value for each channel, 0 to 255; without it every pixel is random, which the paper found best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fill: Option<Vec<u8>>,
}

fn erasing_probability() -> f32 {
    0.5
}

fn erasing_area() -> [f32; 2] {
    [0.02, 0.4]
}

fn erasing_ratio() -> [f32; 2] {
    [0.3, 1.0 / 0.3]
}

/// Pairs of samples made of each other, pictures and labels alike, so that labels become distributions over classes.
///
/// The samples at positions 2k and 2k + 1 of a batch are a pair; a last one without a partner stays as it is. Mixup
/// (Zhang et al., "mixup: beyond empirical risk minimization", 2017) makes a sample `share` of itself and the rest of its
/// partner; cutmix (Yun et al., "CutMix: regularization strategy to train strong classifiers with localizable
/// features", 2019) takes a rectangle from the partner. The share is drawn from Beta(α, α) for each pair.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mix {
    /// The tensor of pictures, as floats.
    #[serde(default = "mixed_pictures")]
    pub pictures: String,
    /// The tensor of labels, as distributions: class numbers become such by `one_hot`.
    #[serde(default = "mixed_labels")]
    pub labels: String,
    /// α of mixup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixup: Option<f32>,
    /// α of cutmix. With both, each pair takes one of them with equal chances.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cutmix: Option<f32>,
    /// The chance that a pair is mixed.
    #[serde(default = "always")]
    pub probability: f32,
}

fn mixed_pictures() -> String {
    "image".to_owned()
}

fn mixed_labels() -> String {
    "label".to_owned()
}
