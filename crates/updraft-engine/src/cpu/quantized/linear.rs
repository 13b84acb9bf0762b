//! Recognition of convolutions and products with constant weights, and of what can be done to their sums on the way out.

use updraft_graph::{DType, Graph, Node, NodeId, ValueId};

use super::affine::{Affine, WeightCodes, codes_behind, integer_weights, is_op, quantized_by, weights, weights_behind};
use super::lower::geometry;
use super::recognize::{IntegerStep, Scope, Work, constant_floats};
use super::{Bytes, Finish, Requantize, Residual, Rounded, WeightOrder};

/// A convolution or product, planned but for its shape.
pub(super) struct Linear {
    /// The node with the attributes.
    pub(super) node: NodeId,
    pub(super) form: Form,
    /// The bytes of operand 0. Others are a residual, or what [`Dynamic`] lists.
    pub(super) input: Bytes,
    pub(super) weights: WeightCodes,
    /// In units of the sums; empty or one for each output channel.
    pub(super) bias: Vec<i32>,
    pub(super) finish: Finish,
    pub(super) dynamic: Dynamic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Conv,
    Product(WeightOrder),
}

/// Facts about the input that are known at run time only: the numbers of the operands that they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Dynamic {
    pub(super) zero_point: Option<usize>,
    pub(super) scale: Option<usize>,
}

/// The step that begins with this node.
pub(super) fn find(scope: &Scope, id: NodeId) -> Option<IntegerStep> {
    let node = scope.graph.node(id);
    if !node.domain.is_empty() || scope.taken.contains(&id) {
        return None;
    }
    match node.op.as_str() {
        "MatMul" => float_product(scope, id, node).or_else(|| activations(scope, id, node)),
        "Conv" | "Gemm" => float_product(scope, id, node),
        "QLinearConv" | "QLinearMatMul" => qlinear(scope, id, node),
        "ConvInteger" | "MatMulInteger" => integer_product(scope, id, node),
        _ => None,
    }
}

fn input(node: &Node, index: usize) -> Option<ValueId> {
    node.inputs.get(index).copied().flatten()
}

/// The form of a node with weights of this shape, and the axis of the weights' output channels.
fn form(graph: &Graph, node: &Node, weights: ValueId) -> Option<(Form, usize)> {
    let shape = graph.known_shape(weights)?;
    let output = graph.known_shape(node.outputs.first().copied()??)?;
    let from = graph.known_shape(input(node, 0)?)?;
    if output.contains(&0) || from.contains(&0) || from.is_empty() {
        return None;
    }
    match node.op.as_str() {
        "Conv" | "QLinearConv" | "ConvInteger" => geometry(node, &from, &shape).map(|_| (Form::Conv, 0)),
        "Gemm" => {
            let plain = node.attributes.int("transA", 0) == Ok(0)
                && node.attributes.float("alpha", 1.0) == Ok(1.0)
                && node.attributes.float("beta", 1.0) == Ok(1.0);
            match node.attributes.int("transB", 0).ok().filter(|_| plain)? {
                0 => Some((Form::Product(WeightOrder::DepthFirst), 1)),
                _ => Some((Form::Product(WeightOrder::ColumnsFirst), 0)),
            }
        }
        _ => (shape.len() == 2).then_some((Form::Product(WeightOrder::DepthFirst), 1)),
    }
}

/// What is done to the sums, as far as nodes after the product say.
struct Chain {
    nodes: Vec<NodeId>,
    bias: Option<Vec<f32>>,
    /// The value up to here.
    value: ValueId,
}

impl Chain {
    /// Takes in the addition of a constant for each output channel.
    fn add_bias(&mut self, scope: &Scope, form: Form, channels: usize) {
        let Some(reader) = scope.only_reader(self.value) else { return };
        let node = scope.graph.node(reader);
        let Some(output) = node.outputs.first().copied().flatten().filter(|_| is_op(node, "Add")) else { return };
        let Some(other) = node.inputs.iter().flatten().copied().find(|v| *v != self.value) else { return };
        let Some(shape) = scope.graph.known_shape(other) else { return };
        let rank = scope.graph.known_shape(output).map_or(0, |s| s.len());
        let axis = if form == Form::Conv { 1 } else { rank.wrapping_sub(1) };
        let lead = rank.wrapping_sub(shape.len());
        let along = shape.iter().enumerate().all(|(i, size)| *size == 1 || (i + lead == axis && *size == channels));
        if rank == 0
            || !along
            || self.bias.is_some()
            || scope.graph.known_shape(self.value).map(|s| s.len()) != Some(rank)
        {
            return;
        }
        let Some(bias) = constant_floats(scope.graph, other) else { return };
        self.bias = Some(if bias.len() == 1 { vec![bias[0]; channels] } else { bias });
        self.nodes.push(reader);
        self.value = output;
    }
}

/// Conv, Gemm or MatMul of dequantized codes.
fn float_product(scope: &Scope, id: NodeId, node: &Node) -> Option<IntegerStep> {
    let graph = scope.graph;
    let (x, affine) = codes_behind(graph, input(node, 0)?)?;
    let bytes = affine.bytes()?;
    let (form, axis) = form(graph, node, input(node, 1)?)?;
    let weights = weights_behind(graph, input(node, 1)?, axis)?;
    let channels = *graph.known_shape(weights.codes)?.get(axis)?;
    if weights.scales.len() != 1 && weights.scales.len() != channels {
        return None;
    }
    let output = node.outputs.first().copied()??;
    let mut chain = Chain { nodes: vec![id], bias: None, value: output };
    let units: Vec<f32> = weights.scales.iter().map(|w| affine.scale * w).collect();
    let addend = if node.op == "MatMul" { None } else { input(node, 2) };
    if let Some(value) = addend {
        let shape = graph.known_shape(value)?;
        let fits =
            shape.iter().rev().skip(1).all(|n| *n == 1) && shape.last().is_none_or(|n| *n == 1 || *n == channels);
        let bias = constant_floats(graph, value).filter(|_| fits)?;
        chain.bias = Some(if bias.len() == 1 { vec![bias[0]; channels] } else { bias });
    } else {
        chain.add_bias(scope, form, channels);
    }
    let mut operands = vec![x];
    let (finish, bias) = match requantized(scope, &mut chain, &units, &mut operands) {
        Some(requantize) => {
            let bias =
                chain.bias.as_ref().map_or(Some(Vec::new()), |b| whole_bias(b, &units, &requantize.multipliers))?;
            (Finish::Requantize(requantize), bias)
        }
        None => (Finish::Dequantize { multipliers: units, bias: chain.bias.unwrap_or_default() }, Vec::new()),
    };
    let linear = Linear { node: id, form, input: bytes, weights, bias, finish, dynamic: Dynamic::default() };
    Some(IntegerStep { nodes: chain.nodes, operands, output: chain.value, work: Work::Linear(Box::new(linear)) })
}

/// MatMul of two matrices or stacks of dequantized codes.
fn activations(scope: &Scope, id: NodeId, node: &Node) -> Option<IntegerStep> {
    let graph = scope.graph;
    let ((a, left), (b, right)) = (codes_behind(graph, input(node, 0)?)?, codes_behind(graph, input(node, 1)?)?);
    let inputs = [left.bytes()?, right.bytes()?];
    let value = node.outputs.first().copied()??;
    let is_stack = |v: ValueId| graph.known_shape(v).is_some_and(|s| s.len() >= 2 && !s.contains(&0));
    if ![a, b, value].into_iter().all(is_stack) {
        return None;
    }
    let unit = left.scale * right.scale;
    let mut nodes = vec![id];
    let (output, finish) = match quantization(scope, value) {
        Some(end) => {
            nodes.extend(end.nodes);
            let multipliers = vec![unit / end.affine.scale];
            let (min, max) = end.limits;
            let finish = Requantize { multipliers, output: end.affine.bytes()?, min, max, residual: None };
            (end.codes, Finish::Requantize(finish))
        }
        None => (value, Finish::Dequantize { multipliers: vec![unit], bias: Vec::new() }),
    };
    Some(IntegerStep { nodes, operands: vec![a, b], output, work: Work::Activations { inputs, finish } })
}

/// A bias in units of the sums. Rounding it errs by half a unit, which is `multiplier / 2` steps of the output: where
/// that could be seen, and the bias is not whole to begin with, there is none.
fn whole_bias(bias: &[f32], units: &[f32], multipliers: &[f32]) -> Option<Vec<i32>> {
    const SEEN: f32 = 0.25;
    let each = |values: &[f32], channel: usize| values[if values.len() == 1 { 0 } else { channel }];
    let whole = bias.iter().enumerate().map(|(channel, b)| {
        let exact = b / each(units, channel);
        let whole = exact.round_ties_even();
        // Biases of QDQ models are codes of these units, but for the rounding of the division.
        let is_whole = (exact - whole).abs() <= exact.abs() * 4.0 * f32::EPSILON;
        let fits = whole.abs() < 1e9 && (is_whole || each(multipliers, channel) < SEEN);
        fits.then_some(whole as i32)
    });
    whole.collect()
}

/// Takes in what follows up to a QuantizeLinear; nothing where there is none.
fn requantized(scope: &Scope, chain: &mut Chain, units: &[f32], operands: &mut Vec<ValueId>) -> Option<Requantize> {
    let graph = scope.graph;
    let shape = graph.known_shape(chain.value)?;
    if let Some(made) = summed(scope, chain.value, &shape, units) {
        chain.nodes.extend(made.nodes);
        chain.value = made.value;
        operands.push(made.residual);
        return Some(made.requantize);
    }
    let end = quantization(scope, chain.value)?;
    if let Some(requantize) = end.single.and_then(|codes| rounded_sum(scope, codes, &end, &shape, units)) {
        chain.nodes.extend(end.nodes);
        chain.nodes.extend(requantize.nodes);
        chain.value = requantize.value;
        operands.push(requantize.residual);
        return Some(requantize.requantize);
    }
    chain.nodes.extend(end.nodes);
    chain.value = end.codes;
    let output = end.affine.bytes()?;
    Some(Requantize {
        multipliers: units.iter().map(|u| u / end.affine.scale).collect(),
        output,
        min: end.limits.0,
        max: end.limits.1,
        residual: None,
    })
}

/// A QuantizeLinear to bytes behind an optional activation.
struct End {
    nodes: Vec<NodeId>,
    codes: ValueId,
    affine: Affine,
    limits: (i32, i32),
    /// The dequantized codes, where nobody reads the codes otherwise.
    single: Option<ValueId>,
}

fn quantization(scope: &Scope, value: ValueId) -> Option<End> {
    let graph = scope.graph;
    let reader = scope.only_reader(value)?;
    let mut nodes = vec![reader];
    let activation = matches!(graph.node(reader).op.as_str(), "Relu" | "Clip").then_some(reader);
    if let Some(activation) = activation {
        if input(graph.node(activation), 0) != Some(value) {
            return None;
        }
        nodes.push(scope.only_reader(graph.node(activation).outputs.first().copied()??)?);
    }
    let (_, affine, codes) = quantized_by(graph, graph.node(*nodes.last()?))?;
    affine.bytes()?;
    let limits = match activation {
        Some(id) => scope.activation(graph.node(id), &affine)?,
        None => affine.limits(),
    };
    let single = scope.only_reader(codes).and_then(|reader| {
        let node = graph.node(reader);
        let output = node.outputs.first().copied()??;
        codes_behind(graph, output).is_some_and(|(c, _)| c == codes).then_some(output)
    });
    Some(End { nodes, codes, affine, limits, single })
}

/// A sum with codes of a value's shape, quantized.
struct Sum {
    nodes: Vec<NodeId>,
    value: ValueId,
    scale: f32,
    residual: ValueId,
    requantize: Requantize,
}

/// `value + residual`, quantized.
fn summed(scope: &Scope, value: ValueId, shape: &[usize], units: &[f32]) -> Option<Sum> {
    let graph = scope.graph;
    let reader = scope.only_reader(value)?;
    let node = graph.node(reader);
    if !is_op(node, "Add") {
        return None;
    }
    let other = node.inputs.iter().flatten().copied().find(|v| *v != value)?;
    let (residual, affine) = codes_behind(graph, other)?;
    let bytes = affine.bytes().filter(|_| graph.known_shape(residual).as_deref() == Some(shape))?;
    let end = quantization(scope, node.outputs.first().copied()??)?;
    let scale = end.affine.scale;
    let requantize = Requantize {
        multipliers: units.iter().map(|u| u / scale).collect(),
        output: end.affine.bytes()?,
        min: end.limits.0,
        max: end.limits.1,
        residual: Some(Residual { bytes, multiplier: affine.scale / scale, rounded: None }),
    };
    let nodes = std::iter::once(reader).chain(end.nodes).collect();
    Some(Sum { nodes, value: end.codes, scale, residual, requantize })
}

/// The same for a value that was rounded to codes of its own first, `value` being what those stand for.
fn rounded_sum(scope: &Scope, value: ValueId, first: &End, shape: &[usize], units: &[f32]) -> Option<Sum> {
    let graph = scope.graph;
    let mut sum = summed(scope, value, shape, units)?;
    let (dequantize, _) = graph.value(value).producer()?;
    sum.nodes.insert(0, dequantize);
    let zero = first.affine.zero_point;
    let residual = sum.requantize.residual.as_mut()?;
    residual.rounded = Some(Rounded {
        min: first.limits.0 - zero,
        max: first.limits.1 - zero,
        multiplier: first.affine.scale / sum.scale,
    });
    sum.requantize.multipliers = units.iter().map(|u| u / first.affine.scale).collect();
    Some(sum)
}

/// One number of a constant.
fn one_float(graph: &Graph, value: ValueId) -> Option<f32> {
    let tensor = graph.value(value).constant().filter(|t| t.len() == 1)?;
    tensor.as_slice::<f32>().ok()?.first().copied().filter(|s| s.is_normal() && *s > 0.0)
}

/// The zero point and type of bytes, where constant.
fn one_zero(graph: &Graph, value: Option<ValueId>, dtype: DType) -> Option<Bytes> {
    let zero_point = match value {
        None => 0,
        Some(value) => {
            let tensor = graph.value(value).constant().filter(|t| t.len() == 1 && t.dtype() == dtype)?;
            *tensor.to_i64().ok()?.first()? as i32
        }
    };
    Affine { scale: 1.0, zero_point, dtype }.bytes()
}

/// QLinearConv and QLinearMatMul.
fn qlinear(scope: &Scope, id: NodeId, node: &Node) -> Option<IntegerStep> {
    let graph = scope.graph;
    let x = input(node, 0)?;
    let codes = input(node, 3)?;
    let output = node.outputs.first().copied()??;
    let (form, axis) = form(graph, node, codes)?;
    let x_scale = one_float(graph, input(node, 1)?)?;
    let y_scale = one_float(graph, input(node, 6)?)?;
    let weights = weights(graph, codes, input(node, 4)?, input(node, 5))?;
    let channels = *graph.known_shape(codes)?.get(axis)?;
    let bytes = one_zero(graph, input(node, 2), graph.dtype(x)?)?;
    let to = one_zero(graph, input(node, 7), graph.dtype(output)?)?;
    if weights.scales.len() != 1 && weights.scales.len() != channels {
        return None;
    }
    let bias = match input(node, 8) {
        None => Vec::new(),
        Some(value) => graph.value(value).constant()?.as_slice::<i32>().ok().filter(|b| b.len() == channels)?.to_vec(),
    };
    let (min, max) = if to.signed { (-128, 127) } else { (0, 255) };
    let multipliers = weights.scales.iter().map(|w| x_scale * w / y_scale).collect();
    let finish = Finish::Requantize(Requantize { multipliers, output: to, min, max, residual: None });
    let linear = Linear { node: id, form, input: bytes, weights, bias, finish, dynamic: Dynamic::default() };
    Some(IntegerStep { nodes: vec![id], operands: vec![x], output, work: Work::Linear(Box::new(linear)) })
}

/// ConvInteger and MatMulInteger, with the scales and bias that follow where the sums are for nobody else.
fn integer_product(scope: &Scope, id: NodeId, node: &Node) -> Option<IntegerStep> {
    let graph = scope.graph;
    let (x, codes) = (input(node, 0)?, input(node, 1)?);
    let output = node.outputs.first().copied()??;
    let (form, axis) = form(graph, node, codes)?;
    let channels = *graph.known_shape(codes)?.get(axis)?;
    let (signed, zero_points) = integer_weights(graph, codes, input(node, 3))?;
    if zero_points.len() != 1 && zero_points.len() != channels {
        return None;
    }
    let mut operands = vec![x];
    let mut dynamic = Dynamic::default();
    let dtype = graph.dtype(x)?;
    let bytes = match input(node, 2) {
        Some(zero) if graph.value(zero).constant().is_none() => {
            let is_one = graph.known_shape(zero)?.iter().product::<usize>() == 1 && graph.dtype(zero) == Some(dtype);
            dynamic.zero_point = is_one.then_some(operands.len());
            dynamic.zero_point?;
            operands.push(zero);
            Affine { scale: 1.0, zero_point: 0, dtype }.bytes()?
        }
        zero => one_zero(graph, zero, dtype)?,
    };
    let weights = |scales: Vec<f32>| WeightCodes { codes, signed, scales, zero_points };
    let mut chain = Chain { nodes: vec![id], bias: None, value: output };
    let Some(scales) = scaled(scope, &mut chain, form, channels) else {
        let linear = Linear {
            node: id,
            form,
            input: bytes,
            weights: weights(vec![1.0]),
            bias: Vec::new(),
            finish: Finish::Sums,
            dynamic,
        };
        return Some(IntegerStep { nodes: vec![id], operands, output, work: Work::Linear(Box::new(linear)) });
    };
    chain.add_bias(scope, form, channels);
    if let Some(scale) = scales.dynamic {
        dynamic.scale = Some(operands.len());
        operands.push(scale);
    }
    let finish =
        Finish::Dequantize { multipliers: scales.constant.clone(), bias: chain.bias.take().unwrap_or_default() };
    let linear =
        Linear { node: id, form, input: bytes, weights: weights(scales.constant), bias: Vec::new(), finish, dynamic };
    Some(IntegerStep { nodes: chain.nodes, operands, output: chain.value, work: Work::Linear(Box::new(linear)) })
}

/// Scales of sums: constants, one or one for each output channel, times one that is known at run time.
struct Scales {
    constant: Vec<f32>,
    dynamic: Option<ValueId>,
}

/// Takes in a Cast to `f32` and the multiplication with scales.
fn scaled(scope: &Scope, chain: &mut Chain, form: Form, channels: usize) -> Option<Scales> {
    let graph = scope.graph;
    let cast = scope.only_reader(chain.value).filter(|id| is_op(graph.node(*id), "Cast"))?;
    let value = graph.node(cast).outputs.first().copied()??;
    let multiply = scope.only_reader(value).filter(|id| is_op(graph.node(*id), "Mul"))?;
    let node = graph.node(multiply);
    let other = node.inputs.iter().flatten().copied().find(|v| *v != value)?;
    let output = node.outputs.first().copied()?.filter(|_| graph.dtype(value) == Some(DType::F32))?;
    let rank = graph.known_shape(output)?.len();
    // A vector must lie along the output channels.
    let fits = |value: ValueId| {
        let shape = graph.known_shape(value)?;
        let axis = if form == Form::Conv { 1 } else { rank - 1 };
        let lead = rank.checked_sub(shape.len())?;
        let along = shape.iter().enumerate().all(|(i, n)| *n == 1 || (i + lead == axis && *n == channels));
        along.then(|| shape.iter().product::<usize>())
    };
    fits(other)?;
    let constant = |value: ValueId| graph.value(value).constant()?.as_slice::<f32>().ok().map(<[f32]>::to_vec);
    let is_one = |value: ValueId| fits(value) == Some(1) && graph.dtype(value) == Some(DType::F32);
    let scales = match constant(other) {
        Some(constant) => Scales { constant, dynamic: None },
        None if is_one(other) && graph.value(other).producer().is_none_or(|(id, _)| graph.node(id).op != "Mul") => {
            Scales { constant: vec![1.0], dynamic: Some(other) }
        }
        None => {
            let (maker, _) = graph.value(other).producer().filter(|(id, _)| is_op(graph.node(*id), "Mul"))?;
            let (a, b) = (input(graph.node(maker), 0)?, input(graph.node(maker), 1)?);
            match (constant(a), constant(b)) {
                (None, Some(constant)) if is_one(a) => Scales { constant, dynamic: Some(a) },
                (Some(constant), None) if is_one(b) => Scales { constant, dynamic: Some(b) },
                _ => return None,
            }
        }
    };
    chain.nodes.extend([cast, multiply]);
    chain.value = output;
    Some(scales)
}
