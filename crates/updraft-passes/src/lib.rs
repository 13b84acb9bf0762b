//! Graph to Graph: gradient, optimizer, fold, fuse.
//!
//! A pass rewrites a graph in place, promises how far the meaning may move, and reports what it changed and what it
//! left alone. [`pipeline`] runs passes in the order that a goal needs and checks the graph after each one, so that a
//! wrong graph is blamed on the pass that made it.

use updraft_graph::check::CheckError;
use updraft_graph::graph::GraphError;
use updraft_graph::infer::InferError;
use updraft_graph::op::OpError;
use updraft_graph::upgrade::UpgradeError;
use updraft_graph::{Graph, NodeId, ValueId};

mod affine;
mod batch;
mod common;
pub mod distill;
mod fold;
pub mod gradient;
mod identity;
pub mod loss;
pub mod optimizer;
pub mod pipeline;
pub mod prune;
pub mod quantize;
mod rewrite;
pub mod schedule;
mod train_mode;
mod trainable;
pub mod training;

pub use batch::open_batch;

/// How far the outputs of a graph may move when a pass rewrites it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Promise {
    /// Not at all: the same operations on the same numbers, or none.
    Exact,
    /// By this much relative to the largest magnitude of each output, because rounding falls elsewhere.
    Within(f64),
    /// As far as a measurement of accuracy allows; or the outputs are new ones.
    Lossy,
}

/// A rewrite that needs nothing but the graph.
#[derive(Clone, Copy)]
pub struct Pass {
    /// What reports and errors call it.
    pub name: &'static str,
    /// What it keeps.
    pub promise: Promise,
    /// The rewrite itself.
    pub rewrite: fn(&mut Graph, &mut Report) -> Result<(), PassError>,
}

/// What a pass did.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The pass.
    pub pass: &'static str,
    /// What it promised.
    pub promise: Promise,
    /// What it changed, one line a change, each naming a node or value.
    pub changes: Vec<String>,
    /// What it could have changed but did not.
    pub refusals: Vec<Refusal>,
}

/// A node that a pass left alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The node's label.
    pub node: String,
    /// Why.
    pub reason: String,
}

impl Report {
    /// An empty report of a pass.
    pub fn new(pass: &'static str, promise: Promise) -> Report {
        Report { pass, promise, changes: Vec::new(), refusals: Vec::new() }
    }

    /// Notes a change.
    pub fn change(&mut self, what: impl Into<String>) {
        self.changes.push(what.into());
    }

    /// Notes a node that stays as it is.
    pub fn refuse(&mut self, graph: &Graph, node: NodeId, reason: impl Into<String>) {
        self.refusals.push(Refusal { node: graph.node(node).label(graph), reason: reason.into() });
    }
}

/// Why a pass cannot rewrite a graph.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PassError {
    /// Something is wrong with one node.
    #[error("node {node}: {source}")]
    Node {
        /// The node's label.
        node: String,
        /// What is wrong.
        source: OpError,
    },
    /// A gradient is asked for through an operator that has none.
    #[error("node {node} has no gradient: {reason}")]
    NoGradient {
        /// The node's label.
        node: String,
        /// Why.
        reason: String,
    },
    /// A value is not what the pass needs.
    #[error("value {name:?} {problem}")]
    Value {
        /// The value's name.
        name: String,
        /// What is wrong, and what is expected.
        problem: String,
    },
    /// A setting of the pass is wrong.
    #[error("{option} {problem}")]
    Option {
        /// Which setting.
        option: &'static str,
        /// What is wrong, and what is expected.
        problem: String,
    },
    /// A teacher cannot be brought to its form for inference.
    #[error("the teacher cannot be made part of a training step")]
    Teacher(#[source] Box<pipeline::PipelineError>),
    /// Nodes that a pass adds do not fit.
    #[error(transparent)]
    Op(#[from] OpError),
    /// An edit was refused.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// Types and shapes contradict one another.
    #[error(transparent)]
    Infer(#[from] InferError),
    /// The graph cannot be brought to the operator set that passes write.
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    /// The graph is not valid.
    #[error(transparent)]
    Check(#[from] CheckError),
}

impl PassError {
    /// An error about one node of a graph.
    pub(crate) fn node(graph: &Graph, node: NodeId, source: OpError) -> PassError {
        PassError::Node { node: graph.node(node).label(graph), source }
    }

    /// An error about one value of a graph.
    pub(crate) fn value(graph: &Graph, value: ValueId, problem: impl Into<String>) -> PassError {
        PassError::Value { name: graph.value(value).name.clone(), problem: problem.into() }
    }
}
