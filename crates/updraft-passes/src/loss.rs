//! Losses and metrics as nodes behind a model's output.

use updraft_graph::graph::TensorType;
use updraft_graph::op::{OpError, resolve_axis, show_shape};
use updraft_graph::{DType, Dim, Graph, Tensor, ValueId, ValueType};

use crate::PassError;

/// What training makes small. Every loss reads the model's output and one more graph input, the target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// Cross-entropy of logits against integer labels, the mean over labels that count; see
    /// [`updraft_graph::op::cross_entropy`]. Against distributions over classes, the mean over rows.
    CrossEntropy(CrossEntropy),
    /// Mean of the squared differences from a target of the output's shape (`torch.nn.MSELoss`).
    MeanSquaredError,
    /// Kullback-Leibler divergence of the softmax of the output, a student's logits, from that of the target, a
    /// teacher's logits of the same shape; classes along the last axis. Both logits are divided by the temperature
    /// `T`; the loss is `T^2` times the mean over rows of `sum p_teacher (log p_teacher - log p_student)` (Hinton,
    /// Vinyals and Dean, "Distilling the knowledge in a neural network", section 2).
    KullbackLeibler {
        /// Above 0; 1 compares the distributions as they are.
        temperature: f32,
    },
}

/// Settings of the cross-entropy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropy {
    /// Share of the target that is spread evenly over all classes, in [0, 1].
    pub label_smoothing: f32,
    /// A label that does not count.
    pub ignore_index: i64,
    /// The axis of classes: -1 for `[N, C]` and `[B, T, V]`, 1 for pictures of classes `[N, C, H, W]`.
    pub class_axis: i64,
    /// What the target holds.
    pub targets: Targets,
}

/// What a cross-entropy compares logits with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Targets {
    /// One class for each row, as integers.
    Classes,
    /// The probability of each class, as numbers of the shape of the logits: what mixing samples makes of labels.
    Distributions,
}

impl Default for CrossEntropy {
    /// No smoothing, classes last, and PyTorch's ignored label.
    fn default() -> CrossEntropy {
        CrossEntropy { label_smoothing: 0.0, ignore_index: -100, class_axis: -1, targets: Targets::Classes }
    }
}

/// A number about one batch, beside the loss. Sums of numbers of batches are numbers of the data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Metric {
    /// How many labels are the class with the highest logit; `i64`. Ignored labels are never.
    Correct,
    /// How many labels count, that is, are not ignored; `i64`.
    Count,
}

impl Metric {
    /// The name of the graph output.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Correct => "correct",
            Metric::Count => "count",
        }
    }
}

/// Adds the target input and the loss of `output`; returns the target and the loss, a scalar.
pub(crate) fn attach(
    graph: &mut Graph,
    loss: Loss,
    output: ValueId,
    target_name: &str,
) -> Result<(ValueId, ValueId), PassError> {
    let shape = graph.shape(output).ok_or_else(|| PassError::value(graph, output, "has no known rank"))?.to_vec();
    match loss {
        Loss::CrossEntropy(settings) => {
            let axis = class_axis(graph, output, &shape, settings)?;
            if settings.targets == Targets::Distributions {
                let target = like_output(graph, output, target_name)?;
                return Ok((target, cross_entropy_of_distributions(graph, settings, output, axis, target)?));
            }
            let mut label_shape = shape.clone();
            label_shape.remove(axis);
            let labels = graph.add_input(target_name, ValueType::tensor(DType::I64, label_shape))?;
            Ok((labels, cross_entropy(graph, settings, output, axis, labels)?))
        }
        Loss::MeanSquaredError => {
            let target = like_output(graph, output, target_name)?;
            Ok((target, mean_squared(graph, output, target)?))
        }
        Loss::KullbackLeibler { temperature } => {
            if temperature.is_nan() || temperature <= 0.0 {
                let problem = format!("must be above 0, found {temperature}");
                return Err(PassError::Option { option: "loss.temperature", problem });
            }
            let teacher = like_output(graph, output, target_name)?;
            let last = shape.len().saturating_sub(1);
            let loss = divergence(graph, output, teacher, last, f64::from(temperature))?;
            Ok((teacher, loss))
        }
    }
}

/// Adds one metric and returns its value.
pub(crate) fn measure(
    graph: &mut Graph,
    metric: Metric,
    loss: Loss,
    output: ValueId,
    target: ValueId,
) -> Result<ValueId, PassError> {
    let settings = match loss {
        Loss::CrossEntropy(settings) if settings.targets == Targets::Classes => settings,
        _ => {
            let problem = format!("{:?} needs labels, which only the cross-entropy of classes has", metric.name());
            return Err(PassError::Option { option: "metrics", problem });
        }
    };
    let ignored = graph.add_constant("ignore_index", Tensor::scalar(settings.ignore_index));
    let ignored = graph.op("Equal", &[target, ignored], [])?;
    let counted = graph.op("Not", &[ignored], [])?;
    let hits = match metric {
        Metric::Count => counted,
        Metric::Correct => {
            let best =
                graph.op("ArgMax", &[output], [("axis", settings.class_axis.into()), ("keepdims", 0i64.into())])?;
            let hit = graph.op("Equal", &[best, target], [])?;
            graph.op("And", &[hit, counted], [])?
        }
    };
    let ones = graph.op("Cast", &[hits], [("to", (DType::I64 as i64).into())])?;
    Ok(graph.op("ReduceSum", &[ones], [("keepdims", 0i64.into())])?)
}

/// The axis of classes, which must be the second or the last.
pub(crate) fn class_axis(
    graph: &Graph,
    output: ValueId,
    shape: &[Dim],
    settings: CrossEntropy,
) -> Result<usize, PassError> {
    let refuse = || {
        let problem = format!(
            "must be the second or the last of at least 2 axes, found {} of {}",
            settings.class_axis,
            show_shape(shape)
        );
        Err(PassError::value(graph, output, format!("cannot be logits: the axis of classes {problem}")))
    };
    match resolve_axis(settings.class_axis, shape.len()) {
        Ok(axis) if shape.len() >= 2 && (axis == 1 || axis == shape.len() - 1) => Ok(axis),
        _ => refuse(),
    }
}

fn check_smoothing(settings: CrossEntropy) -> Result<(), PassError> {
    if (0.0..=1.0).contains(&settings.label_smoothing) {
        return Ok(());
    }
    let problem = format!("must be in [0, 1], found {}", settings.label_smoothing);
    Err(PassError::Option { option: "loss.label_smoothing", problem })
}

/// The mean over rows of `-sum p log softmax(logits)`, as `torch.nn.CrossEntropyLoss` has it for targets that are
/// probabilities.
fn cross_entropy_of_distributions(
    graph: &mut Graph,
    settings: CrossEntropy,
    logits: ValueId,
    axis: usize,
    mut target: ValueId,
) -> Result<ValueId, PassError> {
    check_smoothing(settings)?;
    if settings.label_smoothing > 0.0 {
        let smoothing = f64::from(settings.label_smoothing);
        let unknown = || PassError::value(graph, logits, "has an unknown number of classes, which smoothing needs");
        let classes = graph.shape(logits).and_then(|s| s[axis].known()).ok_or_else(unknown)?;
        let kept = scalar_like(graph, 1.0 - smoothing, logits)?;
        let spread = scalar_like(graph, smoothing / classes as f64, logits)?;
        let kept = graph.op("Mul", &[target, kept], [])?;
        target = graph.op("Add", &[kept, spread], [])?;
    }
    let axis_attribute = [("axis", (axis as i64).into())];
    let log_probabilities = graph.op("LogSoftmax", &[logits], axis_attribute)?;
    let terms = graph.op("Mul", &[target, log_probabilities], [])?;
    let axes = graph.add_constant("axes", Tensor::vector(&[axis as i64]));
    let rows = graph.op("ReduceSum", &[terms, axes], [("keepdims", 0i64.into())])?;
    let mean = graph.op("ReduceMean", &[rows], [("keepdims", 0i64.into())])?;
    Ok(graph.op("Neg", &[mean], [])?)
}

fn cross_entropy(
    graph: &mut Graph,
    settings: CrossEntropy,
    mut logits: ValueId,
    axis: usize,
    mut labels: ValueId,
) -> Result<ValueId, PassError> {
    check_smoothing(settings)?;
    // The operator has classes second; with classes last, all axes before them are rows.
    if axis != 1 {
        logits = graph.op("Flatten", &[logits], [("axis", (axis as i64).into())])?;
        let all = graph.add_constant("shape", Tensor::vector(&[-1i64]));
        labels = graph.op("Reshape", &[labels, all], [])?;
    }
    let attributes =
        [("label_smoothing", settings.label_smoothing.into()), ("ignore_index", settings.ignore_index.into())];
    Ok(graph.own_op("CrossEntropyLoss", &[logits, labels], attributes)?)
}

/// A graph input of the type and shape of the model's output.
fn like_output(graph: &mut Graph, output: ValueId, name: &str) -> Result<ValueId, PassError> {
    let value = graph.value(output);
    let ty = TensorType { dtype: value.ty.dtype(), shape: value.ty.shape().map(<[Dim]>::to_vec) };
    Ok(graph.add_input(name, ValueType::Tensor(ty))?)
}

/// The mean of the squared differences of two values of one shape.
pub(crate) fn mean_squared(graph: &mut Graph, a: ValueId, b: ValueId) -> Result<ValueId, PassError> {
    let difference = graph.op("Sub", &[a, b], [])?;
    let square = graph.op("Mul", &[difference, difference], [])?;
    Ok(graph.op("ReduceMean", &[square], [("keepdims", 0i64.into())])?)
}

/// `T^2` times the mean over rows of the divergence of the softmax of a student's logits from that of a teacher's, both
/// divided by the temperature `T` first, classes along `axis`.
pub(crate) fn divergence(
    graph: &mut Graph,
    student: ValueId,
    teacher: ValueId,
    axis: usize,
    temperature: f64,
) -> Result<ValueId, PassError> {
    let inverse = scalar_like(graph, 1.0 / temperature, student)?;
    let mut log_softmax = |logits: ValueId| {
        let scaled = graph.op("Mul", &[logits, inverse], [])?;
        graph.op("LogSoftmax", &[scaled], [("axis", (axis as i64).into())])
    };
    let (log_student, log_teacher) = (log_softmax(student)?, log_softmax(teacher)?);
    let teacher = graph.op("Exp", &[log_teacher], [])?;
    let mean = mean_divergence(graph, (log_student, log_teacher), teacher, axis)?;
    let square = scalar_like(graph, temperature * temperature, mean)?;
    Ok(graph.op("Mul", &[mean, square], [])?)
}

/// The mean over rows of `sum p_teacher (log p_teacher - log p_student)`, probabilities along `axis`.
pub(crate) fn mean_divergence(
    graph: &mut Graph,
    (log_student, log_teacher): (ValueId, ValueId),
    teacher: ValueId,
    axis: usize,
) -> Result<ValueId, PassError> {
    let difference = graph.op("Sub", &[log_teacher, log_student], [])?;
    let terms = graph.op("Mul", &[teacher, difference], [])?;
    let axis = graph.add_constant("axes", Tensor::vector(&[axis as i64]));
    let rows = graph.op("ReduceSum", &[terms, axis], [("keepdims", 0i64.into())])?;
    Ok(graph.op("ReduceMean", &[rows], [("keepdims", 0i64.into())])?)
}

/// A constant scalar of the element type of `like`.
pub(crate) fn scalar_like(graph: &mut Graph, value: f64, like: ValueId) -> Result<ValueId, PassError> {
    let dtype = graph.dtype(like).ok_or_else(|| PassError::value(graph, like, "has no known element type"))?;
    let tensor = Tensor::from_f64(dtype, &[], &[value]).map_err(OpError::from)?;
    Ok(graph.add_constant("constant", tensor))
}
