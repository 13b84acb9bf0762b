//! Removing channels: the graph gets smaller and stays an ordinary dense one.
//!
//! Weights lose rows and columns, nodes lose groups and heads, constant sizes follow. Removing a unit gives what setting
//! all its weights, biases, scales and shifts to zero gives, but for normalisations over the pruned axis itself
//! (LayerNormalization), whose statistics are those of what is left.

use std::collections::{BTreeMap, BTreeSet};

use updraft_base::random::Key;
use updraft_graph::check::check;
use updraft_graph::graph::TensorType;
use updraft_graph::infer::{infer, infer_node};
use updraft_graph::upgrade::upgrade;
use updraft_graph::{Attribute, Dim, Graph, NodeId, Tensor, ValueId, ValueType};

use crate::PassError;
use crate::optimizer::matches;
use crate::prune::groups::{self, Group, Groups, RefusedGroup, Space};
use crate::prune::importance::{Importance, Rows, scores};
use crate::prune::operands::{Removed, rewrite};

/// What is removed, and what must stay.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Share of the channels that are removed, in [0, 1).
    pub ratio: f64,
    /// Whether every group loses this share, or all together.
    pub scope: Scope,
    /// What decides which.
    pub importance: Importance,
    /// Widths are multiples of this, and at least one multiple is left.
    pub round_to: usize,
    /// No group loses more than this share.
    pub ratio_max: f64,
    /// The same for groups that match a pattern (see [`matches`]); the first that matches counts.
    pub limits: Vec<(String, f64)>,
    /// Patterns of parameters and nodes whose groups stay as they are.
    pub exclude: Vec<String>,
    /// What random importance is drawn from.
    pub seed: u64,
    /// The widths that `ratio` is a share of, by group; the present ones where there is none. Pruning in several parts
    /// keeps those from before the first.
    pub widths: BTreeMap<String, usize>,
}

/// What a share of channels is a share of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Each group.
    Local,
    /// All groups together: the least important go, wherever they are.
    Global,
}

impl Settings {
    /// Half of each group by L2, multiples of 8, no group below a tenth.
    pub fn new(ratio: f64) -> Settings {
        Settings {
            ratio,
            scope: Scope::Local,
            importance: Importance::L2,
            round_to: 8,
            ratio_max: 0.9,
            limits: Vec::new(),
            exclude: Vec::new(),
            seed: 0,
            widths: BTreeMap::new(),
        }
    }
}

/// What became of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Width {
    /// The group: the parameter that makes the channels.
    pub group: String,
    /// Channels before.
    pub before: usize,
    /// Channels after.
    pub after: usize,
    /// Channels that go together (a head, a group of a convolution).
    pub unit: usize,
}

/// What was removed and what was not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pruned {
    /// Groups that can be pruned, also those that lost nothing.
    pub widths: Vec<Width>,
    /// Groups that cannot.
    pub refused: Vec<RefusedGroup>,
}

/// Removes the least important channels. `gradients` of parameters by name are read for [`Importance::Taylor`] only. The
/// graph is brought to the operator set that passes write.
pub fn prune(
    graph: &mut Graph,
    settings: &Settings,
    gradients: &BTreeMap<String, Tensor>,
) -> Result<Pruned, PassError> {
    check_settings(settings)?;
    upgrade(graph)?;
    infer(graph)?;
    let mut kept = BTreeMap::new();
    loop {
        let mut found = groups::find(graph, &kept)?;
        let judged = judge(graph, &mut found, settings, gradients)?;
        let removed = choose(&found.groups, &judged, settings);
        let mut smaller = graph.clone();
        match remove(&mut smaller, &found.groups, &removed) {
            Ok(()) => {
                *graph = smaller;
                let width = |(group, gone): (&Group, &BTreeSet<usize>)| Width {
                    group: group.name.clone(),
                    before: group.width(),
                    after: group.width() - gone.len() * group.unit_width,
                    unit: group.unit_width,
                };
                let widths = found.groups.iter().zip(&removed).map(width).collect();
                return Ok(Pruned { widths, refused: found.refused });
            }
            // Sizes are computed in ways that links do not tell: what the node touches stays as it is.
            Err(RemoveError::Node(id, error)) if !kept.contains_key(&id) => {
                kept.insert(id, format!("it cannot follow: {error}"));
            }
            Err(RemoveError::Node(id, error)) => return Err(PassError::node(graph, id, error)),
            Err(RemoveError::Pass(error)) => return Err(error),
        }
    }
}

fn check_settings(settings: &Settings) -> Result<(), PassError> {
    let wrong = |option, problem: String| Err(PassError::Option { option, problem });
    let share = |value: f64| (0.0..1.0).contains(&value);
    if !share(settings.ratio) {
        return wrong("ratio", format!("is {}, expected a share from 0 to below 1", settings.ratio));
    }
    let limits = settings.limits.iter().map(|(_, limit)| *limit).chain([settings.ratio_max]);
    if let Some(limit) = limits.into_iter().find(|limit| !share(*limit)) {
        return wrong("limit", format!("is {limit}, expected a share from 0 to below 1"));
    }
    match settings.round_to {
        0 => wrong("round", "is 0, expected at least 1".to_owned()),
        _ => Ok(()),
    }
}

/// The importance of all units; groups that are excluded or cannot be judged move to the refused ones.
fn judge(
    graph: &Graph,
    found: &mut Groups,
    settings: &Settings,
    gradients: &BTreeMap<String, Tensor>,
) -> Result<Vec<Vec<f64>>, PassError> {
    let key = Key::new(settings.seed).child("prune");
    let (mut stay, mut judged) = (Vec::new(), Vec::new());
    for group in std::mem::take(&mut found.groups) {
        let width = group.width();
        let refuse = |reason| RefusedGroup { name: group.name.clone(), width, reason };
        if let Some(pattern) = settings.exclude.iter().find(|pattern| touches(graph, &group, pattern)) {
            found.refused.push(refuse(format!("excluded by {pattern:?}")));
            continue;
        }
        match scores(graph, &group, settings.importance, gradients, &key)? {
            Ok(scores) => {
                judged.push(scores);
                stay.push(group);
            }
            Err(reason) => found.refused.push(refuse(reason)),
        }
    }
    found.groups = stay;
    Ok(judged)
}

/// Whether a pattern matches the group, one of its parameters, or a node that reads one.
fn touches(graph: &Graph, group: &Group, pattern: &str) -> bool {
    matches(pattern, &group.name)
        || group.parameters(graph).any(|(_, space, _)| {
            let value = graph.value(space.value);
            let readers = value.consumers().iter().map(|id| graph.node(*id));
            let names = readers.flat_map(|node| [node.name.clone(), node.label(graph)]);
            matches(pattern, &value.name) || names.into_iter().any(|name| matches(pattern, &name))
        })
}

/// The units to remove of each group.
fn choose(groups: &[Group], scores: &[Vec<f64>], settings: &Settings) -> Vec<BTreeSet<usize>> {
    let original = |group: &Group| settings.widths.get(&group.name).copied().unwrap_or(group.width());
    let ranked = |group: usize| {
        let mut units: Vec<usize> = (0..groups[group].units.len()).collect();
        units.sort_by(|a, b| scores[group][*a].total_cmp(&scores[group][*b]).then(a.cmp(b)));
        units
    };
    let targets: Vec<f64> = match settings.scope {
        Scope::Local => groups.iter().map(|group| original(group) as f64 * (1.0 - settings.ratio)).collect(),
        Scope::Global => {
            let mut widths: Vec<f64> = groups.iter().map(|group| group.width() as f64).collect();
            let total: f64 = groups.iter().map(|group| original(group) as f64).sum();
            let mut surplus = widths.iter().sum::<f64>() - total * (1.0 - settings.ratio);
            let mut all: Vec<(f64, usize)> =
                scores.iter().enumerate().flat_map(|(group, s)| s.iter().map(move |score| (*score, group))).collect();
            all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            for (_, group) in all {
                let after = widths[group] - groups[group].unit_width as f64;
                if surplus > 0.0 && after >= least(&groups[group], original(&groups[group]), settings) as f64 {
                    surplus -= widths[group] - after;
                    widths[group] = after;
                }
            }
            widths
        }
    };
    let gone = |(index, (group, target)): (usize, (&Group, f64))| {
        let multiple = multiple(group, settings);
        let rounded = (target / multiple as f64 + 0.5).floor() as usize * multiple;
        let width = rounded.max(least(group, original(group), settings)).min(group.width());
        // A width that is no multiple is left as it is where there is nothing to gain.
        let count = (group.width() - width) / group.unit_width;
        ranked(index).into_iter().take(count).collect()
    };
    groups.iter().zip(targets).enumerate().map(gone).collect()
}

/// The step of a group's widths: whole units, and multiples of what is asked for.
fn multiple(group: &Group, settings: &Settings) -> usize {
    let (a, b) = (settings.round_to, group.unit_width);
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x.max(1) * b
}

/// The least width of a group that limits and rounding allow.
fn least(group: &Group, original: usize, settings: &Settings) -> usize {
    let limit = settings.limits.iter().find(|(pattern, _)| matches(pattern, &group.name));
    let limit = limit.map_or(settings.ratio_max, |(_, limit)| *limit);
    let multiple = multiple(group, settings);
    // A hair's breadth less, so that 0.1 * 80 does not become 9 units of 1.
    let floor = (original as f64 * (1.0 - limit) - 1e-6).max(0.0);
    ((floor / multiple as f64).ceil() as usize).max(1) * multiple
}

/// Why units could not be removed.
#[derive(Debug)]
pub enum RemoveError {
    /// A node cannot follow.
    Node(NodeId, updraft_graph::op::OpError),
    /// Something is wrong with the graph as a whole.
    Pass(PassError),
}

impl<E: Into<PassError>> From<E> for RemoveError {
    fn from(error: E) -> RemoveError {
        RemoveError::Pass(error.into())
    }
}

/// Removes units of groups that [`groups::find`] found in this very graph: `gone` has their numbers for each group. On an
/// error the graph is left half-way.
pub fn remove(graph: &mut Graph, groups: &[Group], gone: &[BTreeSet<usize>]) -> Result<(), RemoveError> {
    let mut removed = Removed::new();
    for (group, gone) in groups.iter().zip(gone) {
        for unit in gone.iter().filter_map(|unit| group.units.get(*unit)) {
            for (space, indices) in group.spaces.iter().zip(unit) {
                removed.entry(*space).or_default().extend(indices);
            }
        }
    }
    if removed.is_empty() {
        return Ok(());
    }
    let order = graph.order().map_err(PassError::from)?;
    for id in &order {
        rewrite(graph, *id, &removed).map_err(|error| RemoveError::Node(*id, error))?;
    }
    shrink_constants(graph, &order, &removed)?;
    shrink_types(graph, &removed);
    for id in order {
        infer_node(graph, id).map_err(|error| RemoveError::Node(id, error))?;
    }
    graph.prune().map_err(PassError::from)?;
    Ok(check(graph).map_err(PassError::from)?)
}

fn shrink_constants(graph: &mut Graph, order: &[NodeId], removed: &Removed) -> Result<(), PassError> {
    let initializers: Vec<(ValueId, Tensor)> =
        graph.constants().filter(|(id, t)| loses(removed, *id, t.rank())).map(|(id, t)| (id, t.clone())).collect();
    for (id, tensor) in initializers {
        let tensor = without(&tensor, id, removed).map_err(|e| PassError::value(graph, id, e.to_string()))?;
        graph.set_constant(id, Some(tensor));
    }
    for id in order.iter().copied() {
        let node = graph.node(id);
        if node.op != "Constant" {
            continue;
        }
        let (Some(value), Some(tensor)) = (node.outputs.first().copied().flatten(), node.attributes.tensor("value")?)
        else {
            continue;
        };
        if loses(removed, value, tensor.rank()) {
            let tensor = without(tensor, value, removed).map_err(|e| PassError::value(graph, value, e.to_string()))?;
            graph.attributes_mut(id).set("value", Attribute::Tensor(tensor));
        }
    }
    Ok(())
}

fn loses(removed: &Removed, value: ValueId, rank: usize) -> bool {
    (0..rank).any(|axis| removed.contains_key(&Space { value, axis }))
}

/// The tensor without the removed indices of each of its axes.
fn without(tensor: &Tensor, value: ValueId, removed: &Removed) -> Result<Tensor, updraft_graph::TensorError> {
    let mut shape = tensor.shape().to_vec();
    let mut places: Vec<usize> = (0..tensor.len()).collect();
    for axis in 0..shape.len() {
        let Some(gone) = removed.get(&Space { value, axis }) else { continue };
        let rows = Rows::of(&shape, axis);
        let mut stays = vec![true; places.len()];
        gone.iter().flat_map(|index| rows.places(*index)).for_each(|place| stays[place] = false);
        let mut keep = stays.into_iter();
        places.retain(|_| keep.next().unwrap_or(false));
        shape[axis] -= gone.len();
    }
    let size = tensor.byte_len() / tensor.len().max(1);
    let bytes: Vec<u8> = places.iter().flat_map(|place| &tensor.bytes()[place * size..][..size]).copied().collect();
    Tensor::from_bytes(tensor.dtype(), &shape, &bytes)
}

fn shrink_types(graph: &mut Graph, removed: &Removed) {
    let mut types: BTreeMap<ValueId, ValueType> = BTreeMap::new();
    for (space, gone) in removed {
        let ty = types.entry(space.value).or_insert_with(|| graph.value(space.value).ty.clone());
        if let ValueType::Tensor(TensorType { shape: Some(shape), .. }) = ty
            && let Some(dim) = shape.get_mut(space.axis)
            && let Some(size) = dim.known()
            && graph.value(space.value).constant().is_none()
        {
            *dim = Dim::Known(size - gone.len());
        }
    }
    for (value, ty) in types {
        graph.set_type(value, ty);
    }
}
