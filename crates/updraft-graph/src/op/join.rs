//! Tensors set end to end along an axis, and taken apart again: Concat and Split.

use crate::dim::{Dim, dims, known_shape};
use crate::graph::ValueId;
use crate::op::index::{around, checked_count, pick};
use crate::op::rearrange::{by_axis, whole};
use crate::op::{Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, OpView, resolve_axis, show_shape};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

const RANK: &str = "the rank must be known";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("Concat", &[4, 11, 13], Arity::range(1, usize::MAX), infer_concat, eval_concat)
        .gradient(concat_gradient)
        .channels(concat_channels),
    Op::onnx("Split", &[2, 11, 13, 18], Arity::range(1, 2).outputs(1, usize::MAX), infer_split, eval_split)
        .gradient(split_gradient)
        .channels(split_channels),
];

fn concat_axis(cx: &OpView, rank: usize) -> Result<usize, OpError> {
    let axis = cx.attributes().optional_int("axis")?.ok_or_else(|| OpError::attribute("axis", "is missing"))?;
    resolve_axis(axis, rank)
}

fn infer_concat(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let mut fact = Fact::default();
    let mut sum = Dim::Known(0);
    let mut all_known = true;
    for index in 0..cx.inputs.len() {
        let x = cx.input(index, "a tensor")?;
        fact.dtype = fact.dtype.or(x.dtype);
        if let (Some(a), Some(b)) = (fact.dtype, x.dtype)
            && a != b
        {
            return Err(OpError::dtype(format!("input {index} is {b}, but the inputs before it are {a}")));
        }
        let Some(shape) = &x.shape else {
            all_known = false;
            continue;
        };
        let axis = concat_axis(cx, shape.len())?;
        sum = sum.plus(&shape[axis]);
        let out = fact.shape.get_or_insert_with(|| shape.clone());
        let clash = out.len() != shape.len()
            || out
                .iter()
                .zip(shape)
                .enumerate()
                .any(|(a, (x, y))| a != axis && matches!((x, y), (Dim::Known(x), Dim::Known(y)) if x != y));
        if clash {
            let shown = (show_shape(out), show_shape(shape));
            return Err(OpError::shape(format!("{} and {} do not join along axis {axis}", shown.0, shown.1)));
        }
        for (have, found) in out.iter_mut().zip(shape) {
            if have.known().is_none() && found.known().is_some() {
                *have = found.clone();
            }
        }
    }
    if let Some(shape) = &mut fact.shape {
        let axis = concat_axis(cx, shape.len())?;
        shape[axis] = if all_known { sum } else { Dim::Unknown };
        if shape.len() == 1 {
            // A part of unknown elements but known length keeps the others in place.
            let part = |x: &Option<crate::op::InputFact>| {
                let x = x.as_ref()?;
                let len = x.shape.as_ref()?.first()?.known()?;
                Some(x.content().unwrap_or_else(|| vec![Dim::Unknown; len]))
            };
            let parts: Option<Vec<_>> = cx.inputs.iter().map(part).collect();
            fact.content = parts.map(|p| p.concat()).filter(|c| c.len() <= 64 && c.iter().any(|d| *d != Dim::Unknown));
        }
    }
    Ok(vec![fact])
}

fn eval_concat(cx: &Eval) -> Evaluated {
    let inputs: Vec<&Tensor> = (0..cx.inputs.len()).map(|i| cx.input(i)).collect::<Result<_, _>>()?;
    Ok(vec![join(&inputs, |rank| concat_axis(cx, rank))?])
}

/// Tensors of one type joined along an axis, all other axes being equal.
pub(super) fn join(inputs: &[&Tensor], axis: impl Fn(usize) -> Result<usize, OpError>) -> Result<Tensor, OpError> {
    let Some(first) = inputs.first() else { return Err(OpError::value("there is nothing to join")) };
    let axis = axis(first.rank())?;
    let fits = |t: &&Tensor| {
        t.rank() == first.rank()
            && t.shape().iter().zip(first.shape()).enumerate().all(|(a, (x, y))| a == axis || x == y)
    };
    if let Some(other) = inputs.iter().find(|t| !fits(t)) {
        return Err(OpError::shape(format!(
            "{:?} and {:?} do not join along axis {axis}",
            first.shape(),
            other.shape()
        )));
    }
    let mut shape = first.shape().to_vec();
    shape[axis] = inputs.iter().map(|t| t.shape()[axis]).sum();
    checked_count(&shape)?;
    let [outer, _, inner] = around(first.shape(), axis);
    let picks = (0..outer).flat_map(|o| {
        inputs.iter().enumerate().flat_map(move |(source, t)| {
            let run = t.shape()[axis] * inner;
            (o * run..(o + 1) * run).map(move |position| (source, position))
        })
    });
    pick(inputs, &shape, picks)
}

/// dy cut where the inputs were joined.
fn concat_gradient(cx: &mut Gradient) -> Grads {
    let dy = cx.grad()?;
    let rank = cx.shape(dy)?.len();
    let axis = concat_axis(&cx.view(), rank)?;
    let count = cx.node.inputs.len();
    if count == 1 {
        return Ok(vec![Some(dy)]);
    }
    let inputs: Vec<ValueId> = (0..count).map(|i| cx.input(i)).collect::<Result<_, _>>()?;
    let known: Option<Vec<i64>> = inputs.iter().map(|v| cx.graph.shape(*v)?[axis].known().map(|n| n as i64)).collect();
    let sizes = match known {
        Some(sizes) => cx.ints(&sizes),
        None => {
            let (start, end) = (axis as i64, axis as i64 + 1);
            let size = |v| cx.op_with("Shape", &[v], [("start", start.into()), ("end", end.into())]);
            let sizes: Vec<ValueId> = inputs.into_iter().map(size).collect::<Result<_, _>>()?;
            cx.op_with("Concat", &sizes, [("axis", 0.into())])?
        }
    };
    let attributes = [("axis", (axis as i64).into())];
    let parts = cx.graph.op_n("", "Split", &[Some(dy), Some(sizes)], attributes, count)?;
    Ok(parts.into_iter().map(Some).collect())
}

fn concat_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let mut links = Vec::new();
    let rank = cx.shape(0).ok_or_else(|| OpError::shape(RANK))?.len();
    let joined = concat_axis(cx, rank)?;
    let mut offset = Some(0);
    for input in 0..cx.inputs.len() {
        for axis in (0..rank).filter(|axis| *axis != joined) {
            links.push(Link::Same(Axis::Input(input, axis), Axis::Output(0, axis)));
        }
        let (part, whole) = (Axis::Input(input, joined), Axis::Output(0, joined));
        let len = cx.shape(input).and_then(|s| s.get(joined)?.known());
        match (offset, len) {
            (Some(at), Some(len)) => links.push(Link::Offset { part, whole, offset: at, len }),
            _ => links.push(Link::Fixed(part, "its place in the joined axis is not known")),
        }
        offset = offset.zip(len).map(|(at, len)| at + len);
    }
    Ok(links)
}

/// The axis and the sizes of the parts: given (attribute or input), or equal with a smaller last one.
fn parts(cx: &OpView, given: Option<&[i64]>, shape: &[Dim]) -> Result<(usize, Vec<Dim>), OpError> {
    let axis = resolve_axis(cx.attributes().int("axis", 0)?, shape.len())?;
    let count = cx.output_count();
    if let Some(sizes) = given {
        let fits: Option<Vec<usize>> = sizes.iter().map(|n| usize::try_from(*n).ok()).collect();
        let fits = fits.filter(|s| s.len() == count);
        let fits = fits.filter(|s| shape[axis].known().is_none_or(|n| n == s.iter().sum::<usize>()));
        return match fits {
            Some(sizes) => Ok((axis, dims(&sizes))),
            None => Err(OpError::value(format!(
                "parts {sizes:?} for {count} outputs do not make up axis {axis} of {}",
                show_shape(shape)
            ))),
        };
    }
    let wanted = cx.attributes().int("num_outputs", count as i64)?;
    if wanted != count as i64 || count == 0 {
        return Err(OpError::attribute("num_outputs", format!("is {wanted} for {count} outputs")));
    }
    let part = shape[axis].divide_ceil(count as i64);
    let sizes = match (shape[axis].known(), part.known()) {
        (Some(size), Some(part)) => (0..count).map(|i| Dim::Known(part.min(size.saturating_sub(i * part)))).collect(),
        _ => match shape[axis].divide_exact(&Dim::Known(count)) {
            Some(part) => vec![part; count],
            None => vec![Dim::Unknown; count],
        },
    };
    Ok((axis, sizes))
}

/// The sizes of Split's parts where the node says them: `None` inside where they are computed at run time.
fn given_parts(cx: &Infer) -> Result<Option<Option<Vec<i64>>>, OpError> {
    match cx.optional(1) {
        Some(input) => Ok(input.constant_ints()?.map(Some)),
        None => Ok(Some(cx.attributes().ints("split")?.map(<[i64]>::to_vec))),
    }
}

fn infer_split(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let count = cx.output_count();
    let Some(shape) = &x.shape else { return Ok(vec![Fact::of_dtype(x.dtype); count]) };
    let (axis, sizes) = match given_parts(cx)? {
        Some(given) => parts(cx, given.as_deref(), shape)?,
        None => (resolve_axis(cx.attributes().int("axis", 0)?, shape.len())?, vec![Dim::Unknown; count]),
    };
    let mut content = x.content().filter(|_| shape.len() == 1);
    let fact = |size: Dim| {
        let mut shape = shape.clone();
        shape[axis] = size.clone();
        let part = match (&mut content, size.known()) {
            (Some(rest), Some(n)) if n <= rest.len() => Some(rest.drain(..n).collect()),
            _ => None,
        };
        Fact::tensor(x.dtype, shape).with_content(part)
    };
    Ok(sizes.into_iter().map(fact).collect())
}

fn eval_split(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let given = match cx.optional(1) {
        Some(t) => Some(t.to_i64()?),
        None => cx.attributes().ints("split")?.map(<[i64]>::to_vec),
    };
    let (axis, sizes) = parts(cx, given.as_deref(), &dims(x.shape()))?;
    let sizes = known_shape(&sizes).ok_or_else(|| OpError::shape("the parts have no known sizes"))?;
    let mut start = 0;
    let mut out = Vec::with_capacity(sizes.len());
    for size in sizes {
        let mut choices: Vec<_> = x.shape().iter().map(|n| whole(*n)).collect();
        choices[axis] = (start..start + size).map(Some).collect();
        out.push(by_axis(x, &choices, None)?);
        start += size;
    }
    Ok(out)
}

/// The parts' gradients joined; a part that the loss does not depend on has zeros.
fn split_gradient(cx: &mut Gradient) -> Grads {
    let x = cx.input(0)?;
    let axis = resolve_axis(cx.node.attributes.int("axis", 0)?, cx.shape(x)?.len())? as i64;
    let mut joined = Vec::new();
    for index in 0..cx.node.outputs.len() {
        joined.push(match cx.grads.get(index).copied().flatten() {
            Some(dy) => dy,
            None => {
                let part = cx.output(index)?;
                let zero = cx.scalar_like(0.0, x)?;
                let shape = cx.op("Shape", &[part])?;
                cx.op("Expand", &[zero, shape])?
            }
        });
    }
    let dx = cx.op_with("Concat", &joined, [("axis", axis.into())])?;
    Ok(std::iter::once(Some(dx)).chain(vec![None; cx.node.inputs.len() - 1]).collect())
}

fn split_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let shape = cx.shape(0).ok_or_else(|| OpError::shape(RANK))?;
    let given = given_parts(cx)?.ok_or_else(|| OpError::shape("the parts must be constant"))?;
    let (split, sizes) = parts(cx, given.as_deref(), shape)?;
    let mut links = Vec::new();
    let mut offset = 0;
    for (output, size) in sizes.iter().enumerate() {
        for axis in (0..shape.len()).filter(|axis| *axis != split) {
            links.push(Link::Same(Axis::Input(0, axis), Axis::Output(output, axis)));
        }
        let len = size.known().ok_or_else(|| OpError::shape("the sizes of the parts must be known"))?;
        let (part, whole) = (Axis::Output(output, split), Axis::Input(0, split));
        links.push(Link::Offset { part, whole, offset, len });
        offset += len;
    }
    Ok(links)
}
