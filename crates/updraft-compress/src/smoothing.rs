//! Difficulty moved from a network's activations to its weights, as far as its data says that it pays.

use updraft_engine::Engine;
use updraft_graph::{Graph, Tensor};
use updraft_passes::Report;
use updraft_passes::quantize::rounding::smooth::{Judge, Site, awq_candidates, sites, smooth_candidates};
use updraft_passes::quantize::rounding::{Layer, RoundingError, layers};
use updraft_passes::quantize::{Quantizer, QuantizerError};

use crate::error::CompressError;
use crate::layers::{Batches, ObserveOptions, Observed, observe, share};

/// How factors of channels are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factors {
    /// SmoothQuant's: neither values nor weights are to have outliers. Values get so many codes.
    Smooth {
        /// Codes of a value.
        input_levels: u32,
    },
    /// AWQ's: weights with large inputs are to lose less. Values stay as they are.
    Awq,
}

impl Factors {
    /// What command lines and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Factors::Smooth { .. } => "smooth",
            Factors::Awq => "awq",
        }
    }

    fn choose(
        self,
        graph: &Graph,
        seen: &Observed,
        quantizer: &dyn Fn(&Layer, &Tensor) -> Result<Quantizer, QuantizerError>,
    ) -> Result<Option<Vec<f32>>, RoundingError> {
        // Sites have matrix products only, whose rows are in one group.
        let Some(moments) = seen.moments.first() else { return Ok(None) };
        let weights = |layer: &Layer| graph.find(&layer.weights).and_then(|v| graph.value(v).constant());
        let of_layers: Vec<(&Layer, &Tensor)> = seen.layers.iter().filter_map(|l| Some((*l, weights(l)?))).collect();
        let (candidates, input_levels) = match self {
            Factors::Awq => (awq_candidates(moments), None),
            Factors::Smooth { input_levels } => (smooth_candidates(moments, &of_layers)?, Some(input_levels)),
        };
        Judge { layers: of_layers, moments, quantizer, input_levels }.best(candidates)
    }
}

/// Folds factors into a graph that has been prepared for quantization, wherever they lessen the error of layers whose
/// weights get the codes of `quantizer`. The network's function stays but for rounding.
pub fn fold_factors(
    engine: &dyn Engine,
    graph: &mut Graph,
    batches: &Batches,
    factors: Factors,
    quantizer: &(dyn Fn(&Layer, &Tensor) -> Result<Quantizer, QuantizerError> + Sync),
    options: &ObserveOptions,
    report: &mut Report,
) -> Result<(), CompressError> {
    let (found, refusals) = layers(graph)?;
    let (sites, refused) = sites(graph, &found);
    report.refusals.extend(refusals.into_iter().chain(refused));
    let read: Vec<Layer> = sites.iter().flat_map(|site| site.layers.iter().cloned()).collect();
    let mut chosen: Vec<(&Site, Vec<f32>)> = Vec::new();
    observe(engine, graph, &read, batches, options, |sweep| {
        let mut work: Vec<(&Observed, Option<Vec<f32>>)> = sweep.iter().map(|seen| (seen, None)).collect();
        share(&mut work, options.threads, |(seen, best)| {
            let wrong =
                |e: RoundingError| CompressError::Layer { node: seen.layers[0].node.clone(), problem: e.to_string() };
            *best = factors.choose(graph, seen, quantizer).map_err(wrong)?;
            Ok(())
        })?;
        for (seen, best) in work {
            let site = sites.iter().find(|site| site.layers.iter().any(|layer| layer.id == seen.layers[0].id));
            let Some(site) = site else { continue };
            match best {
                Some(best) => chosen.push((site, best)),
                None => site.layers.iter().for_each(|l| report.refuse(graph, l.id, "no factors lessen its error")),
            }
        }
        Ok(())
    })?;
    for (site, best) in chosen {
        site.fold(graph, &best)?;
        let (least, greatest) = best.iter().fold((f32::MAX, 0f32), |(l, g), f| (l.min(*f), g.max(*f)));
        let labels: Vec<&str> = site.layers.iter().map(|layer| layer.node.as_str()).collect();
        report.change(format!("inputs of {} divided by {least:.3} to {greatest:.3}", labels.join(", ")));
    }
    Ok(())
}
