//! Numbers for people: three significant digits and a unit.

/// Bytes in binary units: `28 B`, `1.50 KiB`, `97.8 MiB`.
pub fn bytes(count_bytes: u64) -> String {
    scaled(count_bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// A count in decimal units: `28`, `1.50 k`, `25.6 M`, `4.09 G`. Append what is counted: `format!("{}FLOP", …)`.
pub fn count(count: u64) -> String {
    scaled(count as f64, 1000.0, &["", "k", "M", "G", "T", "P", "E"])
}

/// Millionths of a US dollar as dollars, to the last of them: `$0.000400`, `-$12.500000`.
pub fn usd(micro_usd: i128) -> String {
    let sign = if micro_usd < 0 { "-" } else { "" };
    let all = micro_usd.unsigned_abs();
    format!("{sign}${}.{:06}", all / 1_000_000, all % 1_000_000)
}

/// A duration: `812 ns`, `1.23 ms`, `4.56 s`, `3 min 05 s`, `2 h 03 min`.
pub fn duration_ns(duration_ns: u64) -> String {
    // One above what rounds to a whole minute, so that 59.99 s does not print as 60.0 s.
    if duration_ns < 59_950_000_000 {
        return scaled(duration_ns as f64, 1000.0, &["ns", "us", "ms", "s"]);
    }
    let seconds = (duration_ns + 500_000_000) / 1_000_000_000;
    if seconds < 3600 {
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    } else {
        let minutes = (seconds + 30) / 60;
        format!("{} h {:02} min", minutes / 60, minutes % 60)
    }
}

/// `value` divided by `base` until three digits hold it, with the unit of that power. Values of the first unit are
/// whole and print so.
fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    let mut power = 0;
    // 999.5 would print as 1000.
    while value >= base.min(999.5) && power + 1 < units.len() {
        value /= base;
        power += 1;
    }
    let number = match value {
        _ if power == 0 => format!("{value:.0}"),
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    };
    if units[power].is_empty() { number } else { format!("{number} {}", units[power]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_counts_and_durations_read_as_people_write_them() {
        for (value, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.98 KiB"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 << 20, "10.0 MiB"),
            (102_547_789, "97.8 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        for (value, text) in
            [(0, "0"), (28, "28"), (999, "999"), (1500, "1.50 k"), (25_557_032, "25.6 M"), (999_999, "1.00 M")]
        {
            assert_eq!(count(value), text);
        }
        for (value, text) in [
            (812, "812 ns"),
            (1_230_000, "1.23 ms"),
            (4_560_000_000, "4.56 s"),
            (59_990_000_000, "1 min 00 s"),
            (185_000_000_000, "3 min 05 s"),
            (7_380_000_000_000, "2 h 03 min"),
        ] {
            assert_eq!(duration_ns(value), text);
        }
    }
}
