//! Computes equal things once.

use std::collections::HashMap;

use updraft_graph::{Graph, Node, Tensor, ValueId};

use crate::rewrite::{FixedNames, has_subgraph, is_random};
use crate::{Pass, PassError, Promise, Report};

/// Merges nodes of one operator with equal attributes and operands, and equal small initializers.
pub const MERGE_COMMON: Pass = Pass { name: "merge common", promise: Promise::Exact, rewrite: merge_common };

/// Initializers up to this size are compared: those that nodes are told apart by are shapes, axes and scalars.
const CONSTANT_BYTES_MAX: usize = 4096;

/// Domain, operator and operands: nodes that differ in these are not compared.
type Key = (String, String, Vec<Option<ValueId>>);

fn merge_common(graph: &mut Graph, report: &mut Report) -> Result<(), PassError> {
    let names = FixedNames::of(graph);
    merge_constants(graph, &names, report);
    let mut seen: HashMap<Key, Vec<Node>> = HashMap::new();
    for id in graph.order()? {
        let node = graph.node(id).clone();
        if has_subgraph(&node) || is_random(&node) {
            continue;
        }
        let twins = seen.entry((node.domain.clone(), node.op.clone(), node.inputs.clone())).or_default();
        let Some(twin) = twins.iter().find(|twin| same_results(twin, &node)) else {
            twins.push(node);
            continue;
        };
        let label = node.label(graph);
        let pairs: Vec<_> = node.outputs.iter().zip(&twin.outputs).filter_map(|(a, b)| Some(((*a)?, (*b)?))).collect();
        // All outputs or none: a node must not stay for one name.
        if pairs.iter().any(|(old, new)| names.contains(graph, *old) && names.contains(graph, *new)) {
            report.refuse(graph, id, "joins two names that must both stay");
            continue;
        }
        graph.remove_node(id);
        for (old, new) in pairs {
            names.substitute(graph, old, new);
        }
        report.change(label);
    }
    Ok(())
}

/// Whether two nodes of one operator and equal inputs make equal outputs, and the first makes all that the second does.
fn same_results(first: &Node, second: &Node) -> bool {
    // Equality takes -0.0 for 0.0; what is printed does not.
    let same_attributes = first.attributes == second.attributes
        && first.attributes.iter().map(|a| format!("{a:?}")).eq(second.attributes.iter().map(|a| format!("{a:?}")));
    let covers =
        |i: usize, wanted: &Option<ValueId>| wanted.is_none() || first.outputs.get(i).is_some_and(|o| o.is_some());
    first.overload == second.overload
        && same_attributes
        && first.outputs.len() == second.outputs.len()
        && second.outputs.iter().enumerate().all(|(i, o)| covers(i, o))
}

fn merge_constants(graph: &mut Graph, names: &FixedNames, report: &mut Report) {
    let mut seen: HashMap<Vec<u8>, Vec<(ValueId, Tensor)>> = HashMap::new();
    let small: Vec<(ValueId, Tensor)> = graph
        .constants()
        .filter(|(id, t)| t.byte_len() <= CONSTANT_BYTES_MAX && !graph.inputs().contains(id))
        .filter(|(id, _)| !names.contains(graph, *id))
        .map(|(id, t)| (id, t.clone()))
        .collect();
    for (id, tensor) in small {
        let twins = seen.entry(tensor.bytes().to_vec()).or_default();
        match twins.iter().find(|(_, twin)| *twin == tensor) {
            None => twins.push((id, tensor)),
            Some((twin, _)) => {
                if graph.value(id).consumers().is_empty() {
                    continue;
                }
                let twin = *twin;
                report.change(format!("{} is {}", graph.value(id).name, graph.value(twin).name));
                names.substitute(graph, id, twin);
            }
        }
    }
}
