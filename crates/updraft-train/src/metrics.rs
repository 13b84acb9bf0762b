//! What an evaluation measures, added up batch by batch.

use serde::{Deserialize, Serialize};
use updraft_graph::{Tensor, TensorError};

/// Classes up to which a confusion matrix is kept: past that nobody reads it, and its size grows with the square.
pub const CONFUSION_CLASSES_MAX: usize = 100;

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Samples that were evaluated.
    pub samples: u64,
    /// The mean loss over the labels that count (over the samples, where there are no labels).
    pub loss: f64,
    /// The share of labels that had the greatest logit, where there are labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// `exp(loss)`, where samples are sequences of labels: more labels than samples. Of one label a sample it says nothing
    /// that the loss does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Labels by class (row) and prediction (column): for one label a sample and at most [`CONFUSION_CLASSES_MAX`]
    /// classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confusion: Option<Vec<Vec<u64>>>,
}

/// Sums from which [`Metrics`] are made.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    samples: u64,
    loss_sum: f64,
    loss_weight: u64,
    correct: Option<u64>,
    confusion: Option<Vec<Vec<u64>>>,
}

/// Logits and labels that do not belong together.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The shapes do not fit.
    #[error("logits of shape {logits:?} do not fit labels of shape {labels:?}: expected [N, C] and [N]")]
    Shape {
        /// Shape of the logits.
        logits: Vec<usize>,
        /// Shape of the labels.
        labels: Vec<usize>,
    },
    /// A label is not a class.
    #[error("label {label} is not one of {classes} classes")]
    Label {
        /// The label.
        label: i64,
        /// The number of classes.
        classes: usize,
    },
    /// An element type is wrong.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

impl Tally {
    /// Takes a batch whose `loss` is the mean over `weight` labels or samples. A batch of which nothing counts has no
    /// loss.
    pub fn add_loss(&mut self, samples: u64, loss: f64, weight: u64) {
        self.samples += samples;
        if weight > 0 {
            self.loss_sum += loss * weight as f64;
            self.loss_weight += weight;
        }
    }

    /// Takes how many of a batch's labels were predicted.
    pub fn add_correct(&mut self, correct: u64) {
        *self.correct.get_or_insert(0) += correct;
    }

    /// Takes predictions: `logits [N, C]`, `labels [N]`. The first of equal logits wins; `ignored` labels are left out.
    pub fn add_confusion(&mut self, logits: &Tensor, labels: &Tensor, ignored: i64) -> Result<(), MetricsError> {
        let (&[rows, classes], &[count]) = (logits.shape(), labels.shape()) else {
            return Err(MetricsError::Shape { logits: logits.shape().to_vec(), labels: labels.shape().to_vec() });
        };
        if rows != count || classes == 0 || self.confusion.as_ref().is_some_and(|m| m.len() != classes) {
            return Err(MetricsError::Shape { logits: vec![rows, classes], labels: vec![count] });
        }
        if classes > CONFUSION_CLASSES_MAX {
            return Ok(());
        }
        let matrix = self.confusion.get_or_insert_with(|| vec![vec![0; classes]; classes]);
        let labels = labels.to_i64()?;
        for (scores, label) in logits.as_slice::<f32>()?.chunks_exact(classes).zip(labels) {
            if label == ignored {
                continue;
            }
            let row = usize::try_from(label).ok().and_then(|class| matrix.get_mut(class));
            let row = row.ok_or(MetricsError::Label { label, classes })?;
            let predicted = (1..classes).fold(0, |best, c| if scores[c] > scores[best] { c } else { best });
            row[predicted] += 1;
        }
        Ok(())
    }

    /// The metrics of all that was taken; the loss of nothing is not a number.
    pub fn metrics(&self) -> Metrics {
        let loss = self.loss_sum / self.loss_weight as f64;
        Metrics {
            samples: self.samples,
            loss,
            accuracy: self.correct.map(|c| c as f64 / self.loss_weight as f64),
            perplexity: self.correct.filter(|_| self.loss_weight > self.samples).map(|_| loss.exp()),
            confusion: self.confusion.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_confusion_matrix_counts_labels_by_row_and_leaves_ignored_ones_out() {
        let logits = Tensor::new::<f32>(&[4, 2], &[0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]).unwrap();
        let labels = Tensor::vector::<i64>(&[1, 0, 0, -1]);
        let mut tally = Tally::default();
        tally.add_confusion(&logits, &labels, -1).unwrap();
        assert_eq!(tally.metrics().confusion, Some(vec![vec![1, 1], vec![0, 1]]));
    }

    #[test]
    fn batches_weigh_by_their_labels() {
        let mut tally = Tally::default();
        for (samples, loss, weight, correct) in [(3, 1.0, 3, 3), (2, 5.0, 1, 0), (1, f64::NAN, 0, 0)] {
            tally.add_loss(samples, loss, weight);
            tally.add_correct(correct);
        }
        let metrics = tally.metrics();
        assert_eq!((metrics.samples, metrics.loss, metrics.accuracy), (6, 2.0, Some(0.75)));
    }

    #[test]
    fn sequences_have_a_perplexity_and_single_labels_have_none() {
        for (weight, expected) in [(8, Some(2.0f64.exp())), (4, None)] {
            let mut tally = Tally::default();
            tally.add_loss(4, 2.0, weight);
            tally.add_correct(3);
            assert_eq!(tally.metrics().perplexity, expected);
        }
    }

    #[test]
    fn labels_that_are_no_classes_are_refused() {
        let logits = Tensor::new::<f32>(&[1, 2], &[0.0, 1.0]).unwrap();
        for label in [-1, 2] {
            let error = Tally::default().add_confusion(&logits, &Tensor::vector::<i64>(&[label]), -100).unwrap_err();
            assert!(matches!(error, MetricsError::Label { .. }), "{error}");
        }
    }
}
