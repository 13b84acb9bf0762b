//! The checker finds each kind of problem and names where it is.

use updraft_graph::check::{check, check_model};
use updraft_graph::text::parse;
use updraft_graph::{Function, Graph, Model, Node, Tensor};

/// The messages for a graph in text form.
fn problems(text: &str) -> Vec<String> {
    problems_of(&parse(text).unwrap_or_else(|e| panic!("{e}\n{text}")))
}

fn problems_of(graph: &Graph) -> Vec<String> {
    check(graph).err().map_or(Vec::new(), |e| e.problems.iter().map(ToString::to_string).collect())
}

#[test]
fn a_sound_graph_has_no_problems() {
    assert_eq!(
        problems(
            "graph g opset 21 {\ninput x: f32[N, 2]\nconst w = f32[2, 1] {1.0, 2.0}\nh = MatMul(x, w)\ny: f32[N, 1] = Relu(h)\noutput y\n}"
        ),
        [""; 0]
    );
}

#[test]
fn each_problem_is_named_with_its_place() {
    let rows = [
        (
            "graph g opset 21 {\ninput x: f32[2]\ny = Reluu(x) @ act\noutput y\n}",
            r#"graph "g": node act (Reluu): operator Reluu of domain "" is not known; the nearest is Relu"#,
        ),
        (
            "graph g opset 21 {\ninput x: f32[2]\ny = Add(x)\noutput y\n}",
            r#"graph "g": node Add -> y: Add takes 2 inputs, found 1"#,
        ),
        (
            "graph g opset 21 {\ninput x: f32[2]\ny, z = Relu(x)\noutput y\n}",
            r#"graph "g": node Relu -> y: Relu makes 1 outputs, found 2"#,
        ),
        ("graph g opset 21 {\ninput x: f32[2]\ny = Add(x, _)\noutput y\n}", "is missing"),
        (
            "graph g opset 21 {\ninput x: f32[2, 3]\ny = MatMul(x, x)\noutput y\n}",
            r#"graph "g": node MatMul -> y: matrix product of [2, 3] and [2, 3]"#,
        ),
        (
            "graph g opset 21 {\ninput x: f32[2]\ny: f32[3] = Relu(x)\noutput y\n}",
            r#"graph "g": node Relu -> y: shape of "y" is declared as [3] but is [2]"#,
        ),
        (
            "graph g opset 21 {\ninput x: f32[2]\ny: f64[2] = Relu(x)\noutput y\n}",
            r#"element type of "y" is declared as f64 but is f32"#,
        ),
        (
            "graph g opset 21 {\nundefined x: f32[2]\ny = Relu(x)\noutput y\n}",
            r#"graph "g": node Relu -> y reads "x", which nothing makes"#,
        ),
        (
            "graph g opset 21 {\ninput x: f32[2]\nundefined y\nz = Relu(x)\noutput y\n}",
            r#"graph "g": the list of outputs reads "y", which nothing makes"#,
        ),
        (
            "graph g opset 21 {\ninput x: f32[2]\na = Add(x, b)\nb = Relu(a)\noutput b\n}",
            r#"graph "g": nodes form a cycle: "#,
        ),
        (
            "graph g opset 3 {\ninput x: f32[2]\ny = Relu(x)\noutput y\n}",
            r#"graph "g": operator set "" has version 3, expected 7 to 28"#,
        ),
        (
            "graph g opset none {\ninput x: f32[2]\ny = Relu(x)\noutput y\n}",
            r#"graph "g": operator set "" has no version, expected 7 to 28"#,
        ),
        ("graph g opset 21 {\ninput x: f32[2]\ny = Relu(x)\n}", r#"graph "g": there are no outputs"#),
    ];
    for (text, expected) in rows {
        let found = problems(text);
        assert!(found.len() == 1 && found[0].contains(expected), "{text}\nexpected {expected}\nfound {found:#?}");
    }
}

#[test]
fn all_problems_are_found_at_once_and_inside_subgraphs_too() {
    let found = problems(
        "graph g opset 21 {\ninput c: bool[]\ninput x: f32[2, 3]\ny = MatMul(x, x)\nz = Nothing<body = graph inner {
           outer x: f32[2, 3]\nouter gone: f32[2]\nm = MatMul(x, x)\nn = Relu(gone)\noutput m\n}>(c)\noutput y\noutput z\n}",
    );
    let expected = [
        r#"graph "g": node MatMul -> y: matrix"#,
        r#"graph "g": node Nothing -> z: operator Nothing"#,
        r#"graph "inner": node Relu -> n reads "gone""#,
        r#"graph "inner": node MatMul -> m: matrix"#,
    ];
    for part in expected {
        assert_eq!(found.iter().filter(|f| f.contains(part)).count(), 1, "{part}\n{found:#?}");
    }
    assert_eq!(found.len(), expected.len(), "{found:#?}");
}

#[test]
fn a_value_made_twice_is_found() {
    let mut graph = Graph::new("g");
    let x = graph.add_constant("x", Tensor::scalar(1f32));
    let y = graph.add_value("y", Default::default()).unwrap();
    let relu =
        |output| Node { op: "Relu".to_owned(), inputs: vec![Some(x)], outputs: vec![Some(output)], ..Node::default() };
    graph.add_node(relu(y)).unwrap();
    assert!(graph.add_node(relu(y)).is_err());
    graph.add_node(relu(x)).unwrap();
    graph.push_output(y);
    let found = problems_of(&graph);
    assert!(found.iter().any(|f| f == r#"graph "g": "x" is an initializer and also made by Relu -> x"#), "{found:#?}");
}

#[test]
fn functions_of_a_model_are_operators_of_it() {
    let graph =
        parse("graph g opset 21, com.example 1 {\ninput x: f32[2]\ny = com.example::Twice(x)\noutput y\n}").unwrap();
    let body = parse("graph Twice opset 21 {\ninput a\nb = Add(a, a)\noutput b\n}").unwrap();
    let mut model = Model::new(graph);
    assert!(check_model(&model).is_err());
    model.functions.push(Function { domain: "com.example".to_owned(), body, ..Function::default() });
    assert_eq!(check_model(&model), Ok(()));
}
