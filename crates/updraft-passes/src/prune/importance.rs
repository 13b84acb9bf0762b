//! What each unit of a group is worth.
//!
//! Every weight that loses indices with a unit is a member of the group and gives each unit a number. Numbers of one
//! member are divided by their mean, so that a large layer does not outvote a small one, and the importance is the mean
//! over members (as in DepGraph, <https://arxiv.org/abs/2301.12900>, section 3.3). So the mean importance of every group
//! is 1, which is what makes groups comparable.

use std::collections::BTreeMap;

use updraft_base::random::Key;
use updraft_graph::{Graph, Tensor, ValueId};

use crate::PassError;
use crate::prune::groups::{Group, Space, is_weight};

/// How units are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Importance {
    /// Sum of magnitudes (Li et al., 2016, <https://arxiv.org/abs/1608.08710>).
    L1,
    /// Euclidean norm.
    L2,
    /// Sum of `|weight * gradient|`, to first order what the loss changes by (Molchanov et al., 2019,
    /// <https://arxiv.org/abs/1906.10771>).
    Taylor,
    /// Magnitude of batch normalisation's scale (Liu et al., 2017, <https://arxiv.org/abs/1708.06519>).
    BatchNorm,
    /// Sum of distances to the other units: what is near the geometric median is replaceable (He et al., 2018,
    /// <https://arxiv.org/abs/1811.00250>).
    GeometricMedian,
    /// Drawn from the seed: what others must beat.
    Random,
}

/// The importance of each unit of a group; the mean is 1, or 0 where all weights are zero. An error says why this group
/// cannot be judged so.
pub fn scores(
    graph: &Graph,
    group: &Group,
    importance: Importance,
    gradients: &BTreeMap<String, Tensor>,
    key: &Key,
) -> Result<Result<Vec<f64>, String>, PassError> {
    if importance == Importance::Random {
        let key = key.child(&group.name);
        return Ok(Ok((0..group.units.len()).map(|i| f64::from(key.uniform_f32(i as u64))).collect()));
    }
    let all: Vec<(usize, Space, &Tensor)> =
        group.parameters(graph).filter(|(_, _, tensor)| tensor.dtype().is_float()).collect();
    let mut members: Vec<(usize, Space, &Tensor)> = match importance {
        Importance::BatchNorm => all.iter().copied().filter(|(_, s, _)| is_batch_norm_scale(graph, s.value)).collect(),
        // Which filter is like another shows in what makes the channels, not in what reads them.
        Importance::GeometricMedian => {
            all.iter().copied().filter(|(_, s, _)| is_weight(graph, s.value) && makes_channels(graph, *s)).collect()
        }
        _ => all.iter().copied().filter(|(_, s, _)| is_weight(graph, s.value)).collect(),
    };
    if members.is_empty() {
        match importance {
            Importance::BatchNorm => return Ok(Err("no batch normalisation scales its channels".to_owned())),
            Importance::GeometricMedian => return Ok(Err("no weight makes its channels".to_owned())),
            _ => members = all,
        }
    }
    let mut sums = vec![0.0; group.units.len()];
    for (place, space, tensor) in &members {
        let values = tensor.to_f64().map_err(|e| PassError::Op(e.into()))?;
        let name = &graph.value(space.value).name;
        let rows = Rows::of(tensor.shape(), space.axis);
        let indices = |unit: usize| group.units[unit][*place].as_slice();
        let numbers: Vec<f64> = match importance {
            Importance::GeometricMedian => distances(group.units.len(), &indices, &values, &rows),
            _ => {
                let slopes = match importance {
                    Importance::Taylor => Some(slopes(gradients, name, tensor)?),
                    _ => None,
                };
                let of_element = |at: usize| match (importance, &slopes) {
                    (Importance::L2, _) => values[at] * values[at],
                    (_, Some(slopes)) => (values[at] * slopes[at]).abs(),
                    _ => values[at].abs(),
                };
                let sum = |unit| indices(unit).iter().flat_map(|i| rows.places(*i)).map(of_element).sum::<f64>();
                let root = |sum: f64| if importance == Importance::L2 { sum.sqrt() } else { sum };
                (0..group.units.len()).map(sum).map(root).collect()
            }
        };
        let mean = numbers.iter().sum::<f64>() / numbers.len().max(1) as f64;
        if mean > 0.0 {
            sums.iter_mut().zip(&numbers).for_each(|(sum, number)| *sum += number / mean);
        }
    }
    sums.iter_mut().for_each(|sum| *sum /= members.len().max(1) as f64);
    match sums.iter().all(|s| s.is_finite()) {
        true => Ok(Ok(sums)),
        false => Ok(Err("its weights or gradients are not finite".to_owned())),
    }
}

fn slopes(gradients: &BTreeMap<String, Tensor>, name: &str, tensor: &Tensor) -> Result<Vec<f64>, PassError> {
    let refuse = |problem: String| PassError::Value { name: name.to_owned(), problem };
    let found = gradients.get(name).ok_or_else(|| refuse("has no gradient, which Taylor importance needs".into()))?;
    if found.shape() != tensor.shape() {
        return Err(refuse(format!("of shape {:?} has a gradient of shape {:?}", tensor.shape(), found.shape())));
    }
    found.to_f64().map_err(|e| PassError::Op(e.into()))
}

fn is_batch_norm_scale(graph: &Graph, value: ValueId) -> bool {
    graph.value(value).consumers().iter().any(|id| {
        let node = graph.node(*id);
        node.op == "BatchNormalization" && node.domain.is_empty() && node.inputs.get(1) == Some(&Some(value))
    })
}

/// Whether a weight's axis is the one along which its reader puts out channels.
fn makes_channels(graph: &Graph, space: Space) -> bool {
    graph.value(space.value).consumers().iter().any(|id| {
        let node = graph.node(*id);
        let transposed = |name: &str| node.attributes.int(name, 0).unwrap_or(0) != 0;
        let is_left = node.inputs.first() == Some(&Some(space.value));
        let last = graph.shape(space.value).map_or(0, <[_]>::len).saturating_sub(1);
        match node.op.as_str() {
            "Conv" => space.axis == 0,
            "ConvTranspose" => space.axis == 1,
            "Gemm" => space.axis == usize::from(!transposed("transB")),
            "MatMul" => !is_left && space.axis == last,
            "Gather" => is_left && space.axis == last,
            _ => false,
        }
    })
}

/// Where the elements of one index of an axis lie.
pub(super) struct Rows {
    outer: usize,
    size: usize,
    inner: usize,
}

impl Rows {
    pub(super) fn of(shape: &[usize], axis: usize) -> Rows {
        let product = |dims: Option<&[usize]>| dims.unwrap_or(&[]).iter().product();
        Rows { outer: product(shape.get(..axis)), size: shape[axis], inner: product(shape.get(axis + 1..)) }
    }

    /// Positions of the elements with this index, in order.
    pub(super) fn places(&self, index: usize) -> impl Iterator<Item = usize> + use<> {
        let Rows { outer, size, inner } = *self;
        (0..outer).flat_map(move |o| (0..inner).map(move |i| (o * size + index) * inner + i))
    }
}

/// For each unit the sum of Euclidean distances to all units.
fn distances<'a>(count: usize, indices: &dyn Fn(usize) -> &'a [usize], values: &[f64], rows: &Rows) -> Vec<f64> {
    let filter = |unit: usize| -> Vec<f32> {
        indices(unit).iter().flat_map(|i| rows.places(*i)).map(|at| values[at] as f32).collect()
    };
    let filters: Vec<Vec<f32>> = (0..count).map(filter).collect();
    let mut sums = vec![0.0; count];
    for a in 0..count {
        for b in 0..a {
            // Lanes of their own let the sum be vectorised.
            let mut lanes = [0f32; 16];
            let (left, right) = (filters[a].chunks(16), filters[b].chunks(16));
            for (x, y) in left.zip(right) {
                lanes.iter_mut().zip(x.iter().zip(y)).for_each(|(lane, (x, y))| *lane += (x - y) * (x - y));
            }
            let distance = f64::from(lanes.iter().sum::<f32>()).sqrt();
            sums[a] += distance;
            sums[b] += distance;
        }
    }
    sums
}
