//! What is read to make batches: how often, how much at once, and what it is called.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::*;

/// A picture or a document, made anew each time it is read, and how many were.
struct Large {
    picture: Vec<u8>,
    document: Vec<i64>,
    rows: Vec<u64>,
    read: Arc<AtomicU64>,
}

impl Large {
    /// So many of about a megabyte.
    fn of(rows: u64) -> Large {
        let side = 600;
        let pixels: Vec<u8> = (0..3 * side * side).map(|i| Key::new(3).bits(u64::from(i)) as u8).collect();
        let mut picture = std::io::Cursor::new(Vec::new());
        image::write_buffer_with_format(
            &mut picture,
            &pixels,
            side,
            side,
            image::ExtendedColorType::Rgb8,
            image::ImageFormat::Png,
        )
        .unwrap();
        Large {
            picture: picture.into_inner(),
            document: (0..1 << 17).collect(),
            rows: vec![rows],
            read: Arc::default(),
        }
    }

    fn dataset(self, recipe: Value) -> Arc<Dataset> {
        let config = serde_json::from_value(recipe).unwrap();
        Arc::new(dataset_over(Box::new(self), &["image", "tokens", "score"], &[1], &config).unwrap())
    }
}

impl Source for Large {
    fn block_rows(&self) -> &[u64] {
        &self.rows
    }

    fn resident_bytes(&self, _: u64) -> u64 {
        0
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        self.read.fetch_add(rows.len() as u64, Ordering::Relaxed);
        let of_column = |column: &usize| match column {
            0 => Cells::Bytes(rows.iter().map(|_| Bytes::copy_from_slice(&self.picture)).collect()),
            1 => Cells::Lists(rows.iter().map(|_| Tensor::vector(&self.document)).collect()),
            _ => Cells::Numbers(Tensor::vector(&rows.iter().map(|row| *row as i64).collect::<Vec<_>>())),
        };
        Ok(columns.iter().map(of_column).collect())
    }

    fn row_name(&self, row: u64) -> String {
        format!("row {row}")
    }
}

/// A clock on which a nanosecond passes whenever it is asked.
struct Ticks(AtomicU64);

impl Clock for Ticks {
    fn now_unix_ms(&self) -> u64 {
        0
    }

    fn monotonic_ns(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    fn sleep_ms(&self, _: u64) {}
}

#[test]
fn a_batch_that_memory_does_not_hold_is_read_in_parts() {
    let memory_bytes = 16 << 20;
    let image = json!([{ "name": "image", "transform": [{ "decode": "rgb" }, { "resize": [8, 8] }] }]);
    let tokens = json!([{ "name": "tokens" }]);
    for recipe in [
        json!({ "path": "a", "memory_bytes": memory_bytes, "tensors": image }),
        json!({ "path": "a", "memory_bytes": memory_bytes, "tensors": tokens, "pack": { "length": 50 } }),
        json!({
            "path": "a", "memory_bytes": memory_bytes, "tensors": tokens,
            "pack": { "length": 300_000, "fill": { "whole": { "open_rows": 3 } } },
        }),
    ] {
        let dataset = Large::of(480).dataset(recipe.clone());
        // The third has rows of 2.4 MB, of which one is too large for its share of the queue.
        let rows = if recipe["pack"]["length"] == 300_000 { 2 } else { 48 };
        let loader = Loader::new(dataset, options(rows, 2)).unwrap();
        let peak_bytes = memory::peak_of(|| {
            assert_eq!(loader.batch(0).unwrap().tensors[0].1.shape()[0], rows);
        });
        println!("{peak_bytes} bytes at the peak");
        assert!(peak_bytes < memory_bytes, "{peak_bytes} bytes for {recipe}");
    }
}

#[test]
fn as_many_batches_are_begun_as_memory_holds_with_what_they_are_read_from() {
    let image = json!([{ "name": "image", "transform": [{ "decode": "rgb" }, { "resize": [8, 8] }] }]);
    let dataset = Large::of(48).dataset(json!({ "path": "a", "memory_bytes": 64 << 20, "tensors": image }));
    let loader = Loader::new(dataset, LoaderOptions { threads: 8, ..options(24, 24) }).unwrap();
    // Of the 16 MiB for batches in the making, four parts of 3 MB each.
    assert_eq!(loader.batches(0..1).unwrap().in_flight_max(), 5);
}

#[test]
fn steps_that_are_made_out_of_turn_read_nothing_twice() {
    let read = |steps: &[u64]| {
        let large = Large { document: (0..40).collect(), ..Large::of(480) };
        let counter = large.read.clone();
        let dataset =
            large.dataset(json!({ "path": "a", "tensors": [{ "name": "tokens" }], "pack": { "length": 50 } }));
        let loader = Loader::new(dataset, options(24, 24)).unwrap();
        let before = counter.load(Ordering::Relaxed);
        steps.iter().for_each(|step| assert_eq!(loader.batch(*step).unwrap().step, *step));
        counter.load(Ordering::Relaxed) - before
    };
    assert_eq!(read(&[1, 0, 3, 2, 7, 5, 6, 4]), read(&[0, 1, 2, 3, 4, 5, 6, 7]));
}

#[test]
fn what_is_done_to_find_out_which_samples_make_a_batch_is_called_what_it_is() {
    let large = Large { document: (0..40).collect(), ..Large::of(480) };
    let dataset = large.dataset(json!({
        "path": "a", "tensors": [{ "name": "tokens" }], "pack": { "length": 50 },
        "filter": [{ "column": "score", "at_least": 0 }],
    }));
    let loader = Loader::timed(dataset, options(24, 24), Some(Arc::new(Ticks(AtomicU64::new(0))))).unwrap();
    let times = loader.make(0, &|| false).unwrap().times;
    // Filtering, and the steps to tokens when samples are weighed and again when they are laid out; each was read for.
    assert_eq!((times.transform_ns, times.fetch_ns, times.decode_ns), (3, 4, 0));
}

#[test]
fn a_sample_that_comes_twice_in_a_batch_does_not_look_the_same_twice() {
    let config = json!({
        "sources": [{ "path": "a", "weight": 0.9 }, { "path": "b", "weight": 0.1 }],
        "tensors": [{ "name": "image", "transform": [{ "decode": "grey" }, { "random_crop": { "size": [8, 8] } }] }],
    });
    let source = Box::new(Join::new(vec![Box::new(Large::of(2)), Box::new(Large::of(30))]));
    let config = serde_json::from_value(config).unwrap();
    let dataset = dataset_over(source, &["image", "tokens", "score"], &[1, 1], &config).unwrap();
    let batch = Loader::new(Arc::new(dataset), options(8, 2)).unwrap().batch(0).unwrap();
    assert!(batch.samples.iter().filter(|sample| **sample < 2).count() > 4, "{:?}", batch.samples);
    let windows: std::collections::BTreeSet<&[u8]> = batch.tensors[0].1.bytes().chunks_exact(64).collect();
    assert_eq!(windows.len(), 8);
}
