//! Tensors in all the ways that files store them; written in one.

use super::packing::{from_little_endian, packed_len, sign_extend, to_little_endian};
use super::proto::{LOCATION_EXTERNAL, SparseTensorProto, StringStringEntryProto, TensorProto};
use super::types::read_dtype;
use super::{OnnxError, read::ReadOptions};
use crate::attribute::SparseTensor;
use crate::dtype::DType;
use crate::tensor::{Element, Tensor, element_count};

/// The tensor of a message. `place` says where the message is.
pub(super) fn read_tensor(mut proto: TensorProto, place: &str, options: &ReadOptions) -> Result<Tensor, OnnxError> {
    let name = proto.name.take().unwrap_or_default();
    if proto.data_location == Some(LOCATION_EXTERNAL) {
        return read_external(proto, place, name, options);
    }
    read_inside(proto).map_err(|problem| OnnxError::Tensor { place: place.to_owned(), tensor: name, problem })
}

/// Type, shape and number of elements of a tensor message.
fn header(proto: &TensorProto) -> Result<(DType, Vec<usize>, usize), String> {
    if proto.segment.is_some() {
        return Err("is stored in segments, expected one piece".to_owned());
    }
    let dtype = read_dtype(proto.data_type.unwrap_or(0))?.ok_or("has no element type")?;
    let shape = read_shape(&proto.dims)?;
    let count = element_count(&shape).ok_or_else(|| format!("shape {shape:?} does not fit in memory"))?;
    Ok((dtype, shape, count))
}

fn read_shape(dims: &[i64]) -> Result<Vec<usize>, String> {
    let size = |(axis, n): (usize, &i64)| {
        usize::try_from(*n).map_err(|_| format!("dimension {axis} is {n}, expected 0 or more"))
    };
    dims.iter().enumerate().map(size).collect()
}

fn read_inside(proto: TensorProto) -> Result<Tensor, String> {
    let (dtype, shape, count) = header(&proto)?;
    let home = match dtype {
        DType::F32 | DType::Complex64 => "float_data",
        DType::F64 | DType::Complex128 => "double_data",
        DType::I64 => "int64_data",
        DType::U32 | DType::U64 => "uint64_data",
        DType::String => "string_data",
        _ => "int32_data",
    };
    let fields = [
        ("float_data", proto.float_data.len()),
        ("double_data", proto.double_data.len()),
        ("int32_data", proto.int32_data.len()),
        ("int64_data", proto.int64_data.len()),
        ("uint64_data", proto.uint64_data.len()),
        ("string_data", proto.string_data.len()),
        ("raw_data", proto.raw_data.as_ref().map_or(0, Vec::len)),
    ];
    let mut used = fields.iter().filter(|(_, len)| *len > 0);
    let (field, found) = used.next().copied().unwrap_or((home, 0));
    if let Some((other, _)) = used.next() {
        return Err(format!("has elements in {field} and in {other}, expected one of them"));
    }
    if field == "raw_data" && dtype != DType::String {
        let raw = proto.raw_data.unwrap_or_default();
        return from_little_endian(dtype, &shape, &raw).map_err(|e| format!("raw_data: {e}"));
    }
    if field != home {
        return Err(format!("has elements in {field}, expected those of {dtype} in {home}"));
    }
    let expected = match dtype {
        DType::Complex64 | DType::Complex128 => count.checked_mul(2),
        // Two elements of 4 bits or four of 2 bits share a number; 6 bits have one to themselves.
        DType::U4 | DType::I4 | DType::F4E2M1 | DType::U2 | DType::I2 => packed_len(dtype, count),
        _ => Some(count),
    };
    if expected != Some(found) {
        return Err(format!(
            "shape {shape:?} of {dtype} asks for {} numbers in {home}, found {found}",
            expected.unwrap_or(count)
        ));
    }
    let made = match dtype {
        DType::String => Tensor::from_strings(&shape, proto.string_data),
        DType::F32 | DType::Complex64 => Tensor::from_bytes(dtype, &shape, bytemuck::cast_slice(&proto.float_data)),
        DType::F64 | DType::Complex128 => Tensor::from_bytes(dtype, &shape, bytemuck::cast_slice(&proto.double_data)),
        DType::I64 => Tensor::new(&shape, &proto.int64_data),
        DType::I32 => Tensor::new(&shape, &proto.int32_data),
        DType::U64 => Tensor::new(&shape, &proto.uint64_data),
        DType::U32 => Tensor::new(&shape, &narrow::<u64, u32>(&proto.uint64_data)?),
        DType::I16 => Tensor::new(&shape, &narrow::<i32, i16>(&proto.int32_data)?),
        DType::I8 => Tensor::new(&shape, &narrow::<i32, i8>(&proto.int32_data)?),
        DType::U16 => Tensor::new(&shape, &narrow::<i32, u16>(&proto.int32_data)?),
        DType::F16 | DType::BF16 => {
            Tensor::from_bytes(dtype, &shape, bytemuck::cast_slice(&narrow::<i32, u16>(&proto.int32_data)?))
        }
        DType::F6E2M3 | DType::F6E3M2 => {
            let codes = narrow::<i32, u8>(&proto.int32_data)?;
            if let Some(code) = codes.iter().find(|c| **c > 0x3f) {
                return Err(format!("int32_data holds {code}, expected codes of 6 bits"));
            }
            let codes: Vec<u8> = codes.into_iter().map(|c| sign_extend(dtype, c)).collect();
            Tensor::from_bytes(dtype, &shape, &codes)
        }
        // What is left is stored as bytes would be.
        _ => from_little_endian(dtype, &shape, &narrow::<i32, u8>(&proto.int32_data)?),
    };
    made.map_err(|e| e.to_string())
}

fn narrow<F: Copy + std::fmt::Display, T: TryFrom<F> + Element>(numbers: &[F]) -> Result<Vec<T>, String> {
    let one = |n: &F| T::try_from(*n).map_err(|_| format!("a number is {n}, which does not fit {}", T::DTYPE));
    numbers.iter().map(one).collect()
}

fn read_external(proto: TensorProto, place: &str, name: String, options: &ReadOptions) -> Result<Tensor, OnnxError> {
    let entry =
        |key: &str| proto.external_data.iter().find(|e| e.key.as_deref() == Some(key)).and_then(|e| e.value.as_deref());
    let location = entry("location").unwrap_or_default();
    let read = || -> Result<Tensor, String> {
        let (dtype, shape, count) = header(&proto)?;
        let expected = packed_len(dtype, count).ok_or("strings cannot be outside the file")?;
        check_location(location)?;
        let number = |key: &str| -> Result<Option<u64>, String> {
            let parse = |text: &str| text.parse().map_err(|_| format!("{key} is {text:?}, expected a number of bytes"));
            entry(key).map(parse).transpose()
        };
        let offset = number("offset")?.unwrap_or(0);
        let length = number("length")?.unwrap_or(expected as u64);
        if length != expected as u64 {
            return Err(format!("length is {length} bytes, but shape {shape:?} of {dtype} takes {expected}"));
        }
        let fetch = options.external.ok_or("the reader was given no access to other files")?;
        let bytes = fetch(location, offset, length)?;
        from_little_endian(dtype, &shape, &bytes).map_err(|e| e.to_string())
    };
    read().map_err(|problem| OnnxError::External {
        place: place.to_owned(),
        tensor: name,
        location: location.to_owned(),
        problem,
    })
}

/// Refuses names of files that are not in the model's own folder or below it, on any operating system.
fn check_location(location: &str) -> Result<(), String> {
    let climbs = location.split(['/', '\\']).any(|part| part == "..");
    let absolute = location.starts_with(['/', '\\']) || location.as_bytes().get(1) == Some(&b':');
    if location.is_empty() || climbs || absolute || location.contains('\0') {
        return Err("expected a path below the model's folder, without `..`".to_owned());
    }
    Ok(())
}

/// The message that holds a tensor.
pub(super) fn write_tensor(name: &str, tensor: &Tensor) -> TensorProto {
    let mut proto = tensor_header(name, tensor);
    match tensor.strings() {
        Ok(strings) => proto.string_data = strings.to_vec(),
        Err(_) => proto.raw_data = Some(to_little_endian(tensor)),
    }
    proto
}

/// The message for a tensor whose data lie outside.
pub(super) fn write_tensor_outside(
    name: &str,
    tensor: &Tensor,
    location: &str,
    offset: u64,
    length: usize,
) -> TensorProto {
    let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
    TensorProto {
        data_location: Some(LOCATION_EXTERNAL),
        external_data: vec![
            entry("location", location.to_owned()),
            entry("offset", offset.to_string()),
            entry("length", length.to_string()),
        ],
        ..tensor_header(name, tensor)
    }
}

fn tensor_header(name: &str, tensor: &Tensor) -> TensorProto {
    TensorProto {
        dims: tensor.shape().iter().map(|n| *n as i64).collect(),
        data_type: Some(tensor.dtype() as i32),
        name: Some(name.to_owned()).filter(|n| !n.is_empty()),
        ..TensorProto::default()
    }
}

/// A tensor stored by its non-zero elements, with positions that are in order and inside the shape.
pub(super) fn read_sparse(
    proto: SparseTensorProto,
    place: &str,
    options: &ReadOptions,
) -> Result<SparseTensor, OnnxError> {
    let name = proto.values.as_ref().and_then(|v| v.name.clone()).unwrap_or_default();
    let refuse = |problem: String| OnnxError::Tensor { place: place.to_owned(), tensor: name.clone(), problem };
    let values = proto.values.ok_or_else(|| refuse("a sparse tensor has no values".to_owned()))?;
    let values = read_tensor(*values, place, options)?;
    let indices = match proto.indices {
        Some(indices) => read_tensor(*indices, place, options)?,
        None => Tensor::vector::<i64>(&[]),
    };
    let shape = read_shape(&proto.dims).map_err(refuse)?;
    let sparse = SparseTensor { values, indices, shape };
    positions(&sparse).map_err(refuse)?;
    Ok(sparse)
}

/// Row-major positions of a sparse tensor's elements, in ascending order.
fn positions(sparse: &SparseTensor) -> Result<Vec<usize>, String> {
    let SparseTensor { values, indices, shape } = sparse;
    let count = element_count(shape).ok_or_else(|| format!("shape {shape:?} does not fit in memory"))?;
    let stored = values.len();
    let coordinates = match (values.rank(), indices.shape()) {
        (1, [n]) if *n == stored => 1,
        (1, [n, rank]) if *n == stored && *rank == shape.len() => *rank,
        _ => {
            return Err(format!(
                "values have shape {:?} and indices {:?}, expected [n] and [n] or [n, {}]",
                values.shape(),
                indices.shape(),
                shape.len()
            ));
        }
    };
    let linear = indices.rank() == 1;
    let indices = indices.as_slice::<i64>().map_err(|e| e.to_string())?;
    let outside = |index: i64, size: usize| format!("index {index} is outside [0, {size})");
    let mut out: Vec<usize> = Vec::with_capacity(stored);
    for row in 0..stored {
        let mut position = 0;
        if linear {
            let index = indices[row];
            position = usize::try_from(index).ok().filter(|i| *i < count).ok_or_else(|| outside(index, count))?;
        } else {
            for (index, size) in indices[row * coordinates..].iter().zip(shape) {
                let inside = usize::try_from(*index).ok().filter(|i| i < size).ok_or_else(|| outside(*index, *size))?;
                position = position * size + inside;
            }
            // A rank of zero has no coordinates to be outside with.
            if position >= count {
                return Err(outside(0, count));
            }
        }
        if out.last().is_some_and(|last| *last >= position) {
            return Err(format!("indices of element {row} are not after those of the one before it"));
        }
        out.push(position);
    }
    Ok(out)
}

/// Bytes that all elements of a sparse tensor would take.
pub(super) fn dense_len(sparse: &SparseTensor) -> Option<usize> {
    let size = match sparse.values.dtype() {
        DType::String => size_of::<Vec<u8>>(),
        dtype => dtype.size_in_memory(),
    };
    element_count(&sparse.shape)?.checked_mul(size)
}

/// All elements of a sparse tensor.
pub(super) fn densify(sparse: &SparseTensor) -> Result<Tensor, String> {
    let positions = positions(sparse)?;
    let dtype = sparse.values.dtype();
    if let Ok(strings) = sparse.values.strings() {
        let mut out = vec![Vec::new(); element_count(&sparse.shape).unwrap_or(0)];
        for (position, string) in positions.into_iter().zip(strings) {
            out[position] = string.clone();
        }
        return Tensor::from_strings(&sparse.shape, out).map_err(|e| e.to_string());
    }
    let mut out = Tensor::zeros(dtype, &sparse.shape).map_err(|e| e.to_string())?;
    let size = dtype.size_in_memory();
    let bytes = out.bytes_mut();
    for (position, element) in positions.into_iter().zip(sparse.values.bytes().chunks_exact(size)) {
        bytes[position * size..][..size].copy_from_slice(element);
    }
    Ok(out)
}

/// The elements of a tensor that are not zero (whose bytes are not all zero), with their row-major positions.
pub(super) fn sparsify(tensor: &Tensor) -> Result<SparseTensor, String> {
    let (values, positions) = if let Ok(strings) = tensor.strings() {
        let kept: Vec<(usize, &Vec<u8>)> = strings.iter().enumerate().filter(|(_, s)| !s.is_empty()).collect();
        let values = kept.iter().map(|(_, s)| (*s).clone()).collect();
        let positions: Vec<i64> = kept.iter().map(|(i, _)| *i as i64).collect();
        (Tensor::from_strings(&[positions.len()], values), positions)
    } else {
        let elements = tensor.bytes().chunks_exact(tensor.dtype().size_in_memory()).enumerate();
        let kept: Vec<(usize, &[u8])> = elements.filter(|(_, e)| e.iter().any(|b| *b != 0)).collect();
        let bytes: Vec<u8> = kept.iter().flat_map(|(_, e)| e.iter().copied()).collect();
        let positions: Vec<i64> = kept.iter().map(|(i, _)| *i as i64).collect();
        (Tensor::from_bytes(tensor.dtype(), &[positions.len()], &bytes), positions)
    };
    Ok(SparseTensor {
        values: values.map_err(|e| e.to_string())?,
        indices: Tensor::vector(&positions),
        shape: tensor.shape().to_vec(),
    })
}

/// The message of a sparse tensor.
pub(super) fn write_sparse(name: &str, sparse: &SparseTensor) -> SparseTensorProto {
    SparseTensorProto {
        values: Some(Box::new(write_tensor(name, &sparse.values))),
        indices: Some(Box::new(write_tensor("", &sparse.indices))),
        dims: sparse.shape.iter().map(|n| *n as i64).collect(),
    }
}
