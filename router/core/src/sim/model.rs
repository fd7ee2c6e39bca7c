//! The model that simulated workers run: its "KV" of a position depends on the token there and on the KV of every
//! position before it, and the next token on the KV of all positions. One wrong, stale or foreign page changes every
//! later token. The same functions over a flat array say what a sequence must yield.

use std::sync::Arc;

use crate::api::{FinishReason, Logprobs, Sampling, SequenceId, Submit};
use crate::sim::random::mix;

pub(crate) const VOCAB: u32 = 40;

pub(crate) fn kv(token: u32, position: u32, context: u64) -> u64 {
    mix(mix(u64::from(token) << 32 | u64::from(position)) ^ context)
}

/// Adds a position's KV to the context of later ones.
pub(crate) fn attend(context: u64, position: u32, kv: u64) -> u64 {
    context.wrapping_add(kv.wrapping_mul(2 * u64::from(position) + 1))
}

/// What sampling depends on beside the context.
pub(crate) struct Choice<'a> {
    pub(crate) sampling: &'a Sampling,
    /// All tokens, if the sampling has penalties.
    pub(crate) seen: &'a [u32],
    pub(crate) stop_tokens: &'a [u32],
    pub(crate) suppress: bool,
    pub(crate) mask: Option<&'a [u8]>,
}

/// The token for `position`.
pub(crate) fn sample(context: u64, position: u32, choice: &Choice<'_>) -> u32 {
    let mut state = mix(context ^ mix(choice.sampling.seed) ^ u64::from(position));
    if has_penalties(choice.sampling) {
        state = choice
            .seen
            .iter()
            .fold(state, |state, token| mix(state ^ u64::from(*token)));
    }
    let masked_out = |token: u32| {
        choice
            .mask
            .is_some_and(|mask| mask[token as usize / 8] & (1 << (token % 8)) == 0)
    };
    let allowed =
        |token: &u32| !(masked_out(*token) || choice.suppress && choice.stop_tokens.contains(token));
    let tokens: Vec<u32> = (0..VOCAB).filter(allowed).collect();
    tokens[(state % tokens.len() as u64) as usize]
}

pub(crate) fn has_penalties(sampling: &Sampling) -> bool {
    sampling.repetition_penalty != 1.0
}

/// A made-up log-probability that names its token and position.
pub(crate) fn logprobs(token: u32, position: u32) -> Logprobs {
    Logprobs {
        sampled: position as f32,
        rank: token,
        top: Vec::new(),
    }
}

/// The mask that the grammar of a masked sequence has after `tokens`: never without a token that stops nothing.
pub(crate) fn mask(tokens: &[u32]) -> Arc<[u8]> {
    let state = tokens
        .iter()
        .fold(7, |state, token| mix(state ^ u64::from(*token)));
    let mut bits = state.to_le_bytes()[..VOCAB as usize / 8].to_vec();
    bits[4] |= 0x80;
    bits.into()
}

/// What a sequence yields when nothing fails: its new tokens (without those it came with) and how it ends.
pub(crate) fn expected(submit: &Submit) -> (Vec<u32>, FinishReason) {
    let prompt = submit.prompt.len() as u32;
    let mut tokens = submit.prompt.to_vec();
    tokens.extend_from_slice(&submit.generated);
    let given = tokens.len();
    let (mut context, mut computed) = (0, 0);
    loop {
        let new = tokens.len() as u32 - prompt;
        let last = tokens[tokens.len() - 1];
        if new > submit.min_new_tokens && submit.stop_tokens.contains(&last) {
            return (tokens.split_off(given), FinishReason::Stop(Some(last)));
        }
        if new >= submit.max_new_tokens {
            return (tokens.split_off(given), FinishReason::Length);
        }
        for position in computed..tokens.len() as u32 {
            let value = kv(tokens[position as usize], position, context);
            context = attend(context, position, value);
        }
        computed = tokens.len() as u32;
        let mask = submit.masked.then(|| mask(&tokens));
        let choice = Choice {
            sampling: &submit.sampling,
            seen: &tokens,
            stop_tokens: &submit.stop_tokens,
            suppress: new < submit.min_new_tokens,
            mask: mask.as_deref(),
        };
        let next = sample(context, computed, &choice);
        tokens.push(next);
    }
}

/// A plain request; tests change what they are about.
pub(crate) fn request(id: u64, prompt: &[u32], max_new_tokens: u32) -> Submit {
    Submit {
        sampling: Arc::new(sampling(id)),
        ..Submit::new(SequenceId(id), prompt.into(), max_new_tokens)
    }
}

pub(crate) fn sampling(seed: u64) -> Sampling {
    Sampling {
        temperature: 1.0,
        seed,
        ..Sampling::default()
    }
}
