//! One form for every operator: graphs of ONNX opsets 7 to 28 brought to opset 21, which passes, gradients and the
//! engine are written against.
//!
//! Older graphs are rewritten, rule by rule ([`rules`]), in the order in which ONNX changed its operators. Newer ones
//! become opset 21 where all their nodes mean the same there; else they keep their version. That is sound because no
//! opset from 22 to 28 takes anything away or changes a default: a node in the form of opset 21 means the same under
//! each of them, so passes may add their nodes to such a graph.
//!
//! The meaning of a graph does not change, to the last bit.

use std::collections::BTreeMap;

use crate::attribute::Attribute;
use crate::graph::{Graph, GraphError, Node, NodeId, OPSET, OPSET_MAX};
use crate::infer::{InferError, infer_node};
use crate::model::Model;
use crate::op::OpError;

mod inline;
mod newer;
mod rules;

pub use inline::{InlineError, inline_functions};

/// Version of the file format that opset 21 needs.
const IR_VERSION: i64 = 10;

/// What an upgrade did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UpgradeReport {
    /// Version of ONNX's operator set before.
    pub from: u32,
    /// Version of ONNX's operator set after.
    pub to: u32,
    /// How many nodes of each operator were rewritten, by the name they had.
    pub rewritten: BTreeMap<String, usize>,
}

/// Why a graph cannot be upgraded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum UpgradeError {
    /// The graph does not say its opset, or one that is not known.
    #[error("graph {graph:?} is of opset {}, expected 7 to {OPSET_MAX}", found.map_or("none".to_owned(), |v| v.to_string()))]
    Opset {
        /// The graph's name.
        graph: String,
        /// Its opset.
        found: Option<u32>,
    },
    /// A node has a form that opset 21 cannot express, or that means nothing.
    #[error("node {node}: {source}")]
    Node {
        /// The node's label.
        node: String,
        /// What is wrong.
        source: OpError,
    },
    /// Types and shapes, which some rules need, contradict one another.
    #[error(transparent)]
    Infer(#[from] InferError),
    /// The graph has no order.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// Upgrades a graph and its subgraphs.
pub fn upgrade(graph: &mut Graph) -> Result<UpgradeReport, UpgradeError> {
    let found = graph.opset("");
    let uses_onnx = graph.nodes().any(|(_, node)| is_onnx(&node.domain));
    let from = match found {
        Some(version) if (7..=OPSET_MAX).contains(&version) => version,
        None if !uses_onnx => OPSET,
        _ => return Err(UpgradeError::Opset { graph: graph.name.clone(), found }),
    };
    // Some rules ask for element types and ranks.
    infer_types(graph)?;
    let to = if from <= OPSET || newer::means_the_same(graph) { OPSET } else { from };
    let mut report = UpgradeReport { from, to, rewritten: BTreeMap::new() };
    rewrite(graph, from, to, &mut report.rewritten)?;
    Ok(report)
}

/// Upgrades a model: its graph, its functions and the version of its file format.
pub fn upgrade_model(model: &mut Model) -> Result<UpgradeReport, UpgradeError> {
    for function in &mut model.functions {
        upgrade(&mut function.body)?;
    }
    let report = upgrade(&mut model.graph)?;
    model.ir_version = model.ir_version.max(IR_VERSION);
    Ok(report)
}

fn is_onnx(domain: &str) -> bool {
    domain.is_empty() || domain == "ai.onnx"
}

/// Types and shapes as far as they can be known: in a function's body they may depend on attributes of the caller.
fn infer_types(graph: &mut Graph) -> Result<(), UpgradeError> {
    for id in graph.order()? {
        if !has_references(graph.node(id)) {
            infer_node(graph, id).map_err(|source| InferError::Node { node: graph.node(id).label(graph), source })?;
        }
    }
    Ok(())
}

fn has_references(node: &Node) -> bool {
    node.attributes.iter().any(|(_, attribute)| matches!(attribute, Attribute::Reference { .. }))
}

/// Applies the rules to a graph whose types are known.
fn rewrite(graph: &mut Graph, from: u32, to: u32, rewritten: &mut BTreeMap<String, usize>) -> Result<(), UpgradeError> {
    graph.opsets.remove("ai.onnx");
    graph.opsets.insert(String::new(), to);
    let ids: Vec<NodeId> = graph.nodes().map(|(id, _)| id).collect();
    for id in ids {
        let label = graph.node(id).label(graph);
        let refuse = |source| UpgradeError::Node { node: label.clone(), source };
        for (_, attribute) in graph.attributes_mut(id).iter_mut() {
            let subgraphs = match attribute {
                Attribute::Graph(inner) => std::slice::from_mut(&mut **inner),
                Attribute::Graphs(inner) => inner,
                _ => continue,
            };
            for subgraph in subgraphs {
                infer_types(subgraph)?;
                rewrite(subgraph, from, to, rewritten)?;
            }
        }
        if !is_onnx(&graph.node(id).domain) {
            continue;
        }
        if from > OPSET {
            if to == OPSET {
                newer::drop_new_defaults(graph, id);
            }
            continue;
        }
        let is_due = |op: &str| rules::RULES.iter().any(|rule| rule.op == op && from < rule.before);
        if !is_due(&graph.node(id).op) {
            continue;
        }
        let Some(mut node) = graph.remove_node(id) else { continue };
        let before = node.clone();
        node.domain.clear();
        for rule in rules::RULES.iter().filter(|rule| from < rule.before) {
            // An earlier rule may have made it another operator.
            if rule.op == node.op {
                (rule.apply)(graph, &mut node).map_err(refuse)?;
            }
        }
        if node != before {
            *rewritten.entry(before.op).or_default() += 1;
        }
        let is_settled = !has_references(&node);
        let id = graph.add_node(node)?;
        if is_settled {
            infer_node(graph, id).map_err(refuse)?;
        }
    }
    graph.sort()?;
    Ok(())
}
