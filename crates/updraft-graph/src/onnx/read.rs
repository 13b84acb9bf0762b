//! From a file's messages to a [`Model`].

use std::collections::{BTreeMap, HashMap};

use prost::Message;

use super::OnnxError;
use super::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TrainingInfoProto, ValueInfoProto, kind,
};
use super::tensors::{dense_len, densify, read_sparse, read_tensor};
use super::types::read_type;
use crate::attribute::{Attribute, Attributes};
use crate::graph::{Denotation, Graph, GraphError, Node, OPSET_MAX, QuantizationAnnotation, ValueId, ValueType};
use crate::model::{Function, Model, TrainingInfo};

/// Version of the file format from which initializers need not be inputs, and those that are have defaults.
pub(super) const IR_OPTIONAL_INITIALIZERS: i64 = 4;

/// The newest version of the file format that is read.
const IR_MAX: i64 = 14;

/// The oldest ONNX operator set that is read.
const OPSET_MIN: u32 = 7;

/// Memory that sparse initializers may take once dense: this, and as much again for each byte of the file. A density
/// below half a percent of 32-bit elements saves nothing that a graph here could use.
const DENSE_BYTES_FREE: usize = 16 << 20;
const DENSE_BYTES_PER_FILE_BYTE: usize = 256;

/// Fetches bytes of a file beside the model: its name as the model states it (relative, without `..`), the offset of
/// the first byte and the number of bytes. It should ask how long the file is before it makes room for them.
pub type Fetch<'a> = &'a dyn Fn(&str, u64, u64) -> Result<Vec<u8>, String>;

/// What a reader may do besides looking at the bytes.
#[derive(Clone, Copy, Default)]
pub struct ReadOptions<'a> {
    /// Where tensors outside the file come from; without it, a file that has any is refused.
    pub external: Option<Fetch<'a>>,
}

/// The model in a file's bytes.
///
/// # Errors
/// Everything that has no meaning, named by graph, node, field or tensor. Shapes that contradict one another and
/// operators that do not exist are not looked for: that is the checker's work.
pub fn read(bytes: &[u8], options: &ReadOptions) -> Result<Model, OnnxError> {
    let proto = ModelProto::decode(bytes)?;
    let dense_bytes_left = DENSE_BYTES_FREE.saturating_add(bytes.len().saturating_mul(DENSE_BYTES_PER_FILE_BYTE));
    Reader { options, dense_bytes_left }.model(proto)
}

struct Reader<'a> {
    options: &'a ReadOptions<'a>,
    /// What sparse initializers may still take.
    dense_bytes_left: usize,
}

/// The graphs around a subgraph, innermost first.
struct Scope<'a> {
    graph: &'a Graph,
    parent: Option<&'a Scope<'a>>,
    /// Whether names may come from elsewhere still.
    is_open: bool,
}

impl Scope<'_> {
    /// The type of a value in sight.
    fn find(&self, name: &str) -> Option<ValueType> {
        if let Some(id) = self.graph.find(name) {
            return Some(self.graph.value(id).ty.clone());
        }
        match self.parent {
            Some(parent) => parent.find(name),
            None => self.is_open.then_some(ValueType::Unknown),
        }
    }
}

/// What a file says of one value.
#[derive(Default)]
struct Info {
    ty: ValueType,
    denotation: Denotation,
    doc: String,
    metadata: Vec<(String, String)>,
}

impl Reader<'_> {
    fn model(&mut self, proto: ModelProto) -> Result<Model, OnnxError> {
        let missing = |what| OnnxError::Missing { place: "the model".to_owned(), what };
        let ir_version = proto.ir_version.ok_or(missing("ir_version"))?;
        if !(1..=IR_MAX).contains(&ir_version) {
            return Err(OnnxError::IrVersion { found: ir_version, expected_max: IR_MAX });
        }
        if proto.opset_import.is_empty() {
            return Err(missing("opset_import"));
        }
        let opsets = read_opsets(proto.opset_import)?;
        let graph = *proto.graph.ok_or(missing("graph"))?;
        let place = format!("graph {:?}", graph.name());
        let mut graph = self.graph(graph, &place, &opsets, None)?;
        if ir_version < IR_OPTIONAL_INITIALIZERS {
            let inputs = graph.inputs().iter().copied().filter(|v| graph.value(*v).constant().is_none()).collect();
            graph.set_inputs(inputs);
            graph.sort().map_err(|source| OnnxError::Graph { place: place.clone(), source })?;
        }
        let training: Result<_, _> =
            proto.training_info.into_iter().map(|t| self.training(t, &graph, &opsets)).collect();
        Ok(Model {
            training: training?,
            graph,
            ir_version,
            producer_name: proto.producer_name.unwrap_or_default(),
            producer_version: proto.producer_version.unwrap_or_default(),
            domain: proto.domain.unwrap_or_default(),
            model_version: proto.model_version.unwrap_or(0),
            doc: proto.doc_string.unwrap_or_default(),
            metadata: read_pairs(proto.metadata_props),
            functions: proto.functions.into_iter().map(|f| self.function(f, &opsets)).collect::<Result<_, _>>()?,
            device_configurations: proto.configuration,
        })
    }

    fn training(
        &mut self,
        proto: TrainingInfoProto,
        main: &Graph,
        opsets: &BTreeMap<String, u32>,
    ) -> Result<TrainingInfo, OnnxError> {
        let scope = Scope { graph: main, parent: None, is_open: true };
        let mut read = |graph: Option<Box<GraphProto>>| -> Result<Option<Graph>, OnnxError> {
            let Some(graph) = graph else { return Ok(None) };
            let place = format!("training graph {:?}", graph.name());
            Ok(Some(self.graph(*graph, &place, opsets, Some(&scope))?))
        };
        Ok(TrainingInfo {
            initialization: read(proto.initialization)?,
            algorithm: read(proto.algorithm)?,
            initialization_binding: read_pairs(proto.initialization_binding),
            update_binding: read_pairs(proto.update_binding),
        })
    }

    /// A function's body is a graph whose inputs and outputs have names only.
    fn function(&mut self, proto: FunctionProto, around: &BTreeMap<String, u32>) -> Result<Function, OnnxError> {
        let name = proto.name.clone().unwrap_or_default();
        let place = format!("function {name:?}");
        if name.is_empty() {
            return Err(OnnxError::Missing { place: "a function".to_owned(), what: "name" });
        }
        let opsets = if proto.opset_import.is_empty() { around.clone() } else { read_opsets(proto.opset_import)? };
        let named = |name: String| ValueInfoProto { name: Some(name), ..ValueInfoProto::default() };
        let mut infos: HashMap<Option<String>, ValueInfoProto> =
            proto.value_info.iter().map(|info| (info.name.clone(), info.clone())).collect();
        let input =
            proto.input.into_iter().map(|name| infos.remove(&Some(name.clone())).unwrap_or(named(name))).collect();
        let body = GraphProto {
            name: proto.name,
            doc_string: proto.doc_string,
            input,
            output: proto.output.into_iter().map(named).collect(),
            node: proto.node,
            value_info: proto.value_info,
            metadata_props: proto.metadata_props,
            ..GraphProto::default()
        };
        let body = self.graph(body, &place, &opsets, None)?;
        // Defaults are constants: nothing is in their sight.
        let nothing = Graph::new("");
        let scope = Scope { graph: &nothing, parent: None, is_open: false };
        let default_attributes = self.attributes(proto.attribute_proto, &place, &opsets, &scope)?;
        Ok(Function {
            domain: proto.domain.unwrap_or_default(),
            overload: proto.overload.unwrap_or_default(),
            body,
            required_attributes: proto.attribute,
            default_attributes,
        })
    }

    fn graph(
        &mut self,
        proto: GraphProto,
        place: &str,
        opsets: &BTreeMap<String, u32>,
        outer: Option<&Scope>,
    ) -> Result<Graph, OnnxError> {
        let refuse = |source: GraphError| OnnxError::Graph { place: place.to_owned(), source };
        let missing = |what| OnnxError::Missing { place: place.to_owned(), what };
        let mut graph = Graph::new(proto.name());
        graph.doc = proto.doc_string.unwrap_or_default();
        graph.metadata = read_pairs(proto.metadata_props);
        graph.opsets = opsets.clone();
        graph.quantization = proto
            .quantization_annotation
            .into_iter()
            .map(|a| QuantizationAnnotation {
                tensor: a.tensor_name.unwrap_or_default(),
                parameters: read_pairs(a.quant_parameter_tensor_names),
            })
            .collect();

        for info in proto.input {
            let (name, info) = read_info(info, place)?;
            let id = graph.add_input(&name, info.ty).map_err(refuse)?;
            graph.set_denotation(id, info.denotation);
            graph.set_value_notes(id, info.doc, info.metadata);
        }
        let input_count = graph.value_count();

        // What the file says of a value goes to it when the value turns up; of a graph's output, its entry there counts.
        let mut infos: HashMap<String, Info> = HashMap::new();
        let mut outputs = Vec::with_capacity(proto.output.len());
        for info in proto.value_info {
            let (name, info) = read_info(info, place)?;
            infos.insert(name, info);
        }
        for info in proto.output {
            let (name, info) = read_info(info, place)?;
            outputs.push(name.clone());
            if info.ty != ValueType::Unknown || !infos.contains_key(&name) {
                infos.insert(name, info);
            }
        }

        for mut tensor in proto.initializer {
            let name = tensor.name.clone().filter(|n| !n.is_empty()).ok_or(missing("name of an initializer"))?;
            let notes =
                (tensor.doc_string.take().unwrap_or_default(), read_pairs(std::mem::take(&mut tensor.metadata_props)));
            let tensor = read_tensor(tensor, place, self.options)?;
            let id = initializer(&mut graph, &name, input_count).map_err(refuse)?;
            let declared = graph.value(id).ty.clone();
            graph.set_constant(id, Some(tensor));
            if id.index() < input_count {
                // The tensor is only a default: other tensors of the declared type may come.
                graph.set_type(id, declared);
            }
            note_initializer(&mut graph, id, infos.remove(&name), notes);
        }
        for mut sparse in proto.sparse_initializer {
            let values = sparse.values.as_mut().ok_or(missing("values of a sparse initializer"))?;
            let name = values.name.clone().filter(|n| !n.is_empty()).ok_or(missing("name of a sparse initializer"))?;
            let notes =
                (values.doc_string.take().unwrap_or_default(), read_pairs(std::mem::take(&mut values.metadata_props)));
            let sparse = read_sparse(sparse, place, self.options)?;
            let refuse_tensor = |problem| OnnxError::Tensor { place: place.to_owned(), tensor: name.clone(), problem };
            let room = dense_len(&sparse).and_then(|len| self.dense_bytes_left.checked_sub(len));
            self.dense_bytes_left = room.ok_or_else(|| {
                refuse_tensor(format!(
                    "shape {:?} holds too little beside zeros: all elements would take more than the {} bytes left",
                    sparse.shape, self.dense_bytes_left
                ))
            })?;
            let tensor = densify(&sparse).map_err(refuse_tensor)?;
            let id = initializer(&mut graph, &name, input_count).map_err(refuse)?;
            graph.set_constant(id, Some(tensor));
            graph.set_sparse(id, true);
            note_initializer(&mut graph, id, infos.remove(&name), notes);
        }

        for node in &proto.node {
            for name in node.output.iter().filter(|n| !n.is_empty()) {
                let info = infos.remove(name).unwrap_or_default();
                let id = graph.add_value(name, info.ty).map_err(refuse)?;
                graph.set_denotation(id, info.denotation);
                graph.set_value_notes(id, info.doc, info.metadata);
            }
        }
        for node in proto.node {
            self.node(node, &mut graph, place, opsets, outer)?;
        }
        for name in outputs {
            let id = find_or_capture(&mut graph, &name, outer)
                .ok_or_else(|| undefined(place, "the list of outputs", &name))?;
            graph.push_output(id);
        }
        graph.sort().map_err(refuse)?;
        Ok(graph)
    }

    fn node(
        &mut self,
        proto: NodeProto,
        graph: &mut Graph,
        place: &str,
        opsets: &BTreeMap<String, u32>,
        outer: Option<&Scope>,
    ) -> Result<(), OnnxError> {
        let label = node_label(&proto);
        let op = proto
            .op_type
            .filter(|op| !op.is_empty())
            .ok_or_else(|| OnnxError::Missing { place: format!("{place}: {label}"), what: "op_type" })?;
        let mut inputs = Vec::with_capacity(proto.input.len());
        for name in &proto.input {
            inputs.push(match name.as_str() {
                "" => None,
                name => Some(find_or_capture(graph, name, outer).ok_or_else(|| undefined(place, &label, name))?),
            });
        }
        let outputs = proto.output.iter().map(|name| graph.find(name).filter(|_| !name.is_empty())).collect();
        let attributes = {
            let scope = Scope { graph, parent: outer, is_open: false };
            self.attributes(proto.attribute, &format!("{place}: {label}"), opsets, &scope)?
        };
        for name in captured_names(&attributes) {
            find_or_capture(graph, &name, outer).ok_or_else(|| undefined(place, &label, &name))?;
        }
        let node = Node {
            name: proto.name.unwrap_or_default(),
            domain: proto.domain.unwrap_or_default(),
            op,
            overload: proto.overload.unwrap_or_default(),
            inputs,
            outputs,
            attributes,
            doc: proto.doc_string.unwrap_or_default(),
            metadata: read_pairs(proto.metadata_props),
            device_configurations: proto.device_configurations,
        };
        graph.add_node(node).map_err(|source| OnnxError::Graph { place: place.to_owned(), source })?;
        Ok(())
    }

    fn attributes(
        &mut self,
        protos: Vec<AttributeProto>,
        place: &str,
        opsets: &BTreeMap<String, u32>,
        scope: &Scope,
    ) -> Result<Attributes, OnnxError> {
        let mut attributes = Attributes::new();
        for mut proto in protos {
            let name = proto
                .name
                .take()
                .filter(|n| !n.is_empty())
                .ok_or_else(|| OnnxError::Missing { place: place.to_owned(), what: "name of an attribute" })?;
            if attributes.get(&name).is_some() {
                return Err(OnnxError::Attribute {
                    place: place.to_owned(),
                    attribute: name,
                    problem: "is given twice".to_owned(),
                });
            }
            let doc = proto.doc_string.take().unwrap_or_default();
            let value = self.attribute(proto, &name, place, opsets, scope)?;
            attributes.set(&name, value);
            attributes.set_doc(&name, &doc);
        }
        Ok(attributes)
    }

    fn attribute(
        &mut self,
        proto: AttributeProto,
        name: &str,
        place: &str,
        opsets: &BTreeMap<String, u32>,
        scope: &Scope,
    ) -> Result<Attribute, OnnxError> {
        let refuse =
            |problem: String| OnnxError::Attribute { place: place.to_owned(), attribute: name.to_owned(), problem };
        let number = match proto.r#type.unwrap_or(0) {
            0 => guess_kind(&proto).map_err(refuse)?,
            number => number,
        };
        if let Some(reference) = proto.ref_attr_name.filter(|r| !r.is_empty()) {
            return Ok(Attribute::Reference { name: reference, kind: number });
        }
        let inner = format!("{place}: attribute {name:?}");
        let absent = || refuse("has no value of its kind".to_owned());
        let read_type = |t| Ok(read_type(t).map_err(|p| refuse(format!("is no type: {p}")))?.0);
        Ok(match number {
            // A writer of protobuf's third version leaves out zeros and empty strings.
            kind::FLOAT => Attribute::Float(proto.f.unwrap_or(0.0)),
            kind::INT => Attribute::Int(proto.i.unwrap_or(0)),
            kind::STRING => Attribute::String(proto.s.unwrap_or_default()),
            kind::FLOATS => Attribute::Floats(proto.floats),
            kind::INTS => Attribute::Ints(proto.ints),
            kind::STRINGS => Attribute::Strings(proto.strings),
            kind::TENSOR => Attribute::Tensor(read_tensor(*proto.t.ok_or_else(absent)?, &inner, self.options)?),
            kind::TENSORS => {
                let tensors = proto.tensors.into_iter().map(|t| read_tensor(t, &inner, self.options));
                Attribute::Tensors(tensors.collect::<Result<_, _>>()?)
            }
            kind::SPARSE_TENSOR => {
                Attribute::SparseTensor(read_sparse(*proto.sparse_tensor.ok_or_else(absent)?, &inner, self.options)?)
            }
            kind::SPARSE_TENSORS => {
                let tensors = proto.sparse_tensors.into_iter().map(|t| read_sparse(t, &inner, self.options));
                Attribute::SparseTensors(tensors.collect::<Result<_, _>>()?)
            }
            kind::GRAPH => {
                let graph = *proto.g.ok_or_else(absent)?;
                Attribute::Graph(Box::new(self.graph(graph, &inner, opsets, Some(scope))?))
            }
            kind::GRAPHS => {
                let graphs = proto.graphs.into_iter().map(|g| self.graph(g, &inner, opsets, Some(scope)));
                Attribute::Graphs(graphs.collect::<Result<_, _>>()?)
            }
            kind::TYPE_PROTO => Attribute::Type(read_type(*proto.tp.ok_or_else(absent)?)?),
            kind::TYPE_PROTOS => {
                Attribute::Types(proto.type_protos.into_iter().map(read_type).collect::<Result<_, OnnxError>>()?)
            }
            other => return Err(refuse(format!("is of kind {other}, expected 1 to 14"))),
        })
    }
}

/// The kind of an attribute that does not state it: that of the one field which is set.
fn guess_kind(proto: &AttributeProto) -> Result<i32, String> {
    let set = [
        (kind::FLOAT, proto.f.is_some()),
        (kind::INT, proto.i.is_some()),
        (kind::STRING, proto.s.is_some()),
        (kind::TENSOR, proto.t.is_some()),
        (kind::GRAPH, proto.g.is_some()),
        (kind::SPARSE_TENSOR, proto.sparse_tensor.is_some()),
        (kind::TYPE_PROTO, proto.tp.is_some()),
        (kind::FLOATS, !proto.floats.is_empty()),
        (kind::INTS, !proto.ints.is_empty()),
        (kind::STRINGS, !proto.strings.is_empty()),
        (kind::TENSORS, !proto.tensors.is_empty()),
        (kind::GRAPHS, !proto.graphs.is_empty()),
        (kind::SPARSE_TENSORS, !proto.sparse_tensors.is_empty()),
        (kind::TYPE_PROTOS, !proto.type_protos.is_empty()),
    ];
    let kinds: Vec<i32> = set.into_iter().filter(|(_, is_set)| *is_set).map(|(kind, _)| kind).collect();
    match kinds.as_slice() {
        [one] => Ok(*one),
        [] => Err("states neither kind nor value".to_owned()),
        _ => Err("has values of several kinds and does not state which counts".to_owned()),
    }
}

/// The value of an initializer: a new one, or the input of that name, whose default it becomes.
fn initializer(graph: &mut Graph, name: &str, input_count: usize) -> Result<ValueId, GraphError> {
    match graph.find(name).filter(|id| id.index() < input_count && graph.value(*id).constant().is_none()) {
        Some(id) => Ok(id),
        None => graph.add_value(name, ValueType::Unknown),
    }
}

/// An initializer's notes stand in its own message or in the one that declares its type; the latter goes first.
fn note_initializer(graph: &mut Graph, id: ValueId, info: Option<Info>, own: (String, Vec<(String, String)>)) {
    let value = graph.value(id);
    let first = |list: [&str; 3]| list.into_iter().find(|d| !d.is_empty()).unwrap_or_default().to_owned();
    let info = info.unwrap_or_default();
    let doc = first([&value.doc, &info.doc, &own.0]);
    let metadata = [value.metadata.clone(), info.metadata, own.1].into_iter().find(|m| !m.is_empty());
    graph.set_value_notes(id, doc, metadata.unwrap_or_default());
}

/// The value of this name in the graph, or a new outer value if a graph around it has one.
fn find_or_capture(graph: &mut Graph, name: &str, outer: Option<&Scope>) -> Option<ValueId> {
    if let Some(id) = graph.find(name) {
        return Some(id);
    }
    let ty = outer?.find(name)?;
    graph.add_outer(name, ty).ok()
}

/// Names that the subgraphs among attributes read from outside, in order of appearance.
fn captured_names(attributes: &Attributes) -> Vec<String> {
    let graphs = attributes.iter().flat_map(|(_, attribute)| match attribute {
        Attribute::Graph(graph) => std::slice::from_ref(&**graph),
        Attribute::Graphs(graphs) => graphs,
        _ => &[],
    });
    graphs.flat_map(Graph::values).filter(|(_, v)| v.is_outer()).map(|(_, v)| v.name.clone()).collect()
}

fn undefined(place: &str, reader: &str, name: &str) -> OnnxError {
    OnnxError::Undefined { place: place.to_owned(), reader: reader.to_owned(), name: name.to_owned() }
}

/// How messages call a node that is not in a graph yet.
fn node_label(proto: &NodeProto) -> String {
    let op = proto.op_type();
    match (proto.name(), proto.output.first()) {
        ("", Some(output)) => format!("node {op} -> {output}"),
        ("", None) => format!("node {op}"),
        (name, _) => format!("node {name} ({op})"),
    }
}

fn read_info(proto: ValueInfoProto, place: &str) -> Result<(String, Info), OnnxError> {
    let name = proto.name.filter(|n| !n.is_empty()).ok_or_else(|| OnnxError::Missing {
        place: place.to_owned(),
        what: "name of an input, output or value_info",
    })?;
    let (ty, denotation) = proto
        .r#type
        .map_or(Ok(Default::default()), |ty| read_type(*ty))
        .map_err(|problem| OnnxError::Type { place: place.to_owned(), value: name.clone(), problem })?;
    let info =
        Info { ty, denotation, doc: proto.doc_string.unwrap_or_default(), metadata: read_pairs(proto.metadata_props) };
    Ok((name, info))
}

fn read_pairs(protos: Vec<StringStringEntryProto>) -> Vec<(String, String)> {
    protos.into_iter().map(|p| (p.key.unwrap_or_default(), p.value.unwrap_or_default())).collect()
}

fn read_opsets(protos: Vec<OperatorSetIdProto>) -> Result<BTreeMap<String, u32>, OnnxError> {
    let mut opsets = BTreeMap::new();
    for proto in protos {
        let domain = proto.domain.unwrap_or_default();
        let found = proto.version.unwrap_or(0);
        let is_onnx = domain.is_empty() || domain == "ai.onnx";
        let range = if is_onnx { OPSET_MIN..=OPSET_MAX } else { 1..=u32::MAX };
        let refuse = |expected| OnnxError::Opset { domain: domain.clone(), found, expected };
        let version = u32::try_from(found)
            .ok()
            .filter(|v| range.contains(v))
            .ok_or_else(|| refuse(format!("{} to {}", range.start(), range.end())))?;
        // Some writers name ONNX's set twice, by its empty and its full name.
        let key = if is_onnx { String::new() } else { domain.clone() };
        if let Some(other) = opsets.insert(key, version).filter(|other| *other != version) {
            return Err(refuse(format!("one version, but {other} is stated too")));
        }
    }
    Ok(opsets)
}
