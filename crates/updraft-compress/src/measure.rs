//! What a model gets right, sample by sample.
//!
//! Scores are kept for each sample and not only in sum, because models are compared by pairs on the same samples
//! ([`crate::interval`]). They are computed from the model's outputs here, in doubles and in one order, so that whatever
//! made the outputs (an engine, an emulation of other hardware) is judged alike.

use serde::{Deserialize, Serialize};
use updraft_data::Batch;
use updraft_engine::{CompileOptions, Engine, Session};
use updraft_graph::{Graph, Tensor};
use updraft_passes::loss::{CrossEntropy, Loss};
use updraft_passes::pipeline;
use updraft_train::evaluate::select;

use crate::error::CompressError;
use crate::interval::{self, Interval};

/// What a model is for: the output that counts, and what it is compared with.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// How far an output is from its target.
    pub loss: Loss,
    /// The model's output; the first where there is no name.
    pub output: Option<String>,
    /// The dataset's tensor that is the target.
    pub target: String,
}

/// What a drop is a drop of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The share of labels that have the highest logit; a drop of 0.01 is one point.
    Accuracy,
    /// `exp` of the mean cross-entropy; a drop of 0.01 is a rise of the perplexity by 1 %.
    Perplexity,
    /// The mean loss; a drop of 0.01 is a rise by 1 %.
    Loss,
}

/// Scores of some samples, in their order.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// The mean loss over each sample's labels that count, or over its elements.
    pub losses: Vec<f64>,
    /// How many of each sample's labels had the highest logit; empty where there are no labels.
    pub correct: Vec<u32>,
    /// How many of each sample's labels count; empty where there are no labels.
    pub labels: Vec<u32>,
}

impl Metric {
    /// What suits a task: accuracy for one label a sample, perplexity for sequences of labels, else the loss.
    pub fn of(task: &Task, model: &Graph) -> Metric {
        let rank = task.output_of(model).and_then(|v| model.shape(v)).map(<[_]>::len);
        match (task.loss, rank) {
            (Loss::CrossEntropy(_), Some(2)) => Metric::Accuracy,
            (Loss::CrossEntropy(_), _) => Metric::Perplexity,
            _ => Metric::Loss,
        }
    }

    /// The metric itself.
    pub fn value(self, scores: &Scores) -> f64 {
        let mean = scores.losses.iter().sum::<f64>() / scores.losses.len() as f64;
        match self {
            Metric::Accuracy => {
                let sum = |counts: &[u32]| counts.iter().map(|c| u64::from(*c)).sum::<u64>() as f64;
                sum(&scores.correct) / sum(&scores.labels)
            }
            Metric::Perplexity => mean.exp(),
            Metric::Loss => mean,
        }
    }

    /// How much worse a candidate is than the original on the same samples, with confidence `1 - alpha`; negative where
    /// it is better.
    pub fn drop(self, original: &Scores, candidate: &Scores, alpha: f64) -> Interval {
        let n = original.losses.len().min(candidate.losses.len());
        let pairs = || original.correct.iter().zip(&candidate.correct).take(n);
        match self {
            Metric::Accuracy if original.labels.iter().all(|l| *l == 1) => {
                let lost = pairs().filter(|(a, b)| a > b).count() as u64;
                let gained = pairs().filter(|(a, b)| a < b).count() as u64;
                interval::paired_shares(lost, gained, n as u64, alpha)
            }
            Metric::Accuracy => {
                let share = |count: u32, labels: u32| f64::from(count) / f64::from(labels.max(1));
                let differences: Vec<f64> =
                    pairs().zip(&original.labels).map(|((a, b), l)| share(*a, *l) - share(*b, *l)).collect();
                interval::mean(&differences, alpha)
            }
            Metric::Perplexity => {
                let differences: Vec<f64> = original.losses.iter().zip(&candidate.losses).map(|(a, b)| b - a).collect();
                let rise = interval::mean(&differences, alpha);
                Interval { estimate: rise.estimate.exp_m1(), low: rise.low.exp_m1(), high: rise.high.exp_m1() }
            }
            Metric::Loss => interval::relative_rise(&original.losses[..n], &candidate.losses[..n], alpha),
        }
    }

    /// What reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Accuracy => "accuracy",
            Metric::Perplexity => "perplexity",
            Metric::Loss => "loss",
        }
    }
}

impl Task {
    fn output_of(&self, model: &Graph) -> Option<updraft_graph::ValueId> {
        match &self.output {
            Some(name) => model.find(name),
            None => model.outputs().first().copied(),
        }
    }
}

impl Scores {
    /// The number of samples.
    pub fn len(&self) -> usize {
        self.losses.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.losses.is_empty()
    }

    /// The scores of the first samples.
    pub fn first(&self, samples: usize) -> Scores {
        let cut = |counts: &[u32]| counts[..samples.min(counts.len())].to_vec();
        Scores {
            losses: self.losses[..samples.min(self.len())].to_vec(),
            correct: cut(&self.correct),
            labels: cut(&self.labels),
        }
    }

    /// Adds the scores of the samples that follow.
    pub fn extend(&mut self, next: Scores) {
        self.losses.extend(next.losses);
        self.correct.extend(next.correct);
        self.labels.extend(next.labels);
    }

    /// Adds the scores of a batch: the model's output and the target that the batch holds. Padding counts for nothing.
    pub fn add(&mut self, task: &Task, batch: &Batch, output: &Output) -> Result<(), CompressError> {
        let target = batch.tensors.iter().find(|(name, _)| *name == task.target).map(|(_, t)| t);
        let target = target.ok_or_else(|| missing(&task.target, batch))?;
        let wrong = || CompressError::Shape {
            output: output.name.clone(),
            found: output.tensor.shape().to_vec(),
            target: task.target.clone(),
            expected: target.shape().to_vec(),
        };
        let values = output.values(batch)?;
        let samples = batch.samples.len();
        match task.loss {
            Loss::CrossEntropy(settings) => {
                let layout = Layout::new(output.tensor.shape(), settings.class_axis).ok_or_else(wrong)?;
                let labels = target.to_i64().map_err(|_| wrong())?;
                let rows = layout.outer * layout.inner;
                if labels.len() != rows || target.shape().first() != output.tensor.shape().first() {
                    return Err(wrong());
                }
                let per_sample = rows / target.shape()[0].max(1);
                for sample in 0..samples {
                    self.add_labels(task, &settings, &layout, &values, &labels, sample * per_sample, per_sample)?;
                }
            }
            Loss::MeanSquaredError => {
                let target = target.to_f64().map_err(|_| wrong())?;
                let per_sample = values.len() / output.tensor.shape().first().copied().unwrap_or(1).max(1);
                if target.len() != values.len() || per_sample == 0 {
                    return Err(wrong());
                }
                let squares = |range: std::ops::Range<usize>| -> f64 {
                    values[range.clone()].iter().zip(&target[range]).map(|(a, b)| (a - b).powi(2)).sum()
                };
                self.losses
                    .extend((0..samples).map(|s| squares(s * per_sample..(s + 1) * per_sample) / per_sample as f64));
            }
            Loss::KullbackLeibler { temperature } => {
                let target = target.to_f64().map_err(|_| wrong())?;
                if target.len() != values.len() {
                    return Err(wrong());
                }
                let classes = output.tensor.shape().last().copied().unwrap_or(1).max(1);
                let t = f64::from(temperature);
                let scale = |v: &[f64]| -> Vec<f64> { v.iter().map(|x| x / t).collect() };
                let per_sample = values.len() / output.tensor.shape().first().copied().unwrap_or(1).max(1);
                let rows: Vec<f64> = scale(&target)
                    .chunks_exact(classes)
                    .zip(scale(&values).chunks_exact(classes))
                    .map(|(p, q)| t * t * divergence(p, q))
                    .collect();
                let rows_per_sample = per_sample / classes;
                self.losses.extend((0..samples).map(|s| {
                    let rows = &rows[s * rows_per_sample..(s + 1) * rows_per_sample];
                    rows.iter().sum::<f64>() / rows.len() as f64
                }));
            }
        }
        Ok(())
    }

    /// Adds one sample whose labels start at `first`.
    fn add_labels(
        &mut self,
        task: &Task,
        settings: &CrossEntropy,
        layout: &Layout,
        values: &[f64],
        labels: &[i64],
        first: usize,
        count: usize,
    ) -> Result<(), CompressError> {
        let (mut loss, mut correct, mut counted) = (0.0, 0, 0);
        let mut row = vec![0.0; layout.classes];
        for i in first..first + count {
            let label = labels[i];
            if label == settings.ignore_index {
                continue;
            }
            let wrong = || CompressError::Label { label, target: task.target.clone(), classes: layout.classes };
            let class = usize::try_from(label).ok().filter(|c| *c < layout.classes).ok_or_else(wrong)?;
            layout.read(values, i, &mut row);
            loss += log_sum_exp(&row) - row[class];
            // The first of equal logits wins, as in ArgMax.
            let best = (1..row.len()).fold(0, |best, c| if row[c] > row[best] { c } else { best });
            correct += u32::from(best == class);
            counted += 1;
        }
        self.losses.push(if counted == 0 { 0.0 } else { loss / f64::from(counted) });
        self.correct.push(correct);
        self.labels.push(counted);
        Ok(())
    }
}

/// The output of a model for a batch.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its name.
    pub name: String,
    /// Its value.
    pub tensor: Tensor,
}

impl Output {
    /// The elements, all of which must be finite but for padding.
    fn values(&self, batch: &Batch) -> Result<Vec<f64>, CompressError> {
        let values = self
            .tensor
            .to_f64()
            .map_err(|e| CompressError::Setting { setting: "output", problem: format!("{}: {e}", self.name) })?;
        let per_row = values.len() / self.tensor.shape().first().copied().unwrap_or(1).max(1);
        let real = per_row * batch.samples.len();
        match values.iter().take(real).position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(at) => Err(CompressError::NotFinite {
                output: self.name.clone(),
                value: values[at],
                sample: batch.samples[at / per_row.max(1)],
            }),
        }
    }

    /// The mean over a batch's rows of the divergence of another output's softmax from this one's, and the number of rows.
    /// Classes lie along the last axis.
    pub fn divergence_sum(&self, other: &Output, batch: &Batch) -> Result<(f64, u64), CompressError> {
        let (own, others) = (self.values(batch)?, other.values(batch)?);
        let classes = self.tensor.shape().last().copied().unwrap_or(1).max(1);
        if self.tensor.shape() != other.tensor.shape() {
            return Err(CompressError::Shape {
                output: other.name.clone(),
                found: other.tensor.shape().to_vec(),
                target: self.name.clone(),
                expected: self.tensor.shape().to_vec(),
            });
        }
        let per_row = own.len() / self.tensor.shape().first().copied().unwrap_or(1).max(1);
        let real = per_row * batch.samples.len();
        let rows = own[..real].chunks_exact(classes).zip(others[..real].chunks_exact(classes));
        let sum = rows.map(|(p, q)| divergence(p, q)).sum();
        Ok((sum, (real / classes) as u64))
    }

    /// The sum over a batch's elements of the squared difference from another output, and of the squares of this one: what
    /// stands for the divergence where outputs are no logits.
    pub fn squares(&self, other: &Output, batch: &Batch) -> Result<(f64, f64), CompressError> {
        let (own, others) = (self.values(batch)?, other.values(batch)?);
        let per_row = own.len() / self.tensor.shape().first().copied().unwrap_or(1).max(1);
        let real = per_row * batch.samples.len();
        let difference = own[..real].iter().zip(&others).map(|(a, b)| (a - b).powi(2)).sum();
        Ok((difference, own[..real].iter().map(|a| a * a).sum()))
    }
}

/// What makes outputs of batches: a session, or an emulation.
pub trait Answers {
    /// The model's output that counts, for a batch.
    fn answer(&mut self, batch: &Batch) -> Result<Output, CompressError>;
}

/// A model on an engine.
pub struct Compiled {
    session: Box<dyn Session>,
    inputs: Vec<String>,
    output: String,
}

impl Compiled {
    /// Brings the model to its inference form and compiles it for its one output that counts.
    pub fn new(engine: &dyn Engine, model: &Graph, task: &Task) -> Result<Compiled, CompressError> {
        let (graph, output) = inference_form(model, task)?;
        let inputs = input_names(&graph);
        Ok(Compiled { session: engine.compile(&graph, &CompileOptions::default())?, inputs, output })
    }
}

impl Answers for Compiled {
    fn answer(&mut self, batch: &Batch) -> Result<Output, CompressError> {
        let outputs = self.session.run(&select(&batch.tensors, &self.inputs)?)?;
        let tensor = outputs.into_iter().next().ok_or_else(|| no_output(&self.output))?;
        Ok(Output { name: self.output.clone(), tensor })
    }
}

/// A model with its one output that counts, in the form that answers fastest, and the output's name.
pub fn inference_form(model: &Graph, task: &Task) -> Result<(Graph, String), CompressError> {
    let output = task.output_of(model).ok_or_else(|| no_output(task.output.as_deref().unwrap_or("")))?;
    let name = model.value(output).name.clone();
    let mut graph = model.clone();
    graph.set_outputs(vec![output]);
    pipeline::inference(&mut graph)?;
    Ok((graph, name))
}

/// Names of the inputs that must be given.
pub fn input_names(graph: &Graph) -> Vec<String> {
    let inputs = graph.inputs().iter().map(|v| graph.value(*v));
    inputs.filter(|v| v.constant().is_none()).map(|v| v.name.clone()).collect()
}

fn no_output(name: &str) -> CompressError {
    CompressError::Setting { setting: "output", problem: format!("{name:?} is none of the model's") }
}

fn missing(name: &str, batch: &Batch) -> CompressError {
    let known: Vec<&str> = batch.tensors.iter().map(|(n, _)| n.as_str()).collect();
    let problem = format!("{name:?} is none of the dataset's tensors: {}", known.join(", "));
    CompressError::Setting { setting: "target", problem }
}

/// Logits as rows of classes along some axis.
struct Layout {
    outer: usize,
    classes: usize,
    inner: usize,
}

impl Layout {
    fn new(shape: &[usize], class_axis: i64) -> Option<Layout> {
        let rank = i64::try_from(shape.len()).ok()?;
        let axis = usize::try_from(if class_axis < 0 { class_axis + rank } else { class_axis }).ok()?;
        let classes = *shape.get(axis).filter(|c| **c > 0)?;
        Some(Layout { outer: shape[..axis].iter().product(), classes, inner: shape[axis + 1..].iter().product() })
    }

    /// The logits of label `index`, counted in row-major order without the class axis.
    fn read(&self, values: &[f64], index: usize, row: &mut [f64]) {
        let (outer, inner) = (index / self.inner, index % self.inner);
        for (class, logit) in row.iter_mut().enumerate() {
            *logit = values[(outer * self.classes + class) * self.inner + inner];
        }
    }
}

fn log_sum_exp(logits: &[f64]) -> f64 {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + logits.iter().map(|l| (l - most).exp()).sum::<f64>().ln()
}

/// `sum p (log p - log q)` of the softmaxes of two rows of logits.
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    let (p_sum, q_sum) = (log_sum_exp(p), log_sum_exp(q));
    let terms = p.iter().zip(q).map(|(p, q)| (p - p_sum).exp() * ((p - p_sum) - (q - q_sum)));
    // Rounding may leave a hair below zero.
    terms.sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(tensors: Vec<(&str, Tensor)>, samples: u64) -> Batch {
        let tensors = tensors.into_iter().map(|(n, t)| (n.to_owned(), t)).collect();
        Batch { step: 0, epoch: 0, tensors, samples: (0..samples).collect() }
    }

    fn output(tensor: Tensor) -> Output {
        Output { name: "logits".to_owned(), tensor }
    }

    fn task(loss: Loss) -> Task {
        Task { loss, output: None, target: "label".to_owned() }
    }

    #[test]
    fn labels_are_scored_and_padding_and_ignored_ones_are_not() {
        let logits = output(Tensor::new::<f32>(&[4, 2], &[0.0, 1.0, 2.0, 0.0, 1.0, 1.0, f32::NAN, 0.0]).unwrap());
        let batch = batch(vec![("label", Tensor::vector::<i64>(&[1, 1, -100, 0]))], 3);
        let mut scores = Scores::default();
        scores.add(&task(Loss::CrossEntropy(CrossEntropy::default())), &batch, &logits).unwrap();
        assert_eq!((scores.correct.as_slice(), scores.labels.as_slice()), ([1, 0, 0].as_slice(), [1, 1, 0].as_slice()));
        let expected = [(1.0 + (-1f64).exp()).ln(), 2.0 + (1.0 + (-2f64).exp()).ln(), 0.0];
        for (found, expected) in scores.losses.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    #[test]
    fn classes_may_lie_along_any_axis() {
        // One sample, three classes, two places: the same logits with classes last and first.
        let last = output(Tensor::new::<f32>(&[1, 2, 3], &[1.0, 2.0, 3.0, 6.0, 5.0, 4.0]).unwrap());
        let first = output(Tensor::new::<f32>(&[1, 3, 2], &[1.0, 6.0, 2.0, 5.0, 3.0, 4.0]).unwrap());
        let batch = batch(vec![("label", Tensor::new::<i64>(&[1, 2], &[2, 2]).unwrap())], 1);
        let score = |logits: &Output, class_axis| {
            let mut scores = Scores::default();
            let loss = Loss::CrossEntropy(CrossEntropy { class_axis, ..CrossEntropy::default() });
            scores.add(&task(loss), &batch, logits).unwrap();
            scores
        };
        assert_eq!(score(&last, -1), score(&first, 1));
        assert_eq!(score(&last, -1).correct, [1]);
    }

    #[test]
    fn wrong_labels_and_outputs_that_are_no_numbers_are_named() {
        let logits = output(Tensor::new::<f32>(&[1, 2], &[0.0, 1.0]).unwrap());
        let loss = task(Loss::CrossEntropy(CrossEntropy::default()));
        let labels = batch(vec![("label", Tensor::vector::<i64>(&[2]))], 1);
        let error = Scores::default().add(&loss, &labels, &logits).unwrap_err();
        assert!(matches!(error, CompressError::Label { label: 2, classes: 2, .. }), "{error}");
        let logits = output(Tensor::new::<f32>(&[1, 2], &[f32::INFINITY, 1.0]).unwrap());
        let error = Scores::default().add(&loss, &labels, &logits).unwrap_err();
        assert!(matches!(error, CompressError::NotFinite { sample: 0, .. }), "{error}");
    }

    #[test]
    fn a_drop_is_positive_where_the_candidate_is_worse() {
        let scores = |correct: &[u32], losses: &[f64]| Scores {
            losses: losses.to_vec(),
            correct: correct.to_vec(),
            labels: vec![1; correct.len()],
        };
        let original = scores(&[1, 1, 1, 0], &[1.0, 1.2, 1.4, 1.6]);
        let candidate = scores(&[1, 0, 0, 1], &[1.1, 1.3, 1.5, 1.8]);
        assert_eq!(Metric::Accuracy.drop(&original, &candidate, 0.05).estimate, 0.25);
        let rise = Metric::Perplexity.drop(&original, &candidate, 0.05).estimate;
        assert!((rise - 0.125f64.exp_m1()).abs() < 1e-12);
        assert!((Metric::Loss.drop(&original, &candidate, 0.05).estimate - 0.5 / 5.2).abs() < 1e-12);
        assert_eq!(Metric::Accuracy.drop(&original, &original, 0.05).estimate, 0.0);
    }

    #[test]
    fn equal_outputs_do_not_diverge_and_shifted_logits_are_equal() {
        let a = output(Tensor::new::<f32>(&[2, 2], &[0.0, 1.0, 3.0, 2.0]).unwrap());
        let b = output(Tensor::new::<f32>(&[2, 2], &[5.0, 6.0, 3.0, 2.0]).unwrap());
        let c = output(Tensor::new::<f32>(&[2, 2], &[1.0, 0.0, 3.0, 2.0]).unwrap());
        let batch = batch(Vec::new(), 2);
        assert!(a.divergence_sum(&b, &batch).unwrap().0 < 1e-12);
        let p = 1.0 / (1.0 + 1f64.exp());
        let expected = p * (p / (1.0 - p)).ln() + (1.0 - p) * ((1.0 - p) / p).ln();
        let (sum, rows) = a.divergence_sum(&c, &batch).unwrap();
        assert!((sum - expected).abs() < 1e-9 && rows == 2, "{sum} {expected}");
    }
}
