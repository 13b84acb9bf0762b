//! Static quantization: where pairs go, what is left alone and why, and what is refused.

use std::collections::{BTreeMap, HashMap};

use updraft_base::random::{Key, fill_uniform};
use updraft_graph::eval::evaluate;
use updraft_graph::zoo::{self, Options, Setting};
use updraft_graph::{Attribute, DType, Graph, Tensor, ValueId, ValueType, dim::dims};
use updraft_passes::quantize::{
    Decision, EQUALIZE, Half, Range, RoundedWeights, Scheme, bias_probe, correct_biases, dynamic, half, insert,
    observed, prepare, units,
};
use updraft_passes::{PassError, Promise, Report};

fn numbers(seed: u64, shape: &[usize]) -> Tensor {
    let mut drawn = vec![0f32; shape.iter().product()];
    fill_uniform(&Key::new(seed), 0, &mut drawn);
    drawn.iter_mut().for_each(|v| *v = *v * 2.0 - 1.0);
    Tensor::new(shape, &drawn).unwrap()
}

fn input(graph: &mut Graph, shape: &[usize]) -> ValueId {
    graph.add_input("x", ValueType::tensor(DType::F32, dims(shape))).unwrap()
}

fn constant(graph: &mut Graph, name: &str, seed: u64, shape: &[usize]) -> ValueId {
    graph.add_constant(name, numbers(seed, shape))
}

/// The range of every observed value for one input of this shape.
fn ranges(graph: &Graph, scheme: &Scheme, x: &Tensor) -> BTreeMap<String, Range> {
    let names = observed(graph, scheme).unwrap();
    let mut looked = graph.clone();
    looked.set_outputs(names.iter().map(|name| looked.find(name).unwrap()).collect());
    let seen = evaluate(&looked, &given(graph, x)).unwrap();
    names.into_iter().zip(seen.iter().map(|t| Range::of_tensor(t).unwrap())).collect()
}

fn given(graph: &Graph, x: &Tensor) -> HashMap<String, Tensor> {
    let mut inputs = graph.inputs().iter().map(|v| graph.value(*v).name.clone());
    HashMap::from([(inputs.next().unwrap(), x.clone())])
}

/// Prepared, calibrated on `x` and quantized, with what became of each node.
fn quantized(graph: &Graph, scheme: &Scheme, x: &Tensor) -> (Graph, Vec<Decision>) {
    let mut graph = graph.clone();
    prepare(&mut graph).unwrap();
    let ranges = ranges(&graph, scheme, x);
    let decisions = insert(&mut graph, scheme, &ranges, &BTreeMap::new(), &mut report()).unwrap();
    updraft_graph::check::check(&graph).unwrap();
    (graph, decisions)
}

fn report() -> Report {
    Report::new("insert", Promise::Lossy)
}

/// Operators in execution order.
fn ops(graph: &Graph) -> Vec<&str> {
    graph.order().unwrap().into_iter().map(|id| graph.node(id).op.as_str()).collect()
}

fn count(graph: &Graph, op: &str) -> usize {
    ops(graph).into_iter().filter(|o| *o == op).count()
}

/// Power of `a` over that of what sets `b` apart from it.
fn signal_to_noise(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_f64().unwrap(), b.to_f64().unwrap());
    let power: f64 = a.iter().map(|a| a * a).sum();
    power / a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().max(1e-30)
}

/// `relu(conv(x)) -> conv -> + x' -> relu -> average -> gemm`, the shape of a residual network.
fn residual() -> Graph {
    let mut g = Graph::new("residual");
    let x = input(&mut g, &[1, 4, 6, 6]);
    let pads = || [("pads", Attribute::from([1i64, 1, 1, 1]))];
    let (w1, b1) = (constant(&mut g, "w1", 1, &[8, 4, 3, 3]), constant(&mut g, "b1", 2, &[8]));
    let (w2, b2) = (constant(&mut g, "w2", 3, &[8, 8, 3, 3]), constant(&mut g, "b2", 4, &[8]));
    let (w3, b3) = (constant(&mut g, "w3", 5, &[8, 10]), constant(&mut g, "b3", 6, &[1, 10]));
    let first = g.op("Conv", &[x, w1, b1], pads()).unwrap();
    let first = g.op("Relu", &[first], []).unwrap();
    let second = g.op("Conv", &[first, w2, b2], pads()).unwrap();
    let sum = g.op("Add", &[second, first], []).unwrap();
    let sum = g.op("Relu", &[sum], []).unwrap();
    let mean = g.op("GlobalAveragePool", &[sum], []).unwrap();
    let flat = g.op("Flatten", &[mean], []).unwrap();
    let y = g.op("Gemm", &[flat, w3, b3], []).unwrap();
    g.push_output(y);
    g
}

#[test]
fn a_residual_network_runs_on_integers_from_its_input_to_its_last_layer() {
    let x = numbers(9, &[1, 4, 6, 6]);
    let (graph, decisions) = quantized(&residual(), &Scheme::default(), &x);
    assert!(decisions.iter().all(|d| d.quantized), "{decisions:?}");
    // Input, two convolutions, sum, mean, flat; the last layer's output is for people.
    assert_eq!(count(&graph, "QuantizeLinear"), 6);
    // Codes that end at zero do what Relu does.
    assert_eq!(count(&graph, "Relu"), 0);
    for (_, node) in graph.nodes() {
        if matches!(node.op.as_str(), "Conv" | "Gemm") {
            let operand = |i: usize| graph.node(graph.value(node.inputs[i].unwrap()).producer().unwrap().0);
            let stored = |i: usize| graph.value(operand(i).inputs[0].unwrap()).constant().unwrap();
            assert_eq!(stored(1).dtype(), DType::I8);
            assert_eq!(stored(2).dtype(), DType::I32);
            assert_eq!(stored(2).rank(), 1);
            let scale = |i: usize| graph.value(operand(i).inputs[1].unwrap()).constant().unwrap().to_f64().unwrap();
            for (bias, weight) in scale(2).iter().zip(scale(1)) {
                assert_eq!(*bias as f32, scale(0)[0] as f32 * weight as f32);
            }
        }
    }
    let expected = evaluate(&residual(), &given(&graph, &x)).unwrap();
    let made = evaluate(&graph, &given(&graph, &x)).unwrap();
    // Eight bits are some 50 dB below the largest value, and six roundings follow one another.
    assert!(signal_to_noise(&expected[0], &made[0]) > 1e3);
}

#[test]
fn every_form_of_codes_comes_close_to_the_network() {
    let x = numbers(9, &[1, 4, 6, 6]);
    let expected = evaluate(&residual(), &given(&residual(), &x)).unwrap();
    let plain = Scheme::default();
    let cases = [
        (plain.clone(), 1e3),
        (Scheme { activations: DType::I8, ..plain.clone() }, 1e3),
        (Scheme { activations: DType::I8, symmetric_activations: true, ..plain.clone() }, 3e2),
        (Scheme { activations: DType::U16, ..plain.clone() }, 5e3),
        (Scheme { activations: DType::I16, symmetric_activations: true, ..plain.clone() }, 5e3),
        (Scheme { reduce_range: true, ..plain.clone() }, 5e2),
        (Scheme { per_channel: false, ..plain.clone() }, 5e2),
        (Scheme { weights: DType::I4, ..plain }, 1e1),
    ];
    for (scheme, least) in cases {
        let (graph, _) = quantized(&residual(), &scheme, &x);
        let made = evaluate(&graph, &given(&graph, &x)).unwrap();
        let found = signal_to_noise(&expected[0], &made[0]);
        assert!(found > least, "{scheme:?}: {found}");
        if scheme.reduce_range {
            let codes = graph.constants().filter(|(_, t)| t.dtype() == DType::I8 && t.len() > 16);
            assert!(codes.flat_map(|(_, t)| t.to_i64().unwrap()).all(|q| (-64..=63).contains(&q)));
        }
    }
}

#[test]
fn what_is_excluded_stays_float_and_says_so() {
    let x = numbers(9, &[1, 4, 6, 6]);
    let mut graph = residual();
    prepare(&mut graph).unwrap();
    let layer = units(&graph).unwrap()[1].clone();
    assert_eq!((layer.op.as_str(), layer.weights.unwrap().axis), ("Conv", Some(0)));
    // 8 channels of 36 places, each a sum of 72 products.
    assert_eq!(layer.flops.unwrap() / (2 * 8 * 36), 72);
    let scheme = Scheme { exclude: [layer.node.clone()].into(), ..Scheme::default() };
    let ranges = ranges(&graph, &scheme, &x);
    let mut report = report();
    let decisions = insert(&mut graph, &scheme, &ranges, &BTreeMap::new(), &mut report).unwrap();
    let reason = |op: &str| {
        decisions.iter().filter(|d| d.op == op && !d.quantized).map(|d| d.reason.clone()).collect::<Vec<_>>()
    };
    assert_eq!(reason("Conv"), ["it is excluded"]);
    assert!(reason("Add")[0].contains("stays float"), "{decisions:?}");
    assert_eq!(report.refusals.len(), decisions.iter().filter(|d| !d.quantized).count());
}

#[test]
fn a_product_of_two_values_and_its_softmax_run_between_integers() {
    let mut g = Graph::new("attention");
    let x = input(&mut g, &[1, 5, 8]);
    let w = constant(&mut g, "w", 1, &[8, 8]);
    let b = constant(&mut g, "b", 2, &[8]);
    let q = g.op("MatMul", &[x, w], []).unwrap();
    let q = g.op("Add", &[q, b], []).unwrap();
    let k = g.op("Transpose", &[q], [("perm", [0i64, 2, 1].into())]).unwrap();
    let scores = g.op("MatMul", &[q, k], []).unwrap();
    let shares = g.op("Softmax", &[scores], []).unwrap();
    let y = g.op("MatMul", &[shares, q], []).unwrap();
    let y = g.op("LayerNormalization", &[y, b], []).unwrap();
    g.push_output(y);
    let x = numbers(3, &[1, 5, 8]);
    let (graph, decisions) = quantized(&g, &Scheme::default(), &x);
    let float: Vec<&str> = decisions.iter().filter(|d| !d.quantized).map(|d| d.op.as_str()).collect();
    assert_eq!(float, ["Softmax", "LayerNormalization"]);
    // x, the product with its bias, its transposition, and the shares; scores are read by Softmax alone.
    assert_eq!(count(&graph, "QuantizeLinear"), 4);
    let expected = evaluate(&g, &given(&g, &x)).unwrap();
    let made = evaluate(&graph, &given(&graph, &x)).unwrap();
    assert!(signal_to_noise(&expected[0], &made[0]) > 1e3);
}

#[test]
fn joined_values_have_one_scale_and_shared_weights_are_stored_once() {
    let mut g = Graph::new("joined");
    let x = input(&mut g, &[1, 4, 5, 5]);
    let w = constant(&mut g, "w", 1, &[4, 4, 1, 1]);
    let a = g.op("Conv", &[x, w], []).unwrap();
    let b = g.op("Conv", &[a, w], []).unwrap();
    let joined = g.op("Concat", &[a, b], [("axis", 1i64.into())]).unwrap();
    let v = constant(&mut g, "v", 2, &[3, 8, 1, 1]);
    let y = g.op("Conv", &[joined, v], []).unwrap();
    g.push_output(y);
    let (graph, _) = quantized(&g, &Scheme::default(), &numbers(3, &[1, 4, 5, 5]));
    // Runtimes refuse nodes of one name.
    assert!(graph.nodes().filter(|(_, n)| n.op.ends_with("Linear")).all(|(_, n)| n.name.is_empty()));
    let scales: std::collections::BTreeSet<ValueId> =
        graph.nodes().filter(|(_, n)| n.op == "QuantizeLinear").map(|(_, n)| n.inputs[1].unwrap()).collect();
    // The input, all that is joined, and the output.
    assert_eq!(scales.len(), 3);
    assert_eq!(graph.constants().filter(|(_, t)| t.dtype() == DType::I8 && t.rank() == 4).count(), 2);
}

#[test]
fn a_bias_that_32_bits_do_not_hold_makes_the_steps_of_its_weights_coarser() {
    let mut g = Graph::new("large bias");
    let x = input(&mut g, &[1, 4]);
    let w = g.add_constant("w", Tensor::new(&[4, 2], &[1e-9f32, 1.0, -1e-9, 0.5, 1e-9, -1.0, 0.0, 0.25]).unwrap());
    let b = g.add_constant("b", Tensor::vector(&[300f32, -0.5]));
    let y = g.op("Gemm", &[x, w, b], []).unwrap();
    g.push_output(y);
    let x = Tensor::new(&[1, 4], &[1f32, -1.0, 0.5, 0.25]).unwrap();
    let (graph, _) = quantized(&g, &Scheme::default(), &x);
    let (expected, made) =
        (evaluate(&g, &given(&g, &x)).unwrap().remove(0), evaluate(&graph, &given(&graph, &x)).unwrap().remove(0));
    for (a, b) in expected.to_f64().unwrap().iter().zip(made.to_f64().unwrap()) {
        assert!((a - b).abs() <= 0.02, "{a} became {b}");
    }
}

#[test]
fn gemm_in_all_its_forms_keeps_a_scale_a_channel() {
    // A bias of one row of columns, factors, and transposed weights.
    for (transposed, bias_shape) in [(0i64, &[1usize, 3][..]), (1, &[3]), (0, &[1]), (1, &[])] {
        let mut g = Graph::new("gemm");
        let x = input(&mut g, &[2, 6]);
        let w = constant(&mut g, "w", 1, if transposed == 1 { &[3, 6] } else { &[6, 3] });
        let b = constant(&mut g, "b", 2, bias_shape);
        let attributes = [("transB", transposed.into()), ("alpha", 0.5f32.into()), ("beta", 2f32.into())];
        let y = g.op("Gemm", &[x, w, b], attributes).unwrap();
        g.push_output(y);
        let x = numbers(3, &[2, 6]);
        let (graph, decisions) = quantized(&g, &Scheme { activations: DType::U16, ..Scheme::default() }, &x);
        assert!(decisions[0].reason.ends_with("per channel"), "{decisions:?}");
        let biases = graph.constants().filter(|(_, t)| t.dtype() == DType::I32 && t.shape() == [3]);
        assert_eq!(biases.count(), 1, "{bias_shape:?}");
        let expected = evaluate(&g, &given(&g, &x)).unwrap();
        let made = evaluate(&graph, &given(&graph, &x)).unwrap();
        assert!(signal_to_noise(&expected[0], &made[0]) > 1e4);
    }
}

#[test]
fn weights_that_a_file_lists_among_its_inputs_are_weights() {
    let x = numbers(9, &[1, 4, 6, 6]);
    let mut listed = residual();
    let weights: Vec<ValueId> = listed.constants().map(|(v, _)| v).collect();
    weights.into_iter().for_each(|v| listed.push_input(v));
    let (graph, decisions) = quantized(&listed, &Scheme::default(), &x);
    assert_eq!(graph.inputs().len(), 1);
    assert!(decisions.iter().all(|d| d.quantized), "{decisions:?}");
}

#[test]
fn given_codes_of_weights_are_stored_as_they_are() {
    let x = numbers(9, &[1, 4, 6, 6]);
    let mut graph = residual();
    prepare(&mut graph).unwrap();
    let scheme = Scheme::default();
    let name = units(&graph).unwrap()[0].weights.clone().unwrap().name;
    let weights = graph.value(graph.find(&name).unwrap()).constant().unwrap().clone();
    let quantizer = scheme.weight_quantizer(&weights, Some(0)).unwrap();
    let mut codes = quantizer.quantize(&weights).unwrap();
    codes.as_mut_slice::<i8>().unwrap()[0] ^= 1;
    let ranges = ranges(&graph, &scheme, &x);
    let given = BTreeMap::from([(name, RoundedWeights { quantizer, codes: codes.clone() })]);
    insert(&mut graph, &scheme, &ranges, &given, &mut report()).unwrap();
    assert!(graph.constants().any(|(_, t)| *t == codes));
}

#[test]
fn missing_and_impossible_ranges_and_weights_are_named() {
    let x = numbers(9, &[1, 4, 6, 6]);
    let mut graph = residual();
    prepare(&mut graph).unwrap();
    let scheme = Scheme::default();
    let good = ranges(&graph, &scheme, &x);
    let refuse = |graph: &Graph, ranges: &BTreeMap<String, Range>, words: &[&str]| {
        let error = insert(&mut graph.clone(), &scheme, ranges, &BTreeMap::new(), &mut report()).unwrap_err();
        assert!(words.iter().all(|w| error.to_string().contains(w)), "{error}");
    };
    refuse(&graph, &BTreeMap::new(), &["\"x\"", "calibrated"]);
    for (min, max) in [(f32::NAN, 1.0), (0.0, f32::INFINITY)] {
        let mut bad = good.clone();
        bad.insert("x".to_owned(), Range { min, max });
        refuse(&graph, &bad, &["\"x\"", "finite"]);
    }
    let mut broken = graph.clone();
    let w = broken.find(&units(&graph).unwrap()[0].weights.clone().unwrap().name).unwrap();
    let mut weights = broken.value(w).constant().unwrap().clone();
    weights.as_mut_slice::<f32>().unwrap()[7] = f32::NAN;
    broken.set_constant(w, Some(weights));
    refuse(&broken, &good, &["w1", "element 7", "NaN"]);
    let wrong = Scheme { activations: DType::F16, ..scheme.clone() };
    let error = insert(&mut graph.clone(), &wrong, &good, &BTreeMap::new(), &mut report()).unwrap_err();
    assert!(matches!(error, PassError::Option { option: "activations", .. }));
    let (mut twice, _) = quantized(&residual(), &scheme, &x);
    let error = prepare(&mut twice).unwrap_err().to_string();
    assert!(error.contains("quantized already"), "{error}");
}

#[test]
fn networks_of_the_zoo_are_quantized_but_for_what_has_no_integer_form() {
    let cases = [
        ("resnet8", "", &[1usize, 3, 32, 32], 1e2),
        ("mobilenet-v2", "image=32", &[1, 3, 32, 32], 1e1),
        ("vit", "image=32 layers=2 patch=16", &[1, 3, 32, 32], 1e2),
    ];
    for (name, settings, shape, least) in cases {
        let entry = zoo::find(name).unwrap();
        let settings: Vec<(String, Setting)> = settings
            .split_whitespace()
            .filter_map(|s| s.split_once('='))
            .map(|(name, size)| (name.to_owned(), Setting::Integer(size.parse().unwrap())))
            .collect();
        let graph = entry.build(&Options::of(entry, &settings).unwrap(), 0).unwrap();
        let x = numbers(4, shape);
        let (made, decisions) = quantized(&graph, &Scheme::default(), &x);
        let layers = ["Conv", "Gemm", "MatMul"];
        let left: Vec<&Decision> =
            decisions.iter().filter(|d| layers.contains(&d.op.as_str()) && !d.quantized).collect();
        assert!(left.is_empty(), "{name}: {left:?}");
        let expected = evaluate(&graph, &given(&graph, &x)).unwrap();
        let found = signal_to_noise(&expected[0], &evaluate(&made, &given(&graph, &x)).unwrap()[0]);
        assert!(found > least, "{name}: {found}");
    }
}

/// A chain of layers whose channels differ by factors of a hundred, which the next layer takes back.
fn uneven() -> Graph {
    let mut g = Graph::new("uneven");
    let x = input(&mut g, &[1, 4, 6, 6]);
    let scaled = |seed: u64, shape: &[usize], factor: f32| {
        let mut weights = numbers(seed, shape);
        let per_channel = weights.len() / shape[0];
        let all = weights.as_mut_slice::<f32>().unwrap().iter_mut().enumerate();
        all.for_each(|(i, w)| *w *= factor.powi((i / per_channel % 3) as i32));
        weights
    };
    let w1 = g.add_constant("w1", scaled(1, &[8, 4, 3, 3], 10.0));
    let w2 = g.add_constant("w2", scaled(3, &[8, 1, 3, 3], 0.1));
    let (b1, b2) = (constant(&mut g, "b1", 2, &[8]), constant(&mut g, "b2", 4, &[8]));
    let (w3, b3) = (constant(&mut g, "w3", 5, &[8 * 9, 5]), constant(&mut g, "b3", 6, &[5]));
    let y = g.op("Conv", &[x, w1, b1], []).unwrap();
    let y = g.op("Relu", &[y], []).unwrap();
    let y = g.op("Conv", &[y, w2, b2], [("group", 8i64.into()), ("pads", [1i64, 1, 1, 1].into())]).unwrap();
    let y = g.op("Relu", &[y], []).unwrap();
    let y = g.op("MaxPool", &[y], [("kernel_shape", [2i64, 2].into())]).unwrap();
    let y = g.op("Flatten", &[y], []).unwrap();
    let y = g.op("Gemm", &[y, w3, b3], []).unwrap();
    g.push_output(y);
    g
}

#[test]
fn equalization_saves_networks_whose_channels_differ_and_changes_nothing_else() {
    let x = numbers(9, &[1, 4, 6, 6]);
    let graph = uneven();
    let mut equal = graph.clone();
    let mut pipeline = updraft_passes::pipeline::Pipeline::new(&mut equal);
    pipeline.run(EQUALIZE).unwrap();
    let reports = pipeline.finish();
    // The convolutions, and the second with the product behind pooling and flattening.
    assert_eq!(reports[0].changes.len(), 2, "{reports:?}");
    let answer = |g: &Graph| evaluate(g, &given(g, &x)).unwrap().remove(0);
    let expected = answer(&graph);
    assert!(signal_to_noise(&expected, &answer(&equal)) > 1e8);
    let scheme = Scheme { per_channel: false, ..Scheme::default() };
    let noise = |g: &Graph| signal_to_noise(&expected, &answer(&quantized(g, &scheme, &x).0));
    assert!(noise(&equal) > 2.0 * noise(&graph), "{} {}", noise(&equal), noise(&graph));
}

#[test]
fn corrected_biases_give_layers_the_mean_they_had() {
    let x = numbers(9, &[1, 4, 6, 6]);
    let scheme = Scheme { weights: DType::I4, ..Scheme::default() };
    let mut graph = residual();
    prepare(&mut graph).unwrap();
    let ranges = ranges(&graph, &scheme, &x);
    let shifts = |graph: &Graph| {
        let probe = bias_probe(graph, &scheme, &ranges, &BTreeMap::new()).unwrap();
        let means = evaluate(&probe.graph, &given(graph, &x)).unwrap();
        let pairs = means.chunks_exact(2).map(|pair| {
            let (float, integer) = (pair[0].to_f64().unwrap(), pair[1].to_f64().unwrap());
            float.iter().zip(&integer).map(|(f, i)| f - i).collect::<Vec<f64>>()
        });
        probe.layers.into_iter().zip(pairs).collect::<BTreeMap<String, Vec<f64>>>()
    };
    let wanted = shifts(&graph);
    assert_eq!(wanted.len(), 3);
    assert!(wanted.values().flatten().any(|s| s.abs() > 1e-3));
    let mut moved = graph.clone();
    correct_biases(&mut moved, &scheme, &wanted, &mut report()).unwrap();
    // The floats moved by what integers lack.
    let before = evaluate(&graph, &given(&graph, &x)).unwrap().remove(0);
    let integers = |graph: &Graph| {
        let mut made = graph.clone();
        insert(&mut made, &scheme, &ranges, &BTreeMap::new(), &mut report()).unwrap();
        evaluate(&made, &given(graph, &x)).unwrap().remove(0)
    };
    assert!(signal_to_noise(&before, &integers(&moved)) > signal_to_noise(&before, &integers(&graph)));
}

#[test]
fn products_of_values_as_they_come_share_their_codes_and_keep_biases() {
    let x = numbers(9, &[1, 4, 6, 6]);
    let mut graph = residual();
    prepare(&mut graph).unwrap();
    let expected = evaluate(&graph, &given(&graph, &x)).unwrap().remove(0);
    let decisions = dynamic(&mut graph, &Scheme::default(), &mut report()).unwrap();
    assert_eq!(decisions.iter().filter(|d| d.quantized).count(), 3);
    assert_eq!((count(&graph, "ConvInteger"), count(&graph, "MatMulInteger")), (2, 1));
    let made = evaluate(&graph, &given(&graph, &x)).unwrap().remove(0);
    assert!(signal_to_noise(&expected, &made) > 1e3);
}

#[test]
fn half_precision_leaves_out_what_leaves_its_range() {
    let mut g = Graph::new("large");
    let x = input(&mut g, &[1, 4]);
    let large = g.add_constant("large", Tensor::new(&[4, 4], &[1e5f32; 16]).unwrap());
    let small = g.add_constant("small", Tensor::new(&[4, 4], &[1e-9f32; 16]).unwrap());
    let a = g.op("MatMul", &[x, large], []).unwrap();
    let b = g.op("MatMul", &[a, small], []).unwrap();
    let y = g.op("Relu", &[b], []).unwrap();
    g.push_output(y);
    let options = Half { dtype: DType::F16, exclude: Default::default() };
    let decisions = half(&mut g.clone(), &options, &BTreeMap::new(), &mut report()).unwrap();
    assert!(decisions[0].reason.contains("1.000e5"), "{decisions:?}");
    assert!(decisions[1].reason.contains("vanish"), "{decisions:?}");
    assert!(decisions[2].quantized);
    let reached = BTreeMap::from([("Relu".to_owned(), Range { min: 0.0, max: 4e4 })]);
    let decisions = half(&mut g, &options, &reached, &mut report()).unwrap();
    assert!(decisions[2].reason.contains("reaches 4.000e4"), "{decisions:?}");
}
