//! Streamed completions: one kind of chunk, over all prompts and choices.

use axum::response::Response;
use conclave_proto::v1;
use serde::Serialize;

use super::answer::{self, StopReason, Usage};
use super::logprobs::{self, CompletionLogprobs, PromptLogprobs};
use super::request::StreamOptions;
use super::translate::Show;
use crate::config::Limits;
use crate::generate::{self, CallEvents, Tokens, stray};
use crate::http::error::{ApiError, ApiResult};
use crate::http::now_unix;
use crate::http::sse::{Events, Gone};
use crate::upstream::Event;

/// What was asked for.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) prompts: usize,
    pub(super) choices: u32,
    pub(super) options: StreamOptions,
    pub(super) show: Show,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Default, Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<CompletionLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

pub(super) fn respond(limits: &Limits, events: CallEvents, id: String, shape: Shape) -> Response {
    generate::respond(limits, events, |out| Writer {
        out,
        id,
        created: now_unix(),
        shape,
        model: String::new(),
        started: vec![v1::Started::default(); shape.prompts],
        tokens: Tokens::default(),
        choices: vec![Progress::default(); shape.prompts * shape.choices as usize],
    })
}

#[derive(Clone, Copy, Default)]
struct Progress {
    has_begun: bool,
    tokens: u64,
}

struct Writer {
    out: Events,
    id: String,
    created: u64,
    shape: Shape,
    model: String,
    started: Vec<v1::Started>,
    tokens: Tokens,
    choices: Vec<Progress>,
}

impl generate::Writer for Writer {
    async fn take(&mut self, prompt: usize, event: Event) -> Result<ApiResult<()>, Gone> {
        match event {
            Event::Started(started) => {
                self.model.clone_from(&started.model);
                self.started[prompt] = started;
            }
            Event::Usage(usage) => self.tokens.add(&usage),
            Event::KeepAlive(_) => self.idle().await?,
            Event::Delta(delta) => return self.delta(prompt, &delta).await,
            Event::Finished(finished) => return self.finished(prompt, &finished).await,
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
        answer::end(&self.out, self.shape.options, &self.tokens, chunk).await
    }
}

impl Writer {
    /// The place of a prompt's choice among all choices.
    fn place(&self, prompt: usize, index: u32) -> ApiResult<usize> {
        if index >= self.shape.choices {
            return Err(stray("choice", index));
        }
        Ok(prompt * self.shape.choices as usize + index as usize)
    }

    async fn delta(&mut self, prompt: usize, delta: &v1::Delta) -> Result<ApiResult<()>, Gone> {
        let show = self.shape.show;
        let place = match self.place(prompt, delta.index) {
            Ok(place) => place,
            Err(error) => return Ok(Err(error)),
        };
        let is_first = !self.choices[place].has_begun;
        self.choices[place].tokens += delta.token_ids.len() as u64;
        let is_visible = !delta.text.is_empty()
            || (show.logprobs && !delta.logprobs.is_empty())
            || (show.token_ids && !delta.token_ids.is_empty());
        if !is_visible {
            return Ok(Ok(()));
        }
        self.choices[place].has_begun = true;
        if is_first && show.echo && show.logprobs {
            let started = &mut self.started[prompt];
            let ids = &started.prompt_token_ids;
            logprobs::name_first(&mut started.prompt_logprobs, ids, &delta.logprobs, &delta.text);
        }
        let started = &self.started[prompt];
        let echoed = if is_first && show.echo {
            started.prompt_logprobs.as_slice()
        } else {
            &[]
        };
        let entries = || echoed.iter().chain(&delta.logprobs);
        let choice = ChunkChoice {
            index: place,
            text: &delta.text,
            logprobs: (show.logprobs && entries().next().is_some())
                .then(|| logprobs::completion(entries(), show.tokens_as_ids)),
            prompt_logprobs: (is_first && show.prompt_logprobs)
                .then_some(PromptLogprobs(&started.prompt_logprobs)),
            prompt_token_ids: (is_first && show.token_ids).then_some(&started.prompt_token_ids),
            token_ids: show.token_ids.then_some(&delta.token_ids),
            ..ChunkChoice::default()
        };
        self.chunk(prompt, choice).await.map(Ok)
    }

    async fn finished(&mut self, prompt: usize, finished: &v1::Finished) -> Result<ApiResult<()>, Gone> {
        let (reason, place) = match (
            answer::finish_reason(finished),
            self.place(prompt, finished.index),
        ) {
            (Ok(reason), Ok(place)) => (reason, place),
            (Err(error), _) | (_, Err(error)) => return Ok(Err(error)),
        };
        let choice = ChunkChoice {
            index: place,
            finish_reason: Some(reason),
            stop_reason: answer::stop_reason(finished, self.shape.show),
            ..ChunkChoice::default()
        };
        self.chunk(prompt, choice).await.map(Ok)
    }

    async fn chunk(&self, prompt: usize, choice: ChunkChoice<'_>) -> Result<(), Gone> {
        let options = self.shape.options;
        let usage = if options.continuous_usage_stats == Some(true) {
            let prompt_tokens = self.started[prompt].prompt_token_ids.len() as u64;
            Some(Some(Usage::so_far(
                prompt_tokens,
                self.choices[choice.index].tokens,
            )))
        } else {
            options.include_usage.filter(|asked| *asked).map(|_| None)
        };
        self.out
            .data(&Chunk {
                choices: &[choice],
                usage,
                ..self.empty()
            })
            .await
    }

    fn empty(&self) -> Chunk<'_> {
        Chunk {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            choices: &[],
            usage: None,
        }
    }
}
