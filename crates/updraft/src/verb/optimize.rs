//! `updraft optimize`: the smallest or fastest model within a limit on what is lost.

use std::path::PathBuf;

use clap::ValueEnum;
use updraft_base::units;
use updraft_compress::arithmetic::Target;
use updraft_compress::measure::Metric;
use updraft_compress::search::{Judgement, Objective, Trial};

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::output;
use crate::recipe::optimize::{Percent, TimeLimit};
use crate::stage::Stages;
use crate::stage::optimize::{Account, Optimized, summary};
use crate::table::table;

/// Find the fastest or smallest model within a limit on the loss of accuracy
///
/// Tries calibrators and roundings of int8, values in 16 bits, units left in float, training with the rounding in the
/// loop, structured pruning with recovery, weights in few bits, and combinations of them; judges each by measured accuracy and by latency on this machine, measured in turns with the original. Samples
/// for calibration, for the search and for the final judgement are different ones: from the training, the validation and
/// the test data of the recipe. Every answer is kept in the store, so a search that was killed goes on where it was.
///
/// A model is always written. Where nothing better than the original is within the limit it is the original; what comes
/// nearest is named, and the exit code is 7.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model.
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// The recipe with the data, the loss and the settings of training; its section `[optimize]` is taken for all that is
    /// not given here.
    #[arg(long, value_name = "RECIPE")]
    data: PathBuf,

    /// What may be lost: points of accuracy, or the relative rise of the perplexity or the loss [default: 1%].
    #[arg(long, value_name = "PERCENT")]
    max_drop: Option<Percent>,

    /// What is to be small [default: latency].
    #[arg(long, value_enum)]
    objective: Option<ObjectiveArgument>,

    /// When the search ends at the latest [default: 30m].
    #[arg(long, value_name = "TIME")]
    time_limit: Option<TimeLimit>,

    /// The kind of processor that the model is meant for [default: this one].
    #[arg(long, value_enum)]
    target: Option<TargetArgument>,

    /// Where the model is written.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ObjectiveArgument {
    /// The time of one answer.
    Latency,
    /// The file.
    Size,
    /// Machine time a sample where many are answered at once.
    Cost,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TargetArgument {
    /// x86-64 with AVX-512 VNNI.
    Avx512Vnni,
    /// x86-64 with AVX2 only, whose 16-bit sums of pairs saturate: emulated when candidates are judged.
    Avx2,
    /// Arm with dot products of bytes.
    ArmDotprod,
    /// NVIDIA tensor cores, which take symmetric codes only.
    #[value(name = "cuda-int8")]
    CudaInt8,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let stages = Stages::open(context, &args.data)?;
    let mut section = stages.loaded.recipe.optimize.clone().unwrap_or_default();
    section.max_drop = args.max_drop.unwrap_or(section.max_drop);
    section.time_limit = args.time_limit.unwrap_or(section.time_limit);
    if let Some(objective) = args.objective {
        section.objective = match objective {
            ObjectiveArgument::Latency => Objective::Latency,
            ObjectiveArgument::Size => Objective::Size,
            ObjectiveArgument::Cost => Objective::Cost,
        };
    }
    if let Some(target) = args.target {
        section.target = Some(match target {
            TargetArgument::Avx512Vnni => Target::Avx512Vnni,
            TargetArgument::Avx2 => Target::Avx2,
            TargetArgument::ArmDotprod => Target::ArmDotprod,
            TargetArgument::CudaInt8 => Target::CudaInt8,
        });
    }
    // Before an hour of search, not after it.
    output::check_writable(&args.output)?;
    let sections = &stages.loaded.recipe.data;
    let named = [
        ("train", Some(&sections.train)),
        ("validation", sections.validation.as_ref()),
        ("test", sections.test.as_ref()),
    ];
    let mut data = Vec::new();
    for (split, config) in named.into_iter().filter_map(|(split, config)| Some((split, config?))) {
        data.push((split, stages.data(split, config)?));
    }
    let network = stages.import(&args.model)?;
    let optimized = stages.optimize(&section, &network, &data)?;
    output::write(&args.output, &stages.store.get(&optimized.network.digest)?)?;
    let mut json = summary(&optimized);
    json["file"] = args.output.display().to_string().into();
    json["stages"] = serde_json::to_value(stages.done()).map_err(|e| Failure::of(Kind::Storage, &e))?;
    let mut text = show(&optimized);
    text.push_str(&format!("model       {}\n            {}\n", args.output.display(), optimized.network.digest));
    answer(&optimized.account, Answer { text, json })
}

/// The answer, as a failure where the limit was not met.
pub(crate) fn answer(account: &Account, answer: Answer) -> Result<Answer, Failure> {
    match account.unmet() {
        None => Ok(answer),
        Some(problem) => {
            let failure = Failure::new(Kind::Limit, problem);
            Err(failure.hint("the original was written; `--max-drop` allows more").with_answer(answer))
        }
    }
}

/// Before and after, and what stands on the front between them.
pub(crate) fn show(optimized: &Optimized) -> String {
    let account = &optimized.account;
    let outcome = &account.outcome;
    let rows: Vec<Vec<String>> = outcome
        .trials
        .iter()
        .enumerate()
        .filter(|(i, _)| *i == 0 || *i == outcome.chosen || outcome.front.contains(i))
        .map(|(i, trial)| row(account.metric, trial, i == outcome.chosen))
        .collect();
    let header = ["", "model", account.metric.name(), "drop (95 %)", "time", "of the original's", "size"];
    let mut text = table(&header, &[2, 3, 4, 5, 6], &rows);
    if let Some(judgement) = &account.on_avx2 {
        text.push_str(&format!(
            "on AVX2 without VNNI its {} is {} instead of {} ({} samples emulated)\n",
            account.metric.name(),
            metric_value(account.metric, judgement.candidate),
            metric_value(account.metric, judgement.original),
            judgement.samples
        ));
    }
    if outcome.is_cut_short {
        text.push_str("the time limit ended the search; the same command with more time goes on from here\n");
    }
    text
}

fn row(metric: Metric, trial: &Trial, is_chosen: bool) -> Vec<String> {
    let judgement = trial.holdout.as_ref().or(trial.search.as_ref());
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    vec![
        if is_chosen { "*" } else { "" }.to_owned(),
        trial.name.clone(),
        or_dash(judgement.map(|j| metric_value(metric, j.candidate))),
        or_dash(judgement.map(show_drop)),
        or_dash(trial.speed.as_ref().map(|s| units::duration_ns(s.latency_ns.estimate as u64))),
        or_dash(trial.speed.as_ref().map(|s| format!("{:.2}", s.latency_ratio.estimate))),
        or_dash(trial.size_bytes.map(units::bytes)),
    ]
}

/// `0.12 % (-0.03 to 0.27)`
pub(crate) fn show_drop(judgement: &Judgement) -> String {
    let drop = judgement.drop;
    format!("{:.2} % ({:.2} to {:.2})", 100.0 * drop.estimate, 100.0 * drop.low, 100.0 * drop.high)
}

pub(crate) fn metric_value(metric: Metric, value: f64) -> String {
    match metric {
        Metric::Accuracy => format!("{:.2} %", 100.0 * value),
        Metric::Perplexity => format!("{value:.3}"),
        Metric::Loss => format!("{value:.4}"),
    }
}
