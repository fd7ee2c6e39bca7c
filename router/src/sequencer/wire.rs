//! Commands of the core as wire messages. Pure translation: nothing is decided here.

use bytes::Bytes;
use conclave_plan::placement::Placement;
use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::to_worker::Message;
use conclave_router_core::api::{EpochPlan, PageId, Run, RunInput, Sampling, Slot, SlotStart, StepPlan};

/// A message to a worker, ready for its stream.
pub fn to_worker(message: Message) -> wire::ToWorker {
    wire::ToWorker {
        message: Some(message),
    }
}

/// `layers` is the number of layers of the model: every step runs all of them.
pub fn step(plan: StepPlan, layers: u32, trace_parents: Vec<String>) -> wire::ToWorker {
    to_worker(Message::Step(wire::Step {
        epoch: plan.epoch.0,
        step: plan.step.0,
        layer_begin: 0,
        layer_end: layers,
        end_slots: plan.end.into_iter().map(|slot| slot.0).collect(),
        start_slots: plan.start.into_iter().map(slot_start).collect(),
        append_pages: plan.pages.into_iter().map(slot_pages).collect(),
        runs: plan.runs.into_iter().map(run).collect(),
        trace_parents,
        group_tokens: plan.group_tokens,
        collective_deadline_ms: plan.collective_deadline.0.div_ceil(1000),
    }))
}

/// What only the shell knows of an epoch.
pub struct EpochWire {
    /// In order of rank.
    pub peers: Vec<wire::Peer>,
    pub transport: &'static str,
    pub peer_secret: Bytes,
}

pub fn epoch_start(plan: &EpochPlan, with: EpochWire) -> wire::ToWorker {
    to_worker(Message::EpochStart(wire::EpochStart {
        epoch: plan.epoch.0,
        rank: plan.rank.0,
        peers: with.peers,
        placement: Some(placement(&plan.placement)),
        collective_deadline_ms: plan.collective_deadline.0.div_ceil(1000),
        keep_kv: plan.keep_kv,
        transport: with.transport.into(),
        peer_secret: with.peer_secret,
    }))
}

fn placement(placement: &Placement) -> wire::Placement {
    let ranks = |owners: &Vec<u32>| wire::Ranks {
        ranks: owners.clone(),
    };
    wire::Placement {
        experts: placement.experts,
        layers: placement
            .layers
            .iter()
            .map(|layer| wire::LayerPlacement {
                owners: layer.owners.iter().map(ranks).collect(),
            })
            .collect(),
    }
}

fn page_numbers(pages: Vec<PageId>) -> Vec<u32> {
    pages.into_iter().map(|page| page.0).collect()
}

fn slot_pages((slot, pages): (Slot, Vec<PageId>)) -> wire::SlotPages {
    wire::SlotPages {
        slot: slot.0,
        pages: page_numbers(pages),
    }
}

fn slot_start(start: SlotStart) -> wire::SlotStart {
    wire::SlotStart {
        slot: start.slot.0,
        sampling: Some(sampling(
            &start.sampling,
            &start.stop_tokens,
            start.suppress_until,
        )),
        cached_tokens: start.cached_tokens,
        pages: page_numbers(start.pages),
        prompt_tokens: start.prompt_tokens,
        history: start.history,
    }
}

fn sampling(sampling: &Sampling, stop_tokens: &[u32], suppress_until: u32) -> wire::Sampling {
    let bias = |&(token, bias): &(u32, f32)| wire::LogitBias { token, bias };
    let words = |tokens: &Vec<u32>| wire::TokenSequence {
        tokens: tokens.clone(),
    };
    wire::Sampling {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        logit_bias: sampling.logit_bias.iter().map(bias).collect(),
        seed: sampling.seed,
        suppress: if suppress_until > 0 {
            stop_tokens.to_vec()
        } else {
            Vec::new()
        },
        suppress_until,
        logprobs: sampling.logprobs,
        bad_words: sampling.bad_words.iter().map(words).collect(),
    }
}

fn run(run: Run) -> wire::Run {
    wire::Run {
        slot: run.slot.0,
        position: run.position,
        tokens: match run.input {
            RunInput::Tokens(tokens) => tokens,
            RunInput::LastSampled => Vec::new(),
        },
        sample: run.sample,
        prompt_logprobs: run.prompt_logprobs,
        next_prompt_token: run.next_prompt_token,
        mask: run.mask.map(Bytes::from_owner).unwrap_or_default(),
    }
}
