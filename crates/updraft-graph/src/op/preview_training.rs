//! The optimizers of ONNX's preview training set, for running files that carry them. Training graphs made here use the
//! operators of `optimizer`.
//!
//! All three take the learning rate, the number of updates so far, then for `n` tensors their values, gradients and
//! one or two running averages, and return the new values and averages. Formulas:
//! <https://onnx.ai/onnx/operators/onnx_aionnxpreviewtraining_Adam.html> and its siblings.

use crate::op::{Arity, Eval, Fact, Infer, Op, OpError, Shapes};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[optimizer("Adagrad", 3), optimizer("Momentum", 3), optimizer("Adam", 4)];

const fn optimizer(name: &'static str, per_tensor: usize) -> Op {
    let arity = Arity::range(2 + per_tensor, usize::MAX).outputs(per_tensor - 1, usize::MAX);
    Op {
        domain: "ai.onnx.preview.training",
        ..Op::onnx(name, &[1], arity, infer_optimizer, eval_optimizer)
            .no_gradient("it is an update, after the gradient")
            .flops(optimizer_flops)
            .no_channels("channels are changed before a graph is trained")
    }
}

fn per_tensor(op: &str) -> usize {
    if op == "Adam" { 4 } else { 3 }
}

/// How many tensors a node updates.
fn tensors(op: &str, inputs: usize) -> Result<usize, OpError> {
    let rest = inputs.saturating_sub(2);
    match rest % per_tensor(op) {
        0 => Ok(rest / per_tensor(op)),
        _ => Err(OpError::value(format!(
            "{op} takes {} inputs for each tensor after the first two, found {rest}",
            per_tensor(op)
        ))),
    }
}

fn infer_optimizer(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let count = tensors(&cx.node.op, cx.inputs.len())?;
    // Values, then each average; gradients, the second group, have no successor.
    let groups = std::iter::once(0).chain(2..per_tensor(&cx.node.op));
    let facts = groups.flat_map(|group| (0..count).map(move |i| 2 + group * count + i)).map(|index| {
        let fact = cx.input(index, "a value or an average")?.fact.clone();
        Ok(Fact { content: None, ..fact })
    });
    facts.collect()
}

fn eval_optimizer(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let op = cx.node.op.as_str();
    let count = tensors(op, cx.inputs.len())?;
    let first = |index: usize| -> Result<f64, OpError> {
        cx.input(index)?.to_f64()?.first().copied().ok_or_else(|| OpError::value(format!("input {index} is empty")))
    };
    let (rate, updates) = (first(0)?, first(1)?);
    let float = |name: &str, default: f32| Ok::<f64, OpError>(f64::from(cx.attributes().float(name, default)?));
    let decay = float("norm_coefficient", 0.0)?;
    let groups = per_tensor(op) - 1;
    let mut out: Vec<Option<Tensor>> = vec![None; groups * count];
    for i in 0..count {
        let part = |group: usize| -> Result<(Vec<f64>, &Tensor), OpError> {
            let tensor = cx.input(2 + group * count + i)?;
            crate::op::conv::expect_shape(tensor, cx.input(2 + i)?.shape(), "an average or gradient")?;
            Ok((tensor.to_f64()?, tensor))
        };
        let ((x, like), (g, _), (v, v_like)) = (part(0)?, part(1)?, part(2)?);
        let g: Vec<f64> = g.iter().zip(&x).map(|(g, x)| decay * x + g).collect();
        let made: Vec<(Vec<f64>, &Tensor)> = match op {
            "Adagrad" => {
                let rate = rate / (1.0 + updates * float("decay_factor", 0.0)?);
                let epsilon = float("epsilon", 1e-6)?;
                let squares: Vec<f64> = v.iter().zip(&g).map(|(h, g)| h + g * g).collect();
                let next = (0..x.len()).map(|k| x[k] - rate * g[k] / (squares[k].sqrt() + epsilon)).collect();
                vec![(next, like), (squares, v_like)]
            }
            "Momentum" => {
                let alpha = float("alpha", 0.0)?;
                let beta = if updates > 0.0 { float("beta", 0.0)? } else { 1.0 };
                let nesterov = match cx.attributes().string("mode", "standard")? {
                    "standard" => false,
                    "nesterov" => true,
                    other => {
                        let problem = format!("is {other:?}; \"standard\" and \"nesterov\" are known");
                        return Err(OpError::attribute("mode", problem));
                    }
                };
                let speed: Vec<f64> = v.iter().zip(&g).map(|(v, g)| alpha * v + beta * g).collect();
                let step = |k: usize| if nesterov { g[k] + alpha * speed[k] } else { speed[k] };
                let next = (0..x.len()).map(|k| x[k] - rate * step(k)).collect();
                vec![(next, like), (speed, v_like)]
            }
            _ => {
                let (h, h_like) = part(3)?;
                let (alpha, beta, epsilon) = (float("alpha", 0.9)?, float("beta", 0.999)?, float("epsilon", 1e-6)?);
                let corrected = match updates > 0.0 {
                    true => rate * (1.0 - beta.powf(updates)).sqrt() / (1.0 - alpha.powf(updates)),
                    false => rate,
                };
                let after = 1.0 - float("norm_coefficient_post", 0.0)?;
                let means: Vec<f64> = v.iter().zip(&g).map(|(v, g)| alpha * v + (1.0 - alpha) * g).collect();
                let squares: Vec<f64> = h.iter().zip(&g).map(|(h, g)| beta * h + (1.0 - beta) * g * g).collect();
                let moved = |k: usize| x[k] - corrected * means[k] / (squares[k].sqrt() + epsilon);
                let next = (0..x.len()).map(|k| after * moved(k)).collect();
                vec![(next, like), (means, v_like), (squares, h_like)]
            }
        };
        for (group, (values, like)) in made.into_iter().enumerate() {
            out[group * count + i] = Some(Tensor::from_f64(like.dtype(), like.shape(), &values)?);
        }
    }
    Ok(out.into_iter().flatten().collect())
}

/// About ten operations for each element of each value.
fn optimizer_flops(shapes: &Shapes) -> u64 {
    let count = shapes.outputs.len() / 2;
    10 * (0..count).map(|i| shapes.output_len(i)).sum::<u64>()
}
