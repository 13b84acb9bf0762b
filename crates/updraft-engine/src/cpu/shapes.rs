//! A graph with concrete sizes: every shape that does not depend on data, and every value that does not depend on
//! inputs.

use std::collections::HashMap;

use updraft_graph::dim::dims;
use updraft_graph::infer::infer_node;
use updraft_graph::{Attribute, DType, Dim, Graph, Node, NodeId, Tensor, ValueId, ValueType};

use crate::EngineError;
use crate::cpu::quantized;

/// Larger results of constants are computed in each run instead of being kept: reference evaluation is slow, and
/// stretching a constant multiplies it.
const FOLDED_BYTES_MAX: usize = 16 << 20;

/// The graph for inputs of these types and shapes, all of which may differ from run to run. Nodes of constants are
/// gone. Other graph inputs are constants: their defaults.
pub(crate) fn concrete(graph: &Graph, variable: &HashMap<ValueId, (DType, Vec<usize>)>) -> Result<Graph, EngineError> {
    let mut out = graph.clone();
    let inputs: Vec<ValueId> = out.values().map(|(id, _)| id).filter(|id| variable.contains_key(id)).collect();
    for id in &inputs {
        let (dtype, shape) = &variable[id];
        out.set_constant(*id, None);
        out.set_type(*id, ValueType::tensor(*dtype, dims(shape)));
    }
    out.set_inputs(inputs);
    for id in out.order()? {
        let label = out.node(id).label(&out);
        let refuse = |e: updraft_graph::OpError| EngineError::Node { node: label.clone(), message: e.to_string() };
        infer_node(&mut out, id).map_err(refuse)?;
        // Codes of weights stay codes until it is known who computes with them.
        if out.node(id).op != "DequantizeLinear" {
            fold(&mut out, id).map_err(refuse)?;
        }
    }
    Ok(out)
}

/// Folds those of these nodes, in execution order, that depend on constants only.
pub(crate) fn fold_nodes(graph: &mut Graph, nodes: &[NodeId]) -> Result<(), EngineError> {
    for id in nodes {
        let label = graph.node(*id).label(graph);
        fold(graph, *id).map_err(|e| EngineError::Node { node: label, message: e.to_string() })?;
    }
    Ok(())
}

fn fold(graph: &mut Graph, id: NodeId) -> Result<(), updraft_graph::OpError> {
    let node = graph.node(id);
    if !is_pure(node) || node.outputs.is_empty() {
        return Ok(());
    }
    if let Some(tensor) = quantized::dequantized(graph, id) {
        if let Some(Some(value)) = graph.remove_node(id).and_then(|node| node.outputs.first().copied()) {
            graph.set_constant(value, Some(tensor));
        }
        return Ok(());
    }
    let known: Option<Vec<Tensor>> = node.outputs.iter().flatten().map(|v| content(graph, *v)).collect();
    let tensors = match known {
        Some(tensors) => tensors,
        None => {
            let inputs: Option<Vec<Option<&Tensor>>> =
                node.inputs.iter().map(|v| v.map_or(Some(None), |v| graph.value(v).constant().map(Some))).collect();
            let Some(inputs) = inputs else { return Ok(()) };
            let output_bytes = |v: &ValueId| {
                let shape = graph.known_shape(*v)?;
                updraft_graph::tensor::element_count(&shape)?.checked_mul(graph.dtype(*v)?.size_in_memory())
            };
            let bytes: Option<Vec<usize>> = node.outputs.iter().flatten().map(output_bytes).collect();
            if bytes.is_none_or(|b| b.iter().any(|b| *b > FOLDED_BYTES_MAX)) {
                return Ok(());
            }
            let made = updraft_graph::eval::evaluate_node(graph, id, inputs, &|_| None)?;
            node.outputs.iter().zip(made).filter(|(v, _)| v.is_some()).map(|(_, tensor)| tensor).collect()
        }
    };
    if let Some(node) = graph.remove_node(id) {
        for (value, tensor) in node.outputs.into_iter().flatten().zip(tensors) {
            graph.set_constant(value, Some(tensor));
        }
    }
    Ok(())
}

/// A value that inference found all elements of.
fn content(graph: &Graph, value: ValueId) -> Option<Tensor> {
    if graph.dtype(value)? != DType::I64 {
        return None;
    }
    let shape = graph.known_shape(value)?;
    let sizes = graph.value(value).content()?;
    let sizes: Vec<i64> =
        sizes.iter().map(|d| Dim::known(d).and_then(|n| i64::try_from(n).ok())).collect::<Option<_>>()?;
    Tensor::new(&shape, &sizes).ok()
}

/// Whether a node gives the same for the same inputs, all of which are listed.
fn is_pure(node: &Node) -> bool {
    let random = matches!(
        node.op.as_str(),
        "RandomNormal"
            | "RandomNormalLike"
            | "RandomUniform"
            | "RandomUniformLike"
            | "Multinomial"
            | "Bernoulli"
            | "Dropout"
    );
    !random && !node.attributes.iter().any(|(_, a)| matches!(a, Attribute::Graph(_) | Attribute::Graphs(_)))
}
