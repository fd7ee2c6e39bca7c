//! Every instruction set equals the portable one, to the bit, operation by operation.

use super::*;

/// Bits of the results of all operations on some data.
struct AllOperations<'a> {
    bytes: &'a [u8],
}

impl Kernel for AllOperations<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u32> {
        let mut bits = Vec::new();
        let put = |bits: &mut Vec<u32>, value: S::F| {
            let mut out = [0.0; LANES];
            s.store(value, &mut out);
            // NaNs are equal whatever their payload.
            bits.extend(out.map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }));
        };
        for window in self.bytes.as_chunks::<64>().0.windows(3) {
            let raw: [S::F; 3] = std::array::from_fn(|i| s.f32x16(&window[i]));
            let [small, even, odd] = {
                let [even, odd] = s.bf16x32(&window[1]);
                [s.mul(s.e4m3x64(&window[0])[0], s.splat(70.0)), even, odd]
            };
            for [a, b, c] in [raw, [small, even, odd]] {
                put(&mut bits, s.add(a, b));
                put(&mut bits, s.sub(a, b));
                put(&mut bits, s.mul(a, b));
                put(&mut bits, s.div(a, b));
                put(&mut bits, s.fma(a, b, c));
                put(&mut bits, s.max(a, b));
                put(&mut bits, s.min(a, b));
                put(&mut bits, math::exp(s, a));
                put(&mut bits, math::sigmoid(s, b));
                put(&mut bits, math::silu(s, c));
            }
            let sum4 = s.sum4([
                small,
                s.mul(small, small),
                s.splat(0.1),
                s.sub(small, s.splat(3.0)),
            ]);
            bits.extend(sum4.map(f32::to_bits));
            bits.push(s.sum(small).to_bits());
            bits.push(s.sum(s.mul(small, small)).to_bits());
            assert_eq!(bits[bits.len() - 2..], bits[bits.len() - 6..bits.len() - 4]);
            let (words, _) = window[0].as_chunks::<32>();
            put(&mut bits, s.f16x16(&words[0]));
            let (bytes, _) = window[1].as_chunks::<16>();
            put(&mut bits, s.e5m2x16(&bytes[1]));
            s.bf16x32(&window[2]).into_iter().for_each(|v| put(&mut bits, v));
            s.e4m3x64(&window[2]).into_iter().for_each(|v| put(&mut bits, v));
            let floats: [f32; LANES] = std::array::from_fn(|i| f32::from(window[0][i]));
            let integers: [i32; LANES] = std::array::from_fn(|i| i32::from(window[1][i]));
            for count in 0..=LANES {
                put(&mut bits, s.load_some(&floats[..count]));
            }
            for count in [1, 2, 4, 8, 16] {
                put(&mut bits, s.spread(&floats[..count]));
                put(&mut bits, s.to_f32(s.spread_i32(&integers[..count])));
            }
            let all: [f32; 64] = std::array::from_fn(|i| f32::from(window[2][i]));
            s.pairs_order(all.first_chunk().unwrap())
                .into_iter()
                .for_each(|v| put(&mut bits, v));
            s.e4m3_order(&all).into_iter().for_each(|v| put(&mut bits, v));
            let eight = [0, 1, 2, 0, 2, 1, 2, 0].map(|i| s.f32x16(&window[i]));
            for pairs in s.int4_order(&eight) {
                let mut out = [0; LANES];
                s.store_i32(s.as_ints(s.as_floats(pairs)), &mut out);
                bits.extend(out.map(|x| x as u32));
            }
            bits.extend([s.largest(raw[0]), s.largest(small)].map(f32::to_bits));
            let [q, x] = [s.int4x128(&window[0]), s.int4x128(&window[1])];
            let mut out = [0; LANES];
            for (q, x) in q.into_iter().zip(x) {
                let centered = s.sub_i16(q, s.splat_i32(0x0008_0007));
                let dot = s.dot_i16(s.load_i32(&out), centered, x);
                put(&mut bits, s.to_f32(dot));
                s.store_i32(centered, &mut out);
                bits.extend(out.map(|x| x as u32));
                s.store_i32(dot, &mut out);
            }
        }
        bits
    }
}

/// All byte values and many random ones.
fn bytes() -> Vec<u8> {
    let mut state = 1u64;
    let random = std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    (0..=255).chain(random.take(64 * 200)).collect()
}

#[test]
fn instruction_sets_agree_to_the_bit() {
    let bytes = bytes();
    let expected = run(Isa::Portable, AllOperations { bytes: &bytes });
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let found = run(isa, AllOperations { bytes: &bytes });
        let first = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(first, None, "{}", isa.name());
        assert_eq!(found.len(), expected.len());
    }
}

#[test]
fn exp_is_close_and_exact_at_zero() {
    struct Exp([f32; LANES]);
    impl Kernel for Exp {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let mut out = [0.0; LANES];
            s.store(math::exp(s, s.load(&self.0)), &mut out);
            out
        }
    }
    let exp = |x: f32| run(Isa::detect(), Exp([x; LANES]))[0];
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-0.0), 1.0);
    assert!(exp(f32::NAN).is_nan());
    assert!(exp(f32::NEG_INFINITY) > 0.0 && exp(f32::NEG_INFINITY) < 2e-38);
    assert!(exp(f32::INFINITY).is_finite());
    for i in -8700..=8830 {
        let x = i as f32 * 0.01;
        let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
        assert!(
            (found / expected - 1.0).abs() < 2.5e-7,
            "e^{x}: {found} and {expected}"
        );
    }
}
