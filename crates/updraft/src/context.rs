//! What a verb gets besides its arguments, and what it gives back.

use std::path::PathBuf;

use serde_json::Value;
use updraft_base::clock::Clock;
use updraft_store::{Store, StoreError};

use crate::progress::Progress;

/// The world as a verb sees it.
pub struct Context<'a> {
    /// The folder of the artifact store.
    pub store_dir: PathBuf,
    /// Threads to compute with, at least 1.
    pub threads: usize,
    /// The seed given on the command line.
    pub seed: Option<u64>,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Where progress is shown.
    pub progress: &'a Progress<'a>,
}

impl Context<'_> {
    /// The artifact store, made where it does not exist.
    pub fn store(&self) -> Result<Store, StoreError> {
        Store::open(&self.store_dir)
    }
}

/// What a verb has to say.
#[derive(Debug)]
pub struct Answer {
    /// For people; ends with a line feed.
    pub text: String,
    /// For programs: one object.
    pub json: Value,
}
