//! The workbench of a search: makes candidates, measures them, and keeps every answer in the store.
//!
//! Each answer is an artifact under what determined it: a model under its candidate and calibration data, scores under
//! model and samples, times under model and machine. None depends on the limit, so a search that was killed goes on where
//! it was, and one with another limit starts from what is known. Times are not repeatable; being kept, they are the same
//! for every later decision.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use updraft_base::{Clock, Digest};
use updraft_data::{Batch, Loader};
use updraft_engine::Engine;
use updraft_graph::Model;
use updraft_passes::training::TrainingOptions;
use updraft_store::{Artifact, Origin, Store};
use updraft_train::TrainError;
use updraft_train::evaluate::first_rows;

use crate::arithmetic::Arithmetic;
use crate::candidate::{Candidate, StaticForm};
use crate::error::CompressError;
use crate::forms::Grounds;
use crate::latency::{LatencySettings, Rounds, in_turns};
use crate::measure::{Answers, Compiled, Metric, Output, Scores, Task};
use crate::search::{Decision, Judgement, Made, Speed, Trouble, UnitSensitivity, Workbench};
use crate::splits::{Part, Splits};

mod distance;
mod models;
mod scores;

use distance::SENSITIVITY_SAMPLES;
use models::Current;

/// What a bench works with.
pub struct Tools<'a> {
    /// What runs models.
    pub engine: &'a dyn Engine,
    /// What keeps answers.
    pub store: &'a Store,
    /// Time.
    pub clock: &'a dyn Clock,
    /// The model to be improved on.
    pub original: &'a Model,
    /// Its artifact in the store.
    pub original_digest: Digest,
    /// What it is for.
    pub task: &'a Task,
    /// How it is trained further: loss, optimizer.
    pub training: &'a TrainingOptions,
    /// What it is trained further with.
    pub train_loader: &'a Loader,
    /// The data.
    pub splits: &'a Splits,
    /// Hears how it goes.
    pub note: &'a mut dyn FnMut(&str),
}

/// How a bench measures.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchSettings {
    /// What a drop is a drop of.
    pub metric: Metric,
    /// The chance that a statement about a drop is wrong.
    pub alpha: f64,
    /// What everything random is drawn from.
    pub seed: u64,
    /// How latency is measured.
    pub latency: LatencySettings,
    /// Samples that are answered at once where the cost is measured.
    pub cost_batch: usize,
    /// Samples that candidates' outputs are compared with the original's on.
    pub divergence_samples: u64,
    /// The learning rate of recovery from pruning, at its highest.
    pub recovery_rate: f64,
    /// What the machine is, so far as it determines times: instruction set, threads.
    pub machine: String,
    /// The arithmetic of the target.
    pub arithmetic: Arithmetic,
    /// When the time is over, by the clock.
    pub deadline_ns: u64,
}

/// The bench. See [`Workbench`].
pub struct Bench<'a> {
    tools: Tools<'a>,
    settings: BenchSettings,
    /// The original, compiled: every candidate is timed beside it.
    original: Option<Compiled>,
    /// The candidate that was made last.
    current: Option<Current>,
    /// Outputs of the original on the samples of the divergence, in batches.
    reference: Vec<(Batch, Output)>,
    scores: BTreeMap<(Digest, Part), Scores>,
    grounds: Grounds,
    /// When the time is over for what is going on: the search, then the holdout.
    deadline_ns: u64,
    start_ns: u64,
}

impl<'a> Bench<'a> {
    /// A bench with nothing on it.
    pub fn new(tools: Tools<'a>, settings: BenchSettings) -> Bench<'a> {
        Bench {
            deadline_ns: settings.deadline_ns,
            start_ns: tools.clock.monotonic_ns(),
            tools,
            settings,
            original: None,
            current: None,
            reference: Vec::new(),
            scores: BTreeMap::new(),
            grounds: Grounds::new(),
        }
    }

    /// The artifact of a candidate's model.
    pub fn artifact(&mut self, candidate: &Candidate) -> Result<Artifact, CompressError> {
        self.hold(candidate)?;
        Ok(self.held()?.artifact.clone())
    }

    fn check_time(&self) -> Result<(), CompressError> {
        if self.tools.clock.monotonic_ns() < self.deadline_ns { Ok(()) } else { Err(CompressError::TimeLimit) }
    }

    fn origin(&self, kind: &str, recipe: Value, parents: Vec<Digest>) -> Origin {
        let versions = [("updraft".to_owned(), env!("CARGO_PKG_VERSION").to_owned())].into();
        Origin { kind: kind.to_owned(), recipe, parents, versions }
    }

    /// What the store has for this origin, or what `make` makes.
    fn kept<T: Serialize + DeserializeOwned>(
        &mut self,
        origin: &Origin,
        make: impl FnOnce(&mut Self) -> Result<T, CompressError>,
    ) -> Result<T, CompressError> {
        let malformed = |e: serde_json::Error| CompressError::Setting {
            setting: "the store",
            problem: format!("has a malformed {}: {e}", origin.kind),
        };
        if let Some(artifact) = self.tools.store.find(origin)? {
            return serde_json::from_slice(&self.tools.store.get(&artifact.digest)?).map_err(malformed);
        }
        let made = make(self)?;
        self.tools.store.put(origin, serde_json::to_vec(&made).map_err(malformed)?, Map::new())?;
        Ok(made)
    }

    fn time(&mut self, batch_size: usize) -> Result<Option<Rounds>, CompressError> {
        let current = self.held()?;
        let (candidate, digest) = (current.candidate.clone(), current.artifact.digest);
        let Some(batch) = self.timed_batch(batch_size)? else { return Ok(None) };
        let recipe = json!({
            "latency": self.settings.latency, "batch": batch_size, "machine": self.settings.machine,
            "engine": self.tools.engine.name(),
        });
        let origin = self.origin("latency", recipe, vec![self.tools.original_digest, digest]);
        let rounds = self.kept(&origin, |bench| {
            bench.hold(&candidate)?;
            let task = bench.tools.task;
            if bench.original.is_none() {
                bench.original = Some(Compiled::new(bench.tools.engine, &bench.tools.original.graph, task)?);
            }
            let mut own = Compiled::new(bench.tools.engine, &bench.held()?.graph, task)?;
            let mut original = bench.original.take().ok_or(CompressError::TimeLimit)?;
            let rounds = in_turns(
                bench.tools.clock,
                &bench.settings.latency,
                &mut || bench.check_time().and_then(|()| original.answer(&batch).map(drop)),
                &mut || bench.check_time().and_then(|()| own.answer(&batch).map(drop)),
            );
            bench.original = Some(original);
            rounds
        })?;
        Ok(Some(rounds))
    }

    /// The first samples of the search split as a batch of this size; `None` where the model takes no such batch or the
    /// split is smaller.
    fn timed_batch(&self, size: usize) -> Result<Option<Batch>, CompressError> {
        let graph = &self.tools.original.graph;
        let first = |v: &updraft_graph::ValueId| graph.shape(*v).and_then(|s| s.first()).and_then(|d| d.known());
        if graph.inputs().iter().filter_map(first).any(|known| known != size) {
            return Ok(None);
        }
        let Some(batch) = self.tools.splits.search.batches(0)?.next() else { return Ok(None) };
        let mut batch = batch?;
        if batch.samples.len() < size {
            return Ok(None);
        }
        batch.samples.truncate(size);
        for (_, tensor) in &mut batch.tensors {
            *tensor = first_rows(tensor, size)?;
        }
        Ok(Some(batch))
    }
}

impl Workbench for Bench<'_> {
    fn make(&mut self, candidate: &Candidate) -> Result<Made, Trouble> {
        let artifact = self.artifact(candidate)?;
        // The original has none: nothing was decided about it.
        let decisions: Vec<Decision> = match artifact.meta.get("decisions") {
            Some(decisions) => serde_json::from_value(decisions.clone()).map_err(|e| CompressError::Setting {
                setting: "the store",
                problem: format!("has malformed decisions of {}: {e}", artifact.digest),
            })?,
            None => Vec::new(),
        };
        Ok(Made { size_bytes: artifact.size_bytes, decisions })
    }

    fn divergence(&mut self, candidate: &Candidate) -> Result<f64, Trouble> {
        self.hold(candidate)?;
        let recipe = json!({
            "data": self.tools.splits.search.key(), "samples": self.settings.divergence_samples,
            "task": format!("{:?}", self.tools.task), "arithmetic": self.settings.arithmetic,
        });
        let parents = vec![self.tools.original_digest, self.held()?.artifact.digest];
        let origin = self.origin("divergence", recipe, parents);
        Ok(self.kept(&origin, |bench| {
            let samples = bench.settings.divergence_samples;
            bench.distance(&mut |bench, batch| bench.answer(batch), samples)
        })?)
    }

    fn search_drop(&mut self, candidate: &Candidate, limit: f64) -> Result<Judgement, Trouble> {
        Ok(self.judge(candidate, Part::Search, limit, self.settings.alpha, true)?)
    }

    fn holdout_drop(&mut self, candidate: &Candidate, limit: f64, alpha: f64) -> Result<Judgement, Trouble> {
        self.deadline_ns = self.settings.deadline_ns;
        // What is shipped is measured on all there is; only what is clearly beyond the limit is not looked at further.
        Ok(self.judge(candidate, Part::Holdout, limit, alpha, false)?)
    }

    fn speed(&mut self, candidate: &Candidate) -> Result<Speed, Trouble> {
        self.hold(candidate)?;
        let alpha = self.settings.alpha;
        let fixed = {
            let graph = &self.tools.original.graph;
            graph.inputs().iter().find_map(|v| graph.shape(*v)?.first()?.known())
        };
        let single = self.time(fixed.unwrap_or(1))?.ok_or_else(|| {
            Trouble::Refused("its inputs take no batch of the search split, so its time cannot be measured".to_owned())
        })?;
        let many = match fixed {
            None => self.time(self.settings.cost_batch)?,
            Some(_) => None,
        };
        let cost = many.map(|rounds| {
            let per_sample = 1.0 / self.settings.cost_batch as f64;
            let time = rounds.candidate(alpha);
            crate::interval::Interval {
                estimate: time.estimate * per_sample,
                low: time.low * per_sample,
                high: time.high * per_sample,
            }
        });
        Ok(Speed { latency_ratio: single.ratio(alpha), latency_ns: single.candidate(alpha), cost_ns: cost })
    }

    fn sensitivity(&mut self, form: &StaticForm) -> Result<Vec<UnitSensitivity>, Trouble> {
        let form = StaticForm { float_units: Default::default(), ..form.clone() };
        let recipe = json!({
            "form": form, "data": self.tools.splits.search.key(), "samples": SENSITIVITY_SAMPLES,
            "calibration": self.tools.splits.calibration.key(), "task": format!("{:?}", self.tools.task),
        });
        let origin = self.origin("sensitivity", recipe, vec![self.tools.original_digest]);
        Ok(self.kept(&origin, |bench| crate::sensitivity::measure(bench, &form))?)
    }

    fn note(&mut self, line: &str) {
        (self.tools.note)(line);
    }
}

impl From<CompressError> for Trouble {
    fn from(error: CompressError) -> Trouble {
        match error {
            CompressError::TimeLimit => Trouble::TimeLimit,
            CompressError::Train(error) if matches!(*error, TrainError::Stopped { .. }) => Trouble::TimeLimit,
            // A model that cannot be made, run or trained is one candidate less; others are made in other ways.
            CompressError::Pass(_)
            | CompressError::Pipeline(_)
            | CompressError::Engine(_)
            | CompressError::Train(_)
            | CompressError::NotFinite { .. }
            | CompressError::LeftOut { .. }
            | CompressError::Shape { .. } => Trouble::Refused(error.to_string()),
            error => Trouble::Fatal(Box::new(error)),
        }
    }
}
