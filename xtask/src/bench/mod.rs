//! Measurements against other systems, in one run on one machine, ours and theirs by turns.

use std::path::Path;

use clap::Subcommand;

use crate::Failure;

mod engine;

/// What to measure.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Training steps on the CPU engine against PyTorch.
    Engine(engine::Arguments),
}

pub(crate) fn run(root: &Path, bench: &Bench) -> Result<(), Failure> {
    match bench {
        Bench::Engine(arguments) => engine::run(root, arguments),
    }
}
