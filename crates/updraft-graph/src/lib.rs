//! The network in memory: operators, types, shapes, checker, text form, ONNX in and out.

pub mod dtype;
pub mod tensor;

pub use dtype::DType;
pub use tensor::{Element, Tensor, TensorError};
