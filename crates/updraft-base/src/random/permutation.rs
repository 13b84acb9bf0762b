//! A keyed shuffle of `[0, n)` computed one index at a time.
//!
//! The domain is written as pairs (left, right) in mixed radix `a` × `b` with `a` ≈ `b` ≈ √n, and a Feistel network adds
//! to each half in turn, modulo its radix, a random function of the other half (Black and Rogaway: "Ciphers with
//! arbitrary finite domains", CT-RSA 2002). Pairs past `n` are walked on from until an index below `n` comes up. Fewer
//! than `a` pairs lie past `n`, so nearly every index takes one pass, where a power-of-four domain takes up to four.

use crate::random::Key;

/// Six rounds: the halves see each other three times, beyond the four that make a Feistel network hard to tell from a
/// random permutation when its round functions are random (Luby and Rackoff 1988).
const ROUNDS: usize = 6;

/// A bijection of `[0, n)` chosen by a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permutation {
    n: u64,
    left_radix: u64,
    right_radix: u64,
    round_keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `[0, n)` that belongs to `key`.
    pub fn new(key: &Key, n: u64) -> Permutation {
        let root = n.isqrt();
        let left_radix = if root * root < n { root + 1 } else { root }.max(1);
        let right_radix = n.div_ceil(left_radix).max(1);
        let round_keys = std::array::from_fn(|round| key.child_index(round as u64).to_u64());
        Permutation { n, left_radix, right_radix, round_keys }
    }

    /// The number of indices.
    pub fn len(&self) -> u64 {
        self.n
    }

    /// Whether there are no indices.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Where `index` goes.
    ///
    /// # Panics
    /// If `index` is not below `n`.
    pub fn get(&self, index: u64) -> u64 {
        self.walk(index, |mut left, mut right| {
            for round in (0..ROUNDS).step_by(2) {
                left = add(left, self.shift(round, right, self.left_radix), self.left_radix);
                right = add(right, self.shift(round + 1, left, self.right_radix), self.right_radix);
            }
            (left, right)
        })
    }

    /// The index that goes to `image`.
    ///
    /// # Panics
    /// If `image` is not below `n`.
    pub fn inverse(&self, image: u64) -> u64 {
        self.walk(image, |mut left, mut right| {
            for round in (0..ROUNDS).step_by(2).rev() {
                right = subtract(right, self.shift(round + 1, left, self.right_radix), self.right_radix);
                left = subtract(left, self.shift(round, right, self.left_radix), self.left_radix);
            }
            (left, right)
        })
    }

    /// Applies `network` until the result is an index. This ends, because the walk from an index follows a cycle of the
    /// network and at the latest comes back to that index.
    fn walk(&self, index: u64, network: impl Fn(u64, u64) -> (u64, u64)) -> u64 {
        assert!(index < self.n, "index {index} of a permutation of {}", self.n);
        let mut value = index;
        loop {
            let (left, right) = network(value / self.right_radix, value % self.right_radix);
            // Both radices are at most 2^32, so the largest pair is at most 2^64 - 1.
            value = left * self.right_radix + right;
            if value < self.n {
                return value;
            }
        }
    }

    /// The round function: a number below `radix` from one half.
    fn shift(&self, round: usize, half: u64, radix: u64) -> u64 {
        // The finaliser of SplitMix64 (Steele, Lea, Flood 2014), then the high half of a product as the remainder.
        let mut z = half.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ self.round_keys[round];
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        ((u128::from(z) * u128::from(radix)) >> 64) as u64
    }
}

/// `a + b` modulo `radix`, for both below `radix` ≤ 2^32.
fn add(a: u64, b: u64, radix: u64) -> u64 {
    let sum = a + b;
    if sum >= radix { sum - radix } else { sum }
}

fn subtract(a: u64, b: u64, radix: u64) -> u64 {
    if a >= b { a - b } else { a + radix - b }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_small_permutation_is_a_bijection() {
        for n in 0..300 {
            let permutation = Permutation::new(&Key::new(n * 31), n);
            let mut images: Vec<u64> = (0..n).map(|i| permutation.get(i)).collect();
            images.sort_unstable();
            assert!(images.into_iter().eq(0..n), "{n}");
        }
    }

    #[test]
    fn all_orders_of_four_come_up_equally_often() {
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..24_000 {
            let permutation = Permutation::new(&Key::new(seed), 4);
            let order: Vec<u64> = (0..4).map(|i| permutation.get(i)).collect();
            *counts.entry(order).or_insert(0i64) += 1;
        }
        assert_eq!(counts.len(), 24);
        // Six standard deviations of a binomial count with mean 1000.
        assert!(counts.values().all(|n| (n - 1000).abs() < 190), "{counts:?}");
    }

    #[test]
    fn indices_move_as_far_as_in_a_uniform_shuffle() {
        let n = 100_000;
        let permutation = Permutation::new(&Key::new(5), n);
        let distance: u64 = (0..n).map(|i| permutation.get(i).abs_diff(i)).sum();
        let mean = distance as f64 / n as f64 / n as f64;
        // A third, with standard deviation sqrt(1 / 18 / n) = 0.0007 over the draws.
        assert!((mean - 1.0 / 3.0).abs() < 0.004, "{mean}");
        // Neighbours part: the chance that one follows the other is 2 / n, so five would be far out.
        let neighbours = (1..n).filter(|i| permutation.get(*i).abs_diff(permutation.get(i - 1)) == 1).count();
        assert!(neighbours < 12, "{neighbours}");
    }

    proptest! {
        #[test]
        fn inverse_undoes_get(seed: u64, n in 1..u64::MAX, at: u64) {
            let permutation = Permutation::new(&Key::new(seed), n);
            let index = at % n;
            let image = permutation.get(index);
            prop_assert!(image < n);
            prop_assert_eq!(permutation.inverse(image), index);
        }
    }

    #[test]
    fn the_largest_domain_does_not_overflow() {
        let permutation = Permutation::new(&Key::new(1), u64::MAX);
        for index in [0, 1, u64::MAX / 2, u64::MAX - 1] {
            assert_eq!(permutation.inverse(permutation.get(index)), index);
        }
    }
}
