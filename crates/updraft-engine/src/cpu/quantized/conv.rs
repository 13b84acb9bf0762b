//! Quantized convolutions for 1, 2 or 3 spatial dimensions, any groups, strides, dilations and padding.
//!
//! The kernels multiply unsigned activations with signed weights: where a type is the other one, bytes change by 128, and so
//! do zero points. Activations are taken as they are, without their zero point: as
//! `Σ (x - z) * w = Σ x * w - z * Σ w`, it goes into what a sum begins with, together with the bias. Padding is done with
//! the input's zero point, which is what a padded zero is as a byte.

use updraft_graph::OpError;

use super::dense::{Dense, DenseRun};
use super::depthwise::{Depthwise, DepthwiseRun};
use super::dot::{DotIsa, LANES};
use super::finish::Finisher;
use super::transpose::transpose_images;
use super::{ActivationLayout, Bytes, Finish, Run, Weights, expect, expect_multipliers};
use crate::cpu::conv::ConvGeometry;
use crate::cpu::kernel::Pool;

/// A convolution of bytes, of one shape and with constant weights.
pub(crate) struct QuantizedConv {
    geometry: ConvGeometry,
    input: (ActivationLayout, Bytes),
    output: ActivationLayout,
    kernel: Kernel,
    bias: Vec<i32>,
    /// `Σ (w - zero point)` of each output channel, modulo 2^32.
    weight_sums: Vec<i32>,
    /// Of each output channel, for weights made signed; empty if all are zero.
    weight_zero_points: Vec<i32>,
    /// What the sums begin with, as the kernel wants it, for the planned zero point of the input.
    addends: Vec<i32>,
    finisher: Finisher,
}

enum Kernel {
    Dense(Dense),
    Depthwise(Depthwise),
}

impl QuantizedConv {
    /// Plans it. The bias is empty or one number for each output channel, of scale (input times weights) and added to the sums.
    ///
    /// # Errors
    /// If numbers of weights, zero points, biases or multipliers do not fit the geometry.
    pub(crate) fn new(
        geometry: ConvGeometry,
        input: (ActivationLayout, Bytes),
        weights: Weights<'_>,
        bias: &[i32],
        finish: Finish,
        output: ActivationLayout,
    ) -> Result<QuantizedConv, OpError> {
        QuantizedConv::with_isa(DotIsa::detected(), geometry, input, weights, bias, finish, output)
    }

    pub(super) fn with_isa(
        isa: DotIsa,
        geometry: ConvGeometry,
        input: (ActivationLayout, Bytes),
        weights: Weights<'_>,
        bias: &[i32],
        finish: Finish,
        output: ActivationLayout,
    ) -> Result<QuantizedConv, OpError> {
        let channels = geometry.output_channels;
        expect("weights", weights.values.len(), &[geometry.weights_len()])?;
        expect("zero points of weights", weights.zero_points.len(), &[1, channels])?;
        expect("biases", bias.len(), &[0, channels])?;
        expect_multipliers(&finish, channels)?;
        let (flip, lowered) = if weights.signed { (0, 0) } else { (0x80, 128) };
        let zero_points: Vec<i32> = (0..channels)
            .map(|c| weights.zero_points[if weights.zero_points.len() == 1 { 0 } else { c }] - lowered)
            .collect();
        let per_channel = geometry.weights_len() / channels.max(1);
        let number = |byte: u8| (byte ^ flip) as i8;
        let weight_sums = (0..channels)
            .map(|c| {
                let weights = &weights.values[c * per_channel..][..per_channel];
                weights.iter().fold(0i32, |sum, w| sum.wrapping_add(i32::from(number(*w)) - zero_points[c]))
            })
            .collect();
        let weight_zero_points = if zero_points.iter().all(|z| *z == 0) { Vec::new() } else { zero_points };
        let taps: usize = geometry.kernel.iter().product();
        let kernel = if weight_zero_points.is_empty() && Depthwise::covers(&geometry) {
            let weight = |channel: usize, tap: usize| number(weights.values[channel * taps + tap]);
            Kernel::Depthwise(Depthwise::new(isa, &geometry, input.1, weight))
        } else {
            let weight = |output: usize, input: usize, tap: usize| {
                number(weights.values[output * per_channel + input * taps + tap])
            };
            Kernel::Dense(Dense::new(isa, &geometry, input.1, weight))
        };
        let mut conv = QuantizedConv {
            finisher: Finisher::new(isa, finish, channels),
            bias: bias.to_vec(),
            geometry,
            input,
            output,
            kernel,
            weight_sums,
            weight_zero_points,
            addends: Vec::new(),
        };
        conv.addends = conv.addends(input.1.zero_point);
        Ok(conv)
    }

    /// The input's zero point as the kernel sees it.
    fn unsigned_zero_point(&self, zero_point: i32) -> i32 {
        zero_point + if self.input.1.signed { 128 } else { 0 }
    }

    /// What the sums begin with.
    fn addends(&self, zero_point: i32) -> Vec<i32> {
        let zero_point = self.unsigned_zero_point(zero_point);
        let of_channel = |channel: usize| {
            let bias = self.bias.get(channel).copied().unwrap_or(0);
            bias.wrapping_sub(zero_point.wrapping_mul(self.weight_sums[channel]))
        };
        match &self.kernel {
            Kernel::Dense(dense) => {
                let mut addends = vec![0; dense.addends_len()];
                dense.place_addends(of_channel, &mut addends);
                addends
            }
            Kernel::Depthwise(_) => {
                let mut addends = vec![0; self.geometry.output_channels.next_multiple_of(LANES)];
                addends.iter_mut().zip(0..self.geometry.output_channels).for_each(|(to, c)| *to = of_channel(c));
                addends
            }
        }
    }

    /// Bytes for input, residual and output with their channels last, where they are not.
    fn shared_bytes(&self) -> [usize; 3] {
        let first = ActivationLayout::ChannelsFirst;
        let input = if self.input.0 == first { self.geometry.input_len() } else { 0 };
        let output = if self.output == first { self.output_bytes() } else { 0 };
        let residual = if self.finisher.adds_residual() { output } else { 0 };
        [input, residual, output].map(|bytes| bytes.next_multiple_of(64))
    }

    fn output_bytes(&self) -> usize {
        self.geometry.output_len() * self.finisher.element_bytes()
    }

    /// Bytes of scratch for each worker.
    pub(crate) fn scratch_bytes(&self) -> usize {
        let own = match &self.kernel {
            Kernel::Dense(dense) => dense.scratch_bytes(),
            Kernel::Depthwise(depthwise) => depthwise.scratch_bytes(),
        };
        // The first worker's share holds what all of them read and write.
        self.shared_bytes().iter().sum::<usize>() + own.next_multiple_of(64)
    }

    /// Computes the output.
    ///
    /// # Panics
    /// If a slice is not of the planned length.
    pub(crate) fn run(&self, pool: &Pool, run: Run<'_>) {
        let g = &self.geometry;
        let adds_residual = self.finisher.adds_residual();
        assert_eq!(run.input.len(), g.input_len());
        assert_eq!(run.output.len(), self.output_bytes());
        assert!(!adds_residual || run.residual.len() == g.output_len());
        let [input_bytes, residual_bytes, output_bytes] = self.shared_bytes();
        let (input_last, scratch) = run.scratch.split_at_mut(input_bytes);
        let (residual_last, scratch) = scratch.split_at_mut(residual_bytes);
        let (output_last, scratch) = scratch.split_at_mut(output_bytes);
        let (input_volume, output_volume) = (g.input.iter().product(), g.output.iter().product());
        let Run { mut input, dynamic, mut residual, output, .. } = run;
        if self.input.0 == ActivationLayout::ChannelsFirst {
            let to = &mut input_last[..input.len()];
            transpose_images::<1>(pool, [g.input_channels, input_volume], input, to);
            input = to;
        }
        if self.output == ActivationLayout::ChannelsLast {
            return self.run_last(pool, Run { input, dynamic, residual, scratch, output });
        }
        if adds_residual {
            let to = &mut residual_last[..residual.len()];
            transpose_images::<1>(pool, [g.output_channels, output_volume], residual, to);
            residual = to;
        }
        let made = &mut output_last[..output.len()];
        self.run_last(pool, Run { input, dynamic, residual, scratch, output: made });
        match self.finisher.element_bytes() {
            1 => transpose_images::<1>(pool, [output_volume, g.output_channels], made, output),
            _ => transpose_images::<4>(pool, [output_volume, g.output_channels], made, output),
        }
    }

    /// Computes the output with all channels last.
    fn run_last(&self, pool: &Pool, run: Run<'_>) {
        if run.output.is_empty() {
            return;
        }
        let Run { input, dynamic, residual, scratch, output } = run;
        let zero_point = dynamic.map_or(self.input.1.zero_point, |d| d.zero_point);
        let padding = self.unsigned_zero_point(zero_point) as u8;
        let (made_addends, scaled);
        let (addends, finisher) = match dynamic {
            None => (&self.addends, &self.finisher),
            Some(dynamic) => {
                made_addends = self.addends(dynamic.zero_point);
                scaled = self.finisher.scaled(dynamic.scale);
                (&made_addends, &scaled)
            }
        };
        match &self.kernel {
            Kernel::Dense(dense) => {
                let zero_points = self.weight_zero_points.as_slice();
                let weight_zero_points = (!zero_points.is_empty()).then_some(zero_points);
                let run = DenseRun { input, padding, addends, weight_zero_points, finisher, residual };
                dense.run(pool, &run, scratch, output);
            }
            Kernel::Depthwise(depthwise) => {
                depthwise.run(pool, &DepthwiseRun { input, padding, addends, finisher, residual }, scratch, output);
            }
        }
    }
}
