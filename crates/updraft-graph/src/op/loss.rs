//! ONNX's losses over classes: NegativeLogLikelihoodLoss of log-probabilities, and SoftmaxCrossEntropyLoss of scores.
//!
//! Both take inputs `[N, C, d...]` and labels `[N, d...]`, may weigh classes, and leave out the label `ignore_index`.
//! The mean divides by the sum of the weights of the labels that count, so a batch without any has no mean (NaN).

use crate::attribute::Attributes;
use crate::dim::Dim;
use crate::graph::{UPDRAFT_DOMAIN, ValueId};
use crate::op::conv::expect_shape;
use crate::op::softmax::{Lines, log_softmax};
use crate::op::{Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, Shapes, filled, show_shape};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("NegativeLogLikelihoodLoss", &[12, 13, 22], Arity::range(2, 3), infer_loss, eval_negative_log_likelihood)
        .gradient(negative_log_likelihood_gradient)
        .flops(negative_log_likelihood_flops)
        .channels(loss_links),
    Op::onnx(
        "SoftmaxCrossEntropyLoss",
        &[12, 13],
        Arity::range(2, 3).outputs(1, 2),
        infer_loss,
        eval_softmax_cross_entropy,
    )
    .gradient(softmax_cross_entropy_gradient)
    .flops(softmax_cross_entropy_flops)
    .channels(loss_links),
];

/// What becomes of the losses of the labels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reduction {
    None,
    Sum,
    Mean,
}

impl Reduction {
    fn of(attributes: &Attributes) -> Result<Reduction, OpError> {
        match attributes.string("reduction", "mean")? {
            "none" => Ok(Reduction::None),
            "sum" => Ok(Reduction::Sum),
            "mean" => Ok(Reduction::Mean),
            other => {
                Err(OpError::attribute("reduction", format!("is {other:?}; \"none\", \"sum\" and \"mean\" are known")))
            }
        }
    }
}

fn infer_loss(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = Fact { content: None, ..cx.input(0, "input [N, C, ...]")?.fact.clone() };
    let labels = cx.input(1, "labels [N, ...]")?.shape.clone();
    if let (Some(x), Some(labels)) = (&x.shape, &labels) {
        let fits = x.len() >= 2
            && labels.len() + 1 == x.len()
            && !labels[0].differs(&x[0])
            && labels[1..].iter().zip(&x[2..]).all(|(a, b)| !a.differs(b));
        if !fits {
            let message = format!("labels of shape {} for inputs of shape {}", show_shape(labels), show_shape(x));
            return Err(OpError::shape(message));
        }
    }
    let from_x = x.shape.as_ref().and_then(|x| Some([x.get(..1)?, x.get(2..)?].concat()));
    let shape = match Reduction::of(cx.attributes())? {
        Reduction::None => labels.or(from_x),
        _ => Some(Vec::<Dim>::new()),
    };
    Ok(vec![Fact { dtype: x.dtype, shape, content: None }, x])
}

/// The loss of log-probabilities of shape `shape`, which are given as numbers.
fn reduce(cx: &Eval, log_probabilities: &[f64], shape: &[usize]) -> Result<Tensor, OpError> {
    let labels = cx.input(1)?;
    if shape.len() < 2 {
        return Err(OpError::shape(format!("an input of shape {shape:?}, expected [N, C, ...]")));
    }
    let classes = shape[1];
    expect_shape(labels, &[&shape[..1], &shape[2..]].concat(), "the labels")?;
    let weights = match cx.optional(2) {
        Some(weights) => {
            expect_shape(weights, &[classes], "the weights")?;
            weights.to_f64()?
        }
        None => vec![1.0; classes],
    };
    let ignored = cx.attributes().optional_int("ignore_index")?;
    let lines = Lines::along(shape, 1);
    let mut losses = filled(labels.shape(), 0.0)?;
    let mut weight_sum = 0.0;
    for (i, label) in labels.to_i64()?.into_iter().enumerate() {
        if Some(label) == ignored {
            continue;
        }
        let class = usize::try_from(label).ok().filter(|c| *c < classes);
        let class = class.ok_or_else(|| OpError::value(format!("label {label} at {i} for {classes} classes")))?;
        let position = (i / lines.inner * classes + class) * lines.inner + i % lines.inner;
        losses[i] = -log_probabilities[position] * weights[class];
        weight_sum += weights[class];
    }
    let dtype = cx.input(0)?.dtype();
    let sum: f64 = losses.iter().sum();
    Ok(match Reduction::of(cx.attributes())? {
        Reduction::None => Tensor::from_f64(dtype, labels.shape(), &losses)?,
        Reduction::Sum => Tensor::from_f64(dtype, &[], &[sum])?,
        Reduction::Mean => Tensor::from_f64(dtype, &[], &[sum / weight_sum])?,
    })
}

fn eval_negative_log_likelihood(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    Ok(vec![reduce(cx, &x.to_f64()?, x.shape())?])
}

fn eval_softmax_cross_entropy(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    if x.rank() < 2 {
        return Err(OpError::shape(format!("an input of shape {:?}, expected [N, C, ...]", x.shape())));
    }
    let mut values = x.to_f64()?;
    for line in Lines::along(x.shape(), 1).positions() {
        let made = log_softmax(&line.clone().map(|i| values[i]).collect::<Vec<_>>());
        line.zip(made).for_each(|(i, y)| values[i] = y);
    }
    Ok(vec![reduce(cx, &values, x.shape())?, Tensor::from_f64(x.dtype(), x.shape(), &values)?])
}

/// The gradient with respect to the log-probabilities: minus the weight of the label at the label, over the sum of
/// weights where the loss is a mean.
fn log_probability_gradient(cx: &mut Gradient) -> Result<ValueId, OpError> {
    let (x, labels, mut dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let (labels, counts) = match cx.node.attributes.optional_int("ignore_index")? {
        Some(ignored) => {
            let ignored = integer_like(cx, ignored, labels)?;
            let skipped = cx.op("Equal", &[labels, ignored])?;
            let counted = cx.op("Not", &[skipped])?;
            // Any class will do where the weight is zero.
            let zero = integer_like(cx, 0, labels)?;
            let safe = cx.op("Where", &[skipped, zero, labels])?;
            (safe, Some(cx.op("CastLike", &[counted, dy])?))
        }
        None => (labels, None),
    };
    let weights = match cx.optional(2) {
        Some(weights) => Some(cx.op("Gather", &[weights, labels])?),
        None => None,
    };
    let weights = match (weights, counts) {
        (Some(weights), Some(counts)) => Some(cx.op("Mul", &[weights, counts])?),
        (weights, counts) => weights.or(counts),
    };
    if Reduction::of(&cx.node.attributes)? == Reduction::Mean {
        let sum = match weights {
            Some(weights) => cx.op_with("ReduceSum", &[weights], [("keepdims", 0.into())])?,
            None => {
                let count = cx.op("Size", &[labels])?;
                cx.op("CastLike", &[count, dy])?
            }
        };
        dy = cx.op("Div", &[dy, sum])?;
    }
    if let Some(weights) = weights {
        dy = cx.op("Mul", &[dy, weights])?;
    }
    let dy = cx.op("Neg", &[dy])?;
    let labels_shape = cx.op("Shape", &[labels])?;
    let dy = cx.op("Expand", &[dy, labels_shape])?;
    let axis = cx.graph.add_constant("axes", Tensor::vector(&[1i64]));
    let dy = cx.op("Unsqueeze", &[dy, axis])?;
    let classes = cx.op_with("Shape", &[x], [("start", 1.into()), ("end", 2.into())])?;
    let dtype = cx.graph.dtype(x).ok_or_else(|| OpError::dtype("the gradient needs the input's type"))?;
    let off_on = cx.graph.add_constant("off_on", Tensor::from_f64(dtype, &[2], &[0.0, 1.0])?);
    let at_label = cx.op_with("OneHot", &[labels, classes, off_on], [("axis", 1.into())])?;
    cx.op("Mul", &[at_label, dy])
}

fn integer_like(cx: &mut Gradient, value: i64, like: ValueId) -> Result<ValueId, OpError> {
    let dtype = cx.graph.dtype(like).ok_or_else(|| OpError::dtype("the gradient needs the labels' type"))?;
    Ok(cx.graph.add_constant("constant", Tensor::from_i128(dtype, &[], &[i128::from(value)])?))
}

fn negative_log_likelihood_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    if cx.wants(2) {
        return Err(OpError::unsupported("gradient with respect to the weights of classes"));
    }
    Ok(vec![Some(log_probability_gradient(cx)?)])
}

fn softmax_cross_entropy_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    if cx.wants(2) {
        return Err(OpError::unsupported("gradient with respect to the weights of classes"));
    }
    let direct = cx.grads.get(1).copied().flatten();
    let through_loss = match cx.grads.first().copied().flatten() {
        Some(_) => Some(log_probability_gradient(cx)?),
        None => None,
    };
    let total = match (through_loss, direct) {
        (Some(a), Some(b)) => cx.op("Add", &[a, b])?,
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => return Ok(vec![None]),
    };
    let x = cx.input(0)?;
    let log_probabilities = match cx.node.outputs.get(1).copied().flatten() {
        Some(kept) => kept,
        None => cx.op_with("LogSoftmax", &[x], [("axis", 1.into())])?,
    };
    let operands = [Some(total), Some(log_probabilities)];
    let made = cx.graph.op_n(UPDRAFT_DOMAIN, "LogSoftmaxGradient", &operands, [("axis", 1.into())], 1)?;
    Ok(vec![Some(made[0])])
}

fn negative_log_likelihood_flops(shapes: &Shapes) -> u64 {
    2 * shapes.input_len(1)
}

fn softmax_cross_entropy_flops(shapes: &Shapes) -> u64 {
    5 * shapes.input_len(0) + 2 * shapes.input_len(1)
}

fn loss_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let mut links = vec![
        Link::Same(Axis::Input(0, 0), Axis::Input(1, 0)),
        Link::Fixed(Axis::Input(0, 1), "labels count its classes"),
    ];
    if cx.optional(2).is_some() {
        links.push(Link::Same(Axis::Input(2, 0), Axis::Input(0, 1)));
    }
    Ok(links)
}
