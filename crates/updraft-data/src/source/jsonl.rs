//! JSON Lines: one object a line, whose keys are the columns.
//!
//! # Design
//!
//! A tree of values takes 32 bytes and more for each number, many times the file. Here a line is checked to be JSON and
//! then walked over; numbers go to their column as 8 bytes each, whose type widens as more of them are seen, and what is
//! kept is counted against the bound.

use std::borrow::Cow;

use serde::de::IgnoredAny;
use updraft_graph::DType;

use crate::schema::{Kind, Schema};
use crate::source::jsonl::column::{ColumnBuilder, Memory};
use crate::source::whole::Table;

mod column;

/// A column in the making.
struct Named {
    name: String,
    builder: ColumnBuilder,
    /// The line that had it last.
    line: Option<u64>,
}

/// All rows of a file. Columns are the keys in the order in which they come; a column is of whole numbers where all are,
/// of numbers where some have a fraction, and of arrays where all rows hold arrays of numbers. A key that a line lacks
/// is as if it were null there.
pub(crate) fn table(text: &[u8], wanted: Option<&Schema>, memory_bytes: u64) -> Result<Table, String> {
    // Some editors mark UTF-8 at the start of a file.
    let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
    let lines = text.split(|b| *b == b'\n').zip(1u64..).filter(|(line, _)| !line.trim_ascii().is_empty());
    objects(lines.map(|(line, number)| (number, line)), wanted, memory_bytes).map_err(|(number, reason)| match number {
        Some(number) => format!("line {number}: {reason}"),
        None => reason,
    })
}

/// What is wrong, and in which of the numbered texts where it is one of them.
pub(crate) type WrongObject = (Option<u64>, String);

/// The same of texts of one object each, which have rising numbers.
pub(crate) fn objects<'a>(
    texts: impl Iterator<Item = (u64, &'a [u8])>,
    wanted: Option<&Schema>,
    memory_bytes: u64,
) -> Result<Table, WrongObject> {
    let mut columns: Vec<Named> = Vec::new();
    let mut lines = Vec::new();
    let mut memory = Memory::new(memory_bytes);
    for (number, text) in texts {
        let wrong = |reason: String| (Some(number), reason);
        serde_json::from_slice::<IgnoredAny>(text).map_err(|e| wrong(e.to_string()))?;
        let mut walk = Walk { json: text, at: 0 };
        let mut entries = 0;
        walk.enter().ok_or_else(|| wrong("is no object".to_owned()))?;
        while let Some(key) = walk.key() {
            let key = key.map_err(wrong)?;
            // Keys are in the same order mostly.
            let known = columns.get(entries).filter(|c| c.name == key).map(|_| entries);
            let column = match known.or_else(|| columns.iter().position(|c| c.name == key)) {
                Some(column) => column,
                None => {
                    let kind = wanted.and_then(|s| s.columns.iter().find(|c| c.name == key)).map(|c| &c.kind);
                    let builder = ColumnBuilder::new(kind);
                    columns.push(Named { name: key.into_owned(), builder, line: None });
                    columns.len() - 1
                }
            };
            let Named { name, builder, line } = &mut columns[column];
            if line.replace(number) == Some(number) {
                return Err(wrong(format!("the key `{name}` is there twice")));
            }
            builder.push(&mut walk, lines.len(), &mut memory).map_err(wrong)?;
            entries += 1;
        }
        lines.push(number);
    }
    let mut typed = Vec::with_capacity(columns.len());
    for Named { name, builder, .. } in columns {
        typed.push(builder.finish(name, lines.len(), &mut memory).map_err(|reason| (None, reason))?);
    }
    Ok(Table { rows: lines.len() as u64, columns: typed, lines })
}

/// A position in a line that is known to be JSON.
struct Walk<'a> {
    json: &'a [u8],
    at: usize,
}

impl<'a> Walk<'a> {
    /// The first byte of what comes next; zero at the end.
    fn peek(&mut self) -> u8 {
        while self.json.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.json.get(self.at).copied().unwrap_or(0)
    }

    /// Passes over the bracket that opens the object; `None` where there is none.
    fn enter(&mut self) -> Option<()> {
        let is_object = self.peek() == b'{';
        self.at += 1;
        is_object.then_some(())
    }

    /// The next key of the object, up to its value; `None` behind the last.
    fn key(&mut self) -> Option<Result<Cow<'a, str>, String>> {
        if self.peek() == b',' {
            self.at += 1;
        }
        if self.peek() != b'"' {
            return None;
        }
        let key = self.string();
        self.peek();
        self.at += 1;
        Some(decoded(key))
    }

    /// A string as it is written, with its quotes.
    fn string(&mut self) -> &'a [u8] {
        let start = self.at;
        self.at += 1;
        while let Some(byte) = self.json.get(self.at) {
            self.at += if *byte == b'\\' { 2 } else { 1 };
            if *byte == b'"' {
                break;
            }
        }
        self.json.get(start..self.at).unwrap_or_default()
    }

    /// A number, or a word such as `true`.
    fn word(&mut self) -> &'a str {
        let rest = self.json.get(self.at..).unwrap_or_default();
        let length = rest.iter().take_while(|b| !matches!(b, b',' | b']' | b'}') && !b.is_ascii_whitespace()).count();
        self.at += length;
        std::str::from_utf8(&rest[..length]).unwrap_or_default()
    }

    /// Passes over a value, however deep.
    fn skip(&mut self) {
        let mut depth = 0u64;
        loop {
            match self.peek() {
                0 => return,
                b'"' => drop(self.string()),
                b'[' | b'{' => (self.at, depth) = (self.at + 1, depth + 1),
                b']' | b'}' => (self.at, depth) = (self.at + 1, depth.saturating_sub(1)),
                b',' | b':' => self.at += 1,
                _ => drop(self.word()),
            }
            if depth == 0 {
                return;
            }
        }
    }
}

/// The text of a string as it is written.
fn decoded(string: &[u8]) -> Result<Cow<'_, str>, String> {
    let inner = string.get(1..string.len().saturating_sub(1)).unwrap_or_default();
    if inner.contains(&b'\\') {
        return serde_json::from_slice(string).map(Cow::Owned).map_err(|e| e.to_string());
    }
    let text = std::str::from_utf8(inner).map_err(|e| format!("is not UTF-8 from byte {} on", e.valid_up_to()))?;
    Ok(Cow::Borrowed(text))
}

fn wider(a: DType, b: DType) -> Result<DType, String> {
    match (a, b) {
        (a, b) if a == b => Ok(a),
        // Whether all values fit is seen when they are read.
        (DType::I64, DType::U64) | (DType::U64, DType::I64) => Ok(DType::U64),
        (DType::I64 | DType::U64, DType::F64) | (DType::F64, DType::I64 | DType::U64) => Ok(DType::F64),
        (a, b) => Err(format!("holds {a} in some rows and {b} in others")),
    }
}

/// What cells of two kinds can both be.
pub(crate) fn join(a: Kind, b: Kind) -> Result<Kind, String> {
    Ok(match (a, b) {
        (a, b) if a == b => a,
        (Kind::Number { dtype: a, shape }, Kind::Number { dtype: b, shape: other }) => {
            let dtype = wider(a, b)?;
            match (shape.len(), other.len()) {
                _ if shape == other => Kind::Number { dtype, shape },
                (1, 1) => Kind::List { dtype },
                _ => return Err(format!("holds arrays of shape {shape:?} in some rows and {other:?} in others")),
            }
        }
        (Kind::List { dtype: a }, Kind::Number { dtype: b, shape })
        | (Kind::Number { dtype: b, shape }, Kind::List { dtype: a })
            if shape.len() == 1 =>
        {
            Kind::List { dtype: wider(a, b)? }
        }
        (Kind::List { dtype: a }, Kind::List { dtype: b }) => Kind::List { dtype: wider(a, b)? },
        (a, b) => return Err(format!("holds {a} in some rows and {b} in others")),
    })
}
