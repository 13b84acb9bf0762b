//! What other processors would make of a quantized model.
//!
//! Processors with dot products of bytes (AVX-512 VNNI, Arm's dot product, tensor cores) add products of integers
//! exactly. AVX2 without them multiplies bytes in pairs and adds each pair in 16 bits, which saturate (`vpmaddubsw`): an
//! unsigned byte times a signed one, twice, can pass 32,767. One file then gives other answers there, in published tables
//! up to ten points of accuracy fewer. Since all that differs is some pairs, the emulation takes each product's definition
//! and adds the difference of the pairs that can saturate; weights whose pairs cannot (`|a| + |b| <= 128`) cost nothing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use updraft_data::Batch;
use updraft_graph::eval::evaluate_node;
use updraft_graph::op::OpError;
use updraft_graph::op::window::{Window, WindowSpec};
use updraft_graph::{DType, Graph, NodeId, Tensor, ValueId};
use updraft_passes::PassError;

use crate::error::CompressError;
use crate::measure::{Answers, Output, Task, inference_form};

/// How products of bytes are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arithmetic {
    /// In 32 bits, exactly.
    Exact,
    /// Neighbouring pairs in 16 bits that saturate, then in 32 bits. Neighbours are those of kernels that keep channels
    /// innermost: along the channels of a convolution's window, along the shared axis of a matrix product.
    SaturatingPairs,
}

/// A kind of processor that a model is meant for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// x86-64 with AVX-512 VNNI.
    #[serde(rename = "avx512-vnni")]
    Avx512Vnni,
    /// x86-64 with AVX2 and without VNNI.
    #[serde(rename = "avx2")]
    Avx2,
    /// Arm with dot products of bytes.
    #[serde(rename = "arm-dotprod")]
    ArmDotprod,
    /// NVIDIA tensor cores, whose runtimes take symmetric signed codes only.
    #[serde(rename = "cuda-int8")]
    CudaInt8,
}

impl Target {
    /// All of them.
    pub const ALL: [Target; 4] = [Target::Avx512Vnni, Target::Avx2, Target::ArmDotprod, Target::CudaInt8];

    /// What arguments and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Target::Avx512Vnni => "avx512-vnni",
            Target::Avx2 => "avx2",
            Target::ArmDotprod => "arm-dotprod",
            Target::CudaInt8 => "cuda-int8",
        }
    }

    /// How it adds.
    pub fn arithmetic(self) -> Arithmetic {
        match self {
            Target::Avx2 => Arithmetic::SaturatingPairs,
            Target::Avx512Vnni | Target::ArmDotprod | Target::CudaInt8 => Arithmetic::Exact,
        }
    }

    /// Whether its runtimes take symmetric activations only.
    pub fn is_symmetric(self) -> bool {
        self == Target::CudaInt8
    }
}

/// A model under an arithmetic, node by node after the definitions: slow, for some hundreds of samples.
pub struct Emulated {
    graph: Graph,
    output: String,
    order: Vec<NodeId>,
    products: BTreeMap<NodeId, Product>,
}

/// A product of bytes with constant weights, and where it can saturate.
struct Product {
    /// The codes that the node reads, before they become real numbers.
    codes: ValueId,
    zero_point: u8,
    scale: f64,
    shape: ProductShape,
    /// For each output channel, its scale and the pairs that can saturate.
    channels: Vec<Channel>,
}

enum ProductShape {
    Conv { spec: WindowSpec, group: usize, channels_per_group: usize },
    Matrix,
}

struct Channel {
    scale: f64,
    pairs: Vec<Pair>,
}

/// Two neighbouring weights; the places count along the kernel with channels innermost. The second is missing where the
/// number of weights is odd.
struct Pair {
    place: usize,
    weights: [i32; 2],
}

impl Emulated {
    /// Prepares a model for an arithmetic.
    ///
    /// # Errors
    /// A convolution with kernels of a changing shape.
    pub fn new(model: &Graph, task: &Task, arithmetic: Arithmetic) -> Result<Emulated, CompressError> {
        let (graph, output) = inference_form(model, task)?;
        let order = graph.order().map_err(PassError::from)?;
        let mut products = BTreeMap::new();
        if arithmetic == Arithmetic::SaturatingPairs {
            for id in &order {
                let product = Product::of(&graph, *id)
                    .map_err(|source| PassError::Node { node: graph.node(*id).label(&graph), source })?;
                products.extend(product.map(|p| (*id, p)));
            }
        }
        Ok(Emulated { graph, output, order, products })
    }

    /// How many pairs of weights can saturate.
    pub fn risky_pairs(&self) -> usize {
        self.products.values().flat_map(|p| &p.channels).map(|c| c.pairs.len()).sum()
    }
}

impl Answers for Emulated {
    fn answer(&mut self, batch: &Batch) -> Result<Output, CompressError> {
        let graph = &self.graph;
        let mut values: Vec<Option<Tensor>> = vec![None; graph.value_count()];
        for (id, tensor) in graph.constants() {
            values[id.index()] = Some(tensor.clone());
        }
        for (name, tensor) in &batch.tensors {
            if let Some(id) = graph.find(name).filter(|v| graph.inputs().contains(v)) {
                values[id.index()] = Some(tensor.clone());
            }
        }
        for id in &self.order {
            let node = graph.node(*id);
            let failed = |source: OpError| PassError::Node { node: node.label(graph), source };
            let inputs = node.inputs.iter().map(|v| v.and_then(|v| values[v.index()].as_ref())).collect();
            let mut made = evaluate_node(graph, *id, inputs, &|_| None).map_err(failed)?;
            if let Some(product) = self.products.get(id)
                && let (Some(codes), Some(result)) = (&values[product.codes.index()], made.first_mut())
            {
                product.saturate(codes, result).map_err(failed)?;
            }
            for (output, tensor) in node.outputs.iter().zip(made) {
                if let Some(v) = output {
                    values[v.index()] = Some(tensor);
                }
            }
        }
        let tensor = graph.outputs().first().and_then(|v| values[v.index()].clone());
        let problem = || format!("{:?} is made by no node", self.output);
        let tensor = tensor.ok_or_else(|| CompressError::Setting { setting: "output", problem: problem() })?;
        Ok(Output { name: self.output.clone(), tensor })
    }
}

impl Product {
    /// The product that a node is, where it multiplies unsigned codes with constant signed ones.
    fn of(graph: &Graph, id: NodeId) -> Result<Option<Product>, OpError> {
        let node = graph.node(id);
        if !matches!(node.op.as_str(), "Conv" | "Gemm" | "MatMul") || !matches!(node.domain.as_str(), "" | "ai.onnx") {
            return Ok(None);
        }
        let operand = |index: usize| node.inputs.get(index).copied().flatten().and_then(|v| Dequantized::of(graph, v));
        let (Some(x), Some(w)) = (operand(0), operand(1)) else { return Ok(None) };
        let (Some(&[scale]), Some(weights)) = (x.scales(graph).as_deref(), graph.value(w.codes).constant()) else {
            return Ok(None);
        };
        if graph.dtype(x.codes) != Some(DType::U8) || weights.dtype() != DType::I8 {
            return Ok(None);
        }
        let zero_point = match x.zero_point.and_then(|v| graph.value(v).constant()) {
            Some(tensor) => tensor.as_slice::<u8>()?.first().copied().unwrap_or(0),
            None => 0,
        };
        let (shape, codes) = (weights.shape().to_vec(), weights.as_slice::<i8>()?);
        let (kind, rows) = match node.op.as_str() {
            "Conv" => {
                let &[outputs, inner, ref kernel @ ..] = shape.as_slice() else { return Ok(None) };
                let window: usize = kernel.iter().product();
                // Channels innermost.
                let rows = (0..outputs).map(|m| {
                    let at = move |k: usize| codes[(m * inner + k % inner) * window + k / inner];
                    (0..inner * window).map(at).collect()
                });
                let group = usize::try_from(node.attributes.int("group", 1)?).unwrap_or(1);
                let spec = WindowSpec::of_conv(&node.attributes, kernel)?;
                (ProductShape::Conv { spec, group, channels_per_group: inner }, rows.collect::<Vec<Vec<i8>>>())
            }
            _ => {
                let &[first, second] = shape.as_slice() else { return Ok(None) };
                let is_transposed = node.op == "Gemm" && node.attributes.flag("transB", false)?;
                if node.op == "Gemm" && node.attributes.flag("transA", false)? {
                    return Ok(None);
                }
                let (outputs, inner) = if is_transposed { (first, second) } else { (second, first) };
                let at = |n: usize, k: usize| if is_transposed { codes[n * inner + k] } else { codes[k * outputs + n] };
                let rows = (0..outputs).map(|n| (0..inner).map(|k| at(n, k)).collect());
                (ProductShape::Matrix, rows.collect())
            }
        };
        let scales = w.scales(graph).unwrap_or_default();
        let channels = rows
            .iter()
            .enumerate()
            .map(|(channel, row)| {
                let scale = if scales.len() == 1 { scales.first() } else { scales.get(channel) };
                let problem = || format!("{} scales do not fit {} output channels", scales.len(), rows.len());
                Ok(Channel { scale: *scale.ok_or_else(|| OpError::value(problem()))?, pairs: risky(row) })
            })
            .collect::<Result<_, OpError>>()?;
        Ok(Some(Product { codes: x.codes, zero_point, scale, shape: kind, channels }))
    }

    /// Adds to a product what saturation takes away.
    fn saturate(&self, codes: &Tensor, result: &mut Tensor) -> Result<(), OpError> {
        if self.channels.iter().all(|c| c.pairs.is_empty()) {
            return Ok(());
        }
        let shape = codes.shape().to_vec();
        let codes = codes.as_slice::<u8>()?;
        let values = result.as_mut_slice::<f32>()?;
        match &self.shape {
            ProductShape::Matrix => {
                let inner = *shape.last().unwrap_or(&1);
                let outputs = self.channels.len();
                for (row, out) in codes.chunks_exact(inner.max(1)).zip(values.chunks_exact_mut(outputs.max(1))) {
                    for (value, channel) in out.iter_mut().zip(&self.channels) {
                        let lost = channel.lost(|place| row.get(place).copied().unwrap_or(0));
                        *value -= (f64::from(lost) * self.scale * channel.scale) as f32;
                    }
                }
            }
            ProductShape::Conv { spec, group, channels_per_group } => {
                let &[samples, inputs, ref spatial @ ..] = shape.as_slice() else {
                    return Err(OpError::shape(format!("the input of a convolution has shape {shape:?}")));
                };
                let window = spec.resolve(spatial)?;
                let per_group = (self.channels.len() / group).max(1);
                let places: usize = window.output.iter().product();
                let area: usize = spatial.iter().product();
                for sample in 0..samples {
                    for (m, channel) in self.channels.iter().enumerate().filter(|(_, c)| !c.pairs.is_empty()) {
                        let first = (sample * inputs + m / per_group * channels_per_group) * area;
                        let out = (sample * self.channels.len() + m) * places;
                        for place in 0..places {
                            let code = |k: usize| match offset(&window, place, k / channels_per_group) {
                                Some(at) => codes[first + k % channels_per_group * area + at],
                                None => self.zero_point,
                            };
                            let lost = channel.lost(code);
                            values[out + place] -= (f64::from(lost) * self.scale * channel.scale) as f32;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

impl Channel {
    /// How much more the exact sum is than the saturating one.
    fn lost(&self, code: impl Fn(usize) -> u8) -> i32 {
        self.pairs
            .iter()
            .map(|pair| {
                let second = if pair.weights[1] == 0 { 0 } else { i32::from(code(pair.place + 1)) * pair.weights[1] };
                let sum = i32::from(code(pair.place)) * pair.weights[0] + second;
                sum - sum.clamp(i32::from(i16::MIN), i32::from(i16::MAX))
            })
            .sum()
    }
}

/// The pairs of a channel that can saturate for some codes.
fn risky(weights: &[i8]) -> Vec<Pair> {
    let pairs = weights.chunks(2).enumerate().filter_map(|(i, pair)| {
        let weights = [i32::from(pair[0]), pair.get(1).map_or(0, |w| i32::from(*w))];
        let most = 255 * weights.iter().map(|w| (*w).max(0)).sum::<i32>();
        let least = 255 * weights.iter().map(|w| (*w).min(0)).sum::<i32>();
        let fits = most <= i32::from(i16::MAX) && least >= i32::from(i16::MIN);
        (!fits).then_some(Pair { place: 2 * i, weights })
    });
    pairs.collect()
}

/// Where window `place` reads its element `element`, in row-major order of the input's spatial axes; `None` in the
/// padding.
fn offset(window: &Window, mut place: usize, mut element: usize) -> Option<usize> {
    let (mut at, mut stride) = (0, 1);
    for axis in (0..window.input.len()).rev() {
        let out = place % window.output[axis];
        place /= window.output[axis];
        let within = element % window.kernel[axis];
        element /= window.kernel[axis];
        let padded = out * window.strides[axis] + within * window.dilations[axis];
        let index = padded.checked_sub(window.pads_begin[axis]).filter(|i| *i < window.input[axis])?;
        at += index * stride;
        stride *= window.input[axis];
    }
    Some(at)
}

/// Codes and what they mean.
struct Dequantized {
    codes: ValueId,
    scale: ValueId,
    zero_point: Option<ValueId>,
}

impl Dequantized {
    fn of(graph: &Graph, value: ValueId) -> Option<Dequantized> {
        let node = graph.node(graph.value(value).producer()?.0);
        if node.op != "DequantizeLinear" {
            return None;
        }
        let input = |i: usize| node.inputs.get(i).copied().flatten();
        Some(Dequantized { codes: input(0)?, scale: input(1)?, zero_point: input(2) })
    }

    fn scales(&self, graph: &Graph) -> Option<Vec<f64>> {
        graph.value(self.scale).constant()?.to_f64().ok()
    }
}

#[cfg(test)]
mod tests {
    use updraft_base::Key;
    use updraft_graph::ValueType;
    use updraft_passes::loss::Loss;

    use super::*;

    /// `vpmaddubsw` and exact sums of its results, straight from the definition.
    fn by_definition(codes: &[u8], weights: &[i8]) -> i32 {
        codes
            .chunks(2)
            .zip(weights.chunks(2))
            .map(|(x, w)| {
                let sum: i32 = x.iter().zip(w).map(|(x, w)| i32::from(*x) * i32::from(*w)).sum();
                sum.clamp(-32_768, 32_767)
            })
            .sum()
    }

    fn task() -> Task {
        Task { loss: Loss::MeanSquaredError, output: None, target: "y".to_owned() }
    }

    fn answer(graph: &Graph, x: Tensor, arithmetic: Arithmetic) -> (Tensor, usize) {
        let mut emulated = Emulated::new(graph, &task(), arithmetic).unwrap();
        let batch = Batch { step: 0, epoch: 0, tensors: vec![("x".to_owned(), x)], samples: vec![0] };
        (emulated.answer(&batch).unwrap().tensor, emulated.risky_pairs())
    }

    fn bytes(key: &Key, count: usize) -> Vec<u8> {
        (0..count as u64).map(|i| key.below(i, 256) as u8).collect()
    }

    fn dequantize(graph: &mut Graph, codes: ValueId, scale: f32, zero: Option<Tensor>) -> ValueId {
        let scale = graph.add_constant("scale", Tensor::scalar(scale));
        let mut inputs = vec![codes, scale];
        inputs.extend(zero.map(|z| graph.add_constant("zero", z)));
        graph.op("DequantizeLinear", &inputs, []).unwrap()
    }

    #[test]
    fn matrix_products_saturate_pair_by_pair() {
        let (rows, inner, outputs) = (3, 7, 4);
        let codes = bytes(&Key::new(1), rows * inner);
        let weights: Vec<i8> = bytes(&Key::new(2), inner * outputs).iter().map(|b| *b as i8).collect();
        let mut graph = Graph::new("product");
        let x = graph.add_input("x", ValueType::tensor(DType::U8, vec![rows.into(), inner.into()])).unwrap();
        let w = graph.add_constant("w", Tensor::new::<i8>(&[inner, outputs], &weights).unwrap());
        let x = dequantize(&mut graph, x, 1.0, None);
        let w = dequantize(&mut graph, w, 1.0, None);
        let y = graph.op("MatMul", &[x, w], []).unwrap();
        graph.push_output(y);
        let (found, risky) =
            answer(&graph, Tensor::new::<u8>(&[rows, inner], &codes).unwrap(), Arithmetic::SaturatingPairs);
        assert!(risky > 0);
        for row in 0..rows {
            for n in 0..outputs {
                let column: Vec<i8> = (0..inner).map(|k| weights[k * outputs + n]).collect();
                let expected = by_definition(&codes[row * inner..(row + 1) * inner], &column);
                // Scales of 1: all numbers are integers below 2^24, so floats are exact.
                assert_eq!(found.as_slice::<f32>().unwrap()[row * outputs + n], expected as f32);
            }
        }
    }

    #[test]
    fn convolutions_saturate_along_their_channels_and_pad_with_the_zero_point() {
        let (channels, outputs, size) = (3, 2, 5);
        let codes = bytes(&Key::new(3), channels * size * size);
        let weights: Vec<i8> = bytes(&Key::new(4), outputs * channels * 9).iter().map(|b| *b as i8).collect();
        let zero = 77u8;
        let mut graph = Graph::new("convolution");
        let shape = [1, channels, size, size];
        let x = graph.add_input("x", ValueType::tensor(DType::U8, shape.map(Into::into).to_vec())).unwrap();
        let w = graph.add_constant("w", Tensor::new::<i8>(&[outputs, channels, 3, 3], &weights).unwrap());
        let x = dequantize(&mut graph, x, 1.0, Some(Tensor::scalar(zero)));
        let w = dequantize(&mut graph, w, 1.0, None);
        let y = graph.op("Conv", &[x, w], [("pads", [1i64, 1, 1, 1].into())]).unwrap();
        graph.push_output(y);
        let (found, _) = answer(&graph, Tensor::new::<u8>(&shape, &codes).unwrap(), Arithmetic::SaturatingPairs);
        for m in 0..outputs {
            for (row, column) in (0..size).flat_map(|r| (0..size).map(move |c| (r, c))) {
                let (mut window, mut kernel) = (Vec::new(), Vec::new());
                for (i, j, c) in (0..9).flat_map(|p| (0..channels).map(move |c| (p / 3, p % 3, c))) {
                    let (r, q) = ((row + i).wrapping_sub(1), (column + j).wrapping_sub(1));
                    let inside = r < size && q < size;
                    window.push(if inside { codes[(c * size + r) * size + q] } else { zero });
                    kernel.push(weights[(m * channels + c) * 9 + i * 3 + j]);
                }
                let zero_part: i32 = kernel.iter().map(|w| i32::from(zero) * i32::from(*w)).sum();
                let expected = by_definition(&window, &kernel) - zero_part;
                let at = (m * size + row) * size + column;
                assert_eq!(found.as_slice::<f32>().unwrap()[at], expected as f32, "{m} {row} {column}");
            }
        }
    }

    #[test]
    fn seven_bit_weights_never_saturate_and_exact_sums_are_untouched() {
        for (a, b) in [(64, 64), (-64, -64), (63, -64), (127, -128)] {
            assert!(risky(&[a, b]).is_empty(), "{a} {b}");
        }
        for (a, b) in [(64, 65), (127, 127), (-128, -1), (-65, -64)] {
            assert_eq!(risky(&[a, b]).len(), 1, "{a} {b}");
        }
    }
}
