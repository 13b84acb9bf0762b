//! From nodes to convolution kernels.

use updraft_graph::op::conv::{ConvShape, weight_gradient_shape};
use updraft_graph::{DType, OpError};

use super::{Activation, Conv, ConvGeometry, ConvInputGradient, ConvWeightGradient, Epilogue};
use crate::cpu::build::{Build, Built};
use crate::cpu::kernel::{Io, Kernel, Pool};

/// Numbers of scratch beyond which a shape (absurd padding or dilation) is left to the reference.
const SCRATCH_MAX: usize = 1 << 28;

impl ConvGeometry {
    /// Of a convolution with up to three spatial axes and some work to do.
    pub(crate) fn of(shape: &ConvShape) -> Option<ConvGeometry> {
        let window = &shape.window;
        let rank = window.input.len();
        if !(1..=3).contains(&rank) || shape.output().contains(&0) || shape.input().contains(&0) {
            return None;
        }
        let three = |sizes: &[usize], fill: usize| {
            let mut all = [fill; 3];
            all[3 - rank..].copy_from_slice(sizes);
            all
        };
        Some(ConvGeometry {
            batch: shape.batch,
            groups: shape.groups,
            input_channels: shape.groups * shape.inputs_per_group,
            output_channels: shape.groups * shape.outputs_per_group,
            input: three(&window.input, 1),
            kernel: three(&window.kernel, 1),
            stride: three(&window.strides, 1),
            dilation: three(&window.dilations, 1),
            pad_begin: three(&window.pads_begin, 0),
            output: three(&window.output, 1),
        })
    }
}

/// Scratch of a kernel: what all workers share first, then each worker's own.
fn with_scratch(built: Built, shared: usize, own: usize) -> Option<Built> {
    // The builder asks for as much for each worker as the first one needs, shared numbers included; lines stay whole.
    let numbers = shared.checked_add(own)?.next_multiple_of(16);
    (numbers <= SCRATCH_MAX).then(|| built.scratch(numbers * size_of::<f32>()))
}

fn expect(what: &str, actual: &[usize], expected: &[usize]) -> Result<(), OpError> {
    if actual == expected {
        return Ok(());
    }
    Err(OpError::shape(format!("{what} has shape {actual:?}, expected {expected:?}")))
}

/// The input of a fused convolution that is added to its output.
pub(super) const RESIDUAL: usize = 3;

struct ConvKernel {
    conv: Conv,
    activation: Activation,
    /// The weights, where they are constant.
    packed: Option<Vec<f32>>,
}

impl Kernel for ConvKernel {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let scratch = io.scratch::<f32>();
        let operand = |index: usize| io.has(index).then(|| io.input(index));
        let epilogue = Epilogue { bias: operand(2), residual: operand(RESIDUAL), activation: self.activation };
        let (input, output) = (io.input(0), io.output(0));
        match &self.packed {
            Some(packed) => self.conv.run(pool, input, packed, epilogue, scratch, output),
            None => {
                let (packed, scratch) = scratch.split_at_mut(self.conv.packed_weights_len());
                self.conv.pack_weights(pool, io.input(1), packed);
                self.conv.run(pool, input, packed, epilogue, scratch, output);
            }
        }
        Ok(())
    }
}

/// Conv of f32.
pub(crate) fn conv(cx: &mut Build) -> Result<Option<Built>, OpError> {
    fused_conv(cx, Activation::None)
}

/// Conv of f32 whose kernel adds input [`RESIDUAL`], where there is one, and applies an activation.
pub(super) fn fused_conv(cx: &mut Build, activation: Activation) -> Result<Option<Built>, OpError> {
    if !cx.all_are(DType::F32) {
        return Ok(None);
    }
    let shape = ConvShape::of_conv(cx.attributes(), cx.shape(0), cx.shape(1))?;
    if cx.input(2).is_some() {
        expect("the bias", cx.shape(2), &shape.weight()[..1])?;
    }
    let Some(geometry) = ConvGeometry::of(&shape) else { return Ok(None) };
    let conv = Conv::new(geometry);
    let own = conv.scratch_len();
    let packed = match cx.constant(1) {
        Some(weights) => {
            let mut packed = vec![0.0; conv.packed_weights_len()];
            conv.pack_weights(&Pool { threads: 1 }, weights.as_slice()?, &mut packed);
            Some(packed)
        }
        None => None,
    };
    let shared = if packed.is_some() { 0 } else { conv.packed_weights_len() };
    Ok(with_scratch(Built::whole(ConvKernel { conv, activation, packed }), shared, own))
}

struct InputGradientKernel(ConvInputGradient);

impl Kernel for InputGradientKernel {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let (packed, scratch) = io.scratch::<f32>().split_at_mut(self.0.packed_weights_len());
        self.0.pack_weights(pool, io.input(1), packed);
        self.0.run(pool, io.input(0), packed, scratch, io.output(0));
        Ok(())
    }
}

/// ConvInputGradient of f32.
pub(crate) fn conv_input_gradient(cx: &mut Build) -> Result<Option<Built>, OpError> {
    if cx.dtype(0) != Some(DType::F32) || cx.dtype(1) != Some(DType::F32) {
        return Ok(None);
    }
    let shape = ConvShape::of_conv(cx.attributes(), cx.output_shape(0), cx.shape(1))?;
    expect("the gradient of the output", cx.shape(0), &shape.output())?;
    let Some(geometry) = ConvGeometry::of(&shape) else { return Ok(None) };
    let gradient = ConvInputGradient::new(geometry);
    let (shared, own) = (gradient.packed_weights_len(), gradient.scratch_len());
    Ok(with_scratch(Built::whole(InputGradientKernel(gradient)), shared, own))
}

struct WeightGradientKernel(ConvWeightGradient);

impl Kernel for WeightGradientKernel {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let (workspace, scratch) = io.scratch::<f32>().split_at_mut(self.0.workspace_len());
        self.0.run(pool, io.input(0), io.input(1), workspace, scratch, io.output(0));
        Ok(())
    }
}

/// ConvWeightGradient of f32.
pub(crate) fn conv_weight_gradient(cx: &mut Build) -> Result<Option<Built>, OpError> {
    if !cx.all_are(DType::F32) {
        return Ok(None);
    }
    let shape = weight_gradient_shape(cx.attributes(), cx.shape(0), cx.shape(1))?;
    expect("the gradient of the output", cx.shape(1), &shape.output())?;
    let Some(geometry) = ConvGeometry::of(&shape) else { return Ok(None) };
    let gradient = ConvWeightGradient::new(geometry);
    let (shared, own) = (gradient.workspace_len(), gradient.scratch_len());
    Ok(with_scratch(Built::whole(WeightGradientKernel(gradient)), shared, own))
}
