//! One broker of Kafka's protocol in this process, whose log a test writes as it likes: batches, gaps, marks of transactions,
//! records dropped, partitions added, a broker that goes and comes back.
//!
//! It knows the four requests of a reader and nothing else. That readers and it do not share a mistake is seen where both
//! are run against the brokers and clients of others: `cargo xtask streams`.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use updraft_base::{Clock, SystemClock};

/// The broker's id.
const NODE: i32 = 7;

/// One record to append.
#[derive(Debug, Clone, Default)]
pub struct KafkaRecord {
    /// What chooses its partition, if anything.
    pub key: Option<Vec<u8>>,
    /// What it says; nothing, to delete a key.
    pub value: Option<Vec<u8>>,
    /// Names and values.
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    /// When it was made.
    pub timestamp_ms: i64,
}

impl KafkaRecord {
    /// A record of this value alone.
    pub fn of(value: impl Into<Vec<u8>>) -> KafkaRecord {
        KafkaRecord { value: Some(value.into()), ..KafkaRecord::default() }
    }
}

/// A batch as readers get it.
struct Batch {
    first: i64,
    last: i64,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Partition {
    batches: Vec<Batch>,
    first: i64,
    last: i64,
    /// Where transactions are open from.
    stable: Option<i64>,
    /// Producer, first and last offset of those that were given up.
    aborted: Vec<(i64, i64, i64)>,
}

#[derive(Default)]
struct Log {
    topics: BTreeMap<String, Vec<Partition>>,
    /// The newest version of `Fetch` that is taken.
    fetch_version_max: i16,
    /// `user` and `password`, where a login is wanted.
    login: Option<(String, String)>,
    connections: Vec<TcpStream>,
}

/// A broker whose log outlives it: [`KafkaServer::stop`] and [`KafkaServer::start`] are a restart.
pub struct KafkaServer {
    log: Arc<Mutex<Log>>,
    port: u16,
    is_stopped: Arc<AtomicBool>,
    listener: Option<JoinHandle<()>>,
}

impl KafkaServer {
    /// A broker without topics on a free port, that answers.
    ///
    /// # Panics
    /// If this machine has no port.
    pub fn new() -> KafkaServer {
        let log = Log { fetch_version_max: 11, ..Log::default() };
        let mut server =
            KafkaServer { log: Arc::new(Mutex::new(log)), port: 0, is_stopped: Arc::default(), listener: None };
        server.start();
        server
    }

    /// `kafka://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("kafka://127.0.0.1:{}", self.port)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Answers, at the port where it answered before.
    ///
    /// # Panics
    /// If the port is taken.
    pub fn start(&mut self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).expect("the port is free");
        listener.set_nonblocking(true).expect("a listener that does not block");
        self.port = listener.local_addr().expect("an address").port();
        self.is_stopped = Arc::default();
        let (log, is_stopped, port) = (self.log.clone(), self.is_stopped.clone(), self.port);
        self.listener = Some(std::thread::spawn(move || {
            let clock = SystemClock::new();
            while !is_stopped.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).expect("a connection that blocks");
                        lock(&log).connections.push(stream.try_clone().expect("a second handle"));
                        let log = log.clone();
                        // It ends with its connection, and closes it, whoever else has a handle.
                        std::thread::spawn(move || {
                            while answer(&stream, &log, port).is_ok() {}
                            stream.shutdown(Shutdown::Both).ok();
                        });
                    }
                    Err(_) => clock.sleep_ms(5),
                }
            }
        }));
    }

    /// Ends all connections and answers no more; the log stays.
    pub fn stop(&mut self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        if let Some(listener) = self.listener.take() {
            listener.join().expect("the listener ends");
        }
        for connection in std::mem::take(&mut lock(&self.log).connections) {
            // One that is closed already is as good.
            connection.shutdown(Shutdown::Both).ok();
        }
    }

    /// Takes `Fetch` up to this version only, as an older broker.
    pub fn limit_fetch(&self, version: i16) {
        lock(&self.log).fetch_version_max = version;
    }

    /// Wants a login from now on.
    pub fn want_login(&self, user: &str, password: &str) {
        lock(&self.log).login = Some((user.to_owned(), password.to_owned()));
    }

    /// Makes a topic, or adds partitions to it.
    pub fn create(&self, topic: &str, partitions: usize) {
        lock(&self.log).topics.entry(topic.to_owned()).or_default().resize_with(partitions, Partition::default);
    }

    /// Deletes a topic.
    pub fn delete(&self, topic: &str) {
        lock(&self.log).topics.remove(topic);
    }

    /// Appends records as one batch.
    pub fn append(&self, topic: &str, partition: usize, records: &[KafkaRecord]) {
        self.with(topic, partition, |p| p.append(records, 0, -1));
    }

    /// Appends records of a transaction that is not finished.
    pub fn append_in_transaction(&self, topic: &str, partition: usize, producer: i64, records: &[KafkaRecord]) {
        self.with(topic, partition, |p| {
            p.stable.get_or_insert(p.last);
            p.append(records, 0x10, producer);
        });
    }

    /// Finishes a producer's transaction that began at an offset, so that its records count or do not.
    pub fn finish(&self, topic: &str, partition: usize, producer: i64, first: i64, is_committed: bool) {
        self.with(topic, partition, |p| {
            if !is_committed {
                p.aborted.push((producer, first, p.last));
            }
            let mark = [0, 0, 0, u8::from(is_committed)].to_vec();
            p.append(
                &[KafkaRecord { key: Some(mark), value: Some(vec![0; 6]), ..KafkaRecord::default() }],
                0x30,
                producer,
            );
            p.stable = None;
        });
    }

    /// Leaves offsets without records, as compaction does.
    pub fn skip(&self, topic: &str, partition: usize, offsets: i64) {
        self.with(topic, partition, |p| p.last += offsets);
    }

    /// Drops the records before an offset, as retention does.
    pub fn drop_before(&self, topic: &str, partition: usize, offset: i64) {
        self.with(topic, partition, |p| {
            p.first = offset;
            p.batches.retain(|batch| batch.last >= offset);
        });
    }

    fn with(&self, topic: &str, partition: usize, change: impl FnOnce(&mut Partition)) {
        let mut log = lock(&self.log);
        let partitions = log.topics.get_mut(topic).expect("a topic that was made");
        change(partitions.get_mut(partition).expect("a partition that was made"));
    }
}

impl Default for KafkaServer {
    fn default() -> KafkaServer {
        KafkaServer::new()
    }
}

impl Drop for KafkaServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Partition {
    fn append(&mut self, records: &[KafkaRecord], attributes: i16, producer: i64) {
        let first_ms = records.first().map_or(0, |record| record.timestamp_ms);
        let mut body = Vec::new();
        for (at, record) in records.iter().enumerate() {
            let mut bytes = vec![0];
            varint(&mut bytes, record.timestamp_ms - first_ms);
            varint(&mut bytes, at as i64);
            for part in [&record.key, &record.value] {
                varbytes(&mut bytes, part.as_deref());
            }
            varint(&mut bytes, record.headers.len() as i64);
            for (name, value) in &record.headers {
                varbytes(&mut bytes, Some(name.as_bytes()));
                varbytes(&mut bytes, value.as_deref());
            }
            varint(&mut body, bytes.len() as i64);
            body.extend(bytes);
        }
        let last_ms = records.last().map_or(0, |record| record.timestamp_ms);
        let mut checked = Vec::new();
        checked.extend(attributes.to_be_bytes());
        checked.extend((records.len() as i32 - 1).to_be_bytes());
        checked.extend(first_ms.to_be_bytes());
        checked.extend(last_ms.to_be_bytes());
        checked.extend(producer.to_be_bytes());
        checked.extend([0xff; 6]);
        checked.extend((records.len() as i32).to_be_bytes());
        checked.extend(body);
        let mut bytes = Vec::new();
        bytes.extend(self.last.to_be_bytes());
        bytes.extend((checked.len() as i32 + 9).to_be_bytes());
        bytes.extend([0; 4]);
        bytes.push(2);
        bytes.extend(crc32c(&checked).to_be_bytes());
        bytes.extend(checked);
        let first = self.last;
        self.last += records.len() as i64;
        self.batches.push(Batch { first, last: self.last - 1, bytes });
    }

    fn stable(&self) -> i64 {
        self.stable.unwrap_or(self.last)
    }
}

fn varint(bytes: &mut Vec<u8>, number: i64) {
    let mut rest = ((number << 1) ^ (number >> 63)) as u64;
    while rest >= 0x80 {
        bytes.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.push(rest as u8);
}

fn varbytes(bytes: &mut Vec<u8>, part: Option<&[u8]>) {
    varint(bytes, part.map_or(-1, |part| part.len() as i64));
    bytes.extend(part.unwrap_or_default());
}

/// CRC-32C bit by bit, so that it is nobody's table.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// A request that is read from front to back.
struct Request<'a>(&'a [u8]);

impl Request<'_> {
    fn take(&mut self, length: usize) -> io::Result<&[u8]> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.0 = rest;
        Ok(taken)
    }

    fn i8(&mut self) -> io::Result<i8> {
        Ok(self.take(1)?[0] as i8)
    }

    fn i16(&mut self) -> io::Result<i16> {
        Ok(i16::from_be_bytes([self.i8()? as u8, self.i8()? as u8]))
    }

    fn i32(&mut self) -> io::Result<i32> {
        Ok((i32::from(self.i16()?) << 16) | i32::from(self.i16()? as u16))
    }

    fn i64(&mut self) -> io::Result<i64> {
        Ok((i64::from(self.i32()?) << 32) | i64::from(self.i32()? as u32))
    }

    fn text(&mut self) -> io::Result<String> {
        let length = self.i16()?.max(0) as usize;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as i16).to_be_bytes());
    out.extend(text.as_bytes());
}

/// Reads one request and writes the answer.
fn answer(mut stream: &TcpStream, log: &Mutex<Log>, port: u16) -> io::Result<()> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    // What is no request of this protocol ends the connection, as Kafka does.
    let length = usize::try_from(i32::from_be_bytes(length)).ok().filter(|length| *length <= 100 << 20);
    let mut request = vec![0; length.ok_or(io::ErrorKind::InvalidData)?];
    stream.read_exact(&mut request)?;
    let mut request = Request(&request);
    let (api, version, number) = (request.i16()?, request.i16()?, request.i32()?);
    request.text()?;
    let mut out = vec![0; 4];
    out.extend(number.to_be_bytes());
    match api {
        18 => {
            out.extend(0i16.to_be_bytes());
            let fetch = lock(log).fetch_version_max;
            let known = [(1, 4, fetch), (2, 1, 5), (3, 0, 9), (17, 0, 1), (18, 0, 0), (36, 0, 0)];
            out.extend((known.len() as i32).to_be_bytes());
            known
                .iter()
                .for_each(|(api, low, high)| [*api, *low, *high].iter().for_each(|n| out.extend(n.to_be_bytes())));
        }
        17 => {
            let code: i16 = if request.text()? == "PLAIN" { 0 } else { 33 };
            out.extend(code.to_be_bytes());
            out.extend(1i32.to_be_bytes());
            text(&mut out, "PLAIN");
        }
        36 => {
            let length = request.i32()?.max(0) as usize;
            let given = String::from_utf8_lossy(request.take(length)?).into_owned();
            let is_right =
                lock(log).login.as_ref().is_some_and(|(user, password)| given == format!("\0{user}\0{password}"));
            out.extend(if is_right { 0i16 } else { 58 }.to_be_bytes());
            text(&mut out, if is_right { "" } else { "wrong password" });
            out.extend(0i32.to_be_bytes());
        }
        3 => metadata(&mut request, &mut out, &lock(log), port)?,
        2 => offsets(&mut request, &mut out, &lock(log))?,
        1 => fetch(&mut request, &mut out, log, version)?,
        _ => return Err(io::ErrorKind::Unsupported.into()),
    }
    let length = (out.len() as i32 - 4).to_be_bytes();
    out[..4].copy_from_slice(&length);
    stream.write_all(&out)
}

fn metadata(request: &mut Request<'_>, out: &mut Vec<u8>, log: &Log, port: u16) -> io::Result<()> {
    request.i32()?;
    let topic = request.text()?;
    out.extend(0i32.to_be_bytes());
    out.extend(1i32.to_be_bytes());
    out.extend(NODE.to_be_bytes());
    text(out, "127.0.0.1");
    out.extend(i32::from(port).to_be_bytes());
    out.extend((-1i16).to_be_bytes());
    text(out, "a cluster");
    out.extend(NODE.to_be_bytes());
    out.extend(1i32.to_be_bytes());
    let partitions = log.topics.get(&topic);
    out.extend(if partitions.is_some() { 0i16 } else { 3 }.to_be_bytes());
    text(out, &topic);
    out.push(0);
    let count = partitions.map_or(0, Vec::len) as i32;
    out.extend(count.to_be_bytes());
    for index in 0..count {
        out.extend(0i16.to_be_bytes());
        out.extend(index.to_be_bytes());
        out.extend(NODE.to_be_bytes());
        for _ in 0..2 {
            out.extend(1i32.to_be_bytes());
            out.extend(NODE.to_be_bytes());
        }
    }
    Ok(())
}

fn offsets(request: &mut Request<'_>, out: &mut Vec<u8>, log: &Log) -> io::Result<()> {
    request.i32()?;
    let isolation = request.i8()?;
    request.i32()?;
    let topic = request.text()?;
    let count = request.i32()?;
    out.extend(0i32.to_be_bytes());
    out.extend(1i32.to_be_bytes());
    text(out, &topic);
    out.extend(count.to_be_bytes());
    for _ in 0..count {
        let (index, time) = (request.i32()?, request.i64()?);
        let partition = log.topics.get(&topic).and_then(|partitions| partitions.get(index as usize));
        let offset = partition.map(|p| match (time, isolation) {
            (-2, _) => p.first,
            (_, 0) => p.last,
            _ => p.stable(),
        });
        out.extend(index.to_be_bytes());
        out.extend(if offset.is_some() { 0i16 } else { 3 }.to_be_bytes());
        out.extend((-1i64).to_be_bytes());
        out.extend(offset.unwrap_or(-1).to_be_bytes());
    }
    Ok(())
}

fn fetch(request: &mut Request<'_>, out: &mut Vec<u8>, log: &Mutex<Log>, version: i16) -> io::Result<()> {
    request.i32()?;
    let wait_ms = request.i32()?;
    request.i32()?;
    let mut room = i64::from(request.i32()?);
    request.i8()?;
    if version >= 7 {
        request.i64()?;
    }
    request.i32()?;
    let topic = request.text()?;
    let mut wanted = Vec::new();
    for _ in 0..request.i32()? {
        let index = request.i32()?;
        if version >= 9 {
            request.i32()?;
        }
        let from = request.i64()?;
        if version >= 5 {
            request.i64()?;
        }
        wanted.push((index, from, request.i32()?));
    }
    let has_some = |log: &Log| {
        log.topics.get(&topic).is_none_or(|partitions| {
            wanted.iter().any(|(index, from, _)| partitions.get(*index as usize).is_none_or(|p| *from < p.stable()))
        })
    };
    if !has_some(&lock(log)) {
        SystemClock::new().sleep_ms(wait_ms.max(0) as u64);
    }
    let log = lock(log);
    out.extend(0i32.to_be_bytes());
    if version >= 7 {
        out.extend([0; 6]);
    }
    out.extend(1i32.to_be_bytes());
    text(out, &topic);
    out.extend((wanted.len() as i32).to_be_bytes());
    for (index, from, limit) in wanted {
        let partition = log.topics.get(&topic).and_then(|partitions| partitions.get(index as usize));
        let code: i16 = match partition {
            None => 3,
            Some(p) if from < p.first || from > p.last => 1,
            Some(_) => 0,
        };
        out.extend(index.to_be_bytes());
        out.extend(code.to_be_bytes());
        out.extend(partition.map_or(-1, |p| p.last).to_be_bytes());
        out.extend(partition.map_or(-1, Partition::stable).to_be_bytes());
        if version >= 5 {
            out.extend(partition.map_or(-1, |p| p.first).to_be_bytes());
        }
        let mut batches: Vec<u8> = Vec::new();
        let mut aborted = Vec::new();
        if let Some(p) = partition.filter(|_| code == 0) {
            for batch in p.batches.iter().filter(|batch| batch.last >= from && batch.first < p.stable()) {
                let is_first = batches.is_empty() && room > 0;
                let length = batch.bytes.len() as i64;
                if !is_first && (length > room || (batches.len() as i64 + length) > i64::from(limit)) {
                    break;
                }
                room -= length;
                batches.extend(&batch.bytes);
            }
            aborted = p.aborted.iter().filter(|(_, _, last)| *last >= from).collect();
        }
        out.extend((aborted.len() as i32).to_be_bytes());
        for (producer, first, _) in aborted {
            out.extend(producer.to_be_bytes());
            out.extend(first.to_be_bytes());
        }
        if version >= 11 {
            out.extend((-1i32).to_be_bytes());
        }
        out.extend((batches.len() as i32).to_be_bytes());
        out.extend(batches);
    }
    Ok(())
}
