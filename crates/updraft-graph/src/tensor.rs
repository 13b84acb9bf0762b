//! The one tensor of the project: a dense, row-major array of any ONNX element type.
//!
//! Elements are kept as plain bytes beside a type tag, so that readers, writers and the engine move them without
//! knowing the type, and look at them through typed slices. Clones share the bytes; writing copies them first when
//! they are shared. Elements narrower than a byte take a byte each ([`DType::size_in_memory`]); packing is the
//! business of file formats.

use std::fmt;
use std::sync::Arc;

use half::{bf16, f16};

use crate::dtype::DType;
use crate::tensor::buffer::Buffer;

mod buffer;
mod minifloat;

/// A dense array: element type, shape, elements in row-major order.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Data,
}

#[derive(Clone, PartialEq)]
enum Data {
    Bytes(Arc<Buffer>),
    /// ONNX strings are byte strings: not all are UTF-8.
    Strings(Arc<Vec<Vec<u8>>>),
}

/// What is wrong with the elements offered for a tensor, or asked of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The number of elements is not the product of the dimensions.
    #[error("shape {shape:?} holds {expected} elements of {dtype}, found {found}")]
    Length {
        /// The shape asked for.
        shape: Vec<usize>,
        /// The element type asked for.
        dtype: DType,
        /// Product of the dimensions.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// The product of the dimensions does not fit the address space.
    #[error("shape {shape:?} of {dtype} does not fit in memory")]
    TooLarge {
        /// The shape asked for.
        shape: Vec<usize>,
        /// The element type asked for.
        dtype: DType,
    },
    /// The elements are of another type.
    #[error("expected elements of {expected}, found {found}")]
    DType {
        /// What the caller asked for.
        expected: DType,
        /// What the tensor holds.
        found: DType,
    },
    /// A byte of a tensor of `bool` is neither.
    #[error("a bool is stored as {found}, expected 0 or 1")]
    Bool {
        /// The byte.
        found: u8,
    },
}

/// A Rust type that is the element type of a tensor.
pub trait Element: bytemuck::Pod + PartialEq + fmt::Debug + Send + Sync {
    /// The tag that tensors of this type carry.
    const DTYPE: DType;
}

macro_rules! element {
    ($($rust:ty => $dtype:ident),* $(,)?) => { $(impl Element for $rust { const DTYPE: DType = DType::$dtype; })* };
}
element!(f32 => F32, f64 => F64, f16 => F16, bf16 => BF16, i8 => I8, i16 => I16, i32 => I32, i64 => I64,
         u8 => U8, u16 => U16, u32 => U32, u64 => U64);

/// The number of elements of a shape, or `None` where it overflows. A zero does not excuse the other dimensions, so
/// that products of some of them never overflow either.
pub fn element_count(shape: &[usize]) -> Option<usize> {
    let count = shape.iter().filter(|d| **d != 0).try_fold(1usize, |n, d| n.checked_mul(*d))?;
    Some(if shape.contains(&0) { 0 } else { count })
}

/// Row-major strides, in elements, of a shape whose element count fits `usize`.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i].saturating_mul(shape[i]);
    }
    out
}

impl Tensor {
    /// A tensor over a copy of `elements`.
    pub fn new<T: Element>(shape: &[usize], elements: &[T]) -> Result<Tensor, TensorError> {
        Tensor::from_bytes(T::DTYPE, shape, bytemuck::cast_slice(elements))
    }

    /// A rank-0 tensor.
    pub fn scalar<T: Element>(value: T) -> Tensor {
        Tensor {
            dtype: T::DTYPE,
            shape: Vec::new(),
            data: Data::Bytes(Arc::new(Buffer::from_slice(bytemuck::bytes_of(&value)))),
        }
    }

    /// A rank-1 tensor.
    pub fn vector<T: Element>(values: &[T]) -> Tensor {
        Tensor {
            dtype: T::DTYPE,
            shape: vec![values.len()],
            data: Data::Bytes(Arc::new(Buffer::from_slice(bytemuck::cast_slice(values)))),
        }
    }

    /// A tensor of one element type all of whose elements are zero (`false`, or the empty string).
    pub fn zeros(dtype: DType, shape: &[usize]) -> Result<Tensor, TensorError> {
        let too_large = || TensorError::TooLarge { shape: shape.to_vec(), dtype };
        let count = element_count(shape).ok_or_else(too_large)?;
        let data = if dtype == DType::String {
            Data::Strings(Arc::new(vec![Vec::new(); count]))
        } else {
            let bytes = count.checked_mul(dtype.size_in_memory()).ok_or_else(too_large)?;
            Data::Bytes(Arc::new(Buffer::zeroed(bytes).ok_or_else(too_large)?))
        };
        Ok(Tensor { dtype, shape: shape.to_vec(), data })
    }

    /// A tensor from its bytes in memory order (native endianness, one byte for narrower elements).
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Tensor, TensorError> {
        let expected = element_count(shape).ok_or_else(|| TensorError::TooLarge { shape: shape.to_vec(), dtype })?;
        let size = dtype.size_in_memory();
        if size == 0 {
            return Err(TensorError::DType { expected: DType::U8, found: dtype });
        }
        if !bytes.len().is_multiple_of(size) || bytes.len() / size != expected {
            return Err(TensorError::Length { shape: shape.to_vec(), dtype, expected, found: bytes.len() / size });
        }
        Ok(Tensor { dtype, shape: shape.to_vec(), data: Data::Bytes(Arc::new(Buffer::from_slice(bytes))) })
    }

    /// A tensor of strings (any bytes).
    pub fn from_strings(shape: &[usize], strings: Vec<Vec<u8>>) -> Result<Tensor, TensorError> {
        let dtype = DType::String;
        let expected = element_count(shape).ok_or_else(|| TensorError::TooLarge { shape: shape.to_vec(), dtype })?;
        if strings.len() != expected {
            return Err(TensorError::Length { shape: shape.to_vec(), dtype, expected, found: strings.len() });
        }
        Ok(Tensor { dtype, shape: shape.to_vec(), data: Data::Strings(Arc::new(strings)) })
    }

    /// A tensor of `bool`.
    pub fn from_bools(shape: &[usize], values: &[bool]) -> Result<Tensor, TensorError> {
        let bytes: Vec<u8> = values.iter().map(|b| u8::from(*b)).collect();
        Tensor::from_bytes(DType::Bool, shape, &bytes)
    }

    /// A tensor of any numeric type or `bool`, each element rounded from `values` as an ONNX `Cast` without
    /// saturation of integers rounds it: floats to nearest even, integers towards zero and wrapped.
    pub fn from_f64(dtype: DType, shape: &[usize], values: &[f64]) -> Result<Tensor, TensorError> {
        let mut bytes = Vec::with_capacity(values.len() * dtype.size_in_memory());
        for v in values {
            push_f64(dtype, *v, &mut bytes)?;
        }
        Tensor::from_bytes(dtype, shape, &bytes)
    }

    /// A tensor of an integer type, a float type or `bool` from wide integers, wrapped to the width of the type.
    pub fn from_i128(dtype: DType, shape: &[usize], values: &[i128]) -> Result<Tensor, TensorError> {
        let mut bytes = Vec::with_capacity(values.len() * dtype.size_in_memory());
        for v in values {
            push_i128(dtype, *v, &mut bytes)?;
        }
        Tensor::from_bytes(dtype, shape, &bytes)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements (some dimension is zero).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the elements take in memory.
    pub fn byte_len(&self) -> usize {
        match &self.data {
            Data::Bytes(b) => b.as_slice().len(),
            Data::Strings(s) => s.iter().map(Vec::len).sum(),
        }
    }

    /// The elements' bytes in memory order; empty for strings.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Bytes(b) => b.as_slice(),
            Data::Strings(_) => &[],
        }
    }

    /// The elements' bytes for writing, copied first if shared; empty for strings.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.data {
            Data::Bytes(b) => Arc::make_mut(b).as_mut_slice(),
            Data::Strings(_) => &mut [],
        }
    }

    /// The elements as a typed slice.
    pub fn as_slice<T: Element>(&self) -> Result<&[T], TensorError> {
        if self.dtype != T::DTYPE {
            return Err(TensorError::DType { expected: T::DTYPE, found: self.dtype });
        }
        Ok(bytemuck::cast_slice(self.bytes()))
    }

    /// The elements as a typed slice for writing; shared elements are copied first.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T], TensorError> {
        if self.dtype != T::DTYPE {
            return Err(TensorError::DType { expected: T::DTYPE, found: self.dtype });
        }
        Ok(bytemuck::cast_slice_mut(self.bytes_mut()))
    }

    /// The elements of a tensor of strings.
    pub fn strings(&self) -> Result<&[Vec<u8>], TensorError> {
        match &self.data {
            Data::Strings(s) => Ok(s),
            Data::Bytes(_) => Err(TensorError::DType { expected: DType::String, found: self.dtype }),
        }
    }

    /// The same elements under another shape of as many elements.
    pub fn reshaped(&self, shape: &[usize]) -> Result<Tensor, TensorError> {
        let expected =
            element_count(shape).ok_or_else(|| TensorError::TooLarge { shape: shape.to_vec(), dtype: self.dtype })?;
        if expected != self.len() {
            return Err(TensorError::Length { shape: shape.to_vec(), dtype: self.dtype, expected, found: self.len() });
        }
        Ok(Tensor { dtype: self.dtype, shape: shape.to_vec(), data: self.data.clone() })
    }

    /// Every element as `f64` (exact but for 64-bit integers past 2^53); an error for strings and complex numbers.
    pub fn to_f64(&self) -> Result<Vec<f64>, TensorError> {
        fn all<T: Element>(t: &Tensor, f: impl Fn(T) -> f64) -> Result<Vec<f64>, TensorError> {
            Ok(t.as_slice::<T>()?.iter().map(|v| f(*v)).collect())
        }
        match self.dtype {
            DType::F32 => all::<f32>(self, f64::from),
            DType::F64 => all::<f64>(self, |v| v),
            DType::F16 => all::<f16>(self, f64::from),
            DType::BF16 => all::<bf16>(self, f64::from),
            dtype if minifloat::is_minifloat(dtype) => {
                Ok(self.bytes().iter().map(|b| minifloat::decode(self.dtype, *b)).collect())
            }
            _ => Ok(self.to_i128()?.into_iter().map(|v| v as f64).collect()),
        }
    }

    /// Every element as a wide integer; an error for floats, strings and complex numbers. `bool` gives 0 and 1.
    pub fn to_i128(&self) -> Result<Vec<i128>, TensorError> {
        fn all<T: Element + Into<i128>>(t: &Tensor) -> Result<Vec<i128>, TensorError> {
            Ok(t.as_slice::<T>()?.iter().map(|v| (*v).into()).collect())
        }
        match self.dtype {
            DType::I8 => all::<i8>(self),
            DType::I16 => all::<i16>(self),
            DType::I32 => all::<i32>(self),
            DType::I64 => all::<i64>(self),
            DType::U8 => all::<u8>(self),
            DType::U16 => all::<u16>(self),
            DType::U32 => all::<u32>(self),
            DType::U64 => all::<u64>(self),
            DType::I4 | DType::I2 => Ok(self.bytes().iter().map(|b| i128::from(*b as i8)).collect()),
            DType::U4 | DType::U2 | DType::Bool => Ok(self.bytes().iter().map(|b| i128::from(*b)).collect()),
            found => Err(TensorError::DType { expected: DType::I64, found }),
        }
    }

    /// Every element as `i64`; as [`to_i128`](Tensor::to_i128), and an error for an element that does not fit.
    pub fn to_i64(&self) -> Result<Vec<i64>, TensorError> {
        let wide = self.to_i128()?;
        wide.into_iter()
            .map(|v| i64::try_from(v).map_err(|_| TensorError::DType { expected: DType::I64, found: self.dtype }))
            .collect()
    }

    /// Every element of a tensor of `bool`.
    pub fn to_bools(&self) -> Result<Vec<bool>, TensorError> {
        if self.dtype != DType::Bool {
            return Err(TensorError::DType { expected: DType::Bool, found: self.dtype });
        }
        Ok(self.bytes().iter().map(|b| *b != 0).collect())
    }

    /// The elements converted to another numeric type, as [`from_f64`](Tensor::from_f64) and
    /// [`from_i128`](Tensor::from_i128) round.
    pub fn cast(&self, dtype: DType) -> Result<Tensor, TensorError> {
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        if self.dtype.is_float() {
            Tensor::from_f64(dtype, &self.shape, &self.to_f64()?)
        } else {
            Tensor::from_i128(dtype, &self.shape, &self.to_i128()?)
        }
    }
}

/// Appends `value`, rounded to `dtype`, in memory order.
fn push_f64(dtype: DType, value: f64, out: &mut Vec<u8>) -> Result<(), TensorError> {
    match dtype {
        DType::F32 => out.extend_from_slice(&(value as f32).to_ne_bytes()),
        DType::F64 => out.extend_from_slice(&value.to_ne_bytes()),
        DType::F16 => out.extend_from_slice(&f16::from_f64(value).to_ne_bytes()),
        DType::BF16 => out.extend_from_slice(&bf16::from_f64(value).to_ne_bytes()),
        dtype if minifloat::is_minifloat(dtype) => {
            out.push(minifloat::encode(dtype, value, minifloat::Overflow::Saturate))
        }
        DType::Bool => out.push(u8::from(value != 0.0)),
        _ => return push_i128(dtype, value as i128, out),
    }
    Ok(())
}

/// Appends `value`, wrapped to the width of `dtype`, in memory order.
fn push_i128(dtype: DType, value: i128, out: &mut Vec<u8>) -> Result<(), TensorError> {
    match dtype {
        DType::I8 | DType::U8 => out.push(value as u8),
        DType::I16 | DType::U16 => out.extend_from_slice(&(value as u16).to_ne_bytes()),
        DType::I32 | DType::U32 => out.extend_from_slice(&(value as u32).to_ne_bytes()),
        DType::I64 | DType::U64 => out.extend_from_slice(&(value as u64).to_ne_bytes()),
        DType::U4 => out.push((value & 0xf) as u8),
        DType::U2 => out.push((value & 0x3) as u8),
        DType::I4 => out.push((((value & 0xf) as i8) << 4 >> 4) as u8),
        DType::I2 => out.push((((value & 0x3) as i8) << 6 >> 6) as u8),
        DType::Bool => out.push(u8::from(value != 0)),
        _ if dtype.is_float() => return push_f64(dtype, value as f64, out),
        found => return Err(TensorError::DType { expected: DType::I64, found }),
    }
    Ok(())
}

pub use minifloat::{Overflow, decode as decode_minifloat, encode as encode_minifloat};

impl fmt::Debug for Tensor {
    /// Type and shape, and the elements where they are few.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)?;
        if self.len() > 16 {
            return Ok(());
        }
        if let Ok(ints) = self.to_i128() {
            write!(f, " {ints:?}")
        } else if let Ok(floats) = self.to_f64() {
            write!(f, " {floats:?}")
        } else if let Ok(strings) = self.strings() {
            let strings: Vec<_> = strings.iter().map(|s| String::from_utf8_lossy(s)).collect();
            write!(f, " {strings:?}")
        } else {
            Ok(())
        }
    }
}
