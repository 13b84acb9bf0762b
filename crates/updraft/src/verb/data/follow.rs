//! `updraft data follow`: a stream into shards of a dataset.

use updraft_data::Kind as ColumnKind;
use updraft_graph::DType;

use super::ingest::FormatArgument;
use super::parse_bytes;
use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};

/// Write a stream of Redis or a topic of Kafka into shards of a dataset, each entry exactly once
///
/// A shard is finished at a size or an age and committed together with the place in the stream that it reaches, so that
/// whatever is killed, the same command goes on after the last entry in the dataset. What comes late is a new segment of the
/// manifest; older versions stay as they are. Fields of entries are columns, whose types are told from the first shard.
///
/// Entries that the server dropped before they were read are an error that says how many. Needs Redis 7 and a build with
/// the Cargo feature `redis`, or brokers of Kafka's protocol and the Cargo feature `kafka`.
#[derive(Debug, clap::Args)]
#[cfg_attr(
    not(any(feature = "redis", feature = "kafka")),
    allow(dead_code, reason = "the manual is the same without the features")
)]
pub struct Args {
    /// The stream: `redis://[user:password@]host[:port]/STREAM[?db=N]`, or
    /// `kafka://[user:password@]host[:port][,host[:port]…]/TOPIC`, which is `kafka+ssl://` for TLS.
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

    /// What of a record of Kafka becomes a column: `key`, `value`, `timestamp_ms`, `partition`, `offset`, `header.NAME`.
    #[arg(long, value_name = "FIELD,…", default_value = "value", value_delimiter = ',')]
    fields: Vec<String>,

    /// What becomes of the values of Kafka's records.
    #[arg(long, value_enum, default_value = "cell")]
    value: ValueArgument,

    /// Leave out records of Kafka without a value, as those that delete a key. Otherwise they are an error.
    #[arg(long)]
    skip_tombstones: bool,

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

/// What becomes of the values of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ValueArgument {
    /// A cell each of the column `value`.
    Cell,
    /// JSON objects, whose keys are columns.
    Json,
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

/// Refuses a stream that this program was built without.
fn check_build(stream: &str) -> Result<(), Failure> {
    let (name, feature, is_built) = match stream.starts_with("kafka") {
        true => ("Kafka", "kafka", cfg!(feature = "kafka")),
        false => ("Redis", "redis", cfg!(feature = "redis")),
    };
    if is_built {
        return Ok(());
    }
    Err(Failure::new(Kind::Unsupported, format!("this program was built without {name}"))
        .hint(format!("build it with the feature `{feature}`: `cargo build --release --features {feature}`")))
}

#[cfg(not(any(feature = "redis", feature = "kafka")))]
pub(crate) fn run(args: &Args, _: &Context) -> Result<Answer, Failure> {
    check_build(&args.stream)?;
    Err(Failure::new(Kind::Unsupported, "this program was built without streams"))
}

#[cfg(any(feature = "redis", feature = "kafka"))]
pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    use updraft_data::stream::{FollowEnd, FollowOptions, RecordOptions, ValueForm, follow};
    use updraft_data::write::WriteOptions;

    check_build(&args.stream)?;
    let fields = args.fields.iter().map(|field| field.parse()).collect::<Result<_, String>>();
    let records = RecordOptions {
        fields: fields.map_err(|reason| Failure::new(Kind::Usage, format!("--fields: {reason}")))?,
        value: match args.value {
            ValueArgument::Cell => ValueForm::Cell,
            ValueArgument::Json => ValueForm::Json,
        },
        skip_tombstones: args.skip_tombstones,
    };
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
        records,
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
    if followed.skipped > 0 {
        text.push_str(&format!("{} records without a value were left out\n", followed.skipped));
    }
    if let (Some(last), Some(version)) = (&followed.last, &followed.version) {
        text.push_str(&format!("up to {last}\nversion {version}\n"));
    }
    let json = serde_json::json!({
        "target": args.target, "format": options.format, "entries": followed.entries, "shards": followed.shards,
        "bytes": followed.bytes, "lost": followed.lost, "skipped": followed.skipped, "last": followed.last, "version": followed.version,
    });
    Ok(Answer { text, json })
}
