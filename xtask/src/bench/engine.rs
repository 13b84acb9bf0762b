//! Whole training steps (forward, loss, gradient, update) on our engine and in PyTorch, by turns.
//!
//! PyTorch runs in a process of its own that does as many steps as it is told, and reports wall and CPU time; the two
//! never run at the same time, and rounds alternate, so that a machine that slows down slows both. The figure is the
//! ratio of the fastest rounds. Weights and data are random, and the same shapes on both sides. Not measured: loading
//! data, the first step (planning here, allocation there), anything but the CPU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Args;
use updraft_base::random::Key;
use updraft_engine::{CompileOptions, CpuEngine, Engine, Session};
use updraft_graph::{DType, Tensor, zoo};
use updraft_passes::loss::{CrossEntropy, Loss};
use updraft_passes::optimizer::{AdamSettings, Optimizer, WeightDecay};
use updraft_passes::training::{self, TrainingOptions, TrainingStep};

use super::rounds::{StepCost, Theirs, measure};
use crate::{Failure, python};

/// Options of `bench engine`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Only cases whose name contains this.
    #[arg(long, default_value = "")]
    case: String,
    /// Numbers of threads.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2])]
    threads: Vec<usize>,
    /// Rounds of each side.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds that a round of ours should take.
    #[arg(long, default_value_t = 1.0)]
    round_s: f64,
    /// Show where our time goes, instead of comparing.
    #[arg(long)]
    profile: bool,
    /// The Python interpreter to use, instead of an environment made under target/.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Also write the table as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One training job.
struct Case {
    name: &'static str,
    /// Network of the zoo and its options; also what the script is told.
    network: &'static str,
    settings: &'static [(&'static str, usize)],
    batch: usize,
    optimizer: Optimizer,
}

const ADAM: Optimizer = Optimizer::AdamW(AdamSettings { beta1: 0.9, beta2: 0.99, epsilon: 1e-8 });

const CASES: &[Case] = &[
    Case {
        name: "gpt-128",
        network: "gpt",
        settings: &[("vocabulary", 65), ("context", 64), ("layers", 4), ("heads", 4), ("width", 128)],
        batch: 12,
        optimizer: ADAM,
    },
    Case {
        name: "gpt-256",
        network: "gpt",
        settings: &[("vocabulary", 512), ("context", 128), ("layers", 4), ("heads", 4), ("width", 256)],
        batch: 8,
        optimizer: ADAM,
    },
    Case {
        name: "resnet8",
        network: "resnet8",
        settings: &[("image", 32), ("channels", 3), ("classes", 10)],
        batch: 64,
        optimizer: Optimizer::Sgd { momentum: 0.9, nesterov: false },
    },
];

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    if cfg!(debug_assertions) {
        return Err(
            "a debug build says nothing about speed: use `cargo run --release --package xtask -- bench engine`".into(),
        );
    }
    let cases = CASES.iter().filter(|c| c.name.contains(&arguments.case));
    if arguments.profile {
        for case in cases {
            profile(case, arguments.threads.first().copied().unwrap_or(1))?;
        }
        return Ok(());
    }
    let interpreter = match &arguments.python {
        Some(python) => python.clone(),
        None => python::environment(root, "bench", &["numpy==2.4.6", "torch==2.15.0"])?,
    };
    let script = root.join("xtask/src/bench/engine.py");
    println!(
        "{:10} {:>7} {:>12} {:>12} {:>10} {:>10} {:>14} {:>14}",
        "case", "threads", "ours ms", "torch ms", "wall", "CPU", "tuned torch ms", "wall"
    );
    let mut rows = Vec::new();
    for case in cases {
        for threads in &arguments.threads {
            let row = compare(case, *threads, arguments, &interpreter, &script)?;
            println!(
                "{:10} {:>7} {:>12.2} {:>12.2} {:>9.2}x {:>9.2}x {:>14.2} {:>13.2}x",
                case.name,
                threads,
                row.ours.wall_ms,
                row.eager.wall_ms,
                row.ours.wall_ms / row.eager.wall_ms,
                row.ours.cpu_ms / row.eager.cpu_ms,
                row.tuned.wall_ms,
                row.ours.wall_ms / row.tuned.wall_ms,
            );
            rows.push(format!(
                "{{\"case\": {:?}, \"threads\": {threads}, \"ours_wall_ms\": {:.4}, \"ours_cpu_ms\": {:.4}, \
                 \"torch_wall_ms\": {:.4}, \"torch_cpu_ms\": {:.4}, \"tuned_wall_ms\": {:.4}, \"tuned_cpu_ms\": {:.4}}}",
                case.name,
                row.ours.wall_ms,
                row.ours.cpu_ms,
                row.eager.wall_ms,
                row.eager.cpu_ms,
                row.tuned.wall_ms,
                row.tuned.cpu_ms
            ));
        }
    }
    if let Some(file) = &arguments.json {
        std::fs::write(file, format!("[\n  {}\n]\n", rows.join(",\n  ")))?;
    }
    Ok(())
}

struct Row {
    ours: StepCost,
    eager: StepCost,
    tuned: StepCost,
}

fn compare(
    case: &Case,
    threads: usize,
    arguments: &Arguments,
    interpreter: &Path,
    script: &Path,
) -> Result<Row, Failure> {
    let mut ours = Ours::new(case, threads)?;
    let start = |variant: &str| {
        let mut command = Command::new(interpreter);
        command.arg(script).args([case.network, variant, &threads.to_string(), &format!("batch={}", case.batch)]);
        Theirs::start(command.args(case.settings.iter().map(|(name, value)| format!("{name}={value}"))))
    };
    let (mut eager, mut tuned) = (start("eager")?, start("tuned")?);
    ours.steps(2)?;
    eager.steps(2)?;
    tuned.steps(2)?;
    let one = ours.steps(3)?.wall_ms;
    let steps = ((arguments.round_s * 1e3 / one) as usize).max(3);
    let mut row = Row { ours: StepCost::WORST, eager: StepCost::WORST, tuned: StepCost::WORST };
    for _ in 0..arguments.rounds {
        row.ours = row.ours.best(ours.steps(steps)?);
        row.eager = row.eager.best(eager.steps(steps)?);
        row.tuned = row.tuned.best(tuned.steps(steps)?);
    }
    Ok(row)
}

/// Our side.
struct Ours {
    session: Box<dyn Session>,
    batch: Vec<(String, Tensor)>,
    step: i64,
}

impl Ours {
    fn new(case: &Case, threads: usize) -> Result<Ours, Failure> {
        let step = training_step(case)?;
        let state = step.state.iter().map(|s| (s.input.clone(), s.output.clone())).collect();
        let session = CpuEngine::new(threads)?.compile(&step.graph, &CompileOptions { state })?;
        let key = Key::new(1);
        let size = |name: &str| case.settings.iter().find(|(n, _)| *n == name).map_or(1, |(_, v)| *v);
        let mut batch = Vec::new();
        for (number, name) in step.batch_inputs.iter().enumerate() {
            let id = step.graph.find(name).ok_or("a batch input is not in the graph")?;
            let shape: Vec<usize> = step
                .graph
                .shape(id)
                .ok_or("a batch input has no rank")?
                .iter()
                .enumerate()
                .map(|(axis, dim)| dim.known().unwrap_or(if axis == 0 { case.batch } else { size("context") }))
                .collect();
            let count: usize = shape.iter().product();
            let key = key.child_index(number as u64);
            let tensor = if step.graph.dtype(id) == Some(DType::I64) {
                let classes = size("vocabulary").max(size("classes")) as u64;
                let values: Vec<i64> = (0..count).map(|i| key.below(i as u64, classes) as i64).collect();
                Tensor::new(&shape, &values)?
            } else {
                let values: Vec<f32> = (0..count).map(|i| key.normal_f32(i as u64)).collect();
                Tensor::new(&shape, &values)?
            };
            batch.push((name.clone(), tensor));
        }
        Ok(Ours { session, batch, step: 0 })
    }

    fn inputs(&self) -> Vec<(String, Tensor)> {
        let mut inputs = self.batch.clone();
        inputs.push((training::LEARNING_RATE.to_owned(), Tensor::scalar(1e-3f32)));
        inputs.push((training::STEP.to_owned(), Tensor::scalar(self.step)));
        inputs.push((training::SEED.to_owned(), Tensor::scalar(0i64)));
        inputs
    }

    fn steps(&mut self, count: usize) -> Result<StepCost, Failure> {
        measure(count, || {
            let inputs = self.inputs();
            let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, t)| (name.as_str(), t)).collect();
            self.session.run(&inputs)?;
            self.step += 1;
            Ok(())
        })
    }
}

fn training_step(case: &Case) -> Result<TrainingStep, Failure> {
    let entry = zoo::find(case.network).ok_or("no such network")?;
    let settings: Vec<(String, zoo::Setting)> =
        case.settings.iter().map(|(name, value)| ((*name).to_owned(), zoo::Setting::Integer(*value))).collect();
    let options = zoo::Options::of(entry, &settings)?;
    let model = entry.build(&options, 1)?;
    let mut training = TrainingOptions::new(Loss::CrossEntropy(CrossEntropy::default()), case.optimizer);
    training.weight_decay = WeightDecay { amount: 0.1, ..WeightDecay::default() };
    Ok(training::build(&model, &training)?)
}

fn profile(case: &Case, threads: usize) -> Result<(), Failure> {
    let mut ours = Ours::new(case, threads)?;
    ours.steps(3)?;
    // On one thread CPU time is what we spend, also where others share the machine.
    let start = Instant::now();
    let mut clock = move || match std::fs::read_to_string("/proc/thread-self/schedstat") {
        Ok(text) if threads == 1 => text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0),
        _ => start.elapsed().as_nanos() as u64,
    };
    let mut times: Vec<(String, String, bool, u64)> = Vec::new();
    const RUNS: u64 = 10;
    for _ in 0..RUNS {
        let inputs = ours.inputs();
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, t)| (name.as_str(), t)).collect();
        let (_, steps) = ours.session.profile(&inputs, &mut clock)?;
        times.resize(steps.len(), (String::new(), String::new(), false, 0));
        for (sum, step) in times.iter_mut().zip(steps) {
            *sum = (step.op, step.nodes, step.reference, sum.3 + step.duration_ns);
        }
    }
    let total: u64 = times.iter().map(|t| t.3).sum();
    let mut order: Vec<usize> = (0..times.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(times[*i].3));
    println!(
        "{}: {:.2} ms in {} steps, {:?}",
        case.name,
        total as f64 / 1e6 / RUNS as f64,
        times.len(),
        ours.session.memory()
    );
    for i in order {
        let (op, nodes, reference, ns) = &times[i];
        let mark = if *reference { " (reference)" } else { "" };
        println!(
            "{:>4} {:>9.1} us {:5.1} % {op}{mark}: {nodes}",
            i,
            *ns as f64 / 1e3 / RUNS as f64,
            *ns as f64 * 100.0 / total as f64
        );
    }
    Ok(())
}
