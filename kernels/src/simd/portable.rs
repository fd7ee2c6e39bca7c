//! Sixteen lanes in plain Rust: the definition the other instruction sets must equal.
//!
//! On x86-64, where this is the path of last resort, operations are calls: inlined into every kernel they would take
//! longer to compile than all the rest of the crate.

use super::{Kernel, LANES, Simd, Tiles};

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    const TILES: Tiles = Tiles::Single;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F {
        *from
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn load_some(self, from: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        lanes
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32; LANES]) {
        *to = value;
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn scale(self, value: Self::F, magic: Self::F) -> Self::F {
        let one = 1f32.to_bits();
        zip(value, magic, |value, magic| {
            value * f32::from_bits((magic.to_bits() << 23).wrapping_add(one))
        })
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn sum(self, a: Self::F) -> f32 {
        let a: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let a: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
        (a[0] + a[2]) + (a[1] + a[3])
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn sum4(self, values: [Self::F; 4]) -> [f32; 4] {
        values.map(|value| self.sum(value))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn f32x16(self, from: &[u8; 64]) -> Self::F {
        let (values, _) = from.as_chunks::<4>();
        std::array::from_fn(|i| f32::from_le_bytes(values[i]))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn f16x16(self, from: &[u8; 32]) -> Self::F {
        let (values, _) = from.as_chunks::<2>();
        std::array::from_fn(|i| half::f16::from_le_bytes(values[i]).to_f32())
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn e5m2x16(self, from: &[u8; 16]) -> Self::F {
        from.map(|code| half::f16::from_bits(u16::from(code) << 8).to_f32())
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn bf16x32(self, from: &[u8; 64]) -> [Self::F; 2] {
        let (values, _) = from.as_chunks::<2>();
        let value = |i: usize| f32::from_bits(u32::from(u16::from_le_bytes(values[i])) << 16);
        [
            std::array::from_fn(|i| value(2 * i)),
            std::array::from_fn(|i| value(2 * i + 1)),
        ]
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn e4m3x64(self, from: &[u8; 64]) -> [Self::F; 4] {
        [0, 1, 8, 9].map(|first| {
            std::array::from_fn(|lane| {
                // As f16 bits: sign at the top, exponent and mantissa below it, which is the value times 2^-8.
                let code = u16::from(from[16 * (lane / 4) + 2 * (lane % 4) + first]);
                let bits = (code & 0x80) << 8 | (code & 0x7f) << 7;
                half::f16::from_bits(bits).to_f32()
            })
        })
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn spread(self, from: &[f32]) -> Self::F {
        std::array::from_fn(|d| from[d * from.len() / LANES])
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn spread_i32(self, from: &[i32]) -> Self::I {
        std::array::from_fn(|d| from[d * from.len() / LANES])
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I {
        [value; LANES]
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; LANES]) -> Self::I {
        *from
    }

    #[cfg(test)]
    #[inline(always)]
    fn store_i32(self, value: Self::I, to: &mut [i32; LANES]) {
        *to = value;
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn int4x128(self, from: &[u8; 64]) -> [Self::I; 4] {
        let nibble = |k: usize| i32::from(from[k / 2] >> (4 * (k % 2)) & 15);
        std::array::from_fn(|n| std::array::from_fn(|d| nibble(8 * d + n) | nibble(8 * d + n + 4) << 16))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn sub_i16(self, a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|d| {
            let ((a0, a1), (b0, b1)) = (halves(a[d]), halves(b[d]));
            i32::from(a0.wrapping_sub(b0)) & 0xffff | i32::from(a1.wrapping_sub(b1)) << 16
        })
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn dot_i16(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|d| {
            let ((a0, a1), (b0, b1)) = (halves(a[d]), halves(b[d]));
            acc[d] + i32::from(a0) * i32::from(b0) + i32::from(a1) * i32::from(b1)
        })
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn to_f32(self, value: Self::I) -> Self::F {
        value.map(|value| value as f32)
    }

    #[inline(always)]
    fn as_floats(self, value: Self::I) -> Self::F {
        value.map(|x| f32::from_bits(x as u32))
    }

    #[cfg(test)]
    #[inline(always)]
    fn as_ints(self, value: Self::F) -> Self::I {
        value.map(|x| x.to_bits() as i32)
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn largest(self, value: Self::F) -> f32 {
        value
            .iter()
            .fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn pairs_order(self, x: &[f32; 32]) -> [Self::F; 2] {
        super::order::pairs(x).map(|v| self.load(&v))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn e4m3_order(self, x: &[f32; 64]) -> [Self::F; 4] {
        super::order::e4m3(x).map(|v| self.load(&v))
    }

    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[cfg_attr(not(target_arch = "x86_64"), inline(always))]
    fn int4_order(self, x: &[Self::F; 8]) -> [Self::I; 4] {
        let mut values = [[0.0; LANES]; 8];
        for (value, x) in values.iter_mut().zip(x) {
            self.store(*x, value);
        }
        super::order::int4(&values).map(|v| self.load_i32(&v))
    }

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}

/// The i16 pair of a lane, low one first.
#[inline(always)]
fn halves(pair: i32) -> (i16, i16) {
    (pair as i16, (pair >> 16) as i16)
}
