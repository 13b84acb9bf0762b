//! The brokers of a cluster: who leads which partition of a topic, and what is asked of them.
//!
//! # Design
//!
//! Requests are of the versions that brokers since Kafka 1.0 take and Kafka 4 still does; `Fetch` goes up to version 10 where
//! a broker can, because brokers give batches compressed with zstd to nobody who asks for less. Whatever goes wrong between
//! here and there, all connections and all that is known of leaders are given up and asked for again: positions move only
//! when an answer is whole, so asking twice does no harm.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::batch::Aborted;
use super::connection::{Connection, Security};
use super::wire::{Reader, Writer, Wrong};

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The same may be answered later.
    Away(String),
    /// It will not be.
    Refused(String),
}

impl From<Wrong> for Trouble {
    fn from(reason: Wrong) -> Trouble {
        Trouble::Refused(format!("the server's answer is not understood: it {reason}"))
    }
}

/// How long a broker may take for an answer, besides the time that it is asked to wait.
pub(super) const TIMEOUT_MS: u64 = 10_000;

const FETCH: i16 = 1;
const LIST_OFFSETS: i16 = 2;
const METADATA: i16 = 3;

const OFFSET_OUT_OF_RANGE: i16 = 1;
const UNKNOWN_TOPIC_OR_PARTITION: i16 = 3;

/// The reader is no replica.
const NO_REPLICA: i32 = -1;

/// Only records of transactions that were finished are wanted.
const READ_COMMITTED: i8 = 1;
const READ_UNCOMMITTED: i8 = 0;

/// Which offset of a partition is asked for.
#[derive(Clone, Copy)]
pub(super) enum OffsetAt {
    /// That of the first record that is there.
    First,
    /// Behind the last record.
    Last,
    /// Behind the last record before which all transactions are finished.
    Stable,
}

/// What a broker has of a partition from an offset on.
pub(super) struct Fetched {
    pub partition: i32,
    /// Batches; `None` where the partition has no such offset.
    pub batches: Option<Bytes>,
    pub aborted: Vec<Aborted>,
    /// Behind the last record before which all transactions are finished.
    pub stable: i64,
}

pub(super) struct Cluster {
    /// Where to ask first, as `host:port`.
    addresses: Vec<String>,
    security: Security,
    topic: String,
    /// The connection that tells who leads what.
    first: Option<Connection>,
    /// Addresses of brokers.
    brokers: BTreeMap<i32, String>,
    /// The leaders of partitions.
    leaders: BTreeMap<i32, i32>,
    connections: BTreeMap<i32, Connection>,
}

impl Cluster {
    pub(super) fn new(addresses: Vec<String>, security: Security, topic: String) -> Cluster {
        Cluster {
            addresses,
            security,
            topic,
            first: None,
            brokers: BTreeMap::new(),
            leaders: BTreeMap::new(),
            connections: BTreeMap::new(),
        }
    }

    /// Forgets connections and leaders.
    pub(super) fn forget(&mut self) {
        self.first = None;
        self.leaders.clear();
        self.connections.clear();
    }

    /// The partitions of the topic, asked for anew; `None` where there is no such topic.
    pub(super) fn partitions(&mut self) -> Result<Option<Vec<i32>>, Trouble> {
        let mut request = Writer::default();
        // A topic that is not there is not made by asking for it.
        request.count(1).text(&self.topic).i8(0);
        let mut answer = self.first()?.call(METADATA, 4, &request.0)?;
        answer.i32()?; // how long it held the answer back
        let brokers = answer.items(|broker| {
            let (id, host, port) = (broker.i32()?, broker.text()?, broker.i32()?);
            broker.text()?; // its rack
            Ok((id, format!("{}:{port}", host.unwrap_or_default())))
        })?;
        answer.text()?; // the name of the cluster
        answer.i32()?; // its controller
        let topics = answer.items(|topic| {
            let (code, _name) = (topic.i16()?, topic.text()?);
            topic.i8()?; // whether the brokers use it themselves
            let partitions = topic.items(|partition| {
                let (code, index, leader) = (partition.i16()?, partition.i32()?, partition.i32()?);
                partition.items(Reader::i32)?; // its replicas
                partition.items(Reader::i32)?; // those that keep up
                Ok((code, index, leader))
            })?;
            Ok((code, partitions))
        })?;
        let Some((code, partitions)) = topics.into_iter().next() else {
            return Err(Wrong::from("says nothing of the topic").into());
        };
        if code == UNKNOWN_TOPIC_OR_PARTITION {
            return Ok(None);
        }
        check(code)?;
        self.brokers = brokers.into_iter().collect();
        self.leaders = partitions.iter().map(|(_, index, leader)| (*index, *leader)).collect();
        self.connections.retain(|id, _| self.brokers.contains_key(id));
        Ok(Some(self.leaders.keys().copied().collect()))
    }

    /// An offset of each of some partitions.
    pub(super) fn offsets(&mut self, partitions: &[i32], at: OffsetAt) -> Result<BTreeMap<i32, i64>, Trouble> {
        let (time, isolation) = match at {
            OffsetAt::First => (-2, READ_UNCOMMITTED),
            OffsetAt::Last => (-1, READ_UNCOMMITTED),
            OffsetAt::Stable => (-1, READ_COMMITTED),
        };
        let mut offsets = BTreeMap::new();
        for (leader, partitions) in self.by_leader(partitions)? {
            let mut request = Writer::default();
            request.i32(NO_REPLICA).i8(isolation).count(1).text(&self.topic).count(partitions.len());
            for partition in &partitions {
                request.i32(*partition).i64(time);
            }
            let mut answer = self.connection(leader)?.call(LIST_OFFSETS, 2, &request.0)?;
            answer.i32()?; // how long it held the answer back
            let found = answer.items(|topic| {
                topic.text()?;
                topic.items(|partition| {
                    let (index, code) = (partition.i32()?, partition.i16()?);
                    partition.i64()?; // a time
                    Ok((index, code, partition.i64()?))
                })
            })?;
            for (index, code, offset) in found.into_iter().flatten() {
                check(code)?;
                offsets.insert(index, offset);
            }
        }
        match partitions.iter().find(|partition| !offsets.contains_key(partition)) {
            None => Ok(offsets),
            Some(missing) => Err(Wrong::from(format!("says nothing of partition {missing}")).into()),
        }
    }

    /// What there is in partitions from offsets on: about so many bytes from each broker, those of the partitions named
    /// first, and a whole batch at least where there is one.
    pub(super) fn fetch(&mut self, wanted: &[(i32, i64)], bytes: u64, wait_ms: u64) -> Result<Vec<Fetched>, Trouble> {
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        let wait_ms = i32::try_from(wait_ms).unwrap_or(i32::MAX);
        let partitions: Vec<i32> = wanted.iter().map(|(partition, _)| *partition).collect();
        let offsets: BTreeMap<i32, i64> = wanted.iter().copied().collect();
        let asked = self.by_leader(&partitions)?;
        // All brokers wait at the same time.
        for (leader, partitions) in &asked {
            let topic = self.topic.clone();
            let connection = self.connection(*leader)?;
            let version = connection.version(FETCH, 4, 10)?;
            let mut request = Writer::default();
            request.i32(NO_REPLICA).i32(wait_ms).i32(1).i32(bytes).i8(READ_COMMITTED);
            if version >= 7 {
                request.i32(0).i32(-1); // no session
            }
            request.count(1).text(&topic).count(partitions.len());
            for partition in partitions {
                request.i32(*partition);
                if version >= 9 {
                    request.i32(-1); // whatever the leader's epoch
                }
                request.i64(offsets.get(partition).copied().unwrap_or(0));
                if version >= 5 {
                    request.i64(-1); // where the log of a replica begins
                }
                request.i32(bytes);
            }
            if version >= 7 {
                request.count(0); // no partition to leave out of a session
            }
            connection.send(FETCH, version, &request.0)?;
        }
        let mut fetched = Vec::with_capacity(wanted.len());
        for leader in asked.keys() {
            let connection = self.connection(*leader)?;
            let version = connection.version(FETCH, 4, 10)?;
            let mut answer = connection.receive()?;
            answer.i32()?; // how long it held the answer back
            if version >= 7 {
                check(answer.i16()?)?;
                answer.i32()?; // the session
            }
            let found = answer.items(|topic| {
                topic.text()?;
                topic.items(|partition| {
                    let (index, code) = (partition.i32()?, partition.i16()?);
                    partition.i64()?; // behind the last record
                    let stable = partition.i64()?;
                    if version >= 5 {
                        partition.i64()?; // the first record
                    }
                    let aborted = partition.items(|transaction| {
                        let (producer, first_offset) = (transaction.i64()?, transaction.i64()?);
                        Ok(Aborted { first_offset, producer })
                    })?;
                    let batches = partition.bytes()?.unwrap_or_default();
                    Ok((code, Fetched { partition: index, batches: Some(batches), aborted, stable }))
                })
            })?;
            for (code, found) in found.into_iter().flatten() {
                match code {
                    OFFSET_OUT_OF_RANGE => fetched.push(Fetched { batches: None, ..found }),
                    code => {
                        check(code)?;
                        fetched.push(found);
                    }
                }
            }
        }
        Ok(fetched)
    }

    /// Partitions by the broker that leads them, each in the order given.
    fn by_leader(&mut self, partitions: &[i32]) -> Result<BTreeMap<i32, Vec<i32>>, Trouble> {
        if partitions.iter().any(|partition| !self.leaders.contains_key(partition)) {
            self.partitions()?;
        }
        let mut by_leader: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
        for partition in partitions {
            let leader = self.leaders.get(partition).copied().filter(|leader| *leader >= 0);
            let leader = leader.ok_or_else(|| Trouble::Away(format!("partition {partition} has no leader")))?;
            by_leader.entry(leader).or_default().push(*partition);
        }
        Ok(by_leader)
    }

    fn connection(&mut self, broker: i32) -> Result<&mut Connection, Trouble> {
        use std::collections::btree_map::Entry;
        match self.connections.entry(broker) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(place) => {
                let address = self.brokers.get(&broker);
                let address = address.ok_or_else(|| Trouble::Away(format!("nothing is known of broker {broker}")))?;
                Ok(place.insert(Connection::open(address, &self.security)?))
            }
        }
    }

    /// A connection to any broker.
    fn first(&mut self) -> Result<&mut Connection, Trouble> {
        if self.first.is_none() {
            let mut trouble = Trouble::Away("no address is known".to_owned());
            for address in &self.addresses {
                match Connection::open(address, &self.security) {
                    Ok(connection) => {
                        self.first = Some(connection);
                        break;
                    }
                    Err(error) => trouble = error,
                }
            }
            if self.first.is_none() {
                return Err(trouble);
            }
        }
        self.first.as_mut().ok_or_else(|| Trouble::Away("no address is known".to_owned()))
    }
}

/// What a broker's error says.
pub(super) fn check(code: i16) -> Result<(), Trouble> {
    let away = |name: &str| Err(Trouble::Away(format!("{name} (error {code})")));
    let refused = |name: &str| Err(Trouble::Refused(format!("the server refuses: {name} (error {code})")));
    match code {
        0 => Ok(()),
        UNKNOWN_TOPIC_OR_PARTITION => away("UNKNOWN_TOPIC_OR_PARTITION"),
        5 => away("LEADER_NOT_AVAILABLE"),
        6 => away("NOT_LEADER_OR_FOLLOWER"),
        7 => away("REQUEST_TIMED_OUT"),
        8 => away("BROKER_NOT_AVAILABLE"),
        9 => away("REPLICA_NOT_AVAILABLE"),
        13 => away("NETWORK_EXCEPTION"),
        56 => away("KAFKA_STORAGE_ERROR"),
        74 => away("FENCED_LEADER_EPOCH"),
        75 => away("UNKNOWN_LEADER_EPOCH"),
        78 => away("OFFSET_NOT_AVAILABLE"),
        89 => away("THROTTLING_QUOTA_EXCEEDED"),
        2 => refused("CORRUPT_MESSAGE"),
        17 => refused("INVALID_TOPIC_EXCEPTION"),
        29 => refused("TOPIC_AUTHORIZATION_FAILED"),
        31 => refused("CLUSTER_AUTHORIZATION_FAILED"),
        33 => refused("UNSUPPORTED_SASL_MECHANISM"),
        34 => refused("ILLEGAL_SASL_STATE"),
        35 => refused("UNSUPPORTED_VERSION"),
        58 => refused("SASL_AUTHENTICATION_FAILED"),
        76 => refused("UNSUPPORTED_COMPRESSION_TYPE"),
        _ => refused("see the list of errors in Kafka's protocol guide"),
    }
}
