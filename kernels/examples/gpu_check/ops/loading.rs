//! Loading: INT4 as checkpoints store it gives the weights that rows of outputs give, in one piece or several, and a value
//! that is not finite ends the upload.

use std::sync::Arc;

use conclave_kernels::backend::*;
use conclave_kernels::cuda::CudaBackend;
use conclave_kernels::weight::{HostInt4, HostLinear, HostWeight, PackedInt4, PackedOrder, ScaleType};

use crate::host::*;
use crate::report::Report;

/// Output of an AWQ word's eight that nibble n holds.
const AWQ: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

pub fn check(report: &mut Report) {
    packed(report);
    not_finite(report);
}

fn packed(report: &mut Report) {
    // The last is several buffers long, with outputs that are no whole number of tiles.
    let shapes = [(128, 256), (104, 384), (1000, 1536), (2056, 9216)];
    let mut gpu = CudaBackend::new(limits(3, 1, 8), 0).unwrap();
    for &(outputs, inputs) in report.some(&shapes, 2) {
        for (order, group, less, scales) in [
            (PackedOrder::Rows, 32, 0, ScaleType::Bf16),
            (PackedOrder::Rows, 128, 0, ScaleType::F16),
            (PackedOrder::Inputs, 128, 1, ScaleType::F16),
            (PackedOrder::Inputs, 64, 0, ScaleType::F32),
            (PackedOrder::Outputs, 128, 0, ScaleType::F16),
            (PackedOrder::Outputs, 32, 0, ScaleType::F16),
        ] {
            let random = &mut Random(outputs as u64 + group as u64);
            let kind = Kind::Int4(group, order != PackedOrder::Rows);
            let mut rows = linear(random, outputs, inputs, kind);
            let HostWeight::Int4(host) = &mut rows.data else {
                unreachable!("asked for INT4")
            };
            for zero in host.zeros.iter_mut().flatten() {
                // What four bits can say.
                *zero = (*zero).clamp(less, 15 + less);
            }
            if scales == ScaleType::Bf16 {
                let rounded = |scale: &mut f32| *scale = half::bf16::from_f32(*scale).to_f32();
                host.scales.iter_mut().for_each(rounded);
            }
            let stored = HostLinear {
                data: HostWeight::Packed(pack(host, outputs, inputs, order, less, scales)),
                ..rows.clone()
            };
            let x = upload(&mut gpu, &random.values(3 * inputs, 2.0));
            gpu.begin(&batch(random, &[(0, 3)], 8, 10)).unwrap();
            let mut product = |weight: &HostLinear| {
                let weight = gpu.upload_linear(weight).unwrap();
                let hidden = upload(&mut gpu, &vec![0.0; 3 * outputs]);
                gpu.linear_add(weight, &x, &hidden).unwrap();
                download(&mut gpu, &hidden, 3 * outputs)
            };
            let (expected, found) = (product(&rows), product(&stored));
            let name = format!("packed {order:?} [{outputs}, {inputs}] group {group} {scales:?}");
            report.same_bits(&name, &found, &expected);
        }
    }
}

fn pack(
    host: &HostInt4,
    outputs: usize,
    inputs: usize,
    order: PackedOrder,
    less: u8,
    scale_type: ScaleType,
) -> PackedInt4 {
    let bytes = (*host.packed).as_ref();
    let value = |output: usize, input: usize| {
        let at = output * inputs + input;
        u32::from(bytes[at / 2] >> (4 * (at % 2)) & 15)
    };
    let word = |nibble: &dyn Fn(usize) -> u32| (0..8).fold(0, |word, n| word | nibble(n) << (4 * n));
    let groups = inputs / host.group;
    let across = |n: usize| if order == PackedOrder::Outputs { AWQ[n] } else { n };
    let words: Vec<u32> = match order {
        PackedOrder::Rows => (0..outputs * inputs / 8)
            .map(|at| word(&|n| value(at / (inputs / 8), at % (inputs / 8) * 8 + n)))
            .collect(),
        PackedOrder::Inputs => (0..inputs / 8 * outputs)
            .map(|at| word(&|n| value(at % outputs, at / outputs * 8 + n)))
            .collect(),
        PackedOrder::Outputs => (0..inputs * (outputs / 8))
            .map(|at| word(&|n| value(at % (outputs / 8) * 8 + AWQ[n], at / (outputs / 8))))
            .collect(),
    };
    let zeros = host.zeros.as_ref().map(|zeros| {
        let words = (0..groups * (outputs / 8)).map(|at| {
            let (group, column) = (at / (outputs / 8), at % (outputs / 8));
            word(&|n| u32::from(zeros[(column * 8 + across(n)) * groups + group] - less))
        });
        words.flat_map(u32::to_le_bytes).collect::<Vec<u8>>()
    });
    let scale = |at: usize| match order {
        PackedOrder::Rows => host.scales[at],
        _ => host.scales[at % outputs * groups + at / outputs],
    };
    let scales: Vec<u8> = (0..outputs * groups)
        .flat_map(|at| match scale_type {
            ScaleType::F32 => scale(at).to_le_bytes().to_vec(),
            ScaleType::F16 => half::f16::from_f32(scale(at)).to_le_bytes().to_vec(),
            ScaleType::Bf16 => half::bf16::from_f32(scale(at)).to_le_bytes().to_vec(),
        })
        .collect();
    PackedInt4 {
        order,
        words: Arc::new(words.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>()),
        scales: Arc::new(scales),
        scale_type,
        zeros: zeros.map(|zeros| Arc::new(zeros) as _),
        zeros_less: less,
        group: host.group,
    }
}

fn not_finite(report: &mut Report) {
    let values =
        |count: usize, bytes: &[u8]| -> Vec<u8> { bytes.iter().copied().cycle().take(count).collect() };
    let mut gpu = CudaBackend::new(limits(1, 1, 8), 0).unwrap();
    for (name, one, bad) in [
        ("BF16", &[0x80u8, 0x3f][..], &[0x80u8, 0xff][..]),
        ("F16", &[0, 0x3c], &[1, 0x7c]),
        ("F32", &[0, 0, 0x80, 0x3f], &[0, 0, 0x80, 0x7f]),
        ("FP8", &[0x38], &[0xff]),
    ] {
        let weight = |spoilt: bool| {
            let mut data = values(112 * 384 * one.len(), one);
            if spoilt {
                let at = (111 * 384 + 383) * one.len();
                data[at..at + one.len()].copy_from_slice(bad);
            }
            let data = Arc::new(data);
            HostLinear {
                out_features: 112,
                in_features: 384,
                data: match name {
                    "BF16" => HostWeight::Bf16(data),
                    "F16" => HostWeight::F16(data),
                    "F32" => HostWeight::F32(data),
                    _ => HostWeight::Fp8Block {
                        data,
                        scales: vec![1.0; 3],
                    },
                },
            }
        };
        let seen = [false, true, false].map(|spoilt| gpu.upload_linear(&weight(spoilt)).err());
        let good = matches!(seen, [None, Some(KernelError::NotFinite), None]);
        report.expect(
            &format!("{name} that is not finite is refused, once"),
            good,
            &format!("{}", seen.iter().flatten().count()),
        );
    }
}
