//! From graphs to text.

use std::collections::BTreeMap;

use super::element::{show_all, show_bytes, show_float_attribute};
use super::{INLINE_ELEMENTS_MAX, is_bare, tensor_key};
use crate::attribute::{Attribute, Attributes, SparseTensor};
use crate::dim::Dim;
use crate::graph::{Graph, Node, TensorType, ValueId, ValueType};
use crate::model::Model;
use crate::tensor::Tensor;

/// The text of a graph. One whose nodes form a cycle is printed in storage order.
pub fn print(graph: &Graph) -> String {
    let mut out = String::new();
    print_graph(&sorted(graph), None, 0, &mut out);
    out.push('\n');
    out
}

/// The texts of a model's functions and of its graph.
pub fn print_model(model: &Model) -> String {
    let mut out = String::new();
    for function in &model.functions {
        let mut attributes: Vec<String> = function.required_attributes.iter().map(|name| show_name(name)).collect();
        attributes.extend(
            function
                .default_attributes
                .iter()
                .map(|(name, value)| format!("{} = {}", show_name(name), show_attribute(value, None, 0))),
        );
        out.push_str(&format!("function {}", show_operator(&function.domain, &function.body.name, &function.overload)));
        if !attributes.is_empty() {
            out.push_str(&format!("<{}>", attributes.join(", ")));
        }
        out.push_str(" = ");
        print_graph(&sorted(&function.body), None, 0, &mut out);
        out.push_str("\n\n");
    }
    out.push_str(&print(&model.graph));
    out
}

fn sorted(graph: &Graph) -> Graph {
    let mut sorted = graph.clone();
    // A cycle leaves the graph as it is, which can be printed too.
    let _ = sorted.sort();
    sorted
}

/// `around` are the operator sets of the graph around this one, which need no repeating.
fn print_graph(graph: &Graph, around: Option<&BTreeMap<String, u32>>, depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth + 1);
    out.push_str("graph ");
    out.push_str(&show_name(&graph.name));
    if around.unwrap_or(&BTreeMap::new()) != &graph.opsets {
        out.push_str(" opset ");
        let sets: Vec<String> = graph
            .opsets
            .iter()
            .map(|(domain, version)| match domain.as_str() {
                "" => version.to_string(),
                // Bare, this would read as a version or as the lack of one.
                domain if domain == "none" || domain.parse::<u32>().is_ok() => format!("{domain:?} {version}"),
                domain => format!("{} {version}", show_name(domain)),
            })
            .collect();
        out.push_str(&if sets.is_empty() { "none".to_owned() } else { sets.join(", ") });
    }
    out.push_str(" {\n");
    let mut line = |text: String| {
        out.push_str(&indent);
        out.push_str(&text);
        out.push('\n');
    };
    for id in graph.inputs() {
        let default = graph.value(*id).constant().map(|t| format!(" = {}", show_tensor(t)));
        line(format!("input {}{}", show_typed(graph, *id), default.unwrap_or_default()));
    }
    for (id, value) in graph.values().filter(|(id, _)| !graph.inputs().contains(id)) {
        if let Some(tensor) = value.constant() {
            let sparse = if value.is_sparse() { "sparse " } else { "" };
            line(format!("{sparse}const {} = {}", show_name(&value.name), show_tensor(tensor)));
        } else if value.is_outer() {
            line(format!("outer {}", show_typed(graph, id)));
        } else if value.producer().is_none() {
            line(format!("undefined {}", show_typed(graph, id)));
        }
    }
    for (_, node) in graph.nodes() {
        line(show_node(graph, node, depth + 1));
    }
    for id in graph.outputs() {
        line(format!("output {}", show_name(&graph.value(*id).name)));
    }
    out.push_str(&"  ".repeat(depth));
    out.push('}');
}

fn show_node(graph: &Graph, node: &Node, depth: usize) -> String {
    let outputs: Vec<String> =
        node.outputs.iter().map(|v| v.map_or("_".to_owned(), |v| show_typed(graph, v))).collect();
    let inputs: Vec<String> =
        node.inputs.iter().map(|v| v.map_or("_".to_owned(), |v| show_name(&graph.value(v).name))).collect();
    let equals = if outputs.is_empty() { "= " } else { " = " };
    let name = if node.name.is_empty() { String::new() } else { format!(" @ {}", show_name(&node.name)) };
    format!(
        "{}{equals}{}{}({}){name}",
        outputs.join(", "),
        show_operator(&node.domain, &node.op, &node.overload),
        show_attributes(&node.attributes, &graph.opsets, depth),
        inputs.join(", ")
    )
}

fn show_operator(domain: &str, op: &str, overload: &str) -> String {
    let domain = if domain.is_empty() { String::new() } else { format!("{}::", show_name(domain)) };
    let overload = if overload.is_empty() { String::new() } else { format!(":{}", show_name(overload)) };
    format!("{domain}{}{overload}", show_name(op))
}

fn show_attributes(attributes: &Attributes, opsets: &BTreeMap<String, u32>, depth: usize) -> String {
    if attributes.is_empty() {
        return String::new();
    }
    let pairs: Vec<String> = attributes
        .iter()
        .map(|(name, value)| format!("{} = {}", show_name(name), show_attribute(value, Some(opsets), depth)))
        .collect();
    format!("<{}>", pairs.join(", "))
}

fn show_attribute(attribute: &Attribute, opsets: Option<&BTreeMap<String, u32>>, depth: usize) -> String {
    let show_graph = |graph: &Graph| {
        let mut text = String::new();
        print_graph(graph, opsets, depth, &mut text);
        text
    };
    // An empty list does not show what it is a list of, and the long kinds show it better first.
    fn list<T>(kind: &str, items: &[T], show: impl Fn(&T) -> String) -> String {
        let shown: Vec<String> = items.iter().map(show).collect();
        let kind = if items.is_empty() || !matches!(kind, "ints" | "floats" | "strings") { kind } else { "" };
        let gap = if kind.is_empty() { "" } else { " " };
        format!("{kind}{gap}[{}]", shown.join(", "))
    }
    match attribute {
        Attribute::Int(v) => v.to_string(),
        Attribute::Float(v) => show_float_attribute(*v),
        Attribute::String(v) => show_bytes(v),
        Attribute::Tensor(v) => show_tensor(v),
        Attribute::SparseTensor(v) => format!("sparse{}", show_sparse(v)),
        Attribute::Graph(v) => show_graph(v),
        Attribute::Type(v) => format!("type {}", show_type(v)),
        Attribute::Ints(v) => list("ints", v, i64::to_string),
        Attribute::Floats(v) => list("floats", v, |v| show_float_attribute(*v)),
        Attribute::Strings(v) => list("strings", v, |v| show_bytes(v)),
        Attribute::Tensors(v) => list("tensors", v, show_tensor),
        Attribute::SparseTensors(v) => list("sparse_tensors", v, show_sparse),
        Attribute::Graphs(v) => list("graphs", v, |g| show_graph(g)),
        Attribute::Types(v) => list("types", v, show_type),
        Attribute::Reference { name, kind } => format!("ref({}, {kind})", show_name(name)),
    }
}

fn show_sparse(sparse: &SparseTensor) -> String {
    format!("({:?}, {}, {})", sparse.shape, show_tensor(&sparse.values), show_tensor(&sparse.indices))
}

fn show_tensor(tensor: &Tensor) -> String {
    let head = format!("{}{:?}", tensor.dtype(), tensor.shape());
    if tensor.len() > INLINE_ELEMENTS_MAX {
        return format!("{head} #{}", tensor_key(tensor));
    }
    format!("{head} {{{}}}", show_all(tensor).join(", "))
}

fn show_typed(graph: &Graph, id: ValueId) -> String {
    let value = graph.value(id);
    match &value.ty {
        ValueType::Unknown => show_name(&value.name),
        ty => format!("{}: {}", show_name(&value.name), show_type(ty)),
    }
}

pub(crate) fn show_type(ty: &ValueType) -> String {
    match ty {
        ValueType::Unknown => "unknown".to_owned(),
        ValueType::Tensor(t) => show_tensor_type(t),
        ValueType::Sparse(t) => format!("sparse({})", show_tensor_type(t)),
        ValueType::Sequence(t) => format!("sequence({})", show_type(t)),
        ValueType::Optional(t) => format!("optional({})", show_type(t)),
        ValueType::Map(key, t) => format!("map({key}, {})", show_type(t)),
        ValueType::Opaque { domain, name } => format!("opaque({}, {})", show_name(domain), show_name(name)),
    }
}

fn show_tensor_type(ty: &TensorType) -> String {
    let dtype = ty.dtype.map_or("?", |d| d.name());
    match &ty.shape {
        None => format!("{dtype}[*]"),
        Some(dims) => {
            let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
            format!("{dtype}[{}]", dims.join(", "))
        }
    }
}

fn show_name(name: &str) -> String {
    if is_bare(name) { name.to_owned() } else { format!("{name:?}") }
}
