//! Samples that are pictures: decoded once where memory allows, varied anew each time, and written straight into the batch.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use updraft_base::Key;
use updraft_graph::Tensor;

use super::{Dataset, PlannedTensor};
use crate::error::DataError;
use crate::picture::{Picture, PicturePlan};
use crate::source::Cells;
use crate::stall::{Stage, Stopwatch};

impl Dataset {
    /// The pictures of some samples as one tensor, \[samples, channels, height, width\], each varied by its key.
    pub(super) fn pictures(
        &self,
        tensor: &PlannedTensor,
        plan: &PicturePlan,
        samples: &[u64],
        keys: &[Key],
        comes_again: bool,
        watch: &mut Stopwatch,
    ) -> Result<Tensor, DataError> {
        let column = tensor.columns[0];
        let failed = |sample: u64| {
            move |reason: String| DataError::Sample {
                sample: self.source.row_name(sample),
                column: self.columns[column].clone(),
                reason,
            }
        };
        // Which are kept is looked up once, as other threads keep more meanwhile.
        let kept: Vec<Option<Arc<Picture>>> = samples.iter().map(|s| tensor.cache.get(*s).cloned()).collect();
        let missing: Vec<u64> = samples.iter().zip(&kept).filter(|(_, k)| k.is_none()).map(|(s, _)| *s).collect();
        let mut missing = &missing[..];
        let mut encoded = Vec::new().into_iter();

        let mut workspace = tensor.take_workspace();
        let mut batch: Option<(Tensor, [usize; 3])> = None;
        for (index, sample) in samples.iter().enumerate() {
            let prepared = match &kept[index] {
                Some(picture) => Prepared::Kept(picture.clone()),
                None => {
                    if encoded.len() == 0 {
                        let (now, later) = missing.split_at(tensor.cells_in(self.portion_bytes(), missing.len()));
                        encoded = self.encoded(tensor, now, watch)?.into_iter();
                        missing = later;
                    }
                    let cell = encoded.next().unwrap_or_default();
                    let picture = plan.prepare(&cell, &mut workspace).map_err(failed(*sample))?;
                    if comes_again {
                        tensor.cache.keep(*sample, &picture);
                    }
                    Prepared::Own(picture)
                }
            };
            watch.lap(Stage::Decode);
            let picture = if plan.is_random() {
                let own = match prepared {
                    Prepared::Kept(shared) => Picture::clone(&shared),
                    Prepared::Own(picture) => picture,
                };
                let varied = plan.vary(own, &keys[index], &mut workspace);
                Prepared::Own(varied.map_err(failed(*sample))?)
            } else {
                prepared
            };
            watch.lap(Stage::Transform);
            let shape = [picture.planes(), picture.height, picture.width];
            if batch.is_none() {
                let whole = [samples.len(), shape[0], shape[1], shape[2]];
                // Every element of either is written below.
                let memory =
                    tensor.take_spare(plan.dtype(), &whole).map_or_else(|| Tensor::zeros(plan.dtype(), &whole), Ok);
                batch = Some((memory.map_err(|e| DataError::tensor(&tensor.name, e.to_string()))?, shape));
            }
            if let Some((stacked, first_shape)) = &mut batch {
                if shape != *first_shape || self.facts.tensors.iter().any(|t| t.name == tensor.name && t.shape != shape)
                {
                    let [channels, height, width] = *first_shape;
                    return Err(failed(*sample)(format!(
                        "{shape:?} channels, height and width differ from the [{channels}, {height}, {width}] of others; \
                         add `resize` or a crop"
                    )));
                }
                let bytes = stacked.byte_len() / samples.len();
                plan.write(&picture, &mut stacked.bytes_mut()[index * bytes..][..bytes]);
            }
            if let Prepared::Own(picture) = picture {
                workspace.reclaim(picture);
            }
            watch.lap(Stage::Collate);
        }
        tensor.give_workspace(workspace);
        match batch {
            Some((stacked, _)) => Ok(stacked),
            None => Err(DataError::tensor(&tensor.name, "a batch of no samples")),
        }
    }

    /// The files of some samples.
    fn encoded(&self, tensor: &PlannedTensor, samples: &[u64], watch: &mut Stopwatch) -> Result<Vec<Bytes>, DataError> {
        let cells = match self.source.read(&tensor.columns[..1], samples)?.pop() {
            Some(Cells::Bytes(cells)) => cells,
            _ => return Err(DataError::tensor(&tensor.name, "a column of numbers cannot be decoded")),
        };
        tensor.saw_cell_of(cells.iter().map(Bytes::len).max().unwrap_or(0) as u64);
        watch.fetched(cells.iter().map(|cell| cell.len() as u64).sum());
        watch.lap(Stage::Fetch);
        Ok(cells)
    }
}

/// Decoded pictures of the first samples, as many as memory allows. They are kept in 8 bits a channel, before anything
/// random and before they become floats, which take four times the memory and little time to make.
#[derive(Default)]
pub(super) struct PictureCache {
    slots: Vec<OnceLock<Arc<Picture>>>,
    free_bytes: AtomicU64,
}

impl PictureCache {
    pub(super) fn new(allowed_bytes: u64, sample: &Picture, samples: u64) -> PictureCache {
        let slot_bytes = size_of::<OnceLock<Arc<Picture>>>() as u64;
        let count = samples.min(allowed_bytes / (slot_bytes + picture_bytes(sample)));
        let slots = (0..count).map(|_| OnceLock::new()).collect();
        PictureCache { slots, free_bytes: AtomicU64::new(allowed_bytes.saturating_sub(count * slot_bytes)) }
    }

    fn get(&self, sample: u64) -> Option<&Arc<Picture>> {
        self.slots.get(usize::try_from(sample).ok()?)?.get()
    }

    /// Keeps a copy of the picture if there is a slot and memory for it: the picture's own memory may have room for a far
    /// larger one, and serves the next.
    fn keep(&self, sample: u64, picture: &Picture) {
        let bytes = picture_bytes(picture);
        let Some(slot) = usize::try_from(sample).ok().and_then(|s| self.slots.get(s)) else { return };
        let take = |free: u64| free.checked_sub(bytes);
        if self.free_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
            && slot.set(Arc::new(picture.packed())).is_err()
        {
            // Another thread was first.
            self.free_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// A picture before its random steps.
enum Prepared {
    Kept(Arc<Picture>),
    Own(Picture),
}

impl std::ops::Deref for Prepared {
    type Target = Picture;

    fn deref(&self) -> &Picture {
        match self {
            Prepared::Kept(picture) => picture,
            Prepared::Own(picture) => picture,
        }
    }
}

/// What a kept picture takes: pixels, fields, and the counts of the `Arc`.
fn picture_bytes(picture: &Picture) -> u64 {
    (picture.height * picture.width * picture.planes() + size_of::<Picture>() + 2 * size_of::<usize>()) as u64
}
