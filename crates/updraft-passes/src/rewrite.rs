//! The one way in which passes put a value in the place of another, without losing names that others rely on.

use std::collections::HashSet;

use updraft_graph::{Attribute, Graph, Node, Tensor, ValueId};

/// Names that must stay: those of graph outputs, and those that subgraphs refer to.
pub(crate) struct FixedNames(HashSet<String>);

impl FixedNames {
    pub(crate) fn of(graph: &Graph) -> FixedNames {
        let mut fixed = graph.outputs().to_vec();
        for (_, node) in graph.nodes() {
            graph.collect_captures(node, &mut fixed);
        }
        FixedNames(fixed.into_iter().map(|v| graph.value(v).name.clone()).collect())
    }

    /// Whether the value's name must stay.
    pub(crate) fn contains(&self, graph: &Graph, value: ValueId) -> bool {
        self.0.contains(&graph.value(value).name)
    }

    /// Lets all that reads `old` read `new`, which takes over the name of `old` where that must stay. Returns false,
    /// and changes nothing, where `new` cannot take the name because it has one to keep itself.
    pub(crate) fn substitute(&self, graph: &mut Graph, old: ValueId, new: ValueId) -> bool {
        if self.contains(graph, old) {
            let keeps_name = graph.value(new).constant().is_some()
                || graph.value(new).is_outer()
                || graph.inputs().contains(&new)
                || self.contains(graph, new);
            if keeps_name {
                return false;
            }
            graph.swap_names(old, new);
        }
        graph.replace_uses(old, new);
        true
    }
}

/// Whether the node carries graphs, which may read values that its inputs do not name.
pub(crate) fn has_subgraph(node: &Node) -> bool {
    node.attributes.iter().any(|(_, a)| matches!(a, Attribute::Graph(_) | Attribute::Graphs(_)))
}

/// Whether two runs of the node may differ.
pub(crate) fn is_random(node: &Node) -> bool {
    const RANDOM: &[&str] =
        &["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"];
    node.domain.is_empty() && RANDOM.contains(&node.op.as_str())
}

/// The tensor that a value is in every run: an initializer that no input overrides.
pub(crate) fn constant(graph: &Graph, value: ValueId) -> Option<&Tensor> {
    graph.value(value).constant().filter(|_| !graph.inputs().contains(&value))
}
