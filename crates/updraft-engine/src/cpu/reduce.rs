//! Sums, means and extrema along axes.
//!
//! Axes that follow one another and are all kept or all reduced are one axis, which leaves at most the pattern
//! kept, reduced, kept, reduced for what networks do: rows, columns, and channels of pictures.

use updraft_graph::op::resolve_axis;
use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::kernel::{Io, Kernel, Pool, Shared};
use crate::cpu::rows::{Fold, fold_row, fold_rows, part};

/// `out[a, c] = fold over b, d of x[a, b, c, d]`.
struct Reduce {
    fold: Fold,
    sizes: [usize; 4],
    /// Indices of the first reduced axis in one task.
    block: usize,
    /// What the result is multiplied with: one over the count for a mean.
    scale: f32,
}

/// Elements in one task.
const TASK_ELEMENTS: usize = 1 << 14;

/// Tasks that the first reduced axis is cut into at most: their partial results are kept.
const BLOCKS_MAX: usize = 16;

impl Kernel for Reduce {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let x = io.input::<f32>(0);
        let out = io.output::<f32>(0);
        let [a, b, c, d] = self.sizes;
        let blocks = b.div_ceil(self.block).max(1);
        if blocks == 1 {
            // Tasks of whole results.
            let per_task = (TASK_ELEMENTS / (b * c * d).max(1)).max(1);
            let shared = Shared::new(&mut *out);
            pool.for_each(a.div_ceil(per_task), |task| {
                for i in part(a, per_task, task) {
                    // SAFETY: each task has results of its own.
                    let out = unsafe { shared.range(i * c..(i + 1) * c) };
                    self.fold(&x[i * b * c * d..(i + 1) * b * c * d], out);
                }
            });
        } else {
            let partial = &mut io.scratch::<f32>()[..a * blocks * c];
            pool.for_each_chunk(partial, c, |task, sums| {
                let rows = part(b, self.block, task % blocks);
                let start = task / blocks * b * c * d;
                self.fold(&x[start + rows.start * c * d..start + rows.end * c * d], sums);
            });
            for (out, partial) in out.chunks_exact_mut(c).zip(partial.chunks_exact(blocks * c)) {
                out.fill(self.fold.neutral());
                fold_rows(self.fold, c, partial, out);
            }
        }
        if self.scale != 1.0 {
            out.iter_mut().for_each(|v| *v *= self.scale);
        }
        Ok(())
    }
}

impl Reduce {
    /// Folds `[b, c, d]` to `[c]`.
    fn fold(&self, x: &[f32], out: &mut [f32]) {
        let [_, _, c, d] = self.sizes;
        out.fill(self.fold.neutral());
        if d == 1 {
            fold_rows(self.fold, c, x, out);
            return;
        }
        for plane in x.chunks_exact(c * d) {
            for (out, row) in out.iter_mut().zip(plane.chunks_exact(d)) {
                let pair = [*out, fold_row(self.fold, row)];
                *out = fold_row(self.fold, &pair);
            }
        }
    }
}

/// Builds ReduceSum, ReduceMean, ReduceMax and ReduceMin.
pub(crate) fn reduce(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let shape = cx.shape(0).to_vec();
    if cx.dtype(0) != Some(DType::F32) {
        return Ok(None);
    }
    let fold = match cx.view.node.op.as_str() {
        "ReduceSum" | "ReduceMean" => Fold::Sum,
        "ReduceMax" => Fold::Max,
        "ReduceMin" => Fold::Min,
        _ => return Ok(None),
    };
    let given = match (cx.input(1), cx.constant(1)) {
        (Some(_), None) => return Ok(None),
        (_, Some(t)) => t.to_i64()?,
        (None, None) => cx.attributes().ints("axes")?.map(<[i64]>::to_vec).unwrap_or_default(),
    };
    let mut reduced = vec![false; shape.len()];
    for axis in &given {
        reduced[resolve_axis(*axis, shape.len())?] = true;
    }
    if given.is_empty() {
        if cx.attributes().flag("noop_with_empty_axes", false)? {
            return Ok(None);
        }
        reduced.fill(true);
    }
    // Sizes of kept, reduced, kept, ... axes; those of size 1 belong to either.
    let mut sizes = vec![1usize];
    for (size, is_reduced) in shape.iter().zip(reduced) {
        if *size == 1 {
            continue;
        }
        if is_reduced == (sizes.len() % 2 == 0) {
            if let Some(last) = sizes.last_mut() {
                *last *= size;
            }
        } else {
            sizes.push(*size);
        }
    }
    let sizes: [usize; 4] = match sizes.as_slice() {
        [a] => [*a, 1, 1, 1],
        // Contiguous rows.
        [a, b] => [1, 1, *a, *b],
        [a, b, c] => [*a, *b, *c, 1],
        [a, b, c, d] => [*a, *b, *c, *d],
        _ => return Ok(None),
    };
    let [a, b, c, d] = match sizes {
        // Rows are tasks of their own where they are the outermost axis.
        [1, 1, c, d] => [c, 1, 1, d],
        other => other,
    };
    let count: usize = b * d;
    let scale = if cx.view.node.op == "ReduceMean" { 1.0 / count as f32 } else { 1.0 };
    let elements = b * c * d;
    let blocks = if a >= 8 { 1 } else { (elements / TASK_ELEMENTS).clamp(1, BLOCKS_MAX) };
    let block = b.div_ceil(blocks);
    let kernel = Reduce { fold, sizes: [a, b, c, d], block, scale };
    let partial = if b.div_ceil(block) > 1 { a * b.div_ceil(block) * c * size_of::<f32>() } else { 0 };
    Ok(Some(Built::whole(kernel).scratch(partial)))
}
