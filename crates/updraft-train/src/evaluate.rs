//! A model's loss and metrics on a dataset.

use updraft_data::{Batch, Loader};
use updraft_engine::{CompileOptions, Engine, Session};
use updraft_graph::{Graph, Tensor};
use updraft_passes::loss::{CrossEntropy, Loss, Metric};
use updraft_passes::training::{self, TrainingOptions};

use crate::error::TrainError;
use crate::metrics::{Metrics, Tally};

/// A model ready to be measured.
pub struct Evaluator {
    session: Box<dyn Session>,
    inputs: Vec<String>,
    target: String,
    /// The loss against labels of classes, where that is what is measured.
    cross_entropy: Option<CrossEntropy>,
    /// Whether the session returns logits of one label a sample.
    has_logits: bool,
}

impl Evaluator {
    /// Measures what `options` trains: the same loss, output and target.
    pub fn new(engine: &dyn Engine, model: &Graph, options: &TrainingOptions) -> Result<Evaluator, TrainError> {
        let mut options = options.clone();
        options.metrics = match options.loss {
            Loss::CrossEntropy(_) if options.has_labels() => vec![Metric::Correct, Metric::Count],
            _ => Vec::new(),
        };
        let read = match &options.output {
            Some(name) => model.find(name),
            None => model.outputs().first().copied(),
        };
        let is_one_label = read.and_then(|v| model.shape(v)).is_some_and(|shape| shape.len() == 2);
        let logits = read.filter(|_| is_one_label && !options.metrics.is_empty());
        options.keep_outputs = logits.map(|v| model.value(v).name.clone()).into_iter().collect();
        let (graph, inputs) = training::build_evaluation(model, &options)?;
        let session = engine.compile(&graph, &CompileOptions::default())?;
        let cross_entropy = match options.loss {
            Loss::CrossEntropy(settings) if options.has_labels() => Some(settings),
            _ => None,
        };
        Ok(Evaluator { session, inputs, target: options.target, cross_entropy, has_logits: logits.is_some() })
    }

    /// The metrics over one epoch of a loader, whose tail should be padded so that every sample counts once.
    /// `progress` hears how many batches are done.
    pub fn evaluate(&mut self, loader: &Loader, mut progress: impl FnMut(u64)) -> Result<Metrics, TrainError> {
        check_tensors(loader, &self.inputs)?;
        let mut tally = Tally::default();
        for (done, batch) in loader.batches(0..loader.steps_per_epoch())?.enumerate() {
            self.add(batch?, &mut tally)?;
            progress(done as u64 + 1);
        }
        Ok(tally.metrics())
    }

    fn add(&mut self, mut batch: Batch, tally: &mut Tally) -> Result<(), TrainError> {
        let samples = batch.samples.len();
        if let Some(settings) = self.cross_entropy {
            // Padding gets labels that do not count, which keeps the shape that the session is planned for.
            let target = batch.tensors.iter_mut().find(|(name, _)| *name == self.target);
            if let Some((name, labels)) = target {
                let per_sample: usize = labels.shape().iter().skip(1).product();
                let wrong =
                    |e: updraft_graph::TensorError| TrainError::Output { name: name.clone(), problem: e.to_string() };
                labels.as_mut_slice::<i64>().map_err(wrong)?[samples * per_sample..].fill(settings.ignore_index);
            }
            let outputs = self.session.run(&select(&batch.tensors, &self.inputs)?)?;
            let mut outputs = outputs.into_iter();
            let loss = scalar("loss", outputs.next())?;
            let correct = count("correct", outputs.next())?;
            let weight = count("count", outputs.next())?;
            tally.add_loss(samples as u64, loss, weight);
            tally.add_correct(correct);
            if self.has_logits {
                let labels = batch.tensors.iter().find(|(name, _)| *name == self.target);
                if let (Some(logits), Some((_, labels))) = (outputs.next(), labels) {
                    tally.add_confusion(&logits, labels, settings.ignore_index)?;
                }
            }
        } else {
            for (_, tensor) in &mut batch.tensors {
                *tensor = first_rows(tensor, samples)?;
            }
            let outputs = self.session.run(&select(&batch.tensors, &self.inputs)?)?;
            tally.add_loss(samples as u64, scalar("loss", outputs.into_iter().next())?, samples as u64);
        }
        Ok(())
    }
}

/// Refuses a dataset that lacks an input, before any work is done.
pub fn check_tensors(loader: &Loader, inputs: &[String]) -> Result<(), TrainError> {
    let known: Vec<String> = loader.dataset().facts().tensors.iter().map(|t| t.name.clone()).collect();
    match inputs.iter().find(|input| !known.contains(input)) {
        None => Ok(()),
        Some(input) => Err(TrainError::MissingTensor {
            input: input.clone(),
            nearest: updraft_base::nearest(input, known.iter().map(String::as_str)).map(str::to_owned),
            known,
        }),
    }
}

/// The tensors that the graph reads.
pub fn select<'a>(
    tensors: &'a [(String, Tensor)],
    inputs: &[String],
) -> Result<Vec<(&'a str, &'a Tensor)>, TrainError> {
    inputs
        .iter()
        .map(|input| match tensors.iter().find(|(name, _)| name == input) {
            Some((name, tensor)) => Ok((name.as_str(), tensor)),
            None => Err(TrainError::MissingTensor {
                input: input.clone(),
                nearest: None,
                known: tensors.iter().map(|(name, _)| name.clone()).collect(),
            }),
        })
        .collect()
}

/// A floating-point output of one element.
pub(crate) fn scalar(name: &str, output: Option<Tensor>) -> Result<f64, TrainError> {
    let wrong = |problem: String| TrainError::Output { name: name.to_owned(), problem };
    let tensor = output.ok_or_else(|| wrong("is missing".to_owned()))?;
    match tensor.to_f64().map_err(|e| wrong(e.to_string()))?.as_slice() {
        [value] => Ok(*value),
        values => Err(wrong(format!("has {} elements, expected 1", values.len()))),
    }
}

fn count(name: &str, output: Option<Tensor>) -> Result<u64, TrainError> {
    let value = scalar(name, output)?;
    // A count of labels of one batch is far below 2^53, where f64 stops being exact.
    Ok(value as u64)
}

/// The first rows of a tensor, all of them where it has no more.
pub fn first_rows(tensor: &Tensor, rows: usize) -> Result<Tensor, TrainError> {
    let mut shape = tensor.shape().to_vec();
    let Some(first) = shape.first_mut().filter(|n| **n > rows) else { return Ok(tensor.clone()) };
    let row_bytes = tensor.byte_len() / *first;
    *first = rows;
    Tensor::from_bytes(tensor.dtype(), &shape, &tensor.bytes()[..rows * row_bytes])
        .map_err(|e| TrainError::Output { name: "batch".to_owned(), problem: e.to_string() })
}
