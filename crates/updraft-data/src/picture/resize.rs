//! Other sizes, in the fixed-point arithmetic of Pillow.

use fast_image_resize::{self as fir, images, pixels};

use super::{Picture, WORD, Workspace};
use crate::config::{Filter, Resize};

/// How pixels are resampled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sampling(fir::ResizeAlg);

impl Sampling {
    pub(crate) fn new(filter: Filter, antialias: bool) -> Sampling {
        let kernel = match filter {
            Filter::Nearest => return Sampling(fir::ResizeAlg::Nearest),
            Filter::Box => fir::FilterType::Box,
            Filter::Bilinear => fir::FilterType::Bilinear,
            Filter::Bicubic => fir::FilterType::CatmullRom,
            Filter::Lanczos => fir::FilterType::Lanczos3,
        };
        Sampling(if antialias { fir::ResizeAlg::Convolution(kernel) } else { fir::ResizeAlg::Interpolation(kernel) })
    }
}

impl Resize {
    /// Height and width of a resized picture of `height` and `width`.
    pub(crate) fn target(&self, height: usize, width: usize) -> [usize; 2] {
        match (self.size, self.shorter) {
            (Some(size), _) => size,
            (None, Some(shorter)) if height <= width => [shorter, shorter * width / height],
            (None, Some(shorter)) => [shorter * height / width, shorter],
            (None, None) => [height, width],
        }
    }
}

impl Picture {
    /// The picture in another size.
    pub(crate) fn resized(
        self,
        size: [usize; 2],
        sampling: Sampling,
        workspace: &mut Workspace,
    ) -> Result<Picture, String> {
        if [self.height, self.width] == size {
            return Ok(self);
        }
        let [height, width] = size;
        let pixels = workspace.bytes(height * width * self.channels);
        let mut target = Picture { height, width, channels: self.channels, pixels };
        match self.channels {
            1 => resample::<pixels::U8>(&self, &mut target, sampling, &mut workspace.resizer),
            WORD => resample::<pixels::U8x4>(&self, &mut target, sampling, &mut workspace.resizer),
            _ => resample::<pixels::U8x3>(&self, &mut target, sampling, &mut workspace.resizer),
        }?;
        workspace.reclaim(self);
        Ok(target)
    }
}

/// Typed views: the untyped call compiles the resizing of every pixel type there is, which takes minutes.
fn resample<P: fir::PixelTrait>(
    source: &Picture,
    target: &mut Picture,
    sampling: Sampling,
    resizer: &mut fir::Resizer,
) -> Result<(), String> {
    let side = |n: usize| u32::try_from(n).map_err(|_| format!("a side of {n} pixels is too long"));
    let from = images::TypedImageRef::<P>::from_buffer(side(source.width)?, side(source.height)?, &source.pixels)
        .map_err(|e| e.to_string())?;
    let mut to = images::TypedImage::<P>::from_buffer(side(target.width)?, side(target.height)?, &mut target.pixels)
        .map_err(|e| e.to_string())?;
    let options = fir::ResizeOptions::new().resize_alg(sampling.0).use_alpha(false);
    resizer.resize_typed(&from, &mut to, &options).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Filter;

    #[test]
    fn the_longer_side_follows_in_proportion_rounded_down() {
        let resize = Resize { size: None, shorter: Some(256), filter: Filter::Bilinear, antialias: true };
        // torchvision.transforms.v2.functional.resize(picture, 256)
        assert_eq!(resize.target(375, 500), [256, 341]);
        assert_eq!(resize.target(500, 375), [341, 256]);
        assert_eq!(resize.target(300, 300), [256, 256]);
    }
}
