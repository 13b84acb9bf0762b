//! One gradient rule against differences of its operator's values.

use std::collections::{BTreeSet, HashMap};

use updraft_graph::eval::evaluate;
use updraft_graph::op::{Gradient, find};
use updraft_graph::{DType, Graph, Node, Tensor, ValueId, ValueType};

use crate::samples::{Draw, Row, Sample};

/// The step of the differences. Two central differences, at one and two steps, are combined so that the error is of
/// fourth order: `h^4` times a fifth derivative, beside rounding of about `1e-16 / h`.
const STEP: f64 = 1e-3;

/// Both errors are below this for functions whose fifth derivative along a direction is below a million; the operators'
/// samples stay away from kinks and poles.
const TOLERANCE: f64 = 1e-6;

/// Builds the gradient of `Σ dy * y` by the rule alone and compares its product with a random direction with the slope
/// along that direction, for each input that can be moved. Gives the operators that this ran.
pub fn check(row: &Row, seed: u64) -> Result<BTreeSet<String>, String> {
    let mut draw = Draw::new(seed);
    let sample = row.sample(&mut draw);
    let operator = find(row.domain(), row.name()).ok_or("there is no such operator")?;
    let rule = operator.gradient.get().ok_or("there is no gradient rule")?;
    let mut graph = Graph::new("forward");
    // Some operators appeared after the operator set that passes write.
    let opset = operator.versions[0].max(graph.opsets[row.domain()]);
    graph.opsets.insert(row.domain().to_owned(), opset);
    let mut inputs = HashMap::new();
    let mut operands = Vec::new();
    for (i, operand) in sample.inputs.iter().enumerate() {
        operands.push(match operand {
            Some(tensor) if sample.moves(i) => {
                let name = format!("x{i}");
                inputs.insert(name.clone(), tensor.clone());
                Some(graph.add_input(&name, ValueType::of(tensor)).map_err(|e| e.to_string())?)
            }
            Some(tensor) => Some(graph.add_constant("c", tensor.clone())),
            None => None,
        });
    }
    let outputs = graph
        .op_n(row.domain(), row.name(), &operands, sample.attributes.clone(), sample.outputs)
        .map_err(|e| e.to_string())?;
    graph.set_outputs(outputs.clone());
    let made = evaluate(&graph, &inputs).map_err(|e| e.to_string())?;
    let weights: Vec<Option<Tensor>> = made
        .iter()
        .enumerate()
        .map(|(i, y)| (y.dtype() == DType::F64 && sample.counts(i)).then(|| draw.normal(y.shape())))
        .collect();

    let found = gradients(&mut graph, rule, &outputs, &weights, &sample)?;
    for i in (0..sample.inputs.len()).filter(|i| sample.moves(*i)) {
        let gradient = found.get(i).copied().flatten();
        let name = format!("x{i}");
        let start = &inputs[&name];
        let direction = draw.normal(start.shape());
        let expected = match gradient {
            Some(gradient) => {
                graph.set_outputs(vec![gradient]);
                let gradient = evaluate(&graph, &inputs).map_err(|e| e.to_string())?.remove(0);
                if gradient.shape() != start.shape() {
                    return Err(format!("input {i} is {start:?}, its gradient {gradient:?}"));
                }
                dot(&gradient, &direction)
            }
            None => 0.0,
        };
        graph.set_outputs(outputs.clone());
        let value_at = |t: f64| -> Result<f64, String> {
            let mut moved = inputs.clone();
            moved.insert(name.clone(), shifted(start, &direction, t));
            let made = evaluate(&graph, &moved).map_err(|e| e.to_string())?;
            Ok(made.iter().zip(&weights).map(|(y, dy)| dy.as_ref().map_or(0.0, |dy| dot(y, dy))).sum())
        };
        let central = |h: f64| Ok::<_, String>((value_at(h)? - value_at(-h)?) / (2.0 * h));
        let slope = (4.0 * central(STEP)? - central(2.0 * STEP)?) / 3.0;
        if (slope - expected).abs() > TOLERANCE * (1.0 + slope.abs()) || expected.is_nan() {
            let shapes: Vec<_> = sample.inputs.iter().flatten().map(Tensor::shape).collect();
            return Err(format!("input {i} of {shapes:?}: slope {slope}, by the rule {expected}"));
        }
    }
    Ok(graph.nodes().map(|(_, node)| node.op.clone()).collect())
}

/// The rule's values for weights `dy` as the gradients of the outputs.
fn gradients(
    graph: &mut Graph,
    rule: updraft_graph::op::GradientRule,
    outputs: &[ValueId],
    weights: &[Option<Tensor>],
    sample: &Sample,
) -> Result<Vec<Option<ValueId>>, String> {
    let (id, _) = graph.value(outputs[0]).producer().ok_or("the operator made nothing")?;
    let node: Node = graph.node(id).clone();
    let grads = weights.iter().map(|dy| dy.as_ref().map(|dy| graph.add_constant("dy", dy.clone()))).collect();
    let wanted = (0..sample.inputs.len()).map(|i| sample.moves(i)).collect();
    rule(&mut Gradient { graph, id, node, grads, wanted }).map_err(|e| e.to_string())
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    a.to_f64().unwrap().iter().zip(b.to_f64().unwrap()).map(|(x, y)| x * y).sum()
}

fn shifted(start: &Tensor, direction: &Tensor, t: f64) -> Tensor {
    let moved: Vec<f64> =
        start.to_f64().unwrap().iter().zip(direction.to_f64().unwrap()).map(|(x, d)| x + t * d).collect();
    Tensor::new(start.shape(), &moved).unwrap()
}
