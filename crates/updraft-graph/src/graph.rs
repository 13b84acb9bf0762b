//! The graph: values, and nodes that make values from values.
//!
//! Values and nodes live in two arenas and are named by small ids. Every edit goes through a method here, which keeps
//! the books: who produces a value, who consumes it, and which name belongs to whom. Nodes need not be stored in
//! execution order; [`Graph::order`] gives one, always the same for the same graph.

mod order;
mod value_type;

use std::collections::{BTreeMap, HashMap};

use crate::attribute::Attributes;
use crate::dim::{Dim, known_shape};
use crate::dtype::DType;
use crate::tensor::Tensor;

pub use value_type::{TensorType, ValueType};

/// Names a value of one graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(u32);

/// Names a node of one graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u32);

impl ValueId {
    /// Position in the arena: dense, from 0.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl NodeId {
    /// Position in the arena, from 0; removed nodes leave gaps.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a file says a value and its axes stand for (`IMAGE`, `DATA_BATCH`): ONNX's standard denotations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Denotation {
    /// Of the whole value; may be empty.
    pub value: String,
    /// Of each axis; may be empty, and the list may be shorter than the rank.
    pub axes: Vec<String>,
}

/// One value: made once, read any number of times.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// Unique in its graph.
    pub name: String,
    /// What is known of it.
    pub ty: ValueType,
    /// Free text that a file carries along.
    pub doc: String,
    /// Key-value pairs that a file carries along.
    pub metadata: Vec<(String, String)>,
    /// What a file says the value stands for.
    pub denotation: Denotation,
    constant: Option<Tensor>,
    is_sparse: bool,
    content: Option<Vec<Dim>>,
    is_outer: bool,
    producer: Option<(NodeId, usize)>,
    consumers: Vec<NodeId>,
}

impl Value {
    /// The tensor it always is, if it is an initializer.
    pub fn constant(&self) -> Option<&Tensor> {
        self.constant.as_ref()
    }

    /// Whether files store the initializer by its non-zero elements.
    pub fn is_sparse(&self) -> bool {
        self.is_sparse
    }

    /// Its elements as sizes that may be symbols, where inference found them (the output of `Shape`).
    pub fn content(&self) -> Option<&[Dim]> {
        self.content.as_deref()
    }

    /// Whether it belongs to the graph around this subgraph.
    pub fn is_outer(&self) -> bool {
        self.is_outer
    }

    /// The node that makes it, and which of that node's outputs it is.
    pub fn producer(&self) -> Option<(NodeId, usize)> {
        self.producer
    }

    /// The nodes that read it, once for each input that does.
    pub fn consumers(&self) -> &[NodeId] {
        &self.consumers
    }
}

/// One use of an operator.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Node {
    /// For people; may be empty and need not be unique.
    pub name: String,
    /// The operator set the operator belongs to; empty for ONNX's own.
    pub domain: String,
    /// The operator's ONNX name.
    pub op: String,
    /// Which overload of a model's function is meant; nearly always empty.
    pub overload: String,
    /// Inputs in the operator's order; `None` where an optional one is left out.
    pub inputs: Vec<Option<ValueId>>,
    /// Outputs in the operator's order; `None` where one is not wanted.
    pub outputs: Vec<Option<ValueId>>,
    /// The constants beside the inputs.
    pub attributes: Attributes,
    /// Free text that a file carries along.
    pub doc: String,
    /// Key-value pairs that a file carries along.
    pub metadata: Vec<(String, String)>,
    /// Encoded `NodeDeviceConfigurationProto`s that a file carries along.
    pub device_configurations: Vec<Vec<u8>>,
}

impl Node {
    /// How messages call the node: its name, or its operator and first output.
    pub fn label(&self, graph: &Graph) -> String {
        if !self.name.is_empty() {
            return format!("{} ({})", self.name, self.op);
        }
        match self.outputs.iter().flatten().next() {
            Some(v) => format!("{} -> {}", self.op, graph.value(*v).name),
            None => self.op.clone(),
        }
    }
}

/// Our own operator set: gradients, updates and fused forms that ONNX does not have.
pub const UPDRAFT_DOMAIN: &str = "ai.updraft";

/// The ONNX operator set that passes write; [`upgrade`](crate::upgrade) brings older graphs to it.
pub const OPSET: u32 = 21;

/// The newest ONNX operator set that the reader knows.
pub const OPSET_MAX: u32 = 28;

/// A network, or a whole training step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Graph {
    /// For people.
    pub name: String,
    /// Free text that a file carries along.
    pub doc: String,
    /// Key-value pairs that a file carries along.
    pub metadata: Vec<(String, String)>,
    /// Version of each operator set the nodes are written in, by domain.
    pub opsets: BTreeMap<String, u32>,
    /// Quantization parameters that a file carries along.
    pub quantization: Vec<QuantizationAnnotation>,
    values: Vec<Value>,
    nodes: Vec<Option<Node>>,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    names: HashMap<String, ValueId>,
}

/// Which tensors of a file hold the quantization parameters of another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QuantizationAnnotation {
    /// Name of the tensor that is quantized.
    pub tensor: String,
    /// Parameter (`SCALE_TENSOR`, `ZERO_POINT_TENSOR`) and the name of the tensor that holds it.
    pub parameters: Vec<(String, String)>,
}

/// What an edit or an ordering was refused for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// Two values would have one name.
    #[error("value name {name:?} is used twice")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// A value would be made twice.
    #[error("value {value:?} is made by {first} and again by {second}")]
    DuplicateProducer {
        /// The value's name.
        value: String,
        /// Who makes it.
        first: String,
        /// Who else would.
        second: String,
    },
    /// Nodes wait for one another.
    #[error("nodes form a cycle: {}", nodes.join(" -> "))]
    Cycle {
        /// Labels of nodes on the cycle, in order.
        nodes: Vec<String>,
    },
}

impl Graph {
    /// An empty graph in [`OPSET`] and our own operator set.
    pub fn new(name: &str) -> Graph {
        Graph {
            name: name.to_owned(),
            opsets: BTreeMap::from([(String::new(), OPSET), (UPDRAFT_DOMAIN.to_owned(), 1)]),
            ..Graph::default()
        }
    }

    /// The version of the operator set `domain`; ONNX's own is `""`, and files may call it `ai.onnx`.
    pub fn opset(&self, domain: &str) -> Option<u32> {
        match domain {
            "" | "ai.onnx" => self.opsets.get("").or_else(|| self.opsets.get("ai.onnx")).copied(),
            other => self.opsets.get(other).copied(),
        }
    }

    /// Adds a value with a name that must be free.
    pub fn add_value(&mut self, name: &str, ty: ValueType) -> Result<ValueId, GraphError> {
        if self.names.contains_key(name) {
            return Err(GraphError::DuplicateName { name: name.to_owned() });
        }
        Ok(self.push_value(name.to_owned(), ty))
    }

    /// Adds a value named after `hint`, with a number behind it where that is taken.
    pub fn fresh_value(&mut self, hint: &str, ty: ValueType) -> ValueId {
        let name = self.free_name(hint);
        self.push_value(name, ty)
    }

    fn free_name(&self, hint: &str) -> String {
        if !hint.is_empty() && !self.names.contains_key(hint) {
            return hint.to_owned();
        }
        let stem = if hint.is_empty() { "v" } else { hint };
        // Starting at the arena's size finds a free number at once in the usual case.
        (self.values.len()..)
            .map(|i| format!("{stem}_{i}"))
            .find(|name| !self.names.contains_key(name))
            .unwrap_or_default()
    }

    fn push_value(&mut self, name: String, ty: ValueType) -> ValueId {
        let id = ValueId(self.values.len() as u32);
        self.names.insert(name.clone(), id);
        self.values.push(Value {
            name,
            ty,
            doc: String::new(),
            metadata: Vec::new(),
            denotation: Denotation::default(),
            constant: None,
            is_sparse: false,
            content: None,
            is_outer: false,
            producer: None,
            consumers: Vec::new(),
        });
        id
    }

    /// Adds a graph input.
    pub fn add_input(&mut self, name: &str, ty: ValueType) -> Result<ValueId, GraphError> {
        let id = self.add_value(name, ty)?;
        self.inputs.push(id);
        Ok(id)
    }

    /// Adds an initializer: a value that always is `tensor`. The name may get a number behind it.
    pub fn add_constant(&mut self, hint: &str, tensor: Tensor) -> ValueId {
        let id = self.fresh_value(hint, ValueType::of(&tensor));
        self.values[id.index()].constant = Some(tensor);
        id
    }

    /// Adds, in a subgraph, a value that belongs to the graph around it.
    pub fn add_outer(&mut self, name: &str, ty: ValueType) -> Result<ValueId, GraphError> {
        let id = self.add_value(name, ty)?;
        self.values[id.index()].is_outer = true;
        Ok(id)
    }

    /// Says that a value of this subgraph belongs to the graph around it.
    pub(crate) fn set_outer(&mut self, value: ValueId) {
        self.values[value.index()].is_outer = true;
    }

    /// Makes an existing value a graph input.
    pub fn push_input(&mut self, value: ValueId) {
        self.inputs.push(value);
    }

    /// Makes an existing value a graph output. A value may be an output more than once.
    pub fn push_output(&mut self, value: ValueId) {
        self.outputs.push(value);
    }

    /// Replaces the list of graph inputs.
    pub fn set_inputs(&mut self, inputs: Vec<ValueId>) {
        self.inputs = inputs;
    }

    /// Replaces the list of graph outputs.
    pub fn set_outputs(&mut self, outputs: Vec<ValueId>) {
        self.outputs = outputs;
    }

    /// Makes a value an initializer, replaces its tensor, or (with `None`) stops it being one.
    pub fn set_constant(&mut self, value: ValueId, tensor: Option<Tensor>) {
        if let Some(tensor) = &tensor {
            self.values[value.index()].ty = ValueType::of(tensor);
        }
        self.values[value.index()].is_sparse &= tensor.is_some();
        self.values[value.index()].constant = tensor;
    }

    /// Says whether files store an initializer by its non-zero elements.
    pub fn set_sparse(&mut self, value: ValueId, is_sparse: bool) {
        self.values[value.index()].is_sparse = is_sparse;
    }

    /// Gives a value another name, which must be free.
    pub fn rename(&mut self, value: ValueId, name: &str) -> Result<(), GraphError> {
        if self.names.get(name).is_some_and(|other| *other != value) {
            return Err(GraphError::DuplicateName { name: name.to_owned() });
        }
        let old = std::mem::replace(&mut self.values[value.index()].name, name.to_owned());
        self.names.remove(&old);
        self.names.insert(name.to_owned(), value);
        Ok(())
    }

    /// Gives each of two values the other's name.
    pub fn swap_names(&mut self, a: ValueId, b: ValueId) {
        let name_a = std::mem::take(&mut self.values[a.index()].name);
        let name_b = std::mem::replace(&mut self.values[b.index()].name, name_a.clone());
        self.names.insert(name_a, b);
        self.names.insert(name_b.clone(), a);
        self.values[a.index()].name = name_b;
    }

    /// Adds a node; its outputs must not have a producer yet.
    pub fn add_node(&mut self, node: Node) -> Result<NodeId, GraphError> {
        for v in node.outputs.iter().flatten() {
            if let Some((first, _)) = self.values[v.index()].producer {
                return Err(GraphError::DuplicateProducer {
                    value: self.values[v.index()].name.clone(),
                    first: self.node(first).label(self),
                    second: node.label(self),
                });
            }
        }
        let id = NodeId(self.nodes.len() as u32);
        for v in node.inputs.iter().flatten() {
            self.values[v.index()].consumers.push(id);
        }
        for (i, v) in node.outputs.iter().enumerate() {
            if let Some(v) = v {
                self.values[v.index()].producer = Some((id, i));
            }
        }
        self.nodes.push(Some(node));
        Ok(id)
    }

    /// Removes a node; the values it made stay, without a producer.
    pub fn remove_node(&mut self, id: NodeId) -> Option<Node> {
        let node = self.nodes.get_mut(id.index())?.take()?;
        for v in node.inputs.iter().flatten() {
            let consumers = &mut self.values[v.index()].consumers;
            if let Some(at) = consumers.iter().position(|c| *c == id) {
                consumers.remove(at);
            }
        }
        for v in node.outputs.iter().flatten() {
            self.values[v.index()].producer = None;
        }
        Some(node)
    }

    /// Replaces one input of a node.
    pub fn set_node_input(&mut self, id: NodeId, index: usize, value: Option<ValueId>) {
        let Some(node) = self.nodes[id.index()].as_mut() else { return };
        if node.inputs.len() <= index {
            node.inputs.resize(index + 1, None);
        }
        let old = std::mem::replace(&mut node.inputs[index], value);
        if let Some(old) = old {
            let consumers = &mut self.values[old.index()].consumers;
            if let Some(at) = consumers.iter().position(|c| *c == id) {
                consumers.remove(at);
            }
        }
        if let Some(new) = value {
            self.values[new.index()].consumers.push(id);
        }
    }

    /// Wants one more output of a node: `value`, which must not have a producer yet, becomes output `index`, so far not
    /// wanted.
    pub fn set_node_output(&mut self, id: NodeId, index: usize, value: ValueId) -> Result<(), GraphError> {
        let node = self.node(id);
        let taken = node.outputs.get(index).copied().flatten().unwrap_or(value);
        let first = match self.value(taken).producer {
            Some((first, _)) => Some(first),
            None => (taken != value).then_some(id),
        };
        if let Some(first) = first {
            return Err(GraphError::DuplicateProducer {
                value: self.value(taken).name.clone(),
                first: self.node(first).label(self),
                second: node.label(self),
            });
        }
        if let Some(node) = self.nodes[id.index()].as_mut() {
            if node.outputs.len() <= index {
                node.outputs.resize(index + 1, None);
            }
            node.outputs[index] = Some(value);
        }
        self.values[value.index()].producer = Some((id, index));
        Ok(())
    }

    /// Lets every reader of `old`, and the graph's outputs, read `new`. Readers inside subgraphs refer by name and
    /// are not changed.
    pub fn replace_uses(&mut self, old: ValueId, new: ValueId) {
        let consumers = std::mem::take(&mut self.values[old.index()].consumers);
        for id in &consumers {
            if let Some(node) = self.nodes[id.index()].as_mut() {
                for input in node.inputs.iter_mut().filter(|i| **i == Some(old)) {
                    *input = Some(new);
                }
            }
        }
        self.values[new.index()].consumers.extend(consumers);
        for output in self.outputs.iter_mut().filter(|o| **o == old) {
            *output = new;
        }
    }

    /// A value by id.
    ///
    /// # Panics
    /// If the id is of another graph.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// A value's type, documentation and metadata, for editing; names change by [`Graph::rename`].
    pub fn set_type(&mut self, id: ValueId, ty: ValueType) {
        self.values[id.index()].ty = ty;
    }

    /// Sets what inference found of a small integer tensor's elements.
    pub(crate) fn set_content(&mut self, id: ValueId, content: Option<Vec<Dim>>) {
        self.values[id.index()].content = content;
    }

    /// Sets the free text and the pairs that a file carries along with a value.
    pub fn set_value_notes(&mut self, id: ValueId, doc: String, metadata: Vec<(String, String)>) {
        let value = &mut self.values[id.index()];
        value.doc = doc;
        value.metadata = metadata;
    }

    /// Sets what a file says a value stands for.
    pub fn set_denotation(&mut self, id: ValueId, denotation: Denotation) {
        self.values[id.index()].denotation = denotation;
    }

    /// A node by id.
    ///
    /// # Panics
    /// If the node was removed or the id is of another graph.
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.index()].as_ref().expect("node was removed")
    }

    /// A node's attributes, for editing.
    ///
    /// # Panics
    /// If the node was removed or the id is of another graph.
    pub fn attributes_mut(&mut self, id: NodeId) -> &mut Attributes {
        &mut self.nodes[id.index()].as_mut().expect("node was removed").attributes
    }

    /// Gives a node another name.
    ///
    /// # Panics
    /// If the node was removed or the id is of another graph.
    pub fn rename_node(&mut self, id: NodeId, name: &str) {
        self.nodes[id.index()].as_mut().expect("node was removed").name = name.to_owned();
    }

    /// All nodes that are still there, oldest first.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.nodes.iter().enumerate().filter_map(|(i, n)| Some((NodeId(i as u32), n.as_ref()?)))
    }

    /// All values, oldest first, also those that nothing reads.
    pub fn values(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values.iter().enumerate().map(|(i, v)| (ValueId(i as u32), v))
    }

    /// How many values there are; ids are below this.
    pub fn value_count(&self) -> usize {
        self.values.len()
    }

    /// The value of this name.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.names.get(name).copied()
    }

    /// The graph's inputs, in order. An input that is also an initializer has a default.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// The graph's outputs, in order.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// The initializers, oldest first.
    pub fn constants(&self) -> impl Iterator<Item = (ValueId, &Tensor)> {
        self.values().filter_map(|(id, v)| Some((id, v.constant.as_ref()?)))
    }

    /// The element type of a value, if known.
    pub fn dtype(&self, id: ValueId) -> Option<DType> {
        self.value(id).ty.dtype()
    }

    /// The dimensions of a value, if its rank is known.
    pub fn shape(&self, id: ValueId) -> Option<&[Dim]> {
        self.value(id).ty.shape()
    }

    /// The dimensions of a value, if all are known.
    pub fn known_shape(&self, id: ValueId) -> Option<Vec<usize>> {
        known_shape(self.shape(id)?)
    }
}
