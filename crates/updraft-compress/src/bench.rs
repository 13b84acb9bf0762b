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
use updraft_graph::onnx::{self, ReadOptions, WriteOptions};
use updraft_graph::{Graph, Model, infer};
use updraft_passes::loss::Loss;
use updraft_passes::training::TrainingOptions;
use updraft_store::{Artifact, Origin, Store};
use updraft_train::TrainError;
use updraft_train::evaluate::first_rows;

use crate::arithmetic::{Arithmetic, Emulated};
use crate::candidate::{Candidate, StaticForm};
use crate::error::CompressError;
use crate::forms::{self, Material};
use crate::interval::Verdict;
use crate::latency::{LatencySettings, Rounds, in_turns};
use crate::measure::{Answers, Compiled, Metric, Output, Scores, Task};
use crate::search::{Decision, Judgement, Made, Speed, Trouble, UnitSensitivity, Workbench};
use crate::splits::{Split, Splits, looks};

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

/// The search leaves time for the original and this many candidates to be scored on the holdout, at the pace of the
/// search split: the first is nearly always confirmed.
const HOLDOUT_CANDIDATES: u64 = 2;

/// Samples on which the divergence of a single unit is measured: what published rankings of sensitivity take.
const SENSITIVITY_SAMPLES: u64 = 64;

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
    scores: BTreeMap<(Digest, &'static str), Scores>,
    ranges: forms::Ranges,
    /// When the time is over for what is going on: the search, then the holdout.
    deadline_ns: u64,
    start_ns: u64,
}

struct Current {
    candidate: Candidate,
    artifact: Artifact,
    graph: Graph,
    answers: Option<Box<dyn Answers>>,
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
            ranges: BTreeMap::new(),
        }
    }

    /// The artifact of a candidate's model.
    pub fn artifact(&mut self, candidate: &Candidate) -> Result<Artifact, CompressError> {
        self.hold(candidate)?;
        Ok(self.held()?.artifact.clone())
    }

    /// How a model answers under another arithmetic, beside its answers under exact sums: the drop on the first samples
    /// of the holdout.
    pub fn drop_elsewhere(
        &mut self,
        candidate: &Candidate,
        arithmetic: Arithmetic,
        samples: u64,
    ) -> Result<Judgement, CompressError> {
        self.deadline_ns = self.settings.deadline_ns;
        self.hold(candidate)?;
        let current = self.held()?;
        let mut answers = Emulated::new(&current.graph, self.tools.task, arithmetic)?;
        let mut exact = Compiled::new(self.tools.engine, &current.graph, self.tools.task)?;
        let (mut here, mut there) = (Scores::default(), Scores::default());
        for batch in self.tools.splits.holdout.batches(0)? {
            if here.len() as u64 >= samples {
                break;
            }
            self.check_time()?;
            let batch = batch?;
            here.add(self.tools.task, &batch, &exact.answer(&batch)?)?;
            there.add(self.tools.task, &batch, &answers.answer(&batch)?)?;
        }
        Ok(self.judgement(&here, &there, self.settings.alpha))
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

    /// Puts a candidate's model on the bench.
    fn hold(&mut self, candidate: &Candidate) -> Result<(), CompressError> {
        if self.current.as_ref().is_some_and(|c| c.candidate == *candidate) {
            return Ok(());
        }
        self.current = None;
        let (artifact, graph) = self.model_of(candidate)?;
        self.current = Some(Current { candidate: candidate.clone(), artifact, graph, answers: None });
        Ok(())
    }

    fn held(&self) -> Result<&Current, CompressError> {
        self.current.as_ref().ok_or(CompressError::TimeLimit)
    }

    fn model_of(&mut self, candidate: &Candidate) -> Result<(Artifact, Graph), CompressError> {
        if *candidate == Candidate::default() {
            let artifacts = self.tools.store.artifacts_of(&self.tools.original_digest)?;
            let artifact = artifacts
                .into_iter()
                .next()
                .ok_or_else(|| updraft_store::StoreError::NotFound { what: self.tools.original_digest.to_string() })?;
            return Ok((artifact, self.tools.original.graph.clone()));
        }
        // Numbers get their form last, so a pruned model is shared by its forms.
        let is_form = candidate.form != crate::candidate::Form::Float;
        let base = match (&candidate.pruning, is_form) {
            (Some(pruning), true) => Candidate { pruning: Some(pruning.clone()), form: Default::default() },
            _ => Candidate::default(),
        };
        let mut recipe = json!({
            "candidate": candidate,
            "calibration": self.tools.splits.calibration.key(),
            "seed": self.settings.seed,
        });
        if candidate.pruning.is_some() && !is_form {
            recipe["training"] = json!({
                "options": format!("{:?}", TrainingOptions { distillation: None, ..self.tools.training.clone() }),
                "data": self.tools.train_loader.token(0),
                "learning_rate": self.settings.recovery_rate,
            });
        }
        let (base_artifact, base_graph) = self.model_of(&base)?;
        let origin = self.origin("candidate", recipe, vec![base_artifact.digest]);
        if let Some(artifact) = self.tools.store.find(&origin)? {
            let graph = decode(&self.tools.store.get(&artifact.digest)?)?;
            return Ok((artifact, graph));
        }
        self.check_time()?;
        let deadline_ns = self.deadline_ns;
        let clock = self.tools.clock;
        let mut material = Material {
            engine: self.tools.engine,
            store: self.tools.store,
            clock,
            original: &self.tools.original.graph,
            calibration: &self.tools.splits.calibration,
            training: self.tools.training,
            train_loader: self.tools.train_loader,
            recovery_rate: self.settings.recovery_rate,
            seed: self.settings.seed,
            is_over: &|| clock.monotonic_ns() >= deadline_ns,
            ranges: &mut self.ranges,
        };
        let (graph, decisions) = forms::make(&mut material, &base_graph, base_artifact.digest, candidate)?;
        let bytes = encode(&Model { graph, ..self.tools.original.clone() })?;
        let meta = Map::from_iter([("decisions".to_owned(), json!(decisions))]);
        // Read back, so that a model from the store and one just made are the same to the last bit.
        let graph = decode(&bytes)?;
        let artifact = self.tools.store.put(&origin, bytes, meta)?;
        Ok((artifact, graph))
    }

    /// What answers for the model on the bench.
    fn answer(&mut self, batch: &Batch) -> Result<Output, CompressError> {
        self.check_time()?;
        let current = self.current.as_mut().ok_or(CompressError::TimeLimit)?;
        let answers = match &mut current.answers {
            Some(answers) => answers,
            empty => {
                let made: Box<dyn Answers> = match self.settings.arithmetic {
                    Arithmetic::Exact => Box::new(Compiled::new(self.tools.engine, &current.graph, self.tools.task)?),
                    other => Box::new(Emulated::new(&current.graph, self.tools.task, other)?),
                };
                empty.insert(made)
            }
        };
        answers.answer(batch)
    }

    /// The scores of a candidate on at least the first `samples` of a split, or on all.
    fn scores(&mut self, candidate: &Candidate, split: &'static str, samples: u64) -> Result<Scores, CompressError> {
        self.hold(candidate)?;
        let digest = self.held()?.artifact.digest;
        let source: Split = match split {
            "search" => self.tools.splits.search.clone(),
            _ => self.tools.splits.holdout.clone(),
        };
        let mut scores = self.scores.remove(&(digest, split)).unwrap_or_default();
        let mut from = 0;
        for look in looks(source.len(), self.settings.alpha).iter() {
            let to = look.samples.div_ceil(source.batch_size());
            if from * source.batch_size() >= samples {
                break;
            }
            if (scores.len() as u64) < (to * source.batch_size()).min(source.len()) {
                let recipe = json!({
                    "data": source.key(), "from": from, "to": to,
                    "task": format!("{:?}", self.tools.task), "arithmetic": self.settings.arithmetic,
                });
                let origin = self.origin("scores", recipe, vec![digest]);
                let before_ns = self.tools.clock.monotonic_ns();
                let block = self.kept(&origin, |bench| {
                    let mut block = Scores::default();
                    for batch in source.batches(from)?.take((to - from) as usize) {
                        let batch = batch?;
                        let output = bench.answer(&batch)?;
                        block.add(bench.tools.task, &batch, &output)?;
                    }
                    Ok(block)
                });
                match block {
                    Ok(block) => {
                        if split == "search" {
                            self.reserve(self.tools.clock.monotonic_ns() - before_ns, block.len() as u64);
                        }
                        scores.extend(block);
                    }
                    Err(error) => {
                        self.scores.insert((digest, split), scores);
                        return Err(error);
                    }
                }
            }
            from = to;
        }
        self.scores.insert((digest, split), scores.clone());
        Ok(scores)
    }

    /// Ends the search early enough for the holdout, given how long some samples took; at most half of the time is kept
    /// free.
    fn reserve(&mut self, elapsed_ns: u64, samples: u64) {
        let per_sample_ns = elapsed_ns / samples.max(1);
        let needed_ns =
            per_sample_ns.saturating_mul(self.tools.splits.holdout.len()).saturating_mul(HOLDOUT_CANDIDATES + 1);
        let most_ns = self.settings.deadline_ns.saturating_sub(self.start_ns) / 2;
        self.deadline_ns = self.deadline_ns.min(self.settings.deadline_ns - needed_ns.min(most_ns));
    }

    /// Looks at a split until the answer is clear. Where the time ends before, what was seen of the holdout counts.
    fn judge(
        &mut self,
        candidate: &Candidate,
        split: &'static str,
        limit: f64,
        alpha: f64,
        stops_within: bool,
    ) -> Result<Judgement, CompressError> {
        let source = match split {
            "search" => &self.tools.splits.search,
            _ => &self.tools.splits.holdout,
        };
        let (len, batch_size) = (source.len(), source.batch_size());
        let mut last = None;
        for look in looks(len, alpha).iter() {
            // Whole batches: the samples that are there anyway.
            let samples = (look.samples.div_ceil(batch_size) * batch_size).min(len);
            let both = self
                .scores(&Candidate::default(), split, samples)
                .and_then(|original| Ok((original, self.scores(candidate, split, samples)?)));
            let (original, scores) = match both {
                Err(CompressError::TimeLimit) if last.is_some() && split == "holdout" => break,
                both => both?,
            };
            let samples = samples as usize;
            let judgement = self.judgement(&original.first(samples), &scores.first(samples), look.alpha);
            let verdict = Verdict::of(&judgement.drop, limit);
            last = Some(judgement);
            if verdict == Verdict::Beyond || (verdict == Verdict::Within && stops_within) {
                break;
            }
        }
        last.ok_or(CompressError::NoSearchData)
    }

    fn judgement(&self, original: &Scores, candidate: &Scores, alpha: f64) -> Judgement {
        let metric = self.settings.metric;
        Judgement {
            drop: metric.drop(original, candidate, alpha),
            samples: candidate.len() as u64,
            original: metric.value(original),
            candidate: metric.value(candidate),
        }
    }

    /// The original's outputs on the samples of the divergence.
    fn fill_reference(&mut self) -> Result<(), CompressError> {
        if !self.reference.is_empty() {
            return Ok(());
        }
        let split = self.tools.splits.search.first(self.settings.divergence_samples);
        let mut original = Compiled::new(self.tools.engine, &self.tools.original.graph, self.tools.task)?;
        for batch in split.batches(0)? {
            self.check_time()?;
            let batch = batch?;
            let output = original.answer(&batch)?;
            self.reference.push((batch, output));
        }
        Ok(())
    }

    /// How far the answers are from the original's on at least so many samples.
    fn distance(
        &mut self,
        answer: &mut dyn FnMut(&mut Self, &Batch) -> Result<Output, CompressError>,
        samples: u64,
    ) -> Result<f64, CompressError> {
        self.fill_reference()?;
        let reference = std::mem::take(&mut self.reference);
        let mut sums = (0.0, 0.0);
        let mut seen = 0;
        let mut result = Ok(());
        for (batch, own) in &reference {
            if seen >= samples {
                break;
            }
            seen += batch.samples.len() as u64;
            let terms = answer(self, batch).and_then(|other| match self.tools.task.loss {
                Loss::CrossEntropy(_) | Loss::KullbackLeibler { .. } => {
                    own.divergence_sum(&other, batch).map(|(sum, rows)| (sum, rows as f64))
                }
                Loss::MeanSquaredError => own.squares(&other, batch),
            });
            match terms {
                Ok((sum, weight)) => sums = (sums.0 + sum, sums.1 + weight),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.reference = reference;
        result?;
        Ok(sums.0 / sums.1.max(f64::MIN_POSITIVE))
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
        Ok(self.judge(candidate, "search", limit, self.settings.alpha, true)?)
    }

    fn holdout_drop(&mut self, candidate: &Candidate, limit: f64, alpha: f64) -> Result<Judgement, Trouble> {
        self.deadline_ns = self.settings.deadline_ns;
        // What is shipped is measured on all there is; only what is clearly beyond the limit is not looked at further.
        Ok(self.judge(candidate, "holdout", limit, alpha, false)?)
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

impl Bench<'_> {
    /// The original with only one unit of its prepared form quantized, for each unit: made, measured, forgotten.
    pub(crate) fn divergence_of_units(
        &mut self,
        form: &StaticForm,
        units: &[String],
        unit: &str,
    ) -> Result<f64, CompressError> {
        self.check_time()?;
        let float_units = units.iter().filter(|u| *u != unit).cloned().collect();
        let candidate = Candidate::of_form(crate::candidate::Form::Static(StaticForm { float_units, ..form.clone() }));
        let deadline_ns = self.deadline_ns;
        let clock = self.tools.clock;
        let mut material = Material {
            engine: self.tools.engine,
            store: self.tools.store,
            clock,
            original: &self.tools.original.graph,
            calibration: &self.tools.splits.calibration,
            training: self.tools.training,
            train_loader: self.tools.train_loader,
            recovery_rate: self.settings.recovery_rate,
            seed: self.settings.seed,
            is_over: &|| clock.monotonic_ns() >= deadline_ns,
            ranges: &mut self.ranges,
        };
        let graph = &self.tools.original.graph;
        let (graph, _) = forms::make(&mut material, graph, self.tools.original_digest, &candidate)?;
        let mut answers = Compiled::new(self.tools.engine, &graph, self.tools.task)?;
        self.distance(
            &mut |bench, batch| {
                bench.check_time()?;
                answers.answer(batch)
            },
            SENSITIVITY_SAMPLES,
        )
    }

    /// The original.
    pub(crate) fn original(&self) -> &Graph {
        &self.tools.original.graph
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
            | CompressError::Shape { .. } => Trouble::Refused(error.to_string()),
            error => Trouble::Fatal(Box::new(error)),
        }
    }
}

fn encode(model: &Model) -> Result<Vec<u8>, CompressError> {
    let problem = |e: onnx::OnnxError| CompressError::Setting { setting: "the model", problem: e.to_string() };
    onnx::write(model, WriteOptions::default()).map_err(problem)
}

fn decode(bytes: &[u8]) -> Result<Graph, CompressError> {
    let problem = |e: &dyn std::error::Error| CompressError::Setting { setting: "the model", problem: e.to_string() };
    let mut model = onnx::read(bytes, &ReadOptions::default()).map_err(|e| problem(&e))?;
    infer::infer(&mut model.graph).map_err(|e| problem(&e))?;
    Ok(model.graph)
}
