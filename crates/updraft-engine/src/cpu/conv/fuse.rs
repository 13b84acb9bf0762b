//! A convolution together with the residual sum and the activation that follow it: they happen to results on their way
//! out, instead of in passes over memory of their own.

use std::collections::{HashMap, HashSet};

use updraft_graph::{DType, Graph, Node, NodeId, OpError, ValueId};

use super::Activation;
use super::build;
use crate::cpu::lower::Lowering;

/// A convolution that is computed where the last of the nodes after it stands.
pub(crate) struct FusedConv {
    /// The convolution and all that follow it but the last, in order.
    absorbed: Vec<NodeId>,
    residual: Option<ValueId>,
    activation: Activation,
}

/// The fused convolutions of a graph by their last node. `uses` tells how often a value is read.
pub(crate) fn find(graph: &Graph, order: &[NodeId], uses: impl Fn(ValueId) -> usize) -> HashMap<NodeId, FusedConv> {
    let mut found = HashMap::new();
    let mut taken = HashSet::new();
    for id in order {
        let node = graph.node(*id);
        if !is(node, "Conv") || !node.inputs.iter().flatten().all(|v| is_planned(graph, *v)) {
            continue;
        }
        let mut fused = FusedConv { absorbed: Vec::new(), residual: None, activation: Activation::None };
        let mut last = *id;
        while let Some(next) = follow(graph, last, &mut fused, &uses).filter(|next| !taken.contains(next)) {
            fused.absorbed.push(last);
            taken.insert(next);
            last = next;
            if fused.activation != Activation::None {
                break;
            }
        }
        if last != *id {
            found.insert(last, fused);
        }
    }
    found
}

/// Lowers the whole at the place of its last node.
pub(crate) fn lower(cx: &mut Lowering<'_>, last: NodeId, fused: &FusedConv) -> Result<(), OpError> {
    let graph = cx.graph();
    let nodes: Vec<NodeId> = fused.absorbed.iter().copied().chain([last]).collect();
    let conv = graph.node(nodes[0]);
    let mut made = cx.build(conv)?;
    let Some(built) = build::fused_conv(&mut made, fused.activation)? else {
        // A form that has no kernel: one node after the other.
        cx.release_absorbed(&fused.absorbed);
        return nodes.into_iter().try_for_each(|id| cx.lower_node(id));
    };
    let mut operands = conv.inputs.clone();
    operands.resize(build::RESIDUAL, None);
    operands.push(fused.residual);
    let labels: Vec<String> = nodes.iter().map(|id| graph.node(*id).label(graph)).collect();
    let ops: Vec<&str> = nodes.iter().map(|id| graph.node(*id).op.as_str()).collect();
    cx.add_kernel(labels.join(" + "), ops.join("+"), &operands, &graph.node(last).outputs, built, &[])?;
    nodes.into_iter().for_each(|id| cx.finish(graph.node(id)));
    Ok(())
}

impl FusedConv {
    /// The values that are made by no step of their own.
    pub(crate) fn absorbed_values<'g>(&self, graph: &'g Graph) -> impl Iterator<Item = ValueId> + use<'g, '_> {
        self.absorbed.iter().flat_map(|id| graph.node(*id).outputs.iter().flatten().copied())
    }
}

fn is(node: &Node, op: &str) -> bool {
    node.domain.is_empty() && node.op == op
}

/// Whether a value is of `f32` and of a known shape.
fn is_planned(graph: &Graph, value: ValueId) -> bool {
    graph.dtype(value) == Some(DType::F32) && graph.known_shape(value).is_some()
}

/// The only reader of what `last` makes, if it can be done to a convolution's results; it is noted in `fused`.
fn follow(graph: &Graph, last: NodeId, fused: &mut FusedConv, uses: impl Fn(ValueId) -> usize) -> Option<NodeId> {
    let [Some(value)] = graph.node(last).outputs[..] else { return None };
    let [reader] = graph.value(value).consumers() else { return None };
    let node = graph.node(*reader);
    let [Some(output)] = node.outputs[..] else { return None };
    if uses(value) != 1 || !is_planned(graph, value) || !is_planned(graph, output) {
        return None;
    }
    if is(node, "Add") && fused.residual.is_none() {
        let other = node.inputs.iter().copied().flatten().find(|v| *v != value)?;
        let is_alike = is_planned(graph, other) && graph.known_shape(other) == graph.known_shape(value);
        fused.residual = is_alike.then_some(other);
        fused.residual?;
    } else if is(node, "Relu") {
        fused.activation = Activation::Relu;
    } else if is(node, "Clip") {
        fused.activation = clip(graph, node)?;
    } else {
        return None;
    }
    Some(*reader)
}

/// The range of a Clip whose limits are constants.
fn clip(graph: &Graph, node: &Node) -> Option<Activation> {
    // Older versions give the limits as attributes.
    if graph.opset("")? < 11 {
        return None;
    }
    let limit = |index: usize, open: f32| match node.inputs.get(index).copied().flatten() {
        None => Some(open),
        Some(value) => graph.value(value).constant()?.as_slice::<f32>().ok()?.first().copied(),
    };
    let (min, max) = (limit(1, f32::NEG_INFINITY)?, limit(2, f32::INFINITY)?);
    (!min.is_nan() && !max.is_nan()).then_some(Activation::Clip { min, max })
}
