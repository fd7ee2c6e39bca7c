//! Every reference checkpoint: logits, greedy ids and router logits, with any number of workers.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::repository;
use conclave_kernels::backend::KvDtype;
use conclave_worker::device::DeviceKind;
use conclave_worker::model::Modes;
use conclave_worker::verify::{
    Agreement, Choices, Comparison, Gate, GroupConfig, LocalGroup, Reference, Run, VerifyConfig, Way,
    run_reference, verify,
};
use conclave_worker::weights::WeightSource;

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
        devices: vec![DeviceKind::Cpu],
        modes: Modes::default(),
    };
    let found = verify(&config);
    let mut found = found.unwrap_or_else(|error| panic!("{}: {error}", checkpoint.0.display()));
    found.swap_remove(0).comparison
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

/// A sequence on the CPU, by the experts that it chooses itself or others.
struct Beside {
    source: Arc<WeightSource>,
    config: GroupConfig,
    reference: Reference,
    gates: Vec<Gate>,
}

impl Beside {
    fn new() -> Beside {
        let source = Arc::new(WeightSource::open(&common::tiny(), None).unwrap());
        let path = common::tiny().join("reference.safetensors");
        Beside {
            reference: Reference::read(&path, source.spec().vocab).unwrap(),
            gates: Gate::all(&source).unwrap(),
            config: GroupConfig::new(1),
            source,
        }
    }

    fn run(&self, way: &Way) -> Run {
        let mut ranks = LocalGroup::start(&self.source, &self.config).unwrap();
        run_reference(&mut ranks, &self.config, &self.reference, 512, way).unwrap()
    }

    fn rounded(&self, choices: &Arc<Choices>) -> Run {
        let config = GroupConfig {
            rounds: true,
            ..self.config.clone()
        };
        let mut ranks = LocalGroup::start(&self.source, &config).unwrap();
        let way = Way::Forced(Arc::clone(choices));
        run_reference(&mut ranks, &config, &self.reference, 512, &way).unwrap()
    }
}

#[test]
fn a_run_held_to_its_own_choices_is_the_same() {
    let beside = Beside::new();
    let alone = beside.run(&Way::OpByOp);
    let choices = Arc::new(Choices::of(&beside.gates, &alone.router_logits));
    let held = beside.run(&Way::Forced(Arc::clone(&choices)));
    let found = Agreement::of(&alone, &held, &beside.rounded(&choices), &choices);
    assert!(found.passes(), "{found:?}");
    assert!(found.found.logits < 1e-5, "{found:?}");
    assert_eq!((found.turned.len(), found.misses.len()), (0, 0));
}

#[test]
fn a_wrong_choice_is_no_tie_and_is_found() {
    let beside = Beside::new();
    let alone = beside.run(&Way::OpByOp);
    let mut choices = Choices::of(&beside.gates, &alone.router_logits);
    // One token of the first layer gets the expert that it wants least.
    let position = 5;
    let gate = &beside.gates[0].spec;
    let z = &alone.router_logits[0][position * gate.experts..][..gate.experts];
    let keys = beside.gates[0].keys(z);
    let worst = (0..gate.experts)
        .min_by(|a, b| keys[*a].total_cmp(&keys[*b]))
        .unwrap();
    choices.ids[0][position * gate.top_k + gate.top_k - 1] = worst as u32;
    let choices = Arc::new(choices);
    let held = beside.run(&Way::Forced(Arc::clone(&choices)));
    let found = Agreement::of(&alone, &held, &beside.rounded(&choices), &choices);
    assert!(!found.passes());
    let turned: Vec<_> = found.turned.iter().filter(|turned| turned.layer == 0).collect();
    assert_eq!(turned.len(), 1, "{found:?}");
    assert_eq!(turned[0].position, position);
    assert!(!turned[0].is_tie() && turned[0].gap > 0.0, "{found:?}");
}

#[test]
fn a_run_of_rounded_activations_agrees_and_turns_ties_alone() {
    let beside = Beside::new();
    let rounds = Beside {
        config: GroupConfig {
            rounds: true,
            ..GroupConfig::new(1)
        },
        ..Beside::new()
    };
    let run = rounds.run(&Way::OpByOp);
    let choices = Arc::new(Choices::of(&beside.gates, &run.router_logits));
    let held = beside.run(&Way::Forced(Arc::clone(&choices)));
    let found = Agreement::of(&run, &held, &beside.rounded(&choices), &choices);
    assert!(found.passes(), "{found:?}");
    assert!((1e-4..3e-2).contains(&found.found.logits), "{found:?}");
}
