//! Reading dimensions back from the form that [`Display`](std::fmt::Display) gives them.

use std::str::FromStr;

use super::{Atom, Dim, Poly};

/// Quotients within quotients; shape rules nest one for each strided layer, and each level is a few stack frames here.
const DEPTH_MAX: usize = 200;

const FITTING: &str = "numbers that fit 64 bits";

/// Text that is not a dimension.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {position} of the dimension: expected {expected}")]
pub struct ParseDimError {
    /// Bytes before the place.
    pub position: usize,
    /// What would have been accepted.
    pub expected: &'static str,
}

impl FromStr for Dim {
    type Err = ParseDimError;

    fn from_str(text: &str) -> Result<Dim, ParseDimError> {
        let (dim, length) = parse_prefix(text)?;
        if text.len() > length {
            return Err(ParseDimError { position: length, expected: "the end, `+`, `-` or `*`" });
        }
        Ok(dim)
    }
}

/// The dimension that `text` begins with, and its length in bytes.
pub(crate) fn parse_prefix(text: &str) -> Result<(Dim, usize), ParseDimError> {
    let mut parser = Parser { text, position: 0 };
    parser.skip_blanks();
    if parser.take("?") {
        return Ok((Dim::Unknown, parser.position));
    }
    let start = parser.position;
    let poly = parser.sum(0)?;
    match poly.as_constant() {
        Some(n) => match usize::try_from(n) {
            Ok(n) => Ok((Dim::Known(n), parser.position)),
            Err(_) => Err(ParseDimError { position: start, expected: "a size that is not negative" }),
        },
        None => Ok((Dim::Expr(poly), parser.position)),
    }
}

/// Whether a symbol of this name is written without quotes.
pub(crate) fn is_identifier(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
        && name != "floor"
}

struct Parser<'a> {
    text: &'a str,
    position: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.position..]
    }

    fn skip_blanks(&mut self) {
        self.position += self.rest().len() - self.rest().trim_start_matches(' ').len();
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.position += token.len();
        }
        found
    }

    fn expect(&mut self, token: &'static str) -> Result<(), ParseDimError> {
        if self.take(token) { Ok(()) } else { Err(self.error(token)) }
    }

    fn error(&self, expected: &'static str) -> ParseDimError {
        ParseDimError { position: self.position, expected }
    }

    /// `-a + 2*b - 3`
    fn sum(&mut self, depth: usize) -> Result<Poly, ParseDimError> {
        let mut sign = if self.take("-") { -1 } else { 1 };
        let mut sum = Poly::default();
        loop {
            let start = self.position;
            let (factors, coefficient) = self.product(depth)?;
            sum.add_term(factors, coefficient * sign).ok_or(ParseDimError { position: start, expected: FITTING })?;
            let end = self.position;
            self.skip_blanks();
            sign = match self.rest().as_bytes().first() {
                Some(b'+') => 1,
                Some(b'-') => -1,
                _ => {
                    self.position = end;
                    return Ok(sum);
                }
            };
            self.position += 1;
            self.skip_blanks();
        }
    }

    /// `2*N*floor((S)/2)`
    fn product(&mut self, depth: usize) -> Result<(Vec<Atom>, i64), ParseDimError> {
        let (mut factors, mut coefficient) = (Vec::new(), 1i64);
        loop {
            let start = self.position;
            match self.factor(depth)? {
                Ok(atom) => factors.push(atom),
                Err(n) => {
                    coefficient =
                        coefficient.checked_mul(n).ok_or(ParseDimError { position: start, expected: FITTING })?;
                }
            }
            if !self.take("*") {
                factors.sort();
                return Ok((factors, coefficient));
            }
        }
    }

    /// An atom, or else a number.
    fn factor(&mut self, depth: usize) -> Result<Result<Atom, i64>, ParseDimError> {
        match self.rest().as_bytes().first() {
            Some(b'0'..=b'9') => Ok(Err(self.integer()?)),
            Some(b'"') => {
                let (name, length) = unquote(self.rest()).ok_or_else(|| self.error("a quoted symbol"))?;
                self.position += length;
                Ok(Ok(Atom::Symbol(name)))
            }
            _ if self.take("floor((") => {
                if depth >= DEPTH_MAX {
                    return Err(self.error("fewer quotients within quotients"));
                }
                let numerator = self.sum(depth + 1)?;
                self.expect(")/")?;
                let start = self.position;
                let denominator = self.integer()?;
                if denominator <= 0 {
                    return Err(ParseDimError { position: start, expected: "a divisor of at least 1" });
                }
                self.expect(")")?;
                Ok(Ok(Atom::Quotient(Box::new(numerator), denominator)))
            }
            _ => {
                let rest = self.rest();
                let length =
                    rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.')).unwrap_or(rest.len());
                let name = &rest[..length];
                if !is_identifier(name) {
                    return Err(self.error("a size, a symbol, `floor((...)/n)` or `?`"));
                }
                self.position += length;
                Ok(Ok(Atom::Symbol(name.to_owned())))
            }
        }
    }

    fn integer(&mut self) -> Result<i64, ParseDimError> {
        let rest = self.rest();
        let length = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let value = rest[..length].parse().map_err(|_| self.error("an integer of at most 64 bits"))?;
        self.position += length;
        Ok(value)
    }
}

/// The string whose quoted form (`{:?}`) `text` begins with, and the length of that form in bytes.
pub(crate) fn unquote(text: &str) -> Option<(String, usize)> {
    let mut chars = text.char_indices();
    if chars.next()?.1 != '"' {
        return None;
    }
    let mut out = String::new();
    loop {
        match chars.next()? {
            (at, '"') => return Some((out, at + 1)),
            (_, '\n') => return None,
            (_, '\\') => out.push(match chars.next()?.1 {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                '0' => '\0',
                'u' => {
                    if chars.next()?.1 != '{' {
                        return None;
                    }
                    let mut code = 0u32;
                    loop {
                        match chars.next()?.1 {
                            '}' => break,
                            digit => code = code.checked_mul(16)?.checked_add(digit.to_digit(16)?)?,
                        }
                    }
                    char::from_u32(code)?
                }
                c @ ('"' | '\\' | '\'') => c,
                _ => return None,
            }),
            (_, c) => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_read_back_as_they_print() {
        let (n, s) = (Dim::symbol("N"), Dim::symbol("batch-size \"x\""));
        let rows = [
            Dim::Known(0),
            Dim::Known(224),
            Dim::Unknown,
            n.clone(),
            s.clone(),
            n.times(&s).offset(-7),
            n.offset(3).divide_floor(2).times(&Dim::Known(4)).plus(&s),
            n.offset(1).divide_floor(2).offset(5).divide_ceil(3),
            Dim::Known(5).minus(&n).unwrap(),
        ];
        for dim in rows {
            assert_eq!(dim.to_string().parse(), Ok(dim.clone()), "{dim}");
        }
    }

    #[test]
    fn anything_else_is_refused_with_its_place() {
        let deep = "floor((".repeat(100_000);
        for (text, position) in [
            ("", 0),
            ("-3", 0),
            ("N +", 3),
            ("N*", 2),
            ("floor((N)/0)", 10),
            ("floor((N)/2", 11),
            ("99999999999999999999", 0),
            ("9223372036854775807*9223372036854775807", 20),
            ("N M", 1),
            ("é", 0),
            (&deep, 7 * (DEPTH_MAX + 1)),
        ] {
            assert_eq!(text.parse::<Dim>().unwrap_err().position, position, "{text}");
        }
    }
}
