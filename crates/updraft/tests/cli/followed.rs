//! What followers of streams wrote, as training would read it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use updraft_base::Digest;
use updraft_data::{Dataset, DatasetConfig, Loader, LoaderOptions, Manifest, Version};
use updraft_store::{AccessOptions, Objects};

/// A version of the dataset in a folder, the newest without a digest.
pub fn version(folder: &Path, digest: Option<&Digest>) -> Version {
    let objects = Objects::open(folder.to_str().unwrap(), &BTreeMap::new(), &AccessOptions::default()).unwrap();
    Manifest::load(&objects, digest).unwrap().expect("a version")
}

/// The numbers of a column of all samples in order, as training would read them.
pub fn numbers(folder: &Path, column: &str) -> Vec<i64> {
    let config = format!("path = {folder:?}\ntensors = [{{ name = {column:?} }}]");
    let config: DatasetConfig = toml::from_str(&config).unwrap();
    let dataset = Arc::new(Dataset::open(&config, Path::new("/")).unwrap());
    let samples = dataset.facts().samples;
    let loader = Loader::new(dataset, LoaderOptions { threads: 0, ..LoaderOptions::default() }).unwrap();
    let mut all = Vec::new();
    for batch in loader.batches(0..samples.div_ceil(64)).unwrap() {
        let batch = batch.unwrap();
        all.extend(&batch.tensors[0].1.to_i64().unwrap()[..batch.samples.len()]);
    }
    all
}

/// Numbers from one up to another.
pub fn counted(numbers: std::ops::Range<i64>) -> Vec<i64> {
    numbers.collect()
}
