//! Which nodes run on integers and which values lie between them.
//!
//! Layers (convolutions and matrix products) are worth running on integers by themselves. Element-wise operators and
//! pools are only where they lie between layers, since a conversion costs as much as they do. Operators that move
//! values take the form of what they move. So a value is kept as integers where
//!
//! - a layer reads it, directly or moved: somebody has to convert it,
//! - a convolution makes it: integer convolutions write integers,
//! - an element-wise operator makes it of integers, and a layer follows.
//!
//! Values that only moves lie between form a group with one scale, so that moving stays moving.

use std::collections::{BTreeMap, BTreeSet};

use updraft_graph::cost;
use updraft_graph::{DType, Graph, Node, NodeId, Tensor, ValueId};

use super::kind::{Kind, activations, fixed_range, kind, weights_of};
use super::quantizer::{Quantizer, QuantizerError, WeightScale, levels};
use crate::PassError;
use crate::rewrite::{FixedNames, constant};

/// How a network is quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheme {
    /// Codes of values that layers read: `u8`, `i8`, `u16` or `i16`.
    pub activations: DType,
    /// Whether zero is in the middle of those codes, as some accelerators demand.
    pub symmetric_activations: bool,
    /// Codes of weights: `i8`, or `i4`.
    pub weights: DType,
    /// Whether each output channel has its own scale.
    pub per_channel: bool,
    /// Whether weights use half of their codes, so that sums of two products fit 16 bits: processors without dot
    /// products of bytes saturate there.
    pub reduce_range: bool,
    /// How scales of weights are chosen.
    pub weight_scale: WeightScale,
    /// Labels of nodes that stay float.
    pub exclude: BTreeSet<String>,
}

impl Default for Scheme {
    /// What runs fast everywhere: `u8` values, `i8` weights with a scale a channel.
    fn default() -> Scheme {
        Scheme {
            activations: DType::U8,
            symmetric_activations: false,
            weights: DType::I8,
            per_channel: true,
            reduce_range: false,
            weight_scale: WeightScale::MaxAbs,
            exclude: BTreeSet::new(),
        }
    }
}

impl Scheme {
    /// The codes that weights use.
    pub fn weight_levels(&self) -> Result<(i32, i32), QuantizerError> {
        let (low, high) = levels(self.weights)?;
        Ok(if self.reduce_range { (low / 2, high / 2) } else { (low, high) })
    }

    /// The quantizer of a layer's weights whose output channels lie along `axis`.
    pub fn weight_quantizer(&self, weights: &Tensor, axis: Option<usize>) -> Result<Quantizer, QuantizerError> {
        let axis = axis.filter(|_| self.per_channel);
        Quantizer::of_groups(weights, self.weights, self.weight_levels()?, axis, None, self.weight_scale, true)
    }

    /// Refuses element types that the rewrites do not write.
    pub(super) fn check(&self) -> Result<(), PassError> {
        let wrong = |option, dtype: DType, expected: &str| {
            Err(PassError::Option { option, problem: format!("is {dtype}, expected {expected}") })
        };
        if !matches!(self.activations, DType::U8 | DType::I8 | DType::U16 | DType::I16) {
            return wrong("activations", self.activations, "u8, i8, u16 or i16");
        }
        if !matches!(self.weights, DType::I8 | DType::I4) {
            return wrong("weights", self.weights, "i8 or i4");
        }
        Ok(())
    }
}

/// A node that is worth running on integers.
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    /// Its label.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// Its constant weights, if it has any.
    pub weights: Option<UnitWeights>,
    /// Operations of one sample; `None` where a size is not known even for one sample.
    pub flops: Option<u64>,
}

/// The constant weights of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitWeights {
    /// The initializer's name.
    pub name: String,
    /// The axis of its output channels; `None` where they do not lie along one axis.
    pub axis: Option<usize>,
}

/// What became of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Its label.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// Whether it works on integers.
    pub quantized: bool,
    /// How it is quantized, or why it is not.
    pub reason: String,
}

/// The layers of a graph that [`prepare`](super::prepare) has seen, in execution order.
pub fn units(graph: &Graph) -> Result<Vec<Unit>, PassError> {
    let sizes = cost::input_symbols(graph).into_iter().map(|symbol| (symbol, 1)).collect();
    let bound = cost::at_sizes(graph, &sizes)?;
    let scheme = Scheme::default();
    let mut units = Vec::new();
    for id in graph.order()? {
        let node = graph.node(id);
        if kind(graph, id, &scheme)? != Kind::Layer {
            continue;
        }
        let weights =
            weights_of(graph, node).map(|(value, axis)| UnitWeights { name: graph.value(value).name.clone(), axis });
        let flops = cost::of_node(&bound, bound.node(id)).map(|cost| cost.flops);
        units.push(Unit { node: node.label(graph), op: node.op.clone(), weights, flops });
    }
    Ok(units)
}

/// The names of the values whose ranges [`insert`](super::insert) needs.
pub fn observed(graph: &Graph, scheme: &Scheme) -> Result<Vec<String>, PassError> {
    let plan = Plan::new(graph, scheme)?;
    let open = |v: &ValueId| plan.is_source(graph, *v) && fixed_range(graph, *v).is_none();
    Ok(plan.integers().filter(open).map(|v| graph.value(v).name.clone()).collect())
}

/// The part that a node plays.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Role {
    /// A layer on integers.
    Layer,
    /// Element by element, or window by window, on integers.
    Between,
    /// Moves integers.
    Move,
    /// Done as part of the node named, on what that makes before it is rounded.
    Part(NodeId),
    /// Takes rows of a constant table.
    Table,
    /// Works on floats, for this reason.
    Float(String),
    /// Works on no floats to begin with.
    Other,
}

impl Role {
    /// Whether the node's results exist as integers first.
    fn makes_integers(&self) -> bool {
        matches!(self, Role::Layer | Role::Between | Role::Move | Role::Part(_))
    }

    /// Whether the node reads integers.
    pub(super) fn reads_integers(&self) -> bool {
        matches!(self, Role::Layer | Role::Between | Role::Move)
    }
}

/// What is to be done with a graph.
pub(super) struct Plan {
    /// Nodes in execution order and the parts they play.
    pub(super) roles: Vec<(NodeId, Role)>,
    role_at: BTreeMap<NodeId, usize>,
    values: Vec<ValueId>,
    is_integer: Vec<bool>,
    group: Vec<usize>,
}

impl Plan {
    pub(super) fn new(graph: &Graph, scheme: &Scheme) -> Result<Plan, PassError> {
        let order = graph.order()?;
        let kinds: BTreeMap<NodeId, Kind> =
            order.iter().map(|id| Ok((*id, kind(graph, *id, scheme)?))).collect::<Result<_, PassError>>()?;
        let parts = Parts::new(graph, &order, &kinds);
        let demand = Demand::new(graph, &order, &kinds, &parts);
        let mut plan = Plan {
            roles: Vec::new(),
            role_at: BTreeMap::new(),
            values: graph.values().map(|(v, _)| v).collect(),
            is_integer: vec![false; graph.value_count()],
            group: (0..graph.value_count()).collect(),
        };
        for v in graph.inputs() {
            plan.is_integer[v.index()] = demand.by_layer[v.index()];
        }
        for id in order {
            let role = match parts.part_of.get(&id) {
                Some(main) if plan.role(*main).makes_integers() => Role::Part(*main),
                Some(_) => Role::Float("it follows what stays float".to_owned()),
                None => plan.role_of(graph, id, &kinds[&id], &parts, &demand),
            };
            plan.settle(graph, id, &role, &parts, &demand);
            plan.role_at.insert(id, plan.roles.len());
            plan.roles.push((id, role));
        }
        Ok(plan)
    }

    fn role_of(&self, graph: &Graph, id: NodeId, kind: &Kind, parts: &Parts, demand: &Demand) -> Role {
        let node = graph.node(id);
        match kind {
            Kind::Float(reason) => Role::Float(reason.clone()),
            Kind::Other => Role::Other,
            Kind::Table => Role::Table,
            Kind::Layer => Role::Layer,
            Kind::Between | Kind::Move => {
                let mut made = node.outputs.iter().flatten().copied().chain(parts.last_output(graph, id));
                let missing = activations(graph, node, kind).into_iter().find(|v| !self.is_integer(*v));
                match missing {
                    _ if !made.any(|v| demand.by_any[v.index()]) => {
                        Role::Float("no quantized layer follows it".to_owned())
                    }
                    Some(v) => Role::Float(format!("it reads {:?}, which stays float", graph.value(v).name)),
                    None if *kind == Kind::Move => Role::Move,
                    None => Role::Between,
                }
            }
        }
    }

    /// Decides what the node's outputs are.
    fn settle(&mut self, graph: &Graph, id: NodeId, role: &Role, parts: &Parts, demand: &Demand) {
        let node = graph.node(id);
        let made: Vec<ValueId> = node.outputs.iter().flatten().copied().collect();
        match role {
            Role::Layer | Role::Between => {
                let Some(v) = parts.last_output(graph, id) else { return };
                self.is_integer[v.index()] = match node.op.as_str() {
                    "MatMul" => demand.by_layer[v.index()],
                    "Gemm" => demand.by_any[v.index()],
                    _ => true,
                };
            }
            Role::Move => {
                for v in made.iter().copied().chain(activations(graph, node, &Kind::Move)) {
                    self.is_integer[v.index()] = true;
                    self.join(made[0], v);
                }
            }
            // The main node has settled it.
            Role::Part(_) => {}
            Role::Float(_) | Role::Table | Role::Other => {
                made.iter().for_each(|v| self.is_integer[v.index()] = demand.by_layer[v.index()]);
            }
        }
    }

    pub(super) fn role(&self, id: NodeId) -> &Role {
        self.role_at.get(&id).map_or(&Role::Other, |at| &self.roles[*at].1)
    }

    /// Whether the value lies between integers.
    pub(super) fn is_integer(&self, v: ValueId) -> bool {
        self.is_integer.get(v.index()).copied().unwrap_or(false)
    }

    /// The values that lie between integers, oldest first.
    pub(super) fn integers(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.values.iter().copied().filter(|v| self.is_integer[v.index()])
    }

    /// Whether the value is the first of its group: made, not moved.
    pub(super) fn is_source(&self, graph: &Graph, v: ValueId) -> bool {
        graph.value(v).producer().is_none_or(|(id, _)| *self.role(id) != Role::Move)
    }

    /// Whether the value exists as integers before it exists as floats.
    pub(super) fn is_made_of_integers(&self, graph: &Graph, v: ValueId) -> bool {
        graph.value(v).producer().is_some_and(|(id, _)| self.role(id).makes_integers())
    }

    /// The number of the group of values with one scale.
    pub(super) fn group(&self, v: ValueId) -> usize {
        let mut at = v.index();
        while self.group[at] != at {
            at = self.group[at];
        }
        at
    }

    fn join(&mut self, a: ValueId, b: ValueId) {
        let (a, b) = (self.group(a), self.group(b));
        self.group[a.max(b)] = a.min(b);
    }
}

/// Nodes that are done as part of the layer or sum before them.
struct Parts {
    part_of: BTreeMap<NodeId, NodeId>,
    last: BTreeMap<NodeId, NodeId>,
}

impl Parts {
    fn new(graph: &Graph, order: &[NodeId], kinds: &BTreeMap<NodeId, Kind>) -> Parts {
        let names = FixedNames::of(graph);
        let mut parts = Parts { part_of: BTreeMap::new(), last: BTreeMap::new() };
        for id in order {
            let node = graph.node(*id);
            let is_main = match kinds[id] {
                Kind::Layer => true,
                Kind::Between => matches!(node.op.as_str(), "Add" | "Mul"),
                _ => false,
            };
            if !is_main || parts.part_of.contains_key(id) {
                continue;
            }
            let next = |from: NodeId| -> Option<NodeId> {
                let [Some(v)] = graph.node(from).outputs[..] else { return None };
                let [reader] = graph.value(v).consumers() else { return None };
                let free = kinds.get(reader) == Some(&Kind::Between) && !names.contains(graph, v);
                free.then_some(*reader)
            };
            let mut last = *id;
            if node.op == "MatMul"
                && let Some(reader) = next(last).filter(|r| adds_vector(graph, graph.node(*r), last))
            {
                last = reader;
                parts.part_of.insert(reader, *id);
            }
            if let Some(reader) = next(last).filter(|r| matches!(graph.node(*r).op.as_str(), "Relu" | "Clip")) {
                last = reader;
                parts.part_of.insert(reader, *id);
            }
            parts.last.insert(*id, last);
        }
        parts
    }

    /// What the node and its parts make in the end.
    fn last_output(&self, graph: &Graph, id: NodeId) -> Option<ValueId> {
        graph.node(*self.last.get(&id).unwrap_or(&id)).outputs.first().copied().flatten()
    }
}

/// Whether `sum` adds a constant vector to the columns of what the matrix product makes.
fn adds_vector(graph: &Graph, sum: &Node, product: NodeId) -> bool {
    let made = graph.node(product).outputs.first().copied().flatten();
    let columns = made.and_then(|v| graph.shape(v)).and_then(|s| s.last()).and_then(|d| d.known());
    let is_vector = |v: ValueId| constant(graph, v).is_some_and(|t| t.rank() == 1 && Some(t.len()) == columns);
    sum.op == "Add" && sum.inputs.iter().flatten().any(|v| is_vector(*v))
}

/// Who is served by a value being integers.
struct Demand {
    /// A layer reads it, directly or moved.
    by_layer: Vec<bool>,
    /// A layer reads it, directly, moved, or through operators that could be on integers too.
    by_any: Vec<bool>,
}

impl Demand {
    fn new(graph: &Graph, order: &[NodeId], kinds: &BTreeMap<NodeId, Kind>, parts: &Parts) -> Demand {
        let none = || vec![false; graph.value_count()];
        let mut demand = Demand { by_layer: none(), by_any: none() };
        for id in order.iter().rev() {
            let node = graph.node(*id);
            let made = || node.outputs.iter().flatten();
            let (by_layer, by_any) = match kinds[id] {
                _ if parts.part_of.contains_key(id) => continue,
                Kind::Layer => (true, true),
                Kind::Move => (made().any(|v| demand.by_layer[v.index()]), made().any(|v| demand.by_any[v.index()])),
                Kind::Between => (false, parts.last_output(graph, *id).is_some_and(|v| demand.by_any[v.index()])),
                Kind::Float(_) | Kind::Table | Kind::Other => continue,
            };
            for v in activations(graph, node, &kinds[id]) {
                demand.by_layer[v.index()] |= by_layer;
                demand.by_any[v.index()] |= by_any;
            }
        }
        demand
    }
}
