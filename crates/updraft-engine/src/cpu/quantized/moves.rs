//! Operators that only move elements, or pick the largest, work on codes.
//!
//! `DequantizeLinear` with one scale is increasing and acts on each element alone, so it commutes with whatever moves
//! elements and with MaxPool; so does `QuantizeLinear`. Dequantizing sinks below such operators and quantizing rises above
//! them: they move bytes, not floats, and where the two meet with equal parameters both are gone. Both rewrites are exact.

use std::collections::HashSet;

use updraft_graph::dim::dims;
use updraft_graph::{Attributes, DType, Graph, GraphError, Node, NodeId, ValueId, ValueType};

use super::affine::{codes_behind, is_op, quantized_by};

/// Rewrites a graph of concrete shapes. Values in `ends` are read from outside and keep their meaning.
pub(in crate::cpu) fn rewrite(graph: &mut Graph, ends: &HashSet<ValueId>) -> Result<(), GraphError> {
    for id in quantizing(graph)? {
        raise(graph, id, ends)?;
    }
    for id in graph.order()? {
        sink(graph, id)?;
    }
    for id in quantizing(graph)? {
        cancel(graph, id, ends);
    }
    Ok(())
}

fn quantizing(graph: &Graph) -> Result<Vec<NodeId>, GraphError> {
    let mut order = graph.order()?;
    order.retain(|id| is_op(graph.node(*id), "QuantizeLinear"));
    Ok(order)
}

/// Inputs of an operator whose elements its outputs consist of; `None` where it does more than to move them.
fn moved_inputs(graph: &Graph, node: &Node) -> Option<usize> {
    if !node.domain.is_empty() {
        return None;
    }
    match node.op.as_str() {
        "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Transpose" | "Slice" | "Split" | "DepthToSpace"
        | "SpaceToDepth" => Some(1),
        "Concat" => Some(node.inputs.len()),
        "MaxPool" if node.outputs.len() == 1 && graph.opset("")? >= 12 => Some(1),
        _ => None,
    }
}

/// Dequantizes after a move instead of before it.
fn sink(graph: &mut Graph, id: NodeId) -> Result<(), GraphError> {
    let node = graph.node(id).clone();
    let Some(count) = moved_inputs(graph, &node) else { return Ok(()) };
    let mut codes = Vec::new();
    for input in &node.inputs[..count] {
        let Some(found) = input.and_then(|v| codes_behind(graph, v)) else { return sink_channels(graph, id, &node) };
        codes.push(found);
    }
    let Some((_, affine)) = codes.first().cloned() else { return Ok(()) };
    let is_byte = matches!(affine.dtype, DType::U8 | DType::I8);
    if codes.iter().any(|(_, other)| *other != affine) || (node.op == "MaxPool" && !is_byte) {
        return Ok(());
    }
    let inputs: Vec<ValueId> = codes.into_iter().map(|(value, _)| value).collect();
    let Some((scale, zero)) = affine.constants(graph) else { return Ok(()) };
    move_codes(graph, id, &inputs, affine.dtype, &[scale, zero], &Attributes::new())
}

/// Dequantizes constants of a scale for each channel after a Transpose.
fn sink_channels(graph: &mut Graph, id: NodeId, node: &Node) -> Result<(), GraphError> {
    let (Some(Some(value)), true) = (node.inputs.first(), node.op == "Transpose") else { return Ok(()) };
    let Some((dequantize, _)) = graph.value(*value).producer() else { return Ok(()) };
    let dequantize = graph.node(dequantize).clone();
    let Some(codes) = dequantize.inputs.first().copied().flatten() else { return Ok(()) };
    let is_plain = is_op(&dequantize, "DequantizeLinear")
        && graph.value(codes).constant().is_some()
        && dequantize.inputs[1..].iter().flatten().all(|v| graph.value(*v).constant().is_some_and(|t| t.rank() == 1))
        && dequantize.attributes.int("block_size", 0) == Ok(0);
    let (Some(dtype), Some(rank)) = (graph.dtype(codes), graph.known_shape(codes).map(|s| s.len())) else {
        return Ok(());
    };
    let Ok(axis) = dequantize.attributes.int("axis", 1) else { return Ok(()) };
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    let permutation = match node.attributes.ints("perm") {
        Ok(Some(perm)) => perm.to_vec(),
        _ => (0..rank as i64).rev().collect(),
    };
    let Some(axis) = permutation.iter().position(|p| *p == axis).filter(|_| is_plain) else { return Ok(()) };
    let operands: Vec<ValueId> = dequantize.inputs[1..].iter().copied().flatten().collect();
    let mut attributes = dequantize.attributes.clone();
    attributes.set("axis", axis as i64);
    move_codes(graph, id, &[codes], dtype, &operands, &attributes)
}

/// Lets a node move codes, and dequantizes what it makes.
fn move_codes(
    graph: &mut Graph,
    id: NodeId,
    inputs: &[ValueId],
    dtype: DType,
    operands: &[ValueId],
    attributes: &Attributes,
) -> Result<(), GraphError> {
    let Some(mut node) = graph.remove_node(id) else { return Ok(()) };
    for (slot, codes) in node.inputs.iter_mut().zip(inputs) {
        *slot = Some(*codes);
    }
    let mut dequantized = Vec::new();
    for output in node.outputs.iter_mut().flatten() {
        let shape = graph.known_shape(*output).unwrap_or_default();
        let codes = graph.fresh_value("codes", ValueType::tensor(dtype, dims(&shape)));
        dequantized.push((codes, std::mem::replace(output, codes)));
    }
    let name = node.name.clone();
    graph.add_node(node)?;
    for (codes, output) in dequantized {
        graph.add_node(Node {
            name: name.clone(),
            op: "DequantizeLinear".to_owned(),
            inputs: std::iter::once(codes).chain(operands.iter().copied()).map(Some).collect(),
            outputs: vec![Some(output)],
            attributes: attributes.clone(),
            ..Node::default()
        })?;
    }
    Ok(())
}

/// Quantizes before a move instead of after it, where nobody else reads what was moved.
fn raise(graph: &mut Graph, quantize: NodeId, ends: &HashSet<ValueId>) -> Result<(), GraphError> {
    let mut waiting = vec![quantize];
    while let Some(quantize) = waiting.pop() {
        let Some((value, affine, output)) = quantized_by(graph, graph.node(quantize)) else { continue };
        let Some((mover, _)) = graph.value(value).producer() else { continue };
        let node = graph.node(mover);
        let is_byte = matches!(affine.dtype, DType::U8 | DType::I8);
        let single = graph.value(value).consumers().len() == 1 && !ends.contains(&value) && node.outputs.len() == 1;
        let count = moved_inputs(graph, node).filter(|_| single && (is_byte || node.op != "MaxPool"));
        let (Some(count), Some((scale, zero))) = (count, affine.constants(graph)) else { continue };
        let (Some(quantizing), Some(mut moving)) = (graph.remove_node(quantize), graph.remove_node(mover)) else {
            continue;
        };
        for slot in moving.inputs.iter_mut().take(count).flatten() {
            let shape = graph.known_shape(*slot).unwrap_or_default();
            let codes = graph.fresh_value("codes", ValueType::tensor(affine.dtype, dims(&shape)));
            let source = std::mem::replace(slot, codes);
            waiting.push(graph.add_node(Node {
                name: quantizing.name.clone(),
                op: "QuantizeLinear".to_owned(),
                inputs: vec![Some(source), Some(scale), Some(zero)],
                outputs: vec![Some(codes)],
                ..Node::default()
            })?);
        }
        moving.outputs = vec![Some(output)];
        graph.add_node(moving)?;
    }
    Ok(())
}

/// Codes that are dequantized and quantized by the same parameters are what they were.
fn cancel(graph: &mut Graph, id: NodeId, ends: &HashSet<ValueId>) {
    let Some((value, affine, output)) = quantized_by(graph, graph.node(id)) else { return };
    let Some((codes, before)) = codes_behind(graph, value) else { return };
    if before == affine && !ends.contains(&output) {
        graph.replace_uses(output, codes);
        graph.remove_node(id);
    }
}
