//! Gradients of random networks against differences of their values.

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed, TestRunner};
use updraft_base::random::Key;
use updraft_graph::eval::evaluate;
use updraft_graph::{DType, Graph, Tensor, ValueId};
use updraft_passes::gradient::differentiate;

use crate::grow::{Grown, Pieces, grow, numbers};

/// Adds the sum of a fixed weighting of every output, a scalar that depends on all of them.
fn weighted_sum(graph: &mut Graph) -> ValueId {
    let mut total = None;
    for output in graph.outputs().to_vec() {
        let square = graph.op("Mul", &[output, output], []).unwrap();
        let sum = graph.op("Add", &[square, output], []).unwrap();
        let sum = graph.op("ReduceSum", &[sum], [("keepdims", 0i64.into())]).unwrap();
        total = Some(match total {
            None => sum,
            Some(other) => graph.op("Add", &[sum, other], []).unwrap(),
        });
    }
    total.unwrap()
}

/// The slope of the weighted sum along one random direction through all inputs and weights, two ways.
fn check(grown: &Grown) -> Result<(), TestCaseError> {
    let mut graph = grown.graph.clone();
    let sum = weighted_sum(&mut graph);
    let inputs = graph.inputs().to_vec();
    let weights: Vec<ValueId> = graph.constants().filter(|(_, t)| t.dtype() == DType::F64).map(|(v, _)| v).collect();
    let wanted = [inputs, weights].concat();
    let gradients = differentiate(&mut graph, sum, &wanted).map_err(|e| TestCaseError::fail(e.to_string()))?;

    let at = |graph: &Graph, v: ValueId| match graph.value(v).constant() {
        Some(tensor) => tensor.clone(),
        None => grown.inputs[&graph.value(v).name].clone(),
    };
    let mut expected = 0.0;
    let mut moves = Vec::new();
    for (value, gradient) in wanted.iter().zip(&gradients) {
        let Some(gradient) = gradient else { continue };
        let start = at(&graph, *value);
        let direction = numbers(Key::new(9).child_index(value.index() as u64), DType::F64, start.shape());
        graph.set_outputs(vec![*gradient]);
        let gradient = evaluate(&graph, &grown.inputs).map_err(|e| TestCaseError::fail(e.to_string()))?.remove(0);
        prop_assert_eq!(gradient.shape(), start.shape());
        let (g, d) = (gradient.to_f64().unwrap(), direction.to_f64().unwrap());
        expected += g.iter().zip(&d).map(|(g, d)| g * d).sum::<f64>();
        moves.push((*value, start.to_f64().unwrap(), d, start.shape().to_vec()));
    }
    graph.set_outputs(vec![sum]);
    let value_at = |t: f64| {
        let (mut graph, mut inputs) = (graph.clone(), grown.inputs.clone());
        for (value, start, direction, shape) in &moves {
            let moved: Vec<f64> = start.iter().zip(direction).map(|(x, d)| x + t * d).collect();
            let moved = Tensor::new(shape, &moved).unwrap();
            match graph.value(*value).constant() {
                Some(_) => graph.set_constant(*value, Some(moved)),
                None => drop(inputs.insert(graph.value(*value).name.clone(), moved)),
            }
        }
        evaluate(&graph, &inputs).unwrap()[0].to_f64().unwrap()[0]
    };
    // Central differences err by h^2 times a third derivative and by rounding over h. Both grow with the value's own
    // size and with the degree of the network, so the difference must shrink like h^2 or be small against the value.
    let h = 1e-5;
    let (slope, coarse) =
        ((value_at(h) - value_at(-h)) / (2.0 * h), (value_at(2.0 * h) - value_at(-2.0 * h)) / (4.0 * h));
    let truncation = (slope - coarse).abs();
    let scale = 1.0 + expected.abs() + value_at(0.0).abs();
    prop_assert!(
        (slope - expected).abs() <= truncation + 1e-8 * scale,
        "slope {} but gradient {} (truncation {})",
        slope,
        expected,
        truncation
    );
    Ok(())
}

#[test]
fn gradients_of_random_networks_are_their_slopes() {
    let config = ProptestConfig {
        cases: 200,
        rng_seed: RngSeed::Fixed(0),
        rng_algorithm: RngAlgorithm::ChaCha,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let choices = proptest::collection::vec(any::<u32>(), 1..12);
    let run = |choices: Vec<u32>| check(&grow(DType::F64, Pieces::Differentiable, &choices));
    if let Err(error) = TestRunner::new(config).run(&choices, run) {
        panic!("{error}");
    }
}
