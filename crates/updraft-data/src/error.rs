//! What can be wrong with data: always which file, and which row or column of it.

use std::path::{Path, PathBuf};

use updraft_base::{nearest, units};

/// An error in a dataset, its configuration, or the resumption of a loader.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file could not be read or written.
    #[error("cannot read or write {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not what its format says.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where in the file.
        reason: String,
    },
    /// One sample cannot be used.
    #[error("{sample}, column `{column}`: {reason}")]
    Sample {
        /// The file and row, or the file of this sample.
        sample: String,
        /// The column.
        column: String,
        /// What is wrong.
        reason: String,
    },
    /// A column was asked for that the source does not have.
    #[error("{} has no column `{column}`; {}", path.display(), known_names(column, known))]
    UnknownColumn {
        /// The file or folder.
        path: PathBuf,
        /// The column asked for.
        column: String,
        /// The columns that there are.
        known: Vec<String>,
    },
    /// The configuration asks for something impossible.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// The tensor whose configuration it is.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// The store did not give or take an object.
    #[error(transparent)]
    Store(#[from] updraft_store::StoreError),
    /// A server of a stream or a cache does not answer.
    #[error("{server} does not answer: {reason}")]
    Server {
        /// The server, without passwords.
        server: String,
        /// The cause.
        reason: String,
    },
    /// A stream cannot be followed.
    #[error("{stream}: {reason}")]
    Stream {
        /// The stream, without passwords.
        stream: String,
        /// What is wrong.
        reason: String,
    },
    /// There is nothing to learn from.
    #[error("{} holds no samples{}", path.display(), if reason.is_empty() { String::new() } else { format!(": {reason}") })]
    Empty {
        /// The file or folder.
        path: PathBuf,
        /// Why, where that is not plain.
        reason: String,
    },
    /// More memory would be needed than allowed.
    #[error("{}: {what} takes {}, more than memory_bytes = {}; {advice}", path.display(), units::bytes(*needed_bytes), units::bytes(*allowed_bytes))]
    Memory {
        /// The file or folder.
        path: PathBuf,
        /// What is so large.
        what: String,
        /// What it takes.
        needed_bytes: u64,
        /// The bound.
        allowed_bytes: u64,
        /// What can be done.
        advice: &'static str,
    },
    /// Others changed a dataset while it was being committed.
    #[error("{name} was moved to another version meanwhile; look at that version and commit again")]
    Raced {
        /// The pointer to the newest version.
        name: String,
    },
    /// A loader cannot be made as asked.
    #[error("{0}")]
    Loader(String),
    /// A checkpoint was taken over other data, or in another order.
    #[error("cannot resume: {field} was {expected} and is now {found}")]
    Token {
        /// The field of the token that differs.
        field: &'static str,
        /// What the token says.
        expected: String,
        /// What this loader has.
        found: String,
    },
}

impl DataError {
    /// Whether it says something about what is stored, which will be the same next time and for everyone, and not about
    /// reaching it or about the memory that there is.
    pub(crate) fn is_about_content(&self) -> bool {
        matches!(self, DataError::File { .. } | DataError::Sample { .. } | DataError::Empty { .. })
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> DataError + '_ {
        |source| DataError::Io { path: path.to_owned(), source }
    }

    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> DataError {
        DataError::File { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tensor(tensor: &str, reason: impl Into<String>) -> DataError {
        DataError::Tensor { tensor: tensor.to_owned(), reason: reason.into() }
    }
}

/// Why something cannot be read, before it is said of which file.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// It is not what its format says.
    Damaged(String),
    /// It takes more memory than the user allows, which says nothing about the data.
    Memory { needed_bytes: u64, allowed_bytes: u64 },
}

impl From<String> for Refusal {
    fn from(reason: String) -> Refusal {
        Refusal::Damaged(reason)
    }
}

impl From<&str> for Refusal {
    fn from(reason: &str) -> Refusal {
        Refusal::Damaged(reason.to_owned())
    }
}

impl Refusal {
    /// The error, of a part of a file.
    pub(crate) fn of(self, path: &Path, part: &str) -> DataError {
        match self {
            Refusal::Damaged(reason) => DataError::file(path, format!("{part}: {reason}")),
            Refusal::Memory { needed_bytes, allowed_bytes } => DataError::Memory {
                path: path.to_owned(),
                what: part.to_owned(),
                needed_bytes,
                allowed_bytes,
                advice: "raise it, or write smaller row groups or batches",
            },
        }
    }
}

/// What may be meant by a word that is no name, for a message: "did you mean `a`? Known: `a`, `b`".
pub fn known_names(word: &str, known: &[String]) -> String {
    let list: Vec<String> = known.iter().map(|k| format!("`{k}`")).collect();
    let list = if list.is_empty() { "none".to_owned() } else { list.join(", ") };
    match nearest(word, known.iter().map(String::as_str)) {
        Some(near) => format!("did you mean `{near}`? Known: {list}"),
        None => format!("known: {list}"),
    }
}
