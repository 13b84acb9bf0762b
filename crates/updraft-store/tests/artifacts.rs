//! What the store promises, over memory and over a local folder.

use std::path::Path;
use std::sync::Arc;

use object_store::memory::InMemory;
use serde_json::{Map, json};
use updraft_base::Digest;
use updraft_store::{Origin, Store, StoreError};

fn origin(kind: &str, recipe: serde_json::Value, parents: &[Digest]) -> Origin {
    let versions = [("updraft".to_owned(), "0.1.0".to_owned())].into();
    Origin { kind: kind.into(), recipe, parents: parents.to_vec(), versions }
}

/// Runs a check over both stores.
fn on_each_store(check: impl Fn(&Store)) {
    check(&Store::over(Arc::new(InMemory::new())).unwrap());
    let dir = tempfile::tempdir().unwrap();
    check(&Store::open(&dir.path().join("new/store")).unwrap());
}

#[test]
fn an_artifact_comes_back_with_bytes_and_origin() {
    on_each_store(|store| {
        let asked = origin("model", json!({"seed": 1}), &[]);
        let meta: Map<_, _> = [("accuracy".to_owned(), json!(0.99))].into_iter().collect();
        let artifact = store.put(&asked, "weights", meta.clone()).unwrap();
        assert_eq!(artifact.digest, Digest::of(b"weights"));
        assert_eq!(store.get(&artifact.digest).unwrap(), "weights");
        let found = store.find(&asked).unwrap().unwrap();
        assert_eq!((found.origin, found.meta, found.size_bytes), (asked, meta, 7));
    });
}

#[test]
fn an_origin_is_found_whatever_the_order_of_its_keys_and_only_if_nothing_in_it_changed() {
    on_each_store(|store| {
        let artifact =
            store.put(&origin("model", json!({"a": 1, "b": {"c": 2, "d": 3}}), &[]), "x", Map::new()).unwrap();
        let parent = artifact.digest;
        let same = origin("model", json!({"b": {"d": 3, "c": 2}, "a": 1}), &[]);
        assert_eq!(store.find(&same).unwrap(), Some(artifact));
        let mut newer = same.clone();
        newer.versions.insert("updraft".into(), "0.2.0".into());
        for changed in [
            origin("report", same.recipe.clone(), &[]),
            origin("model", json!({"a": 1, "b": {"c": 2, "d": 4}}), &[]),
            origin("model", same.recipe.clone(), &[parent]),
            newer,
        ] {
            assert_eq!(store.find(&changed).unwrap(), None, "{changed:?}");
        }
    });
}

#[test]
fn lineage_lists_each_ancestor_once_nearest_first() {
    on_each_store(|store| {
        let data = store.put(&origin("dataset", json!("mnist"), &[]), "data", Map::new()).unwrap();
        let network = store.put(&origin("network", json!("cnn"), &[]), "net", Map::new()).unwrap();
        let model =
            store.put(&origin("model", json!({"steps": 5}), &[data.digest, network.digest]), "m", Map::new()).unwrap();
        let report = store.put(&origin("report", json!({}), &[model.digest, data.digest]), "r", Map::new()).unwrap();
        let kinds =
            |digest| -> Vec<String> { store.lineage(digest).unwrap().into_iter().map(|a| a.origin.kind).collect() };
        assert_eq!(kinds(&report.digest), ["report", "model", "dataset", "network"]);
        assert_eq!(kinds(&data.digest), ["dataset"]);
        let listed: Vec<_> = store.list().unwrap().into_iter().map(|a| a.origin.kind).collect();
        assert_eq!(listed, ["dataset", "model", "network", "report"]);
    });
}

#[test]
fn equal_bytes_of_two_origins_are_one_content_with_two_manifests() {
    on_each_store(|store| {
        let first = store.put(&origin("report", json!(1), &[]), "same", Map::new()).unwrap();
        let second = store.put(&origin("report", json!(2), &[]), "same", Map::new()).unwrap();
        assert_eq!(first.digest, second.digest);
        assert_eq!(store.lineage(&first.digest).unwrap().len(), 2);
    });
}

#[test]
fn an_unknown_parent_is_refused_and_nothing_is_kept() {
    on_each_store(|store| {
        let unknown = Digest::of(b"nowhere");
        let error = store.put(&origin("model", json!(1), &[unknown]), "x", Map::new()).unwrap_err();
        assert!(matches!(error, StoreError::MissingParent { parent, .. } if parent == unknown), "{error}");
        assert!(store.list().unwrap().is_empty());
        assert!(matches!(store.get(&Digest::of(b"x")), Err(StoreError::NotFound { .. })));
        assert!(matches!(store.lineage(&unknown), Err(StoreError::NotFound { .. })));
    });
}

#[test]
fn pointers_move_and_their_names_stay_in_the_store() {
    on_each_store(|store| {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(store.pointer("runs/mnist/latest").unwrap(), None);
        store.set_pointer("runs/mnist/latest", &a).unwrap();
        store.set_pointer("runs/mnist/latest", &b).unwrap();
        assert_eq!(store.pointer("runs/mnist/latest").unwrap(), Some(b));
        for name in ["", "/", "../x", "runs/../x", "runs//x", "a b", "ü", "x/", "run#1"] {
            assert!(matches!(store.set_pointer(name, &a), Err(StoreError::Name { .. })), "{name}");
            assert!(matches!(store.pointer(name), Err(StoreError::Name { .. })), "{name}");
        }
        let error = store.put(&origin("a/b", json!(1), &[]), "x", Map::new()).unwrap_err();
        assert!(matches!(error, StoreError::Name { .. }), "{error}");
    });
}

#[test]
fn many_writers_of_one_artifact_leave_it_whole() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = vec![7u8; 1 << 20];
    let asked = origin("model", json!(1), &[]);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            // A store each, as separate processes would have.
            scope.spawn(|| Store::open(dir.path()).unwrap().put(&asked, bytes.clone(), Map::new()).unwrap());
        }
    });
    let store = Store::open(dir.path()).unwrap();
    let artifact = store.find(&asked).unwrap().unwrap();
    assert_eq!(store.get(&artifact.digest).unwrap(), bytes);
    assert_eq!(store.list().unwrap(), [artifact]);
}

/// The only file below a folder of the store.
fn only_file(dir: &Path) -> std::path::PathBuf {
    let mut dir = dir.to_owned();
    loop {
        let entries: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(entries.len(), 1, "{entries:?}");
        dir = entries[0].clone();
        if dir.is_file() {
            return dir;
        }
    }
}

#[test]
fn damaged_files_are_errors_that_name_the_object() {
    type Damage = fn(&[u8]) -> Vec<u8>;
    fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
        String::from_utf8(bytes.to_vec()).unwrap().replace(from, to).into()
    }
    let damage: [(&str, Damage, &str); 6] = [
        ("objects", |b| b[..b.len() - 1].to_vec(), "corrupt"),
        ("objects", |_| Vec::new(), "corrupt"),
        ("manifests", |b| b[..b.len() / 2].to_vec(), "damaged"),
        ("manifests", |b| replaced(b, "model", "medal"), "damaged"),
        ("manifests", |b| replaced(b, "\"format\": 1", "\"format\": 2"), "format 2"),
        ("origins", |_| b"{}".to_vec(), "damaged"),
    ];
    for (folder, change, words) in damage {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let asked = origin("model", json!(1), &[]);
        let digest = store.put(&asked, "weights", Map::new()).unwrap().digest;
        let file = only_file(&dir.path().join(folder));
        std::fs::write(&file, change(&std::fs::read(&file).unwrap())).unwrap();

        let error = store.get(&digest).map(|_| ()).and_then(|_| store.find(&asked).map(|_| ())).unwrap_err();
        let text = error.to_string();
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(text.contains(words) && text.contains(name) && text.contains(folder), "{text}");
    }
}

#[test]
fn a_file_that_no_store_wrote_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    std::fs::create_dir_all(dir.path().join("manifests/notes")).unwrap();
    std::fs::write(dir.path().join("manifests/notes/todo.json"), "{}").unwrap();
    assert!(matches!(store.list(), Err(StoreError::Stray { object }) if object == "manifests/notes/todo.json"));
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Store::open(&file.path().join("store")).unwrap_err();
    assert!(error.to_string().contains("store"), "{error}");
}

#[test]
fn a_removed_artifact_is_gone_with_its_origins_and_no_other_is() {
    on_each_store(|store| {
        let kept = store.put(&origin("checkpoint", json!(1), &[]), "one", Map::new()).unwrap();
        let removed = store.put(&origin("checkpoint", json!(2), &[]), "two", Map::new()).unwrap();
        store.remove(&removed.digest).unwrap();
        assert!(matches!(store.get(&removed.digest), Err(StoreError::NotFound { .. })));
        assert_eq!(store.find(&removed.origin).unwrap(), None);
        assert_eq!(store.list().unwrap(), [kept]);
        store.remove(&removed.digest).unwrap();
    });
}

#[test]
fn removing_old_bytes_leaves_an_origin_that_has_a_newer_answer() {
    on_each_store(|store| {
        let asked = origin("checkpoint", json!(1), &[]);
        let old = store.put(&asked, "old", Map::new()).unwrap();
        let new = store.put(&asked, "new", Map::new()).unwrap();
        store.remove(&old.digest).unwrap();
        assert_eq!(store.find(&asked).unwrap(), Some(new));
    });
}
