//! Narrow floating-point formats, one value at a time.

/// e4m3 (fn): 448 is the largest, 0x7f and 0xff are NaN.
pub(crate) fn e4m3_to_f32(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::NAN.copysign(if code & 0x80 == 0 { 1.0 } else { -1.0 });
    }
    let bits = u16::from(code & 0x80) << 8 | u16::from(code & 0x7f) << 7;
    half::f16::from_bits(bits).to_f32() * 256.0
}

/// To nearest even; overflows to infinity; NaN stays NaN.
#[inline(always)]
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let bits = if value.is_nan() {
        bits | 0x0040_0000
    } else {
        rounded
    };
    (bits >> 16) as u16
}

/// To nearest even, saturating at 448; NaN stays NaN.
#[inline(always)]
pub(crate) fn f32_to_e4m3(value: f32) -> u8 {
    round::<3>(value, -6, 448.0, 0x7f)
}

/// To nearest even, saturating at 57344; NaN stays NaN.
#[inline(always)]
pub(crate) fn f32_to_e5m2(value: f32) -> u8 {
    round::<2>(value, -14, 57344.0, 0x7f)
}

/// To `M` bits of mantissa and exponents from `smallest` on.
#[inline(always)]
fn round<const M: u32>(value: f32, smallest: i32, max: f32, nan: u8) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    let magnitude = value.abs();
    // Also of a NaN, which is dealt with last.
    let magnitude = if magnitude < max { magnitude } else { max };
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(smallest);
    // 1.5 * 2^23 units of the last place: the sum rounds to whole units, ties to even. A value that rounds up into the
    // next binade carries into the exponent by itself.
    let unit_exponent = exponent - M as i32;
    let magic = f32::from_bits(((unit_exponent + 23 + 127) as u32) << 23 | 0x0040_0000);
    let units = (magnitude + magic).to_bits().wrapping_sub(magic.to_bits());
    let code = units + (((exponent - smallest) as u32) << M);
    if value.is_nan() {
        sign | nan
    } else {
        sign | code as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All finite magnitudes of a format, ascending, with their codes.
    fn magnitudes(decode: impl Fn(u8) -> f32) -> Vec<(f32, u8)> {
        (0..0x7f)
            .map(|code| (decode(code), code))
            .filter(|(value, _)| value.is_finite())
            .collect()
    }

    fn check(decode: impl Fn(u8) -> f32, encode: impl Fn(f32) -> u8) {
        let all = magnitudes(decode);
        for pair in all.windows(2) {
            let ((low, low_code), (high, high_code)) = (pair[0], pair[1]);
            let middle = low + (high - low) / 2.0;
            let even = if low_code % 2 == 0 { low_code } else { high_code };
            for (value, code) in [
                (low, low_code),
                (middle.next_down(), low_code),
                (middle, even),
                (middle.next_up(), high_code),
                (high, high_code),
            ] {
                assert_eq!(encode(value), code, "{value}");
                assert_eq!(encode(-value), code | 0x80, "-{value}");
            }
        }
        let last = all.last().unwrap();
        for value in [last.0 * 1.01, last.0 * 100.0, f32::INFINITY] {
            assert_eq!(encode(value), last.1);
            assert_eq!(encode(-value), last.1 | 0x80);
        }
        assert_eq!(encode(f32::NAN) & 0x7f, 0x7f);
        assert_eq!((encode(0.0), encode(-0.0), encode(1e-30)), (0, 0x80, 0));
    }

    #[test]
    fn e4m3_rounds_to_nearest_even_and_saturates() {
        check(e4m3_to_f32, f32_to_e4m3);
        assert_eq!(e4m3_to_f32(f32_to_e4m3(1e9)), 448.0);
    }

    #[test]
    fn e5m2_rounds_to_nearest_even_and_saturates() {
        let decode = |code: u8| half::f16::from_bits(u16::from(code) << 8).to_f32();
        check(decode, f32_to_e5m2);
        assert_eq!(decode(f32_to_e5m2(1e9)), 57344.0);
    }

    #[test]
    fn bf16_is_that_of_half() {
        for i in 0..1u32 << 16 {
            let value = f32::from_bits(i.wrapping_mul(0x9e37_79b1));
            let (found, expected) = (f32_to_bf16(value), half::bf16::from_f32(value));
            assert_eq!(found, expected.to_bits(), "{value}");
        }
    }
}
