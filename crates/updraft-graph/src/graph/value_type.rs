//! What is known of a value before it exists.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::tensor::Tensor;

/// What is known of a value before it exists.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum ValueType {
    /// Nothing is known.
    #[default]
    Unknown,
    /// A dense tensor.
    Tensor(TensorType),
    /// A tensor stored by its non-zero elements.
    Sparse(TensorType),
    /// A list of values of one type.
    Sequence(Box<ValueType>),
    /// A value or nothing.
    Optional(Box<ValueType>),
    /// Keys of one element type to values of one type.
    Map(DType, Box<ValueType>),
    /// A type that only some runtime knows.
    Opaque {
        /// Name space of the type.
        domain: String,
        /// The type's name there.
        name: String,
    },
}

/// What is known of a tensor before it exists.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TensorType {
    /// The element type, if known.
    pub dtype: Option<DType>,
    /// The dimensions, if the rank is known.
    pub shape: Option<Vec<Dim>>,
}

impl ValueType {
    /// A tensor of known element type and rank.
    pub fn tensor(dtype: DType, shape: Vec<Dim>) -> ValueType {
        ValueType::Tensor(TensorType { dtype: Some(dtype), shape: Some(shape) })
    }

    /// The type of this very tensor.
    pub fn of(tensor: &Tensor) -> ValueType {
        ValueType::tensor(tensor.dtype(), crate::dim::dims(tensor.shape()))
    }

    /// The element type of a dense tensor, if known.
    pub fn dtype(&self) -> Option<DType> {
        match self {
            ValueType::Tensor(t) => t.dtype,
            _ => None,
        }
    }

    /// The dimensions of a dense tensor, if its rank is known.
    pub fn shape(&self) -> Option<&[Dim]> {
        match self {
            ValueType::Tensor(t) => t.shape.as_deref(),
            _ => None,
        }
    }
}
