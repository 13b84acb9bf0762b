//! Distances between a value of the student and one of the teacher.

use updraft_base::random::{Key, fill_uniform};
use updraft_graph::op::{OpError, show_shape};
use updraft_graph::{Graph, Tensor, ValueId};

use super::same_shape;
use crate::PassError;
use crate::loss::{mean_divergence, mean_squared, scalar_like};

/// A value of the student that is to become like one of the teacher.
#[derive(Debug, Clone, PartialEq)]
pub struct Match {
    /// Name of the teacher's value, as it is in its own graph.
    pub teacher: String,
    /// Name of the student's value.
    pub student: String,
    /// How they are compared.
    pub kind: MatchKind,
    /// What the distance counts in the loss; above 0.
    pub weight: f32,
}

/// How two values are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MatchKind {
    /// The mean of the squared differences. Where the widths differ (axis 1 of pictures `[N, C, ...]`, else the last
    /// axis), a linear map that is trained along brings the student's to the teacher's (Romero et al., "FitNets: hints
    /// for thin deep nets").
    Hidden,
    /// For features `[N, C, d..]` with any two widths: the squared distance, a mean over samples, of the maps of the
    /// squared sum over channels, each divided by its norm (Zagoruyko and Komodakis, "Paying more attention to
    /// attention", equation 2).
    AttentionMaps,
    /// For attention probabilities `[.., T]` of equal shape: the mean divergence of the student's from the teacher's
    /// (Wang et al., "MiniLM", equation 6).
    AttentionDistributions,
    /// For values `[.., T, d]` with any two widths `d`: the divergence of the relations `softmax(V V^T / sqrt(d))`
    /// (Wang et al., "MiniLM", equation 8).
    Relations,
}

/// What a norm or a probability is kept away from, where its root or logarithm is taken.
const TINY: f64 = 1e-12;

impl Match {
    /// Adds the distance; returns it and the regressor that is to be trained with the student, if it takes one.
    pub(super) fn attach(
        &self,
        graph: &mut Graph,
        student: ValueId,
        teacher: ValueId,
    ) -> Result<(ValueId, Option<ValueId>), PassError> {
        match self.kind {
            MatchKind::Hidden => {
                let (image, regressor) = self.regress(graph, student, teacher)?;
                Ok((mean_squared(graph, image, teacher)?, regressor))
            }
            MatchKind::AttentionMaps => {
                let (student, teacher) = (attention_map(graph, student)?, attention_map(graph, teacher)?);
                same_shape(graph, student, teacher)?;
                let difference = graph.op("Sub", &[student, teacher], [])?;
                let square = graph.op("Mul", &[difference, difference], [])?;
                let distances = sum(graph, square, -1, false)?;
                Ok((graph.op("ReduceMean", &[distances], [("keepdims", 0i64.into())])?, None))
            }
            MatchKind::AttentionDistributions => {
                same_shape(graph, student, teacher)?;
                let mut logarithm = |value: ValueId| {
                    let tiny = scalar_like(graph, TINY, value)?;
                    let above = graph.op("Max", &[value, tiny], [])?;
                    Ok::<_, PassError>(graph.op("Log", &[above], [])?)
                };
                let logarithms = (logarithm(student)?, logarithm(teacher)?);
                let last = rank(graph, teacher, 1)? - 1;
                Ok((mean_divergence(graph, logarithms, teacher, last)?, None))
            }
            MatchKind::Relations => {
                let logarithms = (log_relations(graph, student)?, log_relations(graph, teacher)?);
                same_shape(graph, logarithms.0, logarithms.1)?;
                let relations = graph.op("Exp", &[logarithms.1], [])?;
                let last = rank(graph, relations, 1)? - 1;
                Ok((mean_divergence(graph, logarithms, relations, last)?, None))
            }
        }
    }

    /// The student's value at the teacher's width.
    fn regress(
        &self,
        graph: &mut Graph,
        student: ValueId,
        teacher: ValueId,
    ) -> Result<(ValueId, Option<ValueId>), PassError> {
        let shapes = (graph.shape(student).unwrap_or_default(), graph.shape(teacher).unwrap_or_default());
        let differing: Vec<usize> =
            (0..shapes.0.len()).filter(|i| shapes.1.get(*i).is_some_and(|t| shapes.0[*i].differs(t))).collect();
        let rank = shapes.0.len();
        let (axis, from, to) = match differing[..] {
            [axis] if rank == shapes.1.len() => match (shapes.0[axis].known(), shapes.1[axis].known()) {
                (Some(from), Some(to)) => (axis, from, to),
                _ => return same_shape(graph, student, teacher).map(|()| (student, None)),
            },
            _ => return same_shape(graph, student, teacher).map(|()| (student, None)),
        };
        let is_channels = rank >= 3 && axis == 1;
        let is_width = axis == rank - 1 && (2..=3).contains(&rank);
        if !(is_channels || is_width) {
            let problem = format!(
                "is {} but {:?} of the teacher is {}; a regressor can only change the width, which is axis 1 of \
                 pictures and the last of rows",
                show_shape(shapes.0),
                self.teacher,
                show_shape(shapes.1)
            );
            return Err(PassError::value(graph, student, problem));
        }
        let dtype =
            graph.dtype(student).ok_or_else(|| PassError::value(graph, student, "has no known element type"))?;
        let mut weights = vec![0f32; from * to];
        // Drawn from the values' names, so that the same pair always starts alike.
        fill_uniform(&Key::new(0).child("regressor").child(&self.teacher).child(&self.student), 0, &mut weights);
        let bound = (3.0 / from as f64).sqrt();
        let weights: Vec<f64> = weights.iter().map(|u| (2.0 * f64::from(*u) - 1.0) * bound).collect();
        let mut shape = if is_channels { vec![to, from] } else { vec![from, to] };
        shape.resize(if is_channels { rank } else { 2 }, 1);
        let tensor = Tensor::from_f64(dtype, &shape, &weights).map_err(OpError::from)?;
        let regressor = graph.add_constant(&format!("regressor.{}", self.student), tensor);
        let op = if is_channels { "Conv" } else { "MatMul" };
        Ok((graph.op(op, &[student, regressor], [])?, Some(regressor)))
    }
}

/// The squared sum over channels of features `[N, C, d..]`, as rows `[N, D]` of norm 1.
fn attention_map(graph: &mut Graph, features: ValueId) -> Result<ValueId, PassError> {
    rank(graph, features, 3)?;
    let square = graph.op("Mul", &[features, features], [])?;
    let map = sum(graph, square, 1, false)?;
    let rows = graph.op("Flatten", &[map], [("axis", 1i64.into())])?;
    let squares = graph.op("Mul", &[rows, rows], [])?;
    let total = sum(graph, squares, -1, true)?;
    let tiny = scalar_like(graph, TINY, total)?;
    let above = graph.op("Max", &[total, tiny], [])?;
    let norm = graph.op("Sqrt", &[above], [])?;
    Ok(graph.op("Div", &[rows, norm], [])?)
}

/// `log softmax(V V^T / sqrt(d))` of values `[.., T, d]`.
fn log_relations(graph: &mut Graph, values: ValueId) -> Result<ValueId, PassError> {
    let rank = rank(graph, values, 2)?;
    let width = graph.shape(values).and_then(|s| s.last()?.known());
    let width = width.ok_or_else(|| PassError::value(graph, values, "has no known width along its last axis"))?;
    let mut order: Vec<i64> = (0..rank as i64).collect();
    order.swap(rank - 1, rank - 2);
    let transposed = graph.op("Transpose", &[values], [("perm", order.into())])?;
    let products = graph.op("MatMul", &[values, transposed], [])?;
    let scale = scalar_like(graph, 1.0 / (width.max(1) as f64).sqrt(), values)?;
    let scaled = graph.op("Mul", &[products, scale], [])?;
    Ok(graph.op("LogSoftmax", &[scaled], [("axis", (-1i64).into())])?)
}

/// The rank, which must be known and at least `least`.
fn rank(graph: &Graph, value: ValueId, least: usize) -> Result<usize, PassError> {
    match graph.shape(value) {
        Some(shape) if shape.len() >= least => Ok(shape.len()),
        Some(shape) => {
            let problem = format!("must have at least {least} axes to be compared so, found {}", show_shape(shape));
            Err(PassError::value(graph, value, problem))
        }
        None => Err(PassError::value(graph, value, "has no known rank, so it cannot be compared")),
    }
}

fn sum(graph: &mut Graph, value: ValueId, axis: i64, keeps_axis: bool) -> Result<ValueId, PassError> {
    let axes = graph.add_constant("axes", Tensor::vector(&[axis]));
    Ok(graph.op("ReduceSum", &[value, axes], [("keepdims", i64::from(keeps_axis).into())])?)
}
