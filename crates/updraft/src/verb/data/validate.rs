//! `updraft data validate`: whether a dataset is as it should be.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};
use updraft_base::Digest;
use updraft_data::shards::Shards;
use updraft_data::statistics::ColumnStatistics;
use updraft_data::validate::{Check, Rules, ValidateOptions, Validation, earlier_quarantine, quarantine, validate};
use updraft_data::{DataError, ShardFormat, ShardReader};

use super::inspect::{card, column_json};
use super::{check_outside, check_read, label_of, malformed, parse_bytes, read_text, show_unread, summarized};
use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};
use crate::output;
use crate::report::data::validate_page;
use crate::table::{number, table};

/// Hold a dataset against rules: types, ranges, decoding, duplicates, leaks, drift and personal data
///
/// One pass over all rows, in parallel and in bounded memory. Without rules it looks for rows that cannot be read,
/// pictures that cannot be decoded, equal and nearly equal rows (pictures by perceptual hash, text by MinHash), label
/// balance and personal data (e-mail addresses, payment cards, bank accounts and telephone numbers, by pattern and
/// checksum; shown masked). What is estimated rather than counted says so.
///
/// Fails with exit code 7 when a limit of the rules is broken; without rules, when any row is bad or leaked. The report is
/// written all the same.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The dataset.
    #[arg(value_name = "URL")]
    url: String,

    /// The rules: TOML with `label`, `identity`, `[limits]` and a table `[columns.NAME]` for each column.
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,

    /// An earlier version (`sha256:…` of the manifest) or another dataset, for drift.
    #[arg(long, value_name = "VERSION_OR_URL")]
    against: Option<String>,

    /// A dataset that must have no row in common with this one, such as the training data of a test set. Repeat for more. Rows
    /// are the same by all columns, or by the `identity` of the rules; pictures and texts that are nearly the same are counted
    /// too.
    #[arg(long, value_name = "URL")]
    apart_from: Vec<String>,

    /// Where bad rows, equal rows and leaks are put as Parquet, with their place and reasons: a folder of its own, in which
    /// an earlier quarantine is replaced. The dataset itself is not changed.
    #[arg(long, value_name = "URL")]
    quarantine: Option<String>,

    /// Also write a page with plots beside tables.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Do not look for nearly equal rows.
    #[arg(long)]
    no_near: bool,

    /// Memory for hashes of rows; beyond it duplicates are estimated from a sample. A block of rows may take as much.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_bytes)]
    memory: u64,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let rules = match &args.rules {
        Some(path) => Rules::parse(&read_text(path)?).map_err(|e| malformed(path, e))?,
        None => Rules::default(),
    };
    if let Some(path) = &args.html {
        output::check_writable(path)?;
    }
    let access = context.access();
    let (shards, unread) =
        Shards::open(&args.url, None, args.memory, &access).and_then(Shards::readable).map_err(failure)?;
    check_read(&unread, rules.columns.keys().chain(&rules.label).chain(&rules.identity))?;
    if let Some(target) = &args.quarantine {
        check_outside(&args.url, &shards, target)?;
    }
    let quarantine_target = args.quarantine.as_ref().map(|url| context.objects(url)).transpose()?;
    let earlier = quarantine_target.as_ref().map(earlier_quarantine).transpose()?.unwrap_or_default();
    let before = args.against.as_ref().map(|against| statistics_before(args, against, context)).transpose()?;
    let mut apart: Vec<Vec<Arc<dyn ShardReader>>> = Vec::new();
    for url in &args.apart_from {
        let (other, _) = Shards::open(url, None, args.memory, &access).and_then(Shards::readable).map_err(failure)?;
        apart.push(other.readers);
    }
    let options = ValidateOptions {
        threads: context.threads,
        memory_bytes: args.memory,
        near: !args.no_near,
        before: before.as_deref(),
        apart: &apart,
    };
    let task = context.progress.task("validate", shards.readers.iter().map(|r| r.rows()).sum(), "rows");
    let mut validation =
        validate(&shards.readers, &rules, &options, |done| task.at(done, String::new)).map_err(failure)?;
    task.finish();
    validation.checks.extend(changed_shards(&shards, context)?);
    let card = card(&args.url, &shards, unread, context);
    if let Some(path) = &args.html {
        let of_rules = |name: &String| validation.statistics.iter().find(|s| s.column == *name && s.values.is_some());
        let label = match &rules.label {
            Some(name) => of_rules(name),
            None => label_of(&validation.statistics),
        };
        let page = validate_page(&card, &validation, label, before.as_deref().unwrap_or_default());
        output::write(path, page.as_bytes())?;
    }
    let quarantined = match &quarantine_target {
        Some(target) => {
            earlier.iter().try_for_each(|key| target.delete(key))?;
            let is_clean = validation.quarantine.is_empty();
            let put = || quarantine(&shards.readers, &validation.quarantine, target, ShardFormat::Parquet);
            if is_clean { None } else { Some(put()?) }
        }
        None => None,
    };
    let failed: Vec<String> = validation
        .checks
        .iter()
        .filter(|check| !check.passes())
        .map(|check| match &check.column {
            Some(column) => format!("{} of `{column}`", check.name),
            None => check.name.clone(),
        })
        .collect();
    let mut text = show(&validation, quarantined.as_ref(), args);
    text.push_str(&show_unread(&card.unread));
    let checks: Vec<Value> = validation
        .checks
        .iter()
        .map(|check| {
            let mut json = json!(check);
            json["passed"] = check.limit.map(|_| check.passes()).into();
            json
        })
        .collect();
    let json = json!({
        "dataset": card, "passed": failed.is_empty(), "failed": failed, "rows": validation.rows,
        "bad_rows": validation.bad_rows, "checks": checks, "findings": validation.findings,
        "personal": validation.personal, "balance": validation.balance, "drift": validation.drift,
        "columns": validation.statistics.iter().map(column_json).collect::<Vec<_>>(),
        "quarantine": quarantined, "html": args.html,
    });
    let answer = Answer { text, json };
    if failed.is_empty() {
        return Ok(answer);
    }
    let message = format!("{} is not as it should be: {}", args.url, failed.join(", "));
    Err(Failure::new(Kind::Limit, message)
        .hint(
            "`[limits]` of a rules file says how much may be wrong; `--quarantine` takes the rows out to be looked at",
        )
        .with_answer(answer))
}

/// Shards whose bytes are not those of the digests that the manifest or index has of them, where it has any.
fn changed_shards(shards: &Shards, context: &Context) -> Result<Option<Check>, Failure> {
    let bytes = shards.digested_bytes();
    if bytes == 0 {
        return Ok(None);
    }
    let task = context.progress.task("verify", bytes, "bytes");
    let mut done = 0;
    let changed = shards.changed(context.threads, |bytes| {
        done += bytes;
        task.at(done, String::new);
    })?;
    task.finish();
    let note = changed.first().map_or_else(|| "bytes held against their digests".to_owned(), ToString::to_string);
    let (name, value) = ("changed shards".to_owned(), changed.len() as f64);
    Ok(Some(Check { name, column: None, value, limit: Some(0.0), is_least: false, note }))
}

/// A failure that names the setting where memory was too little: that says nothing about the data.
fn failure(error: DataError) -> Failure {
    let is_memory = matches!(error, DataError::Memory { .. });
    let failure = Failure::from(error);
    if is_memory { failure.hint("here `memory_bytes` is set by `--memory`") } else { failure }
}

/// Statistics of an earlier version, from its manifest or by reading it.
fn statistics_before(args: &Args, against: &str, context: &Context) -> Result<Vec<ColumnStatistics>, Failure> {
    let mut access = context.access();
    let url = match against.parse::<Digest>() {
        Ok(version) => {
            access.version = Some(version);
            args.url.as_str()
        }
        Err(_) => against,
    };
    let (shards, _) = Shards::open(url, None, args.memory, &access)?.readable()?;
    match shards.statistics() {
        Some(statistics) => Ok(statistics),
        None => summarized(&shards.readers, context),
    }
}

fn show(validation: &Validation, quarantined: Option<&Vec<String>>, args: &Args) -> String {
    let rows: Vec<Vec<String>> = validation
        .checks
        .iter()
        .map(|check| {
            let limit = check.limit.map(|l| format!("{} {}", if check.is_least { ">=" } else { "<=" }, number(l)));
            let verdict = match check.limit {
                None => "reported",
                Some(_) if check.passes() => "kept",
                Some(_) => "BROKEN",
            };
            vec![
                verdict.to_owned(),
                check.name.clone(),
                check.column.clone().unwrap_or_default(),
                number(check.value),
                limit.unwrap_or_default(),
                check.note.clone(),
            ]
        })
        .collect();
    let mut text = format!("{} rows\n", validation.rows);
    text.push_str(&table(&["", "check", "column", "found", "limit", ""], &[3, 4], &rows));
    for finding in &validation.findings {
        let column = finding.column.as_ref().map(|c| format!("{c}: ")).unwrap_or_default();
        text.push_str(&format!("\n{column}{}, {} rows\n", finding.rule, finding.rows));
        for (place, reason) in finding.places.iter().take(3) {
            text.push_str(&format!("  {place}: {reason}\n"));
        }
    }
    for count in &validation.personal {
        let (column, kind) = (&count.column, count.kind.name());
        text.push_str(&format!("\n{column}: {} x {kind} in {} rows\n", count.values, count.rows));
        for (place, masked) in count.places.iter().take(3) {
            text.push_str(&format!("  {place}: {masked}\n"));
        }
    }
    if let (Some(keys), Some(url)) = (quarantined, &args.quarantine) {
        text.push_str(&format!("\nquarantine: {} in {url}\n", keys.join(", ")));
    }
    if let Some(path) = &args.html {
        text.push_str(&format!("\npage: {}\n", path.display()));
    }
    text
}
