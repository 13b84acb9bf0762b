//! Random graphs give the same on the engine as by the reference evaluation, and the same bits on any number of
//! threads.

use std::collections::HashMap;

use proptest::prelude::*;
use updraft_base::random::Key;
use updraft_engine::{CompileOptions, CpuEngine, Engine};
use updraft_graph::{Attributes, DType, Graph, Tensor, ValueId, ValueType};

/// Draws the choices that make up a graph.
struct Random {
    key: Key,
    counter: u64,
}

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.counter += 1;
        self.key.below(self.counter, n as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        self.counter += 1;
        let key = self.key.child_index(self.counter);
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| key.normal_f32(i as u64)).collect();
        Tensor::new(shape, &values).unwrap()
    }
}

struct Case {
    graph: Graph,
    inputs: HashMap<String, Tensor>,
}

/// Sizes that meet often, among them 1, sizes below and above a vector register, and ones that fill several tiles.
const SIZES: [usize; 7] = [1, 2, 3, 8, 12, 33, 64];

struct Builder {
    random: Random,
    graph: Graph,
    inputs: HashMap<String, Tensor>,
    values: Vec<ValueId>,
}

impl Builder {
    fn input(&mut self, shape: &[usize]) -> ValueId {
        let tensor = self.random.tensor(shape);
        let name = format!("x{}", self.inputs.len());
        // One in three is a constant: constants take other ways through the engine.
        let value = if self.random.below(3) == 0 {
            self.graph.add_constant("constant", tensor)
        } else {
            self.inputs.insert(name.clone(), tensor.clone());
            self.graph.add_input(&name, ValueType::of(&tensor)).unwrap()
        };
        self.values.push(value);
        value
    }

    fn shape(&self, value: ValueId) -> Vec<usize> {
        self.graph.known_shape(value).unwrap()
    }

    fn integers(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_constant("integers", Tensor::vector(values))
    }

    /// A value of this shape, sometimes stretched: an existing one or a new one.
    fn partner(&mut self, shape: &[usize]) -> ValueId {
        let fitting: Vec<ValueId> = self.values.iter().copied().filter(|v| self.shape(*v) == shape).collect();
        if fitting.len() > 1 && self.random.below(2) == 0 {
            return *self.random.pick(&fitting);
        }
        let drop = self.random.below(shape.len() + 1);
        let mut small: Vec<usize> = shape[drop..].to_vec();
        for size in &mut small {
            if self.random.below(4) == 0 {
                *size = 1;
            }
        }
        self.input(&small)
    }

    fn op(&mut self, op: &str, inputs: &[ValueId], attributes: impl Into<Attributes>) -> ValueId {
        let made = self.graph.op(op, inputs, attributes).unwrap_or_else(|e| panic!("{op}: {e}"));
        assert!(self.graph.known_shape(made).is_some(), "{op}: the shape is not inferred");
        made
    }

    fn step(&mut self) {
        let x = *self.random.pick(&self.values.clone());
        let shape = self.shape(x);
        let rank = shape.len();
        let made = match self.random.below(17) {
            0 | 1 => {
                let unary = [
                    "Relu",
                    "Tanh",
                    "Sigmoid",
                    "Neg",
                    "Abs",
                    "Erf",
                    "Gelu",
                    "Softplus",
                    "LeakyRelu",
                    "HardSwish",
                    "Identity",
                ];
                let op = *self.random.pick(&unary);
                self.op(op, &[x], [])
            }
            2..=4 => {
                let op = *self.random.pick(&["Add", "Sub", "Mul", "Max", "Min"]);
                let y = self.partner(&shape);
                // Keeps numbers small, so that errors stay comparable to them.
                let y = if op == "Mul" { self.op("Tanh", &[y], []) } else { y };
                let operands = if self.random.below(2) == 0 { [x, y] } else { [y, x] };
                self.op(op, &operands, [])
            }
            5 => {
                let y = self.partner(&shape);
                let zero = self.graph.add_constant("zero", Tensor::scalar(0f32));
                let input = self.partner(&shape);
                // Truth comes from numbers that both sides compute exactly.
                let truth = match self.graph.value(input).producer() {
                    None => self.op("Less", &[input, zero], []),
                    Some(_) => {
                        let fresh = self.input(&shape);
                        self.op("GreaterOrEqual", &[fresh, zero], [])
                    }
                };
                self.op("Where", &[truth, x, y], [])
            }
            6 | 7 if rank >= 1 => {
                let n = *self.random.pick(&SIZES);
                let batch = if rank > 2 && self.random.below(2) == 0 { shape[..rank - 2].to_vec() } else { Vec::new() };
                let y = self.input(&[batch.as_slice(), &[shape[rank - 1], n]].concat());
                let product = self.op("MatMul", &[x, y], []);
                self.op("Tanh", &[product], [])
            }
            8 if rank >= 2 => {
                // Scores of rows against rows, as in attention.
                let mut perm: Vec<i64> = (0..rank as i64).collect();
                perm.swap(rank - 1, rank - 2);
                let transposed = self.op("Transpose", &[x], [("perm", perm.into())]);
                let scores = self.op("MatMul", &[x, transposed], []);
                let scale = self.graph.add_constant("scale", Tensor::scalar(0.1f32));
                let scores = self.op("Mul", &[scores, scale], []);
                self.values.push(scores);
                let weights = self.op("Tanh", &[scores], []);
                let mixed = self.op("MatMul", &[weights, x], []);
                self.op("Tanh", &[mixed], [])
            }
            9 if rank == 2 => {
                let n = *self.random.pick(&SIZES);
                let flip = self.random.below(2) as i64;
                let y = self.input(&if flip == 1 { [n, shape[1]] } else { [shape[1], n] });
                let c = if self.random.below(2) == 0 { vec![n] } else { vec![shape[0], n] };
                let c = self.input(&c);
                let attributes = [("transB", flip.into()), ("alpha", 0.5f32.into()), ("beta", 0.25f32.into())];
                self.op("Gemm", &[x, y, c], attributes)
            }
            10 => {
                let mut perm: Vec<i64> = (0..rank as i64).collect();
                for i in (1..rank).rev() {
                    let other = self.random.below(i + 1);
                    perm.swap(i, other);
                }
                self.op("Transpose", &[x], [("perm", perm.into())])
            }
            11 => {
                // Joins or splits axes.
                let mut sizes: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
                if rank >= 2 && self.random.below(2) == 0 {
                    let at = self.random.below(rank - 1);
                    let size = sizes.remove(at);
                    sizes[at] *= size;
                } else if let Some(at) = sizes.iter().position(|n| *n > 2 && n % 2 == 0) {
                    sizes[at] /= 2;
                    sizes.insert(at, 2);
                }
                let sizes = self.integers(&sizes);
                self.op("Reshape", &[x, sizes], [])
            }
            12 if rank >= 1 => {
                let axis = self.random.below(rank);
                let size = shape[axis] as i64;
                let start = self.random.below(shape[axis]) as i64;
                let step = 1 + self.random.below(2) as i64;
                let bounds = [start, size, axis as i64, step].map(|v| self.integers(&[v]));
                self.op("Slice", &[x, bounds[0], bounds[1], bounds[2], bounds[3]], [])
            }
            13 if rank >= 1 => {
                let axis = self.random.below(rank);
                let mut other = shape.clone();
                other[axis] = *self.random.pick(&SIZES);
                let y = self.input(&other);
                self.op("Concat", &[x, y, x], [("axis", (axis as i64).into())])
            }
            14 if rank >= 1 => {
                let axis = self.random.below(rank) as i64;
                let axes = self.integers(&[axis]);
                let op = *self.random.pick(&["ReduceSum", "ReduceMean", "ReduceMax"]);
                let keep = self.random.below(2) as i64;
                let sum = self.op(op, &[x, axes], [("keepdims", keep.into())]);
                self.op("Tanh", &[sum], [])
            }
            15 if rank >= 1 => {
                let op = *self.random.pick(&["Softmax", "LogSoftmax"]);
                let axis = self.random.below(rank) as i64;
                self.op(op, &[x], [("axis", axis.into())])
            }
            16 if rank >= 1 => {
                let last = *shape.last().unwrap();
                let (scale, bias) = (self.input(&[last]), self.input(&[last]));
                self.op("LayerNormalization", &[x, scale, bias], [])
            }
            _ => {
                let shape: Vec<usize> = (0..1 + self.random.below(4)).map(|_| *self.random.pick(&SIZES)).collect();
                if shape.iter().product::<usize>() > 20_000 { x } else { self.input(&shape) }
            }
        };
        if self.shape(made).iter().product::<usize>() < 200_000 && self.shape(made).len() <= 5 {
            self.values.push(made);
        }
    }
}

fn random_case(seed: u64, steps: usize) -> Case {
    let mut builder = Builder {
        random: Random { key: Key::new(seed), counter: 0 },
        graph: Graph::new("random"),
        inputs: HashMap::new(),
        values: Vec::new(),
    };
    let first = [*builder.random.pick(&[1, 8, 12]), *builder.random.pick(&SIZES), *builder.random.pick(&SIZES)];
    builder.input(&first);
    for _ in 0..steps {
        builder.step();
    }
    let outputs = 1 + builder.random.below(3);
    for i in 0..outputs.min(builder.values.len()) {
        let value = builder.values[builder.values.len() - 1 - i];
        builder.graph.push_output(value);
    }
    Case { graph: builder.graph, inputs: builder.inputs }
}

fn run(case: &Case, threads: usize) -> Vec<Tensor> {
    let engine = CpuEngine::new(threads).unwrap();
    let mut session = engine.compile(&case.graph, &CompileOptions::default()).unwrap();
    let inputs: Vec<(&str, &Tensor)> = case.inputs.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let first = session.run(&inputs).unwrap();
    // A second run in the same memory must not see the first.
    assert_eq!(session.run(&inputs).unwrap(), first);
    first
}

/// The engine computes in `f32` what the reference computes in `f64` and rounds after each node. Every operator here
/// changes errors by a factor of a few at most (tanh after products and sums of up to some thousand terms, each of
/// relative error 2^-24), and graphs are some twenty nodes deep: 2e-4 of the largest number leaves an order of
/// magnitude, and a wrong index or axis is off by numbers themselves.
fn check_close(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!((found.dtype(), found.shape()), (expected.dtype(), expected.shape()), "{what}");
    let (found, expected) = (found.to_f64().unwrap(), expected.to_f64().unwrap());
    let largest = expected.iter().fold(1.0f64, |m, v| if v.is_finite() { m.max(v.abs()) } else { m });
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        let close = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 2e-4 * largest;
        assert!(close, "{what}, element {i}: {a}, expected {b}");
    }
}

fn check(seed: u64, steps: usize) {
    let case = random_case(seed, steps);
    let expected = updraft_graph::eval::evaluate(&case.graph, &case.inputs).unwrap();
    let found = run(&case, 1);
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        check_close(found, expected, &format!("seed {seed}, {steps} steps, output {i}"));
    }
    for threads in [2, 3, 8] {
        let again = run(&case, threads);
        for (a, b) in found.iter().zip(&again) {
            assert_eq!(a.bytes(), b.bytes(), "seed {seed}, {steps} steps: bits differ on {threads} threads");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn engine_agrees_with_the_reference_on_any_number_of_threads(seed in 0..u64::MAX / 2, steps in 1usize..24) {
        check(seed, steps);
    }
}

#[test]
fn outputs_of_other_types_survive() {
    let mut graph = Graph::new("types");
    let x = graph.add_input("x", ValueType::tensor(DType::F32, vec!["N".into(), 4.into()])).unwrap();
    let zero = graph.add_constant("zero", Tensor::scalar(0f32));
    let less = graph.op("Less", &[x, zero], []).unwrap();
    let shape = graph.op("Shape", &[x], []).unwrap();
    graph.push_output(less);
    graph.push_output(shape);
    graph.push_output(x);
    let case = Case {
        graph,
        inputs: HashMap::from([(
            "x".to_owned(),
            Tensor::new(&[2, 4], &[-1f32, 0.0, 1.0, f32::NAN, -0.0, -2.0, 3.0, 4.0]).unwrap(),
        )]),
    };
    let expected = updraft_graph::eval::evaluate(&case.graph, &case.inputs).unwrap();
    let found = run(&case, 2);
    assert_eq!(found[..2], expected[..2]);
    assert_eq!(found[2].bytes(), expected[2].bytes());
}
