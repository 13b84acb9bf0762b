//! Lowering of matrix products: which of the kernels of [`product`](crate::cpu::product) fits the shapes.

use updraft_graph::{DType, Graph, Node, NodeId, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::elementwise::Op;
use crate::cpu::layout::Layout;
use crate::cpu::lower::{Lowering, Static};
use crate::cpu::map::Argument;
use crate::cpu::product::{Grid, Matrix, Product, Rows, Stack};

/// Fewer rows in a tile cost more for preparing the other matrix than they save.
const ROWS_MIN: usize = 96;

/// Products in a stack from which on threads get whole products.
const STACK_MIN: usize = 8;

/// Lowers MatMul, Gemm and sums of products; `None` if the node is none of them, or not of `f32`.
pub(crate) fn lower(cx: &mut Lowering<'_>, id: NodeId, build: &Build) -> Result<Option<()>, OpError> {
    let node = cx.graph().node(id);
    if !node.domain.is_empty() && node.domain != "ai.onnx" {
        return Ok(None);
    }
    if node.op == "ReduceSum" {
        let product = summed_product(cx.graph(), id);
        let absorbed = product.filter(|p| p.outputs.first().copied().flatten().is_some_and(|v| cx.is_absorbed(v)));
        return absorbed.map(|product| summed(cx, node, product)).transpose();
    }
    if !build.all_are(DType::F32) {
        return Ok(None);
    }
    match node.op.as_str() {
        "MatMul" => matmul(cx, node).map(Some),
        "Gemm" => gemm(cx, node).map(Some),
        _ => Ok(None),
    }
}

/// The product that a ReduceSum over all its batch axes sums, if that is what the node does.
pub(crate) fn summed_product(graph: &Graph, id: NodeId) -> Option<&Node> {
    let node = graph.node(id);
    if node.op != "ReduceSum" || !node.domain.is_empty() {
        return None;
    }
    let value = node.inputs.first().copied().flatten()?;
    let (producer, _) = graph.value(value).producer()?;
    let product = graph.node(producer);
    if product.op != "MatMul" || !product.domain.is_empty() || graph.dtype(value) != Some(DType::F32) {
        return None;
    }
    let rank = graph.known_shape(value)?.len();
    let operands = product.inputs.iter().flatten().map(|v| graph.known_shape(*v));
    if operands.into_iter().any(|s| s.is_none_or(|s| s.len() < 2)) || rank < 3 {
        return None;
    }
    let axes = graph.value(node.inputs.get(1).copied().flatten()?).constant()?.to_i64().ok()?;
    let mut axes: Vec<i64> = axes.into_iter().map(|a| if a < 0 { a + rank as i64 } else { a }).collect();
    axes.sort_unstable();
    (axes == (0..rank as i64 - 2).collect::<Vec<_>>()).then_some(product)
}

fn operands(cx: &mut Lowering<'_>, node: &Node) -> Result<(Static, Static), OpError> {
    match node.inputs.as_slice() {
        [Some(a), Some(b), ..] => Ok((cx.static_input(*a)?, cx.static_input(*b)?)),
        _ => Err(OpError::MissingInput { index: 0, expected: "a matrix" }),
    }
}

/// Stretches the batch axes of both to their common sizes.
fn stretch(a: &Layout, b: &Layout, batch: &[usize]) -> (Layout, Layout) {
    let one = |layout: &Layout| {
        let shape = [batch, &layout.shape[layout.shape.len() - 2..]].concat();
        layout.broadcast_to(&shape)
    };
    (one(a), one(b))
}

fn matmul(cx: &mut Lowering<'_>, node: &Node) -> Result<(), OpError> {
    let (mut a, mut b) = operands(cx, node)?;
    let Some(output) = node.outputs.first().copied().flatten() else { return Ok(()) };
    let out_shape = cx.graph().known_shape(output).unwrap_or_default();
    // A vector is a row on the left and a column on the right; the output's memory is the same without that axis.
    let (row, column) = (a.layout.shape.len() == 1, b.layout.shape.len() == 1);
    if row {
        a.layout.shape.insert(0, 1);
        a.layout.strides.insert(0, 0);
    }
    if column {
        b.layout.shape.push(1);
        b.layout.strides.push(0);
    }
    let mut shape = out_shape.clone();
    if row {
        shape.insert(shape.len() - usize::from(!column), 1);
    }
    if column {
        shape.push(1);
    }
    let layout = if row || column { Layout::contiguous(&out_shape) } else { output_layout(cx, node, &out_shape) };
    let c_layout = if row || column { Layout::contiguous(&shape) } else { layout.clone() };
    let built = choose(&mut a, &mut b, &c_layout);
    let made = cx.made(output, layout);
    let seen = Static { layout: c_layout, ..made };
    let label = node.label(cx.graph());
    cx.add_built(label, node.op.clone(), vec![Some(a), Some(b)], vec![Some(seen)], built);
    cx.finish(node);
    Ok(())
}

/// Where the only reader is a Transpose that moves other axes than the last, the product is laid out so that the
/// transposed value is contiguous: attention's heads come together without a copy.
fn output_layout(cx: &Lowering<'_>, node: &Node, shape: &[usize]) -> Layout {
    let plain = Layout::contiguous(shape);
    let graph = cx.graph();
    let Some(output) = node.outputs.first().copied().flatten().filter(|v| cx.uses(*v) == 1) else { return plain };
    let [reader] = graph.value(output).consumers() else { return plain };
    let reader = graph.node(*reader);
    if reader.op != "Transpose" || !reader.domain.is_empty() || shape.len() < 3 {
        return plain;
    }
    let Ok(Some(perm)) = reader.attributes.ints("perm") else { return plain };
    let rank = shape.len();
    let perm: Option<Vec<usize>> = perm.iter().map(|p| usize::try_from(*p).ok().filter(|p| *p < rank)).collect();
    let Some(perm) = perm.filter(|p| p.len() == rank && p.last() == Some(&(rank - 1))) else { return plain };
    let moved: Vec<usize> = perm.iter().map(|p| shape[*p]).collect();
    let contiguous = Layout::contiguous(&moved);
    let mut out = plain;
    for (axis, p) in perm.iter().enumerate() {
        out.strides[*p] = contiguous.strides[axis];
    }
    out
}

/// The kernel for a product, after stretching the operands to the output's batch.
fn choose(a: &mut Static, b: &mut Static, c: &Layout) -> Built {
    let rank = c.shape.len();
    let batch = &c.shape[..rank - 2];
    let (al, bl) = stretch(&a.layout, &b.layout, batch);
    let (m, n, k) = (c.shape[rank - 2], c.shape[rank - 1], al.shape[rank - 1]);
    let product = Product { batch: batch.to_vec(), m, k, n, a: Matrix::of(&al), b: Matrix::of(&bl), c: Matrix::of(c) };
    let batch_count: usize = product.batch_count();
    // All rows of all products against one matrix are rows of one product.
    let rows_of = |layout: &Layout| {
        let axes: Vec<usize> = (0..rank - 1).collect();
        match layout.permuted(&axes).runs().as_slice() {
            [] => Some(0),
            [(_, stride)] => Some(*stride),
            _ => None,
        }
    };
    let shared = product.b.batch.iter().zip(batch).all(|(stride, size)| *stride == 0 || *size == 1);
    let built = match (rows_of(&al), rows_of(c)) {
        (Some(a_row), Some(c_row)) if shared && k > 0 => {
            let rows = Product {
                batch: Vec::new(),
                m: m * batch_count,
                a: Matrix { batch: Vec::new(), row: a_row, column: product.a.column },
                b: Matrix { batch: Vec::new(), ..product.b.clone() },
                c: Matrix { batch: Vec::new(), row: c_row, column: product.c.column },
                ..product
            };
            if rows.m >= 2 * ROWS_MIN && c.is_contiguous() {
                Built::tiled(Rows(rows), rank - 1, 1 + k / 64, &[]).heads_group(ROWS_MIN)
            } else {
                Built::whole(Grid::new(rows, false))
            }
        }
        _ if batch_count >= STACK_MIN && k > 0 => {
            // An operand that is stretched along the batch is not read in the tile's units only.
            let own = |matrix: &Matrix| matrix.batch.iter().zip(batch).all(|(stride, size)| *stride > 0 || *size == 1);
            let aligned: Vec<usize> = [own(&product.a), own(&product.b)]
                .into_iter()
                .enumerate()
                .filter_map(|(i, own)| own.then_some(i))
                .collect();
            Built::tiled(Stack(product), rank - 2, 1 + k / 16, &aligned)
        }
        _ => Built::whole(Grid::new(product, false)),
    };
    a.layout = al;
    b.layout = bl;
    built
}

/// `alpha A' B' + beta C`
fn gemm(cx: &mut Lowering<'_>, node: &Node) -> Result<(), OpError> {
    let (mut a, mut b) = operands(cx, node)?;
    let Some(output) = node.outputs.first().copied().flatten() else { return Ok(()) };
    let shape = cx.graph().known_shape(output).unwrap_or_default();
    if node.attributes.flag("transA", false)? {
        a.layout = a.layout.permuted(&[1, 0]);
    }
    if node.attributes.flag("transB", false)? {
        b.layout = b.layout.permuted(&[1, 0]);
    }
    let (alpha, beta) = (node.attributes.float("alpha", 1.0)?, node.attributes.float("beta", 1.0)?);
    let layout = Layout::contiguous(&shape);
    let built = choose(&mut a, &mut b, &layout);
    let label = node.label(cx.graph());
    let addend = match node.inputs.get(2).copied().flatten() {
        Some(c) => {
            let c = cx.static_input(c)?;
            Some(Static { layout: c.layout.broadcast_to(&shape), ..c })
        }
        None => None,
    };
    if addend.is_none() && alpha == 1.0 {
        let made = cx.made(output, layout);
        cx.add_built(label, node.op.clone(), vec![Some(a), Some(b)], vec![Some(made)], built);
        cx.finish(node);
        return Ok(());
    }
    let product = cx.temporary(layout.clone());
    cx.hold(&product);
    cx.add_built(label, node.op.clone(), vec![Some(a), Some(b)], vec![Some(product.clone())], built);
    let mut operations = Vec::new();
    let mut at = Argument::Input(0);
    if alpha != 1.0 {
        operations.push((Op::Mul, vec![at, Argument::Number(alpha)]));
        at = Argument::Result(0);
    }
    if addend.is_some() {
        let mut c = Argument::Input(1);
        if beta != 1.0 {
            operations.push((Op::Mul, vec![c, Argument::Number(beta)]));
            c = Argument::Result(operations.len() - 1);
        }
        operations.push((Op::Add, vec![at, c]));
    }
    let made = cx.made(output, layout);
    cx.add_map(String::new(), String::new(), vec![Some(product.clone()), addend], made, &operations);
    cx.release(&product);
    cx.finish(node);
    Ok(())
}

/// The sum over the batch of the products of `product`, which `node` asks for.
fn summed(cx: &mut Lowering<'_>, node: &Node, product: &Node) -> Result<(), OpError> {
    let (a, b) = operands(cx, product)?;
    let (Some(output), Some(value)) =
        (node.outputs.first().copied().flatten(), product.outputs.first().copied().flatten())
    else {
        return Ok(());
    };
    let full = cx.graph().known_shape(value).unwrap_or_default();
    let rank = full.len();
    let batch = &full[..rank - 2];
    let (al, bl) = stretch(&a.layout, &b.layout, batch);
    let (m, n, k) = (full[rank - 2], full[rank - 1], al.shape[rank - 1]);
    let c = Layout::contiguous(&[m, n]);
    // Batch and inner axis of each operand together, as one long inner axis, if strides allow.
    let inner = |layout: &Layout, axis: usize| {
        let mut axes: Vec<usize> = (0..rank - 2).collect();
        axes.push(axis);
        match layout.permuted(&axes).runs().as_slice() {
            [] => Some(0),
            [(_, stride)] => Some(*stride),
            _ => None,
        }
    };
    let batch_count: usize = batch.iter().product();
    let grid = match (inner(&al, rank - 1), inner(&bl, rank - 2)) {
        (Some(column), Some(row)) => {
            let a = Matrix { batch: Vec::new(), row: al.strides[rank - 2], column };
            let b = Matrix { batch: Vec::new(), row, column: bl.strides[rank - 1] };
            Grid::new(Product { batch: Vec::new(), m, k: k * batch_count, n, a, b, c: Matrix::of(&c) }, false)
        }
        _ => {
            let c = Matrix { batch: vec![0; rank - 2], ..Matrix::of(&c) };
            Grid::new(Product { batch: batch.to_vec(), m, k, n, a: Matrix::of(&al), b: Matrix::of(&bl), c }, true)
        }
    };
    let shape = cx.graph().known_shape(output).unwrap_or_default();
    let made = cx.made(output, Layout::contiguous(&shape));
    let label = format!("{} + {}", product.label(cx.graph()), node.label(cx.graph()));
    let inputs = vec![Some(Static { layout: al, ..a }), Some(Static { layout: bl, ..b })];
    cx.add_built(label, "MatMul+ReduceSum".to_owned(), inputs, vec![Some(made)], Built::whole(grid));
    cx.finish(product);
    cx.finish(node);
    Ok(())
}
