//! Training with the rounding in the loop, after a network was quantized.

use updraft_compress::distill::{Tuning, train_quantized};
use updraft_data::Loader;
use updraft_engine::CpuEngine;
use updraft_graph::Graph;
use updraft_passes::distill::Distillation;
use updraft_passes::loss::Loss;
use updraft_passes::quantize::{Scheme, prepare};

use crate::context::Context;
use crate::failure::{Failure, Kind};
use crate::model;
use crate::progress::TrainingProgress;
use crate::stage::{Data, Stages};

/// The share of a recipe's highest learning rate that moves what is trained already by little.
const RATE_SHARE: f64 = 0.1;

/// Takes `steps` steps on the training data with the network of floats as the teacher, beside the labels where there are
/// any. `from_codes` says that the codes were chosen with more care than the floats would be rounded with, or for other
/// floats, so that training starts from what they stand for.
pub(super) fn train(
    steps: u64,
    context: &Context,
    stages: &Stages,
    data: &Data,
    (float, pairs): (&Graph, &Graph),
    scheme: &Scheme,
    from_codes: bool,
) -> Result<Graph, Failure> {
    let section = &stages.loaded.recipe.train;
    let options = section.training_options();
    let (float, pairs) = (model::for_batches(float, section.batch)?, model::for_batches(pairs, section.batch)?);
    let mut prepared = float.clone();
    prepare(&mut prepared).map_err(|e| Failure::of(Kind::Unsupported, &e))?;
    let has_labels = data.dataset.facts().tensors.iter().any(|t| t.name == options.target);
    let mut teacher = if has_labels { Distillation::new(float) } else { Distillation::label_free(float) };
    teacher.output = options.output.clone();
    // That loss compares with a teacher already, whose answers are in the data.
    let teacher = Some(teacher).filter(|_| !matches!(options.loss, Loss::KullbackLeibler { .. }));
    let levels = scheme.weight_levels().map_err(|e| Failure::of(Kind::Usage, &e))?;
    let loader = Loader::new(data.dataset.clone(), section.loader_options(stages.seed, context.threads.min(2)))?;
    let tuning = Tuning {
        engine: &CpuEngine::new(context.threads)?,
        options: &options,
        loader: &loader,
        validation: None,
        steps,
        learning_rate: RATE_SHARE * section.learning_rate.peak,
        seed: stages.seed,
        store: &stages.store,
        clock: &*context.clock,
    };
    let mut observer = TrainingProgress::new(context.progress, steps);
    let master = (!from_codes).then_some(&prepared);
    let levels = scheme.reduce_range.then_some(levels);
    let trained = train_quantized(&tuning, &pairs, master, levels, teacher.as_ref(), &mut observer)?;
    observer.finish();
    Ok(trained.graph)
}
