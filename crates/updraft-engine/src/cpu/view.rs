//! Operators that only rename elements: their outputs are other layouts of their input's memory.

use updraft_graph::op::resolve_axis;
use updraft_graph::{OpError, Tensor};

use crate::cpu::build::Build;
use crate::cpu::layout::Layout;

/// Whether an operator keeps all elements in order.
pub(crate) fn is_reshape(op: &str) -> bool {
    matches!(op, "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze")
}

/// The layout of each output in the storage of the first input; `None` where elements must be moved or computed.
pub(crate) fn layouts(cx: &Build) -> Result<Option<Vec<Layout>>, OpError> {
    let node = cx.view.node;
    if !(node.domain.is_empty() || node.domain == "ai.onnx") {
        return Ok(None);
    }
    let Some(input) = cx.input(0) else { return Ok(None) };
    let layout = &input.layout;
    let out = cx.output_shape(0);
    Ok(match node.op.as_str() {
        "Identity" => Some(vec![layout.clone()]),
        "Cast" if cx.outputs[0].as_ref().is_some_and(|(dtype, _)| *dtype == input.dtype) => Some(vec![layout.clone()]),
        "Dropout" if is_inference_dropout(cx)? => Some(vec![layout.clone()]),
        op if is_reshape(op) => layout.reshaped(out).map(|l| vec![l]),
        "Expand" => Some(vec![layout.broadcast_to(out)]),
        "Transpose" => {
            let rank = layout.shape.len();
            let permutation: Vec<usize> = match cx.attributes().ints("perm")? {
                Some(perm) => perm.iter().map(|p| resolve_axis(*p, rank)).collect::<Result<_, _>>()?,
                None => (0..rank).rev().collect(),
            };
            (permutation.len() == rank).then(|| vec![layout.permuted(&permutation)])
        }
        "Split" => {
            let axis = resolve_axis(cx.attributes().int("axis", 0)?, layout.shape.len())?;
            let mut start = 0;
            let mut parts = Vec::new();
            for output in &cx.outputs {
                // An output that is not wanted has no shape here, so where the next begins is not known.
                let Some((_, shape)) = output else { return Ok(None) };
                parts.push(layout.sliced(axis, start, shape[axis], 1));
                start += shape[axis];
            }
            Some(parts)
        }
        "Slice" if cx.view.opset >= 10 => slice(cx, layout, out)?.map(|l| vec![l]),
        _ => None,
    })
}

fn is_inference_dropout(cx: &Build) -> Result<bool, OpError> {
    let trains = match cx.constant(2) {
        Some(t) => t.to_bools()?.first().copied().unwrap_or(false),
        None => cx.input(2).is_some(),
    };
    Ok(!trains && cx.outputs.len() == 1 && cx.view.opset >= 7)
}

fn slice(cx: &Build, layout: &Layout, out: &[usize]) -> Result<Option<Layout>, OpError> {
    let rank = layout.shape.len();
    let Some(starts) = cx.constant(1).map(Tensor::to_i64).transpose()? else { return Ok(None) };
    let axes: Vec<i64> = match (cx.input(3), cx.constant(3)) {
        (None, _) => (0..starts.len() as i64).collect(),
        (Some(_), Some(t)) => t.to_i64()?,
        (Some(_), None) => return Ok(None),
    };
    let steps: Vec<i64> = match (cx.input(4), cx.constant(4)) {
        (None, _) => vec![1; starts.len()],
        (Some(_), Some(t)) => t.to_i64()?,
        (Some(_), None) => return Ok(None),
    };
    if axes.len() != starts.len() || steps.len() != starts.len() {
        return Ok(None);
    }
    let mut view = layout.clone();
    for ((start, axis), step) in starts.into_iter().zip(axes).zip(steps) {
        let axis = resolve_axis(axis, rank)?;
        let size = layout.shape[axis] as i64;
        let Ok(step) = usize::try_from(step) else { return Ok(None) };
        if step == 0 {
            return Ok(None);
        }
        let start = if start < 0 { start.saturating_add(size) } else { start }.clamp(0, size) as usize;
        view = view.sliced(axis, start, out[axis], step);
    }
    Ok(Some(view))
}
