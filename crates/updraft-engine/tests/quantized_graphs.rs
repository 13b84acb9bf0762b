//! Quantized graphs give on the engine what the definitions of their operators give.
//!
//! Where all scales are powers of two and codes are bytes, every number between codes is exact in `f32`, however it is computed: deep random
//! networks must agree to the last bit. Where they are not, floats and integers round differently before they are
//! rounded to codes, which can turn a code into its neighbour, once for each quantized value on the way.

use std::collections::HashMap;

use proptest::prelude::*;
use updraft_base::random::Key;
use updraft_engine::{CompileOptions, CpuEngine, Engine, StepTime};
use updraft_graph::{Attributes, DType, Graph, Tensor, ValueId, ValueType};

/// A value in floats, which codes stand for, and its scale and zero point.
#[derive(Clone, Copy)]
struct Real {
    value: ValueId,
    scale: f32,
    zero_point: i64,
}

struct Builder {
    key: Key,
    counter: u64,
    graph: Graph,
    inputs: HashMap<String, Tensor>,
    /// The type of activations.
    dtype: DType,
    /// Whether scales are powers of two.
    exact: bool,
    values: Vec<Real>,
}

impl Builder {
    fn new(seed: u64, dtype: DType, exact: bool) -> Builder {
        let graph = Graph::new("quantized");
        Builder { key: Key::new(seed), counter: 0, graph, inputs: HashMap::new(), dtype, exact, values: Vec::new() }
    }

    fn below(&mut self, n: usize) -> usize {
        self.counter += 1;
        self.key.below(self.counter, n as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn scale(&mut self, power: i32) -> f32 {
        let factor = if self.exact { 1.0 } else { 0.7 + 0.6 * self.below(1000) as f32 / 1000.0 };
        factor * f32::powi(2.0, power + self.below(2) as i32)
    }

    fn limits(dtype: DType) -> (i64, i64) {
        let (low, high) = dtype.integer_range().unwrap();
        (low as i64, high as i64)
    }

    fn zero_point(&mut self, dtype: DType) -> i64 {
        let (low, high) = Builder::limits(dtype);
        let middle = (low + high) / 2;
        self.pick(&[low, middle, middle + 7, middle - 40, high - 2])
    }

    fn codes(&mut self, shape: &[usize], dtype: DType, (low, high): (i64, i64)) -> Tensor {
        self.counter += 1;
        let key = self.key.child_index(self.counter);
        let codes: Vec<i128> = (0..shape.iter().product())
            .map(|i: usize| i128::from(low) + i128::from(key.below(i as u64, (high - low + 1) as u64)))
            .collect();
        Tensor::from_i128(dtype, shape, &codes).unwrap()
    }

    fn number(&mut self, value: f32) -> ValueId {
        self.graph.add_constant("number", Tensor::scalar(value))
    }

    fn zero(&mut self, dtype: DType, zero_point: i64) -> ValueId {
        let tensor = Tensor::from_i128(dtype, &[], &[i128::from(zero_point)]).unwrap();
        self.graph.add_constant("zero_point", tensor)
    }

    fn op(&mut self, op: &str, inputs: &[ValueId], attributes: impl Into<Attributes>) -> ValueId {
        self.graph.op(op, inputs, attributes).unwrap_or_else(|e| panic!("{op}: {e}"))
    }

    fn shape(&self, value: ValueId) -> Vec<usize> {
        self.graph.known_shape(value).unwrap()
    }

    /// An input of codes, or of floats that are quantized at once.
    fn input(&mut self, shape: &[usize]) -> Real {
        let (scale, zero_point) = (self.scale(-5), self.zero_point(self.dtype));
        let name = format!("x{}", self.inputs.len());
        let limits = Builder::limits(self.dtype);
        if self.below(2) == 0 {
            let tensor = self.codes(shape, self.dtype, limits);
            let codes = self.graph.add_input(&name, ValueType::of(&tensor)).unwrap();
            self.inputs.insert(name, tensor);
            return self.dequantize(codes, scale, zero_point);
        }
        let key = self.key.child_index(1_000_000 + self.inputs.len() as u64);
        let count = shape.iter().product::<usize>();
        let floats: Vec<f32> = (0..count).map(|i| 4.0 * key.normal_f32(i as u64)).collect();
        let tensor = Tensor::new(shape, &floats).unwrap();
        let value = self.graph.add_input(&name, ValueType::of(&tensor)).unwrap();
        self.inputs.insert(name, tensor);
        self.quantize(value, scale, zero_point)
    }

    fn dequantize(&mut self, codes: ValueId, scale: f32, zero_point: i64) -> Real {
        let dtype = self.graph.dtype(codes).unwrap();
        let (s, z) = (self.number(scale), self.zero(dtype, zero_point));
        let value = self.op("DequantizeLinear", &[codes, s, z], []);
        self.values.push(Real { value, scale, zero_point });
        Real { value, scale, zero_point }
    }

    /// Q and DQ.
    fn quantize(&mut self, value: ValueId, scale: f32, zero_point: i64) -> Real {
        let (s, z) = (self.number(scale), self.zero(self.dtype, zero_point));
        let codes = self.op("QuantizeLinear", &[value, s, z], []);
        self.dequantize(codes, scale, zero_point)
    }

    fn quantize_any(&mut self, value: ValueId, power: i32) -> Real {
        let (scale, zero_point) = (self.scale(power), self.zero_point(self.dtype));
        self.quantize(value, scale, zero_point)
    }

    /// Constant weights behind a DequantizeLinear, with a scale for each index along `axis` or one for all; also the
    /// scales.
    fn weights(&mut self, shape: &[usize], axis: usize) -> (ValueId, Vec<f32>) {
        let dtype = self.pick(&[DType::I8, DType::I8, DType::U8]);
        let tensor = self.codes(shape, dtype, Builder::limits(dtype));
        let count = if self.below(2) == 0 { shape[axis] } else { 1 };
        let scales: Vec<f32> = (0..count).map(|_| self.scale(-9)).collect();
        let zero = if dtype == DType::U8 { 128 } else { 0 };
        let zeros = Tensor::from_i128(dtype, &[count], &vec![zero; count]).unwrap();
        let codes = self.graph.add_constant("weight", tensor);
        let (scalar, zeros) = match count {
            1 => (Tensor::scalar(scales[0]), zeros.reshaped(&[]).unwrap()),
            _ => (Tensor::vector(&scales), zeros),
        };
        let (s, z) = (self.graph.add_constant("scales", scalar), self.graph.add_constant("zeros", zeros));
        let value = self.op("DequantizeLinear", &[codes, s, z], [("axis", (axis as i64).into())]);
        (value, if count == 1 { vec![scales[0]; shape[axis]] } else { scales })
    }

    fn bias(&mut self, input: f32, scales: &[f32]) -> ValueId {
        let tensor = self.codes(&[scales.len()], DType::I32, (-20_000, 20_000));
        let units: Vec<f32> = scales.iter().map(|s| s * input).collect();
        let codes = self.graph.add_constant("bias", tensor);
        let units = self.graph.add_constant("units", Tensor::vector(&units));
        self.op("DequantizeLinear", &[codes, units], [("axis", 0.into())])
    }

    fn activation(&mut self, value: ValueId) -> ValueId {
        match self.below(3) {
            0 => self.op("Relu", &[value], []),
            1 => {
                let (low, high) = (self.number(-0.25), self.number(6.0));
                self.op("Clip", &[value, low, high], [])
            }
            _ => value,
        }
    }

    fn convolution(&mut self, x: Real) -> Option<Real> {
        let shape = self.shape(x.value);
        let channels = shape[1];
        let outputs = self.pick(&[4usize, 8, 20]);
        let (groups, outputs) = match self.below(4) {
            0 => (channels, channels),
            1 if channels.is_multiple_of(2) => (2, outputs),
            _ => (1, outputs),
        };
        let kernel = self.pick(&[1usize, 3]);
        let (stride, pad) = (1 + self.below(2), self.below(kernel));
        if shape[2] + 2 * pad < kernel || shape[3] + 2 * pad < kernel {
            return None;
        }
        let (w, scales) = self.weights(&[outputs, channels / groups, kernel, kernel], 0);
        let mut operands = vec![x.value, w];
        if self.below(2) == 0 {
            operands.push(self.bias(x.scale, &scales));
        }
        let ints = |n: usize, count: usize| vec![n as i64; count];
        let attributes =
            [("group", (groups as i64).into()), ("pads", ints(pad, 4).into()), ("strides", ints(stride, 2).into())];
        let mut made = self.op("Conv", &operands, attributes);
        if self.below(4) == 0 {
            // A residual that is added before anything is rounded.
            let fitting: Vec<Real> =
                self.values.iter().copied().filter(|v| self.shape(v.value) == self.shape(made)).collect();
            if !fitting.is_empty() {
                let other = self.pick(&fitting);
                made = self.op("Add", &[other.value, made], []);
            }
        }
        let made = self.activation(made);
        let power = -5 + self.below(3) as i32;
        Some(self.quantize_any(made, power))
    }

    /// Codes, with the constants that QLinear operators take beside them.
    fn operand(&mut self, x: Real, codes: ValueId) -> [ValueId; 3] {
        let dtype = self.graph.dtype(codes).unwrap();
        [codes, self.number(x.scale), self.zero(dtype, x.zero_point)]
    }

    /// QLinearConv or QLinearMatMul of some codes, with constant weights; the codes that it makes.
    fn qlinear(
        &mut self,
        op: &str,
        x: Real,
        codes: ValueId,
        shape: &[usize],
        attributes: Attributes,
    ) -> (Real, ValueId) {
        let axis = if op == "QLinearConv" { 0 } else { 1 };
        let (w, scales) = self.weights(shape, axis);
        let (dequantize, _) = self.graph.value(w).producer().unwrap();
        let weights: Vec<ValueId> = self.graph.node(dequantize).inputs.iter().flatten().copied().collect();
        let to = Real { value: codes, scale: self.scale(-4), zero_point: self.zero_point(self.dtype) };
        let (scale, zero_point) = (self.number(to.scale), self.zero(self.dtype, to.zero_point));
        let mut operands = [&self.operand(x, codes)[..], &weights, &[scale, zero_point]].concat();
        if op == "QLinearConv" && self.below(2) == 0 {
            let bias = self.bias(x.scale, &scales);
            let (dequantize, _) = self.graph.value(bias).producer().unwrap();
            operands.push(self.graph.node(dequantize).inputs[0].unwrap());
        }
        let made = self.op(op, &operands, attributes);
        (to, made)
    }

    fn step(&mut self) {
        let x = self.pick(&self.values.clone());
        let shape = self.shape(x.value);
        let rank = shape.len();
        let spatial = rank == 4;
        match self.below(14) {
            0..=3 if spatial => {
                self.convolution(x);
            }
            4 | 5 => {
                let fitting: Vec<Real> = self.values.iter().copied().filter(|v| self.shape(v.value) == shape).collect();
                let (y, op) = (self.pick(&fitting), self.pick(&["Add", "Add", "Sub", "Mul"]));
                let made = self.op(op, &[x.value, y.value], []);
                let made = self.activation(made);
                self.quantize_any(made, -4);
            }
            6 => {
                let op = self.pick(&["Relu", "Tanh", "Sigmoid", "HardSwish", "Erf", "Abs"]);
                let half = self.number(0.5);
                let scaled = self.op("Mul", &[x.value, half], []);
                let made = self.op(op, &[scaled], []);
                let made = if self.below(2) == 0 { self.op("Mul", &[scaled, made], []) } else { made };
                self.quantize_any(made, -6);
            }
            7 if spatial && shape[2] >= 2 && shape[3] >= 2 => {
                let op = self.pick(&["MaxPool", "AveragePool"]);
                let attributes = [("kernel_shape", vec![2, 2].into()), ("strides", vec![2, 2].into())];
                let made = self.op(op, &[x.value], attributes);
                match op {
                    "MaxPool" => self.quantize(made, x.scale, x.zero_point),
                    _ => self.quantize_any(made, -5),
                };
            }
            8 if rank >= 2 => {
                let fitting: Vec<Real> = self
                    .values
                    .iter()
                    .copied()
                    .filter(|v| {
                        let other = self.shape(v.value);
                        other.len() == rank && (0..rank).all(|i| i == 1 || other[i] == shape[i])
                    })
                    .collect();
                let y = self.pick(&fitting);
                let made = self.op("Concat", &[x.value, y.value], [("axis", 1.into())]);
                self.quantize_any(made, -5);
            }
            9 => {
                let made = match self.below(4) {
                    0 => self.op("Flatten", &[x.value], []),
                    1 => {
                        let perm: Vec<i64> = (0..rank as i64).rev().collect();
                        self.op("Transpose", &[x.value], [("perm", perm.into())])
                    }
                    2 => {
                        let to = self.graph.add_constant("shape", Tensor::vector(&[-1i64, shape[rank - 1] as i64]));
                        self.op("Reshape", &[x.value, to], [])
                    }
                    _ => {
                        let [start, end, axis] = [0, shape[rank - 1].div_ceil(2) as i64, rank as i64 - 1]
                            .map(|i| self.graph.add_constant("index", Tensor::vector(&[i])));
                        self.op("Slice", &[x.value, start, end, axis], [])
                    }
                };
                match self.below(3) {
                    0 => self.quantize_any(made, -5),
                    _ => self.quantize(made, x.scale, x.zero_point),
                };
            }
            10 | 11 if rank >= 2 => {
                let (depth, columns) = (shape[rank - 1], self.pick(&[1usize, 5, 16, 33]));
                if depth > 400 {
                    return;
                }
                let gemm = rank == 2 && self.below(2) == 0;
                let transposed = gemm && self.below(2) == 0;
                let (w, scales) =
                    if transposed { self.weights(&[columns, depth], 0) } else { self.weights(&[depth, columns], 1) };
                let bias = self.bias(x.scale, &scales);
                let made = if gemm {
                    self.op("Gemm", &[x.value, w, bias], [("transB", i64::from(transposed).into())])
                } else {
                    let made = self.op("MatMul", &[x.value, w], []);
                    if self.below(2) == 0 { self.op("Add", &[bias, made], []) } else { made }
                };
                let made = self.activation(made);
                self.quantize_any(made, -4);
            }
            12 if spatial => {
                let made = self.op("GlobalAveragePool", &[x.value], []);
                // Only windows of 2^n elements have exact averages.
                if !self.exact || (shape[2] * shape[3]).is_power_of_two() {
                    self.quantize_any(made, -6);
                }
            }
            13 if rank >= 2 && shape[rank - 1] <= 200 => {
                let fitting: Vec<Real> = self.values.iter().copied().filter(|v| self.shape(v.value) == shape).collect();
                let y = self.pick(&fitting);
                let mut perm: Vec<i64> = (0..rank as i64).collect();
                perm.swap(rank - 1, rank - 2);
                let transposed = self.op("Transpose", &[y.value], [("perm", perm.into())]);
                let made = self.op("MatMul", &[x.value, transposed], []);
                match self.below(3) {
                    0 => self.graph.push_output(made),
                    _ => {
                        self.quantize_any(made, -4);
                    }
                }
            }
            _ => {}
        }
    }

    fn finish(mut self, outputs: usize) -> (Graph, HashMap<String, Tensor>) {
        for i in 0..outputs.min(self.values.len()) {
            let value = self.values[self.values.len() - 1 - i].value;
            self.graph.push_output(value);
        }
        (self.graph, self.inputs)
    }
}

fn run(graph: &Graph, inputs: &HashMap<String, Tensor>, threads: usize) -> (Vec<Tensor>, Vec<StepTime>) {
    let mut session = CpuEngine::new(threads).unwrap().compile(graph, &CompileOptions::default()).unwrap();
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let first = session.run(&inputs).unwrap();
    let (second, steps) = session.profile(&inputs, &mut || 0).unwrap();
    assert_eq!(first, second, "a second run in the same memory");
    (second, steps)
}

fn network(seed: u64, dtype: DType, exact: bool, steps: usize) -> (Graph, HashMap<String, Tensor>) {
    let mut builder = Builder::new(seed, dtype, exact);
    let (batch, channels) = (1 + builder.below(2), builder.pick(&[3usize, 4, 8]));
    let size = builder.pick(&[4usize, 5, 8]);
    builder.input(&[batch, channels, size, size]);
    for _ in 0..steps {
        builder.step();
    }
    let outputs = 1 + builder.below(3);
    builder.finish(outputs)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn networks_of_exact_numbers_agree_to_the_last_bit(seed in 0..u64::MAX / 2, steps in 1usize..16, kind in 0usize..2) {
        let dtype = [DType::U8, DType::I8][kind];
        let (graph, inputs) = network(seed, dtype, true, steps);
        let expected = updraft_graph::eval::evaluate(&graph, &inputs).unwrap();
        let (found, _) = run(&graph, &inputs, 1);
        for (found, expected) in found.iter().zip(&expected) {
            prop_assert_eq!(found, expected);
        }
        let (again, _) = run(&graph, &inputs, 3);
        prop_assert_eq!(found, again, "on three threads");
    }

    /// One step on a network whose inputs are quantized: codes differ by one at most. Each of the few steps here reads
    /// inputs, or what one other step made, which may differ by one already and by what that makes of the sum.
    #[test]
    fn a_layer_of_any_scales_differs_by_one_step_at_most(seed in 0..u64::MAX / 2, kind in 0usize..4) {
        let dtype = [DType::U8, DType::I8, DType::U16, DType::I16][kind];
        let (graph, inputs) = network(seed, dtype, false, 1);
        let expected = updraft_graph::eval::evaluate(&graph, &inputs).unwrap();
        let (found, _) = run(&graph, &inputs, 2);
        for ((found, expected), output) in found.iter().zip(&expected).zip(graph.outputs()) {
            let (dequantize, _) = graph.value(*output).producer().unwrap();
            if graph.node(dequantize).op != "DequantizeLinear" {
                continue;
            }
            let scale = graph.node(dequantize).inputs[1].unwrap();
            let scale = graph.value(scale).constant().unwrap().to_f64().unwrap()[0];
            for (a, b) in found.to_f64().unwrap().into_iter().zip(expected.to_f64().unwrap()) {
                prop_assert!((a - b).abs() <= 1.001 * scale, "{} and {} at a scale of {}", a, b, scale);
            }
        }
    }
}

/// A convolution, dense, in groups or depthwise, and a product: operators from codes to codes, as older tools write them.
fn qlinear_network(seed: u64, dtype: DType, exact: bool) -> (Graph, HashMap<String, Tensor>) {
    let mut builder = Builder::new(seed, dtype, exact);
    let (batch, channels, size) = (1 + builder.below(2), builder.pick(&[3usize, 4, 16]), builder.pick(&[3usize, 5, 9]));
    let tensor = builder.codes(&[batch, channels, size, size], dtype, Builder::limits(dtype));
    let codes = builder.graph.add_input("x", ValueType::of(&tensor)).unwrap();
    builder.inputs.insert("x".to_owned(), tensor);
    let x = Real { value: codes, scale: builder.scale(-5), zero_point: builder.zero_point(dtype) };
    let groups = builder.pick(&[1, channels]);
    let outputs = if groups == 1 { builder.pick(&[5usize, 16, 24]) } else { channels };
    let pads = vec![builder.below(2) as i64; 4];
    let attributes = Attributes::from([("group", (groups as i64).into()), ("pads", pads.into())]);
    let shape = [outputs, channels / groups, 3, 3];
    let (x, codes) = builder.qlinear("QLinearConv", x, codes, &shape, attributes);
    builder.graph.push_output(codes);
    let depth = builder.shape(codes)[3];
    let columns = builder.pick(&[1usize, 7, 32]);
    let (_, codes) = builder.qlinear("QLinearMatMul", x, codes, &[depth, columns], Attributes::new());
    builder.graph.push_output(codes);
    (builder.graph, builder.inputs)
}

#[test]
fn operators_from_codes_to_codes_run_in_integers_and_agree() {
    for seed in 0..200 {
        let dtype = [DType::U8, DType::I8][(seed % 2) as usize];
        let exact = seed % 4 < 2;
        let (graph, inputs) = qlinear_network(seed, dtype, exact);
        let expected = updraft_graph::eval::evaluate(&graph, &inputs).unwrap();
        let (found, steps) = run(&graph, &inputs, 1 + (seed % 3) as usize);
        assert!(steps.iter().all(|s| !s.reference), "seed {seed}: {steps:?}");
        if exact {
            assert_eq!(found, expected, "seed {seed}");
            continue;
        }
        // Ratios of scales round differently, which turns a code into its neighbour; a neighbour among the factors of
        // the product moves that by its own weight, so only the first operator has a bound.
        let codes = |t: &Tensor| t.to_i64().unwrap();
        let apart = codes(&found[0]).iter().zip(codes(&expected[0])).map(|(a, b)| (a - b).abs()).max();
        assert!(apart <= Some(1), "seed {seed}: {apart:?} codes apart");
    }
}

/// Dynamic quantization, as ONNX Runtime writes it: measured ranges, products of codes, scales and bias afterwards.
#[test]
fn products_of_measured_ranges_are_two_steps() {
    for (seed, dtype) in [(1, DType::I8), (2, DType::U8)] {
        let mut builder = Builder::new(seed, DType::U8, false);
        let key = Key::new(seed);
        let floats: Vec<f32> = (0..2 * 70 * 40).map(|i| key.normal_f32(i as u64) + 0.5).collect();
        let tensor = Tensor::new(&[2, 70, 40], &floats).unwrap();
        let x = builder.graph.add_input("x", ValueType::of(&tensor)).unwrap();
        builder.inputs.insert("x".to_owned(), tensor);
        let made = builder.graph.op_n("", "DynamicQuantizeLinear", &[Some(x)], [], 3).unwrap();
        let [codes, scale, zero] = made[..] else { unreachable!("three outputs were asked for") };
        let w = builder.codes(&[40, 33], dtype, Builder::limits(dtype));
        let w = builder.graph.add_constant("weight", w);
        let scales: Vec<f32> = (0..33).map(|i| 0.01 + 0.001 * i as f32).collect();
        let scales = builder.graph.add_constant("scales", Tensor::vector(&scales));
        let w_zero = builder.zero(dtype, if dtype == DType::U8 { 120 } else { 0 });
        let bias = builder.graph.add_constant("bias", Tensor::vector(&[0.75f32; 33]));
        let sums = builder.op("MatMulInteger", &[codes, w, zero, w_zero], []);
        let floats = builder.op("Cast", &[sums], [("to", 1.into())]);
        let scale = builder.op("Mul", &[scale, scales], []);
        let scaled = builder.op("Mul", &[floats, scale], []);
        let made = builder.op("Add", &[scaled, bias], []);
        builder.graph.push_output(made);
        let (graph, inputs) = (builder.graph, builder.inputs);
        let expected = updraft_graph::eval::evaluate(&graph, &inputs).unwrap();
        let (found, steps) = run(&graph, &inputs, 2);
        assert_eq!(steps.len(), 2, "{steps:?}");
        // Sums are exact; three roundings to f32 follow on each side.
        let largest = expected[0].to_f64().unwrap().into_iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for (a, b) in found[0].to_f64().unwrap().into_iter().zip(expected[0].to_f64().unwrap()) {
            assert!((a - b).abs() <= 4.0 * f64::from(f32::EPSILON) * largest, "{a} and {b}");
        }
    }
}

#[test]
fn measured_ranges_are_exactly_those_of_the_definition() {
    let key = Key::new(5);
    let long: Vec<f32> = (0..40_000).map(|i| 3.0 * key.normal_f32(i) - 0.2).collect();
    let cases: [&[f32]; 8] = [
        &long,
        &[0.0, 2.0, -3.0, -2.5, 1.34, 0.5],
        &[-1.0, -2.1, -1.3, -2.5, -3.34, -4.0],
        &[1.0, 2.1, 1.3, 2.5, 3.34, 4.0, 1.5, 2.6, 3.9, 4.0, 3.0, 2.345],
        &[0.0; 3],
        &[f32::NAN, 1.0, -1.0],
        &[f32::INFINITY, f32::NEG_INFINITY, 1.0],
        &[1e-45, -1e-45],
    ];
    for (index, values) in cases.into_iter().enumerate() {
        let mut graph = Graph::new("measured");
        let tensor = Tensor::vector(values);
        let x = graph.add_input("x", ValueType::of(&tensor)).unwrap();
        let made = graph.op_n("", "DynamicQuantizeLinear", &[Some(x)], [], 3).unwrap();
        made.into_iter().for_each(|v| graph.push_output(v));
        let inputs = HashMap::from([("x".to_owned(), tensor)]);
        let (found, steps) = run(&graph, &inputs, 2);
        assert!(steps.iter().all(|s| !s.reference));
        assert_eq!(found, updraft_graph::eval::evaluate(&graph, &inputs).unwrap(), "case {index}");
    }
}

#[test]
fn networks_of_bytes_leave_nothing_to_the_reference() {
    for seed in 0..40 {
        let (graph, inputs) = network(seed, DType::U8, false, 12);
        let (_, steps) = run(&graph, &inputs, 1);
        let slow: Vec<&StepTime> = steps.iter().filter(|s| s.reference).collect();
        assert!(slow.is_empty(), "seed {seed}: {slow:?}");
    }
}
