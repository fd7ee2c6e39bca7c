//! Sixteen lanes in one 512-bit register.

mod parts;

use std::arch::x86_64::*;

use self::parts::{E4M3, load_table, load512, mask, pair, spread_index, transpose_quarters, widen};
use super::{Kernel, LANES, Simd, Tiles};

/// Proof that the machine has AVX-512 F, BW, VL, DQ, VBMI and VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

impl Avx512 {
    pub(super) fn new() -> Option<Avx512> {
        is_available().then_some(Avx512(()))
    }
}

/// # Safety
/// The machine must have the features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,f16c,avx2,bmi2")]
pub(super) unsafe fn run<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
    kernel.run(simd)
}

/// The same, never inlined.
///
/// # Safety
/// The machine must have the features.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,f16c,avx2,bmi2")]
unsafe fn outlined<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
    kernel.run(simd)
}

// SAFETY of the whole block: every method takes `self`, the proof of the features; loads and stores go through
// references to arrays of the exact size and are unaligned.
#[expect(clippy::undocumented_unsafe_blocks, reason = "one argument for all, above")]
impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    const TILES: Tiles = Tiles::Large;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn load_some(self, from: &[f32]) -> __m512 {
        let few = from.len().min(LANES);
        unsafe { _mm512_maskz_loadu_ps(mask(few), from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: __m512, to: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn scale(self, value: __m512, magic: __m512) -> __m512 {
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(magic));
            let power = _mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000));
            _mm512_mul_ps(value, _mm512_castsi512_ps(power))
        }
    }

    #[inline(always)]
    fn sum(self, value: __m512) -> f32 {
        unsafe {
            let a = _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps::<1>(value));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        unsafe {
            // Halves: lanes i + 8 of two vectors at a time.
            let ab = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x44>(a, b),
                _mm512_shuffle_f32x4::<0xee>(a, b),
            );
            let cd = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x44>(c, d),
                _mm512_shuffle_f32x4::<0xee>(c, d),
            );
            // Quarters: lanes i + 4; now each quarter is a, b, c, d.
            let x = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x88>(ab, cd),
                _mm512_shuffle_f32x4::<0xdd>(ab, cd),
            );
            let x = _mm512_add_ps(x, _mm512_permute_ps::<0b01_00_11_10>(x));
            let x = _mm512_add_ps(x, _mm512_permute_ps::<0b10_11_00_01>(x));
            let mut out = [0.0; 4];
            let first = _mm512_maskz_compress_ps(0x1111, x);
            _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(first));
            out
        }
    }

    #[inline(always)]
    fn f32x16(self, from: &[u8; 64]) -> __m512 {
        unsafe { _mm512_castsi512_ps(load512(self, from)) }
    }

    #[inline(always)]
    fn f16x16(self, from: &[u8; 32]) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn e5m2x16(self, from: &[u8; 16]) -> __m512 {
        unsafe {
            let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(from.as_ptr().cast()));
            _mm512_cvtph_ps(_mm256_slli_epi16::<8>(words))
        }
    }

    #[inline(always)]
    fn bf16x32(self, from: &[u8; 64]) -> [__m512; 2] {
        widen(self, load512(self, from))
    }

    #[inline(always)]
    fn e4m3x64(self, from: &[u8; 64]) -> [__m512; 4] {
        unsafe {
            let code = load512(self, from);
            let [a, b] = load_table(self, &E4M3[0]);
            let high = _mm512_permutex2var_epi8(a, code, b);
            let [a, b] = load_table(self, &E4M3[1]);
            let low = _mm512_permutex2var_epi8(a, code, b);
            // high | (code & 0x80): the sign.
            let high = _mm512_ternarylogic_epi32::<0xf8>(high, code, _mm512_set1_epi8(-128));
            let [a, b] = widen(self, _mm512_unpacklo_epi8(low, high));
            let [c, d] = widen(self, _mm512_unpackhi_epi8(low, high));
            [a, b, c, d]
        }
    }

    #[inline(always)]
    fn spread(self, from: &[f32]) -> __m512 {
        let few = from.len().min(LANES);
        unsafe {
            let values = _mm512_maskz_loadu_ps(mask(few), from.as_ptr());
            _mm512_permutexvar_ps(spread_index(self, few), values)
        }
    }

    #[inline(always)]
    fn spread_i32(self, from: &[i32]) -> __m512i {
        let few = from.len().min(LANES);
        unsafe {
            let values = _mm512_maskz_loadu_epi32(mask(few), from.as_ptr());
            _mm512_permutexvar_epi32(spread_index(self, few), values)
        }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; LANES]) -> __m512i {
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[cfg(test)]
    #[inline(always)]
    fn store_i32(self, value: __m512i, to: &mut [i32; LANES]) {
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), value) }
    }

    #[inline(always)]
    fn int4x128(self, from: &[u8; 64]) -> [__m512i; 4] {
        unsafe {
            let q = load512(self, from);
            let mask = _mm512_set1_epi32(0x000f_000f);
            [
                _mm512_and_si512(q, mask),
                _mm512_and_si512(_mm512_srli_epi32::<4>(q), mask),
                _mm512_and_si512(_mm512_srli_epi32::<8>(q), mask),
                _mm512_and_si512(_mm512_srli_epi32::<12>(q), mask),
            ]
        }
    }

    #[inline(always)]
    fn sub_i16(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_sub_epi16(a, b) }
    }

    #[inline(always)]
    fn dot_i16(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_dpwssd_epi32(acc, a, b) }
    }

    #[inline(always)]
    fn to_f32(self, value: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(value) }
    }

    #[inline(always)]
    fn as_floats(self, value: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(value) }
    }

    #[cfg(test)]
    #[inline(always)]
    fn as_ints(self, value: __m512) -> __m512i {
        unsafe { _mm512_castps_si512(value) }
    }

    #[inline(always)]
    fn largest(self, value: __m512) -> f32 {
        // The instruction takes its second operand where one is NaN: fill NaNs beforehand.
        unsafe {
            let low = _mm512_set1_ps(f32::NEG_INFINITY);
            _mm512_reduce_max_ps(_mm512_max_ps(value, low))
        }
    }

    #[inline(always)]
    fn pairs_order(self, x: &[f32; 32]) -> [__m512; 2] {
        unsafe {
            let (a, b) = (
                _mm512_loadu_ps(x.as_ptr()),
                _mm512_loadu_ps(x.as_ptr().add(LANES)),
            );
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            [
                _mm512_permutex2var_ps(a, even, b),
                _mm512_permutex2var_ps(a, odd, b),
            ]
        }
    }

    #[inline(always)]
    fn e4m3_order(self, x: &[f32; 64]) -> [__m512; 4] {
        unsafe {
            let index = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
            let mut quarters = [_mm512_setzero_ps(); 4];
            for (to, x) in quarters.iter_mut().zip(x.as_chunks::<LANES>().0) {
                *to = _mm512_permutexvar_ps(index, _mm512_loadu_ps(x.as_ptr()));
            }
            transpose_quarters(self, quarters)
        }
    }

    #[inline(always)]
    fn int4_order(self, x: &[__m512; 8]) -> [__m512i; 4] {
        unsafe {
            let index = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let mut quads = [_mm512_setzero_ps(); 4];
            for (quad, x) in quads.iter_mut().zip(x.as_chunks::<2>().0) {
                let (a, b) = (pair(self, x[0]), pair(self, x[1]));
                let lanes = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
                *quad = _mm512_castsi512_ps(_mm512_permutexvar_epi32(index, lanes));
            }
            let [a, b, c, d] = transpose_quarters(self, quads);
            [
                _mm512_castps_si512(a),
                _mm512_castps_si512(b),
                _mm512_castps_si512(c),
                _mm512_castps_si512(d),
            ]
        }
    }

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        unsafe { outlined(self, kernel) }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
