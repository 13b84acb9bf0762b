//! What a graph costs to run: operations and bytes moved, node by node, for known sizes.
//!
//! Bytes are those of the operands as they lie in memory, each read or written once: what a node moves when nothing of
//! it stays in a cache. Shapes that no one knows yet have no cost rather than a guessed one.

use std::collections::BTreeMap;
use std::iter::Sum;
use std::ops::Add;

use crate::dim::Dim;
use crate::graph::{Graph, Node, TensorType, ValueId, ValueType};
use crate::infer::{InferError, infer};
use crate::op::{self, KnownOperand, Shapes};

/// What it takes to run a node or a graph once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Floating-point (or integer) operations; a multiply-add is two.
    pub flops: u64,
    /// Bytes of all inputs, constants too.
    pub read_bytes: u64,
    /// Bytes of all outputs.
    pub written_bytes: u64,
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost {
            flops: self.flops.saturating_add(other.flops),
            read_bytes: self.read_bytes.saturating_add(other.read_bytes),
            written_bytes: self.written_bytes.saturating_add(other.written_bytes),
        }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), Cost::add)
    }
}

/// The cost of one node; `None` where an operand's type or shape is not known or the operator is not in the table.
pub fn of_node(graph: &Graph, node: &Node) -> Option<Cost> {
    let op = op::of_node(graph, node).ok()?;
    let operands = |values: &[Option<ValueId>]| -> Option<Vec<Option<KnownOperand>>> {
        values
            .iter()
            .map(|value| match value {
                None => Some(None),
                Some(v) => Some(Some((graph.dtype(*v)?, graph.known_shape(*v)?))),
            })
            .collect()
    };
    let shapes =
        Shapes { attributes: &node.attributes, inputs: operands(&node.inputs)?, outputs: operands(&node.outputs)? };
    let bytes = |operands: &[Option<KnownOperand>]| -> Option<u64> {
        operands.iter().flatten().try_fold(0u64, |sum, (dtype, shape)| {
            let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d as u64))?;
            sum.checked_add(elements.checked_mul(dtype.size_in_memory() as u64)?)
        })
    };
    Some(Cost {
        flops: (op.flops)(&shapes),
        read_bytes: bytes(&shapes.inputs)?,
        written_bytes: bytes(&shapes.outputs)?,
    })
}

/// The graph with symbolic sizes replaced by known ones wherever they stand, and all shapes worked out anew.
pub fn at_sizes(graph: &Graph, sizes: &BTreeMap<String, usize>) -> Result<Graph, InferError> {
    let mut bound = graph.clone();
    let size_of = |symbol: &str| sizes.get(symbol).copied();
    let values: Vec<ValueId> = bound.values().map(|(id, _)| id).collect();
    for id in values {
        let ValueType::Tensor(TensorType { dtype, shape: Some(shape) }) = &bound.value(id).ty else { continue };
        let shape = shape.iter().map(|dim| dim.evaluate(&size_of).map_or_else(|| dim.clone(), Dim::Known)).collect();
        let ty = ValueType::Tensor(TensorType { dtype: *dtype, shape: Some(shape) });
        bound.set_type(id, ty);
    }
    infer(&mut bound)?;
    Ok(bound)
}

/// The symbols that the sizes of the graph's inputs depend on, in order of appearance.
pub fn input_symbols(graph: &Graph) -> Vec<String> {
    let mut symbols = Vec::new();
    for dim in graph.inputs().iter().filter_map(|v| graph.shape(*v)).flatten() {
        for symbol in dim.symbols() {
            if !symbols.contains(&symbol) {
                symbols.push(symbol);
            }
        }
    }
    symbols
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::tensor::Tensor;

    #[test]
    fn a_matrix_product_costs_two_operations_per_multiply_add_and_its_operands_bytes() {
        let mut graph = Graph::new("layer");
        let x = graph.add_input("x", ValueType::tensor(DType::F32, vec!["N".into(), 3.into()])).unwrap();
        let w = graph.add_constant("w", Tensor::zeros(DType::F32, &[3, 5]).unwrap());
        let y = graph.op("MatMul", &[x, w], []).unwrap();
        graph.push_output(y);
        let total = |graph: &Graph| graph.nodes().map(|(_, node)| of_node(graph, node)).sum::<Option<Cost>>();
        assert_eq!(input_symbols(&graph), ["N"]);
        assert_eq!(total(&graph), None);
        let bound = at_sizes(&graph, &BTreeMap::from([("N".to_owned(), 4)])).unwrap();
        let expected = Cost { flops: 2 * 4 * 3 * 5, read_bytes: 4 * (4 * 3 + 3 * 5), written_bytes: 4 * 4 * 5 };
        assert_eq!(total(&bound), Some(expected));
    }
}
