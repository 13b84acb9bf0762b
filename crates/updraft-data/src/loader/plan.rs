//! Which samples make the batch of a step, before any of them is read.
//!
//! There are four kinds of order. In an *epoch* every step is a range of positions of one order, and the last is filled
//! as the tail says. A *stream* has no common end: each lane goes on into its next epoch by itself, which is what
//! mixtures need, whose sources end at different times, and what stages need that join or drop samples, whose rows
//! nobody can count without reading. A *list* is a stage over one epoch, laid out in full: for evaluation, which wants
//! every sample once and an end. A dataset that *grows* has one order without end, in windows of blocks: a window is
//! shuffled as soon as all its blocks are there, so its order does not depend on when they came.
//!
//! Only a stage has state: where each lane stands. It is kept for the steps that are being made, so that asking for the
//! state after a step costs nothing; any other step's is found by going on from the nearest one before.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use updraft_base::{Key, Permutation};

use super::stream::{Stream, no_lanes};
use super::{LoaderOptions, Tail};
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::lanes::{LaneEpoch, Lanes, Share};
use crate::order::{EpochOrder, Order, Shuffle};
use crate::packing::{LaneState, Packer, Piece};
use crate::stall::Stopwatch;

/// The rows of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RowPlan {
    /// A sample each.
    Samples(Vec<u64>),
    /// Pieces of samples.
    Packed(Vec<Vec<Piece>>),
}

/// Samples whose weights are asked for together where they come from one place.
const WEIGHED_AT_ONCE: u64 = 1024;

/// What a batch is made of.
pub(crate) struct BatchPlan {
    pub epoch: u64,
    /// What random transforms draw from, each row by its number.
    pub key: Key,
    pub numbers: Vec<u64>,
    /// The first sample of each row that is not padding.
    pub samples: Vec<u64>,
    pub rows: RowPlan,
}

/// The order of a loader.
pub(crate) struct Planner {
    batch_size: u64,
    tail: Tail,
    augment: Key,
    share: Option<Share>,
    /// Rows of an epoch; of a stream, the samples of all sources.
    epoch_rows: u64,
    kind: OrderKind,
}

enum OrderKind {
    Epochs(Epochs),
    Stream(Stream),
    List(List),
    Growing(Growing),
}

/// Rows laid out in full.
#[derive(Default)]
struct List {
    /// The pieces of all rows, one row after the other.
    pieces: Vec<Piece>,
    /// Where the pieces of each row end.
    ends: Vec<usize>,
}

/// Windows of blocks, one after the other.
struct Growing {
    /// What samples are permuted by; nothing where they are not.
    key: Option<Key>,
    window_blocks: usize,
    /// First row of each block, and the row at the end, as far as is known.
    starts: Mutex<Arc<[u64]>>,
}

/// One source, its epochs one after the other.
struct Epochs {
    orders: Orders,
    /// The order of the epoch asked for last.
    last: Mutex<Option<(u64, Arc<EpochKind>)>>,
}

enum Orders {
    Plain(Order),
    Lanes(Lanes),
}

enum EpochKind {
    Plain(EpochOrder),
    Lanes(LaneEpoch),
}

impl Planner {
    pub(crate) fn new(dataset: &Dataset, options: &LoaderOptions) -> Result<Planner, DataError> {
        let refused = |reason: String| Err(DataError::Loader(reason));
        let batch_size = options.batch_size as u64;
        let key = Key::new(options.seed);
        let lanes = options.lanes.or(dataset.lanes());
        if lanes == Some(0) {
            return refused("an epoch needs at least one lane".into());
        }
        if options.ranks > 1 && lanes.is_none() {
            return refused(format!("{} ranks need `lanes` to share", options.ranks));
        }
        let weights = if options.speeds.is_empty() { vec![1; options.ranks.max(1)] } else { options.speeds.clone() };
        if weights.len() != options.ranks.max(1) {
            return refused(format!("{} speeds for {} ranks", weights.len(), options.ranks));
        }
        let share = lanes.map(|lanes| Share::new(lanes, batch_size, options.rank, &weights)).transpose();
        let share = share.map_err(DataError::Loader)?;
        if options.ranks > 1 && dataset.pairs_samples() && share.as_ref().is_some_and(|share| !share.keeps_pairs()) {
            return refused(format!(
                "`mix` makes samples of two neighbouring rows, and rank {} of {} would have one without the other: take lanes \
                 of which every rank gets an even number",
                options.rank, options.ranks
            ));
        }
        let mixes = !dataset.weights().is_empty();
        let is_list = dataset.is_many_to_one() && !mixes && options.tail != Tail::Wrap;
        if dataset.is_followed() && options.shuffle == Shuffle::Global {
            return refused("nobody knows all samples of a dataset that is followed: shuffle over blocks".into());
        }
        if mixes && options.tail == Tail::Drop {
            return refused("a mixture has no end that `tail = \"drop\"` could leave out".into());
        }
        match lanes {
            Some(lanes) if !dataset.is_followed() => dataset.check_lanes(lanes, options.shuffle)?,
            _ => dataset.check_shuffle(options.shuffle)?,
        }
        let mut epoch_rows = dataset.len();
        let kind = if dataset.is_followed() {
            let (key, window_blocks) = match options.shuffle {
                Shuffle::Blocks(blocks) => {
                    (Some(key.child("growing")), usize::try_from(blocks.max(1)).unwrap_or(usize::MAX))
                }
                Shuffle::None | Shuffle::Global => (None, 1),
            };
            OrderKind::Growing(Growing { key, window_blocks, starts: Mutex::new(Arc::new([0])) })
        } else if is_list {
            let order = Order::new(options.seed, dataset.block_samples(), options.shuffle).epoch(0);
            let list = List::of(dataset, &order)?;
            epoch_rows = list.ends.len() as u64;
            OrderKind::List(list)
        } else if mixes || dataset.is_many_to_one() {
            OrderKind::Stream(Stream::new(dataset, options, lanes.unwrap_or(1), share.as_ref())?)
        } else {
            let orders = match lanes {
                Some(lanes) => Orders::Lanes(Lanes::new(&key, dataset.block_samples(), lanes, options.shuffle)),
                None => Orders::Plain(Order::new(options.seed, dataset.block_samples(), options.shuffle)),
            };
            OrderKind::Epochs(Epochs { orders, last: Mutex::new(None) })
        };
        if epoch_rows == 0 {
            return refused("the filter lets no sample through".into());
        }
        if options.tail == Tail::Drop && epoch_rows < batch_size && !dataset.is_followed() {
            return refused(format!(
                "{epoch_rows} samples do not fill a batch of {batch_size}, and `tail = \"drop\"` leaves them out"
            ));
        }
        Ok(Planner { batch_size, tail: options.tail, augment: key.child("augment"), share, epoch_rows, kind })
    }

    /// Rows that each of this rank's batches has.
    pub(crate) fn rank_rows(&self) -> usize {
        (0..self.batch_size).filter(|row| self.has_row(*row)).count()
    }

    pub(crate) fn steps_per_epoch(&self) -> u64 {
        match self.tail {
            Tail::Drop if self.has_epochs() => self.epoch_rows / self.batch_size,
            Tail::Drop | Tail::Pad | Tail::Wrap => self.epoch_rows.div_ceil(self.batch_size),
        }
    }

    /// Whether epochs have ends that all agree on.
    pub(crate) fn has_epochs(&self) -> bool {
        !matches!(self.kind, OrderKind::Stream(_) | OrderKind::Growing(_))
    }

    /// Whether samples come again.
    pub(crate) fn repeats(&self) -> bool {
        !matches!(self.kind, OrderKind::Growing(_))
    }

    fn has_row(&self, row: u64) -> bool {
        self.share.as_ref().is_none_or(|share| share.has_row(row))
    }

    /// What the batch of a step is made of.
    pub(crate) fn batch(
        &self,
        dataset: &Dataset,
        step: u64,
        watch: &mut Stopwatch,
        is_stopped: &dyn Fn() -> bool,
    ) -> Result<BatchPlan, DataError> {
        let epoch = step / self.steps_per_epoch();
        match &self.kind {
            OrderKind::Epochs(epochs) => {
                let order = epochs.order(epoch);
                let (samples, rows) = self.of_epoch(step, |position| order.sample_at(position));
                let key = self.augment.child_index(epoch);
                Ok(BatchPlan { epoch, key, numbers: rows.clone(), samples, rows: RowPlan::Samples(rows) })
            }
            OrderKind::List(list) => {
                let (real, rows) = self.of_epoch(step, |position| list.row(position));
                let numbers = rows.iter().map(|row| first_sample(row)).collect();
                let samples = real.iter().map(|row| first_sample(row)).collect();
                let rows = match dataset.pack() {
                    Some(_) => {
                        // Padding is no document, so that its targets count for nothing.
                        let empty = rows.len() - real.len();
                        let real = real.into_iter().map(<[Piece]>::to_vec);
                        RowPlan::Packed(real.chain(std::iter::repeat_n(Vec::new(), empty)).collect())
                    }
                    None => RowPlan::Samples(rows.iter().map(|row| first_sample(row)).collect()),
                };
                Ok(BatchPlan { epoch, key: self.augment.child_index(epoch), numbers, samples, rows })
            }
            OrderKind::Growing(growing) => {
                let positions =
                    (0..self.batch_size).filter(|row| self.has_row(*row)).map(|row| step * self.batch_size + row);
                let rows: Vec<u64> =
                    positions.map(|at| growing.sample_at(dataset, at, is_stopped)).collect::<Result<_, _>>()?;
                let key = self.augment.child("growing").child_index(step);
                Ok(BatchPlan {
                    epoch: 0,
                    key,
                    numbers: rows.clone(),
                    samples: rows.clone(),
                    rows: RowPlan::Samples(rows),
                })
            }
            OrderKind::Stream(stream) => {
                // A sample may come twice in the time of an epoch, or in one batch, and should not look the same both times.
                let key = self.augment.child("stream");
                let own = (0..self.batch_size).filter(|row| self.has_row(*row));
                let numbers = own.clone().map(|row| step * self.batch_size + row).collect();
                let rows = stream.rows(dataset, step, own, watch, is_stopped)?;
                let samples = rows.iter().map(|row| first_sample(row)).collect();
                let rows = match dataset.pack() {
                    Some(_) => RowPlan::Packed(rows),
                    None => RowPlan::Samples(rows.iter().map(|row| first_sample(row)).collect()),
                };
                Ok(BatchPlan { epoch, key, numbers, samples, rows })
            }
        }
    }

    /// This rank's rows of a step of an epoch: those that count, and all, filled as the tail says.
    fn of_epoch<T: Clone>(&self, step: u64, at: impl Fn(u64) -> T) -> (Vec<T>, Vec<T>) {
        let first = step % self.steps_per_epoch() * self.batch_size;
        let (mut real, mut rows) = (Vec::new(), Vec::new());
        for row in (0..self.batch_size).filter(|row| self.has_row(*row)) {
            let position = first + row;
            let inside = position < self.epoch_rows;
            let position = match self.tail {
                _ if inside => position,
                Tail::Wrap => position % self.epoch_rows,
                Tail::Pad | Tail::Drop => self.epoch_rows - 1,
            };
            let item = at(position);
            if inside || self.tail == Tail::Wrap {
                real.push(item.clone());
            }
            rows.push(item);
        }
        (real, rows)
    }

    /// The step whose batch has a sample in an epoch; `None` where that is not known without reading, or where the tail
    /// leaves it out.
    pub(crate) fn step_of(&self, epoch: u64, sample: u64) -> Option<u64> {
        let OrderKind::Epochs(epochs) = &self.kind else { return None };
        if sample >= self.epoch_rows {
            return None;
        }
        let position = match &*epochs.order(epoch) {
            EpochKind::Plain(order) => order.position_of(sample),
            EpochKind::Lanes(order) => order.position_of(sample),
        };
        let step = position / self.batch_size;
        (step < self.steps_per_epoch()).then(|| epoch * self.steps_per_epoch() + step)
    }

    /// The blocks that this rank needs in an epoch, each with its steps, by when they are needed first; nothing where that
    /// is not known without reading.
    pub(crate) fn uses(&self, dataset: &Dataset, epoch: u64) -> Vec<(usize, Range<u64>)> {
        let first = epoch * self.steps_per_epoch();
        let mut uses = match &self.kind {
            OrderKind::Epochs(epochs) => {
                let positions = match &*epochs.order(epoch) {
                    EpochKind::Plain(order) => order.uses(dataset.block_samples()),
                    EpochKind::Lanes(order) => order.uses(),
                };
                let steps = |positions: Range<u64>| {
                    first + positions.start / self.batch_size..first + positions.end.div_ceil(self.batch_size)
                };
                // The first position is of the lane, and so of the rank, that all of them are of.
                let own = positions.into_iter().filter(|(_, positions)| self.has_row(positions.start));
                own.map(|(block, positions)| (block, steps(positions))).collect()
            }
            OrderKind::Stream(stream) => {
                let has_lane = |lane| self.share.as_ref().is_none_or(|share| share.has_lane(lane));
                stream.uses(first..first + self.steps_per_epoch(), has_lane)
            }
            OrderKind::List(_) | OrderKind::Growing(_) => Vec::new(),
        };
        uses.sort_by_key(|(_, steps)| (steps.start, steps.end));
        uses
    }

    /// Where this rank's lanes stand before a step; nothing where the step's number says it all.
    pub(crate) fn states(&self, dataset: &Dataset, step: u64) -> Result<BTreeMap<u64, LaneState>, DataError> {
        match &self.kind {
            OrderKind::Stream(stream) => stream.states(dataset, step),
            OrderKind::Epochs(_) | OrderKind::List(_) | OrderKind::Growing(_) => Ok(BTreeMap::new()),
        }
    }

    /// Goes on from where lanes stood before a step.
    ///
    /// # Errors
    /// What the states say, and what they would have to.
    pub(crate) fn restore(
        &self,
        dataset: &Dataset,
        step: u64,
        states: &BTreeMap<u64, LaneState>,
    ) -> Result<(), [String; 2]> {
        match &self.kind {
            OrderKind::Stream(stream) => stream.restore(dataset, step, states),
            OrderKind::Epochs(_) | OrderKind::List(_) | OrderKind::Growing(_) => no_lanes(states),
        }
    }

    /// States of steps before this one are not needed any more.
    pub(crate) fn forget_before(&self, step: u64) {
        if let OrderKind::Stream(stream) = &self.kind {
            stream.forget_before(step);
        }
    }
}

fn first_sample(row: &[Piece]) -> u64 {
    row.first().map_or(0, |piece| piece.sample)
}

impl Growing {
    /// The sample at a position, once its window is there.
    fn sample_at(&self, dataset: &Dataset, position: u64, is_stopped: &dyn Fn() -> bool) -> Result<u64, DataError> {
        let known = || self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut starts = known().clone();
        loop {
            // The last start is the end of what is known.
            let block = starts.partition_point(|start| *start <= position) - 1;
            let first = block / self.window_blocks * self.window_blocks;
            let end = first + self.window_blocks;
            if let (Some(from), Some(to)) = (starts.get(first), starts.get(end))
                && position < *to
            {
                let place = position - from;
                let key = self.key.map(|key| key.child_index((first / self.window_blocks) as u64));
                return Ok(from + key.map_or(place, |key| Permutation::new(&key, to - from).get(place)));
            }
            starts = dataset.grown(end.max(starts.len()), is_stopped)?;
            *known() = starts.clone();
        }
    }
}

impl Epochs {
    fn order(&self, epoch: u64) -> Arc<EpochKind> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((e, order)) if *e == epoch => order.clone(),
            _ => {
                let order = match &self.orders {
                    Orders::Plain(order) => EpochKind::Plain(order.epoch(epoch)),
                    Orders::Lanes(lanes) => EpochKind::Lanes(lanes.epoch(epoch)),
                };
                last.insert((epoch, Arc::new(order))).1.clone()
            }
        }
    }
}

impl EpochKind {
    fn sample_at(&self, position: u64) -> u64 {
        match self {
            EpochKind::Plain(order) => order.sample_at(position),
            EpochKind::Lanes(order) => order.sample_at(position),
        }
    }
}

impl List {
    fn row(&self, position: u64) -> &[Piece] {
        let number = position as usize;
        let start = number.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.pieces[start..self.ends[number]]
    }

    fn push(&mut self, row: &[Piece]) {
        self.pieces.extend_from_slice(row);
        self.ends.push(self.pieces.len());
    }

    /// What it takes, and may take while it grows into memory that is twice as large.
    fn memory_bytes(&self) -> u64 {
        (size_of_val(&*self.pieces) + size_of_val(&*self.ends)) as u64 * 3
    }

    /// All rows of an epoch, in order.
    ///
    /// # Errors
    /// More rows than memory allows.
    fn of(dataset: &Dataset, order: &EpochOrder) -> Result<List, DataError> {
        let mut list = List::default();
        let packer = packer(dataset);
        let mut state = LaneState::default();
        let mut next = 0;
        while next < dataset.len() {
            let samples: Vec<u64> =
                (next..(next + WEIGHED_AT_ONCE).min(dataset.len())).map(|p| order.sample_at(p)).collect();
            next += samples.len() as u64;
            let lens = dataset.weigh(&samples, &mut Stopwatch::start(None))?;
            for (sample, len) in samples.into_iter().zip(lens) {
                let Some(document) = len.map(|len| Piece { sample, offset: 0, len }) else { continue };
                match &packer {
                    None => list.push(&[document]),
                    Some(packer) => {
                        let mut given = Some(document);
                        while let Ok(row) = packer.next_row(&mut state, |_| given.take().ok_or(())) {
                            list.push(&row);
                        }
                    }
                }
            }
            dataset.check_list(list.memory_bytes(), next)?;
        }
        packer.iter().flat_map(|packer| packer.flush(&mut state)).for_each(|row| list.push(&row));
        Ok(list)
    }
}

pub(super) fn packer(dataset: &Dataset) -> Option<Packer> {
    dataset.pack().map(|pack| Packer { length: pack.length as u64, fill: pack.fill })
}
