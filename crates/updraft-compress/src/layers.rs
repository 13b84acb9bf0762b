//! What the inputs of layers look like over calibration data, batch by batch.
//!
//! The layers' inputs become outputs of a session, their rows go into [`Moments`], and nothing else of a batch is kept.
//! Moments take the square of a layer's inputs, so a large network is gone through in several sweeps over the data, each
//! with as many layers as the memory given can hold.

use std::collections::BTreeMap;

use updraft_base::random::Key;
use updraft_data::Batch;
use updraft_engine::{CompileOptions, Engine};
use updraft_graph::{Graph, Tensor};
use updraft_passes::quantize::rounding::{Layer, Moments, Samples};
use updraft_train::evaluate::select;

use crate::error::CompressError;

/// Calibration data that can be gone through more than once.
pub type Batches<'a> =
    dyn Fn() -> Result<Box<dyn Iterator<Item = Result<Batch, CompressError>> + 'a>, CompressError> + 'a;

/// How inputs of layers are looked at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ObserveOptions {
    /// The most rows that a layer gets from one batch; of more, as many are drawn.
    pub rows_per_batch: usize,
    /// Bytes that the moments of the layers of one sweep may take; one layer is always looked at.
    pub memory_bytes_max: u64,
    /// Threads that sum products, each for layers of its own.
    pub threads: usize,
    /// What rows are drawn by.
    pub key: Key,
}

impl Default for ObserveOptions {
    fn default() -> ObserveOptions {
        ObserveOptions { rows_per_batch: 4096, memory_bytes_max: 1 << 30, threads: 1, key: Key::new(0) }
    }
}

/// Layers that read the same rows, and the moments of those rows, one for each group of the layers.
pub struct Observed<'a> {
    /// The layers.
    pub layers: Vec<&'a Layer>,
    /// Moments by group.
    pub moments: Vec<Moments>,
}

/// Goes through the batches and hands over what each sweep has seen.
///
/// # Errors
/// If a layer's input is not a tensor of `f32` in the shape that the layer reads, or holds a number that is none; or if
/// there are no batches.
pub fn observe(
    engine: &dyn Engine,
    graph: &Graph,
    layers: &[Layer],
    batches: &Batches,
    options: &ObserveOptions,
    mut each: impl FnMut(Vec<Observed>) -> Result<(), CompressError>,
) -> Result<(), CompressError> {
    let mut sites: Vec<Observed> = Vec::new();
    for layer in layers {
        match sites.iter_mut().find(|site| site.layers[0].reads_rows_of(layer)) {
            Some(site) => site.layers.push(layer),
            None => sites.push(Observed { layers: vec![layer], moments: Vec::new() }),
        }
    }
    let mut sites = sites.into_iter().peekable();
    while sites.peek().is_some() {
        let (mut sweep, mut bytes) = (Vec::new(), 0u64);
        while let Some(site) =
            sites.next_if(|site| sweep.is_empty() || bytes + cost_bytes(site) <= options.memory_bytes_max)
        {
            bytes += cost_bytes(&site);
            sweep.push(site);
        }
        go_through(engine, graph, &mut sweep, batches, options)?;
        each(sweep)?;
    }
    Ok(())
}

fn cost_bytes(site: &Observed) -> u64 {
    let layer = site.layers[0];
    Moments::bytes(layer.columns()).saturating_mul(layer.groups() as u64)
}

fn go_through(
    engine: &dyn Engine,
    graph: &Graph,
    sweep: &mut [Observed],
    batches: &Batches,
    options: &ObserveOptions,
) -> Result<(), CompressError> {
    let open = graph.inputs().iter().filter(|v| graph.value(**v).constant().is_none());
    let inputs: Vec<String> = open.map(|v| graph.value(*v).name.clone()).collect();
    // What a layer reads may be an input of the graph itself, which no session computes.
    let mut computed: Vec<String> = Vec::new();
    for site in sweep.iter_mut() {
        let layer = site.layers[0];
        site.moments = (0..layer.groups()).map(|_| Moments::new(layer.columns())).collect();
        if !inputs.contains(&layer.input) && !computed.contains(&layer.input) {
            computed.push(layer.input.clone());
        }
    }
    let mut observed = graph.clone();
    observed.set_outputs(computed.iter().filter_map(|name| observed.find(name)).collect());
    observed.prune().map_err(updraft_engine::EngineError::from)?;
    let mut session = match computed.is_empty() {
        true => None,
        false => Some(engine.compile(&observed, &CompileOptions::default())?),
    };
    let mut seen = 0u64;
    for batch in batches()? {
        let batch = batch?;
        let made = match &mut session {
            Some(session) => session.run(&select(&batch.tensors, &inputs)?)?,
            None => Vec::new(),
        };
        let mut values: BTreeMap<&str, &Tensor> = computed.iter().map(String::as_str).zip(&made).collect();
        values
            .extend(batch.tensors.iter().filter(|(name, _)| inputs.contains(name)).map(|(name, t)| (name.as_str(), t)));
        let padded = batch.tensors.iter().find_map(|(_, t)| t.shape().first().copied()).unwrap_or(0);
        let samples = Samples { real: batch.samples.len(), padded };
        let key = options.key.child_index(seen);
        share(sweep, options.threads, |site| add(site, &values, samples, options.rows_per_batch, &key))?;
        seen += 1;
    }
    if seen == 0 {
        return Err(CompressError::Setting { setting: "calibration data", problem: "has no batch".to_owned() });
    }
    Ok(())
}

fn add(
    site: &mut Observed,
    values: &BTreeMap<&str, &Tensor>,
    samples: Samples,
    rows_max: usize,
    key: &Key,
) -> Result<(), CompressError> {
    let layer = site.layers[0];
    let wrong = |problem: String| CompressError::Layer { node: layer.node.clone(), problem };
    let x = values.get(layer.input.as_str()).ok_or_else(|| wrong(format!("{:?} is not computed", layer.input)))?;
    let rows = layer.rows(x, samples, rows_max, &key.child(&layer.node)).map_err(|e| wrong(e.to_string()))?;
    for (moments, rows) in site.moments.iter_mut().zip(&rows) {
        moments.add(rows).map_err(|e| wrong(format!("input {:?}: {e}", layer.input)))?;
    }
    Ok(())
}

/// Does `work` for every item, on so many threads; each item is one thread's, so that results do not depend on how many
/// there are. The first item's error is returned.
pub(crate) fn share<T: Send>(
    items: &mut [T],
    threads: usize,
    work: impl Fn(&mut T) -> Result<(), CompressError> + Sync,
) -> Result<(), CompressError> {
    if threads <= 1 || items.len() <= 1 {
        return items.iter_mut().try_for_each(work);
    }
    let mut hands: Vec<Vec<&mut T>> = (0..threads).map(|_| Vec::new()).collect();
    items.iter_mut().enumerate().for_each(|(i, item)| hands[i % threads].push(item));
    let work = &work;
    std::thread::scope(|scope| {
        let running: Vec<_> =
            hands.into_iter().map(|hand| scope.spawn(move || hand.into_iter().try_for_each(work))).collect();
        let results: Vec<_> = running.into_iter().map(|thread| thread.join()).collect();
        results.into_iter().try_for_each(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
