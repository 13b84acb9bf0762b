//! What was asked of a store, how long it took, and what that costs.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::price::RequestPrices;

/// What a request asks; providers price by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RequestClass {
    /// Reading an object or a range.
    Get,
    /// Asking for an object's facts.
    Head,
    /// One page of a listing.
    List,
    /// Writing an object or a part of one.
    Put,
    /// Beginning, completing or aborting an upload in parts.
    Multipart,
    /// Deleting an object.
    Delete,
}

impl RequestClass {
    /// All of them.
    pub const ALL: [RequestClass; 6] = [
        RequestClass::Get,
        RequestClass::Head,
        RequestClass::List,
        RequestClass::Put,
        RequestClass::Multipart,
        RequestClass::Delete,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            RequestClass::Get => "get",
            RequestClass::Head => "head",
            RequestClass::List => "list",
            RequestClass::Put => "put",
            RequestClass::Multipart => "multipart",
            RequestClass::Delete => "delete",
        }
    }
}

/// What a store was asked since it was opened.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MeterReading {
    /// By class, those that were asked at all.
    pub classes: BTreeMap<RequestClass, ClassReading>,
    /// Bytes of objects that arrived: those between coalesced ranges too, and those of answers that were too short or were
    /// asked for again. What came of an answer that broke off, or that a hedge overtook, is not known.
    pub bytes_read: u64,
    /// Bytes of objects that were written.
    pub bytes_written: u64,
    /// Requests that repeated a failed one.
    pub retries: u64,
    /// Reads that were asked a second time because the first answer was late.
    pub hedges: u64,
    /// Second questions that were answered first.
    pub hedges_won: u64,
    /// What the requests cost by the list prices in [`prices`](MeterReading::prices), in millionths of a US dollar, rounded
    /// up; traffic and storage are not in it. Unknown where the prices are.
    pub cost_micro_usd: Option<u64>,
    /// The prices behind the cost.
    pub prices: Option<RequestPrices>,
}

impl MeterReading {
    /// All requests.
    pub fn requests(&self) -> u64 {
        self.classes.values().map(|c| c.requests).sum()
    }
}

/// Requests of one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClassReading {
    /// How many were sent, repetitions and hedges too.
    pub requests: u64,
    /// How many of them failed; an answer that an object does not exist is no failure.
    pub failed: u64,
    /// Half of the recent requests took at most this long.
    pub latency_us_p50: u64,
    /// 95 % of the recent requests took at most this long.
    pub latency_us_p95: u64,
    /// 99 % of the recent requests took at most this long.
    pub latency_us_p99: u64,
}

/// Recent latencies that are kept of each class: enough for a steady 99th percentile, few enough to follow a change.
const WINDOW: usize = 1024;

/// A percentile of fewer latencies says nothing.
const HEDGE_SAMPLES_MIN: usize = 32;

/// Bounds of the size classes within which latencies of reads are comparable.
const SIZE_BOUNDS_BYTES: [u64; 3] = [64 << 10, 1 << 20, 8 << 20];

#[derive(Debug, Default)]
pub(super) struct Meter {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    classes: BTreeMap<RequestClass, ClassState>,
    bytes_read: u64,
    bytes_written: u64,
    retries: u64,
    hedges: u64,
    hedges_won: u64,
}

#[derive(Debug, Default)]
struct ClassState {
    requests: u64,
    failed: u64,
    latencies: [Window; SIZE_BOUNDS_BYTES.len() + 1],
}

/// A ring of latencies in microseconds.
#[derive(Debug, Default)]
struct Window {
    latencies_us: Vec<u64>,
    next: usize,
}

impl Window {
    fn push(&mut self, latency_us: u64) {
        if self.latencies_us.len() < WINDOW {
            self.latencies_us.push(latency_us);
        } else {
            self.latencies_us[self.next] = latency_us;
            self.next = (self.next + 1) % WINDOW;
        }
    }
}

/// The nearest-rank percentile; zero of nothing.
fn percentile(latencies_us: &mut [u64], percent: usize) -> u64 {
    if latencies_us.is_empty() {
        return 0;
    }
    let rank = (latencies_us.len() * percent).div_ceil(100).max(1) - 1;
    *latencies_us.select_nth_unstable(rank).1
}

fn size_class(bytes: u64) -> usize {
    SIZE_BOUNDS_BYTES.iter().take_while(|&&bound| bytes > bound).count()
}

impl Meter {
    pub(super) fn sent(&self, class: RequestClass) {
        self.with(|state| state.classes.entry(class).or_default().requests += 1);
    }

    pub(super) fn answered(&self, class: RequestClass, bytes: u64, latency_us: u64, failed: bool) {
        self.with(|state| {
            let class = state.classes.entry(class).or_default();
            if failed {
                class.failed += 1;
            } else {
                class.latencies[size_class(bytes)].push(latency_us);
            }
        });
    }

    pub(super) fn read(&self, bytes: u64) {
        self.with(|state| state.bytes_read += bytes);
    }

    pub(super) fn written(&self, bytes: u64) {
        self.with(|state| state.bytes_written += bytes);
    }

    pub(super) fn retried(&self) {
        self.with(|state| state.retries += 1);
    }

    pub(super) fn hedge_won(&self) {
        self.with(|state| state.hedges_won += 1);
    }

    /// After how many microseconds a read of this size is late, if that is known yet.
    pub(super) fn late_us(&self, class: RequestClass, bytes: u64) -> Option<u64> {
        self.with(|state| {
            let window = &state.classes.get(&class)?.latencies[size_class(bytes)];
            let mut recent = window.latencies_us.clone();
            (recent.len() >= HEDGE_SAMPLES_MIN).then(|| percentile(&mut recent, 95))
        })
    }

    /// Counts one more hedge, unless a tenth of all reads were hedged: then the store is slow as a whole, and asking twice
    /// would only make it slower.
    pub(super) fn may_hedge(&self) -> bool {
        self.with(|state| {
            let reads = |class| state.classes.get(&class).map_or(0, |c: &ClassState| c.requests);
            let allowed = state.hedges * 10 < reads(RequestClass::Get) + reads(RequestClass::Head);
            state.hedges += u64::from(allowed);
            allowed
        })
    }

    pub(super) fn reading(&self, prices: Option<&RequestPrices>) -> MeterReading {
        self.with(|state| {
            let classes: BTreeMap<RequestClass, ClassReading> = state
                .classes
                .iter()
                .map(|(class, of)| {
                    let mut recent: Vec<u64> =
                        of.latencies.iter().flat_map(|w| w.latencies_us.iter().copied()).collect();
                    let reading = ClassReading {
                        requests: of.requests,
                        failed: of.failed,
                        latency_us_p50: percentile(&mut recent, 50),
                        latency_us_p95: percentile(&mut recent, 95),
                        latency_us_p99: percentile(&mut recent, 99),
                    };
                    (*class, reading)
                })
                .collect();
            let cost_micro_usd = prices.and_then(|p| p.cost_micro_usd(&classes));
            MeterReading {
                classes,
                bytes_read: state.bytes_read,
                bytes_written: state.bytes_written,
                retries: state.retries,
                hedges: state.hedges,
                hedges_won: state.hedges_won,
                cost_micro_usd,
                prices: prices.cloned(),
            }
        })
    }

    /// A panic while counting would leave counts that are still counts.
    fn with<T>(&self, use_state: impl FnOnce(&mut State) -> T) -> T {
        use_state(&mut self.state.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let mut latencies: Vec<u64> = (1..=100).rev().collect();
        assert_eq!([50, 95, 99, 100].map(|p| percentile(&mut latencies, p)), [50, 95, 99, 100]);
        assert_eq!(percentile(&mut [7], 95), 7);
    }

    #[test]
    fn a_read_is_late_after_the_95th_percentile_of_reads_of_its_size() {
        let meter = Meter::default();
        for latency_us in 1..=100 {
            meter.answered(RequestClass::Get, 100, latency_us, false);
            meter.answered(RequestClass::Get, 2 << 20, 1000 * latency_us, false);
        }
        assert_eq!(meter.late_us(RequestClass::Get, 5), Some(95));
        assert_eq!(meter.late_us(RequestClass::Get, 3 << 20), Some(95_000));
        assert_eq!(meter.late_us(RequestClass::Get, 1 << 30), None, "nothing is known of such sizes");
        assert_eq!(meter.late_us(RequestClass::Head, 0), None);
    }

    #[test]
    fn at_most_a_tenth_of_reads_is_hedged() {
        let meter = Meter::default();
        let mut hedged = 0;
        for _ in 0..1000 {
            meter.sent(RequestClass::Get);
            hedged += u64::from(meter.may_hedge());
        }
        assert_eq!((hedged, meter.reading(None).hedges), (100, 100));
    }
}
