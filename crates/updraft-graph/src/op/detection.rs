//! Boxes: NonMaxSuppression chooses among overlapping ones, RoiAlign samples a picture inside them
//! (He et al., <https://arxiv.org/abs/1703.06870>).

use crate::dim::Dim;
use crate::dtype::DType;
use crate::op::conv::expect_shape;
use crate::op::{Arity, Axis, Eval, Fact, Infer, Link, Op, OpError, Shapes, filled, no_flops};
use crate::tensor::Tensor;

const CHOICES: &str = "detection is trained before its boxes are chosen";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("NonMaxSuppression", &[10, 11], Arity::range(2, 5), infer_suppression, eval_suppression)
        .no_gradient("it chooses by number, which has no slope")
        .flops(no_flops)
        .no_channels("boxes are chosen by number"),
    Op::onnx("RoiAlign", &[10, 16, 22], Arity::exact(3), infer_roi_align, eval_roi_align)
        .no_gradient(CHOICES)
        .flops(roi_align_flops)
        .channels(roi_align_links),
];

fn infer_suppression(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    cx.expect_rank(0, 3, "the boxes")?;
    cx.expect_rank(1, 3, "the scores")?;
    Ok(vec![Fact::tensor(Some(DType::I64), vec![Dim::Unknown, Dim::Known(3)])])
}

/// Lowest and highest corner.
fn corners(given: &[f64], center: bool) -> [f64; 4] {
    let [a, b, c, d] = [given[0], given[1], given[2], given[3]];
    match center {
        true => [a - c / 2.0, b - d / 2.0, a + c / 2.0, b + d / 2.0],
        false => [a.min(c), b.min(d), a.max(c), b.max(d)],
    }
}

/// Area of the intersection over area of the union.
fn overlap(a: &[f64; 4], b: &[f64; 4]) -> f64 {
    let area = |r: &[f64; 4]| (r[2] - r[0]).max(0.0) * (r[3] - r[1]).max(0.0);
    let common = area(&[a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])]);
    let union = area(a) + area(b) - common;
    if union > 0.0 { common / union } else { 0.0 }
}

/// Of each example and class: boxes by falling score, each kept unless it overlaps one kept before too much. The result
/// has rows (example, class, box).
fn eval_suppression(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (boxes, scores) = (cx.input(0)?, cx.input(1)?);
    let ([batch, count, 4], [_, classes, _]) = (boxes.shape(), scores.shape()) else {
        return Err(OpError::shape(format!("boxes {:?} and scores {:?}", boxes.shape(), scores.shape())));
    };
    let (batch, count, classes) = (*batch, *count, *classes);
    expect_shape(scores, &[batch, classes, count], "the scores")?;
    let option = |index: usize| -> Result<Option<f64>, OpError> {
        match cx.optional(index).filter(|t| !t.is_empty()) {
            Some(tensor) => Ok(tensor.to_f64()?.first().copied()),
            None => Ok(None),
        }
    };
    let most = option(2)?.unwrap_or(0.0).max(0.0) as usize;
    let overlap_max = option(3)?.unwrap_or(0.0);
    let score_min = option(4)?;
    let center = cx.attributes().flag("center_point_box", false)?;
    let (box_values, score_values) = (boxes.to_f64()?, scores.to_f64()?);
    let mut chosen: Vec<i64> = Vec::new();
    for example in 0..batch {
        let corner = |i: usize| corners(&box_values[(example * count + i) * 4..][..4], center);
        for class in 0..classes {
            let line = &score_values[(example * classes + class) * count..][..count];
            let mut order: Vec<usize> = (0..count).filter(|i| score_min.is_none_or(|min| line[*i] > min)).collect();
            // A stable order, so that of equal scores the first box wins.
            order.sort_by(|a, b| line[*b].total_cmp(&line[*a]));
            let mut kept: Vec<usize> = Vec::new();
            for candidate in order {
                if kept.len() >= most {
                    break;
                }
                if kept.iter().all(|k| overlap(&corner(*k), &corner(candidate)) <= overlap_max) {
                    kept.push(candidate);
                    chosen.extend([example as i64, class as i64, candidate as i64]);
                }
            }
        }
    }
    Ok(vec![Tensor::new(&[chosen.len() / 3, 3], &chosen)?])
}

fn output_size(cx: &crate::op::OpView) -> Result<[usize; 2], OpError> {
    let size = |name: &str| {
        let value = cx.attributes().int(name, 1)?;
        usize::try_from(value)
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| OpError::attribute(name, format!("is {value}, expected a positive number")))
    };
    Ok([size("output_height")?, size("output_width")?])
}

fn infer_roi_align(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    cx.expect_rank(0, 4, "the picture")?;
    cx.expect_rank(1, 2, "the regions")?;
    let [height, width] = output_size(&cx.view)?;
    let channels = cx.shape(0).map_or(Dim::Unknown, |s| s[1].clone());
    let regions = cx.shape(1).map_or(Dim::Unknown, |s| s[0].clone());
    Ok(vec![Fact::tensor(cx.dtype(0), vec![regions, channels, Dim::Known(height), Dim::Known(width)])])
}

/// The two elements around a place on an axis and their weights; `None` where it is outside.
fn neighbours(place: f64, size: usize) -> Option<[(usize, f64); 2]> {
    if !(-1.0..=size as f64).contains(&place) || size == 0 {
        return None;
    }
    let place = place.max(0.0);
    let low = place as usize;
    if low + 1 >= size {
        return Some([(size - 1, 1.0), (size - 1, 0.0)]);
    }
    let ratio = place - low as f64;
    Some([(low, 1.0 - ratio), (low + 1, ratio)])
}

fn eval_roi_align(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, regions, examples) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let [batch, channels, height, width] = *x.shape() else {
        return Err(OpError::shape(format!("a picture of shape {:?}, expected [N, C, H, W]", x.shape())));
    };
    let count = regions.shape().first().copied().unwrap_or(0);
    expect_shape(regions, &[count, 4], "the regions")?;
    expect_shape(examples, &[count], "the regions' examples")?;
    let [rows, columns] = output_size(&cx.view)?;
    let attributes = cx.attributes();
    let scale = f64::from(attributes.float("spatial_scale", 1.0)?);
    let sampling = attributes.int("sampling_ratio", 0)?;
    let half_pixel = match attributes
        .string("coordinate_transformation_mode", if cx.opset < 16 { "output_half_pixel" } else { "half_pixel" })?
    {
        "half_pixel" => true,
        "output_half_pixel" => false,
        other => {
            let problem = format!("is {other:?}; half_pixel and output_half_pixel are known");
            return Err(OpError::attribute("coordinate_transformation_mode", problem));
        }
    };
    let maximum = match attributes.string("mode", "avg")? {
        "avg" => false,
        "max" => true,
        other => return Err(OpError::attribute("mode", format!("is {other:?}; \"avg\" and \"max\" are known"))),
    };
    let values = x.to_f64()?;
    let mut out = filled(&[count, channels, rows, columns], 0.0)?;
    for (region, (limits, example)) in regions.to_f64()?.chunks(4).zip(examples.to_i64()?).enumerate() {
        let example = usize::try_from(example).ok().filter(|e| *e < batch);
        let example = example.ok_or_else(|| OpError::value(format!("region {region} of an example beyond {batch}")))?;
        let offset = if half_pixel { 0.5 } else { 0.0 };
        let [left, top, right, bottom] = [0, 1, 2, 3].map(|i| limits[i] * scale - offset);
        // Without half pixels, regions are at least one element large.
        let extent = |from: f64, to: f64| if half_pixel { to - from } else { (to - from).max(1.0) };
        let cell = [extent(top, bottom) / rows as f64, extent(left, right) / columns as f64];
        let points = cell.map(|size| if sampling > 0 { sampling as f64 } else { size.ceil().max(0.0) });
        // A grid finer than this for one cell is a mistake, not a picture.
        if points.iter().any(|p| !p.is_finite() || *p > f64::from(1 << 16)) {
            return Err(OpError::value(format!("region {limits:?} is sampled at {points:?} points a cell")));
        }
        let places = |start: f64, index: usize, axis: usize, size: usize| -> Vec<Option<[(usize, f64); 2]>> {
            let step = cell[axis] / points[axis];
            (0..points[axis] as usize)
                .map(|i| neighbours(start + index as f64 * cell[axis] + (i as f64 + 0.5) * step, size))
                .collect()
        };
        for row in 0..rows {
            let ys = places(top, row, 0, height);
            for column in 0..columns {
                let xs = places(left, column, 1, width);
                for c in 0..channels {
                    let plane = &values[(example * channels + c) * height * width..][..height * width];
                    let (mut sum, mut best) = (0.0, f64::NEG_INFINITY);
                    for (y, x) in ys.iter().flat_map(|y| xs.iter().map(move |x| (y, x))) {
                        let (Some(y), Some(x)) = (y, x) else {
                            best = best.max(0.0);
                            continue;
                        };
                        for ((i, v), (j, w)) in y.iter().flat_map(|y| x.iter().map(move |x| (y, x))) {
                            let term = plane[i * width + j] * v * w;
                            sum += term;
                            best = best.max(term);
                        }
                    }
                    let samples = (ys.len() * xs.len()).max(1) as f64;
                    let found = if maximum && best.is_finite() { best } else { sum / samples };
                    out[((region * channels + c) * rows + row) * columns + column] = found;
                }
            }
        }
    }
    Ok(vec![Tensor::from_f64(x.dtype(), &[count, channels, rows, columns], &out)?])
}

/// Four products and their sum for each sample; the grid is taken as two by two where it follows from the regions.
fn roi_align_flops(shapes: &Shapes) -> u64 {
    let side = shapes.attributes.int("sampling_ratio", 0).unwrap_or(0).clamp(0, 1 << 16) as u64;
    let samples = if side == 0 { 4 } else { side * side };
    shapes.output_len(0).saturating_mul(8 * samples)
}

fn roi_align_links(_: &Infer) -> Result<Vec<Link>, OpError> {
    Ok(vec![
        Link::Same(Axis::Input(0, 1), Axis::Output(0, 1)),
        Link::Same(Axis::Input(1, 0), Axis::Output(0, 0)),
        Link::Same(Axis::Input(2, 0), Axis::Output(0, 0)),
    ])
}
