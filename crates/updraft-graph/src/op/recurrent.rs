//! Recurrent layers: RNN, GRU and LSTM, one layer forward, backward, or both ways.
//!
//! The three differ in their gates only, which [`Layer::step`] computes from one position and the state before it;
//! walking positions, directions and examples is common. Equations: <https://onnx.ai/onnx/operators/onnx__LSTM.html>
//! and its siblings.

use crate::attribute::{Attribute, Attributes};
use crate::dim::Dim;
use crate::op::conv::expect_shape;
use crate::op::{Arity, Eval, Fact, Infer, Op, OpError, OpView, Shapes, filled};
use crate::tensor::Tensor;

const UNROLLED: &str = "networks that are trained here have no recurrent layers";
const GATES: &str = "gates share one axis of the weights; recurrent layers are not pruned";

/// The family.
pub(super) const OPS: &[Op] = &[
    recurrent("RNN", Arity::range(3, 6).outputs(0, 2)),
    recurrent("GRU", Arity::range(3, 6).outputs(0, 2)),
    recurrent("LSTM", Arity::range(3, 8).outputs(0, 3)),
];

const fn recurrent(name: &'static str, arity: Arity) -> Op {
    Op::onnx(name, &[7, 14, 22], arity, infer_recurrent, eval_recurrent)
        .no_gradient(UNROLLED)
        .flops(recurrent_flops)
        .no_channels(GATES)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rnn,
    Gru,
    Lstm,
}

impl Kind {
    fn of(view: &OpView) -> Kind {
        match view.node.op.as_str() {
            "RNN" => Kind::Rnn,
            "GRU" => Kind::Gru,
            _ => Kind::Lstm,
        }
    }

    fn gates(self) -> usize {
        match self {
            Kind::Rnn => 1,
            Kind::Gru => 3,
            Kind::Lstm => 4,
        }
    }

    fn default_activations(self) -> &'static [&'static str] {
        match self {
            Kind::Rnn => &["Tanh"],
            Kind::Gru => &["Sigmoid", "Tanh"],
            Kind::Lstm => &["Sigmoid", "Tanh", "Tanh"],
        }
    }
}

/// For each direction, whether it runs from the end.
fn directions(attributes: &Attributes) -> Result<&'static [bool], OpError> {
    match attributes.string("direction", "forward")? {
        "forward" => Ok(&[false]),
        "reverse" => Ok(&[true]),
        "bidirectional" => Ok(&[false, true]),
        other => Err(OpError::attribute(
            "direction",
            format!("is {other:?}; \"forward\", \"reverse\" and \"bidirectional\" are known"),
        )),
    }
}

fn infer_recurrent(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = cx.input(0, "sequences")?.dtype;
    let directions = Dim::Known(directions(cx.attributes())?.len());
    cx.expect_rank(0, 3, "the sequences")?;
    cx.expect_rank(2, 3, "the recurrence weight")?;
    let hidden = match (cx.attributes().optional_int("hidden_size")?, cx.shape(2)) {
        (_, Some(recurrence)) => recurrence[2].clone(),
        (Some(size), None) => usize::try_from(size).map_or(Dim::Unknown, Dim::Known),
        (None, None) => Dim::Unknown,
    };
    let Some([first, second, _]) = cx.shape(0) else {
        return Ok(vec![Fact::of_dtype(dtype); 3]);
    };
    let (all, last) = match cx.attributes().int("layout", 0)? {
        0 => (
            vec![first.clone(), directions.clone(), second.clone(), hidden.clone()],
            vec![directions, second.clone(), hidden],
        ),
        _ => (
            vec![first.clone(), second.clone(), directions.clone(), hidden.clone()],
            vec![first.clone(), directions, hidden],
        ),
    };
    Ok(vec![Fact::tensor(dtype, all), Fact::tensor(dtype, last.clone()), Fact::tensor(dtype, last)])
}

/// A function on the elements of a gate.
#[derive(Debug, Clone, Copy)]
struct Activation {
    name: &'static str,
    alpha: f64,
    beta: f64,
}

/// Names of the functions, with the defaults of the parameters that they take.
const ACTIVATIONS: &[(&str, Option<f64>, Option<f64>)] = &[
    ("Relu", None, None),
    ("Tanh", None, None),
    ("Sigmoid", None, None),
    ("Softsign", None, None),
    ("Softplus", None, None),
    ("LeakyRelu", Some(0.01), None),
    ("ThresholdedRelu", Some(1.0), None),
    ("Elu", Some(1.0), None),
    ("HardSigmoid", Some(0.2), Some(0.5)),
    ("ScaledTanh", Some(1.0), Some(1.0)),
    ("Affine", Some(1.0), Some(0.0)),
];

impl Activation {
    fn apply(&self, x: f64) -> f64 {
        let Activation { name, alpha, beta } = *self;
        match name {
            "Relu" => x.max(0.0),
            "Tanh" => x.tanh(),
            "Sigmoid" => 1.0 / (1.0 + (-x).exp()),
            "Softsign" => x / (1.0 + x.abs()),
            "Softplus" => x.max(0.0) + (-x.abs()).exp().ln_1p(),
            "LeakyRelu" => {
                if x >= 0.0 {
                    x
                } else {
                    alpha * x
                }
            }
            "ThresholdedRelu" => {
                if x >= alpha {
                    x
                } else {
                    0.0
                }
            }
            "Elu" => {
                if x >= 0.0 {
                    x
                } else {
                    alpha * x.exp_m1()
                }
            }
            "HardSigmoid" => (alpha * x + beta).clamp(0.0, 1.0),
            "ScaledTanh" => alpha * (beta * x).tanh(),
            _ => alpha * x + beta,
        }
    }

    /// The functions of all directions. Parameters are handed out in order to the functions that take them.
    fn all(kind: Kind, attributes: &Attributes, directions: usize) -> Result<Vec<Activation>, OpError> {
        let defaults = kind.default_activations();
        let names: Vec<String> = match attributes.get("activations") {
            None => (0..directions).flat_map(|_| defaults.iter().map(|s| (*s).to_owned())).collect(),
            Some(Attribute::Strings(names)) => names.iter().map(|n| String::from_utf8_lossy(n).into_owned()).collect(),
            Some(_) => return Err(OpError::attribute("activations", "must be a list of strings")),
        };
        if names.len() != directions * defaults.len() {
            let problem = format!("has {} entries, expected {}", names.len(), directions * defaults.len());
            return Err(OpError::attribute("activations", problem));
        }
        let mut alphas = attributes.floats("activation_alpha")?.unwrap_or(&[]).iter();
        let mut betas = attributes.floats("activation_beta")?.unwrap_or(&[]).iter();
        let mut found = Vec::new();
        for name in names {
            let known = ACTIVATIONS.iter().find(|(known, ..)| known.eq_ignore_ascii_case(&name));
            let (known, alpha, beta) = known.ok_or_else(|| {
                let all: Vec<&str> = ACTIVATIONS.iter().map(|(name, ..)| *name).collect();
                OpError::attribute("activations", format!("has {name:?}; known are {}", all.join(", ")))
            })?;
            let take = |default: &Option<f64>, given: &mut std::slice::Iter<f32>| match default {
                Some(default) => given.next().map_or(*default, |v| f64::from(*v)),
                None => 0.0,
            };
            let (alpha, beta) = (take(alpha, &mut alphas), take(beta, &mut betas));
            found.push(Activation { name: known, alpha, beta });
        }
        Ok(found)
    }
}

/// One direction of a layer.
struct Layer<'a> {
    kind: Kind,
    inputs: usize,
    hidden: usize,
    /// `[gates * hidden, inputs]`.
    weight: &'a [f64],
    /// `[gates * hidden, hidden]`.
    recurrence: &'a [f64],
    /// Of the weight, then of the recurrence: `[2 * gates * hidden]`.
    bias: &'a [f64],
    /// Of the LSTM's input, output and forget gates: `[3 * hidden]`.
    peephole: &'a [f64],
    activations: &'a [Activation],
    clip: Option<f64>,
    linear_before_reset: bool,
    input_forget: bool,
}

impl Layer<'_> {
    fn activate(&self, function: usize, x: f64) -> f64 {
        self.activations[function].apply(self.clip.map_or(x, |clip| x.clamp(-clip, clip)))
    }

    /// `W x + b` of one element of one gate.
    fn input_sum(&self, gate: usize, unit: usize, x: &[f64]) -> f64 {
        let row = gate * self.hidden + unit;
        let weights = &self.weight[row * self.inputs..][..self.inputs];
        self.bias[row] + weights.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()
    }

    /// `R h + b` of one element of one gate.
    fn state_sum(&self, gate: usize, unit: usize, h: &[f64]) -> f64 {
        let row = gate * self.hidden + unit;
        let weights = &self.recurrence[row * self.hidden..][..self.hidden];
        self.bias[self.kind.gates() * self.hidden + row] + weights.iter().zip(h).map(|(r, h)| r * h).sum::<f64>()
    }

    /// Moves the hidden state, and the LSTM's cell, one position on.
    fn step(&self, x: &[f64], h: &mut Vec<f64>, c: &mut [f64]) {
        let sum = |gate: usize, unit: usize, h: &[f64]| self.input_sum(gate, unit, x) + self.state_sum(gate, unit, h);
        let units = 0..self.hidden;
        let next: Vec<f64> = match self.kind {
            Kind::Rnn => units.map(|u| self.activate(0, sum(0, u, h))).collect(),
            Kind::Gru => {
                let update: Vec<f64> = units.clone().map(|u| self.activate(0, sum(0, u, h))).collect();
                let reset: Vec<f64> = units.clone().map(|u| self.activate(0, sum(1, u, h))).collect();
                let shown: Vec<f64> = reset.iter().zip(&*h).map(|(r, h)| r * h).collect();
                let candidate = |u: usize| {
                    let state = match self.linear_before_reset {
                        true => reset[u] * self.state_sum(2, u, h),
                        false => self.state_sum(2, u, &shown),
                    };
                    self.activate(1, self.input_sum(2, u, x) + state)
                };
                units.map(|u| (1.0 - update[u]) * candidate(u) + update[u] * h[u]).collect()
            }
            Kind::Lstm => {
                let peephole = |gate: usize, unit: usize| self.peephole[gate * self.hidden + unit];
                units
                    .map(|u| {
                        let input = self.activate(0, sum(0, u, h) + peephole(0, u) * c[u]);
                        let forget = match self.input_forget {
                            true => 1.0 - input,
                            false => self.activate(0, sum(2, u, h) + peephole(2, u) * c[u]),
                        };
                        c[u] = forget * c[u] + input * self.activate(1, sum(3, u, h));
                        let output = self.activate(0, sum(1, u, h) + peephole(1, u) * c[u]);
                        output * self.activate(2, c[u])
                    })
                    .collect()
            }
        };
        *h = next;
    }
}

/// The elements of an optional operand of a known shape; zeros where it is left out.
fn operand(cx: &Eval, index: usize, shape: &[usize], what: &str) -> Result<Vec<f64>, OpError> {
    match cx.optional(index) {
        Some(tensor) => {
            expect_shape(tensor, shape, what)?;
            Ok(tensor.to_f64()?)
        }
        None => filled(shape, 0.0),
    }
}

fn eval_recurrent(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (kind, attributes) = (Kind::of(&cx.view), cx.attributes());
    let (x, recurrence) = (cx.input(0)?, cx.input(2)?);
    let ([first, second, inputs], [_, _, hidden]) = (x.shape(), recurrence.shape()) else {
        let message = format!("sequences {:?} with a recurrence weight {:?}", x.shape(), recurrence.shape());
        return Err(OpError::shape(message));
    };
    let batch_first = attributes.flag("layout", false)?;
    let (length, batch) = if batch_first { (*second, *first) } else { (*first, *second) };
    let (inputs, hidden, gates) = (*inputs, *hidden, kind.gates());
    let ways = directions(attributes)?;
    let count = ways.len();
    let weight = cx.input(1)?;
    expect_shape(weight, &[count, gates * hidden, inputs], "the weight")?;
    expect_shape(recurrence, &[count, gates * hidden, hidden], "the recurrence weight")?;
    let (weight, recurrence) = (weight.to_f64()?, recurrence.to_f64()?);
    let bias = operand(cx, 3, &[count, 2 * gates * hidden], "the bias")?;
    let peephole = if kind == Kind::Lstm { operand(cx, 7, &[count, 3 * hidden], "the peephole")? } else { vec![] };
    let lengths = match cx.optional(4) {
        Some(lengths) => {
            expect_shape(lengths, &[batch], "the lengths")?;
            let lengths = lengths.to_i64()?.into_iter().map(|n| {
                let n = usize::try_from(n).ok().filter(|n| *n <= length);
                n.ok_or_else(|| OpError::value(format!("a length beyond the {length} positions")))
            });
            lengths.collect::<Result<Vec<_>, _>>()?
        }
        None => vec![length; batch],
    };
    let state_shape = if batch_first { vec![batch, count, hidden] } else { vec![count, batch, hidden] };
    let state_at = |d: usize, b: usize| if batch_first { (b * count + d) * hidden } else { (d * batch + b) * hidden };
    let mut h_all = operand(cx, 5, &state_shape, "the initial hidden state")?;
    let mut c_all =
        if kind == Kind::Lstm { operand(cx, 6, &state_shape, "the initial cell")? } else { filled(&state_shape, 0.0)? };
    let functions = Activation::all(kind, attributes, count)?;
    let per_direction = functions.len() / count;
    let clip = attributes.optional_float("clip")?.map(f64::from);
    if clip.is_some_and(|clip| clip.is_nan() || clip < 0.0) {
        return Err(OpError::attribute("clip", "must not be negative"));
    }
    let y_shape = if batch_first { [batch, length, count, hidden] } else { [length, count, batch, hidden] };
    let mut y = filled(&y_shape, 0.0)?;
    let values = x.to_f64()?;
    for (d, reverse) in ways.iter().enumerate() {
        let layer = Layer {
            kind,
            inputs,
            hidden,
            weight: &weight[d * gates * hidden * inputs..][..gates * hidden * inputs],
            recurrence: &recurrence[d * gates * hidden * hidden..][..gates * hidden * hidden],
            bias: &bias[d * 2 * gates * hidden..][..2 * gates * hidden],
            peephole: peephole.get(d * 3 * hidden..(d + 1) * 3 * hidden).unwrap_or(&[]),
            activations: &functions[d * per_direction..(d + 1) * per_direction],
            clip,
            linear_before_reset: attributes.flag("linear_before_reset", false)?,
            input_forget: attributes.flag("input_forget", false)?,
        };
        for b in 0..batch {
            let at = state_at(d, b);
            let mut h = h_all[at..at + hidden].to_vec();
            for i in 0..lengths[b] {
                let t = if *reverse { lengths[b] - 1 - i } else { i };
                let row = if batch_first { b * length + t } else { t * batch + b };
                layer.step(&values[row * inputs..][..inputs], &mut h, &mut c_all[at..at + hidden]);
                let out = if batch_first { (row * count + d) * hidden } else { ((t * count + d) * batch + b) * hidden };
                y[out..out + hidden].copy_from_slice(&h);
            }
            h_all[at..at + hidden].copy_from_slice(&h);
        }
    }
    Ok(vec![
        Tensor::from_f64(x.dtype(), &y_shape, &y)?,
        Tensor::from_f64(x.dtype(), &state_shape, &h_all)?,
        Tensor::from_f64(x.dtype(), &state_shape, &c_all)?,
    ])
}

/// Two for each weight at each position of each example; the gates' own arithmetic is small beside that.
fn recurrent_flops(shapes: &Shapes) -> u64 {
    let steps: u64 = match shapes.inputs.first() {
        Some(Some((_, x))) => x.iter().take(2).map(|d| *d as u64).product(),
        _ => 0,
    };
    2 * steps * (shapes.input_len(1) + shapes.input_len(2))
}
