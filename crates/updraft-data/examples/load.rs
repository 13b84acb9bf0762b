//! Takes shuffled batches as fast as they come, so that loaders can be compared:
//! `load DATASET.toml BATCH SAMPLES THREADS` prints the time of the first batch, in Unix seconds, and the samples taken.
#![allow(clippy::print_stdout, clippy::disallowed_methods)]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use updraft_data::{Dataset, DatasetConfig, Loader, LoaderOptions, Shuffle, Tail};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [recipe, batch, samples, threads] = &arguments[..] else {
        return Err("expected DATASET.toml BATCH SAMPLES THREADS".into());
    };
    let (batch, samples, threads): (usize, u64, usize) = (batch.parse()?, samples.parse()?, threads.parse()?);
    let config: DatasetConfig = toml::from_str(&std::fs::read_to_string(recipe)?)?;
    let dataset = Dataset::open(&config, Path::new(recipe).parent().unwrap_or(Path::new(".")))?;
    let options = LoaderOptions {
        batch_size: batch,
        seed: 1,
        shuffle: Shuffle::Global,
        tail: Tail::Drop,
        threads,
        ..LoaderOptions::default()
    };
    let loader = Loader::new(Arc::new(dataset), options)?;
    let mut first = None;
    let steps = samples.div_ceil(batch as u64);
    let mut batches = loader.batches(0..steps)?;
    while let Some(batch) = batches.next() {
        let batch = batch?;
        first.get_or_insert(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64());
        batches.recycle(batch);
    }
    println!("{} {}", first.unwrap_or_default(), steps * batch as u64);
    Ok(())
}
