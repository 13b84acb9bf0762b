//! Ranges of blocks cut where that moves a layer's output less: the second half of AWQ (Lin, Tang, Tang, Yang, Xiao, Dang,
//! Gan and Han 2023, arXiv:2306.00978). The first half, factors of channels, is in [`smooth`](super::smooth).

use updraft_graph::Tensor;

use crate::quantize::Quantizer;
use crate::quantize::rounding::{Grid, Moments, RoundingError, matrix_of, row_errors};

/// Shares of a block's range that are tried when it is cut, beside the whole: down to half in steps of a twentieth.
const RANGE_SHARES: std::ops::Range<u32> = 1..11;

/// The quantizer with each scale cut such that the block's part of the output of `weights [out, in]` moves least. What
/// a scale covers must lie in one row.
pub fn clip_ranges(weights: &Tensor, quantizer: &Quantizer, moments: &Moments) -> Result<Quantizer, RoundingError> {
    let (rows, columns, elements) = matrix_of(weights, Some(moments))?;
    let mut cut = quantizer.clone();
    let block = match (quantizer.axis, quantizer.block) {
        (Some(0), None) => columns,
        (Some(1), Some(block)) => block,
        _ => return Ok(cut),
    };
    Grid::new(quantizer, rows, columns)?;
    let hessian = moments.second();
    for (b, first) in (0..columns).step_by(block.max(1)).enumerate() {
        let last = (first + block).min(columns);
        let width = last - first;
        let inner: Vec<f64> = (first..last).flat_map(|i| hessian[i * columns..][first..last].iter().copied()).collect();
        let part: Vec<f32> = elements.chunks_exact(columns).flat_map(|row| row[first..last].iter().copied()).collect();
        let scale_at = |row: usize| row * columns.div_ceil(block) + b;
        let mut one = Quantizer { axis: Some(0), block: None, ..quantizer.clone() };
        one.zero_points = (0..rows).map(|r| quantizer.zero_points[scale_at(r)]).collect();
        let mut least = vec![f64::INFINITY; rows];
        for twentieths in std::iter::once(0).chain(RANGE_SHARES) {
            let share = 1.0 - twentieths as f32 / 20.0;
            one.scales = (0..rows).map(|r| quantizer.scales[scale_at(r)] * share).collect();
            let grid = Grid::new(&one, rows, width)?;
            let errors = row_errors(&grid.differences(&part, &grid.nearest(&part)), &inner, width);
            for (r, error) in errors.into_iter().enumerate() {
                if error < least[r] {
                    least[r] = error;
                    cut.scales[scale_at(r)] = one.scales[r];
                }
            }
        }
    }
    Ok(cut)
}
