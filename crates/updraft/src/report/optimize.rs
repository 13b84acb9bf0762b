//! The sections about how a model was made smaller or faster.

use maud::{Markup, html};
use updraft_base::units;
use updraft_compress::measure::Metric;
use updraft_compress::search::{Decision, Trial};

use super::chart::{Point, bar_chart, scatter_chart};
use crate::stage::optimize::Account;
use crate::verb::optimize::{metric_value, show_drop};

/// Before and after, the front, what units alone do, what became of each node, and all that was tried.
pub(super) fn sections(account: &Account) -> Markup {
    let outcome = &account.outcome;
    html! {
        (before_and_after(account))
        section.charts {
            figure { (front(account)) }
            @if !outcome.sensitivity.is_empty() { figure { (sensitivity(account)) } }
        }
        @if !outcome.decisions.is_empty() { (decisions(&outcome.decisions)) }
        (trials(account))
    }
}

fn before_and_after(account: &Account) -> Markup {
    let outcome = &account.outcome;
    let (Some(before), Some(after)) = (outcome.trials.first(), outcome.trials.get(outcome.chosen)) else {
        return html! {};
    };
    let judgement = after.holdout.as_ref().or(after.search.as_ref());
    let time = |trial: &Trial| trial.speed.as_ref().map(|s| units::duration_ns(s.latency_ns.estimate as u64));
    let cost = |trial: &Trial| Some(units::duration_ns(trial.speed.as_ref()?.cost_ns?.estimate as u64));
    let size = |trial: &Trial| trial.size_bytes.map(units::bytes);
    let share = |value: Option<f64>| value.map(|v| format!("{:.2} of it", v));
    let of_sizes = || Some(after.size_bytes? as f64 / before.size_bytes? as f64);
    let of_costs = || Some(after.speed.as_ref()?.cost_ns?.estimate / before.speed.as_ref()?.cost_ns?.estimate);
    let of_times = || Some(after.speed.as_ref()?.latency_ratio.estimate);
    let rows = [
        ("model", [Some(before.name.clone()), Some(after.name.clone()), None]),
        (
            account.metric.name(),
            [
                judgement.map(|j| metric_value(account.metric, j.original)),
                judgement.map(|j| metric_value(account.metric, j.candidate)),
                judgement.map(|j| format!("drop {}", show_drop(j))),
            ],
        ),
        ("time of one answer", [time(before), time(after), share(of_times())]),
        ("time a sample in large batches", [cost(before), cost(after), share(of_costs())]),
        ("size", [size(before), size(after), share(of_sizes())]),
    ];
    let samples = judgement.map_or(0, |j| j.samples);
    html! {
        section {
            h2 { "Before and after" }
            p.muted {
                "The " (account.metric.name()) " is that of " (samples) " samples that the search never saw; intervals hold together with "
                (format!("{:.0} %", 100.0 * (1.0 - account.alpha))) " confidence. At most " (format!("{:.2} %", 100.0 * account.max_drop))
                " may be lost. Times were measured in turns on " (account.machine) "."
            }
            table.list {
                thead { tr { th {} th { "before" } th { "after" } th {} } }
                tbody {
                    @for (name, [before, after, note]) in &rows {
                        tr {
                            th scope="row" { (name) }
                            td { (before.as_deref().unwrap_or("–")) }
                            td { (after.as_deref().unwrap_or("–")) }
                            td { (note.as_deref().unwrap_or("")) }
                        }
                    }
                }
            }
            @if let Some(problem) = account.unmet() { p { (problem) "." } }
            @if outcome.is_cut_short { p { "The time limit ended the search." } }
            @if let Some(elsewhere) = &account.on_avx2 {
                p {
                    "On processors with AVX2 and without VNNI, where sums of pairs saturate, its " (account.metric.name()) " is "
                    (metric_value(account.metric, elsewhere.candidate)) " instead of "
                    (metric_value(account.metric, elsewhere.original)) " (emulated on " (elsewhere.samples) " samples)."
                }
            }
        }
    }
}

/// Accuracy over latency: the front in a line, the rest beside it.
fn front(account: &Account) -> Markup {
    let outcome = &account.outcome;
    let points: Vec<Point> = outcome
        .trials
        .iter()
        .enumerate()
        .filter_map(|(i, trial)| {
            let judgement = trial.search.as_ref().filter(|_| trial.refused.is_none())?;
            let (is_chosen, is_front) = (i == outcome.chosen, outcome.front.contains(&i));
            Some(Point {
                name: &trial.name,
                x: trial.speed.as_ref()?.latency_ns.estimate / 1e6,
                y: judgement.candidate,
                class: match (is_chosen, is_front) {
                    (true, _) => "b",
                    (false, true) => "a",
                    (false, false) => "muted",
                },
                is_named: is_chosen || i == 0,
            })
        })
        .collect();
    let show_y: fn(f64) -> String = match account.metric {
        Metric::Accuracy => super::page::percent,
        Metric::Perplexity | Metric::Loss => |y| format!("{y}"),
    };
    let title = format!("{} over latency, on the search split", capitalized(account.metric.name()));
    scatter_chart(&title, "ms an answer", &points, |x| format!("{x:.3}"), show_y)
}

/// The most units that a chart shows; the table of decisions has them all.
const UNITS_SHOWN: usize = 24;

fn sensitivity(account: &Account) -> Markup {
    let mut units: Vec<(&str, f64)> =
        account.outcome.sensitivity.iter().map(|s| (s.unit.as_str(), s.divergence)).collect();
    units.sort_by(|a, b| b.1.total_cmp(&a.1));
    units.truncate(UNITS_SHOWN);
    bar_chart("Divergence of the outputs with one unit in int8", &units, |v| format!("{v:.1e}"))
}

fn decisions(decisions: &[Decision]) -> Markup {
    html! {
        section {
            h2 { "What became of each part" }
            div.scroll {
                table.list {
                    thead { tr { th { "part" } th { "form" } th { "why" } } }
                    tbody {
                        @for decision in decisions {
                            tr { td { (decision.unit) } td { (decision.form) } td { (decision.reason) } }
                        }
                    }
                }
            }
        }
    }
}

fn trials(account: &Account) -> Markup {
    let outcome = &account.outcome;
    let shown = |text: Option<String>| text.unwrap_or_else(|| "–".to_owned());
    html! {
        section {
            h2 { "What was tried" }
            p.muted {
                "Drops on the search split of " (account.splits.search) " samples, looked at until the answer was clear; ranges from "
                (account.splits.calibration) " other samples. " (outcome.front.len()) " of " (outcome.trials.len())
                " are on the front of drop, latency, size and cost."
            }
            div.scroll {
                table.list {
                    thead {
                        tr {
                            th { "model" } th { "tried as" } th.number { "divergence" } th.number { "drop" } th.number { "samples" }
                            th.number { "time" } th.number { "size" } th { "" }
                        }
                    }
                    tbody {
                        @for (i, trial) in outcome.trials.iter().enumerate() {
                            tr.chosen[i == outcome.chosen] {
                                td { (trial.name) }
                                td { (trial.reason) }
                                td.number { (shown(trial.divergence.map(|d| format!("{d:.1e}")))) }
                                td.number { (shown(trial.search.as_ref().map(show_drop))) }
                                td.number { (shown(trial.search.as_ref().map(|j| j.samples.to_string()))) }
                                td.number { (shown(trial.speed.as_ref().map(|s| format!("{:.2}", s.latency_ratio.estimate)))) }
                                td.number { (shown(trial.size_bytes.map(units::bytes))) }
                                td { (note(account, i, trial)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn note(account: &Account, index: usize, trial: &Trial) -> String {
    let outcome = &account.outcome;
    match &trial.refused {
        Some(reason) => reason.clone(),
        None if index == outcome.chosen => "chosen".to_owned(),
        None if outcome.front.contains(&index) => "on the front".to_owned(),
        None if trial.search.is_none() && trial.divergence.is_some() => "compared by divergence only".to_owned(),
        None => String::new(),
    }
}

fn capitalized(word: &str) -> String {
    let mut characters = word.chars();
    characters.next().map(|first| first.to_uppercase().collect::<String>() + characters.as_str()).unwrap_or_default()
}
