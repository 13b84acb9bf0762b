//! Difficulty moved from activations to weights: factors of channels that go into what makes a value and, inverted, into
//! the layers that read it.
//!
//! Dividing channel `j` of a value by `t[j]` and multiplying column `j` of every layer that reads it by the same leaves the
//! network's function as it is. Where the value comes from a normalisation or a linear layer, the division is one of
//! their constants and costs nothing. Two ways to choose the factors:
//!
//! - SmoothQuant (Xiao, Lin, Seznec, Wu, Demouth and Han 2022, arXiv:2211.10438): `t = max|x|^α / max|w|^(1 - α)`, so that
//!   neither side has outliers;
//! - AWQ (Lin, Tang, Tang, Yang, Xiao, Dang, Gan and Han 2023, arXiv:2306.00978): `t = mean|x|^α`, so that weights with
//!   large inputs lose less by rounding.
//!
//! Both are searched over α for the least error of the layers' outputs; not to change anything is a candidate as well.

use std::collections::BTreeMap;

use updraft_graph::op::OpError;
use updraft_graph::{Dim, Graph, NodeId, Tensor, ValueId};

use crate::quantize::rounding::{Layer, Moments, RoundingError, nearest, row_errors};
use crate::quantize::{Quantizer, QuantizerError};
use crate::rewrite::{FixedNames, constant};
use crate::{PassError, Refusal};

/// Layers that read one value whose channels can be divided at no cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// The layers.
    pub layers: Vec<Layer>,
    edits: Vec<Edit>,
}

/// A constant operand that is divided along an axis.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Edit {
    node: NodeId,
    input: usize,
    /// Counted from the last.
    axis: usize,
}

/// The values read by `layers` whose channels can be divided, and the layers where that cannot be done, with the reason.
pub fn sites(graph: &Graph, layers: &[Layer]) -> (Vec<Site>, Vec<Refusal>) {
    let names = FixedNames::of(graph);
    let mut by_input: BTreeMap<&str, Vec<&Layer>> = BTreeMap::new();
    layers.iter().for_each(|layer| by_input.entry(&layer.input).or_default().push(layer));
    let (mut sites, mut refusals) = (Vec::new(), Vec::new());
    // In execution order of the first layer that reads a value.
    for first in layers {
        let Some(readers) = by_input.remove(first.input.as_str()) else { continue };
        match site(graph, &names, &readers) {
            Ok(site) => sites.push(site),
            Err(reason) => refusals
                .extend(readers.iter().map(|layer| Refusal { node: layer.node.clone(), reason: reason.clone() })),
        }
    }
    (sites, refusals)
}

fn site(graph: &Graph, names: &FixedNames, layers: &[&Layer]) -> Result<Site, String> {
    let input = graph.find(&layers[0].input).ok_or_else(|| "its input is not in the graph".to_owned())?;
    if layers.iter().any(|layer| layer.input_axis().is_none()) {
        return Err("its inputs are channels of windows".to_owned());
    }
    let columns = layers[0].columns();
    // Once for each operand that is the value, so a layer that also multiplies with it or adds it is found.
    for id in graph.value(input).consumers() {
        let node = graph.node(*id);
        let others = node.inputs.iter().skip(1).any(|v| *v == Some(input));
        if others || !layers.iter().any(|layer| layer.id == *id) {
            return Err(format!("{} reads its input as well", node.label(graph)));
        }
    }
    if names.contains(graph, input) {
        return Err("its input is an output of the graph".to_owned());
    }
    let mut edits = Vec::new();
    divide(graph, names, input, columns, &mut edits)?;
    Ok(Site { layers: layers.iter().map(|layer| (*layer).clone()).collect(), edits })
}

/// Finds the constants to divide such that `value` is divided along its last axis, which has `columns` channels.
fn divide(
    graph: &Graph,
    names: &FixedNames,
    value: ValueId,
    columns: usize,
    edits: &mut Vec<Edit>,
) -> Result<(), String> {
    let Some((id, 0)) = graph.value(value).producer() else {
        return Err("its input is not made by a node that can be scaled".to_owned());
    };
    let node = graph.node(id);
    let label = || node.label(graph);
    let rank = graph.shape(value).map(<[Dim]>::len).ok_or_else(|| "the rank of its input is not known".to_owned())?;
    let operand = |index: usize| node.inputs.get(index).copied().flatten();
    // What lies between must be read by nothing else.
    let through = |v: ValueId, edits: &mut Vec<Edit>| -> Result<(), String> {
        let last = graph.shape(v).and_then(<[Dim]>::last).and_then(Dim::known);
        match graph.value(v).consumers() {
            [_] if names.contains(graph, v) => Err(format!("{:?} must stay as it is", graph.value(v).name)),
            [_] if last == Some(columns) => divide(graph, names, v, columns, edits),
            [_] => Err(format!("{:?} does not have its channels last", graph.value(v).name)),
            _ => Err(format!("{:?} is read elsewhere", graph.value(v).name)),
        }
    };
    let vector = |index: usize| -> Result<Option<Edit>, String> {
        let Some(v) = operand(index) else { return Ok(None) };
        let tensor = constant(graph, v).ok_or_else(|| format!("input {index} of {} is not constant", label()))?;
        if !tensor.dtype().is_float() || (tensor.len() != 1 && tensor.shape().last() != Some(&columns)) {
            return Err(format!("input {index} of {} is no vector of channels", label()));
        }
        Ok(Some(Edit { node: id, input: index, axis: 0 }))
    };
    let is_constant = |v: ValueId| constant(graph, v).is_some();
    let kind = if node.domain.is_empty() || node.domain == "com.microsoft" { node.op.as_str() } else { "" };
    match (kind, operand(0), operand(1)) {
        ("LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization", Some(_), Some(_)) => {
            let axis = node.attributes.int("axis", -1).map_err(|e| e.to_string())?;
            if axis != -1 && axis != rank as i64 - 1 {
                return Err(format!("{} does not normalise the last axis alone", label()));
            }
            edits.extend(vector(1)?);
            edits.extend(vector(2)?);
            Ok(())
        }
        ("BatchNormalization", Some(_), Some(_)) if rank == 2 => {
            edits.extend(vector(1)?);
            edits.extend(vector(2)?);
            Ok(())
        }
        ("Mul", Some(a), Some(b)) => match (is_constant(a), is_constant(b)) {
            (true, true) => Err(format!("{} is constant", label())),
            (true, false) => {
                edits.extend(vector(0)?);
                Ok(())
            }
            (false, true) => {
                edits.extend(vector(1)?);
                Ok(())
            }
            (false, false) => {
                let mut found = edits.clone();
                if a != b && through(b, &mut found).is_ok() {
                    *edits = found;
                    return Ok(());
                }
                through(a, edits)
            }
        },
        ("Add" | "Sub", Some(a), Some(b)) => {
            for (index, v) in [(0, a), (1, b)] {
                if is_constant(v) {
                    edits.extend(vector(index)?);
                } else {
                    through(v, edits)?;
                }
            }
            Ok(())
        }
        ("MatMul" | "Gemm", Some(_), Some(_)) => {
            let layer = Layer::of(graph, id).map_err(|reason| format!("{}: {reason}", label()))?;
            let axis = 1 - layer.output_axis();
            edits.push(Edit { node: id, input: 1, axis });
            edits.extend(vector(2)?);
            Ok(())
        }
        ("Div" | "Relu" | "LeakyRelu" | "PRelu" | "Identity" | "Dropout", Some(x), _) if !is_constant(x) => {
            through(x, edits)
        }
        _ => Err(format!("factors of channels do not pass {}", label())),
    }
}

impl Site {
    /// Divides the value's channels by factors and multiplies the layers' weights by them.
    pub fn fold(&self, graph: &mut Graph, factors: &[f32]) -> Result<(), PassError> {
        for edit in &self.edits {
            edit_constant(graph, edit, factors, |x, factor| x / factor)?;
        }
        for layer in &self.layers {
            let edit = Edit { node: layer.id, input: 1, axis: layer.output_axis() };
            edit_constant(graph, &edit, factors, |x, factor| x * factor)?;
        }
        Ok(())
    }
}

/// Replaces a constant operand by what `change` makes of its elements and the factor of each.
fn edit_constant(
    graph: &mut Graph,
    edit: &Edit,
    factors: &[f32],
    change: impl Fn(f64, f64) -> f64,
) -> Result<(), PassError> {
    let node = graph.node(edit.node).clone();
    let operand = node.inputs.get(edit.input).copied().flatten();
    let Some((value, tensor)) = operand.and_then(|v| Some((v, constant(graph, v)?.clone()))) else { return Ok(()) };
    let wrong = |e: OpError| PassError::node(graph, edit.node, e);
    let elements = tensor.to_f64().map_err(|e| wrong(e.into()))?;
    // A scalar becomes a vector.
    let shape = if tensor.len() == 1 && factors.len() > 1 { vec![factors.len()] } else { tensor.shape().to_vec() };
    let inner: usize = shape.iter().rev().take(edit.axis).product();
    let count: usize = shape.iter().product();
    let changed: Vec<f64> = (0..count)
        .map(|i| change(elements[i % elements.len()], f64::from(factors[i / inner.max(1) % factors.len()])))
        .collect();
    let changed = Tensor::from_f64(tensor.dtype(), &shape, &changed).map_err(|e| wrong(e.into()))?;
    if graph.value(value).consumers().len() == 1 && !FixedNames::of(graph).contains(graph, value) {
        graph.set_constant(value, Some(changed));
    } else {
        let name = graph.value(value).name.clone();
        let copy = graph.add_constant(&name, changed);
        graph.set_node_input(edit.node, edit.input, Some(copy));
    }
    Ok(())
}

/// Exponents that SmoothQuant tries, both ends included.
const SMOOTH_EXPONENTS: [f32; 13] = [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9];

/// How many exponents AWQ tries between 0 and 1, both ends included.
const AWQ_EXPONENTS: usize = 20;

/// SmoothQuant's factors for each exponent, from the weights of the layers that read the value.
pub fn smooth_candidates(moments: &Moments, layers: &[(&Layer, &Tensor)]) -> Result<Vec<Vec<f32>>, RoundingError> {
    let columns = moments.columns();
    let mut weights_max = vec![0f32; columns];
    for (layer, weights) in layers {
        let inner: usize = weights.shape().iter().skip(layer.input_axis().unwrap_or(0) + 1).product();
        for (i, w) in weights.as_slice::<f32>()?.iter().enumerate() {
            let greatest = &mut weights_max[i / inner.max(1) % columns];
            *greatest = greatest.max(w.abs());
        }
    }
    let inputs_max = moments.max_abs();
    let of = |alpha: f32| {
        let pairs = inputs_max.iter().zip(&weights_max);
        // A channel without inputs or without weights has no difficulty to be moved.
        pairs.map(|(x, w)| if *x > 0.0 && *w > 0.0 { x.powf(alpha) / w.powf(1.0 - alpha) } else { 0.0 }).collect()
    };
    Ok(SMOOTH_EXPONENTS.into_iter().map(|alpha| normalised(of(alpha))).collect())
}

/// AWQ's factors for each exponent.
pub fn awq_candidates(moments: &Moments) -> Vec<Vec<f32>> {
    let mean_abs = moments.mean_abs();
    let of = |i: usize| {
        let alpha = i as f32 / (AWQ_EXPONENTS - 1) as f32;
        normalised(mean_abs.iter().map(|m| m.powf(alpha)).collect())
    };
    (0..AWQ_EXPONENTS).map(of).collect()
}

/// Positive factors around one: divided by the geometric mean of the least and the greatest. Channels without a factor
/// get one.
fn normalised(mut factors: Vec<f32>) -> Vec<f32> {
    let usable = |f: &f32| f.is_normal() && *f > 0.0;
    let (least, greatest) =
        factors.iter().filter(|f| usable(f)).fold((f32::MAX, 0f32), |(l, g), f| (l.min(*f), g.max(*f)));
    let middle = (f64::from(least) * f64::from(greatest)).sqrt();
    // Past this, products of factors and weights would leave the range of small floats.
    const MOST: f64 = 1e4;
    for f in &mut factors {
        *f = if usable(f) { (f64::from(*f) / middle).clamp(1.0 / MOST, MOST) as f32 } else { 1.0 };
    }
    factors
}

/// What the outputs of some layers are judged by.
pub struct Judge<'a> {
    /// The layers, which read the same value, with their weights.
    pub layers: Vec<(&'a Layer, &'a Tensor)>,
    /// The moments of the value.
    pub moments: &'a Moments,
    /// What codes weights get: the quantizer of a layer's weights.
    pub quantizer: &'a dyn Fn(&Layer, &Tensor) -> Result<Quantizer, QuantizerError>,
    /// Codes of the value, if it gets any: how many there are.
    pub input_levels: Option<u32>,
}

impl Judge<'_> {
    /// The candidate with the least error of the layers' outputs; `None` where none is better than no factors.
    pub fn best(&self, candidates: Vec<Vec<f32>>) -> Result<Option<Vec<f32>>, RoundingError> {
        let mut least = self.error(&vec![1.0; self.moments.columns()])?;
        let mut best = None;
        for candidate in candidates {
            let error = self.error(&candidate)?;
            if error < least {
                (least, best) = (error, Some(candidate));
            }
        }
        Ok(best)
    }

    /// The mean square by which outputs move. Codes of inputs are taken to err evenly within half a step of a range that
    /// covers all that was seen, each on its own.
    fn error(&self, factors: &[f32]) -> Result<f64, RoundingError> {
        let columns = factors.len();
        let hessian = self.moments.second();
        let ranges = self.moments.ranges();
        let divided = ranges.iter().zip(factors).map(|((min, max), t)| (min / t, max / t));
        let (min, max) =
            divided.fold((0f32, 0f32), |(least, greatest), (min, max)| (least.min(min), greatest.max(max)));
        let step = self.input_levels.map_or(0.0, |levels| f64::from(max - min) / f64::from(levels.max(2) - 1));
        let mut error = 0.0;
        for (layer, weights) in &self.layers {
            let axis = layer.input_axis().unwrap_or(0);
            let inner: usize = weights.shape()[axis + 1..].iter().product();
            let mut scaled = (*weights).clone();
            scaled
                .as_mut_slice::<f32>()?
                .iter_mut()
                .enumerate()
                .for_each(|(i, w)| *w *= factors[i / inner.max(1) % columns]);
            let quantizer = (self.quantizer)(layer, &scaled)?;
            layer.round(&scaled, &quantizer, |_, matrix, quantizer| {
                let rounded = nearest(matrix, quantizer)?;
                let back = quantizer.dequantize(&rounded.codes)?;
                let (before, after) = (matrix.as_slice::<f32>()?, back.as_slice::<f32>()?);
                let places = before.iter().zip(after).enumerate();
                let differences: Vec<f32> = places.map(|(i, (a, b))| (b - a) / factors[i % columns]).collect();
                error += row_errors(&differences, &hessian, columns).iter().sum::<f64>();
                error += step * step / 12.0 * after.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
                Ok(rounded)
            })?;
        }
        Ok(error)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use updraft_base::random::{Key, fill_normal};
    use updraft_graph::eval::evaluate;
    use updraft_graph::zoo::{self, Options, Setting};
    use updraft_graph::{Attributes, DType, ValueType};

    use super::*;
    use crate::quantize::WeightScale;
    use crate::quantize::rounding::layers;

    fn normal(seed: u64, shape: &[usize]) -> Tensor {
        let mut values = vec![0f32; shape.iter().product()];
        fill_normal(&Key::new(seed), 0, &mut values);
        Tensor::new(shape, &values).unwrap()
    }

    /// Folds factors between a quarter and four wherever that can be done and checks that the outputs stay; returns how
    /// many sites there were. Powers of two divide and multiply without rounding, so that with them every bit stays.
    fn check(graph: &Graph, inputs: &HashMap<String, Tensor>, seed: u64, powers_of_two: bool) -> usize {
        let factors = |seed: u64, columns: usize| -> Vec<f32> {
            let exponents = (0..columns).map(|i| Key::new(seed).uniform_f32(i as u64) * 4.0 - 2.0);
            exponents.map(|e| if powers_of_two { e.round() } else { e }.exp2()).collect()
        };
        let before = evaluate(graph, inputs).unwrap();
        let (found, refusals) = layers(graph).unwrap();
        assert_eq!(refusals, []);
        let (sites, refused) = sites(graph, &found);
        let covered: usize = sites.iter().map(|s| s.layers.len()).sum();
        assert_eq!(covered + refused.len(), found.len());
        let mut folded = graph.clone();
        for (i, site) in sites.iter().enumerate() {
            site.fold(&mut folded, &factors(seed ^ i as u64, site.layers[0].columns())).unwrap();
        }
        updraft_graph::infer::infer(&mut folded).unwrap();
        updraft_graph::check::check(&folded).unwrap();
        for (a, b) in before.iter().zip(evaluate(&folded, inputs).unwrap()) {
            if powers_of_two {
                assert_eq!(a.to_f64().unwrap(), b.to_f64().unwrap(), "seed {seed}");
                continue;
            }
            let (a, b) = (a.to_f64().unwrap(), b.to_f64().unwrap());
            let largest = a.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            // Each weight is rounded twice more, to 2^-24; layers of up to a hundred inputs follow one another.
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-4 * largest), "seed {seed}");
        }
        sites.len()
    }

    #[test]
    fn a_gpt_has_sites_behind_its_norms_and_its_function_stays() {
        let number = Setting::Integer;
        let entry = zoo::find("gpt").unwrap();
        for bias in [false, true] {
            let given = [
                ("vocabulary", number(17)),
                ("context", number(8)),
                ("layers", number(2)),
                ("heads", number(2)),
                ("width", number(16)),
                ("bias", Setting::Flag(bias)),
            ];
            let given: Vec<_> = given.iter().map(|(n, s)| ((*n).to_owned(), s.clone())).collect();
            let mut graph = entry.build(&Options::of(entry, &given).unwrap(), 3).unwrap();
            crate::quantize::prepare(&mut graph).unwrap();
            let tokens = Tensor::new(&[2, 8], &(0..16i64).collect::<Vec<_>>()).unwrap();
            // Two norms in each block, and the one before the logits.
            assert_eq!(check(&graph, &[("tokens".to_owned(), tokens)].into(), 1, false), 5);
        }
    }

    #[test]
    fn layers_of_a_bert_say_why_factors_cannot_be_folded_and_its_function_stays() {
        let number = Setting::Integer;
        let entry = zoo::find("bert").unwrap();
        let given = [
            ("vocabulary", number(17)),
            ("context", number(8)),
            ("layers", number(2)),
            ("heads", number(2)),
            ("width", number(16)),
            ("hidden", number(32)),
        ];
        let given: Vec<_> = given.iter().map(|(n, s)| ((*n).to_owned(), s.clone())).collect();
        let mut graph = entry.build(&Options::of(entry, &given).unwrap(), 3).unwrap();
        crate::quantize::prepare(&mut graph).unwrap();
        let ints = |v: Vec<i64>| Tensor::new(&[1, 8], &v).unwrap();
        let inputs = [
            ("input_ids", ints((0..8).collect())),
            ("attention_mask", ints(vec![1; 8])),
            ("token_type_ids", ints(vec![0; 8])),
        ];
        check(&graph, &inputs.map(|(n, t)| (n.to_owned(), t)).into(), 1, false);
        let (found, _) = layers(&graph).unwrap();
        let (_, refused) = sites(&graph, &found);
        assert!(refused.iter().any(|r| r.reason.contains("reads its input as well")), "{refused:?}");
        assert!(refused.iter().any(|r| r.reason.contains("do not pass")), "{refused:?}");
    }

    /// A chain of norms, layers and what lies between, with branches, drawn by `key`.
    fn random(key: &Key) -> Graph {
        let draw = |i: u64, n: u64| key.child("draw").below(i, n) as usize;
        let mut graph = Graph::new("random");
        let width = 2 + draw(0, 6);
        let mut x = graph.add_input("x", ValueType::tensor(DType::F32, vec![3.into(), width.into()])).unwrap();
        let mut columns = width;
        let constant = |graph: &mut Graph, i: u64, shape: &[usize]| {
            graph.add_constant("c", normal(key.child_index(i).to_u64(), shape))
        };
        for step in 0..8u64 {
            let at = 10 * step;
            let op = |graph: &mut Graph, op: &str, inputs: &[ValueId], attributes: Attributes| {
                graph.op(op, inputs, attributes).unwrap()
            };
            x = match draw(at + 1, 11) {
                0 | 1 => {
                    let (scale, bias) =
                        (constant(&mut graph, at, &[columns]), constant(&mut graph, at + 1, &[columns]));
                    op(&mut graph, "LayerNormalization", &[x, scale, bias], [("axis", (-1i64).into())].into())
                }
                2 | 3 => {
                    let next = 1 + draw(at + 2, 7);
                    let w = constant(&mut graph, at, &[columns, next]);
                    columns = next;
                    op(&mut graph, "MatMul", &[x, w], [].into())
                }
                4 | 5 => {
                    let next = 1 + draw(at + 2, 7);
                    let (w, c) = (
                        constant(&mut graph, at, &[next, columns]),
                        constant(&mut graph, at + 1, [[next].as_slice(), &[1]][draw(at + 3, 2)]),
                    );
                    columns = next;
                    op(&mut graph, "Gemm", &[x, w, c], [("transB", 1i64.into()), ("beta", 0.5f32.into())].into())
                }
                6 => op(&mut graph, "Relu", &[x], [].into()),
                7 => {
                    let c = constant(&mut graph, at, [[columns].as_slice(), &[]][draw(at + 3, 2)]);
                    op(&mut graph, ["Add", "Sub", "Mul"][draw(at + 2, 3)], &[c, x], [].into())
                }
                8 => {
                    let y = op(&mut graph, "Tanh", &[x], [].into());
                    op(&mut graph, ["Add", "Mul"][draw(at + 2, 2)], &[x, y], [].into())
                }
                9 => {
                    let (a, b) = (
                        constant(&mut graph, at, &[columns, columns]),
                        constant(&mut graph, at + 1, &[columns, columns]),
                    );
                    let (a, b) =
                        (op(&mut graph, "MatMul", &[x, a], [].into()), op(&mut graph, "MatMul", &[x, b], [].into()));
                    let a = op(&mut graph, "Sigmoid", &[a], [].into());
                    op(&mut graph, ["Add", "Mul"][draw(at + 2, 2)], &[a, b], [].into())
                }
                _ => {
                    graph.push_output(x);
                    op(&mut graph, "LeakyRelu", &[x], [].into())
                }
            };
        }
        graph.push_output(x);
        graph
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn folded_factors_leave_the_function_of_random_graphs_as_it_is(seed: u64) {
            let graph = random(&Key::new(seed));
            let columns = graph.known_shape(graph.inputs()[0]).unwrap()[1];
            check(&graph, &[("x".to_owned(), normal(seed ^ 7, &[3, columns]))].into(), seed, true);
        }
    }

    #[test]
    fn the_best_candidate_is_no_worse_than_none_and_outliers_are_moved() {
        let (columns, outputs) = (32, 24);
        let mut graph = Graph::new("layer");
        let x = graph.add_input("x", ValueType::tensor(DType::F32, vec![4.into(), columns.into()])).unwrap();
        let w = graph.add_constant("w", normal(1, &[columns, outputs]));
        let y = graph.op("MatMul", &[x, w], []).unwrap();
        graph.push_output(y);
        let (found, _) = layers(&graph).unwrap();
        let weights = normal(1, &[columns, outputs]);
        let mut rows = normal(2, &[500, columns]);
        // Two channels of inputs are far larger than the others.
        let elements = rows.as_mut_slice::<f32>().unwrap();
        elements.chunks_exact_mut(columns).for_each(|row| [3, 17].iter().for_each(|i| row[*i] *= 40.0));
        let mut moments = Moments::new(columns);
        moments.add(elements).unwrap();
        for (dtype, input_levels, candidates) in [
            (DType::I8, Some(256), smooth_candidates(&moments, &[(&found[0], &weights)]).unwrap()),
            (DType::I4, None, awq_candidates(&moments)),
        ] {
            let quantizer = |layer: &Layer, w: &Tensor| {
                Quantizer::of_weights(w, dtype, Some(layer.output_axis()), WeightScale::MaxAbs)
            };
            let layers = vec![(&found[0], &weights)];
            let judge = Judge { layers, moments: &moments, quantizer: &quantizer, input_levels };
            let best = judge.best(candidates).unwrap().expect("outliers are worth moving");
            let (plain, moved) = (judge.error(&vec![1.0; columns]).unwrap(), judge.error(&best).unwrap());
            assert!(moved < 0.5 * plain, "{dtype}: {moved} against {plain}");
            assert_eq!(judge.best(vec![vec![1.0; columns]]).unwrap(), None);
        }
    }
}
