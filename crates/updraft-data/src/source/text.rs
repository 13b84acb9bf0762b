//! Text as overlapping windows of characters, for models that predict the next one.

use std::path::Path;

use updraft_base::Digest;
use updraft_graph::DType;

use crate::config::TextConfig;
use crate::error::DataError;
use crate::source::{Cells, Opened, Source, Wanted, read_whole, tensor_of};
use crate::text::Vocabulary;

struct Text {
    path: String,
    /// The numbers of the characters of the span.
    numbers: Vec<u32>,
    context: usize,
    stride: usize,
    rows: [u64; 1],
    /// For each column, by how many characters it is ahead: 0 for inputs, 1 for targets.
    ahead: Vec<usize>,
}

pub(super) fn open(path: &Path, wanted: &Wanted, config: &TextConfig, memory_bytes: u64) -> Result<Opened, DataError> {
    let TextConfig { context, stride, span: [from, to] } = *config;
    if context == 0 || stride == 0 {
        return Err(DataError::file(path, "`context` and `stride` must be at least 1"));
    }
    if !(0.0 <= from && from < to && to <= 1.0) {
        return Err(DataError::file(path, format!("`span` must rise within 0 and 1, and is [{from}, {to}]")));
    }
    let (columns, ahead) = wanted.among(&["inputs".to_owned(), "targets".to_owned()])?;
    let bytes = read_whole(path, memory_bytes)?;
    let digest = Digest::of(&bytes);
    let text = String::from_utf8(bytes)
        .map_err(|e| DataError::file(path, format!("is not UTF-8 from byte {} on", e.utf8_error().valid_up_to())))?;

    let vocabulary = Vocabulary::of(&text);
    let count = text.chars().count();
    let border = |fraction: f64| (count as f64 * fraction) as usize;
    let span: String = text.chars().skip(border(from)).take(border(to) - border(from)).collect();
    let numbers: Vec<u32> = vocabulary
        .encode(&span)
        .map_err(|e| DataError::file(path, e.to_string()))?
        .into_iter()
        .map(|n| n as u32)
        .collect();
    if numbers.len() <= context {
        let reason = format!("{} characters are too few for a context of {context} and one more", numbers.len());
        return Err(DataError::Empty { path: path.to_owned(), reason });
    }
    let rows = [((numbers.len() - context - 1) / stride + 1) as u64];
    let source = Text { path: path.display().to_string(), numbers, context, stride, rows, ahead };
    Ok(Opened { source: Box::new(source), columns, digest, vocabulary: Some(vocabulary), classes: None })
}

impl Source for Text {
    fn block_rows(&self) -> &[u64] {
        &self.rows
    }

    fn resident_bytes(&self, _: u64) -> u64 {
        4 * self.numbers.len() as u64
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        let windows = |column: &usize| {
            let mut bytes = Vec::with_capacity(rows.len() * self.context * 8);
            for row in rows {
                let start = *row as usize * self.stride + self.ahead[*column];
                for number in &self.numbers[start..start + self.context] {
                    bytes.extend_from_slice(&i64::from(*number).to_ne_bytes());
                }
            }
            Cells::Numbers(tensor_of(DType::I64, &[rows.len(), self.context], &bytes))
        };
        Ok(columns.iter().map(windows).collect())
    }

    fn row_name(&self, row: u64) -> String {
        format!("{} from character {} of its span", self.path, row * self.stride as u64)
    }
}
