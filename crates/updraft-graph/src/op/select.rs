//! Selection by content: the largest, the distinct, the non-zero, the marked; and the reverse, marks from indices.

use std::cmp::Ordering;

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::ValueId;
use crate::op::index::{around, coordinates, pick, take, unravel};
use crate::op::rearrange::{by_axis, whole};
use crate::op::{Arity, Eval, Fact, Gradient, Infer, Op, OpError, OpView, one_flop_per_output, resolve_axis};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

const BY_CONTENT: &str = "what is selected depends on the content";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("TopK", &[1, 10, 11, 24], Arity::range(1, 2).outputs(2, 2), infer_top_k, eval_top_k)
        .flops(one_flop_per_output)
        .gradient(top_k_gradient)
        .no_channels(BY_CONTENT),
    Op::onnx("Unique", &[11, 28], Arity::exact(1).outputs(1, 4), infer_unique, eval_unique)
        .no_gradient("not implemented: it does not occur in training")
        .no_channels(BY_CONTENT),
    Op::onnx("NonZero", &[9, 13], Arity::exact(1), infer_non_zero, eval_non_zero)
        .no_gradient("integer result")
        .no_channels(BY_CONTENT),
    Op::onnx("Compress", &[9, 11, 28], Arity::exact(2), infer_compress, eval_compress)
        .no_gradient("not implemented: it does not occur in training")
        .no_channels(BY_CONTENT),
    Op::onnx("OneHot", &[9, 11, 28], Arity::exact(3), infer_one_hot, eval_one_hot)
        .no_gradient("integer input")
        .no_channels("the new axis counts classes"),
];

/// The rank of each element among the distinct ones, ascending; not-a-number is the largest.
fn ranks(t: &Tensor) -> Result<Vec<usize>, OpError> {
    fn rank_by(len: usize, compare: impl Fn(usize, usize) -> Ordering) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        order.sort_by(|a, b| compare(*a, *b));
        let mut ranks = vec![0; len];
        let mut rank = 0;
        for (i, at) in order.iter().enumerate() {
            if i > 0 && compare(order[i - 1], *at) != Ordering::Equal {
                rank += 1;
            }
            ranks[*at] = rank;
        }
        ranks
    }
    if let Ok(strings) = t.strings() {
        return Ok(rank_by(t.len(), |a, b| strings[a].cmp(&strings[b])));
    }
    if t.dtype().is_float() {
        let values = t.to_f64()?;
        let order = |a: f64, b: f64| a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()));
        return Ok(rank_by(t.len(), |a, b| order(values[a], values[b])));
    }
    let values = t.to_i128()?;
    Ok(rank_by(t.len(), |a, b| values[a].cmp(&values[b])))
}

/// How many elements TopK takes: an input, or an attribute in version 1. `None` where computed at run time.
fn wanted(cx: &Infer) -> Result<Option<Dim>, OpError> {
    if let Some(k) = cx.optional(1) {
        return Ok(k.content().and_then(|c| c.first().cloned()));
    }
    let k = cx.attributes().optional_int("k")?.ok_or_else(|| OpError::attribute("k", "is missing"))?;
    Ok(usize::try_from(k).ok().map(Dim::Known))
}

fn infer_top_k(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let shape = match &x.shape {
        Some(shape) => {
            let axis = resolve_axis(cx.attributes().int("axis", -1)?, shape.len())?;
            let k = wanted(cx)?.unwrap_or(Dim::Unknown);
            if let (Some(k), Some(size)) = (k.known(), shape[axis].known())
                && k > size
            {
                return Err(OpError::value(format!("the top {k} of {size} elements along axis {axis}")));
            }
            let mut shape = shape.clone();
            shape[axis] = k;
            Some(shape)
        }
        None => None,
    };
    let fact = |dtype| Fact { dtype, shape: shape.clone(), content: None };
    Ok(vec![fact(x.dtype), fact(Some(DType::I64))])
}

/// Of equal elements the one with the lower index comes first.
fn eval_top_k(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let shape = cx.output_shape(infer_top_k)?;
    let axis = resolve_axis(cx.attributes().int("axis", -1)?, x.rank())?;
    let largest = cx.attributes().flag("largest", true)?;
    let ranks = ranks(x)?;
    let ([outer, along, inner], k) = (around(x.shape(), axis), shape[axis]);
    let mut positions = vec![0; outer * k * inner];
    let mut indices = vec![0i64; outer * k * inner];
    for (o, i) in (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i))) {
        let at = |index: usize| (o * along + index) * inner + i;
        let mut order: Vec<usize> = (0..along).collect();
        // The sort is stable, so equal elements stay in the order of their indices.
        order.sort_by(|a, b| {
            let ascending = ranks[at(*a)].cmp(&ranks[at(*b)]);
            if largest { ascending.reverse() } else { ascending }
        });
        for (place, index) in order.into_iter().take(k).enumerate() {
            let to = (o * k + place) * inner + i;
            positions[to] = at(index);
            indices[to] = index as i64;
        }
    }
    Ok(vec![take(x, &shape, positions.into_iter())?, Tensor::new(&shape, &indices)?])
}

/// The gradient of each element taken goes back to its place.
fn top_k_gradient(cx: &mut Gradient) -> Grads {
    let (x, indices, dy) = (cx.input(0)?, cx.output(1)?, cx.grad()?);
    let axis = cx.node.attributes.int("axis", -1)?;
    let zero = cx.scalar_like(0.0, x)?;
    let shape = cx.op("Shape", &[x])?;
    let zeros = cx.op("Expand", &[zero, shape])?;
    let dx = cx.op_with("ScatterElements", &[zeros, indices, dy], [("axis", axis.into())])?;
    Ok(std::iter::once(Some(dx)).chain(vec![None; cx.node.inputs.len() - 1]).collect())
}

fn infer_unique(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let shape = match (cx.attributes().optional_int("axis")?, &x.shape) {
        (None, _) => Some(vec![Dim::Unknown]),
        (Some(axis), Some(shape)) => {
            let mut shape = shape.clone();
            let axis = resolve_axis(axis, shape.len())?;
            shape[axis] = Dim::Unknown;
            Some(shape)
        }
        (Some(_), None) => None,
    };
    let numbers = Fact::tensor(Some(DType::I64), vec![Dim::Unknown]);
    Ok(vec![Fact { dtype: x.dtype, shape, content: None }, numbers.clone(), numbers.clone(), numbers])
}

/// Outputs: the distinct elements (or subtensors along an axis), where each first occurs, which of them each one is,
/// and how often each occurs.
fn eval_unique(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let axis = cx.attributes().optional_int("axis")?.map(|a| resolve_axis(a, x.rank())).transpose()?;
    let flat = x.reshaped(&[x.len()])?;
    let (x, axis) = axis.map_or((&flat, 0), |axis| (x, axis));
    let ranks = ranks(x)?;
    let [outer, along, inner] = around(x.shape(), axis);
    let key = |index: usize| -> Vec<usize> {
        (0..outer).flat_map(|o| (0..inner).map(move |i| (o * along + index) * inner + i)).map(|at| ranks[at]).collect()
    };
    let keys: Vec<Vec<usize>> = (0..along).map(key).collect();
    let mut order: Vec<usize> = (0..along).collect();
    order.sort_by(|a, b| keys[*a].cmp(&keys[*b]));
    // Groups of equal subtensors, each in order of occurrence, since the sort is stable.
    let mut groups: Vec<Vec<usize>> = order.chunk_by(|a, b| keys[*a] == keys[*b]).map(<[usize]>::to_vec).collect();
    if !cx.attributes().flag("sorted", true)? {
        groups.sort_by_key(|group| group[0]);
    }
    let mut inverse = vec![0i64; along];
    for (number, group) in groups.iter().enumerate() {
        group.iter().for_each(|index| inverse[*index] = number as i64);
    }
    let mut choices: Vec<_> = x.shape().iter().map(|n| whole(*n)).collect();
    choices[axis] = groups.iter().map(|group| Some(group[0])).collect();
    let first: Vec<i64> = groups.iter().map(|group| group[0] as i64).collect();
    let counts: Vec<i64> = groups.iter().map(|group| group.len() as i64).collect();
    Ok(vec![by_axis(x, &choices, None)?, Tensor::vector(&first), Tensor::vector(&inverse), Tensor::vector(&counts)])
}

fn infer_non_zero(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let rank = cx.input(0, "a tensor")?.rank().map_or(Dim::Unknown, Dim::Known);
    Ok(vec![Fact::tensor(Some(DType::I64), vec![rank, Dim::Unknown])])
}

/// One column for each element that is not zero, holding its index.
fn eval_non_zero(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let set: Vec<bool> = match x.dtype().is_float() {
        true => x.to_f64()?.into_iter().map(|v| v != 0.0).collect(),
        false => x.to_i128()?.into_iter().map(|v| v != 0).collect(),
    };
    let found: Vec<Vec<usize>> =
        set.iter().enumerate().filter(|(_, s)| **s).map(|(p, _)| unravel(p, x.shape())).collect();
    let rows: Vec<i64> = (0..x.rank()).flat_map(|axis| found.iter().map(move |index| index[axis] as i64)).collect();
    Ok(vec![Tensor::new(&[x.rank(), found.len()], &rows)?])
}

fn infer_compress(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let shape = match (cx.attributes().optional_int("axis")?, &x.shape) {
        (None, _) => Some(vec![Dim::Unknown]),
        (Some(axis), Some(shape)) => {
            let mut shape = shape.clone();
            let axis = resolve_axis(axis, shape.len())?;
            shape[axis] = Dim::Unknown;
            Some(shape)
        }
        (Some(_), None) => None,
    };
    Ok(vec![Fact { dtype: x.dtype, shape, content: None }])
}

/// Inputs: x, a mark for each index along the axis (or each element); what has no mark is dropped.
fn eval_compress(cx: &Eval) -> Evaluated {
    let (x, marks) = (cx.input(0)?, cx.input(1)?.to_bools()?);
    let flat = x.reshaped(&[x.len()])?;
    let (x, axis) = match cx.attributes().optional_int("axis")? {
        Some(axis) => (x, resolve_axis(axis, x.rank())?),
        None => (&flat, 0),
    };
    if marks.len() > x.shape()[axis] {
        return Err(OpError::shape(format!("{} marks for {} indices", marks.len(), x.shape()[axis])));
    }
    let mut choices: Vec<_> = x.shape().iter().map(|n| whole(*n)).collect();
    choices[axis] = marks.iter().enumerate().filter(|(_, mark)| **mark).map(|(i, _)| Some(i)).collect();
    Ok(vec![by_axis(x, &choices, None)?])
}

/// The place of the new axis among those of the indices.
fn class_axis(cx: &OpView, rank: usize) -> Result<usize, OpError> {
    resolve_axis(cx.attributes().int("axis", -1)?, rank + 1)
}

fn infer_one_hot(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (indices, depth, values) = (cx.input(0, "indices")?, cx.input(1, "the depth")?, cx.input(2, "off and on")?);
    let Some(shape) = &indices.shape else { return Ok(vec![Fact::of_dtype(values.dtype)]) };
    let axis = class_axis(cx, shape.len())?;
    let depth = match depth.constant {
        Some(t) => t.to_f64()?.first().and_then(|v| usize::try_from(*v as i64).ok()).map(Dim::Known),
        None => depth.content().and_then(|c| c.first().cloned()),
    };
    let mut shape = shape.clone();
    shape.insert(axis, depth.unwrap_or(Dim::Unknown));
    Ok(vec![Fact::tensor(values.dtype, shape)])
}

/// An index outside the classes marks none.
fn eval_one_hot(cx: &Eval) -> Evaluated {
    let (indices, values) = (cx.input(0)?, cx.input(2)?);
    let shape = cx.output_shape(infer_one_hot)?;
    let axis = class_axis(cx, indices.rank())?;
    if values.len() != 2 {
        return Err(OpError::shape(format!("expected an off and an on value, found {} values", values.len())));
    }
    let depth = shape[axis] as i64;
    let class: Vec<i64> = indices.cast(DType::I64)?.to_i64()?;
    let class: Vec<i64> = class.into_iter().map(|c| if c < 0 { c.saturating_add(depth) } else { c }).collect();
    let picks = coordinates(&shape).map(|mut index| {
        let at = index.remove(axis);
        let is_on = class[crate::op::index::ravel(&index, indices.shape())] == at as i64;
        (0, usize::from(is_on))
    });
    Ok(vec![pick(&[values], &shape, picks)?])
}
