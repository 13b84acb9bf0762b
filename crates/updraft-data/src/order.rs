//! The order of samples: a pure function of seed, epoch and position, so that a loader has no state to lose.
//!
//! A source is read in blocks (row groups of a Parquet file). Shuffling permutes the blocks, joins each `w` of them in a
//! window, and permutes the samples of each window; at any time only a window's blocks need to be in memory. With all
//! blocks in one window the shuffle is global.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use updraft_base::{Key, Permutation};

/// How far samples are mixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Shuffle {
    /// Not at all: the order of the source.
    None,
    /// Over the whole dataset.
    Global,
    /// Blocks over the whole dataset, samples among this many blocks.
    Blocks(u64),
}

/// The orders of all epochs of a dataset under one seed.
#[derive(Debug, Clone)]
pub struct Order {
    /// First sample of each block, and the number of samples at the end.
    starts: Vec<u64>,
    shuffle: Shuffle,
    key: Key,
}

impl Order {
    /// The orders of a source with blocks of these many samples.
    pub fn new(seed: u64, block_samples: &[u64], shuffle: Shuffle) -> Order {
        let mut starts = vec![0];
        starts.extend(block_samples.iter().scan(0u64, |sum, n| {
            *sum += n;
            Some(*sum)
        }));
        Order { starts, shuffle, key: Key::new(seed).child("shuffle") }
    }

    /// The number of samples of an epoch.
    pub fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The order of one epoch. Costs time in proportion to the number of blocks, not of samples.
    pub fn epoch(&self, epoch: u64) -> EpochOrder {
        let key = self.key.child_index(epoch);
        let all = [(0, self.len())];
        let windows = match self.shuffle {
            Shuffle::None => Vec::new(),
            Shuffle::Global => vec![Window::new(&key, 0, 0, &all)],
            Shuffle::Blocks(blocks_per_window) => {
                let count = self.starts.len() as u64 - 1;
                let blocks = Permutation::new(&key.child("blocks"), count);
                let order: Vec<(u64, u64)> = (0..count)
                    .map(|i| blocks.get(i) as usize)
                    .map(|b| (self.starts[b], self.starts[b + 1] - self.starts[b]))
                    .collect();
                let mut first = 0;
                let chunk = usize::try_from(blocks_per_window.max(1)).unwrap_or(usize::MAX);
                let chunks = order.chunks(chunk).enumerate();
                chunks
                    .map(|(index, ranges)| {
                        let window = Window::new(&key, index as u64, first, ranges);
                        first += window.permutation.len();
                        window
                    })
                    .collect()
            }
        };
        EpochOrder { len: self.len(), windows }
    }

    /// The sample at a position of an epoch. For many positions of one epoch, ask [`Order::epoch`] once.
    ///
    /// # Panics
    /// If `position` is not below [`Order::len`].
    pub fn sample_at(&self, epoch: u64, position: u64) -> u64 {
        self.epoch(epoch).sample_at(position)
    }
}

/// The order of one epoch.
#[derive(Debug, Clone)]
pub struct EpochOrder {
    len: u64,
    /// In the order of their first positions; none where nothing is shuffled.
    windows: Vec<Window>,
}

#[derive(Debug, Clone)]
struct Window {
    first_position: u64,
    permutation: Permutation,
    /// For each block: the samples of the window before it, and its first sample.
    blocks: Vec<(u64, u64)>,
}

impl Window {
    /// A window over blocks given as (first sample, samples).
    fn new(epoch_key: &Key, index: u64, first_position: u64, ranges: &[(u64, u64)]) -> Window {
        let mut len = 0;
        let mut blocks = Vec::with_capacity(ranges.len());
        for (first_sample, samples) in ranges {
            blocks.push((len, *first_sample));
            len += samples;
        }
        let permutation = Permutation::new(&epoch_key.child("samples").child_index(index), len);
        Window { first_position, permutation, blocks }
    }
}

impl EpochOrder {
    /// The sample at a position.
    ///
    /// # Panics
    /// If `position` is not below the number of samples.
    pub fn sample_at(&self, position: u64) -> u64 {
        assert!(position < self.len, "position {position} of {}", self.len);
        let Some(w) = self.windows.partition_point(|w| w.first_position <= position).checked_sub(1) else {
            return position;
        };
        let window = &self.windows[w];
        let image = window.permutation.get(position - window.first_position);
        // The last block that starts at or before `image`; empty blocks before it start there too, and are passed over.
        let (before, first_sample) = window.blocks[window.blocks.partition_point(|(b, _)| *b <= image) - 1];
        first_sample + (image - before)
    }

    /// The blocks that samples come from, each with the positions between which they do.
    pub(crate) fn uses(&self, block_samples: &[u64]) -> Vec<(usize, Range<u64>)> {
        let mut first = 0;
        let starts: Vec<(usize, u64, u64)> = block_samples
            .iter()
            .enumerate()
            .filter(|(_, samples)| **samples > 0)
            .map(|(block, samples)| {
                first += samples;
                (block, first - samples, first)
            })
            .collect();
        if self.windows.is_empty() {
            return starts.into_iter().map(|(block, start, end)| (block, start..end)).collect();
        }
        let mut uses = Vec::with_capacity(starts.len());
        for window in &self.windows {
            let positions = window.first_position..window.first_position + window.permutation.len();
            // The window of a global shuffle is one range over all blocks.
            for (number, (before, first_sample)) in window.blocks.iter().enumerate() {
                let end = window.blocks.get(number + 1).map_or(window.permutation.len(), |(next, _)| *next);
                let samples = *first_sample..first_sample + (end - before);
                let from = starts.partition_point(|(_, _, end)| *end <= samples.start);
                let overlapping = starts[from..].iter().take_while(|(_, start, _)| *start < samples.end);
                uses.extend(overlapping.map(|(block, ..)| (*block, positions.clone())));
            }
        }
        uses
    }

    /// The position at which a sample is seen: the inverse of [`sample_at`](EpochOrder::sample_at). Costs time in
    /// proportion to the number of blocks.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn position_of(&self, sample: u64) -> u64 {
        assert!(sample < self.len, "sample {sample} of {}", self.len);
        if self.windows.is_empty() {
            return sample;
        }
        for window in &self.windows {
            for (number, (before, first)) in window.blocks.iter().enumerate() {
                let end = window.blocks.get(number + 1).map_or(window.permutation.len(), |(next, _)| *next);
                if (*first..first + (end - before)).contains(&sample) {
                    return window.first_position + window.permutation.inverse(before + (sample - first));
                }
            }
        }
        unreachable!("every sample is in a block")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shuffles() -> impl Strategy<Value = Shuffle> {
        prop_oneof![Just(Shuffle::None), Just(Shuffle::Global), (0u64..6).prop_map(Shuffle::Blocks)]
    }

    proptest! {
        #[test]
        fn every_sample_comes_once_in_every_epoch(
            seed: u64, epoch: u64, blocks in prop::collection::vec(0u64..40, 0..12), shuffle in shuffles(),
        ) {
            let order = Order::new(seed, &blocks, shuffle);
            let epoch_order = order.epoch(epoch);
            let mut samples: Vec<u64> = (0..order.len()).map(|p| epoch_order.sample_at(p)).collect();
            prop_assert!((0..).zip(&samples).all(|(position, sample)| epoch_order.position_of(*sample) == position));
            samples.sort_unstable();
            prop_assert!(samples.into_iter().eq(0..blocks.iter().sum()));
        }
    }

    #[test]
    fn seeds_and_epochs_give_other_orders_and_equal_ones_the_same() {
        let samples = |seed, epoch| -> Vec<u64> {
            let order = Order::new(seed, &[100, 100, 100], Shuffle::Global);
            (0..300).map(|p| order.sample_at(epoch, p)).collect()
        };
        assert_eq!(samples(1, 0), samples(1, 0));
        assert_ne!(samples(1, 0), samples(1, 1));
        assert_ne!(samples(1, 0), samples(2, 0));
    }

    #[test]
    fn a_window_keeps_to_its_blocks() {
        let order = Order::new(3, &[10; 8], Shuffle::Blocks(2)).epoch(0);
        for window in 0..4 {
            let blocks: std::collections::BTreeSet<u64> =
                (0..20).map(|i| order.sample_at(window * 20 + i) / 10).collect();
            assert_eq!(blocks.len(), 2, "window {window} reads blocks {blocks:?}");
        }
    }
}
