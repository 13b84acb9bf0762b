//! What a network needs before it is quantized.

use updraft_graph::op::OpError;
use updraft_graph::{Graph, Tensor, ValueId};

use crate::pipeline::{INFERENCE, Pipeline, PipelineError};
use crate::rewrite::constant;
use crate::{Pass, PassError, Promise, Report};

/// Brings a graph into the form that the rewrites here know: batch normalisation folded, biases merged, Gemm plain.
///
/// # Errors
/// A graph that is quantized already; what the passes refuse.
pub fn prepare(graph: &mut Graph) -> Result<Vec<Report>, PipelineError> {
    let mut pipeline = Pipeline::new(graph);
    pipeline.run(REFUSE_QUANTIZED)?;
    pipeline.run(FIX_DEFAULTS)?;
    INFERENCE.iter().try_for_each(|pass| pipeline.run(*pass))?;
    pipeline.run(PLAIN_GEMM)?;
    Ok(pipeline.finish())
}

/// A second quantization would act on the rounding of the first, or do nothing and not say so.
const REFUSE_QUANTIZED: Pass = Pass {
    name: "refuse quantized graphs",
    promise: Promise::Exact,
    rewrite: |graph, _| {
        const QUANTIZED: &[&str] = &[
            "QuantizeLinear",
            "DequantizeLinear",
            "DynamicQuantizeLinear",
            "QLinearConv",
            "QLinearMatMul",
            "ConvInteger",
            "MatMulInteger",
        ];
        match graph.nodes().find(|(_, node)| QUANTIZED.contains(&node.op.as_str())) {
            Some((id, _)) => {
                let reason = "the graph is quantized already, expected one of floats";
                Err(PassError::node(graph, id, OpError::unsupported(reason)))
            }
            None => Ok(()),
        }
    },
};

/// Makes inputs with defaults constants. Old files list every initializer among the inputs, where a caller could give other
/// weights; what is quantized are these.
const FIX_DEFAULTS: Pass = Pass {
    name: "fix defaults",
    promise: Promise::Exact,
    rewrite: |graph, report| {
        let (fixed, open): (Vec<ValueId>, Vec<ValueId>) =
            graph.inputs().iter().partition(|v| graph.value(**v).constant().is_some());
        fixed.iter().for_each(|v| report.change(graph.value(*v).name.clone()));
        graph.set_inputs(open);
        Ok(())
    },
};

/// Folds the factors of Gemm into its constants, and makes its constant bias a vector with one number a column, as
/// integer kernels take it.
///
/// A factor rounds each constant once more; the tolerance leaves a thousand such steps.
const PLAIN_GEMM: Pass = Pass { name: "plain gemm", promise: Promise::Within(1e-4), rewrite: plain_gemm };

fn plain_gemm(graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
    for id in graph.order()? {
        let node = graph.node(id).clone();
        if node.op != "Gemm" || !node.domain.is_empty() {
            continue;
        }
        let operand = |index: usize| node.inputs.get(index).copied().flatten();
        let mut changed = false;
        for (index, factor) in [(1, "alpha"), (2, "beta")] {
            let number = node.attributes.float(factor, 1.0)?;
            let Some((v, tensor)) = operand(index).and_then(|v| Some((v, constant(graph, v)?.clone()))) else {
                continue;
            };
            if number != 1.0 {
                let scaled: Vec<f64> =
                    tensor.to_f64().map_err(OpError::from)?.iter().map(|x| x * f64::from(number)).collect();
                let scaled = Tensor::from_f64(tensor.dtype(), tensor.shape(), &scaled).map_err(OpError::from)?;
                replace(graph, id, index, v, scaled);
                graph.attributes_mut(id).remove(factor);
                changed = true;
            }
        }
        let columns = operand(1).and_then(|w| graph.known_shape(w)).and_then(|shape| {
            let transposed = node.attributes.flag("transB", false).ok()?;
            shape.get(usize::from(!transposed)).copied()
        });
        let bias = graph.node(id).inputs.get(2).copied().flatten();
        if let (Some(columns), Some(v)) = (columns, bias)
            && let Some(tensor) = constant(graph, v).cloned()
            && tensor.shape() != [columns]
        {
            let vector = match tensor.len() {
                1 => {
                    let number = tensor.to_f64().map_err(OpError::from)?;
                    Some(Tensor::from_f64(tensor.dtype(), &[columns], &vec![number[0]; columns]))
                }
                n if n == columns && tensor.shape().last() == Some(&columns) => Some(tensor.reshaped(&[columns])),
                _ => None,
            };
            match vector {
                Some(vector) => {
                    replace(graph, id, 2, v, vector.map_err(OpError::from)?);
                    changed = true;
                }
                None => report.refuse(graph, id, format!("its bias {:?} is not one number a column", tensor.shape())),
            }
        }
        if changed {
            report.change(graph.node(id).label(graph));
        }
    }
    graph.prune()?;
    Ok(())
}

fn replace(graph: &mut Graph, id: updraft_graph::NodeId, index: usize, old: ValueId, tensor: Tensor) {
    let name = graph.value(old).name.clone();
    let new = graph.add_constant(&name, tensor);
    graph.set_node_input(id, index, Some(new));
}
