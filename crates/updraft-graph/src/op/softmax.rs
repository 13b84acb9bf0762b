//! Softmax, its logarithm and its hard form, along one axis.
//!
//! Until opset 12 the operators flattened their input to two dimensions at the axis and normalised whole rows; since
//! opset 13 they normalise along the one axis. [`Lines`] covers both.

use crate::attribute::Attributes;
use crate::graph::{UPDRAFT_DOMAIN, ValueId};
use crate::op::conv::expect_shape;
use crate::op::{
    AFTER_STRUCTURE, Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, OpView, Rule, SECOND_ORDER, Shapes,
    resolve_axis,
};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op { gradient: Rule::Is(softmax_gradient), ..along_axis("Softmax", eval_softmax) },
    Op { gradient: Rule::Is(log_softmax_gradient), ..along_axis("LogSoftmax", eval_log_softmax) },
    along_axis("Hardmax", eval_hardmax),
    gradient_of("SoftmaxGradient", eval_softmax_gradient),
    gradient_of("LogSoftmaxGradient", eval_log_softmax_gradient),
];

const fn along_axis(name: &'static str, eval: fn(&Eval) -> Result<Vec<Tensor>, OpError>) -> Op {
    Op {
        name,
        domain: "",
        versions: &[1, 11, 13],
        arity: Arity::exact(1),
        infer: infer_like_input,
        eval: Rule::Is(eval),
        gradient: Rule::None("it is constant but for jumps"),
        flops: softmax_flops,
        channels: Rule::Is(softmax_channels),
    }
}

const fn gradient_of(name: &'static str, eval: fn(&Eval) -> Result<Vec<Tensor>, OpError>) -> Op {
    Op {
        name,
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(2),
        infer: infer_like_input,
        eval: Rule::Is(eval),
        gradient: Rule::None(SECOND_ORDER),
        flops: softmax_gradient_flops,
        channels: Rule::None(AFTER_STRUCTURE),
    }
}

/// The elements of a tensor as lines of `len` elements, `inner` apart.
pub(super) struct Lines {
    /// Lines before an axis, each with `inner` lines beside it.
    pub(super) outer: usize,
    /// Elements of a line.
    pub(super) len: usize,
    /// Steps between the elements of a line.
    pub(super) inner: usize,
}

impl Lines {
    /// The lines along one axis.
    pub(super) fn along(shape: &[usize], axis: usize) -> Lines {
        Lines { outer: shape[..axis].iter().product(), len: shape[axis], inner: shape[axis + 1..].iter().product() }
    }

    /// The lines of all axes from one on.
    pub(super) fn from(shape: &[usize], axis: usize) -> Lines {
        Lines { outer: shape[..axis].iter().product(), len: shape[axis..].iter().product(), inner: 1 }
    }

    /// Number of lines.
    pub(super) fn count(&self) -> usize {
        self.outer * self.inner
    }

    /// The positions of the elements of each line.
    pub(super) fn positions(&self) -> impl Iterator<Item = impl Iterator<Item = usize> + Clone + use<>> + use<> {
        let Lines { outer, len, inner } = *self;
        (0..outer).flat_map(move |o| (0..inner).map(move |i| (0..len).map(move |k| (o * len + k) * inner + i)))
    }
}

/// The output has the type and shape of the first input.
pub(super) fn infer_like_input(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let fact = cx.input(0, "input")?.fact.clone();
    if let Some(shape) = &fact.shape {
        axis_of(&cx.view, shape.len())?;
    }
    Ok(vec![Fact { content: None, ..fact }])
}

/// The axis, and whether all axes after it belong to it.
fn axis_of(view: &OpView, rank: usize) -> Result<(usize, bool), OpError> {
    let flattens = view.node.domain != UPDRAFT_DOMAIN && view.opset < 13;
    let axis = view.attributes().int("axis", if flattens { 1 } else { -1 })?;
    // A matrix of one column comes from an axis behind the last.
    if flattens && axis == rank as i64 {
        return Ok((rank, true));
    }
    Ok((resolve_axis(axis, rank)?, flattens))
}

fn lines_of(cx: &Eval, shape: &[usize]) -> Result<Lines, OpError> {
    if shape.is_empty() {
        return Ok(Lines { outer: 1, len: 1, inner: 1 });
    }
    Ok(match axis_of(&cx.view, shape.len())? {
        (axis, true) => Lines::from(shape, axis),
        (axis, false) => Lines::along(shape, axis),
    })
}

/// Replaces each line of the first input by what `f` makes of it.
fn map_lines(cx: &Eval, f: impl Fn(&[f64]) -> Vec<f64>) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let mut values = x.to_f64()?;
    for line in lines_of(cx, x.shape())?.positions() {
        let made = f(&line.clone().map(|i| values[i]).collect::<Vec<_>>());
        for (i, y) in line.zip(made) {
            values[i] = y;
        }
    }
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &values)?])
}

/// The softmax of one line. The maximum is taken off first, so that no exponential overflows.
pub(super) fn softmax(line: &[f64]) -> Vec<f64> {
    let max = line.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = line.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|e| e / sum).collect()
}

/// The logarithm of the softmax of one line.
pub(super) fn log_softmax(line: &[f64]) -> Vec<f64> {
    let max = line.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = line.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    line.iter().map(|x| x - max - log_sum).collect()
}

fn eval_softmax(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    map_lines(cx, softmax)
}

fn eval_log_softmax(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    map_lines(cx, log_softmax)
}

/// One at the first maximum, else zero.
fn eval_hardmax(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    map_lines(cx, |line| {
        let first = (1..line.len()).fold(0, |best, i| if line[i] > line[best] { i } else { best });
        (0..line.len()).map(|i| f64::from(u8::from(i == first))).collect()
    })
}

/// Combines each line of the gradient `dy` with the line of the output `y`.
fn map_gradient(cx: &Eval, f: impl Fn(&[f64], &[f64]) -> Vec<f64>) -> Result<Vec<Tensor>, OpError> {
    let (dy, y) = (cx.input(0)?, cx.input(1)?);
    expect_shape(dy, y.shape(), "the gradient of the output")?;
    let (dy_values, y_values) = (dy.to_f64()?, y.to_f64()?);
    let mut dx = vec![0.0; dy_values.len()];
    for line in lines_of(cx, y.shape())?.positions() {
        let pick = |from: &[f64]| line.clone().map(|i| from[i]).collect::<Vec<_>>();
        let made = f(&pick(&dy_values), &pick(&y_values));
        for (i, d) in line.zip(made) {
            dx[i] = d;
        }
    }
    Ok(vec![Tensor::from_f64(dy.dtype(), dy.shape(), &dx)?])
}

/// dx = y (dy - sum(dy y)).
fn eval_softmax_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    map_gradient(cx, |dy, y| {
        let dot: f64 = dy.iter().zip(y).map(|(d, y)| d * y).sum();
        dy.iter().zip(y).map(|(d, y)| y * (d - dot)).collect()
    })
}

/// dx = dy - exp(y) sum(dy).
fn eval_log_softmax_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    map_gradient(cx, |dy, y| {
        let sum: f64 = dy.iter().sum();
        dy.iter().zip(y).map(|(d, y)| d - y.exp() * sum).collect()
    })
}

fn softmax_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    gradient_along_axis(cx, "SoftmaxGradient")
}

fn log_softmax_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    gradient_along_axis(cx, "LogSoftmaxGradient")
}

fn gradient_along_axis(cx: &mut Gradient, op: &str) -> Result<Vec<Option<ValueId>>, OpError> {
    if cx.graph.opset("").is_some_and(|opset| opset < 13) {
        return Err(OpError::unsupported("gradient of a softmax of opset 12 or older; upgrade the graph first"));
    }
    let (y, dy) = (cx.output(0)?, cx.grad()?);
    let axis = cx.node.attributes.int("axis", -1)?;
    Ok(vec![Some(cx.graph.own_op(op, &[dy, y], Attributes::from([("axis", axis.into())]))?)])
}

/// Maximum, difference, exponential, sum and quotient for each element.
fn softmax_flops(shapes: &Shapes) -> u64 {
    5 * shapes.output_len(0)
}

fn softmax_gradient_flops(shapes: &Shapes) -> u64 {
    4 * shapes.output_len(0)
}

fn softmax_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let shape = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the input must be known"))?;
    let (axis, flattens) = axis_of(&cx.view, shape.len())?;
    let mut links = Vec::new();
    for i in 0..shape.len() {
        links.push(Link::Same(Axis::Input(0, i), Axis::Output(0, i)));
        if i == axis || (flattens && i > axis) {
            links.push(Link::Fixed(Axis::Input(0, i), "every element takes part in the normalisation"));
        }
    }
    Ok(links)
}
