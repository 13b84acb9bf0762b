//! The fingerprint: blind to names and storage, and to nothing else.

mod support;

use support::Draw;
use updraft_graph::fingerprint::fingerprint;
use updraft_graph::text::parse;
use updraft_graph::{Attribute, Attributes, DType, Graph, Node, NodeId, Tensor, ValueId, ValueType};

/// The same graph under other names, its nodes and values stored in another order.
fn disguised(graph: &Graph, draw: &mut Draw) -> Graph {
    disguise(graph, draw, &|name| name.to_owned())
}

/// `outer` gives the new names of the values around.
fn disguise(graph: &Graph, draw: &mut Draw, outer: &dyn Fn(&str) -> String) -> Graph {
    let mut order: Vec<ValueId> = graph.values().map(|(id, _)| id).collect();
    shuffle(&mut order, draw);
    let mut out = Graph::new("renamed");
    out.opsets = graph.opsets.clone();
    let mut ids = vec![None; graph.value_count()];
    let prefix = draw.below(1 << 40);
    let new_name = |id: ValueId| match graph.value(id).is_outer() {
        true => outer(&graph.value(id).name),
        false => format!("{prefix}/{}", id.index()),
    };
    for id in order {
        let value = graph.value(id);
        let new = match value.is_outer() {
            true => out.add_outer(&new_name(id), value.ty.clone()).unwrap(),
            false => out.add_value(&new_name(id), value.ty.clone()).unwrap(),
        };
        if let Some(tensor) = value.constant() {
            out.set_constant(new, Some(tensor.clone()));
            out.set_type(new, value.ty.clone());
        }
        out.set_value_notes(new, "another text".to_owned(), Vec::new());
        ids[id.index()] = Some(new);
    }
    let map = |id: &ValueId| ids[id.index()].unwrap();
    let mut nodes: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
    shuffle(&mut nodes, draw);
    for id in nodes {
        let node = graph.node(id);
        let sight = |name: &str| graph.find(name).map_or_else(|| outer(name), new_name);
        let pairs: Vec<(String, Attribute)> = node.attributes.iter().map(|(n, a)| (n.to_owned(), a.clone())).collect();
        let attributes = pairs.into_iter().map(|(name, value)| match value {
            Attribute::Graph(inner) => (name, Attribute::Graph(Box::new(disguise(&inner, draw, &sight)))),
            Attribute::Graphs(inner) => {
                (name, Attribute::Graphs(inner.iter().map(|g| disguise(g, draw, &sight)).collect()))
            }
            value => (name, value),
        });
        let node = Node {
            name: "renamed".to_owned(),
            inputs: node.inputs.iter().map(|v| v.as_ref().map(map)).collect(),
            outputs: node.outputs.iter().map(|v| v.as_ref().map(map)).collect(),
            attributes: attributes.collect::<Attributes>(),
            doc: "another text".to_owned(),
            metadata: Vec::new(),
            device_configurations: Vec::new(),
            ..node.clone()
        };
        out.add_node(node).unwrap();
    }
    out.set_inputs(graph.inputs().iter().map(map).collect());
    out.set_outputs(graph.outputs().iter().map(map).collect());
    out
}

fn shuffle<T>(items: &mut [T], draw: &mut Draw) {
    for i in (1..items.len()).rev() {
        items.swap(i, draw.below(i + 1));
    }
}

#[test]
fn renaming_and_reordering_keep_the_fingerprint() {
    for seed in 0..300 {
        let mut draw = Draw::new(seed);
        let graph = draw.graph(2, None);
        let other = disguised(&graph, &mut draw);
        assert_eq!(fingerprint(&graph).unwrap(), fingerprint(&other).unwrap(), "seed {seed}");
    }
}

#[test]
fn any_change_of_meaning_changes_the_fingerprint() {
    for seed in 0..300 {
        let mut draw = Draw::new(seed);
        let graph = draw.graph(2, None);
        let before = fingerprint(&graph).unwrap();
        let mut changes: Vec<(&str, Graph)> = Vec::new();
        for (id, tensor) in graph.constants() {
            if let Some(flipped) = with_one_bit_flipped(tensor) {
                let mut other = graph.clone();
                let ty = other.value(id).ty.clone();
                other.set_constant(id, Some(flipped));
                other.set_type(id, ty);
                changes.push(("a weight", other));
            }
        }
        for (id, _) in graph.nodes() {
            let mut other = graph.clone();
            other.attributes_mut(id).set("new", 1i64);
            changes.push(("an attribute", other));
            let mut other = graph.clone();
            let mut node = other.remove_node(id).unwrap();
            node.op.push('2');
            other.add_node(node).unwrap();
            changes.push(("an operator", other));
        }
        if let Some(id) = graph.inputs().first() {
            let mut other = graph.clone();
            other.set_type(*id, ValueType::tensor(DType::F32, vec![77.into()]));
            changes.push(("an input's type", other));
        }
        let mut other = graph.clone();
        other.push_output(graph.outputs()[0]);
        changes.push(("one more output", other));
        for (what, other) in changes {
            assert_ne!(fingerprint(&other).unwrap(), before, "seed {seed}: {what}");
        }
    }
}

fn with_one_bit_flipped(tensor: &Tensor) -> Option<Tensor> {
    let mut flipped = tensor.clone();
    *flipped.bytes_mut().last_mut()? ^= 1;
    Some(flipped)
}

#[test]
fn graphs_that_differ_in_wiring_only_have_other_fingerprints() {
    let text =
        |body: &str| format!("graph g opset 21 {{\ninput a: f32[2]\ninput b: f32[2]\n{body}\noutput y\noutput z\n}}");
    let bodies = [
        "y = Sub(a, b)\nz = Neg(y)",
        "y = Sub(b, a)\nz = Neg(y)",
        "z = Sub(a, b)\ny = Neg(z)",
        // Two equal random nodes: each read once, or one read twice.
        "r = RandomNormalLike(a)\ns = RandomNormalLike(a)\ny = Neg(r)\nz = Exp(r)",
        "r = RandomNormalLike(a)\ns = RandomNormalLike(a)\ny = Neg(r)\nz = Exp(s)",
        "r = RandomNormalLike(a)\ny = Neg(r)\nz = Exp(r)",
    ];
    let prints: Vec<_> = bodies.iter().map(|b| fingerprint(&parse(&text(b)).unwrap()).unwrap()).collect();
    for i in 0..prints.len() {
        for j in 0..i {
            assert_ne!(prints[i], prints[j], "{} and {}", bodies[i], bodies[j]);
        }
    }
}
