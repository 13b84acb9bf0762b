//! The loop: load, step, validate, save.
//!
//! All that a run changes is in one place ([`Progress`]): the engine's state, and a [`Record`] of everything else.
//! Both go into every checkpoint, and whatever the loop decides (evaluate, stop, what is best) it decides from them and
//! the settings alone. So a run that is killed and resumed takes the same decisions on the same bits. Only when to save
//! may depend on the clock, and saving changes nothing.

use std::collections::BTreeMap;

use updraft_base::Clock;
use updraft_data::{Batch, Batches, Loader};
use updraft_engine::{CompileOptions, Engine, Session};
use updraft_graph::{DType, Graph, Tensor};
use updraft_passes::loss::{Loss, Targets};
use updraft_passes::schedule::Schedule;
use updraft_passes::training::{self, LEARNING_RATE, SEED, STEP, TrainingOptions, TrainingStep};
use updraft_store::{Origin, Store};

use crate::checkpoint::{Best, Checkpoint, Checkpoints, Found, Record};
use crate::error::TrainError;
use crate::evaluate::{Evaluator, check_tensors, scalar, select};
use crate::event::{Event, Observer};
use crate::history::{Evaluation, History};
use crate::metrics::Metrics;
use crate::waits::Waits;

/// How a run goes.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Steps to take.
    pub steps: u64,
    /// What dropout is drawn from.
    pub seed: u64,
    /// The learning rate of each step.
    pub schedule: Schedule,
    /// Steps from one evaluation to the next; one follows the last step in any case.
    pub validate_every_steps: u64,
    /// What evaluations are compared by.
    pub best_by: BestBy,
    /// When to stop before all steps are done.
    pub early_stopping: Option<EarlyStopping>,
    /// When checkpoints are taken. One follows every best evaluation and the last step in any case.
    pub checkpoint: CheckpointSchedule,
}

/// The metric that evaluations are compared by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BestBy {
    /// The loss: lower is better.
    Loss,
    /// The accuracy: higher is better.
    Accuracy,
}

/// When to stop before all steps are done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EarlyStopping {
    /// Evaluations without a better one.
    pub patience: u64,
    /// By how much a better one must be better.
    pub min_change: f64,
}

/// When checkpoints are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointSchedule {
    /// Steps from one to the next.
    pub every_steps: Option<u64>,
    /// Time from one to the next.
    pub every_ns: Option<u64>,
    /// How many of the last are kept, besides the best; at least one.
    pub keep_last: usize,
}

/// What a run works with.
pub struct Run<'a> {
    /// The model as it is before training.
    pub model: &'a Graph,
    /// What is done to it.
    pub options: &'a TrainingOptions,
    /// What runs it.
    pub engine: &'a dyn Engine,
    /// Batches to learn from.
    pub loader: &'a Loader,
    /// Batches to evaluate on.
    pub validation: Option<&'a Loader>,
    /// Where checkpoints are kept.
    pub store: &'a Store,
    /// All that determines the result: the name of the run among checkpoints.
    pub origin: &'a Origin,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Who watches.
    pub observer: &'a mut dyn Observer,
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// What belongs to the model after the last step, by the names of its initializers.
    pub last: BTreeMap<String, Tensor>,
    /// The same at the best evaluation; the last where there was no evaluation.
    pub best: BTreeMap<String, Tensor>,
    /// The course of the run.
    pub record: Record,
    /// Time that it took, over all its parts.
    pub elapsed_ns: u64,
}

/// Trains, from the newest checkpoint of this run if there is one.
pub fn train(run: &mut Run, settings: &Settings) -> Result<Trained, TrainError> {
    check(run, settings)?;
    let step = training::build(run.model, &for_targets(run.options, run.loader))?;
    run.observer.observe(&Event::Built { untrained: &step.untrained().collect::<Vec<_>>() });
    let mut progress = Progress::resume_or_start(run, settings, &step)?;
    progress.run.loader.ends_before(settings.steps);
    let mut batches = progress.run.loader.batches(progress.record.step..settings.steps)?;
    let mut waits = Waits::default();
    let start_ns = progress.run.clock.monotonic_ns();
    while progress.goes_on() {
        let Some(batch) = batches.next() else { break };
        let batch = batch?;
        progress.step(&batch)?;
        waits.push(progress.record.step, &batches.last_wait());
        if progress.evaluation_is_due() {
            progress.evaluate(&batch)?;
        }
        let stops = progress.run.observer.stops() && progress.goes_on();
        if stops || progress.checkpoint_is_due() {
            progress.save(&batch)?;
        }
        if stops {
            progress.tell(waits, &batches, start_ns);
            return Err(TrainError::Stopped { step: progress.record.step });
        }
        batches.recycle(batch);
    }
    progress.tell(waits, &batches, start_ns);
    progress.finish()
}

/// The same options, with a cross-entropy that takes what the data holds: classes, or distributions over them. An
/// evaluation on other data may still count classes.
fn for_targets(options: &TrainingOptions, loader: &Loader) -> TrainingOptions {
    let mut options = options.clone();
    let target = loader.dataset().facts().tensors.iter().find(|t| t.name == options.target);
    if let (Loss::CrossEntropy(settings), Some(target)) = (&mut options.loss, target)
        && target.dtype.is_float()
    {
        settings.targets = Targets::Distributions;
    }
    options
}

fn check(run: &Run, settings: &Settings) -> Result<(), TrainError> {
    let wrong = |setting, problem: &str| Err(TrainError::Settings { setting, problem: problem.to_owned() });
    if settings.validate_every_steps == 0 {
        return wrong("validate_every_steps", "must be at least 1");
    }
    if settings.checkpoint.every_steps == Some(0) {
        return wrong("checkpoint.every_steps", "must be at least 1");
    }
    if settings.early_stopping.is_some() && run.validation.is_none() {
        return wrong("early_stopping", "needs validation data");
    }
    if i64::try_from(settings.steps).is_err() || i64::try_from(settings.seed).is_err() {
        return wrong("steps and seed", "must be below 2^63");
    }
    Ok(())
}

struct Progress<'r, 'a> {
    run: &'r mut Run<'a>,
    settings: &'r Settings,
    training: &'r TrainingStep,
    session: Box<dyn Session>,
    checkpoints: Checkpoints<'a>,
    record: Record,
    is_new_best: bool,
    saved_ns: u64,
    /// Start of this part of the run, less what earlier parts took.
    start_ns: i128,
}

impl<'r, 'a> Progress<'r, 'a> {
    fn resume_or_start(
        run: &'r mut Run<'a>,
        settings: &'r Settings,
        training: &'r TrainingStep,
    ) -> Result<Progress<'r, 'a>, TrainError> {
        check_tensors(run.loader, &training.batch_inputs)?;
        let pairs = training.state.iter().map(|s| (s.input.clone(), s.output.clone())).collect();
        let session = run.engine.compile(&training.graph, &CompileOptions { state: pairs })?;
        let checkpoints = Checkpoints::open(run.store, run.origin, settings.checkpoint.keep_last)?;
        let now_ns = run.clock.monotonic_ns();
        let record = Record {
            step: 0,
            seed: settings.seed,
            data: run.loader.token(0)?,
            history: History::default(),
            best: None,
            evaluations_since_best: 0,
        };
        let mut progress = Progress {
            run,
            settings,
            training,
            session,
            checkpoints,
            record,
            is_new_best: false,
            saved_ns: now_ns,
            start_ns: i128::from(now_ns),
        };
        match progress.checkpoints.latest()? {
            Some(found) => progress.resume(found)?,
            None => {
                for entry in &training.state {
                    progress.session.set_state(&entry.input, entry.initial.clone())?;
                }
            }
        }
        Ok(progress)
    }

    fn resume(&mut self, found: Found) -> Result<(), TrainError> {
        let Found { checkpoint, digest, elapsed_ns, unreadable } = found;
        let wrong = |reason: String| TrainError::Checkpoint { digest, reason };
        for (checkpoint, reason) in &unreadable {
            self.run.observer.observe(&Event::Unreadable { checkpoint: *checkpoint, reason });
        }
        if checkpoint.record.seed != self.settings.seed {
            return Err(wrong(format!("its seed is {}, not {}", checkpoint.record.seed, self.settings.seed)));
        }
        self.run.loader.resume(&checkpoint.record.data)?;
        let mut state = checkpoint.state;
        for entry in &self.training.state {
            let tensor = state.remove(&entry.input).ok_or_else(|| wrong(format!("it lacks {:?}", entry.input)))?;
            let (expected, found) = ((entry.initial.dtype(), entry.initial.shape()), (tensor.dtype(), tensor.shape()));
            if expected != found {
                let (e, f) = (expected, found);
                return Err(wrong(format!("{:?} is {}{:?}, not {}{:?}", entry.input, f.0, f.1, e.0, e.1)));
            }
            self.session.set_state(&entry.input, tensor)?;
        }
        if let Some(name) = state.keys().next() {
            return Err(wrong(format!("it has {name:?}, which the step does not")));
        }
        self.record = checkpoint.record;
        self.start_ns -= i128::from(elapsed_ns);
        self.run.observer.observe(&Event::Resumed { step: self.record.step, checkpoint: digest });
        Ok(())
    }

    /// Says what the loop waited for.
    fn tell(&mut self, mut waits: Waits, batches: &Batches, start_ns: u64) {
        waits.stalls = batches.stalls().clone();
        waits.elapsed_ns = self.run.clock.monotonic_ns().saturating_sub(start_ns);
        self.run.observer.observe(&Event::Waited { waits: &waits });
    }

    fn goes_on(&self) -> bool {
        self.record.step < self.settings.steps && !self.is_stopped()
    }

    fn is_stopped(&self) -> bool {
        self.settings.early_stopping.is_some_and(|s| self.record.evaluations_since_best >= s.patience.max(1))
    }

    fn step(&mut self, batch: &Batch) -> Result<(), TrainError> {
        let learning_rate = self.settings.schedule.at(self.record.step);
        // Both were checked to fit.
        let (rate, step, seed) = (
            Tensor::scalar(learning_rate as f32),
            Tensor::scalar(self.record.step as i64),
            Tensor::scalar(self.settings.seed as i64),
        );
        let mut inputs = select(&batch.tensors, &self.training.batch_inputs)?;
        inputs.extend([(LEARNING_RATE, &rate), (STEP, &step), (SEED, &seed)]);
        let outputs = self.session.run(&inputs)?;
        self.record.step += 1;
        self.record.data = self.run.loader.token(self.record.step)?;
        let loss = scalar("loss", outputs.into_iter().next())?;
        if !loss.is_finite() {
            return Err(self.diverged(format!("the loss is {loss}"), batch));
        }
        self.record.history.loss.push(self.record.step, loss);
        self.is_new_best = false;
        let (step, steps) = (self.record.step, self.settings.steps);
        self.run.observer.observe(&Event::Stepped { step, steps, loss, learning_rate });
        Ok(())
    }

    fn evaluation_is_due(&self) -> bool {
        let step = self.record.step;
        self.run.validation.is_some()
            && (step.is_multiple_of(self.settings.validate_every_steps) || step == self.settings.steps)
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<(), TrainError> {
        let Some(loader) = self.run.validation else { return Ok(()) };
        let model = training::export(self.run.model, self.model_state()?)?;
        let metrics = Evaluator::new(self.run.engine, &model, self.run.options)?.evaluate(loader, |_| {})?;
        if !metrics.loss.is_finite() {
            return Err(self.diverged(format!("the validation loss is {}", metrics.loss), batch));
        }
        let value = self.compared_value(&metrics)?;
        let min_change = self.settings.early_stopping.map_or(0.0, |s| s.min_change);
        self.is_new_best = self.record.best.is_none_or(|best| match self.settings.best_by {
            BestBy::Loss => value < best.value - min_change,
            BestBy::Accuracy => value > best.value + min_change,
        });
        let step = self.record.step;
        if self.is_new_best {
            self.record.best = Some(Best { step, value });
            self.record.evaluations_since_best = 0;
        } else {
            self.record.evaluations_since_best += 1;
        }
        self.run.observer.observe(&Event::Evaluated { step, metrics: &metrics, is_best: self.is_new_best });
        // A confusion matrix for every evaluation would outgrow the curve; the final evaluation has one.
        let metrics = Metrics { confusion: None, ..metrics };
        self.record.history.evaluations.push(Evaluation { step, metrics });
        if self.is_stopped() {
            let evaluations = self.record.evaluations_since_best;
            self.run.observer.observe(&Event::Stopped { step, evaluations });
        }
        Ok(())
    }

    fn compared_value(&self, metrics: &Metrics) -> Result<f64, TrainError> {
        match self.settings.best_by {
            BestBy::Loss => Ok(metrics.loss),
            BestBy::Accuracy => metrics.accuracy.ok_or_else(|| TrainError::Settings {
                setting: "best_by",
                problem: "cannot be accuracy: this loss has no classes".to_owned(),
            }),
        }
    }

    fn checkpoint_is_due(&self) -> bool {
        let schedule = &self.settings.checkpoint;
        let since_ns = self.run.clock.monotonic_ns().saturating_sub(self.saved_ns);
        self.is_new_best
            || !self.goes_on()
            || schedule.every_steps.is_some_and(|n| self.record.step.is_multiple_of(n))
            || schedule.every_ns.is_some_and(|n| since_ns >= n)
    }

    fn save(&mut self, batch: &Batch) -> Result<(), TrainError> {
        let mut state = BTreeMap::new();
        for entry in &self.training.state {
            let tensor = self.session.state(&entry.input)?;
            // The loss does not show yet what the last update broke; a checkpoint must not keep it.
            if !is_finite(&tensor) {
                return Err(self.diverged(format!("{:?} is no longer finite", entry.input), batch));
            }
            state.insert(entry.input.clone(), tensor);
        }
        let checkpoint = Checkpoint { record: self.record.clone(), state };
        let digest = self.checkpoints.save(&checkpoint, self.elapsed_ns())?;
        self.saved_ns = self.run.clock.monotonic_ns();
        self.run.observer.observe(&Event::Saved { step: self.record.step, checkpoint: digest });
        Ok(())
    }

    fn finish(self) -> Result<Trained, TrainError> {
        let last: BTreeMap<String, Tensor> = self.model_state()?.into_iter().collect();
        let best = match self.record.best {
            Some(best) if best.step != self.record.step => {
                let (_, checkpoint) = self.checkpoints.at_step(best.step)?;
                checkpoint.state.into_iter().filter(|(name, _)| last.contains_key(name)).collect()
            }
            _ => last.clone(),
        };
        let elapsed_ns = self.elapsed_ns();
        Ok(Trained { last, best, record: self.record, elapsed_ns })
    }

    /// The state that belongs to the model.
    fn model_state(&self) -> Result<Vec<(String, Tensor)>, TrainError> {
        let entries = self.training.state.iter().filter(|s| s.role.belongs_to_model());
        entries.map(|s| Ok((s.input.clone(), self.session.state(&s.input)?))).collect()
    }

    fn elapsed_ns(&self) -> u64 {
        // Time runs forward, so the difference is not negative.
        u64::try_from(i128::from(self.run.clock.monotonic_ns()) - self.start_ns).unwrap_or(u64::MAX)
    }

    fn diverged(&self, what: String, batch: &Batch) -> TrainError {
        let dataset = self.run.loader.dataset();
        TrainError::Diverged {
            step: self.record.step,
            what,
            samples: batch.samples.clone(),
            names: batch.samples.iter().map(|s| dataset.sample_name(*s)).collect(),
            checkpoint: self.checkpoints.newest(),
        }
    }
}

fn is_finite(tensor: &Tensor) -> bool {
    match tensor.as_slice::<f32>() {
        Ok(values) => values.iter().all(|v| v.is_finite()),
        Err(_) if tensor.dtype().is_float() && tensor.dtype() != DType::F32 => {
            tensor.to_f64().is_ok_and(|values| values.iter().all(|v| v.is_finite()))
        }
        Err(_) => true,
    }
}
