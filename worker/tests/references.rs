//! Every reference checkpoint: logits, greedy ids and router logits, with any number of workers.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::PathBuf;

use common::repository;
use conclave_kernels::backend::KvDtype;
use conclave_worker::device::DeviceKind;
use conclave_worker::verify::{Comparison, VerifyConfig, verify};

/// Checkpoint directory and reference file.
fn checkpoints() -> Vec<(PathBuf, PathBuf)> {
    let tiny = repository().join("tests/data/minimax-m2");
    let names = [
        "tiny-hd64/bf16",
        "tiny-hd64/fp8",
        "tiny-hd64/awq",
        "tiny-hd64/gptq",
        "tiny-hd64/ct-int4",
        "tiny-hd128/bf16",
        "tiny-hd128/fp8",
        "tiny-hd128/awq",
    ];
    let tiny = names.map(|name| (tiny.join(name), tiny.join(name).join("reference.safetensors")));
    let demo = (
        repository().join("models/demo"),
        repository().join("tests/data/demo/reference.safetensors"),
    );
    tiny.into_iter().chain([demo]).collect()
}

fn verified(checkpoint: &(PathBuf, PathBuf), workers: u32, prefill_chunk: Option<usize>) -> Comparison {
    let config = VerifyConfig {
        model_dir: checkpoint.0.clone(),
        hf_overrides: None,
        reference: checkpoint.1.clone(),
        workers,
        threads: 1,
        kv_dtype: KvDtype::F32,
        prefill_chunk,
        device: DeviceKind::Cpu,
        deterministic: false,
    };
    let found = verify(&config);
    let mut found = found.unwrap_or_else(|error| panic!("{}: {error}", checkpoint.0.display()));
    found.swap_remove(0).1
}

fn check(checkpoint: &(PathBuf, PathBuf), comparison: &Comparison) {
    let name = checkpoint.0.display();
    println!(
        "{name}: logits {:.1e}, worst position {:.1e}, argmax {}/{}, greedy {}/{}, router {:.1e}",
        comparison.logits_relative_error,
        comparison.worst_position_relative_error,
        comparison.argmax_equal,
        comparison.positions,
        comparison.greedy_equal,
        comparison.greedy_tokens,
        comparison.router_max_error.unwrap_or(f64::NAN),
    );
    assert!(
        comparison.passes(),
        "{name}: {} {}",
        comparison.logits_relative_error,
        comparison.greedy_equal
    );
    assert_eq!(comparison.argmax_equal, comparison.positions, "{name}");
    assert!(
        comparison.router_max_error.is_some_and(|error| error < 1e-2),
        "{name}"
    );
}

#[test]
fn one_worker_agrees_with_every_reference() {
    for checkpoint in checkpoints() {
        check(&checkpoint, &verified(&checkpoint, 1, None));
    }
}

#[test]
fn a_checkpoint_in_parts_agrees_with_the_reference_of_the_whole() {
    let parts = tempfile::tempdir().unwrap();
    common::sharded::write(parts.path());
    let checkpoint = (
        parts.path().to_owned(),
        common::tiny().join("reference.safetensors"),
    );
    check(&checkpoint, &verified(&checkpoint, 1, None));
    check(&checkpoint, &verified(&checkpoint, 3, None));
}

fn same_bits(name: &str, a: &Comparison, b: &Comparison) {
    assert_eq!(a.greedy_ids, b.greedy_ids, "{name}");
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert!(
        bits(&a.logits) == bits(&b.logits),
        "{name}: logits differ in some bit"
    );
}

#[test]
fn any_number_of_workers_gives_the_same_bits() {
    for checkpoint in checkpoints() {
        let alone = verified(&checkpoint, 1, None);
        for workers in [2, 3, 5] {
            let name = format!("{} with {workers} workers", checkpoint.0.display());
            same_bits(&name, &alone, &verified(&checkpoint, workers, None));
        }
    }
}

#[test]
fn any_chunking_of_the_prompt_gives_the_same_bits() {
    for checkpoint in checkpoints() {
        let whole = verified(&checkpoint, 1, None);
        for (workers, chunk) in [(1, 1), (2, 7), (3, 64)] {
            let name = format!("{} in chunks of {chunk}", checkpoint.0.display());
            same_bits(&name, &whole, &verified(&checkpoint, workers, Some(chunk)));
        }
    }
}
