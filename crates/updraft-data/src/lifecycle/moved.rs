//! Where objects were moved. Listings do not say in which tier an object is, so whoever moves one writes it down beside them;
//! else the next plan would move it once more, and pay for its shortest time of storage.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use updraft_store::{Created, ObjectFacts, Objects, ReadObjects};

use crate::error::DataError;

/// What was moved, as JSON. Readers of data pass over it.
pub(super) const MOVED: &str = "_lifecycle/tiers.json";

/// How often the list is written again when others write it, too.
const ATTEMPTS: u32 = 8;

/// An object as it was when it had been moved.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Moved {
    tier: String,
    etag: Option<String>,
    /// Some listings tell thousandths of a second, and no answer about one object does.
    modified_s: u64,
}

fn read(objects: &Objects) -> Result<BTreeMap<String, Moved>, DataError> {
    let refuse =
        |error| DataError::file(ReadObjects::name(objects, MOVED).as_ref(), format!("is no list of tiers: {error}"));
    serde_json::from_slice(&objects.get(MOVED)?).map_err(refuse)
}

/// The tiers of those among `listed` that were moved and have not been written since.
///
/// # Errors
/// A list that cannot be read.
pub fn moved_tiers(objects: &Objects, listed: &[ObjectFacts]) -> Result<BTreeMap<String, String>, DataError> {
    if listed.iter().all(|object| object.key != MOVED) {
        return Ok(BTreeMap::new());
    }
    let mut moved = read(objects)?;
    let stands = |object: &ObjectFacts| {
        let moved = moved.remove(&object.key)?;
        let is_same = moved.etag == object.etag && moved.modified_s == object.modified_ms / 1000;
        is_same.then(|| (object.key.clone(), moved.tier))
    };
    Ok(listed.iter().filter_map(stands).collect())
}

/// Writes down what was moved: the objects as they are now, each with its tier.
///
/// # Errors
/// A list that cannot be read, or that others write all the time.
pub fn note_moved(objects: &Objects, moved: &[(ObjectFacts, String)]) -> Result<(), DataError> {
    let name = || ReadObjects::name(objects, MOVED);
    for _ in 0..ATTEMPTS {
        let before = match objects.head(MOVED) {
            Ok(before) => Some(before),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(error.into()),
        };
        let mut all = if before.is_some() { read(objects)? } else { BTreeMap::new() };
        for (object, tier) in moved {
            let noted = Moved { tier: tier.clone(), etag: object.etag.clone(), modified_s: object.modified_ms / 1000 };
            all.insert(object.key.clone(), noted);
        }
        let text = serde_json::to_vec_pretty(&all).map_err(|e| DataError::Loader(format!("{}: {e}", name())))?;
        let is_written = match &before {
            Some(before) => objects.update(MOVED, text.into(), before)?,
            None => objects.create(MOVED, text.into())? == Created::New,
        };
        if is_written {
            return Ok(());
        }
    }
    let reason = format!("was written by others {ATTEMPTS} times; what was moved is not in it");
    Err(DataError::file(name().as_ref(), reason))
}
