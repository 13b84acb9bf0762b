//! Equal rows among many, by hash, in bounded memory.
//!
//! While the hashes fit, every repeat is found. When they do not, only rows whose hash ends in one more zero bit are kept,
//! again and again: equal rows are kept or dropped together, so the sample has the repeats of a random part of the
//! distinct rows, and counts are multiplied by its share.

use std::collections::HashMap;

/// Memory of one kept hash, with the table's spare room.
const ENTRY_BYTES: u64 = 64;

/// The rows that were met, or a sample of them.
#[derive(Debug)]
pub(super) struct Repeats {
    capacity: usize,
    /// Zero bits that a kept hash ends in.
    level: u32,
    /// The first row of each hash, and the rows that repeat it.
    seen: HashMap<u128, (u64, u64)>,
}

impl Repeats {
    /// Room for as many rows as fit in the memory.
    pub(super) fn new(memory_bytes: u64) -> Repeats {
        let capacity = usize::try_from(memory_bytes / ENTRY_BYTES).unwrap_or(usize::MAX).max(1024);
        Repeats { capacity, level: 0, seen: HashMap::new() }
    }

    /// Takes the next row; gives the first equal one, if there is one in the sample.
    pub(super) fn push(&mut self, hash: u128, row: u64) -> Option<u64> {
        if !self.is_kept(hash) {
            return None;
        }
        if let Some((first, repeats)) = self.seen.get_mut(&hash) {
            *repeats += 1;
            return Some(*first);
        }
        self.seen.insert(hash, (row, 0));
        while self.seen.len() > self.capacity && self.level < 64 {
            self.level += 1;
            let level = self.level;
            self.seen.retain(|hash, _| hash.trailing_zeros() >= level);
        }
        None
    }

    /// The row that has this hash, where it is in the sample.
    pub(super) fn find(&self, hash: u128) -> Option<u64> {
        self.seen.get(&hash).map(|(first, _)| *first)
    }

    fn is_kept(&self, hash: u128) -> bool {
        hash.trailing_zeros() >= self.level
    }

    /// How many rows equal an earlier one: counted, or estimated from the sample.
    pub(super) fn repeats(&self) -> u64 {
        self.seen.values().map(|(_, repeats)| repeats).sum::<u64>() << self.level
    }

    /// Whether every row was looked at.
    pub(super) fn is_exact(&self) -> bool {
        self.level == 0
    }

    /// One in how many distinct rows was looked at.
    pub(super) fn one_in(&self) -> u64 {
        1 << self.level
    }
}

#[cfg(test)]
mod tests {
    use xxhash_rust::xxh3::xxh3_128;

    use super::*;

    #[test]
    fn repeats_are_exact_while_they_fit_and_estimated_beyond() {
        // Every third row repeats an earlier one.
        let rows = 30_000u64;
        let hash = |row: u64| xxh3_128(&(if row % 3 == 2 { row - 1 } else { row }).to_le_bytes());
        let mut roomy = Repeats::new(1 << 30);
        let found: Vec<(u64, u64)> = (0..rows).filter_map(|row| Some((roomy.push(hash(row), row)?, row))).collect();
        assert_eq!((found.len(), roomy.repeats(), roomy.is_exact()), (10_000, 10_000, true));
        assert!(found.iter().all(|(first, row)| *first == row - 1));
        let mut narrow = Repeats::new(2048 * ENTRY_BYTES);
        for row in 0..rows {
            narrow.push(hash(row), row);
        }
        assert!(!narrow.is_exact() && narrow.seen.len() <= 2048);
        // About 1,250 hashes kept, half of them with a repeat: a standard error of some 4 %.
        assert!((narrow.repeats() as f64 / 10_000.0 - 1.0).abs() < 0.2, "{}", narrow.repeats());
    }
}
