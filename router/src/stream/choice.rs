//! One choice of a request: tokens in, deltas out.

use std::sync::Arc;

use bytes::Bytes;
use conclave_proto::v1 as pb;
use conclave_router_core::api::{Delivered, FinishReason, Logprobs};
use conclave_text::TextError;
use conclave_text::output::{OutputDelta, OutputStream};
use conclave_text::parse::{End, ToolCallDelta};
use conclave_text::tokenizer::Tokenizer;

use super::constrained::Constrained;
use crate::metrics::Metrics;

/// What the tokens of a choice led to.
pub enum Verdict {
    GoesOn,
    /// A stop string was found: the choice is finished for the client, its sequence still has to be ended.
    Stopped(pb::Finished),
}

/// How a choice's tokens become text.
pub struct ChoiceText {
    pub output: OutputStream,
    pub tokenizer: Arc<Tokenizer>,
    /// The prompt's text, to come first (`echo`).
    pub echo: Option<Arc<str>>,
    /// Nothing comes after the prompt's text: what was sampled behind it is not the client's.
    pub echo_alone: bool,
}

/// The state of one choice.
pub struct Choice {
    index: u32,
    /// `None`: token ids only.
    text: Option<ChoiceText>,
    /// `None`: any token may come.
    constrained: Option<Constrained>,
    /// Characters of the prompt's text that were put before the choice's own.
    echoed: u32,
    eos: Arc<[u32]>,
    tokens: u32,
    done: bool,
}

impl Choice {
    /// `eos`: tokens that end a sequence without being a reason to name.
    pub fn new(
        index: u32,
        text: Option<ChoiceText>,
        constrained: Option<Constrained>,
        eos: Arc<[u32]>,
    ) -> Choice {
        Choice {
            index,
            text,
            constrained,
            echoed: 0,
            eos,
            tokens: 0,
            done: false,
        }
    }

    /// Tokens that belong to the client's answer.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Tokens of those that were reasoning.
    pub fn reasoning_tokens(&self) -> u32 {
        self.text
            .as_ref()
            .map_or(0, |text| text.output.reasoning_tokens())
    }

    /// Moves the grammar on, if there is one. To be called first: the sequence waits for the next mask.
    pub fn follow(&mut self, tokens: &[Delivered], metrics: &Metrics) -> Result<(), TextError> {
        match &mut self.constrained {
            Some(constrained) if !self.done => constrained.follow(tokens, metrics),
            _ => Ok(()),
        }
    }

    /// Takes new tokens. Those after a stop string are not the client's.
    pub fn push(&mut self, tokens: Vec<Delivered>) -> (pb::Delta, Verdict) {
        let mut delta = self.delta();
        if self.echoes_alone() {
            return (delta, Verdict::GoesOn);
        }
        for Delivered { token, logprobs } in tokens {
            if self.done {
                break;
            }
            self.tokens += 1;
            delta.token_ids.push(token);
            let mut offset = 0;
            let mut stopped_by = None;
            if let Some(text) = &mut self.text {
                let out = text.output.push(&[token]);
                offset = self.echoed + out.text_offsets.first().copied().unwrap_or(0);
                stopped_by = add(&mut delta, out);
            }
            if let Some(logprobs) = logprobs {
                delta.logprobs.push(self.entry(token, &logprobs, offset));
            }
            if let Some(stop_reason) = stopped_by {
                self.done = true;
                let rest = self.text.as_mut().map(|text| text.output.finish(End::Stop));
                add(&mut delta, rest.unwrap_or_default());
                return (delta, Verdict::Stopped(self.stopped(stop_reason)));
            }
        }
        (delta, Verdict::GoesOn)
    }

    /// The sequence has ended. `None` if the client was told already.
    pub fn finish(&mut self, reason: FinishReason) -> Option<(pb::Delta, pb::Finished)> {
        if std::mem::replace(&mut self.done, true) {
            return None;
        }
        let mut delta = self.delta();
        let end = match reason {
            FinishReason::Stop(_) => End::Stop,
            _ => End::Cut,
        };
        if let Some(text) = &mut self.text
            && let Some(stop_reason) = add(&mut delta, text.output.finish(end))
        {
            // The last half of a character, given out at the end, completed a stop string.
            return Some((delta, self.stopped(stop_reason)));
        }
        let mut finished = self.finished();
        match reason {
            FinishReason::Stop(_) if self.echoes_alone() => finished.set_reason(pb::FinishReason::Length),
            FinishReason::Stop(token) => {
                finished = self.stopped(
                    token
                        .filter(|token| !self.eos.contains(token))
                        .map(|token| token.to_string())
                        .unwrap_or_default(),
                );
            }
            FinishReason::Length => finished.set_reason(pb::FinishReason::Length),
            FinishReason::Cancelled => finished.set_reason(pb::FinishReason::Cancelled),
            FinishReason::Error(error) => {
                finished.error = error;
                finished.set_reason(pb::FinishReason::Error);
            }
            FinishReason::Unsatisfiable(error) => {
                finished.error = error;
                finished.set_reason(pb::FinishReason::Unsatisfiable);
            }
        }
        Some((delta, finished))
    }

    /// The log-probabilities of a prompt token.
    pub fn prompt_entry(&self, token: u32, logprobs: &Logprobs, text_offset: u32) -> pb::TokenLogprobs {
        self.entry(token, logprobs, text_offset)
    }

    /// An empty delta; the first one begins with the prompt's text, if that is wanted.
    fn delta(&mut self) -> pb::Delta {
        let mut delta = pb::Delta {
            index: self.index,
            ..Default::default()
        };
        if let Some(echo) = self.text.as_mut().and_then(|text| text.echo.take()) {
            delta.text.push_str(&echo);
            self.echoed = u32::try_from(echo.chars().count()).unwrap_or(u32::MAX);
        }
        delta
    }

    fn echoes_alone(&self) -> bool {
        self.text.as_ref().is_some_and(|text| text.echo_alone)
    }

    fn finished(&self) -> pb::Finished {
        pb::Finished {
            index: self.index,
            ..Default::default()
        }
    }

    fn stopped(&self, stop_reason: String) -> pb::Finished {
        let called = self
            .text
            .as_ref()
            .is_some_and(|text| text.output.tool_calls() > 0);
        let mut finished = pb::Finished {
            stop_reason,
            ..self.finished()
        };
        finished.set_reason(if called {
            pb::FinishReason::ToolCalls
        } else {
            pb::FinishReason::Stop
        });
        finished
    }

    fn entry(&self, token: u32, logprobs: &Logprobs, text_offset: u32) -> pb::TokenLogprobs {
        let one = |token_id, logprob, rank| pb::TokenLogprob {
            token_id,
            logprob,
            token: self.text.as_ref().map_or_else(Bytes::new, |text| {
                Bytes::copy_from_slice(text.tokenizer.token_bytes(token_id))
            }),
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

/// Adds what a token came to; gives the stop string that ended the output, if one did.
fn add(delta: &mut pb::Delta, out: OutputDelta) -> Option<String> {
    delta.text.push_str(&out.text);
    delta.reasoning.push_str(&out.reasoning);
    delta.tool_calls.extend(out.tool_calls.into_iter().map(tool_call));
    out.stopped_by
}

fn tool_call(call: ToolCallDelta) -> pb::ToolCallDelta {
    pb::ToolCallDelta {
        index: call.index,
        id: call.id.unwrap_or_default(),
        name: call.name.unwrap_or_default(),
        arguments: call.arguments,
    }
}

/// Whether a delta carries anything.
pub fn is_worth_sending(delta: &pb::Delta) -> bool {
    !delta.token_ids.is_empty()
        || !delta.text.is_empty()
        || !delta.reasoning.is_empty()
        || !delta.tool_calls.is_empty()
}
