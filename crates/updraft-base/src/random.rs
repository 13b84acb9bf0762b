//! Randomness as a pure function of (key, counter): no generator state, so any number of threads, in any order, from any
//! point onwards, draw the same numbers.
//!
//! The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//! A [`Key`] stands for one stream; keys for parts of a job are derived by label and index, never by hand-made arithmetic
//! on seeds. [`Permutation`] is a keyed shuffle of `[0, n)` that takes no memory.

use multiversion::multiversion;

use crate::digest::Hasher;

mod permutation;

pub use permutation::Permutation;

/// The key of one random stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u32; 2]);

/// The last counter word of [`Key::child_index`], which therefore is not for drawing.
const CHILD_WORD: u32 = u32::MAX;

/// Blocks computed side by side in the bulk functions: enough for one vector register of the widest instruction set.
const WIDTH: usize = 16;

impl Key {
    /// The root key of a seed. The two words of the Philox key are the seed's low and high halves.
    pub const fn new(seed: u64) -> Key {
        Key([seed as u32, (seed >> 32) as u32])
    }

    /// The key of a named part (`"shuffle"`, `"dropout"`), unrelated to its parent and siblings.
    pub fn child(&self, label: &str) -> Key {
        let mut hasher = Hasher::new();
        hasher.field(&self.to_u64().to_le_bytes());
        hasher.field(label.as_bytes());
        let digest = hasher.finish();
        let mut seed = [0; 8];
        seed.copy_from_slice(&digest.as_bytes()[..8]);
        Key::new(u64::from_le_bytes(seed))
    }

    /// The key of a numbered part (an epoch, a sample, a node), unrelated to its parent and siblings.
    pub const fn child_index(&self, index: u64) -> Key {
        let block = self.block([index as u32, (index >> 32) as u32, 0, CHILD_WORD]);
        Key([block[0], block[1]])
    }

    /// The key as a number, from which [`Key::new`] makes it again.
    pub const fn to_u64(&self) -> u64 {
        (self.0[1] as u64) << 32 | self.0[0] as u64
    }

    /// 128 random bits: one Philox4x32-10 block. Counters whose last word is `u32::MAX` are taken by
    /// [`child_index`](Key::child_index).
    pub const fn block(&self, counter: [u32; 4]) -> [u32; 4] {
        let mut state = counter;
        let mut key = self.0;
        let mut round = 0;
        while round < ROUNDS {
            let first = MULTIPLIERS[0] as u64 * state[0] as u64;
            let second = MULTIPLIERS[1] as u64 * state[2] as u64;
            state = [
                (second >> 32) as u32 ^ state[1] ^ key[0],
                second as u32,
                (first >> 32) as u32 ^ state[3] ^ key[1],
                first as u32,
            ];
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
            round += 1;
        }
        state
    }

    /// Word `counter` of the stream: 32 random bits.
    pub const fn bits(&self, counter: u64) -> u32 {
        let index = counter >> 2;
        self.block([index as u32, (index >> 32) as u32, 0, 0])[(counter & 3) as usize]
    }

    /// Number `counter` of the stream, uniform on the multiples of 2^-24 in `[0, 1)`.
    pub fn uniform_f32(&self, counter: u64) -> f32 {
        uniform_of(self.bits(counter))
    }

    /// Number `counter` of the stream, uniform on `[0, n)`; zero where `n` is zero. The bias is below `n` / 2^64.
    pub const fn below(&self, counter: u64, n: u64) -> u64 {
        let block = self.block([counter as u32, (counter >> 32) as u32, 1, 0]);
        let bits = (block[1] as u64) << 32 | block[0] as u64;
        ((bits as u128 * n as u128) >> 64) as u64
    }

    /// Number `counter` of the stream, standard normal (Box and Muller 1958), within ±6.67.
    ///
    /// The functions behind it are those of the crate `libm`, not of the platform, so the bits are the same everywhere.
    pub fn normal_f32(&self, counter: u64) -> f32 {
        let index = counter >> 2;
        let block = self.block([index as u32, (index >> 32) as u32, 0, 0]);
        let pair = (counter & 2) as usize;
        let (cosine, sine) = normals_of(block[pair], block[pair + 1]);
        if counter & 1 == 0 { cosine } else { sine }
    }
}

/// Fills `out[i]` with [`Key::uniform_f32`]`(first_counter + i)`.
pub fn fill_uniform(key: &Key, first_counter: u64, out: &mut [f32]) {
    fill(key, first_counter, out, |words, values| {
        for (value, word) in values.iter_mut().zip(words) {
            *value = uniform_of(*word);
        }
    });
}

/// Fills `out[i]` with [`Key::normal_f32`]`(first_counter + i)`.
pub fn fill_normal(key: &Key, first_counter: u64, out: &mut [f32]) {
    fill(key, first_counter, out, |words, values| {
        for (value, word) in values.chunks_exact_mut(2).zip(words.chunks_exact(2)) {
            (value[0], value[1]) = normals_of(word[0], word[1]);
        }
    });
}

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

fn uniform_of(word: u32) -> f32 {
    // 24 bits are what an f32 below 1 can hold without rounding up to 1.
    (word >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

fn normals_of(first: u32, second: u32) -> (f32, f32) {
    // (0, 1], so that the logarithm is finite; all 32 bits, for the tails.
    let radius = libm::sqrt(-2.0 * libm::log((f64::from(first) + 1.0) * (1.0 / 4_294_967_296.0)));
    let (sine, cosine) = libm::sincos(f64::from(second) * (std::f64::consts::TAU / 4_294_967_296.0));
    ((radius * cosine) as f32, (radius * sine) as f32)
}

/// Computes the words from `first_counter` on in groups of `4 * WIDTH` and hands each group to `convert`.
fn fill(key: &Key, first_counter: u64, out: &mut [f32], convert: impl Fn(&[u32], &mut [f32])) {
    const GROUP: usize = 4 * WIDTH;
    let mut words = [0; GROUP];
    let mut values = [0.0; GROUP];
    let mut index = first_counter >> 2;
    let mut skip = (first_counter & 3) as usize;
    let mut rest = out;
    while !rest.is_empty() {
        blocks(key.0, index, &mut words);
        convert(&words, &mut values);
        let taken = rest.len().min(GROUP - skip);
        let (head, tail) = rest.split_at_mut(taken);
        head.copy_from_slice(&values[skip..skip + taken]);
        rest = tail;
        index = index.wrapping_add(WIDTH as u64);
        skip = 0;
    }
}

/// `WIDTH` consecutive blocks, lane by lane, in the order in which [`Key::bits`] counts them.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "aarch64+neon"))]
fn blocks(key: [u32; 2], first_index: u64, words: &mut [u32; 4 * WIDTH]) {
    let mut state = [[0u32; WIDTH]; 4];
    for lane in 0..WIDTH {
        let index = first_index.wrapping_add(lane as u64);
        state[0][lane] = index as u32;
        state[1][lane] = (index >> 32) as u32;
    }
    let mut key = key;
    for _ in 0..ROUNDS {
        let mut next = [[0u32; WIDTH]; 4];
        for lane in 0..WIDTH {
            let first = u64::from(MULTIPLIERS[0]) * u64::from(state[0][lane]);
            let second = u64::from(MULTIPLIERS[1]) * u64::from(state[2][lane]);
            next[0][lane] = (second >> 32) as u32 ^ state[1][lane] ^ key[0];
            next[1][lane] = second as u32;
            next[2][lane] = (first >> 32) as u32 ^ state[3][lane] ^ key[1];
            next[3][lane] = first as u32;
        }
        state = next;
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    for lane in 0..WIDTH {
        for word in 0..4 {
            words[4 * lane + word] = state[word][lane];
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_are_the_published_known_answers() {
        // `philox4x32 10` of Random123's kat_vectors.
        let cases = [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(Key(key).block(counter), expected, "{counter:x?} under {key:x?}");
        }
    }

    #[test]
    fn uniform_and_normal_numbers_have_their_moments() {
        const N: usize = 1 << 18;
        let mut values = vec![0.0; N];
        let mean_and_variance = |values: &[f32]| {
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / N as f64;
            (mean, values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / N as f64)
        };
        // Five standard errors: of a mean, sqrt(variance / N); of a variance, sqrt((kurtosis - 1) / N) * variance.
        fill_uniform(&Key::new(1), 0, &mut values);
        let (mean, variance) = mean_and_variance(&values);
        assert!((mean - 0.5).abs() < 5.0 * (1.0 / 12.0 / N as f64).sqrt(), "{mean}");
        assert!((variance - 1.0 / 12.0).abs() < 5.0 * (0.8 / N as f64).sqrt() / 12.0, "{variance}");
        assert!(values.iter().all(|v| (0.0..1.0).contains(v)));

        fill_normal(&Key::new(2), 0, &mut values);
        let (mean, variance) = mean_and_variance(&values);
        assert!(mean.abs() < 5.0 * (1.0 / N as f64).sqrt(), "{mean}");
        assert!((variance - 1.0).abs() < 5.0 * (2.0 / N as f64).sqrt(), "{variance}");
        let beyond_two = values.iter().filter(|v| v.abs() > 2.0).count() as f64 / N as f64;
        assert!((beyond_two - 0.0455).abs() < 5.0 * (0.0455f64 / N as f64).sqrt(), "{beyond_two}");
    }

    #[test]
    fn children_differ_from_parents_and_siblings() {
        let root = Key::new(7);
        let keys =
            [root, root.child("shuffle"), root.child("dropout"), root.child_index(0), root.child_index(1), Key::new(8)];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b));
        }
        assert_eq!(root.child("shuffle"), Key::new(7).child("shuffle"));
        assert_eq!(Key::new(root.to_u64()), root);
    }

    #[test]
    fn below_stays_below_and_reaches_every_number() {
        let key = Key::new(3);
        let mut seen = [0u32; 7];
        (0..7000).for_each(|c| seen[key.below(c, 7) as usize] += 1);
        // Five standard deviations of a binomial count with mean 1000.
        assert!(seen.iter().all(|n| n.abs_diff(1000) < 150), "{seen:?}");
        assert_eq!(key.below(0, 0), 0);
    }

    proptest! {
        #[test]
        fn bulk_numbers_equal_single_ones(seed: u64, first in 0..u64::MAX / 2, len in 0usize..200) {
            let key = Key::new(seed);
            let mut values = vec![0.0; len];
            fill_uniform(&key, first, &mut values);
            for (i, value) in values.iter().enumerate() {
                prop_assert_eq!(*value, key.uniform_f32(first + i as u64));
            }
            fill_normal(&key, first, &mut values);
            for (i, value) in values.iter().enumerate() {
                prop_assert_eq!(*value, key.normal_f32(first + i as u64));
            }
        }
    }
}
