//! `updraft prune` as a user sees it.

use updraft_base::Key;
use updraft_data::write_npz;
use updraft_graph::{Tensor, onnx};

use crate::workplace::Workplace;

#[test]
fn structured_pruning_makes_a_smaller_model_that_other_verbs_run() {
    let workplace = Workplace::new();
    workplace.json(&["train", ".", "--output", "whole.onnx"]);
    let prune =
        ["prune", "whole.onnx", "--output", "half.onnx", "--data", ".", "--finetune-steps", "30", "--steps", "2"];
    let answer = workplace.json(&prune);
    let report = &answer["report"];
    assert_eq!(report["groups"][0]["before"], 16, "{report:#}");
    assert_eq!(report["groups"][0]["after"], 8, "{report:#}");
    assert_eq!(report["parts"].as_array().unwrap().len(), 2);
    assert!(report["refused"].to_string().contains("is an output of the graph"), "{report:#}");
    // 4 x 16 + 16 + 16 x 3 + 3, and with half of the 16.
    assert_eq!(
        (report["before"]["parameters"].as_u64(), report["after"]["parameters"].as_u64()),
        (Some(131), Some(67))
    );
    assert!(answer["test"]["after"]["accuracy"].as_f64().unwrap() > 0.6, "{answer:#}");
    let eval = workplace.json(&["eval", ".", "--model", "half.onnx"]);
    assert_eq!(eval["metrics"], answer["test"]["after"]);

    let again = workplace.json(&prune);
    assert_eq!((&again["reused"], &again["model_digest"]), (&true.into(), &answer["model_digest"]));
    let lineage = workplace.json(&["lineage", "half.onnx"]);
    let kinds = lineage["lineage"].to_string();
    assert!(kinds.contains("network") && kinds.contains("dataset"), "{kinds}");
}

#[test]
fn masks_survive_fine_tuning_and_the_report_says_that_zeros_give_no_speed() {
    let workplace = Workplace::new();
    workplace.json(&["train", ".", "--output", "whole.onnx"]);
    let answer = workplace.json(&[
        "prune",
        "whole.onnx",
        "--output",
        "sparse.onnx",
        "--method",
        "2:4",
        "--data",
        ".",
        "--finetune-steps",
        "30",
    ]);
    assert!(answer["report"]["sparsity"]["note"].as_str().unwrap().contains("no dense runtime faster"));
    let read = |name: &str| {
        let bytes = std::fs::read(workplace.path(name)).unwrap();
        onnx::read(&bytes, &onnx::ReadOptions::default()).unwrap().graph
    };
    let (whole, sparse) = (read("whole.onnx"), read("sparse.onnx"));
    let mut weights = 0;
    for (id, tensor) in sparse.constants().filter(|(_, t)| t.rank() == 2) {
        let before = whole.find(&sparse.value(id).name).and_then(|v| whole.value(v).constant()).unwrap();
        let zeros = tensor.as_slice::<f32>().unwrap().iter().filter(|v| **v == 0.0).count();
        assert_eq!(zeros, tensor.len() / 2, "{}", sparse.value(id).name);
        assert_ne!(before, tensor, "fine-tuning moves what is left");
        weights += 1;
    }
    assert_eq!(weights, 2);
}

#[test]
fn weights_whose_input_is_nothing_go_first_by_wanda() {
    let workplace = Workplace::new();
    workplace.json(&["train", ".", "--output", "whole.onnx"]);
    // The third of four features is always zero in this data.
    let points: Vec<f32> = (0..64u64).map(|i| if i % 4 == 2 { 0.0 } else { Key::new(1).normal_f32(i) }).collect();
    let arrays = [
        ("features".to_owned(), Tensor::new(&[16, 4], &points).unwrap()),
        ("label".to_owned(), Tensor::vector(&[1i64; 16])),
    ];
    write_npz(&workplace.path("train.npz"), &arrays).unwrap();
    let idle = |importance: &str| {
        let method = ["--method", "3:4", "--importance", importance, "--data", "."];
        workplace.json(&[&["prune", "whole.onnx", "--output", "sparse.onnx"], &method[..]].concat());
        let bytes = std::fs::read(workplace.path("sparse.onnx")).unwrap();
        let graph = onnx::read(&bytes, &onnx::ReadOptions::default()).unwrap().graph;
        let weights = graph.value(graph.find("hidden.0.weight").unwrap()).constant().unwrap();
        assert_eq!(weights.shape(), [4, 16]);
        weights.as_slice::<f32>().unwrap()[32..48].iter().filter(|w| **w == 0.0).count()
    };
    assert_eq!(idle("wanda"), 16);
    assert!(idle("l2") < 16);
}

#[test]
fn wrong_wishes_are_refused_by_name() {
    let workplace = Workplace::new();
    let new = workplace.json(&["new", "mlp", "--output", "net.onnx"]);
    assert!(new.is_object());
    for (arguments, code, expected) in [
        (&["--ratio", "1.5"][..], 2, "ratio is 1.5, expected a share from 0 to below 1"),
        (&["--method", "5:4"][..], 2, "N:M with N from 1 to M"),
        (&["--finetune-steps", "3"][..], 2, "need data"),
        (&["--steps", "0"][..], 2, "steps is 0"),
        (&["--method", "2:4", "--importance", "wanda"][..], 2, "wanda importance, need data"),
        (&["--method", "2:4", "--importance", "random"][..], 2, "l1, l2 or wanda"),
        (&["--limit", "a"][..], 2, "PATTERN=SHARE"),
    ] {
        let all = [&["prune", "net.onnx", "--output", "out.onnx"], arguments].concat();
        let (found, message) = workplace.failure(&all);
        assert!(message.contains(expected), "{arguments:?}: {message}");
        assert_eq!(found, code, "{arguments:?}: {message}");
        assert!(!workplace.path("out.onnx").exists());
    }
}
