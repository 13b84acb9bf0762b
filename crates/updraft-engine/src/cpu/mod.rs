//! The CPU engine: a static plan for each signature of input shapes, run on a pool of its own.
//!
//! A graph becomes fast in these stages, each a module:
//!
//! 1. `shapes` puts concrete sizes in, infers all shapes and folds what depends on constants only;
//! 2. `lower` turns nodes into [`Step`](step::Step)s: views cost nothing ([`layout`]), neighbours that can share a
//!    tile of memory become one step ([`group`](lower)), what [`quantized`] graphs compute between codes becomes
//!    steps in integers, all others get a kernel from the table in [`build`], and what has no
//!    kernel is left to the reference evaluation;
//! 3. `arena` gives every intermediate value an offset in one allocation by its lifetime;
//! 4. `session` runs the steps and keeps the state.
//!
//! # Adding a kernel
//!
//! A kernel is built once for concrete shapes and run many times. In [`build::find`] an operator's name leads to a
//! function that looks at a [`Build`](build::Build) (attributes, types, layouts, constants) and returns a
//! [`Built`](build::Built), or `None` for a form it does not cover, which then falls back to the reference. Two kinds exist:
//!
//! - [`Kernel`](kernel::Kernel) computes a whole node. It splits its own work with
//!   [`Pool::for_each`](kernel::Pool::for_each) or [`Pool::for_each_chunk`](kernel::Pool::for_each_chunk) into parts
//!   that depend on shapes only, never on the number of threads, so that the bits never do either.
//! - [`TileKernel`](kernel::TileKernel) computes a range of the leading indices of its output (rows of a softmax,
//!   images of a convolution) from the same range of its inputs. Neighbouring tile kernels and elementwise chains fuse:
//!   each tile passes through all of them while it is in one core's cache. A convolution over a batch gets its bias,
//!   activation and residual sum that way without knowing of them.
//!
//! Inputs arrive contiguous unless the builder asks for [`Build::strided`](build::Build::strided). Memory that a
//! kernel needs for itself is asked for with [`Built::scratch`](build::Built::scratch), in bytes for each worker.
//! Leaf loops are written once with [`isa::dispatch!`] and compiled for AVX-512, AVX2 and portable.

use std::sync::Arc;

use crate::{CompileOptions, Engine, EngineError, Session};

mod arena;
mod batch_norm;
mod build;
mod conv;
mod convert;
mod copy;
mod dropout;
mod elementwise;
mod fake_quantize;
mod gather;
mod group;
mod isa;
mod kernel;
mod lanes;
mod layout;
mod loss;
mod lower;
mod map;
mod math;
mod matmul;
mod pool;
mod product;
mod quantized;
mod reduce;
mod rows;
mod session;
mod shapes;
mod step;
mod update;
mod view;

/// Runs graphs on the processor, with a pool of threads that all its sessions share.
#[derive(Debug, Clone)]
pub struct CpuEngine {
    threads: Option<Arc<rayon::ThreadPool>>,
}

impl CpuEngine {
    /// An engine of so many threads; one means the caller's own, and zero is taken for one.
    ///
    /// # Errors
    /// If the system gives no threads.
    pub fn new(threads: usize) -> Result<CpuEngine, EngineError> {
        if threads <= 1 {
            return Ok(CpuEngine { threads: None });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("updraft-{i}"))
            .build()
            .map_err(|e| EngineError::Threads { threads, message: e.to_string() })?;
        Ok(CpuEngine { threads: Some(Arc::new(pool)) })
    }
}

impl Engine for CpuEngine {
    fn name(&self) -> &str {
        "cpu"
    }

    fn compile(&self, graph: &updraft_graph::Graph, options: &CompileOptions) -> Result<Box<dyn Session>, EngineError> {
        Ok(Box::new(session::CpuSession::new(graph, options, self.threads.clone())?))
    }
}
