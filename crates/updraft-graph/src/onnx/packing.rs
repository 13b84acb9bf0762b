//! Elements as files store them: little-endian, and narrower than a byte packed from the lowest bit up.
//!
//! ONNX packs four elements of 2 bits, two of 4 bits, or four of 6 bits (into three bytes). All three are one rule:
//! a stream of bits, least significant first, whose last byte is filled with zeros.

use std::borrow::Cow;

use crate::dtype::DType;
use crate::tensor::{Tensor, TensorError, element_count};

/// Bytes that `count` elements take in a file; `None` for strings and where the number overflows.
pub(super) fn packed_len(dtype: DType, count: usize) -> Option<usize> {
    Some(count.checked_mul(dtype.bits()?)?.div_ceil(8))
}

/// The elements of a tensor as files store them; empty for strings.
pub fn to_little_endian(tensor: &Tensor) -> Vec<u8> {
    let dtype = tensor.dtype();
    match dtype.bits() {
        Some(bits @ (2 | 4 | 6)) => {
            let mut out = vec![0u8; (tensor.len() * bits).div_ceil(8)];
            let mask = (1u16 << bits) - 1;
            for (i, code) in tensor.bytes().iter().enumerate() {
                let (byte, shift) = (i * bits / 8, i * bits % 8);
                let wide = (u16::from(*code) & mask) << shift;
                out[byte] |= wide as u8;
                if shift + bits > 8 {
                    out[byte + 1] |= (wide >> 8) as u8;
                }
            }
            out
        }
        _ => swap_on_big_endian(dtype, tensor.bytes()).into_owned(),
    }
}

/// A tensor from elements as files store them.
///
/// # Errors
/// A number of bytes other than the shape's, strings, and a `bool` that is neither 0 nor 1.
pub fn from_little_endian(dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Tensor, TensorError> {
    let too_large = || TensorError::TooLarge { shape: shape.to_vec(), dtype };
    let count = element_count(shape).ok_or_else(too_large)?;
    let Some(bits @ (2 | 4 | 6)) = dtype.bits() else {
        if let Some(found) = bytes.iter().find(|b| **b > 1 && dtype == DType::Bool) {
            return Err(TensorError::Bool { found: *found });
        }
        return Tensor::from_bytes(dtype, shape, &swap_on_big_endian(dtype, bytes));
    };
    let expected = packed_len(dtype, count).ok_or_else(too_large)?;
    if bytes.len() != expected {
        return Err(TensorError::Length {
            shape: shape.to_vec(),
            dtype,
            expected: count,
            found: bytes.len() * 8 / bits,
        });
    }
    let mut codes = Vec::with_capacity(count);
    for i in 0..count {
        let (byte, shift) = (i * bits / 8, i * bits % 8);
        let high = if shift + bits > 8 { u16::from(bytes[byte + 1]) << 8 } else { 0 };
        let code = (((u16::from(bytes[byte]) | high) >> shift) & ((1 << bits) - 1)) as u8;
        codes.push(sign_extend(dtype, code));
    }
    Tensor::from_bytes(dtype, shape, &codes)
}

/// A code of fewer than eight bits as a tensor keeps it: signed integers as the byte of the same value.
pub(super) fn sign_extend(dtype: DType, code: u8) -> u8 {
    match dtype {
        DType::I4 => (((code << 4) as i8) >> 4) as u8,
        DType::I2 => (((code << 6) as i8) >> 6) as u8,
        _ => code,
    }
}

fn swap_on_big_endian(dtype: DType, bytes: &[u8]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        return Cow::Borrowed(bytes);
    }
    let number_bytes = match dtype {
        DType::Complex64 => 4,
        DType::Complex128 => 8,
        _ => dtype.size_in_memory().max(1),
    };
    let mut out = bytes.to_vec();
    out.chunks_exact_mut(number_bytes).for_each(<[u8]>::reverse);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of `onnx.proto`'s comments on `raw_data`.
    #[test]
    fn narrow_elements_are_packed_from_the_lowest_bit() {
        let rows: [(DType, &[u8], &[u8]); 4] = [
            (DType::U4, &[1, 2, 3], &[0x21, 0x03]),
            (DType::I4, &[0xff, 0x07, 0xf8], &[0x7f, 0x08]),
            (DType::U2, &[1, 2, 3, 0, 2], &[1 | 2 << 2 | 3 << 4, 2]),
            (
                DType::F6E2M3,
                &[0x3f, 0x01, 0x2a, 0x15, 0x33],
                &[0x3f | 1 << 6, (0xa << 4), (0x2a >> 4) | 0x15 << 2, 0x33],
            ),
        ];
        for (dtype, codes, packed) in rows {
            let tensor = Tensor::from_bytes(dtype, &[codes.len()], codes).unwrap();
            assert_eq!(to_little_endian(&tensor), packed, "{dtype}");
            assert_eq!(from_little_endian(dtype, &[codes.len()], packed).unwrap(), tensor, "{dtype}");
            assert!(from_little_endian(dtype, &[codes.len()], &packed[1..]).is_err(), "{dtype}");
        }
    }
}
