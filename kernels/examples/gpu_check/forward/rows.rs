//! More rows of logits than a pass of the head holds.

use conclave_kernels::backend::*;

use super::{Small, backends, shapes};
use crate::host::*;
use crate::report::Report;

/// Logits of a prompt's rows part by part, from the states that a step leaves, are those of all rows at once.
pub fn rows(report: &mut Report) {
    let shape = &shapes()[1];
    for &length in report.some(&[7, 60, 700], 1) {
        for deterministic in [false, true] {
            let (_, gpu) = backends();
            let mut gpu = Small::new(gpu, shape, Kind::Fp8, KvDtype::Bf16);
            gpu.set_deterministic(deterministic);
            let mut prompt = batch(&mut Random(length as u64), &[(0, length)], 128, shape.vocab);
            prompt.logit_rows = (0..length as u32).collect();
            let expected = gpu.forward(&prompt);
            prompt.logit_rows = vec![0];
            gpu.forward(&prompt);
            let parts = (0..length as u32).step_by(48);
            let found: Vec<f32> = parts
                .flat_map(|first| gpu.more_rows(&prompt, first..(first + 48).min(length as u32)))
                .collect();
            // Deterministic: bit by bit.
            let bound = if deterministic { f64::MIN_POSITIVE } else { 1e-2 };
            report.compare(
                &format!("rows of {length} tokens in parts, deterministic {deterministic}"),
                &found,
                &expected,
                bound,
            );
        }
    }
}
