//! The rules of mixtures, filters and packing said once more as plainly as can be, against the batches of loaders.

use super::*;
use crate::lanes::{Lanes, Share};
use crate::mixture::{Mixture, Weights};

const SEPARATOR: i64 = 0;
const LANES: u64 = 24;

/// What is tried: a recipe over sources with these blocks.
struct Case {
    sources: Vec<Vec<u64>>,
    weights: Vec<Weights>,
    filter: bool,
    length: usize,
    /// Rows kept open; documents are cut where there are none.
    open_rows: usize,
}

impl Case {
    fn dataset(&self) -> Arc<Dataset> {
        let fill = match self.open_rows {
            0 => json!("cut"),
            open_rows => json!({ "whole": { "open_rows": open_rows } }),
        };
        let mut recipe = json!({
            "tensors": [{ "name": "tokens" }],
            "pack": {
                "length": self.length, "fill": fill, "separator": SEPARATOR, "padding": -1,
                "targets": "next", "documents": "of", "positions": "at",
            },
        });
        if self.filter {
            recipe["filter"] = json!([{ "column": "score", "at_least": 3 }]);
        }
        if let Some((first, later)) = self.weights.split_first() {
            let source = |weight: &f64| json!({ "path": "a", "weight": weight });
            recipe["sources"] = first.weights.iter().map(source).collect();
            recipe["weights"] = serde_json::to_value(later).unwrap();
        }
        dataset(&self.sources, recipe)
    }

    /// The samples of a lane, epoch after epoch, each source by itself.
    fn samples(&self, options: &LoaderOptions, lane: u64, count: u64) -> Vec<u64> {
        let key = Key::new(options.seed);
        let mixture =
            (!self.weights.is_empty()).then(|| Mixture::new(&key, self.sources.len(), LANES, &self.weights).unwrap());
        let orders: Vec<Lanes> = (0..)
            .zip(&self.sources)
            .map(|(number, blocks)| {
                let key = if mixture.is_some() { key.child("source").child_index(number) } else { key };
                Lanes::new(&key, blocks, LANES, options.shuffle)
            })
            .collect();
        let mut taken = vec![0; orders.len()];
        let mut samples = Vec::new();
        for index in 0..count {
            let source = mixture.as_ref().map_or(0, |mixture| mixture.at(lane, index).0);
            let first: u64 = self.sources[..source].iter().flatten().sum();
            let (order, before) = (&orders[source], taken[source]);
            let (epoch, place) = (before / order.lane_len(lane), before % order.lane_len(lane));
            samples.push(first + order.epoch(epoch).sample_at(place * LANES + lane));
            taken[source] += 1;
        }
        samples
    }

    /// The first rows of a lane: of each token its document, its place there, and the number of the document in the row.
    fn rows(&self, options: &LoaderOptions, lane: u64, count: usize) -> Vec<Vec<(u64, u64, i64)>> {
        let samples = self.samples(options, lane, 6 * count as u64 * self.length as u64 / 20 + 200);
        let used = samples.into_iter().filter(|s| !self.filter || score_of(*s) >= 3).filter(|s| len_of(*s) > 0);
        let documents = used.map(|s| (0..=len_of(s)).map(|at| (s, at)).collect::<Vec<_>>());
        let mut given: Vec<Vec<Vec<(u64, u64)>>> = Vec::new();
        let mut open: Vec<Vec<Vec<(u64, u64)>>> = Vec::new();
        let len = |row: &Vec<Vec<(u64, u64)>>| row.iter().map(Vec::len).sum::<usize>();
        for mut document in documents {
            if self.open_rows == 0 {
                // Token by token, each document a part of its own in every row.
                let mut is_new = true;
                for token in document {
                    match open.last_mut() {
                        Some(row) if is_new => row.push(vec![token]),
                        Some(row) => row.last_mut().unwrap().push(token),
                        None => open.push(vec![vec![token]]),
                    }
                    is_new = len(&open[0]) == self.length;
                    if is_new {
                        given.push(open.remove(0));
                    }
                }
                continue;
            }
            while document.len() >= self.length {
                let later = document.split_off(self.length);
                given.push(vec![std::mem::replace(&mut document, later)]);
            }
            if document.is_empty() {
                continue;
            }
            let fits = (0..open.len()).filter(|row| len(&open[*row]) + document.len() <= self.length);
            let fullest = |rows: &mut dyn Iterator<Item = usize>, open: &[Vec<Vec<(u64, u64)>>]| {
                rows.reduce(|best, row| if len(&open[row]) > len(&open[best]) { row } else { best })
            };
            match fullest(&mut fits.into_iter(), &open) {
                Some(row) => {
                    open[row].push(document);
                    if len(&open[row]) == self.length {
                        given.push(open.remove(row));
                    }
                }
                None => {
                    open.push(vec![document]);
                    if open.len() > self.open_rows {
                        let row = fullest(&mut (0..open.len()), &open).unwrap();
                        given.push(open.remove(row));
                    }
                }
            }
        }
        assert!(given.len() >= count, "{} of {count} rows", given.len());
        let numbered = |row: Vec<Vec<(u64, u64)>>| {
            let parts = (1..).zip(row);
            parts.flat_map(|(number, part)| part.into_iter().map(move |(s, at)| (s, at, number))).collect()
        };
        given.into_iter().take(count).map(numbered).collect()
    }
}

/// The values of a row's tensors.
fn expected(row: &[(u64, u64, i64)], length: usize) -> [Vec<i64>; 4] {
    let token = |sample: u64, at: u64| match at.cmp(&len_of(sample)) {
        std::cmp::Ordering::Less => Some((1000 * sample + at) as i64),
        std::cmp::Ordering::Equal => Some(SEPARATOR),
        std::cmp::Ordering::Greater => None,
    };
    let padded = |values: Vec<i64>, filler: i64| {
        let room = length - values.len();
        values.into_iter().chain(std::iter::repeat_n(filler, room)).collect()
    };
    [
        padded(row.iter().map(|(s, at, _)| token(*s, *at).unwrap()).collect(), -1),
        padded(row.iter().map(|(s, at, _)| token(*s, at + 1).unwrap_or(-100)).collect(), -100),
        padded(row.iter().map(|(_, _, number)| *number).collect(), 0),
        padded(row.iter().map(|(_, at, _)| *at as i64).collect(), 0),
    ]
}

/// The rows of a step, in their order, made by ranks.
fn made(loaders: &[Loader], step: u64, batch_size: u64) -> Vec<[Vec<i64>; 4]> {
    let ranks = loaders.len();
    let mut rows = vec![Default::default(); batch_size as usize];
    for (rank, loader) in loaders.iter().enumerate() {
        let share = Share::new(LANES, batch_size, rank, &vec![1; ranks]).unwrap();
        let batch = loader.batch(step).unwrap();
        let length = batch.tensors[0].1.shape()[1];
        let values: Vec<Vec<i64>> = batch.tensors.iter().map(|(_, t)| t.to_i64().unwrap()).collect();
        for (own, row) in (0..batch_size).filter(|row| share.has_row(*row)).enumerate() {
            rows[row as usize] = std::array::from_fn(|t| values[t][own * length..][..length].to_vec());
        }
    }
    rows
}

#[test]
fn rows_are_those_of_the_rules_for_any_number_of_ranks_and_after_any_change_of_it() {
    let one = || vec![vec![37; 40]];
    let three = || vec![vec![37; 40], vec![5, 0, 100, 61], vec![250]];
    let weights = || {
        vec![
            Weights { from: 0, weights: vec![0.6, 0.3, 0.1] },
            Weights { from: 500, weights: vec![0.0, 1.0, 1.0] },
            Weights { from: 1501, weights: vec![1.0, 0.0, 2.0] },
        ]
    };
    let case = |length, open_rows| Case { sources: one(), weights: vec![], filter: false, length, open_rows };
    let mixed = |length, open_rows| Case { sources: three(), weights: weights(), filter: true, length, open_rows };
    let cases = [case(64, 0), case(7, 0), case(1, 0), case(64, 1), case(40, 4), case(9, 3), mixed(16, 0), mixed(33, 2)];
    for (number, case) in cases.iter().enumerate() {
        for batch_size in [12u64, 48] {
            let options = options(batch_size as usize, LANES);
            let steps = 60u64;
            let per_lane = (steps * batch_size).div_ceil(LANES) as usize;
            let rows: Vec<_> = (0..LANES).map(|lane| case.rows(&options, lane, per_lane)).collect();
            let dataset = case.dataset();
            let mut loaders = ranks(&dataset, &options, 1);
            for step in 0..steps {
                if step % 7 == 3 {
                    let tokens: Vec<LoaderToken> = loaders.iter().map(|l| l.token(step).unwrap()).collect();
                    let token = LoaderToken::merge(&tokens).unwrap();
                    loaders = ranks(&dataset, &options, [3, 8, 1, 6, 2, 4][step as usize / 7 % 6]);
                    assert!(loaders.iter().all(|l| l.resume(&token).unwrap() == step));
                }
                let positions = step * batch_size..(step + 1) * batch_size;
                let expected: Vec<_> = positions
                    .map(|p| expected(&rows[(p % LANES) as usize][(p / LANES) as usize], case.length))
                    .collect();
                let made = made(&loaders, step, batch_size);
                assert!(made == expected, "case {number}, batches of {batch_size}, step {step}: {made:?}");
            }
        }
    }
}
