//! Functions of a model written out where they are called.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{UpgradeError, upgrade};
use crate::attribute::{Attribute, Attributes};
use crate::graph::{Graph, GraphError, Node, NodeId, ValueId, ValueType};
use crate::model::{Function, Model};

/// Nodes that inlining may make. Functions that call one another twice each double the graph with every level; the
/// largest real graphs have some hundred thousand nodes.
const NODES_MAX: usize = 300_000;

/// Calls within calls. ONNX forbids functions that call themselves, which this also bounds.
const DEPTH_MAX: usize = 64;

/// Why a function cannot be written out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InlineError {
    /// The function or the graph is of an opset that cannot be brought to that of the other.
    #[error("function {function}: operator set {domain:?} has version {found}, but the graph has version {expected}")]
    Opset {
        /// The function.
        function: String,
        /// The operator set.
        domain: String,
        /// Version in the function.
        found: u32,
        /// Version in the graph.
        expected: u32,
    },
    /// A call gives more operands than the function has, or leaves out one that a subgraph inside needs.
    #[error("node {node}: {problem}")]
    Call {
        /// The calling node's label.
        node: String,
        /// What is wrong.
        problem: String,
    },
    /// Functions call one another without end, or make too many nodes.
    #[error("node {node}: functions call one another more than {DEPTH_MAX} deep, or make more than {NODES_MAX} nodes")]
    TooLarge {
        /// The calling node's label.
        node: String,
    },
    /// A body cannot be upgraded.
    #[error("function {function}: {source}")]
    Upgrade {
        /// The function.
        function: String,
        /// What is wrong.
        source: Box<UpgradeError>,
    },
    /// Building the graph failed.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// Writes all functions out, [upgraded](upgrade) before, and returns how many calls there were. The model has none
/// afterwards.
pub fn inline_functions(model: &mut Model) -> Result<usize, InlineError> {
    if model.functions.is_empty() {
        return Ok(0);
    }
    let mut functions = std::mem::take(&mut model.functions);
    for function in &mut functions {
        let name = function.body.name.clone();
        upgrade(&mut function.body)
            .map_err(|source| InlineError::Upgrade { function: name, source: Box::new(source) })?;
    }
    let graph_name = format!("graph {:?}", model.graph.name);
    // Calls have unknown types, so the graph's own nodes alone decide its version.
    upgrade(&mut model.graph)
        .map_err(|source| InlineError::Upgrade { function: graph_name, source: Box::new(source) })?;
    let mut opsets = model.graph.opsets.clone();
    for function in &functions {
        join_opsets(&mut opsets, function)?;
    }
    let by_key =
        functions.iter().map(|f| ((f.domain.as_str(), f.body.name.as_str(), f.overload.as_str()), f)).collect();
    let mut inliner = Inliner { functions: by_key, nodes_left: NODES_MAX, calls: 0, serial: 0 };
    inliner.graph(&mut model.graph, 0)?;
    set_opsets(&mut model.graph, &opsets);
    model.graph.sort()?;
    Ok(inliner.calls)
}

/// Opsets after 21 understand the forms of it, so the newer version serves both.
fn join_opsets(opsets: &mut BTreeMap<String, u32>, function: &Function) -> Result<(), InlineError> {
    for (domain, version) in &function.body.opsets {
        let expected = *opsets.entry(domain.clone()).or_insert(*version);
        if domain.is_empty() {
            opsets.insert(domain.clone(), expected.max(*version));
        } else if expected != *version {
            return Err(InlineError::Opset {
                function: function.body.name.clone(),
                domain: domain.clone(),
                found: *version,
                expected,
            });
        }
    }
    Ok(())
}

fn set_opsets(graph: &mut Graph, opsets: &BTreeMap<String, u32>) {
    graph.opsets = opsets.clone();
    let ids: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
    for id in ids {
        for subgraph in subgraphs_mut(graph.attributes_mut(id)) {
            set_opsets(subgraph, opsets);
        }
    }
}

fn subgraphs_mut(attributes: &mut Attributes) -> impl Iterator<Item = &mut Graph> {
    attributes.iter_mut().flat_map(|(_, attribute)| match attribute {
        Attribute::Graph(inner) => std::slice::from_mut(&mut **inner),
        Attribute::Graphs(inner) => inner,
        _ => &mut [],
    })
}

struct Inliner<'a> {
    functions: HashMap<(&'a str, &'a str, &'a str), &'a Function>,
    nodes_left: usize,
    calls: usize,
    /// Makes names of different calls different.
    serial: usize,
}

impl Inliner<'_> {
    fn graph(&mut self, graph: &mut Graph, depth: usize) -> Result<(), InlineError> {
        let ids: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
        for id in ids {
            self.node(graph, id, depth)?;
        }
        Ok(())
    }

    fn node(&mut self, graph: &mut Graph, id: NodeId, depth: usize) -> Result<(), InlineError> {
        for subgraph in subgraphs_mut(graph.attributes_mut(id)) {
            self.graph(subgraph, depth)?;
        }
        let node = graph.node(id);
        let key = (node.domain.as_str(), node.op.as_str(), node.overload.as_str());
        let Some(function) = self.functions.get(&key).copied() else { return Ok(()) };
        let label = node.label(graph);
        let room = self.nodes_left.checked_sub(function.body.nodes().count()).filter(|_| depth < DEPTH_MAX);
        self.nodes_left = room.ok_or(InlineError::TooLarge { node: label.clone() })?;
        self.calls += 1;
        let Some(call) = graph.remove_node(id) else { return Ok(()) };
        for id in self.expand(graph, &call, &label, function)? {
            self.node(graph, id, depth + 1)?;
        }
        Ok(())
    }

    /// Adds the nodes of a function's body in place of a call.
    fn expand(
        &mut self,
        graph: &mut Graph,
        call: &Node,
        label: &str,
        function: &Function,
    ) -> Result<Vec<NodeId>, InlineError> {
        let body = &function.body;
        let refuse = |problem: String| InlineError::Call { node: label.to_owned(), problem };
        if call.inputs.len() > body.inputs().len() || call.outputs.len() > body.outputs().len() {
            return Err(refuse(format!(
                "function {} has {} inputs and {} outputs, found {} and {}",
                body.name,
                body.inputs().len(),
                body.outputs().len(),
                call.inputs.len(),
                call.outputs.len()
            )));
        }
        self.serial += 1;
        let prefix = if call.name.is_empty() { format!("{}_{}", call.op, self.serial) } else { call.name.clone() };
        let mut ids: Vec<Option<ValueId>> = vec![None; body.value_count()];
        for (inner, outer) in body.inputs().iter().zip(call.inputs.iter().chain(std::iter::repeat(&None))) {
            ids[inner.index()] = *outer;
        }
        // An output that is an input, or is listed twice, needs a node to give it its second name.
        let mut copies = Vec::new();
        for (inner, outer) in body.outputs().iter().zip(&call.outputs) {
            let Some(outer) = outer else { continue };
            if body.value(*inner).producer().is_some() && ids[inner.index()].is_none() {
                ids[inner.index()] = Some(*outer);
            } else {
                copies.push((*inner, *outer));
            }
        }
        for (inner, value) in body.values().filter(|(id, _)| !body.inputs().contains(id)) {
            if ids[inner.index()].is_none() {
                let hint = format!("{prefix}/{}", value.name);
                ids[inner.index()] = Some(match value.constant() {
                    Some(tensor) => graph.add_constant(&hint, tensor.clone()),
                    None => graph.fresh_value(&hint, ValueType::Unknown),
                });
            }
        }
        let mut made = Vec::new();
        for inner in body.order()? {
            let mut node = body.node(inner).clone();
            let mut captured = Vec::new();
            body.collect_captures(&node, &mut captured);
            let mut names = HashMap::new();
            for value in captured {
                let name = &body.value(value).name;
                let to = ids[value.index()].ok_or_else(|| {
                    refuse(format!("input {name:?} is left out, but a subgraph of the function reads it"))
                })?;
                names.insert(name.clone(), graph.value(to).name.clone());
            }
            resolve(&mut node.attributes, call, function);
            for subgraph in subgraphs_mut(&mut node.attributes) {
                rename_captures(subgraph, &names)?;
            }
            for value in node.inputs.iter_mut().chain(node.outputs.iter_mut()) {
                *value = value.and_then(|v| ids[v.index()]);
            }
            if !node.name.is_empty() {
                node.name = format!("{prefix}/{}", node.name);
            }
            made.push(graph.add_node(node)?);
        }
        for (inner, outer) in copies {
            let from = ids[inner.index()].ok_or_else(|| {
                refuse(format!("input {:?} is left out, but it is an output too", body.value(inner).name))
            })?;
            let node = Node {
                op: "Identity".to_owned(),
                inputs: vec![Some(from)],
                outputs: vec![Some(outer)],
                ..Node::default()
            };
            made.push(graph.add_node(node)?);
        }
        Ok(made)
    }
}

/// Replaces references to the caller's attributes by their values, in subgraphs too; one that neither the call nor the
/// function gives goes away.
fn resolve(attributes: &mut Attributes, call: &Node, function: &Function) {
    let references: Vec<(String, String)> = attributes
        .iter()
        .filter_map(|(name, value)| match value {
            Attribute::Reference { name: to, .. } => Some((name.to_owned(), to.clone())),
            _ => None,
        })
        .collect();
    for (name, to) in references {
        match call.attributes.get(&to).or_else(|| function.default_attribute(&to)) {
            Some(value) => attributes.set(&name, value.clone()),
            None => {
                attributes.remove(&name);
            }
        }
    }
    for subgraph in subgraphs_mut(attributes) {
        let ids: Vec<NodeId> = subgraph.nodes().map(|(id, _)| id).collect();
        for id in ids {
            resolve(subgraph.attributes_mut(id), call, function);
        }
    }
}

/// Gives what a subgraph reads from outside its new names there. Values of its own that have such a name make way.
fn rename_captures(graph: &mut Graph, names: &HashMap<String, String>) -> Result<(), GraphError> {
    let taken: HashSet<&str> = names.values().map(String::as_str).collect();
    let mut inner = names.clone();
    let mut moves = Vec::new();
    for (id, value) in graph.values() {
        let old = &value.name;
        if value.is_outer() {
            moves.extend(names.get(old).map(|new| (id, new.clone())));
        } else if taken.contains(old.as_str()) {
            let is_free = |name: &String| graph.find(name).is_none() && !taken.contains(name.as_str());
            let Some(new) = (0..).map(|i| format!("{old}_{i}")).find(is_free) else { continue };
            inner.insert(old.clone(), new.clone());
            moves.push((id, new));
        } else {
            inner.remove(old);
        }
    }
    // Through names that nobody has, so that two may change places.
    for (id, _) in &moves {
        graph.rename(*id, &format!("\u{0}{}", id.index()))?;
    }
    for (id, new) in &moves {
        graph.rename(*id, new)?;
    }
    let ids: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
    for id in ids {
        for subgraph in subgraphs_mut(graph.attributes_mut(id)) {
            rename_captures(subgraph, &inner)?;
        }
    }
    Ok(())
}
