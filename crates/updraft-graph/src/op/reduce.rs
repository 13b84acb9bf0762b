//! Reductions along axes, positions of extrema, and running sums and products.
//!
//! Axes are an attribute in old versions of these operators and an input in new ones; both are read here. Floats are
//! accumulated as `f64` in row-major order and rounded once.

use std::cmp::Ordering;

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::ValueId;
use crate::op::elementwise::{larger, smaller};
use crate::op::index::{Positions, around};
use crate::op::{Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, Shapes, resolve_axis};
use crate::tensor::{Tensor, strides};

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

/// The family.
pub(super) const OPS: &[Op] = &[
    reduction("ReduceSum", &[1, 11, 13], eval_sum).infer(infer_sum).gradient(sum_gradient),
    reduction("ReduceMean", &[1, 11, 13, 18], eval_mean).gradient(mean_gradient),
    reduction("ReduceProd", &[1, 11, 13, 18], eval_product).infer(infer_product).gradient(product_gradient),
    reduction("ReduceMax", &[1, 11, 12, 13, 18, 20], eval_max).gradient(extremum_gradient),
    reduction("ReduceMin", &[1, 11, 12, 13, 18, 20], eval_min).gradient(extremum_gradient),
    reduction("ReduceL1", &[1, 11, 13, 18], eval_l1).gradient(l1_gradient),
    reduction("ReduceL2", &[1, 11, 13, 18], eval_l2).gradient(l2_gradient),
    reduction("ReduceSumSquare", &[1, 11, 13, 18], eval_sum_square).gradient(sum_square_gradient),
    reduction("ReduceLogSum", &[1, 11, 13, 18, 28], eval_log_sum).gradient(log_sum_gradient),
    reduction("ReduceLogSumExp", &[1, 11, 13, 18, 28], eval_log_sum_exp).gradient(log_sum_exp_gradient),
    position("ArgMax", |cx| eval_position(cx, Ordering::Greater)),
    position("ArgMin", |cx| eval_position(cx, Ordering::Less)),
    running("CumSum", &[11, 14], |cx| eval_running(cx, 0.0, |a, b| a + b, 0, i128::wrapping_add))
        .gradient(cum_sum_gradient),
    running("CumProd", &[26], |cx| eval_running(cx, 1.0, |a, b| a * b, 1, i128::wrapping_mul))
        .no_gradient("not implemented: running products do not occur in training"),
];

const fn reduction(name: &'static str, versions: &'static [u32], eval: fn(&Eval) -> Evaluated) -> Op {
    Op::onnx(name, versions, Arity::range(1, 2), infer_reduction, eval).flops(one_flop_per_input).channels(channels)
}

const fn position(name: &'static str, eval: fn(&Eval) -> Evaluated) -> Op {
    Op::onnx(name, &[1, 11, 12, 13], Arity::exact(1), infer_position, eval)
        .flops(one_flop_per_input)
        .no_gradient("integer result")
        .channels(position_channels)
}

const fn running(name: &'static str, versions: &'static [u32], eval: fn(&Eval) -> Evaluated) -> Op {
    Op::onnx(name, versions, Arity::exact(2), infer_running, eval).flops(one_flop_per_input).channels(running_channels)
}

fn one_flop_per_input(shapes: &Shapes) -> u64 {
    shapes.input_len(0)
}

/// The axes to reduce for a rank, sorted. `given` is what the node says; nothing means all, or none with
/// `noop_with_empty_axes`.
fn axes_of(cx: &crate::op::OpView, given: Option<&[i64]>, rank: usize) -> Result<Vec<usize>, OpError> {
    let given = given.unwrap_or(&[]);
    if given.is_empty() {
        let none = cx.attributes().flag("noop_with_empty_axes", false)?;
        return Ok(if none { Vec::new() } else { (0..rank).collect() });
    }
    let mut axes: Vec<usize> = given.iter().map(|a| resolve_axis(*a, rank)).collect::<Result<_, _>>()?;
    axes.sort_unstable();
    axes.dedup();
    Ok(axes)
}

/// The axes of a node whose rank is known, unless they are computed at run time.
fn inferred_axes(cx: &Infer) -> Result<Option<Vec<usize>>, OpError> {
    let Some(rank) = cx.shape(0).map(<[Dim]>::len) else { return Ok(None) };
    if let Some(input) = cx.optional(1) {
        return input.constant_ints()?.map(|given| axes_of(cx, Some(&given), rank)).transpose();
    }
    axes_of(cx, cx.attributes().ints("axes")?, rank).map(Some)
}

fn keep_dims(cx: &crate::op::OpView) -> Result<bool, OpError> {
    cx.attributes().flag("keepdims", true)
}

fn reduced<D: Clone>(shape: &[D], axes: &[usize], keep: bool, one: D) -> Vec<D> {
    let dim = |(axis, size): (usize, &D)| match axes.contains(&axis) {
        false => Some(size.clone()),
        true => keep.then(|| one.clone()),
    };
    shape.iter().enumerate().filter_map(dim).collect()
}

fn infer_reduction(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let keep = keep_dims(cx)?;
    let shape = match (&x.shape, inferred_axes(cx)?) {
        (Some(shape), Some(axes)) => Some(reduced(shape, &axes, keep, Dim::Known(1))),
        (Some(shape), None) if keep => Some(vec![Dim::Unknown; shape.len()]),
        _ => None,
    };
    Ok(vec![Fact { dtype: x.dtype, shape, content: None }])
}

/// [`infer_reduction`], and the element too where a list of sizes is reduced to one.
fn infer_of_sizes(cx: &Infer, combine: fn(&[Dim]) -> Dim) -> Result<Vec<Fact>, OpError> {
    let mut facts = infer_reduction(cx)?;
    let all = inferred_axes(cx)?.is_some_and(|axes| axes == [0]);
    if let Some(content) = cx.input(0, "a tensor")?.content().filter(|_| all) {
        facts[0].content = Some(vec![combine(&content)]);
    }
    Ok(facts)
}

fn infer_sum(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    infer_of_sizes(cx, |sizes| sizes.iter().fold(Dim::Known(0), |sum, size| sum.plus(size)))
}

fn infer_product(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    infer_of_sizes(cx, |sizes| Dim::product(sizes))
}

fn channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let (Some(shape), Some(axes)) = (cx.shape(0), inferred_axes(cx)?) else {
        return Err(OpError::shape("rank and axes must be known"));
    };
    Ok(kept_links(shape.len(), &axes, keep_dims(cx)?))
}

/// Axes that are not reduced keep their indices.
fn kept_links(rank: usize, axes: &[usize], keep: bool) -> Vec<Link> {
    let kept = (0..rank).filter(|axis| !axes.contains(axis));
    let link = |(out, axis)| Link::Same(Axis::Input(0, axis), Axis::Output(0, if keep { axis } else { out }));
    kept.enumerate().map(link).collect()
}

/// What is reduced and to where: the operand, the output's shape, the place in the output of each element of the
/// operand, and how many elements meet in each place.
struct Plan<'a> {
    x: &'a Tensor,
    shape: Vec<usize>,
    places: Positions,
    count: usize,
}

impl Plan<'_> {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn fold<X: Copy, T: Clone>(&self, values: &[X], start: T, step: impl Fn(&T, X, usize) -> T) -> Vec<T> {
        let mut out = vec![start; self.len()];
        for (value, place) in values.iter().zip(self.places.clone()) {
            out[place] = step(&out[place], *value, place);
        }
        out
    }
}

fn plan<'a>(cx: &Eval<'a>) -> Result<Plan<'a>, OpError> {
    let x = cx.input(0)?;
    let axes = match cx.optional(1) {
        Some(given) => axes_of(cx, Some(&given.to_i64()?), x.rank())?,
        None => axes_of(cx, cx.attributes().ints("axes")?, x.rank())?,
    };
    Ok(plan_axes(x, &axes, keep_dims(cx)?))
}

fn plan_axes<'a>(x: &'a Tensor, axes: &[usize], keep: bool) -> Plan<'a> {
    let kept = reduced(x.shape(), axes, true, 1);
    let step = |(axis, stride): (usize, usize)| if axes.contains(&axis) { 0 } else { stride as isize };
    let walk: Vec<isize> = strides(&kept).into_iter().enumerate().map(step).collect();
    Plan {
        x,
        shape: reduced(x.shape(), axes, keep, 1),
        places: Positions::new(x.shape(), &walk, 0),
        count: axes.iter().map(|a| x.shape()[*a]).product(),
    }
}

/// Sums of a function of the elements, and a function of those.
fn reduce_floats(cx: &Eval, term: fn(f64) -> f64, finish: impl Fn(f64, usize) -> f64) -> Evaluated {
    let plan = plan(cx)?;
    let sums = plan.fold(&plan.x.to_f64()?, 0.0, |sum, x, _| sum + term(x));
    let values: Vec<f64> = sums.into_iter().map(|sum| finish(sum, plan.count)).collect();
    Ok(vec![Tensor::from_f64(plan.x.dtype(), &plan.shape, &values)?])
}

/// Integers exactly, floats as `f64`.
fn reduce_both(
    cx: &Eval,
    (start, step): (f64, fn(f64, f64) -> f64),
    integer: impl Fn(DType) -> (i128, fn(i128, i128) -> i128),
) -> Evaluated {
    let plan = plan(cx)?;
    let dtype = plan.x.dtype();
    let out = if dtype.is_float() {
        let values = plan.fold(&plan.x.to_f64()?, start, |a, x, _| step(*a, x));
        Tensor::from_f64(dtype, &plan.shape, &values)?
    } else {
        let (start, step) = integer(dtype);
        let values = plan.fold(&plan.x.to_i128()?, start, |a, x, _| step(*a, x));
        Tensor::from_i128(dtype, &plan.shape, &values)?
    };
    Ok(vec![out])
}

fn eval_sum(cx: &Eval) -> Evaluated {
    reduce_both(cx, (0.0, |a, b| a + b), |_| (0, i128::wrapping_add))
}

fn eval_product(cx: &Eval) -> Evaluated {
    reduce_both(cx, (1.0, |a, b| a * b), |_| (1, i128::wrapping_mul))
}

/// The maximum of nothing is the least value of the type.
fn eval_max(cx: &Eval) -> Evaluated {
    let least = |dtype: DType| dtype.integer_range().map_or(0, |(least, _)| least);
    reduce_both(cx, (f64::NEG_INFINITY, larger), |dtype| (least(dtype), i128::max))
}

/// The minimum of nothing is the greatest value of the type.
fn eval_min(cx: &Eval) -> Evaluated {
    let greatest = |dtype: DType| dtype.integer_range().map_or(1, |(_, greatest)| greatest);
    reduce_both(cx, (f64::INFINITY, smaller), |dtype| (greatest(dtype), i128::min))
}

fn eval_mean(cx: &Eval) -> Evaluated {
    reduce_floats(cx, |x| x, |sum, count| sum / count as f64)
}

fn eval_l1(cx: &Eval) -> Evaluated {
    reduce_both(cx, (0.0, |a, b| a + b.abs()), |_| (0, |a, b| a.wrapping_add(b.wrapping_abs())))
}

fn eval_l2(cx: &Eval) -> Evaluated {
    reduce_floats(cx, |x| x * x, |sum, _| sum.sqrt())
}

fn eval_sum_square(cx: &Eval) -> Evaluated {
    reduce_both(cx, (0.0, |a, b| a + b * b), |_| (0, |a, b| a.wrapping_add(b.wrapping_mul(b))))
}

fn eval_log_sum(cx: &Eval) -> Evaluated {
    reduce_floats(cx, |x| x, |sum, _| libm::log(sum))
}

/// The maximum is taken out first, so that no exponential overflows.
fn eval_log_sum_exp(cx: &Eval) -> Evaluated {
    let plan = plan(cx)?;
    let x = plan.x.to_f64()?;
    let largest = plan.fold(&x, f64::NEG_INFINITY, |a, x, _| larger(*a, x));
    let shift = |m: f64| if m.is_finite() { m } else { 0.0 };
    let sums = plan.fold(&x, 0.0, |sum, x, place| sum + libm::exp(x - shift(largest[place])));
    let values: Vec<f64> = sums.iter().zip(&largest).map(|(sum, m)| libm::log(*sum) + shift(*m)).collect();
    Ok(vec![Tensor::from_f64(plan.x.dtype(), &plan.shape, &values)?])
}

fn infer_position(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (axis, keep) = (cx.attributes().int("axis", 0)?, keep_dims(cx)?);
    let shape = match cx.shape(0) {
        Some(shape) => Some(reduced(shape, &[resolve_axis(axis, shape.len())?], keep, Dim::Known(1))),
        None => None,
    };
    Ok(vec![Fact { dtype: Some(DType::I64), shape, content: None }])
}

fn position_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let rank = cx.shape(0).ok_or_else(|| OpError::shape("the rank must be known"))?.len();
    let axis = resolve_axis(cx.attributes().int("axis", 0)?, rank)?;
    let mut links = kept_links(rank, &[axis], keep_dims(cx)?);
    links.push(Link::Fixed(Axis::Input(0, axis), "the result counts along it"));
    Ok(links)
}

/// The first (or last) position of the element that compares so with all others.
fn eval_position(cx: &Eval, wins: Ordering) -> Evaluated {
    fn search<T: PartialOrd + Copy>(values: &[T], lanes: [usize; 3], wins: Ordering, last: bool) -> Vec<i64> {
        let [outer, along, inner] = lanes;
        let starts = (0..outer).flat_map(|o| (0..inner).map(move |i| o * along * inner + i));
        let best_of = |start: usize| {
            (1..along).fold(0, |best, i| {
                let order = values[start + i * inner].partial_cmp(&values[start + best * inner]);
                if order == Some(wins) || (last && order == Some(Ordering::Equal)) { i } else { best }
            })
        };
        starts.map(|start| best_of(start) as i64).collect()
    }
    let x = cx.input(0)?;
    let axis = resolve_axis(cx.attributes().int("axis", 0)?, x.rank())?;
    let last = cx.attributes().flag("select_last_index", false)?;
    let lanes = around(x.shape(), axis);
    if lanes[1] == 0 && lanes[0] * lanes[2] > 0 {
        return Err(OpError::shape(format!("no extremum along axis {axis} of shape {:?}", x.shape())));
    }
    let positions = match x.dtype().is_float() {
        true => search(&x.to_f64()?, lanes, wins, last),
        false => search(&x.to_i128()?, lanes, wins, last),
    };
    Ok(vec![Tensor::new(&reduced(x.shape(), &[axis], keep_dims(cx)?, 1), &positions)?])
}

fn infer_running(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    Ok(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: None }])
}

fn running_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let rank = cx.shape(0).ok_or_else(|| OpError::shape("the rank must be known"))?.len();
    let axis = cx.input(1, "the axis")?.constant_ints()?.and_then(|a| a.first().copied());
    let axis = resolve_axis(axis.ok_or_else(|| OpError::shape("the axis must be constant"))?, rank)?;
    let link = |a| match a == axis {
        true => Link::Fixed(Axis::Input(0, a), "each element depends on those before it"),
        false => Link::Same(Axis::Input(0, a), Axis::Output(0, a)),
    };
    Ok((0..rank).map(link).collect())
}

/// Inputs: x, axis. With `exclusive` an element does not count itself; with `reverse` the end comes first.
fn eval_running(
    cx: &Eval,
    start: f64,
    step: fn(f64, f64) -> f64,
    integer_start: i128,
    integer_step: fn(i128, i128) -> i128,
) -> Evaluated {
    fn run<T: Copy>(
        values: &[T],
        [outer, along, inner]: [usize; 3],
        (exclusive, reverse): (bool, bool),
        start: T,
        step: fn(T, T) -> T,
    ) -> Vec<T> {
        let mut out = values.to_vec();
        for lane in (0..outer).flat_map(|o| (0..inner).map(move |i| o * along * inner + i)) {
            let mut sum = start;
            for i in 0..along {
                let at = lane + if reverse { along - 1 - i } else { i } * inner;
                let before = sum;
                sum = step(sum, values[at]);
                out[at] = if exclusive { before } else { sum };
            }
        }
        out
    }
    let (x, axis) = (cx.input(0)?, cx.input(1)?);
    let axis = axis.to_i64()?.first().copied().ok_or_else(|| OpError::shape("the axis must be a scalar"))?;
    let lanes = around(x.shape(), resolve_axis(axis, x.rank())?);
    let order = (cx.attributes().flag("exclusive", false)?, cx.attributes().flag("reverse", false)?);
    let out = if x.dtype().is_float() {
        Tensor::from_f64(x.dtype(), x.shape(), &run(&x.to_f64()?, lanes, order, start, step))?
    } else {
        Tensor::from_i128(x.dtype(), x.shape(), &run(&x.to_i128()?, lanes, order, integer_start, integer_step))?
    };
    Ok(vec![out])
}

/// An element flows into the sums after it, so its gradient is the sum of theirs.
fn cum_sum_gradient(cx: &mut Gradient) -> Grads {
    let (axis, dy) = (cx.input(1)?, cx.grad()?);
    let mut attributes = cx.node.attributes.clone();
    attributes.set("reverse", i64::from(!attributes.flag("reverse", false)?));
    Ok(vec![Some(cx.op_with("CumSum", &[dy, axis], attributes)?), None])
}

/// Only x has a gradient; the axes have none.
fn of_x(cx: &Gradient, dx: ValueId) -> Grads {
    Ok(std::iter::once(Some(dx)).chain(vec![None; cx.node.inputs.len() - 1]).collect())
}

/// A value shaped like the output with the reduced axes back as axes of size 1.
fn with_axes(cx: &mut Gradient, value: ValueId) -> Result<ValueId, OpError> {
    if keep_dims(&cx.view())? {
        return Ok(value);
    }
    let axes = inferred_axes(&Infer::new(cx.graph, &cx.node))?
        .ok_or_else(|| OpError::unsupported("gradient of a reduction whose rank or axes are computed at run time"))?;
    let axes: Vec<i64> = axes.into_iter().map(|a| a as i64).collect();
    let axes = cx.ints(&axes);
    cx.op("Unsqueeze", &[value, axes])
}

/// The gradient of the output with the reduced axes back as axes of size 1.
fn grad_with_axes(cx: &mut Gradient) -> Result<ValueId, OpError> {
    let dy = cx.grad()?;
    with_axes(cx, dy)
}

fn expand(cx: &mut Gradient, value: ValueId) -> Grads {
    let x = cx.input(0)?;
    let shape = cx.op("Shape", &[x])?;
    let dx = cx.op("Expand", &[value, shape])?;
    of_x(cx, dx)
}

fn sum_gradient(cx: &mut Gradient) -> Grads {
    let dy = grad_with_axes(cx)?;
    expand(cx, dy)
}

/// Each element takes its share: dy divided by how many elements meet.
fn mean_gradient(cx: &mut Gradient) -> Grads {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, grad_with_axes(cx)?);
    let (whole, left) = (Dim::product(&cx.shape(x)?), Dim::product(&cx.shape(y)?));
    let count = match whole.divide_exact(&left).and_then(|n| n.known()) {
        Some(count) => cx.scalar_like(count as f64, x)?,
        None => {
            let (whole, left) = (cx.op("Size", &[x])?, cx.op("Size", &[y])?);
            let count = cx.op("Div", &[whole, left])?;
            cx.cast_like(count, x)?
        }
    };
    let share = cx.op("Div", &[dy, count])?;
    expand(cx, share)
}

/// dx = dy y / x, not a number where x is zero.
fn product_gradient(cx: &mut Gradient) -> Grads {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, grad_with_axes(cx)?);
    let y = with_axes(cx, y)?;
    let product = cx.op("Mul", &[dy, y])?;
    let dx = cx.op("Div", &[product, x])?;
    of_x(cx, dx)
}

/// Elements that attain the extremum share the gradient equally.
fn extremum_gradient(cx: &mut Gradient) -> Grads {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, grad_with_axes(cx)?);
    let y = with_axes(cx, y)?;
    let attains = cx.op("Equal", &[x, y])?;
    let mask = cx.cast_like(attains, x)?;
    let inputs: Vec<_> = std::iter::once(Some(mask)).chain(cx.node.inputs.iter().skip(1).copied()).collect();
    let mut attributes = cx.node.attributes.clone();
    attributes.set("keepdims", 1);
    let count = cx.graph.op_n("", "ReduceSum", &inputs, attributes, 1)?[0];
    let share = cx.op("Div", &[dy, count])?;
    let dx = cx.op("Mul", &[mask, share])?;
    of_x(cx, dx)
}

fn l1_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, grad_with_axes(cx)?);
    let sign = cx.op("Sign", &[x])?;
    let dx = cx.op("Mul", &[dy, sign])?;
    of_x(cx, dx)
}

/// dx = dy x / y, and zero where the norm is.
fn l2_gradient(cx: &mut Gradient) -> Grads {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, grad_with_axes(cx)?);
    let y = with_axes(cx, y)?;
    let zero = cx.scalar_like(0.0, x)?;
    let is_zero = cx.op("Equal", &[y, zero])?;
    let quotient = cx.op("Div", &[dy, y])?;
    let factor = cx.op("Where", &[is_zero, zero, quotient])?;
    let dx = cx.op("Mul", &[factor, x])?;
    of_x(cx, dx)
}

fn sum_square_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, grad_with_axes(cx)?);
    let two = cx.scalar_like(2.0, x)?;
    let slope = cx.op("Mul", &[two, x])?;
    let dx = cx.op("Mul", &[dy, slope])?;
    of_x(cx, dx)
}

/// dx = dy e^-y, since e^y is the sum.
fn log_sum_gradient(cx: &mut Gradient) -> Grads {
    let (y, dy) = (cx.output(0)?, grad_with_axes(cx)?);
    let y = with_axes(cx, y)?;
    let negative = cx.op("Neg", &[y])?;
    let inverse = cx.op("Exp", &[negative])?;
    let share = cx.op("Mul", &[dy, inverse])?;
    expand(cx, share)
}

/// dx = dy e^(x - y)
fn log_sum_exp_gradient(cx: &mut Gradient) -> Grads {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, grad_with_axes(cx)?);
    let y = with_axes(cx, y)?;
    let difference = cx.op("Sub", &[x, y])?;
    let share = cx.op("Exp", &[difference])?;
    let dx = cx.op("Mul", &[dy, share])?;
    of_x(cx, dx)
}
