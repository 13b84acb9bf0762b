//! What a server answered, as far as the crate `object_store` hides it.
//!
//! Its errors carry a status and the server's own error code only as text. This connector stands between it and the HTTP
//! client and keeps both of the last answer, so that retries are decided and advice is given by fact. The answer is kept
//! for the asynchronous task that asked, so requests side by side do not see each other's.

use std::cell::RefCell;

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};

/// Of an error's body, no more than this is looked at.
const ERROR_BODY_BYTES_MAX: usize = 64 << 10;

tokio::task_local! {
    static ANSWER: RefCell<Answer>;
}

/// What the last answer of a server said besides success.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Answer {
    /// The host that was asked.
    pub(super) host: String,
    /// The HTTP status of a refusal; `None` where no answer came, and where it was a good one.
    pub(super) status: Option<u16>,
    /// Whether the status was a good one. What is wrong then is wrong with the rest of the answer.
    pub(super) is_success: bool,
    /// The server's own name of the error, such as `SlowDown`.
    pub(super) code: Option<String>,
    /// What the server says for people.
    pub(super) message: Option<String>,
    /// The server's clock.
    pub(super) server_unix_ms: Option<u64>,
    /// How long the server wants to be left alone.
    pub(super) retry_after_ms: Option<u64>,
    /// The region that a bucket is really in.
    pub(super) region: Option<String>,
}

/// Runs a request and gives what the server answered along.
pub(super) async fn watched<T>(request: impl Future<Output = T>) -> (T, Answer) {
    ANSWER
        .scope(RefCell::default(), async {
            let result = request.await;
            (result, ANSWER.with(|answer| answer.take()))
        })
        .await
}

/// Connects as the crate does by default, and keeps what is answered.
#[derive(Debug, Default)]
pub(super) struct WatchingConnector(ReqwestConnector);

impl HttpConnector for WatchingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        // Fails where another part of the program has chosen already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(HttpClient::new(Watching(self.0.connect(options)?)))
    }
}

#[derive(Debug)]
struct Watching(HttpClient);

#[async_trait]
impl HttpService for Watching {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut answer = Answer { host: request.uri().host().unwrap_or_default().to_owned(), ..Answer::default() };
        keep(&answer);
        let response = self.0.execute(request).await?;
        if response.status().is_success() {
            answer.is_success = true;
            keep(&answer);
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
        answer.status = Some(parts.status.as_u16());
        answer.server_unix_ms = header("date").and_then(http_date_unix_ms);
        answer.retry_after_ms =
            header("retry-after").and_then(|s| s.parse::<u64>().ok()).map(|s| s.saturating_mul(1000));
        answer.region = header("x-amz-bucket-region").map(str::to_owned);
        answer.code = header("x-ms-error-code").map(str::to_owned);
        let body = body.bytes().await?;
        if body.len() > ERROR_BODY_BYTES_MAX {
            let size = std::io::Error::other(format!("an error message of {} bytes", body.len()));
            return Err(HttpError::new(HttpErrorKind::Decode, size));
        }
        let text = String::from_utf8_lossy(&body);
        answer.code = answer.code.or_else(|| element(&text, "Code"));
        answer.message = element(&text, "Message");
        answer.region = answer.region.or_else(|| element(&text, "Region"));
        keep(&answer);
        Ok(HttpResponse::from_parts(parts, body.into()))
    }
}

fn keep(answer: &Answer) {
    // Outside of `watched` nobody asks.
    let _ = ANSWER.try_with(|kept| kept.replace(answer.clone()));
}

/// The text of the first element of this name in an error's XML, which is flat.
fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The moment of an HTTP date, `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7).
fn http_date_unix_ms(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split(' ').collect();
    let [_, day, month, year, time, "GMT"] = words[..] else { return None };
    let day: u64 = day.parse().ok()?;
    let month = MONTHS.iter().position(|m| *m == month)? as u64 + 1;
    let year: u64 = year.parse().ok().filter(|y| (1970..10_000).contains(y))?;
    let mut clock = time.split(':').map(|n| n.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    // Days since 1970-01-01 with years that begin in March, so that the leap day comes last.
    let shifted_year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day.checked_sub(1)?;
    let days = 365 * shifted_year + shifted_year / 4 - shifted_year / 100 + shifted_year / 400 + day_of_year;
    let days = days.checked_sub(719_468)?;
    Some((((days * 24 + hour) * 60 + minute) * 60 + second) * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_dates_are_moments() {
        assert_eq!(http_date_unix_ms("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777_000));
        assert_eq!(http_date_unix_ms("Thu, 29 Feb 2024 00:00:00 GMT"), Some(1_709_164_800_000));
        assert_eq!(http_date_unix_ms("Thu, 01 Jan 1970 00:00:01 GMT"), Some(1_000));
        assert_eq!(http_date_unix_ms("yesterday"), None);
    }

    #[test]
    fn elements_of_an_error_are_found() {
        let xml = "<Error><Code>SlowDown</Code><Message>Reduce\n your rate</Message></Error>";
        assert_eq!(element(xml, "Code").as_deref(), Some("SlowDown"));
        assert_eq!(element(xml, "Message").as_deref(), Some("Reduce your rate"));
        assert_eq!(element(xml, "Region"), None);
    }
}
