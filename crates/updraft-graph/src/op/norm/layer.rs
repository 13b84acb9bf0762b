//! Normalisation of rows: LayerNormalization (Ba et al., <https://arxiv.org/abs/1607.06450>), RMSNormalization (Zhang
//! and Sennrich, <https://arxiv.org/abs/1910.07467>), LpNormalization, MeanVarianceNormalization.
//!
//! A row is all axes from one on. LayerNormalization keeps the mean and inverse standard deviation of each row for its
//! gradient as its optional outputs.

use super::{epsilon, inverse_root_mean_square, normalized_gradient, rank_of, stash_type, statistics_flops, tail};
use crate::attribute::Attributes;
use crate::dim::Dim;
use crate::graph::{UPDRAFT_DOMAIN, ValueId};
use crate::op::conv::expect_shape;
use crate::op::index::broadcast_positions;
use crate::op::softmax::Lines;
use crate::op::{
    AFTER_STRUCTURE, Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, OpView, Rule, SECOND_ORDER,
    broadcast, resolve_axis, show_shape,
};
use crate::tensor::Tensor;

/// The family.
pub(in crate::op) const OPS: &[Op] = &[
    Op {
        name: "LayerNormalization",
        domain: "",
        versions: &[17],
        arity: Arity::range(2, 3).outputs(1, 3),
        infer: infer_layer,
        eval: Rule::Is(eval_layer),
        gradient: Rule::Is(layer_gradient),
        flops: statistics_flops,
        channels: Rule::Is(row_links),
    },
    Op {
        name: "LayerNormalizationGradient",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(5).outputs(3, 3),
        infer: infer_layer_gradient,
        eval: Rule::Is(eval_layer_gradient),
        gradient: Rule::None(SECOND_ORDER),
        flops: statistics_flops,
        channels: Rule::None(AFTER_STRUCTURE),
    },
    Op {
        name: "RMSNormalization",
        domain: "",
        versions: &[23],
        arity: Arity::exact(2),
        infer: infer_layer,
        eval: Rule::Is(eval_rms),
        gradient: Rule::Is(rms_gradient),
        flops: statistics_flops,
        channels: Rule::Is(row_links),
    },
    Op {
        name: "LpNormalization",
        domain: "",
        versions: &[1, 22],
        arity: Arity::exact(1),
        infer: infer_like_x,
        eval: Rule::Is(eval_lp),
        gradient: Rule::Is(lp_gradient),
        flops: statistics_flops,
        channels: Rule::Is(lp_links),
    },
    Op {
        name: "MeanVarianceNormalization",
        domain: "",
        versions: &[9, 13],
        arity: Arity::exact(1),
        infer: infer_like_x,
        eval: Rule::Is(eval_mean_variance),
        gradient: Rule::None("networks that are trained normalise by batch, group or layer"),
        flops: statistics_flops,
        channels: Rule::Is(mean_variance_links),
    },
];

fn first_axis(view: &OpView, rank: usize) -> Result<usize, OpError> {
    resolve_axis(view.attributes().int("axis", -1)?, rank)
}

fn infer_like_x(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    Ok(vec![Fact { content: None, ..cx.input(0, "input")?.fact.clone() }])
}

fn infer_layer(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = Fact { content: None, ..cx.input(0, "input")?.fact.clone() };
    let statistic = match &x.shape {
        Some(shape) => {
            let axis = first_axis(&cx.view, shape.len())?;
            for index in 1..cx.inputs.len() {
                check_affine(cx, index, shape)?;
            }
            Some([&shape[..axis], &vec![Dim::Known(1); shape.len() - axis]].concat())
        }
        None => None,
    };
    let statistic = Fact { dtype: Some(stash_type(cx.attributes())?), shape: statistic, content: None };
    Ok(vec![x, statistic.clone(), statistic])
}

fn check_affine(cx: &Infer, index: usize, x: &[Dim]) -> Result<(), OpError> {
    let Some(shape) = cx.shape(index) else { return Ok(()) };
    let fits = shape.len() <= x.len()
        && shape.iter().rev().zip(x.iter().rev()).all(|(a, b)| *a == Dim::Known(1) || !a.differs(b));
    if fits {
        return Ok(());
    }
    Err(OpError::shape(format!("input {index} of shape {} for rows of {}", show_shape(shape), show_shape(x))))
}

fn infer_layer_gradient(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = Fact { content: None, ..cx.input(1, "input")?.fact.clone() };
    let scale = Fact { content: None, ..cx.input(2, "scale")?.fact.clone() };
    Ok(vec![x, scale.clone(), scale])
}

/// The elements of a tensor that broadcasts to `shape`, stretched to it.
fn stretched(tensor: &Tensor, shape: &[usize]) -> Result<Vec<f64>, OpError> {
    if broadcast(&[tensor.shape(), shape])? != shape {
        return Err(OpError::shape(format!("shape {:?} does not broadcast to {shape:?}", tensor.shape())));
    }
    let values = tensor.to_f64()?;
    Ok(broadcast_positions(tensor.shape(), shape).map(|p| values[p]).collect())
}

fn eval_layer(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let axis = first_axis(&cx.view, x.rank())?;
    let epsilon = epsilon(cx.attributes())?;
    let mut y = x.to_f64()?;
    let (mut means, mut inv_stds) = (vec![], vec![]);
    for row in Lines::from(x.shape(), axis).positions() {
        let count = row.clone().count() as f64;
        let mean = row.clone().map(|i| y[i]).sum::<f64>() / count;
        let variance = row.clone().map(|i| (y[i] - mean).powi(2)).sum::<f64>() / count;
        let inv_std = 1.0 / (variance + epsilon).sqrt();
        row.for_each(|i| y[i] = (y[i] - mean) * inv_std);
        means.push(mean);
        inv_stds.push(inv_std);
    }
    scale_and_shift(cx, &mut y)?;
    let shape: Vec<usize> = (0..x.rank()).map(|i| if i < axis { x.shape()[i] } else { 1 }).collect();
    let stash = stash_type(cx.attributes())?;
    Ok(vec![
        Tensor::from_f64(x.dtype(), x.shape(), &y)?,
        Tensor::from_f64(stash, &shape, &means)?,
        Tensor::from_f64(stash, &shape, &inv_stds)?,
    ])
}

fn scale_and_shift(cx: &Eval, y: &mut [f64]) -> Result<(), OpError> {
    let x = cx.input(0)?;
    let scale = stretched(cx.input(1)?, x.shape())?;
    y.iter_mut().zip(scale).for_each(|(y, s)| *y *= s);
    if let Some(bias) = cx.optional(2) {
        y.iter_mut().zip(stretched(bias, x.shape())?).for_each(|(y, b)| *y += b);
    }
    Ok(())
}

/// With `h = (x - mean) inv_std` and `g = dy scale` in each row: dx = inv_std (g - mean(g) - h mean(g h)); dscale and
/// dbias are the sums of `dy h` and `dy` over rows.
fn eval_layer_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (dy, x, scale) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let axis = first_axis(&cx.view, x.rank())?;
    expect_shape(dy, x.shape(), "the gradient of the output")?;
    expect_shape(scale, &x.shape()[axis..], "scale")?;
    let rows = Lines::from(x.shape(), axis);
    let (mean, inv_std) = (cx.input(3)?.to_f64()?, cx.input(4)?.to_f64()?);
    if mean.len() != rows.count() || inv_std.len() != rows.count() {
        return Err(OpError::shape(format!(
            "{} means and {} deviations of {} rows",
            mean.len(),
            inv_std.len(),
            rows.count()
        )));
    }
    let (dy_values, x_values, scales) = (dy.to_f64()?, x.to_f64()?, scale.to_f64()?);
    let mut dx = vec![0.0; x_values.len()];
    let (mut dscale, mut dbias) = (vec![0.0; rows.len], vec![0.0; rows.len]);
    let count = rows.len as f64;
    for (row, positions) in rows.positions().enumerate() {
        let normal = |i: usize| (x_values[i] - mean[row]) * inv_std[row];
        let (mut sum, mut product) = (0.0, 0.0);
        for (k, i) in positions.clone().enumerate() {
            dscale[k] += dy_values[i] * normal(i);
            dbias[k] += dy_values[i];
            sum += dy_values[i] * scales[k];
            product += dy_values[i] * scales[k] * normal(i);
        }
        for (k, i) in positions.enumerate() {
            dx[i] = inv_std[row] * (dy_values[i] * scales[k] - sum / count - normal(i) * product / count);
        }
    }
    Ok(vec![
        Tensor::from_f64(x.dtype(), x.shape(), &dx)?,
        Tensor::from_f64(scale.dtype(), scale.shape(), &dscale)?,
        Tensor::from_f64(scale.dtype(), scale.shape(), &dbias)?,
    ])
}

fn layer_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    if cx.grads.iter().skip(1).any(Option::is_some) {
        return Err(OpError::unsupported("a loss that depends on the statistics of LayerNormalization"));
    }
    let (x, scale, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let (x_shape, scale_shape) = (cx.shape(x)?, cx.shape(scale)?);
    let axis = resolve_axis(cx.node.attributes.int("axis", -1)?, x_shape.len())?;
    for operand in [Some(scale), cx.optional(2)].into_iter().flatten() {
        let shape = cx.shape(operand)?;
        if shape.len() != x_shape.len() - axis || tail(&x_shape, axis).is_some_and(|t| crate::dim::dims(&t) != shape) {
            return Err(OpError::unsupported(format!(
                "gradient of LayerNormalization whose scale or bias {} is stretched over rows of {}",
                show_shape(&scale_shape),
                show_shape(&x_shape[axis..])
            )));
        }
    }
    let (mean, inv_std) = (cx.output(1)?, cx.output(2)?);
    let attributes = Attributes::from([("axis", (axis as i64).into())]);
    let operands = [dy, x, scale, mean, inv_std].map(Some);
    let made = cx.graph.op_n(UPDRAFT_DOMAIN, "LayerNormalizationGradient", &operands, attributes, 3)?;
    Ok(vec![Some(made[0]), Some(made[1]), Some(made[2])])
}

fn eval_rms(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let axis = first_axis(&cx.view, x.rank())?;
    let epsilon = epsilon(cx.attributes())?;
    let mut y = x.to_f64()?;
    for row in Lines::from(x.shape(), axis).positions() {
        let mean = row.clone().map(|i| y[i].powi(2)).sum::<f64>() / row.clone().count() as f64;
        let factor = 1.0 / (mean + epsilon).sqrt();
        row.for_each(|i| y[i] *= factor);
    }
    scale_and_shift(cx, &mut y)?;
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &y)?])
}

/// With `h = x r`, `r` the inverse root mean square of a row, and `g = dy scale`: dx = r (g - h mean(g h)).
fn rms_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, scale, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let rank = cx.shape(x)?.len();
    let axis = resolve_axis(cx.node.attributes.int("axis", -1)?, rank)?;
    let epsilon = epsilon(&cx.node.attributes)?;
    let rows: Vec<i64> = vec![0; axis].into_iter().chain([-1]).collect();
    let rows = cx.graph.add_constant("shape", Tensor::vector(&rows));
    let x_rows = cx.op("Reshape", &[x, rows])?;
    let factor = inverse_root_mean_square(cx, x_rows, epsilon)?;
    let normal = cx.op("Mul", &[x_rows, factor])?;
    let g = cx.op("Mul", &[dy, scale])?;
    let g = cx.op("Reshape", &[g, rows])?;
    let dx = normalized_gradient(cx, g, normal, factor, false)?;
    let dx = cx.reshape_like(dx, x)?;
    let normal = cx.reshape_like(normal, x)?;
    let dscale = cx.op("Mul", &[dy, normal])?;
    Ok(vec![Some(dx), Some(cx.sum_to(dscale, scale)?)])
}

fn eval_lp(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let axis = first_axis(&cx.view, x.rank())?;
    let p = norm_order(cx.attributes())?;
    let mut y = x.to_f64()?;
    for line in Lines::along(x.shape(), axis).positions() {
        let norm = line.clone().map(|i| y[i].abs().powi(p)).sum::<f64>().powf(1.0 / f64::from(p));
        // A line of zeros has no direction and stays zero.
        if norm != 0.0 {
            line.for_each(|i| y[i] /= norm);
        }
    }
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &y)?])
}

fn norm_order(attributes: &Attributes) -> Result<i32, OpError> {
    match attributes.int("p", 2)? {
        1 => Ok(1),
        2 => Ok(2),
        other => Err(OpError::attribute("p", format!("is {other}, expected 1 or 2"))),
    }
}

/// dx = (dy - d sum(dy y)) / norm, where `d` is the norm's derivative: `y` for p = 2, the sign of x for p = 1.
fn lp_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, cx.grad()?);
    let p = norm_order(&cx.node.attributes)?;
    let axis = cx.node.attributes.int("axis", -1)?;
    let axes = cx.graph.add_constant("axes", Tensor::vector(&[axis]));
    let norm = cx.op_with(if p == 1 { "ReduceL1" } else { "ReduceL2" }, &[x, axes], [("keepdims", 1.into())])?;
    let product = cx.op("Mul", &[dy, y])?;
    let dot = cx.reduce_sum(product, &[axis], true)?;
    let derivative = if p == 1 { cx.op("Sign", &[x])? } else { y };
    let along = cx.op("Mul", &[derivative, dot])?;
    let across = cx.op("Sub", &[dy, along])?;
    Ok(vec![Some(cx.op("Div", &[across, norm])?)])
}

/// `(x - mean) / (standard deviation + 1e-9)` over the attribute `axes`.
fn eval_mean_variance(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let axes = normalized_axes(&cx.view, x.rank())?;
    let kept: Vec<usize> = (0..x.rank()).map(|i| if axes.contains(&i) { 1 } else { x.shape()[i] }).collect();
    let cell: Vec<usize> = broadcast_positions(&kept, x.shape()).collect();
    let cells: usize = kept.iter().product();
    let count = x.len() as f64 / cells as f64;
    let mut values = x.to_f64()?;
    let mut mean = vec![0.0; cells];
    cell.iter().zip(&values).for_each(|(c, v)| mean[*c] += v / count);
    let mut variance = vec![0.0; cells];
    cell.iter().zip(&values).for_each(|(c, v)| variance[*c] += (v - mean[*c]).powi(2) / count);
    for (c, v) in cell.iter().zip(&mut values) {
        *v = (*v - mean[*c]) / (variance[*c].sqrt() + 1e-9);
    }
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &values)?])
}

fn normalized_axes(view: &OpView, rank: usize) -> Result<Vec<usize>, OpError> {
    let axes = view.attributes().ints("axes")?.unwrap_or(&[0, 2, 3]);
    axes.iter().map(|axis| resolve_axis(*axis, rank)).collect()
}

/// An element of a row may go with its scale and bias; the statistics are then those of the rest.
fn row_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let rank = rank_of(cx)?;
    let mut links: Vec<Link> = (0..rank).map(|i| Link::Same(Axis::Input(0, i), Axis::Output(0, i))).collect();
    for index in 1..cx.inputs.len() {
        let Some(shape) = cx.shape(index) else { continue };
        for i in (0..shape.len()).filter(|i| shape[*i] != Dim::Known(1)) {
            links.push(Link::Same(Axis::Input(index, i), Axis::Output(0, rank - shape.len() + i)));
        }
    }
    Ok(links)
}

fn lp_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let rank = rank_of(cx)?;
    let axis = first_axis(&cx.view, rank)?;
    let mut links: Vec<Link> = (0..rank).map(|i| Link::Same(Axis::Input(0, i), Axis::Output(0, i))).collect();
    links.push(Link::Fixed(Axis::Input(0, axis), "every element takes part in the norm"));
    Ok(links)
}

fn mean_variance_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let rank = rank_of(cx)?;
    let mut links: Vec<Link> = (0..rank).map(|i| Link::Same(Axis::Input(0, i), Axis::Output(0, i))).collect();
    for axis in normalized_axes(&cx.view, rank)? {
        links.push(Link::Fixed(Axis::Input(0, axis), "every element takes part in the statistics"));
    }
    Ok(links)
}
