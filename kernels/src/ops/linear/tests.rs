//! Linear against F64 over a table of shapes, and bit-equality over tokens, threads and instruction sets.

use std::sync::Arc;

use proptest::prelude::*;

use super::{Out, Packed, dequantize_row, linears_of};
use crate::backend::{Backend, KernelError};
use crate::cpu::engine::Engine;
use crate::cpu::weights::CpuLinear;
use crate::cpu::{CpuBackend, Isa};
use crate::ops::linear::Scratch;
use crate::testing::*;
use crate::weight::{Bytes, HostInt4, HostLinear, HostWeight};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F32,
    F16,
    Bf16,
    Fp8,
    Int4 { group: usize, zeros: bool },
}

const KINDS: [Kind; 10] = [
    Kind::F32,
    Kind::F16,
    Kind::Bf16,
    Kind::Fp8,
    Kind::Int4 {
        group: 128,
        zeros: false,
    },
    Kind::Int4 {
        group: 32,
        zeros: false,
    },
    Kind::Int4 {
        group: 128,
        zeros: true,
    },
    Kind::Int4 {
        group: 64,
        zeros: true,
    },
    Kind::Int4 {
        group: 8,
        zeros: true,
    },
    Kind::Int4 {
        group: 256,
        zeros: true,
    },
];

/// Bytes that begin one after an allocation's start: no alignment may be assumed.
struct Unaligned(Vec<u8>);

impl crate::weight::Stored for Unaligned {}

impl AsRef<[u8]> for Unaligned {
    fn as_ref(&self) -> &[u8] {
        &self.0[1..]
    }
}

fn unaligned(bytes: impl IntoIterator<Item = u8>) -> Bytes {
    Arc::new(Unaligned(std::iter::once(0xff).chain(bytes).collect()))
}

fn random_weight(kind: Kind, out: usize, input: usize, random: &mut Random) -> HostLinear {
    let values = random.vec(out * input);
    let data = match kind {
        Kind::F32 => HostWeight::F32(unaligned(values.iter().flat_map(|x| x.to_le_bytes()))),
        Kind::F16 => HostWeight::F16(unaligned(
            values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()),
        )),
        Kind::Bf16 => HostWeight::Bf16(unaligned(
            values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()),
        )),
        Kind::Fp8 => {
            // Any code but the two NaNs, subnormals included.
            let code = |random: &mut Random| match random.bits() as u8 {
                code if code & 0x7f == 0x7f => 0x7e,
                code => code,
            };
            let data: Vec<u8> = (0..out * input).map(|_| code(random)).collect();
            let scales = random.vec(out.div_ceil(128) * input.div_ceil(128));
            HostWeight::Fp8Block {
                data: unaligned(data),
                scales,
            }
        }
        Kind::Int4 { group, zeros } => {
            let groups = out * input.div_ceil(group);
            let packed: Vec<u8> = (0..out * input / 2).map(|_| random.bits() as u8).collect();
            HostWeight::Int4(HostInt4 {
                packed: unaligned(packed),
                scales: random.vec(groups),
                zeros: zeros.then(|| (0..groups).map(|_| random.below(17) as u8).collect()),
                group,
            })
        }
    };
    HostLinear {
        out_features: out,
        in_features: input,
        data,
    }
}

/// Results of all tokens at once.
fn multiply(isa: Isa, threads: usize, weight: &CpuLinear, x: &[f32]) -> Vec<f32> {
    let tokens = x.len() / weight.in_features;
    let mut engine = Engine::new(isa, threads).unwrap();
    let columns = weight.in_features;
    engine
        .each_scratch(|scratch| {
            scratch.linear = Scratch::new(columns)?;
            Ok(())
        })
        .unwrap();
    let mut packed = Packed::new(tokens, weight.in_features).unwrap();
    let mut y = vec![f32::NAN; tokens * weight.out_features];
    // SAFETY: `linears_of` gives each result to one task.
    let out = unsafe { Out::new(&mut y, weight.out_features, false) };
    linears_of(&mut engine, &mut packed, x, &[(weight, out)]);
    y
}

/// Exact results and, per result, the sum of magnitudes that rounding errors are relative to.
fn reference(weight: &CpuLinear, x: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let columns = weight.in_features;
    let mut row = vec![0.0; columns];
    let rows: Vec<Vec<f32>> = (0..weight.out_features)
        .map(|r| {
            dequantize_row(weight, r, &mut row);
            row.clone()
        })
        .collect();
    let mut sums = (Vec::new(), Vec::new());
    for x in x.chunks_exact(columns) {
        for row in &rows {
            let products = || row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            sums.0.push(products().sum());
            sums.1.push(products().map(f64::abs).sum());
        }
    }
    sums
}

/// Largest error relative to the sum of magnitudes: F32 rounding; for INT4 the rounding of inputs to 16 bits, relative
/// to the largest input.
fn bounds(kind: Kind, weight: &CpuLinear, x: &[f32], magnitudes: &[f64]) -> Vec<f64> {
    let columns = weight.in_features;
    let mut row = vec![0.0; columns];
    let weights: Vec<f64> = (0..weight.out_features)
        .map(|r| {
            dequantize_row(weight, r, &mut row);
            row.iter().map(|w| f64::from(w.abs())).sum()
        })
        .collect();
    let results = magnitudes.iter().enumerate();
    results
        .map(|(i, magnitude)| {
            let x = &x[i / weight.out_features * columns..][..columns];
            let largest = x.iter().fold(0.0, |m: f64, x| m.max(f64::from(x.abs())));
            let rounding = if matches!(kind, Kind::Int4 { .. }) {
                largest * weights[i % weight.out_features]
            } else {
                0.0
            };
            magnitude * 2e-6 + rounding / 65534.0 * 1.01 + 1e-30
        })
        .collect()
}

/// Outputs, inputs, tokens. Odd sizes, single ones, tails of every chunk, the borders of blocks and tiles.
const SHAPES: [(usize, usize, usize); 14] = [
    (1, 2, 1),
    (3, 16, 2),
    (5, 62, 3),
    (4, 64, 4),
    (17, 130, 5),
    (128, 128, 1),
    (129, 64, 6),
    (131, 258, 7),
    (7, 1000, 8),
    (260, 384, 9),
    (66, 514, 13),
    (33, 2304, 1),
    (34, 2050, 14),
    (10, 256, 131),
];

#[test]
fn equals_f64_over_the_shapes_and_is_the_same_for_all_instruction_sets_threads_and_batches() {
    let mut random = Random::new(1);
    for kind in KINDS {
        for (out, input, tokens) in SHAPES {
            let weight = CpuLinear::new(&random_weight(kind, out, input, &mut random)).unwrap();
            let x = random.vec(tokens * input);
            let what = format!("{kind:?} [{out}, {input}] x {tokens}");
            let found = multiply(Isa::detect(), 1, &weight, &x);
            let (expected, magnitudes) = reference(&weight, &x);
            assert_close(&what, &found, &expected, &bounds(kind, &weight, &x, &magnitudes));
            let one_by_one: Vec<f32> = x
                .chunks_exact(input)
                .flat_map(|x| multiply(Isa::detect(), 1, &weight, x))
                .collect();
            assert_eq!(bits(&one_by_one), bits(&found), "{what}: one by one");
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                assert_eq!(
                    bits(&multiply(isa, 3, &weight, &x)),
                    bits(&found),
                    "{what}: {isa:?}"
                );
            }
        }
    }
}

/// A NaN or an infinity in a token's input shows in all that token's results, and in no other token's.
#[test]
fn what_is_not_finite_stays_with_its_token() {
    let mut random = Random::new(2);
    for kind in KINDS {
        for bad in [f32::NAN, f32::INFINITY] {
            let weight = CpuLinear::new(&random_weight(kind, 9, 256, &mut random)).unwrap();
            let mut x = random.vec(3 * 256);
            let clean = multiply(Isa::detect(), 1, &weight, &x);
            x[256 + 77] = bad;
            let found = multiply(Isa::detect(), 1, &weight, &x);
            assert!(found[9..18].iter().all(|y| !y.is_finite()), "{kind:?}");
            assert_eq!(bits(&found[..9]), bits(&clean[..9]));
            assert_eq!(bits(&found[18..]), bits(&clean[18..]));
        }
    }
}

#[test]
fn linear_add_adds_to_what_is_there() {
    let mut random = Random::new(3);
    let host = random_weight(Kind::Bf16, 70, 96, &mut random);
    let (x, before) = (random.vec(5 * 96), random.vec(5 * 70));
    let product = multiply(Isa::detect(), 1, &CpuLinear::new(&host).unwrap(), &x);
    let expected: Vec<f32> = before.iter().zip(&product).map(|(a, b)| a + b).collect();
    for mut backend in backends(&limits()) {
        let weight = backend.upload_linear(&host).unwrap();
        begin_tokens(&mut backend, 5);
        let (x, hidden) = (upload(&mut backend, &x), upload(&mut backend, &before));
        backend.linear_add(weight, &x, &hidden).unwrap();
        assert_eq!(
            bits(&download(&mut backend, &hidden, 350)),
            bits(&expected),
            "{backend:?}"
        );
    }
}

/// Every length is checked, and the error names what is wrong.
#[test]
fn weights_of_wrong_lengths_are_refused() {
    let mut random = Random::new(4);
    let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
    let mut refused = |weight: HostLinear, what: &str| {
        let error = backend.upload_linear(&weight).unwrap_err().to_string();
        assert!(error.contains(what), "{error} does not name {what}");
    };
    for kind in KINDS {
        let mut weight = random_weight(kind, 10, 256, &mut random);
        weight.in_features = 258;
        refused(
            weight,
            if kind == Kind::Fp8 {
                "FP8 scales"
            } else if matches!(kind, Kind::Int4 { .. }) {
                "INT4 scales"
            } else {
                "weight bytes"
            },
        );
        let mut weight = random_weight(kind, 10, 256, &mut random);
        weight.out_features = usize::MAX / 3;
        refused(weight, "upload_linear");
        let mut weight = random_weight(kind, 10, 256, &mut random);
        weight.out_features = 0;
        refused(weight, "[0, 256]");
    }
    let int4 = |change: &dyn Fn(&mut HostInt4)| {
        let mut weight = random_weight(
            Kind::Int4 {
                group: 32,
                zeros: true,
            },
            4,
            64,
            &mut Random::new(5),
        );
        if let HostWeight::Int4(int4) = &mut weight.data {
            change(int4);
        }
        weight
    };
    refused(int4(&|w| w.group = 0), "group size 0");
    refused(int4(&|w| w.group = 48), "group size 48");
    refused(int4(&|w| w.group = 4), "group size 4");
    refused(int4(&|w| w.zeros = Some(vec![17; 8])), "INT4 zero is 17");
    refused(
        int4(&|w| w.zeros = Some(vec![8; 7])),
        "INT4 zeros is 7, expected 8",
    );
}

#[test]
fn ops_refuse_buffers_and_handles_that_do_not_fit() {
    let mut random = Random::new(6);
    let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
    let weight = backend
        .upload_linear(&random_weight(Kind::F32, 8, 16, &mut random))
        .unwrap();
    begin_tokens(&mut backend, 3);
    let (x, hidden) = (upload(&mut backend, &[0.0; 48]), upload(&mut backend, &[0.0; 24]));
    let short = upload(&mut backend, &[0.0; 23]);
    backend.linear_add(weight, &x, &hidden).unwrap();
    for (weight, x, hidden) in [
        (weight, &x, &short),
        (weight, &short, &hidden),
        (weight, &x, &x),
        (crate::backend::LinearId(7), &x, &hidden),
    ] {
        let error = backend.linear_add(weight, x, hidden).unwrap_err();
        assert!(
            matches!(error, KernelError::Shape { op: "linear_add", .. }),
            "{error}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Any shape: every instruction set and any split of the tokens give the same bits.
    #[test]
    fn any_shape_is_the_same_however_it_is_computed(
        kind in 0..KINDS.len(),
        out in 1..80usize,
        half_input in 1..300usize,
        tokens in 1..16usize,
        split in 0..16usize,
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let input = 2 * half_input;
        let weight = CpuLinear::new(&random_weight(KINDS[kind], out, input, &mut random)).unwrap();
        let x = random.vec(tokens * input);
        let whole = multiply(Isa::detect(), 1, &weight, &x);
        let (first, second) = x.split_at(split.min(tokens) * input);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let mut parts = multiply(isa, 2, &weight, first);
            parts.extend(multiply(isa, 1, &weight, second));
            prop_assert_eq!(bits(&parts), bits(&whole), "{:?}", isa);
        }
    }
}
