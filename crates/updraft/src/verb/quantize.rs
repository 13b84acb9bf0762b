//! `updraft quantize`: a model in smaller numbers.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::{Map, Value, json};
use updraft_base::{Digest, Key, units};
use updraft_compress::CompressError;
use updraft_compress::calibrate::Method;
use updraft_compress::layers::ObserveOptions;
use updraft_compress::quantize::{Form, Quantized, Settings, StaticForm, quantize};
use updraft_compress::rounding;
use updraft_compress::smoothing::Factors;
use updraft_data::{Batch, Loader, LoaderOptions, Shuffle};
use updraft_engine::CpuEngine;
use updraft_graph::{DType, Graph, Model};
use updraft_passes::optimizer::matches;
use updraft_passes::quantize::rounding::{AdaRoundOptions, GptqOptions};
use updraft_passes::quantize::{Decision, Half, Scheme, WeightOnly, WeightScale, prepare};
use updraft_store::{Origin, Store};
use updraft_train::metrics::Metrics;

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::stage::{Network, Stages};
use crate::table::table;
use crate::{model, output};

mod aware;

/// Make a model smaller and faster by writing its numbers in fewer bits
///
/// The answer lists what became of every node, and why some stay float. Where the recipe has test data, the model is
/// measured on it before and after.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model: an ONNX file of floats.
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// The recipe with the data: an `updraft.toml`, or the folder that holds it. Ranges come from `[data.train]`.
    #[arg(long, value_name = "RECIPE")]
    data: Option<PathBuf>,

    /// Where to write the quantized model.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// What becomes of values and weights.
    #[arg(long, value_enum, default_value_t = Mode::Static)]
    mode: Mode,

    /// Codes of values, for `static` [default: u8].
    #[arg(long, value_enum, value_name = "TYPE")]
    activations: Option<Activations>,

    /// Put zero in the middle of the codes of values, as some accelerators demand; for `static`.
    #[arg(long)]
    symmetric: bool,

    /// Bits of a weight, for `weight-only`: 8 or 4 [default: 8].
    #[arg(long, value_name = "BITS")]
    bits: Option<u32>,

    /// Input channels of a matrix product that share a scale, for `weight-only` [default: 64].
    #[arg(long, value_name = "N")]
    block: Option<usize>,

    /// How ranges are chosen from the values seen, for `static` [default: min-max].
    #[arg(long, value_enum, value_name = "METHOD")]
    calibration: Option<Calibration>,

    /// The share of values, in percent, that ranges by percentile hold.
    #[arg(long, value_name = "PERCENT", default_value_t = 99.99)]
    percentile: f64,

    /// Samples of `[data.train]` to look at, drawn by the seed.
    #[arg(long, value_name = "N", default_value_t = 512)]
    samples: u64,

    /// Leave nodes of this name in float (`*` any text, `?` one character). Repeat for more.
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,

    /// One scale for all weights of a layer, instead of one for each output channel.
    #[arg(long)]
    per_tensor: bool,

    /// Weights in 7 bits, for processors that add products of bytes in 16 bits.
    #[arg(long)]
    reduce_range: bool,

    /// Choose scales of weights by the least squared error.
    #[arg(long)]
    mse_weights: bool,

    /// Equalize the ranges of channels between layers first.
    #[arg(long)]
    equalize: bool,

    /// Let biases take up the mean error of their layers; for `static`.
    #[arg(long)]
    bias_correction: bool,

    /// Move outliers of values into weights first, as SmoothQuant does; for `static` and `dynamic`.
    #[arg(long)]
    smooth: bool,

    /// Protect the weights whose inputs are large and cut ranges, as AWQ does; for `weight-only`.
    #[arg(long)]
    awq: bool,

    /// How weights are rounded.
    #[arg(long, value_enum, value_name = "METHOD", default_value_t = Rounding::Nearest)]
    rounding: Rounding,

    /// Then train so many steps with the rounding in the loop, as the recipe says but at a tenth of its learning rate,
    /// with the model of floats as the teacher; for `static`.
    #[arg(long, value_name = "STEPS")]
    aware: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Values and weights as integers, with ranges from data.
    Static,
    /// Weights as integers, values quantized as they come: no data needed.
    Dynamic,
    /// Weights as integers, values as they are: no data needed.
    WeightOnly,
    /// Half precision, but for inputs, outputs and what would lose by it.
    #[value(name = "float16")]
    Float16,
    /// Half precision with the range of single precision.
    #[value(name = "bfloat16")]
    BFloat16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Activations {
    U8,
    I8,
    I16,
    U16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Calibration {
    /// From the least value to the greatest.
    MinMax,
    /// All but the outermost values.
    Percentile,
    /// Where codes tell most about the distribution.
    Entropy,
    /// Where codes lose least in the mean of squares.
    Mse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Rounding {
    /// To the nearest code.
    Nearest,
    /// Column by column, errors fed back into the columns that follow; needs data.
    Gptq,
    /// Up or down, learned layer by layer; needs data.
    Adaround,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    args.check()?;
    let stages = args.data.as_ref().map(|recipe| Stages::open(context, recipe)).transpose()?;
    let store = context.store()?;
    let loaded = model::load(&args.model)?;
    let seed = stages.as_ref().map_or(context.seed.unwrap_or(0), |s| s.seed);
    let settings = args.settings(&loaded.model.graph, context.threads, seed)?;
    if settings.needs_data() && stages.is_none() {
        let message = format!("`--mode {}` with these options needs data: give `--data RECIPE`", name(args.mode));
        return Err(Failure::new(Kind::Usage, message));
    }
    // Opened first, so that a mistake in it does not show after the work.
    let test = match &stages {
        Some(stages) => stages.loaded.recipe.data.test.as_ref().map(|c| stages.data("test", c)).transpose()?,
        None => None,
    };
    let before = import(&store, &loaded.model)?;
    let start_ns = context.clock.monotonic_ns();
    let mut parents = vec![before.digest];
    let mut made = match &stages {
        Some(stages) if needs_batches(&settings) => {
            let data = stages.data("train", &stages.loaded.recipe.data.train)?;
            parents.push(data.digest);
            let calibration = Calibrating::new(args, context, stages, &data, &loaded.model.graph, seed)?;
            let batches = || calibration.batches();
            quantize(&CpuEngine::new(context.threads)?, &loaded.model.graph, &settings, Some(&batches))?
        }
        _ => quantize(&CpuEngine::new(context.threads)?, &loaded.model.graph, &settings, None)?,
    };
    if let (Some(steps), Some(stages), Form::Static(form)) = (args.aware, &stages, &settings.form) {
        let data = stages.data("train", &stages.loaded.recipe.data.train)?;
        let moved = args.equalize || args.smooth || args.awq;
        let from_codes = moved || args.bias_correction || args.rounding != Rounding::Nearest;
        let graphs = (&loaded.model.graph, &made.graph);
        made.graph = aware::train(steps, context, stages, &data, graphs, &form.scheme, from_codes)?;
    }
    let elapsed_ns = context.clock.monotonic_ns() - start_ns;
    let model = Model { graph: made.graph.clone(), ..loaded.model.clone() };
    let bytes = model::encode(&model)?;
    let artifact = store.put(&origin("quantized", args.recipe(seed), parents), bytes.clone(), Map::new())?;
    let after = Network { model, digest: artifact.digest, size_bytes: bytes.len() as u64 };
    let mut metrics = None;
    if let (Some(stages), Some(test)) = (&stages, &test) {
        let (float, _) = stages.evaluate("test", &before, test)?;
        let (quantized, _) = stages.evaluate("test", &after, test)?;
        metrics = Some((float, quantized));
    }
    output::write(&args.output, &bytes)?;
    Ok(answer(args, &before, &after, &made, metrics.as_ref(), elapsed_ns))
}

impl Args {
    /// Refuses options that the mode would leave without effect.
    fn check(&self) -> Result<(), Failure> {
        let given = [
            ("--activations", self.activations.is_some(), &[Mode::Static][..]),
            ("--symmetric", self.symmetric, &[Mode::Static]),
            ("--calibration", self.calibration.is_some(), &[Mode::Static]),
            ("--bias-correction", self.bias_correction, &[Mode::Static]),
            ("--aware", self.aware.is_some(), &[Mode::Static]),
            ("--bits", self.bits.is_some(), &[Mode::WeightOnly]),
            ("--block", self.block.is_some(), &[Mode::WeightOnly]),
            ("--per-tensor", self.per_tensor, &[Mode::Static, Mode::Dynamic]),
            ("--reduce-range", self.reduce_range, &[Mode::Static, Mode::Dynamic]),
            ("--mse-weights", self.mse_weights, &[Mode::Static, Mode::Dynamic, Mode::WeightOnly]),
            ("--smooth", self.smooth, &[Mode::Static, Mode::Dynamic]),
            ("--awq", self.awq, &[Mode::WeightOnly]),
            ("--rounding", self.rounding != Rounding::Nearest, &[Mode::Static, Mode::WeightOnly]),
        ];
        match given.iter().find(|(_, is_given, modes)| *is_given && !modes.contains(&self.mode)) {
            None => Ok(()),
            Some((option, _, modes)) => {
                let modes: Vec<&str> = modes.iter().map(|m| name(*m)).collect();
                let message = format!(
                    "`{option}` has no effect with `--mode {}`; it is for {}",
                    name(self.mode),
                    modes.join(", ")
                );
                Err(Failure::new(Kind::Usage, message))
            }
        }
    }

    /// What determines the result, beside the model and the data.
    fn recipe(&self, seed: u64) -> Value {
        let word = |v: Option<clap::builder::PossibleValue>| v.map(|v| v.get_name().to_owned());
        json!({
            "mode": name(self.mode), "seed": seed, "samples": self.samples, "exclude": self.exclude,
            "activations": self.activations.and_then(|a| word(a.to_possible_value())), "symmetric": self.symmetric,
            "bits": self.bits, "block": self.block, "percentile": self.percentile,
            "calibration": self.calibration.and_then(|c| word(c.to_possible_value())),
            "per_tensor": self.per_tensor, "reduce_range": self.reduce_range, "mse_weights": self.mse_weights,
            "equalize": self.equalize, "bias_correction": self.bias_correction, "aware": self.aware,
            "smooth": self.smooth, "awq": self.awq, "rounding": word(self.rounding.to_possible_value()),
        })
    }

    fn settings(&self, graph: &Graph, threads: usize, seed: u64) -> Result<Settings, Failure> {
        let exclude = excluded(graph, &self.exclude)?;
        let weight_scale = if self.mse_weights { WeightScale::Mse } else { WeightScale::MaxAbs };
        let activations = match self.activations.unwrap_or(Activations::U8) {
            Activations::U8 => DType::U8,
            Activations::I8 => DType::I8,
            Activations::I16 => DType::I16,
            Activations::U16 => DType::U16,
        };
        let scheme = Scheme {
            activations,
            symmetric_activations: self.symmetric,
            per_channel: !self.per_tensor,
            reduce_range: self.reduce_range,
            weight_scale,
            exclude: exclude.clone(),
            ..Scheme::default()
        };
        let form = match self.mode {
            Mode::Static => Form::Static(StaticForm {
                calibration: match self.calibration.unwrap_or(Calibration::MinMax) {
                    Calibration::MinMax => Method::MinMax,
                    Calibration::Percentile => Method::Percentile(self.percentile),
                    Calibration::Entropy => Method::Entropy,
                    Calibration::Mse => Method::Mse { bits: activations.bits().unwrap_or(8) as u32 },
                },
                scheme,
                bias_correction: self.bias_correction,
            }),
            Mode::Dynamic => Form::Dynamic(scheme),
            Mode::WeightOnly => {
                let (bits, block) = (self.bits.unwrap_or(8), self.block.unwrap_or(64));
                Form::WeightOnly(WeightOnly { bits, block, weight_scale, exclude })
            }
            Mode::Float16 => Form::Half(Half { dtype: DType::F16, exclude }),
            Mode::BFloat16 => Form::Half(Half { dtype: DType::BF16, exclude }),
        };
        let rounding = match self.rounding {
            Rounding::Nearest => rounding::Method::Nearest,
            Rounding::Gptq => rounding::Method::Gptq(GptqOptions::default()),
            Rounding::Adaround => rounding::Method::AdaRound(AdaRoundOptions::default()),
        };
        let observe = ObserveOptions { threads, key: Key::new(seed).child("rounding"), ..ObserveOptions::default() };
        let factors = match (self.smooth, self.awq) {
            (true, _) => Some(Factors::Smooth { input_levels: 1 << activations.bits().unwrap_or(8) }),
            (false, true) => Some(Factors::Awq),
            (false, false) => None,
        };
        Ok(Settings { form, equalize: self.equalize, factors, clip: self.awq, rounding, observe })
    }
}

/// Labels of the nodes that patterns match, by name or by label, as they are called when the network is quantized.
fn excluded(graph: &Graph, patterns: &[String]) -> Result<BTreeSet<String>, Failure> {
    let mut prepared = graph.clone();
    prepare(&mut prepared).map_err(|e| Failure::of(Kind::Unsupported, &e))?;
    let mut excluded = BTreeSet::new();
    for pattern in patterns {
        let nodes = prepared.nodes().map(|(_, node)| (node.label(&prepared), node.name.clone()));
        let found: Vec<String> =
            nodes.filter(|(label, name)| matches(pattern, label) || matches(pattern, name)).map(|(l, _)| l).collect();
        if found.is_empty() {
            let labels: Vec<String> = prepared.nodes().map(|(_, node)| node.label(&prepared)).collect();
            let near = updraft_base::nearest(pattern, labels.iter().map(String::as_str));
            let near = near.map(|n| format!(", did you mean `{n}`?")).unwrap_or_default();
            return Err(Failure::new(Kind::Usage, format!("no node is called like `{pattern}`{near}")));
        }
        excluded.extend(found);
    }
    Ok(excluded)
}

/// Whether data changes the result.
fn needs_batches(settings: &Settings) -> bool {
    settings.needs_data() || matches!(&settings.form, Form::Half(half) if half.dtype == DType::F16)
}

/// Some samples of the training data, as often as they are asked for.
struct Calibrating<'a> {
    context: &'a Context<'a>,
    loader: Loader,
    samples: u64,
}

impl<'a> Calibrating<'a> {
    fn new(
        args: &Args,
        context: &'a Context<'a>,
        stages: &Stages,
        data: &crate::stage::Data,
        graph: &Graph,
        seed: u64,
    ) -> Result<Calibrating<'a>, Failure> {
        if args.samples == 0 {
            return Err(Failure::new(Kind::Usage, "`--samples` is 0, expected at least 1"));
        }
        // A network for one number of samples gets as many.
        let fixed = model::inputs(graph).into_iter().find_map(|v| graph.shape(v)?.first()?.known());
        // Few enough that what the network makes of them fits the memory of small machines.
        const BATCH: u64 = 2;
        let batch = stages.loaded.recipe.evaluate.batch.min(args.samples.min(BATCH) as usize).max(1);
        let options = LoaderOptions {
            batch_size: fixed.unwrap_or(batch),
            seed,
            shuffle: Shuffle::Global,
            threads: context.threads.min(2),
            ..LoaderOptions::default()
        };
        let loader = Loader::new(data.dataset.clone(), options)?;
        Ok(Calibrating { context, loader, samples: args.samples })
    }

    fn batches(&self) -> Result<Box<dyn Iterator<Item = Result<Batch, CompressError>> + '_>, CompressError> {
        let steps = self.samples.div_ceil(self.loader.batch_size() as u64).min(self.loader.steps_per_epoch());
        let mut task = Some(self.context.progress.task("calibrate", steps, "batches"));
        let mut left = self.samples;
        let batches = self.loader.batches(0..steps)?.map(move |batch| {
            let mut batch = batch?;
            batch.samples.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= batch.samples.len() as u64;
            if let Some(task) = &task {
                task.at(batch.step + 1, String::new);
            }
            if batch.step + 1 == steps
                && let Some(task) = task.take()
            {
                task.finish();
            }
            Ok(batch)
        });
        Ok(Box::new(batches))
    }
}

fn origin(kind: &str, recipe: Value, parents: Vec<Digest>) -> Origin {
    let versions = [("updraft".to_owned(), env!("CARGO_PKG_VERSION").to_owned())].into();
    Origin { kind: kind.to_owned(), recipe, parents, versions }
}

/// The model before, as an artifact.
fn import(store: &Store, model: &Model) -> Result<Network, Failure> {
    let bytes = model::encode(model)?;
    let size_bytes = bytes.len() as u64;
    let artifact =
        store.put(&origin("network", json!({ "onnx": Digest::of(&bytes) }), Vec::new()), bytes, Map::new())?;
    Ok(Network { model: model.clone(), digest: artifact.digest, size_bytes })
}

fn name(mode: Mode) -> &'static str {
    match mode {
        Mode::Static => "static",
        Mode::Dynamic => "dynamic",
        Mode::WeightOnly => "weight-only",
        Mode::Float16 => "float16",
        Mode::BFloat16 => "bfloat16",
    }
}

fn answer(
    args: &Args,
    before: &Network,
    after: &Network,
    made: &Quantized,
    metrics: Option<&(Metrics, Metrics)>,
    elapsed_ns: u64,
) -> Answer {
    let form = |d: &Decision| if d.quantized { name(args.mode) } else { "float" };
    let rows: Vec<Vec<String>> =
        made.decisions.iter().map(|d| vec![d.node.clone(), form(d).to_owned(), d.reason.clone()]).collect();
    let mut text = table(&["node", "form", "how, or why not"], &[], &rows);
    for refusal in &made.refusals {
        text.push_str(&format!("left alone: {}: {}\n", refusal.node, refusal.reason));
    }
    let quantized = made.decisions.iter().filter(|d| d.quantized).count();
    let share = 100.0 * after.size_bytes as f64 / before.size_bytes.max(1) as f64;
    let mut rows = vec![
        vec!["nodes".to_owned(), made.decisions.len().to_string(), format!("{quantized} {}", name(args.mode))],
        vec![
            "bytes".to_owned(),
            units::bytes(before.size_bytes),
            format!("{} ({share:.1} %)", units::bytes(after.size_bytes)),
        ],
    ];
    if let Some((float, quantized)) = metrics {
        rows.push(vec!["loss".to_owned(), format!("{:.4}", float.loss), format!("{:.4}", quantized.loss)]);
        let mut push = |what: &str, a: Option<f64>, b: Option<f64>, show: fn(f64) -> String| {
            if let (Some(a), Some(b)) = (a, b) {
                rows.push(vec![what.to_owned(), show(a), show(b)]);
            }
        };
        push("accuracy", float.accuracy, quantized.accuracy, |a| format!("{:.2} %", 100.0 * a));
        push("perplexity", float.perplexity, quantized.perplexity, |p| format!("{p:.3}"));
    }
    text.push('\n');
    text.push_str(&table(&["", "before", "after"], &[], &rows));
    text.push_str(&format!("{} in {}\n{}\n", args.output.display(), units::duration_ns(elapsed_ns), after.digest));
    let decisions: Vec<Value> = (made.decisions.iter())
        .map(|d| json!({ "node": d.node, "operator": d.op, "form": form(d), "reason": d.reason }))
        .collect();
    let refusals: Vec<Value> = made.refusals.iter().map(|r| json!({ "node": r.node, "reason": r.reason })).collect();
    let ranges: Map<String, Value> =
        made.ranges.iter().map(|(name, r)| (name.clone(), json!([r.min, r.max]))).collect();
    let json = json!({
        "file": args.output, "mode": name(args.mode), "digest": after.digest, "elapsed_ns": elapsed_ns,
        "before": { "digest": before.digest, "size_bytes": before.size_bytes, "metrics": metrics.map(|m| &m.0) },
        "after": { "digest": after.digest, "size_bytes": after.size_bytes, "metrics": metrics.map(|m| &m.1) },
        "decisions": decisions, "left_alone": refusals, "ranges": ranges,
    });
    Answer { text, json }
}
