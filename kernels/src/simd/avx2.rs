//! Sixteen lanes in two 256-bit registers: lanes 0 to 7, lanes 8 to 15.

use std::arch::x86_64::*;

use super::{Kernel, LANES, Simd, Tiles};

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

impl Avx2 {
    pub(super) fn new() -> Option<Avx2> {
        is_available().then_some(Avx2(()))
    }
}

/// # Safety
/// The machine must have the features.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
    kernel.run(simd)
}

/// The same, never inlined.
///
/// # Safety
/// The machine must have the features.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn outlined<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
    kernel.run(simd)
}

type F = [__m256; 2];
type I = [__m256i; 2];

/// The same operation on both halves. A macro and no closure: a closure is a function without the features.
macro_rules! both {
    ($operation:ident($a:expr)) => {{
        let a = $a;
        [$operation(a[0]), $operation(a[1])]
    }};
    ($operation:ident($a:expr, $b:expr)) => {{
        let (a, b) = ($a, $b);
        [$operation(a[0], b[0]), $operation(a[1], b[1])]
    }};
}

/// The two halves of 64 bytes.
#[inline(always)]
fn load256(_: Avx2, from: &[u8; 64]) -> I {
    // SAFETY: 64 readable bytes; the token proves the features.
    unsafe {
        let at = from.as_ptr().cast::<__m256i>();
        [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))]
    }
}

/// Two vectors' halves from 32 e4m3 values: those that `spread` puts first, those that it puts second.
#[inline(always)]
fn e4m3(_: Avx2, codes: __m256i, spread: &[i8; 32]) -> (__m256, __m256) {
    // SAFETY: 32 readable bytes; the token proves the features.
    unsafe {
        let words = _mm256_shuffle_epi8(codes, _mm256_loadu_si256(spread.as_ptr().cast()));
        let bits = _mm256_and_si256(_mm256_srai_epi16::<1>(words), _mm256_set1_epi16(0xbfffu16 as i16));
        let bits = _mm256_permute4x64_epi64::<0b11_01_10_00>(bits);
        let (low, high) = (_mm256_castsi256_si128(bits), _mm256_extracti128_si256::<1>(bits));
        (_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
    }
}

/// Shuffles that bring bytes 2i (then 2i + 1) of each 128-bit half, plus `first`, into the upper half of a word.
const fn spread(first: i8) -> [i8; 32] {
    let mut indices = [-128; 32];
    let mut i = 0;
    while i < 16 {
        let word = (i % 8) as i8;
        indices[i * 2 + 1] = first + 2 * (word % 4) + word / 4;
        i += 1;
    }
    indices
}

static SPREAD: [[i8; 32]; 2] = [spread(0), spread(8)];

// SAFETY of the whole block: every method takes `self`, the proof of the features; loads and stores go through
// references to arrays of the exact size and are unaligned.
#[expect(clippy::undocumented_unsafe_blocks, reason = "one argument for all, above")]
impl Simd for Avx2 {
    type F = F;
    type I = I;
    const TILES: Tiles = Tiles::Small;

    #[inline(always)]
    fn splat(self, value: f32) -> F {
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> F {
        unsafe {
            [
                _mm256_loadu_ps(from.as_ptr()),
                _mm256_loadu_ps(from.as_ptr().add(8)),
            ]
        }
    }

    #[inline(always)]
    fn load_some(self, from: &[f32]) -> F {
        let mut lanes = [0.0; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    #[inline(always)]
    fn store(self, value: F, to: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), value[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), value[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        unsafe { both!(_mm256_add_ps(a, b)) }
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        unsafe { both!(_mm256_sub_ps(a, b)) }
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        unsafe { both!(_mm256_mul_ps(a, b)) }
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        unsafe { both!(_mm256_div_ps(a, b)) }
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        unsafe {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
            ]
        }
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        unsafe { both!(_mm256_max_ps(a, b)) }
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        unsafe { both!(_mm256_min_ps(a, b)) }
    }

    #[inline(always)]
    fn scale(self, value: F, magic: F) -> F {
        unsafe {
            let one = _mm256_set1_epi32(0x3f80_0000);
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(magic[0]));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(magic[1]));
            let low = _mm256_castsi256_ps(_mm256_add_epi32(low, one));
            let high = _mm256_castsi256_ps(_mm256_add_epi32(high, one));
            [_mm256_mul_ps(value[0], low), _mm256_mul_ps(value[1], high)]
        }
    }

    #[inline(always)]
    fn sum(self, value: F) -> f32 {
        unsafe {
            let a = _mm256_add_ps(value[0], value[1]);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }

    #[inline(always)]
    fn sum4(self, values: [F; 4]) -> [f32; 4] {
        let [a, b, c, d] = values;
        [self.sum(a), self.sum(b), self.sum(c), self.sum(d)]
    }

    #[inline(always)]
    fn f32x16(self, from: &[u8; 64]) -> F {
        unsafe { both!(_mm256_castsi256_ps(load256(self, from))) }
    }

    #[inline(always)]
    fn f16x16(self, from: &[u8; 32]) -> F {
        unsafe {
            let at = from.as_ptr().cast::<__m128i>();
            [
                _mm256_cvtph_ps(_mm_loadu_si128(at)),
                _mm256_cvtph_ps(_mm_loadu_si128(at.add(1))),
            ]
        }
    }

    #[inline(always)]
    fn e5m2x16(self, from: &[u8; 16]) -> F {
        unsafe {
            let bytes = _mm_loadu_si128(from.as_ptr().cast());
            let zero = _mm_setzero_si128();
            [
                _mm256_cvtph_ps(_mm_unpacklo_epi8(zero, bytes)),
                _mm256_cvtph_ps(_mm_unpackhi_epi8(zero, bytes)),
            ]
        }
    }

    #[inline(always)]
    fn bf16x32(self, from: &[u8; 64]) -> [F; 2] {
        let [low, high] = load256(self, from);
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
            let even = [_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high)];
            let odd = [_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)];
            [both!(_mm256_castsi256_ps(even)), both!(_mm256_castsi256_ps(odd))]
        }
    }

    #[inline(always)]
    fn e4m3x64(self, from: &[u8; 64]) -> [F; 4] {
        let [low, high] = load256(self, from);
        let (a0, b0) = e4m3(self, low, &SPREAD[0]);
        let (a1, b1) = e4m3(self, high, &SPREAD[0]);
        let (c0, d0) = e4m3(self, low, &SPREAD[1]);
        let (c1, d1) = e4m3(self, high, &SPREAD[1]);
        [[a0, a1], [b0, b1], [c0, c1], [d0, d1]]
    }

    #[inline(always)]
    fn spread(self, from: &[f32]) -> F {
        unsafe {
            match from {
                [a] => [_mm256_set1_ps(*a); 2],
                [a, b] => [_mm256_set1_ps(*a), _mm256_set1_ps(*b)],
                [a, b, c, d] => [
                    _mm256_set_m128(_mm_set1_ps(*b), _mm_set1_ps(*a)),
                    _mm256_set_m128(_mm_set1_ps(*d), _mm_set1_ps(*c)),
                ],
                _ => {
                    let mut lanes = [0.0; LANES];
                    for (d, lane) in lanes.iter_mut().enumerate() {
                        *lane = from[d * from.len() / LANES];
                    }
                    self.load(&lanes)
                }
            }
        }
    }

    #[inline(always)]
    fn spread_i32(self, from: &[i32]) -> I {
        let mut lanes = [0; LANES];
        for (d, lane) in lanes.iter_mut().enumerate() {
            *lane = from[d * from.len() / LANES];
        }
        self.load_i32(&lanes)
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> I {
        unsafe { [_mm256_set1_epi32(value); 2] }
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; LANES]) -> I {
        unsafe {
            let at = from.as_ptr().cast::<__m256i>();
            [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))]
        }
    }

    #[cfg(test)]
    #[inline(always)]
    fn store_i32(self, value: I, to: &mut [i32; LANES]) {
        unsafe {
            let at = to.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(at, value[0]);
            _mm256_storeu_si256(at.add(1), value[1]);
        }
    }

    #[inline(always)]
    fn int4x128(self, from: &[u8; 64]) -> [I; 4] {
        let [low, high] = load256(self, from);
        unsafe {
            let mask = _mm256_set1_epi32(0x000f_000f);
            macro_rules! nibbles {
                ($shift:literal) => {
                    [
                        _mm256_and_si256(_mm256_srli_epi32::<$shift>(low), mask),
                        _mm256_and_si256(_mm256_srli_epi32::<$shift>(high), mask),
                    ]
                };
            }
            [nibbles!(0), nibbles!(4), nibbles!(8), nibbles!(12)]
        }
    }

    #[inline(always)]
    fn sub_i16(self, a: I, b: I) -> I {
        unsafe { [_mm256_sub_epi16(a[0], b[0]), _mm256_sub_epi16(a[1], b[1])] }
    }

    #[inline(always)]
    fn dot_i16(self, acc: I, a: I, b: I) -> I {
        unsafe {
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(a[0], b[0])),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(a[1], b[1])),
            ]
        }
    }

    #[inline(always)]
    fn to_f32(self, value: I) -> F {
        unsafe { both!(_mm256_cvtepi32_ps(value)) }
    }

    #[inline(always)]
    fn as_floats(self, value: I) -> F {
        unsafe { both!(_mm256_castsi256_ps(value)) }
    }

    #[cfg(test)]
    #[inline(always)]
    fn as_ints(self, value: F) -> I {
        unsafe { both!(_mm256_castps_si256(value)) }
    }

    #[inline(always)]
    fn largest(self, value: F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        lanes
            .iter()
            .fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
    }

    #[inline(always)]
    fn pairs_order(self, x: &[f32; 32]) -> [F; 2] {
        let [a, b] = super::order::pairs(x);
        [self.load(&a), self.load(&b)]
    }

    #[inline(always)]
    fn e4m3_order(self, x: &[f32; 64]) -> [F; 4] {
        let [a, b, c, d] = super::order::e4m3(x);
        [self.load(&a), self.load(&b), self.load(&c), self.load(&d)]
    }

    #[inline(always)]
    fn int4_order(self, x: &[F; 8]) -> [I; 4] {
        let mut values = [[0.0; LANES]; 8];
        for (value, x) in values.iter_mut().zip(x) {
            self.store(*x, value);
        }
        let [a, b, c, d] = super::order::int4(&values);
        [
            self.load_i32(&a),
            self.load_i32(&b),
            self.load_i32(&c),
            self.load_i32(&d),
        ]
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
