//! Sixteen f32 lanes, the same on every instruction set.
//!
//! Every kernel of the CPU backend is written once over [`Simd`] and instantiated per instruction set. All
//! operations are IEEE operations lane by lane (fused multiply-add included), so the instantiations agree to the
//! bit by construction; `tests.rs` beside this file checks it. What must stay true: no method may round
//! differently on one instruction set, and nothing here allocates.

pub(crate) mod math;
mod portable;
pub(crate) use portable::Portable;

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
        matches!(self, Isa::Portable)
    }

    /// The best one of this machine.
    pub fn detect() -> Isa {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.is_available())
            .unwrap_or(Isa::Portable)
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
    /// Must be `#[inline(always)]`, so that it is compiled with the features of its caller.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` on `isa`, which the backend checked to be available.
pub(crate) fn run<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        Isa::Portable | Isa::Avx2 | Isa::Avx512 => kernel.run(Portable),
    }
}

/// The operations of one instruction set. A value of the type is the proof that the machine has it.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type F: Copy;

    fn splat(self, value: f32) -> Self::F;
    fn load(self, from: &[f32; LANES]) -> Self::F;
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

    /// Sixteen little-endian f32.
    fn f32x16(self, from: &[u8; 64]) -> Self::F;
    /// Sixteen little-endian f16.
    fn f16x16(self, from: &[u8; 32]) -> Self::F;
    /// 32 little-endian bf16: the even ones, then the odd ones.
    fn bf16x32(self, from: &[u8; 64]) -> [Self::F; 2];
    /// 64 e4m3 values times 2^-8; lane `4 i + j` of vector `n` is value `16 i + 2 j + [0, 1, 8, 9][n]`.
    fn e4m3x64(self, from: &[u8; 64]) -> [Self::F; 4];
    /// Lane `d`: `sum over k = 8 d .. 8 d + 8 of (q[k] - zero[d]) * x[k]`, exact; nibble `k` of `q`, low one first.
    fn int4x128(self, q: &[u8; 64], zero: &[i32; LANES], x: &[i16; 128]) -> Self::F;
}
