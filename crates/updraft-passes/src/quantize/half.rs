//! Mixed precision: values and weights in half the bits, inputs and outputs as they were.
//!
//! A node stays in single precision where its operator does not take half precision, where its values or weights leave
//! the range of the half type, or where so many weights would vanish that the product changes. Casts stand where one
//! precision meets the other, one for each value.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use updraft_graph::graph::TensorType;
use updraft_graph::op::OpError;
use updraft_graph::{DType, Graph, NodeId, ValueId, ValueType};

use super::plan::Decision;
use super::quantizer::Range;
use crate::rewrite::{FixedNames, constant, has_subgraph};
use crate::{PassError, Refusal, Report};

/// How a graph is brought to half precision.
#[derive(Debug, Clone, PartialEq)]
pub struct Half {
    /// `f16` or `bf16`.
    pub dtype: DType,
    /// Labels of nodes that stay in single precision.
    pub exclude: BTreeSet<String>,
}

/// Operators whose sums, powers or exponents lose more in half precision than they gain.
const SENSITIVE: &[&str] = &[
    "Softmax",
    "LogSoftmax",
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "BatchNormalization",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceProd",
    "CumSum",
    "Exp",
    "Log",
    "Pow",
    "Softplus",
];

/// Operators whose types are given by attributes, or that take single precision only.
const SINGLE_ONLY: &[&str] = &[
    "Cast",
    "CastLike",
    "ConstantOfShape",
    "Range",
    "EyeLike",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
    "Resize",
    "NonMaxSuppression",
    "RoiAlign",
    "GridSample",
    "DFT",
    "STFT",
    "MelWeightMatrix",
    "HannWindow",
    "HammingWindow",
    "BlackmanWindow",
    "Constant",
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "LSTM",
    "GRU",
    "RNN",
    "MaxUnpool",
    "ImageDecoder",
    "Optional",
];

/// Operators that take `bf16` only from operator set 22 on.
const NO_BF16: &[&str] = &[
    "Conv",
    "ConvTranspose",
    "AveragePool",
    "GlobalAveragePool",
    "MaxPool",
    "GlobalMaxPool",
    "LpPool",
    "GlobalLpPool",
    "Elu",
    "HardSigmoid",
    "HardSwish",
    "Selu",
    "Softsign",
    "Celu",
    "ThresholdedRelu",
    "Mish",
    "DeformConv",
    "Det",
    "Sin",
    "Cos",
    "Tan",
    "Asin",
    "Acos",
    "Atan",
    "Sinh",
    "Cosh",
    "Asinh",
    "Acosh",
    "Atanh",
    "Round",
    "Dropout",
    "HardMax",
    "LpNormalization",
    "LRN",
    "MeanVarianceNormalization",
    "PRelu",
];

/// The share of weights other than zero that may vanish.
const VANISHING_MAX: f64 = 0.01;

/// Brings a graph that [`prepare`](super::prepare) has seen to half precision, but for its inputs and outputs.
///
/// `ranges` has the ranges of values where they are known, by name: those that leave the range of `f16` stay in single
/// precision. Returns what became of each node that works on floats, in execution order.
pub fn half(
    graph: &mut Graph,
    options: &Half,
    ranges: &BTreeMap<String, Range>,
    report: &mut Report,
) -> Result<Vec<Decision>, PassError> {
    let limit = match options.dtype {
        DType::F16 => 65504.0,
        DType::BF16 => f64::from(f32::MAX),
        other => {
            let problem = format!("is {other}, expected f16 or bf16");
            return Err(PassError::Option { option: "dtype", problem });
        }
    };
    let names = FixedNames::of(graph);
    let judge = Judge { options, ranges, limit, names: &names };
    let mut decisions = Vec::new();
    let mut halved = Vec::new();
    for id in graph.order()? {
        let node = graph.node(id);
        let reads = |v: &ValueId| graph.dtype(*v) == Some(DType::F32);
        if !node.inputs.iter().chain(&node.outputs).flatten().any(reads) {
            continue;
        }
        let refusal = judge.refusal(graph, id)?;
        let (label, op) = (node.label(graph), node.op.clone());
        match &refusal {
            None => {
                halved.push(id);
                report.change(label.clone());
            }
            Some(reason) => report.refusals.push(Refusal { node: label.clone(), reason: reason.clone() }),
        }
        let reason = refusal.clone().unwrap_or_else(|| options.dtype.to_string());
        decisions.push(Decision { node: label, op, quantized: refusal.is_none(), reason });
    }
    rewrite(graph, &halved, options.dtype)?;
    graph.prune()?;
    Ok(decisions)
}

struct Judge<'a> {
    options: &'a Half,
    ranges: &'a BTreeMap<String, Range>,
    limit: f64,
    names: &'a FixedNames,
}

impl Judge<'_> {
    /// Why a node stays in single precision, if it does.
    fn refusal(&self, graph: &Graph, id: NodeId) -> Result<Option<String>, PassError> {
        let node = graph.node(id);
        let op = node.op.as_str();
        let dtype = self.options.dtype;
        let no = |reason: String| Ok(Some(reason));
        if self.options.exclude.contains(&node.label(graph)) {
            return no("it is excluded".to_owned());
        }
        if !node.domain.is_empty() || has_subgraph(node) {
            return no("what it does inside is in single precision".to_owned());
        }
        if SINGLE_ONLY.contains(&op) {
            return no(format!("{op} does not take {dtype}"));
        }
        if dtype == DType::BF16 && NO_BF16.contains(&op) {
            return no(format!("{op} takes bf16 only from operator set 22 on"));
        }
        if SENSITIVE.contains(&op) {
            return no(format!("{op} loses digits in sums and exponents"));
        }
        for v in node.outputs.iter().flatten() {
            let captured = self.names.contains(graph, *v) && !graph.outputs().contains(v);
            if captured {
                return no("a subgraph reads what it makes".to_owned());
            }
        }
        for v in node.inputs.iter().chain(&node.outputs).flatten() {
            let name = &graph.value(*v).name;
            if let Some(range) = self.ranges.get(name) {
                let largest = f64::from(range.max.abs().max(range.min.abs()));
                // Calibration has not seen everything.
                if largest * 2.0 > self.limit {
                    return no(format!("{name:?} reaches {largest:.3e}, and {dtype} ends at {:.3e}", self.limit));
                }
            }
            let Some(tensor) = constant(graph, *v).filter(|t| t.dtype() == DType::F32) else { continue };
            let before = tensor.as_slice::<f32>().map_err(OpError::from)?;
            let after = tensor.cast(dtype).and_then(|t| t.to_f64()).map_err(OpError::from)?;
            if let Some(largest) = before.iter().find(|x| f64::from(x.abs()) > self.limit && x.is_finite()) {
                return no(format!("{name:?} holds {largest:.3e}, and {dtype} ends at {:.3e}", self.limit));
            }
            let filled = before.iter().filter(|x| **x != 0.0).count();
            let vanished = before.iter().zip(&after).filter(|(b, a)| **b != 0.0 && **a == 0.0).count();
            if vanished as f64 > VANISHING_MAX * filled as f64 {
                return no(format!("{vanished} of {filled} elements of {name:?} vanish in {dtype}"));
            }
        }
        Ok(None)
    }
}

fn rewrite(graph: &mut Graph, halved: &[NodeId], dtype: DType) -> Result<(), PassError> {
    let set: BTreeSet<NodeId> = halved.iter().copied().collect();
    let is_single = |graph: &Graph, v: ValueId| graph.dtype(v) == Some(DType::F32);
    // Constants and values from outside, in half precision, made once.
    let mut narrow: HashMap<ValueId, ValueId> = HashMap::new();
    let mut made = BTreeSet::new();
    for id in halved {
        for (index, v) in graph.node(*id).inputs.clone().into_iter().enumerate() {
            let Some(v) = v.filter(|v| is_single(graph, *v) && !made.contains(v)) else { continue };
            let half = match narrow.get(&v) {
                Some(half) => *half,
                None => {
                    let half = match constant(graph, v).cloned() {
                        Some(tensor) => {
                            let name = graph.value(v).name.clone();
                            graph.add_constant(&name, tensor.cast(dtype).map_err(OpError::from)?)
                        }
                        None => graph.op("Cast", &[v], [("to", (dtype as i64).into())])?,
                    };
                    narrow.insert(v, half);
                    half
                }
            };
            graph.set_node_input(*id, index, Some(half));
        }
        let outputs: Vec<ValueId> = graph.node(*id).outputs.iter().flatten().copied().collect();
        for v in outputs {
            if !is_single(graph, v) {
                continue;
            }
            let shape = graph.shape(v).map(<[_]>::to_vec);
            graph.set_type(v, ValueType::Tensor(TensorType { dtype: Some(dtype), shape }));
            made.insert(v);
        }
    }
    for v in made {
        let mut readers = graph.value(v).consumers().to_vec();
        readers.retain(|id| !set.contains(id));
        readers.dedup();
        let is_output = graph.outputs().contains(&v);
        if readers.is_empty() && !is_output {
            continue;
        }
        let wide = graph.op("Cast", &[v], [("to", (DType::F32 as i64).into())])?;
        for id in readers {
            let places: Vec<usize> =
                (0..graph.node(id).inputs.len()).filter(|i| graph.node(id).inputs[*i] == Some(v)).collect();
            places.into_iter().for_each(|i| graph.set_node_input(id, i, Some(wide)));
        }
        if is_output {
            graph.swap_names(v, wide);
            let outputs = graph.outputs().iter().map(|o| if *o == v { wide } else { *o }).collect();
            graph.set_outputs(outputs);
        }
    }
    Ok(())
}
