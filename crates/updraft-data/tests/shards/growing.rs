//! A dataset that grows while it is read gives each row once, in an order that does not depend on when it came.

use std::path::Path;
use std::sync::Arc;

use updraft_base::{Clock, SystemClock};
use updraft_data::write::WriteOptions;
use updraft_data::{
    Access, Cells, Column, DataError, Dataset, DatasetConfig, Kind, Loader, LoaderOptions, Manifest, Rows, Schema,
    ShardFacts, ShardFormat, Shuffle,
};
use updraft_graph::{DType, Tensor};
use updraft_store::{AccessOptions, Objects};

use super::write;

const SHARD_ROWS: i64 = 37;

/// Puts one more shard behind those that are there.
fn append(dir: &Path, shard: i64) {
    let objects = Objects::open(dir.to_str().unwrap(), &Default::default(), &AccessOptions::default()).unwrap();
    let schema = Schema::new(vec![Column { name: "n".into(), kind: Kind::scalar(DType::I64) }]).unwrap();
    let numbers: Vec<i64> = (shard * SHARD_ROWS..(shard + 1) * SHARD_ROWS).collect();
    let rows = Rows::new(schema.clone().into(), vec![Cells::Numbers(Tensor::vector(&numbers))]).unwrap();
    let (bytes, facts) = write(ShardFormat::Mds, &rows, &WriteOptions::default());
    let key = format!("{shard}.mds");
    objects.put(&key, bytes).unwrap();
    let shards = vec![ShardFacts { key, ..facts }];
    match Manifest::latest(&objects).unwrap() {
        None => Manifest::new(schema, shards),
        Some(latest) => Manifest::after(latest, schema, shards),
    }
    .commit(&objects)
    .unwrap();
}

fn loader(dir: &Path, more: &str, options: LoaderOptions) -> Result<Loader, DataError> {
    let recipe = format!("path = {dir:?}\nfollow = {{ wait_s = 20, poll_ms = 20 }}\n{more}");
    let config: DatasetConfig = toml::from_str(&recipe).unwrap();
    Loader::new(Dataset::open_with(&config, Path::new("/"), &Access::default())?.into(), options)
}

fn options(shuffle: Shuffle) -> LoaderOptions {
    LoaderOptions { batch_size: 10, seed: 5, shuffle, threads: 2, ..LoaderOptions::default() }
}

fn numbers(loader: &Loader, steps: std::ops::Range<u64>) -> Vec<i64> {
    let batches = loader.batches(steps).unwrap().map(|batch| batch.unwrap().tensors.remove(0).1);
    batches.flat_map(|tensor| tensor.as_slice::<i64>().unwrap().to_vec()).collect()
}

#[test]
fn rows_come_once_and_in_an_order_that_does_not_depend_on_when_they_came() {
    for shuffle in [Shuffle::None, Shuffle::Blocks(2)] {
        let (slow, whole) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        (0..6).for_each(|shard| append(whole.path(), shard));
        append(slow.path(), 0);
        let steps = 0..6 * SHARD_ROWS as u64 / 10;
        let reading = loader(slow.path(), "", options(shuffle)).unwrap();
        let before = loader(slow.path(), "", options(shuffle)).unwrap().token(0).unwrap();
        let found = std::thread::scope(|scope| {
            let found = scope.spawn(|| numbers(&reading, steps.clone()));
            for shard in 1..6 {
                SystemClock::new().sleep_ms(30);
                append(slow.path(), shard);
            }
            found.join().unwrap()
        });
        let at_once = loader(whole.path(), "", options(shuffle)).unwrap();
        assert_eq!(found, numbers(&at_once, steps.clone()));
        let mut sorted = found.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), found.len());
        assert_eq!(found.is_sorted(), shuffle == Shuffle::None);
        // What it is known by stays what it was, and so does where it stands.
        assert_eq!(at_once.resume(&before).unwrap(), 0);
        let token = reading.token(7).unwrap();
        assert_eq!(at_once.resume(&token).unwrap(), 7);
        assert_eq!(numbers(&at_once, 7..steps.end), found[70..]);
    }
}

#[test]
fn any_number_of_ranks_reads_the_same_batches() {
    let dir = tempfile::tempdir().unwrap();
    (0..6).for_each(|shard| append(dir.path(), shard));
    let batch = |ranks: usize, rank: usize, step: u64| {
        let all = LoaderOptions { batch_size: 12, lanes: Some(12), ranks, rank, ..options(Shuffle::Blocks(3)) };
        numbers(&loader(dir.path(), "", all).unwrap(), step..step + 1)
    };
    for step in [0, 8, 17] {
        let one = batch(1, 0, step);
        for ranks in [2, 3, 4, 6] {
            assert_eq!((0..ranks).flat_map(|rank| batch(ranks, rank, step)).collect::<Vec<_>>(), one);
        }
    }
}

#[test]
fn what_cannot_be_followed_or_was_rewritten_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |more: &str, options: LoaderOptions| loader(dir.path(), more, options).unwrap_err().to_string();
    std::fs::write(dir.path().join("a.csv"), "n\n1\n").unwrap();
    assert!(refused("", options(Shuffle::None)).contains("has no manifest"));
    std::fs::remove_file(dir.path().join("a.csv")).unwrap();
    append(dir.path(), 0);
    assert!(refused("rows = [0.0, 0.5]", options(Shuffle::None)).contains("`follow` and `rows` exclude each other"));
    assert!(refused("", options(Shuffle::Global)).contains("shuffle over blocks"));

    let reading = loader(dir.path(), "", options(Shuffle::None)).unwrap();
    let token = reading.token(3).unwrap();
    // Nothing is appended: the batch that needs more says so, and what is there can still be read.
    let recipe = format!("path = {:?}\nfollow = {{ wait_s = 0 }}", dir.path());
    let config: DatasetConfig = toml::from_str(&recipe).unwrap();
    let dataset = Arc::new(Dataset::open(&config, Path::new("/")).unwrap());
    let hasty = Loader::new(dataset, options(Shuffle::None)).unwrap();
    let error = hasty.batch(3).unwrap_err().to_string();
    assert!(error.contains("37 rows") && error.contains("follow.wait_s"), "{error}");
    assert_eq!(numbers(&hasty, 0..3).len(), 30);

    // Who drops its batches does not wait for what may never come.
    let mut batches = reading.batches(0..100).unwrap();
    assert!(batches.next().unwrap().is_ok());
    drop(batches);

    let objects = Objects::open(dir.path().to_str().unwrap(), &Default::default(), &AccessOptions::default()).unwrap();
    objects.delete("LATEST").unwrap();
    append(dir.path(), 9);
    let error = reading.batch(3).unwrap_err().to_string();
    assert!(error.contains("was replaced while it was followed") && error.contains("9.mds"), "{error}");
    let error = loader(dir.path(), "", options(Shuffle::None)).unwrap().resume(&token).unwrap_err().to_string();
    assert!(error.contains("the dataset was"), "{error}");
}
