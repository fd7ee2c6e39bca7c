//! Whole answers out of events.

use conclave_proto::v1;
use futures::StreamExt;
use http::StatusCode;

use super::budget::Budget;
use super::calls::CallEvents;
use super::tokens::Tokens;
use crate::http::error::{ApiError, ApiResult};
use crate::upstream::Event;

/// The answers to all prompts of a request.
#[derive(Debug)]
pub(crate) struct Answers {
    pub(crate) model: String,
    pub(crate) prompts: Vec<PromptAnswer>,
    pub(crate) tokens: Tokens,
}

#[derive(Debug, Default)]
pub(crate) struct PromptAnswer {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<v1::TokenLogprobs>,
    pub(crate) choices: Vec<Choice>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) reasoning: String,
    pub(crate) tool_calls: Vec<v1::ToolCall>,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<v1::TokenLogprobs>,
    pub(crate) finished: Option<v1::Finished>,
}

/// Reads `events` to their end.
///
/// # Errors
/// The first error of any call; a router that breaks the protocol; an answer of more than `bytes_max`.
pub(crate) async fn collect(
    mut events: CallEvents,
    prompts: usize,
    choices: u32,
    bytes_max: usize,
) -> ApiResult<Answers> {
    let empty = || PromptAnswer {
        choices: vec![Choice::default(); choices as usize],
        ..Default::default()
    };
    let mut answers = Answers {
        model: String::new(),
        prompts: std::iter::repeat_with(empty).take(prompts).collect(),
        tokens: Tokens::default(),
    };
    let mut budget = Budget::new(bytes_max);
    while let Some(event) = events.next().await {
        let (at, event) = event?;
        budget.take(&event)?;
        let prompt = answers.prompts.get_mut(at).ok_or_else(|| stray("prompt", at))?;
        match event {
            Event::Started(started) => {
                answers.model = started.model;
                prompt.token_ids = started.prompt_token_ids;
                prompt.logprobs = started.prompt_logprobs;
            }
            Event::Delta(delta) => prompt.choice(delta.index)?.append(delta)?,
            Event::Finished(finished) => {
                let choice = prompt.choice(finished.index)?;
                choice.finished = Some(finished);
            }
            Event::Usage(usage) => answers.tokens.add(&usage),
            Event::KeepAlive(_) => {}
        }
    }
    Ok(answers)
}

impl PromptAnswer {
    fn choice(&mut self, index: u32) -> ApiResult<&mut Choice> {
        self.choices
            .get_mut(index as usize)
            .ok_or_else(|| stray("choice", index))
    }
}

impl Choice {
    fn append(&mut self, delta: v1::Delta) -> ApiResult<()> {
        self.text.push_str(&delta.text);
        self.reasoning.push_str(&delta.reasoning);
        self.token_ids.extend(delta.token_ids);
        self.logprobs.extend(delta.logprobs);
        for call in delta.tool_calls {
            let at = call.index as usize;
            if at == self.tool_calls.len() {
                self.tool_calls.push(v1::ToolCall {
                    id: call.id,
                    name: call.name,
                    arguments_json: call.arguments,
                });
            } else {
                let known = self
                    .tool_calls
                    .get_mut(at)
                    .ok_or_else(|| stray("tool call", at))?;
                known.arguments_json.push_str(&call.arguments);
            }
        }
        Ok(())
    }

    /// Mean log-probability of the generated tokens, by which `best_of` ranks.
    pub(crate) fn score(&self) -> f32 {
        let sampled = self.logprobs.iter().filter_map(|entry| entry.sampled.as_ref());
        let (sum, count) = sampled.fold((0.0_f32, 0.0_f32), |(sum, count), token| {
            (sum + token.logprob, count + 1.0)
        });
        if count == 0.0 {
            f32::NEG_INFINITY
        } else {
            sum / count
        }
    }
}

/// The router sent an index that was not asked for.
pub(crate) fn stray(what: &str, index: impl std::fmt::Display) -> ApiError {
    ApiError::new(
        StatusCode::BAD_GATEWAY,
        format!("the router answered for {what} {index}, which was not asked for"),
    )
    .code("bad_router_answer")
}

/// The router said its last word, but none for this choice.
pub(crate) fn unfinished(index: usize) -> ApiError {
    ApiError::new(
        StatusCode::BAD_GATEWAY,
        format!("the router did not finish choice {index}"),
    )
    .code("bad_router_answer")
}
