//! Functions of one code as tables.
//!
//! Whatever lies between one `DequantizeLinear` and a `QuantizeLinear`, if it is elementwise and everything else in it
//! is a constant number, maps 256 codes to codes. The table holds what the operators' definitions give, so it is exact.

use std::collections::HashMap;

use updraft_graph::{DType, NodeId, Tensor, ValueId};

use super::affine::{Affine, codes_behind};
use super::recognize::Scope;

/// Nodes in one table at most: a chain that decomposes an activation function has fewer.
const NODES_MAX: usize = 16;

const ELEMENTWISE: &[&str] = &[
    "Abs",
    "Add",
    "Celu",
    "Ceil",
    "Clip",
    "Cos",
    "Div",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Log",
    "Max",
    "Min",
    "Mish",
    "Mul",
    "Neg",
    "PRelu",
    "Pow",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Sub",
    "Swish",
    "Tanh",
    "ThresholdedRelu",
];

/// The nodes between the codes of one value and `value`, those codes, and the output byte for each of their bytes.
pub(super) fn table(scope: &Scope, value: ValueId, output: &Affine) -> Option<(Vec<NodeId>, ValueId, Box<[u8; 256]>)> {
    let mut cone = Cone { nodes: Vec::new(), reads: HashMap::new(), source: None };
    cone.visit(scope, value)?;
    let (codes, input) = cone.source?;
    let graph = scope.graph;
    // Everything inside is read inside only, and `value` by the QuantizeLinear.
    let inside = cone.reads.iter().all(|(v, reads)| *v == value || scope.uses[v.index()] == *reads);
    let alone = cone.nodes.is_empty() || scope.uses[value.index()] == 1;
    if !inside || !alone || graph.known_shape(codes)? != graph.known_shape(value)? {
        return None;
    }
    let dequantized = |byte: u8| {
        let code = if input.dtype == DType::I8 { i32::from(byte as i8) } else { i32::from(byte) };
        (code - input.zero_point) as f32 * input.scale
    };
    let all: Vec<f32> = (0..=255u8).map(dequantized).collect();
    let mut made: HashMap<ValueId, Tensor> = HashMap::new();
    let origin = Tensor::vector(&all);
    for id in &cone.nodes {
        let node = graph.node(*id);
        let operands: Option<Vec<Option<&Tensor>>> = node
            .inputs
            .iter()
            .map(|v| match v {
                None => Some(None),
                Some(v) => match (graph.value(*v).constant(), made.get(v)) {
                    (Some(tensor), _) | (None, Some(tensor)) => Some(Some(tensor)),
                    _ => codes_behind(graph, *v).map(|_| Some(&origin)),
                },
            })
            .collect();
        let result = updraft_graph::eval::evaluate_node(graph, *id, operands?, &|_| None).ok()?;
        made.insert(node.outputs.first().copied()??, result.into_iter().next()?);
    }
    let result = if cone.nodes.is_empty() { &origin } else { made.get(&value)? };
    let numbers = result.as_slice::<f32>().ok().filter(|n| n.len() == 256)?;
    let mut table = Box::new([0u8; 256]);
    for (byte, number) in table.iter_mut().zip(numbers) {
        *byte = output.code(*number) as u8;
    }
    Some((cone.nodes, codes, table))
}

/// What a value is computed from.
struct Cone {
    /// In order of execution.
    nodes: Vec<NodeId>,
    /// How often nodes of the cone read each value made in it.
    reads: HashMap<ValueId, usize>,
    source: Option<(ValueId, Affine)>,
}

impl Cone {
    fn visit(&mut self, scope: &Scope, value: ValueId) -> Option<()> {
        let graph = scope.graph;
        if let Some(tensor) = graph.value(value).constant() {
            return (tensor.len() == 1 && tensor.dtype() == DType::F32).then_some(());
        }
        if let Some(found) = codes_behind(graph, value) {
            found.1.bytes()?;
            let known = *self.source.get_or_insert(found);
            return (known == found).then_some(());
        }
        let (id, _) = graph.value(value).producer()?;
        let node = graph.node(id);
        let is_known = node.domain.is_empty()
            && ELEMENTWISE.contains(&node.op.as_str())
            && node.outputs.len() == 1
            && !scope.taken.contains(&id);
        if !is_known || self.nodes.len() >= NODES_MAX || graph.dtype(value) != Some(DType::F32) {
            return None;
        }
        for input in node.inputs.iter().flatten() {
            let is_made = graph.value(*input).producer().is_some() && codes_behind(graph, *input).is_none();
            if is_made {
                *self.reads.entry(*input).or_insert(0) += 1;
            }
            if !is_made || self.reads[input] == 1 {
                self.visit(scope, *input)?;
            }
        }
        self.nodes.push(id);
        Some(())
    }
}
