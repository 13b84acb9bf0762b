//! Losses against their formulas, gradients against finite differences, and what is left of the teacher afterwards.

use std::collections::HashMap;

use updraft_graph::eval::evaluate;
use updraft_graph::{DType, Graph, Tensor, ValueId, ValueType};

use super::*;
use crate::gradient::differentiate;
use crate::loss::CrossEntropy;
use crate::optimizer::Optimizer;

/// Numbers of order 1 that no rule makes equal.
fn numbers(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    let at = |i: usize| ((i * 37 + seed * 101 + 11) % 89) as f64 / 40.0 - 1.1;
    Tensor::new(shape, &(0..count).map(at).collect::<Vec<f64>>()).unwrap()
}

/// `logits = tanh(x W) V` with a hidden width, and pictures and attention made of the hidden values on the side.
fn network(width: usize, seed: usize, input: &str) -> Graph {
    let mut graph = Graph::new("network");
    let x = graph.add_input(input, ValueType::tensor(DType::F64, vec!["N".into(), 6.into()])).unwrap();
    let w = graph.add_constant("w", numbers(&[6, width], seed));
    let v = graph.add_constant("v", numbers(&[width, 3], seed + 1));
    let hidden = graph.op("MatMul", &[x, w], []).unwrap();
    let hidden = graph.op("Tanh", &[hidden], []).unwrap();
    let logits = graph.op("MatMul", &[hidden, v], []).unwrap();
    // [N, width] as features [N, width / 4, 4], and softmax rows of them.
    let shape = graph.add_constant("shape", Tensor::vector(&[0i64, width as i64 / 4, 4]));
    let features = graph.op("Reshape", &[hidden, shape], []).unwrap();
    let attention = graph.op("Softmax", &[features], [("axis", (-1i64).into())]).unwrap();
    let tokens = graph.op("Transpose", &[features], [("perm", [0i64, 2, 1].into())]).unwrap();
    let named = [(logits, "logits"), (hidden, "hidden"), (features, "features"), (attention, "attention")];
    for (value, name) in named.into_iter().chain([(tokens, "tokens")]) {
        graph.rename(value, name).unwrap();
    }
    graph.push_output(logits);
    graph
}

fn options() -> TrainingOptions {
    let sgd = Optimizer::Sgd { momentum: 0.0, nesterov: false };
    TrainingOptions::new(Loss::CrossEntropy(CrossEntropy::default()), sgd)
}

fn batch() -> HashMap<String, Tensor> {
    HashMap::from([("x".to_owned(), numbers(&[5, 6], 9)), ("labels".to_owned(), Tensor::vector(&[0i64, 2, 1, 1, 0]))])
}

/// The loss of a student, and its parameters and regressors, as inputs with defaults.
fn attached(student: &Graph, distillation: &Distillation) -> (Graph, ValueId, Vec<ValueId>) {
    let mut graph = student.clone();
    let logits = graph.find("logits").unwrap();
    let made = attach(&mut graph, distillation, &options(), logits, Purpose::Training).unwrap();
    let mut parameters = vec![graph.find("w").unwrap(), graph.find("v").unwrap()];
    parameters.extend(made.regressors);
    parameters.iter().for_each(|v| graph.push_input(*v));
    (graph, made.loss, parameters)
}

fn value(graph: &mut Graph, value: ValueId, inputs: &HashMap<String, Tensor>) -> Vec<f64> {
    graph.set_outputs(vec![value]);
    evaluate(graph, inputs).unwrap()[0].to_f64().unwrap()
}

/// Checks every element of every gradient against central differences.
fn check_gradients(student: &Graph, distillation: &Distillation) {
    let (mut graph, loss, parameters) = attached(student, distillation);
    let gradients = differentiate(&mut graph, loss, &parameters).unwrap();
    let mut inputs = batch();
    for (parameter, gradient) in parameters.into_iter().zip(gradients) {
        let name = graph.value(parameter).name.clone();
        let initial = graph.value(parameter).constant().unwrap().clone();
        let found = match gradient {
            Some(gradient) => value(&mut graph, gradient, &inputs),
            None => vec![0.0; initial.len()],
        };
        let start = initial.to_f64().unwrap();
        for element in 0..start.len() {
            // Central differences err by about h^2 and by rounding over h, each near 1e-10 for values of order 1.
            let h = 1e-5;
            let mut at = |by: f64| {
                let mut moved = start.clone();
                moved[element] += by;
                inputs.insert(name.clone(), Tensor::new(initial.shape(), &moved).unwrap());
                value(&mut graph, loss, &inputs)[0]
            };
            let slope = (at(h) - at(-h)) / (2.0 * h);
            let near = (slope - found[element]).abs() < 1e-7 * (1.0 + slope.abs());
            assert!(near, "{name}[{element}]: slope {slope}, gradient {}", found[element]);
        }
        inputs.insert(name, initial);
    }
}

fn matching(teacher: &str, student: &str, kind: MatchKind) -> Match {
    Match { teacher: teacher.to_owned(), student: student.to_owned(), kind, weight: 0.7 }
}

#[test]
fn without_a_share_for_the_teacher_the_loss_is_the_cross_entropy_bit_for_bit() {
    let student = network(8, 1, "x");
    let plain = {
        let mut graph = student.clone();
        let logits = graph.find("logits").unwrap();
        let (_, loss) = loss::attach(&mut graph, options().loss, logits, "labels").unwrap();
        value(&mut graph, loss, &batch())
    };
    let distillation = Distillation { alpha: 0.0, temperature: 1.0, ..Distillation::new(network(8, 5, "x")) };
    let (mut graph, loss, _) = attached(&student, &distillation);
    assert_eq!(value(&mut graph, loss, &batch()), plain);
}

#[test]
fn the_loss_is_the_written_out_formula() {
    let (alpha, t) = (0.25f32, 2.0);
    let (student, teacher) = (network(8, 1, "x"), network(12, 5, "x"));
    let distillation = Distillation { alpha, temperature: 2.0, ..Distillation::new(teacher.clone()) };
    let (mut graph, loss, _) = attached(&student, &distillation);
    let logits = |graph: &Graph| evaluate(graph, &batch()).unwrap()[0].to_f64().unwrap();
    let softmax = |row: &[f64], t: f64| {
        let total: f64 = row.iter().map(|z| (z / t).exp()).sum();
        row.iter().map(|z| (z / t).exp() / total).collect::<Vec<f64>>()
    };
    let (mut task, mut soft) = (0.0, 0.0);
    for ((s, t_logits), label) in logits(&student).chunks(3).zip(logits(&teacher).chunks(3)).zip([0, 2, 1, 1, 0]) {
        task -= softmax(s, 1.0)[label].ln() / 5.0;
        let pairs = softmax(t_logits, t).into_iter().zip(softmax(s, t));
        soft += pairs.map(|(p, q)| p * (p / q).ln()).sum::<f64>() / 5.0;
    }
    let expected = (1.0 - f64::from(alpha)) * task + f64::from(alpha) * t * t * soft;
    // A few dozen operations in f64 on numbers of order 1.
    assert!((value(&mut graph, loss, &batch())[0] - expected).abs() < 1e-12);
}

#[test]
fn gradients_are_the_slopes_of_every_kind_of_match() {
    let (student, narrow, wide) = (network(8, 1, "x"), network(8, 5, "x"), network(12, 5, "x"));
    let soft = |teacher: &Graph| Distillation { alpha: 0.6, ..Distillation::new(teacher.clone()) };
    check_gradients(&student, &soft(&wide));
    let rows = [
        (&narrow, "hidden", MatchKind::Hidden),
        (&wide, "hidden", MatchKind::Hidden),
        (&wide, "features", MatchKind::Hidden),
        (&wide, "features", MatchKind::AttentionMaps),
        (&narrow, "attention", MatchKind::AttentionDistributions),
        (&wide, "tokens", MatchKind::Relations),
    ];
    for (teacher, name, kind) in rows {
        let matches = vec![matching(name, name, kind)];
        check_gradients(&student, &Distillation { matches, ..soft(teacher) });
    }
}

#[test]
fn a_teacher_equal_to_the_student_pulls_it_nowhere() {
    let student = network(8, 1, "x");
    let matches = vec![
        matching("hidden", "hidden", MatchKind::Hidden),
        matching("features", "features", MatchKind::AttentionMaps),
        matching("attention", "attention", MatchKind::AttentionDistributions),
        matching("tokens", "tokens", MatchKind::Relations),
    ];
    let distillation = Distillation { matches, ..Distillation::label_free(student.clone()) };
    let (mut graph, loss, parameters) = attached(&student, &distillation);
    // The gradient of a sum over classes of p_t (log p_t - log p_s) is p_s - p_t, up to rounding of the softmax in f64.
    assert!(value(&mut graph, loss, &batch())[0].abs() < 1e-14);
    for gradient in differentiate(&mut graph, loss, &parameters).unwrap().into_iter().flatten() {
        assert!(value(&mut graph, gradient, &batch()).iter().all(|g| g.abs() < 1e-14));
    }
}

#[test]
fn the_teacher_reads_what_its_inputs_are_mapped_to() {
    let student = network(8, 1, "x");
    // The only input of each, whatever the names.
    let other = Distillation::label_free(network(8, 5, "picture"));
    let (mut graph, loss, _) = attached(&student, &other);
    let (mut same, same_loss, _) = attached(&student, &Distillation::label_free(network(8, 5, "x")));
    assert_eq!(value(&mut graph, loss, &batch()), value(&mut same, same_loss, &batch()));

    let wrong = Distillation { inputs: vec![("picture".into(), "y".into())], ..other };
    let refused = |distillation: &Distillation| {
        let mut graph = student.clone();
        let logits = graph.find("logits").unwrap();
        attach(&mut graph, distillation, &options(), logits, Purpose::Training).map(|a| a.loss).unwrap_err().to_string()
    };
    assert!(refused(&wrong).contains("no input of the student"));
    let label_free = Distillation::label_free(student.clone());
    let cases = [
        (Distillation { alpha: 0.5, ..label_free.clone() }, "must be 1 without labels"),
        (Distillation { temperature: 0.0, ..label_free.clone() }, "above 0"),
        (Distillation { output: Some("logit".into()), ..label_free.clone() }, "did you mean \"logits\"?"),
        (Distillation { output: Some("hidden".into()), ..label_free.clone() }, "of the teacher is [N, 8]"),
        (
            Distillation { matches: vec![matching("hidden", "features", MatchKind::Hidden)], ..label_free },
            "of the teacher is [N, 8]",
        ),
    ];
    for (distillation, expected) in cases {
        let message = refused(&distillation);
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    }
}
