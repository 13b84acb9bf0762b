//! Settings of the steps that take pictures.

use serde::{Deserialize, Deserializer, Serialize};

use super::short::{Short, both_forms};

/// How bytes become pixels. `decode = "rgb"` is short for `decode = { colour = "rgb" }`.
///
/// JPEG, PNG and WebP are told apart by their first bytes. Transparency is dropped, 16-bit channels are rounded to 8
/// bits, of an animation the first picture is taken, CMYK becomes red, green and blue by `(1 - ink) (1 - black)`, and
/// colour becomes grey by ITU-R 601 luma.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Decode {
    /// The channels to make.
    pub colour: Colour,
    /// Whether to turn and mirror the picture as its EXIF orientation says (Pillow's `ImageOps.exif_transpose`).
    /// Without it the tag is ignored, as by Pillow's `open`.
    #[serde(default)]
    pub orient: bool,
    /// The most pixels that a picture may claim; one that claims more is an error before memory is taken for it.
    #[serde(default = "pixels_max")]
    pub pixels_max: u64,
}

fn pixels_max() -> u64 {
    crate::picture::PIXELS_MAX
}

impl Decode {
    fn short(&self) -> Option<Colour> {
        (*self == Decode::long(self.colour)).then_some(self.colour)
    }
}

impl Short for Decode {
    type Value = Colour;
    const EXPECTED: &'static str = "`grey`, `rgb`, or a table of `colour`, `orient` and `pixels_max`";

    fn long(colour: Colour) -> Decode {
        Decode { colour, orient: false, pixels_max: pixels_max() }
    }

    fn table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Decode, D::Error> {
        Decode::deserialize(deserializer)
    }
}

both_forms!(Decode);

/// The channels of a decoded picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Colour {
    /// One channel.
    Grey,
    /// Three channels: red, green, blue.
    Rgb,
}

/// Another size. `resize = [height, width]` is short for `resize = { size = [height, width] }`; the other way to say it
/// is `resize = { shorter = pixels }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Resize {
    /// Height and width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<[usize; 2]>,
    /// The shorter side; the longer one follows in proportion, rounded down (torchvision's `Resize(pixels)`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shorter: Option<usize>,
    /// How new pixels are made of old ones.
    #[serde(default)]
    pub filter: Filter,
    /// Whether the filter grows with the scale when a picture shrinks, as Pillow's does. Without it the filter reaches
    /// only the nearest pixels, as in OpenCV and in TensorFlow's `tf.image.resize`; lines and textures then alias.
    #[serde(default = "antialias")]
    pub antialias: bool,
}

fn antialias() -> bool {
    true
}

impl Resize {
    fn short(&self) -> Option<[usize; 2]> {
        self.size.filter(|size| *self == Resize::long(*size))
    }
}

impl Short for Resize {
    type Value = [usize; 2];
    const EXPECTED: &'static str = "[height, width], or a table of `size` or `shorter`, `filter` and `antialias`";

    fn long(size: [usize; 2]) -> Resize {
        Resize { size: Some(size), shorter: None, filter: Filter::default(), antialias: true }
    }

    fn table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Resize, D::Error> {
        Resize::deserialize(deserializer)
    }
}

both_forms!(Resize);

/// The kernel of a resize, named as by Pillow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// The mean over the new pixel's area.
    Box,
    /// A triangle over two pixels.
    #[default]
    Bilinear,
    /// Keys' cubic with a = -0.5 over four pixels ("Cubic convolution interpolation for digital image processing",
    /// 1981).
    Bicubic,
    /// A windowed sinc over six pixels.
    Lanczos,
}

/// A window at a random place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomCrop {
    /// Its height and width.
    pub size: [usize; 2],
    /// Black pixels added first on each side.
    #[serde(default)]
    pub padding: usize,
}

/// The direction of a flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Left and right change places.
    Horizontal,
    /// Top and bottom change places.
    Vertical,
}
