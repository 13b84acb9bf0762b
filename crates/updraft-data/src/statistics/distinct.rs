//! How many different values there are, by the smallest hashes met: exact while few, an estimate beyond.
//!
//! The k minimum values of Bar-Yossef, Jayram, Kumar, Sivakumar and Trevisan ("Counting distinct elements in a data
//! stream", RANDOM 2002): with the k-th smallest of uniform hashes at a fraction f of their range, about (k − 1)/f values
//! were met, with a standard error of 1/√(k − 2).

use serde::{Deserialize, Serialize};

/// Hashes kept: counts up to this are exact (but for equal hashes), others have a standard error of 3 %.
const KEPT: usize = 1024;

/// The smallest hashes of what was met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Distinct {
    kept: usize,
    /// In order, each once.
    smallest: Vec<u64>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    kept: usize,
    smallest: Vec<u64>,
}

impl TryFrom<Stored> for Distinct {
    type Error = String;

    fn try_from(Stored { kept, smallest }: Stored) -> Result<Distinct, String> {
        if !(3..=KEPT).contains(&kept) || smallest.len() > kept || !smallest.is_sorted_by(|a, b| a < b) {
            return Err(format!("3 to {KEPT} smallest hashes are kept, in order and each once"));
        }
        Ok(Distinct { kept, smallest })
    }
}

impl From<Distinct> for Stored {
    fn from(Distinct { kept, smallest }: Distinct) -> Stored {
        Stored { kept, smallest }
    }
}

impl Default for Distinct {
    fn default() -> Distinct {
        Distinct { kept: KEPT, smallest: Vec::new() }
    }
}

impl Distinct {
    /// Takes the hash of a value.
    pub fn push(&mut self, hash: u64) {
        if self.smallest.len() == self.kept && self.smallest.last().is_some_and(|largest| hash >= *largest) {
            return;
        }
        if let Err(place) = self.smallest.binary_search(&hash) {
            self.smallest.insert(place, hash);
            self.smallest.truncate(self.kept);
        }
    }

    /// Adds the values of another part.
    pub fn merge(&mut self, other: &Distinct) {
        self.kept = self.kept.min(other.kept);
        self.smallest.extend(&other.smallest);
        self.smallest.sort_unstable();
        self.smallest.dedup();
        self.smallest.truncate(self.kept);
    }

    /// The same with at most so many hashes, at least 3.
    pub fn coarse(mut self, kept: usize) -> Distinct {
        self.kept = self.kept.min(kept.max(3));
        self.smallest.truncate(self.kept);
        self
    }

    /// How many different values were met.
    pub fn estimate(&self) -> u64 {
        match self.smallest.last() {
            Some(largest) if !self.is_exact() => {
                ((self.kept - 1) as f64 / ((*largest as f64 + 1.0) / 2f64.powi(64))).round() as u64
            }
            _ => self.smallest.len() as u64,
        }
    }

    /// Whether all values were counted, rather than estimated.
    pub fn is_exact(&self) -> bool {
        self.smallest.len() < self.kept
    }
}

#[cfg(test)]
mod tests {
    use updraft_base::Key;

    use super::*;

    fn of(hashes: impl Iterator<Item = u64>) -> Distinct {
        let mut distinct = Distinct::default();
        hashes.for_each(|h| distinct.push(h));
        distinct
    }

    fn hashes(n: u64) -> impl Iterator<Item = u64> {
        (0..n).map(|i| Key::new(5).child_index(i).to_u64())
    }

    #[test]
    fn few_are_exact_and_many_within_five_standard_errors() {
        for n in [0, 1, 1000, 1023] {
            let distinct = of(hashes(n).chain(hashes(n)));
            assert_eq!((distinct.estimate(), distinct.is_exact()), (n, true));
        }
        for n in [5_000u64, 100_000] {
            let estimate = of(hashes(n)).estimate() as f64;
            assert!((estimate / n as f64 - 1.0).abs() < 5.0 / (KEPT as f64).sqrt(), "{n}: {estimate}");
        }
    }

    #[test]
    fn parts_make_the_sketch_of_the_whole_and_read_back() {
        let all: Vec<u64> = hashes(9_000).collect();
        let mut parts = of(all[6_000..].iter().copied());
        parts.merge(&of(all[..7_000].iter().copied()));
        assert_eq!(parts, of(all.into_iter()));
        let stored = serde_json::to_string(&parts).unwrap();
        assert_eq!(serde_json::from_str::<Distinct>(&stored).unwrap(), parts);
        let coarse = parts.coarse(64);
        assert!((coarse.estimate() as f64 / 9_000.0 - 1.0).abs() < 5.0 / 8.0 && !coarse.is_exact());
    }
}
