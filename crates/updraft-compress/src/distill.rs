//! Recovering what a rewrite lost: fine-tuning a graph, alone, with a teacher, or with its quantization, through the
//! training loop.
//!
//! Pruned, quantization-aware and small networks differ by graph and not by loop, so this only gives the loop defaults
//! that suit a network that has been trained before: a short warm-up to a low rate, then half a cosine down to zero.

use serde_json::json;
use updraft_base::{Clock, digest::Hasher};
use updraft_data::Loader;
use updraft_engine::Engine;
use updraft_graph::Graph;
use updraft_graph::fingerprint::fingerprint;
use updraft_passes::Promise;
use updraft_passes::distill::Distillation;
use updraft_passes::pipeline::Pipeline;
use updraft_passes::quantize::aware;
use updraft_passes::schedule::{Schedule, Shape};
use updraft_passes::training::{self, TrainingOptions};
use updraft_store::{Origin, Store};
use updraft_train::checkpoint::Record;
use updraft_train::{BestBy, CheckpointSchedule, Observer, Run, Settings, train};

use crate::error::CompressError;

/// What a graph is fine-tuned with.
pub struct Tuning<'a> {
    /// What runs it.
    pub engine: &'a dyn Engine,
    /// Loss, optimizer, names of output and target. Its teacher is not looked at.
    pub options: &'a TrainingOptions,
    /// Batches to learn from.
    pub loader: &'a Loader,
    /// Batches that say which weights are best; without them, the last are taken.
    pub validation: Option<&'a Loader>,
    /// Steps to take; 0 takes none and gives the graph back.
    pub steps: u64,
    /// The learning rate at its highest.
    pub learning_rate: f64,
    /// What dropout is drawn from.
    pub seed: u64,
    /// Where checkpoints are kept, from which a killed fine-tuning goes on.
    pub store: &'a Store,
    /// Time, for checkpoints.
    pub clock: &'a dyn Clock,
}

/// A graph that was fine-tuned.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    /// The graph with its best weights; the names are those of the graph it was.
    pub graph: Graph,
    /// The course of it; `None` where no step was taken.
    pub record: Option<Record>,
}

/// Fine-tunes a graph on labels.
pub fn fine_tune(tuning: &Tuning, student: &Graph, observer: &mut dyn Observer) -> Result<Tuned, CompressError> {
    run(tuning, student, None, observer)
}

/// Fine-tunes a graph with a teacher; [`Distillation::new`] and [`Distillation::label_free`] have the usual weights.
pub fn distill(
    tuning: &Tuning,
    student: &Graph,
    distillation: &Distillation,
    observer: &mut dyn Observer,
) -> Result<Tuned, CompressError> {
    run(tuning, student, Some(distillation), observer)
}

/// Trains a quantized graph with its rounding in the loop, alone or with a teacher, which usually is the graph of floats:
/// pairs of QuantizeLinear and DequantizeLinear in, pairs with trained weights, biases and scales out.
///
/// `float` is the graph before quantization, from whose weights the training starts; `weight_levels` are the lowest and
/// the highest code of weights, where fewer are used than their type has. See [`aware`].
pub fn train_quantized(
    tuning: &Tuning,
    pairs: &Graph,
    float: Option<&Graph>,
    weight_levels: Option<(i32, i32)>,
    distillation: Option<&Distillation>,
    observer: &mut dyn Observer,
) -> Result<Tuned, CompressError> {
    let mut graph = pairs.clone();
    let mut pipeline = Pipeline::new(&mut graph);
    pipeline.apply("fake quantization", Promise::Within(1e-4), |g, r| aware::trainable(g, float, weight_levels, r))?;
    let mut tuned = run(tuning, &graph, distillation, observer)?;
    let mut pipeline = Pipeline::new(&mut tuned.graph);
    pipeline.apply("stored codes", Promise::Lossy, aware::quantized)?;
    Ok(tuned)
}

/// Steps from one checkpoint to the next: a killed search loses little, and saving costs less than a step in ten.
const CHECKPOINT_STEPS: u64 = 200;

/// Evaluations in the course of a fine-tuning, the last one included.
const EVALUATIONS: u64 = 4;

fn run(
    tuning: &Tuning,
    student: &Graph,
    distillation: Option<&Distillation>,
    observer: &mut dyn Observer,
) -> Result<Tuned, CompressError> {
    if tuning.steps == 0 {
        return Ok(Tuned { graph: student.clone(), record: None });
    }
    let options = TrainingOptions { distillation: distillation.cloned(), ..tuning.options.clone() };
    let steps = tuning.steps;
    let settings = Settings {
        steps,
        seed: tuning.seed,
        schedule: Schedule {
            peak: tuning.learning_rate,
            warmup_steps: steps / 20,
            shape: Shape::Cosine { total_steps: steps, floor: 0.0 },
        },
        validate_every_steps: steps.div_ceil(EVALUATIONS),
        best_by: BestBy::Loss,
        early_stopping: None,
        checkpoint: CheckpointSchedule { every_steps: Some(CHECKPOINT_STEPS), every_ns: None, keep_last: 1 },
    };
    let origin = origin(tuning, student, distillation)?;
    let mut run = Run {
        model: student,
        options: &options,
        engine: tuning.engine,
        loader: tuning.loader,
        validation: tuning.validation,
        store: tuning.store,
        origin: &origin,
        clock: tuning.clock,
        observer,
    };
    let trained = train(&mut run, &settings)?;
    Ok(Tuned { graph: training::export(student, trained.best)?, record: Some(trained.record) })
}

/// All that determines the result, which checkpoints are found by.
fn origin(tuning: &Tuning, student: &Graph, distillation: Option<&Distillation>) -> Result<Origin, CompressError> {
    let digest =
        |graph: &Graph| fingerprint(graph).map_err(|e| CompressError::from(updraft_passes::PassError::from(e)));
    let data = |loader: &Loader| {
        let facts = loader.dataset().facts();
        json!({ "content": facts.digest, "pipeline": facts.pipeline, "token": loader.place(0) })
    };
    let teacher = match distillation {
        None => None,
        Some(distillation) => {
            // The settings without the weights, which the fingerprint stands for.
            let settings = Distillation { teacher: Graph::default(), ..distillation.clone() };
            Some(json!({ "graph": digest(&distillation.teacher)?, "settings": format!("{settings:?}") }))
        }
    };
    let options = TrainingOptions { distillation: None, ..tuning.options.clone() };
    let mut hasher = Hasher::new();
    hasher.field(format!("{options:?}").as_bytes());
    let recipe = json!({
        "student": digest(student)?,
        "teacher": teacher,
        "options": hasher.finish(),
        "steps": tuning.steps,
        "learning_rate": tuning.learning_rate,
        "seed": tuning.seed,
        "data": data(tuning.loader),
        "validation": tuning.validation.map(data),
    });
    Ok(Origin { kind: "fine-tuning".to_owned(), recipe, ..Origin::default() })
}
