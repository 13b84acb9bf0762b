//! The text form: what it looks like, that it reads back, and what it says of broken text.

mod support;

use support::Draw;
use updraft_graph::graph::Denotation;
use updraft_graph::text::{parse, parse_with, print, tensors_of};
use updraft_graph::{Attribute, Attributes, Graph, Tensor};

/// The graph as its text tells of it: sorted, without what files carry along.
fn told(mut graph: Graph) -> Graph {
    let ids: Vec<_> = graph.nodes().map(|(id, _)| id).collect();
    for id in ids {
        let mut node = graph.remove_node(id).unwrap();
        node.doc.clear();
        node.metadata.clear();
        node.device_configurations.clear();
        let pairs: Vec<(String, Attribute)> = node.attributes.iter().map(|(n, a)| (n.to_owned(), a.clone())).collect();
        let plain = pairs.into_iter().map(|(name, value)| match value {
            Attribute::Graph(inner) => (name, Attribute::Graph(Box::new(told(*inner)))),
            Attribute::Graphs(inner) => (name, Attribute::Graphs(inner.into_iter().map(told).collect())),
            value => (name, value),
        });
        node.attributes = plain.collect::<Attributes>();
        graph.add_node(node).unwrap();
    }
    let ids: Vec<_> = graph.values().map(|(id, _)| id).collect();
    for id in ids {
        graph.set_value_notes(id, String::new(), Vec::new());
        graph.set_denotation(id, Denotation::default());
        // Whether a default is stored sparsely is the file's business.
        if graph.inputs().contains(&id) {
            graph.set_sparse(id, false);
        }
    }
    graph.doc.clear();
    graph.metadata.clear();
    graph.quantization.clear();
    graph.sort().unwrap();
    graph
}

#[test]
fn any_graph_reads_back_as_it_was_printed() {
    for seed in 0..500 {
        let graph = Draw::new(seed).graph(2, None);
        let text = print(&graph);
        let tensors = tensors_of(&graph);
        let again =
            parse_with(&text, &|key| tensors.get(key).cloned()).unwrap_or_else(|e| panic!("seed {seed}: {e}\n{text}"));
        assert_eq!(print(&again), text, "seed {seed}");
        assert!(again == told(graph), "seed {seed}: another graph reads back from\n{text}");
    }
}

const TEXT: &str = r#"graph "two layers" opset 21, com.example 3 {
  input x: f32[batch, 2*N + 1]
  input "odd name": i64[?, 3] = i64[1, 3] {1, -2, 3}
  input any: ?[*]
  input list: sequence(map(i64, string[*]))
  const half = f16[2] {0.1, 0x7e01}
  const names = string[2] {"a\"b", b"\xff"}
  const z = complex64[1] {(1.0, -0.5)}
  sparse const mask = bool[2] {true, false}
  h: f32[batch, 3], _ = Split<axis = -1, mode = "x", scale = 2.0>(x, _, half) @ /layer/split
  y: f32[batch, 3] = com.example::Scale:fast<by = [0.5, inf], none = ints [], value = u4[3] {1, 2, 15}>(h)
  r: f32[*] = If<then_branch = graph then {
    const one = f32[] {1.0}
    outer h: f32[batch, 3]
    s = Add(h, one)
    output s
  }>(mask)
  output y
  output r
}
"#;

#[test]
fn the_form_is_stable() {
    let graph = parse(TEXT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(print(&graph), TEXT);
}

#[test]
fn large_tensors_are_named_by_their_content() {
    let graph_of = |last: f32| {
        let mut values = vec![0f32; 100];
        values[99] = last;
        let mut graph = Graph::new("g");
        let w = graph.add_constant("w", Tensor::new(&[100], &values).unwrap());
        graph.push_output(w);
        graph
    };
    let (one, two) = (print(&graph_of(1.0)), print(&graph_of(2.0)));
    assert_ne!(one, two);
    assert_eq!(one.lines().count(), 4, "{one}");
    let error = parse(&one).unwrap_err();
    assert_eq!((error.line, error.column), (2, 23), "{error}");
}

#[test]
fn broken_text_is_refused_with_the_place_and_what_was_expected() {
    let deep = format!("graph g {{ y = A<a = {}", "graph g { y = A<a = ".repeat(100_000));
    let deep_type = format!("graph g {{ input x: {}", "optional(".repeat(100_000));
    for (text, line, column, expected) in [
        ("", 1, 1, "`graph`"),
        ("graph g {", 1, 10, "a line of the graph, or `}`"),
        ("graph g opset x {}", 1, 17, "the version of an operator set"),
        ("graph g {\n  input x: f33[2]\n}", 2, 12, "an element type"),
        ("graph g {\n  input x: f32[2*]\n}", 2, 18, "a size, a symbol, `floor((...)/n)` or `?`"),
        ("graph g {\n  y = Relu(x)\n}", 2, 12, "the name of a value; no line of the graph makes \"x\""),
        ("graph g {\n  input x\n  input x\n}", 3, 9, "a new name: value name \"x\" is used twice"),
        ("graph g {\n  const w = f32[2] {1.0}\n}", 2, 13, "2 elements for shape [2], found 1"),
        ("graph g {\n  const w = u8[1] {256}\n}", 2, 20, "an integer from 0 to 255"),
        ("graph g {\n  const w = f32[4611686018427387904, 4] {}\n}", 2, 13, "a shape that fits in memory"),
        ("graph g {\n  const w = f32[99999999999999999999] {}\n}", 2, 17, "a size"),
        ("graph g {\n  y = Relu<a = [1, 2.0]>()\n}", 2, 16, "a list of one kind that is not empty"),
        (
            "graph g {\n  y = Relu<a = 99999999999999999999>()\n}",
            2,
            16,
            "a number, string, list, tensor, type or graph",
        ),
        ("graph g {\n  y = Relu()\n  output z\n}", 3, 10, "the name of a value; no line of the graph makes \"z\""),
        ("graph g {\n}\nmore", 3, 1, "the end of the text"),
        ("graph ü {}", 1, 7, "the graph's name"),
        (&deep, 1, 20 * 65 + 1, "at most 64 graphs within graphs"),
        (&deep_type, 1, 19 + 9 * 65 + 1, "at most 64 types within types"),
    ] {
        let error = parse(text).unwrap_err();
        let short: String = text.chars().take(80).collect();
        assert_eq!((error.line, error.column, error.expected.as_str()), (line, column, expected), "{short}");
    }
}
