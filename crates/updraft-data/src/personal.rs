//! Personal data in text, by pattern and checksum: e-mail addresses, payment cards, bank accounts (IBAN), telephone numbers.
//!
//! Patterns alone find too much in data full of numbers; so cards must pass the Luhn check of ISO/IEC 7812-1 and begin and
//! be as long as those of a known network, bank accounts must have their country's length (ISO 13616) and the remainder 1
//! of ISO 7064 MOD 97-10, and telephone numbers must be written as such: with `+` and 8 to 15 digits (ITU-T E.164), or as
//! North American ones with separators. What is found is shown masked.

use serde::{Deserialize, Serialize};

/// What kind of personal data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PersonalKind {
    /// An e-mail address.
    Email,
    /// A payment card number.
    Card,
    /// An international bank account number.
    Iban,
    /// A telephone number.
    Phone,
}

impl PersonalKind {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            PersonalKind::Email => "e-mail address",
            PersonalKind::Card => "payment card",
            PersonalKind::Iban => "bank account",
            PersonalKind::Phone => "telephone number",
        }
    }
}

/// A place in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Personal {
    /// What it is.
    pub kind: PersonalKind,
    /// Its first byte.
    pub start: usize,
    /// The byte after its last.
    pub end: usize,
}

/// All that is found in a text, in the order of their places; none overlap.
pub fn find(text: &[u8]) -> Vec<Personal> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let starts_token = at == 0 || !text[at - 1].is_ascii_alphanumeric();
        let hit = match text[at] {
            b'@' => {
                let from = found.last().map_or(0, |p: &Personal| p.end);
                email(text, at, from)
            }
            b'A'..=b'Z' if starts_token => iban(text, at),
            b'0'..=b'9' if starts_token => card(text, at).or_else(|| phone(text, at)),
            b'+' | b'(' if starts_token => phone(text, at),
            _ => None,
        };
        match hit {
            Some(personal) => {
                at = personal.end.max(at + 1);
                found.push(personal);
            }
            // The rest of a run of digits is no number of its own.
            None if text[at].is_ascii_digit() => {
                while at < text.len() && text[at].is_ascii_digit() {
                    at += 1;
                }
            }
            None => at += 1,
        }
    }
    found
}

/// The text of a place with all but its first and last characters hidden; what separates stays.
pub fn masked(text: &[u8], place: &Personal) -> String {
    let shown = String::from_utf8_lossy(&text[place.start..place.end]);
    let last = shown.chars().count().saturating_sub(1);
    let hide = |(i, c): (usize, char)| if i > 0 && i < last && c.is_alphanumeric() { '*' } else { c };
    shown.chars().enumerate().map(hide).collect()
}

/// `text` with all that is found in it masked.
pub fn redacted(text: &[u8]) -> String {
    let mut shown = String::new();
    let mut at = 0;
    for place in find(text) {
        shown.push_str(&String::from_utf8_lossy(&text[at..place.start]));
        shown.push_str(&masked(text, &place));
        at = place.end;
    }
    shown.push_str(&String::from_utf8_lossy(&text[at..]));
    shown
}

/// Around an `@`: up to 64 characters before it and a domain of at least two labels behind, 254 in all (RFC 5321).
fn email(text: &[u8], at: usize, from: usize) -> Option<Personal> {
    let is_local = |b: u8| b.is_ascii_alphanumeric() || b"._%+-'".contains(&b);
    let is_domain = |b: u8| b.is_ascii_alphanumeric() || b".-".contains(&b);
    let mut start = text[from..at].iter().rposition(|b| !is_local(*b)).map_or(from, |p| from + p + 1);
    while start < at && b".'-".contains(&text[start]) {
        start += 1;
    }
    let mut end = at + 1 + text[at + 1..].iter().position(|b| !is_domain(*b)).unwrap_or(text.len() - at - 1);
    while end > at + 1 && b".-".contains(&text[end - 1]) {
        end -= 1;
    }
    let domain = &text[at + 1..end];
    let labels: Vec<&[u8]> = domain.split(|b| *b == b'.').collect();
    let top = labels.last()?;
    let fits = (1..=64).contains(&(at - start))
        && text[at - 1] != b'.'
        && end - start <= 254
        && labels.len() >= 2
        && labels.iter().all(|label| (1..=63).contains(&label.len()))
        && top.len() >= 2
        && top.iter().all(u8::is_ascii_alphabetic);
    fits.then_some(Personal { kind: PersonalKind::Email, start, end })
}

/// Digits from `start`, single separators among `between` skipped; the end of each prefix that ends on a digit.
fn digits(text: &[u8], start: usize, between: &[u8], max: usize) -> (Vec<u8>, usize) {
    let (mut digits, mut end, mut at) = (Vec::new(), start, start);
    while let Some(byte) = text.get(at) {
        if byte.is_ascii_digit() {
            digits.push(byte - b'0');
            end = at + 1;
            if digits.len() > max {
                break;
            }
        } else if !between.contains(byte) || at == end + 1 {
            break;
        }
        at += 1;
    }
    (digits, end)
}

/// Whether a number ends here, rather than going on as a word or a longer number.
fn ends(text: &[u8], end: usize) -> bool {
    let next = text.get(end).copied().unwrap_or(b' ');
    let after = text.get(end + 1).copied().unwrap_or(b' ');
    !(next.is_ascii_alphanumeric() || next == b'_' || (next == b'.' && after.is_ascii_digit()))
}

fn card(text: &[u8], start: usize) -> Option<Personal> {
    // A number behind a point or a minus is a fraction or the rest of something longer.
    if start > 0 && b".-+_,".contains(&text[start - 1]) {
        return None;
    }
    let (mut numbers, mut end) = digits(text, start, &[], 19);
    // Written in groups, with one kind of separator.
    if let Some(separator) = text.get(end).filter(|b| numbers.len() < 13 && b" -".contains(b)) {
        (numbers, end) = digits(text, start, std::slice::from_ref(separator), 19);
    }
    let fits = is_card(&numbers) && luhn(&numbers) && ends(text, end) && numbers.iter().any(|d| *d != numbers[0]);
    fits.then_some(Personal { kind: PersonalKind::Card, start, end })
}

/// Whether the first digits and the length are those of a network (issuer ranges as published by the networks).
fn is_card(digits: &[u8]) -> bool {
    if !(13..=19).contains(&digits.len()) {
        return false;
    }
    let first = |n: usize| digits[..n].iter().fold(0u32, |sum, d| 10 * sum + u32::from(*d));
    match digits.len() {
        // Visa, Mastercard, Discover, JCB, UnionPay.
        16 => {
            digits[0] == 4
                || (51..=55).contains(&first(2))
                || (2221..=2720).contains(&first(4))
                || first(4) == 6011
                || (644..=649).contains(&first(3))
                || matches!(first(2), 62 | 65)
                || (3528..=3589).contains(&first(4))
        }
        // American Express.
        15 => matches!(first(2), 34 | 37),
        // Diners Club.
        14 => (300..=305).contains(&first(3)) || matches!(first(2), 36 | 38),
        13 => digits[0] == 4,
        _ => digits[0] == 4 || first(2) == 62 || first(4) == 6011 || (3528..=3589).contains(&first(4)),
    }
}

/// ISO/IEC 7812-1, annex B: every second digit from the right doubled, the digits of all summed, divisible by 10.
fn luhn(digits: &[u8]) -> bool {
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(i, d)| match u32::from(*d) * (1 + i as u32 % 2) {
            doubled @ 10.. => doubled - 9,
            small => small,
        })
        .sum();
    sum.is_multiple_of(10)
}

/// Lengths of account numbers by country: the IBAN registry of ISO 13616 (SWIFT, release 99, 2024).
const IBAN_LENGTHS: &[(&[u8; 2], usize)] = &[
    (b"AD", 24),
    (b"AE", 23),
    (b"AL", 28),
    (b"AT", 20),
    (b"AZ", 28),
    (b"BA", 20),
    (b"BE", 16),
    (b"BG", 22),
    (b"BH", 22),
    (b"BI", 27),
    (b"BR", 29),
    (b"BY", 28),
    (b"CH", 21),
    (b"CR", 22),
    (b"CY", 28),
    (b"CZ", 24),
    (b"DE", 22),
    (b"DJ", 27),
    (b"DK", 18),
    (b"DO", 28),
    (b"EE", 20),
    (b"EG", 29),
    (b"ES", 24),
    (b"FI", 18),
    (b"FK", 18),
    (b"FO", 18),
    (b"FR", 27),
    (b"GB", 22),
    (b"GE", 22),
    (b"GI", 23),
    (b"GL", 18),
    (b"GR", 27),
    (b"GT", 28),
    (b"HR", 21),
    (b"HU", 28),
    (b"IE", 22),
    (b"IL", 23),
    (b"IQ", 23),
    (b"IS", 26),
    (b"IT", 27),
    (b"JO", 30),
    (b"KW", 30),
    (b"KZ", 20),
    (b"LB", 28),
    (b"LC", 32),
    (b"LI", 21),
    (b"LT", 20),
    (b"LU", 20),
    (b"LV", 21),
    (b"LY", 25),
    (b"MC", 27),
    (b"MD", 24),
    (b"ME", 22),
    (b"MK", 19),
    (b"MN", 20),
    (b"MR", 27),
    (b"MT", 31),
    (b"MU", 30),
    (b"NI", 28),
    (b"NL", 18),
    (b"NO", 15),
    (b"OM", 23),
    (b"PK", 24),
    (b"PL", 28),
    (b"PS", 29),
    (b"PT", 25),
    (b"QA", 29),
    (b"RO", 24),
    (b"RS", 22),
    (b"RU", 33),
    (b"SA", 24),
    (b"SC", 31),
    (b"SD", 18),
    (b"SE", 24),
    (b"SI", 19),
    (b"SK", 24),
    (b"SM", 27),
    (b"SO", 23),
    (b"ST", 25),
    (b"SV", 28),
    (b"TL", 23),
    (b"TN", 24),
    (b"TR", 26),
    (b"UA", 29),
    (b"VA", 22),
    (b"VG", 24),
    (b"XK", 20),
    (b"YE", 30),
];

fn iban(text: &[u8], start: usize) -> Option<Personal> {
    let country = text.get(start..start + 2)?;
    let (_, length) = IBAN_LENGTHS.iter().find(|(code, _)| code.as_slice() == country)?;
    // Written together, or in groups of four.
    let is_grouped = text.get(start + 4) == Some(&b' ');
    let (mut characters, mut at) = (Vec::with_capacity(*length), start);
    while characters.len() < *length {
        let byte = *text.get(at)?;
        if is_grouped && byte == b' ' && characters.len() % 4 == 0 && !characters.is_empty() && text[at - 1] != b' ' {
            at += 1;
            continue;
        }
        if !(byte.is_ascii_digit() || byte.is_ascii_uppercase()) {
            return None;
        }
        characters.push(byte);
        at += 1;
    }
    // The country and the check digits go to the end, letters count from 10; the remainder by 97 must be 1.
    let remainder = characters[4..].iter().chain(&characters[..4]).fold(0u32, |rest, byte| match byte {
        b'0'..=b'9' => (10 * rest + u32::from(byte - b'0')) % 97,
        _ => (100 * rest + u32::from(byte - b'A') + 10) % 97,
    });
    let fits = remainder == 1 && characters[2..4].iter().all(u8::is_ascii_digit) && ends(text, at);
    fits.then_some(Personal { kind: PersonalKind::Iban, start, end: at })
}

fn phone(text: &[u8], start: usize) -> Option<Personal> {
    if start > 0 && b".-+_,/".contains(&text[start - 1]) {
        return None;
    }
    let place = |end: usize| Personal { kind: PersonalKind::Phone, start, end };
    if text[start] == b'+' {
        let mut plain = Vec::with_capacity(24);
        let mut places = Vec::with_capacity(24);
        // Brackets around an area code, or the zero that is dialled only at home.
        for (at, byte) in text.iter().enumerate().skip(start + 1).take(28) {
            if !b"()".contains(byte) {
                plain.push(*byte);
                places.push(at);
            }
        }
        let (digits, end) = digits(&plain, 0, b" -./", 15);
        let last = places.get(end.checked_sub(1)?)? + 1;
        let fits = (8..=15).contains(&digits.len()) && digits[0] != 0 && ends(text, last);
        return fits.then(|| place(last));
    }
    // North American: three, three and four digits, area and exchange from 2 on, separated.
    let is_bracketed = text[start] == b'(';
    let at = start + usize::from(is_bracketed);
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
    (fits && is_written_so).then(|| place(end))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds(text: &str) -> Vec<(PersonalKind, &str)> {
        find(text.as_bytes()).iter().map(|p| (p.kind, &text[p.start..p.end])).collect()
    }

    #[test]
    fn personal_data_is_found_where_checksums_agree() {
        use PersonalKind::{Card, Email, Iban, Phone};
        for (text, expected) in [
            ("write to ada.lovelace+x@example.co.uk.", vec![(Email, "ada.lovelace+x@example.co.uk")]),
            ("<a@b.de>,c_d@e-f.org", vec![(Email, "a@b.de"), (Email, "c_d@e-f.org")]),
            // Test numbers that the networks publish.
            ("card 4111 1111 1111 1111, exp", vec![(Card, "4111 1111 1111 1111")]),
            ("5500-0000-0000-0004", vec![(Card, "5500-0000-0000-0004")]),
            ("378282246310005 30569309025904", vec![(Card, "378282246310005"), (Card, "30569309025904")]),
            // Examples of the IBAN registry.
            ("IBAN GB29 NWBK 6016 1331 9268 19", vec![(Iban, "GB29 NWBK 6016 1331 9268 19")]),
            ("(DE89370400440532013000)", vec![(Iban, "DE89370400440532013000")]),
            ("call +44 20 7946 0958 now", vec![(Phone, "+44 20 7946 0958")]),
            ("+49 (0)30 901820", vec![(Phone, "+49 (0)30 901820")]),
            ("(212) 555-0187 or 212-555-0187", vec![(Phone, "(212) 555-0187"), (Phone, "212-555-0187")]),
        ] {
            assert_eq!(kinds(text), expected, "{text}");
        }
    }

    #[test]
    fn what_only_looks_like_personal_data_is_not_found() {
        for text in [
            "4111 1111 1111 1112",
            "41111111111111111111111",
            "0.4111111111111111",
            "1234567812345670",
            "GB29 NWBK 6016 1331 9268 18",
            "XX89370400440532013000",
            "@handle a@b user@localhost",
            "2026-11-23 04:23:46 1e+10 3.14159265",
            "10 200 300 4000 1-2-3",
            "++12 +1 555",
            "v1.2.3-4567 sha256:4242424242424243",
            "",
        ] {
            assert_eq!(kinds(text), [], "{text}");
        }
    }

    #[test]
    fn masks_keep_the_ends_and_the_shape() {
        assert_eq!(redacted(b"to ada@example.org, 4111 1111 1111 1111!"), "to a**@*******.**g, 4*** **** **** ***1!");
    }

    proptest! {
        #[test]
        fn any_bytes_are_searched_without_overlap(text in prop::collection::vec(
            prop::sample::select(b"0123456789+-() .@abDEGB29\xff".to_vec()), 0..200))
        {
            let mut end = 0;
            for place in find(&text) {
                prop_assert!(place.start >= end && place.end > place.start && place.end <= text.len());
                end = place.end;
            }
            redacted(&text);
        }

        #[test]
        fn one_wrong_digit_breaks_a_card(at in 0usize..16, by in 1u8..10) {
            let mut digits = [4u8, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
            prop_assert!(luhn(&digits));
            digits[at] = (digits[at] + by) % 10;
            prop_assert!(!luhn(&digits));
        }
    }
}
