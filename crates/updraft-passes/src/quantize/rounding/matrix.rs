//! Dense matrices inside slices, row by row: products through the crate `gemm`, and the factor of an inverse that error
//! feedback needs.

use gemm::Parallelism;

/// `rows` x `columns` numbers inside a slice.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T: Copy> View<'a, T> {
    /// A whole row-major matrix.
    pub(super) fn new(data: &'a [T], columns: usize) -> View<'a, T> {
        let rows = data.len().checked_div(columns).unwrap_or(0);
        View { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// Rows and columns exchanged.
    pub(super) fn transposed(self) -> View<'a, T> {
        View {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// The part from `rows.start` to `rows.end` and `columns.start` to `columns.end`.
    pub(super) fn part(self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>) -> View<'a, T> {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        let start = rows.start * self.row_stride + columns.start * self.column_stride;
        let data = if rows.is_empty() || columns.is_empty() { &self.data[..0] } else { &self.data[start..] };
        View { data, rows: rows.len(), columns: columns.len(), ..self }
    }

    /// Whether every element lies in the slice.
    fn is_inside(&self) -> bool {
        self.rows == 0
            || self.columns == 0
            || (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride < self.data.len()
    }
}

/// `c <- keep c + factor a b`, where `c` starts at `offset` of `out` and has rows of `stride` elements.
pub(super) fn multiply<T: gemm_number::Number>(
    out: &mut [T],
    offset: usize,
    stride: usize,
    keep: T,
    factor: T,
    a: View<T>,
    b: View<T>,
) {
    let (m, k, n) = (a.rows, a.columns, b.columns);
    if m == 0 || n == 0 {
        return;
    }
    assert!(k == b.rows && a.is_inside() && b.is_inside());
    assert!(n <= stride && offset + (m - 1) * stride + n <= out.len());
    // SAFETY: the assertions above keep every element that sizes and strides reach inside the three slices, and `out`
    // is borrowed mutably, so that it shares nothing with `a` and `b`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr().add(offset),
            1,
            stride as isize,
            keep != T::ZERO,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            keep,
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

mod gemm_number {
    /// What `gemm` multiplies here.
    pub trait Number: Copy + PartialEq + 'static {
        const ZERO: Self;
    }
    impl Number for f32 {
        const ZERO: f32 = 0.0;
    }
    impl Number for f64 {
        const ZERO: f64 = 0.0;
    }
}

/// Columns that are factored or inverted by plain loops before a product does the rest.
const PANEL: usize = 64;

/// The lower triangle `l` with `l lᵀ = a`, for a symmetric `a` of `n` x `n` whose lower triangle is read; `None` where
/// `a` is not positive definite.
fn cholesky(mut a: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    for start in (0..n).step_by(PANEL) {
        let end = (start + PANEL).min(n);
        for j in start..end {
            let (done, row) = a.split_at_mut(j * n);
            let row = &mut row[..n];
            // Row j of the panel against the rows above it; what lies left of the panel was taken away already.
            for i in start..j {
                let above = &done[i * n..][..n];
                let sum: f64 = (start..i).map(|k| above[k] * row[k]).sum();
                row[i] = (row[i] - sum) / above[i];
            }
            let square: f64 = row[j] - row[start..j].iter().map(|v| v * v).sum::<f64>();
            if square.is_nan() || square <= 0.0 {
                return None;
            }
            row[j] = square.sqrt();
        }
        let (done, below) = a.split_at_mut(end * n);
        for row in below.chunks_exact_mut(n) {
            for i in start..end {
                let above = &done[i * n..][..n];
                let sum: f64 = (start..i).map(|k| above[k] * row[k]).sum();
                row[i] = (row[i] - sum) / above[i];
            }
        }
        let width = end - start;
        let panel: Vec<f64> = below.chunks_exact(n).flat_map(|row| row[start..end].iter().copied()).collect();
        let panel = View::new(&panel, width);
        for first in (end..n).step_by(4 * PANEL) {
            let last = (first + 4 * PANEL).min(n);
            let (left, right) =
                (panel.part(first - end..n - end, 0..width), panel.part(first - end..last - end, 0..width));
            multiply(&mut a, first * n + first, n, 1.0, -1.0, left, right.transposed());
        }
    }
    for i in 0..n {
        a[i * n + i + 1..(i + 1) * n].fill(0.0);
    }
    Some(a)
}

/// The inverse of a lower triangle.
fn inverse_of_lower(l: &[f64], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    for start in (0..n).step_by(PANEL) {
        let end = (start + PANEL).min(n);
        let width = end - start;
        // The panel's rows of the product of `l` and what is inverted already.
        let mut sums = vec![0.0; width * start.max(1)];
        if start > 0 {
            let left = View::new(l, n).part(start..end, 0..start);
            multiply(&mut sums, 0, start, 0.0, 1.0, left, View::new(&inverse, n).part(0..start, 0..start));
        }
        for i in start..end {
            let (done, row) = inverse.split_at_mut(i * n);
            let row = &mut row[..n];
            row[..start].iter_mut().zip(&sums[(i - start) * start..]).for_each(|(r, s)| *r = -s);
            row[i] = 1.0;
            for k in start..i {
                let factor = l[i * n + k];
                let above = &done[k * n..][..k + 1];
                row.iter_mut().zip(above).for_each(|(r, a)| *r -= factor * a);
            }
            let diagonal = l[i * n + i];
            row[..=i].iter_mut().for_each(|r| *r /= diagonal);
        }
    }
    inverse
}

/// The upper triangle `u` with `uᵀ u = a⁻¹`, for a symmetric `a` of `n` x `n`; `None` where `a` is not positive definite.
///
/// With rows and columns reversed, `a = r rᵀ` for an upper triangle `r`, whose inverse is `u`: one factorization and one
/// inverse of a triangle, and `a⁻¹` itself is never formed.
pub(super) fn upper_factor_of_inverse(a: &[f64], n: usize) -> Option<Vec<f64>> {
    let reversed: Vec<f64> = a.iter().rev().copied().collect();
    let mut inverse = inverse_of_lower(&cholesky(reversed, n)?, n);
    inverse.reverse();
    Some(inverse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use updraft_base::random::{Key, fill_uniform};

    #[test]
    fn the_factor_of_the_inverse_undoes_the_matrix() {
        for n in [1, 2, 63, 64, 65, 200, 333] {
            let mut x = vec![0f32; 2 * n * n];
            fill_uniform(&Key::new(n as u64), 0, &mut x);
            let x: Vec<f64> = x.iter().map(|v| f64::from(*v) - 0.5).collect();
            let mut a = vec![0.0; n * n];
            let x = View::new(&x, n);
            multiply(&mut a, 0, n, 0.0, 1.0, x.transposed(), x);
            (0..n).for_each(|i| a[i * n + i] += 0.1);
            let u = upper_factor_of_inverse(&a, n).unwrap();
            assert!((0..n).all(|i| u[i * n..i * n + i].iter().all(|v| *v == 0.0)));
            let u = View::new(&u, n);
            let (mut inverse, mut product) = (vec![0.0; n * n], vec![0.0; n * n]);
            multiply(&mut inverse, 0, n, 0.0, 1.0, u.transposed(), u);
            multiply(&mut product, 0, n, 0.0, 1.0, View::new(&a, n), View::new(&inverse, n));
            for (i, v) in product.iter().enumerate() {
                let expected = if i / n == i % n { 1.0 } else { 0.0 };
                // The condition number is below n / 0.1, and f64 has 53 bits.
                assert!((v - expected).abs() < 1e-9, "{n}: element {i} is {v}");
            }
        }
    }

    #[test]
    fn a_matrix_that_is_not_positive_definite_has_no_factor() {
        assert!(upper_factor_of_inverse(&[1.0, 2.0, 2.0, 1.0], 2).is_none());
        assert!(upper_factor_of_inverse(&[0.0; 4], 2).is_none());
        assert!(upper_factor_of_inverse(&[f64::NAN; 4], 2).is_none());
    }
}
