//! Fake quantization: a float as the nearest multiple of a scale that codes can express, with a gradient, for training
//! networks that will run in integers.
//!
//! The value is that of QuantizeLinear and DequantizeLinear one after the other. Its gradient is not a slope, which is
//! zero almost everywhere: it passes straight through where the code is in range (Bengio et al., "Estimating or
//! propagating gradients through stochastic neurons"), and the scale learns by the rule of Esser et al., "Learned step
//! size quantization" (arXiv:1902.08153, equations 3 to 5).
//!
//! The scale is `unit * step`: `unit` is what it was in the beginning and `step`, which then is 1, is what is trained.
//! So one learning rate suits scales of all magnitudes, and an optimizer that divides gradients by their own size moves
//! each by a share of itself.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{UPDRAFT_DOMAIN, ValueId};
use crate::op::{
    AFTER_STRUCTURE, Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, OpView, Rule, SECOND_ORDER, Shapes,
    resolve_axis, show_shape,
};
use crate::tensor::Tensor;

use super::{code_of, code_range, rounded};

/// The family.
pub(in crate::op) const OPS: &[Op] = &[
    Op {
        name: "FakeQuantize",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(4),
        infer: infer_fake,
        eval: Rule::Is(eval_fake),
        gradient: Rule::Is(gradient_of_fake),
        flops: fake_flops,
        channels: Rule::Is(fake_links),
    },
    Op {
        name: "FakeQuantizeGradient",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(5).outputs(2, 2),
        infer: infer_gradient,
        eval: Rule::Is(eval_gradient),
        gradient: Rule::None(SECOND_ORDER),
        flops: gradient_flops,
        channels: Rule::None(AFTER_STRUCTURE),
    },
];

/// Share of its unit that a scale does not fall below, so that no step of an optimizer can turn it over.
pub const STEP_MIN: f64 = 1.0 / 256.0;

/// Scales and codes of one use of the operator.
#[derive(Debug, Clone, PartialEq)]
pub struct FakeQuantizer {
    /// Elements are `[outer, channels, inner]`, and a channel has a scale.
    pub channels: usize,
    /// Neighbours in one channel.
    pub inner: usize,
    /// The scale of each channel, in units.
    pub units: Vec<f64>,
    /// The lowest and the highest code of each channel, less its zero point.
    pub codes: Vec<(f64, f64)>,
    /// `1 / sqrt(N p)`: what LSQ scales the gradient of each channel's scale by, `N` being the elements of the channel
    /// (of one sample, where `per_sample` says that the leading axis is samples) and `p` the highest code.
    pub gradient_scales: Vec<f64>,
}

impl FakeQuantizer {
    /// What a node says: attributes `axis` of the scales (default 1, or 0 where there is no other), `low` and `high`
    /// where fewer codes are used than the zero point's type has, and `per_sample`.
    pub fn new(view: &OpView, x: &[usize], unit: &[f64], zero_point: &Tensor) -> Result<FakeQuantizer, OpError> {
        let (channels, inner) = if unit.len() == 1 {
            (1, x.iter().product())
        } else {
            let axis = scale_axis(view, x.len())?;
            if x[axis] != unit.len() {
                let count = unit.len();
                return Err(OpError::shape(format!("{count} scales along axis {axis} of an input of shape {x:?}")));
            }
            (unit.len(), x[axis + 1..].iter().product())
        };
        let (low, high) = codes(view, zero_point.dtype())?;
        let zeros = zero_point.to_i128()?;
        if zeros.len() != unit.len() || zeros.iter().any(|z| !(low..=high).contains(z)) {
            return Err(OpError::value(format!(
                "zero points {zeros:?} for {} scales and codes from {low} to {high}",
                unit.len()
            )));
        }
        let codes: Vec<(f64, f64)> = zeros.iter().map(|z| ((low - z) as f64, (high - z) as f64)).collect();
        let samples = match view.attributes().flag("per_sample", false)? {
            true => x.first().copied().unwrap_or(1).max(1),
            false => 1,
        };
        let elements = (x.iter().product::<usize>() / channels / samples).max(1);
        let gradient_scales = codes.iter().map(|(low, high)| 1.0 / (elements as f64 * high.max(-low)).sqrt()).collect();
        Ok(FakeQuantizer { channels, inner, units: unit.to_vec(), codes, gradient_scales })
    }

    /// The scale of a channel in `f32`, for the value of its trained step.
    pub fn scale(&self, channel: usize, step: f64) -> f64 {
        f64::from((self.units[channel] * step.max(STEP_MIN)) as f32)
    }

    fn channel_of(&self, element: usize) -> usize {
        element / self.inner.max(1) % self.channels
    }
}

fn codes(view: &OpView, dtype: DType) -> Result<(i128, i128), OpError> {
    let (low, high) = code_range(dtype)
        .ok_or_else(|| OpError::dtype(format!("the zero point must be of the codes' integer type, found {dtype}")))?;
    let stated = |name: &str, default: i128| Ok::<_, OpError>(i128::from(view.attributes().int(name, default as i64)?));
    let (from, to) = (stated("low", low)?, stated("high", high)?);
    if from < low || to > high || from >= to {
        return Err(OpError::attribute(
            "low",
            format!("and `high` are {from} and {to}, but {dtype} has {low} to {high}"),
        ));
    }
    Ok((from, to))
}

fn scale_axis(view: &OpView, rank: usize) -> Result<usize, OpError> {
    let axis = view.attributes().int("axis", 1)?;
    if rank == 1 && axis == 1 { Ok(0) } else { resolve_axis(axis, rank) }
}

/// `FakeQuantize(x, unit [] or [C], step as unit, zero_point as unit) -> like x`:
/// `(clamp(round(x / s) + zero_point, low, high) - zero_point) * s` with `s = unit * max(step, 1/256)`.
fn infer_fake(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    check_operands(cx, 0)?;
    let x = cx.input(0, "input")?;
    Ok(vec![Fact { dtype: x.dtype, shape: x.shape.clone(), content: None }])
}

/// `FakeQuantizeGradient(dy, x, unit, step, zero_point) -> (dx, dstep)`, attributes as in FakeQuantize.
///
/// `dx` is `dy` where the code of `x` is in range and 0 elsewhere. With `q = round(x / s) - x / s` there, and the code
/// at the end of the range less the zero point elsewhere, LSQ's gradient of the scale is `g = sum(dy * q) / sqrt(N p)`;
/// `dstep` is `g / unit`, so that a step of gradient descent moves the scale `unit * step` as it would in LSQ.
fn infer_gradient(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    check_operands(cx, 1)?;
    let (x, step) = (cx.input(1, "input")?, cx.input(3, "step")?);
    Ok(vec![
        Fact { dtype: x.dtype, shape: x.shape.clone(), content: None },
        Fact { dtype: step.dtype, shape: step.shape.clone(), content: None },
    ])
}

fn check_operands(cx: &Infer, first: usize) -> Result<(), OpError> {
    for index in [first, first + 1, first + 2] {
        if let Some(dtype) = cx.input(index, "a float tensor")?.dtype.filter(|d| !d.is_float()) {
            return Err(OpError::dtype(format!("input {index} must be of floats, found {dtype}")));
        }
    }
    let unit = cx.shape(first + 1);
    for index in [first + 2, first + 3] {
        if let (Some(unit), Some(other)) = (unit, cx.shape(index))
            && (unit.len() != other.len() || unit.iter().zip(other).any(|(a, b)| a.differs(b)) || unit.len() > 1)
        {
            let (unit, other) = (show_shape(unit), show_shape(other));
            return Err(OpError::shape(format!(
                "units {unit} with input {index} of shape {other}: both must be [] or [C]"
            )));
        }
    }
    if let (Some(x), Some([count])) = (cx.shape(first), unit)
        && count.known().is_some_and(|n| n != 1)
    {
        let axis = scale_axis(&cx.view, x.len())?;
        if x[axis].differs(count) {
            let problem = format!("{count} scales along axis {axis} of an input of shape {}", show_shape(x));
            return Err(OpError::shape(problem));
        }
    }
    Ok(())
}

fn eval_fake(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let (q, steps) = quantizer(cx, 0)?;
    let scales: Vec<f64> = steps.iter().enumerate().map(|(c, step)| q.scale(c, *step)).collect();
    let values = x.to_f64()?.into_iter().enumerate().map(|(i, x)| {
        let channel = q.channel_of(i);
        let (low, high) = q.codes[channel];
        let quotient = rounded(x / scales[channel], DType::F32)?;
        Ok(code_of(quotient, 0, (low as i128, high as i128)) as f64 * scales[channel])
    });
    let values = values.collect::<Result<Vec<f64>, OpError>>()?;
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &values)?])
}

fn eval_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (dy, x, step) = (cx.input(0)?, cx.input(1)?, cx.input(3)?);
    if dy.shape() != x.shape() {
        return Err(OpError::shape(format!("a gradient of shape {:?} of {:?}", dy.shape(), x.shape())));
    }
    let (q, steps) = quantizer(cx, 1)?;
    let mut dx = dy.to_f64()?;
    let mut dstep = vec![0.0; q.channels];
    for (i, (dx, x)) in dx.iter_mut().zip(x.to_f64()?).enumerate() {
        let channel = q.channel_of(i);
        let (low, high) = q.codes[channel];
        let quotient = rounded(x / q.scale(channel, steps[channel]), DType::F32)?;
        let code = quotient.round_ties_even();
        if (low..=high).contains(&code) {
            dstep[channel] += *dx * (code - quotient);
        } else {
            dstep[channel] += *dx * code.clamp(low, high);
            *dx = 0.0;
        }
    }
    for (channel, sum) in dstep.iter_mut().enumerate() {
        *sum *= q.gradient_scales[channel] / q.units[channel];
    }
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &dx)?, Tensor::from_f64(step.dtype(), step.shape(), &dstep)?])
}

/// What the operands from `first` on say, and the trained steps.
fn quantizer(cx: &Eval, first: usize) -> Result<(FakeQuantizer, Vec<f64>), OpError> {
    let (x, unit, step, zero) = (cx.input(first)?, cx.input(first + 1)?, cx.input(first + 2)?, cx.input(first + 3)?);
    if step.shape() != unit.shape() {
        return Err(OpError::shape(format!("steps of shape {:?} for units {:?}", step.shape(), unit.shape())));
    }
    Ok((FakeQuantizer::new(&cx.view, x.shape(), &unit.to_f64()?, zero)?, step.to_f64()?))
}

fn gradient_of_fake(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let inputs = [cx.grad()?, cx.input(0)?, cx.input(1)?, cx.input(2)?, cx.input(3)?].map(Some);
    let attributes = cx.node.attributes.clone();
    let made = cx.graph.op_n(UPDRAFT_DOMAIN, "FakeQuantizeGradient", &inputs, attributes, 2)?;
    Ok(vec![Some(made[0]), None, Some(made[1]), None])
}

/// Quotient, rounding, two bounds, product.
fn fake_flops(shapes: &Shapes) -> u64 {
    5 * shapes.output_len(0)
}

/// Quotient, rounding, two comparisons, difference, product and sum.
fn gradient_flops(shapes: &Shapes) -> u64 {
    7 * shapes.output_len(0)
}

fn fake_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let x = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the input must be known"))?;
    let mut links: Vec<Link> = (0..x.len()).map(|i| Link::Same(Axis::Input(0, i), Axis::Output(0, i))).collect();
    if let Some([count]) = cx.shape(1)
        && *count != Dim::Known(1)
    {
        let axis = scale_axis(&cx.view, x.len())?;
        links.extend((1..4).map(|index| Link::Same(Axis::Input(index, 0), Axis::Input(0, axis))));
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

    const X: [f32; 8] = [-3.0, -0.26, -0.25, 0.0, 0.2, 0.75, 1.3, 9.0];

    fn run(op: &str, inputs: &[Tensor], attributes: &[(&str, i64)], outputs: usize) -> Vec<Tensor> {
        let mut graph = Graph::new("fake");
        let operands: Vec<_> = inputs.iter().map(|t| Some(graph.add_constant("operand", t.clone()))).collect();
        let attributes: Attributes = attributes.iter().map(|(n, v)| (n.to_string(), (*v).into())).collect();
        for output in graph.op_n(UPDRAFT_DOMAIN, op, &operands, attributes, outputs).unwrap() {
            graph.push_output(output);
        }
        evaluate(&graph, &HashMap::new()).unwrap()
    }

    #[test]
    fn the_value_is_that_of_quantizing_and_dequantizing() {
        let x = Tensor::new(&[2, 4], &X).unwrap();
        let scales = [0.3f32, 0.011];
        for (dtype, zeros) in [(DType::U8, [0, 200]), (DType::I8, [0, -100]), (DType::I16, [5, 0])] {
            let zero_point = Tensor::from_i128(dtype, &[2], &zeros).unwrap();
            let mut graph = Graph::new("pair");
            let [x, s, z] =
                [x.clone(), Tensor::vector(&scales), zero_point.clone()].map(|t| graph.add_constant("c", t));
            let codes = graph.op("QuantizeLinear", &[x, s, z], [("axis", 0.into())]).unwrap();
            let pair = graph.op("DequantizeLinear", &[codes, s, z], [("axis", 0.into())]).unwrap();
            graph.push_output(pair);
            let expected = evaluate(&graph, &HashMap::new()).unwrap();
            // The unit and the step are powers of two apart, so their product is the scale exactly.
            let units: Vec<f32> = scales.iter().map(|s| s * 2.0).collect();
            let inputs = [
                graph.value(x).constant().unwrap().clone(),
                Tensor::vector(&units),
                Tensor::vector(&[0.5f32; 2]),
                zero_point,
            ];
            assert_eq!(run("FakeQuantize", &inputs, &[("axis", 0)], 1), expected, "{dtype}");
        }
    }

    #[test]
    fn the_gradient_is_straight_through_inside_the_range_and_the_scale_learns_by_lsq() {
        // Codes from 0 to 3 of a scale of 0.5: x / s is -6, -0.52, -0.5, 0, 0.4, 1.5, 2.6, 18.
        let dy = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        let inputs = [
            Tensor::new(&[2, 4], &dy).unwrap(),
            Tensor::new(&[2, 4], &X).unwrap(),
            Tensor::vector(&[0.25f32]),
            Tensor::vector(&[2f32]),
            Tensor::vector(&[0u8]),
        ];
        let attributes = [("high", 3), ("per_sample", 1)];
        let made = run("FakeQuantizeGradient", &inputs, &attributes, 2);
        // -0.5 rounds to 0, which is in range; -0.52 to -1, which is not.
        assert_eq!(made[0].as_slice::<f32>().unwrap(), [0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.0]);
        let q = [0.0, 0.0, 0.5, 0.0, -0.4, 0.5, 0.4, 3.0];
        let sum: f64 = dy.iter().zip(q).map(|(d, q)| f64::from(*d) * q).sum();
        // Four elements a sample, a highest code of 3, a unit of a quarter.
        let expected = sum / 12f64.sqrt() / 0.25;
        let found = made[1].to_f64().unwrap()[0];
        assert!((found - expected).abs() < 1e-5 * expected.abs(), "{found} against {expected}");
    }

    #[test]
    fn a_step_at_zero_or_below_leaves_a_scale_that_is_positive() {
        let inputs = |step: f32| {
            [Tensor::new(&[8], &X).unwrap(), Tensor::vector(&[256f32]), Tensor::vector(&[step]), Tensor::vector(&[0i8])]
        };
        let expected = run("FakeQuantize", &inputs(1.0 / 256.0), &[], 1);
        assert_eq!(run("FakeQuantize", &inputs(-5.0), &[], 1), expected);
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let mut graph = Graph::new("wrong");
        let x = graph.add_constant("x", Tensor::new(&[2, 4], &X).unwrap());
        let units = graph.add_constant("units", Tensor::vector(&[1f32; 3]));
        let zeros = graph.add_constant("zeros", Tensor::vector(&[0i8; 3]));
        let error = graph.own_op("FakeQuantize", &[x, units, units, zeros], []).unwrap_err();
        assert!(error.to_string().contains("3 scales along axis 1"), "{error}");
    }
}
