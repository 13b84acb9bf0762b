//! `updraft data inspect`: what is in a dataset.

use std::path::PathBuf;

use serde_json::{Value, json};
use updraft_base::units;
use updraft_data::shards::{Shards, UnreadColumn};
use updraft_data::statistics::{ColumnStatistics, NumberStatistics, is_label};
use updraft_data::{Cells, Kind as CellKind, PartialCells, personal};

use super::{label_of, parse_bytes, show_unread, summarized};
use crate::context::{Answer, Context};
use crate::failure::Failure;
use crate::output;
use crate::report::data::{BARS, DatasetCard, Sample, SampleCell, ShardCard, inspect_page};
use crate::table::{number, table};

/// Show a dataset: schema, statistics with histograms, label balance, sizes and samples
///
/// Statistics come from the manifest where it has them, and else from one pass over all rows in bounded memory. Least,
/// most and mean are exact, whole numbers beyond 2^53 to the nearest double; histograms have buckets within 1 % (within 20 %
/// from a manifest), distinct values are estimated beyond a thousand within 3 %. The page holds all that it shows and needs
/// no network.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The dataset.
    #[arg(value_name = "URL")]
    url: String,

    /// Also write a page with plots and samples.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Rows to show on the page, at most 10,000.
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = parse_samples)]
    samples: usize,

    /// Read all rows, even where the manifest has statistics.
    #[arg(long)]
    full: bool,

    /// The most memory that a block of rows may take.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_bytes)]
    memory: u64,
}

/// Rows on a page, at most: a browser opens that many pictures.
const SAMPLES_MAX: usize = 10_000;

fn parse_samples(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| *count <= SAMPLES_MAX);
    count.ok_or_else(|| format!("`{text}` is no number up to {SAMPLES_MAX}"))
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    if let Some(path) = &args.html {
        output::check_writable(path)?;
    }
    let (shards, unread) = Shards::open(&args.url, None, args.memory, &context.access())?.readable()?;
    let known = if args.full { None } else { shards.statistics() };
    let is_of_manifest = known.is_some();
    let statistics = match known {
        Some(statistics) => statistics,
        None => summarized(&shards.readers, context)?,
    };
    let card = card(&args.url, &shards, unread, context);
    let label = label_of(&statistics);
    if let Some(path) = &args.html {
        let samples = samples(&shards, args.samples)?;
        output::write(path, inspect_page(&card, &statistics, label, &samples).as_bytes())?;
    }
    let mut text = show(&card, &statistics, label, args.html.as_ref());
    text.push_str(&show_unread(&card.unread));
    if label.is_none()
        && let Some(uncounted) = statistics.iter().find(|s| is_label(&s.column))
    {
        let column = &uncounted.column;
        let hint = if is_of_manifest { " in the manifest; `--full` counts up to 65,536" } else { "" };
        text.push_str(&format!("\n`{column}` has too many values to be counted{hint}\n"));
    }
    let json = json!({
        "dataset": card,
        "columns": statistics.iter().map(column_json).collect::<Vec<_>>(),
        "label": label.map(|s| json!({ "column": s.column, "values": s.values })),
        "html": args.html,
    });
    Ok(Answer { text, json })
}

/// What there is to say of the dataset as a whole.
pub(super) fn card(url: &str, shards: &Shards, unread: Vec<UnreadColumn>, context: &Context) -> DatasetCard {
    let mut formats: Vec<String> = shards.facts.iter().map(|f| f.format.name().to_owned()).collect();
    formats.dedup();
    DatasetCard {
        url: url.to_owned(),
        version: shards.version.map(|v| v.to_string()),
        formats,
        rows: shards.readers.iter().map(|r| r.rows()).sum(),
        bytes: shards.facts.iter().map(|f| f.bytes).sum(),
        columns: shards.schema.columns.iter().map(|c| (c.name.clone(), c.kind.to_string())).collect(),
        unread,
        shards: shards
            .facts
            .iter()
            .map(|f| ShardCard { key: f.key.clone(), rows: f.samples, bytes: f.bytes })
            .collect(),
        created_unix_ms: context.clock.now_unix_ms(),
    }
}

/// Classes in the printed table: more than a screen of them is for the page and for `--json`.
const CLASSES_SHOWN: usize = 100;

fn show(
    card: &DatasetCard,
    statistics: &[ColumnStatistics],
    label: Option<&ColumnStatistics>,
    html: Option<&PathBuf>,
) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<12}{value}\n"));
    line("dataset", card.url.clone());
    if let Some(version) = &card.version {
        line("version", version.clone());
    }
    line("format", card.formats.join(", "));
    line("rows", card.rows.to_string());
    line("stored", format!("{} in {} shards", units::bytes(card.bytes), card.shards.len()));
    if let Some(path) = html {
        line("page", path.display().to_string());
    }
    let rows: Vec<Vec<String>> = card
        .columns
        .iter()
        .zip(statistics)
        .flat_map(|((name, kind), s)| {
            let distinct = format!("{}{}", if s.distinct.is_exact() { "" } else { "~" }, s.distinct.estimate());
            let first = vec![name.clone(), kind.clone(), s.missing.to_string(), distinct];
            let of_cells = [first, moments(s.numbers.as_ref(), s.quantile(0.5))].concat();
            let of_lengths = s.lengths.as_ref().map(|lengths| {
                [
                    vec![String::new(), "length".into(), String::new(), String::new()],
                    moments(Some(lengths), lengths.quantile(0.5)),
                ]
                .concat()
            });
            std::iter::once(of_cells).chain(of_lengths)
        })
        .collect();
    text.push('\n');
    let header = ["column", "kind", "missing", "distinct", "least", "mean", "std", "median", "most"];
    text.push_str(&table(&header, &[2, 3, 4, 5, 6, 7, 8], &rows));
    if let Some(label) = label {
        let values = label.values.as_deref().unwrap_or_default();
        let most = values.iter().map(|(_, n)| *n).max().unwrap_or(1).max(1);
        let bar = |n: u64| "#".repeat((40.0 * n as f64 / most as f64).round() as usize);
        let shown = values.iter().take(CLASSES_SHOWN);
        let rows: Vec<Vec<String>> = shown.map(|(value, n)| vec![value.to_string(), n.to_string(), bar(*n)]).collect();
        text.push('\n');
        text.push_str(&table(&[&label.column, "rows", ""], &[1], &rows));
        if values.len() > rows.len() {
            let least = values.iter().map(|(_, n)| *n).min().unwrap_or(0);
            let (first, all) = (rows.len(), values.len());
            text.push_str(&format!("the first {first} of {all} classes, which have {least} to {most} rows\n"));
        }
    }
    text
}

fn moments(numbers: Option<&NumberStatistics>, median: Option<f64>) -> Vec<String> {
    match numbers.filter(|n| n.count > 0) {
        Some(n) => {
            let median = median.map(number).unwrap_or_default();
            vec![number(n.min), number(n.mean), number(n.std()), median, number(n.max)]
        }
        None => vec![String::new(); 5],
    }
}

/// Statistics as programs want them: no sketches, but what they say.
pub(super) fn column_json(s: &ColumnStatistics) -> Value {
    let of = |n: &NumberStatistics, quantile: &dyn Fn(f64) -> Option<f64>| {
        json!({
            "count": n.count, "nan": n.nan, "min": n.min, "max": n.max, "mean": n.mean, "std": n.std(),
            "quantiles": { "p1": quantile(0.01), "p25": quantile(0.25), "p50": quantile(0.5), "p75": quantile(0.75),
                           "p99": quantile(0.99) },
            "histogram": n.histogram.bars(n.min, n.max, BARS),
        })
    };
    json!({
        "column": s.column, "rows": s.rows, "missing": s.missing,
        "distinct": s.distinct.estimate(), "distinct_is_exact": s.distinct.is_exact(),
        "numbers": s.numbers.as_ref().filter(|n| n.count > 0).map(|n| of(n, &|share| s.quantile(share))),
        "lengths": s.lengths.as_ref().filter(|n| n.count > 0).map(|n| of(n, &|share| n.quantile(share))),
        "values": s.values,
    })
}

/// Blocks that samples are taken of: reading one row may cost reading its block.
const SAMPLED_BLOCKS: usize = 4;

/// The longest side of a picture on the page; larger ones are made smaller.
const PICTURE_SIDE: usize = 320;

/// Characters of a text on the page, and bytes of it that are searched for what is personal.
const TEXT_CHARACTERS: usize = 400;
const TEXT_BYTES_SEARCHED: usize = 8 * TEXT_CHARACTERS;

/// Rows spread over the dataset, as the page shows them.
fn samples(shards: &Shards, count: usize) -> Result<Vec<Sample>, Failure> {
    let mut blocks: Vec<(usize, u64, u64)> = Vec::new();
    for (shard, reader) in shards.readers.iter().enumerate() {
        let mut first = 0;
        for rows in reader.blocks() {
            blocks.push((shard, first, *rows));
            first += rows;
        }
    }
    let taken = SAMPLED_BLOCKS.min(blocks.len()).min(count.max(1));
    let columns: Vec<usize> = (0..shards.schema.columns.len()).collect();
    let mut samples = Vec::with_capacity(count);
    for at in 0..taken {
        let (shard, first, rows) = blocks[at * blocks.len() / taken];
        let share = ((count * (at + 1) / taken - count * at / taken) as u64).min(rows);
        let numbers: Vec<u64> = (0..share).map(|i| first + i * rows / share).collect();
        let reader = &shards.readers[shard];
        let cells = reader.read_partial(&columns, &numbers)?;
        for (row, number) in numbers.iter().enumerate() {
            let kinds = shards.schema.columns.iter();
            let shown = kinds.zip(&cells).map(|(column, PartialCells { cells, gaps })| {
                match gaps.iter().find(|gap| gap.row == row) {
                    None => cell(&column.name, &column.kind, cells, row),
                    Some(gap) => SampleCell::Gap { column: column.name.clone(), reason: gap.fault.clone() },
                }
            });
            let shown = shown.collect();
            samples.push(Sample { place: reader.place(*number), cells: shown });
        }
    }
    Ok(samples)
}

fn cell(column: &str, kind: &CellKind, cells: &Cells, row: usize) -> SampleCell {
    let column = column.to_owned();
    let values = |tensor: &updraft_graph::Tensor, from: usize, width: usize| {
        let all = tensor.to_f64().unwrap_or_default();
        let shown: Vec<String> = all.iter().skip(from).take(width.min(4)).map(|v| number(*v)).collect();
        if width > 4 { format!("{}, … ({width})", shown.join(", ")) } else { shown.join(", ") }
    };
    match cells {
        Cells::Bytes(cells) => {
            let bytes = &cells[row];
            let preview = updraft_data::picture_preview(bytes, PICTURE_SIDE).filter(|_| *kind == CellKind::Bytes);
            if let Some(preview) = preview {
                let is_small = preview.longer_side <= 64;
                return SampleCell::Picture { column, mime: preview.mime, bytes: preview.bytes.to_vec(), is_small };
            }
            // Formats that do not tell text from bytes have text as bytes.
            let is_printed = |text: &str| text.chars().all(|c| !c.is_control() || c.is_whitespace());
            match std::str::from_utf8(bytes).ok().filter(|text| *kind == CellKind::Text || is_printed(text)) {
                Some(text) => {
                    // What is personal is masked before it is cut, where a part of it might not be recognised.
                    let cut = text.floor_char_boundary(TEXT_BYTES_SEARCHED);
                    let shown: String =
                        personal::redacted(&text.as_bytes()[..cut]).chars().take(TEXT_CHARACTERS).collect();
                    let is_cut = cut < text.len() || text.chars().count() > TEXT_CHARACTERS;
                    SampleCell::Text { column, text: if is_cut { format!("{shown}…") } else { shown } }
                }
                None => SampleCell::Value { column, value: units::bytes(bytes.len() as u64) },
            }
        }
        Cells::Numbers(tensor) => {
            let width = tensor.len().checked_div(cells.len()).unwrap_or(0);
            SampleCell::Value { column, value: values(tensor, row * width, width) }
        }
        Cells::Lists(lists) => SampleCell::Value { column, value: values(&lists[row], 0, lists[row].len()) },
    }
}
