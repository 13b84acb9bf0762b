//! Quantized networks: latency in our engine, in ONNX Runtime and in OpenVINO, and what quantizing itself takes.
//!
//! The networks are the zoo's, with random weights and random pictures or tokens: speed does not depend on what the
//! numbers are. The same two files, the float model and the QDQ model that `updraft quantize` makes of it, run
//! everywhere, so only runtimes differ. Each runtime of others is a process of its own; rounds alternate.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use updraft_base::random::Key;
use updraft_engine::{CompileOptions, CpuEngine, Engine, Session};
use updraft_graph::{DType, Graph, Tensor, cost, infer, onnx, upgrade};
use updraft_passes::pipeline;

use super::child::{self, Effort};
use super::rounds::{StepCost, Theirs, measure};
use crate::{Failure, python};

/// Options of `bench compress`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Only networks whose name contains this.
    #[arg(long, default_value = "")]
    case: String,
    /// Numbers of threads.
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    threads: Vec<usize>,
    /// Rounds of each side.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Runs in a round.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Pictures to calibrate with where quantizers are compared; 0 leaves that out.
    #[arg(long, default_value_t = 500)]
    pictures: usize,
    /// The Python interpreter to use, instead of an environment made under target/.
    #[arg(long)]
    python: Option<PathBuf>,
}

/// What the scripts of this bench and of `bench optimize` need.
pub(super) const PACKAGES: &[&str] =
    &["numpy==2.4.6", "onnx==1.23.2", "onnx-ir==1.1.0", "onnxruntime==1.32.0", "openvino==2026.4.1", "sympy==1.14.0"];

const NETWORKS: &[&str] = &["resnet50", "mobilenet-v2", "bert"];

/// Samples that the models whose latency is measured are calibrated with.
const FEW: usize = 8;

/// What all parts work with.
struct Place<'a> {
    python: PathBuf,
    script: PathBuf,
    updraft: PathBuf,
    folder: PathBuf,
    arguments: &'a Arguments,
}

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    if cfg!(debug_assertions) {
        return Err(
            "a debug build says nothing about speed: use `cargo run --release --package xtask -- bench compress`"
                .into(),
        );
    }
    let python = match &arguments.python {
        Some(python) => python.clone(),
        None => python::environment(root, "compress", PACKAGES)?,
    };
    let folder = root.join("target/bench-compress");
    std::fs::create_dir_all(&folder)?;
    python::run(Command::new("cargo").current_dir(root).args(["build", "--quiet", "--release", "-p", "updraft"]))?;
    let place = Place {
        python,
        script: root.join("xtask/src/bench/compress.py"),
        updraft: root.join("target/release/updraft"),
        folder,
        arguments,
    };
    latency(&place)?;
    if arguments.pictures > 0 && "resnet50".contains(&arguments.case) {
        quantizers(&place)?;
    }
    Ok(())
}

/// Latency of float and int8 models, everywhere.
fn latency(place: &Place) -> Result<(), Failure> {
    println!("latency of one sample, ms (float / int8 = how many times faster int8 is)");
    println!(
        "{:14} {:>7} {:>26} {:>26} {:>26} {:>14}",
        "network", "threads", "ours", "ONNX Runtime", "OpenVINO", "int8 ours/ORT"
    );
    for network in NETWORKS.iter().filter(|n| n.contains(&place.arguments.case)) {
        let float = place.file(&format!("{network}.onnx"));
        place.updraft(&["new", network, "--output"], &[&float])?;
        let samples = place.file(&format!("{network}-samples.npz"));
        place.script(&["inputs", network, &FEW.to_string()], &[&samples])?;
        let one = place.file(&format!("{network}-one.npz"));
        place.script(&["inputs", network, "1"], &[&one])?;
        let int8 = place.file(&format!("{network}-int8.onnx"));
        place.quantize(network, &float, &samples, &int8, &["--samples", &FEW.to_string()])?;
        for threads in &place.arguments.threads {
            let (mut ours_float, mut ours_int8) = (Ours::new(&float, *threads)?, Ours::new(&int8, *threads)?);
            let mut theirs = Vec::new();
            for runtime in ["onnxruntime", "openvino"] {
                for model in [&float, &int8] {
                    let mut command = Command::new(&place.python);
                    command.arg(&place.script).args(["run", runtime]).arg(model).arg(&one).arg(threads.to_string());
                    theirs.push(Theirs::start(&mut command)?);
                }
            }
            let mut best = [StepCost::WORST; 6];
            for round in 0..=place.arguments.rounds {
                // The first round warms up.
                let runs = if round == 0 { 1 } else { place.arguments.runs };
                let mut costs = vec![ours_float.run(runs)?, ours_int8.run(runs)?];
                for side in &mut theirs {
                    costs.push(side.steps(runs)?);
                }
                if round > 0 {
                    best.iter_mut().zip(costs).for_each(|(best, cost)| *best = best.best(cost));
                }
            }
            let shown = |float: &StepCost, int8: &StepCost| {
                format!("{:.2} / {:.2} = {:.2}", float.wall_ms, int8.wall_ms, float.wall_ms / int8.wall_ms)
            };
            println!(
                "{network:14} {threads:>7} {:>26} {:>26} {:>26} {:>14.2}",
                shown(&best[0], &best[1]),
                shown(&best[2], &best[3]),
                shown(&best[4], &best[5]),
                best[1].wall_ms / best[3].wall_ms
            );
        }
    }
    Ok(())
}

/// Time and peak memory of calibrating and writing static int8, ours and ONNX Runtime's.
fn quantizers(place: &Place) -> Result<(), Failure> {
    let count = place.arguments.pictures.to_string();
    println!("\nresnet50 to static int8 with {count} pictures");
    println!(
        "{:10} {:>10} {:>14} {:>10} {:>14} {:>8} {:>8}",
        "method", "ours s", "ours MiB", "ORT s", "ORT MiB", "time", "memory"
    );
    let float = place.file("resnet50.onnx");
    place.updraft(&["new", "resnet50", "--output"], &[&float])?;
    let samples = place.file("resnet50-many.npz");
    place.script(&["inputs", "resnet50", &count], &[&samples])?;
    for method in ["min-max", "entropy"] {
        let ours = place.file("resnet50-ours.onnx");
        let own =
            place.quantize("resnet50", &float, &samples, &ours, &["--samples", &count, "--calibration", method])?;
        let mut command = Command::new(&place.python);
        command.arg(&place.script).arg("quantize").args([&float, &samples, &place.file("resnet50-ort.onnx")]);
        let theirs = child::run_script(command.args([method, &count]))?;
        const MIB: f64 = 1024.0 * 1024.0;
        println!(
            "{method:10} {:>10.1} {:>14.0} {:>10.1} {:>14.0} {:>8.3} {:>8.3}",
            own.seconds,
            own.peak_bytes / MIB,
            theirs.seconds,
            theirs.peak_bytes / MIB,
            own.seconds / theirs.seconds,
            own.peak_bytes / theirs.peak_bytes
        );
    }
    Ok(())
}

impl Place<'_> {
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn updraft(&self, arguments: &[&str], files: &[&Path]) -> Result<(), Failure> {
        let mut command = Command::new(&self.updraft);
        python::run(command.current_dir(&self.folder).args(arguments).args(files).arg("--json").stdout(Stdio::null()))
    }

    fn script(&self, arguments: &[&str], files: &[&Path]) -> Result<(), Failure> {
        python::run(Command::new(&self.python).arg(&self.script).args(arguments).args(files))
    }

    /// Quantizes with the product, by a recipe that reads the samples.
    fn quantize(
        &self,
        network: &str,
        model: &Path,
        samples: &Path,
        out: &Path,
        options: &[&str],
    ) -> Result<Effort, Failure> {
        let inputs: &[&str] =
            if network == "bert" { &["input_ids", "attention_mask", "token_type_ids"] } else { &["image"] };
        let tensors: String =
            inputs.iter().map(|name| format!("[[data.train.tensors]]\nname = \"{name}\"\n")).collect();
        let recipe = self.file(&format!("{network}.toml"));
        let text = format!(
            "[model]\nonnx = {model:?}\n[data.train]\npath = {samples:?}\n{tensors}\n[[data.train.tensors]]\nname = \
             \"label\"\n[train]\nsteps = 1\nbatch = 1\noptimizer = {{ sgd = {{}} }}\nlearning_rate = {{ peak = 0.1 }}\n"
        );
        std::fs::write(&recipe, text)?;
        let mut command = Command::new(&self.updraft);
        command.current_dir(&self.folder).arg("quantize").arg(model).arg("--data").arg(&recipe).arg("--output");
        let (status, effort) = child::run(command.arg(out).args(options).arg("--json"), &self.file("quantize.json"))?;
        if status.success() { Ok(effort) } else { Err(format!("updraft quantize ended with {status}").into()) }
    }
}

/// A model in our engine.
struct Ours {
    session: Box<dyn Session>,
    inputs: Vec<(String, Tensor)>,
}

impl Ours {
    fn new(path: &Path, threads: usize) -> Result<Ours, Failure> {
        let mut model = onnx::read(&std::fs::read(path)?, &onnx::ReadOptions::default())?;
        upgrade::upgrade_model(&mut model)?;
        let sizes = [("N".to_owned(), 1), ("T".to_owned(), 128)].into();
        let mut graph: Graph = cost::at_sizes(&model.graph, &sizes)?;
        infer::infer(&mut graph)?;
        pipeline::inference(&mut graph)?;
        let key = Key::new(1);
        let mut inputs = Vec::new();
        for id in graph.inputs() {
            let shape = graph.known_shape(*id).ok_or("an input has open sizes")?;
            let count: usize = shape.iter().product();
            let tensor = if graph.dtype(*id) == Some(DType::I64) {
                Tensor::new(&shape, &vec![1i64; count])?
            } else {
                Tensor::new(&shape, &(0..count).map(|i| key.normal_f32(i as u64)).collect::<Vec<_>>())?
            };
            inputs.push((graph.value(*id).name.clone(), tensor));
        }
        let session = CpuEngine::new(threads)?.compile(&graph, &CompileOptions::default())?;
        Ok(Ours { session, inputs })
    }

    fn run(&mut self, count: usize) -> Result<StepCost, Failure> {
        let inputs: Vec<(&str, &Tensor)> = self.inputs.iter().map(|(name, t)| (name.as_str(), t)).collect();
        measure(count, || {
            self.session.run(&inputs)?;
            Ok(())
        })
    }
}
