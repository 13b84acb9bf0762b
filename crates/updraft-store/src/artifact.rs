//! An artifact's facts, as its manifest states them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use updraft_base::{Digest, digest::Hasher};

/// Bytes that last: their name, and what they came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Artifact {
    /// The digest of the content, which names it.
    pub digest: Digest,
    /// The length of the content.
    pub size_bytes: u64,
    /// What determined the content.
    pub origin: Origin,
    /// Facts about the content that did not determine it.
    pub meta: Map<String, Value>,
}

/// Everything that determines the bytes of an artifact. Two equal origins ask for the same bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// What sort of thing the bytes are: `model`, `checkpoint`, `report`, …
    pub kind: String,
    /// What was asked for: the part of the recipe that this stage reads, seeds included.
    pub recipe: Value,
    /// The digests of the artifacts it was made from, in the order in which they were used.
    pub parents: Vec<Digest>,
    /// The versions of what made it, by name: `updraft` → `0.1.0`.
    pub versions: BTreeMap<String, String>,
}

impl Origin {
    /// The digest of the origin: of its fields, the recipe with the keys of every table in alphabetical order, so that
    /// the order of lines in a recipe does not matter.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::new();
        hasher.field(self.kind.as_bytes());
        hasher.field(canonical(&self.recipe).to_string().as_bytes());
        hasher.field(&self.parents.iter().flat_map(|p| *p.as_bytes()).collect::<Vec<u8>>());
        for (name, version) in &self.versions {
            hasher.field(name.as_bytes());
            hasher.field(version.as_bytes());
        }
        hasher.finish()
    }
}

/// The same value with the keys of every object sorted.
fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let sorted: BTreeMap<&String, Value> = fields.iter().map(|(k, v)| (k, canonical(v))).collect();
            Value::Object(sorted.into_iter().map(|(k, v)| (k.clone(), v)).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(canonical).collect()),
        _ => value.clone(),
    }
}
