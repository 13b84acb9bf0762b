//! Cross-entropy of integer labels, and its gradient, for classes along contiguous rows.

use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::isa::dispatch;
use crate::cpu::kernel::{Io, Kernel, Pool};
use crate::cpu::math;
use crate::cpu::rows::{Fold, fold_row, log_softmax_rows};

#[derive(Debug, Clone)]
struct Labels {
    classes: usize,
    smoothing: f32,
    ignored: i64,
    dtype: DType,
}

impl Labels {
    /// What the node says, where classes are the innermost axis.
    fn new(cx: &Build, scores: usize, labels: usize) -> Result<Option<Labels>, OpError> {
        let shape = cx.shape(scores);
        let Some(dtype) = cx.dtype(labels).filter(|d| matches!(d, DType::I64 | DType::I32)) else { return Ok(None) };
        if cx.dtype(scores) != Some(DType::F32)
            || shape.len() < 2
            || shape[2..].iter().any(|n| *n != 1)
            || shape[1] == 0
        {
            return Ok(None);
        }
        Ok(Some(Labels {
            classes: shape[1],
            smoothing: cx.attributes().float("label_smoothing", 0.0)?,
            ignored: cx.attributes().int("ignore_index", -100)?,
            dtype,
        }))
    }

    /// The class of each row; `None` where it is ignored.
    fn read(&self, io: &Io, input: usize) -> Result<Vec<Option<usize>>, OpError> {
        let resolve = |label: i64| {
            if label == self.ignored {
                return Ok(None);
            }
            usize::try_from(label).ok().filter(|c| *c < self.classes).map(Some).ok_or_else(|| {
                let (classes, ignored) = (self.classes, self.ignored);
                OpError::value(format!("label {label} is neither in [0, {classes}) nor {ignored}, the ignored one"))
            })
        };
        match self.dtype {
            DType::I32 => io.input::<i32>(input).iter().map(|l| resolve(i64::from(*l))).collect(),
            _ => io.input::<i64>(input).iter().map(|l| resolve(*l)).collect(),
        }
    }
}

/// Elements in one task.
const TASK_ELEMENTS: usize = 1 << 13;

struct Loss {
    labels: Labels,
    keeps_log_prob: bool,
}

/// Builds CrossEntropyLoss.
pub(crate) fn loss(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let Some(labels) = Labels::new(cx, 0, 1)? else { return Ok(None) };
    let keeps_log_prob = cx.view.wants(1);
    let bytes = if keeps_log_prob { 0 } else { cx.shape(0).iter().product::<usize>() * size_of::<f32>() };
    Ok(Some(Built::whole(Loss { labels, keeps_log_prob }).scratch(bytes)))
}

impl Kernel for Loss {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let labels = self.labels.read(io, 1)?;
        let logits = io.input::<f32>(0);
        let classes = self.labels.classes;
        let out = io.output::<f32>(0);
        let log_prob = if self.keeps_log_prob { io.output::<f32>(1) } else { &mut io.scratch::<f32>()[..logits.len()] };
        let chunk = (TASK_ELEMENTS / classes).max(1) * classes;
        pool.for_each_chunk(log_prob, chunk, |task, rows| {
            let start = task * chunk;
            log_softmax_rows(classes, &logits[start..start + rows.len()], rows);
        });
        let smoothing = f64::from(self.labels.smoothing);
        let (mut sum, mut count) = (0.0, 0.0);
        for (row, label) in log_prob.chunks_exact(classes).zip(&labels) {
            let Some(label) = label else { continue };
            sum -= (1.0 - smoothing) * f64::from(row[*label]);
            if smoothing > 0.0 {
                sum -= smoothing * f64::from(fold_row(Fold::Sum, row)) / classes as f64;
            }
            count += 1.0;
        }
        if let Some(out) = out.first_mut() {
            *out = (sum / count) as f32;
        }
        Ok(())
    }
}

struct LossGradient {
    labels: Labels,
}

/// Builds CrossEntropyLossGradient.
pub(crate) fn loss_gradient(cx: &mut Build) -> Result<Option<Built>, OpError> {
    Ok(Labels::new(cx, 1, 2)?.map(|labels| Built::whole(LossGradient { labels })))
}

impl Kernel for LossGradient {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let labels = self.labels.read(io, 2)?;
        let dloss = io.input::<f32>(0).first().copied().unwrap_or(0.0);
        let log_prob = io.input::<f32>(1);
        let out = io.output::<f32>(0);
        let Labels { classes, smoothing, .. } = self.labels;
        let scale = dloss / labels.iter().flatten().count() as f32;
        let rows_per_task = (TASK_ELEMENTS / classes).max(1);
        pool.for_each_chunk(out, rows_per_task * classes, |task, rows| {
            let start = task * rows_per_task;
            let from = &log_prob[start * classes..start * classes + rows.len()];
            scaled_probabilities(scale, smoothing / classes as f32, from, rows);
            for (i, row) in rows.chunks_exact_mut(classes).enumerate() {
                match labels[start + i] {
                    None => row.fill(0.0),
                    Some(label) => row[label] -= scale * (1.0 - smoothing),
                }
            }
        });
        Ok(())
    }
}

dispatch! {
    /// `scale * (e^x - shift)`
    fn scaled_probabilities(scale: f32, shift: f32, x: &[f32], out: &mut [f32]) = scaled_probabilities_body
}

#[inline(always)]
fn scaled_probabilities_body<const FMA: bool>(scale: f32, shift: f32, x: &[f32], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = scale * (math::exp::<FMA>(*x) - shift);
    }
}
