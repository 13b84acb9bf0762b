//! Rules of the house that no compiler checks. Each is a function from text to complaints, so that each has a test.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use clap::Args;

use crate::Failure;

/// Options of `tidy`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Print, for each crate, how often its code has the signs that style reviews look for. They are a trend, not a
    /// verdict.
    #[arg(long)]
    signs: bool,
}

/// What a crate may use of the workspace: layers point down, and only along these edges.
const LAYERS: &[(&str, &[&str])] = &[
    ("updraft-base", &[]),
    ("updraft-sim", &["updraft-base"]),
    ("updraft-store", &["updraft-base"]),
    ("updraft-graph", &["updraft-base"]),
    ("updraft-passes", &["updraft-base", "updraft-graph"]),
    ("updraft-engine", &["updraft-base", "updraft-graph"]),
    ("updraft-data", &["updraft-base", "updraft-graph", "updraft-store"]),
    ("updraft-query", &["updraft-base", "updraft-data", "updraft-graph", "updraft-store"]),
    (
        "updraft-train",
        &["updraft-base", "updraft-data", "updraft-engine", "updraft-graph", "updraft-passes", "updraft-store"],
    ),
    (
        "updraft-compress",
        &[
            "updraft-base",
            "updraft-data",
            "updraft-engine",
            "updraft-graph",
            "updraft-passes",
            "updraft-store",
            "updraft-train",
        ],
    ),
    (
        "updraft",
        &[
            "updraft-base",
            "updraft-compress",
            "updraft-data",
            "updraft-engine",
            "updraft-graph",
            "updraft-passes",
            "updraft-query",
            "updraft-store",
            "updraft-train",
        ],
    ),
];

/// Longest a source file may get before it must be cut; past 600 lines it is asked to.
const LINES_MAX: usize = 900;

/// Signs that style reviews look for in code that is not a test.
const SIGNS: &[&str] = &[
    "let _ =",
    ".ok();",
    "unwrap_or_default(",
    "map_err(|_|",
    " as usize",
    " as f32",
    "allow(",
    "Arc<Mutex<",
    ".unwrap()",
    ".expect(",
];

/// Runs all checks over the files that git tracks.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    let listing = Command::new("git").arg("-C").arg(root).args(["ls-files", "-z"]).output()?;
    let files: Vec<String> =
        String::from_utf8(listing.stdout)?.split('\0').filter(|f| !f.is_empty()).map(str::to_owned).collect();
    let mut complaints = Vec::new();
    let mut signs: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut long = Vec::new();
    let mut sources = BTreeMap::new();
    for file in files.iter().filter(|f| is_text(f)) {
        let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
        complaints.extend(check_text(file, &text));
        if file.ends_with(".rs") {
            complaints.extend(check_source(file, &text));
            let lines = text.lines().count();
            if lines > 600 {
                long.push(format!("{file}: {lines} lines"));
            }
            if let Some(krate) = file.strip_prefix("crates/").and_then(|f| f.split('/').next()) {
                let counts = signs.entry(krate.to_owned()).or_insert_with(|| vec![0; SIGNS.len()]);
                for (count, sign) in counts.iter_mut().zip(SIGNS) {
                    *count += without_tests(&text).matches(sign).count();
                }
            }
            sources.insert(file.as_str(), text);
        }
    }
    complaints.extend(check_modules(&sources));
    for (krate, allowed) in LAYERS {
        let path = format!("crates/{krate}/Cargo.toml");
        complaints.extend(check_layers(&path, &std::fs::read_to_string(root.join(&path))?, allowed)?);
    }
    complaints.extend(check_reasons(&std::fs::read_to_string(root.join("Cargo.toml"))?));
    let map = std::fs::read_to_string(root.join("ARCHITECTURE.md"))?;
    complaints.extend(check_map(&map, &files));
    if arguments.signs {
        println!("{:16} {}", "", SIGNS.join("  "));
        for (krate, counts) in &signs {
            println!(
                "{krate:16} {}",
                counts.iter().zip(SIGNS).map(|(c, s)| format!("{c:>w$}", w = s.len())).collect::<Vec<_>>().join("  ")
            );
        }
    }
    for line in &long {
        println!("long, perhaps two things under one roof: {line}");
    }
    if complaints.is_empty() {
        println!("tidy: {} files", files.len());
        return Ok(());
    }
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    Err(format!("{} untidy places", complaints.len()).into())
}

fn is_text(file: &str) -> bool {
    [".rs", ".md", ".toml", ".py", ".txt", ".html", ".css", ".js", "run"].iter().any(|end| file.ends_with(end))
}

/// The code before the first test module.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

/// Rules for every text: no machine's paths, no trailing blanks, an end to the last line.
fn check_text(file: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let machine_path = ["/work/", "/root/", "/home/"].iter().any(|p| line.contains(p));
        // This file names the paths that it looks for.
        if machine_path && file != "xtask/src/tidy.rs" {
            complaints.push(format!("{file}:{}: a path of one machine", i + 1));
        }
        let blank_end = line.ends_with(' ') || line.ends_with('\t');
        if blank_end && !file.contains("/data/") && !file.contains("snapshots/") {
            complaints.push(format!("{file}:{}: blanks at the end", i + 1));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        complaints.push(format!("{file}: the last line does not end"));
    }
    complaints
}

/// Rules for Rust: a header that says what the module is for, no unfinished business, a bounded length.
fn check_source(file: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    if !text.starts_with("//! ") && !text.starts_with("#![no_main]") {
        complaints.push(format!("{file}:1: no header that says what the module is for"));
    }
    let lines = text.lines().count();
    if lines > LINES_MAX {
        complaints.push(format!("{file}: {lines} lines, at most {LINES_MAX}: cut it along its seams"));
    }
    if file == "xtask/src/tidy.rs" {
        return complaints;
    }
    for (i, line) in text.lines().enumerate() {
        for sign in ["#[ignore", "todo!(", "unimplemented!(", "TODO", "FIXME", "for now", "in a real implementation"] {
            if line.contains(sign) {
                complaints.push(format!("{file}:{}: {sign:?} says that something is unfinished", i + 1));
            }
        }
        if line.contains("allow(unsafe_code") || line.trim_start().starts_with("#![allow(warnings") {
            complaints.push(format!("{file}:{}: a gate opened too wide", i + 1));
        }
    }
    complaints
}

/// A file of Rust that no other names as its module is not compiled, and nothing else would say so.
fn check_modules(sources: &BTreeMap<&str, String>) -> Vec<String> {
    let is_named = |file: &str| {
        let path = file.strip_suffix("/mod.rs").or(file.strip_suffix(".rs")).unwrap_or(file);
        let Some((folder, name)) = path.rsplit_once('/') else { return true };
        let declaration = format!("mod {name};");
        let parents = [
            format!("{folder}.rs"),
            format!("{folder}/mod.rs"),
            format!("{folder}/lib.rs"),
            format!("{folder}/main.rs"),
        ];
        let declares = |line: &str| {
            line.trim().strip_suffix(&declaration).is_some_and(|before| before.is_empty() || before.starts_with("pub"))
        };
        parents.iter().filter_map(|parent| sources.get(parent.as_str())).any(|parent| parent.lines().any(declares))
    };
    let is_module =
        |file: &str| file.contains("/src/") && !file.ends_with("/src/lib.rs") && !file.ends_with("/src/main.rs");
    sources
        .keys()
        .filter(|file| is_module(file) && !is_named(file))
        .map(|file| format!("{file}: is no module of its crate"))
        .collect()
}

/// A crate uses only the workspace crates that its row of the table names.
fn check_layers(file: &str, manifest: &str, allowed: &[&str]) -> Result<Vec<String>, Failure> {
    let manifest: toml::Table = toml::from_str(manifest)?;
    let dependencies =
        manifest.get("dependencies").and_then(toml::Value::as_table).into_iter().flat_map(toml::Table::keys);
    Ok(dependencies
        .filter(|d| d.starts_with("updraft") && !allowed.contains(&d.as_str()))
        .map(|d| format!("{file}: may not use {d}: layers point down, see ARCHITECTURE.md"))
        .collect())
}

/// Every dependency of the workspace has its reason in the line above (or above its group of one stem).
fn check_reasons(manifest: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut inside = false;
    let mut reasoned = false;
    let mut stem = String::new();
    for (i, line) in manifest.lines().enumerate() {
        if line.starts_with('[') {
            inside = line == "[workspace.dependencies]";
            continue;
        }
        if !inside {
            continue;
        }
        if line.starts_with('#') {
            reasoned = true;
            stem.clear();
        } else if let Some((name, _)) = line.split_once(" = ") {
            let own = name.starts_with("updraft");
            let same_group = !stem.is_empty() && name.starts_with(&stem);
            if !own && !reasoned && !same_group {
                complaints.push(format!("Cargo.toml:{}: no reason above dependency {name}", i + 1));
            }
            if !own && !line.contains("default-features = false") {
                complaints.push(format!("Cargo.toml:{}: {name} without default-features = false", i + 1));
            }
            stem = name.split(['-', '_']).next().unwrap_or(name).to_owned();
            reasoned = false;
        }
    }
    complaints
}

/// ARCHITECTURE.md names every crate, and what it names in backticks with a slash exists.
fn check_map(map: &str, files: &[String]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (krate, _) in LAYERS {
        if !map.contains(&format!("`{krate}`")) {
            complaints.push(format!("ARCHITECTURE.md: crate {krate} is not on the map"));
        }
    }
    for path in map.split('`').skip(1).step_by(2).filter(|p| p.contains('/') && !p.contains([' ', ':', '*', '<'])) {
        let path = path.trim_end_matches('/');
        let exists = files.iter().any(|f| f == path || f.strip_prefix(path).is_some_and(|rest| rest.starts_with('/')));
        if !exists {
            complaints.push(format!("ARCHITECTURE.md: {path} is not there"));
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_path_and_a_blank_end_are_found() {
        assert_eq!(check_text("a.md", "see /home/x\nfine\nbad \n").len(), 2);
        assert_eq!(check_text("a.md", "no end").len(), 1);
    }

    #[test]
    fn a_source_without_header_or_with_unfinished_business_is_found() {
        assert_eq!(check_source("a.rs", "fn main() {}\n").len(), 1);
        assert_eq!(check_source("a.rs", "//! A thing.\n// TODO\n").len(), 1);
        assert_eq!(check_source("a.rs", &format!("//! A thing.\n{}", "//\n".repeat(LINES_MAX))).len(), 1);
        assert!(check_source("a.rs", "//! A thing.\n").is_empty());
    }

    #[test]
    fn a_file_that_no_other_names_is_found() {
        let sources = |lib: &str| {
            let files = [("c/src/lib.rs", lib), ("c/src/a.rs", "mod b;"), ("c/src/a/b.rs", ""), ("c/src/d/mod.rs", "")];
            BTreeMap::from(files.map(|(file, text)| (file, text.to_owned())))
        };
        assert!(check_modules(&sources("mod a;\npub(super) mod d;\n")).is_empty());
        assert_eq!(check_modules(&sources("mod a;\n// mod d;\n")).len(), 1);
    }

    #[test]
    fn an_edge_that_points_up_is_found() {
        let manifest = "[dependencies]\nupdraft-train.workspace = true\nupdraft-base.workspace = true\n";
        assert_eq!(check_layers("x", manifest, &["updraft-base"]).unwrap().len(), 1);
    }

    #[test]
    fn a_dependency_needs_a_reason_and_named_features() {
        let head = "[workspace.dependencies]\n";
        let good = "# numbers\nserde = { version = \"1\", default-features = false }\nserde_json = { version = \"1\", default-features = false }\n";
        assert!(check_reasons(&format!("{head}{good}")).is_empty());
        assert_eq!(check_reasons(&format!("{head}{good}rand = \"1\"\n")).len(), 2);
    }

    #[test]
    fn the_map_must_name_what_exists() {
        let files = ["crates/updraft-base/src/lib.rs".to_owned()];
        let named: String = LAYERS.iter().map(|(c, _)| format!("`{c}` ")).collect();
        assert!(check_map(&format!("{named} `crates/updraft-base/src`"), &files).is_empty());
        assert_eq!(check_map(&format!("{named} `crates/gone/src`"), &files).len(), 1);
    }
}
