//! Training with quantization in the loop: from pairs of QuantizeLinear and DequantizeLinear to fake quantization, which
//! has a gradient, and back.
//!
//! What is trained is floats: weights before they are rounded, biases, and the step size of every scale (Esser et al.,
//! "Learned step size quantization", arXiv:1902.08153). The forward pass computes what the quantized graph computes, so
//! the loss sees the rounding; biases alone are not rounded, as 32 bits leave nothing to see. A graph in this form is
//! one like any other: the training loop, its checkpoints and its evaluation know nothing of it.

use std::collections::{BTreeMap, HashMap};

use updraft_graph::op::OpError;
use updraft_graph::op::quant::fake::STEP_MIN;
use updraft_graph::{DType, Graph, Node, NodeId, Tensor, UPDRAFT_DOMAIN, ValueId, ValueType};

use super::insert::{bias_scales_of, dequantize, make_room_for_bias};
use super::quantizer::{Quantizer, QuantizerError, levels};
use crate::rewrite::constant;
use crate::{PassError, Report};

/// Makes a graph trainable that [`insert`](super::insert) has quantized.
///
/// `float` is the graph before quantization, whose weights are closer to what was trained than their codes are; weights
/// that it does not have begin as what their codes stand for. `weight_levels` are the lowest and the highest code of
/// weights, where fewer are used than their type has.
///
/// # Errors
/// A graph without quantized values, and quantization in forms that `insert` does not write.
pub fn trainable(
    graph: &mut Graph,
    float: Option<&Graph>,
    weight_levels: Option<(i32, i32)>,
    report: &mut Report,
) -> Result<(), PassError> {
    graph.opsets.entry(UPDRAFT_DOMAIN.to_owned()).or_insert(1);
    let mut grids: HashMap<ValueId, Grid> = HashMap::new();
    let mut masters: HashMap<ValueId, ValueId> = HashMap::new();
    let dequantizers: Vec<NodeId> =
        graph.order()?.into_iter().filter(|id| is_onnx(graph.node(*id), "DequantizeLinear")).collect();
    let joined: HashMap<NodeId, ValueId> =
        dequantizers.iter().filter_map(|id| Some((*id, scale_of_group(graph, *id)?))).collect();
    for id in &dequantizers {
        let node = graph.node(*id).clone();
        let label = node.label(graph);
        let refuse = |problem: &str| PassError::Node { node: label.clone(), source: OpError::unsupported(problem) };
        let [Some(codes), Some(scale)] = [0, 1].map(|i| node.inputs.get(i).copied().flatten()) else {
            return Err(refuse("DequantizeLinear without a scale"));
        };
        let zero = node.inputs.get(2).copied().flatten();
        if node.attributes.get("block_size").is_some() {
            return Err(refuse("training with scales of blocks"));
        }
        let source = match (constant(graph, codes), graph.value(codes).producer()) {
            (Some(stored), _) => {
                let stored = stored.clone();
                match masters.get(&codes) {
                    Some(master) => *master,
                    None => {
                        let numbers = master(graph, &node, &stored, float).map_err(|e| refuse(&e.to_string()))?;
                        let name = base_name(graph, codes).to_owned();
                        let made = graph.add_constant(&name, numbers);
                        masters.insert(codes, made);
                        made
                    }
                }
            }
            (None, Some((quantizer, _))) if is_onnx(graph.node(quantizer), "QuantizeLinear") => {
                let other = graph.node(quantizer);
                let operand = |i: usize| other.inputs.get(i).copied().flatten();
                match operand(0) {
                    Some(x) if operand(1) == Some(scale) && operand(2) == zero => x,
                    _ => return Err(refuse("a pair whose nodes have different scales or zero points")),
                }
            }
            _ => return Err(refuse("DequantizeLinear of what is neither constant nor quantized beside it")),
        };
        let Some(output) = node.outputs.first().copied().flatten() else { continue };
        graph.remove_node(*id);
        // Biases are not rounded, but for the last time.
        if graph.dtype(codes) == Some(DType::I32) {
            replace_output(graph, output, source)?;
            report.change(format!("{label} is trained as floats"));
            continue;
        }
        let is_weights = constant(graph, codes).is_some();
        let scale = joined.get(id).copied().unwrap_or(scale);
        let grid = match grids.get(&scale) {
            Some(grid) => *grid,
            None => {
                let grid = Grid::new(graph, scale, zero, graph.dtype(codes)).map_err(|e| refuse(&e.to_string()))?;
                grids.insert(scale, grid);
                grid
            }
        };
        let mut attributes = node.attributes.clone();
        attributes.set("per_sample", i64::from(!is_weights));
        if let Some((low, high)) = weight_levels.filter(|_| is_weights && graph.dtype(codes) != Some(DType::U8)) {
            attributes.set("low", i64::from(low));
            attributes.set("high", i64::from(high));
        }
        graph.add_node(Node {
            name: node.name.trim_end_matches("/dequantize").to_owned(),
            domain: UPDRAFT_DOMAIN.to_owned(),
            op: "FakeQuantize".to_owned(),
            inputs: [source, grid.unit, grid.step, grid.zero].map(Some).to_vec(),
            outputs: vec![Some(output)],
            attributes,
            ..Node::default()
        })?;
        report.change(format!("{label} is fake quantization"));
    }
    if grids.is_empty() {
        let problem = "has no quantized values; quantize the graph first".to_owned();
        return Err(PassError::Option { option: "model", problem });
    }
    graph.prune()?;
    Ok(())
}

/// Writes a trained graph as [`insert`](super::insert) would: weights and biases as codes, pairs around what runs on
/// integers.
pub fn quantized(graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
    let fakes: Vec<NodeId> = graph.order()?.into_iter().filter(|id| is_fake(graph.node(*id))).collect();
    let mut quantizers: BTreeMap<NodeId, Quantizer> = BTreeMap::new();
    for id in &fakes {
        quantizers.insert(*id, trained_quantizer(graph, *id)?);
    }
    // Before weights are rounded: a large bias makes their steps coarser.
    let mut biases = Vec::new();
    for id in graph.order()? {
        let Some(bias) = LayerBias::of(graph, id) else { continue };
        let Some(input_scale) = quantizers.get(&bias.input).and_then(|q| q.scales.first().copied()) else { continue };
        let Some(weights) = quantizers.get_mut(&bias.weights) else { continue };
        let numbers = bias.numbers(graph)?;
        make_room_for_bias(weights, input_scale, &numbers, bias.products);
        biases.push((id, bias, input_scale, numbers));
    }
    for (id, bias, input_scale, numbers) in biases {
        let quantizer = quantizers.get(&bias.weights).and_then(|q| bias_scales_of(q, input_scale, numbers.len()));
        let Some(quantizer) = quantizer else { continue };
        let tensor = Tensor::vector(&numbers);
        let made = store(graph, bias.value, &tensor, &quantizer)?;
        graph.set_node_input(id, 2, Some(made));
    }
    let mut scales: HashMap<(ValueId, ValueId), (ValueId, ValueId)> = HashMap::new();
    for id in fakes {
        let Some(quantizer) = quantizers.remove(&id) else { continue };
        let node = graph.node(id).clone();
        let [Some(x), Some(unit), Some(step)] = [0, 1, 2].map(|i| node.inputs.get(i).copied().flatten()) else {
            continue;
        };
        let Some(output) = node.outputs.first().copied().flatten() else { continue };
        report.change(format!("{} is quantized", node.label(graph)));
        graph.remove_node(id);
        if let Some(tensor) = constant(graph, x).cloned() {
            let made = store(graph, x, &tensor, &quantizer)?;
            replace_output(graph, output, made)?;
            continue;
        }
        let name = graph.value(x).name.clone();
        let (scale, zero) = match scales.get(&(unit, step)) {
            Some(made) => *made,
            None => {
                let shape = graph.known_shape(x).unwrap_or_default();
                let (scale, zero) = quantizer.operands(&shape).map_err(|e| wrong(graph, x, e))?;
                let stem = graph.value(unit).name.trim_end_matches(UNIT).to_owned();
                let made = (
                    graph.add_constant(&format!("{stem}_scale"), scale),
                    graph.add_constant(&format!("{stem}_zero_point"), zero),
                );
                scales.insert((unit, step), made);
                made
            }
        };
        let codes = graph.fresh_value(&format!("{name}_quantized"), ValueType::Unknown);
        graph.add_node(Node {
            op: "QuantizeLinear".to_owned(),
            inputs: vec![Some(x), Some(scale), Some(zero)],
            outputs: vec![Some(codes)],
            ..Node::default()
        })?;
        graph.add_node(Node {
            op: "DequantizeLinear".to_owned(),
            inputs: vec![Some(codes), Some(scale), Some(zero)],
            outputs: vec![Some(output)],
            ..Node::default()
        })?;
    }
    graph.prune()?;
    Ok(())
}

fn wrong(graph: &Graph, value: ValueId, error: QuantizerError) -> PassError {
    PassError::value(graph, value, format!("cannot be quantized: {error}"))
}

fn is_onnx(node: &Node, op: &str) -> bool {
    node.domain.is_empty() && node.op == op
}

fn is_fake(node: &Node) -> bool {
    node.domain == UPDRAFT_DOMAIN && node.op == "FakeQuantize"
}

/// Lets all that reads the output of a removed node read `by`; a graph output keeps its name through a node of its own.
fn replace_output(graph: &mut Graph, output: ValueId, by: ValueId) -> Result<(), PassError> {
    if graph.outputs().contains(&output) {
        graph.add_node(Node {
            op: "Identity".to_owned(),
            inputs: vec![Some(by)],
            outputs: vec![Some(output)],
            ..Node::default()
        })?;
    } else {
        graph.replace_uses(output, by);
    }
    Ok(())
}

/// What the names of codes end with beside those of the floats that they are made from.
const CODES: &str = "_quantized";

/// What the names of units end with.
const UNIT: &str = "_unit";

/// The name of the floats that are stored as these codes.
fn base_name(graph: &Graph, codes: ValueId) -> &str {
    let name = graph.value(codes).name.as_str();
    name.rfind(CODES).map_or(name, |at| &name[..at])
}

/// The floats that training starts from in place of stored codes.
fn master(graph: &Graph, node: &Node, stored: &Tensor, float: Option<&Graph>) -> Result<Tensor, OpError> {
    let codes = node.inputs.first().copied().flatten().ok_or_else(|| OpError::value("codes are missing"))?;
    let name = base_name(graph, codes);
    let known = float.and_then(|float| constant(float, float.find(name)?)).filter(|t| t.dtype() == DType::F32);
    // Only biases change their shape on the way, to that of a vector.
    if let Some(known) = known.filter(|t| t.shape() == stored.shape() || stored.shape() == [t.len()]) {
        return Ok(known.reshaped(stored.shape())?);
    }
    let operand = |i: usize| node.inputs.get(i).copied().flatten().and_then(|v| constant(graph, v));
    let scale = operand(1).ok_or_else(|| OpError::unsupported("a scale that is not constant"))?;
    let axis =
        (scale.len() > 1).then(|| updraft_graph::op::resolve_axis(node.attributes.int("axis", 1)?, stored.rank()));
    let count = scale.len();
    let zero_points = match operand(2) {
        Some(zero) => zero.to_i64()?.into_iter().map(|z| z as i32).collect(),
        None => vec![0; count],
    };
    let quantizer = Quantizer {
        dtype: stored.dtype(),
        axis: axis.transpose()?,
        block: None,
        scales: scale.cast(DType::F32)?.as_slice::<f32>()?.to_vec(),
        zero_points,
        levels: levels(stored.dtype()).map_err(|e| OpError::value(e.to_string()))?,
    };
    quantizer.dequantize(stored).map_err(|e| OpError::value(e.to_string()))
}

/// The scale that a stored constant must share: where it is joined to computed values, theirs.
fn scale_of_group(graph: &Graph, id: NodeId) -> Option<ValueId> {
    let operand = |node: &Node, i: usize| node.inputs.get(i).copied().flatten();
    let node = graph.node(id);
    let own = constant(graph, operand(node, 1)?)?;
    constant(graph, operand(node, 0)?)?;
    let output = node.outputs.first().copied().flatten()?;
    let joins = graph.value(output).consumers().iter().filter(|id| is_onnx(graph.node(**id), "Concat"));
    let read_there = joins.flat_map(|id| graph.node(*id).inputs.iter().flatten());
    let pairs = read_there.filter_map(|v| Some(graph.node(graph.value(*v).producer()?.0)));
    let computed = pairs.filter(|n| operand(n, 0).is_some_and(|codes| constant(graph, codes).is_none()));
    let scales = computed.filter(|n| is_onnx(n, "DequantizeLinear")).filter_map(|n| operand(n, 1));
    scales.into_iter().find(|scale| constant(graph, *scale) == Some(own))
}

/// The operands of one scale's fake quantization.
#[derive(Debug, Clone, Copy)]
struct Grid {
    unit: ValueId,
    step: ValueId,
    zero: ValueId,
}

impl Grid {
    fn new(graph: &mut Graph, scale: ValueId, zero: Option<ValueId>, codes: Option<DType>) -> Result<Grid, OpError> {
        let tensor = constant(graph, scale).ok_or_else(|| OpError::unsupported("a scale that is not constant"))?;
        let count = tensor.len();
        let unit = tensor.cast(DType::F32)?.reshaped(&[count])?;
        let zero = match zero {
            Some(zero) => constant(graph, zero)
                .ok_or_else(|| OpError::unsupported("a zero point that is not constant"))?
                .reshaped(&[count])?,
            None => Tensor::zeros(codes.ok_or_else(|| OpError::dtype("codes of unknown type"))?, &[count])?,
        };
        let name = graph.value(scale).name.clone();
        let stem = name.rfind("_scale").map_or(name.as_str(), |at| &name[..at]).to_owned();
        Ok(Grid {
            unit: graph.add_constant(&format!("{stem}{UNIT}"), unit),
            step: graph.add_constant(&format!("{stem}_step"), Tensor::vector(&vec![1f32; count])),
            zero: graph.add_constant(&format!("{stem}_zero"), zero),
        })
    }
}

/// The quantizer that a node of fake quantization has learnt.
fn trained_quantizer(graph: &Graph, id: NodeId) -> Result<Quantizer, PassError> {
    let node = graph.node(id);
    let refuse = |source: OpError| PassError::node(graph, id, source);
    let operand = |i: usize| node.inputs.get(i).copied().flatten().and_then(|v| constant(graph, v));
    let (Some(unit), Some(step), Some(zero)) = (operand(1), operand(2), operand(3)) else {
        return Err(refuse(OpError::unsupported("scales and zero points that are not constant")));
    };
    let numbers = |t: &Tensor| t.to_f64().map_err(|e| refuse(e.into()));
    let products = numbers(unit)?.into_iter().zip(numbers(step)?).map(|(u, s)| (u * s.max(STEP_MIN)) as f32);
    let scales: Vec<f32> = products.collect();
    if let Some(scale) = scales.iter().find(|s| !(s.is_finite() && **s >= f32::MIN_POSITIVE)) {
        return Err(refuse(OpError::value(format!("a scale was trained to {scale}"))));
    }
    let x = node.inputs.first().copied().flatten();
    let rank = x.and_then(|x| graph.shape(x)).map(<[_]>::len);
    let axis = match (scales.len(), rank) {
        (1, _) => None,
        (_, Some(rank)) => {
            let axis = node.attributes.int("axis", 1).map_err(refuse)?;
            // A vector has one axis only.
            Some(updraft_graph::op::resolve_axis(if rank == 1 { 0 } else { axis }, rank).map_err(refuse)?)
        }
        _ => return Err(refuse(OpError::shape("an input of unknown rank"))),
    };
    let (low, high) = levels(zero.dtype()).map_err(|e| refuse(OpError::value(e.to_string())))?;
    let level = |name: &str, default: i32| {
        let stated = node.attributes.int(name, i64::from(default)).map_err(refuse)?;
        i32::try_from(stated).map_err(|e| refuse(OpError::attribute(name, e.to_string())))
    };
    Ok(Quantizer {
        dtype: zero.dtype(),
        axis,
        block: None,
        scales,
        zero_points: zero.to_i64().map_err(|e| refuse(e.into()))?.into_iter().map(|z| z as i32).collect(),
        levels: (level("low", low)?, level("high", high)?),
    })
}

/// Stores a constant as codes; returns what they stand for.
fn store(graph: &mut Graph, value: ValueId, tensor: &Tensor, quantizer: &Quantizer) -> Result<ValueId, PassError> {
    let name = graph.value(value).name.clone();
    let codes = quantizer.quantize(tensor).map_err(|e| wrong(graph, value, e))?;
    let (scale, zero) = quantizer.operands(codes.shape()).map_err(|e| wrong(graph, value, e))?;
    let ty = ValueType::of(&codes);
    let codes = graph.add_constant(&format!("{name}{CODES}"), codes);
    let scale = graph.add_constant(&format!("{name}_scale"), scale);
    let has_zero = quantizer.dtype != DType::I32;
    let zero = has_zero.then(|| graph.add_constant(&format!("{name}_zero_point"), zero));
    dequantize(graph, &name, codes, scale, zero, quantizer.axis.map(|axis| axis as i64), ty)
}

/// The bias of a layer whose values and weights are both fake quantized.
struct LayerBias {
    value: ValueId,
    input: NodeId,
    weights: NodeId,
    /// Products in one sum of the layer.
    products: usize,
}

impl LayerBias {
    fn of(graph: &Graph, id: NodeId) -> Option<LayerBias> {
        let node = graph.node(id);
        if !node.domain.is_empty() || !matches!(node.op.as_str(), "Conv" | "ConvTranspose" | "Gemm") {
            return None;
        }
        let operand = |i: usize| node.inputs.get(i).copied().flatten();
        let fake = |v: ValueId| graph.value(v).producer().map(|(id, _)| id).filter(|id| is_fake(graph.node(*id)));
        let value = operand(2)?;
        let (input, weights) = (fake(operand(0)?)?, fake(operand(1)?)?);
        let stored = constant(graph, graph.node(weights).inputs.first().copied().flatten()?)?;
        let count = constant(graph, value).filter(|t| t.rank() == 1)?.len();
        Some(LayerBias { value, input, weights, products: stored.len() / count.max(1) })
    }

    fn numbers(&self, graph: &Graph) -> Result<Vec<f32>, PassError> {
        let tensor =
            constant(graph, self.value).ok_or_else(|| PassError::value(graph, self.value, "is not constant"))?;
        let numbers = tensor.cast(DType::F32).and_then(|t| Ok(t.as_slice::<f32>()?.to_vec()));
        let numbers = numbers.map_err(|e| PassError::value(graph, self.value, e.to_string()))?;
        match numbers.iter().find(|n| !n.is_finite()) {
            Some(n) => Err(PassError::value(graph, self.value, format!("is a bias with an element {n}"))),
            None => Ok(numbers),
        }
    }
}

#[cfg(test)]
mod tests;
