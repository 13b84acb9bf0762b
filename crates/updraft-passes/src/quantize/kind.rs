//! What each operator could be on integers: the policy, one operator after another.

use updraft_graph::{Attribute, DType, Graph, Node, NodeId, ValueId};

use super::plan::Scheme;
use super::quantizer::Range;
use super::table::is_table;
use crate::PassError;
use crate::rewrite::{constant, has_subgraph};

/// What a node could be, were the rest of the graph to allow it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Kind {
    /// Worth running on integers by itself.
    Layer,
    /// Worth running on integers where it lies between layers.
    Between,
    /// Takes the form of what it moves.
    Move,
    /// Takes rows of a constant table.
    Table,
    /// Works on floats, for this reason.
    Float(String),
    /// Works on no floats to begin with.
    Other,
}

/// Operators that make one element of one element, or of a window of them.
const BETWEEN: &[&str] = &[
    "Relu",
    "Clip",
    "LeakyRelu",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Tanh",
    "Elu",
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
];

/// Operators that move elements of their first input.
const MOVES: &[&str] = &[
    "MaxPool",
    "GlobalMaxPool",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Gather",
    "GatherElements",
    "GatherND",
    "Expand",
    "Tile",
    "DepthToSpace",
    "SpaceToDepth",
    "Identity",
];

pub(super) fn kind(graph: &Graph, id: NodeId, scheme: &Scheme) -> Result<Kind, PassError> {
    let node = graph.node(id);
    let float = |reason: &str| Ok(Kind::Float(reason.to_owned()));
    let Some(dtype) = node.outputs.iter().flatten().next().and_then(|v| graph.dtype(*v)) else {
        return float("the type of its output is not known");
    };
    let reads_floats = node.inputs.iter().flatten().any(|v| graph.dtype(*v).is_some_and(DType::is_float));
    if !dtype.is_float() || (!reads_floats && !has_subgraph(node)) {
        return Ok(Kind::Other);
    }
    if scheme.exclude.contains(&node.label(graph)) {
        return float("it is excluded");
    }
    if !node.domain.is_empty() {
        return Ok(Kind::Float(format!("operators of {:?} have no integer form", node.domain)));
    }
    let found = match node.op.as_str() {
        "Conv" | "ConvTranspose" | "Gemm" | "MatMul" => layer(graph, node),
        "Add" | "Mul" => Kind::Between,
        op if BETWEEN.contains(&op) => between(graph, node),
        "Concat" => Kind::Move,
        _ if is_table(graph, node) => Kind::Table,
        "Pad" => pad(graph, node)?,
        "Resize" => resize(graph, node)?,
        op if MOVES.contains(&op) => moves(graph, node),
        op => Kind::Float(format!("{op} has no integer form")),
    };
    let other = activations(graph, node, &found).into_iter().find(|v| graph.dtype(*v) != Some(DType::F32));
    Ok(match other {
        Some(v) => {
            let dtype = graph.dtype(v).map_or("of unknown type", DType::name);
            Kind::Float(format!("{:?} is {dtype}, expected f32", graph.value(v).name))
        }
        None => found,
    })
}

fn operand(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

fn is_constant(graph: &Graph, value: Option<ValueId>) -> bool {
    value.is_none_or(|v| constant(graph, v).is_some())
}

fn layer(graph: &Graph, node: &Node) -> Kind {
    let windowed = matches!(node.op.as_str(), "Conv" | "ConvTranspose");
    if windowed && !is_constant(graph, operand(node, 1)) {
        return Kind::Float("its weights are not constant".to_owned());
    }
    match weights_of(graph, node) {
        Some((v, _)) if graph.dtype(v) != Some(DType::F32) => {
            let dtype = graph.dtype(v).map_or("of unknown type", DType::name);
            Kind::Float(format!("its weights are {dtype}, expected f32"))
        }
        _ if is_constant(graph, operand(node, 0)) && windowed => Kind::Float("it reads a constant".to_owned()),
        _ => Kind::Layer,
    }
}

fn between(graph: &Graph, node: &Node) -> Kind {
    // Bounds of Clip and axes of ReduceMean.
    if node.inputs.iter().skip(1).all(|v| is_constant(graph, *v)) {
        Kind::Between
    } else {
        Kind::Float("its parameters are not constant".to_owned())
    }
}

fn moves(graph: &Graph, node: &Node) -> Kind {
    if is_constant(graph, operand(node, 0)) {
        return Kind::Float("it reads a constant".to_owned());
    }
    if node.op == "MaxPool" && node.outputs.get(1).is_some_and(Option::is_some) {
        return Kind::Float("its indices are read".to_owned());
    }
    Kind::Move
}

/// Zeros are exact in every quantizer; other numbers would widen the range.
fn pad(graph: &Graph, node: &Node) -> Result<Kind, PassError> {
    let zero = operand(node, 2)
        .is_none_or(|v| constant(graph, v).is_some_and(|t| t.to_f64().is_ok_and(|n| n.iter().all(|n| *n == 0.0))));
    Ok(match node.attributes.string("mode", "constant")? {
        "constant" if !zero => Kind::Float("it pads with what may not be zero".to_owned()),
        _ => moves(graph, node),
    })
}

fn resize(graph: &Graph, node: &Node) -> Result<Kind, PassError> {
    Ok(match node.attributes.string("mode", "nearest")? {
        "nearest" if !node.attributes.string("coordinate_transformation_mode", "")?.starts_with("tf_crop") => {
            moves(graph, node)
        }
        _ => between(graph, node),
    })
}

/// The values that the node reads and that would be integers, were it on integers.
pub(super) fn activations(graph: &Graph, node: &Node, kind: &Kind) -> Vec<ValueId> {
    let count = match (kind, node.op.as_str()) {
        (Kind::Layer, "Gemm" | "MatMul") => 2,
        (Kind::Between, "Add" | "Mul") | (Kind::Move, "Concat") => usize::MAX,
        (Kind::Layer | Kind::Between | Kind::Move, _) => 1,
        _ => 0,
    };
    node.inputs.iter().take(count).flatten().copied().filter(|v| constant(graph, *v).is_none()).collect()
}

/// The constants that become integers along with the activations: one operand of a sum or product, parts of a Concat.
pub(super) fn constant_operands(graph: &Graph, node: &Node) -> Vec<(usize, ValueId)> {
    let all = node.inputs.iter().enumerate().filter_map(|(i, v)| Some((i, (*v)?)));
    let constants = all.filter(|(_, v)| constant(graph, *v).is_some());
    match node.op.as_str() {
        "Add" | "Mul" | "Concat" => constants.collect(),
        "MatMul" | "Gemm" => constants.filter(|(i, _)| *i == 0).collect(),
        _ => Vec::new(),
    }
}

/// The constant weights of a layer and the axis of their output channels.
pub(super) fn weights_of(graph: &Graph, node: &Node) -> Option<(ValueId, Option<usize>)> {
    let value = operand(node, 1)?;
    let rank = constant(graph, value)?.rank();
    let axis = match node.op.as_str() {
        "Conv" => Some(0),
        "ConvTranspose" => Some(1),
        "Gemm" => {
            let transposed = matches!(node.attributes.get("transB"), Some(Attribute::Int(n)) if *n != 0);
            Some(usize::from(!transposed))
        }
        "MatMul" if rank == 2 => Some(1),
        "MatMul" => None,
        _ => return None,
    };
    Some((value, axis.filter(|axis| *axis < rank)))
}

/// The range of a value that its operator alone decides.
pub(super) fn fixed_range(graph: &Graph, value: ValueId) -> Option<Range> {
    let (producer, _) = graph.value(value).producer()?;
    let node = graph.node(producer);
    // Shares of one. What calibration would cut off here are the strongest ones.
    (node.op == "Softmax" && node.domain.is_empty()).then_some(Range { min: 0.0, max: 1.0 })
}
