//! Any number of samples for a network that was written for one number.
//!
//! Exporters write the number of samples that they were shown, often 1, and training needs more. The leading axis of
//! every input is opened, shapes are worked out anew, and constant shapes that begin with the old number copy the
//! leading axis instead.

use updraft_graph::infer::infer;
use updraft_graph::op::show_shape;
use updraft_graph::{Dim, Graph, NodeId, Tensor, ValueId, ValueType};

use crate::PassError;
use crate::rewrite::constant;

/// Opens the leading axis of all inputs that must be given, where they all have the same known size there; leaves other
/// graphs as they are. Returns whether it did.
///
/// # Errors
/// A graph whose outputs then do not have an open leading axis: something in it depends on the number of samples.
pub fn open_batch(graph: &mut Graph) -> Result<bool, PassError> {
    let inputs: Vec<ValueId> =
        graph.inputs().iter().copied().filter(|v| graph.value(*v).constant().is_none()).collect();
    let lead = |graph: &Graph, v: ValueId| graph.shape(v).and_then(|s| s.first()?.known());
    let Some(count) = inputs.first().and_then(|v| lead(graph, *v)) else { return Ok(false) };
    if inputs.iter().any(|v| lead(graph, *v) != Some(count)) {
        return Ok(false);
    }
    let reshapes: Vec<NodeId> = graph.nodes().map(|(id, _)| id).filter(|id| keeps_lead(graph, *id, count)).collect();
    for id in reshapes {
        let shape = graph.node(id).inputs.get(1).copied().flatten().and_then(|v| constant(graph, v));
        let Some(mut sizes) = shape.and_then(|t| t.to_i64().ok()) else { continue };
        sizes[0] = 0;
        let opened = graph.add_constant("shape", Tensor::vector(&sizes));
        graph.set_node_input(id, 1, Some(opened));
    }
    for v in &inputs {
        let mut shape = graph.shape(*v).unwrap_or_default().to_vec();
        shape[0] = "N".into();
        let ty = match graph.dtype(*v) {
            Some(dtype) => ValueType::tensor(dtype, shape),
            None => continue,
        };
        graph.set_type(*v, ty);
    }
    let made: Vec<ValueId> = graph.values().filter(|(_, v)| v.producer().is_some()).map(|(id, _)| id).collect();
    made.into_iter().for_each(|v| graph.set_type(v, ValueType::Unknown));
    infer(graph)?;
    match graph.outputs().iter().find(|v| graph.shape(**v).and_then(|s| s.first()) != Some(&Dim::from("N"))) {
        None => Ok(true),
        Some(v) => {
            let found = graph.shape(*v).map_or("of unknown rank".to_owned(), show_shape);
            let problem = format!("is {found} for any number of samples N, expected [N, ..]; the file is for {count}");
            Err(PassError::value(graph, *v, problem))
        }
    }
}

/// Whether the node reshapes to a constant shape that begins with the number of samples, as what it reshapes does.
fn keeps_lead(graph: &Graph, id: NodeId, count: usize) -> bool {
    let node = graph.node(id);
    let operand = |i: usize| node.inputs.get(i).copied().flatten();
    let leads = |v: Option<ValueId>| v.and_then(|v| graph.shape(v)?.first()?.known()) == Some(count);
    let target = operand(1).and_then(|v| constant(graph, v)).and_then(|t| t.to_i64().ok());
    node.op == "Reshape"
        && node.domain.is_empty()
        && node.attributes.flag("allowzero", false).is_ok_and(|zero| !zero)
        && leads(operand(0))
        && target.is_some_and(|t| t.first().is_some_and(|n| usize::try_from(*n) == Ok(count)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use updraft_graph::DType;
    use updraft_graph::eval::evaluate;

    use super::*;

    /// Rows of 6 for two samples, reshaped to a constant shape and multiplied.
    fn fixed(shape: &[i64]) -> Graph {
        let mut graph = Graph::new("fixed");
        let x = graph.add_input("x", ValueType::tensor(DType::F32, vec![2.into(), 2.into(), 3.into()])).unwrap();
        let shape = graph.add_constant("shape", Tensor::vector(shape));
        let rows = graph.op("Reshape", &[x, shape], []).unwrap();
        let weights: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let w = graph.add_constant("w", Tensor::new(&[6, 2], &weights).unwrap());
        let y = graph.op("MatMul", &[rows, w], []).unwrap();
        graph.push_output(y);
        graph
    }

    #[test]
    fn a_network_for_two_samples_answers_three_as_it_would_each() {
        let mut graph = fixed(&[2, -1]);
        assert!(open_batch(&mut graph).unwrap());
        let numbers: Vec<f32> = (0..18).map(|i| i as f32 * 0.5).collect();
        let run = |graph: &Graph, rows: std::ops::Range<usize>| {
            let x = Tensor::new(&[rows.len(), 2, 3], &numbers[rows.start * 6..rows.end * 6]).unwrap();
            let y = evaluate(graph, &HashMap::from([("x".to_owned(), x)])).unwrap();
            y[0].to_f64().unwrap()
        };
        assert_eq!(run(&graph, 0..3)[..4], run(&fixed(&[2, -1]), 0..2));
        assert_eq!(run(&graph, 0..3)[2..], run(&fixed(&[2, -1]), 1..3));
        assert!(!open_batch(&mut graph).unwrap(), "it is open already");
    }

    #[test]
    fn what_depends_on_the_number_of_samples_is_refused() {
        let mut graph = fixed(&[-1, 6]);
        let x = graph.find("x").unwrap();
        let first = graph.add_constant("first", Tensor::scalar(0i64));
        let one = graph.op("Gather", &[x, first], []).unwrap();
        graph.push_output(one);
        let error = open_batch(&mut graph).unwrap_err();
        assert!(error.to_string().contains("the file is for 2"), "{error}");
    }
}
