//! Models on the bench: made once for a candidate, then taken from the store.

use serde_json::{Map, json};
use updraft_data::Batch;
use updraft_graph::onnx::{self, ReadOptions, WriteOptions};
use updraft_graph::{Graph, Model, infer};
use updraft_passes::training::TrainingOptions;
use updraft_store::Artifact;

use super::Bench;
use crate::arithmetic::{Arithmetic, Emulated};
use crate::candidate::{Candidate, Form};
use crate::error::CompressError;
use crate::forms::{self, Material};
use crate::forms::{AWARE_CLIP_NORM, AWARE_RATE_SHARE};
use crate::measure::{Answers, Compiled, Output};

/// A candidate's model.
pub(super) struct Current {
    pub(super) candidate: Candidate,
    pub(super) artifact: Artifact,
    pub(super) graph: Graph,
    answers: Option<Box<dyn Answers>>,
}

impl Bench<'_> {
    /// What candidates are made with.
    pub(super) fn material(&mut self) -> Material<'_> {
        Material {
            engine: self.tools.engine,
            store: self.tools.store,
            clock: self.tools.clock,
            original: &self.tools.original.graph,
            calibration: &self.tools.splits.calibration,
            training: self.tools.training,
            train_loader: self.tools.train_loader,
            recovery_rate: self.settings.recovery_rate,
            seed: self.settings.seed,
            deadline_ns: self.deadline_ns,
            grounds: &mut self.grounds,
        }
    }

    /// Puts a candidate's model on the bench.
    pub(super) fn hold(&mut self, candidate: &Candidate) -> Result<(), CompressError> {
        if self.current.as_ref().is_some_and(|c| c.candidate == *candidate) {
            return Ok(());
        }
        self.current = None;
        let (artifact, graph) = self.model_of(candidate)?;
        self.current = Some(Current { candidate: candidate.clone(), artifact, graph, answers: None });
        Ok(())
    }

    pub(super) fn held(&self) -> Result<&Current, CompressError> {
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
        let is_form = candidate.form != Form::Float;
        let base = match (&candidate.pruning, is_form) {
            (Some(pruning), true) => Candidate { pruning: Some(pruning.clone()), form: Default::default() },
            _ => Candidate::default(),
        };
        let mut recipe = json!({
            "candidate": candidate,
            "calibration": self.tools.splits.calibration.key(),
            "seed": self.settings.seed,
        });
        let is_trained_here = match is_form {
            true => candidate.static_form().is_some_and(|form| form.aware_steps > 0),
            false => candidate.pruning.is_some(),
        };
        if is_trained_here {
            recipe["training"] = json!({
                "options": format!("{:?}", TrainingOptions { distillation: None, ..self.tools.training.clone() }),
                "data": self.tools.train_loader.place(0),
                "learning_rate": self.settings.recovery_rate,
            });
            if is_form {
                recipe["rounding_in_training"] = json!([AWARE_RATE_SHARE, AWARE_CLIP_NORM]);
            }
        }
        let (base_artifact, base_graph) = self.model_of(&base)?;
        let origin = self.origin("candidate", recipe, vec![base_artifact.digest]);
        if let Some(artifact) = self.tools.store.find(&origin)? {
            let graph = decode(&self.tools.store.get(&artifact.digest)?)?;
            return Ok((artifact, graph));
        }
        self.check_time()?;
        let (graph, decisions) = forms::make(&mut self.material(), &base_graph, base_artifact.digest, candidate)?;
        let bytes = encode(&Model { graph, ..self.tools.original.clone() })?;
        let meta = Map::from_iter([("decisions".to_owned(), json!(decisions))]);
        // Read back, so that a model from the store and one just made are the same to the last bit.
        let graph = decode(&bytes)?;
        let artifact = self.tools.store.put(&origin, bytes, meta)?;
        Ok((artifact, graph))
    }

    /// What answers for the model on the bench.
    pub(super) fn answer(&mut self, batch: &Batch) -> Result<Output, CompressError> {
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
