//! A stream as its server tells of it (Redis 7 and its like): entries, and the counts that show what is missing.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use redis::{Connection, RedisError, RedisResult, Value};
use updraft_base::Clock;

use crate::error::DataError;
use crate::server::{Server, is_away};

/// How long the server may take for an answer. An answer is a few megabytes at most.
const TIMEOUT_MS: u64 = 10_000;

/// The wait before a server that is away is asked again.
const RETRY_MS: u64 = 100;

/// The id of an entry, which orders them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EntryId {
    pub ms: u64,
    pub sequence: u64,
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.sequence)
    }
}

impl FromStr for EntryId {
    type Err = String;

    fn from_str(text: &str) -> Result<EntryId, String> {
        let parts = text.split_once('-').and_then(|(ms, sequence)| Some((ms.parse().ok()?, sequence.parse().ok()?)));
        let (ms, sequence) = parts.ok_or_else(|| format!("`{text:.60}` is not the id of an entry"))?;
        Ok(EntryId { ms, sequence })
    }
}

/// One entry.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub id: EntryId,
    pub fields: Vec<(Bytes, Bytes)>,
}

impl Entry {
    /// What it takes.
    pub(super) fn bytes(&self) -> u64 {
        self.fields.iter().map(|(name, value)| (name.len() + value.len()) as u64).sum::<u64>() + 16
    }
}

/// What the server says of a stream.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Facts {
    /// Entries ever added.
    pub added: u64,
    /// Entries that are there.
    pub length: u64,
    /// The first of them.
    pub first: Option<EntryId>,
    /// The last ever added.
    pub generated: EntryId,
}

pub(super) struct Reader<'a> {
    server: Server,
    key: String,
    name: String,
    connection: Option<Connection>,
    patience_ms: u64,
    clock: &'a dyn Clock,
}

impl<'a> Reader<'a> {
    pub(super) fn open(url: &str, patience_ms: u64, clock: &'a dyn Clock) -> Result<Reader<'a>, DataError> {
        let (server, key) = Server::parse(url)?;
        let name = match server.name().split_once('?') {
            None => format!("{}/{key}", server.name()),
            Some((host, database)) => format!("{host}/{key}?{database}"),
        };
        if key.is_empty() {
            let reason = "names no stream: write redis://host:port/STREAM".to_owned();
            return Err(DataError::Stream { stream: name, reason });
        }
        Ok(Reader { server, key, name, connection: None, patience_ms, clock })
    }

    /// The URL without password.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn error(&self, reason: String) -> DataError {
        DataError::Stream { stream: self.name.clone(), reason }
    }

    /// What the server says of the stream; `None` where there is none.
    pub(super) fn facts(&mut self) -> Result<Option<Facts>, DataError> {
        Ok(self.read(EntryId::default(), 1)?.0)
    }

    /// What the server says of the stream, and at most `count` entries after one, of the same moment.
    pub(super) fn read(&mut self, after: EntryId, count: u64) -> Result<(Option<Facts>, Vec<Entry>), DataError> {
        let key = self.key.clone();
        let answer = self.patiently(|connection| {
            let mut both = redis::pipe();
            both.atomic();
            both.cmd("XINFO").arg("STREAM").arg(&key);
            both.cmd("XREAD").arg("COUNT").arg(count).arg("STREAMS").arg(&key).arg(after.to_string());
            match both.query::<(Value, Value)>(connection) {
                Err(error) if !is_away(&error) => {
                    let is_there: bool = redis::cmd("EXISTS").arg(&key).query(connection)?;
                    if is_there { Err(error) } else { Ok(None) }
                }
                done => done.map(Some),
            }
        })?;
        let Some((facts, entries)) = answer else { return Ok((None, Vec::new())) };
        let facts = parse_facts(facts).ok_or_else(|| {
            self.error("the server's answer about the stream is not understood; Redis 7 or newer is needed".into())
        })?;
        let entries =
            parse_answer(entries).ok_or_else(|| self.error("the server's entries are not understood".into()))?;
        let mut before = after;
        for entry in &entries {
            if entry.id <= before {
                return Err(self.error(format!("the server gave entry {} after entry {before}", entry.id)));
            }
            before = entry.id;
        }
        Ok((Some(facts), entries))
    }

    /// Waits for an entry, not longer than `wait_ms`, which is shorter than [`TIMEOUT_MS`].
    pub(super) fn wait(&mut self, after: EntryId, wait_ms: u64) -> Result<(), DataError> {
        let mut command = redis::cmd("XREAD");
        command.arg("COUNT").arg(1).arg("BLOCK").arg(wait_ms).arg("STREAMS").arg(&self.key).arg(after.to_string());
        self.patiently(|connection| command.query::<Value>(connection)).map(|_| ())
    }

    /// Asks again while the server is away, as long as is allowed.
    fn patiently<T>(&mut self, mut ask: impl FnMut(&mut Connection) -> RedisResult<T>) -> Result<T, DataError> {
        let start_ns = self.clock.monotonic_ns();
        loop {
            let error = match self.connection.take().map_or_else(|| self.server.connect(TIMEOUT_MS), Ok) {
                Ok(mut connection) => match ask(&mut connection) {
                    Ok(answer) => {
                        self.connection = Some(connection);
                        return Ok(answer);
                    }
                    Err(error) => error,
                },
                Err(error) => error,
            };
            let waited_ms = (self.clock.monotonic_ns() - start_ns) / 1_000_000;
            if !is_away(&error) || waited_ms >= self.patience_ms {
                return Err(self.named(&error));
            }
            self.clock.sleep_ms(RETRY_MS);
        }
    }

    fn named(&self, error: &RedisError) -> DataError {
        match self.server.error(error) {
            DataError::Stream { reason, .. } => self.error(reason),
            error => error,
        }
    }
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        value => text(value)?.parse().ok(),
    }
}

fn parse_facts(answer: Value) -> Option<Facts> {
    let Value::Array(items) = answer else { return None };
    let field = |name: &str| items.chunks_exact(2).find(|pair| text(&pair[0]) == Some(name)).map(|pair| &pair[1]);
    let first = match field("first-entry")? {
        Value::Nil => None,
        Value::Array(entry) => Some(text(entry.first()?)?.parse().ok()?),
        _ => return None,
    };
    Some(Facts {
        added: number(field("entries-added")?)?,
        length: number(field("length")?)?,
        first,
        generated: text(field("last-generated-id")?)?.parse().ok()?,
    })
}

/// The entries of the one stream that was asked for.
fn parse_answer(answer: Value) -> Option<Vec<Entry>> {
    let streams = match answer {
        Value::Nil => return Some(Vec::new()),
        Value::Array(streams) => streams,
        _ => return None,
    };
    let Some(Value::Array(stream)) = streams.into_iter().next() else { return None };
    let Some(Value::Array(entries)) = stream.into_iter().nth(1) else { return None };
    entries.into_iter().map(parse_entry).collect()
}

fn parse_entry(entry: Value) -> Option<Entry> {
    let Value::Array(entry) = entry else { return None };
    let mut entry = entry.into_iter();
    let id = text(&entry.next()?)?.parse().ok()?;
    let Some(Value::Array(cells)) = entry.next() else { return None };
    let mut fields = Vec::with_capacity(cells.len() / 2);
    let mut cells = cells.into_iter();
    while let Some(name) = cells.next() {
        let (Value::BulkString(name), Value::BulkString(value)) = (name, cells.next()?) else { return None };
        fields.push((Bytes::from(name), Bytes::from(value)));
    }
    Some(Entry { id, fields })
}
