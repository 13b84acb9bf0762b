//! A training step as one graph: forward, loss, gradient, clipping, update.
//!
//! What changes from step to step and stays inside the engine is *state*: parameters, moments of the optimizer, running
//! statistics. Each is a graph input whose initializer is the starting value, paired with the graph output that is its
//! next value. State keeps the names of the model's initializers, so a trained state goes back into the model by name.

use updraft_graph::{DType, Graph, Tensor, ValueId, ValueType};

use crate::distill::{self, Attached, Distillation, Purpose};
use crate::loss::{self, Loss, Metric};
use crate::optimizer::{self, Optimizer, StepInputs, WeightDecay, keep_state, matches};
use crate::pipeline::{self, Pipeline, PipelineError};
use crate::train_mode::{Randomness, lower_batch_norm, lower_dropout};
use crate::trainable::why_constant;
use crate::{PassError, Refusal, Report, gradient};

/// Graph input of a step: the learning rate, `f32 []`.
pub const LEARNING_RATE: &str = "learning_rate";
/// Graph input of a step: the number of steps made before this one, `i64 []`.
pub const STEP: &str = "step";
/// Graph input of a step: the seed of all randomness in it, `i64 []`.
pub const SEED: &str = "seed";
/// Graph output: the loss, a scalar.
pub const LOSS: &str = "loss";
/// Graph output, where gradients are clipped: their norm before clipping, `f32 []`.
pub const GRADIENT_NORM: &str = "gradient_norm";

/// What is asked of a training step.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingOptions {
    /// What becomes small.
    pub loss: Loss,
    /// How parameters move.
    pub optimizer: Optimizer,
    /// Which parameters decay.
    pub weight_decay: WeightDecay,
    /// Gradients whose norm over all parameters is larger are scaled down to it.
    pub clip_norm: Option<f32>,
    /// Patterns of parameters that stay as they are (see [`optimizer::matches`]).
    pub freeze: Vec<String>,
    /// The model output that the loss reads; the first where there is no name.
    pub output: Option<String>,
    /// Name of the graph input for the target: labels, or values of the output's shape.
    pub target: String,
    /// Numbers beside the loss.
    pub metrics: Vec<Metric>,
    /// Model outputs that the step returns too.
    pub keep_outputs: Vec<String>,
    /// A teacher to learn from, beside or instead of the labels.
    pub distillation: Option<Distillation>,
}

impl TrainingOptions {
    /// A loss and an optimizer, with no decay, no clipping, nothing frozen, the target called `labels`.
    pub fn new(loss: Loss, optimizer: Optimizer) -> TrainingOptions {
        TrainingOptions {
            loss,
            optimizer,
            weight_decay: WeightDecay::default(),
            clip_norm: None,
            freeze: Vec::new(),
            output: None,
            target: "labels".to_owned(),
            metrics: Vec::new(),
            keep_outputs: Vec::new(),
            distillation: None,
        }
    }

    /// Whether an evaluation compares the model with labels, and not with a teacher alone.
    pub fn has_labels(&self) -> bool {
        self.distillation.as_ref().is_none_or(|d| !d.label_free)
    }
}

/// What a piece of state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateRole {
    /// A trained parameter; belongs to the model.
    Parameter,
    /// Memory of the optimizer about one parameter.
    Moment,
    /// A running statistic of a normalisation; belongs to the model.
    RunningStatistic,
    /// A trained parameter of the loss, such as a regressor of hidden states; belongs to no model.
    LossParameter,
}

impl StateRole {
    /// Whether the state is part of the model that is trained, and not only of its training.
    pub fn belongs_to_model(self) -> bool {
        matches!(self, StateRole::Parameter | StateRole::RunningStatistic)
    }
}

/// One piece of state.
#[derive(Debug, Clone, PartialEq)]
pub struct StateEntry {
    /// The graph input that is its value before the step; for what belongs to the model, its initializer's name.
    pub input: String,
    /// The graph output that is its value after the step.
    pub output: String,
    /// The value before the first step.
    pub initial: Tensor,
    /// What it is.
    pub role: StateRole,
}

/// A training step.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingStep {
    /// The whole step. Its outputs are [`outputs`](TrainingStep::outputs) and then the state's.
    pub graph: Graph,
    /// What the engine keeps from step to step, in the order of the model's initializers, each parameter followed by
    /// its moments.
    pub state: Vec<StateEntry>,
    /// Graph inputs that come from the data: the model's own, then the target.
    pub batch_inputs: Vec<String>,
    /// Graph outputs that a run returns: the loss, metrics by their names, [`GRADIENT_NORM`] if clipped, kept outputs.
    pub outputs: Vec<String>,
    /// What the passes did.
    pub reports: Vec<Report>,
}

impl TrainingStep {
    /// The float initializers of rank 1 and up that stay as they are, by name, and why.
    pub fn untrained(&self) -> impl Iterator<Item = &Refusal> {
        let passes = self.reports.iter().filter(|r| [ATTACH_LOSS, GRADIENT].contains(&r.pass));
        passes.flat_map(|r| &r.refusals)
    }
}

/// The passes that decide what is trained.
pub(crate) const ATTACH_LOSS: &str = "attach loss";
pub(crate) const GRADIENT: &str = "gradient";

/// The training step of a model. Its float initializers that are read as weights, biases or scales and that the loss
/// depends on are trained, but for frozen ones and running statistics; masks, tables of positions and single numbers
/// are not: see [`TrainingStep::untrained`].
pub fn build(model: &Graph, options: &TrainingOptions) -> Result<TrainingStep, PipelineError> {
    let mut graph = model.clone();
    unshare_statistics(&mut graph);
    let mut pipeline = Pipeline::new(&mut graph);
    let Interface { state, batch_inputs, outputs } = pipeline::training(&mut pipeline, options)?;
    let reports = pipeline.finish();
    Ok(TrainingStep { graph, state, batch_inputs, outputs, reports })
}

/// A model's loss on a batch in training mode, with its gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct GradientStep {
    /// Its inputs are those of the batch and, where randomness reads them, [`STEP`] and [`SEED`]; its outputs the loss and
    /// then the gradients.
    pub graph: Graph,
    /// Graph inputs that come from the data.
    pub batch_inputs: Vec<String>,
    /// The parameters, in the order of their gradients.
    pub parameters: Vec<String>,
}

/// The gradients of what [`build`] would train, for those who weigh parameters and do not move them.
pub fn build_gradients(model: &Graph, options: &TrainingOptions) -> Result<GradientStep, PipelineError> {
    let mut graph = model.clone();
    let mut pipeline = Pipeline::new(&mut graph);
    let (batch_inputs, parameters) = pipeline::gradients(&mut pipeline, options)?;
    pipeline.finish();
    Ok(GradientStep { graph, batch_inputs, parameters })
}

/// A model with its loss, for measuring: the inference form, its outputs the loss, the metrics and the kept outputs.
/// Returns the graph and the names of its inputs as [`TrainingStep::batch_inputs`] has them.
pub fn build_evaluation(model: &Graph, options: &TrainingOptions) -> Result<(Graph, Vec<String>), PipelineError> {
    let mut graph = model.clone();
    let mut pipeline = Pipeline::new(&mut graph);
    let batch_inputs = pipeline::evaluation(&mut pipeline, options)?;
    pipeline.finish();
    Ok((graph, batch_inputs))
}

/// The model with trained state in place of its initializers: parameters and running statistics by name.
pub fn export(model: &Graph, state: impl IntoIterator<Item = (String, Tensor)>) -> Result<Graph, PassError> {
    let mut graph = model.clone();
    unshare_statistics(&mut graph);
    for (name, tensor) in state {
        let refuse = |problem: String| PassError::Value { name: name.clone(), problem };
        let id = graph.find(&name).ok_or_else(|| refuse("is no value of the model".to_owned()))?;
        let old = graph.value(id).constant().ok_or_else(|| refuse("is no initializer of the model".to_owned()))?;
        if (old.dtype(), old.shape()) != (tensor.dtype(), tensor.shape()) {
            let (a, b) = ((old.dtype(), old.shape()), (tensor.dtype(), tensor.shape()));
            return Err(refuse(format!("is {}{:?} in the model but {}{:?} in the state", a.0, a.1, b.0, b.1)));
        }
        graph.set_constant(id, Some(tensor));
    }
    Ok(graph)
}

/// Gives each BatchNormalization statistics of its own: files store equal tensors once, and what is equal before
/// training is not so after it.
fn unshare_statistics(graph: &mut Graph) {
    let norms: Vec<_> = graph
        .nodes()
        .filter(|(_, node)| node.op == "BatchNormalization" && node.domain.is_empty())
        .map(|(id, node)| (id, node.inputs.clone()))
        .collect();
    for (id, inputs) in norms {
        for (index, value) in inputs.into_iter().enumerate().skip(3).take(2) {
            let Some(value) = value.filter(|v| graph.value(*v).consumers().len() > 1) else { continue };
            let Some(tensor) = graph.value(value).constant().cloned() else { continue };
            let name = graph.value(value).name.clone();
            let own = graph.add_constant(&name, tensor);
            graph.set_node_input(id, index, Some(own));
        }
    }
}

/// What a step reads, gives and keeps; see [`TrainingStep`].
pub(crate) struct Interface {
    state: Vec<StateEntry>,
    batch_inputs: Vec<String>,
    outputs: Vec<String>,
}

/// A step under construction, from stage to stage of the pipeline.
pub(crate) struct Draft {
    inputs: StepInputs,
    seed: ValueId,
    trained: Vec<ValueId>,
    regressors: Vec<ValueId>,
    gradients: Vec<ValueId>,
    running: Vec<(ValueId, ValueId)>,
    batch_inputs: Vec<String>,
}

/// Adds target, loss and metrics, and makes them and the kept model outputs the graph's outputs. Returns the names of
/// what comes from the data, and the parameters of the loss itself.
pub(crate) fn attach_loss(
    graph: &mut Graph,
    options: &TrainingOptions,
    purpose: Purpose,
) -> Result<(Vec<String>, Vec<ValueId>), PassError> {
    let output = model_output(graph, options.output.as_deref())?;
    let kept: Vec<ValueId> =
        options.keep_outputs.iter().map(|name| model_output(graph, Some(name))).collect::<Result<_, _>>()?;
    let Attached { loss, target, regressors } = match &options.distillation {
        Some(distillation) => distill::attach(graph, distillation, options, output, purpose)?,
        None => {
            let (target, loss) = loss::attach(graph, options.loss, output, &options.target)?;
            Attached { loss, target: Some(target), regressors: Vec::new() }
        }
    };
    graph.rename(loss, LOSS)?;
    let mut outputs = vec![loss];
    for metric in &options.metrics {
        let target = target.ok_or_else(|| PassError::Option {
            option: "metrics",
            problem: format!("{:?} needs labels, and a teacher alone gives none", metric.name()),
        })?;
        let value = loss::measure(graph, *metric, options.loss, output, target)?;
        graph.rename(value, metric.name())?;
        outputs.push(value);
    }
    outputs.extend(kept);
    graph.set_outputs(outputs);
    let batch_inputs = graph.inputs().iter().filter(|v| graph.value(**v).constant().is_none());
    Ok((batch_inputs.map(|v| graph.value(*v).name.clone()).collect(), regressors))
}

fn model_output(graph: &Graph, name: Option<&str>) -> Result<ValueId, PassError> {
    let Some(name) = name else {
        return graph.outputs().first().copied().ok_or_else(|| PassError::Option {
            option: "output",
            problem: "cannot be the first one: the model has no outputs".to_owned(),
        });
    };
    let names: Vec<&str> = graph.outputs().iter().map(|v| graph.value(*v).name.as_str()).collect();
    match names.iter().position(|n| *n == name) {
        Some(index) => Ok(graph.outputs()[index]),
        None => Err(PassError::Option {
            option: "output",
            problem: format!("{name:?} is no output of the model; it has {}", names.join(", ")),
        }),
    }
}

/// Adds the loss and the step's scalars, and makes graph inputs of all that is trained.
pub(crate) fn draft(graph: &mut Graph, options: &TrainingOptions, report: &mut Report) -> Result<Draft, PassError> {
    optimizer::check(options.optimizer)?;
    // Before the loss, which adds constants, and a teacher, which is not trained.
    let running = running_statistics(graph);
    let parameters = parameters(graph, &running, &options.freeze, report);
    let (batch_inputs, regressors) = attach_loss(graph, options, Purpose::Training)?;
    let mut scalar = |name, dtype| graph.add_input(name, ValueType::tensor(dtype, Vec::new()));
    let learning_rate = scalar(LEARNING_RATE, DType::F32)?;
    let step = scalar(STEP, DType::I64)?;
    let seed = scalar(SEED, DType::I64)?;
    let trained: Vec<ValueId> = parameters.into_iter().chain(regressors.iter().copied()).collect();
    for id in trained.iter().chain(&running) {
        if !graph.inputs().contains(id) {
            graph.push_input(*id);
        }
    }
    let inputs = StepInputs { learning_rate, step };
    Ok(Draft { inputs, seed, trained, regressors, gradients: Vec::new(), running: Vec::new(), batch_inputs })
}

/// The initializers to train, in order.
fn parameters(graph: &Graph, running: &[ValueId], freeze: &[String], report: &mut Report) -> Vec<ValueId> {
    let mut trained = Vec::new();
    for (id, tensor) in graph.constants() {
        if !tensor.dtype().is_float() || tensor.rank() == 0 || running.contains(&id) {
            continue;
        }
        let name = &graph.value(id).name;
        let frozen = freeze.iter().find(|pattern| matches(pattern, name)).map(|p| format!("frozen by {p:?}"));
        match frozen.or_else(|| why_constant(graph, id, tensor)) {
            Some(reason) => report.refusals.push(Refusal { node: name.clone(), reason }),
            None => trained.push(id),
        }
    }
    trained
}

/// The initializers that BatchNormalization nodes read as mean and variance.
fn running_statistics(graph: &Graph) -> Vec<ValueId> {
    graph
        .nodes()
        .filter(|(_, node)| node.op == "BatchNormalization" && node.domain.is_empty())
        .flat_map(|(_, node)| node.inputs.iter().skip(3).take(2).flatten().copied())
        .filter(|v| graph.value(*v).constant().is_some())
        .collect()
}

impl Draft {
    pub(crate) fn enter_training_mode(&mut self, graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
        self.running = lower_batch_norm(graph, report)?;
        lower_dropout(graph, &Randomness { seed: self.seed, step: self.inputs.step }, report)
    }

    /// Adds the gradients; parameters that the loss does not depend on stop being trained.
    pub(crate) fn differentiate(&mut self, graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
        // Passes before may have put another value in the loss's place, but it stays the first output.
        let Some(loss) = graph.outputs().first().copied() else {
            return Err(PassError::Option { option: "loss", problem: "is no output of the graph".to_owned() });
        };
        let gradients = gradient::differentiate(graph, loss, &self.trained)?;
        let mut trained = Vec::new();
        for (parameter, gradient) in std::mem::take(&mut self.trained).into_iter().zip(gradients) {
            match gradient {
                Some(gradient) => {
                    trained.push(parameter);
                    self.gradients.push(gradient);
                }
                None => {
                    let name = &graph.value(parameter).name;
                    let reason = "the loss does not depend on it".to_owned();
                    report.refusals.push(Refusal { node: name.clone(), reason });
                    let kept = graph.inputs().iter().copied().filter(|v| *v != parameter).collect();
                    graph.set_inputs(kept);
                }
            }
        }
        self.trained = trained;
        if self.trained.is_empty() {
            let problem = "nothing is left to train: the loss depends on no float initializer that is not frozen";
            return Err(PassError::Option { option: "freeze", problem: problem.to_owned() });
        }
        Ok(())
    }

    /// Makes the loss and the gradients the graph's outputs, and parameters and statistics constants again. Returns the
    /// names of the batch's inputs and of the parameters.
    pub(crate) fn expose(self, graph: &mut Graph) -> (Vec<String>, Vec<String>) {
        let outputs = graph.outputs().first().copied().into_iter().chain(self.gradients).collect();
        graph.set_outputs(outputs);
        let given = graph.inputs().iter().copied();
        let given = given.filter(|v| graph.value(*v).constant().is_none() && *v != self.inputs.learning_rate);
        let is_read =
            |v: &ValueId| ![self.inputs.step, self.seed].contains(v) || !graph.value(*v).consumers().is_empty();
        let given = given.filter(is_read).collect();
        graph.set_inputs(given);
        let names = self.trained.iter().map(|v| graph.value(*v).name.clone()).collect();
        (self.batch_inputs, names)
    }

    /// Adds clipping, updates and running statistics.
    pub(crate) fn update(
        self,
        graph: &mut Graph,
        options: &TrainingOptions,
        report: &mut Report,
    ) -> Result<Interface, PassError> {
        let mut scale = None;
        if let Some(norm_max) = options.clip_norm {
            let (norm, factor) = optimizer::clip(graph, &self.gradients, norm_max)?;
            graph.rename(norm, GRADIENT_NORM)?;
            graph.push_output(norm);
            scale = Some(factor);
        }
        let outputs = graph.outputs().iter().map(|v| graph.value(*v).name.clone()).collect();
        let mut state = Vec::new();
        for (parameter, gradient) in self.trained.iter().zip(&self.gradients) {
            let value = graph.value(*parameter);
            let Some(initial) = value.constant().cloned() else { continue };
            let decay = options.weight_decay.of(&value.name, initial.shape());
            report.change(format!("{} is updated, weight decay {decay}", value.name));
            let (optimizer, parameter) = (options.optimizer, (*parameter, &initial));
            let mut kept = optimizer::update(graph, optimizer, parameter, *gradient, &self.inputs, scale, decay)?;
            if let (true, Some(entry)) = (self.regressors.contains(&parameter.0), kept.first_mut()) {
                entry.role = StateRole::LossParameter;
            }
            state.extend(kept);
        }
        for (value, next) in &self.running {
            let value = graph.value(*value);
            let Some(initial) = value.constant().cloned() else { continue };
            let name = value.name.clone();
            state.push(keep_state(graph, name, initial, StateRole::RunningStatistic, *next)?);
        }
        Ok(Interface { state, batch_inputs: self.batch_inputs, outputs })
    }
}
