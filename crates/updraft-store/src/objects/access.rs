//! The one retry loop: every request to every store passes through it.
//!
//! The crate `object_store` has a loop of its own, which is switched off. It repeats below the signature, so a repeated
//! request may carry a stale date; it neither sees bodies that end early, nor hedges, nor tells the caller that an earlier
//! attempt may have been done, without which a repeated conditional write cannot be answered correctly.

use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::{Either, select};
use object_store::Error;
use object_store::client::HttpError;
use tokio::sync::{Semaphore, SemaphorePermit};
use updraft_base::{Clock, Key, SystemClock};

use super::meter::{Meter, RequestClass};
use super::options::AccessOptions;
use super::wire::{Answer, watched};

/// No read counts as late before this: below, the second request would come from the client's own jitter.
const HEDGE_US_MIN: u64 = 10_000;

/// The services that hand out credentials inside the clouds. Outside, asking them again does not help.
pub(super) const METADATA_HOSTS: [&str; 4] =
    ["169.254.169.254", "169.254.170.2", "metadata.google.internal", "metadata"];

/// Sends requests, again where that may help, and counts them.
#[derive(Debug)]
pub(super) struct Access {
    pub(super) options: AccessOptions,
    pub(super) meter: Meter,
    pub(super) clock: SystemClock,
    /// Local folders answer at once, truthfully and without a runtime: nothing is repeated.
    direct: bool,
    permits: Semaphore,
    jitter: Key,
    draws: AtomicU64,
}

/// Why one attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// What the store says.
    Store(Error),
    /// No answer in time.
    Deadline { timeout_ms: u64 },
    /// A body that is not as long as announced.
    Truncated { expected: u64, found: u64 },
    /// An answer of another version than was asked for.
    Version { expected: String, found: String },
}

/// Why a request failed for good.
#[derive(Debug)]
pub(super) struct Exhausted {
    pub(super) class: RequestClass,
    pub(super) failure: Failure,
    pub(super) answer: Answer,
    /// Where it is more than one, an attempt before the last may have been done although its answer said otherwise.
    pub(super) attempts: u32,
    pub(super) elapsed_ms: u64,
}

impl Access {
    pub(super) fn new(options: &AccessOptions, direct: bool) -> Access {
        Access {
            options: options.clone(),
            meter: Meter::default(),
            clock: SystemClock::new(),
            direct,
            permits: Semaphore::new(options.concurrency.max(1)),
            jitter: Key::new(options.jitter_seed).child("retries"),
            draws: AtomicU64::new(0),
        }
    }

    /// Sends a request until it is answered, for as long as repeating may help. `bytes` is the length of the body that goes
    /// or comes.
    pub(super) async fn request<T>(
        &self,
        class: RequestClass,
        bytes: u64,
        send: impl AsyncFn() -> Result<T, Failure>,
    ) -> Result<T, Exhausted> {
        let start_ns = self.clock.monotonic_ns();
        let mut attempts = 1;
        loop {
            let (result, answer) = match self.direct {
                true => self.counted(class, bytes, async { (send().await, Answer::default()) }).await,
                false => self.hedged(class, bytes, &send).await,
            };
            let failure = match result {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            let again =
                !self.direct && may_help(class, &failure, &answer, attempts) && attempts <= self.options.retries;
            if !again {
                let elapsed_ms = (self.clock.monotonic_ns() - start_ns) / 1_000_000;
                return Err(Exhausted { class, failure, answer, attempts, elapsed_ms });
            }
            let wait_ms = self.backoff_ms(attempts).max(answer.retry_after_ms.unwrap_or(0));
            tokio::time::sleep(Duration::from_millis(wait_ms.min(self.options.backoff_ms_max))).await;
            self.meter.retried();
            attempts += 1;
        }
    }

    /// One attempt; a read that is late is asked a second time, and the first good answer counts.
    async fn hedged<T>(
        &self,
        class: RequestClass,
        bytes: u64,
        send: &impl AsyncFn() -> Result<T, Failure>,
    ) -> (Result<T, Failure>, Answer) {
        let mut first = pin!(self.within_deadline(class, bytes, self.permit().await, send));
        let reads = matches!(class, RequestClass::Get | RequestClass::Head);
        let late_us = (reads && self.options.hedge).then(|| self.meter.late_us(class, bytes)).flatten();
        let Some(late_us) = late_us else { return first.await };
        let late = pin!(tokio::time::sleep(Duration::from_micros(late_us.max(HEDGE_US_MIN))));
        if let Either::Left((done, _)) = select(first.as_mut(), late).await {
            return done;
        }
        // Without a free place the delay is our own, and a hedge would add to it.
        let Ok(permit) = self.permits.try_acquire() else { return first.await };
        if !self.meter.may_hedge() {
            return first.await;
        }
        let second = pin!(self.within_deadline(class, bytes, Some(permit), send));
        match select(first, second).await {
            Either::Left(((Err(_), _), second)) => second.await,
            Either::Left((done, _)) => done,
            Either::Right(((Err(_), _), first)) => first.await,
            Either::Right((done, _)) => {
                self.meter.hedge_won();
                done
            }
        }
    }

    async fn within_deadline<T>(
        &self,
        class: RequestClass,
        bytes: u64,
        _permit: Option<SemaphorePermit<'_>>,
        send: &impl AsyncFn() -> Result<T, Failure>,
    ) -> (Result<T, Failure>, Answer) {
        let body_ms = bytes.saturating_mul(1000) / self.options.bytes_per_s_min.max(1);
        let timeout_ms = self.options.timeout_ms.saturating_add(body_ms);
        let watch = watched(async {
            match tokio::time::timeout(Duration::from_millis(timeout_ms), send()).await {
                Ok(result) => result,
                Err(_) => Err(Failure::Deadline { timeout_ms }),
            }
        });
        self.counted(class, bytes, watch).await
    }

    async fn counted<T>(
        &self,
        class: RequestClass,
        bytes: u64,
        attempt: impl Future<Output = (Result<T, Failure>, Answer)>,
    ) -> (Result<T, Failure>, Answer) {
        self.meter.sent(class);
        let start_ns = self.clock.monotonic_ns();
        let (result, answer) = attempt.await;
        let failed = matches!(&result, Err(failure) if !failure.is_answer());
        self.meter.answered(class, bytes, (self.clock.monotonic_ns() - start_ns) / 1000, failed);
        (result, answer)
    }

    async fn permit(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        self.permits.acquire().await.ok()
    }

    /// Drawn evenly from zero to a bound that doubles with each attempt ("full jitter": Brooker, "Exponential Backoff And
    /// Jitter", AWS Architecture Blog 2015).
    fn backoff_ms(&self, attempts: u32) -> u64 {
        let bound = self.options.backoff_ms.saturating_mul(1 << (attempts - 1).min(20));
        let draw = self.draws.fetch_add(1, Ordering::Relaxed);
        self.jitter.below(draw, bound.min(self.options.backoff_ms_max) + 1)
    }
}

impl Failure {
    /// Whether it is an answer about the object rather than a failure to get one.
    fn is_answer(&self) -> bool {
        matches!(
            self,
            Failure::Store(
                Error::NotFound { .. }
                    | Error::AlreadyExists { .. }
                    | Error::Precondition { .. }
                    | Error::NotModified { .. }
            )
        )
    }

    /// Whether a range begins after the object: refused by the server, or found out by the crate from the length in the
    /// answer, for which its error has no type that can be named.
    pub(super) fn is_past_the_end(&self, answer: &Answer) -> bool {
        answer.status == Some(416)
            || matches!(self, Failure::Store(error @ Error::Generic { .. })
                if error.to_string().contains("Wanted range starting at"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Store(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Store(error) => error.fmt(f),
            Failure::Deadline { timeout_ms } => write!(f, "no answer within {timeout_ms} ms"),
            Failure::Truncated { expected, found } => {
                write!(f, "the answer ended after {found} of {expected} bytes")
            }
            Failure::Version { expected, found } => {
                write!(f, "the answer was of version {found}, not {expected}")
            }
        }
    }
}

/// Whether the same request may succeed later.
fn may_help(class: RequestClass, failure: &Failure, answer: &Answer, attempts: u32) -> bool {
    let error = match failure {
        Failure::Store(error) => error,
        Failure::Deadline { .. } | Failure::Truncated { .. } | Failure::Version { .. } => return true,
    };
    if failure.is_past_the_end(answer) {
        return false;
    }
    if METADATA_HOSTS.contains(&answer.host.as_str()) {
        return attempts == 1;
    }
    match (error, answer.status) {
        // S3 says so while another conditional write of the object is under way; who won is known only later.
        (Error::AlreadyExists { .. } | Error::Precondition { .. } | Error::Generic { .. }, Some(409)) => {
            answer.code.as_deref() == Some("ConditionalRequestConflict")
        }
        (Error::Generic { .. }, Some(status)) => {
            // What a server has no code for it does not get meanwhile.
            (status >= 500 && !matches!(status, 501 | 505))
                || matches!(status, 408 | 429)
                // A body that did not arrive in time is a bad request to S3.
                || answer.code.as_deref() == Some("RequestTimeout")
        }
        // Headers that are missing or wrong may be a fault once; twice they are how the server is.
        (Error::Generic { .. }, None)
            if matches!(class, RequestClass::Get | RequestClass::Head) && answer.is_success && !is_of_http(error) =>
        {
            attempts <= 2
        }
        // No answer at all, or one that ended early.
        (Error::Generic { .. } | Error::JoinError { .. }, None) => true,
        _ => false,
    }
}

/// Whether the connection was to blame.
fn is_of_http(error: &Error) -> bool {
    std::iter::successors(std::error::Error::source(error), |cause| cause.source()).any(|cause| cause.is::<HttpError>())
}
