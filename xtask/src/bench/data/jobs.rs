//! Jobs over a whole dataset: what a cache of half of it saves, and converting it, beside Apache Beam.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use super::{Place, children_cpu_s, median};
use crate::{Failure, python};

/// Some work and what is to be said of it, for people and for programs.
type Job = fn(&Place) -> Result<(String, Value), Failure>;

pub(super) const JOBS: [(&str, Job); 2] = [("cache", cache), ("convert", convert)];

const BEAM: &[&str] = &["apache-beam[tfrecord]==2.77.0", "pyarrow==25.0.1"];

/// Samples of the dataset that both work on.
const SAMPLES: u64 = 10_000;

/// Memory of the loader: what its open windows need, so that the cache alone keeps anything for the next epoch.
const LOADER_BYTES: u64 = 40 << 20;

/// Bytes that later epochs fetch, at most, of the dataset.
const FETCHED_TARGET: f64 = 0.52;

/// How many times as fast as Beam a conversion is to be.
const CONVERT_TARGET: f64 = 5.0;

/// Bytes fetched in each epoch of a shuffled dataset of many shards, half of which fits into the cache.
fn cache(place: &Place) -> Result<(String, Value), Failure> {
    place.make("raw")?;
    let shards = place.data.join("raw/small");
    if !shards.exists() {
        ingest(place, &shards, &["--format", "mds", "--shard-size", "1MiB"])?;
    }
    let recipe = place.recipe_of("raw", "small", LOADER_BYTES)?;
    let bytes = folder_bytes(&shards)?;
    let mut command = Command::new(place.root.join("target/release/examples/load"));
    command.arg(recipe).args(["100", &SAMPLES.to_string(), &place.arguments.threads.to_string()]);
    let output = command.arg((bytes / 2).to_string()).stderr(Stdio::inherit()).output()?;
    let fetched: Vec<u64> =
        String::from_utf8(output.stdout)?.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    let [first, second, third] = fetched[..] else { return Err("the loader did not tell what it fetched".into()) };
    let shares = [first, second - first, third - second].map(|fetched| fetched as f64 / bytes as f64);
    let mut text = format!("\ncache (half of a dataset of {bytes} bytes, shuffled)\n");
    for (epoch, share) in shares.iter().enumerate() {
        let target = if epoch == 0 { String::new() } else { format!("  (at most {FETCHED_TARGET})") };
        writeln!(text, "epoch {}: {share:.3} of the dataset fetched{target}", epoch + 1)?;
    }
    Ok((text, json!({ "case": "cache", "fetched_of_dataset": shares, "target": FETCHED_TARGET })))
}

/// TFRecord into shards: whole jobs, starting included, as they are run.
fn convert(place: &Place) -> Result<(String, Value), Failure> {
    place.make("raw")?;
    let beam = match &place.arguments.beam_python {
        Some(python) => python.clone(),
        None => python::environment(place.root, "beam", BEAM)?,
    };
    let script = place.root.join("xtask/src/bench/data_beam.py");
    let records = place.data.join("raw/tfrecord/*.tfrecord");
    let sides = ["updraft (parquet)", "updraft (mds)", "beam (parquet)"];
    let mut runs: [Vec<(f64, f64)>; 3] = Default::default();
    for _ in 0..place.arguments.rounds {
        for (side, runs) in sides.iter().zip(&mut runs) {
            let out = place.data.join("raw/converted");
            if out.exists() {
                std::fs::remove_dir_all(&out)?;
            }
            let (cpu, wall) = (children_cpu_s()?, Instant::now());
            match *side {
                "updraft (parquet)" => ingest(place, &out, &["--format", "parquet"])?,
                "updraft (mds)" => ingest(place, &out, &["--format", "mds"])?,
                _ => {
                    std::fs::create_dir(&out)?;
                    let mut command = Command::new(&beam);
                    python::run_quietly(command.arg(&script).args([&records, &out]))?;
                }
            }
            runs.push((wall.elapsed().as_secs_f64(), children_cpu_s()? - cpu));
            let rows = rows(place, &out)?;
            if rows != Some(SAMPLES) {
                return Err(format!("{side} wrote {rows:?} rows of {SAMPLES}").into());
            }
        }
    }
    let medians: Vec<(f64, f64)> = runs
        .iter()
        .map(|runs| (median(runs.iter().map(|r| r.0).collect()), median(runs.iter().map(|r| r.1).collect())))
        .collect();
    let beam = medians[2];
    let mut text = format!(
        "\nconvert ({SAMPLES} samples of 20 KB, TFRecord to shards)\n{:20} {:>8} {:>8} {:>14} {:>10} {:>8}\n",
        "job", "wall s", "CPU s", "beam by wall", "by CPU", "target"
    );
    let mut facts = Vec::new();
    for (side, (wall_s, cpu_s)) in sides.iter().zip(&medians) {
        let (by_wall, by_cpu) = (beam.0 / wall_s, beam.1 / cpu_s);
        writeln!(text, "{side:20} {wall_s:>8.2} {cpu_s:>8.2} {by_wall:>14.1} {by_cpu:>10.1} {CONVERT_TARGET:>8}")?;
        facts.push(json!({ "job": side, "wall_s": wall_s, "cpu_s": cpu_s, "beam_times_by_wall": by_wall, "beam_times_by_cpu": by_cpu }));
    }
    Ok((text, json!({ "case": "convert", "jobs": facts, "target": CONVERT_TARGET })))
}

fn updraft(place: &Place) -> Command {
    Command::new(place.root.join("target/release/updraft"))
}

fn ingest(place: &Place, out: &Path, options: &[&str]) -> Result<(), Failure> {
    let mut command = updraft(place);
    command.args(["data", "ingest"]).args([&place.data.join("raw/tfrecord"), out]).args(options);
    python::run_quietly(command.args(["--threads", &place.arguments.threads.to_string()]))
}

/// The rows of a dataset, as ours reads it.
fn rows(place: &Place, folder: &Path) -> Result<Option<u64>, Failure> {
    let output = updraft(place).args(["data", "inspect", "--json"]).arg(folder).output()?;
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    Ok(answer["dataset"]["rows"].as_u64())
}

fn folder_bytes(folder: &Path) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "mds") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}
