//! Every gradient rule against differences of the reference evaluation, in `f64`.

use std::collections::HashMap;

use updraft_base::random::{Key, fill_uniform};
use updraft_graph::eval::evaluate;
use updraft_graph::op::{self, Gradient};
use updraft_graph::{Attributes, DType, Graph, Node, Tensor, UPDRAFT_DOMAIN, ValueId, ValueType};

/// One operand of a row.
#[derive(Clone)]
enum Operand {
    /// Numbers in [-1, 1), different for each row and operand; gradients are checked.
    Any(Vec<usize>),
    /// Numbers in [0.5, 1.5).
    Positive(Vec<usize>),
    /// A constant that has no gradient.
    Fixed(Tensor),
}

use Operand::{Any, Fixed, Positive};

fn any(shape: &[usize]) -> Operand {
    Any(shape.to_vec())
}

fn positive(shape: &[usize]) -> Operand {
    Positive(shape.to_vec())
}

struct Row {
    op: &'static str,
    operands: Vec<Operand>,
    attributes: Attributes,
    outputs: usize,
}

fn row<const N: usize>(
    op: &'static str,
    operands: impl IntoIterator<Item = Operand>,
    attributes: [(&str, updraft_graph::Attribute); N],
) -> Row {
    Row { op, operands: operands.into_iter().collect(), attributes: attributes.into(), outputs: 1 }
}

/// Numbers that depend on the seed alone.
fn numbers(seed: u64, shape: &[usize], low: f64) -> Tensor {
    let mut drawn = vec![0f32; shape.iter().product()];
    fill_uniform(&Key::new(seed), 0, &mut drawn);
    let width = if low < 0.0 { 2.0 } else { 1.0 };
    Tensor::from_f64(DType::F64, shape, &drawn.iter().map(|v| f64::from(*v) * width + low).collect::<Vec<_>>()).unwrap()
}

/// The weighted sum of a row's first output, its graph, and its gradients.
struct Built {
    graph: Graph,
    sum: ValueId,
    inputs: HashMap<String, Tensor>,
    /// Name of each input that varies, and its gradient.
    gradients: Vec<(String, ValueId)>,
}

fn build(index: usize, row: &Row) -> Result<Built, String> {
    let domain = if op::find("", row.op).is_some() { "" } else { UPDRAFT_DOMAIN };
    let rule = op::find(domain, row.op).and_then(|op| op.gradient.get()).ok_or("has no gradient rule")?;
    let mut graph = Graph::new(row.op);
    // Operators newer than the set that passes write are checked in their own.
    let opset = op::find(domain, row.op).and_then(|op| op.versions.first().copied()).unwrap_or(1).max(21);
    graph.opsets.insert(String::new(), opset);
    let mut inputs = HashMap::new();
    let mut operands = Vec::new();
    let mut varying = Vec::new();
    for (i, operand) in row.operands.iter().enumerate() {
        let seed = (index * 16 + i) as u64;
        let tensor = match operand {
            Any(shape) => numbers(seed, shape, -1.0),
            Positive(shape) => numbers(seed, shape, 0.5),
            Fixed(tensor) => {
                operands.push(Some(graph.add_constant("constant", tensor.clone())));
                continue;
            }
        };
        let name = format!("x{i}");
        let value = graph.add_input(&name, ValueType::of(&tensor)).map_err(|e| e.to_string())?;
        operands.push(Some(value));
        varying.push((i, name.clone()));
        inputs.insert(name, tensor);
    }
    let wanted: Vec<bool> = (0..operands.len()).map(|i| varying.iter().any(|(v, _)| *v == i)).collect();
    let made = graph
        .op_n(domain, row.op, &operands, row.attributes.clone(), row.outputs)
        .map_err(|e| format!("building: {e}"))?;
    let shape = graph.shape(made[0]).ok_or("rank of the output is unknown")?.to_vec();
    let sizes = updraft_graph::dim::known_shape(&shape).ok_or("sizes of the output are unknown")?;
    let weights = graph.add_constant("weights", numbers(index as u64 * 16 + 15, &sizes, -1.0));
    let product = graph.op("Mul", &[made[0], weights], []).map_err(|e| e.to_string())?;
    let sum = graph.op("ReduceSum", &[product], [("keepdims", 0.into())]).map_err(|e| e.to_string())?;
    let id = graph.value(made[0]).producer().ok_or("no producer")?.0;
    let node: Node = graph.node(id).clone();
    let mut grads = vec![None; node.outputs.len()];
    grads[0] = Some(weights);
    let found = rule(&mut Gradient { graph: &mut graph, id, node, grads, wanted }).map_err(|e| e.to_string())?;
    let mut gradients = Vec::new();
    for (i, name) in varying {
        let gradient = found.get(i).copied().flatten().ok_or(format!("no gradient of input {i}"))?;
        gradients.push((name, gradient));
    }
    Ok(Built { graph, sum, inputs, gradients })
}

/// The first difference between a rule and central differences, if any.
fn check(index: usize, row: &Row) -> Result<(), String> {
    let mut built = build(index, row)?;
    built.graph.set_outputs(built.gradients.iter().map(|(_, g)| *g).collect());
    let gradients = evaluate(&built.graph, &built.inputs).map_err(|e| e.to_string())?;
    built.graph.set_outputs(vec![built.sum]);
    let value_at = |inputs: &HashMap<String, Tensor>| -> Result<f64, String> {
        let sum = evaluate(&built.graph, inputs).map_err(|e| e.to_string())?;
        Ok(sum[0].to_f64().map_err(|e| e.to_string())?[0])
    };
    for ((name, _), gradient) in built.gradients.iter().zip(&gradients) {
        let start = built.inputs[name].clone();
        if gradient.shape() != start.shape() || gradient.dtype() != start.dtype() {
            return Err(format!("gradient of {name} is {gradient:?} for {start:?}"));
        }
        let (values, gradient) = (start.to_f64().unwrap(), gradient.to_f64().unwrap());
        for element in 0..values.len() {
            // Central differences err by about h^2 (1e-12) and by rounding over h (1e-16 / 1e-6), for derivatives of
            // order one; the bound leaves four digits for larger ones.
            let h = 1e-6;
            let moved = |by: f64| {
                let mut moved = values.clone();
                moved[element] += by;
                let mut inputs = built.inputs.clone();
                inputs.insert(name.clone(), Tensor::new(start.shape(), &moved).unwrap());
                value_at(&inputs)
            };
            let slope = (moved(h)? - moved(-h)?) / (2.0 * h);
            if (slope - gradient[element]).abs() > 1e-6 * (1.0 + slope.abs()) {
                return Err(format!("{name}[{element}]: slope {slope}, gradient {}", gradient[element]));
            }
        }
    }
    Ok(())
}

fn convolutions() -> Vec<Row> {
    let (image, kernel) = (any(&[2, 4, 5, 6]), any(&[3, 4, 3, 2]));
    vec![
        row("Conv", [image.clone(), kernel.clone(), any(&[3])], []),
        row("Conv", [image.clone(), kernel.clone()], [("pads", [1, 0, 2, 1].into()), ("strides", [2, 1].into())]),
        row("Conv", [image.clone(), kernel], [("dilations", [2, 3].into()), ("auto_pad", "SAME_UPPER".into())]),
        row("Conv", [image.clone(), any(&[6, 2, 2, 2])], [("group", 2.into())]),
        row("Conv", [any(&[2, 3, 7]), any(&[3, 1, 3])], [("group", 3.into()), ("strides", [3].into())]),
        row("ConvTranspose", [image.clone(), any(&[4, 3, 3, 2]), any(&[3])], []),
        row(
            "ConvTranspose",
            [image.clone(), any(&[4, 2, 3, 3])],
            [
                ("group", 2.into()),
                ("strides", [2, 3].into()),
                ("pads", [1, 0, 1, 2].into()),
                ("output_padding", [1, 2].into()),
            ],
        ),
        row(
            "ConvTranspose",
            [any(&[1, 2, 4]), any(&[2, 2, 3])],
            [("strides", [2].into()), ("auto_pad", "SAME_LOWER".into())],
        ),
    ]
}

fn pools() -> Vec<Row> {
    let image = any(&[2, 3, 5, 6]);
    vec![
        row("MaxPool", [image.clone()], [("kernel_shape", [2, 3].into()), ("strides", [2, 1].into())]),
        row(
            "MaxPool",
            [image.clone()],
            [("kernel_shape", [3, 3].into()), ("pads", [1, 1, 1, 1].into()), ("dilations", [1, 2].into())],
        ),
        row(
            "AveragePool",
            [image.clone()],
            [
                ("kernel_shape", [3, 2].into()),
                ("strides", [2, 2].into()),
                ("pads", [1, 0, 1, 1].into()),
                ("ceil_mode", 1.into()),
            ],
        ),
        row(
            "AveragePool",
            [image.clone()],
            [("kernel_shape", [2, 2].into()), ("pads", [1, 1, 1, 1].into()), ("count_include_pad", 1.into())],
        ),
        row("GlobalAveragePool", [image.clone()], []),
        row("GlobalMaxPool", [image], []),
    ]
}

fn normalizations() -> Vec<Row> {
    let image = any(&[3, 4, 2, 2]);
    let vector = |n: usize| any(&[n]);
    let f64_statistics = ("stash_type", i64::from(DType::F64 as i32).into());
    vec![
        row("BatchNormalization", [image.clone(), vector(4), vector(4), vector(4), positive(&[4])], []),
        Row {
            outputs: 5,
            ..row(
                "BatchNormalizationTraining",
                [image.clone(), vector(4), vector(4), Fixed(numbers(1, &[4], 0.0)), Fixed(numbers(2, &[4], 0.5))],
                [("epsilon", 0.01f32.into())],
            )
        },
        row("LayerNormalization", [any(&[2, 3, 5]), vector(5), vector(5)], [f64_statistics.clone()]),
        row("LayerNormalization", [any(&[2, 3, 5]), any(&[3, 5])], [f64_statistics, ("axis", 1.into())]),
        row("RMSNormalization", [any(&[2, 3, 5]), vector(5)], []),
        row("RMSNormalization", [any(&[2, 3, 5]), vector(5)], [("axis", 1.into())]),
        row("InstanceNormalization", [image.clone(), vector(4), vector(4)], []),
        row("GroupNormalization", [image, vector(4), vector(4)], [("num_groups", 2.into())]),
        row("LpNormalization", [any(&[3, 4])], [("axis", 0.into())]),
        row("LpNormalization", [any(&[3, 4])], [("p", 1.into())]),
    ]
}

fn products_and_softmaxes() -> Vec<Row> {
    vec![
        row("MatMul", [any(&[3, 4]), any(&[4, 2])], []),
        row("MatMul", [any(&[2, 3, 4]), any(&[4, 2])], []),
        row("MatMul", [any(&[2, 1, 3, 4]), any(&[5, 4, 2])], []),
        row("Gemm", [any(&[3, 4]), any(&[4, 2]), any(&[2])], [("alpha", 0.5f32.into()), ("beta", 2f32.into())]),
        row("Gemm", [any(&[4, 3]), any(&[4, 2]), any(&[3, 1])], [("transA", 1.into())]),
        row("Gemm", [any(&[3, 4]), any(&[2, 4])], [("transB", 1.into())]),
        row("Gemm", [any(&[4, 3]), any(&[2, 4])], [("transA", 1.into()), ("transB", 1.into())]),
        row("Softmax", [any(&[2, 3, 4])], []),
        row("Softmax", [any(&[2, 3, 4])], [("axis", 1.into())]),
        row("LogSoftmax", [any(&[2, 3, 4])], [("axis", 0.into())]),
        row(
            "RotaryEmbedding",
            [any(&[2, 3, 2, 4]), Fixed(numbers(1, &[2, 2, 2], -1.0)), Fixed(numbers(2, &[2, 2, 2], -1.0))],
            [],
        ),
    ]
}

fn losses() -> Vec<Row> {
    let mut rows = Vec::new();
    for name in ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"] {
        for reduction in ["mean", "sum", "none"] {
            let labels = Fixed(Tensor::new(&[2, 3], &[0i64, 3, 1, 2, 0, 0]).unwrap());
            let weights = Fixed(numbers(3, &[4], 0.5));
            let kind = ("reduction", reduction.into());
            rows.push(row(name, [any(&[2, 4, 3]), labels.clone()], [kind.clone()]));
            rows.push(row(name, [any(&[2, 4, 3]), labels, weights.clone()], [kind.clone()]));
            let some = Fixed(Tensor::new(&[2, 3], &[0i32, -100, 1, 2, -100, 0]).unwrap());
            rows.push(row(name, [any(&[2, 4, 3]), some, weights], [kind, ("ignore_index", (-100).into())]));
        }
    }
    rows
}

#[test]
fn every_rule_is_the_slope_of_the_reference_evaluation() {
    let rows: Vec<Row> =
        [convolutions(), pools(), normalizations(), products_and_softmaxes(), losses()].into_iter().flatten().collect();
    let failures: Vec<String> = rows
        .iter()
        .enumerate()
        .filter_map(|(i, row)| check(i, row).err().map(|e| format!("{} {:?}: {e}", row.op, row.attributes)))
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
