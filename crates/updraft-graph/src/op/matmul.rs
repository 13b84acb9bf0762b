//! Matrix products: MatMul, Gemm, Einsum and their integer forms.

use crate::dim::Dim;
use crate::graph::ValueId;
use crate::op::index::broadcast_positions;
use crate::op::{
    Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, Rule, Shapes, broadcast, broadcast_dims, show_shape,
};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[Op {
    name: "MatMul",
    domain: "",
    versions: &[1, 9, 13],
    arity: Arity::exact(2),
    infer: infer_matmul,
    eval: Rule::Is(eval_matmul),
    gradient: Rule::Is(matmul_gradient),
    flops: matmul_flops,
    channels: Rule::Is(matmul_channels),
}];

fn infer_matmul(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (a, b) = (cx.input(0, "left matrix")?, cx.input(1, "right matrix")?);
    if let (Some(x), Some(y)) = (a.dtype, b.dtype) {
        if x != y {
            return Err(OpError::dtype(format!("inputs are {x} and {y}, expected one type")));
        }
    }
    let dtype = a.dtype.or(b.dtype);
    Ok(vec![match (&a.shape, &b.shape) {
        (Some(a), Some(b)) => Fact::tensor(dtype, matmul_shape(a, b)?),
        _ => Fact::of_dtype(dtype),
    }])
}

/// NumPy's rule: a vector is a row on the left and a column on the right, and loses that axis again.
pub(super) fn matmul_shape(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, OpError> {
    let refuse = || OpError::shape(format!("matrix product of {} and {}", show_shape(a), show_shape(b)));
    if a.is_empty() || b.is_empty() {
        return Err(refuse());
    }
    let (a_batch, a_matrix) = a.split_at(a.len().saturating_sub(2));
    let (b_batch, b_matrix) = b.split_at(b.len().saturating_sub(2));
    let inner = (&a_matrix[a_matrix.len() - 1], &b_matrix[0]);
    if inner.0.differs(inner.1) {
        return Err(refuse());
    }
    let mut out = broadcast_dims(&[a_batch, b_batch]).map_err(|_| refuse())?;
    if a.len() > 1 {
        out.push(a_matrix[0].clone());
    }
    if b.len() > 1 {
        out.push(b_matrix[1].clone());
    }
    Ok(out)
}

fn eval_matmul(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (a, b) = (cx.input(0)?, cx.input(1)?);
    let shape = matmul_shape(&crate::dim::dims(a.shape()), &crate::dim::dims(b.shape()))?;
    let shape = crate::dim::known_shape(&shape).ok_or_else(|| OpError::shape("matrix product of unknown size"))?;
    let a_shape = if a.rank() == 1 { vec![1, a.shape()[0]] } else { a.shape().to_vec() };
    let b_shape = if b.rank() == 1 { vec![b.shape()[0], 1] } else { b.shape().to_vec() };
    let (a_batch, b_batch) = (&a_shape[..a_shape.len() - 2], &b_shape[..b_shape.len() - 2]);
    let batch = broadcast(&[a_batch, b_batch])?;
    let (m, k, n) = (a_shape[a_shape.len() - 2], a_shape[a_shape.len() - 1], b_shape[b_shape.len() - 1]);
    let pairs = broadcast_positions(a_batch, &batch).zip(broadcast_positions(b_batch, &batch));
    let starts: Vec<(usize, usize)> = pairs.map(|(i, j)| (i * m * k, j * k * n)).collect();
    let out = if a.dtype().is_float() {
        let products = multiply(&a.to_f64()?, &b.to_f64()?, &starts, [m, k, n], 0.0, |s, x, y| s + x * y);
        Tensor::from_f64(a.dtype(), &shape, &products)?
    } else {
        let products = multiply(&a.to_i128()?, &b.to_i128()?, &starts, [m, k, n], 0, |s, x, y| s + x * y);
        Tensor::from_i128(a.dtype(), &shape, &products)?
    };
    Ok(vec![out])
}

/// The products of the `m x k` matrices at the first offsets with the `k x n` matrices at the second.
pub(super) fn multiply<T: Copy>(
    a: &[T],
    b: &[T],
    starts: &[(usize, usize)],
    [m, k, n]: [usize; 3],
    zero: T,
    multiply_add: fn(T, T, T) -> T,
) -> Vec<T> {
    let mut out = Vec::with_capacity(starts.len() * m * n);
    for (start_a, start_b) in starts {
        for i in 0..m {
            for j in 0..n {
                out.push((0..k).fold(zero, |sum, p| multiply_add(sum, a[start_a + i * k + p], b[start_b + p * n + j])));
            }
        }
    }
    out
}

/// dA = dY Bᵀ and dB = Aᵀ dY, summed over broadcast batches. Against one matrix for all batches the sum is inside one
/// product over all rows.
fn matmul_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (a, b, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let (rank_a, rank_b) = (cx.shape(a)?.len(), cx.shape(b)?.len());
    if rank_a < 2 || rank_b < 2 {
        return Err(OpError::unsupported("gradient of a matrix product with a vector; use a matrix of one row"));
    }
    let da = if cx.wants(0) {
        let bt = transpose_last(cx, b)?;
        let product = cx.op("MatMul", &[dy, bt])?;
        Some(cx.sum_to(product, a)?)
    } else {
        None
    };
    let db = if cx.wants(1) {
        let (a, dy) = if rank_b == 2 { (cx.flatten_rows(a)?, cx.flatten_rows(dy)?) } else { (a, dy) };
        let at = transpose_last(cx, a)?;
        let product = cx.op("MatMul", &[at, dy])?;
        Some(cx.sum_to(product, b)?)
    } else {
        None
    };
    Ok(vec![da, db])
}

fn transpose_last(cx: &mut Gradient, value: ValueId) -> Result<ValueId, OpError> {
    let rank = cx.shape(value)?.len();
    let mut permutation: Vec<i64> = (0..rank as i64).collect();
    permutation.swap(rank - 2, rank - 1);
    cx.op_with("Transpose", &[value], [("perm", permutation.into())])
}

fn matmul_flops(shapes: &Shapes) -> u64 {
    let inner = shapes.inputs.first().and_then(Option::as_ref).and_then(|(_, s)| s.last()).copied().unwrap_or(0);
    2 * shapes.output_len(0) * inner as u64
}

fn matmul_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let (Some(a), Some(b)) = (cx.shape(0), cx.shape(1)) else {
        return Err(OpError::shape("the ranks of both inputs must be known"));
    };
    let out = matmul_shape(a, b)?.len();
    let mut links = vec![Link::Same(Axis::Input(0, a.len() - 1), Axis::Input(1, b.len().saturating_sub(2)))];
    if a.len() > 1 {
        links.push(Link::Same(Axis::Input(0, a.len() - 2), Axis::Output(0, out - if b.len() > 1 { 2 } else { 1 })));
    }
    if b.len() > 1 {
        links.push(Link::Same(Axis::Input(1, b.len() - 1), Axis::Output(0, out - 1)));
    }
    Ok(links)
}
