//! What stands escaped in URLs: `file://` and `http(s)://` have it, those of object stores name keys as they are.

use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use crate::StoreError;

/// The path that a URL `file://…` names; `None` for anything else.
///
/// # Errors
/// [`StoreError::Url`] for one of another machine, and for one whose escapes are no text.
///
/// ```
/// let path = |url| updraft_store::file_url_path(url).map(|path| path.ok().unwrap());
/// assert_eq!(path("file:///data/a%20b"), Some("/data/a b".into()));
/// assert_eq!(path("s3://bucket/a%20b"), None);
/// ```
pub fn file_url_path(url: &str) -> Option<Result<PathBuf, StoreError>> {
    let rest = url.strip_prefix("file://")?;
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if !matches!(host, "" | "localhost") || path.is_empty() {
        let reason = format!("`{host}` stands where a host would: write file:///folder");
        return Some(Err(StoreError::Url { url: url.to_owned(), reason }));
    }
    Some(unescaped(path).map(PathBuf::from))
}

/// The text of a part of a URL in which `%20` stands for a space.
///
/// # Errors
/// [`StoreError::Url`] for escapes that are no text.
pub fn unescaped(part: &str) -> Result<String, StoreError> {
    let text = percent_decode_str(part).decode_utf8().map_err(|e| {
        let reason = format!("its escapes are not UTF-8 ({e})");
        StoreError::Url { url: part.to_owned(), reason }
    })?;
    Ok(text.into_owned())
}
