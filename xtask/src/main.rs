//! Our chores as one program: `cargo xtask CHORE`.
//!
//! Each chore is a module with a `run` that returns an error for a failed check. Like the product's `main.rs`, this
//! program is where printing and the clock are allowed.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::disallowed_methods)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

mod agree;
mod bench;
mod conformance;
mod fuzz;
mod gradients;
mod interop;
mod python;
mod stores;
mod streams;
mod tidy;

/// Chores of the Updraft workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Chore {
    /// Compare `updraft infer` with ONNX Runtime on networks of the zoo and on given models.
    Agree(agree::Arguments),
    /// Measure against other systems; needs a release build of this program.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Run ONNX's node cases through the reference evaluator and the engine.
    Conformance(conformance::Arguments),
    /// Run every fuzz target for some seconds.
    Fuzz(fuzz::Arguments),
    /// Compare losses and gradients of networks of the zoo with PyTorch's.
    Gradients(gradients::Arguments),
    /// Test stores against moto and Azurite, which are installed and started for it.
    Stores(stores::Arguments),
    /// Test topics of Kafka's protocol against brokers and clients of others, which are installed and started for it.
    Streams(streams::Arguments),
    /// Read datasets that the formats' originals write, and let them read ours.
    Interop(interop::Arguments),
    /// Check what compilers do not: layers, module headers, names of machines, the map in ARCHITECTURE.md.
    Tidy(tidy::Arguments),
}

/// What made a chore fail, for people.
type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let done = match Chore::parse() {
        Chore::Agree(arguments) => agree::run(&root(), &arguments),
        Chore::Bench(bench) => bench::run(&root(), &bench),
        Chore::Conformance(arguments) => conformance::run(&root(), &arguments),
        Chore::Fuzz(arguments) => fuzz::run(&root(), &arguments),
        Chore::Gradients(arguments) => gradients::run(&root(), &arguments),
        Chore::Stores(arguments) => stores::run(&root(), &arguments),
        Chore::Streams(arguments) => streams::run(&root(), &arguments),
        Chore::Interop(arguments) => interop::run(&root(), &arguments),
        Chore::Tidy(arguments) => tidy::run(&root(), &arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's root folder.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(1).map(Path::to_path_buf).unwrap_or_default()
}
