//! Every network of the zoo gets smaller, and says what it says with the removed channels at zero.

use std::collections::{BTreeMap, BTreeSet};

use updraft_base::random::{Key, fill_normal, fill_uniform};
use updraft_engine::{CompileOptions, CpuEngine, Engine};
use updraft_graph::zoo::{self, Options, Setting};
use updraft_graph::{Attribute, DType, Graph, Node, Tensor, ValueId};
use updraft_passes::prune::groups::{self, Group};
use updraft_passes::prune::structured;

fn network(name: &str, given: &[(&str, usize)]) -> Graph {
    let entry = zoo::find(name).unwrap();
    let given: Vec<_> = given.iter().map(|(name, n)| ((*name).to_owned(), Setting::Integer(*n))).collect();
    let mut graph = entry.build(&Options::of(entry, &given).unwrap(), 7).unwrap();
    // Zero biases and unit scales would hide a channel that is removed in one place and not in another.
    let vectors: Vec<(ValueId, Tensor)> =
        graph.constants().filter(|(_, t)| t.rank() == 1).map(|(id, t)| (id, t.clone())).collect();
    for (id, tensor) in vectors {
        let mut drawn = vec![0f32; tensor.len()];
        fill_uniform(&Key::new(5).child(&graph.value(id).name), 0, &mut drawn);
        let drawn: Vec<f32> = drawn.iter().map(|v| 0.5 + v).collect();
        graph.set_constant(id, Some(Tensor::new(tensor.shape(), &drawn).unwrap()));
    }
    graph
}

/// Two samples for every input.
fn inputs(graph: &Graph) -> Vec<(String, Tensor)> {
    let made = |id: &ValueId| {
        let value = graph.value(*id);
        let size = |(axis, dim): (usize, &updraft_graph::Dim)| dim.known().unwrap_or(if axis == 0 { 2 } else { 12 });
        let shape: Vec<usize> = graph.shape(*id).unwrap().iter().enumerate().map(size).collect();
        let count: usize = shape.iter().product();
        let tensor = if graph.dtype(*id) == Some(DType::I64) {
            Tensor::new(&shape, &(0..count as i64).map(|i| i * 7 % 2).collect::<Vec<_>>()).unwrap()
        } else {
            let mut drawn = vec![0f32; count];
            fill_normal(&Key::new(3), 0, &mut drawn);
            Tensor::new(&shape, &drawn).unwrap()
        };
        (value.name.clone(), tensor)
    };
    graph.inputs().iter().filter(|id| graph.value(**id).constant().is_none()).map(made).collect()
}

fn run(graph: &Graph, inputs: &[(String, Tensor)]) -> Vec<Tensor> {
    let engine = CpuEngine::new(2).unwrap();
    let mut session = engine.compile(graph, &CompileOptions::default()).unwrap();
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    session.run(&inputs).unwrap()
}

/// Zeroes the units in all initializers; a LayerNormalization over masked channels takes its statistics over the others.
fn mask(graph: &mut Graph, groups: &[Group], gone: &[BTreeSet<usize>]) {
    let mut scales: BTreeMap<ValueId, Vec<f32>> = BTreeMap::new();
    for (group, gone) in groups.iter().zip(gone) {
        let spaces: Vec<_> = group.parameters(graph).map(|(place, space, _)| (place, space)).collect();
        for (place, space) in spaces {
            let mut tensor = graph.value(space.value).constant().unwrap().clone();
            let (size, inner) =
                (tensor.shape()[space.axis], tensor.shape()[space.axis + 1..].iter().product::<usize>());
            let gone: BTreeSet<usize> =
                gone.iter().flat_map(|unit| group.units[*unit][place].iter().copied()).collect();
            for (at, value) in tensor.as_mut_slice::<f32>().unwrap().iter_mut().enumerate() {
                if gone.contains(&(at / inner % size)) {
                    *value = 0.0;
                }
            }
            scales.insert(space.value, (0..size).map(|i| f32::from(u8::from(!gone.contains(&i)))).collect());
            graph.set_constant(space.value, Some(tensor));
        }
    }
    let norms: Vec<(updraft_graph::NodeId, Node)> = graph
        .nodes()
        .filter(|(_, node)| node.op == "LayerNormalization")
        .map(|(id, node)| (id, node.clone()))
        .collect();
    for (id, node) in norms {
        let (x, scale) = (node.inputs[0].unwrap(), node.inputs[1].unwrap());
        let Some(mask) = scales.get(&scale) else { continue };
        let epsilon = node.attributes.float("epsilon", 1e-5).unwrap();
        let normed = layer_norm_over(graph, x, mask, epsilon);
        let mut y = graph.op("Mul", &[normed, scale], []).unwrap();
        if let Some(Some(bias)) = node.inputs.get(2) {
            y = graph.op("Add", &[y, *bias], []).unwrap();
        }
        let old = node.outputs[0].unwrap();
        graph.remove_node(id);
        graph.replace_uses(old, y);
        graph.swap_names(old, y);
    }
}

fn layer_norm_over(graph: &mut Graph, x: ValueId, mask: &[f32], epsilon: f32) -> ValueId {
    let constant = |graph: &mut Graph, tensor: Tensor| {
        graph.op_n("", "Constant", &[], [("value", Attribute::Tensor(tensor))], 1).unwrap()[0]
    };
    let count = constant(graph, Tensor::scalar(mask.iter().sum::<f32>()));
    let (epsilon, axes) = (constant(graph, Tensor::scalar(epsilon)), constant(graph, Tensor::vector(&[-1i64])));
    let mask = constant(graph, Tensor::vector(mask));
    let mut op = |name: &str, inputs: &[ValueId]| graph.op(name, inputs, []).unwrap();
    let kept = op("Mul", &[x, mask]);
    let sum = op("ReduceSum", &[kept, axes]);
    let mean = op("Div", &[sum, count]);
    let centred = op("Sub", &[x, mean]);
    let centred = op("Mul", &[centred, mask]);
    let squares = op("Mul", &[centred, centred]);
    let sum = op("ReduceSum", &[squares, axes]);
    let variance = op("Div", &[sum, count]);
    let variance = op("Add", &[variance, epsilon]);
    let deviation = op("Sqrt", &[variance]);
    op("Div", &[centred, deviation])
}

/// Half of the units of each group, drawn.
fn half(groups: &[Group]) -> Vec<BTreeSet<usize>> {
    let chosen = |(number, group): (usize, &Group)| -> BTreeSet<usize> {
        let key = Key::new(11).child_index(number as u64);
        let mut units: Vec<usize> = (0..group.units.len()).collect();
        units.sort_by_key(|unit| key.below(*unit as u64, 1 << 40));
        units.truncate(group.units.len() / 2);
        units.into_iter().collect()
    };
    groups.iter().enumerate().map(chosen).collect()
}

fn check(name: &str, given: &[(&str, usize)], expected_groups: usize) {
    let graph = network(name, given);
    let found = groups::find(&graph, &BTreeMap::new()).unwrap();
    let names: Vec<_> = found.groups.iter().map(|g| format!("{} {}x{}", g.name, g.units.len(), g.unit_width)).collect();
    assert_eq!(found.groups.len(), expected_groups, "{name}: {names:#?}\nrefused {:#?}", found.refused);
    let gone = half(&found.groups);
    let mut smaller = graph.clone();
    structured::remove(&mut smaller, &found.groups, &gone).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let parameters = |graph: &Graph| zoo::parameter_count(graph) as f64;
    assert!(parameters(&smaller) < 0.7 * parameters(&graph), "{name}: {} left", parameters(&smaller));
    let mut masked = graph.clone();
    mask(&mut masked, &found.groups, &gone);
    let inputs = inputs(&graph);
    let (expected, got) = (run(&masked, &inputs), run(&smaller, &inputs));
    for (a, b) in expected.iter().zip(&got) {
        assert_eq!(a.shape(), b.shape(), "{name}");
        let (a, b) = (a.to_f64().unwrap(), b.to_f64().unwrap());
        let size = a.iter().fold(0f64, |m, v| m.max(v.abs()));
        let error = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        // Relative to the largest output: f32 sums of the same terms in another order, through tens of layers.
        assert!(error <= 1e-5 * size && size > 0.0, "{name}: {error:e} of {size:e}");
    }
}

#[test]
fn convolutional_networks_shrink_through_residual_sums_and_depthwise_convolutions() {
    check("mlp", &[], 1);
    check("small-cnn", &[], 3);
    // Where the residual path widens, another group begins; each block has its inner channels.
    check("resnet8", &[], 6);
    check("resnet18", &[("image", 32)], 12);
    check("resnet50", &[("image", 32)], 37);
    check("mobilenet-v2", &[("image", 32)], 25);
}

#[test]
fn transformers_shrink_by_heads_hidden_features_and_width() {
    let small = [("layers", 2), ("heads", 4), ("width", 32)];
    let with = |more: &[(&'static str, usize)]| [&small[..], more].concat();
    // A layer has its heads and its hidden features; the residual path has the width.
    check("gpt", &with(&[("vocabulary", 50), ("context", 16)]), 5);
    // All of the last hidden state is an output of BERT, so the width stays.
    check("bert", &with(&[("vocabulary", 50), ("context", 16), ("hidden", 64)]), 4);
    check("vit", &with(&[("image", 32), ("patch", 8), ("hidden", 64)]), 5);
}
