//! Rows of a table by number, and the sum of gradients back into the table.

use updraft_graph::op::resolve_axis;
use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::kernel::{Io, Kernel, Pool};

/// Bytes that one task moves.
const TASK_BYTES: usize = 1 << 16;

/// Sizes around the axis that indices count along.
struct Places {
    along: usize,
    inner: usize,
    indices: DType,
}

impl Places {
    fn new(shape: &[usize], axis: i64, indices: Option<DType>) -> Result<Option<(usize, Places)>, OpError> {
        let Some(indices) = indices.filter(|d| matches!(d, DType::I64 | DType::I32)) else { return Ok(None) };
        let axis = resolve_axis(axis, shape.len())?;
        let inner = shape[axis + 1..].iter().product();
        Ok(Some((axis, Places { along: shape[axis], inner, indices })))
    }

    /// The indices, checked, negative ones counted from the end.
    fn read(&self, io: &Io, input: usize) -> Result<Vec<usize>, OpError> {
        let resolve = |index: i64| {
            let from_front = if index < 0 { index.saturating_add(self.along as i64) } else { index };
            usize::try_from(from_front)
                .ok()
                .filter(|i| *i < self.along)
                .ok_or_else(|| OpError::value(format!("index {index} is outside an axis of size {}", self.along)))
        };
        match self.indices {
            DType::I32 => io.input::<i32>(input).iter().map(|i| resolve(i64::from(*i))).collect(),
            _ => io.input::<i64>(input).iter().map(|i| resolve(*i)).collect(),
        }
    }
}

struct Gather {
    places: Places,
    element_bytes: usize,
}

/// Builds Gather of elements of any type.
pub(crate) fn gather(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let Some(data) = cx.input(0) else { return Ok(None) };
    let element_bytes = data.dtype.size_in_memory();
    let axis = cx.attributes().int("axis", 0)?;
    Ok(Places::new(cx.shape(0), axis, cx.dtype(1))?.map(|(_, places)| Built::whole(Gather { places, element_bytes })))
}

impl Kernel for Gather {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let indices = self.places.read(io, 1)?;
        let data = io.input::<u8>(0);
        let out = io.output::<u8>(0);
        let row = self.places.inner * self.element_bytes;
        let rows_per_task = (TASK_BYTES / row.max(1)).max(1);
        pool.for_each_chunk(out, rows_per_task * row, |task, rows| {
            for (i, to) in rows.chunks_exact_mut(row.max(1)).enumerate() {
                let number = task * rows_per_task + i;
                let (outer, index) = (number / indices.len(), indices[number % indices.len()]);
                let from = (outer * self.places.along + index) * row;
                to.copy_from_slice(&data[from..from + row]);
            }
        });
        Ok(())
    }
}

struct GatherGradient {
    places: Places,
    outer: usize,
}

/// Parts of the table that tasks own; each looks at all indices and takes its own, in their order.
const PARTS: usize = 8;

/// Builds GatherGradient.
pub(crate) fn gather_gradient(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let shape = cx.output_shape(0).to_vec();
    if cx.dtype(0) != Some(DType::F32) {
        return Ok(None);
    }
    let axis = cx.attributes().int("axis", 0)?;
    let places = Places::new(&shape, axis, cx.dtype(1))?;
    Ok(places.map(|(axis, places)| Built::whole(GatherGradient { outer: shape[..axis].iter().product(), places })))
}

impl Kernel for GatherGradient {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let indices = self.places.read(io, 1)?;
        let dy = io.input::<f32>(0);
        let out = io.output::<f32>(0);
        let Places { along, inner, .. } = self.places;
        let rows = if self.outer == 1 { along.div_ceil(PARTS).max(1) } else { along };
        pool.for_each_chunk(out, rows * inner, |part, out| {
            out.fill(0.0);
            let (outer, first) = if self.outer == 1 { (0, part * rows) } else { (part, 0) };
            for (number, index) in indices.iter().enumerate() {
                let Some(row) = index.checked_sub(first).filter(|row| *row < rows) else { continue };
                let from = (outer * indices.len() + number) * inner;
                let to = &mut out[row * inner..(row + 1) * inner];
                to.iter_mut().zip(&dy[from..from + inner]).for_each(|(to, v)| *to += v);
            }
        });
        Ok(())
    }
}
