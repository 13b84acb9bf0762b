//! What a user sees of `updraft quantize`.

use updraft_data::{read_npz, write_npz};
use updraft_graph::{Tensor, onnx};

use crate::workplace::{RECIPE, Workplace};

/// A workplace with a trained model, and the names of decisions in it.
fn trained() -> Workplace {
    let workplace = Workplace::new();
    workplace.json(&["train", ".", "--output", "model.onnx"]);
    workplace
}

#[test]
fn every_form_is_written_kept_and_measured_on_the_test_data() {
    let workplace = trained();
    let cases: &[(&str, &[&str], f64)] = &[
        ("static", &["--bias-correction", "--mse-weights", "--equalize"], 0.05),
        ("static", &["--calibration", "entropy", "--activations", "i8", "--symmetric"], 0.05),
        ("static", &["--activations", "u16", "--reduce-range", "--per-tensor"], 0.05),
        ("dynamic", &[], 0.05),
        ("weight-only", &[], 0.05),
        ("weight-only", &["--bits", "4", "--block", "4"], 0.2),
        ("float16", &[], 0.02),
        ("bfloat16", &[], 0.05),
    ];
    for (mode, arguments, drop) in cases {
        let all = [&["quantize", "model.onnx", "--data", ".", "--output", "small.onnx", "--mode", mode], *arguments];
        let answer = workplace.json(&all.concat());
        let accuracy = |side: &str| answer[side]["metrics"]["accuracy"].as_f64().unwrap();
        assert!(accuracy("after") >= accuracy("before") - drop, "{mode} {arguments:?}: {answer:#}");
        let decisions = answer["decisions"].as_array().unwrap();
        assert!(decisions.iter().any(|d| d["form"] == *mode && d["operator"] == "Gemm"), "{answer:#}");
        assert!(decisions.iter().all(|d| !d["reason"].as_str().unwrap().is_empty()));
        let bytes = std::fs::read(workplace.path("small.onnx")).unwrap();
        assert_eq!(bytes.len() as u64, answer["after"]["size_bytes"].as_u64().unwrap());
        assert!(onnx::read(&bytes, &onnx::ReadOptions::default()).is_ok());
        let digest = answer["after"]["digest"].as_str().unwrap();
        let lineage = workplace.json(&["lineage", digest]);
        assert!(lineage.to_string().contains(answer["before"]["digest"].as_str().unwrap()), "{lineage:#}");
    }
}

#[test]
fn what_cannot_be_quantized_as_asked_is_refused_and_nothing_is_written() {
    let workplace = trained();
    let refuse = |arguments: &[&str], code: i32, words: &[&str]| {
        let all = [&["quantize", "model.onnx", "--output", "none.onnx"], arguments].concat();
        let (found, message) = workplace.failure(&all);
        assert_eq!(found, code, "{message}");
        assert!(words.iter().all(|w| message.contains(w)), "{message}");
        assert!(!workplace.path("none.onnx").exists());
    };
    refuse(&[], 2, &["--data RECIPE"]);
    refuse(&["--data", ".", "--bits", "4"], 2, &["`--bits` has no effect", "weight-only"]);
    refuse(&["--mode", "weight-only", "--bits", "3"], 4, &["bits are 3", "8 or 4"]);
    refuse(&["--mode", "dynamic", "--exclude", "nothing*"], 2, &["nothing*"]);
    refuse(&["--data", ".", "--samples", "0"], 2, &["--samples"]);
    workplace.json(&["quantize", "model.onnx", "--mode", "dynamic", "--output", "twice.onnx"]);
    let (code, message) = workplace.failure(&["quantize", "twice.onnx", "--mode", "dynamic", "--output", "none.onnx"]);
    assert!(code == 4 && message.contains("quantized already"), "{message}");
    let (code, message) =
        workplace.failure(&["quantize", "model.onnx", "--mode", "dynamic", "--output", "model.onnx/none.onnx"]);
    assert!(code == 6 && message.contains("model.onnx"), "{message}");

    let mut arrays = read_npz(&workplace.path("train.npz"), u64::MAX).unwrap();
    arrays[0].1.as_mut_slice::<f32>().unwrap()[4 * 17 + 2] = f32::NAN;
    write_npz(&workplace.path("train.npz"), &arrays).unwrap();
    refuse(&["--data", "."], 3, &["features", "NaN", "sample 17"]);
    let wide = Tensor::new(&[96, 5], &[0.5f32; 480]).unwrap();
    write_npz(&workplace.path("train.npz"), &[(arrays[0].0.clone(), wide), arrays[1].clone()]).unwrap();
    refuse(&["--data", "."], 3, &["features"]);
    workplace.write_recipe(
        &RECIPE.replace("path = \"train.npz\"", "path = \"train.npz\", tensors = [{ name = \"label\" }]"),
    );
    refuse(&["--data", "."], 2, &["features"]);
}
