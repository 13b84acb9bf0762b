//! Transformations from the command line: recipes, what is said, and processes that are killed. What rows become is
//! checked in `updraft-query`.

use crate::workplace::Workplace;

#[cfg(not(feature = "query"))]
#[test]
fn a_transformation_without_the_engine_says_how_to_build_it() {
    let workplace = Workplace::new();
    let (code, message) = workplace.failure(&["data", "transform", "recipe.toml"]);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("--features query"), "{message}");
}

#[cfg(not(feature = "cluster"))]
#[test]
fn a_cluster_without_its_engine_says_how_to_build_it() {
    let (code, message) = Workplace::new().failure(&["data", "cluster", "scheduler"]);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("--features cluster"), "{message}");
}

#[cfg(feature = "query")]
pub mod engine {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::process::Stdio;

    use serde_json::Value;
    use updraft_base::{Clock, Digest, Key, SystemClock};
    use updraft_sim::{Dialect, ObjectServer};
    use updraft_store::{AccessOptions, Objects};

    use super::Workplace;
    use crate::data::on_server;

    /// Units of a job that takes a while.
    pub const UNITS: u64 = 24;

    /// Rows of each of them.
    const UNIT_ROWS: usize = 40;

    /// Makes pictures much larger: a few hundred milliseconds for a unit.
    pub fn slow_recipe(target: &str) -> String {
        format!(
            "source = \"raw\"\ntarget = \"{target}\"\nsql = \"select image, label from data where label <> 4\"\n\n\
             [[steps]]\nresize = {{ columns = [\"image\"], to = [400, 400] }}\n\n\
             [write]\nformat = \"mds\"\nshard_rows = {UNIT_ROWS}\n"
        )
    }

    /// A folder with pictures of digits to transform, and the recipe by the name of its target.
    pub fn digits() -> Workplace {
        let workplace = Workplace::new();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/mnist/data/test.parquet");
        let sql = format!("select * from '{}' limit {}", source.display(), UNITS as usize * UNIT_ROWS);
        workplace.json(&["data", "query", &sql, "--output", "raw", "--format", "mds"]);
        workplace
    }

    /// Keys and bytes of all objects of a dataset. What a process that was killed was writing is no object.
    fn objects(folder: &Path) -> Vec<(String, Digest)> {
        let objects = Objects::open(folder.to_str().unwrap(), &BTreeMap::new(), &AccessOptions::default()).unwrap();
        let listed = objects.list("").unwrap();
        listed.into_iter().map(|facts| (facts.key.clone(), Digest::of(&objects.get(&facts.key).unwrap()))).collect()
    }

    /// Records of units that are done.
    pub fn records(folder: &Path) -> u64 {
        let is_record = |name: &str| name.ends_with(".json");
        std::fs::read_dir(folder.join("_ingest")).map_or(0, |entries| {
            entries.filter(|entry| is_record(entry.as_ref().unwrap().file_name().to_str().unwrap())).count() as u64
        })
    }

    /// Each shard of the answer is there once, and no other; all bytes are those of the other dataset.
    pub fn assert_whole(workplace: &Workplace, target: &str, answer: &Value, expected: &str) {
        let objects = objects(&workplace.path(target));
        let shards: Vec<&str> =
            objects.iter().map(|(key, _)| key.as_str()).filter(|key| key.starts_with("shard-")).collect();
        let said: Vec<&str> = answer["shards"].as_array().unwrap().iter().map(|key| key.as_str().unwrap()).collect();
        assert_eq!(shards, said, "{target}: every shard exactly once");
        assert_eq!(objects, self::objects(&workplace.path(expected)), "{target} is {expected}, byte by byte");
    }

    #[test]
    fn datasets_in_object_stores_are_transformed_as_those_in_folders() {
        let workplace = digits();
        let server = ObjectServer::start(Dialect::S3, None).unwrap();
        let transform = |name: &str, source: &str, target: &str| -> Value {
            let recipe = format!(
                "source = \"{source}\"\ntarget = \"{target}\"\nsql = \"select image, label from data where label < 5\"\n\n\
                 [[steps]]\nresize = {{ columns = [\"image\"], to = [14, 14] }}\n\n[write]\nformat = \"parquet\"\nshard_rows = 200\n"
            );
            std::fs::write(workplace.path(name), recipe).unwrap();
            serde_json::from_str(&on_server(&workplace, &server, &["data", "transform", name, "--json"])).unwrap()
        };
        let near = transform("near.toml", "raw", "near");
        let far = transform("far.toml", "raw", "s3://bucket/far");
        assert_eq!((&far["version"], far["made"].as_u64()), (&near["version"], near["made"].as_u64()));
        // What lies in the store is known by what it holds, so the next one is the same, too.
        let near_again = transform("near-again.toml", "near", "near-again");
        let far_again = transform("far-again.toml", "s3://bucket/far", "s3://bucket/far-again");
        assert_eq!(far_again["version"], near_again["version"]);
        assert_eq!(transform("far-again.toml", "s3://bucket/far", "s3://bucket/far-again")["made"], 0);
        for key in far_again["shards"].as_array().unwrap() {
            let key = key.as_str().unwrap();
            let near = std::fs::read(workplace.path(&format!("near-again/{key}"))).unwrap();
            assert!(server.objects()[&format!("far-again/{key}")][..] == near, "{key}");
        }
    }

    #[test]
    fn a_transformation_killed_at_any_moment_goes_on_and_ends_as_one_that_was_not() {
        let workplace = digits();
        for target in ["whole", "killed"] {
            std::fs::write(workplace.path(&format!("{target}.toml")), slow_recipe(target)).unwrap();
        }
        let clock = SystemClock::new();
        let start_ns = clock.monotonic_ns();
        let whole = workplace.json(&["data", "transform", "whole.toml"]);
        let duration_ms = (clock.monotonic_ns() - start_ns) / 1_000_000;
        assert_eq!((whole["units"].as_u64(), whole["made"].as_u64()), (Some(UNITS), Some(UNITS)));

        let (mut kills, mut found) = (0, Vec::new());
        for draw in 0.. {
            assert!(draw < 40, "only {kills} kills hit a running transformation");
            let mut child = workplace.command(&["data", "transform", "killed.toml"]);
            let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            clock.sleep_ms(Key::new(5).child("kill").below(draw, duration_ms / 3));
            // On Unix this is SIGKILL: nothing of the process runs after it.
            child.kill().unwrap();
            if child.wait().unwrap().success() {
                break;
            }
            kills += 1;
            found.push(records(&workplace.path("killed")));
            if kills == 8 {
                break;
            }
        }
        assert!(kills >= 3, "{kills} kills, records after each: {found:?}");
        assert!(found.iter().any(|count| (1..UNITS).contains(count)), "records after each kill: {found:?}");
        let resumed = workplace.json(&["data", "transform", "killed.toml"]);
        assert_eq!(resumed["version"], whole["version"]);
        assert!(resumed["made"].as_u64() < Some(UNITS), "{resumed:#}");
        assert_whole(&workplace, "killed", &resumed, "whole");
        let again = workplace.json(&["data", "transform", "killed.toml"]);
        assert_eq!((again["made"].as_u64(), &again["version"]), (Some(0), &whole["version"]));
    }

    #[test]
    fn wrong_recipes_are_named_with_line_and_neighbours() {
        let workplace = Workplace::new();
        std::fs::write(workplace.path("people.csv"), "age,city\n34,Ulm\n21,Bern\n").unwrap();
        let recipe = "source = \"people.csv\"\ntarget = \"out\"\nsql = \"select age from data\"\n";
        let mut messages = String::new();
        for (from, to) in [
            ("sql =", "sqk ="),
            ("target = \"out\"", "target = \"people.csv\""),
            ("target = \"out\"\n", ""),
            ("people.csv", "peeple.csv"),
            ("select age", "select aeg"),
            ("from data", "from people"),
            ("select age from data\"\n", "select age from data\"\n[write]\nformat = \"mts\"\n"),
            ("select age from data\"\n", "select age from data\"\n[write]\nformat = \"csv\"\n"),
            ("select age from data\"\n", "select age from data\"\n[write]\nshard_row = 3\n"),
            ("select age from data\"\n", "select age from data\"\n[write]\nshard_rows = 0\n"),
            ("select age from data\"\n", "select age from data\"\n[[steps]]\nresise = { columns = [] }\n"),
            (
                "select age from data\"\n",
                "select age from data\"\n[[steps]]\nresize = { column = \"age\", to = [2, 2] }\n",
            ),
            (
                "select age from data\"\n",
                "select age from data\"\n[[steps]]\nresize = { columns = [\"age\"], to = [2, 2] }\n",
            ),
            ("select age from data\"\n", "select age from data\"\n[[steps]]\ntokenize = { columns = [\"city\"] }\n"),
        ] {
            let text = recipe.replace(from, to);
            assert_ne!(text, recipe, "{from}");
            std::fs::write(workplace.path("recipe.toml"), text).unwrap();
            let output = workplace.command(&["data", "transform", "recipe.toml"]).output().unwrap();
            let message = String::from_utf8(output.stderr).unwrap();
            messages.push_str(&format!("{from:?} -> {to:?}: exit {}\n{message}\n", output.status.code().unwrap()));
        }
        let folder = workplace.path("").canonicalize().unwrap();
        insta::assert_snapshot!("wrong_transformations", messages.replace(folder.to_str().unwrap(), "…"));
    }

    #[cfg(not(feature = "cluster"))]
    #[test]
    fn a_cluster_that_is_not_built_in_is_refused_before_anything_is_read() {
        let workplace = Workplace::new();
        std::fs::write(workplace.path("a.toml"), "source = \"a\"\ntarget = \"b\"\n").unwrap();
        let (code, message) = workplace.failure(&["data", "transform", "a.toml", "--cluster", "ballista://x"]);
        assert_eq!(code, 4, "{message}");
        assert!(message.contains("--features cluster"), "{message}");
    }
}
