//! Pages about datasets: what is in one, and whether it is as it should be. Statistics stand beside their plots.

use maud::{Markup, PreEscaped, html};
use serde::Serialize;
use updraft_base::units;
use updraft_data::shards::UnreadColumn;
use updraft_data::statistics::{Bar, CellValue, ColumnStatistics, NumberStatistics};
use updraft_data::validate::{Check, Validation};

use super::chart::{count_chart, histogram, share_chart};
use super::page::{cards, date, frame};
use crate::table::number;

/// Bars of a histogram.
pub(crate) const BARS: usize = 40;

/// Shards that a page lists.
const SHARDS_SHOWN: usize = 50;

/// Values that a page plots.
const VALUES_SHOWN: usize = 40;

/// What there is to say of a dataset as a whole.
#[derive(Debug, Serialize)]
pub(crate) struct DatasetCard {
    pub(crate) url: String,
    pub(crate) version: Option<String>,
    pub(crate) formats: Vec<String>,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    /// Name and kind of each column.
    pub(crate) columns: Vec<(String, String)>,
    /// Those that nobody can read.
    pub(crate) unread: Vec<UnreadColumn>,
    pub(crate) shards: Vec<ShardCard>,
    pub(crate) created_unix_ms: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct ShardCard {
    pub(crate) key: String,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
}

/// A row to be looked at.
pub(crate) struct Sample {
    pub(crate) place: String,
    pub(crate) cells: Vec<SampleCell>,
}

pub(crate) enum SampleCell {
    /// A picture: its type, its bytes, and whether it is so small that its pixels should show.
    Picture { column: String, mime: &'static str, bytes: Vec<u8>, is_small: bool },
    /// Text, masked where it is personal.
    Text { column: String, text: String },
    /// A number or two.
    Value { column: String, value: String },
    /// Nothing, or nothing that can be read, for a reason.
    Gap { column: String, reason: Option<String> },
}

impl SampleCell {
    fn column(&self) -> &str {
        match self {
            SampleCell::Picture { column, .. }
            | SampleCell::Text { column, .. }
            | SampleCell::Value { column, .. }
            | SampleCell::Gap { column, .. } => column,
        }
    }

    fn shown(&self) -> Markup {
        html! {
            @match self {
                SampleCell::Picture { column, mime, bytes, is_small } => {
                    img.small[*is_small] alt=(column) src={ "data:" (mime) ";base64," (PreEscaped(base64(bytes))) };
                }
                SampleCell::Text { text, .. } => { pre { (text) } }
                SampleCell::Value { value, .. } => { (value) }
                SampleCell::Gap { reason, .. } => { span.muted { (reason.as_deref().unwrap_or("missing")) } }
            }
        }
    }
}

/// The page of `data inspect`.
pub(crate) fn inspect_page(
    card: &DatasetCard,
    statistics: &[ColumnStatistics],
    label: Option<&ColumnStatistics>,
    samples: &[Sample],
) -> String {
    let sections = html! {
        (headline(card))
        @if let Some(label) = label { (balance(label)) }
        @if !samples.is_empty() { (sample_section(samples)) }
        (columns(card, statistics))
        (distributions(card, statistics, &[]))
        (shards(card))
    };
    frame(&card.url, &about(card), &sections)
}

/// The page of `data validate`.
pub(crate) fn validate_page(
    card: &DatasetCard,
    validation: &Validation,
    label: Option<&ColumnStatistics>,
    before: &[ColumnStatistics],
) -> String {
    let failed = validation.checks.iter().filter(|c| !c.passes()).count();
    let sections = html! {
        (cards(&[
            ("rows", validation.rows.to_string()),
            ("bad rows", validation.bad_rows.to_string()),
            ("checks failed", format!("{failed} of {}", validation.checks.len())),
            ("shards", card.shards.len().to_string()),
        ]))
        (checks(&validation.checks))
        (findings(validation))
        @if !validation.personal.is_empty() { (personal(validation)) }
        @if let Some(label) = label { (balance(label)) }
        @if !validation.drift.is_empty() { (drift(validation)) }
        (columns(card, &validation.statistics))
        (distributions(card, &validation.statistics, before))
        (shards(card))
    };
    frame(&format!("Validation of {}", card.url), &about(card), &sections)
}

fn about(card: &DatasetCard) -> String {
    let version = card.version.as_ref().map(|v| format!(", version {v}")).unwrap_or_default();
    let made = date(card.created_unix_ms);
    format!("{}{version}, looked at {made} with Updraft {}", card.formats.join(", "), env!("CARGO_PKG_VERSION"))
}

fn headline(card: &DatasetCard) -> Markup {
    cards(&[
        ("rows", card.rows.to_string()),
        ("columns", card.columns.len().to_string()),
        ("shards", card.shards.len().to_string()),
        ("stored", units::bytes(card.bytes)),
        ("stored a row", units::bytes(card.bytes / card.rows.max(1))),
    ])
}

fn balance(label: &ColumnStatistics) -> Markup {
    let values = label.values.as_deref().unwrap_or_default();
    let rows: Vec<(String, u64)> = values.iter().take(VALUES_SHOWN).map(|(v, n)| (v.to_string(), *n)).collect();
    html! {
        section {
            h2 { "Label balance" }
            figure.half { (count_chart(&format!("Rows by {}", label.column), &rows)) }
            @if values.len() > rows.len() { p.muted { "The first " (rows.len()) " of " (values.len()) " classes." } }
        }
    }
}

/// Columns beside a picture that a card has room for.
const CARD_COLUMNS_MAX: usize = 12;

/// Rows as cards around their pictures; where there are none, or much else, as a table.
fn sample_section(samples: &[Sample]) -> Markup {
    let is_picture = |cell: &SampleCell| matches!(cell, SampleCell::Picture { .. });
    let has_pictures = samples.iter().any(|sample| sample.cells.iter().any(is_picture));
    let is_cards = has_pictures && samples.iter().all(|sample| sample.cells.len() <= CARD_COLUMNS_MAX);
    html! {
        section {
            h2 { "Samples" }
            p.muted { "Rows spread over the dataset. Personal data that is recognised is masked." }
            @if is_cards { (sample_cards(samples)) } @else { (sample_table(samples)) }
        }
    }
}

fn sample_cards(samples: &[Sample]) -> Markup {
    html! {
        div.samples {
            @for sample in samples {
                figure {
                    @for cell in &sample.cells {
                        @if matches!(cell, SampleCell::Picture { .. } | SampleCell::Text { .. }) { (cell.shown()) }
                    }
                    figcaption {
                        @for cell in &sample.cells {
                            @if matches!(cell, SampleCell::Value { .. } | SampleCell::Gap { .. }) { (cell.column()) " " (cell.shown()) br; }
                        }
                        (sample.place)
                    }
                }
            }
        }
    }
}

fn sample_table(samples: &[Sample]) -> Markup {
    html! {
        div.scroll {
            table.list.rows {
                thead {
                    tr {
                        @for cell in samples.iter().take(1).flat_map(|sample| &sample.cells) { th { (cell.column()) } }
                        th { "row" }
                    }
                }
                tbody {
                    @for sample in samples {
                        tr {
                            @for cell in &sample.cells { td { (cell.shown()) } }
                            td.muted { (sample.place) }
                        }
                    }
                }
            }
        }
    }
}

fn columns(card: &DatasetCard, statistics: &[ColumnStatistics]) -> Markup {
    html! {
        section {
            h2 { "Columns" }
            div.scroll {
                table.list {
                    thead {
                        tr {
                            th { "column" } th { "kind" } th.number { "missing" } th.number { "distinct" }
                            th.number { "least" } th.number { "mean" } th.number { "std" } th.number { "median" } th.number { "most" }
                        }
                    }
                    tbody {
                        @for ((name, kind), s) in card.columns.iter().zip(statistics) {
                            tr {
                                td { (name) }
                                td { (kind) }
                                td.number { (s.missing) }
                                td.number { @if !s.distinct.is_exact() { "≈ " } (s.distinct.estimate()) }
                                (moments(s.numbers.as_ref(), s.quantile(0.5)))
                            }
                            @if let Some(lengths) = &s.lengths {
                                tr { td.muted colspan="4" { "length of " (name) } (moments(Some(lengths), lengths.quantile(0.5))) }
                            }
                        }
                        @for UnreadColumn { column, reason } in &card.unread {
                            tr { td { (column) } td.muted colspan="8" { "not read: " (reason) } }
                        }
                    }
                }
            }
        }
    }
}

fn moments(numbers: Option<&NumberStatistics>, median: Option<f64>) -> Markup {
    html! {
        @match numbers.filter(|n| n.count > 0) {
            Some(n) => {
                td.number { (number(n.min)) } td.number { (number(n.mean)) } td.number { (number(n.std())) }
                td.number { (median.map(number).unwrap_or_default()) } td.number { (number(n.max)) }
            }
            None => { td {} td {} td {} td {} td {} }
        }
    }
}

/// Distributions of all columns, beside those of an earlier version where there is one.
fn distributions(card: &DatasetCard, statistics: &[ColumnStatistics], before: &[ColumnStatistics]) -> Markup {
    html! {
        section {
            h2 { "Distributions" }
            p.muted { "Shares of the cells that are there." }
            div.charts {
                @for (s, (_, kind)) in statistics.iter().zip(&card.columns) {
                    @let earlier = before.iter().find(|b| b.column == s.column);
                    @let are_few = counted(s).is_some_and(|values| values.len() <= VALUES_PLOTTED);
                    @if are_few || s.numbers.is_none() {
                        @if let Some(values) = counted(s) { (values_figure(&s.column, values, earlier.and_then(counted))) }
                    } @else if let Some(numbers) = &s.numbers {
                        (distribution(&s.column, numbers, earlier.and_then(|b| b.numbers.as_ref())))
                    }
                    @if let Some(lengths) = &s.lengths {
                        @let unit = if kind.starts_with("list") { "elements" } else { "bytes" };
                        (distribution(&format!("length of {}, {unit}", s.column), lengths, earlier.and_then(|b| b.lengths.as_ref())))
                    }
                }
            }
        }
    }
}

/// Values that are plotted one by one rather than as a histogram.
const VALUES_PLOTTED: usize = 20;

/// The values of a column where all of its numbers were counted: infinities are not among them.
fn counted(s: &ColumnStatistics) -> Option<&[(CellValue, u64)]> {
    let values = s.values.as_deref()?;
    let all = s.numbers.as_ref().is_none_or(|n| n.count == values.iter().map(|(_, count)| count).sum::<u64>());
    all.then_some(values)
}

/// Values under one another, those of both versions in one order.
fn values_figure(title: &str, now: &[(CellValue, u64)], before: Option<&[(CellValue, u64)]>) -> Markup {
    let order = |a: &CellValue, b: &CellValue| match (a, b) {
        (CellValue::Number(a), CellValue::Number(b)) => a.total_cmp(b),
        _ => a.to_string().cmp(&b.to_string()),
    };
    let mut all: Vec<&CellValue> = now.iter().chain(before.unwrap_or_default()).map(|(value, _)| value).collect();
    all.sort_by(|a, b| order(a, b));
    all.dedup();
    let total = |of: &[(CellValue, u64)]| of.iter().map(|(_, count)| count).sum::<u64>().max(1) as f64;
    let share = |of: &[(CellValue, u64)], value: &CellValue| {
        of.iter().find(|(v, _)| v == value).map_or(0, |(_, count)| *count) as f64 / total(of)
    };
    let rows: Vec<(String, f64, Option<f64>)> = all
        .iter()
        .take(VALUES_SHOWN)
        .map(|value| (value.to_string(), share(now, value), before.map(|before| share(before, value))))
        .collect();
    html! {
        figure {
            (share_chart(title, &rows))
            @if all.len() > rows.len() { p.muted { "The first " (rows.len()) " of " (all.len()) " values." } }
        }
    }
}

/// How many times as wide as the middle 98 % the tails may be before they are left out of a plot: it would be of one bar.
const TAILS_MAX: f64 = 10.0;

fn distribution(title: &str, now: &NumberStatistics, before: Option<&NumberStatistics>) -> Markup {
    let both = || std::iter::once(now).chain(before).filter(|n| n.count > 0);
    if both().next().is_none() {
        return html! { figure { (histogram(title, &[], number)) p.muted { "No numbers." } } };
    }
    let over =
        |of: &dyn Fn(&NumberStatistics) -> f64, pick: fn(f64, f64) -> f64| both().map(of).reduce(pick).unwrap_or(0.0);
    let (min, max) = (over(&|n| n.min, f64::min), over(&|n| n.max, f64::max));
    let (p1, p99) = (
        over(&|n| n.quantile(0.01).unwrap_or(n.min), f64::min),
        over(&|n| n.quantile(0.99).unwrap_or(n.max), f64::max),
    );
    let has_tails = |tail: f64| p99 > p1 && tail > TAILS_MAX * (p99 - p1);
    let low = if has_tails(p1 - min) { p1 } else { min };
    let high = if has_tails(max - p99) { p99 } else { max };
    let outside = |n: &NumberStatistics| -> u64 {
        n.histogram.buckets().filter(|(from, to, _)| *to < low || *from > high).map(|(_, _, count)| count).sum()
    };
    let bars = |n: &NumberStatistics| -> Vec<Bar> {
        let mut bars = n.histogram.bars(low, high, BARS);
        // What lies outside is in the bars at the ends.
        for (from, to, count) in n.histogram.buckets() {
            let end = if to < low {
                bars.first_mut()
            } else if from > high {
                bars.last_mut()
            } else {
                None
            };
            if let Some(bar) = end {
                bar.count = (bar.count - count as f64).max(0.0);
            }
        }
        bars
    };
    let (bars_now, bars_before) = (bars(now), before.map(bars));
    let mut series: Vec<(&str, &str, &[Bar])> = Vec::new();
    if let Some(before) = &bars_before {
        series.push(("before", "b", before));
    }
    series.push(("now", "a", &bars_now));
    html! {
        figure {
            (histogram(title, &series, number))
            @if low > min || high < max {
                p.muted {
                    (outside(now)) " of " (now.count) " numbers lie outside of this plot; all lie from " (number(now.min)) " to " (number(now.max)) "."
                }
            }
        }
    }
}

fn shards(card: &DatasetCard) -> Markup {
    html! {
        section {
            h2 { "Shards" }
            @if card.shards.len() > SHARDS_SHOWN { p.muted { "The first " (SHARDS_SHOWN) " of " (card.shards.len()) "." } }
            div.scroll {
                table.list {
                    thead { tr { th { "object" } th.number { "rows" } th.number { "size" } } }
                    tbody {
                        @for shard in card.shards.iter().take(SHARDS_SHOWN) {
                            tr { td { (shard.key) } td.number { (shard.rows) } td.number { (units::bytes(shard.bytes)) } }
                        }
                    }
                }
            }
        }
    }
}

fn checks(checks: &[Check]) -> Markup {
    html! {
        section {
            h2 { "Checks" }
            div.scroll {
                table.list {
                    thead { tr { th { "check" } th { "column" } th.number { "found" } th.number { "limit" } th { "" } th { "" } } }
                    tbody {
                        @for check in checks {
                            tr {
                                td { (check.name) }
                                td { (check.column.as_deref().unwrap_or("")) }
                                td.number { (number(check.value)) }
                                td.number { @if let Some(limit) = check.limit { @if check.is_least { "≥ " } @else { "≤ " } (number(limit)) } }
                                td {
                                    @if check.limit.is_none() { span.muted { "reported" } }
                                    @else if check.passes() { span.passed { "kept" } }
                                    @else { span.failed { "broken" } }
                                }
                                td.muted { (check.note) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn findings(validation: &Validation) -> Markup {
    let rows: Vec<(String, u64)> = validation
        .findings
        .iter()
        .map(|f| (f.column.as_ref().map_or(f.rule.to_owned(), |c| format!("{c}: {}", f.rule)), f.rows))
        .collect();
    html! {
        section {
            h2 { "Findings" }
            @if rows.is_empty() { p.muted { "None." } } @else { figure.half { (count_chart("Rows by finding", &rows)) } }
            @for (finding, (name, count)) in validation.findings.iter().zip(&rows) {
                details {
                    summary { (name) " " span.muted { (count) " rows" } }
                    table.facts {
                        @for (place, reason) in &finding.places { tr { th scope="row" { (place) } td { (reason) } } }
                    }
                }
            }
        }
    }
}

fn personal(validation: &Validation) -> Markup {
    html! {
        section {
            h2 { "Personal data" }
            p.muted { "By pattern and checksum; values are masked." }
            @for count in &validation.personal {
                details {
                    summary { (count.column) ": " (count.kind.name()) " " span.muted { (count.values) " in " (count.rows) " rows" } }
                    table.facts {
                        @for (place, masked) in &count.places { tr { th scope="row" { (place) } td { (masked) } } }
                    }
                }
            }
        }
    }
}

fn drift(validation: &Validation) -> Markup {
    html! {
        section {
            h2 { "Drift" }
            p.muted { "Against the version compared with: population stability index, and the statistic of Kolmogorov and Smirnov with its probability by chance." }
            div.scroll {
                table.list {
                    thead { tr { th { "column" } th { "of" } th.number { "PSI" } th.number { "KS" } th.number { "p" } th.number { "missing before" } th.number { "missing now" } } }
                    tbody {
                        @for d in &validation.drift {
                            tr {
                                td { (d.column) } td { (d.of) }
                                td.number { (format!("{:.4}", d.psi)) }
                                td.number { (d.ks.map(|v| format!("{v:.4}")).unwrap_or_default()) }
                                td.number { (d.ks_p.map(number).unwrap_or_default()) }
                                td.number { (format!("{:.2} %", 100.0 * d.missing[0])) }
                                td.number { (format!("{:.2} %", 100.0 * d.missing[1])) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Base64 of RFC 4648, as data URLs take it.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (text, expected) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(text.as_bytes()), expected);
        }
    }
}
