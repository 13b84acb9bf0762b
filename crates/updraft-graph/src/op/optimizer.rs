//! Updates of parameters from gradients: SGD, Adam, and the norm that clipping needs.
//!
//! Each update is one node so that an engine reads and writes parameter, gradient and moments once. All scalars that
//! change from step to step are inputs; what stays is an attribute.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::UPDRAFT_DOMAIN;
use crate::op::{Arity, Axis, Eval, Fact, Infer, Link, Op, OpError, Rule, Shapes, show_shape};
use crate::tensor::Tensor;

const NO_GRADIENT: &str = "nothing is differentiated through an update";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op {
        name: "SgdUpdate",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        // The momentum stands before the learning rate.
        arity: Arity::range(4, 5).open(3).outputs(1, 2),
        infer: infer_sgd,
        eval: Rule::Is(eval_sgd),
        gradient: Rule::None(NO_GRADIENT),
        flops: |shapes| 7 * shapes.input_len(0),
        channels: Rule::Is(channels_sgd),
    },
    Op {
        name: "AdamUpdate",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::range(6, 7).outputs(3, 3),
        infer: infer_adam,
        eval: Rule::Is(eval_adam),
        gradient: Rule::None(NO_GRADIENT),
        flops: |shapes| 14 * shapes.input_len(0),
        channels: Rule::Is(channels_adam),
    },
    Op {
        name: "GlobalNorm",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::range(1, usize::MAX),
        infer: infer_norm,
        eval: Rule::Is(eval_norm),
        gradient: Rule::None("the norm of gradients is not differentiated"),
        flops: norm_flops,
        channels: Rule::None("all elements of all inputs are summed"),
    },
];

/// `SgdUpdate(p, g, m?, learning_rate f32 [], gradient_scale? f32 []) -> (p', m')` with attributes `momentum` (0),
/// `nesterov` (0) and `weight_decay` (0).
///
/// `torch.optim.SGD` without dampening (documentation of PyTorch 2.15): with `d = gradient_scale * g + weight_decay * p`
/// and `m' = momentum * m + d`, the step is `d + momentum * m'` for Nesterov, else `m'`, and
/// `p' = p - learning_rate * step`. Without momentum there is no `m`, and the step is `d`.
fn infer_sgd(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let momentum = cx.attributes().float("momentum", 0.0)?;
    if cx.optional(2).is_none() && (momentum != 0.0 || cx.wants(1)) {
        return Err(OpError::MissingInput { index: 2, expected: "the momentum" });
    }
    infer_update(cx, 2, 3, 4)
}

/// `AdamUpdate(p, g, m, v, learning_rate f32 [], step i64 [], gradient_scale? f32 []) -> (p', m', v')` with attributes
/// `beta1` (0.9), `beta2` (0.999), `epsilon` (1e-8), `weight_decay` (0) and `decoupled` (0).
///
/// `step` is the number of updates made before this one. Adam is Kingma and Ba, "Adam: a method for stochastic
/// optimization", algorithm 1, where weight decay adds `weight_decay * p` to the gradient; `decoupled` is AdamW
/// (Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2), which first scales `p` by
/// `1 - learning_rate * weight_decay`.
fn infer_adam(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    cx.input(5, "the step")?;
    if let Some(dtype) = cx.dtype(5).filter(|d| *d != DType::I64) {
        return Err(OpError::dtype(format!("the step must be i64, found {dtype}")));
    }
    infer_update(cx, 3, 4, 6)
}

/// Parameter, gradient and moments (inputs up to `last_moment`) have one type and shape.
fn infer_update(cx: &Infer, last_moment: usize, rate: usize, scale: usize) -> Result<Vec<Fact>, OpError> {
    let parameter = cx.input(0, "the parameter")?;
    cx.input(1, "the gradient")?;
    cx.input(rate, "the learning rate")?;
    let mut facts = vec![parameter.fact.clone().with_content(None)];
    for index in 1..=last_moment {
        let Some(operand) = cx.optional(index) else { continue };
        if let (Some(a), Some(b)) = (parameter.dtype, operand.dtype)
            && a != b
        {
            return Err(OpError::dtype(format!("the parameter is {a}, but input {index} is {b}")));
        }
        if let (Some(a), Some(b)) = (&parameter.shape, &operand.shape)
            && (a.len() != b.len() || a.iter().zip(b).any(|(a, b)| a.differs(b)))
        {
            let (a, b) = (show_shape(a), show_shape(b));
            return Err(OpError::shape(format!("the parameter is {a}, but input {index} is {b}")));
        }
        if index > 1 {
            facts.push(operand.fact.clone().with_content(None));
        }
    }
    for index in [rate, scale] {
        if let Some(dtype) = cx.dtype(index).filter(|d| *d != DType::F32) {
            return Err(OpError::dtype(format!("input {index} must be f32, found {dtype}")));
        }
        cx.expect_rank(index, 0, "a scalar of an update")?;
    }
    Ok(facts)
}

fn infer_norm(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    for index in 0..cx.inputs.len() {
        let dtype = cx.input(index, "a gradient")?.dtype;
        if let Some(dtype) = dtype.filter(|d| !d.is_float()) {
            return Err(OpError::dtype(format!("input {index} must be of floats, found {dtype}")));
        }
    }
    Ok(vec![Fact::tensor(Some(DType::F32), Vec::<Dim>::new())])
}

/// The only element of a scalar, or `default` where it is left out.
fn scalar(cx: &Eval, index: usize, default: Option<f64>) -> Result<f64, OpError> {
    match (cx.optional(index), default) {
        (None, Some(default)) => Ok(default),
        (None, None) => Err(OpError::MissingInput { index, expected: "a scalar" }),
        (Some(t), _) => match t.to_f64()?[..] {
            [value] => Ok(value),
            _ => Err(OpError::shape(format!("input {index} must be a scalar, found shape {:?}", t.shape()))),
        },
    }
}

/// The elements of an operand that must have the parameter's shape.
fn elements(cx: &Eval, index: usize) -> Result<Vec<f64>, OpError> {
    let (parameter, operand) = (cx.input(0)?, cx.input(index)?);
    if parameter.shape() != operand.shape() {
        return Err(OpError::shape(format!(
            "the parameter is {:?}, but input {index} is {:?}",
            parameter.shape(),
            operand.shape()
        )));
    }
    Ok(operand.to_f64()?)
}

fn eval_sgd(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let attribute = |name| cx.attributes().float(name, 0.0).map(f64::from);
    let (momentum, weight_decay) = (attribute("momentum")?, attribute("weight_decay")?);
    let nesterov = cx.attributes().flag("nesterov", false)?;
    let (rate, scale) = (scalar(cx, 3, None)?, scalar(cx, 4, Some(1.0))?);
    let (mut p, g) = (elements(cx, 0)?, elements(cx, 1)?);
    let mut m = cx.optional(2).map(|_| elements(cx, 2)).transpose()?;
    for i in 0..p.len() {
        let d = scale * g[i] + weight_decay * p[i];
        let step = match &mut m {
            None => d,
            Some(m) => {
                m[i] = momentum * m[i] + d;
                if nesterov { d + momentum * m[i] } else { m[i] }
            }
        };
        p[i] -= rate * step;
    }
    let like = cx.input(0)?;
    std::iter::once(p).chain(m).map(|values| Ok(Tensor::from_f64(like.dtype(), like.shape(), &values)?)).collect()
}

fn eval_adam(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let attribute = |name, default| cx.attributes().float(name, default).map(f64::from);
    let (beta1, beta2) = (attribute("beta1", 0.9)?, attribute("beta2", 0.999)?);
    let (epsilon, weight_decay) = (attribute("epsilon", 1e-8)?, attribute("weight_decay", 0.0)?);
    let decoupled = cx.attributes().flag("decoupled", false)?;
    let (rate, scale) = (scalar(cx, 4, None)?, scalar(cx, 6, Some(1.0))?);
    let count = scalar(cx, 5, None)? + 1.0;
    let (correction1, correction2) = (1.0 - beta1.powf(count), 1.0 - beta2.powf(count));
    let (mut p, g, mut m, mut v) = (elements(cx, 0)?, elements(cx, 1)?, elements(cx, 2)?, elements(cx, 3)?);
    for i in 0..p.len() {
        let mut d = scale * g[i];
        if decoupled {
            p[i] -= rate * weight_decay * p[i];
        } else {
            d += weight_decay * p[i];
        }
        m[i] = beta1 * m[i] + (1.0 - beta1) * d;
        v[i] = beta2 * v[i] + (1.0 - beta2) * d * d;
        p[i] -= rate * (m[i] / correction1) / ((v[i] / correction2).sqrt() + epsilon);
    }
    let like = cx.input(0)?;
    [p, m, v].iter().map(|values| Ok(Tensor::from_f64(like.dtype(), like.shape(), values)?)).collect()
}

/// `GlobalNorm(g..) -> norm f32 []`: the Euclidean norm of all elements of all inputs together.
fn eval_norm(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let mut squares = 0.0;
    for index in 0..cx.inputs.len() {
        squares += cx.input(index)?.to_f64()?.iter().map(|v| v * v).sum::<f64>();
    }
    Ok(vec![Tensor::from_f64(DType::F32, &[], &[squares.sqrt()])?])
}

fn norm_flops(shapes: &Shapes) -> u64 {
    (0..shapes.inputs.len()).map(|i| 2 * shapes.input_len(i)).sum()
}

fn channels_sgd(cx: &Infer) -> Result<Vec<Link>, OpError> {
    update_channels(cx, 2)
}

fn channels_adam(cx: &Infer) -> Result<Vec<Link>, OpError> {
    update_channels(cx, 3)
}

/// Every axis of the parameter is the same axis of gradient, moments and outputs.
fn update_channels(cx: &Infer, last_moment: usize) -> Result<Vec<Link>, OpError> {
    let rank = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the parameter must be known"))?.len();
    let operands = (1..=last_moment).filter(|i| cx.optional(*i).is_some());
    let mut links = Vec::new();
    for axis in 0..rank {
        let parameter = Axis::Input(0, axis);
        links.extend(operands.clone().map(|i| Link::Same(parameter, Axis::Input(i, axis))));
        links.extend((0..cx.output_count()).map(|o| Link::Same(parameter, Axis::Output(o, axis))));
    }
    Ok(links)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::attribute::Attributes;
    use crate::eval::evaluate;
    use crate::graph::Graph;

    fn run(op: &str, attributes: Attributes, inputs: &[Option<Tensor>], outputs: usize) -> Vec<Tensor> {
        let mut graph = Graph::new("update");
        let operands: Vec<_> =
            inputs.iter().map(|t| t.as_ref().map(|t| graph.add_constant("operand", t.clone()))).collect();
        for output in graph.op_n(UPDRAFT_DOMAIN, op, &operands, attributes, outputs).unwrap() {
            graph.push_output(output);
        }
        evaluate(&graph, &HashMap::new()).unwrap()
    }

    fn f64s(values: &[f64]) -> Option<Tensor> {
        Some(Tensor::vector(values))
    }

    /// The hyperparameters below are exact in binary, so that the expected values are exact too.
    #[test]
    fn sgd_follows_its_formula() {
        let rate = Some(Tensor::scalar(0.25f32));
        let (p, g) = (f64s(&[1.0, -2.0]), f64s(&[0.5, 1.0]));
        let out = run("SgdUpdate", Attributes::new(), &[p.clone(), g.clone(), None, rate.clone()], 1);
        assert_eq!(out[0].to_f64().unwrap(), [0.875, -2.25]);

        let attributes: Attributes = [("momentum", 0.5f32.into()), ("weight_decay", 0.125f32.into())].into();
        let scale = Some(Tensor::scalar(2f32));
        let inputs = [p, g, f64s(&[4.0, 0.0]), rate, scale];
        let out = run("SgdUpdate", attributes.clone(), &inputs, 2);
        // d = 2 g + p / 8 = [1.125, 1.75]; m' = m / 2 + d = [3.125, 1.75]; p' = p - m' / 4.
        assert_eq!(out[1].to_f64().unwrap(), [3.125, 1.75]);
        assert_eq!(out[0].to_f64().unwrap(), [0.21875, -2.4375]);

        let mut nesterov = attributes;
        nesterov.set("nesterov", 1i64);
        // step = d + m' / 2 = [2.6875, 2.625].
        assert_eq!(run("SgdUpdate", nesterov, &inputs, 2)[0].to_f64().unwrap(), [0.328125, -2.65625]);
    }

    #[test]
    fn the_first_adam_step_is_the_learning_rate_against_the_sign() {
        let zeros = f64s(&[0.0, 0.0]);
        let step = Some(Tensor::scalar(0i64));
        let inputs = [f64s(&[1.0, 1.0]), f64s(&[0.5, -8.0]), zeros.clone(), zeros, Some(Tensor::scalar(0.25f32)), step];
        let out = run("AdamUpdate", [("epsilon", 0f32.into())].into(), &inputs, 3);
        // Corrected moments are g and g^2 but for rounding, so each step is 0.25 to a few units in the last place.
        for (found, expected) in out[0].to_f64().unwrap().into_iter().zip([0.75, 1.25]) {
            assert!((found - expected).abs() < 1e-12, "{found} against {expected}");
        }
    }

    #[test]
    fn decoupled_decay_leaves_the_moments_alone() {
        let (p, g, zero) = (f64s(&[2.0]), f64s(&[0.0]), f64s(&[0.0]));
        let scalars = [Some(Tensor::scalar(0.5f32)), Some(Tensor::scalar(3i64))];
        let inputs = [p, g, zero.clone(), zero, scalars[0].clone(), scalars[1].clone()];
        let attributes: Attributes = [("weight_decay", 0.25f32.into()), ("decoupled", 1i64.into())].into();
        let out = run("AdamUpdate", attributes, &inputs, 3);
        assert_eq!(out[0].to_f64().unwrap(), [1.75]);
        assert_eq!(out[1].to_f64().unwrap(), [0.0]);
    }

    #[test]
    fn the_norm_is_over_all_inputs() {
        let out = run("GlobalNorm", Attributes::new(), &[f64s(&[2.0, 4.0]), f64s(&[4.0])], 1);
        assert_eq!(out[0].to_f64().unwrap(), [6.0]);
    }
}
