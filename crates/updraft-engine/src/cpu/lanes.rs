//! Vector registers of several instruction sets behind one trait, so that an inner loop is written once.
//!
//! [`isa::dispatch!`](super::isa::dispatch) leaves the choice of registers to the compiler, which suits loops over
//! elements. Where blocks of results must stay in registers, a loop is generic over [`Lanes`] instead, marked
//! `#[inline(always)]`, and instantiated by [`with_lanes!`] inside one function per instruction set that carries the
//! `target_feature`: inlining brings intrinsics and loop together, which is what makes them single instructions.

/// A vector register of `f32`.
///
/// # Safety
/// The methods may be called only where the processor has the instruction set of the implementing type.
pub(crate) trait Lanes: Copy {
    /// How many numbers it holds; at most [`LANES_MAX`].
    const WIDTH: usize;

    /// # Safety
    /// `from` is valid for reading `WIDTH` numbers.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// `to` is valid for writing `WIDTH` numbers.
    unsafe fn store(self, to: *mut f32);
    /// # Safety
    /// See the trait.
    unsafe fn splat(value: f32) -> Self;
    /// `self * factor + addend`, rounded once where the instruction set can.
    /// # Safety
    /// See the trait.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Lanes from `first` to `end`; zero in the others, which are not read.
    /// # Safety
    /// These lanes of `from` are valid for reading, and `first <= end <= WIDTH`.
    unsafe fn load_part(from: *const f32, first: usize, end: usize) -> Self;
    /// As [`Lanes::load_part`], but lane `l` is number `2 * l` of `from`.
    /// # Safety
    /// These numbers are valid for reading, and `first <= end <= WIDTH`.
    unsafe fn load_even_part(from: *const f32, first: usize, end: usize) -> Self;
    /// Writes the lanes below `end`.
    /// # Safety
    /// `to` is valid for writing `end <= WIDTH` numbers.
    unsafe fn store_part(self, to: *mut f32, end: usize);
    /// Writes lane `l` below `end` to number `2 * l`, and leaves what is between.
    /// # Safety
    /// These numbers are valid for writing, and `end <= WIDTH`.
    unsafe fn store_even_part(self, to: *mut f32, end: usize);
    /// # Safety
    /// See the trait.
    unsafe fn add(self, other: Self) -> Self;
    /// `limit` where a lane is less; NaN stays.
    /// # Safety
    /// See the trait.
    unsafe fn at_least(self, limit: Self) -> Self;
    /// `limit` where a lane is greater; NaN stays.
    /// # Safety
    /// See the trait.
    unsafe fn at_most(self, limit: Self) -> Self;
    /// The sum of all lanes, in a fixed order.
    /// # Safety
    /// See the trait.
    unsafe fn sum(self) -> f32;
}

/// The widest [`Lanes::WIDTH`]: buffers that are read a register at a time carry this much slack.
pub(crate) const LANES_MAX: usize = 16;

/// Sums a power of two of numbers by halves.
#[inline(always)]
fn sum_by_halves<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut width = N / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

impl Lanes for [f32; 4] {
    const WIDTH: usize = 4;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise; the type has no alignment beyond that of `f32`.
        unsafe { from.cast::<[f32; 4]>().read() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as above.
        unsafe { to.cast::<[f32; 4]>().write(self) }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; 4]
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        std::array::from_fn(|lane| self[lane] * factor[lane] + addend[lane])
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, first: usize, end: usize) -> Self {
        let mut lanes = [0.0; 4];
        for lane in first..end {
            // SAFETY: the caller's promise, here and in the next three.
            lanes[lane] = unsafe { *from.wrapping_add(lane) };
        }
        lanes
    }
    #[inline(always)]
    unsafe fn load_even_part(from: *const f32, first: usize, end: usize) -> Self {
        let mut lanes = [0.0; 4];
        for lane in first..end {
            lanes[lane] = unsafe { *from.wrapping_add(2 * lane) };
        }
        lanes
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, end: usize) {
        for lane in 0..end {
            unsafe { *to.add(lane) = self[lane] };
        }
    }
    #[inline(always)]
    unsafe fn store_even_part(self, to: *mut f32, end: usize) {
        for lane in 0..end {
            unsafe { *to.add(2 * lane) = self[lane] };
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] + other[lane])
    }
    #[inline(always)]
    unsafe fn at_least(self, limit: Self) -> Self {
        std::array::from_fn(|lane| if self[lane] < limit[lane] { limit[lane] } else { self[lane] })
    }
    #[inline(always)]
    unsafe fn at_most(self, limit: Self) -> Self {
        std::array::from_fn(|lane| if self[lane] > limit[lane] { limit[lane] } else { self[lane] })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        sum_by_halves(self)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, sum_by_halves};
    use std::arch::x86_64::*;

    /// A mask of the lanes from `first` to `end` of 16.
    #[inline(always)]
    fn lanes_mask(first: usize, end: usize) -> __mmask16 {
        ((1u32 << end) - (1u32 << first)) as __mmask16
    }

    /// Bit `2 * l` for each bit `l` of 8.
    #[inline(always)]
    fn spread_mask(mask: __mmask16) -> __mmask16 {
        let mask = (mask | mask << 4) & 0x0f0f;
        let mask = (mask | mask << 2) & 0x3333;
        (mask | mask << 1) & 0x5555
    }

    impl Lanes for __m512 {
        const WIDTH: usize = 16;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller's promise, for this and the following functions.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, factor, addend) }
        }
        #[inline(always)]
        unsafe fn load_part(from: *const f32, first: usize, end: usize) -> Self {
            unsafe { _mm512_maskz_loadu_ps(lanes_mask(first, end), from) }
        }
        #[inline(always)]
        unsafe fn load_even_part(from: *const f32, first: usize, end: usize) -> Self {
            unsafe {
                let mask = lanes_mask(first, end);
                let low = _mm512_maskz_loadu_ps(spread_mask(mask & 0xff), from);
                let high = _mm512_maskz_loadu_ps(spread_mask(mask >> 8), from.wrapping_add(16));
                let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                _mm512_permutex2var_ps(low, even, high)
            }
        }
        #[inline(always)]
        unsafe fn store_part(self, to: *mut f32, end: usize) {
            unsafe { _mm512_mask_storeu_ps(to, lanes_mask(0, end), self) }
        }
        #[inline(always)]
        unsafe fn store_even_part(self, to: *mut f32, end: usize) {
            unsafe {
                let mask = lanes_mask(0, end);
                let low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
                let high = _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
                _mm512_mask_storeu_ps(to, spread_mask(mask & 0xff), _mm512_permutexvar_ps(low, self));
                let to = to.wrapping_add(16);
                _mm512_mask_storeu_ps(to, spread_mask(mask >> 8), _mm512_permutexvar_ps(high, self));
            }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm512_add_ps(self, other) }
        }
        // The instructions give their second operand where either is NaN.
        #[inline(always)]
        unsafe fn at_least(self, limit: Self) -> Self {
            unsafe { _mm512_max_ps(limit, self) }
        }
        #[inline(always)]
        unsafe fn at_most(self, limit: Self) -> Self {
            unsafe { _mm512_min_ps(limit, self) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self)));
                _mm256_add_ps(_mm512_castps512_ps256(self), high).sum()
            }
        }
    }

    /// All bits of the lanes from `first` to `end` of 8.
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn lanes_mask_256(first: usize, end: usize) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let from_first = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first as i32 - 1));
            _mm256_and_si256(from_first, _mm256_cmpgt_epi32(_mm256_set1_epi32(end as i32), lane))
        }
    }

    impl Lanes for __m256 {
        const WIDTH: usize = 8;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller's promise, for this and the following functions.
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, factor, addend) }
        }
        #[inline(always)]
        unsafe fn load_part(from: *const f32, first: usize, end: usize) -> Self {
            unsafe { _mm256_maskload_ps(from, lanes_mask_256(first, end)) }
        }
        #[inline(always)]
        unsafe fn load_even_part(from: *const f32, first: usize, end: usize) -> Self {
            let mut lanes = [0.0; 8];
            for lane in first..end {
                lanes[lane] = unsafe { *from.wrapping_add(2 * lane) };
            }
            unsafe { Self::load(lanes.as_ptr()) }
        }
        // Masked stores of this set are slow on some processors.
        #[inline(always)]
        unsafe fn store_part(self, to: *mut f32, end: usize) {
            let mut lanes = [0.0; 8];
            unsafe { self.store(lanes.as_mut_ptr()) };
            for lane in 0..end {
                unsafe { *to.add(lane) = lanes[lane] };
            }
        }
        #[inline(always)]
        unsafe fn store_even_part(self, to: *mut f32, end: usize) {
            let mut lanes = [0.0; 8];
            unsafe { self.store(lanes.as_mut_ptr()) };
            for lane in 0..end {
                unsafe { *to.add(2 * lane) = lanes[lane] };
            }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm256_add_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn at_least(self, limit: Self) -> Self {
            unsafe { _mm256_max_ps(limit, self) }
        }
        #[inline(always)]
        unsafe fn at_most(self, limit: Self) -> Self {
            unsafe { _mm256_min_ps(limit, self) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let quad = _mm_add_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
                let mut lanes = [0.0; 4];
                _mm_storeu_ps(lanes.as_mut_ptr(), quad);
                sum_by_halves(lanes)
            }
        }
    }
}

/// Calls `function::<Lanes>(arguments)`, an `unsafe fn`, with the registers of an instruction set:
/// `with_lanes!(isa, function(argument: type, ...))`.
///
/// It is as unsafe as the function, and demands that the processor has the set.
macro_rules! with_lanes {
    ($isa:expr, $function:ident ( $($argument:ident : $type:ty),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn avx512($($argument: $type),*) {
            // SAFETY: the processor has AVX-512 here; the rest is the caller's promise.
            unsafe { $function::<std::arch::x86_64::__m512>($($argument),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2($($argument: $type),*) {
            // SAFETY: the processor has AVX2 and FMA here; the rest is the caller's promise.
            unsafe { $function::<std::arch::x86_64::__m256>($($argument),*) }
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::isa::Isa::Avx512 => avx512($($argument),*),
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::isa::Isa::Avx2 => avx2($($argument),*),
            _ => $function::<[f32; 4]>($($argument),*),
        }
    }};
}
pub(crate) use with_lanes;
