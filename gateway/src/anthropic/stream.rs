//! Streamed messages: `message_start`, then each block's start, deltas and stop, `message_delta`, `message_stop`.
//!
//! The router's keep-alives and its silences become `ping` events. An error is an `error` event, and the last one.

use axum::response::Response;
use serde::Serialize;

use super::answer::{self, BlockOut, Job, Message, Usage};
use super::errors;
use crate::config::Limits;
use crate::generate::{self, Blocks, CallEvents, Change, Kind, Tokens};
use crate::http::error::{ApiError, ApiResult};
use crate::http::sse::{Events, Gone};
use crate::upstream::Event;

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Out<'a> {
    MessageStart {
        message: Message<'a>,
    },
    ContentBlockStart {
        index: usize,
        content_block: BlockOut<'a>,
    },
    ContentBlockDelta {
        index: usize,
        delta: Delta<'a>,
    },
    ContentBlockStop {
        index: usize,
    },
    MessageDelta {
        delta: End<'a>,
        usage: Usage,
    },
    MessageStop,
    Ping,
}

impl Out<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
            Self::Ping => "ping",
        }
    }
}

#[derive(Serialize)]
#[serde(tag = "type")]
enum Delta<'a> {
    #[serde(rename = "text_delta")]
    Text { text: &'a str },
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: &'a str },
    #[serde(rename = "signature_delta")]
    Signature { signature: String },
    #[serde(rename = "input_json_delta")]
    Input { partial_json: &'a str },
}

#[derive(Serialize)]
struct End<'a> {
    stop_reason: &'static str,
    stop_sequence: Option<&'a str>,
}

pub(super) fn respond(limits: &Limits, events: CallEvents, job: Job) -> Response {
    generate::respond(limits, events, |out| Writer {
        out,
        job,
        blocks: Blocks::default(),
        shown: Vec::new(),
        tokens: Tokens::default(),
        finished: None,
    })
}

struct Writer {
    out: Events,
    job: Job,
    blocks: Blocks,
    /// The number that the client knows each block by; `None` for thinking that it did not want.
    shown: Vec<Option<usize>>,
    tokens: Tokens,
    finished: Option<conclave_proto::v1::Finished>,
}

impl generate::Writer for Writer {
    async fn take(&mut self, _prompt: usize, event: Event) -> Result<ApiResult<()>, Gone> {
        match event {
            Event::Started(started) => {
                let tokens = Tokens {
                    prompt: started.prompt_token_ids.len() as u64,
                    ..Tokens::default()
                };
                let message = Message {
                    id: &self.job.id,
                    kind: "message",
                    role: "assistant",
                    model: &started.model,
                    content: Vec::new(),
                    stop_reason: None,
                    stop_sequence: None,
                    usage: Usage::of(&tokens),
                };
                self.send(&Out::MessageStart { message }).await?;
            }
            Event::Delta(delta) => match self.blocks.push(delta) {
                Ok(changes) => self.show(changes).await?,
                Err(error) => return Ok(Err(error)),
            },
            Event::Finished(finished) => {
                if let Some(error) = generate::finish_error(&finished) {
                    return Ok(Err(error));
                }
                let changes = self.blocks.finish();
                self.show(changes).await?;
                self.finished = Some(finished);
            }
            Event::Usage(usage) => self.tokens.add(&usage),
            Event::KeepAlive(_) => self.idle().await?,
        }
        Ok(Ok(()))
    }

    async fn idle(&mut self) -> Result<(), Gone> {
        self.send(&Out::Ping).await
    }

    async fn fail(self, error: &ApiError) -> Result<(), Gone> {
        self.out
            .event(Some("error"), &errors::envelope(error, &self.job.request_id))
            .await
    }

    async fn end(self) -> Result<(), Gone> {
        let Some(finished) = &self.finished else {
            return self.fail(&generate::unfinished(0)).await;
        };
        let (stop_reason, stop_sequence) = answer::stop(finished, &self.job.stop_sequences);
        let delta = End {
            stop_reason,
            stop_sequence,
        };
        self.send(&Out::MessageDelta {
            delta,
            usage: Usage::of(&self.tokens),
        })
        .await?;
        self.send(&Out::MessageStop).await
    }
}

impl Writer {
    async fn send(&self, event: &Out<'_>) -> Result<(), Gone> {
        self.out.event(Some(event.name()), event).await
    }

    async fn show(&mut self, changes: Vec<Change>) -> Result<(), Gone> {
        for change in changes {
            let (Change::Open(at) | Change::Piece(at, _) | Change::Close(at)) = &change;
            let block = &self.blocks.list[*at];
            if matches!(change, Change::Open(_)) {
                let is_hidden = self.job.hides_thinking && block.kind == Kind::Reasoning;
                let next = self.shown.iter().flatten().count();
                self.shown.push((!is_hidden).then_some(next));
            }
            let Some(index) = self.shown[*at] else { continue };
            match &change {
                Change::Open(_) => {
                    self.send(&Out::ContentBlockStart {
                        index,
                        content_block: BlockOut::empty(block),
                    })
                    .await?;
                }
                Change::Piece(_, text) => {
                    let delta = match block.kind {
                        Kind::Reasoning => Delta::Thinking { thinking: text },
                        Kind::Text => Delta::Text { text },
                        Kind::Call { .. } => Delta::Input { partial_json: text },
                    };
                    self.send(&Out::ContentBlockDelta { index, delta }).await?;
                }
                Change::Close(_) => {
                    if block.kind == Kind::Reasoning {
                        let delta = Delta::Signature {
                            signature: answer::signature(&block.content),
                        };
                        self.send(&Out::ContentBlockDelta { index, delta }).await?;
                    }
                    self.send(&Out::ContentBlockStop { index }).await?;
                }
            }
        }
        Ok(())
    }
}
