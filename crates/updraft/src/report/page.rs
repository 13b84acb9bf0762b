//! The page: one file with everything in it.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use updraft_base::units;
use updraft_data::{Stage, StageTimes};
use updraft_train::metrics::Metrics;
use updraft_train::waits::Waits;

use super::chart::{Series, line_chart};
use super::{Report, TrainingCard, optimize};

/// The report as a page that needs nothing else.
pub(crate) fn page(report: &Report) -> String {
    let model = &report.model;
    let about = format!(
        "{}, trained {} with Updraft {}, seed {}",
        model.network,
        date(report.created_unix_ms),
        report.updraft_version,
        report.seed
    );
    let sections = html! {
        (headline(report))
        @if let Some(account) = &report.optimization { (optimize::sections(account)) }
        (curves(&report.training))
        @if let Some(waits) = &report.training.waits { (waiting(waits)) }
        @if let Some(test) = &report.test { (confusion(test, classes(report))) }
        (model_card(report))
        (data(report))
        (stages(report))
        (lineage(report))
        section {
            h2 { "Recipe" }
            pre { (report.recipe) }
        }
    };
    frame(&report.name, &about, &sections)
}

/// A page of sections under a heading, with everything in it.
pub(super) fn frame(name: &str, about: &str, sections: &Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (name) " · Updraft report" }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                main {
                    header {
                        h1 { (name) }
                        p.muted { (about) }
                    }
                    (sections)
                }
            }
        }
    }
    .into_string()
}

/// The numbers that one looks for first, each with its name.
pub(super) fn cards(cards: &[(&str, String)]) -> Markup {
    html! {
        section.cards {
            @for (name, value) in cards {
                div.card { div.value { (value) } div.muted { (name) } }
            }
        }
    }
}

/// The numbers that one looks for first.
fn headline(report: &Report) -> Markup {
    let record = &report.training.history.record;
    let mut cards: Vec<(&str, String)> = Vec::new();
    if let Some(test) = &report.test {
        cards.extend(test.accuracy.map(|a| ("test accuracy", percent(a))));
        cards.push(("test loss", format!("{:.4}", test.loss)));
    }
    if let Some(best) = record.history.evaluations.iter().find(|e| record.best.is_some_and(|b| b.step == e.step)) {
        cards.push(("best validation loss", format!("{:.4}", best.metrics.loss)));
    }
    cards.push(("training time", units::duration_ns(report.training.elapsed_ns)));
    cards.push(("steps", record.step.to_string()));
    cards.push(("parameters", units::count(report.model.parameters)));
    cards.push(("model size", units::bytes(report.model.size_bytes)));
    if let Some(cost) = &report.model.cost_per_sample {
        cards.push(("FLOPs a sample", units::count(cost.flops)));
    }
    self::cards(&cards)
}

fn curves(training: &TrainingCard) -> Markup {
    let history = &training.history.record.history;
    let loss = history.loss.points().iter().map(|p| (p.step as f64, p.loss)).collect();
    let mut losses = vec![Series { name: "training", class: "a", has_dots: false, points: loss }];
    let of = |metric: fn(&Metrics) -> Option<f64>| -> Vec<(f64, f64)> {
        history.evaluations.iter().filter_map(|e| Some((e.step as f64, metric(&e.metrics)?))).collect()
    };
    let validation = of(|m| Some(m.loss));
    if !validation.is_empty() {
        losses.push(Series { name: "validation", class: "b", has_dots: true, points: validation });
    }
    let accuracy = of(|m| m.accuracy);
    html! {
        section.charts {
            figure { (line_chart("Loss", "step", &losses, |y| y.to_string())) }
            @if !accuracy.is_empty() {
                figure {
                    (line_chart("Accuracy", "step",
                        &[Series { name: "validation", class: "b", has_dots: true, points: accuracy }], percent))
                }
            }
        }
    }
}

/// What training waited for: the share of each stage, and the course over the steps.
fn waiting(waits: &Waits) -> Markup {
    let steps = waits.stalls.batches.max(1) as f64;
    let ms = |ns: u64| ns as f64 / 1e6;
    let course = |of: fn(&StageTimes) -> u64| -> Vec<(f64, f64)> {
        waits.points().iter().map(|p| (p.step as f64, ms(of(&p.waited)))).collect()
    };
    let series = [
        Series { name: "all stages", class: "a", has_dots: false, points: course(StageTimes::total_ns) },
        Series { name: "fetch", class: "b", has_dots: false, points: course(|t| t.fetch_ns) },
    ];
    html! {
        section {
            h2 { "Waiting for data" }
            @if let Some(sentence) = waits.sentence() { p.muted { "Training " (sentence) "." } }
            div.scroll {
                table.list {
                    thead {
                        tr {
                            th { "stage" } th.number { "waited" } th.number { "of the time" }
                            th.number { "a step" } th.number { "spent by the loader" }
                        }
                    }
                    tbody {
                        @for stage in Stage::ALL {
                            @let waited_ns = waits.stalls.waited.of(stage);
                            tr {
                                td { (stage.name()) }
                                td.number { (units::duration_ns(waited_ns)) }
                                td.number { (share(waited_ns, waits.elapsed_ns)) }
                                td.number { (format!("{:.3} ms", ms(waited_ns) / steps)) }
                                td.number { (units::duration_ns(waits.stalls.made.of(stage))) }
                            }
                        }
                    }
                }
            }
            figure { (line_chart("Waited in a step, ms", "step", &series, |y| y.to_string())) }
        }
    }
}

/// Names of the classes, or their numbers.
fn classes(report: &Report) -> Vec<String> {
    let named = report.data.iter().find_map(|d| d.facts.classes.clone());
    let count = report.test.as_ref().and_then(|t| t.confusion.as_ref()).map_or(0, Vec::len);
    named.filter(|n| n.len() == count).unwrap_or_else(|| (0..count).map(|c| c.to_string()).collect())
}

fn confusion(test: &Metrics, classes: Vec<String>) -> Markup {
    let Some(matrix) = &test.confusion else { return html! {} };
    let recall = |class: usize| share(matrix[class][class], matrix[class].iter().sum());
    let precision = |class: usize| share(matrix[class][class], matrix.iter().map(|row| row[class]).sum());
    // Shades by the share of the row, so that rare classes are seen as well as common ones; the root lifts small errors.
    let shade = |row: &[u64], count: u64| {
        let sum: u64 = row.iter().sum();
        if sum == 0 { 0.0 } else { (count as f64 / sum as f64).sqrt() }
    };
    html! {
        section {
            h2 { "Confusion matrix" }
            p.muted { "Test labels by class (rows) and prediction (columns); " (test.samples) " samples." }
            div.scroll {
                table.confusion {
                    thead {
                        tr {
                            th {}
                            @for class in &classes { th scope="col" { (class) } }
                            th.summary scope="col" { "recall" }
                        }
                    }
                    tbody {
                        @for (class, row) in matrix.iter().enumerate() {
                            tr {
                                th scope="row" { (classes[class]) }
                                @for (predicted, count) in row.iter().enumerate() {
                                    td.hit[class == predicted].miss[class != predicted && *count > 0]
                                        style={ "--shade:" (format!("{:.3}", shade(row, *count))) }
                                        title={ (classes[class]) " taken for " (classes[predicted]) ": " (count) } {
                                        @if *count > 0 { (count) }
                                    }
                                }
                                td.summary { (recall(class)) }
                            }
                        }
                        tr {
                            th.summary scope="row" { "precision" }
                            @for class in 0..classes.len() { td.summary { (precision(class)) } }
                            td.summary {}
                        }
                    }
                }
            }
        }
    }
}

fn model_card(report: &Report) -> Markup {
    let model = &report.model;
    let training = &report.training;
    let record = &training.history.record;
    let unknown = || "not known".to_owned();
    let cost = model.cost_per_sample.as_ref();
    let mut rows: Vec<(&str, String)> = vec![
        ("network", model.network.clone()),
        ("digest", model.digest.to_string()),
        ("inputs", model.inputs.join(", ")),
        ("outputs", model.outputs.join(", ")),
        ("parameters", format!("{} ({})", units::count(model.parameters), model.parameters)),
        ("file", format!("{} ({} bytes)", units::bytes(model.size_bytes), model.size_bytes)),
        ("FLOPs a sample", cost.map_or_else(unknown, |c| format!("{} ({})", units::count(c.flops), c.flops))),
        (
            "bytes moved a sample",
            cost.map_or_else(unknown, |c| {
                format!("{} read, {} written", units::bytes(c.read_bytes), units::bytes(c.written_bytes))
            }),
        ),
        ("operators", model.operators.iter().map(|(op, n)| format!("{n} {op}")).collect::<Vec<_>>().join(", ")),
        (
            "training",
            format!(
                "{} of {} steps of {} samples in {}, {:.0} samples/s on {} threads, validation and checkpoints included",
                record.step,
                training.history.steps,
                training.history.batch,
                units::duration_ns(training.elapsed_ns),
                training.samples_per_second,
                report.threads,
            ),
        ),
    ];
    rows.extend(record.best.map(|b| ("best validation", format!("{:.5} after step {}", b.value, b.step))));
    html! {
        section {
            h2 { "Model card" }
            table.facts {
                @for (name, value) in rows { tr { th scope="row" { (name) } td { (value) } } }
            }
        }
    }
}

fn data(report: &Report) -> Markup {
    html! {
        section {
            h2 { "Data" }
            div.scroll {
                table.list {
                    thead { tr { th { "split" } th.number { "samples" } th { "tensors" } th { "content" } } }
                    tbody {
                        @for card in &report.data {
                            tr {
                                td { (card.split) }
                                td.number { (card.facts.samples) }
                                td { (card.facts.tensors.iter().map(|t| format!("{}: {}{:?}", t.name, t.dtype, t.shape)).collect::<Vec<_>>().join(", ")) }
                                td.digest { (card.facts.digest) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn stages(report: &Report) -> Markup {
    html! {
        section {
            h2 { "Stages" }
            div.scroll {
                table.list {
                    thead { tr { th { "stage" } th.number { "time" } th { "artifact" } } }
                    tbody {
                        @for done in &report.stages {
                            tr {
                                td { (done.stage) }
                                td.number { @if done.reused { "reused" } @else { (units::duration_ns(done.elapsed_ns)) } }
                                td.digest { (done.digest) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn lineage(report: &Report) -> Markup {
    html! {
        section {
            h2 { "Lineage" }
            p.muted { "What the model came from, nearest first." }
            @for artifact in &report.lineage {
                details {
                    summary { (artifact.origin.kind) " " span.digest { (artifact.digest) } }
                    table.facts {
                        tr { th scope="row" { "size" } td { (units::bytes(artifact.size_bytes)) } }
                        @for parent in &artifact.origin.parents {
                            tr { th scope="row" { "from" } td.digest { (parent) } }
                        }
                        @for (name, version) in &artifact.origin.versions {
                            tr { th scope="row" { "made by" } td { (name) " " (version) } }
                        }
                        tr { th scope="row" { "asked for" } td.digest { (artifact.origin.recipe) } }
                    }
                }
            }
        }
    }
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

fn share(part: u64, whole: u64) -> String {
    if whole == 0 { "–".to_owned() } else { format!("{:.1} %", 100.0 * part as f64 / whole as f64) }
}

/// The date of a moment, in the Gregorian calendar and UTC: Howard Hinnant's `civil_from_days`
/// (<https://howardhinnant.github.io/date_algorithms.html>).
pub(super) fn date(unix_ms: u64) -> String {
    let days = unix_ms / 86_400_000 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months count from March, so that the leap day is the last of its year.
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year_of_era + era * 400 + next_year;
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (days, expected) in
            [(0, "1970-01-01"), (11_016, "2000-02-29"), (11_017, "2000-03-01"), (20_454, "2026-01-01")]
        {
            assert_eq!(date(days * 86_400_000 + 1), expected);
        }
    }
}
