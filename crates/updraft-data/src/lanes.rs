//! The order of samples that does not know how many machines read it.
//!
//! An epoch is cut into a fixed number `C` of lanes, and position `p` is index `p div C` of lane `p mod C`. Ranks own
//! lanes, so a change of ranks changes who reads a sample and never which batch it is in.
//!
//! ```text
//! blocks in dealt order   | 4 |  7  | 1 |   9   |  0  |  …      one line of N places
//! lanes                   |   lane 0   |   lane 1   |  …        equal lengths, so a border may cut a block
//! windows of two blocks   |  w0   | w1 |  w0  | w1  |  …        samples are permuted inside a window
//! ```
//!
//! Dealing and permuting are keyed Feistel networks ([`Permutation`]), so nothing is kept for a sample, and 8 bytes for a
//! block. Each block is read for one lane, or for two where a border cuts it: about one read of the dataset an epoch.

use std::ops::Range;
use std::sync::Arc;

use updraft_base::{Key, Permutation};

use crate::order::Shuffle;

/// The orders of all epochs of one source under one seed.
#[derive(Debug, Clone)]
pub struct Lanes {
    /// First sample of each block, and the number of samples at the end.
    starts: Arc<[u64]>,
    count: u64,
    shuffle: Shuffle,
    key: Key,
}

impl Lanes {
    /// The orders of a source with blocks of these many samples, in `count` lanes (at least one). `Shuffle::Global` mixes
    /// each lane over all its blocks.
    pub fn new(key: &Key, block_samples: &[u64], count: u64, shuffle: Shuffle) -> Lanes {
        let starts = std::iter::once(0).chain(block_samples.iter().scan(0u64, |sum, n| {
            *sum += n;
            Some(*sum)
        }));
        Lanes { starts: starts.collect(), count: count.max(1), shuffle, key: key.child("lanes") }
    }

    /// The number of samples of an epoch.
    pub fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of lanes.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The number of samples of one lane, the same in every epoch; lanes differ by at most one.
    pub fn lane_len(&self, lane: u64) -> u64 {
        self.len() / self.count + u64::from(lane < self.len() % self.count)
    }

    /// The order of one epoch. Costs time and 8 bytes for each block, nothing for samples.
    pub fn epoch(&self, epoch: u64) -> LaneEpoch {
        let key = self.key.child_index(epoch);
        let blocks = self.starts.len() as u64 - 1;
        let dealt = match self.shuffle {
            Shuffle::None => None,
            Shuffle::Global | Shuffle::Blocks(_) => Some(Permutation::new(&key.child("blocks"), blocks)),
        };
        let mut borders = Vec::with_capacity(self.starts.len());
        let mut place = 0;
        for turn in 0..blocks {
            borders.push(place);
            let block = dealt.as_ref().map_or(turn, |p| p.get(turn)) as usize;
            place += self.starts[block + 1] - self.starts[block];
        }
        borders.push(place);
        LaneEpoch { lanes: self.clone(), samples: key.child("samples"), dealt, borders }
    }
}

/// The order of one epoch.
#[derive(Debug, Clone)]
pub struct LaneEpoch {
    lanes: Lanes,
    /// What samples are permuted by.
    samples: Key,
    /// The block of each turn; `None` where each has its own turn.
    dealt: Option<Permutation>,
    /// First place of the block of each turn, and the number of places at the end.
    borders: Vec<u64>,
}

/// Consecutive places of a lane, permuted among themselves.
struct Window {
    places: Range<u64>,
    permutation: Option<Permutation>,
}

impl LaneEpoch {
    /// The sample at a position: O(log blocks).
    ///
    /// # Panics
    /// If `position` is not below the number of samples.
    pub fn sample_at(&self, position: u64) -> u64 {
        let (lane, index) = (position % self.lanes.count, position / self.lanes.count);
        let mut sample = [0];
        self.fill(lane, index, &mut sample);
        sample[0]
    }

    /// The position at which a sample is seen: the inverse of [`sample_at`](LaneEpoch::sample_at).
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn position_of(&self, sample: u64) -> u64 {
        assert!(sample < self.lanes.len(), "sample {sample} of {}", self.lanes.len());
        let block = last_at_most(&self.lanes.starts, sample);
        let turn = self.dealt.as_ref().map_or(block as u64, |p| p.inverse(block as u64)) as usize;
        let image = self.borders[turn] + (sample - self.lanes.starts[block]);
        let lane = self.lane_of(image);
        let window = self.window(lane, image);
        let place = match &window.permutation {
            Some(permutation) => window.places.start + permutation.inverse(image - window.places.start),
            None => image,
        };
        (place - self.lane_start(lane)) * self.lanes.count + lane
    }

    /// The samples of a lane at `first_index` and the indices after it.
    ///
    /// # Panics
    /// If the lane has no such index.
    pub fn fill(&self, lane: u64, first_index: u64, out: &mut [u64]) {
        let len = self.lanes.lane_len(lane);
        let end = first_index.saturating_add(out.len() as u64);
        assert!(
            lane < self.lanes.count && end <= len,
            "indices {first_index} to {end} of lane {lane}, which has {len}"
        );
        let mut place = self.lane_start(lane) + first_index;
        let mut rest = out;
        while !rest.is_empty() {
            let window = self.window(lane, place);
            let taken = usize::try_from(window.places.end - place).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(taken);
            match (&window.permutation, &mut *now) {
                (Some(permutation), [one]) => *one = permutation.get(place - window.places.start),
                (Some(permutation), many) => permutation.fill(place - window.places.start, many),
                (None, many) => many.iter_mut().zip(place - window.places.start..).for_each(|(o, i)| *o = i),
            }
            for image in now.iter_mut() {
                let image_place = window.places.start + *image;
                let turn = last_at_most(&self.borders, image_place);
                *image = self.lanes.starts[self.block(turn)] + (image_place - self.borders[turn]);
            }
            place += taken as u64;
            rest = later;
        }
    }

    /// The blocks that a lane reads, in the order in which it first needs them.
    pub fn blocks_of(&self, lane: u64) -> impl Iterator<Item = u64> + '_ {
        let places = self.lane_start(lane)..self.lane_start(lane + 1);
        let first = last_at_most(&self.borders, places.start);
        let end = if places.is_empty() { first } else { self.borders.partition_point(|border| *border < places.end) };
        (first..end).filter(|turn| self.borders[*turn] < self.borders[turn + 1]).map(|turn| self.block(turn) as u64)
    }

    /// The blocks that samples come from, each with the positions between which they do; a block that a border cuts
    /// comes twice.
    pub(crate) fn uses(&self) -> Vec<(usize, Range<u64>)> {
        let mut uses = Vec::with_capacity(self.borders.len());
        for lane in 0..self.lanes.count {
            let position = |index: u64| index * self.lanes.count + lane;
            for (indices, blocks) in self.windows(lane) {
                uses.extend(blocks.map(|block| (block, position(indices.start)..position(indices.end - 1) + 1)));
            }
        }
        uses
    }

    /// The windows of a lane in their order: the indices in each, and the blocks that their samples come from.
    pub(crate) fn windows(&self, lane: u64) -> impl Iterator<Item = (Range<u64>, impl Iterator<Item = usize>)> {
        let places = self.lane_start(lane)..self.lane_start(lane + 1);
        let mut place = places.start;
        std::iter::from_fn(move || {
            let start = Some(place).filter(|place| *place < places.end)?;
            // Unshuffled, each block is a window of its own.
            let turn = last_at_most(&self.borders, start);
            let window = match self.lanes.shuffle {
                Shuffle::None => start..self.borders[turn + 1].min(places.end),
                Shuffle::Global | Shuffle::Blocks(_) => self.window(lane, start).places,
            };
            place = window.end;
            let turns = turn..self.borders.partition_point(|border| *border < window.end);
            let filled = turns.filter(|turn| self.borders[*turn] < self.borders[turn + 1]);
            Some((window.start - places.start..window.end - places.start, filled.map(|turn| self.block(turn))))
        })
    }

    fn block(&self, turn: usize) -> usize {
        self.dealt.as_ref().map_or(turn, |p| p.get(turn as u64) as usize)
    }

    /// The first place of a lane: the longer lanes come first.
    fn lane_start(&self, lane: u64) -> u64 {
        let (len, count) = (self.lanes.len(), self.lanes.count);
        lane * (len / count) + lane.min(len % count)
    }

    /// The lane that a place belongs to.
    fn lane_of(&self, place: u64) -> u64 {
        let (short, longer) = (self.lanes.len() / self.lanes.count, self.lanes.len() % self.lanes.count);
        let in_longer = longer * (short + 1);
        if place < in_longer { place / (short + 1) } else { longer + (place - in_longer) / short }
    }

    /// The window of a lane that a place lies in.
    fn window(&self, lane: u64, place: u64) -> Window {
        let places = self.lane_start(lane)..self.lane_start(lane + 1);
        let blocks = match self.lanes.shuffle {
            Shuffle::None => return Window { places, permutation: None },
            Shuffle::Global => usize::MAX,
            Shuffle::Blocks(blocks) => usize::try_from(blocks.max(1)).unwrap_or(usize::MAX),
        };
        let first = last_at_most(&self.borders, places.start);
        let number = (last_at_most(&self.borders, place) - first) / blocks;
        let border = |number: usize| {
            let turn = first.saturating_add(number.saturating_mul(blocks));
            self.borders.get(turn).copied().unwrap_or(u64::MAX).clamp(places.start, places.end)
        };
        // The first block of a lane may have begun in the lane before.
        let start = if number == 0 { places.start } else { border(number) };
        let window = start..border(number + 1);
        let key = self.samples.child_index(lane).child_index(number as u64);
        Window { permutation: Some(Permutation::new(&key, window.end - window.start)), places: window }
    }
}

/// The last of some rising numbers that is at most `value`, which the first one is. Of equal ones the last: what is
/// empty is passed over.
fn last_at_most(numbers: &[u64], value: u64) -> usize {
    numbers.partition_point(|n| *n <= value).saturating_sub(1)
}

/// The rows of a global batch that belong to one rank: consecutive slots, of which a batch of `B` samples has min(B, C).
/// The rows are the same in every step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    slots: u64,
    owned: Range<u64>,
}

impl Share {
    /// The share of `rank` where ranks take lanes by weight, such as their speed.
    ///
    /// # Errors
    /// Lanes and batch size of which neither divides the other, a rank that does not exist, or one without a lane.
    pub fn new(lanes: u64, batch_size: u64, rank: usize, weights: &[u64]) -> Result<Share, String> {
        let slots = lanes.min(batch_size);
        if slots == 0 || (!lanes.is_multiple_of(batch_size) && !batch_size.is_multiple_of(lanes)) {
            return Err(format!("{lanes} lanes and batches of {batch_size}: one must divide the other"));
        }
        if rank >= weights.len() {
            return Err(format!("rank {rank} of {} does not exist", weights.len()));
        }
        let total: u128 = weights.iter().map(|w| u128::from(*w)).sum();
        let border = |rank: usize| {
            let before: u128 = weights[..rank].iter().map(|w| u128::from(*w)).sum();
            (before * u128::from(slots)).checked_div(total).unwrap_or(0) as u64
        };
        let owned = border(rank)..border(rank + 1);
        if owned.is_empty() {
            return Err(format!("rank {rank} of {} gets none of the {slots} lanes that a batch has", weights.len()));
        }
        Ok(Share { slots, owned })
    }

    /// Whether a row of the global batch belongs to the rank.
    pub fn has_row(&self, row: u64) -> bool {
        self.owned.contains(&(row % self.slots))
    }

    /// Whether of two neighbouring rows, the first of even number, both or neither belong to the rank.
    pub fn keeps_pairs(&self) -> bool {
        [self.slots, self.owned.start, self.owned.end].iter().all(|border| border.is_multiple_of(2))
    }

    /// Whether a lane belongs to the rank.
    pub fn has_lane(&self, lane: u64) -> bool {
        self.owned.contains(&(lane % self.slots))
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
        fn every_sample_comes_once_in_every_epoch_and_is_found_where_it_came(
            seed: u64, epoch: u64, blocks in prop::collection::vec(0u64..40, 1..12), count in 1u64..50, shuffle in shuffles(),
        ) {
            let lanes = Lanes::new(&Key::new(seed), &blocks, count, shuffle);
            let order = lanes.epoch(epoch);
            let samples: Vec<u64> = (0..lanes.len()).map(|p| order.sample_at(p)).collect();
            for (position, sample) in samples.iter().enumerate() {
                prop_assert_eq!(order.position_of(*sample), position as u64);
            }
            let mut sorted = samples.clone();
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..lanes.len()));
            // By lanes it is the same.
            for lane in 0..count {
                let mut of_lane = vec![0; lanes.lane_len(lane) as usize];
                order.fill(lane, 0, &mut of_lane);
                let strided = samples.iter().skip(lane as usize).step_by(count as usize);
                prop_assert!(of_lane.iter().eq(strided));
                let read: std::collections::BTreeSet<u64> = order.blocks_of(lane).collect();
                for (index, sample) in (0u64..).zip(&of_lane) {
                    let (position, block) = (index * count + lane, last_at_most(&lanes.starts, *sample));
                    prop_assert!(order.uses().iter().any(|(b, positions)| *b == block && positions.contains(&position)));
                }
                let starts = lanes.starts.clone();
                let needed = of_lane.iter().map(|s| last_at_most(&starts, *s) as u64).collect();
                prop_assert_eq!(read, needed);
            }
        }
    }

    #[test]
    fn a_lane_reads_the_blocks_of_one_window_at_a_time() {
        let lanes = Lanes::new(&Key::new(3), &[10; 64], 4, Shuffle::Blocks(4));
        let order = lanes.epoch(0);
        for lane in 0..4 {
            let mut samples = [0; 160];
            order.fill(lane, 0, &mut samples);
            for window in samples.chunks(40) {
                let blocks: std::collections::BTreeSet<u64> = window.iter().map(|s| s / 10).collect();
                assert_eq!(blocks.len(), 4, "lane {lane} reads {blocks:?}");
            }
        }
    }

    #[test]
    fn blocks_are_read_for_one_lane_but_at_borders() {
        let lanes = Lanes::new(&Key::new(5), &[37; 1000], 48, Shuffle::Blocks(8));
        let order = lanes.epoch(7);
        let reads: usize = (0..48).map(|lane| order.blocks_of(lane).count()).sum();
        assert!((1000..1000 + 48).contains(&reads), "{reads}");
    }

    #[test]
    fn samples_move_as_far_as_in_a_uniform_shuffle_whatever_the_window() {
        let n = 64_000u64;
        for shuffle in [Shuffle::Blocks(1), Shuffle::Blocks(8), Shuffle::Global] {
            let order = Lanes::new(&Key::new(1), &[64; 1000], 48, shuffle).epoch(0);
            let distance: u64 = (0..n).map(|p| order.sample_at(p).abs_diff(p)).sum();
            let mean = distance as f64 / n as f64 / n as f64;
            // A third; blocks move as one, so the standard deviation is that of 1000 draws: sqrt(1 / 18 / 1000) = 0.0075.
            assert!((mean - 1.0 / 3.0).abs() < 0.03, "{shuffle:?}: {mean}");
        }
    }

    #[test]
    fn ranks_share_out_every_row_and_every_lane_once() {
        for (lanes, batch) in [(240, 48), (48, 240), (240, 240), (12, 12), (48, 8)] {
            for ranks in [1, 2, 3, 4, 6, 8] {
                let shares: Vec<Share> =
                    (0..ranks).map(|r| Share::new(lanes, batch, r, &vec![1; ranks]).unwrap()).collect();
                for row in 0..batch {
                    assert_eq!(shares.iter().filter(|s| s.has_row(row)).count(), 1);
                    // A row is read by the rank of its lane, at whichever step.
                    for step in 0..5 {
                        let lane = (step * batch + row) % lanes;
                        assert!(shares.iter().all(|s| s.has_row(row) == s.has_lane(lane)));
                    }
                }
            }
        }
        let slow = Share::new(240, 240, 0, &[1, 3]).unwrap();
        assert_eq!((0..240).filter(|l| slow.has_lane(*l)).count(), 60);
        for (lanes, batch, rank, weights) in
            [(7, 3, 0, &[1][..]), (8, 8, 1, &[1]), (2, 2, 0, &[1, 1, 1]), (8, 8, 0, &[0])]
        {
            assert!(Share::new(lanes, batch, rank, weights).is_err());
        }
    }
}
