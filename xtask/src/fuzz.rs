//! A short run of every fuzz target, on the stable compiler.
//!
//! libFuzzer needs coverage counters, which are an LLVM pass that stable `rustc` can be told to run; only the address
//! sanitizer, which safe code has no use for, needs a nightly one.

use std::fs;
use std::path::Path;
use std::process::Command;

use clap::Args;

use crate::Failure;

const TARGETS: [&str; 10] = [
    "onnx_read",
    "text_parse",
    "mds_read",
    "tar_read",
    "tfrecord_read",
    "parquet_read",
    "arrow_read",
    "table_read",
    "manifest_read",
    "kafka_read",
];

/// What `cargo fuzz` passes too, without the sanitizer.
const COVERAGE_FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Ccodegen-units=1";

/// Memory that a target may take: what an input of some kilobytes makes is far below.
const MEMORY_MB_MAX: u64 = 2048;

/// Time that one input may take.
const INPUT_SECONDS_MAX: u64 = 10;

/// Run every fuzz target for some seconds; a finding is left in `target/fuzz/findings`.
#[derive(Args)]
pub struct Arguments {
    /// Seconds for each target.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// One target instead of all.
    #[arg(long, value_parser = TARGETS)]
    target: Option<String>,
}

/// Builds the targets and runs them.
pub fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    let folder = root.join("target").join("fuzz");
    // A target triple keeps the flags away from build scripts.
    let triple = host_triple()?;
    let built = Command::new("cargo")
        .args(["build", "--release", "--target", &triple])
        .current_dir(root.join("fuzz"))
        .env("RUSTFLAGS", COVERAGE_FLAGS)
        .env("CARGO_TARGET_DIR", &folder)
        .status()?;
    if !built.success() {
        return Err("the fuzz targets do not build".into());
    }
    let findings = folder.join("findings");
    fs::create_dir_all(&findings)?;
    for target in TARGETS.iter().filter(|t| arguments.target.as_deref().is_none_or(|only| only == **t)) {
        let corpus = folder.join("corpus").join(target);
        fs::create_dir_all(&corpus)?;
        copy_seeds(&root.join("fuzz/seeds").join(target), &corpus)?;
        let status = Command::new(folder.join(&triple).join("release").join(target))
            .arg(&corpus)
            .arg(format!("-max_total_time={}", arguments.seconds))
            .arg(format!("-rss_limit_mb={MEMORY_MB_MAX}"))
            .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
            .arg(format!("-artifact_prefix={}/{target}-", findings.display()))
            .arg("-print_final_stats=1")
            .status()?;
        if !status.success() {
            return Err(format!("{target}: an input breaks it; see {}", findings.display()).into());
        }
    }
    Ok(())
}

/// Seeds are small: with files of real models ten times fewer inputs are tried.
fn copy_seeds(from: &Path, to: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn host_triple() -> Result<String, Failure> {
    let output = Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8(output.stdout)?;
    let triple = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(triple.ok_or("`rustc -vV` names no host")?.to_owned())
}
