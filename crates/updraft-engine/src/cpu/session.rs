//! A compiled graph: its plans by input shapes, its state, and the memory they run in.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use updraft_graph::{DType, Dim, Graph, OpError, Tensor, ValueId};

use crate::cpu::arena;
use crate::cpu::kernel::{Io, Pool, Raw};
use crate::cpu::lower::{Sources, lower};
use crate::cpu::shapes::concrete;
use crate::cpu::step::{Place, Plan, Reference, Span, Step, StepRun, Whole};
use crate::{CompileOptions, EngineError, MemoryUse, Session, StepTime};

/// Plans kept for different input shapes: a training and an evaluation batch, each whole and the last one, and a few sequence
/// lengths. The one unused longest goes first.
const PLANS_MAX: usize = 16;

/// See [`Session`].
pub(super) struct CpuSession {
    graph: Graph,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    states: Vec<State>,
    plans: VecDeque<(Signature, Plan)>,
    threads: Option<Arc<rayon::ThreadPool>>,
    pool: Pool,
    arena: Tensor,
    scratch: Tensor,
}

struct State {
    input: ValueId,
    output: ValueId,
    name: String,
    value: Option<Tensor>,
}

/// What a run returns, and the state tensors that it replaces.
type RunResult = (Vec<Tensor>, Vec<(usize, Tensor)>);

/// Shapes of the inputs (`None`: not given, the default is taken) and of the state.
type Signature = (Vec<Option<Vec<usize>>>, Vec<Vec<usize>>);

impl CpuSession {
    pub(super) fn new(
        graph: &Graph,
        options: &CompileOptions,
        threads: Option<Arc<rayon::ThreadPool>>,
    ) -> Result<CpuSession, EngineError> {
        let mut states: Vec<State> = Vec::new();
        for (input, output) in &options.state {
            let find = |name: &String| {
                graph.find(name).ok_or_else(|| unknown(name, "the graph has no value of this name", graph))
            };
            let (from, to) = (find(input)?, find(output)?);
            if states.iter().any(|s| s.input == from) {
                return Err(refuse(input, "it is listed as state twice".to_owned()));
            }
            if graph.value(from).producer().is_some() {
                return Err(refuse(input, "it is made by a node and cannot be state".to_owned()));
            }
            let value = graph.value(from).constant().cloned();
            states.push(State { input: from, output: to, name: input.clone(), value });
        }
        for id in graph.order()? {
            check_supported(graph, id)?;
        }
        let is_state = |v: &ValueId| states.iter().any(|s| s.input == *v);
        let is_next = |v: &ValueId| states.iter().any(|s| s.output == *v);
        let inputs = graph.inputs().iter().copied().filter(|v| !is_state(v)).collect();
        let outputs = graph.outputs().iter().copied().filter(|v| !is_next(v)).collect();
        let pool = Pool { threads: threads.as_ref().map_or(1, |t| t.current_num_threads()) };
        let empty = Tensor::vector::<u8>(&[]);
        let mut session = CpuSession {
            graph: graph.clone(),
            inputs,
            outputs,
            states,
            plans: VecDeque::new(),
            threads,
            pool,
            arena: empty.clone(),
            scratch: empty,
        };
        if let Some(signature) = session.static_signature() {
            session.plan(signature)?;
        }
        Ok(session)
    }

    /// The shapes of inputs and state, if the graph leaves no choice.
    fn static_signature(&self) -> Option<Signature> {
        let shape = |v: &ValueId| {
            self.graph.dtype(*v)?;
            match self.graph.value(*v).constant() {
                Some(_) => None,
                None => self.graph.known_shape(*v),
            }
        };
        let inputs = self.inputs.iter().map(|v| shape(v).map(Some)).collect::<Option<_>>()?;
        let state = |s: &State| match &s.value {
            Some(value) => Some(value.shape().to_vec()),
            None => shape(&s.input),
        };
        Some((inputs, self.states.iter().map(state).collect::<Option<_>>()?))
    }

    /// Makes the plan for these shapes the first in the cache.
    fn plan(&mut self, signature: Signature) -> Result<(), EngineError> {
        if let Some(at) = self.plans.iter().position(|(s, _)| *s == signature) {
            if at > 0
                && let Some(found) = self.plans.remove(at)
            {
                self.plans.push_front(found);
            }
            return Ok(());
        }
        let mut variable = HashMap::new();
        let mut given = Vec::new();
        let untyped = |v: ValueId| refuse(&self.graph.value(v).name, "its element type is not declared".to_owned());
        for (value, shape) in self.inputs.iter().zip(&signature.0) {
            if let Some(shape) = shape {
                let dtype = self.graph.dtype(*value).ok_or_else(|| untyped(*value))?;
                variable.insert(*value, (dtype, shape.clone()));
                given.push(*value);
            }
        }
        for (state, shape) in self.states.iter().zip(&signature.1) {
            let dtype = match &state.value {
                Some(value) => value.dtype(),
                None => self.graph.dtype(state.input).ok_or_else(|| untyped(state.input))?,
            };
            variable.insert(state.input, (dtype, shape.clone()));
        }
        let graph = concrete(&self.graph, &variable)?;
        let pairs: Vec<(ValueId, ValueId)> = self.states.iter().map(|s| (s.input, s.output)).collect();
        for state in &self.states {
            check_next_state(&graph, state)?;
        }
        let plan = lower(graph, &Sources { inputs: &given, states: &pairs, outputs: &self.outputs })?;
        self.plans.push_front((signature, plan));
        self.plans.truncate(PLANS_MAX);
        Ok(())
    }

    /// The given tensors in the order of the graph's inputs, checked.
    fn arrange<'a>(&self, given: &[(&str, &'a Tensor)]) -> Result<Vec<Option<&'a Tensor>>, EngineError> {
        let mut out: Vec<Option<&Tensor>> = vec![None; self.inputs.len()];
        for (name, tensor) in given {
            let at = self.inputs.iter().position(|v| self.graph.value(*v).name == *name);
            let Some(at) = at else {
                let problem = match self.states.iter().any(|s| s.name == *name) {
                    true => "it is state: the session keeps it, see set_state",
                    false => "the graph has no such input",
                };
                return Err(unknown(name, problem, &self.graph));
            };
            if out[at].replace(tensor).is_some() {
                return Err(refuse(name, "it is given twice".to_owned()));
            }
        }
        let mut symbols: HashMap<String, usize> = HashMap::new();
        for (value, tensor) in self.inputs.iter().zip(&out) {
            let entry = self.graph.value(*value);
            let Some(tensor) = tensor else {
                if entry.constant().is_none() {
                    return Err(refuse(&entry.name, format!("it is missing; expected {}", self.declared(*value))));
                }
                continue;
            };
            let mismatch = || {
                refuse(
                    &entry.name,
                    format!("found {}{:?}, expected {}", tensor.dtype(), tensor.shape(), self.declared(*value)),
                )
            };
            if entry.ty.dtype().is_some_and(|d| d != tensor.dtype()) {
                return Err(mismatch());
            }
            let Some(shape) = entry.ty.shape() else { continue };
            if shape.len() != tensor.rank() {
                return Err(mismatch());
            }
            for (dim, size) in shape.iter().zip(tensor.shape()) {
                if let Some(symbol) = dim.as_symbol() {
                    let known = *symbols.entry(symbol.to_owned()).or_insert(*size);
                    if known != *size {
                        let message = format!(
                            "{symbol} is {size} here but {known} in an input before; expected {}",
                            self.declared(*value)
                        );
                        return Err(refuse(&entry.name, message));
                    }
                }
                if dim.known().is_some_and(|n| n != *size) {
                    return Err(mismatch());
                }
            }
        }
        Ok(out)
    }

    fn declared(&self, value: ValueId) -> String {
        let ty = &self.graph.value(value).ty;
        let dtype = ty.dtype().map_or("any type".to_owned(), |d| d.to_string());
        dtype + &ty.shape().map_or(" of any shape".to_owned(), updraft_graph::op::show_shape)
    }

    fn execute(
        &mut self,
        given: &[(&str, &Tensor)],
        after_step: &mut (dyn FnMut(&Step) + Send),
    ) -> Result<Vec<Tensor>, EngineError> {
        let arranged = self.arrange(given)?;
        for state in &self.states {
            if state.value.is_none() {
                return Err(refuse(&state.name, format!("state is not set; expected {}", self.declared(state.input))));
            }
        }
        let state_shapes =
            self.states.iter().map(|s| s.value.as_ref().map_or(Vec::new(), |t| t.shape().to_vec())).collect();
        let shapes = arranged.iter().map(|t| t.map(|t| t.shape().to_vec())).collect();
        self.plan((shapes, state_shapes))?;
        let inputs: Vec<&Tensor> = arranged.into_iter().flatten().collect();
        let Some((_, plan)) = self.plans.front() else { return Ok(Vec::new()) };
        reserve(&mut self.arena, plan.arena_bytes)?;
        reserve(&mut self.scratch, plan.scratch_bytes * self.pool.threads)?;
        let mut updated = vec![false; self.states.len()];
        for storage in 0..plan.storages.len() {
            if let (Place::Alias(_), Place::State(state)) =
                (&plan.storages[storage].place, &plan.storages[arena::root(&plan.storages, storage)].place)
            {
                updated[*state] = true;
            }
        }
        let states: Vec<Raw> = self
            .states
            .iter_mut()
            .zip(updated)
            .map(|(state, updated)| match &mut state.value {
                Some(value) if updated => {
                    let bytes = value.bytes_mut();
                    Raw { ptr: bytes.as_mut_ptr(), bytes: bytes.len() }
                }
                Some(value) => Raw { ptr: value.bytes().as_ptr().cast_mut(), bytes: value.byte_len() },
                None => Raw::NONE,
            })
            .collect();
        let mut run = Execution {
            plan,
            arena: Raw { ptr: self.arena.bytes_mut().as_mut_ptr(), bytes: plan.arena_bytes },
            scratch: Raw { ptr: self.scratch.bytes_mut().as_mut_ptr(), bytes: plan.scratch_bytes * self.pool.threads },
            inputs: &inputs,
            states,
            heap: vec![None; plan.storages.len()],
            pool: self.pool,
        };
        let mut work = || -> Result<RunResult, EngineError> {
            for step in &plan.steps {
                run.step(step).map_err(|e| EngineError::Node { node: step.label.clone(), message: e.to_string() })?;
                after_step(step);
            }
            let ended = |e: OpError| EngineError::Node { node: "outputs".to_owned(), message: e.to_string() };
            let outputs = plan.outputs.iter().map(|w| run.tensor(w).map_err(ended)).collect::<Result<_, _>>()?;
            let states = plan
                .write_back
                .iter()
                .map(|(s, w)| Ok((*s, run.tensor(w).map_err(ended)?)))
                .collect::<Result<_, EngineError>>()?;
            Ok((outputs, states))
        };
        let (outputs, next) = match &self.threads {
            Some(threads) => threads.install(work)?,
            None => work()?,
        };
        for (state, value) in next {
            self.states[state].value = Some(value);
        }
        Ok(outputs)
    }

    fn state_index(&self, input: &str) -> Result<usize, EngineError> {
        self.states
            .iter()
            .position(|s| s.name == input)
            .ok_or_else(|| refuse(input, "it is not a state input of this session".to_owned()))
    }
}

impl Session for CpuSession {
    fn run(&mut self, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>, EngineError> {
        self.execute(inputs, &mut |_| {})
    }

    fn profile(
        &mut self,
        inputs: &[(&str, &Tensor)],
        clock_ns: &mut (dyn FnMut() -> u64 + Send),
    ) -> Result<(Vec<Tensor>, Vec<StepTime>), EngineError> {
        let mut times = Vec::new();
        let mut before = clock_ns();
        let outputs = self.execute(inputs, &mut |step| {
            let now = clock_ns();
            let bytes = |spans: &[Option<Span>]| spans.iter().flatten().map(|s| s.bytes as u64).sum();
            times.push(StepTime {
                nodes: step.label.clone(),
                op: step.op.clone(),
                reference: matches!(step.run, StepRun::Reference(_)),
                duration_ns: now.saturating_sub(before),
                read_bytes: bytes(&step.inputs),
                written_bytes: bytes(&step.outputs),
            });
            before = clock_ns();
        })?;
        Ok((outputs, times))
    }

    fn memory(&self) -> MemoryUse {
        let constants = |plan: &Plan| {
            plan.storages
                .iter()
                .map(|s| match &s.place {
                    Place::Constant(t) => t.byte_len() as u64,
                    _ => 0,
                })
                .sum()
        };
        let plan = self.plans.front().map(|(_, plan)| plan);
        MemoryUse {
            arena_bytes: plan.map_or(0, |p| p.arena_bytes as u64),
            scratch_bytes: plan.map_or(0, |p| (p.scratch_bytes * self.pool.threads) as u64),
            constant_bytes: plan.map_or(0, constants),
            state_bytes: self.states.iter().filter_map(|s| s.value.as_ref()).map(|t| t.byte_len() as u64).sum(),
        }
    }

    fn state(&self, input: &str) -> Result<Tensor, EngineError> {
        let state = &self.states[self.state_index(input)?];
        state.value.clone().ok_or_else(|| refuse(input, "state is not set".to_owned()))
    }

    fn set_state(&mut self, input: &str, value: Tensor) -> Result<(), EngineError> {
        let index = self.state_index(input)?;
        let declared = &self.graph.value(self.states[index].input).ty;
        let fits = declared.dtype().is_none_or(|d| d == value.dtype())
            && declared.shape().is_none_or(|shape| {
                shape.len() == value.rank()
                    && shape.iter().zip(value.shape()).all(|(d, n)| d.known().is_none_or(|known| known == *n))
            });
        if !fits {
            let expected = self.declared(self.states[index].input);
            return Err(refuse(input, format!("found {}{:?}, expected {expected}", value.dtype(), value.shape())));
        }
        self.states[index].value = Some(value);
        Ok(())
    }
}

fn refuse(name: &str, message: String) -> EngineError {
    EngineError::Input { name: name.to_owned(), message }
}

fn unknown(name: &str, problem: &str, graph: &Graph) -> EngineError {
    let names: Vec<String> = graph.inputs().iter().map(|v| format!("{:?}", graph.value(*v).name)).collect();
    refuse(name, format!("{problem}; its inputs are {}", names.join(", ")))
}

/// An operator that neither we nor the reference evaluation can run is refused at compile.
fn check_supported(graph: &Graph, id: updraft_graph::NodeId) -> Result<(), EngineError> {
    let node = graph.node(id);
    let refuse = |message: String| EngineError::Node { node: node.label(graph), message };
    let op = updraft_graph::op::of_node(graph, node).map_err(|e| refuse(e.to_string()))?;
    match op.eval {
        updraft_graph::op::Rule::Is(_) => Ok(()),
        updraft_graph::op::Rule::None(reason) => Err(refuse(format!("{} cannot be run: {reason}", op.name))),
    }
}

fn check_next_state(graph: &Graph, state: &State) -> Result<(), EngineError> {
    let (from, to) = (graph.value(state.input), graph.value(state.output));
    let same_shape = match (from.ty.shape(), to.ty.shape()) {
        (Some(a), Some(b)) => a.len() == b.len() && !a.iter().zip(b).any(|(a, b)| Dim::differs(a, b)),
        _ => true,
    };
    if same_shape && to.ty.dtype().is_none_or(|d| Some(d) == from.ty.dtype()) {
        return Ok(());
    }
    let show = |v: &updraft_graph::Value| {
        let shape = v.ty.shape().map_or("?".to_owned(), updraft_graph::op::show_shape);
        format!("{}{shape}", v.ty.dtype().map_or("?".to_owned(), |d: DType| d.to_string()))
    };
    Err(refuse(&state.name, format!("state is {} but becomes {:?}, which is {}", show(from), to.name, show(to))))
}

/// Makes a buffer of at least so many bytes.
fn reserve(buffer: &mut Tensor, bytes: usize) -> Result<(), EngineError> {
    if buffer.byte_len() < bytes {
        *buffer = Tensor::zeros(DType::U8, &[bytes])
            .map_err(|e| EngineError::Node { node: "memory".to_owned(), message: e.to_string() })?;
    }
    Ok(())
}

/// One run of a plan.
struct Execution<'a> {
    plan: &'a Plan,
    arena: Raw,
    scratch: Raw,
    inputs: &'a [&'a Tensor],
    states: Vec<Raw>,
    /// Tensors of heap storages.
    heap: Vec<Option<Tensor>>,
    pool: Pool,
}

impl Execution<'_> {
    fn raw(&self, span: &Span) -> Raw {
        let storage = &self.plan.storages[arena::root(&self.plan.storages, span.storage)];
        let base = match &storage.place {
            Place::Arena(offset) => self.arena.ptr.wrapping_add(*offset),
            Place::Constant(tensor) => tensor.bytes().as_ptr().cast_mut(),
            Place::Input(index) => self.inputs[*index].bytes().as_ptr().cast_mut(),
            Place::State(index) => self.states[*index].ptr,
            Place::Heap | Place::Alias(_) => return Raw::NONE,
        };
        Raw { ptr: base.wrapping_add(span.offset_bytes), bytes: span.bytes }
    }

    fn step(&mut self, step: &Step) -> Result<(), OpError> {
        match &step.run {
            StepRun::Kernel(kernel) => {
                let raw = |span: &Option<Span>| span.as_ref().map_or(Raw::NONE, |s| self.raw(s));
                let inputs: Vec<Raw> = step.inputs.iter().map(raw).collect();
                let outputs: Vec<Raw> = step.outputs.iter().map(raw).collect();
                if cfg!(debug_assertions) {
                    self.poison(step, &outputs);
                }
                let scratch = Raw { ptr: self.scratch.ptr, bytes: step.scratch_bytes * self.pool.threads };
                kernel.run(&mut Io { inputs: &inputs, outputs, scratch }, &self.pool)
            }
            StepRun::Reference(reference) => self.reference(reference),
        }
    }

    /// Fills outputs with not-a-number, so that a kernel that forgets an element, or reads what it has not written,
    /// shows in every test.
    fn poison(&self, step: &Step, outputs: &[Raw]) {
        for (span, raw) in step.outputs.iter().zip(outputs) {
            let fresh = span.as_ref().is_some_and(|s| matches!(self.plan.storages[s.storage].place, Place::Arena(_)));
            if fresh {
                // SAFETY: outputs are this step's alone.
                unsafe { std::ptr::write_bytes(raw.ptr, 0xff, raw.bytes) };
            }
        }
    }

    fn reference(&mut self, reference: &Reference) -> Result<(), OpError> {
        let inputs: Vec<Option<Tensor>> = reference
            .inputs
            .iter()
            .map(|w| w.as_ref().map(|w| self.tensor(w)).transpose())
            .collect::<Result<_, _>>()?;
        let captures: Vec<(&str, Tensor)> = reference
            .captures
            .iter()
            .map(|(name, w)| Ok((name.as_str(), self.tensor(w)?)))
            .collect::<Result<_, OpError>>()?;
        let outer = |name: &str| captures.iter().find(|(n, _)| *n == name).map(|(_, t)| t.clone());
        let operands = inputs.iter().map(Option::as_ref).collect();
        let made = updraft_graph::eval::evaluate_node(&self.plan.graph, reference.node, operands, &outer)?;
        for (output, tensor) in reference.outputs.iter().zip(made) {
            let Some(output) = output else { continue };
            match &output.facts {
                None => self.heap[output.span.storage] = Some(tensor),
                Some((dtype, shape)) => {
                    if tensor.dtype() != *dtype || tensor.shape() != shape {
                        return Err(OpError::shape(format!(
                            "made {}{:?} where {dtype}{shape:?} was inferred",
                            tensor.dtype(),
                            tensor.shape()
                        )));
                    }
                    let raw = self.raw(&output.span);
                    // SAFETY: the output's memory is this step's alone, and has as many bytes as its type and shape say.
                    unsafe { std::ptr::copy_nonoverlapping(tensor.bytes().as_ptr(), raw.ptr, raw.bytes) };
                }
            }
        }
        Ok(())
    }

    /// A value as a tensor of its own.
    fn tensor(&self, whole: &Whole) -> Result<Tensor, OpError> {
        let owner = &self.plan.storages[arena::root(&self.plan.storages, whole.span.storage)].place;
        let Some((dtype, shape)) = &whole.facts else {
            let tensor = match owner {
                Place::Constant(tensor) => Some(tensor.clone()),
                Place::Input(index) => Some(self.inputs[*index].clone()),
                _ => self.heap[whole.span.storage].clone(),
            };
            return tensor.ok_or_else(|| OpError::value("a value was read before it was made"));
        };
        match owner {
            // Clones share memory.
            Place::Constant(tensor) if tensor.byte_len() == whole.span.bytes => Ok(tensor.reshaped(shape)?),
            Place::Input(index) if self.inputs[*index].byte_len() == whole.span.bytes => {
                Ok(self.inputs[*index].reshaped(shape)?)
            }
            _ => {
                let raw = self.raw(&whole.span);
                // SAFETY: the plan says that the value lies here, whole, and is not being written.
                let bytes = unsafe { std::slice::from_raw_parts(raw.ptr.cast_const(), raw.bytes) };
                Ok(Tensor::from_bytes(*dtype, shape, bytes)?)
            }
        }
    }
}
