//! Constants that are stored as codes but computed with as floats: dequantized once, when a graph is compiled.

use updraft_graph::op::resolve_axis;
use updraft_graph::{DType, Graph, NodeId, Tensor, ValueId};

use super::affine::is_op;

/// What a DequantizeLinear of constants to `f32` makes; `None` for forms that are left to the definition. Weights have
/// many millions of elements, for which the definition takes seconds.
pub(in crate::cpu) fn dequantized(graph: &Graph, id: NodeId) -> Option<Tensor> {
    let node = graph.node(id);
    let constant = |index: usize| graph.value(node.inputs.get(index).copied().flatten()?).constant();
    let (codes, scale) = (constant(0)?, constant(1)?);
    let output: ValueId = node.outputs.first().copied()??;
    let has_zero = node.inputs.get(2).copied().flatten().is_some();
    let zero = constant(2);
    if !is_op(node, "DequantizeLinear") || graph.dtype(output) != Some(DType::F32) || has_zero != zero.is_some() {
        return None;
    }
    let scales = scale.as_slice::<f32>().ok()?;
    let zeros: Vec<f32> = match zero {
        Some(zero) if zero.dtype() == codes.dtype() && zero.len() == scales.len() => {
            zero.to_i64().ok()?.into_iter().map(|z| z as f32).collect()
        }
        Some(_) => return None,
        None => vec![0.0; scales.len()],
    };
    let shape = codes.shape();
    let block = usize::try_from(node.attributes.int("block_size", 0).ok()?).ok()?;
    // Rows of `inner` elements that lie under `inner` scales, or under one.
    let (axis_len, inner, group) = if scales.len() == 1 && block == 0 {
        (1, codes.len(), codes.len().max(1))
    } else {
        let stated = node.attributes.int("axis", 1).ok()?;
        let axis = if shape.len() == 1 && stated == 1 { 0 } else { resolve_axis(stated, shape.len()).ok()? };
        let expected: Vec<usize> = match block {
            0 => vec![shape[axis]],
            _ => shape.iter().enumerate().map(|(i, n)| if i == axis { n.div_ceil(block) } else { *n }).collect(),
        };
        if scale.shape() != expected {
            return None;
        }
        (shape[axis], shape[axis + 1..].iter().product(), block)
    };
    let blocks = if group == 0 { axis_len } else { axis_len.div_ceil(group.max(1)) };
    let at = |element: usize| match block {
        0 if scales.len() == 1 => 0,
        0 => element / inner % axis_len,
        _ => (element / inner / axis_len * blocks + element / inner % axis_len / block) * inner + element % inner,
    };
    let mut out = vec![0f32; codes.len()];
    macro_rules! fill {
        ($ty:ty) => {{
            let codes: &[$ty] = bytemuck::try_cast_slice(codes.bytes()).ok()?;
            // Runs under one scale, or of one scale each where blocks lie along another axis than the last.
            let run = match block {
                0 => inner,
                _ if inner == 1 => block.min(axis_len),
                _ => 1,
            };
            let row = if block > 0 && inner == 1 { axis_len } else { run };
            for (index, (to, from)) in out.chunks_mut(row.max(1)).zip(codes.chunks(row.max(1))).enumerate() {
                for (part, (to, from)) in to.chunks_mut(run.max(1)).zip(from.chunks(run.max(1))).enumerate() {
                    let at = at(index * row + part * run);
                    let (scale, zero) = (scales[at], zeros[at]);
                    to.iter_mut().zip(from).for_each(|(to, code)| *to = (*code as f32 - zero) * scale);
                }
            }
        }};
    }
    match codes.dtype() {
        // Narrower codes take a byte each in memory.
        DType::I8 | DType::I4 | DType::I2 => fill!(i8),
        DType::U8 | DType::U4 | DType::U2 => fill!(u8),
        DType::I16 => fill!(i16),
        DType::U16 => fill!(u16),
        DType::I32 if zeros.iter().all(|z| *z == 0.0) => fill!(i32),
        _ => return None,
    }
    Tensor::new(shape, &out).ok()
}
