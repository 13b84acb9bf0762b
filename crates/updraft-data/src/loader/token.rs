//! The state of a loader, as a checkpoint keeps it: where it stands, and what must not change for that to mean anything.

use std::collections::BTreeMap;
use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use updraft_base::Digest;

use super::{Loader, Tail};
use crate::error::DataError;
use crate::mixture::Weights;
use crate::order::Shuffle;
use crate::packing::LaneState;

/// Where a loader stands. Paths are no part of it, content is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderToken {
    format: u64,
    dataset: Digest,
    pipeline: Digest,
    samples: u64,
    batch_size: usize,
    seed: u64,
    shuffle: Shuffle,
    tail: Tail,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lanes: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    weights: Vec<Weights>,
    /// Where lanes stand whose samples are filtered or packed; with several ranks those of one rank, until they are
    /// [merged](LoaderToken::merge).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    carried: BTreeMap<u64, LaneState>,
    /// The first step whose batch has not been used.
    pub next_step: u64,
}

const TOKEN_FORMAT: u64 = 1;

/// A difference that a resumption may be told to accept. The order goes on from the token's step, and whoever accepts
/// knows that samples before it may come again or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Drift {
    /// Other content, or another number of samples.
    Dataset,
    /// Other transforms, filters or packing.
    Pipeline,
    /// Other weights of a mixture before the token's step. Weights that change after it are no difference.
    Weights,
    /// Another end of epochs.
    Tail,
}

impl LoaderToken {
    /// One token of those that the ranks of a step took, to resume from with any number of ranks.
    ///
    /// # Errors
    /// Tokens that differ in more than the lanes they tell of, or a lane that two of them tell of.
    pub fn merge(tokens: &[LoaderToken]) -> Result<LoaderToken, DataError> {
        let Some((first, others)) = tokens.split_first() else {
            return Err(DataError::Loader("there are no tokens to merge".into()));
        };
        let mut merged = first.clone();
        for token in others {
            same("the next step", &first.next_step, &token.next_step)?;
            token.check(first, &[])?;
            for (lane, state) in &token.carried {
                if merged.carried.insert(*lane, state.clone()).is_some() {
                    return Err(DataError::Loader(format!("two ranks tell of lane {lane}")));
                }
            }
        }
        Ok(merged)
    }

    /// Whether this token belongs to a loader whose token at the same step is `now`.
    fn check(&self, now: &LoaderToken, accept: &[Drift]) -> Result<(), DataError> {
        let strict = |drift: Drift| !accept.contains(&drift);
        same("the format of the loader's state", &self.format, &now.format)?;
        if strict(Drift::Dataset) {
            same("the dataset", &self.dataset, &now.dataset)?;
        }
        if strict(Drift::Pipeline) {
            same("the transforms", &self.pipeline, &now.pipeline)?;
        }
        if strict(Drift::Dataset) {
            same("the number of samples", &self.samples, &now.samples)?;
        }
        same("the batch size", &self.batch_size, &now.batch_size)?;
        same("the seed", &self.seed, &now.seed)?;
        same("the shuffle", &self.shuffle, &now.shuffle)?;
        if strict(Drift::Tail) {
            same("the tail", &self.tail, &now.tail)?;
        }
        same("the number of lanes", &self.lanes, &now.lanes)?;
        if strict(Drift::Weights) {
            let end = self.next_step.saturating_mul(self.batch_size as u64);
            let past = |weights: &[Weights]| -> Vec<Weights> {
                weights.iter().filter(|w| w.from < end.max(1)).cloned().collect()
            };
            same("the weights of the mixture", &past(&self.weights), &past(&now.weights))?;
        }
        Ok(())
    }
}

fn same<T: PartialEq + Debug>(field: &'static str, then: &T, now: &T) -> Result<(), DataError> {
    if then == now {
        return Ok(());
    }
    Err(DataError::Token { field, expected: format!("{then:?}"), found: format!("{now:?}") })
}

impl Loader {
    /// The state to keep when the batches before `next_step` have been used.
    ///
    /// # Errors
    /// Only where samples are filtered or packed, and those before the step must be read again to know.
    pub fn token(&self, next_step: u64) -> Result<LoaderToken, DataError> {
        let carried = self.shared.planner.states(&self.shared.dataset, next_step)?;
        Ok(LoaderToken { carried, ..self.place(next_step) })
    }

    /// The step to go on from.
    ///
    /// # Errors
    /// Where the token belongs to another dataset or order; the first field that differs is named.
    pub fn resume(&self, token: &LoaderToken) -> Result<u64, DataError> {
        self.resume_accepting(token, &[])
    }

    /// The step to go on from, whatever else has changed of what is listed.
    pub fn resume_accepting(&self, token: &LoaderToken, accept: &[Drift]) -> Result<u64, DataError> {
        token.check(&self.place(token.next_step), accept)?;
        let super::Shared { dataset, options, planner, .. } = &*self.shared;
        if token.next_step.checked_mul(options.batch_size as u64).is_none() {
            let (expected, found) = (token.next_step.to_string(), "below 2^64 samples".into());
            return Err(DataError::Token { field: "the next step", expected, found });
        }
        planner.restore(dataset, token.next_step, &token.carried).map_err(|[expected, found]| DataError::Token {
            field: "what is carried",
            expected,
            found,
        })?;
        Ok(token.next_step)
    }

    /// The order and a step in it: a token without what lanes carry, to name batches by.
    pub fn place(&self, next_step: u64) -> LoaderToken {
        let super::Shared { dataset, options, .. } = &*self.shared;
        LoaderToken {
            format: TOKEN_FORMAT,
            dataset: dataset
                .digest_until(next_step.saturating_mul(options.batch_size as u64))
                .unwrap_or(dataset.facts().digest),
            pipeline: dataset.facts().pipeline,
            samples: dataset.len(),
            batch_size: options.batch_size,
            seed: options.seed,
            shuffle: options.shuffle,
            tail: options.tail,
            lanes: options.lanes.or(dataset.lanes()),
            weights: dataset.weights().to_vec(),
            carried: BTreeMap::new(),
            next_step,
        }
    }
}
