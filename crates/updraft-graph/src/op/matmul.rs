//! Matrix products: MatMul, Gemm, Einsum and their integer forms.

use crate::attribute::Attributes;
use crate::dim::{Dim, dims, known_shape};
use crate::graph::ValueId;
use crate::op::index::{broadcast_positions, checked_count};
use crate::op::{
    Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, Rule, Shapes, broadcast, broadcast_dims, filled,
    show_shape,
};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op {
        name: "MatMul",
        domain: "",
        versions: &[1, 9, 13],
        arity: Arity::exact(2),
        infer: infer_matmul,
        eval: Rule::Is(eval_matmul),
        gradient: Rule::Is(matmul_gradient),
        flops: matmul_flops,
        channels: Rule::Is(matmul_channels),
    },
    Op {
        name: "Gemm",
        domain: "",
        versions: &[7, 9, 11, 13],
        arity: Arity::range(2, 3),
        infer: infer_gemm,
        eval: Rule::Is(eval_gemm),
        gradient: Rule::Is(gemm_gradient),
        flops: gemm_flops,
        channels: Rule::Is(gemm_channels),
    },
];

fn infer_matmul(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (a, b) = (cx.input(0, "left matrix")?, cx.input(1, "right matrix")?);
    if let (Some(x), Some(y)) = (a.dtype, b.dtype)
        && x != y
    {
        return Err(OpError::dtype(format!("inputs are {x} and {y}, expected one type")));
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
    let (shape, starts, sizes) = matmul_starts(a.shape(), b.shape())?;
    let out = if a.dtype().is_float() {
        let products = multiply(&a.to_f64()?, &b.to_f64()?, &starts, sizes, 0.0, |s, x, y| s + x * y);
        Tensor::from_f64(a.dtype(), &shape, &products)?
    } else {
        let products = multiply(&a.to_i128()?, &b.to_i128()?, &starts, sizes, 0, |s, x, y| s + x * y);
        Tensor::from_i128(a.dtype(), &shape, &products)?
    };
    Ok(vec![out])
}

/// What a stack of matrix products consists of.
type Products = (Vec<usize>, Vec<(usize, usize)>, [usize; 3]);

/// The shape of a product, where each pair of matrices in it begins, and rows, inner size and columns of each.
pub(super) fn matmul_starts(a: &[usize], b: &[usize]) -> Result<Products, OpError> {
    let shape = known_shape(&matmul_shape(&dims(a), &dims(b))?)
        .ok_or_else(|| OpError::shape("matrix product of unknown size"))?;
    let (a_batch, a_matrix) = a.split_at(a.len().saturating_sub(2));
    let (b_batch, b_matrix) = b.split_at(b.len().saturating_sub(2));
    let (m, k) = if let [m, k] = a_matrix { (*m, *k) } else { (1, a_matrix[0]) };
    let n = if let [_, n] = b_matrix { *n } else { 1 };
    let batch = broadcast(&[a_batch, b_batch])?;
    checked_count(&shape)?;
    let pairs = broadcast_positions(a_batch, &batch).zip(broadcast_positions(b_batch, &batch));
    Ok((shape, pairs.map(|(i, j)| (i * m * k, j * k * n)).collect(), [m, k, n]))
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
    let product = matmul_shape(a, b)?;
    let out = product.len();
    let mut links = vec![Link::Same(Axis::Input(0, a.len() - 1), Axis::Input(1, b.len().saturating_sub(2)))];
    if a.len() > 1 {
        links.push(Link::Same(Axis::Input(0, a.len() - 2), Axis::Output(0, out - if b.len() > 1 { 2 } else { 1 })));
    }
    if b.len() > 1 {
        links.push(Link::Same(Axis::Input(1, b.len() - 1), Axis::Output(0, out - 1)));
    }
    // Matrices of a stack go together, but for one matrix that all of them meet.
    let batch = out.saturating_sub(usize::from(a.len() > 1) + usize::from(b.len() > 1));
    for (input, shape) in [a, b].into_iter().enumerate() {
        let stacked = shape.len().saturating_sub(2);
        for (axis, dim) in shape[..stacked].iter().enumerate() {
            let place = batch - stacked + axis;
            if dim.same(&product[place]) {
                links.push(Link::Same(Axis::Input(input, axis), Axis::Output(0, place)));
            }
        }
    }
    Ok(links)
}

/// The attributes of Gemm: `y = alpha A' B' + beta C`, where `A'` and `B'` may be transposed.
pub struct GemmAttributes {
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of the addend.
    pub beta: f32,
    /// Whether the left matrix is transposed.
    pub transpose_a: bool,
    /// Whether the right matrix is transposed.
    pub transpose_b: bool,
}

impl GemmAttributes {
    /// Those of a node.
    pub fn of(attributes: &Attributes) -> Result<GemmAttributes, OpError> {
        Ok(GemmAttributes {
            alpha: attributes.float("alpha", 1.0)?,
            beta: attributes.float("beta", 1.0)?,
            transpose_a: attributes.flag("transA", false)?,
            transpose_b: attributes.flag("transB", false)?,
        })
    }

    /// Rows, inner size and columns of the product of matrices of these shapes.
    fn sizes<'a>(&self, a: &'a [Dim], b: &'a [Dim]) -> Result<[&'a Dim; 3], OpError> {
        let ([a0, a1], [b0, b1]) = (a, b) else {
            return Err(OpError::shape(format!("Gemm of {} and {}, expected matrices", show_shape(a), show_shape(b))));
        };
        let (m, k) = if self.transpose_a { (a1, a0) } else { (a0, a1) };
        let (other, n) = if self.transpose_b { (b1, b0) } else { (b0, b1) };
        if k.differs(other) {
            return Err(OpError::shape(format!(
                "Gemm of {} and {} with transA = {}, transB = {}",
                show_shape(a),
                show_shape(b),
                u8::from(self.transpose_a),
                u8::from(self.transpose_b)
            )));
        }
        Ok([m, k, n])
    }
}

fn infer_gemm(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = cx.dtype(0).or(cx.dtype(1));
    let gemm = GemmAttributes::of(cx.attributes())?;
    let (Some(a), Some(b)) = (cx.shape(0), cx.shape(1)) else {
        return Ok(vec![Fact::tensor(dtype, vec![Dim::Unknown; 2])]);
    };
    let [m, _, n] = gemm.sizes(a, b)?;
    let shape = vec![m.clone(), n.clone()];
    if let Some(c) = cx.shape(2) {
        let joined = broadcast_dims(&[c, &shape])?;
        if joined.len() > 2 || joined.iter().zip(&shape).any(|(j, s)| j.differs(s)) {
            return Err(OpError::shape(format!("an addend {} for a product {}", show_shape(c), show_shape(&shape))));
        }
    }
    Ok(vec![Fact::tensor(dtype, shape)])
}

fn eval_gemm(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (a, b) = (cx.input(0)?, cx.input(1)?);
    let gemm = GemmAttributes::of(cx.attributes())?;
    let (a_dims, b_dims) = (dims(a.shape()), dims(b.shape()));
    let [m, k, n] = gemm.sizes(&a_dims, &b_dims)?.map(|d| d.known().unwrap_or(0));
    let (a_values, b_values) = (a.to_f64()?, b.to_f64()?);
    let a_at = |i: usize, p: usize| a_values[if gemm.transpose_a { p * m + i } else { i * k + p }];
    let b_at = |p: usize, j: usize| b_values[if gemm.transpose_b { j * k + p } else { p * n + j }];
    let mut y = filled(&[m, n], 0.0)?;
    if let Some(c) = cx.optional(2) {
        if broadcast(&[c.shape(), &[m, n]])? != [m, n] {
            return Err(OpError::shape(format!("an addend of shape {:?} for a product [{m}, {n}]", c.shape())));
        }
        let c_values = c.to_f64()?;
        for (y, at) in y.iter_mut().zip(broadcast_positions(c.shape(), &[m, n])) {
            *y = f64::from(gemm.beta) * c_values[at];
        }
    }
    for i in 0..m {
        for j in 0..n {
            y[i * n + j] += f64::from(gemm.alpha) * (0..k).map(|p| a_at(i, p) * b_at(p, j)).sum::<f64>();
        }
    }
    Ok(vec![Tensor::from_f64(a.dtype(), &[m, n], &y)?])
}

/// Each matrix's gradient is a Gemm of `dy` with the other, in the order and transposition that its own form asks for.
fn gemm_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (a, b, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let gemm = GemmAttributes::of(&cx.node.attributes)?;
    let (wants_a, wants_b) = (cx.wants(0), cx.wants(1));
    let mut product = |x: ValueId, y: ValueId, transpose_x: bool, transpose_y: bool| {
        cx.graph.op(
            "Gemm",
            &[x, y],
            [
                ("alpha", gemm.alpha.into()),
                ("transA", i64::from(transpose_x).into()),
                ("transB", i64::from(transpose_y).into()),
            ],
        )
    };
    let da = match (wants_a, gemm.transpose_a) {
        (false, _) => None,
        (true, false) => Some(product(dy, b, false, !gemm.transpose_b)?),
        (true, true) => Some(product(b, dy, gemm.transpose_b, true)?),
    };
    let db = match (wants_b, gemm.transpose_b) {
        (false, _) => None,
        (true, false) => Some(product(a, dy, !gemm.transpose_a, false)?),
        (true, true) => Some(product(dy, a, true, gemm.transpose_a)?),
    };
    let dc = match cx.optional(2) {
        Some(c) if cx.wants(2) => {
            let sum = cx.sum_to(dy, c)?;
            let factor = cx.scalar_like(f64::from(gemm.beta), sum)?;
            Some(if gemm.beta == 1.0 { sum } else { cx.op("Mul", &[sum, factor])? })
        }
        _ => None,
    };
    Ok(vec![da, db, dc])
}

fn gemm_flops(shapes: &Shapes) -> u64 {
    let inner = match (GemmAttributes::of(shapes.attributes), shapes.inputs.first()) {
        (Ok(gemm), Some(Some((_, a)))) => a.get(usize::from(!gemm.transpose_a)).copied().unwrap_or(0),
        _ => 0,
    };
    2 * shapes.output_len(0) * inner as u64
}

fn gemm_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let gemm = GemmAttributes::of(cx.attributes())?;
    let (rows_a, rows_b) = (usize::from(gemm.transpose_a), usize::from(gemm.transpose_b));
    let mut links = vec![
        Link::Same(Axis::Input(0, rows_a), Axis::Output(0, 0)),
        Link::Same(Axis::Input(0, 1 - rows_a), Axis::Input(1, rows_b)),
        Link::Same(Axis::Input(1, 1 - rows_b), Axis::Output(0, 1)),
    ];
    for (i, dim) in cx.shape(2).unwrap_or(&[]).iter().rev().enumerate() {
        if *dim != Dim::Known(1) {
            let axis = cx.shape(2).map_or(0, <[Dim]>::len) - 1 - i;
            links.push(Link::Same(Axis::Input(2, axis), Axis::Output(0, 1 - i.min(1))));
        }
    }
    Ok(links)
}
