//! `updraft infer` against ONNX Runtime, on the same models, as they are and quantized by `updraft quantize`, and random
//! inputs.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use crate::Failure;
use crate::python;

/// Options of `agree`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// ONNX files to compare beside networks of the zoo.
    models: Vec<PathBuf>,
    /// The Python interpreter to use, instead of an environment made under target/.
    #[arg(long)]
    python: Option<PathBuf>,
}

/// Networks of the zoo, small where their size says nothing new.
const NETWORKS: &[(&str, &[&str])] = &[
    ("small-cnn", &[]),
    ("resnet8", &[]),
    ("resnet18", &["image=64"]),
    ("mobilenet-v2", &["image=96"]),
    ("vit", &["image=64", "layers=4"]),
    ("gpt", &["vocabulary=65", "context=64", "layers=4", "heads=4", "width=128"]),
    ("bert", &["vocabulary=100", "layers=4"]),
];

/// Largest difference allowed, as a share of the largest output: both sum hundreds of single-precision products in
/// their own order, layer after layer.
const TOLERANCE: f64 = 1e-4;

/// Compares all, prints a line each, and fails where one is too far away.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    let python = match &arguments.python {
        Some(python) => python.clone(),
        None => python::environment(root, "agree", &["numpy==2.4.6", "onnxruntime==1.32.0"])?,
    };
    let script = root.join("xtask/src/agree.py");
    let folder = root.join("target/agree");
    std::fs::create_dir_all(&folder)?;
    python::run(Command::new("cargo").current_dir(root).args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "updraft",
    ]))?;
    let updraft = root.join("target/release/updraft");
    let mut models = Vec::new();
    for (network, settings) in NETWORKS {
        let model = folder.join(format!("{network}.onnx"));
        let settings = settings.iter().flat_map(|s| ["--set", s]);
        python::run(
            Command::new(&updraft)
                .args(["new", network, "--json", "--output"])
                .arg(&model)
                .args(settings)
                .stdout(std::process::Stdio::null()),
        )?;
        models.push(model);
    }
    models.extend(arguments.models.iter().cloned());
    let tools = Tools { python: &python, script: &script, updraft: &updraft, folder: &folder };
    let mut failed = 0;
    println!("{:36} {:>12} {:>12} {:>10} {:>12}", "model", "difference", "of largest", "same top", "its own");
    for model in &models {
        let name = model.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        tools.python(&["prepare"], &[model, &tools.file(&name, "inputs"), &tools.file(&name, "expected")])?;
        failed += usize::from(!tools.compare(&name, &name, model, TOLERANCE, 0.0)?);
        for (form, arguments, tolerance) in FORMS {
            let quantized = tools.quantize(&name, model, form, arguments)?;
            let title = format!("{name}, {form}");
            let file = format!("{name}-{form}");
            let files = [quantized.clone(), tools.file(&name, "inputs"), tools.file(&file, "expected")];
            let spread = tools.numbers("answer", &files, &title)?[0];
            failed += usize::from(!tools.compare(&title, &name, &quantized, *tolerance, spread)?);
        }
    }
    if failed > 0 { Err(format!("{failed} models differ by more than they may").into()) } else { Ok(()) }
}

/// Forms of every model, and how far the answers may be apart, as a share of the largest.
///
/// Integers are the same on both sides but for values that lie in the middle of two codes, where the last bit of a sum
/// decides; one code in a layer then moves the answer by about one in a hundred. Networks of many layers add such moves
/// up; there the yardstick is how far ONNX Runtime's own answers are apart with and without its rewrites, of which ours
/// may be twice as far from those without. Half precision is computed in single
/// precision by one side and rounded after each node by the other: eleven bits, some tens of times.
const FORMS: &[(&str, &[&str], f64)] = &[
    ("static", &["--mode", "static", "--calibration", "entropy"], 0.03),
    ("static-u16", &["--mode", "static", "--activations", "u16"], 1e-3),
    ("dynamic", &["--mode", "dynamic"], 0.03),
    ("weight-only-8", &["--mode", "weight-only"], TOLERANCE),
    ("weight-only-4", &["--mode", "weight-only", "--bits", "4", "--block", "32"], TOLERANCE),
    ("float16", &["--mode", "float16"], 0.01),
];

struct Tools<'a> {
    python: &'a Path,
    script: &'a Path,
    updraft: &'a Path,
    folder: &'a Path,
}

impl Tools<'_> {
    fn file(&self, name: &str, end: &str) -> PathBuf {
        self.folder.join(format!("{name}-{end}.npz"))
    }

    fn python(&self, words: &[&str], files: &[&Path]) -> Result<(), Failure> {
        python::run(Command::new(self.python).arg(self.script).args(words).args(files))
    }

    /// Quantizes a model on its own inputs.
    fn quantize(&self, name: &str, model: &Path, form: &str, arguments: &[&str]) -> Result<PathBuf, Failure> {
        let recipe = self.folder.join(format!("{name}.toml"));
        let inputs = self.file(name, "inputs");
        std::fs::write(
            &recipe,
            format!(
                "[model]\nonnx = {model:?}\n[data]\ntrain = {{ path = {inputs:?} }}\n[train]\nsteps = 1\nbatch = 1\n\
                 optimizer = {{ sgd = {{}} }}\nlearning_rate = {{ peak = 0.1 }}\n"
            ),
        )?;
        let output = self.folder.join(format!("{name}-{form}.onnx"));
        python::run(
            Command::new(self.updraft)
                .arg("quantize")
                .arg(model)
                .args(arguments)
                .args(["--json", "--data"])
                .arg(&recipe)
                .arg("--store")
                .arg(self.folder.join("store"))
                .arg("--output")
                .arg(&output)
                .stdout(std::process::Stdio::null()),
        )?;
        Ok(output)
    }

    /// What the script prints, as numbers.
    fn numbers(&self, word: &str, files: &[PathBuf], title: &str) -> Result<Vec<f64>, Failure> {
        let output = Command::new(self.python).arg(self.script).arg(word).args(files).output()?;
        if !output.status.success() {
            return Err(format!("{title}: {}", String::from_utf8_lossy(&output.stderr).trim()).into());
        }
        let numbers: Vec<f64> =
            String::from_utf8(output.stdout)?.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        if numbers.is_empty() { Err(format!("{title}: no numbers came back").into()) } else { Ok(numbers) }
    }

    /// Runs a model on the inputs kept for `inputs`, compares with what is expected, and prints a line. `spread` is how
    /// far the other side's answers are apart among themselves.
    fn compare(&self, title: &str, inputs: &str, model: &Path, tolerance: f64, spread: f64) -> Result<bool, Failure> {
        let name = model.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let (expected, actual) = (self.file(&name, "expected"), self.file(&name, "actual"));
        python::run(
            Command::new(self.updraft)
                .arg("infer")
                .arg(model)
                .args(["--json", "--input"])
                .arg(self.file(inputs, "inputs"))
                .arg("--output")
                .arg(&actual)
                .stdout(std::process::Stdio::null()),
        )?;
        let numbers = self.numbers("compare", &[expected, actual], title)?;
        let [difference, scale, same] = numbers[..] else {
            return Err(format!("{title}: no numbers came back").into());
        };
        let share = 100.0 * same;
        println!("{title:36} {difference:>12.3e} {:>12.3e} {share:>8.1} % {spread:>12.3e}", difference / scale);
        Ok(difference <= (tolerance * scale).max(2.0 * spread))
    }
}
