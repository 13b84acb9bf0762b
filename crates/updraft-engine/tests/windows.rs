//! Convolutions, pools and batch normalisation of random shapes give the same on the engine as by the reference
//! evaluation, and the same bits on any number of threads.

use std::collections::HashMap;

use proptest::prelude::*;
use updraft_base::random::Key;
use updraft_engine::{CompileOptions, CpuEngine, Engine};
use updraft_graph::{Attribute, Attributes, Graph, Tensor, UPDRAFT_DOMAIN, ValueType};

/// A node of random numbers.
struct Case<'a> {
    domain: &'a str,
    op: &'a str,
    /// The shapes of its inputs; those that are constants by index.
    inputs: &'a [&'a [usize]],
    constants: &'a [usize],
    attributes: Attributes,
    /// A last input that is a shape.
    shape: Option<&'a [usize]>,
    outputs: usize,
    /// Added to all numbers of the input of this index.
    mean: (usize, f32),
    /// How many products one result sums, at most.
    terms: usize,
}

impl Case<'_> {
    fn graph(&self, seed: u64) -> (Graph, HashMap<String, Tensor>) {
        let mut graph = Graph::new("window");
        let mut given = HashMap::new();
        let mut operands = Vec::new();
        for (index, shape) in self.inputs.iter().enumerate() {
            let key = Key::new(seed).child_index(index as u64);
            let mean = if self.mean.0 == index { self.mean.1 } else { 0.0 };
            let values: Vec<f32> =
                (0..shape.iter().product::<usize>()).map(|i| key.normal_f32(i as u64) + mean).collect();
            let tensor = Tensor::new(shape, &values).unwrap();
            let name = format!("x{index}");
            operands.push(Some(if self.constants.contains(&index) {
                graph.add_constant(&name, tensor)
            } else {
                let value = graph.add_input(&name, ValueType::of(&tensor)).unwrap();
                given.insert(name, tensor);
                value
            }));
        }
        if let Some(shape) = self.shape {
            let sizes: Vec<i64> = shape.iter().map(|d| *d as i64).collect();
            operands.push(Some(graph.add_constant("shape", Tensor::vector(&sizes))));
        }
        let made = graph.op_n(self.domain, self.op, &operands, self.attributes.clone(), self.outputs).unwrap();
        made.into_iter().for_each(|value| graph.push_output(value));
        (graph, given)
    }

    /// Sums of `terms` products of numbers of size 1 have size `sqrt(terms)`; each of as many roundings is of a partial
    /// sum no larger. They add up like a random walk, so `terms * 2^-24` leaves a factor of `sqrt(terms)`.
    fn check(&self) {
        let (graph, given) = self.graph(self.terms as u64);
        let expected = updraft_graph::eval::evaluate(&graph, &given).unwrap();
        let given: Vec<(&str, &Tensor)> = given.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut first: Option<Vec<Tensor>> = None;
        for threads in [1, 2, 3, 8] {
            let engine = CpuEngine::new(threads).unwrap();
            let mut session = engine.compile(&graph, &CompileOptions::default()).unwrap();
            let found = session.run(&given).unwrap();
            // A second run in the same memory must not see the first.
            assert_eq!(session.run(&given).unwrap(), found, "{}", self.op);
            let Some(first) = &first else {
                for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert_eq!(found.shape(), expected.shape(), "{}, output {index}", self.op);
                    let (found, expected) = (found.to_f64().unwrap(), expected.to_f64().unwrap());
                    let largest = expected.iter().fold(1.0f64, |largest, x| largest.max(x.abs()));
                    let tolerance = (self.terms.max(8) as f64) * 2f64.powi(-24) * largest;
                    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                        let what = format!("{} of {:?}, output {index}, element {i}", self.op, self.inputs);
                        assert!((a - b).abs() <= tolerance, "{what}: {a}, expected {b} within {tolerance:e}");
                    }
                }
                first = Some(found);
                continue;
            };
            assert!(&found == first, "{}: bits differ on {threads} threads", self.op);
        }
    }
}

fn ints(values: impl IntoIterator<Item = usize>) -> Attribute {
    Attribute::Ints(values.into_iter().map(|v| v as i64).collect())
}

/// What windows over one axis are.
type Axis = ((usize, usize), (usize, usize), (usize, usize));

fn axis() -> impl Strategy<Value = Axis> {
    ((1..18usize, 1..5usize), (1..4usize, 1..3usize), (0..4usize, 0..4usize))
}

fn attributes(axes: &[Axis]) -> Attributes {
    let begin = axes.iter().map(|a| a.2.0);
    let end = axes.iter().map(|a| a.2.1);
    Attributes::from([
        ("kernel_shape", ints(axes.iter().map(|a| a.0.1))),
        ("strides", ints(axes.iter().map(|a| a.1.0))),
        ("dilations", ints(axes.iter().map(|a| a.1.1))),
        ("pads", ints(begin.chain(end))),
    ])
}

fn output(axes: &[Axis]) -> Option<Vec<usize>> {
    axes.iter()
        .map(|((size, kernel), (stride, dilation), (begin, end))| {
            Some((size + begin + end).checked_sub((kernel - 1) * dilation + 1)? / stride + 1)
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn convolutions_agree_with_the_reference(
        axes in proptest::collection::vec(axis(), 1..4),
        (batch, groups, inputs, outputs) in (1..4usize, 1..3usize, 1..5usize, 1..10usize),
        constant in any::<bool>(),
    ) {
        let sizes: Vec<usize> = axes.iter().map(|a| a.0.0).collect();
        prop_assume!(sizes.iter().product::<usize>() < 1000);
        let Some(output) = output(&axes) else { return Ok(()) };
        let mut attributes = attributes(&axes);
        attributes.set("group", Attribute::Int(groups as i64));
        let kernel: Vec<usize> = axes.iter().map(|a| a.0.1).collect();
        let x = [&[batch, groups * inputs], sizes.as_slice()].concat();
        let w = [&[groups * outputs, inputs], kernel.as_slice()].concat();
        let y = [&[batch, groups * outputs], output.as_slice()].concat();
        let taps: usize = kernel.iter().product();
        let case = Case {
            domain: "",
            op: "Conv",
            inputs: &[&x, &w, &w[..1]],
            constants: if constant { &[1] } else { &[] },
            attributes,
            shape: None,
            outputs: 1,
            mean: (0, 0.0),
            terms: taps * inputs,
        };
        case.check();
        Case {
            domain: UPDRAFT_DOMAIN,
            op: "ConvInputGradient",
            inputs: &[&y, &w],
            constants: &[],
            shape: Some(&x),
            attributes: case.attributes.clone(),
            terms: taps * outputs,
            ..case
        }
        .check();
        Case {
            domain: UPDRAFT_DOMAIN,
            op: "ConvWeightGradient",
            inputs: &[&x, &y],
            constants: &[],
            terms: batch * output.iter().product::<usize>(),
            ..case
        }
        .check();
    }

    #[test]
    fn pools_agree_with_the_reference(
        axes in proptest::collection::vec(axis(), 1..4),
        (batch, channels) in (1..4usize, 1..5usize),
        include_padding in any::<bool>(),
    ) {
        let sizes: Vec<usize> = axes.iter().map(|a| a.0.0).collect();
        prop_assume!(sizes.iter().product::<usize>() < 1000);
        // A window that holds only padding has no maximum and no average.
        let is_full = |a: &Axis| {
            let (((size, kernel), (stride, dilation), (begin, end)), last) = (*a, output(&[*a]).map(|o| o[0] - 1));
            last.is_some_and(|last| (0..=last).all(|o| {
                (0..kernel).any(|t| (o * stride + t * dilation).checked_sub(begin).is_some_and(|i| i < size))
            })) && end < 4
        };
        prop_assume!(axes.iter().all(is_full));
        let Some(output) = output(&axes) else { return Ok(()) };
        let mut attributes = attributes(&axes);
        let x = [&[batch, channels], sizes.as_slice()].concat();
        let y = [&[batch, channels], output.as_slice()].concat();
        let taps: usize = axes.iter().map(|a| a.0.1).product();
        let case = Case {
            domain: "",
            op: "MaxPool",
            inputs: &[&x],
            constants: &[],
            attributes: attributes.clone(),
            shape: None,
            outputs: 1,
            mean: (0, 0.0),
            terms: taps,
        };
        case.check();
        Case { domain: UPDRAFT_DOMAIN, op: "MaxPoolGradient", inputs: &[&x, &y], attributes: attributes.clone(), ..case }
            .check();
        attributes.set("count_include_pad", Attribute::Int(i64::from(include_padding)));
        Case { op: "AveragePool", attributes: attributes.clone(), ..case }.check();
        let inputs: &[&[usize]] = &[&y];
        let domain = UPDRAFT_DOMAIN;
        Case { domain, op: "AveragePoolGradient", inputs, shape: Some(&x), attributes, ..case }.check();
        Case {
            op: "GlobalAveragePool",
            attributes: Attributes::new(),
            terms: sizes.iter().product(),
            ..case
        }
        .check();
    }

    #[test]
    fn batch_normalisation_agrees_with_the_reference(
        (batch, channels) in (1..6usize, 1..7usize),
        plane in proptest::collection::vec(1..14usize, 0..3),
    ) {
        let x = [&[batch, channels], plane.as_slice()].concat();
        prop_assume!(x.iter().product::<usize>() > 2 * channels);
        let terms = x.iter().product::<usize>() / channels;
        let c: &[usize] = &x[1..2];
        let case = Case {
            domain: UPDRAFT_DOMAIN,
            op: "BatchNormalizationTraining",
            inputs: &[&x, c, c, c, c],
            constants: &[],
            attributes: Attributes::from([("epsilon", Attribute::Float(0.125)), ("momentum", Attribute::Float(0.75))]),
            shape: None,
            outputs: 5,
            mean: (0, 0.0),
            terms,
        };
        case.check();
        let inputs: &[&[usize]] = &[&x, &x, c, c, c];
        Case { op: "BatchNormalizationGradient", inputs, outputs: 3, attributes: Attributes::new(), ..case }.check();
        let inputs: &[&[usize]] = &[&x, c, c, c, c];
        Case { domain: "", op: "BatchNormalization", inputs, outputs: 1, mean: (4, 6.0), ..case }.check();
    }
}

/// A sum of squares, less the square of the mean, would be left with no digits.
#[test]
fn a_large_mean_costs_the_variance_no_digits() {
    let c: &[usize] = &[3];
    Case {
        domain: UPDRAFT_DOMAIN,
        op: "BatchNormalizationTraining",
        inputs: &[&[8, 3, 16, 16], c, c, c, c],
        constants: &[],
        attributes: Attributes::new(),
        shape: None,
        outputs: 5,
        mean: (0, 3000.0),
        terms: 8 * 16 * 16,
    }
    .check();
}

/// Larger shapes than random ones: tiles are cut by rows, images, channels and groups.
#[test]
fn convolutions_of_many_tiles_agree_with_the_reference() {
    for (x, w, group, stride) in [
        ([2, 3, 60, 60], [8, 3, 3, 3], 1, 2),
        ([1, 64, 9, 9], [40, 64, 3, 3], 1, 1),
        ([1, 48, 20, 20], [48, 1, 3, 3], 48, 1),
        ([12, 6, 8, 8], [20, 6, 1, 1], 1, 1),
    ] {
        let attributes = Attributes::from([
            ("group", Attribute::Int(group)),
            ("strides", ints([stride; 2])),
            ("pads", ints([w[2] / 2; 4])),
        ]);
        Case {
            domain: "",
            op: "Conv",
            inputs: &[&x, &w, &w[..1]],
            constants: &[1, 2],
            attributes,
            shape: None,
            outputs: 1,
            mean: (0, 0.0),
            terms: w[1] * w[2] * w[3],
        }
        .check();
    }
}

/// What follows a convolution may be done with it; what others read too may not.
#[test]
fn residual_sums_and_activations_after_convolutions_keep_their_meaning() {
    let key = Key::new(5);
    let tensor = |salt: u64, shape: &[usize]| {
        let key = key.child_index(salt);
        let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| key.normal_f32(i as u64)).collect();
        Tensor::new(shape, &values).unwrap()
    };
    let image = tensor(0, &[2, 4, 9, 9]);
    let mut graph = Graph::new("residual");
    let x = graph.add_input("x", ValueType::of(&image)).unwrap();
    let conv = |graph: &mut Graph, x, salt: u64| {
        let (w, b) = (tensor(salt, &[4, 4, 3, 3]), tensor(salt + 100, &[4]));
        let w = graph.add_constant("w", w);
        let b = graph.add_constant("b", b);
        graph.op("Conv", &[x, w, b], [("pads", ints([1; 4]))]).unwrap()
    };
    let a = conv(&mut graph, x, 1);
    let a = graph.op("Relu", &[a], []).unwrap();
    let b = conv(&mut graph, a, 2);
    let sum = graph.op("Add", &[x, b], []).unwrap();
    let sum = graph.op("Relu", &[sum], []).unwrap();
    // Both sides of the sum are convolutions, and nothing follows.
    let (c, d) = (conv(&mut graph, sum, 3), conv(&mut graph, sum, 4));
    let both = graph.op("Add", &[c, d], []).unwrap();
    // The sum of a value with itself, and a residual that is stretched.
    let e = conv(&mut graph, both, 5);
    let double = graph.op("Add", &[e, e], []).unwrap();
    let row = graph.add_constant("row", tensor(6, &[9]));
    let f = conv(&mut graph, double, 7);
    let shifted = graph.op("Add", &[f, row], []).unwrap();
    let (low, high) = (Tensor::scalar(-1f32), Tensor::scalar(2f32));
    let (low, high) = (graph.add_constant("low", low), graph.add_constant("high", high));
    let g = conv(&mut graph, shifted, 8);
    let clipped = graph.op("Clip", &[g, low, high], []).unwrap();
    // An output that is read again as it is.
    let h = conv(&mut graph, clipped, 9);
    let relu = graph.op("Relu", &[h], []).unwrap();
    for output in [sum, both, clipped, h, relu] {
        graph.push_output(output);
    }
    let given = HashMap::from([("x".to_owned(), image.clone())]);
    let expected = updraft_graph::eval::evaluate(&graph, &given).unwrap();
    let engine = CpuEngine::new(2).unwrap();
    let mut session = engine.compile(&graph, &CompileOptions::default()).unwrap();
    let found = session.run(&[("x", &image)]).unwrap();
    for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let (found, expected) = (found.to_f64().unwrap(), expected.to_f64().unwrap());
        let largest = expected.iter().fold(1.0f64, |largest, x| largest.max(x.abs()));
        // Nine layers of sums of 36 products, each layer's error carried on by the next as its values are.
        let tolerance = 9.0 * 36.0 * 2f64.powi(-24) * largest;
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() <= tolerance, "output {index}: {a}, expected {b} within {tolerance:e}");
        }
    }
}
