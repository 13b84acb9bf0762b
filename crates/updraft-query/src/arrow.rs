//! Our cells as Arrow's arrays and back.
//!
//! Bytes and text become binary and UTF-8, numbers primitive arrays, numbers of a shape nested lists of fixed size, and
//! lists lists. Types that Arrow lacks (bfloat16, 8-bit floats) become float32, which holds all their values.

use std::sync::Arc;

use bytes::Bytes;
use datafusion::arrow::array::{
    Array, ArrayData, ArrayRef, AsArray, BinaryBuilder, BooleanArray, FixedSizeListArray, ListArray, StringBuilder,
    make_array,
};
use datafusion::arrow::buffer::{Buffer, OffsetBuffer};
use datafusion::arrow::datatypes::{DataType, Field};
use updraft_data::{Cells, Kind};
use updraft_graph::{DType, Tensor};

/// Element types on both sides.
const TYPES: [(DType, DataType); 12] = [
    (DType::F16, DataType::Float16),
    (DType::F32, DataType::Float32),
    (DType::F64, DataType::Float64),
    (DType::I8, DataType::Int8),
    (DType::I16, DataType::Int16),
    (DType::I32, DataType::Int32),
    (DType::I64, DataType::Int64),
    (DType::U8, DataType::UInt8),
    (DType::U16, DataType::UInt16),
    (DType::U32, DataType::UInt32),
    (DType::U64, DataType::UInt64),
    (DType::Bool, DataType::Boolean),
];

/// The element type that a query sees.
fn seen(dtype: DType) -> DType {
    match dtype {
        DType::BF16 | DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ => DType::F32,
        other => other,
    }
}

fn arrow_element(dtype: DType) -> Option<DataType> {
    TYPES.iter().find(|(ours, _)| *ours == seen(dtype)).map(|(_, theirs)| theirs.clone())
}

fn our_element(data_type: &DataType) -> Option<DType> {
    TYPES.iter().find(|(_, theirs)| theirs == data_type).map(|(ours, _)| *ours)
}

fn item(data_type: DataType) -> Arc<Field> {
    Arc::new(Field::new("item", data_type, false))
}

/// The type of a column in a query.
///
/// # Errors
/// The element type that it has none for.
pub(crate) fn type_of(kind: &Kind) -> Result<DataType, String> {
    let element = |dtype| arrow_element(dtype).ok_or_else(|| format!("{dtype} is no type of a query"));
    match kind {
        Kind::Bytes => Ok(DataType::Binary),
        Kind::Text => Ok(DataType::Utf8),
        Kind::List { dtype } => Ok(DataType::List(item(element(*dtype)?))),
        Kind::Number { dtype, shape } => shape.iter().rev().try_fold(element(*dtype)?, |inner, length| {
            let length = i32::try_from(*length).map_err(|_| format!("a dimension of {length} is too long"))?;
            Ok(DataType::FixedSizeList(item(inner), length))
        }),
    }
}

/// What a column of an answer would be in a dataset; `None` for what datasets do not hold (times, decimals, structs).
pub(crate) fn kind_of(data_type: &DataType) -> Option<Kind> {
    match data_type {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => Some(Kind::Bytes),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Some(Kind::Text),
        DataType::List(item) => Some(Kind::List { dtype: our_element(item.data_type())? }),
        DataType::FixedSizeList(item, length) => match kind_of(item.data_type())? {
            Kind::Number { dtype, shape } => {
                let shape = [&[usize::try_from(*length).ok()?], shape.as_slice()].concat();
                Some(Kind::Number { dtype, shape })
            }
            _ => None,
        },
        other => our_element(other).map(Kind::scalar),
    }
}

/// Cells as an array of the type that [`type_of`] says.
///
/// # Errors
/// Cells that are not of the kind.
pub(crate) fn array_of(kind: &Kind, cells: &Cells) -> Result<ArrayRef, String> {
    // Arrow counts the bytes of an array in 31 bits.
    if let Cells::Bytes(cells) = cells {
        let total: usize = cells.iter().map(Bytes::len).sum();
        i32::try_from(total).map_err(|_| format!("{total} bytes in one batch of rows are too many"))?;
    }
    match (kind, cells) {
        (Kind::Bytes, Cells::Bytes(cells)) => {
            let mut builder = BinaryBuilder::with_capacity(cells.len(), cells.iter().map(Bytes::len).sum());
            cells.iter().for_each(|cell| builder.append_value(cell));
            Ok(Arc::new(builder.finish()))
        }
        (Kind::Text, Cells::Bytes(cells)) => {
            let mut builder = StringBuilder::with_capacity(cells.len(), cells.iter().map(Bytes::len).sum());
            for cell in cells {
                builder
                    .append_value(std::str::from_utf8(cell).map_err(|e| format!("holds text that is not UTF-8: {e}"))?);
            }
            Ok(Arc::new(builder.finish()))
        }
        (Kind::Number { dtype, shape }, Cells::Numbers(tensor)) => {
            let mut array = elements(*dtype, tensor.clone())?;
            let mut data_type = array.data_type().clone();
            for length in shape.iter().rev() {
                let length = i32::try_from(*length).map_err(|_| format!("a dimension of {length} is too long"))?;
                // Rows cannot be counted by their elements where a dimension is 0.
                let rows = match length {
                    0 => return Err("a dimension of 0 holds nothing to query".into()),
                    _ => array.len() / length as usize,
                };
                let list = FixedSizeListArray::try_new_with_length(item(data_type), length, array, None, rows);
                array = Arc::new(list.map_err(|e| e.to_string())?);
                data_type = array.data_type().clone();
            }
            Ok(array)
        }
        (Kind::List { dtype }, Cells::Lists(lists)) => {
            let bytes: Vec<u8> = lists.iter().flat_map(|list| list.bytes().iter().copied()).collect();
            let count = lists.iter().map(Tensor::len).sum();
            i32::try_from(count).map_err(|_| format!("{count} elements in the lists of one batch"))?;
            let all = Tensor::from_bytes(*dtype, &[count], &bytes).map_err(|e| e.to_string())?;
            let offsets = OffsetBuffer::from_lengths(lists.iter().map(Tensor::len));
            let values = elements(*dtype, all)?;
            let list = ListArray::try_new(item(values.data_type().clone()), offsets, values, None);
            Ok(Arc::new(list.map_err(|e| e.to_string())?))
        }
        _ => Err(format!("does not hold {kind}")),
    }
}

/// All elements of a tensor, side by side.
fn elements(dtype: DType, tensor: Tensor) -> Result<ArrayRef, String> {
    let tensor = if seen(dtype) == dtype { tensor } else { tensor.cast(seen(dtype)).map_err(|e| e.to_string())? };
    let data_type = arrow_element(dtype).ok_or_else(|| format!("{dtype} is no type of a query"))?;
    if data_type == DataType::Boolean {
        return Ok(Arc::new(BooleanArray::from_iter(tensor.bytes().iter().map(|byte| Some(*byte != 0)))));
    }
    let data = ArrayData::builder(data_type).len(tensor.len()).add_buffer(Buffer::from(tensor.bytes()));
    Ok(make_array(data.build().map_err(|e| e.to_string())?))
}

/// An array of an answer as cells of a dataset.
///
/// # Errors
/// Nothing (NULL) in a row, or a type that datasets do not hold.
pub(crate) fn cells_of(kind: &Kind, array: &ArrayRef) -> Result<Cells, String> {
    if let Some(row) = (0..array.len()).find(|row| array.is_null(*row)) {
        return Err(format!(
            "row {row} of a batch holds nothing (NULL), which datasets do not; use coalesce, or leave the row out"
        ));
    }
    match kind {
        Kind::Bytes | Kind::Text => bytes_of(array).map(Cells::Bytes),
        Kind::Number { dtype, shape } => {
            let mut flat = array.clone();
            for _ in shape {
                let list = flat.as_fixed_size_list_opt().ok_or("holds lists of another form")?;
                flat = list.values().clone();
            }
            let shape = [&[array.len()], shape.as_slice()].concat();
            tensor_of(*dtype, &shape, &flat).map(Cells::Numbers)
        }
        Kind::List { dtype } => {
            let lists = array.as_list_opt::<i32>().ok_or("holds lists of another form")?;
            let list = |row| {
                let values = lists.value(row);
                tensor_of(*dtype, &[values.len()], &values)
            };
            (0..lists.len()).map(list).collect::<Result<_, _>>().map(Cells::Lists)
        }
    }
}

fn bytes_of(array: &ArrayRef) -> Result<Vec<Bytes>, String> {
    fn copied<T: AsRef<[u8]>>(values: impl Iterator<Item = Option<T>>) -> Vec<Bytes> {
        values.map(|value| value.map_or_else(Bytes::new, |v| Bytes::copy_from_slice(v.as_ref()))).collect()
    }
    Ok(match array.data_type() {
        DataType::Binary => copied(array.as_binary::<i32>().iter()),
        DataType::LargeBinary => copied(array.as_binary::<i64>().iter()),
        DataType::BinaryView => copied(array.as_binary_view().iter()),
        DataType::Utf8 => copied(array.as_string::<i32>().iter()),
        DataType::LargeUtf8 => copied(array.as_string::<i64>().iter()),
        DataType::Utf8View => copied(array.as_string_view().iter()),
        other => return Err(format!("{other} is neither text nor bytes")),
    })
}

fn tensor_of(dtype: DType, shape: &[usize], array: &ArrayRef) -> Result<Tensor, String> {
    if array.null_count() > 0 {
        return Err("a list holds nothing (NULL) in an element, which datasets do not".into());
    }
    if let Some(bools) = array.as_boolean_opt() {
        let values: Vec<bool> = bools.iter().map(Option::unwrap_or_default).collect();
        return Tensor::from_bools(shape, &values).map_err(|e| e.to_string());
    }
    let data = array.to_data();
    let (width, offset) = (dtype.size_in_memory(), data.offset());
    let bytes = data.buffers().first().map(Buffer::as_slice).unwrap_or_default();
    let bytes = bytes.get(offset * width..(offset + data.len()) * width).ok_or("an array is shorter than it says")?;
    Tensor::from_bytes(dtype, shape, bytes).map_err(|e| e.to_string())
}
