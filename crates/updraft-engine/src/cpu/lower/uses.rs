//! What a plan computes: the nodes that its ends need, and how often each value is read.

use std::collections::{HashMap, HashSet};

use updraft_graph::{Graph, NodeId, ValueId};

use super::Sources;
use crate::EngineError;
use crate::cpu::quantized::{self, recognize::IntegerStep};
use crate::cpu::shapes::fold_nodes;

/// Finds what is computed in integers, and folds the constants of everything else.
pub(super) fn find_integer_steps(
    graph: &mut Graph,
    sources: &Sources,
) -> Result<HashMap<NodeId, IntegerStep>, EngineError> {
    if !quantized::recognize::has_codes(graph) {
        return Ok(HashMap::new());
    }
    let mut kept: HashSet<ValueId> = ends(sources).collect();
    let mut captured = Vec::new();
    graph.nodes().for_each(|(_, node)| graph.collect_captures(node, &mut captured));
    kept.extend(captured);
    quantized::rewrite(graph, &kept)?;
    let (mut moved, _) = count_uses(graph, sources, &HashMap::new())?;
    moved.retain(|id| graph.node(*id).op != "DequantizeLinear");
    fold_nodes(graph, &moved)?;
    let (order, uses) = count_uses(graph, sources, &HashMap::new())?;
    let steps = quantized::recognize::find(graph, &order, &uses);
    let (mut others, _) = count_uses(graph, sources, &steps)?;
    others.retain(|id| !steps.contains_key(id));
    fold_nodes(graph, &others)?;
    Ok(steps)
}

/// Nodes that the outputs need, in execution order, with how often each value is read; of steps in integers the last
/// node stands for all.
pub(super) fn count_uses(
    graph: &Graph,
    sources: &Sources,
    steps: &HashMap<NodeId, IntegerStep>,
) -> Result<(Vec<NodeId>, Vec<usize>), EngineError> {
    let mut uses = vec![0; graph.value_count()];
    let mut kept = Vec::new();
    ends(sources).for_each(|v| uses[v.index()] += 1);
    for id in graph.order()?.into_iter().rev() {
        let node = graph.node(id);
        if !node.outputs.iter().flatten().any(|v| uses[v.index()] > 0) {
            continue;
        }
        match steps.get(&id) {
            Some(step) => step.operands().iter().for_each(|v| uses[v.index()] += 1),
            None => {
                let mut read: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
                graph.collect_captures(node, &mut read);
                read.iter().for_each(|v| uses[v.index()] += 1);
            }
        }
        kept.push(id);
    }
    kept.reverse();
    Ok((kept, uses))
}

/// Values that are read from outside, once for each time.
fn ends<'a>(sources: &'a Sources) -> impl Iterator<Item = ValueId> + 'a {
    sources.outputs.iter().chain(sources.states.iter().map(|(_, next)| next)).copied()
}
