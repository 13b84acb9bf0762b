//! `updraft data follow`: a stream into shards of a dataset.

use updraft_data::Kind as ColumnKind;
use updraft_graph::DType;

use super::ingest::FormatArgument;
use super::parse_bytes;
use crate::context::{Answer, Context};
use crate::failure::Failure;
#[cfg(not(feature = "redis"))]
use crate::failure::Kind;

/// Write a stream of Redis into shards of a dataset, each entry exactly once
///
/// A shard is finished at a size or an age and committed together with the place in the stream that it reaches, so that
/// whatever is killed, the same command goes on after the last entry in the dataset. What comes late is a new segment of the
/// manifest; older versions stay as they are. Fields of entries are columns, whose types are told from the first shard.
///
/// Entries that the server dropped before they were read are an error that says how many. Needs Redis 7, and a build with
/// the Cargo feature `redis`.
#[derive(Debug, clap::Args)]
#[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "the manual is the same without the feature"))]
pub struct Args {
    /// The stream: `redis://[user:password@]host[:port]/STREAM[?db=N]`.
    #[arg(value_name = "STREAM")]
    stream: String,

    /// The dataset's folder or URL.
    #[arg(value_name = "DST")]
    target: String,

    /// The format of the shards.
    #[arg(long, value_enum, default_value = "mds")]
    format: FormatArgument,

    /// Bytes of entries of a shard.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_bytes)]
    shard_bytes: u64,

    /// The age at which a shard is finished, however small it is.
    #[arg(long, value_name = "T", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    shard_seconds: u64,

    /// Stop when no entry has come for so long.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    until_idle_seconds: Option<u64>,

    /// Stop with the entry that is the last one now.
    #[arg(long, conflicts_with = "until_idle_seconds")]
    once: bool,

    /// The name under which the dataset keeps its place in the stream [default: the stream's URL without password].
    #[arg(long, value_name = "NAME")]
    group: Option<String>,

    /// What a column holds: `NAME=bytes`, `text`, `i64`, `f64` or `f32`. Repeat for more.
    #[arg(long, value_name = "NAME=KIND", value_parser = parse_column)]
    column: Vec<(String, ColumnKind)>,

    /// Compress Parquet pages or MDS shards with zstd.
    #[arg(long)]
    compress: bool,

    /// Go on with what is left where entries were dropped before they were read.
    #[arg(long)]
    accept_loss: bool,

    /// How long the server may be away before that is an error.
    #[arg(long, value_name = "N", default_value_t = 30)]
    patience_seconds: u64,
}

fn parse_column(text: &str) -> Result<(String, ColumnKind), String> {
    let wrong = || format!("`{text}` is not of the form NAME=KIND with bytes, text, i64, f64 or f32");
    let (name, kind) = text.rsplit_once('=').ok_or_else(wrong)?;
    let kind = match kind {
        "bytes" => ColumnKind::Bytes,
        "text" => ColumnKind::Text,
        "i64" => ColumnKind::scalar(DType::I64),
        "f64" => ColumnKind::scalar(DType::F64),
        "f32" => ColumnKind::scalar(DType::F32),
        _ => return Err(wrong()),
    };
    Ok((name.to_owned(), kind))
}

#[cfg(not(feature = "redis"))]
pub(crate) fn run(_: &Args, _: &Context) -> Result<Answer, Failure> {
    Err(Failure::new(Kind::Unsupported, "this program was built without Redis")
        .hint("build it with the feature `redis`: `cargo build --release --features redis`"))
}

#[cfg(feature = "redis")]
pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    use updraft_data::stream::{FollowEnd, FollowOptions, follow};
    use updraft_data::write::WriteOptions;

    let options = FollowOptions {
        format: args.format.into(),
        write: WriteOptions { shard_bytes: args.shard_bytes, compress: args.compress, ..WriteOptions::default() },
        shard_ms: args.shard_seconds.saturating_mul(1000),
        end: match (args.until_idle_seconds, args.once) {
            (Some(seconds), _) => FollowEnd::IdleMs(seconds.saturating_mul(1000)),
            (None, true) => FollowEnd::Once,
            (None, false) => FollowEnd::Never,
        },
        group: args.group.clone(),
        kinds: args.column.iter().cloned().collect(),
        accept_loss: args.accept_loss,
        patience_ms: args.patience_seconds.saturating_mul(1000),
    };
    let target = context.objects(&args.target)?;
    let task = context.progress.task("follow", 0, "entries");
    let followed = follow(&args.stream, &target, &options, &*context.clock, |read, committed| {
        task.at(read, || format!("{committed} in the dataset"));
    })?;
    task.finish();
    let mut text = format!(
        "{} entries in {} shards of {}, {}\n",
        followed.entries,
        followed.shards,
        options.format,
        updraft_base::units::bytes(followed.bytes),
    );
    if followed.lost > 0 {
        text.push_str(&format!("{} entries were gone before they were read\n", followed.lost));
    }
    if let (Some(last), Some(version)) = (&followed.last, &followed.version) {
        text.push_str(&format!("up to entry {last}\nversion {version}\n"));
    }
    let json = serde_json::json!({
        "target": args.target, "format": options.format, "entries": followed.entries, "shards": followed.shards,
        "bytes": followed.bytes, "lost": followed.lost, "last": followed.last, "version": followed.version,
    });
    Ok(Answer { text, json })
}
