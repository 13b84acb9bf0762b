//! Which channels and weights go.

use std::collections::BTreeMap;

use updraft_graph::{DType, Graph, Tensor, ValueType};
use updraft_passes::prune::groups;
use updraft_passes::prune::importance::{Importance, scores};
use updraft_passes::prune::sparse::{self, Pattern};
use updraft_passes::prune::structured::{Scope, Settings, prune};

/// `x [N, 2] -> first [2, width] -> batch norm -> second [width, 3]`, each column of `first` given.
fn two_layers(first: &[[f32; 2]], gammas: &[f32]) -> Graph {
    let width = first.len();
    let mut graph = Graph::new("layers");
    let x = graph.add_input("x", ValueType::tensor(DType::F32, vec!["N".into(), 2.into()])).unwrap();
    let rows: Vec<f32> = (0..2).flat_map(|row| first.iter().map(move |column| column[row])).collect();
    let w1 = graph.add_constant("first", Tensor::new(&[2, width], &rows).unwrap());
    let w2 = graph.add_constant("second", Tensor::new(&[width, 3], &vec![1f32; 3 * width]).unwrap());
    let mut operands =
        vec![graph.op("MatMul", &[x, w1], []).unwrap(), graph.add_constant("gamma", Tensor::vector(gammas))];
    for (name, value) in [("beta", 0f32), ("mean", 0.0), ("variance", 1.0)] {
        operands.push(graph.add_constant(name, Tensor::vector(&vec![value; width])));
    }
    let h = graph.op("BatchNormalization", &operands, []).unwrap();
    let y = graph.op("MatMul", &[h, w2], []).unwrap();
    graph.push_output(y);
    graph
}

fn scored(graph: &Graph, importance: Importance, gradients: &BTreeMap<String, Tensor>) -> Vec<f64> {
    let found = groups::find(graph, &BTreeMap::new()).unwrap();
    assert_eq!(found.groups.len(), 1);
    scores(graph, &found.groups[0], importance, gradients, &updraft_base::Key::new(1)).unwrap().unwrap()
}

fn least(scores: &[f64]) -> usize {
    (0..scores.len()).min_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap()
}

#[test]
fn each_importance_finds_the_channel_that_its_definition_names() {
    // Columns by L1: 2.0, 2.2, 4, 4.2; by L2: 2.0, 1.56, 2.83, 2.97.
    let graph = two_layers(&[[2.0, 0.0], [1.1, 1.1], [2.0, 2.0], [2.1, 2.1]], &[1.0, 2.0, 0.1, 3.0]);
    let none = BTreeMap::new();
    assert_eq!(least(&scored(&graph, Importance::L1, &none)), 0);
    assert_eq!(least(&scored(&graph, Importance::L2, &none)), 1);
    assert_eq!(least(&scored(&graph, Importance::BatchNorm, &none)), 2);
    // The columns' mutual distances add up to least for the one in the middle.
    assert_eq!(least(&scored(&graph, Importance::GeometricMedian, &none)), 2);
    let gradients = BTreeMap::from([
        ("first".to_owned(), Tensor::new(&[2, 4], &[9f32, 9.0, 9.0, 0.1, 9.0, 9.0, 9.0, 0.1]).unwrap()),
        ("second".to_owned(), Tensor::new(&[4, 3], &[1f32; 12]).unwrap()),
    ]);
    assert_eq!(least(&scored(&graph, Importance::Taylor, &gradients)), 3);
    let found = groups::find(&graph, &BTreeMap::new()).unwrap();
    let error = scores(&graph, &found.groups[0], Importance::Taylor, &none, &updraft_base::Key::new(1)).unwrap_err();
    assert!(error.to_string().contains("gradient"), "{error}");
    let mean = |s: Vec<f64>| s.iter().sum::<f64>() / s.len() as f64;
    assert!((mean(scored(&graph, Importance::L2, &none)) - 1.0).abs() < 1e-12);
}

fn wide(width: usize) -> Graph {
    let columns: Vec<[f32; 2]> = (0..width).map(|i| [1.0 + i as f32, 0.0]).collect();
    two_layers(&columns, &vec![1.0; width])
}

fn width_after(width: usize, settings: &Settings) -> usize {
    let mut graph = wide(width);
    let pruned = prune(&mut graph, settings, &BTreeMap::new()).unwrap();
    let second = graph.find("second").and_then(|v| graph.value(v).constant()).unwrap();
    let after = pruned.widths.first().map_or(width, |w| w.after);
    assert_eq!(second.shape(), [after, 3]);
    after
}

#[test]
fn widths_are_multiples_and_at_least_one_multiple_is_left() {
    for (width, ratio, expected) in [
        (64, 0.5, 32),
        (64, 0.9, 8),
        (64, 0.99, 8),
        (24, 0.5, 16),
        (20, 0.5, 8),
        (8, 0.5, 8),
        (6, 0.5, 6),
        (20, 0.0, 20),
    ] {
        let settings = Settings { ratio_max: 0.99, ..Settings::new(ratio) };
        assert_eq!(width_after(width, &settings), expected, "{width} by {ratio}");
    }
    let unrounded = Settings { round_to: 1, ..Settings::new(0.5) };
    assert_eq!(width_after(6, &unrounded), 3);
    let limited = Settings { limits: vec![("fir*".to_owned(), 0.25)], ..Settings::new(0.5) };
    assert_eq!(width_after(64, &limited), 48);
}

#[test]
fn pruning_in_parts_ends_where_pruning_at_once_does() {
    let mut graph = wide(80);
    let mut settings = Settings::new(0.25);
    let first = prune(&mut graph, &settings, &BTreeMap::new()).unwrap();
    assert_eq!(first.widths[0].after, 64);
    settings = Settings { ratio: 0.5, widths: BTreeMap::from([("first".to_owned(), 80)]), ..settings };
    let second = prune(&mut graph, &settings, &BTreeMap::new()).unwrap();
    assert_eq!(second.widths[0].after, 40);
    // The smallest columns went, whatever the part.
    let left = graph.find("first").and_then(|v| graph.value(v).constant()).unwrap();
    assert_eq!(left.as_slice::<f32>().unwrap()[0], 41.0);
}

#[test]
fn what_is_excluded_is_refused_by_name_and_global_pruning_takes_the_least_anywhere() {
    let mut graph = wide(64);
    let excluded = Settings { exclude: vec!["second".to_owned()], ..Settings::new(0.5) };
    let pruned = prune(&mut graph, &excluded, &BTreeMap::new()).unwrap();
    assert!(pruned.widths.is_empty());
    let reasons: Vec<&str> = pruned.refused.iter().map(|r| r.reason.as_str()).collect();
    assert!(reasons.iter().any(|r| r.contains("excluded by \"second\"")), "{reasons:?}");
    assert!(reasons.iter().any(|r| r.contains("is an output of the graph")), "{reasons:?}");
    let global = Settings { scope: Scope::Global, ..Settings::new(0.5) };
    assert_eq!(width_after(64, &global), 32);
    let wrong = Settings::new(1.0);
    let error = prune(&mut graph, &wrong, &BTreeMap::new()).unwrap_err();
    assert!(error.to_string().contains("ratio is 1, expected a share from 0 to below 1"), "{error}");
}

fn sparse_settings(pattern: Pattern, scope: Scope) -> sparse::Settings {
    sparse::Settings { pattern, scope, exclude: Vec::new() }
}

#[test]
fn n_of_m_keeps_the_largest_n_of_every_m_inputs_of_each_output() {
    let graph = wide(64);
    let masks =
        sparse::choose(&graph, &sparse_settings(Pattern::Of { n: 2, m: 4 }, Scope::Local), &BTreeMap::new()).unwrap();
    // Rows of `second` all are ones: of equal weights the first are kept.
    let second = &masks["second"];
    for output in 0..3 {
        for run in 0..16 {
            let kept: Vec<bool> = (0..4).map(|i| second[(4 * run + i) * 3 + output]).collect();
            assert_eq!(kept, [true, true, false, false]);
        }
    }
    let error = sparse::choose(&graph, &sparse_settings(Pattern::Of { n: 5, m: 4 }, Scope::Local), &BTreeMap::new());
    assert!(error.unwrap_err().to_string().contains("5:4"));
}

#[test]
fn magnitude_pruning_zeroes_the_share_locally_and_the_smallest_globally() {
    let graph = wide(64);
    let zeros = |scope: Scope| {
        let masks = sparse::choose(&graph, &sparse_settings(Pattern::Share(0.25), scope), &BTreeMap::new()).unwrap();
        let count = |name: &str| masks[name].iter().filter(|stays| !**stays).count();
        (count("first"), count("second"))
    };
    assert_eq!(zeros(Scope::Local), (32, 48));
    // The second row of `first` is zero, and no weight of `second` is larger than the others of `first`.
    let (first, second) = zeros(Scope::Global);
    assert_eq!(first + second, 80);
    assert!(first >= 64, "{first}");
    let mut pruned = graph.clone();
    let masks = sparse::choose(&graph, &sparse_settings(Pattern::Share(0.25), Scope::Local), &BTreeMap::new()).unwrap();
    let (elements, found) = sparse::apply(&mut pruned, &masks).unwrap();
    assert_eq!(elements, 128 + 192);
    // Half of `first` was zero before.
    assert_eq!(found, 64 + 48);
}

#[test]
fn norms_of_inputs_decide_between_equal_weights_row_by_row() {
    let graph = wide(4);
    let norms = BTreeMap::from([("second".to_owned(), vec![1.0, 4.0, 2.0, 3.0])]);
    let masks = sparse::choose(&graph, &sparse_settings(Pattern::Share(0.5), Scope::Local), &norms).unwrap();
    for output in 0..3 {
        let kept: Vec<bool> = (0..4).map(|i| masks["second"][i * 3 + output]).collect();
        assert_eq!(kept, [false, true, false, true]);
    }
    let short = BTreeMap::from([("second".to_owned(), vec![1.0])]);
    assert!(sparse::choose(&graph, &sparse_settings(Pattern::Share(0.5), Scope::Local), &short).is_err());
}

#[test]
fn the_gradual_schedule_is_steep_at_first_and_ends_at_the_share() {
    let at = |step| sparse::cubic(0.0, 0.8, step, 4);
    assert_eq!((at(0), at(4), at(9)), (0.0, 0.8, 0.8));
    assert!((at(2) - 0.8 * (1.0 - 0.125)).abs() < 1e-12);
    assert!(at(1) - at(0) > at(2) - at(1) && at(2) - at(1) > at(4) - at(3));
}

#[test]
fn a_held_mask_leaves_the_outputs_and_the_names_of_weights() {
    let graph = wide(8);
    let masks = sparse::choose(&graph, &sparse_settings(Pattern::Share(0.5), Scope::Local), &BTreeMap::new()).unwrap();
    let (mut applied, mut held) = (graph.clone(), graph.clone());
    sparse::apply(&mut applied, &masks).unwrap();
    sparse::hold(&mut held, &masks).unwrap();
    let x = Tensor::new(&[2, 2], &[1f32, 2.0, -3.0, 0.5]).unwrap();
    let inputs = std::collections::HashMap::from([("x".to_owned(), x)]);
    let run = |graph: &Graph| updraft_graph::eval::evaluate(graph, &inputs).unwrap();
    assert_eq!(run(&applied), run(&held));
    assert!(held.find("first").is_some_and(|v| held.value(v).constant().is_some()));
}
