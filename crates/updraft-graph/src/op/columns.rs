//! Images from the columns of their windows.

use crate::dim::{Dim, known_shape};
use crate::op::window::WindowSpec;
use crate::op::{Arity, Eval, Fact, Infer, Op, OpError, Shapes};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[Op::onnx("Col2Im", &[18], Arity::exact(3), infer_col2im, eval_col2im)
    .flops(additions)
    .no_gradient("not implemented: networks that are trained convolve instead")
    .no_channels("columns hold channels and taps in one axis")];

fn additions(shapes: &Shapes) -> u64 {
    shapes.input_len(0)
}

/// Inputs: columns `[N, C * taps, windows]`, sizes of the image, sizes of a window.
fn infer_col2im(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    cx.expect_rank(0, 3, "the columns")?;
    let (columns, image, block) = (cx.input(0, "columns")?, cx.input(1, "image sizes")?, cx.input(2, "window sizes")?);
    let rank = [image, block].into_iter().find_map(|sizes| sizes.shape.as_ref()?.first()?.known());
    let Some(sizes) = image.content().or_else(|| rank.map(|rank| vec![Dim::Unknown; rank])) else {
        return Ok(vec![Fact::of_dtype(columns.dtype)]);
    };
    let batch = columns.shape.as_ref().map_or(Dim::Unknown, |s| s[0].clone());
    let taps = block.content().map(|block| Dim::product(&block));
    let channels = columns.shape.as_ref().zip(taps).and_then(|(s, taps)| s[1].divide_exact(&taps));
    Ok(vec![Fact::tensor(columns.dtype, [vec![batch, channels.unwrap_or(Dim::Unknown)], sizes].concat())])
}

/// Each element of a column is added where its window's tap lies.
fn eval_col2im(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let columns = cx.input(0)?;
    let shape = cx.output_shape(infer_col2im)?;
    let block = cx.infer().input(2, "window sizes")?.content().and_then(|sizes| known_shape(&sizes));
    let block = block.ok_or_else(|| OpError::value("window sizes must not be negative"))?;
    let window = WindowSpec::new(cx.attributes(), block)?.resolve(&shape[2..])?;
    let (planes, taps, windows) = (shape[0] * shape[1], window.taps(), window.output_len());
    if columns.shape()[1..] != [shape[1] * taps, windows] {
        return Err(OpError::shape(format!(
            "columns of shape {:?} for {taps} taps of {windows} windows",
            columns.shape()
        )));
    }
    let values = columns.to_f64()?;
    let mut image = vec![0.0; planes * window.input_len()];
    for plane in 0..planes {
        window.visit(|output, tap, input| {
            image[plane * window.input_len() + input] += values[(plane * taps + tap) * windows + output];
        });
    }
    Ok(vec![Tensor::from_f64(columns.dtype(), &shape, &image)?])
}
