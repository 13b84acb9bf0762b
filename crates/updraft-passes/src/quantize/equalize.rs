//! Cross-layer equalization: channels of neighbouring layers get weights of like magnitude, and the network means what it
//! meant.
//!
//! Dividing channel `i` of a layer by `t` and multiplying what the next layer makes of it by `t` changes nothing, if what
//! lies between gives `t f(x)` for `t x`. With `t` the root of the ratio of the largest weights on both sides, both become
//! equally large. Nagel et al., *Data-free quantization through weight equalization and bias correction* (2019,
//! arXiv:1906.04721).

use std::collections::BTreeMap;

use updraft_graph::op::OpError;
use updraft_graph::{Graph, Node, NodeId, Tensor, ValueId};

use super::kind::weights_of;
use crate::rewrite::{FixedNames, constant};
use crate::{Pass, PassError, Promise, Report};

/// Equalizes all pairs of layers with one path between them.
///
/// Each weight is rounded once more on either side, as are the values between; the tolerance leaves a thousand such steps.
pub const EQUALIZE: Pass = Pass { name: "equalize", promise: Promise::Within(1e-4), rewrite: equalize };

/// Rounds over all pairs at most: a chain of layers settles from both ends.
const ROUNDS_MAX: usize = 50;

/// A pair of layers is settled when no channel moves by more than this share.
const SETTLED: f64 = 1e-3;

fn equalize(graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
    let pairs = pairs(graph, report)?;
    let mut numbers: BTreeMap<(NodeId, usize), Vec<f64>> = BTreeMap::new();
    for id in pairs.iter().flat_map(|p| [p.first.node, p.second.node]) {
        for index in [1, 2] {
            if let Some(tensor) = constant_input(graph, id, index) {
                numbers.insert((id, index), tensor.to_f64().map_err(OpError::from)?);
            }
        }
    }
    for _ in 0..ROUNDS_MAX {
        let mut largest = 0f64;
        for pair in &pairs {
            largest = largest.max(pair.balance(&mut numbers));
        }
        if largest <= SETTLED {
            break;
        }
    }
    // Weights may be shared with others, which keep theirs.
    for ((id, index), numbers) in numbers {
        let Some(old) = graph.node(id).inputs.get(index).copied().flatten() else { continue };
        let Some(tensor) = constant(graph, old) else { continue };
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        let tensor = Tensor::from_f64(dtype, &shape, &numbers).map_err(OpError::from)?;
        let name = graph.value(old).name.clone();
        let new = graph.add_constant(&name, tensor);
        graph.set_node_input(id, index, Some(new));
    }
    for pair in &pairs {
        let [first, second] = [&pair.first, &pair.second].map(|l| graph.node(l.node).label(graph));
        report.change(format!("{first} and {second}"));
    }
    graph.prune()?;
    Ok(())
}

/// One side of a pair: how channels lie in a layer's weights. Element `i` belongs to channel `i / inner % axis / repeat`.
struct Side {
    node: NodeId,
    axis: usize,
    inner: usize,
    repeat: usize,
}

/// Two layers with one path between them.
struct Pair {
    first: Side,
    second: Side,
    channels: usize,
}

impl Side {
    fn channel(&self, i: usize) -> usize {
        i / self.inner % self.axis / self.repeat
    }

    fn largest(&self, weights: &[f64], channels: usize) -> Vec<f64> {
        let mut largest = vec![0f64; channels];
        for (i, w) in weights.iter().enumerate() {
            let at = self.channel(i);
            largest[at] = largest[at].max(w.abs());
        }
        largest
    }

    fn scale(&self, weights: &mut [f64], factors: &[f64]) {
        weights.iter_mut().enumerate().for_each(|(i, w)| *w *= factors[self.channel(i)]);
    }
}

impl Pair {
    /// Makes both sides alike and returns by how much the channel that moved most did.
    fn balance(&self, numbers: &mut BTreeMap<(NodeId, usize), Vec<f64>>) -> f64 {
        let largest = |side: &Side, numbers: &BTreeMap<(NodeId, usize), Vec<f64>>| {
            numbers.get(&(side.node, 1)).map_or(Vec::new(), |w| side.largest(w, self.channels))
        };
        let (before, after) = (largest(&self.first, numbers), largest(&self.second, numbers));
        // A channel that is not made or not read has nothing to share.
        let ratio = |(a, b): (&f64, &f64)| if *a > 0.0 && *b > 0.0 { (a / b).sqrt() } else { 1.0 };
        let factors: Vec<f64> = before.iter().zip(&after).map(ratio).collect();
        let inverse: Vec<f64> = factors.iter().map(|t| 1.0 / t).collect();
        if let Some(weights) = numbers.get_mut(&(self.first.node, 1)) {
            self.first.scale(weights, &inverse);
        }
        if let Some(bias) = numbers.get_mut(&(self.first.node, 2)) {
            bias.iter_mut().zip(&inverse).for_each(|(b, t)| *b *= t);
        }
        if let Some(weights) = numbers.get_mut(&(self.second.node, 1)) {
            self.second.scale(weights, &factors);
        }
        factors.iter().fold(0f64, |m, t| m.max((t - 1.0).abs()))
    }
}

fn constant_input(graph: &Graph, id: NodeId, index: usize) -> Option<&Tensor> {
    constant(graph, graph.node(id).inputs.get(index).copied().flatten()?)
}

fn pairs(graph: &Graph, report: &mut Report) -> Result<Vec<Pair>, PassError> {
    let names = FixedNames::of(graph);
    let mut pairs = Vec::new();
    for id in graph.order()? {
        let Some(first) = outputs_of(graph, id) else { continue };
        let (channels, mut repeat) = (first.axis, 1);
        let mut at = id;
        let refusal = loop {
            let [Some(v)] = graph.node(at).outputs[..] else { break "it makes more than one value".to_owned() };
            if names.contains(graph, v) {
                break "what it makes is an output".to_owned();
            }
            let [reader] = graph.value(v).consumers() else { break "what it makes is read more than once".to_owned() };
            let node = graph.node(*reader);
            if let Some(second) = inputs_of(graph, *reader, v, repeat) {
                if second.axis / second.repeat != channels {
                    break format!("{} does not read as many channels", node.label(graph));
                }
                pairs.push(Pair { first, second, channels });
                break String::new();
            }
            match passes_factors(graph, node, v) {
                Some(more) => repeat *= more,
                None => break format!("{} lies behind it", node.label(graph)),
            }
            at = *reader;
        };
        if !refusal.is_empty() {
            report.refuse(graph, id, refusal);
        }
    }
    Ok(pairs)
}

/// How the output channels of a layer lie in its weights.
fn outputs_of(graph: &Graph, id: NodeId) -> Option<Side> {
    let node = layer(graph, id)?;
    let (v, axis) = weights_of(graph, node)?;
    let shape = constant(graph, v)?.shape();
    let axis = axis?;
    // The bias must go with its channels.
    let bias = node.inputs.get(2).copied().flatten();
    let fits = bias.is_none_or(|b| constant(graph, b).is_some_and(|t| t.shape() == [shape[axis]]));
    (fits && node.op != "ConvTranspose").then(|| side(id, shape, axis, 1))
}

/// How the channels of `v`, `repeat` elements each, lie in the weights of a layer that reads it.
fn inputs_of(graph: &Graph, id: NodeId, v: ValueId, repeat: usize) -> Option<Side> {
    let node = layer(graph, id)?;
    let (weights, outputs) = weights_of(graph, node)?;
    let shape = constant(graph, weights)?.shape();
    let reads = node.inputs.first().copied().flatten() == Some(v);
    let group = node.attributes.int("group", 1).ok()?;
    let axis = match node.op.as_str() {
        "Conv" if group == 1 => 1,
        // A channel of its own for each channel.
        "Conv" if shape[1] == 1 && group == shape[0] as i64 => 0,
        "Gemm" if !node.attributes.flag("transA", false).ok()? => 1 - outputs?,
        _ => return None,
    };
    (reads && shape[axis].is_multiple_of(repeat)).then(|| side(id, shape, axis, repeat))
}

fn layer(graph: &Graph, id: NodeId) -> Option<&Node> {
    let node = graph.node(id);
    let plain = node.attributes.float("alpha", 1.0).ok()? == 1.0 && node.attributes.float("beta", 1.0).ok()? == 1.0;
    let floats = constant_input(graph, id, 1)?.dtype().is_float();
    (matches!(node.op.as_str(), "Conv" | "Gemm") && node.domain.is_empty() && plain && floats).then_some(node)
}

fn side(node: NodeId, shape: &[usize], axis: usize, repeat: usize) -> Side {
    Side { node, axis: shape[axis], inner: shape[axis + 1..].iter().product::<usize>().max(1), repeat }
}

/// Elements that each channel becomes, where the operator gives `t f(x)` for channels `t x` and keeps them apart.
fn passes_factors(graph: &Graph, node: &Node, v: ValueId) -> Option<usize> {
    let reads = node.inputs.first().copied().flatten() == Some(v) && node.domain.is_empty();
    match node.op.as_str() {
        _ if !reads => None,
        "Relu" | "LeakyRelu" | "MaxPool" | "AveragePool" | "GlobalAveragePool" | "GlobalMaxPool" | "Identity" => {
            Some(1)
        }
        "Flatten" if node.attributes.int("axis", 1).ok()? == 1 => {
            let shape = graph.shape(v)?.get(2..)?;
            shape.iter().map(|d| d.known()).product()
        }
        _ => None,
    }
}
