//! Streamed responses: named events with a running number, from `response.created` to `response.completed`
//! (or `.incomplete`, `.failed`).

use std::borrow::Cow;

use axum::response::Response;
use bytes::Bytes;
use conclave_proto::v1;
use serde::Serialize;

use super::custom_input::CustomInput;
use super::items::{self, ItemOut, Part, Progress};
use super::keep::Keep;
use super::object::{Frame, ResponseOut};
use super::tools;
use crate::config::Limits;
use crate::generate::{self, Blocks, CallEvents, Change, Kind, Tokens};
use crate::http::error::{ApiError, ApiResult};
use crate::http::sse::{Events, Gone};
use crate::upstream::Event;

#[derive(Serialize)]
struct Numbered<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    body: Body<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Body<'a> {
    Response {
        response: &'a ResponseOut<'a>,
    },
    Item {
        output_index: usize,
        item: ItemOut<'a>,
    },
    Part {
        item_id: String,
        output_index: usize,
        content_index: u32,
        part: Part<'a>,
    },
    TextDelta {
        item_id: String,
        output_index: usize,
        content_index: u32,
        delta: &'a str,
        logprobs: [(); 0],
    },
    TextDone {
        item_id: String,
        output_index: usize,
        content_index: u32,
        text: &'a str,
        logprobs: [(); 0],
    },
    ReasoningDelta {
        item_id: String,
        output_index: usize,
        content_index: u32,
        delta: &'a str,
    },
    ReasoningDone {
        item_id: String,
        output_index: usize,
        content_index: u32,
        text: &'a str,
    },
    ArgumentsDelta {
        item_id: String,
        output_index: usize,
        delta: &'a str,
    },
    ArgumentsDone {
        item_id: String,
        output_index: usize,
        name: &'a str,
        arguments: &'a str,
    },
    InputDone {
        item_id: String,
        output_index: usize,
        input: Cow<'a, str>,
    },
}

pub(super) fn respond(limits: &Limits, events: CallEvents, frame: Frame, keep: Keep) -> Response {
    generate::respond(limits, events, |out| Writer {
        out,
        frame,
        keep,
        number: 0,
        model: String::new(),
        blocks: Blocks::default(),
        tokens: Tokens::default(),
        finished: None,
        input: CustomInput::default(),
    })
}

struct Writer {
    out: Events,
    frame: Frame,
    keep: Keep,
    number: u64,
    model: String,
    blocks: Blocks,
    tokens: Tokens,
    finished: Option<v1::Finished>,
    /// Of the custom tool's call that is open.
    input: CustomInput,
}

impl generate::Writer for Writer {
    async fn take(&mut self, _prompt: usize, event: Event) -> Result<ApiResult<()>, Gone> {
        match event {
            Event::Started(started) => {
                self.model = started.model;
                let response = self.frame.begun(&self.model);
                for kind in ["response.created", "response.in_progress"] {
                    send(
                        &self.out,
                        &mut self.number,
                        kind,
                        Body::Response { response: &response },
                    )
                    .await?;
                }
            }
            Event::Delta(delta) => match self.blocks.push(delta) {
                Ok(changes) => self.show(changes, Progress::Whole).await?,
                Err(error) => return Ok(Err(error)),
            },
            Event::Finished(finished) => {
                if let Some(error) = generate::finish_error(&finished) {
                    return Ok(Err(error));
                }
                let is_cut = finished.reason() == v1::FinishReason::Length;
                let changes = self.blocks.finish();
                self.show(changes, if is_cut { Progress::Cut } else { Progress::Whole })
                    .await?;
                self.finished = Some(finished);
            }
            Event::Usage(usage) => self.tokens.add(&usage),
            Event::KeepAlive(_) => self.idle().await?,
        }
        Ok(Ok(()))
    }

    async fn idle(&mut self) -> Result<(), Gone> {
        self.out.comment().await
    }

    async fn fail(mut self, error: &ApiError) -> Result<(), Gone> {
        let response = self.frame.failed(&self.model, error);
        send(
            &self.out,
            &mut self.number,
            "response.failed",
            Body::Response { response: &response },
        )
        .await
    }

    async fn end(mut self) -> Result<(), Gone> {
        let Some(finished) = &self.finished else {
            return self.fail(&generate::unfinished(0)).await;
        };
        let response = self
            .frame
            .ended(&self.model, &self.blocks.list, finished, &self.tokens);
        // Stored before it is announced: the client may continue it at once.
        if let Ok(json) = serde_json::to_vec(&response) {
            self.keep
                .store(&self.frame.id, &self.blocks.list, Bytes::from(json));
        }
        let kind = if response.status == "incomplete" {
            "response.incomplete"
        } else {
            "response.completed"
        };
        send(
            &self.out,
            &mut self.number,
            kind,
            Body::Response { response: &response },
        )
        .await
    }
}

impl Writer {
    async fn show(&mut self, changes: Vec<Change>, progress: Progress) -> Result<(), Gone> {
        for change in changes {
            match change {
                Change::Open(at) => self.open(at).await?,
                Change::Piece(at, text) => self.piece(at, &text).await?,
                Change::Close(at) => self.close(at, progress).await?,
            }
        }
        Ok(())
    }

    async fn open(&mut self, at: usize) -> Result<(), Gone> {
        self.input = CustomInput::default();
        let block = &self.blocks.list[at];
        let item = items::item(&self.frame, at, block, Progress::Begun);
        let added = Body::Item {
            output_index: at,
            item,
        };
        send(&self.out, &mut self.number, "response.output_item.added", added).await?;
        let Some(part) = Part::of(&block.kind, "") else {
            return Ok(());
        };
        let item_id = items::id(&self.frame, at, &block.kind);
        let added = Body::Part {
            item_id,
            output_index: at,
            content_index: 0,
            part,
        };
        send(&self.out, &mut self.number, "response.content_part.added", added).await
    }

    async fn piece(&mut self, at: usize, delta: &str) -> Result<(), Gone> {
        let kind = &self.blocks.list[at].kind;
        let item_id = items::id(&self.frame, at, kind);
        let (output_index, content_index) = (at, 0);
        let (name, body) = match kind {
            Kind::Call { name, .. } if self.frame.offered.is_custom(name) => {
                let text = self.input.push(delta);
                return send_input(&self.out, &mut self.number, at, &item_id, &text).await;
            }
            Kind::Text => (
                "response.output_text.delta",
                Body::TextDelta {
                    item_id,
                    output_index,
                    content_index,
                    delta,
                    logprobs: [],
                },
            ),
            Kind::Reasoning => (
                "response.reasoning_text.delta",
                Body::ReasoningDelta {
                    item_id,
                    output_index,
                    content_index,
                    delta,
                },
            ),
            Kind::Call { .. } => (
                "response.function_call_arguments.delta",
                Body::ArgumentsDelta {
                    item_id,
                    output_index,
                    delta,
                },
            ),
        };
        send(&self.out, &mut self.number, name, body).await
    }

    async fn close(&mut self, at: usize, progress: Progress) -> Result<(), Gone> {
        let block = &self.blocks.list[at];
        let item_id = items::id(&self.frame, at, &block.kind);
        let (output_index, content_index, text) = (at, 0, block.content.as_str());
        let (name, body) = match &block.kind {
            Kind::Text => (
                "response.output_text.done",
                Body::TextDone {
                    item_id: item_id.clone(),
                    output_index,
                    content_index,
                    text,
                    logprobs: [],
                },
            ),
            Kind::Reasoning => (
                "response.reasoning_text.done",
                Body::ReasoningDone {
                    item_id: item_id.clone(),
                    output_index,
                    content_index,
                    text,
                },
            ),
            Kind::Call { name, .. } if self.frame.offered.is_custom(name) => {
                let input = tools::as_input(text);
                let rest = self.input.rest(&input);
                send_input(&self.out, &mut self.number, at, &item_id, rest).await?;
                (
                    "response.custom_tool_call_input.done",
                    Body::InputDone {
                        item_id: item_id.clone(),
                        output_index,
                        input,
                    },
                )
            }
            Kind::Call { name, .. } => (
                "response.function_call_arguments.done",
                Body::ArgumentsDone {
                    item_id: item_id.clone(),
                    output_index,
                    name: self.frame.offered.apart(name).1,
                    arguments: text,
                },
            ),
        };
        send(&self.out, &mut self.number, name, body).await?;
        if let Some(part) = Part::of(&block.kind, text) {
            let done = Body::Part {
                item_id,
                output_index,
                content_index,
                part,
            };
            send(&self.out, &mut self.number, "response.content_part.done", done).await?;
        }
        let item = items::item(&self.frame, at, block, progress);
        let done = Body::Item { output_index, item };
        send(&self.out, &mut self.number, "response.output_item.done", done).await
    }
}

/// A piece of a custom tool's input, unless it is empty.
async fn send_input(
    out: &Events,
    number: &mut u64,
    output_index: usize,
    item_id: &str,
    delta: &str,
) -> Result<(), Gone> {
    if delta.is_empty() {
        return Ok(());
    }
    let item_id = item_id.to_owned();
    let body = Body::ArgumentsDelta {
        item_id,
        output_index,
        delta,
    };
    send(out, number, "response.custom_tool_call_input.delta", body).await
}

async fn send(out: &Events, number: &mut u64, kind: &'static str, body: Body<'_>) -> Result<(), Gone> {
    let event = Numbered {
        kind,
        sequence_number: *number,
        body,
    };
    *number += 1;
    out.event(Some(kind), &event).await
}
