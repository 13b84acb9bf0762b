//! Training steps run by the reference evaluator, against the same arithmetic written out.

use std::collections::HashMap;

use updraft_graph::eval::evaluate;
use updraft_graph::zoo::{Options, Setting};
use updraft_graph::{DType, Graph, Tensor, ValueType};
use updraft_passes::loss::{CrossEntropy, Loss, Metric};
use updraft_passes::optimizer::{AdamSettings, Optimizer, WeightDecay};
use updraft_passes::training::{StateRole, TrainingOptions, TrainingStep, build, build_evaluation, export};

/// Runs steps of a training step one after another and returns what each gave and the last state.
struct Loop {
    step: TrainingStep,
    state: HashMap<String, Tensor>,
    done: i64,
}

impl Loop {
    fn new(step: TrainingStep) -> Loop {
        let state = step.state.iter().map(|s| (s.input.clone(), s.initial.clone())).collect();
        Loop { step, state, done: 0 }
    }

    fn run(&mut self, learning_rate: f32, batch: &[(&str, Tensor)]) -> HashMap<String, Tensor> {
        let mut inputs = self.state.clone();
        inputs.extend(batch.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())));
        inputs.insert("learning_rate".into(), Tensor::scalar(learning_rate));
        inputs.insert("step".into(), Tensor::scalar(self.done));
        inputs.insert("seed".into(), Tensor::scalar(7i64));
        let outputs = evaluate(&self.step.graph, &inputs).unwrap();
        let names = self.step.graph.outputs().iter().map(|v| self.step.graph.value(*v).name.clone());
        let made: HashMap<String, Tensor> = names.zip(outputs).collect();
        for entry in &self.step.state {
            self.state.insert(entry.input.clone(), made[&entry.output].clone());
        }
        self.done += 1;
        made
    }

    fn state(&self, name: &str) -> Vec<f64> {
        self.state[name].to_f64().unwrap()
    }
}

/// `logits = x * p` for `p [2, 2]`: the gradient of `p` is that of the logits times `x`.
fn scaled() -> Graph {
    let mut graph = Graph::new("scaled");
    let x = graph.add_input("x", ValueType::tensor(DType::F32, vec![2.into(), 2.into()])).unwrap();
    let p = graph.add_constant("p", Tensor::new(&[2, 2], &[0.5f32, -1.0, 2.0, 0.25]).unwrap());
    let logits = graph.op("Mul", &[x, p], []).unwrap();
    graph.rename(logits, "logits").unwrap();
    graph.push_output(logits);
    graph
}

fn cross_entropy() -> Loss {
    Loss::CrossEntropy(CrossEntropy::default())
}

fn batch() -> [(&'static str, Tensor); 2] {
    let x = Tensor::new(&[2, 2], &[1f32, -2.0, 0.5, 3.0]).unwrap();
    [("x", x), ("labels", Tensor::vector(&[0i64, 1]))]
}

/// The gradient of the mean cross-entropy of [`scaled`] with respect to `p`, written out.
fn scaled_gradient(p: &[f64]) -> Vec<f64> {
    let (x, labels) = ([1.0, -2.0, 0.5, 3.0], [0, 1]);
    let mut gradient = vec![0.0; 4];
    for row in 0..2 {
        let logits = [p[2 * row] * x[2 * row], p[2 * row + 1] * x[2 * row + 1]];
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        for class in 0..2 {
            let hit = if labels[row] == class { 1.0 } else { 0.0 };
            gradient[2 * row + class] = (logits[class].exp() / total - hit) / 2.0 * x[2 * row + class];
        }
    }
    gradient
}

fn assert_near(found: &[f64], expected: &[f64]) {
    // The graph rounds to f32 after each of the few operations; the numbers are of the order of 1.
    let near = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-6);
    assert!(near, "found {found:?}, expected {expected:?}");
}

#[test]
fn sgd_with_momentum_and_decay_follows_the_written_out_steps() {
    let optimizer = Optimizer::Sgd { momentum: 0.9, nesterov: true };
    let decay = WeightDecay { amount: 0.01, rules: Vec::new() };
    let options = TrainingOptions { weight_decay: decay, ..TrainingOptions::new(cross_entropy(), optimizer) };
    let mut run = Loop::new(build(&scaled(), &options).unwrap());
    let (mut p, mut m) = (run.state("p"), vec![0.0; 4]);
    for _ in 0..3 {
        run.run(0.1, &batch());
        let g = scaled_gradient(&p);
        for i in 0..4 {
            let d = g[i] + 0.01 * p[i];
            m[i] = 0.9 * m[i] + d;
            p[i] -= 0.1 * (d + 0.9 * m[i]);
        }
        assert_near(&run.state("p"), &p);
        assert_near(&run.state("p.momentum"), &m);
    }
}

#[test]
fn adam_follows_the_written_out_steps() {
    let options = TrainingOptions::new(cross_entropy(), Optimizer::Adam(AdamSettings::default()));
    let mut run = Loop::new(build(&scaled(), &options).unwrap());
    let (mut p, mut m, mut v) = (run.state("p"), vec![0.0; 4], vec![0.0; 4]);
    for t in 1..=3 {
        run.run(0.01, &batch());
        let g = scaled_gradient(&p);
        for i in 0..4 {
            m[i] = 0.9 * m[i] + 0.1 * g[i];
            v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
            let (m_hat, v_hat) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.999f64.powi(t)));
            p[i] -= 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
        }
        assert_near(&run.state("p"), &p);
    }
}

#[test]
fn the_step_names_what_it_reads_gives_and_keeps() {
    let options = TrainingOptions {
        keep_outputs: vec!["logits".into()],
        ..TrainingOptions::new(cross_entropy(), Optimizer::AdamW(AdamSettings::default()))
    };
    let step = build(&scaled(), &options).unwrap();
    assert_eq!(step.batch_inputs, ["x", "labels"]);
    assert_eq!(step.outputs, ["loss", "logits"]);
    let state: Vec<_> = step.state.iter().map(|s| (s.input.as_str(), s.output.as_str(), s.role)).collect();
    assert_eq!(
        state,
        [
            ("p", "p.next", StateRole::Parameter),
            ("p.mean", "p.mean.next", StateRole::Moment),
            ("p.mean_square", "p.mean_square.next", StateRole::Moment),
        ]
    );
}

#[test]
fn a_trained_state_goes_back_into_the_model() {
    let model = scaled();
    let options = TrainingOptions::new(cross_entropy(), Optimizer::Sgd { momentum: 0.0, nesterov: false });
    let mut run = Loop::new(build(&model, &options).unwrap());
    run.run(0.5, &batch());
    let trained = export(&model, [("p".to_owned(), run.state["p"].clone())]).unwrap();
    let inputs = HashMap::from([("x".to_owned(), Tensor::new(&[2, 2], &[1f32; 4]).unwrap())]);
    assert_eq!(evaluate(&trained, &inputs).unwrap()[0], run.state["p"]);

    let wrong = export(&model, [("p".to_owned(), Tensor::vector(&[1f32]))]).unwrap_err();
    assert!(wrong.to_string().contains("f32[2, 2] in the model but f32[1]"), "{wrong}");
}

#[test]
fn the_evaluation_gives_the_loss_of_the_step_before_its_update() {
    let options = TrainingOptions::new(cross_entropy(), Optimizer::Sgd { momentum: 0.0, nesterov: false });
    let mut run = Loop::new(build(&scaled(), &options).unwrap());
    let in_training = run.run(0.5, &batch())["loss"].clone();
    let (graph, batch_inputs) = build_evaluation(&scaled(), &options).unwrap();
    assert_eq!(batch_inputs, ["x", "labels"]);
    let inputs = batch().into_iter().map(|(n, t)| (n.to_owned(), t)).collect();
    assert_eq!(evaluate(&graph, &inputs).unwrap(), [in_training]);
}

#[test]
fn what_cannot_be_trained_is_an_error_that_says_why() {
    let sgd = Optimizer::Sgd { momentum: 0.0, nesterov: false };
    let plain = TrainingOptions::new(cross_entropy(), sgd);
    let rows = [
        (TrainingOptions { freeze: vec!["*".into()], ..plain.clone() }, "nothing is left to train"),
        (TrainingOptions { output: Some("probabilities".into()), ..plain.clone() }, "it has logits"),
        (TrainingOptions { optimizer: Optimizer::Sgd { momentum: 1.5, nesterov: false }, ..plain.clone() }, "[0, 1)"),
        (TrainingOptions { clip_norm: Some(0.0), ..plain.clone() }, "clip_norm must be above 0"),
        (TrainingOptions { loss: Loss::MeanSquaredError, metrics: vec![Metric::Correct], ..plain }, "needs labels"),
    ];
    for (options, expected) in rows {
        let error = build(&scaled(), &options).unwrap_err();
        let mut message = error.to_string();
        message.push_str(&std::error::Error::source(&error).map(|e| e.to_string()).unwrap_or_default());
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    }
}

/// A network's name, its settings, and the parameters that its loss does not reach.
type Network = (&'static str, &'static [(&'static str, usize)], &'static [&'static str]);

/// Networks of the zoo, small where their size says nothing new.
const ZOO: &[Network] = &[
    ("mlp", &[], &[]),
    ("small-cnn", &[], &[]),
    ("resnet8", &[], &[]),
    ("resnet18", &[("image", 32)], &[]),
    ("mobilenet-v2", &[("image", 32)], &[]),
    ("vit", &[("image", 32), ("layers", 2), ("width", 32), ("heads", 2)], &[]),
    ("gpt", &[("vocabulary", 65), ("context", 16), ("layers", 2), ("heads", 2), ("width", 32)], &[]),
    (
        "bert",
        &[("vocabulary", 65), ("context", 16), ("layers", 2), ("heads", 2), ("width", 32)],
        &["pooler.weight", "pooler.bias"],
    ),
];

#[test]
fn every_network_of_the_zoo_has_a_training_step_for_all_its_parameters() {
    for (name, settings, unreached) in ZOO {
        let entry = updraft_graph::zoo::find(name).unwrap();
        let settings: Vec<_> = settings.iter().map(|(n, v)| ((*n).to_owned(), Setting::Integer(*v))).collect();
        let model = entry.build(&Options::of(entry, &settings).unwrap(), 0).unwrap();
        let options = TrainingOptions::new(cross_entropy(), Optimizer::AdamW(AdamSettings::default()));
        let step = build(&model, &options).unwrap();
        let kept: HashMap<_, _> = step.state.iter().map(|s| (s.input.as_str(), s.role)).collect();
        let mut expected = 0;
        for (id, tensor) in model.constants() {
            let parameter = model.value(id).name.as_str();
            let role = match parameter.rsplit('.').next() {
                Some("running_mean" | "running_var") => StateRole::RunningStatistic,
                _ => StateRole::Parameter,
            };
            if unreached.contains(&parameter) {
                assert!(!kept.contains_key(parameter), "{name}: {parameter} is trained");
            } else {
                assert_eq!(kept.get(parameter), Some(&role), "{name}: {parameter} {:?}", tensor.shape());
                expected += if role == StateRole::Parameter { 3 } else { 1 };
            }
        }
        assert_eq!(step.state.len(), expected, "{name}: parameters with two moments each, and statistics");
    }
}

#[test]
fn statistics_that_a_file_stores_once_are_kept_apart() {
    let mut model = Graph::new("shared");
    let x = model.add_input("x", ValueType::tensor(DType::F32, vec![2.into(), 2.into()])).unwrap();
    let [scale, variance] = ["scale", "variance"].map(|n| model.add_constant(n, Tensor::vector(&[1f32, 2.0])));
    // A mean of zero is a bias of zero, too.
    let mean = model.add_constant("mean", Tensor::vector(&[0f32; 2]));
    let bias = mean;
    let mut y = x;
    for _ in 0..2 {
        y = model.op("BatchNormalization", &[y, scale, bias, mean, variance], []).unwrap();
    }
    model.push_output(y);
    let options = TrainingOptions::new(cross_entropy(), Optimizer::Sgd { momentum: 0.0, nesterov: false });
    let mut run = Loop::new(build(&model, &options).unwrap());
    run.run(0.1, &batch());
    let statistics: Vec<_> = run.step.state.iter().filter(|s| s.role == StateRole::RunningStatistic).collect();
    assert_eq!(statistics.len(), 4);
    let trained = export(&model, statistics.iter().map(|s| (s.input.clone(), run.state[&s.input].clone()))).unwrap();
    for entry in statistics {
        assert_eq!(trained.value(trained.find(&entry.input).unwrap()).constant(), Some(&run.state[&entry.input]));
    }
}

#[test]
fn a_step_with_clipping_and_dropout_is_a_function_of_seed_and_step() {
    let entry = updraft_graph::zoo::find("mlp").unwrap();
    let settings = [
        ("inputs".to_owned(), Setting::Integer(4)),
        ("hidden".to_owned(), Setting::Integers(vec![8])),
        ("dropout".to_owned(), Setting::Float(0.5)),
    ];
    let model = entry.build(&Options::of(entry, &settings).unwrap(), 0).unwrap();
    let options = TrainingOptions {
        clip_norm: Some(1e-3),
        ..TrainingOptions::new(cross_entropy(), Optimizer::Sgd { momentum: 0.5, nesterov: false })
    };
    let x = Tensor::new(&[2, 4], &[1f32, -2.0, 0.5, 3.0, -1.0, 0.25, 2.0, 0.0]).unwrap();
    let batch = [("features", x), ("labels", Tensor::vector(&[3i64, 1]))];
    let run = || Loop::new(build(&model, &options).unwrap());
    let (mut first, mut second) = (run(), run());
    let outputs = first.run(0.1, &batch);
    assert_eq!(outputs["loss"], second.run(0.1, &batch)["loss"]);
    assert_ne!(outputs["loss"], first.run(0.0, &batch)["loss"], "another step drops other features");

    let moments: Vec<f64> =
        second.step.state.iter().filter(|s| s.role == StateRole::Moment).flat_map(|s| second.state(&s.input)).collect();
    // Without momentum so far, moments are the clipped gradients.
    let clipped = moments.iter().map(|g| g * g).sum::<f64>().sqrt();
    assert!(outputs["gradient_norm"].to_f64().unwrap()[0] > 1e-3);
    assert!((clipped - 1e-3).abs() < 2e-6, "{clipped}: the divisor has 1e-6 added to the norm");
}
