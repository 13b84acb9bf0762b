//! Trigonometric and hyperbolic functions and their inverses, and the window functions made of cosines.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::ValueId;
use crate::op::elementwise::{map_floats, unary};
use crate::op::{Arity, Eval, Fact, Gradient, Infer, Op, OpError, one_flop_per_output};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

/// The family.
pub(super) const OPS: &[Op] = &[
    unary("Sin", &[7, 22], |cx| map_floats(cx, libm::sin)).gradient(|cx| slope(cx, |cx, x, _| cx.op("Cos", &[x]))),
    unary("Cos", &[7, 22], |cx| map_floats(cx, libm::cos)).gradient(cos_gradient),
    unary("Tan", &[7, 22], |cx| map_floats(cx, libm::tan)).gradient(|cx| {
        slope(cx, |cx, _, y| {
            let square = cx.op("Mul", &[y, y])?;
            let one = cx.scalar_like(1.0, y)?;
            cx.op("Add", &[one, square])
        })
    }),
    unary("Asin", &[7, 22], |cx| map_floats(cx, libm::asin))
        .gradient(|cx| slope(cx, |cx, x, _| inverse_root(cx, x, 1.0, -1.0))),
    unary("Acos", &[7, 22], |cx| map_floats(cx, libm::acos)).gradient(acos_gradient),
    unary("Atan", &[7, 22], |cx| map_floats(cx, libm::atan))
        .gradient(|cx| slope(cx, |cx, x, _| inverse_square(cx, x, 1.0, 1.0))),
    unary("Sinh", &[9, 22], |cx| map_floats(cx, libm::sinh)).gradient(|cx| slope(cx, |cx, x, _| cx.op("Cosh", &[x]))),
    unary("Cosh", &[9, 22], |cx| map_floats(cx, libm::cosh)).gradient(|cx| slope(cx, |cx, x, _| cx.op("Sinh", &[x]))),
    unary("Asinh", &[9, 22], |cx| map_floats(cx, libm::asinh))
        .gradient(|cx| slope(cx, |cx, x, _| inverse_root(cx, x, 1.0, 1.0))),
    unary("Acosh", &[9, 22], |cx| map_floats(cx, libm::acosh))
        .gradient(|cx| slope(cx, |cx, x, _| inverse_root(cx, x, -1.0, 1.0))),
    unary("Atanh", &[9, 22], |cx| map_floats(cx, libm::atanh))
        .gradient(|cx| slope(cx, |cx, x, _| inverse_square(cx, x, 1.0, -1.0))),
    window("HannWindow", |cx| eval_window(cx, &[0.5, 0.5])),
    // The coefficients that ONNX specifies: 25/46 and 21/46, and those of Blackman's truncated window.
    window("HammingWindow", |cx| eval_window(cx, &[25.0 / 46.0, 21.0 / 46.0])),
    window("BlackmanWindow", |cx| eval_window(cx, &[0.42, 0.5, 0.08])),
];

const fn window(name: &'static str, eval: fn(&Eval) -> Evaluated) -> Op {
    Op::onnx(name, &[17], Arity::exact(1), infer_window, eval)
        .flops(one_flop_per_output)
        .no_gradient("integer input")
        .no_channels("the input is a length")
}

/// dx = dy times a slope built from x and y.
fn slope(cx: &mut Gradient, build: impl Fn(&mut Gradient, ValueId, ValueId) -> Result<ValueId, OpError>) -> Grads {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, cx.grad()?);
    let slope = build(cx, x, y)?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

fn cos_gradient(cx: &mut Gradient) -> Grads {
    slope(cx, |cx, x, _| {
        let sine = cx.op("Sin", &[x])?;
        cx.op("Neg", &[sine])
    })
}

fn acos_gradient(cx: &mut Gradient) -> Grads {
    slope(cx, |cx, x, _| {
        let root = inverse_root(cx, x, 1.0, -1.0)?;
        cx.op("Neg", &[root])
    })
}

/// 1 / (a + b x²)
fn inverse_square(cx: &mut Gradient, x: ValueId, a: f64, b: f64) -> Result<ValueId, OpError> {
    let (a, b) = (cx.scalar_like(a, x)?, cx.scalar_like(b, x)?);
    let square = cx.op("Mul", &[x, x])?;
    let scaled = cx.op("Mul", &[b, square])?;
    let sum = cx.op("Add", &[a, scaled])?;
    cx.op("Reciprocal", &[sum])
}

/// 1 / sqrt(a + b x²)
fn inverse_root(cx: &mut Gradient, x: ValueId, a: f64, b: f64) -> Result<ValueId, OpError> {
    let inverse = inverse_square(cx, x, a, b)?;
    cx.op("Sqrt", &[inverse])
}

fn infer_window(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    cx.expect_rank(0, 0, "the window's size")?;
    let size = cx.optional(0).and_then(|x| x.content()).and_then(|c| c.first().cloned());
    Ok(vec![Fact::tensor(
        Some(window_dtype(cx.attributes().int("output_datatype", 1)?)?),
        vec![size.unwrap_or(Dim::Unknown)],
    )])
}

fn window_dtype(number: i64) -> Result<DType, OpError> {
    super::cast::dtype_of("output_datatype", number)
}

/// `Σ ± coefficient[k] cos(2π k n / N)`, where N is the size, or one less for a window that is symmetric.
fn eval_window(cx: &Eval, coefficients: &[f64]) -> Evaluated {
    let size = cx.input(0)?.to_i64()?.first().copied().and_then(|n| usize::try_from(n).ok());
    let size = size.ok_or_else(|| OpError::value("the window's size must be a number that is not negative"))?;
    let period = if cx.attributes().flag("periodic", true)? { size } else { size.saturating_sub(1) };
    let dtype = window_dtype(cx.attributes().int("output_datatype", 1)?)?;
    let mut out = Tensor::zeros(DType::F64, &[size])?;
    for (n, value) in out.as_mut_slice::<f64>()?.iter_mut().enumerate() {
        let phase = if period == 0 { 0.0 } else { std::f64::consts::TAU * n as f64 / period as f64 };
        let term = |(k, c): (usize, &f64)| if k % 2 == 0 { *c } else { -c } * libm::cos(phase * k as f64);
        *value = coefficients.iter().enumerate().map(term).sum();
    }
    Ok(vec![out.cast(dtype)?])
}
