//! ONNX files in and out.
//!
//! Reading turns a file's names into ids and its tensors into [`Tensor`](crate::Tensor)s, and refuses whatever has no
//! meaning; nothing is guessed. What the product does not use is carried along, so that writing gives it back.
//! Writing is a pure function of the model: the same model gives the same bytes, and reading those gives the model in
//! its sorted form ([`Graph::sort`](crate::Graph::sort)).
//!
//! No file is opened here. Tensors that a file keeps in others beside it are fetched through a function of the caller
//! and written through another; the names of such files are checked before the caller sees them.
//!
//! The format is that of <https://onnx.ai/onnx/repo-docs/IR.html>.

mod packing;
mod proto;
mod read;
mod tensors;
mod types;
mod write;

pub use packing::{from_little_endian, to_little_endian};
pub use read::{Fetch, ReadOptions, read};
pub use write::{External, WriteOptions, write};

use crate::graph::GraphError;

/// Why a file cannot be read or a model not be written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OnnxError {
    /// The bytes are not a protobuf message of ONNX's form; the source names the field.
    #[error("not an ONNX file: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// A part without which a file means nothing is not there.
    #[error("{place} has no {what}")]
    Missing {
        /// The part of the file.
        place: String,
        /// What it lacks.
        what: &'static str,
    },
    /// An operator set is of a version that is not known here.
    #[error("operator set {domain:?} has version {found}, expected {expected}")]
    Opset {
        /// The operator set's domain.
        domain: String,
        /// The version that the file states.
        found: i64,
        /// The versions that are read.
        expected: String,
    },
    /// The file format is of a version that is not known here.
    #[error("the file format has IR version {found}, expected 1 to {expected_max}")]
    IrVersion {
        /// The version that the file states.
        found: i64,
        /// The newest version that is read.
        expected_max: i64,
    },
    /// Names contradict one another, or nodes wait for one another.
    #[error("{place}: {source}")]
    Graph {
        /// The graph or function.
        place: String,
        /// What is wrong.
        source: GraphError,
    },
    /// A name is read that nothing makes.
    #[error("{place}: {reader} reads {name:?}, which nothing makes")]
    Undefined {
        /// The graph or function.
        place: String,
        /// The node, or the list of outputs.
        reader: String,
        /// The name.
        name: String,
    },
    /// A tensor is not what it says it is.
    #[error("{place}: tensor {tensor:?}: {problem}")]
    Tensor {
        /// The graph, or node and attribute.
        place: String,
        /// The tensor's name.
        tensor: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// A declared type means nothing.
    #[error("{place}: type of {value:?}: {problem}")]
    Type {
        /// The graph, or node and attribute.
        place: String,
        /// The value.
        value: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// An attribute has no value, or several.
    #[error("{place}: attribute {attribute:?} {problem}")]
    Attribute {
        /// The node.
        place: String,
        /// The attribute's name.
        attribute: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// A tensor's data outside the file cannot be had or written.
    #[error("{place}: tensor {tensor:?}: external data at {location:?}: {problem}")]
    External {
        /// The graph, or node and attribute.
        place: String,
        /// The tensor's name.
        tensor: String,
        /// Where the data is, as the file states it.
        location: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// The file would be larger than protobuf allows.
    #[error(
        "the model takes {found_bytes} bytes, more than the 2147483647 that a protobuf message may have: keep large tensors outside"
    )]
    TooLarge {
        /// Bytes that the file would have.
        found_bytes: usize,
    },
}
