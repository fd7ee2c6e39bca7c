//! Items into the messages of a chat.
//!
//! Reasoning, text and calls that follow each other are one assistant message, as the chat knows it; everything
//! else ends it.

use conclave_proto::v1;
use conclave_proto::v1::chat_message::Content as ProtoContent;

use super::input::{Input, ItemIn, PartIn, Text};
use super::request::FormatIn;
use super::{items, tools};
use crate::http::error::{ApiError, ApiResult};
use crate::http::json;

pub(super) fn wrong(param: impl Into<String>, problem: &str) -> ApiError {
    let param = param.into();
    let message = format!("{param}: {problem}");
    ApiError::field(param, message).code("invalid_value")
}

fn message(role: &str, content: ProtoContent) -> v1::ChatMessage {
    v1::ChatMessage {
        role: role.into(),
        content: Some(content),
        ..Default::default()
    }
}

pub(super) fn system(instructions: String) -> v1::ChatMessage {
    message("system", ProtoContent::Text(instructions))
}

pub(super) fn messages(input: Input) -> ApiResult<Vec<v1::ChatMessage>> {
    let items = match input {
        Input::Text(text) => return Ok(vec![message("user", ProtoContent::Text(text))]),
        Input::Items(items) => items,
    };
    let mut turns = Turns::default();
    for (at, item) in items.into_iter().enumerate() {
        turns.item(item, &format!("input[{at}]"))?;
    }
    Ok(turns.done())
}

/// Builds messages; the last assistant message stays open for what belongs to it.
#[derive(Default)]
pub(super) struct Turns {
    messages: Vec<v1::ChatMessage>,
    assistant: Option<v1::ChatMessage>,
}

impl Turns {
    fn item(&mut self, item: ItemIn, path: &str) -> ApiResult<()> {
        let kind = item.kind.as_deref().unwrap_or("message");
        match kind {
            "message" => self.message(item, path),
            "reasoning" => {
                self.reasoning(&reasoning_text(item, path)?);
                Ok(())
            }
            "function_call" | "custom_tool_call" => {
                let arguments_json = match kind {
                    "function_call" => item
                        .arguments
                        .ok_or_else(|| wrong(format!("{path}.arguments"), "missing"))?,
                    _ => tools::as_arguments(
                        &item
                            .input
                            .ok_or_else(|| wrong(format!("{path}.input"), "missing"))?,
                    ),
                };
                let name = item
                    .name
                    .ok_or_else(|| wrong(format!("{path}.name"), "missing"))?;
                self.call(v1::ToolCall {
                    id: item
                        .call_id
                        .ok_or_else(|| wrong(format!("{path}.call_id"), "missing"))?,
                    name: match item.namespace {
                        Some(namespace) => tools::qualified(&namespace, &name),
                        None => name,
                    },
                    arguments_json,
                });
                Ok(())
            }
            "function_call_output" | "custom_tool_call_output" => {
                let output = item
                    .output
                    .ok_or_else(|| wrong(format!("{path}.output"), "missing"))?;
                let content = content(output, &format!("{path}.output"))?;
                let tool_call_id = item
                    .call_id
                    .ok_or_else(|| wrong(format!("{path}.call_id"), "missing"))?;
                self.close();
                self.messages.push(v1::ChatMessage {
                    tool_call_id,
                    ..message("tool", content)
                });
                Ok(())
            }
            other => {
                let param = format!("{path}.type");
                let message = format!("{param}: items of type {other:?} are not served here");
                Err(ApiError::unsupported(param, message))
            }
        }
    }

    fn message(&mut self, item: ItemIn, path: &str) -> ApiResult<()> {
        let role = item
            .role
            .ok_or_else(|| wrong(format!("{path}.role"), "missing"))?;
        let text = item
            .content
            .ok_or_else(|| wrong(format!("{path}.content"), "missing"))?;
        let content = content(text, &format!("{path}.content"))?;
        match role.as_str() {
            "assistant" => self.text(&flat(content)),
            "user" | "system" | "developer" => {
                self.close();
                self.messages.push(message(&role, content));
            }
            other => {
                let problem = format!("{other:?} is not user, assistant, system or developer");
                return Err(wrong(format!("{path}.role"), &problem));
            }
        }
        Ok(())
    }

    fn open(&mut self) -> &mut v1::ChatMessage {
        self.assistant
            .get_or_insert_with(|| message("assistant", ProtoContent::Text(String::new())))
    }

    pub(super) fn text(&mut self, text: &str) {
        if let Some(ProtoContent::Text(so_far)) = &mut self.open().content {
            so_far.push_str(text);
        }
    }

    pub(super) fn reasoning(&mut self, text: &str) {
        // Reasoning begins a turn: what came before it was another.
        if self
            .assistant
            .as_ref()
            .is_some_and(|open| !open.tool_calls.is_empty() || has_text(open))
        {
            self.close();
        }
        self.open()
            .reasoning_content
            .get_or_insert_default()
            .push_str(text);
    }

    pub(super) fn call(&mut self, call: v1::ToolCall) {
        self.open().tool_calls.push(call);
    }

    fn close(&mut self) {
        self.messages.extend(self.assistant.take());
    }

    pub(super) fn done(mut self) -> Vec<v1::ChatMessage> {
        self.close();
        self.messages
    }
}

fn has_text(message: &v1::ChatMessage) -> bool {
    matches!(&message.content, Some(ProtoContent::Text(text)) if !text.is_empty())
}

fn part_text(part: PartIn, path: &str) -> ApiResult<String> {
    match (part.kind.as_str(), part.text, part.refusal) {
        ("input_text" | "output_text" | "text" | "summary_text" | "reasoning_text", Some(text), _)
        | ("refusal", _, Some(text)) => Ok(text),
        ("input_text" | "output_text" | "text" | "summary_text" | "reasoning_text" | "refusal", ..) => {
            Err(wrong(format!("{path}.text"), "missing"))
        }
        (other, ..) => {
            let message =
                format!("{path}: content of type {other:?} is not served here: this model reads text");
            Err(ApiError::unsupported(path, message))
        }
    }
}

fn parts(parts: Vec<PartIn>, path: &str) -> ApiResult<Vec<String>> {
    let one = |(at, part)| part_text(part, &format!("{path}[{at}]"));
    parts.into_iter().enumerate().map(one).collect()
}

fn content(text: Text, path: &str) -> ApiResult<ProtoContent> {
    Ok(match text {
        Text::Whole(text) => ProtoContent::Text(text),
        Text::Parts(list) => {
            let part = |text| v1::ContentPart {
                r#type: "text".into(),
                text,
            };
            let parts = parts(list, path)?.into_iter().map(part).collect();
            ProtoContent::Parts(v1::ContentParts { parts })
        }
    })
}

fn flat(content: ProtoContent) -> String {
    match content {
        ProtoContent::Text(text) => text,
        ProtoContent::Parts(parts) => parts.parts.into_iter().map(|part| part.text).collect(),
    }
}

/// Reasoning as this server gave it: as content, sealed for clients that keep nothing else, or as a summary.
fn reasoning_text(item: ItemIn, path: &str) -> ApiResult<String> {
    if let Some(text) = item.content {
        return content(text, &format!("{path}.content")).map(flat);
    }
    if let Some(text) = item.encrypted_content.as_deref().and_then(items::unseal) {
        return Ok(text);
    }
    parts(item.summary.unwrap_or_default(), &format!("{path}.summary")).map(|texts| texts.concat())
}

/// `text.format`.
pub(super) fn structured(format: &FormatIn) -> ApiResult<Option<v1::StructuredOutput>> {
    use v1::structured_output::Kind;
    let kind = match format.kind.as_str() {
        "text" => return Ok(None),
        "json_object" => Kind::JsonObject(true),
        "json_schema" => {
            let path = "text.format.schema";
            let schema = format.schema.as_ref().ok_or_else(|| wrong(path, "missing"))?;
            json::check_object(schema, path)?;
            Kind::JsonSchema(schema.get().to_owned())
        }
        other => {
            let problem = format!("{other:?} is not text, json_object or json_schema");
            return Err(wrong("text.format.type", &problem));
        }
    };
    Ok(Some(v1::StructuredOutput { kind: Some(kind) }))
}
