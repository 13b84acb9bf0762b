//! Plans computed by hand.

use super::*;

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
    let usage = Usage { accesses: Some(accesses), referenced: None };
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
    let usage = Usage { accesses: None, referenced };
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
    let usage = Usage { accesses: None, referenced: Some(BTreeSet::from(["named".to_owned()])) };
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
        name = "cold"
        prefix = "shards/"
        age_days = 30
        tier = "STANDARD_IA"
        [[rule]]
        name = "idle"
        idle_days = 90
        delete = true
    "#;
    let rules = LifecycleRules::parse(text).unwrap();
    let s3 = configuration(&rules, Provider::S3, "s3://bucket/data").unwrap();
    assert_eq!(s3.left_out, [("idle".to_owned(), "it has no rule by last access")]);
    assert_eq!(s3.json["Rules"][0]["Filter"]["Prefix"], "data/shards/");
    assert_eq!(s3.json["Rules"][0]["Transitions"][0]["Days"], 30);
    let rules = LifecycleRules::parse(&text.replace("STANDARD_IA", "Cool")).unwrap();
    let azure = configuration(&rules, Provider::Azure, "az://box/data").unwrap();
    assert_eq!(azure.json["rules"][0]["definition"]["filters"]["prefixMatch"][0], "box/data/shards/");
    let delete = &azure.json["rules"][1]["definition"]["actions"]["baseBlob"]["delete"];
    assert_eq!(delete["daysAfterLastAccessTimeGreaterThan"], 90);
    let gcs = configuration(&rules, Provider::Gcs, "gs://bucket").unwrap();
    assert_eq!(gcs.json["lifecycle"]["rule"][0]["condition"]["matchesPrefix"][0], "shards/");
    assert_eq!(configuration(&rules, Provider::Local, "/data"), None);
}
