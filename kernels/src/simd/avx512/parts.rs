//! Tables and shuffles that several operations share. An `Avx512` among the arguments is the proof of the features.

use std::arch::x86_64::*;

use super::Avx512;
use crate::simd::LANES;

/// Bytes of bf16(e4m3 code * 2^-8) for the codes 0 to 127: high ones, low ones.
pub(super) static E4M3: [[u8; 128]; 2] = e4m3_table();

const fn e4m3_table() -> [[u8; 128]; 2] {
    let mut table = [[0; 128]; 2];
    let mut code = 0;
    while code < 128 {
        // value = mantissa * 2^exponent with an integer mantissa; times 2^-8.
        let small = code < 8;
        let mut mantissa = if small { code } else { 8 + code % 8 } as u32;
        let mut exponent = if small { -17 } else { code as i32 / 8 - 18 };
        let mut bits = 0;
        if mantissa != 0 {
            while mantissa < 128 {
                mantissa *= 2;
                exponent -= 1;
            }
            bits = ((exponent + 7 + 127) as u32) << 7 | (mantissa & 127);
        }
        table[0][code] = (bits >> 8) as u8;
        table[1][code] = bits as u8;
        code += 1;
    }
    table
}

#[inline(always)]
pub(super) fn load512(_: Avx512, from: &[u8; 64]) -> __m512i {
    // SAFETY: 64 readable bytes; the caller proves the features.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// Quarter `j` of vector `i` becomes quarter `i` of vector `j`.
#[inline(always)]
pub(super) fn transpose_quarters(_: Avx512, [a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    // SAFETY: register operations; the caller proves the features.
    unsafe {
        let (ab_low, ab_high) = (
            _mm512_shuffle_f32x4::<0x44>(a, b),
            _mm512_shuffle_f32x4::<0xee>(a, b),
        );
        let (cd_low, cd_high) = (
            _mm512_shuffle_f32x4::<0x44>(c, d),
            _mm512_shuffle_f32x4::<0xee>(c, d),
        );
        [
            _mm512_shuffle_f32x4::<0x88>(ab_low, cd_low),
            _mm512_shuffle_f32x4::<0xdd>(ab_low, cd_low),
            _mm512_shuffle_f32x4::<0x88>(ab_high, cd_high),
            _mm512_shuffle_f32x4::<0xdd>(ab_high, cd_high),
        ]
    }
}

/// The first `count` lanes.
#[inline(always)]
pub(super) fn mask(count: usize) -> __mmask16 {
    (0xffff_u32 >> (LANES - count)) as __mmask16
}

/// Lane `d` is `d * count / 16`.
#[inline(always)]
pub(super) fn spread_index(_: Avx512, count: usize) -> __m512i {
    // SAFETY: register operations; the caller proves the features.
    unsafe {
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        _mm512_srli_epi32::<4>(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(count as i32)))
    }
}

/// Even and odd bf16 of 16 dwords.
#[inline(always)]
pub(super) fn widen(_: Avx512, pairs: __m512i) -> [__m512; 2] {
    // SAFETY: register operations; the caller proves the features.
    unsafe {
        let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000u32 as i32));
        [
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
            _mm512_castsi512_ps(odd),
        ]
    }
}

/// A table of 128 bytes, for `vpermi2b`.
#[inline(always)]
pub(super) fn load_table(_: Avx512, table: &[u8; 128]) -> [__m512i; 2] {
    // SAFETY: 128 readable bytes; the caller proves the features.
    unsafe {
        let at = table.as_ptr();
        [
            _mm512_loadu_si512(at.cast()),
            _mm512_loadu_si512(at.add(64).cast()),
        ]
    }
}

/// Of each eight lanes, the low halves of values 4 to 7 above those of 0 to 3, in lanes 0 to 3.
#[inline(always)]
pub(super) fn pair(_: Avx512, x: __m512) -> __m512i {
    // SAFETY: register operations; the caller proves the features.
    unsafe {
        let x = _mm512_castps_si512(x);
        let upper = _mm512_slli_epi32::<16>(_mm512_shuffle_i32x4::<0b10_11_00_01>(x, x));
        _mm512_mask_blend_epi16(0xaaaa_aaaa, x, upper)
    }
}
