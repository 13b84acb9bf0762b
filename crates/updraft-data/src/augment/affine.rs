//! Turning, shearing and shifting with the nearest pixel, in Pillow's 16.16 fixed point.

use crate::picture::{Picture, Workspace};

impl Picture {
    /// Each new pixel from where the matrix `[a, b, c, d, e, f]` sends its middle: `(a x + b y + c, d x + e y + f)`;
    /// black from beyond the border (Pillow's `transform(size, AFFINE, matrix, NEAREST)`).
    pub(super) fn transformed(self, matrix: [f64; 6], workspace: &mut Workspace) -> Picture {
        const ONE: f64 = 65536.0;
        let fixed = |value: f64| libm::floor(value * ONE + 0.5) as i64;
        let [a, b, c, d, e, f] = matrix;
        let (across, down) = ([fixed(a), fixed(d)], [fixed(b), fixed(e)]);
        let mut row_start = [fixed(c + a * 0.5 + b * 0.5), fixed(f + d * 0.5 + e * 0.5)];
        let mut out = Picture::black(self.height, self.width, self.channels, workspace);
        for row in out.pixels.chunks_exact_mut(self.width * self.channels) {
            let [mut x, mut y] = row_start;
            for pixel in row.chunks_exact_mut(self.channels) {
                let (column, line) = (usize::try_from(x >> 16), usize::try_from(y >> 16));
                if let (Ok(column), Ok(line)) = (column, line)
                    && column < self.width
                    && line < self.height
                {
                    let from = (line * self.width + column) * self.channels;
                    pixel.copy_from_slice(&self.pixels[from..from + self.channels]);
                }
                x += across[0];
                y += across[1];
            }
            row_start = [row_start[0] + down[0], row_start[1] + down[1]];
        }
        workspace.reclaim(self);
        out
    }

    /// Turned about its middle, counter-clockwise (Pillow's `rotate`).
    pub(super) fn rotated(self, degrees: f64, workspace: &mut Workspace) -> Picture {
        let angle = -degrees.to_radians();
        let (sine, cosine) = libm::sincos(angle);
        let (x, y) = (self.width as f64 / 2.0, self.height as f64 / 2.0);
        let matrix = [cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y];
        self.transformed(matrix, workspace)
    }
}
