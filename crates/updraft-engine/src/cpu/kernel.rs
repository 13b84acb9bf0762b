//! What a kernel is, and what it is given at run time.

use std::ops::Range;

use bytemuck::{AnyBitPattern, NoUninit, Pod};
use rayon::prelude::*;
use updraft_graph::OpError;

/// Computes one step, whole.
pub(crate) trait Kernel: Send + Sync {
    /// Writes every element of every output. What can be wrong with the content of inputs (an index out of range) is
    /// an error; everything else was refused when the kernel was built.
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError>;
}

/// Computes a range of the leading indices of its outputs from the same range of its inputs.
///
/// *Units* are the indices of the leading axes, flattened, that the group of kernels agreed on. A kernel is asked for
/// units one range after another, by several threads at once, and must give the same bits for any partition.
pub(crate) trait TileKernel: Send + Sync {
    /// Writes the units of the tile in every output.
    fn run(&self, tile: &mut Tile<'_>);
}

/// A piece of memory that a kernel may touch: part of the arena, of an input, of a constant.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Raw {
    pub(crate) ptr: *mut u8,
    pub(crate) bytes: usize,
}

// SAFETY: a `Raw` is only an address. The plan hands the same memory to two threads for writing never, and for
// reading only while nobody writes.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

impl Raw {
    /// No memory: an operand that is left out.
    pub(crate) const NONE: Raw = Raw { ptr: std::ptr::dangling_mut::<u128>().cast(), bytes: 0 };

    fn slice<'a, T: AnyBitPattern>(self) -> &'a [T] {
        // SAFETY: the plan gives `bytes` initialised bytes at `ptr`, aligned for the value's element type, which
        // outlive the step and which nobody writes while this step reads them.
        let bytes = unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) };
        bytemuck::cast_slice(bytes)
    }

    fn slice_mut<'a, T: AnyBitPattern + NoUninit>(self) -> &'a mut [T] {
        // SAFETY: as in `slice`; the plan gives outputs and scratch to one step alone, and `Io` and `Tile` give each
        // piece away only once.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) };
        bytemuck::cast_slice_mut(bytes)
    }
}

/// The operands of a [`Kernel`].
pub(crate) struct Io<'a> {
    pub(crate) inputs: &'a [Raw],
    pub(crate) outputs: Vec<Raw>,
    /// For every worker of the pool, one after another.
    pub(crate) scratch: Raw,
}

impl<'a> Io<'a> {
    /// Whether an optional input is there.
    pub(crate) fn has(&self, index: usize) -> bool {
        self.inputs.get(index).is_some_and(|raw| raw.bytes > 0)
    }

    /// An input's elements; of a strided input, those from its first to its last. Empty where it is left out.
    pub(crate) fn input<T: Pod>(&self, index: usize) -> &'a [T] {
        self.inputs.get(index).map_or(&[], |raw| raw.slice())
    }

    /// An output's elements, uninitialised in the sense that they hold old values. The second call for one output
    /// gives nothing, so that no memory is lent twice; neither does one for an output that is not wanted.
    pub(crate) fn output<T: Pod>(&mut self, index: usize) -> &'a mut [T] {
        match self.outputs.get_mut(index) {
            Some(raw) => std::mem::replace(raw, Raw::NONE).slice_mut(),
            None => &mut [],
        }
    }

    /// All scratch memory, once: as many bytes for each worker as the builder asked for.
    pub(crate) fn scratch<T: Pod>(&mut self) -> &'a mut [T] {
        std::mem::replace(&mut self.scratch, Raw::NONE).slice_mut()
    }
}

/// The operands of a [`TileKernel`]. Pointers are such that an element has the index it would have in the whole
/// value, also where only the tile's part of it exists.
pub(crate) struct Tile<'a> {
    pub(crate) inputs: &'a [*const u8],
    pub(crate) outputs: &'a [*mut u8],
    /// What to compute.
    pub(crate) units: Range<usize>,
    /// This worker's scratch memory.
    pub(crate) scratch: &'a mut [u8],
}

impl<'a> Tile<'a> {
    /// Elements `range` of an input.
    ///
    /// # Safety
    /// The input must be contiguous, of type `T`, have these elements, and where it is made by the group they must
    /// belong to the tile's units.
    pub(crate) unsafe fn input<T: Pod>(&self, index: usize, range: Range<usize>) -> &'a [T] {
        let start = self.inputs[index].cast::<T>().wrapping_add(range.start);
        // SAFETY: by the caller's promise the elements exist; nobody writes them while this kernel runs.
        unsafe { std::slice::from_raw_parts(start, range.len()) }
    }

    /// Elements `range` of an output.
    ///
    /// # Safety
    /// As for [`input`](Tile::input), the elements must belong to the tile's units, and no two slices of one output that live at the same time
    /// may overlap.
    pub(crate) unsafe fn output<T: Pod>(&mut self, index: usize, range: Range<usize>) -> &'a mut [T] {
        let start = self.outputs[index].cast::<T>().wrapping_add(range.start);
        // SAFETY: by the caller's promise; other threads have other units.
        unsafe { std::slice::from_raw_parts_mut(start, range.len()) }
    }
}

/// The threads that a session runs on. One thread is the caller's own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pool {
    pub(crate) threads: usize,
}

impl Pool {
    /// Calls `work` for every index below `count`, in any order, at once where there are threads. `count` must depend
    /// on shapes only.
    pub(crate) fn for_each(&self, count: usize, work: impl Fn(usize) + Sync) {
        if self.threads == 1 || count <= 1 {
            (0..count).for_each(work);
        } else {
            (0..count).into_par_iter().with_max_len(1).for_each(&work);
        }
    }

    /// Calls `work` for every piece of `chunk` elements of `out`, with its number. `chunk` must depend on shapes only.
    pub(crate) fn for_each_chunk<T: Send>(&self, out: &mut [T], chunk: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        let chunk = chunk.max(1);
        if self.threads == 1 || out.len() <= chunk {
            out.chunks_mut(chunk).enumerate().for_each(|(i, part)| work(i, part));
        } else {
            out.par_chunks_mut(chunk).with_max_len(1).enumerate().for_each(|(i, part)| work(i, part));
        }
    }

    /// As [`for_each`](Pool::for_each), with an equal part of `scratch` for each worker, holding whatever was left in it.
    pub(crate) fn for_each_with_scratch<T: Send>(
        &self,
        count: usize,
        scratch: &mut [T],
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let part = scratch.len() / self.threads;
        let shared = Shared::new(scratch);
        self.for_each(count, |index| {
            let start = self.worker() * part;
            // SAFETY: each worker has a part of its own and runs one index at a time, as `work` waits for no others.
            work(index, unsafe { shared.range(start..start + part) });
        });
    }

    /// Number of the worker that runs this code, below `threads`.
    pub(crate) fn worker(&self) -> usize {
        if self.threads == 1 { 0 } else { rayon::current_thread_index().unwrap_or(0) }
    }
}

/// A slice of which several threads write disjoint parts that are not chunks (columns, tiles).
pub(crate) struct Shared<'a, T> {
    ptr: *mut T,
    len: usize,
    _life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: only an address and a length; `range` states what callers owe.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares a slice that nobody else can reach meanwhile.
    pub(crate) fn new(slice: &'a mut [T]) -> Shared<'a, T> {
        Shared { ptr: slice.as_mut_ptr(), len: slice.len(), _life: std::marker::PhantomData }
    }

    /// Whether there is nothing to write: an output that is not wanted.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements in all.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// A part for writing.
    ///
    /// # Panics
    /// If the range is outside the slice.
    ///
    /// # Safety
    /// No two parts that live at the same time may overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part of a shared slice is outside it");
        // SAFETY: inside the slice by the check above, disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }

    /// The first element's address, for leaves that take strides.
    pub(crate) fn as_mut_ptr(&self) -> *mut T {
        self.ptr
    }
}
