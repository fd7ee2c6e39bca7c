//! What must not change a bit: who else is in the batch, where experts are, how pages lie, which ranks hold what.
//!
//! Proves invariant E1 of ARCHITECTURE.md.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::sync::Arc;

use common::repository;
use conclave_kernels::backend::KvDtype;
use conclave_plan::placement::{LayerPlacement, Placement};
use conclave_proto::cluster::v1 as wire;
use conclave_worker::verify::{GroupConfig, LocalGroup, greedy, run, start};
use conclave_worker::weights::WeightSource;
use serde_json::json;

/// A sequence on some rank and slot.
#[derive(Clone)]
struct Sequence {
    rank: usize,
    slot: u32,
    prompt: Vec<u32>,
    pages: Vec<u32>,
    sampling: wire::Sampling,
    /// Prompt tokens per step.
    chunk: usize,
    /// Steps before it starts.
    delay: usize,
}

/// Tokens and log-probabilities, to the bit.
type Outcome = Vec<(u32, u32)>;

const NEW_TOKENS: usize = 12;

fn random_sampling(seed: u64) -> wire::Sampling {
    wire::Sampling {
        temperature: 0.9,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        seed,
        logprobs: Some(3),
        ..wire::Sampling::default()
    }
}

impl Sequence {
    fn new(rank: usize, slot: u32, length: usize, seed: u64) -> Sequence {
        let first_page = slot * 8;
        Sequence {
            rank,
            slot,
            prompt: (0..length as u64)
                .map(|i| ((i * 7919 + seed * 104_729) % 380) as u32)
                .collect(),
            pages: (first_page..first_page + 8).collect(),
            sampling: random_sampling(seed),
            chunk: 512,
            delay: 0,
        }
    }
}

/// Runs all sequences together until each has its new tokens.
fn generate(group: &mut LocalGroup, sequences: &[Sequence]) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = vec![Vec::new(); sequences.len()];
    let mut positions = vec![0; sequences.len()];
    let mut clock = 0;
    while outcomes.iter().any(|outcome| outcome.len() < NEW_TOKENS) {
        let mut steps = vec![wire::Step::default(); group.ranks()];
        for (index, sequence) in sequences.iter().enumerate() {
            let (step, position) = (&mut steps[sequence.rank], &mut positions[index]);
            if clock < sequence.delay || outcomes[index].len() == NEW_TOKENS {
                continue;
            }
            if *position == 0 {
                let pages = sequence.pages.clone();
                step.start_slots.push(start(
                    sequence.slot,
                    pages,
                    sequence.prompt.len(),
                    sequence.sampling.clone(),
                ));
            }
            let prompt = sequence.prompt.get(*position..).unwrap_or_default();
            let tokens = &prompt[..prompt.len().min(sequence.chunk)];
            step.runs.push(run(
                sequence.slot,
                *position,
                tokens,
                tokens.len() == prompt.len(),
            ));
            *position += tokens.len().max(1);
        }
        for (rank, output) in group.step(steps, false).unwrap().into_iter().enumerate() {
            for sample in output.result.samples {
                assert_eq!(sample.error, "");
                let index = sequences
                    .iter()
                    .position(|s| s.rank == rank && s.slot == sample.slot)
                    .unwrap();
                let logprob = sample.logprobs.map_or(0, |logprobs| logprobs.sampled.to_bits());
                outcomes[index].push((sample.token, logprob));
            }
        }
        clock += 1;
    }
    let mut steps = vec![wire::Step::default(); group.ranks()];
    for sequence in sequences {
        steps[sequence.rank].end_slots.push(sequence.slot);
    }
    group.step(steps, false).unwrap();
    outcomes
}

fn source(checkpoint: &str) -> Arc<WeightSource> {
    let path = repository().join("tests/data/minimax-m2").join(checkpoint);
    Arc::new(WeightSource::open(&path, None).unwrap())
}

fn config(ranks: u32, kv_dtype: KvDtype) -> GroupConfig {
    GroupConfig {
        kv_dtype,
        ..GroupConfig::new(ranks)
    }
}

#[test]
fn batch_mates_and_chunking_change_nothing() {
    for (checkpoint, kv) in [
        ("tiny-hd64/bf16", KvDtype::Bf16),
        ("tiny-hd64/fp8", KvDtype::Fp8E4m3),
        ("tiny-hd64/awq", KvDtype::Bf16),
        ("tiny-hd64/ct-int4", KvDtype::Fp8E5m2),
    ] {
        let source = source(checkpoint);
        let subject = Sequence::new(0, 0, 37, 1);
        let mut alone = LocalGroup::start(&source, &config(1, kv)).unwrap();
        let expected = generate(&mut alone, std::slice::from_ref(&subject));
        let mates = |rank: usize| {
            let mate = |slot: u32| Sequence {
                chunk: 5 + slot as usize,
                delay: slot as usize,
                ..Sequence::new(
                    rank,
                    slot,
                    11 * slot as usize + 3,
                    u64::from(slot) + 10 * rank as u64,
                )
            };
            [mate(1), mate(2), mate(3)]
        };
        for (ranks, chunk) in [(1, 7), (1, 1), (3, 64), (2, 10)] {
            let mut group = LocalGroup::start(&source, &config(ranks, kv)).unwrap();
            let mut sequences = vec![Sequence {
                chunk,
                delay: 2,
                ..subject.clone()
            }];
            sequences.extend((0..ranks as usize).flat_map(mates));
            let outcomes = generate(&mut group, &sequences);
            assert_eq!(
                outcomes[0], expected[0],
                "{checkpoint}, {ranks} ranks, chunks of {chunk}"
            );
        }
    }
}

#[test]
fn the_rank_the_pages_and_the_placement_change_nothing() {
    let source = source("tiny-hd64/fp8");
    let subject = Sequence::new(0, 0, 37, 4);
    let expected = generate(
        &mut LocalGroup::start(&source, &config(1, KvDtype::Bf16)).unwrap(),
        std::slice::from_ref(&subject),
    );
    let layer = |owners: [&[u32]; 6]| LayerPlacement {
        owners: owners.map(<[u32]>::to_vec).to_vec(),
    };
    // Replicas, an idle rank, and another placement in every layer.
    let placement = Placement {
        ranks: 4,
        experts: 6,
        layers: vec![
            layer([&[0, 1, 2], &[0, 1, 2], &[1], &[2], &[0, 2], &[1]]),
            layer([&[2], &[2], &[2], &[2], &[2], &[2]]),
            layer([&[0], &[1], &[0, 1, 2], &[0], &[1], &[2]]),
        ],
    };
    let mut config = config(4, KvDtype::Bf16);
    config.placement = Some(placement);
    let mut group = LocalGroup::start(&source, &config).unwrap();
    for (rank, slot) in [(3, 5), (0, 1), (2, 0)] {
        let moved = Sequence {
            rank,
            slot,
            pages: vec![90, 3, 71, 12],
            ..subject.clone()
        };
        assert_eq!(
            generate(&mut group, &[moved]),
            expected,
            "rank {rank}, slot {slot}"
        );
    }
}

#[test]
fn dummy_weights_are_the_same_on_any_number_of_ranks() {
    let full_size = repository().join("tests/data/minimax-m2/full-size");
    let small = json!({
        "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 128, "num_local_experts": 8, "vocab_size": 384,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rotary_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
    });
    let mut seen = Vec::new();
    for format in ["bf16", "fp8", "awq", "ct-int4-g32"] {
        let source =
            |seed| Arc::new(WeightSource::dummy(&full_size.join(format), Some(&small), seed, 2).unwrap());
        let run = |seed, ranks| {
            let mut group = LocalGroup::start(&source(seed), &config(ranks, KvDtype::Bf16)).unwrap();
            generate(&mut group, &[Sequence::new(0, 0, 20, 1)])
        };
        let alone = run(0, 1);
        assert_eq!(alone, run(0, 3), "{format}");
        assert_ne!(alone, run(1, 1), "{format}");
        assert_ne!(source(0).id(), source(1).id());
        seen.push(alone);
    }
    assert!(
        seen.iter()
            .all(|outcome| seen.iter().filter(|other| *other == outcome).count() == 1)
    );
}

#[test]
fn logprobs_of_a_prompt_equal_those_of_the_same_tokens_generated() {
    let source = source("tiny-hd64/bf16");
    let mut group = LocalGroup::start(&source, &config(2, KvDtype::Bf16)).unwrap();
    let sampling = wire::Sampling {
        logprobs: Some(2),
        ..greedy()
    };
    let subject = Sequence {
        sampling,
        ..Sequence::new(0, 0, 9, 2)
    };
    let outcome = generate(&mut group, std::slice::from_ref(&subject)).remove(0);
    let generated: Vec<u32> = outcome.iter().map(|(token, _)| *token).collect();
    let whole = [subject.prompt.as_slice(), &generated].concat();
    let mut steps = vec![wire::Step::default(); 2];
    steps[0] = wire::Step {
        start_slots: vec![start(0, subject.pages, whole.len(), greedy())],
        runs: vec![wire::Run {
            prompt_logprobs: Some(2),
            ..run(0, 0, &whole, false)
        }],
        ..wire::Step::default()
    };
    let output = group.step(steps, false).unwrap().remove(0);
    let [prompt] = output.result.prompt_logprobs.as_slice() else {
        panic!()
    };
    assert_eq!((prompt.position, prompt.entries.len()), (1, whole.len() - 1));
    let told: Vec<u32> = prompt.entries[8..]
        .iter()
        .map(|entry| entry.sampled.to_bits())
        .collect();
    assert_eq!(
        told,
        outcome.iter().map(|(_, logprob)| *logprob).collect::<Vec<_>>()
    );
    assert!(
        prompt.entries[8..]
            .iter()
            .all(|entry| entry.sampled_rank == 1 && entry.top_tokens.len() == 2)
    );
}
