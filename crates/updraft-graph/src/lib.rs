//! The network in memory: operators, types, shapes, checker, text form, ONNX in and out.

pub mod attribute;
mod builder;
pub mod check;
pub mod cost;
pub mod dim;
pub mod dtype;
pub mod eval;
pub mod fingerprint;
pub mod graph;
pub mod infer;
pub mod model;
pub mod onnx;
pub mod op;
pub mod tensor;
pub mod text;
pub mod upgrade;
pub mod zoo;

pub use attribute::{Attribute, Attributes};
pub use dim::Dim;
pub use dtype::DType;
pub use graph::{Graph, GraphError, Node, NodeId, OPSET, OPSET_MAX, UPDRAFT_DOMAIN, Value, ValueId, ValueType};
pub use model::{Function, Model, TrainingInfo};
pub use op::OpError;
pub use tensor::{Element, Tensor, TensorError};
