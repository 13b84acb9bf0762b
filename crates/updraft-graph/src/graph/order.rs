//! Execution order, and what follows from it: dropping what no output needs, and one storage order for equal graphs.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{Graph, GraphError, Node, NodeId, Value, ValueId};
use crate::attribute::Attribute;

impl Graph {
    /// All nodes such that each comes after what it reads, and otherwise oldest first.
    pub fn order(&self) -> Result<Vec<NodeId>, GraphError> {
        let dependencies = |node: &Node| -> Vec<NodeId> {
            let mut read: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
            self.collect_captures(node, &mut read);
            read.iter().filter_map(|v| self.value(*v).producer).map(|(n, _)| n).collect()
        };
        let mut waiting = vec![0usize; self.nodes.len()];
        let mut readers: Vec<Vec<NodeId>> = vec![Vec::new(); self.nodes.len()];
        let mut ready = BinaryHeap::new();
        for (id, node) in self.nodes() {
            let needs = dependencies(node);
            waiting[id.index()] = needs.len();
            if needs.is_empty() {
                ready.push(Reverse(id));
            }
            for need in needs {
                readers[need.index()].push(id);
            }
        }
        let mut order = Vec::new();
        while let Some(Reverse(id)) = ready.pop() {
            order.push(id);
            for reader in &readers[id.index()] {
                waiting[reader.index()] -= 1;
                if waiting[reader.index()] == 0 {
                    ready.push(Reverse(*reader));
                }
            }
        }
        if order.len() == self.nodes().count() {
            return Ok(order);
        }
        // Every node left waits for another that is left: walking back must come round.
        let mut path: Vec<NodeId> = Vec::new();
        let mut at = self.nodes().map(|(id, _)| id).find(|id| waiting[id.index()] > 0);
        while let Some(id) = at {
            if let Some(start) = path.iter().position(|p| *p == id) {
                path.drain(..start);
                break;
            }
            path.push(id);
            at = dependencies(self.node(id)).into_iter().find(|d| waiting[d.index()] > 0);
        }
        path.reverse();
        Err(GraphError::Cycle { nodes: path.iter().map(|id| self.node(*id).label(self)).collect() })
    }

    /// Appends the values of this graph that the subgraphs of `node` read.
    pub fn collect_captures(&self, node: &Node, out: &mut Vec<ValueId>) {
        for (_, attribute) in node.attributes.iter() {
            let graphs: &[Graph] = match attribute {
                Attribute::Graph(g) => std::slice::from_ref(g),
                Attribute::Graphs(g) => g,
                _ => continue,
            };
            for (_, value) in graphs.iter().flat_map(Graph::values).filter(|(_, v)| v.is_outer) {
                if let Some(id) = self.find(&value.name) {
                    out.push(id);
                }
            }
        }
    }

    /// Drops nodes that no output needs and values that nothing names, renumbering both; nodes come in execution
    /// order. Graph inputs stay.
    pub fn prune(&mut self) -> Result<(), GraphError> {
        let order = self.order()?;
        let mut live = vec![false; self.values.len()];
        for v in self.outputs.iter().chain(&self.inputs) {
            live[v.index()] = true;
        }
        let mut kept = Vec::new();
        for id in order.into_iter().rev() {
            let node = self.node(id);
            if node.outputs.iter().flatten().any(|v| live[v.index()]) {
                let mut read: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
                self.collect_captures(node, &mut read);
                for v in read.iter().chain(node.outputs.iter().flatten()) {
                    live[v.index()] = true;
                }
                kept.push(id);
            }
        }
        kept.reverse();
        let values: Vec<ValueId> = self.values().map(|(id, _)| id).filter(|id| live[id.index()]).collect();
        self.relayout(&values, &kept)
    }

    /// Stores nodes in execution order and values as a file lists them (inputs, initializers, what nodes make, what
    /// subgraphs read from outside), dropping values that nothing names, in subgraphs too. Two graphs that differ in
    /// storage only are equal afterwards.
    pub fn sort(&mut self) -> Result<(), GraphError> {
        for (_, attribute) in self.nodes.iter_mut().flatten().flat_map(|node| node.attributes.iter_mut()) {
            match attribute {
                Attribute::Graph(inner) => inner.sort()?,
                Attribute::Graphs(inner) => inner.iter_mut().try_for_each(Graph::sort)?,
                _ => {}
            }
        }
        let order = self.order()?;
        let mut values = Vec::new();
        let mut is_listed = vec![false; self.values.len()];
        let mut list = |id: ValueId| {
            if !std::mem::replace(&mut is_listed[id.index()], true) {
                values.push(id);
            }
        };
        self.inputs.iter().copied().for_each(&mut list);
        let (sparse, dense): (Vec<_>, Vec<_>) = self.constants().partition(|(id, _)| self.value(*id).is_sparse);
        dense.into_iter().chain(sparse).for_each(|(id, _)| list(id));
        order.iter().flat_map(|id| self.node(*id).outputs.iter().flatten()).copied().for_each(&mut list);
        for id in &order {
            let node = self.node(*id);
            let mut read: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
            self.collect_captures(node, &mut read);
            read.into_iter().for_each(&mut list);
        }
        self.outputs.iter().copied().for_each(&mut list);
        self.relayout(&values, &order)
    }

    /// Keeps only these values and nodes, in this order, under new ids.
    fn relayout(&mut self, values: &[ValueId], nodes: &[NodeId]) -> Result<(), GraphError> {
        let mut new_ids: Vec<Option<ValueId>> = vec![None; self.values.len()];
        let mut old_values: Vec<Option<Value>> = std::mem::take(&mut self.values).into_iter().map(Some).collect();
        for id in values {
            let Some(value) = old_values[id.index()].take() else { continue };
            new_ids[id.index()] = Some(ValueId(self.values.len() as u32));
            self.values.push(Value { producer: None, consumers: Vec::new(), ..value });
        }
        self.names = self.values.iter().enumerate().map(|(i, v)| (v.name.clone(), ValueId(i as u32))).collect();
        let map = |v: &ValueId| new_ids[v.index()];
        self.inputs = self.inputs.iter().filter_map(map).collect();
        self.outputs = self.outputs.iter().filter_map(map).collect();
        let mut old_nodes = std::mem::take(&mut self.nodes);
        for id in nodes {
            let Some(mut node) = old_nodes[id.index()].take() else { continue };
            for v in node.inputs.iter_mut().chain(node.outputs.iter_mut()) {
                *v = v.and_then(|v| new_ids[v.index()]);
            }
            self.add_node(node)?;
        }
        Ok(())
    }
}
