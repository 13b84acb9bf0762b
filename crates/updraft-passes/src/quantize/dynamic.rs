//! Dynamic quantization: products of integers, with values quantized as they come.
//!
//! No data is needed, and ranges are those of each input. What is between products stays float, which suits networks
//! whose time goes into large matrix products.

use std::collections::HashMap;

use updraft_graph::op::OpError;
use updraft_graph::{DType, Graph, NodeId, Tensor, ValueId};

use super::kind::{Kind, kind, weights_of};
use super::plan::{Decision, Scheme};
use super::quantizer::QuantizerError;
use super::table::quantize_table;
use crate::rewrite::{FixedNames, constant};
use crate::{PassError, Refusal, Report};

/// Quantizes products with constant weights in a graph that [`prepare`](super::prepare) has seen. Of the scheme, what is
/// about weights counts. Returns what became of each node that works on floats, in execution order.
pub fn dynamic(graph: &mut Graph, scheme: &Scheme, report: &mut Report) -> Result<Vec<Decision>, PassError> {
    let names = FixedNames::of(graph);
    let mut quantized_inputs = HashMap::new();
    let mut decisions = Vec::new();
    for id in graph.order()? {
        let node = graph.node(id);
        let (label, op) = (node.label(graph), node.op.clone());
        let outcome = match kind(graph, id, scheme)? {
            Kind::Other => continue,
            Kind::Float(reason) => Err(reason),
            Kind::Table => {
                quantize_table(graph, id, &names)?;
                Ok("rows of i8 codes".to_owned())
            }
            Kind::Layer => rewrite(graph, id, scheme, &names, &mut quantized_inputs)?,
            Kind::Between | Kind::Move => Err("values between products stay float".to_owned()),
        };
        let quantized = outcome.is_ok();
        let (Ok(reason) | Err(reason)) = outcome;
        match quantized {
            true => report.change(format!("{label}: {reason}")),
            false => report.refusals.push(Refusal { node: label.clone(), reason: reason.clone() }),
        }
        decisions.push(Decision { node: label, op, quantized, reason });
    }
    graph.prune()?;
    Ok(decisions)
}

/// Codes, scale and zero point of a value.
type Quantized = [ValueId; 3];

/// Rewrites a layer; gives how, or why not.
fn rewrite(
    graph: &mut Graph,
    id: NodeId,
    scheme: &Scheme,
    names: &FixedNames,
    quantized_inputs: &mut HashMap<ValueId, Quantized>,
) -> Result<Result<String, String>, PassError> {
    let node = graph.node(id).clone();
    let refuse = |reason: &str| Ok(Err(reason.to_owned()));
    let (Some(x), Some((w, axis)), Some(made)) =
        (node.inputs.first().copied().flatten(), weights_of(graph, &node), node.outputs.first().copied().flatten())
    else {
        return refuse("its weights are not constant");
    };
    if node.op == "ConvTranspose" {
        return refuse("ConvTranspose has no product of integers");
    }
    if node.op == "Gemm" && (node.attributes.flag("transA", false)? || node.attributes.float("alpha", 1.0)? != 1.0) {
        return refuse("it transposes or scales what it reads");
    }
    let Some(weights) = constant(graph, w).cloned() else { return refuse("its weights are not constant") };
    let name = graph.value(w).name.clone();
    let wrong =
        |e: QuantizerError| PassError::Value { name: name.clone(), problem: format!("cannot be quantized: {e}") };
    let quantizer = scheme.weight_quantizer(&weights, axis).map_err(wrong)?;
    let mut codes = quantizer.quantize(&weights).map_err(wrong)?;
    if node.op == "Gemm" && node.attributes.flag("transB", false)? {
        codes = transposed(&codes)?;
    }
    let is_conv = node.op == "Conv";
    let (mut scales, _) = quantizer.operands(weights.shape()).map_err(wrong)?;
    if is_conv && scales.rank() == 1 {
        let mut shape = vec![1; weights.rank() - 1];
        shape[0] = scales.len();
        scales = scales.reshaped(&shape).map_err(OpError::from)?;
    }
    let [x_codes, x_scale, x_zero] = match quantized_inputs.get(&x) {
        Some(done) => *done,
        None => {
            let made = graph.op_n("", "DynamicQuantizeLinear", &[Some(x)], [], 3)?;
            let done = [made[0], made[1], made[2]];
            quantized_inputs.insert(x, done);
            done
        }
    };
    let scales = graph.add_constant(&format!("{name}_scale"), scales);
    let sums = if is_conv {
        // Runtimes take unsigned weights with one zero point here.
        let shifted: Vec<u8> =
            codes.as_slice::<i8>().map_err(OpError::from)?.iter().map(|q| (*q as u8) ^ 0x80).collect();
        let shifted = Tensor::new(codes.shape(), &shifted).map_err(OpError::from)?;
        let codes = graph.add_constant(&format!("{name}_quantized"), shifted);
        let zero = graph.add_constant(&format!("{name}_zero_point"), Tensor::scalar(128u8));
        graph.op("ConvInteger", &[x_codes, codes, x_zero, zero], node.attributes.clone())?
    } else {
        let codes = graph.add_constant(&format!("{name}_quantized"), codes);
        graph.op("MatMulInteger", &[x_codes, codes, x_zero], [])?
    };
    let sums = graph.op("Cast", &[sums], [("to", (DType::F32 as i64).into())])?;
    let scale = graph.op("Mul", &[x_scale, scales], [])?;
    let mut y = graph.op("Mul", &[sums, scale], [])?;
    if let Some(bias) = node.inputs.get(2).copied().flatten() {
        let bias = if is_conv { channel_shaped(graph, bias, weights.rank())? } else { scaled(graph, bias, &node)? };
        y = graph.op("Add", &[y, bias], [])?;
    }
    graph.remove_node(id);
    names.substitute(graph, made, y);
    let per = if quantizer.axis.is_some() { "channel" } else { "tensor" };
    Ok(Ok(format!("u8 values as they come, i8 weights per {per}")))
}

/// The bias of a convolution in a shape that broadcasts over places.
fn channel_shaped(graph: &mut Graph, bias: ValueId, rank: usize) -> Result<ValueId, PassError> {
    let mut shape = vec![1i64; rank - 1];
    shape[0] = -1;
    let shape_value = graph.add_constant("shape", Tensor::vector(&shape));
    match constant(graph, bias).cloned() {
        Some(tensor) => {
            let sizes: Vec<usize> = shape.iter().map(|n| if *n < 0 { tensor.len() } else { 1 }).collect();
            let name = graph.value(bias).name.clone();
            let tensor = tensor.reshaped(&sizes).map_err(OpError::from)?;
            Ok(graph.add_constant(&name, tensor))
        }
        None => Ok(graph.op("Reshape", &[bias, shape_value], [])?),
    }
}

/// The bias of a Gemm times its factor.
fn scaled(graph: &mut Graph, bias: ValueId, node: &updraft_graph::Node) -> Result<ValueId, PassError> {
    let beta = node.attributes.float("beta", 1.0)?;
    if beta == 1.0 {
        return Ok(bias);
    }
    let beta = graph.add_constant("beta", Tensor::scalar(beta));
    Ok(graph.op("Mul", &[bias, beta], [])?)
}

/// A matrix of `i8` with rows and columns exchanged.
fn transposed(codes: &Tensor) -> Result<Tensor, PassError> {
    let [rows, columns] = codes.shape() else { return Ok(codes.clone()) };
    let old = codes.as_slice::<i8>().map_err(OpError::from)?;
    let new: Vec<i8> = (0..rows * columns).map(|i| old[i % rows * columns + i / rows]).collect();
    Ok(Tensor::new(&[*columns, *rows], &new).map_err(OpError::from)?)
}
