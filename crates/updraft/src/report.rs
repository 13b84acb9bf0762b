//! What a run was and what came of it: `report.json` for programs, `report.html` for people.
//!
//! Both say the same; the page is made from what the JSON file holds and needs no network. Numbers are facts about this
//! run on this machine: the time is no part of what determines the model.

use serde::Serialize;
use serde_json::Value;
use updraft_base::Digest;
use updraft_data::{DatasetFacts, Stage};
use updraft_graph::cost::{self, Cost};
use updraft_graph::op::show_shape;
use updraft_graph::{Graph, ValueId, zoo};
use updraft_store::Artifact;
use updraft_train::metrics::Metrics;
use updraft_train::waits::Waits;

use crate::failure::Failure;
use crate::model;
use crate::stage::optimize::Account;
use crate::stage::{Done, Results, Stages, TrainingHistory, at_one_sample};

pub(crate) mod data;

mod chart;
mod optimize;
mod page;

pub(crate) use page::page;

/// The version of `report.json`.
const FORMAT: u64 = 1;

/// All that is said about a run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    format: u64,
    name: String,
    updraft_version: &'static str,
    /// When it was written.
    created_unix_ms: u64,
    seed: u64,
    threads: usize,
    model: ModelCard,
    data: Vec<DataCard>,
    training: TrainingCard,
    metrics: Value,
    test: Option<Metrics>,
    /// How the trained model was made smaller or faster, where the recipe asks for it.
    optimization: Option<Account>,
    stages: Vec<Done>,
    /// What the model came from, nearest first.
    lineage: Vec<Artifact>,
    /// The recipe, letter for letter.
    recipe: String,
}

#[derive(Debug, Serialize)]
struct ModelCard {
    network: String,
    digest: Digest,
    size_bytes: u64,
    parameters: u64,
    /// For one sample; `None` where a node's cost is not known.
    cost_per_sample: Option<CostCard>,
    inputs: Vec<String>,
    outputs: Vec<String>,
    operators: Vec<(String, u64)>,
}

#[derive(Debug, Serialize)]
struct CostCard {
    flops: u64,
    read_bytes: u64,
    written_bytes: u64,
}

#[derive(Debug, Serialize)]
struct DataCard {
    split: &'static str,
    digest: Digest,
    facts: DatasetFacts,
}

#[derive(Debug, Serialize)]
struct TrainingCard {
    elapsed_ns: u64,
    samples_per_second: f64,
    /// What training waited for on the side of data.
    waits: Option<Waits>,
    history: TrainingHistory,
}

/// Gathers the report of a run.
pub(crate) fn gather(stages: &Stages, results: &Results) -> Result<Report, Failure> {
    let graph = &results.export.model.graph;
    let train = results.data.iter().find(|(split, _)| *split == "train");
    let costs: Option<Cost> = match train {
        Some((_, data)) => {
            let bound = at_one_sample(graph, data.dataset.facts())?;
            bound.nodes().map(|(_, node)| cost::of_node(&bound, node)).sum()
        }
        None => None,
    };
    let mut operators: Vec<(String, u64)> = Vec::new();
    for (_, node) in graph.nodes() {
        match operators.iter_mut().find(|(op, _)| *op == node.op) {
            Some((_, count)) => *count += 1,
            None => operators.push((node.op.clone(), 1)),
        }
    }
    operators.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    let show = |values: &[ValueId]| values.iter().map(|v| show_value(graph, *v)).collect();
    let history = results.trained.history.clone();
    let samples = history.record.step * history.batch as u64;
    Ok(Report {
        format: FORMAT,
        name: stages.loaded.name.clone(),
        updraft_version: env!("CARGO_PKG_VERSION"),
        created_unix_ms: stages.context.clock.now_unix_ms(),
        seed: stages.seed,
        threads: stages.context.threads,
        model: ModelCard {
            network: graph.name.clone(),
            digest: results.export.digest,
            size_bytes: results.export.size_bytes,
            parameters: zoo::parameter_count(graph),
            cost_per_sample: costs.map(|c| CostCard {
                flops: c.flops,
                read_bytes: c.read_bytes,
                written_bytes: c.written_bytes,
            }),
            inputs: show(&model::inputs(graph)),
            outputs: show(graph.outputs()),
            operators,
        },
        data: results
            .data
            .iter()
            .map(|(split, data)| DataCard { split, digest: data.digest, facts: data.dataset.facts().clone() })
            .collect(),
        training: TrainingCard {
            elapsed_ns: history.elapsed_ns,
            samples_per_second: samples as f64 / (history.elapsed_ns as f64 / 1e9),
            waits: history.waits.clone(),
            history,
        },
        metrics: metrics(results),
        test: results.evaluation.as_ref().map(|(metrics, _)| metrics.clone()),
        optimization: results.optimized.as_ref().map(|o| o.account.clone()),
        stages: stages.done(),
        lineage: stages.store.lineage(&results.export.digest)?,
        recipe: stages.loaded.text.clone(),
    })
}

/// The numbers that runs are compared by, named by the data they are about.
pub(crate) fn metrics(results: &Results) -> Value {
    let record = &results.trained.history.record;
    let of_best =
        |evaluation: &&updraft_train::history::Evaluation| record.best.is_none_or(|best| best.step == evaluation.step);
    let validation = record.history.evaluations.iter().rev().find(of_best).map(|e| &e.metrics);
    let test = results.evaluation.as_ref().map(|(metrics, _)| metrics);
    let mut named = serde_json::Map::new();
    for (split, metrics) in [("test", test), ("validation", validation)] {
        let Some(metrics) = metrics else { continue };
        named.insert(format!("{split}_loss"), metrics.loss.into());
        named.extend(metrics.accuracy.map(|a| (format!("{split}_accuracy"), a.into())));
        named.extend(metrics.perplexity.map(|p| (format!("{split}_perplexity"), p.into())));
    }
    if let Some(waits) = &results.trained.history.waits {
        named.extend(wait_metrics("train", waits));
    }
    Value::Object(named)
}

/// The share of the time that was waited for data, and the seconds by stage.
pub(crate) fn wait_metrics(of: &str, waits: &Waits) -> serde_json::Map<String, Value> {
    let share = waits.share().map(|share| (format!("{of}_wait_share"), share.into()));
    let seconds = |stage: Stage| {
        let seconds = waits.stalls.waited.of(stage) as f64 / 1e9;
        (format!("{of}_wait_{}_seconds", stage.name()), seconds.into())
    };
    share.into_iter().chain(Stage::ALL.map(seconds)).collect()
}

fn show_value(graph: &Graph, value: ValueId) -> String {
    let value = graph.value(value);
    let dtype = value.ty.dtype().map_or("?", |d| d.name());
    let shape = value.ty.shape().map(show_shape).unwrap_or_else(|| "[?]".to_owned());
    format!("{}: {dtype}{shape}", value.name)
}
