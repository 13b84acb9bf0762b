//! What a loader promises, over a source made up from sample numbers: no file is needed, and 10^9 samples cost nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use updraft_base::{Clock, Digest, Key, SystemClock};
use updraft_graph::Tensor;

use super::*;
use crate::config::DatasetConfig;
use crate::lanes::Share;
use crate::source::join::Join;
use crate::source::{Cells, Opened, Source};

mod memory;
mod model;
mod reading;
mod stores;
mod token;

/// Sample `s` is a list of up to 40 tokens `1000·s + i`, and a score in 0..10.
struct Documents {
    first: u64,
    blocks: Vec<u64>,
}

fn len_of(sample: u64) -> u64 {
    Key::new(7).below(sample, 40)
}

fn score_of(sample: u64) -> u64 {
    Key::new(8).below(sample, 10)
}

impl Source for Documents {
    fn block_rows(&self) -> &[u64] {
        &self.blocks
    }

    fn resident_bytes(&self, _: u64) -> u64 {
        0
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let tokens = |sample: u64| -> Vec<i64> { (0..len_of(sample)).map(|i| (1000 * sample + i) as i64).collect() };
        let samples: Vec<u64> = rows.iter().map(|row| self.first + row).collect();
        let of_column = |column: &usize| match column {
            0 => Cells::Lists(samples.iter().map(|s| Tensor::vector(&tokens(*s))).collect()),
            _ => Cells::Numbers(Tensor::vector(&samples.iter().map(|s| score_of(*s) as i64).collect::<Vec<_>>())),
        };
        Ok(columns.iter().map(of_column).collect())
    }

    fn row_name(&self, row: u64) -> String {
        format!("document {}", self.first + row)
    }
}

/// A dataset of sources with blocks of these sizes, and what else a recipe says.
fn dataset(sources: &[Vec<u64>], recipe: Value) -> Arc<Dataset> {
    let mut config = json!({ "path": "made up" });
    config.as_object_mut().unwrap().extend(recipe.as_object().unwrap().clone());
    let config: DatasetConfig = serde_json::from_value(config).unwrap();
    let mut first = 0;
    let parts = sources.iter().map(|blocks| -> Box<dyn Source> {
        let part = Documents { first, blocks: blocks.clone() };
        first += blocks.iter().sum::<u64>();
        Box::new(part)
    });
    let source = Box::new(Join::new(parts.collect()));
    let blocks: Vec<usize> = sources.iter().map(Vec::len).collect();
    Arc::new(dataset_over(source, &["tokens", "score"], &blocks, &config).unwrap())
}

fn dataset_over(
    source: Box<dyn Source>,
    columns: &[&str],
    blocks: &[usize],
    config: &DatasetConfig,
) -> Result<Dataset, DataError> {
    let columns = columns.iter().map(|name| (*name).to_owned()).collect();
    let opened = Opened { source, columns, digest: Digest::of(b"made up"), vocabulary: None, classes: None };
    Dataset::over(config, Path::new(""), PathBuf::from("made up"), opened, blocks)
}

/// The ways in which samples become rows, each with the sources it is tried on.
fn ways() -> Vec<(&'static str, Arc<Dataset>)> {
    let one = || vec![vec![37; 40]];
    let three = || vec![vec![37; 40], vec![5, 0, 100, 61], vec![250]];
    let score = json!([{ "name": "score" }]);
    let tokens = json!([{ "name": "tokens" }]);
    let filter = json!([{ "column": "score", "at_least": 3 }]);
    let mix = json!([
        { "path": "a", "weight": 0.6 }, { "path": "b", "weight": 0.3 }, { "path": "c", "weight": 0.1 },
    ]);
    let pack =
        |fill: Value| json!({ "length": 64, "fill": fill, "separator": 0, "targets": "next", "documents": "of" });
    let whole = json!({ "whole": { "open_rows": 4 } });
    vec![
        ("lanes", dataset(&one(), json!({ "tensors": score }))),
        (
            "mixture",
            dataset(
                &three(),
                json!({ "tensors": score, "sources": mix, "weights": [{ "from": 2000, "weights": [0, 1, 1] }] }),
            ),
        ),
        ("filter", dataset(&one(), json!({ "tensors": score, "filter": filter }))),
        ("cut", dataset(&one(), json!({ "tensors": tokens, "pack": pack(json!("cut")) }))),
        ("whole", dataset(&one(), json!({ "tensors": tokens, "pack": pack(whole.clone()) }))),
        ("all", dataset(&three(), json!({ "tensors": tokens, "sources": mix, "filter": filter, "pack": pack(whole) }))),
    ]
}

fn options(batch_size: usize, lanes: u64) -> LoaderOptions {
    LoaderOptions {
        batch_size,
        seed: 11,
        shuffle: Shuffle::Blocks(2),
        tail: Tail::Wrap,
        threads: 0,
        lanes: Some(lanes),
        ..LoaderOptions::default()
    }
}

fn ranks(dataset: &Arc<Dataset>, options: &LoaderOptions, ranks: usize) -> Vec<Loader> {
    let of = |rank| Loader::new(dataset.clone(), LoaderOptions { rank, ranks, ..options.clone() }).unwrap();
    (0..ranks).map(of).collect()
}

/// What all ranks together read in a step.
fn global(loaders: &[Loader], step: u64) -> Vec<Vec<Piece>> {
    let mut rows: Vec<Vec<Piece>> = loaders.iter().flat_map(|loader| loader.pieces(step).unwrap()).collect();
    rows.sort_by_key(|row| row.iter().map(|p| (p.sample, p.offset)).collect::<Vec<_>>());
    rows
}

#[test]
fn global_batches_are_the_same_for_any_number_of_ranks() {
    for (name, dataset) in ways() {
        for (batch, lanes) in [(48, 24), (24, 48)] {
            let options = options(batch, lanes);
            let one = ranks(&dataset, &options, 1);
            let expected: Vec<_> = (0..80).map(|step| global(&one, step)).collect();
            for count in [2, 3, 4, 6, 8] {
                let loaders = ranks(&dataset, &options, count);
                for (step, expected) in expected.iter().enumerate() {
                    assert_eq!(global(&loaders, step as u64), *expected, "{name}: {count} ranks, step {step}");
                }
                assert!(loaders.iter().all(|l| l.steps_per_epoch() == one[0].steps_per_epoch()));
            }
        }
    }
}

#[test]
fn ranks_make_the_very_rows_of_the_batch_that_one_makes() {
    let pictures = json!([
        { "name": "image", "columns": ["score"], "transform": [{ "cast": "f32" }, { "reshape": [1, 1, 1] }] },
        { "name": "label", "columns": ["score"], "transform": [{ "one_hot": 10 }] },
    ]);
    let sources = json!([{ "path": "a", "weight": 2 }, { "path": "b", "weight": 1 }]);
    let mix = json!({ "mixup": 0.4 });
    let mut ways = ways();
    ways.push(("pairs", dataset(&[vec![37; 40]], json!({ "tensors": pictures, "mix": mix }))));
    let mixed = json!({ "tensors": pictures, "mix": mix, "sources": sources });
    ways.push(("pairs of a mixture", dataset(&[vec![37; 40], vec![25; 4]], mixed)));
    let rows = |batch: &Batch| -> Vec<Vec<Vec<u8>>> {
        let row = |row: usize| {
            let bytes = |t: &Tensor| t.bytes().chunks_exact(t.byte_len() / t.shape()[0]).nth(row).unwrap().to_vec();
            batch.tensors.iter().map(|(_, t)| bytes(t)).collect()
        };
        (0..batch.tensors[0].1.shape()[0]).map(row).collect()
    };
    for (name, dataset) in ways {
        for (batch, lanes) in [(48, 24), (24, 48)] {
            let options = options(batch, lanes);
            let one = Loader::new(dataset.clone(), options.clone()).unwrap();
            for count in [2, 3, 4, 6, 8] {
                // A slot has even numbers of neighbours where 24 are shared by so many.
                if name.starts_with("pairs") && count == 8 {
                    continue;
                }
                let loaders = ranks(&dataset, &options, count);
                for step in [0, 1, 36, 37, 38, 60] {
                    let expected = rows(&one.batch(step).unwrap());
                    for (rank, loader) in loaders.iter().enumerate() {
                        let share = Share::new(lanes, batch as u64, rank, &vec![1; count]).unwrap();
                        let own = (0..).zip(&expected).filter(|(row, _)| share.has_row(*row)).map(|(_, row)| row);
                        let made = rows(&loader.batch(step).unwrap());
                        assert!(made.iter().eq(own), "{name}: rank {rank} of {count}, step {step}");
                    }
                }
            }
        }
    }
}

#[test]
fn ranks_may_change_at_any_step_and_nothing_else_does() {
    for (name, dataset) in ways() {
        let options = options(48, 24);
        let one = ranks(&dataset, &options, 1);
        let expected: Vec<_> = (0..60).map(|step| global(&one, step)).collect();
        let mut loaders = ranks(&dataset, &options, 1);
        for (step, expected) in expected.iter().enumerate() {
            if step % 7 == 5 {
                let tokens: Vec<LoaderToken> = loaders.iter().map(|l| l.token(step as u64).unwrap()).collect();
                let token = LoaderToken::merge(&tokens).unwrap();
                let token: LoaderToken = serde_json::from_str(&serde_json::to_string(&token).unwrap()).unwrap();
                loaders = ranks(&dataset, &options, [3, 8, 1, 6, 2, 4][step / 7 % 6]);
                assert!(loaders.iter().all(|l| l.resume(&token).unwrap() == step as u64));
            }
            assert_eq!(global(&loaders, step as u64), *expected, "{name}: step {step}");
        }
    }
}

#[test]
fn threads_and_entering_anywhere_change_nothing() {
    for (name, dataset) in ways() {
        let options = LoaderOptions { threads: 3, ..options(24, 24) };
        let ahead = Loader::new(dataset.clone(), options.clone()).unwrap();
        let batches: Vec<Batch> = ahead.batches(0..30).unwrap().map(Result::unwrap).collect();
        let now = Loader::new(dataset.clone(), LoaderOptions { threads: 0, ..options }).unwrap();
        for step in [29, 3, 3, 17, 0] {
            assert_eq!(now.batch(step as u64).unwrap(), batches[step], "{name}: step {step}");
        }
    }
}

#[test]
fn every_sample_that_passes_comes_once_before_any_lane_begins_again() {
    for (name, dataset) in ways() {
        if !dataset.weights().is_empty() {
            continue;
        }
        let loader = &ranks(&dataset, &options(24, 24), 1)[0];
        let mut tokens_of: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
        for step in 0..2 * loader.steps_per_epoch() {
            for piece in loader.pieces(step).unwrap().into_iter().flatten() {
                tokens_of.entry(piece.sample).or_default().push((piece.offset, piece.len));
            }
        }
        for sample in 0..dataset.len() {
            let passes = name != "filter" || score_of(sample) >= 3;
            let len = match name {
                "cut" | "whole" if len_of(sample) == 0 => 0,
                "cut" | "whole" => len_of(sample) + 1,
                _ => u64::from(passes),
            };
            let seen: u64 = tokens_of.get(&sample).map_or(0, |pieces| pieces.iter().map(|(_, len)| len).sum());
            // Two epochs' worth of rows hold each sample twice, or more where rows hold many samples.
            assert!(seen.is_multiple_of(len.max(1)) || name == "cut" || name == "whole", "{name}: {sample}");
            assert_eq!(seen == 0, len == 0, "{name}: sample {sample} was seen for {seen} of {len}");
        }
    }
}

#[test]
fn evaluation_takes_every_packed_or_filtered_sample_once_and_ends() {
    for (name, dataset) in ways() {
        if !dataset.weights().is_empty() {
            continue;
        }
        let options = LoaderOptions { tail: Tail::Pad, shuffle: Shuffle::None, lanes: None, ..options(32, 1) };
        let loader = Loader::new(dataset.clone(), options).unwrap();
        assert!(loader.has_epochs());
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
        for step in 0..loader.steps_per_epoch() {
            let batch = loader.batch(step).unwrap();
            assert!(batch.tensors.iter().all(|(_, t)| t.shape()[0] == 32));
            let pieces = loader.pieces(step).unwrap();
            assert_eq!(pieces.len(), batch.samples.len());
            pieces.iter().flatten().for_each(|p| *counts.entry(p.sample).or_default() += p.len);
        }
        for sample in 0..dataset.len() {
            let expected = match name {
                "cut" | "whole" if len_of(sample) > 0 => len_of(sample) + 1,
                "cut" | "whole" => 0,
                "filter" => u64::from(score_of(sample) >= 3),
                _ => 1,
            };
            assert_eq!(counts.get(&sample).copied().unwrap_or(0), expected, "{name}: sample {sample}");
        }
    }
}

#[test]
fn packed_batches_hold_the_tokens_of_their_pieces() {
    for (name, dataset) in ways() {
        let Some(pack) = dataset.pack() else { continue };
        let loader = &ranks(&dataset, &options(24, 24), 1)[0];
        let batch = loader.batch(5).unwrap();
        let tokens = batch.tensors[0].1.to_i64().unwrap();
        for (row, pieces) in loader.pieces(5).unwrap().iter().enumerate() {
            let expected = pieces.iter().flat_map(|p| {
                (p.offset..p.offset + p.len)
                    .map(|i| if i == len_of(p.sample) { 0 } else { (1000 * p.sample + i) as i64 })
            });
            let row = &tokens[row * pack.length..][..pack.length];
            let expected: Vec<i64> = expected.collect();
            assert_eq!(row[..expected.len()], expected, "{name}");
            assert!(row[expected.len()..].iter().all(|t| *t == 0));
        }
    }
}

#[test]
fn a_sample_is_found_at_its_step() {
    let dataset = dataset(&[vec![37; 40]], json!({ "tensors": [{ "name": "score" }] }));
    for lanes in [None, Some(24)] {
        for tail in [Tail::Drop, Tail::Pad, Tail::Wrap] {
            let options = LoaderOptions { lanes, tail, ..options(48, 24) };
            let loader = Loader::new(dataset.clone(), options).unwrap();
            let mut found = 0;
            for sample in 0..dataset.len() {
                let Some(step) = loader.step_of(2, sample) else { continue };
                found += 1;
                let batch = loader.batch(step).unwrap();
                assert!(batch.epoch == 2 && batch.samples.contains(&sample));
            }
            let seen = loader.steps_per_epoch() * 48;
            assert_eq!(found, if tail == Tail::Drop { seen } else { dataset.len() });
        }
    }
}

#[test]
fn orders_that_cannot_be_are_refused() {
    let numbers = || json!({ "tensors": [{ "name": "score" }] });
    let refused = |recipe: Value, options: LoaderOptions| {
        let sources = if recipe.get("sources").is_some() { vec![vec![1000], vec![10]] } else { vec![vec![100; 10]] };
        Loader::new(dataset(&sources, recipe), options).unwrap_err().to_string()
    };
    assert!(refused(numbers(), options(48, 36)).contains("one must divide the other"));
    assert!(refused(numbers(), LoaderOptions { ranks: 2, lanes: None, ..options(48, 1) }).contains("need `lanes`"));
    assert!(refused(numbers(), LoaderOptions { ranks: 2, rank: 2, ..options(48, 24) }).contains("does not exist"));
    assert!(refused(numbers(), LoaderOptions { ranks: 50, ..options(48, 24) }).contains("none of the 24 lanes"));
    let transform = json!([{ "cast": "f32" }, { "reshape": [1, 1, 1] }]);
    let pairs = json!({
        "tensors": [
            { "name": "image", "columns": ["score"], "transform": transform },
            { "name": "label", "columns": ["score"], "transform": [{ "one_hot": 10 }] },
        ],
        "mix": { "mixup": 1.0 },
    });
    let odd = refused(pairs, LoaderOptions { rank: 7, ranks: 8, ..options(48, 24) });
    assert!(odd.contains("rank 7 of 8") && odd.contains("an even number"), "{odd}");
    assert!(refused(numbers(), options((1 << 26) + 1, 1)).contains("at most 67108864"));
    let mix = json!([{ "path": "a", "weight": 1 }, { "path": "b", "weight": 1 }]);
    let mixed = json!({ "tensors": [{ "name": "score" }], "sources": mix });
    assert!(refused(mixed, options(48, 24)).contains("source 1 has 10 samples, too few for 24 lanes"));
    let none = json!({ "tensors": [{ "name": "score" }], "filter": [{ "column": "score", "at_least": 10 }] });
    let loader = Loader::new(dataset(&[vec![100; 10]], none.clone()), options(48, 24)).unwrap();
    assert!(loader.batch(0).unwrap_err().to_string().contains("no sample of lane 0 passes"));
    let most = json!({ "tensors": [{ "name": "score" }], "filter": [{ "column": "score", "at_least": 1 }] });
    let listed = |bytes: u64| {
        let mut recipe = most.clone();
        recipe["memory_bytes"] = bytes.into();
        Loader::new(dataset(&[vec![1000; 100]], recipe), LoaderOptions { tail: Tail::Pad, ..options(48, 24) })
    };
    assert!(listed(64 << 20).is_ok());
    let error = listed(16 << 20).unwrap_err().to_string();
    assert!(error.contains("a list of the rows") && error.contains("`rows`"), "{error}");
    let listed = LoaderOptions { tail: Tail::Pad, ..options(48, 24) };
    assert!(refused(none, listed).contains("lets no sample through"));
}

#[test]
fn resuming_anywhere_in_a_billion_samples_takes_neither_time_nor_memory() {
    // 300,000 shards, the number that 64 MiB shards of 20 KB samples make.
    let blocks: Vec<u64> = (0..300_000).map(|b| 3_333 + b % 2).collect();
    for recipe in [
        json!({ "tensors": [{ "name": "score" }] }),
        json!({ "tensors": [{ "name": "tokens" }], "pack": { "length": 64 } }),
    ] {
        let dataset = dataset(std::slice::from_ref(&blocks), recipe);
        assert!(dataset.len() > 1_000_000_000);
        let options = LoaderOptions { shuffle: Shuffle::Blocks(8), ..options(480, 240) };
        let loader = || Loader::new(dataset.clone(), options.clone()).unwrap();
        // A state far into the epoch: every lane has taken four million samples.
        let mut token = serde_json::to_value(loader().token(0).unwrap()).unwrap();
        token["next_step"] = 2_000_000.into();
        for lane in 0..240 {
            if token["carried"][lane.to_string()].is_object() {
                token["carried"][lane.to_string()] = json!({ "at": 4_000_000 });
            }
        }
        let token: LoaderToken = serde_json::from_value(token).unwrap();
        let clock = SystemClock::new();
        let start_ns = clock.monotonic_ns();
        let peak_bytes = memory::peak_of(|| {
            let loader = loader();
            let step = loader.resume(&token).unwrap();
            assert_eq!(loader.batch(step).unwrap().tensors[0].1.shape()[0], 480);
        });
        let elapsed_ms = (clock.monotonic_ns() - start_ns) / 1_000_000;
        println!("resumed and made a batch in {elapsed_ms} ms with {peak_bytes} bytes at the peak");
        assert!(elapsed_ms < 1000, "{elapsed_ms} ms");
        assert!(peak_bytes < 64 << 20, "{peak_bytes} bytes");
    }
}

#[test]
fn batches_in_flight_stay_within_their_memory() {
    let tokens = json!([{ "name": "tokens" }]);
    let memory_bytes = 8 << 20;
    let pack = json!({ "tensors": tokens, "pack": { "length": 4096 }, "memory_bytes": memory_bytes });
    let dataset = dataset(&[vec![1000; 50]], pack);
    let options = LoaderOptions { threads: 2, shuffle: Shuffle::None, queue_bytes: u64::MAX, ..options(24, 24) };
    let loader = Loader::timed(dataset, options, Some(Arc::new(SystemClock::new()))).unwrap();
    let mut batches = loader.batches(0..60).unwrap();
    while let Some(batch) = batches.next() {
        let batch_bytes = batch.unwrap().tensors[0].1.byte_len() as u64;
        // A quarter of the memory is for batches in the making, the one in hand comes on top.
        assert!(batches.in_flight_max() * batch_bytes <= memory_bytes / 4);
    }
    assert_eq!(batches.stalls().batches, 60);
}
