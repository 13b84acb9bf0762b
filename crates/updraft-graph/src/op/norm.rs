//! Normalisation by statistics of channels: BatchNormalization in its inference and training forms,
//! InstanceNormalization, GroupNormalization, LRN. Those by rows are in `layer`.
//!
//! Training is an operator of our own with all statistics as outputs, so that the forward pass, the gradient and the
//! running statistics read the same numbers. Batch normalization: Ioffe and Szegedy, <https://arxiv.org/abs/1502.03167>;
//! the variance is that of the population, as in ONNX's `training_mode`.

use crate::attribute::Attributes;
use crate::dim::{Dim, known_shape};
use crate::dtype::DType;
use crate::graph::{UPDRAFT_DOMAIN, ValueId};
use crate::op::conv::{bias_gradient, expect_shape};
use crate::op::window::spatial;
use crate::op::{
    AFTER_STRUCTURE, Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, Rule, SECOND_ORDER, Shapes, filled,
};
use crate::tensor::Tensor;

pub mod layer;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op {
        name: "BatchNormalization",
        domain: "",
        versions: &[7, 9, 14, 15],
        arity: Arity::exact(5).outputs(1, 5),
        infer: infer_batch,
        eval: Rule::Is(eval_batch),
        gradient: Rule::Is(batch_gradient),
        flops: affine_flops,
        channels: Rule::Is(channel_links),
    },
    Op {
        name: "BatchNormalizationTraining",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(5).outputs(5, 5),
        infer: infer_batch_training,
        eval: Rule::Is(eval_batch_training),
        gradient: Rule::Is(batch_training_gradient),
        flops: statistics_flops,
        channels: Rule::Is(channel_links),
    },
    Op {
        name: "BatchNormalizationGradient",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(5).outputs(3, 3),
        infer: infer_batch_gradient,
        eval: Rule::Is(eval_batch_gradient),
        gradient: Rule::None(SECOND_ORDER),
        flops: statistics_flops,
        channels: Rule::None(AFTER_STRUCTURE),
    },
    Op {
        name: "InstanceNormalization",
        domain: "",
        versions: &[1, 6, 22],
        arity: Arity::exact(3),
        infer: infer_like_x,
        eval: Rule::Is(eval_instance),
        gradient: Rule::Is(instance_gradient),
        flops: statistics_flops,
        channels: Rule::Is(instance_links),
    },
    Op {
        name: "GroupNormalization",
        domain: "",
        versions: &[18, 21],
        arity: Arity::exact(3),
        infer: infer_like_x,
        eval: Rule::Is(eval_group),
        gradient: Rule::Is(group_gradient),
        flops: statistics_flops,
        channels: Rule::Is(group_links),
    },
    Op {
        name: "LRN",
        domain: "",
        versions: &[1, 13],
        arity: Arity::exact(1),
        infer: infer_like_x,
        eval: Rule::Is(eval_lrn),
        gradient: Rule::None("networks that are trained normalise by batch, group or layer"),
        flops: lrn_flops,
        channels: Rule::Is(lrn_links),
    },
];

/// What ONNX takes where the attribute `epsilon` is absent.
const EPSILON: f32 = 1e-5;

fn epsilon(attributes: &Attributes) -> Result<f64, OpError> {
    Ok(f64::from(attributes.float("epsilon", EPSILON)?))
}

/// `[N, C, ...]` as examples, channels and elements of one channel of one example; fewer axes count as ones.
fn channels_of(shape: &[usize]) -> (usize, usize, usize) {
    let dim = |i: usize| shape.get(i).copied().unwrap_or(1);
    (dim(0), dim(1), shape.get(2..).unwrap_or(&[]).iter().product())
}

/// For each element of `[N, C, ...]`, its channel and its value.
fn by_channel(values: &[f64], (_, channels, plane): (usize, usize, usize)) -> impl Iterator<Item = (usize, f64)> {
    values.iter().enumerate().map(move |(i, v)| (i / plane % channels, *v))
}

fn per_channel(cx: &Eval, index: usize, channels: usize, what: &str) -> Result<Vec<f64>, OpError> {
    let tensor = cx.input(index)?;
    expect_shape(tensor, &[channels], what)?;
    Ok(tensor.to_f64()?)
}

fn infer_batch(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = Fact { content: None, ..cx.input(0, "input")?.fact.clone() };
    let channels = match &x.shape {
        Some(shape) if shape.len() < 2 => None,
        Some(shape) => Some(vec![shape[1].clone()]),
        None => None,
    };
    for index in 1..5 {
        check_channels(cx, index, channels.as_deref())?;
    }
    let statistic = |index: usize| Fact { dtype: cx.dtype(index), shape: channels.clone(), content: None };
    Ok(vec![x, statistic(3), statistic(4), statistic(3), statistic(4)])
}

fn check_channels(cx: &Infer, index: usize, channels: Option<&[Dim]>) -> Result<(), OpError> {
    match (cx.shape(index), channels) {
        (Some([found]), Some([expected])) if found.differs(expected) => {
            Err(OpError::shape(format!("input {index} has {found} elements for {expected} channels")))
        }
        _ => Ok(()),
    }
}

fn infer_batch_training(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    infer_batch(cx)
}

fn infer_batch_gradient(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = Fact { content: None, ..cx.input(1, "input")?.fact.clone() };
    let scale = Fact { content: None, ..cx.input(2, "scale")?.fact.clone() };
    Ok(vec![x, scale.clone(), scale])
}

fn infer_like_x(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    Ok(vec![Fact { content: None, ..cx.input(0, "input")?.fact.clone() }])
}

fn eval_batch(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    if cx.opset < 14 && cx.output_count() > 1 {
        return Err(OpError::unsupported(
            "BatchNormalization of opset 13 or older with statistics as outputs (training)",
        ));
    }
    if cx.opset < 9 && !cx.attributes().flag("spatial", true)? {
        return Err(OpError::unsupported("BatchNormalization with spatial = 0"));
    }
    if cx.opset >= 14 && cx.attributes().flag("training_mode", false)? {
        let mut made = eval_batch_training(cx)?;
        made.truncate(3);
        return Ok(made);
    }
    let x = cx.input(0)?;
    let sizes = channels_of(x.shape());
    let scale = per_channel(cx, 1, sizes.1, "scale")?;
    let bias = per_channel(cx, 2, sizes.1, "bias")?;
    let mean = per_channel(cx, 3, sizes.1, "the running mean")?;
    let variance = per_channel(cx, 4, sizes.1, "the running variance")?;
    let epsilon = epsilon(cx.attributes())?;
    let inv_std: Vec<f64> = variance.iter().map(|v| 1.0 / (v + epsilon).sqrt()).collect();
    let y = affine(&x.to_f64()?, sizes, &scale, &bias, &mean, &inv_std);
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &y)?])
}

fn affine(
    x: &[f64],
    sizes: (usize, usize, usize),
    scale: &[f64],
    bias: &[f64],
    mean: &[f64],
    inv_std: &[f64],
) -> Vec<f64> {
    by_channel(x, sizes).map(|(c, v)| (v - mean[c]) * inv_std[c] * scale[c] + bias[c]).collect()
}

/// Mean and population variance of each channel.
fn statistics(x: &[f64], sizes: (usize, usize, usize)) -> (Vec<f64>, Vec<f64>) {
    let count = (sizes.0 * sizes.2) as f64;
    let mut mean = vec![0.0; sizes.1];
    by_channel(x, sizes).for_each(|(c, v)| mean[c] += v / count);
    let mut variance = vec![0.0; sizes.1];
    by_channel(x, sizes).for_each(|(c, v)| variance[c] += (v - mean[c]).powi(2) / count);
    (mean, variance)
}

fn eval_batch_training(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let sizes = channels_of(x.shape());
    let scale = per_channel(cx, 1, sizes.1, "scale")?;
    let bias = per_channel(cx, 2, sizes.1, "bias")?;
    let running_mean = per_channel(cx, 3, sizes.1, "the running mean")?;
    let running_variance = per_channel(cx, 4, sizes.1, "the running variance")?;
    let values = x.to_f64()?;
    if values.is_empty() {
        return Err(OpError::shape(format!("a batch of shape {:?} has no statistics", x.shape())));
    }
    let momentum = f64::from(cx.attributes().float("momentum", 0.9)?);
    let epsilon = epsilon(cx.attributes())?;
    let (mean, variance) = statistics(&values, sizes);
    let inv_std: Vec<f64> = variance.iter().map(|v| 1.0 / (v + epsilon).sqrt()).collect();
    let y = affine(&values, sizes, &scale, &bias, &mean, &inv_std);
    let blend = |running: &[f64], batch: &[f64]| -> Vec<f64> {
        running.iter().zip(batch).map(|(r, b)| r * momentum + b * (1.0 - momentum)).collect()
    };
    let statistic = |like: usize, values: &[f64]| -> Result<Tensor, OpError> {
        Ok(Tensor::from_f64(cx.input(like)?.dtype(), &[sizes.1], values)?)
    };
    Ok(vec![
        Tensor::from_f64(x.dtype(), x.shape(), &y)?,
        statistic(3, &blend(&running_mean, &mean))?,
        statistic(4, &blend(&running_variance, &variance))?,
        statistic(3, &mean)?,
        statistic(4, &inv_std)?,
    ])
}

/// With `h = (x - mean) inv_std`: dbias = sum dy, dscale = sum dy h, and
/// dx = scale inv_std (dy - mean(dy) - h mean(dy h)).
fn eval_batch_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (dy, x) = (cx.input(0)?, cx.input(1)?);
    expect_shape(dy, x.shape(), "the gradient of the output")?;
    let sizes = channels_of(x.shape());
    let scale = per_channel(cx, 2, sizes.1, "scale")?;
    let mean = per_channel(cx, 3, sizes.1, "the batch's mean")?;
    let inv_std = per_channel(cx, 4, sizes.1, "the batch's inverse standard deviation")?;
    let (dy_values, x_values) = (dy.to_f64()?, x.to_f64()?);
    let normal: Vec<f64> = by_channel(&x_values, sizes).map(|(c, v)| (v - mean[c]) * inv_std[c]).collect();
    let (mut dscale, mut dbias) = (vec![0.0; sizes.1], vec![0.0; sizes.1]);
    for ((c, d), h) in by_channel(&dy_values, sizes).zip(&normal) {
        dscale[c] += d * h;
        dbias[c] += d;
    }
    let count = (sizes.0 * sizes.2) as f64;
    let dx: Vec<f64> = by_channel(&dy_values, sizes)
        .zip(&normal)
        .map(|((c, d), h)| scale[c] * inv_std[c] * (d - dbias[c] / count - h * dscale[c] / count))
        .collect();
    let dtype = cx.input(2)?.dtype();
    Ok(vec![
        Tensor::from_f64(x.dtype(), x.shape(), &dx)?,
        Tensor::from_f64(dtype, &[sizes.1], &dscale)?,
        Tensor::from_f64(dtype, &[sizes.1], &dbias)?,
    ])
}

/// `y = (x - mean) / sqrt(variance + epsilon) * scale + bias` with the statistics as constants or as inputs.
fn batch_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    if cx.node.attributes.flag("training_mode", false)? {
        return Err(OpError::unsupported(
            "gradient of BatchNormalization with training_mode; lower it to BatchNormalizationTraining first",
        ));
    }
    let (x, scale, mean, variance, dy) = (cx.input(0)?, cx.input(1)?, cx.input(3)?, cx.input(4)?, cx.grad()?);
    let rank = cx.shape(x)?.len();
    let epsilon = cx.scalar_like(epsilon(&cx.node.attributes)?, variance)?;
    let shifted = cx.op("Add", &[variance, epsilon])?;
    let std = cx.op("Sqrt", &[shifted])?;
    let factor = cx.op("Div", &[scale, std])?;
    let wide = channel_column(cx, factor, rank)?;
    let dx = cx.op("Mul", &[dy, wide])?;
    let dbias = bias_gradient(cx, dy)?;
    let weighted = cx.op("Mul", &[dy, x])?;
    let weighted = bias_gradient(cx, weighted)?;
    let at_mean = cx.op("Mul", &[dbias, mean])?;
    let centered = cx.op("Sub", &[weighted, at_mean])?;
    let dscale = cx.op("Div", &[centered, std])?;
    let dmean = match cx.wants(3) {
        true => {
            let product = cx.op("Mul", &[dbias, factor])?;
            Some(cx.op("Neg", &[product])?)
        }
        false => None,
    };
    let dvariance = match cx.wants(4) {
        true => {
            let product = cx.op("Mul", &[dscale, scale])?;
            let quotient = cx.op("Div", &[product, shifted])?;
            let factor = cx.scalar_like(-0.5, quotient)?;
            Some(cx.op("Mul", &[quotient, factor])?)
        }
        false => None,
    };
    Ok(vec![Some(dx), Some(dscale), Some(dbias), dmean, dvariance])
}

/// A vector `[C]` as `[C, 1, ...]`, to meet `[N, C, ...]` of the given rank.
fn channel_column(cx: &mut Gradient, vector: ValueId, rank: usize) -> Result<ValueId, OpError> {
    let mut shape = vec![1i64; rank.saturating_sub(1)];
    if let Some(first) = shape.first_mut() {
        *first = -1;
    }
    let shape = cx.graph.add_constant("shape", Tensor::vector(&shape));
    cx.op("Reshape", &[vector, shape])
}

fn batch_training_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    if cx.grads.iter().skip(1).any(Option::is_some) {
        return Err(OpError::unsupported("a loss that depends on the statistics of BatchNormalizationTraining"));
    }
    let (x, scale, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let (mean, inv_std) = (cx.output(3)?, cx.output(4)?);
    let operands = [dy, x, scale, mean, inv_std].map(Some);
    let made = cx.graph.op_n(UPDRAFT_DOMAIN, "BatchNormalizationGradient", &operands, Attributes::new(), 3)?;
    Ok(vec![Some(made[0]), Some(made[1]), Some(made[2]), None, None])
}

/// Normalises each of `groups` equal runs of channels of each example, then scales and shifts; `scale` and `bias`
/// have an entry for each channel.
fn normalize_groups(cx: &Eval, groups: usize, scale: &[f64], bias: &[f64]) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let (batch, channels, plane) = channels_of(x.shape());
    let run = channels / groups * plane;
    let epsilon = epsilon(cx.attributes())?;
    let values = x.to_f64()?;
    let (mean, variance) = statistics(&values, (1, batch * groups, run));
    let y: Vec<f64> = by_channel(&values, (batch, channels, plane))
        .enumerate()
        .map(|(i, (c, v))| {
            let group = i / run;
            (v - mean[group]) / (variance[group] + epsilon).sqrt() * scale[c] + bias[c]
        })
        .collect();
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &y)?])
}

fn eval_instance(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?.shape();
    spatial(x, "the input")?;
    let scale = per_channel(cx, 1, x[1], "scale")?;
    let bias = per_channel(cx, 2, x[1], "bias")?;
    if x[1] == 0 {
        return Ok(vec![cx.input(0)?.clone()]);
    }
    normalize_groups(cx, x[1], &scale, &bias)
}

/// The attribute `num_groups`, which must divide the channels.
fn group_count(attributes: &Attributes, channels: &Dim) -> Result<usize, OpError> {
    let groups = attributes.int("num_groups", 0)?;
    let count = usize::try_from(groups).ok().filter(|g| *g > 0);
    match (count, channels) {
        (Some(count), Dim::Known(c)) if c % count != 0 => {
            Err(OpError::attribute("num_groups", format!("is {count}, which does not divide {c} channels")))
        }
        (Some(count), _) => Ok(count),
        (None, _) => Err(OpError::attribute("num_groups", format!("is {groups}, expected a positive number"))),
    }
}

fn eval_group(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?.shape();
    let channels = channels_of(x).1;
    let groups = group_count(cx.attributes(), &Dim::Known(channels))?;
    let affine = |index: usize, what: &str| -> Result<Vec<f64>, OpError> {
        // Opset 18 had one scale a group.
        if cx.opset < 21 {
            let values = per_channel(cx, index, groups, what)?;
            return Ok((0..channels).map(|c| values[c * groups / channels]).collect());
        }
        per_channel(cx, index, channels, what)
    };
    let (scale, bias) = (affine(1, "scale")?, affine(2, "bias")?);
    if cx.input(0)?.is_empty() {
        return Ok(vec![cx.input(0)?.clone()]);
    }
    normalize_groups(cx, groups, &scale, &bias)
}

fn instance_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let x = cx.input(0)?;
    let channels = cx.shape(x)?.get(1).and_then(Dim::known);
    let channels =
        channels.ok_or_else(|| OpError::shape("gradient of InstanceNormalization over channels that are not known"))?;
    groups_gradient(cx, channels)
}

fn group_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    if cx.graph.opset("").is_some_and(|opset| opset < 21) {
        return Err(OpError::unsupported(
            "gradient of GroupNormalization of opset 20 or older; upgrade the graph first",
        ));
    }
    let x = cx.input(0)?;
    let channels = cx.shape(x)?.get(1).cloned().unwrap_or(Dim::Unknown);
    let groups = group_count(&cx.node.attributes, &channels)?;
    groups_gradient(cx, groups)
}

/// With `h` the normalised runs and `g = dy scale`: dx = inv_std (g - mean(g) - h mean(g h)), dscale = sum dy h,
/// dbias = sum dy.
fn groups_gradient(cx: &mut Gradient, groups: usize) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, scale, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let rank = cx.shape(x)?.len();
    let epsilon = epsilon(&cx.node.attributes)?;
    let runs = cx.graph.add_constant("shape", Tensor::vector(&[0, groups as i64, -1]));
    let x_runs = cx.op("Reshape", &[x, runs])?;
    let (normal, inv_std) = normalize(cx, x_runs, epsilon)?;
    let wide_scale = channel_column(cx, scale, rank)?;
    let g = cx.op("Mul", &[dy, wide_scale])?;
    let g = cx.op("Reshape", &[g, runs])?;
    let dx = normalized_gradient(cx, g, normal, inv_std, true)?;
    let dx = cx.reshape_like(dx, x)?;
    let normal = cx.reshape_like(normal, x)?;
    let dscale = cx.op("Mul", &[dy, normal])?;
    let dscale = bias_gradient(cx, dscale)?;
    let dbias = bias_gradient(cx, dy)?;
    Ok(vec![Some(dx), Some(dscale), Some(dbias)])
}

/// `(x - mean) inv_std` and `inv_std` along the last axis.
fn normalize(cx: &mut Gradient, x: ValueId, epsilon: f64) -> Result<(ValueId, ValueId), OpError> {
    let mean = mean_last(cx, x)?;
    let centered = cx.op("Sub", &[x, mean])?;
    let inv_std = inverse_root_mean_square(cx, centered, epsilon)?;
    Ok((cx.op("Mul", &[centered, inv_std])?, inv_std))
}

/// `1 / sqrt(mean(x^2) + epsilon)` along the last axis.
fn inverse_root_mean_square(cx: &mut Gradient, x: ValueId, epsilon: f64) -> Result<ValueId, OpError> {
    let square = cx.op("Mul", &[x, x])?;
    let mean = mean_last(cx, square)?;
    let epsilon = cx.scalar_like(epsilon, x)?;
    let shifted = cx.op("Add", &[mean, epsilon])?;
    let root = cx.op("Sqrt", &[shifted])?;
    cx.op("Reciprocal", &[root])
}

fn mean_last(cx: &mut Gradient, x: ValueId) -> Result<ValueId, OpError> {
    let axes = cx.graph.add_constant("axes", Tensor::vector(&[-1i64]));
    cx.op_with("ReduceMean", &[x, axes], [("keepdims", 1.into())])
}

/// The gradient through a normalisation along the last axis: `inv_std (g - mean(g) - h mean(g h))`, without the term
/// `mean(g)` where no mean was taken off.
fn normalized_gradient(
    cx: &mut Gradient,
    g: ValueId,
    normal: ValueId,
    inv_std: ValueId,
    centered: bool,
) -> Result<ValueId, OpError> {
    let product = cx.op("Mul", &[g, normal])?;
    let along = mean_last(cx, product)?;
    let along = cx.op("Mul", &[normal, along])?;
    let mut out = cx.op("Sub", &[g, along])?;
    if centered {
        let mean = mean_last(cx, g)?;
        out = cx.op("Sub", &[out, mean])?;
    }
    cx.op("Mul", &[out, inv_std])
}

/// `y = x / (bias + alpha / size * sum of squares over size neighbouring channels)^beta`.
fn eval_lrn(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let size = cx.attributes().int("size", 0)?;
    let size = usize::try_from(size)
        .ok()
        .filter(|s| *s > 0)
        .ok_or_else(|| OpError::attribute("size", format!("is {size}, expected a positive number")))?;
    let alpha = f64::from(cx.attributes().float("alpha", 0.0001)?);
    let beta = f64::from(cx.attributes().float("beta", 0.75)?);
    let bias = f64::from(cx.attributes().float("bias", 1.0)?);
    let (_, channels, plane) = channels_of(x.shape());
    let values = x.to_f64()?;
    let mut y = filled(x.shape(), 0.0)?;
    for (i, (c, v)) in by_channel(&values, (1, channels, plane)).enumerate() {
        let first = c.saturating_sub((size - 1) / 2);
        let last = (c + size / 2).min(channels - 1);
        let squares: f64 = (first..=last).map(|other| values[i - c * plane + other * plane].powi(2)).sum();
        y[i] = v / (bias + alpha / size as f64 * squares).powf(beta);
    }
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &y)?])
}

fn affine_flops(shapes: &Shapes) -> u64 {
    2 * shapes.output_len(0)
}

/// Two passes for the statistics, one that normalises, scales and shifts.
fn statistics_flops(shapes: &Shapes) -> u64 {
    8 * shapes.output_len(0)
}

fn lrn_flops(shapes: &Shapes) -> u64 {
    let size = shapes.attributes.int("size", 1).unwrap_or(1).max(1) as u64;
    shapes.output_len(0).saturating_mul(2 * size.min(1 << 32) + 4)
}

fn rank_of(cx: &Infer) -> Result<usize, OpError> {
    Ok(cx.shape(0).ok_or_else(|| OpError::shape("the rank of the input must be known"))?.len())
}

/// Every axis of the input is that of the output, and every other operand lies along the channels.
fn channel_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let rank = rank_of(cx)?;
    let mut links: Vec<Link> = (0..rank).map(|i| Link::Same(Axis::Input(0, i), Axis::Output(0, i))).collect();
    links.extend((1..cx.inputs.len()).map(|index| Link::Same(Axis::Input(index, 0), Axis::Output(0, 1))));
    links.extend((1..cx.output_count()).map(|index| Link::Same(Axis::Output(index, 0), Axis::Output(0, 1))));
    Ok(links)
}

/// Statistics are those of each channel, over all other axes but that of examples.
fn instance_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let mut links = channel_links(cx)?;
    let measured = 2..rank_of(cx)?;
    links.extend(measured.map(|i| Link::Fixed(Axis::Input(0, i), "every element takes part in the statistics")));
    Ok(links)
}

fn group_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let groups = group_count(cx.attributes(), &Dim::Unknown)?;
    let mut links = instance_links(cx)?;
    links.push(Link::Grouped(Axis::Input(0, 1), Axis::Output(0, 1), groups));
    Ok(links)
}

fn lrn_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let mut links = channel_links(cx)?;
    links.push(Link::Fixed(Axis::Input(0, 1), "neighbouring channels take part in the normalisation"));
    Ok(links)
}

/// The element type that the attribute `stash_type` names for statistics.
fn stash_type(attributes: &Attributes) -> Result<DType, OpError> {
    let number = attributes.int("stash_type", 1)?;
    i32::try_from(number)
        .ok()
        .and_then(DType::from_onnx)
        .filter(|dtype| dtype.is_float())
        .ok_or_else(|| OpError::attribute("stash_type", format!("is {number}, expected a float type's number")))
}

/// Sizes of all axes from `axis` on, where all are known.
fn tail(shape: &[Dim], axis: usize) -> Option<Vec<usize>> {
    known_shape(shape.get(axis..)?)
}
