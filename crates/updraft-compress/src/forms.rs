//! From a candidate to its graph.

use std::collections::{BTreeMap, BTreeSet};

use updraft_base::{Clock, Digest, Key};
use updraft_data::{Batch, Loader};
use updraft_engine::Engine;
use updraft_graph::{DType, Graph};
use updraft_passes::distill::Distillation;
use updraft_passes::pipeline::Pipeline;
use updraft_passes::quantize::rounding::GptqOptions;
use updraft_passes::quantize::{EQUALIZE, Half, Range, Scheme, WeightOnly, WeightScale, observed, prepare};
use updraft_passes::training::TrainingOptions;
use updraft_store::Store;
use updraft_train::{Event, Observer};

use crate::calibrate::{self, Method};
use crate::candidate::{Calibrator, Candidate, Form, Pruning, Rounding, StaticForm};
use crate::distill::Tuning;
use crate::error::CompressError;
use crate::layers::ObserveOptions;
use crate::prune::{self, Recovery};
use crate::quantize::{self, quantize_within};
use crate::rounding;
use crate::search::Decision;
use crate::splits::Split;

/// Ranges by the model they are of and whether it was equalized, and by calibrator.
pub(crate) type Ranges = BTreeMap<(Digest, bool), BTreeMap<Calibrator, BTreeMap<String, Range>>>;

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
    /// Whether the time is over.
    pub(crate) is_over: &'a dyn Fn() -> bool,
    pub(crate) ranges: &'a mut Ranges,
}

/// The graph of a candidate, made of the model that it is a form of, or that it prunes; and what became of its nodes.
pub(crate) fn make(
    material: &mut Material,
    base: &Graph,
    base_digest: Digest,
    candidate: &Candidate,
) -> Result<(Graph, Vec<Decision>), CompressError> {
    match (&candidate.form, &candidate.pruning) {
        (Form::Float, Some(pruning)) => pruned(material, base, pruning),
        (form, _) => formed(material, base, base_digest, form),
    }
}

/// Channels are removed, and what is left learns from the original.
fn pruned(material: &Material, base: &Graph, pruning: &Pruning) -> Result<(Graph, Vec<Decision>), CompressError> {
    let tuning = Tuning {
        engine: material.engine,
        options: material.training,
        loader: material.train_loader,
        // The search split must not choose weights, or it would flatter what it is to judge.
        validation: None,
        steps: pruning.recovery_steps,
        learning_rate: material.recovery_rate,
        seed: material.seed,
        store: material.store,
        clock: material.clock,
    };
    let teacher = Distillation::new(material.original.clone());
    let recovery = Recovery { tuning: &tuning, distillation: Some(&teacher) };
    let mut watch = Watch { is_over: material.is_over };
    let settings = prune::Settings { seed: material.seed, ..prune::Settings::structured(pruning.ratio) };
    let (graph, report) = prune::prune(base, &settings, Some(&recovery), &mut watch)?;
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

/// Numbers in another form.
fn formed(
    material: &mut Material,
    base: &Graph,
    base_digest: Digest,
    form: &Form,
) -> Result<(Graph, Vec<Decision>), CompressError> {
    let (target, name) = match form {
        Form::Float => return Ok((base.clone(), Vec::new())),
        Form::Half => (quantize::Form::Half(Half { dtype: DType::F16, exclude: BTreeSet::new() }), "float16"),
        Form::Dynamic => (quantize::Form::Dynamic(Scheme::default()), "int8"),
        Form::WeightOnly { bits, block } => {
            let options = WeightOnly {
                bits: u32::from(*bits),
                block: *block,
                weight_scale: WeightScale::Mse,
                exclude: BTreeSet::new(),
            };
            (quantize::Form::WeightOnly(options), "integer weights")
        }
        Form::Static(form) => {
            let form = quantize::StaticForm {
                scheme: scheme(form),
                calibration: method(form.calibrator),
                bias_correction: form.bias_corrected,
            };
            (quantize::Form::Static(form), "int8")
        }
    };
    let static_form = match form {
        Form::Static(form) => Some(form),
        _ => None,
    };
    let settings = quantize::Settings {
        factors: None,
        clip: false,
        form: target,
        equalize: static_form.is_some_and(|f| f.equalized),
        rounding: match static_form.map(|f| f.rounding) {
            Some(Rounding::ErrorFeedback) => rounding::Method::Gptq(GptqOptions::default()),
            _ => rounding::Method::Nearest,
        },
        observe: ObserveOptions { key: Key::new(material.seed).child("rounding"), ..ObserveOptions::default() },
    };
    let ranges = static_form.map(|form| ranges(material, base, base_digest, form)).transpose()?;
    let is_over = material.is_over;
    let batches = || -> Result<Box<dyn Iterator<Item = Result<Batch, CompressError>>>, CompressError> {
        let batches = material.calibration.batches(0)?;
        Ok(Box::new(batches.map(move |batch| if is_over() { Err(CompressError::TimeLimit) } else { Ok(batch?) })))
    };
    let made = quantize_within(material.engine, base, &settings, Some(&batches), ranges.as_ref())?;
    let decisions = made.decisions.into_iter().map(|decision| Decision {
        unit: decision.node,
        form: if decision.quantized { name } else { "float" }.to_owned(),
        reason: decision.reason,
    });
    Ok((made.graph, decisions.collect()))
}

fn scheme(form: &StaticForm) -> Scheme {
    Scheme {
        activations: if form.symmetric { DType::I8 } else { DType::U8 },
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

/// The ranges of a static form. The calibration data is run through once for a model, and once more for it equalized; all
/// calibrators read the same histograms, and which units are in float makes no difference to the values of the others.
fn ranges(
    material: &mut Material,
    base: &Graph,
    base_digest: Digest,
    form: &StaticForm,
) -> Result<BTreeMap<String, Range>, CompressError> {
    let key = (base_digest, form.equalized);
    if !material.ranges.contains_key(&key) {
        let mut graph = base.clone();
        prepare(&mut graph)?;
        if form.equalized {
            Pipeline::new(&mut graph).run(EQUALIZE)?;
        }
        // Which values are between integers depends on the units, so all that any choice of units could need.
        let values = observed(&graph, &Scheme { exclude: BTreeSet::new(), ..scheme(form) })?;
        let mut observer = calibrate::Observer::new(material.engine, &graph, &values, 1)?;
        for batch in material.calibration.batches(0)? {
            if (material.is_over)() {
                return Err(CompressError::TimeLimit);
            }
            observer.observe(&batch?)?;
        }
        let all = Calibrator::ALL.map(|calibrator| Ok((calibrator, observer.ranges(method(calibrator))?)));
        let all: BTreeMap<_, _> = all.into_iter().collect::<Result<_, CompressError>>()?;
        material.ranges.insert(key, all);
    }
    let found = material.ranges.get(&key).and_then(|all| all.get(&form.calibrator));
    found.cloned().ok_or_else(|| CompressError::Setting {
        setting: "calibrator",
        problem: format!("{:?} gave no ranges", form.calibrator),
    })
}

/// Watches training for the end of the time.
struct Watch<'a> {
    is_over: &'a dyn Fn() -> bool,
}

impl Observer for Watch<'_> {
    fn observe(&mut self, _: &Event) {}

    fn stops(&mut self) -> bool {
        (self.is_over)()
    }
}
