//! The stages of a recipe: data, network, training, evaluation, optimization, export.
//!
//! Each stage answers an [`Origin`]: its part of the recipe, the digests of what it is made from, and our version. What
//! the store has answered already is reused and said so, so a changed recipe redoes what the change reaches and no
//! more. The report is made of what these stages leave behind ([`crate::report`]).

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use updraft_base::{Digest, units};
use updraft_data::{Dataset, DatasetConfig, DatasetFacts, Loader, LoaderOptions};
use updraft_engine::CpuEngine;
use updraft_graph::{Graph, Model, zoo};
use updraft_passes::distill::Distillation;
use updraft_passes::training::{self, TrainingOptions};
use updraft_store::{Artifact, Origin, Store};
use updraft_train::checkpoint::Record;
use updraft_train::metrics::Metrics;
use updraft_train::waits::Waits;
use updraft_train::{Evaluator, Run, Trained, train};

use crate::context::Context;
use crate::failure::{Failure, Kind};
use crate::model;
use crate::progress::TrainingProgress;
use crate::recipe::{self, Loaded, Weights};

pub(crate) mod optimize;

use optimize::Optimized;

/// Where stages keep what they make, and how each went.
pub(crate) struct Stages<'a> {
    pub(crate) context: &'a Context<'a>,
    pub(crate) loaded: Loaded,
    pub(crate) store: Store,
    pub(crate) seed: u64,
    done: RefCell<Vec<Done>>,
}

/// How a stage went.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Done {
    pub(crate) stage: String,
    pub(crate) digest: Digest,
    /// Whether the store had the answer.
    pub(crate) reused: bool,
    pub(crate) elapsed_ns: u64,
}

/// A dataset that is open.
pub(crate) struct Data {
    pub(crate) dataset: Arc<Dataset>,
    pub(crate) digest: Digest,
}

/// A network or a model.
pub(crate) struct Network {
    pub(crate) model: Model,
    pub(crate) digest: Digest,
    pub(crate) size_bytes: u64,
}

/// A teacher, and what is learnt from it.
pub(crate) struct Teaching {
    /// The teacher's digest: a parent of what it teaches.
    pub(crate) teacher: Digest,
    pub(crate) distillation: Distillation,
    /// The settings, as part of what determines the result.
    pub(crate) recipe: Value,
}

/// What training gave.
pub(crate) struct TrainedModel {
    pub(crate) network: Network,
    pub(crate) history: TrainingHistory,
    pub(crate) history_digest: Digest,
}

/// The course of a training, as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TrainingHistory {
    /// Curves, steps, and the best evaluation.
    pub(crate) record: Record,
    /// Steps that were asked for.
    pub(crate) steps: u64,
    /// Samples of a step.
    pub(crate) batch: usize,
    /// Time from the first step to the last, validation and checkpoints included, over all parts of the run.
    #[serde(skip)]
    pub(crate) elapsed_ns: u64,
    /// What it waited for, in the last part of the run; older histories do not tell.
    #[serde(skip)]
    pub(crate) waits: Option<Waits>,
}

/// The model in its final form, and its evaluation where there is test data.
pub(crate) struct Results {
    pub(crate) data: Vec<(&'static str, Data)>,
    pub(crate) network: Network,
    pub(crate) trained: TrainedModel,
    pub(crate) evaluation: Option<(Metrics, Digest)>,
    pub(crate) optimized: Option<Optimized>,
    /// What was trained. The same recipe, data and seed give the same bits.
    pub(crate) export: Network,
    /// What the search chose, which also depends on measured times.
    pub(crate) optimized_export: Option<Network>,
}

impl<'a> Stages<'a> {
    /// Reads the recipe and opens the store.
    pub(crate) fn open(context: &'a Context<'a>, recipe: &Path) -> Result<Stages<'a>, Failure> {
        let loaded = recipe::load(recipe)?;
        let seed = context.seed.unwrap_or(loaded.recipe.train.seed);
        Ok(Stages { context, loaded, store: context.store()?, seed, done: RefCell::default() })
    }

    /// All stages, each before those that need it.
    pub(crate) fn run(&self) -> Result<Results, Failure> {
        let sections = &self.loaded.recipe.data;
        let train = self.data("train", &sections.train)?;
        let validation = sections.validation.as_ref().map(|c| self.data("validation", c)).transpose()?;
        // Opened before training, so that a mistake in it does not show an hour later.
        let test = sections.test.as_ref().map(|c| self.data("test", c)).transpose()?;
        let network = self.network()?;
        let trained = self.train(&network, &train, validation.as_ref())?;
        let evaluation = test.as_ref().map(|test| self.evaluate("test", &trained.network, test)).transpose()?;
        let data = [("train", Some(train)), ("validation", validation), ("test", test)];
        let data: Vec<_> = data.into_iter().filter_map(|(split, data)| Some((split, data?))).collect();
        let section = self.loaded.recipe.optimize.as_ref();
        let optimized = section.map(|section| self.optimize(section, &trained.network, &data)).transpose()?;
        let facts = data.first().map(|(_, train)| train);
        let export = self.export("export", &trained.network, facts)?;
        let optimized_export =
            optimized.as_ref().map(|o| self.export("export.optimized", &o.network, facts)).transpose()?;
        Ok(Results { data, network, trained, evaluation, optimized, export, optimized_export })
    }

    /// How the stages went, in order.
    pub(crate) fn done(&self) -> Vec<Done> {
        self.done.borrow().clone()
    }

    /// Opens a dataset; what is kept of it is a description that names its content.
    pub(crate) fn data(&self, split: &str, config: &DatasetConfig) -> Result<Data, Failure> {
        let dataset = Dataset::open_with(config, &self.loaded.folder, &self.context.access())?;
        let facts = dataset.facts();
        let origin = self.origin("dataset", json!({ "content": facts.digest, "pipeline": facts.pipeline }), Vec::new());
        let (artifact, _) = self.answer(&format!("data.{split}"), origin, || {
            let text = serde_json::to_vec_pretty(facts).map_err(|e| Failure::of(Kind::Storage, &e))?;
            Ok((text, Map::new()))
        })?;
        Ok(Data { dataset: Arc::new(dataset), digest: artifact.digest })
    }

    /// The network before training.
    pub(crate) fn network(&self) -> Result<Network, Failure> {
        let section = &self.loaded.recipe.model;
        if let Some(file) = &section.onnx {
            return self.import(&self.loaded.folder.join(file));
        }
        let name = section.zoo.as_deref().unwrap_or_default();
        let entry = model::zoo_entry(name).map_err(|problem| self.wrong("model.zoo", problem))?;
        let given = section.settings();
        zoo::Options::of(entry, &given).map_err(|e| self.wrong("model.options", format!("are wrong: {e}")))?;
        self.of_zoo(entry, &given)
    }

    /// A network of the zoo, with weights drawn from the seed.
    pub(crate) fn of_zoo(&self, entry: &zoo::Entry, given: &[(String, zoo::Setting)]) -> Result<Network, Failure> {
        let options = zoo::Options::of(entry, given)?;
        let options: Map<String, Value> =
            options.iter().map(|(name, setting)| (name.to_owned(), setting.to_string().into())).collect();
        let recipe = json!({ "zoo": entry.name, "options": options, "seed": self.seed });
        let (artifact, bytes) = self.answer("network", self.origin("network", recipe, Vec::new()), || {
            let graph = model::build(entry, given, self.seed)?;
            Ok((model::encode(&Model::new(graph))?, Map::new()))
        })?;
        decode(&artifact, &bytes)
    }

    /// A model from a file.
    pub(crate) fn import(&self, path: &Path) -> Result<Network, Failure> {
        let loaded = model::load(path)?;
        // Written anew, so that data in other files is part of what the digest names.
        let bytes = model::encode(&loaded.model)?;
        let origin = self.origin("network", json!({ "onnx": Digest::of(&bytes) }), Vec::new());
        let (artifact, bytes) = self.answer("network", origin, || Ok((bytes, Map::new())))?;
        decode(&artifact, &bytes)
    }

    /// The trained model.
    pub(crate) fn train(
        &self,
        network: &Network,
        data: &Data,
        validation: Option<&Data>,
    ) -> Result<TrainedModel, Failure> {
        self.train_with(network, data, validation, None)
    }

    /// The model trained with a teacher, or alone.
    pub(crate) fn train_with(
        &self,
        network: &Network,
        data: &Data,
        validation: Option<&Data>,
        teaching: Option<&Teaching>,
    ) -> Result<TrainedModel, Failure> {
        let section = &self.loaded.recipe.train;
        let mut recipe = serde_json::to_value(section).map_err(|e| Failure::of(Kind::Usage, &e))?;
        recipe["seed"] = self.seed.into();
        // What decides the order of samples is no part of the dataset's content; older recipes have none of it.
        let data_section = &self.loaded.recipe.data.train;
        if let Some(recipe) = recipe.as_object_mut() {
            recipe.extend(order_of(data_section));
        }
        let mut parents = vec![network.digest, data.digest];
        parents.extend(validation.map(|v| v.digest));
        if let Some(teaching) = teaching {
            recipe["distillation"] = teaching.recipe.clone();
            parents.push(teaching.teacher);
        }
        let origin = self.origin("model", recipe.clone(), parents.clone());
        let history_origin = self.origin("history", recipe, parents);
        if let (Some(model), Some(history)) = (self.store.find(&origin)?, self.store.find(&history_origin)?) {
            self.note(Done { stage: "train".into(), digest: model.digest, reused: true, elapsed_ns: 0 });
            return self.trained(&model, &history);
        }
        let start_ns = self.context.clock.monotonic_ns();
        let graph = model::for_batches(&network.model.graph, section.batch)?;
        let threads = self.loader_threads();
        let clock = Some(self.context.clock.clone());
        let loader = Loader::timed(data.dataset.clone(), section.loader_options(self.seed, threads), clock)?;
        let validation = validation
            .map(|v| self.evaluation_loader(v, section.validate.batch.unwrap_or(section.batch)))
            .transpose()?;
        let settings = section.settings(loader.steps_per_epoch(), self.seed);
        let mut options = section.training_options();
        options.distillation = teaching.map(|t| t.distillation.clone());
        let mut observer = TrainingProgress::new(self.context.progress, settings.steps);
        let trained = train(
            &mut Run {
                model: &graph,
                options: &options,
                engine: &CpuEngine::new(self.context.threads)?,
                loader: &loader,
                validation: validation.as_ref(),
                store: &self.store,
                origin: &origin,
                clock: &*self.context.clock,
                observer: &mut observer,
            },
            &settings,
        )?;
        let waits = observer.finish();
        let Trained { last, best, record, elapsed_ns } = trained;
        let state = match section.weights {
            Weights::Best => best,
            Weights::Last => last,
        };
        let graph = training::export(&graph, state).map_err(|e| Failure::of(Kind::Unsupported, &e))?;
        let bytes = model::encode(&Model { graph, ..network.model.clone() })?;
        let mut meta = Map::from_iter([("elapsed_ns".to_owned(), elapsed_ns.into())]);
        meta.extend(waits.as_ref().map(|waits| ("waits".to_owned(), json!(waits))));
        let history = TrainingHistory { record, steps: settings.steps, batch: section.batch, elapsed_ns, waits };
        let history = serde_json::to_vec_pretty(&history).map_err(|e| Failure::of(Kind::Storage, &e))?;
        // The model last: it is what says that the stage is done.
        let history = self.store.put(&history_origin, history, meta)?;
        let artifact = self.store.put(&origin, bytes, Map::new())?;
        let elapsed_ns = self.context.clock.monotonic_ns() - start_ns;
        self.note(Done { stage: "train".into(), digest: artifact.digest, reused: false, elapsed_ns });
        self.trained(&artifact, &history)
    }

    fn trained(&self, model: &Artifact, history: &Artifact) -> Result<TrainedModel, Failure> {
        let malformed =
            |problem: String| Failure::new(Kind::Storage, format!("the training history {} {problem}", history.digest));
        let text = self.store.get(&history.digest)?;
        let mut kept: TrainingHistory =
            serde_json::from_slice(&text).map_err(|e| malformed(format!("is malformed: {e}")))?;
        let elapsed_ns = history.meta.get("elapsed_ns").and_then(Value::as_u64);
        kept.elapsed_ns = elapsed_ns.ok_or_else(|| malformed("has no time in its manifest".into()))?;
        let waits = history.meta.get("waits").map(|waits| serde_json::from_value(waits.clone())).transpose();
        kept.waits = waits.map_err(|e| malformed(format!("has malformed waits: {e}")))?;
        let network = decode(model, &self.store.get(&model.digest)?)?;
        Ok(TrainedModel { network, history: kept, history_digest: history.digest })
    }

    /// The metrics of a model on a dataset, and the digest under which they are kept.
    pub(crate) fn evaluate(&self, split: &str, network: &Network, data: &Data) -> Result<(Metrics, Digest), Failure> {
        self.evaluate_output(split, network, data, self.loaded.recipe.train.output.as_deref())
    }

    /// The metrics of one of a model's outputs; of the first where there is no name.
    pub(crate) fn evaluate_output(
        &self,
        split: &str,
        network: &Network,
        data: &Data,
        output: Option<&str>,
    ) -> Result<(Metrics, Digest), Failure> {
        let section = &self.loaded.recipe.train;
        let options = TrainingOptions { output: output.map(str::to_owned), ..section.training_options() };
        let recipe = json!({ "loss": section.loss, "output": output, "target": section.target });
        let origin = self.origin("evaluation", recipe, vec![network.digest, data.digest]);
        let (artifact, text) = self.answer(&format!("evaluate.{split}"), origin, || {
            let loader = self.evaluation_loader(data, self.loaded.recipe.evaluate.batch)?;
            let engine = CpuEngine::new(self.context.threads)?;
            let graph = model::for_batches(&network.model.graph, self.loaded.recipe.evaluate.batch)?;
            let mut evaluator = Evaluator::new(&engine, &graph, &options)?;
            let task = self.context.progress.task("evaluate", loader.steps_per_epoch(), "batches");
            let metrics = evaluator.evaluate(&loader, |done| task.at(done, String::new))?;
            task.finish();
            let text = serde_json::to_vec_pretty(&metrics).map_err(|e| Failure::of(Kind::Storage, &e))?;
            Ok((text, Map::new()))
        })?;
        let metrics = serde_json::from_slice(&text).map_err(|e| {
            Failure::new(Kind::Storage, format!("the evaluation {} is malformed: {e}", artifact.digest))
        })?;
        Ok((metrics, artifact.digest))
    }

    /// The model with what its users need to know beside the weights.
    pub(crate) fn export(&self, stage: &str, network: &Network, data: Option<&Data>) -> Result<Network, Failure> {
        let notes = data.map(|data| notes(data.dataset.facts())).unwrap_or_default();
        let origin = self.origin("export", json!({ "metadata": notes }), vec![network.digest]);
        let (artifact, bytes) = self.answer(stage, origin, || {
            let mut model = network.model.clone();
            model.metadata.retain(|(key, _)| !notes.iter().any(|(k, _)| k == key));
            model.metadata.extend(notes.iter().cloned());
            Ok((model::encode(&model)?, Map::new()))
        })?;
        decode(&artifact, &bytes)
    }

    /// What the store has for this origin, or what `make` makes for it.
    pub(crate) fn answer(
        &self,
        stage: &str,
        origin: Origin,
        make: impl FnOnce() -> Result<(Vec<u8>, Map<String, Value>), Failure>,
    ) -> Result<(Artifact, Vec<u8>), Failure> {
        let start_ns = self.context.clock.monotonic_ns();
        let (artifact, bytes, reused) = match self.store.find(&origin)? {
            Some(artifact) => {
                let bytes = self.store.get(&artifact.digest)?.to_vec();
                (artifact, bytes, true)
            }
            None => {
                let (bytes, meta) = make()?;
                (self.store.put(&origin, bytes.clone(), meta)?, bytes, false)
            }
        };
        let elapsed_ns = self.context.clock.monotonic_ns() - start_ns;
        self.note(Done { stage: stage.to_owned(), digest: artifact.digest, reused, elapsed_ns });
        Ok((artifact, bytes))
    }

    pub(crate) fn origin(&self, kind: &str, recipe: Value, parents: Vec<Digest>) -> Origin {
        let versions = [("updraft".to_owned(), env!("CARGO_PKG_VERSION").to_owned())].into();
        Origin { kind: kind.to_owned(), recipe, parents, versions }
    }

    fn note(&self, done: Done) {
        let how = if done.reused {
            "reused, nothing it is made from has changed".to_owned()
        } else {
            units::duration_ns(done.elapsed_ns)
        };
        self.context.progress.note(&format!("{:<16} {}  {how}", done.stage, done.digest.short()));
        self.done.borrow_mut().push(done);
    }

    pub(crate) fn evaluation_loader(&self, data: &Data, batch_size: usize) -> Result<Loader, Failure> {
        let options = LoaderOptions { batch_size, threads: self.loader_threads(), ..LoaderOptions::default() };
        Ok(Loader::new(data.dataset.clone(), options)?)
    }

    /// Two keep ahead of any step; with one thread for everything, one.
    fn loader_threads(&self) -> usize {
        self.context.threads.min(2)
    }

    fn wrong(&self, key: &str, problem: String) -> Failure {
        recipe::RecipeError::value(&self.loaded.text, &self.loaded.path, key, problem).into()
    }
}

/// What a recipe's dataset says about the order of its samples.
fn order_of(data: &DatasetConfig) -> Vec<(String, Value)> {
    let mut order = Vec::new();
    order.extend(data.lanes.map(|lanes| ("lanes".to_owned(), lanes.into())));
    if !data.sources.is_empty() {
        let weights: Vec<f64> = data.sources.iter().map(|source| source.weight).collect();
        order.push(("mixture".to_owned(), json!({ "weights": weights, "later": data.weights })));
    }
    order
}

fn decode(artifact: &Artifact, bytes: &[u8]) -> Result<Network, Failure> {
    let name = format!("artifact {}", artifact.digest.short());
    let model = model::decode(bytes, Path::new(&name))?;
    Ok(Network { model, digest: artifact.digest, size_bytes: artifact.size_bytes })
}

/// What the data says about a model's inputs and outputs, as ONNX metadata.
fn notes(facts: &DatasetFacts) -> Vec<(String, String)> {
    let mut notes = Vec::new();
    if let Some(vocabulary) = &facts.vocabulary {
        let characters: String = (0..vocabulary.len() as i64).filter_map(|n| vocabulary.decode(n)).collect();
        notes.push((model::VOCABULARY_KEY.to_owned(), characters));
        if let Some(context) = facts.tensors.first().and_then(|t| t.shape.first()) {
            notes.push((model::CONTEXT_KEY.to_owned(), context.to_string()));
        }
    }
    if let Some(classes) = &facts.classes {
        notes.push((model::CLASSES_KEY.to_owned(), json!(classes).to_string()));
    }
    notes
}

/// The graph of a model with the sizes of one sample of a dataset in place of its open ones.
pub(crate) fn at_one_sample(graph: &Graph, facts: &DatasetFacts) -> Result<Graph, Failure> {
    let mut sizes = std::collections::BTreeMap::new();
    for input in graph.inputs() {
        let Some(fact) = facts.tensors.iter().find(|t| t.name == graph.value(*input).name) else { continue };
        let known = std::iter::once(1).chain(fact.shape.iter().copied());
        for (dim, size) in graph.shape(*input).unwrap_or_default().iter().zip(known) {
            if let Some(symbol) = dim.as_symbol() {
                sizes.insert(symbol.to_owned(), size);
            }
        }
    }
    updraft_graph::cost::at_sizes(graph, &sizes).map_err(|e| Failure::of(Kind::Input, &e))
}
