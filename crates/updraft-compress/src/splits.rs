//! Three disjoint parts of a recipe's data: what ranges are calibrated on, what candidates are compared by, and what the
//! answer is judged by.
//!
//! A search that picks the best of many on one set has fitted that set, so its figures there flatter it; the holdout is
//! looked at only when the front is known. Samples are taken in a shuffled order that the seed decides, so any first part
//! of a split is a fair sample of it even where a file is sorted by class.

use std::ops::Range;
use std::sync::Arc;

use updraft_base::Key;
use updraft_data::{Batch, DataError, Dataset, Loader, LoaderOptions, Shuffle, Tail};

use crate::error::CompressError;
use crate::interval::{Looks, samples_needed};

/// The datasets of a recipe.
pub struct Datasets {
    /// What is learnt from.
    pub train: Arc<Dataset>,
    /// What training is watched by.
    pub validation: Option<Arc<Dataset>>,
    /// What the final model is judged by.
    pub test: Option<Arc<Dataset>>,
}

/// How the data is divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitOptions {
    /// What orders are drawn from.
    pub seed: u64,
    /// Samples of a batch.
    pub batch_size: usize,
    /// Threads that make batches.
    pub threads: usize,
    /// Samples that ranges are calibrated on.
    pub calibration_samples: u64,
    /// The share of right answers that may be lost, where the metric is one: what the splits must be able to show.
    pub share_limit: Option<f64>,
    /// The chance of a wrong answer.
    pub alpha: f64,
}

/// The splits.
pub struct Splits {
    /// From the training data.
    pub calibration: Split,
    /// From the validation data, or half of the test data where there is none.
    pub search: Split,
    /// From the test data, or half of the validation data where there is none.
    pub holdout: Split,
}

/// The splits that candidates are judged on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// What candidates are compared by.
    Search,
    /// What the answer is judged by.
    Holdout,
}

/// Some samples of a dataset in a shuffled order.
#[derive(Clone)]
pub struct Split {
    loader: Loader,
    steps: Range<u64>,
    samples: u64,
}

impl Splits {
    /// Divides the data.
    ///
    /// # Errors
    /// No data beside the training data, or too few samples to show what is asked.
    pub fn new(data: &Datasets, options: &SplitOptions) -> Result<Splits, CompressError> {
        let whole = |dataset: &Arc<Dataset>, part: &str| Split::new(dataset, part, options);
        let calibration = whole(&data.train, "calibration")?.first(options.calibration_samples);
        let (search, holdout) = match (&data.validation, &data.test) {
            (Some(validation), Some(test)) => (whole(validation, "search")?, whole(test, "holdout")?),
            (Some(only), None) | (None, Some(only)) => whole(only, "search and holdout")?.halves(),
            (None, None) => return Err(CompressError::NoSearchData),
        };
        for (name, split) in [("search", &search), ("holdout", &holdout)] {
            let needed = match options.share_limit {
                Some(limit) => samples_needed(limit, looks(split.samples, options.alpha).last_alpha()),
                // A t-interval needs at least some tens of values to mean what it says.
                None => Some(30),
            };
            if let Some(needed) = needed.filter(|n| split.samples < *n) {
                let found = split.samples;
                return Err(CompressError::TooFewSamples { split: name, found, needed, limit: options.share_limit });
            }
        }
        Ok(Splits { calibration, search, holdout })
    }

    /// One of the splits that candidates are judged on.
    pub fn part(&self, part: Part) -> &Split {
        match part {
            Part::Search => &self.search,
            Part::Holdout => &self.holdout,
        }
    }
}

/// When a split of so many samples is looked at.
pub fn looks(samples: u64, alpha: f64) -> Looks {
    // The first look can tell a ruined model from a good one, at an eighth of what MNIST's 2,000 samples cost.
    Looks::new(256, samples, alpha)
}

impl Split {
    fn new(dataset: &Arc<Dataset>, part: &str, options: &SplitOptions) -> Result<Split, CompressError> {
        // Small datasets are not padded to many times their size.
        let batch_size = options.batch_size.min(usize::try_from(dataset.len()).unwrap_or(usize::MAX));
        let loader = Loader::new(
            dataset.clone(),
            LoaderOptions {
                batch_size,
                seed: Key::new(options.seed).child("splits").child(part).to_u64(),
                shuffle: Shuffle::Global,
                tail: Tail::Pad,
                threads: options.threads,
                ..LoaderOptions::default()
            },
        )?;
        let (steps, samples) = (0..loader.steps_per_epoch(), dataset.len());
        Ok(Split { loader, steps, samples })
    }

    /// The first samples, at least so many where there are so many.
    pub fn first(&self, samples: u64) -> Split {
        let steps = samples.div_ceil(self.batch_size()).clamp(1, self.steps.end - self.steps.start);
        let steps = self.steps.start..self.steps.start + steps;
        Split { loader: self.loader.clone(), samples: self.count(&steps), steps }
    }

    fn halves(&self) -> (Split, Split) {
        let middle = self.steps.start + (self.steps.end - self.steps.start) / 2;
        let part = |steps: Range<u64>| Split { loader: self.loader.clone(), samples: self.count(&steps), steps };
        (part(self.steps.start..middle), part(middle..self.steps.end))
    }

    /// Samples of some steps; only the last batch of the dataset is not full.
    fn count(&self, steps: &Range<u64>) -> u64 {
        let size = self.batch_size();
        (steps.end * size).min(self.loader.dataset().len()).saturating_sub(steps.start * size)
    }

    /// The number of samples.
    pub fn len(&self) -> u64 {
        self.samples
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.samples == 0
    }

    /// Samples of a batch.
    pub fn batch_size(&self) -> u64 {
        self.loader.batch_size() as u64
    }

    /// The dataset behind it.
    pub fn dataset(&self) -> &Arc<Dataset> {
        self.loader.dataset()
    }

    /// The batches from number `first` of this split on, in order.
    pub fn batches(&self, first: u64) -> Result<impl Iterator<Item = Result<Batch, DataError>> + use<>, DataError> {
        self.loader.batches((self.steps.start + first).min(self.steps.end)..self.steps.end)
    }

    /// What determines the samples and their order, for those who keep what they measured.
    pub fn key(&self) -> serde_json::Value {
        serde_json::json!({ "loader": self.loader.place(self.steps.start), "end": self.steps.end })
    }
}
