//! Charts as SVG. Colours come from the page's style sheet, so that they follow light and dark.

use maud::{Markup, html};
use updraft_data::statistics::Bar;

/// One line, or a row of dots on a line.
pub(super) struct Series<'a> {
    pub(super) name: &'a str,
    /// A class of the style sheet: `a` or `b`.
    pub(super) class: &'a str,
    pub(super) has_dots: bool,
    pub(super) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 40.0;

/// A chart of some series over a common horizontal axis that starts at 0.
pub(super) fn line_chart(title: &str, x_label: &str, series: &[Series], show_y: fn(f64) -> String) -> Markup {
    let points = || series.iter().flat_map(|s| s.points.iter().copied());
    let x_max = points().map(|(x, _)| x).fold(1.0, f64::max);
    let (low, high) = points().fold((f64::MAX, f64::MIN), |(low, high), (_, y)| (low.min(y), high.max(y)));
    let y_ticks = ticks(low, high);
    let (y_min, y_max) = (y_ticks.first().copied().unwrap_or(0.0), y_ticks.last().copied().unwrap_or(1.0));
    let x_at = |x: f64| LEFT + x / x_max * (WIDTH - LEFT - RIGHT);
    let y_at = |y: f64| TOP + (y_max - y) / (y_max - y_min) * (HEIGHT - TOP - BOTTOM);
    // Elements without content are closed all the same: in SVG nothing closes by itself.
    html! {
        svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(title) {
            text.title x=(LEFT) y="18" { (title) }
            @for y in &y_ticks {
                line.grid x1=(LEFT) x2=(WIDTH - RIGHT) y1=(at(y_at(*y))) y2=(at(y_at(*y))) {}
                text.tick.end x=(LEFT - 8.0) y=(at(y_at(*y) + 4.0)) { (show_y(*y)) }
            }
            @for x in ticks(0.0, x_max).into_iter().filter(|x| *x <= x_max) {
                text.tick.middle x=(at(x_at(x))) y=(HEIGHT - BOTTOM + 18.0) { (x) }
            }
            text.tick.middle x=((LEFT + WIDTH - RIGHT) / 2.0) y=(HEIGHT - 6.0) { (x_label) }
            @for (i, s) in series.iter().enumerate() {
                polyline.line.(s.class) points=(s.points.iter().map(|(x, y)| format!("{},{}", at(x_at(*x)), at(y_at(*y)))).collect::<Vec<_>>().join(" ")) {}
                @if s.has_dots {
                    @for (x, y) in &s.points {
                        circle.dot.(s.class) cx=(at(x_at(*x))) cy=(at(y_at(*y))) r="3.5" {
                            title { (s.name) " at " (x) ": " (show_y(*y)) }
                        }
                    }
                }
                // Names at the right, one beside the other, the last series outermost.
                @let right = WIDTH - RIGHT - 110.0 * (series.len() - 1 - i) as f64;
                rect.key.(s.class) x=(right - 104.0) y="11" width="14" height="4" rx="2" {}
                text.tick x=(right - 84.0) y="18" { (s.name) }
            }
        }
    }
}

/// One point of a scatter chart.
pub(super) struct Point<'a> {
    pub(super) name: &'a str,
    pub(super) x: f64,
    pub(super) y: f64,
    /// A class of the style sheet: `a`, `b` or `muted`.
    pub(super) class: &'a str,
    /// Whether the name stands beside it, and not only where one points at it.
    pub(super) is_named: bool,
}

/// Points over two axes, the horizontal one from 0; those of class `a` are joined from left to right.
pub(super) fn scatter_chart(
    title: &str,
    x_label: &str,
    points: &[Point],
    show_x: fn(f64) -> String,
    show_y: fn(f64) -> String,
) -> Markup {
    let x_ticks = ticks(0.0, points.iter().map(|p| p.x).fold(0.0, f64::max));
    let (low, high) = points.iter().fold((f64::MAX, f64::MIN), |(low, high), p| (low.min(p.y), high.max(p.y)));
    let y_ticks = ticks(low, high);
    let x_max = x_ticks.last().copied().unwrap_or(1.0);
    let (y_min, y_max) = (y_ticks.first().copied().unwrap_or(0.0), y_ticks.last().copied().unwrap_or(1.0));
    let x_at = |x: f64| LEFT + x / x_max * (WIDTH - LEFT - RIGHT);
    let y_at = |y: f64| TOP + (y_max - y) / (y_max - y_min) * (HEIGHT - TOP - BOTTOM);
    let mut joined: Vec<&Point> = points.iter().filter(|p| p.class == "a").collect();
    joined.sort_by(|a, b| a.x.total_cmp(&b.x));
    let line: Vec<String> = joined.iter().map(|p| format!("{},{}", at(x_at(p.x)), at(y_at(p.y)))).collect();
    html! {
        svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(title) {
            text.title x=(LEFT) y="18" { (title) }
            @for y in &y_ticks {
                line.grid x1=(LEFT) x2=(WIDTH - RIGHT) y1=(at(y_at(*y))) y2=(at(y_at(*y))) {}
                text.tick.end x=(LEFT - 8.0) y=(at(y_at(*y) + 4.0)) { (show_y(*y)) }
            }
            @for x in &x_ticks {
                text.tick.middle x=(at(x_at(*x))) y=(HEIGHT - BOTTOM + 18.0) { (show_x(*x)) }
            }
            text.tick.middle x=((LEFT + WIDTH - RIGHT) / 2.0) y=(HEIGHT - 6.0) { (x_label) }
            polyline.line.a points=(line.join(" ")) {}
            @for p in points {
                circle.dot.(p.class) cx=(at(x_at(p.x))) cy=(at(y_at(p.y))) r="4.5" {
                    title { (p.name) ": " (show_x(p.x)) ", " (show_y(p.y)) }
                }
                @if p.is_named {
                    // On the side where there is room.
                    @if x_at(p.x) > WIDTH / 2.0 {
                        text.tick.end x=(at(x_at(p.x) - 8.0)) y=(at(y_at(p.y) - 7.0)) { (p.name) }
                    } @else {
                        text.tick x=(at(x_at(p.x) + 8.0)) y=(at(y_at(p.y) - 7.0)) { (p.name) }
                    }
                }
            }
        }
    }
}

/// Bars under one another, their lengths by the logarithm of the values; 0 has no bar.
pub(super) fn bar_chart(title: &str, rows: &[(&str, f64)], show: fn(f64) -> String) -> Markup {
    const ROW: f64 = 18.0;
    const LABELS: f64 = 220.0;
    const VALUES: f64 = 70.0;
    let height = TOP + ROW * rows.len() as f64 + 8.0;
    let logs = || rows.iter().filter(|(_, v)| *v > 0.0).map(|(_, v)| v.log10());
    let (low, high) = (logs().fold(f64::MAX, f64::min).floor(), logs().fold(f64::MIN, f64::max));
    let length = |value: f64| {
        let share = if value > 0.0 { (value.log10() - low + 0.1) / (high - low + 0.1) } else { 0.0 };
        share * (WIDTH - LABELS - VALUES)
    };
    html! {
        svg viewBox={ "0 0 " (WIDTH) " " (height) } role="img" aria-label=(title) {
            text.title x="0" y="18" { (title) }
            @for (i, (name, value)) in rows.iter().enumerate() {
                @let y = TOP + ROW * i as f64;
                text.tick.end x=(LABELS - 8.0) y=(at(y + 12.0)) { (shortened(name)) title { (name) } }
                rect.key.a x=(LABELS) y=(at(y + 2.0)) width=(at(length(*value))) height=(ROW - 5.0) rx="2" {}
                text.tick x=(at(LABELS + length(*value) + 6.0)) y=(at(y + 12.0)) { (show(*value)) }
            }
        }
    }
}

/// One distribution as bars side by side, or two over each other; each as shares of its own sum.
pub(super) fn histogram(title: &str, series: &[(&str, &str, &[Bar])], show: fn(f64) -> String) -> Markup {
    let bars = || series.iter().flat_map(|(_, _, bars)| bars.iter());
    let low = bars().map(|b| b.low).fold(f64::MAX, f64::min);
    let high = bars().map(|b| b.high).fold(f64::MIN, f64::max);
    type Share = (f64, f64, f64);
    let shares: Vec<(&str, &str, Vec<Share>)> = series
        .iter()
        .map(|(name, class, bars)| {
            let sum = bars.iter().map(|b| b.count).sum::<f64>().max(1.0);
            (*name, *class, bars.iter().map(|b| (b.low, b.high, b.count / sum)).collect())
        })
        .collect();
    let most = shares.iter().flat_map(|(_, _, bars)| bars.iter().map(|b| b.2)).fold(0.0, f64::max);
    let y_ticks = ticks(0.0, most.max(1e-6));
    let y_max = y_ticks.last().copied().unwrap_or(1.0);
    // One number alone stands in the middle; halves, because the whole range may be more than there are numbers.
    let (middle, half) = (low / 2.0 + high / 2.0, if high > low { high / 2.0 - low / 2.0 } else { 1.0 });
    let x_at = |x: f64| LEFT + ((x / 2.0 - middle / 2.0) / half + 0.5) * (WIDTH - LEFT - RIGHT);
    let y_at = |y: f64| TOP + (y_max - y) / y_max * (HEIGHT - TOP - BOTTOM);
    html! {
        svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(title) {
            text.title x=(LEFT) y="18" { (title) }
            @for y in &y_ticks {
                line.grid x1=(LEFT) x2=(WIDTH - RIGHT) y1=(at(y_at(*y))) y2=(at(y_at(*y))) {}
                text.tick.end x=(LEFT - 8.0) y=(at(y_at(*y) + 4.0)) { (format!("{:.*} %", usize::from(y_max < 0.05), 100.0 * y)) }
            }
            @for (x, text, class) in x_labels(low, high, x_at) {
                text.tick.(class) x=(at(x)) y=(HEIGHT - BOTTOM + 18.0) { (text) }
            }
            @for (i, (name, class, bars)) in shares.iter().enumerate() {
                @for (from, to, share) in bars.iter().filter(|b| b.2 > 0.0) {
                    rect.bar.(class) x=(at(x_at(*from))) y=(at(y_at(*share)))
                        width=(at((x_at(*to) - x_at(*from) - 1.0).max(3.0))) height=(at((y_at(0.0) - y_at(*share)).max(0.5))) {
                        title { (show(*from)) " to " (show(*to)) ": " (format!("{:.2} %", 100.0 * share)) }
                    }
                }
                @if shares.len() > 1 {
                    @let right = WIDTH - RIGHT - 110.0 * (shares.len() - 1 - i) as f64;
                    rect.key.(class) x=(right - 104.0) y="11" width="14" height="4" rx="2" {}
                    text.tick x=(right - 84.0) y="18" { (name) }
                }
            }
        }
    }
}

/// The labels under a plot: where, what, and how they are aligned; as many as there is room for.
fn x_labels(low: f64, high: f64, x_at: impl Fn(f64) -> f64) -> Vec<(f64, String, &'static str)> {
    // A letter is about so wide.
    const LETTER: f64 = 7.0;
    let ticks: Vec<f64> = ticks(low, high).into_iter().filter(|x| (low..=high).contains(x)).collect();
    let ticks = if ticks.is_empty() && low <= high { vec![low, high] } else { ticks };
    let step = ticks.windows(2).map(|pair| pair[1] - pair[0]).fold(f64::MAX, f64::min);
    let mut labels: Vec<(f64, String, &'static str)> = Vec::new();
    let mut room = 0.0;
    for tick in ticks {
        let (x, text) = (x_at(tick), tick_label(tick, step));
        let width = LETTER * text.chars().count() as f64;
        // What would stand out at a side is turned inwards.
        let (class, start) = match x {
            x if x + width / 2.0 > WIDTH => ("end", x - width),
            x if x - width / 2.0 < 0.0 => ("start", x),
            _ => ("middle", x - width / 2.0),
        };
        if start >= room {
            room = start + width + LETTER;
            labels.push((x, text, class));
        }
    }
    labels
}

/// A round number as short as it can be: `0.2`, `2e8`; all digits where the step needs them.
fn tick_label(tick: f64, step: f64) -> String {
    let size = tick.abs();
    if tick == 0.0 || (1e-4..1e6).contains(&size) || step < 1e15 && size >= 1e6 && size / step > 1e3 {
        format!("{tick}")
    } else {
        format!("{tick:e}")
    }
}

/// Bars under one another for shares of values, those of now over those of before where there are such.
pub(super) fn share_chart(title: &str, rows: &[(String, f64, Option<f64>)]) -> Markup {
    const LABELS: f64 = 150.0;
    const VALUES: f64 = 80.0;
    const BAR: f64 = 14.0;
    let has_before = rows.iter().any(|(_, _, before)| before.is_some());
    let row_height = if has_before { 2.0 * BAR + 6.0 } else { BAR + 6.0 };
    let height = TOP + row_height * rows.len() as f64 + 8.0;
    let most = rows.iter().flat_map(|(_, now, before)| [*now, before.unwrap_or(0.0)]).fold(0.0, f64::max);
    let length = |share: f64| if most > 0.0 { share / most * (WIDTH - LABELS - VALUES) } else { 0.0 };
    html! {
        svg viewBox={ "0 0 " (WIDTH) " " (at(height)) } role="img" aria-label=(title) {
            text.title x="0" y="18" { (title) }
            @if has_before {
                @for (i, (name, class)) in [("before", "b"), ("now", "a")].into_iter().enumerate() {
                    @let right = WIDTH - RIGHT - 110.0 * (1 - i) as f64;
                    rect.key.(class) x=(right - 104.0) y="11" width="14" height="4" rx="2" {}
                    text.tick x=(right - 84.0) y="18" { (name) }
                }
            }
            @for (i, (name, now, before)) in rows.iter().enumerate() {
                @let y = TOP + row_height * i as f64;
                text.tick.end x=(LABELS - 8.0) y=(at(y + row_height / 2.0 + 3.0)) { (shortened(name)) title { (name) } }
                @for (row, (class, share)) in std::iter::once(("a", *now)).chain(before.map(|before| ("b", before))).enumerate() {
                    @let y = y + BAR * row as f64 + 2.0;
                    rect.key.(class) x=(LABELS) y=(at(y)) width=(at(length(share))) height=(BAR - 1.0) rx="2" {}
                    text.tick x=(at(LABELS + length(share) + 6.0)) y=(at(y + 11.0)) { (format!("{:.1} %", 100.0 * share)) }
                }
            }
        }
    }
}

/// Bars under one another, their lengths in proportion to the values.
pub(super) fn count_chart(title: &str, rows: &[(String, u64)]) -> Markup {
    const ROW: f64 = 20.0;
    const LABELS: f64 = 150.0;
    const VALUES: f64 = 80.0;
    let height = TOP + ROW * rows.len() as f64 + 8.0;
    let most = rows.iter().map(|(_, n)| *n).max().unwrap_or(1).max(1);
    let length = |count: u64| count as f64 / most as f64 * (WIDTH - LABELS - VALUES);
    html! {
        svg viewBox={ "0 0 " (WIDTH) " " (height) } role="img" aria-label=(title) {
            text.title x="0" y="18" { (title) }
            @for (i, (name, count)) in rows.iter().enumerate() {
                @let y = TOP + ROW * i as f64;
                text.tick.end x=(LABELS - 8.0) y=(at(y + 13.0)) { (shortened(name)) title { (name) } }
                rect.key.a x=(LABELS) y=(at(y + 2.0)) width=(at(length(*count))) height=(ROW - 6.0) rx="2" {}
                text.tick x=(at(LABELS + length(*count) + 6.0)) y=(at(y + 13.0)) { (count) }
            }
        }
    }
}

/// The end of a name, which tells layers apart better than its beginning.
fn shortened(name: &str) -> String {
    const MOST: usize = 32;
    match name.chars().count().checked_sub(MOST) {
        Some(extra @ 1..) => format!("…{}", name.chars().skip(extra + 1).collect::<String>()),
        _ => name.to_owned(),
    }
}

/// A coordinate, to a tenth of a pixel.
fn at(coordinate: f64) -> String {
    format!("{coordinate:.1}")
}

/// Round numbers, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`; four to nine of them.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    if !(high - low).is_finite() || low > high {
        return vec![0.0, 1.0];
    }
    // A flat line gets room above and below.
    let range = if high - low > 1e-9 * high.abs() { high - low } else { high.abs().max(1e-3) };
    let power = 10f64.powf((range / 4.0).log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| range / (f * power) <= 7.0).unwrap_or(10.0);
    let step = factor * power;
    let (first, last) = ((low / step).floor(), (high / step).ceil());
    // Whole multiples, so that rounding errors do not add up.
    let count = (last - first).max(1.0) as usize;
    (0..=count).map(|i| round((first + i as f64) * step, step)).collect()
}

/// `value` without what floating point adds behind the digits of `step`.
fn round(value: f64, step: f64) -> f64 {
    let digits = (-step.log10().floor()).max(0.0) as i32;
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_hold_the_range() {
        for (low, high, expected) in [
            (0.0, 2000.0, vec![0.0, 500.0, 1000.0, 1500.0, 2000.0]),
            (1.48, 4.2, vec![1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]),
            (0.97, 0.991, vec![0.97, 0.975, 0.98, 0.985, 0.99, 0.995]),
            (0.5, 0.5, vec![0.5, 0.6]),
        ] {
            assert_eq!(ticks(low, high), expected, "{low} to {high}");
        }
        assert_eq!(ticks(f64::MAX, f64::MIN), [0.0, 1.0]);
    }

    #[test]
    fn labels_are_short_apart_and_inside() {
        let shown = |low: f64, high: f64| {
            let labels = x_labels(low, high, |x| LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT));
            for pair in labels.windows(2) {
                let reach = 3.5 * (pair[0].1.len() + pair[1].1.len()) as f64;
                assert!(pair[1].0 - pair[0].0 >= reach || pair[1].2 == "end", "{labels:?}");
            }
            labels.into_iter().map(|(_, text, _)| text).collect::<Vec<_>>()
        };
        assert_eq!(shown(0.0, 1.0), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(shown(0.0, 1e9), ["0", "2e8", "4e8", "6e8", "8e8", "1e9"]);
        assert_eq!(shown(1990.0, 2026.0), ["1990", "2000", "2010", "2020"]);
        // A day in milliseconds since 1970: all digits, where there is room.
        let day = shown(1.7e12, 1.7e12 + 8.64e7);
        assert!(day.iter().all(|label| label.len() == 13) && (3..6).contains(&day.len()), "{day:?}");
    }
}
