//! Where a dataset lies: a local path or a URL, one object, a folder, or a pattern over objects.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use updraft_store::{LocalFiles, ObjectFacts, Objects, ReadObjects, file_url_path, unescaped};

use crate::error::DataError;
use crate::source::Access;
use crate::source::input::small_object;
use crate::source::shard::{LOCAL_REQUEST_BYTES, REMOTE_REQUEST_BYTES};

/// A folder or bucket, and what of it is meant.
pub(crate) struct Place {
    pub root: Root,
    /// The rest of the path below the root: a key, a pattern, or nothing for all of the root.
    pub rest: String,
    /// The path as it was given, for messages.
    pub name: PathBuf,
}

/// What objects lie in.
pub(crate) enum Root {
    Local(PathBuf),
    Remote(Objects),
}

/// Whether a path is a URL.
pub(crate) fn is_url(path: &str) -> bool {
    path.contains("://")
}

impl Place {
    /// Finds the place of a path that starts at `base` unless it is absolute or a URL.
    pub(crate) fn of(path: &Path, base: &Path, access: &Access) -> Result<Place, DataError> {
        let text = path.to_str().ok_or_else(|| DataError::file(path, "is not UTF-8"))?;
        if let Some(local) = file_url_path(text) {
            return Ok(Place::local(&local?));
        }
        if !is_url(text) {
            return Ok(Place::local(&base.join(path)));
        }
        let is_http = ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme));
        if let Some((address, _)) = text.split_once('?').filter(|(_, query)| is_http && query.contains('=')) {
            // What a query signs is a secret, so it is not shown.
            let reason = "its query (`?…=…`) cannot be sent along: a signed address allows one kind of request, and reading \
                          takes several; give s3://, gs:// or az:// with credentials";
            return Err(DataError::file(address.as_ref(), reason));
        }
        let (folder, rest) = match pattern_start(text) {
            Some(at) => split_folder(text, at),
            // A last part with a dot is an object, without one a folder, and so is what ends with a slash.
            None => match text.rsplit_once('/') {
                Some((folder, last)) if last.contains('.') && folder.contains("://") && !folder.ends_with('/') => {
                    (folder, last)
                }
                _ => (text, ""),
            },
        };
        // The folder is a URL still, and the rest a key.
        let rest = if is_http { unescaped(rest)? } else { rest.to_owned() };
        let objects = Objects::open(folder, &access.settings, &access.options)?;
        if let Some(told) = &access.opened {
            told(&objects);
        }
        Ok(Place { root: Root::Remote(objects), rest, name: path.to_owned() })
    }

    fn local(path: &Path) -> Place {
        let text = path.to_string_lossy();
        let place = |folder: &Path, rest: &str| Place {
            root: Root::Local(folder.to_owned()),
            rest: rest.to_owned(),
            name: path.to_owned(),
        };
        match pattern_start(&text) {
            _ if path.is_dir() => place(path, ""),
            Some(at) if !path.exists() => {
                let (folder, rest) = split_folder(&text, at);
                place(Path::new(if folder.is_empty() { "/" } else { folder }), rest)
            }
            _ => {
                let file = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
                place(path.parent().unwrap_or(Path::new("")), file)
            }
        }
    }

    /// The folder of the name of one object: Spark and others call folders `x.parquet`, too. `None` where nothing could list
    /// it.
    pub(crate) fn as_folder(&self, access: &Access) -> Result<Option<Place>, DataError> {
        let name = self.name.to_string_lossy();
        if self.is_local() || self.is_folder() || self.is_pattern() || name.starts_with("http") {
            return Ok(None);
        }
        Place::of(Path::new(&format!("{name}/")), Path::new(""), access).map(Some)
    }

    pub(crate) fn objects(&self, access: &Access) -> Result<Arc<dyn ReadObjects>, DataError> {
        let objects: Arc<dyn ReadObjects> = match &self.root {
            Root::Local(folder) => Arc::new(LocalFiles::new(folder)),
            Root::Remote(objects) => Arc::new(objects.clone()),
        };
        match &access.wrap {
            Some(wrap) => wrap(objects),
            None => Ok(objects),
        }
    }

    pub(crate) fn is_local(&self) -> bool {
        matches!(self.root, Root::Local(_))
    }

    /// What one request counts as, in bytes.
    pub(crate) fn request_bytes(&self) -> u64 {
        if self.is_local() { LOCAL_REQUEST_BYTES } else { REMOTE_REQUEST_BYTES }
    }

    /// Whether all of the root is meant.
    pub(crate) fn is_folder(&self) -> bool {
        self.rest.is_empty()
    }

    /// Whether a pattern is meant.
    pub(crate) fn is_pattern(&self) -> bool {
        pattern_start(&self.rest).is_some()
            && !matches!(&self.root, Root::Local(folder) if folder.join(&self.rest).exists())
    }

    /// The objects that are meant, sorted folder by folder as a walk over files finds them: `cat/1.png` comes before
    /// `cat-big/1.png`, though `-` comes before `/`. Names that start with a dot are not part of any dataset.
    pub(crate) fn list(&self) -> Result<Vec<ObjectFacts>, DataError> {
        let mut found = match &self.root {
            Root::Local(folder) => list_local(folder)?,
            Root::Remote(objects) => objects.list("")?,
        };
        found.retain(|facts| !facts.key.split('/').any(|part| part.starts_with('.')));
        if self.is_pattern() {
            let patterns = braces(&self.rest).map_err(|reason| DataError::file(&self.name, reason))?;
            found.retain(|facts| patterns.iter().any(|p| matches(p.as_bytes(), facts.key.as_bytes())));
        } else if !self.is_folder() {
            found.retain(|facts| facts.key == self.rest);
        }
        found.sort_by(|a, b| a.key.split('/').cmp(b.key.split('/')));
        Ok(found)
    }

    /// The bytes of a small object of the folder, `None` where there is none.
    pub(crate) fn get(&self, key: &str, objects: &Arc<dyn ReadObjects>) -> Result<Option<bytes::Bytes>, DataError> {
        if let Root::Local(folder) = &self.root
            && !folder.join(key).is_file()
        {
            return Ok(None);
        }
        const INDEX_BYTES_MAX: u64 = 1 << 30;
        small_object(&**objects, key, INDEX_BYTES_MAX)
    }
}

fn pattern_start(text: &str) -> Option<usize> {
    text.find(['*', '?', '{'])
}

/// The folder before the first part with a pattern, and the rest.
fn split_folder(text: &str, pattern: usize) -> (&str, &str) {
    match text[..pattern].rfind('/') {
        Some(slash) => (&text[..slash], &text[slash + 1..]),
        None => (".", text),
    }
}

/// Folders in folders, at most.
const DEPTH_MAX: usize = 32;

fn list_local(folder: &Path) -> Result<Vec<ObjectFacts>, DataError> {
    let files = LocalFiles::new(folder);
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_owned(), String::new(), 0)];
    while let Some((path, prefix, depth)) = folders.pop() {
        for entry in std::fs::read_dir(&path).map_err(DataError::io(&path))? {
            let entry = entry.map_err(DataError::io(&path))?;
            let name = entry.file_name();
            let name = name.to_str().ok_or_else(|| DataError::file(&entry.path(), "has a name that is not UTF-8"))?;
            if name.starts_with('.') {
                continue;
            }
            let key = format!("{prefix}{name}");
            if entry.path().is_dir() {
                if depth == DEPTH_MAX {
                    return Err(DataError::file(&entry.path(), format!("lies more than {DEPTH_MAX} folders deep")));
                }
                folders.push((entry.path(), format!("{key}/"), depth + 1));
            } else {
                found.push(files.facts(&key)?);
            }
        }
    }
    Ok(found)
}

/// Alternatives that braces may stand for, at most.
const ALTERNATIVES_MAX: usize = 1 << 20;

/// The patterns that braces stand for: `{a,b}`, and `{000..127}` with its zeros, as WebDataset's URLs have them.
fn braces(pattern: &str) -> Result<Vec<String>, String> {
    let mut done = Vec::new();
    let mut open = vec![pattern.to_owned()];
    while let Some(pattern) = open.pop() {
        let Some(start) = pattern.find('{') else {
            done.push(pattern);
            continue;
        };
        let end = pattern[start..].find('}').ok_or_else(|| format!("`{pattern}` has no closing brace"))? + start;
        let inner = &pattern[start + 1..end];
        let numbers =
            inner.split_once("..").and_then(|(a, b)| Some((a.parse::<u64>().ok()?, b.parse::<u64>().ok()?, a.len())));
        let choices: Vec<String> = match numbers {
            Some((first, last, width)) if last >= first && last - first < ALTERNATIVES_MAX as u64 => {
                (first..=last).map(|n| format!("{n:0width$}")).collect()
            }
            Some(_) => return Err(format!("`{{{inner}}}` is not a range that can be listed")),
            None => inner.split(',').map(str::to_owned).collect(),
        };
        if done.len() + open.len() + choices.len() > ALTERNATIVES_MAX {
            return Err(format!("stands for more than {ALTERNATIVES_MAX} names"));
        }
        open.extend(choices.iter().map(|choice| format!("{}{choice}{}", &pattern[..start], &pattern[end + 1..])));
    }
    Ok(done)
}

/// Whether a key fits a pattern: `?` is one character and `*` any number of them, but not `/`; `**` any number of all.
fn matches(pattern: &[u8], key: &[u8]) -> bool {
    // The last star of each kind, to go back to: a later one makes earlier ones needless.
    let (mut p, mut k) = (0, 0);
    let mut back: Option<(usize, usize, bool)> = None;
    let mut deep: Option<(usize, usize)> = None;
    while k < key.len() {
        match pattern.get(p) {
            Some(b'*') => {
                let doubled = pattern.get(p + 1) == Some(&b'*');
                p += if doubled { 2 } else { 1 };
                back = Some((p, k, doubled));
                if doubled {
                    deep = Some((p, k));
                }
                continue;
            }
            Some(b'?') if key[k] != b'/' => {}
            Some(byte) if *byte == key[k] => {}
            _ => {
                match back {
                    Some((at, from, doubled)) if doubled || key[from] != b'/' => {
                        (p, k) = (at, from + 1);
                        back = Some((at, from + 1, doubled));
                    }
                    _ => match deep {
                        Some((at, from)) if from < key.len() => {
                            (p, k) = (at, from + 1);
                            deep = Some((at, from + 1));
                            back = None;
                        }
                        _ => return false,
                    },
                }
                continue;
            }
        }
        p += 1;
        k += 1;
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_shells_do() {
        for (pattern, key, expected) in [
            ("*.tar", "a.tar", true),
            ("*.tar", "b/a.tar", false),
            ("**/*.tar", "b/c/a.tar", true),
            ("**.tar", "b/c/a.tar", true),
            ("a-??.x", "a-01.x", true),
            ("a-??.x", "a-1.x", false),
            ("a*b*c", "aXbXbc", true),
            ("a*b*c", "aXbXb", false),
            ("x/**/y/*.z", "x/1/2/y/q.z", true),
            ("x/**/y/*.z", "x/1/y/2/q.z", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), key.as_bytes()), expected, "{pattern} {key}");
        }
    }

    #[test]
    fn urls_lead_to_folders_and_names() {
        let of = |url: &str| {
            let mut access = Access::default();
            if url.starts_with("s3:") {
                let keys = ["access_key_id", "secret_access_key"].map(|name| (name.to_owned(), "x".to_owned()));
                access.settings.extend(keys);
            }
            Place::of(Path::new(url), Path::new("/base"), &access).map(|place| match place.root {
                Root::Local(folder) => (folder.display().to_string(), place.rest),
                Root::Remote(objects) => (objects.url().to_owned(), place.rest),
            })
        };
        for (url, folder, rest) in [
            ("file:///no/a%20b/100%25.csv", "/no/a b", "100%.csv"),
            ("file://localhost/no/a b/x.csv", "/no/a b", "x.csv"),
            ("http://host/a%20b/x%20y%2B.csv", "http://host/a%20b", "x y+.csv"),
            ("http://host/x y%.csv", "http://host", "x y%.csv"),
            ("s3://bucket/a%20b/x%20y.csv", "s3://bucket/a%20b", "x%20y.csv"),
            ("s3://bucket/v1.2", "s3://bucket", "v1.2"),
            ("s3://bucket/v1.2/", "s3://bucket/v1.2", ""),
            ("s3://bucket/v1.2/part-*.csv", "s3://bucket/v1.2", "part-*.csv"),
        ] {
            assert_eq!(of(url).unwrap(), (folder.to_owned(), rest.to_owned()), "{url}");
        }
        for url in ["file://host/x", "http://host/%FF.csv", "https://host/x.csv?signature=secret"] {
            let error = of(url).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn braces_stand_for_names_and_numbers() {
        let mut found = braces("s-{008..011}.{tar,tgz}").unwrap();
        found.sort();
        assert_eq!(found.len(), 8);
        assert_eq!((found[0].as_str(), found[7].as_str()), ("s-008.tar", "s-011.tgz"));
        assert!(braces("{0..99999999999}").is_err());
        assert!(braces("{1").is_err());
    }
}
