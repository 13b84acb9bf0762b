//! Pruning in one go or in parts, with recovery in between.
//!
//! Each part removes a little more, lets the running statistics of batch normalisation find what the smaller network
//! puts out, and fine-tunes. Structured pruning makes a smaller graph; unstructured and n:m pruning set weights to zero,
//! and their masks hold through fine-tuning because the training step sees each weight through its mask.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use updraft_base::Key;
use updraft_data::Batch;
use updraft_engine::CompileOptions;
use updraft_graph::{Graph, Tensor, cost};
use updraft_passes::distill::Distillation;
use updraft_passes::optimizer;
use updraft_passes::prune::importance::Importance;
use updraft_passes::prune::sparse::{self, Masks, Pattern};
use updraft_passes::prune::structured::{self, Scope};
use updraft_passes::quantize::rounding::layers;
use updraft_passes::training::{self, SEED, STEP, TrainingOptions};
use updraft_train::Observer;

use crate::distill::{Tuning, distill, fine_tune};
use crate::error::CompressError;
use crate::layers::{ObserveOptions, observe};

/// What is removed, and in how many parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Channels or single weights.
    pub method: Method,
    /// Share of channels or weights that is removed in all, in [0, 1); n:m pruning says it itself.
    pub ratio: f64,
    /// Patterns of parameters and nodes that stay as they are.
    pub exclude: Vec<String>,
    /// Parts, each followed by recovery; at least 1.
    pub parts: usize,
    /// Steps that only move the running statistics of batch normalisation, before each fine-tuning.
    pub recalibration_steps: u64,
    /// Batches that importance looks at, where it looks at data.
    pub importance_batches: u64,
    /// What random importance is drawn from.
    pub seed: u64,
}

/// What is removed.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// Channels and heads: the network gets smaller.
    Structured {
        /// What decides which.
        importance: Importance,
        /// A share of each group, or of all together.
        scope: Scope,
        /// Widths are multiples of this.
        round_to: usize,
        /// The largest share that groups may lose, by pattern; others may lose nine tenths.
        limits: Vec<(String, f64)>,
    },
    /// Single weights.
    Unstructured {
        /// A share of each weight tensor, or of all together.
        scope: Scope,
        /// What decides which.
        importance: WeightImportance,
    },
    /// All but `n` of every `m` neighbouring weights.
    OfEach {
        /// How many are kept.
        n: usize,
        /// Of how many.
        m: usize,
        /// What decides which.
        importance: WeightImportance,
    },
}

/// How single weights are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightImportance {
    /// By magnitude.
    Magnitude,
    /// By magnitude times the norm of what they are multiplied with, each output by itself (Wanda, Sun et al., 2023,
    /// <https://arxiv.org/abs/2306.11695>). Grouped convolutions, whose weights see several inputs in one place, go by
    /// magnitude.
    Wanda,
}

impl Settings {
    /// A share of each group of channels by L2, widths multiples of 8, in one part.
    pub fn structured(ratio: f64) -> Settings {
        let method =
            Method::Structured { importance: Importance::L2, scope: Scope::Local, round_to: 8, limits: Vec::new() };
        Settings {
            method,
            ratio,
            exclude: Vec::new(),
            parts: 1,
            // A running mean with momentum 0.9 has forgotten all but 1/200 of what it was.
            recalibration_steps: 50,
            importance_batches: 16,
            seed: 0,
        }
    }
}

/// How a pruned network recovers.
pub struct Recovery<'a> {
    /// Data, loss and optimizer; its steps follow each part.
    pub tuning: &'a Tuning<'a>,
    /// A teacher, usually the network before pruning.
    pub distillation: Option<&'a Distillation>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PruneReport {
    /// Groups of channels that can be pruned, also those that lost nothing; empty where single weights are pruned.
    pub groups: Vec<GroupReport>,
    /// What was not pruned, and why.
    pub refused: Vec<RefusedReport>,
    /// Zeros among the weights that may be zero; `None` where channels are pruned.
    pub sparsity: Option<Sparsity>,
    /// The network before.
    pub before: Size,
    /// The network after.
    pub after: Size,
    /// The course, part by part.
    pub parts: Vec<PartReport>,
}

/// What became of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// The parameter that makes the channels.
    pub name: String,
    /// Channels before.
    pub before: usize,
    /// Channels after.
    pub after: usize,
    /// Channels that go together.
    pub unit: usize,
}

/// What was left alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefusedReport {
    /// The parameter that makes the channels, or the weight.
    pub name: String,
    /// Its channels, or its elements.
    pub width: usize,
    /// Why.
    pub reason: String,
}

/// Weights that are zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sparsity {
    /// Elements of the weights that masks cover.
    pub elements: u64,
    /// Those that are zero.
    pub zeros: u64,
    /// What that does and does not gain.
    pub note: String,
}

/// What a network takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Elements of float initializers.
    pub parameters: u64,
    /// Bytes of all initializers.
    pub bytes: u64,
    /// Operations for one sample; `None` where sizes are not known.
    pub flops: Option<u64>,
}

/// One part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartReport {
    /// Share that is removed when it is done.
    pub ratio: f64,
    /// Elements of float initializers after it.
    pub parameters: u64,
    /// Fine-tuning steps that followed.
    pub steps: u64,
    /// The last loss of fine-tuning on a training batch.
    pub loss: Option<f64>,
}

impl Size {
    /// That of a graph, for one sample of the shapes that `sizes` gives for symbols.
    pub fn of(graph: &Graph, sizes: &BTreeMap<String, usize>) -> Size {
        let floats = graph.constants().filter(|(_, t)| t.dtype().is_float());
        let parameters = floats.map(|(_, t)| t.len() as u64).sum();
        let bytes = graph.constants().map(|(_, t)| t.byte_len() as u64).sum();
        let total =
            |graph: &Graph| graph.nodes().map(|(_, node)| cost::of_node(graph, node)).sum::<Option<cost::Cost>>();
        let flops = cost::at_sizes(graph, sizes).ok().and_then(|bound| total(&bound)).map(|cost| cost.flops);
        Size { parameters, bytes, flops }
    }
}

/// Prunes a network. Without recovery nothing is run but for gradients, which Taylor importance needs data for.
pub fn prune(
    model: &Graph,
    settings: &Settings,
    recovery: Option<&Recovery>,
    observer: &mut dyn Observer,
) -> Result<(Graph, PruneReport), CompressError> {
    let wrong = |setting, problem: String| Err(CompressError::Setting { setting, problem });
    if settings.parts == 0 {
        return wrong("steps", "is 0, expected at least 1".to_owned());
    }
    if !(0.0..1.0).contains(&settings.ratio) {
        return wrong("ratio", format!("is {}, expected a share from 0 to below 1", settings.ratio));
    }
    if matches!(settings.method, Method::Structured { round_to: 0, .. }) {
        return wrong("round", "is 0, expected at least 1".to_owned());
    }
    let mut graph = model.clone();
    // Both sizes are those of the same form.
    updraft_graph::upgrade::upgrade(&mut graph).map_err(updraft_passes::PassError::from)?;
    updraft_graph::infer::infer(&mut graph).map_err(updraft_passes::PassError::from)?;
    let sizes = sample_sizes(&graph, recovery);
    let mut report = PruneReport {
        groups: Vec::new(),
        refused: Vec::new(),
        sparsity: None,
        before: Size::of(&graph, &sizes),
        after: Size::of(&graph, &sizes),
        parts: Vec::new(),
    };
    let mut widths = BTreeMap::new();
    for part in 1..=settings.parts {
        let (ratio, masks) = match &settings.method {
            Method::Structured { .. } => {
                let ratio = settings.ratio * part as f64 / settings.parts as f64;
                remove_channels(&mut graph, settings, ratio, &mut widths, recovery, &mut report)?;
                (ratio, Masks::new())
            }
            Method::Unstructured { .. } | Method::OfEach { .. } => {
                remove_weights(&mut graph, settings, part, recovery, &mut report)?
            }
        };
        let (mut steps, mut loss) = (0, None);
        if let Some(recovery) = recovery {
            graph = recalibrated(&graph, settings, recovery.tuning, observer)?;
            let mut held = graph.clone();
            sparse::hold(&mut held, &masks)?;
            let tuned = match recovery.distillation {
                Some(distillation) => distill(recovery.tuning, &held, distillation, observer)?,
                None => fine_tune(recovery.tuning, &held, observer)?,
            };
            graph = with_constants_of(graph, &tuned.graph);
            sparse::apply(&mut graph, &masks)?;
            steps = tuned.record.as_ref().map_or(0, |record| record.step);
            loss = tuned.record.as_ref().and_then(|record| record.history.loss.points().last().map(|point| point.loss));
        }
        let parameters = Size::of(&graph, &sizes).parameters;
        report.parts.push(PartReport { ratio, parameters, steps, loss });
    }
    report.after = Size::of(&graph, &sizes);
    Ok((graph, report))
}

fn remove_channels(
    graph: &mut Graph,
    settings: &Settings,
    ratio: f64,
    widths: &mut BTreeMap<String, usize>,
    recovery: Option<&Recovery>,
    report: &mut PruneReport,
) -> Result<(), CompressError> {
    let Method::Structured { importance, scope, round_to, limits } = &settings.method else { return Ok(()) };
    let gradients = match (importance, recovery) {
        (Importance::Taylor, Some(recovery)) => gradients(graph, recovery.tuning, settings.importance_batches)?,
        (Importance::Taylor, None) => {
            let problem = "is taylor, which needs data to take gradients on".to_owned();
            return Err(CompressError::Setting { setting: "importance", problem });
        }
        _ => BTreeMap::new(),
    };
    let asked = structured::Settings {
        scope: *scope,
        importance: *importance,
        round_to: *round_to,
        limits: limits.clone(),
        exclude: settings.exclude.clone(),
        seed: settings.seed,
        widths: widths.clone(),
        ..structured::Settings::new(ratio)
    };
    let pruned = structured::prune(graph, &asked, &gradients)?;
    for width in pruned.widths {
        widths.entry(width.group.clone()).or_insert(width.before);
        match report.groups.iter_mut().find(|group| group.name == width.group) {
            Some(group) => group.after = width.after,
            None => report.groups.push(GroupReport {
                name: width.group,
                before: width.before,
                after: width.after,
                unit: width.unit,
            }),
        }
    }
    let refused = pruned.refused.into_iter();
    report.refused = refused.map(|r| RefusedReport { name: r.name, width: r.width, reason: r.reason }).collect();
    Ok(())
}

fn remove_weights(
    graph: &mut Graph,
    settings: &Settings,
    part: usize,
    recovery: Option<&Recovery>,
    report: &mut PruneReport,
) -> Result<(f64, Masks), CompressError> {
    let (pattern, scope, importance) = match settings.method {
        Method::OfEach { n, m, importance } => (Pattern::Of { n, m }, Scope::Local, importance),
        Method::Unstructured { scope, importance } => {
            (Pattern::Share(sparse::cubic(0.0, settings.ratio, part, settings.parts)), scope, importance)
        }
        Method::Structured { scope, .. } => (Pattern::Share(settings.ratio), scope, WeightImportance::Magnitude),
    };
    let norms = match (importance, recovery) {
        (WeightImportance::Magnitude, _) => BTreeMap::new(),
        (WeightImportance::Wanda, Some(recovery)) => input_norms(graph, recovery.tuning, settings.importance_batches)?,
        (WeightImportance::Wanda, None) => {
            let problem = "is wanda, which needs data to take norms of inputs on".to_owned();
            return Err(CompressError::Setting { setting: "importance", problem });
        }
    };
    let asked = sparse::Settings { pattern, scope, exclude: settings.exclude.clone() };
    let masks = sparse::choose(graph, &asked, &norms)?;
    let (elements, zeros) = sparse::apply(graph, &masks)?;
    report.sparsity = Some(Sparsity { elements, zeros, note: sparse::NO_SPEED.to_owned() });
    let left = graph
        .constants()
        .filter(|(id, t)| t.dtype().is_float() && t.rank() >= 2 && !masks.contains_key(&graph.value(*id).name));
    report.refused = left
        .map(|(id, t)| {
            let name = graph.value(id).name.clone();
            let reason = match settings.exclude.iter().find(|pattern| optimizer::matches(pattern, &name)) {
                Some(pattern) => format!("excluded by {pattern:?}"),
                None => "no product or convolution reads it as its weight, or its node is excluded".to_owned(),
            };
            RefusedReport { name, width: t.len(), reason }
        })
        .collect();
    let ratio = if elements == 0 { 0.0 } else { zeros as f64 / elements as f64 };
    Ok((ratio, masks))
}

/// The network with running statistics of what it puts out now; its weights do not move.
fn recalibrated(
    graph: &Graph,
    settings: &Settings,
    tuning: &Tuning,
    observer: &mut dyn Observer,
) -> Result<Graph, CompressError> {
    let has_statistics = graph.nodes().any(|(_, node)| node.op == "BatchNormalization" && node.domain.is_empty());
    if !has_statistics || settings.recalibration_steps == 0 {
        return Ok(graph.clone());
    }
    // Without a rate no optimizer moves a weight, and without validation the last statistics are taken.
    let still = Tuning { steps: settings.recalibration_steps, learning_rate: 0.0, validation: None, ..*tuning };
    Ok(fine_tune(&still, graph, observer)?.graph)
}

/// The graph with the initializers of another one that has the same and more.
fn with_constants_of(mut graph: Graph, other: &Graph) -> Graph {
    let ids: Vec<_> = graph.constants().map(|(id, _)| id).collect();
    for id in ids {
        let found = other.find(&graph.value(id).name).and_then(|v| other.value(v).constant());
        if let Some(tensor) = found.cloned() {
            graph.set_constant(id, Some(tensor));
        }
    }
    graph
}

/// The norm of each input channel of each layer's weights over some batches, by the weights' name; up to a factor that all
/// weights of a layer share.
fn input_norms(graph: &Graph, tuning: &Tuning, batches: u64) -> Result<BTreeMap<String, Vec<f64>>, CompressError> {
    let (mut found, _) = layers(graph)?;
    found.retain(|layer| layer.groups() == 1);
    let mut squares: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let few = || -> Result<Box<dyn Iterator<Item = Result<Batch, CompressError>> + '_>, CompressError> {
        Ok(Box::new(tuning.loader.batches(0..batches.max(1))?.map(|batch| Ok(batch?))))
    };
    let options = ObserveOptions { key: Key::new(tuning.seed).child("norms"), ..ObserveOptions::default() };
    observe(tuning.engine, graph, &found, &few, &options, |sweep| {
        for seen in sweep {
            let Some(moments) = seen.moments.first() else { continue };
            let (second, columns) = (moments.second(), moments.columns());
            for layer in seen.layers {
                let weights = graph.find(&layer.weights).and_then(|v| graph.value(v).constant());
                // A window's columns go channel by channel.
                let channels = match layer.input_axis() {
                    Some(_) => columns,
                    None => weights.and_then(|w| w.shape().get(1).copied()).unwrap_or(columns),
                };
                let taps = columns / channels.max(1);
                // Weights that several layers share see the inputs of all.
                let sums = squares.entry(layer.weights.clone()).or_insert_with(|| vec![0.0; channels]);
                for (channel, sum) in sums.iter_mut().enumerate() {
                    *sum += (channel * taps..(channel + 1) * taps).map(|i| second[i * columns + i]).sum::<f64>();
                }
            }
        }
        Ok(())
    })?;
    Ok(squares.into_iter().map(|(name, sums)| (name, sums.into_iter().map(f64::sqrt).collect())).collect())
}

/// The mean gradient of each parameter over some batches.
pub fn gradients(graph: &Graph, tuning: &Tuning, batches: u64) -> Result<BTreeMap<String, Tensor>, CompressError> {
    let options = TrainingOptions { distillation: None, ..tuning.options.clone() };
    let step = training::build_gradients(graph, &options)?;
    let mut session = tuning.engine.compile(&step.graph, &CompileOptions::default())?;
    let random = [(STEP, Tensor::scalar(0i64)), (SEED, Tensor::scalar(tuning.seed as i64))];
    let random: Vec<(&str, &Tensor)> = random
        .iter()
        .filter(|(name, _)| step.graph.inputs().iter().any(|v| step.graph.value(*v).name == *name))
        .map(|(name, tensor)| (*name, tensor))
        .collect();
    let mut sums: Vec<Vec<f64>> = Vec::new();
    let mut shapes = Vec::new();
    let count = batches.max(1);
    for batch in tuning.loader.batches(0..count)? {
        let batch = batch?;
        let mut inputs = random.clone();
        for name in &step.batch_inputs {
            let found =
                batch.tensors.iter().find(|(given, _)| given == name).ok_or_else(|| CompressError::Setting {
                    setting: "data",
                    problem: format!("makes no tensor {name:?}, which the model or its loss reads"),
                })?;
            inputs.push((name.as_str(), &found.1));
        }
        let outputs = session.run(&inputs)?;
        shapes = outputs.iter().skip(1).map(|t| t.shape().to_vec()).collect();
        sums.resize(shapes.len(), Vec::new());
        for (sum, gradient) in sums.iter_mut().zip(outputs.iter().skip(1)) {
            let values = gradient.to_f64().map_err(|e| updraft_passes::PassError::Op(e.into()))?;
            sum.resize(values.len(), 0.0);
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value / count as f64);
        }
    }
    let mut found = BTreeMap::new();
    for ((name, sum), shape) in step.parameters.into_iter().zip(sums).zip(shapes) {
        let values: Vec<f32> = sum.into_iter().map(|v| v as f32).collect();
        let tensor = Tensor::new(&shape, &values).map_err(|e| updraft_passes::PassError::Op(e.into()))?;
        found.insert(name, tensor);
    }
    Ok(found)
}

/// Sizes of one sample for the symbols of the graph's inputs: those of the data, or 1 for the axis of samples.
fn sample_sizes(graph: &Graph, recovery: Option<&Recovery>) -> BTreeMap<String, usize> {
    let mut sizes = BTreeMap::new();
    for input in graph.inputs() {
        let name = &graph.value(*input).name;
        let facts = recovery.map(|recovery| recovery.tuning.loader.dataset().facts());
        let shape = facts.and_then(|facts| facts.tensors.iter().find(|t| t.name == *name)).map(|t| t.shape.as_slice());
        let known = std::iter::once(&1).chain(shape.unwrap_or(&[]));
        for (dim, size) in graph.shape(*input).unwrap_or(&[]).iter().zip(known) {
            if let Some(symbol) = dim.as_symbol() {
                sizes.insert(symbol.to_owned(), *size);
            }
        }
    }
    sizes
}
