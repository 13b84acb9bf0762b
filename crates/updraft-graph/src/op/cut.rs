//! Slices, their gradient, and padding.

use crate::dim::{Dim, known_shape};
use crate::graph::ValueId;
use crate::op::rearrange::{by_axis, same_size_channels, whole};
use crate::op::{Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, OpView, resolve_axis, show_shape};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("Slice", &[1, 10, 11, 13], Arity::range(1, 5), infer_slice, eval_slice)
        .gradient(slice_gradient)
        .channels(slice_links),
    Op::onnx("SliceGradient", &[1], Arity::range(4, 6), infer_slice_gradient, eval_slice_gradient)
        .own()
        .no_gradient("second-order derivatives are not implemented")
        .no_channels("it occurs in training graphs only, which are not pruned"),
    Op::onnx("Pad", &[2, 11, 13, 18, 19, 21, 23, 24, 25], Arity::range(1, 4), infer_pad, eval_pad)
        .gradient(pad_gradient)
        .channels(same_size_channels),
];

/// The operands of a slice: lists of one length, or `None` where they are computed at run time.
struct Bounds {
    starts: Option<Vec<i64>>,
    ends: Option<Vec<i64>>,
    axes: Vec<usize>,
    steps: Option<Vec<i64>>,
    /// The ends as sizes, which may be symbols.
    symbolic_ends: Option<Vec<Dim>>,
}

/// Reads a slice's bounds from attributes (version 1) or from the inputs from `first` on.
fn bounds(cx: &Infer, first: usize, rank: usize) -> Result<Option<Bounds>, OpError> {
    let constant = |index: usize| match cx.optional(index) {
        Some(input) => input.constant_ints(),
        None => Ok(None),
    };
    let attribute = |name: &str| Ok::<_, OpError>(cx.attributes().ints(name)?.map(<[i64]>::to_vec));
    let is_attribute = cx.attributes().get("starts").is_some();
    let (starts, ends, given_axes) = if is_attribute {
        (attribute("starts")?, attribute("ends")?, attribute("axes")?)
    } else {
        (constant(first)?, constant(first + 1)?, constant(first + 2)?)
    };
    let count = |index: usize| cx.optional(index).and_then(|x| x.shape.as_ref()?.first()?.known());
    let len = match &starts {
        Some(starts) => Some(starts.len()),
        None => count(first),
    };
    if given_axes.is_none() && !is_attribute && cx.optional(first + 2).is_some() {
        return Ok(None);
    }
    let Some(len) = len else { return Ok(None) };
    let axes: Vec<usize> = match given_axes {
        Some(axes) => axes.iter().map(|a| resolve_axis(*a, rank)).collect::<Result<_, _>>()?,
        None => (0..len).collect(),
    };
    let steps = match cx.optional(first + 3) {
        Some(_) => constant(first + 3)?,
        None => Some(vec![1; len]),
    };
    let lens = [starts.as_ref(), ends.as_ref(), steps.as_ref()].into_iter().flatten().map(Vec::len);
    if axes.len() > rank || axes.iter().any(|a| *a >= rank) || lens.chain([axes.len()]).any(|n| n != len) {
        return Err(OpError::value(format!("{len} starts, with as many ends, axes and steps, for rank {rank}")));
    }
    let symbolic_ends = cx.optional(first + 1).filter(|_| !is_attribute).and_then(|x| x.content());
    Ok(Some(Bounds { starts, ends, axes, steps, symbolic_ends }))
}

/// First index, step and number of the indices from `start` to before `end` of an axis of `size`.
fn resolve(start: i64, end: i64, step: i64, size: usize) -> Result<(i64, i64, usize), OpError> {
    if step == 0 {
        return Err(OpError::value("a slice's step is zero"));
    }
    let size = size as i64;
    let from_front = |i: i64| if i < 0 { i.saturating_add(size) } else { i };
    let (low, high) = if step > 0 { (0, size) } else { (-1, size - 1) };
    let start = from_front(start).clamp(low.max(0), high.max(0));
    let end = from_front(end).clamp(low, high);
    let span = if step > 0 { end - start } else { start - end };
    let count = if size == 0 { 0 } else { (span.max(0) as u64).div_ceil(step.unsigned_abs()) };
    Ok((start, step, count as usize))
}

/// The indices that a slice takes along each axis.
fn chosen(bounds: &Bounds, shape: &[usize]) -> Result<Vec<Vec<Option<usize>>>, OpError> {
    let mut choices: Vec<_> = shape.iter().map(|n| whole(*n)).collect();
    let (Some(starts), Some(ends), Some(steps)) = (&bounds.starts, &bounds.ends, &bounds.steps) else {
        return Err(OpError::value("starts, ends and steps must be given"));
    };
    for (i, axis) in bounds.axes.iter().enumerate() {
        let (start, step, count) = resolve(starts[i], ends[i], steps[i], shape[*axis])?;
        choices[*axis] = (0..count as i64).map(|k| usize::try_from(start + k * step).ok()).collect();
    }
    Ok(choices)
}

fn infer_slice(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let Some(shape) = &x.shape else { return Ok(vec![Fact::of_dtype(x.dtype)]) };
    let Some(bounds) = bounds(cx, 1, shape.len())? else {
        return Ok(vec![Fact::tensor(x.dtype, vec![Dim::Unknown; shape.len()])]);
    };
    let mut out = shape.clone();
    for (i, axis) in bounds.axes.iter().enumerate() {
        let at = |list: &Option<Vec<i64>>| list.as_ref().map(|l| l[i]);
        let symbolic_end = bounds.symbolic_ends.as_ref().and_then(|ends| ends.get(i));
        out[*axis] = sliced(&shape[*axis], at(&bounds.starts), at(&bounds.ends), at(&bounds.steps), symbolic_end)?;
    }
    let content = match (x.content(), &bounds) {
        (Some(content), Bounds { starts: Some(_), ends: Some(_), steps: Some(_), .. }) if shape.len() == 1 => {
            let taken = chosen(&bounds, &[content.len()])?;
            taken[0].iter().map(|i| content.get((*i)?).cloned()).collect()
        }
        _ => None,
    };
    Ok(vec![Fact::tensor(x.dtype, out).with_content(content)])
}

/// The size of a slice of one axis. A symbolic axis is taken to be as large as the slice needs.
fn sliced(
    size: &Dim,
    start: Option<i64>,
    end: Option<i64>,
    step: Option<i64>,
    symbolic_end: Option<&Dim>,
) -> Result<Dim, OpError> {
    let (Some(start), Some(step)) = (start, step) else { return Ok(Dim::Unknown) };
    if let (Some(size), Some(end)) = (size.known(), end) {
        return Ok(Dim::Known(resolve(start, end, step, size)?.2));
    }
    let whole_end = if step > 0 {
        end.is_some_and(|e| e >= i64::from(i32::MAX))
    } else {
        end.is_some_and(|e| e < -i64::from(i32::MAX))
    };
    Ok(match (step, start, end) {
        (1.., 0.., _) if whole_end || symbolic_end.is_some_and(|e| e.same(size)) => {
            size.offset(-start).divide_ceil(step)
        }
        (1.., 0.., Some(end)) if end < 0 => size.offset(end).offset(-start).divide_ceil(step),
        (..=-1, -1, _) if whole_end => size.divide_ceil(-step),
        _ => Dim::Unknown,
    })
}

fn eval_slice(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let bounds = bounds(&cx.infer(), 1, x.rank())?.ok_or_else(|| OpError::value("starts and ends must be given"))?;
    Ok(vec![by_axis(x, &chosen(&bounds, x.shape())?, None)?])
}

/// Zeros around dy where the step is 1 and the start counts from the front, else zeros in between too.
fn slice_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let shape = cx.shape(x)?;
    let none = vec![None; cx.node.inputs.len() - 1];
    let bounds = bounds(&Infer::new(cx.graph, &cx.node), 1, shape.len())?;
    let mut before = vec![Some(0i64); shape.len()];
    let mut simple = true;
    if let Some(Bounds { starts: Some(starts), axes, steps: Some(steps), .. }) = &bounds {
        for ((start, step), axis) in starts.iter().zip(steps).zip(axes) {
            simple &= *step == 1;
            before[*axis] = match shape[*axis].known() {
                Some(size) => Some(resolve(*start, i64::MAX, 1, size)?.0),
                None => (*start >= 0).then_some(*start),
            };
        }
    } else {
        simple = false;
    }
    let before: Option<Vec<i64>> = before.into_iter().collect();
    let dx = match before {
        Some(before) if simple => pad_to(cx, dy, before, x)?,
        _ => {
            let shape = cx.op("Shape", &[x])?;
            let mut inputs = vec![Some(dy), Some(shape)];
            if cx.node.inputs.len() > 1 {
                inputs.extend(cx.node.inputs[1..].iter().copied());
            } else {
                return Err(OpError::unsupported("gradient of a slice with attributes; upgrade the graph first"));
            }
            cx.graph.op_n(crate::graph::UPDRAFT_DOMAIN, "SliceGradient", &inputs, [], 1)?[0]
        }
    };
    Ok(std::iter::once(Some(dx)).chain(none).collect())
}

/// Zeros before and after `dy` along each axis, such that it is shaped like `x`.
fn pad_to(cx: &mut Gradient, dy: ValueId, before: Vec<i64>, x: ValueId) -> Result<ValueId, OpError> {
    let (inner, outer) = (known_shape(&cx.shape(dy)?), known_shape(&cx.shape(x)?));
    let pads = match (inner, outer) {
        (Some(inner), Some(outer)) => {
            let after = outer.iter().zip(inner).zip(&before).map(|((o, i), b)| *o as i64 - i as i64 - b);
            let pads: Vec<i64> = before.iter().copied().chain(after).collect();
            cx.ints(&pads)
        }
        _ => {
            let before = cx.ints(&before);
            let (outer, inner) = (cx.op("Shape", &[x])?, cx.op("Shape", &[dy])?);
            let rest = cx.op("Sub", &[outer, inner])?;
            let after = cx.op("Sub", &[rest, before])?;
            cx.op_with("Concat", &[before, after], [("axis", 0.into())])?
        }
    };
    cx.op("Pad", &[dy, pads])
}

/// Axes that are taken as a whole keep their indices; a run of neighbours is a part of its axis.
fn slice_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let shape = cx.shape(0).ok_or_else(|| OpError::shape("the rank must be known"))?;
    let mut links = same_size_channels(cx)?;
    let Some(Bounds { starts: Some(starts), ends: Some(ends), steps: Some(steps), axes, .. }) =
        bounds(cx, 1, shape.len())?
    else {
        return Ok(links);
    };
    for (i, axis) in axes.into_iter().enumerate() {
        let Some(size) = shape[axis].known() else { continue };
        let (start, step, len) = resolve(starts[i], ends[i], steps[i], size)?;
        let (part, whole) = (Axis::Output(0, axis), Axis::Input(0, axis));
        if let (Ok(offset), 1, true) = (usize::try_from(start), step, len < size) {
            links.retain(|link| !matches!(link, Link::Fixed(fixed, _) if *fixed == whole));
            links.push(Link::Offset { part, whole, offset, len });
        }
    }
    Ok(links)
}

/// Inputs: dy, shape of x, then the slice's starts, ends, axes and steps.
fn infer_slice_gradient(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = cx.dtype(0);
    Ok(vec![match cx.input(1, "a shape")?.content() {
        Some(shape) => Fact::tensor(dtype, shape),
        None => Fact { dtype, shape: cx.shape(0).map(|s| vec![Dim::Unknown; s.len()]), content: None },
    }])
}

fn eval_slice_gradient(cx: &Eval) -> Evaluated {
    let dy = cx.input(0)?;
    let shape = cx.output_shape(infer_slice_gradient)?;
    let bounds = bounds(&cx.infer(), 2, shape.len())?;
    let bounds = bounds.ok_or_else(|| OpError::value("starts and ends must be given"))?;
    let choices = chosen(&bounds, &shape)?;
    if choices.iter().map(Vec::len).ne(dy.shape().iter().copied()) {
        return Err(OpError::shape(format!("a gradient of shape {:?} is not that of this slice", dy.shape())));
    }
    // Where each index of x is in dy.
    let inverse = |(choice, size): (&Vec<Option<usize>>, &usize)| {
        let mut places = vec![None; *size];
        for (at, index) in choice.iter().enumerate() {
            if let Some(place) = index.and_then(|i| places.get_mut(i)) {
                *place = Some(at);
            }
        }
        places
    };
    let places: Vec<_> = choices.iter().zip(&shape).map(inverse).collect();
    Ok(vec![by_axis(dy, &places, None)?])
}

/// Elements added before and after each axis (negative ones are cut off); `None` where computed at run time.
fn pads(cx: &Infer, rank: usize) -> Result<Option<Vec<(i64, i64)>>, OpError> {
    let given = match cx.optional(1) {
        Some(input) => input.constant_ints()?,
        None => {
            let pads = cx.attributes().ints("pads")?;
            Some(pads.ok_or_else(|| OpError::attribute("pads", "is missing"))?.to_vec())
        }
    };
    let axes = match cx.optional(3) {
        Some(input) => match input.constant_ints()? {
            Some(axes) => axes.iter().map(|a| resolve_axis(*a, rank)).collect::<Result<_, _>>()?,
            None => return Ok(None),
        },
        None => (0..rank).collect::<Vec<_>>(),
    };
    let Some(given) = given else { return Ok(None) };
    if given.len() != 2 * axes.len() {
        return Err(OpError::value(format!("{} pads for {} axes", given.len(), axes.len())));
    }
    let mut pads = vec![(0, 0); rank];
    for (i, axis) in axes.iter().enumerate() {
        pads[*axis] = (given[i], given[i + axes.len()]);
    }
    Ok(Some(pads))
}

fn infer_pad(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let Some(shape) = &x.shape else { return Ok(vec![Fact::of_dtype(x.dtype)]) };
    let Some(pads) = pads(cx, shape.len())? else {
        return Ok(vec![Fact::tensor(x.dtype, vec![Dim::Unknown; shape.len()])]);
    };
    let mut out = Vec::with_capacity(shape.len());
    for (size, (before, after)) in shape.iter().zip(pads) {
        let added = before.checked_add(after).filter(|sum| size.known().is_none_or(|n| n as i64 + sum >= 0));
        let added = added.ok_or_else(|| {
            OpError::shape(format!("pads {before} and {after} leave nothing of an axis of {}", show_shape(shape)))
        })?;
        out.push(size.offset(added));
    }
    Ok(vec![Fact::tensor(x.dtype, out)])
}

fn pad_mode<'a>(cx: &OpView<'a>) -> Result<&'a str, OpError> {
    cx.attributes().string("mode", "constant")
}

fn eval_pad(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let pads = pads(&cx.infer(), x.rank())?.ok_or_else(|| OpError::value("pads must be given"))?;
    let shape = cx.output_shape(infer_pad)?;
    let fill = match (cx.optional(2), cx.attributes().optional_float("value")?) {
        (Some(t), _) => t.reshaped(&[])?,
        (None, Some(v)) => Tensor::scalar(v).cast(x.dtype())?,
        (None, None) => Tensor::zeros(x.dtype(), &[])?,
    };
    let source: fn(i64, i64) -> Option<i64> = match pad_mode(cx)? {
        "constant" => |i, n| (0..n).contains(&i).then_some(i),
        "edge" => |i, n| (n > 0).then(|| i.clamp(0, n - 1)),
        "wrap" => |i, n| (n > 0).then(|| i.rem_euclid(n)),
        // The edge is not repeated: the period is twice the number of steps between the edges.
        "reflect" => |i, n| match n {
            ..=0 => None,
            1 => Some(0),
            _ => Some((n - 1) - ((n - 1) - i.rem_euclid(2 * (n - 1))).abs()),
        },
        other => {
            return Err(OpError::attribute(
                "mode",
                format!("must be constant, edge, wrap or reflect, found {other:?}"),
            ));
        }
    };
    let constant = pad_mode(cx)? == "constant";
    let mut choices = Vec::with_capacity(shape.len());
    for ((size, out), (before, _)) in x.shape().iter().zip(&shape).zip(pads) {
        let choice: Vec<Option<usize>> =
            (0..*out as i64).map(|i| source(i - before, *size as i64).and_then(|i| usize::try_from(i).ok())).collect();
        if !constant && choice.contains(&None) {
            return Err(OpError::shape("an empty axis has nothing to pad with"));
        }
        choices.push(choice);
    }
    Ok(vec![by_axis(x, &choices, Some(&fill))?])
}

/// What was added is cut off: padding by the negative pads, which also puts zeros where something was cut off.
fn pad_gradient(cx: &mut Gradient) -> Grads {
    let (dy, view) = (cx.grad()?, cx.view());
    if pad_mode(&view)? != "constant" {
        return Err(OpError::unsupported("gradient of padding that repeats elements"));
    }
    let pads = cx.input(1)?;
    let back = cx.op("Neg", &[pads])?;
    let inputs = [Some(dy), Some(back), None, cx.optional(3)];
    let used = if inputs[3].is_some() { 4 } else { 2 };
    let dx = cx.graph.op_n("", "Pad", &inputs[..used], [], 1)?[0];
    Ok(std::iter::once(Some(dx)).chain(vec![None; cx.node.inputs.len() - 1]).collect())
}
