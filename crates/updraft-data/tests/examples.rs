//! The data of the two examples, as their recipes read it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use updraft_data::{Batch, Dataset, DatasetConfig, Loader, LoaderOptions, Shuffle, Tail};
use updraft_graph::DType;

fn open(recipe: &str) -> Arc<Dataset> {
    let config: DatasetConfig = toml::from_str(recipe).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    Arc::new(Dataset::open(&config, &root).unwrap())
}

fn mnist(file: &str, steps: &str) -> Arc<Dataset> {
    open(&format!(
        r#"
        path = "mnist/data/{file}.parquet"

        [[tensors]]
        name = "image"
        transform = [{{ decode = "grey" }}, {steps} {{ normalize = {{ mean = [0.1307], std = [0.3081] }} }}]

        [[tensors]]
        name = "label"
        transform = [{{ classes = 10 }}]
        "#
    ))
}

fn tensor<'a>(batch: &'a Batch, name: &str) -> &'a updraft_graph::Tensor {
    &batch.tensors.iter().find(|(n, _)| n == name).unwrap().1
}

#[test]
fn mnist_pixels_have_the_published_mean_and_deviation() {
    let dataset = mnist("test", "");
    let facts = dataset.facts();
    assert_eq!(
        (facts.samples, &facts.tensors[0].shape[..], facts.tensors[0].dtype),
        (10_000, &[1, 28, 28][..], DType::F32)
    );
    assert_eq!((&facts.tensors[1].shape[..], facts.tensors[1].dtype), (&[][..], DType::I64));

    let loader = Loader::new(dataset, LoaderOptions { batch_size: 250, ..LoaderOptions::default() }).unwrap();
    let (mut sum, mut squares, mut count, mut labels) = (0.0, 0.0, 0.0, [0; 10]);
    for batch in loader.batches(0..loader.steps_per_epoch()).unwrap() {
        let batch = batch.unwrap();
        for value in tensor(&batch, "image").as_slice::<f32>().unwrap() {
            sum += f64::from(*value);
            squares += f64::from(*value).powi(2);
            count += 1.0;
        }
        tensor(&batch, "label").as_slice::<i64>().unwrap().iter().for_each(|l| labels[*l as usize] += 1);
    }
    // Mean and deviation of the training set's pixels are 0.1307 and 0.3081; the test set's are 0.1325 and 0.3105
    // (torchvision), so normalised they are (0.1325 - 0.1307) / 0.3081 and 0.3105 / 0.3081.
    let mean = sum / count;
    assert!((mean - 0.0058).abs() < 5e-4, "{mean}");
    assert!(((squares / count - mean * mean).sqrt() - 1.0078).abs() < 5e-4);
    // The published class counts of the test set.
    assert_eq!(labels, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]);
}

#[test]
fn batches_are_the_same_for_any_number_of_threads_and_from_any_step() {
    let steps = "{ random_crop = { size = [28, 28], padding = 2 } }, { random_flip = \"horizontal\" },";
    let batches = |threads, first: u64| -> Vec<Batch> {
        let options = LoaderOptions {
            batch_size: 96,
            seed: 9,
            shuffle: Shuffle::Global,
            tail: Tail::Drop,
            threads,
            ..LoaderOptions::default()
        };
        // A fresh dataset each time, so that no cache is warm.
        let loader = Loader::new(mnist("train", steps), options).unwrap();
        assert_eq!(loader.steps_per_epoch(), 208);
        // Over the end of the first epoch.
        loader.batches(first..212).unwrap().collect::<Result<_, _>>().unwrap()
    };
    let alone = batches(0, 204);
    assert_eq!(alone.iter().map(|b| (b.step, b.epoch)).collect::<Vec<_>>()[3..5], [(207, 0), (208, 1)]);
    for threads in [1, 2, 5] {
        assert!(batches(threads, 204) == alone, "{threads} threads");
    }
    assert!(batches(2, 209) == alone[5..], "resumed");
}

#[test]
fn a_padded_epoch_sees_every_sample_once() {
    let dataset = mnist("test", "");
    let options = LoaderOptions { batch_size: 96, ..LoaderOptions::default() };
    let loader = Loader::new(dataset, options).unwrap();
    let mut seen = BTreeSet::new();
    for batch in loader.batches(0..loader.steps_per_epoch()).unwrap() {
        let batch = batch.unwrap();
        assert_eq!(tensor(&batch, "image").shape(), [96, 1, 28, 28]);
        for sample in batch.samples {
            assert!(seen.insert(sample), "{sample} twice");
        }
    }
    assert!(seen.into_iter().eq(0..10_000));
}

#[test]
fn shakespeare_is_windows_with_targets_one_character_ahead() {
    let part = |span: &str, stride: usize| {
        open(&format!(
            "path = \"shakespeare/data/tinyshakespeare.txt\"\n\
             format = {{ text = {{ context = 64, stride = {stride}, span = {span} }} }}"
        ))
    };
    let train = part("[0.0, 0.9]", 1);
    // nanoGPT: 65 characters, 1,003,854 of them for training and 111,540 for validation.
    let vocabulary = train.facts().vocabulary.clone().unwrap();
    assert_eq!(vocabulary.len(), 65);
    assert_eq!(train.len(), 1_003_854 - 64);
    let validation = part("[0.9, 1.0]", 64);
    assert_eq!(validation.facts().vocabulary.as_ref(), Some(&vocabulary));
    assert_eq!(validation.len(), (111_540 - 64 - 1) / 64 + 1);

    let loader = Loader::new(train, LoaderOptions { batch_size: 2, ..LoaderOptions::default() }).unwrap();
    let batch = loader.batch(0).unwrap();
    let (inputs, targets) = (tensor(&batch, "inputs"), tensor(&batch, "targets"));
    assert_eq!((inputs.shape(), inputs.dtype()), ([2, 64].as_slice(), DType::I64));
    let inputs = inputs.as_slice::<i64>().unwrap();
    let targets = targets.as_slice::<i64>().unwrap();
    let text: String = inputs[..64].iter().filter_map(|n| vocabulary.decode(*n)).collect();
    assert!(text.starts_with("First Citizen:\nBefore we proceed"), "{text}");
    assert_eq!(inputs[1..64], targets[..63]);
    // Stride 1: the second sample is the first, one character later.
    assert_eq!(inputs[64..128], targets[..64]);
}

#[test]
fn a_token_survives_json_and_refuses_other_data_or_orders_by_field() {
    let loader = |file, seed| {
        let options = LoaderOptions { seed, ..LoaderOptions::default() };
        Loader::new(mnist(file, ""), options).unwrap()
    };
    let token = loader("test", 1).token(17).unwrap();
    let token = serde_json::from_str(&serde_json::to_string(&token).unwrap()).unwrap();
    assert_eq!(loader("test", 1).resume(&token).unwrap(), 17);
    for (other, field) in [(loader("train", 1), "the dataset"), (loader("test", 2), "the seed")] {
        let error = other.resume(&token).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}
