//! Time as something handed in, so that whatever waits or stamps can be tested without waiting.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Wall time, elapsed time and waiting.
pub trait Clock: Send + Sync {
    /// Milliseconds since 1970-01-01T00:00:00Z; may jump when the machine's clock is set.
    fn now_unix_ms(&self) -> u64;

    /// Nanoseconds since some fixed moment; never runs backwards.
    fn monotonic_ns(&self) -> u64;

    /// Waits.
    fn sleep_ms(&self, duration_ms: u64);
}

/// The machine's clock. [`monotonic_ns`](Clock::monotonic_ns) counts from [`SystemClock::new`].
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    #[allow(clippy::new_without_default, reason = "a default that reads the clock would be ambient time")]
    #[allow(clippy::disallowed_methods, reason = "the one place that reads it")]
    pub fn new() -> SystemClock {
        SystemClock { start: Instant::now() }
    }
}

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods, reason = "the one place that reads it")]
    fn now_unix_ms(&self) -> u64 {
        // A machine set to a date before 1970 reports 1970.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn monotonic_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    #[allow(clippy::disallowed_methods, reason = "the one place that waits")]
    fn sleep_ms(&self, duration_ms: u64) {
        std::thread::sleep(Duration::from_millis(duration_ms));
    }
}

/// A clock that moves only when told to; sleeping moves it at once.
#[derive(Debug, Default)]
pub struct FakeClock {
    start_unix_ms: u64,
    elapsed_ns: AtomicU64,
}

impl FakeClock {
    /// A clock that stands at this wall time, with monotonic time zero.
    pub fn at_unix_ms(start_unix_ms: u64) -> FakeClock {
        FakeClock { start_unix_ms, elapsed_ns: AtomicU64::new(0) }
    }

    /// Moves both times forward.
    pub fn advance_ns(&self, duration_ns: u64) {
        self.elapsed_ns.fetch_add(duration_ns, Ordering::SeqCst);
    }
}

impl Clock for FakeClock {
    fn now_unix_ms(&self) -> u64 {
        self.start_unix_ms + self.monotonic_ns() / 1_000_000
    }

    fn monotonic_ns(&self) -> u64 {
        self.elapsed_ns.load(Ordering::SeqCst)
    }

    fn sleep_ms(&self, duration_ms: u64) {
        self.advance_ns(duration_ms.saturating_mul(1_000_000));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fake_clock_moves_only_when_told() {
        let clock = FakeClock::at_unix_ms(5_000);
        assert_eq!((clock.now_unix_ms(), clock.monotonic_ns()), (5_000, 0));
        clock.sleep_ms(250);
        clock.advance_ns(1_500_000);
        assert_eq!((clock.now_unix_ms(), clock.monotonic_ns()), (5_251, 251_500_000));
    }

    #[test]
    fn the_system_clock_runs_forward_through_a_sleep() {
        let clock = SystemClock::new();
        let before_ns = clock.monotonic_ns();
        clock.sleep_ms(2);
        assert!(clock.monotonic_ns() - before_ns >= 2_000_000);
        // 2020-01-01; a machine set earlier than this project is set wrongly.
        assert!(clock.now_unix_ms() > 1_577_836_800_000);
    }
}
