//! Computes once what does not depend on any input.

use std::collections::HashSet;

use updraft_graph::eval::evaluate_node;
use updraft_graph::op::{self, OpError, Shapes, reshape_operand};
use updraft_graph::tensor::element_count;
use updraft_graph::{DType, Dim, Graph, NodeId, Tensor, ValueId};

use crate::rewrite::{has_subgraph, is_random};
use crate::{Pass, PassError, Promise, Report};

/// Replaces nodes by their values where all they read is constant, and shapes by constants where inference knows them.
pub const FOLD_CONSTANTS: Pass = Pass { name: "fold constants", promise: Promise::Exact, rewrite: fold_constants };

/// The most elements made, and the most operations done, for one folded node. The definition is evaluated at some tens
/// of nanoseconds an element, so a node costs at most about a second; and a model grows by no more than 16 Mi elements
/// for a node that was small as a formula.
const WORK_MAX: u64 = 1 << 24;

fn fold_constants(graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
    let inputs: HashSet<ValueId> = graph.inputs().iter().copied().collect();
    let is_constant = |graph: &Graph, v: ValueId| graph.value(v).constant().is_some() && !inputs.contains(&v);
    for id in graph.order()? {
        let node = graph.node(id);
        // An output of the graph must be made by a node.
        if node.outputs.iter().flatten().any(|v| graph.outputs().contains(v)) {
            constant_reshape(graph, id, report)?;
            continue;
        }
        if let Some(tensors) = known_contents(graph, id)? {
            replace(graph, id, tensors, report);
            continue;
        }
        let node = graph.node(id);
        // Weights are kept as codes for the sake of their size, and of kernels that compute with them.
        let holds_codes = node.op == "DequantizeLinear" && node.domain.is_empty();
        // Codes of weights are a fraction of the floats that they stand for, and engines compute with them.
        let is_codes = node.op == "DequantizeLinear" && node.domain.is_empty();
        let foldable = !is_codes
            && node.inputs.iter().flatten().all(|v| is_constant(graph, *v))
            && !holds_codes
            && !has_subgraph(node)
            && !is_random(node)
            && op::find(&node.domain, &node.op).is_some_and(|op| op.eval.get().is_some());
        if !foldable {
            constant_reshape(graph, id, report)?;
            continue;
        }
        if let Some(work) = work(graph, id).filter(|w| *w > WORK_MAX) {
            report.refuse(graph, id, format!("takes {work} operations or elements, more than {WORK_MAX}"));
            continue;
        }
        let operands = node.inputs.iter().map(|v| v.and_then(|v| graph.value(v).constant())).collect();
        let made = evaluate_node(graph, id, operands, &|_| None).map_err(|e| PassError::node(graph, id, e))?;
        let wanted = graph.node(id).outputs.len();
        replace(graph, id, made.into_iter().map(Some).chain(std::iter::repeat(None)).take(wanted).collect(), report);
    }
    Ok(())
}

/// Removes a node whose outputs are these tensors.
fn replace(graph: &mut Graph, id: NodeId, tensors: Vec<Option<Tensor>>, report: &mut Report) {
    report.change(graph.node(id).label(graph));
    let Some(node) = graph.remove_node(id) else { return };
    for (output, tensor) in node.outputs.into_iter().zip(tensors) {
        if let (Some(output), Some(tensor)) = (output, tensor) {
            graph.set_constant(output, Some(tensor));
        }
    }
}

/// The outputs of a node all of whose elements inference knows, such as `Shape` of a known shape.
fn known_contents(graph: &Graph, id: NodeId) -> Result<Option<Vec<Option<Tensor>>>, PassError> {
    let tensor_of = |v: ValueId| -> Result<Option<Tensor>, OpError> {
        let value = graph.value(v);
        let Some(sizes) = value.content().and_then(|c| c.iter().map(Dim::known).collect::<Option<Vec<_>>>()) else {
            return Ok(None);
        };
        let (Some(dtype), Some(shape)) = (value.ty.dtype(), graph.known_shape(v)) else { return Ok(None) };
        if element_count(&shape) != Some(sizes.len()) {
            return Ok(None);
        }
        let sizes: Vec<i128> = sizes.into_iter().map(|n| n as i128).collect();
        Ok(Some(Tensor::from_i128(dtype, &shape, &sizes)?))
    };
    let mut tensors = Vec::new();
    for output in &graph.node(id).outputs {
        match output {
            None => tensors.push(None),
            Some(v) => match tensor_of(*v).map_err(|e| PassError::node(graph, id, e))? {
                Some(tensor) => tensors.push(Some(tensor)),
                None => return Ok(None),
            },
        }
    }
    Ok(Some(tensors))
}

/// Gives `Reshape` a constant shape where the sizes that are not known can be taken from its input.
fn constant_reshape(graph: &mut Graph, id: NodeId, report: &mut Report) -> Result<(), PassError> {
    let node = graph.node(id);
    let [Some(x), Some(shape)] = node.inputs[..] else { return Ok(()) };
    if node.op != "Reshape" || !node.domain.is_empty() || node.attributes.flag("allowzero", false)? {
        return Ok(());
    }
    let (Some(from), Some(to)) = (graph.shape(x), graph.value(shape).content()) else { return Ok(()) };
    // Content is only what a node computes; an operand with 0 or -1 is constant already, or has no content.
    let Some(sizes) = reshape_operand(from, to).filter(|_| graph.value(shape).constant().is_none()) else {
        return Ok(());
    };
    let constant = graph.add_constant("shape", Tensor::vector(&sizes));
    graph.set_node_input(id, 1, Some(constant));
    report.change(format!("the shape of {}", graph.node(id).label(graph)));
    Ok(())
}

/// Operations and elements of a node, whichever is more; `None` where a shape is not known.
fn work(graph: &Graph, id: NodeId) -> Option<u64> {
    let node = graph.node(id);
    let operand = |v: &Option<ValueId>| match v {
        None => Some(None),
        Some(v) => Some(Some((graph.dtype(*v).unwrap_or(DType::F32), graph.known_shape(*v)?))),
    };
    let shapes = Shapes {
        attributes: &node.attributes,
        inputs: node.inputs.iter().map(operand).collect::<Option<_>>()?,
        outputs: node.outputs.iter().map(operand).collect::<Option<_>>()?,
    };
    let elements = (0..shapes.outputs.len()).map(|i| shapes.output_len(i)).fold(0, u64::saturating_add);
    Some((op::find(&node.domain, &node.op)?.flops)(&shapes).max(elements))
}
