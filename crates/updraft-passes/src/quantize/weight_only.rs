//! Weights as codes, values as they are: what a network takes on disk and in memory shrinks, what it computes hardly
//! changes.
//!
//! Codes of matrix products share a scale along runs of their input channels. Networks that are limited by how fast
//! weights arrive, as language models are that answer one request, gain in time too.

use std::collections::BTreeMap;

use updraft_graph::{Attribute, DType, Graph, Node, Tensor, ValueId};

use super::insert::RoundedWeights;
use super::kind::{Kind, kind, weights_of};
use super::plan::{Decision, Scheme};
use super::quantizer::{Quantizer, QuantizerError, WeightScale, levels};
use super::table::quantize_table;
use crate::rewrite::{FixedNames, constant};
use crate::{PassError, Refusal, Report};

/// How weights become codes.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightOnly {
    /// Bits of a code: 8, symmetric; or 4, with zero points.
    pub bits: u32,
    /// Input channels of matrix products that share a scale.
    pub block: usize,
    /// How scales are chosen.
    pub weight_scale: WeightScale,
    /// Labels of nodes that stay float.
    pub exclude: std::collections::BTreeSet<String>,
}

impl WeightOnly {
    /// The quantizer of weights whose input channels lie along one axis, or along several, and whose output channels lie
    /// along `outputs`.
    pub fn quantizer_of(
        &self,
        inputs: Option<usize>,
        outputs: usize,
        weights: &Tensor,
    ) -> Result<Quantizer, QuantizerError> {
        let (axis, block) = match inputs {
            Some(axis) => (axis, Some(self.block)),
            // Windows are small, and blocks of them would be mostly scales.
            None => (outputs, None),
        };
        let dtype = if self.bits == 4 { DType::U4 } else { DType::I8 };
        let symmetric = dtype.is_signed_integer();
        Quantizer::of_groups(weights, dtype, levels(dtype)?, Some(axis), block, self.weight_scale, symmetric)
    }

    /// The quantizer of the weights of a node whose output channels lie along `outputs`, or along several axes.
    fn quantizer(&self, node: &Node, weights: &Tensor, outputs: Option<usize>) -> Result<Quantizer, QuantizerError> {
        match (node.op.as_str(), outputs) {
            ("Conv" | "ConvTranspose", Some(outputs)) => self.quantizer_of(None, outputs, weights),
            (_, Some(outputs)) => self.quantizer_of(Some(1 - outputs), outputs, weights),
            // A stack of matrices has its input channels before the last axis.
            (_, None) => self.quantizer_of(weights.rank().checked_sub(2).or(Some(0)), 0, weights),
        }
    }

    fn check(&self) -> Result<(), PassError> {
        let wrong = |option, problem| Err(PassError::Option { option, problem });
        match (self.bits, self.block) {
            (4 | 8, 0) => wrong("block", "is 0, expected at least 1".to_owned()),
            (4 | 8, _) => Ok(()),
            (bits, _) => wrong("bits", format!("are {bits}, expected 8 or 4")),
        }
    }
}

/// Stores the weights of layers and the rows of tables as codes, in a graph that [`prepare`](super::prepare) has seen.
/// `rounded` has, by name of the initializer, weights that were rounded with more care than to the nearest code. Returns
/// what became of each node that works on floats, in execution order.
pub fn weight_only(
    graph: &mut Graph,
    options: &WeightOnly,
    rounded: &BTreeMap<String, RoundedWeights>,
    report: &mut Report,
) -> Result<Vec<Decision>, PassError> {
    options.check()?;
    let names = FixedNames::of(graph);
    let scheme = Scheme { exclude: options.exclude.clone(), ..Scheme::default() };
    let mut stored: BTreeMap<(ValueId, Option<usize>), Result<ValueId, String>> = BTreeMap::new();
    let mut decisions = Vec::new();
    for id in graph.order()? {
        let node = graph.node(id).clone();
        let label = node.label(graph);
        let outcome = match (kind(graph, id, &scheme)?, weights_of(graph, &node)) {
            (Kind::Other, _) => continue,
            (Kind::Float(reason), _) => Err(reason),
            (Kind::Table, _) => {
                quantize_table(graph, id, &names)?;
                Ok("rows of i8 codes".to_owned())
            }
            (Kind::Layer, Some((v, axis))) => {
                let done = match stored.get(&(v, axis)) {
                    Some(done) => done.clone(),
                    None => {
                        let done = store(graph, &node, v, axis, options, rounded)?;
                        stored.insert((v, axis), done.clone());
                        done
                    }
                };
                done.map(|floats| {
                    graph.set_node_input(id, 1, Some(floats));
                    format!("{}-bit weights", options.bits)
                })
            }
            (Kind::Layer, None) => Err("it has no constant weights".to_owned()),
            (Kind::Between | Kind::Move, _) => Err("it has no weights".to_owned()),
        };
        let quantized = outcome.is_ok();
        let (Ok(reason) | Err(reason)) = outcome;
        match quantized {
            true => report.change(format!("{label}: {reason}")),
            false => report.refusals.push(Refusal { node: label.clone(), reason: reason.clone() }),
        }
        decisions.push(Decision { node: label, op: node.op, quantized, reason });
    }
    graph.prune()?;
    Ok(decisions)
}

/// The dequantized form of a weight, or why it is better kept.
fn store(
    graph: &mut Graph,
    node: &Node,
    v: ValueId,
    axis: Option<usize>,
    options: &WeightOnly,
    rounded: &BTreeMap<String, RoundedWeights>,
) -> Result<Result<ValueId, String>, PassError> {
    let name = graph.value(v).name.clone();
    let Some(weights) = constant(graph, v).cloned() else { return Ok(Err("its weights are not constant".to_owned())) };
    let wrong =
        |e: QuantizerError| PassError::Value { name: name.clone(), problem: format!("cannot be quantized: {e}") };
    let (quantizer, codes) = match rounded.get(&name) {
        Some(given) => (given.quantizer.clone(), given.codes.clone()),
        None => {
            let quantizer = options.quantizer(node, &weights, axis).map_err(wrong)?;
            let codes = quantizer.quantize(&weights).map_err(wrong)?;
            (quantizer, codes)
        }
    };
    let (scales, zeros) = quantizer.operands(codes.shape()).map_err(wrong)?;
    let has_zeros = quantizer.zero_points.iter().any(|z| *z != 0);
    let bits = |t: &Tensor| t.len() * t.dtype().bits().unwrap_or(8);
    let after = bits(&codes) + bits(&scales) + if has_zeros { bits(&zeros) } else { 0 };
    if after >= bits(&weights) {
        return Ok(Err("its scales would take more than its weights".to_owned()));
    }
    let codes = graph.add_constant(&format!("{name}_quantized"), codes);
    let scales = graph.add_constant(&format!("{name}_scale"), scales);
    let mut inputs = vec![codes, scales];
    if has_zeros {
        inputs.push(graph.add_constant(&format!("{name}_zero_point"), zeros));
    }
    let mut attributes: Vec<(String, Attribute)> = Vec::new();
    if let Some(axis) = quantizer.axis {
        attributes.push(("axis".to_owned(), (axis as i64).into()));
    }
    if let Some(block) = quantizer.block {
        attributes.push(("block_size".to_owned(), (block as i64).into()));
    }
    let attributes: updraft_graph::Attributes = attributes.into_iter().collect();
    Ok(Ok(graph.op("DequantizeLinear", &inputs, attributes)?))
}
