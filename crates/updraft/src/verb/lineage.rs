//! `updraft lineage`: what an artifact came from.

use std::fmt::Write;
use std::path::Path;

use serde_json::json;
use updraft_base::{Digest, units};
use updraft_store::Artifact;

use crate::context::{Answer, Context};
use crate::failure::{Failure, Kind};

/// Show what made an artifact: itself and all it came from, nearest first
///
/// A file is looked up by the digest of its content, wherever it lies.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A digest (`sha256:…`), the first digits of one, or a file.
    #[arg(value_name = "DIGEST_OR_FILE")]
    artifact: String,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<Answer, Failure> {
    let store = context.store()?;
    let path = Path::new(&args.artifact);
    let digest = if let Ok(digest) = args.artifact.parse() {
        digest
    } else if path.is_file() {
        Digest::of(&std::fs::read(path).map_err(|e| Failure::io("read", path, &e))?)
    } else {
        by_prefix(&args.artifact, &store.list()?)?
    };
    let lineage = store.lineage(&digest).map_err(|e| {
        Failure::from(e).hint(format!("the store is {}; another is chosen by `--store`", context.store_url))
    })?;
    let mut text = String::new();
    // Writing to a string cannot fail.
    for artifact in &lineage {
        let size = units::bytes(artifact.size_bytes);
        let _ = writeln!(text, "{}  {}  {size}", artifact.digest, artifact.origin.kind);
        let versions: Vec<String> = artifact.origin.versions.iter().map(|(name, v)| format!("{name} {v}")).collect();
        let _ = writeln!(text, "    made by  {}", versions.join(", "));
        for parent in &artifact.origin.parents {
            let _ = writeln!(text, "    from     {parent}");
        }
        let _ = writeln!(text, "    recipe   {}", artifact.origin.recipe);
    }
    Ok(Answer { text, json: json!({ "digest": digest, "lineage": lineage }) })
}

/// The one artifact whose digest starts with these digits.
fn by_prefix(text: &str, artifacts: &[Artifact]) -> Result<Digest, Failure> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
    let mut found: Vec<Digest> =
        artifacts.iter().map(|a| a.digest).filter(|d| !digits.is_empty() && d.hex().starts_with(&digits)).collect();
    found.dedup();
    match found.as_slice() {
        [digest] => Ok(*digest),
        [] => Err(Failure::new(Kind::Input, format!("`{text}` is no file and no digest in the store"))),
        several => Err(Failure::new(
            Kind::Usage,
            format!("{} artifacts have a digest that starts with `{text}`", several.len()),
        )),
    }
}
