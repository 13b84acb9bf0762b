//! Searches as a user of the command line sees them.

use serde_json::Value;

use super::redone;
use super::workplace::{RECIPE, Workplace};

/// A search small enough for the points: a drop of 20 points, one pruning, no time to lose.
const OPTIMIZE: &str = r#"
[optimize]
max_drop = "20%"
time_limit = "2m"
calibration_samples = 64
prune = { ratios = [0.5], recovery_steps = 20 }
"#;

/// The recipe for points with a network large enough to be made smaller.
fn recipe() -> String {
    RECIPE.replace("hidden = 16", "hidden = [64, 64]")
}

#[test]
fn a_run_ends_with_the_optimized_model_and_says_how_it_was_found() {
    let workplace = Workplace::new();
    workplace.write_recipe(&format!("{}\n{OPTIMIZE}", recipe()).replace("max_drop", "objective = \"size\"\nmax_drop"));
    let first = workplace.json(&["run", "."]);
    let found = &first["optimization"];
    let (before, after) = (&found["original"]["size_bytes"], &found["chosen"]["size_bytes"]);
    assert!(after.as_u64().unwrap() < before.as_u64().unwrap(), "{found:#}");
    assert!(found["chosen"]["holdout"]["drop"]["high"].as_f64().unwrap() <= 0.2, "{found:#}");
    assert_eq!(found["splits"]["holdout"], 96);
    let report: Value = serde_json::from_slice(
        &std::fs::read(workplace.path(first["files"]["report_json"].as_str().unwrap())).unwrap(),
    )
    .unwrap();
    let outcome = &report["optimization"]["outcome"];
    let chosen = outcome["chosen"].as_u64().unwrap() as usize;
    assert_eq!(outcome["trials"][chosen], found["chosen"]);
    let page = std::fs::read_to_string(workplace.path(first["files"]["report_html"].as_str().unwrap())).unwrap();
    for section in ["Before and after", "What was tried", "over latency"] {
        assert!(page.contains(section), "{section}");
    }
    let second = workplace.json(&["run", "."]);
    assert_eq!(redone(&second), [""; 0]);
    assert_eq!(second["artifacts"], first["artifacts"]);
}

#[test]
fn a_search_takes_from_the_store_what_it_has_measured_before() {
    let workplace = Workplace::new();
    workplace.write_recipe(&recipe());
    workplace.json(&["train", ".", "--output", "points.onnx"]);
    workplace.write_recipe(&format!("{}\n{OPTIMIZE}", recipe()));
    let search = |limit: &str| {
        workplace.json(&[
            "optimize",
            "points.onnx",
            "--data",
            ".",
            "--objective",
            "size",
            "--max-drop",
            limit,
            "-o",
            "small.onnx",
        ])
    };
    let strict = search("15%");
    let loose = search("40%");
    let size = |answer: &Value| answer["chosen"]["size_bytes"].as_u64().unwrap();
    assert!(size(&loose) <= size(&strict));
    // The original's times are those that were measured first.
    assert_eq!(strict["original"]["speed"], loose["original"]["speed"]);
    assert_eq!(std::fs::metadata(workplace.path("small.onnx")).unwrap().len(), size(&loose));
}

#[test]
fn a_limit_that_cannot_be_met_gives_the_original_and_its_own_exit_code() {
    let workplace = Workplace::new();
    workplace.write_recipe(&recipe());
    workplace.json(&["train", ".", "--output", "points.onnx"]);
    workplace.write_recipe(&format!("{}\n{OPTIMIZE}", recipe()));
    let arguments = ["optimize", "points.onnx", "--data", ".", "--max-drop", "0%", "-o", "same.onnx"];
    let (code, message) = workplace.failure(&arguments);
    assert_eq!(code, 7);
    assert!(message.contains("nothing that was tried is better than the original"), "{message}");
    assert!(message.contains("misses it by"), "{message}");
    let answer: Value =
        serde_json::from_slice(&workplace.command(&arguments).arg("--json").output().unwrap().stdout).unwrap();
    assert_eq!((&answer["error"]["kind"], &answer["chosen"]["name"]), (&"limit".into(), &"original".into()));
    let same = std::fs::read(workplace.path("same.onnx")).unwrap();
    assert_eq!(updraft_base::Digest::of(&same).to_string(), answer["model_digest"].as_str().unwrap());
}

#[test]
fn what_makes_a_search_impossible_is_said_before_it() {
    let workplace = Workplace::new();
    workplace.write_recipe(&recipe());
    workplace.json(&["train", ".", "--output", "points.onnx"]);
    let optimize = |arguments: &[&str]| {
        let all = [&["optimize", "points.onnx", "--data", ".", "-o", "small.onnx"], arguments].concat();
        workplace.failure(&all)
    };
    // 96 samples cannot show a drop of one point, even if no answer changes.
    let (code, message) = optimize(&["--max-drop", "1%"]);
    assert_eq!(code, 3);
    assert!(message.contains("the search split has 96 samples, and"), "{message}");
    let (code, message) = optimize(&["--max-drop", "1"]);
    assert!(code == 2 && message.contains("`1%`"), "{message}");
    let (code, message) = optimize(&["--time-limit", "soon"]);
    assert!(code == 2 && message.contains("`30m`"), "{message}");
    let all = ["optimize", "points.onnx", "--data", ".", "--max-drop", "20%", "-o", "."];
    let (code, message) = workplace.failure(&all);
    assert!(code == 6 && message.contains("cannot write"), "{message}");
    let recipe = recipe().replace("validation = { path = \"validation.npz\" }\ntest = { path = \"test.npz\" }\n", "");
    workplace.write_recipe(&recipe.replace("validate = { every_steps = 30 }", ""));
    let (code, message) = optimize(&["--max-drop", "20%"]);
    assert!(code == 2 && message.contains("data that was not learnt from"), "{message}");
    assert!(!workplace.path("small.onnx").exists());
}
