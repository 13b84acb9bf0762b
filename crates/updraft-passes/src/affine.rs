//! Folds what follows a linear layer into its weights: additions of constants, and batch normalisation.
//!
//! A linear layer here is a node `y = W x + b` whose output channels lie along one known axis: Conv, ConvTranspose,
//! Gemm. Scaling its channels by `f` and shifting them by `s` makes it the layer with weights `f W` and bias `f b + s`.

use updraft_graph::op::OpError;
use updraft_graph::{Attributes, Graph, Node, NodeId, Tensor, ValueId};

use crate::rewrite::{FixedNames, constant};
use crate::{Pass, PassError, Promise, Report};

/// Turns matrix products followed by a vector into Gemm, and additions of constants into biases.
///
/// A sum rounds once less or in another order, which is a few units in the last place of a layer's largest term; the
/// tolerance leaves a thousand such steps.
pub const MERGE_BIAS: Pass = Pass { name: "merge bias", promise: Promise::Within(1e-4), rewrite: merge_bias };

/// Folds BatchNormalization into the linear layer before it.
///
/// Each weight is rounded once more, so a layer's output moves by a few units in the last place of its largest term;
/// the tolerance leaves a thousand such steps.
pub const FOLD_BATCH_NORM: Pass =
    Pass { name: "fold batch norm", promise: Promise::Within(1e-4), rewrite: fold_batch_norm };

fn merge_bias(graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
    let names = FixedNames::of(graph);
    for id in graph.order()? {
        let node = graph.node(id);
        if node.op != "Add" || !node.domain.is_empty() {
            continue;
        }
        let [Some(a), Some(b)] = node.inputs[..] else { continue };
        for (product, bias) in [(a, b), (b, a)] {
            let Some(before) = only_reader(graph, &names, product, id) else { continue };
            let kind = graph.node(before).op.as_str();
            let merged = match kind {
                "MatMul" if graph.node(before).domain.is_empty() => gemm(graph, before, bias)?,
                _ => match channel_vector(graph, product, bias, before) {
                    Some(shift) => {
                        Layer::of(graph, before)?.map(|layer| layer.affine(graph, None, &shift)).transpose()?
                    }
                    None => None,
                },
            };
            if let Some(merged) = merged {
                put(graph, merged, &[before, id], report)?;
                break;
            }
        }
    }
    Ok(())
}

fn fold_batch_norm(graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
    let names = FixedNames::of(graph);
    for id in graph.order()? {
        let node = graph.node(id).clone();
        if node.op != "BatchNormalization" || !node.domain.is_empty() || node.attributes.flag("training_mode", false)? {
            continue;
        }
        let operand = |index: usize| node.inputs.get(index).copied().flatten();
        let Some(x) = operand(0) else { continue };
        let statistics: Option<Vec<&Tensor>> = (1..5).map(|i| operand(i).and_then(|v| constant(graph, v))).collect();
        let Some(statistics) = statistics else {
            report.refuse(graph, id, "its statistics are not constant");
            continue;
        };
        let Some(before) = only_reader(graph, &names, x, id) else {
            report.refuse(graph, id, "what it normalises is read elsewhere, or is an input");
            continue;
        };
        let Some(layer) = Layer::of(graph, before)? else {
            report.refuse(graph, id, format!("{} before it is not a layer of constant weights", graph.node(before).op));
            continue;
        };
        let numbers: Vec<Vec<f64>> =
            statistics.iter().map(|t| t.to_f64()).collect::<Result<_, _>>().map_err(OpError::from)?;
        let [scale, bias, mean, variance] = &numbers[..] else { continue };
        if numbers.iter().any(|n| n.len() != layer.channels) {
            report.refuse(graph, id, "its statistics do not have one number a channel of the layer before");
            continue;
        }
        let epsilon = f64::from(node.attributes.float("epsilon", 1e-5)?);
        let factor: Vec<f64> = scale.iter().zip(variance).map(|(s, v)| s / (v + epsilon).sqrt()).collect();
        let shift: Vec<f64> = (0..layer.channels).map(|c| bias[c] - mean[c] * factor[c]).collect();
        let merged = layer.affine(graph, Some(&factor), &shift)?;
        put(graph, merged, &[before, id], report)?;
    }
    Ok(())
}

/// A linear layer of constant weights.
struct Layer {
    node: Node,
    weights: Tensor,
    bias: Option<Tensor>,
    channels: usize,
    /// The output channel of each element of the weights is `(i / inner % axis) + group * axis`, for an axis of this
    /// size with this many elements inside it, where the outermost axis consists of `groups` equal blocks.
    axis: usize,
    inner: usize,
    groups: usize,
}

impl Layer {
    fn of(graph: &Graph, id: NodeId) -> Result<Option<Layer>, PassError> {
        let node = graph.node(id).clone();
        if !node.domain.is_empty() {
            return Ok(None);
        }
        let operand = |index: usize| node.inputs.get(index).copied().flatten();
        let Some(weights) = operand(1).and_then(|v| constant(graph, v)).filter(|t| t.dtype().is_float()).cloned()
        else {
            return Ok(None);
        };
        let bias = match operand(2) {
            None => None,
            Some(bias) => match constant(graph, bias) {
                Some(tensor) => Some(tensor.clone()),
                None => return Ok(None),
            },
        };
        let shape = weights.shape();
        let window = |axis: usize| shape.iter().skip(axis + 1).product::<usize>();
        let (channels, axis, inner, groups) = match node.op.as_str() {
            "Conv" if shape.len() > 2 => (shape[0], shape[0], window(0), 1),
            "ConvTranspose" if shape.len() > 2 => {
                let groups = usize::try_from(node.attributes.int("group", 1)?).unwrap_or(0).max(1);
                (shape[1] * groups, shape[1], window(1), groups)
            }
            "Gemm" if shape.len() == 2 => {
                let axis = usize::from(!node.attributes.flag("transB", false)?);
                (shape[axis], shape[axis], window(axis), 1)
            }
            _ => return Ok(None),
        };
        // Gemm's bias may be anything that broadcasts; only a vector of channels is one number a channel.
        let fits = |b: &Tensor| b.len() == channels && b.shape().last() == Some(&channels);
        if bias.as_ref().is_some_and(|b| !fits(b)) {
            return Ok(None);
        }
        Ok(Some(Layer { node, weights, bias, channels, axis, inner, groups }))
    }

    /// The layer's node with its channels multiplied by `factor` and then shifted by `shift`.
    fn affine(mut self, graph: &mut Graph, factor: Option<&[f64]>, shift: &[f64]) -> Result<Node, PassError> {
        let dtype = self.weights.dtype();
        let is_gemm = self.node.op == "Gemm";
        let beta = if is_gemm { f64::from(self.node.attributes.float("beta", 1.0)?) } else { 1.0 };
        let old = match &self.bias {
            Some(bias) => bias.to_f64().map_err(OpError::from)?,
            None => vec![0.0; self.channels],
        };
        let factor_of = |channel: usize| factor.map_or(1.0, |f| f[channel]);
        let bias: Vec<f64> = (0..self.channels).map(|c| beta * old[c] * factor_of(c) + shift[c]).collect();
        let bias = Tensor::from_f64(dtype, &[self.channels], &bias).map_err(OpError::from)?;
        let stem = |v: Option<ValueId>| v.map_or("bias".to_owned(), |v| graph.value(v).name.clone());
        let (weights_name, bias_name) = (stem(self.node.inputs[1]), stem(self.node.inputs.get(2).copied().flatten()));
        if factor.is_some() {
            let mut weights = self.weights.to_f64().map_err(OpError::from)?;
            let block = (weights.len() / self.groups).max(1);
            for (i, w) in weights.iter_mut().enumerate() {
                *w *= factor_of(i / self.inner % self.axis + i / block * self.axis % self.channels);
            }
            let weights = Tensor::from_f64(dtype, self.weights.shape(), &weights).map_err(OpError::from)?;
            self.node.inputs[1] = Some(graph.add_constant(&weights_name, weights));
        }
        self.node.inputs.resize(3, None);
        self.node.inputs[2] = Some(graph.add_constant(&bias_name, bias));
        if is_gemm {
            self.node.attributes.remove("beta");
        }
        Ok(self.node)
    }
}

/// `x [M, K] w [K, N] + b [N]` as one node.
fn gemm(graph: &Graph, product: NodeId, bias: ValueId) -> Result<Option<Node>, PassError> {
    let node = graph.node(product);
    let [Some(x), Some(w)] = node.inputs[..] else { return Ok(None) };
    let (Some(x_shape), Some(w_shape), Some(bias_shape)) = (graph.shape(x), graph.shape(w), graph.shape(bias)) else {
        return Ok(None);
    };
    let fits = matches!((x_shape, w_shape, bias_shape), ([_, _], [_, n], [b]) if n.same(b));
    let float = graph.dtype(x).is_some_and(|d| d.is_float());
    Ok((fits && float).then(|| Node {
        op: "Gemm".to_owned(),
        inputs: vec![Some(x), Some(w), Some(bias)],
        attributes: Attributes::new(),
        ..node.clone()
    }))
}

/// The elements of a constant that adds one number to each channel of what `layer` makes.
fn channel_vector(graph: &Graph, product: ValueId, bias: ValueId, layer: NodeId) -> Option<Vec<f64>> {
    let tensor = constant(graph, bias)?;
    let rank = graph.shape(product)?.len();
    let channel_axis = if graph.node(layer).op == "Gemm" { rank - 1 } else { 1 };
    let channels = graph.shape(product)?.get(channel_axis)?.known()?;
    // A constant of higher rank would make the sum larger than the layer's output.
    let lead = rank.checked_sub(tensor.rank())?;
    let is_vector =
        tensor.shape().iter().enumerate().all(|(i, n)| *n == if lead + i == channel_axis { channels } else { 1 });
    if !is_vector || lead > channel_axis {
        return None;
    }
    tensor.to_f64().ok()
}

/// The node that makes `value`, if `reader` is all that reads it.
fn only_reader(graph: &Graph, names: &FixedNames, value: ValueId, reader: NodeId) -> Option<NodeId> {
    let (producer, _) = graph.value(value).producer()?;
    let alone = graph.value(value).consumers() == [reader] && !names.contains(graph, value);
    alone.then_some(producer)
}

/// Puts one node in the place of a chain: it makes what the last of the chain made.
fn put(graph: &mut Graph, mut merged: Node, chain: &[NodeId], report: &mut Report) -> Result<(), PassError> {
    let labels: Vec<String> = chain.iter().map(|id| graph.node(*id).label(graph)).collect();
    let removed: Vec<Node> = chain.iter().filter_map(|id| graph.remove_node(*id)).collect();
    let output = removed.last().and_then(|n| n.outputs.first().copied().flatten());
    merged.outputs = vec![output];
    graph.add_node(merged)?;
    report.change(labels.join(" + "));
    Ok(())
}
