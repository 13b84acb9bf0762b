//! One bucket over HTTP, in the dialect of S3 or of Google Cloud Storage's XML interface, that fails by a schedule.
//!
//! It speaks what the crate `object_store` asks: whole and ranged reads on condition of a version, writes on condition of a
//! version or of absence, uploads in parts, deletes, listings by page. Signatures are not checked, only that S3's is there.
//! The state can be looked at from outside, past all faults, which is what tests of lost and doubled writes need.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use updraft_base::{Clock, Digest, SystemClock};

use crate::http::{Reply, Request, Response, Server};
use crate::schedule::{Fault, Operation, Schedule};

/// Keys on one page of a listing: what both providers give.
const PAGE_KEYS: usize = 1000;

/// Whose interface the server has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Amazon S3.
    S3,
    /// Google Cloud Storage, XML.
    Gcs,
}

/// A bucket on the loopback interface, until it is dropped.
pub struct ObjectServer {
    server: Server,
    bucket: Arc<Bucket>,
}

struct Bucket {
    dialect: Dialect,
    schedule: Option<Arc<Schedule>>,
    clock: SystemClock,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    uploads: HashMap<String, Upload>,
    generations: u64,
}

#[derive(Clone)]
struct Object {
    bytes: Bytes,
    etag: String,
    generation: u64,
    modified_ms: u64,
    tier: Option<String>,
}

struct Upload {
    key: String,
    parts: BTreeMap<usize, (String, Bytes)>,
}

impl ObjectServer {
    /// Starts a server whose one bucket answers to any name.
    pub fn start(dialect: Dialect, schedule: Option<Arc<Schedule>>) -> std::io::Result<ObjectServer> {
        let bucket = Arc::new(Bucket { dialect, schedule, clock: SystemClock::new(), state: Mutex::default() });
        let handler = bucket.clone();
        let server = Server::start(Arc::new(move |request| handler.reply(&request)))?;
        Ok(ObjectServer { server, bucket })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// The URL of the bucket and the settings with which a client reaches it.
    pub fn url_and_settings(&self) -> (String, BTreeMap<String, String>) {
        let endpoint = format!("http://{}", self.address());
        let (url, settings) = match self.bucket.dialect {
            Dialect::S3 => (
                "s3://bucket",
                vec![("endpoint", endpoint), ("access_key_id", "key".into()), ("secret_access_key", "secret".into())],
            ),
            Dialect::Gcs => {
                let account = format!(
                    r#"{{"gcs_base_url": "{endpoint}", "disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}}"#
                );
                ("gs://bucket", vec![("service_account_key", account)])
            }
        };
        (url.to_owned(), settings.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
    }

    /// What is really there.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        self.bucket.state().objects.iter().map(|(key, object)| (key.clone(), object.bytes.clone())).collect()
    }

    /// How often the object was replaced, its making included; zero where it is not there.
    pub fn generation(&self, key: &str) -> u64 {
        self.bucket.state().objects.get(key).map_or(0, |object| object.generation)
    }

    /// The storage tier that an object was put in, where its writer said one.
    pub fn tier(&self, key: &str) -> Option<String> {
        self.bucket.state().objects.get(key).and_then(|object| object.tier.clone())
    }

    /// Uploads in parts that were neither completed nor aborted.
    pub fn unfinished_uploads(&self) -> usize {
        self.bucket.state().uploads.len()
    }
}

impl Bucket {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The answer to a request, with the fault that the schedule has for it.
    fn reply(&self, request: &Request) -> Reply {
        let (_bucket, key) = request.path.trim_start_matches('/').split_once('/').unwrap_or((&request.path, ""));
        let has = |name: &str| request.query.contains_key(name);
        let operation = match request.method.as_str() {
            _ if has("uploads") || (has("uploadId") && !has("partNumber")) => Operation::Multipart,
            "GET" if key.is_empty() => Operation::List,
            "GET" => Operation::Get,
            "HEAD" => Operation::Head,
            "PUT" => Operation::Put,
            _ => Operation::Delete,
        };
        let fault = self.schedule.as_ref().and_then(|schedule| schedule.next(operation, key));
        let answer = || self.answer(operation, key, request);
        let is_read = operation == Operation::Get;
        match fault {
            None => Reply::Whole(answer()),
            Some(Fault::Slow(ms)) => {
                self.clock.sleep_ms(ms);
                Reply::Whole(answer())
            }
            Some(Fault::SlowDown) => Reply::Whole(error(503, "SlowDown")),
            Some(Fault::InternalError) => Reply::Whole(error(500, "InternalError")),
            Some(Fault::AnswerLost) => {
                answer();
                Reply::Whole(error(500, "InternalError"))
            }
            Some(Fault::Stalled) => {
                if self.schedule.as_ref().is_some_and(|schedule| schedule.coin(key)) {
                    answer();
                }
                Reply::Stall
            }
            Some(Fault::Reset) if !is_read => {
                answer();
                Reply::Close
            }
            Some(Fault::Truncated | Fault::WrongEtag) if !is_read => Reply::Whole(error(500, "InternalError")),
            Some(fault) => {
                let mut response = answer();
                let whole = response.body.len();
                if fault == Fault::WrongEtag {
                    response
                        .headers
                        .iter_mut()
                        .filter(|(n, _)| *n == "ETag")
                        .for_each(|(_, v)| *v = "\"another\"".into());
                    return Reply::Whole(response);
                }
                response.body.truncate(whole / 2);
                // Of a ranged answer only the body is short; the range that it names is whole.
                if fault == Fault::Reset || response.status != 206 {
                    response.announced_bytes = Some(whole);
                }
                Reply::ThenClose(response)
            }
        }
    }

    fn answer(&self, operation: Operation, key: &str, request: &Request) -> Response {
        // Without OAuth, which needs a server of its own, the crate sends Google's dialect nothing.
        if self.dialect == Dialect::S3 && !request.headers.contains_key("authorization") {
            return error(403, "AccessDenied");
        }
        let mut state = self.state();
        match operation {
            Operation::List => list(&state, request),
            Operation::Get | Operation::Head => self.read(&state, key, request),
            Operation::Put if request.query.contains_key("partNumber") => put_part(&mut state, key, request),
            Operation::Put => self.put(&mut state, key, request),
            Operation::Multipart => self.multipart(&mut state, key, request),
            Operation::Delete => match (state.objects.remove(key), self.dialect) {
                (None, Dialect::Gcs) => error(404, "NoSuchKey"),
                _ => response(204, Vec::new()),
            },
        }
    }

    fn read(&self, state: &State, key: &str, request: &Request) -> Response {
        let is_head = request.method == "HEAD";
        let bodiless = |response: Response| match is_head {
            true => Response { announced_bytes: Some(response.body.len()), body: Vec::new(), ..response },
            false => response,
        };
        let Some(object) = state.objects.get(key) else { return bodiless(error(404, "NoSuchKey")) };
        if request.headers.get("if-match").is_some_and(|etag| *etag != object.etag) {
            return bodiless(error(412, "PreconditionFailed"));
        }
        let size = object.bytes.len();
        let range = request.headers.get("range").and_then(|value| value.strip_prefix("bytes=")?.split_once('-'));
        let (status, from, to) = match range {
            None => (200, 0, size),
            Some(("", suffix)) => (206, size.saturating_sub(suffix.parse().unwrap_or(0)), size),
            Some((from, to)) => {
                let to = to.parse::<usize>().map_or(size, |to| size.min(to + 1));
                (206, from.parse().unwrap_or(usize::MAX), to)
            }
        };
        if status == 206 && from >= to {
            return error(416, "InvalidRange");
        }
        let mut response = response(status, object.bytes[from..to].to_vec());
        response.headers.extend([
            ("ETag", object.etag.clone()),
            ("Last-Modified", http_date(object.modified_ms)),
            ("x-goog-generation", object.generation.to_string()),
        ]);
        if status == 206 {
            response.headers.push(("Content-Range", format!("bytes {from}-{}/{size}", to - 1)));
        }
        bodiless(response)
    }

    fn put(&self, state: &mut State, key: &str, request: &Request) -> Response {
        let now = state.objects.get(key);
        let allowed = match self.dialect {
            Dialect::S3 => {
                let absent = request.headers.get("if-none-match").is_none_or(|_| now.is_none());
                absent && request.headers.get("if-match").is_none_or(|etag| now.is_some_and(|o| o.etag == *etag))
            }
            Dialect::Gcs => request
                .headers
                .get("x-goog-if-generation-match")
                .is_none_or(|generation| now.map_or(0, |o| o.generation).to_string() == *generation),
        };
        if !allowed {
            return error(412, "PreconditionFailed");
        }
        let tier = match self.dialect {
            Dialect::S3 => "x-amz-storage-class",
            Dialect::Gcs => "x-goog-storage-class",
        };
        let tier = request.headers.get(tier).cloned();
        self.keep(state, key, Bytes::from(request.body.clone()), tier, String::new())
    }

    fn keep(&self, state: &mut State, key: &str, bytes: Bytes, tier: Option<String>, body: String) -> Response {
        state.generations += 1;
        let generation = state.generations;
        let etag = format!("\"{}-{generation}\"", &Digest::of(&bytes).hex()[..32]);
        let modified_ms = self.clock.now_unix_ms();
        let object = Object { bytes, etag: etag.clone(), generation, modified_ms, tier };
        state.objects.insert(key.to_owned(), object);
        let mut response = response(200, body.replace("{etag}", &escaped(&etag)).into_bytes());
        response.headers.extend([("ETag", etag), ("x-goog-generation", generation.to_string())]);
        response
    }

    fn multipart(&self, state: &mut State, key: &str, request: &Request) -> Response {
        let Some(id) = request.query.get("uploadId") else {
            state.generations += 1;
            let id = format!("upload-{}", state.generations);
            state.uploads.insert(id.clone(), Upload { key: key.to_owned(), parts: BTreeMap::new() });
            let body =
                format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>");
            return response(200, body.into_bytes());
        };
        let Some(upload) = state.uploads.remove(id).filter(|upload| upload.key == key) else {
            return error(404, "NoSuchUpload");
        };
        if request.method == "DELETE" {
            return response(204, Vec::new());
        }
        let asked = String::from_utf8_lossy(&request.body).into_owned();
        let complete = upload.parts.iter().enumerate().all(|(i, (number, (etag, _)))| {
            *number == i + 1
                && asked.contains(&format!("<PartNumber>{number}</PartNumber>"))
                && asked.contains(etag.trim_matches('"'))
        });
        if !complete || asked.matches("<PartNumber>").count() != upload.parts.len() {
            state.uploads.insert(id.clone(), upload);
            return error(400, "InvalidPart");
        }
        let bytes: Vec<u8> = upload.parts.values().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
        let body = "<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>";
        self.keep(state, key, bytes.into(), None, body.to_owned())
    }
}

fn put_part(state: &mut State, key: &str, request: &Request) -> Response {
    let number = request.query.get("partNumber").and_then(|n| n.parse::<usize>().ok());
    let upload = request.query.get("uploadId").and_then(|id| state.uploads.get_mut(id)).filter(|u| u.key == key);
    let (Some(number), Some(upload)) = (number, upload) else { return error(404, "NoSuchUpload") };
    let bytes = Bytes::from(request.body.clone());
    let etag = format!("\"{}\"", &Digest::of(&bytes).hex()[..32]);
    upload.parts.insert(number, (etag.clone(), bytes));
    let mut response = response(200, Vec::new());
    response.headers.push(("ETag", etag));
    response
}

fn list(state: &State, request: &Request) -> Response {
    let text = |name: &str| request.query.get(name).map_or("", String::as_str);
    let (prefix, delimiter) = (text("prefix"), text("delimiter"));
    let after = text("continuation-token").max(text("start-after"));
    let page_keys = text("max-keys").parse().unwrap_or(PAGE_KEYS).min(PAGE_KEYS);
    let mut body = String::from("<ListBucketResult>");
    let (mut shown, mut last, mut folder, mut more) = (0, "", String::new(), false);
    for (key, object) in state.objects.iter().filter(|(key, _)| key.starts_with(prefix) && key.as_str() > after) {
        if shown == page_keys {
            more = true;
            break;
        }
        last = key;
        let below = &key[prefix.len()..];
        if let Some(end) = below.find(delimiter).filter(|_| !delimiter.is_empty()) {
            let common = format!("{prefix}{}", &below[..end + delimiter.len()]);
            if common != folder {
                body.push_str(&format!("<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>", escaped(&common)));
                folder = common;
                shown += 1;
            }
            continue;
        }
        shown += 1;
        body.push_str(&format!(
            "<Contents><Key>{}</Key><Size>{}</Size><LastModified>{}</LastModified><ETag>{}</ETag></Contents>",
            escaped(key),
            object.bytes.len(),
            iso_date(object.modified_ms),
            escaped(&object.etag)
        ));
    }
    if more {
        body.push_str(&format!("<NextContinuationToken>{}</NextContinuationToken>", escaped(last)));
    }
    body.push_str("</ListBucketResult>");
    response(200, body.into_bytes())
}

fn response(status: u16, body: Vec<u8>) -> Response {
    Response { status, headers: Vec::new(), body, announced_bytes: None }
}

fn error(status: u16, code: &str) -> Response {
    response(status, format!("<Error><Code>{code}</Code><Message>by the test server</Message></Error>").into_bytes())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Year, month, day, and seconds of the day. The algorithm is `civil_from_days` (Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms").
fn civil(unix_ms: u64) -> (u64, u64, u64, u64) {
    let seconds = unix_ms / 1000;
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day, seconds % 86_400)
}

fn iso_date(unix_ms: u64) -> String {
    let (year, month, day, second) = civil(unix_ms);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.000Z", second / 3600, second / 60 % 60, second % 60)
}

fn http_date(unix_ms: u64) -> String {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    const WEEKDAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    let (year, month, day, second) = civil(unix_ms);
    let weekday = WEEKDAYS[(unix_ms / 86_400_000 % 7) as usize];
    let month = MONTHS[month as usize - 1];
    format!("{weekday}, {day:02} {month} {year:04} {:02}:{:02}:{:02} GMT", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_the_providers_write_them() {
        assert_eq!(http_date(784_111_777_000), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(iso_date(1_709_164_800_000), "2024-02-29T00:00:00.000Z");
    }
}
