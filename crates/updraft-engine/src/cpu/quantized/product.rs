//! Quantized matrix products: rows of activations times constant weights.

use updraft_graph::OpError;

use super::{ActivationLayout, Bytes, Finish, QuantizedConv, Run, Weights};
use crate::cpu::conv::ConvGeometry;
use crate::cpu::kernel::Pool;

/// How the weights of a product lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WeightOrder {
    /// `[depth, columns]`, the right operand of a MatMul.
    DepthFirst,
    /// `[columns, depth]`, that of a Gemm with `transB`.
    ColumnsFirst,
}

/// `[rows, depth]` bytes times constant `[depth, columns]` weights; columns are the output channels of [`Finish`].
pub(crate) struct QuantizedProduct(QuantizedConv);

impl QuantizedProduct {
    /// Plans it. The bias is empty or one number for each column, of scale (input times weights) and added to the sums.
    ///
    /// # Errors
    /// If numbers of weights, zero points, biases or multipliers do not fit the shape.
    pub(crate) fn new(
        [rows, depth, columns]: [usize; 3],
        input: Bytes,
        weights: Weights<'_>,
        order: WeightOrder,
        bias: &[i32],
        finish: Finish,
    ) -> Result<QuantizedProduct, OpError> {
        // A product is a convolution of one tap, its rows the positions.
        let geometry = ConvGeometry {
            batch: 1,
            groups: 1,
            input_channels: depth,
            output_channels: columns,
            input: [1, 1, rows],
            kernel: [1; 3],
            stride: [1; 3],
            dilation: [1; 3],
            pad_begin: [0; 3],
            output: [1, 1, rows],
        };
        let last = ActivationLayout::ChannelsLast;
        let transposed: Vec<u8>;
        let values = match order {
            WeightOrder::ColumnsFirst => weights.values,
            WeightOrder::DepthFirst => {
                transposed = (0..weights.values.len())
                    .map(|i| weights.values[(i % depth * columns + i / depth).min(weights.values.len() - 1)])
                    .collect();
                &transposed
            }
        };
        let conv = QuantizedConv::new(geometry, (last, input), Weights { values, ..weights }, bias, finish, last)?;
        Ok(QuantizedProduct(conv))
    }

    /// Bytes of scratch for each worker.
    pub(crate) fn scratch_bytes(&self) -> usize {
        self.0.scratch_bytes()
    }

    /// Computes the output, `[rows, columns]`.
    ///
    /// # Panics
    /// If a slice is not of the planned length.
    pub(crate) fn run(&self, pool: &Pool, run: Run<'_>) {
        self.0.run(pool, run);
    }
}
