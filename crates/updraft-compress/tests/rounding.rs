//! Rounding of a network's weights with a look at what its layers read.

use std::sync::atomic::{AtomicUsize, Ordering};

use updraft_base::random::Key;
use updraft_compress::CompressError;
use updraft_compress::layers::{ObserveOptions, observe};
use updraft_compress::quantize::{Form, Settings, quantize};
use updraft_compress::rounding::{Method, Rounding, RoundingOptions, round_weights};
use updraft_compress::smoothing::Factors;
use updraft_data::Batch;
use updraft_engine::{CompileOptions, CpuEngine, Engine};
use updraft_graph::zoo::{self, Options, Setting};
use updraft_graph::{DType, Graph, Tensor};
use updraft_passes::quantize::rounding::{AdaRoundOptions, GptqOptions, Layer, layers};
use updraft_passes::quantize::{Quantizer, QuantizerError, WeightOnly, WeightScale, prepare};

const BATCH: usize = 8;
const CONTEXT: usize = 16;

type Iter = Box<dyn Iterator<Item = Result<Batch, CompressError>>>;

fn prepared(entry: &str, given: &[(&str, Setting)]) -> Graph {
    let entry = zoo::find(entry).unwrap();
    let given: Vec<_> = given.iter().map(|(n, s)| ((*n).to_owned(), s.clone())).collect();
    let mut graph = entry.build(&Options::of(entry, &given).unwrap(), 5).unwrap();
    prepare(&mut graph).unwrap();
    graph
}

fn gpt() -> Graph {
    let given = [("vocabulary", 31), ("context", CONTEXT), ("layers", 2), ("heads", 2), ("width", 32)];
    prepared("gpt", &given.map(|(name, n)| (name, Setting::Integer(n))))
}

/// Batches of tokens in which each follows from the one before, more or less; the last batch is half padding.
fn texts(count: u64) -> impl Fn() -> Result<Iter, CompressError> {
    move || {
        let batch = move |step: u64| {
            let key = Key::new(9).child_index(step);
            let mut tokens = vec![0i64; BATCH * CONTEXT];
            for i in 0..tokens.len() {
                let before = if i % CONTEXT == 0 { 0 } else { tokens[i - 1] };
                tokens[i] = (before * 3 + key.below(i as u64, 5) as i64) % 31;
            }
            let real = if step + 1 == count { BATCH / 2 } else { BATCH };
            tokens[real * CONTEXT..].fill(0);
            let tensors = vec![("tokens".to_owned(), Tensor::new(&[BATCH, CONTEXT], &tokens).unwrap())];
            Ok(Batch { step, epoch: 0, tensors, samples: (0..real as u64).collect() })
        };
        Ok(Box::new((0..count).map(batch)))
    }
}

fn blocks_of_int4(layer: &Layer, weights: &Tensor) -> Result<Quantizer, QuantizerError> {
    match layer.input_axis() {
        Some(axis) => Quantizer::of_blocks(weights, DType::U4, axis, 16, WeightScale::MaxAbs),
        None => Quantizer::of_weights(weights, DType::I8, Some(layer.output_axis()), WeightScale::MaxAbs),
    }
}

fn round(graph: &Graph, method: Method, clip: bool, observe: ObserveOptions, batches: u64) -> Rounding {
    let engine = CpuEngine::new(1).unwrap();
    let options = RoundingOptions { method, clip, quantizer: &blocks_of_int4, observe, is_over: &|| false };
    let (found, _) = layers(graph).unwrap();
    round_weights(&engine, graph, &found, &texts(batches), &options).unwrap()
}

#[test]
fn every_method_that_looks_at_inputs_moves_outputs_less_than_rounding_to_nearest() {
    let graph = gpt();
    for (method, clip, factor) in [
        (Method::Nearest, true, 1.0),
        (Method::Gptq(GptqOptions::default()), false, 0.8),
        (Method::Gptq(GptqOptions::default()), true, 0.8),
        (Method::AdaRound(AdaRoundOptions { steps: 300, ..AdaRoundOptions::default() }), false, 0.8),
    ] {
        let found = round(&graph, method, clip, ObserveOptions::default(), 16);
        assert_eq!(found.refusals, []);
        // Four layers in each of two blocks, and the logits.
        assert_eq!((found.weights.len(), found.moved.len()), (9, 9));
        for moved in &found.moved {
            // Products are summed in f32.
            assert!(moved.rounded <= moved.nearest * 1.000_1, "{}: {moved:?}", method.name());
        }
        let (rounded, nearest) =
            found.moved.iter().fold((0.0, 0.0), |sum, moved| (sum.0 + moved.rounded, sum.1 + moved.nearest));
        assert!(rounded < factor * nearest, "{}: {rounded} against {nearest}", method.name());
    }
}

#[test]
fn rounding_to_nearest_runs_nothing() {
    let graph = gpt();
    let (found, _) = layers(&graph).unwrap();
    let engine = CpuEngine::new(1).unwrap();
    let never = || -> Result<Iter, CompressError> { panic!("data was read") };
    let observe = ObserveOptions::default();
    let options = RoundingOptions {
        method: Method::Nearest,
        clip: false,
        quantizer: &blocks_of_int4,
        observe,
        is_over: &|| false,
    };
    let rounding = round_weights(&engine, &graph, &found, &never, &options).unwrap();
    assert_eq!((rounding.weights.len(), rounding.moved.len()), (9, 0));
}

#[test]
fn rounding_ends_with_the_time() {
    let graph = gpt();
    let (found, _) = layers(&graph).unwrap();
    let asked = AtomicUsize::new(0);
    let third = || asked.fetch_add(1, Ordering::Relaxed) == 2;
    let options = RoundingOptions {
        method: Method::Gptq(GptqOptions::default()),
        clip: false,
        quantizer: &blocks_of_int4,
        observe: ObserveOptions::default(),
        is_over: &third,
    };
    let ended = round_weights(&CpuEngine::new(1).unwrap(), &graph, &found, &texts(16), &options);
    assert!(matches!(ended, Err(CompressError::TimeLimit)));
    assert_eq!(asked.into_inner(), 3);
}

#[test]
fn neither_threads_nor_sweeps_change_a_bit() {
    let graph = gpt();
    let method = Method::Gptq(GptqOptions::default());
    let of = |observe: ObserveOptions| round(&graph, method, true, observe, 6).weights;
    let expected = of(ObserveOptions::default());
    assert_eq!(of(ObserveOptions { threads: 3, ..ObserveOptions::default() }), expected);
    // One layer a sweep.
    assert_eq!(of(ObserveOptions { memory_bytes_max: 1, ..ObserveOptions::default() }), expected);
}

#[test]
fn layers_with_fewer_rows_than_inputs_are_rounded_to_nearest_and_listed() {
    let graph = gpt();
    let found = round(&graph, Method::Gptq(GptqOptions::default()), false, ObserveOptions::default(), 1);
    // Half a batch of 8 x 16 tokens: enough for layers of 32 inputs, too few for those of 128.
    assert_eq!(found.refusals.len(), 2, "{:?}", found.refusals);
    assert!(found.refusals.iter().all(|r| r.reason.contains("has 64 rows of inputs")), "{:?}", found.refusals);
    assert_eq!(found.weights.len(), 9);
    let (all, _) = layers(&graph).unwrap();
    let layer = all.iter().find(|l| l.node == found.refusals[0].node).unwrap();
    let weights = graph.value(graph.find(&layer.weights).unwrap()).constant().unwrap();
    let quantizer = blocks_of_int4(layer, weights).unwrap();
    assert_eq!(found.weights[&layer.weights].codes, quantizer.quantize(weights).unwrap());
}

#[test]
fn padding_counts_for_nothing_and_convolutions_are_seen_through_their_windows() {
    let graph = prepared("resnet8", &[]);
    let (found, refusals) = layers(&graph).unwrap();
    assert_eq!(refusals, []);
    let engine = CpuEngine::new(1).unwrap();
    let shape: Vec<usize> = graph.shape(graph.inputs()[0]).unwrap().iter().filter_map(|d| d.known()).collect();
    let per_sample: usize = shape.iter().product();
    let name = graph.value(graph.inputs()[0]).name.clone();
    let moments = |padding: f32| {
        let mut pixels = vec![0f32; 3 * per_sample];
        updraft_base::random::fill_normal(&Key::new(1), 0, &mut pixels);
        pixels[2 * per_sample..].fill(padding);
        let tensor = Tensor::new(&[&[3], shape.as_slice()].concat(), &pixels).unwrap();
        let batch = Batch { step: 0, epoch: 0, tensors: vec![(name.clone(), tensor)], samples: vec![0, 1] };
        let batches = move || -> Result<Iter, CompressError> { Ok(Box::new(std::iter::once(Ok(batch.clone())))) };
        let mut all = Vec::new();
        let options = ObserveOptions { rows_per_batch: 300, ..ObserveOptions::default() };
        observe(&engine, &graph, &found, &batches, &options, |sweep| {
            all.extend(sweep.into_iter().flat_map(|site| site.moments));
            Ok(())
        })
        .unwrap();
        all
    };
    let seen = moments(0.0);
    assert_eq!(seen.len(), found.len());
    for (moments, layer) in seen.iter().zip(&found) {
        assert_eq!(moments.columns(), layer.columns());
        assert!((2..=300).contains(&moments.rows()), "{}: {}", layer.node, moments.rows());
    }
    assert_eq!(seen, moments(1000.0));
}

#[test]
fn a_number_that_is_none_names_the_layer() {
    let mut graph = gpt();
    let table = graph.find("wpe.weight").unwrap();
    let mut tensor = graph.value(table).constant().unwrap().clone();
    tensor.as_mut_slice::<f32>().unwrap()[3] = f32::NAN;
    graph.set_constant(table, Some(tensor));
    let (found, _) = layers(&graph).unwrap();
    let engine = CpuEngine::new(1).unwrap();
    let error = observe(&engine, &graph, &found, &texts(1), &ObserveOptions::default(), |_| Ok(())).unwrap_err();
    assert!(matches!(&error, CompressError::Layer { .. }), "{error}");
    assert!(error.to_string().contains("expected a finite number"), "{error}");
}

#[test]
fn networks_quantized_with_a_look_at_inputs_answer_more_like_the_original() {
    let graph = gpt();
    let engine = CpuEngine::new(1).unwrap();
    let batch = texts(1)().unwrap().next().unwrap().unwrap();
    let answer = |graph: &Graph| {
        let mut session = engine.compile(graph, &CompileOptions::default()).unwrap();
        session.run(&[("tokens", &batch.tensors[0].1)]).unwrap().remove(0).to_f64().unwrap()
    };
    let original = answer(&graph);
    let error = |factors: Option<Factors>, clip: bool, rounding: Method| {
        let form = WeightOnly { bits: 4, block: 16, weight_scale: WeightScale::MaxAbs, exclude: Default::default() };
        let form = Form::WeightOnly(form);
        let settings = Settings { form, equalize: false, factors, clip, rounding, observe: ObserveOptions::default() };
        let made = quantize(&engine, &graph, &settings, Some(&texts(16))).unwrap();
        original.iter().zip(answer(&made.graph)).map(|(a, b)| (a - b).powi(2)).sum::<f64>()
    };
    let nearest = error(None, false, Method::Nearest);
    assert!(nearest > 0.0);
    for (factors, clip, rounding) in [
        (None, false, Method::Gptq(GptqOptions::default())),
        (Some(Factors::Awq), true, Method::Gptq(GptqOptions::default())),
        (None, false, Method::AdaRound(AdaRoundOptions { steps: 300, ..AdaRoundOptions::default() })),
    ] {
        let found = error(factors, clip, rounding);
        assert!(found < 0.8 * nearest, "{factors:?} {}: {found} against {nearest}", rounding.name());
    }
}

#[test]
fn no_batches_are_refused() {
    let graph = gpt();
    let (found, _) = layers(&graph).unwrap();
    let engine = CpuEngine::new(1).unwrap();
    let error = observe(&engine, &graph, &found, &texts(0), &ObserveOptions::default(), |_| Ok(())).unwrap_err();
    assert_eq!(error.to_string(), "calibration data has no batch");
}
