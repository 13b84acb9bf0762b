//! Declared types, and the dimensions in them.

use super::proto::{
    DimensionProto, DimensionValue, ElementTypeProto, MapTypeProto, OpaqueTypeProto, TensorShapeProto, TensorTypeProto,
    TypeProto, TypeValue,
};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Denotation, TensorType, ValueType};

/// A declared type, or what is wrong with it.
pub(super) fn read_type(proto: TypeProto) -> Result<(ValueType, Denotation), String> {
    let mut denotation = Denotation { value: proto.denotation.unwrap_or_default(), axes: Vec::new() };
    let Some(value) = proto.value else { return Ok((ValueType::Unknown, denotation)) };
    let element = |proto: Option<Box<TypeProto>>| -> Result<Box<ValueType>, String> {
        Ok(Box::new(proto.map_or(Ok(ValueType::Unknown), |p| Ok::<_, String>(read_type(*p)?.0))?))
    };
    let ty = match value {
        TypeValue::Tensor(t) => ValueType::Tensor(read_tensor_type(t, &mut denotation.axes)?),
        TypeValue::Sparse(t) => ValueType::Sparse(read_tensor_type(t, &mut denotation.axes)?),
        TypeValue::Sequence(t) => ValueType::Sequence(element(t.elem_type)?),
        TypeValue::Optional(t) => ValueType::Optional(element(t.elem_type)?),
        TypeValue::Map(t) => {
            let key = read_dtype(t.key_type.unwrap_or(0))?.ok_or("a map has no key type")?;
            ValueType::Map(key, element(t.value_type)?)
        }
        TypeValue::Opaque(t) => {
            ValueType::Opaque { domain: t.domain.unwrap_or_default(), name: t.name.unwrap_or_default() }
        }
    };
    Ok((ty, denotation))
}

/// The element type of a number; 0 stands for an unknown one.
pub(super) fn read_dtype(number: i32) -> Result<Option<DType>, String> {
    match number {
        0 => Ok(None),
        n => Ok(Some(
            DType::from_onnx(n)
                .ok_or_else(|| format!("element type has number {n}, expected 1 to {}", DType::ALL.len()))?,
        )),
    }
}

fn read_tensor_type(proto: TensorTypeProto, denotations: &mut Vec<String>) -> Result<TensorType, String> {
    let dtype = read_dtype(proto.elem_type.unwrap_or(0))?;
    let Some(shape) = proto.shape else { return Ok(TensorType { dtype, shape: None }) };
    let mut dims = Vec::with_capacity(shape.dim.len());
    for (axis, dim) in shape.dim.into_iter().enumerate() {
        if let Some(text) = dim.denotation.filter(|d| !d.is_empty()) {
            denotations.resize(axis, String::new());
            denotations.push(text);
        }
        dims.push(match dim.value {
            None => Dim::Unknown,
            Some(DimensionValue::Value(n)) => {
                Dim::Known(usize::try_from(n).map_err(|_| format!("dimension {axis} is {n}, expected 0 or more"))?)
            }
            Some(DimensionValue::Param(name)) => read_param(name),
        });
    }
    let known = dims.iter().filter_map(Dim::known).filter(|n| *n != 0);
    let fits =
        known.into_iter().try_fold(1usize, |product, n| product.checked_mul(n).filter(|p| *p <= isize::MAX as usize));
    if fits.is_none() {
        return Err(format!("a tensor of shape {} does not fit in memory", crate::op::show_shape(&dims)));
    }
    Ok(TensorType { dtype, shape: Some(dims) })
}

/// A name, or the expression that it spells. Only our own spelling counts as an expression: `batch-size` is a name.
fn read_param(name: String) -> Dim {
    if name.is_empty() {
        return Dim::Unknown;
    }
    match name.parse::<Dim>() {
        Ok(dim @ Dim::Expr(_)) if dim.as_symbol().is_none() && dim.to_string() == name => dim,
        _ => Dim::symbol(&name),
    }
}

/// The message for a type; nothing where nothing is known.
pub(super) fn write_type(ty: &ValueType, denotation: &Denotation) -> Option<TypeProto> {
    let element = |ty: &ValueType| ElementTypeProto { elem_type: write_element(ty) };
    let value = match ty {
        ValueType::Unknown => None,
        ValueType::Tensor(t) => Some(TypeValue::Tensor(write_tensor_type(t, denotation))),
        ValueType::Sparse(t) => Some(TypeValue::Sparse(write_tensor_type(t, denotation))),
        ValueType::Sequence(t) => Some(TypeValue::Sequence(element(t))),
        ValueType::Optional(t) => Some(TypeValue::Optional(element(t))),
        ValueType::Map(key, t) => {
            Some(TypeValue::Map(MapTypeProto { key_type: Some(*key as i32), value_type: write_element(t) }))
        }
        ValueType::Opaque { domain, name } => Some(TypeValue::Opaque(OpaqueTypeProto {
            domain: Some(domain.clone()).filter(|s| !s.is_empty()),
            name: Some(name.clone()).filter(|s| !s.is_empty()),
        })),
    };
    let denotation = Some(denotation.value.clone()).filter(|s| !s.is_empty());
    (value.is_some() || denotation.is_some()).then_some(TypeProto { value, denotation })
}

fn write_element(ty: &ValueType) -> Option<Box<TypeProto>> {
    write_type(ty, &Denotation::default()).map(Box::new)
}

fn write_tensor_type(ty: &TensorType, denotation: &Denotation) -> TensorTypeProto {
    let shape = ty.shape.as_ref().map(|dims| TensorShapeProto {
        dim: dims
            .iter()
            .enumerate()
            .map(|(axis, dim)| DimensionProto {
                value: match dim {
                    Dim::Unknown => None,
                    Dim::Known(n) => Some(DimensionValue::Value(*n as i64)),
                    Dim::Expr(_) => {
                        Some(DimensionValue::Param(dim.as_symbol().map_or_else(|| dim.to_string(), str::to_owned)))
                    }
                },
                denotation: denotation.axes.get(axis).filter(|s| !s.is_empty()).cloned(),
            })
            .collect(),
    });
    TensorTypeProto { elem_type: Some(ty.dtype.map_or(0, |d| d as i32)), shape }
}
