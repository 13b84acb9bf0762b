//! What `updraft optimize` makes of networks that are trained here, beside ONNX Runtime's own quantizer on the same model
//! and the same calibration samples.
//!
//! Everything is judged alike: answers for the whole holdout from both runtimes, scored by one function; latency of one
//! sample on one thread, all models by turns, in time of the processor, which other work on the machine does not lengthen.
//! Training is kept from run to run; searches and quantizers start from nothing every time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use clap::Args;
use serde::Deserialize;
use updraft_compress::interval::{self, Interval};
use updraft_compress::measure::{Answers, Compiled, Metric, Output, Scores, Task, input_names};
use updraft_compress::splits::{Datasets, Split, SplitOptions, Splits};
use updraft_data::{Batch, Dataset, DatasetConfig, read_npz, write_npz};
use updraft_engine::CpuEngine;
use updraft_graph::{Graph, Tensor, infer, onnx, upgrade};
use updraft_passes::loss::{CrossEntropy, Loss};

use super::child::{self, Effort};
use super::compress::PACKAGES;
use super::rounds::{Theirs, measure};
use crate::{Failure, python};

/// Options of `bench optimize`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Only networks whose name contains this.
    #[arg(long, default_value = "")]
    case: String,
    /// Rounds of latency; every model runs in each.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// The Python interpreter to use, instead of an environment made under target/.
    #[arg(long)]
    python: Option<PathBuf>,
}

/// A network, and the ways to shrink it that the search's answer is compared with.
struct Case {
    name: &'static str,
    recipe: &'static str,
    /// Arguments of `updraft quantize`.
    ours: &'static [(&'static str, &'static [&'static str])],
    /// Methods of the script.
    theirs: &'static [(&'static str, &'static str)],
}

const PICTURES_OURS: &[(&str, &[&str])] = &[("static int8", &["--samples", "512"])];
const PICTURES_THEIRS: &[(&str, &str)] = &[("static int8, min-max", "min-max"), ("static int8, entropy", "entropy")];

const CASES: &[Case] = &[
    Case { name: "mnist", recipe: "examples/mnist/updraft.toml", ours: PICTURES_OURS, theirs: PICTURES_THEIRS },
    Case { name: "resnet8", recipe: "examples/mnist/resnet8.toml", ours: PICTURES_OURS, theirs: PICTURES_THEIRS },
    Case {
        name: "gpt",
        recipe: "examples/shakespeare/updraft.toml",
        ours: &[
            ("dynamic int8", &["--mode", "dynamic"]),
            ("int4 weights", &["--mode", "weight-only", "--bits", "4", "--block", "32"]),
            ("int4 weights, GPTQ", &["--mode", "weight-only", "--bits", "4", "--block", "32", "--rounding", "gptq"]),
        ],
        theirs: &[("dynamic int8", "dynamic"), ("int4 weights", "int4")],
    },
];

/// Samples that are answered at once where only answers count.
const BATCH: usize = 100;

/// Time that a model runs in one round, so that the clock's grain does not show.
const ROUND_MS: f64 = 25.0;

/// More runs than this make no round better.
const RUNS_MAX: f64 = 2000.0;

/// The chance that an interval does not hold the truth.
const ALPHA: f64 = 0.05;

/// What all cases work with.
struct Place<'a> {
    root: &'a Path,
    python: PathBuf,
    updraft: PathBuf,
    folder: PathBuf,
    arguments: &'a Arguments,
}

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    if cfg!(debug_assertions) {
        return Err(
            "a debug build says nothing about speed: use `cargo run --release --package xtask -- bench optimize`"
                .into(),
        );
    }
    let python = match &arguments.python {
        Some(python) => python.clone(),
        None => python::environment(root, "compress", PACKAGES)?,
    };
    let folder = root.join("target/bench-optimize");
    std::fs::create_dir_all(&folder)?;
    python::run(Command::new("cargo").current_dir(root).args(["build", "--quiet", "--release", "-p", "updraft"]))?;
    let place = Place { root, python, updraft: root.join("target/release/updraft"), folder, arguments };
    for case in CASES.iter().filter(|c| c.name.contains(&arguments.case)) {
        place.case(case)?;
    }
    Ok(())
}

/// The part of a recipe that says what a model is judged by.
#[derive(Deserialize)]
struct Recipe {
    data: BTreeMap<String, DatasetConfig>,
    train: Train,
    #[serde(default)]
    evaluate: Evaluate,
}

#[derive(Deserialize)]
struct Train {
    seed: u64,
    #[serde(default = "label")]
    target: String,
}

fn label() -> String {
    "label".to_owned()
}

#[derive(Deserialize)]
#[serde(default)]
struct Evaluate {
    batch: usize,
}

impl Default for Evaluate {
    fn default() -> Evaluate {
        Evaluate { batch: BATCH }
    }
}

/// A model of one form.
struct Form {
    name: String,
    file: PathBuf,
    effort: Option<Effort>,
}

/// How a form answers in one runtime.
struct Judged {
    scores: Scores,
    /// The class with the highest logit, for each label.
    top: Vec<usize>,
}

impl Place<'_> {
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn script(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(self.root.join("xtask/src/bench/optimize.py")).args(arguments);
        command
    }

    fn product(&self, store: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.updraft);
        command.args(arguments).arg("--json").arg("--store").arg(self.file(store));
        command
    }

    /// Trains, shrinks in all ways, and prints the table.
    fn case(&self, case: &Case) -> Result<(), Failure> {
        let recipe = self.root.join(case.recipe);
        let float = self.file(&format!("{}.onnx", case.name));
        let mut train = self.product("trained", &["train"]);
        let (status, effort) = child::run(train.arg(&recipe).arg("--output").arg(&float), &self.answer(case, "train"))?;
        if !status.success() {
            return Err(format!("training {} ended with {status}", case.name).into());
        }
        let samples = Samples::new(&recipe, &float)?;
        let mut forms =
            vec![Form { name: "float".to_owned(), file: float.clone(), effort: Some(effort) }, self.search(case)?];
        for (name, options) in case.ours {
            forms.push(self.quantize(case, name, options)?);
        }
        let calibration = self.file(&format!("{}-calibration.npz", case.name));
        write_npz(&calibration, &samples.inputs(&samples.calibration))?;
        let mut refused = Vec::new();
        for (name, method) in case.theirs {
            let file = self.file(&format!("{}-ort-{method}.onnx", case.name));
            let mut command = self.script(&["quantize", method]);
            match child::run_script(command.args([&float, &calibration, &file])) {
                Ok(effort) => forms.push(Form { name: format!("ORT {name}"), file, effort: Some(effort) }),
                Err(problem) => refused.push(format!("ORT {name}: {problem}")),
            }
        }
        self.table(case, &samples, &forms)?;
        refused.iter().for_each(|line| println!("{line}"));
        Ok(())
    }

    fn answer(&self, case: &Case, verb: &str) -> PathBuf {
        self.file(&format!("{}-{verb}.json", case.name))
    }

    fn search(&self, case: &Case) -> Result<Form, Failure> {
        // A store of its own, so that the search measures all it says.
        let store = format!("{}-search", case.name);
        if self.file(&store).exists() {
            std::fs::remove_dir_all(self.file(&store))?;
        }
        let (float, file) =
            (self.file(&format!("{}.onnx", case.name)), self.file(&format!("{}-optimized.onnx", case.name)));
        let mut command = self.product(&store, &["optimize"]);
        command.arg(&float).arg("--data").arg(self.root.join(case.recipe)).arg("--output").arg(&file);
        let (status, effort) = child::run(&mut command, &self.answer(case, "optimize"))?;
        // 7 says that the original was the best.
        if !status.success() && status.code() != Some(7) {
            return Err(format!("updraft optimize of {} ended with {status}", case.name).into());
        }
        Ok(Form { name: "updraft optimize".to_owned(), file, effort: Some(effort) })
    }

    fn quantize(&self, case: &Case, name: &str, options: &[&str]) -> Result<Form, Failure> {
        let float = self.file(&format!("{}.onnx", case.name));
        let file = self.file(&format!("{}-{}.onnx", case.name, name.replace([' ', ','], "-")));
        let mut command = self.product("quantized", &["quantize"]);
        // Without data where none is needed: it would only be measured on.
        if !options.contains(&"--mode") || options.contains(&"--rounding") {
            command.arg("--data").arg(self.root.join(case.recipe));
        }
        let (status, effort) =
            child::run(command.arg(&float).arg("--output").arg(&file).args(options), &self.answer(case, "quantize"))?;
        if !status.success() {
            return Err(format!("updraft quantize of {} ended with {status}", case.name).into());
        }
        Ok(Form { name: format!("updraft {name}"), file, effort: Some(effort) })
    }

    fn table(&self, case: &Case, samples: &Samples, forms: &[Form]) -> Result<(), Failure> {
        let inputs = self.file(&format!("{}-holdout.npz", case.name));
        write_npz(&inputs, &samples.inputs(&samples.holdout))?;
        let mut ours = Vec::new();
        let mut theirs: Vec<Result<Judged, String>> = Vec::new();
        for form in forms {
            ours.push(samples.ours(form)?);
            let answers = self.file(&format!("{}-answers.npz", case.name));
            let answered =
                self.script(&["answer"]).args([&form.file, &inputs, &answers]).stderr(Stdio::piped()).output()?;
            theirs.push(if answered.status.success() {
                let output = read_npz(&answers, u64::MAX)?.into_iter().next().ok_or("no answers")?;
                Ok(samples.judge(output.1)?)
            } else {
                let text = String::from_utf8_lossy(&answered.stderr).into_owned();
                Err(text.trim_end().lines().last().unwrap_or("").to_owned())
            });
        }
        let times = self.latency(case, samples, forms, &theirs)?;
        let metric = samples.metric;
        println!("\n{}: {} on {} samples of the holdout", case.name, metric.name(), ours[0].scores.len());
        println!(
            "{:26} {:>9} {:>24} {:>9} {:>9} {:>9} {:>16} {:>16} {:>10} {:>7} {:>6}",
            "form",
            metric.name(),
            "drop (95 %), %",
            "in ORT",
            "as float",
            "as ORT",
            "ours ms, ratio",
            "ORT ms, ratio",
            "bytes",
            "s",
            "MiB"
        );
        for (i, form) in forms.iter().enumerate() {
            let shown = |scores: &Scores| match metric {
                Metric::Accuracy => format!("{:.2} %", 100.0 * metric.value(scores)),
                _ => format!("{:.4}", metric.value(scores)),
            };
            let drop = metric.drop(&ours[0].scores, &ours[i].scores, ALPHA);
            let same = |a: &Judged, b: &Judged| format!("{:.2} %", 100.0 * share_of_equal(&a.top, &b.top));
            let time = |t: &Option<Time>| match t {
                Some(t) => format!("{:.3} {:.3}", t.milliseconds.estimate, t.ratio.estimate),
                None => "-".to_owned(),
            };
            let theirs_i = theirs[i].as_ref().ok();
            println!(
                "{:26} {:>9} {:>24} {:>9} {:>9} {:>9} {:>16} {:>16} {:>10} {:>7.1} {:>6.0}",
                form.name,
                shown(&ours[i].scores),
                format!("{:.2} ({:.2} to {:.2})", 100.0 * drop.estimate, 100.0 * drop.low, 100.0 * drop.high),
                theirs_i.map_or("-".to_owned(), |t| shown(&t.scores)),
                same(&ours[i], &ours[0]),
                theirs_i.map_or("-".to_owned(), |t| same(&ours[i], t)),
                time(&times[i].0),
                time(&times[i].1),
                std::fs::metadata(&form.file)?.len(),
                form.effort.map_or(f64::NAN, |e| e.seconds),
                form.effort.map_or(f64::NAN, |e| e.peak_bytes / (1024.0 * 1024.0)),
            );
        }
        for (form, problem) in forms.iter().zip(&theirs).filter_map(|(f, t)| Some((f, t.as_ref().err()?))) {
            println!("{} in ONNX Runtime: {problem}", form.name);
        }
        Ok(())
    }

    /// Time of one answer on one thread, ours and theirs.
    fn latency(
        &self,
        case: &Case,
        samples: &Samples,
        forms: &[Form],
        theirs: &[Result<Judged, String>],
    ) -> Result<Vec<BothTimes>, Failure> {
        let one = self.file(&format!("{}-one.npz", case.name));
        let first = samples.rows(&samples.holdout, 0..1)?;
        write_npz(&one, &samples.inputs(&first))?;
        let engine = CpuEngine::new(1)?;
        let mut sides: Vec<Option<Side>> = Vec::new();
        for form in forms {
            let compiled = Compiled::new(&engine, &read(&form.file)?, &samples.task)?;
            sides.push(Some(Side::Ours(Box::new(compiled), batch(first.clone(), 1))));
        }
        for (form, judged) in forms.iter().zip(theirs) {
            let mut command = Command::new(&self.python);
            command.arg(self.root.join("xtask/src/bench/compress.py")).args(["run", "onnxruntime"]);
            command.arg(&form.file).arg(&one).arg("1");
            sides.push(judged.is_ok().then(|| Theirs::start(&mut command).map(Side::Theirs)).transpose()?);
        }
        let mut runs = Vec::new();
        for side in &mut sides {
            let warm = side.as_mut().map(|s| s.milliseconds(3).and_then(|_| s.milliseconds(10))).transpose()?;
            runs.push((ROUND_MS / warm.unwrap_or(ROUND_MS)).ceil().min(RUNS_MAX) as usize);
        }
        let mut rounds: Vec<Vec<f64>> = vec![Vec::new(); sides.len()];
        for _ in 0..self.arguments.rounds {
            for ((side, runs), times) in sides.iter_mut().zip(&runs).zip(&mut rounds) {
                if let Some(side) = side {
                    times.push(side.milliseconds(*runs)?);
                }
            }
        }
        let (own, other) = rounds.split_at(forms.len());
        let time = |all: &[Vec<f64>], i: usize| {
            let ratios: Vec<f64> = all[i].iter().zip(&all[0]).map(|(form, float)| form / float).collect();
            (!ratios.is_empty()).then(|| Time {
                milliseconds: interval::median(&all[i], ALPHA),
                ratio: interval::median(&ratios, ALPHA),
            })
        };
        Ok((0..forms.len()).map(|i| (time(own, i), time(other, i))).collect())
    }
}

/// A model that runs, here or there.
enum Side {
    Ours(Box<Compiled>, Batch),
    Theirs(Theirs),
}

impl Side {
    /// Time of the processor for one answer.
    fn milliseconds(&mut self, runs: usize) -> Result<f64, Failure> {
        let cost = match self {
            Side::Ours(compiled, batch) => measure(runs, || {
                compiled.answer(batch)?;
                Ok(())
            })?,
            Side::Theirs(theirs) => theirs.steps(runs)?,
        };
        Ok(cost.cpu_ms)
    }
}

/// Ours and theirs; nothing where a form does not run there.
type BothTimes = (Option<Time>, Option<Time>);

struct Time {
    milliseconds: Interval,
    /// To the float model in the same runtime, round by round.
    ratio: Interval,
}

/// The samples of a recipe as `updraft optimize` divides them.
struct Samples {
    task: Task,
    metric: Metric,
    /// The inputs of the model among the tensors of a sample.
    inputs: Vec<String>,
    calibration: Vec<(String, Tensor)>,
    holdout: Vec<(String, Tensor)>,
    count: usize,
}

impl Samples {
    fn new(recipe: &Path, model: &Path) -> Result<Samples, Failure> {
        let folder = recipe.parent().ok_or("a recipe is in a folder")?;
        let parsed: Recipe = toml::from_str(&std::fs::read_to_string(recipe)?)?;
        let open = |split: &str| -> Result<Option<Arc<Dataset>>, Failure> {
            let config = parsed.data.get(split);
            Ok(config.map(|c| Dataset::open(c, folder)).transpose()?.map(Arc::new))
        };
        let train = open("train")?.ok_or("no training data")?;
        let datasets = Datasets { train, validation: open("validation")?, test: open("test")? };
        let options = SplitOptions {
            seed: parsed.train.seed,
            batch_size: parsed.evaluate.batch,
            threads: 1,
            calibration_samples: 512,
            share_limit: None,
            alpha: ALPHA,
        };
        let splits = Splits::new(&datasets, &options)?;
        let graph = read(model)?;
        let loss = Loss::CrossEntropy(CrossEntropy::default());
        let task = Task { loss, output: None, target: parsed.train.target };
        Ok(Samples {
            metric: Metric::of(&task, &graph),
            inputs: input_names(&graph),
            calibration: gathered(&splits.calibration)?,
            holdout: gathered(&splits.holdout)?,
            count: usize::try_from(splits.holdout.len())?,
            task,
        })
    }

    /// The arrays that the model reads.
    fn inputs(&self, arrays: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
        arrays.iter().filter(|(name, _)| self.inputs.contains(name)).cloned().collect()
    }

    fn rows(
        &self,
        arrays: &[(String, Tensor)],
        rows: std::ops::Range<usize>,
    ) -> Result<Vec<(String, Tensor)>, Failure> {
        arrays.iter().map(|(name, tensor)| Ok((name.clone(), part(tensor, rows.clone())?))).collect()
    }

    /// A form's answers in our engine.
    fn ours(&self, form: &Form) -> Result<Judged, Failure> {
        let mut compiled = Compiled::new(&CpuEngine::new(1)?, &read(&form.file)?, &self.task)?;
        let mut parts = Vec::new();
        for from in (0..self.count).step_by(BATCH) {
            let to = (from + BATCH).min(self.count);
            parts.push(compiled.answer(&batch(self.rows(&self.holdout, from..to)?, to - from))?.tensor);
        }
        self.judge(joined(&parts)?)
    }

    fn judge(&self, answers: Tensor) -> Result<Judged, Failure> {
        let classes = answers.shape().last().copied().unwrap_or(1).max(1);
        let best = |row: &[f64]| (1..row.len()).fold(0, |best, c| if row[c] > row[best] { c } else { best });
        let top = answers.to_f64()?.chunks_exact(classes).map(best).collect();
        let mut scores = Scores::default();
        let output = Output { name: "output".to_owned(), tensor: answers };
        scores.add(&self.task, &batch(self.holdout.clone(), self.count), &output)?;
        Ok(Judged { scores, top })
    }
}

fn share_of_equal(a: &[usize], b: &[usize]) -> f64 {
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len().max(1) as f64
}

fn batch(tensors: Vec<(String, Tensor)>, count: usize) -> Batch {
    Batch { step: 0, epoch: 0, tensors, samples: (0..count as u64).collect() }
}

/// All samples of a split, as one array a tensor.
fn gathered(split: &Split) -> Result<Vec<(String, Tensor)>, Failure> {
    let mut parts: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
    for batch in split.batches(0)? {
        let batch = batch?;
        for (name, tensor) in &batch.tensors {
            parts.entry(name.clone()).or_default().push(part(tensor, 0..batch.samples.len())?);
        }
    }
    parts.into_iter().map(|(name, parts)| Ok((name, joined(&parts)?))).collect()
}

/// Some rows of a tensor.
fn part(tensor: &Tensor, rows: std::ops::Range<usize>) -> Result<Tensor, Failure> {
    let mut shape = tensor.shape().to_vec();
    let all = shape.first_mut().ok_or("a scalar has no rows")?;
    let row_bytes = tensor.byte_len() / (*all).max(1);
    *all = rows.len();
    let bytes = tensor.bytes().get(rows.start * row_bytes..rows.end * row_bytes).ok_or("a tensor has too few rows")?;
    Ok(Tensor::from_bytes(tensor.dtype(), &shape, bytes)?)
}

/// Tensors as one, row after row.
fn joined(parts: &[Tensor]) -> Result<Tensor, Failure> {
    let first = parts.first().ok_or("there are no samples")?;
    let mut shape = first.shape().to_vec();
    shape[0] = parts.iter().map(|p| p.shape()[0]).sum();
    let bytes: Vec<u8> = parts.iter().flat_map(|p| p.bytes()).copied().collect();
    Ok(Tensor::from_bytes(first.dtype(), &shape, &bytes)?)
}

fn read(path: &Path) -> Result<Graph, Failure> {
    let mut model = onnx::read(&std::fs::read(path)?, &onnx::ReadOptions::default())?;
    upgrade::upgrade_model(&mut model)?;
    infer::infer(&mut model.graph)?;
    Ok(model.graph)
}
