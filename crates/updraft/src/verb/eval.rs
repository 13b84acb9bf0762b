//! `updraft eval`: a model's metrics on a recipe's data.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::json;
use updraft_train::metrics::Metrics;

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::stage::Stages;

/// Measure a model on the data of a recipe: loss, accuracy, perplexity
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe: an `updraft.toml`, or the folder that holds it.
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,

    /// An ONNX model with the inputs and outputs of the recipe's; without it, what the recipe trains.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,

    /// Which of the recipe's datasets.
    #[arg(long, value_enum, default_value_t = Split::Test)]
    data: Split,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Split {
    Train,
    Validation,
    Test,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let stages = Stages::open(context, &args.recipe)?;
    let sections = &stages.loaded.recipe.data;
    let (name, config) = match args.data {
        Split::Train => ("train", Some(&sections.train)),
        Split::Validation => ("validation", sections.validation.as_ref()),
        Split::Test => ("test", sections.test.as_ref()),
    };
    let config = config.ok_or_else(|| {
        let file = stages.loaded.path.display();
        Failure::new(Kind::Usage, format!("{file} has no `[data.{name}]`")).hint("choose another with `--data`")
    })?;
    let data = stages.data(name, config)?;
    let network = match &args.model {
        Some(path) => stages.import(path)?,
        None => {
            let train = stages.data("train", &sections.train)?;
            let validation = sections.validation.as_ref().map(|c| stages.data("validation", c)).transpose()?;
            stages.train(&stages.network()?, &train, validation.as_ref())?.network
        }
    };
    let (metrics, digest) = stages.evaluate(name, &network, &data)?;
    let json = json!({
        "model": network.digest, "data": name, "metrics": metrics, "evaluation": digest, "stages": stages.done(),
    });
    Ok(Answer { text: show(&metrics), json })
}

/// Metrics as lines of name and value.
pub(crate) fn show(metrics: &Metrics) -> String {
    let mut text = format!("samples     {}\nloss        {:.4}\n", metrics.samples, metrics.loss);
    if let Some(accuracy) = metrics.accuracy {
        text.push_str(&format!("accuracy    {:.2} %\n", 100.0 * accuracy));
    }
    if let Some(perplexity) = metrics.perplexity {
        text.push_str(&format!("perplexity  {perplexity:.3}\n"));
    }
    text
}
