//! One allocation for all intermediate values: each gets an offset such that values alive at the same time are apart.
//!
//! Lifetimes are intervals of steps. Values are placed from the largest to the smallest, each in the tightest gap among those already
//! placed whose lifetimes meet its own (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference",
//! 2020, greedy by size).

use crate::cpu::step::{Place, Span, Step, Storage, StorageId};

/// Offsets are multiples of this: a cache line, and the widest vector.
pub(crate) const ALIGNMENT_BYTES: usize = 64;

/// First and last step that touch a storage.
#[derive(Debug, Clone, Copy)]
struct Lifetime {
    first: usize,
    last: usize,
}

/// What must outlive the steps: storages read after the last one, and the state storages that updates may replace.
pub(crate) struct Ends<'a> {
    pub(crate) outputs: &'a [StorageId],
    /// For each state tensor, the storage of its next value.
    pub(crate) states: &'a [Option<StorageId>],
}

/// Places every arena storage, puts outputs of steps over their inputs where allowed, and returns the arena's size.
pub(crate) fn place(storages: &mut [Storage], steps: &mut [Step], ends: &Ends) -> usize {
    update_in_place(storages, steps, ends);
    let lifetimes = lifetimes(storages, steps, ends);
    let mut order: Vec<StorageId> = (0..storages.len())
        .filter(|s| matches!(storages[*s].place, Place::Arena(_)) && lifetimes[*s].is_some())
        .collect();
    order.sort_by_key(|s| (std::cmp::Reverse(storages[*s].bytes), *s));
    let mut placed: Vec<(usize, usize, Lifetime)> = Vec::new();
    let mut arena_bytes = 0;
    for storage in order {
        let Some(life) = lifetimes[storage] else { continue };
        let bytes = storages[storage].bytes.next_multiple_of(ALIGNMENT_BYTES);
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|(_, _, other)| other.first <= life.last && life.first <= other.last)
            .map(|(start, end, _)| (*start, *end))
            .collect();
        taken.sort_unstable();
        let mut best: Option<(usize, usize)> = None;
        let mut at = 0;
        for (start, end) in taken {
            if start >= at + bytes && best.is_none_or(|(gap, _)| start - at < gap) {
                best = Some((start - at, at));
            }
            at = at.max(end);
        }
        let offset = best.map_or(at, |(_, offset)| offset);
        storages[storage].place = Place::Arena(offset);
        placed.push((offset, offset + bytes, life));
        arena_bytes = arena_bytes.max(offset + bytes);
    }
    debug_assert!(apart(&placed), "values alive at the same time overlap in the arena");
    arena_bytes
}

/// Whether no two values that are alive at the same time share a byte.
fn apart(placed: &[(usize, usize, Lifetime)]) -> bool {
    placed.iter().enumerate().all(|(i, (start, end, life))| {
        placed[i + 1..].iter().all(|(s, e, l)| e <= start || end <= s || l.last < life.first || life.last < l.first)
    })
}

/// Who a storage's memory belongs to.
pub(crate) fn root(storages: &[Storage], mut storage: StorageId) -> StorageId {
    while let Place::Alias(other) = storages[storage].place {
        storage = other;
    }
    storage
}

fn lifetimes(storages: &[Storage], steps: &[Step], ends: &Ends) -> Vec<Option<Lifetime>> {
    let mut out: Vec<Option<Lifetime>> = vec![None; storages.len()];
    let mut touch = |storage: StorageId, step: usize| {
        let life = out[root(storages, storage)].get_or_insert(Lifetime { first: step, last: step });
        life.first = life.first.min(step);
        life.last = life.last.max(step);
    };
    for (at, step) in steps.iter().enumerate() {
        for span in step.inputs.iter().chain(&step.outputs).flatten() {
            touch(span.storage, at);
        }
    }
    for storage in ends.outputs.iter().chain(ends.states.iter().flatten()) {
        touch(*storage, steps.len());
    }
    out
}

/// Lets outputs lie where inputs do, where the kernel can, nobody reads the input later, and it is the caller's to
/// overwrite: a value of the arena, or a state tensor whose next value the output is.
fn update_in_place(storages: &mut [Storage], steps: &mut [Step], ends: &Ends) {
    let mut last_read = vec![0usize; storages.len()];
    let mut reads_in_step = |steps: &[Step]| {
        for (at, step) in steps.iter().enumerate() {
            for span in step.inputs.iter().flatten() {
                last_read[span.storage] = at;
            }
        }
    };
    reads_in_step(steps);
    for storage in ends.outputs {
        last_read[*storage] = steps.len();
    }
    for at in 0..steps.len() {
        for (output, input) in std::mem::take(&mut steps[at].in_place) {
            let (Some(Some(out)), Some(Some(source))) = (steps[at].outputs.get(output), steps[at].inputs.get(input))
            else {
                continue;
            };
            let (out, source) = (*out, *source);
            let whole = |span: Span| span.offset_bytes == 0 && span.bytes == storages[span.storage].bytes;
            let uses = steps[at].inputs.iter().flatten().filter(|s| s.storage == source.storage).count();
            if !whole(out) || !whole(source) || out.bytes != source.bytes || uses != 1 {
                continue;
            }
            if last_read[source.storage] != at || !matches!(storages[out.storage].place, Place::Arena(_)) {
                continue;
            }
            let owner = root(storages, source.storage);
            let allowed = match storages[owner].place {
                // The next value of a state is read after the run, so it keeps memory of its own.
                Place::Arena(_) => !ends.states.contains(&Some(source.storage)),
                Place::State(state) => ends.states.get(state).copied().flatten() == Some(out.storage),
                _ => false,
            };
            if allowed {
                storages[out.storage].place = Place::Alias(source.storage);
                steps[at].inputs[input] = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_is_noticed() {
        let life = |first, last| Lifetime { first, last };
        assert!(apart(&[(0, 64, life(0, 1)), (0, 64, life(2, 3)), (64, 128, life(0, 3))]));
        assert!(!apart(&[(0, 64, life(0, 1)), (32, 96, life(1, 2))]));
    }
}
