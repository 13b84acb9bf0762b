//! What the columns of a schema are, and where their nodes and buffers lie in a batch.

use updraft_graph::DType;

use crate::schema::Kind;
use crate::source::arrow::flatbuffer::Table;

/// Fields nest this deep at most.
const DEPTH_MAX: usize = 32;

/// Fields of a schema with all that nest in them, at most.
const FIELDS_MAX: usize = 1 << 16;

/// A column: its type, and where its nodes and buffers are in each batch.
#[derive(Clone)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) layout: Result<Layout, String>,
    pub(super) node: usize,
    pub(super) buffer: usize,
}

#[derive(Clone)]
pub(super) enum Layout {
    Number(DType),
    /// Offsets of 4 or 8 bytes.
    Binary {
        text: bool,
        offset_bytes: usize,
    },
    FixedBinary(usize),
    FixedList(DType, usize),
    List {
        dtype: DType,
        offset_bytes: usize,
    },
    /// Places among the values of a dictionary.
    Coded {
        dictionary: i64,
        codes: DType,
        values: Box<Layout>,
    },
}

impl Layout {
    pub(super) fn nodes(&self) -> usize {
        match self {
            Layout::Number(_) | Layout::FixedBinary(_) | Layout::Binary { .. } | Layout::Coded { .. } => 1,
            Layout::FixedList(..) | Layout::List { .. } => 2,
        }
    }

    pub(super) fn buffers(&self) -> usize {
        match self {
            Layout::Number(_) | Layout::FixedBinary(_) | Layout::Coded { .. } => 2,
            Layout::Binary { .. } | Layout::FixedList(..) => 3,
            Layout::List { .. } => 4,
        }
    }

    pub(super) fn kind(&self) -> Kind {
        match self {
            Layout::Number(dtype) => Kind::scalar(*dtype),
            Layout::Binary { text: true, .. } => Kind::Text,
            Layout::Binary { text: false, .. } | Layout::FixedBinary(_) => Kind::Bytes,
            Layout::FixedList(dtype, length) => Kind::Number { dtype: *dtype, shape: vec![*length] },
            Layout::List { dtype, .. } => Kind::List { dtype: *dtype },
            Layout::Coded { values, .. } => values.kind(),
        }
    }
}

/// A layout, or why there is none; and nodes and buffers.
pub(super) type FieldLayout = (Result<Layout, String>, Option<(usize, usize)>);

/// What a field holds, and how many nodes and buffers it and its children take. `None` for the counts where only a batch
/// tells, so that no field behind it can be found.
pub(super) fn field_layout(field: Table<'_>, depth: usize, left: &mut usize) -> Result<FieldLayout, String> {
    if depth > DEPTH_MAX {
        return Err("its fields nest too deeply".into());
    }
    let children = field.tables(5, left)?;
    let mut below = Some((0usize, 0usize));
    let mut inner = Vec::new();
    for child in &children {
        let (layout, counts) = field_layout(*child, depth + 1, left)?;
        below = below.zip(counts).map(|((n, b), (nodes, buffers))| (n + nodes, b + buffers));
        inner.push(layout);
    }
    let with = |nodes: usize, buffers: usize| below.map(|(n, b)| (n + nodes, b + buffers));
    let element = |what: &str| match inner.as_slice() {
        [Ok(Layout::Number(dtype))] if *dtype != DType::Bool => Ok(*dtype),
        _ => Err(format!("holds {what} of something else than numbers")),
    };
    let kind = field.u8(2)?;
    let parameters = field.table(3)?;
    let parameter = |number: usize| parameters.map_or(Ok(0), |t| t.i32(number));
    let size = |number: usize| usize::try_from(parameter(number)?).map_err(|_| "a size below zero".to_owned());
    let plain: FieldLayout = match kind {
        1 => (Err("holds nothing but nulls".into()), Some((1, 0))),
        2 => {
            let signed = parameters.map_or(Ok(0), |t| t.u8(1))? != 0;
            (Ok(Layout::Number(integer(parameter(0)?, signed)?)), Some((1, 2)))
        }
        3 => {
            let dtype = match parameters.map_or(Ok(0), |t| t.i16(0))? {
                0 => DType::F16,
                1 => DType::F32,
                2 => DType::F64,
                other => return Err(format!("floats of the unknown precision {other}")),
            };
            (Ok(Layout::Number(dtype)), Some((1, 2)))
        }
        4 | 5 => (Ok(Layout::Binary { text: kind == 5, offset_bytes: 4 }), Some((1, 3))),
        19 | 20 => (Ok(Layout::Binary { text: kind == 20, offset_bytes: 8 }), Some((1, 3))),
        6 => (Ok(Layout::Number(DType::Bool)), Some((1, 2))),
        15 => (Ok(Layout::FixedBinary(size(0)?)), Some((1, 2))),
        16 => {
            let length = size(0)?;
            (element("lists").map(|dtype| Layout::FixedList(dtype, length)), with(1, 1))
        }
        12 => (element("lists").map(|dtype| Layout::List { dtype, offset_bytes: 4 }), with(1, 2)),
        21 => (element("lists").map(|dtype| Layout::List { dtype, offset_bytes: 8 }), with(1, 2)),
        13 => (Err("holds structs; write their fields as columns".into()), with(1, 1)),
        17 => (Err("holds maps".into()), with(1, 2)),
        7..=11 | 18 => {
            (Err("holds decimals, times or dates, which are not numbers, text or bytes".into()), Some((1, 2)))
        }
        22 => (Err("holds run lengths".into()), with(1, 0)),
        14 | 23.. => (Err(format!("is of Arrow's type {kind}, which is not read")), None),
        0 => return Err("a field without a type".into()),
    };
    let Some(encoding) = field.table(4)? else { return Ok(plain) };
    let codes = match encoding.table(1)? {
        None => DType::I32,
        Some(codes) => integer(codes.i32(0)?, codes.u8(1)? != 0)?,
    };
    let dictionary = encoding.i64(0)?;
    let layout = match plain.0 {
        Ok(values @ (Layout::Number(_) | Layout::Binary { .. } | Layout::FixedBinary(_))) => {
            Ok(Layout::Coded { dictionary, codes, values: Box::new(values) })
        }
        Ok(_) => Err("holds codes of a dictionary of lists".into()),
        Err(reason) => Err(reason),
    };
    // In a batch the codes have the buffers of numbers, whatever they stand for.
    Ok((layout, Some((1, 2))))
}

pub(super) fn integer(bits: i32, is_signed: bool) -> Result<DType, String> {
    Ok(match (bits, is_signed) {
        (8, true) => DType::I8,
        (16, true) => DType::I16,
        (32, true) => DType::I32,
        (64, true) => DType::I64,
        (8, false) => DType::U8,
        (16, false) => DType::U16,
        (32, false) => DType::U32,
        (64, false) => DType::U64,
        (bits, _) => return Err(format!("integers of {bits} bits")),
    })
}

pub(super) fn fields_of(schema: Table<'_>) -> Result<Vec<Field>, String> {
    if schema.i16(0)? != 0 {
        return Err("holds big-endian numbers".into());
    }
    let (mut node, mut buffer) = (0, 0);
    let mut lost = false;
    let mut left = FIELDS_MAX;
    let mut fields = Vec::new();
    for field in schema.tables(1, &mut left)? {
        let name = field.text(0)?.to_owned();
        let (layout, counts) = field_layout(field, 0, &mut left)?;
        let layout = if lost { Err("lies behind a column that is not read".into()) } else { layout };
        fields.push(Field { name, layout, node, buffer });
        match counts {
            Some((nodes, buffers)) => (node, buffer) = (node + nodes, buffer + buffers),
            None => lost = true,
        }
    }
    Ok(fields)
}

impl Layout {
    /// Bytes that rows take at least in their buffer of this number when it is not compressed; `None` for too many.
    pub(super) fn buffer_bytes(&self, number: usize, rows: u64) -> Option<u64> {
        let each = |bytes: usize| rows.checked_mul(bytes as u64);
        match (self, number) {
            (Layout::Number(DType::Bool), 1) => Some(rows.div_ceil(8)),
            (Layout::Number(dtype) | Layout::Coded { codes: dtype, .. }, 1) => each(dtype.size_in_memory()),
            (Layout::FixedBinary(width), 1) => each(*width),
            (Layout::FixedList(dtype, length), 2) => each(dtype.size_in_memory().checked_mul(*length)?),
            // One offset more than rows, but none where there are no rows.
            (Layout::Binary { offset_bytes, .. } | Layout::List { offset_bytes, .. }, 1) => each(*offset_bytes),
            _ => Some(0),
        }
    }

    /// Whether its rows have no bytes of their own.
    pub(super) fn is_widthless(&self) -> bool {
        matches!(self, Layout::FixedBinary(0) | Layout::FixedList(_, 0))
    }
}
