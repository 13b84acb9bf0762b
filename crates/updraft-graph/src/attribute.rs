//! Attributes of a node: the constants that ONNX keeps beside its inputs.

use std::collections::BTreeMap;

use crate::graph::{Graph, ValueType};
use crate::op::OpError;
use crate::tensor::Tensor;

/// One attribute's value, in ONNX's kinds.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Attribute {
    Int(i64),
    Float(f32),
    /// Any bytes; nearly always UTF-8.
    String(Vec<u8>),
    Tensor(Tensor),
    SparseTensor(SparseTensor),
    Graph(Box<Graph>),
    Type(ValueType),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strings(Vec<Vec<u8>>),
    Tensors(Vec<Tensor>),
    SparseTensors(Vec<SparseTensor>),
    Graphs(Vec<Graph>),
    Types(Vec<ValueType>),
    /// In a function's body: the attribute of this name of the calling node, and its ONNX kind number.
    Reference {
        name: String,
        kind: i32,
    },
}

/// Non-zero elements of a tensor and where they are, as ONNX stores them.
#[derive(Debug, Clone, PartialEq)]
pub struct SparseTensor {
    /// The non-zero elements, rank 1.
    pub values: Tensor,
    /// Their linear positions (rank 1) or coordinates (rank 2), `i64`.
    pub indices: Tensor,
    /// The dense shape.
    pub shape: Vec<usize>,
}

/// The attributes of one node by name, in name order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Attributes {
    values: BTreeMap<String, Attribute>,
    /// Free text by attribute name, where there is any.
    docs: BTreeMap<String, String>,
}

impl SparseTensor {
    /// All elements, zeros included.
    pub fn to_dense(&self) -> Result<Tensor, OpError> {
        let refuse = || OpError::value(format!("indices of a sparse tensor do not fit shape {:?}", self.shape));
        let places: Vec<usize> = match (self.indices.to_i64()?, self.indices.shape()) {
            (positions, [_]) => {
                positions.into_iter().map(|p| usize::try_from(p).map_err(|_| refuse())).collect::<Result<_, _>>()?
            }
            (coordinates, [_, rank]) if *rank == self.shape.len() && *rank > 0 => {
                let place = |index: &[i64]| {
                    index.iter().zip(&self.shape).try_fold(0usize, |place, (i, size)| {
                        let i = usize::try_from(*i).ok().filter(|i| i < size)?;
                        place.checked_mul(*size)?.checked_add(i)
                    })
                };
                coordinates
                    .chunks_exact(*rank)
                    .map(|index| place(index).ok_or_else(refuse))
                    .collect::<Result<_, _>>()?
            }
            _ => return Err(refuse()),
        };
        let mut out = Tensor::zeros(self.values.dtype(), &self.shape)?;
        if places.len() != self.values.len() || places.iter().any(|p| *p >= out.len()) {
            return Err(refuse());
        }
        let size = self.values.dtype().size_in_memory();
        if size == 0 {
            return Err(OpError::unsupported("sparse tensors of strings"));
        }
        for (place, element) in places.into_iter().zip(self.values.bytes().chunks_exact(size)) {
            out.bytes_mut()[place * size..][..size].copy_from_slice(element);
        }
        Ok(out)
    }
}

impl Attributes {
    /// No attributes.
    pub fn new() -> Attributes {
        Attributes::default()
    }

    /// The attribute of this name.
    pub fn get(&self, name: &str) -> Option<&Attribute> {
        self.values.get(name)
    }

    /// Sets an attribute, replacing one of the same name.
    pub fn set(&mut self, name: &str, value: impl Into<Attribute>) {
        self.values.insert(name.to_owned(), value.into());
    }

    /// Removes and returns an attribute.
    pub fn remove(&mut self, name: &str) -> Option<Attribute> {
        self.docs.remove(name);
        self.values.remove(name)
    }

    /// The free text that a file carries along with an attribute; empty where there is none.
    pub fn doc(&self, name: &str) -> &str {
        self.docs.get(name).map_or("", String::as_str)
    }

    /// Sets the free text of an attribute.
    pub fn set_doc(&mut self, name: &str, doc: &str) {
        if doc.is_empty() {
            self.docs.remove(name);
        } else {
            self.docs.insert(name.to_owned(), doc.to_owned());
        }
    }

    /// Names and values, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Attribute)> {
        self.values.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// Names and values for editing, in name order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Attribute)> {
        self.values.iter_mut().map(|(name, value)| (name.as_str(), value))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// An integer, or `default` where it is absent.
    pub fn int(&self, name: &str, default: i64) -> Result<i64, OpError> {
        Ok(self.optional_int(name)?.unwrap_or(default))
    }

    /// An integer that may be absent.
    pub fn optional_int(&self, name: &str) -> Result<Option<i64>, OpError> {
        match self.get(name) {
            None => Ok(None),
            Some(Attribute::Int(v)) => Ok(Some(*v)),
            Some(_) => Err(OpError::attribute(name, "must be an integer")),
        }
    }

    /// An integer used as yes (non-zero) or no.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, OpError> {
        Ok(self.int(name, i64::from(default))? != 0)
    }

    /// A float, or `default` where it is absent.
    pub fn float(&self, name: &str, default: f32) -> Result<f32, OpError> {
        Ok(self.optional_float(name)?.unwrap_or(default))
    }

    /// A float that may be absent.
    pub fn optional_float(&self, name: &str) -> Result<Option<f32>, OpError> {
        match self.get(name) {
            None => Ok(None),
            Some(Attribute::Float(v)) => Ok(Some(*v)),
            Some(_) => Err(OpError::attribute(name, "must be a float")),
        }
    }

    /// A string, or `default` where it is absent.
    pub fn string<'a>(&'a self, name: &str, default: &'a str) -> Result<&'a str, OpError> {
        match self.get(name) {
            None => Ok(default),
            Some(Attribute::String(v)) => std::str::from_utf8(v).map_err(|_| OpError::attribute(name, "must be UTF-8")),
            Some(_) => Err(OpError::attribute(name, "must be a string")),
        }
    }

    /// A list of integers that may be absent.
    pub fn ints(&self, name: &str) -> Result<Option<&[i64]>, OpError> {
        match self.get(name) {
            None => Ok(None),
            Some(Attribute::Ints(v)) => Ok(Some(v)),
            Some(_) => Err(OpError::attribute(name, "must be a list of integers")),
        }
    }

    /// A list of floats that may be absent.
    pub fn floats(&self, name: &str) -> Result<Option<&[f32]>, OpError> {
        match self.get(name) {
            None => Ok(None),
            Some(Attribute::Floats(v)) => Ok(Some(v)),
            Some(_) => Err(OpError::attribute(name, "must be a list of floats")),
        }
    }

    /// A tensor that may be absent.
    pub fn tensor(&self, name: &str) -> Result<Option<&Tensor>, OpError> {
        match self.get(name) {
            None => Ok(None),
            Some(Attribute::Tensor(v)) => Ok(Some(v)),
            Some(_) => Err(OpError::attribute(name, "must be a tensor")),
        }
    }

    /// A subgraph that must be there.
    pub fn graph(&self, name: &str) -> Result<&Graph, OpError> {
        match self.get(name) {
            Some(Attribute::Graph(v)) => Ok(v),
            _ => Err(OpError::attribute(name, "must be a graph")),
        }
    }
}

impl<const N: usize> From<[(&str, Attribute); N]> for Attributes {
    fn from(pairs: [(&str, Attribute); N]) -> Attributes {
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

impl FromIterator<(String, Attribute)> for Attributes {
    fn from_iter<I: IntoIterator<Item = (String, Attribute)>>(pairs: I) -> Attributes {
        Attributes { values: pairs.into_iter().collect(), docs: BTreeMap::new() }
    }
}

impl From<i64> for Attribute {
    fn from(v: i64) -> Attribute {
        Attribute::Int(v)
    }
}

impl From<f32> for Attribute {
    fn from(v: f32) -> Attribute {
        Attribute::Float(v)
    }
}

impl From<&str> for Attribute {
    fn from(v: &str) -> Attribute {
        Attribute::String(v.as_bytes().to_vec())
    }
}

impl From<&[i64]> for Attribute {
    fn from(v: &[i64]) -> Attribute {
        Attribute::Ints(v.to_vec())
    }
}

impl From<Vec<i64>> for Attribute {
    fn from(v: Vec<i64>) -> Attribute {
        Attribute::Ints(v)
    }
}

impl<const N: usize> From<[i64; N]> for Attribute {
    fn from(v: [i64; N]) -> Attribute {
        Attribute::Ints(v.to_vec())
    }
}

impl From<Vec<f32>> for Attribute {
    fn from(v: Vec<f32>) -> Attribute {
        Attribute::Floats(v)
    }
}

impl From<Tensor> for Attribute {
    fn from(v: Tensor) -> Attribute {
        Attribute::Tensor(v)
    }
}
