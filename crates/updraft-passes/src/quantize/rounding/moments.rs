//! What the inputs of a layer look like over calibration data: all that the roundings here need to know of data, in
//! memory of the square of the layer's inputs.

use crate::quantize::rounding::matrix::{View, multiply};

/// Statistics of rows `x` that a layer multiplies its weights with.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    columns: usize,
    rows: u64,
    /// Sums of `x[i] x[j]` at `i * columns + j` for `i` not before the tile of `j`; see [`Moments::second`].
    products: Vec<f64>,
    sums: Vec<f64>,
    sums_abs: Vec<f64>,
    min: Vec<f32>,
    max: Vec<f32>,
}

/// A number among the inputs of a layer is none.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("column {column} of row {row} is {value}, expected a finite number")]
pub struct NotFinite {
    /// The row, counted from the first that was added.
    pub row: u64,
    /// The column.
    pub column: usize,
    /// What it is.
    pub value: f32,
}

/// Rows whose products are summed in `f32` before they join the sums in `f64`.
const ROWS_PER_PRODUCT: usize = 1024;

/// Columns whose products with all later ones are made at once.
const TILE: usize = 256;

impl Moments {
    /// No rows yet of a layer with so many inputs.
    pub fn new(columns: usize) -> Moments {
        Moments {
            columns,
            rows: 0,
            products: vec![0.0; columns * columns],
            sums: vec![0.0; columns],
            sums_abs: vec![0.0; columns],
            min: vec![f32::INFINITY; columns],
            max: vec![f32::NEG_INFINITY; columns],
        }
    }

    /// Bytes that the moments of a layer with so many inputs take, working memory included.
    pub fn bytes(columns: usize) -> u64 {
        let (columns, f64s) = (columns as u64, size_of::<f64>() as u64);
        columns * columns * f64s + columns * 5 * f64s + columns * TILE as u64 * 4
    }

    /// Adds rows of [`columns`](Moments::columns) numbers; a last row that is not whole is left out.
    pub fn add(&mut self, rows: &[f32]) -> Result<(), NotFinite> {
        let columns = self.columns;
        for row in rows.chunks_exact(columns.max(1)) {
            if let Some(column) = row.iter().position(|x| !x.is_finite()) {
                return Err(NotFinite { row: self.rows, column, value: row[column] });
            }
            self.rows += 1;
            for (i, x) in row.iter().enumerate() {
                self.sums[i] += f64::from(*x);
                self.sums_abs[i] += f64::from(x.abs());
                self.min[i] = self.min[i].min(*x);
                self.max[i] = self.max[i].max(*x);
            }
        }
        let whole = rows.len() / columns.max(1) * columns;
        let mut tile = Vec::new();
        for part in rows[..whole].chunks(ROWS_PER_PRODUCT * columns.max(1)) {
            let x = View::new(part, columns);
            let count = part.len() / columns.max(1);
            for first in (0..columns).step_by(TILE) {
                let last = (first + TILE).min(columns);
                tile.resize((columns - first) * (last - first), 0f32);
                let (left, right) = (x.part(0..count, first..columns), x.part(0..count, first..last));
                multiply(&mut tile, 0, last - first, 0.0, 1.0, left.transposed(), right);
                for (sums, products) in
                    self.products[first * columns..].chunks_exact_mut(columns).zip(tile.chunks_exact(last - first))
                {
                    sums[first..last].iter_mut().zip(products).for_each(|(s, p)| *s += f64::from(*p));
                }
            }
        }
        Ok(())
    }

    /// How many inputs the layer has.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// How many rows were added.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The mean of `x[i] x[j]`, `[columns, columns]`; the Hessian of half the squared error of a layer's output with
    /// respect to each row of its weights.
    pub fn second(&self) -> Vec<f64> {
        let n = self.columns;
        let scale = 1.0 / self.rows.max(1) as f64;
        let mut full = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let mean = self.products[i * n + j] * scale;
                full[i * n + j] = mean;
                full[j * n + i] = mean;
            }
        }
        full
    }

    /// The mean of each input.
    pub fn mean(&self) -> Vec<f32> {
        self.sums.iter().map(|sum| (sum / self.rows.max(1) as f64) as f32).collect()
    }

    /// The mean magnitude of each input.
    pub fn mean_abs(&self) -> Vec<f32> {
        self.sums_abs.iter().map(|sum| (sum / self.rows.max(1) as f64) as f32).collect()
    }

    /// The least and the greatest value of each input; zero where no row was added.
    pub fn ranges(&self) -> Vec<(f32, f32)> {
        let seen = |v: f32| if v.is_finite() { v } else { 0.0 };
        self.min.iter().zip(&self.max).map(|(min, max)| (seen(*min), seen(*max))).collect()
    }

    /// The greatest magnitude of each input.
    pub fn max_abs(&self) -> Vec<f32> {
        self.ranges().iter().map(|(min, max)| max.max(-min)).collect()
    }

    /// The moments of inputs each divided by its positive divisor.
    pub fn divided(&self, divisors: &[f32]) -> Moments {
        let mut out = self.clone();
        for i in 0..self.columns {
            let by = f64::from(divisors[i]);
            for j in 0..=i {
                out.products[i * self.columns + j] /= by * f64::from(divisors[j]);
            }
            out.sums[i] /= by;
            out.sums_abs[i] /= by;
            out.min[i] /= divisors[i];
            out.max[i] /= divisors[i];
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use updraft_base::random::{Key, fill_normal};

    #[test]
    fn moments_are_those_of_the_rows_however_they_are_batched() {
        for (rows, columns) in [(1, 1), (7, 3), (2500, 5), (40, 300)] {
            let mut x = vec![0f32; rows * columns];
            fill_normal(&Key::new(3), 0, &mut x);
            let mut moments = Moments::new(columns);
            for part in x.chunks(columns * 17) {
                moments.add(part).unwrap();
            }
            assert_eq!(moments.rows(), rows as u64);
            let second = moments.second();
            for (i, j) in [(0, 0), (columns - 1, 0), (columns / 2, columns - 1)] {
                let products = x.chunks(columns).map(|row| f64::from(row[i]) * f64::from(row[j]));
                let mean = products.sum::<f64>() / rows as f64;
                // Seventeen products of standard normal numbers summed in f32, each within six deviations.
                assert!((second[i * columns + j] - mean).abs() < 1e-4, "{rows} x {columns}: {i}, {j}");
            }
            let column = |i: usize| x.chunks(columns).map(move |row| row[i]);
            assert_eq!(moments.max_abs()[0], column(0).fold(0.0, |m, v| v.abs().max(m)));
            assert!((f64::from(moments.mean()[0]) - column(0).map(f64::from).sum::<f64>() / rows as f64).abs() < 1e-6);
        }
    }

    #[test]
    fn divided_moments_are_those_of_divided_rows() {
        let (rows, columns) = (64, 6);
        let mut x = vec![0f32; rows * columns];
        fill_normal(&Key::new(4), 0, &mut x);
        // Powers of two divide without rounding.
        let divisors = [1.0, 2.0, 0.5, 4.0, 0.25, 8.0];
        let mut moments = Moments::new(columns);
        moments.add(&x).unwrap();
        let mut expected = Moments::new(columns);
        expected.add(&x.iter().enumerate().map(|(i, v)| v / divisors[i % columns]).collect::<Vec<_>>()).unwrap();
        let found = moments.divided(&divisors);
        assert_eq!(found.second(), expected.second());
        assert_eq!((found.mean_abs(), found.ranges()), (expected.mean_abs(), expected.ranges()));
    }

    #[test]
    fn a_number_that_is_none_is_refused_by_place() {
        let mut moments = Moments::new(2);
        let found = moments.add(&[0.0, 1.0, 2.0, f32::NAN]).unwrap_err();
        assert_eq!((found.row, found.column), (1, 1));
    }
}
