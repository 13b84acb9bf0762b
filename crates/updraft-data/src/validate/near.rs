//! Rows that are nearly equal: pictures by perceptual hash, texts by MinHash.
//!
//! A picture's hash is that of Zauner ("Implementation and benchmarking of perceptual image hash functions", 2010): grey, 32
//! × 32, the discrete cosine transform, and for 8 × 8 low frequencies without the constant one whether each is above their
//! median. Pictures of which at most [`BITS_MAX`] of the 64 bits differ are candidates; by the pigeonhole principle one of
//! four parts of two such hashes differs in at most [`PART_BITS_MAX`], so all of them are found. So many bits let a picture be
//! cut a little at its sides or turned by a degree or two, and let pictures of a kind pass for each other; so candidates are
//! near only where what is left of 16 × 16 pixels without their surroundings, edges and spots, correlates as well.
//!
//! A text's signature is that of Broder ("On the resemblance and containment of documents", 1997): for 128 hash functions
//! the least hash over all runs of three words. The share of equal places estimates the Jaccard similarity of the sets of
//! runs, with a standard error of at most 4.4 %. Candidates agree in one of 16 bands of 8 places: pairs of similarity 0.8
//! are found with a probability of 0.95, pairs of 0.9 with 0.9999.

use std::collections::{BTreeMap, HashMap};

use xxhash_rust::xxh3::xxh3_64;

use crate::config::Filter;
use crate::picture::{Picture, Sampling, Workspace};

/// Bits in which the hashes of near pictures differ, at most.
const BITS_MAX: u32 = 10;

/// Parts of 16 bits of a hash, and the bits in which one of them differs at most.
const PARTS: usize = 4;
const PART_BITS_MAX: u32 = BITS_MAX / PARTS as u32;

/// The least correlation of the details of near pictures.
const CORRELATION_MIN: f64 = 0.8;

/// The same where one of them has fewer than so many pixels at a side: all that such pictures show is a few strokes.
const SMALL_SIDE: usize = 64;
const CORRELATION_SMALL_MIN: f64 = 0.95;

/// The least similarity of near texts.
pub(super) const SIMILARITY_MIN: f64 = 0.8;

const SIDE: usize = 32;
const LOW: usize = 8;
const DETAIL_SIDE: usize = SIDE / 2;
pub(super) const PLACES: usize = 128;
const BAND: usize = 8;
const WORDS: usize = 3;

/// Texts of one bucket that a new one is compared with: of many equal ones, a few stand for all.
const COMPARED_MAX: usize = 8;

/// What a cell shows, for finding others that show nearly the same.
pub(super) enum Look {
    Picture(PictureLook),
    Text(Box<[u32; PLACES]>),
}

/// What a picture shows.
pub(super) struct PictureLook {
    hash: u64,
    /// 16 × 16 pixels without the mean of those around each, in 127ths of the largest.
    details: Box<[i8; DETAIL_SIDE * DETAIL_SIDE]>,
    is_small: bool,
}

impl PictureLook {
    fn is_near(&self, other: &PictureLook) -> bool {
        if (self.hash ^ other.hash).count_ones() > BITS_MAX {
            return false;
        }
        let of = |a: &PictureLook, b: &PictureLook| -> i64 {
            a.details.iter().zip(b.details.iter()).map(|(a, b)| i64::from(*a) * i64::from(*b)).sum()
        };
        let scale = (of(self, self) as f64 * of(other, other) as f64).sqrt();
        let correlation = if scale > 0.0 { of(self, other) as f64 / scale } else { 1.0 };
        correlation >= if self.is_small || other.is_small { CORRELATION_SMALL_MIN } else { CORRELATION_MIN }
    }
}

/// What a grey picture shows; `None` for one of a single shade, which is like every other such.
pub(super) fn picture_look(picture: Picture, workspace: &mut Workspace) -> Result<Option<PictureLook>, String> {
    let is_small = picture.height.min(picture.width) < SMALL_SIDE;
    let small = picture.resized([SIDE, SIDE], Sampling::new(Filter::Bilinear, true), workspace)?;
    let pixels = small.pixels.get(..SIDE * SIDE).ok_or("a grey picture has a byte a pixel")?;
    let is_plain = pixels.iter().all(|p| *p == pixels[0]);
    let look = (!is_plain).then(|| PictureLook { hash: hash(pixels), details: details(pixels), is_small });
    workspace.reclaim(small);
    Ok(look)
}

fn details(pixels: &[u8]) -> Box<[i8; DETAIL_SIDE * DETAIL_SIDE]> {
    let pixel = |y: usize, x: usize| f32::from(pixels[y * SIDE + x]);
    let halved = |y: usize, x: usize| {
        (pixel(2 * y, 2 * x) + pixel(2 * y, 2 * x + 1) + pixel(2 * y + 1, 2 * x) + pixel(2 * y + 1, 2 * x + 1)) / 4.0
    };
    // Beyond a border is what is at it.
    let near = |at: usize| [at.saturating_sub(1), at, (at + 1).min(DETAIL_SIDE - 1)];
    let values: Vec<f32> = (0..DETAIL_SIDE * DETAIL_SIDE)
        .map(|at| {
            let (y, x) = (at / DETAIL_SIDE, at % DETAIL_SIDE);
            let around: f32 = near(y).iter().flat_map(|y| near(x).map(|x| halved(*y, x))).sum();
            halved(y, x) - around / 9.0
        })
        .collect();
    let most = values.iter().fold(f32::MIN_POSITIVE, |most, value| most.max(value.abs()));
    let mut details = Box::new([0; DETAIL_SIDE * DETAIL_SIDE]);
    details.iter_mut().zip(values).for_each(|(detail, value)| *detail = (127.0 * value / most).round() as i8);
    details
}

/// The hash of 32 × 32 pixels.
fn hash(pixels: &[u8]) -> u64 {
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
    frequencies.iter().enumerate().map(|(i, f)| u64::from(*f > median) << i).sum()
}

/// Pictures met so far, by hash.
#[derive(Default)]
struct NearPictures {
    /// In the order in which they were met, each with its row.
    looks: Vec<(PictureLook, u64)>,
    /// Places in `looks`, for each part of the hash and each value of it.
    parts: Vec<Vec<u32>>,
}

/// The place of a part of a hash among all parts and their values.
fn part_of(hash: u64, part: usize) -> usize {
    part << 16 | usize::from((hash >> (16 * part)) as u16)
}

impl NearPictures {
    /// The first row that is near.
    fn find(&self, look: &PictureLook) -> Option<u64> {
        let mut first: Option<u32> = None;
        let bits = || std::iter::once(0).chain((0..16).map(|bit| 1 << bit));
        for part in 0..PARTS {
            let at = part_of(look.hash, part);
            // None, one or two bits.
            let flipped = bits().flat_map(|a| bits().filter(move |b| *b < a || a + b == 0).map(move |b| a ^ b));
            debug_assert_eq!(PART_BITS_MAX, 2, "as many bits are flipped");
            for place in flipped.flat_map(|flip| self.parts.get(at ^ flip).into_iter().flatten()) {
                if first.is_none_or(|first| *place < first) && self.looks[*place as usize].0.is_near(look) {
                    first = Some(*place);
                }
            }
        }
        Some(self.looks[first? as usize].1)
    }

    fn insert(&mut self, look: PictureLook, row: u64) {
        self.parts.resize_with(PARTS << 16, Vec::new);
        let at = self.looks.len() as u32;
        (0..PARTS).for_each(|part| self.parts[part_of(look.hash, part)].push(at));
        self.looks.push((look, row));
    }
}

/// The signature of a text, or `None` where it has fewer than three words.
pub(super) fn text_signature(text: &[u8]) -> Option<Box<[u32; PLACES]>> {
    let text = String::from_utf8_lossy(text).to_lowercase();
    let words = words(&text);
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

/// Runs of letters and digits; where a script puts no spaces between words, each of its letters.
fn words(text: &str) -> Vec<&str> {
    let is_unspaced = |c: char| {
        matches!(c, '\u{e00}'..='\u{eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}' | '\u{3040}'..='\u{30ff}'
            | '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
    };
    let runs = text.split(|c: char| !c.is_alphanumeric()).filter(|run| !run.is_empty());
    runs.flat_map(|run| run.split_inclusive(is_unspaced))
        .flat_map(|part| match part.char_indices().next_back() {
            // Other letters before one of these.
            Some((at, c)) if at > 0 && is_unspaced(c) => [&part[..at], &part[at..]],
            _ => [part, ""],
        })
        .filter(|word| !word.is_empty())
        .collect()
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014) over the hash and the number of the function.
fn mixed(hash: u64, place: u64) -> u32 {
    let mut z = hash.wrapping_add((place + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)) as u32
}

/// Texts met so far, by signature.
#[derive(Default)]
struct NearTexts {
    signatures: Vec<(Box<[u32; PLACES]>, u64)>,
    bands: HashMap<u64, Vec<u32>>,
}

/// What texts that agree in a band have in common, by band.
fn bands_of(signature: &[u32; PLACES]) -> impl Iterator<Item = u64> + '_ {
    signature.chunks_exact(BAND).enumerate().map(|(i, places)| {
        let bytes: Vec<u8> =
            std::iter::once(i as u32).chain(places.iter().copied()).flat_map(u32::to_le_bytes).collect();
        xxh3_64(&bytes)
    })
}

impl NearTexts {
    /// The first row that is near.
    fn find(&self, signature: &[u32; PLACES]) -> Option<u64> {
        let similar = |other: &[u32; PLACES]| {
            let equal = signature.iter().zip(other).filter(|(a, b)| a == b).count();
            equal as f64 / PLACES as f64 >= SIMILARITY_MIN
        };
        bands_of(signature)
            .filter_map(|key| self.bands.get(&key))
            .flat_map(|bucket| bucket.iter().take(COMPARED_MAX))
            .filter_map(|at| self.signatures.get(*at as usize))
            .filter(|(other, _)| similar(other))
            .map(|(_, row)| *row)
            .min()
    }

    fn insert(&mut self, signature: Box<[u32; PLACES]>, row: u64) {
        let at = self.signatures.len() as u32;
        bands_of(&signature).for_each(|key| self.bands.entry(key).or_default().push(at));
        self.signatures.push((signature, row));
    }
}

/// What a kept picture takes: its details, and its places in four tables.
const PICTURE_BYTES: u64 = 384;

/// What a kept text takes: 512 bytes of signature and 16 bands.
const TEXT_BYTES: u64 = 1536;

/// The cells of some rows by what they show, by column, as many as there is memory for.
pub(super) struct Near {
    pictures: BTreeMap<usize, NearPictures>,
    texts: BTreeMap<usize, NearTexts>,
    room_bytes: u64,
    until: Option<u64>,
}

impl Near {
    pub(super) fn new(room_bytes: u64) -> Near {
        Near { pictures: BTreeMap::new(), texts: BTreeMap::new(), room_bytes, until: None }
    }

    /// Takes the next row's cell of a column; gives the first row whose cell is near.
    pub(super) fn push(&mut self, column: usize, look: Look, row: u64) -> Option<u64> {
        if self.until.is_some() {
            return None;
        }
        // What is near an earlier one is represented by it.
        let near = self.find(column, &look);
        if near.is_some() {
            return near;
        }
        let bytes = match look {
            Look::Picture(_) => PICTURE_BYTES,
            Look::Text(_) => TEXT_BYTES,
        };
        match self.room_bytes.checked_sub(bytes) {
            Some(room_bytes) => self.room_bytes = room_bytes,
            None => {
                self.until = Some(row);
                return None;
            }
        }
        match look {
            Look::Picture(look) => self.pictures.entry(column).or_default().insert(look, row),
            Look::Text(signature) => self.texts.entry(column).or_default().insert(signature, row),
        }
        None
    }

    /// The first row whose cell of the column is near.
    pub(super) fn find(&self, column: usize, look: &Look) -> Option<u64> {
        match look {
            Look::Picture(look) => self.pictures.get(&column)?.find(look),
            Look::Text(signature) => self.texts.get(&column)?.find(signature),
        }
    }

    /// The row at which the memory was used up; those from it on are not here.
    pub(super) fn until(&self) -> Option<u64> {
        self.until
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

    /// Without two of a hundred pixels at each side.
    fn cut(seed: u64) -> Picture {
        let whole = picture(seed);
        let kept = 2..whole.width - 2;
        let rows = whole.pixels.chunks_exact(whole.width).skip(2).take(kept.len());
        let pixels = rows.flat_map(|row| row[kept.clone()].to_vec()).collect();
        Picture { height: kept.len(), width: kept.len(), channels: 1, pixels }
    }

    fn look(picture: Picture) -> PictureLook {
        picture_look(picture, &mut Workspace::default()).unwrap().unwrap()
    }

    #[test]
    fn a_picture_is_near_itself_made_smaller_and_noisier_or_cut_and_far_from_others() {
        let mut near = Near::new(1 << 30);
        for seed in 0..200 {
            assert_eq!(near.push(0, Look::Picture(look(picture(seed))), seed), None, "{seed}");
        }
        for (changed, least) in [(altered as fn(u64) -> Picture, 198), (cut, 180)] {
            let is_found = |seed: &u64| near.find(0, &Look::Picture(look(changed(*seed)))) == Some(*seed);
            let found = (0..200).filter(is_found).count();
            // Frequencies that lie at the median may fall either way.
            assert!(found >= least, "{found} of 200");
        }
        let flat = Picture { height: 8, width: 8, channels: 1, pixels: vec![7; 64] };
        assert!(picture_look(flat, &mut Workspace::default()).unwrap().is_none());
    }

    #[test]
    fn all_hashes_within_ten_bits_are_found_and_details_decide() {
        let key = Key::new(3);
        let look = |hash: u64, detail: i8| {
            let details = Box::new(std::array::from_fn(|at| if at % 2 == 0 { 100 } else { detail }));
            Look::Picture(PictureLook { hash, details, is_small: false })
        };
        let mut near = Near::new(1 << 30);
        let hash = key.child_index(0).to_u64();
        near.push(0, look(hash, 100), 7);
        for i in 0..500u64 {
            let flipped = (0..10).fold(hash, |h, j| h ^ 1 << key.below(10 * i + j, 64));
            assert_eq!(near.find(0, &look(flipped, 100)), Some(7));
        }
        assert_eq!(near.find(0, &look(hash ^ 0x7ff, 100)), None, "eleven bits");
        assert_eq!(near.find(0, &look(hash, -100)), None, "other details");
        assert_eq!(near.find(1, &look(hash, 100)), None, "another column");
    }

    #[test]
    fn what_does_not_fit_in_memory_is_not_looked_for() {
        let signature =
            |seed: u64| Look::Text(Box::new(std::array::from_fn(|at| Key::new(seed).below(at as u64, 1 << 30) as u32)));
        let mut near = Near::new(2 * TEXT_BYTES);
        for row in 0..5 {
            near.push(0, signature(row), row);
        }
        assert_eq!((near.until(), near.find(0, &signature(1)), near.find(0, &signature(2))), (Some(2), Some(1), None));
    }

    #[test]
    fn texts_with_a_word_changed_are_near_and_others_are_not() {
        let words =
            |seed: u64| -> Vec<String> { (0..100).map(|i| format!("w{}", Key::new(seed).below(i, 5000))).collect() };
        let mut near = Near::new(1 << 30);
        for seed in 0..50 {
            let signature = text_signature(words(seed).join(" ").as_bytes()).unwrap();
            assert_eq!(near.push(0, Look::Text(signature), seed), None);
        }
        for seed in 0..50 {
            let mut changed = words(seed);
            // 3 of 98 runs: a similarity of 95/101.
            changed[40] = "changed".into();
            let text = format!("  {}. ", changed.join(", ").to_uppercase());
            assert_eq!(near.find(0, &Look::Text(text_signature(text.as_bytes()).unwrap())), Some(seed));
        }
        assert!(text_signature(b"two words").is_none());
    }

    #[test]
    fn scripts_without_spaces_have_words_of_one_letter() {
        assert_eq!(words("ab日本c 語12"), ["ab", "日", "本", "c", "語", "12"]);
        let text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で泣いていた事だけは記憶している。";
        let signature = |text: &str| Look::Text(text_signature(text.as_bytes()).unwrap());
        let mut near = Near::new(1 << 20);
        near.push(0, signature(text), 1);
        assert_eq!(near.find(0, &signature(&text.replace("。", "、").replace("まだ", ""))), Some(1));
        assert_eq!(near.find(0, &signature(&text.chars().rev().collect::<String>())), None);
    }
}
