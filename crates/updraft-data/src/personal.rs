//! Personal data in text, by pattern and checksum: e-mail addresses, payment cards, bank accounts (IBAN), telephone numbers.
//!
//! Patterns alone find too much in data full of numbers; so cards must pass the Luhn check of ISO/IEC 7812-1 and begin, be as
//! long and be grouped as those of a known network, bank accounts must have their country's length (ISO 13616) and the
//! remainder 1 of ISO 7064 MOD 97-10, and telephone numbers must be written as such: with a country's code and as long as
//! those of the country (ITU-T E.164), as North American ones with separators, or behind a word like "phone". What is found
//! is shown masked.

use serde::{Deserialize, Serialize};

mod iban;
mod phone;

use iban::iban;
use phone::phone;

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
    let mut found: Vec<Personal> = Vec::new();
    let of_found = |found: &[Personal]| found.last().map_or(0, |personal| personal.end);
    let mut at = 0;
    while at < text.len() {
        let starts_token = at == 0 || !text[at - 1].is_ascii_alphanumeric();
        let hit = match text[at] {
            b'@' => email(text, at, at + 1, of_found(&found)),
            // As URLs have it.
            b'%' if text[at..].starts_with(b"%40") => email(text, at, at + 3, of_found(&found)),
            b'A'..=b'Z' | b'a'..=b'z' if starts_token => iban(text, at),
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

/// Endings of files, which follow an `@` in names such as `icon@2x.png`, and are no top-level domains.
const FILE_ENDINGS: &[&[u8]] = &[
    b"bmp", b"css", b"csv", b"gif", b"html", b"ico", b"jpeg", b"jpg", b"js", b"json", b"pdf", b"png", b"svg", b"tif",
    b"tiff", b"txt", b"webp", b"xml",
];

/// Around an `@`, from `from` on: up to 64 characters before it and a domain of at least two labels behind, 254 bytes in all
/// (RFC 5321); the domain in the letters of any language (RFC 6531).
fn email(text: &[u8], at: usize, behind: usize, from: usize) -> Option<Personal> {
    let is_local = |b: u8| b.is_ascii_alphanumeric() || b"._%+-'".contains(&b);
    let mut start = text[from..at].iter().rposition(|b| !is_local(*b)).map_or(from, |p| from + p + 1);
    while start < at && b".'-".contains(&text[start]) {
        start += 1;
    }
    if !(1..=64).contains(&(at - start)) || text[at - 1] == b'.' {
        return None;
    }
    // Letters of another script may also be the next word.
    let domain = domain(&text[behind..], false).or_else(|| domain(&text[behind..], true))?;
    let end = behind + domain;
    (end - start <= 254).then_some(Personal { kind: PersonalKind::Email, start, end })
}

/// The length of the domain that a text begins with.
fn domain(text: &[u8], with_all_letters: bool) -> Option<usize> {
    let is_domain = |b: &u8| b.is_ascii_alphanumeric() || b".-".contains(b) || with_all_letters && *b >= 0x80;
    let mut end = text.iter().take(255).position(|b| !is_domain(b)).unwrap_or(text.len().min(255));
    while end > 0 && b".-".contains(&text[end - 1]) {
        end -= 1;
    }
    let labels: Vec<&[u8]> = text[..end].split(|b| *b == b'.').collect();
    let top = labels.last()?;
    let is_top = match with_all_letters {
        false => top.iter().all(u8::is_ascii_alphabetic) || top.starts_with(b"xn--"),
        true => std::str::from_utf8(top).is_ok_and(|top| top.chars().all(char::is_alphabetic)),
    };
    let fits = labels.len() >= 2
        && labels.iter().all(|label| (1..=63).contains(&label.len()))
        && top.len() >= 2
        && is_top
        && !FILE_ENDINGS.iter().any(|ending| top.eq_ignore_ascii_case(ending));
    fits.then_some(end)
}

/// Whether a number ends here, rather than going on as a word or a longer number.
fn ends(text: &[u8], end: usize) -> bool {
    let next = text.get(end).copied().unwrap_or(b' ');
    let after = text.get(end + 1).copied().unwrap_or(b' ');
    !(next.is_ascii_alphanumeric() || next == b'_' || (next == b'.' && after.is_ascii_digit()))
}

/// How the digits of a card are grouped, by how many there are.
const CARD_GROUPS: &[&[usize]] = &[&[4, 4, 4, 4], &[4, 4, 4, 4, 3], &[4, 6, 5], &[4, 6, 4]];

fn card(text: &[u8], start: usize) -> Option<Personal> {
    // A number behind a point or a minus is a fraction or the rest of something longer.
    if start > 0 && b".-+_".contains(&text[start - 1]) {
        return None;
    }
    let digits_at = |at: usize| text[at..].iter().take(20).take_while(|b| b.is_ascii_digit()).count();
    let together = start..start + digits_at(start);
    let grouped = || CARD_GROUPS.iter().filter_map(|groups| grouped(text, start, groups));
    let end = std::iter::once(together.end).chain(grouped()).find(|end| {
        let digits: Vec<u8> = text[start..*end].iter().filter(|b| b.is_ascii_digit()).map(|b| b - b'0').collect();
        is_card(&digits) && luhn(&digits) && ends(text, *end) && digits.iter().any(|d| *d != digits[0])
    })?;
    Some(Personal { kind: PersonalKind::Card, start, end })
}

/// Where digits end that are written in such groups, with one kind of separator, and stand alone: in a longer row of groups of
/// four any sixteen digits may pass for a card.
fn grouped(text: &[u8], start: usize, groups: &[usize]) -> Option<usize> {
    let is_digit = |at: usize| text.get(at).is_some_and(u8::is_ascii_digit);
    let separator: &[u8] = match text.get(start + 4)? {
        b' ' => b" ",
        b'-' => b"-",
        // A space that does not break the line, in UTF-8.
        0xC2 => "\u{a0}".as_bytes(),
        _ => return None,
    };
    let mut at = start;
    for (i, group) in groups.iter().enumerate() {
        if i > 0 {
            at += text.get(at..)?.starts_with(separator).then_some(separator.len())?;
        }
        if !(at..at + group).all(is_digit) || is_digit(at + group) {
            return None;
        }
        at += group;
    }
    let more_behind = text[at..].starts_with(separator) && (0..4).all(|i| is_digit(at + separator.len() + i));
    let before = start.checked_sub(separator.len() + 4);
    let more_before = before.is_some_and(|b| text[b + 4..].starts_with(separator) && (b..b + 4).all(is_digit));
    (!more_behind && !more_before).then_some(at)
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
        // Visa once; what is numbered as articles of trade are (ISO/IEC 15420) is one of these.
        13 => digits[0] == 4 && !is_article(digits),
        _ => digits[0] == 4 || first(2) == 62 || first(4) == 6011 || (3528..=3589).contains(&first(4)),
    }
}

/// The check digit of thirteen: every second one from the right weighs three times.
fn is_article(digits: &[u8]) -> bool {
    let weighed = digits.iter().rev().enumerate().map(|(i, d)| u32::from(*d) * (1 + 2 * (i as u32 % 2)));
    weighed.sum::<u32>().is_multiple_of(10)
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
            ("1-212-555-0187, 1 (212) 555-0187", vec![(Phone, "1-212-555-0187"), (Phone, "1 (212) 555-0187")]),
            ("7,4111111111111111,+49301234567", vec![(Card, "4111111111111111"), (Phone, "+49301234567")]),
            ("4111\u{a0}1111\u{a0}1111\u{a0}1111", vec![(Card, "4111\u{a0}1111\u{a0}1111\u{a0}1111")]),
            ("3782 822463 10005 12/27", vec![(Card, "3782 822463 10005")]),
            ("de89370400440532013000", vec![(Iban, "de89370400440532013000")]),
            ("DE89-3704-0044-0532-0130-00", vec![(Iban, "DE89-3704-0044-0532-0130-00")]),
            ("0044 20 7946 0958", vec![(Phone, "0044 20 7946 0958")]),
            ("Tel. Nr.: 030/901820-7, Fax 020 7946 0958", vec![(Phone, "030/901820-7"), (Phone, "020 7946 0958")]),
            ("Tél. 01 80 78 48 83", vec![(Phone, "01 80 78 48 83")]),
            (
                "bob@müller-gmbh.de?to=j.smith%40example.com",
                vec![(Email, "bob@müller-gmbh.de"), (Email, "j.smith%40example.com")],
            ),
            ("ada@example.com。", vec![(Email, "ada@example.com")]),
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
            // Groups as no card has them, and sixteen digits of a longer row.
            "4111-1111111-11111 727 811 996 505 281",
            "5310 6835 4301 7717 6921 2667",
            "1111 4111 1111 1111 1111",
            // An article's number that passes Luhn's check, too.
            "4006381330060",
            "+5.2411821 +48.857700, +12.492700 +82.9255-070.4839/ delta +347551855",
            "+1 123 456 7890 0012345678901 +282 123456789",
            "icon@2x.png at@3x.webp",
            "phone 2024-01-01 part no. 123-4567-890 id 020 7946 0958",
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
