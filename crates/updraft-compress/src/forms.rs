//! From a candidate to its graph.
//!
//! How numbers get another form is [`quantize`]'s business; here candidates become its settings, and
//! what forms of one model have in common is done once: a search makes dozens of them.

use std::collections::{BTreeMap, BTreeSet};

use updraft_base::{Clock, Digest, Key};
use updraft_data::{Batch, Loader};
use updraft_engine::Engine;
use updraft_graph::{DType, Graph};
use updraft_passes::distill::Distillation;
use updraft_passes::loss::Loss;
use updraft_passes::prune::sparse;
use updraft_passes::quantize::rounding::{AdaRoundOptions, GptqOptions, Layer, layers};
use updraft_passes::quantize::{Half, Range, Scheme, WeightOnly, WeightScale, observed};
use updraft_passes::training::TrainingOptions;
use updraft_store::Store;
use updraft_train::{Event, Observer};

use crate::calibrate::Method;
use crate::candidate::{Calibrator, Candidate, Form, Pruning, Rounding, StaticForm, WeightForm};
use crate::distill::{Tuning, train_quantized};
use crate::error::CompressError;
use crate::layers::ObserveOptions;
use crate::prune::{self, Recovery};
use crate::quantize::{self, Prepared, Settings};
use crate::rounding;
use crate::search::Decision;
use crate::smoothing::Factors;
use crate::splits::Split;

/// What static forms of a model share, by the model and by whether it is equalized and smoothed.
pub(crate) type Grounds = BTreeMap<(Digest, bool, bool), Ground>;

/// A model prepared for quantization, and what calibration saw of it.
pub(crate) struct Ground {
    prepared: Prepared,
    ranges: BTreeMap<Calibrator, BTreeMap<String, Range>>,
}

/// What candidates are made with.
pub(crate) struct Material<'a> {
    pub(crate) engine: &'a dyn Engine,
    pub(crate) store: &'a Store,
    pub(crate) clock: &'a dyn Clock,
    /// The teacher of what is trained.
    pub(crate) original: &'a Graph,
    pub(crate) calibration: &'a Split,
    pub(crate) training: &'a TrainingOptions,
    pub(crate) train_loader: &'a Loader,
    pub(crate) recovery_rate: f64,
    pub(crate) seed: u64,
    /// When the time is over, by the clock.
    pub(crate) deadline_ns: u64,
    pub(crate) grounds: &'a mut Grounds,
}

/// What training with the rounding in the loop takes of the rate of recovery from pruning: weights are where they should
/// be, but for the rounding, and normalisation, which lets a network bear large steps, is folded into them.
pub(crate) const AWARE_RATE_SHARE: f64 = 0.1;

/// The norm that gradients of such training are clipped to, where the recipe names none.
pub(crate) const AWARE_CLIP_NORM: f32 = 1.0;

/// Operations that learned rounding may take: about two minutes of a core. A bound on the clock would make what is tried
/// hang on the machine.
const LEARNING_OPERATIONS_MAX: f64 = 5e12;

/// The graph of a candidate, made of the model that it is a form of, or that it prunes; and what became of its nodes.
pub(crate) fn make(
    material: &mut Material,
    base: &Graph,
    base_digest: Digest,
    candidate: &Candidate,
) -> Result<(Graph, Vec<Decision>), CompressError> {
    match (&candidate.form, &candidate.pruning) {
        (Form::Float, Some(pruning)) => pruned(material, base, pruning),
        (Form::Float, None) => Ok((base.clone(), Vec::new())),
        (Form::Sparse { kept, of }, _) => with_zeros(base, *kept, *of),
        (Form::Static(form), _) => integers(material, base, base_digest, form),
        (form, _) => other_numbers(material, base, form),
    }
}

/// Channels are removed, and what is left learns from the original.
fn pruned(material: &Material, base: &Graph, pruning: &Pruning) -> Result<(Graph, Vec<Decision>), CompressError> {
    let tuning = material.tuning(pruning.recovery_steps, material.recovery_rate);
    let teacher = material.teacher();
    let recovery = Recovery { tuning: &tuning, distillation: teacher.as_ref() };
    let settings = prune::Settings { seed: material.seed, ..prune::Settings::structured(pruning.ratio) };
    let (graph, report) = prune::prune(base, &settings, Some(&recovery), &mut material.watch())?;
    let mut decisions: Vec<Decision> = report
        .groups
        .iter()
        .map(|group| Decision {
            unit: group.name.clone(),
            form: format!("{} of {} channels", group.after, group.before),
            reason: if group.after < group.before {
                "the others had the smallest weights".to_owned()
            } else {
                "too few channels to remove any".to_owned()
            },
        })
        .collect();
    decisions.extend(report.refused.iter().map(|refused| Decision {
        unit: refused.name.clone(),
        form: "all channels".to_owned(),
        reason: refused.reason.clone(),
    }));
    Ok((graph, decisions))
}

/// The smallest weights of all neighbours become zeros; nothing is trained.
fn with_zeros(base: &Graph, kept: usize, of: usize) -> Result<(Graph, Vec<Decision>), CompressError> {
    let mut graph = base.clone();
    let settings = sparse::Settings {
        pattern: sparse::Pattern::Of { n: kept, m: of },
        scope: updraft_passes::prune::structured::Scope::Local,
        exclude: Vec::new(),
    };
    let masks = sparse::choose(&graph, &settings, &BTreeMap::new())?;
    sparse::apply(&mut graph, &masks)?;
    let decide = |unit: &String| Decision {
        unit: unit.clone(),
        form: format!("{kept}:{of} sparse"),
        reason: "the smallest of all neighbours are zeros".to_owned(),
    };
    Ok((graph, masks.keys().map(decide).collect()))
}

/// Integers throughout, trained as such where that is asked.
fn integers(
    material: &mut Material,
    base: &Graph,
    base_digest: Digest,
    form: &StaticForm,
) -> Result<(Graph, Vec<Decision>), CompressError> {
    let settings = static_settings(form, material.seed);
    let key = (base_digest, form.equalized, form.smoothed);
    if !material.grounds.contains_key(&key) {
        // Forms of one model are made in a row, so those of models before it are not asked for again.
        material.grounds.retain(|(digest, ..), _| *digest == base_digest);
        let ground = Ground::new(material, base, form)?;
        material.grounds.insert(key, ground);
    }
    let missing =
        || CompressError::Setting { setting: "calibrator", problem: format!("{:?} gave no ranges", form.calibrator) };
    let ground = material.grounds.get(&key).ok_or_else(missing)?;
    if form.rounding == Rounding::Learned {
        check_learning(&ground.prepared.graph)?;
    }
    let ranges = ground.ranges.get(&form.calibrator).ok_or_else(missing)?.clone();
    let (batches, watch) = (|| material.batches(), material.watch());
    let made = ground.prepared.quantized(material.engine, &settings, Some(&batches), ranges, &|| watch.is_over())?;
    let name = if form.wide { "int8, values in 16 bits" } else { "int8" };
    let decisions = decisions(made.decisions, name);
    if form.aware_steps == 0 {
        return Ok((made.graph, decisions));
    }
    let clip_norm = material.training.clip_norm.or(Some(AWARE_CLIP_NORM));
    let options = TrainingOptions { clip_norm, ..material.training.clone() };
    let tuning = material.tuning(form.aware_steps, AWARE_RATE_SHARE * material.recovery_rate);
    let tuning = Tuning { options: &options, ..tuning };
    // Codes that were chosen with care are a better start than floats that would be rounded anew.
    let float = (form.rounding == Rounding::Nearest).then_some(&ground.prepared.graph);
    let levels = match form.reduced_range {
        true => Some(
            scheme(form)
                .weight_levels()
                .map_err(|e| CompressError::Setting { setting: "weights", problem: e.to_string() })?,
        ),
        false => None,
    };
    let teacher = material.teacher();
    let trained = train_quantized(&tuning, &made.graph, float, levels, teacher.as_ref(), &mut material.watch())?;
    Ok((trained.graph, decisions))
}

/// Refuses to learn the rounding of networks that would take a search's time for it.
fn check_learning(graph: &Graph) -> Result<(), CompressError> {
    let steps = AdaRoundOptions::default().steps as f64;
    let weights = |layer: &Layer| graph.find(&layer.weights).and_then(|v| graph.value(v).constant());
    let (found, _) = layers(graph)?;
    // A step multiplies the weights with the second moments of their inputs.
    let work = |layer: &Layer| weights(layer).map_or(0.0, |w| 2.0 * steps * w.len() as f64 * layer.columns() as f64);
    let operations: f64 = found.iter().map(work).sum();
    if operations <= LEARNING_OPERATIONS_MAX {
        return Ok(());
    }
    let reason = format!("it would take {operations:.1e} operations, more than {LEARNING_OPERATIONS_MAX:.0e}");
    Err(CompressError::LeftOut { what: "learned rounding", reason })
}

/// Numbers in another form, values as they are or as they come.
fn other_numbers(material: &Material, base: &Graph, form: &Form) -> Result<(Graph, Vec<Decision>), CompressError> {
    let plain = |form| Settings {
        form,
        equalize: false,
        factors: None,
        clip: false,
        rounding: rounding::Method::Nearest,
        observe: observe_options(material.seed),
    };
    let (settings, name) = match form {
        Form::Half => (plain(quantize::Form::Half(Half { dtype: DType::F16, exclude: BTreeSet::new() })), "float16"),
        Form::WeightOnly(form) => (weight_settings(form, plain), "integer weights"),
        _ => (plain(quantize::Form::Dynamic(Scheme::default())), "int8"),
    };
    let (batches, watch) = (|| material.batches(), material.watch());
    let made = quantize::quantize_until(material.engine, base, &settings, Some(&batches), &|| watch.is_over())?;
    Ok((made.graph, decisions(made.decisions, name)))
}

impl Ground {
    /// Runs the calibration data through the model once more for each way to prepare it. All calibrators read the same
    /// histograms, and which units are in float makes no difference to the values of the others.
    fn new(material: &Material, base: &Graph, form: &StaticForm) -> Result<Ground, CompressError> {
        // Only what the ground is kept by may decide it, or a resumed search would find another one.
        let form = StaticForm {
            equalized: form.equalized,
            smoothed: form.smoothed,
            ..StaticForm::plain(Calibrator::MinMax, form.symmetric)
        };
        let settings = static_settings(&form, material.seed);
        let batches = || material.batches();
        let prepared = Prepared::new(material.engine, base, &settings, Some(&batches))?;
        if form.smoothed && prepared.folded == 0 {
            let reason = match prepared.refusals.iter().find(|r| r.reason.starts_with("smooth")) {
                Some(refusal) => format!("{}: {}", refusal.node, refusal.reason),
                None => "no matrix product follows what could take factors up".to_owned(),
            };
            return Err(CompressError::LeftOut { what: "smoothing", reason });
        }
        // Which values are between integers depends on the units, so all that any choice of units could need.
        let values = observed(&prepared.graph, &scheme(&form))?;
        let observer = prepared.observe(material.engine, &values, &batches, 1, None)?;
        let ranges = Calibrator::ALL.map(|calibrator| Ok((calibrator, observer.ranges(method(calibrator))?)));
        let ranges = ranges.into_iter().collect::<Result<_, CompressError>>()?;
        Ok(Ground { prepared, ranges })
    }
}

impl<'a> Material<'a> {
    /// The calibration data, as long as there is time.
    fn batches(&self) -> Result<Box<dyn Iterator<Item = Result<Batch, CompressError>> + '_>, CompressError> {
        let batches = self.calibration.batches(0)?;
        Ok(Box::new(
            batches.map(|batch| if self.watch().is_over() { Err(CompressError::TimeLimit) } else { Ok(batch?) }),
        ))
    }

    fn tuning(&self, steps: u64, learning_rate: f64) -> Tuning<'a> {
        Tuning {
            engine: self.engine,
            options: self.training,
            loader: self.train_loader,
            // The search split must not choose weights, or it would flatter what it is to judge.
            validation: None,
            steps,
            learning_rate,
            seed: self.seed,
            store: self.store,
            clock: self.clock,
        }
    }

    /// The original as a teacher; none where the loss compares with one already, whose answers are in the data.
    fn teacher(&self) -> Option<Distillation> {
        let is_taught = matches!(self.training.loss, Loss::KullbackLeibler { .. });
        let output = self.training.output.clone();
        (!is_taught).then(|| Distillation { output, ..Distillation::new(self.original.clone()) })
    }

    fn watch(&self) -> Watch<'a> {
        Watch { clock: self.clock, deadline_ns: self.deadline_ns }
    }
}

fn static_settings(form: &StaticForm, seed: u64) -> Settings {
    let scheme = scheme(form);
    Settings {
        equalize: form.equalized,
        factors: form.smoothed.then(|| Factors::Smooth { input_levels: 1 << scheme.activations.bits().unwrap_or(8) }),
        clip: false,
        rounding: rounding_method(form.rounding),
        observe: observe_options(seed),
        form: quantize::Form::Static(quantize::StaticForm {
            scheme,
            calibration: method(form.calibrator),
            bias_correction: form.bias_corrected,
        }),
    }
}

fn weight_settings(form: &WeightForm, plain: impl Fn(quantize::Form) -> Settings) -> Settings {
    let options = WeightOnly {
        bits: u32::from(form.bits),
        block: form.block,
        weight_scale: WeightScale::Mse,
        exclude: BTreeSet::new(),
    };
    Settings {
        factors: form.protected.then_some(Factors::Awq),
        clip: form.protected,
        rounding: rounding_method(form.rounding),
        ..plain(quantize::Form::WeightOnly(options))
    }
}

fn observe_options(seed: u64) -> ObserveOptions {
    ObserveOptions { key: Key::new(seed).child("rounding"), ..ObserveOptions::default() }
}

fn scheme(form: &StaticForm) -> Scheme {
    let activations = match (form.wide, form.symmetric) {
        (false, false) => DType::U8,
        (false, true) => DType::I8,
        (true, false) => DType::U16,
        (true, true) => DType::I16,
    };
    Scheme {
        activations,
        symmetric_activations: form.symmetric,
        reduce_range: form.reduced_range,
        weight_scale: if form.mse_weights { WeightScale::Mse } else { WeightScale::MaxAbs },
        exclude: form.float_units.clone(),
        ..Scheme::default()
    }
}

fn method(calibrator: Calibrator) -> Method {
    match calibrator {
        Calibrator::MinMax => Method::MinMax,
        Calibrator::Percentile => Method::Percentile(99.99),
        Calibrator::Entropy => Method::Entropy,
        Calibrator::Mse => Method::Mse { bits: 8 },
    }
}

fn rounding_method(rounding: Rounding) -> rounding::Method {
    match rounding {
        Rounding::Nearest => rounding::Method::Nearest,
        Rounding::ErrorFeedback => rounding::Method::Gptq(GptqOptions::default()),
        Rounding::Learned => rounding::Method::AdaRound(AdaRoundOptions::default()),
    }
}

fn decisions(made: Vec<updraft_passes::quantize::Decision>, name: &str) -> Vec<Decision> {
    let of = |decision: updraft_passes::quantize::Decision| Decision {
        unit: decision.node,
        form: if decision.quantized { name } else { "float" }.to_owned(),
        reason: decision.reason,
    };
    made.into_iter().map(of).collect()
}

/// Watches for the end of the time.
struct Watch<'a> {
    clock: &'a dyn Clock,
    deadline_ns: u64,
}

impl Watch<'_> {
    fn is_over(&self) -> bool {
        self.clock.monotonic_ns() >= self.deadline_ns
    }
}

impl Observer for Watch<'_> {
    fn observe(&mut self, _: &Event) {}

    fn stops(&mut self) -> bool {
        self.is_over()
    }
}
