//! `updraft data`: datasets wherever they lie, one file for each of its verbs.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Subcommand;
use updraft_data::shards::{Shards, UnreadColumn};
use updraft_data::statistics::{ColumnStatistics, LABEL_NAMES};
use updraft_data::{ShardFormat, ShardReader};

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};

pub mod bench;
pub mod cluster;
pub mod follow;
pub mod ingest;
pub mod inspect;
pub mod lifecycle;
pub mod query;
pub mod transform;
pub mod validate;

/// Ingest, follow, inspect, query, transform, validate, measure and tidy datasets
///
/// A dataset is a URL (`s3://bucket/folder`, `gs://…`, `az://…`, `https://…`, `file:///…`) or a path: a folder with our
/// manifest, a folder of MDS shards, a folder of files of one format, or one file.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: DataVerb,
}

#[derive(Debug, Subcommand)]
enum DataVerb {
    Ingest(ingest::Args),
    Follow(follow::Args),
    Inspect(inspect::Args),
    Query(query::Args),
    Transform(transform::Args),
    Cluster(cluster::Args),
    Validate(validate::Args),
    Bench(bench::Args),
    Lifecycle(lifecycle::Args),
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    match &args.verb {
        DataVerb::Ingest(args) => ingest::run(args, context),
        DataVerb::Follow(args) => follow::run(args, context),
        DataVerb::Inspect(args) => inspect::run(args, context),
        DataVerb::Query(args) => query::run(args, context),
        DataVerb::Transform(args) => transform::run(args, context),
        DataVerb::Cluster(args) => cluster::run(args, context),
        DataVerb::Validate(args) => validate::run(args, context),
        DataVerb::Bench(args) => bench::run(args, context),
        DataVerb::Lifecycle(args) => lifecycle::run(args, context),
    }
}

/// Whether two paths or URLs name one place, as far as can be told without asking a store.
pub(crate) fn is_same_place(a: &str, b: &str) -> bool {
    place(a) == place(b)
}

fn place(text: &str) -> PathBuf {
    let local = updraft_store::file_url_path(text).and_then(Result::ok);
    if local.is_none() && text.contains("://") {
        return PathBuf::from(text.trim_end_matches('/'));
    }
    let local = local.unwrap_or_else(|| text.into());
    let absolute = std::path::absolute(&local).unwrap_or(local);
    // What is not there yet lies in something that may be.
    let existing = absolute.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
    match existing {
        Some((above, canonical)) => match absolute.strip_prefix(above) {
            Ok(rest) if rest.as_os_str().is_empty() => canonical,
            Ok(rest) => canonical.join(rest),
            Err(_) => absolute,
        },
        None => absolute,
    }
}

/// Refuses to write into a folder whose files are the data: they would be taken for data the next time. Folders below one with a
/// manifest or an index are not looked at.
fn check_outside(source: &str, shards: &Shards, target: &str) -> Result<(), Failure> {
    let is_listed = shards.version.is_none() && shards.facts.iter().all(|facts| facts.format != ShardFormat::Mds);
    let (source, target) = (place(source), place(target));
    let is_hidden = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b".");
    match target.strip_prefix(&source) {
        Ok(below) if is_listed && !below.iter().any(is_hidden) => {
            let message = format!("{} lies within the data of {}", target.display(), source.display());
            Err(Failure::new(Kind::Usage, message)
                .hint("what is written there would be taken for data the next time; choose a folder beside it"))
        }
        _ => Ok(()),
    }
}

/// `64MiB`, `1.5 GiB`, `800kB` or a number of bytes.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (text[..end].parse::<f64>(), text[end..].trim());
    let scale = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        _ => f64::NAN,
    };
    match number.map(|n| (n * scale).round()) {
        Ok(bytes) if (1.0..9e15).contains(&bytes) => Ok(bytes as u64),
        _ => Err(format!("`{text}` is no size: write a number and KiB, MiB, GiB, kB, MB or GB")),
    }
}

/// The column that is the label: the one named so whose values could be counted.
fn label_of(statistics: &[ColumnStatistics]) -> Option<&ColumnStatistics> {
    let named = |name: &str| statistics.iter().find(|s| s.column == name && s.values.is_some());
    LABEL_NAMES.into_iter().find_map(named)
}

/// Statistics from one pass over all shards, with progress.
fn summarized(shards: &[Arc<dyn ShardReader>], context: &Context) -> Result<Vec<ColumnStatistics>, Failure> {
    let rows = shards.iter().map(|s| s.rows()).sum();
    let task = context.progress.task("read", rows, "rows");
    let statistics = updraft_data::validate::summarize(shards, context.threads, |done| task.at(done, String::new))?;
    task.finish();
    Ok(statistics)
}

/// What was left out, since it cannot be read.
fn show_unread(unread: &[UnreadColumn]) -> String {
    let line = |UnreadColumn { column, reason }: &UnreadColumn| format!("  {column}: {reason}\n");
    match unread {
        [] => String::new(),
        unread => format!("\nnot read\n{}", unread.iter().map(line).collect::<String>()),
    }
}

/// Refuses what was asked of a column that cannot be read.
fn check_read<'a>(unread: &[UnreadColumn], asked: impl IntoIterator<Item = &'a String>) -> Result<(), Failure> {
    let mut asked = asked.into_iter();
    match asked.find_map(|name| unread.iter().find(|unread| unread.column == *name)) {
        Some(UnreadColumn { column, reason }) => {
            Err(Failure::new(Kind::Unsupported, format!("the column `{column}` cannot be read: it {reason}")))
        }
        None => Ok(()),
    }
}

/// A file whose content the user wrote.
fn read_text(path: &std::path::Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|e| Failure::io("read", path, &e))
}

/// What is wrong with such a file.
fn malformed(path: &std::path::Path, reason: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Usage, format!("{}: {reason}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, expected) in [("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("800kB", 800_000), ("7", 7)] {
            assert_eq!(parse_bytes(text), Ok(expected));
        }
        for text in ["", "MiB", "3 parsecs", "0", "-1"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
