//! Numbers of other types in and out of the `f32` registers of a [`Program`](crate::cpu::elementwise::Program).
//!
//! Integers of up to 16 bits are exact in `f32`; those of 32 bits are rounded to nearest, as a cast is. Programs store
//! only what such a type can hold: codes have been rounded and clamped before.

use updraft_graph::DType;

use crate::cpu::isa::dispatch;

/// Element types of what programs read and write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    Bool,
    U8,
    I8,
    U16,
    I16,
    I32,
}

impl Kind {
    /// The kind of a type, where programs know it.
    pub(crate) fn of(dtype: DType) -> Option<Kind> {
        Some(match dtype {
            DType::F32 => Kind::F32,
            DType::Bool => Kind::Bool,
            DType::U8 => Kind::U8,
            DType::I8 => Kind::I8,
            DType::U16 => Kind::U16,
            DType::I16 => Kind::I16,
            DType::I32 => Kind::I32,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        match self {
            Kind::Bool | Kind::U8 | Kind::I8 => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::F32 | Kind::I32 => 4,
        }
    }

    /// Reads `out.len()` elements from element `offset` on, `stride` elements apart.
    ///
    /// # Safety
    /// `from` must point to elements of this kind, aligned, that reach as far.
    pub(crate) unsafe fn read(self, from: *const u8, offset: usize, stride: usize, out: &mut [f32]) {
        let from = from.wrapping_add(offset * self.bytes());
        macro_rules! numbers {
            ($ty:ty, $widen:ident) => {{
                let from = from.cast::<$ty>();
                // SAFETY: by the caller's promise.
                unsafe {
                    match stride {
                        0 => out.fill(*from as f32),
                        1 => $widen(std::slice::from_raw_parts(from, out.len()), out),
                        stride => out.iter_mut().enumerate().for_each(|(i, to)| *to = *from.add(i * stride) as f32),
                    }
                }
            }};
        }
        match self {
            Kind::F32 => numbers!(f32, copy),
            Kind::U8 => numbers!(u8, widen_u8),
            Kind::I8 => numbers!(i8, widen_i8),
            Kind::U16 => numbers!(u16, widen_u16),
            Kind::I16 => numbers!(i16, widen_i16),
            Kind::I32 => numbers!(i32, widen_i32),
            Kind::Bool => out.iter_mut().enumerate().for_each(|(i, to)| {
                // SAFETY: by the caller's promise.
                *to = f32::from(u8::from(unsafe { *from.add(i * stride) } != 0));
            }),
        }
    }

    /// Writes numbers that this kind can hold, from element `offset` on. The source may be the destination.
    ///
    /// # Safety
    /// `to` must point to as many elements of this kind, aligned; of kinds other than `f32`, apart from the source.
    pub(crate) unsafe fn write(self, from: *const f32, count: usize, to: *mut u8, offset: usize) {
        let to = to.wrapping_add(offset * self.bytes());
        macro_rules! numbers {
            ($ty:ty, $narrow:ident) => {
                // SAFETY: by the caller's promise.
                unsafe {
                    $narrow(
                        std::slice::from_raw_parts(from, count),
                        std::slice::from_raw_parts_mut(to.cast::<$ty>(), count),
                    )
                }
            };
        }
        match self {
            // SAFETY: by the caller's promise.
            Kind::F32 => unsafe { std::ptr::copy(from, to.cast::<f32>(), count) },
            Kind::Bool => numbers!(u8, truths),
            Kind::U8 => numbers!(u8, narrow_u8),
            Kind::I8 => numbers!(i8, narrow_i8),
            Kind::U16 => numbers!(u16, narrow_u16),
            Kind::I16 => numbers!(i16, narrow_i16),
            Kind::I32 => numbers!(i32, narrow_i32),
        }
    }
}

fn copy(from: &[f32], to: &mut [f32]) {
    to.copy_from_slice(from);
}

fn truths(from: &[f32], to: &mut [u8]) {
    to.iter_mut().zip(from).for_each(|(to, v)| *to = u8::from(*v != 0.0));
}

macro_rules! conversions {
    ($($ty:ty, $widen:ident, $widen_body:ident, $narrow:ident, $narrow_body:ident;)*) => {$(
        dispatch!(fn $widen(from: &[$ty], to: &mut [f32]) = $widen_body);

        #[inline(always)]
        fn $widen_body<const FMA: bool>(from: &[$ty], to: &mut [f32]) {
            for (to, v) in to.iter_mut().zip(from) {
                *to = *v as f32;
            }
        }

        dispatch!(fn $narrow(from: &[f32], to: &mut [$ty]) = $narrow_body);

        #[inline(always)]
        fn $narrow_body<const FMA: bool>(from: &[f32], to: &mut [$ty]) {
            for (to, v) in to.iter_mut().zip(from) {
                // Saturates first, so that the second conversion may truncate: one instruction in vector code.
                let v = if *v > -2_147_483_648.0 { *v } else { -2_147_483_648.0 };
                let v = if v < 2_147_483_520.0 { v } else { 2_147_483_520.0 };
                // SAFETY: the number is inside the range of `i32`.
                *to = unsafe { v.to_int_unchecked::<i32>() } as $ty;
            }
        }
    )*};
}

conversions! {
    u8, widen_u8, widen_u8_body, narrow_u8, narrow_u8_body;
    i8, widen_i8, widen_i8_body, narrow_i8, narrow_i8_body;
    u16, widen_u16, widen_u16_body, narrow_u16, narrow_u16_body;
    i16, widen_i16, widen_i16_body, narrow_i16, narrow_i16_body;
    i32, widen_i32, widen_i32_body, narrow_i32, narrow_i32_body;
}
