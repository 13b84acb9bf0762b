//! Plans computed by hand.

use bytes::Bytes;
use updraft_store::{AccessOptions, Objects};

use super::*;
use crate::{Column, Kind, Manifest, Schema, ShardFacts, ShardFormat};

const NOW_MS: u64 = 2_000_000_000_000;

fn object(key: &str, gib: u64, age_days: u64) -> ObjectFacts {
    ObjectFacts {
        key: key.into(),
        bytes: gib << 30,
        etag: Some(format!("tag of {key}")),
        version: None,
        modified_ms: NOW_MS - age_days * DAY_MS,
    }
}

fn made(objects: &[ObjectFacts], usage: &Usage, rules: &str) -> Result<Plan, String> {
    let prices = Prices::read(None, "gs", None).unwrap();
    plan(objects, usage, &LifecycleRules::parse(rules)?, Provider::Gcs, &prices, "STANDARD", NOW_MS)
}

#[test]
fn moves_and_deletions_save_what_the_price_table_says() {
    let objects = [object("shards/a", 100, 40), object("shards/b", 10, 10), object("tmp/c", 5, 3)];
    let rules = r#"
        [[rule]]
        name = "cold"
        prefix = "shards/"
        age_days = 30
        tier = "NEARLINE"
        [[rule]]
        name = "scratch"
        prefix = "tmp/"
        age_days = 2
        delete = true
    "#;
    let plan = made(&objects, &Usage::default(), rules).unwrap();
    let actions: Vec<(&str, Option<&str>, i128)> =
        plan.actions.iter().map(|a| (a.key.as_str(), a.tier.as_deref(), a.saved_micro_usd_month.unwrap())).collect();
    // $0.020 a GiB and month in STANDARD, $0.010 in NEARLINE.
    assert_eq!(actions, [("shards/a", Some("NEARLINE"), 1_000_000), ("tmp/c", None, 100_000)]);
    assert_eq!((plan.saved_micro_usd_month, plan.once_micro_usd), (Some(1_100_000), 0));
}

#[test]
fn what_is_read_often_or_deleted_soon_stays_where_it_is() {
    let objects = [object("hot", 1, 90), object("warm", 1, 90)];
    let read = |reads_of_month| Access { last_ms: NOW_MS - 40 * DAY_MS, reads_of_month };
    let accesses = BTreeMap::from([("hot".to_owned(), read(2)), ("warm".to_owned(), read(0))]);
    let log = AccessLog { from_ms: NOW_MS - 90 * DAY_MS, accesses };
    let usage = Usage { log: Some(log), ..Usage::default() };
    let cold = "[[rule]]\nname = \"cold\"\nidle_days = 30\ntier = \"NEARLINE\"\n";
    let plan = made(&objects, &usage, cold).unwrap();
    // Two readings a month at $0.010 cost more than the $0.010 that storing saves.
    assert_eq!(plan.actions.iter().map(|a| a.key.as_str()).collect::<Vec<_>>(), ["warm"]);
    assert_eq!(plan.left.len(), 1);
    // 10 days of STANDARD at 20 are less than the 30 days of NEARLINE at 10 that are paid at least.
    let soon = format!("{cold}[[rule]]\nname = \"old\"\nage_days = 100\ndelete = true\n");
    let plan = made(&objects, &usage, &soon).unwrap();
    assert!(
        plan.actions.is_empty() && plan.left.iter().any(|(why, ..)| why.contains("deleted in 10 days")),
        "{plan:?}"
    );
    let late = format!("{cold}[[rule]]\nname = \"old\"\nage_days = 130\ndelete = true\n");
    assert_eq!(made(&objects, &usage, &late).unwrap().actions.len(), 1);
}

#[test]
fn what_a_live_version_names_is_never_deleted() {
    let objects = [object("old", 1, 90), object("new", 1, 90), object("fresh", 1, 0)];
    let referenced = Some(BTreeSet::from(["new".to_owned()]));
    let usage = Usage { referenced, ..Usage::default() };
    let rules = "[[rule]]\nname = \"unnamed\"\nunreferenced = true\nage_days = 7\ndelete = true\n";
    let plan = made(&objects, &usage, rules).unwrap();
    assert_eq!(plan.actions.iter().map(|a| a.key.as_str()).collect::<Vec<_>>(), ["old"]);
    let plan = made(&objects, &usage, "[[rule]]\nname = \"all\"\nage_days = 7\ndelete = true\n").unwrap();
    assert_eq!(plan.actions.iter().map(|a| a.key.as_str()).collect::<Vec<_>>(), ["old"]);
}

#[test]
fn small_objects_and_what_must_be_restored_stay_on_s3() {
    let mut small = object("small", 0, 90);
    small.bytes = 100 << 10;
    let mut tiny = object("tiny", 0, 90);
    tiny.bytes = 10 << 10;
    let prices = Prices::read(None, "s3", None).unwrap();
    let planned = |objects: &[ObjectFacts], usage: &Usage, tier: &str| {
        let rules = LifecycleRules::parse(&format!("[[rule]]\nname = \"r\"\ntier = \"{tier}\"\n")).unwrap();
        plan(objects, usage, &rules, Provider::S3, &prices, "STANDARD", NOW_MS).unwrap()
    };
    // 100 KiB at 23 are more than 128 KiB at 12.5, and 10 KiB are not.
    let moved = planned(&[small, tiny], &Usage::default(), "STANDARD_IA");
    assert_eq!(moved.actions.iter().map(|a| a.key.as_str()).collect::<Vec<_>>(), ["small"]);
    assert_eq!(moved.left[0].0, "STANDARD_IA is paid for at least 128 KiB, which would cost more");
    let usage = Usage { referenced: Some(BTreeSet::from(["named".to_owned()])), ..Usage::default() };
    let archived = planned(&[object("named", 1, 90), object("other", 1, 90)], &usage, "DEEP_ARCHIVE");
    assert_eq!(archived.actions.iter().map(|a| a.key.as_str()).collect::<Vec<_>>(), ["other"]);
    assert!(archived.left[0].0.contains("cannot be read until it is restored"), "{archived:?}");
}

#[test]
fn without_a_region_the_prices_of_every_tier_are_known() {
    for provider in [Provider::S3, Provider::Gcs, Provider::Azure] {
        let prices = Prices::read(None, provider.scheme(), None).unwrap();
        for tier in provider.tiers() {
            assert!(prices.find(tier).is_some(), "{} {tier}", provider.name());
        }
    }
}

#[test]
fn a_plan_has_another_digest_once_an_object_changes() {
    let rules = "[[rule]]\nname = \"all\"\nage_days = 7\ndelete = true\n";
    let before = made(&[object("a", 1, 90)], &Usage::default(), rules).unwrap();
    let mut changed = object("a", 1, 90);
    changed.etag = Some("another".into());
    assert_eq!(made(&[object("a", 1, 90)], &Usage::default(), rules).unwrap().digest, before.digest);
    assert_ne!(made(&[changed], &Usage::default(), rules).unwrap().digest, before.digest);
}

#[test]
fn rules_that_ask_for_what_is_not_known_are_refused() {
    for (rule, expected) in [
        ("idle_days = 3\ndelete = true", "give an access log"),
        ("unreferenced = true\nage_days = 1\ndelete = true", "no manifest"),
        ("unreferenced = true\ndelete = true", "give `age_days`"),
        ("tier = \"GLACIER\"", "has no tier `GLACIER`; it has STANDARD, NEARLINE, COLDLINE, ARCHIVE"),
        ("age_days = 3", "either a `tier` or `delete = true`"),
        ("delete = true\nage_dys = 3", "age_dys"),
    ] {
        let error = made(&[], &Usage::default(), &format!("[[rule]]\nname = \"r\"\n{rule}\n")).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn providers_are_told_what_they_have_words_for() {
    let text = r#"
        [[rule]]
        name = "idle"
        idle_days = 90
        delete = true
        [[rule]]
        name = "cold"
        prefix = "shards/"
        age_days = 30
        tier = "STANDARD_IA"
    "#;
    let rules = LifecycleRules::parse(text).unwrap();
    let usage = Usage::default();
    let s3 = configuration(&rules, Provider::S3, "s3://bucket/data", &usage).unwrap();
    assert_eq!(s3.left_out, [("idle".to_owned(), "it has no rule by last access".to_owned())]);
    assert_eq!(s3.json["Rules"][0]["Filter"]["Prefix"], "data/shards/");
    assert_eq!(s3.json["Rules"][0]["Transitions"][0]["Days"], 30);
    let rules = LifecycleRules::parse(&text.replace("STANDARD_IA", "Cool")).unwrap();
    let azure = configuration(&rules, Provider::Azure, "az://box/data", &usage).unwrap();
    assert_eq!(azure.json["rules"][1]["definition"]["filters"]["prefixMatch"][0], "box/data/shards/");
    let delete = &azure.json["rules"][0]["definition"]["actions"]["baseBlob"]["delete"];
    assert_eq!(delete["daysAfterLastAccessTimeGreaterThan"], 90);
    let gcs = configuration(&rules, Provider::Gcs, "gs://bucket", &usage).unwrap();
    assert_eq!(gcs.json["lifecycle"]["rule"][0]["condition"]["matchesPrefix"][0], "shards/");
    assert_eq!(configuration(&rules, Provider::Local, "/data", &usage), None);
}

/// The names of the rules that a provider is told, and why it is not told the others.
fn told(provider: Provider, usage: &Usage, rules: &str) -> (Vec<String>, Vec<(String, String)>) {
    let rules = LifecycleRules::parse(rules).unwrap();
    let Configuration { json, left_out } = configuration(&rules, provider, "x://bucket/set", usage).unwrap();
    let said = match provider {
        Provider::Gcs => &json["lifecycle"]["rule"],
        Provider::S3 => &json["Rules"],
        _ => &json["rules"],
    };
    let names = rules.rules.iter().map(|rule| rule.name.clone());
    let told: Vec<String> = names.filter(|name| left_out.iter().all(|(left, _)| left != name)).collect();
    assert_eq!(said.as_array().unwrap().len(), told.len(), "{json}");
    (told, left_out)
}

#[test]
fn no_provider_is_told_to_delete_or_hide_what_a_live_version_names() {
    let rule = |name: &str, rest: &str| format!("[[rule]]\nname = \"{name}\"\nage_days = 90\n{rest}\n");
    let live = ["LATEST", "index.json", "manifests/0a.json", "shard-00000-3f.mds"];
    let own = Usage { referenced: Some(live.map(str::to_owned).into()), ..Usage::default() };
    let below = live.map(|key| (format!("val/{key}"), "val".to_owned())).into();
    let below = Usage { below, ..Usage::default() };
    for provider in [Provider::S3, Provider::Gcs, Provider::Azure] {
        let deletes = rule("scratch", "prefix = \"tmp/\"\ndelete = true") + &rule("old goes", "delete = true");
        for usage in [&own, &below] {
            let (told, left) = told(provider, usage, &deletes);
            assert_eq!(told, ["scratch"], "{provider:?}");
            assert_eq!(left, [("old goes".to_owned(), "it would delete what a live version names".to_owned())]);
        }
        // A shard that a later version will name.
        let (told_of_shards, _) = told(provider, &own, &rule("shards", "prefix = \"shard-1\"\ndelete = true"));
        assert_eq!(told_of_shards, [""; 0], "{provider:?}");
        // Where nothing is known to be live, the plan deletes, too.
        assert_eq!(told(provider, &Usage::default(), &deletes).0, ["scratch", "old goes"], "{provider:?}");
    }
    for (provider, tier) in [(Provider::S3, "DEEP_ARCHIVE"), (Provider::Azure, "Archive")] {
        let (told, left) = told(provider, &own, &rule("deep", &format!("tier = \"{tier}\"")));
        assert!(told.is_empty() && left[0].1.contains("cannot be read until it is restored"), "{left:?}");
    }
    assert_eq!(told(Provider::Gcs, &own, &rule("deep", "tier = \"ARCHIVE\"")).0, ["deep"]);
}

#[test]
fn what_an_earlier_rule_decides_no_provider_decides_otherwise() {
    for (provider, cool, cold) in [
        (Provider::S3, "STANDARD_IA", "GLACIER_IR"),
        (Provider::Gcs, "NEARLINE", "COLDLINE"),
        (Provider::Azure, "Cool", "Cold"),
    ] {
        let rule = |name: &str, prefix: &str, what: &str| {
            format!("[[rule]]\nname = \"{name}\"\nprefix = \"{prefix}\"\nage_days = 40\n{what}\n")
        };
        let to = |tier: &str| format!("tier = \"{tier}\"");
        for (first, second, expected) in [
            (rule("a", "x/", &to(cool)), rule("b", "", "delete = true"), ["a"].as_slice()),
            (rule("a", "", &to(cool)), rule("b", "x/", &to(cold)), &["a"]),
            (rule("a", "x/", &to(cool)), rule("b", "y/", "delete = true"), &["a", "b"]),
            (rule("a", "", &to(cold)), rule("b", "", &to(cool)), &["a", "b"]),
            (rule("a", "", "delete = true"), rule("b", "", &to(cool)), &["a", "b"]),
        ] {
            let (told, left) = told(provider, &Usage::default(), &(first + &second));
            assert_eq!(told, expected, "{provider:?}: {left:?}");
            assert!(left.iter().all(|(_, reason)| reason.starts_with("`a` comes first")), "{left:?}");
        }
        // What is kept warm by a rule that cannot be said is not moved by the next.
        let warm = rule("a", "x/", &format!("unreferenced = true\n{}", to(cool)));
        let (told, left) = told(provider, &Usage::default(), &(warm + &rule("b", "x/", "delete = true")));
        assert!(told.is_empty() && left.len() == 2, "{left:?}");
    }
}

#[test]
fn what_a_provider_would_drop_or_refuse_is_left_out() {
    for (provider, rule, expected) in [
        (Provider::Azure, "age_days = 365\nidle_days = 30\ndelete = true", Some("age and last access together")),
        (Provider::Azure, "age_days = 30\nidle_days = 30\ndelete = true", None),
        (Provider::S3, "age_days = 29\ntier = \"STANDARD_IA\"", Some("less than 30 days")),
        (Provider::S3, "tier = \"GLACIER_IR\"", None),
        (Provider::Gcs, "age_days = 29\ntier = \"NEARLINE\"", None),
        (Provider::Gcs, "age_days = 29\ntier = \"STANDARD\"", Some("warmest tier")),
    ] {
        let (_, left) = told(provider, &Usage::default(), &format!("[[rule]]\nname = \"r\"\n{rule}\n"));
        assert_eq!(left.len(), usize::from(expected.is_some()), "{rule}: {left:?}");
        assert!(left.iter().all(|(_, reason)| reason.contains(expected.unwrap_or_default())), "{rule}: {left:?}");
    }
}

/// An index as MosaicML Streaming writes it, of a compression that is not read here.
const FOREIGN_INDEX: &[u8] = br#"{ "version": 2, "shards": [{ "format": "mds", "compression": "br",
    "raw_data": { "basename": "shard.00000.mds", "bytes": 1, "hashes": {} },
    "zip_data": { "basename": "shard.00000.mds.br", "bytes": 1, "hashes": {} } }] }"#;

#[test]
fn what_datasets_in_folders_below_name_is_left_alone_and_said_to_be() {
    let objects = Objects::open("memory:", &BTreeMap::new(), &AccessOptions::default()).unwrap();
    let put = |key: &str, bytes: &[u8]| objects.put(key, Bytes::copy_from_slice(bytes)).unwrap();
    let schema = Schema::new(vec![Column { name: "x".into(), kind: Kind::Text }]).unwrap();
    let shard = |key: &str| vec![ShardFacts::new(key, ShardFormat::Mds, 1, 1)];
    let own = Manifest::new(schema.clone(), shard("shard-1.mds"));
    own.commit(&objects).unwrap();
    let inner = Objects::open("memory:", &BTreeMap::new(), &AccessOptions::default()).unwrap();
    Manifest::new(schema, shard("shard-2.mds")).commit(&inner).unwrap();
    for object in inner.list("").unwrap() {
        put(&format!("val/{}", object.key), &inner.get(&object.key).unwrap());
    }
    put("far/off/index.json", FOREIGN_INDEX);
    put("site/index.json", b"<html>");
    for key in ["shard-1.mds", "shard-0.mds", "val/shard-2.mds", "val/shard-0.mds", "far/off/shard.00000.mds.br"] {
        put(key, b"x");
    }
    let listed = objects.list("").unwrap();
    let mut usage = Usage::default();
    live_objects(&objects, &listed, 1, &mut usage).unwrap();
    let old: Vec<ObjectFacts> = listed.into_iter().map(|o| ObjectFacts { modified_ms: 0, ..o }).collect();
    for rule in ["unreferenced = true\n", ""] {
        let rules = format!("[[rule]]\nname = \"goes\"\n{rule}age_days = 14\ndelete = true\n");
        let plan = made(&old, &usage, &rules).unwrap();
        let keys: Vec<&str> = plan.actions.iter().map(|a| a.key.as_str()).collect();
        assert_eq!(keys, ["shard-0.mds", "site/index.json", "val/shard-0.mds"]);
        let left = |reason: &str| plan.left.iter().find(|(why, ..)| why == reason).map(|(_, objects, _)| *objects);
        assert_eq!(left("the dataset in `val` names it"), Some(3));
        assert_eq!(left("the dataset in `far/off` names it"), Some(2));
    }
}

#[test]
fn an_index_without_a_manifest_keeps_its_shards_and_is_no_manifest() {
    let objects = Objects::open("memory:", &BTreeMap::new(), &AccessOptions::default()).unwrap();
    for (key, bytes) in [("index.json", FOREIGN_INDEX), ("shard.00000.mds", b"x"), ("notes", b"x")] {
        objects.put(key, Bytes::from_static(bytes)).unwrap();
    }
    let listed = objects.list("").unwrap();
    let mut usage = Usage::default();
    live_objects(&objects, &listed, 1, &mut usage).unwrap();
    let old: Vec<ObjectFacts> = listed.into_iter().map(|o| ObjectFacts { modified_ms: 0, ..o }).collect();
    let plan = made(&old, &usage, "[[rule]]\nname = \"all\"\nage_days = 7\ndelete = true\n").unwrap();
    assert_eq!(plan.actions.iter().map(|a| a.key.as_str()).collect::<Vec<_>>(), ["notes"]);
    assert_eq!(
        plan.left.iter().map(|(why, n, _)| (why.as_str(), *n)).collect::<Vec<_>>(),
        [("`index.json` names it", 2)]
    );
    let unnamed = "[[rule]]\nname = \"unnamed\"\nunreferenced = true\nage_days = 7\ndelete = true\n";
    assert!(made(&old, &usage, unnamed).unwrap_err().contains("no manifest"));
}

#[test]
fn nothing_is_idle_for_longer_than_the_log_goes_back_and_short_logs_count_for_a_month() {
    let objects = [object("read", 1, 400), object("unread", 1, 400)];
    let log = |days: u64| {
        let at = NOW_MS - days * DAY_MS;
        read_access_log(format!("key,read_unix_ms\nread,{at}\n").as_bytes(), NOW_MS).unwrap()
    };
    let planned = |log: &AccessLog, rules: &str| {
        let usage = Usage { log: Some(log.clone()), ..Usage::default() };
        made(&objects, &usage, rules).unwrap().actions.into_iter().map(|a| a.key).collect::<Vec<_>>()
    };
    let idle = "[[rule]]\nname = \"idle\"\nidle_days = 30\ndelete = true\n";
    assert_eq!(planned(&log(29), idle), [""; 0], "nobody knows what was read 30 days ago");
    assert_eq!(planned(&log(31), idle), ["read", "unread"]);
    let empty = read_access_log(b"key,read_unix_ms\n", NOW_MS).unwrap();
    assert_eq!(planned(&empty, idle), [""; 0]);
    // Once in three days is ten times a month, at $0.010 each; once in thirty days is as much as storing saves.
    let cold = "[[rule]]\nname = \"cold\"\nage_days = 30\ntier = \"NEARLINE\"\n";
    assert_eq!(log(3).reads_of_month(1, NOW_MS), 10);
    assert_eq!(planned(&log(3), cold), ["unread"]);
}

#[test]
fn times_of_readings_that_cannot_be_are_errors() {
    for (time, is_time) in [(NOW_MS, true), (NOW_MS / 1000, false), (NOW_MS + 2 * DAY_MS, false), (0, false)] {
        let read = read_access_log(format!("key,read_unix_ms\na,{NOW_MS}\nb,{time}\n").as_bytes(), NOW_MS);
        assert_eq!(read.is_ok(), is_time, "{read:?}");
        assert!(is_time || read.unwrap_err().starts_with("reading 2 of `b`"));
    }
}

#[test]
fn what_was_moved_is_in_its_new_tier_until_it_is_written_again() {
    let objects = Objects::open("memory:", &Default::default(), &AccessOptions::default()).unwrap();
    objects.put("shards/a", Bytes::from_static(b"a")).unwrap();
    objects.put("shards/b", Bytes::from_static(b"b")).unwrap();
    for key in ["shards/a", "shards/b"] {
        note_moved(&objects, &[(objects.head(key).unwrap(), "COLDLINE".into())]).unwrap();
    }
    let listed = objects.list("").unwrap();
    let tiers = moved_tiers(&objects, &listed).unwrap();
    assert_eq!(tiers.keys().collect::<Vec<_>>(), ["shards/a", "shards/b"]);
    objects.put("shards/b", Bytes::from_static(b"other")).unwrap();
    let tiers = moved_tiers(&objects, &objects.list("").unwrap()).unwrap();
    assert_eq!(tiers.into_iter().collect::<Vec<_>>(), [("shards/a".to_owned(), "COLDLINE".to_owned())]);

    let usage = Usage { tiers: BTreeMap::from([("shards/a".into(), "COLDLINE".into())]), ..Usage::default() };
    let two = [object("shards/a", 1, 40), object("shards/b", 1, 40)];
    let rule = |what: &str| format!("[[rule]]\nname = \"r\"\nage_days = 30\n{what}\n");
    let plan = made(&two, &usage, &rule("tier = \"COLDLINE\"")).unwrap();
    assert_eq!(plan.actions.iter().map(|a| a.key.as_str()).collect::<Vec<_>>(), ["shards/b"]);
    assert_eq!(plan.left, [("already in COLDLINE".to_owned(), 1, 1 << 30)]);
    // 50 of 90 days in COLDLINE at $0.004 a month are still to be paid for.
    let plan = made(&two, &usage, &rule("delete = true")).unwrap();
    assert_eq!((plan.saved_micro_usd_month, plan.once_micro_usd), (Some(24_000), 6_666));
}
