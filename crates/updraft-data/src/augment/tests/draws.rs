//! How often and how far pictures are varied, counted over many samples.

use std::collections::BTreeMap;

use super::*;
use crate::config::{Axis, Colour, Decode, Transform};
use crate::picture::PicturePlan;

const SAMPLES: u64 = 4000;

/// Five standard deviations of a count with this chance.
fn is_likely(count: u64, chance: f64) -> bool {
    let mean = SAMPLES as f64 * chance;
    (count as f64 - mean).abs() <= 5.0 * (mean * (1.0 - chance)).sqrt()
}

/// What one step makes of a picture for each of many samples.
fn vary(step: Transform, original: &Picture) -> Vec<Picture> {
    let decode = Decode { colour: Colour::Rgb, orient: false, pixels_max: 1 << 20 };
    let plan = PicturePlan::new(&decode, &[step]).unwrap();
    let mut workspace = Workspace::default();
    let key = Key::new(17);
    (0..SAMPLES).map(|s| plan.vary(original.clone(), &key.child_index(s), &mut workspace).unwrap()).collect()
}

#[test]
fn steps_are_taken_as_often_as_their_chances_say() {
    let original = picture(9, 11, 3);
    let blur = |probability| GaussianBlur { sigma: [1.0, 1.0], kernel: Some(3), probability };
    let erasing =
        |probability| RandomErasing { probability, area: [0.1, 0.1], ratio: [1.0, 1.0], fill: Some(vec![0, 0, 0]) };
    for (step, chance) in [
        (Transform::RandomFlip(Axis::Horizontal), 0.5),
        (Transform::RandomFlip(Axis::Vertical), 0.5),
        (Transform::RandomGrey(0.3), 0.3),
        (Transform::RandomGrey(0.0), 0.0),
        (Transform::RandomGrey(1.0), 1.0),
        (Transform::GaussianBlur(blur(0.2)), 0.2),
        (Transform::GaussianBlur(blur(1.0)), 1.0),
        (Transform::RandomErasing(erasing(0.6)), 0.6),
    ] {
        let name = format!("{step:?}");
        let changed = vary(step, &original).iter().filter(|p| **p != original).count() as u64;
        assert!(is_likely(changed, chance), "{name}: {changed} of {SAMPLES}");
    }
}

#[test]
fn windows_are_at_every_place_alike() {
    // A pixel that says where it is, in a picture with one more around it.
    let pixels = (0..3 * 4 * 5).map(|i| (i / 3 + 1) as u8).collect();
    let original = Picture { height: 4, width: 5, channels: 3, pixels };
    let crop = crate::config::RandomCrop { size: [3, 3], padding: 1 };
    let mut places: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    vary(Transform::RandomCrop(crop), &original).into_iter().for_each(|p| *places.entry(p.pixels).or_default() += 1);
    // 4 + 2 - 3 + 1 rows by 5 + 2 - 3 + 1 columns.
    assert_eq!(places.len(), 20);
    assert!(places.values().all(|count| is_likely(*count, 1.0 / 20.0)), "{:?}", places.values());
}

#[test]
fn every_operation_of_rand_augment_is_as_likely_with_either_sign() {
    let original = picture(24, 31, 3);
    let mut chances: BTreeMap<Vec<u8>, f64> = BTreeMap::new();
    for operation in ALL {
        for sign in [1.0, -1.0] {
            let varied = operation.apply(original.clone(), 9.0, sign, &mut Workspace::default());
            *chances.entry(varied.pixels).or_default() += 1.0 / 28.0;
        }
    }
    // Identity, autocontrast, equalize, solarize and posterize have no sign.
    assert_eq!(chances.len(), 5 + 2 * 9);
    let mut counts: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    let step = Transform::RandAugment(RandAugment { operations: 1, magnitude: 9.0 });
    vary(step, &original).into_iter().for_each(|p| *counts.entry(p.pixels).or_default() += 1);
    assert!(counts.keys().eq(chances.keys()));
    assert!(
        counts.values().zip(chances.values()).all(|(count, chance)| is_likely(*count, *chance)),
        "{:?}",
        counts.values()
    );
}

#[test]
fn jitter_reaches_both_ends_of_its_range_evenly() {
    let grey = Picture { height: 1, width: 1, channels: 3, pixels: vec![100; 3] };
    let step = Transform::ColourJitter(ColourJitter { brightness: 0.4, ..ColourJitter::default() });
    let values: Vec<u8> = vary(step, &grey).into_iter().map(|p| p.pixels[0]).collect();
    // Uniform from 60 to 140, fractions cut off.
    for quarter in 0..4 {
        let range = 60 + 20 * quarter..80 + 20 * quarter;
        let count = values.iter().filter(|v| range.contains(*v)).count() as u64;
        assert!(is_likely(count, 0.25), "{range:?}: {count}");
    }
    // A factor is never below zero.
    let step = Transform::ColourJitter(ColourJitter { brightness: 3.0, ..ColourJitter::default() });
    let black = vary(step, &grey).iter().filter(|p| p.pixels[0] < 50).count() as u64;
    assert!(is_likely(black, 0.5 / 4.0), "{black}");
}
