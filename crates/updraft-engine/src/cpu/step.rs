//! What a plan consists of: storages, and the steps that read and write them.

use updraft_graph::{DType, NodeId, Tensor};

use crate::cpu::kernel::Kernel;

/// Number of a storage in its plan.
pub(crate) type StorageId = usize;

/// Memory that values lie in. Views of one value share a storage.
#[derive(Debug, Clone)]
pub(crate) struct Storage {
    pub(crate) bytes: usize,
    pub(crate) place: Place,
}

/// Where a storage is.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// In the arena, from this byte on.
    Arena(usize),
    /// A tensor that never changes.
    Constant(Tensor),
    /// What the caller gave for this input of the run.
    Input(usize),
    /// This state tensor.
    State(usize),
    /// A tensor made during the run, of a shape that is known only then.
    Heap,
    /// Where another storage is, which this one overwrites.
    Alias(StorageId),
}

/// Part of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) storage: StorageId,
    pub(crate) offset_bytes: usize,
    pub(crate) bytes: usize,
}

/// A whole value for those who want a tensor: contiguous in a storage, or on the heap.
#[derive(Debug, Clone)]
pub(crate) struct Whole {
    pub(crate) span: Span,
    /// `None` on the heap.
    pub(crate) facts: Option<(DType, Vec<usize>)>,
}

/// One thing to do.
pub(crate) struct Step {
    /// Labels of the nodes it computes.
    pub(crate) label: String,
    /// Their operators, joined by `+`.
    pub(crate) op: String,
    pub(crate) inputs: Vec<Option<Span>>,
    pub(crate) outputs: Vec<Option<Span>>,
    pub(crate) run: StepRun,
    /// For each worker.
    pub(crate) scratch_bytes: usize,
    /// Pairs (output, input): the output may lie where the input does.
    pub(crate) in_place: Vec<(usize, usize)>,
}

/// How a step is done.
pub(crate) enum StepRun {
    Kernel(Box<dyn Kernel>),
    /// By the reference evaluation of this node.
    Reference(Reference),
}

/// A node for the reference evaluation. Its operands are also the step's inputs and outputs.
pub(crate) struct Reference {
    pub(crate) node: NodeId,
    pub(crate) inputs: Vec<Option<Whole>>,
    pub(crate) outputs: Vec<Option<Whole>>,
    /// Values that its subgraphs read, by name.
    pub(crate) captures: Vec<(String, Whole)>,
}

/// Everything needed to run a graph with inputs of certain shapes.
pub(crate) struct Plan {
    /// With concrete shapes; the reference evaluation reads nodes from it.
    pub(crate) graph: updraft_graph::Graph,
    pub(crate) storages: Vec<Storage>,
    pub(crate) steps: Vec<Step>,
    pub(crate) outputs: Vec<Whole>,
    /// State tensors to copy at the end of a run, because they could not be updated in place.
    pub(crate) write_back: Vec<(usize, Whole)>,
    pub(crate) arena_bytes: usize,
    /// For each worker, of the greediest step.
    pub(crate) scratch_bytes: usize,
}
