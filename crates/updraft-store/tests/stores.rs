//! Every kind of store does what [`Objects`] promises.
//!
//! Memory, a local folder and our own servers of S3's and Google's dialects always run. Other people's servers run where
//! `cargo xtask stores` has started them and says so in the environment; without it they are skipped, in so many words.
#![allow(clippy::print_stdout, reason = "what was skipped and what was measured is for the log")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use updraft_sim::{Dialect, FaultRates, ObjectServer, Operation, Schedule};
use updraft_store::{AccessOptions, Created, Objects, RequestClass, StoreError};

fn options() -> AccessOptions {
    // Small parts, so that small objects are read in several.
    AccessOptions { part_bytes: 64 << 10, coalesce_gap_bytes: 1 << 10, ..AccessOptions::default() }
}

fn conforms(url: &str, settings: &BTreeMap<String, String>) {
    let objects = Objects::open(url, settings, &options()).unwrap();
    objects_come_and_go(&objects);
    ranges_are_what_was_asked(&objects);
    a_changed_object_is_never_mixed(&objects);
    listings_are_whole_and_by_segments(&objects);
    odd_names_stay_what_they_are(&objects);
    large_objects_go_in_parts(&objects);
    one_creator_wins(&objects);
    no_update_is_lost(&objects);
    let meter = objects.meter();
    let millis = |class| meter.classes.get(&class).map_or(0.0, |c| c.latency_us_p50 as f64 / 1000.0);
    let [get, put] = [RequestClass::Get, RequestClass::Put].map(millis);
    println!("{url}: {} requests, half of the reads in {get} ms and of the writes in {put} ms", meter.requests());
}

#[test]
fn memory_conforms() {
    conforms("memory:", &BTreeMap::new());
}

#[test]
fn a_local_folder_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("made by the first write/é");
    conforms(missing.to_str().unwrap(), &BTreeMap::new());
    let url = format!("file://{}/by%20url", dir.path().display());
    conforms(&url, &BTreeMap::new());
    assert!(dir.path().join("by url").is_dir());
}

#[test]
fn the_test_servers_conform() {
    for dialect in [Dialect::S3, Dialect::Gcs] {
        let server = ObjectServer::start(dialect, None).unwrap();
        let (url, settings) = server.url_and_settings();
        conforms(&url, &settings);
        conforms(&format!("{url}/a/prefix"), &settings);
        assert_eq!(server.unfinished_uploads(), 0);
    }
}

#[test]
fn servers_of_others_conform() {
    let variable = |name: &str| {
        #[allow(clippy::disallowed_methods, reason = "`cargo xtask stores` hands its addresses over here")]
        let value = std::env::var(name).ok();
        if value.is_none() {
            println!("skipped: {name} is not set; `cargo xtask stores` starts the server and sets it");
        }
        value
    };
    let settings = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    if let Some(endpoint) = variable("UPDRAFT_TEST_S3") {
        let keys = settings(&[
            ("endpoint", &endpoint),
            ("access_key_id", "test"),
            ("secret_access_key", "test"),
            ("region", "us-east-1"),
        ]);
        conforms("s3://updraft", &keys);
        conforms("s3://updraft/a/prefix", &keys);
        let missing = Objects::open("s3://no-such-bucket", &keys, &options()).unwrap();
        let error = missing.get("key").unwrap_err();
        let StoreError::Read { source, .. } = &error else { panic!("{error}") };
        assert!(source.hint.as_ref().is_some_and(|hint| hint.contains("no-such-bucket")), "{source:?}");
    }
    if let Some(endpoint) = variable("UPDRAFT_TEST_AZURE") {
        // The account that every Azurite has, as its manual publishes it.
        let key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
        let keys = settings(&[("endpoint", &endpoint), ("account_name", "devstoreaccount1"), ("account_key", key)]);
        conforms("az://updraft", &keys);
        conforms("az://updraft/a/prefix", &keys);
    }
}

fn objects_come_and_go(objects: &Objects) {
    for (key, bytes) in [("plain/empty", Bytes::new()), ("plain/small", Bytes::from_static(b"hello"))] {
        let put = objects.put(key, bytes.clone()).unwrap();
        let head = objects.head(key).unwrap();
        assert_eq!((put.key.as_str(), put.bytes, &put.etag), (key, bytes.len() as u64, &head.etag));
        assert_eq!(head.bytes, bytes.len() as u64);
        assert!(head.etag.is_some() && head.modified_ms > 1_600_000_000_000, "{head:?}");
        assert_eq!(objects.get(key).unwrap(), bytes);
        objects.put(key, "another".into()).unwrap();
        assert_eq!(objects.get(key).unwrap(), "another");
        assert_ne!(objects.head(key).unwrap().etag, head.etag);
        objects.delete(key).unwrap();
        objects.delete(key).unwrap();
        for error in [
            objects.get(key).map(drop),
            objects.head(key).map(drop),
            objects.get_ranges(key, std::slice::from_ref(&(0..1)), None).map(drop),
        ] {
            let error = error.unwrap_err();
            assert!(matches!(&error, StoreError::NotFound { what } if what.contains(key)), "{error:?}");
        }
    }
    assert!(matches!(objects.get("a//b"), Err(StoreError::Key { .. })));
}

fn ranges_are_what_was_asked(objects: &Objects) {
    let bytes: Bytes = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let facts = objects.put("ranges", bytes.clone()).unwrap();
    assert_eq!(objects.get("ranges").unwrap(), bytes);
    let ranges = [5..9, 299_990..300_000, 0..0, 100..200_000, 150..160, 0..300_000];
    for expected in [None, Some(&facts)] {
        let got = objects.get_ranges("ranges", &ranges, expected).unwrap();
        for (range, got) in ranges.iter().zip(got) {
            assert_eq!(got, bytes[range.start as usize..range.end as usize], "{range:?}");
        }
        for beyond in [299_999..300_001, 300_000..300_001, 400_000..400_001] {
            let error = objects.get_ranges("ranges", &[0..5, beyond], expected).unwrap_err();
            assert!(matches!(&error, StoreError::Range { bytes: 300_000, .. }), "{error:?}");
        }
    }
}

fn a_changed_object_is_never_mixed(objects: &Objects) {
    let before = objects.put("changing", vec![1; 200_000].into()).unwrap();
    objects.put("changing", vec![2; 200_000].into()).unwrap();
    let error = objects.get_ranges("changing", &[0..10, 100_000..199_000], Some(&before)).unwrap_err();
    let StoreError::Changed { object, expected, found } = &error else { panic!("{error:?}") };
    assert!(
        object.ends_with("changing") && *expected == before.etag && found.is_some() && found != expected,
        "{error:?}"
    );

    // Replaced all the time while it is read in parts: each answer is of one version.
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for version in 3..23 {
                objects.put("changing", vec![version; 200_000].into()).unwrap();
            }
            done.store(1, Ordering::SeqCst);
        });
        while done.load(Ordering::SeqCst) == 0 {
            match objects.get_ranges("changing", &[0..10, 70_000..80_000, 150_000..200_000], None) {
                Ok(pieces) => assert!(pieces.iter().all(|p| p.iter().all(|&b| b == pieces[0][0]))),
                Err(error) => assert!(matches!(error, StoreError::Changed { .. }), "{error:?}"),
            }
        }
    });
}

fn listings_are_whole_and_by_segments(objects: &Objects) {
    // More than one page of S3 and Google.
    let keys: BTreeSet<String> = (0..1203).map(|i| format!("many/{}/{i:04}", i % 7)).collect();
    let numbered: Vec<&String> = keys.iter().collect();
    std::thread::scope(|scope| {
        for lane in 0..8 {
            let numbered = &numbered;
            scope.spawn(move || {
                for key in numbered.iter().skip(lane).step_by(8) {
                    objects.put(key, key.as_bytes().to_vec().into()).unwrap();
                }
            });
        }
    });
    objects.put("many-more", "x".into()).unwrap();
    let listed = objects.list("many").unwrap();
    assert!(listed.iter().map(|facts| &facts.key).eq(keys.iter()), "{} listed", listed.len());
    assert!(listed.iter().all(|facts| facts.bytes == facts.key.len() as u64 && facts.etag.is_some()));
    assert_eq!(objects.list("many/3").unwrap().len(), keys.iter().filter(|k| k.starts_with("many/3/")).count());
    assert!(objects.list("none").unwrap().is_empty());
    assert!(objects.list("").unwrap().len() > 1203);
}

fn odd_names_stay_what_they_are(objects: &Objects) {
    let names = [
        "a b",
        "ü/ß 日本",
        "a+b",
        "a%20b",
        "a&b",
        "less<more>",
        "q=1",
        "what?",
        "semi;colon",
        "it's",
        "tilde~(x)",
        "comma,x",
        "at@x",
        "dollar$x",
        "hash#x",
        "back`tick",
        "caret^x",
        "pipe|x",
        "{x}",
        "[x]",
        "x.",
        ".hidden",
        "colon:x",
    ];
    for name in names {
        let key = format!("odd/{name}");
        objects.put(&key, name.as_bytes().to_vec().into()).unwrap();
        assert_eq!(objects.get(&key).unwrap(), name.as_bytes(), "{key}");
    }
    let mut expected: Vec<String> = names.iter().map(|name| format!("odd/{name}")).collect();
    expected.sort();
    let listed: Vec<String> = objects.list("odd").unwrap().into_iter().map(|facts| facts.key).collect();
    assert_eq!(listed, expected);
}

fn large_objects_go_in_parts(objects: &Objects) {
    // Two whole parts of S3's smallest size and an odd rest.
    let bytes: Bytes = (0..(11 << 20) + 7u32).map(|i| (i % 253) as u8).collect();
    let facts = objects.put("large", bytes.clone()).unwrap();
    assert_eq!(facts.bytes, bytes.len() as u64);
    assert_eq!(objects.head("large").unwrap().etag, facts.etag);
    assert!(objects.get("large").unwrap() == bytes);
    objects.delete("large").unwrap();
}

fn one_creator_wins(objects: &Objects) {
    for round in 0..3 {
        let key = format!("race/{round}");
        let outcomes: Vec<Created> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|racer| {
                    let key = &key;
                    scope.spawn(move || objects.create(key, format!("racer {racer}").into()).unwrap())
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        let winners: Vec<usize> = (0..8).filter(|&i| outcomes[i] == Created::New).collect();
        assert_eq!(winners.len(), 1, "{outcomes:?}");
        assert_eq!(objects.get(&key).unwrap(), format!("racer {}", winners[0]));
        assert_eq!(objects.create(&key, format!("racer {}", winners[0]).into()).unwrap(), Created::Exists);
    }
}

fn no_update_is_lost(objects: &Objects) {
    let stale = objects.put("counter", "0".into()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..5).for_each(|_| increment(objects, "counter")));
        }
    });
    assert_eq!(objects.get("counter").unwrap(), "20");
    assert!(!objects.update("counter", "x".into(), &stale).unwrap());
    let current = objects.list("counter").unwrap().pop();
    // Of a listing, where an object is not its own prefix, and of a head.
    assert_eq!(current, None);
    let current = objects.head("counter").unwrap();
    assert!(objects.update("counter", "y".into(), &current).unwrap());
    objects.delete("counter").unwrap();
    assert!(!objects.update("counter", "z".into(), &current).unwrap());
    assert!(matches!(objects.get("counter"), Err(StoreError::NotFound { .. })));
    objects.put("listed/one", "a".into()).unwrap();
    let listed = objects.list("listed").unwrap().pop().unwrap();
    assert!(objects.update("listed/one", "b".into(), &listed).unwrap());
    assert!(!objects.update("listed/one", "c".into(), &listed).unwrap());
}

/// Adds one to a number, whoever else does.
fn increment(objects: &Objects, key: &str) {
    loop {
        let facts = objects.head(key).unwrap();
        let read = objects.get_ranges(key, std::slice::from_ref(&(0..facts.bytes)), Some(&facts));
        let Ok(bytes) = read else { continue };
        let number: u64 = std::str::from_utf8(&bytes[0]).unwrap().parse().unwrap();
        if objects.update(key, (number + 1).to_string().into(), &facts).unwrap() {
            return;
        }
    }
}

#[test]
fn a_failed_upload_leaves_nothing() {
    for dialect in [Dialect::S3, Dialect::Gcs] {
        let rates = FaultRates { internal_error: 1.0, ..FaultRates::default() };
        let schedule = Schedule::new(1, rates).only(Operation::Put);
        let server = ObjectServer::start(dialect, Some(schedule.into())).unwrap();
        let (url, settings) = server.url_and_settings();
        let options = AccessOptions { retries: 1, backoff_ms: 1, ..options() };
        let objects = Objects::open(&url, &settings, &options).unwrap();
        let error = objects.put("large", vec![0; 12 << 20].into()).unwrap_err();
        let StoreError::Write { object, source } = &error else { panic!("{error:?}") };
        assert!(object.ends_with("bucket/large") && source.attempts == 2, "{error:?}");
        assert!(source.reason.contains("InternalError"), "{source:?}");
        assert_eq!((server.unfinished_uploads(), server.objects().len()), (0, 0));
    }
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let server = ObjectServer::start(Dialect::S3, None).unwrap();
    let (url, settings) = server.url_and_settings();
    let address = server.address().to_string();
    drop(server);
    let options = AccessOptions { retries: 1, backoff_ms: 1, ..options() };
    let error = Objects::open(&url, &settings, &options).unwrap().get("x").unwrap_err();
    let StoreError::Read { source, .. } = &error else { panic!("{error:?}") };
    assert!(source.attempts == 2 && source.reason.contains(&address), "{source:?}");
    assert!(source.hint.as_ref().is_some_and(|hint| hint.contains("127.0.0.1")), "{source:?}");
}

/// Answers each request with the next of some texts, the last one for good; gives the address, and what was asked so far.
fn answering(answers: Vec<&'static str>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = asked.clone();
    // Ends with the process: nobody asks once the test is over.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let mut lines = reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty());
            let Some(first) = lines.next() else { continue };
            lines.for_each(drop);
            let number = {
                let mut log = log.lock().unwrap();
                log.push(first);
                log.len() - 1
            };
            reader.get_mut().write_all(answers[number.min(answers.len() - 1)].as_bytes()).unwrap();
        }
    });
    (url, asked)
}

#[test]
fn a_web_server_that_lacks_something_is_told_of_at_once() {
    const HEAD: &str = "HTTP/1.1 200 -\r\nContent-Length: 10\r\nConnection: close\r\n\r\n";
    let options = AccessOptions { backoff_ms: 1, ..AccessOptions::default() };
    type Call = fn(&Objects) -> Result<(), StoreError>;
    let read: Call = |objects| objects.get_ranges("x", &[2..4], None).map(drop);
    let list: Call = |objects| objects.list("").map(drop);
    let head: Call = |objects| objects.head("x").map(drop);
    let put: Call = |objects| objects.put("x", "y".into()).map(drop);
    for (call, answer, requests, reason, hint) in [
        (
            read,
            "HTTP/1.1 200 -\r\nContent-Length: 10\r\nConnection: close\r\n\r\n0123456789",
            1,
            "not supported",
            "download",
        ),
        // What may be a fault is asked for three times in all.
        (
            read,
            "HTTP/1.1 206 -\r\nContent-Range: bytes 3-4/10\r\nContent-Length: 2\r\nConnection: close\r\n\r\n34",
            3,
            "2..4",
            "",
        ),
        (head, "HTTP/1.1 200 -\r\nConnection: close\r\n\r\n", 3, "Content-Length", ""),
        (list, "HTTP/1.1 501 -\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", 1, "501", "one file"),
        (list, "HTTP/1.1 403 -\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", 1, "403", "one file"),
        (put, "HTTP/1.1 405 -\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", 1, "405", "only gives"),
    ] {
        let (url, asked) = answering(vec![answer]);
        let objects = Objects::open(&url, &BTreeMap::new(), &options).unwrap();
        let error = call(&objects).unwrap_err();
        let (StoreError::Read { source, .. } | StoreError::Write { source, .. }) = &error else { panic!("{error:?}") };
        assert!(source.reason.contains(reason), "{reason}: {source:?}");
        assert_eq!(source.hint.is_some(), !hint.is_empty(), "{source:?}");
        assert!(source.hint.as_deref().unwrap_or_default().contains(hint), "{source:?}");
        assert_eq!(asked.lock().unwrap().len(), requests, "{answer}: {:?}", asked.lock().unwrap());
    }
    // A header that was wrong once is no trait.
    let right = "HTTP/1.1 206 -\r\nContent-Range: bytes 2-3/10\r\nContent-Length: 2\r\nConnection: close\r\n\r\n23";
    let (url, asked) =
        answering(vec![HEAD, "HTTP/1.1 206 -\r\nContent-Range: none\r\nConnection: close\r\n\r\n", right]);
    let objects = Objects::open(&url, &BTreeMap::new(), &options).unwrap();
    assert_eq!(objects.head("x").unwrap().bytes, 10);
    assert_eq!(objects.get_ranges("x", &[2..4], None).unwrap(), ["23"]);
    assert_eq!(asked.lock().unwrap().len(), 3);
}

#[test]
fn a_file_of_credentials_that_is_not_there_is_named_at_once() {
    for (url, variable, file) in [
        ("s3://bucket", "AWS_WEB_IDENTITY_TOKEN_FILE", "/no/such/token"),
        ("s3://bucket", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/no/such/token"),
        ("az://container", "AZURE_FEDERATED_TOKEN_FILE", "/no/such/token"),
        ("gs://bucket", "GOOGLE_APPLICATION_CREDENTIALS", "/no/such/key"),
        // It is there, and is no key.
        ("gs://bucket", "GOOGLE_APPLICATION_CREDENTIALS", "Cargo.toml"),
    ] {
        let settings = [(variable.to_owned(), file.to_owned()), ("AZURE_STORAGE_ACCOUNT".to_owned(), "a".to_owned())];
        let error = Objects::open(url, &settings.into(), &options()).unwrap_err();
        let StoreError::Open { source, .. } = &error else { panic!("{error:?}") };
        let reason = source.to_string();
        assert!(reason.contains(variable) && reason.contains(file), "{reason}");
    }
}

#[test]
fn what_a_variable_asks_for_is_never_passed_over() {
    for (url, pairs, says) in [
        ("s3://x", vec![("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/x")], "AUTHORIZATION_TOKEN_FILE"),
        ("s3://x", vec![("AWS_PROFILE", "absent"), ("HOME", "/no/such/home")], "absent"),
        ("az://x", vec![("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a")], "AccountKey"),
        ("az://x", vec![], "AZURE_STORAGE_CONNECTION_STRING"),
    ] {
        let settings = pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        let error = Objects::open(url, &settings, &options()).unwrap_err();
        let StoreError::Open { source, .. } = &error else { panic!("{error:?}") };
        assert!(source.to_string().contains(says), "{source}");
    }
}

#[test]
fn bytes_that_came_for_nothing_are_counted() {
    let rates = FaultRates { truncated: 0.4, ..FaultRates::default() };
    let schedule = Arc::new(Schedule::new(5, rates).only(Operation::Get));
    let server = ObjectServer::start(Dialect::S3, Some(schedule.clone())).unwrap();
    let (url, settings) = server.url_and_settings();
    let options = AccessOptions { backoff_ms: 1, retries: 30, ..AccessOptions::default() };
    let objects = Objects::open(&url, &settings, &options).unwrap();
    objects.put("x", vec![7; 1000].into()).unwrap();
    for _ in 0..30 {
        assert_eq!(objects.get_ranges("x", &[100..200], None).unwrap()[0].len(), 100);
    }
    let cut = schedule.counts().values().sum::<u64>();
    assert!(cut > 5, "{cut}");
    let reading = objects.meter();
    assert_eq!((reading.bytes_read, reading.retries), (30 * 100 + cut * 50, cut));
}

#[test]
fn requests_are_counted_and_priced() {
    let server = ObjectServer::start(Dialect::S3, None).unwrap();
    let (url, settings) = server.url_and_settings();
    let objects = Objects::open(&url, &settings, &AccessOptions::default()).unwrap();
    for i in 0..10 {
        objects.put(&format!("x/{i}"), vec![0; 100].into()).unwrap();
    }
    for _ in 0..5 {
        objects.get_ranges("x/1", &[0..10, 20..30, 90..100], None).unwrap();
    }
    objects.list("x").unwrap();
    let reading = objects.meter();
    let count = |class| reading.classes.get(&class).map_or(0, |c| c.requests);
    assert_eq!([RequestClass::Put, RequestClass::Get, RequestClass::List].map(count), [10, 5, 1]);
    assert_eq!((reading.bytes_written, reading.bytes_read), (1000, 500));
    // 11 requests at 5000 and 5 at 400 millionths of a dollar for a thousand.
    assert_eq!(reading.cost_micro_usd, Some(57));
    assert!(reading.prices.is_some_and(|prices| !prices.date.is_empty() && !prices.source.is_empty()));
}
