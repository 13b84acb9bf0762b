//! The table of operators, walked: every operator states its facts, is exercised by a case, and where it has a gradient
//! rule, the rule agrees with differences of the operator's values on random shapes.

use std::collections::{BTreeSet, HashMap};

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed, TestRunner};
use updraft_graph::eval::evaluate;
use updraft_graph::op::{self, Rule};
use updraft_graph::{Graph, Tensor};

mod samples;
mod slopes;

/// ONNX's node cases that pass, counted by operator; `cargo xtask conformance` keeps the file true.
const CONFORMANCE: &str = include_str!("../../../../xtask/conformance/passed.txt");

/// Operators without a node case and without a gradient, and where their tests are.
const TESTED_ELSEWHERE: &[(&[&str], &str)] = &[
    (&["SgdUpdate", "AdamUpdate", "GlobalNorm"], "src/op/optimizer.rs"),
    (
        &[
            "RandomNormal",
            "RandomUniform",
            "RandomNormalLike",
            "RandomUniformLike",
            "Bernoulli",
            "Multinomial",
            "DropoutMask",
        ],
        "src/op/random.rs",
    ),
    (&["FakeQuantize", "FakeQuantizeGradient"], "src/op/quant/fake.rs"),
    (&["GlobalLpPool"], "global_lp_pools_are_the_norms_of_planes"),
];

/// Operators whose gradient is by definition no slope: it passes straight through a rounding.
const STRAIGHT_THROUGH: &[&str] = &["FakeQuantize"];

#[test]
fn every_operator_states_its_facts() {
    let mut seen = BTreeSet::new();
    let mut problems = Vec::new();
    for operator in op::table() {
        let name = operator.name;
        if !seen.insert((operator.domain, name)) {
            problems.push(format!("{name} is listed twice"));
        }
        if operator.versions.is_empty() || !operator.versions.is_sorted() {
            problems.push(format!("{name} states no ascending versions"));
        }
        let arity = operator.arity;
        if arity.inputs_min > arity.inputs_max || arity.outputs_min > arity.outputs_max || arity.outputs_max == 0 {
            problems.push(format!("{name} states an empty arity"));
        }
        let reasons = [
            matches!(operator.eval, Rule::None("")).then_some("evaluation"),
            matches!(operator.gradient, Rule::None("")).then_some("gradient"),
            matches!(operator.channels, Rule::None("")).then_some("links"),
        ];
        problems.extend(reasons.into_iter().flatten().map(|fact| format!("{name} lacks {fact} and gives no reason")));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn every_operator_is_exercised() {
    let passed: BTreeSet<&str> = CONFORMANCE.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let sampled: BTreeSet<String> = samples::rows().filter_map(|row| slopes::check(row, 0).ok()).flatten().collect();
    let tested_elsewhere = |name: &str| TESTED_ELSEWHERE.iter().any(|(operators, _)| operators.contains(&name));
    let is_exercised = |name: &&str| passed.contains(name) || sampled.contains(*name) || tested_elsewhere(name);
    let missing: Vec<&str> = op::table().map(|op| op.name).filter(|name| !is_exercised(name)).collect();
    assert!(missing.is_empty(), "neither a node case nor a row in samples.rs: {}", missing.join(", "));
}

#[test]
fn every_gradient_rule_has_a_sample() {
    let sampled: BTreeSet<(&str, &str)> = samples::rows().map(|row| (row.domain(), row.name())).collect();
    let is_slope = |op: &&op::Op| !STRAIGHT_THROUGH.contains(&op.name);
    let with_rule = op::table().filter(|op| op.gradient.get().is_some()).filter(is_slope);
    let missing: Vec<&str> =
        with_rule.filter(|op| !sampled.contains(&(op.domain, op.name))).map(|op| op.name).collect();
    assert!(missing.is_empty(), "no row in samples.rs: {}", missing.join(", "));
}

#[test]
fn every_gradient_rule_agrees_with_differences() {
    let mut failures = Vec::new();
    for row in samples::rows() {
        let config = ProptestConfig {
            cases: 12,
            rng_seed: RngSeed::Fixed(1),
            rng_algorithm: RngAlgorithm::ChaCha,
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        let run = |seed: u64| slopes::check(row, seed).map(drop).map_err(TestCaseError::fail);
        if let Err(error) = TestRunner::new(config).run(&any::<u64>(), run) {
            failures.push(format!("{}: {error}", row.label()));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn global_lp_pools_are_the_norms_of_planes() {
    let mut graph = Graph::new("pool");
    let x = graph.add_constant("x", Tensor::new(&[1, 2, 1, 2], &[3f64, -4.0, 5.0, 12.0]).unwrap());
    let norm = |p: i64| [("p", p.into())];
    let outputs = [graph.op("GlobalLpPool", &[x], norm(2)).unwrap(), graph.op("GlobalLpPool", &[x], norm(1)).unwrap()];
    graph.set_outputs(outputs.to_vec());
    let made = evaluate(&graph, &HashMap::new()).unwrap();
    assert_eq!(made[0], Tensor::new(&[1, 2, 1, 1], &[5f64, 13.0]).unwrap());
    assert_eq!(made[1], Tensor::new(&[1, 2, 1, 1], &[7f64, 17.0]).unwrap());
}
