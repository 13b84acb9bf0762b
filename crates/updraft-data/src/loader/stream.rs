//! Lanes that go on without end, each into its next epoch by itself, and where they stand.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use updraft_base::Key;

use super::LoaderOptions;
use super::plan::packer;
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::lanes::{LaneEpoch, Lanes, Share};
use crate::mixture::Mixture;
use crate::packing::{LaneState, Packer, Piece};
use crate::stall::Stopwatch;

/// Samples of a lane that are weighed together with those of other lanes.
const WEIGHED_OF_A_LANE: usize = 8;

/// Lanes without end, each over its own lane of every source.
pub(super) struct Stream {
    sources: Vec<StreamSource>,
    mixture: Option<Mixture>,
    lanes: u64,
    batch_size: u64,
    stage: Option<Stage>,
}

struct StreamSource {
    /// The number of the source's first block in the dataset.
    first_block: usize,
    /// The number of the source's first sample in the dataset.
    first_sample: u64,
    lanes: Lanes,
    /// Orders of the epochs asked for last; lanes of one length are never more than two epochs apart in a step, and those
    /// that a stage drives a few more.
    epochs: Mutex<VecDeque<(u64, Arc<LaneEpoch>)>>,
}

const EPOCHS_KEPT: usize = 4;

/// A stage that drops or joins samples.
struct Stage {
    packer: Option<Packer>,
    /// The lanes that this rank owns.
    owned: Vec<u64>,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    /// Where lanes stand before some steps.
    known: BTreeMap<u64, Arc<BTreeMap<u64, LaneState>>>,
    /// Where they stand before `next_step`, and what was weighed ahead.
    next_step: u64,
    states: BTreeMap<u64, LaneState>,
    ahead: BTreeMap<u64, VecDeque<Weighed>>,
    /// The rows of steps that were passed on the way to later ones, for the threads that will ask for them.
    passed: BTreeMap<u64, Vec<Vec<Piece>>>,
}

/// What a thread waits for that makes a batch, and notes how long it took.
struct Making<'a, 'w> {
    dataset: &'a Dataset,
    watch: &'a mut Stopwatch<'w>,
    is_stopped: &'a dyn Fn() -> bool,
}

/// Steps of which rows are kept for other threads, at most; as many as there can be threads.
const PASSED_MAX: usize = 64;

struct Weighed {
    /// The sample's index in its lane.
    index: u64,
    sample: u64,
    len: Option<u64>,
}

impl Stream {
    pub(super) fn new(
        dataset: &Dataset,
        options: &LoaderOptions,
        lanes: u64,
        share: Option<&Share>,
    ) -> Result<Stream, DataError> {
        let key = Key::new(options.seed);
        let mut sources = Vec::new();
        let (mut first_block, mut first_sample) = (0, 0);
        for (number, blocks) in dataset.sources().enumerate() {
            // One source has the order that it would have without a mixture.
            let key = if dataset.weights().is_empty() { key } else { key.child("source").child_index(number as u64) };
            let source_lanes = Lanes::new(&key, blocks, lanes, options.shuffle);
            let samples = source_lanes.len();
            if samples < lanes {
                return Err(DataError::Loader(format!(
                    "source {number} has {samples} samples, too few for {lanes} lanes; take fewer lanes"
                )));
            }
            sources.push(StreamSource { first_block, first_sample, lanes: source_lanes, epochs: Mutex::default() });
            first_block += blocks.len();
            first_sample += samples;
        }
        let mixture = match dataset.weights() {
            [] => None,
            weights => Some(Mixture::new(&key, sources.len(), lanes, weights).map_err(DataError::Loader)?),
        };
        let stage = dataset.is_many_to_one().then(|| {
            let owned: Vec<u64> = (0..lanes).filter(|lane| share.is_none_or(|s| s.has_lane(*lane))).collect();
            let states: BTreeMap<u64, LaneState> = owned.iter().map(|lane| (*lane, LaneState::default())).collect();
            let known = BTreeMap::from([(0, Arc::new(states.clone()))]);
            let progress = Mutex::new(Progress { known, states, ..Progress::default() });
            Stage { packer: packer(dataset), owned, progress }
        });
        Ok(Stream { sources, mixture, lanes, batch_size: options.batch_size as u64, stage })
    }

    /// The sample at an index of a lane.
    fn sample_at(&self, lane: u64, index: u64) -> u64 {
        let (source, index) = match &self.mixture {
            Some(mixture) => mixture.at(lane, index),
            None => (0, index),
        };
        let source = &self.sources[source];
        let len = source.lanes.lane_len(lane);
        let order = source.order(index / len);
        let mut sample = [0];
        order.fill(lane, index % len, &mut sample);
        source.first_sample + sample[0]
    }

    pub(super) fn rows(
        &self,
        dataset: &Dataset,
        step: u64,
        own_rows: impl Iterator<Item = u64>,
        watch: &mut Stopwatch,
        is_stopped: &dyn Fn() -> bool,
    ) -> Result<Vec<Vec<Piece>>, DataError> {
        let positions = own_rows.map(|row| step * self.batch_size + row);
        let Some(stage) = &self.stage else {
            let whole = |position: u64| {
                let sample = self.sample_at(position % self.lanes, position / self.lanes);
                vec![Piece { sample, offset: 0, len: 1 }]
            };
            return Ok(positions.map(whole).collect());
        };
        let lanes: Vec<u64> = positions.map(|position| position % self.lanes).collect();
        let mut progress = stage.progress.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever had it notes what was done meanwhile.
        watch.skip();
        if let Some(rows) = progress.passed.remove(&step) {
            return Ok(rows);
        }
        let mut making = Making { dataset, watch, is_stopped };
        self.go_to(&mut making, stage, &mut progress, step)?;
        self.take_step(&mut making, stage, &mut progress, &lanes)
    }

    /// The blocks that some of the lanes need in a range of steps, each with its steps. Nothing where a stage drops or joins
    /// samples: then nobody knows without reading.
    pub(super) fn uses(&self, steps: Range<u64>, has_lane: impl Fn(u64) -> bool) -> Vec<(usize, Range<u64>)> {
        let mut uses = Vec::new();
        if self.stage.is_some() {
            return uses;
        }
        let first_index = |lane: u64, step: u64| (step * self.batch_size).saturating_sub(lane).div_ceil(self.lanes);
        let lanes: Vec<u64> = (0..self.lanes).filter(|lane| has_lane(*lane)).collect();
        let indices = |lane: u64| first_index(lane, steps.start)..first_index(lane, steps.end);
        for (number, source) in self.sources.iter().enumerate() {
            // What each lane takes of the source meanwhile, counted on through the source's epochs.
            let items: Vec<Range<u64>> = lanes
                .iter()
                .map(|lane| {
                    let Range { start, end } = indices(*lane);
                    self.items_before(*lane, start, number)..self.items_before(*lane, end, number)
                })
                .collect();
            let epoch_of = |lane: u64, item: u64| item / source.lanes.lane_len(lane);
            let taken = || lanes.iter().copied().zip(&items).filter(|(_, items)| !items.is_empty());
            let first_epoch = taken().map(|(lane, items)| epoch_of(lane, items.start)).min().unwrap_or(0);
            let end_epoch = taken().map(|(lane, items)| epoch_of(lane, items.end - 1) + 1).max().unwrap_or(0);
            for epoch in first_epoch..end_epoch {
                let order = source.lanes.epoch(epoch);
                for (lane, items) in taken() {
                    let before = epoch * source.lanes.lane_len(lane);
                    let mut index = indices(lane);
                    for (window, blocks) in order.windows(lane) {
                        let (start, end) = (items.start.max(before + window.start), items.end.min(before + window.end));
                        if start >= end {
                            continue;
                        }
                        index.start = self.index_of(lane, index.clone(), number, start);
                        let last = self.index_of(lane, index.clone(), number, end - 1);
                        let step = |index: u64| (index * self.lanes + lane) / self.batch_size;
                        let steps = step(index.start)..step(last) + 1;
                        uses.extend(blocks.map(|block| (source.first_block + block, steps.clone())));
                    }
                }
            }
        }
        uses
    }

    /// How many items of a source a lane has before an index.
    fn items_before(&self, lane: u64, index: u64, source: usize) -> u64 {
        self.mixture.as_ref().map_or(index, |mixture| mixture.counts(lane, index)[source])
    }

    /// The index, among some of a lane, of an item of a source.
    fn index_of(&self, lane: u64, among: Range<u64>, source: usize, item: u64) -> u64 {
        let Range { mut start, mut end } = among;
        while end - start > 1 {
            let middle = start + (end - start) / 2;
            if self.items_before(lane, middle, source) <= item { start = middle } else { end = middle }
        }
        start
    }

    pub(super) fn states(&self, dataset: &Dataset, step: u64) -> Result<BTreeMap<u64, LaneState>, DataError> {
        let Some(stage) = &self.stage else { return Ok(BTreeMap::new()) };
        let mut progress = stage.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = progress.known.get(&step) {
            return Ok(BTreeMap::clone(known));
        }
        let mut watch = Stopwatch::start(None);
        let mut making = Making { dataset, watch: &mut watch, is_stopped: &|| false };
        self.go_to(&mut making, stage, &mut progress, step)?;
        Ok(progress.states.clone())
    }

    /// Goes on from where lanes stood before a step.
    ///
    /// # Errors
    /// What the states say, and what they would have to.
    pub(super) fn restore(
        &self,
        dataset: &Dataset,
        step: u64,
        states: &BTreeMap<u64, LaneState>,
    ) -> Result<(), [String; 2]> {
        let Some(stage) = &self.stage else { return no_lanes(states) };
        if let Some(lane) = states.keys().find(|lane| **lane >= self.lanes) {
            return Err([format!("of lane {lane}"), format!("of {} lanes", self.lanes)]);
        }
        let mut own = BTreeMap::new();
        for lane in &stage.owned {
            let state = states.get(lane).cloned().or_else(|| (step == 0).then(LaneState::default));
            let state = state.ok_or_else(|| {
                let known = format!("{} lanes without lane {lane}", states.len());
                [known, "a rank that owns it; merge the tokens of all ranks".into()]
            })?;
            state
                .check(stage.packer.as_ref(), dataset.len())
                .map_err(|[is, could_be]| [format!("{is} in lane {lane}"), could_be])?;
            own.insert(*lane, state);
        }
        let known = BTreeMap::from([(step, Arc::new(own.clone()))]);
        let mut progress = stage.progress.lock().unwrap_or_else(PoisonError::into_inner);
        *progress = Progress { known, next_step: step, states: own, ..Progress::default() };
        Ok(())
    }

    /// States of steps before this one are not needed any more.
    pub(super) fn forget_before(&self, step: u64) {
        if let Some(stage) = &self.stage {
            let mut progress = stage.progress.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = progress.known.split_off(&step);
            if !kept.is_empty() {
                progress.known = kept;
            }
            progress.passed = progress.passed.split_off(&step);
        }
    }

    /// Brings the lanes to where they stand before a step.
    fn go_to(&self, making: &mut Making, stage: &Stage, progress: &mut Progress, step: u64) -> Result<(), DataError> {
        if progress.next_step != step {
            let Some((from, states)) = progress.known.range(..=step).next_back() else {
                return Err(DataError::Loader(format!("step {step} lies before the step that was resumed from")));
            };
            if *from != progress.next_step {
                (progress.next_step, progress.states) = (*from, BTreeMap::clone(states));
                progress.ahead.clear();
            }
        }
        while progress.next_step < step {
            let first = progress.next_step * self.batch_size;
            let lanes = (first..first + self.batch_size).map(|position| position % self.lanes);
            let own: Vec<u64> = lanes.filter(|lane| stage.owned.binary_search(lane).is_ok()).collect();
            let passed = progress.next_step;
            let rows = self.take_step(making, stage, progress, &own)?;
            progress.passed.insert(passed, rows);
            if progress.passed.len() > PASSED_MAX {
                progress.passed.pop_first();
            }
        }
        Ok(())
    }

    /// The rows of the next step, one from each of `lanes` in turn.
    fn take_step(
        &self,
        making: &mut Making,
        stage: &Stage,
        progress: &mut Progress,
        lanes: &[u64],
    ) -> Result<Vec<Vec<Piece>>, DataError> {
        let mut rows = Vec::with_capacity(lanes.len());
        let Progress { states, ahead, .. } = progress;
        for lane in lanes {
            let mut state = states.remove(lane).unwrap_or_default();
            let row = self.next_row(making, stage, *lane, &mut state, states, ahead);
            states.insert(*lane, state);
            match row {
                Ok(row) => rows.push(row),
                Err(error) => {
                    // Half a step was taken: the next call begins at a known one.
                    progress.next_step = u64::MAX;
                    return Err(error);
                }
            }
        }
        progress.next_step += 1;
        let states = Arc::new(progress.states.clone());
        progress.known.insert(progress.next_step, states);
        Ok(rows)
    }

    fn next_row(
        &self,
        making: &mut Making,
        stage: &Stage,
        lane: u64,
        state: &mut LaneState,
        others: &BTreeMap<u64, LaneState>,
        ahead: &mut BTreeMap<u64, VecDeque<Weighed>>,
    ) -> Result<Vec<Piece>, DataError> {
        let mut next = |cursor: &mut u64| self.next_document(making, stage, lane, cursor, others, ahead);
        match &stage.packer {
            Some(packer) => packer.next_row(state, next),
            None => next(&mut state.cursor).map(|document| vec![document]),
        }
    }

    /// The next sample of a lane that the filter lets through, and that has any tokens.
    fn next_document(
        &self,
        making: &mut Making,
        stage: &Stage,
        lane: u64,
        cursor: &mut u64,
        others: &BTreeMap<u64, LaneState>,
        ahead: &mut BTreeMap<u64, VecDeque<Weighed>>,
    ) -> Result<Piece, DataError> {
        // Each source of a mixture comes round in a lane within its length over its share; ten times all of it is plenty.
        let most = 10
            * self
                .sources
                .iter()
                .map(|s| s.lanes.lane_len(lane))
                .sum::<u64>()
                .saturating_mul(self.sources.len() as u64);
        let first = *cursor;
        loop {
            match ahead.get_mut(&lane).and_then(VecDeque::pop_front) {
                Some(weighed) => {
                    *cursor = weighed.index + 1;
                    if let Some(len) = weighed.len.filter(|len| *len > 0) {
                        return Ok(Piece { sample: weighed.sample, offset: 0, len });
                    }
                    if *cursor - first >= most {
                        let reason = format!("no sample of lane {lane} passes the filter with any content");
                        return Err(DataError::Loader(reason));
                    }
                }
                None => self.weigh_ahead(making, stage, lane, *cursor, others, ahead)?,
            }
        }
    }

    /// Weighs some samples of a lane, and of the other lanes that have none left: a source reads many rows at once
    /// faster than one at a time.
    fn weigh_ahead(
        &self,
        making: &mut Making,
        stage: &Stage,
        lane: u64,
        cursor: u64,
        others: &BTreeMap<u64, LaneState>,
        ahead: &mut BTreeMap<u64, VecDeque<Weighed>>,
    ) -> Result<(), DataError> {
        if (making.is_stopped)() {
            return Err(DataError::Loader("nobody waits for this batch any more".into()));
        }
        let mut wanted = Vec::new();
        for other in &stage.owned {
            let from = if *other == lane { Some(cursor) } else { others.get(other).map(|s| s.cursor) };
            let queued = ahead.get(other).map_or(0, VecDeque::len);
            if let (Some(from), 0) = (from, queued) {
                let indices = from..from + WEIGHED_OF_A_LANE as u64;
                wanted.extend(indices.map(|index| (*other, index, self.sample_at(*other, index))));
            }
        }
        let samples: Vec<u64> = wanted.iter().map(|(_, _, sample)| *sample).collect();
        let lens = making.dataset.weigh(&samples, making.watch)?;
        for ((lane, index, sample), len) in wanted.into_iter().zip(lens) {
            ahead.entry(lane).or_default().push_back(Weighed { index, sample, len });
        }
        Ok(())
    }
}

/// Only lanes with a stage carry anything.
pub(super) fn no_lanes(states: &BTreeMap<u64, LaneState>) -> Result<(), [String; 2]> {
    match states.keys().next() {
        Some(lane) => Err([format!("of lane {lane}"), "nothing, for nothing is filtered or packed on the way".into()]),
        None => Ok(()),
    }
}

impl StreamSource {
    fn order(&self, epoch: u64) -> Arc<LaneEpoch> {
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = epochs.iter().find(|(e, _)| *e == epoch) {
            return order.clone();
        }
        let order = Arc::new(self.lanes.epoch(epoch));
        if epochs.len() == EPOCHS_KEPT {
            epochs.pop_front();
        }
        epochs.push_back((epoch, order.clone()));
        order
    }
}
