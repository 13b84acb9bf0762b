//! Checkpoints: all that a run needs to go on as if it had never stopped.
//!
//! A checkpoint is one artifact of the store in the safetensors layout: the state tensors under the names of the
//! training step's state inputs, and a JSON record of everything else under the metadata key `updraft`. Its bytes are
//! a function of the run and the step, so two runs that agree have equal digests; times are facts beside it
//! ([`Artifact::meta`](updraft_store::Artifact)).
//!
//! A run is named by the digest of what determines it (recipe, data, network, versions), so a changed recipe never
//! resumes from another's checkpoints. `checkpoints/<run>/latest` points to the newest; it moves once the content is
//! in the store, and old checkpoints go once it has moved.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use updraft_base::Digest;
use updraft_data::LoaderToken;
use updraft_graph::{DType, Tensor};
use updraft_store::{Origin, Store};

use crate::error::TrainError;
use crate::history::History;

/// The version of the record. Another version is refused, not guessed at.
const FORMAT: u64 = 2;

/// The kind of checkpoint artifacts.
pub const CHECKPOINT_KIND: &str = "checkpoint";

/// Everything about a run at some step but its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Steps done.
    pub step: u64,
    /// The seed of the run.
    pub seed: u64,
    /// Where the data stands.
    pub data: LoaderToken,
    /// The course so far.
    pub history: History,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub evaluations_since_best: u64,
}

/// The best evaluation of a run so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps that were done.
    pub step: u64,
    /// The metric that evaluations are compared by.
    pub value: f64,
}

/// A run at some step.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Everything but the tensors.
    pub record: Record,
    /// State tensors by the names of the training step's state inputs.
    pub state: BTreeMap<String, Tensor>,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    format: u64,
    run: Digest,
    record: T,
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u64,
}

impl Checkpoint {
    /// The bytes of a checkpoint of a run.
    ///
    /// # Errors
    /// The name of a state tensor whose element type the layout does not have.
    pub fn encode(&self, run: &Digest) -> Result<Vec<u8>, String> {
        let header = serde_json::to_string(&Versioned { format: FORMAT, run: *run, record: &self.record })
            .map_err(|e| e.to_string())?;
        let mut tensors = Vec::with_capacity(self.state.len());
        for (name, tensor) in &self.state {
            let dtype = layout_dtype(tensor.dtype())
                .ok_or_else(|| format!("state {name:?} is of {}, which checkpoints do not hold", tensor.dtype()))?;
            tensors.push((name, Stored { dtype, tensor }));
        }
        safetensors::serialize(tensors, Some(HashMap::from([("updraft".to_owned(), header)])))
            .map_err(|e| e.to_string())
    }

    /// The checkpoint in `bytes`, which must be of this run.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8], run: &Digest) -> Result<Checkpoint, String> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let header = metadata.metadata().as_ref().and_then(|m| m.get("updraft")).ok_or("it has no record")?;
        let malformed = |e: serde_json::Error| format!("its record is malformed: {e}");
        let FormatOnly { format } = serde_json::from_str(header).map_err(malformed)?;
        if format != FORMAT {
            return Err(format!("it has format {format}; this version reads format {FORMAT}"));
        }
        let header: Versioned<Record> = serde_json::from_str(header).map_err(malformed)?;
        if header.run != *run {
            return Err(format!("it belongs to run {}", header.run.short()));
        }
        let mut state = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?.iter() {
            let dtype = DTYPES.iter().find(|(_, layout)| *layout == view.dtype()).map(|(dtype, _)| *dtype);
            let dtype = dtype.ok_or_else(|| format!("state {name:?} has element type {:?}", view.dtype()))?;
            let tensor = Tensor::from_bytes(dtype, view.shape(), view.data()).map_err(|e| format!("{name:?}: {e}"))?;
            state.insert(name.to_owned(), tensor);
        }
        Ok(Checkpoint { record: header.record, state })
    }
}

const DTYPES: [(DType, Dtype); 13] = [
    (DType::F32, Dtype::F32),
    (DType::F64, Dtype::F64),
    (DType::F16, Dtype::F16),
    (DType::BF16, Dtype::BF16),
    (DType::I8, Dtype::I8),
    (DType::I16, Dtype::I16),
    (DType::I32, Dtype::I32),
    (DType::I64, Dtype::I64),
    (DType::U8, Dtype::U8),
    (DType::U16, Dtype::U16),
    (DType::U32, Dtype::U32),
    (DType::U64, Dtype::U64),
    (DType::Bool, Dtype::BOOL),
];

fn layout_dtype(dtype: DType) -> Option<Dtype> {
    DTYPES.iter().find(|(ours, _)| *ours == dtype).map(|(_, layout)| *layout)
}

struct Stored<'a> {
    dtype: Dtype,
    tensor: &'a Tensor,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.tensor.bytes().into()
    }

    fn data_len(&self) -> usize {
        self.tensor.byte_len()
    }
}

/// The checkpoints of one run in a store.
pub struct Checkpoints<'a> {
    store: &'a Store,
    run: &'a Origin,
    run_digest: Digest,
    keep_last: usize,
    /// Step and digest of those in the store, oldest first.
    kept: Vec<(u64, Digest)>,
}

/// A checkpoint found in the store.
pub struct Found {
    /// What it holds.
    pub checkpoint: Checkpoint,
    /// Its digest.
    pub digest: Digest,
    /// Time that the run had taken.
    pub elapsed_ns: u64,
    /// Newer ones that could not be read, and why.
    pub unreadable: Vec<(Digest, String)>,
}

impl<'a> Checkpoints<'a> {
    /// The checkpoints of the run with this origin. At least one is kept, and the best besides.
    pub fn open(store: &'a Store, run: &'a Origin, keep_last: usize) -> Result<Checkpoints<'a>, TrainError> {
        let run_digest = run.digest();
        let run_name = Value::String(run_digest.to_string());
        let mut kept: Vec<(u64, Digest)> = store
            .list()?
            .into_iter()
            .filter(|a| a.origin.kind == CHECKPOINT_KIND && a.origin.recipe.get("run") == Some(&run_name))
            .filter_map(|a| Some((a.origin.recipe.get("step")?.as_u64()?, a.digest)))
            .collect();
        kept.sort_unstable();
        Ok(Checkpoints { store, run, run_digest, keep_last: keep_last.max(1), kept })
    }

    /// The newest checkpoint that can be read: all give the same bits in the end.
    pub fn latest(&self) -> Result<Option<Found>, TrainError> {
        let mut candidates: Vec<Digest> = self.kept.iter().rev().map(|(_, digest)| *digest).collect();
        if let Some(pointed) = self.store.pointer(&self.pointer_name("latest"))? {
            candidates.retain(|d| *d != pointed);
            candidates.insert(0, pointed);
        }
        let mut unreadable = Vec::new();
        for digest in candidates {
            match self.read(&digest) {
                Ok(checkpoint) => {
                    let elapsed_ns = self.elapsed_ns(&digest)?;
                    return Ok(Some(Found { checkpoint, digest, elapsed_ns, unreadable }));
                }
                Err(reason) => unreadable.push((digest, reason)),
            }
        }
        Ok(None)
    }

    /// The checkpoint of a step that was kept.
    pub fn at_step(&self, step: u64) -> Result<(Digest, Checkpoint), TrainError> {
        let digest = self.kept.iter().rev().find(|(s, _)| *s == step).map(|(_, d)| *d);
        let digest = digest.ok_or(TrainError::NoCheckpoint { step })?;
        let checkpoint = self.read(&digest).map_err(|reason| TrainError::Checkpoint { digest, reason })?;
        Ok((digest, checkpoint))
    }

    /// Keeps a checkpoint, moves the pointer to it, and lets go of those that are neither among the last nor the best.
    pub fn save(&mut self, checkpoint: &Checkpoint, elapsed_ns: u64) -> Result<Digest, TrainError> {
        let step = checkpoint.record.step;
        let bytes = checkpoint.encode(&self.run_digest).map_err(|reason| TrainError::State { step, reason })?;
        let origin = Origin {
            kind: CHECKPOINT_KIND.to_owned(),
            recipe: json!({ "run": self.run_digest, "step": step }),
            parents: self.run.parents.clone(),
            versions: self.run.versions.clone(),
        };
        let meta = Map::from_iter([("elapsed_ns".to_owned(), elapsed_ns.into())]);
        let digest = self.store.put(&origin, bytes, meta)?.digest;
        self.store.set_pointer(&self.pointer_name("latest"), &digest)?;
        self.kept.retain(|kept| *kept != (step, digest));
        self.kept.push((step, digest));
        let best_step = checkpoint.record.best.map(|b| b.step);
        let last_from = self.kept.len().saturating_sub(self.keep_last);
        let mut kept = Vec::with_capacity(self.keep_last + 1);
        for (i, (step, digest)) in std::mem::take(&mut self.kept).into_iter().enumerate() {
            if i >= last_from || Some(step) == best_step {
                kept.push((step, digest));
            } else {
                self.store.remove(&digest)?;
            }
        }
        self.kept = kept;
        Ok(digest)
    }

    /// The newest checkpoint's digest, if there is one.
    pub fn newest(&self) -> Option<Digest> {
        self.kept.last().map(|(_, digest)| *digest)
    }

    fn read(&self, digest: &Digest) -> Result<Checkpoint, String> {
        let bytes = self.store.get(digest).map_err(|e| e.to_string())?;
        Checkpoint::decode(&bytes, &self.run_digest)
    }

    fn elapsed_ns(&self, digest: &Digest) -> Result<u64, TrainError> {
        let artifacts = self.store.artifacts_of(digest)?;
        let elapsed_ns = artifacts.iter().find_map(|a| a.meta.get("elapsed_ns")?.as_u64());
        elapsed_ns.ok_or_else(|| TrainError::Checkpoint { digest: *digest, reason: "its manifest has no time".into() })
    }

    fn pointer_name(&self, which: &str) -> String {
        format!("checkpoints/{}/{which}", self.run_digest.hex())
    }
}
