//! A stream as its server tells of it (Redis 7 and its like): entries, and the counts that show what is missing.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use redis::{Connection, RedisError, RedisResult, Value};
use updraft_base::Clock;

use super::{FollowEnd, FollowOptions, Found, Source};
use crate::error::DataError;
use crate::manifest::StreamPlace;
use crate::server::{Server, is_away};

/// Entries that are asked for at once, at most.
const REQUEST_ENTRIES: u64 = 4096;

/// How long the server may take for an answer. An answer is a few megabytes at most.
const TIMEOUT_MS: u64 = 10_000;

/// The longest that the server is asked to wait, well below [`TIMEOUT_MS`].
const WAIT_MS_MAX: u64 = 1000;

/// The wait before a server that is away is asked again.
const RETRY_MS: u64 = 100;

/// The id of an entry, which orders them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct EntryId {
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

/// An entry's id, and how many the stream ever had up to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Counted {
    id: EntryId,
    added: u64,
}

impl super::EntryId for Counted {
    fn name(&self) -> String {
        format!("entry {}", self.id)
    }

    fn key(&self) -> String {
        self.id.to_string()
    }
}

type Entry = super::Entry<Counted>;

/// What the server says of a stream.
#[derive(Debug, Clone, Copy, Default)]
struct Facts {
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
    accept_loss: bool,
    clock: &'a dyn Clock,
    at: Cursor,
    /// The last entry at the beginning, where that is the end.
    end: Option<EntryId>,
    is_once: bool,
    /// What entries take, about.
    entry_bytes: u64,
}

impl Source for Reader<'_> {
    type Id = Counted;

    fn name(&self) -> &str {
        &self.name
    }

    fn begin(&mut self, place: Option<&StreamPlace>) -> Result<(), DataError> {
        if let Some(place) = place {
            let last = place.last.parse().map_err(|reason| self.error(reason))?;
            self.at = Cursor { last, added: place.added };
        }
        if self.is_once {
            self.end = Some(self.ask(EntryId::default(), 1)?.0.map_or(EntryId::default(), |facts| facts.generated));
        }
        Ok(())
    }

    fn read(&mut self, bytes: u64) -> Result<Found<Counted>, DataError> {
        let count = (bytes / self.entry_bytes).clamp(1, REQUEST_ENTRIES);
        let (facts, mut entries) = self.ask(self.at.last, count)?;
        let lost = self.at.check(facts.as_ref(), self.accept_loss).map_err(|reason| self.error(reason))?;
        let facts = facts.unwrap_or_default();
        if !entries.is_empty() {
            self.entry_bytes = (entries.iter().map(Entry::bytes).sum::<u64>() / entries.len() as u64).max(1);
        }
        let found = entries.len() as u64;
        let is_all = found < count;
        for (index, entry) in entries.iter_mut().enumerate() {
            let added = match is_all {
                // Nothing is behind the last of these, so the server's own count says where they stand.
                true => facts.added.saturating_sub(found - 1 - index as u64),
                false => self.at.added.unwrap_or(facts.added.saturating_sub(facts.length)) + 1,
            };
            entry.id.added = added;
            self.at = Cursor { last: entry.id.id, added: Some(added) };
        }
        if is_all {
            self.at.added = Some(facts.added);
        }
        let is_end = is_all || self.end.is_some_and(|end| self.at.last >= end);
        Ok(Found { entries, lost, skipped: 0, is_all, is_end, wrong: None })
    }

    fn wait(&mut self, wait_ms: u64) -> Result<(), DataError> {
        let after = self.at.last.to_string();
        let mut command = redis::cmd("XREAD");
        command.arg("COUNT").arg(1).arg("BLOCK").arg(wait_ms.min(WAIT_MS_MAX));
        command.arg("STREAMS").arg(&self.key).arg(after);
        self.patiently(|connection| command.query::<Value>(connection)).map(|_| ())
    }

    fn place(&self, before: Option<&StreamPlace>, entries: &[Entry]) -> Option<StreamPlace> {
        let Counted { id, added } = entries.last()?.id;
        Some(StreamPlace { after: before.map(|place| place.last.clone()), last: id.to_string(), added: Some(added) })
    }
}

impl<'a> Reader<'a> {
    pub(super) fn open(url: &str, options: &FollowOptions, clock: &'a dyn Clock) -> Result<Reader<'a>, DataError> {
        let (server, key) = Server::parse(url)?;
        let name = match server.name().split_once('?') {
            None => format!("{}/{key}", server.name()),
            Some((host, database)) => format!("{host}/{key}?{database}"),
        };
        if key.is_empty() {
            let reason = "names no stream: write redis://host:port/STREAM".to_owned();
            return Err(DataError::Stream { stream: name, reason });
        }
        Ok(Reader {
            server,
            key,
            name,
            connection: None,
            patience_ms: options.patience_ms,
            accept_loss: options.accept_loss,
            clock,
            at: Cursor { last: EntryId::default(), added: None },
            end: None,
            is_once: options.end == FollowEnd::Once,
            entry_bytes: 1024,
        })
    }

    fn error(&self, reason: String) -> DataError {
        DataError::Stream { stream: self.name.clone(), reason }
    }

    /// What the server says of the stream, and at most `count` entries after one, of the same moment.
    fn ask(&mut self, after: EntryId, count: u64) -> Result<(Option<Facts>, Vec<Entry>), DataError> {
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
            let id = entry.id.id;
            if id <= before {
                return Err(self.error(format!("the server gave entry {id} after entry {before}")));
            }
            before = id;
        }
        Ok((Some(facts), entries))
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
    Some(Entry { id: Counted { id, added: 0 }, fields, object: None })
}

/// How far the stream was read.
struct Cursor {
    last: EntryId,
    /// Entries that the stream ever had up to the last one. Unknown before the first look.
    added: Option<u64>,
}

impl Cursor {
    /// How many entries are gone that were never read; an error unless that is accepted.
    ///
    /// Entries read and gone are not missed. What was ever added, less what was read and what is there, is missing. The
    /// count tells nothing while an entry that was read is still there: then none behind it was trimmed.
    fn check(&mut self, facts: Option<&Facts>, accept: bool) -> Result<u64, String> {
        let Some(added) = self.added else { return Ok(0) };
        let anew = |what: &str| {
            format!(
                "{what}, although it was read up to entry {}: it was deleted or made anew, and what it had behind that is \
                 lost; `--accept-loss` goes on with what it has now",
                self.last,
            )
        };
        let Some(facts) = facts else {
            // A stream that nobody has written to yet does not exist.
            let is_fine = accept || self.last == EntryId::default();
            return if is_fine { Ok(0) } else { Err(anew("there is no such stream")) };
        };
        if facts.added < added || facts.generated < self.last {
            if !accept {
                return Err(anew(&format!("has had {} entries, the last {}", facts.added, facts.generated)));
            }
            *self = Cursor { last: EntryId::default(), added: Some(facts.added.saturating_sub(facts.length)) };
            return Ok(0);
        }
        if facts.first.is_some_and(|first| first <= self.last) {
            return Ok(0);
        }
        let lost = facts.added.saturating_sub(added).saturating_sub(facts.length);
        if lost > 0 && !accept {
            let until = match facts.first {
                Some(first) => format!("before entry {first}"),
                None => format!("up to entry {}", facts.generated),
            };
            return Err(format!(
                "{lost} entries after entry {} and {until} were trimmed or deleted before they were read; \
                 `--accept-loss` goes on with what is left",
                self.last,
            ));
        }
        self.added = Some(facts.added.saturating_sub(facts.length));
        Ok(lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(ms: u64) -> EntryId {
        EntryId { ms, sequence: 0 }
    }

    #[test]
    fn what_the_server_counted_and_neither_has_nor_gave_is_lost() {
        let facts = |added, length, first: Option<u64>, generated| Facts {
            added,
            length,
            first: first.map(id),
            generated: id(generated),
        };
        // Entries 1 to 5 were read.
        let check = |facts| Cursor { last: id(5), added: Some(5) }.check(Some(&facts), false);
        for (case, lost) in [
            (facts(5, 5, Some(1), 5), 0),
            (facts(5, 0, None, 5), 0),
            (facts(9, 9, Some(1), 9), 0),
            (facts(9, 4, Some(6), 9), 0),
            (facts(9, 3, Some(7), 9), 1),
            (facts(9, 0, None, 9), 4),
        ] {
            let found = check(case);
            match lost {
                0 => assert_eq!(found, Ok(0)),
                lost => assert!(found.unwrap_err().starts_with(&format!("{lost} entries after entry 5-0"))),
            }
        }
        assert!(check(facts(3, 3, Some(1), 3)).unwrap_err().contains("made anew"));
        assert!(Cursor { last: id(5), added: Some(5) }.check(None, false).unwrap_err().contains("no such stream"));
        let mut accepting = Cursor { last: id(5), added: Some(5) };
        assert_eq!(accepting.check(Some(&facts(9, 3, Some(7), 9)), true), Ok(1));
        assert_eq!(accepting.added, Some(6));
    }
}
