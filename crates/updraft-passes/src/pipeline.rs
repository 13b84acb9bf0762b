//! The ordered list of passes for each goal, and the checks between them.

use updraft_graph::check::check;
use updraft_graph::infer::infer;
use updraft_graph::upgrade::upgrade;
use updraft_graph::{Graph, UPDRAFT_DOMAIN};

use crate::affine::{FOLD_BATCH_NORM, MERGE_BIAS};
use crate::common::MERGE_COMMON;
use crate::distill::Purpose;
use crate::fold::FOLD_CONSTANTS;
use crate::identity::DROP_IDENTITIES;
use crate::training::{ATTACH_LOSS, GRADIENT, Interface, TrainingOptions, attach_loss, draft};
use crate::{Pass, PassError, Promise, Report};

/// A pass failed, or left a wrong graph behind.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PipelineError {
    /// The pass cannot rewrite this graph.
    #[error("pass {pass:?}: {source}")]
    Refused {
        /// The pass.
        pass: &'static str,
        /// Why.
        source: PassError,
    },
    /// The pass made a graph that is not valid: a fault of the pass, not of its input.
    #[error("pass {pass:?} left a wrong graph behind: {source}")]
    Broken {
        /// The pass.
        pass: &'static str,
        /// What is wrong with the graph.
        source: PassError,
    },
}

/// A graph on its way through passes.
pub struct Pipeline<'a> {
    graph: &'a mut Graph,
    reports: Vec<Report>,
}

impl<'a> Pipeline<'a> {
    /// No pass has run yet.
    pub fn new(graph: &'a mut Graph) -> Pipeline<'a> {
        Pipeline { graph, reports: Vec::new() }
    }

    /// Runs a pass and checks what it leaves behind.
    pub fn run(&mut self, pass: Pass) -> Result<(), PipelineError> {
        self.apply(pass.name, pass.promise, pass.rewrite)
    }

    /// [`run`](Pipeline::run) for a rewrite that takes or gives more than the graph.
    pub fn apply<T>(
        &mut self,
        pass: &'static str,
        promise: Promise,
        rewrite: impl FnOnce(&mut Graph, &mut Report) -> Result<T, PassError>,
    ) -> Result<T, PipelineError> {
        let mut report = Report::new(pass, promise);
        let made = rewrite(self.graph, &mut report).map_err(|source| PipelineError::Refused { pass, source })?;
        valid(self.graph).map_err(|source| PipelineError::Broken { pass, source })?;
        self.reports.push(report);
        Ok(made)
    }

    /// What the passes did, in order.
    pub fn finish(self) -> Vec<Report> {
        self.reports
    }
}

/// Works out what later passes ask of types and shapes, and checks all that must hold of a graph.
fn valid(graph: &mut Graph) -> Result<(), PassError> {
    infer(graph)?;
    Ok(check(graph)?)
}

const UPGRADE: Pass = Pass {
    name: "upgrade",
    promise: Promise::Exact,
    rewrite: |graph, report| {
        let done = upgrade(graph)?;
        report.changes.extend(done.rewritten.iter().map(|(op, count)| format!("{count} {op}")));
        // Passes add nodes of our own operator set.
        graph.opsets.entry(UPDRAFT_DOMAIN.to_owned()).or_insert(1);
        // A graph that is wrong from the start is not this pass's fault.
        valid(graph)
    },
};

const DEAD_CODE: Pass = Pass {
    name: "drop dead code",
    promise: Promise::Exact,
    rewrite: |graph, report| {
        let before = graph.nodes().count();
        graph.prune()?;
        let dropped = before - graph.nodes().count();
        if dropped > 0 {
            report.change(format!("{dropped} nodes that nothing needs"));
        }
        Ok(())
    },
};

/// A model into the form that answers requests fastest, with the same answers but for rounding.
pub fn inference(graph: &mut Graph) -> Result<Vec<Report>, PipelineError> {
    let mut pipeline = Pipeline::new(graph);
    INFERENCE.iter().try_for_each(|pass| pipeline.run(*pass))?;
    Ok(pipeline.finish())
}

/// The passes of [`inference`], in order.
pub const INFERENCE: &[Pass] = &[
    // Every pass knows one form of each operator.
    UPGRADE,
    // Constants before all else: every later pass asks whether weights, axes and shapes are constant.
    FOLD_CONSTANTS,
    // Nodes that do nothing would stand between a layer and what is folded into it.
    DROP_IDENTITIES,
    // Before batch normalisation, which then finds matrix products as layers with a bias.
    MERGE_BIAS,
    FOLD_BATCH_NORM,
    // After everything that makes constants and nodes, some of which are equal.
    MERGE_COMMON,
    // Last, because it renumbers values, and the passes before leave weights behind that nothing reads.
    DEAD_CODE,
];

/// A model into its training step.
pub(crate) fn training(pipeline: &mut Pipeline, options: &TrainingOptions) -> Result<Interface, PipelineError> {
    // Every pass and gradient rule knows one form of each operator.
    pipeline.run(UPGRADE)?;
    // Parameters become inputs before anything is folded: folding must not see them as constants.
    let mut draft = pipeline.apply(ATTACH_LOSS, Promise::Lossy, |g, r| draft(g, options, r))?;
    // Shapes and scalars that are known now need no nodes in the gradient.
    pipeline.run(FOLD_CONSTANTS)?;
    // The gradient is that of the training form, and inference forms have no gradient of their statistics.
    pipeline.apply("training mode", Promise::Lossy, |g, r| draft.enter_training_mode(g, r))?;
    pipeline.run(DROP_IDENTITIES)?;
    pipeline.apply(GRADIENT, Promise::Exact, |g, r| draft.differentiate(g, r))?;
    let made = pipeline.apply("optimizer", Promise::Exact, |g, r| draft.update(g, options, r))?;
    // Rules work out shapes node by node and ask for the same values again and again.
    pipeline.run(FOLD_CONSTANTS)?;
    pipeline.run(DROP_IDENTITIES)?;
    pipeline.run(MERGE_COMMON)?;
    // Last, because it renumbers values, which the draft holds on to.
    pipeline.run(DEAD_CODE)?;
    Ok(made)
}

/// A model into its loss and gradients on a batch; names of the batch's inputs and of the parameters.
pub(crate) fn gradients(
    pipeline: &mut Pipeline,
    options: &TrainingOptions,
) -> Result<(Vec<String>, Vec<String>), PipelineError> {
    // As in a training step, for the same reasons.
    pipeline.run(UPGRADE)?;
    let mut draft = pipeline.apply(ATTACH_LOSS, Promise::Lossy, |g, r| draft(g, options, r))?;
    pipeline.run(FOLD_CONSTANTS)?;
    pipeline.apply("training mode", Promise::Lossy, |g, r| draft.enter_training_mode(g, r))?;
    pipeline.run(DROP_IDENTITIES)?;
    pipeline.apply(GRADIENT, Promise::Exact, |g, r| draft.differentiate(g, r))?;
    let names = pipeline.apply("gradients as outputs", Promise::Exact, |g, _| Ok(draft.expose(g)))?;
    pipeline.run(FOLD_CONSTANTS)?;
    pipeline.run(MERGE_COMMON)?;
    pipeline.run(DEAD_CODE)?;
    Ok(names)
}

/// A model into its loss and metrics on a batch.
pub(crate) fn evaluation(pipeline: &mut Pipeline, options: &TrainingOptions) -> Result<Vec<String>, PipelineError> {
    // The loss is written in the newest form; upgrading what is upgraded changes nothing.
    pipeline.run(UPGRADE)?;
    let (batch_inputs, _) =
        pipeline.apply(ATTACH_LOSS, Promise::Lossy, |g, _| attach_loss(g, options, Purpose::Evaluation))?;
    INFERENCE.iter().try_for_each(|pass| pipeline.run(*pass))?;
    Ok(batch_inputs)
}
