//! The CPU backend against the reference checkpoints: logits, router logits and greedy tokens.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod common;

use std::path::PathBuf;

use common::{Model, limits, tensor_f32};
use conclave_kernels::backend::{Backend, KvDtype};
use conclave_kernels::cpu::CpuBackend;
use safetensors::SafeTensors;

fn ids(file: &SafeTensors<'_>, name: &str) -> Vec<u32> {
    let data = file.tensor(name).unwrap().data().to_vec();
    data.as_chunks::<8>()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b) as u32)
        .collect()
}

fn check(folder: &str) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data/minimax-m2")
        .join(folder);
    let data = std::fs::read(dir.join("reference.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    let (prompt, greedy) = (ids(&file, "input_ids"), ids(&file, "greedy_ids"));
    let backend = CpuBackend::new(limits(), 1, None).unwrap();
    let mut model = Model::load(&dir, Box::new(backend), KvDtype::F32);
    let output = model.step(&prompt, 0);
    let error = relative_error(&output.logits, &tensor_f32(&file, "logits"));
    // INT4 rounds activations to 16 bits.
    let bound = if folder.ends_with("int4") { 5e-4 } else { 1e-5 };

    assert!(error < bound, "{folder}: logits differ by {error:.1e}");
    for (layer, router) in output.router.iter().enumerate() {
        let error = relative_error(router, &tensor_f32(&file, &format!("router_logits.{layer}")));
        assert!(
            error < bound,
            "{folder}: router logits of layer {layer} differ by {error:.1e}"
        );
    }
    let mut generated = vec![model.greedy(prompt.len() - 1)];
    while generated.len() < greedy.len() {
        let position = prompt.len() + generated.len() - 1;
        model.step(&generated[generated.len() - 1..], position);
        generated.push(model.greedy(0));
    }
    assert_eq!(generated, greedy, "{folder}");
}

/// With activations quantised, too: expected values are `ref_numpy.py DIR --act-fp8`'s (three rows of logits and the tokens).
fn check_fp8_activations(folder: &str) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data/minimax-m2")
        .join(folder);
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let (weight_only, quantised) = (read("reference.safetensors"), read("act-fp8.safetensors"));
    let (weight_only, quantised) = (
        SafeTensors::deserialize(&weight_only).unwrap(),
        SafeTensors::deserialize(&quantised).unwrap(),
    );
    let (prompt, greedy) = (ids(&weight_only, "input_ids"), ids(&quantised, "greedy_ids"));
    let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
    assert!(backend.set_fp8_activations(true).unwrap());
    let mut model = Model::load(&dir, Box::new(backend), KvDtype::F32);
    let output = model.step(&prompt, 0);
    let expected = tensor_f32(&quantised, "logits");
    let rows = ids(&quantised, "rows");
    let vocab = expected.len() / rows.len();
    for (row, expected) in rows.iter().zip(expected.chunks(vocab)) {
        let found = &output.logits[*row as usize * vocab..][..vocab];
        let error = relative_error(found, expected);
        // The first token sees itself alone. Later, a value halfway between two codes goes the other way after another
        // order of summation, and now and then a close choice of experts with it.
        let bound = if *row == 0 { 1e-5 } else { 0.1 };
        assert!(
            error < bound,
            "{folder}: logits of row {row} differ by {error:.1e}"
        );
    }
    // Each step is fed with the reference's token.
    let mut logits = output.logits[(prompt.len() - 1) * vocab..].to_vec();
    for (i, token) in greedy.iter().enumerate() {
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        let gap = best - logits[*token as usize];
        assert!(gap < 0.1, "{folder}: token {i} is {gap} behind the best");
        logits = model.step(&[*token], prompt.len() + i).logits;
    }
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let difference = square(
        &mut found
            .iter()
            .zip(expected)
            .map(|(a, b)| f64::from(*a) - f64::from(*b)),
    );
    (difference / square(&mut expected.iter().map(|x| f64::from(*x)))).sqrt()
}

#[test]
fn matches_the_references_of_head_64() {
    ["tiny-hd64/bf16", "tiny-hd64/fp8", "tiny-hd64/ct-int4"]
        .into_iter()
        .for_each(check);
}

#[test]
fn matches_the_references_of_head_128() {
    ["tiny-hd128/bf16", "tiny-hd128/fp8"].into_iter().for_each(check);
}

#[test]
fn matches_the_references_with_fp8_activations() {
    ["tiny-hd64/fp8", "tiny-hd128/fp8"]
        .into_iter()
        .for_each(check_fp8_activations);
}
