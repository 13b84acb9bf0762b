//! From a [`Model`] to a file's messages.

use std::collections::{BTreeMap, HashSet};

use prost::Message;

use super::OnnxError;
use super::packing::to_little_endian;
use super::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TensorAnnotation, TensorProto, TrainingInfoProto, ValueInfoProto, kind,
};
use super::read::IR_OPTIONAL_INITIALIZERS;
use super::tensors::{sparsify, write_sparse, write_tensor, write_tensor_outside};
use super::types::write_type;
use crate::attribute::{Attribute, Attributes};
use crate::graph::{Denotation, Graph, Node, ValueId, ValueType};
use crate::model::{Function, Model, TrainingInfo};
use crate::tensor::Tensor;

/// Protobuf cannot have larger messages.
const MESSAGE_BYTES_MAX: usize = i32::MAX as usize;

/// Tensors outside begin at multiples of a page, so that readers can map them.
const EXTERNAL_ALIGNMENT_BYTES: u64 = 4096;

/// How to write.
#[derive(Default)]
pub struct WriteOptions<'a> {
    /// Where large initializers go; without it, all are in the file.
    pub external: Option<External<'a>>,
}

/// A second file for large initializers.
pub struct External<'a> {
    /// The file's name as the model will state it: a path relative to the model's folder.
    pub location: &'a str,
    /// Initializers of this many bytes or more go there.
    pub bytes_min: usize,
    /// Takes the file's bytes, piece after piece.
    pub sink: &'a mut dyn FnMut(&[u8]) -> Result<(), String>,
}

/// The bytes of the file that holds a model. The same model gives the same bytes.
///
/// # Errors
/// A graph whose nodes form a cycle, a file larger than protobuf allows, and a sink that fails.
pub fn write(model: &Model, options: WriteOptions) -> Result<Vec<u8>, OnnxError> {
    let mut writer = Writer { external: options.external, offset: 0 };
    let proto = writer.model(model)?;
    let found_bytes = proto.encoded_len();
    if found_bytes > MESSAGE_BYTES_MAX {
        return Err(OnnxError::TooLarge { found_bytes });
    }
    Ok(proto.encode_to_vec())
}

struct Writer<'a> {
    external: Option<External<'a>>,
    /// Bytes that the second file has so far.
    offset: u64,
}

impl Writer<'_> {
    fn model(&mut self, model: &Model) -> Result<ModelProto, OnnxError> {
        let mut graph = self.graph(&model.graph)?;
        if model.ir_version < IR_OPTIONAL_INITIALIZERS {
            // Files of that time list every initializer among the inputs as well.
            let listed: HashSet<String> = graph.input.iter().filter_map(|i| i.name.clone()).collect();
            let constants = model.graph.constants().filter(|(id, _)| !listed.contains(&model.graph.value(*id).name));
            graph.input.extend(constants.map(|(id, tensor)| ValueInfoProto {
                r#type: write_type(&ValueType::of(tensor), &Denotation::default()).map(Box::new),
                ..value_info(&model.graph, id)
            }));
        }
        Ok(ModelProto {
            ir_version: Some(model.ir_version),
            producer_name: text(&model.producer_name),
            producer_version: text(&model.producer_version),
            domain: text(&model.domain),
            model_version: Some(model.model_version).filter(|v| *v != 0),
            doc_string: text(&model.doc),
            graph: Some(Box::new(graph)),
            opset_import: write_opsets(&model.graph.opsets),
            metadata_props: write_pairs(&model.metadata),
            training_info: model.training.iter().map(|t| self.training(t)).collect::<Result<_, _>>()?,
            functions: model.functions.iter().map(|f| self.function(f)).collect::<Result<_, _>>()?,
            configuration: model.device_configurations.clone(),
        })
    }

    fn training(&mut self, training: &TrainingInfo) -> Result<TrainingInfoProto, OnnxError> {
        let mut write = |graph: &Option<Graph>| -> Result<Option<Box<GraphProto>>, OnnxError> {
            graph.as_ref().map(|g| Ok(Box::new(self.graph(g)?))).transpose()
        };
        Ok(TrainingInfoProto {
            initialization: write(&training.initialization)?,
            algorithm: write(&training.algorithm)?,
            initialization_binding: write_pairs(&training.initialization_binding),
            update_binding: write_pairs(&training.update_binding),
        })
    }

    fn function(&mut self, function: &Function) -> Result<FunctionProto, OnnxError> {
        let mut body = function.body.clone();
        let sparse: Vec<ValueId> = body.constants().map(|(id, _)| id).collect();
        sparse.into_iter().for_each(|id| body.set_sparse(id, false));
        let body = self.graph(&body)?;
        let names = |infos: &[ValueInfoProto]| infos.iter().filter_map(|i| i.name.clone()).collect();
        // Inputs and outputs are names only; whatever else is known of them stands among the values.
        let mut seen = HashSet::new();
        let noted = body
            .input
            .iter()
            .chain(&body.output)
            .filter(|i| i.r#type.is_some() || i.doc_string.is_some() || !i.metadata_props.is_empty())
            .filter(|i| seen.insert(i.name.clone()));
        let value_info = noted.cloned().chain(body.value_info.iter().cloned()).collect();
        // A body has no initializers of its own in ONNX.
        let constants = body.initializer.iter().map(constant_node);
        Ok(FunctionProto {
            name: body.name.clone(),
            input: names(&body.input),
            output: names(&body.output),
            attribute: function.required_attributes.clone(),
            node: constants.chain(body.node.iter().cloned()).collect(),
            doc_string: body.doc_string.clone(),
            opset_import: write_opsets(&function.body.opsets),
            domain: text(&function.domain),
            attribute_proto: self.attributes(&function.default_attributes)?,
            value_info,
            overload: text(&function.overload),
            metadata_props: body.metadata_props.clone(),
        })
    }

    fn graph(&mut self, graph: &Graph) -> Result<GraphProto, OnnxError> {
        let mut graph = graph.clone();
        graph.sort().map_err(|source| OnnxError::Graph { place: format!("graph {:?}", graph.name), source })?;
        let graph = &graph;
        let mut proto = GraphProto {
            name: text(&graph.name),
            doc_string: text(&graph.doc),
            input: graph.inputs().iter().map(|v| value_info(graph, *v)).collect(),
            output: graph.outputs().iter().map(|v| value_info(graph, *v)).collect(),
            metadata_props: write_pairs(&graph.metadata),
            quantization_annotation: graph
                .quantization
                .iter()
                .map(|a| TensorAnnotation {
                    tensor_name: text(&a.tensor),
                    quant_parameter_tensor_names: write_pairs(&a.parameters),
                })
                .collect(),
            ..GraphProto::default()
        };
        for (id, tensor) in graph.constants() {
            let value = graph.value(id);
            // An input's notes stand with the input.
            let is_input = graph.inputs().contains(&id);
            let note = |tensor: &mut TensorProto| {
                if !is_input {
                    tensor.doc_string = text(&value.doc);
                    tensor.metadata_props = write_pairs(&value.metadata);
                }
            };
            if value.is_sparse() {
                let sparse = sparsify(tensor).map_err(|problem| OnnxError::Tensor {
                    place: format!("graph {:?}", graph.name),
                    tensor: value.name.clone(),
                    problem,
                })?;
                let mut sparse = write_sparse(&value.name, &sparse);
                sparse.values.iter_mut().for_each(|v| note(v));
                proto.sparse_initializer.push(sparse);
            } else {
                let mut tensor = self.initializer(&value.name, tensor, &graph.name)?;
                note(&mut tensor);
                proto.initializer.push(tensor);
            }
        }
        let declared: HashSet<ValueId> = graph.inputs().iter().chain(graph.outputs()).copied().collect();
        for (id, value) in graph.values() {
            let is_told = value.ty != ValueType::Unknown
                || value.denotation != Denotation::default()
                || !value.doc.is_empty()
                || !value.metadata.is_empty();
            if is_told && value.producer().is_some() && !declared.contains(&id) {
                proto.value_info.push(value_info(graph, id));
            }
        }
        for (_, node) in graph.nodes() {
            proto.node.push(self.node(graph, node)?);
        }
        Ok(proto)
    }

    fn initializer(&mut self, name: &str, tensor: &Tensor, graph: &str) -> Result<TensorProto, OnnxError> {
        let Some(external) = &mut self.external else { return Ok(write_tensor(name, tensor)) };
        let bytes = to_little_endian(tensor);
        if bytes.len() < external.bytes_min || bytes.is_empty() {
            return Ok(write_tensor(name, tensor));
        }
        let mut send = |bytes: &[u8]| {
            (external.sink)(bytes).map_err(|problem| OnnxError::External {
                place: format!("graph {graph:?}"),
                tensor: name.to_owned(),
                location: external.location.to_owned(),
                problem,
            })
        };
        let start = self.offset.next_multiple_of(EXTERNAL_ALIGNMENT_BYTES);
        if start > self.offset {
            send(&vec![0; (start - self.offset) as usize])?;
        }
        send(&bytes)?;
        self.offset = start + bytes.len() as u64;
        Ok(write_tensor_outside(name, tensor, external.location, start, bytes.len()))
    }

    fn node(&mut self, graph: &Graph, node: &Node) -> Result<NodeProto, OnnxError> {
        let name = |v: &Option<ValueId>| v.map_or(String::new(), |v| graph.value(v).name.clone());
        Ok(NodeProto {
            input: node.inputs.iter().map(name).collect(),
            output: node.outputs.iter().map(name).collect(),
            name: text(&node.name),
            op_type: text(&node.op),
            attribute: self.attributes(&node.attributes)?,
            doc_string: text(&node.doc),
            domain: text(&node.domain),
            overload: text(&node.overload),
            metadata_props: write_pairs(&node.metadata),
            device_configurations: node.device_configurations.clone(),
        })
    }

    fn attributes(&mut self, attributes: &Attributes) -> Result<Vec<AttributeProto>, OnnxError> {
        let one = |(name, value): (&str, &Attribute)| {
            let mut proto = self.attribute(value)?;
            proto.name = text(name);
            proto.doc_string = text(attributes.doc(name));
            Ok(proto)
        };
        attributes.iter().map(one).collect()
    }

    fn attribute(&mut self, attribute: &Attribute) -> Result<AttributeProto, OnnxError> {
        let mut proto = AttributeProto::default();
        let number = match attribute {
            Attribute::Int(v) => {
                proto.i = Some(*v);
                kind::INT
            }
            Attribute::Float(v) => {
                proto.f = Some(*v);
                kind::FLOAT
            }
            Attribute::String(v) => {
                proto.s = Some(v.clone());
                kind::STRING
            }
            Attribute::Ints(v) => {
                proto.ints = v.clone();
                kind::INTS
            }
            Attribute::Floats(v) => {
                proto.floats = v.clone();
                kind::FLOATS
            }
            Attribute::Strings(v) => {
                proto.strings = v.clone();
                kind::STRINGS
            }
            Attribute::Tensor(v) => {
                proto.t = Some(Box::new(write_tensor("", v)));
                kind::TENSOR
            }
            Attribute::Tensors(v) => {
                proto.tensors = v.iter().map(|t| write_tensor("", t)).collect();
                kind::TENSORS
            }
            Attribute::SparseTensor(v) => {
                proto.sparse_tensor = Some(Box::new(write_sparse("", v)));
                kind::SPARSE_TENSOR
            }
            Attribute::SparseTensors(v) => {
                proto.sparse_tensors = v.iter().map(|t| write_sparse("", t)).collect();
                kind::SPARSE_TENSORS
            }
            Attribute::Graph(v) => {
                proto.g = Some(Box::new(self.graph(v)?));
                kind::GRAPH
            }
            Attribute::Graphs(v) => {
                proto.graphs = v.iter().map(|g| self.graph(g)).collect::<Result<_, _>>()?;
                kind::GRAPHS
            }
            Attribute::Type(v) => {
                proto.tp = Some(Box::new(write_type(v, &Denotation::default()).unwrap_or_default()));
                kind::TYPE_PROTO
            }
            Attribute::Types(v) => {
                let types = v.iter().map(|t| write_type(t, &Denotation::default()).unwrap_or_default());
                proto.type_protos = types.collect();
                kind::TYPE_PROTOS
            }
            Attribute::Reference { name, kind } => {
                proto.ref_attr_name = text(name);
                *kind
            }
        };
        proto.r#type = Some(number);
        Ok(proto)
    }
}

/// A node that makes an initializer, for places where there can be none.
fn constant_node(tensor: &TensorProto) -> NodeProto {
    let attribute = AttributeProto {
        name: text("value"),
        r#type: Some(kind::TENSOR),
        t: Some(Box::new(TensorProto { name: None, ..tensor.clone() })),
        ..AttributeProto::default()
    };
    NodeProto {
        output: tensor.name.iter().cloned().collect(),
        op_type: text("Constant"),
        attribute: vec![attribute],
        ..NodeProto::default()
    }
}

fn value_info(graph: &Graph, id: ValueId) -> ValueInfoProto {
    let value = graph.value(id);
    ValueInfoProto {
        name: text(&value.name),
        r#type: write_type(&value.ty, &value.denotation).map(Box::new),
        doc_string: text(&value.doc),
        metadata_props: write_pairs(&value.metadata),
    }
}

/// Empty text is not written.
fn text(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|t| !t.is_empty())
}

fn write_pairs(pairs: &[(String, String)]) -> Vec<StringStringEntryProto> {
    pairs
        .iter()
        .map(|(key, value)| StringStringEntryProto { key: Some(key.clone()), value: Some(value.clone()) })
        .collect()
}

fn write_opsets(opsets: &BTreeMap<String, u32>) -> Vec<OperatorSetIdProto> {
    opsets
        .iter()
        .map(|(domain, version)| OperatorSetIdProto {
            domain: Some(domain.clone()),
            version: Some(i64::from(*version)),
        })
        .collect()
}
