//! Quantized graphs there and back again, and steps that learn.

use std::collections::{BTreeMap, HashMap};

use updraft_base::random::Key;
use updraft_graph::eval::evaluate;
use updraft_graph::infer::infer;
use updraft_graph::zoo::{self, Options, Setting};

use super::*;
use crate::Promise;
use crate::loss::{CrossEntropy, Loss};
use crate::optimizer::Optimizer;
use crate::quantize::{Range, Scheme, insert, observed, prepare};
use crate::training::{StateRole, TrainingOptions, build};

fn report() -> Report {
    Report::new("test", Promise::Lossy)
}

fn draw(shape: &[usize], label: &str) -> Tensor {
    let (key, count) = (Key::new(2).child(label), shape.iter().product::<usize>() as u64);
    Tensor::new(shape, &(0..count).map(|i| key.normal_f32(i)).collect::<Vec<_>>()).unwrap()
}

/// A network of the zoo with settled statistics, prepared; and a batch for it.
fn prepared(name: &str, settings: &[(&str, usize)], sample: &[usize]) -> (Graph, HashMap<String, Tensor>) {
    let entry = zoo::find(name).unwrap();
    let settings: Vec<_> = settings.iter().map(|(n, v)| ((*n).to_owned(), Setting::Integer(*v))).collect();
    let mut graph = entry.build(&Options::of(entry, &settings).unwrap(), 3).unwrap();
    prepare(&mut graph).unwrap();
    let input = graph.value(graph.inputs()[0]).name.clone();
    let shape: Vec<usize> = std::iter::once(3).chain(sample.iter().copied()).collect();
    (graph, HashMap::from([(input, draw(&shape, "x"))]))
}

/// The same network quantized by the ranges of the batch.
fn quantize(float: &Graph, batch: &HashMap<String, Tensor>, scheme: &Scheme) -> Graph {
    let names = observed(float, scheme).unwrap();
    let mut watched = float.clone();
    watched.set_outputs(names.iter().map(|n| watched.find(n).unwrap()).collect());
    let values = evaluate(&watched, batch).unwrap();
    let ranges: BTreeMap<String, Range> =
        names.into_iter().zip(&values).map(|(n, t)| (n, Range::of_tensor(t).unwrap())).collect();
    let mut graph = float.clone();
    insert(&mut graph, scheme, &ranges, &BTreeMap::new(), &mut report()).unwrap();
    infer(&mut graph).unwrap();
    graph
}

fn networks() -> Vec<(Graph, HashMap<String, Tensor>)> {
    let vit = [("image", 16), ("patch", 8), ("layers", 1), ("width", 16), ("heads", 2)];
    vec![
        prepared("mlp", &[("inputs", 12)], &[12]),
        prepared("resnet8", &[("image", 8)], &[3, 8, 8]),
        prepared("mobilenet-v2", &[("image", 32), ("classes", 4)], &[3, 32, 32]),
        prepared("vit", &vit, &[3, 16, 16]),
    ]
}

#[test]
fn the_trainable_form_computes_what_the_quantized_graph_does_and_turns_back_into_it() {
    for (float, batch) in networks() {
        for scheme in [Scheme::default(), Scheme { per_channel: false, reduce_range: true, ..Scheme::default() }] {
            let pairs = quantize(&float, &batch, &scheme);
            let expected = evaluate(&pairs, &batch).unwrap();
            // Codes times their scale are codes again, and biases are what theirs stand for.
            let mut aware = pairs.clone();
            trainable(&mut aware, None, None, &mut report()).unwrap();
            infer(&mut aware).unwrap();
            assert!(aware.nodes().all(|(_, n)| !n.op.ends_with("quantizeLinear")), "{}", float.name);
            assert_eq!(evaluate(&aware, &batch).unwrap(), expected, "{}", float.name);

            let levels = scheme.weight_levels().unwrap();
            let mut aware = pairs.clone();
            trainable(&mut aware, Some(&float), Some(levels), &mut report()).unwrap();
            infer(&mut aware).unwrap();
            quantized(&mut aware, &mut report()).unwrap();
            infer(&mut aware).unwrap();
            assert_eq!(evaluate(&aware, &batch).unwrap(), expected, "{}", float.name);
            let count = |graph: &Graph| {
                let mut counts: BTreeMap<String, usize> = BTreeMap::new();
                graph.nodes().for_each(|(_, n)| *counts.entry(n.op.clone()).or_default() += 1);
                counts
            };
            assert_eq!(count(&aware), count(&pairs), "{}", float.name);
        }
    }
}

#[test]
fn weights_biases_and_scales_are_trained_and_the_trained_form_is_what_is_written() {
    for (float, batch) in networks() {
        let mut aware = quantize(&float, &batch, &Scheme::default());
        trainable(&mut aware, Some(&float), None, &mut report()).unwrap();
        infer(&mut aware).unwrap();
        let sgd = Optimizer::Sgd { momentum: 0.0, nesterov: false };
        let step = build(&aware, &TrainingOptions::new(Loss::CrossEntropy(CrossEntropy::default()), sgd)).unwrap();
        let initial: HashMap<String, Tensor> =
            step.state.iter().map(|s| (s.input.clone(), s.initial.clone())).collect();
        assert!(step.state.iter().all(|s| s.role == StateRole::Parameter));
        for (value, tensor) in aware.constants() {
            let name = &aware.value(value).name;
            let is_trained = tensor.dtype().is_float() && tensor.rank() > 0 && !name.contains(UNIT);
            assert_eq!(initial.contains_key(name), is_trained, "{}: {name}", float.name);
        }

        let mut inputs = batch.clone();
        inputs.extend(initial.clone());
        inputs.insert("labels".into(), Tensor::vector(&[1i64, 0, 3]));
        inputs.insert("learning_rate".into(), Tensor::scalar(0.05f32));
        inputs.extend(["step", "seed"].map(|name| (name.to_owned(), Tensor::scalar(0i64))));
        let made = evaluate(&step.graph, &inputs).unwrap();
        let names = step.graph.outputs().iter().map(|v| step.graph.value(*v).name.clone());
        let made: HashMap<String, Tensor> = names.zip(made).collect();
        let state = step.state.iter().map(|s| (s.input.clone(), made[&s.output].clone()));
        let trained = crate::training::export(&aware, state).unwrap();
        let moved = step.state.iter().filter(|s| s.input.contains("_step") && made[&s.output] != s.initial).count();
        assert!(moved > 0, "{}", float.name);

        let expected = evaluate(&trained, &batch).unwrap();
        let mut written = trained.clone();
        quantized(&mut written, &mut report()).unwrap();
        infer(&mut written).unwrap();
        let found = evaluate(&written, &batch).unwrap();
        // Biases are rounded to steps of scale times scale, some 1e-4 of a step of the values; that moves a value that
        // lies so near the middle between two codes, and each such step moves outputs by no more than a few percent.
        let (a, b) = (found[0].to_f64().unwrap(), expected[0].to_f64().unwrap());
        let largest = b.iter().fold(0f64, |m, v| m.max(v.abs()));
        let worst = a.iter().zip(&b).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst <= 0.05 * largest, "{}: {worst} of {largest}", float.name);
    }
}

#[test]
fn a_graph_without_pairs_is_refused() {
    let (mut float, _) = prepared("mlp", &[("inputs", 12)], &[12]);
    let error = trainable(&mut float, None, None, &mut report()).unwrap_err();
    assert!(error.to_string().contains("no quantized values"), "{error}");
}
