//! Step messages for one sequence, as a router would send them.

use conclave_proto::cluster::v1 as wire;

/// Temperature 0, nothing else.
pub fn greedy() -> wire::Sampling {
    wire::Sampling {
        top_p: 1.0,
        repetition_penalty: 1.0,
        ..wire::Sampling::default()
    }
}

/// A new sequence on `slot` with these pages.
pub fn start(slot: u32, pages: Vec<u32>, prompt_tokens: usize, sampling: wire::Sampling) -> wire::SlotStart {
    wire::SlotStart {
        slot,
        sampling: Some(sampling),
        cached_tokens: 0,
        pages,
        prompt_tokens: prompt_tokens as u32,
        history: Vec::new(),
    }
}

/// Tokens of a prompt, or with none the token that the slot sampled last.
pub fn run(slot: u32, position: usize, tokens: &[u32], sample: bool) -> wire::Run {
    wire::Run {
        slot,
        position: position as u32,
        tokens: tokens.to_vec(),
        sample,
        ..wire::Run::default()
    }
}
