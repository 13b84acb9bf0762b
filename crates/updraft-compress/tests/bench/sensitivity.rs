//! Whether the divergence that ranks units tells the damage that is done by quantizing them.
//!
//! Nine layers of a trained network are quantized one at a time. What 64 samples say is compared, rank by rank, with what
//! 8,192 others say: with the divergence itself, where a scale a channel leaves so little damage that losses move by less
//! than their error on any sample of this size; and with the rise of the loss where channels have very different ranges
//! and all weights of a layer one scale, as in the networks that 8 bits are known to ruin.

use updraft_base::Key;
use updraft_compress::CompressError;
use updraft_compress::calibrate::Method;
use updraft_compress::candidate::{Calibrator, StaticForm as Candidate};
use updraft_compress::layers::ObserveOptions;
use updraft_compress::measure::{Answers, Compiled, Metric, Output, Scores, Task};
use updraft_compress::quantize::{Form, Settings, StaticForm, quantize};
use updraft_compress::rounding;
use updraft_compress::search::Workbench;
use updraft_compress::splits::Split;
use updraft_data::Batch;
use updraft_engine::CpuEngine;
use updraft_graph::zoo::{self, Options, Setting};
use updraft_graph::{Graph, Tensor};
use updraft_passes::quantize::{Scheme, prepare, units};

use crate::workplace::{Arrays, Workplace};

const AXES: usize = 8;
const CLASSES: usize = 6;
const WIDTHS: [usize; 8] = [16, 64, 24, 48, 96, 32, 64, 40];

/// Powers of ten over which the ranges of each hidden layer's channels are spread.
const SPREADS: [f32; 8] = [0.3, 1.6, 0.8, 2.0, 0.1, 1.2, 0.5, 2.4];

/// Samples that units are ranked by; what the bench takes.
const RANKED_BY: u64 = 64;

/// Clouds that overlap, so that the best network is often unsure.
fn clouds(name: &str, samples: usize) -> Arrays {
    let key = Key::new(8).child(name);
    let centres = Key::new(8).child("centres");
    let labels: Vec<i64> = (0..samples as u64).map(|i| key.below(i, CLASSES as u64) as i64).collect();
    let noise = key.child("noise");
    let points: Vec<f32> = (0..(samples * AXES) as u64)
        .map(|i| {
            let (sample, axis) = (i as usize / AXES, i % AXES as u64);
            let centre = centres.normal_f32(labels[sample] as u64 * AXES as u64 + axis);
            centre + 1.2 * noise.normal_f32(i)
        })
        .collect();
    vec![
        ("features".to_owned(), Tensor::new(&[samples, AXES], &points).unwrap()),
        ("label".to_owned(), Tensor::vector(&labels)),
    ]
}

fn untrained() -> Graph {
    let entry = zoo::find("mlp").unwrap();
    let given = [
        ("inputs".to_owned(), Setting::Integer(AXES)),
        ("hidden".to_owned(), Setting::Integers(WIDTHS.to_vec())),
        ("classes".to_owned(), Setting::Integer(CLASSES)),
    ];
    entry.build(&Options::of(entry, &given).unwrap(), 4).unwrap()
}

/// The same function with ranges of channels that are far apart: each is scaled by a power of ten before the ReLU and back
/// after it.
fn spread(graph: &Graph) -> Graph {
    let mut graph = graph.clone();
    for (layer, spread) in SPREADS.iter().enumerate() {
        let width = WIDTHS[layer];
        let factors: Vec<f32> = (0..width).map(|c| 10f32.powf(-spread * c as f32 / (width - 1) as f32)).collect();
        let next =
            if layer + 1 < WIDTHS.len() { format!("hidden.{}.weight", layer + 1) } else { "head.weight".to_owned() };
        // Weights are [in, out].
        let mut scale = |name: &str, factor: &dyn Fn(usize) -> f32| {
            let value = graph.find(name).unwrap();
            let mut tensor = graph.value(value).constant().unwrap().clone();
            tensor.as_mut_slice::<f32>().unwrap().iter_mut().enumerate().for_each(|(i, w)| *w *= factor(i));
            graph.set_constant(value, Some(tensor));
        };
        scale(&format!("hidden.{layer}.weight"), &|i| factors[i % width]);
        scale(&format!("hidden.{layer}.bias"), &|i| factors[i]);
        let columns = WIDTHS.get(layer + 1).copied().unwrap_or(CLASSES);
        scale(&next, &|i| 1.0 / factors[i / columns]);
    }
    graph
}

/// The graph with one unit quantized.
fn with_one(graph: &Graph, unit: &str, per_channel: bool, calibration: &[Batch]) -> Graph {
    let mut prepared = graph.clone();
    prepare(&mut prepared).unwrap();
    let others = units(&prepared).unwrap().into_iter().map(|u| u.node).filter(|node| node != unit);
    let scheme = Scheme { per_channel, exclude: others.collect(), ..Scheme::default() };
    let settings = Settings {
        form: Form::Static(StaticForm { scheme, calibration: Method::MinMax, bias_correction: false }),
        equalize: false,
        factors: None,
        clip: false,
        rounding: rounding::Method::Nearest,
        observe: ObserveOptions::default(),
    };
    type Iter<'a> = Box<dyn Iterator<Item = Result<Batch, CompressError>> + 'a>;
    let batches = || -> Result<Iter, CompressError> { Ok(Box::new(calibration.iter().cloned().map(Ok))) };
    quantize(&CpuEngine::new(1).unwrap(), graph, &settings, Some(&batches)).unwrap().graph
}

/// What a graph answers to batches.
fn answers(graph: &Graph, task: &Task, batches: &[Batch]) -> Vec<Output> {
    let mut compiled = Compiled::new(&CpuEngine::new(1).unwrap(), graph, task).unwrap();
    batches.iter().map(|batch| compiled.answer(batch).unwrap()).collect()
}

fn divergence(own: &[Output], others: &[Output], batches: &[Batch]) -> f64 {
    let terms = own.iter().zip(others).zip(batches).map(|((p, q), batch)| p.divergence_sum(q, batch).unwrap());
    let (sum, rows) = terms.fold((0.0, 0), |(sum, rows), (s, r)| (sum + s, rows + r));
    sum / rows as f64
}

fn loss(outputs: &[Output], task: &Task, batches: &[Batch]) -> f64 {
    let mut scores = Scores::default();
    outputs.iter().zip(batches).for_each(|(output, batch)| scores.add(task, batch, output).unwrap());
    Metric::Loss.value(&scores)
}

/// Spearman's rank correlation of numbers of which no two are equal.
fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |v: &[f64]| -> Vec<f64> { v.iter().map(|x| v.iter().filter(|y| *y < x).count() as f64).collect() };
    let squares: f64 = ranks(a).iter().zip(ranks(b)).map(|(a, b)| (a - b).powi(2)).sum();
    let n = a.len() as f64;
    1.0 - 6.0 * squares / (n * (n * n - 1.0))
}

#[test]
fn units_rank_by_64_samples_as_by_the_damage_on_thousands() {
    let workplace = Workplace::new(clouds("train", 4096), clouds("validation", 512), clouds("test", 8192));
    let (splits, task) = (&workplace.splits, &workplace.task);
    let model = workplace.trained(&untrained(), 400, 0.003);
    let all = |split: &Split| -> Vec<Batch> { split.batches(0).unwrap().map(Result::unwrap).collect() };
    let (calibration, ranked_by, many) =
        (all(&splits.calibration), all(&splits.search.first(RANKED_BY)), all(&splits.holdout));
    let of_ranked = answers(&model.graph, task, &ranked_by);
    let of_many = answers(&model.graph, task, &many);
    let loss_before = loss(&of_many, task, &many);
    // Well trained, and far from sure: chance is ln 6 = 1.79.
    assert!(loss_before > 0.2 && loss_before < 1.2, "{loss_before}");

    let mut note = |_: &str| ();
    let mut bench = workplace.bench(&model, 1, Metric::Accuracy, &mut note);
    let ranked = bench.sensitivity(&Candidate::plain(Calibrator::MinMax, false)).unwrap();
    assert_eq!(ranked.len(), 9);

    let spread = spread(&model.graph);
    let unmoved = answers(&spread, task, &many);
    assert!(divergence(&of_many, &unmoved, &many) < 1e-6);

    let by_64: Vec<f64> = ranked.iter().map(|unit| unit.divergence).collect();
    let (mut by_many, mut spread_by_64, mut rises) = (Vec::new(), Vec::new(), Vec::new());
    for unit in &ranked {
        let made = with_one(&model.graph, &unit.unit, true, &calibration);
        by_many.push(divergence(&of_many, &answers(&made, task, &many), &many));
        let made = with_one(&spread, &unit.unit, false, &calibration);
        spread_by_64.push(divergence(&of_ranked, &answers(&made, task, &ranked_by), &ranked_by));
        rises.push(loss(&answers(&made, task, &many), task, &many) - loss_before);
    }
    let found = [spearman(&by_64, &by_many), spearman(&spread_by_64, &rises)];
    println!("rank correlations: {found:?}\nof {by_64:?}\nand {by_many:?},\nof {spread_by_64:?}\nand {rises:?}");
    assert!(found.iter().all(|r| *r >= 0.9), "{found:?}");
}
