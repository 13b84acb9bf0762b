//! Every pass keeps its promise on random networks, judged by the reference evaluator.

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed, TestRunner};
use updraft_graph::eval::evaluate;
use updraft_graph::{DType, Graph, Tensor, ValueType};
use updraft_passes::pipeline::{INFERENCE, Pipeline, inference};
use updraft_passes::{Promise, Report};

use crate::grow::{Grown, Pieces, grow};

/// Networks of up to 24 pieces, always the same ones.
pub fn on_random_graphs(cases: u32, check: impl Fn(&Grown) -> Result<(), TestCaseError>) {
    let config = ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(0),
        rng_algorithm: RngAlgorithm::ChaCha,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let choices = proptest::collection::vec(any::<u32>(), 1..24);
    let run = |choices: Vec<u32>| check(&grow(DType::F32, Pieces::All, &choices));
    if let Err(error) = TestRunner::new(config).run(&choices, run) {
        panic!("{error}");
    }
}

pub fn names(graph: &Graph) -> Vec<String> {
    graph.outputs().iter().map(|v| graph.value(*v).name.clone()).collect()
}

/// The largest difference of one output, over its largest magnitude.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_f64().unwrap(), b.to_f64().unwrap());
    let magnitude = a.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    a.iter().zip(&b).fold(0f64, |d, (a, b)| d.max((a - b).abs())) / magnitude
}

#[test]
fn every_pass_keeps_its_promise_on_random_networks() {
    for pass in INFERENCE {
        on_random_graphs(150, |grown| {
            let before = evaluate(&grown.graph, &grown.inputs).unwrap();
            let mut graph = grown.graph.clone();
            Pipeline::new(&mut graph).run(*pass).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(names(&graph), names(&grown.graph));
            let after = evaluate(&graph, &grown.inputs).map_err(|e| TestCaseError::fail(e.to_string()))?;
            for (a, b) in before.iter().zip(&after) {
                match pass.promise {
                    Promise::Exact => prop_assert_eq!(a, b, "{}", pass.name),
                    Promise::Within(tolerance) => {
                        prop_assert_eq!(a.shape(), b.shape());
                        let distance = distance(a, b);
                        prop_assert!(distance <= tolerance, "{}: {} apart", pass.name, distance);
                    }
                    Promise::Lossy => unreachable!("no pass for inference is lossy"),
                }
            }
            Ok(())
        });
    }
}

#[test]
fn the_whole_pipeline_changes_answers_by_rounding_only_and_adds_no_nodes() {
    let tolerance = 1e-4;
    on_random_graphs(300, |grown| {
        let before = evaluate(&grown.graph, &grown.inputs).unwrap();
        let mut graph = grown.graph.clone();
        inference(&mut graph).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(graph.nodes().count() <= grown.graph.nodes().count());
        let after = evaluate(&graph, &grown.inputs).map_err(|e| TestCaseError::fail(e.to_string()))?;
        for (a, b) in before.iter().zip(&after) {
            let distance = distance(a, b);
            prop_assert!(distance <= tolerance, "{} apart", distance);
        }
        Ok(())
    });
}

fn reports(graph: &mut Graph) -> Vec<Report> {
    inference(graph).unwrap()
}

fn ops(graph: &Graph) -> Vec<&str> {
    graph.nodes().map(|(_, n)| n.op.as_str()).collect()
}

fn input(graph: &mut Graph, shape: &[usize]) -> updraft_graph::ValueId {
    graph.add_input("x", ValueType::tensor(DType::F32, updraft_graph::dim::dims(shape))).unwrap()
}

#[test]
fn convolution_bias_and_batch_norm_become_one_convolution() {
    let mut graph = Graph::new("layer");
    let x = input(&mut graph, &[1, 2, 4, 4]);
    let constant = |graph: &mut Graph, shape: &[usize]| {
        let n = shape.iter().product::<usize>();
        graph.add_constant("c", Tensor::new(shape, &vec![0.5f32; n]).unwrap())
    };
    let w = constant(&mut graph, &[3, 2, 1, 1]);
    let y = graph.op("Conv", &[x, w], []).unwrap();
    let b = constant(&mut graph, &[3, 1, 1]);
    let y = graph.op("Add", &[y, b], []).unwrap();
    let statistics: Vec<_> = (0..4).map(|_| constant(&mut graph, &[3])).collect();
    let y = graph.op("BatchNormalization", &[&[y], &statistics[..]].concat(), []).unwrap();
    let y = graph.op("Identity", &[y], []).unwrap();
    graph.push_output(y);
    reports(&mut graph);
    assert_eq!(ops(&graph), ["Conv"]);
}

#[test]
fn a_network_that_gives_back_its_input_keeps_the_node_that_joins_the_names() {
    let mut graph = Graph::new("nothing");
    let x = input(&mut graph, &[2]);
    let y = graph.op("Identity", &[x], []).unwrap();
    let y = graph.op("Identity", &[y], []).unwrap();
    graph.push_output(y);
    let reports = reports(&mut graph);
    assert_eq!(ops(&graph), ["Identity"]);
    assert!(reports.iter().any(|r| r.refusals.iter().any(|r| r.reason.contains("names"))));
}

#[test]
fn a_default_that_an_input_may_override_is_not_folded() {
    let mut graph = Graph::new("default");
    let x = input(&mut graph, &[2]);
    graph.set_constant(x, Some(Tensor::vector(&[1f32, 1.0])));
    let y = graph.op("Neg", &[x], []).unwrap();
    let y = graph.op("Mul", &[y, x], []).unwrap();
    graph.push_output(y);
    reports(&mut graph);
    assert_eq!(ops(&graph), ["Neg", "Mul"]);
}

#[test]
fn what_is_too_large_to_fold_is_refused_by_name() {
    let mut graph = Graph::new("large");
    let shape = graph.add_constant("shape", Tensor::vector(&[1i64 << 20, 1 << 10]));
    let zeros = graph.op("ConstantOfShape", &[shape], []).unwrap();
    let x = input(&mut graph, &[1]);
    let y = graph.op("Add", &[zeros, x], []).unwrap();
    graph.push_output(y);
    let reports = reports(&mut graph);
    assert_eq!(ops(&graph), ["ConstantOfShape", "Add"]);
    assert!(reports.iter().any(|r| r.refusals.iter().any(|r| r.reason.contains("more than"))), "{reports:?}");
}
