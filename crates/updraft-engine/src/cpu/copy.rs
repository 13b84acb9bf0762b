//! Moving elements of any type: strided to contiguous, and several inputs into one.

use updraft_graph::OpError;
use updraft_graph::op::resolve_axis;

use crate::cpu::build::{Build, Built};
use crate::cpu::kernel::{Io, Kernel, Pool};
use crate::cpu::layout::Layout;

/// Bytes that one task moves.
const TASK_BYTES: usize = 1 << 16;

/// The elements that a layout visits, one after another.
pub(crate) struct Gather {
    runs: Vec<(usize, usize)>,
    element_bytes: usize,
}

impl Gather {
    pub(crate) fn new(layout: &Layout, element_bytes: usize) -> Gather {
        Gather { runs: layout.runs(), element_bytes }
    }

    /// Writes the elements from number `start` on.
    fn fill(&self, from: &[u8], start: usize, out: &mut [u8]) {
        let size = self.element_bytes;
        let Some(((inner, stride), outer)) = self.runs.split_last() else {
            out.copy_from_slice(&from[..out.len()]);
            return;
        };
        let (mut row, mut column) = (start / inner, start % inner);
        let mut rest = out;
        while !rest.is_empty() {
            let len = (rest.len() / size).min(inner - column);
            let (head, tail) = rest.split_at_mut(len * size);
            let mut left = row;
            let mut offset = column * stride;
            for (size, stride) in outer.iter().rev() {
                offset += left % size * stride;
                left /= size;
            }
            let first = offset * size;
            if *stride == 1 {
                head.copy_from_slice(&from[first..first + head.len()]);
            } else {
                for (i, element) in head.chunks_exact_mut(size).enumerate() {
                    let at = first + i * stride * size;
                    element.copy_from_slice(&from[at..at + size]);
                }
            }
            rest = tail;
            row += 1;
            column = 0;
        }
    }
}

impl Kernel for Gather {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let from = io.input::<u8>(0);
        let out = io.output::<u8>(0);
        let chunk = TASK_BYTES / self.element_bytes;
        pool.for_each_chunk(out, chunk * self.element_bytes, |i, part| self.fill(from, i * chunk, part));
        Ok(())
    }
}

/// Inputs side by side along one axis.
struct Concat {
    /// For each input, how to read it and how many bytes it has in each row.
    parts: Vec<(Gather, usize)>,
    row_bytes: usize,
    element_bytes: usize,
}

/// Builds a Concat of elements of any one type.
pub(crate) fn concat(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let Some(Some((dtype, shape))) = cx.outputs.first().cloned() else { return Ok(None) };
    let axis = resolve_axis(cx.attributes().int("axis", 0)?, shape.len())?;
    let layouts: Option<Vec<Layout>> = (0..cx.inputs.len()).map(|index| cx.strided(index)).collect();
    Ok(layouts.map(|layouts| concat_layouts(&layouts, &shape, axis, dtype.size_in_memory())))
}

/// The kernel that puts inputs of these layouts side by side in a contiguous output.
pub(crate) fn concat_layouts(layouts: &[Layout], shape: &[usize], axis: usize, element_bytes: usize) -> Built {
    let inner: usize = shape[axis + 1..].iter().product();
    let part = |layout: &Layout| (Gather::new(layout, element_bytes), layout.shape[axis] * inner * element_bytes);
    let row_bytes = shape[axis] * inner * element_bytes;
    Built::whole(Concat { parts: layouts.iter().map(part).collect(), row_bytes, element_bytes })
}

impl Kernel for Concat {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let out = io.output::<u8>(0);
        let rows_per_task = (TASK_BYTES / self.row_bytes.max(1)).max(1);
        let inputs: Vec<&[u8]> = (0..self.parts.len()).map(|i| io.input::<u8>(i)).collect();
        pool.for_each_chunk(out, rows_per_task * self.row_bytes, |task, rows| {
            for (i, row) in rows.chunks_exact_mut(self.row_bytes.max(1)).enumerate() {
                let row_number = task * rows_per_task + i;
                let mut rest = row;
                for ((gather, bytes), from) in self.parts.iter().zip(&inputs) {
                    let (head, tail) = rest.split_at_mut(*bytes);
                    if !head.is_empty() {
                        gather.fill(from, row_number * bytes / self.element_bytes, head);
                    }
                    rest = tail;
                }
            }
        });
        Ok(())
    }
}

/// A value surrounded by a constant.
struct Pad {
    shape: Vec<usize>,
    /// Where each row (along the last axis) of the input begins in the output, and how long it is, in bytes.
    starts: Vec<usize>,
    row_bytes: usize,
    value: Vec<u8>,
}

/// Builds a Pad by a constant number of constants, where nothing is cut away.
pub(crate) fn pad(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let Some(Some((dtype, shape))) = cx.outputs.first().cloned() else { return Ok(None) };
    let from = cx.shape(0).to_vec();
    let rank = from.len();
    if cx.view.opset < 11 || cx.attributes().string("mode", "constant")? != "constant" || rank == 0 {
        return Ok(None);
    }
    let Some(pads) = cx.constant(1).map(|t| t.to_i64()).transpose()? else { return Ok(None) };
    let axes = match (cx.input(3), cx.constant(3)) {
        (None, _) => (0..rank as i64).collect(),
        (Some(_), Some(t)) => t.to_i64()?,
        (Some(_), None) => return Ok(None),
    };
    let value = match (cx.input(2), cx.constant(2)) {
        (None, _) => vec![0; dtype.size_in_memory()],
        (Some(_), Some(t)) => t.bytes().to_vec(),
        (Some(_), None) => return Ok(None),
    };
    if pads.len() != 2 * axes.len() || pads.iter().any(|p| *p < 0) || value.len() != dtype.size_in_memory() {
        return Ok(None);
    }
    let mut before = vec![0usize; rank];
    for (axis, pad) in axes.iter().zip(&pads) {
        before[resolve_axis(*axis, rank)?] = *pad as usize;
    }
    let size = dtype.size_in_memory();
    let out = Layout::contiguous(&shape);
    let mut starts = vec![before[rank - 1]];
    for axis in (0..rank - 1).rev() {
        let inner = std::mem::take(&mut starts);
        for i in 0..from[axis] {
            starts.extend(inner.iter().map(|s| s + (before[axis] + i) * out.strides[axis]));
        }
    }
    let starts = starts.into_iter().map(|s| s * size).collect();
    Ok(Some(Built::whole(Pad { shape: from, starts, row_bytes: cx.shape(0)[rank - 1] * size, value })))
}

impl Kernel for Pad {
    fn run(&self, io: &mut Io<'_>, _: &Pool) -> Result<(), OpError> {
        let from = io.input::<u8>(0);
        let out = io.output::<u8>(0);
        match self.value.iter().all(|b| *b == 0) {
            true => out.fill(0),
            false => out.chunks_exact_mut(self.value.len()).for_each(|to| to.copy_from_slice(&self.value)),
        }
        if !self.shape.contains(&0) {
            for (row, start) in from.chunks_exact(self.row_bytes).zip(&self.starts) {
                out[*start..start + self.row_bytes].copy_from_slice(row);
            }
        }
        Ok(())
    }
}
