//! What each operator means: one file a family, all facts of an operator in one place, one table over all.
//!
//! An operator is a row of facts ([`Op`]): how types and shapes follow from the inputs', what the outputs are (the
//! reference evaluation, slow and obvious), how gradients flow back (as graph nodes), how many floating-point
//! operations it takes, and how indices along one axis relate to indices along another. A fact that does not exist
//! says why, so that the table can be walked by tests and nothing is missing by accident.

use std::collections::HashMap;
use std::sync::OnceLock;

use crate::attribute::Attributes;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Graph, GraphError, Node};
use crate::tensor::{Tensor, TensorError, element_count};

pub mod activation;
pub mod attention;
pub mod cast;
pub mod columns;
mod context;
pub mod control;
pub mod conv;
pub mod cross_entropy;
pub mod cut;
pub mod detection;
pub mod einsum;
pub mod elementwise;
pub mod gather;
mod index;
pub mod join;
pub mod logical;
pub mod loss;
pub mod matmul;
pub mod norm;
pub mod optimizer;
pub mod pool;
pub mod preview_training;
pub mod quant;
pub mod random;
pub mod rearrange;
pub mod recurrent;
pub mod reduce;
pub mod resize;
pub mod select;
pub mod shape;
pub mod signal;
pub mod softmax;
pub mod text;
pub mod trigonometric;
pub mod window;

pub use context::{Arity, Eval, EvalScope, Fact, Gradient, Infer, InputFact, OpView, reshape_operand};

/// All facts of one operator.
pub struct Op {
    /// Name in its operator set.
    pub name: &'static str,
    /// Operator set: `""` for ONNX's, [`UPDRAFT_DOMAIN`](crate::graph::UPDRAFT_DOMAIN) for ours.
    pub domain: &'static str,
    /// Operator-set versions that changed the operator, all of which the facts cover, oldest first.
    pub versions: &'static [u32],
    /// How many inputs and outputs it takes.
    pub arity: Arity,
    /// Types and shapes of the outputs.
    pub infer: InferRule,
    /// The outputs, computed by definition.
    pub eval: Rule<EvalRule>,
    /// The gradient with respect to each input, as values of the graph.
    pub gradient: Rule<GradientRule>,
    /// Floating-point (or integer) operations for given shapes; a multiply-add is two.
    pub flops: fn(&Shapes) -> u64,
    /// Relations between axes of inputs and outputs.
    pub channels: Rule<LinkRule>,
}

impl Op {
    /// An operator of ONNX's own set. What follows is still to be stated: a gradient and links, or reasons why there
    /// are none.
    const fn onnx(name: &'static str, versions: &'static [u32], arity: Arity, infer: InferRule, eval: EvalRule) -> Op {
        Op {
            name,
            domain: "",
            versions,
            arity,
            infer,
            eval: Rule::Is(eval),
            gradient: Rule::None(""),
            flops: no_flops,
            channels: Rule::None(""),
        }
    }

    /// The same operator in our own operator set, version 1.
    const fn own(self) -> Op {
        Op { domain: crate::graph::UPDRAFT_DOMAIN, versions: &[1], ..self }
    }

    const fn arity(self, arity: Arity) -> Op {
        Op { arity, ..self }
    }

    const fn infer(self, infer: InferRule) -> Op {
        Op { infer, ..self }
    }

    const fn gradient(self, rule: GradientRule) -> Op {
        Op { gradient: Rule::Is(rule), ..self }
    }

    const fn no_gradient(self, reason: &'static str) -> Op {
        Op { gradient: Rule::None(reason), ..self }
    }

    const fn flops(self, flops: fn(&Shapes) -> u64) -> Op {
        Op { flops, ..self }
    }

    const fn channels(self, channels: LinkRule) -> Op {
        Op { channels: Rule::Is(channels), ..self }
    }

    const fn no_channels(self, reason: &'static str) -> Op {
        Op { channels: Rule::None(reason), ..self }
    }
}

/// Works out types and shapes of the outputs.
pub type InferRule = fn(&Infer) -> Result<Vec<Fact>, OpError>;

/// Computes the outputs by definition.
pub type EvalRule = fn(&Eval) -> Result<Vec<Tensor>, OpError>;

/// Finds the relations between axes.
pub type LinkRule = fn(&Infer) -> Result<Vec<Link>, OpError>;

/// Builds nodes that compute the gradient of each input (`None` where there is none) from those of the outputs.
pub type GradientRule = fn(&mut Gradient) -> Result<Vec<Option<crate::graph::ValueId>>, OpError>;

/// Why gradient operators have no gradient of their own.
const SECOND_ORDER: &str = "it is itself a gradient; second derivatives are not taken";

/// Why gradient operators have no channel links.
const AFTER_STRUCTURE: &str = "channels are changed before a graph is differentiated";

/// A fact that an operator has, or the reason why it has none.
#[derive(Clone, Copy)]
pub enum Rule<T> {
    /// The fact.
    Is(T),
    /// Why there is none.
    None(&'static str),
}

impl<T: Copy> Rule<T> {
    /// The fact, if there is one.
    pub fn get(&self) -> Option<T> {
        match self {
            Rule::Is(fact) => Some(*fact),
            Rule::None(_) => None,
        }
    }
}

/// Element type and shape of an operand that is there.
pub type KnownOperand = (DType, Vec<usize>);

/// Known shapes and types of a node's operands, for counting work.
pub struct Shapes<'a> {
    /// The node's attributes.
    pub attributes: &'a Attributes,
    /// Element type and shape of each input; `None` where left out.
    pub inputs: Vec<Option<KnownOperand>>,
    /// Element type and shape of each output; `None` where not wanted.
    pub outputs: Vec<Option<KnownOperand>>,
}

impl Shapes<'_> {
    /// Elements of an input; zero where it is left out.
    pub fn input_len(&self, index: usize) -> u64 {
        len(self.inputs.get(index))
    }

    /// Elements of an output; zero where it is not wanted.
    pub fn output_len(&self, index: usize) -> u64 {
        len(self.outputs.get(index))
    }
}

fn len(operand: Option<&Option<KnownOperand>>) -> u64 {
    operand.and_then(Option::as_ref).map_or(0, |(_, shape)| shape.iter().map(|d| *d as u64).product())
}

/// FLOPs of operators that only move elements.
pub fn no_flops(_: &Shapes) -> u64 {
    0
}

/// FLOPs of operators that do one operation for each element of their first output.
pub fn one_flop_per_output(shapes: &Shapes) -> u64 {
    shapes.output_len(0)
}

/// One axis of one operand of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Input number and axis.
    Input(usize, usize),
    /// Output number and axis.
    Output(usize, usize),
}

/// How indices along two axes belong together: what removing index `i` of one removes of the other.
///
/// An axis that no link names is read or made here as a whole, and cannot lose indices. Structured pruning and tensor
/// parallelism follow links from node to node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// Index `i` of one is index `i` of the other (element-wise operators, a weight's input channels).
    Same(Axis, Axis),
    /// Index `i` of `part` is index `i + offset` of `whole`, for `i < len` (Concat, Split, Slice).
    Offset {
        /// The shorter axis.
        part: Axis,
        /// The longer axis.
        whole: Axis,
        /// Where the part begins.
        offset: usize,
        /// How long the part is.
        len: usize,
    },
    /// Index `i` of `outer` is all indices `j` of `inner` with `j / repeat mod n = i`, where `n` is the size of `outer`
    /// (Flatten, Reshape, heads). Where several axes make up `inner`, each has such a link, and only one of them can
    /// lose indices.
    Block {
        /// The axis of blocks.
        outer: Axis,
        /// The axis of their elements.
        inner: Axis,
        /// Neighbouring elements of a block.
        repeat: usize,
    },
    /// Both axes consist of `groups` equal blocks, and block `i` of one goes with block `i` of the other (grouped
    /// convolution, heads).
    Grouped(Axis, Axis, usize),
    /// The operator cannot do with fewer indices along this axis; the reason is for the report.
    Fixed(Axis, &'static str),
}

/// What is wrong with a node, without its name: whoever walks the graph adds that.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OpError {
    /// A needed input is left out.
    #[error("input {index} ({expected}) is missing")]
    MissingInput {
        /// Which input.
        index: usize,
        /// What it would be.
        expected: &'static str,
    },
    /// An attribute is missing or wrong.
    #[error("attribute {name:?} {problem}")]
    Attribute {
        /// The attribute's name.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// Shapes or ranks do not fit.
    #[error("{0}")]
    Shape(String),
    /// Element types do not fit.
    #[error("{0}")]
    DType(String),
    /// A tensor's content is not what the operator can take (an index out of range).
    #[error("{0}")]
    Value(String),
    /// The operator exists but not in this form here.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Making a tensor failed.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// Building a node failed.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// A node inside, of a subgraph or of nodes being built, failed.
    #[error("{node}: {source}")]
    Inner {
        /// Its label.
        node: String,
        /// What is wrong with it.
        source: Box<OpError>,
    },
}

impl OpError {
    /// Whether this form of the operator is not implemented, here or inside a subgraph.
    pub fn is_unsupported(&self) -> bool {
        match self {
            OpError::Unsupported(_) => true,
            OpError::Inner { source, .. } => source.is_unsupported(),
            _ => false,
        }
    }

    /// An attribute that is missing or wrong.
    pub fn attribute(name: &str, problem: impl Into<String>) -> OpError {
        OpError::Attribute { name: name.to_owned(), problem: problem.into() }
    }

    /// Shapes that do not fit.
    pub fn shape(message: impl Into<String>) -> OpError {
        OpError::Shape(message.into())
    }

    /// Element types that do not fit.
    pub fn dtype(message: impl Into<String>) -> OpError {
        OpError::DType(message.into())
    }

    /// Content that does not fit.
    pub fn value(message: impl Into<String>) -> OpError {
        OpError::Value(message.into())
    }

    /// A form that is not implemented.
    pub fn unsupported(message: impl Into<String>) -> OpError {
        OpError::Unsupported(message.into())
    }
}

/// The families, in the order of the listing in the documentation.
const FAMILIES: &[&[Op]] = &[
    elementwise::OPS,
    trigonometric::OPS,
    logical::OPS,
    activation::OPS,
    cast::OPS,
    reduce::OPS,
    shape::OPS,
    join::OPS,
    rearrange::OPS,
    select::OPS,
    gather::OPS,
    random::OPS,
    control::OPS,
    text::OPS,
    columns::OPS,
    cut::OPS,
    matmul::OPS,
    conv::OPS,
    pool::OPS,
    norm::OPS,
    norm::layer::OPS,
    softmax::OPS,
    loss::OPS,
    einsum::OPS,
    signal::OPS,
    detection::OPS,
    preview_training::OPS,
    recurrent::OPS,
    resize::OPS,
    resize::grid::OPS,
    attention::OPS,
    attention::stateful::OPS,
    quant::OPS,
    quant::integer::OPS,
    quant::fake::OPS,
    cross_entropy::OPS,
    optimizer::OPS,
];

/// Every operator.
pub fn table() -> impl Iterator<Item = &'static Op> {
    FAMILIES.iter().flat_map(|family| family.iter())
}

/// The operator of this domain and name.
pub fn find(domain: &str, name: &str) -> Option<&'static Op> {
    static INDEX: OnceLock<HashMap<(&'static str, &'static str), &'static Op>> = OnceLock::new();
    let domain = if domain == "ai.onnx" { "" } else { domain };
    INDEX.get_or_init(|| table().map(|op| ((op.domain, op.name), op)).collect()).get(&(domain, name)).copied()
}

/// The operator of a node, or an error that names it.
pub fn of_node(graph: &Graph, node: &Node) -> Result<&'static Op, OpError> {
    let op = find(&node.domain, &node.op).ok_or_else(|| {
        let domain = if node.domain.is_empty() { "ai.onnx" } else { &node.domain };
        OpError::unsupported(format!("operator {} of domain {domain}", node.op))
    })?;
    let opset = graph.opset(&node.domain).unwrap_or(1);
    match op.versions.first() {
        Some(first) if opset < *first => {
            Err(OpError::unsupported(format!("operator {} in opset {opset}: it appeared in {first}", node.op)))
        }
        _ => Ok(op),
    }
}

/// `value` for each element of a shape, or an error where memory cannot hold them.
fn filled<T: Clone>(shape: &[usize], value: T) -> Result<Vec<T>, OpError> {
    let refuse = || OpError::shape(format!("shape {shape:?} does not fit in memory"));
    let count = element_count(shape).ok_or_else(refuse)?;
    let mut out = Vec::new();
    out.try_reserve_exact(count).map_err(|_| refuse())?;
    out.resize(count, value);
    Ok(out)
}

/// The shape that several shapes broadcast to by NumPy's rule, or an error that shows them.
pub fn broadcast(shapes: &[&[usize]]) -> Result<Vec<usize>, OpError> {
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut out = vec![1usize; rank];
    for shape in shapes {
        for (o, d) in out.iter_mut().rev().zip(shape.iter().rev()) {
            if *o == 1 {
                *o = *d;
            } else if *d != 1 && *d != *o {
                return Err(OpError::shape(format!("shapes {shapes:?} do not broadcast")));
            }
        }
    }
    Ok(out)
}

/// [`broadcast`] for dimensions that may be symbols. Where a symbol meets a known size other than 1, the size wins:
/// the symbol can only be it or 1.
pub fn broadcast_dims(shapes: &[&[Dim]]) -> Result<Vec<Dim>, OpError> {
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut out = vec![Dim::Known(1); rank];
    for shape in shapes {
        for (o, d) in out.iter_mut().rev().zip(shape.iter().rev()) {
            *o = match (&*o, d) {
                (Dim::Known(1), d) => d.clone(),
                (o, Dim::Known(1)) => o.clone(),
                (o, d) if o.same(d) => o.clone(),
                (Dim::Known(a), Dim::Known(b)) => {
                    let shown: Vec<String> = shapes.iter().map(|s| show_shape(s)).collect();
                    return Err(OpError::shape(format!(
                        "shapes {} do not broadcast ({a} against {b})",
                        shown.join(", ")
                    )));
                }
                (Dim::Known(a), _) => Dim::Known(*a),
                (_, Dim::Known(b)) => Dim::Known(*b),
                _ => Dim::Unknown,
            };
        }
    }
    Ok(out)
}

/// A shape as messages show it: `[N, 3, 224, 224]`.
pub fn show_shape(shape: &[Dim]) -> String {
    let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
    format!("[{}]", dims.join(", "))
}

/// An axis that may count from the end, as an index below `rank`.
pub fn resolve_axis(axis: i64, rank: usize) -> Result<usize, OpError> {
    let signed = rank as i64;
    let resolved = if axis < 0 { axis + signed } else { axis };
    if (0..signed).contains(&resolved) {
        Ok(resolved as usize)
    } else {
        Err(OpError::shape(format!("axis {axis} is outside [-{rank}, {rank}) for rank {rank}")))
    }
}
