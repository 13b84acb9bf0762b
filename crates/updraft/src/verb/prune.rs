//! `updraft prune`: a model with fewer channels, or with zeros.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::{Map, Value, json};
use updraft_base::{Digest, units};
use updraft_compress::distill::Tuning;
use updraft_compress::prune::{Method, PruneReport, Recovery, Settings, WeightImportance, prune};
use updraft_data::Loader;
use updraft_engine::CpuEngine;
use updraft_graph::{Graph, Model};
use updraft_passes::prune::importance::Importance;
use updraft_passes::prune::structured::Scope;
use updraft_store::{Origin, Store};
use updraft_train::metrics::Metrics;
use updraft_train::{Event, Observer};

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::progress::{Progress, TrainingProgress};
use crate::stage::{Data, Network, Stages};
use crate::table::table;
use crate::{model, output};

/// Remove channels or weights from a model, and let it recover
///
/// Structured pruning removes channels and attention heads with all that depends on them, so the model really gets
/// smaller and faster. Unstructured and N:M pruning set weights to zero, which makes no dense runtime faster. With
/// `--data` the model is recalibrated and fine-tuned as the recipe's `[train]` says, and measured before and after. The
/// answer lists every group of channels, and why some stay.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model: an ONNX file of floats.
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// Where to write the pruned model.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Share of the channels or weights that is removed, from 0 to below 1; N:M says it itself.
    #[arg(long, value_name = "SHARE", default_value_t = 0.5)]
    ratio: f64,

    /// What is removed: `structured` (channels and heads), `unstructured` (single weights), or `N:M` such as `2:4` (all
    /// but N of every M neighbouring weights).
    #[arg(long, value_name = "METHOD", default_value = "structured", value_parser = parse_method)]
    method: MethodName,

    /// What channels or weights are compared by. Weights go by their magnitude, which is what `l1` and `l2` mean for
    /// them, or by `wanda`.
    #[arg(long, value_enum, default_value_t = ImportanceName::L2)]
    importance: ImportanceName,

    /// Whether each group of channels or weight loses the share, or all together.
    #[arg(long, value_enum, default_value_t = ScopeName::Local)]
    scope: ScopeName,

    /// Widths are multiples of this, and at least one multiple is left.
    #[arg(long, value_name = "N", default_value_t = 8)]
    round: usize,

    /// Parts in which the share is removed, each followed by recovery.
    #[arg(long, value_name = "N", default_value_t = 1)]
    steps: usize,

    /// Training steps after each part.
    #[arg(long, value_name = "N", default_value_t = 0)]
    finetune_steps: u64,

    /// The highest learning rate of fine-tuning [default: the recipe's].
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,

    /// The recipe with the data: an `updraft.toml`, or the folder that holds it.
    #[arg(long, value_name = "RECIPE")]
    data: Option<PathBuf>,

    /// Leave parameters and nodes of this name alone (`*` any text, `?` one character). Repeat for more.
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,

    /// The largest share that groups of this name lose, such as `layer4.*=0.2`. Repeat for more.
    #[arg(long = "limit", value_name = "PATTERN=SHARE", value_parser = parse_limit)]
    limits: Vec<(String, f64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MethodName {
    Structured,
    Unstructured,
    OfEach(usize, usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ImportanceName {
    /// The sum of magnitudes.
    L1,
    /// The Euclidean norm.
    L2,
    /// Weight times gradient on the data.
    Taylor,
    /// The scale of batch normalisation.
    BatchNorm,
    /// The distance to the other channels.
    GeometricMedian,
    /// Drawn by the seed, to compare with.
    Random,
    /// For weights: the magnitude times the norm of the input on the data, each output by itself.
    Wanda,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ScopeName {
    Local,
    Global,
}

fn parse_method(text: &str) -> Result<MethodName, String> {
    let counts = text.split_once(':').and_then(|(n, m)| Some((n.parse().ok()?, m.parse().ok()?)));
    match (text, counts) {
        ("structured", _) => Ok(MethodName::Structured),
        ("unstructured", _) => Ok(MethodName::Unstructured),
        (_, Some((n, m))) if 0 < n && n <= m => Ok(MethodName::OfEach(n, m)),
        _ => Err("expected `structured`, `unstructured`, or N:M with N from 1 to M".to_owned()),
    }
}

fn parse_limit(text: &str) -> Result<(String, f64), String> {
    let parsed = text.rsplit_once('=').and_then(|(pattern, share)| Some((pattern.to_owned(), share.parse().ok()?)));
    parsed
        .filter(|(_, share)| (0.0..1.0).contains(share))
        .ok_or_else(|| "expected PATTERN=SHARE with a share from 0 to below 1".to_owned())
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let asks_data = matches!(args.importance, ImportanceName::Taylor | ImportanceName::Wanda);
    if args.data.is_none() && (args.finetune_steps > 0 || asks_data) {
        let problem = "fine-tuning, and taylor or wanda importance, need data";
        return Err(Failure::new(Kind::Usage, problem).hint("name a recipe with `--data`"));
    }
    check_importance(args)?;
    let bench = Bench::open(args, context)?;
    let network = bench.import(args)?;
    let settings = settings(args, bench.seed());
    let (pruned, report, reused) = bench.prune(args, &network, &settings)?;
    output::write(&args.output, &bench.store.get(&pruned.digest)?)?;
    let before = bench.evaluate(&network)?;
    let after = bench.evaluate(&pruned)?;
    Ok(answer(args, &network, &pruned, &report, before.zip(after), reused))
}

/// Refuses an importance that the method does not know, which would be another one in silence.
fn check_importance(args: &Args) -> Result<(), Failure> {
    let is_structured = args.method == MethodName::Structured;
    let problem = match args.importance {
        ImportanceName::Wanda if is_structured => "`--importance wanda` compares weights, not channels",
        ImportanceName::Wanda if args.scope == ScopeName::Global => {
            "`--scope global` has no effect with `--importance wanda`, which compares the weights of one output"
        }
        ImportanceName::L1 | ImportanceName::L2 | ImportanceName::Wanda => return Ok(()),
        _ if is_structured => return Ok(()),
        _ => "`--importance` of weights is l1, l2 or wanda",
    };
    Err(Failure::new(Kind::Usage, problem))
}

fn settings(args: &Args, seed: u64) -> Settings {
    let scope = match args.scope {
        ScopeName::Local => Scope::Local,
        ScopeName::Global => Scope::Global,
    };
    let of_weights = match args.importance {
        ImportanceName::Wanda => WeightImportance::Wanda,
        _ => WeightImportance::Magnitude,
    };
    let importance = match args.importance {
        ImportanceName::L1 => Importance::L1,
        // Wanda is for single weights only.
        ImportanceName::L2 | ImportanceName::Wanda => Importance::L2,
        ImportanceName::Taylor => Importance::Taylor,
        ImportanceName::BatchNorm => Importance::BatchNorm,
        ImportanceName::GeometricMedian => Importance::GeometricMedian,
        ImportanceName::Random => Importance::Random,
    };
    let method = match args.method {
        MethodName::Structured => {
            Method::Structured { importance, scope, round_to: args.round, limits: args.limits.clone() }
        }
        MethodName::Unstructured => Method::Unstructured { scope, importance: of_weights },
        MethodName::OfEach(n, m) => Method::OfEach { n, m, importance: of_weights },
    };
    let exclude = args.exclude.clone();
    Settings { method, exclude, parts: args.steps, seed, ..Settings::structured(args.ratio) }
}

/// Where a model is pruned: with a recipe's data, or without any.
struct Bench<'a> {
    context: &'a Context<'a>,
    store: Store,
    recipe: Option<WithData<'a>>,
}

struct WithData<'a> {
    stages: Stages<'a>,
    train: Data,
    validation: Option<Data>,
    test: Option<Data>,
}

impl<'a> Bench<'a> {
    fn open(args: &Args, context: &'a Context<'a>) -> Result<Bench<'a>, Failure> {
        let recipe = match &args.data {
            None => None,
            Some(path) => {
                let stages = Stages::open(context, path)?;
                let sections = &stages.loaded.recipe.data;
                let train = stages.data("train", &sections.train)?;
                let open = |split, config: &Option<_>| config.as_ref().map(|c| stages.data(split, c)).transpose();
                let (validation, test) = (open("validation", &sections.validation)?, open("test", &sections.test)?);
                Some(WithData { train, validation, test, stages })
            }
        };
        Ok(Bench { context, store: context.store()?, recipe })
    }

    fn seed(&self) -> u64 {
        self.recipe.as_ref().map_or(self.context.seed.unwrap_or(0), |recipe| recipe.stages.seed)
    }

    fn import(&self, args: &Args) -> Result<Network, Failure> {
        if let Some(recipe) = &self.recipe {
            return recipe.stages.import(&args.model);
        }
        let model = model::load(&args.model)?.model;
        let bytes = model::encode(&model)?;
        let size_bytes = bytes.len() as u64;
        let origin = origin("network", json!({ "onnx": Digest::of(&bytes) }), Vec::new());
        let artifact = self.store.put(&origin, bytes, Map::new())?;
        Ok(Network { model, digest: artifact.digest, size_bytes })
    }

    /// The pruned model, and whether the store had it.
    fn prune(
        &self,
        args: &Args,
        network: &Network,
        settings: &Settings,
    ) -> Result<(Network, PruneReport, bool), Failure> {
        let mut parents = vec![network.digest];
        let mut recipe = json!({ "prune": format!("{settings:?}") });
        if let Some(WithData { stages, train, validation, .. }) = &self.recipe {
            parents.push(train.digest);
            parents.extend(validation.as_ref().map(|data| data.digest));
            recipe["train"] =
                serde_json::to_value(&stages.loaded.recipe.train).map_err(|e| Failure::of(Kind::Usage, &e))?;
            recipe["finetune_steps"] = args.finetune_steps.into();
            recipe["learning_rate"] = args.learning_rate.into();
        }
        let model_origin = origin("model", recipe.clone(), parents.clone());
        let report_origin = origin("prune-report", recipe, parents);
        if let (Some(model), Some(report)) = (self.store.find(&model_origin)?, self.store.find(&report_origin)?) {
            let graph = model::decode(&self.store.get(&model.digest)?, &args.output)?;
            let kept = serde_json::from_slice(&self.store.get(&report.digest)?).map_err(|e| {
                Failure::new(Kind::Storage, format!("the pruning report {} is malformed: {e}", report.digest))
            })?;
            let found = Network { model: graph, digest: model.digest, size_bytes: model.size_bytes };
            return Ok((found, kept, true));
        }
        let (graph, report) = self.pruned(args, &network.model.graph, settings)?;
        let model = Model { graph, ..network.model.clone() };
        let bytes = model::encode(&model)?;
        let text = serde_json::to_vec_pretty(&report).map_err(|e| Failure::of(Kind::Storage, &e))?;
        // The model last: it is what says that all is done.
        self.store.put(&report_origin, text, Map::new())?;
        let size_bytes = bytes.len() as u64;
        let artifact = self.store.put(&model_origin, bytes, Map::new())?;
        Ok((Network { model, digest: artifact.digest, size_bytes }, report, false))
    }

    fn pruned(&self, args: &Args, graph: &Graph, settings: &Settings) -> Result<(Graph, PruneReport), Failure> {
        let mut observer = Watch { progress: self.context.progress, shown: None };
        let Some(WithData { stages, train, validation, .. }) = &self.recipe else {
            return Ok(prune(graph, settings, None, &mut observer)?);
        };
        let section = &stages.loaded.recipe.train;
        let options = section.training_options();
        let engine = CpuEngine::new(self.context.threads)?;
        let loader =
            Loader::new(train.dataset.clone(), section.loader_options(stages.seed, self.context.threads.min(2)))?;
        let validation = validation
            .as_ref()
            .map(|data| stages.evaluation_loader(data, section.validate.batch.unwrap_or(section.batch)))
            .transpose()?;
        let tuning = Tuning {
            engine: &engine,
            options: &options,
            loader: &loader,
            validation: validation.as_ref(),
            steps: args.finetune_steps,
            learning_rate: args.learning_rate.unwrap_or(section.learning_rate.peak),
            seed: stages.seed,
            store: &self.store,
            clock: &*self.context.clock,
        };
        let recovery = Recovery { tuning: &tuning, distillation: None };
        let made = prune(graph, settings, Some(&recovery), &mut observer)?;
        if let Some(shown) = observer.shown.take() {
            shown.finish();
        }
        Ok(made)
    }

    /// The metrics on the test data, where there is any.
    fn evaluate(&self, network: &Network) -> Result<Option<Metrics>, Failure> {
        let Some(WithData { stages, test: Some(test), .. }) = &self.recipe else { return Ok(None) };
        Ok(Some(stages.evaluate("test", network, test)?.0))
    }
}

fn origin(kind: &str, recipe: Value, parents: Vec<Digest>) -> Origin {
    let versions = [("updraft".to_owned(), env!("CARGO_PKG_VERSION").to_owned())].into();
    Origin { kind: kind.to_owned(), recipe, parents, versions }
}

/// Shows one fine-tuning after another.
struct Watch<'a> {
    progress: &'a Progress<'a>,
    shown: Option<TrainingProgress<'a>>,
}

impl Observer for Watch<'_> {
    fn observe(&mut self, event: &Event) {
        if let Event::Stepped { step, steps, .. } = event {
            if let Some(done) = self.shown.take_if(|_| *step == 1) {
                done.finish();
            }
            self.shown.get_or_insert_with(|| TrainingProgress::new(self.progress, *steps));
        }
        if let Some(shown) = &mut self.shown {
            shown.observe(event);
        }
    }
}

fn answer(
    args: &Args,
    network: &Network,
    pruned: &Network,
    report: &PruneReport,
    metrics: Option<(Metrics, Metrics)>,
    reused: bool,
) -> Answer {
    let mut text = String::new();
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<12}{value}\n"));
    let change = |before: u64, after: u64, show: fn(u64) -> String| {
        format!("{} -> {} ({:.1} %)", show(before), show(after), 100.0 * after as f64 / before.max(1) as f64)
    };
    line("parameters", change(report.before.parameters, report.after.parameters, units::count));
    if let (Some(before), Some(after)) = (report.before.flops, report.after.flops) {
        line("FLOPs", change(before, after, units::count));
    }
    line("file", change(network.size_bytes, pruned.size_bytes, units::bytes));
    if let Some((before, after)) = &metrics {
        if let (Some(before), Some(after)) = (before.accuracy, after.accuracy) {
            line("accuracy", format!("{:.2} % -> {:.2} %", 100.0 * before, 100.0 * after));
        }
        if let (Some(before), Some(after)) = (before.perplexity, after.perplexity) {
            line("perplexity", format!("{before:.3} -> {after:.3}"));
        }
        line("loss", format!("{:.4} -> {:.4}", before.loss, after.loss));
    }
    if let Some(sparsity) = &report.sparsity {
        let share = 100.0 * sparsity.zeros as f64 / sparsity.elements.max(1) as f64;
        line("zeros", format!("{} of {} weights ({share:.1} %)", sparsity.zeros, sparsity.elements));
        line("note", sparsity.note.clone());
    }
    let has_statistics = pruned.model.graph.nodes().any(|(_, node)| node.op == "BatchNormalization");
    if args.data.is_none() && has_statistics {
        line("note", "batch normalisation has the statistics of the whole model; `--data` takes new ones".to_owned());
    }
    line("model", format!("{}", args.output.display()));
    line("", format!("{}{}", pruned.digest, if reused { "  reused, nothing it is made from has changed" } else { "" }));
    if !report.groups.is_empty() {
        let row = |group: &updraft_compress::prune::GroupReport| {
            vec![group.name.clone(), group.before.to_string(), group.after.to_string(), group.unit.to_string()]
        };
        let rows: Vec<Vec<String>> = report.groups.iter().map(row).collect();
        text.push('\n');
        text.push_str(&table(&["channels of", "before", "after", "together"], &[1, 2, 3], &rows));
    }
    if !report.refused.is_empty() {
        let rows: Vec<Vec<String>> =
            report.refused.iter().map(|r| vec![r.name.clone(), r.width.to_string(), r.reason.clone()]).collect();
        text.push('\n');
        text.push_str(&table(&["left alone", "size", "because"], &[1], &rows));
    }
    let metrics = metrics.map(|(before, after)| json!({ "before": before, "after": after }));
    let json = json!({
        "model_digest": pruned.digest, "file": args.output, "reused": reused, "report": report,
        "file_bytes": { "before": network.size_bytes, "after": pruned.size_bytes }, "test": metrics,
        "artifacts": { "network": network.digest, "model": pruned.digest },
    });
    Answer { text, json }
}
