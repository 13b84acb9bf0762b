//! A search for the smallest language model.

use updraft_base::Key;
use updraft_compress::candidate::{Form, Pruning, Rounding};
use updraft_compress::measure::Metric;
use updraft_compress::search::{Objective, Outcome, SearchSettings, Trial, search};
use updraft_graph::onnx::{self, WriteOptions};
use updraft_graph::zoo::{self, Options, Setting};
use updraft_graph::{Graph, Tensor};

use crate::workplace::{Arrays, Workplace};

const CONTEXT: usize = 16;
const VOCABULARY: usize = 31;

fn untrained() -> Graph {
    let given = [("vocabulary", VOCABULARY), ("context", CONTEXT), ("layers", 2), ("heads", 2), ("width", 32)];
    let given: Vec<_> = given.iter().map(|(name, n)| ((*name).to_owned(), Setting::Integer(*n))).collect();
    let entry = zoo::find("gpt").unwrap();
    entry.build(&Options::of(entry, &given).unwrap(), 5).unwrap()
}

/// Texts in which each token follows from the one before, more or less, and the tokens that follow.
fn texts(name: &str, count: usize) -> Arrays {
    let key = Key::new(9).child(name);
    let (mut tokens, mut next) = (Vec::new(), Vec::new());
    for text in 0..count as u64 {
        let mut token = key.below(2 * text, VOCABULARY as u64) as i64;
        for i in 0..CONTEXT as u64 {
            tokens.push(token);
            token = (token * 3 + key.child("step").below(text * CONTEXT as u64 + i, 4) as i64) % VOCABULARY as i64;
            next.push(token);
        }
    }
    let shape = [count, CONTEXT];
    vec![
        ("tokens".to_owned(), Tensor::new(&shape, &tokens).unwrap()),
        ("label".to_owned(), Tensor::new(&shape, &next).unwrap()),
    ]
}

fn of_form(outcome: &Outcome, is_it: impl Fn(&Form) -> bool) -> Vec<&Trial> {
    let unpruned = outcome.trials.iter().filter(|t| t.candidate.pruning.is_none());
    unpruned.filter(|t| is_it(&t.candidate.form)).collect()
}

#[test]
fn every_way_to_make_a_language_model_smaller_is_tried_on_the_real_bench() {
    let workplace = Workplace::new(texts("train", 2048), texts("validation", 256), texts("test", 512));
    let model = workplace.trained(&untrained(), 250, 0.01);
    let size_bytes = onnx::write(&model, WriteOptions::default()).unwrap().len();
    let settings = |max_drop: f64| SearchSettings {
        objective: Objective::Size,
        max_drop,
        alpha: 0.05,
        pruning: vec![Pruning { ratio: 0.25, recovery_steps: 20 }],
        aware_steps: 20,
        reduced_range: false,
        symmetric: false,
    };
    let run = |max_drop: f64| {
        let mut note = |line: &str| println!("{line}");
        let mut bench = workplace.bench(&model, size_bytes, Metric::Perplexity, &mut note);
        search(&mut bench, &settings(max_drop)).unwrap()
    };

    let loose = run(0.1);
    let chosen = &loose.trials[loose.chosen];
    assert!(chosen.holdout.as_ref().unwrap().drop.high <= 0.1);
    // Codes of 4 bits with a scale for each 32, or of 8 with a scale a channel, and all that is no weight.
    assert!(3 * chosen.size_bytes.unwrap() < size_bytes as u64, "{chosen:?}");
    let small = of_form(&loose, |form| matches!(form, Form::WeightOnly(form) if form.bits == 4 && form.block == 32));
    assert_eq!(small.len(), 4);
    let divergences: Vec<f64> = small.iter().map(|t| t.divergence.unwrap()).collect();
    assert!(divergences[1..].iter().all(|d| *d < divergences[0]), "{divergences:?}");
    let smoothed = of_form(&loose, |form| matches!(form, Form::Static(form) if form.smoothed));
    assert!(!smoothed.is_empty() && smoothed[0].divergence.is_some(), "{smoothed:?}");

    // With no drop allowed, integers miss the limit and all that costs more is tried.
    let strict = run(0.0);
    let tried = |is_it: fn(&updraft_compress::candidate::StaticForm) -> bool| {
        let trials = of_form(&strict, |form| matches!(form, Form::Static(form) if is_it(form)));
        assert!(trials.iter().all(|t| t.refused.is_none()), "{trials:?}");
        // Others were only compared by divergence.
        trials.iter().find_map(|t| t.search.clone()).unwrap()
    };
    let whole = tried(|f| f.float_units.is_empty() && !f.wide && f.aware_steps == 0);
    let learned = tried(|form| form.rounding == Rounding::Learned);
    let wide = tried(|form| form.wide);
    let trained = tried(|form| form.aware_steps == 20);
    println!("{whole:?}\n{learned:?}\n{wide:?}\n{trained:?}");
    assert!(wide.drop.estimate.abs() < 0.02 && trained.drop.estimate < 0.1);
    assert!(strict.trials.iter().all(|t| !t.reason.is_empty()));
}
