//! Training on lanes: mixtures, filters and packed rows, killed and resumed.

use std::process::Stdio;

use serde_json::Value;
use updraft_base::{Clock, Key, SystemClock};
use updraft_data::write_npz;
use updraft_graph::Tensor;

use crate::workplace::{RECIPE, Workplace};

/// Half of the samples from each of two files, without those of class 1.
const MIXTURE: &str = r#"
[data]
validation = { path = "validation.npz" }
test = { path = "test.npz" }

[data.train]
lanes = 20
sources = [{ path = "train.npz", weight = 1.0 }, { path = "test.npz", weight = 1.0 }]
filter = [{ column = "label", one_of = [0, 2] }]
"#;

/// Documents of 10 tokens in rows of 16, for a model that predicts the next token.
const PACKED: &str = r#"
name = "packed"

[model]
zoo = "gpt"
options = { vocabulary = 20, context = 16, layers = 1, heads = 1, width = 8 }

[data.train]
path = "tokens.npz"
lanes = 8
tensors = [{ name = "tokens" }]
pack = { length = 16, separator = 0, targets = "next" }

[data.validation]
path = "tokens.npz"
tensors = [{ name = "tokens" }]
pack = { length = 16, separator = 0, targets = "next", fill = { whole = { open_rows = 2 } } }

[train]
steps = 60
batch = 4
target = "next"
optimizer = { adamw = {} }
learning_rate = { peak = 0.01 }
validate = { every_steps = 20 }
checkpoint = { every_steps = 3 }
"#;

fn mixture() -> String {
    let (before, after) = RECIPE.split_once("[data]").unwrap();
    let (_, train) = after.split_once("[train]").unwrap();
    format!("{before}{MIXTURE}\n[train]{train}")
}

fn workplace(recipe: &str) -> Workplace {
    let workplace = Workplace::new();
    let key = Key::new(2);
    let tokens: Vec<i64> = (0..2000).map(|i| 1 + key.below(i, 19) as i64).collect();
    let arrays = [("tokens".to_owned(), Tensor::new(&[200, 10], &tokens).unwrap())];
    write_npz(&workplace.path("tokens.npz"), &arrays).unwrap();
    workplace.write_recipe(recipe);
    workplace
}

#[test]
fn a_run_on_lanes_that_was_killed_goes_on_to_the_same_bits() {
    for recipe in [mixture(), PACKED.to_owned()] {
        let workplace = workplace(&recipe);
        let clock = SystemClock::new();
        let start_ns = clock.monotonic_ns();
        let expected = workplace.json(&["train", ".", "--store", "uninterrupted"]);
        let duration_ms = (clock.monotonic_ns() - start_ns) / 1_000_000;
        for draw in 0..6 {
            let mut command = workplace.command(&["train", ".", "--store", "killed"]);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            clock.sleep_ms(Key::new(3).below(draw, duration_ms.max(1)));
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let resumed = workplace.json(&["train", ".", "--store", "killed"]);
        assert_eq!(resumed["artifacts"], expected["artifacts"], "{recipe}");
    }
}

#[test]
fn a_run_that_follows_a_growing_dataset_ends_as_if_all_had_been_there() {
    let recipe = RECIPE
        .replace(
            "train = { path = \"train.npz\" }",
            "train = { path = \"set\", follow = { wait_s = 60, poll_ms = 50 } }",
        )
        .replace("steps = 120", "steps = 25\nshuffle = { blocks = 2 }");
    let append = |workplace: &Workplace, part: &str| {
        workplace.json(&["data", "ingest", part, "set", "--append", "--shard-rows", "48"]);
    };
    let (whole, growing) = (Workplace::new(), Workplace::new());
    for workplace in [&whole, &growing] {
        workplace.write_recipe(&recipe);
        append(workplace, "train.npz");
    }
    ["validation.npz", "test.npz"].iter().for_each(|part| append(&whole, part));
    let expected = whole.json(&["train", "."]);

    let train = || growing.command(&["train", "."]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut killed = train();
    append(&growing, "validation.npz");
    SystemClock::new().sleep_ms(500);
    // Rows of the last part are not there, so it cannot be done.
    assert!(killed.try_wait().unwrap().is_none());
    killed.kill().unwrap();
    killed.wait().unwrap();
    let mut resumed = train();
    append(&growing, "test.npz");
    assert!(resumed.wait().unwrap().success());
    assert_eq!(growing.json(&["train", "."])["model_digest"], expected["model_digest"]);
}

#[test]
fn lanes_are_part_of_what_determines_a_model() {
    let workplace = workplace(&mixture());
    let digest = |answer: &Value| answer["model_digest"].clone();
    let first = workplace.json(&["train", "."]);
    assert_eq!(digest(&workplace.json(&["train", "."])), digest(&first));
    workplace.write_recipe(&mixture().replace("lanes = 20", "lanes = 10"));
    assert_ne!(digest(&workplace.json(&["train", "."])), digest(&first));
    workplace.write_recipe(&mixture().replace("weight = 1.0 }]", "weight = 3.0 }]"));
    assert_ne!(digest(&workplace.json(&["train", "."])), digest(&first));
}

#[test]
fn training_says_how_long_it_waited_and_for_what() {
    let workplace = Workplace::new();
    let answer = workplace.json(&["run", "."]);
    let file = answer["files"]["report_json"].as_str().unwrap();
    let report: Value = serde_json::from_slice(&std::fs::read(workplace.path(file)).unwrap()).unwrap();
    let waits = &report["training"]["waits"];
    assert_eq!(waits["stalls"]["batches"], 120);
    let waited = &waits["stalls"]["waited"];
    let sum: u64 =
        ["fetch_ns", "decode_ns", "transform_ns", "collate_ns"].map(|s| waited[s].as_u64().unwrap()).iter().sum();
    let share = report["metrics"]["train_wait_share"].as_f64().unwrap();
    assert!((share - sum as f64 / waits["elapsed_ns"].as_f64().unwrap()).abs() < 1e-9);
    let text = String::from_utf8(workplace.command(&["train", "."]).output().unwrap().stdout).unwrap();
    assert!(text.contains("of the time for data") || text.contains("never waited for data"), "{text}");
}

#[test]
fn epochs_that_nobody_can_count_are_refused() {
    let workplace = workplace(&PACKED.replace("steps = 60", "epochs = 2"));
    let (code, message) = workplace.failure(&["train", "."]);
    assert_eq!(code, 2);
    assert!(message.contains("give `steps`"), "{message}");
}
