//! Single weights set to zero.
//!
//! A zero saves bytes where files are compressed and time where hardware skips zeros (2:4 on sparse tensor cores). Dense
//! runtimes, ours among them, multiply by zero as by any number: see [`NO_SPEED`], which every report repeats.

use std::collections::BTreeMap;

use updraft_graph::{Graph, Tensor, ValueId};

use crate::PassError;
use crate::optimizer::matches;
use crate::prune::groups::is_weight;
use crate::prune::structured::Scope;

/// What must be said wherever zeros are reported.
pub const NO_SPEED: &str = "zeros alone make no dense runtime faster: the tensors keep their shapes and every zero is \
                            multiplied; structured pruning does make a network faster";

/// Which weights of a row are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pattern {
    /// All but this share.
    Share(f64),
    /// The best `n` of every `m` neighbours along the axis that is summed over.
    Of {
        /// How many are kept.
        n: usize,
        /// Of how many.
        m: usize,
    },
}

/// How weights are made sparse.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Which are kept.
    pub pattern: Pattern,
    /// Whether each weight tensor loses the share, or all together. With norms of inputs, each output row does.
    pub scope: Scope,
    /// Patterns of parameters and nodes that stay as they are.
    pub exclude: Vec<String>,
}

/// Which elements of each weight stay, by its name, in the tensor's order.
pub type Masks = BTreeMap<String, Vec<bool>>;

/// Chooses what stays. A weight counts by its magnitude, or, where `norms` has the Euclidean norm of each of its inputs,
/// by the product of both (Wanda, Sun et al., 2023, <https://arxiv.org/abs/2306.11695>); then each output compares its
/// own weights.
pub fn choose(graph: &Graph, settings: &Settings, norms: &BTreeMap<String, Vec<f64>>) -> Result<Masks, PassError> {
    let wrong = |option, problem: String| Err(PassError::Option { option, problem });
    match settings.pattern {
        Pattern::Share(share) if !(0.0..1.0).contains(&share) => {
            return wrong("ratio", format!("is {share}, expected a share from 0 to below 1"));
        }
        Pattern::Of { n, m } if n == 0 || n > m => {
            return wrong("n:m", format!("is {n}:{m}, expected at least 1 and at most all of a run"));
        }
        _ => {}
    }
    let mut weights = Vec::new();
    for layer in layers(graph, settings) {
        weights.push(layer.scored(graph, norms)?);
    }
    let mut masks = Masks::new();
    match (settings.pattern, settings.scope) {
        (Pattern::Share(share), Scope::Global) if norms.is_empty() => {
            let all: Vec<f64> = weights.iter().flat_map(|w| w.scores.iter().copied()).collect();
            let mut kept = keep_best(&all, all.len() - zeros(all.len(), share)).into_iter();
            for weight in weights {
                masks.insert(weight.name, kept.by_ref().take(weight.scores.len()).collect());
            }
        }
        (pattern, _) => {
            for weight in weights {
                let mut mask = vec![true; weight.scores.len()];
                let runs = match pattern {
                    Pattern::Share(_) if !weight.by_row => vec![(0..mask.len()).collect()],
                    Pattern::Share(_) => weight.rows,
                    Pattern::Of { m, .. } => {
                        weight.rows.iter().flat_map(|row| row.chunks(m).map(<[usize]>::to_vec)).collect()
                    }
                };
                for run in runs {
                    let scores: Vec<f64> = run.iter().map(|place: &usize| weight.scores[*place]).collect();
                    let keep = match pattern {
                        Pattern::Share(share) => run.len() - zeros(run.len(), share),
                        // A short run at the end of a row keeps as many, so that no hardware finds more than n.
                        Pattern::Of { n, .. } => n.min(run.len()),
                    };
                    for (place, stays) in run.iter().zip(keep_best(&scores, keep)) {
                        mask[*place] = stays;
                    }
                }
                masks.insert(weight.name, mask);
            }
        }
    }
    Ok(masks)
}

/// Sets to zero what the masks do not keep. Returns how many elements they cover and how many of these are zero.
pub fn apply(graph: &mut Graph, masks: &Masks) -> Result<(u64, u64), PassError> {
    let (mut elements, mut zeros) = (0, 0);
    for (name, mask) in masks {
        let refuse = |problem: &str| PassError::Value { name: name.clone(), problem: problem.to_owned() };
        let id = graph.find(name).ok_or_else(|| refuse("is no value of the graph"))?;
        let tensor = graph.value(id).constant().ok_or_else(|| refuse("is no initializer of the graph"))?;
        if tensor.len() != mask.len() {
            return Err(refuse("has another number of elements than its mask"));
        }
        let mut tensor = tensor.clone();
        let size = tensor.byte_len() / tensor.len().max(1);
        for (element, _) in tensor.bytes_mut().chunks_exact_mut(size.max(1)).zip(mask).filter(|(_, stays)| !**stays) {
            element.fill(0);
        }
        elements += mask.len() as u64;
        zeros += tensor.to_f64().map_err(|e| PassError::Op(e.into()))?.iter().filter(|v| **v == 0.0).count() as u64;
        graph.set_constant(id, Some(tensor));
    }
    Ok((elements, zeros))
}

/// The share of zeros after `step` of `steps` of gradual pruning: fast at first, while much is redundant, and slow at the
/// end, `s_f + (s_0 - s_f)(1 - t/T)^3` (Zhu and Gupta, 2017, <https://arxiv.org/abs/1710.01878>).
pub fn cubic(first: f64, last: f64, step: usize, steps: usize) -> f64 {
    let left = if steps == 0 { 0.0 } else { 1.0 - (step.min(steps) as f64 / steps as f64) };
    last + (first - last) * left.powi(3)
}

/// Lets a training step see each masked weight through its mask: the node that read the weight reads a product with a
/// constant, whose gradient is zero where the mask is. Names of initializers stay, so trained state goes back by name
/// and [`apply`] makes it sparse again.
pub fn hold(graph: &mut Graph, masks: &Masks) -> Result<(), PassError> {
    for (name, mask) in masks {
        let refuse = |problem: &str| PassError::Value { name: name.clone(), problem: problem.to_owned() };
        let id = graph.find(name).ok_or_else(|| refuse("is no value of the graph"))?;
        let tensor = graph.value(id).constant().ok_or_else(|| refuse("is no initializer of the graph"))?;
        let ones: Vec<f64> = mask.iter().map(|stays| f64::from(u8::from(*stays))).collect();
        let ones = Tensor::from_f64(tensor.dtype(), tensor.shape(), &ones).map_err(|e| PassError::Op(e.into()))?;
        // A Constant node, because float initializers are what is trained.
        let made = graph.op_n("", "Constant", &[], [("value", updraft_graph::Attribute::Tensor(ones))], 1)?[0];
        let masked = graph.op("Mul", &[id, made], [])?;
        let product = graph.value(masked).producer().map(|(node, _)| node);
        let readers = graph.value(id).consumers().to_vec();
        for reader in readers.into_iter().filter(|reader| Some(*reader) != product) {
            for index in 0..graph.node(reader).inputs.len() {
                if graph.node(reader).inputs[index] == Some(id) {
                    graph.set_node_input(reader, index, Some(masked));
                }
            }
        }
    }
    Ok(())
}

fn zeros(len: usize, share: f64) -> usize {
    (len as f64 * share).round() as usize
}

/// Marks the `count` largest; of equal ones the first.
fn keep_best(scores: &[f64], count: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    let mut kept = vec![false; scores.len()];
    order.into_iter().take(count).for_each(|at| kept[at] = true);
    kept
}

/// A weight that a product or a convolution reads.
struct Layer {
    value: ValueId,
    /// The axis along which outputs lie; all others are summed over.
    output: usize,
    /// The axis along which its inputs lie.
    input: usize,
}

/// A weight with what each element is worth.
struct Scored {
    name: String,
    scores: Vec<f64>,
    /// Positions of the weights of one output each, neighbours along what is summed over.
    rows: Vec<Vec<usize>>,
    /// Whether each row loses the share by itself.
    by_row: bool,
}

/// Weights of Conv, Gemm and MatMul that may lose elements, in the order of their nodes.
fn layers(graph: &Graph, settings: &Settings) -> Vec<Layer> {
    let mut found: Vec<Layer> = Vec::new();
    for (_, node) in graph.nodes().filter(|(_, node)| node.domain.is_empty()) {
        let Some(value) = node.inputs.get(1).copied().flatten().filter(|v| is_weight(graph, *v)) else { continue };
        let last = graph.shape(value).map_or(0, <[_]>::len) - 1;
        let transposed = node.attributes.int("transB", 0).unwrap_or(0) != 0;
        let (output, input) = match node.op.as_str() {
            "Conv" => (0, 1),
            "ConvTranspose" => (1, 0),
            "Gemm" if transposed => (0, 1),
            "Gemm" => (1, 0),
            "MatMul" => (last, last - 1),
            _ => continue,
        };
        let names = [graph.value(value).name.clone(), node.name.clone(), node.label(graph)];
        let excluded = settings.exclude.iter().any(|pattern| names.iter().any(|name| matches(pattern, name)));
        if !excluded && !graph.inputs().contains(&value) && !found.iter().any(|layer| layer.value == value) {
            found.push(Layer { value, output, input });
        }
    }
    found
}

impl Layer {
    fn scored(&self, graph: &Graph, norms: &BTreeMap<String, Vec<f64>>) -> Result<Scored, PassError> {
        let value = graph.value(self.value);
        let refuse = |problem: String| PassError::Value { name: value.name.clone(), problem };
        let tensor = value.constant().ok_or_else(|| refuse("is no initializer of the graph".to_owned()))?;
        let mut scores: Vec<f64> = tensor.to_f64().map_err(|e| PassError::Op(e.into()))?;
        scores.iter_mut().for_each(|score| *score = score.abs());
        let shape = tensor.shape();
        let index_along = |axis: usize, place: usize| {
            let stride: usize = shape[axis + 1..].iter().product();
            place / stride % shape[axis]
        };
        let norms = norms.get(&value.name);
        if let Some(norms) = norms {
            if norms.len() != shape[self.input] {
                let problem = format!("has {} inputs but norms of {}", shape[self.input], norms.len());
                return Err(refuse(problem));
            }
            for (place, score) in scores.iter_mut().enumerate() {
                *score *= norms[index_along(self.input, place)];
            }
        }
        let mut rows: Vec<Vec<usize>> = vec![Vec::new(); shape[self.output]];
        (0..scores.len()).for_each(|place| rows[index_along(self.output, place)].push(place));
        // The hardware's runs are neighbours along the input channels, tap by tap.
        let (input, taps) = (self.input, |place: usize| {
            (0..shape.len())
                .filter(|a| *a != self.input && *a != self.output)
                .fold(0, |at, a| at * shape[a] + index_along(a, place))
        });
        rows.iter_mut().for_each(|row| row.sort_by_key(|place| (taps(*place), index_along(input, *place))));
        Ok(Scored { name: value.name.clone(), scores, rows, by_row: norms.is_some() })
    }
}
