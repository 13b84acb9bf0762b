//! Files made elsewhere are read and written without loss.

use std::fs;
use std::path::PathBuf;

mod support;

use support::Draw;
use updraft_graph::onnx::{ReadOptions, WriteOptions, read, write};
use updraft_graph::{Graph, GraphError, Model};

fn files() -> Vec<(String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "onnx"))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    files.sort();
    assert_eq!(files.len(), 10);
    files
}

fn read_back(bytes: &[u8]) -> Model {
    read(bytes, &ReadOptions::default()).unwrap()
}

#[test]
fn reading_what_was_written_gives_the_same_model_and_the_same_bytes() {
    for (name, bytes) in files() {
        let model = read(&bytes, &ReadOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let written = write(&model, WriteOptions::default()).unwrap();
        let again = read_back(&written);
        assert_eq!(again, model, "{name}");
        assert_eq!(write(&again, WriteOptions::default()).unwrap(), written, "{name}");
    }
}

/// Every prefix of a file is a broken file, and every one must be refused rather than read in part. A prefix that ends
/// between two fields is a whole message again; it lacks nodes that outputs need, or the graph.
#[test]
fn no_prefix_of_a_file_is_read_as_a_smaller_model() {
    let (name, bytes) = files().into_iter().find(|(name, _)| name == "opt-mnist.onnx").unwrap();
    for len in 0..bytes.len() {
        if let Ok(model) = read(&bytes[..len], &ReadOptions::default()) {
            assert_eq!(model.graph, read_back(&bytes).graph, "{name} cut to {len} bytes");
        }
    }
}

/// What a file holds of a model: all of it, in sorted order. Outputs that are inputs share the input's notes.
fn sorted(mut model: Model) -> Result<Model, GraphError> {
    model.graph.sort()?;
    for function in &mut model.functions {
        function.body.sort()?;
    }
    for training in &mut model.training {
        training.initialization.iter_mut().chain(&mut training.algorithm).try_for_each(Graph::sort)?;
    }
    Ok(model)
}

/// Equality that shows the lines around the first difference.
fn assert_same(left: &Model, right: &Model, seed: u64) {
    if left == right {
        return;
    }
    let (left, right) = (format!("{left:#?}"), format!("{right:#?}"));
    // The index of names prints in no fixed order.
    let lines = |text: &str| -> Vec<String> {
        let mut in_index = false;
        let keep = text.lines().filter(|line| {
            in_index = (in_index || line.trim() == "names: {") && line.trim() != "},";
            !in_index
        });
        keep.map(str::to_owned).collect()
    };
    let (left, right) = (lines(&left), lines(&right));
    let at = left.iter().zip(&right).position(|(a, b)| a != b).unwrap_or(left.len().min(right.len()));
    let around = |lines: &[String]| lines[at.saturating_sub(12)..(at + 6).min(lines.len())].join("\n");
    panic!("seed {seed}, line {at}:\n{}\nagainst\n{}", around(&left), around(&right));
}

#[test]
fn any_model_reads_back_as_it_was_written() {
    for seed in 0..500 {
        let model = Draw::new(seed).model();
        let written = write(&model, WriteOptions::default()).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let again = read(&written, &ReadOptions::default()).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert_same(&again, &sorted(model).unwrap(), seed);
        assert_eq!(write(&again, WriteOptions::default()).unwrap(), written, "seed {seed}");
    }
}
