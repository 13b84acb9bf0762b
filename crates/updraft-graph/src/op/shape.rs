//! Shapes as data, other shapes over the same elements, and tensors made from a shape.
//!
//! These carry symbolic sizes through a graph: the elements of `Shape`'s output are the sizes of its input, and what
//! `Reshape` reads may be sizes computed from those.

use crate::attribute::Attribute;
use crate::dim::{Dim, dims, known_shape};
use crate::dtype::DType;
use crate::graph::ValueId;
use crate::op::cast::dtype_of;
use crate::op::index::checked_count;
use crate::op::{
    Arity, Axis, Eval, Fact, Gradient, Infer, InputFact, Link, Op, OpError, OpView, one_flop_per_output, resolve_axis,
    show_shape,
};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

const SIZES: &str = "the result depends on the shape only";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("Shape", &[1, 13, 15, 19, 21, 23, 24, 25], Arity::exact(1), infer_shape, eval_shape)
        .no_gradient(SIZES)
        .channels(size_links),
    Op::onnx("Size", &[1, 13, 19, 21, 23, 24, 25], Arity::exact(1), infer_size, eval_size)
        .no_gradient(SIZES)
        .channels(size_links),
    view("Reshape", &[5, 13, 14, 19, 21, 23, 24, 25], Arity::exact(2), infer_reshape),
    view("Flatten", &[1, 9, 11, 13, 21, 23, 24, 25], Arity::exact(1), infer_flatten),
    view("Squeeze", &[1, 11, 13, 21, 23, 24, 25], Arity::range(1, 2), infer_squeeze),
    view("Unsqueeze", &[1, 11, 13, 21, 23, 24, 25], Arity::range(1, 2), infer_unsqueeze),
    view("Identity", &[1, 13, 14, 16, 19, 21, 23, 24, 25], Arity::exact(1), infer_identity),
    Op::onnx("Constant", &[1, 9, 11, 12, 13, 19, 21, 23, 24, 25], Arity::exact(0), infer_constant, eval_constant)
        .no_gradient("it has no inputs")
        .no_channels("it has no inputs"),
    Op::onnx(
        "ConstantOfShape",
        &[9, 20, 21, 23, 24, 25],
        Arity::exact(1),
        infer_constant_of_shape,
        eval_constant_of_shape,
    )
    .no_gradient(SIZES)
    .no_channels("the input is a shape"),
    Op::onnx("Range", &[11, 27], Arity::exact(3), infer_range, eval_range)
        .flops(one_flop_per_output)
        .no_gradient("not implemented: bounds of a range are not trained")
        .no_channels("the inputs are bounds"),
    Op::onnx("EyeLike", &[9, 22], Arity::exact(1), infer_eye_like, eval_eye_like).no_gradient(SIZES).no_channels(SIZES),
];

/// An operator whose output has the elements of its first input in the same order.
const fn view(
    name: &'static str,
    versions: &'static [u32],
    arity: Arity,
    infer: fn(&Infer) -> Result<Vec<Fact>, OpError>,
) -> Op {
    Op::onnx(name, versions, arity, infer, eval_view).gradient(view_gradient).channels(view_channels)
}

/// The range of axes that `start` and `end` select, both counting from the end where negative, clamped.
fn selected(cx: &OpView, rank: usize) -> Result<std::ops::Range<usize>, OpError> {
    let limit = |axis: i64| (if axis < 0 { axis.saturating_add(rank as i64) } else { axis }).clamp(0, rank as i64);
    let start = limit(cx.attributes().int("start", 0)?);
    let end = limit(cx.attributes().int("end", rank as i64)?);
    Ok(start as usize..end.max(start) as usize)
}

fn infer_shape(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let fact = match cx.shape(0) {
        Some(shape) => {
            let sizes = shape[selected(cx, shape.len())?].to_vec();
            Fact::tensor(Some(DType::I64), vec![Dim::Known(sizes.len())]).with_content(Some(sizes))
        }
        None => Fact::tensor(Some(DType::I64), vec![Dim::Unknown]),
    };
    Ok(vec![fact])
}

fn eval_shape(cx: &Eval) -> Evaluated {
    let shape = cx.input(0)?.shape();
    let sizes: Vec<i64> = shape[selected(cx, shape.len())?].iter().map(|n| *n as i64).collect();
    Ok(vec![Tensor::vector(&sizes)])
}

fn infer_size(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let content = cx.shape(0).map(|shape| vec![Dim::product(shape)]);
    Ok(vec![Fact::tensor(Some(DType::I64), Vec::new()).with_content(content)])
}

fn eval_size(cx: &Eval) -> Evaluated {
    Ok(vec![Tensor::scalar(cx.input(0)?.len() as i64)])
}

/// The output's shape is what the operator's inference says for this very input.
fn eval_view(cx: &Eval) -> Evaluated {
    let op = crate::op::find(&cx.node.domain, &cx.node.op)
        .ok_or_else(|| OpError::unsupported(format!("operator {}", cx.node.op)))?;
    let shape = cx.output_shape(op.infer)?;
    Ok(vec![cx.input(0)?.reshaped(&shape)?])
}

/// The gradient is shaped like the input again.
fn view_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let dx = if cx.node.op == "Identity" { dy } else { cx.reshape_like(dy, x)? };
    Ok(std::iter::once(Some(dx)).chain(vec![None; cx.node.inputs.len() - 1]).collect())
}

/// Every axis goes with itself: its indices are counted, whatever they are.
fn size_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let rank = cx.shape(0).map_or(0, <[Dim]>::len);
    Ok((0..rank).map(|axis| Link::Same(Axis::Input(0, axis), Axis::Input(0, axis))).collect())
}

/// Both shapes are cut into the shortest runs of neighbouring axes with one product; axes of size 1 are left out.
fn view_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let op = crate::op::find(&cx.node.domain, &cx.node.op)
        .ok_or_else(|| OpError::unsupported(format!("operator {}", cx.node.op)))?;
    let facts = (op.infer)(cx)?;
    let (Some(from), Some(to)) = (cx.shape(0), facts.first().and_then(|f| f.shape.as_deref())) else {
        return Err(OpError::shape("the ranks of input and output must be known"));
    };
    let long = |shape: &[Dim]| -> Vec<(usize, Dim)> {
        shape.iter().cloned().enumerate().filter(|(_, dim)| *dim != Dim::Known(1)).collect()
    };
    let (from, to) = (long(from), long(to));
    let mut links = Vec::new();
    let (mut i, mut j) = (0, 0);
    while i < from.len() && j < to.len() {
        let (start_i, start_j) = (i, j);
        let (mut have, mut want) = (from[i].1.clone(), to[j].1.clone());
        (i, j) = (i + 1, j + 1);
        while !have.same(&want) && (i < from.len() || j < to.len()) {
            let more = match (have.known(), want.known()) {
                (Some(have), Some(want)) => have < want,
                _ => want.divide_exact(&have).is_some(),
            };
            if i < from.len() && (more || j == to.len()) {
                have = have.times(&from[i].1);
                i += 1;
            } else {
                want = want.times(&to[j].1);
                j += 1;
            }
        }
        link_run(&from[start_i..i], &to[start_j..j], &mut links);
    }
    Ok(links)
}

/// Links of one run of input axes that becomes one run of output axes: where one side is a single axis, each axis of
/// the other side holds blocks of it.
fn link_run(from: &[(usize, Dim)], to: &[(usize, Dim)], links: &mut Vec<Link>) {
    let mut blocks = |many: &[(usize, Dim)], outer: fn(usize) -> Axis, inner: Axis| {
        for (at, (axis, _)) in many.iter().enumerate() {
            let repeat = Dim::product(many[at + 1..].iter().map(|(_, dim)| dim)).known();
            links.extend(repeat.map(|repeat| Link::Block { outer: outer(*axis), inner, repeat }));
        }
    };
    match (from, to) {
        ([(i, _)], [(j, _)]) => links.push(Link::Same(Axis::Input(0, *i), Axis::Output(0, *j))),
        ([(i, _)], many) => blocks(many, |axis| Axis::Output(0, axis), Axis::Input(0, *i)),
        (many, [(j, _)]) => blocks(many, |axis| Axis::Input(0, axis), Axis::Output(0, *j)),
        _ => {
            let mixed = "axes are mixed by a reshape";
            links.extend(from.iter().map(|(axis, _)| Link::Fixed(Axis::Input(0, *axis), mixed)));
            links.extend(to.iter().map(|(axis, _)| Link::Fixed(Axis::Output(0, *axis), mixed)));
        }
    }
}

/// The first input under another shape, elements included where they are known sizes.
fn viewed(x: &InputFact, shape: Option<Vec<Dim>>) -> Result<Vec<Fact>, OpError> {
    Ok(vec![Fact { dtype: x.dtype, shape, content: x.content() }])
}

/// What the shape operand of Reshape says of one axis.
#[derive(Clone)]
enum Request {
    /// As large as the input's axis of the same number.
    Copy,
    /// Whatever is left.
    Rest,
    Size(Dim),
}

fn infer_reshape(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (x, wanted) = (cx.input(0, "a tensor")?, cx.input(1, "a shape")?);
    let allow_zero = cx.attributes().flag("allowzero", false)?;
    let request: Option<Vec<Request>> = match wanted.constant {
        Some(t) => {
            let request = |v: i64| match v {
                0 if !allow_zero => Ok(Request::Copy),
                -1 => Ok(Request::Rest),
                v => usize::try_from(v)
                    .map(|n| Request::Size(Dim::Known(n)))
                    .map_err(|_| OpError::value(format!("size {v} in the wanted shape"))),
            };
            Some(t.to_i64()?.into_iter().map(request).collect::<Result<_, _>>()?)
        }
        // A size that inference does not know may be -1; either way it is what is left.
        None => wanted.content.as_ref().map(|content| {
            let request = |dim: &Dim| match dim {
                Dim::Known(0) if !allow_zero => Request::Copy,
                Dim::Unknown => Request::Rest,
                dim => Request::Size(dim.clone()),
            };
            content.iter().map(request).collect()
        }),
    };
    match (request, &x.shape) {
        (Some(request), from) => viewed(x, Some(reshaped(from.as_deref(), &request, wanted.constant.is_some())?)),
        (None, _) => {
            let rank = wanted.shape.as_ref().and_then(|s| s.first()?.known());
            viewed(x, rank.map(|rank| vec![Dim::Unknown; rank]))
        }
    }
}

fn reshaped(from: Option<&[Dim]>, request: &[Request], exact: bool) -> Result<Vec<Dim>, OpError> {
    let rests = request.iter().filter(|r| matches!(r, Request::Rest)).count();
    if rests > 1 && exact {
        return Err(OpError::value("the wanted shape has more than one -1"));
    }
    let size = |(axis, r): (usize, &Request)| match (r, from) {
        (Request::Size(dim), _) => Ok(dim.clone()),
        (Request::Rest, _) | (Request::Copy, None) => Ok(Dim::Unknown),
        (Request::Copy, Some(from)) => from.get(axis).cloned().ok_or_else(|| {
            OpError::shape(format!("the wanted shape copies axis {axis}, which {} lacks", show_shape(from)))
        }),
    };
    let mut out: Vec<Dim> = request.iter().enumerate().map(size).collect::<Result<_, _>>()?;
    let Some(from) = from else { return Ok(out) };
    // Copied axes stand on both sides and cancel, which matters where they are symbols or empty.
    let copied = |axis: usize| matches!(request.get(axis), Some(Request::Copy));
    let left = Dim::product(from.iter().enumerate().filter(|(axis, _)| !copied(*axis)).map(|(_, dim)| dim));
    let is_size = |axis: usize| matches!(request.get(axis), Some(Request::Size(_)));
    let taken = Dim::product(out.iter().enumerate().filter(|(axis, _)| is_size(*axis)).map(|(_, dim)| dim));
    let mismatch = || OpError::shape(format!("{} does not reshape to {}", show_shape(from), show_shape(&out)));
    match (rests, left.known(), taken.known()) {
        (0, Some(left), Some(taken)) if left != taken => return Err(mismatch()),
        (1, Some(left), Some(taken)) if taken == 0 || left % taken != 0 => return Err(mismatch()),
        _ => {}
    }
    if rests == 1 {
        let rest = left.divide_exact(&taken).unwrap_or(Dim::Unknown);
        for (dim, _) in out.iter_mut().zip(request).filter(|(_, r)| matches!(r, Request::Rest)) {
            *dim = rest.clone();
        }
    }
    Ok(out)
}

/// Two axes: those before the attribute `axis` and those from it on.
fn infer_flatten(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let axis = cx.attributes().int("axis", 1)?;
    let shape = match &x.shape {
        Some(shape) => {
            let at = if axis == shape.len() as i64 { shape.len() } else { resolve_axis(axis, shape.len())? };
            vec![Dim::product(&shape[..at]), Dim::product(&shape[at..])]
        }
        None => vec![Dim::Unknown; 2],
    };
    viewed(x, Some(shape))
}

/// The axes of Squeeze and Unsqueeze: an attribute before version 13, an input since. `None` where they are computed.
fn axes(cx: &Infer) -> Result<Option<Option<Vec<i64>>>, OpError> {
    match (cx.optional(1), cx.attributes().ints("axes")?) {
        (Some(input), _) => Ok(input.constant_ints()?.map(Some)),
        (None, attribute) => Ok(Some(attribute.map(<[i64]>::to_vec))),
    }
}

fn infer_squeeze(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let (Some(shape), Some(axes)) = (&x.shape, axes(cx)?) else { return viewed(x, None) };
    let Some(axes) = axes else {
        let known = known_shape(shape);
        return viewed(x, known.map(|s| dims(&s.into_iter().filter(|n| *n != 1).collect::<Vec<_>>())));
    };
    let mut dropped = vec![false; shape.len()];
    for axis in axes {
        let axis = resolve_axis(axis, shape.len())?;
        if shape[axis].known().is_some_and(|n| n != 1) {
            return Err(OpError::shape(format!("axis {axis} of {} is not of size 1", show_shape(shape))));
        }
        dropped[axis] = true;
    }
    let kept = shape.iter().zip(dropped).filter(|(_, dropped)| !dropped).map(|(dim, _)| dim.clone());
    viewed(x, Some(kept.collect()))
}

/// Axes count in the output's rank.
fn infer_unsqueeze(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let (Some(shape), Some(axes)) = (&x.shape, axes(cx)?) else { return viewed(x, None) };
    let axes = axes.ok_or_else(|| OpError::attribute("axes", "is missing"))?;
    let mut out: Vec<Option<Dim>> = vec![None; shape.len() + axes.len()];
    for axis in axes {
        let axis = resolve_axis(axis, out.len())?;
        if out[axis].replace(Dim::Known(1)).is_some() {
            return Err(OpError::value(format!("axis {axis} is given twice")));
        }
    }
    let mut rest = shape.iter().cloned();
    viewed(x, out.into_iter().map(|dim| dim.or_else(|| rest.next())).collect())
}

fn infer_identity(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    viewed(x, x.shape.clone())
}

/// The tensor that the attributes of a Constant hold.
pub(crate) fn constant_of(cx: &OpView) -> Result<Tensor, OpError> {
    let strings = |shape: &[usize], values: &[Vec<u8>]| Tensor::from_strings(shape, values.to_vec());
    let mut found = cx.attributes().iter().filter(|(name, _)| name.contains("value"));
    let (Some((name, value)), None) = (found.next(), found.next()) else {
        return Err(OpError::attribute("value", "or exactly one of its other forms must be given"));
    };
    Ok(match value {
        Attribute::Tensor(t) => t.clone(),
        Attribute::SparseTensor(t) => t.to_dense()?,
        Attribute::Int(v) => Tensor::scalar(*v),
        Attribute::Ints(v) => Tensor::vector(v),
        Attribute::Float(v) => Tensor::scalar(*v),
        Attribute::Floats(v) => Tensor::vector(v),
        Attribute::String(v) => strings(&[], std::slice::from_ref(v))?,
        Attribute::Strings(v) => strings(&[v.len()], v)?,
        _ => return Err(OpError::attribute(name, "must be a tensor, numbers or strings")),
    })
}

fn infer_constant(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let tensor = constant_of(cx)?;
    let fact = Fact::tensor(Some(tensor.dtype()), dims(tensor.shape()));
    let content = InputFact { fact: Fact::default(), constant: Some(&tensor) }.content();
    Ok(vec![fact.with_content(content)])
}

fn eval_constant(cx: &Eval) -> Evaluated {
    Ok(vec![constant_of(cx)?])
}

/// The one element of attribute `value`; zero of type `f32` without it.
fn fill_value(cx: &OpView) -> Result<Tensor, OpError> {
    match cx.attributes().tensor("value")? {
        Some(t) if t.len() == 1 => Ok(t.reshaped(&[])?),
        Some(t) => Err(OpError::attribute("value", format!("must hold one element, found shape {:?}", t.shape()))),
        None => Ok(Tensor::scalar(0f32)),
    }
}

fn infer_constant_of_shape(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let input = cx.input(0, "a shape")?;
    let value = fill_value(cx)?;
    let shape = match input.content() {
        Some(shape) => Some(shape),
        None => input.shape.as_ref().and_then(|s| s.first()?.known()).map(|rank| vec![Dim::Unknown; rank]),
    };
    let few = shape.as_ref().and_then(|s| known_shape(s)).filter(|s| s.len() <= 1);
    let count = few.map(|s| s.iter().product::<usize>()).filter(|n| *n <= 64);
    let element = InputFact { fact: Fact::default(), constant: Some(&value) }.content();
    let content = count.zip(element).map(|(n, element)| vec![element[0].clone(); n]);
    Ok(vec![Fact { dtype: Some(value.dtype()), shape, content }])
}

fn eval_constant_of_shape(cx: &Eval) -> Evaluated {
    let sizes = cx.input(0)?.to_i64()?;
    let shape: Vec<usize> = sizes
        .iter()
        .map(|n| usize::try_from(*n).map_err(|_| OpError::value(format!("shape {sizes:?} has a negative size"))))
        .collect::<Result<_, _>>()?;
    let value = fill_value(cx)?;
    let count = checked_count(&shape)?;
    Ok(vec![crate::op::index::take(&value, &shape, std::iter::repeat_n(0, count))?])
}

/// How many elements lie from `start` to before `limit` in steps of `delta`.
fn range_len(start: f64, limit: f64, delta: f64) -> Result<usize, OpError> {
    let count = ((limit - start) / delta).ceil().max(0.0);
    // Past 2^53 steps cannot be counted as f64, and no memory holds them.
    if !count.is_finite() || count > 9e15 {
        return Err(OpError::value(format!("a range from {start} to {limit} by {delta} has no length")));
    }
    Ok(count as usize)
}

fn infer_range(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let bounds = [cx.input(0, "the start")?, cx.input(1, "the limit")?, cx.input(2, "the step")?];
    let constants: Option<Vec<f64>> = bounds.iter().map(|b| b.constant?.to_f64().ok()?.first().copied()).collect();
    let sizes: Option<Vec<Dim>> = bounds.iter().map(|b| b.content()?.first().cloned()).collect();
    let len = match (constants.as_deref(), sizes.as_deref()) {
        (Some([start, limit, delta]), _) => Dim::Known(range_len(*start, *limit, *delta)?),
        (_, Some([start, limit, delta])) => match delta.known().and_then(|d| i64::try_from(d).ok()) {
            Some(delta) => limit.minus(start).map_or(Dim::Unknown, |span| span.divide_ceil(delta)),
            None => Dim::Unknown,
        },
        _ => Dim::Unknown,
    };
    Ok(vec![Fact::tensor(bounds[0].dtype, vec![len])])
}

fn eval_range(cx: &Eval) -> Evaluated {
    let scalar = |index: usize| -> Result<&Tensor, OpError> {
        let t = cx.input(index)?;
        if t.len() == 1 { Ok(t) } else { Err(OpError::shape("bounds of a range must be scalars")) }
    };
    let (start, limit, delta) = (scalar(0)?, scalar(1)?, scalar(2)?);
    let dtype = start.dtype();
    if dtype.is_integer() {
        let (start, limit, delta) = (start.to_i128()?[0], limit.to_i128()?[0], delta.to_i128()?[0]);
        let len = range_len(start as f64, limit as f64, delta as f64)?;
        let values: Vec<i128> = (0..len as i128).map(|i| start + i * delta).collect();
        return Ok(vec![Tensor::from_i128(dtype, &[len], &values)?]);
    }
    let (start, limit, delta) = (start.to_f64()?[0], limit.to_f64()?[0], delta.to_f64()?[0]);
    let values: Vec<f64> = (0..range_len(start, limit, delta)?).map(|i| start + i as f64 * delta).collect();
    Ok(vec![Tensor::from_f64(dtype, &[values.len()], &values)?])
}

fn eye_dtype(cx: &OpView, input: Option<DType>) -> Result<Option<DType>, OpError> {
    cx.attributes().optional_int("dtype")?.map_or(Ok(input), |number| dtype_of("dtype", number).map(Some))
}

fn infer_eye_like(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    cx.expect_rank(0, 2, "the matrix")?;
    let x = cx.input(0, "a matrix")?;
    Ok(vec![Fact { dtype: eye_dtype(cx, x.dtype)?, shape: x.shape.clone(), content: None }])
}

/// Ones where the column is the row plus attribute `k`.
fn eval_eye_like(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let [rows, columns] = *x.shape() else {
        return Err(OpError::shape(format!("expected a matrix, found shape {:?}", x.shape())));
    };
    let k = i128::from(cx.attributes().int("k", 0)?);
    let dtype = eye_dtype(cx, Some(x.dtype()))?.unwrap_or(DType::F32);
    let one = |i: usize, j: usize| i128::from(j as i128 == i as i128 + k);
    let values: Vec<i128> = (0..rows).flat_map(|i| (0..columns).map(move |j| one(i, j))).collect();
    Ok(vec![Tensor::from_i128(dtype, x.shape(), &values)?])
}
