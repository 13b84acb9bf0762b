//! Pictures in 8 bits a channel: decoding within limits, and moving pixels about.

use std::io::Cursor;

use fast_image_resize::{self as fir, images, pixels};
use image::{ImageDecoder, ImageReader};

use crate::config::{Axis, Colour};

/// The most pixels of a picture that is decoded: 64 Mi, beyond any camera. A small file can claim any size, and what it
/// claims is checked before memory is taken.
const PIXELS_MAX: u64 = 1 << 26;

/// 8 bytes for four channels of 16 bits, and as much again for the decoder's own rows.
const BYTES_PER_PIXEL_MAX: u64 = 16;

/// Pixels in rows, the channels of a pixel side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Picture {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub pixels: Vec<u8>,
}

impl Picture {
    /// Decodes PNG or JPEG bytes. 16-bit channels are rounded to 8 bits, transparency is dropped, orientation tags are
    /// not followed; the same choices as Pillow's `open` and `convert`.
    pub(crate) fn decode(bytes: &[u8], colour: Colour) -> Result<Picture, String> {
        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| e.to_string())?;
        if reader.format().is_none() {
            return Err(format!("{} bytes are neither PNG nor JPEG", bytes.len()));
        }
        let mut limits = image::Limits::no_limits();
        limits.max_alloc = Some(BYTES_PER_PIXEL_MAX * PIXELS_MAX);
        reader.limits(limits);
        let decoder = reader.into_decoder().map_err(undecodable)?;
        let (width, height) = decoder.dimensions();
        let pixels = u64::from(width) * u64::from(height);
        if pixels == 0 || pixels > PIXELS_MAX {
            return Err(format!("claims {height} x {width} pixels; 1 to {PIXELS_MAX} are decoded"));
        }
        let decoded = image::DynamicImage::from_decoder(decoder).map_err(undecodable)?;
        let (height, width) = (height as usize, width as usize);
        let (channels, pixels) = match (colour, decoded.color().has_color()) {
            // Grey stays grey: no weighting, so no rounding.
            (Colour::Grey, false) => (1, decoded.into_luma8().into_raw()),
            (Colour::Grey, true) => {
                (1, decoded.into_rgb8().as_raw().chunks_exact(3).map(|p| luma(p[0], p[1], p[2])).collect())
            }
            (Colour::Rgb, _) => (3, decoded.into_rgb8().into_raw()),
        };
        Ok(Picture { height, width, channels, pixels })
    }

    /// Bilinear with antialiasing: a triangle filter as wide as the scale, in Pillow's fixed-point arithmetic.
    pub(crate) fn resized(self, [height, width]: [usize; 2]) -> Result<Picture, String> {
        if (self.height, self.width) == (height, width) {
            return Ok(self);
        }
        let pixels = match self.channels {
            1 => resize_as::<pixels::U8>(&self, height, width),
            _ => resize_as::<pixels::U8x3>(&self, height, width),
        }?;
        Ok(Picture { height, width, channels: self.channels, pixels })
    }

    /// The window of a size at a place, which may start before the picture and end after it; outside it is black.
    pub(crate) fn window(&self, [top, left]: [isize; 2], [height, width]: [usize; 2]) -> Picture {
        let mut pixels = vec![0; height * width * self.channels];
        let first = left.max(0);
        let last = (left + width as isize).min(self.width as isize);
        for y in 0..height {
            let from = top + y as isize;
            if from < 0 || from >= self.height as isize || first >= last {
                continue;
            }
            let source = (from as usize * self.width + first as usize) * self.channels;
            let target = (y * width + (first - left) as usize) * self.channels;
            let len = (last - first) as usize * self.channels;
            pixels[target..target + len].copy_from_slice(&self.pixels[source..source + len]);
        }
        Picture { height, width, channels: self.channels, pixels }
    }

    pub(crate) fn flip(&mut self, axis: Axis) {
        let row_bytes = self.width * self.channels;
        match axis {
            Axis::Horizontal => {
                for row in self.pixels.chunks_exact_mut(row_bytes) {
                    for x in 0..self.width / 2 {
                        for c in 0..self.channels {
                            row.swap(x * self.channels + c, (self.width - 1 - x) * self.channels + c);
                        }
                    }
                }
            }
            Axis::Vertical => {
                for y in 0..self.height / 2 {
                    let (above, below) = self.pixels.split_at_mut((self.height - 1 - y) * row_bytes);
                    above[y * row_bytes..][..row_bytes].swap_with_slice(&mut below[..row_bytes]);
                }
            }
        }
    }
}

fn undecodable(error: image::ImageError) -> String {
    match error {
        image::ImageError::Limits(_) => format!("claims more than the {PIXELS_MAX} pixels that are decoded"),
        error => format!("cannot be decoded: {error}"),
    }
}

/// Typed views: the untyped call compiles the resizing of every pixel type there is, which takes minutes.
fn resize_as<P: fir::PixelTrait>(picture: &Picture, height: usize, width: usize) -> Result<Vec<u8>, String> {
    let side = |n: usize| u32::try_from(n).map_err(|_| format!("a side of {n} pixels is too long"));
    let source = images::TypedImageRef::<P>::from_buffer(side(picture.width)?, side(picture.height)?, &picture.pixels)
        .map_err(|e| e.to_string())?;
    let mut pixels = vec![0; P::count_of_components() * width * height];
    let mut target =
        images::TypedImage::<P>::from_buffer(side(width)?, side(height)?, &mut pixels).map_err(|e| e.to_string())?;
    let options =
        fir::ResizeOptions::new().resize_alg(fir::ResizeAlg::Convolution(fir::FilterType::Bilinear)).use_alpha(false);
    fir::Resizer::new().resize_typed(&source, &mut target, &options).map_err(|e| e.to_string())?;
    Ok(pixels)
}

/// ITU-R 601 luma in Pillow's 16-bit fixed point.
fn luma(red: u8, green: u8, blue: u8) -> u8 {
    ((u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A grey picture from rows of digits.
    fn picture(rows: &[&str]) -> Picture {
        let pixels = rows.iter().flat_map(|r| r.bytes().map(|b| b - b'0')).collect();
        Picture { height: rows.len(), width: rows[0].len(), channels: 1, pixels }
    }

    #[test]
    fn windows_reach_past_every_border() {
        let whole = picture(&["123", "456"]);
        for (at, size, expected) in [
            ([0, 0], [2, 3], ["123", "456"].as_slice()),
            ([0, 1], [2, 2], &["23", "56"]),
            ([-1, -1], [2, 2], &["00", "01"]),
            ([1, 2], [2, 2], &["60", "00"]),
            ([-1, -1], [4, 5], &["00000", "01230", "04560", "00000"]),
            ([5, 5], [1, 1], &["0"]),
            ([0, -9], [1, 2], &["00"]),
        ] {
            assert_eq!(whole.window(at, size), picture(expected), "{at:?} {size:?}");
        }
    }

    #[test]
    fn flips_mirror_rows_or_columns() {
        let mut flipped = picture(&["123", "456"]);
        flipped.flip(Axis::Horizontal);
        assert_eq!(flipped, picture(&["321", "654"]));
        flipped.flip(Axis::Vertical);
        assert_eq!(flipped, picture(&["654", "321"]));
        let mut colour = Picture { height: 1, width: 2, channels: 3, pixels: vec![1, 2, 3, 4, 5, 6] };
        colour.flip(Axis::Horizontal);
        assert_eq!(colour.pixels, [4, 5, 6, 1, 2, 3]);
    }
}
