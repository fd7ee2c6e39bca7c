//! Parts that all of OpenAI's answers share: usage, finish reasons, tool calls.

use conclave_proto::v1;
use http::StatusCode;
use serde::Serialize;

use crate::http::error::{ApiError, ApiResult};

/// Tokens counted over all prompts of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Tokens {
    prompt: u64,
    completion: u64,
    cached: u64,
    reasoning: u64,
}

impl Tokens {
    pub(super) fn add(&mut self, usage: &v1::Usage) {
        self.prompt += u64::from(usage.prompt_tokens);
        self.completion += u64::from(usage.completion_tokens);
        self.cached += u64::from(usage.cached_tokens);
        self.reasoning += u64::from(usage.reasoning_tokens);
    }

    pub(super) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt,
            completion_tokens: self.completion,
            total_tokens: self.prompt + self.completion,
            prompt_tokens_details: Some(PromptDetails {
                cached_tokens: self.cached,
            }),
            completion_tokens_details: Some(CompletionDetails {
                reasoning_tokens: self.reasoning,
            }),
        }
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptDetails>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionDetails>,
}

impl Usage {
    /// What is known in the middle of an answer.
    pub(super) fn so_far(prompt_tokens: u64, completion_tokens: u64) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: None,
            completion_tokens_details: None,
        }
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptDetails {
    cached_tokens: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct CompletionDetails {
    reasoning_tokens: u64,
}

/// OpenAI's word for a choice's end.
///
/// # Errors
/// The router gave this choice up: that is an error of the whole answer, since nothing else may look whole.
pub(super) fn finish_reason(finished: &v1::Finished) -> ApiResult<&'static str> {
    match finished.reason() {
        v1::FinishReason::Stop => Ok("stop"),
        v1::FinishReason::Length => Ok("length"),
        v1::FinishReason::ToolCalls => Ok("tool_calls"),
        v1::FinishReason::Cancelled => Err(ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the router cancelled the request",
        )
        .code("cancelled")),
        v1::FinishReason::Error | v1::FinishReason::Unspecified => {
            let message = if finished.error.is_empty() {
                "generation failed"
            } else {
                &finished.error
            };
            Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("generation_failed"))
        }
    }
}

/// The stop string or stop token that ended a choice, as vLLM shows it: a number for a token.
pub(super) fn stop_reason(finished: &v1::Finished) -> Option<StopReason> {
    match finished.stop_reason.as_str() {
        "" => None,
        // A stop string of digits only is not told from a token; the client asked for one or the other.
        text => Some(
            text.parse()
                .map_or_else(|_| StopReason::Text(text.to_owned()), StopReason::Token),
        ),
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum StopReason {
    Token(u32),
    Text(String),
}

#[derive(Debug, Serialize)]
pub(super) struct ToolCall<'a> {
    pub(super) id: &'a str,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) function: Function<'a>,
}

#[derive(Debug, Serialize)]
pub(super) struct Function<'a> {
    pub(super) name: &'a str,
    pub(super) arguments: &'a str,
}
