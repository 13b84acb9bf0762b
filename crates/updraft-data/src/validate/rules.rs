//! The rules file: what rows must be like, and how much may be wrong before the job fails.
//!
//! ```toml
//! label = "label"              # whose values are to be balanced
//! identity = ["image"]         # the columns that make two rows the same; without it, all
//!
//! [limits]                     # shares of all rows, unless it is said otherwise
//! bad_rows = 0.001
//! duplicates = 0.01
//! leaks = 0.0
//! psi = 0.25                   # of any column, against the version compared with
//!
//! [columns.image]
//! kind = "bytes"
//! decode = true
//! bytes_max = 1_000_000
//!
//! [columns.label]
//! kind = "i64"
//! min = 0
//! max = 9
//! ```

use std::collections::BTreeMap;

use regex::Regex;
use serde::Deserialize;

use crate::schema::{Kind, Schema};
use crate::statistics::CellValue;

/// A rules file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// The column whose values are classes.
    #[serde(default)]
    pub label: Option<String>,
    /// The columns that make two rows the same row, for duplicates and leaks. Without any, all.
    #[serde(default)]
    pub identity: Vec<String>,
    /// When the job fails.
    #[serde(default)]
    pub limits: Limits,
    /// What the cells of a column must be like, by its name.
    #[serde(default)]
    pub columns: BTreeMap<String, ColumnRules>,
}

/// How much may be wrong. What has no limit is reported and fails nothing.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The share of rows that break a rule or cannot be read.
    pub bad_rows: Option<f64>,
    /// The share of rows that equal an earlier one.
    pub duplicates: Option<f64>,
    /// The share of rows that nearly equal an earlier one.
    pub near_duplicates: Option<f64>,
    /// The share of rows that are also in a dataset that this one must be disjoint from; 0 where there is such a dataset.
    pub leaks: Option<f64>,
    /// The share of rows that nearly equal one of a dataset that this one must be disjoint from.
    pub near_leaks: Option<f64>,
    /// The share of rows with personal data.
    pub personal: Option<f64>,
    /// The population stability index of any column.
    pub psi: Option<f64>,
    /// The statistic of Kolmogorov and Smirnov of any column.
    pub ks: Option<f64>,
    /// The least number of rows of the rarest class, as a share of the commonest's.
    pub balance: Option<f64>,
}

impl Default for Limits {
    /// Nothing bad; the rest is reported.
    fn default() -> Limits {
        Limits {
            bad_rows: Some(0.0),
            leaks: None,
            near_leaks: None,
            duplicates: None,
            near_duplicates: None,
            personal: None,
            psi: None,
            ks: None,
            balance: None,
        }
    }
}

/// What the cells of one column must be like. A cell that is not makes its row bad.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnRules {
    /// Its kind: `bytes`, `text`, an element type with or without a shape (`f32`, `f32[28, 28]`), or `list of i64`.
    #[serde(default)]
    pub kind: Option<String>,
    /// Whether no cell may be missing: null, empty, or all NaN.
    #[serde(default)]
    pub required: bool,
    /// The largest share of missing cells; the job fails beyond it.
    #[serde(default)]
    pub missing_max: Option<f64>,
    /// The least number.
    #[serde(default)]
    pub min: Option<f64>,
    /// The largest number.
    #[serde(default)]
    pub max: Option<f64>,
    /// Whether every number must be finite.
    #[serde(default)]
    pub finite: bool,
    /// The values that there are.
    #[serde(default)]
    pub allowed: Option<Vec<CellValue>>,
    /// A regular expression that text must match, from end to end if it has `^` and `$`.
    #[serde(default)]
    pub pattern: Option<Pattern>,
    /// Whether no two cells are equal. Kept exactly while the hashes fit in memory, else on a sample.
    #[serde(default)]
    pub unique: bool,
    /// The fewest bytes of a cell of bytes or text, or elements of a list.
    #[serde(default)]
    pub length_min: Option<u64>,
    /// The most bytes of a cell of bytes or text, or elements of a list.
    #[serde(default)]
    pub length_max: Option<u64>,
    /// Whether cells must decode as pictures. Without it, they must where most of some rows do.
    #[serde(default)]
    pub decode: Option<bool>,
    /// The least height and width of pictures.
    #[serde(default)]
    pub pixels_min: Option<[usize; 2]>,
    /// The largest height and width of pictures.
    #[serde(default)]
    pub pixels_max: Option<[usize; 2]>,
    /// Whether personal data makes a row bad; it is counted anyway.
    #[serde(default)]
    pub no_personal_data: bool,
}

/// A regular expression.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(pub Regex);

impl TryFrom<String> for Pattern {
    type Error = regex::Error;

    fn try_from(text: String) -> Result<Pattern, regex::Error> {
        Regex::new(&text).map(Pattern)
    }
}

impl Rules {
    /// Reads a rules file.
    ///
    /// # Errors
    /// What is wrong, with the line.
    pub fn parse(text: &str) -> Result<Rules, toml::de::Error> {
        toml::from_str(text)
    }

    /// Checks that the columns that the rules name are there, of the kind that they say, and of one that each rule is
    /// about; and that limits are shares.
    pub(super) fn check(&self, schema: &Schema) -> Result<(), String> {
        self.limits.check()?;
        let names = schema.names();
        let unknown = |name: &String| format!("no column `{name}`; {}", crate::error::known_names(name, &names));
        for name in self.label.iter().chain(&self.identity) {
            if schema.index_of(name).is_none() {
                return Err(unknown(name));
            }
        }
        for (name, rules) in &self.columns {
            let column = schema.index_of(name).map(|at| &schema.columns[at]).ok_or_else(|| unknown(name))?;
            let found = column.kind.to_string();
            if let Some(kind) = rules.kind.as_ref().filter(|kind| **kind != found) {
                return Err(format!("column `{name}` holds {found}; the rules ask for {kind}"));
            }
            rules.check(&column.kind).map_err(|reason| format!("column `{name}`: {reason}"))?;
        }
        Ok(())
    }
}

impl Limits {
    fn check(&self) -> Result<(), String> {
        let shares = [
            ("bad_rows", self.bad_rows),
            ("duplicates", self.duplicates),
            ("near_duplicates", self.near_duplicates),
            ("leaks", self.leaks),
            ("near_leaks", self.near_leaks),
            ("personal", self.personal),
            ("ks", self.ks),
            ("balance", self.balance),
        ];
        for (name, limit) in shares {
            check_share(name, limit)?;
        }
        match self.psi {
            Some(psi) if !(0.0..f64::INFINITY).contains(&psi) => Err(format!("`psi = {psi}` is no limit; 0.25 is")),
            _ => Ok(()),
        }
    }
}

fn check_share(name: &str, share: Option<f64>) -> Result<(), String> {
    match share {
        Some(share) if !(0.0..=1.0).contains(&share) => {
            Err(format!("`{name} = {share}` is no share; it lies from 0 to 1"))
        }
        _ => Ok(()),
    }
}

impl ColumnRules {
    /// Checks that every rule says something about cells of a kind.
    fn check(&self, kind: &Kind) -> Result<(), String> {
        check_share("missing_max", self.missing_max)?;
        let is_text = matches!(kind, Kind::Text | Kind::Bytes);
        let has_numbers = matches!(kind, Kind::Number { .. } | Kind::List { .. });
        let has_length = !matches!(kind, Kind::Number { .. });
        let says_nothing = [
            ("min", self.min.is_some(), has_numbers),
            ("max", self.max.is_some(), has_numbers),
            ("finite", self.finite, has_numbers),
            ("pattern", self.pattern.is_some(), is_text),
            ("no_personal_data", self.no_personal_data, is_text),
            ("length_min", self.length_min.is_some(), has_length),
            ("length_max", self.length_max.is_some(), has_length),
            ("decode", self.decode == Some(true), *kind == Kind::Bytes),
            ("pixels_min", self.pixels_min.is_some(), *kind == Kind::Bytes),
            ("pixels_max", self.pixels_max.is_some(), *kind == Kind::Bytes),
        ];
        if let Some((rule, ..)) = says_nothing.iter().find(|(_, is_given, is_about)| *is_given && !is_about) {
            return Err(format!("`{rule}` says nothing about {kind}"));
        }
        let fits = |value: &CellValue| matches!(value, CellValue::Number(_)) == has_numbers;
        if let Some(value) = self.allowed.iter().flatten().find(|value| !fits(value)) {
            return Err(format!("`{value}` is among the allowed values, and no cell of {kind} can be"));
        }
        match (self.min, self.max) {
            (Some(min), Some(max)) if min > max => Err(format!("no number is at least {min} and at most {max}")),
            _ => Ok(()),
        }
    }
}
