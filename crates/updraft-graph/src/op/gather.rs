//! Elements chosen by index tensors, and elements put where index tensors say.
//!
//! Indices may count from the end. Where several updates meet in one place without a reduction, the last one in
//! row-major order stays; sums are taken in that order.

use crate::dim::Dim;
use crate::graph::ValueId;
use crate::op::elementwise::{larger, smaller};
use crate::op::index::{around, checked_count, coordinates, pick, ravel, take};
use crate::op::rearrange::infer_like_input;
use crate::op::{
    Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, OpView, Shapes, resolve_axis, show_shape,
};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

const PLACES: &str = "indices name places along several axes";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("Gather", &[1, 11, 13], Arity::exact(2), infer_gather, eval_gather)
        .gradient(gather_gradient)
        .channels(gather_channels),
    Op::onnx("GatherGradient", &[1], Arity::exact(3), infer_gather_gradient, eval_gather_gradient)
        .own()
        .flops(scatter_flops)
        .no_gradient("second-order derivatives are not implemented")
        .no_channels("it occurs in training graphs only, which are not pruned"),
    Op::onnx("GatherElements", &[11, 13], Arity::exact(2), infer_gather_elements, eval_gather_elements)
        .gradient(gather_elements_gradient)
        .no_channels(PLACES),
    Op::onnx("GatherND", &[11, 12, 13], Arity::exact(2), infer_gather_nd, eval_gather_nd)
        .gradient(gather_nd_gradient)
        .no_channels(PLACES),
    scatter("Scatter", &[9, 11], eval_scatter_elements).gradient(scatter_elements_gradient),
    scatter("ScatterElements", &[11, 13, 16, 18], eval_scatter_elements).gradient(scatter_elements_gradient),
    scatter("ScatterND", &[11, 13, 16, 18], eval_scatter_nd).gradient(scatter_nd_gradient),
];

const fn scatter(name: &'static str, versions: &'static [u32], eval: fn(&Eval) -> Evaluated) -> Op {
    Op::onnx(name, versions, Arity::exact(3), infer_like_input, eval).flops(scatter_flops).no_channels(PLACES)
}

fn scatter_flops(shapes: &Shapes) -> u64 {
    shapes.input_len(0)
}

/// Indices into an axis of `size`, negative ones counted from the end.
pub(super) fn resolve_indices(indices: &Tensor, size: usize) -> Result<Vec<usize>, OpError> {
    indices.to_i64()?.into_iter().map(|i| resolve_index(i, size)).collect()
}

fn resolve_index(index: i64, size: usize) -> Result<usize, OpError> {
    let from_front = if index < 0 { index.checked_add(size as i64) } else { Some(index) };
    from_front
        .and_then(|i| usize::try_from(i).ok())
        .filter(|i| *i < size)
        .ok_or_else(|| OpError::value(format!("index {index} is outside an axis of size {size}")))
}

fn axis_of(cx: &OpView, rank: usize) -> Result<usize, OpError> {
    resolve_axis(cx.attributes().int("axis", 0)?, rank)
}

/// Inputs: data, indices. The indexed axis gives way to the axes of the indices.
fn infer_gather(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (data, indices) = (cx.input(0, "data")?, cx.input(1, "indices")?);
    let (Some(from), Some(at)) = (&data.shape, &indices.shape) else { return Ok(vec![Fact::of_dtype(data.dtype)]) };
    let axis = axis_of(cx, from.len())?;
    let shape = [&from[..axis], at, &from[axis + 1..]].concat();
    let content = match (data.content(), indices.constant_ints()?) {
        (Some(sizes), Some(indices)) if from.len() == 1 => indices
            .into_iter()
            .map(|i| resolve_index(i, sizes.len()).map(|i| sizes[i].clone()))
            .collect::<Result<Vec<_>, _>>()
            .map(Some)?,
        _ => None,
    };
    Ok(vec![Fact::tensor(data.dtype, shape).with_content(content)])
}

fn eval_gather(cx: &Eval) -> Evaluated {
    let (data, indices) = (cx.input(0)?, cx.input(1)?);
    let axis = axis_of(cx, data.rank())?;
    let [outer, along, inner] = around(data.shape(), axis);
    let places = resolve_indices(indices, along)?;
    let shape = [&data.shape()[..axis], indices.shape(), &data.shape()[axis + 1..]].concat();
    checked_count(&shape)?;
    let places = &places;
    let positions =
        (0..outer).flat_map(|o| places.iter().flat_map(move |i| (0..inner).map(move |r| (o * along + i) * inner + r)));
    Ok(vec![take(data, &shape, positions)?])
}

fn gather_gradient(cx: &mut Gradient) -> Grads {
    let (data, indices, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let shape = cx.op("Shape", &[data])?;
    let attributes = cx.node.attributes.clone();
    Ok(vec![Some(cx.graph.own_op("GatherGradient", &[dy, indices, shape], attributes)?), None])
}

fn gather_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let (Some(data), Some(indices)) = (cx.shape(0), cx.shape(1)) else {
        return Err(OpError::shape("the ranks of data and indices must be known"));
    };
    let axis = axis_of(cx, data.len())?;
    let mut links = vec![Link::Fixed(Axis::Input(0, axis), "indices count along it")];
    for a in (0..data.len()).filter(|a| *a != axis) {
        let out = if a < axis { a } else { a + indices.len() - 1 };
        links.push(Link::Same(Axis::Input(0, a), Axis::Output(0, out)));
    }
    links.extend((0..indices.len()).map(|a| Link::Same(Axis::Input(1, a), Axis::Output(0, axis + a))));
    Ok(links)
}

/// Inputs: gradient of Gather's output, indices, shape of the data.
fn infer_gather_gradient(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let shape = match (cx.input(2, "a shape")?.content(), cx.shape(0), cx.shape(1)) {
        (Some(shape), ..) => Some(shape),
        (None, Some(dy), Some(indices)) => Some(vec![Dim::Unknown; (dy.len() + 1).saturating_sub(indices.len())]),
        _ => None,
    };
    Ok(vec![Fact { dtype: cx.dtype(0), shape, content: None }])
}

/// Gradients of elements that were taken several times add up, in the order of the indices.
fn eval_gather_gradient(cx: &Eval) -> Evaluated {
    let (dy, indices) = (cx.input(0)?, cx.input(1)?);
    let shape = cx.output_shape(infer_gather_gradient)?;
    let axis = axis_of(cx, shape.len())?;
    let [outer, along, inner] = around(&shape, axis);
    let places = resolve_indices(indices, along)?;
    if dy.len() != outer * places.len() * inner {
        return Err(OpError::shape(format!("a gradient of shape {:?} for {} indices", dy.shape(), places.len())));
    }
    let places = &places;
    let targets =
        (0..outer).flat_map(|o| places.iter().flat_map(move |i| (0..inner).map(move |r| (o * along + i) * inner + r)));
    Ok(vec![put(&Tensor::zeros(dy.dtype(), &shape)?, dy, &targets.collect::<Vec<_>>(), "add")?])
}

fn infer_gather_elements(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (data, indices) = (cx.input(0, "data")?, cx.input(1, "indices")?);
    if let (Some(a), Some(b)) = (data.rank(), indices.rank())
        && a != b
    {
        return Err(OpError::shape(format!("data of rank {a} and indices of rank {b} must have one rank")));
    }
    Ok(vec![Fact { dtype: data.dtype, shape: indices.shape.clone(), content: None }])
}

/// For each element of `indices`, the position in data of `shape` with the indexed axis replaced by the index.
fn element_positions(cx: &OpView, shape: &[usize], indices: &Tensor) -> Result<Vec<usize>, OpError> {
    let axis = axis_of(cx, shape.len())?;
    let fits = |(a, (have, at)): (usize, (&usize, &usize))| a == axis || at <= have;
    if indices.rank() != shape.len() || !shape.iter().zip(indices.shape()).enumerate().all(fits) {
        return Err(OpError::shape(format!("indices of shape {:?} for data of shape {shape:?}", indices.shape())));
    }
    let places = resolve_indices(indices, shape[axis])?;
    let position = |(mut index, place): (Vec<usize>, usize)| {
        index[axis] = place;
        ravel(&index, shape)
    };
    Ok(coordinates(indices.shape()).zip(places).map(position).collect())
}

fn eval_gather_elements(cx: &Eval) -> Evaluated {
    let (data, indices) = (cx.input(0)?, cx.input(1)?);
    let positions = element_positions(cx, data.shape(), indices)?;
    Ok(vec![take(data, indices.shape(), positions.into_iter())?])
}

/// Zeros shaped like a value.
fn zeros_like(cx: &mut Gradient, value: ValueId) -> Result<ValueId, OpError> {
    let zero = cx.scalar_like(0.0, value)?;
    let shape = cx.op("Shape", &[value])?;
    cx.op("Expand", &[zero, shape])
}

fn gather_elements_gradient(cx: &mut Gradient) -> Grads {
    let (data, indices, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let zeros = zeros_like(cx, data)?;
    let mut attributes = cx.node.attributes.clone();
    attributes.set("reduction", "add");
    Ok(vec![Some(cx.op_with("ScatterElements", &[zeros, indices, dy], attributes)?), None])
}

/// Inputs: data, indices whose last axis holds the leading indices of a place.
fn infer_gather_nd(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (data, indices) = (cx.input(0, "data")?, cx.input(1, "indices")?);
    let batch = batch_dims(cx)?;
    let shape = match (&data.shape, &indices.shape) {
        (Some(data), Some(indices)) => match indices.split_last() {
            Some((depth, lead)) => match depth.known() {
                Some(depth) if batch + depth <= data.len() => Some([lead, &data[batch + depth..]].concat()),
                Some(depth) => {
                    return Err(OpError::shape(format!("{depth} indices a place into {}", show_shape(data))));
                }
                None => None,
            },
            None => return Err(OpError::shape("indices must have an axis")),
        },
        _ => None,
    };
    Ok(vec![Fact { dtype: data.dtype, shape, content: None }])
}

fn batch_dims(cx: &OpView) -> Result<usize, OpError> {
    let given = cx.attributes().int("batch_dims", 0)?;
    usize::try_from(given).map_err(|_| OpError::attribute("batch_dims", format!("is {given}")))
}

/// The first position of each run that `indices` name in data of `shape`, and the length of a run.
fn runs(shape: &[usize], indices: &Tensor, batch: usize) -> Result<(Vec<usize>, usize), OpError> {
    let refuse = || OpError::shape(format!("indices of shape {:?} for data of shape {shape:?}", indices.shape()));
    let (depth, lead) = indices.shape().split_last().ok_or_else(refuse)?;
    let batches: usize = shape.get(..batch).ok_or_else(refuse)?.iter().product();
    if lead.len() < batch || lead[..batch] != shape[..batch] || batch + depth > shape.len() {
        return Err(refuse());
    }
    let run: usize = shape[batch + depth..].iter().product();
    let area: usize = shape[batch..].iter().product();
    let count: usize = lead.iter().product();
    let each_batch = count / batches.max(1);
    let values = indices.to_i64()?;
    let mut starts = Vec::with_capacity(count);
    for place in 0..count {
        let named = &values[place * depth..(place + 1) * depth];
        let mut position = 0;
        for (index, size) in named.iter().zip(&shape[batch..]) {
            position = position * size + resolve_index(*index, *size)?;
        }
        starts.push((place / each_batch.max(1)) * area + position * run);
    }
    Ok((starts, run))
}

fn eval_gather_nd(cx: &Eval) -> Evaluated {
    let (data, indices) = (cx.input(0)?, cx.input(1)?);
    let shape = cx.output_shape(infer_gather_nd)?;
    let (starts, run) = runs(data.shape(), indices, batch_dims(cx)?)?;
    Ok(vec![take(data, &shape, starts.into_iter().flat_map(|s| s..s + run))?])
}

fn gather_nd_gradient(cx: &mut Gradient) -> Grads {
    let (data, indices, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    if batch_dims(&cx.view())? != 0 {
        return Err(OpError::unsupported("gradient of GatherND with batch_dims"));
    }
    let zeros = zeros_like(cx, data)?;
    Ok(vec![Some(cx.op_with("ScatterND", &[zeros, indices, dy], [("reduction", "add".into())])?), None])
}

fn reduction<'a>(cx: &OpView<'a>) -> Result<&'a str, OpError> {
    cx.attributes().string("reduction", "none")
}

/// Data with each update put, or combined, at its target.
fn put(data: &Tensor, updates: &Tensor, targets: &[usize], reduction: &str) -> Result<Tensor, OpError> {
    fn combine<T: Copy>(mut values: Vec<T>, updates: &[T], targets: &[usize], step: fn(T, T) -> T) -> Vec<T> {
        for (target, update) in targets.iter().zip(updates) {
            values[*target] = step(values[*target], *update);
        }
        values
    }
    if updates.len() != targets.len() {
        return Err(OpError::shape(format!("{} updates for {} places", updates.len(), targets.len())));
    }
    if data.dtype() != updates.dtype() {
        return Err(OpError::dtype(format!("data is {}, updates are {}", data.dtype(), updates.dtype())));
    }
    if reduction == "none" {
        let mut sources: Vec<(usize, usize)> = (0..data.len()).map(|position| (0, position)).collect();
        for (update, target) in targets.iter().enumerate() {
            sources[*target] = (1, update);
        }
        return pick(&[data, updates], data.shape(), sources.into_iter());
    }
    type Steps = (fn(f64, f64) -> f64, fn(i128, i128) -> i128);
    let (floats, integers): Steps = match reduction {
        "add" => (|a, b| a + b, i128::wrapping_add),
        "mul" => (|a, b| a * b, i128::wrapping_mul),
        "max" => (larger, i128::max),
        "min" => (smaller, i128::min),
        other => {
            return Err(OpError::attribute(
                "reduction",
                format!("must be none, add, mul, max or min, found {other:?}"),
            ));
        }
    };
    if data.dtype().is_float() {
        let values = combine(data.to_f64()?, &updates.to_f64()?, targets, floats);
        return Ok(Tensor::from_f64(data.dtype(), data.shape(), &values)?);
    }
    let values = combine(data.to_i128()?, &updates.to_i128()?, targets, integers);
    Ok(Tensor::from_i128(data.dtype(), data.shape(), &values)?)
}

/// Inputs: data, indices, updates of the indices' shape.
fn eval_scatter_elements(cx: &Eval) -> Evaluated {
    let (data, indices, updates) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    if indices.shape() != updates.shape() {
        return Err(OpError::shape(format!("indices {:?} and updates {:?}", indices.shape(), updates.shape())));
    }
    let targets = element_positions(cx, data.shape(), indices)?;
    Ok(vec![put(data, updates, &targets, reduction(cx)?)?])
}

/// Gradients of data and updates where each place is written at most once, or all updates are added.
fn scattered(cx: &mut Gradient, scatter: &str, gather: &str) -> Grads {
    let (indices, updates, dy) = (cx.input(1)?, cx.input(2)?, cx.grad()?);
    let mut attributes = cx.node.attributes.clone();
    attributes.remove("reduction");
    let data = match reduction(&cx.view())? {
        "add" => Some(dy),
        "none" if cx.wants(0) => {
            let zeros = zeros_like(cx, updates)?;
            Some(cx.op_with(scatter, &[dy, indices, zeros], attributes.clone())?)
        }
        "none" => None,
        other => return Err(OpError::unsupported(format!("gradient of {scatter} with reduction {other:?}"))),
    };
    let updates = if cx.wants(2) { Some(cx.op_with(gather, &[dy, indices], attributes)?) } else { None };
    Ok(vec![data, None, updates])
}

fn scatter_elements_gradient(cx: &mut Gradient) -> Grads {
    scattered(cx, "ScatterElements", "GatherElements")
}

fn scatter_nd_gradient(cx: &mut Gradient) -> Grads {
    scattered(cx, "ScatterND", "GatherND")
}

fn eval_scatter_nd(cx: &Eval) -> Evaluated {
    let (data, indices, updates) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let (starts, run) = runs(data.shape(), indices, 0)?;
    let targets: Vec<usize> = starts.into_iter().flat_map(|s| s..s + run).collect();
    Ok(vec![put(data, updates, &targets, reduction(cx)?)?])
}
