//! What a cache promises: the bytes of the store, few of them fetched, whatever happens to its files.

use std::sync::atomic::{AtomicU64, Ordering};

use updraft_base::{Key, Permutation};

use super::*;

/// Objects of random bytes in a store that counts what is read of it.
struct Counted {
    objects: Vec<Vec<u8>>,
    read_bytes: AtomicU64,
    reads: AtomicU64,
}

impl Counted {
    fn new(objects: usize, bytes: usize) -> Arc<Counted> {
        let content = |object: usize| -> Vec<u8> {
            let key = Key::new(3).child_index(object as u64);
            (0..bytes as u64).map(|i| key.bits(i) as u8).collect()
        };
        let objects = (0..objects).map(content).collect();
        Arc::new(Counted { objects, read_bytes: AtomicU64::new(0), reads: AtomicU64::new(0) })
    }

    fn object(&self, key: &str) -> &Vec<u8> {
        &self.objects[key.parse::<usize>().unwrap()]
    }
}

impl ReadObjects for Counted {
    fn facts(&self, key: &str) -> Result<ObjectFacts, StoreError> {
        let bytes = self.object(key).len() as u64;
        Ok(ObjectFacts { key: key.to_owned(), bytes, etag: Some("1".into()), version: None, modified_ms: 0 })
    }

    fn read(&self, key: &str, ranges: &[Range<u64>], _: Option<&ObjectFacts>) -> Result<Vec<Bytes>, StoreError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let of_range = |range: &Range<u64>| {
            self.read_bytes.fetch_add(range.end - range.start, Ordering::SeqCst);
            Bytes::copy_from_slice(&self.object(key)[range.start as usize..range.end as usize])
        };
        Ok(ranges.iter().map(of_range).collect())
    }

    fn name(&self, key: &str) -> String {
        format!("memory:/{key}")
    }
}

fn options(memory_bytes: u64, part_bytes: u64, disk: Option<(&std::path::Path, u64)>) -> CacheOptions {
    CacheOptions { memory_bytes, part_bytes, disk: disk.map(|(dir, bytes)| (dir.to_owned(), bytes)) }
}

#[test]
fn ranges_are_those_of_the_store_and_parts_are_fetched_once() {
    let store = Counted::new(1, 1000);
    let cache = Cache::new(store.clone(), options(10_000, 64, None)).unwrap();
    let ranges = [0..0, 3..64, 60..200, 990..1000, 0..1000, 64..128, 500..500];
    let got = cache.read("0", &ranges, None).unwrap();
    for (range, bytes) in ranges.iter().zip(&got) {
        assert_eq!(bytes[..], store.objects[0][range.start as usize..range.end as usize], "{range:?}");
    }
    cache.read("0", &ranges, None).unwrap();
    assert_eq!(cache.reading().fetched_bytes, 1000);
    assert_eq!((store.read_bytes.load(Ordering::SeqCst), store.reads.load(Ordering::SeqCst)), (1000, 1));
}

/// Bytes fetched in each of three epochs over objects read whole in an order that is random in each epoch.
fn fetched(objects: u64, options: CacheOptions, foresees: bool) -> Vec<f64> {
    const BYTES: usize = 256;
    let store = Counted::new(objects as usize, BYTES);
    let cache = Cache::new(store.clone(), options).unwrap();
    let keys: Vec<String> = (0..objects).map(|o| o.to_string()).collect();
    let order = |epoch: u64| Permutation::new(&Key::new(9).child_index(epoch), objects);
    let foresee = |epoch: u64| {
        let order = order(epoch);
        cache.foresee(&mut (0..objects).map(|turn| {
            let step = epoch * objects + turn;
            (keys[order.get(turn) as usize].as_str(), step..step + 1)
        }));
    };
    if foresees {
        foresee(0);
    }
    let mut shares = Vec::new();
    for epoch in 0..3 {
        if foresees {
            foresee(epoch + 1);
        }
        let before = store.read_bytes.load(Ordering::SeqCst);
        for turn in 0..objects {
            let object = order(epoch).get(turn) as usize;
            let got = cache.read(&keys[object], &[10..200], None).unwrap();
            assert_eq!(got[0][..], store.objects[object][10..200]);
            if foresees {
                cache.advance(epoch * objects + turn + 1);
            }
        }
        let fetched = store.read_bytes.load(Ordering::SeqCst) - before;
        shares.push(fetched as f64 / (objects * BYTES as u64) as f64);
    }
    shares
}

#[test]
fn half_the_dataset_in_memory_or_on_disk_saves_half_of_the_second_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let file = 256 + 24;
    let half_on_disk = Some((folder.path(), 200 * file));
    for (name, options) in [
        ("memory", options(200 * 256, 256, None)),
        // One object fits in memory beside those on disk.
        ("disk", options(256, 256, half_on_disk)),
    ] {
        let shares = fetched(400, options.clone(), true);
        println!("{name}: fetched of the dataset by epoch {shares:?}");
        assert_eq!(shares[0], 1.0, "{name}");
        assert!(shares[1] <= 0.52 && shares[2] <= 0.52, "{name}: {shares:?}");
        // Nothing does better: each object is needed once before and once after the border of two epochs, and at the
        // border no more than half of them are at hand.
        assert!(shares[1] >= 0.5, "{name}: {shares:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    for options in [options(200 * 256, 256, None), options(0, 256, Some((folder.path(), 200 * file)))] {
        let shares = fetched(400, options, false);
        assert_eq!(shares[1], 0.5, "kept without knowing the order: {shares:?}");
    }
}

#[test]
fn a_damaged_file_is_fetched_again_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let store = Counted::new(3, 300);
    let open = || Cache::new(store.clone(), options(0, 100, Some((folder.path(), 1 << 20)))).unwrap();
    let all = 0..300u64;
    (0..3).for_each(|key| _ = open().read(&key.to_string(), std::slice::from_ref(&all), None).unwrap());
    let files: Vec<PathBuf> = files_below(folder.path()).into_iter().collect();
    assert_eq!(files.len(), 9);
    let content = std::fs::read(&files[0]).unwrap();
    std::fs::write(&files[0], &content[..content.len() - 1]).unwrap();
    let mut flipped = std::fs::read(&files[1]).unwrap();
    flipped[60] ^= 1;
    std::fs::write(&files[1], flipped).unwrap();
    std::fs::write(&files[2], b"").unwrap();
    std::fs::remove_file(&files[3]).unwrap();
    let cache = open();
    for key in 0..3 {
        let got = cache.read(&key.to_string(), std::slice::from_ref(&all), None).unwrap();
        assert_eq!(got[0][..], store.objects[key][..]);
    }
    let reading = cache.reading();
    assert_eq!((reading.corrupt, reading.disk_hits, reading.fetched_bytes), (3, 5, 400));
    // All is whole again.
    (0..3).for_each(|key| _ = open().read(&key.to_string(), std::slice::from_ref(&all), None).unwrap());
    assert_eq!(store.read_bytes.load(Ordering::SeqCst), 900 + 400);
}

#[test]
fn caches_that_share_a_folder_and_lose_their_files_at_any_moment_answer_right() {
    let folder = tempfile::tempdir().unwrap();
    let store = Counted::new(40, 500);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (store, dir) = (store.clone(), folder.path());
            scope.spawn(move || {
                let cache = Cache::new(store.clone(), options(600, 100, Some((dir, 8_000)))).unwrap();
                let key = Key::new(thread);
                cache.foresee(&mut (0..40).map(|o: u64| (["0", "1", "2", "3"][o as usize % 4], o..o + 1)));
                for i in 0..600u64 {
                    let object = key.below(2 * i, 40) as usize;
                    let start = key.below(2 * i + 1, 400);
                    let got = cache.read(&object.to_string(), &[start..start + 100], None).unwrap();
                    assert_eq!(got[0][..], store.objects[object][start as usize..start as usize + 100]);
                    if i % 50 == 49 {
                        // Someone clears the folder away.
                        for part in std::fs::read_dir(dir).unwrap().flatten().filter(|f| f.file_name() != "unfinished")
                        {
                            std::fs::remove_dir_all(part.path()).ok();
                        }
                    }
                }
                assert_eq!(cache.reading().corrupt, 0);
            });
        }
    });
}

#[test]
fn threads_that_miss_the_same_part_fetch_it_once() {
    let store = Counted::new(1, 4096);
    let cache = Cache::new(store.clone(), options(1 << 20, 256, None)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let cache = &cache;
            scope.spawn(move || {
                for part in 0..16u64 {
                    let start = (part + thread * 2) % 16 * 256;
                    cache.read("0", std::slice::from_ref(&(start..start + 256)), None).unwrap();
                }
            });
        }
    });
    assert_eq!(store.read_bytes.load(Ordering::SeqCst), 4096);
}

#[test]
fn files_of_an_earlier_run_serve_the_next_and_go_when_they_are_needed_last() {
    let folder = tempfile::tempdir().unwrap();
    let store = Counted::new(10, 100);
    let file = 124;
    let open = || Cache::new(store.clone(), options(0, 100, Some((folder.path(), 4 * file)))).unwrap();
    let whole = |cache: &Cache, object: u64| {
        _ = cache.read(&object.to_string(), std::slice::from_ref(&(0..100)), None).unwrap()
    };
    let first = open();
    (0..4).for_each(|object| whole(&first, object));
    let second = open();
    let keys: Vec<String> = (0..10).map(|o| o.to_string()).collect();
    // 0 is needed after all others.
    let order = [4usize, 1, 2, 3, 4, 0];
    second.foresee(&mut order.iter().enumerate().map(|(i, o)| (keys[*o].as_str(), i as u64..i as u64 + 1)));
    for (step, object) in order.iter().enumerate() {
        whole(&second, *object as u64);
        second.advance(step as u64 + 1);
    }
    // 4 took the place of 0, which was fetched again.
    assert_eq!((second.reading().disk_hits, second.reading().fetched_bytes), (4, 200));
}

#[test]
fn what_a_dead_process_left_unfinished_is_cleared_away() {
    let folder = tempfile::tempdir().unwrap();
    let store = Counted::new(1, 100);
    let open = || Cache::new(store.clone(), options(0, 100, Some((folder.path(), 1000)))).unwrap();
    drop(open());
    // Whatever process it is named after, also the number of one that lives.
    let left = folder.path().join(format!("unfinished/x-{}-0", std::process::id()));
    std::fs::write(&left, b"half").unwrap();
    let writing = std::fs::File::create(folder.path().join("unfinished/y-1-0")).unwrap();
    writing.lock().unwrap();
    open();
    assert_eq!((left.exists(), folder.path().join("unfinished/y-1-0").exists()), (false, true));
    drop(writing);
    open();
    assert_eq!(std::fs::read_dir(folder.path().join("unfinished")).unwrap().count(), 0);
}

#[test]
fn a_file_under_the_name_of_another_is_not_taken_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = Counted::new(2, 100);
    let open = || Cache::new(store.clone(), options(0, 100, Some((folder.path(), 1 << 20)))).unwrap();
    let whole = |cache: &Cache, object: usize| {
        let got = cache.read(&object.to_string(), std::slice::from_ref(&(0..100)), None).unwrap();
        assert_eq!(got[0][..], store.objects[object][..]);
    };
    let first = open();
    (0..2).for_each(|object| whole(&first, object));
    let files: Vec<PathBuf> = files_below(folder.path()).into_iter().collect();
    let [a, b] = &files[..] else { panic!("{files:?}") };
    std::fs::copy(a, b).unwrap();
    let second = open();
    (0..2).for_each(|object| whole(&second, object));
    assert_eq!((second.reading().corrupt, second.reading().disk_hits), (1, 1));
}

#[test]
fn files_of_others_in_the_folder_are_neither_counted_nor_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let others = ["en/corpus.txt", "de/0123456789abcdef", "ab/notes"].map(|name| folder.path().join(name));
    for file in &others {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, [1; 5000]).unwrap();
    }
    let store = Counted::new(10, 100);
    let cache = Cache::new(store, options(0, 100, Some((folder.path(), 3 * 124)))).unwrap();
    let keys: Vec<String> = (0..10).map(|o| o.to_string()).collect();
    cache.foresee(&mut (0..20).map(|step| (keys[step % 10].as_str(), step as u64..step as u64 + 1)));
    for step in 0..20 {
        cache.read(&keys[step % 10], std::slice::from_ref(&(0..100)), None).unwrap();
        cache.advance(step as u64 + 1);
    }
    assert!(others.iter().all(|file| file.exists()));
    // Room for three of ten.
    assert!(cache.reading().disk_hits >= 2, "{:?}", cache.reading());
}

/// The files of parts.
fn files_below(folder: &std::path::Path) -> BTreeSet<PathBuf> {
    let folders = std::fs::read_dir(folder).unwrap().flatten().filter(|f| f.file_name() != "unfinished");
    folders.flat_map(|f| std::fs::read_dir(f.path()).unwrap().flatten().map(|f| f.path())).collect()
}
