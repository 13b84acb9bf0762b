//! `updraft infer` against ONNX Runtime, on the same models and random inputs.

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
    let mut failed = 0;
    println!("{:30} {:>12} {:>12}", "model", "difference", "of largest");
    for model in &models {
        let name = model.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let file = |end: &str| folder.join(format!("{name}-{end}.npz"));
        python::run(
            Command::new(&python).arg(&script).arg("prepare").arg(model).arg(file("inputs")).arg(file("expected")),
        )?;
        python::run(
            Command::new(&updraft)
                .arg("infer")
                .arg(model)
                .args(["--json", "--input"])
                .arg(file("inputs"))
                .arg("--output")
                .arg(file("actual"))
                .stdout(std::process::Stdio::null()),
        )?;
        let compared =
            Command::new(&python).arg(&script).arg("compare").arg(file("expected")).arg(file("actual")).output()?;
        if !compared.status.success() {
            return Err(format!("{name}: {}", String::from_utf8_lossy(&compared.stderr).trim()).into());
        }
        let numbers: Vec<f64> =
            String::from_utf8(compared.stdout)?.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [difference, scale] = numbers[..] else { return Err(format!("{name}: no numbers came back").into()) };
        println!("{name:30} {difference:>12.3e} {:>12.3e}", difference / scale);
        failed += usize::from(difference > TOLERANCE * scale);
    }
    if failed > 0 {
        Err(format!("{failed} models differ by more than {TOLERANCE:e} of their largest output").into())
    } else {
        Ok(())
    }
}
