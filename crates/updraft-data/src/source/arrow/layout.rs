//! What the columns of a schema are, and where their nodes and buffers lie in a batch.

use updraft_graph::DType;

use crate::schema::Kind;
use crate::source::arrow::flatbuffer::Table;

/// Fields nest this deep at most.
const DEPTH_MAX: usize = 32;

/// Bytes of the view of a value.
pub(super) const VIEW_BYTES: usize = 16;

/// What is said beside a column that is not read.
const READ: &str = "numbers, text, bytes, lists of numbers, and structs of these are read";

/// Fields of a schema with all that nest in them, at most.
const FIELDS_MAX: usize = 1 << 16;

/// Bytes of the names of all columns, at most: fields may share one.
const NAME_BYTES_MAX: usize = 16 << 20;

/// A column: its type, and where its nodes and buffers are in each batch.
#[derive(Clone)]
pub(super) struct Field {
    /// Its name; that of a field of a struct with those of the structs before it, as `image.bytes`.
    pub(super) name: String,
    pub(super) layout: Result<Layout, String>,
    pub(super) place: Counts,
    /// The structs that it lies in, from the outermost. Where one is missing, so is the cell.
    pub(super) above: Vec<Counts>,
}

/// How many nodes and buffers there are, or are before a field.
#[derive(Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) nodes: usize,
    pub(super) buffers: usize,
    /// Fields whose values lie in as many buffers as each batch says, which are not among `buffers`.
    pub(super) views: usize,
}

impl Counts {
    const fn new(nodes: usize, buffers: usize) -> Counts {
        Counts { nodes, buffers, views: 0 }
    }

    fn and(self, other: Counts) -> Counts {
        Counts {
            nodes: self.nodes + other.nodes,
            buffers: self.buffers + other.buffers,
            views: self.views + other.views,
        }
    }
}

#[derive(Clone)]
pub(super) enum Layout {
    Number(DType),
    /// Offsets of 4 or 8 bytes.
    Binary {
        text: bool,
        offset_bytes: usize,
    },
    /// Bytes of which short ones lie in the buffer that tells where long ones do.
    View {
        text: bool,
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
            Layout::Number(_)
            | Layout::FixedBinary(_)
            | Layout::Binary { .. }
            | Layout::View { .. }
            | Layout::Coded { .. } => 1,
            Layout::FixedList(..) | Layout::List { .. } => 2,
        }
    }

    /// Its buffers, without those of a view's long values.
    pub(super) fn buffers(&self) -> usize {
        match self {
            Layout::Number(_) | Layout::FixedBinary(_) | Layout::View { .. } | Layout::Coded { .. } => 2,
            Layout::Binary { .. } | Layout::FixedList(..) => 3,
            Layout::List { .. } => 4,
        }
    }

    pub(super) fn kind(&self) -> Kind {
        match self {
            Layout::Number(dtype) => Kind::scalar(*dtype),
            Layout::Binary { text: true, .. } | Layout::View { text: true } => Kind::Text,
            Layout::Binary { .. } | Layout::View { .. } | Layout::FixedBinary(_) => Kind::Bytes,
            Layout::FixedList(dtype, length) => Kind::Number { dtype: *dtype, shape: vec![*length] },
            Layout::List { dtype, .. } => Kind::List { dtype: *dtype },
            Layout::Coded { values, .. } => values.kind(),
        }
    }
}

/// A layout, or why there is none; and its nodes and buffers. `None` for these where the type is not known, so that no
/// field behind it can be found.
type FieldLayout = (Result<Layout, String>, Option<Counts>);

/// The number of the type of structs in `Schema.fbs`.
const STRUCT: u8 = 13;

/// What a field holds, with all that nests in it.
fn field_layout(field: Table<'_>, depth: usize, left: &mut usize) -> Result<FieldLayout, String> {
    if depth > DEPTH_MAX {
        return Err("its fields nest too deeply".into());
    }
    let children = field.tables(5, left)?;
    let mut below = Some(Counts::default());
    let mut inner = Vec::new();
    for child in &children {
        let (layout, counts) = field_layout(*child, depth + 1, left)?;
        below = below.zip(counts).map(|(below, counts)| below.and(counts));
        inner.push(layout);
    }
    let with = |nodes: usize, buffers: usize| below.map(|below| below.and(Counts::new(nodes, buffers)));
    let alone = |nodes: usize, buffers: usize| Some(Counts::new(nodes, buffers));
    let element = |what: &str| match inner.as_slice() {
        [Ok(Layout::Number(dtype))] => Ok(*dtype),
        _ => Err(format!("holds {what} of something else than numbers; {READ}")),
    };
    let kind = field.u8(2)?;
    let parameters = field.table(3)?;
    let parameter = |number: usize| parameters.map_or(Ok(0), |t| t.i32(number));
    let size = |number: usize| usize::try_from(parameter(number)?).map_err(|_| "a size below zero".to_owned());
    let plain: FieldLayout = match kind {
        1 => (Err(format!("holds nothing but nulls; {READ}")), alone(1, 0)),
        2 => {
            let signed = parameters.map_or(Ok(0), |t| t.u8(1))? != 0;
            (Ok(Layout::Number(integer(parameter(0)?, signed)?)), alone(1, 2))
        }
        3 => {
            let dtype = match parameters.map_or(Ok(0), |t| t.i16(0))? {
                0 => DType::F16,
                1 => DType::F32,
                2 => DType::F64,
                other => return Err(format!("floats of the unknown precision {other}")),
            };
            (Ok(Layout::Number(dtype)), alone(1, 2))
        }
        4 | 5 => (Ok(Layout::Binary { text: kind == 5, offset_bytes: 4 }), alone(1, 3)),
        19 | 20 => (Ok(Layout::Binary { text: kind == 20, offset_bytes: 8 }), alone(1, 3)),
        6 => (Ok(Layout::Number(DType::Bool)), alone(1, 2)),
        15 => (Ok(Layout::FixedBinary(size(0)?)), alone(1, 2)),
        16 => {
            let length = size(0)?;
            (element("lists").map(|dtype| Layout::FixedList(dtype, length)), with(1, 1))
        }
        12 => (element("lists").map(|dtype| Layout::List { dtype, offset_bytes: 4 }), with(1, 2)),
        21 => (element("lists").map(|dtype| Layout::List { dtype, offset_bytes: 8 }), with(1, 2)),
        STRUCT => (Err(format!("holds structs in a list or map, or of no fields; {READ}")), with(1, 1)),
        17 => (Err(format!("holds maps; {READ}")), with(1, 2)),
        7..=11 | 18 => (Err(format!("holds decimals, times or dates; {READ}")), alone(1, 2)),
        22 => (Err(format!("holds run lengths; {READ}")), with(1, 0)),
        23 | 24 => (Ok(Layout::View { text: kind == 24 }), Some(Counts { views: 1, ..Counts::new(1, 2) })),
        25 | 26 => (Err(format!("holds views of lists; {READ}")), with(1, 3)),
        14 => (Err(format!("holds unions; {READ}")), None),
        27.. => (Err(format!("is of Arrow's type {kind}, which is not known; {READ}")), None),
        0 => return Err("a field without a type".into()),
    };
    let Some(encoding) = field.table(4)? else { return Ok(plain) };
    let codes = match encoding.table(1)? {
        None => DType::I32,
        Some(codes) => integer(codes.i32(0)?, codes.u8(1)? != 0)?,
    };
    let dictionary = encoding.i64(0)?;
    let layout = match plain.0 {
        Ok(values @ (Layout::Number(_) | Layout::Binary { .. } | Layout::View { .. } | Layout::FixedBinary(_))) => {
            Ok(Layout::Coded { dictionary, codes, values: Box::new(values) })
        }
        Ok(_) => Err("holds codes of a dictionary of lists".into()),
        Err(reason) => Err(reason),
    };
    // In a batch the codes have the buffers of numbers, whatever they stand for.
    Ok((layout, alone(1, 2)))
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
    let behind = Some(Counts::default());
    let mut walk = Fields { left: FIELDS_MAX, name_bytes_left: NAME_BYTES_MAX, behind, found: Vec::new() };
    for field in schema.tables(1, &mut walk.left)? {
        walk.add(field, "", &[])?;
    }
    Ok(walk.found)
}

/// A walk over the fields of a schema in the order of their nodes.
struct Fields {
    left: usize,
    name_bytes_left: usize,
    /// What lies before the next field; `None` behind one whose nodes and buffers are not known.
    behind: Option<Counts>,
    found: Vec<Field>,
}

impl Fields {
    /// Adds a field, or those of a struct as columns of their own.
    fn add(&mut self, field: Table<'_>, prefix: &str, above: &[Counts]) -> Result<(), String> {
        if above.len() > DEPTH_MAX {
            return Err("its fields nest too deeply".into());
        }
        let name = field.text(0)?;
        let left = self.name_bytes_left.checked_sub(prefix.len().saturating_add(name.len()));
        self.name_bytes_left = left.ok_or("its names take too many bytes")?;
        let name = format!("{prefix}{name}");
        let is_struct = field.u8(2)? == STRUCT && field.table(4)?.is_none();
        let children = if is_struct { field.tables(5, &mut self.left)? } else { Vec::new() };
        if let (Some(place), false) = (self.behind, children.is_empty()) {
            self.behind = Some(place.and(Counts::new(1, 1)));
            let above = [above, &[place]].concat();
            return children.into_iter().try_for_each(|child| self.add(child, &format!("{name}."), &above));
        }
        let (layout, counts) = field_layout(field, above.len(), &mut self.left)?;
        let (layout, place) = match self.behind {
            Some(place) => (layout, place),
            None => (Err("lies behind a column that is not read".into()), Counts::default()),
        };
        self.found.push(Field { name, layout, place, above: above.to_vec() });
        self.behind = self.behind.zip(counts).map(|(behind, counts)| behind.and(counts));
        Ok(())
    }
}

impl Layout {
    /// Bytes that rows take at least in their buffer of this number when it is not compressed; `None` for too many.
    pub(super) fn buffer_bytes(&self, number: usize, rows: u64) -> Option<u64> {
        let each = |bytes: usize| rows.checked_mul(bytes as u64);
        match (self, number) {
            (Layout::Number(DType::Bool), 1) => Some(rows.div_ceil(8)),
            (Layout::Number(dtype) | Layout::Coded { codes: dtype, .. }, 1) => each(dtype.size_in_memory()),
            (Layout::FixedBinary(width), 1) => each(*width),
            (Layout::View { .. }, 1) => each(VIEW_BYTES),
            (Layout::FixedList(DType::Bool, length), 2) => {
                Some(rows.checked_mul(u64::try_from(*length).ok()?)?.div_ceil(8))
            }
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
