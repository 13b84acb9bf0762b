//! Random networks on integers: what pairs are put around means what it meant, to within the steps of the codes.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;
use updraft_graph::check::check;
use updraft_graph::eval::evaluate;
use updraft_graph::infer::infer;
use updraft_graph::{DType, Graph, NodeId, Tensor, ValueId};
use updraft_passes::pipeline::Pipeline;
use updraft_passes::quantize::{
    EQUALIZE, Half, Range, Scheme, WeightOnly, WeightScale, dynamic, half, insert, observed, prepare, units,
    weight_only,
};
use updraft_passes::{PassError, Promise, Report};

use crate::rewrites::{distance, names, on_random_graphs};

/// The range of each value in one run.
fn ranges(graph: &Graph, wanted: &[String], inputs: &HashMap<String, Tensor>) -> BTreeMap<String, Range> {
    let mut looked = graph.clone();
    let values = wanted.iter().map(|name| looked.find(name).unwrap()).collect();
    looked.set_outputs(values);
    let seen = evaluate(&looked, inputs).unwrap();
    wanted.iter().cloned().zip(seen.iter().map(|t| Range::of_tensor(t).unwrap())).collect()
}

fn quantized(graph: &Graph, scheme: &Scheme, inputs: &HashMap<String, Tensor>) -> Graph {
    let mut made = graph.clone();
    let ranges = ranges(graph, &observed(graph, scheme).unwrap(), inputs);
    let mut report = Report::new("insert", Promise::Lossy);
    insert(&mut made, scheme, &ranges, &BTreeMap::new(), &mut report).unwrap();
    infer(&mut made).unwrap();
    check(&made).unwrap();
    made
}

fn producer(graph: &Graph, v: ValueId) -> Option<NodeId> {
    graph.value(v).producer().map(|(id, _)| id)
}

/// The scale of the pair that gives `v`.
fn scale(graph: &Graph, v: ValueId) -> Option<ValueId> {
    let node = graph.node(producer(graph, v)?);
    (node.op == "DequantizeLinear").then(|| node.inputs[1].unwrap())
}

#[test]
fn layers_of_random_networks_read_integers_and_moves_keep_scales() {
    on_random_graphs(300, |grown| {
        let mut graph = grown.graph.clone();
        prepare(&mut graph).unwrap();
        let layers: Vec<String> = units(&graph).unwrap().into_iter().map(|u| u.node).collect();
        let made = quantized(&graph, &Scheme::default(), &grown.inputs);
        prop_assert_eq!(names(&made), names(&graph));
        for (_, node) in made.nodes() {
            if layers.contains(&node.label(&made)) {
                let operands = if node.op == "Conv" { 2 } else { node.inputs.len().min(2) };
                for v in node.inputs.iter().flatten().take(operands) {
                    prop_assert!(scale(&made, *v).is_some(), "{} reads floats", node.label(&made));
                }
            }
            if ["Reshape", "Transpose", "Concat", "MaxPool", "Slice"].contains(&node.op.as_str())
                && let Some(before) = scale(&made, node.inputs[0].unwrap())
            {
                for reader in made.value(node.outputs[0].unwrap()).consumers() {
                    let reader = made.node(*reader);
                    if reader.op == "QuantizeLinear" {
                        prop_assert_eq!(reader.inputs[1].unwrap(), before, "{} rescales", node.label(&made));
                    }
                }
            }
        }
        Ok(())
    });
}

#[test]
fn random_networks_mean_the_same_on_integers_but_for_the_steps_of_the_codes() {
    // Codes of values have 16 bits and hardly count. A weight is off by at most half of 1/127 of the largest of its
    // channel, on average by a quarter; sums of many are off by less, and the networks have up to about ten layers.
    let scheme = Scheme { activations: DType::U16, ..Scheme::default() };
    on_random_graphs(300, |grown| {
        let mut graph = grown.graph.clone();
        prepare(&mut graph).unwrap();
        let before = evaluate(&graph, &grown.inputs).unwrap();
        let after = evaluate(&quantized(&graph, &scheme, &grown.inputs), &grown.inputs).unwrap();
        for (a, b) in before.iter().zip(&after) {
            prop_assert!(distance(a, b) <= 0.02, "{} apart", distance(a, b));
        }
        Ok(())
    });
}

#[test]
fn equalization_leaves_random_networks_what_they_were() {
    on_random_graphs(300, |grown| {
        let mut graph = grown.graph.clone();
        prepare(&mut graph).unwrap();
        let before = evaluate(&graph, &grown.inputs).unwrap();
        Pipeline::new(&mut graph).run(EQUALIZE).map_err(|e| TestCaseError::fail(e.to_string()))?;
        for (a, b) in before.iter().zip(&evaluate(&graph, &grown.inputs).unwrap()) {
            prop_assert!(distance(a, b) <= 1e-4, "{} apart", distance(a, b));
        }
        Ok(())
    });
}

/// Random networks after a rewrite have the same inputs, outputs and types, and answers within a tolerance.
fn comes_close(rewrite: impl Fn(&mut Graph, &mut Report) -> Result<(), PassError>, tolerance: f64) {
    on_random_graphs(200, |grown| {
        let mut graph = grown.graph.clone();
        prepare(&mut graph).unwrap();
        let before = evaluate(&graph, &grown.inputs).unwrap();
        let form = |g: &Graph| {
            let all = g.inputs().iter().chain(g.outputs());
            all.map(|v| (g.value(*v).name.clone(), g.dtype(*v))).collect::<Vec<_>>()
        };
        let expected = form(&graph);
        rewrite(&mut graph, &mut Report::new("rewrite", Promise::Lossy)).unwrap();
        infer(&mut graph).map_err(|e| TestCaseError::fail(e.to_string()))?;
        check(&graph).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert_eq!(form(&graph), expected);
        for (a, b) in before.iter().zip(&evaluate(&graph, &grown.inputs).unwrap()) {
            prop_assert!(distance(a, b) <= tolerance, "{} apart", distance(a, b));
        }
        Ok(())
    });
}

#[test]
fn random_networks_come_close_with_values_quantized_as_they_come() {
    // Half a step of 255 for values, a quarter percent for weights, a few layers.
    comes_close(|graph, report| dynamic(graph, &Scheme::default(), report).map(drop), 0.03);
}

#[test]
fn random_networks_come_close_with_weights_as_codes() {
    for (bits, tolerance) in [(8, 0.02), (4, 0.3)] {
        let options = WeightOnly { bits, block: 4, weight_scale: WeightScale::MaxAbs, exclude: Default::default() };
        comes_close(|graph, report| weight_only(graph, &options, &BTreeMap::new(), report).map(drop), tolerance);
    }
}

#[test]
fn random_networks_come_close_in_half_precision() {
    // Eleven bits of precision, or eight, and sums of about a hundred products.
    for (dtype, tolerance) in [(DType::F16, 0.01), (DType::BF16, 0.1)] {
        let options = Half { dtype, exclude: Default::default() };
        comes_close(|graph, report| half(graph, &options, &BTreeMap::new(), report).map(drop), tolerance);
    }
}
