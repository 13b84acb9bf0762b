//! Graphs of opsets after 21: whether they say anything that opset 21 cannot.

use crate::attribute::Attribute;
use crate::dtype::DType;
use crate::graph::{Graph, Node, NodeId, OPSET};
use crate::op;
use crate::upgrade::is_onnx;

/// Attributes that came after opset 21, with the default, which is the behaviour of opset 21.
fn new_default(op: &str, attribute: &str) -> Option<Attribute> {
    match (op, attribute) {
        ("Cast" | "CastLike", "round_mode") => Some("up".into()),
        ("DequantizeLinear", "output_dtype") | ("QuantizeLinear", "precision") => Some(0i64.into()),
        ("Range", "stash_type") => Some(1i64.into()),
        ("SpaceToDepth", "mode") => Some("DCR".into()),
        _ => None,
    }
}

/// Whether every node, of subgraphs too, means the same in opset 21.
pub(super) fn means_the_same(graph: &Graph) -> bool {
    graph.nodes().all(|(_, node)| {
        let inside = node.attributes.iter().all(|(_, attribute)| match attribute {
            Attribute::Graph(inner) => means_the_same(inner),
            Attribute::Graphs(inner) => inner.iter().all(means_the_same),
            _ => true,
        });
        inside && (!is_onnx(&node.domain) || node_means_the_same(graph, node))
    })
}

fn node_means_the_same(graph: &Graph, node: &Node) -> bool {
    // What is not known may mean anything.
    let Some(op) = op::find(&node.domain, &node.op) else { return false };
    if op.versions.first().is_none_or(|first| *first > OPSET) {
        return false;
    }
    if op.versions.iter().all(|version| *version <= OPSET) {
        return true;
    }
    let attributes =
        node.attributes.iter().all(|(name, value)| new_default(&node.op, name).is_none_or(|default| default == *value));
    let operands = node.inputs.iter().chain(&node.outputs).flatten();
    attributes && operands.into_iter().all(|v| graph.dtype(*v).is_some_and(|dtype| is_old_type(node, dtype)))
}

/// Whether the operators that changed took this element type in opset 21 already. The answer may be no where it is yes
/// for one operand only; then the graph keeps its version.
fn is_old_type(node: &Node, dtype: DType) -> bool {
    match node.op.as_str() {
        "BitShift" => !dtype.is_signed_integer(),
        "Celu" => dtype == DType::F32,
        "Range" => dtype != DType::F16 && dtype != DType::BF16,
        "Mod" => !dtype.is_float() || node.attributes.flag("fmod", false).unwrap_or(false),
        _ => {
            dtype.bits().is_none_or(|bits| bits > 8) && dtype != DType::BF16
                || matches!(dtype, DType::U8 | DType::I8 | DType::Bool)
        }
    }
}

/// Takes away attributes that opset 21 does not have; they have their defaults.
pub(super) fn drop_new_defaults(graph: &mut Graph, id: NodeId) {
    let node = graph.node(id);
    let new: Vec<String> = node
        .attributes
        .iter()
        .filter(|(name, _)| new_default(&node.op, name).is_some())
        .map(|(n, _)| n.to_owned())
        .collect();
    let attributes = graph.attributes_mut(id);
    for name in new {
        attributes.remove(&name);
    }
}
