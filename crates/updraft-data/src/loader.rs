//! Batches in order, made ahead of need.
//!
//! Batch `t` is a function of the dataset, the options and `t`: threads only decide who makes it. So the number of the
//! next step is all that a checkpoint must keep, and resuming costs nothing.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use updraft_base::{Digest, Key};
use updraft_graph::Tensor;

use crate::dataset::Dataset;
use crate::error::DataError;
use crate::order::{EpochOrder, Order, Shuffle};

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
    /// Threads that make batches ahead of need; with 0, each is made when asked for.
    pub threads: usize,
    /// The most memory that batches ahead of need may take. One is always made.
    pub queue_bytes: u64,
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
        }
    }
}

/// What becomes of the samples that do not fill the last batch of an epoch. Batches always have `batch_size` rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tail {
    /// They are left out; with shuffling, others in every epoch.
    Drop,
    /// The last sample is repeated; [`Batch::samples`] lists only the true ones.
    Pad,
    /// The first samples of the epoch fill the batch.
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
    /// The numbers of the samples. Rows past them are padding and count for nothing.
    pub samples: Vec<u64>,
}

/// The state of a loader, as a checkpoint keeps it: where it stands, and what must not change for that to mean anything.
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
    /// The first step whose batch has not been used.
    pub next_step: u64,
}

const TOKEN_FORMAT: u64 = 1;

/// Makes the batches of a dataset. Clones share it.
#[derive(Clone)]
pub struct Loader {
    shared: Arc<Shared>,
}

struct Shared {
    dataset: Arc<Dataset>,
    options: LoaderOptions,
    order: Order,
    augment: Key,
    /// The order of the epoch asked for last.
    epoch: Mutex<Option<(u64, Arc<EpochOrder>)>>,
}

impl Loader {
    /// # Errors
    /// A batch of no samples, an epoch of no batches, or an order that does not fit in memory.
    pub fn new(dataset: Arc<Dataset>, options: LoaderOptions) -> Result<Loader, DataError> {
        if options.batch_size == 0 {
            return Err(DataError::Loader("a batch needs at least one sample".into()));
        }
        if options.tail == Tail::Drop && dataset.len() < options.batch_size as u64 {
            let (samples, size) = (dataset.len(), options.batch_size);
            let reason =
                format!("{samples} samples do not fill a batch of {size}, and `tail = \"drop\"` leaves them out");
            return Err(DataError::Loader(reason));
        }
        dataset.check_shuffle(options.shuffle)?;
        let order = Order::new(options.seed, dataset.block_samples(), options.shuffle);
        let augment = Key::new(options.seed).child("augment");
        Ok(Loader { shared: Arc::new(Shared { dataset, options, order, augment, epoch: Mutex::new(None) }) })
    }

    /// The dataset.
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.shared.dataset
    }

    /// Rows of a batch.
    pub fn batch_size(&self) -> usize {
        self.shared.options.batch_size
    }

    /// The number of batches of one epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        let size = self.shared.options.batch_size as u64;
        match self.shared.options.tail {
            Tail::Drop => self.shared.order.len() / size,
            Tail::Pad | Tail::Wrap => self.shared.order.len().div_ceil(size),
        }
    }

    /// The batch of one step, made now.
    pub fn batch(&self, step: u64) -> Result<Batch, DataError> {
        let Shared { dataset, options, order, augment, .. } = &*self.shared;
        let (epoch, step_of_epoch) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let epoch_order = self.shared.epoch_order(epoch);
        let size = options.batch_size as u64;
        let first = step_of_epoch * size;
        let mut samples: Vec<u64> =
            (first..(first + size).min(order.len())).map(|p| epoch_order.sample_at(p)).collect();
        let mut rows = samples.clone();
        let missing = options.batch_size - samples.len();
        match options.tail {
            Tail::Drop => {}
            Tail::Pad => rows.extend(std::iter::repeat_n(samples[samples.len() - 1], missing)),
            Tail::Wrap => {
                samples.extend((0..missing as u64).map(|p| epoch_order.sample_at(p % order.len())));
                rows = samples.clone();
            }
        }
        let tensors = dataset.tensors_of(&rows, &augment.child_index(epoch))?;
        Ok(Batch { step, epoch, tensors, samples })
    }

    /// The batches of a range of steps, in order, made ahead by the options' threads. Evaluation takes
    /// `0..steps_per_epoch()`, training from the committed step to the last.
    pub fn batches(&self, steps: Range<u64>) -> Result<Batches, DataError> {
        let options = &self.shared.options;
        let batch_bytes: u64 = options.batch_size as u64 * self.sample_bytes();
        // Each thread makes one batch while one waits for the consumer. More would not raise the rate, which is that of
        // the slower side; it would only even out longer waits, for more memory.
        let most = 2 * options.threads as u64;
        let capacity = (options.queue_bytes / batch_bytes.max(1)).clamp(1, most.max(1));
        let queue = Arc::new(Queue {
            state: Mutex::new(QueueState {
                next_made: steps.start,
                next_taken: steps.start,
                ready: BTreeMap::new(),
                stop: false,
            }),
            changed: Condvar::new(),
            end: steps.end,
            capacity,
        });
        let mut batches = Batches { loader: self.clone(), queue: queue.clone(), threads: Vec::new() };
        for index in 0..options.threads {
            let (loader, queue) = (self.clone(), queue.clone());
            let thread = std::thread::Builder::new()
                .name(format!("loader-{index}"))
                .spawn(move || queue.make(&loader))
                .map_err(|e| DataError::Loader(format!("cannot start a thread: {e}")))?;
            batches.threads.push(thread);
        }
        Ok(batches)
    }

    /// The state to keep when the batches before `next_step` have been used.
    pub fn token(&self, next_step: u64) -> LoaderToken {
        let Shared { dataset, options, .. } = &*self.shared;
        LoaderToken {
            format: TOKEN_FORMAT,
            dataset: dataset.facts().digest,
            pipeline: dataset.facts().pipeline,
            samples: dataset.len(),
            batch_size: options.batch_size,
            seed: options.seed,
            shuffle: options.shuffle,
            tail: options.tail,
            next_step,
        }
    }

    /// The step to go on from.
    ///
    /// # Errors
    /// Where the token belongs to another dataset or order; the first field that differs is named.
    pub fn resume(&self, token: &LoaderToken) -> Result<u64, DataError> {
        fn same<T: PartialEq + std::fmt::Debug>(field: &'static str, then: &T, now: &T) -> Result<(), DataError> {
            if then == now {
                return Ok(());
            }
            Err(DataError::Token { field, expected: format!("{then:?}"), found: format!("{now:?}") })
        }
        let now = self.token(token.next_step);
        same("the format of the loader's state", &token.format, &now.format)?;
        same("the dataset", &token.dataset, &now.dataset)?;
        same("the transforms", &token.pipeline, &now.pipeline)?;
        same("the number of samples", &token.samples, &now.samples)?;
        same("the batch size", &token.batch_size, &now.batch_size)?;
        same("the seed", &token.seed, &now.seed)?;
        same("the shuffle", &token.shuffle, &now.shuffle)?;
        same("the tail", &token.tail, &now.tail)?;
        Ok(token.next_step)
    }

    fn sample_bytes(&self) -> u64 {
        let tensors = &self.shared.dataset.facts().tensors;
        tensors.iter().map(|t| (t.shape.iter().product::<usize>() * t.dtype.size_in_memory()) as u64).sum()
    }
}

impl Shared {
    fn epoch_order(&self, epoch: u64) -> Arc<EpochOrder> {
        let mut last = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((e, order)) if *e == epoch => order.clone(),
            _ => last.insert((epoch, Arc::new(self.order.epoch(epoch)))).1.clone(),
        }
    }
}

/// An iterator over batches. Dropping it stops its threads and waits for them. It ends after the first error.
pub struct Batches {
    loader: Loader,
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

type Made = Result<Result<Batch, DataError>, Box<dyn Any + Send>>;

struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
    end: u64,
    /// The most batches in the making and ready.
    capacity: u64,
}

struct QueueState {
    next_made: u64,
    next_taken: u64,
    /// Batches not yet taken, which threads may finish out of order.
    ready: BTreeMap<u64, Made>,
    stop: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, QueueState>) -> MutexGuard<'a, QueueState> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread does: claims the next step while there is room, makes its batch, and puts it in its place.
    fn make(&self, loader: &Loader) {
        let mut state = self.lock();
        while !state.stop && state.next_made < self.end {
            if state.next_made >= state.next_taken + self.capacity {
                state = self.wait(state);
                continue;
            }
            let step = state.next_made;
            state.next_made += 1;
            drop(state);
            let made = catch_unwind(AssertUnwindSafe(|| loader.batch(step)));
            state = self.lock();
            state.ready.insert(step, made);
            self.changed.notify_all();
        }
    }
}

impl Iterator for Batches {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut state = self.queue.lock();
        let step = state.next_taken;
        if state.stop || step >= self.queue.end {
            return None;
        }
        let made = if self.threads.is_empty() {
            state.next_taken += 1;
            drop(state);
            Ok(self.loader.batch(step))
        } else {
            loop {
                if let Some(made) = state.ready.remove(&step) {
                    state.next_taken += 1;
                    self.queue.changed.notify_all();
                    break made;
                }
                state = self.queue.wait(state);
            }
        };
        match made {
            Ok(Ok(batch)) => Some(Ok(batch)),
            Ok(Err(error)) => {
                self.stop();
                Some(Err(error))
            }
            Err(panic) => resume_unwind(panic),
        }
    }
}

impl Batches {
    fn stop(&self) {
        self.queue.lock().stop = true;
        self.queue.changed.notify_all();
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            // A panic while making a batch was caught and handed over; there is nothing else to learn.
            thread.join().ok();
        }
    }
}
