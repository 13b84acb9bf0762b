//! Which initializers of a model are its parameters.
//!
//! A file does not say: weights, masks, tables of positions and shapes all are initializers. What tells them apart is
//! where they are read. A parameter is read where its operator has weights, or is added to or multiplied with what
//! other operators compute. Among the latter are masks and tables of sines, which their contents give away.

use std::collections::HashSet;

use updraft_graph::{Graph, NodeId, Tensor, UPDRAFT_DOMAIN, ValueId};

/// Why an initializer is no parameter of its model; `None` where it is one.
pub(crate) fn why_constant(graph: &Graph, value: ValueId, tensor: &Tensor) -> Option<String> {
    if !tensor.dtype().is_float() {
        return Some(format!("its elements are {}", tensor.dtype()));
    }
    if tensor.rank() == 0 {
        return Some("it is one number".to_owned());
    }
    let mut readers = Vec::new();
    collect_readers(graph, value, &mut readers);
    if !readers.iter().any(|r| r.slot(graph) != Slot::Operand) {
        let mut ops: Vec<&str> = readers.iter().map(|r| graph.node(r.node).op.as_str()).collect();
        ops.sort_unstable();
        ops.dedup();
        return Some(match ops.is_empty() {
            true => "no node reads it".to_owned(),
            false => format!("only {} reads it, which has no weight there", ops.join(" and ")),
        });
    }
    if readers.iter().any(|r| r.slot(graph) == Slot::Weight) {
        let waves = readers.iter().all(|r| leads_to_waves(graph, r.node));
        return waves.then(|| "it is a table of frequencies: all that is made of it are sines".to_owned());
    }
    // A tensor that is no longer numbers, or too many of them, is left to the passes that read it.
    let numbers = tensor.to_f64().ok()?;
    if numbers.iter().any(|v| !v.is_finite() || v.abs() >= MASK_MIN) {
        return Some(format!("it is a mask: it has elements of magnitude {MASK_MIN} and more"));
    }
    if tensor.shape().iter().filter(|n| **n > 1).count() < 2 {
        return None;
    }
    if is_two_valued_mask(&numbers) {
        return Some("it is a mask: its elements are 0 and one other number".to_owned());
    }
    is_wave_table(tensor.shape(), &numbers).then(|| "it is a table of sines by position".to_owned())
}

/// No weight is as large; what hides elements from a softmax in half precision is -65504, or -10000 by old custom.
const MASK_MIN: f64 = 1e4;

/// What an operator does with an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Its weights.
    Weight,
    /// Combined with other operands element by element: a bias, a scale, or a mask.
    Elementwise,
    /// Anything else: a bound, a divisor, a size.
    Operand,
}

/// Which operand of fake quantization is trained, beside what it rounds.
const STEP: usize = 2;

struct Reader {
    node: NodeId,
    input: usize,
}

impl Reader {
    fn slot(&self, graph: &Graph) -> Slot {
        let node = graph.node(self.node);
        let weights: &[usize] = match (node.domain.as_str(), node.op.as_str()) {
            ("", "MatMul" | "Einsum") => return Slot::Weight,
            // A product with a bias lists it third, and a scale of the weights is a weight.
            ("", "Conv" | "ConvTranspose" | "Gemm" | "BatchNormalization" | "InstanceNormalization") => &[1, 2],
            ("", "LayerNormalization" | "GroupNormalization" | "RMSNormalization" | "PRelu") => &[1, 2],
            ("", "RNN" | "GRU" | "LSTM") => &[1, 2, 3, 7],
            ("", "DeformConv") => &[1, 3],
            ("", "Gather" | "GatherElements" | "GatherND") => &[0],
            (UPDRAFT_DOMAIN, "FakeQuantize") => &[STEP],
            // Class tokens are put before what a network computes.
            ("", "Add" | "Mul" | "Sum" | "Concat") => return Slot::Elementwise,
            _ => &[],
        };
        if weights.contains(&self.input) { Slot::Weight } else { Slot::Operand }
    }
}

/// Whether the operator only moves the elements of its first operand.
fn moves(graph: &Graph, node: NodeId) -> bool {
    const MOVES: &[&str] = &[
        "Cast",
        "Expand",
        "Flatten",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ];
    let node = graph.node(node);
    match node.domain.as_str() {
        "" => MOVES.contains(&node.op.as_str()),
        // What is rounded is what it was before.
        UPDRAFT_DOMAIN => node.op == "FakeQuantize",
        _ => false,
    }
}

/// The nodes that read a value, through nodes that only move its elements.
fn collect_readers(graph: &Graph, value: ValueId, into: &mut Vec<Reader>) {
    let mut seen: HashSet<NodeId> = HashSet::new();
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        for id in graph.value(value).consumers() {
            if !seen.insert(*id) {
                continue;
            }
            for (input, _) in graph.node(*id).inputs.iter().enumerate().filter(|(_, v)| **v == Some(value)) {
                if input == 0 && moves(graph, *id) {
                    open.extend(graph.node(*id).outputs.iter().flatten());
                } else {
                    into.push(Reader { node: *id, input });
                }
            }
        }
    }
}

/// Whether all that is made of a node's output, through products, sums and moves, are sines and cosines.
fn leads_to_waves(graph: &Graph, node: NodeId) -> bool {
    const LINEAR: &[&str] = &["MatMul", "Einsum", "Mul", "Add", "Concat"];
    let mut seen = HashSet::new();
    let mut open = vec![node];
    let mut ends_in_waves = false;
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        let node = graph.node(id);
        match node.op.as_str() {
            "Sin" | "Cos" if node.domain.is_empty() => ends_in_waves = true,
            op if node.domain.is_empty() && LINEAR.contains(&op) || moves(graph, id) => {
                let outputs = node.outputs.iter().flatten();
                if outputs.clone().any(|v| graph.outputs().contains(v)) {
                    return false;
                }
                open.extend(outputs.flat_map(|v| graph.value(*v).consumers()));
            }
            _ => return false,
        }
    }
    ends_in_waves
}

/// Whether the elements are 0 and one other number, both of which occur.
fn is_two_valued_mask(numbers: &[f64]) -> bool {
    let other = numbers.iter().copied().find(|v| *v != 0.0);
    other.is_some_and(|other| numbers.contains(&0.0) && numbers.iter().all(|v| *v == 0.0 || *v == other))
}

/// Whether the elements are sines or cosines of growing angles: at position 0 along the outermost long axis they are 0
/// and 1, elsewhere they lie in [-1, 1], and they are no such numbers alone.
fn is_wave_table(shape: &[usize], numbers: &[f64]) -> bool {
    let positions = shape.iter().copied().find(|n| *n > 1).unwrap_or(1);
    let (first, rest) = numbers.split_at(numbers.len() / positions);
    let is_end = |v: &f64| *v == 0.0 || *v == 1.0;
    first.iter().all(is_end) && rest.iter().all(|v| v.abs() <= 1.0) && !rest.iter().all(is_end)
}

#[cfg(test)]
mod tests {
    use updraft_graph::{DType, ValueType};

    use super::*;

    /// The verdict on an initializer `c` that one operator reads beside a value computed by another.
    fn verdict(op: &str, tensor: Tensor, first: bool) -> Option<String> {
        let mut graph = Graph::new("g");
        let dims: Vec<_> = tensor.shape().iter().map(|n| (*n).into()).collect();
        let x = graph.add_input("x", ValueType::tensor(DType::F32, dims)).unwrap();
        let x = graph.op("Relu", &[x], []).unwrap();
        let c = graph.add_constant("c", tensor.clone());
        let y = graph.op(op, &if first { [c, x] } else { [x, c] }, []).unwrap();
        graph.push_output(y);
        why_constant(&graph, c, &tensor)
    }

    fn table(rows: usize, columns: usize, element: impl Fn(usize, usize) -> f32) -> Tensor {
        let numbers: Vec<f32> = (0..rows * columns).map(|i| element(i / columns, i % columns)).collect();
        Tensor::new(&[rows, columns], &numbers).unwrap()
    }

    #[test]
    fn weights_biases_and_scales_are_parameters() {
        let rows = [
            ("MatMul", table(3, 3, |i, j| (i * 3 + j) as f32)),
            ("Add", Tensor::zeros(DType::F32, &[4]).unwrap()),
            ("Mul", Tensor::new(&[4], &[1f32; 4]).unwrap()),
            ("Add", table(3, 4, |i, j| (i as f32 - j as f32) * 0.1)),
            ("Add", Tensor::zeros(DType::F32, &[3, 4]).unwrap()),
            ("PRelu", Tensor::new(&[4], &[0.25f32; 4]).unwrap()),
        ];
        for (op, tensor) in rows {
            assert_eq!(verdict(op, tensor.clone(), false), None, "{op} {tensor:?}");
        }
    }

    #[test]
    fn masks_tables_and_bounds_are_not() {
        let causal = |hidden: f32| table(4, 4, move |i, j| if j > i { hidden } else { 0.0 });
        let wave = |i: usize, j: usize| i as f32 / 10f32.powi(j as i32 / 2);
        let rows = [
            ("Add", causal(f32::NEG_INFINITY), "mask"),
            ("Add", causal(-1e9), "mask"),
            ("Mul", causal(1.0), "mask"),
            ("Mul", table(5, 4, |i, j| wave(i, j).cos()), "sines"),
            ("Mul", table(5, 4, |i, j| wave(i, j).sin()), "sines"),
            ("Add", table(5, 4, |i, j| if j % 2 == 0 { wave(i, j).sin() } else { wave(i, j).cos() }), "sines"),
            ("Sub", Tensor::new(&[3], &[0.4f32, 0.5, 0.6]).unwrap(), "only Sub reads it"),
            ("Div", Tensor::new(&[3], &[0.2f32, 0.2, 0.3]).unwrap(), "only Div reads it"),
            ("Max", Tensor::new(&[3], &[0f32, 0.0, 0.0]).unwrap(), "only Max reads it"),
        ];
        for (op, tensor, expected) in rows {
            let found = verdict(op, tensor.clone(), false).unwrap_or_default();
            assert!(found.contains(expected), "{op} {tensor:?}: {found:?} does not say {expected:?}");
        }
    }

    #[test]
    fn frequencies_of_rotary_embeddings_stay() {
        let mut graph = Graph::new("g");
        let positions = graph.add_input("positions", ValueType::tensor(DType::F32, vec![8.into(), 1.into()])).unwrap();
        let tensor = Tensor::new(&[1, 4], &[1f32, 0.1, 0.01, 0.001]).unwrap();
        let frequencies = graph.add_constant("inv_freq", tensor.clone());
        let angles = graph.op("MatMul", &[positions, frequencies], []).unwrap();
        for op in ["Sin", "Cos"] {
            let y = graph.op(op, &[angles], []).unwrap();
            graph.push_output(y);
        }
        assert!(why_constant(&graph, frequencies, &tensor).unwrap().contains("frequencies"));
    }
}
