//! What must hold of any bytes whatever. Each target is a plain function, run by `cargo xtask fuzz` (and by
//! `cargo fuzz run`, where that is installed); a panic is a finding.

use updraft_graph::check::check_model;
use updraft_graph::fingerprint::fingerprint;
use updraft_graph::onnx::{ReadOptions, WriteOptions, read, write};
use updraft_graph::text::{parse, parse_with, print, tensors_of};
use updraft_graph::upgrade::{inline_functions, upgrade_model};
use updraft_graph::{Graph, Model};

pub mod shards;
pub mod streams;

/// Bytes as an ONNX file: refused, or read, written and read again to the same bytes.
pub fn onnx_read(bytes: &[u8]) {
    let Ok(mut model) = read(bytes, &ReadOptions::default()) else { return };
    // What was read has an order, names that are unique and a form in text.
    let written = write(&model, WriteOptions::default()).expect("what was read can be written");
    let again = read(&written, &ReadOptions::default()).expect("what was written can be read");
    let rewritten = write(&again, WriteOptions::default()).expect("what was read can be written");
    assert!(rewritten == written, "bytes change when written twice");
    let tensors = tensors_of(&model.graph);
    let text = print(&model.graph);
    let reparsed = parse_with(&text, &|key| tensors.get(key).cloned()).expect("what was printed can be parsed");
    assert_eq!(print(&reparsed), text);
    fingerprint(&model.graph).expect("what was read has an order");
    // These may refuse the model, but not panic.
    let _ = check_model(&model);
    if inline_functions(&mut model).is_ok() {
        let _ = upgrade_model(&mut model);
    }
}

/// Bytes as the text of a graph: refused, or printed and parsed again to the same text.
pub fn text_parse(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(graph) = parse(text) else { return };
    let printed = print(&graph);
    let tensors = tensors_of(&graph);
    let again: Graph = parse_with(&printed, &|key| tensors.get(key).cloned()).expect("what was printed can be parsed");
    assert_eq!(print(&again), printed);
    let _ = fingerprint(&graph);
    let _ = check_model(&Model::new(graph));
}
