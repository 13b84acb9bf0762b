//! What a run promises: the same bits after a crash, stopping, keeping the best, and refusing what is no number.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use updraft_base::{FakeClock, Key};
use updraft_data::{Dataset, DatasetConfig, Loader, LoaderOptions, Shuffle, Tail, write_npz};
use updraft_engine::CpuEngine;
use updraft_graph::zoo::{self, Options, Setting};
use updraft_graph::{Graph, Tensor};
use updraft_passes::loss::{CrossEntropy, Loss};
use updraft_passes::optimizer::{AdamSettings, Optimizer};
use updraft_passes::schedule::{Schedule, Shape};
use updraft_passes::training::TrainingOptions;
use updraft_store::{Origin, Store, StoreError};
use updraft_train::{
    BestBy, CheckpointSchedule, EarlyStopping, Event, Observer, Run, Settings, TrainError, Trained, train,
};

const SAMPLES: usize = 50;

/// A model, data and a store, and what is asked of a run.
struct Bench {
    folder: tempfile::TempDir,
    model: Graph,
    options: TrainingOptions,
    loader: Loader,
    validation: Loader,
    store: Store,
    settings: Settings,
}

fn loader(folder: &Path, name: &str, points: &[f32], labels: &[i64], options: LoaderOptions) -> Loader {
    write(folder, name, points, labels);
    open(folder, json!({ "path": name }), options)
}

fn open(folder: &Path, config: serde_json::Value, options: LoaderOptions) -> Loader {
    let config: DatasetConfig = serde_json::from_value(config).unwrap();
    Loader::new(Arc::new(Dataset::open(&config, folder).unwrap()), options).unwrap()
}

fn write(folder: &Path, name: &str, points: &[f32], labels: &[i64]) {
    let path = folder.join(name);
    let arrays = [
        ("features".to_owned(), Tensor::new(&[labels.len(), 2], points).unwrap()),
        ("label".to_owned(), Tensor::vector(labels)),
    ];
    write_npz(&path, &arrays).unwrap();
}

fn shuffled() -> LoaderOptions {
    LoaderOptions {
        batch_size: 8,
        seed: 1,
        shuffle: Shuffle::Global,
        tail: Tail::Wrap,
        threads: 1,
        ..LoaderOptions::default()
    }
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let key = Key::new(5);
        let points: Vec<f32> = (0..2 * SAMPLES as u64).map(|i| key.normal_f32(i)).collect();
        let labels: Vec<i64> = points.chunks(2).map(|p| i64::from(p[0] * p[1] > 0.0)).collect();
        let in_order = LoaderOptions { batch_size: 16, threads: 0, ..LoaderOptions::default() };
        let entry = zoo::find("mlp").unwrap();
        let given = [("inputs", 2), ("hidden", 8), ("classes", 2)];
        let given: Vec<_> = given.iter().map(|(n, v)| ((*n).to_owned(), Setting::Integer(*v))).collect();
        let options = Options::of(entry, &given).unwrap();
        let mut training = TrainingOptions::new(
            Loss::CrossEntropy(CrossEntropy::default()),
            Optimizer::AdamW(AdamSettings::default()),
        );
        training.target = "label".to_owned();
        Bench {
            model: entry.build(&options, 1).unwrap(),
            options: training,
            loader: loader(folder.path(), "train.npz", &points, &labels, shuffled()),
            validation: loader(folder.path(), "validation.npz", &points, &labels, in_order),
            store: Store::open(&folder.path().join("store")).unwrap(),
            settings: Settings {
                steps: 40,
                seed: 9,
                schedule: Schedule {
                    peak: 0.02,
                    warmup_steps: 3,
                    shape: Shape::Cosine { total_steps: 40, floor: 0.0 },
                },
                validate_every_steps: 10,
                best_by: BestBy::Loss,
                early_stopping: None,
                checkpoint: CheckpointSchedule { every_steps: Some(6), every_ns: None, keep_last: 2 },
            },
            folder,
        }
    }

    fn origin(name: &str) -> Origin {
        Origin { kind: "model".into(), recipe: name.into(), ..Origin::default() }
    }

    /// Trains under a name that checkpoints are found by.
    fn train(&self, name: &str, observer: &mut dyn Observer) -> Result<Trained, TrainError> {
        let engine = CpuEngine::new(1).unwrap();
        let clock = FakeClock::default();
        let mut run = Run {
            model: &self.model,
            options: &self.options,
            engine: &engine,
            loader: &self.loader,
            validation: Some(&self.validation),
            store: &self.store,
            origin: &Bench::origin(name),
            clock: &clock,
            observer,
        };
        train(&mut run, &self.settings)
    }

    /// Steps of the checkpoints of a run that are in the store.
    fn checkpoints(&self, name: &str) -> Vec<u64> {
        let run = json!(Bench::origin(name).digest());
        let artifacts = self.store.list().unwrap().into_iter().filter(|a| a.origin.recipe["run"] == run);
        let mut steps: Vec<u64> = artifacts.map(|a| a.origin.recipe["step"].as_u64().unwrap()).collect();
        steps.sort_unstable();
        steps
    }
}

/// Writes events down, and panics at a step, as a crash would end the process.
#[derive(Default)]
struct Witness {
    log: Vec<String>,
    panics_at: Option<u64>,
}

impl Observer for Witness {
    fn observe(&mut self, event: &Event) {
        self.log.extend(match event {
            Event::Resumed { step, .. } => Some(format!("resumed {step}")),
            Event::Unreadable { .. } => Some("unreadable".to_owned()),
            Event::Evaluated { step, is_best, .. } => {
                Some(format!("evaluated {step}{}", if *is_best { " best" } else { "" }))
            }
            Event::Stopped { step, .. } => Some(format!("stopped {step}")),
            Event::Stepped { step, .. } if self.panics_at == Some(*step) => panic!("the process ends here"),
            Event::Built { .. } | Event::Stepped { .. } | Event::Saved { .. } | Event::Waited { .. } => None,
        });
    }
}

fn crash(bench: &Bench, name: &str, step: u64) {
    let mut witness = Witness { panics_at: Some(step), ..Witness::default() };
    let run = std::panic::AssertUnwindSafe(|| bench.train(name, &mut witness));
    assert!(std::panic::catch_unwind(run).is_err(), "no crash at step {step}");
}

#[test]
fn a_run_that_crashed_anywhere_ends_as_one_that_did_not() {
    let bench = Bench::new();
    let expected = bench.train("whole", &mut Witness::default()).unwrap();
    for step in [1, 6, 7, 10, 11, 29, 40] {
        let name = format!("crashed-at-{step}");
        crash(&bench, &name, step);
        let mut witness = Witness::default();
        let found = bench.train(&name, &mut witness).unwrap();
        assert_eq!(found, expected, "crashed at step {step}");
        assert_eq!(witness.log[0].starts_with("resumed"), step > 6, "{:?}", witness.log);
    }
}

#[test]
fn the_last_checkpoints_and_the_best_are_kept_and_no_more() {
    let bench = Bench::new();
    let trained = bench.train("run", &mut Witness::default()).unwrap();
    let best = trained.record.best.unwrap().step;
    let mut expected = vec![36, 40, best];
    expected.sort_unstable();
    expected.dedup();
    assert_eq!(bench.checkpoints("run"), expected);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_an_older_one_that_leads_to_the_same_end() {
    let bench = Bench::new();
    let expected = bench.train("whole", &mut Witness::default()).unwrap();
    crash(&bench, "damaged", 33);
    let newest = bench.store.pointer(&format!("checkpoints/{}/latest", Bench::origin("damaged").digest().hex()));
    let hex = newest.unwrap().unwrap().hex();
    let folder = bench.folder.path().join("store/objects/sha256").join(&hex[..2]);
    let bytes = std::fs::read(folder.join(&hex)).unwrap();
    std::fs::write(folder.join(&hex), &bytes[..bytes.len() / 2]).unwrap();
    let mut witness = Witness::default();
    assert_eq!(bench.train("damaged", &mut witness).unwrap(), expected);
    assert_eq!(witness.log[0], "unreadable");
    assert!(witness.log[1].starts_with("resumed"), "{:?}", witness.log);
}

#[test]
fn early_stopping_ends_after_its_patience_and_keeps_the_best() {
    let mut bench = Bench::new();
    // Nothing is ever better by 10, so the first evaluation stays the best.
    bench.settings.early_stopping = Some(EarlyStopping { patience: 2, min_change: 10.0 });
    let mut witness = Witness::default();
    let trained = bench.train("stopped", &mut witness).unwrap();
    assert_eq!(witness.log, ["evaluated 10 best", "evaluated 20", "evaluated 30", "stopped 30"]);
    assert_eq!((trained.record.step, trained.record.best.unwrap().step), (30, 10));
    assert_ne!(trained.best, trained.last);
    let mut shorter = Bench::new();
    shorter.settings.steps = 10;
    assert_eq!(trained.best, shorter.train("ten", &mut Witness::default()).unwrap().last);
    // Asked again, it is still over.
    assert_eq!(bench.train("stopped", &mut Witness::default()).unwrap(), trained);
}

#[test]
fn a_loss_that_is_no_number_names_step_samples_and_the_last_good_checkpoint() {
    let mut bench = Bench::new();
    bench.settings.schedule = Schedule { peak: 1e38, warmup_steps: 0, shape: Shape::Constant };
    bench.options.optimizer = Optimizer::Sgd { momentum: 0.0, nesterov: false };
    bench.settings.checkpoint.every_steps = Some(1);
    let error = bench.train("diverges", &mut Witness::default()).unwrap_err();
    let TrainError::Diverged { step, samples, names, checkpoint, .. } = &error else { panic!("{error}") };
    assert_eq!((samples.len(), names.len()), (8, 8));
    assert!(names[0].contains("train.npz"), "{names:?}");
    // Whatever was kept is good: at most the steps before the one that broke.
    assert!(bench.checkpoints("diverges").iter().all(|kept| kept < step), "{error}");
    assert_eq!(checkpoint.is_some(), !bench.checkpoints("diverges").is_empty());
}

#[test]
fn a_checkpoint_by_time_changes_nothing_but_when_it_is_taken() {
    let mut bench = Bench::new();
    let expected = bench.train("by-steps", &mut Witness::default()).unwrap();
    bench.settings.checkpoint = CheckpointSchedule { every_steps: None, every_ns: Some(0), keep_last: 1 };
    assert_eq!(bench.train("by-time", &mut Witness::default()).unwrap(), expected);
}

#[test]
fn a_dataset_without_the_target_is_refused_before_the_first_step() {
    let mut bench = Bench::new();
    bench.options.target = "labels".to_owned();
    let error = bench.train("wrong", &mut Witness::default()).unwrap_err();
    assert!(error.to_string().contains("no tensor `labels`, did you mean `label`?"), "{error}");
}

#[test]
fn a_full_store_stops_the_run_with_the_object_that_could_not_be_written() {
    let bench = Bench::new();
    crash(&bench, "full", 20);
    let objects = bench.folder.path().join("store/objects");
    let aside = bench.folder.path().join("aside");
    std::fs::rename(&objects, &aside).unwrap();
    // A file where the folder was: every write below it fails, as on a full disk.
    std::fs::write(&objects, "").unwrap();
    let error = bench.train("full", &mut Witness::default()).unwrap_err();
    assert!(matches!(error, TrainError::Store(StoreError::Write { .. } | StoreError::Read { .. })), "{error}");
    std::fs::remove_file(&objects).unwrap();
    std::fs::rename(&aside, &objects).unwrap();
    let expected = bench.train("whole", &mut Witness::default()).unwrap();
    assert_eq!(bench.train("full", &mut Witness::default()).unwrap(), expected);
}

#[test]
fn labels_as_certain_distributions_train_as_classes_do() {
    let mut bench = Bench::new();
    for smoothing in [0.0, 0.1] {
        bench.options.loss = Loss::CrossEntropy(CrossEntropy { label_smoothing: smoothing, ..CrossEntropy::default() });
        let classes = bench.train(&format!("classes {smoothing}"), &mut Witness::default()).unwrap();
        let config = json!({ "path": "train.npz", "tensors": [
            { "name": "features" }, { "name": "label", "transform": [{ "one_hot": 2 }] } ] });
        let plain = std::mem::replace(&mut bench.loader, open(bench.folder.path(), config, shuffled()));
        let certain = bench.train(&format!("distributions {smoothing}"), &mut Witness::default()).unwrap();
        bench.loader = plain;
        let (a, b) = (classes.record.history.loss.points(), certain.record.history.loss.points());
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(b) {
            // Two ways to add the same few numbers differ by some units of 2^-24, which 40 steps of Adam can raise: its
            // first steps divide small gradients by their own size.
            assert!((a.loss - b.loss).abs() < 1e-3, "step {}: {} and {}", a.step, a.loss, b.loss);
        }
        // Validation is on classes in both.
        let best = |trained: &Trained| trained.record.best.as_ref().unwrap().value;
        assert!((best(&classes) - best(&certain)).abs() < 1e-3);
    }
}
