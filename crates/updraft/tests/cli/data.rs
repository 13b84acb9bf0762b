//! The verbs of datasets, on the pictures of `examples/mnist` and on tables with planted faults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;
use updraft_base::{Clock, Key, SystemClock};
use updraft_data::write::{WriteOptions, writer};
use updraft_data::{Cells, Column, Kind, Manifest, Rows, Schema, ShardFormat};
use updraft_sim::{Dialect, ObjectServer};
use updraft_store::{AccessOptions, Objects};

use crate::workplace::{RECIPE, Workplace};

fn mnist() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/mnist/data/test.parquet");
    path.canonicalize().unwrap().to_str().unwrap().to_owned()
}

/// All files below a folder but the records of units, by name.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.strip_prefix(folder).unwrap().to_owned(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

const INGEST: [&str; 5] = ["--format", "mds", "--shard-rows", "250", "--shuffle"];

fn ingest(workplace: &Workplace, target: &str) -> Value {
    workplace.json(&[&["data", "ingest", &mnist(), target], INGEST.as_slice()].concat())
}

#[test]
fn an_ingestion_killed_at_random_moments_ends_in_the_same_bytes_and_version() {
    let workplace = Workplace::new();
    let clock = SystemClock::new();
    let start_ns = clock.monotonic_ns();
    let expected = ingest(&workplace, "whole");
    let duration_ms = (clock.monotonic_ns() - start_ns) / 1_000_000;
    let shards = expected["shards"].as_array().unwrap().len() as u64;
    assert_eq!((expected["rows"].as_u64().unwrap().div_ceil(250), expected["made"].as_u64()), (shards, Some(shards)));

    let key = Key::new(4).child("ingest");
    let mut kills = 0;
    for draw in 0..40 {
        let mut child = workplace
            .command(&[&["data", "ingest", &mnist(), "killed"], INGEST.as_slice()].concat())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        clock.sleep_ms(key.below(draw, duration_ms.max(1)));
        child.kill().unwrap();
        if !child.wait().unwrap().success() {
            kills += 1;
        }
        if kills == 12 {
            break;
        }
    }
    assert!(kills > 0, "no kill hit a running ingestion");
    let resumed = ingest(&workplace, "killed");
    assert_eq!(resumed["version"], expected["version"], "after {kills} kills");
    // A kill may leave a file that was being staged; everything that has a name is the same.
    let (whole, mut killed) = (files(&workplace.path("whole")), files(&workplace.path("killed")));
    killed.retain(|name, _| whole.contains_key(name));
    assert!(whole == killed, "after {kills} kills");
    // And once more: nothing is made again.
    let again = ingest(&workplace, "killed");
    assert_eq!((again["made"].as_u64(), &again["version"]), (Some(0), &expected["version"]));
}

#[test]
fn two_ingestions_at_once_share_the_work_and_agree() {
    let workplace = Workplace::new();
    let expected = ingest(&workplace, "alone");
    let start = || {
        workplace
            .command(&[&["data", "ingest", &mnist(), "shared", "--json"], INGEST.as_slice()].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let racers = [start(), start()];
    let mut made = 0;
    for racer in racers {
        let output = racer.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(answer["version"], expected["version"]);
        made += answer["made"].as_u64().unwrap();
    }
    // Every shard has exactly one maker, whoever came second.
    assert_eq!(made, expected["shards"].as_array().unwrap().len() as u64);
    assert!(files(&workplace.path("alone")) == files(&workplace.path("shared")));
}

/// A file of rows with the numbers `from..to`.
pub(crate) fn numbers(workplace: &Workplace, name: &str, from: u32, to: u32) {
    std::fs::create_dir_all(workplace.path("source")).unwrap();
    let lines: String = (from..to).map(|n| format!("{n},row {n}\n")).collect();
    std::fs::write(workplace.path(&format!("source/{name}")), format!("number,text\n{lines}")).unwrap();
}

/// The numbers of all rows of a dataset that was written as MDS, in order, by its own shards.
fn numbers_of(workplace: &Workplace, target: &str) -> Vec<u32> {
    let shards = updraft_data::shards::Shards::open(
        workplace.path(target).to_str().unwrap(),
        None,
        1 << 30,
        &updraft_data::Access::default(),
    );
    let mut all = Vec::new();
    for reader in shards.unwrap().readers {
        for block in 0..reader.blocks().len() {
            let rows = reader.read_block(block).unwrap();
            let at = rows.schema.index_of("number").unwrap();
            let Cells::Numbers(tensor) = &rows.columns[at] else { panic!("numbers are numbers") };
            all.extend(tensor.as_slice::<i64>().unwrap().iter().map(|n| u32::try_from(*n).unwrap()));
        }
    }
    all
}

#[test]
fn what_is_appended_comes_once_behind_what_is_there() {
    let workplace = Workplace::new();
    numbers(&workplace, "a.csv", 0, 70);
    let more = ["data", "ingest", "source", "set", "--shard-rows", "50", "--append"];
    let first = workplace.json(&more);
    assert_eq!((first["rows"].as_u64(), first["inputs_known"].as_u64()), (Some(70), Some(0)));
    // A dataset that was made without `--append` may grow, too, and is the same version.
    let whole = workplace.json(&["data", "ingest", "source", "set", "--shard-rows", "50"]);
    assert_eq!(whole["version"], first["version"]);

    numbers(&workplace, "b.csv", 70, 130);
    numbers(&workplace, "c.csv", 130, 140);
    let grown = workplace.json(&more);
    assert_eq!((grown["rows"].as_u64(), grown["inputs_known"].as_u64()), (Some(70), Some(1)));
    assert_eq!(numbers_of(&workplace, "set"), (0..140).collect::<Vec<_>>());
    let index: Value = serde_json::from_slice(&std::fs::read(workplace.path("set/index.json")).unwrap()).unwrap();
    assert_eq!(index["shards"].as_array().unwrap().len(), 4);

    let again = workplace.json(&more);
    assert_eq!((again["rows"].as_u64(), &again["version"]), (Some(0), &grown["version"]));
    // The version before can still be read, and the newest one knows of both.
    assert_eq!(workplace.json(&["data", "inspect", "set", "--full"])["dataset"]["rows"], 140);

    std::fs::write(workplace.path("other.csv"), "number\n1\n").unwrap();
    let (_, message) = workplace.failure(&["data", "ingest", "other.csv", "set", "--append"]);
    assert!(message.contains("text") && message.contains("appended"), "{message}");
    let (_, message) = workplace.failure(&["data", "ingest", "source", "set", "--append", "--format", "parquet"]);
    assert!(message.contains("is mds") && message.contains("would be parquet"), "{message}");
    assert_eq!(numbers_of(&workplace, "set").len(), 140);
}

#[test]
fn files_of_equal_content_are_all_ingested_and_named_alike_each_time() {
    let workplace = Workplace::new();
    numbers(&workplace, "a.csv", 0, 100);
    numbers(&workplace, "b.csv", 0, 100);
    let first = workplace.json(&["data", "ingest", "source", "one", "--shard-rows", "50"]);
    let second = workplace.json(&["data", "ingest", "source", "two", "--shard-rows", "50"]);
    assert_eq!((first["rows"].as_u64(), first["made"].as_u64()), (Some(200), Some(4)));
    assert_eq!(first["version"], second["version"]);
    assert_eq!(numbers_of(&workplace, "one"), (0..100).chain(0..100).collect::<Vec<_>>());
}

#[test]
fn several_may_append_at_once_and_nothing_is_lost_or_doubled() {
    let workplace = Workplace::new();
    for part in 0..4 {
        numbers(&workplace, &format!("{part}.csv"), part * 100, part * 100 + 100);
    }
    let start = |source: &str| {
        workplace
            .command(&["data", "ingest", source, "set", "--append", "--shard-rows", "40"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    // Two of them have an input in common.
    let sources = ["source/0.csv", "source/1.csv", "source/2.csv", "source/3.csv", "source/1.csv", "source"];
    let running: Vec<_> = sources.iter().map(|source| start(source)).collect();
    for (source, child) in sources.iter().zip(running) {
        let output = child.wait_with_output().unwrap();
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            assert!(message.contains("run the same once more"), "{message}");
            workplace.json(&["data", "ingest", source, "set", "--append", "--shard-rows", "40"]);
        }
    }
    let mut found = numbers_of(&workplace, "set");
    found.sort_unstable();
    assert_eq!(found, (0..400).collect::<Vec<_>>());
}

#[test]
fn an_ingested_dataset_has_the_rows_and_statistics_of_its_source() {
    let workplace = Workplace::new();
    for format in ["mds", "parquet", "tfrecord"] {
        workplace.json(&["data", "ingest", &mnist(), format, "--format", format, "--shard-rows", "3000"]);
        let source = workplace.json(&["data", "inspect", &mnist()]);
        let copy = workplace.json(&["data", "inspect", format, "--full"]);
        assert_eq!(copy["dataset"]["rows"], source["dataset"]["rows"], "{format}");
        let label = |answer: &Value| answer["label"]["values"].clone();
        assert_eq!(label(&copy), label(&source), "{format}");
    }
    let from_manifest = workplace.json(&["data", "inspect", "mds"]);
    let from_rows = workplace.json(&["data", "inspect", "mds", "--full"]);
    assert_eq!(from_manifest["label"], from_rows["label"]);
}

#[test]
fn the_page_of_a_dataset_shows_pictures_and_needs_nothing_else() {
    let workplace = Workplace::new();
    let answer = workplace.json(&["data", "inspect", &mnist(), "--html", "page.html", "--samples", "12"]);
    assert_eq!(answer["label"]["values"].as_array().unwrap().len(), 10);
    let page = std::fs::read_to_string(workplace.path("page.html")).unwrap();
    assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 12);
    for outside in ["http://", "https://", "<script", "<link", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn the_page_of_a_table_shows_what_is_missing_and_every_column_by_name() {
    let workplace = Workplace::new();
    let note = format!("{}ada@example.org", "long ".repeat(400));
    std::fs::write(workplace.path("table.csv"), format!("age,note\n34,short\n,{note}\n51,<b>bold</b>\n")).unwrap();
    let answer = workplace.json(&["data", "inspect", "table.csv", "--html", "page.html"]);
    assert_eq!(answer["columns"][0]["missing"], 1);
    let page = std::fs::read_to_string(workplace.path("page.html")).unwrap();
    let samples = page.split("<h2>Samples</h2>").nth(1).unwrap().split("</section>").next().unwrap();
    for shown in ["<th>age</th>", "<th>note</th>", ">missing</span>", "&lt;b&gt;bold", "long …", "table.csv"] {
        assert!(samples.contains(shown), "{shown}: {samples}");
    }
    assert!(!page.contains("ada@example.org"), "what is personal is masked before it is cut");
}

#[test]
fn nothing_is_written_among_the_files_that_are_read() {
    let workplace = Workplace::new();
    std::fs::create_dir(workplace.path("source")).unwrap();
    std::fs::write(workplace.path("source/a.csv"), "x\n1\n2\n").unwrap();
    std::os::unix::fs::symlink(workplace.path("source"), workplace.path("link")).unwrap();
    for arguments in [
        ["data", "ingest", "source", "source/out"].as_slice(),
        &["data", "ingest", "source", "link/deep/out"],
        &["data", "ingest", "source", "link"],
        &["data", "validate", "source", "--quarantine", "source/bad"],
    ] {
        let (code, message) = workplace.failure(arguments);
        assert_eq!(code, 2, "{message}");
        assert_eq!(std::fs::read_dir(workplace.path("source")).unwrap().count(), 1, "{arguments:?}");
    }
    // A folder that is passed over is beside the data, and one below a dataset with a manifest is not looked at.
    workplace.json(&["data", "ingest", "source", "source/.set"]);
    workplace.json(&["data", "ingest", "source", "source/.set/below"]);
    assert_eq!(workplace.json(&["data", "inspect", "source"])["dataset"]["rows"], 2);
}

#[test]
fn a_lifecycle_plan_deletes_only_what_no_version_names_and_only_by_its_digest() {
    let workplace = Workplace::new();
    let ingested = workplace.json(&["data", "ingest", &mnist(), "set", "--shard-rows", "5000"]);
    std::fs::write(workplace.path("set/shard-old.mds"), "left behind").unwrap();
    let rules =
        "[[rule]]\nname = \"left behind\"\nprefix = \"shard-\"\nunreferenced = true\nage_days = 1\ndelete = true\n";
    std::fs::write(workplace.path("rules.toml"), rules).unwrap();
    let plan = ["data", "lifecycle", "set", "--rules", "rules.toml"];
    // Too young.
    assert_eq!(workplace.json(&plan)["plan"]["actions"].as_array().unwrap().len(), 0);
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_600_000_000);
    for file in std::fs::read_dir(workplace.path("set")).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        std::fs::File::options().write(true).open(file).unwrap().set_modified(old).unwrap();
    }
    let planned = workplace.json(&plan);
    let actions = planned["plan"]["actions"].as_array().unwrap();
    assert_eq!(actions.iter().map(|a| a["key"].as_str().unwrap()).collect::<Vec<_>>(), ["shard-old.mds"]);
    let wrong = format!("sha256:{}", "0".repeat(64));
    let (code, message) = workplace.failure(&[&plan[..], &["--apply", &wrong]].concat());
    assert_eq!(code, 2, "{message}");
    assert!(workplace.path("set/shard-old.mds").exists());
    let digest = planned["plan"]["digest"].as_str().unwrap();
    assert_eq!(workplace.json(&[&plan[..], &["--apply", digest]].concat())["applied"]["deleted"], 1);
    assert!(!workplace.path("set/shard-old.mds").exists());
    let still = workplace.json(&["data", "inspect", "set", "--full"]);
    assert_eq!(still["dataset"]["rows"], ingested["rows"]);
}

#[test]
fn a_lifecycle_plan_leaves_datasets_in_folders_below_alone() {
    let workplace = Workplace::new();
    for target in ["set", "set/val"] {
        workplace.json(&["data", "ingest", &mnist(), target, "--shard-rows", "5000"]);
        std::fs::write(workplace.path(&format!("{target}/shard-old.mds")), "left behind").unwrap();
    }
    let rules = "[[rule]]\nname = \"left behind\"\nunreferenced = true\nage_days = 14\ndelete = true\n\
                 [[rule]]\nname = \"old goes\"\nage_days = 90\ndelete = true\n";
    std::fs::write(workplace.path("rules.toml"), rules).unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_600_000_000);
    for folder in ["set", "set/manifests", "set/val", "set/val/manifests"] {
        for file in std::fs::read_dir(workplace.path(folder)).unwrap().map(|e| e.unwrap().path()) {
            if file.is_file() {
                std::fs::File::options().write(true).open(file).unwrap().set_modified(old).unwrap();
            }
        }
    }
    let plan = ["data", "lifecycle", "set", "--rules", "rules.toml", "--provider", "gcs"];
    let planned = workplace.json(&plan);
    let keys: Vec<&str> =
        planned["plan"]["actions"].as_array().unwrap().iter().map(|a| a["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["shard-old.mds", "val/shard-old.mds"]);
    let left = planned["plan"]["left"].as_array().unwrap();
    assert!(left.iter().any(|l| l[0] == "the dataset in `val` names it" && l[1].as_u64() >= Some(4)), "{left:?}");
    // The provider knows neither of the datasets, so it is told nothing.
    assert_eq!(planned["configuration"]["json"]["lifecycle"]["rule"], serde_json::json!([]));
    assert_eq!(planned["configuration"]["left_out"].as_array().unwrap().len(), 2);
    workplace.json(&[&plan[..], &["--apply", planned["plan"]["digest"].as_str().unwrap()]].concat());
    assert_eq!(workplace.json(&["data", "inspect", "set/val", "--full"])["dataset"]["rows"], 10_000);
}

#[test]
fn the_bench_says_what_each_step_waited_for() {
    let workplace = Workplace::new();
    for (what, knows_made) in [(mnist(), false), (".".to_owned(), true)] {
        let told = workplace.json(&["data", "bench", &what]);
        let waits = &told["waits"];
        let points = waits["points"].as_array().unwrap();
        assert_eq!(points.len() as u64, told["steps"].as_u64().unwrap().min(511), "{told}");
        assert_eq!(points.last().unwrap()["step"], told["steps"]);
        assert_eq!(waits["stalls"], told["stalls"]);
        assert_eq!(waits["stalls"]["made"].is_object(), knows_made);
        let waited = waits["stalls"]["waited"].as_object().unwrap();
        for stage in ["fetch", "decode", "transform", "collate"] {
            let by_steps: u64 =
                points.iter().map(|point| point["waited"][format!("{stage}_ns")].as_u64().unwrap()).sum();
            assert_eq!(Some(by_steps), waited[&format!("{stage}_ns")].as_u64(), "{stage}");
            let seconds = told["metrics"][format!("load_wait_{stage}_seconds")].as_f64().unwrap();
            assert!((seconds - by_steps as f64 / 1e9).abs() < 1e-9, "{told}");
        }
        assert!(told["metrics"]["load_wait_share"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)));
    }
}

/// Whatever the size of the dataset: 30 shards of 8 MiB within 96 MiB, in any order, beside what the process has anyway (the
/// program, threads), which a small dataset shows.
#[test]
fn loading_takes_no_more_memory_than_it_is_given() {
    const MEMORY_BYTES: u64 = 96 << 20;
    const SAMPLE_BYTES: usize = 64 << 10;
    let workplace = Workplace::new();
    let column = Column { name: "x".into(), kind: Kind::Bytes };
    let schema = Arc::new(Schema::new(vec![column]).unwrap());
    let options = WriteOptions::default();
    let samples = (0..128u8).map(|sample| Bytes::from(vec![sample; SAMPLE_BYTES]));
    let cells = vec![Cells::Bytes(samples.collect())];
    for (format, ending) in
        [(ShardFormat::Mds, "mds"), (ShardFormat::Parquet, "parquet"), (ShardFormat::TfRecord, "tfrecord")]
    {
        let mut peaks = Vec::new();
        for shards in [1, 30] {
            let folder = workplace.path(&format!("{ending}{shards}"));
            let objects = Objects::open(folder.to_str().unwrap(), &BTreeMap::new(), &AccessOptions::default()).unwrap();
            let mut made = Vec::new();
            for shard in 0..shards {
                let mut open = writer(format, schema.clone(), &options).unwrap();
                open.push(&Rows::new(schema.clone(), cells.clone()).unwrap()).unwrap();
                let (bytes, mut facts) = open.finish().unwrap();
                facts.key = format!("{shard:02}.{ending}");
                objects.put(&facts.key, bytes).unwrap();
                made.push(facts);
            }
            Manifest::new((*schema).clone(), made).commit(&objects).unwrap();
            for shuffle in ["\"none\"", "{ blocks = 4 }"] {
                let data = format!(
                    "train = {{ path = \"{ending}{shards}\", memory_bytes = {MEMORY_BYTES}, tensors = [{{ name = \"x\", transform = [{{ elements = \"u8\" }}] }}] }}"
                );
                let recipe = RECIPE.replace("train = { path = \"train.npz\" }", &data);
                workplace.write_recipe(&recipe.replace("steps = 120", &format!("steps = 120\nshuffle = {shuffle}")));
                let mut command =
                    workplace.command(&["data", "bench", ".", "--batch", "16", "--threads", "2", "--json"]);
                // What is freed goes back to the system at once, so that the peak is of what is in use.
                let output = command.env("MALLOC_MMAP_THRESHOLD_", "131072").output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(answer["rows"], 128 * shards);
                peaks.push((shards, answer["peak_memory_bytes"].as_u64().unwrap()));
            }
        }
        let of = |which: i32| peaks.iter().filter(|(shards, _)| *shards == which).map(|(_, peak)| *peak).max().unwrap();
        println!("{ending}: {} MiB for one shard, {} MiB for 30", of(1) >> 20, of(30) >> 20);
        // Beside what is kept, each thread has a block in the making: as it lies in the file, unpacked, and its values.
        let making_bytes = 2 * 3 * (128 * SAMPLE_BYTES) as u64;
        assert!(of(30) <= of(1) + MEMORY_BYTES + making_bytes, "{ending}: {peaks:?}");
    }
}

#[test]
fn bench_counts_every_row_of_an_epoch() {
    let workplace = Workplace::new();
    let recipe = workplace.json(&["data", "bench", ".", "--batch", "10"]);
    assert_eq!((recipe["steps"].as_u64(), recipe["rows"].as_u64()), (Some(10), Some(96)));
    // What is filtered goes on as in training, into the next epoch: ten full batches, where 64 samples pass.
    let filter = "path = \"train.npz\", filter = [{ column = \"label\", one_of = [0, 2] }]";
    workplace.write_recipe(&RECIPE.replace("path = \"train.npz\"", filter));
    let filtered = workplace.json(&["data", "bench", ".", "--batch", "10"]);
    assert_eq!((filtered["steps"].as_u64(), filtered["rows"].as_u64()), (Some(10), Some(100)));
    let raw = workplace.json(&["data", "bench", &mnist()]);
    assert_eq!(raw["rows"], 10_000);
    assert!(raw["first_batch_ns"].as_u64() <= raw["elapsed_ns"].as_u64());
}

#[test]
fn pictures_are_made_smaller_on_the_way_in() {
    let workplace = Workplace::new();
    let column = {
        let inspected = workplace.json(&["data", "inspect", &mnist()]);
        let columns = inspected["dataset"]["columns"].as_array().unwrap().clone();
        columns.iter().find(|c| c[1] == "bytes").unwrap()[0].as_str().unwrap().to_owned()
    };
    let resize = format!("{column}=14x14");
    workplace.json(&["data", "ingest", &mnist(), "small", "--resize", &resize, "--shard-rows", "5000"]);
    std::fs::write(
        workplace.path("rules.toml"),
        format!("[columns.{column:?}]\npixels_min = [14, 14]\npixels_max = [14, 14]\n"),
    )
    .unwrap();
    let checked = workplace.json(&["data", "validate", "small", "--rules", "rules.toml", "--no-near"]);
    assert_eq!((checked["passed"].as_bool(), checked["bad_rows"].as_u64()), (Some(true), Some(0)));
}

#[test]
fn what_one_process_read_the_next_finds_on_disk() {
    let workplace = Workplace::new();
    ingest(&workplace, "pictures");
    let cached = ["data", "bench", "pictures", "--cache-memory", "64KiB", "--cache-disk", "near"];
    let cached = [cached.as_slice(), &["--cache-disk-limit", "64MiB"]].concat();
    let plain = workplace.json(&["data", "bench", "pictures"]);
    assert!(plain["cache"].is_null());
    let [first, second] = [0, 1].map(|_| workplace.json(&cached));
    assert_eq!((&first["rows"], &second["rows"]), (&plain["rows"], &plain["rows"]));
    let fetched_bytes = |answer: &Value| answer["cache"]["fetched_bytes"].as_u64().unwrap();
    assert!(fetched_bytes(&first) > 1 << 20, "{first:#}");
    assert!(second["cache"]["disk_hits"].as_u64().unwrap() > 0, "{second:#}");
    // What was in memory when the first ended is not on disk.
    assert!(fetched_bytes(&second) <= 64 << 10, "{second:#}");

    let (code, message) = workplace.failure(&["data", "bench", "pictures", "--cache-disk", "near"]);
    assert_eq!(code, 2);
    assert!(message.contains("--cache-disk-limit"), "{message}");
    std::fs::write(workplace.path("file"), b"").unwrap();
    let arguments = ["data", "bench", "pictures", "--cache-disk", "file", "--cache-disk-limit", "1MiB"];
    let (code, message) = workplace.failure(&arguments);
    assert!(code != 0 && message.contains("file"), "{message}");
}

/// What tells a process of a server that speaks S3.
pub fn environment(server: &ObjectServer) -> Vec<(String, String)> {
    let settings = server.url_and_settings().1;
    let named = settings.into_iter().map(|(name, value)| (format!("AWS_{}", name.to_uppercase()), value));
    named.chain([("AWS_REGION".to_owned(), "us-east-1".to_owned())]).collect()
}

/// Runs a verb on a server; its answer.
pub fn on_server(workplace: &Workplace, server: &ObjectServer, arguments: &[&str]) -> String {
    let output = workplace.command(arguments).envs(environment(server)).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_lifecycle_plan_moves_objects_to_their_tier_and_the_dataset_stays_what_it_is() {
    let workplace = Workplace::new();
    let server = ObjectServer::start(Dialect::S3, None).unwrap();
    let json = |arguments: &[&str]| -> Value {
        serde_json::from_str(&on_server(&workplace, &server, &[arguments, &["--json"]].concat())).unwrap()
    };
    json(&["data", "ingest", &mnist(), "s3://bucket/set", "--shard-rows", "5000", "--format", "parquet"]);
    let before = server.objects();
    let rules = "[[rule]]\nname = \"cold\"\nprefix = \"shard-\"\ntier = \"STANDARD_IA\"\n";
    std::fs::write(workplace.path("rules.toml"), rules).unwrap();
    let prices = "provider,region,tier,micro_usd_per_gib_month,retrieval_micro_usd_per_gib,days_min,date,source\n\
                  s3,,STANDARD,23000,0,0,2026-11-01,test\ns3,,STANDARD_IA,12500,10000,30,2026-11-01,test\n";
    std::fs::write(workplace.path("prices.csv"), prices).unwrap();
    let plan = ["data", "lifecycle", "s3://bucket/set", "--rules", "rules.toml", "--prices", "prices.csv"];
    let planned = json(&plan);
    let keys: Vec<&str> =
        planned["plan"]["actions"].as_array().unwrap().iter().map(|a| a["key"].as_str().unwrap()).collect();
    assert_eq!(keys.len(), 2, "{planned}");
    let digest = planned["plan"]["digest"].as_str().unwrap();
    let applied = json(&[&plan[..], &["--apply", digest]].concat());
    assert_eq!((applied["applied"]["moved"].as_u64(), applied["applied"]["deleted"].as_u64()), (Some(2), Some(0)));
    for key in keys {
        assert_eq!(server.tier(&format!("set/{key}")).as_deref(), Some("STANDARD_IA"), "{key}");
    }
    let mut after = server.objects();
    assert!(after.remove("set/_lifecycle/tiers.json").is_some(), "the tiers are written down");
    assert_eq!(after, before);
    assert_eq!(json(&["data", "bench", "s3://bucket/set"])["rows"], 10_000);
    // The listing says no tiers, and what was moved is not moved again.
    let again = json(&plan);
    assert_eq!(again["plan"]["actions"], serde_json::json!([]));
    assert_eq!(again["plan"]["left"][0][0], "already in STANDARD_IA");
    let stale =
        workplace.command(&[&plan[..], &["--apply", digest]].concat()).envs(environment(&server)).output().unwrap();
    assert_eq!(stale.status.code(), Some(2), "{}", String::from_utf8_lossy(&stale.stderr));
}

/// What a verb asked of a store is what the store was asked, and what the price list says that this costs.
#[test]
fn a_verb_ends_by_saying_what_it_asked_of_remote_stores() {
    let workplace = Workplace::new();
    let server = ObjectServer::start(Dialect::S3, None).unwrap();
    let url = server.url_and_settings().0;
    let run = |arguments: &[&str]| on_server(&workplace, &server, arguments);
    let target = format!("{url}/digits");
    let told = run(&[&["data", "ingest", &mnist(), &target, "--json"], INGEST.as_slice()].concat());
    let told: Value = serde_json::from_str(&told).unwrap();
    let store = &told["stores"][0];
    assert_eq!(store["url"], target.as_str());
    let bytes: usize = server.objects().values().map(|object| object.len()).sum();
    assert_eq!(store["bytes_written"].as_u64(), Some(bytes as u64));
    // Every object was put once.
    assert_eq!(store["requests"]["put"].as_u64(), Some(server.objects().len() as u64));
    let dear = ["put", "list", "multipart"].map(|class| store["requests"][class].as_u64().unwrap_or(0));
    let cheap = ["get", "head"].map(|class| store["requests"][class].as_u64().unwrap_or(0));
    let nano_usd = 5_000 * dear.iter().sum::<u64>() + 400 * cheap.iter().sum::<u64>();
    assert_eq!(store["cost_micro_usd"].as_u64(), Some(nano_usd.div_ceil(1000)));

    let text = run(&["data", "bench", &target]);
    let line = text.lines().last().unwrap();
    assert!(line.starts_with(&format!("{target}: ")) && line.contains(" get") && line.contains("$0.000"), "{text}");
    // What lies on this machine costs no requests.
    assert_eq!(workplace.json(&["data", "bench", &mnist()])["stores"], Value::Null);
}

#[test]
fn columns_that_nobody_can_read_are_listed_with_the_reason_and_the_others_looked_at() {
    let workplace = Workplace::new();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../updraft-data/tests/fixtures");
    for format in ["parquet", "arrow"] {
        std::fs::create_dir(workplace.path(format)).unwrap();
        for shard in ["a", "b"] {
            let to = workplace.path(&format!("{format}/{shard}.{format}"));
            std::fs::copy(fixtures.join(format!("unread.{format}")), to).unwrap();
        }
        let names = |of: &Value| {
            let names: Vec<&str> = of.as_array().unwrap().iter().map(|c| c["column"].as_str().unwrap()).collect();
            names.join(" ")
        };
        let seen = workplace.json(&["data", "inspect", format, "--html", "page.html"]);
        let unread = &seen["dataset"]["unread"];
        assert_eq!((names(&seen["columns"]), names(unread)), ("id score".into(), "when tags".into()), "{format}");
        let page = std::fs::read_to_string(workplace.path("page.html")).unwrap();
        assert!(page.contains("not read: holds"), "{format}");

        let validated = workplace.json(&["data", "validate", format]);
        assert_eq!((&validated["bad_rows"], names(&validated["dataset"]["unread"])), (&0.into(), "when tags".into()));
        std::fs::write(workplace.path("rules.toml"), "[columns.when]\nrequired = true\n").unwrap();
        let (code, error) = workplace.failure(&["data", "validate", format, "--rules", "rules.toml"]);
        assert!(code == 4 && error.contains("`when` cannot be read: it holds"), "{error}");

        let measured = workplace.json(&["data", "bench", format]);
        assert_eq!((&measured["rows"], names(&measured["unread"])), (&8.into(), "when tags".into()));

        // What is kept for later is chosen, not left out.
        let (code, error) = workplace.failure(&["data", "ingest", format, "kept"]);
        assert!(code == 4 && error.contains("`when` cannot be read") && error.contains("--columns"), "{error}");
        assert!(!workplace.path("kept").exists());
        let kept = workplace.json(&["data", "ingest", format, &format!("kept-{format}"), "--columns", "id,score"]);
        assert_eq!(kept["rows"], 8);
    }
}
