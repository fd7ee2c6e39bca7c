//! Sixteen f32 lanes, the same on every instruction set.
//!
//! Every kernel of the CPU backend is written once over [`Simd`] and instantiated per instruction set. All
//! operations are IEEE operations lane by lane (fused multiply-add included) or exact integer ones, so the
//! instantiations agree to the bit by construction; `tests.rs` beside this file checks it. What must stay true: no
//! method may round differently on one instruction set, and nothing here allocates.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod math;
mod order;
mod portable;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
use portable::Portable;

/// Lanes of a vector. Part of every formula: lane `j` of a dot product is a partial sum of its own.
pub(crate) const LANES: usize = 16;

/// An instruction set the kernels are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust; correct everywhere, slow.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ, VBMI and VNNI.
    Avx512,
}

impl Isa {
    /// All of them, best first.
    pub const ALL: [Isa; 3] = [Isa::Avx512, Isa::Avx2, Isa::Portable];

    /// Whether this machine runs it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The best one of this machine.
    pub fn detect() -> Isa {
        let mut best_first = Isa::ALL.into_iter();
        best_first.find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// Name as `describe` prints it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }
}

/// Work that is compiled once per instruction set; see [`run`].
pub(crate) trait Kernel {
    type Output;
    /// Must be `#[inline(always)]`, and so must all it calls over `S`, so that it is compiled with the features of
    /// the instruction set.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` on `isa`, or on plain Rust where the machine lacks it (which `CpuBackend::new` refuses).
pub(crate) fn run<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => match Avx512::new() {
            // SAFETY: the token proves that the machine has the features.
            Some(simd) => unsafe { avx512::run(simd, kernel) },
            None => kernel.run(Portable),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => match Avx2::new() {
            // SAFETY: the token proves that the machine has the features.
            Some(simd) => unsafe { avx2::run(simd, kernel) },
            None => kernel.run(Portable),
        },
        _ => kernel.run(Portable),
    }
}

/// How many sums a tile of a product has, by the registers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tiles {
    /// One: where speed is of no concern and code size is.
    Single,
    /// Up to four: 16 registers of half the lanes.
    Small,
    /// Up to 24: 32 registers of all lanes.
    Large,
}

/// The operations of one instruction set. A value of the type is the proof that the machine has it.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32, or 32 i16 in pairs.
    type I: Copy;
    const TILES: Tiles;

    fn splat(self, value: f32) -> Self::F;
    fn load(self, from: &[f32; LANES]) -> Self::F;
    /// The lanes of `from` (16 at most), then zeros.
    fn load_some(self, from: &[f32]) -> Self::F;
    fn store(self, value: Self::F, to: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: `b` when one is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: `b` when one is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `value * 2^n`, where `n` stands in the low bits of `magic` (see `math::exp`), -126..=127.
    fn scale(self, value: Self::F, magic: Self::F) -> Self::F;
    /// Sum of the lanes by one fixed tree: lane i + lane i+8, then i+4, i+2, i+1.
    fn sum(self, value: Self::F) -> f32;
    /// `sum` of each of four vectors.
    fn sum4(self, values: [Self::F; 4]) -> [f32; 4];

    /// Sixteen little-endian f32.
    fn f32x16(self, from: &[u8; 64]) -> Self::F;
    /// Sixteen little-endian f16.
    fn f16x16(self, from: &[u8; 32]) -> Self::F;
    /// Sixteen e5m2.
    fn e5m2x16(self, from: &[u8; 16]) -> Self::F;
    /// 32 little-endian bf16: the even ones, then the odd ones.
    fn bf16x32(self, from: &[u8; 64]) -> [Self::F; 2];
    /// 64 e4m3 values times 2^-8; lane `4 i + j` of vector `n` is value `16 i + 2 j + [0, 1, 8, 9][n]`.
    fn e4m3x64(self, from: &[u8; 64]) -> [Self::F; 4];

    /// Lane `d` is `from[d * g / 16]`, where `g = from.len()` is 1, 2, 4, 8 or 16.
    fn spread(self, from: &[f32]) -> Self::F;
    /// The same of i32.
    fn spread_i32(self, from: &[i32]) -> Self::I;

    fn splat_i32(self, value: i32) -> Self::I;
    fn load_i32(self, from: &[i32; LANES]) -> Self::I;
    #[cfg(test)]
    fn store_i32(self, value: Self::I, to: &mut [i32; LANES]);
    /// 128 nibbles, low one first, as i16 pairs: pair `d` of vector `n` is nibbles `8 d + n` and `8 d + n + 4`.
    fn int4x128(self, from: &[u8; 64]) -> [Self::I; 4];
    /// `a - b` of 32 i16.
    fn sub_i16(self, a: Self::I, b: Self::I) -> Self::I;
    /// `acc[d] + a[d].0 * b[d].0 + a[d].1 * b[d].1` over i16 pairs; the caller keeps it within i32.
    fn dot_i16(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// Sixteen i32 below 2^24 as f32, exactly.
    fn to_f32(self, value: Self::I) -> Self::F;
    /// The bits as f32, and back.
    fn as_floats(self, value: Self::I) -> Self::F;
    #[cfg(test)]
    fn as_ints(self, value: Self::F) -> Self::I;
    /// Largest lane; NaNs are passed over, all NaN or less is -infinity.
    fn largest(self, value: Self::F) -> f32;

    /// Two vectors' worth of values as their even ones, then their odd ones: the order of `bf16x32`.
    fn pairs_order(self, x: &[f32; 32]) -> [Self::F; 2];
    /// Four vectors' worth of values in the order of `e4m3x64`.
    fn e4m3_order(self, x: &[f32; 64]) -> [Self::F; 4];
    /// The low halves of 128 i32 (as bits of f32) as i16 pairs in the order of `int4x128`.
    fn int4_order(self, x: &[Self::F; 8]) -> [Self::I; 4];

    /// Runs `kernel` as a function of its own, so that its registers are its own.
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output;
    /// Asks for the cache line at `at`, which need not be readable.
    fn prefetch(self, at: *const u8);
}
