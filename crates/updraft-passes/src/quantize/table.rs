//! Tables of vectors by number, such as embeddings, as codes with a scale a row.
//!
//! Rows are taken as codes and only then become floats, so that no run has the whole table as floats.

use updraft_graph::{DType, Graph, Node, NodeId};

use super::quantizer::{Quantizer, WeightScale};
use crate::PassError;
use crate::rewrite::{FixedNames, constant};

/// Whether the node takes rows of a constant table of floats that codes make smaller.
pub(super) fn is_table(graph: &Graph, node: &Node) -> bool {
    let table = node.inputs.first().copied().flatten().and_then(|v| constant(graph, v));
    let is_rows = matches!(node.attributes.int("axis", 0), Ok(0));
    let shrinks = table.is_some_and(|t| t.dtype() == DType::F32 && t.rank() == 2 && t.shape()[1] > 4);
    node.op == "Gather" && node.domain.is_empty() && is_rows && shrinks
}

/// Rewrites a node for which [`is_table`] holds.
pub(super) fn quantize_table(graph: &mut Graph, id: NodeId, names: &FixedNames) -> Result<(), PassError> {
    let node = graph.node(id).clone();
    let ([Some(table), Some(rows)], [Some(made)]) = (&node.inputs[..], &node.outputs[..]) else { return Ok(()) };
    let Some(tensor) = constant(graph, *table).cloned() else { return Ok(()) };
    let name = graph.value(*table).name.clone();
    let wrong = |e| PassError::Value { name: name.clone(), problem: format!("cannot be quantized: {e}") };
    let quantizer = Quantizer::of_weights(&tensor, DType::I8, Some(0), WeightScale::MaxAbs).map_err(wrong)?;
    let codes = quantizer.quantize(&tensor).map_err(wrong)?;
    let (scales, _) = quantizer.operands(tensor.shape()).map_err(wrong)?;
    let scales = scales.reshaped(&[scales.len(), 1]).map_err(|e| wrong(e.into()))?;
    let codes = graph.add_constant(&format!("{name}_quantized"), codes);
    let scales = graph.add_constant(&format!("{name}_scale"), scales);
    let taken = graph.op("Gather", &[codes, *rows], [])?;
    let steps = graph.op("Cast", &[taken], [("to", (DType::F32 as i64).into())])?;
    let scale = graph.op("Gather", &[scales, *rows], [])?;
    let floats = graph.op("Mul", &[steps, scale], [])?;
    graph.remove_node(id);
    names.substitute(graph, *made, floats);
    Ok(())
}
