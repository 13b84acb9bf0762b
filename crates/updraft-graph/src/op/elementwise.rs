//! Operators that treat each element on its own, with NumPy's broadcasting between operands.
//!
//! Floats of any width are computed as `f64` and rounded once, which for sums, products, quotients and square roots of
//! `f32` is the correctly rounded result; integers are computed wide and wrapped.

use crate::graph::ValueId;
use crate::op::index::{broadcast_positions, checked_count};
use crate::op::{
    Arity, Axis, Eval, Fact, Gradient, GradientRule, Infer, Link, Op, OpError, Rule, broadcast, broadcast_dims,
    one_flop_per_output,
};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[
    binary("Add", &[7, 13, 14], eval_add, add_gradient),
    binary("Sub", &[7, 13, 14], eval_sub, sub_gradient),
    binary("Mul", &[7, 13, 14], eval_mul, mul_gradient),
    unary("Relu", &[6, 13, 14], eval_relu, relu_gradient),
];

const fn binary(
    name: &'static str,
    versions: &'static [u32],
    eval: fn(&Eval) -> Result<Vec<Tensor>, OpError>,
    gradient: GradientRule,
) -> Op {
    Op {
        name,
        domain: "",
        versions,
        arity: Arity::exact(2),
        infer: infer_same_type,
        eval: Rule::Is(eval),
        gradient: Rule::Is(gradient),
        flops: one_flop_per_output,
        channels: Rule::Is(channels),
    }
}

const fn unary(
    name: &'static str,
    versions: &'static [u32],
    eval: fn(&Eval) -> Result<Vec<Tensor>, OpError>,
    gradient: GradientRule,
) -> Op {
    Op { arity: Arity::exact(1), ..binary(name, versions, eval, gradient) }
}

/// All inputs have one element type, which is the output's; shapes broadcast.
pub(super) fn infer_same_type(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let mut dtype = None;
    for index in 0..cx.inputs.len() {
        match (dtype, cx.dtype(index)) {
            (Some(a), Some(b)) if a != b => {
                return Err(OpError::dtype(format!("input {index} is {b}, but the inputs before it are {a}")));
            }
            (a, b) => dtype = a.or(b),
        }
    }
    let shapes: Option<Vec<_>> = (0..cx.inputs.len()).map(|i| cx.shape(i)).collect();
    Ok(vec![Fact { dtype, shape: shapes.map(|s| broadcast_dims(&s)).transpose()?, content: None }])
}

/// Every axis of the output is the axis of each input that is not stretched along it.
pub(super) fn channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let shapes: Option<Vec<_>> = (0..cx.inputs.len()).map(|i| cx.shape(i)).collect();
    let shapes = shapes.ok_or_else(|| OpError::shape("the ranks of all inputs must be known"))?;
    let out = broadcast_dims(&shapes)?;
    let mut links = Vec::new();
    for (input, shape) in shapes.iter().enumerate() {
        let lead = out.len() - shape.len();
        for (axis, dim) in shape.iter().enumerate() {
            if dim.same(&out[lead + axis]) {
                links.push(Link::Same(Axis::Input(input, axis), Axis::Output(0, lead + axis)));
            }
        }
    }
    Ok(links)
}

/// Applies one function for floats and one for integers to each pair of broadcast elements.
pub(super) fn map_pairs(
    cx: &Eval,
    floats: fn(f64, f64) -> f64,
    integers: fn(i128, i128) -> i128,
) -> Result<Vec<Tensor>, OpError> {
    let (a, b) = (cx.input(0)?, cx.input(1)?);
    if a.dtype() != b.dtype() {
        return Err(OpError::dtype(format!("inputs are {} and {}, expected one type", a.dtype(), b.dtype())));
    }
    let shape = broadcast(&[a.shape(), b.shape()])?;
    checked_count(&shape)?;
    let (at_a, at_b) = (broadcast_positions(a.shape(), &shape), broadcast_positions(b.shape(), &shape));
    let pairs = at_a.zip(at_b);
    let out = if a.dtype().is_float() {
        let (x, y) = (a.to_f64()?, b.to_f64()?);
        Tensor::from_f64(a.dtype(), &shape, &pairs.map(|(i, j)| floats(x[i], y[j])).collect::<Vec<_>>())?
    } else {
        let (x, y) = (a.to_i128()?, b.to_i128()?);
        Tensor::from_i128(a.dtype(), &shape, &pairs.map(|(i, j)| integers(x[i], y[j])).collect::<Vec<_>>())?
    };
    Ok(vec![out])
}

/// Applies one function for floats and one for integers to each element.
pub(super) fn map_each(
    cx: &Eval,
    floats: impl Fn(f64) -> f64,
    integers: impl Fn(i128) -> i128,
) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let out = if x.dtype().is_float() {
        Tensor::from_f64(x.dtype(), x.shape(), &x.to_f64()?.into_iter().map(floats).collect::<Vec<_>>())?
    } else {
        Tensor::from_i128(x.dtype(), x.shape(), &x.to_i128()?.into_iter().map(integers).collect::<Vec<_>>())?
    };
    Ok(vec![out])
}

fn eval_add(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    map_pairs(cx, |a, b| a + b, i128::wrapping_add)
}

fn eval_sub(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    map_pairs(cx, |a, b| a - b, i128::wrapping_sub)
}

fn eval_mul(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    map_pairs(cx, |a, b| a * b, i128::wrapping_mul)
}

fn eval_relu(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    // Written so that not-a-number stays one.
    map_each(cx, |x| if x < 0.0 { 0.0 } else { x }, |x| x.max(0))
}

fn add_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (a, b, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    Ok(vec![Some(cx.sum_to(dy, a)?), Some(cx.sum_to(dy, b)?)])
}

fn sub_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (a, b, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let da = cx.sum_to(dy, a)?;
    let db = cx.sum_to(dy, b)?;
    let db = cx.op("Neg", &[db])?;
    Ok(vec![Some(da), Some(db)])
}

fn mul_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (a, b, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let mut side = |wanted: bool, this: ValueId, other: ValueId| -> Result<Option<ValueId>, OpError> {
        if !wanted {
            return Ok(None);
        }
        let product = cx.op("Mul", &[dy, other])?;
        Ok(Some(cx.sum_to(product, this)?))
    };
    Ok(vec![side(true, a, b)?, side(true, b, a)?])
}

/// dx = dy where the output is positive. The output is read, not the input, so that the input's memory is free.
fn relu_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (y, dy) = (cx.output(0)?, cx.grad()?);
    Ok(vec![Some(cx.graph.own_op("ReluGradient", &[dy, y], [])?)])
}
