//! One conversation alone: single tokens over a context, by the kernel that runs a whole step.

use conclave_kernels::backend::*;

use super::{Small, backends, shapes};
use crate::host::*;
use crate::report::Report;

/// Relative 2-norm of the difference.
pub fn distance(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (difference / expected.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

/// One conversation alone: a prompt, then single tokens over its context, against op by op and the CPU.
pub fn alone(report: &mut Report) {
    let kinds = [
        (Kind::Int4(128, true), KvDtype::Bf16),
        (Kind::Int4(128, true), KvDtype::Fp8E4m3),
        (Kind::Int4(32, false), KvDtype::Bf16),
        (Kind::Fp8, KvDtype::Bf16),
        (Kind::Fp8, KvDtype::Fp8E4m3),
        (Kind::Bf16, KvDtype::Bf16),
        (Kind::Bf16, KvDtype::Fp8E4m3),
    ];
    let shape = &shapes()[1];
    for (kind, kv) in kinds {
        for &length in report.some(&[15, 3, 255, 900], 1) {
            let (cpu, gpu) = backends();
            let (mut cpu, mut gpu) = (Small::new(cpu, shape, kind, kv), Small::new(gpu, shape, kind, kv));
            gpu.set_forward();
            let random = &mut Random(length as u64);
            let table = batch(random, &[(0, length + 20)], 128, shape.vocab);
            let mut position = 0;
            for (step, len) in [length, 1, 1, 1, 1].into_iter().enumerate() {
                let piece = Batch {
                    ids: (0..len).map(|_| random.below(shape.vocab) as u32).collect(),
                    positions: (position as u32..).take(len).collect(),
                    runs: vec![BatchRun {
                        first: 0,
                        len: len as u32,
                        position: position as u32,
                        pages: table.runs[0].pages.clone(),
                    }],
                    logit_rows: vec![len as u32 - 1],
                };
                position += len;
                let name = format!("alone {kind:?} {kv:?} position {}", position - 1);
                let steps = (step > 0).then(|| (gpu.forward(&piece), gpu.forward(&piece)));
                // Op by op, which leaves the keys that the next step reads. Close to it; the CPU may choose another expert
                // where two are close, because a key was rounded another way: how far is printed.
                let by_op = gpu.ops(&piece);
                println!(
                    "{:8} {:9.2e}          by op, CPU: {name}",
                    "",
                    distance(&by_op, &cpu.ops(&piece))
                );
                if let Some((found, again)) = steps {
                    report.compare_rows(
                        &format!("whole, by op: {name}"),
                        &found,
                        &by_op,
                        shape.vocab,
                        1e-2,
                        0.0,
                    );
                    report.same_bits(&format!("{name} again"), &found, &again);
                }
            }
        }
    }
}
