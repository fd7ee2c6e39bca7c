//! One output element after another: the definition.

use super::pack::{Order, Packed};
use crate::cpu::weights::{CpuLinear, FP8_BLOCK, Format, INT4_BLOCK};
use crate::simd::{Isa, Kernel, LANES, Simd, run};

/// What becomes of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sink {
    Store,
    Add,
}

/// `out[t] = x[t] W` or `out[t] += x[t] W`; `x` is `[tokens, in]`, `out` is `[tokens, out]`.
pub(crate) fn linear(
    isa: Isa,
    weight: &CpuLinear,
    packed: &mut Packed,
    x: &[f32],
    out: &mut [f32],
    sink: Sink,
) {
    run(
        isa,
        Linear {
            weight,
            packed,
            x,
            out,
            sink,
        },
    );
}

struct Linear<'a> {
    weight: &'a CpuLinear,
    packed: &'a mut Packed,
    x: &'a [f32],
    out: &'a mut [f32],
    sink: Sink,
}

impl Kernel for Linear<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Linear {
            weight,
            packed,
            x,
            out,
            sink,
        } = self;
        let columns = weight.in_features;
        let order = Order::of(&weight.format);
        let bytes = weight.bytes();
        let rows = bytes.chunks_exact(weight.row_bytes());
        let put = |at: &mut f32, value: f32| match sink {
            Sink::Store => *at = value,
            Sink::Add => *at += value,
        };
        for (x, out) in x
            .chunks_exact(columns)
            .zip(out.chunks_exact_mut(weight.out_features))
        {
            match &weight.format {
                Format::F32 => {
                    let x = packed.pack(order, x, |_| 1.0);
                    rows.clone()
                        .zip(out)
                        .for_each(|(row, out)| put(out, dot(s, row, x, |s, w: &[u8; 64]| [s.f32x16(w)])));
                }
                Format::F16 => {
                    let x = packed.pack(order, x, |_| 1.0);
                    rows.clone()
                        .zip(out)
                        .for_each(|(row, out)| put(out, dot(s, row, x, |s, w: &[u8; 32]| [s.f16x16(w)])));
                }
                Format::Bf16 => {
                    let x = packed.pack(order, x, |_| 1.0);
                    rows.clone()
                        .zip(out)
                        .for_each(|(row, out)| put(out, dot(s, row, x, |s, w: &[u8; 64]| s.bf16x32(w))));
                }
                Format::Fp8 { scales } => {
                    let blocks = columns.div_ceil(FP8_BLOCK);
                    let mut rows = rows.clone();
                    for (out, scales) in out.chunks_mut(FP8_BLOCK).zip(scales.chunks_exact(blocks)) {
                        let x = packed.pack(order, x, |block| scales[block] * 256.0);
                        out.iter_mut()
                            .zip(&mut rows)
                            .for_each(|(out, row)| put(out, dot(s, row, x, |s, w: &[u8; 64]| s.e4m3x64(w))));
                    }
                }
                Format::Int4 { scales, zeros, group } => {
                    let (x, sx) = packed.quantize(x);
                    let groups = columns.div_ceil(*group);
                    for (o, (row, out)) in rows.clone().zip(out).enumerate() {
                        let scales = &scales[o * groups..][..groups];
                        let zeros = if zeros.is_empty() {
                            None
                        } else {
                            Some(&zeros[o * groups..][..groups])
                        };
                        put(out, dot_int4(s, row, x, sx, scales, zeros, *group));
                    }
                }
            }
        }
    }
}

/// A row of a float format times a packed token; `decode` gives `V` vectors from `N` bytes.
#[inline(always)]
fn dot<S: Simd, const N: usize, const V: usize>(
    s: S,
    row: &[u8],
    x: &[[f32; LANES]],
    decode: impl Fn(S, &[u8; N]) -> [S::F; V],
) -> f32 {
    let mut sum = s.splat(0.0);
    let (chunks, rest) = row.as_chunks::<N>();
    let (x, _) = x.as_chunks::<V>();
    let mut step = |chunk: &[u8; N], x: &[[f32; LANES]; V]| {
        let w = decode(s, chunk);
        for (w, x) in w.into_iter().zip(x) {
            sum = s.fma(w, s.load(x), sum);
        }
    };
    chunks.iter().zip(x).for_each(|(chunk, x)| step(chunk, x));
    if !rest.is_empty() {
        let mut last = [0; N];
        last[..rest.len()].copy_from_slice(rest);
        step(&last, &x[chunks.len()]);
    }
    s.sum(sum)
}

/// A row of an INT4 weight times a quantised token.
#[inline(always)]
fn dot_int4<S: Simd>(
    s: S,
    row: &[u8],
    x: &[[i16; INT4_BLOCK]],
    sx: &[f32],
    scales: &[f32],
    zeros: Option<&[u8]>,
    group: usize,
) -> f32 {
    let mut sum = s.splat(0.0);
    for (c, (x, sx)) in x.iter().zip(sx).enumerate() {
        let bytes = &row[c * 64..row.len().min(c * 64 + 64)];
        let mut q = [0; 64];
        q[..bytes.len()].copy_from_slice(bytes);
        let group_of = |lane: usize| ((c * INT4_BLOCK + lane * 8) / group).min(scales.len() - 1);
        let zero = std::array::from_fn(|d| zeros.map_or(8, |zeros| i32::from(zeros[group_of(d)])));
        let scale = std::array::from_fn(|d| scales[group_of(d)] * sx);
        sum = s.fma(s.int4x128(&q, &zero, x), s.load(&scale), sum);
    }
    s.sum(sum)
}

/// Row `row` of the weight as F32 into `out`, each value rounded once.
pub(crate) fn dequantize_row(weight: &CpuLinear, row: usize, out: &mut [f32]) {
    let bytes = &weight.bytes()[row * weight.row_bytes()..][..weight.row_bytes()];
    let out = out.iter_mut().enumerate();
    match &weight.format {
        Format::F32 => out
            .zip(bytes.as_chunks::<4>().0)
            .for_each(|((_, out), b)| *out = f32::from_le_bytes(*b)),
        Format::F16 => out
            .zip(bytes.as_chunks::<2>().0)
            .for_each(|((_, out), b)| *out = half::f16::from_le_bytes(*b).to_f32()),
        Format::Bf16 => out
            .zip(bytes.as_chunks::<2>().0)
            .for_each(|((_, out), b)| *out = half::bf16::from_le_bytes(*b).to_f32()),
        Format::Fp8 { scales } => {
            let scales = &scales[row / FP8_BLOCK * weight.in_features.div_ceil(FP8_BLOCK)..];
            out.zip(bytes).for_each(|((k, out), code)| {
                *out = crate::cpu::float8::e4m3_to_f32(*code) * scales[k / FP8_BLOCK]
            });
        }
        Format::Int4 { scales, zeros, group } => {
            let groups = weight.in_features.div_ceil(*group);
            for (k, out) in out {
                let at = row * groups + k / group;
                let q = i32::from(bytes[k / 2] >> (4 * (k % 2)) & 15);
                *out = (q - zeros.get(at).map_or(8, |zero| i32::from(*zero))) as f32 * scales[at];
            }
        }
    }
}
