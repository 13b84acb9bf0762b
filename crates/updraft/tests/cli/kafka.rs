//! Topics of Kafka's protocol into datasets: against a broker whose log the tests write, and, where `cargo xtask streams` has
//! started them, against brokers of others that other people's client has written to.

#![allow(clippy::print_stdout, reason = "counts are for the log")]

use std::process::{Child, Stdio};

use updraft_base::{Clock, Key, SystemClock};
use updraft_sim::{KafkaRecord, KafkaServer};

use crate::followed::{counted, numbers, version};
use crate::workplace::Workplace;

const TOPIC: &str = "clicks";

/// A folder, a broker with a topic of so many partitions, and the topic's URL.
fn setting(partitions: usize) -> (Workplace, KafkaServer, String) {
    let server = KafkaServer::new();
    server.create(TOPIC, partitions);
    let stream = format!("{}/{TOPIC}", server.url());
    (Workplace::new(), server, stream)
}

/// Records with these numbers.
fn records(numbers: std::ops::Range<u64>) -> Vec<KafkaRecord> {
    numbers.map(|n| KafkaRecord::of(format!("{{\"n\": {n}}}"))).collect()
}

/// Follows a stream into `out`, with columns for `n`, partition and offset.
fn follow<'a>(stream: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let follow = ["data", "follow", stream, "out", "--value", "json", "--fields", "partition,offset,value"];
    [follow.as_slice(), more].concat()
}

fn once(stream: &str) -> Vec<&str> {
    follow(stream, &["--once"])
}

/// The cells of a column of each partition, in the order of the rows.
fn by_partition(workplace: &Workplace, column: &str, partitions: usize) -> Vec<Vec<i64>> {
    let mut cells = vec![Vec::new(); partitions];
    let out = workplace.path("out");
    for (partition, cell) in numbers(&out, "partition").into_iter().zip(numbers(&out, column)) {
        cells[partition as usize].push(cell);
    }
    cells
}

fn spawned(workplace: &Workplace, arguments: &[&str]) -> Child {
    workplace.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until something is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let clock = SystemClock::new();
    for _ in 0..600 {
        if is_so() {
            return;
        }
        clock.sleep_ms(50);
    }
    panic!("not within 30 seconds: {what}");
}

/// How many rows the dataset has.
fn rows(workplace: &Workplace) -> u64 {
    let out = workplace.path("out");
    if out.join("LATEST").exists() { version(&out, None).manifest.samples() } else { 0 }
}

#[test]
fn every_record_comes_once_and_in_order_however_often_follower_and_broker_are_killed() {
    let (workplace, mut server, stream) = setting(3);
    const KILLS: u64 = 20;
    let clock = SystemClock::new();
    let key = Key::new(clock.now_unix_ms());
    let mut written = 0;
    let mut append = |server: &KafkaServer| {
        for (partition, records_at_once) in [(0, 10), (1, 20), (2, 30)] {
            server.append(TOPIC, partition, &records(written * records_at_once..(written + 1) * records_at_once));
        }
        written += 1;
    };
    for kill in 0..KILLS {
        let mut child = spawned(&workplace, &follow(&stream, &["--shard-bytes", "2KiB", "--shard-seconds", "1"]));
        for step in 0..1 + key.below(kill, 25) {
            append(&server);
            if kill % 4 == 3 && step == 5 {
                server.stop();
                append(&server);
                server.start();
            }
            clock.sleep_ms(20);
        }
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        // SIGKILL: nothing is cleaned up.
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let done = workplace.json(&once(&stream));
    let expected: Vec<Vec<i64>> = [10, 20, 30].map(|records| counted(0..written as i64 * records)).to_vec();
    assert_eq!(by_partition(&workplace, "offset", 3), expected, "{done}");
    assert_eq!(by_partition(&workplace, "n", 3), expected, "{done}");
    let shards = version(&workplace.path("out"), None).manifest.shards.len();
    println!("{} records in {shards} shards, {KILLS} kills, none lost or doubled", 60 * written);
}

#[test]
fn late_records_are_a_new_segment_and_the_manifest_has_the_place() {
    let (workplace, server, stream) = setting(2);
    server.append(TOPIC, 0, &records(0..100));
    let first = workplace.json(&once(&stream));
    assert_eq!((first["entries"].as_u64(), first["last"].as_str()), (Some(100), Some("0:100")));
    let again = workplace.json(&once(&stream));
    assert_eq!((again["entries"].as_u64(), &again["version"]), (Some(0), &first["version"]));
    // What was read may be dropped.
    server.drop_before(TOPIC, 0, 100);
    server.append(TOPIC, 1, &records(100..130));
    let second = workplace.json(&once(&stream));
    assert_eq!((second["entries"].as_u64(), second["lost"].as_u64()), (Some(30), Some(0)));
    let newest = version(&workplace.path("out"), None);
    assert_eq!(newest.segments, 2);
    let place = &newest.manifest.streams[&stream];
    assert_eq!((place.after.as_deref(), place.last.as_str(), place.added), (Some("0:100"), "0:100,1:30", None));
    assert_eq!(numbers(&workplace.path("out"), "n"), counted(0..130));
}

#[test]
fn records_dropped_before_they_were_read_are_an_error_that_counts_them() {
    let (workplace, server, stream) = setting(2);
    server.append(TOPIC, 1, &records(0..100));
    workplace.json(&once(&stream));
    for first in [100, 120] {
        server.append(TOPIC, 1, &records(first..first + 20));
    }
    server.drop_before(TOPIC, 1, 120);
    let (code, message) = workplace.failure(&once(&stream));
    assert!(code == 3 && message.contains("20 records of partition 1, offsets 100 to 119, were dropped"), "{message}");
    assert_eq!(numbers(&workplace.path("out"), "n"), counted(0..100));
    let accepted = workplace.json(&follow(&stream, &["--once", "--accept-loss"]));
    assert_eq!((accepted["lost"].as_u64(), accepted["entries"].as_u64()), (Some(20), Some(20)));
    assert_eq!(numbers(&workplace.path("out"), "n"), [counted(0..100), counted(120..140)].concat());
    // A follower that runs notices, too.
    let mut child =
        workplace.command(&follow(&stream, &["--shard-seconds", "1"])).stderr(Stdio::piped()).spawn().unwrap();
    server.append(TOPIC, 1, &records(140..150));
    until("the next ten are there", || rows(&workplace) == 130);
    server.skip(TOPIC, 1, 5);
    server.append(TOPIC, 1, &records(155..156));
    until("a gap is no loss", || rows(&workplace) == 131);
    server.drop_before(TOPIC, 1, 156);
    server.append(TOPIC, 1, &records(156..157));
    until("dropping what was read is no loss", || rows(&workplace) == 132);
    child.kill().unwrap();
    child.wait().unwrap();
    // A topic that was made anew has no place to go on from.
    server.delete(TOPIC);
    server.create(TOPIC, 2);
    server.append(TOPIC, 1, &records(0..3));
    let (code, message) = workplace.failure(&once(&stream));
    assert!(
        code == 3 && message.contains("partition 1 ends at offset 3") && message.contains("made anew"),
        "{message}"
    );
    server.delete(TOPIC);
    server.create(TOPIC, 1);
    let (code, message) = workplace.failure(&once(&stream));
    assert!(code == 3 && message.contains("has no partition 1"), "{message}");
}

#[test]
fn what_is_no_finished_transaction_is_no_row() {
    let (workplace, server, stream) = setting(1);
    server.append_in_transaction(TOPIC, 0, 5, &records(0..3));
    server.finish(TOPIC, 0, 5, 0, true);
    server.append_in_transaction(TOPIC, 0, 5, &records(3..6));
    // Another producer's records lie between.
    server.append(TOPIC, 0, &records(6..7));
    server.finish(TOPIC, 0, 5, 4, false);
    server.append_in_transaction(TOPIC, 0, 5, &records(7..9));
    let first = workplace.json(&once(&stream));
    assert_eq!(numbers(&workplace.path("out"), "n"), [0, 1, 2, 6], "{first}");
    assert_eq!(first["last"].as_str(), Some("0:9"), "the place is behind the mark");
    server.drop_before(TOPIC, 0, 9);
    server.finish(TOPIC, 0, 5, 9, true);
    let second = workplace.json(&once(&stream));
    assert_eq!(numbers(&workplace.path("out"), "n"), [0, 1, 2, 6, 7, 8], "{second}");
    // Brokers that speak older versions say the same.
    for version in [4, 5, 7, 9] {
        server.limit_fetch(version);
        let out = format!("out{version}");
        let follow = ["data", "follow", &stream, &out, "--once", "--value", "json"];
        assert_eq!(workplace.json(&follow)["entries"].as_u64(), Some(2), "version {version}");
    }
}

#[test]
fn two_followers_at_once_double_nothing() {
    let (workplace, server, stream) = setting(2);
    for first in (0..2000).step_by(20) {
        server.append(TOPIC, usize::from(first % 40 == 0), &records(first..first + 20));
    }
    let arguments = follow(&stream, &["--once", "--shard-bytes", "2KiB"]);
    let mut children = [spawned(&workplace, &arguments), spawned(&workplace, &arguments)];
    let codes: Vec<_> = children.iter_mut().map(|child| child.wait().unwrap().code()).collect();
    assert!(codes.contains(&Some(0)) || codes == [Some(3), Some(3)], "{codes:?}");
    workplace.json(&arguments);
    let mut found = numbers(&workplace.path("out"), "n");
    found.sort_unstable();
    assert_eq!(found, counted(0..2000), "{codes:?}");
}

#[test]
fn a_partition_that_is_added_is_read_from_its_beginning() {
    let (workplace, server, stream) = setting(1);
    server.append(TOPIC, 0, &records(0..10));
    let mut child = spawned(&workplace, &follow(&stream, &["--shard-seconds", "1"]));
    until("the first partition is there", || rows(&workplace) == 10);
    server.create(TOPIC, 2);
    server.append(TOPIC, 1, &records(10..20));
    until("the second one, too", || rows(&workplace) == 20);
    child.kill().unwrap();
    child.wait().unwrap();
    server.create(TOPIC, 3);
    server.append(TOPIC, 2, &records(20..30));
    let done = workplace.json(&once(&stream));
    assert_eq!(done["last"].as_str(), Some("0:10,1:10,2:10"));
    assert_eq!(numbers(&workplace.path("out"), "n"), counted(0..30));
}

#[test]
fn a_record_that_does_not_fit_is_named_after_those_before_it_were_kept() {
    let bad = |value: Option<&str>| KafkaRecord { value: value.map(Into::into), ..KafkaRecord::default() };
    for (record, expected) in [
        (bad(Some("{\"n\": 7")), "clicks partition 0 offset 15, column `value`: EOF while parsing"),
        (bad(Some("[7]")), "clicks partition 0 offset 15, column `value`: is no object"),
        (bad(Some("{\"n\": \"many\"}")), "clicks partition 0 offset 15, column `n`: is text, not i64"),
        (
            bad(Some("{\"m\": 1, \"n\": 1}")),
            "clicks partition 0 offset 15, column `m`: entries before it have no such key",
        ),
        (bad(Some("{}")), "clicks partition 0 offset 15, column `n`: the object has no value for this key"),
        (bad(None), "clicks partition 0 offset 15, column `value`: the record has no value"),
    ] {
        let (workplace, server, stream) = setting(1);
        server.append(TOPIC, 0, &records(0..10));
        workplace.json(&once(&stream));
        server.append(TOPIC, 0, &[records(10..15), vec![record.clone()], records(15..17)].concat());
        for _ in 0..2 {
            let (code, message) = workplace.failure(&once(&stream));
            assert!(code == 3 && message.contains(expected), "{message}");
            assert_eq!(numbers(&workplace.path("out"), "n"), counted(0..15));
        }
        if record.value.is_none() {
            let done = workplace.json(&follow(&stream, &["--once", "--skip-tombstones"]));
            assert_eq!((done["skipped"].as_u64(), done["last"].as_str()), (Some(1), Some("0:18")));
            assert_eq!(numbers(&workplace.path("out"), "n"), counted(0..17));
        }
    }
}

#[test]
fn parts_of_records_are_columns() {
    let (workplace, server, stream) = setting(1);
    let record = |n: i64| KafkaRecord {
        key: Some(format!("k{n}").into()),
        value: Some(vec![0xff, n as u8]),
        headers: vec![("trace".into(), Some(b"1".to_vec())), ("trace".into(), Some((7 * n).to_string().into()))],
        timestamp_ms: 1_700_000_000_000 + n,
    };
    server.append(TOPIC, 0, &[record(1), record(2)]);
    let fields = "key,value,timestamp_ms,header.trace";
    workplace.json(&["data", "follow", &stream, "out", "--once", "--fields", fields, "--column", "key=bytes"]);
    let out = workplace.path("out");
    let schema = version(&out, None).manifest.schema;
    let kinds: Vec<String> = schema.columns.iter().map(|c| format!("{} {}", c.name, c.kind)).collect();
    assert_eq!(kinds, ["key bytes", "value bytes", "timestamp_ms i64", "header.trace i64"]);
    assert_eq!(numbers(&out, "timestamp_ms"), [1_700_000_000_001, 1_700_000_000_002]);
    assert_eq!(numbers(&out, "header.trace"), [7, 14]);
    server.append(TOPIC, 0, &records(0..1));
    let (code, message) = workplace.failure(&["data", "follow", &stream, "out", "--once", "--fields", fields]);
    assert!(code == 3 && message.contains("partition 0 offset 2, column `key`: the record has no key"), "{message}");
    let (code, message) = workplace.failure(&["data", "follow", &stream, "new", "--once", "--fields", "vlaue"]);
    assert!(code == 2 && message.contains("`vlaue` is none of key, value"), "{message}");
}

#[test]
fn keys_of_values_are_of_the_kinds_that_are_asked_for_also_where_no_record_has_come_yet() {
    let (workplace, server, stream) = setting(1);
    let follow = ["data", "follow", &stream, "out", "--once", "--value", "json", "--column", "n=f32"];
    assert_eq!(workplace.json(&follow)["entries"].as_u64(), Some(0));
    server.append(TOPIC, 0, &records(0..10));
    server.append(TOPIC, 0, &[KafkaRecord::of("\n{\"n\":\n10.5}")]);
    assert_eq!(workplace.json(&follow)["entries"].as_u64(), Some(11));
    let schema = version(&workplace.path("out"), None).manifest.schema;
    assert_eq!(schema.columns[0].kind.to_string(), "f32");
}

#[test]
fn a_record_larger_than_a_shard_is_a_shard() {
    let (workplace, server, stream) = setting(1);
    for n in 0..4 {
        let text = "x".repeat(if n == 2 { 9 << 20 } else { 10 });
        server.append(TOPIC, 0, &[KafkaRecord::of(format!("{{\"n\": {n}, \"text\": \"{text}\"}}"))]);
    }
    let done = workplace.json(&follow(&stream, &["--once", "--shard-bytes", "1KiB"]));
    assert_eq!((done["entries"].as_u64(), numbers(&workplace.path("out"), "n")), (Some(4), counted(0..4)));
}

#[test]
fn what_cannot_be_followed_is_said() {
    let (workplace, mut server, stream) = setting(1);
    let address = server.url();
    let nowhere = "--patience-seconds=0";
    for (url, code, expected) in [
        (format!("{address}/klicks"), 3, "the server has no topic `klicks`"),
        (address.clone(), 3, "names no topic"),
        (format!("{address}/a b"), 3, "the topic's name may have"),
        (address.replace("kafka:", "kafka+ssl:") + "/clicks", 6, "closed the connection"),
        (address.replace("kafka:", "kafkas:") + "/clicks", 3, "the URL of a stream begins with"),
        (address.replace("://", "://me@") + "/clicks", 3, "a user without a password"),
    ] {
        let (found, message) = workplace.failure(&["data", "follow", &url, "out", "--once", nowhere]);
        assert!(found == code && message.contains(expected), "{url}: {found} {message}");
    }
    server.want_login("me", "secr:t@/%");
    for (login, expected) in [("me:wrong", "refuses the login of `me`: wrong password"), ("me:secr:t@%2F%25", "")] {
        let url = stream.replace("://", &format!("://{login}@"));
        server.append(TOPIC, 0, &records(0..1));
        let output = workplace.command(&["data", "follow", &url, "out", "--once", nowhere]).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() == expected.is_empty() && message.contains(expected), "{message}");
        assert!(!message.contains("wrong@"), "{message}");
    }
    server.stop();
    let (code, message) = workplace.failure(&["data", "follow", &stream, "out", "--once", nowhere]);
    assert!(code == 6 && message.contains(&format!("{stream} does not answer: 127.0.0.1")), "{message}");
}

/// Brokers of others, with topics that librdkafka has filled: `cargo xtask streams` names their URLs.
#[test]
fn what_librdkafka_wrote_to_brokers_of_others_arrives() {
    #[allow(clippy::disallowed_methods, reason = "where the brokers are, as the chore says")]
    let Ok(brokers) = std::env::var("UPDRAFT_TEST_KAFKA") else { return };
    let workplace = Workplace::new();
    for broker in brokers.split_whitespace() {
        for compression in ["none", "gzip", "snappy", "lz4", "zstd"] {
            let stream = format!("{broker}/{compression}");
            let out = format!("out-{}-{compression}", broker.rsplit(':').next().unwrap_or_default());
            let fields = ["--fields", "partition,offset,header.n,value", "--value", "json", "--shard-bytes", "20KiB"];
            let follow = ["data", "follow", &stream, &out, "--once"];
            let done = workplace.json(&[follow.as_slice(), &fields].concat());
            let out = workplace.path(&out);
            let mut found = numbers(&out, "n");
            assert_eq!(numbers(&out, "header.n"), found, "{stream}");
            let mut next = [0; 4];
            for (partition, offset) in numbers(&out, "partition").into_iter().zip(numbers(&out, "offset")) {
                assert_eq!(offset, next[partition as usize], "{stream} partition {partition}");
                next[partition as usize] += 1;
            }
            found.sort_unstable();
            assert_eq!(found, counted(0..1000), "{stream}");
            println!("{stream}: {} records in {} shards", done["entries"], done["shards"]);
        }
    }
}
