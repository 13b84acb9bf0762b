//! Upgrading changes forms and not results.

mod support;

use std::collections::HashMap;

use support::Draw;
use updraft_graph::check::check;
use updraft_graph::eval::evaluate;
use updraft_graph::text::{parse, print};
use updraft_graph::upgrade::{inline_functions, upgrade};
use updraft_graph::{Function, Graph, Model, OPSET, Tensor};

fn graph(text: &str) -> Graph {
    parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// Small values of both signs; of integers, those that are indices into anything with three elements or more.
fn random_inputs(graph: &Graph, draw: &mut Draw) -> HashMap<String, Tensor> {
    let inputs = graph.inputs().iter().map(|id| {
        let dtype = graph.dtype(*id).unwrap();
        let shape = graph.known_shape(*id).unwrap();
        let count: usize = shape.iter().product();
        let values: Vec<f64> = match dtype.is_float() {
            true => (0..count).map(|_| draw.below(4001) as f64 / 1000.0 - 2.0).collect(),
            false => (0..count).map(|_| draw.below(3) as f64).collect(),
        };
        (graph.value(*id).name.clone(), Tensor::from_f64(dtype, &shape, &values).unwrap())
    });
    inputs.collect()
}

/// Upgrades the body of a graph of `opset` and compares outputs, bit by bit, on random inputs.
fn check_same(opset: u32, body: &str) -> Graph {
    let before = graph(&format!("graph g opset {opset} {{\n{body}\n}}"));
    let mut after = before.clone();
    let report = upgrade(&mut after).unwrap_or_else(|e| panic!("{e}\n{body}"));
    assert_eq!((report.from, report.to, after.opset("")), (opset, OPSET, Some(OPSET)), "{body}");
    assert_eq!(check(&after), Ok(()), "{}", print(&after));
    let again = upgrade(&mut after.clone()).unwrap();
    assert!(again.rewritten.is_empty(), "upgrading twice rewrites twice:\n{}", print(&after));
    for seed in 0..5 {
        let inputs = random_inputs(&before, &mut Draw::new(seed));
        let expected = evaluate(&before, &inputs).unwrap_or_else(|e| panic!("before: {e}\n{body}"));
        let found = evaluate(&after, &inputs).unwrap_or_else(|e| panic!("after: {e}\n{}", print(&after)));
        assert_eq!(found, expected, "{}", print(&after));
    }
    after
}

const X: &str = "input x: f32[2, 3, 4, 5]\noutput y\n";

#[test]
fn attributes_that_became_inputs_mean_the_same() {
    for (opset, body) in [
        (9, "y = Slice<axes = [1, 3], starts = [1, -4], ends = [3, 1000]>(x)"),
        (7, "y = Slice<starts = [0, 1], ends = [1, 2]>(x)"),
        (9, "y, i = TopK<k = 2, axis = 2>(x)\noutput i"),
        (7, "y = Clip<min = -0.5, max = 0.5>(x)"),
        (10, "y = Clip<min = 0.0>(x)"),
        (8, "y = Clip(x)"),
        (7, "y = Pad<pads = [0, 1, 0, 0, 0, 0, 2, 1], value = 1.5>(x)"),
        (10, "y = Pad<pads = [0, 0, 1, 0, 0, 0, 2, 1], mode = \"reflect\">(x)"),
        (9, "y = Dropout<ratio = 0.25>(x)"),
        (7, "y, m = Dropout(x)\noutput m"),
        (11, "y, m = Dropout<ratio = 0.25>(x)\noutput m"),
        (12, "y = ReduceSum<axes = [1, -1], keepdims = 0>(x)"),
        (7, "y = ReduceSum(x)"),
        (12, "y = Unsqueeze<axes = [0, 2]>(x)"),
        (8, "z = ReduceMax<axes = [1, 2]>(x)\ny = Squeeze<axes = [1]>(z)"),
        (12, "y, z = Split<axis = 2, split = [1, 3]>(x)\noutput z"),
        (7, "y, z = Split<axis = 2>(x)\noutput z"),
        (13, "y, z = Split<axis = 2>(x)\noutput z"),
        (17, "const s = i64[2] {1, 3}\ny, z = Split<axis = 2>(x, s)\noutput z"),
        (13, "y = ReduceL1<axes = [1], keepdims = 0>(x)"),
        (17, "y = ReduceL2<axes = [1]>(x)"),
        (17, "a = Abs(x)\ny = ReduceLogSum<axes = [1]>(a)"),
        (7, "y = ReduceLogSumExp<axes = [3]>(x)"),
        (17, "y = ReduceMax<axes = [-2]>(x)"),
        (11, "y = ReduceMean<axes = [2, 3]>(x)"),
        (17, "y = ReduceMin(x)"),
        (17, "y = ReduceProd<axes = [0, 1]>(x)"),
        (17, "y = ReduceSumSquare<axes = [1]>(x)"),
    ] {
        let after = check_same(opset, &format!("{X}{body}"));
        for (_, node) in after.nodes() {
            let old = ["axes", "split", "starts", "ends", "k", "min", "max", "pads", "value", "ratio"];
            assert!(old.iter().all(|name| node.attributes.get(name).is_none()), "{}", print(&after));
        }
    }
}

#[test]
fn softmax_over_rows_means_the_same() {
    for op in ["Softmax", "LogSoftmax", "Hardmax"] {
        for (opset, attributes) in
            [(7, ""), (11, "<axis = 2>"), (12, "<axis = 3>"), (12, "<axis = -2>"), (9, "<axis = 0>")]
        {
            check_same(opset, &format!("{X}y = {op}{attributes}(x)"));
        }
        // All behind the axis is of size 1: the axis alone says it.
        let after = check_same(12, &format!("input x: f32[2, 3, 1, 1]\ny = {op}(x)\noutput y"));
        assert_eq!(after.nodes().count(), 1);
    }
}

#[test]
fn operators_that_got_other_names_or_defaults_mean_the_same() {
    for (opset, body) in [
        (9, "input x: f32[3, 3]\ninput i: i64[2, 3]\ninput u: f32[2, 3]\ny = Scatter(x, i, u)\noutput y"),
        (
            7,
            "input x: f32[2, 3, 4]\nconst s = f32[3] {1.0, 2.0, 0.5}\nconst b = f32[3] {0.0, 1.0, 2.0}\n
             const m = f32[3] {0.5, 0.0, 1.0}\nconst v = f32[3] {1.0, 2.0, 4.0}\n
             y = BatchNormalization<epsilon = 0.1, spatial = 1>(x, s, b, m, v)\noutput y",
        ),
        (
            20,
            "input x: f32[2, 6, 4]\nconst s = f32[2] {0.5, 2.0}\nconst b = f32[2] {1.0, -1.0}\n
             y = GroupNormalization<num_groups = 2>(x, s, b)\noutput y",
        ),
    ] {
        check_same(opset, body);
    }
}

#[test]
fn subgraphs_are_upgraded_too() {
    let branch = |name: &str, axis: i64| {
        format!(
            "graph {name} {{\nouter x: f32[2, 3, 4, 5]\n{name}y = ReduceMax<axes = [{axis}], keepdims = 0>(x)\noutput {name}y\n}}"
        )
    };
    let body =
        format!("input c: bool[]\n{X}y = If<then_branch = {}, else_branch = {}>(c)", branch("a", 2), branch("b", 2));
    let after = check_same(12, &body);
    assert!(!print(&after).contains("axes = ["), "{}", print(&after));
}

/// Resize of opset 10 to the nearest element, against the examples of ONNX's documentation of that version.
#[test]
fn upsample_and_resize_of_opset_10_become_asymmetric_resize() {
    for (text, mode) in [
        (
            "graph g opset 7 {\ninput x: f32[1, 1, 2, 2]\ny = Upsample<scales = [1.0, 1.0, 2.0, 3.0]>(x)\noutput y\n}",
            "floor",
        ),
        (
            "graph g opset 9 {\ninput x: f32[1, 1, 2, 2]\nconst s = f32[4] {1.0, 1.0, 2.0, 3.0}\ny = Upsample(x, s)\noutput y\n}",
            "floor",
        ),
        (
            "graph g opset 10 {\ninput x: f32[1, 1, 2, 4]\nconst s = f32[4] {1.0, 1.0, 0.6, 0.6}\ny = Resize(x, s)\noutput y\n}",
            "ceil",
        ),
    ] {
        let mut graph = graph(text);
        upgrade(&mut graph).unwrap();
        let (_, node) = graph.nodes().next().unwrap();
        assert_eq!((node.op.as_str(), node.inputs.len(), node.inputs[1]), ("Resize", 3, None));
        assert_eq!(node.attributes.string("coordinate_transformation_mode", ""), Ok("asymmetric"));
        assert_eq!(node.attributes.string("nearest_mode", ""), Ok(mode), "{text}");
    }
}

#[test]
fn forms_that_cannot_be_expressed_are_refused_by_node() {
    for (text, expected) in [
        (
            "graph g opset 7 {\ninput x\ny = BatchNormalization<spatial = 0>(x, x, x, x, x) @ bn\noutput y\n}",
            "node bn (BatchNormalization): not supported: BatchNormalization by element (spatial = 0)",
        ),
        ("graph g opset 6 {\ninput x\ny = Relu(x)\noutput y\n}", "graph \"g\" is of opset 6, expected 7 to 28"),
        ("graph g opset none {\ninput x\ny = Relu(x)\noutput y\n}", "graph \"g\" is of opset none, expected 7 to 28"),
        (
            "graph g opset 9 {\ninput x\ny = Clip<min = 0.0>(x) @ c\noutput y\n}",
            "node c (Clip): the element type of \"x\" must be known",
        ),
        (
            "graph g opset 9 {\ninput x: f32[2]\ny = Slice<starts = [0]>(x) @ s\noutput y\n}",
            "attribute \"ends\" is missing",
        ),
    ] {
        let error = upgrade(&mut graph(text)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}\n{expected}");
    }
}

#[test]
fn newer_graphs_become_opset_21_only_where_that_says_the_same() {
    for (body, to) in [
        ("y = Relu(x)", 21),
        ("y = Reshape(x, s)", 21),
        ("y = Cast<to = 11, round_mode = \"up\">(x)", 21),
        ("y = Cast<to = 11, round_mode = \"down\">(x)", 24),
        ("y = Swish(x)", 24),
        ("b = Cast<to = 16>(x)\ny = Sin(b)", 24),
        ("y = Unheard(x)", 24),
    ] {
        let mut graph =
            graph(&format!("graph g opset 24 {{\ninput x: f32[2, 3]\nconst s = i64[1] {{-1}}\n{body}\noutput y\n}}"));
        let report = upgrade(&mut graph).unwrap();
        assert_eq!((report.to, graph.opset("")), (to, Some(to)), "{body}");
        if to == OPSET {
            assert!(!print(&graph).contains("round_mode"), "{body}");
        }
    }
}

fn function(text: &str) -> Function {
    Function {
        domain: "f".to_owned(),
        overload: String::new(),
        body: graph(text),
        required_attributes: Vec::new(),
        default_attributes: Default::default(),
    }
}

#[test]
fn functions_are_written_out_with_their_attributes_and_captures() {
    let mut scaled = function(
        "graph Scaled opset 17 {\ninput a\ninput b\nc = Constant<value_float = ref(by, 1)>()\nd = Mul(a, c) @ mul\nz = f::Both(d, b)\noutput z\noutput a\n}",
    );
    scaled.default_attributes.set("by", 3f32);
    let both = function(
        "graph Both opset 13, f 1 {\ninput p\ninput q\nt = ReduceMax<keepdims = 0>(p)\nu = Less(t, t)
         r = If<then_branch = graph one {\nouter p\np_0 = Neg(p)\noutput p_0\n}, else_branch = graph two {\nouter p\nouter q\nx = Add(p, q)\noutput x\n}>(u)\noutput r\n}",
    );
    let main = graph(
        "graph g opset 17, f 1 {\ninput x: f32[2]\ninput w: f32[2]\ny, k = f::Scaled(x, w) @ first\nv = f::Scaled<by = 0.5>(y, x)\noutput y\noutput k\noutput v\n}",
    );
    let mut model = Model { functions: vec![scaled, both], ..Model::new(main) };
    assert_eq!(inline_functions(&mut model), Ok(4));
    assert_eq!(check(&model.graph), Ok(()), "{}", print(&model.graph));
    let vector = |values: [f32; 2]| Tensor::vector(&values);
    let inputs = HashMap::from([("x".to_owned(), vector([1.0, 2.0])), ("w".to_owned(), vector([10.0, 20.0]))]);
    // y = 3 x + w, k = x, v = y / 2 + x
    let expected = vec![vector([13.0, 26.0]), vector([1.0, 2.0]), vector([7.5, 15.0])];
    assert_eq!(evaluate(&model.graph, &inputs).unwrap(), expected, "{}", print(&model.graph));
}

#[test]
fn functions_that_never_end_or_grow_without_bound_are_refused() {
    let main = "graph g opset 17, f 1 {\ninput x: f32[2]\ny = f::F0(x)\noutput y\n}";
    let mut endless = Model::new(graph(main));
    endless.functions = vec![function("graph F0 opset 17, f 1 {\ninput a\nb = f::F0(a)\noutput b\n}")];
    let mut doubling = Model::new(graph(main));
    doubling.functions = (0..40)
        .map(|i| {
            function(&format!(
                "graph F{i} opset 17, f 1 {{\ninput a\nb = f::F{}(a)\nc = f::F{}(b)\noutput c\n}}",
                i + 1,
                i + 1
            ))
        })
        .collect();
    for mut model in [endless, doubling] {
        let error = inline_functions(&mut model).unwrap_err().to_string();
        assert!(error.contains("functions call one another more than 64 deep"), "{error}");
    }
}
