//! Each operation against what Pillow and torchvision make of the same picture.

use proptest::prelude::*;

use super::rand_augment::{ALL, Operation};
use super::*;
use crate::config::Filter;

mod draws;

/// Channels of waves with some noise, which no operation leaves alone.
fn picture(height: usize, width: usize, channels: usize) -> Picture {
    let pixels = (0..height * width * channels)
        .map(|i| {
            let (x, y, c) = (i / channels % width, i / channels / width, i % channels);
            (40 + (x * 5 + y * 3 * (c + 1) + i * 7919 % 23) % 180) as u8
        })
        .collect();
    Picture { height, width, channels, pixels }
}

#[test]
fn the_operations_are_those_of_the_paper() {
    assert_eq!(ALL.len(), 14);
    assert!(ALL.iter().enumerate().all(|(i, op)| !ALL[..i].contains(op)));
}

proptest! {
    #[test]
    fn no_magnitude_changes_nothing(height in 1usize..20, width in 1usize..20, seed: u64, grey: bool) {
        let original = picture(height, width, if grey { 1 } else { 3 });
        let mut workspace = Workspace::default();
        // These two have no magnitude.
        for operation in ALL.iter().filter(|o| !matches!(o, Operation::AutoContrast | Operation::Equalize)) {
            for sign in [1.0, -1.0] {
                prop_assert_eq!(&operation.apply(original.clone(), 0.0, sign, &mut workspace), &original);
            }
        }
        let mut jittered = original.clone();
        ColourJitter::default().apply(&mut jittered, &mut Draws::new(&Key::new(seed)));
        prop_assert_eq!(&jittered, &original);
        let blur = GaussianBlur { sigma: [0.0, 0.0], kernel: Some(5), probability: 1.0 };
        blur.apply(&mut jittered, &mut Draws::new(&Key::new(seed)));
        prop_assert_eq!(&jittered, &original);
        let erasing = RandomErasing { probability: 0.0, area: [0.1, 0.2], ratio: [1.0, 1.0], fill: None };
        erasing.apply(&mut jittered, &mut Draws::new(&Key::new(seed)));
        prop_assert_eq!(&jittered, &original);
    }

    #[test]
    fn cropped_parts_lie_in_the_picture_and_have_the_area_asked_for(
        height in 1usize..300, width in 1usize..300, seed: u64,
    ) {
        let crop = RandomResizedCrop {
            size: [4, 4], area: [0.08, 1.0], ratio: [0.75, 4.0 / 3.0], filter: Filter::Bilinear, antialias: true,
        };
        let part = crop.part(height, width, &mut Draws::new(&Key::new(seed)));
        prop_assert!(part.height >= 1 && part.top + part.height <= height);
        prop_assert!(part.width >= 1 && part.left + part.width <= width);
        if height > 40 && width > 40 && height < 2 * width && width < 2 * height {
            // Each side is rounded to whole pixels.
            let (tall, wide) = (part.height as f64, part.width as f64);
            let share = |by: f64| (tall + by) * (wide + by) / (height * width) as f64;
            prop_assert!(share(0.5) >= 0.08 && share(-0.5) <= 1.0, "{part:?}");
            prop_assert!((wide + 0.5) / (tall - 0.5) >= 0.75 && (wide - 0.5) / (tall + 0.5) <= 4.0 / 3.0, "{part:?}");
        }
    }
}

#[test]
fn erased_rectangles_have_the_share_asked_for_and_leave_the_rest() {
    let original = picture(60, 50, 3);
    let erasing = RandomErasing { probability: 1.0, area: [0.2, 0.2], ratio: [0.5, 2.0], fill: Some(vec![1, 2, 3]) };
    for seed in 0..20 {
        let mut erased = original.clone();
        erasing.apply(&mut erased, &mut Draws::new(&Key::new(seed)));
        let pairs = erased.pixels.chunks_exact(3).zip(original.pixels.chunks_exact(3));
        let changed: Vec<&[u8]> = pairs.filter(|(now, then)| now != then).map(|(now, _)| now).collect();
        assert!(changed.iter().all(|pixel| *pixel == [1, 2, 3]));
        // 600 of 3000 pixels, each side rounded: by at most half of a side of 35.
        assert!(changed.len().abs_diff(600) <= 36, "{}", changed.len());
    }
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let crop =
        |area, ratio| RandomResizedCrop { size: [1, 1], area, ratio, filter: Filter::Box, antialias: true }.check();
    assert!(crop([0.5, 0.4], [1.0, 1.0]).unwrap_err().contains("`area` of 0.5 to 0.4"));
    assert!(crop([0.5, 0.6], [0.0, 1.0]).is_err() && crop([f32::NAN, 0.6], [1.0, 1.0]).is_err());
    assert!(ColourJitter { hue: 0.6, ..ColourJitter::default() }.check().is_err());
    assert!(RandAugment { operations: 2, magnitude: 11.0 }.check().is_err());
    assert!(GaussianBlur { sigma: [1.0, 2.0], kernel: Some(4), probability: 1.0 }.check().is_err());
    let erasing = RandomErasing { probability: 0.5, area: [0.1, 0.2], ratio: [1.0, 1.0], fill: Some(vec![0]) };
    assert!(erasing.check(3).unwrap_err().contains("1 values of `fill` for 3 channels"));
}

/// Pillow's and torchvision's results, by operation and setting.
fn varied() -> Vec<(String, Vec<u8>)> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pictures/varied.npz");
    let arrays = crate::read_npz(&path, 1 << 24).unwrap();
    arrays.into_iter().map(|(name, array)| (name, array.bytes().to_vec())).collect()
}

#[test]
fn operations_give_the_bytes_that_pillow_gives() {
    let mut compared = 0;
    let mut wrong = Vec::new();
    for (name, expected) in varied() {
        let words: Vec<&str> = name.split(' ').collect();
        let mut found = picture(24, 31, 3);
        // One level where a float sum that is rounded at the end was added in another order.
        let mut most = 0;
        match words[..] {
            ["hue", circles] => found.turn_hue(circles.parse().unwrap()),
            ["blur", sigma, side] => {
                found.blur(sigma.parse().unwrap(), side.parse().unwrap());
                most = 1;
            }
            [operation, ..] => {
                let operation = ALL.iter().find(|o| format!("{o:?}") == operation).unwrap();
                let magnitude: f64 = words.get(1).map_or(10.0, |m| m.parse().unwrap());
                found = operation.apply(found, magnitude.abs(), magnitude.signum(), &mut Workspace::default());
            }
            [] => {}
        }
        let differences = found.pixels.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b));
        let largest = differences.clone().max().unwrap();
        if found.pixels.len() != expected.len() || largest > most {
            wrong.push(format!("{name}: {} of {} differ", differences.filter(|d| *d > 0).count(), expected.len()));
        }
        compared += 1;
    }
    assert!(wrong.is_empty() && compared == 49, "{compared} compared; {wrong:#?}");
}
