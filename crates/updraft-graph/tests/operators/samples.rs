//! Operators with random operands, for checking their gradients. Values stay at least [`MARGIN`] away from kinks, and
//! values that are compared with one another differ by as much, so that small steps cross nothing.

use updraft_base::random::Key;
use updraft_graph::{Attribute, Attributes, Tensor, UPDRAFT_DOMAIN};

mod layers;

/// Several steps of the differences in a direction of standard normal numbers.
const MARGIN: f64 = 0.05;

/// Random choices from a seed.
pub struct Draw {
    key: Key,
    next: u64,
}

impl Draw {
    pub fn new(seed: u64) -> Draw {
        Draw { key: Key::new(seed), next: 0 }
    }

    fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        self.key.below(self.next, n as u64) as usize
    }

    fn size(&mut self) -> usize {
        1 + self.below(4)
    }

    fn flag(&mut self) -> bool {
        self.below(2) == 1
    }

    fn shape(&mut self, rank: usize) -> Vec<usize> {
        (0..rank).map(|_| self.size()).collect()
    }

    /// A shape of rank 1 to 3.
    fn any_shape(&mut self) -> Vec<usize> {
        let rank = 1 + self.below(3);
        self.shape(rank)
    }

    fn uniform(&mut self, low: f64, high: f64) -> f64 {
        self.next += 1;
        low + (high - low) * f64::from(self.key.uniform_f32(self.next))
    }

    fn tensor(&mut self, shape: &[usize], mut each: impl FnMut(&mut Draw) -> f64) -> Tensor {
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| each(self)).collect();
        Tensor::new(shape, &values).unwrap()
    }

    /// Standard normal numbers.
    pub fn normal(&mut self, shape: &[usize]) -> Tensor {
        self.tensor(shape, |draw| {
            draw.next += 1;
            f64::from(draw.key.normal_f32(draw.next))
        })
    }

    /// Numbers between bounds.
    fn between(&mut self, shape: &[usize], low: f64, high: f64) -> Tensor {
        self.tensor(shape, |draw| draw.uniform(low, high))
    }

    /// Numbers in (-4, 4) away from kinks.
    fn away_from(&mut self, shape: &[usize], kinks: &[f64]) -> Tensor {
        self.tensor(shape, |draw| {
            loop {
                let x = draw.uniform(-4.0, 4.0);
                if kinks.iter().all(|kink| (x - kink).abs() > MARGIN) {
                    return x;
                }
            }
        })
    }

    /// Numbers no two of which are close.
    fn distinct(&mut self, shape: &[usize]) -> Tensor {
        let mut values: Vec<f64> =
            (0..shape.iter().product()).map(|i: usize| 4.0 * MARGIN * (i as f64 + 0.5)).collect();
        for i in (1..values.len()).rev() {
            let j = self.below(i + 1);
            values.swap(i, j);
        }
        let middle = values.len() as f64 * 2.0 * MARGIN;
        let values: Vec<f64> = values.into_iter().map(|v| v - middle).collect();
        Tensor::new(shape, &values).unwrap()
    }

    /// A shape that broadcasts to another: axes stretched or left out at the front.
    fn stretched(&mut self, shape: &[usize]) -> Vec<usize> {
        let start = self.below(shape.len() + 1);
        shape[start..].iter().map(|n| if self.flag() { *n } else { 1 }).collect()
    }

    /// Two normal tensors that broadcast to one shape.
    fn pair(&mut self) -> Vec<Tensor> {
        let shape = self.any_shape();
        let other = self.stretched(&shape);
        let mut pair = vec![self.normal(&shape), self.normal(&other)];
        if self.flag() {
            pair.swap(0, 1);
        }
        pair
    }

    fn indices(&mut self, shape: &[usize], size: usize) -> Tensor {
        let values: Vec<i64> = (0..shape.iter().product())
            .map(|_| {
                let index = self.below(size) as i64;
                if self.flag() { index - size as i64 } else { index }
            })
            .collect();
        Tensor::new(shape, &values).unwrap()
    }

    /// Some axes of a rank, counted from either end.
    fn axes(&mut self, rank: usize) -> Vec<i64> {
        (0..rank)
            .filter_map(|axis| {
                let counted = if self.flag() { axis as i64 } else { axis as i64 - rank as i64 };
                self.flag().then_some(counted)
            })
            .collect()
    }
}

/// A node with its operands.
pub struct Sample {
    pub attributes: Attributes,
    pub inputs: Vec<Option<Tensor>>,
    pub outputs: usize,
    /// Inputs that are floats but no argument of the derivative (bounds, updated statistics).
    fixed: Vec<usize>,
    /// Outputs through which the rule takes gradients; all, where empty.
    counted: Vec<usize>,
}

impl Sample {
    /// Whether an input's derivative is checked.
    pub fn moves(&self, input: usize) -> bool {
        let is_float = self.inputs[input].as_ref().is_some_and(|t| t.as_slice::<f64>().is_ok());
        is_float && !self.fixed.contains(&input)
    }

    /// Whether an output takes part.
    pub fn counts(&self, output: usize) -> bool {
        self.counted.is_empty() || self.counted.contains(&output)
    }

    fn with(mut self, name: &str, value: impl Into<Attribute>) -> Sample {
        self.attributes.set(name, value);
        self
    }

    fn fixed(self, inputs: &[usize]) -> Sample {
        Sample { fixed: inputs.to_vec(), ..self }
    }

    fn outputs(self, outputs: usize) -> Sample {
        Sample { outputs, ..self }
    }

    fn counted(self, outputs: &[usize]) -> Sample {
        Sample { counted: outputs.to_vec(), ..self }
    }
}

fn sample(inputs: Vec<Tensor>) -> Sample {
    Sample {
        attributes: Attributes::new(),
        inputs: inputs.into_iter().map(Some).collect(),
        outputs: 1,
        fixed: Vec::new(),
        counted: Vec::new(),
    }
}

/// How to make samples of one operator.
pub struct Row(&'static str, fn(&mut Draw) -> Sample);

impl Row {
    pub fn name(&self) -> &'static str {
        self.0.rsplit(':').next().unwrap_or(self.0)
    }

    pub fn domain(&self) -> &'static str {
        if self.0.starts_with("own:") { UPDRAFT_DOMAIN } else { "" }
    }

    pub fn label(&self) -> &'static str {
        self.0
    }

    pub fn sample(&self, draw: &mut Draw) -> Sample {
        (self.1)(draw)
    }
}

fn unary(draw: &mut Draw, kinks: &[f64]) -> Sample {
    let shape = draw.any_shape();
    sample(vec![draw.away_from(&shape, kinks)])
}

fn unary_between(draw: &mut Draw, low: f64, high: f64) -> Sample {
    let shape = draw.any_shape();
    sample(vec![draw.between(&shape, low, high)])
}

/// Three tensors of which no two elements at one place are close.
fn variadic(draw: &mut Draw) -> Sample {
    let shape = draw.any_shape();
    let count = 1 + draw.below(3);
    let all = draw.distinct(&[&[count][..], &shape].concat());
    let values = all.to_f64().unwrap();
    let len = values.len() / count;
    sample(values.chunks_exact(len).map(|chunk| Tensor::new(&shape, chunk).unwrap()).collect())
}

fn reduction(draw: &mut Draw, make: fn(&mut Draw, &[usize]) -> Tensor) -> Sample {
    let shape = draw.any_shape();
    let axes = draw.axes(shape.len());
    let x = make(draw, &shape);
    let inputs = if axes.is_empty() { vec![x] } else { vec![x, Tensor::vector(&axes)] };
    let keep = i64::from(draw.flag());
    sample(inputs).with("keepdims", keep)
}

fn gathered(draw: &mut Draw) -> (Tensor, Tensor, i64) {
    let shape = draw.any_shape();
    let axis = draw.below(shape.len());
    let at = draw.any_shape();
    (draw.normal(&shape), draw.indices(&at, shape[axis]), axis as i64)
}

/// Data, indices of its rank that name no place twice, and the axis.
fn elements(draw: &mut Draw) -> (Tensor, Tensor, i64) {
    let shape = draw.any_shape();
    let axis = draw.below(shape.len());
    let mut at = shape.clone();
    at[axis] = 1 + draw.below(shape[axis]);
    let stride: usize = at[axis + 1..].iter().product();
    let start = draw.below(shape[axis]);
    let count: usize = at.iter().product();
    let values: Vec<i64> = (0..count).map(|p| ((start + p / stride % at[axis]) % shape[axis]) as i64).collect();
    (draw.normal(&shape), Tensor::new(&at, &values).unwrap(), axis as i64)
}

fn slice(draw: &mut Draw) -> Sample {
    let shape = draw.any_shape();
    let mut lists = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for (axis, size) in shape.iter().enumerate() {
        let step = [1, 1, 2, -1, -2][draw.below(5)];
        let (start, end) = if step > 0 {
            (draw.below(*size) as i64, i64::MAX)
        } else {
            (draw.below(*size) as i64 - *size as i64, i64::MIN)
        };
        for (list, value) in lists.iter_mut().zip([start, end, axis as i64, step]) {
            list.push(value);
        }
    }
    let x = draw.normal(&shape);
    sample(std::iter::once(x).chain(lists.iter().map(|l| Tensor::vector(l))).collect())
}

fn joined(draw: &mut Draw) -> Sample {
    let shape = draw.any_shape();
    let axis = draw.below(shape.len());
    let parts = (0..1 + draw.below(3)).map(|_| {
        let mut part = shape.clone();
        part[axis] = draw.size();
        draw.normal(&part)
    });
    sample(parts.collect()).with("axis", axis as i64)
}

fn split(draw: &mut Draw) -> Sample {
    let mut shape = draw.any_shape();
    let axis = draw.below(shape.len());
    let sizes: Vec<i64> = (0..1 + draw.below(3)).map(|_| draw.size() as i64).collect();
    shape[axis] = sizes.iter().sum::<i64>() as usize;
    let (x, count) = (draw.normal(&shape), sizes.len());
    sample(vec![x, Tensor::vector(&sizes)]).with("axis", axis as i64).outputs(count)
}

fn pixels(draw: &mut Draw, deep: bool) -> Sample {
    let block = 1 + draw.below(2);
    let [n, c, h, w] = [0; 4].map(|_| draw.size());
    let shape = if deep { [n, c * block * block, h, w] } else { [n, c, h * block, w * block] };
    let x = draw.normal(&shape);
    let mode = if deep && draw.flag() { "CRD" } else { "DCR" };
    let made = sample(vec![x]).with("blocksize", block as i64);
    if deep { made.with("mode", mode) } else { made }
}

/// All rows.
pub fn rows() -> impl Iterator<Item = &'static Row> {
    ROWS.iter().chain(layers::ROWS)
}

const ROWS: &[Row] = &[
    Row("Add", |d| sample(d.pair())),
    Row("Sub", |d| sample(d.pair())),
    Row("Mul", |d| sample(d.pair())),
    Row("Div", |d| {
        let mut pair = d.pair();
        let shape = pair[1].shape().to_vec();
        pair[1] = d.between(&shape, 0.5, 2.0);
        sample(pair)
    }),
    Row("Pow", |d| {
        let mut pair = d.pair();
        let shape = pair[0].shape().to_vec();
        pair[0] = d.between(&shape, 0.5, 2.0);
        sample(pair)
    }),
    Row("Max", variadic),
    Row("Min", variadic),
    Row("Sum", variadic),
    Row("Mean", variadic),
    Row("Neg", |d| unary(d, &[])),
    Row("Abs", |d| unary(d, &[0.0])),
    Row("Sign", |d| unary(d, &[0.0])),
    Row("Floor", |d| unary(d, &[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0])),
    Row("Ceil", |d| unary(d, &[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0])),
    Row("Round", |d| unary(d, &[-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])),
    Row("Reciprocal", |d| unary_between(d, 0.5, 2.0)),
    Row("Sqrt", |d| unary_between(d, 0.5, 2.0)),
    Row("Exp", |d| unary(d, &[])),
    Row("Log", |d| unary_between(d, 0.5, 2.0)),
    Row("Clip", |d| {
        let shape = d.any_shape();
        let x = d.away_from(&shape, &[-1.0, 2.0]);
        sample(vec![x, Tensor::scalar(-1.0f64), Tensor::scalar(2.0f64)]).fixed(&[1, 2])
    }),
    Row("Sin", |d| unary(d, &[])),
    Row("Cos", |d| unary(d, &[])),
    Row("Tan", |d| unary_between(d, -1.0, 1.0)),
    Row("Asin", |d| unary_between(d, -0.8, 0.8)),
    Row("Acos", |d| unary_between(d, -0.8, 0.8)),
    Row("Atan", |d| unary(d, &[])),
    Row("Sinh", |d| unary(d, &[])),
    Row("Cosh", |d| unary(d, &[])),
    Row("Asinh", |d| unary(d, &[])),
    Row("Acosh", |d| unary_between(d, 1.5, 3.0)),
    Row("Atanh", |d| unary_between(d, -0.8, 0.8)),
    Row("Where", |d| {
        let pair = d.pair();
        let shape = d.stretched(pair[0].shape());
        let bits: Vec<bool> = (0..shape.iter().product::<usize>()).map(|_| d.flag()).collect();
        sample([vec![Tensor::from_bools(&shape, &bits).unwrap()], pair].concat())
    }),
    Row("Relu", |d| unary(d, &[0.0])),
    Row("LeakyRelu", |d| unary(d, &[0.0]).with("alpha", 0.3)),
    Row("PRelu", |d| {
        let shape = d.any_shape();
        let slope = d.stretched(&shape);
        sample(vec![d.away_from(&shape, &[0.0]), d.normal(&slope)])
    }),
    Row("Elu", |d| unary(d, &[0.0]).with("alpha", 0.7)),
    Row("Selu", |d| unary(d, &[0.0])),
    Row("Celu", |d| unary(d, &[0.0]).with("alpha", 1.7)),
    Row("ThresholdedRelu", |d| unary(d, &[0.5]).with("alpha", 0.5)),
    Row("Shrink", |d| unary(d, &[-1.5, 1.5]).with("lambd", 1.5).with("bias", 1.0)),
    Row("Sigmoid", |d| unary(d, &[])),
    Row("HardSigmoid", |d| unary(d, &[-2.5, 2.5])),
    Row("HardSwish", |d| unary(d, &[-3.0, 3.0])),
    Row("Tanh", |d| unary(d, &[])),
    Row("Softplus", |d| unary(d, &[])),
    Row("Softsign", |d| unary(d, &[0.0])),
    Row("Erf", |d| unary(d, &[])),
    Row("Gelu", |d| unary(d, &[])),
    Row("Gelu", |d| unary(d, &[]).with("approximate", "tanh")),
    Row("Mish", |d| unary(d, &[])),
    Row("Swish", |d| unary(d, &[]).with("alpha", 1.3)),
    Row("SwiGLU", |d| {
        let shape = d.any_shape();
        sample(vec![d.normal(&shape), d.normal(&shape)]).with("alpha", 1.3)
    }),
    Row("Cast", |d| unary(d, &[]).with("to", updraft_graph::DType::F64 as i64)),
    Row("CastLike", |d| {
        let shape = d.any_shape();
        sample(vec![d.normal(&shape), Tensor::scalar(1.0f64)]).fixed(&[1])
    }),
    Row("ReduceSum", |d| reduction(d, Draw::normal)),
    Row("ReduceMean", |d| reduction(d, Draw::normal)),
    Row("ReduceProd", |d| reduction(d, |d, s| d.between(s, 0.5, 1.5))),
    Row("ReduceMax", |d| reduction(d, Draw::distinct)),
    Row("ReduceMin", |d| reduction(d, Draw::distinct)),
    Row("ReduceL1", |d| reduction(d, |d, s| d.away_from(s, &[0.0]))),
    Row("ReduceL2", |d| reduction(d, |d, s| d.between(s, 0.5, 1.5))),
    Row("ReduceSumSquare", |d| reduction(d, Draw::normal)),
    Row("ReduceLogSum", |d| reduction(d, |d, s| d.between(s, 0.5, 1.5))),
    Row("ReduceLogSumExp", |d| reduction(d, Draw::normal)),
    Row("CumSum", |d| {
        let shape = d.any_shape();
        let axis = d.below(shape.len()) as i64;
        let (exclusive, reverse) = (i64::from(d.flag()), i64::from(d.flag()));
        let x = d.normal(&shape);
        sample(vec![x, Tensor::scalar(axis)]).with("exclusive", exclusive).with("reverse", reverse)
    }),
    Row("Reshape", |d| {
        let shape = d.any_shape();
        sample(vec![d.normal(&shape), Tensor::vector(&[1i64, -1])])
    }),
    Row("Flatten", |d| {
        let shape = d.any_shape();
        let axis = d.below(shape.len() + 1) as i64;
        sample(vec![d.normal(&shape)]).with("axis", axis)
    }),
    Row("Squeeze", |d| {
        let mut shape = d.any_shape();
        shape.insert(0, 1);
        sample(vec![d.normal(&shape), Tensor::vector(&[0i64])])
    }),
    Row("Unsqueeze", |d| {
        let shape = d.any_shape();
        sample(vec![d.normal(&shape), Tensor::vector(&[0i64, -1])])
    }),
    Row("Identity", |d| unary(d, &[])),
    Row("Transpose", |d| {
        let shape = d.shape(3);
        let permutation = [[0i64, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]][d.below(4)];
        sample(vec![d.normal(&shape)]).with("perm", permutation)
    }),
    Row("Expand", |d| {
        let shape = d.any_shape();
        let from = d.stretched(&shape);
        let wanted: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
        sample(vec![d.normal(&from), Tensor::vector(&wanted)])
    }),
    Row("Tile", |d| {
        let shape = d.any_shape();
        let repeats: Vec<i64> = shape.iter().map(|_| d.size() as i64).collect();
        sample(vec![d.normal(&shape), Tensor::vector(&repeats)])
    }),
    Row("Concat", joined),
    Row("Split", split),
    Row("Trilu", |d| {
        let shape = d.shape(3);
        let k = d.below(5) as i64 - 2;
        let upper = i64::from(d.flag());
        sample(vec![d.normal(&shape), Tensor::scalar(k)]).with("upper", upper)
    }),
    Row("DepthToSpace", |d| pixels(d, true)),
    Row("SpaceToDepth", |d| pixels(d, false)),
    Row("ReverseSequence", |d| {
        let shape = d.shape(3);
        let lengths: Vec<i64> = (0..shape[1]).map(|_| d.below(shape[0] + 1) as i64).collect();
        sample(vec![d.normal(&shape), Tensor::vector(&lengths)])
    }),
    Row("Slice", slice),
    Row("Pad", |d| {
        let shape = d.any_shape();
        let ends = 2 * shape.len();
        // Some ends are cut off, where enough is left.
        let pads: Vec<i64> = (0..ends)
            .map(|end| if shape[end % shape.len()] > 2 { d.below(4) as i64 - 1 } else { d.below(3) as i64 })
            .collect();
        sample(vec![d.normal(&shape), Tensor::vector(&pads)])
    }),
    Row("Gather", |d| {
        let (x, at, axis) = gathered(d);
        sample(vec![x, at]).with("axis", axis)
    }),
    Row("GatherElements", |d| {
        let (x, at, axis) = elements(d);
        sample(vec![x, at]).with("axis", axis)
    }),
    Row("GatherND", |d| {
        let shape = d.shape(3);
        let rows = d.size();
        let at: Vec<i64> = (0..rows).flat_map(|_| [d.below(shape[0]) as i64, d.below(shape[1]) as i64]).collect();
        sample(vec![d.normal(&shape), Tensor::new(&[rows, 2], &at).unwrap()])
    }),
    Row("Scatter", |d| {
        let (x, at, axis) = elements(d);
        let updates = d.normal(at.shape());
        sample(vec![x, at, updates]).with("axis", axis)
    }),
    Row("ScatterElements", |d| {
        let (x, at, axis) = elements(d);
        let updates = d.normal(at.shape());
        let reduction = if d.flag() { "add" } else { "none" };
        sample(vec![x, at, updates]).with("axis", axis).with("reduction", reduction)
    }),
    Row("ScatterND", |d| {
        let shape = d.shape(2);
        let at: Vec<i64> = (0..shape[0] as i64).rev().collect();
        let reduction = if d.flag() { "add" } else { "none" };
        let inputs = vec![d.normal(&shape), Tensor::new(&[shape[0], 1], &at).unwrap(), d.normal(&shape)];
        sample(inputs).with("reduction", reduction)
    }),
    Row("TopK", |d| {
        let shape = d.any_shape();
        let axis = d.below(shape.len());
        let k = 1 + d.below(shape[axis]) as i64;
        sample(vec![d.distinct(&shape), Tensor::vector(&[k])]).with("axis", axis as i64).outputs(2)
    }),
    Row("Dropout", |d| unary(d, &[])),
];
