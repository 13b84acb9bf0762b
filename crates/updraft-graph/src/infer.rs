//! Type and shape inference: each operator's rule, in execution order, met with what the file declares.

use crate::dim::Dim;
use crate::graph::{Graph, GraphError, NodeId, TensorType, ValueId, ValueType};
use crate::op::{self, Fact, Infer, OpError, show_shape};

/// Why types or shapes contradict one another, and where.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InferError {
    /// A node cannot take its inputs.
    #[error("node {node}: {source}")]
    Node {
        /// The node's label.
        node: String,
        /// What is wrong.
        source: OpError,
    },
    /// The graph has no order.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// Works out types and shapes of all values. Operators that the table lacks leave their outputs as declared.
pub fn infer(graph: &mut Graph) -> Result<(), InferError> {
    for id in graph.order()? {
        infer_node(graph, id).map_err(|source| InferError::Node { node: graph.node(id).label(graph), source })?;
    }
    Ok(())
}

/// Works out types and shapes of one node's outputs from its inputs'.
pub fn infer_node(graph: &mut Graph, id: NodeId) -> Result<(), OpError> {
    let node = graph.node(id);
    let Some(op) = op::find(&node.domain, &node.op) else { return Ok(()) };
    let (inputs, outputs) = (node.inputs.len(), node.outputs.len());
    let arity = op.arity;
    if inputs < arity.inputs_min || inputs > arity.inputs_max {
        return Err(OpError::value(format!(
            "{} takes {} inputs, found {inputs}",
            op.name,
            show_range(arity.inputs_min, arity.inputs_max)
        )));
    }
    if outputs < arity.outputs_min || outputs > arity.outputs_max {
        return Err(OpError::value(format!(
            "{} makes {} outputs, found {outputs}",
            op.name,
            show_range(arity.outputs_min, arity.outputs_max)
        )));
    }
    let mut needed = (arity.inputs_open..arity.inputs_min).filter(|i| node.inputs[*i].is_none());
    if let Some(index) = needed.next() {
        return Err(OpError::MissingInput { index, expected: "a value" });
    }
    let facts = (op.infer)(&Infer::new(graph, node))?;
    let outputs: Vec<_> = node.outputs.clone();
    for (value, fact) in outputs.into_iter().zip(facts) {
        if let Some(value) = value {
            meet(graph, value, fact)?;
        }
    }
    Ok(())
}

fn show_range(min: usize, max: usize) -> String {
    match (min, max) {
        (min, usize::MAX) => format!("at least {min}"),
        (min, max) if min == max => format!("{min}"),
        (min, max) => format!("{min} to {max}"),
    }
}

/// Joins what a rule found with what is declared; known beats unknown, and a contradiction is an error.
fn meet(graph: &mut Graph, id: ValueId, found: Fact) -> Result<(), OpError> {
    let value = graph.value(id);
    let declared = match &value.ty {
        ValueType::Tensor(t) => t.clone(),
        ValueType::Unknown => TensorType::default(),
        // Sequences and the like are not this rule's business.
        _ => return Ok(()),
    };
    let contradiction = |what: &str, declared: String, found: String| {
        OpError::shape(format!("{what} of {:?} is declared as {declared} but is {found}", value.name))
    };
    let dtype = match (declared.dtype, found.dtype) {
        (Some(a), Some(b)) if a != b => {
            return Err(contradiction("element type", a.to_string(), b.to_string()));
        }
        (a, b) => b.or(a),
    };
    let shape = match (declared.shape, found.shape) {
        (Some(a), Some(b)) => {
            if a.len() != b.len()
                || a.iter().zip(&b).any(|(a, b)| matches!((a, b), (Dim::Known(a), Dim::Known(b)) if a != b))
            {
                return Err(contradiction("shape", show_shape(&a), show_shape(&b)));
            }
            // A known size is best, then an expression over the inputs' symbols, then a name of its own.
            Some(
                a.into_iter()
                    .zip(b)
                    .map(|(a, b)| match (&a, &b) {
                        (Dim::Known(_), _) | (_, Dim::Unknown) => a,
                        _ => b,
                    })
                    .collect(),
            )
        }
        (a, b) => b.or(a),
    };
    graph.set_type(id, ValueType::Tensor(TensorType { dtype, shape }));
    graph.set_content(id, found.content);
    Ok(())
}
