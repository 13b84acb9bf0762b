//! Makes a Graph run fast.
//!
//! An [`Engine`] compiles a graph once into a [`Session`], which runs it many times. There is no method per operator:
//! an engine takes the whole graph, and an operator that it lacks is an error at compile, by node name.

mod cpu;

use updraft_graph::Tensor;

pub use cpu::CpuEngine;

/// Turns graphs into sessions.
pub trait Engine: Send + Sync {
    /// What reports call it: `cpu`.
    fn name(&self) -> &str;

    /// Prepares a graph for running. Everything that can be refused is refused here.
    fn compile(&self, graph: &updraft_graph::Graph, options: &CompileOptions) -> Result<Box<dyn Session>, EngineError>;
}

/// How a graph is to be run.
#[derive(Debug, Clone, Default)]
pub struct CompileOptions {
    /// Values that a session keeps from run to run: before a run the input (first name) is what the output (second
    /// name) was after the last one. Parameters and optimizer moments of a training step are such pairs; the engine
    /// may update them in place. State inputs are not given to, and state outputs not returned by, a run.
    pub state: Vec<(String, String)>,
}

/// A compiled graph with its memory.
pub trait Session: Send {
    /// Runs once. Inputs by name; the graph's outputs that are not state, in order.
    ///
    /// The same inputs and state give the same bits for any number of threads.
    fn run(&mut self, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>, EngineError>;

    /// Runs once and tells how long each step took by a clock in nanoseconds.
    fn profile(
        &mut self,
        inputs: &[(&str, &Tensor)],
        clock_ns: &mut (dyn FnMut() -> u64 + Send),
    ) -> Result<(Vec<Tensor>, Vec<StepTime>), EngineError>;

    /// Memory that the session holds for inputs of the shapes it saw last.
    fn memory(&self) -> MemoryUse;

    /// A state input's current value.
    fn state(&self, input: &str) -> Result<Tensor, EngineError>;

    /// Sets a state input. All must be set (or be initializers of the graph) before the first run.
    fn set_state(&mut self, input: &str, value: Tensor) -> Result<(), EngineError>;
}

/// Time and traffic of one step, which may compute several nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepTime {
    /// Labels of the nodes.
    pub nodes: String,
    /// Their operators, joined by `+`.
    pub op: String,
    /// Whether it was left to the reference evaluation, for want of a kernel.
    pub reference: bool,
    /// How long it took.
    pub duration_ns: u64,
    /// Bytes of its operands.
    pub read_bytes: u64,
    /// Bytes of its results.
    pub written_bytes: u64,
}

/// Memory of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Intermediate values, planned.
    pub arena_bytes: u64,
    /// Working memory of kernels.
    pub scratch_bytes: u64,
    /// Constants of the graph, also folded ones.
    pub constant_bytes: u64,
    /// State.
    pub state_bytes: u64,
}

/// Why a graph cannot be compiled or run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EngineError {
    /// A node cannot be compiled or run.
    #[error("node {node}: {message}")]
    Node {
        /// The node's label.
        node: String,
        /// What is wrong.
        message: String,
    },
    /// An input or state value is missing, unknown, or of the wrong type or shape.
    #[error("input {name:?}: {message}")]
    Input {
        /// The input's name.
        name: String,
        /// What is wrong, and what is expected.
        message: String,
    },
    /// The pool of threads cannot be made.
    #[error("cannot start {threads} threads: {message}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system says.
        message: String,
    },
    /// The graph itself is wrong.
    #[error(transparent)]
    Graph(#[from] updraft_graph::GraphError),
}
