//! What a loader asks of a store: what no cache has, and the same whether the store fails or not.

use updraft_store::ReadObjects;

use super::*;
use crate::cache::{Cache, CacheOptions};
use crate::stall::Stopwatch;

/// Samples in objects of a store, one object a block: 64 bytes each, which begin with the sample's number.
struct Objects64 {
    store: Arc<dyn ReadObjects>,
    cache: Option<Arc<Cache>>,
    /// Of the objects, which are numbered.
    first_block: u64,
    blocks: Vec<u64>,
}

fn content_of(block: u64, samples: u64) -> Vec<u8> {
    (0..samples).flat_map(|i| ((block * samples + i) as i64).to_le_bytes().repeat(8)).collect()
}

impl Source for Objects64 {
    fn block_rows(&self) -> &[u64] {
        &self.blocks
    }

    fn resident_bytes(&self, _: u64) -> u64 {
        0
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let store = self.cache.as_ref().map_or(&*self.store, |cache| &**cache as &dyn ReadObjects);
        let samples = self.blocks[0];
        let mut numbers = Vec::new();
        for row in rows {
            let start = row % samples * 64;
            let range = start..start + 64;
            let key = (self.first_block + row / samples).to_string();
            let bytes = store.read(&key, std::slice::from_ref(&range), None);
            let bytes = bytes.map_err(|e| DataError::Loader(e.to_string()))?.remove(0);
            assert_eq!(bytes[..8].repeat(8), bytes[..], "a sample of two");
            numbers.push(i64::from_le_bytes(bytes[..8].try_into().unwrap()));
        }
        Ok(columns.iter().map(|_| Cells::Numbers(Tensor::vector(&numbers))).collect())
    }

    fn row_name(&self, row: u64) -> String {
        format!("sample {row}")
    }

    fn foresee(&self, uses: &mut dyn Iterator<Item = (usize, Range<u64>)>) {
        if let Some(cache) = &self.cache {
            let key = |block: usize| (self.first_block + block as u64).to_string();
            let named: Vec<(String, Range<u64>)> = uses.map(|(block, steps)| (key(block), steps)).collect();
            cache.foresee(&mut named.iter().map(|(key, steps)| (key.as_str(), steps.clone())));
        }
    }

    fn advance(&self, step: u64) {
        if let Some(cache) = &self.cache {
            cache.advance(step);
        }
    }
}

fn loader_over(
    store: Arc<dyn ReadObjects>,
    cache: Option<Arc<Cache>>,
    blocks: Vec<u64>,
    options: LoaderOptions,
) -> Loader {
    let count = blocks.len();
    let source = Box::new(Objects64 { store, cache, first_block: 0, blocks });
    let columns = vec!["sample".to_owned()];
    let opened = Opened { source, columns, digest: Digest::of(b"objects"), vocabulary: None, classes: None };
    let config: DatasetConfig = serde_json::from_value(json!({ "path": "objects" })).unwrap();
    let dataset = Dataset::over(&config, Path::new(""), PathBuf::from("objects"), opened, &[count]).unwrap();
    Loader::new(Arc::new(dataset), options).unwrap()
}

/// A store of objects, and what they take.
fn shards_of(shards: u64, samples: u64) -> (Arc<dyn ReadObjects>, u64) {
    let store = object_store::memory::InMemory::new();
    let objects = updraft_store::Objects::over(Arc::new(store), &updraft_store::AccessOptions::default()).unwrap();
    for shard in 0..shards {
        objects.put(&shard.to_string(), content_of(shard, samples).into()).unwrap();
    }
    (Arc::new(objects), shards * samples * 64)
}

/// Bytes that a cache fetches in each of some epochs, as parts of all there are.
fn fetched(loader: &Loader, cache: &Cache, epochs: u64, all_bytes: u64) -> Vec<f64> {
    let steps = loader.steps_per_epoch();
    let mut batches = loader.batches(0..epochs * steps).unwrap();
    let mut before = 0;
    let epoch = |_| {
        for _ in 0..steps {
            let batch = batches.next().unwrap().unwrap();
            let numbers = batch.tensors[0].1.to_i64().unwrap();
            assert!(numbers.iter().zip(&batch.samples).all(|(number, sample)| *number == *sample as i64));
        }
        let bytes = cache.reading().fetched_bytes - std::mem::replace(&mut before, cache.reading().fetched_bytes);
        bytes as f64 / all_bytes as f64
    };
    (0..epochs).map(epoch).collect()
}

#[test]
fn the_second_epoch_of_a_shuffled_dataset_fetches_half_where_half_is_cached() {
    let (shards, samples) = (600u64, 5u64);
    let shard_bytes = samples * 64;
    let (store, all_bytes) = shards_of(shards, samples);
    let folder = tempfile::tempdir().unwrap();
    let file_bytes = shard_bytes + 24;
    for (name, cache) in [
        ("memory", CacheOptions { memory_bytes: shards / 2 * shard_bytes, disk: None, part_bytes: 4096 }),
        // Memory for what the open windows hold, and the rest of the half on disk.
        (
            "disk",
            CacheOptions {
                memory_bytes: 24 * shard_bytes,
                disk: Some((folder.path().to_owned(), (shards / 2 - 24) * file_bytes)),
                part_bytes: 4096,
            },
        ),
    ] {
        let cache = Arc::new(Cache::new(store.clone(), cache).unwrap());
        let options = LoaderOptions { shuffle: Shuffle::Blocks(1), ..options(12, 6) };
        let loader = loader_over(store.clone(), Some(cache.clone()), vec![samples; shards as usize], options);
        let shares = fetched(&loader, &cache, 3, all_bytes);
        println!("{name}: fetched of the dataset by epoch {shares:?}");
        assert_eq!(shares[0], 1.0, "{name}");
        assert!(shares[1] <= 0.52 && shares[2] <= 0.52, "{name}: {shares:?}");
    }
}

#[test]
fn what_a_mixture_needs_last_is_what_a_cache_lets_go_of() {
    let (shards, samples) = (600u64, 5u64);
    let (store, all_bytes) = shards_of(shards, samples);
    // Where one source comes after the other, nothing of the first is kept for long, and all of the second.
    let later = json!([{ "from": 1500, "weights": [0.0, 1.0] }]);
    for (sizes, weights, changes, most) in [
        ([300, 300], [0.5, 0.5], json!([]), 0.52),
        ([400, 200], [2.0, 1.0], json!([]), 0.52),
        ([300, 300], [1.0, 0.0], later, 0.02),
    ] {
        let cache = CacheOptions { memory_bytes: all_bytes / 2, disk: None, part_bytes: 4096 };
        let cache = Arc::new(Cache::new(store.clone(), cache).unwrap());
        let source = |first_block: u64, blocks: u64| -> Box<dyn Source> {
            let (store, blocks) = (store.clone(), vec![samples; blocks as usize]);
            Box::new(Objects64 { store, cache: Some(cache.clone()), first_block, blocks })
        };
        let join = Join::new(vec![source(0, sizes[0]), source(sizes[0], sizes[1])]);
        let (source, columns) = (Box::new(join), vec!["sample".to_owned()]);
        let opened = Opened { source, columns, digest: Digest::of(b"mixed"), vocabulary: None, classes: None };
        let sources = weights.map(|weight| json!({ "path": "objects", "weight": weight }));
        let config = json!({ "sources": sources, "weights": changes });
        let config: DatasetConfig = serde_json::from_value(config).unwrap();
        let counts = sizes.map(|size| size as usize);
        let dataset = Dataset::over(&config, Path::new(""), PathBuf::from("mixed"), opened, &counts).unwrap();
        let options = LoaderOptions { shuffle: Shuffle::Blocks(1), tail: Tail::Wrap, ..options(12, 6) };
        let loader = Loader::new(Arc::new(dataset), options).unwrap();
        let shares = fetched(&loader, &cache, 3, all_bytes);
        println!("{sizes:?}: fetched of the mixture by epoch {shares:?}");
        assert!(shares[0] > 0.98 && shares[1] <= most && shares[2] <= most, "{sizes:?}: {shares:?}");
    }
}

#[test]
fn a_rank_keeps_what_it_needs_itself() {
    let (shards, samples) = (600u64, 5u64);
    let (store, all_bytes) = shards_of(shards, samples);
    let cache = CacheOptions { memory_bytes: all_bytes / 4, disk: None, part_bytes: 4096 };
    let cache = Arc::new(Cache::new(store.clone(), cache).unwrap());
    let options = LoaderOptions { shuffle: Shuffle::Blocks(1), rank: 1, ranks: 2, ..options(12, 6) };
    let loader = loader_over(store, Some(cache.clone()), vec![samples; shards as usize], options);
    let shares = fetched(&loader, &cache, 3, all_bytes);
    println!("fetched of the dataset by one of two ranks {shares:?}");
    // Half of what it reads, which is half, it read in the epoch before, too; that is as much as it can keep.
    assert!(shares[1] <= 0.52 * 0.5 + 0.02 && shares[2] <= 0.52 * 0.5 + 0.02, "{shares:?}");
}

#[test]
fn what_a_mixture_needs_is_known_before_it_is_read() {
    let weights = json!([{ "from": 700, "weights": [1.0, 3.0, 0.2] }]);
    let sources: Vec<Vec<u64>> = vec![vec![7; 20], vec![3, 0, 40, 11, 2], vec![29; 9]];
    let blocks: Vec<u64> = sources.concat();
    let starts: Vec<u64> = blocks.iter().scan(0, |sum, n| Some(std::mem::replace(sum, *sum + n))).collect();
    for shuffle in [Shuffle::None, Shuffle::Blocks(2), Shuffle::Global] {
        let mix =
            json!([{ "path": "a", "weight": 2.0 }, { "path": "b", "weight": 1.0 }, { "path": "c", "weight": 1.0 }]);
        let recipe = json!({ "tensors": [{ "name": "score" }], "sources": mix, "weights": weights });
        let dataset = dataset(&sources, recipe);
        for (rank, ranks) in [(0, 1), (1, 3)] {
            let options = LoaderOptions { shuffle, rank, ranks, tail: Tail::Wrap, threads: 0, ..options(6, 12) };
            let loader = Loader::new(dataset.clone(), options).unwrap();
            let (planner, steps) = (&loader.shared.planner, loader.steps_per_epoch());
            for epoch in 0..4 {
                let uses = planner.uses(&dataset, epoch);
                assert!(uses.is_sorted_by_key(|(_, steps)| steps.start));
                let mut seen: std::collections::BTreeSet<(usize, u64)> = Default::default();
                for step in epoch * steps..(epoch + 1) * steps {
                    for sample in planner.batch(&dataset, step, &mut Stopwatch::start(None), &|| false).unwrap().samples
                    {
                        let block = starts.iter().rposition(|start| *start <= sample).unwrap();
                        assert!(uses.iter().any(|(b, of)| *b == block && of.contains(&step)), "{shuffle:?}: {step}");
                        seen.insert((block, step));
                    }
                }
                // A window is foreseen from the step that needs it first, to the one that needs it last.
                for (_, of) in &uses {
                    let is_used = |step| uses.iter().any(|(block, o)| o == of && seen.contains(&(*block, step)));
                    assert!(is_used(of.start) && is_used(of.end - 1), "{shuffle:?}: {of:?} of {epoch}");
                }
            }
        }
    }
}

#[test]
fn a_store_that_fails_gives_the_same_batches_as_one_that_does_not() {
    use updraft_sim::{FaultRates, FaultyStore, Schedule};
    use updraft_store::{AccessOptions, Objects};

    let (shards, samples) = (40u64, 30u64);
    let inner = Arc::new(object_store::memory::InMemory::new());
    let sound = Objects::over(inner.clone(), &AccessOptions::default()).unwrap();
    for shard in 0..shards {
        sound.put(&shard.to_string(), content_of(shard, samples).into()).unwrap();
    }
    // No stalls: each would wait for a deadline, and hedging has tests of its own.
    let rates = FaultRates { stalled: 0.0, slow_ms: 2, ..FaultRates::all(0.2) };
    let schedule = Arc::new(Schedule::new(4, rates));
    let faulty = FaultyStore::new(inner, schedule.clone());
    let faulty = Objects::over(Arc::new(faulty), &AccessOptions::default()).unwrap();
    let batches = |objects: Objects, threads: usize| -> Vec<Batch> {
        let store: Arc<dyn ReadObjects> = Arc::new(objects);
        let cache = CacheOptions { memory_bytes: 20_000, disk: None, part_bytes: 512 };
        let cache = Arc::new(Cache::new(store.clone(), cache).unwrap());
        let options = LoaderOptions { threads, ..options(24, 24) };
        let loader = loader_over(store, Some(cache), vec![samples; shards as usize], options);
        loader.batches(0..loader.steps_per_epoch()).unwrap().map(Result::unwrap).collect()
    };
    let expected = batches(sound, 0);
    assert_eq!(batches(faulty, 3), expected);
    let faults: u64 = schedule.counts().values().sum();
    println!("{faults} faults in {} requests: {:?}", schedule.requests(), schedule.counts());
    assert!(faults > 50, "{:?}", schedule.counts());
}
