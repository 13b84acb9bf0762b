//! Data, a trained network, and a bench for both.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use updraft_base::{Digest, SystemClock};
use updraft_compress::arithmetic::Arithmetic;
use updraft_compress::bench::{Bench, BenchSettings, Tools};
use updraft_compress::distill::{Tuning, fine_tune};
use updraft_compress::latency::LatencySettings;
use updraft_compress::measure::{Metric, Task};
use updraft_compress::splits::{Datasets, SplitOptions, Splits};
use updraft_data::{Dataset, DatasetConfig, Loader, LoaderOptions, Shuffle, Tail, write_npz};
use updraft_engine::CpuEngine;
use updraft_graph::{Graph, Model, Tensor};
use updraft_passes::loss::{CrossEntropy, Loss};
use updraft_passes::optimizer::{AdamSettings, Optimizer};
use updraft_passes::training::TrainingOptions;
use updraft_store::{Origin, Store};
use updraft_train::Silent;

/// Tensors of a dataset.
pub type Arrays = Vec<(String, Tensor)>;

/// Samples of a batch.
pub const BATCH: usize = 64;

pub struct Workplace {
    _folder: tempfile::TempDir,
    pub engine: CpuEngine,
    pub store: Store,
    pub clock: SystemClock,
    pub training: TrainingOptions,
    pub loader: Loader,
    pub splits: Splits,
    pub task: Task,
}

impl Workplace {
    /// Data for training, search and holdout, whose labels are called `label`.
    pub fn new(train: Arrays, validation: Arrays, test: Arrays) -> Workplace {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str, arrays: &Arrays| {
            let path = folder.path().join(name);
            write_npz(&path, arrays).unwrap();
            let config: DatasetConfig = serde_json::from_value(json!({ "path": path })).unwrap();
            Arc::new(Dataset::open(&config, Path::new("")).unwrap())
        };
        let datasets = Datasets {
            train: open("train.npz", &train),
            validation: Some(open("validation.npz", &validation)),
            test: Some(open("test.npz", &test)),
        };
        let loss = Loss::CrossEntropy(CrossEntropy::default());
        let mut training = TrainingOptions::new(loss, Optimizer::AdamW(AdamSettings::default()));
        training.target = "label".to_owned();
        let options = LoaderOptions {
            batch_size: BATCH,
            seed: 1,
            shuffle: Shuffle::Global,
            tail: Tail::Wrap,
            threads: 0,
            ..LoaderOptions::default()
        };
        let split_options = SplitOptions {
            seed: 5,
            batch_size: BATCH,
            threads: 0,
            calibration_samples: 256,
            share_limit: None,
            alpha: 0.05,
        };
        Workplace {
            engine: CpuEngine::new(1).unwrap(),
            store: Store::open(&folder.path().join("store")).unwrap(),
            clock: SystemClock::new(),
            loader: Loader::new(datasets.train.clone(), options).unwrap(),
            splits: Splits::new(&datasets, &split_options).unwrap(),
            task: Task { loss, output: None, target: "label".to_owned() },
            training,
            _folder: folder,
        }
    }

    pub fn trained(&self, graph: &Graph, steps: u64, learning_rate: f64) -> Model {
        let tuning = Tuning {
            engine: &self.engine,
            options: &self.training,
            loader: &self.loader,
            validation: None,
            steps,
            learning_rate,
            seed: 3,
            store: &self.store,
            clock: &self.clock,
        };
        Model::new(fine_tune(&tuning, graph, &mut Silent).unwrap().graph)
    }

    /// What a search measures `model` on. Its artifact is `size_bytes` long.
    pub fn bench<'a>(
        &'a self,
        model: &'a Model,
        size_bytes: usize,
        metric: Metric,
        note: &'a mut dyn FnMut(&str),
    ) -> Bench<'a> {
        let origin = Origin { kind: "network".to_owned(), ..Origin::default() };
        let original_digest: Digest = self.store.put(&origin, vec![0; size_bytes], Default::default()).unwrap().digest;
        let tools = Tools {
            engine: &self.engine,
            store: &self.store,
            clock: &self.clock,
            original: model,
            original_digest,
            task: &self.task,
            training: &self.training,
            train_loader: &self.loader,
            splits: &self.splits,
            note,
        };
        let settings = BenchSettings {
            metric,
            alpha: 0.05,
            seed: 1,
            // Times decide nothing in these tests.
            latency: LatencySettings { rounds: 6, round_ns: 1, warm_up_ns: 1 },
            cost_batch: 1,
            divergence_samples: 128,
            recovery_rate: 0.001,
            machine: "any".to_owned(),
            arithmetic: Arithmetic::Exact,
            deadline_ns: u64::MAX,
        };
        Bench::new(tools, settings)
    }
}
