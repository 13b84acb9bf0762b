//! Which request meets which fault.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use updraft_base::Key;

/// What is asked of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    /// Reading an object or a range of one.
    Get,
    /// Asking for an object's facts.
    Head,
    /// Writing an object, or a part of one.
    Put,
    /// Everything about an upload in parts except the parts.
    Multipart,
    /// Deleting an object.
    Delete,
    /// Listing.
    List,
}

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// Refused before anything was done: 503 SlowDown.
    SlowDown,
    /// Refused before anything was done: 500 InternalError.
    InternalError,
    /// Done, but the answer is 500 all the same: the client cannot know.
    AnswerLost,
    /// Never answered; what was asked is done or not, by a coin.
    Stalled,
    /// The connection breaks: half-way through an answer's body, or before the answer to a write that was done.
    Reset,
    /// An answer whose body ends early. Only for reads; other requests are refused with 500.
    Truncated,
    /// An answer that names another version of the object than it has. Only for reads, as above.
    WrongEtag,
    /// Answered correctly, after this many milliseconds.
    Slow(u64),
}

/// How often each fault happens, as parts of 1; the rest of the requests goes well.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FaultRates {
    /// [`Fault::SlowDown`].
    pub slow_down: f64,
    /// [`Fault::InternalError`].
    pub internal_error: f64,
    /// [`Fault::AnswerLost`].
    pub answer_lost: f64,
    /// [`Fault::Stalled`].
    pub stalled: f64,
    /// [`Fault::Reset`].
    pub reset: f64,
    /// [`Fault::Truncated`].
    pub truncated: f64,
    /// [`Fault::WrongEtag`].
    pub wrong_etag: f64,
    /// [`Fault::Slow`].
    pub slow: f64,
    /// How slow a slow answer is.
    pub slow_ms: u64,
}

impl FaultRates {
    /// Every fault, together this part of all requests: errors and breaks in equal shares, stalls a tenth of a share
    /// because each costs the client a whole deadline.
    pub fn all(part: f64) -> FaultRates {
        let share = part / 7.1;
        FaultRates {
            slow_down: share,
            internal_error: share,
            answer_lost: share,
            stalled: share / 10.0,
            reset: share,
            truncated: share,
            wrong_etag: share,
            slow: share,
            slow_ms: 40,
        }
    }
}

/// Which request meets which fault, and a count of those met.
#[derive(Debug)]
pub struct Schedule {
    key: Key,
    rates: FaultRates,
    only: Option<Operation>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    requests: HashMap<(Operation, String), u64>,
    counts: BTreeMap<Fault, u64>,
    total: u64,
}

impl Schedule {
    /// The schedule of a seed.
    pub fn new(seed: u64, rates: FaultRates) -> Schedule {
        Schedule { key: Key::new(seed).child("faults"), rates, only: None, state: Mutex::default() }
    }

    /// The same, but requests of other kinds all go well.
    pub fn only(self, operation: Operation) -> Schedule {
        Schedule { only: Some(operation), ..self }
    }

    /// The fault that the next request of this kind for this object meets.
    pub fn next(&self, operation: Operation, object: &str) -> Option<Fault> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let n = state.requests.entry((operation, object.to_owned())).or_insert(0);
        *n += 1;
        let key = self.key.child(object).child_index(operation as u64);
        let affected = self.only.is_none_or(|only| only == operation);
        let fault = if affected { self.pick(f64::from(key.uniform_f32(*n))) } else { None };
        state.total += 1;
        if let Some(fault) = fault {
            *state.counts.entry(fault).or_insert(0) += 1;
        }
        fault
    }

    /// An even coin for details of a fault, such as whether a stalled write is done.
    pub fn coin(&self, object: &str) -> bool {
        let state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        self.key.child("coin").child(object).bits(state.total) & 1 == 1
    }

    /// How many requests there were.
    pub fn requests(&self) -> u64 {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).total
    }

    /// How often each fault was met.
    pub fn counts(&self) -> BTreeMap<Fault, u64> {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).counts.clone()
    }

    fn pick(&self, mut draw: f64) -> Option<Fault> {
        let rates = &self.rates;
        for (rate, fault) in [
            (rates.slow_down, Fault::SlowDown),
            (rates.internal_error, Fault::InternalError),
            (rates.answer_lost, Fault::AnswerLost),
            (rates.stalled, Fault::Stalled),
            (rates.reset, Fault::Reset),
            (rates.truncated, Fault::Truncated),
            (rates.wrong_etag, Fault::WrongEtag),
            (rates.slow, Fault::Slow(rates.slow_ms)),
        ] {
            if draw < rate {
                return Some(fault);
            }
            draw -= rate;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_each_object_the_same_faults_in_any_order() {
        let (a, b) = (Schedule::new(7, FaultRates::all(0.5)), Schedule::new(7, FaultRates::all(0.5)));
        let keys = ["x", "y", "z"];
        let forward: Vec<_> =
            keys.iter().flat_map(|k| (0..50).map(|_| a.next(Operation::Get, k)).collect::<Vec<_>>()).collect();
        let mut lanes = vec![Vec::new(); 3];
        for _ in 0..50 {
            for (i, key) in keys.iter().enumerate().rev() {
                lanes[i].push(b.next(Operation::Get, key));
            }
        }
        assert_eq!(forward, lanes.concat());
        assert_eq!(a.counts(), b.counts());
    }

    #[test]
    fn faults_are_as_frequent_as_asked() {
        let schedule = Schedule::new(1, FaultRates::all(0.3));
        let n = 20_000;
        for i in 0..n {
            schedule.next(Operation::Put, &format!("object-{}", i % 97));
        }
        let met: u64 = schedule.counts().values().sum();
        // Binomial with p 0.3: the standard deviation is 65, so five of them are 325.
        assert!(met.abs_diff(6_000) < 325, "{met}");
        assert_eq!(schedule.counts().len(), 8);
    }
}
