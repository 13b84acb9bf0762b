//! Sampling at given points: GridSample, and AffineGrid, which makes the points of an affine map
//! (Jaderberg et al., <https://arxiv.org/abs/1506.02025>).
//!
//! Coordinates run from -1 to 1 over each axis, either between the centres of its first and last elements
//! (`align_corners`) or between its outer edges, and come last axis first.

use crate::dim::Dim;
use crate::op::conv::{expect_shape, shape_operand};
use crate::op::{Arity, Axis, Eval, Fact, Infer, Link, Op, OpError, Shapes, filled};
use crate::tensor::Tensor;

/// The family.
pub(in crate::op) const OPS: &[Op] = &[
    Op::onnx("GridSample", &[16, 20, 22], Arity::exact(2), infer_grid_sample, eval_grid_sample)
        .no_gradient(super::GROWING)
        .flops(grid_sample_flops)
        .channels(grid_sample_links),
    Op::onnx("AffineGrid", &[20], Arity::exact(2), infer_affine_grid, eval_affine_grid)
        .no_gradient(super::GROWING)
        .flops(affine_grid_flops)
        .no_channels("its axes are those of a picture still to be made"),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Nearest,
    Linear,
    Cubic,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outside {
    Zeros,
    Border,
    Reflection,
}

/// One axis of the sampled picture.
struct Side {
    size: usize,
    align_corners: bool,
    outside: Outside,
    mode: Mode,
}

impl Side {
    /// The limits that coordinates reflect at.
    fn limits(&self) -> (f64, f64) {
        let size = self.size as f64;
        if self.align_corners { (0.0, size - 1.0) } else { (-0.5, size - 0.5) }
    }

    fn reflected(&self, x: f64) -> f64 {
        let (low, high) = self.limits();
        let span = high - low;
        if span <= 0.0 || (low..=high).contains(&x) {
            return x.clamp(low, high.max(low));
        }
        let beyond = if x < low { low - x } else { x - high };
        let (turns, rest) = ((beyond / span).floor(), beyond % span);
        let from_low = (turns % 2.0 == 0.0) == (x < low);
        if from_low { low + rest } else { high - rest }
    }

    /// The elements that a coordinate in -1..1 reads, and their weights. Those outside that count as zero are left
    /// out.
    fn taps(&self, coordinate: f64) -> Vec<(usize, f64)> {
        let size = self.size as f64;
        let place = match self.align_corners {
            true => (coordinate + 1.0) / 2.0 * (size - 1.0),
            false => ((coordinate + 1.0) * size - 1.0) / 2.0,
        };
        // In the type of the coordinates, so that ties are found where they are meant.
        let mut x = f64::from(place as f32);
        if self.mode == Mode::Nearest {
            x = x.round_ties_even();
        }
        let (low, high) = self.limits();
        if x < low || x > high {
            x = match self.outside {
                Outside::Zeros => x,
                Outside::Border => x.clamp(0.0, size - 1.0),
                Outside::Reflection => self.reflected(x),
            };
        }
        let floor = x.floor();
        let ratio = x - floor;
        let weights = match self.mode {
            Mode::Nearest => vec![(0, 1.0)],
            Mode::Linear => vec![(0, 1.0 - ratio), (1, ratio)],
            Mode::Cubic => (-1..3).map(|i| (i, cubic((i as f64 - ratio).abs()))).collect(),
        };
        // A nearest place at a limit that lies between elements is truncated towards zero.
        let first = if self.mode == Mode::Nearest { x.trunc() } else { floor } as i64;
        weights.into_iter().filter_map(|(i, w)| Some((self.element(first.saturating_add(i))?, w))).collect()
    }

    fn element(&self, at: i64) -> Option<usize> {
        let last = self.size as i64 - 1;
        let at = match self.outside {
            Outside::Zeros => at,
            Outside::Border => at.clamp(0, last),
            Outside::Reflection => (self.reflected(at as f64) as i64).clamp(0, last),
        };
        usize::try_from(at).ok().filter(|at| *at < self.size)
    }
}

fn cubic(x: f64) -> f64 {
    let a = -0.75;
    if x <= 1.0 { ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0 } else { ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a }
}

fn infer_grid_sample(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (x, grid) = (cx.input(0, "picture")?, cx.input(1, "grid")?);
    let shape = match (&x.shape, &grid.shape) {
        (Some(x), Some(grid)) if x.len() == grid.len() && x.len() > 2 => {
            Some([&x[..2], &grid[1..grid.len() - 1]].concat())
        }
        (Some(x), Some(grid)) => {
            let (x, grid) = (crate::op::show_shape(x), crate::op::show_shape(grid));
            return Err(OpError::shape(format!(
                "a picture {x} and a grid {grid}, expected [N, C, ...] and [N, ..., rank]"
            )));
        }
        _ => None,
    };
    Ok(vec![Fact { dtype: x.dtype, shape, content: None }])
}

fn eval_grid_sample(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, grid) = (cx.input(0)?, cx.input(1)?);
    let rank = x.rank().checked_sub(2).filter(|r| *r > 0).ok_or_else(|| OpError::shape("the picture has no axes"))?;
    let points = grid.shape().get(1..grid.rank().saturating_sub(1)).unwrap_or(&[]).to_vec();
    expect_shape(grid, &[&x.shape()[..1], &points, &[rank]].concat(), "the grid")?;
    let mode = match cx.attributes().string("mode", if cx.opset < 20 { "bilinear" } else { "linear" })? {
        "nearest" => Mode::Nearest,
        "linear" | "bilinear" => Mode::Linear,
        "cubic" | "bicubic" => Mode::Cubic,
        other => return Err(OpError::attribute("mode", format!("is {other:?}; nearest, linear and cubic are known"))),
    };
    let outside = match cx.attributes().string("padding_mode", "zeros")? {
        "zeros" => Outside::Zeros,
        "border" => Outside::Border,
        "reflection" => Outside::Reflection,
        other => {
            let problem = format!("is {other:?}; zeros, border and reflection are known");
            return Err(OpError::attribute("padding_mode", problem));
        }
    };
    let align_corners = cx.attributes().flag("align_corners", false)?;
    let sides: Vec<Side> =
        x.shape()[2..].iter().map(|size| Side { size: *size, align_corners, outside, mode }).collect();
    if sides.iter().any(|side| side.size == 0) {
        return Err(OpError::shape(format!("a picture of shape {:?}", x.shape())));
    }
    let (batch, channels) = (x.shape()[0], x.shape()[1]);
    let plane: usize = x.shape()[2..].iter().product();
    let count: usize = points.iter().product();
    let (values, coordinates) = (x.to_f64()?, grid.to_f64()?);
    let shape = [&[batch, channels], points.as_slice()].concat();
    let mut y = filled(&shape, 0.0)?;
    for b in 0..batch {
        for p in 0..count {
            let point = &coordinates[(b * count + p) * rank..][..rank];
            let mut taps = vec![(0, 1.0)];
            for (side, coordinate) in sides.iter().zip(point.iter().rev()) {
                let along = side.taps(*coordinate);
                taps = taps
                    .iter()
                    .flat_map(|(at, w)| along.iter().map(move |(i, v)| (at * side.size + i, w * v)))
                    .collect();
            }
            for c in 0..channels {
                let start = (b * channels + c) * plane;
                y[(b * channels + c) * count + p] = taps.iter().map(|(at, w)| values[start + at] * w).sum();
            }
        }
    }
    Ok(vec![Tensor::from_f64(x.dtype(), &shape, &y)?])
}

fn infer_affine_grid(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (dtype, size) = (cx.dtype(0), cx.input(1, "size")?.content());
    let shape = size.filter(|s| s.len() > 2).map(|s| [&s[..1], &s[2..], &[Dim::Known(s.len() - 2)]].concat());
    Ok(vec![Fact { dtype, shape, content: None }])
}

/// Each point of the picture's own grid under the map `theta` `[N, rank, rank + 1]` of its example.
fn eval_affine_grid(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (theta, size) = (cx.input(0)?, shape_operand(cx.input(1)?)?);
    let (Some(batch), Some(picture)) = (size.first(), size.get(2..)) else {
        return Err(OpError::value(format!("size {size:?}, expected [N, C, ...]")));
    };
    let rank = picture.len();
    expect_shape(theta, &[*batch, rank, rank + 1], "theta")?;
    let align_corners = cx.attributes().flag("align_corners", false)?;
    let place = |index: usize, size: usize| match (align_corners, size) {
        (true, 1) => 0.0,
        (true, _) => -1.0 + 2.0 * index as f64 / (size - 1) as f64,
        (false, _) => -1.0 + (2.0 * index as f64 + 1.0) / size as f64,
    };
    let values = theta.to_f64()?;
    let shape = [&[*batch], picture, &[rank]].concat();
    let mut out = filled(&shape, 0.0)?;
    out.clear();
    let count: usize = picture.iter().product();
    for b in 0..*batch {
        for p in 0..count {
            let index = crate::op::index::unravel(p, picture);
            let mut point: Vec<f64> = index.iter().zip(picture).rev().map(|(i, n)| place(*i, *n)).collect();
            point.push(1.0);
            for row in 0..rank {
                let map = &values[(b * rank + row) * (rank + 1)..][..rank + 1];
                out.push(map.iter().zip(&point).map(|(t, x)| t * x).sum());
            }
        }
    }
    Ok(vec![Tensor::from_f64(theta.dtype(), &shape, &out)?])
}

fn grid_sample_flops(shapes: &Shapes) -> u64 {
    let taps: u64 = match shapes.attributes.string("mode", "linear") {
        Ok("nearest") => return 0,
        Ok("cubic" | "bicubic") => 4,
        _ => 2,
    };
    let rank = shapes.inputs.first().and_then(Option::as_ref).map_or(0, |(_, s)| s.len().saturating_sub(2));
    2 * shapes.output_len(0) * taps.saturating_pow(rank.min(8) as u32)
}

fn affine_grid_flops(shapes: &Shapes) -> u64 {
    let columns = shapes.inputs.first().and_then(Option::as_ref).and_then(|(_, s)| s.last()).map_or(0, |c| *c as u64);
    2 * shapes.output_len(0) * columns
}

fn grid_sample_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let x = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the picture must be known"))?;
    let mut links = vec![
        Link::Same(Axis::Input(0, 0), Axis::Output(0, 0)),
        Link::Same(Axis::Input(1, 0), Axis::Output(0, 0)),
        Link::Same(Axis::Input(0, 1), Axis::Output(0, 1)),
    ];
    links.extend((2..x.len()).map(|i| Link::Fixed(Axis::Input(0, i), "it is resampled")));
    Ok(links)
}
