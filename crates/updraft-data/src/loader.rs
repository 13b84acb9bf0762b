//! Batches in order, made ahead of need.
//!
//! Batch `t` is a function of the dataset, the options and `t`: threads only decide who makes it. So the number of the
//! next step is all that a checkpoint must keep, and resuming costs nothing; where samples are filtered or packed, it
//! keeps where each lane stands, too.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use updraft_base::Clock;
use updraft_graph::Tensor;

use crate::dataset::Dataset;
use crate::error::DataError;
use crate::order::Shuffle;
use crate::packing::Piece;
use crate::stall::Stopwatch;
use plan::{BatchPlan, Planner, RowPlan};
use queue::Made;

pub use queue::Batches;
pub use token::{Drift, LoaderToken};

mod plan;
mod queue;
mod stream;
mod token;

/// How samples become batches.
#[derive(Debug, Clone, PartialEq)]
pub struct LoaderOptions {
    /// Samples of a batch.
    pub batch_size: usize,
    /// What shuffling and random transforms are drawn from.
    pub seed: u64,
    /// How far samples are mixed.
    pub shuffle: Shuffle,
    /// What the last batch of an epoch is.
    pub tail: Tail,
    /// Processors to make batches with ahead of need; with 0, each is made when asked for. Where batches wait for disk or
    /// network, more threads than these are started.
    pub threads: usize,
    /// The most memory that batches ahead of need may take, within a quarter of the dataset's `memory_bytes`. One is
    /// always made.
    pub queue_bytes: u64,
    /// Lanes that an epoch is cut into; without, those of the dataset's configuration.
    pub lanes: Option<u64>,
    /// Which of the ranks this is, from 0.
    pub rank: usize,
    /// Processes that share every batch; more than one needs lanes.
    pub ranks: usize,
    /// How fast each rank is, in relation to the others; empty where they are alike.
    pub speeds: Vec<u64>,
}

impl Default for LoaderOptions {
    /// Every sample once, in the order of the source, in batches of 64: what evaluation wants.
    fn default() -> LoaderOptions {
        LoaderOptions {
            batch_size: 64,
            seed: 0,
            shuffle: Shuffle::None,
            tail: Tail::Pad,
            threads: 2,
            queue_bytes: 256 << 20,
            lanes: None,
            rank: 0,
            ranks: 1,
            speeds: Vec::new(),
        }
    }
}

/// What becomes of the samples that do not fill the last batch of an epoch. Batches always have `batch_size` rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tail {
    /// They are left out; with shuffling, others in every epoch.
    Drop,
    /// The last sample is repeated, or rows without a token added; [`Batch::samples`] lists only the true ones.
    Pad,
    /// The first samples of the epoch fill the batch. In mixtures, and where samples are filtered or packed, each lane
    /// goes on into its next epoch.
    Wrap,
}

/// Some samples, as tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Its number since the start of training: epoch × steps of an epoch + step in the epoch.
    pub step: u64,
    /// The epoch it belongs to, from 0.
    pub epoch: u64,
    /// The named tensors, in the order of the configuration, samples along the first dimension.
    pub tensors: Vec<(String, Tensor)>,
    /// The numbers of the samples, of packed rows that of the first. Rows past them are padding and count for nothing.
    pub samples: Vec<u64>,
}

/// Far beyond what anybody trains with; a bound for what is counted row by row.
const BATCH_SIZE_MAX: usize = 1 << 26;

/// Makes the batches of a dataset. Clones share it.
#[derive(Clone)]
pub struct Loader {
    shared: Arc<Shared>,
}

struct Shared {
    dataset: Arc<Dataset>,
    options: LoaderOptions,
    planner: Planner,
    clock: Option<Arc<dyn Clock>>,
    /// The step from which on nobody asks for batches.
    end_step: AtomicU64,
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loader").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

impl Loader {
    /// # Errors
    /// A batch of no samples, an epoch of no batches, lanes or ranks that do not fit the batch, or an order that does not
    /// fit in memory.
    pub fn new(dataset: Arc<Dataset>, options: LoaderOptions) -> Result<Loader, DataError> {
        Loader::timed(dataset, options, None)
    }

    /// A loader that measures what its consumers wait for.
    pub fn timed(
        dataset: Arc<Dataset>,
        options: LoaderOptions,
        clock: Option<Arc<dyn Clock>>,
    ) -> Result<Loader, DataError> {
        if !(1..=BATCH_SIZE_MAX).contains(&options.batch_size) {
            let reason =
                format!("a batch of {} samples; it has at least one and at most {BATCH_SIZE_MAX}", options.batch_size);
            return Err(DataError::Loader(reason));
        }
        let planner = Planner::new(&dataset, &options)?;
        let end_step = AtomicU64::new(u64::MAX);
        Ok(Loader { shared: Arc::new(Shared { dataset, options, planner, clock, end_step }) })
    }

    /// The dataset.
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.shared.dataset
    }

    /// Rows of a batch; with several ranks, of this rank's part.
    pub fn batch_size(&self) -> usize {
        self.shared.planner.rank_rows()
    }

    /// The number of batches of one epoch, the same on every rank. Where there is no common end of epochs
    /// ([`has_epochs`](Loader::has_epochs)), as many as would take every sample once.
    pub fn steps_per_epoch(&self) -> u64 {
        self.shared.planner.steps_per_epoch()
    }

    /// Whether all lanes end their epochs together, so that so many steps see every sample once. Not so in mixtures, in
    /// datasets that are followed, nor where samples are filtered or packed and lanes go on into their next epochs.
    pub fn has_epochs(&self) -> bool {
        self.shared.planner.has_epochs()
    }

    /// The batch of one step, made now.
    pub fn batch(&self, step: u64) -> Result<Batch, DataError> {
        Ok(self.make(step, &|| false)?.batch)
    }

    /// What the rows of one step are made of: samples, or pieces of them where rows are packed. Padding is left out.
    pub fn pieces(&self, step: u64) -> Result<Vec<Vec<Piece>>, DataError> {
        let plan = self.shared.planner.batch(&self.shared.dataset, step, &mut Stopwatch::start(None), &|| false)?;
        Ok(match plan.rows {
            RowPlan::Packed(rows) => rows.into_iter().filter(|row| !row.is_empty()).collect(),
            RowPlan::Samples(_) => {
                plan.samples.iter().map(|sample| vec![Piece { sample: *sample, offset: 0, len: 1 }]).collect()
            }
        })
    }

    /// The step whose batch has a sample in an epoch: from a sample to when it is learnt from. `None` where the tail leaves
    /// it out, and where nobody knows without reading what comes before (mixtures, filters, packing).
    pub fn step_of(&self, epoch: u64, sample: u64) -> Option<u64> {
        self.shared.planner.step_of(epoch, sample)
    }

    /// The batches of a range of steps, in order, made ahead by the options' threads. Evaluation takes
    /// `0..steps_per_epoch()`, training from the committed step to the last.
    pub fn batches(&self, steps: Range<u64>) -> Result<Batches, DataError> {
        Batches::start(self, steps)
    }

    /// Says that no batch from `step` on will be asked for. In the last epoch before it, no decoded picture is kept for the
    /// next epoch.
    pub fn ends_before(&self, step: u64) {
        self.shared.end_step.store(step, Ordering::Relaxed);
    }

    fn options(&self) -> &LoaderOptions {
        &self.shared.options
    }

    fn clock(&self) -> Option<&Arc<dyn Clock>> {
        self.shared.clock.as_ref()
    }

    /// The batch of a step was taken, of batches that begin at `first`.
    fn took(&self, first: u64, step: u64) {
        let Shared { dataset, planner, .. } = &*self.shared;
        planner.forget_before(step);
        dataset.advance(step);
        // One epoch ahead, so that at every moment the next use of every block is known.
        if step.is_multiple_of(self.steps_per_epoch()) && step > first {
            self.foresee(step / self.steps_per_epoch() + 1);
        }
    }

    /// Batches begin at a step.
    fn begin(&self, step: u64) {
        self.shared.dataset.advance(step);
        let epoch = step / self.steps_per_epoch();
        (epoch..epoch + 2).for_each(|epoch| self.foresee(epoch));
    }

    /// Tells the source what an epoch needs; worked out only where it listens.
    fn foresee(&self, epoch: u64) {
        let Shared { dataset, planner, .. } = &*self.shared;
        dataset.foresee(&mut std::iter::once_with(|| planner.uses(dataset, epoch)).flatten());
    }

    /// The batch of a step; where its samples are not there yet, they are waited for unless it `is_stopped`.
    fn make(&self, step: u64, is_stopped: &dyn Fn() -> bool) -> Result<Made, DataError> {
        let Shared { dataset, planner, clock, end_step, .. } = &*self.shared;
        let mut watch = Stopwatch::start(clock.as_deref());
        let BatchPlan { epoch, key, numbers, samples, rows } = planner.batch(dataset, step, &mut watch, is_stopped)?;
        watch.lap(crate::stall::Stage::Fetch);
        let tensors = match (&rows, dataset.pack()) {
            (RowPlan::Packed(rows), Some(pack)) => dataset.packed(pack, rows, &mut watch)?,
            (RowPlan::Samples(rows), _) => {
                let comes_again = planner.repeats()
                    && (epoch + 1).saturating_mul(self.steps_per_epoch()) < end_step.load(Ordering::Relaxed);
                dataset.tensors_of(rows, &numbers, &key, comes_again, &mut watch)?
            }
            (RowPlan::Packed(_), None) => unreachable!("rows are packed where the dataset says how"),
        };
        let bytes = watch.fetched_bytes + tensors.iter().map(|(_, t)| t.byte_len() as u64).sum::<u64>();
        Ok(Made { batch: Batch { step, epoch, tensors, samples }, times: watch.times, bytes })
    }

    fn batch_bytes(&self) -> u64 {
        let tensors = &self.shared.dataset.facts().tensors;
        let row: u64 =
            tensors.iter().map(|t| (t.shape.iter().product::<usize>() * t.dtype.size_in_memory()) as u64).sum();
        row * self.batch_size() as u64 + self.shared.dataset.fetched_bytes(self.batch_size())
    }
}

#[cfg(test)]
mod tests;
