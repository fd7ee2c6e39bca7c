//! Parts that all of OpenAI's answers share: usage, finish reasons, tool calls.

use conclave_proto::v1;
use serde::Serialize;

use super::request::StreamOptions;
use super::translate::Show;
use crate::generate::{Tokens, finish_error};
use crate::http::error::{ApiError, ApiResult};
use crate::http::sse::{Events, Gone};

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
    pub(super) fn of(tokens: &Tokens) -> Self {
        Self {
            prompt_tokens: tokens.prompt,
            completion_tokens: tokens.completion,
            total_tokens: tokens.prompt + tokens.completion,
            prompt_tokens_details: Some(PromptDetails {
                cached_tokens: tokens.cached,
            }),
            completion_tokens_details: Some(CompletionDetails {
                reasoning_tokens: tokens.reasoning,
            }),
        }
    }

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
    if let Some(error) = finish_error(finished) {
        return Err(error);
    }
    Ok(match finished.reason() {
        v1::FinishReason::Length => "length",
        v1::FinishReason::ToolCalls => "tool_calls",
        _ => "stop",
    })
}

/// The stop string or stop token that ended a choice, as vLLM shows it: a number for a token.
pub(super) fn stop_reason(finished: &v1::Finished, show: Show) -> Option<StopReason> {
    match finished.stop_reason.as_str() {
        "" => None,
        text => Some(
            text.parse()
                .ok()
                .filter(|_| !show.numbers_stop)
                .map_or_else(|| StopReason::Text(text.to_owned()), StopReason::Token),
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

/// The last words of a streamed answer that failed.
pub(super) async fn fail(out: &Events, error: &ApiError) -> Result<(), Gone> {
    out.raw(&error.to_openai()).await?;
    out.done().await
}

/// The last words of a whole streamed answer: its usage in a chunk of its own, where asked for.
pub(super) async fn end<C: Serialize>(
    out: &Events,
    options: StreamOptions,
    tokens: &Tokens,
    chunk: impl FnOnce(Usage) -> C,
) -> Result<(), Gone> {
    if options.include_usage == Some(true) {
        out.data(&chunk(Usage::of(tokens))).await?;
    }
    out.done().await
}
