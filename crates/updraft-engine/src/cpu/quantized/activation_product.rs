//! Matrix products of two activations, as in attention.
//!
//! The right operand is packed like weights, at every run, one panel of its columns in each tile. Its zero point is
//! seldom zero: `Σ (x - z) * (y - v) = Σ x * y - v * Σ x - z * Σ (y - v)`, whose last sums come from a row of ones.

use updraft_graph::OpError;

use super::dot::{Dot, DotIsa, GROUP, LANES, LINE, with_dot};
use super::finish::{Block, Finisher};
use super::panel::{Line, Panel, Rows, Segment, multiply_rows, panel_lines, panels, subtract_zero_points};
use super::{Bytes, Finish, expect_multipliers};
use crate::cpu::kernel::{Pool, Shared};

/// Rows that are multiplied before their sums are finished.
const BATCH_ROWS: usize = 24;

/// One operand: matrices of bytes, anyhow strided.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ActivationMatrix {
    pub(crate) bytes: Bytes,
    /// For each batch axis, bytes from one matrix to the next; zero where it is broadcast.
    pub(crate) batch: Vec<usize>,
    /// From one row to the next.
    pub(crate) row: usize,
    /// From one column to the next.
    pub(crate) column: usize,
}

impl ActivationMatrix {
    /// Where the matrix of a batch index starts.
    fn start(&self, batch: &[usize], mut index: usize) -> usize {
        let mut start = 0;
        for (size, stride) in batch.iter().zip(&self.batch).rev() {
            start += index % size * stride;
            index /= size;
        }
        start
    }

    /// Bytes from the first one to the last one.
    fn span(&self, batch: &[usize], rows: usize, columns: usize) -> usize {
        let batches: usize = batch.iter().zip(&self.batch).map(|(size, stride)| (size - 1) * stride).sum();
        batches + (rows - 1) * self.row + (columns - 1) * self.column + 1
    }
}

/// `[batch..., rows, depth]` bytes times `[batch..., depth, columns]` bytes; columns are the output channels of
/// [`Finish`].
pub(crate) struct ActivationProduct {
    isa: DotIsa,
    batch: Vec<usize>,
    rows: usize,
    depth: usize,
    left: ActivationMatrix,
    right: ActivationMatrix,
    columns: usize,
    panels: Vec<Panel>,
    segments: Vec<Segment>,
    in_place: bool,
    ones: Vec<u8>,
    finisher: Finisher,
}

impl ActivationProduct {
    /// Plans it.
    ///
    /// # Errors
    /// If strides or multipliers do not fit the shape, or the finish adds a residual.
    pub(crate) fn new(
        batch: &[usize],
        shape: [usize; 3],
        left: ActivationMatrix,
        right: ActivationMatrix,
        finish: Finish,
    ) -> Result<ActivationProduct, OpError> {
        ActivationProduct::with_isa(DotIsa::detected(), batch, shape, left, right, finish)
    }

    pub(super) fn with_isa(
        isa: DotIsa,
        batch: &[usize],
        [rows, depth, columns]: [usize; 3],
        left: ActivationMatrix,
        right: ActivationMatrix,
        finish: Finish,
    ) -> Result<ActivationProduct, OpError> {
        if left.batch.len() != batch.len() || right.batch.len() != batch.len() {
            return Err(OpError::shape(format!("operands lack strides for the batch axes {batch:?}")));
        }
        expect_multipliers(&finish, columns)?;
        let finisher = Finisher::new(isa, finish, columns);
        if finisher.adds_residual() {
            return Err(OpError::unsupported("a product of two activations adds no residual"));
        }
        let in_place = !left.bytes.signed && left.column == 1 && depth % GROUP == 0;
        Ok(ActivationProduct {
            isa,
            batch: batch.to_vec(),
            rows,
            depth,
            left,
            right,
            columns,
            panels: panels(isa, columns),
            segments: vec![Segment { offset: 0, len: depth }],
            in_place,
            ones: vec![1; depth.next_multiple_of(GROUP)],
            finisher,
        })
    }

    fn output_bytes(&self) -> usize {
        self.batch.iter().product::<usize>() * self.rows * self.columns * self.finisher.element_bytes()
    }

    fn lines_max(&self) -> usize {
        self.panels.iter().map(|panel| panel_lines(&self.segments, panel.vectors)).max().unwrap_or(0)
    }

    /// Bytes of scratch for each worker.
    pub(crate) fn scratch_bytes(&self) -> usize {
        let copied = if self.in_place { 0 } else { self.rows * self.depth.next_multiple_of(GROUP) };
        // Lines are aligned inside each worker's share.
        LINE + self.lines_max() * LINE + copied.next_multiple_of(LINE)
    }

    /// Computes the output, `[batch..., rows, columns]`.
    ///
    /// # Panics
    /// If a slice is shorter than planned.
    pub(crate) fn run(&self, pool: &Pool, left: &[u8], right: &[u8], scratch: &mut [u8], output: &mut [u8]) {
        assert_eq!(output.len(), self.output_bytes());
        if output.is_empty() {
            return;
        }
        if self.depth > 0 {
            assert!(left.len() >= self.left.span(&self.batch, self.rows, self.depth));
            assert!(right.len() >= self.right.span(&self.batch, self.depth, self.columns));
        }
        let count = self.batch.iter().product::<usize>() * self.panels.len();
        let shared = Shared::new(output);
        pool.for_each_with_scratch(count, scratch, |index, scratch| {
            let (matrix, panel) = (index / self.panels.len(), self.panels[index % self.panels.len()]);
            self.tile(matrix, panel, left, right, scratch, &shared);
        });
    }

    /// One panel of one matrix.
    fn tile(
        &self,
        matrix: usize,
        panel: Panel,
        left: &[u8],
        right: &[u8],
        scratch: &mut [u8],
        output: &Shared<'_, u8>,
    ) {
        let misaligned = scratch.as_ptr().align_offset(LINE);
        let (lines, copied) = scratch[misaligned..].split_at_mut(self.lines_max() * LINE);
        let lines: &mut [Line] = bytemuck::cast_slice_mut(lines);
        let lines = &mut lines[..panel_lines(&self.segments, panel.vectors)];
        let right_start = self.right.start(&self.batch, matrix);
        // No byte of a product without depth is read, nor need there be one.
        let right = right.get(right_start + panel.start * self.right.column..).unwrap_or(&[]);
        pack_right(self.isa, self.depth, &self.right, right, panel, lines);
        let (raised, lowered) = (i32::from(self.left.bytes.signed) * 128, i32::from(!self.right.bytes.signed) * 128);
        let (left_zero, right_zero) = (self.left.bytes.zero_point + raised, self.right.bytes.zero_point - lowered);
        let mut addends = [0; 4 * LANES];
        let addends = &mut addends[..panel.width()];
        let zeros = [0; 4 * LANES];
        let ones = Rows {
            input: &self.ones,
            starts: &[0],
            segments: &self.segments,
            lines,
            vectors: panel.vectors,
            addends: &zeros,
        };
        multiply_rows(self.isa, ones, addends);
        let zeros_in_sum = (self.depth as i32).wrapping_mul(right_zero);
        for addend in addends.iter_mut() {
            *addend = addend.wrapping_sub(zeros_in_sum).wrapping_mul(left_zero).wrapping_neg();
        }
        let left = &left[self.left.start(&self.batch, matrix).min(left.len())..];
        let (input, pitch) = if self.in_place { (left, self.left.row) } else { self.copy_left(left, copied) };
        let mut sums = [0; BATCH_ROWS * 4 * LANES];
        let mut starts = [0; BATCH_ROWS];
        let zero_points = [right_zero; 4 * LANES];
        for first in (0..self.rows).step_by(BATCH_ROWS) {
            let rows = BATCH_ROWS.min(self.rows - first);
            let starts = &mut starts[..rows];
            starts.iter_mut().enumerate().for_each(|(row, start)| *start = (first + row) * pitch);
            let sums = &mut sums[..rows * panel.width()];
            let rows = Rows { input, starts, segments: &self.segments, lines, vectors: panel.vectors, addends };
            multiply_rows(self.isa, rows, sums);
            if right_zero != 0 {
                subtract_zero_points(rows, &zero_points[..panel.used], sums);
            }
            let block = Block {
                sums,
                width: panel.width(),
                channel: panel.start,
                channels: panel.used,
                start: (matrix * self.rows + first) * self.columns + panel.start,
                pitch: self.columns,
                residual: &[],
            };
            // SAFETY: each tile has columns of its own.
            unsafe { self.finisher.write(block, output) };
        }
    }

    /// Rows of the left operand one after another, unsigned, with their distance.
    fn copy_left<'a>(&self, left: &[u8], to: &'a mut [u8]) -> (&'a [u8], usize) {
        let pitch = self.depth.next_multiple_of(GROUP);
        let flip = if self.left.bytes.signed { 0x80 } else { 0 };
        if self.depth > 0 {
            for (row, to) in to.chunks_exact_mut(pitch).take(self.rows).enumerate() {
                let from = &left[row * self.left.row..];
                if self.left.column == 1 {
                    to.iter_mut().zip(&from[..self.depth]).for_each(|(to, from)| *to = from ^ flip);
                } else {
                    let from = from.iter().step_by(self.left.column.max(1));
                    to[..self.depth].iter_mut().zip(from).for_each(|(to, from)| *to = from ^ flip);
                }
            }
        }
        (to, pitch)
    }
}

/// Packs a panel of columns, whose first one starts where `from` does.
fn pack_right(isa: DotIsa, depth: usize, right: &ActivationMatrix, from: &[u8], panel: Panel, lines: &mut [Line]) {
    let flip = if right.bytes.signed { 0 } else { 0x80 };
    let groups = depth.div_ceil(GROUP);
    let lines: &mut [u8] = bytemuck::cast_slice_mut(lines);
    for (index, line) in lines.chunks_exact_mut(LINE).take(groups * panel.vectors).enumerate() {
        let (group, vector) = (index / panel.vectors, index % panel.vectors);
        let terms = GROUP.min(depth - group * GROUP);
        let lanes = LANES.min(panel.used - vector * LANES);
        let start = group * GROUP * right.row + vector * LANES * right.column;
        let last = start + (GROUP - 1) * right.row + LANES;
        if right.column == 1 && terms == GROUP && lanes == LANES && last <= from.len() {
            interleave(isa, &from[start..last], right.row, flip, line);
        } else if right.row == 1 && terms == GROUP {
            line[lanes * GROUP..].fill(0);
            for (lane, to) in line.chunks_exact_mut(GROUP).take(lanes).enumerate() {
                let from = &from[start + lane * right.column..][..GROUP];
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from ^ flip);
            }
        } else {
            for (at, to) in line.iter_mut().enumerate() {
                let (lane, term) = (at / GROUP, at % GROUP);
                let exists = lane < lanes && term < terms;
                *to = if exists { from[start + lane * right.column + term * right.row] ^ flip } else { 0 };
            }
        }
    }
}

/// Four rows of sixteen bytes to one line.
fn interleave(isa: DotIsa, from: &[u8], pitch: usize, flip: u8, to: &mut [u8]) {
    assert!(isa.is_there() && from.len() >= (GROUP - 1) * pitch + LANES && to.len() >= LINE);
    // SAFETY: the processor has the instruction set, and both slices are long enough.
    unsafe {
        with_dot!(isa, interleave_in(from: &[u8], pitch: usize, flip: u8, to: &mut [u8]));
    }
}

#[inline(always)]
unsafe fn interleave_in<D: Dot>(from: &[u8], pitch: usize, flip: u8, to: &mut [u8]) {
    // SAFETY: the caller's promise.
    unsafe { D::interleave(std::array::from_fn(|row| from.as_ptr().add(row * pitch)), flip, to.as_mut_ptr()) }
}
