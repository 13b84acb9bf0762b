//! Functions of one `f32` that compilers can vectorise: no branches, no calls, no tables.
//!
//! Each reduces its argument to a short interval and evaluates a polynomial there, whose coefficients are a weighted
//! minimax fit made for this file. Error bounds are stated for each and tested over a sweep against `libm` in `f64`.
//! Not-a-number in gives not-a-number out.

use crate::cpu::isa::multiply_add;

/// The polynomial with these coefficients, constant first.
#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    let mut i = N - 1;
    while i > 0 {
        i -= 1;
        sum = multiply_add::<FMA>(sum, x, coefficients[i]);
    }
    sum
}

/// e to the power of x, within 2 units in the last place; results below the least normal number become 0.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 88.8 { 88.8 } else { x };
    let clamped = if clamped < -87.4 { -87.4 } else { clamped };
    let shifted = multiply_add::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, the first of which has trailing zeros, so that n * first is exact.
    let r = multiply_add::<FMA>(n, -0.693_359_4, clamped);
    let r = multiply_add::<FMA>(n, 2.121_944_4e-4, r);
    let tail = polynomial::<FMA, 5>(r, [0.499_999_94, 0.166_665_15, 0.041_668_456, 0.008_369_411, 0.001_381_315_9]);
    let mantissa = multiply_add::<FMA>(r * r, tail, r) + 1.0;
    // In two factors: 2^128 alone is not a number that a float can hold.
    let half = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32) >> 1;
    let rest = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_sub(half);
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let value = mantissa * power(half) * power(rest);
    let value = if x < -87.336_54 { 0.0 } else { value };
    let value = if x > 88.722_84 { f32::INFINITY } else { value };
    if x.is_nan() { x } else { value }
}

/// The natural logarithm, within 2 units in the last place for normal arguments; of numbers below zero not a number.
#[inline(always)]
pub(crate) fn log<const FMA: bool>(x: f32) -> f32 {
    // Subnormal arguments are scaled up by 2^23 first.
    let tiny = x < f32::MIN_POSITIVE;
    let scaled = if tiny { x * 8_388_608.0 } else { x };
    let bits = scaled.to_bits() as i32;
    // The mantissa is brought to [sqrt(1/2), sqrt(2)).
    let offset = bits.wrapping_sub(0x3f35_04f3);
    let exponent = (offset >> 23) as f32 + if tiny { -23.0 } else { 0.0 };
    let mantissa = f32::from_bits(((offset & 0x007f_ffff).wrapping_add(0x3f35_04f3)) as u32);
    let f = mantissa - 1.0;
    let tail = polynomial::<FMA, 9>(
        f,
        [
            0.333_333_13,
            -0.250_000_1,
            0.200_021_2,
            -0.166_679_97,
            0.142_195_51,
            -0.124_055_915,
            0.118_881_75,
            -0.116_756_41,
            0.067_466_006,
        ],
    );
    let square = f * f;
    let low = multiply_add::<FMA>(exponent, -2.121_944_4e-4, square * f * tail);
    let low = multiply_add::<FMA>(square, -0.5, low);
    let value = multiply_add::<FMA>(exponent, 0.693_359_4, f + low);
    let value = if x == 0.0 { f32::NEG_INFINITY } else { value };
    let value = if x == f32::INFINITY { x } else { value };
    if x >= 0.0 { value } else { f32::NAN }
}

/// The hyperbolic tangent, within 2e-7 absolutely and 4 units in the last place.
#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    let magnitude = x.abs();
    let square = x * x;
    let near =
        polynomial::<FMA, 6>(square, [1.0, -0.333_332_3, 0.133_304_16, -0.053_665_35, 0.020_415_362, -0.005_468_412_3]);
    let near = x * near;
    let far = (1.0 - 2.0 / (exp::<FMA>(2.0 * magnitude) + 1.0)).copysign(x);
    if magnitude < 0.625 {
        near
    } else {
        // A comparison with not-a-number lands here, and the sum keeps it.
        far + if x.is_nan() { x } else { 0.0 }
    }
}

/// The error function, within 3e-7 absolutely and 4 units in the last place.
#[inline(always)]
pub(crate) fn erf<const FMA: bool>(x: f32) -> f32 {
    let magnitude = x.abs();
    let square = x * x;
    let near = polynomial::<FMA, 7>(
        square,
        [
            std::f32::consts::FRAC_2_SQRT_PI,
            -0.376_126_26,
            0.112_835_854,
            -0.026_853_817,
            0.005_188_334,
            -0.000_801_024_2,
            7.854_01e-5,
        ],
    );
    let near = x * near;
    // 1 - erf(x) = exp(-Q(x)); from 4 on that is below half a unit in the last place of 1.
    let clamped = if magnitude > 4.0 { 4.0 } else { magnitude };
    let exponent = polynomial::<FMA, 9>(
        clamped,
        [
            -0.000_193_706_3,
            1.129_607_3,
            0.633_156_54,
            0.108_496_51,
            -0.025_267_02,
            0.004_232_370_3,
            -0.000_449_398_5,
            2.299_560_2e-5,
            -9.105_53e-8,
        ],
    );
    let far = (1.0 - exp::<FMA>(-exponent)).copysign(x);
    if magnitude < 1.0 { near } else { far + if x.is_nan() { x } else { 0.0 } }
}

/// `1 / (1 + e^-x)`, within 2e-7 relatively where it is a normal number.
#[inline(always)]
pub(crate) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// `ln(1 + e^x)` without overflow.
#[inline(always)]
pub(crate) fn softplus<const FMA: bool>(x: f32) -> f32 {
    let positive = if x > 0.0 { x } else { 0.0 };
    let small = exp::<FMA>(-x.abs());
    // Where 1 + small rounds, ln(1 + s) is s times ln(u) / (u - 1) with the rounded u (Higham 2002, section 1.14.1).
    let u = 1.0 + small;
    let ln = if u == 1.0 { small } else { log::<FMA>(u) * (small / (u - 1.0)) };
    positive + ln + if x.is_nan() { x } else { 0.0 }
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// GELU by the error function.
#[inline(always)]
pub(crate) fn gelu<const FMA: bool>(x: f32) -> f32 {
    0.5 * x * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// GELU by the hyperbolic tangent.
#[inline(always)]
pub(crate) fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
    // 0.5 (1 + tanh(u)) is the logistic function of 2u, which costs one exponential less work.
    let inner = SQRT_2_OVER_PI * multiply_add::<FMA>(CUBIC * x * x, x, x);
    x * sigmoid::<FMA>(2.0 * inner)
}

/// Derivative of [`gelu`].
#[inline(always)]
fn gelu_slope<const FMA: bool>(x: f32) -> f32 {
    const DENSITY: f32 = 0.398_942_3;
    let cumulative = 0.5 * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
    let exponential = exp::<FMA>(-0.5 * x * x);
    // At infinity the exponential is zero and their product is not a number.
    let tail = if exponential == 0.0 { 0.0 } else { x * DENSITY * exponential };
    cumulative + tail
}

/// Derivative of [`gelu_tanh`].
#[inline(always)]
fn gelu_tanh_slope<const FMA: bool>(x: f32) -> f32 {
    let inner = SQRT_2_OVER_PI * multiply_add::<FMA>(CUBIC * x * x, x, x);
    let s = sigmoid::<FMA>(2.0 * inner);
    let inner_slope = SQRT_2_OVER_PI * multiply_add::<FMA>(3.0 * CUBIC * x, x, 1.0);
    let bell = s * (1.0 - s);
    let tail = if bell == 0.0 { 0.0 } else { 2.0 * x * bell * inner_slope };
    s + tail
}

/// `dy` times the derivative of [`gelu`].
#[inline(always)]
pub(crate) fn gelu_gradient<const FMA: bool>(dy: f32, x: f32) -> f32 {
    dy * gelu_slope::<FMA>(x)
}

/// `dy` times the derivative of [`gelu_tanh`].
#[inline(always)]
pub(crate) fn gelu_tanh_gradient<const FMA: bool>(dy: f32, x: f32) -> f32 {
    dy * gelu_tanh_slope::<FMA>(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest error over a sweep of all magnitudes, in units in the last place of the exact value, where either
    /// that or the absolute error exceeds nothing.
    fn check(name: &str, ours: fn(f32) -> f32, exact: fn(f64) -> f64, range: (f32, f32), ulps: f64, absolute: f64) {
        let mut worst: (f64, f32) = (0.0, 0.0);
        for i in 0..400_000u32 {
            // Half of the arguments evenly spread, half of them as dense as floats are.
            let t = f64::from(i) / 400_000.0;
            let even = f64::from(range.0) + t * (f64::from(range.1) - f64::from(range.0));
            let dense = f64::from(f32::from_bits((t * f64::from(f32::MAX.to_bits())) as u32));
            for x in [even as f32, dense as f32, -dense as f32] {
                if x < range.0 || x > range.1 {
                    continue;
                }
                let want = exact(f64::from(x));
                let got = f64::from(ours(x));
                let unit = f64::from(f32::EPSILON) * 2f64.powi(want.abs().log2().floor().max(-126.0) as i32);
                let error = (got - want).abs();
                if want.abs() < f64::from(f32::MIN_POSITIVE) || error <= absolute {
                    assert!(error <= absolute.max(1.2e-38), "{name}({x}) = {got}, exact {want}");
                    continue;
                }
                if error / unit > worst.0 {
                    worst = (error / unit, x);
                }
            }
        }
        assert!(worst.0 <= ulps, "{name}: {} units in the last place at {}", worst.0, worst.1);
    }

    #[test]
    fn functions_keep_their_stated_bounds() {
        check("exp", exp::<true>, libm::exp, (-104.0, 88.72), 2.0, 0.0);
        check("exp", exp::<false>, libm::exp, (-104.0, 88.72), 2.0, 0.0);
        check("log", log::<true>, libm::log, (1e-38, f32::MAX), 2.0, 0.0);
        check("log", log::<false>, libm::log, (1e-38, f32::MAX), 2.0, 0.0);
        check("tanh", tanh::<true>, libm::tanh, (-20.0, 20.0), 4.0, 0.0);
        check("tanh", tanh::<false>, libm::tanh, (-20.0, 20.0), 4.0, 0.0);
        check("erf", erf::<true>, libm::erf, (-8.0, 8.0), 4.0, 0.0);
        check("erf", erf::<false>, libm::erf, (-8.0, 8.0), 4.0, 0.0);
        // GELU multiplies a difference from 1 by x: its error is absolute, a few units of the largest factor.
        let exact = |x: f64| 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2));
        check("gelu", gelu::<true>, exact, (-10.0, 10.0), 4.0, 6e-7);
        check("softplus", softplus::<true>, |x| x.max(0.0) + libm::log1p(libm::exp(-x.abs())), (-80.0, 80.0), 8.0, 0.0);
    }

    #[test]
    fn special_values_are_those_of_the_exact_function() {
        assert_eq!((exp::<true>(f32::NEG_INFINITY), exp::<true>(f32::INFINITY)), (0.0, f32::INFINITY));
        assert_eq!((log::<true>(0.0), log::<true>(f32::INFINITY)), (f32::NEG_INFINITY, f32::INFINITY));
        assert!(log::<true>(-1.0).is_nan());
        assert_eq!((tanh::<true>(f32::NEG_INFINITY), erf::<true>(f32::INFINITY)), (-1.0, 1.0));
        assert_eq!((sigmoid::<true>(-1e9), sigmoid::<true>(1e9)), (0.0, 1.0));
        for f in [exp::<true>, log::<true>, tanh::<true>, erf::<true>, sigmoid::<true>, softplus::<true>, gelu::<true>]
        {
            assert!(f(f32::NAN).is_nan());
        }
    }
}
