//! Text into token numbers: by a trained tokenizer's file, or byte by byte.

use std::path::Path;

use bytes::Bytes;
use updraft_base::Digest;
use updraft_graph::Tensor;

use crate::config::{TokenOutput, Tokenize};
use crate::source::Cells;

/// A tokenizer and what becomes of its tokens.
pub(crate) struct Tokenizer {
    kind: Kind,
    length: Option<usize>,
    pad: i64,
    output: TokenOutput,
    /// The digest of the tokenizer's file.
    digest: Option<Digest>,
}

enum Kind {
    /// The token of a byte is its value.
    Bytes,
    #[cfg(feature = "tokenizers")]
    File { tokenizer: Box<tokenizers::Tokenizer>, special_tokens: bool },
}

/// Far beyond any model's context; a bound for what is padded.
pub(crate) const LENGTH_MAX: usize = 1 << 24;

impl Tokenizer {
    /// Reads the tokenizer's file, whose path starts at `base` if it is relative.
    pub(crate) fn open(settings: &Tokenize, base: &Path) -> Result<Tokenizer, String> {
        if settings.length.is_some_and(|length| length == 0 || length > LENGTH_MAX) {
            return Err(format!("`length` is 1 to {LENGTH_MAX} tokens"));
        }
        if settings.length.is_none() && settings.output == TokenOutput::Mask {
            return Err("a mask says which tokens are padding, and without `length` there is none".into());
        }
        let (kind, digest) = match &settings.file {
            None => (Kind::Bytes, None),
            Some(file) => open_file(&base.join(file), settings)?,
        };
        Ok(Tokenizer { kind, length: settings.length, pad: settings.pad, output: settings.output, digest })
    }

    pub(crate) fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// `[samples, length]`, or lists of any length. An error names the sample by its place.
    pub(crate) fn apply(&self, cells: &[Bytes]) -> Result<Cells, (Option<usize>, String)> {
        let unfit = |e: updraft_graph::TensorError| (None, e.to_string());
        let Some(length) = self.length else {
            let lists = cells.iter().enumerate().map(|(at, cell)| {
                let tokens = self.tokens(cell).map_err(|reason| (Some(at), reason))?;
                Ok(Tensor::vector(&tokens))
            });
            return lists.collect::<Result<_, _>>().map(Cells::Lists);
        };
        let mut values = Vec::with_capacity(cells.len().saturating_mul(length));
        for (at, cell) in cells.iter().enumerate() {
            let tokens = self.tokens(cell).map_err(|reason| (Some(at), reason))?;
            let count = tokens.len().min(length);
            match self.output {
                TokenOutput::Ids => values.extend_from_slice(&tokens[..count]),
                TokenOutput::Mask => values.extend(std::iter::repeat_n(1, count)),
            }
            let filler = if self.output == TokenOutput::Ids { self.pad } else { 0 };
            values.extend(std::iter::repeat_n(filler, length - count));
        }
        Tensor::new(&[cells.len(), length], &values).map(Cells::Numbers).map_err(unfit)
    }

    fn tokens(&self, cell: &[u8]) -> Result<Vec<i64>, String> {
        match &self.kind {
            Kind::Bytes => Ok(cell.iter().map(|byte| i64::from(*byte)).collect()),
            #[cfg(feature = "tokenizers")]
            Kind::File { tokenizer, special_tokens } => {
                let text = std::str::from_utf8(cell).map_err(|e| format!("is not UTF-8: {e}"))?;
                let encoding =
                    tokenizer.encode_fast(text, *special_tokens).map_err(|e| format!("cannot be tokenised: {e}"))?;
                Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
            }
        }
    }
}

#[cfg(feature = "tokenizers")]
fn open_file(path: &Path, settings: &Tokenize) -> Result<(Kind, Option<Digest>), String> {
    use tokenizers::{ModelWrapper, PostProcessor, TruncationParams};

    let named = |reason: String| format!("{}: {reason}", path.display());
    let bytes = std::fs::read(path).map_err(|e| named(e.to_string()))?;
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| named(e.to_string()))?;
    if let ModelWrapper::BPE(model) = tokenizer.get_model()
        && let Some(dropout) = model.dropout.filter(|dropout| *dropout != 0.0)
    {
        let reason =
            format!("`model.dropout` of {dropout} makes other tokens of the same text each time; set it to null");
        return Err(named(reason));
    }
    // Length and padding are ours to say, not the file's.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| named(e.to_string()))?;
    let added = tokenizer.get_post_processor().map_or(0, |template| template.added_tokens(false));
    if let Some(max_length) = settings.length.filter(|_| settings.special_tokens && added > 0) {
        if max_length < added {
            return Err(named(format!("adds {added} special tokens, which `length = {max_length}` has no room for")));
        }
        // Cut before the template, or the token that ends a text would be what is cut off.
        let truncation = TruncationParams { max_length, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| named(e.to_string()))?;
    }
    let special_tokens = settings.special_tokens;
    Ok((Kind::File { tokenizer: Box::new(tokenizer), special_tokens }, Some(Digest::of(&bytes))))
}

#[cfg(not(feature = "tokenizers"))]
fn open_file(path: &Path, _: &Tokenize) -> Result<(Kind, Option<Digest>), String> {
    Err(format!(
        "{}: this program was built without tokenizer files; build it with the feature `tokenizers`, or leave `file` out \
         for a token a byte",
        path.display()
    ))
}
