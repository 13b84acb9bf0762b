//! Elementwise operators as operations of a [`Program`](crate::cpu::elementwise::Program).

use updraft_graph::{DType, OpError, UPDRAFT_DOMAIN};

use crate::cpu::build::Build;
use crate::cpu::convert::Kind;
use crate::cpu::elementwise::Op;

/// An argument of an operation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Argument {
    /// An input of the node.
    Input(usize),
    /// The result of an earlier operation of the node.
    Result(usize),
    /// A number.
    Number(f32),
}

/// Operations in order, each with its arguments.
pub(crate) type Operations = Vec<(Op, Vec<Argument>)>;

use Argument::{Input, Number, Result as Made};

/// The operations that compute a node, the last of which makes its output; `None` where it is not elementwise, or of
/// types that programs do not know.
pub(crate) fn operations(cx: &Build) -> Result<Option<Operations>, OpError> {
    let node = cx.view.node;
    if node.domain.is_empty() && matches!(node.op.as_str(), "QuantizeLinear" | "DequantizeLinear") {
        return quantization(cx);
    }
    if node.domain.is_empty() && node.op == "Cast" && cx.outputs.iter().flatten().all(|(d, _)| *d == DType::F32) {
        let is_known = cx.dtype(0).and_then(Kind::of).is_some();
        return Ok(is_known.then(|| vec![(Op::Copy, vec![Input(0)])]));
    }
    let known = |dtype: DType| matches!(dtype, DType::F32 | DType::Bool);
    let [Some((out, _))] = cx.outputs.as_slice() else { return Ok(None) };
    if !known(*out)
        || !cx.inputs.iter().flatten().all(|o| known(o.dtype))
        || cx.inputs.first().is_none_or(Option::is_none)
    {
        return Ok(None);
    }
    let attributes = cx.attributes();
    let alpha = |default| attributes.float("alpha", default);
    let floats = cx.inputs.iter().flatten().all(|o| o.dtype == DType::F32);
    let truths = cx.inputs.iter().flatten().all(|o| o.dtype == DType::Bool);
    let one = |op: Op| Ok(Some(vec![(op, vec![Input(0)])]));
    let two = |op: Op| Ok(Some(vec![(op, vec![Input(0), Input(1)])]));
    let tanh_gelu = || match attributes.string("approximate", "none")? {
        "none" => Ok(false),
        "tanh" => Ok(true),
        other => Err(OpError::attribute("approximate", format!("must be none or tanh, found {other:?}"))),
    };
    if node.domain == UPDRAFT_DOMAIN {
        return match node.op.as_str() {
            "ReluGradient" if floats => two(Op::ReluGradient),
            "GeluGradient" if floats => two(if tanh_gelu()? { Op::GeluTanhGradient } else { Op::GeluGradient }),
            _ => Ok(None),
        };
    }
    if !node.domain.is_empty() && node.domain != "ai.onnx" {
        return Ok(None);
    }
    match node.op.as_str() {
        "Not" if truths => one(Op::Not),
        "And" if truths => two(Op::And),
        "Or" if truths => two(Op::Or),
        "Xor" if truths => two(Op::Xor),
        "Equal" => two(Op::Equal),
        "Where" if *out == DType::F32 || *out == DType::Bool => {
            Ok(Some(vec![(Op::Where, vec![Input(0), Input(1), Input(2)])]))
        }
        "Cast" => Ok(Some(vec![(Op::Equal, vec![Input(0), Number(0.0)]), (Op::Not, vec![Made(0)])])),
        _ if !floats => Ok(None),
        "Neg" => one(Op::Neg),
        "Abs" => one(Op::Abs),
        "Sign" => one(Op::Sign),
        "Floor" => one(Op::Floor),
        "Ceil" => one(Op::Ceil),
        "Round" => one(Op::Round),
        "Sqrt" => one(Op::Sqrt),
        "Reciprocal" => one(Op::Reciprocal),
        "Exp" => one(Op::Exp),
        "Log" => one(Op::Log),
        "Erf" => one(Op::Erf),
        "Tanh" => one(Op::Tanh),
        "Sigmoid" => one(Op::Sigmoid),
        "Softplus" => one(Op::Softplus),
        "Softsign" => one(Op::Softsign),
        "Sin" => one(Op::Sin),
        "Cos" => one(Op::Cos),
        "Relu" => one(Op::Relu),
        "IsNaN" => one(Op::IsNan),
        "Gelu" => one(if tanh_gelu()? { Op::GeluTanh } else { Op::Gelu }),
        "LeakyRelu" => one(Op::LeakyRelu(alpha(0.01)?)),
        "Elu" => one(Op::Elu(alpha(1.0)?)),
        "Selu" => one(Op::Selu(alpha(1.673_263_2)?, attributes.float("gamma", 1.050_701)?)),
        "HardSigmoid" => one(Op::HardSigmoid(alpha(0.2)?, attributes.float("beta", 0.5)?)),
        "HardSwish" => {
            Ok(Some(vec![(Op::HardSigmoid(1.0 / 6.0, 0.5), vec![Input(0)]), (Op::Mul, vec![Input(0), Made(0)])]))
        }
        "Mish" => Ok(Some(vec![
            (Op::Softplus, vec![Input(0)]),
            (Op::Tanh, vec![Made(0)]),
            (Op::Mul, vec![Input(0), Made(1)]),
        ])),
        "Swish" => Ok(Some(vec![
            (Op::Mul, vec![Input(0), Number(alpha(1.0)?)]),
            (Op::Sigmoid, vec![Made(0)]),
            (Op::Mul, vec![Input(0), Made(1)]),
        ])),
        "PRelu" => Ok(Some(vec![
            (Op::Less, vec![Input(0), Number(0.0)]),
            (Op::Mul, vec![Input(1), Input(0)]),
            (Op::Where, vec![Made(0), Made(1), Input(0)]),
        ])),
        "Add" => two(Op::Add),
        "Sub" => two(Op::Sub),
        "Mul" => two(Op::Mul),
        "Div" => two(Op::Div),
        "Less" => two(Op::Less),
        "LessOrEqual" => two(Op::LessOrEqual),
        "Greater" => Ok(Some(vec![(Op::Less, vec![Input(1), Input(0)])])),
        "GreaterOrEqual" => Ok(Some(vec![(Op::LessOrEqual, vec![Input(1), Input(0)])])),
        "Pow" => match cx.constant(1).filter(|t| t.len() == 1).map(|t| t.as_slice::<f32>()).transpose()? {
            Some([exponent]) if *exponent == 2.0 => Ok(Some(vec![(Op::Mul, vec![Input(0), Input(0)])])),
            Some([exponent]) if *exponent == 3.0 => {
                Ok(Some(vec![(Op::Mul, vec![Input(0), Input(0)]), (Op::Mul, vec![Made(0), Input(0)])]))
            }
            _ => two(Op::Pow),
        },
        "Sum" | "Max" | "Min" | "Mean" => {
            let op = match node.op.as_str() {
                "Max" => Op::Max,
                "Min" => Op::Min,
                _ => Op::Add,
            };
            let count = cx.inputs.len();
            if cx.inputs.iter().any(Option::is_none) {
                return Ok(None);
            }
            let mut out = vec![(Op::Copy, vec![Input(0)])];
            for index in 1..count {
                out.push((op, vec![Made(index - 1), Input(index)]));
            }
            if node.op == "Mean" {
                out.push((Op::Div, vec![Made(count - 1), Number(count as f32)]));
            }
            Ok(Some(out))
        }
        "Clip" if cx.view.opset >= 11 => {
            let mut out = vec![(Op::Copy, vec![Input(0)])];
            for (index, op) in [(1, Op::Max), (2, Op::Min)] {
                if cx.input(index).is_some() {
                    out.push((op, vec![Made(out.len() - 1), Input(index)]));
                }
            }
            Ok(Some(out))
        }
        _ => Ok(None),
    }
}

/// QuantizeLinear and DequantizeLinear with scales of `f32`: one for all, or one for each index along an axis.
fn quantization(cx: &Build) -> Result<Option<Operations>, OpError> {
    let attributes = cx.attributes();
    let [Some((out, _))] = cx.outputs.as_slice() else { return Ok(None) };
    let (Some(from), Some(zero)) = (cx.dtype(0), cx.dtype(2).or(Some(DType::U8))) else { return Ok(None) };
    let precision = attributes.int("precision", 0)?;
    if cx.dtype(1) != Some(DType::F32) || attributes.int("block_size", 0)? != 0 || !matches!(precision, 0 | 1) {
        return Ok(None);
    }
    let has_zero = cx.input(2).is_some();
    if cx.view.node.op == "QuantizeLinear" {
        let limits = updraft_graph::op::quant::code_range(*out).filter(|_| Kind::of(*out).is_some());
        let Some((low, high)) = limits.filter(|_| from == DType::F32 && (!has_zero || zero == *out)) else {
            return Ok(None);
        };
        let zero = if has_zero { Input(2) } else { Number(0.0) };
        let code = Op::Code { low: low as f32, high: high as f32 };
        return Ok(Some(vec![(Op::Div, vec![Input(0), Input(1)]), (code, vec![Made(0), zero])]));
    }
    let is_integer = from != DType::F32 && from != DType::Bool && Kind::of(from).is_some();
    if *out != DType::F32 || !is_integer || (has_zero && zero != from) {
        return Ok(None);
    }
    let is_zero = |t: &updraft_graph::Tensor| t.bytes().iter().all(|b| *b == 0);
    if !has_zero || cx.constant(2).is_some_and(is_zero) {
        return Ok(Some(vec![(Op::Mul, vec![Input(0), Input(1)])]));
    }
    // Numbers of 32 bits are not exact before the zero point is taken off.
    Ok((from != DType::I32).then(|| vec![(Op::Sub, vec![Input(0), Input(2)]), (Op::Mul, vec![Made(0), Input(1)])]))
}
