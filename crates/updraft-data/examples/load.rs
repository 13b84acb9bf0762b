//! Takes shuffled batches as fast as they come, so that loaders can be compared:
//! `load DATASET.toml BATCH SAMPLES THREADS` prints the time of the first batch, in Unix seconds, and the samples taken.
//! Files whose digests are known from the run before are not hashed again.
//! `load DATASET.toml BATCH SAMPLES THREADS CACHE_BYTES` takes epochs of so many samples shuffled within windows of
//! blocks, and prints for three of them the bytes that were fetched past a cache of so many bytes.
#![allow(clippy::print_stdout, clippy::disallowed_methods)]

use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use updraft_base::SystemClock;
use updraft_data::{
    Access, Cache, CacheOptions, Dataset, DatasetConfig, KnownDigests, Loader, LoaderOptions, Shuffle, Tail, Wrap,
};

/// Epochs over a cache.
const EPOCHS: u64 = 3;

/// Blocks that are shuffled together where a cache is.
const WINDOW_BLOCKS: u64 = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [recipe, batch, samples, threads, cache @ ..] = &arguments[..] else {
        return Err("expected DATASET.toml BATCH SAMPLES THREADS [CACHE_BYTES]".into());
    };
    let (batch, samples, threads): (usize, u64, usize) = (batch.parse()?, samples.parse()?, threads.parse()?);
    let config: DatasetConfig = toml::from_str(&std::fs::read_to_string(recipe)?)?;
    let folder = Path::new(recipe).parent().unwrap_or(Path::new("."));
    let cached = cache.first().map(|bytes| bytes.parse()).transpose()?;
    let caches: Arc<Mutex<Vec<Arc<Cache>>>> = Arc::default();
    let wrap = cached.map(|memory_bytes| {
        let caches = caches.clone();
        let wrap: Wrap = Arc::new(move |store| {
            let cache = Arc::new(Cache::new(store, CacheOptions { memory_bytes, ..CacheOptions::default() })?);
            caches.lock().unwrap_or_else(PoisonError::into_inner).push(cache.clone());
            Ok(cache)
        });
        wrap
    });
    let known = Arc::new(KnownDigests::new(&folder.join("known"), Arc::new(SystemClock::new())));
    let dataset = Dataset::open_with(&config, folder, &Access { wrap, known: Some(known), ..Access::default() })?;
    let options = LoaderOptions {
        batch_size: batch,
        seed: 1,
        shuffle: if cached.is_some() { Shuffle::Blocks(WINDOW_BLOCKS) } else { Shuffle::Global },
        tail: Tail::Drop,
        threads,
        ..LoaderOptions::default()
    };
    let loader = Loader::new(Arc::new(dataset), options)?;
    let mut first = None;
    let steps = samples.div_ceil(batch as u64);
    if cached.is_some() {
        let mut batches = loader.batches(0..EPOCHS * steps)?;
        let mut fetched = Vec::new();
        for _ in 0..EPOCHS {
            for _ in 0..steps {
                let batch = batches.next().ok_or("the batches ended too soon")??;
                batches.recycle(batch);
            }
            let caches = caches.lock().unwrap_or_else(PoisonError::into_inner);
            fetched.push(caches.iter().map(|cache| cache.reading().fetched_bytes).sum::<u64>());
        }
        let text: Vec<String> = fetched.iter().map(u64::to_string).collect();
        println!("{}", text.join(" "));
        return Ok(());
    }
    loader.ends_before(steps);
    let mut batches = loader.batches(0..steps)?;
    while let Some(batch) = batches.next() {
        let batch = batch?;
        first.get_or_insert(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64());
        batches.recycle(batch);
    }
    println!("{} {}", first.unwrap_or_default(), steps * batch as u64);
    Ok(())
}
