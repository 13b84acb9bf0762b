//! Removes nodes that give back what they read, and joins moves that undo or follow one another.

use updraft_graph::op::reshape_operand;
use updraft_graph::{Graph, Node, NodeId, Tensor, ValueId};

use crate::rewrite::{FixedNames, constant};
use crate::{Pass, PassError, Promise, Report};

/// Drops what changes nothing at inference, and merges neighbouring Reshapes and Transposes.
pub const DROP_IDENTITIES: Pass = Pass { name: "drop identities", promise: Promise::Exact, rewrite: drop_identities };

fn drop_identities(graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
    let names = FixedNames::of(graph);
    // In execution order a chain collapses from its beginning, so one walk is enough.
    for id in graph.order()? {
        merge_reshapes(graph, id, report)?;
        merge_transposes(graph, id, report)?;
        let node = graph.node(id);
        let Some(output) = node.outputs.first().copied().flatten() else { continue };
        let Some(input) = unchanged_input(graph, node)? else { continue };
        let label = node.label(graph);
        if names.substitute(graph, output, input) {
            graph.remove_node(id);
            report.change(label);
        } else {
            report.refuse(graph, id, "joins two names that must both stay");
        }
    }
    Ok(())
}

/// The input that the node's only read output always equals.
fn unchanged_input(graph: &Graph, node: &Node) -> Result<Option<ValueId>, PassError> {
    let operand = |index: usize| node.inputs.get(index).copied().flatten();
    let (Some(first), output) = (operand(0), node.outputs.first().copied().flatten()) else { return Ok(None) };
    if !node.domain.is_empty() {
        return Ok(None);
    }
    let same = match node.op.as_str() {
        "Identity" => true,
        "Dropout" => {
            let mask_is_read = node
                .outputs
                .get(1)
                .copied()
                .flatten()
                .is_some_and(|mask| !graph.value(mask).consumers().is_empty() || graph.outputs().contains(&mask));
            let trains = match operand(2) {
                None => false,
                Some(flag) => constant(graph, flag).is_none_or(|t| t.to_bools() != Ok(vec![false])),
            };
            !mask_is_read && !trains
        }
        "Concat" | "Sum" | "Max" | "Min" | "Mean" => node.inputs.len() == 1,
        "Cast" => graph.dtype(first).is_some() && graph.dtype(first) == output.and_then(|v| graph.dtype(v)),
        // The number of elements is kept in order, so an equal shape is an equal tensor.
        "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Expand" | "Tile" => same_shape(graph, node),
        "Pad" => same_shape(graph, node) && all_ints(graph, operand(1), |n| n == 0),
        // Of as many elements taken forwards, every one is taken.
        "Slice" => same_shape(graph, node) && operand(4).is_none_or(|s| all_ints(graph, Some(s), |n| n > 0)),
        "Transpose" => permutation(graph, node)?.is_some_and(|p| p.iter().enumerate().all(|(i, axis)| i == *axis)),
        "Mul" | "Div" => {
            let is_one = |v| constant(graph, v).is_some_and(|t| t.to_f64().is_ok_and(|v| v.iter().all(|v| *v == 1.0)));
            let other = operand(1);
            if other.is_some_and(is_one) && same_shape(graph, node) {
                true
            } else if node.op == "Mul" && is_one(first) && shapes_match(graph, other, output) {
                return Ok(other);
            } else {
                false
            }
        }
        _ => false,
    };
    Ok(same.then_some(first))
}

/// `Reshape` of what was only another view of `x` reads `x`.
fn merge_reshapes(graph: &mut Graph, id: NodeId, report: &mut Report) -> Result<(), PassError> {
    let node = graph.node(id);
    let ([Some(x), _], [Some(y)]) = (&node.inputs[..], &node.outputs[..]) else { return Ok(()) };
    if node.op != "Reshape" || !node.domain.is_empty() {
        return Ok(());
    }
    let Some((before, _)) = graph.value(*x).producer() else { return Ok(()) };
    let before = graph.node(before);
    let is_view = matches!(before.op.as_str(), "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze");
    let source = before.inputs.first().copied().flatten();
    let (true, true, Some(source)) = (is_view, before.domain.is_empty(), source) else { return Ok(()) };
    let (Some(from), Some(to)) = (graph.shape(source), graph.shape(*y)) else { return Ok(()) };
    let Some(sizes) = reshape_operand(from, to) else { return Ok(()) };
    report.change(format!("{} reads past {}", node.label(graph), before.label(graph)));
    let shape = graph.add_constant("shape", Tensor::vector(&sizes));
    graph.set_node_input(id, 0, Some(source));
    graph.set_node_input(id, 1, Some(shape));
    graph.attributes_mut(id).remove("allowzero");
    Ok(())
}

/// `Transpose` of a transposed `x` is one transposition of `x`.
fn merge_transposes(graph: &mut Graph, id: NodeId, report: &mut Report) -> Result<(), PassError> {
    let node = graph.node(id);
    let Some(second) = permutation(graph, node)? else { return Ok(()) };
    let x = node.inputs.first().copied().flatten();
    let Some((before, _)) = x.and_then(|x| graph.value(x).producer()) else { return Ok(()) };
    let before = graph.node(before);
    let source = before.inputs.first().copied().flatten();
    let (Some(first), Some(source)) = (permutation(graph, before)?, source) else { return Ok(()) };
    if first.len() != second.len() {
        return Ok(());
    }
    let joined: Vec<i64> = second.iter().map(|axis| first[*axis] as i64).collect();
    report.change(format!("{} reads past {}", node.label(graph), before.label(graph)));
    graph.set_node_input(id, 0, Some(source));
    graph.attributes_mut(id).set("perm", joined);
    Ok(())
}

/// Where each output axis of a Transpose comes from; `None` for other operators or an unknown rank.
fn permutation(graph: &Graph, node: &Node) -> Result<Option<Vec<usize>>, PassError> {
    let Some(x) = node.inputs.first().copied().flatten() else { return Ok(None) };
    if node.op != "Transpose" || !node.domain.is_empty() {
        return Ok(None);
    }
    let Some(rank) = graph.shape(x).map(<[_]>::len) else { return Ok(None) };
    let given = node.attributes.ints("perm")?;
    let axes: Vec<usize> = match given {
        None => (0..rank).rev().collect(),
        Some(axes) => axes.iter().filter_map(|a| usize::try_from(*a).ok().filter(|a| *a < rank)).collect(),
    };
    Ok((axes.len() == rank).then_some(axes))
}

fn same_shape(graph: &Graph, node: &Node) -> bool {
    shapes_match(graph, node.inputs.first().copied().flatten(), node.outputs.first().copied().flatten())
}

fn shapes_match(graph: &Graph, a: Option<ValueId>, b: Option<ValueId>) -> bool {
    let shape = |v: Option<ValueId>| v.and_then(|v| graph.shape(v));
    matches!((shape(a), shape(b)), (Some(a), Some(b)) if a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same(b)))
}

/// Whether the value is a constant integer tensor whose elements all satisfy `test`.
fn all_ints(graph: &Graph, value: Option<ValueId>, test: fn(i64) -> bool) -> bool {
    let Some(tensor) = value.and_then(|v| constant(graph, v)) else { return false };
    tensor.to_i64().is_ok_and(|ints| ints.into_iter().all(test))
}
