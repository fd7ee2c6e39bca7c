//! What workers say, as events of the core. A worker is trusted no further than the bounds it declared: any number
//! outside of them ends its session.

use bytes::Bytes;
use conclave_proto::cluster::v1 as wire;
use conclave_router_core::PROMPT_LOGPROBS_PER_STEP_MAX;
use conclave_router_core::api::{Logprobs, PromptLogprobs, Sample, SampleError, Slot, StepResult};

use crate::config::MAX_NUM_SEQS;
use crate::server::MAX_WORKER_MESSAGE_BYTES;

/// Most alternatives that a log-probability entry may carry; requests may ask for no more.
pub const MAX_LOGPROBS: usize = 20;
/// Characters kept of an error text that a worker sent.
const MAX_ERROR_CHARS: usize = 512;
/// Bytes of a message that tells of one token: its log-probabilities, the longest numbers everywhere.
const LOGPROBS_BYTES: usize = 32 + 10 * MAX_LOGPROBS;
/// And of a sample or a slot's prompt, beside them.
const SLOT_BYTES: usize = 512;

// Whatever a step asks for, a worker's answer fits into one message.
const _: () = assert!(
    PROMPT_LOGPROBS_PER_STEP_MAX as usize * LOGPROBS_BYTES
        + MAX_NUM_SEQS as usize * (LOGPROBS_BYTES + 2 * SLOT_BYTES)
        < MAX_WORKER_MESSAGE_BYTES
);

/// Bytes of a communicator's id.
const COMMUNICATOR_ID_BYTES: usize = 128;

/// What a worker's numbers must stay within.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub vocab: u32,
    pub max_slots: u32,
    pub max_batched_tokens: u32,
    pub max_model_len: u32,
}

/// A sentence that says which field broke which bound.
pub type Violation = String;

/// Checks and translates the result of one step.
pub fn step_result(result: wire::StepResult, bounds: &Bounds) -> Result<StepResult, Violation> {
    at_most("samples", result.samples.len(), bounds.max_slots as usize)?;
    at_most(
        "prompt_logprobs",
        result.prompt_logprobs.len(),
        bounds.max_slots as usize,
    )?;
    let entries: usize = result.prompt_logprobs.iter().map(|p| p.entries.len()).sum();
    let most = bounds.max_batched_tokens.min(PROMPT_LOGPROBS_PER_STEP_MAX);
    at_most("prompt_logprobs.entries", entries, most as usize)?;
    Ok(StepResult {
        samples: collect(result.samples, |s| sample(s, bounds))?,
        prompt_logprobs: collect(result.prompt_logprobs, |p| prompt_logprobs(p, bounds))?,
        busy_us: result.busy_us,
        idle_us: result.idle_us,
    })
}

/// Checks the id of a communicator; what is in it is between the workers' libraries.
pub fn communicator_id(id: Bytes) -> Result<Bytes, Violation> {
    if id.len() != COMMUNICATOR_ID_BYTES {
        return Err(format!(
            "communicator_id.id: {} bytes, must be {COMMUNICATOR_ID_BYTES}",
            id.len()
        ));
    }
    Ok(id)
}

fn sample(sample: wire::Sample, bounds: &Bounds) -> Result<Sample, Violation> {
    let error = (!sample.error.is_empty()).then(|| sample_error(&sample));
    if error.is_none() {
        below("samples.token", sample.token, bounds.vocab)?;
    }
    Ok(Sample {
        slot: slot(sample.slot, bounds)?,
        token: sample.token,
        logprobs: sample.logprobs.map(|l| logprobs(l, bounds)).transpose()?,
        error,
    })
}

/// Why a slot has no token: where its request is to blame, with the fields that it can change.
fn sample_error(sample: &wire::Sample) -> SampleError {
    let reason = clipped(&sample.error);
    match sample.unsatisfiable {
        false => SampleError::Failed(reason),
        true => SampleError::Unsatisfiable(format!(
            "{reason}: bad_words, stop_token_ids before min_tokens and the form of the output leave none; allow more"
        )),
    }
}

fn prompt_logprobs(entry: wire::PromptLogprobs, bounds: &Bounds) -> Result<PromptLogprobs, Violation> {
    below("prompt_logprobs.position", entry.position, bounds.max_model_len)?;
    Ok(PromptLogprobs {
        slot: slot(entry.slot, bounds)?,
        position: entry.position,
        entries: collect(entry.entries, |l| logprobs(l, bounds))?,
    })
}

fn logprobs(logprobs: wire::Logprobs, bounds: &Bounds) -> Result<Logprobs, Violation> {
    at_most("logprobs.top_tokens", logprobs.top_tokens.len(), MAX_LOGPROBS)?;
    if logprobs.top_tokens.len() != logprobs.top_logprobs.len() {
        return Err(format!(
            "logprobs: {} top_tokens but {} top_logprobs",
            logprobs.top_tokens.len(),
            logprobs.top_logprobs.len()
        ));
    }
    for &token in &logprobs.top_tokens {
        below("logprobs.top_tokens", token, bounds.vocab)?;
    }
    Ok(Logprobs {
        sampled: logprobs.sampled,
        rank: logprobs.sampled_rank,
        top: logprobs
            .top_tokens
            .into_iter()
            .zip(logprobs.top_logprobs)
            .collect(),
    })
}

fn slot(slot: u32, bounds: &Bounds) -> Result<Slot, Violation> {
    below("slot", slot, bounds.max_slots)?;
    Ok(Slot(slot))
}

fn collect<T, U>(items: Vec<T>, f: impl FnMut(T) -> Result<U, Violation>) -> Result<Vec<U>, Violation> {
    items.into_iter().map(f).collect()
}

fn below(field: &str, value: u32, limit: u32) -> Result<(), Violation> {
    if value < limit {
        return Ok(());
    }
    Err(format!("{field} = {value}: must be below {limit}"))
}

fn at_most(field: &str, count: usize, limit: usize) -> Result<(), Violation> {
    if count <= limit {
        return Ok(());
    }
    Err(format!("{field}: {count} entries, at most {limit} are allowed"))
}

/// Text of a worker, short enough for logs and statuses.
pub fn clipped(text: &str) -> String {
    text.chars().take(MAX_ERROR_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        vocab: 100,
        max_slots: 4,
        max_batched_tokens: 8,
        max_model_len: 64,
    };

    fn one(sample: wire::Sample) -> wire::StepResult {
        wire::StepResult {
            samples: vec![sample],
            ..Default::default()
        }
    }

    #[test]
    fn numbers_at_the_bound_are_refused_and_just_below_pass() {
        let good = wire::Sample {
            slot: 3,
            token: 99,
            ..Default::default()
        };
        assert_eq!(
            step_result(one(good.clone()), &BOUNDS).unwrap().samples[0].token,
            99
        );
        for bad in [
            wire::Sample {
                slot: 4,
                ..good.clone()
            },
            wire::Sample {
                token: 100,
                ..good.clone()
            },
            wire::Sample {
                logprobs: Some(wire::Logprobs {
                    top_tokens: vec![1],
                    ..Default::default()
                }),
                ..good.clone()
            },
            wire::Sample {
                logprobs: Some(wire::Logprobs {
                    top_tokens: vec![1; MAX_LOGPROBS + 1],
                    top_logprobs: vec![0.0; MAX_LOGPROBS + 1],
                    ..Default::default()
                }),
                ..good
            },
        ] {
            assert!(step_result(one(bad.clone()), &BOUNDS).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn counts_are_bounded() {
        let many = wire::StepResult {
            samples: vec![wire::Sample::default(); 5],
            ..Default::default()
        };
        assert!(
            step_result(many, &BOUNDS)
                .unwrap_err()
                .contains("samples: 5 entries")
        );
        let long = wire::StepResult {
            prompt_logprobs: vec![wire::PromptLogprobs {
                entries: vec![wire::Logprobs::default(); 9],
                ..Default::default()
            }],
            ..Default::default()
        };
        assert!(step_result(long, &BOUNDS).is_err());
    }

    #[test]
    fn no_message_about_a_token_is_longer_than_counted_on() {
        let logprobs = wire::Logprobs {
            sampled: f32::MIN,
            sampled_rank: u32::MAX,
            top_tokens: vec![u32::MAX; MAX_LOGPROBS],
            top_logprobs: vec![f32::MIN; MAX_LOGPROBS],
        };
        let prompt = |entries: usize| wire::PromptLogprobs {
            slot: u32::MAX,
            position: u32::MAX,
            entries: vec![logprobs.clone(); entries],
        };
        assert!(prompt(1000).encoded_len() <= 1000 * LOGPROBS_BYTES + SLOT_BYTES);
        let sample = wire::Sample {
            slot: u32::MAX,
            token: u32::MAX,
            logprobs: Some(logprobs.clone()),
            error: "x".repeat(400),
            unsatisfiable: true,
        };
        assert!(sample.encoded_len() <= LOGPROBS_BYTES + SLOT_BYTES);
    }
}
