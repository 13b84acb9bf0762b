//! Mixup and cutmix: pairs of a batch made of each other.
//!
//! Partners are neighbours, as an order that is shuffled already makes them strangers; so a batch that is cut into parts
//! of even length is mixed as if it were whole.

use updraft_base::Key;
use updraft_graph::Tensor;

use super::Draws;
use crate::config::Mix;

impl Mix {
    pub(crate) fn check(&self) -> Result<(), String> {
        let alphas = [self.mixup, self.cutmix];
        if alphas.iter().flatten().count() == 0 {
            return Err("`mix` needs `mixup`, `cutmix` or both".into());
        }
        for alpha in alphas.iter().flatten() {
            super::check_range("alpha", [*alpha; 2], 1e-3, 1e3)?;
        }
        super::check_range("probability", [self.probability; 2], 0.0, 1.0)
    }
}

/// How a sample is made of itself and its partner.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Share {
    /// So much of itself.
    Mixup(f32),
    /// All but this rectangle: top, left, height, width.
    Cutmix([usize; 4]),
}

/// Mixes pictures `[n, channels, height, width]` and labels `[n, classes]` of a batch, both `f32`. A pair draws
/// from `key` by the number of its first row.
pub(crate) fn mix(
    settings: &Mix,
    numbers: &[u64],
    pictures: &mut Tensor,
    labels: &mut Tensor,
    key: &Key,
) -> Result<(), String> {
    let (&[count, _, height, width], &[labelled, classes]) = (pictures.shape(), labels.shape()) else {
        return Err(format!(
            "pictures of shape {:?} and labels of shape {:?} cannot be mixed: expected [n, channels, height, width] and \
             [n, classes], which `one_hot` makes of class numbers",
            pictures.shape(),
            labels.shape()
        ));
    };
    if count != numbers.len() || labelled != numbers.len() || classes == 0 {
        return Err(format!("{count} pictures and {labelled} labels of {classes} classes cannot be mixed"));
    }
    let floats =
        |e: updraft_graph::TensorError| format!("cannot be mixed: {e}; pictures need `to_float` or `normalize`");
    let picture_len = pictures.len() / count;
    let pictures = pictures.as_mut_slice::<f32>().map_err(floats)?;
    let labels = labels.as_mut_slice::<f32>().map_err(floats)?;
    let pairs = pictures.chunks_exact_mut(2 * picture_len).zip(labels.chunks_exact_mut(2 * classes));
    for ((pictures, labels), numbers) in pairs.zip(numbers.chunks_exact(2)) {
        let mut draws = Draws::new(&key.child_index(numbers[0]));
        let Some(share) = draw(settings, height, width, &mut draws) else { continue };
        let (first, second) = pictures.split_at_mut(picture_len);
        let own = match share {
            Share::Mixup(own) => {
                blend(first, second, own);
                own
            }
            Share::Cutmix([top, left, cut_height, cut_width]) => {
                for (first, second) in
                    first.chunks_exact_mut(height * width).zip(second.chunks_exact_mut(height * width))
                {
                    for y in top..top + cut_height {
                        let row = y * width + left;
                        first[row..row + cut_width].swap_with_slice(&mut second[row..row + cut_width]);
                    }
                }
                1.0 - (cut_height * cut_width) as f32 / (height * width) as f32
            }
        };
        let (first, second) = labels.split_at_mut(classes);
        blend(first, second, own);
    }
    Ok(())
}

/// Both at once, each with `own` of itself.
fn blend(first: &mut [f32], second: &mut [f32], own: f32) {
    for (a, b) in first.iter_mut().zip(second) {
        (*a, *b) = (own * *a + (1.0 - own) * *b, own * *b + (1.0 - own) * *a);
    }
}

fn draw(settings: &Mix, height: usize, width: usize, draws: &mut Draws) -> Option<Share> {
    if !draws.chance(settings.probability) {
        return None;
    }
    let first = draws.chance(0.5);
    match (settings.mixup, settings.cutmix) {
        (Some(alpha), cutmix) if cutmix.is_none() || first => Some(Share::Mixup(beta(f64::from(alpha), draws) as f32)),
        (_, Some(alpha)) => {
            // A rectangle in the picture's proportions around a point anywhere, less what lies beyond the border.
            let side = libm::sqrt(1.0 - beta(f64::from(alpha), draws));
            let mut extent = |len: usize| {
                let (middle, half) = (draws.below(len), (side * len as f64) as usize / 2);
                let start = middle.saturating_sub(half);
                (start, (middle + half).min(len) - start)
            };
            let ((top, cut_height), (left, cut_width)) = (extent(height), extent(width));
            Some(Share::Cutmix([top, left, cut_height, cut_width]))
        }
        _ => None,
    }
}

/// From Beta(alpha, alpha), as a share of two gamma variates.
fn beta(alpha: f64, draws: &mut Draws) -> f64 {
    let (own, other) = (gamma(alpha, draws), gamma(alpha, draws));
    // Both can be too small for a double; then nearly all of the distribution lies at the two ends.
    if own + other > 0.0 { own / (own + other) } else { f64::from(u8::from(draws.chance(0.5))) }
}

/// From Gamma(shape, 1) (Marsaglia and Tsang, "A simple method for generating gamma variables", 2000).
fn gamma(shape: f64, draws: &mut Draws) -> f64 {
    if shape < 1.0 {
        let uniform = 1.0 - draws.uniform([0.0, 1.0]);
        return gamma(shape + 1.0, draws) * libm::pow(uniform, 1.0 / shape);
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / libm::sqrt(9.0 * d);
    loop {
        let x = draws.normal();
        let v = libm::pow(1.0 + c * x, 3.0);
        let uniform = 1.0 - draws.uniform([0.0, 1.0]);
        if v > 0.0 && libm::log(uniform) < 0.5 * x * x + d - d * v + d * libm::log(v) {
            return d * v;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(count: usize) -> (Vec<u64>, Tensor, Tensor) {
        let pictures: Vec<f32> = (0..count * 2 * 8 * 6).map(|i| (i % 97) as f32).collect();
        let mut labels = vec![0.0f32; count * 5];
        (0..count).for_each(|i| labels[i * 5 + i % 5] = 1.0);
        let samples = (0..count as u64).map(|i| i * 31 % 101).collect();
        (samples, Tensor::new(&[count, 2, 8, 6], &pictures).unwrap(), Tensor::new(&[count, 5], &labels).unwrap())
    }

    fn settings(mixup: Option<f32>, cutmix: Option<f32>) -> Mix {
        Mix { pictures: "image".into(), labels: "label".into(), mixup, cutmix, probability: 1.0 }
    }

    #[test]
    fn labels_stay_distributions_and_say_what_the_pictures_are_made_of() {
        for choice in [settings(Some(0.8), None), settings(None, Some(1.0)), settings(Some(0.2), Some(1.0))] {
            let (samples, mut pictures, mut labels) = batch(7);
            let before = pictures.as_slice::<f32>().unwrap().to_vec();
            mix(&choice, &samples, &mut pictures, &mut labels, &Key::new(4)).unwrap();
            let (pictures, labels) = (pictures.as_slice::<f32>().unwrap(), labels.as_slice::<f32>().unwrap());
            for (i, label) in labels.chunks_exact(5).enumerate() {
                assert!((label.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{label:?}");
                let own = label[i % 5];
                if i == 6 {
                    assert_eq!(own, 1.0);
                    continue;
                }
                let at = |values: &[f32], i: usize| values[i * 96..(i + 1) * 96].iter().sum::<f32>();
                if choice.cutmix.is_none() {
                    let expected = own * at(&before, i) + (1.0 - own) * at(&before, i ^ 1);
                    // Sums of 96 products, each rounded to 24 bits.
                    assert!((at(pictures, i) - expected).abs() < 96.0 * 97.0 * 1e-6);
                } else if choice.mixup.is_none() {
                    let pixels = pictures[i * 96..].iter().zip(&before[i * 96..]).take(96);
                    let kept = pixels.filter(|(now, then)| now == then).count() as f32 / 96.0;
                    assert!((kept - own).abs() < 1e-6, "{kept} {own}");
                }
            }
        }
    }

    #[test]
    fn a_pair_is_mixed_alike_in_any_batch() {
        let choice = settings(Some(0.4), Some(1.0));
        let (samples, mut whole, mut labels) = batch(8);
        mix(&choice, &samples, &mut whole, &mut labels, &Key::new(9)).unwrap();
        let (_, pictures, alone) = batch(8);
        let part = |tensor: &Tensor, shape: &[usize]| {
            let values = tensor.as_slice::<f32>().unwrap();
            let len = values.len() / 8;
            Tensor::new(shape, &values[4 * len..6 * len]).unwrap()
        };
        let (mut two, mut two_labels) = (part(&pictures, &[2, 2, 8, 6]), part(&alone, &[2, 5]));
        mix(&choice, &samples[4..6], &mut two, &mut two_labels, &Key::new(9)).unwrap();
        assert_eq!(two, part(&whole, &[2, 2, 8, 6]));
        assert_eq!(two_labels, part(&labels, &[2, 5]));
    }

    #[test]
    fn shares_have_the_moments_of_the_beta_distribution() {
        for alpha in [0.2, 1.0, 4.0] {
            let mut draws = Draws::new(&Key::new(11));
            const N: usize = 1 << 14;
            let shares: Vec<f64> = (0..N).map(|_| beta(alpha, &mut draws)).collect();
            let mean = shares.iter().sum::<f64>() / N as f64;
            let variance = shares.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / N as f64;
            let expected = 1.0 / (4.0 * (2.0 * alpha + 1.0));
            // Five standard errors of the mean; of a variance, whose own is below that of a two-point distribution.
            assert!((mean - 0.5).abs() < 5.0 * (expected / N as f64).sqrt(), "{alpha} {mean}");
            assert!((variance - expected).abs() < 5.0 * 0.25 / (N as f64).sqrt(), "{alpha} {variance}");
        }
    }

    #[test]
    fn pairs_are_mixed_as_often_and_as_much_as_settings_say() {
        const N: u64 = 4000;
        let draw_of = |choice: &Mix, pair: u64| draw(choice, 900, 700, &mut Draws::new(&Key::new(2).child_index(pair)));
        let shares = |choice: Mix| -> Vec<Option<Share>> { (0..N).map(|pair| draw_of(&choice, pair)).collect() };
        // Five standard deviations of a count.
        let is_likely = |count: usize, chance: f64| {
            (count as f64 - N as f64 * chance).abs() <= 5.0 * (N as f64 * chance * (1.0 - chance)).sqrt()
        };
        let both = shares(Mix { probability: 0.8, ..settings(Some(1.0), Some(1.0)) });
        assert!(is_likely(both.iter().flatten().count(), 0.8));
        assert!(is_likely(both.iter().filter(|s| matches!(s, Some(Share::Mixup(_)))).count(), 0.4));
        // Of a side s of 1 around a place anywhere, s - s²/4 lies within. With s² uniform, as it is for an alpha of 1, the
        // area is 1/2 - 1/5 + 1/48 on average.
        let areas: Vec<f64> = shares(settings(None, Some(1.0)))
            .into_iter()
            .map(|share| match share {
                Some(Share::Cutmix([top, left, height, width])) if top + height <= 900 && left + width <= 700 => {
                    (height * width) as f64 / (900.0 * 700.0)
                }
                other => panic!("{other:?}"),
            })
            .collect();
        let mean = areas.iter().sum::<f64>() / N as f64;
        let deviation = (areas.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / N as f64).sqrt();
        // Sides are cut off to whole pixels, which is a part in 350 of the area at most.
        let expected = 0.5 - 0.2 + 1.0 / 48.0;
        assert!((mean - expected).abs() < 5.0 * deviation / (N as f64).sqrt() + 0.003, "{mean}");
    }

    #[test]
    fn shapes_that_cannot_be_mixed_are_refused() {
        let (samples, mut pictures, _) = batch(4);
        let mut classes = Tensor::vector(&[0i64, 1, 2, 3]);
        let error = mix(&settings(Some(1.0), None), &samples, &mut pictures, &mut classes, &Key::new(0)).unwrap_err();
        assert!(error.contains("one_hot"), "{error}");
    }
}
