//! From a network of floats to one of smaller numbers, with what data must tell on the way.

use std::collections::BTreeMap;

use updraft_engine::{CompileOptions, Engine};
use updraft_graph::{DType, Graph, Tensor};
use updraft_passes::pipeline::Pipeline;
use updraft_passes::quantize::rounding::{Layer, layers};
use updraft_passes::quantize::{
    self, Decision, EQUALIZE, Half, Quantizer, QuantizerError, Range, RoundedWeights, Scheme, WeightOnly, bias_probe,
    correct_biases, insert, observed, prepare,
};
use updraft_passes::{PassError, Promise, Refusal};

use crate::calibrate::{self, Input, Observer};
use crate::error::CompressError;
use crate::layers::{Batches, ObserveOptions};
use crate::rounding::{self, IsOver, RoundingOptions, round_weights};
use crate::smoothing::{Factors, fold_factors};

/// What a network is to become.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// Integers throughout, with ranges from calibration.
    Static(StaticForm),
    /// Products of integers, with values quantized as they come.
    Dynamic(Scheme),
    /// Weights as codes, values as they are.
    WeightOnly(WeightOnly),
    /// Half the bits.
    Half(Half),
}

/// How a network comes to work on integers.
#[derive(Debug, Clone, PartialEq)]
pub struct StaticForm {
    /// Codes, and what stays float.
    pub scheme: Scheme,
    /// How ranges are chosen.
    pub calibration: calibrate::Method,
    /// Whether biases take up the mean error of their layers.
    pub bias_correction: bool,
}

/// What is asked beside the form.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What the network becomes.
    pub form: Form,
    /// Whether channels are equalized between layers first.
    pub equalize: bool,
    /// Factors of channels that are moved from values to weights first.
    pub factors: Option<Factors>,
    /// Whether ranges of weights are cut where that moves the outputs of their layer less.
    pub clip: bool,
    /// How weights are rounded, where they become codes that data does not decide.
    pub rounding: rounding::Method,
    /// How inputs of layers are looked at for that.
    pub observe: ObserveOptions,
}

/// A network in its new form.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// The network.
    pub graph: Graph,
    /// What became of each node that works on floats, in execution order.
    pub decisions: Vec<Decision>,
    /// What the steps before it left alone, and why.
    pub refusals: Vec<Refusal>,
    /// Ranges of values, where the form needed them.
    pub ranges: BTreeMap<String, Range>,
}

impl Settings {
    /// Whether data must be given.
    pub fn needs_data(&self) -> bool {
        matches!(self.form, Form::Static(_)) || self.rounding.needs_data() || self.factors.is_some() || self.clip
    }
}

/// Brings a network into a form. `batches` go through once for each thing that data must tell.
///
/// # Errors
/// No data where it is needed; a network that is quantized already; what calibration, the passes or the engine refuse.
pub fn quantize(
    engine: &dyn Engine,
    graph: &Graph,
    settings: &Settings,
    batches: Option<&Batches>,
) -> Result<Quantized, CompressError> {
    quantize_until(engine, graph, settings, batches, &|| false)
}

/// As [`quantize`], until time is over.
///
/// # Errors
/// [`CompressError::TimeLimit`] once the rounding of weights finds that it is, beside those of [`quantize`].
pub fn quantize_until(
    engine: &dyn Engine,
    graph: &Graph,
    settings: &Settings,
    batches: Option<&Batches>,
    is_over: &IsOver,
) -> Result<Quantized, CompressError> {
    if batches.is_none() && settings.needs_data() {
        let problem = "is needed to calibrate or to round weights, and none is given".to_owned();
        return Err(CompressError::Setting { setting: "data", problem });
    }
    let prepared = Prepared::new(engine, graph, settings, batches)?;
    let ranges = match (&settings.form, batches) {
        (Form::Static(form), Some(batches)) => {
            let values = observed(&prepared.graph, &form.scheme)?;
            let method = form.calibration;
            prepared.observe(engine, &values, batches, settings.observe.threads, Some(method))?.ranges(method)?
        }
        (Form::Half(form), Some(batches)) if form.dtype == DType::F16 => {
            let values = float_values(&prepared.graph);
            let method = calibrate::Method::MinMax;
            prepared.observe(engine, &values, batches, settings.observe.threads, Some(method))?.ranges(method)?
        }
        _ => BTreeMap::new(),
    };
    prepared.quantized(engine, settings, batches, ranges, is_over)
}

/// A network whose floats are still floats, brought to where they are easiest to quantize. Forms that prepare a network
/// alike can share it and what was observed of its values.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The network.
    pub graph: Graph,
    /// What was left alone on the way, and why.
    pub refusals: Vec<Refusal>,
    /// Places where factors were moved.
    pub folded: usize,
}

impl Prepared {
    /// Folds what folds, equalizes and moves factors as the settings say.
    pub fn new(
        engine: &dyn Engine,
        graph: &Graph,
        settings: &Settings,
        batches: Option<&Batches>,
    ) -> Result<Prepared, CompressError> {
        let mut prepared = Prepared { graph: graph.clone(), refusals: Vec::new(), folded: 0 };
        prepare(&mut prepared.graph)?;
        if settings.equalize {
            let mut pipeline = Pipeline::new(&mut prepared.graph);
            pipeline.run(EQUALIZE)?;
            prepared.refusals.extend(pipeline.finish().into_iter().flat_map(|report| report.refusals));
        }
        if let (Some(factors), Some(batches)) = (settings.factors, batches) {
            prepared.fold(engine, settings, factors, batches)?;
        }
        Ok(prepared)
    }

    /// Runs the network over the batches and counts the elements of `values`, or keeps of them what one method needs.
    pub fn observe(
        &self,
        engine: &dyn Engine,
        values: &[String],
        batches: &Batches,
        threads: usize,
        method: Option<calibrate::Method>,
    ) -> Result<Observer, CompressError> {
        let mut observer = Observer::new(engine, &self.graph, values, threads)?;
        if let Some(method) = method {
            observer = observer.for_method(method);
        }
        for batch in batches()? {
            observer.observe(&batch?)?;
        }
        Ok(observer)
    }

    /// The network in its new form; `ranges` are those of the values that the form observes.
    pub fn quantized(
        &self,
        engine: &dyn Engine,
        settings: &Settings,
        batches: Option<&Batches>,
        ranges: BTreeMap<String, Range>,
        is_over: &IsOver,
    ) -> Result<Quantized, CompressError> {
        let mut graph = self.graph.clone();
        let mut refusals = self.refusals.clone();
        let mut rounded = BTreeMap::new();
        match (&settings.form, batches) {
            (Form::Static(form), Some(batches)) => {
                let quantizer = |layer: &Layer, w: &Tensor| form.scheme.weight_quantizer(w, Some(layer.output_axis()));
                let exclude = &form.scheme.exclude;
                rounded = round(engine, &graph, settings, exclude, Some(batches), &quantizer, is_over, &mut refusals)?;
                if form.bias_correction {
                    let shifts = bias_shifts(engine, &graph, form, &ranges, &rounded, batches)?;
                    let mut pipeline = Pipeline::new(&mut graph);
                    pipeline
                        .apply("correct biases", Promise::Lossy, |g, r| correct_biases(g, &form.scheme, &shifts, r))?;
                }
            }
            (Form::WeightOnly(form), _) => {
                let quantizer =
                    |layer: &Layer, w: &Tensor| form.quantizer_of(layer.input_axis(), layer.output_axis(), w);
                rounded = round(engine, &graph, settings, &form.exclude, batches, &quantizer, is_over, &mut refusals)?;
            }
            _ => {}
        }
        let mut pipeline = Pipeline::new(&mut graph);
        let decisions = match &settings.form {
            Form::Static(form) => pipeline
                .apply("insert quantizers", Promise::Lossy, |g, r| insert(g, &form.scheme, &ranges, &rounded, r)),
            Form::Dynamic(scheme) => {
                pipeline.apply("quantize dynamically", Promise::Lossy, |g, r| quantize::dynamic(g, scheme, r))
            }
            Form::WeightOnly(form) => {
                pipeline.apply("quantize weights", Promise::Lossy, |g, r| quantize::weight_only(g, form, &rounded, r))
            }
            Form::Half(form) => {
                pipeline.apply("half precision", Promise::Lossy, |g, r| quantize::half(g, form, &ranges, r))
            }
        }?;
        Ok(Quantized { graph, decisions, refusals, ranges })
    }

    /// Moves factors of channels from values to weights; the layers where that was not done are listed, with the reason.
    fn fold(
        &mut self,
        engine: &dyn Engine,
        settings: &Settings,
        factors: Factors,
        batches: &Batches,
    ) -> Result<(), CompressError> {
        let quantizer = |layer: &Layer, w: &Tensor| match &settings.form {
            Form::Static(StaticForm { scheme, .. }) | Form::Dynamic(scheme) => {
                scheme.weight_quantizer(w, Some(layer.output_axis()))
            }
            Form::WeightOnly(form) => form.quantizer_of(layer.input_axis(), layer.output_axis(), w),
            Form::Half(form) => Err(QuantizerError::DType { dtype: form.dtype }),
        };
        let mut pipeline = Pipeline::new(&mut self.graph);
        // Weights are rounded twice more, as in folding batch normalisation.
        pipeline.apply(factors.name(), Promise::Within(1e-4), |graph, report| {
            let folded = fold_factors(engine, graph, batches, factors, &quantizer, &settings.observe, report);
            Ok::<_, PassError>(folded)
        })??;
        for report in pipeline.finish() {
            self.folded += report.changes.len();
            let refusals = report.refusals.into_iter();
            self.refusals
                .extend(refusals.map(|r| Refusal { reason: format!("{}: {}", factors.name(), r.reason), ..r }));
        }
        Ok(())
    }
}

/// Weights that are rounded with more care than to the nearest code, where that is asked for.
fn round(
    engine: &dyn Engine,
    graph: &Graph,
    settings: &Settings,
    exclude: &std::collections::BTreeSet<String>,
    batches: Option<&Batches>,
    quantizer: &(dyn Fn(&Layer, &Tensor) -> Result<Quantizer, QuantizerError> + Sync),
    is_over: &IsOver,
    refusals: &mut Vec<Refusal>,
) -> Result<BTreeMap<String, RoundedWeights>, CompressError> {
    if settings.rounding == rounding::Method::Nearest && !settings.clip {
        return Ok(BTreeMap::new());
    }
    let (mut layers, refused) = layers(graph)?;
    layers.retain(|layer| !exclude.contains(&layer.node));
    let options = RoundingOptions {
        method: settings.rounding,
        clip: settings.clip,
        quantizer,
        observe: settings.observe,
        is_over,
    };
    let none: &Batches = &|| Ok(Box::new(std::iter::empty()));
    let made = round_weights(engine, graph, &layers, batches.unwrap_or(none), &options)?;
    refusals.extend(refused);
    refusals.extend(made.refusals);
    Ok(made.weights)
}

/// By how much the bias of each layer, by label, is to move.
fn bias_shifts(
    engine: &dyn Engine,
    graph: &Graph,
    form: &StaticForm,
    ranges: &BTreeMap<String, Range>,
    rounded: &BTreeMap<String, RoundedWeights>,
    batches: &Batches,
) -> Result<BTreeMap<String, Vec<f64>>, CompressError> {
    let probe = bias_probe(graph, &form.scheme, ranges, rounded)?;
    if probe.layers.is_empty() {
        return Ok(BTreeMap::new());
    }
    let inputs = Input::all(&probe.graph);
    let mut session = engine.compile(&probe.graph, &CompileOptions::default())?;
    let mut sums: Vec<Vec<f64>> = vec![Vec::new(); probe.layers.len()];
    let mut samples = 0f64;
    for batch in batches()? {
        let batch = batch?;
        let tensors: Vec<Tensor> = inputs.iter().map(|input| input.of(&batch)).collect::<Result<_, _>>()?;
        let given: Vec<(&str, &Tensor)> = inputs.iter().map(|i| i.name.as_str()).zip(&tensors).collect();
        let means = session.run(&given)?;
        let rows = batch.samples.len() as f64;
        samples += rows;
        for (sum, pair) in sums.iter_mut().zip(means.chunks_exact(2)) {
            let numbers = |t: &Tensor| {
                let problem = |e: updraft_graph::TensorError| e.to_string();
                t.to_f64().map_err(|e| CompressError::Setting { setting: "bias", problem: problem(e) })
            };
            let (float, integer) = (numbers(&pair[0])?, numbers(&pair[1])?);
            sum.resize(float.len(), 0.0);
            sum.iter_mut().zip(float.iter().zip(&integer)).for_each(|(s, (f, i))| *s += rows * (f - i));
        }
    }
    let shifts = sums.into_iter().map(|sum| sum.into_iter().map(|s| s / samples.max(1.0)).collect());
    Ok(probe.layers.into_iter().zip(shifts).collect())
}

/// The values of single precision that nodes make or data gives.
fn float_values(graph: &Graph) -> Vec<String> {
    let made = graph.values().filter(|(v, value)| {
        let given = graph.inputs().contains(v) && value.constant().is_none();
        (given || value.producer().is_some()) && graph.dtype(*v) == Some(DType::F32)
    });
    made.map(|(_, value)| value.name.clone()).collect()
}
