//! The tiny reference checkpoints, op by op: logits and greedy tokens, against the references and the CPU backend.

use std::path::Path;

use conclave_kernels::backend::{Backend, KvDtype};
use conclave_kernels::cpu::CpuBackend;
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
        // Without the prefill kernel's rounding, which moves close choices of experts.
        backend.set_deterministic(true).unwrap();
        let mut model = Model::load(&dir, Box::new(backend), KvDtype::Bf16);
        // The references keep keys and values as F32, the device as BF16: the CPU backend with BF16 ones shows what
        // that alone changes, and with F32 ones gives the references' tokens (`tests/reference.rs`).
        let cpu = CpuBackend::new(limits(), 1, None).unwrap();
        let mut cpu = Model::load(&dir, Box::new(cpu), KvDtype::Bf16);
        let (output, same_keys) = (model.step(&prompt, 0), cpu.step(&prompt, 0));
        let reference = tensor_f32(&file, "logits");
        let width = reference.len() / prompt.len();
        for (name, expected, bound) in [
            ("reference", &reference, 1e-2),
            ("CPU with BF16 keys", &same_keys.logits, 2e-3),
        ] {
            let name = format!("{folder} logits of the prompt, {name}");
            report.compare_rows(&name, &output.logits, expected, width, bound, 0.05);
        }
        for (layer, (router, expected)) in output.router.iter().zip(&same_keys.router).enumerate() {
            let name = format!("{folder} router logits of layer {layer}, CPU with BF16 keys");
            report.compare(&name, router, expected, 5e-3);
        }
        // Each step is fed with the reference's token, so that one tie does not hide the rest.
        let mut found = vec![(
            model.greedy(prompt.len() - 1),
            cpu.greedy(prompt.len() - 1),
            String::new(),
        )];
        for (i, token) in greedy.iter().enumerate().take(greedy.len() - 1) {
            let position = prompt.len() + i;
            let output = model.step(&[*token], position);
            cpu.step(&[*token], position);
            let (got, next) = (model.greedy(0), greedy[i + 1]);
            let gap = output.logits[got as usize] - output.logits[next as usize];
            found.push((
                got,
                cpu.greedy(0),
                format!("ahead of the reference's {next} by {gap:.1e}"),
            ));
        }
        let mut unlike_cpu = 0;
        for (i, ((got, cpu, gap), wanted)) in found.iter().zip(&greedy).enumerate() {
            unlike_cpu += usize::from(got != cpu && got != wanted);
            if got != wanted {
                println!("         token {i}: {got}, {gap}; the CPU with BF16 keys: {cpu}");
            }
        }
        let equal = found.iter().zip(&greedy).filter(|(a, b)| a.0 == **b).count();
        report.expect(
            &format!("{folder} greedy tokens: the reference's, or the CPU's with BF16 keys"),
            unlike_cpu == 0,
            &format!("{equal} of {}, {unlike_cpu} of neither", greedy.len()),
        );
    }
}
