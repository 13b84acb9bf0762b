//! Measurements against other systems, in one run on one machine, ours and theirs by turns.

use std::path::Path;

use clap::Subcommand;

use crate::Failure;

mod child;
mod compress;
mod data;
mod engine;
mod optimize;
mod rounds;

/// What to measure.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Training steps on the CPU engine against PyTorch.
    Engine(engine::Arguments),
    /// Quantized networks against ONNX Runtime and OpenVINO: latency, and the time and memory that quantizing takes.
    Compress(compress::Arguments),
    /// Loaders of data against PyTorch, tf.data, MosaicML Streaming, WebDataset, LitData and Hugging Face datasets.
    Data(data::Arguments),
    /// `updraft optimize` on networks trained here, beside ONNX Runtime's own quantizer.
    Optimize(optimize::Arguments),
}

pub(crate) fn run(root: &Path, bench: &Bench) -> Result<(), Failure> {
    match bench {
        Bench::Engine(arguments) => engine::run(root, arguments),
        Bench::Compress(arguments) => compress::run(root, arguments),
        Bench::Data(arguments) => data::run(root, arguments),
        Bench::Optimize(arguments) => optimize::run(root, arguments),
    }
}
