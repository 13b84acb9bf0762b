//! Operators that move elements: permuted, repeated, masked, regrouped.
//!
//! Most choose along each axis on its own: index `i` of the output's axis is some index of the input's, or none where
//! the fill value goes. [`by_axis`] carries that out, so Slice, Pad, Tile, Expand, Split and cropping are one operation
//! with different choices.

use crate::dim::{Dim, known_shape};
use crate::graph::ValueId;
use crate::op::index::{Positions, checked_count, coordinates, pick, ravel, signed_strides, take};
use crate::op::{
    Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, OpView, broadcast, broadcast_dims, resolve_axis,
    show_shape,
};
use crate::tensor::{Tensor, strides};

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

const RANK: &str = "the rank must be known";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("Transpose", &[1, 13, 21, 23, 24, 25], Arity::exact(1), infer_transpose, eval_transpose)
        .gradient(transpose_gradient)
        .channels(transpose_channels),
    Op::onnx("Expand", &[8, 13], Arity::exact(2), infer_expand, eval_expand)
        .gradient(expand_gradient)
        .channels(same_size_channels),
    Op::onnx("Tile", &[6, 13], Arity::exact(2), infer_tile, eval_tile)
        .gradient(tile_gradient)
        .channels(same_size_channels),
    Op::onnx("Trilu", &[14], Arity::range(1, 2), infer_like_input, eval_trilu)
        .gradient(trilu_gradient)
        .channels(same_size_channels),
    Op::onnx("DepthToSpace", &[1, 11, 13, 28], Arity::exact(1), infer_depth_to_space, eval_depth_to_space)
        .gradient(depth_to_space_gradient)
        .no_channels("channels become pixels"),
    Op::onnx("SpaceToDepth", &[1, 13, 28], Arity::exact(1), infer_space_to_depth, eval_space_to_depth)
        .gradient(space_to_depth_gradient)
        .no_channels("pixels become channels"),
    Op::onnx("ReverseSequence", &[10, 28], Arity::exact(2), infer_like_input, eval_reverse_sequence)
        .gradient(reverse_sequence_gradient)
        .channels(same_size_channels),
    Op::onnx("CenterCropPad", &[18], Arity::exact(2), infer_center_crop_pad, eval_center_crop_pad)
        .no_gradient("not implemented: it prepares images")
        .channels(same_size_channels),
];

/// The elements of `x` chosen along each axis: index `i` of the output's axis `a` is `choices[a][i]` of the input's,
/// and an element with no index along some axis is `fill`, a tensor of one element.
pub(super) fn by_axis(x: &Tensor, choices: &[Vec<Option<usize>>], fill: Option<&Tensor>) -> Result<Tensor, OpError> {
    let shape: Vec<usize> = choices.iter().map(Vec::len).collect();
    checked_count(&shape)?;
    let mut places = vec![Some(0usize)];
    for (choice, stride) in choices.iter().zip(strides(x.shape())) {
        let step = |place: &Option<usize>| {
            let place = *place;
            choice.iter().map(move |i| Some(place? + (*i)? * stride))
        };
        places = places.iter().flat_map(step).collect();
    }
    let none = Tensor::zeros(x.dtype(), &[])?;
    let picks = places.into_iter().map(|place| place.map_or((1, 0), |place| (0, place)));
    pick(&[x, fill.unwrap_or(&none)], &shape, picks)
}

/// Every index of an axis.
pub(super) fn whole(size: usize) -> Vec<Option<usize>> {
    (0..size).map(Some).collect()
}

/// The output has the type and shape of the first input.
pub(super) fn infer_like_input(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    Ok(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: None }])
}

/// Axes that keep their size keep their indices; the others are made or read here as a whole.
pub(super) fn same_size_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let op = crate::op::find(&cx.node.domain, &cx.node.op)
        .ok_or_else(|| OpError::unsupported(format!("operator {}", cx.node.op)))?;
    let facts = (op.infer)(cx)?;
    let (Some(from), Some(to)) = (cx.shape(0), facts.first().and_then(|f| f.shape.as_deref())) else {
        return Err(OpError::shape("the ranks of input and output must be known"));
    };
    let lead = to.len().saturating_sub(from.len());
    let link = |(axis, size): (usize, &Dim)| match to.get(lead + axis) {
        Some(made) if made.same(size) => Some(Link::Same(Axis::Input(0, axis), Axis::Output(0, lead + axis))),
        _ if *size == Dim::Known(1) => None,
        _ => Some(Link::Fixed(Axis::Input(0, axis), "the size changes")),
    };
    Ok(from.iter().enumerate().filter_map(link).collect())
}

/// Which input axis each output axis is; reversed without the attribute.
fn permutation(cx: &OpView, rank: usize) -> Result<Vec<usize>, OpError> {
    let Some(given) = cx.attributes().ints("perm")? else { return Ok((0..rank).rev().collect()) };
    let permutation: Vec<usize> = given.iter().map(|a| resolve_axis(*a, rank)).collect::<Result<_, _>>()?;
    let mut sorted = permutation.clone();
    sorted.sort_unstable();
    if sorted.into_iter().ne(0..rank) {
        return Err(OpError::attribute("perm", format!("{given:?} is no permutation of {rank} axes")));
    }
    Ok(permutation)
}

fn infer_transpose(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let shape = match &x.shape {
        Some(shape) => Some(permutation(cx, shape.len())?.into_iter().map(|a| shape[a].clone()).collect()),
        None => None,
    };
    let content = x.content().filter(|_| x.rank().is_some_and(|r| r <= 1));
    Ok(vec![Fact { dtype: x.dtype, shape, content }])
}

fn eval_transpose(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let permutation = permutation(cx, x.rank())?;
    let from = signed_strides(x.shape());
    let shape: Vec<usize> = permutation.iter().map(|a| x.shape()[*a]).collect();
    let walk: Vec<isize> = permutation.iter().map(|a| from[*a]).collect();
    Ok(vec![take(x, &shape, Positions::new(&shape, &walk, 0))?])
}

fn transpose_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let permutation = permutation(&cx.view(), cx.shape(x)?.len())?;
    let mut inverse = vec![0i64; permutation.len()];
    for (to, from) in permutation.into_iter().enumerate() {
        inverse[from] = to as i64;
    }
    Ok(vec![Some(cx.op_with("Transpose", &[dy], [("perm", inverse.into())])?)])
}

fn transpose_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let rank = cx.shape(0).ok_or_else(|| OpError::shape(RANK))?.len();
    let pairs = permutation(cx, rank)?.into_iter().enumerate();
    Ok(pairs.map(|(to, from)| Link::Same(Axis::Input(0, from), Axis::Output(0, to))).collect())
}

/// The sizes that an input holds, one for each of as many axes as it has elements.
fn wanted_sizes(cx: &Infer, index: usize) -> Result<Option<Vec<Dim>>, OpError> {
    let input = cx.input(index, "sizes")?;
    Ok(match input.content() {
        Some(sizes) => Some(sizes),
        None => input.shape.as_ref().and_then(|s| s.first()?.known()).map(|rank| vec![Dim::Unknown; rank]),
    })
}

fn sizes_of(t: &Tensor) -> Result<Vec<usize>, OpError> {
    let sizes = t.to_i64()?;
    sizes
        .iter()
        .map(|n| usize::try_from(*n).map_err(|_| OpError::value(format!("{sizes:?} has a negative size"))))
        .collect()
}

fn infer_expand(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let shape = match (&x.shape, wanted_sizes(cx, 1)?) {
        (Some(shape), Some(wanted)) => Some(broadcast_dims(&[shape, &wanted])?),
        _ => None,
    };
    let content = match (x.content().as_deref(), shape.as_deref()) {
        (Some([size]), Some([Dim::Known(count)])) if *count <= 64 => Some(vec![size.clone(); *count]),
        _ => None,
    };
    Ok(vec![Fact { dtype: x.dtype, shape, content }])
}

fn eval_expand(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let shape = broadcast(&[x.shape(), &sizes_of(cx.input(1)?)?])?;
    checked_count(&shape)?;
    Ok(vec![take(x, &shape, crate::op::index::broadcast_positions(x.shape(), &shape))?])
}

fn expand_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    Ok(vec![Some(cx.sum_to(dy, x)?), None])
}

fn infer_tile(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let shape = match (&x.shape, wanted_sizes(cx, 1)?) {
        (Some(shape), Some(repeats)) if shape.len() == repeats.len() => {
            Some(shape.iter().zip(&repeats).map(|(size, times)| size.times(times)).collect())
        }
        (Some(shape), Some(repeats)) => {
            return Err(OpError::shape(format!("{} repeats for shape {}", repeats.len(), show_shape(shape))));
        }
        (Some(shape), None) => Some(vec![Dim::Unknown; shape.len()]),
        _ => None,
    };
    Ok(vec![Fact { dtype: x.dtype, shape, content: None }])
}

fn eval_tile(cx: &Eval) -> Evaluated {
    let (x, repeats) = (cx.input(0)?, sizes_of(cx.input(1)?)?);
    if repeats.len() != x.rank() {
        return Err(OpError::shape(format!("{} repeats for shape {:?}", repeats.len(), x.shape())));
    }
    let shape: Option<Vec<usize>> = x.shape().iter().zip(&repeats).map(|(n, times)| n.checked_mul(*times)).collect();
    let shape = shape.ok_or_else(|| OpError::shape(format!("{:?} repeated {repeats:?} times", x.shape())))?;
    checked_count(&shape)?;
    let choices: Vec<Vec<_>> =
        x.shape().iter().zip(shape).map(|(size, out)| (0..out).map(|i| Some(i % size)).collect()).collect();
    Ok(vec![by_axis(x, &choices, None)?])
}

/// dy seen as (repeat, element) along each axis, summed over the repeats.
fn tile_gradient(cx: &mut Gradient) -> Grads {
    let (x, repeats, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let rank = cx.shape(x)?.len() as i64;
    let one = cx.ints(&[1]);
    let shape = cx.op("Shape", &[x])?;
    let columns = [cx.op("Unsqueeze", &[repeats, one])?, cx.op("Unsqueeze", &[shape, one])?];
    let pairs = cx.op_with("Concat", &columns, [("axis", 1.into())])?;
    let flat = cx.ints(&[-1]);
    let sizes = cx.op("Reshape", &[pairs, flat])?;
    let seen = cx.op("Reshape", &[dy, sizes])?;
    let axes: Vec<i64> = (0..rank).map(|axis| 2 * axis).collect();
    let sum = if axes.is_empty() { seen } else { cx.reduce_sum(seen, &axes, false)? };
    Ok(vec![Some(cx.reshape_like(sum, x)?), None])
}

/// Inputs: matrices, number of the diagonal. With `upper` what is on and above it stays, else on and below.
fn eval_trilu(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let k = match cx.optional(1) {
        Some(t) => t.to_i64()?.first().copied().ok_or_else(|| OpError::shape("the diagonal must be a scalar"))?,
        None => 0,
    };
    let upper = cx.attributes().flag("upper", true)?;
    let [.., rows, columns] = *x.shape() else {
        return Err(OpError::shape(format!("expected matrices, found shape {:?}", x.shape())));
    };
    let stays = |position: usize| {
        let distance = (position % columns) as i128 - (position / columns % rows) as i128 - i128::from(k);
        if upper { distance >= 0 } else { distance <= 0 }
    };
    let zero = Tensor::zeros(x.dtype(), &[])?;
    let picks = (0..x.len()).map(|position| if stays(position) { (0, position) } else { (1, 0) });
    Ok(vec![pick(&[x, &zero], x.shape(), picks)?])
}

fn trilu_gradient(cx: &mut Gradient) -> Grads {
    let dy = cx.grad()?;
    let mut inputs = cx.node.inputs.clone();
    inputs[0] = Some(dy);
    let dx = cx.graph.op_n("", "Trilu", &inputs, cx.node.attributes.clone(), 1)?[0];
    Ok(std::iter::once(Some(dx)).chain(vec![None; inputs.len() - 1]).collect())
}

/// The block size, and whether the depth's innermost factor stays the depth (`CRD` is false, `DCR` true).
fn blocks(cx: &OpView) -> Result<(usize, bool), OpError> {
    let size = cx.attributes().int("blocksize", 0)?;
    let size = usize::try_from(size).ok().filter(|n| *n > 0);
    let size = size.ok_or_else(|| OpError::attribute("blocksize", "must be positive"))?;
    match cx.attributes().string("mode", "DCR")? {
        "DCR" => Ok((size, true)),
        "CRD" => Ok((size, false)),
        other => Err(OpError::attribute("mode", format!("must be DCR or CRD, found {other:?}"))),
    }
}

fn image(cx: &Infer) -> Result<Option<[Dim; 4]>, OpError> {
    cx.expect_rank(0, 4, "the image")?;
    Ok(cx.shape(0).and_then(|s| <[Dim; 4]>::try_from(s.to_vec()).ok()))
}

fn divided(dim: &Dim, by: usize, what: &str) -> Result<Dim, OpError> {
    match dim.known() {
        Some(n) if n % by != 0 => Err(OpError::shape(format!("{what} {n} is not a multiple of {by}"))),
        _ => Ok(dim.divide_floor(by as i64)),
    }
}

fn infer_depth_to_space(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (block, _) = blocks(cx)?;
    let Some([n, c, h, w]) = image(cx)? else { return Ok(vec![Fact::of_dtype(cx.dtype(0))]) };
    let (c, by) = (divided(&c, block * block, "depth")?, Dim::Known(block));
    Ok(vec![Fact::tensor(cx.dtype(0), vec![n, c, h.times(&by), w.times(&by)])])
}

fn infer_space_to_depth(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (block, _) = blocks(cx)?;
    let Some([n, c, h, w]) = image(cx)? else { return Ok(vec![Fact::of_dtype(cx.dtype(0))]) };
    let (h, w) = (divided(&h, block, "height")?, divided(&w, block, "width")?);
    Ok(vec![Fact::tensor(cx.dtype(0), vec![n, c.times(&Dim::Known(block * block)), h, w])])
}

/// The deep image's index of each element of the wide image, whose shape is `[n, c, h, w]`.
fn depth_index(wide: &[usize], c: usize, block: usize, depth_last: bool) -> Vec<usize> {
    let (offset, channel) = ((wide[2] % block) * block + wide[3] % block, wide[1]);
    let deep = if depth_last { offset * c + channel } else { channel * block * block + offset };
    vec![wide[0], deep, wide[2] / block, wide[3] / block]
}

fn eval_depth_to_space(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let (block, depth_last) = blocks(cx)?;
    let shape = cx.output_shape(infer_depth_to_space)?;
    let positions = coordinates(&shape).map(|i| ravel(&depth_index(&i, shape[1], block, depth_last), x.shape()));
    Ok(vec![take(x, &shape, positions)?])
}

fn eval_space_to_depth(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let (block, depth_last) = blocks(cx)?;
    let shape = cx.output_shape(infer_space_to_depth)?;
    let mut positions = vec![0; x.len()];
    for (from, wide) in coordinates(x.shape()).enumerate() {
        positions[ravel(&depth_index(&wide, x.shape()[1], block, depth_last), &shape)] = from;
    }
    Ok(vec![take(x, &shape, positions.into_iter())?])
}

fn depth_to_space_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let (block, depth_last) = blocks(&cx.view())?;
    if depth_last {
        return Ok(vec![Some(cx.op_with("SpaceToDepth", &[dy], [("blocksize", (block as i64).into())])?)]);
    }
    // SpaceToDepth has this order only from opset 28 on: rows and columns of blocks are moved by hand.
    let sizes = known_shape(&cx.shape(x)?[1..]);
    let Some([c, h, w]) = sizes.and_then(|s| <[usize; 3]>::try_from(s).ok()) else {
        return Err(OpError::unsupported("gradient of DepthToSpace in mode CRD for sizes that are not known"));
    };
    let sizes = [0, c / (block * block), h, block, w, block].map(|n| n as i64);
    let shape = cx.ints(&sizes);
    let apart = cx.op("Reshape", &[dy, shape])?;
    let moved = cx.op_with("Transpose", &[apart], [("perm", [0, 1, 3, 5, 2, 4].into())])?;
    Ok(vec![Some(cx.reshape_like(moved, x)?)])
}

fn space_to_depth_gradient(cx: &mut Gradient) -> Grads {
    let dy = cx.grad()?;
    Ok(vec![Some(cx.op_with("DepthToSpace", &[dy], cx.node.attributes.clone())?)])
}

/// Inputs: x, lengths. The first elements of each sequence come in reverse order, the rest stays.
fn eval_reverse_sequence(cx: &Eval) -> Evaluated {
    let (x, lengths) = (cx.input(0)?, cx.input(1)?.to_i64()?);
    let (batch, time) = (cx.attributes().int("batch_axis", 1)?, cx.attributes().int("time_axis", 0)?);
    if x.rank() < 2 || !matches!((batch, time), (0, 1) | (1, 0)) {
        return Err(OpError::shape(format!("batch axis {batch} and time axis {time} of shape {:?}", x.shape())));
    }
    let (batch, time) = (batch as usize, time as usize);
    let fits = |len: &i64| (0..=x.shape()[time] as i64).contains(len);
    if lengths.len() != x.shape()[batch] || !lengths.iter().all(fits) {
        return Err(OpError::value(format!("sequence lengths {lengths:?} for shape {:?}", x.shape())));
    }
    let positions = coordinates(x.shape()).map(|mut index| {
        let len = lengths[index[batch]] as usize;
        if index[time] < len {
            index[time] = len - 1 - index[time];
        }
        ravel(&index, x.shape())
    });
    Ok(vec![take(x, x.shape(), positions)?])
}

/// Reversing again undoes it.
fn reverse_sequence_gradient(cx: &mut Gradient) -> Grads {
    let (lengths, dy) = (cx.input(1)?, cx.grad()?);
    Ok(vec![Some(cx.op_with("ReverseSequence", &[dy, lengths], cx.node.attributes.clone())?), None])
}

/// The axes that CenterCropPad changes.
fn crop_axes(cx: &OpView, rank: usize) -> Result<Vec<usize>, OpError> {
    match cx.attributes().ints("axes")? {
        Some(axes) => axes.iter().map(|a| resolve_axis(*a, rank)).collect(),
        None => Ok((0..rank).collect()),
    }
}

fn infer_center_crop_pad(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let Some(mut shape) = x.shape.clone() else { return Ok(vec![Fact::of_dtype(x.dtype)]) };
    let axes = crop_axes(cx, shape.len())?;
    let sizes = wanted_sizes(cx, 1)?.unwrap_or_else(|| vec![Dim::Unknown; axes.len()]);
    if sizes.len() != axes.len() {
        return Err(OpError::shape(format!("{} sizes for {} axes", sizes.len(), axes.len())));
    }
    for (axis, size) in axes.into_iter().zip(sizes) {
        shape[axis] = size;
    }
    Ok(vec![Fact::tensor(x.dtype, shape)])
}

fn eval_center_crop_pad(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let shape = cx.output_shape(infer_center_crop_pad)?;
    let choose = |(size, out): (&usize, &usize)| -> Vec<Option<usize>> {
        let (crop, pad) = (size.saturating_sub(*out) / 2, out.saturating_sub(*size) / 2);
        (0..*out).map(|i| (i + crop).checked_sub(pad).filter(|i| i < size)).collect()
    };
    let choices: Vec<_> = x.shape().iter().zip(&shape).map(choose).collect();
    Ok(vec![by_axis(x, &choices, None)?])
}
