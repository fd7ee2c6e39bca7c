//! The gate's weights times the output projection's, against its definition in F64.

use conclave_kernels::backend::Backend;
use conclave_kernels::cuda::CudaBackend;
use conclave_kernels::weight::{HostLinear, HostWeight};

use crate::host::*;
use crate::report::Report;

/// As in both factors' parts: 16 bits of mantissa each.
const BOUND: f64 = 5e-5;

/// (experts, width, q width), rows.
pub fn check(report: &mut Report) {
    let shapes = [
        (16, 128, 128, 1),
        (48, 256, 384, 3),
        (256, 3072, 6144, 2),
        (144, 384, 2048, 5),
    ];
    for kind in [
        Kind::Int4(128, true),
        Kind::Int4(128, false),
        Kind::Fp8,
        Kind::Bf16,
    ] {
        for &(experts, width, q_width, tokens) in report.some(&shapes, 2) {
            let random = &mut Random(experts as u64 + 3);
            let (gate, output) = (
                linear(random, experts, width, Kind::F32),
                linear(random, width, q_width, kind),
            );
            let (norm, x) = (random.values(width, 2.0), random.values(tokens * q_width, 2.0));
            let mut gpu = CudaBackend::new(limits(8, 2, 16), 0).unwrap();
            let ids = [&gate, &output].map(|weight| gpu.upload_linear(weight).unwrap());
            let norm_id = gpu.upload_vector(&norm).unwrap();
            let folded = gpu.fold_gate(ids[0], norm_id, ids[1]).unwrap();
            let input = upload(&mut gpu, &x);
            let sums = upload(&mut gpu, &vec![0.0; tokens * experts]);
            gpu.begin(&batch(random, &[(0, tokens)], 16, 10)).unwrap();
            gpu.linear_add(folded, &input, &sums).unwrap();
            let found = download(&mut gpu, &sums, tokens * experts);
            let mut expected = Vec::new();
            for row in x.chunks(q_width) {
                let row: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
                let mut inner = product(&output, &row);
                for (v, factor) in inner.iter_mut().zip(&norm) {
                    *v *= f64::from(*factor);
                }
                expected.extend(product(&gate, &inner).iter().map(|v| *v as f32));
            }
            report.compare(
                &format!("fold {kind:?} [{experts}, {width}, {q_width}] x {tokens}"),
                &found,
                &expected,
                BOUND,
            );
        }
    }
}

fn product(weight: &HostLinear, x: &[f64]) -> Vec<f64> {
    let dot = |row: usize| values(weight, row).iter().zip(x).map(|(a, b)| a * b).sum();
    (0..weight.out_features).map(dot).collect()
}

/// A row of a weight as its format defines it.
fn values(weight: &HostLinear, row: usize) -> Vec<f64> {
    let inputs = weight.in_features;
    let (first, end) = (row * inputs, (row + 1) * inputs);
    match &weight.data {
        HostWeight::F32(data) => {
            let words = data.as_ref().as_ref()[first * 4..end * 4].as_chunks::<4>().0;
            words
                .iter()
                .map(|word| f64::from(f32::from_le_bytes(*word)))
                .collect()
        }
        HostWeight::Bf16(data) => {
            let words = data.as_ref().as_ref()[first * 2..end * 2].as_chunks::<2>().0;
            words
                .iter()
                .map(|word| half::bf16::from_le_bytes(*word).to_f64())
                .collect()
        }
        HostWeight::Fp8Block { data, scales } => {
            let scales = &scales[row / 128 * inputs.div_ceil(128)..];
            let codes = data.as_ref().as_ref()[first..end].iter().enumerate();
            codes
                .map(|(k, code)| e4m3(*code) * f64::from(scales[k / 128]))
                .collect()
        }
        HostWeight::Int4(int4) => {
            let packed = &int4.packed.as_ref().as_ref()[first / 2..end / 2];
            let value = |k: usize| {
                let group = (first + k) / int4.group;
                let q = packed[k / 2] >> (4 * (k % 2)) & 15;
                let zero = int4.zeros.as_ref().map_or(8, |zeros| zeros[group]);
                (f64::from(q) - f64::from(zero)) * f64::from(int4.scales[group])
            };
            (0..inputs).map(value).collect()
        }
        HostWeight::F16(_) | HostWeight::Packed(_) => unreachable!("not a format of this check"),
    }
}

fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size = match exponent {
        0 => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}
