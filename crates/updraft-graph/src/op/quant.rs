//! Conversion between floats and scaled integers: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear. Products of
//! scaled integers are in `integer`.
//!
//! A real number is `(q - zero_point) * scale`. The steps of each conversion and the type each is rounded to are part
//! of its meaning, since a last bit decides which way a tie falls: the quotient is rounded to the type of the scale
//! (or the attribute `precision`), then to the nearest integer, ties to even, then the zero point is added, and the
//! sum saturates.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::op::cast::dtype_of;
use crate::op::{Arity, Axis, Eval, Fact, Infer, Link, Op, OpError, OpView, Shapes, resolve_axis, show_shape};
use crate::tensor::{Overflow, Tensor, encode_minifloat};

pub mod fake;
pub mod integer;

const ROUNDING: &str = "rounding is constant but for jumps; training sees quantization through straight-through nodes";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("QuantizeLinear", &[10, 13, 19, 21, 23, 24, 25, 28], Arity::range(2, 3), infer_quantize, eval_quantize)
        .no_gradient(ROUNDING)
        .flops(conversion_flops)
        .channels(scale_links),
    Op::onnx(
        "DequantizeLinear",
        &[10, 13, 19, 21, 23, 24, 25, 28],
        Arity::range(2, 3),
        infer_dequantize,
        eval_dequantize,
    )
    .no_gradient("its input is not continuous")
    .flops(conversion_flops)
    .channels(scale_links),
    Op::onnx("DynamicQuantizeLinear", &[11], Arity::exact(1).outputs(3, 3), infer_dynamic, eval_dynamic)
        .no_gradient(ROUNDING)
        .flops(dynamic_flops)
        .channels(dynamic_links),
];

/// Smallest and largest code of an integer type that quantization may write.
pub fn code_range(dtype: DType) -> Option<(i128, i128)> {
    dtype.integer_range().filter(|_| dtype.bits().is_some_and(|bits| bits <= 16))
}

/// The code of a quotient `x / scale`: rounded to the nearest integer, ties to even, shifted, saturated. Not-a-number
/// takes the smallest code.
pub fn code_of(quotient: f64, zero_point: i128, (low, high): (i128, i128)) -> i128 {
    if quotient.is_nan() {
        return low;
    }
    // Casting saturates at the limits of i64, which are far outside any range of codes.
    (i128::from(quotient.round_ties_even() as i64) + zero_point).clamp(low, high)
}

/// A number rounded to a float type.
pub(super) fn rounded(value: f64, dtype: DType) -> Result<f64, OpError> {
    Ok(match dtype {
        DType::F64 => value,
        DType::F32 => f64::from(value as f32),
        _ => Tensor::from_f64(dtype, &[], &[value])?.to_f64()?[0],
    })
}

/// Which entry of a scale belongs to each element of a tensor, in order.
struct ScaleLayout {
    positions: Vec<usize>,
}

impl ScaleLayout {
    /// One scale for all, one for each index along an axis, or one for each run of `block_size` indices along it.
    fn new(view: &OpView, x: &[usize], scale: &[usize]) -> Result<ScaleLayout, OpError> {
        let block = view.attributes().int("block_size", 0)?;
        let count: usize = x.iter().product();
        let refuse =
            || OpError::shape(format!("a scale of shape {scale:?} for an input of shape {x:?} and block_size {block}"));
        if block < 0 {
            return Err(OpError::attribute("block_size", format!("is {block}, expected a positive number")));
        }
        if block == 0 && scale.iter().product::<usize>() == 1 && scale.len() <= 1 {
            return Ok(ScaleLayout { positions: vec![0; count] });
        }
        let axis = view.attributes().int("axis", 1)?;
        let axis = if x.len() == 1 && axis == 1 { 0 } else { resolve_axis(axis, x.len())? };
        let inner: usize = x[axis + 1..].iter().product();
        if block == 0 {
            if scale != [x[axis]] {
                return Err(refuse());
            }
            return Ok(ScaleLayout { positions: (0..count).map(|i| i / inner % x[axis]).collect() });
        }
        let block = usize::try_from(block).unwrap_or(usize::MAX);
        let blocks = x[axis].div_ceil(block);
        let expected: Vec<usize> = x.iter().enumerate().map(|(i, d)| if i == axis { blocks } else { *d }).collect();
        if scale != expected {
            return Err(refuse());
        }
        let positions = (0..count).map(|i| {
            let (outer, along, rest) = (i / inner / x[axis], i / inner % x[axis], i % inner);
            (outer * blocks + along / block) * inner + rest
        });
        Ok(ScaleLayout { positions: positions.collect() })
    }
}

/// The type that QuantizeLinear writes: that of the zero point or of the attribute, `u8` where neither is given.
fn quantized_dtype(view: &OpView, zero_point: Option<DType>) -> Result<DType, OpError> {
    let stated = match view.attributes().int("output_dtype", 0)? {
        0 => None,
        number => Some(dtype_of("output_dtype", number)?),
    };
    match (stated, zero_point) {
        (Some(a), Some(b)) if a != b => {
            Err(OpError::attribute("output_dtype", format!("is {a}, but the zero point is {b}")))
        }
        (a, b) => Ok(a.or(b).unwrap_or(DType::U8)),
    }
}

fn infer_quantize(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let shape = cx.input(0, "input")?.shape.clone();
    cx.input(1, "scale")?;
    let dtype = match cx.optional(2) {
        Some(zero_point) if zero_point.dtype.is_none() => None,
        zero_point => Some(quantized_dtype(&cx.view, zero_point.and_then(|z| z.dtype))?),
    };
    check_zero_point(cx)?;
    Ok(vec![Fact { dtype, shape, content: None }])
}

fn check_zero_point(cx: &Infer) -> Result<(), OpError> {
    match (cx.shape(1), cx.shape(2)) {
        // A single number may be a scalar beside a vector of one entry.
        (Some(scale), Some(zero))
            if Dim::product(scale).differs(&Dim::product(zero))
                || (scale.len() == zero.len() && scale.iter().zip(zero).any(|(a, b)| a.differs(b))) =>
        {
            Err(OpError::shape(format!("a scale {} with a zero point {}", show_shape(scale), show_shape(zero))))
        }
        _ => Ok(()),
    }
}

fn dequantized_dtype(view: &OpView, scale: Option<DType>) -> Result<Option<DType>, OpError> {
    match view.attributes().int("output_dtype", 0)? {
        0 => Ok(scale),
        number => Ok(Some(dtype_of("output_dtype", number)?)),
    }
}

fn infer_dequantize(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "input")?;
    let scale = cx.input(1, "scale")?.dtype;
    if let (Some(x), Some(zero)) = (x.dtype, cx.dtype(2))
        && x != zero
    {
        return Err(OpError::dtype(format!("an input of {x} with a zero point of {zero}")));
    }
    check_zero_point(cx)?;
    Ok(vec![Fact { dtype: dequantized_dtype(&cx.view, scale)?, shape: x.shape.clone(), content: None }])
}

fn infer_dynamic(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let shape = cx.input(0, "input")?.shape.clone();
    Ok(vec![
        Fact { dtype: Some(DType::U8), shape, content: None },
        Fact::tensor(Some(DType::F32), vec![]),
        Fact::tensor(Some(DType::U8), vec![]),
    ])
}

fn eval_quantize(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, scale, zero_point) = (cx.input(0)?, cx.input(1)?, cx.optional(2));
    let dtype = quantized_dtype(&cx.view, zero_point.map(Tensor::dtype))?;
    expect_zero_point(scale, zero_point)?;
    let precision = match cx.attributes().int("precision", 0)? {
        // Scales that are powers of two only have no quotients.
        0 if scale.dtype() == DType::F8E8M0 || !scale.dtype().is_float() => DType::F32,
        0 => scale.dtype(),
        number => dtype_of("precision", number)?,
    };
    let layout = ScaleLayout::new(&cx.view, x.shape(), scale.shape())?;
    let (values, scales) = (x.to_f64()?, scale.to_f64()?);
    let quotients = values
        .iter()
        .zip(&layout.positions)
        .map(|(x, at)| rounded(rounded(*x, precision)? / rounded(scales[*at], precision)?, precision));
    let quotients = quotients.collect::<Result<Vec<f64>, OpError>>()?;
    if let Some(range) = code_range(dtype) {
        let zeros = zero_point.map(Tensor::to_i128).transpose()?;
        let zero = |at: usize| zeros.as_ref().map_or(0, |z| z[at]);
        let codes: Vec<i128> =
            quotients.iter().zip(&layout.positions).map(|(q, at)| code_of(*q, zero(*at), range)).collect();
        return Ok(vec![Tensor::from_i128(dtype, x.shape(), &codes)?]);
    }
    if !matches!(dtype, DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F4E2M1) {
        return Err(OpError::dtype(format!("quantization to {dtype}")));
    }
    let zeros = zero_point.map(Tensor::to_f64).transpose()?;
    let zero = |at: usize| zeros.as_ref().map_or(0.0, |z| z[at]);
    let overflow = if cx.attributes().flag("saturate", true)? { Overflow::Saturate } else { Overflow::Infinite };
    let codes: Vec<u8> = quotients
        .iter()
        .zip(&layout.positions)
        .map(|(q, at)| encode_minifloat(dtype, q + zero(*at), overflow))
        .collect();
    Ok(vec![Tensor::from_bytes(dtype, x.shape(), &codes)?])
}

fn expect_zero_point(scale: &Tensor, zero_point: Option<&Tensor>) -> Result<(), OpError> {
    match zero_point {
        Some(zero) if zero.shape() != scale.shape() && (zero.len() != 1 || scale.len() != 1) => Err(OpError::shape(
            format!("a scale of shape {:?} with a zero point of shape {:?}", scale.shape(), zero.shape()),
        )),
        _ => Ok(()),
    }
}

fn eval_dequantize(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, scale, zero_point) = (cx.input(0)?, cx.input(1)?, cx.optional(2));
    expect_zero_point(scale, zero_point)?;
    if let Some(zero) = zero_point.filter(|zero| zero.dtype() != x.dtype()) {
        return Err(OpError::dtype(format!("an input of {} with a zero point of {}", x.dtype(), zero.dtype())));
    }
    let dtype = dequantized_dtype(&cx.view, Some(scale.dtype()))?.unwrap_or(DType::F32);
    let layout = ScaleLayout::new(&cx.view, x.shape(), scale.shape())?;
    let (values, scales) = (x.to_f64()?, scale.to_f64()?);
    let zeros = zero_point.map(Tensor::to_f64).transpose()?;
    let products: Vec<f64> = values
        .iter()
        .zip(&layout.positions)
        .map(|(q, at)| f64::from((q - zeros.as_ref().map_or(0.0, |z| z[*at])) as f32) * scales[*at])
        .collect();
    Ok(vec![Tensor::from_f64(dtype, x.shape(), &products)?])
}

/// Scale and zero point of `u8` codes that cover the values and zero, and the codes. Each step is rounded to `f32`.
fn eval_dynamic(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let values = x.as_slice::<f32>()?;
    let low = values.iter().copied().fold(0.0f32, f32::min);
    let high = values.iter().copied().fold(0.0f32, f32::max);
    // A range without extent has no scale; any keeps zero zero.
    let scale = if high == low { 1.0 } else { (high - low) / 255.0 };
    let zero = (0.0 - low / scale).clamp(0.0, 255.0).round_ties_even() as u8;
    let codes: Vec<i128> = values.iter().map(|x| code_of(f64::from(x / scale), i128::from(zero), (0, 255))).collect();
    Ok(vec![Tensor::from_i128(DType::U8, x.shape(), &codes)?, Tensor::scalar(scale), Tensor::scalar(zero)])
}

fn conversion_flops(shapes: &Shapes) -> u64 {
    2 * shapes.output_len(0)
}

fn dynamic_flops(shapes: &Shapes) -> u64 {
    4 * shapes.output_len(0)
}

fn scale_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let x = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the input must be known"))?;
    let mut links: Vec<Link> = (0..x.len()).map(|i| Link::Same(Axis::Input(0, i), Axis::Output(0, i))).collect();
    let blocked = cx.attributes().int("block_size", 0)? != 0;
    for index in 1..cx.inputs.len() {
        let Some(scale) = cx.shape(index) else { continue };
        if blocked {
            let axis = resolve_axis(cx.attributes().int("axis", 1)?, x.len())?;
            for i in (0..scale.len()).filter(|i| *i != axis) {
                links.push(Link::Same(Axis::Input(index, i), Axis::Input(0, i)));
            }
            links.push(Link::Fixed(Axis::Input(0, axis), "blocks of it share a scale"));
        } else if scale.len() == 1 && scale[0].known() != Some(1) {
            let axis = resolve_axis(cx.attributes().int("axis", 1)?, x.len())?;
            links.push(Link::Same(Axis::Input(index, 0), Axis::Input(0, axis)));
        }
    }
    Ok(links)
}

fn dynamic_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let x = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the input must be known"))?;
    Ok((0..x.len()).map(|i| Link::Same(Axis::Input(0, i), Axis::Output(0, i))).collect())
}
