//! Batches made ahead of need, by as many threads as it takes.
//!
//! # Design
//!
//! A thread makes a whole batch, from reading to collating, so threads move between stages by themselves and none starves;
//! what is tuned is how many batches are in the making. Each time the consumer had to wait, one more is allowed, and each
//! time it found half of them ready for a while, a quarter fewer: additive increase and multiplicative decrease, as with
//! windows of TCP (Chiu and Jain 1989). Batches that wait for disk or network take no processor, so fetching may be in
//! flight as often as memory allows; beyond the processors, batches that wait for decoding or transforms gain nothing,
//! and no more are allowed. The bytes in flight, encoded and collated, stay below the bound that was given, except that
//! one batch is always made.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{Batch, Loader};
use crate::error::DataError;
use crate::stall::{Stage, StageTimes, Stalls};

/// An iterator over batches. Dropping it stops its threads and waits for them. It ends after the first error.
pub struct Batches {
    loader: Loader,
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
    tuner: Tuner,
    stalls: Stalls,
    last_wait: StageTimes,
    /// Batches taken one after the other without waiting.
    unwaited: u64,
    first_step: u64,
}

/// A batch and what making it took.
pub(super) struct Made {
    pub batch: Batch,
    pub times: StageTimes,
    /// Bytes that were read and made.
    pub bytes: u64,
}

type Outcome = Result<Result<Made, DataError>, Box<dyn Any + Send>>;

struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    end: u64,
}

struct State {
    next_made: u64,
    next_taken: u64,
    /// Batches not yet taken, which threads may finish out of order.
    ready: BTreeMap<u64, Outcome>,
    /// The most batches in the making and ready.
    capacity: u64,
    stop: bool,
}

/// Decides how many batches are in the making.
#[derive(Debug, Clone)]
struct Tuner {
    /// What the loader was asked to begin with, and goes back to.
    least: u64,
    /// Beyond these, only fetching gains from more.
    processors: u64,
    queue_bytes: u64,
    batch_bytes: u64,
    allowed: u64,
}

/// The most threads of a loader: for a store 100 ms away, 64 batches in flight are 640 a second.
const THREADS_MAX: u64 = 64;

/// Batches in a row that must be found ready before fewer are kept.
const UNWAITED_BEFORE_LESS: u64 = 16;

impl Tuner {
    /// The batches that may be in the making and ready.
    fn capacity(&self) -> u64 {
        self.allowed.min(self.most())
    }

    fn most(&self) -> u64 {
        (self.queue_bytes / self.batch_bytes.max(1)).clamp(1, 2 * THREADS_MAX)
    }

    fn saw_batch_of(&mut self, bytes: u64) {
        self.batch_bytes = self.batch_bytes.max(bytes);
    }

    /// The consumer waited, most of all for `stage`.
    fn waited_for(&mut self, stage: Stage) {
        if stage == Stage::Fetch || self.allowed < 2 * self.processors {
            self.allowed = (self.capacity() + 1).max(self.least);
        }
    }

    /// The consumer found batches ready for a long time.
    fn was_ahead(&mut self) {
        self.allowed = (self.capacity() * 3 / 4).max(self.least);
    }
}

impl Batches {
    pub(super) fn start(loader: &Loader, steps: std::ops::Range<u64>) -> Result<Batches, DataError> {
        let options = loader.options();
        loader.begin(steps.start);
        // Each thread makes one batch while one waits for the consumer.
        let least = (2 * options.threads as u64).max(1);
        let tuner = Tuner {
            least,
            processors: options.threads as u64,
            queue_bytes: options.queue_bytes.min(loader.dataset().queue_bytes().max(1)),
            batch_bytes: loader.batch_bytes(),
            allowed: least,
        };
        let state = State {
            next_made: steps.start,
            next_taken: steps.start,
            ready: BTreeMap::new(),
            capacity: tuner.capacity(),
            stop: false,
        };
        let queue = Arc::new(Queue { state: Mutex::new(state), changed: Condvar::new(), end: steps.end });
        let mut batches = Batches {
            loader: loader.clone(),
            queue,
            threads: Vec::new(),
            tuner,
            stalls: Stalls::default(),
            last_wait: StageTimes::default(),
            unwaited: 0,
            first_step: steps.start,
        };
        for _ in 0..options.threads {
            batches.add_thread()?;
        }
        Ok(batches)
    }

    /// What was waited for so far.
    pub fn stalls(&self) -> &Stalls {
        &self.stalls
    }

    /// What was waited for at the batch taken last.
    pub fn last_wait(&self) -> StageTimes {
        self.last_wait
    }

    /// Batches that may be in the making and ready, as tuned so far.
    pub fn in_flight_max(&self) -> u64 {
        self.tuner.capacity()
    }

    /// Gives a batch back when it is used, so that the next ones need no memory of the system: for large batches of
    /// pictures, asking for memory takes as long as filling it. What else shares its tensors keeps them as they are.
    pub fn recycle(&self, batch: Batch) {
        self.loader.dataset().reuse(batch.tensors);
    }

    fn add_thread(&mut self) -> Result<(), DataError> {
        let (loader, queue) = (self.loader.clone(), self.queue.clone());
        let thread = std::thread::Builder::new()
            .name(format!("loader-{}", self.threads.len()))
            .spawn(move || queue.make(&loader))
            .map_err(|e| DataError::Loader(format!("cannot start a thread: {e}")))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Takes note of how a batch was come by, and allows more or fewer in the making.
    fn tune(&mut self, made: &Made, wait_ns: u64, waited: bool, ready: u64) {
        self.last_wait = self.stalls.take(wait_ns, &made.times);
        self.tuner.saw_batch_of(made.bytes);
        if waited {
            self.unwaited = 0;
            self.tuner.waited_for(made.times.longest().unwrap_or(Stage::Fetch));
        } else if ready * 2 >= self.tuner.capacity() {
            self.unwaited += 1;
            if self.unwaited == UNWAITED_BEFORE_LESS {
                self.unwaited = 0;
                self.tuner.was_ahead();
            }
        }
        let capacity = self.tuner.capacity();
        self.queue.lock().capacity = capacity;
        // A ready batch needs no thread, so half of those allowed are enough.
        if (self.threads.len() as u64) < capacity.div_ceil(2).min(THREADS_MAX) {
            // One thread fewer is slower and no failure.
            self.add_thread().ok();
        }
    }

    fn stop(&self) {
        self.queue.lock().stop = true;
        self.queue.changed.notify_all();
    }
}

impl Iterator for Batches {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let clock = self.loader.clock().cloned();
        let now_ns = || clock.as_ref().map_or(0, |c| c.monotonic_ns());
        let start_ns = now_ns();
        let queue = self.queue.clone();
        let mut state = queue.lock();
        let step = state.next_taken;
        if state.stop || step >= queue.end {
            return None;
        }
        let mut waited = false;
        let outcome = if self.threads.is_empty() {
            state.next_taken += 1;
            drop(state);
            waited = true;
            Ok(self.loader.make(step, &|| false))
        } else {
            let outcome = loop {
                if let Some(outcome) = state.ready.remove(&step) {
                    state.next_taken += 1;
                    queue.changed.notify_all();
                    break outcome;
                }
                waited = true;
                state = queue.wait(state);
            };
            drop(state);
            outcome
        };
        let wait_ns = if waited { now_ns() - start_ns } else { 0 };
        match outcome {
            Ok(Ok(made)) => {
                if !self.threads.is_empty() {
                    let ready = queue.lock().ready.len() as u64;
                    self.tune(&made, wait_ns, waited, ready);
                } else {
                    self.last_wait = self.stalls.take(wait_ns, &made.times);
                }
                self.loader.took(self.first_step, step);
                Some(Ok(made.batch))
            }
            Ok(Err(error)) => {
                self.stop();
                Some(Err(error))
            }
            Err(panic) => resume_unwind(panic),
        }
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

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread does: claims the next step while there is room, makes its batch, and puts it in its place.
    fn make(&self, loader: &Loader) {
        let mut state = self.lock();
        while !state.stop && state.next_made < self.end {
            if state.next_made >= state.next_taken + state.capacity {
                state = self.wait(state);
                continue;
            }
            let step = state.next_made;
            state.next_made += 1;
            drop(state);
            let made = catch_unwind(AssertUnwindSafe(|| loader.make(step, &|| self.lock().stop)));
            state = self.lock();
            state.ready.insert(step, made);
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuner(queue_bytes: u64) -> Tuner {
        Tuner { least: 4, processors: 2, queue_bytes, batch_bytes: 10, allowed: 4 }
    }

    #[test]
    fn fetching_is_allowed_ahead_until_memory_ends() {
        let mut tuner = tuner(200);
        (0..100).for_each(|_| tuner.waited_for(Stage::Fetch));
        assert_eq!(tuner.capacity(), 20);
        // A batch turns out to take more: fewer fit.
        tuner.saw_batch_of(50);
        assert_eq!(tuner.capacity(), 4);
        tuner.saw_batch_of(1000);
        assert_eq!(tuner.capacity(), 1);
    }

    #[test]
    fn decoding_gains_nothing_from_more_than_the_processors() {
        let mut tuner = tuner(1000);
        (0..100).for_each(|_| tuner.waited_for(Stage::Decode));
        assert_eq!(tuner.capacity(), 4);
    }

    #[test]
    fn a_slow_consumer_gives_memory_back() {
        let mut tuner = tuner(1000);
        (0..40).for_each(|_| tuner.waited_for(Stage::Fetch));
        assert_eq!(tuner.capacity(), 44);
        tuner.was_ahead();
        assert_eq!(tuner.capacity(), 33);
        (0..20).for_each(|_| tuner.was_ahead());
        assert_eq!(tuner.capacity(), 4);
    }

    /// A store `latency` ticks away and a consumer that takes a batch each tick: what the tuner makes of it.
    #[test]
    fn enough_is_in_flight_for_the_latency_after_a_while() {
        for latency in [3u64, 10, 40] {
            let mut tuner = tuner(10_000);
            let (mut started, mut taken, mut stalls_late) = (0u64, 0u64, 0);
            // Ends of the batches in the making, in their order.
            let mut ends = std::collections::VecDeque::new();
            for tick in 0..4000u64 {
                while started < taken + tuner.capacity() {
                    ends.push_back(tick + latency);
                    started += 1;
                }
                match ends.front() {
                    Some(end) if *end <= tick => {
                        ends.pop_front();
                        taken += 1;
                    }
                    _ => {
                        tuner.waited_for(Stage::Fetch);
                        stalls_late += u64::from(tick >= 2000);
                    }
                }
            }
            assert_eq!(stalls_late, 0, "latency {latency}");
            assert!(tuner.capacity() <= 2 * latency + 6, "latency {latency}: {}", tuner.capacity());
        }
    }
}
