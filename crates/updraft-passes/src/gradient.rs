//! Reverse-mode differentiation: adds to a graph the nodes that compute its gradients.
//!
//! The walk goes from the differentiated value back through the nodes that lie between it and the wanted values. Each
//! node's operator states its own rule; this file only decides where to go and adds up what arrives at a value. As the
//! result is a graph of ordinary nodes, it can be differentiated again wherever its operators have rules.

use std::collections::HashSet;

use updraft_graph::op::{self, Gradient, OpError, Rule, show_shape};
use updraft_graph::tensor::element_count;
use updraft_graph::{Graph, NodeId, Tensor, ValueId};

use crate::PassError;

/// Adds nodes that compute the gradient of the sum of `of` with respect to each wanted value; `None` where `of` does
/// not depend on it.
///
/// Contributions to one value are added in the reverse order of the nodes that read it, so the same graph always gives
/// the same sums. Values of integer and boolean type carry no gradient; an operator without a rule on the way is an
/// error.
pub fn differentiate(graph: &mut Graph, of: ValueId, wanted: &[ValueId]) -> Result<Vec<Option<ValueId>>, PassError> {
    let order = graph.order()?;
    let active = active_values(graph, &order, wanted);
    let mut arrived: Vec<Vec<ValueId>> = vec![Vec::new(); graph.value_count()];
    if active.contains(&of) {
        arrived[of.index()].push(ones_like(graph, of)?);
    }
    for id in order.into_iter().rev() {
        let node = graph.node(id).clone();
        let wanted: Vec<bool> = node.inputs.iter().map(|v| v.is_some_and(|v| active.contains(&v))).collect();
        let reached = node.outputs.iter().flatten().any(|v| !arrived[v.index()].is_empty());
        if !reached || !reads_active(graph, id, &active) {
            continue;
        }
        let mut grads = Vec::new();
        for output in &node.outputs {
            grads.push(match output {
                Some(v) => total(graph, &mut arrived[v.index()])?,
                None => None,
            });
        }
        let operator = op::of_node(graph, &node).map_err(|e| PassError::node(graph, id, e))?;
        let rule = match operator.gradient {
            Rule::Is(rule) => rule,
            Rule::None(reason) => {
                return Err(PassError::NoGradient { node: node.label(graph), reason: reason.to_owned() });
            }
        };
        let asked = wanted.clone();
        let found = rule(&mut Gradient { graph: &mut *graph, id, node: node.clone(), grads, wanted })
            .map_err(|e| PassError::node(graph, id, e))?;
        for ((input, asked), gradient) in node.inputs.iter().zip(asked).zip(found) {
            if let (Some(input), true, Some(gradient)) = (input, asked, gradient) {
                check_shape(graph, id, *input, gradient)?;
                arrived[input.index()].push(gradient);
            }
        }
    }
    wanted.iter().map(|v| total(graph, &mut arrived[v.index()])).collect()
}

/// The wanted values and all that is computed from them in floating point.
fn active_values(graph: &Graph, order: &[NodeId], wanted: &[ValueId]) -> HashSet<ValueId> {
    let mut active: HashSet<ValueId> = wanted.iter().copied().collect();
    for id in order {
        if reads_active(graph, *id, &active) {
            let outputs = graph.node(*id).outputs.iter().flatten();
            active.extend(outputs.filter(|v| graph.dtype(**v).is_none_or(|d| d.is_float())));
        }
    }
    active
}

fn reads_active(graph: &Graph, id: NodeId, active: &HashSet<ValueId>) -> bool {
    let node = graph.node(id);
    let mut read: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
    graph.collect_captures(node, &mut read);
    read.iter().any(|v| active.contains(v))
}

/// The sum of what arrived at a value, which takes its place there.
fn total(graph: &mut Graph, arrived: &mut Vec<ValueId>) -> Result<Option<ValueId>, PassError> {
    let Some((first, rest)) = arrived.split_first() else { return Ok(None) };
    let mut sum = *first;
    for next in rest {
        sum = graph.op("Add", &[sum, *next], [])?;
    }
    *arrived = vec![sum];
    Ok(Some(sum))
}

fn ones_like(graph: &mut Graph, value: ValueId) -> Result<ValueId, PassError> {
    let dtype = graph.dtype(value).ok_or_else(|| PassError::value(graph, value, "has no known element type"))?;
    let one = |shape: &[usize]| {
        let count = element_count(shape).unwrap_or(0);
        Tensor::from_f64(dtype, shape, &vec![1.0; count]).map_err(OpError::from)
    };
    // Beyond this many elements a node that makes them is smaller than the constant.
    const ELEMENTS_MAX: usize = 1024;
    match graph.known_shape(value) {
        Some(shape) if element_count(&shape).is_some_and(|n| n <= ELEMENTS_MAX) => {
            Ok(graph.add_constant("ones", one(&shape)?))
        }
        _ => {
            let shape = graph.op("Shape", &[value], [])?;
            Ok(graph.op("ConstantOfShape", &[shape], [("value", one(&[1])?.into())])?)
        }
    }
}

/// A rule that gets a shape wrong is found here, where its node is known.
fn check_shape(graph: &Graph, id: NodeId, input: ValueId, gradient: ValueId) -> Result<(), PassError> {
    let (Some(a), Some(b)) = (graph.shape(input), graph.shape(gradient)) else { return Ok(()) };
    if a.len() == b.len() && a.iter().zip(b).all(|(a, b)| !a.differs(b)) {
        return Ok(());
    }
    let name = &graph.value(input).name;
    let problem = format!("the gradient of {name:?} of shape {} has shape {}", show_shape(a), show_shape(b));
    Err(PassError::node(graph, id, OpError::shape(problem)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use updraft_graph::eval::evaluate;
    use updraft_graph::{DType, ValueType};

    use super::*;

    fn scalar_graph() -> (Graph, ValueId) {
        let mut graph = Graph::new("f");
        let x = graph.add_input("x", ValueType::tensor(DType::F64, Vec::new())).unwrap();
        (graph, x)
    }

    fn at(graph: &mut Graph, value: ValueId, x: f64) -> f64 {
        graph.set_outputs(vec![value]);
        let inputs = HashMap::from([("x".to_owned(), Tensor::scalar(x))]);
        evaluate(graph, &inputs).unwrap()[0].to_f64().unwrap()[0]
    }

    #[test]
    fn a_value_read_many_times_gets_the_sum_of_its_gradients() {
        let (mut graph, x) = scalar_graph();
        let square = graph.op("Mul", &[x, x], []).unwrap();
        let cube = graph.op("Mul", &[square, x], []).unwrap();
        let both = graph.op("Add", &[cube, square], []).unwrap();
        let slope = differentiate(&mut graph, both, &[x]).unwrap()[0].unwrap();
        assert_eq!(at(&mut graph, slope, 3.0), 27.0 + 6.0);
    }

    #[test]
    fn a_gradient_can_be_differentiated_again() {
        let (mut graph, x) = scalar_graph();
        let square = graph.op("Mul", &[x, x], []).unwrap();
        let mut value = graph.op("Mul", &[square, square], []).unwrap();
        for expected in [4.0 * 8.0, 12.0 * 4.0, 24.0 * 2.0, 24.0] {
            value = differentiate(&mut graph, value, &[x]).unwrap()[0].unwrap();
            assert_eq!(at(&mut graph, value, 2.0), expected);
        }
    }

    #[test]
    fn what_the_value_does_not_depend_on_has_no_gradient() {
        let (mut graph, x) = scalar_graph();
        let y = graph.add_input("y", ValueType::tensor(DType::F64, Vec::new())).unwrap();
        let square = graph.op("Mul", &[x, x], []).unwrap();
        assert_eq!(differentiate(&mut graph, square, &[y]).unwrap(), [None]);
        assert_eq!(differentiate(&mut graph, x, &[x]).unwrap().len(), 1);
    }

    #[test]
    fn a_missing_rule_is_an_error_that_names_the_node() {
        let mut graph = Graph::new("f");
        let p = graph.add_input("p", ValueType::tensor(DType::F32, vec![2.into()])).unwrap();
        let norm = graph.own_op("GlobalNorm", &[p], []).unwrap();
        let error = differentiate(&mut graph, norm, &[p]).unwrap_err();
        assert!(error.to_string().contains("GlobalNorm"), "{error}");
    }
}
