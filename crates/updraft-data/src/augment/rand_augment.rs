//! The operations of RandAugment and their strengths.

use crate::picture::{Picture, Workspace};

/// An operation of the paper's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Identity,
    AutoContrast,
    Equalize,
    Rotate,
    Solarize,
    Colour,
    Posterize,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
}

pub(super) const ALL: [Operation; 14] = [
    Operation::Identity,
    Operation::AutoContrast,
    Operation::Equalize,
    Operation::Rotate,
    Operation::Solarize,
    Operation::Colour,
    Operation::Posterize,
    Operation::Contrast,
    Operation::Brightness,
    Operation::Sharpness,
    Operation::ShearX,
    Operation::ShearY,
    Operation::TranslateX,
    Operation::TranslateY,
];

/// The greatest translation as a share of the side: AutoAugment's 150 of the 331 pixels of its pictures.
const TRANSLATION_MAX: f64 = 150.0 / 331.0;

impl Operation {
    /// The operation at a magnitude of 0 to 10; `sign` is 1 or -1.
    pub(super) fn apply(self, mut picture: Picture, magnitude: f64, sign: f64, workspace: &mut Workspace) -> Picture {
        let strength = magnitude / 10.0;
        let factor = (1.0 + sign * 0.9 * strength) as f32;
        let translation = |side: usize| libm::trunc(sign * TRANSLATION_MAX * strength * side as f64);
        match self {
            Operation::Identity => {}
            Operation::AutoContrast => picture.autocontrast(),
            Operation::Equalize => picture.equalize(),
            Operation::Solarize => picture.solarize(256.0 - 256.0 * strength),
            Operation::Posterize => picture.posterize(8 - libm::round(4.0 * strength) as u32),
            Operation::Colour => picture.saturate(factor),
            Operation::Contrast => picture.change_contrast(factor),
            Operation::Brightness => picture.brighten(factor),
            Operation::Sharpness => picture.sharpen(factor),
            Operation::Rotate => return picture.rotated(sign * 30.0 * strength, workspace),
            Operation::ShearX => {
                return picture.transformed([1.0, sign * 0.3 * strength, 0.0, 0.0, 1.0, 0.0], workspace);
            }
            Operation::ShearY => {
                return picture.transformed([1.0, 0.0, 0.0, sign * 0.3 * strength, 1.0, 0.0], workspace);
            }
            Operation::TranslateX => {
                let shift = translation(picture.width);
                return picture.transformed([1.0, 0.0, shift, 0.0, 1.0, 0.0], workspace);
            }
            Operation::TranslateY => {
                let shift = translation(picture.height);
                return picture.transformed([1.0, 0.0, 0.0, 0.0, 1.0, shift], workspace);
            }
        }
        picture
    }
}
