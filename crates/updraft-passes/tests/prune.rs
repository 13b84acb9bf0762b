//! Removing channels says the same as zeroing them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use updraft_base::random::{Key, fill_uniform};
use updraft_graph::eval::evaluate;
use updraft_graph::{Attribute, DType, Graph, Tensor, ValueId, ValueType};
use updraft_passes::prune::groups::{self, Group};
use updraft_passes::prune::structured;

/// Rounding of sums of a few hundred products of numbers around 1 in f64, with room for what division by small standard
/// deviations adds.
const TOLERANCE: f64 = 1e-8;

/// A network over `x [N, 6, 4, 4]` that grows by choices; all pictures stay 4 x 4, so that they can be joined.
struct Grower {
    graph: Graph,
    values: Vec<ValueId>,
    key: Key,
    drawn: u64,
}

impl Grower {
    fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        self.key.below(self.drawn, n as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn parameter(&mut self, shape: &[usize], low: f64, high: f64) -> ValueId {
        self.drawn += 1;
        let mut drawn = vec![0f32; shape.iter().product()];
        fill_uniform(&self.key.child_index(self.drawn), 0, &mut drawn);
        let values: Vec<f64> = drawn.iter().map(|v| low + f64::from(*v) * (high - low)).collect();
        self.graph.add_constant("w", Tensor::from_f64(DType::F64, shape, &values).unwrap())
    }

    fn weight(&mut self, shape: &[usize]) -> ValueId {
        self.parameter(shape, -1.0, 1.0)
    }

    fn ints(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_constant("i", Tensor::vector(values))
    }

    fn op<const N: usize>(&mut self, op: &str, inputs: &[ValueId], attributes: [(&str, Attribute); N]) -> ValueId {
        self.graph.op(op, inputs, attributes).unwrap_or_else(|e| panic!("{op}: {e}"))
    }

    fn channels(&self, x: ValueId) -> usize {
        self.graph.shape(x).unwrap()[1].known().unwrap()
    }

    /// Any value, but most often the last, so that networks get deep.
    fn any(&mut self) -> ValueId {
        let values = self.values.clone();
        let recent = if self.below(3) == 0 { 0 } else { values.len() - 1 };
        self.pick(&values[recent..])
    }

    fn conv(&mut self, x: ValueId, out: usize, kernel: usize, groups: usize) -> ValueId {
        let weight = self.weight(&[out, self.channels(x) / groups, kernel, kernel]);
        let mut operands = vec![x, weight];
        if self.below(2) == 0 {
            operands.push(self.weight(&[out]));
        }
        let pad = kernel as i64 / 2;
        self.op("Conv", &operands, [("pads", [pad; 4].into()), ("group", (groups as i64).into())])
    }

    fn divisor(&mut self, of: &[usize]) -> usize {
        let fits: Vec<usize> = (1..=4).filter(|g| of.iter().all(|n| n % g == 0)).collect();
        self.pick(&fits)
    }

    fn piece(&mut self) {
        let x = self.any();
        let c = self.channels(x);
        let made = match self.below(17) {
            0..=2 => {
                let (out, kernel) = (self.pick(&[4, 6, 8, 12]), self.pick(&[1, 3]));
                let groups = self.divisor(&[c, out]);
                self.conv(x, out, kernel, groups)
            }
            3 => self.conv(x, c, 3, c),
            // A depthwise convolution that makes two channels of each.
            4 if c <= 8 => self.conv(x, 2 * c, 1, c),
            5 => {
                let operands =
                    [x, self.weight(&[c]), self.weight(&[c]), self.weight(&[c]), self.parameter(&[c], 0.2, 1.0)];
                self.op("BatchNormalization", &operands, [("epsilon", 1e-3f32.into())])
            }
            6 => {
                let op = self.pick(&["Relu", "Sigmoid", "Tanh", "Exp", "Neg"]);
                // Chains of exponentials leave every number behind.
                let bounded = self.op("Tanh", &[x], []);
                self.op(op, &[bounded], [])
            }
            7 | 8 => {
                let fits: Vec<ValueId> = self.values.iter().copied().filter(|v| self.channels(*v) == c).collect();
                let (other, op) = (self.pick(&fits), self.pick(&["Add", "Mul"]));
                let other = self.op("Tanh", &[other], []);
                self.op(op, &[x, other], [])
            }
            9 => {
                let other = self.any();
                if c + self.channels(other) > 24 {
                    return;
                }
                self.op("Concat", &[x, other], [("axis", 1i64.into())])
            }
            10 if c > 1 => {
                let first = 1 + self.below(c - 1);
                let sizes = self.ints(&[first as i64, (c - first) as i64]);
                let parts = self.graph.op_n("", "Split", &[Some(x), Some(sizes)], [("axis", 1i64.into())], 2).unwrap();
                self.values.push(parts[0]);
                parts[1]
            }
            11 if c > 1 => {
                let start = self.below(c - 1);
                let end = start + 1 + self.below(c - start);
                let bounds = [start as i64 - if self.below(2) == 0 { c as i64 } else { 0 }, end.min(c) as i64];
                let operands = [x, self.ints(&bounds[..1]), self.ints(&bounds[1..]), self.ints(&[1])];
                self.op("Slice", &operands, [])
            }
            // Group normalisation, and the same as older files write it.
            12 => {
                let groups = self.divisor(&[c]);
                let operands = [x, self.weight(&[c]), self.weight(&[c])];
                self.op("GroupNormalization", &operands, [("num_groups", (groups as i64).into())])
            }
            13 => {
                let groups = self.divisor(&[c]);
                let wide = self.ints(&[0, groups as i64, -1]);
                let rows = self.op("Reshape", &[x, wide], []);
                let operands = [rows, self.weight(&[groups]), self.weight(&[groups])];
                let rows = self.op("InstanceNormalization", &operands, []);
                let back = self.ints(&[0, c as i64, 4, 4]);
                self.op("Reshape", &[rows, back], [])
            }
            // Squeeze and excite.
            14 => {
                let pooled = self.op("GlobalAveragePool", &[x], []);
                let inner = self.conv(pooled, 4, 1, 1);
                let gate = self.conv(inner, c, 1, 1);
                let gate = self.op("Sigmoid", &[gate], []);
                self.op("Mul", &[x, gate], [])
            }
            // Pixels as tokens: a linear layer between two moves.
            15 => {
                let flat = self.ints(&[0, c as i64, 16]);
                let tokens = self.op("Reshape", &[x, flat], []);
                let tokens = self.op("Transpose", &[tokens], [("perm", [0i64, 2, 1].into())]);
                let (weight, bias) = (self.weight(&[c, 8]), self.weight(&[8]));
                let tokens = self.op("MatMul", &[tokens, weight], []);
                let tokens = self.op("Add", &[tokens, bias], []);
                let rows = self.op("Transpose", &[tokens], [("perm", [0i64, 2, 1].into())]);
                let back = self.ints(&[0, 8, 4, 4]);
                self.op("Reshape", &[rows, back], [])
            }
            _ => {
                let (out, groups) = (self.pick(&[1, 2, 3]), self.divisor(&[c]));
                let operands = [x, self.weight(&[c, out, 1, 1])];
                self.op("ConvTranspose", &operands, [("group", (groups as i64).into())])
            }
        };
        self.values.push(made);
    }

    /// Ten numbers from one of the values, through a flattening whose size is given or computed.
    fn head(&mut self, x: ValueId) -> ValueId {
        let c = self.channels(x);
        let flat = match self.below(3) {
            0 => self.op("Flatten", &[x], []),
            1 => {
                let batch = self.op("Shape", &[x], [("start", 0i64.into()), ("end", 1i64.into())]);
                let width = self.ints(&[16 * c as i64]);
                let shape = self.op("Concat", &[batch, width], [("axis", 0i64.into())]);
                self.op("Reshape", &[x, shape], [])
            }
            // Channels last: they are the inner digits of the flat index.
            _ => {
                let x = self.op("Transpose", &[x], [("perm", [0i64, 2, 3, 1].into())]);
                self.op("Flatten", &[x], [])
            }
        };
        let bias = self.weight(&[1, 10]);
        if self.below(2) == 0 {
            let weight = self.weight(&[10, 16 * c]);
            self.op("Gemm", &[flat, weight, bias], [("transB", 1i64.into())])
        } else {
            let weight = self.weight(&[16 * c, 10]);
            self.op("Gemm", &[flat, weight, bias], [])
        }
    }
}

fn grow(seed: u64) -> (Graph, HashMap<String, Tensor>) {
    let mut graph = Graph::new("random");
    let dims = vec!["N".into(), 6.into(), 4.into(), 4.into()];
    let x = graph.add_input("x", ValueType::tensor(DType::F64, dims)).unwrap();
    let mut grower = Grower { graph, values: vec![x], key: Key::new(seed), drawn: 0 };
    let stem = grower.conv(x, 8, 3, 1);
    grower.values = vec![stem];
    for _ in 0..4 + grower.below(10) {
        grower.piece();
    }
    let last = *grower.values.last().unwrap();
    let out = grower.head(last);
    grower.graph.push_output(out);
    if grower.below(5) == 0 {
        let other = grower.any();
        grower.graph.push_output(other);
    }
    grower.graph.prune().unwrap();
    let mut drawn = vec![0f32; 2 * 6 * 16];
    fill_uniform(&Key::new(seed).child("x"), 0, &mut drawn);
    let values: Vec<f64> = drawn.iter().map(|v| f64::from(*v) * 2.0 - 1.0).collect();
    let x = Tensor::from_f64(DType::F64, &[2, 6, 4, 4], &values).unwrap();
    (grower.graph, HashMap::from([("x".to_owned(), x)]))
}

/// Zeroes the units in every initializer they belong to.
fn mask(graph: &mut Graph, groups: &[Group], gone: &[BTreeSet<usize>]) {
    for (group, gone) in groups.iter().zip(gone) {
        let spaces: Vec<_> = group.parameters(graph).map(|(place, space, t)| (place, space, t.clone())).collect();
        for (place, space, _) in spaces {
            let tensor = graph.value(space.value).constant().unwrap().clone();
            let mut values = tensor.to_f64().unwrap();
            let inner: usize = tensor.shape()[space.axis + 1..].iter().product();
            let indices: BTreeSet<usize> =
                gone.iter().flat_map(|unit| group.units[*unit][place].iter().copied()).collect();
            for (at, value) in values.iter_mut().enumerate() {
                if indices.contains(&(at / inner % tensor.shape()[space.axis])) {
                    *value = 0.0;
                }
            }
            graph.set_constant(space.value, Some(Tensor::from_f64(tensor.dtype(), tensor.shape(), &values).unwrap()));
        }
    }
}

/// Some units of each group, but never all.
fn some(groups: &[Group], key: &Key) -> Vec<BTreeSet<usize>> {
    let chosen = |(number, group): (usize, &Group)| -> BTreeSet<usize> {
        let key = key.child_index(number as u64);
        let stays = key.below(0, group.units.len() as u64) as usize;
        (0..group.units.len()).filter(|unit| *unit != stays && key.below(1 + *unit as u64, 2) == 0).collect()
    };
    groups.iter().enumerate().map(chosen).collect()
}

#[test]
fn on_1000_random_networks_removing_channels_equals_zeroing_them() {
    let (mut removed, mut smaller_networks, mut refused_nodes) = (0, 0, 0);
    let mut failures = Vec::new();
    for seed in 0..1000 {
        let (graph, inputs) = grow(seed);
        let found = groups::find(&graph, &BTreeMap::new()).unwrap();
        let gone = some(&found.groups, &Key::new(seed).child("gone"));
        let mut smaller = graph.clone();
        match structured::remove(&mut smaller, &found.groups, &gone) {
            Ok(()) => {}
            Err(error) => {
                refused_nodes += 1;
                failures.push(format!("network {seed}: {error:?}"));
                continue;
            }
        }
        smaller_networks += usize::from(gone.iter().any(|gone| !gone.is_empty()));
        removed += gone.iter().map(BTreeSet::len).sum::<usize>();
        let mut masked = graph.clone();
        mask(&mut masked, &found.groups, &gone);
        let expected = evaluate(&masked, &inputs).unwrap();
        let got = evaluate(&smaller, &inputs).unwrap_or_else(|e| panic!("network {seed}: {e}"));
        for (a, b) in expected.iter().zip(&got) {
            assert_eq!(a.shape(), b.shape(), "network {seed}");
            let (a, b) = (a.to_f64().unwrap(), b.to_f64().unwrap());
            let size = a.iter().fold(1f64, |m, v| m.max(v.abs()));
            let error = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / size;
            if error.is_nan() || error > TOLERANCE {
                failures.push(format!("network {seed}: differs by {error:e}"));
            }
        }
    }
    assert!(failures.is_empty(), "{} of 1000, {refused_nodes} refused:\n{}", failures.len(), failures.join("\n"));
    // The claim would be empty if nothing could be removed.
    assert!(smaller_networks > 700 && removed > 3000, "{removed} units of {smaller_networks} networks were removed");
}
