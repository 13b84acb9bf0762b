//! A model file's content: the main graph and what surrounds it.

use crate::attribute::{Attribute, Attributes};
use crate::graph::Graph;

/// Everything an ONNX file holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Model {
    /// The network.
    pub graph: Graph,
    /// ONNX's file format version.
    pub ir_version: i64,
    /// The program that wrote the file, and its version.
    pub producer_name: String,
    /// Version of the producer.
    pub producer_version: String,
    /// Name space of the model, in reverse-DNS form.
    pub domain: String,
    /// Version of the model itself.
    pub model_version: i64,
    /// Free text.
    pub doc: String,
    /// Key-value pairs.
    pub metadata: Vec<(String, String)>,
    /// Operators that the file defines itself.
    pub functions: Vec<Function>,
    /// How the file's own training works, carried along.
    pub training: Vec<TrainingInfo>,
    /// Encoded `DeviceConfigurationProto`s, carried along.
    pub device_configurations: Vec<Vec<u8>>,
}

/// ONNX's description of a training method: graphs that initialise and update tensors of the main graph. Values of
/// the main graph that they read are outer values.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrainingInfo {
    /// Makes first values.
    pub initialization: Option<Graph>,
    /// Makes the values after one step.
    pub algorithm: Option<Graph>,
    /// Tensor of the main graph or of `algorithm`, and the output of `initialization` that sets it.
    pub initialization_binding: Vec<(String, String)>,
    /// Tensor of the main graph or of `algorithm`, and the output of `algorithm` that replaces it.
    pub update_binding: Vec<(String, String)>,
}

/// An operator defined by a graph: its inputs and outputs are the graph's.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Function {
    /// Operator set it belongs to.
    pub domain: String,
    /// Which of several functions of one name.
    pub overload: String,
    /// The body; its name is the operator's name.
    pub body: Graph,
    /// Attributes that callers must give.
    pub required_attributes: Vec<String>,
    /// Attributes that callers may give, with their defaults.
    pub default_attributes: Attributes,
}

impl Model {
    /// A model around a graph made here.
    pub fn new(graph: Graph) -> Model {
        Model {
            graph,
            ir_version: 10,
            producer_name: "updraft".to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Model::default()
        }
    }
}

impl Function {
    /// The default of an attribute, if it has one.
    pub fn default_attribute(&self, name: &str) -> Option<&Attribute> {
        self.default_attributes.get(name)
    }
}
