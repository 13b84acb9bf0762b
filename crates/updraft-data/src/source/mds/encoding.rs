//! How MDS writes a value: the encodings of `streaming/base/format/mds/encodings.py`.

use bytes::Bytes;
use updraft_graph::DType;
use updraft_graph::tensor::element_count;

use crate::schema::Kind;
use crate::source::cells::CellsBuilder;

/// One column's encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// `bytes`, `jpeg`, `png`.
    Bytes,
    /// `str`, `json`, `str_decimal`.
    Text,
    /// `int`, `int8` to `float64`.
    Scalar(DType),
    /// `ndarray`, with type and shape where they are the same for all.
    Array(Option<DType>, Option<Vec<usize>>),
    /// `str_int`: digits.
    TextInt,
    /// `str_float`: digits.
    TextFloat,
}

/// NumPy's names of element types, the codes that arrays without a fixed type start with, and ours.
const TYPES: [(&str, u8, DType); 11] = [
    ("uint8", 8, DType::U8),
    ("int8", 9, DType::I8),
    ("uint16", 16, DType::U16),
    ("int16", 17, DType::I16),
    ("float16", 18, DType::F16),
    ("uint32", 32, DType::U32),
    ("int32", 33, DType::I32),
    ("float32", 34, DType::F32),
    ("uint64", 64, DType::U64),
    ("int64", 65, DType::I64),
    ("float64", 66, DType::F64),
];

/// Encodings that are known and not read, and why.
const REFUSED: [(&str, &str); 6] = [
    (
        "pkl",
        "a pickle runs the code that its writer put in it, so it is not opened; write `json`, `ndarray` or `bytes`",
    ),
    ("pil", "pixels without compression in PIL's modes; write `jpeg` or `png`"),
    ("jpeg_array", "several pictures a row; one is read"),
    ("jpegarray", "several pictures a row; one is read"),
    ("list[jpeg]", "several pictures a row; one is read"),
    ("list[png]", "several pictures a row; one is read"),
];

impl Encoding {
    pub(crate) fn parse(text: &str) -> Result<Encoding, String> {
        let scalar = |name: &str| TYPES.iter().find(|(n, ..)| *n == name).map(|(.., dtype)| *dtype);
        Ok(match text {
            "bytes" | "jpeg" | "png" => Encoding::Bytes,
            "str" | "json" | "str_decimal" => Encoding::Text,
            "int" => Encoding::Scalar(DType::I64),
            "str_int" => Encoding::TextInt,
            "str_float" => Encoding::TextFloat,
            "ndarray" => Encoding::Array(None, None),
            _ => {
                if let Some(dtype) = scalar(text) {
                    return Ok(Encoding::Scalar(dtype));
                }
                if let Some(array) = text.strip_prefix("ndarray:") {
                    let (dtype, shape) = array.split_once(':').map_or((array, None), |(d, s)| (d, Some(s)));
                    let unknown = || format!("the array encoding `{text:.100}` is not understood");
                    let dtype = scalar(dtype).ok_or_else(unknown)?;
                    let dim = |d: &str| d.trim().parse::<usize>().ok().filter(|d| *d > 0);
                    let dims = |s: &str| s.split(',').map(dim).collect::<Option<Vec<usize>>>();
                    let shape = shape.map(|s| dims(s).ok_or_else(unknown)).transpose()?;
                    let bytes = shape.as_ref().map(|s| element_count(s)?.checked_mul(dtype.size_in_memory()));
                    if bytes == Some(None) {
                        return Err(format!("arrays of `{text:.100}` do not fit in memory"));
                    }
                    return Ok(Encoding::Array(Some(dtype), shape));
                }
                let reason = REFUSED.iter().find(|(name, _)| *name == text).map(|(_, reason)| *reason);
                return Err(match reason {
                    Some(reason) => format!("the encoding `{text}` is not read: {reason}"),
                    None => format!(
                        "the encoding `{text:.100}` is not known; known are bytes, str, json, int, ndarray, jpeg, png, \
                         str_int, str_float, str_decimal and numbers such as float32"
                    ),
                });
            }
        })
    }

    /// The encoding that writes a column of this kind.
    pub(crate) fn of_kind(kind: &Kind) -> Result<Encoding, String> {
        let known = |dtype: &DType| {
            let names: Vec<&str> = TYPES.iter().map(|(_, _, d)| d.name()).collect();
            let found = TYPES.iter().any(|(.., d)| d == dtype);
            found.then_some(*dtype).ok_or_else(|| format!("MDS has no {dtype}; it has {}", names.join(", ")))
        };
        Ok(match kind {
            Kind::Bytes => Encoding::Bytes,
            Kind::Text => Encoding::Text,
            Kind::Number { dtype, shape } if shape.is_empty() => Encoding::Scalar(known(dtype)?),
            Kind::Number { shape, .. } if shape.contains(&0) => {
                return Err(format!("MDS has no empty arrays, and rows are of shape {shape:?}"));
            }
            Kind::Number { dtype, shape } => Encoding::Array(Some(known(dtype)?), Some(shape.clone())),
            Kind::List { dtype } => Encoding::Array(Some(known(dtype)?), None),
        })
    }

    /// Its name in a shard.
    pub(crate) fn name(&self) -> String {
        let name = |dtype: &DType| TYPES.iter().find(|(.., d)| d == dtype).map_or("", |(name, ..)| *name);
        match self {
            Encoding::Bytes => "bytes".into(),
            Encoding::Text => "str".into(),
            Encoding::TextInt => "str_int".into(),
            Encoding::TextFloat => "str_float".into(),
            Encoding::Scalar(dtype) => name(dtype).into(),
            Encoding::Array(None, _) => "ndarray".into(),
            Encoding::Array(Some(dtype), None) => format!("ndarray:{}", name(dtype)),
            Encoding::Array(Some(dtype), Some(shape)) => {
                let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
                format!("ndarray:{}:{}", name(dtype), dims.join(","))
            }
        }
    }

    /// Bytes of every value, where they are the same.
    pub(crate) fn fixed_bytes(&self) -> Option<usize> {
        match self {
            Encoding::Scalar(dtype) => Some(dtype.size_in_memory()),
            Encoding::Array(Some(dtype), Some(shape)) => {
                element_count(shape).and_then(|count| count.checked_mul(dtype.size_in_memory()))
            }
            _ => None,
        }
    }

    /// Whether a value is its bytes.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self, Encoding::Bytes | Encoding::Text)
    }

    /// The kind of the column; `None` where only the values tell.
    pub(crate) fn kind(&self) -> Option<Kind> {
        Some(match self {
            Encoding::Bytes => Kind::Bytes,
            Encoding::Text => Kind::Text,
            Encoding::Scalar(dtype) => Kind::scalar(*dtype),
            Encoding::TextInt => Kind::scalar(DType::I64),
            Encoding::TextFloat => Kind::scalar(DType::F64),
            Encoding::Array(Some(dtype), Some(shape)) => Kind::Number { dtype: *dtype, shape: shape.clone() },
            Encoding::Array(..) => return None,
        })
    }

    /// The kind of a column by one of its values: arrays of one dimension may be of any length.
    pub(crate) fn kind_of(&self, value: &[u8]) -> Result<Kind, String> {
        if let Some(kind) = self.kind() {
            return Ok(kind);
        }
        let (dtype, shape, _) = self.array(value)?;
        Ok(if shape.len() == 1 { Kind::List { dtype } } else { Kind::Number { dtype, shape } })
    }

    /// Appends a value that is not its bytes.
    pub(crate) fn push(&self, value: &[u8], cells: &mut CellsBuilder) -> Result<(), String> {
        fn parsed<T: std::str::FromStr>(value: &[u8], what: &str) -> Result<T, String> {
            let text = std::str::from_utf8(value).ok().and_then(|t| t.trim().parse().ok());
            text.ok_or_else(|| format!("`{:.40}` is not {what}", String::from_utf8_lossy(value)))
        }
        match self {
            Encoding::Bytes | Encoding::Text => cells.push_bytes(Bytes::copy_from_slice(value)),
            Encoding::TextInt => {
                let number: i64 = parsed(value, "a whole number of 64 bits")?;
                cells.push_le(DType::I64, &[], &number.to_le_bytes())
            }
            Encoding::TextFloat => {
                let number: f64 = parsed(value, "a number")?;
                cells.push_le(DType::F64, &[], &number.to_le_bytes())
            }
            Encoding::Scalar(dtype) => cells.push_le(*dtype, &[], value),
            Encoding::Array(..) => {
                let (dtype, shape, elements) = self.array(value)?;
                cells.push_le(dtype, &shape, elements)
            }
        }
    }

    /// Type, shape and elements of an array.
    fn array<'a>(&self, value: &'a [u8]) -> Result<(DType, Vec<usize>, &'a [u8]), String> {
        let Encoding::Array(dtype, shape) = self else { return Err("is no array".into()) };
        let cut = || format!("an array of {} bytes is cut off in its shape", value.len());
        let (dtype, rest) = match dtype {
            Some(dtype) => (*dtype, value),
            None => {
                let (code, rest) = value.split_first().ok_or_else(cut)?;
                let known = TYPES.iter().find(|(_, c, _)| c == code);
                (known.ok_or_else(|| format!("has elements of the unknown type {code}"))?.2, rest)
            }
        };
        let (shape, elements) = match shape {
            Some(shape) => (shape.clone(), rest),
            None => {
                let (start, rest) = rest.split_first().ok_or_else(cut)?;
                // Six bits of rank, two for the size of a dimension.
                let (rank, dim_bytes) = (usize::from(start >> 2), 1usize << (start & 3));
                let (dims, elements) = rest.split_at_checked(rank * dim_bytes).ok_or_else(cut)?;
                let dim = |bytes: &[u8]| {
                    let mut word = [0; 8];
                    word[..dim_bytes].copy_from_slice(bytes);
                    usize::try_from(u64::from_le_bytes(word)).map_err(|_| "has a dimension of more than 64 bits")
                };
                let shape: Vec<usize> = dims.chunks_exact(dim_bytes).map(dim).collect::<Result<_, _>>()?;
                (shape, elements)
            }
        };
        let bytes = element_count(&shape).and_then(|n| n.checked_mul(dtype.size_in_memory()));
        if bytes != Some(elements.len()) {
            return Err(format!("{} bytes are not {dtype}{shape:?}", elements.len()));
        }
        Ok((dtype, shape, elements))
    }

    /// Appends what goes before the elements of an array of this shape.
    pub(crate) fn write_shape(&self, shape: &[usize], out: &mut Vec<u8>) -> Result<(), String> {
        let Encoding::Array(Some(_), None) = self else { return Ok(()) };
        if shape.contains(&0) {
            return Err("MDS has no empty arrays".into());
        }
        let largest = shape.iter().copied().max().unwrap_or(0) as u64;
        let size = [1u64 << 8, 1 << 16, 1 << 32].iter().position(|end| largest < *end).unwrap_or(3);
        let rank = u8::try_from(shape.len()).ok().filter(|rank| *rank < 64);
        out.push(rank.ok_or("MDS has at most 63 dimensions")? << 2 | size as u8);
        for dim in shape {
            out.extend_from_slice(&(*dim as u64).to_le_bytes()[..1 << size]);
        }
        Ok(())
    }
}
