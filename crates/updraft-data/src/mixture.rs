//! Several sources by weight, in an order that can be entered anywhere.
//!
//! A mixture is a schedule: which source the item at an index of a lane comes from, and how many items of that source
//! came before it. Two sources with shares `a` and `1 - a` are mixed by counting: `floor(p·a + u)` of the first `p` items
//! are of the first source, where the phase `u` in \[0, 1) is drawn once. Both counts rise, add up to `p`, and are never
//! one item from their share. More sources are mixed by halves, each half a mixture itself, so the counts of all add up
//! to `p` without any correction.
//!
//! Lanes differ by phase: lane `l` has `u + l·α` with an irrational α. The phases of any run of consecutive lanes are
//! spread evenly (three-distance theorem, Sós 1958), so that a batch, which takes one index of many lanes, is mixed by
//! weight too. A lane takes from the lane of its number in each source, so ranks that own lanes own shards.

use updraft_base::Key;

/// Weights of sources from a position of the stream on.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weights {
    /// The first position that they hold for, in samples since the start of training.
    pub from: u64,
    /// The weight of each source; only their ratios count.
    pub weights: Vec<f64>,
}

/// A schedule of sources.
#[derive(Debug, Clone)]
pub struct Mixture {
    sources: usize,
    lanes: u64,
    /// In the order of their first positions; the first begins at 0.
    segments: Vec<Segment>,
}

#[derive(Debug, Clone)]
struct Segment {
    from: u64,
    /// The root first. Without any node all items are of source `only`.
    nodes: Vec<Node>,
    only: usize,
}

/// A choice between two halves of the sources.
#[derive(Debug, Clone)]
struct Node {
    /// The share of the first half, in units of 2^-64.
    share: u64,
    phase: u64,
    lane_phase: u64,
    halves: [Half; 2],
}

#[derive(Debug, Clone, Copy)]
enum Half {
    Node(usize),
    Source(usize),
}

/// What the phase moves by from lane to lane, for each level of halves: the fractions of the golden ratio and of the roots
/// of 2, 3, 7, 11, 13, 17 and 19, in units of 2^-64. They are linearly independent over the rational numbers, so the
/// phases of two levels are spread evenly over a square (Kronecker), not along a line of it.
const LANE_PHASES: [u64; 8] = [
    0x9E37_79B9_7F4A_7C15,
    0x6A09_E667_F3BC_C908,
    0xBB67_AE85_84CA_A73B,
    0xA54F_F53A_5F1D_36F1,
    0x510E_527F_ADE6_82D1,
    0x9B05_688C_2B3E_6C1F,
    0x1F83_D9AB_FB41_BD6B,
    0x5BE0_CD19_137E_2179,
];

impl Mixture {
    /// # Errors
    /// What is wrong with the weights: they must be as many as the sources, finite, not negative, and not all zero; the
    /// first must hold from position 0, and positions must rise.
    pub fn new(key: &Key, sources: usize, lanes: u64, changes: &[Weights]) -> Result<Mixture, String> {
        if changes.first().is_none_or(|first| first.from != 0) {
            return Err("the first weights of a mixture must hold from position 0".into());
        }
        if let Some(pair) = changes.windows(2).find(|pair| pair[0].from >= pair[1].from) {
            return Err(format!("weights from position {} follow those from {}", pair[1].from, pair[0].from));
        }
        let mut segments = Vec::with_capacity(changes.len());
        for (number, Weights { from, weights }) in changes.iter().enumerate() {
            if weights.len() != sources {
                return Err(format!("{} weights from position {from} for {sources} sources", weights.len()));
            }
            let sum = weights.iter().sum::<f64>();
            if weights.iter().any(|w| !w.is_finite() || *w < 0.0) || sum <= 0.0 || !sum.is_finite() {
                return Err(format!(
                    "weights from position {from} must be at least 0, one above it, and their sum finite: {weights:?}"
                ));
            }
            let used: Vec<(usize, f64)> = weights.iter().copied().enumerate().filter(|(_, w)| *w > 0.0).collect();
            let mut segment = Segment { from: *from, nodes: Vec::new(), only: used[0].0 };
            segment.split(&key.child("mixture").child_index(number as u64), &used, 0);
            segments.push(segment);
        }
        Ok(Mixture { sources, lanes: lanes.max(1), segments })
    }

    /// The source of the item at an index of a lane, and how many of the source's items the lane had before.
    pub fn at(&self, lane: u64, index: u64) -> (usize, u64) {
        let position = index.saturating_mul(self.lanes).saturating_add(lane);
        let current = self.segments.partition_point(|s| s.from <= position) - 1;
        let segment = &self.segments[current];
        let (source, count) = segment.at(lane, index - self.first_index(current, lane));
        let before = if current == 0 { 0 } else { self.counts_before(current, lane)[source] };
        (source, before + count)
    }

    /// How many items of each source a lane has before an index.
    pub fn counts(&self, lane: u64, index: u64) -> Vec<u64> {
        let position = index.saturating_mul(self.lanes).saturating_add(lane);
        let current = self.segments.partition_point(|s| s.from <= position) - 1;
        let mut counts = self.counts_before(current, lane);
        self.segments[current].count(lane, index - self.first_index(current, lane), &mut counts);
        counts
    }

    fn counts_before(&self, segment: usize, lane: u64) -> Vec<u64> {
        let mut counts = vec![0; self.sources];
        for earlier in 0..segment {
            let items = self.first_index(earlier + 1, lane) - self.first_index(earlier, lane);
            self.segments[earlier].count(lane, items, &mut counts);
        }
        counts
    }

    /// The first index of a lane that a segment holds for.
    fn first_index(&self, segment: usize, lane: u64) -> u64 {
        self.segments[segment].from.saturating_sub(lane).div_ceil(self.lanes)
    }
}

impl Segment {
    /// Adds the nodes that mix these sources, and answers what stands for them.
    fn split(&mut self, key: &Key, sources: &[(usize, f64)], level: usize) -> Half {
        if let [(source, _)] = sources {
            return Half::Source(*source);
        }
        let (first, second) = sources.split_at(sources.len() / 2);
        let weight = |half: &[(usize, f64)]| half.iter().map(|(_, w)| w).sum::<f64>();
        let share = weight(first) / (weight(first) + weight(second));
        let number = self.nodes.len();
        let phase = key.child_index(number as u64).to_u64();
        // The cast saturates: a share that rounds to 1 stays below it.
        let share = (share * 18_446_744_073_709_551_616.0) as u64;
        let lane_phase = LANE_PHASES[level % LANE_PHASES.len()];
        self.nodes.push(Node { share, phase, lane_phase, halves: [Half::Node(number); 2] });
        let halves = [self.split(key, first, level + 1), self.split(key, second, level + 1)];
        self.nodes[number].halves = halves;
        Half::Node(number)
    }

    fn root(&self) -> Half {
        if self.nodes.is_empty() { Half::Source(self.only) } else { Half::Node(0) }
    }

    fn at(&self, lane: u64, index: u64) -> (usize, u64) {
        let (mut half, mut count) = (self.root(), index);
        loop {
            match half {
                Half::Source(source) => return (source, count),
                Half::Node(number) => {
                    let node = &self.nodes[number];
                    let before = node.first_before(lane, count);
                    if node.first_before(lane, count + 1) > before {
                        (half, count) = (node.halves[0], before);
                    } else {
                        (half, count) = (node.halves[1], count - before);
                    }
                }
            }
        }
    }

    fn count(&self, lane: u64, items: u64, counts: &mut [u64]) {
        let mut left = vec![(self.root(), items)];
        while let Some((half, items)) = left.pop() {
            match half {
                Half::Source(source) => counts[source] += items,
                Half::Node(number) => {
                    let node = &self.nodes[number];
                    let first = node.first_before(lane, items);
                    left.extend([(node.halves[0], first), (node.halves[1], items - first)]);
                }
            }
        }
    }
}

impl Node {
    /// How many of the first `items` are of the first half.
    fn first_before(&self, lane: u64, items: u64) -> u64 {
        let phase = self.phase.wrapping_add(lane.wrapping_mul(self.lane_phase));
        ((u128::from(items) * u128::from(self.share) + u128::from(phase)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn constant(weights: &[f64]) -> Vec<Weights> {
        vec![Weights { from: 0, weights: weights.to_vec() }]
    }

    proptest! {
        #[test]
        fn every_item_of_every_source_comes_once_and_in_order(
            seed: u64, weights in prop::collection::vec(0.0f64..5.0, 1..7), later in prop::collection::vec(0.01f64..5.0, 7),
            from in 1u64..3000, lanes in 1u64..20,
        ) {
            let mut weights = weights;
            weights[0] += 0.01;
            let mut changes = constant(&weights);
            changes.push(Weights { from, weights: later[..weights.len()].to_vec() });
            let mixture = Mixture::new(&Key::new(seed), weights.len(), lanes, &changes).unwrap();
            for lane in [0, lanes - 1] {
                let mut counts = vec![0; weights.len()];
                for index in 0..400 {
                    prop_assert_eq!(&mixture.counts(lane, index), &counts);
                    let (source, count) = mixture.at(lane, index);
                    prop_assert_eq!(count, counts[source]);
                    counts[source] += 1;
                }
            }
        }

        #[test]
        fn a_lane_is_never_far_from_its_weights(
            seed: u64, weights in prop::collection::vec(0.01f64..5.0, 1..9), lane in 0u64..240, index in 0u64..1 << 40,
        ) {
            let mixture = Mixture::new(&Key::new(seed), weights.len(), 240, &constant(&weights)).unwrap();
            let total: f64 = weights.iter().sum();
            for (count, weight) in mixture.counts(lane, index).iter().zip(&weights) {
                let share = index as f64 * weight / total;
                // One item for each level of halves, of which eight sources have three; 1e-3 for rounding at 2^40.
                prop_assert!((*count as f64 - share).abs() < 3.001, "{count} for {share}");
            }
        }
    }

    #[test]
    fn every_batch_is_mixed_by_weight() {
        let weights = [0.6, 0.3, 0.1];
        let mixture = Mixture::new(&Key::new(4), 3, 240, &constant(&weights)).unwrap();
        let mut squares = 0.0;
        for batch in [24u64, 240] {
            for step in 0..2000 {
                let mut counts = [0f64; 3];
                for position in step * batch..(step + 1) * batch {
                    counts[mixture.at(position % 240, position / 240).0] += 1.0;
                }
                for (count, weight) in counts.iter().zip(weights) {
                    let expected = weight * batch as f64;
                    squares += f64::powi(count - expected, 2) / 6000.0;
                    // Draws of independent samples would reach four standard deviations, 30 of 240, in so many steps.
                    assert!((count - expected).abs() <= 7.0, "batch {batch}, step {step}: {counts:?}");
                }
            }
        }
        // Independent draws would give the sum of n·w·(1 - w) over sources, by thirds: 24·0.54/3 + 240·0.54/3 = 47.5.
        assert!(squares < 5.0, "{squares}");
    }

    #[test]
    fn weights_change_at_their_position() {
        let changes = [
            Weights { from: 0, weights: vec![1.0, 0.0] },
            Weights { from: 1000, weights: vec![0.0, 1.0] },
            Weights { from: 2000, weights: vec![1.0, 1.0] },
        ];
        let mixture = Mixture::new(&Key::new(9), 2, 48, &changes).unwrap();
        let source = |position: u64| mixture.at(position % 48, position / 48);
        assert!((0..1000).all(|p| source(p).0 == 0));
        assert!((1000..2000).all(|p| source(p).0 == 1));
        let second = (2000..4000).filter(|p| source(*p).0 == 1).count();
        assert!(second.abs_diff(1000) <= 48, "{second}");
    }

    #[test]
    fn weights_that_mean_nothing_are_refused() {
        for (changes, word) in [
            (vec![], "position 0"),
            (vec![Weights { from: 1, weights: vec![1.0, 1.0] }], "position 0"),
            (constant(&[1.0]), "1 weights"),
            (constant(&[0.0, 0.0]), "above it"),
            (constant(&[1.0, f64::NAN]), "at least 0"),
            (constant(&[1.0, -1.0]), "at least 0"),
            (constant(&[f64::MAX, f64::MAX]), "sum finite"),
            ([constant(&[1.0, 1.0]), constant(&[1.0, 1.0])].concat(), "follow"),
        ] {
            let error = Mixture::new(&Key::new(0), 2, 8, &changes).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
