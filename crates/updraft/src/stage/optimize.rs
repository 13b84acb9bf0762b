//! The stage that makes a trained model smaller or faster.
//!
//! The search keeps its own answers ([`updraft_compress::bench`]), so this stage may be killed like any other; it is done
//! when the chosen model and the account of the search are in the store.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use updraft_base::Digest;
use updraft_compress::arithmetic::{Arithmetic, Target};
use updraft_compress::bench::{Bench, BenchSettings, Tools};
use updraft_compress::candidate::{Candidate, Pruning};
use updraft_compress::latency::LatencySettings;
use updraft_compress::measure::{Metric, Task};
use updraft_compress::search::{Judgement, Objective, Outcome, SearchSettings, search};
use updraft_compress::splits::{Datasets, SplitOptions, Splits};
use updraft_data::Loader;
use updraft_engine::CpuEngine;

use super::{Data, Network, Stages, decode};
use crate::failure::{Failure, Kind};
use crate::model;
use crate::recipe::OptimizeSection;

/// What a search gave.
pub(crate) struct Optimized {
    /// The chosen model.
    pub(crate) network: Network,
    /// How it was found.
    pub(crate) account: Account,
    pub(crate) account_digest: Digest,
}

/// The account of a search, as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) metric: Metric,
    pub(crate) objective: Objective,
    /// The drop that was allowed.
    pub(crate) max_drop: f64,
    /// The chance that any statement about a drop is wrong.
    pub(crate) alpha: f64,
    pub(crate) target: Option<Target>,
    /// What times were measured on.
    pub(crate) machine: String,
    /// Samples of each split.
    pub(crate) splits: SplitSizes,
    pub(crate) outcome: Outcome,
    /// What the chosen model loses where sums of pairs saturate, against itself where they do not; where it is one of
    /// integers and the time allowed to see.
    pub(crate) on_avx2: Option<Judgement>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct SplitSizes {
    pub(crate) calibration: u64,
    pub(crate) search: u64,
    pub(crate) holdout: u64,
}

/// Samples on which other processors are emulated: their answers come node by node, from the definitions.
const EMULATED_SAMPLES: u64 = 256;

/// Steps of recovery where the recipe does not say: one epoch of a small dataset, a taste of a large one.
const RECOVERY_STEPS_MAX: u64 = 500;

impl Account {
    /// What is wrong with the result, where something is: only the original is within the limit.
    pub(crate) fn unmet(&self) -> Option<String> {
        (self.outcome.chosen == 0).then(|| {
            let by = match self.outcome.missed {
                Some((at, miss)) => {
                    format!("; the nearest, {}, misses it by {:.3} %", self.outcome.trials[at].name, 100.0 * miss)
                }
                None => String::new(),
            };
            format!(
                "nothing that was tried is better than the original within a drop of {:.3} %{by}",
                100.0 * self.max_drop
            )
        })
    }
}

impl Stages<'_> {
    /// The best model within the limits, made of `network`.
    pub(crate) fn optimize(
        &self,
        section: &OptimizeSection,
        network: &Network,
        data: &[(&'static str, Data)],
    ) -> Result<Optimized, Failure> {
        let machine = self.machine();
        let train_section = &self.loaded.recipe.train;
        let mut recipe = serde_json::to_value(section).map_err(|e| Failure::of(Kind::Usage, &e))?;
        recipe["seed"] = self.seed.into();
        recipe["machine"] = machine.clone().into();
        recipe["train"] = json!({
            "loss": train_section.loss, "output": train_section.output, "target": train_section.target,
            "optimizer": train_section.optimizer, "weight_decay": train_section.weight_decay,
            "batch": train_section.batch, "learning_rate": train_section.learning_rate,
        });
        let parents: Vec<Digest> = std::iter::once(network.digest).chain(data.iter().map(|(_, d)| d.digest)).collect();
        let account_origin = self.origin("optimization", recipe.clone(), parents.clone());
        let origin = self.origin("optimized", recipe, parents);
        // Asked for before the model: it says how the model was found, and is kept first.
        let mut made: Option<Vec<u8>> = None;
        let (account_artifact, text) = self.answer("optimize.search", account_origin, || {
            let (account, bytes) = self.search(section, network, data, machine)?;
            made = Some(bytes);
            Ok((serde_json::to_vec_pretty(&account).map_err(|e| Failure::of(Kind::Storage, &e))?, Map::new()))
        })?;
        let account: Account = serde_json::from_slice(&text).map_err(|e| {
            Failure::new(Kind::Storage, format!("the account {} is malformed: {e}", account_artifact.digest))
        })?;
        let (artifact, bytes) = self.answer("optimize", origin, || {
            let bytes = match made {
                Some(bytes) => bytes,
                // Killed between the two: the search takes its answers from the store.
                None => self.search(section, network, data, account.machine.clone())?.1,
            };
            Ok((bytes, Map::new()))
        })?;
        Ok(Optimized { network: decode(&artifact, &bytes)?, account, account_digest: account_artifact.digest })
    }

    fn search(
        &self,
        section: &OptimizeSection,
        network: &Network,
        data: &[(&'static str, Data)],
        machine: String,
    ) -> Result<(Account, Vec<u8>), Failure> {
        let clock = &*self.context.clock;
        let start_ns = clock.monotonic_ns();
        let limit_ns = section.time_limit.seconds.saturating_mul(1_000_000_000);
        let train_section = &self.loaded.recipe.train;
        let training = train_section.training_options();
        let task = Task { loss: training.loss, output: training.output.clone(), target: training.target.clone() };
        let metric = section.metric.unwrap_or_else(|| Metric::of(&task, &network.model.graph));
        let named = |split: &str| data.iter().find(|(name, _)| *name == split).map(|(_, d)| d.dataset.clone());
        let train = named("train").ok_or_else(|| Failure::new(Kind::Usage, "there is no training data"))?;
        // Splits are cut between batches: a small dataset gets some to cut between.
        let smallest = data.iter().map(|(_, d)| usize::try_from(d.dataset.len()).unwrap_or(usize::MAX)).min();
        let batch_max = (smallest.unwrap_or(1) / 4).max(1);
        let options = SplitOptions {
            seed: self.seed,
            batch_size: fixed_batch(network).unwrap_or(self.loaded.recipe.evaluate.batch.min(batch_max)),
            threads: self.loader_threads(),
            calibration_samples: section.calibration_samples,
            share_limit: Some(section.max_drop.0).filter(|limit| metric == Metric::Accuracy && *limit > 0.0),
            alpha: section.alpha,
        };
        let datasets = Datasets { train: train.clone(), validation: named("validation"), test: named("test") };
        let splits = Splits::new(&datasets, &options)?;
        let train_loader = Loader::new(train, train_section.loader_options(self.seed, self.loader_threads()))?;
        let recovery_steps =
            section.prune.recovery_steps.unwrap_or(train_loader.steps_per_epoch().min(RECOVERY_STEPS_MAX));
        let pruning = section.prune.ratios.iter().map(|ratio| Pruning { ratio: *ratio, recovery_steps });
        let settings = SearchSettings {
            objective: section.objective,
            max_drop: section.max_drop.0,
            alpha: section.alpha,
            pruning: pruning.collect(),
            aware_steps: section.aware_steps.unwrap_or(recovery_steps),
            reduced_range: section.target.is_some_and(|t| t.arithmetic() == Arithmetic::SaturatingPairs),
            symmetric: section.target.is_some_and(Target::is_symmetric),
        };
        let bench_settings = BenchSettings {
            metric,
            alpha: section.alpha,
            seed: self.seed,
            latency: LatencySettings::default(),
            cost_batch: section.cost_batch,
            divergence_samples: 256,
            recovery_rate: section.prune.learning_rate.unwrap_or(train_section.learning_rate.peak / 3.0),
            machine: machine.clone(),
            arithmetic: section.target.map_or(Arithmetic::Exact, Target::arithmetic),
            deadline_ns: start_ns.saturating_add(limit_ns),
        };
        let progress = self.context.progress;
        let mut note = |line: &str| progress.note(&format!("optimize: {line}"));
        let engine = CpuEngine::new(self.context.threads)?;
        let tools = Tools {
            engine: &engine,
            store: &self.store,
            clock,
            original: &network.model,
            original_digest: network.digest,
            task: &task,
            training: &training,
            train_loader: &train_loader,
            splits: &splits,
            note: &mut note,
        };
        let mut bench = Bench::new(tools, bench_settings);
        let outcome = search(&mut bench, &settings)?;
        let chosen = outcome.trials.get(outcome.chosen).map(|t| t.candidate.clone()).unwrap_or_default();
        let on_avx2 = match chosen.static_form() {
            Some(_) => match bench.drop_elsewhere(&chosen, Arithmetic::SaturatingPairs, EMULATED_SAMPLES) {
                Ok(judgement) => Some(judgement),
                Err(error) => {
                    progress.note(&format!("optimize: other processors were not emulated: {error}"));
                    None
                }
            },
            None => None,
        };
        let bytes = match chosen == Candidate::default() {
            true => model::encode(&network.model)?,
            false => {
                let artifact = bench.artifact(&chosen)?;
                self.store.get(&artifact.digest)?.to_vec()
            }
        };
        let splits = SplitSizes {
            calibration: splits.calibration.len(),
            search: splits.search.len(),
            holdout: splits.holdout.len(),
        };
        let account = Account {
            metric,
            objective: section.objective,
            max_drop: section.max_drop.0,
            alpha: section.alpha,
            target: section.target,
            machine,
            splits,
            outcome,
            on_avx2,
        };
        Ok((account, bytes))
    }

    /// What times depend on, so far as we can tell.
    fn machine(&self) -> String {
        #[cfg(target_arch = "x86_64")]
        let features = {
            let known = [
                ("avx2", std::arch::is_x86_feature_detected!("avx2")),
                ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
                ("avx512vnni", std::arch::is_x86_feature_detected!("avx512vnni")),
            ];
            known.iter().filter(|(_, has)| *has).map(|(name, _)| format!(" {name}")).collect::<String>()
        };
        #[cfg(not(target_arch = "x86_64"))]
        let features = "";
        format!("{}{features}, {} threads", std::env::consts::ARCH, self.context.threads)
    }
}

/// The account of a search as an answer for programs.
pub(crate) fn summary(optimized: &Optimized) -> Value {
    let account = &optimized.account;
    let outcome = &account.outcome;
    json!({
        "metric": account.metric, "objective": account.objective, "max_drop": account.max_drop,
        "target": account.target, "machine": account.machine, "splits": account.splits,
        "model_digest": optimized.network.digest, "size_bytes": optimized.network.size_bytes,
        "account": optimized.account_digest,
        "original": outcome.trials.first(), "chosen": outcome.trials.get(outcome.chosen),
        "front": outcome.front.iter().filter_map(|i| outcome.trials.get(*i)).collect::<Vec<_>>(),
        "missed": outcome.missed.map(|(at, by)| json!({ "trial": outcome.trials.get(at), "by": by })),
        "trials": outcome.trials.len(), "is_cut_short": outcome.is_cut_short, "on_avx2": account.on_avx2,
    })
}

/// The first size of a model's inputs, where it is fixed.
fn fixed_batch(network: &Network) -> Option<usize> {
    let graph = &network.model.graph;
    model::inputs(graph).into_iter().find_map(|v| graph.shape(v)?.first()?.known())
}
