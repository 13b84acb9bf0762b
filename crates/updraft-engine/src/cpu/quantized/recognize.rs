//! Which nodes of a graph are computed in integers, as one step each.
//!
//! The form is that of QDQ graphs: floats between `DequantizeLinear` and `QuantizeLinear` exist only on paper, and a step
//! goes from codes to codes. A step begins at a product or at a `QuantizeLinear` and takes in its neighbours as far as
//! nobody else reads what lies between; what is not recognized stays floats between Q and DQ nodes, so that answers never
//! depend on what is recognized by more than the rounding of sums in `f32`.

use std::collections::{HashMap, HashSet};

use updraft_graph::{DType, Graph, Node, NodeId, ValueId};

use super::affine::{Affine, codes_behind, is_op, quantized_by};
use super::bytes::PoolBytes;
use super::linear::{self, Linear};
use super::lower::windows_of;
use super::unary;
use super::{Bytes, Finish};

/// A step in integers, computed where the last of its nodes stands.
pub(in crate::cpu) struct IntegerStep {
    /// In order, the last one last.
    pub(super) nodes: Vec<NodeId>,
    /// What it reads while running.
    pub(super) operands: Vec<ValueId>,
    pub(super) output: ValueId,
    pub(super) work: Work,
}

/// What a step does.
pub(super) enum Work {
    /// A convolution or a product with constant weights.
    Linear(Box<Linear>),
    /// A product of two activations.
    Activations {
        inputs: [Bytes; 2],
        finish: Finish,
    },
    /// A function of one code, as the output byte for each byte.
    Table(Box<[u8; 256]>),
    Binary(Binary),
    /// GlobalAveragePool or AveragePool, with the input's and the output's codes.
    AveragePool(NodeId, Affine, Affine),
}

/// The sum or product of two tensors of equal shape.
#[derive(Debug, Clone)]
pub(super) struct Binary {
    pub(super) op: BinaryOp,
    pub(super) inputs: [Affine; 2],
    pub(super) output: Affine,
    /// Codes that the output is clamped to.
    pub(super) limits: (i32, i32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BinaryOp {
    Add,
    Sub,
    Mul,
}

impl IntegerStep {
    /// Values that it reads.
    pub(in crate::cpu) fn operands(&self) -> &[ValueId] {
        &self.operands
    }
}

/// A graph and what is known of its values.
pub(super) struct Scope<'g> {
    pub(super) graph: &'g Graph,
    /// How often each value is read, by nodes, by subgraphs and from outside.
    pub(super) uses: &'g [usize],
    /// Nodes that belong to a step already.
    pub(super) taken: HashSet<NodeId>,
}

/// The steps in integers of a graph, by their last node.
pub(in crate::cpu) fn find(graph: &Graph, order: &[NodeId], uses: &[usize]) -> HashMap<NodeId, IntegerStep> {
    let mut scope = Scope { graph, uses, taken: HashSet::new() };
    let mut found = HashMap::new();
    let mut add = |scope: &mut Scope, step: Option<IntegerStep>| {
        if let Some(step) = step
            && let Some(last) = step.nodes.last()
        {
            scope.taken.extend(step.nodes.iter().copied());
            found.insert(*last, step);
        }
    };
    // Products first: what follows them costs nothing there.
    for id in order {
        let step = linear::find(&scope, *id);
        add(&mut scope, step);
    }
    for id in order {
        if !scope.taken.contains(id) {
            let step = scope.pointwise(*id);
            add(&mut scope, step);
        }
    }
    found
}

impl Scope<'_> {
    /// The only reader of a value that nobody else reads.
    pub(super) fn only_reader(&self, value: ValueId) -> Option<NodeId> {
        match self.graph.value(value).consumers() {
            [reader] if self.uses[value.index()] == 1 && !self.taken.contains(reader) => Some(*reader),
            _ => None,
        }
    }

    /// The node that makes a value that nobody else reads.
    pub(super) fn only_maker(&self, value: ValueId) -> Option<NodeId> {
        let (maker, _) = self.graph.value(value).producer()?;
        (self.uses[value.index()] == 1 && !self.taken.contains(&maker)).then_some(maker)
    }

    /// The codes that a Relu or Clip clamps to; `None` for other nodes.
    pub(super) fn activation(&self, node: &Node, codes: &Affine) -> Option<(i32, i32)> {
        let (low, high) = codes.limits();
        if is_op(node, "Relu") {
            return Some((codes.zero_point.clamp(low, high), high));
        }
        // Older versions give the limits as attributes.
        if !is_op(node, "Clip") || self.graph.opset("")? < 11 {
            return None;
        }
        let limit = |index: usize, open: i32| match node.inputs.get(index).copied().flatten() {
            None => Some(open),
            Some(value) => {
                let limit = match codes_behind(self.graph, value) {
                    Some((codes, affine)) => {
                        let code = self.graph.value(codes).constant()?.to_i64().ok()?;
                        (*code.first()? - i64::from(affine.zero_point)) as f32 * affine.scale
                    }
                    None => *self.graph.value(value).constant()?.as_slice::<f32>().ok()?.first()?,
                };
                (!limit.is_nan()).then(|| codes.code(limit))
            }
        };
        let (from, to) = (limit(1, low)?, limit(2, high)?);
        (from <= to).then_some((from, to))
    }

    /// A step on single codes, that ends with this QuantizeLinear.
    fn pointwise(&self, id: NodeId) -> Option<IntegerStep> {
        let (value, output, written) = quantized_by(self.graph, self.graph.node(id))?;
        output.bytes()?;
        if let Some((nodes, codes, table)) = unary::table(self, value, &output) {
            let nodes = nodes.into_iter().chain([id]).collect();
            return Some(IntegerStep { nodes, operands: vec![codes], output: written, work: Work::Table(table) });
        }
        let mut nodes = vec![id];
        let mut made = self.only_maker(value)?;
        let mut limits = output.limits();
        if let Some(clamped) = self.activation(self.graph.node(made), &output) {
            nodes.push(made);
            limits = clamped;
            made = self.only_maker(self.graph.node(made).inputs.first().copied()??)?;
        }
        nodes.push(made);
        nodes.reverse();
        let node = self.graph.node(made);
        let bytes = |index: usize| {
            let value = node.inputs.get(index).copied()??;
            codes_behind(self.graph, value).filter(|(_, affine)| affine.bytes().is_some())
        };
        if is_op(node, "GlobalAveragePool") || is_op(node, "AveragePool") {
            let (codes, input) = bytes(0)?;
            let shape = self.graph.known_shape(codes).filter(|s| (3..=5).contains(&s.len()) && !s.contains(&0))?;
            let (window, _) = windows_of(node, &shape).ok()?;
            if !PoolBytes::covers(&window) {
                return None;
            }
            let work = Work::AveragePool(made, input, output);
            return (limits == output.limits()).then_some(IntegerStep {
                nodes,
                operands: vec![codes],
                output: written,
                work,
            });
        }
        let op = match node.op.as_str() {
            "Add" => BinaryOp::Add,
            "Sub" => BinaryOp::Sub,
            "Mul" => BinaryOp::Mul,
            _ => return None,
        };
        let ((a, first), (b, second)) = (bytes(0)?, bytes(1)?);
        let shape = |v: ValueId| self.graph.known_shape(v);
        let is_alike =
            node.domain.is_empty() && shape(a).is_some() && shape(a) == shape(b) && shape(a) == shape(written);
        let work = Work::Binary(Binary { op, inputs: [first, second], output, limits });
        is_alike.then_some(IntegerStep { nodes, operands: vec![a, b], output: written, work })
    }
}

/// Whether a graph has anything to do with codes.
pub(in crate::cpu) fn has_codes(graph: &Graph) -> bool {
    graph.nodes().any(|(_, node)| {
        matches!(
            node.op.as_str(),
            "DequantizeLinear" | "QuantizeLinear" | "QLinearConv" | "QLinearMatMul" | "ConvInteger" | "MatMulInteger"
        )
    })
}

/// A constant of `f32`, given as such or by codes.
pub(super) fn constant_floats(graph: &Graph, value: ValueId) -> Option<Vec<f32>> {
    if let Some(tensor) = graph.value(value).constant() {
        return tensor.as_slice::<f32>().ok().map(<[f32]>::to_vec);
    }
    let (maker, _) = graph.value(value).producer()?;
    let node = graph.node(maker);
    if !is_op(node, "DequantizeLinear") || graph.dtype(value) != Some(DType::F32) {
        return None;
    }
    let operands = node.inputs.iter().map(|v| match v {
        Some(v) => graph.value(*v).constant().map(Some),
        None => Some(None),
    });
    let made = updraft_graph::eval::evaluate_node(graph, maker, operands.collect::<Option<_>>()?, &|_| None).ok()?;
    made.first()?.as_slice::<f32>().ok().map(<[f32]>::to_vec)
}
