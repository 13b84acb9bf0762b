//! Pictures in 8 bits a channel, and moving their pixels about.
//!
//! Every step takes a picture and gives one, and all of them take their memory from a [`Workspace`], so that a batch
//! asks the allocator for a few buffers and not for a few for each picture.

use fast_image_resize as fir;
use image::metadata::Orientation;
use multiversion::multiversion;

use crate::config::{Axis, Colour, Decode};

mod decode;
mod floats;
mod input;
mod plan;
mod resize;

pub(crate) use plan::PicturePlan;
pub(crate) use resize::Sampling;

/// Pixels in rows, the channels of a pixel side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Picture {
    pub height: usize,
    pub width: usize,
    /// 1 is grey, 3 is colour. 4 is colour in words: red, green, blue, and a byte that means nothing, because vectors
    /// are resized faster of words. Only what moves pixels takes words.
    pub channels: usize,
    pub pixels: Vec<u8>,
}

/// The most pixels of a picture that nobody set a limit for: 64 Mi, beyond any camera.
pub(crate) const PIXELS_MAX: u64 = 1 << 26;

/// Memory that serves one picture after another.
#[derive(Default)]
pub(crate) struct Workspace {
    resizer: fir::Resizer,
    spare: Vec<Vec<u8>>,
}

/// The channels of colour in words.
const WORD: usize = 4;

/// A step holds its source and its result, and decoding one buffer more.
const SPARE_MAX: usize = 4;

impl Workspace {
    /// Bytes for a step that writes them all.
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.resize(len, 0);
        bytes
    }

    /// Zeros, so that what a step leaves untouched is black and never another picture.
    fn zeros(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.resize(len, 0);
        bytes
    }

    /// Takes back the memory of a picture that is no longer needed.
    pub(crate) fn reclaim(&mut self, picture: Picture) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(picture.pixels);
        }
    }
}

impl Picture {
    pub(crate) fn black(height: usize, width: usize, channels: usize, workspace: &mut Workspace) -> Picture {
        Picture { height, width, channels, pixels: workspace.zeros(height * width * channels) }
    }

    /// Channels that mean something.
    pub(crate) fn planes(&self) -> usize {
        self.channels.min(3)
    }

    /// The picture, without the bytes between words.
    pub(crate) fn packed(&self) -> Picture {
        let Picture { height, width, channels, ref pixels } = *self;
        if channels != WORD {
            return self.clone();
        }
        let mut packed = vec![0; height * width * 3];
        pack(pixels, &mut packed);
        Picture { height, width, channels: 3, pixels: packed }
    }

    /// Decodes to grey, to be looked at rather than learnt from.
    pub(crate) fn decode_grey(bytes: &[u8], workspace: &mut Workspace) -> Result<Picture, String> {
        let options = Decode { colour: Colour::Grey, orient: false, pixels_max: PIXELS_MAX };
        Picture::decode(bytes, &options, workspace)
    }

    /// Turned and mirrored as a camera's note asks.
    fn oriented(mut self, orientation: Orientation, workspace: &mut Workspace) -> Picture {
        use Orientation::*;
        if matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH) {
            let transposed = self.transposed(workspace);
            workspace.reclaim(std::mem::replace(&mut self, transposed));
        }
        // A quarter turn is a transposition and a flip, and the two diagonal flips are a transposition and both or none.
        if matches!(orientation, FlipHorizontal | Rotate180 | Rotate90 | Rotate270FlipH) {
            self.flip(Axis::Horizontal);
        }
        if matches!(orientation, FlipVertical | Rotate180 | Rotate270 | Rotate270FlipH) {
            self.flip(Axis::Vertical);
        }
        self
    }

    /// Rows as columns.
    fn transposed(&self, workspace: &mut Workspace) -> Picture {
        let mut turned = Picture::black(self.width, self.height, self.channels, workspace);
        for y in 0..self.height {
            for x in 0..self.width {
                let from = (y * self.width + x) * self.channels;
                let to = (x * self.height + y) * self.channels;
                turned.pixels[to..to + self.channels].copy_from_slice(&self.pixels[from..from + self.channels]);
            }
        }
        turned
    }

    /// The window of a size at a place instead of the whole.
    pub(crate) fn cut(self, at: [isize; 2], size: [usize; 2], workspace: &mut Workspace) -> Picture {
        let window = self.window(at, size, workspace);
        workspace.reclaim(self);
        window
    }

    /// The window of a size at a place, which may start before the picture and end after it; outside it is black.
    fn window(&self, [top, left]: [isize; 2], [height, width]: [usize; 2], workspace: &mut Workspace) -> Picture {
        let mut window = Picture::black(height, width, self.channels, workspace);
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
            window.pixels[target..target + len].copy_from_slice(&self.pixels[source..source + len]);
        }
        window
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

/// Words of colour to the three bytes of each that mean something.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512vbmi", "x86_64+avx2", "aarch64+neon"))]
fn pack(words: &[u8], packed: &mut [u8]) {
    for (packed, word) in packed.as_chunks_mut::<3>().0.iter_mut().zip(words.as_chunks::<WORD>().0) {
        packed.copy_from_slice(&word[..3]);
    }
}

/// ITU-R 601 luma in Pillow's 16-bit fixed point.
pub(crate) fn luma(red: u8, green: u8, blue: u8) -> u8 {
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
            assert_eq!(whole.window(at, size, &mut Workspace::default()), picture(expected), "{at:?} {size:?}");
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
