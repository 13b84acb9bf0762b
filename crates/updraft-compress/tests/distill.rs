//! Fine-tuning and distillation through the training loop, on data small enough to say what must come out.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use updraft_base::{FakeClock, Key};
use updraft_compress::CompressError;
use updraft_compress::distill::{Tuned, Tuning, distill, fine_tune, train_quantized};
use updraft_data::{Dataset, DatasetConfig, Loader, LoaderOptions, Shuffle, Tail, write_npz};
use updraft_engine::CpuEngine;
use updraft_graph::eval::evaluate;
use updraft_graph::infer::infer;
use updraft_graph::zoo::{self, Options, Setting};
use updraft_graph::{DType, Graph, Tensor};
use updraft_passes::distill::{Distillation, Match, MatchKind};
use updraft_passes::loss::{CrossEntropy, Loss};
use updraft_passes::optimizer::{AdamSettings, Optimizer};
use updraft_passes::quantize::{Range, Scheme, insert, observed, prepare};
use updraft_passes::training::TrainingOptions;
use updraft_passes::{Promise, Report};
use updraft_store::Store;
use updraft_train::{Evaluator, Silent};

const SAMPLES: usize = 256;

/// Points of the plane and whether their coordinates have one sign, with and without that label.
struct Bench {
    folder: tempfile::TempDir,
    labelled: Loader,
    unlabelled: Loader,
    options: TrainingOptions,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let key = Key::new(5);
        let points: Vec<f32> = (0..2 * SAMPLES as u64).map(|i| key.normal_f32(i)).collect();
        let labels: Vec<i64> = points.chunks(2).map(|p| i64::from(p[0] * p[1] > 0.0)).collect();
        let features = ("features".to_owned(), Tensor::new(&[SAMPLES, 2], &points).unwrap());
        let label = ("label".to_owned(), Tensor::vector(&labels));
        let loader = |name: &str, arrays: &[(String, Tensor)]| {
            let path = folder.path().join(name);
            write_npz(&path, arrays).unwrap();
            let config: DatasetConfig = serde_json::from_value(json!({ "path": path })).unwrap();
            let dataset = Dataset::open(&config, Path::new("")).unwrap();
            let options = LoaderOptions {
                batch_size: 32,
                seed: 1,
                shuffle: Shuffle::Global,
                tail: Tail::Wrap,
                threads: 0,
                ..LoaderOptions::default()
            };
            Loader::new(Arc::new(dataset), options).unwrap()
        };
        let (labelled, unlabelled) =
            (loader("labelled.npz", &[features.clone(), label]), loader("unlabelled.npz", &[features]));
        let adam = Optimizer::AdamW(AdamSettings::default());
        let mut options = TrainingOptions::new(Loss::CrossEntropy(CrossEntropy::default()), adam);
        options.target = "label".to_owned();
        Bench { folder, labelled, unlabelled, options }
    }

    /// Takes steps on data, with a teacher or alone.
    fn tune(&self, student: &Graph, teacher: Option<&Distillation>, loader: &Loader, steps: u64) -> Tuned {
        self.with(loader, steps, |tuning| match teacher {
            Some(teacher) => distill(tuning, student, teacher, &mut Silent),
            None => fine_tune(tuning, student, &mut Silent),
        })
    }

    fn with(&self, loader: &Loader, steps: u64, tune: impl FnOnce(&Tuning) -> Result<Tuned, CompressError>) -> Tuned {
        let (engine, clock) = (CpuEngine::new(1).unwrap(), FakeClock::default());
        let tuning = Tuning {
            engine: &engine,
            options: &self.options,
            loader,
            validation: None,
            steps,
            learning_rate: 0.02,
            seed: 3,
            store: &Store::open(&self.folder.path().join("store")).unwrap(),
            clock: &clock,
        };
        tune(&tuning).unwrap()
    }

    fn accuracy(&self, model: &Graph) -> f64 {
        let engine = CpuEngine::new(1).unwrap();
        let mut evaluator = Evaluator::new(&engine, model, &self.options).unwrap();
        evaluator.evaluate(&self.labelled, |_| {}).unwrap().accuracy.unwrap()
    }
}

fn network(hidden: usize, seed: u64) -> Graph {
    let entry = zoo::find("mlp").unwrap();
    let given = [("inputs", 2), ("hidden", hidden), ("classes", 2)];
    let given: Vec<_> = given.iter().map(|(n, v)| ((*n).to_owned(), Setting::Integer(*v))).collect();
    entry.build(&Options::of(entry, &given).unwrap(), seed).unwrap()
}

#[test]
fn a_student_learns_from_a_teacher_what_no_label_tells_it() {
    let bench = Bench::new();
    let teacher = bench.tune(&network(32, 1), None, &bench.labelled, 200).graph;
    assert!(bench.accuracy(&teacher) > 0.95);
    let student = network(12, 2);
    let taught = bench.tune(&student, Some(&Distillation::label_free(teacher)), &bench.unlabelled, 300).graph;
    let (before, after) = (bench.accuracy(&student), bench.accuracy(&taught));
    assert!(before < 0.8 && after > 0.9, "accuracy {before} before, {after} after");
}

#[test]
fn the_same_request_gives_the_same_graph_and_a_regressor_is_no_part_of_it() {
    let bench = Bench::new();
    let (student, teacher) = (network(12, 2), network(32, 1));
    let hidden = |graph: &Graph| {
        let (_, relu) = graph.nodes().find(|(_, n)| n.op == "Relu").unwrap();
        graph.value(relu.outputs[0].unwrap()).name.clone()
    };
    let matching = Match { teacher: hidden(&teacher), student: hidden(&student), kind: MatchKind::Hidden, weight: 1.0 };
    let distillation = Distillation { matches: vec![matching], ..Distillation::new(teacher) };
    let taught = bench.tune(&student, Some(&distillation), &bench.labelled, 20);
    let names = |graph: &Graph| graph.constants().map(|(v, _)| graph.value(v).name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&taught.graph), names(&student));
    assert_ne!(taught.graph, student);
    // The second time from the checkpoint of the first.
    assert_eq!(bench.tune(&student, Some(&distillation), &bench.labelled, 20), taught);
    assert_eq!(bench.tune(&student, None, &bench.labelled, 0).graph, student);
}

/// The network in pairs, with ranges from some of the data.
fn quantized(float: &Graph, loader: &Loader, scheme: &Scheme) -> Graph {
    let names = observed(float, scheme).unwrap();
    let mut watched = float.clone();
    watched.set_outputs(names.iter().map(|n| watched.find(n).unwrap()).collect());
    let batch = loader.batches(0..1).unwrap().next().unwrap().unwrap();
    let inputs: HashMap<String, Tensor> = batch.tensors.into_iter().filter(|(n, _)| n == "features").collect();
    let values = evaluate(&watched, &inputs).unwrap();
    let ranges: BTreeMap<String, Range> =
        names.into_iter().zip(&values).map(|(n, t)| (n, Range::of_tensor(t).unwrap())).collect();
    let mut graph = float.clone();
    let mut report = Report::new("insert", Promise::Lossy);
    insert(&mut graph, scheme, &ranges, &BTreeMap::new(), &mut report).unwrap();
    infer(&mut graph).unwrap();
    graph
}

#[test]
fn training_with_four_bits_in_the_loop_recovers_most_of_what_rounding_lost_without_labels() {
    let bench = Bench::new();
    let mut float = bench.tune(&network(16, 1), None, &bench.labelled, 300).graph;
    prepare(&mut float).unwrap();
    let scheme = Scheme { weights: DType::I4, per_channel: false, ..Scheme::default() };
    let pairs = quantized(&float, &bench.labelled, &scheme);
    let teacher = Distillation::label_free(float.clone());
    let trained = bench.with(&bench.unlabelled, 200, |tuning| {
        train_quantized(tuning, &pairs, Some(&float), None, Some(&teacher), &mut Silent)
    });
    let count = |graph: &Graph, op: &str| graph.nodes().filter(|(_, n)| n.op == op).count();
    for op in ["QuantizeLinear", "DequantizeLinear", "Gemm"] {
        assert_eq!(count(&trained.graph, op), count(&pairs, op), "{op}");
    }
    let loss = |graph: &Graph| {
        let engine = CpuEngine::new(1).unwrap();
        let options = TrainingOptions { distillation: Some(teacher.clone()), ..bench.options.clone() };
        Evaluator::new(&engine, graph, &options).unwrap().evaluate(&bench.labelled, |_| {}).unwrap().loss
    };
    let (before, after) = (loss(&pairs), loss(&trained.graph));
    assert!(after < 0.5 * before, "divergence from the float network {before} before, {after} after");
    assert!(bench.accuracy(&trained.graph) >= bench.accuracy(&pairs));
}
