//! The two 8-bit floating-point formats, one value at a time.

/// e4m3 (fn): 448 is the largest, 0x7f and 0xff are NaN.
pub(crate) fn e4m3_to_f32(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::NAN.copysign(if code & 0x80 == 0 { 1.0 } else { -1.0 });
    }
    let bits = u16::from(code & 0x80) << 8 | u16::from(code & 0x7f) << 7;
    half::f16::from_bits(bits).to_f32() * 256.0
}

/// To nearest even, saturating at 448; NaN stays NaN.
pub(crate) fn f32_to_e4m3(value: f32) -> u8 {
    round(value, 3, -6, 448.0, 0x7e, 0x7f)
}

/// To nearest even, saturating at 57344; NaN stays NaN.
pub(crate) fn f32_to_e5m2(value: f32) -> u8 {
    round(value, 2, -14, 57344.0, 0x7b, 0x7f)
}

fn round(value: f32, mantissa: i32, min_exponent: i32, max: f32, max_code: u8, nan: u8) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let value = value.abs();
    if value.is_nan() {
        return sign | nan;
    }
    if value >= max {
        return sign | max_code;
    }
    let exponent = ((value.to_bits() >> 23) as i32 - 127).max(min_exponent);
    // Units of the last place: a value that rounds up into the next binade carries into the exponent by itself.
    let unit = f32::from_bits(((exponent - mantissa + 127) as u32) << 23);
    let units = (value / unit).round_ties_even() as u32;
    let code = units + (((exponent - min_exponent) as u32) << mantissa);
    sign | (code as u8).min(max_code)
}
