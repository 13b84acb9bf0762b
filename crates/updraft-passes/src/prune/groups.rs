//! Which channels stand and fall together.
//!
//! Each index along each axis of each value is an element. Operators state how indices of one axis belong to those of
//! another ([`Link`]), so removing an index removes all that the links reach from it: the connected component, here a
//! [`Unit`]. An element may be pinned: graph inputs and outputs are what others rely on, and some operators need an
//! axis as it is. One pinned element pins its unit. Units that cover the same axes in the same numbers form a
//! [`Group`]: the output channels of one convolution with all that is added to them, the heads of one attention. The
//! idea is DepGraph's (Fang et al., 2023, <https://arxiv.org/abs/2301.12900>), carried out on indices instead of layers,
//! so that concatenation, splitting and reshaping need no cases of their own.

use std::collections::{BTreeMap, HashMap};

use updraft_graph::op::{Axis, Infer, Link, Rule, of_node};
use updraft_graph::{Graph, Node, NodeId, Tensor, ValueId};

use crate::PassError;

/// An axis of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Space {
    /// The value.
    pub value: ValueId,
    /// The axis.
    pub axis: usize,
}

/// Indices that can only be removed together: those of each space of the group, in the spaces' order.
pub type Unit = Vec<Vec<usize>>;

/// Units over the same spaces.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// The parameter that makes the channels; numbered where one makes several groups.
    pub name: String,
    /// All axes that lose indices.
    pub spaces: Vec<Space>,
    /// What can be removed, in the order of their indices.
    pub units: Vec<Unit>,
    /// Channels of a unit: more than one for heads and for the groups of a convolution.
    pub unit_width: usize,
}

/// Channels that must stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedGroup {
    /// The parameter that makes the channels.
    pub name: String,
    /// How many.
    pub width: usize,
    /// Which node needs them, and why.
    pub reason: String,
}

/// All channels of a graph.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Groups {
    /// Those that can be removed.
    pub groups: Vec<Group>,
    /// Those that cannot.
    pub refused: Vec<RefusedGroup>,
}

impl Group {
    /// Channels of all units.
    pub fn width(&self) -> usize {
        self.units.len() * self.unit_width
    }

    /// The initializers among the spaces, with the place of each in [`spaces`](Group::spaces).
    pub fn parameters<'a>(&'a self, graph: &'a Graph) -> impl Iterator<Item = (usize, Space, &'a Tensor)> {
        let constant = |space: &Space| graph.value(space.value).constant();
        self.spaces.iter().enumerate().filter_map(move |(i, space)| Some((i, *space, constant(space)?)))
    }

    /// The index of a unit in the first space, by which units are ordered.
    fn first(&self) -> Option<(Space, usize)> {
        Some((*self.spaces.first()?, *self.units.first()?.first()?.first()?))
    }
}

/// Finds all groups. Types and shapes of the graph must have been worked out. Nodes in `kept` keep all their axes, for
/// the reason given.
pub fn find(graph: &Graph, kept: &BTreeMap<NodeId, String>) -> Result<Groups, PassError> {
    let mut choices = Choices::new();
    // Of the axes that make up another one, the outermost is taken first; where it must stay, the next may be free.
    loop {
        let mut elements = Elements::of(graph);
        link_all(graph, kept, &choices, &mut elements)?;
        let mut changed = false;
        for (split, options) in std::mem::take(&mut elements.splits) {
            let choice = choices.entry(split).or_insert(0);
            if *choice < options.len() && elements.is_pinned(options[*choice]) {
                *choice += 1;
                changed = true;
            }
        }
        if !changed {
            return Ok(elements.collect(graph));
        }
    }
}

/// Which of the axes that make up one loses indices, by node and that one axis; past the last where none can.
type Choices = HashMap<(NodeId, Space), usize>;

/// Why an element is pinned.
struct Pin {
    reason: String,
    /// The axis that is pinned of itself; others are pinned because they belong to it.
    space: Space,
}

/// All elements in a union-find forest.
struct Elements {
    /// The spaces with the number of their first element, by value.
    first: Vec<Vec<Option<usize>>>,
    spaces: Vec<(Space, usize)>,
    parent: Vec<u32>,
    /// Number of the reason of a root, 0 where it may be removed.
    pinned: Vec<u32>,
    pins: Vec<Pin>,
    /// When the space was first linked to an output as a parameter's: who makes the channels.
    made: HashMap<Space, usize>,
    /// Axes that make up one, by node and that one axis.
    splits: Vec<((NodeId, Space), Vec<Space>)>,
}

impl Elements {
    fn of(graph: &Graph) -> Elements {
        let mut made = Elements {
            first: Vec::new(),
            spaces: Vec::new(),
            parent: Vec::new(),
            pinned: Vec::new(),
            pins: Vec::new(),
            made: HashMap::new(),
            splits: Vec::new(),
        };
        for (value, _) in graph.values() {
            let mut first = Vec::new();
            for (axis, dim) in graph.shape(value).unwrap_or(&[]).iter().enumerate() {
                // A size that is not known has no indices to remove.
                first.push(dim.known().map(|_| made.parent.len()));
                if let Some(len) = dim.known() {
                    made.spaces.push((Space { value, axis }, len));
                    let start = made.parent.len() as u32;
                    made.parent.extend((0..len as u32).map(|i| start + i));
                    made.pinned.resize(made.parent.len(), 0);
                }
            }
            made.first.push(first);
        }
        made
    }

    /// First element and size of an axis; `None` where its size is not known.
    fn range(&self, graph: &Graph, space: Space) -> Option<(usize, usize)> {
        let first = (*self.first.get(space.value.index())?.get(space.axis)?)?;
        Some((first, graph.shape(space.value)?.get(space.axis)?.known()?))
    }

    fn root(&mut self, element: usize) -> usize {
        let mut at = element as u32;
        while self.parent[at as usize] != at {
            let up = self.parent[self.parent[at as usize] as usize];
            self.parent[at as usize] = up;
            at = up;
        }
        at as usize
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        if a == b {
            return;
        }
        // The older reason is the better one: graph inputs and outputs come first.
        let pin = match (self.pinned[a], self.pinned[b]) {
            (0, pin) | (pin, 0) => pin,
            (a, b) => a.min(b),
        };
        let (low, high) = (a.min(b), a.max(b));
        self.parent[high] = low as u32;
        self.pinned[low] = pin;
    }

    fn pin(&mut self, graph: &Graph, space: Space, reason: impl Into<String>) {
        let Some((first, len)) = self.range(graph, space) else { return };
        self.pins.push(Pin { reason: reason.into(), space });
        let pin = self.pins.len() as u32;
        for element in first..first + len {
            let root = self.root(element);
            if self.pinned[root] == 0 {
                self.pinned[root] = pin;
            }
        }
    }

    fn pin_all(&mut self, graph: &Graph, value: ValueId, reason: &str) {
        for axis in 0..graph.shape(value).map_or(0, <[_]>::len) {
            self.pin(graph, Space { value, axis }, reason);
        }
    }

    fn is_pinned(&mut self, space: Space) -> bool {
        let Some(first) = self.first.get(space.value.index()).and_then(|f| *f.get(space.axis)?) else { return true };
        let root = self.root(first);
        self.pinned[root] != 0
    }

    /// Joins indices of two axes, or pins both where the sizes do not fit what the link says.
    fn link(&mut self, graph: &Graph, label: &str, (a, b): (Space, Space), pairs: &Pairs) {
        let ranges = (self.range(graph, a), self.range(graph, b));
        let (Some((first_a, len_a)), Some((first_b, len_b))) = ranges else {
            for space in [a, b] {
                self.pin(graph, space, format!("{label}: it goes with an axis whose size is not known"));
            }
            return;
        };
        let fits = match pairs {
            Pairs::Same => len_a == len_b,
            Pairs::Offset(offset) => offset.checked_add(len_a).is_some_and(|end| end <= len_b),
            Pairs::Block(repeat) => *repeat > 0 && len_a > 0 && len_b.is_multiple_of(len_a * repeat),
            Pairs::Grouped(groups) => {
                *groups > 0 && len_a.is_multiple_of(*groups) && len_b.is_multiple_of(*groups) && len_a.min(len_b) > 0
            }
        };
        if !fits {
            for space in [a, b] {
                self.pin(graph, space, format!("{label}: sizes {len_a} and {len_b} do not go together"));
            }
            return;
        }
        match pairs {
            Pairs::Same => (0..len_a).for_each(|i| self.join(first_a + i, first_b + i)),
            Pairs::Offset(offset) => (0..len_a).for_each(|i| self.join(first_a + i, first_b + offset + i)),
            Pairs::Block(repeat) => (0..len_b).for_each(|j| self.join(first_a + j / repeat % len_a, first_b + j)),
            Pairs::Grouped(groups) => {
                let (size_a, size_b) = (len_a / groups, len_b / groups);
                for group in 0..*groups {
                    let head = first_a + group * size_a;
                    (1..size_a).for_each(|i| self.join(head, head + i));
                    (0..size_b).for_each(|i| self.join(head, first_b + group * size_b + i));
                }
            }
        }
    }

    fn collect(mut self, graph: &Graph) -> Groups {
        let mut units: Vec<Vec<(Space, Vec<usize>)>> = Vec::new();
        let mut unit_of_root: HashMap<usize, usize> = HashMap::new();
        let mut refused: BTreeMap<u32, (usize, RefusedGroup)> = BTreeMap::new();
        for (number, (space, len)) in std::mem::take(&mut self.spaces).into_iter().enumerate() {
            let Some(first) = self.first[space.value.index()][space.axis] else { continue };
            let is_parameter = is_weight(graph, space.value);
            let mut kept: BTreeMap<u32, usize> = BTreeMap::new();
            for index in 0..len {
                let root = self.root(first + index);
                let pin = self.pinned[root];
                if pin != 0 {
                    *kept.entry(pin).or_default() += 1;
                    continue;
                }
                let unit = *unit_of_root.entry(root).or_insert(units.len());
                if unit == units.len() {
                    units.push(Vec::new());
                }
                match units[unit].last_mut() {
                    Some((last, indices)) if *last == space => indices.push(index),
                    _ => units[unit].push((space, vec![index])),
                }
            }
            for (pin, width) in kept {
                let Pin { reason, space: pinned } = &self.pins[pin as usize - 1];
                // From the third axis on a weight has the extents of its window, which are nobody's channels.
                let is_window = *pinned == space && space.axis >= 2;
                if !is_parameter || len < 2 || is_window {
                    continue;
                }
                let age = self.made.get(&space).copied().unwrap_or(usize::MAX - number);
                let name = graph.value(space.value).name.clone();
                let found = (age, RefusedGroup { name, width, reason: reason.clone() });
                match refused.get(&pin) {
                    Some((older, _)) if *older <= age => {}
                    _ => {
                        refused.insert(pin, found);
                    }
                }
            }
        }
        let mut groups: Vec<Group> = Vec::new();
        let mut by_signature: HashMap<Vec<(Space, usize)>, usize> = HashMap::new();
        for unit in units {
            let signature: Vec<(Space, usize)> = unit.iter().map(|(space, indices)| (*space, indices.len())).collect();
            let width = signature.iter().filter(|(s, _)| graph.value(s.value).constant().is_some()).map(|(_, n)| *n);
            // What no initializer makes is not a weight's to give up.
            let Some(unit_width) = width.min() else { continue };
            let indices: Unit = unit.into_iter().map(|(_, indices)| indices).collect();
            match by_signature.get(&signature) {
                Some(group) => groups[*group].units.push(indices),
                None => {
                    let spaces = signature.iter().map(|(space, _)| *space).collect();
                    by_signature.insert(signature, groups.len());
                    groups.push(Group { name: String::new(), spaces, units: vec![indices], unit_width });
                }
            }
        }
        self.name(graph, &mut groups);
        Groups { groups, refused: refused.into_values().map(|(_, refused)| refused).collect() }
    }

    /// Names groups after who makes their channels, in the order of that.
    fn name(&self, graph: &Graph, groups: &mut [Group]) {
        let maker = |group: &Group| {
            let parameters = group.spaces.iter().filter(|s| graph.value(s.value).constant().is_some());
            let age = |space: &&Space| (self.made.get(*space).copied().unwrap_or(usize::MAX), **space);
            parameters.min_by_key(age).map(|space| (age(&space), *space))
        };
        groups.sort_by_cached_key(|group| (maker(group).map(|(age, _)| age), group.first()));
        let mut seen: HashMap<String, usize> = HashMap::new();
        for group in groups {
            let Some((_, space)) = maker(group) else { continue };
            let name = graph.value(space.value).name.clone();
            let count = seen.entry(name.clone()).or_insert(0);
            *count += 1;
            group.name = if *count == 1 { name } else { format!("{name}#{count}") };
        }
    }
}

/// A float initializer of two axes or more.
pub(super) fn is_weight(graph: &Graph, value: ValueId) -> bool {
    graph.value(value).constant().is_some_and(|t| t.dtype().is_float() && t.rank() >= 2)
}

/// How indices of one axis pair with those of another.
enum Pairs {
    Same,
    /// The first is a part of the second, from here.
    Offset(usize),
    /// The first counts blocks of the second.
    Block(usize),
    /// Both are blocks.
    Grouped(usize),
}

fn link_all(
    graph: &Graph,
    kept: &BTreeMap<NodeId, String>,
    choices: &Choices,
    elements: &mut Elements,
) -> Result<(), PassError> {
    for value in graph.outputs() {
        elements.pin_all(graph, *value, &format!("{} is an output of the graph", graph.value(*value).name));
    }
    for value in graph.inputs() {
        elements.pin_all(graph, *value, &format!("{} is an input of the graph", graph.value(*value).name));
    }
    for (position, id) in graph.order()?.into_iter().enumerate() {
        let node = graph.node(id);
        let mut captured = Vec::new();
        graph.collect_captures(node, &mut captured);
        let label = node.label(graph);
        for value in captured {
            elements.pin_all(graph, value, &format!("{label}: a subgraph reads it"));
        }
        let links = match kept.get(&id) {
            Some(reason) => Err(reason.clone()),
            None => links_of(graph, node),
        };
        match links {
            Ok(Some(links)) => link_node(graph, id, &label, position, links, choices, elements),
            Ok(None) => {}
            Err(reason) => {
                for value in node.inputs.iter().chain(&node.outputs).flatten() {
                    elements.pin_all(graph, *value, &format!("{label}: {reason}"));
                }
            }
        }
    }
    Ok(())
}

/// What a node says of its axes; `None` for a constant, which is as free as an initializer.
fn links_of(graph: &Graph, node: &Node) -> Result<Option<Vec<Link>>, String> {
    if node.op == "Constant" && node.domain.is_empty() && node.attributes.tensor("value").is_ok_and(|t| t.is_some()) {
        return Ok(None);
    }
    let op = of_node(graph, node).map_err(|e| e.to_string())?;
    match op.channels {
        Rule::Is(rule) => rule(&Infer::new(graph, node)).map(Some).map_err(|e| e.to_string()),
        Rule::None(reason) => Err(reason.to_owned()),
    }
}

fn link_node(
    graph: &Graph,
    id: NodeId,
    label: &str,
    position: usize,
    links: Vec<Link>,
    choices: &Choices,
    elements: &mut Elements,
) {
    let node = graph.node(id);
    let space = |axis: Axis| -> Option<Space> {
        let (values, index, axis) = match axis {
            Axis::Input(index, axis) => (&node.inputs, index, axis),
            Axis::Output(index, axis) => (&node.outputs, index, axis),
        };
        Some(Space { value: values.get(index).copied().flatten()?, axis })
    };
    let mut named = Vec::new();
    let mut blocks: Vec<(Space, Space, usize)> = Vec::new();
    for link in links {
        let (a, b, pairs) = match link {
            Link::Same(a, b) => (a, b, Pairs::Same),
            Link::Offset { part, whole, offset, .. } => (part, whole, Pairs::Offset(offset)),
            Link::Block { outer, inner, repeat } => {
                if let (Some(outer), Some(inner)) = (space(outer), space(inner)) {
                    blocks.push((outer, inner, repeat));
                }
                continue;
            }
            Link::Grouped(a, b, groups) => (a, b, Pairs::Grouped(groups)),
            Link::Fixed(axis, reason) => {
                if let Some(space) = space(axis) {
                    elements.pin(graph, space, format!("{label}: {reason}"));
                    named.push(space);
                }
                continue;
            }
        };
        // An output that is not wanted has no axes.
        let (Some(space_a), Some(space_b)) = (space(a), space(b)) else { continue };
        named.extend([space_a, space_b]);
        if space_a != space_b {
            elements.link(graph, label, (space_a, space_b), &pairs);
        }
        for (side, other) in [(a, b), (b, a)] {
            if let (Axis::Input(..), Axis::Output(..), Some(space)) = (side, other, space(side))
                && is_weight(graph, space.value)
            {
                elements.made.entry(space).or_insert(position);
            }
        }
    }
    // One node reshapes one or more runs of axes; in each, one of the many axes stands for the one axis.
    let mut inners: Vec<Space> = blocks.iter().map(|(_, inner, _)| *inner).collect();
    inners.dedup();
    for inner in inners {
        let many: Vec<(Space, Space, usize)> = blocks.iter().copied().filter(|(_, i, _)| *i == inner).collect();
        let choice = choices.get(&(id, inner)).copied().unwrap_or(0);
        // Where none can, the outermost gives the reason.
        let (outer, _, repeat) = many[if choice < many.len() { choice } else { 0 }];
        named.extend([outer, inner]);
        elements.link(graph, label, (outer, inner), &Pairs::Block(repeat));
        elements.splits.push(((id, inner), many.iter().map(|(outer, ..)| *outer).collect()));
    }
    for value in node.inputs.iter().chain(&node.outputs).flatten() {
        for axis in 0..graph.shape(*value).map_or(0, <[_]>::len) {
            let space = Space { value: *value, axis };
            if !named.contains(&space) {
                elements.pin(graph, space, format!("{label}: it is read or made as a whole"));
            }
        }
    }
}
