//! While a quarter to a third of all requests fail, nothing is lost, doubled or wrong.
//!
//! Threads read and write side by side through stores that fail by a seeded schedule: refusals, lost answers, stalls, broken
//! connections, short bodies, wrong versions, slow answers. What each object must be is known, since one thread owns it, or
//! since there must be one winner, or since updates add up; in the end the bucket is looked at past the faults.
#![allow(clippy::print_stdout, reason = "the counts are for the log")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::Mutex;

use bytes::Bytes;
use object_store::memory::InMemory;
use updraft_base::Key;
use updraft_sim::{Dialect, FaultRates, FaultyStore, ObjectServer, Schedule};
use updraft_store::{AccessOptions, Created, MeterReading, Objects, RequestClass, StoreError};

const THREADS: u64 = 8;
const STEPS: u64 = 400;
const RACES: u64 = 60;
const COUNTERS: u64 = 4;

fn options() -> AccessOptions {
    AccessOptions {
        // A third of requests failing 16 times in a row happens once in 40 million.
        retries: 15,
        backoff_ms: 1,
        backoff_ms_max: 8,
        timeout_ms: 500,
        // Small parts, so that reads are in several.
        part_bytes: 16 << 10,
        coalesce_gap_bytes: 512,
        ..AccessOptions::default()
    }
}

/// What the threads know must be there in the end.
#[derive(Default)]
struct Ledger {
    owned: BTreeMap<String, Option<Bytes>>,
    winners: BTreeMap<String, Vec<Bytes>>,
    increments: BTreeMap<String, u64>,
    calls: u64,
}

/// Bytes that only this version of this object has.
fn content(key: &str, version: u64) -> Bytes {
    let random = Key::new(version).child(key);
    let length = random.below(0, 70_000);
    let mut bytes = format!("{key} {version} ").into_bytes();
    bytes.extend((0..length).map(|i| (random.to_u64().wrapping_add(i * i) >> 7) as u8));
    bytes.into()
}

/// Runs all threads on a store, and gives what must be there.
fn storm(objects: &Objects, seed: u64) -> Ledger {
    let ledger = Mutex::new(Ledger::default());
    for counter in 0..COUNTERS {
        objects.put(&format!("counter/{counter}"), "".into()).unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let ledger = &ledger;
            scope.spawn(move || {
                let part = work(objects, Key::new(seed).child_index(thread), thread);
                let mut ledger = ledger.lock().unwrap();
                ledger.owned.extend(part.owned);
                ledger.calls += part.calls;
                for (key, bytes) in part.winners {
                    ledger.winners.entry(key).or_default().extend(bytes);
                }
                for (key, n) in part.increments {
                    *ledger.increments.entry(key).or_default() += n;
                }
            });
        }
    });
    ledger.into_inner().unwrap()
}

fn work(objects: &Objects, random: Key, thread: u64) -> Ledger {
    let mut ledger = Ledger::default();
    let mut race = 0;
    for step in 0..STEPS {
        ledger.calls += 1;
        let key = format!("owned/{thread}/{}", random.below(2 * step, 12));
        let known = ledger.owned.get(&key).cloned().flatten();
        match random.below(2 * step + 1, 10) {
            0..=2 => {
                let bytes = content(&key, step);
                let facts = objects.put(&key, bytes.clone()).unwrap();
                assert_eq!(facts.bytes, bytes.len() as u64);
                ledger.owned.insert(key, Some(bytes));
            }
            3..=6 => match known {
                Some(bytes) if step % 2 == 0 => assert!(objects.get(&key).unwrap() == bytes, "{key} is wrong"),
                Some(bytes) => {
                    let length = bytes.len() as u64;
                    let ranges = [0..length.min(5), length / 2..length, length / 3..length / 2];
                    let facts = objects.head(&key).unwrap();
                    for expected in [None, Some(&facts)] {
                        for (range, got) in ranges.iter().zip(objects.get_ranges(&key, &ranges, expected).unwrap()) {
                            assert!(got == bytes[range.start as usize..range.end as usize], "{key} {range:?} is wrong");
                        }
                    }
                }
                None => assert!(objects.get(&key).is_err()),
            },
            7 => {
                objects.delete(&key).unwrap();
                ledger.owned.insert(key, None);
            }
            8 if race < RACES => {
                let key = format!("race/{race}");
                let ours = Bytes::from(format!("{key} by {thread}"));
                if objects.create(&key, ours.clone()).unwrap() == Created::New {
                    ledger.winners.entry(key).or_default().push(ours);
                }
                race += 1;
            }
            _ => {
                let key = format!("counter/{}", random.below(2 * step, COUNTERS));
                increment(objects, &key, thread, step);
                *ledger.increments.entry(key).or_default() += 1;
            }
        }
    }
    ledger
}

/// Adds a mark to a list, whoever else does. A mark is looked for before it is added: where an answer was lost, only the list
/// can tell whether it is there.
fn increment(objects: &Objects, key: &str, thread: u64, step: u64) {
    let mark = format!("{thread}-{step}");
    loop {
        let facts = objects.head(key).unwrap();
        let Ok(read) = objects.get_ranges(key, std::slice::from_ref(&(0..facts.bytes)), Some(&facts)) else { continue };
        let list = String::from_utf8(read[0].to_vec()).unwrap();
        if list.split_whitespace().any(|m| m == mark) {
            return;
        }
        match objects.update(key, format!("{list} {mark}").into(), &facts) {
            Ok(true) => return,
            Ok(false) | Err(StoreError::Undetermined { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// How many marks a list has, each once.
fn marks(bytes: &[u8]) -> u64 {
    let marks: Vec<&str> = std::str::from_utf8(bytes).unwrap().split_whitespace().collect();
    assert_eq!(marks.iter().collect::<BTreeSet<_>>().len(), marks.len(), "an update was doubled: {marks:?}");
    marks.len() as u64
}

/// Compares what must be there with what is.
fn settle(name: &str, ledger: &Ledger, objects: &Objects, schedule: &Schedule, there: &BTreeMap<String, Bytes>) {
    let expected = ledger.owned.iter().filter_map(|(key, bytes)| Some((key, bytes.as_ref()?)));
    let owned = there.iter().filter(|(key, _)| key.starts_with("owned/"));
    assert!(expected.clone().map(|(k, _)| k).eq(owned.clone().map(|(k, _)| k)), "lost or risen from the dead");
    assert!(expected.eq(owned), "wrong bytes");
    for (key, winners) in &ledger.winners {
        assert_eq!(winners.len(), 1, "{key} was won by {winners:?}");
        assert_eq!(there[key], winners[0]);
    }
    assert_eq!(
        there.keys().filter(|key| key.starts_with("race/")).count(),
        ledger.winners.len(),
        "a race without winner"
    );
    for (key, n) in &ledger.increments {
        assert_eq!(marks(&there[key]), *n, "{key} lost an update");
    }
    let (meter, faults) = (objects.meter(), schedule.counts());
    let met: u64 = faults.values().sum();
    println!(
        "{name}: {} calls, {} requests, of which {met} met a fault: {faults:?}; {} retries, {} hedges ({} won); {} objects, {} \
         races and {} updates all as they must be",
        ledger.calls,
        schedule.requests(),
        meter.retries,
        meter.hedges,
        meter.hedges_won,
        there.len(),
        ledger.winners.len(),
        ledger.increments.values().sum::<u64>(),
    );
    assert_eq!(faults.len(), 8, "a kind of fault was never met");
    // Slow answers are no failures, and a stalled or slow read may be saved by a hedge.
    assert!(meter.retries * 10 > met * 6, "{} retries of {met} faults", meter.retries);
}

#[test]
fn over_http_nothing_is_lost_doubled_or_wrong() {
    for (name, dialect, part) in [("S3 over HTTP", Dialect::S3, 0.25), ("GCS over HTTP", Dialect::Gcs, 0.33)] {
        let schedule = Arc::new(Schedule::new(17, FaultRates::all(part)));
        let server = ObjectServer::start(dialect, Some(schedule.clone())).unwrap();
        let (url, settings) = server.url_and_settings();
        let objects = Objects::open(&url, &settings, &options()).unwrap();
        let ledger = storm(&objects, 5);
        settle(name, &ledger, &objects, &schedule, &server.objects());
    }
}

#[test]
fn in_process_nothing_is_lost_doubled_or_wrong() {
    let memory = Arc::new(InMemory::new());
    let schedule = Arc::new(Schedule::new(23, FaultRates::all(0.3)));
    let faulty = FaultyStore::new(memory.clone(), schedule.clone());
    let objects = Objects::over(Arc::new(faulty), &options()).unwrap();
    let ledger = storm(&objects, 6);
    let past_the_faults = Objects::over(memory, &options()).unwrap();
    let there = past_the_faults.list("").unwrap().into_iter().map(|facts| {
        let bytes = past_the_faults.get(&facts.key).unwrap();
        (facts.key, bytes)
    });
    settle("memory in process", &ledger, &objects, &schedule, &there.collect());
}

#[test]
fn listings_are_whole_although_every_third_page_fails() {
    let schedule = Arc::new(Schedule::new(3, FaultRates::all(0.33)));
    let server = ObjectServer::start(Dialect::S3, Some(schedule)).unwrap();
    let (url, settings) = server.url_and_settings();
    let objects = Objects::open(&url, &settings, &options()).unwrap();
    std::thread::scope(|scope| {
        for lane in 0..THREADS {
            let objects = &objects;
            scope.spawn(move || {
                for i in (lane..3100).step_by(THREADS as usize) {
                    objects.put(&format!("page/{i:05}"), "x".into()).unwrap();
                }
            });
        }
    });
    for _ in 0..10 {
        let listed = objects.list("page").unwrap();
        assert!(listed.iter().map(|f| f.key.clone()).eq((0..3100).map(|i| format!("page/{i:05}"))));
    }
}

#[test]
fn slow_reads_are_overtaken_by_hedges() {
    // One read in fifty takes 400 ms, the others under one.
    let rates = FaultRates { slow: 0.02, slow_ms: 400, ..FaultRates::default() };
    let schedule = Arc::new(Schedule::new(9, rates));
    let server = ObjectServer::start(Dialect::S3, Some(schedule)).unwrap();
    let (url, settings) = server.url_and_settings();
    let read_all = |hedge: bool| {
        let objects = Objects::open(&url, &settings, &AccessOptions { hedge, ..AccessOptions::default() }).unwrap();
        objects.put("x", vec![7; 1000].into()).unwrap();
        for _ in 0..400 {
            objects.get_ranges("x", std::slice::from_ref(&(10..20)), None).unwrap();
        }
        objects.meter()
    };
    let (plain, hedged) = (read_all(false), read_all(true));
    let p99_ms = |meter: &MeterReading| meter.classes[&RequestClass::Get].latency_us_p99 / 1000;
    println!(
        "99 % of reads within {} ms without hedges, {} ms with {}",
        p99_ms(&plain),
        p99_ms(&hedged),
        hedged.hedges
    );
    assert_eq!((plain.hedges, plain.retries, hedged.retries), (0, 0, 0));
    assert!(hedged.hedges_won > 0 && hedged.hedges <= 40, "{hedged:?}");
}
