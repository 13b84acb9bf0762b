//! What a user of the command line sees.

#[cfg(feature = "cluster")]
mod cluster;
mod data;
#[cfg(feature = "redis")]
mod follow;
#[cfg(any(feature = "redis", feature = "kafka"))]
mod followed;
#[cfg(feature = "kafka")]
mod kafka;
mod kill;
mod lanes;
mod optimize;
mod prune;
mod quantize;
mod query;
mod transform;
mod validate;
mod workplace;

use clap::CommandFactory;
use serde_json::Value;
use updraft::cli::Cli;
use updraft_data::{read_npz, write_npz};
use updraft_graph::{DType, Graph, Model, Tensor, onnx, zoo};
use workplace::{RECIPE, Workplace};

#[test]
fn the_manual_is_as_it_was_reviewed() {
    let mut command = Cli::command().term_width(100);
    command.build();
    insta::assert_snapshot!("updraft", command.render_long_help());
    assert_manual(&mut command, "");
}

/// The pages of all verbs below a command.
fn assert_manual(command: &mut clap::Command, above: &str) {
    for verb in command.get_subcommands_mut().filter(|c| c.get_name() != "help") {
        let name = format!("{above}{}", verb.get_name());
        insta::assert_snapshot!(name.as_str(), verb.render_long_help());
        assert_manual(verb, &format!("{name}_"));
    }
}

/// Stages of an answer, by name, and whether each was reused.
fn reused(answer: &Value) -> Vec<(String, bool)> {
    let stages = answer["stages"].as_array().unwrap();
    stages.iter().map(|s| (s["stage"].as_str().unwrap().to_owned(), s["reused"].as_bool().unwrap())).collect()
}

fn redone(answer: &Value) -> Vec<String> {
    reused(answer).into_iter().filter(|(_, reused)| !reused).map(|(stage, _)| stage).collect()
}

#[test]
fn a_run_is_reused_where_nothing_changed_and_redone_from_where_something_did() {
    let workplace = Workplace::new();
    let first = workplace.json(&["run", "."]);
    assert!(reused(&first).iter().all(|(_, reused)| !reused), "{first:#}");
    assert!(first["metrics"]["test_accuracy"].as_f64().unwrap() > 0.6, "{first:#}");

    let second = workplace.json(&["run", "."]);
    assert_eq!(redone(&second), [""; 0]);
    assert_eq!(second["artifacts"], first["artifacts"]);

    // A comment is in the report and in nothing else.
    workplace.write_recipe(&format!("# changed\n{RECIPE}"));
    assert_eq!(redone(&workplace.json(&["run", "."])), ["report", "report.html"]);

    workplace.write_recipe(&RECIPE.replace("keep = 2", "keep = 3"));
    assert_eq!(redone(&workplace.json(&["run", "."])), ["report", "report.html"]);

    workplace.write_recipe(&RECIPE.replace("peak = 0.01", "peak = 0.02"));
    let changed = workplace.json(&["run", "."]);
    assert_eq!(redone(&changed), ["train", "evaluate.test", "export", "report", "report.html"]);
    assert_ne!(changed["model_digest"], first["model_digest"]);
}

#[test]
fn a_seed_gives_the_same_model_for_any_number_of_threads_and_another_seed_another() {
    let workplace = Workplace::new();
    let digest = |arguments: &[&str]| {
        let all = [&["train", "."], arguments].concat();
        workplace.json(&all)["model_digest"].as_str().unwrap().to_owned()
    };
    let one = digest(&["--threads", "1", "--store", "one"]);
    assert_eq!(digest(&["--threads", "2", "--store", "two"]), one);
    assert_eq!(digest(&["--threads", "5", "--store", "five"]), one);
    assert_ne!(digest(&["--seed", "4", "--store", "other"]), one);
}

#[test]
fn the_files_of_a_run_are_where_it_says_and_the_report_needs_no_network() {
    let workplace = Workplace::new();
    workplace.write_recipe(&format!("{RECIPE}\n[export]\npath = \"out/points.onnx\"\n"));
    let answer = workplace.json(&["run", "."]);
    let file = |name: &str| std::fs::read(workplace.path(answer["files"][name].as_str().unwrap())).unwrap();
    assert_eq!(file("model"), file("export"));
    let report: Value = serde_json::from_slice(&file("report_json")).unwrap();
    assert_eq!(report["model"]["digest"], answer["model_digest"]);
    assert_eq!(report["metrics"], answer["metrics"]);
    let confusion: u64 = report["test"]["confusion"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row.as_array().unwrap())
        .map(|count| count.as_u64().unwrap())
        .sum();
    assert_eq!(confusion, 96);
    let page = String::from_utf8(file("report_html")).unwrap();
    assert!(page.contains(answer["model_digest"].as_str().unwrap()));
    for foreign in ["http://", "https://", "src=", "@import", "<link"] {
        assert!(!page.contains(foreign), "{foreign}");
    }

    let model = answer["files"]["model"].as_str().unwrap();
    let lineage = workplace.json(&["lineage", model]);
    let kinds: Vec<&str> =
        lineage["lineage"].as_array().unwrap().iter().map(|a| a["origin"]["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds[..2], ["export", "model"]);
    for kind in ["network", "dataset"] {
        assert!(kinds.contains(&kind), "{kinds:?}");
    }
}

#[test]
fn eval_measures_a_model_file_as_the_run_measured_its_own() {
    let workplace = Workplace::new();
    let run = workplace.json(&["run", "."]);
    let model = run["files"]["model"].as_str().unwrap();
    let eval = workplace.json(&["eval", ".", "--model", model]);
    assert_eq!(eval["metrics"]["accuracy"], run["metrics"]["test_accuracy"]);
    assert_eq!(eval["metrics"]["loss"], run["metrics"]["test_loss"]);
}

#[test]
fn a_student_is_taught_with_labels_or_without_and_its_lineage_names_the_teacher() {
    let workplace = Workplace::new();
    let teacher = workplace.json(&["train", ".", "--output", "teacher.onnx"]);
    let student = ["--student", "zoo:mlp", "--option", "inputs=4", "--option", "hidden=8", "--option", "classes=3"];
    let distill = |more: &[&str]| {
        workplace.json(&[&["distill", "--teacher", "teacher.onnx", "--data", "."], &student[..], more].concat())
    };
    let taught = distill(&["--output", "student.onnx"]);
    let accuracy = |answer: &Value, who: &str| answer["results"][who]["metrics"]["accuracy"].as_f64().unwrap();
    assert!(accuracy(&taught, "teacher") > 0.6, "{taught:#}");
    assert!(accuracy(&taught, "student") > accuracy(&taught, "student_before"), "{taught:#}");
    let eval = workplace.json(&["eval", ".", "--model", "student.onnx"]);
    assert_eq!(eval["metrics"]["accuracy"].as_f64().unwrap(), accuracy(&taught, "student"));
    let lineage = workplace.json(&["lineage", "student.onnx"]);
    let parents = |kind: &str| {
        let artifacts = lineage["lineage"].as_array().unwrap().clone();
        let of_kind = artifacts.into_iter().find(|a| a["origin"]["kind"] == kind).unwrap();
        of_kind["origin"]["parents"].as_array().unwrap().clone()
    };
    for who in ["teacher", "network"] {
        assert!(parents("model").contains(&taught["artifacts"][who]), "{who}: {lineage:#}");
    }
    assert_ne!(taught["artifacts"]["teacher"], teacher["artifacts"]["network"]);

    // Without labels in the training data, and with hidden values of different widths brought together.
    let points = read_npz(&workplace.path("train.npz"), u64::MAX).unwrap();
    let points: Vec<_> = points.into_iter().filter(|(name, _)| name == "features").collect();
    for name in ["train.npz", "validation.npz"] {
        write_npz(&workplace.path(name), &points).unwrap();
    }
    let relu = |file: &str| {
        let model = onnx::read(&std::fs::read(workplace.path(file)).unwrap(), &Default::default()).unwrap();
        let (_, node) = model.graph.nodes().find(|(_, n)| n.op == "Relu").unwrap();
        model.graph.value(node.outputs[0].unwrap()).name.clone()
    };
    let pair = format!("{}={}", relu("teacher.onnx"), relu("student.onnx"));
    let free = distill(&["--label-free", "--match", &pair]);
    assert!(accuracy(&free, "student") > accuracy(&free, "student_before"), "{free:#}");

    let arguments = ["distill", "--teacher", "teacher.onnx", "--data", ".", "--label-free", "--match"];
    let (code, message) = workplace.failure(&[&arguments[..], &["Rel=Relu"]].concat());
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("is no value of the teacher"), "{message}");
    let (code, message) = workplace.failure(&[&arguments[..], &["Relu"]].concat());
    assert_eq!(code, 2, "{message}");
}

#[test]
fn training_with_the_rounding_in_the_loop_writes_a_graph_of_the_same_nodes_with_other_numbers() {
    let workplace = Workplace::new();
    workplace.json(&["train", ".", "--output", "float.onnx"]);
    let quantize = |output: &str, more: &[&str]| {
        workplace.json(&[&["quantize", "float.onnx", "--data", ".", "--output", output], more].concat());
        onnx::read(&std::fs::read(workplace.path(output)).unwrap(), &Default::default()).unwrap().graph
    };
    let (plain, aware) = (quantize("plain.onnx", &[]), quantize("aware.onnx", &["--aware", "30"]));
    let nodes = |graph: &Graph| {
        let mut nodes: Vec<String> = graph.nodes().map(|(_, n)| n.op.clone()).collect();
        nodes.sort();
        nodes
    };
    assert_eq!(nodes(&aware), nodes(&plain));
    assert_ne!(aware, plain);
    let accuracy =
        |model: &str| workplace.json(&["eval", ".", "--model", model])["metrics"]["accuracy"].as_f64().unwrap();
    // Thirty steps at a tenth of the rate from a network that is trained: a few of 96 samples may fall either way.
    assert!(accuracy("aware.onnx") >= accuracy("float.onnx") - 0.05);
    let arguments = ["quantize", "float.onnx", "--mode", "dynamic", "--aware", "30", "--output", "dynamic.onnx"];
    let (code, message) = workplace.failure(&arguments);
    assert_eq!(code, 2, "{message}");
}

#[test]
fn wrong_recipes_and_arguments_exit_with_two_and_say_what_is_known() {
    let workplace = Workplace::new();
    for (from, to, expected) in [
        ("batch = 10", "bacth = 10", "updraft.toml:15: unknown key `bacth`, did you mean `batch`?"),
        ("zoo = \"mlp\"", "zoo = \"mpl\"", "updraft.toml:5: `model.zoo` is `mpl`, did you mean `mlp`?"),
        ("hidden = 16", "hiden = 16", "did you mean \"hidden\"?"),
    ] {
        workplace.write_recipe(&RECIPE.replace(from, to));
        let (code, message) = workplace.failure(&["run", "."]);
        assert_eq!(code, 2, "{message}");
        assert!(message.contains(expected), "{message}");
    }
    let (code, message) = workplace.failure(&["new", "gptt", "--output", "x.onnx"]);
    assert_eq!(code, 2);
    assert!(message.contains("a similar value exists: 'gpt'"), "{message}");
}

#[test]
fn a_loss_that_is_no_number_stops_with_step_samples_and_the_last_good_checkpoint() {
    let workplace = Workplace::new();
    let recipe = RECIPE
        .replace("optimizer = { adamw = {} }", "optimizer = { sgd = {} }")
        .replace("peak = 0.01", "peak = 1e30")
        .replace("clip_norm = 1.0\n", "")
        .replace("every_steps = 7", "every_steps = 1");
    workplace.write_recipe(&recipe);
    let (code, message) = workplace.failure(&["train", "."]);
    assert_eq!(code, 5, "{message}");
    assert!(message.contains("error: step "), "{message}");
    assert!(message.contains("train.npz"), "{message}");
    assert!(!workplace.path("model.onnx").exists());
}

#[test]
fn infer_answers_by_name_and_names_what_is_missing_or_unknown() {
    let workplace = Workplace::new();
    workplace.json(&["new", "mlp", "--set", "inputs=4", "--set", "classes=3", "--output", "mlp.onnx"]);
    let save = |arrays: &[(&str, Tensor)]| {
        let arrays: Vec<_> = arrays.iter().map(|(name, t)| ((*name).to_owned(), t.clone())).collect();
        write_npz(&workplace.path("x.npz"), &arrays).unwrap();
    };
    let infer = ["infer", "mlp.onnx", "--input", "x.npz", "--output", "y.npz"];
    let points = Tensor::new::<f32>(&[2, 4], &[0.5; 8]).unwrap();
    save(&[("features", points.clone())]);
    workplace.json(&infer);
    let outputs = read_npz(&workplace.path("y.npz"), 1 << 20).unwrap();
    assert_eq!((outputs[0].0.as_str(), outputs[0].1.shape()), ("logits", [2, 3].as_slice()));

    std::fs::remove_file(workplace.path("y.npz")).unwrap();
    let wide = Tensor::zeros(DType::F64, &[2, 4]).unwrap();
    for (arrays, expected) in [
        (vec![], "input `features` (f32[N, 4]) is missing"),
        (vec![("featurs", points.clone())], "the model has no input `featurs`, did you mean `features`?"),
        (vec![("features", wide)], "input `features` holds f64, the model takes f32"),
        (vec![("features", Tensor::zeros(DType::F32, &[2, 5]).unwrap())], "\"features\""),
    ] {
        save(&arrays);
        let (code, message) = workplace.failure(&infer);
        assert_eq!(code, 3, "{message}");
        assert!(message.contains(expected), "{message}");
        assert!(!workplace.path("y.npz").exists());
    }
}

#[test]
fn data_in_a_file_beside_the_model_is_read_and_its_absence_named() {
    let workplace = Workplace::new();
    let entry = zoo::find("mlp").unwrap();
    let graph = entry.build(&zoo::Options::of(entry, &[]).unwrap(), 1).unwrap();
    let mut outside = Vec::new();
    let mut sink = |bytes: &[u8]| {
        outside.extend_from_slice(bytes);
        Ok(())
    };
    let external = Some(onnx::External { location: "weights.bin", bytes_min: 1000, sink: &mut sink });
    let inside = onnx::write(&Model::new(graph), onnx::WriteOptions { external }).unwrap();
    std::fs::write(workplace.path("model.onnx"), inside).unwrap();
    std::fs::write(workplace.path("weights.bin"), &outside).unwrap();
    let parameters = 784 * 256 + 256 + 256 * 10 + 10;
    assert_eq!(workplace.json(&["inspect", "model.onnx"])["parameters"], parameters);
    for (content, expected) in [(Some(&outside[..100]), "has 100 bytes"), (None, "No such file")] {
        match content {
            Some(content) => std::fs::write(workplace.path("weights.bin"), content).unwrap(),
            None => std::fs::remove_file(workplace.path("weights.bin")).unwrap(),
        }
        let (code, message) = workplace.failure(&["inspect", "model.onnx"]);
        assert_eq!(code, 3, "{message}");
        assert!(message.contains("weights.bin") && message.contains(expected), "{message}");
    }
}

#[test]
fn bench_reports_ordered_percentiles_and_asks_for_open_sizes() {
    let workplace = Workplace::new();
    let small =
        ["--set", "vocabulary=5", "--set", "context=8", "--set", "layers=1", "--set", "heads=1", "--set", "width=4"];
    workplace.json(&[&["new", "gpt", "--output", "gpt.onnx"], small.as_slice()].concat());
    let (code, message) = workplace.failure(&["bench", "gpt.onnx"]);
    assert_eq!(code, 2);
    assert!(message.contains("`tokens` has the open size `T`") && message.contains("--size T="), "{message}");
    let answer =
        workplace.json(&["bench", "gpt.onnx", "--size", "T=8", "--batch", "2", "--runs", "5", "--warm-up", "1"]);
    let at = |name: &str| answer["latency_ns"][name].as_u64().unwrap();
    assert!(at("least") <= at("p50") && at("p50") <= at("p90") && at("p90") <= at("most"), "{answer:#}");
}

/// A character model of the smallest size, trained for a few steps.
const TEXT_RECIPE: &str = r#"
name = "text"

[model]
zoo = "gpt"
options = { vocabulary = 4, context = 8, layers = 1, heads = 1, width = 8 }

[data.train]
path = "abc.txt"
format = { text = { context = 8 } }
tensors = [{ name = "tokens", columns = ["inputs"] }, { name = "next", columns = ["targets"] }]

[train]
steps = 60
batch = 8
target = "next"
optimizer = { adamw = {} }
learning_rate = { peak = 0.03 }
"#;

#[test]
fn generate_writes_what_the_model_has_learnt_and_the_same_for_the_same_seed() {
    let workplace = Workplace::new();
    std::fs::write(workplace.path("abc.txt"), "abc\n".repeat(100)).unwrap();
    workplace.write_recipe(TEXT_RECIPE);
    let run = workplace.json(&["run", "."]);
    let model = run["files"]["model"].as_str().unwrap();
    let generate = |arguments: &[&str]| {
        let all = [&["generate", model, "--prompt", "ab", "--tokens", "18"], arguments].concat();
        workplace.json(&all)["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(generate(&["--temperature", "0"]), "c\nabc\nabc\nabc\nabc\n");
    assert_eq!(generate(&["--seed", "1"]), generate(&["--seed", "1"]));
    let (code, message) = workplace.failure(&["generate", model, "--prompt", "xyz"]);
    assert_eq!(code, 3);
    assert!(message.contains("'x' is not among the 4 characters"), "{message}");
}
