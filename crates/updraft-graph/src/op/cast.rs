//! Conversion between element types.
//!
//! Floats of 8 and 4 bits have their own rules for magnitudes that do not fit (attribute `saturate`); scales of type
//! `f8e8m0` also for the direction of rounding (attribute `round_mode`). A conversion from `f16`, `f32` or `f64` goes
//! straight to the target and rounds once.

use crate::dtype::DType;
use crate::graph::ValueId;
use crate::op::elementwise::channels;
use crate::op::{Arity, Eval, Fact, Gradient, Infer, Op, OpError, one_flop_per_output};
use crate::tensor::{Overflow, Tensor, encode_minifloat};

type Evaluated = Result<Vec<Tensor>, OpError>;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("Cast", &[6, 9, 13, 19, 21, 23, 24, 25, 28], Arity::exact(1), infer_cast, eval_cast)
        .flops(one_flop_per_output)
        .gradient(cast_gradient)
        .channels(channels),
    Op::onnx("CastLike", &[15, 19, 21, 23, 24, 25], Arity::exact(2), infer_cast_like, eval_cast_like)
        .flops(one_flop_per_output)
        .gradient(cast_gradient)
        .no_channels("the second input is read for its type only; Cast says the same with links"),
    Op::onnx("BitCast", &[26], Arity::exact(1), infer_bit_cast, eval_bit_cast)
        .no_gradient("bits seen as another type have no derivative")
        .channels(channels),
];

/// The element type that an attribute names by its ONNX number.
pub(super) fn dtype_of(attribute: &str, number: i64) -> Result<DType, OpError> {
    i32::try_from(number)
        .ok()
        .and_then(DType::from_onnx)
        .ok_or_else(|| OpError::attribute(attribute, format!("{number} is no element type")))
}

fn target(attributes: &crate::Attributes) -> Result<DType, OpError> {
    let number = attributes.optional_int("to")?.ok_or_else(|| OpError::attribute("to", "is missing"))?;
    dtype_of("to", number)
}

fn infer_cast(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let to = target(cx.attributes())?;
    let x = cx.input(0, "a tensor")?;
    // Sizes stay sizes in integers wide enough for any of them.
    let content = x.content().filter(|_| matches!(to, DType::I64 | DType::I32 | DType::U64));
    Ok(vec![Fact { dtype: Some(to), shape: x.shape.clone(), content }])
}

fn infer_cast_like(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (x, like) = (cx.input(0, "a tensor")?, cx.input(1, "a tensor of the target type")?);
    let content = x.content().filter(|_| matches!(like.dtype, Some(DType::I64 | DType::I32 | DType::U64)));
    Ok(vec![Fact { dtype: like.dtype, shape: x.shape.clone(), content }])
}

fn eval_cast(cx: &Eval) -> Evaluated {
    cast(cx, target(cx.attributes())?)
}

fn eval_cast_like(cx: &Eval) -> Evaluated {
    cast(cx, cx.input(1)?.dtype())
}

fn cast(cx: &Eval, to: DType) -> Evaluated {
    let x = cx.input(0)?;
    if x.dtype() == to {
        return Ok(vec![x.clone()]);
    }
    let out = match (x.dtype(), to) {
        (DType::String, _) => from_strings(x, to)?,
        (_, DType::String) => Tensor::from_strings(x.shape(), to_strings(x)?)?,
        (_, DType::F8E8M0) => Tensor::from_bytes(to, x.shape(), &scale_codes(cx, &x.to_f64()?)?)?,
        (_, DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ) => {
            let saturate = cx.attributes().flag("saturate", true)?;
            let overflow = if saturate { Overflow::Saturate } else { Overflow::Infinite };
            let codes: Vec<u8> = x.to_f64()?.iter().map(|v| encode_minifloat(to, *v, overflow)).collect();
            Tensor::from_bytes(to, x.shape(), &codes)?
        }
        _ => x.cast(to)?,
    };
    Ok(vec![out])
}

/// Powers of two from 2^-127 on, by the rounding that the node asks for. Negative numbers, for which ONNX specifies
/// nothing, become not-a-number.
fn scale_codes(cx: &Eval, values: &[f64]) -> Result<Vec<u8>, OpError> {
    const NAN: u8 = 0xff;
    let saturate = cx.attributes().flag("saturate", true)?;
    let rounds_up: fn(f64) -> bool = match cx.attributes().string("round_mode", "up")? {
        "up" => |mantissa| mantissa > 1.0,
        "down" => |_| false,
        "nearest" => |mantissa| mantissa >= 1.5,
        other => {
            return Err(OpError::attribute("round_mode", format!("must be up, down or nearest, found {other:?}")));
        }
    };
    let code = |value: f64| {
        if value.is_nan() || value < 0.0 {
            return NAN;
        }
        let exponent = if value == 0.0 {
            i32::MIN
        } else if value.is_infinite() {
            i32::MAX
        } else {
            let (half, exponent) = libm::frexp(value);
            exponent - 1 + i32::from(rounds_up(2.0 * half))
        };
        match exponent {
            -127..=127 => (exponent + 127) as u8,
            _ if !saturate => NAN,
            below if below < 0 => 0,
            _ => 0xfe,
        }
    };
    Ok(values.iter().map(|v| code(*v)).collect())
}

/// Decimal numbers, and the names of the special values in any case.
fn from_strings(x: &Tensor, to: DType) -> Result<Tensor, OpError> {
    let parse = |text: &Vec<u8>| {
        let text = String::from_utf8_lossy(text);
        let number: Option<f64> = text.trim().parse().ok();
        number.ok_or_else(|| OpError::value(format!("{text:?} is no number")))
    };
    if to.is_integer() {
        // Past 2^53 only integers keep every digit.
        let exact: Option<Vec<i128>> =
            x.strings()?.iter().map(|t| std::str::from_utf8(t).ok()?.trim().parse().ok()).collect();
        if let Some(exact) = exact {
            return Ok(Tensor::from_i128(to, x.shape(), &exact)?);
        }
    }
    let values: Vec<f64> = x.strings()?.iter().map(parse).collect::<Result<_, _>>()?;
    Ok(Tensor::from_f64(to, x.shape(), &values)?)
}

fn to_strings(x: &Tensor) -> Result<Vec<Vec<u8>>, OpError> {
    fn float<T: std::fmt::Debug>(value: T, wide: f64) -> Vec<u8> {
        let text = match wide {
            v if v.is_nan() => "NaN".to_owned(),
            f64::INFINITY => "INF".to_owned(),
            f64::NEG_INFINITY => "-INF".to_owned(),
            _ => format!("{value:?}"),
        };
        text.into_bytes()
    }
    Ok(match x.dtype() {
        DType::F32 => x.as_slice::<f32>()?.iter().map(|v| float(*v, f64::from(*v))).collect(),
        dtype if dtype.is_float() => x.to_f64()?.into_iter().map(|v| float(v, v)).collect(),
        _ => x.to_i128()?.into_iter().map(|v| v.to_string().into_bytes()).collect(),
    })
}

/// A float's gradient is cast back; integers have none.
fn cast_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let is_float = cx.graph.dtype(x).is_some_and(DType::is_float);
    let dx = if is_float && cx.wants(0) { Some(cx.cast_like(dy, x)?) } else { None };
    Ok(std::iter::once(dx).chain(vec![None; cx.node.inputs.len() - 1]).collect())
}

fn infer_bit_cast(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let to = target(cx.attributes())?;
    if let Some(from) = cx.dtype(0) {
        check_widths(from, to)?;
    }
    Ok(vec![Fact { dtype: Some(to), shape: cx.input(0, "a tensor")?.shape.clone(), content: None }])
}

fn check_widths(from: DType, to: DType) -> Result<(), OpError> {
    if from.bits().is_none() || from.bits() != to.bits() {
        return Err(OpError::dtype(format!("{from} and {to} are not equally wide")));
    }
    Ok(())
}

fn eval_bit_cast(cx: &Eval) -> Evaluated {
    let (x, to) = (cx.input(0)?, target(cx.attributes())?);
    check_widths(x.dtype(), to)?;
    // In memory an element narrower than a byte fills one, with its sign where it has one.
    let bytes: Vec<u8> = match (x.dtype(), to) {
        (_, DType::I4) => x.bytes().iter().map(|b| ((*b as i8) << 4 >> 4) as u8).collect(),
        (_, DType::I2) => x.bytes().iter().map(|b| ((*b as i8) << 6 >> 6) as u8).collect(),
        (DType::I4, _) => x.bytes().iter().map(|b| b & 0xf).collect(),
        (DType::I2, _) => x.bytes().iter().map(|b| b & 0x3).collect(),
        _ => x.bytes().to_vec(),
    };
    Ok(vec![Tensor::from_bytes(to, x.shape(), &bytes)?])
}
