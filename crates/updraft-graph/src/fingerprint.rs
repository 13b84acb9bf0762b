//! A digest of what a graph computes, whatever its values and nodes are called and in whatever order they are stored.
//!
//! Each value is known by where it comes from: an input by its place and type, an initializer by its elements, what a
//! node makes by the operator, attributes and the digests of what the node reads. That tells values apart by all that
//! lies before them. A second walk, from the outputs back, adds who reads each node, so that two equal random nodes
//! read by one reader each differ from one that is read by both. The sorted digests of all nodes and initializers,
//! with those of the outputs in order, make the fingerprint.
//!
//! Types count where they are stated facts: those of inputs. All others follow from them. Documentation, metadata and
//! other notes do not count.

use std::collections::HashMap;

use updraft_base::digest::{Digest, Hasher};

use crate::attribute::{Attribute, SparseTensor};
use crate::graph::{Graph, GraphError, Node, NodeId, ValueId, ValueType};
use crate::text::hash_tensor;

/// The fingerprint of a graph. Outer values of a subgraph that stands alone count by their names, having nothing else.
///
/// # Errors
/// A graph whose nodes form a cycle has none.
pub fn fingerprint(graph: &Graph) -> Result<Digest, GraphError> {
    fingerprint_in(graph, &|name| tagged("outer", |h| h.field(name.as_bytes())))
}

fn fingerprint_in(graph: &Graph, outer: &dyn Fn(&str) -> Digest) -> Result<Digest, GraphError> {
    let order = graph.order()?;
    let mut values: Vec<Option<Digest>> = vec![None; graph.value_count()];
    for (id, value) in graph.values() {
        values[id.index()] = match value.constant() {
            Some(tensor) => Some(tagged("constant", |h| hash_tensor(tensor, h))),
            None if value.is_outer() => Some(outer(&value.name)),
            None if value.producer().is_none() => Some(tagged("undefined", |h| h.field(value.name.as_bytes()))),
            None => None,
        };
    }
    for (place, id) in graph.inputs().iter().enumerate() {
        let default = values[id.index()].filter(|_| graph.value(*id).constant().is_some());
        values[id.index()] = Some(tagged("input", |h| {
            h.update(&(place as u64).to_le_bytes());
            hash_type(&graph.value(*id).ty, h);
            hash_optional(default, h);
        }));
    }
    let mut nodes: HashMap<NodeId, Digest> = HashMap::new();
    for id in &order {
        let node = graph.node(*id);
        let digest = node_digest(graph, node, &values, outer)?;
        nodes.insert(*id, digest);
        for (place, value) in node.outputs.iter().enumerate() {
            if let Some(value) = value {
                values[value.index()] = Some(tagged("made", |h| {
                    h.update(digest.as_bytes());
                    h.update(&(place as u64).to_le_bytes());
                }));
            }
        }
    }

    // Who reads each value, from the outputs back.
    let mut readers: Vec<Vec<Digest>> = vec![Vec::new(); graph.value_count()];
    for (place, id) in graph.outputs().iter().enumerate() {
        readers[id.index()].push(tagged("output", |h| h.update(&(place as u64).to_le_bytes())));
    }
    let mut parts: Vec<Digest> = Vec::new();
    for id in order.iter().rev() {
        let node = graph.node(*id);
        let digest = tagged("node", |h| {
            hash_optional(nodes.get(id).copied(), h);
            for value in &node.outputs {
                let mut of_value = value.map_or(Vec::new(), |v| readers[v.index()].clone());
                of_value.sort();
                h.update(&(of_value.len() as u64).to_le_bytes());
                of_value.iter().for_each(|d| h.update(d.as_bytes()));
            }
        });
        parts.push(digest);
        let mut read: Vec<ValueId> = Vec::new();
        graph.collect_captures(node, &mut read);
        let captured = read.into_iter().map(|v| (usize::MAX, v));
        let inputs = node.inputs.iter().enumerate().filter_map(|(place, v)| Some((place, (*v)?)));
        for (place, value) in inputs.chain(captured) {
            readers[value.index()].push(tagged("reader", |h| {
                h.update(digest.as_bytes());
                h.update(&(place as u64).to_le_bytes());
            }));
        }
    }
    parts.extend(graph.constants().filter_map(|(id, _)| values[id.index()]));
    parts.sort();
    Ok(tagged("graph", |h| {
        for list in [graph.inputs(), graph.outputs()] {
            h.update(&(list.len() as u64).to_le_bytes());
            list.iter().for_each(|v| hash_optional(values[v.index()], h));
        }
        parts.iter().for_each(|d| h.update(d.as_bytes()));
    }))
}

fn node_digest(
    graph: &Graph,
    node: &Node,
    values: &[Option<Digest>],
    outer: &dyn Fn(&str) -> Digest,
) -> Result<Digest, GraphError> {
    // A subgraph's outer values are this graph's values, or those around it.
    let sight = |name: &str| match graph.find(name).and_then(|v| values[v.index()]) {
        Some(digest) => digest,
        None => outer(name),
    };
    let mut hasher = Hasher::new();
    hasher.field(b"operator");
    let domain = if node.domain == "ai.onnx" { "" } else { &node.domain };
    for text in [domain, &node.op, &node.overload] {
        hasher.field(text.as_bytes());
    }
    hasher.update(&graph.opset(&node.domain).unwrap_or(0).to_le_bytes());
    hasher.update(&(node.inputs.len() as u64).to_le_bytes());
    for value in &node.inputs {
        hash_optional(value.and_then(|v| values[v.index()]), &mut hasher);
    }
    hasher.update(&(node.outputs.len() as u64).to_le_bytes());
    for value in &node.outputs {
        hasher.update(&[u8::from(value.is_some())]);
    }
    for (name, attribute) in node.attributes.iter() {
        hasher.field(name.as_bytes());
        hash_attribute(attribute, &sight, &mut hasher)?;
    }
    Ok(hasher.finish())
}

fn hash_attribute(attribute: &Attribute, outer: &dyn Fn(&str) -> Digest, h: &mut Hasher) -> Result<(), GraphError> {
    fn list<T>(items: &[T], h: &mut Hasher, mut hash: impl FnMut(&T, &mut Hasher)) {
        h.update(&(items.len() as u64).to_le_bytes());
        items.iter().for_each(|item| hash(item, h));
    }
    let mut tag = |tag: &str| h.field(tag.as_bytes());
    match attribute {
        Attribute::Int(v) => {
            tag("int");
            h.update(&v.to_le_bytes());
        }
        Attribute::Float(v) => {
            tag("float");
            h.update(&v.to_bits().to_le_bytes());
        }
        Attribute::String(v) => {
            tag("string");
            h.field(v);
        }
        Attribute::Tensor(v) => {
            tag("tensor");
            hash_tensor(v, h);
        }
        Attribute::SparseTensor(v) => {
            tag("sparse tensor");
            hash_sparse(v, h);
        }
        Attribute::Graph(v) => {
            tag("graph");
            h.update(fingerprint_in(v, outer)?.as_bytes());
        }
        Attribute::Type(v) => {
            tag("type");
            hash_type(v, h);
        }
        Attribute::Ints(v) => {
            tag("ints");
            list(v, h, |v, h| h.update(&v.to_le_bytes()));
        }
        Attribute::Floats(v) => {
            tag("floats");
            list(v, h, |v, h| h.update(&v.to_bits().to_le_bytes()));
        }
        Attribute::Strings(v) => {
            tag("strings");
            list(v, h, |v, h| h.field(v));
        }
        Attribute::Tensors(v) => {
            tag("tensors");
            list(v, h, hash_tensor);
        }
        Attribute::SparseTensors(v) => {
            tag("sparse tensors");
            list(v, h, hash_sparse);
        }
        Attribute::Graphs(v) => {
            tag("graphs");
            for graph in v {
                h.update(fingerprint_in(graph, outer)?.as_bytes());
            }
        }
        Attribute::Types(v) => {
            tag("types");
            list(v, h, hash_type);
        }
        Attribute::Reference { name, kind } => {
            tag("reference");
            h.field(name.as_bytes());
            h.update(&kind.to_le_bytes());
        }
    }
    Ok(())
}

fn hash_sparse(sparse: &SparseTensor, h: &mut Hasher) {
    h.field(format!("{:?}", sparse.shape).as_bytes());
    hash_tensor(&sparse.values, h);
    hash_tensor(&sparse.indices, h);
}

/// The text of a type is unique.
fn hash_type(ty: &ValueType, h: &mut Hasher) {
    h.field(crate::text::show_type(ty).as_bytes());
}

fn hash_optional(digest: Option<Digest>, h: &mut Hasher) {
    match digest {
        Some(digest) => h.field(digest.as_bytes()),
        None => h.field(b""),
    }
}

fn tagged(tag: &str, fill: impl FnOnce(&mut Hasher)) -> Digest {
    let mut hasher = Hasher::new();
    hasher.field(tag.as_bytes());
    fill(&mut hasher);
    hasher.finish()
}
