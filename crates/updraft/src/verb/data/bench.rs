//! `updraft data bench`: how fast data is loaded.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use updraft_base::units;
use updraft_data::shards::{Shards, UnreadColumn};
use updraft_data::{
    CacheReading, Dataset, Loader, LoaderOptions, SharedCacheReading, Shuffle, Stage, StageTimes, Tail,
};
use updraft_train::waits::Waits;

use super::{parse_bytes, show_unread};
use crate::context::{Answer, Caches, Context};
use crate::failure::{Failure, Kind};
use crate::recipe;
use crate::report::wait_metrics;

/// Measure how fast data is loaded, and how long a consumer waits for it
///
/// With a recipe, batches are made as for its training, transforms and all, and thrown away. With a dataset, the rows of
/// its shards are read, checked and thrown away, nothing decoded. Prints rows and bytes (in memory) a second of wall time,
/// rows a second of processor time, the most memory that was taken, the time to the first batch from before opening, and
/// what was waited for. `--json` also has the waits as those of a training: `waits` with their course over the steps in at
/// most 512 points, and `metrics`. Blocks of a dataset are waited for in one stage, `fetch`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A recipe (an `updraft.toml`, or the folder that holds it) or a dataset.
    #[arg(value_name = "RECIPE_OR_URL")]
    what: String,

    /// The data of the recipe that is loaded.
    #[arg(long, value_name = "SPLIT", default_value = "train", value_parser = ["train", "validation", "test"])]
    split: String,

    /// Batches to load of a recipe, blocks of a dataset [default: one epoch].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,

    /// Samples of a batch, instead of the recipe's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,

    /// The order of the source instead of the recipe's.
    #[arg(long)]
    in_order: bool,

    /// The most memory that a block of a dataset's rows may take; for a recipe, its `memory_bytes` counts.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_bytes)]
    memory: u64,
}

/// What was measured.
#[derive(Default)]
struct Measured {
    steps: u64,
    rows: u64,
    bytes: u64,
    first_ns: u64,
    elapsed_ns: u64,
    waited_ns: u64,
    waits: Waits,
    /// Whether `waits` also knows the time that all threads spent on each stage.
    knows_made: bool,
    /// Columns that were left out.
    unread: Vec<UnreadColumn>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let path = Path::new(&args.what);
    let is_recipe = path.extension().is_some_and(|e| e == "toml") || path.join(recipe::FILE_NAME).is_file();
    let cpu_before = cpu_ns();
    let start_ns = context.clock.monotonic_ns();
    let mut measured = if is_recipe { load(args, context, start_ns)? } else { read(args, context, start_ns)? };
    measured.elapsed_ns = context.clock.monotonic_ns() - start_ns;
    measured.waits.elapsed_ns = measured.elapsed_ns;
    let cpu_ns = cpu_before.zip(cpu_ns()).map(|(before, after)| after.saturating_sub(before));
    Ok(answer(args, context, &measured, cpu_ns))
}

/// Batches of a recipe's data.
fn load(args: &Args, context: &Context, start_ns: u64) -> Result<Measured, Failure> {
    let loaded = recipe::load(Path::new(&args.what))?;
    let section = &loaded.recipe.data;
    let config = match args.split.as_str() {
        "validation" => section.validation.as_ref(),
        "test" => section.test.as_ref(),
        _ => Some(&section.train),
    };
    let missing = || Failure::new(Kind::Usage, format!("the recipe has no `[data.{}]`", args.split));
    let config = config.ok_or_else(missing)?;
    // Training begins to take what is filtered or packed before it has read all of it, and goes on without end.
    let goes_on = args.split == "train" && (config.pack.is_some() || !config.filter.is_empty());
    let dataset = Arc::new(Dataset::open_with(config, &loaded.folder, &context.access())?);
    let train = &loaded.recipe.train;
    let batch_size = args.batch.map_or(train.batch, |b| b as usize);
    let options = LoaderOptions {
        batch_size,
        seed: context.seed.unwrap_or(train.seed),
        shuffle: if args.in_order || args.split != "train" { Shuffle::None } else { train.shuffle },
        tail: if goes_on { Tail::Wrap } else { Tail::Pad },
        threads: context.threads,
        ..LoaderOptions::default()
    };
    let loader = Loader::timed(dataset, options, Some(context.clock.clone()))?;
    let steps = args.steps.unwrap_or_else(|| loader.steps_per_epoch());
    let task = context.progress.task("load", steps, "batches");
    let mut measured = Measured::default();
    loader.ends_before(steps);
    let mut batches = loader.batches(0..steps)?;
    loop {
        let asked_ns = context.clock.monotonic_ns();
        let Some(batch) = batches.next() else { break };
        let batch = batch?;
        let now_ns = context.clock.monotonic_ns();
        measured.waited_ns += now_ns - asked_ns;
        if measured.steps == 0 {
            measured.first_ns = now_ns - start_ns;
        }
        measured.steps += 1;
        measured.rows += batch.samples.len() as u64;
        measured.bytes += batch.tensors.iter().map(|(_, t)| t.byte_len() as u64).sum::<u64>();
        measured.waits.push(measured.steps, &batches.last_wait());
        task.at(measured.steps, String::new);
        batches.recycle(batch);
    }
    task.finish();
    measured.waits.stalls = batches.stalls().clone();
    measured.knows_made = true;
    Ok(measured)
}

/// Rows of a dataset's shards, block by block.
fn read(args: &Args, context: &Context, start_ns: u64) -> Result<Measured, Failure> {
    let (shards, unread) = Shards::open(&args.what, None, args.memory, &context.access())?.readable()?;
    let steps = shards.blocks().min(args.steps.unwrap_or(u64::MAX));
    let task = context.progress.task("read", steps, "blocks");
    let mut measured = Measured { unread, ..Measured::default() };
    let mut asked_ns = context.clock.monotonic_ns();
    shards.read_all(steps, context.threads, |rows, bytes| {
        let now_ns = context.clock.monotonic_ns();
        let waited_ns = now_ns - asked_ns;
        measured.waited_ns += waited_ns;
        if measured.steps == 0 {
            measured.first_ns = now_ns - start_ns;
        }
        measured.steps += 1;
        measured.waits.push(measured.steps, &StageTimes { fetch_ns: waited_ns, ..StageTimes::default() });
        measured.rows += rows;
        measured.bytes += bytes;
        task.at(measured.steps, String::new);
        asked_ns = context.clock.monotonic_ns();
    })?;
    task.finish();
    measured.waits.stalls.batches = measured.steps;
    measured.waits.stalls.waited.fetch_ns = measured.waited_ns;
    Ok(measured)
}

/// Processor time of this process so far, all threads; `None` where the system does not say. Linux counts in hundredths of
/// a second (proc(5), fields 14 and 15 of `stat`).
fn cpu_ns() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name of the program may hold anything but ends with the last bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) * 10_000_000)
}

/// The most memory that this process has had at once; `None` where the system does not say (proc(5), `VmHWM` of `status`).
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn answer(args: &Args, context: &Context, measured: &Measured, cpu_ns: Option<u64>) -> Answer {
    let per_second = |count: u64, ns: u64| count as f64 / (ns.max(1) as f64 / 1e9);
    let Measured { steps, rows, bytes, first_ns, elapsed_ns, waited_ns, waits, knows_made, unread } = measured;
    let rows_per_second = per_second(*rows, *elapsed_ns);
    let rows_per_cpu_second = cpu_ns.filter(|ns| *ns > 0).map(|ns| per_second(*rows, ns));
    let mut text = format!("{rows} rows in {steps} steps on {} threads\n", context.threads);
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<16}{value}\n"));
    line("time", units::duration_ns(*elapsed_ns));
    line("rows/s", format!("{rows_per_second:.0}"));
    line("MB/s", format!("{:.1}", per_second(*bytes, *elapsed_ns) / 1e6));
    match (cpu_ns, rows_per_cpu_second) {
        (Some(ns), Some(rate)) => line("CPU", format!("{}, {rate:.0} rows a CPU-second", units::duration_ns(ns))),
        (Some(_), None) => line("CPU", "too little to be counted".to_owned()),
        (None, _) => line("CPU", "not measurable here".to_owned()),
    }
    let peak_memory_bytes = peak_memory_bytes();
    line("peak memory", peak_memory_bytes.map_or_else(|| "not measurable here".to_owned(), units::bytes));
    line("first batch", units::duration_ns(*first_ns));
    let share = 100.0 * *waited_ns as f64 / (*elapsed_ns).max(1) as f64;
    line("waited", format!("{} ({share:.0} %)", units::duration_ns(*waited_ns)));
    for stage in Stage::ALL.into_iter().filter(|_| *knows_made) {
        let (waited_ns, made_ns) = (waits.stalls.waited.of(stage), waits.stalls.made.of(stage));
        let of = format!("{}, of {} on all threads", units::duration_ns(waited_ns), units::duration_ns(made_ns));
        line(&format!("  for {}", stage.name()), of);
    }
    let cache = context.caches.as_ref().and_then(Caches::reading);
    if let Some(CacheReading { memory_hits, disk_hits, fetched_bytes, corrupt }) = cache {
        let again = if corrupt > 0 { format!(", {corrupt} parts in place of corrupt ones") } else { String::new() };
        let fetched = units::bytes(fetched_bytes);
        line("cache", format!("{memory_hits} parts from memory, {disk_hits} from disk; {fetched} fetched{again}"));
    }
    let shared = context.caches.as_ref().and_then(Caches::shared_reading);
    if let Some(SharedCacheReading { hits, misses, hit_bytes, refused, away, .. }) = shared {
        let mut text = format!("{hits} found, {} of them; {misses} not", units::bytes(hit_bytes));
        if refused > 0 {
            text.push_str(&format!(", {refused} times it took nothing"));
        }
        if away > 0 {
            text.push_str(&format!(", {away} requests while it was away"));
        }
        line("cache in Redis", text);
    }
    text.push_str(&show_unread(unread));
    let mut waits_json = json!(waits);
    if !knows_made {
        waits_json["stalls"]["made"] = Value::Null;
    }
    let json = json!({
        "what": args.what, "threads": context.threads, "steps": steps, "rows": rows, "bytes": bytes,
        "elapsed_ns": elapsed_ns, "rows_per_second": rows_per_second,
        "bytes_per_second": per_second(*bytes, *elapsed_ns), "cpu_ns": cpu_ns,
        "rows_per_cpu_second": rows_per_cpu_second, "peak_memory_bytes": peak_memory_bytes, "first_batch_ns": first_ns, "waited_ns": waited_ns,
        "stalls": waits_json["stalls"], "waits": waits_json, "metrics": wait_metrics("load", waits), "cache": cache, "shared_cache": shared,
        "unread": unread,
    });
    Answer { text, json }
}
