//! `updraft bench`: how fast a model answers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::json;
use updraft_base::{Key, units};
use updraft_graph::{DType, Graph, Tensor};

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::model;
use crate::verb::inspect::parse_sizes;

/// Measure the latency and throughput of a model
///
/// Inputs are drawn at random from the seed: floats from the normal distribution, integers 0 or 1. Times are wall time
/// of one run each, one after another; latency under concurrent load is not measured.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model.
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// The open first size of the inputs: samples of a run.
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,

    /// Sets another open size, such as `T=64`. Repeat for more.
    #[arg(long = "size", value_name = "NAME=SIZE")]
    sizes: Vec<String>,

    /// Runs to measure.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,

    /// Runs before those, which count for nothing.
    #[arg(long, value_name = "N", default_value_t = 10)]
    warm_up: u32,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let loaded = model::load(&args.model)?;
    let graph = &loaded.model.graph;
    let sizes = parse_sizes(&args.sizes)?;
    let inputs = make_inputs(graph, args.batch, &sizes, context.seed.unwrap_or(0))?;
    let given: Vec<_> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut session = model::compile(graph, context.threads)?;
    let task = context.progress.task("bench", u64::from(args.warm_up + args.runs), "runs");
    let mut latencies_ns = Vec::new();
    for i in 0..args.warm_up + args.runs {
        let start_ns = context.clock.monotonic_ns();
        session.run(&given)?;
        let latency_ns = context.clock.monotonic_ns() - start_ns;
        if i >= args.warm_up {
            latencies_ns.push(latency_ns);
        }
        task.at(u64::from(i + 1), String::new);
    }
    task.finish();
    let total_ns: u64 = latencies_ns.iter().sum();
    latencies_ns.sort_unstable();
    let mean_ns = total_ns / u64::from(args.runs);
    let samples_per_second = args.batch as f64 * f64::from(args.runs) / (total_ns as f64 / 1e9);
    let at = |percent| percentile(&latencies_ns, percent);
    let rows =
        [("least", at(0)), ("p50", at(50)), ("p90", at(90)), ("p99", at(99)), ("most", at(100)), ("mean", mean_ns)];
    let mut text = format!("{} runs of {} on {} threads\n", args.runs, args.batch, context.threads);
    for (name, value) in rows {
        text.push_str(&format!("{name:<12}{}\n", units::duration_ns(value)));
    }
    text.push_str(&format!("throughput  {samples_per_second:.1} samples/s\n"));
    let json = json!({
        "digest": loaded.digest, "batch": args.batch, "threads": context.threads, "runs": args.runs,
        "warm_up": args.warm_up,
        "latency_ns": rows.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect::<serde_json::Map<_, _>>(),
        "samples_per_second": samples_per_second,
    });
    Ok(Answer { text, json })
}

/// The smallest time that at least `percent` of the runs did not exceed (nearest rank).
fn percentile(sorted_ns: &[u64], percent: usize) -> u64 {
    let rank = (sorted_ns.len() * percent).div_ceil(100).max(1);
    sorted_ns.get(rank - 1).copied().unwrap_or(0)
}

fn make_inputs(
    graph: &Graph,
    batch: usize,
    sizes: &BTreeMap<String, usize>,
    seed: u64,
) -> Result<Vec<(String, Tensor)>, Failure> {
    let key = Key::new(seed).child("bench");
    let mut made = Vec::new();
    for input in model::inputs(graph) {
        let value = graph.value(input);
        let unknown =
            |what: &str| Failure::new(Kind::Unsupported, format!("input `{}` has no known {what}", value.name));
        let dtype = value.ty.dtype().ok_or_else(|| unknown("element type"))?;
        let mut shape = Vec::new();
        for (axis, dim) in value.ty.shape().ok_or_else(|| unknown("rank"))?.iter().enumerate() {
            let size = match dim.evaluate(&|symbol: &str| sizes.get(symbol).copied()) {
                Some(size) => size,
                None if axis == 0 => batch,
                None => {
                    let failure =
                        Failure::new(Kind::Usage, format!("input `{}` has the open size `{dim}`", value.name));
                    return Err(failure.hint(format!("give it with `--size {dim}=…`")));
                }
            };
            shape.push(size);
        }
        if shape.first().is_some_and(|n| *n != batch) && batch != 1 {
            let message =
                format!("input `{}` has the fixed first size {}; --batch {batch} does not fit", value.name, shape[0]);
            return Err(Failure::new(Kind::Usage, message));
        }
        let key = key.child(&value.name);
        let count = updraft_graph::tensor::element_count(&shape).ok_or_else(|| unknown("size that fits in memory"))?;
        let numbers: Vec<f64> = if dtype.is_float() {
            (0..count as u64).map(|i| f64::from(key.normal_f32(i))).collect()
        } else {
            (0..count as u64).map(|i| f64::from(u8::from(key.uniform_f32(i) < 0.5))).collect()
        };
        let tensor = match dtype {
            DType::String => Err(unknown("numbers: it takes strings")),
            _ => Tensor::from_f64(dtype, &shape, &numbers).map_err(|e| Failure::of(Kind::Unsupported, &e)),
        };
        made.push((value.name.clone(), tensor?));
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_are_of_nearest_rank() {
        let times: Vec<u64> = (1..=10).collect();
        let rows = [(0, 1), (10, 1), (50, 5), (51, 6), (90, 9), (99, 10), (100, 10)];
        for (percent, expected) in rows {
            assert_eq!(percentile(&times, percent), expected, "p{percent}");
        }
    }
}
