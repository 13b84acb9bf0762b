//! Queries from the command line: what is printed, what is kept, and exit codes. Answers are checked in `updraft-query`.

use crate::workplace::Workplace;

#[cfg(not(feature = "query"))]
#[test]
fn a_query_without_the_engine_says_how_to_build_it() {
    let (code, message) = Workplace::new().failure(&["data", "query", "select 1"]);
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("--features query"), "{message}");
}

#[cfg(feature = "query")]
mod engine {
    use super::Workplace;

    const PEOPLE: &str = "age,city\n34,Ulm\n21,Bern\n51,Graz\n40,Ulm\n";

    fn workplace() -> Workplace {
        let workplace = Workplace::new();
        std::fs::write(workplace.path("people.csv"), PEOPLE).unwrap();
        workplace
    }

    #[test]
    fn a_query_prints_a_table_and_json_has_its_rows() {
        let workplace = workplace();
        let sql =
            "select city, count(*) as people, avg(age) as age, null as \"none\" from p group by city order by city";
        let arguments = ["data", "query", sql, "--table", "p=people.csv", "--limit-rows", "2"];
        let output = workplace.command(&arguments).output().unwrap();
        let expected = "city  people   age  none\n\
                        Bern       1  21.0  null\n\
                        Graz       1  51.0  null\n\
                        … and more; --limit-rows shows more than 2\n";
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected, "{}", String::from_utf8_lossy(&output.stderr));
        let answer = workplace.json(&arguments);
        assert_eq!(answer["rows"][1], serde_json::json!({ "city": "Graz", "people": 1, "age": 51.0, "none": null }));
        assert_eq!((answer["columns"][1]["kind"].as_str(), answer["is_cut"].as_bool()), (Some("i64"), Some(true)));
    }

    #[test]
    fn a_query_kept_as_a_dataset_is_found_again_and_changes_with_its_data() {
        let workplace = workplace();
        let ask = |format: &str| {
            // Members of tar files need endings.
            let columns = if format == "tar" { "age as \"age.cls\", city as \"city.txt\"" } else { "*" };
            let sql = format!("select {columns} from 'people.csv' where age > 30");
            workplace.json(&["data", "query", &sql, "--output", format, "--format", format])
        };
        for format in ["parquet", "mds", "tfrecord", "tar"] {
            let first = ask(format);
            assert_eq!((first["rows"].as_u64(), first["made"].as_u64()), (Some(3), Some(1)), "{format}");
            let again = ask(format);
            assert_eq!((&again["version"], again["made"].as_u64()), (&first["version"], Some(0)), "{format}");
            let inspected = workplace.json(&["data", "inspect", format]);
            assert_eq!(inspected["dataset"]["version"], first["version"]);
        }
        let before = ask("mds")["version"].clone();
        std::fs::write(workplace.path("people.csv"), PEOPLE.replace("21", "31")).unwrap();
        let after = ask("mds");
        assert_eq!(after["rows"].as_u64(), Some(4));
        assert_ne!(after["version"], before);
    }

    #[test]
    fn a_query_that_fails_tells_whose_fault_it_is() {
        let workplace = workplace();
        for (sql, expected_code, expected) in [
            ("select aeg from 'people.csv'", 2, "no column `aeg`; did you mean `age`?"),
            ("select age from peeple", 2, "no table `peeple`; did you mean `people`?"),
            ("select 1 / (age - 34) from 'people.csv'", 3, "Divide by zero"),
        ] {
            let (code, message) = workplace.failure(&["data", "query", sql, "--table", "people=people.csv"]);
            assert_eq!(code, expected_code, "{message}");
            assert!(message.contains(expected), "{message}");
        }
    }
}
