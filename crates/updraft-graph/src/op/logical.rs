//! Comparisons, logic, and choice by a condition.

use crate::dtype::DType;
use crate::graph::ValueId;
use crate::op::elementwise::{binary, broadcast_inputs, infer_same_type, operands, unary, zip_broadcast};
use crate::op::index::{broadcast_positions, checked_count, pick};
use crate::op::{Arity, Eval, Fact, Gradient, Infer, Op, OpError, broadcast};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

const TRUTH: &str = "the result is a truth value";

/// The family.
pub(super) const OPS: &[Op] = &[
    comparison("Equal", &[7, 11, 13, 19], eval_equal),
    comparison("Less", &[7, 9, 13], |cx| compare(cx, |a, b| a < b, |a, b| a < b)),
    comparison("LessOrEqual", &[12, 16], |cx| compare(cx, |a, b| a <= b, |a, b| a <= b)),
    comparison("Greater", &[7, 9, 13], |cx| compare(cx, |a, b| a > b, |a, b| a > b)),
    comparison("GreaterOrEqual", &[12, 16], |cx| compare(cx, |a, b| a >= b, |a, b| a >= b)),
    comparison("And", &[7], |cx| combine(cx, |a, b| a && b)),
    comparison("Or", &[7], |cx| combine(cx, |a, b| a || b)),
    comparison("Xor", &[7], |cx| combine(cx, |a, b| a != b)),
    test("Not", &[1], eval_not),
    test("IsNaN", &[9, 13, 20], |cx| test_floats(cx, f64::is_nan)),
    test("IsInf", &[10, 20], eval_is_inf),
    binary("Where", &[9, 16], eval_where).arity(Arity::exact(3)).infer(infer_where).gradient(where_gradient),
];

const fn comparison(name: &'static str, versions: &'static [u32], eval: fn(&Eval) -> Evaluated) -> Op {
    binary(name, versions, eval).infer(infer_truth).no_gradient(TRUTH)
}

const fn test(name: &'static str, versions: &'static [u32], eval: fn(&Eval) -> Evaluated) -> Op {
    unary(name, versions, eval).infer(infer_truth).no_gradient(TRUTH)
}

fn infer_truth(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let facts = infer_same_type(cx)?;
    Ok(facts.into_iter().map(|fact| Fact { dtype: Some(DType::Bool), ..fact }).collect())
}

fn compare(cx: &Eval, floats: fn(f64, f64) -> bool, integers: fn(i128, i128) -> bool) -> Evaluated {
    let (a, b, shape) = operands(cx)?;
    let truths = if a.dtype().is_float() {
        zip_broadcast((&a.to_f64()?, a.shape()), (&b.to_f64()?, b.shape()), &shape, floats)
    } else {
        zip_broadcast((&a.to_i128()?, a.shape()), (&b.to_i128()?, b.shape()), &shape, integers)
    };
    Ok(vec![Tensor::from_bools(&shape, &truths)?])
}

fn eval_equal(cx: &Eval) -> Evaluated {
    let (a, b, shape) = operands(cx)?;
    if let (Ok(x), Ok(y)) = (a.strings(), b.strings()) {
        let pairs = broadcast_positions(a.shape(), &shape).zip(broadcast_positions(b.shape(), &shape));
        let truths: Vec<bool> = pairs.map(|(i, j)| x[i] == y[j]).collect();
        return Ok(vec![Tensor::from_bools(&shape, &truths)?]);
    }
    compare(cx, |a, b| a == b, |a, b| a == b)
}

fn combine(cx: &Eval, f: fn(bool, bool) -> bool) -> Evaluated {
    let (a, b, shape) = operands(cx)?;
    let truths = zip_broadcast((&a.to_bools()?, a.shape()), (&b.to_bools()?, b.shape()), &shape, f);
    Ok(vec![Tensor::from_bools(&shape, &truths)?])
}

fn eval_not(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let truths: Vec<bool> = x.to_bools()?.into_iter().map(|v| !v).collect();
    Ok(vec![Tensor::from_bools(x.shape(), &truths)?])
}

fn test_floats(cx: &Eval, f: impl Fn(f64) -> bool) -> Evaluated {
    let x = cx.input(0)?;
    if !x.dtype().is_float() {
        return Err(OpError::dtype(format!("expected floating-point elements, found {}", x.dtype())));
    }
    let truths: Vec<bool> = x.to_f64()?.into_iter().map(f).collect();
    Ok(vec![Tensor::from_bools(x.shape(), &truths)?])
}

fn eval_is_inf(cx: &Eval) -> Evaluated {
    let (up, down) = (cx.attributes().flag("detect_positive", true)?, cx.attributes().flag("detect_negative", true)?);
    test_floats(cx, |x| (up && x == f64::INFINITY) || (down && x == f64::NEG_INFINITY))
}

/// Inputs: condition (bool), then the values where it holds and where it does not.
fn infer_where(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    if let Some(dtype) = cx.dtype(0).filter(|d| *d != DType::Bool) {
        return Err(OpError::dtype(format!("the condition must be bool, found {dtype}")));
    }
    match (cx.dtype(1), cx.dtype(2)) {
        (Some(a), Some(b)) if a != b => Err(OpError::dtype(format!("the choices are {a} and {b}, expected one type"))),
        (a, b) => Ok(vec![Fact { dtype: a.or(b), shape: broadcast_inputs(cx)?, content: None }]),
    }
}

fn eval_where(cx: &Eval) -> Evaluated {
    let (condition, a, b) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let shape = broadcast(&[condition.shape(), a.shape(), b.shape()])?;
    checked_count(&shape)?;
    let truths = condition.to_bools()?;
    let choices = broadcast_positions(a.shape(), &shape).zip(broadcast_positions(b.shape(), &shape));
    let picks = broadcast_positions(condition.shape(), &shape)
        .zip(choices)
        .map(|(c, (i, j))| if truths[c] { (0, i) } else { (1, j) });
    Ok(vec![pick(&[a, b], &shape, picks)?])
}

fn where_gradient(cx: &mut Gradient) -> Grads {
    let (condition, dy) = (cx.input(0)?, cx.grad()?);
    let zero = cx.scalar_like(0.0, dy)?;
    cx.each_input(|cx, index, x| {
        let choices = if index == 1 { [condition, dy, zero] } else { [condition, zero, dy] };
        let share = cx.op("Where", &choices)?;
        cx.sum_to(share, x)
    })
}
