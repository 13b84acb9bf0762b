//! Static quantization: pairs of QuantizeLinear and DequantizeLinear around what is to run on integers.
//!
//! The graph stays one of floats that any runtime can run; a runtime that has integer kernels finds each of them
//! between the pairs on its inputs and the pair on its output. Weights are stored as codes, and biases in steps of the
//! product of the scales of values and weights, so that they add to sums of products of codes.

use std::collections::{BTreeMap, HashMap};

use updraft_graph::{Attributes, DType, Graph, Node, NodeId, Tensor, ValueId, ValueType};

use super::kind::{constant_operands, fixed_range, weights_of};
use super::plan::{Decision, Plan, Role, Scheme};
use super::quantizer::{Quantizer, QuantizerError, Range};
use super::table::quantize_table;
use crate::rewrite::{FixedNames, constant};
use crate::{PassError, Report};

/// Weights that were rounded with more care than to the nearest code.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundedWeights {
    /// What the codes mean.
    pub quantizer: Quantizer,
    /// The codes.
    pub codes: Tensor,
}

/// Quantizes all that the scheme allows of a graph that [`prepare`](super::prepare) has seen.
///
/// `ranges` has the range of each value that [`observed`](super::observed) names; `weights`, by name of the
/// initializer, what is not to be rounded to the nearest code. Returns what became of each node, in execution order.
pub fn insert(
    graph: &mut Graph,
    scheme: &Scheme,
    ranges: &BTreeMap<String, Range>,
    weights: &BTreeMap<String, RoundedWeights>,
    report: &mut Report,
) -> Result<Vec<Decision>, PassError> {
    scheme.check()?;
    let plan = Plan::new(graph, scheme)?;
    let mut writer = Writer {
        quantizers: quantizers(graph, scheme, &plan, ranges)?,
        plan,
        scheme,
        rounded: weights,
        names: FixedNames::of(graph),
        operands: HashMap::new(),
        shared: HashMap::new(),
    };
    let decisions = writer.decisions(graph);
    for decision in &decisions {
        match decision.quantized {
            true => report.change(format!("{}: {}", decision.node, decision.reason)),
            false => {
                report.refusals.push(crate::Refusal { node: decision.node.clone(), reason: decision.reason.clone() })
            }
        }
    }
    let values: Vec<ValueId> = writer.plan.integers().collect();
    let nodes = writer.plan.roles.clone();
    // Constants first: scales of biases are those of the values that layers read, by their names in the plan.
    for (id, role) in &nodes {
        if role.reads_integers() {
            writer.constants(graph, *id)?;
        }
    }
    for v in values {
        writer.pair(graph, v)?;
    }
    for (id, _) in nodes.iter().filter(|(_, role)| *role == Role::Table) {
        quantize_table(graph, *id, &writer.names)?;
    }
    graph.prune()?;
    Ok(decisions)
}

/// The quantizer of each group of values.
pub(super) fn quantizers(
    graph: &Graph,
    scheme: &Scheme,
    plan: &Plan,
    ranges: &BTreeMap<String, Range>,
) -> Result<HashMap<usize, Quantizer>, PassError> {
    let mut groups: BTreeMap<usize, Range> = BTreeMap::new();
    let mut cover = |group: usize, range: Range| {
        groups.entry(group).and_modify(|whole| *whole = whole.union(range)).or_insert(range);
    };
    for v in plan.integers().filter(|v| plan.is_source(graph, *v)) {
        let name = &graph.value(v).name;
        let range = match fixed_range(graph, v) {
            Some(range) => range,
            None => {
                *ranges.get(name).ok_or_else(|| PassError::value(graph, v, "has no range; it must be calibrated"))?
            }
        };
        // Before the union, which would hide what is not a number.
        Quantizer::of_range(range, scheme.activations, false).map_err(|e| wrong(graph, v, e))?;
        cover(plan.group(v), range);
    }
    for (id, role) in &plan.roles {
        let node = graph.node(*id);
        let (Role::Move, Some(output)) = (role, node.outputs.first().copied().flatten()) else { continue };
        for (_, v) in constant_operands(graph, node) {
            let tensor = constant(graph, v).ok_or_else(|| PassError::value(graph, v, "is not constant"))?;
            cover(plan.group(output), Range::of_tensor(tensor).map_err(|e| wrong(graph, v, e))?);
        }
    }
    groups
        .into_iter()
        .map(|(group, range)| {
            let made = Quantizer::of_range(range, scheme.activations, scheme.symmetric_activations);
            made.map(|q| (group, q)).map_err(|e| PassError::Option { option: "range", problem: e.to_string() })
        })
        .collect()
}

fn wrong(graph: &Graph, value: ValueId, error: QuantizerError) -> PassError {
    PassError::value(graph, value, format!("cannot be quantized: {error}"))
}

struct Writer<'a> {
    plan: Plan,
    quantizers: HashMap<usize, Quantizer>,
    scheme: &'a Scheme,
    rounded: &'a BTreeMap<String, RoundedWeights>,
    names: FixedNames,
    /// The initializers that hold the scale and zero point of a group.
    operands: HashMap<usize, (ValueId, ValueId)>,
    /// Constants that are quantized already, by what they are quantized with.
    shared: HashMap<ValueId, Vec<(Quantizer, ValueId)>>,
}

impl Writer<'_> {
    fn decisions(&self, graph: &Graph) -> Vec<Decision> {
        let mut decisions = Vec::new();
        for (id, role) in &self.plan.roles {
            let node = graph.node(*id);
            let (quantized, reason) = match role {
                Role::Other => continue,
                Role::Float(reason) => (false, reason.clone()),
                Role::Part(main) => (true, format!("as part of {}", graph.node(*main).label(graph))),
                Role::Move => (true, "moves codes".to_owned()),
                Role::Table => (true, "rows of i8 codes".to_owned()),
                Role::Between => (true, format!("{} values", self.scheme.activations)),
                Role::Layer => match weights_of(graph, node) {
                    None => (true, format!("{0} values, {0} values", self.scheme.activations)),
                    Some((_, axis)) => {
                        let scales = if axis.is_some() && self.scheme.per_channel { "channel" } else { "tensor" };
                        let (values, weights) = (self.scheme.activations, self.scheme.weights);
                        (true, format!("{values} values, {weights} weights per {scales}"))
                    }
                },
            };
            decisions.push(Decision { node: node.label(graph), op: node.op.clone(), quantized, reason });
        }
        decisions
    }

    /// Stores the constants that a node reads as codes.
    fn constants(&mut self, graph: &mut Graph, id: NodeId) -> Result<(), PassError> {
        let node = graph.node(id).clone();
        let is_move = self.plan.role(id) == &Role::Move;
        for (index, v) in constant_operands(graph, &node) {
            let Some(tensor) = constant(graph, v).cloned() else { continue };
            let output = node.outputs.first().copied().flatten();
            let group = output.filter(|_| is_move).and_then(|v| self.quantizers.get(&self.plan.group(v)));
            let quantizer = match group {
                Some(quantizer) => quantizer.clone(),
                None => {
                    let range = Range::of_tensor(&tensor).map_err(|e| wrong(graph, v, e))?;
                    Quantizer::of_range(range, self.scheme.activations, self.scheme.symmetric_activations)
                        .map_err(|e| wrong(graph, v, e))?
                }
            };
            let made = self.stored(graph, v, &quantizer, |quantizer| quantizer.quantize(&tensor))?;
            graph.set_node_input(id, index, Some(made));
        }
        if self.plan.role(id) == &Role::Layer
            && let Some((v, axis)) = weights_of(graph, &node)
        {
            self.weights(graph, id, &node, v, axis)?;
        }
        Ok(())
    }

    /// Stores a layer's weights and bias as codes.
    fn weights(
        &mut self,
        graph: &mut Graph,
        id: NodeId,
        node: &Node,
        v: ValueId,
        axis: Option<usize>,
    ) -> Result<(), PassError> {
        let Some(tensor) = constant(graph, v).cloned() else { return Ok(()) };
        let rounded = self.rounded.get(&graph.value(v).name);
        if let Some(given) = rounded.filter(|given| given.codes.shape() != tensor.shape()) {
            let problem = format!("has shape {:?}, its codes have {:?}", tensor.shape(), given.codes.shape());
            return Err(PassError::value(graph, v, problem));
        }
        let mut quantizer = match rounded {
            Some(given) => given.quantizer.clone(),
            None => self.scheme.weight_quantizer(&tensor, axis).map_err(|e| wrong(graph, v, e))?,
        };
        let input_scale = node.inputs.first().copied().flatten().and_then(|x| self.scale_of(x));
        let bias = node.inputs.get(2).copied().flatten();
        let bias = bias.filter(|_| node.op != "MatMul").and_then(|b| Some((b, constant(graph, b)?.clone())));
        let bias = bias.filter(|(_, numbers)| numbers.rank() == 1);
        let mut bias_scales = None;
        if let (Some(input_scale), Some((bias, numbers))) = (input_scale, &bias) {
            let numbers = numbers.cast(DType::F32).map_err(|e| wrong(graph, *bias, e.into()))?;
            let numbers = numbers.as_slice::<f32>().map_err(|e| wrong(graph, *bias, e.into()))?;
            if numbers.iter().any(|n| !n.is_finite()) {
                return Err(PassError::value(graph, *bias, "is a bias with an element that is not a finite number"));
            }
            let channels = axis.and_then(|a| tensor.shape().get(a)).copied().unwrap_or(1);
            let products = tensor.len() / channels.max(1);
            make_room_for_bias(&mut quantizer, input_scale, numbers, products);
            bias_scales = bias_scales_of(&quantizer, input_scale, numbers.len());
        }
        let codes = rounded.filter(|given| given.quantizer == quantizer).map(|given| given.codes.clone());
        let made = self.stored(graph, v, &quantizer, |quantizer| match (codes, rounded) {
            (Some(codes), _) => Ok(codes),
            // The room for the bias made the steps coarser; care taken for finer ones is kept as far as that goes.
            (None, Some(given)) => quantizer.quantize(&given.quantizer.dequantize(&given.codes)?),
            (None, None) => quantizer.quantize(&tensor),
        })?;
        graph.set_node_input(id, 1, Some(made));
        if let (Some((v, numbers)), Some(quantizer)) = (bias, bias_scales) {
            let flat = numbers.reshaped(&[numbers.len()]).map_err(|e| wrong(graph, v, e.into()))?;
            let made = self.stored(graph, v, &quantizer, |quantizer| quantizer.quantize(&flat))?;
            graph.set_node_input(id, 2, Some(made));
        }
        Ok(())
    }

    /// The scale of a value or constant that a layer reads.
    fn scale_of(&self, v: ValueId) -> Option<f32> {
        let quantizer = self.plan.is_integer(v).then(|| self.quantizers.get(&self.plan.group(v)))??;
        quantizer.scales.first().copied()
    }

    /// The dequantized form of a constant, made once for each quantizer.
    fn stored(
        &mut self,
        graph: &mut Graph,
        v: ValueId,
        quantizer: &Quantizer,
        codes: impl FnOnce(&Quantizer) -> Result<Tensor, QuantizerError>,
    ) -> Result<ValueId, PassError> {
        if let Some((_, made)) = self.shared.get(&v).and_then(|all| all.iter().find(|(q, _)| q == quantizer)) {
            return Ok(*made);
        }
        let name = graph.value(v).name.clone();
        let codes = codes(quantizer).map_err(|e| wrong(graph, v, e))?;
        let (scale, zero) = quantizer.operands(codes.shape()).map_err(|e| wrong(graph, v, e))?;
        let ty = ValueType::of(&codes);
        let is_bias = quantizer.dtype == DType::I32;
        let codes = graph.add_constant(&format!("{name}_quantized"), codes);
        let scale = graph.add_constant(&format!("{name}_scale"), scale);
        // Sums of products have no zero point to take away.
        let zero = (!is_bias).then(|| graph.add_constant(&format!("{name}_zero_point"), zero));
        let axis = quantizer.axis.map(|axis| axis as i64);
        let made = dequantize(graph, &name, codes, scale, zero, axis, ty)?;
        self.shared.entry(v).or_default().push((quantizer.clone(), made));
        Ok(made)
    }

    /// Puts a pair on a value: readers on integers read what it gives, and all readers do where the value is made of
    /// integers.
    fn pair(&mut self, graph: &mut Graph, v: ValueId) -> Result<(), PassError> {
        let group = self.plan.group(v);
        let Some(quantizer) = self.quantizers.get(&group).cloned() else {
            return Err(PassError::value(graph, v, "has no range; it must be calibrated"));
        };
        let of_integers = self.plan.is_made_of_integers(graph, v);
        let name = graph.value(v).name.clone();
        let (scale, zero) = match self.operands.get(&group) {
            Some(made) => *made,
            None => {
                let (scale, zero) = quantizer.operands(&[]).map_err(|e| wrong(graph, v, e))?;
                let made = (
                    graph.add_constant(&format!("{name}_scale"), scale),
                    graph.add_constant(&format!("{name}_zero_point"), zero),
                );
                self.operands.insert(group, made);
                made
            }
        };
        let mut readers = graph.value(v).consumers().to_vec();
        readers.sort();
        readers.dedup();
        readers.retain(|id| of_integers || self.plan.role(*id).reads_integers());

        let source = if of_integers { self.before_bounds(graph, v, &quantizer) } else { v };
        let float = graph.value(v).ty.clone();
        let codes_type = float.shape().map_or(ValueType::Unknown, |s| ValueType::tensor(quantizer.dtype, s.to_vec()));
        let codes = graph.fresh_value(&format!("{name}_quantized"), codes_type.clone());
        graph.add_node(Node {
            op: "QuantizeLinear".to_owned(),
            inputs: vec![Some(source), Some(scale), Some(zero)],
            outputs: vec![Some(codes)],
            ..Node::default()
        })?;
        let back = dequantize(graph, &name, codes, scale, Some(zero), None, float)?;
        for id in readers {
            let places: Vec<usize> =
                (0..graph.node(id).inputs.len()).filter(|i| graph.node(id).inputs[*i] == Some(v)).collect();
            places.into_iter().for_each(|i| graph.set_node_input(id, i, Some(back)));
        }
        if of_integers && graph.outputs().contains(&v) {
            graph.swap_names(v, back);
            let outputs = graph.outputs().iter().map(|o| if *o == v { back } else { *o }).collect();
            graph.set_outputs(outputs);
        }
        Ok(())
    }

    /// What is read by the Relu or Clip that makes `v`, where the ends of the codes bound the value in the same way: then
    /// both give the same codes.
    fn before_bounds(&self, graph: &Graph, v: ValueId, quantizer: &Quantizer) -> ValueId {
        let Some((id, _)) = graph.value(v).producer() else { return v };
        let node = graph.node(id);
        let [bound_low, bound_high] = match (self.plan.role(id), node.op.as_str()) {
            (Role::Part(_), "Relu") => [Some(0.0), None],
            (Role::Part(_), "Clip") => [1, 2].map(|i| {
                let bound = node.inputs.get(i).copied().flatten().and_then(|b| constant(graph, b));
                bound.and_then(|t| t.to_f64().ok()).and_then(|n| n.first().copied())
            }),
            _ => return v,
        };
        // A subgraph that reads the value by its name must find it bounded.
        if self.names.contains(graph, v) && !graph.outputs().contains(&v) {
            return v;
        }
        let code = |x: f64| quantizer.quantize(&Tensor::scalar(x as f32)).and_then(|q| Ok(q.to_i64()?)).ok();
        let is = |bound: Option<f64>, level: i32| bound.is_none_or(|x| code(x) == Some(vec![i64::from(level)]));
        let same = is(bound_low, quantizer.levels.0) && is(bound_high, quantizer.levels.1);
        node.inputs.first().copied().flatten().filter(|_| same).unwrap_or(v)
    }
}

pub(super) fn dequantize(
    graph: &mut Graph,
    name: &str,
    codes: ValueId,
    scale: ValueId,
    zero: Option<ValueId>,
    axis: Option<i64>,
    ty: ValueType,
) -> Result<ValueId, PassError> {
    let ty = ty.shape().map_or(ValueType::Unknown, |s| ValueType::tensor(DType::F32, s.to_vec()));
    let made = graph.fresh_value(&format!("{name}_dequantized"), ty);
    let mut attributes = Attributes::new();
    if let Some(axis) = axis {
        attributes.set("axis", axis);
    }
    let mut inputs = vec![Some(codes), Some(scale)];
    inputs.extend(zero.map(Some));
    graph.add_node(Node {
        op: "DequantizeLinear".to_owned(),
        inputs,
        outputs: vec![Some(made)],
        attributes,
        ..Node::default()
    })?;
    Ok(made)
}

/// Raises scales of weights so that each channel's bias fits 32 bits, in steps of the product of the scales, together
/// with the largest sum of `products` products.
pub(super) fn make_room_for_bias(weights: &mut Quantizer, input_scale: f32, bias: &[f32], products: usize) {
    const CODES: f64 = 255.0 * 128.0;
    let all = f64::from(i32::MAX);
    // A sum that alone may overflow is not the bias's fault.
    let room = (all - CODES * products as f64).max(all / 2.0);
    let count = weights.scales.len().max(1);
    for (channel, b) in bias.iter().enumerate() {
        let scale = &mut weights.scales[channel % count];
        // A little more than needed, against the rounding of the product of the scales.
        let least = f64::from(b.abs()) / room / f64::from(input_scale) * (1.0 + 1e-6);
        // The product itself must be a number to divide by.
        let least = least.max(f64::from(f32::MIN_POSITIVE) / f64::from(input_scale));
        if f64::from(*scale) < least {
            *scale = least as f32;
        }
    }
}

/// The scale of each element of a bias; `None` where the bias is not one number a channel.
pub(super) fn bias_scales_of(weights: &Quantizer, input_scale: f32, len: usize) -> Option<Quantizer> {
    let count = weights.scales.len();
    // Groups of a transposed convolution share the scales of their channels.
    let scales: Vec<f32> = (0..len).map(|channel| input_scale * weights.scales[channel % count.max(1)]).collect();
    (count > 0 && len.is_multiple_of(count)).then(|| match count {
        1 => Quantizer::of_bias(vec![input_scale * weights.scales[0]]),
        _ => Quantizer::of_bias(scales),
    })
}
