//! `updraft train`: the training stage of a recipe.

use std::path::PathBuf;

use serde_json::json;
use updraft_base::units;
use updraft_train::waits::Waits;

use crate::context::{Answer, Caches, Context};
use crate::failure::Failure;
use crate::output;
use crate::stage::Stages;

/// Train the model of a recipe, from the last checkpoint where one is left
///
/// A run that was killed goes on where it was, and gives the same bits as one that was not. What the store has trained
/// already is not trained again.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe: an `updraft.toml`, or the folder that holds it.
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,

    /// Also write the trained model to a file.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let stages = Stages::open(context, &args.recipe)?;
    let sections = &stages.loaded.recipe.data;
    let data = stages.data("train", &sections.train)?;
    let validation = sections.validation.as_ref().map(|c| stages.data("validation", c)).transpose()?;
    let network = stages.network()?;
    let trained = stages.train(&network, &data, validation.as_ref())?;
    let export = stages.export("export", &trained.network, Some(&data))?;
    if let Some(path) = &args.output {
        output::write(path, &stages.store.get(&export.digest)?)?;
    }
    let history = &trained.history;
    let record = &history.record;
    let last = record.history.evaluations.last().map(|e| &e.metrics);
    let mut text =
        format!("{} of {} steps in {}\n", record.step, history.steps, units::duration_ns(history.elapsed_ns));
    if let Some(best) = record.best {
        text.push_str(&format!("best validation: {:.4} after step {}\n", best.value, best.step));
    }
    if let Some(sentence) = history.waits.as_ref().and_then(Waits::sentence) {
        text.push_str(&format!("{sentence}\n"));
    }
    text.push_str(&format!("model {}\n", export.digest));
    let json = json!({
        "name": stages.loaded.name, "model_digest": export.digest, "seed": stages.seed,
        "steps": record.step, "elapsed_ns": history.elapsed_ns, "best": record.best, "validation": last,
        "waits": history.waits, "cache": context.caches.as_ref().and_then(Caches::reading),
        "shared_cache": context.caches.as_ref().and_then(Caches::shared_reading),
        "artifacts": { "network": network.digest, "model": trained.network.digest, "history": trained.history_digest,
                       "export": export.digest },
        "stages": stages.done(),
    });
    Ok(Answer { text, json })
}
