//! Layers: a graph under construction with the key that weights are drawn from.

use updraft_base::random::{Key, fill_normal, fill_uniform};

use crate::attribute::{Attribute, Attributes};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Graph, ValueId, ValueType};
use crate::op::OpError;
use crate::tensor::{Tensor, element_count};

/// How a parameter starts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Init {
    Constant(f32),
    /// Normal with this standard deviation.
    Normal(f32),
    /// Uniform between minus and plus this.
    Uniform(f32),
}

/// Where a convolution's window goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Conv {
    pub(super) channels: usize,
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) pad: usize,
    pub(super) groups: usize,
    pub(super) bias: bool,
}

impl Conv {
    /// A `kernel x kernel` convolution that keeps the size at stride 1, without bias.
    pub(super) fn same(channels: usize, kernel: usize, stride: usize) -> Conv {
        Conv { channels, kernel, stride, pad: kernel / 2, groups: 1, bias: false }
    }
}

/// A network under construction. Layer names are parameter names without their last part.
pub(super) struct Net {
    pub(super) graph: Graph,
    key: Key,
}

impl Net {
    pub(super) fn new(key: Key) -> Net {
        Net { graph: Graph::new(""), key }
    }

    pub(super) fn input(&mut self, name: &str, dtype: DType, shape: Vec<Dim>) -> Result<ValueId, OpError> {
        Ok(self.graph.add_input(name, ValueType::tensor(dtype, shape))?)
    }

    /// Names a value and makes it an output; the network is done when the last is named.
    pub(super) fn output(&mut self, name: &str, value: ValueId) -> Result<(), OpError> {
        self.graph.rename(value, name)?;
        self.graph.push_output(value);
        Ok(())
    }

    pub(super) fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<ValueId, OpError> {
        let count =
            element_count(shape).ok_or_else(|| OpError::shape(format!("{name} of shape {shape:?} is too large")))?;
        let mut tensor = Tensor::zeros(DType::F32, shape)?;
        let weights = tensor.as_mut_slice::<f32>()?;
        debug_assert_eq!(weights.len(), count);
        let key = self.key.child(name);
        match init {
            Init::Constant(v) => weights.fill(v),
            Init::Normal(deviation) => {
                fill_normal(&key, 0, weights);
                weights.iter_mut().for_each(|w| *w *= deviation);
            }
            Init::Uniform(bound) => {
                fill_uniform(&key, 0, weights);
                weights.iter_mut().for_each(|w| *w = (*w * 2.0 - 1.0) * bound);
            }
        }
        let id = self.graph.add_value(name, ValueType::Unknown)?;
        self.graph.set_constant(id, Some(tensor));
        Ok(id)
    }

    /// States the shape of a value of `f32` that inference cannot find.
    pub(super) fn declare(&mut self, value: ValueId, shape: Vec<Dim>) {
        self.graph.set_type(value, ValueType::tensor(DType::F32, shape));
    }

    /// A constant that is not a parameter.
    pub(super) fn literal(&mut self, tensor: Tensor) -> Result<ValueId, OpError> {
        self.op("Constant", &[], [("value", tensor.into())])
    }

    pub(super) fn ints(&mut self, values: &[i64]) -> Result<ValueId, OpError> {
        self.literal(Tensor::vector(values))
    }

    pub(super) fn op<const N: usize>(
        &mut self,
        op: &str,
        inputs: &[ValueId],
        attributes: [(&str, Attribute); N],
    ) -> Result<ValueId, OpError> {
        self.graph.op(op, inputs, Attributes::from(attributes))
    }

    fn features(&self, x: ValueId, axis: usize, layer: &str) -> Result<usize, OpError> {
        self.graph
            .shape(x)
            .and_then(|s| s.get(axis))
            .and_then(Dim::known)
            .ok_or_else(|| OpError::shape(format!("{layer} needs to know the size of axis {axis} of its input")))
    }

    /// `x [.., in] -> [.., features]`; PyTorch's default initialisation where `init` is none.
    pub(super) fn linear(
        &mut self,
        x: ValueId,
        layer: &str,
        features: usize,
        bias: bool,
        init: Option<Init>,
    ) -> Result<ValueId, OpError> {
        let rank = self.graph.shape(x).map_or(0, <[Dim]>::len);
        if rank == 0 {
            return Err(OpError::shape(format!("{layer} needs to know the rank of its input")));
        }
        let fan_in = self.features(x, rank - 1, layer)?;
        let default = Init::Uniform(1.0 / (fan_in as f32).sqrt());
        let weight = self.parameter(&format!("{layer}.weight"), &[fan_in, features], init.unwrap_or(default))?;
        if !bias {
            return self.op("MatMul", &[x, weight], []);
        }
        let bias_init = if init.is_some() { Init::Constant(0.0) } else { default };
        let bias = self.parameter(&format!("{layer}.bias"), &[features], bias_init)?;
        if rank == 2 {
            return self.op("Gemm", &[x, weight, bias], []);
        }
        let product = self.op("MatMul", &[x, weight], [])?;
        self.op("Add", &[product, bias], [])
    }

    /// `x [N, in, H, W] -> [N, channels, H', W']`, Kaiming-normal weights by fan-out (He et al., 2015).
    pub(super) fn conv(&mut self, x: ValueId, layer: &str, conv: Conv) -> Result<ValueId, OpError> {
        let channels_in = self.features(x, 1, layer)?;
        let k = conv.kernel;
        let fan_out = (conv.channels * k * k / conv.groups) as f32;
        let shape = [conv.channels, channels_in / conv.groups, k, k];
        let mut inputs =
            vec![x, self.parameter(&format!("{layer}.weight"), &shape, Init::Normal((2.0 / fan_out).sqrt()))?];
        if conv.bias {
            inputs.push(self.parameter(&format!("{layer}.bias"), &[conv.channels], Init::Constant(0.0))?);
        }
        self.op(
            "Conv",
            &inputs,
            [
                ("kernel_shape", [k as i64; 2].into()),
                ("strides", [conv.stride as i64; 2].into()),
                ("pads", [conv.pad as i64; 4].into()),
                ("group", (conv.groups as i64).into()),
            ],
        )
    }

    /// Batch normalisation over axis 1, scale starting at `scale`.
    pub(super) fn batch_norm(&mut self, x: ValueId, layer: &str, scale: f32) -> Result<ValueId, OpError> {
        let channels = [self.features(x, 1, layer)?];
        let inputs = [
            x,
            self.parameter(&format!("{layer}.weight"), &channels, Init::Constant(scale))?,
            self.parameter(&format!("{layer}.bias"), &channels, Init::Constant(0.0))?,
            self.parameter(&format!("{layer}.running_mean"), &channels, Init::Constant(0.0))?,
            self.parameter(&format!("{layer}.running_var"), &channels, Init::Constant(1.0))?,
        ];
        self.op("BatchNormalization", &inputs, [("epsilon", 1e-5f32.into()), ("momentum", 0.9f32.into())])
    }

    /// Layer normalisation over the last axis.
    pub(super) fn layer_norm(&mut self, x: ValueId, layer: &str, epsilon: f32, bias: bool) -> Result<ValueId, OpError> {
        let rank = self.graph.shape(x).map_or(0, <[Dim]>::len);
        let features = [self.features(x, rank.saturating_sub(1), layer)?];
        let mut inputs = vec![x, self.parameter(&format!("{layer}.weight"), &features, Init::Constant(1.0))?];
        if bias {
            inputs.push(self.parameter(&format!("{layer}.bias"), &features, Init::Constant(0.0))?);
        }
        self.op("LayerNormalization", &inputs, [("axis", (-1i64).into()), ("epsilon", epsilon.into())])
    }

    pub(super) fn relu(&mut self, x: ValueId) -> Result<ValueId, OpError> {
        self.op("Relu", &[x], [])
    }

    pub(super) fn max_pool(
        &mut self,
        x: ValueId,
        kernel: usize,
        stride: usize,
        pad: usize,
    ) -> Result<ValueId, OpError> {
        self.op(
            "MaxPool",
            &[x],
            [
                ("kernel_shape", [kernel as i64; 2].into()),
                ("strides", [stride as i64; 2].into()),
                ("pads", [pad as i64; 4].into()),
            ],
        )
    }

    /// Dropout that does nothing outside training; no node for a ratio of zero.
    pub(super) fn dropout(&mut self, x: ValueId, ratio: f64) -> Result<ValueId, OpError> {
        if ratio == 0.0 {
            return Ok(x);
        }
        let ratio = self.literal(Tensor::scalar(ratio as f32))?;
        self.op("Dropout", &[x, ratio], [])
    }

    /// The mean over height and width, `[N, C, H, W] -> [N, C]`.
    pub(super) fn global_pool(&mut self, x: ValueId) -> Result<ValueId, OpError> {
        let pooled = self.op("GlobalAveragePool", &[x], [])?;
        self.op("Flatten", &[pooled], [])
    }
}
