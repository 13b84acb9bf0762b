//! From a failed request to an error that says what to do.

use object_store::Error;
use updraft_base::Clock;

use super::access::{Exhausted, Failure};
use super::meter::RequestClass;
use super::open::{Backend, Provider};

/// Why requests to a store failed, for good.
#[derive(Debug, thiserror::Error)]
#[error("{reason} ({attempts} {attempt_noun} in {elapsed_ms} ms)", attempt_noun = if *attempts == 1 { "attempt" } else { "attempts" })]
pub struct AccessError {
    /// What the last attempt met.
    pub reason: String,
    /// What may mend it.
    pub hint: Option<String>,
    /// How often it was tried.
    pub attempts: u32,
    /// How long that took.
    pub elapsed_ms: u64,
}

/// A request is signed with the time; the providers accept this much difference.
const CLOCK_SKEW_MS_MAX: u64 = 5 * 60 * 1000;

/// The error of a failed request, with advice by what the server said.
pub(super) fn diagnose(backend: &Backend, clock: &dyn Clock, exhausted: &Exhausted) -> AccessError {
    let answer = &exhausted.answer;
    let mut reason = match (answer.status, &answer.code, &answer.message) {
        (Some(status), Some(code), Some(message)) => format!("{} answered {status} {code}: {message}", answer.host),
        (Some(status), Some(code), None) => format!("{} answered {status} {code}", answer.host),
        (Some(status), None, _) => format!("{} answered {status}", answer.host),
        (None, ..) => chain(&exhausted.failure),
    };
    // The whole cause of an answer without a body, such as that of a HEAD, is its number.
    if reason.len() > 600 {
        reason.truncate(reason.floor_char_boundary(600));
        reason.push('…');
    }
    AccessError {
        reason,
        hint: hint(backend, clock, exhausted),
        attempts: exhausted.attempts,
        elapsed_ms: exhausted.elapsed_ms,
    }
}

fn hint(backend: &Backend, clock: &dyn Clock, exhausted: &Exhausted) -> Option<String> {
    let answer = &exhausted.answer;
    let code = answer.code.as_deref().unwrap_or_default();
    let region = "the setting `region` or AWS_REGION";
    if let Some(skew) = clock_skew(clock, exhausted) {
        return Some(skew);
    }
    if is_metadata_host(&answer.host) || chain(&exhausted.failure).contains("169.254.169.254") {
        return Some(format!("no credentials were found: tried {}", backend.credentials.join("; ")));
    }
    if backend.provider == Provider::Http
        && let Some(hint) = http_hint(exhausted)
    {
        return Some(hint.into());
    }
    match (code, answer.status) {
        ("NoSuchBucket" | "ContainerNotFound", _) => Some(format!("the bucket of {} does not exist", backend.url)),
        ("PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException", _)
        | (_, Some(301)) => Some(match &answer.region {
            Some(of) => format!("the bucket is in {of}: set {region} to it"),
            None => format!("the bucket is in another region: set {region}"),
        }),
        ("InvalidAccessKeyId", _) => Some("the provider does not know this access key".into()),
        ("SignatureDoesNotMatch", _) => Some("the secret key is not that of the access key".into()),
        ("ExpiredToken" | "TokenRefreshRequired" | "InvalidToken", _) => {
            Some("the credentials have expired: get new ones".into())
        }
        ("SlowDown" | "ServerBusy" | "TooManyRequests", _) | (_, Some(429)) => {
            Some("the store asks for fewer requests: lower `concurrency`, or spread keys over more prefixes".into())
        }
        (_, Some(401 | 403)) => Some(format!(
            "the credentials may not do this; they were looked for in: {}",
            backend.credentials.join("; ")
        )),
        (_, None)
            if matches!(exhausted.failure, Failure::Store(Error::Generic { .. }))
                && !answer.host.is_empty()
                && !answer.is_success =>
        {
            Some(format!("is {} the right address, and can this machine reach it?", answer.host))
        }
        _ => None,
    }
}

/// What a web server that is no object store lacks.
fn http_hint(exhausted: &Exhausted) -> Option<&'static str> {
    match (exhausted.class, &exhausted.failure, exhausted.answer.status) {
        (RequestClass::List, _, Some(400..=499 | 501)) => {
            Some("this web server does not list what it has: give the address of one file")
        }
        (RequestClass::Put | RequestClass::Multipart | RequestClass::Delete, _, Some(400..=499 | 501)) => {
            Some("this web server only gives files: write to a folder or an object store")
        }
        (RequestClass::Get, Failure::Store(Error::NotSupported { .. }), _) => Some(
            "this web server gives files only as a whole, and parts are needed: download the file, and give its path",
        ),
        (_, _, Some(401 | 403)) => Some("this web server does not give it to everybody"),
        _ => None,
    }
}

/// Clocks that differ, by the server's word or by its date.
fn clock_skew(clock: &dyn Clock, exhausted: &Exhausted) -> Option<String> {
    let answer = &exhausted.answer;
    let refused = matches!(answer.status, Some(400 | 401 | 403));
    let named = answer.code.as_deref() == Some("RequestTimeTooSkewed");
    let here_ms = clock.now_unix_ms();
    let skew_ms = answer.server_unix_ms.map_or(0, |server_ms| here_ms.abs_diff(server_ms));
    let seen = refused && skew_ms > CLOCK_SKEW_MS_MAX;
    if !named && !seen {
        return None;
    }
    let server_ms = answer.server_unix_ms.unwrap_or(here_ms);
    let side = if here_ms < server_ms { "behind" } else { "ahead of" };
    Some(format!(
        "the clock of this machine is {} min {side} the server's, and signatures carry the time: set the clock (NTP)",
        skew_ms / 60_000
    ))
}

fn is_metadata_host(host: &str) -> bool {
    super::access::METADATA_HOSTS.contains(&host)
}

/// An error with its causes, without those that only repeat what was said.
pub(super) fn chain(failure: &Failure) -> String {
    let mut text = failure.to_string();
    let Failure::Store(error) = failure else { return text };
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use updraft_base::FakeClock;

    use super::super::wire::Answer;
    use super::*;

    fn error(answer: Answer) -> AccessError {
        let settings = BTreeMap::from([("access_key_id", "k"), ("secret_access_key", "s")])
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect();
        let backend = super::super::open::open("s3://bucket", &settings).unwrap();
        let failure = Failure::Store(Error::Generic { store: "S3", source: "refused".into() });
        let exhausted = Exhausted { class: RequestClass::Get, failure, answer, attempts: 1, elapsed_ms: 5 };
        diagnose(&backend, &FakeClock::at_unix_ms(10_000_000), &exhausted)
    }

    #[test]
    fn a_clock_that_is_wrong_is_named_as_such() {
        let answer = Answer {
            status: Some(403),
            code: Some("RequestTimeTooSkewed".into()),
            server_unix_ms: Some(10_000_000 + 17 * 60_000),
            ..Answer::default()
        };
        let hint = error(answer.clone()).hint.unwrap();
        assert!(hint.contains("17 min behind"), "{hint}");
        // Without a body, as in the answer to a HEAD, the date is enough.
        let hint = error(Answer { code: None, ..answer.clone() }).hint.unwrap();
        assert!(hint.contains("17 min behind"), "{hint}");
        let hint = error(Answer { code: None, server_unix_ms: Some(10_000_000), ..answer }).hint.unwrap();
        assert!(hint.contains("AWS_ACCESS_KEY_ID"), "{hint}");
    }

    #[test]
    fn a_bucket_elsewhere_says_where() {
        let answer = Answer { status: Some(301), region: Some("eu-west-3".into()), ..Answer::default() };
        assert!(error(answer).hint.unwrap().contains("eu-west-3"));
    }
}
