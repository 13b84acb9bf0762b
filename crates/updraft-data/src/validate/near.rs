//! Rows that are nearly equal: pictures by perceptual hash, texts by MinHash.
//!
//! A picture's hash is that of Zauner ("Implementation and benchmarking of perceptual image hash functions", 2010): grey, 32
//! × 32, the discrete cosine transform, and for 8 × 8 low frequencies without the constant one whether each is above their
//! median. Pictures are near when at most [`BITS_MAX`] of the 64 bits differ; by the pigeonhole principle two such hashes
//! agree in one of [`BITS_MAX`] + 1 parts, so all of them are found.
//!
//! A text's signature is that of Broder ("On the resemblance and containment of documents", 1997): for 128 hash functions
//! the least hash over all runs of three words. The share of equal places estimates the Jaccard similarity of the sets of
//! runs, with a standard error of at most 4.4 %. Candidates agree in one of 16 bands of 8 places: pairs of similarity 0.8
//! are found with a probability of 0.95, pairs of 0.9 with 0.9999.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_64;

use crate::config::Filter;
use crate::picture::{Picture, Sampling, Workspace};

/// Bits in which the hashes of near pictures differ, at most.
pub(super) const BITS_MAX: u32 = 3;

/// The least similarity of near texts.
pub(super) const SIMILARITY_MIN: f64 = 0.8;

const SIDE: usize = 32;
const LOW: usize = 8;
pub(super) const PLACES: usize = 128;
const BAND: usize = 8;
const WORDS: usize = 3;

/// Texts of one bucket that a new one is compared with: of many equal ones, a few stand for all.
const COMPARED_MAX: usize = 8;

/// The perceptual hash of a grey picture; `None` for one of a single shade, which is like every other such.
pub(super) fn picture_hash(picture: Picture, workspace: &mut Workspace) -> Result<Option<u64>, String> {
    let small = picture.resized([SIDE, SIDE], Sampling::new(Filter::Bilinear, true), workspace)?;
    let pixels = small.pixels.get(..SIDE * SIDE).ok_or("a grey picture has a byte a pixel")?;
    if pixels.iter().all(|p| *p == pixels[0]) {
        workspace.reclaim(small);
        return Ok(None);
    }
    let cosine =
        |frequency: usize, at: usize| (std::f32::consts::PI / SIDE as f32 * (at as f32 + 0.5) * frequency as f32).cos();
    let table: Vec<f32> = (1..=LOW).flat_map(|f| (0..SIDE).map(move |x| cosine(f, x))).collect();
    let mut rows = [0f32; SIDE * LOW];
    for (y, row) in pixels.chunks_exact(SIDE).enumerate() {
        for (f, wave) in table.chunks_exact(SIDE).enumerate() {
            rows[y * LOW + f] = row.iter().zip(wave).map(|(p, c)| f32::from(*p) * c).sum();
        }
    }
    let mut frequencies = [0f32; LOW * LOW];
    for (v, wave) in table.chunks_exact(SIDE).enumerate() {
        for u in 0..LOW {
            frequencies[v * LOW + u] = (0..SIDE).map(|y| rows[y * LOW + u] * wave[y]).sum();
        }
    }
    let mut sorted = frequencies;
    sorted.sort_by(f32::total_cmp);
    let median = (sorted[LOW * LOW / 2 - 1] + sorted[LOW * LOW / 2]) / 2.0;
    let bits = frequencies.iter().enumerate().map(|(i, f)| u64::from(*f > median) << i);
    workspace.reclaim(small);
    Ok(Some(bits.sum()))
}

/// Pictures met so far, by hash.
#[derive(Debug, Default)]
pub(super) struct NearPictures {
    /// The first row of each hash, in the order in which they were met.
    hashes: Vec<(u64, u64)>,
    /// For each part of the hash and each value of it, places in `hashes`.
    parts: Vec<HashMap<u16, Vec<u32>>>,
}

impl NearPictures {
    /// Takes the next picture; gives the first row that is near.
    pub(super) fn push(&mut self, hash: u64, row: u64) -> Option<u64> {
        self.parts.resize_with(BITS_MAX as usize + 1, HashMap::new);
        let width = 64 / (BITS_MAX + 1);
        let part = |i: usize| (hash >> (i as u32 * width)) as u16;
        let near = self
            .parts
            .iter()
            .enumerate()
            .flat_map(|(i, table)| table.get(&part(i)).into_iter().flatten())
            .filter_map(|at| self.hashes.get(*at as usize))
            .filter(|(other, _)| (hash ^ other).count_ones() <= BITS_MAX)
            .map(|(_, row)| *row)
            .min();
        // What is near an earlier picture is represented by it.
        if near.is_none() {
            let at = self.hashes.len() as u32;
            self.hashes.push((hash, row));
            for (i, table) in self.parts.iter_mut().enumerate() {
                table.entry(part(i)).or_default().push(at);
            }
        }
        near
    }
}

/// The signature of a text, or `None` where it has fewer than three words.
pub(super) fn text_signature(text: &[u8]) -> Option<Box<[u32; PLACES]>> {
    let text = String::from_utf8_lossy(text).to_lowercase();
    let words: Vec<&str> = text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
    let mut signature = Box::new([u32::MAX; PLACES]);
    for run in words.windows(WORDS) {
        let hash = run.iter().fold(0u64, |seed, word| {
            xxh3_64(word.as_bytes()).wrapping_add(seed.rotate_left(21).wrapping_mul(0x9E37_79B9_7F4A_7C15))
        });
        for (place, least) in signature.iter_mut().enumerate() {
            *least = (*least).min(mixed(hash, place as u64));
        }
    }
    (words.len() >= WORDS).then_some(signature)
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014) over the hash and the number of the function.
fn mixed(hash: u64, place: u64) -> u32 {
    let mut z = hash.wrapping_add((place + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)) as u32
}

/// Texts met so far, by signature.
#[derive(Debug, Default)]
pub(super) struct NearTexts {
    signatures: Vec<(Box<[u32; PLACES]>, u64)>,
    bands: HashMap<u64, Vec<u32>>,
}

impl NearTexts {
    /// Takes the next text; gives the first row that is near.
    pub(super) fn push(&mut self, signature: Box<[u32; PLACES]>, row: u64) -> Option<u64> {
        let band = |i: usize, places: &[u32]| {
            let bytes: Vec<u8> =
                std::iter::once(i as u32).chain(places.iter().copied()).flat_map(u32::to_le_bytes).collect();
            xxh3_64(&bytes)
        };
        let keys: Vec<u64> = signature.chunks_exact(BAND).enumerate().map(|(i, places)| band(i, places)).collect();
        let similar = |other: &[u32; PLACES]| {
            let equal = signature.iter().zip(other).filter(|(a, b)| a == b).count();
            equal as f64 / PLACES as f64 >= SIMILARITY_MIN
        };
        let near = keys
            .iter()
            .filter_map(|key| self.bands.get(key))
            .flat_map(|bucket| bucket.iter().take(COMPARED_MAX))
            .filter_map(|at| self.signatures.get(*at as usize))
            .filter(|(other, _)| similar(other))
            .map(|(_, row)| *row)
            .min();
        if near.is_none() {
            let at = self.signatures.len() as u32;
            for key in keys {
                self.bands.entry(key).or_default().push(at);
            }
            self.signatures.push((signature, row));
        }
        near
    }
}

#[cfg(test)]
mod tests {
    use updraft_base::Key;

    use super::*;

    /// Twelve overlapping boxes of random shades, whose edges give all frequencies.
    fn picture(seed: u64) -> Picture {
        const SIDE: usize = 96;
        let key = Key::new(seed);
        let at = |i: u64| key.uniform_f32(i);
        let pixel = |i: usize| {
            let (x, y) = (((i % SIDE) as f32 + 0.5) / SIDE as f32, ((i / SIDE) as f32 + 0.5) / SIDE as f32);
            let inside = |b: &u64| {
                (x - at(5 * b)).abs() < 0.4 * at(5 * b + 1) && (y - at(5 * b + 2)).abs() < 0.4 * at(5 * b + 3)
            };
            let level = (0..12).rev().find(inside).map_or(0.5, |b| at(5 * b + 4));
            (255.0 * level) as u8
        };
        Picture { height: SIDE, width: SIDE, channels: 1, pixels: (0..SIDE * SIDE).map(pixel).collect() }
    }

    /// Two thirds of the size, and noise of two grey values.
    fn altered(seed: u64) -> Picture {
        let smaller = Sampling::new(Filter::Bilinear, true);
        let mut picture = picture(seed).resized([64, 64], smaller, &mut Workspace::default()).unwrap();
        let noise = Key::new(seed).child("noise");
        for (i, pixel) in picture.pixels.iter_mut().enumerate() {
            *pixel = (f32::from(*pixel) + 2.0 * noise.normal_f32(i as u64)).clamp(0.0, 255.0) as u8;
        }
        picture
    }

    #[test]
    fn a_picture_is_near_itself_made_smaller_and_noisier_and_far_from_others() {
        let hash = |p: Picture| picture_hash(p, &mut Workspace::default()).unwrap().unwrap();
        let mut near = NearPictures::default();
        for seed in 0..200 {
            assert_eq!(near.push(hash(picture(seed)), seed), None, "{seed}");
        }
        let apart: Vec<u32> = (0..200).map(|seed| (hash(picture(seed)) ^ hash(altered(seed))).count_ones()).collect();
        let found = (0..200).filter(|seed| near.push(hash(altered(*seed)), 1000 + seed) == Some(*seed)).count();
        // Frequencies that lie at the median may fall either way.
        assert!(found >= 190, "{found} of 200, bits apart {apart:?}");
        let flat = Picture { height: 8, width: 8, channels: 1, pixels: vec![7; 64] };
        assert_eq!(picture_hash(flat, &mut Workspace::default()), Ok(None));
    }

    #[test]
    fn all_hashes_within_three_bits_are_found() {
        let key = Key::new(3);
        let mut near = NearPictures::default();
        let hash = key.child_index(0).to_u64();
        near.push(hash, 7);
        for i in 0..500u64 {
            let flipped = (0..3).fold(hash, |h, j| h ^ 1 << key.below(3 * i + j, 64));
            assert_eq!(near.push(flipped, 8), Some(7));
        }
        assert_eq!(near.push(hash ^ 0b1111, 8), None);
    }

    #[test]
    fn texts_with_a_word_changed_are_near_and_others_are_not() {
        let words =
            |seed: u64| -> Vec<String> { (0..100).map(|i| format!("w{}", Key::new(seed).below(i, 5000))).collect() };
        let mut near = NearTexts::default();
        for seed in 0..50 {
            assert_eq!(near.push(text_signature(words(seed).join(" ").as_bytes()).unwrap(), seed), None);
        }
        for seed in 0..50 {
            let mut changed = words(seed);
            // 3 of 98 runs: a similarity of 95/101.
            changed[40] = "changed".into();
            let text = format!("  {}. ", changed.join(", ").to_uppercase());
            assert_eq!(near.push(text_signature(text.as_bytes()).unwrap(), 100), Some(seed));
        }
        assert!(text_signature(b"two words").is_none());
    }
}
