//! Where the elements of a value lie in its storage: reshaping, permuting and slicing change this and move nothing.

use updraft_graph::tensor::strides;

/// Offset and strides, in elements, of a value of a concrete shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Sizes, outermost first.
    pub(crate) shape: Vec<usize>,
    /// Distance between neighbours along each axis; 0 where an axis is stretched.
    pub(crate) strides: Vec<usize>,
    /// The first element's position in the storage.
    pub(crate) offset: usize,
}

impl Layout {
    /// Row-major from the start of the storage.
    pub(crate) fn contiguous(shape: &[usize]) -> Layout {
        Layout { shape: shape.to_vec(), strides: strides(shape), offset: 0 }
    }

    /// Without gaps, `[batch, spatial..., channels]` in memory for a value `[batch, channels, spatial...]`.
    pub(crate) fn channels_last(shape: &[usize]) -> Layout {
        if shape.len() < 3 {
            return Layout::contiguous(shape);
        }
        let mut order: Vec<usize> = (0..shape.len()).collect();
        order.remove(1);
        order.push(1);
        Layout::ordered(shape, &order)
    }

    /// Without gaps, with axes in this order in memory.
    fn ordered(shape: &[usize], order: &[usize]) -> Layout {
        let inner: Vec<usize> = order.iter().map(|axis| shape[*axis]).collect();
        let mut out = Layout::contiguous(shape);
        for (axis, stride) in order.iter().zip(strides(&inner)) {
            out.strides[*axis] = stride;
        }
        out
    }

    /// The axes in the order in which they lie in memory, outermost first.
    pub(crate) fn storage_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.shape.len()).collect();
        order.sort_by_key(|axis| std::cmp::Reverse(self.strides[*axis]));
        order
    }

    /// The same order of axes from the start of a storage, where elements lie without gaps.
    pub(crate) fn dense(&self) -> Option<Layout> {
        let order = self.storage_order();
        self.permuted(&order).is_contiguous().then(|| Layout::ordered(&self.shape, &order))
    }

    /// Whether elements are as far apart as in another layout of this shape; axes of size 1 may have any stride.
    pub(crate) fn is_like(&self, other: &Layout) -> bool {
        self.shape == other.shape
            && (self.shape.contains(&0)
                || (0..self.shape.len()).all(|axis| self.shape[axis] == 1 || self.strides[axis] == other.strides[axis]))
    }

    /// The number of elements.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether elements lie in row-major order without gaps; axes of size 1 may have any stride.
    pub(crate) fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        for (size, stride) in self.shape.iter().zip(&self.strides).rev() {
            if *size == 0 {
                return true;
            }
            if *size != 1 && *stride != expected {
                return false;
            }
            expected *= size;
        }
        true
    }

    /// Elements from the first to the last, both included: what a slice of the storage must hold.
    pub(crate) fn span(&self) -> usize {
        if self.shape.contains(&0) {
            return 0;
        }
        1 + self.shape.iter().zip(&self.strides).map(|(n, s)| (n - 1) * s).sum::<usize>()
    }

    /// Axes in another order.
    pub(crate) fn permuted(&self, permutation: &[usize]) -> Layout {
        Layout {
            shape: permutation.iter().map(|p| self.shape[*p]).collect(),
            strides: permutation.iter().map(|p| self.strides[*p]).collect(),
            offset: self.offset,
        }
    }

    /// Every `step`th index from `start` along one axis.
    pub(crate) fn sliced(&self, axis: usize, start: usize, len: usize, step: usize) -> Layout {
        let mut out = self.clone();
        if len > 0 {
            out.offset += start * self.strides[axis];
        }
        out.shape[axis] = len;
        out.strides[axis] = self.strides[axis] * step;
        out
    }

    /// A vector as a value of this rank that varies along one axis.
    pub(crate) fn along(&self, axis: usize, rank: usize) -> Layout {
        let mut out = Layout { shape: vec![1; rank], strides: vec![0; rank], offset: self.offset };
        out.shape[axis] = self.len();
        out.strides[axis] = self.strides.last().copied().unwrap_or(0);
        out
    }

    /// Stretched to a shape that this one broadcasts to.
    pub(crate) fn broadcast_to(&self, shape: &[usize]) -> Layout {
        let lead = shape.len() - self.shape.len();
        let strides = (0..shape.len())
            .map(|i| if i < lead || self.shape[i - lead] != shape[i] { 0 } else { self.strides[i - lead] })
            .collect();
        Layout { shape: shape.to_vec(), strides, offset: self.offset }
    }

    /// The same elements in the same order under another shape, where strides can express it.
    pub(crate) fn reshaped(&self, shape: &[usize]) -> Option<Layout> {
        if self.is_contiguous() {
            return Some(Layout { shape: shape.to_vec(), strides: strides(shape), offset: self.offset });
        }
        // Runs of axes that are contiguous among themselves, as (size, stride of the innermost).
        let runs = self.runs();
        let mut out_strides = vec![0; shape.len()];
        let mut axis = shape.len();
        for (size, stride) in runs.iter().rev() {
            let (mut left, mut step) = (*size, *stride);
            while left > 1 {
                axis = axis.checked_sub(1)?;
                if left % shape[axis] != 0 {
                    return None;
                }
                out_strides[axis] = step;
                step *= shape[axis];
                left /= shape[axis];
            }
        }
        if shape[..axis].iter().any(|n| *n != 1) {
            return None;
        }
        Some(Layout { shape: shape.to_vec(), strides: out_strides, offset: self.offset })
    }

    /// Fewest `(size, stride)` pairs, outermost first, that visit the elements in the same order.
    pub(crate) fn runs(&self) -> Vec<(usize, usize)> {
        let mut out: Vec<(usize, usize)> = Vec::new();
        for (size, stride) in self.shape.iter().copied().zip(self.strides.iter().copied()) {
            if size == 1 {
                continue;
            }
            match out.last_mut() {
                Some((n, s)) if *s == stride * size => {
                    *n *= size;
                    *s = stride;
                }
                _ => out.push((size, stride)),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshaping_keeps_strides_where_it_can() {
        let heads = Layout::contiguous(&[2, 8, 12]).sliced(2, 4, 4, 1).reshaped(&[2, 8, 2, 2]).unwrap();
        assert_eq!((heads.strides.as_slice(), heads.offset), ([96, 12, 2, 1].as_slice(), 4));
        let swapped = heads.permuted(&[0, 2, 1, 3]);
        assert_eq!(swapped.reshaped(&[2, 2, 16]), None);
        assert_eq!(swapped.reshaped(&[4, 8, 2]), None);
        assert_eq!(swapped.reshaped(&[2, 1, 2, 8, 2]).unwrap().strides, [96, 96, 2, 12, 1]);
        assert_eq!(Layout::contiguous(&[6]).broadcast_to(&[4, 6]).runs(), [(4, 0), (6, 1)]);
        assert_eq!(Layout::contiguous(&[3]).broadcast_to(&[2, 3]).reshaped(&[6]), None);
    }
}
