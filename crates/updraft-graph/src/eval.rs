//! The reference evaluator: runs a graph by the definition of each operator, one node after another.
//!
//! It is the meaning of a graph, against which everything faster is compared; nothing in it is clever.

use std::collections::HashMap;

use crate::graph::{Graph, GraphError, NodeId};
use crate::op::{self, Eval, EvalScope, OpError, OpView};
use crate::tensor::Tensor;

/// Why a run stopped.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EvalError {
    /// A graph input without a default was not given.
    #[error("input {name:?} is missing")]
    MissingInput {
        /// The input's name.
        name: String,
    },
    /// A node failed.
    #[error("node {node} with inputs {inputs}: {source}")]
    Node {
        /// The node's label.
        node: String,
        /// Types and shapes of its inputs.
        inputs: String,
        /// What is wrong.
        source: OpError,
    },
    /// A graph output is made by nothing.
    #[error("output {name:?} is made by no node")]
    MissingOutput {
        /// The output's name.
        name: String,
    },
    /// The graph has no order.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// The graph's outputs, in order, for inputs by name.
pub fn evaluate(graph: &Graph, inputs: &HashMap<String, Tensor>) -> Result<Vec<Tensor>, EvalError> {
    evaluate_in(graph, inputs, &|_| None)
}

/// A node's inputs, computed, and its operator's definition: one step of [`evaluate`], also used for folding.
pub fn evaluate_node(
    graph: &Graph,
    id: NodeId,
    inputs: Vec<Option<&Tensor>>,
    outer: &dyn Fn(&str) -> Option<Tensor>,
) -> Result<Vec<Tensor>, OpError> {
    let node = graph.node(id);
    let op = op::of_node(graph, node)?;
    let rule = match op.eval {
        op::Rule::Is(rule) => rule,
        op::Rule::None(reason) => return Err(OpError::unsupported(format!("{} has no evaluation: {reason}", op.name))),
    };
    rule(&Eval { view: OpView::new(graph, node), inputs, scope: &Scope { outer } })
}

struct Scope<'a> {
    outer: &'a dyn Fn(&str) -> Option<Tensor>,
}

impl EvalScope for Scope<'_> {
    fn run(&self, graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError> {
        if inputs.len() != graph.inputs().len() {
            return Err(OpError::value(format!(
                "subgraph {:?} takes {} inputs, found {}",
                graph.name,
                graph.inputs().len(),
                inputs.len()
            )));
        }
        let named = graph.inputs().iter().map(|v| graph.value(*v).name.clone()).zip(inputs.iter().cloned()).collect();
        evaluate_in(graph, &named, self.outer).map_err(|error| {
            let (node, source) = match error {
                EvalError::Node { node, source, .. } => (format!("node {node} of subgraph {:?}", graph.name), source),
                error => (format!("subgraph {:?}", graph.name), OpError::value(error.to_string())),
            };
            OpError::Inner { node, source: Box::new(source) }
        })
    }
}

fn evaluate_in(
    graph: &Graph,
    inputs: &HashMap<String, Tensor>,
    outer: &dyn Fn(&str) -> Option<Tensor>,
) -> Result<Vec<Tensor>, EvalError> {
    let order = graph.order()?;
    let mut values: Vec<Option<Tensor>> = vec![None; graph.value_count()];
    for (id, value) in graph.values() {
        values[id.index()] = match value.constant() {
            Some(tensor) => Some(tensor.clone()),
            None if value.is_outer() => outer(&value.name),
            None => None,
        };
    }
    for id in graph.inputs() {
        let name = &graph.value(*id).name;
        match inputs.get(name) {
            Some(tensor) => values[id.index()] = Some(tensor.clone()),
            None if values[id.index()].is_some() => {}
            None => return Err(EvalError::MissingInput { name: name.clone() }),
        }
    }
    for id in order {
        let node = graph.node(id);
        let made = {
            let sight = |name: &str| match graph.find(name).and_then(|v| values[v.index()].clone()) {
                Some(tensor) => Some(tensor),
                None => outer(name),
            };
            let operands = node.inputs.iter().map(|v| v.and_then(|v| values[v.index()].as_ref())).collect();
            evaluate_node(graph, id, operands, &sight).map_err(|source| EvalError::Node {
                node: node.label(graph),
                inputs: show_operands(node.inputs.iter().map(|v| v.and_then(|v| values[v.index()].as_ref()))),
                source,
            })?
        };
        for (output, tensor) in node.outputs.iter().zip(made) {
            if let Some(v) = output {
                values[v.index()] = Some(tensor);
            }
        }
    }
    graph
        .outputs()
        .iter()
        .map(|v| {
            values[v.index()].clone().ok_or_else(|| EvalError::MissingOutput { name: graph.value(*v).name.clone() })
        })
        .collect()
}

/// `f32[2, 3], -, i64[1]`
fn show_operands<'a>(operands: impl Iterator<Item = Option<&'a Tensor>>) -> String {
    let shown: Vec<String> =
        operands.map(|t| t.map_or("-".to_owned(), |t| format!("{}{:?}", t.dtype(), t.shape()))).collect();
    shown.join(", ")
}
