//! Streamed chat completions: chunks as OpenAI and vLLM send them.
//!
//! Per choice first a chunk with the role, when its first token is there; then pieces; then the finish reason.
//! At the end the usage, where asked for, and `[DONE]`. An error is an event, also followed by `[DONE]`.

use axum::response::Response;
use conclave_proto::v1;
use serde::Serialize;

use super::answer::{self, StopReason, Usage};
use super::logprobs::{self, ChatLogprobs, PromptLogprobs};
use super::request::StreamOptions;
use super::translate::Show;
use crate::config::Limits;
use crate::generate::{self, CallEvents, Tokens, stray};
use crate::http::error::{ApiError, ApiResult};
use crate::http::now_unix;
use crate::http::sse::{Events, Gone};
use crate::upstream::Event;

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    /// Absent unless asked for, then null but for the chunks that carry it.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCallDelta<'a>>,
}

#[derive(Serialize)]
struct ToolCallDelta<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

pub(super) fn respond(
    limits: &Limits,
    events: CallEvents,
    id: String,
    options: StreamOptions,
    show: Show,
    choices: u32,
) -> Response {
    generate::respond(limits, events, |out| Writer {
        out,
        id,
        created: now_unix(),
        options,
        show,
        started: v1::Started::default(),
        tokens: Tokens::default(),
        choices: vec![Progress::default(); choices as usize],
    })
}

#[derive(Clone, Copy, Default)]
struct Progress {
    has_role: bool,
    tokens: u64,
}

struct Writer {
    out: Events,
    id: String,
    created: u64,
    options: StreamOptions,
    show: Show,
    started: v1::Started,
    tokens: Tokens,
    choices: Vec<Progress>,
}

impl generate::Writer for Writer {
    async fn take(&mut self, _prompt: usize, event: Event) -> Result<ApiResult<()>, Gone> {
        match event {
            Event::Started(started) => self.started = started,
            Event::Usage(usage) => self.tokens.add(&usage),
            Event::KeepAlive(_) => self.idle().await?,
            Event::Delta(delta) => return self.delta(&delta).await,
            Event::Finished(finished) => return self.finished(&finished).await,
        }
        Ok(Ok(()))
    }

    async fn idle(&mut self) -> Result<(), Gone> {
        self.out.comment().await
    }

    async fn fail(self, error: &ApiError) -> Result<(), Gone> {
        answer::fail(&self.out, error).await
    }

    async fn end(self) -> Result<(), Gone> {
        let chunk = |usage| Chunk {
            usage: Some(Some(usage)),
            ..self.empty()
        };
        answer::end(&self.out, self.options, &self.tokens, chunk).await
    }
}

impl Writer {
    async fn delta(&mut self, delta: &v1::Delta) -> Result<ApiResult<()>, Gone> {
        let progress = match self.role(delta.index).await? {
            Ok(progress) => progress,
            Err(error) => return Ok(Err(error)),
        };
        progress.tokens += delta.token_ids.len() as u64;
        let nonempty = |text: &str| !text.is_empty();
        let has_reasoning = nonempty(&delta.reasoning) && !self.show.hides_reasoning;
        let is_visible = nonempty(&delta.text)
            || has_reasoning
            || !delta.tool_calls.is_empty()
            || (self.show.logprobs && !delta.logprobs.is_empty())
            || (self.show.token_ids && !delta.token_ids.is_empty());
        if !is_visible {
            return Ok(Ok(()));
        }
        let reasoning = has_reasoning.then_some(delta.reasoning.as_str());
        let tool_calls = delta.tool_calls.iter().map(|call| ToolCallDelta {
            index: call.index,
            id: nonempty(&call.id).then_some(&call.id),
            kind: nonempty(&call.id).then_some("function"),
            function: FunctionDelta {
                name: nonempty(&call.name).then_some(&call.name),
                arguments: &call.arguments,
            },
        });
        let choice = ChunkChoice {
            index: delta.index,
            delta: Delta {
                role: None,
                content: nonempty(&delta.text).then_some(&delta.text),
                reasoning_content: reasoning,
                reasoning,
                tool_calls: tool_calls.collect(),
            },
            logprobs: (self.show.logprobs && !delta.logprobs.is_empty())
                .then(|| logprobs::chat(&delta.logprobs, self.show.tokens_as_ids)),
            finish_reason: None,
            stop_reason: None,
            token_ids: self.show.token_ids.then_some(&delta.token_ids),
        };
        self.chunk(choice, false).await.map(Ok)
    }

    async fn finished(&mut self, finished: &v1::Finished) -> Result<ApiResult<()>, Gone> {
        let reason = match answer::finish_reason(finished) {
            Ok(reason) => reason,
            Err(error) => return Ok(Err(error)),
        };
        if let Err(error) = self.role(finished.index).await? {
            return Ok(Err(error));
        }
        let choice = ChunkChoice {
            index: finished.index,
            delta: Delta::default(),
            logprobs: None,
            finish_reason: Some(reason),
            stop_reason: answer::stop_reason(finished, self.show),
            token_ids: None,
        };
        self.chunk(choice, false).await.map(Ok)
    }

    /// Sends the choice's first chunk if it was not sent yet.
    async fn role(&mut self, index: u32) -> Result<ApiResult<&mut Progress>, Gone> {
        let at = index as usize;
        match self.choices.get(at) {
            None => return Ok(Err(stray("choice", index))),
            Some(progress) if progress.has_role => {}
            Some(_) => {
                let delta = Delta {
                    role: Some("assistant"),
                    content: Some(""),
                    ..Delta::default()
                };
                let choice = ChunkChoice {
                    index,
                    delta,
                    logprobs: None,
                    finish_reason: None,
                    stop_reason: None,
                    token_ids: None,
                };
                self.chunk(choice, true).await?;
                self.choices[at].has_role = true;
            }
        }
        Ok(Ok(&mut self.choices[at]))
    }

    async fn chunk(&self, choice: ChunkChoice<'_>, is_first: bool) -> Result<(), Gone> {
        let index = choice.index as usize;
        let usage = if self.options.continuous_usage_stats == Some(true) {
            let prompt = self.started.prompt_token_ids.len() as u64;
            let so_far = self.choices.get(index).map_or(0, |progress| progress.tokens);
            Some(Some(Usage::so_far(prompt, so_far)))
        } else {
            self.options.include_usage.filter(|asked| *asked).map(|_| None)
        };
        let chunk = Chunk {
            choices: &[choice],
            usage,
            prompt_logprobs: (is_first && self.show.prompt_logprobs)
                .then_some(PromptLogprobs(&self.started.prompt_logprobs)),
            prompt_token_ids: (is_first && self.show.token_ids).then_some(&self.started.prompt_token_ids),
            ..self.empty()
        };
        self.out.data(&chunk).await
    }

    fn empty(&self) -> Chunk<'_> {
        Chunk {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.started.model,
            choices: &[],
            usage: None,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }
}
