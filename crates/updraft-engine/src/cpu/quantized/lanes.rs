//! Float registers that are filled from integers and emptied into bytes.

use crate::cpu::lanes::Lanes;

/// What [`Lanes`] lack for bytes. Every method rounds in the same way on every processor.
///
/// # Safety
/// As for [`Lanes`].
pub(super) trait ByteLanes: Lanes {
    /// The nearest floats of `WIDTH` integers.
    /// # Safety
    /// `from` is valid for reading them.
    unsafe fn from_integers(from: *const i32) -> Self;
    /// Bytes below `end`, after exclusive or with `flip`, as unsigned numbers; zero in the other lanes.
    /// # Safety
    /// These bytes are valid for reading, and `end <= WIDTH`.
    unsafe fn from_bytes(from: *const u8, flip: u8, end: usize) -> Self;
    /// A product that no addition is fused with.
    /// # Safety
    /// See the trait.
    unsafe fn mul(self, factor: Self) -> Self;
    /// The nearest integers, ties to even, of numbers below 2^22.
    /// # Safety
    /// See the trait.
    unsafe fn round(self) -> Self;
    /// Writes, for lanes below `end`, the low byte of the nearest integer, ties to even, plus `addend`. Numbers are below 2^22.
    /// # Safety
    /// These bytes are valid for writing, and `end <= WIDTH`.
    unsafe fn store_bytes(self, addend: i32, to: *mut u8, end: usize);
}

/// Adding it to a float below 2^22 rounds that to an integer, ties to even, which is then in the low bits of the sum:
/// 1.5 * 2^23.
const ROUNDER: f32 = 12_582_912.0;

impl ByteLanes for [f32; 4] {
    #[inline(always)]
    unsafe fn from_integers(from: *const i32) -> Self {
        // SAFETY: the caller's promise; the type has no alignment beyond that of `i32`.
        unsafe { from.cast::<[i32; 4]>().read() }.map(|n| n as f32)
    }
    #[inline(always)]
    unsafe fn from_bytes(from: *const u8, flip: u8, end: usize) -> Self {
        let mut lanes = [0.0; 4];
        for lane in 0..end {
            // SAFETY: the caller's promise, here and below.
            lanes[lane] = f32::from(unsafe { *from.add(lane) } ^ flip);
        }
        lanes
    }
    #[inline(always)]
    unsafe fn mul(self, factor: Self) -> Self {
        std::array::from_fn(|lane| self[lane] * factor[lane])
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        self.map(|x| x + ROUNDER - ROUNDER)
    }
    #[inline(always)]
    unsafe fn store_bytes(self, addend: i32, to: *mut u8, end: usize) {
        let bytes = self.map(|x| ((x + ROUNDER).to_bits() as i32).wrapping_add(addend) as u8);
        for lane in 0..end {
            unsafe { *to.add(lane) = bytes[lane] };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::ByteLanes;
    use std::arch::x86_64::*;

    impl ByteLanes for __m512 {
        #[inline(always)]
        unsafe fn from_integers(from: *const i32) -> Self {
            // SAFETY: the caller's promise, for this and the following functions.
            unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(from.cast())) }
        }
        #[inline(always)]
        unsafe fn from_bytes(from: *const u8, flip: u8, end: usize) -> Self {
            unsafe {
                let bytes = if end == 16 {
                    _mm_loadu_si128(from.cast())
                } else {
                    _mm_maskz_loadu_epi8(((1u32 << end) - 1) as __mmask16, from.cast())
                };
                let bytes = _mm_xor_si128(bytes, _mm_set1_epi8(flip as i8));
                _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
            }
        }
        #[inline(always)]
        unsafe fn mul(self, factor: Self) -> Self {
            unsafe { _mm512_mul_ps(self, factor) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
        }
        #[inline(always)]
        unsafe fn store_bytes(self, addend: i32, to: *mut u8, end: usize) {
            unsafe {
                let integers = _mm512_add_epi32(_mm512_cvtps_epi32(self), _mm512_set1_epi32(addend));
                let bytes = _mm512_cvtepi32_epi8(integers);
                if end == 16 {
                    _mm_storeu_si128(to.cast(), bytes);
                } else {
                    _mm_mask_storeu_epi8(to.cast(), ((1u32 << end) - 1) as __mmask16, bytes);
                }
            }
        }
    }

    impl ByteLanes for __m256 {
        #[inline(always)]
        unsafe fn from_integers(from: *const i32) -> Self {
            unsafe { _mm256_cvtepi32_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn from_bytes(from: *const u8, flip: u8, end: usize) -> Self {
            unsafe {
                let bytes = if end == 8 {
                    from.cast::<[u8; 8]>().read()
                } else {
                    std::array::from_fn(|lane| if lane < end { *from.add(lane) } else { 0 })
                };
                let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(bytes));
                let bytes = _mm_xor_si128(bytes, _mm_set1_epi8(flip as i8));
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))
            }
        }
        #[inline(always)]
        unsafe fn mul(self, factor: Self) -> Self {
            unsafe { _mm256_mul_ps(self, factor) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
        }
        #[inline(always)]
        unsafe fn store_bytes(self, addend: i32, to: *mut u8, end: usize) {
            unsafe {
                let integers = _mm256_add_epi32(_mm256_cvtps_epi32(self), _mm256_set1_epi32(addend));
                // The low byte of each lane, then those of both halves together.
                let order = _mm256_setr_epi8(
                    0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1,
                    -1, -1, -1, -1, -1, -1,
                );
                let quads = _mm256_shuffle_epi8(integers, order);
                let bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256::<1>(quads));
                let bytes = _mm_cvtsi128_si64(bytes).to_le_bytes();
                if end == 8 {
                    to.cast::<[u8; 8]>().write(bytes);
                } else {
                    for lane in 0..end {
                        *to.add(lane) = bytes[lane];
                    }
                }
            }
        }
    }
}
