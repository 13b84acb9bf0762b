//! JPEG, PNG and WebP bytes into pixels, within limits.
//!
//! A picture's claims are read and checked before memory is taken for it. JPEG, the bulk of most datasets, goes straight
//! from the decoder into a buffer that was used before.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::input::Input;
use super::{Picture, WORD, Workspace, luma};
use crate::config::{Colour, Decode};

/// 8 bytes for four channels of 16 bits, and as much again for the decoder's own rows.
const BYTES_PER_PIXEL_MAX: u64 = 16;

/// The first bytes of every JPEG file: the start of the picture, and of a marker.
const JPEG_START: [u8; 3] = [0xFF, 0xD8, 0xFF];

/// JPEG markers.
const START_OF_SCAN: u8 = 0xDA;
const END_OF_IMAGE: [u8; 2] = [0xFF, 0xD9];

impl Picture {
    /// Decodes the bytes of a file.
    pub(crate) fn decode(bytes: &[u8], options: &Decode, workspace: &mut Workspace) -> Result<Picture, String> {
        Picture::decode_as(bytes, options, false, workspace)
    }

    /// Decodes the bytes of a file, to words where those are asked for and cost nothing.
    pub(super) fn decode_as(
        bytes: &[u8],
        options: &Decode,
        words: bool,
        workspace: &mut Workspace,
    ) -> Result<Picture, String> {
        let (picture, orientation) = if bytes.starts_with(&JPEG_START) {
            decode_jpeg(bytes, options, words, workspace)?
        } else {
            decode_other(bytes, options)?
        };
        Ok(if options.orient { picture.oriented(orientation, workspace) } else { picture })
    }

    /// The channels that were asked for.
    fn in_colour(self, colour: Colour, workspace: &mut Workspace) -> Picture {
        let Picture { height, width, channels, .. } = self;
        match (channels, colour) {
            (1, Colour::Rgb) => {
                let mut spread = Picture::black(height, width, 3, workspace);
                spread.pixels.chunks_exact_mut(3).zip(&self.pixels).for_each(|(rgb, grey)| rgb.fill(*grey));
                workspace.reclaim(self);
                spread
            }
            (3, Colour::Grey) => {
                let mut grey = Picture::black(height, width, 1, workspace);
                let colours = self.pixels.chunks_exact(3);
                grey.pixels.iter_mut().zip(colours).for_each(|(out, p)| *out = luma(p[0], p[1], p[2]));
                workspace.reclaim(self);
                grey
            }
            _ => self,
        }
    }
}

fn decode_jpeg(
    bytes: &[u8],
    options: &Decode,
    words: bool,
    workspace: &mut Workspace,
) -> Result<(Picture, Orientation), String> {
    // How colours are converted is settled with the headers.
    let words = words && options.colour == Colour::Rgb;
    let mut decoder = jpeg_headers(bytes, if words { ColorSpace::RGBA } else { ColorSpace::RGB })?;
    let (width, height) = decoder.dimensions().ok_or("cannot be decoded: it has no size")?;
    check_pixels(width as u64, height as u64, options)?;
    let channels = match decoder.input_colorspace() {
        Some(ColorSpace::Luma) => {
            decoder.set_options(jpeg_settings(ColorSpace::Luma));
            1
        }
        Some(ColorSpace::YCbCr) if words => WORD,
        _ if words => {
            decoder = jpeg_headers(bytes, ColorSpace::RGB)?;
            3
        }
        _ => 3,
    };
    let orientation = decoder.exif().and_then(|e| Orientation::from_exif_chunk(e));
    if !is_complete(bytes) {
        return Err("cannot be decoded: it is truncated".into());
    }
    let mut picture = if channels == WORD {
        // Pixels are written from the first to the last, and the last byte of a word is never zero: once that of the last
        // pixel is not, nothing is left of the picture that had the memory before.
        let mut pixels = workspace.bytes(height * width * WORD);
        pixels[height * width * WORD - 1] = 0;
        Picture { height, width, channels, pixels }
    } else {
        Picture::black(height, width, channels, workspace)
    };
    decoder.decode_into(&mut picture.pixels).map_err(undecodable_jpeg)?;
    if channels == WORD && picture.pixels.last() == Some(&0) {
        picture.pixels.fill(0);
        jpeg_headers(bytes, ColorSpace::RGBA)?.decode_into(&mut picture.pixels).map_err(undecodable_jpeg)?;
    }
    let picture = picture.in_colour(options.colour, workspace);
    Ok((picture, orientation.unwrap_or(Orientation::NoTransforms)))
}

fn jpeg_settings(space: ColorSpace) -> DecoderOptions {
    // Decoders differ in what they refuse; Pillow's, like this setting, takes what common cameras get wrong.
    let settings = DecoderOptions::default().set_strict_mode(false);
    settings.set_max_width(usize::MAX).set_max_height(usize::MAX).jpeg_set_out_colorspace(space)
}

fn jpeg_headers(bytes: &[u8], space: ColorSpace) -> Result<JpegDecoder<Input<'_>>, String> {
    let mut decoder = JpegDecoder::new_with_options(Input::new(bytes), jpeg_settings(space));
    decoder.decode_headers().map_err(undecodable_jpeg)?;
    Ok(decoder)
}

fn undecodable_jpeg(error: zune_jpeg::errors::DecodeErrors) -> String {
    format!("cannot be decoded: {error}")
}

/// Whether the end of the picture follows the start of its first scan. The decoder would fill what is missing with grey;
/// like Pillow, we refuse.
fn is_complete(bytes: &[u8]) -> bool {
    let mut at = 2;
    // Segments are passed by their lengths, because a thumbnail in one of them has an end of its own.
    while let Some([0xFF, marker, high, low]) = bytes.get(at..at + 4) {
        match *marker {
            START_OF_SCAN => return bytes[at..].windows(2).rev().any(|pair| pair == END_OF_IMAGE),
            // Padding before a marker.
            0xFF => at += 1,
            _ => at += 2 + usize::from(u16::from_be_bytes([*high, *low])),
        }
    }
    // The decoder found its way through segments that are not laid out by the standard; it has the last word.
    true
}

fn decode_other(bytes: &[u8], options: &Decode) -> Result<(Picture, Orientation), String> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| e.to_string())?;
    if !matches!(reader.format(), Some(ImageFormat::Png | ImageFormat::WebP)) {
        return Err(format!("{} bytes are neither JPEG nor PNG nor WebP", bytes.len()));
    }
    let undecodable = |error| match error {
        image::ImageError::Limits(_) => {
            format!("claims more than the {} pixels that are decoded", options.pixels_max)
        }
        error => format!("cannot be decoded: {error}"),
    };
    let mut limits = image::Limits::no_limits();
    limits.max_alloc = Some(options.pixels_max.saturating_mul(BYTES_PER_PIXEL_MAX));
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(undecodable)?;
    let (width, height) = decoder.dimensions();
    check_pixels(u64::from(width), u64::from(height), options)?;
    let orientation =
        if options.orient { decoder.orientation().map_err(undecodable)? } else { Orientation::NoTransforms };
    let decoded = DynamicImage::from_decoder(decoder).map_err(undecodable)?;
    let (channels, pixels) = match (options.colour, decoded.color().has_color()) {
        // Grey stays grey: no weighting, so no rounding.
        (Colour::Grey, false) => (1, decoded.into_luma8().into_raw()),
        (Colour::Grey, true) => {
            (1, decoded.into_rgb8().as_raw().chunks_exact(3).map(|p| luma(p[0], p[1], p[2])).collect())
        }
        (Colour::Rgb, _) => (3, decoded.into_rgb8().into_raw()),
    };
    Ok((Picture { height: height as usize, width: width as usize, channels, pixels }, orientation))
}

fn check_pixels(width: u64, height: u64, options: &Decode) -> Result<(), String> {
    let pixels = width * height;
    if pixels == 0 || pixels > options.pixels_max {
        return Err(format!("claims {height} x {width} pixels; 1 to {} are decoded", options.pixels_max));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLOUR: &[u8] = include_bytes!("../../tests/fixtures/colour.jpg");
    const PROGRESSIVE: &[u8] = include_bytes!("../../tests/fixtures/pictures/progressive.jpg");
    const RESTARTS: &[u8] = include_bytes!("../../tests/fixtures/pictures/restarts.jpg");

    /// Memory that another picture had.
    fn used(len: usize) -> Workspace {
        let mut workspace = Workspace::default();
        workspace.reclaim(Picture { height: 1, width: len, channels: 1, pixels: vec![77; len] });
        workspace
    }

    #[test]
    fn damaged_pictures_show_nothing_of_those_before() {
        let options = Decode { colour: Colour::Rgb, orient: false, pixels_max: 1 << 20 };
        let draws = updraft_base::Key::new(3);
        let mut decoded = 0;
        for (file, name) in [(COLOUR, "colour"), (PROGRESSIVE, "progressive"), (RESTARTS, "restarts")] {
            let comment: &[u8] = &[0xFF, 0xFE, 0, 2];
            let start = file.windows(2).position(|pair| pair == [0xFF, START_OF_SCAN]).unwrap();
            let scan = &file[start..start + 2 + usize::from(file[start + 3])];
            for case in 0..600 {
                let key = draws.child(name).child_index(case);
                let mut damaged = file.to_vec();
                let within = |counter: u64, len: usize| key.below(counter, len as u64) as usize;
                match case % 3 {
                    0 => (0..1 + within(0, 4))
                        .for_each(|hit| damaged[within(10 + hit as u64, file.len())] = key.bits(20 + hit as u64) as u8),
                    1 => {
                        let from = file.len() / 4 + within(1, file.len() / 2);
                        damaged.drain(from..from + within(2, file.len() - from - 2));
                    }
                    // A segment where none belongs.
                    _ => {
                        let at = file.len() / 2 + within(3, file.len() / 2 - 4);
                        let segment = [comment, scan][case as usize / 3 % 2];
                        damaged.splice(at..at + within(4, 3), segment.iter().copied());
                    }
                }
                for words in [false, true] {
                    let clean = Picture::decode_as(&damaged, &options, words, &mut Workspace::default());
                    let dirty = Picture::decode_as(&damaged, &options, words, &mut used(1 << 16));
                    decoded += u32::from(clean.is_ok());
                    assert_eq!(dirty, clean, "{name} {case} {words}");
                }
            }
        }
        assert!(decoded > 1000, "{decoded}");
    }
}
