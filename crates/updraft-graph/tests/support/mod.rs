//! Random models: any ONNX construct in any place, as far as files can say it. They mean nothing and need not run.

#![allow(dead_code)]

use updraft_base::random::Key;
use updraft_graph::attribute::SparseTensor;
use updraft_graph::graph::{Denotation, QuantizationAnnotation, TensorType};
use updraft_graph::{
    Attribute, Attributes, DType, Dim, Function, Graph, Model, Node, Tensor, TrainingInfo, ValueId, ValueType,
};

/// Draws numbers one after another.
pub struct Draw {
    key: Key,
    counter: u64,
}

impl Draw {
    pub fn new(seed: u64) -> Draw {
        Draw { key: Key::new(seed), counter: 0 }
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.counter += 1;
        self.key.below(self.counter, n as u64) as usize
    }

    pub fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }

    pub fn of<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    fn text(&mut self) -> String {
        self.of(&["", "a", "two words", "ünï\"code\"\n", "_", "input", "x::y", "/layer/0", "17"]).to_owned()
    }

    fn pairs(&mut self) -> Vec<(String, String)> {
        if self.chance(4) { vec![(self.text(), self.text())] } else { Vec::new() }
    }

    fn int(&mut self) -> i64 {
        self.of(&[0, 1, -1, 7, i64::MAX, i64::MIN])
    }

    fn float(&mut self) -> f32 {
        self.of(&[0.0, -0.0, 1.0, -2.5, 1e-30, 3.0e38, f32::INFINITY, f32::NEG_INFINITY, 0.1])
    }

    fn bytes(&mut self) -> Vec<u8> {
        self.of(&[b"".as_slice(), b"SAME_UPPER", b"\xff\x00\"\\\n", "ü".as_bytes()]).to_vec()
    }

    pub fn dim(&mut self) -> Dim {
        let n = Dim::symbol(self.of(&["N", "batch-size", "S", "floor"]));
        match self.below(6) {
            0 => Dim::Unknown,
            1 => n,
            2 => n.times(&Dim::Known(3)).offset(-2).divide_floor(2),
            3 => n.times(&Dim::symbol("H")).offset(1),
            _ => Dim::Known(self.below(5)),
        }
    }

    fn shape(&mut self) -> Vec<usize> {
        (0..self.below(4)).map(|_| self.below(4)).collect()
    }

    fn tensor_type(&mut self) -> TensorType {
        let dtype = (!self.chance(5)).then(|| self.of(&DType::ALL));
        let shape = (!self.chance(5)).then(|| (0..self.below(4)).map(|_| self.dim()).collect());
        TensorType { dtype, shape }
    }

    pub fn value_type(&mut self, depth: usize) -> ValueType {
        let inner = if depth == 0 { 7 } else { 1 };
        match self.below(12 / inner) {
            0 => ValueType::Unknown,
            1 if depth > 0 => ValueType::Sequence(Box::new(self.value_type(depth - 1))),
            2 if depth > 0 => ValueType::Optional(Box::new(self.value_type(depth - 1))),
            3 if depth > 0 => ValueType::Map(DType::I64, Box::new(self.value_type(depth - 1))),
            4 if depth > 0 => ValueType::Opaque { domain: self.text(), name: self.text() },
            5 if depth > 0 => ValueType::Sparse(self.tensor_type()),
            _ => ValueType::Tensor(self.tensor_type()),
        }
    }

    /// Any bits are elements, but for `bool`, and for the bits above those of narrow types.
    pub fn tensor_of(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        let count: usize = shape.iter().product();
        if dtype == DType::String {
            return Tensor::from_strings(shape, (0..count).map(|_| self.bytes()).collect()).unwrap();
        }
        if dtype.is_integer() {
            let (min, max) = dtype.integer_range().unwrap();
            let values: Vec<i128> = (0..count).map(|_| self.of(&[min, max, 0, 1])).collect();
            return Tensor::from_i128(dtype, shape, &values).unwrap();
        }
        let mask = match dtype {
            DType::Bool => 1,
            dtype => (1u16 << dtype.bits().unwrap().min(8)) as u8,
        };
        let mask = if dtype == DType::Bool { mask } else { mask.wrapping_sub(1) };
        let bytes: Vec<u8> = (0..count * dtype.size_in_memory()).map(|_| self.below(256) as u8 & mask).collect();
        Tensor::from_bytes(dtype, shape, &bytes).unwrap()
    }

    pub fn tensor(&mut self) -> Tensor {
        let (dtype, shape) = (self.of(&DType::ALL), self.shape());
        self.tensor_of(dtype, &shape)
    }

    fn sparse(&mut self) -> SparseTensor {
        let dtype = self.of(&DType::ALL);
        let values = self.tensor_of(dtype, &[2]);
        if self.chance(2) {
            SparseTensor { values, indices: Tensor::vector(&[1i64, 5]), shape: vec![2, 3] }
        } else {
            SparseTensor { values, indices: Tensor::new(&[2, 2], &[0i64, 1, 1, 2]).unwrap(), shape: vec![2, 3] }
        }
    }

    fn attribute(&mut self, depth: usize, around: &Graph, seen: &[String]) -> Attribute {
        let n = self.below(3);
        match self.below(if depth == 0 { 12 } else { 16 }) {
            0 => Attribute::Int(self.int()),
            1 => Attribute::Float(self.float()),
            2 => Attribute::String(self.bytes()),
            3 => Attribute::Tensor(self.tensor()),
            4 => Attribute::SparseTensor(self.sparse()),
            5 => Attribute::Type(self.value_type(2)),
            6 => Attribute::Ints((0..n).map(|_| self.int()).collect()),
            7 => Attribute::Floats((0..n).map(|_| self.float()).collect()),
            8 => Attribute::Strings((0..n).map(|_| self.bytes()).collect()),
            9 => Attribute::Tensors((0..n).map(|_| self.tensor()).collect()),
            10 => Attribute::Types((0..n).map(|_| self.value_type(1)).collect()),
            11 => Attribute::Reference { name: "alpha".to_owned(), kind: 1 },
            12 => Attribute::SparseTensors((0..n).map(|_| self.sparse()).collect()),
            13 => Attribute::Graphs((0..n).map(|_| self.graph(depth - 1, Some((around, seen)))).collect()),
            _ => Attribute::Graph(Box::new(self.graph(depth - 1, Some((around, seen))))),
        }
    }

    fn attributes(&mut self, depth: usize, around: &Graph, seen: &[String]) -> Attributes {
        let mut attributes = Attributes::new();
        for name in ["axis", "body", "odd name"] {
            if self.chance(3) {
                let value = self.attribute(depth, around, seen);
                attributes.set(name, value);
                if self.chance(4) {
                    attributes.set_doc(name, "what it is for");
                }
            }
        }
        attributes
    }

    /// A graph whose subgraphs go `depth` deep; `outer` is the graph around it and the values that may be captured.
    pub fn graph(&mut self, depth: usize, outer: Option<(&Graph, &[String])>) -> Graph {
        let mut graph = Graph::new(&self.text());
        graph.doc = self.text();
        graph.metadata = self.pairs();
        if let Some((around, _)) = outer {
            graph.opsets = around.opsets.clone();
        } else {
            graph.opsets.insert("com.example".to_owned(), 3);
        }
        let mut values: Vec<ValueId> = Vec::new();
        let mut serial = 0;
        // Names are unique over all graphs, as ONNX asks.
        let mut name = |draw: &mut Draw| {
            serial += 1;
            let prefix = draw.of(&["v", "a b", "/n", "input"]);
            format!("{prefix}{serial}_{depth}_{}", draw.below(1 << 30))
        };
        for _ in 0..self.below(3) {
            let ty = self.value_type(2);
            let id = graph.add_input(&name(self), ty).unwrap();
            if self.chance(3) {
                let tensor = self.tensor();
                let declared = graph.value(id).ty.clone();
                graph.set_constant(id, Some(tensor));
                graph.set_type(id, declared);
            }
            if let ValueType::Tensor(_) = graph.value(id).ty {
                graph.set_denotation(id, Denotation { value: self.text(), axes: Vec::new() });
            }
            values.push(id);
        }
        for _ in 0..self.below(3) {
            let tensor = self.tensor();
            let id = graph.add_constant(&name(self), tensor);
            graph.set_sparse(id, self.chance(3));
            values.push(id);
        }
        if let Some((around, seen)) = outer {
            for captured in seen.iter().take(self.below(3)) {
                let ty = around.value(around.find(captured).unwrap()).ty.clone();
                values.push(graph.add_outer(captured, ty).unwrap());
            }
        }
        for id in values.clone() {
            if !graph.value(id).is_outer() {
                graph.set_value_notes(id, self.text(), self.pairs());
            }
        }
        for _ in 0..1 + self.below(5) {
            let mut inputs = Vec::new();
            for _ in 0..self.below(4) {
                inputs.push(if self.chance(5) || values.is_empty() { None } else { Some(self.of(&values)) });
            }
            let seen: Vec<String> = values.iter().map(|v| graph.value(*v).name.clone()).collect();
            let attributes = self.attributes(depth, &graph, &seen);
            let made: Vec<Option<ValueId>> = (0..1 + self.below(2))
                .map(|i| {
                    let ty = self.value_type(1);
                    let id = graph.add_value(&name(self), ty).unwrap();
                    graph.set_value_notes(id, self.text(), self.pairs());
                    (i == 0 || !self.chance(3)).then_some(id)
                })
                .collect();
            // Subgraphs may capture through any number of graphs, each of which then has the value too.
            let node = Node {
                name: self.text(),
                domain: self.of(&["", "com.example", "ai.updraft"]).to_owned(),
                op: self.of(&["Relu", "If", "odd op", "Custom"]).to_owned(),
                overload: if self.chance(5) { "fast".to_owned() } else { String::new() },
                inputs,
                outputs: made.clone(),
                attributes,
                doc: self.text(),
                metadata: self.pairs(),
                device_configurations: if self.chance(5) { vec![vec![10, 1, b'x']] } else { Vec::new() },
            };
            graph.add_node(node).unwrap();
            values.extend(made.into_iter().flatten());
        }
        for _ in 0..1 + self.below(2) {
            let output = self.of(&values);
            graph.push_output(output);
        }
        if self.chance(3) {
            graph.quantization.push(QuantizationAnnotation {
                tensor: graph.value(values[0]).name.clone(),
                parameters: vec![("SCALE_TENSOR".to_owned(), "s".to_owned())],
            });
        }
        graph
    }

    pub fn model(&mut self) -> Model {
        let mut body = self.graph(1, None);
        // A function has no initializers or defaults, and its inputs no denotations that a value could not have too.
        let constants: Vec<ValueId> = body.constants().map(|(id, _)| id).collect();
        for id in constants {
            body.set_constant(id, None);
            if !body.inputs().contains(&id) {
                body.push_input(id);
            }
        }
        body.name = "Custom".to_owned();
        body.quantization.clear();
        let function = Function {
            domain: "com.example".to_owned(),
            overload: self.text(),
            body,
            required_attributes: vec!["beta".to_owned()],
            default_attributes: Attributes::from([("alpha", Attribute::Float(0.5))]),
        };
        let graph = self.graph(2, None);
        let training = TrainingInfo {
            initialization: Some(self.graph(0, Some((&graph, &[])))),
            algorithm: None,
            initialization_binding: self.pairs(),
            update_binding: self.pairs(),
        };
        Model {
            doc: self.text(),
            metadata: self.pairs(),
            domain: self.text(),
            model_version: self.int(),
            functions: vec![function],
            training: if self.chance(2) { vec![training] } else { Vec::new() },
            device_configurations: vec![vec![10, 1, b'd']],
            ..Model::new(graph)
        }
    }
}
