//! Products of scaled integers: MatMulInteger, ConvInteger, QLinearMatMul, QLinearConv.
//!
//! Zero points are taken off first, so that padding, which stands for the number zero, adds nothing: a padded integer
//! convolution pads with the zero point, not with the code 0. Sums are in 32 bits and wrap.

use super::{code_of, code_range, rounded};
use crate::dtype::DType;
use crate::op::conv::{ConvShape, conv_dims, conv_flops};
use crate::op::index::broadcast_positions;
use crate::op::matmul::{matmul_shape, matmul_starts, multiply};
use crate::op::{Arity, Axis, Eval, Fact, Infer, Link, Op, OpError, Shapes, broadcast, filled};
use crate::tensor::Tensor;

const INTEGERS: &str = "its inputs are not continuous";

/// The family.
pub(in crate::op) const OPS: &[Op] = &[
    Op::onnx("MatMulInteger", &[10], Arity::range(2, 4), infer_matmul_integer, eval_matmul_integer)
        .no_gradient(INTEGERS)
        .flops(matmul_integer_flops)
        .channels(matmul_integer_links),
    Op::onnx("ConvInteger", &[10], Arity::range(2, 4), infer_conv_integer, eval_conv_integer)
        .no_gradient(INTEGERS)
        .flops(conv_flops)
        .channels(conv_integer_links),
    Op::onnx("QLinearMatMul", &[10, 21], Arity::exact(8), infer_qlinear_matmul, eval_qlinear_matmul)
        .no_gradient(INTEGERS)
        .flops(qlinear_matmul_flops)
        .channels(qlinear_matmul_links),
    Op::onnx("QLinearConv", &[10], Arity::range(8, 9), infer_qlinear_conv, eval_qlinear_conv)
        .no_gradient(INTEGERS)
        .flops(qlinear_conv_flops)
        .channels(qlinear_conv_links),
];

/// The code of a 32-bit sum whose unit is `multiplier` units of the output: the product is rounded to `f32`, then as
/// [`code_of`] rounds.
pub fn requantize(sum: i32, multiplier: f32, zero_point: i128, range: (i128, i128)) -> i128 {
    code_of(f64::from(sum as f32 * multiplier), zero_point, range)
}

fn matmul_fact(cx: &Infer, a: usize, b: usize, dtype: Option<DType>) -> Result<Vec<Fact>, OpError> {
    let shape = match (cx.shape(a), cx.shape(b)) {
        (Some(a), Some(b)) => Some(matmul_shape(a, b)?),
        _ => None,
    };
    Ok(vec![Fact { dtype, shape, content: None }])
}

fn infer_matmul_integer(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    matmul_fact(cx, 0, 1, Some(DType::I32))
}

fn infer_qlinear_matmul(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    matmul_fact(cx, 0, 3, cx.dtype(7))
}

fn infer_conv_integer(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    Ok(vec![Fact { dtype: Some(DType::I32), shape: conv_dims(cx, cx.shape(0), cx.shape(1))?, content: None }])
}

fn infer_qlinear_conv(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    Ok(vec![Fact { dtype: cx.dtype(7), shape: conv_dims(cx, cx.shape(0), cx.shape(3))?, content: None }])
}

/// Whether an operand of a matrix product lies along the rows of the left or the columns of the right matrix.
#[derive(Clone, Copy)]
enum Along {
    Rows,
    Columns,
}

/// A scale or zero point of a matrix product as a shape that broadcasts to the matrix: a vector is a column on the
/// left and a row on the right.
fn aligned(operand: &Tensor, along: Along) -> Vec<usize> {
    match (along, operand.shape()) {
        (Along::Rows, [rows]) if *rows != 1 => vec![*rows, 1],
        (_, shape) => shape.to_vec(),
    }
}

/// The codes of a matrix with its zero points taken off.
fn centered(matrix: &Tensor, zero_point: Option<&Tensor>, along: Along) -> Result<Vec<i128>, OpError> {
    let mut codes = matrix.to_i128()?;
    if let Some(zero) = zero_point {
        let shape = aligned(zero, along);
        if broadcast(&[&shape, matrix.shape()])? != matrix.shape() {
            let message =
                format!("a zero point of shape {:?} for a matrix of shape {:?}", zero.shape(), matrix.shape());
            return Err(OpError::shape(message));
        }
        let zeros = zero.to_i128()?;
        for (code, at) in codes.iter_mut().zip(broadcast_positions(&shape, matrix.shape())) {
            *code -= zeros[at];
        }
    }
    Ok(codes)
}

/// The 32-bit sums of a matrix product, and its shape.
fn integer_product(
    (a, a_zero): (&Tensor, Option<&Tensor>),
    (b, b_zero): (&Tensor, Option<&Tensor>),
) -> Result<(Vec<i128>, Vec<usize>), OpError> {
    let (shape, starts, sizes) = matmul_starts(a.shape(), b.shape())?;
    let (a, b) = (centered(a, a_zero, Along::Rows)?, centered(b, b_zero, Along::Columns)?);
    let sums = multiply(&a, &b, &starts, sizes, 0, |s, x, y| s + x * y);
    Ok((sums.into_iter().map(|s| i128::from(s as i32)).collect(), shape))
}

fn eval_matmul_integer(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (sums, shape) = integer_product((cx.input(0)?, cx.optional(2)), (cx.input(1)?, cx.optional(3)))?;
    Ok(vec![Tensor::from_i128(DType::I32, &shape, &sums)?])
}

/// The factor from the units of a product to those of the output, each step rounded to the scales' type.
fn multiplier(a: f64, b: f64, y: f64, dtype: DType) -> Result<f32, OpError> {
    Ok(rounded(rounded(a * b, dtype)? / y, dtype)? as f32)
}

fn scalar(tensor: &Tensor, what: &str) -> Result<f64, OpError> {
    match tensor.to_f64()?.as_slice() {
        [one] => Ok(*one),
        _ => Err(OpError::shape(format!("{what} of shape {:?}, expected one element", tensor.shape()))),
    }
}

fn eval_qlinear_matmul(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (a, b) = (cx.input(0)?, cx.input(3)?);
    let (sums, shape) = integer_product((a, cx.optional(2)), (b, cx.optional(5)))?;
    let (a_scale, b_scale, y_scale) = (cx.input(1)?, cx.input(4)?, cx.input(6)?);
    let zero = cx.input(7)?;
    let range = code_range(zero.dtype()).ok_or_else(|| OpError::dtype(format!("codes of type {}", zero.dtype())))?;
    let stretch = |tensor: &Tensor, along: Along| -> Result<Vec<f64>, OpError> {
        let from = aligned(tensor, along);
        if broadcast(&[&from, &shape])? != shape {
            return Err(OpError::shape(format!("a scale of shape {:?} for a product {shape:?}", tensor.shape())));
        }
        let values = tensor.to_f64()?;
        Ok(broadcast_positions(&from, &shape).map(|at| values[at]).collect())
    };
    let scales = [stretch(a_scale, Along::Rows)?, stretch(b_scale, Along::Columns)?, stretch(y_scale, Along::Rows)?];
    let zeros = stretch(zero, Along::Rows)?;
    let codes = sums.iter().enumerate().map(|(i, sum)| {
        let multiplier = multiplier(scales[0][i], scales[1][i], scales[2][i], a_scale.dtype())?;
        Ok(requantize(*sum as i32, multiplier, zeros[i] as i128, range))
    });
    let codes = codes.collect::<Result<Vec<i128>, OpError>>()?;
    Ok(vec![Tensor::from_i128(zero.dtype(), &shape, &codes)?])
}

/// One entry for each output channel, from a tensor with one entry or as many as there are channels.
fn for_channels<T: Copy>(values: &[T], channels: usize, what: &str) -> Result<Vec<T>, OpError> {
    match values {
        [one] => Ok(vec![*one; channels]),
        many if many.len() == channels => Ok(many.to_vec()),
        many => Err(OpError::shape(format!("{what} of {} entries for {channels} output channels", many.len()))),
    }
}

/// The 32-bit sums of a convolution, and its shape.
fn integer_convolution(
    cx: &Eval,
    (x, x_zero): (&Tensor, Option<&Tensor>),
    (w, w_zero): (&Tensor, Option<&Tensor>),
) -> Result<(Vec<i32>, ConvShape), OpError> {
    let conv = ConvShape::of_conv(cx.attributes(), x.shape(), w.shape())?;
    let x_zero = match x_zero.map(Tensor::to_i128).transpose()?.as_deref() {
        None => 0,
        Some([one]) => *one,
        Some(many) => return Err(OpError::shape(format!("an input's zero point of {} entries", many.len()))),
    };
    let w_zeros = w_zero.map(Tensor::to_i128).transpose()?.unwrap_or_else(|| vec![0]);
    let w_zeros = for_channels(&w_zeros, w.shape()[0], "a weight's zero point")?;
    let xs: Vec<i32> = x.to_i128()?.into_iter().map(|q| (q - x_zero) as i32).collect();
    let per_channel: usize = w.shape()[1..].iter().product();
    let ws: Vec<i32> =
        w.to_i128()?.into_iter().enumerate().map(|(i, q)| (q - w_zeros[i / per_channel]) as i32).collect();
    let mut sums = filled(&conv.output(), 0i32)?;
    conv.visit(|i, w, o| sums[o] = sums[o].wrapping_add(xs[i].wrapping_mul(ws[w])));
    Ok((sums, conv))
}

fn eval_conv_integer(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (sums, conv) = integer_convolution(cx, (cx.input(0)?, cx.optional(2)), (cx.input(1)?, cx.optional(3)))?;
    Ok(vec![Tensor::new(&conv.output(), &sums)?])
}

fn eval_qlinear_conv(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (sums, conv) = integer_convolution(cx, (cx.input(0)?, cx.optional(2)), (cx.input(3)?, cx.optional(5)))?;
    let channels = conv.groups * conv.outputs_per_group;
    let x_scale = cx.input(1)?;
    let x = scalar(x_scale, "an input's scale")?;
    let y = scalar(cx.input(6)?, "an output's scale")?;
    let multipliers = for_channels(&cx.input(4)?.to_f64()?, channels, "a weight's scale")?
        .into_iter()
        .map(|w| multiplier(x, w, y, x_scale.dtype()))
        .collect::<Result<Vec<f32>, _>>()?;
    let zero = cx.input(7)?;
    let range = code_range(zero.dtype()).ok_or_else(|| OpError::dtype(format!("codes of type {}", zero.dtype())))?;
    let zero_point = scalar(zero, "an output's zero point")? as i128;
    let bias = match cx.optional(8) {
        Some(bias) if bias.shape() == [channels] => bias.as_slice::<i32>()?.to_vec(),
        Some(bias) => {
            return Err(OpError::shape(format!("a bias of shape {:?} for {channels} channels", bias.shape())));
        }
        None => vec![0; channels],
    };
    let plane = conv.window.output_len();
    let codes: Vec<i128> = sums
        .iter()
        .enumerate()
        .map(|(i, sum)| {
            let channel = i / plane % channels;
            requantize(sum.wrapping_add(bias[channel]), multipliers[channel], zero_point, range)
        })
        .collect();
    Ok(vec![Tensor::from_i128(zero.dtype(), &conv.output(), &codes)?])
}

fn matmul_integer_flops(shapes: &Shapes) -> u64 {
    inner_size(shapes) * 2 * shapes.output_len(0)
}

fn qlinear_matmul_flops(shapes: &Shapes) -> u64 {
    (inner_size(shapes) * 2 + 2) * shapes.output_len(0)
}

fn inner_size(shapes: &Shapes) -> u64 {
    shapes.inputs.first().and_then(Option::as_ref).and_then(|(_, s)| s.last()).map_or(0, |k| *k as u64)
}

fn qlinear_conv_flops(shapes: &Shapes) -> u64 {
    let operands = vec![shapes.inputs.first().cloned().flatten(), shapes.inputs.get(3).cloned().flatten()];
    let conv = Shapes { attributes: shapes.attributes, inputs: operands, outputs: vec![] };
    conv_flops(&conv) + 2 * shapes.output_len(0)
}

/// Links of the product of operands `a` and `b`, whose scales and zero points, where they are vectors, go along.
fn product_links(cx: &Infer, a: usize, b: usize, rows: &[usize], columns: &[usize]) -> Result<Vec<Link>, OpError> {
    let (Some(x), Some(y)) = (cx.shape(a), cx.shape(b)) else {
        return Err(OpError::shape("the ranks of both matrices must be known"));
    };
    let out = matmul_shape(x, y)?.len();
    let mut links = vec![Link::Same(Axis::Input(a, x.len() - 1), Axis::Input(b, y.len().saturating_sub(2)))];
    if x.len() > 1 {
        let row = Axis::Output(0, out - if y.len() > 1 { 2 } else { 1 });
        links.push(Link::Same(Axis::Input(a, x.len() - 2), row));
        links.extend(rows.iter().filter(|i| is_vector(cx, **i)).map(|i| Link::Same(Axis::Input(*i, 0), row)));
    }
    if y.len() > 1 {
        let column = Axis::Output(0, out - 1);
        links.push(Link::Same(Axis::Input(b, y.len() - 1), column));
        links.extend(columns.iter().filter(|i| is_vector(cx, **i)).map(|i| Link::Same(Axis::Input(*i, 0), column)));
    }
    Ok(links)
}

fn is_vector(cx: &Infer, index: usize) -> bool {
    matches!(cx.shape(index), Some([size]) if size.known() != Some(1))
}

fn matmul_integer_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    product_links(cx, 0, 1, &[2], &[3])
}

fn qlinear_matmul_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    product_links(cx, 0, 3, &[1, 2], &[4, 5])
}

fn conv_integer_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    convolution_links(cx, 1, &[3])
}

fn qlinear_conv_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    convolution_links(cx, 3, &[4, 5, 8])
}

fn convolution_links(cx: &Infer, weight: usize, per_channel: &[usize]) -> Result<Vec<Link>, OpError> {
    let mut links = crate::op::conv::weighted_channels(cx, weight, [0, 1])?;
    let output = Axis::Output(0, 1);
    links.extend(per_channel.iter().filter(|i| is_vector(cx, **i)).map(|i| Link::Same(Axis::Input(*i, 0), output)));
    Ok(links)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use crate::{Attributes, Graph, Tensor, eval::evaluate};

    fn run<const N: usize>(op: &str, inputs: [Tensor; N], attributes: Attributes) -> Tensor {
        let mut graph = Graph::new(op);
        let operands: Vec<_> = inputs.into_iter().map(|t| graph.add_constant("operand", t)).collect();
        let made = graph.op(op, &operands, attributes).unwrap();
        graph.push_output(made);
        evaluate(&graph, &HashMap::new()).unwrap().remove(0)
    }

    fn padded() -> Attributes {
        [("pads", [1, 1].into())].into()
    }

    #[test]
    fn padding_of_an_integer_convolution_is_the_zero_point() {
        // The picture is the number zero everywhere, so every sum is zero, at the padded ends too.
        let x = Tensor::new(&[1, 1, 3], &[7u8; 3]).unwrap();
        let w = Tensor::new(&[1, 1, 3], &[1u8, 2, 3]).unwrap();
        let sums = run("ConvInteger", [x, w, Tensor::scalar(7u8), Tensor::scalar(0u8)], padded());
        assert_eq!(sums.as_slice::<i32>().unwrap(), [0, 0, 0]);
        let x = Tensor::new(&[1, 1, 3], &[8u8, 9, 10]).unwrap();
        let w = Tensor::new(&[1, 1, 3], &[3u8, 4, 5]).unwrap();
        let sums = run("ConvInteger", [x, w, Tensor::scalar(7u8), Tensor::scalar(2u8)], padded());
        // (1, 2, 3) with the kernel (1, 2, 3) between zeros.
        assert_eq!(sums.as_slice::<i32>().unwrap(), [8, 14, 8]);
    }

    #[test]
    fn quantized_convolution_pads_with_the_zero_point_and_rounds_ties_to_even() {
        let scalar = Tensor::scalar::<f32>;
        let x = Tensor::new(&[1, 1, 3], &[129u8, 131, 128]).unwrap();
        let w = Tensor::new(&[1, 1, 3], &[0i8, 1, 0]).unwrap();
        let inputs = [
            x,
            scalar(0.5),
            Tensor::scalar(128u8),
            w,
            Tensor::vector(&[1f32]),
            Tensor::vector(&[0i8]),
            scalar(1.0),
            Tensor::scalar(10u8),
        ];
        // Half of 1 and 3 is 0.5 and 1.5, to the even neighbours 0 and 2.
        assert_eq!(run("QLinearConv", inputs, padded()).as_slice::<u8>().unwrap(), [10, 12, 10]);
    }

    #[test]
    fn quantized_products_take_a_scale_for_each_column() {
        let a = Tensor::new(&[1, 2], &[1i8, 2]).unwrap();
        let b = Tensor::new(&[2, 2], &[1i8, 2, 3, 4]).unwrap();
        let inputs = [
            a,
            Tensor::scalar(1f32),
            Tensor::scalar(0i8),
            b,
            Tensor::vector(&[1f32, 100.0]),
            Tensor::vector(&[0i8, 0]),
            Tensor::scalar(1f32),
            Tensor::scalar(0i8),
        ];
        // The sums are 7 and 10; the second, times 100, saturates.
        assert_eq!(run("QLinearMatMul", inputs, Attributes::new()).as_slice::<i8>().unwrap(), [7, 127]);
    }
}
