//! Steps in integers on their way into the plan.
//!
//! Activations of convolutions lie with channels last, which the kernels read without moving bytes. That is a matter of
//! strides: a convolution writes that way, what follows it keeps the layout of its input, and only who wants elements in
//! ONNX's order has them moved.

use updraft_graph::op::conv::ConvShape;
use updraft_graph::op::window::{Window, WindowSpec};
use updraft_graph::{DType, OpError};

use super::bytes::{BinaryBytes, MapBytes, PoolBytes, Pooling};
use super::linear::{Dynamic as DynamicOperands, Form, Linear};
use super::recognize::{IntegerStep, Work};
use super::{
    ActivationLayout, ActivationMatrix, ActivationProduct, Bytes, Dynamic, Finish, QuantizedConv, QuantizedProduct,
    Run, Weights,
};
use crate::cpu::build::{Build, Built};
use crate::cpu::conv::ConvGeometry;
use crate::cpu::copy;
use crate::cpu::kernel::{Io, Kernel, Pool};
use crate::cpu::layout::Layout;
use crate::cpu::lower::{Lowering, Static};

/// Lowers a step at the place of its last node.
pub(in crate::cpu) fn lower(cx: &mut Lowering<'_>, step: &IntegerStep) -> Result<(), OpError> {
    let (built, operands, layout) = match &step.work {
        Work::Linear(linear) => linear_step(cx, step, linear)?,
        Work::Activations { inputs, finish } => {
            let shape = cx.shape(step.output);
            let (a, b) = (cx.static_input(step.operands[0])?, cx.static_input(step.operands[1])?);
            let (batch, matrix) = shape.split_at(shape.len() - 2);
            let operand = |value: &Static, bytes: Bytes| {
                let rank = value.layout.shape.len();
                let full = [batch, &value.layout.shape[rank - 2..]].concat();
                let strides = value.layout.broadcast_to(&full).strides;
                let (batch, matrix) = strides.split_at(batch.len());
                ActivationMatrix { bytes, batch: batch.to_vec(), row: matrix[0], column: matrix[1] }
            };
            let depth = a.layout.shape.last().copied().unwrap_or(1);
            let (left, right) = (operand(&a, inputs[0]), operand(&b, inputs[1]));
            let product = ActivationProduct::new(batch, [matrix[0], depth, matrix[1]], left, right, finish.clone())?;
            let scratch = product.scratch_bytes();
            (Built::whole(ActivationKernel(product)).scratch(scratch), vec![a, b], Layout::contiguous(&shape))
        }
        Work::Table(table) => {
            let (input, layout) = dense(cx, step.operands[0])?;
            (Built::whole(MapBytes(table.clone())), vec![input], layout)
        }
        Work::Binary(binary) => {
            let (first, layout) = dense(cx, step.operands[0])?;
            let second = cx.arranged(step.operands[1], &layout)?;
            // Moving the second may have moved the first, if it is the same value.
            let first = if step.operands[0] == step.operands[1] { second.clone() } else { first };
            (Built::whole(BinaryBytes::new(binary)), vec![first, second], layout)
        }
        Work::AveragePool(node, input, output) => {
            let x = channels_last(cx, step.operands[0])?;
            let shape = cx.shape(step.output);
            let (window, counts) = windows_of(cx.graph().node(*node), &x.layout.shape)?;
            let pooling = Pooling::average(input, output, &counts);
            let kernel = PoolBytes::new(&window, x.layout.shape[0], x.layout.shape[1], pooling);
            let scratch = kernel.scratch_bytes();
            (Built::whole(kernel).scratch(scratch), vec![x], Layout::channels_last(&shape))
        }
    };
    let dtype = cx.graph().dtype(step.output).unwrap_or(DType::U8);
    let made = cx.make(step.output, dtype, layout);
    let graph = cx.graph();
    let labels: Vec<String> = step.nodes.iter().map(|id| graph.node(*id).label(graph)).collect();
    let ops: Vec<&str> = step.nodes.iter().map(|id| graph.node(*id).op.as_str()).collect();
    let inputs = operands.into_iter().map(Some).collect();
    cx.add_built(labels.join(" + "), ops.join("+"), inputs, vec![Some(made)], built);
    cx.read_each(&step.operands);
    Ok(())
}

/// Lowers nodes that move or compare codes; `false` where the node is none of these.
pub(in crate::cpu) fn lower_moves(cx: &mut Lowering<'_>, build: &Build) -> Result<bool, OpError> {
    let node = build.view.node;
    let Some(Some(output)) = node.outputs.first().copied() else { return Ok(false) };
    let shape = cx.shape(output);
    let is_byte = build.inputs.iter().flatten().all(|o| matches!(o.dtype, DType::U8 | DType::I8));
    if !node.domain.is_empty() || !is_byte || node.outputs.len() != 1 || !(3..=5).contains(&shape.len()) {
        return Ok(false);
    }
    let values: Vec<_> = node.inputs.iter().flatten().copied().collect();
    let (inputs, built) = match node.op.as_str() {
        "MaxPool" => {
            let window = WindowSpec::of_pool(&node.attributes)?.resolve(&build.shape(0)[2..])?;
            if !PoolBytes::covers(&window) {
                return Ok(false);
            }
            let x = channels_last(cx, values[0])?;
            let signed = x.dtype == DType::I8;
            let kernel = PoolBytes::new(&window, shape[0], shape[1], Pooling::Max { signed });
            let scratch = kernel.scratch_bytes();
            (vec![x], Built::whole(kernel).scratch(scratch))
        }
        "Concat" => {
            let layouts: Vec<&Layout> = build.inputs.iter().flatten().map(|o| &o.layout).collect();
            let is_last = |l: &&Layout| l.is_like(&Layout::channels_last(&l.shape));
            if node.attributes.int("axis", 0)? != 1 || !layouts.iter().all(is_last) {
                return Ok(false);
            }
            let order = Layout::channels_last(&shape).storage_order();
            let permuted: Vec<Layout> = layouts.iter().map(|l| Layout { offset: 0, ..l.permuted(&order) }).collect();
            let sizes: Vec<usize> = order.iter().map(|axis| shape[*axis]).collect();
            let built = copy::concat_layouts(&permuted, &sizes, sizes.len() - 1, 1);
            let inputs = values.iter().map(|v| cx.static_input(*v)).collect::<Result<_, _>>()?;
            (inputs, built)
        }
        _ => return Ok(false),
    };
    let dtype = cx.graph().dtype(output).unwrap_or(DType::U8);
    let made = cx.make(output, dtype, Layout::channels_last(&shape));
    let label = node.label(cx.graph());
    let inputs = inputs.into_iter().map(Some).collect();
    cx.add_built(label, node.op.clone(), inputs, vec![Some(made)], built);
    cx.read_each(&values);
    Ok(true)
}

/// A value without gaps, and the layout that its elements have in memory.
fn dense(cx: &mut Lowering<'_>, value: updraft_graph::ValueId) -> Result<(Static, Layout), OpError> {
    let found = cx.static_input(value)?;
    let layout = match found.layout.dense() {
        Some(layout) => layout,
        None => Layout::contiguous(&found.layout.shape),
    };
    Ok((cx.arranged(value, &layout)?, layout))
}

fn channels_last(cx: &mut Lowering<'_>, value: updraft_graph::ValueId) -> Result<Static, OpError> {
    let shape = cx.static_input(value)?.layout.shape;
    cx.arranged(value, &Layout::channels_last(&shape))
}

/// The windows of an average over this shape, and how many elements each counts.
pub(super) fn windows_of(node: &updraft_graph::Node, shape: &[usize]) -> Result<(Window, Vec<f64>), OpError> {
    if node.op == "AveragePool" {
        let window = WindowSpec::of_pool(&node.attributes)?.resolve(&shape[2..])?;
        let counts = window.averaged_counts(node.attributes.flag("count_include_pad", false)?);
        return Ok((window, counts));
    }
    let mut attributes = updraft_graph::Attributes::new();
    let kernel: Vec<i64> = shape[2..].iter().map(|n| *n as i64).collect();
    attributes.set("kernel_shape", kernel);
    let window = WindowSpec::of_pool(&attributes)?.resolve(&shape[2..])?;
    let counts = window.averaged_counts(false);
    Ok((window, counts))
}

/// The geometry of a convolution, where kernels cover it.
pub(super) fn geometry(node: &updraft_graph::Node, input: &[usize], weights: &[usize]) -> Option<ConvGeometry> {
    ConvGeometry::of(&ConvShape::of_conv(&node.attributes, input, weights).ok()?)
}

fn linear_step(
    cx: &mut Lowering<'_>,
    step: &IntegerStep,
    linear: &Linear,
) -> Result<(Built, Vec<Static>, Layout), OpError> {
    let graph = cx.graph();
    let shape = cx.shape(step.output);
    let missing = || OpError::value("weights are not constant");
    let codes = graph.value(linear.weights.codes).constant().ok_or_else(missing)?;
    let weights =
        Weights { values: codes.bytes(), signed: linear.weights.signed, zero_points: &linear.weights.zero_points };
    let (bias, finish) = (&linear.bias, linear.finish.clone());
    let mut operands = Vec::new();
    let (plan, layout) = match linear.form {
        Form::Conv => {
            let input = cx.static_input(step.operands[0])?;
            let geometry = geometry(graph.node(linear.node), &input.layout.shape, codes.shape())
                .ok_or_else(|| OpError::shape("a convolution of more than three axes"))?;
            let last = Layout::channels_last(&input.layout.shape);
            let (from, input) = if input.layout.is_contiguous() && !input.layout.is_like(&last) {
                (ActivationLayout::ChannelsFirst, input)
            } else {
                (ActivationLayout::ChannelsLast, cx.arranged(step.operands[0], &last)?)
            };
            operands.push(input);
            // Floats and sums go to operators that want ONNX's order.
            let (to, layout) = match finish {
                Finish::Requantize(_) => (ActivationLayout::ChannelsLast, Layout::channels_last(&shape)),
                _ => (ActivationLayout::ChannelsFirst, Layout::contiguous(&shape)),
            };
            let conv = QuantizedConv::new(geometry, (from, linear.input), weights, bias, finish, to)?;
            (Plan::Conv(conv), layout)
        }
        Form::Product(order) => {
            let input = cx.static_input(step.operands[0])?.layout.shape;
            operands.push(cx.arranged(step.operands[0], &Layout::contiguous(&input))?);
            let depth = input.last().copied().unwrap_or(1);
            let rows = input[..input.len().saturating_sub(1)].iter().product();
            let columns = codes.len() / depth.max(1);
            let product = QuantizedProduct::new([rows, depth, columns], linear.input, weights, order, bias, finish)?;
            (Plan::Product(product), Layout::contiguous(&shape))
        }
    };
    for value in &step.operands[1..] {
        let found = cx.static_input(*value)?;
        let is_residual = found.layout.shape == layout.shape;
        operands.push(if is_residual { cx.arranged(*value, &layout)? } else { found });
    }
    let scratch = match &plan {
        Plan::Conv(conv) => conv.scratch_bytes(),
        Plan::Product(product) => product.scratch_bytes(),
    };
    let is_dynamic = linear.dynamic != DynamicOperands::default();
    let kernel = LinearKernel {
        plan,
        zero_point: linear.input.zero_point,
        signed: linear.input.signed,
        dynamic: is_dynamic.then_some(linear.dynamic),
        residual: (!is_dynamic && operands.len() > 1).then_some(1),
    };
    Ok((Built::whole(kernel).scratch(scratch), operands, layout))
}

struct ActivationKernel(ActivationProduct);

impl Kernel for ActivationKernel {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let (left, right, scratch) = (io.input::<u8>(0), io.input::<u8>(1), io.scratch::<u8>());
        self.0.run(pool, left, right, scratch, io.output::<u8>(0));
        Ok(())
    }
}

enum Plan {
    Conv(QuantizedConv),
    Product(QuantizedProduct),
}

struct LinearKernel {
    plan: Plan,
    zero_point: i32,
    signed: bool,
    dynamic: Option<DynamicOperands>,
    residual: Option<usize>,
}

impl Kernel for LinearKernel {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let dynamic = self.dynamic.map(|operands| {
            let zero_point = operands.zero_point.map_or(self.zero_point, |index| match self.signed {
                true => i32::from(io.input::<i8>(index).first().copied().unwrap_or(0)),
                false => i32::from(io.input::<u8>(index).first().copied().unwrap_or(0)),
            });
            let scale = operands.scale.map_or(1.0, |index| io.input::<f32>(index).first().copied().unwrap_or(1.0));
            Dynamic { zero_point, scale }
        });
        let residual = self.residual.map_or(&[][..], |index| io.input::<u8>(index));
        let input = io.input::<u8>(0);
        let (scratch, output) = (io.scratch::<u8>(), io.output::<u8>(0));
        let run = Run { input, dynamic, residual, scratch, output };
        match &self.plan {
            Plan::Conv(conv) => conv.run(pool, run),
            Plan::Product(product) => product.run(pool, run),
        }
        Ok(())
    }
}
