//! Pictures of every kind that cameras and the web make, against what Pillow makes of the same files.

use std::path::{Path, PathBuf};

use updraft_data::{Dataset, DatasetConfig, Loader, LoaderOptions, read_npz};
use updraft_graph::Tensor;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pictures").join(name)
}

/// The only picture of a dataset, channels × height × width; or why it was refused.
fn read(name: &str, bytes: &[u8], transform: &str) -> Result<Tensor, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("a")).unwrap();
    std::fs::write(dir.path().join("a").join(name), bytes).unwrap();
    let recipe = format!("path = {:?}\n[[tensors]]\nname = \"image\"\ntransform = [{transform}]", dir.path());
    let config: DatasetConfig = toml::from_str(&recipe).unwrap();
    let dataset = Dataset::open(&config, Path::new("/")).map_err(|e| e.to_string())?;
    let options = LoaderOptions { batch_size: 1, ..LoaderOptions::default() };
    let loader = Loader::new(dataset.into(), options).map_err(|e| e.to_string())?;
    Ok(loader.batch(0).map_err(|e| e.to_string())?.tensors.remove(0).1)
}

/// The picture that the fixtures' script makes by the same formula, as a PNG.
fn known(height: usize, width: usize) -> Vec<u8> {
    let pixels: Vec<u8> = (0..height * width * 3)
        .map(|i| {
            let (x, y, c) = (i / 3 % width, i / 3 / width, i % 3);
            (40 + (x * 5 + y * 3 * (c + 1) + i * 7919 % 23) % 180) as u8
        })
        .collect();
    let mut file = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::from_raw(width as u32, height as u32, pixels).unwrap();
    picture.write_to(&mut file, image::ImageFormat::Png).unwrap();
    file.into_inner()
}

/// The largest and the mean difference between a tensor `[1, channels, height, width]` and Pillow's array `[height,
/// width, channels]`.
fn difference(found: &Tensor, expected: &Tensor) -> (u8, f64) {
    let (height, width) = (expected.shape()[0], expected.shape()[1]);
    let channels = expected.shape().get(2).copied().unwrap_or(1);
    assert_eq!(found.shape(), [1, channels, height, width]);
    let (mut largest, mut sum) = (0, 0.0);
    for c in 0..channels {
        for at in 0..height * width {
            let pair = (found.bytes()[c * height * width + at], expected.bytes()[at * channels + c]);
            largest = largest.max(pair.0.abs_diff(pair.1));
            sum += f64::from(pair.0.abs_diff(pair.1));
        }
    }
    (largest, sum / expected.len() as f64)
}

#[test]
fn files_are_decoded_as_by_pillow() {
    let pillow = read_npz(&fixture("read.npz"), 1 << 24).unwrap();
    let mut wrong = Vec::new();
    let rgb = "{ decode = \"rgb\" }";
    let grey = "{ decode = \"grey\" }";
    let orient = "{ decode = { colour = \"rgb\", orient = true } }";
    // The JPEG standard lets two inverse transforms differ by a level in each of luma and the two colour planes, blue
    // takes 1.772 of one of those, and halved planes are spread with one rounding more.
    let jpeg = (5, 1.0);
    for (file, transform, (most, mean)) in [
        ("halved.jpg", rgb, jpeg),
        ("wide.jpg", rgb, jpeg),
        ("progressive.jpg", rgb, jpeg),
        ("restarts.jpg", rgb, jpeg),
        ("grey.jpg", grey, (1, 0.1)),
        ("inks.jpg", rgb, jpeg),
        ("lossless.webp", rgb, (0, 0.0)),
        ("lossy.webp", rgb, (2, 0.5)),
        ("veiled.webp", rgb, (0, 0.0)),
        ("two_levels.png", grey, (0, 0.0)),
        ("grey_alpha.png", grey, (0, 0.0)),
        ("palette_alpha.png", rgb, (0, 0.0)),
        ("turned1.jpg", orient, jpeg),
        ("turned2.jpg", orient, jpeg),
        ("turned3.jpg", orient, jpeg),
        ("turned4.jpg", orient, jpeg),
        ("turned5.jpg", orient, jpeg),
        ("turned6.jpg", orient, jpeg),
        ("turned7.jpg", orient, jpeg),
        ("turned8.jpg", orient, jpeg),
    ] {
        let array = file.split('.').next().unwrap();
        let expected = &pillow.iter().find(|(n, _)| n == array).unwrap().1;
        let found = read(file, &std::fs::read(fixture(file)).unwrap(), transform).unwrap();
        let (largest, average) = difference(&found, expected);
        if largest > most || average > mean {
            wrong.push(format!("{file}: largest difference {largest}, mean {average}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_filter_resizes_as_by_pillow() {
    let pillow = read_npz(&fixture("read.npz"), 1 << 24).unwrap();
    let png = known(37, 53);
    for filter in ["nearest", "box", "bilinear", "bicubic", "lanczos"] {
        for (name, size) in [("down", "[11, 16]"), ("up", "[60, 90]")] {
            let expected = &pillow.iter().find(|(n, _)| *n == format!("{filter}_{name}")).unwrap().1;
            let resize = format!("{{ decode = \"rgb\" }}, {{ resize = {{ size = {size}, filter = \"{filter}\" }} }}");
            let (largest, average) = difference(&read("a.png", &png, &resize).unwrap(), expected);
            // Two passes, each rounded, in another order: half a level from the first is weighed by the second, by more
            // than one in all where weights are negative too. Nearest only copies.
            let most = match filter {
                "nearest" => 0,
                "box" | "bilinear" => 1,
                _ => 2,
            };
            assert!(largest <= most && average <= 0.5, "{filter} {name}: {largest}, mean {average}");
        }
    }
}

#[test]
fn the_shorter_side_is_resized_and_the_other_follows() {
    let resize = "{ decode = \"rgb\" }, { resize = { shorter = 20, antialias = false } }";
    assert_eq!(read("a.png", &known(37, 53), resize).unwrap().shape(), [1, 3, 20, 28]);
    let refused = read("a.png", &known(3, 3), "{ decode = \"rgb\" }, { resize = { filter = \"box\" } }").unwrap_err();
    assert!(refused.contains("either `size` or `shorter`"), "{refused}");
}

#[test]
fn settings_name_what_they_take() {
    for (transform, expected) in [
        ("{ decode = \"cmyk\" }", "`grey` or `rgb`"),
        ("{ decode = { colour = \"rgb\", turn = true } }", "unknown field `turn`"),
        ("{ decode = 3 }", "`orient`"),
        ("{ resize = [2] }", "array of length 2"),
        ("{ resize = { side = 2 } }", "unknown field `side`"),
    ] {
        let recipe = format!("path = \"x\"\n[[tensors]]\nname = \"image\"\ntransform = [{transform}]");
        let error = toml::from_str::<DatasetConfig>(&recipe).unwrap_err().to_string();
        assert!(error.contains(expected), "{transform}: {error}");
    }
}

#[test]
fn a_picture_beyond_the_limit_is_refused_by_name() {
    let bytes = std::fs::read(fixture("halved.jpg")).unwrap();
    let limited = "{ decode = { colour = \"rgb\", pixels_max = 1960 } }";
    let refused = read("big.jpg", &bytes, limited).unwrap_err();
    assert!(refused.contains("big.jpg") && refused.contains("claims 37 x 53 pixels; 1 to 1960"), "{refused}");
    assert!(read("big.jpg", &bytes, &limited.replace("1960", "1961")).is_ok());
}

#[test]
fn a_truncated_picture_is_refused() {
    for file in ["halved.jpg", "progressive.jpg", "lossless.webp", "palette_alpha.png"] {
        let bytes = std::fs::read(fixture(file)).unwrap();
        let refused = read(file, &bytes[..bytes.len() * 3 / 4], "{ decode = \"rgb\" }").unwrap_err();
        assert!(refused.contains(file), "{refused}");
    }
}

#[test]
fn decoded_pictures_are_kept_unless_no_epoch_follows() {
    for (ends_before, kept) in [(u64::MAX, true), (4, true), (3, true), (2, false)] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        (0..4).for_each(|i| std::fs::write(dir.path().join(format!("a/{i}.png")), known(9 + i, 8)).unwrap());
        let transform = "{ decode = \"rgb\" }, { resize = [8, 8] }";
        let recipe = format!("path = {:?}\n[[tensors]]\nname = \"image\"\ntransform = [{transform}]", dir.path());
        let dataset = Dataset::open(&toml::from_str(&recipe).unwrap(), Path::new("/")).unwrap();
        let options = LoaderOptions { batch_size: 2, ..LoaderOptions::default() };
        let loader = Loader::new(dataset.into(), options).unwrap();
        loader.ends_before(ends_before);
        let first = loader.batch(0).unwrap().tensors;
        loader.batch(1).unwrap();
        std::fs::remove_dir_all(dir.path().join("a")).unwrap();
        let again = loader.batch(2).map(|batch| batch.tensors);
        assert_eq!(again.is_ok_and(|again| again == first), kept, "{ends_before}");
    }
}
