//! Puts a network into training mode: batch normalisation uses the batch's own statistics and keeps running ones,
//! dropout drops.

use updraft_graph::graph::UPDRAFT_DOMAIN;
use updraft_graph::op::OpError;
use updraft_graph::{Attributes, DType, Graph, Node, NodeId, Tensor, ValueId};

use crate::rewrite::{FixedNames, constant};
use crate::{PassError, Report};

/// What dropout draws its masks from.
pub(crate) struct Randomness {
    pub(crate) seed: ValueId,
    pub(crate) step: ValueId,
}

/// Replaces every BatchNormalization; returns the running statistics with their values after the step.
pub(crate) fn lower_batch_norm(graph: &mut Graph, report: &mut Report) -> Result<Vec<(ValueId, ValueId)>, PassError> {
    let names = FixedNames::of(graph);
    let mut running = Vec::new();
    for id in nodes_of(graph, "BatchNormalization")? {
        let node = graph.node(id).clone();
        let label = node.label(graph);
        let refuse = |source| PassError::Node { node: label.clone(), source };
        if node.outputs.iter().skip(1).any(Option::is_some) {
            return Err(refuse(OpError::unsupported("BatchNormalization that already is in training mode")));
        }
        let operand = |index| node.inputs.get(index).copied().flatten();
        let (Some(mean), Some(variance)) = (operand(3), operand(4)) else {
            return Err(refuse(OpError::MissingInput { index: 3, expected: "the running statistics" }));
        };
        let attribute = |name, default| node.attributes.float(name, default).map_err(refuse);
        let attributes: Attributes =
            [("epsilon", attribute("epsilon", 1e-5)?.into()), ("momentum", attribute("momentum", 0.9)?.into())].into();
        for value in [mean, variance] {
            if graph.value(value).constant().is_none() || graph.value(value).consumers().len() > 1 {
                return Err(PassError::value(
                    graph,
                    value,
                    format!("must be an initializer that only {label} reads, to be running statistics"),
                ));
            }
        }
        let made = graph.op_n(UPDRAFT_DOMAIN, "BatchNormalizationTraining", &node.inputs, attributes, 5);
        let made = made.map_err(refuse)?;
        replace(graph, &names, id, &node, made[0]);
        running.extend([(mean, made[1]), (variance, made[2])]);
        report.change(format!("{label} uses the statistics of the batch"));
    }
    Ok(running)
}

/// Replaces every BatchNormalization in the form for inference by a product and a sum, so that it can stand in a
/// training step and keep its statistics.
pub(crate) fn freeze_batch_norm(graph: &mut Graph) -> Result<(), PassError> {
    let names = FixedNames::of(graph);
    for id in nodes_of(graph, "BatchNormalization")? {
        let node = graph.node(id).clone();
        let refuse = |source| PassError::Node { node: node.label(graph), source };
        if node.attributes.flag("training_mode", false)? {
            return Err(refuse(OpError::unsupported("BatchNormalization in training mode")));
        }
        let operand = |index: usize| node.inputs.get(index).copied().flatten();
        let numbers = |index| operand(index).and_then(|v| constant(graph, v)).map(|t| t.to_f64()).transpose();
        let [scale, bias, mean, variance] = [1, 2, 3, 4].map(numbers).map(|n| n.map_err(OpError::from));
        let (Some(x), Some(scale), Some(bias), Some(mean), Some(variance)) =
            (operand(0), scale?, bias?, mean?, variance?)
        else {
            return Err(refuse(OpError::unsupported("BatchNormalization whose statistics are not constant")));
        };
        let epsilon = f64::from(node.attributes.float("epsilon", 1e-5)?);
        let count = scale.len();
        let (Some(dtype), Some(rank)) = (graph.dtype(x), graph.shape(x).map(<[_]>::len).filter(|rank| *rank >= 2))
        else {
            return Err(PassError::value(graph, x, "has no known type and rank, as a normalised value must"));
        };
        if [&bias, &mean, &variance].iter().any(|n| n.len() != count) {
            return Err(refuse(OpError::shape("statistics of different lengths")));
        }
        let factor: Vec<f64> = scale.iter().zip(&variance).map(|(s, v)| s / (v + epsilon).sqrt()).collect();
        let shift: Vec<f64> = (0..count).map(|c| bias[c] - mean[c] * factor[c]).collect();
        let mut shape = vec![1; rank - 1];
        shape[0] = count;
        let mut vector = |name, numbers: &[f64]| {
            let tensor = Tensor::from_f64(dtype, &shape, numbers).map_err(OpError::from)?;
            Ok::<_, PassError>(graph.add_constant(name, tensor))
        };
        let (factor, shift) = (vector("factor", &factor)?, vector("shift", &shift)?);
        let scaled = graph.op("Mul", &[x, factor], [])?;
        let shifted = graph.op("Add", &[scaled, shift], [])?;
        replace(graph, &names, id, &node, shifted);
    }
    Ok(())
}

/// Replaces every Dropout by a product with a mask. Masks are numbered in execution
/// order, so the same network always draws the same ones.
pub(crate) fn lower_dropout(graph: &mut Graph, randomness: &Randomness, report: &mut Report) -> Result<(), PassError> {
    let names = FixedNames::of(graph);
    for (stream, id) in nodes_of(graph, "Dropout")?.into_iter().enumerate() {
        let node = graph.node(id).clone();
        let label = node.label(graph);
        let refuse = |source| PassError::Node { node: label.clone(), source };
        let Some(x) = node.inputs.first().copied().flatten() else {
            return Err(refuse(OpError::MissingInput { index: 0, expected: "a tensor" }));
        };
        if node.outputs.get(1).copied().flatten().is_some_and(|mask| is_read(graph, mask)) {
            return Err(refuse(OpError::unsupported("Dropout whose mask is read")));
        }
        let ratio = match node.inputs.get(1).copied().flatten() {
            Some(ratio) => ratio,
            None => graph.add_constant("ratio", Tensor::scalar(0.5f32)),
        };
        let dtype = graph.dtype(x).ok_or_else(|| PassError::value(graph, x, "has no known element type"))?;
        let shape = graph.op("Shape", &[x], []).map_err(refuse)?;
        let attributes = [("stream", (stream as i64).into())];
        let operands = [shape, ratio, randomness.seed, randomness.step];
        let mut mask = graph.own_op("DropoutMask", &operands, attributes).map_err(refuse)?;
        if dtype != DType::F32 {
            mask = graph.op("Cast", &[mask], [("to", (dtype as i64).into())]).map_err(refuse)?;
        }
        let dropped = graph.op("Mul", &[x, mask], []).map_err(refuse)?;
        replace(graph, &names, id, &node, dropped);
        report.change(format!("{label} drops by mask {stream}"));
    }
    Ok(())
}

/// The nodes of one ONNX operator in execution order.
fn nodes_of(graph: &Graph, op: &str) -> Result<Vec<NodeId>, PassError> {
    let order = graph.order()?;
    Ok(order.into_iter().filter(|id| graph.node(*id).op == op && graph.node(*id).domain.is_empty()).collect())
}

fn is_read(graph: &Graph, value: ValueId) -> bool {
    !graph.value(value).consumers().is_empty() || graph.outputs().contains(&value)
}

/// Removes a node and lets what read its first output read `by`, which is new and so can take any name.
fn replace(graph: &mut Graph, names: &FixedNames, id: NodeId, node: &Node, by: ValueId) {
    graph.remove_node(id);
    if let Some(output) = node.outputs.first().copied().flatten() {
        names.substitute(graph, output, by);
    }
}
