//! Walking tensors by position: strides, broadcasting, and moving elements of any type from place to place.
//!
//! Most operators that change shapes are one sentence here: which element of which operand each element of the output
//! is. [`pick`] carries that out without knowing the element type, strings included.

use crate::op::OpError;
use crate::tensor::{Tensor, element_count, strides};

/// A row-major walk over a shape that yields `start + Σ index * stride` at each element.
#[derive(Debug, Clone)]
pub(super) struct Positions {
    shape: Vec<usize>,
    strides: Vec<isize>,
    index: Vec<usize>,
    at: isize,
    left: usize,
}

impl Positions {
    /// The walk over `shape`. Strides may be zero (broadcasting) or negative (backwards).
    pub(super) fn new(shape: &[usize], strides: &[isize], start: usize) -> Positions {
        Positions {
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            index: vec![0; shape.len()],
            at: start as isize,
            left: element_count(shape).unwrap_or(usize::MAX),
        }
    }
}

impl Iterator for Positions {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.left = self.left.checked_sub(1)?;
        let here = self.at;
        for axis in (0..self.shape.len()).rev() {
            self.index[axis] += 1;
            self.at += self.strides[axis];
            if self.index[axis] < self.shape[axis] {
                break;
            }
            self.at -= self.strides[axis] * self.index[axis] as isize;
            self.index[axis] = 0;
        }
        Some(here as usize)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Positions {}

/// Row-major strides as [`Positions`] takes them.
pub(super) fn signed_strides(shape: &[usize]) -> Vec<isize> {
    strides(shape).into_iter().map(|s| s as isize).collect()
}

/// For each element of `out`, in order, the position in a tensor of shape `from` that broadcasts to it.
pub(super) fn broadcast_positions(from: &[usize], out: &[usize]) -> Positions {
    let lead = out.len().saturating_sub(from.len());
    let mut walk = vec![0; lead];
    walk.extend(from.iter().zip(signed_strides(from)).map(|(size, stride)| if *size == 1 { 0 } else { stride }));
    Positions::new(out, &walk, 0)
}

/// The index of each element of a shape, in order.
pub(super) fn coordinates(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> + use<> {
    let count = element_count(shape).unwrap_or(usize::MAX);
    let shape = shape.to_vec();
    (0..count).map(move |position| unravel(position, &shape))
}

/// The index of the element at a row-major position.
pub(super) fn unravel(position: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = position;
    let mut index = vec![0; shape.len()];
    for (i, size) in index.iter_mut().zip(shape).rev() {
        *i = rest % size;
        rest /= size;
    }
    index
}

/// The row-major position of an index.
pub(super) fn ravel(index: &[usize], shape: &[usize]) -> usize {
    index.iter().zip(shape).fold(0, |position, (i, size)| position * size + i)
}

/// Elements before, along and after an axis: position = `(outer * along + index) * inner + rest`.
pub(super) fn around(shape: &[usize], axis: usize) -> [usize; 3] {
    [shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product()]
}

/// A tensor of `shape` whose elements are, in order, those at `(source, position)`.
pub(super) fn pick(
    sources: &[&Tensor],
    shape: &[usize],
    picks: impl Iterator<Item = (usize, usize)>,
) -> Result<Tensor, OpError> {
    let Some(first) = sources.first() else { return Err(OpError::value("there is nothing to take elements from")) };
    let dtype = first.dtype();
    if let Some(other) = sources.iter().find(|t| t.dtype() != dtype) {
        return Err(OpError::dtype(format!("operands are {dtype} and {}, expected one type", other.dtype())));
    }
    let outside = |source: usize, position: usize| {
        OpError::value(format!("element {position} of operand {source} is outside its shape"))
    };
    if let Ok(strings) = sources.iter().map(|t| t.strings()).collect::<Result<Vec<_>, _>>() {
        let taken: Result<Vec<_>, _> =
            picks.map(|(s, p)| strings.get(s).and_then(|t| t.get(p)).cloned().ok_or_else(|| outside(s, p))).collect();
        return Ok(Tensor::from_strings(shape, taken?)?);
    }
    let mut out = Tensor::zeros(dtype, shape)?;
    let size = dtype.size_in_memory();
    for (element, (source, position)) in out.bytes_mut().chunks_exact_mut(size).zip(picks) {
        let from = sources.get(source).and_then(|t| t.bytes().get(position * size..(position + 1) * size));
        element.copy_from_slice(from.ok_or_else(|| outside(source, position))?);
    }
    Ok(out)
}

/// A tensor of `shape` whose elements are, in order, those of one tensor at these positions.
pub(super) fn take(
    source: &Tensor,
    shape: &[usize],
    positions: impl Iterator<Item = usize>,
) -> Result<Tensor, OpError> {
    pick(&[source], shape, positions.map(|p| (0, p)))
}

/// The element count of a shape, or an error that shows it.
pub(super) fn checked_count(shape: &[usize]) -> Result<usize, OpError> {
    element_count(shape).ok_or_else(|| OpError::shape(format!("shape {shape:?} does not fit in memory")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_walk_broadcast_and_reversed_axes() {
        let broadcast: Vec<usize> = broadcast_positions(&[2, 1], &[2, 2, 3]).collect();
        assert_eq!(broadcast, [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]);
        let backwards: Vec<usize> = Positions::new(&[2, 2], &[-2, 1], 2).collect();
        assert_eq!(backwards, [2, 3, 0, 1]);
        assert_eq!(Positions::new(&[2, 0], &[1, 1], 0).count(), 0);
        assert_eq!(Positions::new(&[], &[], 5).collect::<Vec<_>>(), [5]);
    }

    #[test]
    fn unravel_and_ravel_are_inverse() {
        let shape = [2, 3, 4];
        for (position, index) in coordinates(&shape).enumerate() {
            assert_eq!(ravel(&index, &shape), position);
        }
    }
}
