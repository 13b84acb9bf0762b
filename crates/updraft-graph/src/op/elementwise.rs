//! Arithmetic on each element on its own, with NumPy's broadcasting between operands.
//!
//! Floats of any width are computed as `f64` and rounded once, which for sums, products, quotients and square roots of
//! `f32` is the correctly rounded result; integers are computed wide and wrapped.

use crate::dim::Dim;
use crate::graph::ValueId;
use crate::op::index::{broadcast_positions, checked_count};
use crate::op::{
    Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, Shapes, broadcast, broadcast_dims, one_flop_per_output,
};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

const ANY: Arity = Arity::range(1, usize::MAX);

/// The family.
pub(super) const OPS: &[Op] = &[
    binary("Add", &[7, 13, 14], eval_add).infer(infer_add).gradient(add_gradient),
    binary("Sub", &[7, 13, 14], eval_sub).infer(infer_sub).gradient(sub_gradient),
    binary("Mul", &[7, 13, 14], eval_mul).infer(infer_mul).gradient(mul_gradient),
    binary("Div", &[7, 13, 14], eval_div).infer(infer_div).gradient(div_gradient),
    binary("Mod", &[10, 13, 28], eval_mod).no_gradient("not implemented: remainders do not occur in training"),
    binary("Pow", &[7, 12, 13, 15], eval_pow).infer(infer_like_first).gradient(pow_gradient),
    variadic("Max", &[6, 8, 12, 13], eval_max).gradient(extremum_gradient),
    variadic("Min", &[6, 8, 12, 13], eval_min).gradient(extremum_gradient),
    variadic("Sum", &[6, 8, 13], eval_sum).gradient(sum_gradient),
    variadic("Mean", &[6, 8, 13], eval_mean).gradient(mean_gradient),
    unary("Neg", &[6, 13], |cx| map_each(cx, |x| -x, i128::wrapping_neg)).gradient(neg_gradient),
    unary("Abs", &[6, 13], |cx| map_each(cx, f64::abs, |x| x.wrapping_abs())).gradient(abs_gradient),
    unary("Sign", &[9, 13], |cx| map_each(cx, sign, i128::signum)).gradient(flat_gradient),
    unary("Reciprocal", &[6, 13], |cx| map_floats(cx, f64::recip)).gradient(reciprocal_gradient),
    unary("Sqrt", &[6, 13], |cx| map_floats(cx, f64::sqrt)).gradient(sqrt_gradient),
    unary("Exp", &[6, 13], |cx| map_floats(cx, libm::exp)).gradient(exp_gradient),
    unary("Log", &[6, 13], |cx| map_floats(cx, libm::log)).gradient(log_gradient),
    unary("Floor", &[6, 13], |cx| map_floats(cx, f64::floor)).gradient(flat_gradient),
    unary("Ceil", &[6, 13], |cx| map_floats(cx, f64::ceil)).gradient(flat_gradient),
    unary("Round", &[11, 22], |cx| map_floats(cx, f64::round_ties_even)).gradient(flat_gradient),
    unary("Clip", &[6, 11, 12, 13], eval_clip)
        .arity(Arity::range(1, 3))
        .infer(infer_like_first)
        .gradient(clip_gradient),
    binary("BitShift", &[11, 28], eval_bit_shift).no_gradient("integer result"),
    binary("BitwiseAnd", &[18], |cx| map_integers(cx, |a, b| a & b)).no_gradient("integer result"),
    binary("BitwiseOr", &[18], |cx| map_integers(cx, |a, b| a | b)).no_gradient("integer result"),
    binary("BitwiseXor", &[18], |cx| map_integers(cx, |a, b| a ^ b)).no_gradient("integer result"),
    unary("BitwiseNot", &[18], eval_bitwise_not).no_gradient("integer result"),
];

/// An operator of one operand whose output is shaped like it.
pub(super) const fn unary(name: &'static str, versions: &'static [u32], eval: fn(&Eval) -> Evaluated) -> Op {
    Op::onnx(name, versions, Arity::exact(1), infer_same_type, eval).flops(one_flop_per_output).channels(channels)
}

/// An operator of two operands of one type that broadcast.
pub(super) const fn binary(name: &'static str, versions: &'static [u32], eval: fn(&Eval) -> Evaluated) -> Op {
    unary(name, versions, eval).arity(Arity::exact(2))
}

const fn variadic(name: &'static str, versions: &'static [u32], eval: fn(&Eval) -> Evaluated) -> Op {
    unary(name, versions, eval).arity(ANY).flops(variadic_flops)
}

fn variadic_flops(shapes: &Shapes) -> u64 {
    shapes.output_len(0) * shapes.inputs.len() as u64
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
    Ok(vec![Fact { dtype, shape: broadcast_inputs(cx)?, content: None }])
}

/// The shape that all inputs broadcast to, if their ranks are known.
pub(super) fn broadcast_inputs(cx: &Infer) -> Result<Option<Vec<Dim>>, OpError> {
    let shapes: Option<Vec<_>> = (0..cx.inputs.len()).map(|i| cx.shape(i)).collect();
    shapes.map(|s| broadcast_dims(&s)).transpose()
}

/// The output has the first input's type; shapes broadcast.
fn infer_like_first(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    Ok(vec![Fact { dtype: cx.dtype(0), shape: broadcast_inputs(cx)?, content: None }])
}

/// [`infer_same_type`], and the elements too where both operands are sizes: shape arithmetic inside a graph.
fn infer_with_content(cx: &Infer, combine: fn(&Dim, &Dim) -> Dim) -> Result<Vec<Fact>, OpError> {
    let mut facts = infer_same_type(cx)?;
    if let (Some(a), Some(b)) = (cx.optional(0).and_then(|x| x.content()), cx.optional(1).and_then(|x| x.content())) {
        let pairs: Option<Vec<_>> = match (a.len(), b.len()) {
            (m, n) if m == n => Some(a.iter().zip(&b).collect()),
            (1, _) => Some(b.iter().map(|y| (&a[0], y)).collect()),
            (_, 1) => Some(a.iter().map(|x| (x, &b[0])).collect()),
            _ => None,
        };
        facts[0].content = pairs.map(|p| p.into_iter().map(|(x, y)| combine(x, y)).collect());
    }
    Ok(facts)
}

fn infer_add(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    infer_with_content(cx, Dim::plus)
}

fn infer_sub(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    infer_with_content(cx, |a, b| a.minus(b).unwrap_or(Dim::Unknown))
}

fn infer_mul(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    infer_with_content(cx, Dim::times)
}

fn infer_div(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    infer_with_content(cx, |a, b| match b.known().and_then(|n| i64::try_from(n).ok()) {
        Some(by) => a.divide_floor(by),
        None => a.divide_exact(b).unwrap_or(Dim::Unknown),
    })
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

/// Two operands of one element type, and the shape they broadcast to.
pub(super) fn operands<'a>(cx: &Eval<'a>) -> Result<(&'a Tensor, &'a Tensor, Vec<usize>), OpError> {
    let (a, b) = (cx.input(0)?, cx.input(1)?);
    if a.dtype() != b.dtype() {
        return Err(OpError::dtype(format!("inputs are {} and {}, expected one type", a.dtype(), b.dtype())));
    }
    let shape = broadcast(&[a.shape(), b.shape()])?;
    checked_count(&shape)?;
    Ok((a, b, shape))
}

/// The results of a function on each pair of elements of two arrays, broadcast to `shape`.
pub(super) fn zip_broadcast<X: Copy, Y: Copy, T>(
    (a, a_shape): (&[X], &[usize]),
    (b, b_shape): (&[Y], &[usize]),
    shape: &[usize],
    f: impl Fn(X, Y) -> T,
) -> Vec<T> {
    let pairs = broadcast_positions(a_shape, shape).zip(broadcast_positions(b_shape, shape));
    pairs.map(|(i, j)| f(a[i], b[j])).collect()
}

/// Applies one function for floats and one for integers to each pair of broadcast elements.
pub(super) fn map_pairs(
    cx: &Eval,
    floats: impl Fn(f64, f64) -> f64,
    integers: impl Fn(i128, i128) -> i128,
) -> Evaluated {
    let (a, b, shape) = operands(cx)?;
    let out = if a.dtype().is_float() {
        let values = zip_broadcast((&a.to_f64()?, a.shape()), (&b.to_f64()?, b.shape()), &shape, floats);
        Tensor::from_f64(a.dtype(), &shape, &values)?
    } else {
        let values = zip_broadcast((&a.to_i128()?, a.shape()), (&b.to_i128()?, b.shape()), &shape, integers);
        Tensor::from_i128(a.dtype(), &shape, &values)?
    };
    Ok(vec![out])
}

/// Applies a function to each pair of broadcast elements of two tensors of floats.
pub(super) fn map_float_pairs(cx: &Eval, f: impl Fn(f64, f64) -> f64) -> Evaluated {
    let x = cx.input(0)?;
    if !x.dtype().is_float() {
        return Err(OpError::dtype(format!("expected floating-point elements, found {}", x.dtype())));
    }
    map_pairs(cx, f, |a, _| a)
}

fn map_integers(cx: &Eval, f: fn(i128, i128) -> i128) -> Evaluated {
    let (a, b, shape) = operands(cx)?;
    let values = zip_broadcast((&a.to_i128()?, a.shape()), (&b.to_i128()?, b.shape()), &shape, f);
    Ok(vec![Tensor::from_i128(a.dtype(), &shape, &values)?])
}

/// Applies one function for floats and one for integers to each element.
pub(super) fn map_each(cx: &Eval, floats: impl Fn(f64) -> f64, integers: impl Fn(i128) -> i128) -> Evaluated {
    let x = cx.input(0)?;
    if x.dtype().is_float() {
        return map_floats(cx, floats);
    }
    let values: Vec<i128> = x.to_i128()?.into_iter().map(integers).collect();
    Ok(vec![Tensor::from_i128(x.dtype(), x.shape(), &values)?])
}

/// Applies a function to each element of a tensor of floats.
pub(super) fn map_floats(cx: &Eval, f: impl Fn(f64) -> f64) -> Evaluated {
    let x = cx.input(0)?;
    if !x.dtype().is_float() {
        return Err(OpError::dtype(format!("expected floating-point elements, found {}", x.dtype())));
    }
    let values: Vec<f64> = x.to_f64()?.into_iter().map(f).collect();
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &values)?])
}

fn eval_add(cx: &Eval) -> Evaluated {
    map_pairs(cx, |a, b| a + b, i128::wrapping_add)
}

fn eval_sub(cx: &Eval) -> Evaluated {
    map_pairs(cx, |a, b| a - b, i128::wrapping_sub)
}

fn eval_mul(cx: &Eval) -> Evaluated {
    map_pairs(cx, |a, b| a * b, i128::wrapping_mul)
}

/// Integers are divided towards zero.
fn eval_div(cx: &Eval) -> Evaluated {
    refuse_integer_zeros(cx)?;
    map_pairs(cx, |a, b| a / b, i128::wrapping_div)
}

fn refuse_integer_zeros(cx: &Eval) -> Result<(), OpError> {
    let divisor = cx.input(1)?;
    if !divisor.dtype().is_float() && divisor.to_i128()?.contains(&0) {
        return Err(OpError::value("integer division by zero"));
    }
    Ok(())
}

/// The remainder has the sign of the divisor, or with `fmod` that of the dividend.
fn eval_mod(cx: &Eval) -> Evaluated {
    refuse_integer_zeros(cx)?;
    if cx.attributes().flag("fmod", false)? {
        return map_pairs(cx, |a, b| a % b, i128::wrapping_rem);
    }
    let floats = |a: f64, b: f64| {
        let rest = a % b;
        if rest == 0.0 {
            rest.copysign(b)
        } else if (rest < 0.0) != (b < 0.0) {
            rest + b
        } else {
            rest
        }
    };
    let integers = |a: i128, b: i128| {
        let rest = a.wrapping_rem(b);
        if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }
    };
    map_pairs(cx, floats, integers)
}

/// The exponent may be of another type than the base; the result is of the base's.
fn eval_pow(cx: &Eval) -> Evaluated {
    let (a, b) = (cx.input(0)?, cx.input(1)?);
    let shape = broadcast(&[a.shape(), b.shape()])?;
    checked_count(&shape)?;
    let out = if a.dtype().is_integer() && b.dtype().is_integer() {
        let values = zip_broadcast((&a.to_i128()?, a.shape()), (&b.to_i128()?, b.shape()), &shape, integer_power);
        Tensor::from_i128(a.dtype(), &shape, &values)?
    } else {
        let values = zip_broadcast((&a.to_f64()?, a.shape()), (&b.to_f64()?, b.shape()), &shape, libm::pow);
        Tensor::from_f64(a.dtype(), &shape, &values)?
    };
    Ok(vec![out])
}

/// Wrapped by squaring; a negative exponent gives the fraction rounded towards zero.
fn integer_power(base: i128, exponent: i128) -> i128 {
    if exponent < 0 {
        return libm::pow(base as f64, exponent as f64) as i128;
    }
    let (mut result, mut square, mut rest) = (1i128, base, exponent);
    while rest > 0 {
        if rest & 1 == 1 {
            result = result.wrapping_mul(square);
        }
        square = square.wrapping_mul(square);
        rest >>= 1;
    }
    result
}

/// Combines all inputs from the left, pair by pair, without rounding in between.
fn fold_inputs(
    cx: &Eval,
    floats: impl Fn(f64, f64) -> f64,
    integers: impl Fn(i128, i128) -> i128,
    finish: impl Fn(f64) -> f64,
) -> Evaluated {
    let inputs: Vec<&Tensor> = (0..cx.inputs.len()).map(|i| cx.input(i)).collect::<Result<_, _>>()?;
    let first = cx.input(0)?;
    if let Some(other) = inputs.iter().find(|t| t.dtype() != first.dtype()) {
        return Err(OpError::dtype(format!("inputs are {} and {}, expected one type", first.dtype(), other.dtype())));
    }
    let shape = broadcast(&inputs.iter().map(|t| t.shape()).collect::<Vec<_>>())?;
    checked_count(&shape)?;
    let out = if first.dtype().is_float() {
        let start = first.to_f64()?;
        let mut values: Vec<f64> = broadcast_positions(first.shape(), &shape).map(|i| start[i]).collect();
        for t in &inputs[1..] {
            values = zip_broadcast((&values, &shape), (&t.to_f64()?, t.shape()), &shape, &floats);
        }
        Tensor::from_f64(first.dtype(), &shape, &values.into_iter().map(finish).collect::<Vec<_>>())?
    } else {
        let start = first.to_i128()?;
        let mut values: Vec<i128> = broadcast_positions(first.shape(), &shape).map(|i| start[i]).collect();
        for t in &inputs[1..] {
            values = zip_broadcast((&values, &shape), (&t.to_i128()?, t.shape()), &shape, &integers);
        }
        Tensor::from_i128(first.dtype(), &shape, &values)?
    };
    Ok(vec![out])
}

/// Not-a-number wins, as in NumPy.
pub(super) fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Not-a-number wins, as in NumPy.
pub(super) fn smaller(a: f64, b: f64) -> f64 {
    if a.is_nan() || a < b { a } else { b }
}

fn eval_max(cx: &Eval) -> Evaluated {
    fold_inputs(cx, larger, i128::max, |x| x)
}

fn eval_min(cx: &Eval) -> Evaluated {
    fold_inputs(cx, smaller, i128::min, |x| x)
}

fn eval_sum(cx: &Eval) -> Evaluated {
    fold_inputs(cx, |a, b| a + b, i128::wrapping_add, |x| x)
}

fn eval_mean(cx: &Eval) -> Evaluated {
    if !cx.input(0)?.dtype().is_float() {
        return Err(OpError::dtype("expected floating-point elements"));
    }
    let count = cx.inputs.len() as f64;
    fold_inputs(cx, |a, b| a + b, i128::wrapping_add, |x| x / count)
}

fn sign(x: f64) -> f64 {
    if x == 0.0 || x.is_nan() { x } else { x.signum() }
}

/// Bounds are inputs (attributes before version 11); the upper one wins where they cross.
fn eval_clip(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    if !x.dtype().is_float() {
        let bound = |index: usize, open: i128| match cx.optional(index) {
            Some(t) => t.to_i128()?.first().copied().ok_or_else(|| OpError::shape("a bound must be a scalar")),
            None => Ok(open),
        };
        let (low, high) = (bound(1, i128::MIN)?, bound(2, i128::MAX)?);
        return map_each(cx, |x| x, |x| x.max(low).min(high));
    }
    let bound = |index: usize, name: &str, open: f64| match (cx.optional(index), cx.attributes().optional_float(name)?)
    {
        (Some(t), _) => t.to_f64()?.first().copied().ok_or_else(|| OpError::shape("a bound must be a scalar")),
        (None, Some(v)) => Ok(f64::from(v)),
        (None, None) => Ok(open),
    };
    let (low, high) = (bound(1, "min", f64::NEG_INFINITY)?, bound(2, "max", f64::INFINITY)?);
    map_floats(cx, |x| smaller(larger(x, low), high))
}

/// Shifting by the width or more, or by a negative amount, leaves only copies of the sign.
fn eval_bit_shift(cx: &Eval) -> Evaluated {
    match cx.attributes().string("direction", "")? {
        "LEFT" => map_integers(cx, |a, by| if (0..64).contains(&by) { a << by } else { 0 }),
        "RIGHT" => map_integers(cx, |a, by| a >> if (0..64).contains(&by) { by } else { 127 }),
        other => Err(OpError::attribute("direction", format!("must be LEFT or RIGHT, found {other:?}"))),
    }
}

fn eval_bitwise_not(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let values: Vec<i128> = x.to_i128()?.into_iter().map(|v| !v).collect();
    Ok(vec![Tensor::from_i128(x.dtype(), x.shape(), &values)?])
}

fn add_gradient(cx: &mut Gradient) -> Grads {
    let dy = cx.grad()?;
    cx.each_input(|cx, _, x| cx.sum_to(dy, x))
}

fn sub_gradient(cx: &mut Gradient) -> Grads {
    let dy = cx.grad()?;
    cx.each_input(|cx, index, x| {
        let dx = cx.sum_to(dy, x)?;
        if index == 0 { Ok(dx) } else { cx.op("Neg", &[dx]) }
    })
}

fn mul_gradient(cx: &mut Gradient) -> Grads {
    let (a, b, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    cx.each_input(|cx, index, x| {
        let product = cx.op("Mul", &[dy, if index == 0 { b } else { a }])?;
        cx.sum_to(product, x)
    })
}

/// da = dy / b and db = -dy y / b.
fn div_gradient(cx: &mut Gradient) -> Grads {
    let (b, dy) = (cx.input(1)?, cx.grad()?);
    cx.each_input(|cx, index, x| {
        let quotient = cx.op("Div", &[dy, b])?;
        if index == 0 {
            return cx.sum_to(quotient, x);
        }
        let y = cx.output(0)?;
        let product = cx.op("Mul", &[quotient, y])?;
        let product = cx.op("Neg", &[product])?;
        cx.sum_to(product, x)
    })
}

/// da = dy b a^(b-1) and db = dy y ln a, the latter zero where a is not positive, as its limit at zero is.
fn pow_gradient(cx: &mut Gradient) -> Grads {
    let (a, b, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let b = cx.cast_like(b, a)?;
    cx.each_input(|cx, index, x| {
        let product = if index == 0 {
            let one = cx.scalar_like(1.0, a)?;
            let less = cx.op("Sub", &[b, one])?;
            let power = cx.op("Pow", &[a, less])?;
            let slope = cx.op("Mul", &[b, power])?;
            cx.op("Mul", &[dy, slope])?
        } else {
            let y = cx.output(0)?;
            let zero = cx.scalar_like(0.0, a)?;
            let positive = cx.op("Greater", &[a, zero])?;
            let log = cx.op("Log", &[a])?;
            let slope = cx.op("Mul", &[y, log])?;
            let product = cx.op("Mul", &[dy, slope])?;
            cx.op("Where", &[positive, product, zero])?
        };
        cx.sum_to(product, x)
    })
}

/// The first operand that attains the extremum takes the gradient, whether it is asked for or not.
fn extremum_gradient(cx: &mut Gradient) -> Grads {
    let (y, mut left) = (cx.output(0)?, cx.grad()?);
    let zero = cx.scalar_like(0.0, y)?;
    let mut grads = Vec::new();
    for index in 0..cx.node.inputs.len() {
        let x = cx.input(index)?;
        let attains = cx.op("Equal", &[x, y])?;
        let share = cx.op("Where", &[attains, left, zero])?;
        left = cx.op("Where", &[attains, zero, left])?;
        grads.push(if cx.wants(index) { Some(cx.sum_to(share, x)?) } else { None });
    }
    Ok(grads)
}

fn sum_gradient(cx: &mut Gradient) -> Grads {
    add_gradient(cx)
}

fn mean_gradient(cx: &mut Gradient) -> Grads {
    let dy = cx.grad()?;
    let count = cx.scalar_like(cx.node.inputs.len() as f64, dy)?;
    let share = cx.op("Div", &[dy, count])?;
    cx.each_input(|cx, _, x| cx.sum_to(share, x))
}

/// Constant but for single points, where there is no slope: no gradient flows back.
fn flat_gradient(cx: &mut Gradient) -> Grads {
    Ok(vec![None; cx.node.inputs.len()])
}

fn neg_gradient(cx: &mut Gradient) -> Grads {
    let dy = cx.grad()?;
    Ok(vec![Some(cx.op("Neg", &[dy])?)])
}

fn abs_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let slope = cx.op("Sign", &[x])?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

fn reciprocal_gradient(cx: &mut Gradient) -> Grads {
    let (y, dy) = (cx.output(0)?, cx.grad()?);
    let square = cx.op("Mul", &[y, y])?;
    let product = cx.op("Mul", &[dy, square])?;
    Ok(vec![Some(cx.op("Neg", &[product])?)])
}

fn sqrt_gradient(cx: &mut Gradient) -> Grads {
    let (y, dy) = (cx.output(0)?, cx.grad()?);
    let half = cx.scalar_like(0.5, y)?;
    let scaled = cx.op("Mul", &[dy, half])?;
    Ok(vec![Some(cx.op("Div", &[scaled, y])?)])
}

fn exp_gradient(cx: &mut Gradient) -> Grads {
    let (y, dy) = (cx.output(0)?, cx.grad()?);
    Ok(vec![Some(cx.op("Mul", &[dy, y])?)])
}

fn log_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    Ok(vec![Some(cx.op("Div", &[dy, x])?)])
}

/// dx = dy where x lies between the bounds, themselves included.
fn clip_gradient(cx: &mut Gradient) -> Grads {
    let (x, mut dx) = (cx.input(0)?, cx.grad()?);
    let zero = cx.scalar_like(0.0, x)?;
    for (index, inside) in [(1, "GreaterOrEqual"), (2, "LessOrEqual")] {
        let Some(bound) = cx.optional(index) else { continue };
        let inside = cx.op(inside, &[x, bound])?;
        dx = cx.op("Where", &[inside, dx, zero])?;
    }
    Ok(std::iter::once(Some(dx)).chain(vec![None; cx.node.inputs.len() - 1]).collect())
}
