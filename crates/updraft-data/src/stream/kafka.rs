//! A topic of Kafka's protocol, as Kafka, Redpanda and others speak it.
//!
//! # Design
//!
//! A topic is several logs, its partitions; a place in it is an offset in each. Partitions are read in turn, so how
//! their records interleave depends on when they came: the commit records it, since it holds the place that its rows reach, and
//! within a partition order is kept. No consumer group is joined and nothing is written to the brokers.
//!
//! Offsets have gaps where a topic is compacted and where transactions end, so a gap between two records means nothing.
//! Records are lost where a partition begins behind the place in it.

mod batch;
mod cluster;
mod connection;
mod wire;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Known;

use bytes::Bytes;
use updraft_base::Clock;

use super::{EntryId, FollowEnd, FollowOptions, Found, RecordField, RecordOptions, Source, ValueForm};
use crate::error::DataError;
use crate::manifest::StreamPlace;
use batch::Record;
use cluster::{Cluster, OffsetAt, Trouble};
use connection::{Login, Security};

/// The wait before servers that are away are asked again.
const RETRY_MS: u64 = 100;

/// How often it is asked whether there are new partitions.
const PARTITIONS_MS: u64 = 5_000;

/// The longest that brokers are asked to wait for records: how late new partitions and the end of waiting are noticed.
const WAIT_MS_MAX: u64 = 500;

/// What batches may take together once they are uncompressed, about: 16 times what is asked for.
const ROOM_BYTES: u64 = 64 << 20;

/// How long brokers may give nothing although there is something. Those that fetch it from elsewhere first take seconds.
const NOTHING_MS: u64 = 60_000;

/// A record's partition and offset, and where its partition goes on behind it, past what are no records.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RecordId {
    partition: i32,
    offset: i64,
    next: i64,
}

impl EntryId for RecordId {
    fn name(&self) -> String {
        format!("partition {} offset {}", self.partition, self.offset)
    }

    fn key(&self) -> String {
        format!("{}-{}", self.partition, self.offset)
    }
}

/// How many records the batches in a broker's answer hold from an offset on, as a follower reads them.
///
/// # Errors
/// The offset of a batch that is wrong, and what is.
pub fn count_records(batches: Bytes, from: i64) -> Result<usize, String> {
    let found = batch::records(batches, Vec::new(), from, ROOM_BYTES);
    found.map(|found| found.records.len()).map_err(|(offset, reason)| format!("offset {offset}: {reason}"))
}

type Entry = super::Entry<RecordId>;

/// How far a partition was read.
#[derive(Debug, Clone, Copy)]
struct Position {
    next: i64,
    /// How far it can be, as the broker said last.
    stable: i64,
}

pub(super) struct Reader<'a> {
    cluster: Cluster,
    name: String,
    topic: String,
    options: &'a FollowOptions,
    /// The names of columns of fields.
    columns: Vec<Bytes>,
    clock: &'a dyn Clock,
    at: BTreeMap<i32, Position>,
    /// Where partitions ended at the beginning, where that is the end.
    end: BTreeMap<i32, i64>,
    /// When it was asked for partitions.
    partitions_ns: u64,
    /// When brokers gave something that was there, or there was nothing.
    moved_ns: u64,
    /// How long brokers are to wait for records.
    wait_ms: u64,
    /// Whose turn it is to be the first partition asked for.
    turn: usize,
    /// Records gone and not told of.
    lost: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn open(url: &str, options: &'a FollowOptions, clock: &'a dyn Clock) -> Result<Reader<'a>, DataError> {
        let Address { name, addresses, topic, is_tls, login } = Address::parse(url)?;
        let tls = is_tls.then(connection::tls).transpose();
        let tls = tls.map_err(|reason| DataError::Stream { stream: name.clone(), reason })?;
        Ok(Reader {
            cluster: Cluster::new(addresses, Security { tls, login }, topic.clone()),
            name,
            topic,
            options,
            columns: options.records.fields.iter().map(|field| Bytes::from(field.to_string())).collect(),
            clock,
            at: BTreeMap::new(),
            end: BTreeMap::new(),
            partitions_ns: 0,
            moved_ns: clock.monotonic_ns(),
            wait_ms: 0,
            turn: 0,
            lost: 0,
        })
    }

    fn error(&self, reason: String) -> DataError {
        DataError::Stream { stream: self.name.clone(), reason }
    }

    /// Asks again while servers are away, as long as is allowed.
    fn patiently<T>(&mut self, mut ask: impl FnMut(&mut Cluster) -> Result<T, Trouble>) -> Result<T, DataError> {
        let start_ns = self.clock.monotonic_ns();
        loop {
            let reason = match ask(&mut self.cluster) {
                Ok(answer) => return Ok(answer),
                Err(Trouble::Refused(reason)) => return Err(self.error(reason)),
                Err(Trouble::Away(reason)) => reason,
            };
            self.cluster.forget();
            if (self.clock.monotonic_ns() - start_ns) / 1_000_000 >= self.options.patience_ms {
                return Err(DataError::Server { server: self.name.clone(), reason });
            }
            self.clock.sleep_ms(RETRY_MS);
        }
    }

    /// The partitions that there are. New ones are read from their first record on.
    fn look_for_partitions(&mut self) -> Result<(), DataError> {
        let start_ns = self.clock.monotonic_ns();
        self.partitions_ns = start_ns;
        let found = loop {
            if let Some(found) = self.patiently(Cluster::partitions)? {
                break found;
            }
            // A broker that has just come back may not know yet what was there.
            let is_over = (self.clock.monotonic_ns() - start_ns) / 1_000_000 >= self.options.patience_ms;
            if self.at.is_empty() || is_over {
                return Err(self.error(format!("the server has no topic `{}`", self.topic)));
            }
            self.clock.sleep_ms(RETRY_MS);
        };
        if found.is_empty() {
            return Err(self.error("the topic has no partitions".to_owned()));
        }
        let new: Vec<i32> = found.iter().copied().filter(|partition| !self.at.contains_key(partition)).collect();
        if !new.is_empty() {
            let first = self.patiently(|cluster| cluster.offsets(&new, OffsetAt::First))?;
            self.at.extend(first.into_iter().map(|(partition, next)| (partition, Position { next, stable: next })));
        }
        if let Some((gone, position)) = self.at.iter().find(|(partition, _)| !found.contains(partition)) {
            if !self.options.accept_loss {
                return Err(self.anew(&format!("has no partition {gone}"), *gone, position.next));
            }
            self.at.retain(|partition, _| found.contains(partition));
            self.end.retain(|partition, _| found.contains(partition));
        }
        Ok(())
    }

    /// Holds places against what partitions have; where records are gone, goes on with those that are there, if that is
    /// accepted.
    fn check_places(&mut self, partitions: &[i32]) -> Result<(), DataError> {
        let first = self.patiently(|cluster| cluster.offsets(partitions, OffsetAt::First))?;
        let last = self.patiently(|cluster| cluster.offsets(partitions, OffsetAt::Last))?;
        for partition in partitions {
            let (Some(first), Some(last)) = (first.get(partition), last.get(partition)) else { continue };
            let Some(next) = self.at.get(partition).map(|position| position.next) else { continue };
            let lost = match (next > *last, u64::try_from(first - next)) {
                (true, _) => {
                    if !self.options.accept_loss {
                        return Err(self.anew(
                            &format!("partition {partition} ends at offset {last}"),
                            *partition,
                            next,
                        ));
                    }
                    0
                }
                (false, Ok(lost)) if lost > 0 => lost,
                (false, _) => continue,
            };
            if lost > 0 && !self.options.accept_loss {
                return Err(self.error(format!(
                    "{lost} records of partition {partition}, offsets {next} to {}, were dropped before they were read; \
                     `--accept-loss` goes on with what is left",
                    first - 1,
                )));
            }
            self.lost += lost;
            self.at.insert(*partition, Position { next: *first, stable: *first });
        }
        Ok(())
    }

    fn anew(&self, what: &str, partition: i32, next: i64) -> DataError {
        self.error(format!(
            "{what}, although partition {partition} was read up to offset {next}: the topic was deleted or made anew, and \
             what it had behind that is lost; `--accept-loss` goes on with what it has now",
        ))
    }

    /// A record as an entry.
    fn entry(&self, partition: i32, record: Record) -> Result<Entry, DataError> {
        let id = RecordId { partition, offset: record.offset, next: record.offset + 1 };
        let wrong = |column: &str, reason: &str| DataError::Sample {
            sample: format!("{} {}", self.name, id.name()),
            column: column.to_owned(),
            reason: reason.to_owned(),
        };
        let RecordOptions { fields, value, .. } = &self.options.records;
        let Some(content) = record.value else {
            let reason = "the record has no value, as those that delete a key; `--skip-tombstones` leaves them out";
            return Err(wrong("value", reason));
        };
        let number = |number: i64| Bytes::from(number.to_string());
        // A part of a batch would keep all of it in memory, however little of it is counted.
        let copied = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
        let mut entry = Entry { id, fields: Vec::with_capacity(fields.len()), object: None };
        for (field, column) in fields.iter().zip(&self.columns) {
            let cell = match field {
                RecordField::Value if *value == ValueForm::Json => {
                    entry.object = Some(copied(&content));
                    continue;
                }
                RecordField::Value => copied(&content),
                RecordField::Key => copied(record.key.as_ref().ok_or_else(|| wrong("key", "the record has no key"))?),
                RecordField::TimestampMs => number(record.timestamp_ms),
                RecordField::Partition => number(partition.into()),
                RecordField::Offset => number(record.offset),
                RecordField::Header(name) => {
                    // Of several of one name the last counts, as Kafka's own clients have it.
                    let header = record.headers.iter().rev().find(|(known, _)| known == name.as_bytes());
                    let column = field.to_string();
                    let (_, cell) = header.ok_or_else(|| wrong(&column, "the record has no such header"))?;
                    copied(cell.as_ref().ok_or_else(|| wrong(&column, "the header has no value"))?)
                }
            };
            entry.fields.push((column.clone(), cell));
        }
        Ok(entry)
    }

    /// Takes the records of an answer, as far as they are entries.
    fn take(
        &mut self,
        fetched: cluster::Fetched,
        room_bytes: &mut u64,
        found: &mut Found<RecordId>,
    ) -> Result<(), DataError> {
        let (partition, Some(batches)) = (fetched.partition, fetched.batches) else { return Ok(()) };
        let Some(from) = self.at.get(&partition).map(|position| position.next) else { return Ok(()) };
        let records = batch::records(batches, fetched.aborted, from, *room_bytes);
        let records = records
            .map_err(|(offset, reason)| self.error(format!("partition {partition} offset {offset}: {reason}")))?;
        *room_bytes = room_bytes.saturating_sub(records.bytes);
        let known = found.entries.len();
        for record in records.records {
            if record.value.is_none() && self.options.records.skip_tombstones {
                found.skipped += 1;
                continue;
            }
            found.entries.push(self.entry(partition, record)?);
        }
        if let Some(last) = found.entries[known..].last_mut() {
            last.id.next = records.next;
        }
        self.at.insert(partition, Position { next: records.next, stable: fetched.stable });
        Ok(())
    }
}

impl Source for Reader<'_> {
    type Id = RecordId;

    fn name(&self) -> &str {
        &self.name
    }

    fn begin(&mut self, place: Option<&StreamPlace>) -> Result<(), DataError> {
        if let Some(place) = place {
            let offsets = parse_place(&place.last).map_err(|reason| self.error(reason))?;
            self.at =
                offsets.into_iter().map(|(partition, next)| (partition, Position { next, stable: next })).collect();
        }
        self.look_for_partitions()?;
        let partitions: Vec<i32> = self.at.keys().copied().collect();
        self.check_places(&partitions)?;
        if self.options.end == FollowEnd::Once {
            self.end = self.patiently(|cluster| cluster.offsets(&partitions, OffsetAt::Stable))?;
        }
        Ok(())
    }

    fn read(&mut self, bytes: u64) -> Result<Found<RecordId>, DataError> {
        if (self.clock.monotonic_ns() - self.partitions_ns) / 1_000_000 >= PARTITIONS_MS {
            self.look_for_partitions()?;
        }
        // Brokers fill an answer with the first partitions that have something.
        let mut wanted: Vec<(i32, i64)> = self.at.iter().map(|(partition, at)| (*partition, at.next)).collect();
        let turn = self.turn % wanted.len().max(1);
        wanted.rotate_left(turn);
        self.turn = turn + 1;
        let wait_ms = std::mem::take(&mut self.wait_ms);
        let fetched = self.patiently(|cluster| cluster.fetch(&wanted, bytes, wait_ms))?;
        let gone: Vec<i32> = fetched.iter().filter(|f| f.batches.is_none()).map(|f| f.partition).collect();
        if !gone.is_empty() {
            self.check_places(&gone)?;
        }
        let mut found = Found { entries: Vec::new(), lost: 0, skipped: 0, is_all: false, is_end: false, wrong: None };
        let mut room_bytes = ROOM_BYTES;
        for fetched in fetched {
            if room_bytes == 0 {
                break;
            }
            if let Err(error) = self.take(fetched, &mut room_bytes, &mut found) {
                found.wrong = Some(error);
                break;
            }
        }
        found.lost = std::mem::take(&mut self.lost);
        let has_moved =
            wanted.iter().any(|(partition, next)| self.at.get(partition).is_some_and(|at| at.next != *next));
        let behind = self.at.iter().find(|(_, at)| at.next < at.stable);
        let now_ns = self.clock.monotonic_ns();
        match behind {
            Some((partition, at)) if !has_moved => {
                if (now_ns - self.moved_ns) / 1_000_000 >= NOTHING_MS {
                    let Position { next, stable } = at;
                    return Err(self.error(format!(
                        "the server says that partition {partition} goes up to offset {stable}, and gives nothing from {next} on",
                    )));
                }
            }
            _ => self.moved_ns = now_ns,
        }
        found.is_all = !has_moved || behind.is_none();
        let has_ended = |(partition, end): (&i32, &i64)| self.at.get(partition).is_none_or(|at| at.next >= *end);
        found.is_end = self.end.iter().all(has_ended);
        Ok(found)
    }

    fn wait(&mut self, wait_ms: u64) -> Result<(), DataError> {
        self.wait_ms = wait_ms.min(WAIT_MS_MAX);
        Ok(())
    }

    fn place(&self, before: Option<&StreamPlace>, entries: &[Entry]) -> Option<StreamPlace> {
        // What was before was read by `begin`.
        let mut offsets = before.and_then(|place| parse_place(&place.last).ok()).unwrap_or_default();
        for Entry { id, .. } in entries {
            match offsets.entry(id.partition) {
                Known::Occupied(mut known) => drop(known.insert(id.next)),
                Known::Vacant(new) => drop(new.insert(id.next)),
            }
        }
        offsets.retain(|partition, _| self.at.contains_key(partition));
        let last: Vec<String> = offsets.iter().map(|(partition, next)| format!("{partition}:{next}")).collect();
        let after = before.map(|place| place.last.clone());
        (!entries.is_empty()).then(|| StreamPlace { after, last: last.join(","), added: None })
    }
}

/// The offset at which each partition goes on: `0:1500,1:1498`.
fn parse_place(text: &str) -> Result<BTreeMap<i32, i64>, String> {
    let part = |part: &str| {
        let (partition, next) = part.split_once(':')?;
        Some((partition.parse::<i32>().ok()?, next.parse::<i64>().ok().filter(|next| *next >= 0)?))
    };
    let places: Option<BTreeMap<i32, i64>> = text.split(',').map(part).collect();
    places.ok_or_else(|| format!("`{text:.60}` is no place in a topic, which is `PARTITION:OFFSET` joined by commas"))
}

/// What a URL says.
struct Address {
    /// The URL without password.
    name: String,
    addresses: Vec<String>,
    topic: String,
    is_tls: bool,
    login: Option<Login>,
}

impl Address {
    fn parse(url: &str) -> Result<Address, DataError> {
        let form =
            "is not of the form kafka://[user:password@]host[:port][,host[:port]…]/TOPIC, or kafka+ssl:// for TLS";
        let shown = match url.rsplit_once('@') {
            Some((_, after)) => after,
            None => url,
        };
        let wrong = |reason: &str| DataError::Stream { stream: shown.to_owned(), reason: reason.to_owned() };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong(form))?;
        let is_tls = match scheme {
            "kafka" => false,
            "kafka+ssl" => true,
            _ => return Err(wrong(form)),
        };
        // Topics and hosts have no `@`, and passwords may.
        let (login, rest) = match rest.rsplit_once('@') {
            None => (None, rest),
            Some((login, rest)) => (Some(login), rest),
        };
        let (hosts, topic) =
            rest.split_once('/').ok_or_else(|| wrong("names no topic: write kafka://host:port/TOPIC"))?;
        if topic.is_empty() {
            return Err(wrong("names no topic: write kafka://host:port/TOPIC"));
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if topic.len() > 249 || !topic.chars().all(is_name) {
            return Err(wrong("the topic's name may have up to 249 letters, digits, `.`, `_` and `-`"));
        }
        let mut addresses = Vec::new();
        for host in hosts.split(',') {
            let (name, port) = match host.rsplit_once(':') {
                // Of an IPv6 address in brackets, colons are not all before a port.
                Some((name, port)) if !port.ends_with(']') => (name, port),
                _ => (host, "9092"),
            };
            if name.is_empty() || port.parse::<u16>().is_err() {
                return Err(wrong(form));
            }
            addresses.push(format!("{name}:{port}"));
        }
        let decoded = |text: &str| {
            let text = percent_encoding::percent_decode_str(text).decode_utf8();
            text.map(|text| text.into_owned()).map_err(|_| wrong("user and password must be UTF-8"))
        };
        let login = match login {
            None => None,
            Some(login) => {
                let (user, password) = login.split_once(':').ok_or_else(|| wrong("has a user without a password"))?;
                Some(Login { user: decoded(user)?, password: decoded(password)? })
            }
        };
        let name = format!("{scheme}://{hosts}/{topic}");
        Ok(Address { name, addresses, topic: topic.to_owned(), is_tls, login })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_brokers_and_topic_without_the_password() {
        for (url, name, addresses, login) in [
            ("kafka://h/t", "kafka://h/t", "h:9092", None),
            ("kafka://h:1,[::1]:2,[::1]/t.a-b_c", "kafka://h:1,[::1]:2,[::1]/t.a-b_c", "h:1 [::1]:2 [::1]:9092", None),
            ("kafka+ssl://me:se/cr:t@x%25@h:1/t", "kafka+ssl://h:1/t", "h:1", Some(("me", "se/cr:t@x%"))),
        ] {
            let address = Address::parse(url).unwrap();
            assert_eq!((address.name.as_str(), address.addresses.join(" ").as_str()), (name, addresses));
            assert_eq!(address.login.as_ref().map(|l| (l.user.as_str(), l.password.as_str())), login);
            assert_eq!(address.is_tls, url.starts_with("kafka+ssl"));
        }
        for url in ["kafka://me:secret@h", "kafka://me:secret@/t", "kafka://me:secret@h:x/t", "kafka://me:secret@h/a/b"]
        {
            let message = Address::parse(url).map(|_| ()).unwrap_err().to_string();
            assert!(!message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn a_place_is_an_offset_for_each_partition() {
        assert_eq!(parse_place("0:15,10:7").unwrap(), BTreeMap::from([(0, 15), (10, 7)]));
        for text in ["", "0", "0:-1", "a:1", "1700000000000-0", "0:1,"] {
            assert!(parse_place(text).unwrap_err().contains("is no place in a topic"), "{text}");
        }
    }
}
