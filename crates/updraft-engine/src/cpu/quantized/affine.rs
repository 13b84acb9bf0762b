//! What Q and DQ nodes of a graph say about codes: scales, zero points and types, where they never change.

use updraft_graph::{DType, Graph, Node, Tensor, ValueId};

use super::Bytes;

/// One scale for a whole tensor: a code `q` stands for `scale * (q - zero_point)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Affine {
    /// Positive and finite.
    pub(super) scale: f32,
    pub(super) zero_point: i32,
    pub(super) dtype: DType,
}

impl Affine {
    /// The codes' type as kernels on bytes want it; `None` for longer types.
    pub(super) fn bytes(&self) -> Option<Bytes> {
        let signed = match self.dtype {
            DType::U8 => false,
            DType::I8 => true,
            _ => return None,
        };
        Some(Bytes { signed, zero_point: self.zero_point })
    }

    /// The least and the greatest code.
    pub(super) fn limits(&self) -> (i32, i32) {
        match self.dtype {
            DType::U8 => (0, 255),
            DType::I8 => (-128, 127),
            DType::U16 => (0, 65535),
            _ => (-32768, 32767),
        }
    }

    /// The code of a number, as QuantizeLinear has it.
    pub(super) fn code(&self, value: f32) -> i32 {
        let (low, high) = self.limits();
        let range = (i128::from(low), i128::from(high));
        updraft_graph::op::quant::code_of(f64::from(value / self.scale), i128::from(self.zero_point), range) as i32
    }

    /// Scale and zero point as values of a graph.
    pub(super) fn constants(&self, graph: &mut Graph) -> Option<(ValueId, ValueId)> {
        let zero = Tensor::from_i128(self.dtype, &[], &[i128::from(self.zero_point)]).ok()?;
        Some((graph.add_constant("scale", Tensor::scalar(self.scale)), graph.add_constant("zero_point", zero)))
    }
}

pub(super) fn is_op(node: &Node, op: &str) -> bool {
    node.domain.is_empty() && node.op == op
}

/// The scale and zero point of a node, where they are constants of one number.
fn affine(graph: &Graph, node: &Node, dtype: DType) -> Option<Affine> {
    if !matches!(dtype, DType::U8 | DType::I8 | DType::U16 | DType::I16)
        || node.attributes.int("block_size", 0) != Ok(0)
    {
        return None;
    }
    let one = |index: usize| {
        let tensor = graph.value(node.inputs.get(index).copied().flatten()?).constant()?;
        (tensor.len() == 1 && tensor.rank() <= 1).then_some(tensor)
    };
    let scale = *one(1)?.as_slice::<f32>().ok()?.first()?;
    let zero_point = match node.inputs.get(2).copied().flatten() {
        None => 0,
        Some(_) => i32::try_from(*one(2).filter(|t| t.dtype() == dtype)?.to_i128().ok()?.first()?).ok()?,
    };
    (scale.is_normal() && scale > 0.0).then_some(Affine { scale, zero_point, dtype })
}

/// What a QuantizeLinear with one scale reads, its parameters, and the codes it makes.
pub(super) fn quantized_by(graph: &Graph, node: &Node) -> Option<(ValueId, Affine, ValueId)> {
    let (input, output) = (node.inputs.first().copied()??, node.outputs.first().copied()??);
    let is_plain = is_op(node, "QuantizeLinear")
        && graph.dtype(input) == Some(DType::F32)
        && matches!(node.attributes.int("precision", 0), Ok(0 | 1))
        && graph.known_shape(input).is_some();
    let dtype = graph.dtype(output).filter(|_| is_plain)?;
    Some((input, affine(graph, node, dtype)?, output))
}

/// The codes that a value was dequantized from with one scale.
pub(super) fn codes_behind(graph: &Graph, value: ValueId) -> Option<(ValueId, Affine)> {
    let node = graph.node(graph.value(value).producer()?.0);
    let codes = node.inputs.first().copied()??;
    let is_plain = is_op(node, "DequantizeLinear") && graph.dtype(value) == Some(DType::F32);
    graph.known_shape(codes).filter(|_| is_plain)?;
    Some((codes, affine(graph, node, graph.dtype(codes)?)?))
}

/// Constant codes of weights.
#[derive(Debug, Clone)]
pub(super) struct WeightCodes {
    pub(super) codes: ValueId,
    pub(super) signed: bool,
    /// One, or one for each index along the axis of output channels.
    pub(super) scales: Vec<f32>,
    /// As many as scales.
    pub(super) zero_points: Vec<i32>,
}

/// The weights that a value is, where they are bytes with one scale or one for each index along `axis`.
pub(super) fn weights_behind(graph: &Graph, value: ValueId, axis: usize) -> Option<WeightCodes> {
    let node = graph.node(graph.value(value).producer()?.0);
    if !is_op(node, "DequantizeLinear") || graph.dtype(value) != Some(DType::F32) {
        return None;
    }
    let codes = node.inputs.first().copied()??;
    let scales = node.inputs.get(1).copied()??;
    let zero_points = node.inputs.get(2).copied().flatten();
    let rank = graph.known_shape(codes)?.len() as i64;
    let stated = node.attributes.int("axis", 1).ok()?;
    let stated = if stated < 0 { stated + rank } else { stated };
    let found = weights(graph, codes, scales, zero_points)?;
    let fits = found.scales.len() == 1 || stated == axis as i64;
    (fits && node.attributes.int("block_size", 0) == Ok(0)).then_some(found)
}

/// Weights with these scales and zero points, where all are constant.
pub(super) fn weights(
    graph: &Graph,
    codes: ValueId,
    scales: ValueId,
    zero_points: Option<ValueId>,
) -> Option<WeightCodes> {
    let scales = graph.value(scales).constant()?;
    let scales = (scales.rank() <= 1).then(|| scales.as_slice::<f32>().ok())??.to_vec();
    let (signed, mut zero_points) = integer_weights(graph, codes, zero_points)?;
    if zero_points.len() == 1 {
        zero_points = vec![zero_points[0]; scales.len()];
    }
    (!scales.is_empty() && zero_points.len() == scales.len()).then_some(WeightCodes {
        codes,
        signed,
        scales,
        zero_points,
    })
}

/// Whether constant codes are signed bytes, and their zero points: one, or one for each channel.
pub(super) fn integer_weights(graph: &Graph, codes: ValueId, zero_points: Option<ValueId>) -> Option<(bool, Vec<i32>)> {
    let tensor = graph.value(codes).constant()?;
    let signed = match tensor.dtype() {
        DType::I8 => true,
        DType::U8 => false,
        _ => return None,
    };
    let zero_points = match zero_points {
        None => vec![0],
        Some(value) => {
            let zeros = graph.value(value).constant().filter(|t| t.rank() <= 1 && t.dtype() == tensor.dtype())?;
            zeros.to_i64().ok()?.into_iter().map(|z| z as i32).collect()
        }
    };
    Some((signed, zero_points))
}
