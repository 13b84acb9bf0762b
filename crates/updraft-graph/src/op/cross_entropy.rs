//! Cross-entropy of integer labels, and its gradient.
//!
//! ONNX's SoftmaxCrossEntropyLoss has no label smoothing, so training has an operator of its own. The definition is that
//! of `torch.nn.CrossEntropyLoss` with `reduction="mean"` (documentation of PyTorch 2.15); label smoothing is Szegedy et
//! al., "Rethinking the Inception architecture for computer vision", section 7.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{UPDRAFT_DOMAIN, ValueId};
use crate::op::{Arity, Eval, Fact, Gradient, Infer, Op, OpError, OpView, Rule, Shapes, show_shape};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op {
        name: "CrossEntropyLoss",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(2).outputs(1, 2),
        infer: infer_loss,
        eval: Rule::Is(eval_loss),
        gradient: Rule::Is(loss_gradient),
        flops: loss_flops,
        channels: Rule::None("the classes are what the labels count"),
    },
    Op {
        name: "CrossEntropyLossGradient",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(3),
        infer: infer_gradient,
        eval: Rule::Is(eval_gradient),
        gradient: Rule::None("the second derivative of the cross-entropy is not written"),
        flops: gradient_flops,
        channels: Rule::None("the classes are what the labels count"),
    },
];

/// PyTorch's default of `ignore_index`.
const IGNORE_INDEX: i64 = -100;

/// `CrossEntropyLoss(logits [N, C, d..], labels [N, d..]) -> (loss [], log_prob [N, C, d..])`.
///
/// `log_prob` is the logarithm of the softmax over axis 1. The loss of a label `y` is
/// `-(1 - s) log_prob[y] - s / C * sum over c of log_prob[c]` for a smoothing `s`; the output is the mean over labels that
/// are not `ignore_index`, and not a number where there are none.
fn infer_loss(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = cx.input(0, "logits")?.dtype;
    check_types(cx, 0, 1)?;
    check_shapes(cx.shape(0), cx.shape(1))?;
    smoothing(cx)?;
    let log_prob = Fact { dtype, shape: cx.shape(0).map(<[Dim]>::to_vec), content: None };
    Ok(vec![Fact::tensor(dtype, Vec::new()), log_prob])
}

/// `CrossEntropyLossGradient(dloss [], log_prob [N, C, d..], labels [N, d..]) -> dlogits [N, C, d..]`, attributes as in
/// CrossEntropyLoss.
fn infer_gradient(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = cx.input(1, "logarithms of probabilities")?.dtype;
    check_types(cx, 1, 2)?;
    cx.expect_rank(0, 0, "the gradient of the loss")?;
    check_shapes(cx.shape(1), cx.shape(2))?;
    smoothing(cx)?;
    Ok(vec![Fact { dtype, shape: cx.shape(1).map(<[Dim]>::to_vec), content: None }])
}

fn check_types(cx: &Infer, scores: usize, labels: usize) -> Result<(), OpError> {
    if let Some(dtype) = cx.dtype(scores).filter(|d| !d.is_float()) {
        return Err(OpError::dtype(format!("logits must be floats, found {dtype}")));
    }
    match cx.input(labels, "labels")?.dtype {
        Some(dtype) if dtype != DType::I64 && dtype != DType::I32 => {
            Err(OpError::dtype(format!("labels must be i64 or i32, found {dtype}")))
        }
        _ => Ok(()),
    }
}

fn check_shapes(logits: Option<&[Dim]>, labels: Option<&[Dim]>) -> Result<(), OpError> {
    let Some(logits) = logits else { return Ok(()) };
    if logits.len() < 2 {
        return Err(OpError::shape(format!("logits must be [N, C, d..], found {}", show_shape(logits))));
    }
    let Some(labels) = labels else { return Ok(()) };
    let expected: Vec<Dim> = logits.iter().enumerate().filter(|(i, _)| *i != 1).map(|(_, d)| d.clone()).collect();
    if labels.len() != expected.len() || labels.iter().zip(&expected).any(|(a, b)| a.differs(b)) {
        return Err(OpError::shape(format!(
            "labels for logits {} must be {}, found {}",
            show_shape(logits),
            show_shape(&expected),
            show_shape(labels)
        )));
    }
    Ok(())
}

fn smoothing(view: &OpView) -> Result<f64, OpError> {
    let smoothing = view.attributes().float("label_smoothing", 0.0)?;
    if (0.0..=1.0).contains(&smoothing) {
        Ok(f64::from(smoothing))
    } else {
        Err(OpError::attribute("label_smoothing", format!("must be in [0, 1], found {smoothing}")))
    }
}

/// The labels as classes, `None` where ignored, and how scores are laid out: `[outer, classes, inner]`.
fn read_labels(view: &OpView, scores: &Tensor, labels: &Tensor) -> Result<(Vec<Option<usize>>, [usize; 3]), OpError> {
    check_shapes(Some(&crate::dim::dims(scores.shape())), Some(&crate::dim::dims(labels.shape())))?;
    let ignored = view.attributes().int("ignore_index", IGNORE_INDEX)?;
    let classes = scores.shape()[1];
    let inner = scores.shape()[2..].iter().product();
    let classify = |label: i64| match usize::try_from(label) {
        _ if label == ignored => Ok(None),
        Ok(class) if class < classes => Ok(Some(class)),
        _ => Err(OpError::value(format!("label {label} is neither in [0, {classes}) nor {ignored}, the ignored one"))),
    };
    let labels = labels.to_i64()?.into_iter().map(classify).collect::<Result<_, _>>()?;
    Ok((labels, [scores.shape()[0], classes, inner]))
}

fn eval_loss(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (logits, labels) = (cx.input(0)?, cx.input(1)?);
    let smoothing = smoothing(cx)?;
    let (labels, [outer, classes, inner]) = read_labels(cx, logits, labels)?;
    let mut log_prob = logits.to_f64()?;
    let (mut sum, mut count) = (0.0, 0.0);
    for row in 0..outer * inner {
        let start = row / inner * classes * inner + row % inner;
        let at = |class: usize| start + class * inner;
        let maximum = (0..classes).fold(f64::NEG_INFINITY, |m, c| m.max(log_prob[at(c)]));
        let total: f64 = (0..classes).map(|c| (log_prob[at(c)] - maximum).exp()).sum();
        for class in 0..classes {
            log_prob[at(class)] -= maximum + total.ln();
        }
        if let Some(label) = labels[row] {
            let mean = (0..classes).map(|c| log_prob[at(c)]).sum::<f64>() / classes as f64;
            // A class of probability zero times a smoothing of zero is zero, not 0 * -infinity.
            let smoothed = if smoothing > 0.0 { smoothing * mean } else { 0.0 };
            sum -= (1.0 - smoothing) * log_prob[at(label)] + smoothed;
            count += 1.0;
        }
    }
    Ok(vec![
        Tensor::from_f64(logits.dtype(), &[], &[sum / count])?,
        Tensor::from_f64(logits.dtype(), logits.shape(), &log_prob)?,
    ])
}

/// The softmax less the smoothed one-hot label, over the number of labels; zero for ignored labels.
fn eval_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (dloss, log_prob, labels) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let smoothing = smoothing(cx)?;
    let (labels, [outer, classes, inner]) = read_labels(cx, log_prob, labels)?;
    let [dloss] = dloss.to_f64()?[..] else {
        return Err(OpError::shape(format!("the gradient of the loss must be a scalar, found {:?}", dloss.shape())));
    };
    let scale = dloss / labels.iter().flatten().count() as f64;
    let mut dlogits = log_prob.to_f64()?;
    for row in 0..outer * inner {
        let start = row / inner * classes * inner + row % inner;
        for class in 0..classes {
            let element = &mut dlogits[start + class * inner];
            *element = match labels[row] {
                None => 0.0,
                Some(label) => {
                    let hit = if class == label { 1.0 - smoothing } else { 0.0 };
                    scale * (element.exp() - hit - smoothing / classes as f64)
                }
            };
        }
    }
    Ok(vec![Tensor::from_f64(log_prob.dtype(), log_prob.shape(), &dlogits)?])
}

fn loss_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    if cx.grads.get(1).copied().flatten().is_some() {
        return Err(OpError::unsupported("gradient through the log_prob output of CrossEntropyLoss"));
    }
    let inputs = [cx.grad()?, cx.output(1)?, cx.input(1)?];
    let attributes = cx.node.attributes.clone();
    Ok(vec![Some(cx.graph.own_op("CrossEntropyLossGradient", &inputs, attributes)?), None])
}

/// Maximum, subtraction, exponential, sum and subtraction of its logarithm.
fn loss_flops(shapes: &Shapes) -> u64 {
    5 * shapes.input_len(0)
}

/// Exponential, subtraction and scaling.
fn gradient_flops(shapes: &Shapes) -> u64 {
    3 * shapes.output_len(0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::attribute::Attribute;
    use crate::eval::evaluate;
    use crate::graph::Graph;

    fn run(op: &str, attributes: &[(&str, Attribute)], inputs: &[Tensor], outputs: usize) -> Vec<Tensor> {
        let mut graph = Graph::new("loss");
        let operands: Vec<_> = inputs.iter().map(|t| Some(graph.add_constant("operand", t.clone()))).collect();
        let attributes: crate::Attributes = attributes.iter().map(|(n, a)| (n.to_string(), a.clone())).collect();
        for output in graph.op_n(UPDRAFT_DOMAIN, op, &operands, attributes, outputs).unwrap() {
            graph.push_output(output);
        }
        evaluate(&graph, &HashMap::new()).unwrap()
    }

    #[test]
    fn equal_logits_cost_the_logarithm_of_the_number_of_classes() {
        let logits = Tensor::zeros(DType::F64, &[2, 4]).unwrap();
        let labels = Tensor::vector(&[0i64, 3]);
        for smoothing in [0.0f32, 0.5] {
            let out =
                run("CrossEntropyLoss", &[("label_smoothing", smoothing.into())], &[logits.clone(), labels.clone()], 2);
            assert!((out[0].to_f64().unwrap()[0] - 4f64.ln()).abs() < 1e-15);
        }
    }

    #[test]
    fn ignored_labels_neither_count_nor_pull() {
        let logits = Tensor::new(&[3, 2], &[1f64, 2.0, 5.0, -5.0, 0.5, 0.0]).unwrap();
        let attributes = [("ignore_index", Attribute::Int(-1))];
        let all = run("CrossEntropyLoss", &attributes, &[logits, Tensor::vector(&[0i64, -1, 1])], 2);
        let kept = Tensor::new(&[2, 2], &[1f64, 2.0, 0.5, 0.0]).unwrap();
        let only = run("CrossEntropyLoss", &attributes, &[kept, Tensor::vector(&[0i64, 1])], 2);
        assert_eq!(all[0], only[0]);
        let inputs = [Tensor::scalar(1f64), all[1].clone(), Tensor::vector(&[0i64, -1, 1])];
        let gradient = run("CrossEntropyLossGradient", &attributes, &inputs, 1);
        assert_eq!(gradient[0].to_f64().unwrap()[2..4], [0.0, 0.0]);
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_loss() {
        // Central differences of a function with third derivatives below 1 are within h^2 = 1e-10 of the slope, and
        // rounding of the loss adds about 1e-16 / h = 1e-11.
        let (shape, h) = ([2usize, 3, 2], 1e-5);
        let at: Vec<f64> = (0..12).map(|i| f64::from(i * 7 % 5) * 0.4 - 0.7).collect();
        let labels = Tensor::new(&[2, 2], &[2i64, 0, -100, 1]).unwrap();
        let attributes = [("label_smoothing", Attribute::Float(0.25))];
        let loss = |x: &[f64]| {
            let logits = Tensor::new(&shape, x).unwrap();
            run("CrossEntropyLoss", &attributes, &[logits, labels.clone()], 2)
        };
        let inputs = [Tensor::scalar(1f64), loss(&at)[1].clone(), labels.clone()];
        let gradient = run("CrossEntropyLossGradient", &attributes, &inputs, 1)[0].to_f64().unwrap();
        for i in 0..at.len() {
            let moved = |by: f64| {
                let mut x = at.clone();
                x[i] += by;
                loss(&x)[0].to_f64().unwrap()[0]
            };
            let slope = (moved(h) - moved(-h)) / (2.0 * h);
            assert!((slope - gradient[i]).abs() < 1e-9, "element {i}: slope {slope}, gradient {}", gradient[i]);
        }
    }
}
