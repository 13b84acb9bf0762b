//! Random networks: each choice adds one small piece to a growing graph, so that any list of choices is a valid
//! network and a shorter list is a smaller one.

use std::collections::HashMap;

use updraft_base::random::{Key, fill_uniform};
use updraft_graph::{Attribute, DType, Dim, Graph, Node, Tensor, ValueId, ValueType};

/// A network with what to run it on.
pub struct Grown {
    pub graph: Graph,
    pub inputs: HashMap<String, Tensor>,
}

/// What a piece is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pieces {
    /// Everything, also what rewrites are meant to find.
    All,
    /// What has a gradient.
    Differentiable,
}

/// A network of float type `dtype` with inputs `a [N, 6]` and `b [N, 4, 3, 3]` for a batch of 2.
pub fn grow(dtype: DType, pieces: Pieces, choices: &[u32]) -> Grown {
    let mut graph = Graph::new("random");
    let shapes: [(&str, &[usize]); 2] = [("a", &[2, 6]), ("b", &[2, 4, 3, 3])];
    let mut values = Vec::new();
    let mut inputs = HashMap::new();
    for (name, shape) in shapes {
        let mut dims = updraft_graph::dim::dims(shape);
        dims[0] = "N".into();
        values.push(graph.add_input(name, ValueType::tensor(dtype, dims)).unwrap());
        inputs.insert(name.to_owned(), numbers(Key::new(1).child(name), dtype, shape));
    }
    let mut grower = Grower { graph, values, dtype, key: Key::new(0), drawn: 0 };
    for (i, choice) in choices.iter().enumerate() {
        grower.key = Key::new(u64::from(*choice)).child_index(i as u64);
        grower.drawn = 0;
        let x = grower.any_value();
        if let Some(made) = grower.piece(pieces, x) {
            grower.values.push(made);
        }
    }
    let last = *grower.values.last().unwrap();
    grower.graph.push_output(last);
    if grower.below(2) == 0 {
        let other = grower.any_value();
        if !grower.graph.inputs().contains(&other) && other != last {
            grower.graph.push_output(other);
        }
    }
    Grown { graph: grower.graph, inputs }
}

/// Numbers in [-1, 1) that depend on the key alone.
pub fn numbers(key: Key, dtype: DType, shape: &[usize]) -> Tensor {
    let mut drawn = vec![0f32; shape.iter().product()];
    fill_uniform(&key, 0, &mut drawn);
    Tensor::from_f64(dtype, shape, &drawn.iter().map(|v| f64::from(*v) * 2.0 - 1.0).collect::<Vec<_>>()).unwrap()
}

struct Grower {
    graph: Graph,
    values: Vec<ValueId>,
    dtype: DType,
    key: Key,
    drawn: u64,
}

impl Grower {
    fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        self.key.below(self.drawn, n as u64) as usize
    }

    fn any_value(&mut self) -> ValueId {
        let index = self.below(self.values.len());
        self.values[index]
    }

    fn constant(&mut self, shape: &[usize]) -> ValueId {
        self.drawn += 1;
        let tensor = numbers(self.key.child_index(self.drawn), self.dtype, shape);
        self.graph.add_constant("c", tensor)
    }

    fn ints(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_constant("i", Tensor::vector(values))
    }

    fn op<const N: usize>(&mut self, op: &str, inputs: &[ValueId], attributes: [(&str, Attribute); N]) -> ValueId {
        assert!(updraft_graph::op::find("", op).is_some(), "{op} has no facts");
        self.graph.op(op, inputs, attributes).unwrap_or_else(|e| panic!("{op}: {e}"))
    }

    fn shape(&self, x: ValueId) -> Vec<Dim> {
        self.graph.shape(x).expect("every piece has a known rank").to_vec()
    }

    fn known(&self, x: ValueId, axis: usize) -> Option<usize> {
        self.shape(x).get(axis)?.known()
    }

    /// One more piece behind `x`; `None` where the drawn kind does not fit its shape.
    fn piece(&mut self, pieces: Pieces, x: ValueId) -> Option<ValueId> {
        let rank = self.shape(x).len();
        let (smooth, all) = (14, 24);
        match self.below(if pieces == Pieces::All { all } else { smooth }) {
            0 => Some(self.op("Relu", &[x], [])),
            1 => Some(self.op("Tanh", &[x], [])),
            2 => self.join(x),
            3 => Some(self.transpose(x)),
            4 => {
                let turned = self.transpose(x);
                Some(self.transpose(turned))
            }
            5 => self.flatten_and_back(x),
            6 => self.linear(x),
            7 => self.gemm(x),
            8 => self.convolution(x),
            9 => self.transposed_convolution(x),
            10 => Some(self.broadcast(x)),
            11 => self.slice(x),
            12 => Some(self.pad(x)),
            13 => {
                let axis = self.below(rank + 1) as i64;
                let axes = self.ints(&[axis]);
                let wide = self.op("Unsqueeze", &[x, axes], []);
                Some(self.op("Squeeze", &[wide, axes], []))
            }
            14 => Some(self.op("Identity", &[x], [])),
            15 => Some(self.op("Cast", &[x], [("to", (self.dtype as i64).into())])),
            16 => {
                let ratio = self.graph.add_constant("ratio", Tensor::scalar(0.5f32));
                Some(self.op("Dropout", &[x, ratio], []))
            }
            17 => {
                let one = Tensor::from_f64(self.dtype, &[1], &[1.0]).unwrap();
                let one = self.graph.add_constant("one", one);
                Some(if self.below(2) == 0 { self.op("Mul", &[x, one], []) } else { self.op("Mul", &[one, x], []) })
            }
            18 => {
                let shape = self.op("Shape", &[x], []);
                Some(self.op("Expand", &[x, shape], []))
            }
            19 => Some(self.op("Concat", &[x], [("axis", 0i64.into())])),
            20 => {
                let c = self.constant(&[1]);
                let c = self.op("Exp", &[c], []);
                let c = self.op("Neg", &[c], []);
                Some(self.op("Mul", &[x, c], []))
            }
            21 => Some(self.op("Sum", &[x], [])),
            22 => {
                let c = self.constant(&[1]);
                Some(self.op("Sub", &[x, c], []))
            }
            _ => self.twin(x),
        }
    }

    /// A sum or product with another value of the same shape.
    fn join(&mut self, x: ValueId) -> Option<ValueId> {
        let shape = self.shape(x);
        let fits = |y: &ValueId| {
            let other = self.shape(*y);
            other.len() == shape.len() && other.iter().zip(&shape).all(|(a, b)| a.same(b))
        };
        let others: Vec<ValueId> = self.values.iter().copied().filter(fits).collect();
        let other = others[self.below(others.len())];
        let op = ["Add", "Mul", "Sub"][self.below(3)];
        Some(self.op(op, &[x, other], []))
    }

    fn transpose(&mut self, x: ValueId) -> ValueId {
        let rank = self.shape(x).len();
        let mut axes: Vec<i64> = (0..rank as i64).collect();
        for i in (1..rank).rev() {
            let j = self.below(i + 1);
            axes.swap(i, j);
        }
        self.op("Transpose", &[x], [("perm", axes.into())])
    }

    /// A matrix, and what it was again: by a constant shape, by the shape of `x`, or by a shape computed from it.
    fn flatten_and_back(&mut self, x: ValueId) -> Option<ValueId> {
        let shape = self.shape(x);
        let flat = self.op("Flatten", &[x], [("axis", (shape.len() as i64 - 1).into())]);
        let back = match self.below(3) {
            0 => {
                let target: Vec<i64> = shape.iter().map(|d| d.known().map_or(-1, |n| n as i64)).collect();
                if target.iter().filter(|d| **d == -1).count() > 1 {
                    return None;
                }
                self.ints(&target)
            }
            1 => self.op("Shape", &[x], []),
            _ => {
                let shape = self.op("Shape", &[x], []);
                let first = self.ints(&[0]);
                let first = self.op("Gather", &[shape, first], []);
                let rest: Vec<i64> = (1..self.shape(x).len() as i64).collect();
                let rest = self.ints(&rest);
                let rest = self.op("Gather", &[shape, rest], []);
                self.op("Concat", &[first, rest], [("axis", 0i64.into())])
            }
        };
        Some(self.op("Reshape", &[flat, back], []))
    }

    fn linear(&mut self, x: ValueId) -> Option<ValueId> {
        let rank = self.shape(x).len();
        let features = self.known(x, rank - 1)?;
        let (w, b) = (self.constant(&[features, 5]), self.constant(&[5]));
        let y = self.op("MatMul", &[x, w], []);
        let y = if self.below(2) == 0 { self.op("Add", &[y, b], []) } else { self.op("Add", &[b, y], []) };
        self.maybe_norm(y, 5)
    }

    fn gemm(&mut self, x: ValueId) -> Option<ValueId> {
        if self.shape(x).len() != 2 {
            return None;
        }
        let features = self.known(x, 1)?;
        let transposed = self.below(2) == 0;
        let w = self.constant(&if transposed { [4, features] } else { [features, 4] });
        let bias_shape: &[usize] = [&[4][..], &[1, 4], &[1], &[]][self.below(4)];
        let b = self.constant(bias_shape);
        let attributes = [("transB", i64::from(transposed).into()), ("alpha", 0.5f32.into()), ("beta", 2.0f32.into())];
        let y = self.op("Gemm", &[x, w, b], attributes);
        self.maybe_norm(y, 4)
    }

    fn convolution(&mut self, x: ValueId) -> Option<ValueId> {
        let (channels, _, _) = self.picture(x)?;
        let groups = if channels % 2 == 0 { 1 + self.below(2) } else { 1 };
        let w = self.constant(&[6, channels / groups, 2, 2]);
        let mut operands = vec![x, w];
        if self.below(2) == 0 {
            operands.push(self.constant(&[6]));
        }
        let attributes =
            [("kernel_shape", [2i64, 2].into()), ("pads", [1i64, 0, 0, 1].into()), ("group", (groups as i64).into())];
        let mut y = self.op("Conv", &operands, attributes);
        if self.below(2) == 0 {
            let shape: &[usize] = [&[6, 1, 1][..], &[1, 6, 1, 1], &[1]][self.below(3)];
            let b = self.constant(shape);
            y = self.op("Add", &[y, b], []);
        }
        self.maybe_norm(y, 6)
    }

    fn transposed_convolution(&mut self, x: ValueId) -> Option<ValueId> {
        let (channels, height, width) = self.picture(x)?;
        // It enlarges: without a bound a chain of it would take all the time.
        if height * width > 40 {
            return None;
        }
        let groups = if channels % 2 == 0 { 1 + self.below(2) } else { 1 };
        let w = self.constant(&[channels, 3, 2, 2]);
        let attributes =
            [("kernel_shape", [2i64, 2].into()), ("strides", [2i64, 1].into()), ("group", (groups as i64).into())];
        let y = self.op("ConvTranspose", &[x, w], attributes);
        self.maybe_norm(y, 3 * groups)
    }

    fn picture(&self, x: ValueId) -> Option<(usize, usize, usize)> {
        if self.shape(x).len() != 4 {
            return None;
        }
        Some((self.known(x, 1)?, self.known(x, 2)?, self.known(x, 3)?))
    }

    /// Batch normalisation over axis 1 of `channels`, half of the time.
    fn maybe_norm(&mut self, x: ValueId, channels: usize) -> Option<ValueId> {
        if self.below(2) == 0 || self.known(x, 1) != Some(channels) {
            return Some(x);
        }
        let mut operands = vec![x];
        for _ in 0..3 {
            operands.push(self.constant(&[channels]));
        }
        let variance = self.constant(&[channels]);
        let tensor = self.graph.value(variance).constant().unwrap().to_f64().unwrap();
        let positive: Vec<f64> = tensor.iter().map(|v| v.abs() + 0.1).collect();
        let positive = Tensor::from_f64(self.dtype, &[channels], &positive).unwrap();
        self.graph.set_constant(variance, Some(positive));
        operands.push(variance);
        Some(self.op("BatchNormalization", &operands, [("epsilon", 1e-3f32.into())]))
    }

    /// A product with a constant along some of the axes.
    fn broadcast(&mut self, x: ValueId) -> ValueId {
        let shape: Vec<usize> = self
            .shape(x)
            .iter()
            .map(|d| match d.known() {
                Some(n) if self.drawn.is_multiple_of(2) => n,
                _ => 1,
            })
            .collect();
        let keep = self.below(shape.len() + 1);
        let c = self.constant(&shape[keep..]);
        self.op("Mul", &[x, c], [])
    }

    /// All of an axis, or all but its first element.
    fn slice(&mut self, x: ValueId) -> Option<ValueId> {
        let axis = self.below(self.shape(x).len());
        let start = self.below(2);
        if start == 1 && self.known(x, axis)? < 3 {
            return None;
        }
        let operands = [x, self.ints(&[start as i64]), self.ints(&[i64::MAX]), self.ints(&[axis as i64])];
        Some(self.op("Slice", &operands, []))
    }

    /// Zeros around the last axis, or none.
    fn pad(&mut self, x: ValueId) -> ValueId {
        let rank = self.shape(x).len();
        let mut pads = vec![0i64; 2 * rank];
        pads[rank - 1] = self.below(2) as i64;
        let pads = self.ints(&pads);
        self.op("Pad", &[x, pads], [])
    }

    /// The node that made `x` once more.
    fn twin(&mut self, x: ValueId) -> Option<ValueId> {
        let (id, index) = self.graph.value(x).producer()?;
        let node: Node = self.graph.node(id).clone();
        let made = self.graph.op_n(&node.domain, &node.op, &node.inputs, node.attributes, node.outputs.len()).unwrap();
        Some(made[index])
    }
}
