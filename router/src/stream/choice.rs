//! One choice of a request: tokens in, deltas out.

use std::time::Instant;

use conclave_proto::v1 as pb;
use conclave_router_core::api::{Delivered, FinishReason, Logprobs};

/// What the tokens of a choice led to.
pub enum Verdict {
    GoesOn,
    /// A stop string was found: the choice is finished for the client, its sequence still has to be ended.
    Stopped(pb::Finished),
}

/// The state of one choice.
pub struct Choice {
    index: u32,
    eos: std::sync::Arc<[u32]>,
    tokens: u32,
    done: bool,
    pub last_token_at: Option<Instant>,
}

impl Choice {
    /// `eos`: tokens that end a sequence without being a reason to name.
    pub fn new(index: u32, eos: std::sync::Arc<[u32]>) -> Choice {
        Choice {
            index,
            eos,
            tokens: 0,
            done: false,
            last_token_at: None,
        }
    }

    /// Tokens that belong to the client's answer.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    pub fn reasoning_tokens(&self) -> u32 {
        0
    }

    /// Takes new tokens.
    pub fn push(&mut self, tokens: Vec<Delivered>) -> (pb::Delta, Verdict) {
        let mut delta = pb::Delta {
            index: self.index,
            ..Default::default()
        };
        for Delivered { token, logprobs } in tokens {
            if self.done {
                break;
            }
            self.tokens += 1;
            delta.token_ids.push(token);
            if let Some(logprobs) = logprobs {
                delta.logprobs.push(self.entry(token, &logprobs, 0));
            }
        }
        (delta, Verdict::GoesOn)
    }

    /// The sequence has ended. `None` if the client was told already.
    pub fn finish(&mut self, reason: FinishReason) -> Option<(pb::Delta, pb::Finished)> {
        if std::mem::replace(&mut self.done, true) {
            return None;
        }
        let delta = pb::Delta {
            index: self.index,
            ..Default::default()
        };
        let mut finished = pb::Finished {
            index: self.index,
            ..Default::default()
        };
        let wire = match reason {
            FinishReason::Stop(token) => {
                finished.stop_reason = token
                    .filter(|token| !self.eos.contains(token))
                    .map(|token| token.to_string())
                    .unwrap_or_default();
                pb::FinishReason::Stop
            }
            FinishReason::Length => pb::FinishReason::Length,
            FinishReason::Cancelled => pb::FinishReason::Cancelled,
            FinishReason::Error(error) => {
                finished.error = error;
                pb::FinishReason::Error
            }
        };
        finished.set_reason(wire);
        Some((delta, finished))
    }

    /// The log-probabilities of a prompt token.
    pub fn prompt_entry(&self, token: u32, logprobs: &Logprobs) -> pb::TokenLogprobs {
        self.entry(token, logprobs, 0)
    }

    fn entry(&self, token: u32, logprobs: &Logprobs, text_offset: u32) -> pb::TokenLogprobs {
        let one = |token_id, logprob, rank| pb::TokenLogprob {
            token_id,
            logprob,
            token: Default::default(),
            rank,
        };
        pb::TokenLogprobs {
            sampled: Some(one(token, logprobs.sampled, logprobs.rank)),
            top: (1..)
                .zip(&logprobs.top)
                .map(|(rank, &(token, logprob))| one(token, logprob, rank))
                .collect(),
            text_offset,
        }
    }
}

/// Whether a delta carries anything.
pub fn is_worth_sending(delta: &pb::Delta) -> bool {
    !delta.token_ids.is_empty()
        || !delta.text.is_empty()
        || !delta.reasoning.is_empty()
        || !delta.tool_calls.is_empty()
}
