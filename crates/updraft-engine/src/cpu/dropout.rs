//! Masks of dropout: a pure function of seed, stream, step and place, so that forward and backward pass, resumed runs
//! and any number of threads see the same one.

use updraft_graph::op::random::fill_dropout_mask;
use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::kernel::{Io, Kernel, Pool};

struct Mask {
    stream: i64,
}

/// Builds DropoutMask.
pub(crate) fn mask(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let types = [cx.dtype(1), cx.dtype(2), cx.dtype(3)] == [Some(DType::F32), Some(DType::I64), Some(DType::I64)];
    let stream = cx.attributes().int("stream", 0)?;
    Ok(types.then(|| Built::whole(Mask { stream })))
}

impl Kernel for Mask {
    fn run(&self, io: &mut Io<'_>, _: &Pool) -> Result<(), OpError> {
        let scalar = |index: usize| io.input::<i64>(index).first().copied();
        let (Some(ratio), Some(seed), Some(step)) = (io.input::<f32>(1).first().copied(), scalar(2), scalar(3)) else {
            return Err(OpError::shape("ratio, seed and step must be scalars"));
        };
        fill_dropout_mask(seed, self.stream, step, ratio, io.output::<f32>(0))
    }
}
