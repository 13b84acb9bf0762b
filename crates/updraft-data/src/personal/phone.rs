//! Telephone numbers, told from other numbers by how they are written: with `+` or `00` and a country's code, as North American
//! ones, or behind a word that says so.

use super::{Personal, PersonalKind, ends};

/// Country codes (ITU-T E.164, list of assigned codes) with the fewest and most digits behind them. Codes of three digits have
/// [`DIGITS_OF_OTHERS`].
const COUNTRIES: &[(&str, usize, usize)] = &[
    ("1", 10, 10),
    ("7", 10, 10),
    ("20", 8, 10),
    ("27", 9, 9),
    ("30", 10, 10),
    ("31", 9, 9),
    ("32", 8, 9),
    ("33", 9, 9),
    ("34", 9, 9),
    ("36", 8, 9),
    ("39", 8, 11),
    ("40", 9, 9),
    ("41", 9, 9),
    ("43", 7, 13),
    ("44", 9, 10),
    ("45", 8, 8),
    ("46", 7, 10),
    ("47", 8, 8),
    ("48", 9, 9),
    ("49", 7, 12),
    ("51", 8, 9),
    ("52", 10, 11),
    ("53", 8, 8),
    ("54", 10, 11),
    ("55", 10, 11),
    ("56", 9, 9),
    ("57", 10, 10),
    ("58", 10, 10),
    ("60", 8, 10),
    ("61", 9, 9),
    ("62", 8, 12),
    ("63", 8, 10),
    ("64", 8, 10),
    ("65", 8, 8),
    ("66", 8, 9),
    ("81", 9, 10),
    ("82", 8, 10),
    ("84", 9, 10),
    ("86", 10, 11),
    ("90", 10, 10),
    ("91", 10, 10),
    ("92", 9, 10),
    ("93", 9, 9),
    ("94", 9, 9),
    ("95", 7, 10),
    ("98", 10, 10),
];

/// What codes of three digits begin with.
const OTHERS: &[&str] = &[
    "21", "22", "23", "24", "25", "26", "29", "35", "37", "38", "42", "50", "59", "67", "68", "69", "85", "88", "96",
    "97", "99",
];

const DIGITS_OF_OTHERS: std::ops::RangeInclusive<usize> = 7..=10;

/// Words before a number that is one of telephones however it is written.
const LABELS: &[&str] = &[
    "tel",
    "telephone",
    "telefon",
    "telefono",
    "teléfono",
    "téléphone",
    "tél",
    "phone",
    "mobile",
    "mobil",
    "móvil",
    "handy",
    "cell",
    "fax",
    "whatsapp",
];

/// Words between such a word and its number.
const BETWEEN: &[&str] = &["no", "nr", "number", "nummer", "num"];

/// Digits of a number behind such a word: fewer are dates and counts.
const LABELLED: std::ops::RangeInclusive<usize> = 9..=15;

/// A number as it is written.
struct Written {
    digits: String,
    /// The byte after its last digit.
    end: usize,
    separators: Vec<u8>,
}

/// The telephone number that begins here, at `+`, `(` or a digit.
pub(super) fn phone(text: &[u8], start: usize) -> Option<Personal> {
    if start > 0 && b".-+_".contains(&text[start - 1]) {
        return None;
    }
    let is_fraction = start > 0 && b",/".contains(&text[start - 1]);
    let end = match text[start] {
        b'+' => international(text, start + 1 + usize::from(text.get(start + 1) == Some(&b'('))),
        // In a row of numbers it is one of them.
        b'0' if text.get(start + 1) == Some(&b'0')
            && !is_fraction
            && !(start > 1 && text[start - 2].is_ascii_digit()) =>
        {
            let code = start + 2 + usize::from(text.get(start + 2) == Some(&b' '));
            // Digits without anything between them may be any number that is filled up with zeros.
            international(text, code).filter(|end| text[code..*end].iter().any(|b| !b.is_ascii_digit()))
        }
        _ => None,
    };
    let end = end
        .or_else(|| north_american(text, start).filter(|_| start == 0 || text[start - 1] != b'/'))
        .or_else(|| labelled(text, start))?;
    Some(Personal { kind: PersonalKind::Phone, start, end })
}

/// Digits with single separators between them, and brackets around some.
fn written(text: &[u8], start: usize) -> Written {
    let mut written = Written { digits: String::new(), end: start, separators: Vec::new() };
    let mut pending = None;
    for (at, byte) in text.iter().enumerate().skip(start).take(28) {
        match byte {
            b'0'..=b'9' => {
                if written.digits.len() == 16 {
                    break;
                }
                written.separators.extend(pending.take());
                written.digits.push(char::from(*byte));
                written.end = at + 1;
            }
            b'(' | b')' => {}
            b' ' | b'-' | b'.' | b'/' if pending.is_none() && !written.digits.is_empty() => pending = Some(*byte),
            _ => break,
        }
    }
    written
}

/// Where a number ends that begins with a country's code and is as long as those of the country.
fn international(text: &[u8], start: usize) -> Option<usize> {
    let Written { digits, end, separators } = written(text, start);
    // What has points and minuses is coordinates.
    if separators.contains(&b'.') && separators.contains(&b'-') || !ends(text, end) {
        return None;
    }
    // Shorter ones are signed numbers: with a fraction, or with nothing between their digits.
    let digits_min = match separators.as_slice() {
        [] => 10,
        [b'.'] => 11,
        _ => 0,
    };
    if digits.len() < digits_min {
        return None;
    }
    let (code, lengths) = match COUNTRIES.iter().find(|(code, ..)| digits.starts_with(code)) {
        Some((code, least, most)) => (code.len(), *least..=*most),
        None if OTHERS.iter().any(|begin| digits.starts_with(begin)) => (3, DIGITS_OF_OTHERS),
        None => return None,
    };
    let behind = digits.get(code..)?;
    // A zero in brackets is dialled only at home.
    let is_with_zero = behind.starts_with('0') && text[start..end].windows(3).any(|part| part == b"(0)");
    let fits = lengths.contains(&(behind.len() - usize::from(is_with_zero)));
    (fits && (!digits.starts_with('1') || is_north_american(behind))).then_some(end)
}

/// Area and exchange begin with 2 or more.
fn is_north_american(digits: &str) -> bool {
    let digits = digits.as_bytes();
    digits.len() == 10 && digits[0] >= b'2' && digits[3] >= b'2'
}

/// Three, three and four digits, separated, with or without the 1 that is dialled first.
fn north_american(text: &[u8], start: usize) -> Option<usize> {
    let at = match text.get(start..start + 2) {
        Some([b'1', b'-' | b'.' | b' ']) => start + 2,
        _ => start,
    };
    let is_bracketed = text.get(at) == Some(&b'(');
    let at = at + usize::from(is_bracketed);
    let run = |at: usize, count: usize| {
        text.get(at..at + count).is_some_and(|run| run.iter().all(u8::is_ascii_digit)).then_some(at + count)
    };
    let separated = |at: usize| text.get(at).is_some_and(|b| b"-. ".contains(b)).then_some(at + 1);
    let area = run(at, 3)?;
    let exchange = if is_bracketed {
        (text.get(area) == Some(&b')')).then_some(())?;
        separated(area + 1).unwrap_or(area + 1)
    } else {
        separated(area)?
    };
    let line = separated(run(exchange, 3)?)?;
    let end = run(line, 4)?;
    let fits = text[at] >= b'2' && text[exchange] >= b'2' && ends(text, end);
    // Spaces alone also separate columns of numbers.
    let is_written_so = is_bracketed || text[line - 1] != b' ';
    (fits && is_written_so).then_some(end)
}

/// Where a number ends that a word before it calls one of telephones.
fn labelled(text: &[u8], start: usize) -> Option<usize> {
    let mut before = &text[..start];
    for _ in 0..2 {
        let is_between = |b: &u8| b" \t:.=#\"'".contains(b);
        let word_end = before.iter().rposition(|b| !is_between(b))? + 1;
        let is_letter = |b: &u8| b.is_ascii_alphabetic() || *b >= 0x80;
        let word_start = before[..word_end].iter().rposition(|b| !is_letter(b)).map_or(0, |at| at + 1);
        let gap = before.len() - word_end;
        if gap > 4 || word_end - word_start > 16 {
            return None;
        }
        let word = String::from_utf8_lossy(&before[word_start..word_end]).to_lowercase();
        if LABELS.contains(&word.as_str()) {
            let Written { digits, end, .. } = written(text, start);
            return (LABELLED.contains(&digits.len()) && ends(text, end)).then_some(end);
        }
        if !BETWEEN.contains(&word.as_str()) {
            return None;
        }
        before = &before[..word_start];
    }
    None
}
