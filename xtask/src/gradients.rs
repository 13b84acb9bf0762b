//! Losses and gradients of whole networks against PyTorch, which runs the same ONNX file.
//!
//! A training step with momentum that starts from zero leaves the gradient in the momentum, so one step of the product
//! as users run it shows every gradient. PyTorch computes in double precision; so does the reference evaluator here,
//! and what is left between them is rounding. The engine computes in single precision.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use updraft_base::random::{Key, fill_uniform};
use updraft_engine::{CompileOptions, CpuEngine, Engine};
use updraft_graph::eval::evaluate;
use updraft_graph::onnx::{WriteOptions, write};
use updraft_graph::zoo::{self, Options, Setting};
use updraft_graph::{Attribute, DType, Graph, Model, Tensor, ValueId, ValueType};
use updraft_passes::loss::{CrossEntropy, Loss};
use updraft_passes::optimizer::Optimizer;
use updraft_passes::training::{LOSS, StateRole, TrainingOptions, TrainingStep, build};

use crate::{Failure, python};

/// Options of `gradients`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The Python interpreter to use, instead of an environment made under target/.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Networks to compare; all of them where none is named.
    networks: Vec<String>,
}

/// A network's name, its settings, and the share of label smoothing.
type Network = (&'static str, &'static [(&'static str, usize)], f32);

/// Networks of the zoo, small where their size says nothing new.
const NETWORKS: &[Network] = &[
    ("mlp", &[], 0.0),
    ("small-cnn", &[], 0.1),
    ("resnet8", &[], 0.0),
    ("resnet18", &[("image", 32)], 0.1),
    ("mobilenet-v2", &[("image", 64)], 0.0),
    ("vit", &[("image", 32), ("patch", 16), ("layers", 4), ("width", 96), ("heads", 4), ("hidden", 192)], 0.1),
    ("gpt", &[("vocabulary", 65), ("context", 32), ("layers", 4), ("heads", 4), ("width", 64)], 0.0),
    ("bert", &[("vocabulary", 100), ("context", 32), ("layers", 4), ("heads", 4), ("width", 64), ("hidden", 128)], 0.0),
];

/// Samples in the batch, and tokens in a sequence.
const OPEN: [(&str, usize); 2] = [("N", 4), ("T", 16)];

/// The label that does not count.
const IGNORED: i64 = -100;

/// Largest relative difference allowed of the reference evaluator. LayerNormalization hands on its statistics in single
/// precision whatever the type of its input (its `stash_type`), so its gradients are good to 6e-8 a layer; networks
/// without it agree to 1e-12.
const TOLERANCE_REFERENCE: f64 = 1e-6;

/// Largest relative difference allowed of the engine. Single precision has 6e-8 a rounding; sums over batch and space
/// cancel, and statistics over a batch of 4 divide by small deviations, each of which costs about two digits.
const TOLERANCE_ENGINE: f64 = 2e-3;

/// Compares all networks, prints a line each, and fails where a gradient is too far away.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    let python = match &arguments.python {
        Some(python) => python.clone(),
        None => python::environment(root, "gradients", &["numpy==2.4.6", "onnx==1.23.2", "torch==2.15.0"])?,
    };
    let folder = root.join("target/gradients");
    std::fs::create_dir_all(&folder)?;
    let mut failed = 0;
    println!(
        "{:14} {:10} {:>10} {:>12} {:>12} {:>12}  farthest",
        "network", "run by", "parameters", "loss", "gradient", "relative"
    );
    for (name, settings, label_smoothing) in NETWORKS {
        if !arguments.networks.is_empty() && !arguments.networks.iter().any(|n| n == name) {
            continue;
        }
        let entry = zoo::find(name).ok_or_else(|| format!("the zoo has no {name}"))?;
        let settings: Vec<_> = settings.iter().map(|(n, v)| ((*n).to_owned(), Setting::Integer(*v))).collect();
        let model = entry.build(&Options::of(entry, &settings)?, 0)?;
        let loss = CrossEntropy { label_smoothing: *label_smoothing, ignore_index: IGNORED, ..CrossEntropy::default() };
        let options = TrainingOptions::new(Loss::CrossEntropy(loss), Optimizer::Sgd { momentum: 0.5, nesterov: false });

        let file = |end: &str| folder.join(format!("{name}-{end}.onnx"));
        let step = build(&model, &options)?;
        let batch = batch(&step)?;
        std::fs::write(file("model"), write(&Model::new(model.clone()), WriteOptions::default())?)?;
        save(&batch, &file("batch"))?;
        save(&by_engine(&step, &batch)?, &file("engine"))?;
        let exact = build(&in_double_precision(&model)?, &options)?;
        save(&by_reference(&exact, &batch)?, &file("reference"))?;

        let compared = Command::new(&python)
            .arg(root.join("xtask/src/gradients.py"))
            .args([file("model"), file("batch")])
            .arg(label_smoothing.to_string())
            .args([file("reference"), file("engine")])
            .output()?;
        if !compared.status.success() {
            return Err(format!("{name}: {}", String::from_utf8_lossy(&compared.stderr).trim()).into());
        }
        let lines = String::from_utf8(compared.stdout)?;
        for (line, (by, tolerance)) in
            lines.lines().zip([("reference", TOLERANCE_REFERENCE), ("engine", TOLERANCE_ENGINE)])
        {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [parameters, loss, gradient, relative, farthest] = fields[..] else {
                return Err(format!("{name}: no comparison came back but {line:?}").into());
            };
            let (loss, gradient, relative): (f64, f64, f64) = (loss.parse()?, gradient.parse()?, relative.parse()?);
            println!(
                "{name:14} {by:10} {parameters:>10} {loss:>12.2e} {gradient:>12.2e} {relative:>12.2e}  {farthest}"
            );
            // Written so that not-a-number fails.
            failed += usize::from(!(relative <= tolerance && loss <= tolerance));
        }
    }
    if failed > 0 {
        let tolerances = format!("{TOLERANCE_REFERENCE:e} (reference) or {TOLERANCE_ENGINE:e} (engine)");
        return Err(format!("{failed} comparisons differ by more than {tolerances}").into());
    }
    Ok(())
}

/// Random data of the shapes that the step asks for; of the labels, every seventh does not count.
fn batch(step: &TrainingStep) -> Result<HashMap<String, Tensor>, Failure> {
    let graph = &step.graph;
    let mut batch = HashMap::new();
    // Labels are of all classes, tokens of any vocabulary used here.
    let classes = 10;
    for name in &step.batch_inputs {
        let id = graph.find(name).ok_or_else(|| format!("the step has no input {name:?}"))?;
        let open = |symbol: &str| OPEN.iter().find(|(n, _)| *n == symbol).map(|(_, size)| *size);
        let shape: Option<Vec<usize>> =
            graph.shape(id).and_then(|shape| shape.iter().map(|d| d.evaluate(&open)).collect());
        let shape = shape.ok_or_else(|| format!("input {name:?} has no size for one of its dimensions"))?;
        let key = Key::new(3).child(name);
        let count: usize = shape.iter().product();
        let tensor = match graph.dtype(id) {
            Some(DType::F32) => {
                let mut values = vec![0f32; count];
                fill_uniform(&key, 0, &mut values);
                Tensor::new(&shape, &values.iter().map(|v| v * 2.0 - 1.0).collect::<Vec<_>>())?
            }
            Some(DType::I64) => {
                let ignored = |i: usize| name == "labels" && i % 7 == 6;
                // Every token may be seen, and segments are two.
                let limit = if name.contains("type") { 2 } else { classes };
                let draw = |i: usize| if name.contains("mask") { 1 } else { key.below(i as u64, limit) as i64 };
                let values: Vec<i64> = (0..count).map(|i| if ignored(i) { IGNORED } else { draw(i) }).collect();
                Tensor::new(&shape, &values)?
            }
            other => return Err(format!("input {name:?} is of {other:?}, for which there is no data").into()),
        };
        batch.insert(name.clone(), tensor);
    }
    Ok(batch)
}

/// The loss, and each parameter's gradient under its name, after one step of the engine.
fn by_engine(step: &TrainingStep, batch: &HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>, Failure> {
    let state = step.state.iter().map(|s| (s.input.clone(), s.output.clone())).collect();
    let mut session = CpuEngine::new(2)?.compile(&step.graph, &CompileOptions { state })?;
    let scalars = scalars();
    let inputs: Vec<(&str, &Tensor)> = batch.iter().chain(&scalars).map(|(n, t)| (n.as_str(), t)).collect();
    let mut found = HashMap::from([(LOSS.to_owned(), session.run(&inputs)?.remove(0))]);
    for (parameter, moment, _) in moments(step) {
        found.insert(parameter, session.state(&moment)?);
    }
    Ok(found)
}

/// The same by the reference evaluator.
fn by_reference(step: &TrainingStep, batch: &HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>, Failure> {
    let mut inputs = scalars();
    for (name, tensor) in batch {
        let wide = if tensor.dtype() == DType::F32 { tensor.cast(DType::F64)? } else { tensor.clone() };
        inputs.insert(name.clone(), wide);
    }
    let names = step.graph.outputs().iter().map(|v| step.graph.value(*v).name.clone());
    let outputs: HashMap<String, Tensor> = names.zip(evaluate(&step.graph, &inputs)?).collect();
    let mut found = HashMap::from([(LOSS.to_owned(), outputs[LOSS].clone())]);
    for (parameter, _, next) in moments(step) {
        found.insert(parameter, outputs[&next].clone());
    }
    Ok(found)
}

fn scalars() -> HashMap<String, Tensor> {
    HashMap::from([
        ("learning_rate".to_owned(), Tensor::scalar(0.1f32)),
        ("step".to_owned(), Tensor::scalar(0i64)),
        ("seed".to_owned(), Tensor::scalar(0i64)),
    ])
}

/// Each parameter with its momentum: its name, and the input and output that hold the momentum.
fn moments(step: &TrainingStep) -> impl Iterator<Item = (String, String, String)> {
    step.state
        .windows(2)
        .filter(|s| s[0].role == StateRole::Parameter && s[1].role == StateRole::Moment)
        .map(|s| (s[0].input.clone(), s[1].input.clone(), s[1].output.clone()))
}

/// The network with every `f32` in it widened.
fn in_double_precision(model: &Graph) -> Result<Graph, Failure> {
    let mut graph = model.clone();
    for id in graph.values().map(|(id, _)| id).collect::<Vec<ValueId>>() {
        let value = graph.value(id);
        if let Some(tensor) = value.constant().filter(|t| t.dtype() == DType::F32) {
            let wide = tensor.cast(DType::F64)?;
            graph.set_constant(id, Some(wide));
        } else if let (Some(DType::F32), Some(shape)) = (value.ty.dtype(), value.ty.shape()) {
            let wide = ValueType::tensor(DType::F64, shape.to_vec());
            graph.set_type(id, wide);
        }
    }
    for id in graph.nodes().map(|(id, _)| id).collect::<Vec<_>>() {
        let is_cast = graph.node(id).op == "Cast";
        for (_, attribute) in graph.attributes_mut(id).iter_mut() {
            match attribute {
                Attribute::Tensor(tensor) if tensor.dtype() == DType::F32 => *tensor = tensor.cast(DType::F64)?,
                Attribute::Int(to) if is_cast && *to == DType::F32 as i64 => *to = DType::F64 as i64,
                _ => {}
            }
        }
    }
    Ok(graph)
}

/// Named tensors as an ONNX file of initializers and nothing else.
fn save(tensors: &HashMap<String, Tensor>, file: &Path) -> Result<(), Failure> {
    let mut graph = Graph::new("tensors");
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    for name in names {
        graph.add_constant(name, tensors[name].clone());
    }
    std::fs::write(file, write(&Model::new(graph), WriteOptions::default())?)?;
    Ok(())
}
