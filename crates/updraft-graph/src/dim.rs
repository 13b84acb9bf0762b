//! Symbolic dimensions: integer polynomials over named sizes.
//!
//! A dimension is a known size, a polynomial such as `2*N + 1` over symbols and floored quotients, or unknown.
//! Polynomials have one normal form, so equal expressions compare equal and `N + 1 - 1` is `N` again; that is all the
//! algebra that shape rules need (concatenation adds, reshape multiplies and divides, strides floor).

use std::collections::BTreeMap;
use std::fmt;

mod parse;

pub use parse::ParseDimError;
use parse::is_identifier;
pub(crate) use parse::{parse_prefix, unquote};

/// The size of one dimension.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dim {
    /// A size known before any data is seen.
    Known(usize),
    /// A size that depends on symbols; never a constant.
    Expr(Poly),
    /// Nothing is known. Two unknown sizes may differ although they compare equal here: ask
    /// [`same`](Dim::same) instead.
    Unknown,
}

/// A polynomial in normal form: monomials with non-zero integer coefficients.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Poly {
    /// Sorted factors of each monomial, and its coefficient. The empty monomial is the constant.
    terms: BTreeMap<Vec<Atom>, i64>,
}

/// What a monomial is a product of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Atom {
    /// A named size.
    Symbol(String),
    /// `floor(numerator / denominator)`.
    Quotient(Box<Poly>, i64),
}

impl Poly {
    fn constant(value: i64) -> Poly {
        Poly { terms: if value == 0 { BTreeMap::new() } else { BTreeMap::from([(Vec::new(), value)]) } }
    }

    fn atom(atom: Atom) -> Poly {
        Poly { terms: BTreeMap::from([(vec![atom], 1)]) }
    }

    fn as_constant(&self) -> Option<i64> {
        match self.terms.len() {
            0 => Some(0),
            1 => self.terms.get(&Vec::new()).copied(),
            _ => None,
        }
    }

    fn add_term(&mut self, factors: Vec<Atom>, coefficient: i64) -> Option<()> {
        let sum = self.terms.get(&factors).copied().unwrap_or(0).checked_add(coefficient)?;
        if sum == 0 {
            self.terms.remove(&factors);
        } else {
            self.terms.insert(factors, sum);
        }
        Some(())
    }

    fn combine(&self, other: &Poly, factor: i64) -> Option<Poly> {
        let mut out = self.clone();
        for (factors, coefficient) in &other.terms {
            out.add_term(factors.clone(), coefficient.checked_mul(factor)?)?;
        }
        Some(out)
    }

    fn multiply(&self, other: &Poly) -> Option<Poly> {
        let mut out = Poly::default();
        for (left, a) in &self.terms {
            for (right, b) in &other.terms {
                let mut factors = [left.as_slice(), right.as_slice()].concat();
                factors.sort();
                out.add_term(factors, a.checked_mul(*b)?)?;
            }
        }
        Some(out)
    }

    /// The quotient by a polynomial of one term, where every term divides exactly.
    fn divide_exact(&self, divisor: &Poly) -> Option<Poly> {
        let (factors, coefficient) = divisor.terms.iter().next().filter(|_| divisor.terms.len() == 1)?;
        let mut out = Poly::default();
        for (have, c) in &self.terms {
            let mut rest = have.clone();
            for factor in factors {
                rest.remove(rest.iter().position(|f| f == factor)?);
            }
            if c % coefficient != 0 {
                return None;
            }
            out.add_term(rest, c / coefficient)?;
        }
        Some(out)
    }

    fn evaluate(&self, symbols: &dyn Fn(&str) -> Option<usize>) -> Option<i64> {
        self.terms.iter().try_fold(0i64, |sum, (factors, coefficient)| {
            let product = factors.iter().try_fold(*coefficient, |p, atom| {
                let value = match atom {
                    Atom::Symbol(name) => i64::try_from(symbols(name)?).ok()?,
                    Atom::Quotient(numerator, denominator) => numerator.evaluate(symbols)?.div_euclid(*denominator),
                };
                p.checked_mul(value)
            })?;
            sum.checked_add(product)
        })
    }

    fn collect_symbols(&self, out: &mut Vec<String>) {
        for atom in self.terms.keys().flatten() {
            match atom {
                Atom::Symbol(name) if !out.contains(name) => out.push(name.clone()),
                Atom::Symbol(_) => {}
                Atom::Quotient(numerator, _) => numerator.collect_symbols(out),
            }
        }
    }
}

impl Dim {
    /// A named size.
    pub fn symbol(name: &str) -> Dim {
        Dim::Expr(Poly::atom(Atom::Symbol(name.to_owned())))
    }

    /// The size, if known.
    pub fn known(&self) -> Option<usize> {
        match self {
            Dim::Known(n) => Some(*n),
            _ => None,
        }
    }

    /// Whether both are certainly the same size.
    pub fn same(&self, other: &Dim) -> bool {
        self == other && *self != Dim::Unknown
    }

    /// Whether both are certainly different sizes, whatever the symbols.
    pub fn differs(&self, other: &Dim) -> bool {
        match self.minus(other) {
            Some(Dim::Known(n)) => n != 0,
            _ => match other.minus(self) {
                Some(Dim::Known(n)) => n != 0,
                _ => false,
            },
        }
    }

    /// The name, if this is a bare symbol.
    pub fn as_symbol(&self) -> Option<&str> {
        let Dim::Expr(poly) = self else { return None };
        match poly.terms.iter().next() {
            Some((factors, 1)) if poly.terms.len() == 1 => match factors.as_slice() {
                [Atom::Symbol(name)] => Some(name),
                _ => None,
            },
            _ => None,
        }
    }

    /// The symbols it depends on, in order of appearance.
    pub fn symbols(&self) -> Vec<String> {
        let mut out = Vec::new();
        if let Dim::Expr(poly) = self {
            poly.collect_symbols(&mut out);
        }
        out
    }

    /// The size once every symbol has one; `None` if a symbol is missing or the result is negative.
    pub fn evaluate(&self, symbols: &dyn Fn(&str) -> Option<usize>) -> Option<usize> {
        match self {
            Dim::Known(n) => Some(*n),
            Dim::Expr(poly) => usize::try_from(poly.evaluate(symbols)?).ok(),
            Dim::Unknown => None,
        }
    }

    fn poly(&self) -> Option<Poly> {
        match self {
            Dim::Known(n) => Some(Poly::constant(i64::try_from(*n).ok()?)),
            Dim::Expr(poly) => Some(poly.clone()),
            Dim::Unknown => None,
        }
    }

    /// Negative constants and overflow become unknown: no dimension has such a size.
    fn from_poly(poly: Option<Poly>) -> Dim {
        let Some(poly) = poly else { return Dim::Unknown };
        match poly.as_constant() {
            Some(n) => usize::try_from(n).map_or(Dim::Unknown, Dim::Known),
            None => Dim::Expr(poly),
        }
    }

    /// The sum.
    pub fn plus(&self, other: &Dim) -> Dim {
        Dim::from_poly(self.poly().zip(other.poly()).and_then(|(a, b)| a.combine(&b, 1)))
    }

    /// The sum with a constant of any sign.
    pub fn offset(&self, by: i64) -> Dim {
        Dim::from_poly(self.poly().and_then(|a| a.combine(&Poly::constant(by), 1)))
    }

    /// The difference; `None` if either is unknown or the difference is a negative constant.
    pub fn minus(&self, other: &Dim) -> Option<Dim> {
        match Dim::from_poly(self.poly().zip(other.poly()).and_then(|(a, b)| a.combine(&b, -1))) {
            Dim::Unknown => None,
            dim => Some(dim),
        }
    }

    /// The product.
    pub fn times(&self, other: &Dim) -> Dim {
        if *self == Dim::Known(0) || *other == Dim::Known(0) {
            return Dim::Known(0);
        }
        Dim::from_poly(self.poly().zip(other.poly()).and_then(|(a, b)| a.multiply(&b)))
    }

    /// The quotient where `other` divides `self` whatever the symbols.
    pub fn divide_exact(&self, other: &Dim) -> Option<Dim> {
        if *other == Dim::Known(0) {
            return None;
        }
        let (a, b) = self.poly().zip(other.poly())?;
        if a == b {
            return Some(Dim::Known(1));
        }
        Some(Dim::from_poly(Some(a.divide_exact(&b)?)))
    }

    /// `floor(self / by)`; unknown for `by` of zero or less.
    pub fn divide_floor(&self, by: i64) -> Dim {
        if by <= 0 {
            return Dim::Unknown;
        }
        match self {
            Dim::Known(n) => usize::try_from(by).map_or(Dim::Unknown, |by| Dim::Known(n / by)),
            Dim::Unknown => Dim::Unknown,
            Dim::Expr(poly) => match poly.divide_exact(&Poly::constant(by)) {
                Some(quotient) => Dim::from_poly(Some(quotient)),
                None => Dim::Expr(Poly::atom(Atom::Quotient(Box::new(poly.clone()), by))),
            },
        }
    }

    /// `ceil(self / by)`; unknown for `by` of zero or less.
    pub fn divide_ceil(&self, by: i64) -> Dim {
        self.offset(by.saturating_sub(1)).divide_floor(by)
    }

    /// The product of many.
    pub fn product<'a>(dims: impl IntoIterator<Item = &'a Dim>) -> Dim {
        dims.into_iter().fold(Dim::Known(1), |product, dim| product.times(dim))
    }
}

impl From<usize> for Dim {
    fn from(n: usize) -> Dim {
        Dim::Known(n)
    }
}

impl From<&str> for Dim {
    fn from(name: &str) -> Dim {
        Dim::symbol(name)
    }
}

/// The known sizes of a shape, if all are known.
pub fn known_shape(shape: &[Dim]) -> Option<Vec<usize>> {
    shape.iter().map(Dim::known).collect()
}

/// A shape of known sizes.
pub fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|n| Dim::Known(*n)).collect()
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Known(n) => write!(f, "{n}"),
            Dim::Expr(poly) => write!(f, "{poly}"),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

impl fmt::Display for Poly {
    /// `2*N*S - 3`, constant last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (constant, rest): (Vec<_>, Vec<_>) = self.terms.iter().partition(|(factors, _)| factors.is_empty());
        for (i, (factors, coefficient)) in rest.into_iter().chain(constant).enumerate() {
            match (i, *coefficient < 0) {
                (0, true) => f.write_str("-")?,
                (0, false) => {}
                (_, true) => f.write_str(" - ")?,
                (_, false) => f.write_str(" + ")?,
            }
            let magnitude = coefficient.unsigned_abs();
            if magnitude != 1 || factors.is_empty() {
                write!(f, "{magnitude}")?;
            }
            for (j, atom) in factors.iter().enumerate() {
                if j > 0 || magnitude != 1 {
                    f.write_str("*")?;
                }
                match atom {
                    Atom::Symbol(name) => write_symbol(f, name)?,
                    Atom::Quotient(numerator, denominator) => write!(f, "floor(({numerator})/{denominator})")?,
                }
            }
        }
        Ok(())
    }
}

/// A name that would not read back as one symbol is quoted.
fn write_symbol(f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
    if is_identifier(name) { f.write_str(name) } else { write!(f, "{:?}", name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_expressions_have_one_form() {
        let n = Dim::symbol("N");
        assert_eq!(n.offset(1).offset(-1), n);
        assert_eq!(n.plus(&n), n.times(&Dim::Known(2)));
        assert_eq!(n.times(&Dim::Known(6)).divide_floor(3), n.plus(&n));
        assert_eq!(n.minus(&n), Some(Dim::Known(0)));
        assert_eq!(n.times(&Dim::symbol("S")).divide_exact(&n), Some(Dim::symbol("S")));
        assert!(n.offset(1).differs(&n));
        assert!(!n.differs(&Dim::Known(3)));
    }

    #[test]
    fn display_shows_the_expression() {
        let n = Dim::symbol("N");
        assert_eq!(n.times(&Dim::Known(2)).offset(-3).to_string(), "2*N - 3");
        assert_eq!(n.offset(1).divide_floor(2).to_string(), "floor((N + 1)/2)");
    }

    #[test]
    fn evaluation_substitutes_every_symbol() {
        let half = Dim::symbol("N").offset(1).divide_floor(2);
        assert_eq!(half.evaluate(&|_| Some(7)), Some(4));
        assert_eq!(half.evaluate(&|_| None), None);
    }
}
