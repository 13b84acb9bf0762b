//! Four products of bytes at a time, added to an `i32`, for sixteen output channels at once.
//!
//! All instruction sets read the same order of bytes: four activations, and for each of sixteen channels the four
//! weights they are multiplied with. VNNI has one instruction for it. AVX2 widens to 16 bits, the even and the odd bytes
//! apart, and multiplies and adds pairs; its own product of bytes (`vpmaddubsw`) would be quicker, but its sums of
//! pairs saturate at 16 bits, and we are exact.

use std::sync::OnceLock;

use crate::cpu::isa::Isa;

/// What the processor can do with bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DotIsa {
    Portable,
    /// AVX2.
    Avx2,
    /// AVX2 and AVX-VNNI.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
}

impl DotIsa {
    /// The best one of this processor.
    pub(super) fn detected() -> DotIsa {
        static ISA: OnceLock<DotIsa> = OnceLock::new();
        *ISA.get_or_init(|| {
            let best_first = [DotIsa::Avx512Vnni, DotIsa::AvxVnni, DotIsa::Avx2];
            best_first.into_iter().find(|isa| isa.is_there()).unwrap_or(DotIsa::Portable)
        })
    }

    /// Whether the processor has it.
    pub(super) fn is_there(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            match self {
                DotIsa::Portable => true,
                DotIsa::Avx2 => avx2,
                DotIsa::AvxVnni => avx2 && is_x86_feature_detected!("avxvnni"),
                DotIsa::Avx512Vnni => {
                    avx2 && is_x86_feature_detected!("avx512f")
                        && is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("avx512dq")
                        && is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("avx512vnni")
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == DotIsa::Portable
        }
    }

    /// The registers of floats that go with it.
    pub(super) fn floats(self) -> Isa {
        match self {
            DotIsa::Portable => Isa::Portable,
            DotIsa::Avx2 | DotIsa::AvxVnni => Isa::Avx2,
            DotIsa::Avx512Vnni => Isa::Avx512,
        }
    }

    /// Sixteens of channels that one block of results is wide, at most.
    pub(super) fn vectors_max(self) -> usize {
        match self {
            DotIsa::Avx512Vnni => 4,
            _ => 1,
        }
    }

    /// Rows of results that stay in registers together with so many sixteens of channels.
    pub(super) fn rows_max(self, vectors: usize) -> usize {
        match (self, vectors) {
            (DotIsa::Avx512Vnni, 4) => 6,
            (DotIsa::Avx512Vnni, _) => 8,
            (DotIsa::AvxVnni, _) => 6,
            (DotIsa::Avx2, _) => 4,
            (DotIsa::Portable, _) => 2,
        }
    }
}

/// Channels of one register of sums.
pub(super) const LANES: usize = 16;

/// Activations that one instruction multiplies with the weights of a channel.
pub(super) const GROUP: usize = 4;

/// Bytes of the weights of [`LANES`] channels for one group of activations: a cache line.
pub(super) const LINE: usize = LANES * GROUP;

/// Sums for [`LANES`] channels and the products that go into them.
///
/// # Safety
/// The methods may be called only where the processor has the instruction set of the implementing type, with pointers
/// that are valid for as many numbers as are named.
pub(super) trait Dot {
    /// A sum for each channel.
    type Sums: Copy;
    /// Four activations, the same for every channel.
    type Group: Copy;
    /// Four activations for each channel.
    type Each: Copy;
    /// Four weights for each channel.
    type Weights: Copy;

    /// # Safety
    /// Reads [`LANES`] sums.
    unsafe fn load(from: *const i32) -> Self::Sums;
    /// # Safety
    /// Writes [`LANES`] sums.
    unsafe fn store(sums: Self::Sums, to: *mut i32);
    /// # Safety
    /// Reads [`GROUP`] bytes.
    unsafe fn group(from: *const u8) -> Self::Group;
    /// # Safety
    /// Reads [`LINE`] bytes.
    unsafe fn each(from: *const u8) -> Self::Each;
    /// # Safety
    /// Reads [`LINE`] weights.
    unsafe fn weights(from: *const i8) -> Self::Weights;
    /// `sums[c] + Σ_j group[j] * weights[c][j]`, modulo 2^32.
    /// # Safety
    /// See the trait.
    unsafe fn dot(sums: Self::Sums, group: Self::Group, weights: Self::Weights) -> Self::Sums;
    /// `sums[c] + Σ_j each[c][j] * weights[c][j]`, modulo 2^32.
    /// # Safety
    /// See the trait.
    unsafe fn dot_each(sums: Self::Sums, each: Self::Each, weights: Self::Weights) -> Self::Sums;
    /// `to[c][j] = from[j][c] ^ flip`.
    /// # Safety
    /// Reads [`LANES`] bytes from each pointer and writes [`LINE`].
    unsafe fn interleave(from: [*const u8; GROUP], flip: u8, to: *mut u8);
}

/// Plain loops, which any compiler makes vectors of: four products and their sum are below 2^24, hence exact in floats,
/// and every processor multiplies floats.
pub(super) struct Portable;

/// `term[j][c]`, the term `j` of channel `c`.
type Terms = [[f32; LANES]; GROUP];

#[inline(always)]
fn add_products(mut sums: [i32; LANES], x: impl Fn(usize, usize) -> f32, weights: &Terms) -> [i32; LANES] {
    for c in 0..LANES {
        let products =
            x(0, c) * weights[0][c] + x(1, c) * weights[1][c] + x(2, c) * weights[2][c] + x(3, c) * weights[3][c];
        // SAFETY: an integer of at most 4 * 255 * 128.
        sums[c] = sums[c].wrapping_add(unsafe { products.to_int_unchecked::<i32>() });
    }
    sums
}

impl Dot for Portable {
    type Sums = [i32; LANES];
    type Group = [f32; GROUP];
    type Each = Terms;
    type Weights = Terms;

    #[inline(always)]
    unsafe fn load(from: *const i32) -> Self::Sums {
        // SAFETY: the caller's promise, here and below; none of these types has an alignment beyond its numbers'.
        unsafe { from.cast::<[i32; LANES]>().read() }
    }
    #[inline(always)]
    unsafe fn store(sums: Self::Sums, to: *mut i32) {
        // SAFETY: as above.
        unsafe { to.cast::<[i32; LANES]>().write(sums) }
    }
    #[inline(always)]
    unsafe fn group(from: *const u8) -> Self::Group {
        // SAFETY: as above.
        unsafe { from.cast::<[u8; GROUP]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn each(from: *const u8) -> Self::Each {
        // SAFETY: as above.
        let groups = unsafe { from.cast::<[[u8; GROUP]; LANES]>().read() };
        let groups = groups.map(u32::from_le_bytes);
        std::array::from_fn(|term| groups.map(|group| (group >> (8 * term) & 0xff) as i32 as f32))
    }
    #[inline(always)]
    unsafe fn weights(from: *const i8) -> Self::Weights {
        // SAFETY: as above.
        let groups = unsafe { from.cast::<[[u8; GROUP]; LANES]>().read() };
        let groups = groups.map(i32::from_le_bytes);
        std::array::from_fn(|term| groups.map(|group| (group << (24 - 8 * term) >> 24) as f32))
    }
    #[inline(always)]
    unsafe fn dot(sums: Self::Sums, group: Self::Group, weights: Self::Weights) -> Self::Sums {
        add_products(sums, |term, _| group[term], &weights)
    }
    #[inline(always)]
    unsafe fn dot_each(sums: Self::Sums, each: Self::Each, weights: Self::Weights) -> Self::Sums {
        add_products(sums, |term, channel| each[term][channel], &weights)
    }
    #[inline(always)]
    unsafe fn interleave(from: [*const u8; GROUP], flip: u8, to: *mut u8) {
        for channel in 0..LANES {
            // SAFETY: the caller's promise.
            unsafe {
                let group = [0, 1, 2, 3].map(|j: usize| *from[j].add(channel) ^ flip);
                to.add(channel * GROUP).cast::<[u8; GROUP]>().write(group);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    //! The kernels' registers on x86-64. Every method is as unsafe as the trait says: the processor has the
    //! instruction set and pointers are valid.

    use super::{Dot, GROUP};
    use std::arch::x86_64::*;

    /// 512-bit registers and `vpdpbusd`.
    pub(in super::super) struct Avx512Vnni;

    impl Dot for Avx512Vnni {
        type Sums = __m512i;
        type Group = __m512i;
        type Each = __m512i;
        type Weights = __m512i;

        #[inline(always)]
        unsafe fn load(from: *const i32) -> __m512i {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store(sums: __m512i, to: *mut i32) {
            unsafe { _mm512_storeu_si512(to.cast(), sums) }
        }
        #[inline(always)]
        unsafe fn group(from: *const u8) -> __m512i {
            unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }
        #[inline(always)]
        unsafe fn each(from: *const u8) -> __m512i {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn weights(from: *const i8) -> __m512i {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn dot(sums: __m512i, group: __m512i, weights: __m512i) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(sums, group, weights) }
        }
        #[inline(always)]
        unsafe fn dot_each(sums: __m512i, each: __m512i, weights: __m512i) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(sums, each, weights) }
        }
        #[inline(always)]
        unsafe fn interleave(from: [*const u8; GROUP], flip: u8, to: *mut u8) {
            unsafe {
                let quarter = |j: usize| _mm_loadu_si128(from[j].cast());
                let rows = _mm512_castsi128_si512(quarter(0));
                let rows = _mm512_inserti32x4::<1>(rows, quarter(1));
                let rows = _mm512_inserti32x4::<2>(rows, quarter(2));
                let rows = _mm512_inserti32x4::<3>(rows, quarter(3));
                // Four channels of all four rows into each quarter, then channel by channel.
                let quads = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                let rows = _mm512_permutexvar_epi32(quads, rows);
                let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                let rows = _mm512_shuffle_epi8(rows, _mm512_broadcast_i32x4(order));
                _mm512_storeu_si512(to.cast(), _mm512_xor_si512(rows, _mm512_set1_epi8(flip as i8)));
            }
        }
    }

    #[inline(always)]
    unsafe fn halves_load(from: *const u8) -> [__m256i; 2] {
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }

    #[inline(always)]
    unsafe fn halves_store(halves: [__m256i; 2], to: *mut u8) {
        unsafe {
            _mm256_storeu_si256(to.cast(), halves[0]);
            _mm256_storeu_si256(to.add(32).cast(), halves[1]);
        }
    }

    #[inline(always)]
    unsafe fn interleave_by_unpacking(from: [*const u8; GROUP], flip: u8, to: *mut u8) {
        unsafe {
            let flip = _mm_set1_epi8(flip as i8);
            let [a, b, c, d] = from.map(|from| _mm_xor_si128(_mm_loadu_si128(from.cast()), flip));
            let (ab_low, ab_high) = (_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b));
            let (cd_low, cd_high) = (_mm_unpacklo_epi8(c, d), _mm_unpackhi_epi8(c, d));
            let to = to.cast::<__m128i>();
            _mm_storeu_si128(to, _mm_unpacklo_epi16(ab_low, cd_low));
            _mm_storeu_si128(to.add(1), _mm_unpackhi_epi16(ab_low, cd_low));
            _mm_storeu_si128(to.add(2), _mm_unpacklo_epi16(ab_high, cd_high));
            _mm_storeu_si128(to.add(3), _mm_unpackhi_epi16(ab_high, cd_high));
        }
    }

    /// 256-bit registers and `vpdpbusd` in its VEX form.
    pub(in super::super) struct AvxVnni;

    impl Dot for AvxVnni {
        type Sums = [__m256i; 2];
        type Group = __m256i;
        type Each = [__m256i; 2];
        type Weights = [__m256i; 2];

        #[inline(always)]
        unsafe fn load(from: *const i32) -> [__m256i; 2] {
            unsafe { halves_load(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store(sums: [__m256i; 2], to: *mut i32) {
            unsafe { halves_store(sums, to.cast()) }
        }
        #[inline(always)]
        unsafe fn group(from: *const u8) -> __m256i {
            unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }
        #[inline(always)]
        unsafe fn each(from: *const u8) -> [__m256i; 2] {
            unsafe { halves_load(from) }
        }
        #[inline(always)]
        unsafe fn weights(from: *const i8) -> [__m256i; 2] {
            unsafe { halves_load(from.cast()) }
        }
        #[inline(always)]
        unsafe fn dot(sums: [__m256i; 2], group: __m256i, weights: [__m256i; 2]) -> [__m256i; 2] {
            unsafe { Self::dot_each(sums, [group, group], weights) }
        }
        #[inline(always)]
        unsafe fn dot_each(sums: [__m256i; 2], each: [__m256i; 2], weights: [__m256i; 2]) -> [__m256i; 2] {
            unsafe {
                [
                    _mm256_dpbusd_avx_epi32(sums[0], each[0], weights[0]),
                    _mm256_dpbusd_avx_epi32(sums[1], each[1], weights[1]),
                ]
            }
        }
        #[inline(always)]
        unsafe fn interleave(from: [*const u8; GROUP], flip: u8, to: *mut u8) {
            unsafe { interleave_by_unpacking(from, flip, to) }
        }
    }

    /// The even and the odd bytes of a register, as 16-bit numbers.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Wide {
        even: __m256i,
        odd: __m256i,
    }

    #[inline(always)]
    unsafe fn wide_unsigned(bytes: __m256i) -> Wide {
        unsafe { Wide { even: _mm256_and_si256(bytes, _mm256_set1_epi16(0xff)), odd: _mm256_srli_epi16::<8>(bytes) } }
    }

    #[inline(always)]
    unsafe fn wide_signed(bytes: __m256i) -> Wide {
        unsafe {
            let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(bytes));
            Wide { even, odd: _mm256_srai_epi16::<8>(bytes) }
        }
    }

    #[inline(always)]
    unsafe fn wide_dot(sums: __m256i, x: Wide, weights: Wide) -> __m256i {
        unsafe {
            let sums = _mm256_add_epi32(sums, _mm256_madd_epi16(x.even, weights.even));
            _mm256_add_epi32(sums, _mm256_madd_epi16(x.odd, weights.odd))
        }
    }

    /// 256-bit registers and products of 16-bit numbers.
    pub(in super::super) struct Avx2;

    impl Dot for Avx2 {
        type Sums = [__m256i; 2];
        type Group = Wide;
        type Each = [Wide; 2];
        type Weights = [Wide; 2];

        #[inline(always)]
        unsafe fn load(from: *const i32) -> [__m256i; 2] {
            unsafe { halves_load(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store(sums: [__m256i; 2], to: *mut i32) {
            unsafe { halves_store(sums, to.cast()) }
        }
        #[inline(always)]
        unsafe fn group(from: *const u8) -> Wide {
            unsafe { wide_unsigned(_mm256_set1_epi32(from.cast::<i32>().read_unaligned())) }
        }
        #[inline(always)]
        unsafe fn each(from: *const u8) -> [Wide; 2] {
            unsafe {
                let [low, high] = halves_load(from);
                [wide_unsigned(low), wide_unsigned(high)]
            }
        }
        #[inline(always)]
        unsafe fn weights(from: *const i8) -> [Wide; 2] {
            unsafe {
                let [low, high] = halves_load(from.cast());
                [wide_signed(low), wide_signed(high)]
            }
        }
        #[inline(always)]
        unsafe fn dot(sums: [__m256i; 2], group: Wide, weights: [Wide; 2]) -> [__m256i; 2] {
            unsafe { [wide_dot(sums[0], group, weights[0]), wide_dot(sums[1], group, weights[1])] }
        }
        #[inline(always)]
        unsafe fn dot_each(sums: [__m256i; 2], each: [Wide; 2], weights: [Wide; 2]) -> [__m256i; 2] {
            unsafe { [wide_dot(sums[0], each[0], weights[0]), wide_dot(sums[1], each[1], weights[1])] }
        }
        #[inline(always)]
        unsafe fn interleave(from: [*const u8; GROUP], flip: u8, to: *mut u8) {
            unsafe { interleave_by_unpacking(from, flip, to) }
        }
    }
}

/// Calls `function::<Dot>(arguments)`, an `unsafe fn`, with an instruction set's registers, as
/// [`with_lanes!`](crate::cpu::lanes::with_lanes) does: it is as unsafe as the function, and demands that the processor
/// has the set.
macro_rules! with_dot {
    ($isa:expr, $function:ident ( $($argument:ident : $type:ty),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
        unsafe fn avx512_vnni($($argument: $type),*) {
            // SAFETY: the processor has the set here; the rest is the caller's promise, as below.
            unsafe { $function::<$crate::cpu::quantized::dot::x86::Avx512Vnni>($($argument),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,avxvnni")]
        unsafe fn avx_vnni($($argument: $type),*) {
            // SAFETY: as above.
            unsafe { $function::<$crate::cpu::quantized::dot::x86::AvxVnni>($($argument),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2($($argument: $type),*) {
            // SAFETY: as above.
            unsafe { $function::<$crate::cpu::quantized::dot::x86::Avx2>($($argument),*) }
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::quantized::dot::DotIsa::Avx512Vnni => avx512_vnni($($argument),*),
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::quantized::dot::DotIsa::AvxVnni => avx_vnni($($argument),*),
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::quantized::dot::DotIsa::Avx2 => avx2($($argument),*),
            _ => $function::<$crate::cpu::quantized::dot::Portable>($($argument),*),
        }
    }};
}
pub(super) use with_dot;
