//! From a graph of concrete shapes to steps.
//!
//! Nodes are visited in execution order. A node that only renames elements becomes a view. A node that can work on a
//! tile of its output joins the open group that makes what it reads, if every tile of the group then still depends
//! on nothing but the same tile (see [`group`](crate::cpu::group)). All others become steps at once. A group becomes
//! a step when somebody outside needs it.

mod emit;
mod uses;

use std::collections::HashMap;

use updraft_graph::op::{OpView, resolve_axis};
use updraft_graph::tensor::element_count;
use updraft_graph::{DType, Graph, Node, NodeId, OpError, ValueId};

use crate::EngineError;
use crate::cpu::arena::{self, Ends};
use crate::cpu::build::{self, Build, Built, Operand};
use crate::cpu::conv::{self, fuse::FusedConv};
use crate::cpu::elementwise::Op;
use crate::cpu::group::{Group, Member, Work};
use crate::cpu::layout::Layout;
use crate::cpu::map::{self, Argument};
use crate::cpu::quantized::{self, recognize::IntegerStep};
use crate::cpu::step::{Place, Plan, Reference, Span, Step, StepRun, Storage, StorageId, Whole};
use crate::cpu::view;
use uses::{count_uses, find_integer_steps};

/// A value of known type and shape, and where it lies.
#[derive(Debug, Clone)]
pub(crate) struct Static {
    pub(crate) storage: StorageId,
    pub(crate) dtype: DType,
    pub(crate) layout: Layout,
}

impl Static {
    pub(crate) fn span(&self) -> Span {
        let size = self.dtype.size_in_memory();
        Span { storage: self.storage, offset_bytes: self.layout.offset * size, bytes: self.layout.span() * size }
    }
}

#[derive(Debug, Clone)]
enum Slot {
    Static(Static),
    Heap(StorageId),
}

/// Where inputs and state come from.
pub(crate) struct Sources<'a> {
    /// Inputs of a run, in the order in which they are handed to the plan.
    pub(crate) inputs: &'a [ValueId],
    /// State inputs, and the values that they become.
    pub(crate) states: &'a [(ValueId, ValueId)],
    /// What a run returns.
    pub(crate) outputs: &'a [ValueId],
}

/// The steps of a graph made by [`shapes::concrete`](crate::cpu::shapes::concrete).
pub(crate) fn lower(mut graph: Graph, sources: &Sources) -> Result<Plan, EngineError> {
    let integer_steps = find_integer_steps(&mut graph, sources)?;
    let (order, uses) = count_uses(&graph, sources, &integer_steps)?;
    let mut cx = Lowering {
        graph: &graph,
        slots: vec![None; graph.value_count()],
        uses,
        storages: Vec::new(),
        remaining: Vec::new(),
        group_of: HashMap::new(),
        steps: Vec::new(),
        groups: Vec::new(),
        numbers: HashMap::new(),
        absorbed: vec![false; graph.value_count()],
        fused_convs: HashMap::new(),
        integer_steps,
    };
    for (index, value) in sources.inputs.iter().enumerate() {
        cx.add_source(*value, Place::Input(index));
    }
    for (index, (value, _)) in sources.states.iter().enumerate() {
        cx.add_source(*value, Place::State(index));
    }
    cx.find_summed_products(&order);
    cx.find_fused_convs(&order);
    for id in order {
        let label = graph.node(id).label(&graph);
        cx.lower_node(id).map_err(|e| EngineError::Node { node: label, message: e.to_string() })?;
    }
    let ended = |e: OpError| EngineError::Node { node: "outputs".to_owned(), message: e.to_string() };
    let outputs: Vec<Whole> = sources.outputs.iter().map(|v| cx.whole(*v).map_err(ended)).collect::<Result<_, _>>()?;
    let next: Vec<Whole> = sources.states.iter().map(|(_, v)| cx.whole(*v).map_err(ended)).collect::<Result<_, _>>()?;
    for group in 0..cx.groups.len() {
        cx.close(group);
    }
    let Lowering { mut storages, mut steps, .. } = cx;
    sink_updates(&mut steps, &next);
    let output_storages: Vec<StorageId> = outputs.iter().map(|w| w.span.storage).collect();
    let states: Vec<Option<StorageId>> = next.iter().map(|w| w.facts.as_ref().map(|_| w.span.storage)).collect();
    let arena_bytes = arena::place(&mut storages, &mut steps, &Ends { outputs: &output_storages, states: &states });
    let write_back = next
        .into_iter()
        .enumerate()
        .filter(|(state, whole)| {
            let owner = arena::root(&storages, whole.span.storage);
            !matches!(storages[owner].place, Place::State(s) if s == *state)
        })
        .collect();
    let scratch_bytes = steps.iter().map(|s| s.scratch_bytes).max().unwrap_or(0);
    Ok(Plan { graph, storages, steps, outputs, write_back, arena_bytes, scratch_bytes })
}

/// Moves steps that make nothing but next values of state to the end: then nobody reads the old values any more, they
/// can be overwritten in place, and a run that fails has changed nothing.
fn sink_updates(steps: &mut Vec<Step>, next: &[Whole]) {
    let mut read = std::collections::HashSet::new();
    for step in steps.iter() {
        read.extend(step.inputs.iter().flatten().map(|s| s.storage));
    }
    let is_update = |step: &Step| {
        step.outputs
            .iter()
            .flatten()
            .all(|s| !read.contains(&s.storage) && next.iter().any(|w| w.span.storage == s.storage))
    };
    let (last, first): (Vec<Step>, Vec<Step>) = std::mem::take(steps).into_iter().partition(is_update);
    steps.extend(first);
    steps.extend(last);
}

pub(crate) struct Lowering<'g> {
    graph: &'g Graph,
    slots: Vec<Option<Slot>>,
    /// Reads of each value that are still to come.
    uses: Vec<usize>,
    storages: Vec<Storage>,
    /// Reads of each storage, through any value that lies in it, that are still to come.
    remaining: Vec<usize>,
    /// The open group that makes a storage.
    group_of: HashMap<StorageId, usize>,
    steps: Vec<Step>,
    groups: Vec<Option<Group>>,
    /// Constants made for operators' numbers.
    numbers: HashMap<u32, StorageId>,
    /// Values that the node which reads them computes on the way: products of matrices that are summed over the batch,
    /// convolutions before a residual sum or an activation.
    absorbed: Vec<bool>,
    /// By their last node.
    fused_convs: HashMap<NodeId, FusedConv>,
    /// By their last node.
    integer_steps: HashMap<NodeId, IntegerStep>,
}

impl<'g> Lowering<'g> {
    fn add_storage(&mut self, bytes: usize, place: Place) -> StorageId {
        self.storages.push(Storage { bytes, place });
        self.remaining.push(0);
        self.storages.len() - 1
    }

    fn add_source(&mut self, value: ValueId, place: Place) {
        let slot = match self.facts(value) {
            Some((dtype, shape)) => {
                let bytes = element_count(&shape).unwrap_or(0) * dtype.size_in_memory();
                let storage = self.add_storage(bytes, place);
                Slot::Static(Static { storage, dtype, layout: Layout::contiguous(&shape) })
            }
            None => Slot::Heap(self.add_storage(0, place)),
        };
        self.set_slot(value, slot);
    }

    /// Element type and shape of a value that can lie in memory that is planned.
    fn facts(&self, value: ValueId) -> Option<(DType, Vec<usize>)> {
        let dtype = self.graph.dtype(value).filter(|d| d.size_in_memory() > 0)?;
        let shape = self.graph.known_shape(value)?;
        element_count(&shape)?.checked_mul(dtype.size_in_memory())?;
        Some((dtype, shape))
    }

    fn set_slot(&mut self, value: ValueId, slot: Slot) {
        let storage = match &slot {
            Slot::Static(s) => s.storage,
            Slot::Heap(s) => *s,
        };
        self.remaining[storage] += self.uses[value.index()];
        self.slots[value.index()] = Some(slot);
    }

    fn slot(&mut self, value: ValueId) -> Result<Slot, OpError> {
        if self.slots[value.index()].is_none() {
            let entry = self.graph.value(value);
            let Some(tensor) = entry.constant() else {
                return Err(OpError::value(format!("{:?} is made by no node and is no input", entry.name)));
            };
            self.add_source(value, Place::Constant(tensor.clone()));
        }
        self.slots[value.index()].clone().ok_or_else(|| OpError::value("a value has no place"))
    }

    fn fixed(&mut self, value: ValueId) -> Result<Static, OpError> {
        match self.slot(value)? {
            Slot::Static(s) => Ok(s),
            Slot::Heap(_) => Err(OpError::shape("the shape of an input is known only at run time")),
        }
    }

    /// One read less of a value is to come.
    fn read(&mut self, value: ValueId) {
        self.uses[value.index()] -= 1;
        match self.slots[value.index()] {
            Some(Slot::Static(Static { storage, .. }) | Slot::Heap(storage)) => self.remaining[storage] -= 1,
            None => {}
        }
    }

    /// New memory for an output.
    pub(crate) fn make(&mut self, value: ValueId, dtype: DType, layout: Layout) -> Static {
        let made = self.make_unnamed(dtype, layout);
        self.set_slot(value, Slot::Static(made.clone()));
        made
    }

    fn make_unnamed(&mut self, dtype: DType, layout: Layout) -> Static {
        let storage = self.add_storage(layout.len() * dtype.size_in_memory(), Place::Arena(0));
        Static { storage, dtype, layout }
    }

    pub(crate) fn lower_node(&mut self, id: NodeId) -> Result<(), OpError> {
        let node = self.graph.node(id);
        if node.outputs.iter().flatten().any(|v| self.absorbed[v.index()]) {
            return Ok(());
        }
        if let Some(step) = self.integer_steps.remove(&id) {
            return quantized::lower::lower(self, &step);
        }
        if let Some(fused) = self.fused_convs.remove(&id) {
            return conv::fuse::lower(self, id, &fused);
        }
        let mut is_static = node.outputs.iter().flatten().all(|v| self.facts(*v).is_some());
        for value in node.inputs.iter().flatten() {
            is_static &= matches!(self.slot(*value)?, Slot::Static(_));
        }
        let empty = |v: &ValueId| self.facts(*v).is_some_and(|(_, shape)| shape.contains(&0));
        if !is_static || node.outputs.iter().flatten().any(empty) {
            return self.reference(id);
        }
        let mut cx = self.build(node)?;
        if let Some(layouts) = view::layouts(&cx)? {
            let Some(Some(source)) = node.inputs.first() else { return self.reference(id) };
            let source = self.fixed(*source)?;
            for (value, layout) in node.outputs.iter().zip(layouts) {
                if let Some(value) = value {
                    let slot = Slot::Static(Static { layout, ..source.clone() });
                    self.set_slot(*value, slot);
                }
            }
            self.read_all(node);
            return Ok(());
        }
        if view::is_reshape(&node.op) && node.domain.is_empty() {
            // The elements lie so that no strides express the new shape: they are moved first.
            let (Some(Some(value)), Some(Some(output))) = (node.inputs.first(), node.outputs.first()) else {
                return self.reference(id);
            };
            let source = self.contiguous(*value)?;
            let shape = self.facts(*output).map(|(_, s)| s).unwrap_or_default();
            let layout = Layout::contiguous(&shape);
            self.set_slot(
                *output,
                Slot::Static(Static { layout: Layout { offset: source.layout.offset, ..layout }, ..source }),
            );
            self.read_all(node);
            return Ok(());
        }
        if quantized::lower::lower_moves(self, &cx)? {
            return Ok(());
        }
        if let Some(operations) = map::operations(&cx)? {
            return self.lower_map(node, &operations);
        }
        if crate::cpu::matmul::lower(self, id, &cx)?.is_some() {
            return Ok(());
        }
        let built = match build::find(&node.domain, &node.op) {
            Some(builder) => builder(&mut cx)?,
            None => None,
        };
        let strided = cx.strided;
        match built {
            Some(built) => self.lower_built(node, built, &strided),
            None => self.reference(id),
        }
    }

    /// What builders see of a node.
    pub(crate) fn build(&mut self, node: &'g Node) -> Result<Build<'g>, OpError> {
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for value in &node.inputs {
            inputs.push(match value {
                Some(v) => {
                    let Static { dtype, layout, .. } = self.fixed(*v)?;
                    Some(Operand { dtype, layout, constant: self.graph.value(*v).constant() })
                }
                None => None,
            });
        }
        let outputs = node.outputs.iter().map(|v| v.and_then(|v| self.facts(v))).collect();
        Ok(Build { view: OpView::new(self.graph, node), inputs, outputs, strided: Vec::new() })
    }

    fn read_all(&mut self, node: &Node) {
        node.inputs.iter().flatten().for_each(|v| self.read(*v));
    }

    /// The value as contiguous memory, moved there if needed; later readers find it there too.
    fn contiguous(&mut self, value: ValueId) -> Result<Static, OpError> {
        let layout = Layout::contiguous(&self.fixed(value)?.layout.shape);
        self.arranged(value, &layout)
    }

    /// The value in memory of a layout without gaps, moved there if needed; later readers find it there too.
    pub(crate) fn arranged(&mut self, value: ValueId, layout: &Layout) -> Result<Static, OpError> {
        let source = self.fixed(value)?;
        if source.layout.is_like(layout) {
            return Ok(source);
        }
        let made = self.make_unnamed(source.dtype, layout.clone());
        self.copy(&source, &made);
        self.remaining[source.storage] -= self.uses[value.index()];
        self.set_slot(value, Slot::Static(made.clone()));
        Ok(made)
    }

    /// Copies in the order of the destination, which has no gaps.
    fn copy(&mut self, source: &Static, made: &Static) {
        let order = made.layout.storage_order();
        let seen = |value: &Static| Static { layout: value.layout.permuted(&order), ..value.clone() };
        let (source, made) = (&seen(source), &seen(made));
        if source.dtype == DType::F32 {
            let member = Member {
                label: String::new(),
                op: "copy".to_owned(),
                inputs: vec![Some(source.clone())],
                aligned: vec![0],
                outputs: vec![Some(made.clone())],
                axes: made.layout.shape.len(),
                work: 2,
                units_min: 1,
                scratch_bytes: 0,
                run: Work::Map(vec![(Op::Copy, vec![Argument::Input(0)])]),
            };
            self.join(member, true);
            return;
        }
        self.close_makers(&[source.storage]);
        let kernel = crate::cpu::copy::Gather::new(&source.layout, source.dtype.size_in_memory());
        self.steps.push(Step {
            label: String::new(),
            op: "copy".to_owned(),
            inputs: vec![Some(source.span())],
            outputs: vec![Some(made.span())],
            run: StepRun::Kernel(Box::new(kernel)),
            scratch_bytes: 0,
            in_place: Vec::new(),
        });
    }

    /// A value as outputs and the reference evaluation want it.
    fn whole(&mut self, value: ValueId) -> Result<Whole, OpError> {
        match self.slot(value)? {
            Slot::Heap(storage) => Ok(Whole { span: Span { storage, offset_bytes: 0, bytes: 0 }, facts: None }),
            Slot::Static(_) => {
                let made = self.contiguous(value)?;
                Ok(Whole { span: made.span(), facts: Some((made.dtype, made.layout.shape.clone())) })
            }
        }
    }

    fn reference(&mut self, id: NodeId) -> Result<(), OpError> {
        let node = self.graph.node(id);
        let mut inputs = Vec::new();
        for value in &node.inputs {
            inputs.push(value.map(|v| self.whole(v)).transpose()?);
        }
        let mut captured = Vec::new();
        self.graph.collect_captures(node, &mut captured);
        let mut captures = Vec::new();
        for value in &captured {
            captures.push((self.graph.value(*value).name.clone(), self.whole(*value)?));
        }
        let read: Vec<Whole> = inputs.iter().flatten().chain(captures.iter().map(|(_, w)| w)).cloned().collect();
        let makers: Vec<StorageId> = read.iter().map(|w| w.span.storage).collect();
        self.close_makers(&makers);
        let mut outputs = Vec::new();
        for value in &node.outputs {
            outputs.push(value.map(|v| match self.facts(v) {
                Some((dtype, shape)) => {
                    let made = self.make(v, dtype, Layout::contiguous(&shape));
                    Whole { span: made.span(), facts: Some((dtype, shape)) }
                }
                None => {
                    let storage = self.add_storage(0, Place::Heap);
                    self.set_slot(v, Slot::Heap(storage));
                    Whole { span: Span { storage, offset_bytes: 0, bytes: 0 }, facts: None }
                }
            }));
        }
        self.steps.push(Step {
            label: node.label(self.graph),
            op: node.op.clone(),
            inputs: read.iter().map(|w| Some(w.span)).collect(),
            outputs: outputs.iter().flatten().map(|w| Some(w.span)).collect(),
            run: StepRun::Reference(Reference { node: id, inputs, outputs, captures }),
            scratch_bytes: 0,
            in_place: Vec::new(),
        });
        self.read_all(node);
        captured.iter().for_each(|v| self.read(*v));
        Ok(())
    }

    fn lower_map(&mut self, node: &'g Node, operations: &[(Op, Vec<Argument>)]) -> Result<(), OpError> {
        let Some(Some(output)) = node.outputs.first() else { return Ok(()) };
        let Some((dtype, shape)) = self.facts(*output) else { return Ok(()) };
        let scale_axis = scale_axis(node, shape.len())?;
        let mut inputs = Vec::new();
        for (index, value) in node.inputs.iter().enumerate() {
            inputs.push(match value {
                Some(v) => {
                    let mut source = self.fixed(*v)?;
                    if let Some(axis) = scale_axis.filter(|_| index > 0 && source.layout.len() > 1) {
                        source.layout = source.layout.along(axis, shape.len());
                    }
                    // One number may be a vector of one, also beside a scalar.
                    if source.layout.shape.len() > shape.len() {
                        source.layout = Layout { offset: source.layout.offset, ..Layout::contiguous(&[]) };
                    }
                    Some(Static { layout: source.layout.broadcast_to(&shape), ..source })
                }
                None => None,
            });
        }
        let last = Layout::channels_last(&shape);
        let keeps = |input: &Static| input.layout.is_like(&last) && !input.layout.is_contiguous();
        if !inputs.iter().flatten().any(keeps) {
            let made = self.make(*output, dtype, Layout::contiguous(&shape));
            self.add_map(node.label(self.graph), node.op.clone(), inputs, made, operations);
        } else {
            // Channels stay last: the program visits elements in the order of memory.
            let order = last.storage_order();
            let seen = |value: Static| Static { layout: value.layout.permuted(&order), ..value };
            let inputs = inputs.into_iter().map(|input| input.map(seen)).collect();
            let made = seen(self.make(*output, dtype, last));
            self.add_map(node.label(self.graph), node.op.clone(), inputs, made, operations);
        }
        self.read_all(node);
        Ok(())
    }

    fn lower_built(&mut self, node: &'g Node, built: Built, strided: &[usize]) -> Result<(), OpError> {
        self.add_kernel(node.label(self.graph), node.op.clone(), &node.inputs, &node.outputs, built, strided)?;
        self.read_all(node);
        Ok(())
    }

    /// Finds `ReduceSum(MatMul(a, b))` over all batch axes: the gradient of a weight. Summing is what products do.
    fn find_summed_products(&mut self, order: &[NodeId]) {
        for id in order {
            if let Some(product) = crate::cpu::matmul::summed_product(self.graph, *id) {
                let single = product.outputs.first().copied().flatten().filter(|v| self.uses[v.index()] == 1);
                if let Some(value) = single {
                    self.absorbed[value.index()] = true;
                }
            }
        }
    }

    fn find_fused_convs(&mut self, order: &[NodeId]) {
        self.fused_convs = conv::fuse::find(self.graph, order, |value| self.uses[value.index()]);
        for value in self.fused_convs.values().flat_map(|fused| fused.absorbed_values(self.graph)) {
            self.absorbed[value.index()] = true;
        }
    }

    /// Lets nodes be lowered by themselves after all.
    pub(crate) fn release_absorbed(&mut self, nodes: &[NodeId]) {
        for value in nodes.iter().flat_map(|id| self.graph.node(*id).outputs.iter().flatten()) {
            self.absorbed[value.index()] = false;
        }
    }

    pub(crate) fn graph(&self) -> &'g Graph {
        self.graph
    }

    pub(crate) fn is_absorbed(&self, value: ValueId) -> bool {
        self.absorbed[value.index()]
    }

    pub(crate) fn static_input(&mut self, value: ValueId) -> Result<Static, OpError> {
        self.fixed(value)
    }

    /// The known shape of a value.
    pub(crate) fn shape(&self, value: ValueId) -> Vec<usize> {
        self.graph.known_shape(value).unwrap_or_default()
    }

    /// One read less of each of these values is to come.
    pub(crate) fn read_each(&mut self, values: &[ValueId]) {
        values.iter().for_each(|v| self.read(*v));
    }

    pub(crate) fn made(&mut self, value: ValueId, layout: Layout) -> Static {
        self.make(value, DType::F32, layout)
    }

    pub(crate) fn temporary(&mut self, layout: Layout) -> Static {
        self.make_unnamed(DType::F32, layout)
    }

    /// Counts a read to come of a temporary value.
    pub(crate) fn hold(&mut self, value: &Static) {
        self.remaining[value.storage] += 1;
    }

    /// That read is done.
    pub(crate) fn release(&mut self, value: &Static) {
        self.remaining[value.storage] -= 1;
    }

    /// Reads to come of a value.
    pub(crate) fn uses(&self, value: ValueId) -> usize {
        self.uses[value.index()]
    }

    pub(crate) fn finish(&mut self, node: &Node) {
        self.read_all(node);
    }
}

/// The axis of the first input that a vector of scales or zero points lies along, of an operator that has such.
fn scale_axis(node: &Node, rank: usize) -> Result<Option<usize>, OpError> {
    if !node.domain.is_empty() || !matches!(node.op.as_str(), "QuantizeLinear" | "DequantizeLinear") {
        return Ok(None);
    }
    if rank <= 1 {
        return Ok((rank == 1).then_some(0));
    }
    resolve_axis(node.attributes.int("axis", 1)?, rank).map(Some)
}
