//! Pages about datasets: what is in one, and whether it is as it should be. Statistics stand beside their plots.

use maud::{Markup, PreEscaped, html};
use serde::Serialize;
use updraft_base::units;
use updraft_data::statistics::{Bar, ColumnStatistics, NumberStatistics};
use updraft_data::validate::{Check, Validation};

use super::chart::{count_chart, histogram};
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
    Picture { mime: &'static str, bytes: Vec<u8>, is_small: bool },
    /// Text, masked where it is personal.
    Text(String),
    /// A number or two.
    Value { column: String, value: String },
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
        (distributions(statistics, &[]))
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
        (distributions(&validation.statistics, before))
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
            figure { (count_chart(&format!("Rows by {}", label.column), &rows)) }
            @if values.len() > rows.len() { p.muted { "The first " (rows.len()) " of " (values.len()) " classes." } }
        }
    }
}

fn sample_section(samples: &[Sample]) -> Markup {
    html! {
        section {
            h2 { "Samples" }
            p.muted { "Rows spread over the dataset. Personal data that is recognised is masked." }
            div.samples {
                @for sample in samples {
                    figure {
                        @for cell in &sample.cells {
                            @match cell {
                                SampleCell::Picture { mime, bytes, is_small } => {
                                    img.small[*is_small] alt=(sample.place) src={ "data:" (mime) ";base64," (PreEscaped(base64(bytes))) };
                                }
                                SampleCell::Text(text) => { pre { (text) } }
                                SampleCell::Value { .. } => {}
                            }
                        }
                        figcaption {
                            @for cell in &sample.cells {
                                @if let SampleCell::Value { column, value } = cell { (column) " " (value) br; }
                            }
                            (sample.place)
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

/// Histograms of all columns, over those of an earlier version where there is one.
fn distributions(statistics: &[ColumnStatistics], before: &[ColumnStatistics]) -> Markup {
    html! {
        section {
            h2 { "Distributions" }
            div.charts {
                @for s in statistics {
                    @let earlier = before.iter().find(|b| b.column == s.column);
                    @if let Some(numbers) = &s.numbers {
                        figure { (distribution(&s.column, numbers, earlier.and_then(|b| b.numbers.as_ref()))) }
                    } @else if let Some(values) = &s.values {
                        @let rows: Vec<(String, u64)> = values.iter().take(VALUES_SHOWN).map(|(v, n)| (v.to_string(), *n)).collect();
                        figure { (count_chart(&s.column, &rows)) }
                    }
                    @if let Some(lengths) = &s.lengths {
                        figure { (distribution(&format!("length of {}", s.column), lengths, earlier.and_then(|b| b.lengths.as_ref()))) }
                    }
                }
            }
        }
    }
}

fn distribution(title: &str, now: &NumberStatistics, before: Option<&NumberStatistics>) -> Markup {
    let low = before.map_or(now.min, |b| b.min.min(now.min));
    let high = before.map_or(now.max, |b| b.max.max(now.max));
    let bars = |n: &NumberStatistics| -> Vec<Bar> { n.histogram.bars(low, high, BARS) };
    let (now, before) = (bars(now), before.map(bars));
    let mut series: Vec<(&str, &str, &[Bar])> = Vec::new();
    if let Some(before) = &before {
        series.push(("before", "b", before));
    }
    series.push(("now", "a", &now));
    histogram(title, &series, number)
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
            @if rows.is_empty() { p.muted { "None." } } @else { figure { (count_chart("Rows by finding", &rows)) } }
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
                                td.number { (d.ks_p.map(|v| format!("{v:.2e}")).unwrap_or_default()) }
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
