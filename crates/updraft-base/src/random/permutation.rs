//! A keyed shuffle of `[0, n)` computed one index at a time.
//!
//! The domain is written as pairs (left, right) in mixed radix `a` × `b` with `a` ≈ `b` ≈ √n, and a Feistel network adds
//! to each half in turn, modulo its radix, a random function of the other half (Black and Rogaway: "Ciphers with
//! arbitrary finite domains", CT-RSA 2002). Pairs past `n` are walked on from until an index below `n` comes up. Fewer
//! than `a` pairs lie past `n`, so nearly every index takes one pass, where a power-of-four domain takes up to four.

use multiversion::multiversion;

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
        assert!(index < self.n, "index {index} of a permutation of {}", self.n);
        self.onward(index)
    }

    /// The first index that the network leads to from a pair, which may lie past `n`.
    fn onward(&self, pair: u64) -> u64 {
        self.walk(pair, |mut left, mut right| {
            for round in (0..ROUNDS).step_by(2) {
                left = add(left, shift(self.round_keys[round], right, self.left_radix), self.left_radix);
                right = add(right, shift(self.round_keys[round + 1], left, self.right_radix), self.right_radix);
            }
            (left, right)
        })
    }

    /// Where `first`, `first + 1` and so on go: `out[i] = get(first + i)`, at a quarter of the time an index.
    ///
    /// # Panics
    /// If an index is not below `n`.
    pub fn fill(&self, first: u64, out: &mut [u64]) {
        let end = first.checked_add(out.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.n),
            "{} indices from {first} of a permutation of {}",
            out.len(),
            self.n
        );
        let (Ok(left_radix), Ok(right_radix)) = (u32::try_from(self.left_radix), u32::try_from(self.right_radix))
        else {
            out.iter_mut().zip(first..).for_each(|(image, index)| *image = self.get(index));
            return;
        };
        let mut index = first;
        for group in out.chunks_mut(WIDTH) {
            // A short last group computes the images of indices that nobody asked for.
            let mut values = std::array::from_fn(|i| index.wrapping_add(i as u64));
            network(&self.round_keys, left_radix, right_radix, &mut values);
            for (image, value) in group.iter_mut().zip(values) {
                *image = if value < self.n { value } else { self.onward(value) };
            }
            index += group.len() as u64;
        }
    }

    /// The index that goes to `image`.
    ///
    /// # Panics
    /// If `image` is not below `n`.
    pub fn inverse(&self, image: u64) -> u64 {
        assert!(image < self.n, "image {image} of a permutation of {}", self.n);
        self.walk(image, |mut left, mut right| {
            for round in (0..ROUNDS).step_by(2).rev() {
                right = subtract(right, shift(self.round_keys[round + 1], left, self.right_radix), self.right_radix);
                left = subtract(left, shift(self.round_keys[round], right, self.left_radix), self.left_radix);
            }
            (left, right)
        })
    }

    /// Applies `network` until the result is an index. This ends, because the walk from an index follows a cycle of the
    /// network and at the latest comes back to that index.
    fn walk(&self, index: u64, network: impl Fn(u64, u64) -> (u64, u64)) -> u64 {
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
}

/// The round function: a number below `radix` from one half.
fn shift(round_key: u64, half: u64, radix: u64) -> u64 {
    ((u128::from(scramble(round_key, half)) * u128::from(radix)) >> 64) as u64
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014), of which the high half of a product serves as the remainder.
#[inline(always)]
fn scramble(round_key: u64, half: u64) -> u64 {
    let mut z = half.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ round_key;
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}

/// Pairs that go through the network side by side in [`Permutation::fill`]: two vector registers of the widest
/// instruction set.
const WIDTH: usize = 16;

/// One pass of `WIDTH` pairs through the network. With radices below 2^32 the high half of the product needs no 128 bits:
/// every operation is one that vector instructions have.
#[multiversion(targets("x86_64+avx512f+avx512dq", "x86_64+avx2", "aarch64+neon"))]
fn network(round_keys: &[u64; ROUNDS], left_radix: u32, right_radix: u32, values: &mut [u64; WIDTH]) {
    #[inline(always)]
    fn step(into: &mut [u64; WIDTH], from: &[u64; WIDTH], round_key: u64, radix: u32) {
        let radix = u64::from(radix);
        for i in 0..WIDTH {
            let z = scramble(round_key, from[i]);
            let shift = ((z >> 32) * radix + (((z & 0xFFFF_FFFF) * radix) >> 32)) >> 32;
            let sum = into[i] + shift;
            into[i] = sum - if sum >= radix { radix } else { 0 };
        }
    }
    let radix = u64::from(right_radix);
    let mut left = values.map(|value| value / radix);
    let mut right = [0; WIDTH];
    for i in 0..WIDTH {
        right[i] = values[i] - left[i] * radix;
    }
    for round in (0..ROUNDS).step_by(2) {
        step(&mut left, &right, round_keys[round], left_radix);
        step(&mut right, &left, round_keys[round + 1], right_radix);
    }
    for i in 0..WIDTH {
        // Only pairs past the domain, which nobody asked for, could wrap.
        values[i] = left[i].wrapping_mul(radix).wrapping_add(right[i]);
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

    proptest! {
        #[test]
        fn many_images_at_once_are_those_of_one_at_a_time(seed: u64, n in 1..u64::MAX, at: u64, len in 0u64..70, small: bool) {
            let n = if small { n % 1000 + 1 } else { n };
            let permutation = Permutation::new(&Key::new(seed), n);
            let first = at % n;
            let mut images = vec![0; len.min(n - first) as usize];
            permutation.fill(first, &mut images);
            prop_assert!(images.iter().zip(first..).all(|(image, index)| *image == permutation.get(index)));
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
