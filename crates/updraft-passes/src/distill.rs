//! Distillation: a student that learns from a teacher's answers, and from what the teacher computes on the way.
//!
//! The teacher becomes a part of the student's training step. Its nodes are copied in with a prefix before their names,
//! read the same inputs, and are in the form for inference; nothing of it is trained, so no gradient flows into it. The
//! loss is `(1 - a) task + a soft + sum of w match`, where `task` is the loss against labels, `soft` the divergence of
//! the student's output from the teacher's, and each `match` the distance of two named values.

use std::collections::HashMap;

use updraft_graph::infer::infer_node;
use updraft_graph::op::{OpError, show_shape};
use updraft_graph::{Graph, Node, ValueId, ValueType};

use crate::loss::{self, Loss, class_axis, divergence, mean_squared, scalar_like};
use crate::rewrite::has_subgraph;
use crate::train_mode::freeze_batch_norm;
use crate::training::TrainingOptions;
use crate::{PassError, pipeline};

mod matching;

pub use matching::{Match, MatchKind};

/// What a student learns from a teacher.
#[derive(Debug, Clone, PartialEq)]
pub struct Distillation {
    /// The teacher: any model. It stays as it is.
    pub teacher: Graph,
    /// Share `a` of the teacher's answers in the loss, in [0, 1]; the labels have the rest. With 1, a step reads no
    /// labels.
    pub alpha: f32,
    /// What both logits are divided by before they are compared, above 0: the higher, the more the classes count that
    /// the teacher thinks unlikely.
    pub temperature: f32,
    /// Whether there are no labels for evaluation either, which then measures the distance from the teacher. Needs an
    /// `alpha` of 1.
    pub label_free: bool,
    /// The teacher's output that the student's is compared with; the first where there is no name.
    pub output: Option<String>,
    /// Names of teacher inputs and the student inputs that they read. Other inputs read those of the same name; the
    /// only input of a teacher reads the only input of a student whatever their names; and what is left becomes an
    /// input of the step, for the data to fill.
    pub inputs: Vec<(String, String)>,
    /// Values to bring together.
    pub matches: Vec<Match>,
}

impl Distillation {
    /// The teacher's answers at temperature 4 with a share of 0.9, and labels for the rest: the weights of common use
    /// (Tian et al., "Contrastive representation distillation", with its published code).
    pub fn new(teacher: Graph) -> Distillation {
        Distillation {
            teacher,
            alpha: 0.9,
            temperature: 4.0,
            label_free: false,
            output: None,
            inputs: Vec::new(),
            matches: Vec::new(),
        }
    }

    /// The teacher's answers alone: no labels are read, in training or evaluation.
    pub fn label_free(teacher: Graph) -> Distillation {
        Distillation { alpha: 1.0, label_free: true, ..Distillation::new(teacher) }
    }

    fn check(&self) -> Result<(), PassError> {
        let refuse = |option, problem: String| Err(PassError::Option { option, problem });
        if !(0.0..=1.0).contains(&self.alpha) {
            return refuse("distillation.alpha", format!("must be in [0, 1], found {}", self.alpha));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return refuse("distillation.temperature", format!("must be above 0, found {}", self.temperature));
        }
        if self.label_free && self.alpha != 1.0 {
            let problem = format!("must be 1 without labels, found {}", self.alpha);
            return refuse("distillation.alpha", problem);
        }
        match self.matches.iter().find(|m| !(m.weight > 0.0 && m.weight.is_finite())) {
            Some(m) => refuse("distillation.matches", format!("must have weights above 0, found {}", m.weight)),
            None => Ok(()),
        }
    }
}

/// What a loss adds to a graph.
pub(crate) struct Attached {
    pub(crate) loss: ValueId,
    /// The labels, where they are read.
    pub(crate) target: Option<ValueId>,
    /// Parameters of the loss itself, which are trained with the model and belong to no model.
    pub(crate) regressors: Vec<ValueId>,
}

/// What a loss is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Training,
    Evaluation,
}

/// Adds the teacher and the loss of `output`, an output of the student.
pub(crate) fn attach(
    graph: &mut Graph,
    distillation: &Distillation,
    options: &TrainingOptions,
    output: ValueId,
    purpose: Purpose,
) -> Result<Attached, PassError> {
    distillation.check()?;
    // What the labels say is what evaluation measures wherever there are labels.
    if purpose == Purpose::Evaluation && !distillation.label_free {
        let (target, loss) = loss::attach(graph, options.loss, output, &options.target)?;
        return Ok(Attached { loss, target: Some(target), regressors: Vec::new() });
    }
    // A regressor is not part of the model, so evaluation has none to match by.
    let matches = if purpose == Purpose::Training { distillation.matches.as_slice() } else { &[] };
    let students: Vec<ValueId> =
        matches.iter().map(|m| value_of(graph, &m.student, "student")).collect::<Result<_, _>>()?;
    let joined = join(graph, distillation, matches)?;
    let Some((teacher, teachers)) = joined.split_first() else {
        return Err(PassError::Option { option: "distillation.output", problem: "is missing".to_owned() });
    };
    let alpha = f64::from(distillation.alpha);
    let (mut terms, mut target, mut regressors) = (Vec::new(), None, Vec::new());
    if alpha < 1.0 {
        let (labels, task) = loss::attach(graph, options.loss, output, &options.target)?;
        target = Some(labels);
        terms.push((task, 1.0 - alpha));
    }
    if alpha > 0.0 {
        let soft = soft_loss(graph, options.loss, output, *teacher, f64::from(distillation.temperature))?;
        terms.push((soft, alpha));
    }
    for ((matching, student), teacher) in matches.iter().zip(students).zip(teachers) {
        let (distance, regressor) = matching.attach(graph, student, *teacher)?;
        terms.push((distance, f64::from(matching.weight)));
        regressors.extend(regressor);
    }
    Ok(Attached { loss: weighted_sum(graph, &terms)?, target, regressors })
}

fn value_of(graph: &Graph, name: &str, whose: &str) -> Result<ValueId, PassError> {
    graph.find(name).ok_or_else(|| {
        let near = updraft_base::nearest(name, graph.values().map(|(_, v)| v.name.as_str()));
        let near = near.map(|n| format!(", did you mean {n:?}?")).unwrap_or_default();
        PassError::Value { name: name.to_owned(), problem: format!("is no value of the {whose}{near}") }
    })
}

/// The distance of the student's output from the teacher's: what the loss against labels is for answers that are
/// distributions.
fn soft_loss(
    graph: &mut Graph,
    loss: Loss,
    student: ValueId,
    teacher: ValueId,
    temperature: f64,
) -> Result<ValueId, PassError> {
    same_shape(graph, student, teacher)?;
    let shape = graph.shape(student).ok_or_else(|| PassError::value(graph, student, "has no known rank"))?.to_vec();
    match loss {
        Loss::CrossEntropy(settings) => {
            let axis = class_axis(graph, student, &shape, settings)?;
            divergence(graph, student, teacher, axis, temperature)
        }
        Loss::MeanSquaredError => mean_squared(graph, student, teacher),
        Loss::KullbackLeibler { .. } => {
            let problem = "is a divergence from a teacher's logits in the data; with a teacher at hand it must be that \
                           of the labels";
            Err(PassError::Option { option: "loss", problem: problem.to_owned() })
        }
    }
}

/// Refuses values whose known sizes differ.
fn same_shape(graph: &Graph, student: ValueId, teacher: ValueId) -> Result<(), PassError> {
    let (Some(a), Some(b)) = (graph.shape(student), graph.shape(teacher)) else {
        return Err(PassError::value(graph, teacher, "has no known rank, so it cannot be compared"));
    };
    if a.len() == b.len() && a.iter().zip(b).all(|(a, b)| !a.differs(b)) {
        return Ok(());
    }
    let problem =
        format!("is {} but {:?} of the teacher is {}", show_shape(a), graph.value(teacher).name, show_shape(b));
    Err(PassError::value(graph, student, problem))
}

/// The sum of terms times their weights.
fn weighted_sum(graph: &mut Graph, terms: &[(ValueId, f64)]) -> Result<ValueId, PassError> {
    let mut sum = None;
    for (term, weight) in terms {
        let mut term = *term;
        if *weight != 1.0 {
            let weight = scalar_like(graph, *weight, term)?;
            term = graph.op("Mul", &[term, weight], [])?;
        }
        sum = Some(match sum {
            Some(sum) => graph.op("Add", &[sum, term], [])?,
            None => term,
        });
    }
    let problem = "leave nothing to learn from: neither labels, nor the teacher's answers, nor matches";
    sum.ok_or_else(|| PassError::Option { option: "distillation.alpha", problem: problem.to_owned() })
}

/// Copies the teacher into the graph; returns its output and then the values of the matches.
fn join(graph: &mut Graph, distillation: &Distillation, matches: &[Match]) -> Result<Vec<ValueId>, PassError> {
    let teacher = frozen(distillation, matches)?;
    let mut values = HashMap::new();
    for input in teacher.inputs() {
        let read = input_for(graph, distillation, &teacher, *input)?;
        values.insert(*input, read);
    }
    for (domain, version) in &teacher.opsets {
        graph.opsets.entry(domain.clone()).or_insert(*version);
    }
    for id in teacher.order()? {
        let node = teacher.node(id);
        if has_subgraph(node) {
            let source = OpError::unsupported("a node with subgraphs in a teacher");
            return Err(PassError::Node { node: format!("{PREFIX}{}", node.label(&teacher)), source });
        }
        let mut image = |graph: &mut Graph, v: ValueId| {
            *values.entry(v).or_insert_with(|| {
                let value = teacher.value(v);
                let name = format!("{PREFIX}{}", value.name);
                match value.constant() {
                    Some(tensor) => graph.add_constant(&name, tensor.clone()),
                    // Inference says what it is for the student's inputs; symbols of the teacher mean nothing here.
                    None => graph.fresh_value(&name, ValueType::Unknown),
                }
            })
        };
        let mut map = |list: &[Option<ValueId>]| list.iter().map(|v| v.map(|v| image(graph, v))).collect();
        let (inputs, outputs) = (map(&node.inputs), map(&node.outputs));
        let name = if node.name.is_empty() { String::new() } else { format!("{PREFIX}{}", node.name) };
        let id = graph.add_node(Node { name, inputs, outputs, ..node.clone() })?;
        infer_node(graph, id).map_err(|e| PassError::node(graph, id, e))?;
    }
    let missing = |v: &ValueId| PassError::value(&teacher, *v, "is computed by nothing in the teacher");
    teacher.outputs().iter().map(|v| values.get(v).copied().ok_or_else(|| missing(v))).collect()
}

/// What the names of the teacher's values and nodes begin with in a step.
const PREFIX: &str = "teacher.";

/// The teacher in the form for inference, its outputs the one to learn from and then the values of the matches.
fn frozen(distillation: &Distillation, matches: &[Match]) -> Result<Graph, PassError> {
    let mut teacher = distillation.teacher.clone();
    let output = match &distillation.output {
        Some(name) => value_of(&teacher, name, "teacher")?,
        None => teacher.outputs().first().copied().ok_or_else(|| PassError::Option {
            option: "distillation.output",
            problem: "cannot be the first one: the teacher has no outputs".to_owned(),
        })?,
    };
    let mut outputs = vec![output];
    for matching in matches {
        outputs.push(value_of(&teacher, &matching.teacher, "teacher")?);
    }
    teacher.set_outputs(outputs);
    // Defaults of inputs are what a teacher runs with.
    let inputs = teacher.inputs().iter().copied().filter(|v| teacher.value(*v).constant().is_none()).collect();
    teacher.set_inputs(inputs);
    pipeline::inference(&mut teacher).map_err(|e| PassError::Teacher(Box::new(e)))?;
    freeze_batch_norm(&mut teacher)?;
    Ok(teacher)
}

/// The value of the step that an input of the teacher reads.
fn input_for(
    graph: &mut Graph,
    distillation: &Distillation,
    teacher: &Graph,
    input: ValueId,
) -> Result<ValueId, PassError> {
    let name = &teacher.value(input).name;
    let own: Vec<ValueId> = graph.inputs().iter().copied().filter(|v| graph.value(*v).constant().is_none()).collect();
    let named = |wanted: &str| own.iter().copied().find(|v| graph.value(*v).name == wanted);
    let found = match distillation.inputs.iter().find(|(from, _)| from == name) {
        Some((_, to)) => Some(named(to).ok_or_else(|| PassError::Option {
            option: "distillation.inputs",
            problem: format!("lead from {name:?} to {to:?}, which is no input of the student"),
        })?),
        None => named(name).or_else(|| match (teacher.inputs(), own.as_slice()) {
            ([_], [only]) => Some(*only),
            _ => None,
        }),
    };
    let Some(found) = found else { return Ok(graph.add_input(name, teacher.value(input).ty.clone())?) };
    let (a, b) = (graph.value(found), teacher.value(input));
    let fits = match (a.ty.shape(), b.ty.shape()) {
        (Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| !a.differs(b)),
        _ => true,
    };
    if !fits || a.ty.dtype() != b.ty.dtype() {
        let show = |ty: &ValueType| {
            format!(
                "{}{}",
                ty.dtype().map(|d| d.to_string()).unwrap_or_default(),
                show_shape(ty.shape().unwrap_or_default())
            )
        };
        let problem = format!("is {} for the student but {:?} of the teacher is {}", show(&a.ty), b.name, show(&b.ty));
        return Err(PassError::value(graph, found, problem));
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
