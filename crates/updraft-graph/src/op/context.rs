//! What an operator's facts are given: views of one node and its operands.

use std::ops::Deref;

use crate::attribute::{Attribute, Attributes};
use crate::dim::{Dim, dims};
use crate::dtype::DType;
use crate::graph::{Graph, Node, NodeId, ValueId, ValueType};
use crate::infer::infer_node;
use crate::op::{OpError, show_shape};
use crate::tensor::Tensor;

/// How many operands an operator takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arity {
    /// Fewest inputs; later ones are optional.
    pub inputs_min: usize,
    /// How many of the first inputs may be left out although later ones must be there; the
    /// operator's own rules say which of them.
    pub inputs_open: usize,
    /// Most inputs; `usize::MAX` where any number may follow.
    pub inputs_max: usize,
    /// Fewest outputs.
    pub outputs_min: usize,
    /// Most outputs.
    pub outputs_max: usize,
}

impl Arity {
    /// Exactly `inputs` inputs and one output.
    pub const fn exact(inputs: usize) -> Arity {
        Arity::range(inputs, inputs)
    }

    /// From `min` to `max` inputs and one output.
    pub const fn range(min: usize, max: usize) -> Arity {
        Arity { inputs_min: min, inputs_open: 0, inputs_max: max, outputs_min: 1, outputs_max: 1 }
    }

    /// The same where the first `count` inputs may be left out.
    pub const fn open(self, count: usize) -> Arity {
        Arity { inputs_open: count, ..self }
    }

    /// The same with another range of outputs.
    pub const fn outputs(self, min: usize, max: usize) -> Arity {
        Arity { outputs_min: min, outputs_max: max, ..self }
    }
}

/// What every fact may look at: the node and the version of its operator set.
#[derive(Clone, Copy)]
pub struct OpView<'a> {
    /// The node.
    pub node: &'a Node,
    /// Version of the operator set of the node's domain.
    pub opset: u32,
}

impl<'a> OpView<'a> {
    /// The view of a node in its graph.
    pub fn new(graph: &Graph, node: &'a Node) -> OpView<'a> {
        OpView { node, opset: graph.opset(&node.domain).unwrap_or(1) }
    }

    /// The node's attributes.
    pub fn attributes(&self) -> &'a Attributes {
        &self.node.attributes
    }

    /// How many outputs the node lists, wanted or not.
    pub fn output_count(&self) -> usize {
        self.node.outputs.len()
    }

    /// Whether an output is wanted.
    pub fn wants(&self, output: usize) -> bool {
        self.node.outputs.get(output).is_some_and(Option::is_some)
    }
}

/// What is known of one value while types and shapes are worked out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Fact {
    /// The element type, if known.
    pub dtype: Option<DType>,
    /// The dimensions, if the rank is known.
    pub shape: Option<Vec<Dim>>,
    /// The elements of a small integer tensor as sizes that may be symbols: what `Shape` makes and `Reshape` reads.
    pub content: Option<Vec<Dim>>,
}

impl Fact {
    /// A tensor of known type and rank.
    pub fn tensor(dtype: Option<DType>, shape: Vec<Dim>) -> Fact {
        Fact { dtype, shape: Some(shape), content: None }
    }

    /// A tensor of known type and unknown rank.
    pub fn of_dtype(dtype: Option<DType>) -> Fact {
        Fact { dtype, shape: None, content: None }
    }

    /// The same fact with known content.
    pub fn with_content(self, content: Option<Vec<Dim>>) -> Fact {
        Fact { content, ..self }
    }
}

/// One input while types and shapes are worked out.
#[derive(Debug, Clone)]
pub struct InputFact<'a> {
    /// What is known of it.
    pub fact: Fact,
    /// Its elements, if they are constant.
    pub constant: Option<&'a Tensor>,
}

impl Deref for InputFact<'_> {
    type Target = Fact;
    fn deref(&self) -> &Fact {
        &self.fact
    }
}

impl InputFact<'_> {
    /// The rank, if known.
    pub fn rank(&self) -> Option<usize> {
        self.fact.shape.as_ref().map(Vec::len)
    }

    /// The elements of a constant integer tensor.
    pub fn constant_ints(&self) -> Result<Option<Vec<i64>>, OpError> {
        Ok(match (self.constant, &self.fact.content) {
            (Some(t), _) => Some(t.to_i64()?),
            (None, Some(content)) => content.iter().map(|d| d.known().and_then(|n| i64::try_from(n).ok())).collect(),
            (None, None) => None,
        })
    }

    /// The elements of a small integer tensor as sizes: constant or symbolic ones. Negative ones, which are no sizes,
    /// are [`Dim::Unknown`].
    pub fn content(&self) -> Option<Vec<Dim>> {
        if let Some(content) = &self.fact.content {
            return Some(content.clone());
        }
        let t = self.constant.filter(|t| t.dtype().is_integer() && t.rank() <= 1 && t.len() <= 64)?;
        Some(t.to_i64().ok()?.into_iter().map(|v| usize::try_from(v).map_or(Dim::Unknown, Dim::Known)).collect())
    }
}

/// A node whose outputs' types and shapes are to be worked out.
pub struct Infer<'a> {
    /// The node.
    pub view: OpView<'a>,
    /// Its inputs; `None` where left out.
    pub inputs: Vec<Option<InputFact<'a>>>,
}

impl<'a> Deref for Infer<'a> {
    type Target = OpView<'a>;
    fn deref(&self) -> &OpView<'a> {
        &self.view
    }
}

impl<'a> Infer<'a> {
    /// The view of a node whose inputs' types are in the graph.
    pub fn new(graph: &'a Graph, node: &'a Node) -> Infer<'a> {
        let inputs = node
            .inputs
            .iter()
            .map(|v| {
                v.map(|v| {
                    let value = graph.value(v);
                    // An initializer that is also a graph input is only a default.
                    let constant = value.constant().filter(|_| !graph.inputs().contains(&v));
                    let constant = constant.or_else(|| {
                        let maker = graph.node(value.producer()?.0);
                        maker.attributes.tensor("value").ok()?.filter(|_| maker.op == "Constant")
                    });
                    let fact = match constant {
                        Some(t) => Fact::tensor(Some(t.dtype()), dims(t.shape())),
                        None => Fact {
                            dtype: value.ty.dtype(),
                            shape: value.ty.shape().map(<[Dim]>::to_vec),
                            content: value.content().map(<[Dim]>::to_vec),
                        },
                    };
                    InputFact { fact, constant }
                })
            })
            .collect();
        Infer { view: OpView::new(graph, node), inputs }
    }

    /// An input that must be there.
    pub fn input(&self, index: usize, expected: &'static str) -> Result<&InputFact<'a>, OpError> {
        self.optional(index).ok_or(OpError::MissingInput { index, expected })
    }

    /// An input that may be left out.
    pub fn optional(&self, index: usize) -> Option<&InputFact<'a>> {
        self.inputs.get(index)?.as_ref()
    }

    /// The element type of an input, if known.
    pub fn dtype(&self, index: usize) -> Option<DType> {
        self.optional(index)?.dtype
    }

    /// The dimensions of an input, if its rank is known.
    pub fn shape(&self, index: usize) -> Option<&[Dim]> {
        self.optional(index)?.shape.as_deref()
    }

    /// An error unless the input's rank, where known, is `rank`.
    pub fn expect_rank(&self, index: usize, rank: usize, what: &str) -> Result<(), OpError> {
        match self.shape(index) {
            Some(shape) if shape.len() != rank => {
                Err(OpError::shape(format!("{what} must have rank {rank}, found shape {}", show_shape(shape))))
            }
            _ => Ok(()),
        }
    }
}

/// Runs the subgraphs of a node during reference evaluation.
pub trait EvalScope {
    /// The outputs of a subgraph for these inputs, with values of the graphs around it in sight.
    fn run(&self, graph: &Graph, inputs: &[Tensor]) -> Result<Vec<Tensor>, OpError>;
}

/// A node whose outputs are to be computed by definition.
pub struct Eval<'a> {
    /// The node.
    pub view: OpView<'a>,
    /// Its inputs; `None` where left out.
    pub inputs: Vec<Option<&'a Tensor>>,
    /// For operators with subgraphs.
    pub scope: &'a dyn EvalScope,
}

impl<'a> Deref for Eval<'a> {
    type Target = OpView<'a>;
    fn deref(&self) -> &OpView<'a> {
        &self.view
    }
}

impl<'a> Eval<'a> {
    /// An input that must be there.
    pub fn input(&self, index: usize) -> Result<&'a Tensor, OpError> {
        self.optional(index).ok_or(OpError::MissingInput { index, expected: "a tensor" })
    }

    /// An input that may be left out.
    pub fn optional(&self, index: usize) -> Option<&'a Tensor> {
        self.inputs.get(index).copied().flatten()
    }

    /// The same node as inference sees it, all inputs being constant.
    pub fn infer(&self) -> Infer<'a> {
        let known =
            |t: &'a Tensor| InputFact { fact: Fact::tensor(Some(t.dtype()), dims(t.shape())), constant: Some(t) };
        Infer { view: self.view, inputs: self.inputs.iter().map(|t| t.map(known)).collect() }
    }

    /// The shape that an inference rule finds for the first output of these very inputs.
    pub fn output_shape(&self, rule: fn(&Infer) -> Result<Vec<Fact>, OpError>) -> Result<Vec<usize>, OpError> {
        let facts = rule(&self.infer())?;
        let shape = facts.first().and_then(|fact| crate::dim::known_shape(fact.shape.as_ref()?));
        shape.ok_or_else(|| {
            let shapes: Vec<_> = self.inputs.iter().flatten().map(|t| t.shape()).collect();
            OpError::shape(format!("no output shape follows from inputs of shapes {shapes:?}"))
        })
    }
}

/// A node through which gradients flow back, and the graph to build them in.
pub struct Gradient<'a> {
    /// The graph; new nodes read the forward pass's values directly.
    pub graph: &'a mut Graph,
    /// The forward node's id.
    pub id: NodeId,
    /// The forward node.
    pub node: Node,
    /// Gradient of the loss with respect to each output; `None` where the loss does not depend on it.
    pub grads: Vec<Option<ValueId>>,
    /// Whether the gradient with respect to each input is asked for.
    pub wanted: Vec<bool>,
}

impl Gradient<'_> {
    /// The forward node and its opset.
    pub fn view(&self) -> OpView<'_> {
        OpView::new(self.graph, &self.node)
    }

    /// The forward value of an input that must be there.
    pub fn input(&self, index: usize) -> Result<ValueId, OpError> {
        self.optional(index).ok_or(OpError::MissingInput { index, expected: "a tensor" })
    }

    /// The forward value of an input that may be left out.
    pub fn optional(&self, index: usize) -> Option<ValueId> {
        self.node.inputs.get(index).copied().flatten()
    }

    /// The forward value of an output. One that the forward pass did not want is added to the node.
    pub fn output(&mut self, index: usize) -> Result<ValueId, OpError> {
        if let Some(value) = self.node.outputs.get(index).copied().flatten() {
            return Ok(value);
        }
        let hint = format!("{}_output_{index}", self.node.op);
        let value = self.graph.fresh_value(&hint, ValueType::Unknown);
        self.graph.set_node_output(self.id, index, value)?;
        infer_node(self.graph, self.id)?;
        self.node = self.graph.node(self.id).clone();
        Ok(value)
    }

    /// The gradient with respect to the first output.
    pub fn grad(&self) -> Result<ValueId, OpError> {
        self.grads
            .first()
            .copied()
            .flatten()
            .ok_or_else(|| OpError::value("the loss does not depend on the first output"))
    }

    /// Whether the gradient of an input is asked for.
    pub fn wants(&self, index: usize) -> bool {
        self.wanted.get(index).copied().unwrap_or(false)
    }

    /// The gradient of each input for which it is asked, by a rule given the input's number and value.
    pub fn each_input(
        &mut self,
        mut rule: impl FnMut(&mut Self, usize, ValueId) -> Result<ValueId, OpError>,
    ) -> Result<Vec<Option<ValueId>>, OpError> {
        (0..self.node.inputs.len())
            .map(|index| match self.optional(index).filter(|_| self.wants(index)) {
                Some(value) => rule(self, index, value).map(Some),
                None => Ok(None),
            })
            .collect()
    }

    /// Adds a node of ONNX's operator set and returns its first output.
    pub fn op(&mut self, op: &str, inputs: &[ValueId]) -> Result<ValueId, OpError> {
        self.graph.op(op, inputs, Attributes::new())
    }

    /// [`op`](Gradient::op) with attributes.
    pub fn op_with(
        &mut self,
        op: &str,
        inputs: &[ValueId],
        attributes: impl Into<Attributes>,
    ) -> Result<ValueId, OpError> {
        self.graph.op(op, inputs, attributes)
    }

    /// A constant scalar of the element type of `like`.
    pub fn scalar_like(&mut self, value: f64, like: ValueId) -> Result<ValueId, OpError> {
        let dtype = self.graph.dtype(like).ok_or_else(|| self.unknown_type(like))?;
        let tensor = Tensor::from_f64(dtype, &[], &[value])?;
        Ok(self.graph.add_constant("constant", tensor))
    }

    /// A constant vector of integers: axes, sizes, pads.
    pub fn ints(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_constant("constant", Tensor::vector(values))
    }

    /// `value` in the element type of `like`.
    pub fn cast_like(&mut self, value: ValueId, like: ValueId) -> Result<ValueId, OpError> {
        let dtype = self.graph.dtype(like).ok_or_else(|| self.unknown_type(like))?;
        if self.graph.dtype(value) == Some(dtype) {
            return Ok(value);
        }
        self.op_with("Cast", &[value], [("to", Attribute::Int(dtype as i64))])
    }

    /// The dimensions of a value; gradients need to know ranks.
    pub fn shape(&self, value: ValueId) -> Result<Vec<Dim>, OpError> {
        Ok(self.graph.shape(value).ok_or_else(|| self.unknown_type(value))?.to_vec())
    }

    fn unknown_type(&self, value: ValueId) -> OpError {
        OpError::shape(format!("the gradient needs type and rank of {:?}", self.graph.value(value).name))
    }

    /// Sums `grad` over the axes along which `like` was broadcast, so that it has the shape of `like`.
    pub fn sum_to(&mut self, grad: ValueId, like: ValueId) -> Result<ValueId, OpError> {
        let (from, to) = (self.shape(grad)?, self.shape(like)?);
        let lead = from.len().saturating_sub(to.len());
        let mut out = grad;
        let stretched: Vec<i64> = (0..to.len())
            .filter(|i| to[*i] == Dim::Known(1) && from[lead + i] != Dim::Known(1))
            .map(|i| (lead + i) as i64)
            .collect();
        if !stretched.is_empty() {
            out = self.reduce_sum(out, &stretched, true)?;
        }
        if lead > 0 {
            let axes: Vec<i64> = (0..lead as i64).collect();
            out = self.reduce_sum(out, &axes, false)?;
        }
        Ok(out)
    }

    /// `then` where `x` is below a threshold, `otherwise` where it is not.
    pub fn below(&mut self, x: ValueId, threshold: f64, then: ValueId, otherwise: ValueId) -> Result<ValueId, OpError> {
        let threshold = self.scalar_like(threshold, x)?;
        let is_below = self.op("Less", &[x, threshold])?;
        self.op("Where", &[is_below, then, otherwise])
    }

    /// The sum over some axes.
    pub fn reduce_sum(&mut self, value: ValueId, axes: &[i64], keep_dims: bool) -> Result<ValueId, OpError> {
        let axes = self.ints(axes);
        self.op_with("ReduceSum", &[value, axes], [("keepdims", i64::from(keep_dims).into())])
    }

    /// `value` with the shape of `like`, which has as many elements.
    pub fn reshape_like(&mut self, value: ValueId, like: ValueId) -> Result<ValueId, OpError> {
        let (from, to) = (self.shape(value)?, self.shape(like)?);
        if from.len() == to.len() && from.iter().zip(&to).all(|(a, b)| a.same(b)) {
            return Ok(value);
        }
        let target = match reshape_operand(&from, &to) {
            Some(target) => self.ints(&target),
            None => self.op("Shape", &[like])?,
        };
        self.op("Reshape", &[value, target])
    }

    /// `value` as a matrix whose columns are its last axis and whose rows are all others.
    pub fn flatten_rows(&mut self, value: ValueId) -> Result<ValueId, OpError> {
        let shape = self.shape(value)?;
        if shape.len() == 2 {
            return Ok(value);
        }
        let axis = shape.len() as i64 - 1;
        self.op_with("Flatten", &[value], [("axis", axis.into())])
    }
}

/// The constant operand that makes `Reshape` turn `from` into `to`, which has as many elements. A symbol is either the
/// size at the same position of `from` (0), or the only size left to find (-1); `None` where that is not enough. The
/// two are not mixed, because for an empty tensor -1 would then be ambiguous.
pub fn reshape_operand(from: &[Dim], to: &[Dim]) -> Option<Vec<i64>> {
    let size = |(i, dim): (usize, &Dim)| match dim {
        Dim::Known(0) => None,
        Dim::Known(n) => i64::try_from(*n).ok(),
        symbol if from.get(i).is_some_and(|d| d.same(symbol)) => Some(0),
        _ => Some(-1),
    };
    let sizes: Vec<i64> = to.iter().enumerate().map(size).collect::<Option<_>>()?;
    let found = sizes.iter().filter(|n| **n == -1).count();
    (found == 0 || found == 1 && !sizes.contains(&0)).then_some(sizes)
}
