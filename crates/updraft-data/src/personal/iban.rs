//! International bank account numbers (ISO 13616): a country, two check digits, and an account as long as those of the country.

use super::{Personal, PersonalKind, ends};

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

/// The account number that begins here, in capital or small letters.
pub(super) fn iban(text: &[u8], start: usize) -> Option<Personal> {
    let head = text.get(start..start + 4)?;
    // Nearly every word ends here.
    if !head[2..].iter().all(u8::is_ascii_digit) {
        return None;
    }
    let (_, length) = IBAN_LENGTHS.iter().find(|(code, _)| head[..2].eq_ignore_ascii_case(code.as_slice()))?;
    // Written together, or in groups of four.
    let separator = text.get(start + 4).copied().filter(|b| b" -".contains(b));
    let (mut characters, mut at) = (Vec::with_capacity(*length), start);
    while characters.len() < *length {
        let byte = *text.get(at)?;
        at += 1;
        if Some(byte) == separator && characters.len() % 4 == 0 && text.get(at - 2) != separator.as_ref() {
            continue;
        }
        if !byte.is_ascii_alphanumeric() {
            return None;
        }
        characters.push(byte.to_ascii_uppercase());
    }
    // The country and the check digits go to the end, letters count from 10; the remainder by 97 must be 1.
    let remainder = characters[4..].iter().chain(&characters[..4]).fold(0u32, |rest, byte| match byte {
        b'0'..=b'9' => (10 * rest + u32::from(byte - b'0')) % 97,
        _ => (100 * rest + u32::from(byte - b'A') + 10) % 97,
    });
    (remainder == 1 && ends(text, at)).then_some(Personal { kind: PersonalKind::Iban, start, end: at })
}
