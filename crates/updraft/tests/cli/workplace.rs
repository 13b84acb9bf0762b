//! A small recipe in a folder of its own, and the binary run on it.
#![allow(dead_code, reason = "each test program uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use updraft_base::Key;
use updraft_data::write_npz;
use updraft_graph::Tensor;

/// Samples of each of the datasets.
const SAMPLES: usize = 96;

/// Three classes of points around three corners, far enough apart to be told apart, near enough for some mistakes.
fn write_points(path: &Path, seed: u64) {
    let key = Key::new(seed).child("points");
    let labels: Vec<i64> = (0..SAMPLES as i64).map(|i| i % 3).collect();
    let mut points = Vec::with_capacity(4 * SAMPLES);
    for (i, label) in labels.iter().enumerate() {
        for axis in 0..4 {
            let corner = if axis == *label { 2.0 } else { 0.0 };
            points.push(corner + key.normal_f32((4 * i as u64) + axis as u64));
        }
    }
    let arrays = [
        ("features".to_owned(), Tensor::new(&[SAMPLES, 4], &points).unwrap()),
        ("label".to_owned(), Tensor::vector(&labels)),
    ];
    write_npz(path, &arrays).unwrap();
}

/// A recipe for an MLP with dropout, batches that do not divide the data, all that a run can have.
pub const RECIPE: &str = r#"
name = "points"

[model]
zoo = "mlp"
options = { inputs = 4, hidden = 16, classes = 3, dropout = 0.1 }

[data]
train = { path = "train.npz" }
validation = { path = "validation.npz" }
test = { path = "test.npz" }

[train]
steps = 120
batch = 10
seed = 3
clip_norm = 1.0
optimizer = { adamw = {} }
learning_rate = { peak = 0.01, warmup_steps = 5, shape = { cosine = {} } }
validate = { every_steps = 30 }
checkpoint = { every_steps = 7, keep = 2 }

[evaluate]
batch = 20
"#;

/// A folder with the recipe and its data.
pub struct Workplace {
    folder: tempfile::TempDir,
}

impl Workplace {
    pub fn new() -> Workplace {
        let folder = tempfile::tempdir().unwrap();
        for (name, seed) in [("train", 1), ("validation", 2), ("test", 3)] {
            write_points(&folder.path().join(format!("{name}.npz")), seed);
        }
        let workplace = Workplace { folder };
        workplace.write_recipe(RECIPE);
        workplace
    }

    pub fn write_recipe(&self, text: &str) {
        std::fs::write(self.path("updraft.toml"), text).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The binary in this folder.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_updraft"));
        command.current_dir(self.folder.path()).args(arguments).stdin(Stdio::null());
        command.env("UPDRAFT_CACHE_DIR", self.folder.path().join("cache"));
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The answer of a verb that must succeed.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments).arg("--json").output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The exit code and message of a verb that must fail.
    pub fn failure(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.output(arguments);
        assert!(!output.status.success(), "{arguments:?} succeeded");
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }
}
