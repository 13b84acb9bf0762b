//! `updraft data lifecycle`: which objects should move to another tier or go.

use std::path::PathBuf;

use serde_json::json;
use updraft_base::{Digest, units};
use updraft_data::lifecycle::{
    Action, Configuration, LifecycleRules, Plan, Prices, Provider, Usage, configuration, live_objects, moved_tiers,
    note_moved, plan, read_access_log,
};
use updraft_store::{ObjectFacts, Objects, StoreError};

use super::{malformed, read_text};
use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::table::table;

/// Show which objects should move to another storage tier or be deleted, what that saves, and do it
///
/// Lists the objects below the URL and holds them against the rules: by age, by when they were last read (with an access
/// log), and by whether a live version of the dataset names them. What another dataset in a folder below names, by its
/// manifest or by the `index.json` of MDS, is left alone. Prints the plan and the provider's own lifecycle configuration of
/// the same rules. The provider knows neither manifests nor prices, nor goes by the order of rules: a rule that it has no
/// words for, that could delete what a live version names, or that an earlier one would hold back, is named and not in it.
/// Nothing changes without `--apply` and the digest of the plan that was shown; an object that has changed since is left
/// alone. What moves is read and written once more, through this machine, and its age begins again; the provider's
/// configuration moves in place.
///
/// Savings are whole micro-dollars by a price table with date and source; it knows some regions of Google Cloud, one of S3
/// and one of Azure, others with `--prices`. Retrieval fees by the readings of the log, shortest times of storage and least
/// sizes count, request charges do not. What a live version names does not go where it could not be read.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the objects lie.
    #[arg(value_name = "URL")]
    url: String,

    /// The rules: TOML with `[[rule]]` tables of `name`, `prefix`, `suffix`, `age_days`, `idle_days`, `unreferenced`,
    /// `bytes_min`, and `tier = "…"` or `delete = true`; the first that fits an object decides.
    #[arg(long, value_name = "FILE")]
    rules: PathBuf,

    /// Readings, from the provider's access logs: CSV with the columns `key` and `read_unix_ms`, a line each. What was read
    /// before the first of them is not known, so no object counts as idle for longer.
    #[arg(long, value_name = "FILE")]
    access_log: Option<PathBuf>,

    /// The region whose prices count [default: the first one in the table, us-east-1 for s3://, us-central1 for
    /// gs://, eastus2 for az://].
    #[arg(long, value_name = "REGION")]
    region: Option<String>,

    /// Prices: CSV with the columns provider, region, tier, micro_usd_per_gib_month, retrieval_micro_usd_per_gib, days_min,
    /// date, source, and where small objects count for more billed_bytes_min.
    #[arg(long, value_name = "FILE")]
    prices: Option<PathBuf>,

    /// The tier that the objects are in [default: the provider's warmest]; those that `--apply` moved before are in theirs.
    #[arg(long, value_name = "TIER")]
    from_tier: Option<String>,

    /// Whose tiers and configuration, where the URL does not say it.
    #[arg(long, value_enum)]
    provider: Option<ProviderArgument>,

    /// Also write the provider's configuration to a file.
    #[arg(long, value_name = "FILE")]
    configuration: Option<PathBuf>,

    /// Do what the plan of this digest says.
    #[arg(long, value_name = "DIGEST")]
    apply: Option<Digest>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ProviderArgument {
    /// Amazon S3.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
}

/// What became of a plan.
struct Applied {
    deleted: u64,
    moved: u64,
    changed: Vec<String>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let rules = LifecycleRules::parse(&read_text(&args.rules)?).map_err(|e| malformed(&args.rules, e))?;
    let provider = match args.provider {
        Some(ProviderArgument::S3) => Provider::S3,
        Some(ProviderArgument::Gcs) => Provider::Gcs,
        Some(ProviderArgument::Azure) => Provider::Azure,
        None => Provider::of_url(&args.url),
    };
    let table = args.prices.as_ref().map(|path| std::fs::read(path).map_err(|e| Failure::io("read", path, &e)));
    let prices = Prices::read(table.transpose()?.as_deref(), provider.scheme(), args.region.as_deref())
        .map_err(|e| Failure::of(Kind::Usage, &e))?;
    let tier = args.from_tier.as_deref().or(provider.tiers().first().copied()).unwrap_or("");
    if !tier.is_empty() && !provider.tiers().contains(&tier) {
        let known = provider.tiers().join(", ");
        return Err(Failure::new(Kind::Usage, format!("{} has no tier `{tier}`; it has {known}", provider.name())));
    }
    let now_ms = context.clock.now_unix_ms();
    let log = match &args.access_log {
        None => None,
        Some(path) => {
            let text = std::fs::read(path).map_err(|e| Failure::io("read", path, &e))?;
            Some(read_access_log(&text, now_ms).map_err(|e| malformed(path, e))?)
        }
    };
    let objects = context.objects(&args.url)?;
    let listed = objects.list("")?;
    let mut usage = Usage { log, tiers: moved_tiers(&objects, &listed)?, ..Usage::default() };
    live_objects(&objects, &listed, rules.live_versions, &mut usage)?;
    let plan = plan(&listed, &usage, &rules, provider, &prices, tier, now_ms)
        .map_err(|reason| malformed(&args.rules, reason))?;
    let configuration = configuration(&rules, provider, &args.url, &usage);
    if let (Some(path), Some(configuration)) = (&args.configuration, &configuration) {
        crate::output::write(path, format!("{:#}\n", configuration.json).as_bytes())?;
    }
    let applied = args.apply.map(|digest| apply(&plan, &digest, &objects, context)).transpose()?;
    Ok(answer(args, &plan, &prices, configuration.as_ref(), applied.as_ref()))
}

/// Does what the plan says, object by object; one that is no longer what it was is left alone.
fn apply(plan: &Plan, digest: &Digest, objects: &Objects, context: &Context) -> Result<Applied, Failure> {
    if plan.digest != *digest {
        let message = format!("the plan is now {}, not {digest}: objects or rules have changed", plan.digest);
        return Err(Failure::new(Kind::Usage, message).hint("look at the plan again, then apply its digest"));
    }
    let task = context.progress.task("apply", plan.actions.len() as u64, "objects");
    let mut applied = Applied { deleted: 0, moved: 0, changed: Vec::new() };
    let mut moved = Vec::new();
    for (done, action) in plan.actions.iter().enumerate() {
        let acted = act(action, objects, &mut applied, &mut moved);
        // What failed does not make what was moved before unknown.
        let is_last = acted.is_err() || done + 1 == plan.actions.len();
        if !moved.is_empty() && (is_last || moved.len() == NOTED_MAX) {
            note_moved(objects, &moved)?;
            moved.clear();
        }
        acted?;
        task.at(done as u64 + 1, String::new);
    }
    task.finish();
    Ok(applied)
}

/// Objects that are moved before the list of what was moved is written again: as many could be moved twice after a kill.
const NOTED_MAX: usize = 64;

/// Does one thing of a plan, where the object is still what was planned.
fn act(
    action: &Action,
    objects: &Objects,
    applied: &mut Applied,
    moved: &mut Vec<(ObjectFacts, String)>,
) -> Result<(), Failure> {
    match objects.head(&action.key) {
        Ok(found) if found.bytes == action.bytes && found.etag == action.etag => match &action.tier {
            None => {
                objects.delete(&action.key)?;
                applied.deleted += 1;
            }
            Some(tier) if objects.set_tier(&action.key, tier, &found)? => {
                applied.moved += 1;
                moved.push((objects.head(&action.key)?, tier.clone()));
            }
            Some(_) => applied.changed.push(action.key.clone()),
        },
        Ok(_) => applied.changed.push(action.key.clone()),
        Err(StoreError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn answer(
    args: &Args,
    plan: &Plan,
    prices: &Prices,
    configuration: Option<&Configuration>,
    applied: Option<&Applied>,
) -> Answer {
    let saved = |saved: Option<i128>| saved.map_or_else(|| "not known".to_owned(), units::usd);
    let rows: Vec<Vec<String>> = plan
        .actions
        .iter()
        .map(|a| {
            let what = a.tier.as_ref().map_or_else(|| "delete".to_owned(), |tier| format!("to {tier}"));
            vec![what, a.key.clone(), units::bytes(a.bytes), saved(a.saved_micro_usd_month), a.rule.clone()]
        })
        .collect();
    let mut text = table(&["action", "object", "size", "saves a month", "rule"], &[2, 3], &rows);
    for (reason, objects, bytes) in &plan.left {
        text.push_str(&format!("left alone: {objects} objects, {}: {reason}\n", units::bytes(*bytes)));
    }
    let moved: u64 = plan.actions.iter().map(|a| a.bytes).sum();
    text.push_str(&format!(
        "{} of {} objects, {} of {}\n",
        plan.actions.len(),
        plan.objects,
        units::bytes(moved),
        units::bytes(plan.bytes)
    ));
    text.push_str(&format!("saves {} a month", saved(plan.saved_micro_usd_month)));
    if plan.once_micro_usd > 0 {
        text.push_str(&format!(", costs {} once", units::usd(plan.once_micro_usd)));
    }
    match prices.tiers.first() {
        Some(price) => text.push_str(&format!(" ({}, prices of {}: {})\n", price.region, price.date, price.source)),
        None => text.push_str(": no prices for this provider and region\n"),
    }
    text.push_str(&format!("plan {}\n", plan.digest));
    if let Some(configuration) = configuration {
        text.push_str(&format!("\n{:#}\n", configuration.json));
        for (rule, reason) in &configuration.left_out {
            text.push_str(&format!("not in it: `{rule}`: {reason}\n"));
        }
    }
    if let Some(applied) = applied {
        text.push_str(&format!("applied: {} objects deleted, {} moved", applied.deleted, applied.moved));
        text.push_str(&match applied.changed.len() {
            0 => "\n".to_owned(),
            n => format!(", {n} left alone because they have changed\n"),
        });
    }
    let json = json!({
        "url": args.url, "plan": plan, "prices": prices.tiers, "configuration": configuration,
        "applied": applied.map(|a| json!({ "deleted": a.deleted, "moved": a.moved, "changed": a.changed })),
    });
    Answer { text, json }
}
