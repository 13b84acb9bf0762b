//! NumPy's `.npy` (format versions 1 to 3, as `numpy.lib.format` documents them) and `.npz`, a zip archive of them.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;

use updraft_graph::tensor::{element_count, strides};
use updraft_graph::{DType, Tensor};

use crate::error::DataError;

const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// NumPy's own bound on a header that is read without trust.
const HEADER_BYTES_MAX: usize = 10_000;

/// Elements start on this border, so that a mapped file is aligned.
const ALIGNMENT_BYTES: usize = 64;

/// Element types and NumPy's letter and size for them.
const TYPES: [(DType, &str); 14] = [
    (DType::Bool, "b1"),
    (DType::I8, "i1"),
    (DType::I16, "i2"),
    (DType::I32, "i4"),
    (DType::I64, "i8"),
    (DType::U8, "u1"),
    (DType::U16, "u2"),
    (DType::U32, "u4"),
    (DType::U64, "u8"),
    (DType::F16, "f2"),
    (DType::F32, "f4"),
    (DType::F64, "f8"),
    (DType::Complex64, "c8"),
    (DType::Complex128, "c16"),
];

/// Reads a `.npy` file.
pub fn read_npy(path: &Path, memory_bytes: u64) -> Result<Tensor, DataError> {
    let file = File::open(path).map_err(DataError::io(path))?;
    parse(BufReader::new(file), memory_bytes).map_err(|reason| DataError::file(path, reason))
}

/// Reads a `.npz` file: its arrays in the order of the archive, under their names without `.npy`. All arrays together
/// may take `memory_bytes`.
pub fn read_npz(path: &Path, memory_bytes: u64) -> Result<Vec<(String, Tensor)>, DataError> {
    let file = File::open(path).map_err(DataError::io(path))?;
    unzip(BufReader::new(file), memory_bytes).map_err(|reason| DataError::file(path, reason))
}

/// Writes a `.npz` file. The file appears under its name only when it is whole.
///
/// # Errors
/// An element type that NumPy lacks (bfloat16, 8-bit floats, strings) is refused by the name of its array.
pub fn write_npz(path: &Path, arrays: &[(String, Tensor)]) -> Result<(), DataError> {
    let mut staged = path.as_os_str().to_owned();
    staged.push(".part");
    let staged = Path::new(&staged);
    let written = zip_to(staged, arrays).and_then(|()| std::fs::rename(staged, path).map_err(DataError::io(path)));
    if written.is_err() {
        // What is left of a failed write is of no use; that it cannot be removed either changes nothing.
        std::fs::remove_file(staged).ok();
    }
    written
}

fn zip_to(path: &Path, arrays: &[(String, Tensor)]) -> Result<(), DataError> {
    let file = File::create(path).map_err(DataError::io(path))?;
    let unwritable = |e: zip::result::ZipError| DataError::Io { path: path.to_owned(), source: e.into() };
    let mut archive = zip::ZipWriter::new(BufWriter::new(file));
    // No compression, as numpy.savez does it, and no times, so that equal arrays give equal files.
    let options = zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .last_modified_time(zip::DateTime::default())
        .large_file(true);
    for (name, tensor) in arrays {
        let header = header_of(tensor).map_err(|reason| DataError::tensor(name, reason))?;
        archive.start_file(format!("{name}.npy"), options).map_err(unwritable)?;
        archive.write_all(&header).and_then(|()| archive.write_all(tensor.bytes())).map_err(DataError::io(path))?;
    }
    let file = archive.finish().map_err(unwritable)?;
    let file = file.into_inner().map_err(|e| DataError::Io { path: path.to_owned(), source: e.into_error() })?;
    file.sync_all().map_err(DataError::io(path))
}

pub(crate) fn header_of(tensor: &Tensor) -> Result<Vec<u8>, String> {
    let dtype = tensor.dtype();
    let Some((_, code)) = TYPES.iter().find(|(d, _)| *d == dtype) else {
        return Err(format!("NumPy has no elements of type {dtype}; cast it to one of {}", type_names()));
    };
    let order = match dtype.size_in_memory() {
        1 => '|',
        _ if cfg!(target_endian = "big") => '>',
        _ => '<',
    };
    let shape: String = tensor.shape().iter().map(|d| format!("{d}, ")).collect();
    let mut header = format!("{{'descr': '{order}{code}', 'fortran_order': False, 'shape': ({}), }}", shape.trim_end());
    let unpadded = MAGIC.len() + 4 + header.len() + 1;
    header.extend(std::iter::repeat_n(' ', unpadded.next_multiple_of(ALIGNMENT_BYTES) - unpadded));
    header.push('\n');
    let len = u16::try_from(header.len()).map_err(|_| format!("a shape of rank {} is too long", tensor.rank()))?;
    Ok([MAGIC.as_slice(), &[1, 0], &len.to_le_bytes(), header.as_bytes()].concat())
}

fn type_names() -> String {
    TYPES.iter().map(|(d, _)| d.name()).collect::<Vec<_>>().join(", ")
}

pub(crate) fn unzip(file: impl Read + Seek, memory_bytes: u64) -> Result<Vec<(String, Tensor)>, String> {
    let mut archive = zip::ZipArchive::new(file).map_err(|e| format!("is not a zip archive: {e}"))?;
    let mut arrays = Vec::new();
    let mut rest_bytes = memory_bytes;
    for index in 0..archive.len() {
        let entry = archive.by_index(index).map_err(|e| format!("entry {index}: {e}"))?;
        let entry_name = entry.name().map_err(|e| format!("entry {index}: {e}"))?.into_owned();
        let Some(name) = entry_name.strip_suffix(".npy").map(str::to_owned) else {
            return Err(format!("entry `{entry_name}` is not a .npy array"));
        };
        if arrays.iter().any(|(n, _)| *n == name) {
            return Err(format!("has two arrays `{name}`"));
        }
        let tensor = parse(entry, rest_bytes).map_err(|reason| format!("array `{name}`: {reason}"))?;
        rest_bytes = rest_bytes.saturating_sub(tensor.byte_len() as u64);
        arrays.push((name, tensor));
    }
    Ok(arrays)
}

/// Reads one array and expects the end of the file behind it.
pub(crate) fn parse(mut file: impl Read, memory_bytes: u64) -> Result<Tensor, String> {
    let mut start = [0; 8];
    read_exact(&mut file, &mut start, "the format version")?;
    if &start[..6] != MAGIC {
        return Err("is not a .npy array: it does not start with \\x93NUMPY".into());
    }
    let header_len = match start[6] {
        1 => {
            let mut len = [0; 2];
            read_exact(&mut file, &mut len, "the header's length")?;
            usize::from(u16::from_le_bytes(len))
        }
        2 | 3 => {
            let mut len = [0; 4];
            read_exact(&mut file, &mut len, "the header's length")?;
            u32::from_le_bytes(len) as usize
        }
        version => return Err(format!("has format version {version}; 1, 2 and 3 are known")),
    };
    if header_len > HEADER_BYTES_MAX {
        return Err(format!("has a header of {header_len} bytes; at most {HEADER_BYTES_MAX} are read"));
    }
    let mut header = vec![0; header_len];
    read_exact(&mut file, &mut header, "the header")?;
    let header = Header::parse(&header)?;

    let count = element_count(&header.shape).ok_or_else(|| format!("shape {:?} is too large", header.shape))?;
    let needed = count.checked_mul(header.dtype.size_in_memory()).filter(|n| *n as u64 <= memory_bytes);
    let needed = needed.ok_or_else(|| {
        format!("shape {:?} of {} takes more than the {memory_bytes} bytes allowed", header.shape, header.dtype)
    })?;
    // Grows as bytes arrive, so that a header cannot claim memory that the file does not fill.
    let mut bytes = Vec::new();
    file.by_ref().take(needed as u64).read_to_end(&mut bytes).map_err(|e| format!("cannot read the elements: {e}"))?;
    if bytes.len() != needed {
        return Err(format!("ends after {} of {needed} bytes of elements", bytes.len()));
    }
    if file.read(&mut [0]).map_err(|e| format!("cannot read the end: {e}"))? != 0 {
        return Err(format!("has bytes behind its {needed} bytes of elements"));
    }
    header.tensor(bytes)
}

fn read_exact(file: &mut impl Read, bytes: &mut [u8], what: &str) -> Result<(), String> {
    file.read_exact(bytes).map_err(|e| format!("cannot read {what}: {e}"))
}

struct Header {
    dtype: DType,
    big_endian: bool,
    fortran_order: bool,
    shape: Vec<usize>,
}

impl Header {
    /// Parses a Python dictionary literal with exactly the keys `descr`, `fortran_order` and `shape`.
    fn parse(header: &[u8]) -> Result<Header, String> {
        let text = std::str::from_utf8(header).map_err(|_| "has a header that is not text")?.trim();
        let malformed = || format!("has a header that is not understood: {text:.200}");
        let body = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).ok_or_else(malformed)?;
        let value = |key: &str| -> Result<&str, String> {
            let quoted = format!("'{key}':");
            let at = body.find(&quoted).ok_or_else(|| format!("has a header without '{key}': {text:.200}"))?;
            Ok(body[at + quoted.len()..].trim_start())
        };
        let descr = value("descr")?.strip_prefix('\'').and_then(|d| d.split_once('\'')).ok_or_else(malformed)?.0;
        let fortran_order = match value("fortran_order")? {
            v if v.starts_with("True") => true,
            v if v.starts_with("False") => false,
            _ => return Err(malformed()),
        };
        let dims = value("shape")?.strip_prefix('(').and_then(|s| s.split_once(')')).ok_or_else(malformed)?.0;
        let mut shape = Vec::new();
        for dim in dims.trim().trim_end_matches(',').split(',').map(str::trim) {
            if !(dim.is_empty() && shape.is_empty()) {
                shape.push(dim.parse::<usize>().map_err(|_| malformed())?);
            }
        }
        let (order, code) = descr.split_at_checked(1).ok_or_else(malformed)?;
        let known = TYPES.iter().find(|(_, c)| *c == code);
        let (Some((dtype, _)), "<" | ">" | "|" | "=") = (known, order) else {
            return Err(format!("has elements of type `{descr}`; known are {}", type_names()));
        };
        let big_endian = order == ">" || (order != "<" && cfg!(target_endian = "big"));
        Ok(Header { dtype: *dtype, big_endian, fortran_order, shape })
    }

    /// The array of elements in file order.
    fn tensor(&self, mut bytes: Vec<u8>) -> Result<Tensor, String> {
        let size = self.dtype.size_in_memory();
        let word = if matches!(self.dtype, DType::Complex64 | DType::Complex128) { size / 2 } else { size };
        if self.big_endian != cfg!(target_endian = "big") {
            bytes.chunks_exact_mut(word).for_each(<[u8]>::reverse);
        }
        if self.dtype == DType::Bool && bytes.iter().any(|b| *b > 1) {
            return Err("has a boolean that is neither 0 nor 1".into());
        }
        if self.fortran_order && self.shape.len() > 1 {
            bytes = transposed(&bytes, &self.shape, size);
        }
        Tensor::from_bytes(self.dtype, &self.shape, &bytes).map_err(|e| e.to_string())
    }
}

/// Elements in column-major order, brought into row-major order.
fn transposed(bytes: &[u8], shape: &[usize], size: usize) -> Vec<u8> {
    let row_strides = strides(shape);
    let mut out = vec![0; bytes.len()];
    let mut index = vec![0; shape.len()];
    for element in bytes.chunks_exact(size) {
        let at: usize = index.iter().zip(&row_strides).map(|(i, s)| i * s).sum();
        out[at * size..][..size].copy_from_slice(element);
        for (i, d) in index.iter_mut().zip(shape) {
            *i += 1;
            if *i < *d {
                break;
            }
            *i = 0;
        }
    }
    out
}
