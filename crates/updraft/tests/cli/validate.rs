//! `updraft data validate`: planted faults are found, and nothing of others is written over.

use serde_json::Value;

use crate::data::numbers;
use crate::workplace::Workplace;

/// A table with an age out of range, a mail that is none, a repeated row and personal data.
const TABLE: &str = "age,mail,city\n\
                     34,none given,Ulm\n\
                     210,none given,Bern\n\
                     51,?,Graz\n\
                     34,none given,Ulm\n\
                     28,ada@example.org,Wien\n\
                     45,card 4111 1111 1111 1111,Linz\n";

const RULES: &str = "[limits]\nbad_rows = 0.1\nduplicates = 0.1\n\
                     [columns.age]\nkind = \"i64\"\nmin = 0\nmax = 130\n\
                     [columns.mail]\npattern = \"[a-z]\"\n";

#[test]
fn validation_finds_planted_faults_masks_what_is_personal_and_fails_with_seven() {
    let workplace = Workplace::new();
    std::fs::write(workplace.path("people.csv"), TABLE).unwrap();
    std::fs::write(workplace.path("rules.toml"), RULES).unwrap();
    let arguments =
        ["data", "validate", "people.csv", "--rules", "rules.toml", "--quarantine", "bad", "--html", "page.html"];
    let (code, message) = workplace.failure(&arguments);
    assert_eq!(code, 7, "{message}");
    assert!(message.contains("bad rows, duplicates"), "{message}");

    let output = workplace.command(&arguments).arg("--json").output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((answer["bad_rows"].as_u64(), answer["passed"].as_bool()), (Some(2), Some(false)));
    let rules: Vec<&str> = answer["findings"].as_array().unwrap().iter().map(|f| f["rule"].as_str().unwrap()).collect();
    assert_eq!(
        {
            let mut r = rules.clone();
            r.sort();
            r
        },
        ["duplicate", "maximum", "pattern"]
    );
    let text =
        String::from_utf8(output.stdout).unwrap() + &std::fs::read_to_string(workplace.path("page.html")).unwrap();
    for secret in ["ada@example.org", "4111 1111 1111 1111"] {
        assert!(!text.contains(secret), "{secret}");
    }
    assert!(text.contains("a**@*******.**g"));
    let quarantined = workplace.json(&["data", "inspect", "bad"]);
    assert_eq!(quarantined["dataset"]["rows"], 3);

    let kept = RULES.replace("bad_rows = 0.1", "bad_rows = 0.5").replace("duplicates = 0.1", "duplicates = 0.5");
    std::fs::write(workplace.path("rules.toml"), kept).unwrap();
    assert_eq!(workplace.json(&["data", "validate", "people.csv", "--rules", "rules.toml"])["passed"], true);
}

#[test]
fn changed_shards_are_found_before_they_are_used() {
    let workplace = Workplace::new();
    numbers(&workplace, "a.csv", 0, 100);
    workplace.json(&["data", "ingest", "source", "set", "--shard-rows", "50"]);
    let name = workplace.json(&["data", "ingest", "source", "set", "--shard-rows", "50"])["shards"][1].clone();
    let file = workplace.path("set").join(name.as_str().unwrap());
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let (code, message) = workplace.failure(&["data", "validate", "set"]);
    assert!(code == 7 && message.contains("changed shards"), "{message}");
    let (_, message) = workplace.failure(&["data", "ingest", "set", "copy"]);
    assert!(message.contains(name.as_str().unwrap()) && message.contains("was changed"), "{message}");
    assert!(!workplace.path("copy").join("LATEST").exists());
}

#[test]
fn nothing_of_others_is_written_over() {
    let workplace = Workplace::new();
    numbers(&workplace, "a.csv", 0, 10);
    std::fs::create_dir(workplace.path("foreign")).unwrap();
    std::fs::write(workplace.path("foreign/index.json"), "{}").unwrap();
    let here = workplace.path("source");
    for (arguments, expected) in [
        (vec!["data", "ingest", "source", "./source"], "source and target are the same"),
        (vec!["data", "ingest", "source", here.to_str().unwrap()], "source and target are the same"),
        (vec!["data", "ingest", "source", "foreign"], "index.json: lists shards that were not ingested here"),
        (vec!["data", "validate", "source", "--quarantine", "foreign"], "index.json: is no quarantine"),
        (vec!["data", "validate", "source", "--quarantine", "source"], "lies within the data of"),
    ] {
        let (_, message) = workplace.failure(&arguments);
        assert!(message.contains(expected), "{message}");
    }
    assert_eq!(std::fs::read_dir(workplace.path("foreign")).unwrap().count(), 1);
    // A quarantine takes the place of an earlier one, and may be validated itself.
    std::fs::write(workplace.path("rules.toml"), "[columns.number]\nmax = 3\n[limits]\nbad_rows = 1.0").unwrap();
    let rules = ["--rules", "rules.toml", "--quarantine"];
    let run = |source: &str, target: &str| {
        workplace.json(&[&["data", "validate", source], rules.as_slice(), &[target]].concat())
    };
    run("source", "bad");
    run("source", "bad");
    assert_eq!(workplace.json(&["data", "inspect", "bad"])["dataset"]["rows"], 6);
    run("bad", "worse");
    assert_eq!(workplace.json(&["data", "inspect", "worse"])["dataset"]["rows"], 6);
}

#[test]
fn a_test_set_that_leaks_into_training_and_one_that_drifts_are_told() {
    let workplace = Workplace::new();
    let table = |from: i64, to: i64, scale: i64| {
        let rows: String = (from..to).map(|i| format!("{},{}\n", scale * (i * 7919 % 1000), i)).collect();
        format!("x,id\n{rows}")
    };
    std::fs::write(workplace.path("train.csv"), table(0, 2000, 1)).unwrap();
    std::fs::write(workplace.path("clean.csv"), table(2000, 3000, 1)).unwrap();
    std::fs::write(workplace.path("leaking.csv"), table(1990, 3000, 1)).unwrap();
    std::fs::write(workplace.path("moved.csv"), table(2000, 3000, 3)).unwrap();
    let check = |answer: &Value, name: &str, column: &str| {
        let of = |c: &&Value| c["name"] == name && (column.is_empty() || c["column"] == column);
        answer["checks"].as_array().unwrap().iter().find(of).unwrap()["value"].as_f64().unwrap()
    };
    let clean =
        workplace.json(&["data", "validate", "clean.csv", "--apart-from", "train.csv", "--against", "train.csv"]);
    assert_eq!(check(&clean, "leaks", ""), 0.0);
    assert!(check(&clean, "drift (PSI)", "x") < 0.1);
    let (code, message) = workplace.failure(&["data", "validate", "leaking.csv", "--apart-from", "train.csv"]);
    assert_eq!(code, 7);
    assert!(message.contains("leaks"), "{message}");
    let moved = workplace.json(&["data", "validate", "moved.csv", "--against", "train.csv"]);
    assert!(check(&moved, "drift (PSI)", "x") > 0.25);
}

#[test]
fn balance_is_known_of_a_thousand_classes_and_after_ingestion() {
    let workplace = Workplace::new();
    let rows: String = (0..3000).map(|row| format!("{}\n", row % 1000)).collect();
    std::fs::write(workplace.path("classes.csv"), format!("label\n{rows}")).unwrap();
    std::fs::write(workplace.path("rules.toml"), "[limits]\nbalance = 0.5\n").unwrap();
    let validated = workplace.json(&["data", "validate", "classes.csv", "--rules", "rules.toml"]);
    assert_eq!(validated["balance"].as_array().unwrap().len(), 1000);
    workplace.json(&["data", "ingest", "classes.csv", "set"]);
    for arguments in [["data", "inspect", "set"].as_slice(), &["data", "inspect", "set", "--full"]] {
        let label = &workplace.json(arguments)["label"];
        let values = label["values"].as_array().unwrap();
        assert!(values.len() == 1000 && values.iter().all(|value| value[1] == 3), "{label}");
    }
    let (code, message) = workplace.failure(&["data", "inspect", "set", "--samples", "18446744073709551615"]);
    assert!(code == 2 && message.contains("10000"), "{message}");
}
