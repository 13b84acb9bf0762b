//! What is wrong with a recipe, and where.

use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};
use updraft_base::nearest;

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read the recipe {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A key that means nothing here.
    #[error("{}:{line}: unknown key `{key}`{}; known here: {}", path.display(), nearest.as_ref().map(|n| format!(", did you mean `{n}`?")).unwrap_or_default(), known.join(", "))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// The most similar key, if one is similar.
        nearest: Option<String>,
        /// All keys that could stand there.
        known: Vec<String>,
    },
    /// Text that is not TOML, or a value of the wrong form.
    #[error("{}:{line}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A value that contradicts another or means nothing.
    #[error("{}:{line}: `{key}` {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key, with its tables.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl RecipeError {
    /// What the TOML reader says, with keys told apart from values: serde has no other way to say which key it was.
    pub(super) fn parse(text: &str, path: &Path, error: &toml::de::Error) -> RecipeError {
        let message = error.message();
        let span = error.span().unwrap_or(0..0);
        for what in ["unknown field `", "unknown variant `"] {
            let Some((key, rest)) = message.strip_prefix(what).and_then(|m| m.split_once('`')) else { continue };
            let known: Vec<String> = rest.split('`').skip(1).step_by(2).map(str::to_owned).collect();
            return RecipeError::UnknownKey {
                path: path.to_owned(),
                line: line_of(text, find_key(text, key, &span).unwrap_or(span.start)),
                key: key.to_owned(),
                nearest: nearest(key, known.iter().map(String::as_str)).map(str::to_owned),
                known,
            };
        }
        RecipeError::Malformed { path: path.to_owned(), line: line_of(text, span.start), message: message.to_owned() }
    }

    /// Something wrong with the value of a key such as `train.batch`.
    pub(crate) fn value(text: &str, path: &Path, key: &str, problem: String) -> RecipeError {
        let line = line_of(text, start_of(text, key).unwrap_or(0));
        RecipeError::Value { path: path.to_owned(), line, key: key.to_owned(), problem }
    }
}

/// The line, from 1, of a byte of the text.
fn line_of(text: &str, byte: usize) -> usize {
    text.as_bytes().iter().take(byte).filter(|b| **b == b'\n').count() + 1
}

/// Where a key of this name stands inside a span, for errors that know only the table around it.
fn find_key(text: &str, key: &str, span: &std::ops::Range<usize>) -> Option<usize> {
    fn visit(table: &DeTable, key: &str, span: &std::ops::Range<usize>) -> Option<usize> {
        table.iter().find_map(|(name, value)| {
            let at = name.span();
            if name.get_ref().as_ref() == key && at.start >= span.start && at.start < span.end.max(span.start + 1) {
                return Some(at.start);
            }
            inside(value.get_ref(), key, span)
        })
    }
    fn inside(value: &DeValue, key: &str, span: &std::ops::Range<usize>) -> Option<usize> {
        match value {
            DeValue::Table(table) => visit(table, key, span),
            DeValue::Array(items) => items.iter().find_map(|item| inside(item.get_ref(), key, span)),
            _ => None,
        }
    }
    visit(DeTable::parse(text).ok()?.get_ref(), key, span)
}

/// Where a key with its tables, such as `train.batch`, stands; where it is missing, the table around it.
fn start_of(text: &str, path: &str) -> Option<usize> {
    let parsed = DeTable::parse(text).ok()?;
    let mut table = parsed.get_ref();
    let mut start = None;
    for part in path.split('.') {
        let Some((name, value)) = table.iter().find(|(name, _)| name.get_ref().as_ref() == part) else { break };
        start = Some(name.span().start);
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    start
}
