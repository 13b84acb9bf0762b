//! How operators changed from opset 7 to opset 21, oldest change first. Changes that only add (element types,
//! attributes and inputs whose default is the old behaviour) need no rule.

use crate::attribute::{Attribute, Attributes};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Graph, Node, ValueId, ValueType};
use crate::op::{OpError, resolve_axis};
use crate::tensor::Tensor;

/// One change of one operator.
pub(super) struct Rule {
    /// The operator.
    pub op: &'static str,
    /// The opset that brought the change: nodes of older ones are rewritten.
    pub before: u32,
    /// Brings a node that is out of the graph to the new form; it may add others.
    pub apply: fn(&mut Graph, &mut Node) -> Result<(), OpError>,
}

const fn rule(op: &'static str, before: u32, apply: fn(&mut Graph, &mut Node) -> Result<(), OpError>) -> Rule {
    Rule { op, before, apply }
}

/// All changes.
pub(super) const RULES: &[Rule] = &[
    rule("BatchNormalization", 9, drop_spatial),
    rule("Scan", 9, refuse_batched_scan),
    rule("Upsample", 9, scales_to_input),
    rule("Dropout", 10, cast_mask),
    rule("Slice", 10, slice_to_inputs),
    rule("TopK", 10, k_to_input),
    // Deprecated in opset 10, but found in files of later ones.
    rule("Upsample", 22, upsample_to_resize),
    rule("Clip", 11, bounds_to_inputs),
    rule("Pad", 11, pads_to_inputs),
    rule("Resize", 11, resize_modes),
    // Deprecated in opset 11, but found in files of later ones.
    rule("Scatter", 22, scatter_to_scatter_elements),
    rule("Dropout", 12, ratio_to_input),
    rule("Hardmax", 13, flatten_around),
    rule("LogSoftmax", 13, flatten_around),
    rule("ReduceSum", 13, axes_to_input),
    rule("Softmax", 13, flatten_around),
    rule("Split", 13, split_to_input),
    rule("Squeeze", 13, axes_to_input),
    rule("Unsqueeze", 13, axes_to_input),
    rule("BatchNormalization", 14, one_output),
    rule("RoiAlign", 16, output_half_pixel),
    rule("ReduceL1", 18, axes_to_input),
    rule("ReduceL2", 18, axes_to_input),
    rule("ReduceLogSum", 18, axes_to_input),
    rule("ReduceLogSumExp", 18, axes_to_input),
    rule("ReduceMax", 18, axes_to_input),
    rule("ReduceMean", 18, axes_to_input),
    rule("ReduceMin", 18, axes_to_input),
    rule("ReduceProd", 18, axes_to_input),
    rule("ReduceSumSquare", 18, axes_to_input),
    rule("Split", 18, count_outputs),
    rule("DFT", 20, axis_to_input),
    rule("GridSample", 20, rename_modes),
    rule("GroupNormalization", 21, affine_by_channel),
];

/// Puts a value at an input, leaving out those before it that are not there.
fn set_input(node: &mut Node, index: usize, value: ValueId) {
    if node.inputs.len() <= index {
        node.inputs.resize(index + 1, None);
    }
    node.inputs[index] = Some(value);
}

/// Makes an attribute that lists integers an input, where it is given.
fn ints_to_input(graph: &mut Graph, node: &mut Node, name: &str, index: usize) -> Result<(), OpError> {
    if let Some(ints) = node.attributes.ints(name)? {
        let constant = graph.add_constant(name, Tensor::vector(ints));
        node.attributes.remove(name);
        set_input(node, index, constant);
    }
    Ok(())
}

fn element_type(graph: &Graph, node: &Node) -> Result<DType, OpError> {
    let x = data(node)?;
    let unknown = || OpError::dtype(format!("the element type of {:?} must be known", graph.value(x).name));
    graph.dtype(x).ok_or_else(unknown)
}

fn data(node: &Node) -> Result<ValueId, OpError> {
    node.inputs.first().copied().flatten().ok_or(OpError::MissingInput { index: 0, expected: "a tensor" })
}

/// Statistics by element, not by channel, went with opset 9.
fn drop_spatial(_: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    if !node.attributes.flag("spatial", true)? {
        return Err(OpError::unsupported("BatchNormalization by element (spatial = 0)"));
    }
    node.attributes.remove("spatial");
    Ok(())
}

/// The form of opset 14 in inference has one output; the four others of older ones were for training.
fn one_output(_: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    if node.outputs.iter().skip(1).any(Option::is_some) {
        return Err(OpError::unsupported("BatchNormalization of opset 13 or older with statistics as outputs"));
    }
    node.outputs.truncate(1);
    Ok(())
}

fn refuse_batched_scan(_: &mut Graph, _: &mut Node) -> Result<(), OpError> {
    Err(OpError::unsupported("Scan of opset 8, which had a batch axis"))
}

fn scales_to_input(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    let scales = node.attributes.floats("scales")?.ok_or_else(|| OpError::attribute("scales", "is missing"))?;
    let constant = graph.add_constant("scales", Tensor::vector(scales));
    node.attributes.remove("scales");
    set_input(node, 1, constant);
    Ok(())
}

fn upsample_to_resize(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    node.op = "Resize".to_owned();
    resize_modes(graph, node)
}

/// Opset 10 computed `x / scale` for coordinates, and the nearest element below it where it grew, above it where it
/// shrank; its documentation shows that by example only.
fn resize_modes(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    if node.inputs.len() > 2 {
        // Already in the form of opset 11: an Upsample became this.
        return Ok(());
    }
    let scales = node.inputs.get(1).copied().flatten().ok_or(OpError::MissingInput { index: 1, expected: "scales" })?;
    node.inputs = vec![node.inputs[0], None, Some(scales)];
    node.attributes.set("coordinate_transformation_mode", "asymmetric");
    if node.attributes.string("mode", "nearest")? == "nearest" {
        let scales = graph.value(scales).constant().ok_or_else(|| {
            OpError::unsupported("Resize of opset 10 to the nearest element with scales that are not constant")
        })?;
        let scales = scales.to_f64()?;
        let mode = match (scales.iter().any(|s| *s < 1.0), scales.iter().any(|s| *s > 1.0)) {
            (true, true) => {
                return Err(OpError::unsupported("Resize of opset 10 that grows one axis and shrinks another"));
            }
            (true, false) => "ceil",
            (false, _) => "floor",
        };
        node.attributes.set("nearest_mode", mode);
    }
    Ok(())
}

/// The mask had the element type of the data.
fn cast_mask(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    let Some(mask) = node.outputs.get(1).copied().flatten() else { return Ok(()) };
    let to = element_type(graph, node)?;
    let name = format!("{}_kept", graph.value(mask).name);
    let kept = graph.fresh_value(&name, ValueType::Unknown);
    node.outputs[1] = Some(kept);
    graph.add_node(Node {
        op: "Cast".to_owned(),
        inputs: vec![Some(kept)],
        outputs: vec![Some(mask)],
        attributes: Attributes::from([("to", Attribute::Int(to as i64))]),
        ..Node::default()
    })?;
    Ok(())
}

fn ratio_to_input(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    if let Some(ratio) = node.attributes.optional_float("ratio")? {
        let constant = graph.add_constant("ratio", Tensor::scalar(ratio));
        node.attributes.remove("ratio");
        set_input(node, 1, constant);
    }
    Ok(())
}

fn slice_to_inputs(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    for name in ["starts", "ends"] {
        if node.attributes.ints(name)?.is_none() {
            return Err(OpError::attribute(name, "is missing"));
        }
    }
    ["starts", "ends", "axes"]
        .into_iter()
        .zip(1..)
        .try_for_each(|(name, index)| ints_to_input(graph, node, name, index))
}

fn k_to_input(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    let k = node.attributes.optional_int("k")?.ok_or_else(|| OpError::attribute("k", "is missing"))?;
    let constant = graph.add_constant("k", Tensor::vector(&[k]));
    node.attributes.remove("k");
    set_input(node, 1, constant);
    Ok(())
}

/// A bound that was not given was the largest finite `f32`, which infinity of a wide type exceeds.
fn bounds_to_inputs(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    let dtype = element_type(graph, node)?;
    let is_wide = matches!(dtype, DType::F32 | DType::F64);
    for (name, index, default) in [("min", 1, f32::MIN), ("max", 2, f32::MAX)] {
        let bound = node.attributes.optional_float(name)?.or(is_wide.then_some(default));
        if let Some(bound) = bound {
            let constant = graph.add_constant(name, Tensor::from_f64(dtype, &[], &[f64::from(bound)])?);
            node.attributes.remove(name);
            set_input(node, index, constant);
        }
    }
    Ok(())
}

fn pads_to_inputs(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    if node.attributes.ints("pads")?.is_none() {
        return Err(OpError::attribute("pads", "is missing"));
    }
    ints_to_input(graph, node, "pads", 1)?;
    if let Some(value) = node.attributes.optional_float("value")? {
        let dtype = element_type(graph, node)?;
        let constant = graph.add_constant("value", Tensor::from_f64(dtype, &[], &[f64::from(value)])?);
        node.attributes.remove("value");
        set_input(node, 2, constant);
    }
    Ok(())
}

fn scatter_to_scatter_elements(_: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    node.op = "ScatterElements".to_owned();
    Ok(())
}

/// Until opset 12 whole rows were normalised, of the matrix that all axes before `axis` and all from it on make.
fn flatten_around(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    let x = data(node)?;
    let axis = node.attributes.int("axis", 1)?;
    if let Some(shape) = graph.shape(x).map(<[Dim]>::to_vec) {
        // One row either way.
        let resolved = if shape.is_empty() { 0 } else { resolve_axis(axis, shape.len())? };
        if shape.iter().skip(resolved + 1).all(|d| *d == Dim::Known(1)) {
            node.attributes.set("axis", axis);
            return Ok(());
        }
    }
    let dtype = graph.dtype(x);
    let name = graph.value(x).name.clone();
    let rows = graph.op("Flatten", &[x], [("axis", axis.into())])?;
    let shape = graph.op("Shape", &[x], [])?;
    let output = node.outputs.first().copied().flatten();
    let made =
        graph.fresh_value(&format!("{name}_rows"), ValueType::Tensor(crate::graph::TensorType { dtype, shape: None }));
    node.inputs[0] = Some(rows);
    node.outputs = vec![Some(made)];
    node.attributes.set("axis", -1i64);
    graph.add_node(Node {
        op: "Reshape".to_owned(),
        inputs: vec![Some(made), Some(shape)],
        outputs: vec![output],
        ..Node::default()
    })?;
    Ok(())
}

fn axes_to_input(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    ints_to_input(graph, node, "axes", 1)
}

fn split_to_input(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    ints_to_input(graph, node, "split", 1)
}

/// Equal parts are asked for by their number since opset 18.
fn count_outputs(_: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    if node.inputs.get(1).copied().flatten().is_none() {
        node.attributes.set("num_outputs", node.outputs.len() as i64);
    }
    Ok(())
}

fn output_half_pixel(_: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    node.attributes.set("coordinate_transformation_mode", "output_half_pixel");
    Ok(())
}

fn axis_to_input(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    let axis = node.attributes.int("axis", 1)?;
    let constant = graph.add_constant("axis", Tensor::scalar(axis));
    node.attributes.remove("axis");
    set_input(node, 2, constant);
    Ok(())
}

fn rename_modes(_: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    let mode = match node.attributes.string("mode", "bilinear")? {
        "bilinear" => "linear",
        "bicubic" => "cubic",
        "nearest" => "nearest",
        other => {
            return Err(OpError::attribute("mode", format!("is {other:?}, expected bilinear, bicubic or nearest")));
        }
    };
    node.attributes.set("mode", mode);
    Ok(())
}

/// Scale and bias had an element for each group; now they have one for each channel.
fn affine_by_channel(graph: &mut Graph, node: &mut Node) -> Result<(), OpError> {
    let x = data(node)?;
    let channels = graph.shape(x).and_then(|s| s.get(1)).and_then(Dim::known);
    let channels = channels
        .ok_or_else(|| OpError::shape(format!("the number of channels of {:?} must be known", graph.value(x).name)))?
        as i64;
    let groups = node.attributes.int("num_groups", 0)?;
    if groups < 1 || channels % groups != 0 {
        return Err(OpError::attribute(
            "num_groups",
            format!("is {groups}, which does not divide {channels} channels"),
        ));
    }
    for index in 1..=2 {
        let by_group = node.inputs.get(index).copied().flatten();
        let by_group = by_group.ok_or(OpError::MissingInput { index, expected: "scale or bias" })?;
        let mut reshape = |value, op, shape: &[i64]| -> Result<ValueId, OpError> {
            let shape = graph.add_constant("shape", Tensor::vector(shape));
            graph.op(op, &[value, shape], [])
        };
        let column = reshape(by_group, "Reshape", &[groups, 1])?;
        let repeated = reshape(column, "Expand", &[groups, channels / groups])?;
        node.inputs[index] = Some(reshape(repeated, "Reshape", &[channels])?);
    }
    Ok(())
}
