//! What nodes say about sizes beside the tensors: attributes and constant operands that change with channels.

use std::collections::{BTreeSet, HashMap};

use updraft_graph::op::{OpError, reshape_operand, resolve_axis};
use updraft_graph::{Graph, NodeId, Tensor, ValueId};

use crate::prune::groups::Space;

/// Removed indices of each space that loses some.
pub(super) type Removed = HashMap<Space, BTreeSet<usize>>;

/// Size of an axis before and after.
fn sizes(graph: &Graph, removed: &Removed, value: Option<ValueId>, axis: usize) -> Option<(usize, usize)> {
    let value = value?;
    let before = graph.shape(value)?.get(axis)?.known()?;
    let gone = removed.get(&Space { value, axis }).map_or(0, BTreeSet::len);
    Some((before, before - gone))
}

/// Whether any axis of the value loses indices.
fn changes(graph: &Graph, removed: &Removed, value: Option<ValueId>) -> bool {
    let Some(value) = value else { return false };
    (0..graph.shape(value).map_or(0, <[_]>::len)).any(|axis| removed.contains_key(&Space { value, axis }))
}

/// Rewrites one node for what its operands lose. Types in the graph are still those of before.
pub(super) fn rewrite(graph: &mut Graph, id: NodeId, removed: &Removed) -> Result<(), OpError> {
    let node = graph.node(id).clone();
    if !node.domain.is_empty() {
        return Ok(());
    }
    let input = |index: usize| node.inputs.get(index).copied().flatten();
    let output = |index: usize| node.outputs.get(index).copied().flatten();
    // A count of blocks that shrinks as its axis does: only whole blocks go.
    let count = |graph: &mut Graph, name: &str, default: Option<i64>, value, axis| -> Result<(), OpError> {
        let Some((before, after)) = sizes(graph, removed, value, axis).filter(|(before, after)| after < before) else {
            return Ok(());
        };
        let Some(blocks) = node.attributes.optional_int(name)?.or(default).filter(|n| *n > 1) else { return Ok(()) };
        let scaled = (blocks as u128 * after as u128) / before as u128;
        if scaled * before as u128 != blocks as u128 * after as u128 {
            return Err(OpError::attribute(name, format!("{blocks} does not divide as {before} to {after}")));
        }
        graph.attributes_mut(id).set(name, scaled as i64);
        Ok(())
    };
    match node.op.as_str() {
        "Conv" | "ConvTranspose" | "ConvInteger" | "QLinearConv" => count(graph, "group", Some(1), input(0), 1),
        "GroupNormalization" => count(graph, "num_groups", None, input(0), 1),
        "RotaryEmbedding" => count(graph, "num_heads", None, input(0), 2),
        "Attention" => {
            // Four axes have one for heads, and no attribute.
            count(graph, "q_num_heads", None, input(0), 2)?;
            count(graph, "kv_num_heads", None, input(1), 2)
        }
        "Split" => split(graph, id, removed),
        "Slice" => slice(graph, id, removed),
        "Reshape" if changes(graph, removed, output(0)) => reshape(graph, id, removed),
        "Expand" => listed_sizes(graph, id, 1, removed),
        "Resize" => listed_sizes(graph, id, 3, removed),
        _ => Ok(()),
    }
}

/// The elements of a constant integer operand.
fn ints(graph: &Graph, value: Option<ValueId>) -> Result<Option<Vec<i64>>, OpError> {
    let Some(value) = value else { return Ok(None) };
    let value = graph.value(value);
    let maker = value.producer().map(|(id, _)| graph.node(id));
    let constant = match (value.constant(), maker) {
        (Some(tensor), _) => Some(tensor),
        (None, Some(maker)) if maker.op == "Constant" => maker.attributes.tensor("value")?,
        _ => None,
    };
    Ok(match constant {
        Some(tensor) => Some(tensor.to_i64()?),
        None => None,
    })
}

/// Gives a node integers of its own; others may read the old ones.
fn set_ints(graph: &mut Graph, id: NodeId, index: usize, values: &[i64]) {
    let old = graph.node(id).inputs.get(index).copied().flatten();
    let hint = old.map_or_else(|| "sizes".to_owned(), |old| graph.value(old).name.clone());
    let made = graph.add_constant(&hint, Tensor::vector(values));
    graph.set_node_input(id, index, Some(made));
}

fn split(graph: &mut Graph, id: NodeId, removed: &Removed) -> Result<(), OpError> {
    let node = graph.node(id).clone();
    let Some(x) = node.inputs.first().copied().flatten() else { return Ok(()) };
    let rank = graph.shape(x).map_or(0, <[_]>::len);
    let axis = resolve_axis(node.attributes.int("axis", 0)?, rank)?;
    if !removed.contains_key(&Space { value: x, axis }) {
        return Ok(());
    }
    // A part that nobody wants has no value to ask; its size is what the others leave.
    let mut parts: Vec<Option<i64>> = Vec::new();
    for part in &node.outputs {
        parts.push(sizes(graph, removed, *part, axis).map(|(_, after)| after as i64));
    }
    let total = sizes(graph, removed, Some(x), axis).map_or(0, |(_, after)| after as i64);
    let rest = total - parts.iter().flatten().sum::<i64>();
    if parts.iter().filter(|p| p.is_none()).count() > 1 {
        return Err(OpError::unsupported("several parts of a split are not wanted"));
    }
    let parts: Vec<i64> = parts.into_iter().map(|part| part.unwrap_or(rest)).collect();
    set_ints(graph, id, 1, &parts);
    graph.attributes_mut(id).remove("num_outputs");
    Ok(())
}

fn slice(graph: &mut Graph, id: NodeId, removed: &Removed) -> Result<(), OpError> {
    let node = graph.node(id).clone();
    let input = |index: usize| node.inputs.get(index).copied().flatten();
    let (Some(x), y) = (input(0), node.outputs.first().copied().flatten()) else { return Ok(()) };
    let rank = graph.shape(x).map_or(0, <[_]>::len);
    let (Some(mut starts), Some(mut ends)) = (ints(graph, input(1))?, ints(graph, input(2))?) else { return Ok(()) };
    let axes = ints(graph, input(3))?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let mut changed = false;
    for (i, axis) in axes.iter().enumerate() {
        let axis = resolve_axis(*axis, rank)?;
        let Some(gone) = removed.get(&Space { value: x, axis }) else { continue };
        let (Some((size, _)), Some((_, len))) = (sizes(graph, removed, Some(x), axis), sizes(graph, removed, y, axis))
        else {
            continue;
        };
        let start = if starts[i] < 0 { starts[i].saturating_add(size as i64) } else { starts[i] };
        let start = start.clamp(0, size as i64) as usize;
        let start = start - gone.range(..start).count();
        starts[i] = start as i64;
        ends[i] = (start + len) as i64;
        changed = true;
    }
    if changed {
        set_ints(graph, id, 1, &starts);
        set_ints(graph, id, 2, &ends);
    }
    Ok(())
}

fn reshape(graph: &mut Graph, id: NodeId, removed: &Removed) -> Result<(), OpError> {
    let node = graph.node(id).clone();
    let (Some(x), Some(y)) = (node.inputs.first().copied().flatten(), node.outputs.first().copied().flatten()) else {
        return Ok(());
    };
    let shrunk = |graph: &Graph, value: ValueId| -> Vec<updraft_graph::Dim> {
        let dims = graph.shape(value).unwrap_or(&[]).iter().cloned().enumerate();
        dims.map(|(axis, dim)| match sizes(graph, removed, Some(value), axis) {
            Some((_, after)) => updraft_graph::Dim::Known(after),
            None => dim,
        })
        .collect()
    };
    let wanted = match ints(graph, node.inputs.get(1).copied().flatten())? {
        Some(mut wanted) => {
            for (axis, size) in wanted.iter_mut().enumerate().filter(|(_, size)| **size > 0) {
                if let Some((_, after)) = sizes(graph, removed, Some(y), axis) {
                    *size = after as i64;
                }
            }
            wanted
        }
        None => {
            let (from, to) = (shrunk(graph, x), shrunk(graph, y));
            graph.attributes_mut(id).remove("allowzero");
            reshape_operand(&from, &to)
                .ok_or_else(|| OpError::unsupported("its shape is computed, and no constant says the same"))?
        }
    };
    set_ints(graph, id, 1, &wanted);
    Ok(())
}

/// Sizes of the output's last axes in a constant operand; one may also say that an axis is stretched.
fn listed_sizes(graph: &mut Graph, id: NodeId, index: usize, removed: &Removed) -> Result<(), OpError> {
    let node = graph.node(id).clone();
    let y = node.outputs.first().copied().flatten();
    if !changes(graph, removed, y) {
        return Ok(());
    }
    let Some(mut wanted) = ints(graph, node.inputs.get(index).copied().flatten())? else { return Ok(()) };
    if wanted.is_empty() {
        return Ok(());
    }
    let rank = y.and_then(|y| graph.shape(y)).map_or(0, <[_]>::len);
    let axes: Vec<usize> = match node.attributes.ints("axes")? {
        Some(axes) => axes.iter().map(|axis| resolve_axis(*axis, rank)).collect::<Result<_, _>>()?,
        None => (rank.saturating_sub(wanted.len())..rank).collect(),
    };
    for (size, axis) in wanted.iter_mut().zip(axes) {
        match sizes(graph, removed, y, axis) {
            Some((before, after)) if *size == before as i64 => *size = after as i64,
            _ => {}
        }
    }
    set_ints(graph, id, index, &wanted);
    Ok(())
}
