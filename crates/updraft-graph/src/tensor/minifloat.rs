//! Floating-point numbers of eight, six and four bits, as ONNX defines them
//! (<https://onnx.ai/onnx/technical/float8.html>, <https://onnx.ai/onnx/technical/float4.html>).
//!
//! All of them are a sign, `exponent_bits` and `mantissa_bits`; they differ in bias and in which codes are infinite or
//! not a number. One description drives both directions: decoding is arithmetic on the fields, encoding searches the
//! (at most 128) magnitudes for the nearest, ties to the even code, which is slow and plainly right.

use crate::dtype::DType;

/// What encoding does with a magnitude beyond the largest finite one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// Take the largest finite value (ONNX `saturate = 1`).
    Saturate,
    /// Take infinity where the type has one, else not-a-number (ONNX `saturate = 0`).
    Infinite,
}

struct Format {
    exponent_bits: u32,
    mantissa_bits: u32,
    bias: i32,
    signed: bool,
    /// Magnitude code of infinity.
    infinity: Option<u8>,
    /// Full code of the not-a-number that encoding writes; without the sign bit for the types that have two.
    nan: Option<u8>,
    /// Largest magnitude code that is a finite number.
    finite_max: u8,
}

fn format(dtype: DType) -> Option<Format> {
    let f = |exponent_bits, mantissa_bits, bias, infinity, nan, finite_max| Format {
        exponent_bits,
        mantissa_bits,
        bias,
        signed: true,
        infinity,
        nan,
        finite_max,
    };
    Some(match dtype {
        DType::F8E4M3FN => f(4, 3, 7, None, Some(0x7f), 0x7e),
        DType::F8E4M3FNUZ => f(4, 3, 8, None, Some(0x80), 0x7f),
        DType::F8E5M2 => f(5, 2, 15, Some(0x7c), Some(0x7e), 0x7b),
        DType::F8E5M2FNUZ => f(5, 2, 16, None, Some(0x80), 0x7f),
        DType::F4E2M1 => f(2, 1, 1, None, None, 0x7),
        DType::F6E2M3 => f(2, 3, 1, None, None, 0x1f),
        DType::F6E3M2 => f(3, 2, 3, None, None, 0x1f),
        DType::F8E8M0 => Format { signed: false, ..f(8, 0, 127, None, Some(0xff), 0xfe) },
        _ => return None,
    })
}

/// Whether the type is a float of eight bits or fewer.
pub(super) fn is_minifloat(dtype: DType) -> bool {
    format(dtype).is_some()
}

impl Format {
    /// The value of a magnitude code (no sign bit) that is finite.
    fn magnitude(&self, code: u8) -> f64 {
        let mantissa = f64::from(code & ((1u16 << self.mantissa_bits) - 1) as u8);
        let exponent = i32::from(u16::from(code) >> self.mantissa_bits);
        let unit = f64::from(1u32 << self.mantissa_bits);
        if exponent == 0 && self.signed {
            (mantissa / unit) * f64::powi(2.0, 1 - self.bias)
        } else {
            (1.0 + mantissa / unit) * f64::powi(2.0, exponent - self.bias)
        }
    }

    fn sign_bit(&self) -> u8 {
        if self.signed { 1 << (self.exponent_bits + self.mantissa_bits) } else { 0 }
    }
}

/// The value of one code; not-a-number for a type that is not a minifloat.
pub fn decode(dtype: DType, code: u8) -> f64 {
    let Some(f) = format(dtype) else { return f64::NAN };
    let sign_bit = f.sign_bit();
    let (negative, magnitude) = (code & sign_bit != 0, code & !sign_bit);
    let signed = |v: f64| if negative { -v } else { v };
    if f.nan == Some(code) {
        f64::NAN
    } else if f.infinity == Some(magnitude) {
        signed(f64::INFINITY)
    } else if magnitude > f.finite_max {
        f64::NAN
    } else {
        signed(f.magnitude(magnitude))
    }
}

/// The code nearest to `value`, ties to even; zero for a type that is not a minifloat.
///
/// The types without a negative zero (`...FNUZ`) map it to zero. `F8E8M0` has powers of two only.
pub fn encode(dtype: DType, value: f64, overflow: Overflow) -> u8 {
    let Some(f) = format(dtype) else { return 0 };
    let uz = matches!(dtype, DType::F8E4M3FNUZ | DType::F8E5M2FNUZ);
    let sign = if value.is_sign_negative() { f.sign_bit() } else { 0 };
    if value.is_nan() {
        return match f.nan {
            Some(code) if uz || !f.signed => code,
            Some(code) => code | sign,
            // F4E2M1 has none. ONNX's backend tests expect zero of the other sign, as the package ml_dtypes has it.
            None => sign ^ f.sign_bit(),
        };
    }
    let magnitude = value.abs();
    let largest = f.magnitude(f.finite_max);
    // Half a step past the largest finite value still rounds down to it.
    let step = largest - f.magnitude(f.finite_max - 1);
    let beyond = magnitude.is_infinite() || magnitude >= largest + step / 2.0;
    if beyond {
        return match (overflow, f.infinity, f.nan) {
            (Overflow::Saturate, ..) => f.finite_max | sign,
            (Overflow::Infinite, Some(code), _) => code | sign,
            (Overflow::Infinite, None, Some(code)) if uz || !f.signed => code,
            (Overflow::Infinite, None, Some(code)) => code | sign,
            (Overflow::Infinite, None, None) => f.finite_max | sign,
        };
    }
    let above = (0..=f.finite_max).find(|c| f.magnitude(*c) >= magnitude).unwrap_or(f.finite_max);
    let code = if above == 0 || f.magnitude(above) == magnitude {
        above
    } else {
        let below = above - 1;
        let (down, up) = (magnitude - f.magnitude(below), f.magnitude(above) - magnitude);
        if down < up || (down == up && below % 2 == 0) { below } else { above }
    };
    if code == 0 && uz { 0 } else { code | sign }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_code_survives_decoding_and_encoding() {
        let types = [
            DType::F8E4M3FN,
            DType::F8E4M3FNUZ,
            DType::F8E5M2,
            DType::F8E5M2FNUZ,
            DType::F4E2M1,
            DType::F6E2M3,
            DType::F6E3M2,
            DType::F8E8M0,
        ];
        for dtype in types {
            let codes = 1u32 << dtype.bits().unwrap();
            for code in 0..codes {
                let value = decode(dtype, code as u8);
                if value.is_finite() {
                    assert_eq!(encode(dtype, value, Overflow::Saturate), code as u8, "{dtype} {code:#x} {value}");
                }
            }
        }
    }

    #[test]
    fn the_largest_values_are_those_of_the_onnx_tables() {
        let rows = [
            (DType::F8E4M3FN, 448.0),
            (DType::F8E4M3FNUZ, 240.0),
            (DType::F8E5M2, 57344.0),
            (DType::F8E5M2FNUZ, 57344.0),
            (DType::F4E2M1, 6.0),
            (DType::F6E2M3, 7.5),
            (DType::F6E3M2, 28.0),
        ];
        for (dtype, largest) in rows {
            assert_eq!(decode(dtype, encode(dtype, 1e9, Overflow::Saturate)), largest, "{dtype}");
        }
        assert!(decode(DType::F8E4M3FN, encode(DType::F8E4M3FN, 1e9, Overflow::Infinite)).is_nan());
        assert_eq!(decode(DType::F8E5M2, encode(DType::F8E5M2, -1e9, Overflow::Infinite)), f64::NEG_INFINITY);
    }
}
