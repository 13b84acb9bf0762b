//! `updraft data ingest`: data of any format into shards of one, with a manifest.

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde_json::json;
use updraft_base::units;
use updraft_data::ShardFormat;
use updraft_data::config::Resize;
use updraft_data::ingest::{IngestOptions, append, check_target, commit, ingest, not_yet_in};
use updraft_data::manifest::Manifest;
use updraft_data::shards::Shards;
use updraft_data::write::WriteOptions;

use super::{check_outside, check_read, is_same_place, parse_bytes};
use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};

/// Convert a dataset into shards, with statistics and a manifest
///
/// Reads MDS, WebDataset tar, TFRecord, Parquet, Arrow, CSV, JSONL, NumPy and folders of pictures; writes MDS, Parquet,
/// TFRecord or tar. Work is cut into one unit for each shard to be written, done on all threads.
///
/// Resumable and repeatable: a shard is named by the digest of its input and of what is done to it, and put only where it
/// does not exist. A run that was killed goes on where it was; several at a time share the work; all end in the same bytes
/// and the same manifest. The source is not changed.
///
/// With `--append` the rows come behind those that the dataset has, as a new version. Files of the source whose content the
/// dataset was made of are left out, so the same folder may be given each time that it has grown; a file that was changed
/// is a new one.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The dataset to read.
    #[arg(value_name = "SRC")]
    source: String,

    /// The folder or URL to write to.
    #[arg(value_name = "DST")]
    target: String,

    /// The format of the shards.
    #[arg(long, value_enum, default_value = "mds")]
    format: FormatArgument,

    /// The size of a shard, as its rows take in memory.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_bytes)]
    shard_size: u64,

    /// Put the rows behind those that are there.
    #[arg(long)]
    append: bool,

    /// Rows of a shard, instead of a size.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    shard_rows: Option<u64>,

    /// The columns to keep, in this order [default: all].
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    columns: Vec<String>,

    /// Write the rows in a random order, that of `--seed`.
    #[arg(long)]
    shuffle: bool,

    /// Blocks of the source whose rows are mixed with each other at a time.
    #[arg(long, value_name = "BLOCKS", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..))]
    shuffle_blocks: u64,

    /// Make the pictures of a column smaller: `image=224` for the shorter side, `image=224x224` for height and width.
    /// JPEG is stored again as JPEG of quality 90, everything else as PNG.
    #[arg(long, value_name = "COLUMN=SIZE", value_parser = parse_resize)]
    resize: Vec<(String, Resize)>,

    /// Compress Parquet pages or MDS shards with zstd.
    #[arg(long)]
    compress: bool,

    /// Believe the digests that a manifest or MDS index has of the source's shards. Without this their bytes are read once
    /// more and held against them.
    #[arg(long)]
    no_verify: bool,

    /// The most memory for shards being written and blocks being read; fewer threads work where it is short.
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = parse_bytes)]
    memory: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum FormatArgument {
    /// MosaicML Streaming's shards: the choice for samples.
    Mds,
    /// Parquet: the choice for tables.
    Parquet,
    /// TFRecord of `tf.train.Example`.
    Tfrecord,
    /// WebDataset's archives.
    Tar,
}

impl From<FormatArgument> for ShardFormat {
    fn from(format: FormatArgument) -> ShardFormat {
        match format {
            FormatArgument::Mds => ShardFormat::Mds,
            FormatArgument::Parquet => ShardFormat::Parquet,
            FormatArgument::Tfrecord => ShardFormat::TfRecord,
            FormatArgument::Tar => ShardFormat::Tar,
        }
    }
}

fn parse_resize(text: &str) -> Result<(String, Resize), String> {
    let wrong = || format!("`{text}` is not of the form COLUMN=PIXELS or COLUMN=HEIGHTxWIDTH, 1 to 16384 each");
    let (column, size) = text.split_once('=').ok_or_else(wrong)?;
    let side = |text: &str| text.parse::<usize>().ok().filter(|side| (1..=16384).contains(side)).ok_or_else(wrong);
    let (size, shorter) = match size.split_once('x') {
        Some((height, width)) => (Some([side(height)?, side(width)?]), None),
        None => (None, Some(side(size)?)),
    };
    Ok((column.to_owned(), Resize { size, shorter, filter: Default::default(), antialias: true }))
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let format = args.format.into();
    if is_same_place(&args.source, &args.target) {
        return Err(Failure::new(Kind::Usage, "source and target are the same".to_owned()));
    }
    let shards = Shards::open(&args.source, None, args.memory / 2, &context.access())?;
    check_outside(&args.source, &shards, &args.target)?;
    let asked = if args.columns.is_empty() { shards.schema.names() } else { args.columns.clone() };
    check_read(&shards.unread(), &asked)
        .map_err(|failure| failure.hint("`--columns` says which columns are wanted"))?;
    let target = context.objects(&args.target)?;
    check_target(&target)?;
    let options = IngestOptions {
        format,
        write: WriteOptions { shard_bytes: args.shard_size, compress: args.compress, ..WriteOptions::default() },
        shard_rows: args.shard_rows,
        columns: args.columns.clone(),
        shuffle: args.shuffle.then_some((context.seed.unwrap_or(0), args.shuffle_blocks)),
        resize: args.resize.iter().cloned().collect::<BTreeMap<_, _>>(),
        threads: context.threads,
        memory_bytes: args.memory,
        // Processes that start together begin apart.
        first_unit: context.clock.now_unix_ms(),
    };
    let mut inputs = shards.inputs()?;
    let given = inputs.len();
    if args.append {
        inputs = not_yet_in(&target, inputs, &options)?;
    }
    let known = given - inputs.len();
    if !args.no_verify && !inputs.is_empty() && shards.digested_bytes() > 0 {
        verify(&shards, context)?;
    }
    let start_ns = context.clock.monotonic_ns();
    let (ingested, version) = match Manifest::latest(&target)?.filter(|_| known > 0 && inputs.is_empty()) {
        Some(version) => (None, version),
        None => {
            let task = context.progress.task("ingest", inputs.iter().map(|i| i.reader.rows()).sum(), "rows");
            let ingested = ingest(&inputs, &target, &options, |done, _| task.at(done, String::new))?;
            task.finish();
            let version = if args.append { append } else { commit }(&ingested, &options, &target)?;
            (Some(ingested), version)
        }
    };
    let elapsed_ns = context.clock.monotonic_ns() - start_ns;
    let (rows, made) = ingested.as_ref().map_or((0, 0), |ingested| (ingested.rows, ingested.made));
    let shards = ingested.map(|ingested| ingested.shards).unwrap_or_default();
    let bytes: u64 = shards.iter().map(|s| s.bytes).sum();
    let rate = rows as f64 / (elapsed_ns.max(1) as f64 / 1e9);
    let mut text = format!("{rows} rows in {} shards of {format}, {}\n", shards.len(), units::bytes(bytes));
    text.push_str(&format!("{made} made, {} found\n", shards.len() as u64 - made));
    if known > 0 {
        text.push_str(&format!("{known} of {given} shards of the source are in the dataset already\n"));
    }
    text.push_str(&format!("{}, {rate:.0} rows/s\n", units::duration_ns(elapsed_ns)));
    text.push_str(&format!("version {version}\n"));
    let json = json!({
        "source": args.source, "target": args.target, "format": format, "rows": rows, "bytes": bytes,
        "shards": shards.iter().map(|s| &s.key).collect::<Vec<_>>(), "made": made, "inputs": given, "inputs_known": known,
        "version": version, "elapsed_ns": elapsed_ns, "rows_per_second": rate,
    });
    Ok(Answer { text, json })
}

fn verify(shards: &Shards, context: &Context) -> Result<(), Failure> {
    let task = context.progress.task("verify", shards.digested_bytes(), "bytes");
    let mut done = 0;
    let changed = shards.changed(context.threads, |bytes| {
        done += bytes;
        task.at(done, String::new);
    })?;
    task.finish();
    changed.into_iter().next().map_or(Ok(()), |error| Err(error.into()))
}
