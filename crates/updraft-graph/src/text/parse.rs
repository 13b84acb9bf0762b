//! From text to graphs, by recursive descent.

use std::collections::BTreeMap;

use super::element::{part_of, read_byte_string, read_part};
use super::{DEPTH_MAX, is_bare};
use crate::attribute::{Attribute, Attributes, SparseTensor};
use crate::dim::{Dim, parse_prefix, unquote};
use crate::dtype::DType;
use crate::graph::{Graph, Node, TensorType, ValueId, ValueType};
use crate::tensor::{Tensor, element_count};

/// Text that is not a graph, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: expected {expected}")]
pub struct TextError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What would have been accepted there.
    pub expected: String,
}

/// The graph of a text in which all tensors are small.
///
/// ```
/// let text = "graph g opset 21 {\n  input x: f32[N]\n  y: f32[N] = Relu(x)\n  output y\n}\n";
/// let graph = updraft_graph::text::parse(text)?;
/// assert_eq!(updraft_graph::text::print(&graph), text);
/// # Ok::<(), updraft_graph::text::TextError>(())
/// ```
pub fn parse(text: &str) -> Result<Graph, TextError> {
    parse_with(text, &|_| None)
}

/// The graph of a text, with large tensors from `tensors` by their [key](super::tensor_key).
pub fn parse_with(text: &str, tensors: &dyn Fn(&str) -> Option<Tensor>) -> Result<Graph, TextError> {
    let mut parser = Parser { text, position: 0, tensors };
    let parsed = parser.graph(None, 0).and_then(|graph| {
        parser.skip_blanks();
        if parser.rest().is_empty() { Ok(graph) } else { Err(parser.expected("the end of the text")) }
    });
    parsed.map_err(|Expected { position, expected }| {
        let before = &text[..position];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        TextError { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1, expected }
    })
}

/// An error by its place in bytes.
struct Expected {
    position: usize,
    expected: String,
}

struct Parser<'a> {
    text: &'a str,
    position: usize,
    tensors: &'a dyn Fn(&str) -> Option<Tensor>,
}

/// A node whose inputs are still names.
struct PendingNode {
    node: Node,
    inputs: Vec<Option<(String, usize)>>,
    position: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.position..]
    }

    fn skip_blanks(&mut self) {
        self.position += self.rest().len() - self.rest().trim_start().len();
    }

    fn expected(&self, expected: impl Into<String>) -> Expected {
        Expected { position: self.position, expected: expected.into() }
    }

    /// Takes a mark, blanks before it included.
    fn take(&mut self, mark: &str) -> bool {
        self.skip_blanks();
        let found = self.rest().starts_with(mark);
        if found {
            self.position += mark.len();
        }
        found
    }

    fn expect(&mut self, mark: &str) -> Result<(), Expected> {
        if self.take(mark) { Ok(()) } else { Err(self.expected(format!("`{mark}`"))) }
    }

    /// The bare word that follows, which may be empty, without taking it.
    fn peek_word(&mut self) -> &'a str {
        self.skip_blanks();
        let rest = self.rest();
        let is_end = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '/'));
        &rest[..rest.find(is_end).unwrap_or(rest.len())]
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = self.peek_word() == word;
        if found {
            self.position += word.len();
        }
        found
    }

    /// A name, bare or quoted.
    fn name(&mut self, what: &str) -> Result<String, Expected> {
        let word = self.peek_word();
        if is_bare(word) {
            self.position += word.len();
            return Ok(word.to_owned());
        }
        let (name, length) = unquote(self.rest()).ok_or_else(|| self.expected(what))?;
        self.position += length;
        Ok(name)
    }

    /// Items between two marks, with commas.
    fn list<T>(
        &mut self,
        open: &str,
        close: &str,
        mut item: impl FnMut(&mut Self) -> Result<T, Expected>,
    ) -> Result<Vec<T>, Expected> {
        self.expect(open)?;
        let mut items = Vec::new();
        if self.take(close) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if self.take(close) {
                return Ok(items);
            }
            if !self.take(",") {
                return Err(self.expected(format!("`,` or `{close}`")));
            }
        }
    }

    fn graph(&mut self, around: Option<&BTreeMap<String, u32>>, depth: usize) -> Result<Graph, Expected> {
        if depth > DEPTH_MAX {
            return Err(self.expected(format!("at most {DEPTH_MAX} graphs within graphs")));
        }
        if !self.take_word("graph") {
            return Err(self.expected("`graph`"));
        }
        let mut graph = Graph::default();
        graph.name = self.name("the graph's name")?;
        graph.opsets = self.opsets(around)?;
        self.expect("{")?;
        let (mut nodes, mut outputs) = (Vec::new(), Vec::new());
        loop {
            if self.take("}") {
                break;
            }
            let word = self.peek_word();
            match word {
                "output" => {
                    self.take_word(word);
                    self.skip_blanks();
                    let position = self.position;
                    outputs.push((self.name("the name of an output")?, position));
                }
                "input" | "outer" | "undefined" => {
                    self.take_word(word);
                    let id = self.typed_value(&mut graph, depth)?;
                    match word {
                        "input" => {
                            graph.push_input(id);
                            if self.take("=") {
                                let declared = graph.value(id).ty.clone();
                                let tensor = self.tensor()?;
                                graph.set_constant(id, Some(tensor));
                                graph.set_type(id, declared);
                            }
                        }
                        "outer" => graph.set_outer(id),
                        _ => {}
                    }
                }
                "const" | "sparse" => {
                    self.take_word(word);
                    if word == "sparse" && !self.take_word("const") {
                        return Err(self.expected("`const`"));
                    }
                    let id = self.new_value(&mut graph)?;
                    self.expect("=")?;
                    let tensor = self.tensor()?;
                    graph.set_constant(id, Some(tensor));
                    graph.set_sparse(id, word == "sparse");
                }
                _ if word.is_empty() && !self.rest().starts_with(['"', '=']) => {
                    return Err(self.expected("a line of the graph, or `}`"));
                }
                _ => nodes.push(self.node(&mut graph, depth)?),
            }
        }
        for PendingNode { mut node, inputs, position } in nodes {
            for input in inputs {
                node.inputs.push(match input {
                    None => None,
                    Some((name, position)) => Some(self.find(&graph, &name, position)?),
                });
            }
            graph.add_node(node).map_err(|e| Expected { position, expected: format!("another output: {e}") })?;
        }
        for (name, position) in outputs {
            let id = self.find(&graph, &name, position)?;
            graph.push_output(id);
        }
        // A cycle is the checker's to report.
        let _ = graph.sort();
        Ok(graph)
    }

    fn find(&self, graph: &Graph, name: &str, position: usize) -> Result<ValueId, Expected> {
        graph.find(name).ok_or_else(|| Expected {
            position,
            expected: format!("the name of a value; no line of the graph makes {name:?}"),
        })
    }

    fn opsets(&mut self, around: Option<&BTreeMap<String, u32>>) -> Result<BTreeMap<String, u32>, Expected> {
        let mut opsets = BTreeMap::new();
        if !self.take_word("opset") {
            return Ok(around.cloned().unwrap_or_default());
        }
        if self.take_word("none") {
            return Ok(opsets);
        }
        loop {
            let word = self.peek_word();
            let domain = match word.parse::<u32>() {
                Ok(_) => String::new(),
                Err(_) => self.name("a version, or a domain and its version")?,
            };
            let word = self.peek_word();
            let version = word.parse().map_err(|_| self.expected("the version of an operator set"))?;
            self.position += word.len();
            opsets.insert(domain, version);
            if !self.take(",") {
                return Ok(opsets);
            }
        }
    }

    fn new_value(&mut self, graph: &mut Graph) -> Result<ValueId, Expected> {
        self.skip_blanks();
        let position = self.position;
        let name = self.name("the name of a value")?;
        graph
            .add_value(&name, ValueType::Unknown)
            .map_err(|e| Expected { position, expected: format!("a new name: {e}") })
    }

    fn typed_value(&mut self, graph: &mut Graph, depth: usize) -> Result<ValueId, Expected> {
        let id = self.new_value(graph)?;
        if self.take(":") {
            let ty = self.value_type(depth)?;
            graph.set_type(id, ty);
        }
        Ok(id)
    }

    fn node(&mut self, graph: &mut Graph, depth: usize) -> Result<PendingNode, Expected> {
        let mut node = Node::default();
        self.skip_blanks();
        let position = self.position;
        if !self.take("=") {
            loop {
                node.outputs.push(if self.take_word("_") { None } else { Some(self.typed_value(graph, depth)?) });
                if self.take("=") {
                    break;
                }
                if !self.take(",") {
                    return Err(self.expected("`,` or `=`"));
                }
            }
        }
        node.op = self.name("an operator")?;
        if self.take("::") {
            node.domain = std::mem::replace(&mut node.op, self.name("an operator")?);
        }
        if self.take(":") {
            node.overload = self.name("an overload")?;
        }
        self.skip_blanks();
        if self.rest().starts_with('<') {
            let opsets = graph.opsets.clone();
            let pairs = self.list("<", ">", |p| p.attribute(&opsets, depth))?;
            node.attributes = pairs.into_iter().collect::<Attributes>();
        }
        let inputs = self.list("(", ")", |p| {
            p.skip_blanks();
            let position = p.position;
            Ok(if p.take_word("_") { None } else { Some((p.name("the name of a value, or `_`")?, position)) })
        })?;
        if self.take("@") {
            node.name = self.name("the node's name")?;
        }
        Ok(PendingNode { node, inputs, position })
    }

    fn attribute(&mut self, opsets: &BTreeMap<String, u32>, depth: usize) -> Result<(String, Attribute), Expected> {
        let name = self.name("the name of an attribute")?;
        self.expect("=")?;
        Ok((name, self.attribute_value(opsets, depth)?))
    }

    fn attribute_value(&mut self, opsets: &BTreeMap<String, u32>, depth: usize) -> Result<Attribute, Expected> {
        self.skip_blanks();
        if self.rest().starts_with(['"', '[']) || self.rest().starts_with("b\"") {
            return self.plain_attribute();
        }
        let word = self.peek_word();
        if word == "graph" {
            return Ok(Attribute::Graph(Box::new(self.graph(Some(opsets), depth + 1)?)));
        }
        if DType::from_name(word).is_some() {
            return Ok(Attribute::Tensor(self.tensor()?));
        }
        let kinds =
            ["type", "ref", "sparse", "ints", "floats", "strings", "tensors", "sparse_tensors", "graphs", "types"];
        if !kinds.contains(&word) {
            return self.plain_attribute();
        }
        self.take_word(word);
        Ok(match word {
            "type" => Attribute::Type(self.value_type(depth)?),
            "ref" => {
                self.expect("(")?;
                let name = self.name("the name of an attribute")?;
                self.expect(",")?;
                let token = self.token();
                let kind = token.parse().map_err(|_| self.expected("the number of an attribute kind"))?;
                self.position += token.len();
                self.expect(")")?;
                Attribute::Reference { name, kind }
            }
            "sparse" => Attribute::SparseTensor(self.sparse()?),
            "sparse_tensors" => Attribute::SparseTensors(self.list("[", "]", Self::sparse)?),
            "tensors" => Attribute::Tensors(self.list("[", "]", Self::tensor)?),
            "graphs" => Attribute::Graphs(self.list("[", "]", |p| p.graph(Some(opsets), depth + 1))?),
            "types" => Attribute::Types(self.list("[", "]", |p| p.value_type(depth))?),
            kind => {
                self.expect("[")?;
                self.expect("]")?;
                match kind {
                    "ints" => Attribute::Ints(Vec::new()),
                    "floats" => Attribute::Floats(Vec::new()),
                    _ => Attribute::Strings(Vec::new()),
                }
            }
        })
    }

    /// An integer, float or string, or a list of one of these that is not empty.
    fn plain_attribute(&mut self) -> Result<Attribute, Expected> {
        self.skip_blanks();
        if !self.rest().starts_with('[') {
            return self.scalar_attribute();
        }
        let start = self.position;
        let items = self.list("[", "]", Self::scalar_attribute)?;
        let refuse = || Expected { position: start, expected: "a list of one kind that is not empty".to_owned() };
        let (mut ints, mut floats, mut strings) = (Vec::new(), Vec::new(), Vec::new());
        for item in items {
            match item {
                Attribute::Int(v) => ints.push(v),
                Attribute::Float(v) => floats.push(v),
                Attribute::String(v) => strings.push(v),
                _ => return Err(refuse()),
            }
        }
        match (ints.is_empty(), floats.is_empty(), strings.is_empty()) {
            (false, true, true) => Ok(Attribute::Ints(ints)),
            (true, false, true) => Ok(Attribute::Floats(floats)),
            (true, true, false) => Ok(Attribute::Strings(strings)),
            _ => Err(refuse()),
        }
    }

    fn scalar_attribute(&mut self) -> Result<Attribute, Expected> {
        self.skip_blanks();
        if self.rest().starts_with('"') || self.rest().starts_with("b\"") {
            return Ok(Attribute::String(self.byte_string()?));
        }
        if self.take("float(0x") {
            let token = self.token();
            let bits = u32::from_str_radix(token, 16).map_err(|_| self.expected("eight hexadecimal digits"))?;
            self.position += token.len();
            self.expect(")")?;
            return Ok(Attribute::Float(f32::from_bits(bits)));
        }
        let token = self.token();
        let is_float = token.contains(['.', 'e', 'n', 'N']);
        let value = match is_float {
            true => token.parse().ok().map(Attribute::Float),
            false => token.parse().ok().map(Attribute::Int),
        };
        let value = value.ok_or_else(|| self.expected("a number, string, list, tensor, type or graph"))?;
        self.position += token.len();
        Ok(value)
    }

    /// The number that follows, without taking it.
    fn token(&mut self) -> &'a str {
        self.skip_blanks();
        let rest = self.rest();
        let is_end = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-'));
        &rest[..rest.find(is_end).unwrap_or(rest.len())]
    }

    fn byte_string(&mut self) -> Result<Vec<u8>, Expected> {
        self.skip_blanks();
        let text = unquote(self.rest()).map(|(text, length)| (text.into_bytes(), length));
        let (bytes, length) =
            text.or_else(|| read_byte_string(self.rest())).ok_or_else(|| self.expected("a quoted string"))?;
        self.position += length;
        Ok(bytes)
    }

    fn sparse(&mut self) -> Result<SparseTensor, Expected> {
        self.expect("(")?;
        let shape = self.list("[", "]", Self::size)?;
        self.expect(",")?;
        let values = self.tensor()?;
        self.expect(",")?;
        let indices = self.tensor()?;
        self.expect(")")?;
        Ok(SparseTensor { values, indices, shape })
    }

    fn size(&mut self) -> Result<usize, Expected> {
        let token = self.token();
        let size = token.parse().map_err(|_| self.expected("a size"))?;
        self.position += token.len();
        Ok(size)
    }

    fn dtype(&mut self) -> Result<DType, Expected> {
        let word = self.peek_word();
        let dtype = DType::from_name(word).ok_or_else(|| self.expected("an element type"))?;
        self.position += word.len();
        Ok(dtype)
    }

    fn tensor(&mut self) -> Result<Tensor, Expected> {
        self.skip_blanks();
        let start = self.position;
        let dtype = self.dtype()?;
        let shape = self.list("[", "]", Self::size)?;
        if self.take("#") {
            let key = self.peek_word();
            let found = (self.tensors)(key).filter(|t| t.dtype() == dtype && t.shape() == shape);
            let tensor =
                found.ok_or_else(|| self.expected("the key of a tensor of this type and shape that is known"))?;
            self.position += key.len();
            return Ok(tensor);
        }
        let refuse = |expected: String| Expected { position: start, expected };
        if dtype == DType::String {
            let strings = self.list("{", "}", Self::byte_string)?;
            return Tensor::from_strings(&shape, strings)
                .map_err(|e| refuse(format!("as many elements as the shape asks for: {e}")));
        }
        let part = part_of(dtype);
        let mut bytes = Vec::new();
        self.list("{", "}", |p| {
            if part == dtype {
                bytes.extend(p.part(part)?);
                return Ok(());
            }
            p.expect("(")?;
            bytes.extend(p.part(part)?);
            p.expect(",")?;
            bytes.extend(p.part(part)?);
            p.expect(")")
        })?;
        let found = bytes.len() / dtype.size_in_memory();
        match element_count(&shape) {
            Some(count) if count == found => {
                Tensor::from_bytes(dtype, &shape, &bytes).map_err(|e| refuse(e.to_string()))
            }
            Some(count) => Err(refuse(format!("{count} elements for shape {shape:?}, found {found}"))),
            None => Err(refuse("a shape that fits in memory".to_owned())),
        }
    }

    fn part(&mut self, dtype: DType) -> Result<Vec<u8>, Expected> {
        let token = self.token();
        let bytes = read_part(dtype, token).map_err(|expected| self.expected(expected))?;
        self.position += token.len();
        Ok(bytes)
    }

    fn value_type(&mut self, depth: usize) -> Result<ValueType, Expected> {
        if depth > DEPTH_MAX {
            return Err(self.expected(format!("at most {DEPTH_MAX} types within types")));
        }
        let word = self.peek_word();
        if !["sparse", "sequence", "optional", "map", "opaque", "unknown"].contains(&word) {
            return Ok(ValueType::Tensor(self.tensor_type()?));
        }
        self.take_word(word);
        if word == "unknown" {
            return Ok(ValueType::Unknown);
        }
        self.expect("(")?;
        let ty = match word {
            "sparse" => ValueType::Sparse(self.tensor_type()?),
            "sequence" => ValueType::Sequence(Box::new(self.value_type(depth + 1)?)),
            "optional" => ValueType::Optional(Box::new(self.value_type(depth + 1)?)),
            "map" => {
                let key = self.dtype()?;
                self.expect(",")?;
                ValueType::Map(key, Box::new(self.value_type(depth + 1)?))
            }
            _ => {
                let domain = self.name("a domain")?;
                self.expect(",")?;
                ValueType::Opaque { domain, name: self.name("the name of a type")? }
            }
        };
        self.expect(")")?;
        Ok(ty)
    }

    fn tensor_type(&mut self) -> Result<TensorType, Expected> {
        let dtype = if self.take("?") { None } else { Some(self.dtype()?) };
        self.expect("[")?;
        if self.take("*") {
            self.expect("]")?;
            return Ok(TensorType { dtype, shape: None });
        }
        self.position -= 1;
        let dims = self.list("[", "]", |p| {
            p.skip_blanks();
            let (dim, length): (Dim, usize) = parse_prefix(p.rest())
                .map_err(|e| Expected { position: p.position + e.position, expected: e.expected.to_owned() })?;
            p.position += length;
            Ok(dim)
        })?;
        Ok(TensorType { dtype, shape: Some(dims) })
    }
}
