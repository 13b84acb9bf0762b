//! From what a recipe says to what the loop and the passes take.

use updraft_data::{LoaderOptions, Tail};
use updraft_graph::zoo::Setting;
use updraft_passes::loss::{CrossEntropy, Loss, Targets};
use updraft_passes::optimizer::{AdamSettings, Optimizer, WeightDecay};
use updraft_passes::schedule::{Schedule, Shape};
use updraft_passes::training::TrainingOptions;
use updraft_train::{BestBy, CheckpointSchedule, EarlyStopping, Settings};

use super::{
    AdamSection, BestBy as BestBySection, LearningRateSection, LossSection, ModelSection, OptimizerSection,
    OptionValue, ShapeSection, TrainSection,
};

impl ModelSection {
    /// The options of the zoo network, as the zoo takes them.
    pub fn settings(&self) -> Vec<(String, Setting)> {
        let setting = |value: &OptionValue| match value {
            OptionValue::Flag(v) => Setting::Flag(*v),
            OptionValue::Integer(v) => Setting::Integer(*v),
            OptionValue::Float(v) => Setting::Float(*v),
            OptionValue::Integers(v) => Setting::Integers(v.clone()),
        };
        self.options.iter().map(|(name, value)| (name.clone(), setting(value))).collect()
    }
}

impl TrainSection {
    /// What the passes take.
    pub fn training_options(&self) -> TrainingOptions {
        let mut options = TrainingOptions::new(self.loss.loss(), self.optimizer.optimizer());
        options.weight_decay = WeightDecay { amount: self.weight_decay.amount, rules: self.weight_decay.rules.clone() };
        options.clip_norm = self.clip_norm;
        options.freeze = self.freeze.clone();
        options.output = self.output.clone();
        options.target = self.target.clone();
        options
    }

    /// What the loop takes, for a dataset of so many steps an epoch.
    pub fn settings(&self, steps_per_epoch: u64, seed: u64) -> Settings {
        let steps = match (self.steps, self.epochs) {
            (Some(steps), _) => steps,
            (None, Some(epochs)) => epochs.saturating_mul(steps_per_epoch),
            (None, None) => unreachable!("a recipe without steps and epochs is refused when it is read"),
        };
        Settings {
            steps,
            seed,
            schedule: self.learning_rate.schedule(steps),
            validate_every_steps: self.validate.every_steps.unwrap_or(steps_per_epoch),
            best_by: match self.validate.best_by {
                BestBySection::Loss => BestBy::Loss,
                BestBySection::Accuracy => BestBy::Accuracy,
            },
            early_stopping: self
                .early_stopping
                .as_ref()
                .map(|s| EarlyStopping { patience: s.patience, min_change: s.min_change }),
            checkpoint: CheckpointSchedule {
                every_steps: self.checkpoint.every_steps,
                // The recipe was checked to keep this in range.
                every_ns: self.checkpoint.every_seconds.map(|s| (s * 1e9) as u64),
                keep_last: self.checkpoint.keep,
            },
        }
    }

    /// Batches to learn from.
    pub fn loader_options(&self, seed: u64, threads: usize) -> LoaderOptions {
        LoaderOptions {
            batch_size: self.batch,
            seed,
            shuffle: self.shuffle,
            // Every sample is seen in every epoch, and all steps have one shape.
            tail: Tail::Wrap,
            threads,
            ..LoaderOptions::default()
        }
    }
}

impl LossSection {
    fn loss(&self) -> Loss {
        match self {
            LossSection::CrossEntropy(s) => Loss::CrossEntropy(CrossEntropy {
                label_smoothing: s.label_smoothing,
                ignore_index: s.ignore_index,
                class_axis: s.class_axis,
                // A run that learns from distributions says so by its data.
                targets: Targets::Classes,
            }),
            LossSection::MeanSquaredError => Loss::MeanSquaredError,
            LossSection::KullbackLeibler(s) => Loss::KullbackLeibler { temperature: s.temperature },
        }
    }
}

impl OptimizerSection {
    fn optimizer(&self) -> Optimizer {
        let adam = |s: &AdamSection| AdamSettings { beta1: s.beta1, beta2: s.beta2, epsilon: s.epsilon };
        match self {
            OptimizerSection::Sgd(s) => Optimizer::Sgd { momentum: s.momentum, nesterov: s.nesterov },
            OptimizerSection::Adam(s) => Optimizer::Adam(adam(s)),
            OptimizerSection::Adamw(s) => Optimizer::AdamW(adam(s)),
        }
    }
}

impl LearningRateSection {
    fn schedule(&self, total_steps: u64) -> Schedule {
        let shape = match &self.shape {
            ShapeSection::Constant => Shape::Constant,
            ShapeSection::Step(s) => Shape::Step { every_steps: s.every_steps, factor: s.factor },
            ShapeSection::Cosine(s) => Shape::Cosine { total_steps, floor: s.floor },
            ShapeSection::OneCycle(s) => Shape::OneCycle {
                total_steps,
                rise: s.rise,
                start_divisor: s.start_divisor,
                end_divisor: s.end_divisor,
            },
        };
        Schedule { peak: self.peak, warmup_steps: self.warmup_steps, shape }
    }
}
