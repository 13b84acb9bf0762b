//! Whole training steps give the same state on the engine as by the reference evaluation, and the same bits on any
//! number of threads.

use std::collections::HashMap;

use updraft_base::random::Key;
use updraft_engine::{CompileOptions, CpuEngine, Engine, EngineError};
use updraft_graph::zoo::{self, Setting};
use updraft_graph::{DType, Graph, Tensor};
use updraft_passes::loss::{CrossEntropy, Loss};
use updraft_passes::optimizer::{AdamSettings, Optimizer, WeightDecay};
use updraft_passes::training::{self, TrainingOptions, TrainingStep};

/// Inputs of a run by name.
type Given = Vec<(String, Tensor)>;

fn gpt(dropout: f64) -> Graph {
    let entry = zoo::find("gpt").unwrap();
    let sizes = [("vocabulary", 19), ("context", 12), ("layers", 2), ("heads", 2), ("width", 24)];
    let mut settings: Vec<_> = sizes.map(|(name, v)| (name.to_owned(), Setting::Integer(v))).to_vec();
    settings.push(("dropout".to_owned(), Setting::Float(dropout)));
    entry.build(&zoo::Options::of(entry, &settings).unwrap(), 7).unwrap()
}

fn step(model: &Graph, optimizer: Optimizer) -> TrainingStep {
    let loss = Loss::CrossEntropy(CrossEntropy { label_smoothing: 0.1, ..CrossEntropy::default() });
    let mut options = TrainingOptions::new(loss, optimizer);
    options.weight_decay = WeightDecay { amount: 0.1, ..WeightDecay::default() };
    options.clip_norm = Some(0.5);
    training::build(model, &options).unwrap()
}

/// The batch and the scalars of step number `number`.
fn inputs(step: &TrainingStep, number: i64) -> Given {
    let mut out = Vec::new();
    for (i, name) in step.batch_inputs.iter().enumerate() {
        let key = Key::new(3).child_index(number as u64).child_index(i as u64);
        let value = step.graph.find(name).unwrap();
        let dims = step.graph.shape(value).unwrap().iter().zip([5, 12, 0, 0]);
        let shape: Vec<usize> = dims.map(|(dim, size)| dim.known().unwrap_or(size)).collect();
        let count = shape.iter().product::<usize>() as u64;
        out.push((
            name.clone(),
            match step.graph.dtype(value) {
                // No network here has fewer classes or tokens.
                Some(DType::I64) => {
                    Tensor::new(&shape, &(0..count).map(|j| key.below(j, 10) as i64).collect::<Vec<_>>()).unwrap()
                }
                _ => Tensor::new(&shape, &(0..count).map(|j| key.normal_f32(j)).collect::<Vec<_>>()).unwrap(),
            },
        ));
    }
    out.push((training::LEARNING_RATE.to_owned(), Tensor::scalar(0.01f32)));
    out.push((training::STEP.to_owned(), Tensor::scalar(number)));
    out.push((training::SEED.to_owned(), Tensor::scalar(5i64)));
    let is_input = |name: &String| step.graph.inputs().iter().any(|v| step.graph.value(*v).name == *name);
    out.retain(|(name, _)| is_input(name));
    out
}

/// Losses and the state after three steps on the engine.
fn on_engine(step: &TrainingStep, threads: usize) -> (Vec<f64>, Vec<Tensor>) {
    let state = step.state.iter().map(|s| (s.input.clone(), s.output.clone())).collect();
    let engine = CpuEngine::new(threads).unwrap();
    let mut session = engine.compile(&step.graph, &CompileOptions { state }).unwrap();
    let mut losses = Vec::new();
    for number in 0..3 {
        let given = inputs(step, number);
        let given: Vec<(&str, &Tensor)> = given.iter().map(|(name, t)| (name.as_str(), t)).collect();
        losses.push(session.run(&given).unwrap()[0].to_f64().unwrap()[0]);
    }
    (losses, step.state.iter().map(|s| session.state(&s.input).unwrap()).collect())
}

fn by_reference(step: &TrainingStep) -> (Vec<f64>, Vec<Tensor>) {
    let mut state: HashMap<String, Tensor> = step.state.iter().map(|s| (s.input.clone(), s.initial.clone())).collect();
    let mut losses = Vec::new();
    for number in 0..3 {
        let mut given: HashMap<String, Tensor> = inputs(step, number).into_iter().collect();
        given.extend(state.clone());
        let outputs = updraft_graph::eval::evaluate(&step.graph, &given).unwrap();
        let named: HashMap<&str, &Tensor> =
            step.graph.outputs().iter().map(|v| step.graph.value(*v).name.as_str()).zip(&outputs).collect();
        losses.push(named[step.outputs[0].as_str()].to_f64().unwrap()[0]);
        for entry in &step.state {
            state.insert(entry.input.clone(), named[entry.output.as_str()].clone());
        }
    }
    (losses, step.state.iter().map(|s| state[&s.input].clone()).collect())
}

fn check(step: &TrainingStep) {
    let (expected_losses, expected) = by_reference(step);
    let (losses, found) = on_engine(step, 1);
    for (a, b) in losses.iter().zip(&expected_losses) {
        // Rounding of single precision, a few dozen operators deep.
        assert!((a - b).abs() < 1e-5 * b.abs(), "losses {losses:?}, expected {expected_losses:?}");
    }
    for ((found, expected), entry) in found.iter().zip(&expected).zip(&step.state) {
        let (found, expected) = (found.to_f64().unwrap(), expected.to_f64().unwrap());
        let square = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
        let difference: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
        // Adam divides by the root of the mean square, so an element whose gradient is all rounding moves by all of
        // the learning rate either way: tensors are compared by their norm, and biases that softmax makes
        // irrelevant (their gradient is zero but for rounding) by what such moves can make.
        let moves = 3.0 * 0.01 * (found.len() as f64).sqrt() * if square(&expected) < 1e-3 { 2.0 } else { 0.02 };
        let bound = 1e-3 * square(&expected).sqrt() + moves;
        assert!(square(&difference).sqrt() <= bound, "{}: off by {}", entry.input, square(&difference).sqrt());
    }
    for threads in [2, 3, 8] {
        let (_, again) = on_engine(step, threads);
        assert!(found == again, "bits of the state differ on {threads} threads");
    }
}

#[test]
fn gpt_with_adam_follows_the_reference() {
    check(&step(&gpt(0.0), Optimizer::AdamW(AdamSettings::default())));
}

#[test]
fn gpt_with_momentum_and_dropout_follows_the_reference() {
    check(&step(&gpt(0.2), Optimizer::Sgd { momentum: 0.9, nesterov: true }));
}

#[test]
fn a_residual_network_with_batch_normalisation_follows_the_reference() {
    let entry = zoo::find("resnet8").unwrap();
    let settings = [("image".to_owned(), Setting::Integer(8))];
    let model = entry.build(&zoo::Options::of(entry, &settings).unwrap(), 7).unwrap();
    check(&step(&model, Optimizer::Sgd { momentum: 0.9, nesterov: false }));
}

#[test]
fn wrong_inputs_are_refused_by_name() {
    let step = step(&gpt(0.0), Optimizer::Sgd { momentum: 0.0, nesterov: false });
    let state: Vec<(String, String)> = step.state.iter().map(|s| (s.input.clone(), s.output.clone())).collect();
    let engine = CpuEngine::new(1).unwrap();
    let mut session = engine.compile(&step.graph, &CompileOptions { state: state.clone() }).unwrap();
    let good = inputs(&step, 0);
    let mut refused = |name: &str, change: &dyn Fn(&mut Given)| {
        let mut given = good.clone();
        change(&mut given);
        let given: Vec<(&str, &Tensor)> = given.iter().map(|(name, t)| (name.as_str(), t)).collect();
        match session.run(&given) {
            Err(EngineError::Input { name: found, message }) => assert_eq!(found, name, "{message}"),
            other => panic!("expected an error about {name}, found {other:?}"),
        }
    };
    refused("tokens", &|given| given.retain(|(name, _)| name != "tokens"));
    refused("nonsense", &|given| given.push(("nonsense".to_owned(), Tensor::scalar(0f32))));
    refused("tokens", &|given| given[0].1 = Tensor::zeros(updraft_graph::DType::F32, &[5, 12]).unwrap());
    refused("labels", &|given| given[1].1 = Tensor::zeros(updraft_graph::DType::I64, &[5, 11]).unwrap());
    refused(&state[0].0, &|given| given.push((state[0].0.clone(), Tensor::scalar(0f32))));

    // A label that is no class fails the run and leaves the state as it was.
    let before = session.state(&state[0].0).unwrap();
    let mut bad = inputs(&step, 0);
    bad[1].1 = Tensor::new(&[5, 12], &[19i64; 60]).unwrap();
    let bad: Vec<(&str, &Tensor)> = bad.iter().map(|(name, t)| (name.as_str(), t)).collect();
    assert!(matches!(session.run(&bad), Err(EngineError::Node { .. })));
    assert_eq!(session.state(&state[0].0).unwrap(), before);
}
