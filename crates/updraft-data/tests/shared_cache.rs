//! Small objects from a real Redis, which may be slow, wrong or away.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use updraft_base::SystemClock;
use updraft_data::{SharedCache, SharedCacheOptions};
use updraft_sim::RedisServer;
use updraft_store::{AccessOptions, ObjectFacts, Objects, ReadObjects, StoreError};

/// Objects in a folder, and how often they were asked for.
struct Counted {
    objects: Objects,
    facts: AtomicU64,
    reads: AtomicU64,
}

impl ReadObjects for Counted {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        self.facts.fetch_add(1, Ordering::Relaxed);
        self.objects.facts(key)
    }

    fn read(&self, key: &str, ranges: &[Range<u64>], expected: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.objects.read(key, ranges, expected)
    }

    fn name(&self, key: &str) -> String {
        ReadObjects::name(&self.objects, key)
    }
}

struct Setting {
    folder: tempfile::TempDir,
    server: RedisServer,
}

/// A cache as another process would have it, and its store.
struct Process {
    cache: SharedCache,
    store: Arc<Counted>,
}

impl Setting {
    fn new() -> Setting {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("server")).unwrap();
        let server = RedisServer::start(&folder.path().join("server"), RedisServer::free_port());
        Setting { folder, server }
    }

    fn objects(&self) -> Objects {
        let path: &Path = &self.folder.path().join("objects");
        Objects::open(path.to_str().unwrap(), &Default::default(), &AccessOptions::default()).unwrap()
    }

    fn process(&self, change: impl FnOnce(&mut SharedCacheOptions)) -> Process {
        let store = Arc::new(Counted { objects: self.objects(), facts: AtomicU64::new(0), reads: AtomicU64::new(0) });
        // A machine under load takes its time, and the test is not about that.
        let mut options = SharedCacheOptions { timeout_ms: 5_000, ..SharedCacheOptions::new(&self.server.url()) };
        change(&mut options);
        Process { cache: SharedCache::new(store.clone(), options, Arc::new(SystemClock::new())).unwrap(), store }
    }
}

impl Process {
    fn whole(&self, key: &str) -> Bytes {
        let bytes = self.cache.facts(key).unwrap().bytes;
        self.cache.read(key, &[0..bytes], None).unwrap().remove(0)
    }

    /// Looks at objects and reads of them that reached the store.
    fn asked(&self) -> (u64, u64) {
        (self.store.facts.load(Ordering::Relaxed), self.store.reads.load(Ordering::Relaxed))
    }
}

fn content(seed: u8, bytes: usize) -> Bytes {
    (0..bytes).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect::<Vec<_>>().into()
}

#[test]
fn a_second_process_fetches_no_small_object_and_no_manifest_at_all() {
    let setting = Setting::new();
    let manifest = format!("manifests/{}.json", "ab".repeat(32));
    let large = content(3, 1 << 20);
    for (key, bytes) in
        [("index.json", content(1, 5000)), (manifest.as_str(), content(2, 300)), ("large", large.clone())]
    {
        setting.objects().put(key, bytes).unwrap();
    }
    // The last kilobyte of a large object, and one beside it.
    let footer = [(1 << 20) - 1000..1 << 20, 7..99];
    let read = |process: &Process| {
        assert_eq!(process.whole("index.json"), content(1, 5000));
        assert_eq!(process.cache.read("index.json", &[10..20, 4990..5000], None).unwrap()[1], content(1, 5000)[4990..]);
        assert_eq!(process.whole(&manifest), content(2, 300));
        let parts = process.cache.read("large", &footer, None).unwrap();
        assert_eq!((&parts[0][..], &parts[1][..]), (&large[(1 << 20) - 1000..], &large[7..99]));
    };
    let first = setting.process(|_| {});
    read(&first);
    assert_eq!(first.asked().1, 3);
    let reading = first.cache.reading();
    assert_eq!((reading.put_bytes > 5300 + 1092, reading.corrupt, reading.away), (true, 0, 0));

    let second = setting.process(|_| {});
    read(&second);
    // It looks once whether the two that may change have changed.
    assert_eq!(second.asked(), (2, 0));
    let reading = second.cache.reading();
    assert_eq!((reading.misses, reading.put_bytes), (0, 0));
    assert!(reading.hits >= 6 && reading.hit_bytes > 5300 + 1092);

    // Megabytes are not for it.
    assert_eq!(second.whole("large"), large);
    assert_eq!(second.asked().1, 1);
    assert_eq!(second.cache.reading().put_bytes, 0);

    // Where looks are believed for a while, there are none.
    for expected in [2, 0] {
        let process = setting.process(|options| options.facts_ms = 60_000);
        read(&process);
        assert_eq!(process.asked(), (expected, 0));
    }
}

#[test]
fn an_object_that_has_changed_is_not_served_from_before() {
    let setting = Setting::new();
    let process = setting.process(|_| {});
    for seed in 0..5 {
        setting.objects().put("a", content(seed, 1000)).unwrap();
        assert_eq!(process.whole("a"), content(seed, 1000));
        assert_eq!(setting.process(|_| {}).whole("a"), content(seed, 1000));
    }
    assert_eq!(process.asked().1, 5);
}

#[test]
fn what_was_damaged_is_fetched_again_and_counted() {
    let setting = Setting::new();
    setting.objects().put("a", content(1, 1000)).unwrap();
    let process = setting.process(|_| {});
    process.whole("a");
    let keys = setting.server.call(&["KEYS", "updraft*"]);
    let [key] = keys.split(' ').collect::<Vec<_>>()[..] else { panic!("{keys}") };
    for (damage, corrupt) in [(vec!["SETRANGE", key, "500", "x!"], 1), (vec!["SET", key, "x"], 2)] {
        setting.server.call(&damage);
        assert_eq!(process.whole("a"), content(1, 1000));
        assert_eq!(process.cache.reading().corrupt, corrupt);
        // It is whole again.
        assert_eq!(process.whole("a"), content(1, 1000));
        assert_eq!((process.cache.reading().corrupt, process.asked().1), (corrupt, 1 + corrupt));
    }
}

#[test]
fn a_server_that_is_killed_or_was_never_there_fails_no_read() {
    let setting = Setting::new();
    for n in 0..50 {
        setting.objects().put(&n.to_string(), content(n, 1000)).unwrap();
    }
    let process = setting.process(|options| options.retry_ms = 0);
    let absent = setting.process(|options| options.url = format!("redis://127.0.0.1:{}", RedisServer::free_port()));
    let (port, folder) = (setting.server.port(), setting.folder.path().join("server"));
    let mut server = Some(setting.server);
    for n in 0..50 {
        match n {
            20 => server.take().unwrap().kill(),
            35 => server = Some(RedisServer::start(&folder, port)),
            _ => {}
        }
        for process in [&process, &absent] {
            assert_eq!(process.whole(&n.to_string()), content(n, 1000));
        }
    }
    let reading = process.cache.reading();
    assert!(reading.away >= 15, "{reading:?}");
    // Before it was killed and after it was back, what was read was put.
    assert!((34_000..=36_000).contains(&reading.put_bytes), "{reading:?}");
    let reading = absent.cache.reading();
    assert_eq!((reading.away, reading.hits, reading.put_bytes), (100, 0, 0));
}

#[test]
fn a_server_that_is_full_still_gives_what_it_has() {
    let setting = Setting::new();
    for (key, seed) in [("kept", 1), ("late", 2)] {
        setting.objects().put(key, content(seed, 1000)).unwrap();
    }
    let process = setting.process(|_| {});
    process.whole("kept");
    // It never evicts unless told to.
    setting.server.call(&["CONFIG", "SET", "maxmemory", "1"]);
    for _ in 0..3 {
        assert_eq!(process.whole("late"), content(2, 1000));
        assert_eq!(process.whole("kept"), content(1, 1000));
    }
    let reading = process.cache.reading();
    assert_eq!((reading.hits, reading.refused, reading.away), (3, 3, 0), "{reading:?}");
    assert_eq!(process.asked().1, 4);
}
