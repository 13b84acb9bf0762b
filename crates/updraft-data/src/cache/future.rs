//! When objects are needed next: the order of an epoch is known, so the cache need not guess.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::ops::Range;

/// The number of an object in the cache.
pub(super) type ObjectId = u32;

/// An object that is in no known future.
pub(super) const NEVER: u64 = u64::MAX;

/// The uses that are to come, and the objects of each tier by when they are needed next.
#[derive(Default)]
pub(super) struct Future {
    now: u64,
    uses: HashMap<ObjectId, VecDeque<Range<u64>>>,
    ends: BinaryHeap<Reverse<(u64, ObjectId)>>,
    /// Objects with anything in the tier, those needed last at the end.
    tiers: [BTreeSet<(u64, ObjectId)>; 2],
    is_known: bool,
}

impl Future {
    /// Adds a use, which begins no sooner than the object's uses before.
    pub(super) fn expect(&mut self, object: ObjectId, steps: Range<u64>) {
        self.is_known = true;
        if steps.end <= self.now {
            return;
        }
        let before = self.next_use(object);
        let uses = self.uses.entry(object).or_default();
        match uses.back_mut() {
            // Several lanes or windows use it at the same time: one use, as long as the longest.
            Some(last) if steps.start <= last.end => last.end = last.end.max(steps.end),
            _ => uses.push_back(steps.clone()),
        }
        self.ends.push(Reverse((steps.end, object)));
        self.moved(object, before);
    }

    /// All steps before `now` are done.
    pub(super) fn advance(&mut self, now: u64) {
        self.now = self.now.max(now);
        while let Some(Reverse((end, object))) = self.ends.peek().copied().filter(|Reverse((end, _))| *end <= self.now)
        {
            self.ends.pop();
            let before = self.next_use(object);
            if let Some(uses) = self.uses.get_mut(&object) {
                while uses.front().is_some_and(|steps| steps.end <= end) {
                    uses.pop_front();
                }
                if uses.is_empty() {
                    self.uses.remove(&object);
                }
            }
            self.moved(object, before);
        }
    }

    /// Whether any use was ever foreseen.
    pub(super) fn is_known(&self) -> bool {
        self.is_known
    }

    /// The step at which an object is needed next, or before now where it is in use.
    pub(super) fn next_use(&self, object: ObjectId) -> u64 {
        self.uses.get(&object).and_then(VecDeque::front).map_or(NEVER, |steps| steps.start)
    }

    pub(super) fn enter(&mut self, tier: usize, object: ObjectId) {
        self.tiers[tier].insert((self.next_use(object), object));
    }

    pub(super) fn leave(&mut self, tier: usize, object: ObjectId) {
        self.tiers[tier].remove(&(self.next_use(object), object));
    }

    /// The object of a tier that is needed last.
    pub(super) fn furthest(&self, tier: usize) -> Option<(u64, ObjectId)> {
        self.tiers[tier].last().copied()
    }

    fn moved(&mut self, object: ObjectId, before: u64) {
        let after = self.next_use(object);
        for tier in &mut self.tiers {
            if tier.remove(&(before, object)) {
                tier.insert((after, object));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_needed_last_is_known_at_every_step() {
        let mut future = Future::default();
        for object in 0..3 {
            future.enter(0, object);
        }
        assert_eq!(future.furthest(0).map(|f| f.0), Some(NEVER));
        for (object, steps) in [(0, 0..2), (1, 1..4), (2, 3..5), (1, 3..6), (0, 9..10), (2, 7..8), (1, 20..21)] {
            future.expect(object, steps);
        }
        let furthest = |future: &Future| future.furthest(0).unwrap();
        assert_eq!(furthest(&future), (3, 2));
        future.advance(2);
        assert_eq!((furthest(&future), future.next_use(1), future.next_use(0)), ((9, 0), 1, 9));
        // The second use of object 1 went on from the first.
        future.advance(5);
        assert_eq!((future.next_use(1), furthest(&future)), (1, (9, 0)));
        future.advance(6);
        assert_eq!(furthest(&future), (20, 1));
        future.leave(0, 1);
        assert_eq!(furthest(&future), (9, 0));
        future.advance(100);
        assert_eq!(furthest(&future).0, NEVER);
    }
}
