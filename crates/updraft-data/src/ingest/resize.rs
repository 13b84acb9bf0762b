//! Pictures made smaller before they are stored, or looked at.

use std::io::Cursor;

use bytes::Bytes;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageDecoder, ImageEncoder, ImageFormat, ImageReader};

use crate::config::{Colour, Decode, Resize};
use crate::picture::{PIXELS_MAX, Picture, Sampling, Workspace};

/// JPEG's quality when a picture is stored again: what tools take where artefacts should not show.
const QUALITY: u8 = 90;

/// The picture in another size, encoded: what was JPEG stays JPEG, everything else becomes PNG. One that has the size
/// already keeps its bytes.
pub(super) fn resized(encoded: &Bytes, resize: &Resize, workspace: &mut Workspace) -> Result<Bytes, String> {
    let reader = ImageReader::new(Cursor::new(encoded)).with_guessed_format().map_err(|e| e.to_string())?;
    let format = reader.format();
    // Grey stays grey; what cannot be decoded is said by the decoder below.
    let is_grey = reader.into_decoder().is_ok_and(|decoder| !decoder.color_type().has_color());
    let colour = if is_grey { Colour::Grey } else { Colour::Rgb };
    // As the camera was held: the note that says so is not stored again.
    let options = Decode { colour, orient: true, pixels_max: PIXELS_MAX };
    let picture = Picture::decode(encoded, &options, workspace)?;
    let size = resize.target(picture.height, picture.width);
    if size == [picture.height, picture.width] {
        return Ok(encoded.clone());
    }
    let picture = picture.resized(size, Sampling::new(resize.filter, resize.antialias), workspace)?;
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
    workspace.reclaim(picture);
    Ok(out.into())
}

/// A picture for looking at.
#[derive(Debug, Clone)]
pub struct Preview {
    /// Its media type.
    pub mime: &'static str,
    /// The encoded picture.
    pub bytes: Bytes,
    /// Pixels of its longer side.
    pub longer_side: usize,
}

/// An encoded picture whose longer side has at most `side` pixels; `None` for bytes that are no picture.
pub fn picture_preview(encoded: &Bytes, side: usize) -> Option<Preview> {
    let mut workspace = Workspace::default();
    let picture = Picture::decode_grey(encoded, &mut workspace).ok()?;
    let longer_side = picture.height.max(picture.width);
    let format = image::guess_format(encoded).ok()?;
    let (bytes, longer_side) = if longer_side > side {
        let scaled = |pixels: usize| (pixels * side / longer_side).max(1);
        let size = Some([scaled(picture.height), scaled(picture.width)]);
        let resize = Resize { size, shorter: None, filter: Default::default(), antialias: true };
        (resized(encoded, &resize, &mut workspace).ok()?, side)
    } else {
        (encoded.clone(), longer_side)
    };
    // What was made smaller is PNG unless it was JPEG.
    let mime = match format {
        ImageFormat::Jpeg => "image/jpeg",
        ImageFormat::WebP if bytes == encoded => "image/webp",
        _ => "image/png",
    };
    Some(Preview { mime, bytes, longer_side })
}
