//! Quantized convolutions for 1, 2 or 3 spatial dimensions, any groups, strides, dilations and padding.
//!
//! Padding is done with the input's zero point, which is what a padded zero is as a byte.

use updraft_graph::OpError;

use super::{ActivationLayout, Bytes, Finish, Requantize, Run, Weights};
use crate::cpu::conv::ConvGeometry;
use crate::cpu::kernel::Pool;

/// A convolution of bytes, of one shape and with constant weights.
pub(crate) struct QuantizedConv {
    geometry: ConvGeometry,
    input: (ActivationLayout, Bytes),
    output: ActivationLayout,
    weights: Vec<i32>,
    bias: Vec<i32>,
    finish: Finish,
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
        let channels = geometry.output_channels;
        expect("weights", weights.values.len(), &[geometry.weights_len()])?;
        expect("zero points of weights", weights.zero_points.len(), &[1, channels])?;
        expect("bias", bias.len(), &[0, channels])?;
        match &finish {
            Finish::Sums => {}
            Finish::Dequantize { multipliers, bias } => {
                expect("multipliers", multipliers.len(), &[1, channels])?;
                expect("bias", bias.len(), &[0, channels])?;
            }
            Finish::Requantize(to) => expect("multipliers", to.multipliers.len(), &[1, channels])?,
        }
        let per_channel = geometry.weights_len() / channels.max(1);
        let weights = weights
            .values
            .iter()
            .enumerate()
            .map(|(i, byte)| number(*byte, weights.signed) - each(weights.zero_points, i / per_channel))
            .collect();
        Ok(QuantizedConv { geometry, input, output, weights, bias: bias.to_vec(), finish })
    }

    /// Bytes of scratch for each worker.
    pub(crate) fn scratch_bytes(&self) -> usize {
        0
    }

    /// Computes the output.
    ///
    /// # Panics
    /// If a slice is not of the planned length.
    pub(crate) fn run(&self, pool: &Pool, run: Run<'_>) {
        let geometry = &self.geometry;
        let size = if matches!(self.finish, Finish::Requantize(_)) { 1 } else { 4 };
        assert_eq!(run.input.len(), geometry.input_len());
        assert_eq!(run.output.len(), geometry.output_len() * size);
        let volume: usize = geometry.output.iter().product();
        let channels = geometry.output_channels;
        pool.for_each_chunk(run.output, size, |index, to| {
            let (image, channel, position) = match self.output {
                ActivationLayout::ChannelsFirst => {
                    (index / volume / channels, index / volume % channels, index % volume)
                }
                ActivationLayout::ChannelsLast => {
                    (index / channels / volume, index % channels, index / channels % volume)
                }
            };
            let zero_point = run.dynamic.map_or(self.input.1.zero_point, |d| d.zero_point);
            let sum = self.sum(run.input, zero_point, image, channel, position);
            let scale = run.dynamic.map_or(1.0, |d| d.scale);
            match &self.finish {
                Finish::Sums => to.copy_from_slice(&sum.to_ne_bytes()),
                Finish::Dequantize { multipliers, bias } => {
                    let bias = bias.get(channel).copied().unwrap_or(0.0);
                    let value = sum as f32 * (each(multipliers, channel) * scale) + bias;
                    to.copy_from_slice(&value.to_ne_bytes());
                }
                Finish::Requantize(requantize) => {
                    to[0] =
                        byte(requantize, each(&requantize.multipliers, channel) * scale, sum, run.residual.get(index))
                }
            }
        });
    }

    fn sum(&self, input: &[u8], zero_point: i32, image: usize, channel: usize, position: usize) -> i32 {
        let ConvGeometry { groups, kernel, stride, dilation, pad_begin, output, .. } = &self.geometry;
        let (inputs, outputs) = (self.geometry.input_channels / groups, self.geometry.output_channels / groups);
        let [_, height, width] = self.geometry.input;
        let volume: usize = self.geometry.input.iter().product();
        let at = [position / (output[1] * output[2]), position / output[2] % output[1], position % output[2]];
        let taps: usize = kernel.iter().product();
        let mut sum = self.bias.get(channel).copied().unwrap_or(0);
        for tap in 0..taps {
            let tap_at = [tap / (kernel[1] * kernel[2]), tap / kernel[2] % kernel[1], tap % kernel[2]];
            let from: [usize; 3] = std::array::from_fn(|axis| {
                (at[axis] * stride[axis] + tap_at[axis] * dilation[axis]).wrapping_sub(pad_begin[axis])
            });
            if (0..3).any(|axis| from[axis] >= self.geometry.input[axis]) {
                continue;
            }
            let from = (from[0] * height + from[1]) * width + from[2];
            for i in 0..inputs {
                let channel_in = channel / outputs * inputs + i;
                let index = match self.input.0 {
                    ActivationLayout::ChannelsFirst => (image * inputs * groups + channel_in) * volume + from,
                    ActivationLayout::ChannelsLast => (image * volume + from) * inputs * groups + channel_in,
                };
                let x = number(input[index], self.input.1.signed) - zero_point;
                sum = sum.wrapping_add(x * self.weights[(channel * inputs + i) * taps + tap]);
            }
        }
        sum
    }
}

fn byte(to: &Requantize, multiplier: f32, sum: i32, residual: Option<&u8>) -> u8 {
    let mut value = sum as f32 * multiplier;
    if let (Some(residual), Some(byte)) = (&to.residual, residual) {
        if let Some(rounded) = residual.rounded {
            value = value.clamp(rounded.min as f32, rounded.max as f32).round_ties_even() * rounded.multiplier;
        }
        value += (number(*byte, residual.bytes.signed) - residual.bytes.zero_point) as f32 * residual.multiplier;
    }
    let (min, max) = (to.min - to.output.zero_point, to.max - to.output.zero_point);
    (value.clamp(min as f32, max as f32).round_ties_even() as i32 + to.output.zero_point) as u8
}

fn number(byte: u8, signed: bool) -> i32 {
    if signed { i32::from(byte as i8) } else { i32::from(byte) }
}

fn each<T: Copy>(values: &[T], channel: usize) -> T {
    values[if values.len() == 1 { 0 } else { channel }]
}

fn expect(what: &str, actual: usize, expected: &[usize]) -> Result<(), OpError> {
    if expected.contains(&actual) {
        return Ok(());
    }
    Err(OpError::shape(format!("{actual} {what}, expected one of {expected:?}")))
}
