//! Single elements: the shortest decimal that reads back as the same bits, and the bits themselves where none does.

use std::fmt::Write as _;

use crate::dtype::DType;
use crate::tensor::Tensor;

/// The elements of a tensor.
pub(super) fn show_all(tensor: &Tensor) -> Vec<String> {
    if let Ok(strings) = tensor.strings() {
        return strings.iter().map(|s| show_bytes(s)).collect();
    }
    let dtype = tensor.dtype();
    let part = part_of(dtype);
    let parts: Vec<String> = tensor.bytes().chunks_exact(part.size_in_memory()).map(|c| show_part(part, c)).collect();
    if part == dtype {
        return parts;
    }
    parts.chunks_exact(2).map(|pair| format!("({}, {})", pair[0], pair[1])).collect()
}

/// What an element consists of: a complex number of two floats.
pub(super) fn part_of(dtype: DType) -> DType {
    match dtype {
        DType::Complex64 => DType::F32,
        DType::Complex128 => DType::F64,
        other => other,
    }
}

fn show_part(dtype: DType, bytes: &[u8]) -> String {
    let Ok(one) = Tensor::from_bytes(dtype, &[], bytes) else { return String::new() };
    let decimal = match dtype {
        DType::F64 => one.to_f64().map(|v| format!("{:?}", v[0])),
        DType::F32 => one.to_f64().map(|v| show_float(v[0] as f32)),
        _ if dtype.is_float() => one.to_f64().map(|v| show_short(dtype, v[0], bytes)),
        DType::Bool => one.to_bools().map(|v| v[0].to_string()),
        _ => one.to_i128().map(|v| v[0].to_string()),
    };
    match decimal {
        Ok(text) if read_part(dtype, &text).is_ok_and(|b| b == bytes) => text,
        _ => {
            let mut text = "0x".to_owned();
            for byte in to_big_endian(bytes) {
                // Writing to a string cannot fail.
                let _ = write!(text, "{byte:02x}");
            }
            text
        }
    }
}

/// A float narrower than `f32`: with as few digits as tell it from its neighbours.
fn show_short(dtype: DType, value: f64, bytes: &[u8]) -> String {
    // Nine digits tell any two `f32` apart.
    let rounded = (0..9).map(|digits| format!("{value:.digits$e}").parse().map_or(String::new(), show_float));
    let reads_back = |text: &String| read_part(dtype, text).is_ok_and(|b| b == bytes);
    rounded.into_iter().find(reads_back).unwrap_or_default()
}

fn show_float(value: f32) -> String {
    format!("{value:?}")
}

/// A float attribute, told from an integer by its point, exponent or name.
pub(super) fn show_float_attribute(value: f32) -> String {
    let text = show_float(value);
    match text.parse::<f32>() {
        Ok(again) if again.to_bits() == value.to_bits() => text,
        _ => format!("float(0x{:08x})", value.to_bits()),
    }
}

/// The bytes in memory of one element (or part of a complex one).
pub(super) fn read_part(dtype: DType, text: &str) -> Result<Vec<u8>, String> {
    let refuse = || format!("an element of {dtype}");
    if let Some(hex) = text.strip_prefix("0x").filter(|_| dtype.is_float()) {
        let size = dtype.size_in_memory();
        let code = u128::from_str_radix(hex, 16).map_err(|_| refuse())?.to_be_bytes();
        let (zeros, bytes) = code.split_at(code.len() - size);
        if hex.len() != 2 * size || zeros.iter().any(|b| *b != 0) {
            return Err(refuse());
        }
        return Ok(to_big_endian(bytes));
    }
    match dtype {
        DType::F32 => Ok(text.parse::<f32>().map_err(|_| refuse())?.to_ne_bytes().to_vec()),
        DType::F64 => Ok(text.parse::<f64>().map_err(|_| refuse())?.to_ne_bytes().to_vec()),
        DType::Bool => Ok(vec![u8::from(text.parse::<bool>().map_err(|_| refuse())?)]),
        _ if dtype.is_float() => {
            let value: f64 = text.parse().map_err(|_| refuse())?;
            Ok(Tensor::from_f64(dtype, &[], &[value]).map_err(|e| e.to_string())?.bytes().to_vec())
        }
        _ => {
            let value: i128 = text.parse().map_err(|_| refuse())?;
            let (min, max) = dtype.integer_range().ok_or_else(refuse)?;
            if !(min..=max).contains(&value) {
                return Err(format!("an integer from {min} to {max}"));
            }
            Ok(Tensor::from_i128(dtype, &[], &[value]).map_err(|e| e.to_string())?.bytes().to_vec())
        }
    }
}

/// From memory order to the order of digits, or back.
fn to_big_endian(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    if cfg!(target_endian = "little") {
        out.reverse();
    }
    out
}

/// A string of any bytes.
pub(super) fn show_bytes(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => format!("{text:?}"),
        Err(_) => format!("b\"{}\"", bytes.escape_ascii()),
    }
}

/// The bytes whose `b"..."` form `text` begins with, and the length of that form.
pub(super) fn read_byte_string(text: &str) -> Option<(Vec<u8>, usize)> {
    let body = text.strip_prefix("b\"")?.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    loop {
        let byte = *body.get(at)?;
        at += 1;
        match byte {
            b'"' => return Some((out, at + 2)),
            b'\\' => {
                let escape = *body.get(at)?;
                at += 1;
                out.push(match escape {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'"' | b'\\' | b'\'' => escape,
                    b'x' => {
                        let digits = std::str::from_utf8(body.get(at..at + 2)?).ok()?;
                        at += 2;
                        u8::from_str_radix(digits, 16).ok()?
                    }
                    _ => return None,
                });
            }
            0x20..0x7f => out.push(byte),
            _ => return None,
        }
    }
}
