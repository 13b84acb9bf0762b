//! Rounds the weights of a network's layers with a look at their inputs.

use std::collections::BTreeMap;

use updraft_engine::Engine;
use updraft_graph::{Graph, Tensor};
use updraft_passes::Refusal;
use updraft_passes::quantize::rounding::{
    AdaRoundOptions, GptqOptions, Layer, Moments, RoundingError, adaround, clip_ranges, gptq, nearest, output_error,
};
use updraft_passes::quantize::{Quantizer, QuantizerError, RoundedWeights};

use crate::error::CompressError;
use crate::layers::{Batches, ObserveOptions, Observed, observe, share};

/// How weights become codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// Each to the code next to it.
    Nearest,
    /// One column after another, errors fed back into the columns that follow.
    Gptq(GptqOptions),
    /// Down or up, learned.
    AdaRound(AdaRoundOptions),
}

/// What is asked of the rounding of a network.
pub struct RoundingOptions<'a> {
    /// How weights become codes.
    pub method: Method,
    /// Whether ranges are cut first where that moves the layer's output less, as AWQ does.
    pub clip: bool,
    /// What codes there are: the quantizer of a layer's weights, in the shape in which the graph has them.
    pub quantizer: &'a (dyn Fn(&Layer, &Tensor) -> Result<Quantizer, QuantizerError> + Sync),
    /// How inputs are looked at.
    pub observe: ObserveOptions,
    /// Whether time is over; asked before each layer.
    pub is_over: &'a IsOver<'a>,
}

/// Whether time is over.
pub type IsOver<'a> = dyn Fn() -> bool + Sync + 'a;

/// Weights by name, rounded.
#[derive(Debug, Default)]
pub struct Rounding {
    /// What the layers' weights became.
    pub weights: BTreeMap<String, RoundedWeights>,
    /// Layers that were rounded to nearest instead, and why.
    pub refusals: Vec<Refusal>,
    /// By how much each layer's output moved.
    pub moved: Vec<Moved>,
}

/// The mean square by which a layer's output moves on the calibration data.
#[derive(Debug, Clone, PartialEq)]
pub struct Moved {
    /// The layer.
    pub node: String,
    /// With weights rounded to nearest.
    pub nearest: f64,
    /// With the weights as they were rounded.
    pub rounded: f64,
}

impl Method {
    /// Whether it looks at the inputs of layers.
    pub fn needs_data(&self) -> bool {
        matches!(self, Method::Gptq(_) | Method::AdaRound(_))
    }

    /// What command lines and reports call it.
    pub fn name(&self) -> &'static str {
        match self {
            Method::Nearest => "nearest",
            Method::Gptq(_) => "gptq",
            Method::AdaRound(_) => "adaround",
        }
    }

    fn round(&self, w: &Tensor, quantizer: &Quantizer, moments: &Moments) -> Result<RoundedWeights, RoundingError> {
        match self {
            Method::Gptq(options) => gptq(w, quantizer, moments, options),
            Method::AdaRound(options) => adaround(w, quantizer, moments, options),
            Method::Nearest => nearest(w, quantizer),
        }
    }
}

/// Rounds the weights of `layers`. Layers whose data has fewer rows than they have inputs are rounded to nearest: the
/// methods would fit them to what little was seen. Nothing is run where neither the method nor cutting ranges looks at
/// inputs.
pub fn round_weights(
    engine: &dyn Engine,
    graph: &Graph,
    layers: &[Layer],
    batches: &Batches,
    options: &RoundingOptions,
) -> Result<Rounding, CompressError> {
    let mut rounding = Rounding::default();
    if options.method.needs_data() || options.clip {
        observe(engine, graph, layers, batches, &options.observe, |sweep| rounding.add(graph, &sweep, options))?;
    } else {
        let unseen = |layer| Observed { layers: vec![layer], moments: Vec::new() };
        rounding.add(graph, &layers.iter().map(unseen).collect::<Vec<_>>(), options)?;
    }
    Ok(rounding)
}

/// One layer's weights on their way.
struct Job<'a> {
    layer: &'a Layer,
    moments: &'a [Moments],
    weights: &'a Tensor,
    rounded: Option<RoundedWeights>,
    refusal: Option<String>,
    moved: Option<Moved>,
}

impl Rounding {
    fn add(&mut self, graph: &Graph, seen: &[Observed], options: &RoundingOptions) -> Result<(), CompressError> {
        let mut jobs = Vec::new();
        for site in seen {
            for layer in &site.layers {
                let weights = graph.find(&layer.weights).and_then(|v| graph.value(v).constant()).ok_or_else(|| {
                    let problem = format!("{:?} is no initializer of the graph", layer.weights);
                    CompressError::Layer { node: layer.node.clone(), problem }
                })?;
                let moments = &site.moments;
                jobs.push(Job { layer, moments, weights, rounded: None, refusal: None, moved: None });
            }
        }
        share(&mut jobs, options.observe.threads, |job| {
            if (options.is_over)() {
                return Err(CompressError::TimeLimit);
            }
            job.run(options).map_err(|e| CompressError::Layer { node: job.layer.node.clone(), problem: e.to_string() })
        })?;
        for job in jobs {
            let node = job.layer.node.clone();
            self.refusals.extend(job.refusal.map(|reason| Refusal { node, reason }));
            self.weights.extend(job.rounded.map(|rounded| (job.layer.weights.clone(), rounded)));
            self.moved.extend(job.moved);
        }
        Ok(())
    }
}

impl Job<'_> {
    fn run(&mut self, options: &RoundingOptions) -> Result<(), RoundingError> {
        let (layer, method) = (self.layer, &options.method);
        let quantizer = (options.quantizer)(layer, self.weights)?;
        let rows = self.moments.iter().map(Moments::rows).min();
        let columns = layer.columns();
        self.refusal = rows.filter(|rows| *rows < columns as u64).map(|rows| {
            format!("rounded to nearest: the data has {rows} rows of inputs for it, of {columns} at least")
        });
        if self.refusal.is_some() {
            self.rounded = Some(layer.round(self.weights, &quantizer, |_, w, q| nearest(w, q))?);
            return Ok(());
        }
        let mut moved = Moved { node: layer.node.clone(), nearest: 0.0, rounded: 0.0 };
        let round = |g: usize, w: &Tensor, q: &Quantizer| {
            let Some(moments) = self.moments.get(g) else { return nearest(w, q) };
            let cut = if options.clip { clip_ranges(w, q, moments)? } else { q.clone() };
            let rounded = method.round(w, &cut, moments)?;
            let error = |r: &RoundedWeights| output_error(w, &r.quantizer.dequantize(&r.codes)?, moments);
            moved.nearest += error(&nearest(w, q)?)?;
            moved.rounded += error(&rounded)?;
            Ok(rounded)
        };
        self.rounded = Some(layer.round(self.weights, &quantizer, round)?);
        self.moved = rows.map(|_| moved);
        Ok(())
    }
}
