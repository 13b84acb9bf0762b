//! Matrix products on the crate `gemm`, which takes any strides: transposes and head splits cost nothing here.

use gemm::Parallelism;

use crate::cpu::kernel::{Io, Kernel, Pool, Shared, Tile, TileKernel};
use crate::cpu::layout::Layout;
use updraft_graph::OpError;

/// One family of products `C[b] = A[b] B[b]` with `A` of m x k and `B` of k x n, all of `f32`.
#[derive(Debug, Clone)]
pub(crate) struct Product {
    /// Sizes of the batch axes.
    pub(crate) batch: Vec<usize>,
    pub(crate) m: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
    pub(crate) c: Matrix,
}

/// Strides of a stack of matrices.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    /// Along each batch axis.
    pub(crate) batch: Vec<usize>,
    pub(crate) row: usize,
    pub(crate) column: usize,
}

impl Matrix {
    /// The last two axes of a layout as rows and columns, the others as batch.
    pub(crate) fn of(layout: &Layout) -> Matrix {
        let (batch, matrix) = layout.strides.split_at(layout.strides.len() - 2);
        Matrix { batch: batch.to_vec(), row: matrix[0], column: matrix[1] }
    }

    fn start(&self, batch: &[usize], mut index: usize) -> usize {
        let mut out = 0;
        for (size, stride) in batch.iter().zip(&self.batch).rev() {
            out += index % size * stride;
            index /= size;
        }
        out
    }
}

impl Product {
    pub(crate) fn batch_count(&self) -> usize {
        self.batch.iter().product()
    }

    /// Rows `rows` and columns `columns` of product `index`; added to what is there, or replacing it.
    ///
    /// # Safety
    /// The pointers must be to the first elements of stacks that these sizes and strides describe, and no other
    /// thread may touch this part of `c`.
    unsafe fn multiply(
        &self,
        pointers: (*const f32, *const f32, *mut f32),
        index: usize,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        add: bool,
    ) {
        let a = pointers.0.wrapping_add(self.a.start(&self.batch, index) + rows.start * self.a.row);
        let b = pointers.1.wrapping_add(self.b.start(&self.batch, index) + columns.start * self.b.column);
        let offset = self.c.start(&self.batch, index) + rows.start * self.c.row + columns.start * self.c.column;
        let c = pointers.2.wrapping_add(offset);
        // SAFETY: by the caller's promise. Parallelism is ours: tiles depend on shapes only, so that bits do not depend on threads.
        unsafe {
            gemm::gemm(
                rows.len(),
                columns.len(),
                self.k,
                c,
                self.c.column as isize,
                self.c.row as isize,
                add,
                a,
                self.a.column as isize,
                self.a.row as isize,
                b,
                self.b.column as isize,
                self.b.row as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
}

/// Rows of one product: units are rows of the output.
pub(crate) struct Rows(pub(crate) Product);

impl TileKernel for Rows {
    fn run(&self, tile: &mut Tile<'_>) {
        let pointers = (tile.inputs[0].cast(), tile.inputs[1].cast(), tile.outputs[0].cast());
        // SAFETY: the builder took sizes and strides from the operands; the rows are this tile's.
        unsafe { self.0.multiply(pointers, 0, tile.units.clone(), 0..self.0.n, false) }
    }
}

/// A stack of products: units are the products.
pub(crate) struct Stack(pub(crate) Product);

impl TileKernel for Stack {
    fn run(&self, tile: &mut Tile<'_>) {
        let pointers = (tile.inputs[0].cast(), tile.inputs[1].cast(), tile.outputs[0].cast());
        for index in tile.units.clone() {
            // SAFETY: as above; product `index` is this tile's.
            unsafe { self.0.multiply(pointers, index, 0..self.0.m, 0..self.0.n, false) }
        }
    }
}

/// Everything, cut into rectangles of the outputs; where `summed`, the products of a stack are added up.
pub(crate) struct Grid {
    product: Product,
    summed: bool,
    rows: usize,
    columns: usize,
}

/// Multiply-adds that a task should have: some ten microseconds, so that handing it out costs little.
const TASK_WORK: usize = 1 << 20;

impl Grid {
    pub(crate) fn new(product: Product, summed: bool) -> Grid {
        let outputs = if summed { 1 } else { product.batch_count() };
        let depth = if summed { product.k * product.batch_count() } else { product.k };
        // Halve the longer side until tasks are small enough, but keep sides that fill the registers of a kernel and
        // no more tasks than would ever be of use.
        let (mut rows, mut columns) = (product.m.max(1), product.n.max(1));
        let tasks = |rows: usize, columns: usize| outputs * product.m.div_ceil(rows) * product.n.div_ceil(columns);
        while rows * columns * depth > TASK_WORK && tasks(rows, columns) < 8 && (rows > 96 || columns > 96) {
            if columns >= rows {
                columns = columns.div_ceil(2).next_multiple_of(16);
            } else {
                rows = rows.div_ceil(2).next_multiple_of(16);
            }
        }
        Grid { product, summed, rows, columns }
    }
}

impl Kernel for Grid {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let p = &self.product;
        let a = Address(io.input::<f32>(0).as_ptr());
        let b = Address(io.input::<f32>(1).as_ptr());
        let out = io.output::<f32>(0);
        if p.k == 0 || (self.summed && p.batch_count() == 0) {
            out.fill(0.0);
            return Ok(());
        }
        let out = Shared::new(out);
        let (down, across) = (p.m.div_ceil(self.rows), p.n.div_ceil(self.columns));
        let stacked = if self.summed { 1 } else { p.batch_count() };
        pool.for_each(stacked * down * across, |task| {
            let (index, row, column) = (task / (down * across), task / across % down, task % across);
            let rows = row * self.rows..p.m.min((row + 1) * self.rows);
            let columns = column * self.columns..p.n.min((column + 1) * self.columns);
            let pointers = (a.get(), b.get(), out.as_mut_ptr());
            // SAFETY: sizes and strides are the operands'; tasks have disjoint rectangles of the output.
            unsafe {
                if self.summed {
                    for index in 0..p.batch_count() {
                        p.multiply(pointers, index, rows.clone(), columns.clone(), index > 0);
                    }
                } else {
                    p.multiply(pointers, index, rows, columns, false);
                }
            }
        });
        Ok(())
    }
}

/// An address that threads read from.
#[derive(Clone, Copy)]
struct Address(*const f32);

// SAFETY: nobody writes what kernels read while they run.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

impl Address {
    fn get(self) -> *const f32 {
        self.0
    }
}
