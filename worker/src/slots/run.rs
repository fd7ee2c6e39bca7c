//! One run of a step: which tokens it computes, and whether its slot and the step have room for them.
//!
//! Keeps invariant B2 of ARCHITECTURE.md.

use conclave_kernels::backend::SAMPLED;
use conclave_proto::cluster::v1 as wire;

use super::slot::LastSampled;
use super::{Result, Slot, SlotLimits, StepError};

/// The run's tokens, taken out of it, or what its slot sampled last. `field` is the run's place, for errors; `before`:
/// tokens that the step has already.
pub(super) fn checked(
    field: &str,
    run: &mut wire::Run,
    before: usize,
    slot: &Slot,
    limits: SlotLimits,
) -> Result<Vec<u32>> {
    let wrong = |name: &str, problem: String| Err(StepError::new(format!("{field}.{name}"), problem));
    if run.position != slot.position {
        return wrong(
            "position",
            format!("{}, the slot is at {}", run.position, slot.position),
        );
    }
    let tokens = tokens(field, std::mem::take(&mut run.tokens), slot, limits)?;
    let sum = before + tokens.len();
    if sum > limits.max_tokens {
        return wrong(
            "tokens",
            format!(
                "the step has {sum} tokens or more, at most {} fit",
                limits.max_tokens
            ),
        );
    }
    let end = run.position as usize + tokens.len();
    if end > limits.max_position {
        return wrong(
            "tokens",
            format!("they end at {end}, the model at {}", limits.max_position),
        );
    }
    if end > slot.pages.len() * limits.page_tokens {
        return wrong(
            "tokens",
            format!("they end at {end}, the slot's {} pages before", slot.pages.len()),
        );
    }
    let mask_bytes = limits.vocab.div_ceil(8)..=limits.vocab.div_ceil(32) * 4;
    if !run.mask.is_empty() && !mask_bytes.contains(&run.mask.len()) {
        return wrong(
            "mask",
            format!("{} bytes for a vocabulary of {}", run.mask.len(), limits.vocab),
        );
    }
    match run.next_prompt_token {
        Some(token) if token as usize >= limits.vocab => wrong(
            "next_prompt_token",
            format!("{token} is not below {}", limits.vocab),
        ),
        _ => Ok(tokens),
    }
}

/// The given tokens; where there are none, what the slot sampled last, which the device may know alone.
fn tokens(field: &str, given: Vec<u32>, slot: &Slot, limits: SlotLimits) -> Result<Vec<u32>> {
    let wrong = |problem: String| Err(StepError::new(format!("{field}.tokens"), problem));
    if let Some(token) = given.iter().find(|&&token| token as usize >= limits.vocab) {
        return wrong(format!("token {token} is not below {}", limits.vocab));
    }
    match slot.last_sampled {
        _ if !given.is_empty() => Ok(given),
        Some(LastSampled::Token(token)) => Ok(vec![token]),
        Some(LastSampled::Row { row, .. }) if !slot.sampling.reads_tokens => Ok(vec![SAMPLED | row]),
        Some(LastSampled::Row { .. }) => wrong("the slot's last token has not been fetched".into()),
        None => wrong("none are given, and the slot has sampled none".into()),
    }
}
