//! The response object, at any point of its life.

use conclave_proto::v1;
use serde::Serialize;

use super::echo::Echo;
use super::items::{self, ItemOut, Progress};
use super::tools::Offered;
use crate::generate::{Block, Tokens};
use crate::http::error::ApiError;

#[derive(Serialize)]
pub(super) struct ResponseOut<'a> {
    pub(super) id: &'a str,
    object: &'static str,
    created_at: u64,
    pub(super) status: &'static str,
    background: bool,
    error: Option<ErrorOut<'a>>,
    incomplete_details: Option<Incomplete>,
    model: &'a str,
    output: Vec<ItemOut<'a>>,
    usage: Option<Usage>,
    service_tier: &'static str,
    truncation: &'static str,
    #[serde(flatten)]
    echo: &'a Echo,
}

#[derive(Serialize)]
struct ErrorOut<'a> {
    code: &'a str,
    message: &'a str,
}

#[derive(Serialize)]
struct Incomplete {
    reason: &'static str,
}

#[derive(Serialize)]
struct Usage {
    input_tokens: u64,
    input_tokens_details: InputDetails,
    output_tokens: u64,
    output_tokens_details: OutputDetails,
    total_tokens: u64,
}

#[derive(Serialize)]
struct InputDetails {
    cached_tokens: u64,
}

#[derive(Serialize)]
struct OutputDetails {
    reasoning_tokens: u64,
}

impl Usage {
    fn of(tokens: &Tokens) -> Self {
        Self {
            input_tokens: tokens.prompt,
            input_tokens_details: InputDetails {
                cached_tokens: tokens.cached,
            },
            output_tokens: tokens.completion,
            output_tokens_details: OutputDetails {
                reasoning_tokens: tokens.reasoning,
            },
            total_tokens: tokens.prompt + tokens.completion,
        }
    }
}

/// What stays the same over a response's life.
pub(super) struct Frame {
    /// `resp_…`.
    pub(super) id: String,
    /// The part of the id that its items share.
    pub(super) bare_id: String,
    pub(super) created_at: u64,
    pub(super) echo: Echo,
    /// The client asked for reasoning that it can carry itself.
    pub(super) seals: bool,
    pub(super) offered: Offered,
}

impl Frame {
    /// A response that is being made.
    pub(super) fn begun<'a>(&'a self, model: &'a str) -> ResponseOut<'a> {
        ResponseOut {
            id: &self.id,
            object: "response",
            created_at: self.created_at,
            status: "in_progress",
            background: false,
            error: None,
            incomplete_details: None,
            model,
            output: Vec::new(),
            usage: None,
            service_tier: "default",
            truncation: "disabled",
            echo: &self.echo,
        }
    }

    /// A response that is done, or as done as its bound on tokens allowed.
    pub(super) fn ended<'a>(
        &'a self,
        model: &'a str,
        blocks: &'a [Block],
        finished: &v1::Finished,
        tokens: &Tokens,
    ) -> ResponseOut<'a> {
        let is_cut = finished.reason() == v1::FinishReason::Length;
        let last = blocks.len().saturating_sub(1);
        let item = |(at, block)| {
            let progress = if is_cut && at == last {
                Progress::Cut
            } else {
                Progress::Whole
            };
            items::item(self, at, block, progress)
        };
        ResponseOut {
            status: if is_cut { "incomplete" } else { "completed" },
            incomplete_details: is_cut.then_some(Incomplete {
                reason: "max_output_tokens",
            }),
            output: blocks.iter().enumerate().map(item).collect(),
            usage: Some(Usage::of(tokens)),
            ..self.begun(model)
        }
    }

    /// A response that failed after it had begun.
    pub(super) fn failed<'a>(&'a self, model: &'a str, error: &'a ApiError) -> ResponseOut<'a> {
        let code = error.code.as_deref().unwrap_or("server_error");
        ResponseOut {
            status: "failed",
            error: Some(ErrorOut {
                code,
                message: &error.message,
            }),
            ..self.begun(model)
        }
    }
}
