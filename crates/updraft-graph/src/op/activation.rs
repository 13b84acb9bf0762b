//! Activation functions.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};

use crate::graph::ValueId;
use crate::op::elementwise::{binary, larger, map_each, map_float_pairs, map_floats, map_pairs, smaller, unary};
use crate::op::{Eval, Gradient, Op, OpError, OpView};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

const SECOND_ORDER: &str = "second-order derivatives are not implemented";

/// The family.
pub(super) const OPS: &[Op] = &[
    unary("Relu", &[6, 13, 14], eval_relu).gradient(relu_gradient),
    unary("LeakyRelu", &[6, 16], eval_leaky_relu).gradient(leaky_relu_gradient),
    binary("PRelu", &[7, 9, 16], eval_prelu).gradient(prelu_gradient),
    unary("Elu", &[6, 22], eval_elu).gradient(elu_gradient),
    unary("Selu", &[6, 22], eval_selu).gradient(selu_gradient),
    unary("Celu", &[12, 28], eval_celu).gradient(celu_gradient),
    unary("ThresholdedRelu", &[10, 22], eval_thresholded_relu).gradient(thresholded_relu_gradient),
    unary("Shrink", &[9], eval_shrink).gradient(shrink_gradient),
    unary("Sigmoid", &[6, 13], |cx| map_floats(cx, sigmoid)).gradient(sigmoid_gradient),
    unary("HardSigmoid", &[6, 22], eval_hard_sigmoid).gradient(hard_sigmoid_gradient),
    unary("HardSwish", &[14, 22], |cx| map_floats(cx, |x| x * (x / 6.0 + 0.5).clamp(0.0, 1.0)))
        .gradient(hard_swish_gradient),
    unary("Tanh", &[6, 13], |cx| map_floats(cx, libm::tanh)).gradient(tanh_gradient),
    unary("Softplus", &[1, 22], |cx| map_floats(cx, softplus)).gradient(softplus_gradient),
    unary("Softsign", &[1, 22], |cx| map_floats(cx, |x| x / (1.0 + x.abs()))).gradient(softsign_gradient),
    unary("Erf", &[9, 13], |cx| map_floats(cx, libm::erf)).gradient(erf_gradient),
    unary("Gelu", &[20], eval_gelu).gradient(gelu_gradient),
    unary("Mish", &[18, 22], |cx| map_floats(cx, |x| x * libm::tanh(softplus(x)))).gradient(mish_gradient),
    unary("Swish", &[24], eval_swish).gradient(swish_gradient),
    binary("SwiGLU", &[28], eval_swiglu).gradient(swiglu_gradient),
    binary("ReluGradient", &[1], eval_relu_gradient).own().no_gradient(SECOND_ORDER),
    binary("GeluGradient", &[1], eval_gelu_gradient).own().no_gradient(SECOND_ORDER),
];

/// Written so that not-a-number stays one.
fn eval_relu(cx: &Eval) -> Evaluated {
    map_each(cx, |x| if x < 0.0 { 0.0 } else { x }, |x| x.max(0))
}

/// dx = dy where the output is positive. The output is read, not the input, so that the input's memory is free.
fn relu_gradient(cx: &mut Gradient) -> Grads {
    let (y, dy) = (cx.output(0)?, cx.grad()?);
    Ok(vec![Some(cx.graph.own_op("ReluGradient", &[dy, y], [])?)])
}

/// Inputs: gradient of the output, output.
fn eval_relu_gradient(cx: &Eval) -> Evaluated {
    map_pairs(cx, |dy, y| if y > 0.0 { dy } else { 0.0 }, |dy, y| if y > 0 { dy } else { 0 })
}

fn alpha(cx: &OpView, default: f32) -> Result<f64, OpError> {
    Ok(f64::from(cx.attributes().float("alpha", default)?))
}

fn eval_leaky_relu(cx: &Eval) -> Evaluated {
    let alpha = alpha(cx, 0.01)?;
    map_floats(cx, |x| if x < 0.0 { alpha * x } else { x })
}

fn leaky_relu_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let alpha = cx.scalar_like(alpha(&cx.view(), 0.01)?, x)?;
    let scaled = cx.op("Mul", &[dy, alpha])?;
    Ok(vec![Some(cx.below(x, 0.0, scaled, dy)?)])
}

/// Inputs: x, slope (broadcast to x) where x is negative.
fn eval_prelu(cx: &Eval) -> Evaluated {
    map_pairs(
        cx,
        |x, slope| if x < 0.0 { slope * x } else { x },
        |x, slope| if x < 0 { slope.wrapping_mul(x) } else { x },
    )
}

fn prelu_gradient(cx: &mut Gradient) -> Grads {
    let (x, slope, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let zero = cx.scalar_like(0.0, dy)?;
    cx.each_input(|cx, index, like| {
        let scaled = cx.op("Mul", &[dy, if index == 0 { slope } else { x }])?;
        let share = cx.below(x, 0.0, scaled, if index == 0 { dy } else { zero })?;
        cx.sum_to(share, like)
    })
}

fn eval_elu(cx: &Eval) -> Evaluated {
    let alpha = alpha(cx, 1.0)?;
    map_floats(cx, |x| if x < 0.0 { alpha * libm::expm1(x) } else { x })
}

/// The slope of `alpha (e^x - 1)` is `y + alpha`.
fn elu_gradient(cx: &mut Gradient) -> Grads {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, cx.grad()?);
    let alpha = cx.scalar_like(alpha(&cx.view(), 1.0)?, x)?;
    let slope = cx.op("Add", &[y, alpha])?;
    let scaled = cx.op("Mul", &[dy, slope])?;
    Ok(vec![Some(cx.below(x, 0.0, scaled, dy)?)])
}

/// The constants of Klambauer, Unterthiner, Mayr, Hochreiter: "Self-normalizing neural networks", 2017.
fn selu_constants(cx: &OpView) -> Result<(f64, f64), OpError> {
    Ok((alpha(cx, 1.673_263_2)?, f64::from(cx.attributes().float("gamma", 1.050_701)?)))
}

fn eval_selu(cx: &Eval) -> Evaluated {
    let (alpha, gamma) = selu_constants(cx)?;
    map_floats(cx, |x| gamma * if x < 0.0 { alpha * libm::expm1(x) } else { x })
}

/// The slope of `gamma alpha (e^x - 1)` is `y + gamma alpha`.
fn selu_gradient(cx: &mut Gradient) -> Grads {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, cx.grad()?);
    let (alpha, gamma) = selu_constants(&cx.view())?;
    let (shift, gamma) = (cx.scalar_like(gamma * alpha, x)?, cx.scalar_like(gamma, x)?);
    let slope = cx.op("Add", &[y, shift])?;
    let slope = cx.below(x, 0.0, slope, gamma)?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

fn eval_celu(cx: &Eval) -> Evaluated {
    let alpha = alpha(cx, 1.0)?;
    map_floats(cx, |x| if x < 0.0 { alpha * libm::expm1(x / alpha) } else { x })
}

/// The slope of `alpha (e^(x / alpha) - 1)` is `y / alpha + 1`.
fn celu_gradient(cx: &mut Gradient) -> Grads {
    let (x, y, dy) = (cx.input(0)?, cx.output(0)?, cx.grad()?);
    let (alpha, one) = (cx.scalar_like(alpha(&cx.view(), 1.0)?, x)?, cx.scalar_like(1.0, x)?);
    let slope = cx.op("Div", &[y, alpha])?;
    let slope = cx.op("Add", &[slope, one])?;
    let scaled = cx.op("Mul", &[dy, slope])?;
    Ok(vec![Some(cx.below(x, 0.0, scaled, dy)?)])
}

fn eval_thresholded_relu(cx: &Eval) -> Evaluated {
    let alpha = alpha(cx, 1.0)?;
    map_floats(cx, |x| if x <= alpha { 0.0 } else { x })
}

fn thresholded_relu_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let (alpha, zero) = (cx.scalar_like(alpha(&cx.view(), 1.0)?, x)?, cx.scalar_like(0.0, x)?);
    let passes = cx.op("Greater", &[x, alpha])?;
    Ok(vec![Some(cx.op("Where", &[passes, dy, zero])?)])
}

fn eval_shrink(cx: &Eval) -> Evaluated {
    let (bias, bound) =
        (f64::from(cx.attributes().float("bias", 0.0)?), f64::from(cx.attributes().float("lambd", 0.5)?));
    let shrink = |x: f64| {
        if x < -bound {
            x + bias
        } else if x > bound {
            x - bias
        } else {
            0.0
        }
    };
    map_each(cx, shrink, |x| shrink(x as f64) as i128)
}

fn shrink_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let bound = f64::from(cx.node.attributes.float("lambd", 0.5)?);
    let (bound, zero) = (cx.scalar_like(bound, x)?, cx.scalar_like(0.0, x)?);
    let magnitude = cx.op("Abs", &[x])?;
    let passes = cx.op("Greater", &[magnitude, bound])?;
    Ok(vec![Some(cx.op("Where", &[passes, dy, zero])?)])
}

/// Exact at both ends: the exponential is always of a negative number.
fn sigmoid(x: f64) -> f64 {
    let e = libm::exp(-x.abs());
    if x < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) }
}

/// dx = dy y (1 - y)
fn sigmoid_gradient(cx: &mut Gradient) -> Grads {
    let (y, dy) = (cx.output(0)?, cx.grad()?);
    let one = cx.scalar_like(1.0, y)?;
    let rest = cx.op("Sub", &[one, y])?;
    let slope = cx.op("Mul", &[y, rest])?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

fn eval_hard_sigmoid(cx: &Eval) -> Evaluated {
    let (alpha, beta) = (alpha(cx, 0.2)?, f64::from(cx.attributes().float("beta", 0.5)?));
    map_floats(cx, |x| larger(0.0, smaller(1.0, alpha * x + beta)))
}

fn hard_sigmoid_gradient(cx: &mut Gradient) -> Grads {
    let (y, dy) = (cx.output(0)?, cx.grad()?);
    let alpha = cx.scalar_like(alpha(&cx.view(), 0.2)?, y)?;
    let (zero, one) = (cx.scalar_like(0.0, y)?, cx.scalar_like(1.0, y)?);
    let scaled = cx.op("Mul", &[dy, alpha])?;
    let (above, below) = (cx.op("Greater", &[y, zero])?, cx.op("Less", &[y, one])?);
    let inside = cx.op("And", &[above, below])?;
    Ok(vec![Some(cx.op("Where", &[inside, scaled, zero])?)])
}

/// The slope is `x / 3 + 1/2` between -3 and 3, zero before and one after.
fn hard_swish_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let (three, half) = (cx.scalar_like(3.0, x)?, cx.scalar_like(0.5, x)?);
    let (zero, one) = (cx.scalar_like(0.0, x)?, cx.scalar_like(1.0, x)?);
    let slope = cx.op("Div", &[x, three])?;
    let slope = cx.op("Add", &[slope, half])?;
    let slope = cx.below(x, -3.0, zero, slope)?;
    let slope = cx.below(x, 3.0, slope, one)?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

/// dx = dy (1 - y²)
fn tanh_gradient(cx: &mut Gradient) -> Grads {
    let (y, dy) = (cx.output(0)?, cx.grad()?);
    let one = cx.scalar_like(1.0, y)?;
    let square = cx.op("Mul", &[y, y])?;
    let slope = cx.op("Sub", &[one, square])?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

/// `ln(1 + e^x)` without overflow.
fn softplus(x: f64) -> f64 {
    larger(x, 0.0) + libm::log1p(libm::exp(-x.abs()))
}

fn softplus_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let slope = cx.op("Sigmoid", &[x])?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

/// dx = dy / (1 + |x|)²
fn softsign_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let one = cx.scalar_like(1.0, x)?;
    let magnitude = cx.op("Abs", &[x])?;
    let sum = cx.op("Add", &[one, magnitude])?;
    let square = cx.op("Mul", &[sum, sum])?;
    Ok(vec![Some(cx.op("Div", &[dy, square])?)])
}

/// dx = dy 2 / sqrt(π) e^(-x²)
fn erf_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let scale = cx.scalar_like(FRAC_2_SQRT_PI, x)?;
    let square = cx.op("Mul", &[x, x])?;
    let negative = cx.op("Neg", &[square])?;
    let bell = cx.op("Exp", &[negative])?;
    let slope = cx.op("Mul", &[scale, bell])?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

/// Whether to take the approximation by the hyperbolic tangent instead of the error function.
fn is_tanh_gelu(cx: &OpView) -> Result<bool, OpError> {
    match cx.attributes().string("approximate", "none")? {
        "none" => Ok(false),
        "tanh" => Ok(true),
        other => Err(OpError::attribute("approximate", format!("must be none or tanh, found {other:?}"))),
    }
}

/// Argument of the hyperbolic tangent in the approximation, and its slope (Hendrycks, Gimpel: "Gaussian error linear
/// units", 2016).
fn tanh_gelu_argument(x: f64) -> (f64, f64) {
    let scale = (2.0 / PI).sqrt();
    (scale * (x + 0.044715 * x * x * x), scale * (1.0 + 3.0 * 0.044715 * x * x))
}

fn eval_gelu(cx: &Eval) -> Evaluated {
    if is_tanh_gelu(cx)? {
        map_floats(cx, |x| 0.5 * x * (1.0 + libm::tanh(tanh_gelu_argument(x).0)))
    } else {
        map_floats(cx, |x| 0.5 * x * (1.0 + libm::erf(x * FRAC_1_SQRT_2)))
    }
}

fn gelu_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let attributes = cx.node.attributes.clone();
    Ok(vec![Some(cx.graph.own_op("GeluGradient", &[dy, x], attributes)?)])
}

/// Inputs: gradient of the output, x.
fn eval_gelu_gradient(cx: &Eval) -> Evaluated {
    if is_tanh_gelu(cx)? {
        let slope = |x: f64| {
            let (argument, inner) = tanh_gelu_argument(x);
            let t = libm::tanh(argument);
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
        };
        map_float_pairs(cx, move |dy, x| dy * slope(x))
    } else {
        let slope = |x: f64| {
            let bell = libm::exp(-0.5 * x * x) / (2.0 * PI).sqrt();
            0.5 * (1.0 + libm::erf(x * FRAC_1_SQRT_2)) + x * bell
        };
        map_float_pairs(cx, move |dy, x| dy * slope(x))
    }
}

/// The slope of `x t` with `t = tanh(softplus(x))` and `s = sigmoid(x)` is `t + x (1 - t²) s`.
fn mish_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let one = cx.scalar_like(1.0, x)?;
    let soft = cx.op("Softplus", &[x])?;
    let t = cx.op("Tanh", &[soft])?;
    let s = cx.op("Sigmoid", &[x])?;
    let square = cx.op("Mul", &[t, t])?;
    let rest = cx.op("Sub", &[one, square])?;
    let product = cx.op("Mul", &[rest, s])?;
    let product = cx.op("Mul", &[x, product])?;
    let slope = cx.op("Add", &[t, product])?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

fn swish(x: f64, alpha: f64) -> f64 {
    x * sigmoid(alpha * x)
}

fn eval_swish(cx: &Eval) -> Evaluated {
    let alpha = alpha(cx, 1.0)?;
    map_floats(cx, |x| swish(x, alpha))
}

/// The slope of `x s` with `s = sigmoid(alpha x)` is `s + alpha x s (1 - s)`.
fn swish_slope(cx: &mut Gradient, x: ValueId) -> Result<ValueId, OpError> {
    let (alpha, one) = (cx.scalar_like(alpha(&cx.view(), 1.0)?, x)?, cx.scalar_like(1.0, x)?);
    let scaled = cx.op("Mul", &[alpha, x])?;
    let s = cx.op("Sigmoid", &[scaled])?;
    let rest = cx.op("Sub", &[one, s])?;
    let product = cx.op("Mul", &[scaled, rest])?;
    let sum = cx.op("Add", &[one, product])?;
    cx.op("Mul", &[s, sum])
}

fn swish_gradient(cx: &mut Gradient) -> Grads {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let slope = swish_slope(cx, x)?;
    Ok(vec![Some(cx.op("Mul", &[dy, slope])?)])
}

/// Inputs: gate, value; the gate passes through Swish.
fn eval_swiglu(cx: &Eval) -> Evaluated {
    let alpha = alpha(cx, 1.0)?;
    let (a, b) = (cx.input(0)?, cx.input(1)?);
    if a.shape() != b.shape() {
        return Err(OpError::shape(format!("gate {:?} and value {:?} must have one shape", a.shape(), b.shape())));
    }
    map_float_pairs(cx, |gate, value| swish(gate, alpha) * value)
}

fn swiglu_gradient(cx: &mut Gradient) -> Grads {
    let (gate, value, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let alpha = cx.node.attributes.float("alpha", 1.0)?;
    cx.each_input(|cx, index, _| {
        if index == 0 {
            let slope = swish_slope(cx, gate)?;
            let product = cx.op("Mul", &[dy, value])?;
            return cx.op("Mul", &[product, slope]);
        }
        let factor = cx.scalar_like(f64::from(alpha), gate)?;
        let scaled = cx.op("Mul", &[factor, gate])?;
        let s = cx.op("Sigmoid", &[scaled])?;
        let swish = cx.op("Mul", &[gate, s])?;
        cx.op("Mul", &[dy, swish])
    })
}
