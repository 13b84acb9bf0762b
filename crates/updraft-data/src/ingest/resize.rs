//! Pictures made smaller before they are stored.

use std::fmt;
use std::io::Cursor;
use std::str::FromStr;

use bytes::Bytes;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder, ImageFormat, ImageReader};

use crate::config::Colour;
use crate::picture::Picture;

/// JPEG's quality when a picture is stored again: what tools take where artefacts should not show.
const QUALITY: u8 = 90;

/// A height and width. What was JPEG stays JPEG, everything else becomes PNG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resize {
    /// Pixels of a column.
    pub height: usize,
    /// Pixels of a row.
    pub width: usize,
}

impl fmt::Display for Resize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.height, self.width)
    }
}

impl FromStr for Resize {
    type Err = String;

    fn from_str(text: &str) -> Result<Resize, String> {
        let sides = text.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?)));
        match sides {
            Some((height @ 1..=16384, width @ 1..=16384)) => Ok(Resize { height, width }),
            _ => Err(format!("`{text}` is not HEIGHTxWIDTH in pixels, 1 to 16384 each")),
        }
    }
}

impl Resize {
    /// The picture in the new size, encoded.
    pub(super) fn apply(&self, encoded: &[u8]) -> Result<Bytes, String> {
        let reader = ImageReader::new(Cursor::new(encoded)).with_guessed_format().map_err(|e| e.to_string())?;
        let format = reader.format();
        let is_grey = |colour: image::ColorType| !colour.has_color();
        let colour = reader.into_decoder().map(|decoder| image::ImageDecoder::color_type(&decoder));
        let colour = if colour.is_ok_and(is_grey) { Colour::Grey } else { Colour::Rgb };
        let picture = Picture::decode(encoded, colour)?.resized([self.height, self.width])?;
        let kind = if picture.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
        let side = |n: usize| u32::try_from(n).map_err(|_| format!("a side of {n} pixels is too long"));
        let (height, width) = (side(picture.height)?, side(picture.width)?);
        let mut out = Vec::new();
        let done = match format {
            Some(ImageFormat::Jpeg) => {
                JpegEncoder::new_with_quality(&mut out, QUALITY).write_image(&picture.pixels, width, height, kind)
            }
            _ => PngEncoder::new(&mut out).write_image(&picture.pixels, width, height, kind),
        };
        done.map_err(|e| e.to_string())?;
        Ok(out.into())
    }
}
