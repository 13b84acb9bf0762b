//! Divergences on the bench: how far a candidate's outputs are from the original's.

use updraft_data::Batch;
use updraft_graph::Graph;
use updraft_passes::loss::Loss;

use super::Bench;
use crate::candidate::{Candidate, Form, StaticForm};
use crate::error::CompressError;
use crate::forms;
use crate::measure::{Answers, Compiled, Output};

/// Samples on which the divergence of a single unit is measured: what published rankings of sensitivity take.
pub(super) const SENSITIVITY_SAMPLES: u64 = 64;

impl Bench<'_> {
    /// The original with only one unit of its prepared form quantized, for each unit: made, measured, forgotten.
    pub(crate) fn divergence_of_units(
        &mut self,
        form: &StaticForm,
        units: &[String],
        unit: &str,
    ) -> Result<f64, CompressError> {
        self.check_time()?;
        let float_units = units.iter().filter(|u| *u != unit).cloned().collect();
        let candidate = Candidate::of_form(Form::Static(StaticForm { float_units, ..form.clone() }));
        let (original, digest) = (&self.tools.original.graph, self.tools.original_digest);
        let (graph, _) = forms::make(&mut self.material(), original, digest, &candidate)?;
        let mut answers = Compiled::new(self.tools.engine, &graph, self.tools.task)?;
        self.distance(
            &mut |bench, batch| {
                bench.check_time()?;
                answers.answer(batch)
            },
            SENSITIVITY_SAMPLES,
        )
    }

    /// The original.
    pub(crate) fn original(&self) -> &Graph {
        &self.tools.original.graph
    }

    /// The original's outputs on the samples of the divergence.
    fn fill_reference(&mut self) -> Result<(), CompressError> {
        if !self.reference.is_empty() {
            return Ok(());
        }
        let split = self.tools.splits.search.first(self.settings.divergence_samples);
        let mut original = Compiled::new(self.tools.engine, &self.tools.original.graph, self.tools.task)?;
        for batch in split.batches(0)? {
            self.check_time()?;
            let batch = batch?;
            let output = original.answer(&batch)?;
            self.reference.push((batch, output));
        }
        Ok(())
    }

    /// How far the answers are from the original's on at least so many samples.
    pub(super) fn distance(
        &mut self,
        answer: &mut dyn FnMut(&mut Self, &Batch) -> Result<Output, CompressError>,
        samples: u64,
    ) -> Result<f64, CompressError> {
        self.fill_reference()?;
        let reference = std::mem::take(&mut self.reference);
        let mut sums = (0.0, 0.0);
        let mut seen = 0;
        let mut result = Ok(());
        for (batch, own) in &reference {
            if seen >= samples {
                break;
            }
            seen += batch.samples.len() as u64;
            let terms = answer(self, batch).and_then(|other| match self.tools.task.loss {
                Loss::CrossEntropy(_) | Loss::KullbackLeibler { .. } => {
                    own.divergence_sum(&other, batch).map(|(sum, rows)| (sum, rows as f64))
                }
                Loss::MeanSquaredError => own.squares(&other, batch),
            });
            match terms {
                Ok((sum, weight)) => sums = (sums.0 + sum, sums.1 + weight),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.reference = reference;
        result?;
        Ok(sums.0 / sums.1.max(f64::MIN_POSITIVE))
    }
}
