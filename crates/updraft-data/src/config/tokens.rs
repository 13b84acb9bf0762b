//! Settings of the step that makes token numbers of text.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How text becomes token numbers, as `i64`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokenize {
    /// A file in the format of the package `tokenizers` (`tokenizer.json`), relative to the recipe; its content is part
    /// of what the dataset is. Reading one needs the Cargo feature `tokenizers`. Without a file, a token is a byte and its
    /// number the byte's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Tokens of each sample: longer text is cut, between its special tokens, and shorter text padded. Without it samples
    /// are lists of any length, to be packed into sequences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<usize>,
    /// The number that pads.
    #[serde(default)]
    pub pad: i64,
    /// What the tensor holds.
    #[serde(default)]
    pub output: TokenOutput,
    /// Whether the file's template adds its special tokens (`[CLS]`, `<s>`).
    #[serde(default = "special_tokens")]
    pub special_tokens: bool,
}

fn special_tokens() -> bool {
    true
}

/// What a tensor of tokens holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenOutput {
    /// Their numbers.
    #[default]
    Ids,
    /// 1 for a token and 0 for padding.
    Mask,
}
