//! Files made elsewhere are read and written without loss.

use std::fs;
use std::path::PathBuf;

use updraft_graph::Model;
use updraft_graph::onnx::{ReadOptions, WriteOptions, read, write};

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
