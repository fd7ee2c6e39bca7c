//! The tiny reference checkpoints, op by op: logits and greedy tokens.

use std::path::Path;

use conclave_kernels::backend::{Backend, KvDtype};
use conclave_kernels::cuda::CudaBackend;
use safetensors::SafeTensors;

use crate::common::{Model, limits, tensor_f32};
use crate::report::Report;

pub fn references(report: &mut Report, data: &str) {
    for folder in [
        "tiny-hd64/bf16",
        "tiny-hd64/fp8",
        "tiny-hd64/ct-int4",
        "tiny-hd128/bf16",
        "tiny-hd128/fp8",
    ] {
        let dir = Path::new(data).join(folder);
        let bytes = std::fs::read(dir.join("reference.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = |name: &str| -> Vec<u32> {
            let data = file.tensor(name).unwrap().data().to_vec();
            data.as_chunks::<8>()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b) as u32)
                .collect()
        };
        let (prompt, greedy) = (ids("input_ids"), ids("greedy_ids"));
        let mut backend = CudaBackend::new(limits(), 0).unwrap();
        // The references are F32: without the prefill kernel's rounding, which moves close choices of experts.
        backend.set_deterministic(true).unwrap();
        let mut model = Model::load(&dir, Box::new(backend), KvDtype::Bf16);
        let output = model.step(&prompt, 0);
        let expected = tensor_f32(&file, "logits");
        let width = expected.len() / prompt.len();
        report.compare_rows(
            &format!("{folder} logits of the prompt"),
            &output.logits,
            &expected,
            width,
            1e-2,
            0.03,
        );
        for (layer, router) in output.router.iter().enumerate() {
            let expected = tensor_f32(&file, &format!("router_logits.{layer}"));
            report.compare(
                &format!("{folder} router logits of layer {layer}"),
                router,
                &expected,
                2e-2,
            );
        }
        let mut generated = vec![model.greedy(prompt.len() - 1)];
        let mut gaps = Vec::new();
        while generated.len() < greedy.len() {
            // Fed with the reference's tokens, so that one tie does not hide the rest.
            let position = prompt.len() + generated.len() - 1;
            let output = model.step(&greedy[generated.len() - 1..generated.len()], position);
            generated.push(model.greedy(0));
            let mut sorted = output.logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            gaps.push(sorted[0] - sorted[1]);
        }
        let equal = generated.iter().zip(&greedy).filter(|(a, b)| a == b).count();
        for (i, (a, b)) in generated.iter().zip(&greedy).enumerate() {
            if a != b {
                println!(
                    "         token {i}: {a} for {b}, gap of the two best logits {:.1e}",
                    gaps[i.saturating_sub(1)]
                );
            }
        }
        report.expect(
            &format!("{folder} greedy tokens"),
            equal == greedy.len(),
            &format!("{equal} of {}", greedy.len()),
        );
    }
}
